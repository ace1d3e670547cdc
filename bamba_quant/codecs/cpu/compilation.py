"""Kernels of formats and schemes by the names of their formats, compiled on first use and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import types

from bamba_reference.runtime import jit as shared
from bamba_reference.runtime.jit import inlined

__all__ = ["KERNELS", "compile_kernel", "compiled", "inlined", "kernel"]

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[[Any, Any, Any], None]

KERNELS: dict[str, Kernel] = {}

_INPUT = types.Array(types.float32, 2, "C", readonly=True)
_IMPORTANCE = types.Array(types.float32, 1, "C", readonly=True)
_OUTPUT = types.Array(types.uint8, 2, "C")

_FORMATS = Path(__file__).parents[1]
_SCHEMES = _FORMATS / "schemes"
_PACKAGES = (_FORMATS, _FORMATS / "cpu", _SCHEMES, _SCHEMES / "cpu")


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Make ``function(x (rows, n), importance (n,) or None, out (rows, row_bytes))`` the twin of a format."""

    def register(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return register


def compiled(name: str, weighted: bool) -> Kernel:
    """The machine code of a kernel, with importance or without; it runs without the interpreter lock."""
    return compile_kernel(KERNELS[name], types.void(_INPUT, _IMPORTANCE if weighted else types.none, _OUTPUT))


def compile_kernel(function: Function, signature: Any) -> Function:
    """``function`` compiled for one signature, without the interpreter lock, once on this machine."""
    return shared.compile_kernel(function, signature, _PACKAGES)
