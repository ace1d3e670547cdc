"""Buffers of bytes, one a part of the model: on the GPU, or in main memory and on the GPU while they are used.

A buffer in main memory is page-locked. While one is used the next is copied by a stream of its own into a second slot
on the GPU, and what was changed goes back the same way, so that copies take no time of their own as long as they are
shorter than the work between.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bamba_quant.errors import BambaQuantError

_SLOTS = 2
_ALIGNED = 256  # bytes, at which arrays begin

Part = tuple[int, int]  # the number of a buffer, and how many of its first bytes


def places_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of so many bytes begin in a buffer, and how long it is."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNED) * _ALIGNED
    return starts, end


@dataclass
class _Slot:
    buffer: Tensor
    holds: Part = (-1, 0)
    arrived: Any = None


class Residence:
    """``homes`` are the buffers, uint8 (bytes,); use them through ``take`` and ``give_back`` once all are filled."""

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self.homes: list[Tensor] = []
        self._device, self._on_host = device, on_host
        self._slots: list[_Slot] = []
        self._copies = torch.cuda.Stream(device) if on_host and device.type == "cuda" else None

    def add(self, size: int) -> Tensor:
        """A new buffer, to be filled where it is."""
        home = torch.empty(size, dtype=torch.uint8, device="cpu" if self._on_host else self._device)
        if self._copies is not None and size:
            # torch's own page-locked memory is as long as the next power of two.
            error = torch.cuda.cudart().cudaHostRegister(home.data_ptr(), size, 0)
            if int(error):
                self.close()
                raise BambaQuantError(
                    "main memory cannot be page-locked",
                    found=f"CUDA error {int(error)} at a buffer of {size / 1e9:.1f} GB",
                    fix="raise the limit of locked memory (ulimit -l), or give a larger --max-memory",
                )
        self.homes.append(home)
        return home

    def take(self, number: int, n_bytes: int | None = None, then: Part | None = None) -> Tensor:
        """The first bytes of a buffer on the device, all by default; ``then`` is what is wanted next, with what is
        queued now done.

        It may be used, and changed, until the buffer after the next is taken.
        """
        n_bytes = len(self.homes[number]) if n_bytes is None else n_bytes
        if not self._on_host:
            return self.homes[number][:n_bytes]
        slot = self._fetch((number, n_bytes), None)
        if slot.arrived is not None:
            torch.cuda.current_stream().wait_event(slot.arrived)
        if then is not None:
            self._fetch(then, slot)
        return slot.buffer[:n_bytes]

    def give_back(self, number: int, start: int) -> None:
        """Copy a buffer that was taken whole, and changed, to its home, from the byte ``start`` on."""
        if self._on_host:
            slot = next(slot for slot in self._slots if slot.holds[0] == number)
            end = slot.holds[1]
            with self._behind_the_work():
                self.homes[number][start:end].copy_(slot.buffer[start:end], non_blocking=True)

    def settle(self) -> None:
        """Wait until everything is at home, and forget what the device holds."""
        if self._copies is not None:
            self._copies.synchronize()
        for slot in self._slots:
            slot.holds = (-1, 0)

    def close(self) -> None:
        """Unlock the buffers' memory."""
        self.settle()
        for home in self.homes if self._copies is not None else ():
            if len(home):
                torch.cuda.cudart().cudaHostUnregister(home.data_ptr())
        self.homes = []

    def _fetch(self, part: Part, besides: _Slot | None) -> _Slot:
        """The slot that has ``part`` or gets it now: the one that was not used last."""
        if not self._slots:
            none = torch.empty(0, dtype=torch.uint8, device=self._device)
            self._slots = [_Slot(none) for _ in range(_SLOTS)]
        number, n_bytes = part
        for slot in self._slots:
            if slot.holds[0] == number and slot.holds[1] >= n_bytes:
                break
        else:
            slot = next(slot for slot in self._slots if slot is not besides)
            for other in self._slots:
                if other.holds[0] == number and other is not besides:
                    other.holds = (-1, 0)
            if len(slot.buffer) < n_bytes:
                self._grow(slot, n_bytes)
            with self._behind_the_work():
                slot.buffer[:n_bytes].copy_(self.homes[number][:n_bytes], non_blocking=True)
                if self._copies is not None:
                    slot.arrived = torch.cuda.Event()
                    slot.arrived.record()
            slot.holds = part
        # The last one used is the last in the list.
        self._slots.sort(key=lambda other: other is slot if besides is None else other is besides)
        return slot

    def _grow(self, slot: _Slot, n_bytes: int) -> None:
        """A longer buffer for a slot; what its old one is copied to or from goes on."""
        if self._copies is not None:
            slot.buffer.record_stream(self._copies)
        slot.buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        slot.buffer = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)

    def _behind_the_work(self) -> Any:
        """The stream of copies, behind everything that is queued on the current one."""
        if self._copies is None:
            return nullcontext()
        self._copies.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._copies)
