"""Weights read on a GPU, to which quantized weights go as they are stored: blocks, or codes with their scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bamba_quant.checkpoint import PackedTensor, RawReader
from bamba_quant.weights import LazyWeights, Meter

if TYPE_CHECKING:
    import torch

# Weights that are unpacked together: their float32 takes 64 MB.
_PIECE = 1 << 24


class DeviceWeights(Mapping[str, Any]):
    """``LazyWeights`` read on a GPU: blocks and codes go there as they are stored, and weights of ``dtype`` come out;
    tensors stored plainly keep their own.

    What a GPU does not read (vectors, and changes of single values) is read on the CPU, to the same values.
    """

    def __init__(self, weights: LazyWeights, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def __getitem__(self, name: str) -> Any:
        return self._weights[name] if self._on_cpu(name) else self.rows(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None, meter: Meter | None = None) -> Any:
        """``LazyWeights.rows``, as a tensor on the device where that reads it."""
        import torch

        from bamba_quant.formats.cuda.decoding import decode

        meter = meter or Meter()
        tensor, rule, moved = self._weights.stored(name)
        stop = rule.shape[0] if stop is None else stop
        if self._on_cpu(name):
            return self._weights.rows(name, start, stop, meter)
        if isinstance(tensor, PackedTensor):
            return read_packed(tensor, start, stop, self._device, self._dtype, meter)
        raw, first = self._weights.raw(name, start, stop, meter)
        with meter.spent("decoding"):
            if moved:
                raw = np.ascontiguousarray(rule.transform.invert(raw))
            plain = tensor.format.dtype
            dtype = self._dtype if plain is None else getattr(torch, plain.name)
            values = decode(tensor.format, torch.from_numpy(raw).to(self._device), dtype)
            return values.view(-1, *rule.shape[1:])[start - first : stop - first]

    def _on_cpu(self, name: str) -> bool:
        _, rule, moved = self._weights.stored(name)
        return len(rule.shape) < 2 or (moved and not rule.transform.moves)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def read_packed(
    tensor: PackedTensor, start: int, stop: int, device: torch.device, dtype: torch.dtype, meter: Meter
) -> torch.Tensor:
    """Rows ``start`` to ``stop`` on the device, unpacked there some at a time; errors as ``RawReader.read_into``'s."""
    import torch

    out = torch.empty(stop - start, tensor.columns, dtype=dtype, device=device)
    done = 0
    with RawReader() as reader:
        stretches = tensor.stretches(reader, start, stop, max(1, _PIECE // tensor.columns))
        while True:
            with meter.spent("reading"):
                stretch = next(stretches, None)
            if stretch is None:
                return out
            with meter.spent("decoding"):
                out[done : done + stretch.count] = tensor.decode_on(stretch, device)
            done += stretch.count


def decode_packed(tensor: PackedTensor, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights of rows that lie on a device as ``format`` takes them, (r, ``row_bytes``): some at a time."""
    out = raw.new_empty(len(raw), tensor.columns, dtype=dtype)
    step = max(1, _PIECE // tensor.columns)
    for start in range(0, len(raw), step):
        out[start : start + step] = tensor.rows_on(raw[start : start + step])
    return out
