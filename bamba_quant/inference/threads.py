"""How many threads run a model."""

from __future__ import annotations


def use_threads(threads: int | None) -> None:
    """Have this process compute with ``threads`` threads: torch's, which the CPU kernels follow. None: torch's own."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
