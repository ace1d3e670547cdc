"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before anything imports Triton."""

import os

import torch

# Triton reads this wherever a kernel is defined, and defines some of its own; torchao imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
