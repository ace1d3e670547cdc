"""Encodes matrices by the method of a scheme: chunks of rows become chunks of several tensors."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np

from bamba_quant.codecs.arrays import F32, Array
from bamba_quant.codecs.base import DTYPES, Encode, Measure, Method, Shared
from bamba_quant.codecs.base import Part as CodecPart
from bamba_quant.codecs.floats import to_float32
from bamba_quant.errors import FormatError, PlanError
from bamba_quant.planning.plan import Part, PlanRow
from bamba_quant.writers.stream import Streams


@dataclass
class Measurement:
    """What the chunks of a unit of matrices measured, combined."""

    method: Method
    value: Array | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def measure(self, streams: Streams, row: PlanRow, start: int, stop: int, measure: Measure) -> None:
        """Measure rows ``start`` to ``stop``; any thread may."""
        found = measure(_numbers(streams, row, start, stop), row.importance)
        assert self.method.combine is not None
        with self._lock:
            self.value = found if self.value is None else self.method.combine(self.value, found)

    def shared(self) -> Shared:
        assert self.method.share is not None and self.value is not None
        return self.method.share(self.value)


def encode(streams: Streams, row: PlanRow, start: int, stop: int, function: Encode, shared: Shared) -> None:
    """Read rows ``start`` to ``stop`` of a matrix, encode them with ``function`` and write them to the row's parts.

    Raises ``CheckpointError`` for weights that are not finite, ``FormatError`` for those that the scheme cannot hold.
    """
    numbers = _numbers(streams, row, start, stop)
    try:
        parts = dict(function(numbers, row.importance, shared))
    except FormatError as error:
        where = f"{row.source.file}, tensor {row.source.name}"
        raise FormatError(
            error.what, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from None
    rows, columns = row.matrix
    if start == 0:
        parts |= {**row.scheme.whole(rows, columns, shared), **row.constants}
        missing = [p.suffix for p in row.scheme.parts(rows, columns) if not p.rows and p.suffix not in parts]
        if missing:
            raise PlanError(
                "the plan does not hold a number that the scheme stores",
                where=row.source.name,
                found=f"no {', '.join(missing)}",
                fix="plan with the text that shows it",
            )
    for layout, part in zip(row.scheme.parts(rows, columns), row.parts, strict=True):
        if layout.suffix in parts:
            _write(streams, layout, part, parts[layout.suffix], start, stop)


def _numbers(streams: Streams, row: PlanRow, start: int, stop: int) -> F32:
    raw = streams.read(row, start, stop)
    return to_float32(raw.view(row.source.format.dtype)).reshape(-1, row.source.columns)


def _write(streams: Streams, layout: CodecPart, part: Part, values: Array, start: int, stop: int) -> None:
    """Write what rows ``start`` to ``stop`` of the matrix became, along the axis of the part that they fill."""
    axis = layout.axis
    first, end = layout.span(start, stop) if layout.rows else (0, part.shape[axis])
    shape = (*part.shape[:axis], end - first, *part.shape[axis + 1 :])
    if values.shape != shape or values.dtype != DTYPES[part.dtype]:
        raise ValueError(f"{part.name}: {values.dtype} of shape {values.shape}, {part.dtype} {shape} planned")
    outer = math.prod(part.shape[:axis])
    outer_bytes = part.n_bytes // outer
    index_bytes = outer_bytes // part.shape[axis]
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(outer, -1)
    for number, data in enumerate(raw):
        streams.files[part.shard].write(part.offset + number * outer_bytes + first * index_bytes, data)
