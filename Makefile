# On a fresh machine with Python and make: `make demo` or `make test`, nothing else first. `make help` lists all targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# llama.cpp, the oracle of the tests, is built from source. Built for the host's processor it crashes on virtual machines
# that report instructions they do not have; every x86-64 processor of the last ten years has these four.
LLAMA_CMAKE := -DGGML_NATIVE=OFF
ifeq ($(shell uname -m),x86_64)
LLAMA_CMAKE += -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
endif

MINI := MODEL=bamba_quant/data/bamba-mini GATES=tests/accuracy/bamba-mini.toml CTX=256 CHUNKS=32
# The accuracy report is of the larger model beside the repository, where that exists.
BAMBA_QUANT_SHARED ?= ../shared
ifneq ($(wildcard $(BAMBA_QUANT_SHARED)/models/bamba-43m/config.json),)
ACCURACY := MODEL=$(BAMBA_QUANT_SHARED)/models/bamba-43m TEXT=$(BAMBA_QUANT_SHARED)/data/eval.txt \
	GATES=tests/accuracy/bamba-43m.toml CTX=512 CHUNKS=16
else
ACCURACY := $(MINI)
endif
# Text to tune the small model on: a part of Python's help that is not evaluated.
OTHER_HELP := from pydoc_data.topics import topics; print(''.join(topics[name] for name in sorted(topics))[200000:])

.PHONY: help demo test test-fast docs fuzz crash lint format hooks accuracy bench bench-cuda clean
.DEFAULT_GOAL := demo

# Prints the comment after each target's `##`.
help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## Install into .venv and convert the embedded model to GGUF, FP8 and int4, with a report.
	@echo "converting a small model and evaluating the files"
	$(BIN)/bamba-quant demo

# Test files run in parallel, one process per processor, the longest first (tests/conftest.py); tests of a file share
# fixtures. With bytecode, since many tests start Python.
test: $(VENV)/test.stamp ## Install the test tools and run all tests (about 20 minutes on two cores).
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Some of every package. Each path exists (tests/test_project_files.py).
FAST_TESTS := tests/checkpoint/test_config_groups.py tests/checkpoint/test_gguf.py \
	tests/checkpoint/test_huggingface.py tests/cli/test_console.py tests/codecs/test_bytes.py \
	tests/codecs/test_dispatch.py tests/evaluation/test_gates.py tests/families tests/files \
	tests/inference/test_weights.py tests/metadata tests/planning/test_plan.py tests/planning/test_repair.py \
	tests/recipes/test_recipe_file.py tests/reference/test_scan.py tests/reference/test_state.py \
	tests/report/test_json_report.py tests/report/test_markdown.py tests/test_errors.py tests/test_layers.py \
	tests/test_project_files.py tests/tokenizers/test_gguf_vocabulary.py tests/writers/test_commit.py \
	tests/writers/test_gguf.py
test-fast: $(VENV)/test.stamp ## Run tests of every package that together take less than two minutes on two cores.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(FAST_TESTS)

fuzz: $(VENV)/test.stamp ## Read 100,000 damaged inputs; FUZZ="--seed 3" for other ones.
	$(BIN)/python -m tests.fuzz $(FUZZ)

# `make test` runs a few of these cases.
crash: $(VENV)/test.stamp ## Kill every writing command at 100 random times and at every rename.
	$(BIN)/python -m tests.crash --cases 100

lint: $(VENV)/test.stamp ## Run the linter, the format check and the type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.stamp ## Format the code and apply the linter's fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/test.stamp ## Install the pre-commit hooks, which run the linters before each commit.
	$(INSTALL) pre-commit
	$(BIN)/pre-commit install

docs: $(VENV)/docs.stamp ## Build the documentation into site/, with every warning an error.
	$(BIN)/mkdocs build --quiet

accuracy: $(VENV)/demo.stamp ## Measure the accuracy of the project's own files and fail if a gate fails.
	PATH="$(abspath $(BIN)):$$PATH" TYPES="bf16 q8_0 q4_k_m fp8 int4" OUT=accuracy $(ACCURACY) .ci/accuracy
	mkdir -p accuracy/tuned
	$(BIN)/python -c "$(OTHER_HELP)" > accuracy/tuned/other-help.txt
	PATH="$(abspath $(BIN)):$$PATH" TYPES="q4_k_m q4_k_m-tuned" OUT=accuracy/tuned TUNE=accuracy/tuned/other-help.txt \
		TUNING="--tune-steps 30" $(MINI) .ci/accuracy

bench: $(VENV)/test.stamp ## Run the benchmarks of the CPU.
	$(BIN)/python benchmarks/convert.py
	PYTHONPATH=. $(BIN)/python benchmarks/quantize.py --types q8_0 q4_k_m
	$(BIN)/python -m benchmarks.quantizers
	$(BIN)/python -m benchmarks.reading
	$(BIN)/python -m benchmarks.products

# On a machine with two GPUs (with one: python -m benchmarks.cuda --only tests kernels gradients forward evaluate). It
# compares with mamba_ssm and causal_conv1d where they are installed; they are compiled, so this target does not do it.
bench-cuda: $(VENV)/test.stamp ## Run the benchmarks of a GPU.
	$(BIN)/python -m benchmarks.cuda

clean: ## Remove the virtual environment and everything that the targets made.
	rm -rf $(VENV) build dist site *.egg-info demo bench accuracy

$(BIN)/python:
	@echo "making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# pip itself is quiet: it would print some hundred lines.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing bamba-quant, torch and numba into $(VENV): some minutes, once"
	$(INSTALL) --editable ".[torch]"
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[docs]"
	touch $@

# llama-cpp-python first and alone, so that pip caches its build before anything else can fail.
$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	CMAKE_ARGS="$(LLAMA_CMAKE)" $(INSTALL) llama-cpp-python
	$(INSTALL) --editable ".[test]"
	# torch's CUDA builds depend on a Triton; with the CPU build, this one runs the kernels in its interpreter.
	$(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) --no-deps triton==3.6.0
	touch $@
