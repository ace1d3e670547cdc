"""Faster operations behind ``torch.backend.Backend``: Triton's kernels here, the CPU's in ``cpu``."""
