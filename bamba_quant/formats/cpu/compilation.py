"""Compiles kernels of formats and schemes on first use and keeps them on disk, until any of their sources changes.

The cache lies in ``bamba-quant`` under ``$NUMBA_CACHE_DIR`` where that is set, else ``$XDG_CACHE_HOME``, else
``~/.cache``, so that an installed package need not be writable. Where no such directory can be written a
warning says so once, and every process compiles the kernels it uses anew: slower to start, the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
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

_compiling = threading.Lock()

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


def compiled(name: str, weighted: bool) -> Kernel:
    """The machine code of a kernel, with importance or without; it runs without the interpreter lock."""
    with _compiling:
        return _compiled(name, weighted)


@cache
def _compiled(name: str, weighted: bool) -> Kernel:
    signature = types.void(_INPUT, _IMPORTANCE if weighted else types.none, _OUTPUT)
    found: Kernel = _machine_code(KERNELS[name], signature)
    return found


def machine_code(function: Function, signature: Any) -> Function:
    """``function`` compiled for one signature, without the interpreter lock, once on this machine."""
    with _compiling:
        compiled: Function = _machine_code(function, signature)
    return compiled


@cache
def _machine_code(function: Any, signature: Any) -> Any:
    given = numba.config.CACHE_DIR
    directory = _directory(given)
    kept = _writable(directory)
    # numba takes the place of its cache from this setting as it defines a function.
    numba.config.CACHE_DIR = str(directory)
    try:
        # C's division: left to itself numba tests every divisor, which costs the vectors.
        return numba.njit(signature, nogil=True, cache=kept, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = given


@cache
def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {directory} ({error.strerror}): each run compiles anew; "
            "set NUMBA_CACHE_DIR to a directory that can be written",
            stacklevel=1,
        )
        return False


def _directory(given: str) -> Path:
    """numba looks for changes only in the file of the kernel; the digest covers all that a kernel uses."""
    digest = hashlib.sha256(numba.__version__.encode())
    formats = Path(__file__).parents[1]
    schemes = formats.with_name("schemes")
    packages = (formats, formats / "cpu", schemes, schemes / "cpu")
    for source in (file for package in packages for file in sorted(package.glob("*.py"))):
        digest.update(source.read_bytes())
    base = Path(given or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "bamba-quant" / f"kernels-{digest.hexdigest()[:16]}"
