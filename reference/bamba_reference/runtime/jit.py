"""Compiles functions with numba on first use and caches them on disk until any of their sources changes.

The cache lies in ``bamba-quant`` under ``$NUMBA_CACHE_DIR`` where that is set, else ``$XDG_CACHE_HOME``, else
``~/.cache``, so that an installed package need not be writable. If that directory cannot be used, there is one
warning, and every process compiles the kernels that it uses: a slower start, the same results.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from llvmlite import ir

from bamba_reference.runtime import compilation, kernel_cache
from bamba_reference.runtime.kernel_cache import KernelCache

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = (Path(__file__), Path(kernel_cache.__file__))
_compiling = threading.Lock()


def inlined(function: Function) -> Function:
    """A function that is inlined into each kernel that calls it."""
    compiled: Function = numba.njit(forceinline=True)(function)
    return compiled


def compile_kernel(
    function: Function, signature: Any, packages: tuple[Path, ...], allowed: frozenset[str] = frozenset()
) -> Function:
    """``function`` compiled for one signature, without the interpreter lock, once on this machine.

    ``packages`` are the directories of all its sources, since numba notices changes only in the function's own
    file. ``allowed`` names LLVM's fast-math flags: "contract" lets a product and a sum become one operation,
    "reassoc" lets sums change their order.
    """
    with _compiling:
        compiled: Function = _compiled(function, signature, packages, allowed)
    return compiled


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose n vectors of n lanes, by rounds of exchanges at half the distance each."""
    lanes = len(rows)
    kind, distance = ir.VectorType(ir.IntType(32), lanes), lanes // 2
    while distance:
        low = [i if not i & distance else i - distance + lanes for i in range(lanes)]
        high = [i + distance if not i & distance else i + lanes for i in range(lanes)]
        exchanged = list(rows)
        for i in range(lanes):
            if not i & distance:
                pair = rows[i], rows[i | distance]
                exchanged[i] = builder.shuffle_vector(*pair, ir.Constant(kind, low))
                exchanged[i | distance] = builder.shuffle_vector(*pair, ir.Constant(kind, high))
        rows, distance = exchanged, distance // 2
    return rows


@cache
def _compiled(function: Any, signature: Any, packages: tuple[Path, ...], allowed: frozenset[str]) -> Any:
    # C's division: numba's default tests every divisor, which prevents vectorization.
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=set(allowed))(function)
    directory = _directory(numba.config.CACHE_DIR, packages)
    with compilation.timed():
        if directory is None:
            compilation.tell()
        else:
            dispatcher._cache = KernelCache(function, directory, sorted(allowed), compilation.tell)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
    return dispatcher


@cache
def _directory(given: str, packages: tuple[Path, ...]) -> Path | None:
    """The directory, named by a digest of all sources and of the compiler's version; None without a home directory."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version}".encode())
    for source in (*_SOURCES, *(file for package in packages for file in sorted(package.glob("*.py")))):
        digest.update(source.read_bytes())
    try:
        base = Path(given or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        warnings.warn(f"compiled kernels are not cached: {error}; set NUMBA_CACHE_DIR", stacklevel=2)
        return None
    return base / "bamba-quant" / f"kernels-{digest.hexdigest()[:16]}"
