"""Compiles a format's kernel on first use and keeps it on disk, until any of its sources changes.

The cache lies in ``$NUMBA_CACHE_DIR`` where that is set, else in ``$XDG_CACHE_HOME/bamba-quant``
(``~/.cache``), so that an installed package need not be writable. Where no such directory can be written a
warning says so once, and every process compiles the kernels it uses anew: slower to start, the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba import types

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[[Any, Any, Any], None]

KERNELS: dict[str, Kernel] = {}

_INPUT = types.Array(types.float32, 2, "C", readonly=True)
_IMPORTANCE = types.Array(types.float32, 1, "C", readonly=True)
_OUTPUT = types.Array(types.uint8, 2, "C")


def inlined(function: Function) -> Function:
    """A part of a kernel, compiled into each place that calls it."""
    compiled: Function = numba.njit(forceinline=True)(function)
    return compiled


def kernel(name: str) -> Callable[[Kernel], Kernel]:
    """Make ``function(x (rows, n), importance (n,) or None, out (rows, row_bytes))`` the twin of a format."""

    def register(function: Kernel) -> Kernel:
        KERNELS[name] = function
        return function

    return register


@cache
def compiled(name: str, weighted: bool) -> Kernel:
    """The machine code of a kernel, with importance or without; it runs without the interpreter lock."""
    signature = types.void(_INPUT, _IMPORTANCE if weighted else types.none, _OUTPUT)
    given, numba.config.CACHE_DIR = numba.config.CACHE_DIR, numba.config.CACHE_DIR or str(_directory())
    try:
        machine_code: Kernel = numba.njit(signature, nogil=True, cache=True)(KERNELS[name])
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        warnings.warn(
            f"compiled kernels cannot be kept in {numba.config.CACHE_DIR}, so each run compiles them again; "
            "set NUMBA_CACHE_DIR to a directory that can be written",
            stacklevel=2,
        )
        machine_code = numba.njit(signature, nogil=True)(KERNELS[name])
    finally:
        numba.config.CACHE_DIR = given
    return machine_code


@cache
def _directory() -> Path:
    """numba looks for changes only in the file of the kernel; the digest covers all that a kernel calls."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "bamba-quant" / f"kernels-{digest.hexdigest()[:16]}"
