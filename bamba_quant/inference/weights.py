"""Weights under the names and shapes of the reference, from any checkpoint; one tensor is read at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint import PackedTensor, RawReader, StoredTensor, packed_like, read_tensor
from bamba_quant.codecs.arrays import U8
from bamba_quant.codecs.decoding import decode
from bamba_quant.families import TensorRule
from bamba_quant.inference.device_rows import decoded_rows

if TYPE_CHECKING:
    import torch

    from bamba_quant.inference.prefetch import Prefetcher, PrefetchRequest


@dataclass(frozen=True)
class WeightInfo:
    """What a tensor of a model is, without reading it: ``stored_name`` in its file, weights stored as ``format``.

    ``row_sections`` are the numbers of rows that mean different things, by name and in their order.
    """

    name: str
    stored_name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    format: str
    n_bytes: int
    row_sections: Mapping[str, int]


class Timings:
    """Adds up the seconds spent ``reading`` bytes, ``decoding`` them to numbers, ``compiling`` kernels and in matrix
    ``products``, in all threads.

    What is compiled while something else is done counts as compiling alone.
    """

    def __init__(self) -> None:
        self.reading = 0.0
        self.decoding = 0.0
        self.compiling = 0.0
        self.products = 0.0
        self._adding = Lock()

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        started, compiled = time.perf_counter(), self.compiling
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            with self._adding:  # another thread may have begun to compile before
                setattr(self, what, getattr(self, what) + elapsed - min(elapsed, self.compiling - compiled))


class LazyWeights(Mapping[str, NDArray[Any]]):
    """Reading a name loads that tensor: in its own dtype where it is stored plainly, else as float32.

    Nothing is kept, and nothing is mapped: a file that shrinks while it is read is an error.
    """

    def __init__(self, stored: Mapping[str, tuple[StoredTensor, TensorRule]], inverted: bool) -> None:
        self._stored = stored
        self._inverted = inverted

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.rows(name)

    def rows(
        self, name: str, start: int = 0, stop: int | None = None, timings: Timings | None = None
    ) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of a tensor along its first axis, in memory: plain numbers in their dtype,
        others as float32.

        Only these rows are read, but for vectors, which are read whole. ``timings`` adds up the time.
        """
        tensor, rule, moved = self.stored(name)
        timings = timings or Timings()
        stop = rule.shape[0] if stop is None else stop
        if len(rule.shape) == 1:
            with timings.spent("reading"):
                values = read_tensor(tensor)
            if moved:
                values = rule.transform.invert(values.reshape(-1, 1), 0)
            return values.reshape(rule.shape)[start:stop]
        raw, first = self.raw(name, start, stop, timings)
        with timings.spent("decoding"):
            plain = tensor.format.dtype
            values = decode(tensor.format, raw) if plain is None else raw.view(plain)
            if moved:
                values = rule.transform.invert(values, first * (tensor.rows // rule.shape[0]))
        return values.reshape(-1, *rule.shape[1:])[start - first : stop - first]

    def raw(self, name: str, start: int, stop: int, timings: Timings) -> tuple[U8, int]:
        """The bytes (rows, ``row_bytes``) that hold indices ``start`` to ``stop`` of the first axis, and the index
        they begin with: the one before ``start`` at which a transform that is to be undone can be cut.
        """
        tensor = self.stored(name)[0]
        first, last, each = self.span(name, start, stop)
        raw = np.empty(((last - first) * each, tensor.row_bytes), np.uint8)
        with timings.spent("reading"), RawReader() as reader:
            reader.read_rows(tensor, tensor.row_bytes, first * each, last * each, raw.reshape(-1))
        return raw, first

    def span(self, name: str, start: int, stop: int) -> tuple[int, int, int]:
        """Between which indices ``raw`` reads for ``start`` to ``stop``, and how many stored rows are behind each."""
        tensor, rule, moved = self.stored(name)
        together = rule.transform.unit if moved else 1
        each = tensor.rows // rule.shape[0]  # a stack of matrices has several rows behind an index
        return start // together * together, -(-stop // together) * together, each

    def info(self, name: str) -> WeightInfo:
        """What the tensor is, from the headers."""
        tensor, rule = self._stored[name]
        return WeightInfo(
            name,
            tensor.name,
            rule.role,
            rule.layer,
            rule.shape,
            tensor.format.name,
            tensor.n_bytes,
            rule.row_sections,
        )

    def stored(self, name: str) -> tuple[StoredTensor, TensorRule, bool]:
        """A tensor in its file, its rule, and whether that rule's transform must be undone."""
        tensor, rule = self._stored[name]
        return tensor, rule, self._inverted and bool(rule.transform.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


# Weights that are unpacked together: their float32 takes 64 MB.
_PIECE = 1 << 24


class DeviceWeights(Mapping[str, Any]):
    """``LazyWeights`` read on a GPU: blocks and codes go there as they are stored, and weights of ``dtype`` come out;
    tensors stored plainly keep their own.

    Vectors, and what is more than moved or scaled by rows, are read on the CPU, to the same values. With ``ahead``
    bytes come from that prefetcher, and those of one layer, or of one tensor outside the layers, stay on the device
    until another is read, so that a layer is read once for all its readers.
    """

    def __init__(
        self, weights: LazyWeights, device: torch.device, dtype: torch.dtype, ahead: Prefetcher | None = None
    ) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype
        self._ahead = ahead
        self._held: dict[str, torch.Tensor] = {}

    def to(self, dtype: torch.dtype) -> DeviceWeights:
        """The same, giving weights of another dtype; what is held is held once."""
        other = DeviceWeights(self._weights, self._device, dtype, self._ahead)
        other._held = self._held
        return other

    def __getitem__(self, name: str) -> Any:
        return self.rows(name) if self.on_device(name) else self._weights[name]

    def rows(self, name: str, start: int = 0, stop: int | None = None, timings: Timings | None = None) -> Any:
        """``LazyWeights.rows``, as a tensor on the device where that reads it."""
        timings = timings or Timings()
        tensor, rule, moved = self._weights.stored(name)
        stop = rule.shape[0] if stop is None else stop
        whole = self._whole(name, timings)
        if not self.on_device(name):
            return self._weights.rows(name, start, stop, timings)
        if isinstance(tensor, PackedTensor):
            if whole is None:
                return read_packed(tensor, start, stop, self._device, self._dtype, timings)
            with timings.spent("decoding"):
                return decode_packed(tensor, whole[start:stop], self._dtype)
        raw, first = self._raw(name, whole, start, stop, timings)
        with timings.spent("decoding"):
            at, transform = first * (tensor.rows // rule.shape[0]), rule.transform if moved else None
            # Only a stack of packed matrices is read as their rows, and nothing moves them.
            packed = packed_like(tensor)
            values = (
                decode_packed(packed, raw, self._dtype)
                if packed
                else decoded_rows(tensor.format, raw, transform, at, self._dtype)
            )
            return values.view(-1, *rule.shape[1:])[start - first : stop - first]

    def info(self, name: str) -> WeightInfo:
        """``LazyWeights.info``."""
        return self._weights.info(name)

    def prefetch_request(self, name: str) -> PrefetchRequest:
        """The request by which a ``Prefetcher`` reads this tensor."""
        from bamba_quant.inference.prefetch import PrefetchRequest

        tensor, arranged = self._prefetched_tensor(name)
        return PrefetchRequest(tensor, self.on_device(name) and not arranged)

    def on_device(self, name: str) -> bool:
        """Whether the device decodes this tensor."""
        _, rule, moved = self._weights.stored(name)
        return len(rule.shape) > 1 and (not moved or rule.transform.scales_rows_at_most)

    def _prefetched_tensor(self, name: str) -> tuple[StoredTensor, bool]:
        """The stored tensor to prefetch, and whether only into the page cache: codes that are not in row order are
        copied to the device when they are read.
        """
        tensor = self._weights.stored(name)[0]
        if isinstance(tensor, PackedTensor) and tensor.codes.order is not None:
            return tensor.codes.tensor, True
        return tensor, False

    def _whole(self, name: str, timings: Timings) -> torch.Tensor | None:
        """All bytes of the tensor on the device, if they were prefetched; frees tensors of other layers."""
        if self._ahead is None:
            return None
        layer = self.info(name).layer
        for other in [other for other in self._held if other != name]:
            if layer is None or self.info(other).layer != layer:
                del self._held[other]
        if name not in self._held:
            with timings.spent("reading"):
                found = self._ahead.take(self._prefetched_tensor(name)[0])
            if found is not None:
                self._held[name] = found
        return self._held.get(name)

    def _raw(
        self, name: str, whole: torch.Tensor | None, start: int, stop: int, timings: Timings
    ) -> tuple[torch.Tensor, int]:
        """``LazyWeights.raw`` on the device."""
        import torch

        if whole is None:
            raw, first = self._weights.raw(name, start, stop, timings)
            with timings.spent("reading"):
                return torch.from_numpy(raw).to(self._device), first
        first, last, each = self._weights.span(name, start, stop)
        return whole[first * each : last * each], first

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def weights_on(weights: LazyWeights, device: torch.device, dtype: torch.dtype) -> LazyWeights | DeviceWeights:
    """The weights for a device: on a GPU dequantized there, to ``dtype``, elsewhere as they are."""
    return DeviceWeights(weights, device, dtype) if device.type == "cuda" else weights


def read_packed(
    tensor: PackedTensor, start: int, stop: int, device: torch.device, dtype: torch.dtype, timings: Timings
) -> torch.Tensor:
    """Rows ``start`` to ``stop`` on the device, unpacked there some at a time; errors as ``RawReader.read_into``'s."""
    import torch

    out = torch.empty(stop - start, tensor.columns, dtype=dtype, device=device)
    done = 0
    with RawReader() as reader:
        blocks = tensor.row_blocks(reader, start, stop, max(1, _PIECE // tensor.columns))
        while True:
            with timings.spent("reading"):
                block = next(blocks, None)
            if block is None:
                return out
            with timings.spent("decoding"):
                out[done : done + block.count] = tensor.decode_on(block, device)
            done += block.count


def decode_packed(tensor: PackedTensor, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights of rows that lie on a device as ``format`` takes them, (r, ``row_bytes``): some at a time."""
    out = raw.new_empty(len(raw), tensor.columns, dtype=dtype)
    step = max(1, _PIECE // tensor.columns)
    for start in range(0, len(raw), step):
        out[start : start + step] = tensor.rows_on(raw[start : start + step])
    return out
