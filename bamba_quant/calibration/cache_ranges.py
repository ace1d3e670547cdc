"""The largest keys and values of each layer on a text, which set the scales of an FP8 cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bamba_quant.errors import BambaQuantError

if TYPE_CHECKING:
    from torch import Tensor

_E4M3_MOST = 448.0


class CacheRanges:
    """A ``Backend.cached`` that leaves keys and values as they are; safe to share between threads."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, k: Tensor, v: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        self._seen.append((layer, k.abs().amax(), v.abs().amax()))
        return k, v

    def scales(self) -> dict[str, tuple[float, float]]:
        """The scales of keys and of values by the layer's prefix: the largest number becomes e4m3's, 448.

        Where all numbers are zero, the scale is 1. Raises ``BambaQuantError`` for numbers that are not finite.
        """
        largest: dict[str, tuple[float, float]] = {}
        for layer, k, v in self._seen:
            before = largest.get(layer, (0.0, 0.0))
            largest[layer] = max(before[0], float(k)), max(before[1], float(v))
            if not all(map(math.isfinite, (float(k), float(v)))):
                raise BambaQuantError(
                    "the model's keys or values are not finite", where=layer, fix="calibrate in float32"
                )
        return {layer: (k / _E4M3_MOST or 1.0, v / _E4M3_MOST or 1.0) for layer, (k, v) in largest.items()}
