"""Set before anything imports torch and Triton: Triton interprets without a GPU, and processes share the processors."""

import os

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
