"""Kernels that numba compiles for the processor they run on."""
