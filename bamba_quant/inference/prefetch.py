"""Read tensors to a device before they are needed, in a known order and within a memory budget."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bamba_quant.checkpoint import RawReader, StoredTensor

if TYPE_CHECKING:
    import torch

# Bytes that are read and copied together.
_PIECE = 1 << 24
_THREADS = 8
_MOST = 1 << 33
_SHARE = 16  # of a device's memory, one part


@dataclass(frozen=True, eq=False)
class PrefetchRequest:
    """A tensor to prefetch; one that is not ``on_device`` is only read into the page cache."""

    tensor: StoredTensor
    on_device: bool


@dataclass(frozen=True, eq=False)
class _PendingRead:
    tensor: StoredTensor
    target: torch.Tensor | None
    pieces: tuple[Future[None], ...]


class Prefetcher:
    """Threads that read pieces of tensors into page-locked buffers and copy them to ``device``.

    At most ``budget`` bytes, or one tensor, wait to be taken; the default is 8 GiB, or a sixteenth of a GPU's memory.
    A tensor that is taken out of order is not prefetched, and ``take`` returns None.
    """

    def __init__(
        self, device: torch.device, budget: int | None = None, threads: int | None = None, piece: int = _PIECE
    ) -> None:
        import torch

        cuda = device.type == "cuda"
        if budget is None:
            budget = _MOST
            if cuda:
                budget = min(budget, torch.cuda.get_device_properties(device).total_memory // _SHARE)
        self._device, self._budget, self._piece = device, budget, piece
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._threads = threads or min(_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._reader = RawReader()
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._order: deque[PrefetchRequest] = deque()
        self._pending: list[_PendingRead] = []
        self._bytes = 0  # of pending reads

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._order.clear()
        self._pending.clear()
        self._reader.__exit__(kind, error, trace)

    def begin(self, order: Iterable[PrefetchRequest]) -> None:
        """Start reading tensors in this order. Raises ``CheckpointError`` for a missing file."""
        import torch

        self._order.extend(order)
        largest = self._piece
        for wanted in self._order:
            largest = max(largest, wanted.tensor.row_bytes)
            for file in wanted.tensor.files:
                self._reader.open(file)
        for _ in range(self._threads):
            self._buffers.put(torch.empty(largest, dtype=torch.uint8, pin_memory=self._stream is not None))
        self._fill()

    def take(self, tensor: StoredTensor) -> torch.Tensor | None:
        """Bytes (rows, ``row_bytes``) on the device, once they are read; None if they were not prefetched.

        Raises ``CheckpointError`` when they could not be read.
        """
        import torch

        found = next((read for read in self._pending if read.tensor is tensor), None)
        if found is None:
            late = next((wanted for wanted in self._order if wanted.tensor is tensor), None)
            if late is not None:
                self._order.remove(late)
            return None
        self._pending.remove(found)
        self._bytes -= _size(tensor)
        self._fill()
        for piece in found.pieces:
            piece.result()
        if found.target is None:
            return None
        if self._stream is not None:
            # Its memory belongs to the copies' stream, which may not use it again before this one is done with it.
            found.target.record_stream(torch.cuda.current_stream(self._device))
        return found.target.view(tensor.rows, tensor.row_bytes)

    def _fill(self) -> None:
        while self._order:
            size = _size(self._order[0].tensor)
            if self._pending and self._bytes + size > self._budget:
                return
            self._pending.append(self._start(self._order.popleft()))
            self._bytes += size

    def _start(self, wanted: PrefetchRequest) -> _PendingRead:
        import torch

        tensor, target = wanted.tensor, None
        if wanted.on_device:
            with self._copying():
                target = torch.empty(_size(tensor), dtype=torch.uint8, device=self._device)
        step = max(1, self._piece // tensor.row_bytes)
        pieces = [
            self._pool.submit(self._read, tensor, start, min(start + step, tensor.rows), target)
            for start in range(0, tensor.rows, step)
        ]
        return _PendingRead(tensor, target, tuple(pieces))

    def _read(self, tensor: StoredTensor, first: int, stop: int, target: torch.Tensor | None) -> None:
        import torch

        buffer = self._buffers.get()
        try:
            each = tensor.row_bytes
            bytes_read = buffer[: (stop - first) * each]
            self._reader.read_rows(tensor, each, first, stop, bytes_read.numpy())
            if target is None:
                return
            with self._copying():
                target[first * each : stop * each].copy_(bytes_read, non_blocking=True)
                if self._stream is not None:
                    copied = torch.cuda.Event(blocking=True)
                    copied.record(self._stream)
                    copied.synchronize()
        finally:
            self._buffers.put(buffer)

    def _copying(self) -> Any:
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _size(tensor: StoredTensor) -> int:
    return tensor.rows * tensor.row_bytes


def prefetcher_for(device: torch.device) -> Prefetcher | None:
    """A prefetcher for a GPU; None for a CPU, which decodes what it reads."""
    return Prefetcher(device) if device.type == "cuda" else None
