"""What entered each matrix of a model over a text, added up: the contents of an importance matrix's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bamba_quant.codecs.arrays import F32
from bamba_quant.errors import PlanError
from bamba_quant.printable import brief_repr

F64 = NDArray[np.float64]
MOST_CHUNKS = 2**31 - 1  # that the older form has room for


@dataclass(frozen=True)
class TensorSums:
    """Over the tokens that reached each matrix of a tensor: Σ a² in ``squares`` and Σ a in ``sums``, for each column.

    Both are float64 of shape (matrices, columns); ``counts`` (matrices,) are those tokens, int64. A tensor that is
    not a stack of experts is one matrix. ``sums`` is None where they were not measured.
    """

    squares: F64
    counts: NDArray[np.int64]
    sums: F64 | None = None

    def mean_squares(self) -> F32:
        """What weighs the columns' errors (matrices * columns,): ones where no token reached a matrix.

        In float32, as llama-quantize divides what the file holds (tools/quantize/quantize.cpp, ``load_imatrix``).
        """
        counts = self.counts.astype(np.float32)[:, None]
        with np.errstate(all="ignore"):
            means = np.where(counts > 0, self.squares.astype(np.float32) / counts, np.float32(1))
        return means.astype(np.float32).reshape(-1)

    def plus(self, other: TensorSums) -> TensorSums:
        """The sums over both texts; Σ a only where both have it."""
        return TensorSums(
            self.squares + other.squares,
            self.counts + other.counts,
            None if self.sums is None or other.sums is None else self.sums + other.sums,
        )


@dataclass(frozen=True)
class ActivationSums:
    """``entries`` by the tensor's name in a GGUF, measured over ``chunks`` chunks of ``chunk_size`` tokens.

    ``datasets`` are the texts' names. A file of the older form does not give its chunk size (0 here), and its counts
    are chunks instead of tokens. ``largest`` are the largest magnitudes that entered tensors; files do not hold them.
    """

    entries: Mapping[str, TensorSums]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    largest: Mapping[str, float] | None = None

    __repr__ = brief_repr

    @property
    def experts_without_data(self) -> dict[str, list[int]]:
        """The experts that no token reached, by tensor."""
        empty = {name: np.flatnonzero(entry.counts == 0).tolist() for name, entry in self.entries.items()}
        return {name: experts for name, experts in empty.items() if experts}


def checked_sums(
    sums: ActivationSums, shapes: Mapping[str, tuple[int, int]], chunk_size: int, file: Path
) -> ActivationSums:
    """The sums in ``file``, of either form, as sums over tokens of a model whose entries have these ``shapes``.

    Shapes are (matrices, columns) by tensor name. In the older form a chunk counts as ``chunk_size`` tokens and a stack
    of matrices has one count for all (llama-imatrix's ``load_imatrix``). Raises ``PlanError`` for entries of another
    model.
    """
    entries, scale = {}, 1 if sums.chunk_size else chunk_size
    for name, entry in sums.entries.items():
        expected = shapes.get(name)
        if (
            expected is None
            or entry.squares.size != expected[0] * expected[1]
            or len(entry.counts) not in (1, expected[0])
        ):
            raise PlanError(
                "an importance matrix to merge was measured on another model",
                where=f"{file}, tensor {name}",
                found=f"{entry.squares.size} values for {len(entry.counts)} matrices",
                expected="no such tensor"
                if expected is None
                else f"{expected[0] * expected[1]} for {expected[0]}",
                fix="leave it out",
            )
        entries[name] = TensorSums(
            scale * entry.squares.reshape(expected),
            scale * np.broadcast_to(entry.counts, expected[:1]),
            None if entry.sums is None else scale * entry.sums.reshape(expected),
        )
    return ActivationSums(entries, sums.datasets, sums.chunks, chunk_size)


def merge_sums(parts: Sequence[ActivationSums], chunk_size: int) -> ActivationSums:
    """The sums over all parts' tokens; the parts' entries of one tensor have one shape (``checked_sums``)."""
    entries: dict[str, TensorSums] = {}
    for part in parts:
        for name, entry in part.entries.items():
            entries[name] = entries[name].plus(entry) if name in entries else entry
    most = max((int(entry.counts.max()) for entry in entries.values()), default=0)
    datasets = dict.fromkeys(name for part in parts for name in part.datasets)
    return ActivationSums(entries, tuple(datasets), min(most // chunk_size, MOST_CHUNKS), chunk_size)
