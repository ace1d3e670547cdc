"""Set before anything imports torch and Triton: Triton interprets without a GPU, and processes share the processors.

The longest files run first, so that at the end no process waits long for another.
"""

import os
from pathlib import Path

# Of pytest-xdist's processes each has its part: threads that wait on the same processors make all three times slower.
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if processes > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
# pytest-xdist sets the width of its own screen, and commands take it for that of a terminal.
os.environ.pop("COLUMNS", None)

import torch  # noqa: E402

# Triton reads this wherever a kernel is defined, and defines some of its own; torchao imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

# Files of more than 20 seconds of a processor, most of them first.
LONGEST = (
    "cli/test_processes",
    "test_families",
    "evaluation/test_against_llama",
    "recipes/test_llama_quantize",
    "docs/test_snippets",
    "cli/test_ranks",
    "evaluation/test_evaluate",
    "calibration/test_tune",
    "fuzz/test_fuzz",
    "reference/test_against_transformers",
    "crash/test_crash",
    "report/test_browser",
    "accuracy/test_gates",
    "toys/test_toys",
    "reference/cpu_kernels/test_choice",
    "tasks/test_language_model",
    "writers/test_quantized",
    "families/test_configs",
    "test_action",
    "planning/test_quantized_families",
)
_PLACES = {f"{name}.py": place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    files = {item.path: _PLACES.get(item.path.relative_to(root).as_posix(), len(LONGEST)) for item in items}
    items.sort(key=lambda item: files[item.path])
