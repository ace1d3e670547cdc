"""What the compiled kernels of the forward pass are made for: this processor's vectors, and their sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from llvmlite import binding
from numba import types

from bamba_reference.runtime.jit import compile_kernel

__all__ = ["FLOAT", "FLOATS", "SIZE", "SIZES", "compiled", "has", "inlined"]

Function = TypeVar("Function", bound=Callable[..., Any])

# Kernels see a tensor as the memory from its first element to its last, and are given its strides.
FLOATS = types.Array(types.float32, 1, "C")
SIZE, SIZES = types.int64, types.Array(types.int64, 1, "C")
FLOAT = types.float32

_PACKAGES = (Path(__file__).parent,)


def inlined(function: Function) -> Function:
    """A part of a kernel, compiled into each place that calls it; a product and a sum may become one operation."""
    part: Function = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract"})(function)
    return part


def compiled(*arguments: Any, sums: bool = False) -> Callable[[Function], Function]:
    """Machine code, made at its first call, for arguments of these types; ``sums`` may change their order."""
    allowed = frozenset({"contract", "reassoc"} if sums else {"contract"})

    def decorate(function: Function) -> Function:
        @cache
        def code() -> Any:
            return compile_kernel(function, types.void(*arguments), _PACKAGES, allowed)

        def call(*given: Any) -> Any:
            return code()(*given)

        return call  # type: ignore[return-value]

    return decorate


@cache
def has(feature: str) -> bool:
    """Whether numba compiles for a processor with this feature, as LLVM names it ("avx512f")."""
    if numba.config.CPU_FEATURES is not None:
        return f"+{feature}" in numba.config.CPU_FEATURES.split(",")
    return bool(binding.get_host_cpu_features().get(feature, False))
