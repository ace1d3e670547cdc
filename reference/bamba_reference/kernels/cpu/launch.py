"""What every CPU kernel needs: compilation for this processor, tensors as plain memory, and work shared by threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, local
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import binding
from numba import types
from torch import Tensor

from bamba_reference.runtime.jit import compile_kernel

Function = TypeVar("Function", bound=Callable[..., Any])

# Kernels receive a tensor as the memory from its first element to its last, and its strides.
FLOATS = types.Array(types.float32, 1, "C")
SIZE, SIZES = types.int64, types.Array(types.int64, 1, "C")
FLOAT = types.float32
DOUBLES = types.Array(types.float64, 1, "C")

_PACKAGES = (Path(__file__).parent,)

_scratch, _MOST_SCRATCH = local(), 1 << 22


def inlined(function: Function) -> Function:
    """A function that is inlined into each kernel that calls it; a product and a sum may become one operation."""
    part: Function = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract"})(function)
    return part


def compiled(*arguments: Any, sums: bool = False) -> Callable[[Function], Function]:
    """Compiles at the first call, for arguments of these types; ``sums`` allows sums to change their order."""
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


Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

# The fewest rows of a norm or an elementwise operation that each thread gets.
LEAST_ROWS = 16


def supported(*tensors: Tensor | None) -> bool:
    """Whether the kernels support these: float32 on a CPU, and none needs a gradient.

    Kernels read memory unchecked, so each operation also leaves shapes that do not fit to torch, which raises.
    """
    grad = torch.is_grad_enabled()
    return all(
        t.dtype == torch.float32 and t.device.type == "cpu" and not (grad and t.requires_grad)
        for t in tensors
        if t is not None
    )


def memory(tensor: Tensor) -> Floats:
    """The floats from a tensor's first to its last: (span,), not copied."""
    if tensor.is_contiguous():
        whole: Floats = tensor.detach().view(-1).numpy()
        return whole
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat: Floats = tensor.detach().as_strided((span,), (1,)).numpy()
    return flat


def rows_apart(x: Tensor) -> Tensor:
    """x as (rows, n), evenly spaced contiguous rows: a view of x if possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def empty(*shape: int) -> Tensor:
    """Uninitialized float32. numpy's, because it asks Linux for large pages.

    Measured for the first access to 69 MB: 4 ms, torch's 15 ms, which is 3 % of the product that needs them.
    """
    return torch.from_numpy(np.empty(shape, np.float32))


def scratch(name: str, size: int) -> Floats:
    """Uninitialized floats (size,), which stay this thread's under this name: the system clears new memory first."""
    if size > _MOST_SCRATCH:
        return np.empty(size, np.float32)
    kept: dict[str, Floats] = _scratch.__dict__
    if name not in kept or len(kept[name]) < size:
        kept[name] = np.empty(size, np.float32)
    return kept[name][:size]


def share(kernel: Callable[..., None], *arguments: Any, count: int, least: int = 1) -> None:
    """``kernel(*arguments, start, stop)`` over parts of 0 … ``count``, ``least`` or more a thread, in parallel."""
    threads = max(1, min(torch.get_num_threads(), count // least))
    borders = [count * i // threads for i in range(threads + 1)]
    if threads > 1:
        jobs, done = _jobs(os.getpid(), threads - 1), SimpleQueue[BaseException | None]()
        for i in range(1, threads):
            jobs.put((done, kernel, (*arguments, borders[i], borders[i + 1])))
    kernel(*arguments, 0, borders[1])
    failures = [done.get() for _ in range(1, threads)]
    for failure in failures:
        if failure is not None:
            raise failure


@cache
def _jobs(process: int, threads: int) -> SimpleQueue[Any]:
    """The job queue of this many threads. Keyed by process, because a fork does not copy threads."""
    jobs: SimpleQueue[Any] = SimpleQueue()
    for _ in range(threads):
        Thread(target=_work, args=(jobs,), name="kernels", daemon=True).start()
    return jobs


def _work(jobs: SimpleQueue[Any]) -> None:
    while True:
        done, kernel, arguments = jobs.get()
        try:
            kernel(*arguments)
        except BaseException as failure:  # noqa: BLE001  (raised in ``share``)
            done.put(failure)
        else:
            done.put(None)
        del done, kernel, arguments
