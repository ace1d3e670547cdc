"""Compiles the kernels of codecs on first use and keeps them on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import types

from bamba_reference.runtime import jit as shared
from bamba_reference.runtime.jit import inlined

__all__ = ["compile_kernel", "compiled", "inlined"]

Function = TypeVar("Function", bound=Callable[..., Any])
# function(x (rows, n), importance (n,) or None, out (rows, row_bytes))
Kernel = Callable[[Any, Any, Any], None]

_INPUT = types.Array(types.float32, 2, "C", readonly=True)
_IMPORTANCE = types.Array(types.float32, 1, "C", readonly=True)
_OUTPUT = types.Array(types.uint8, 2, "C")


def compiled(kernel: Kernel, weighted: bool) -> Kernel:
    """The machine code of a block codec's kernel, with importance or without."""
    return compile_kernel(kernel, types.void(_INPUT, _IMPORTANCE if weighted else types.none, _OUTPUT))


def compile_kernel(function: Function, signature: Any) -> Function:
    """``function`` compiled for one signature, without the interpreter lock, once on this machine."""
    return shared.compile_kernel(function, signature, _sources(Path(function.__code__.co_filename).parent))


@cache
def _sources(directory: Path) -> tuple[Path, ...]:
    """All directories of this package, and the one of a kernel that is defined elsewhere."""
    codecs = Path(__file__).parents[1]
    return tuple(sorted({file.parent for file in codecs.rglob("*.py")} | {directory}))
