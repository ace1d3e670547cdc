"""A model's weights as the layer stream reads them: as tensors, with the seconds of reading and decoding counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bamba_quant.inference.prefetch import Prefetcher, PrefetchRequest
from bamba_quant.inference.weights import DeviceWeights, LazyWeights, Timings
from bamba_reference.config import Config
from bamba_reference.tensors import EMBEDDING, FINAL_NORM, head_name, layer_prefix, layer_tensors
from bamba_reference.torch.forward import stored_dtype, to_tensor

# Rows of a table that are read together for the few of them that a text uses.
_TABLE_ROWS = 8192


class LazyTable:
    """The embedding or the head; rows are read on access, by a slice or by their indices."""

    def __init__(
        self,
        weights: LazyWeights | DeviceWeights,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        timings: Timings,
    ):
        self.shape = shape
        self._weights, self._name, self._dtype, self._device = weights, name, dtype, device
        self._timings = timings

    def __getitem__(self, wanted: slice | NDArray[np.intp]) -> Any:
        if isinstance(wanted, slice):
            start, stop, _ = wanted.indices(self.shape[0])
            rows = self._weights.rows(self._name, start, stop, self._timings)
            with self._timings.spent("decoding"):
                return to_tensor(rows, self._dtype, self._device)
        found = []
        for start in range(0, self.shape[0], _TABLE_ROWS):
            inside = wanted[(wanted >= start) & (wanted < start + _TABLE_ROWS)]
            if len(inside):
                first, last = int(inside.min()), int(inside.max()) + 1
                rows = self._weights.rows(self._name, first, last, self._timings)[inside - first]
                found.append(to_tensor(rows, self._dtype, self._device))
        return torch.cat(found)


class StreamWeights(Mapping[str, Any]):
    """What ``stream.final_hidden`` and ``stream.logit_blocks`` read; nothing is kept but what ``DeviceWeights`` hold.

    A GPU decodes, and with ``ahead`` any device. ``exact`` are the same weights as the files hold them: blocks become
    float32.
    """

    def __init__(
        self,
        weights: LazyWeights,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        timings: Timings,
        ahead: Prefetcher | None = None,
    ) -> None:
        self._dtype, self._device, self._timings = dtype, device, timings
        self.config = config
        self._weights: LazyWeights | DeviceWeights = weights
        self.exact: LazyWeights | DeviceWeights = weights
        if ahead is not None or device.type == "cuda":
            self._weights = on_device = DeviceWeights(weights, device, dtype, ahead)
            self.exact = on_device.to(torch.float32)
        self._tables = {name: weights.info(name).shape for name in (EMBEDDING, head_name(config))}

    def __getitem__(self, name: str) -> Tensor | LazyTable:
        if name in self._tables:
            shape = self._tables[name]
            return LazyTable(self._weights, name, shape, self._dtype, self._device, self._timings)
        array = self._weights.rows(name, timings=self._timings)
        with self._timings.spent("decoding"):
            return to_tensor(array, stored_dtype(name, self._dtype), self._device)

    def prefetch_request(self, name: str) -> PrefetchRequest:
        """The request by which a ``Prefetcher`` reads this tensor; for weights on a GPU."""
        assert isinstance(self._weights, DeviceWeights)
        return self._weights.prefetch_request(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def prefetch_order(sources: Sequence[StreamWeights], compared: bool) -> Iterator[PrefetchRequest]:
    """What an evaluation reads, in its order; ``compared`` where weights are compared with each other as well."""
    for source in sources:
        yield source.prefetch_request(EMBEDDING)
    for layer in range(sources[0].config.num_hidden_layers):
        for source in sources:
            for name in layer_tensors(source.config, layer):
                yield source.prefetch_request(layer_prefix(layer) + name)
    for source in sources:
        yield source.prefetch_request(FINAL_NORM)
    for source in sources:
        yield source.prefetch_request(head_name(source.config))
    if compared and head_name(sources[0].config) != EMBEDDING:
        for source in sources:
            yield source.prefetch_request(EMBEDDING)
