# On a fresh machine with Python and make: `make demo` or `make test`, nothing else first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# llama.cpp, the oracle of the tests, is built from source. Built for the machine it stands on, it dies on virtual
# machines that promise instructions they do not have; these four every x86-64 of the last ten years has.
LLAMA_CMAKE := -DGGML_NATIVE=OFF
ifeq ($(shell uname -m),x86_64)
LLAMA_CMAKE += -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
endif

MINI := MODEL=bamba_quant/data/bamba-mini GATES=tests/accuracy/bamba-mini.toml CTX=256 CHUNKS=32
# The accuracy report is of the larger model beside the repository, with its text, where that is there.
BAMBA_QUANT_SHARED ?= ../shared
ifneq ($(wildcard $(BAMBA_QUANT_SHARED)/models/bamba-43m/config.json),)
ACCURACY := MODEL=$(BAMBA_QUANT_SHARED)/models/bamba-43m TEXT=$(BAMBA_QUANT_SHARED)/data/eval.txt \
	GATES=tests/accuracy/bamba-43m.toml CTX=512 CHUNKS=16
else
ACCURACY := $(MINI)
endif
# What tuned rounding gains, on the small model: tuned on a part of Python's help that no chunk is taken from.
OTHER_HELP := from pydoc_data.topics import topics; print(''.join(topics[name] for name in sorted(topics))[200000:])

.PHONY: demo test fuzz crash lint format accuracy bench bench-cuda clean
.DEFAULT_GOAL := demo

demo: $(VENV)/demo.stamp
	$(BIN)/bamba-quant demo

# Files of tests side by side, a processor each (tests/conftest.py); a file's tests share what it makes for them. In the
# order of their names, since those with few tests are the longest. With bytecode, since many of them start Python.
test: $(VENV)/test.stamp
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# 100,000 changed files of every kind, on two processes, in half an hour; `make fuzz FUZZ="--seed 3"` for others.
fuzz: $(VENV)/test.stamp
	$(BIN)/python -m tests.fuzz $(FUZZ)

# Every writing command killed at 100 random moments and at every call that changes a name; make test does a few of them.
crash: $(VENV)/test.stamp
	$(BIN)/python -m tests.crash --cases 100

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

accuracy: $(VENV)/demo.stamp
	PATH="$(abspath $(BIN)):$$PATH" TYPES="bf16 q8_0 q4_k_m fp8 int4" OUT=accuracy $(ACCURACY) .ci/accuracy
	mkdir -p accuracy/tuned
	$(BIN)/python -c "$(OTHER_HELP)" > accuracy/tuned/other-help.txt
	PATH="$(abspath $(BIN)):$$PATH" TYPES="q4_k_m q4_k_m-tuned" OUT=accuracy/tuned TUNE=accuracy/tuned/other-help.txt \
		TUNING="--tune-steps 30" $(MINI) .ci/accuracy

bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks/convert.py
	PYTHONPATH=. $(BIN)/python benchmarks/quantize.py --types q8_0 q4_k_m
	$(BIN)/python -m benchmarks.quantizers
	$(BIN)/python -m benchmarks.reading

# On a machine with two GPUs (with one: python -m benchmarks.cuda --only tests kernels forward evaluate). Its peers
# mamba_ssm and causal_conv1d are compiled and not installed by this.
bench-cuda: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.cuda

clean:
	rm -rf $(VENV) build *.egg-info demo bench accuracy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

# llama-cpp-python first and apart, so that its build is cached before anything else can fail.
$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	CMAKE_ARGS="$(LLAMA_CMAKE)" $(INSTALL) llama-cpp-python
	$(INSTALL) --editable ".[test]"
	# torch's CUDA builds bring the Triton they need; beside its CPU build this one interprets the kernels.
	$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) --no-deps triton==3.6.0
	touch $@
