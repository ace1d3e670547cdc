"""Gradients of the Triton kernels: each operation as an autograd function over its forward kernel."""
