"""Importance matrices as llama-imatrix writes them: the mean square of each input channel of each matrix.

Two forms: GGUF (tools/imatrix/imatrix.cpp, ``save_imatrix``) and the older .dat (common/imatrix-loader.cpp).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from bamba_quant.checkpoint import StoredTensor, read_tensor
from bamba_quant.checkpoint.activation_sums import F64, ActivationSums, TensorSums
from bamba_quant.checkpoint.gguf_file import read_gguf
from bamba_quant.checkpoint.gguf_header import MAGIC, MAX_TENSORS
from bamba_quant.checkpoint.gguf_values import GgufValue, string, uint32
from bamba_quant.codecs.arrays import F32
from bamba_quant.errors import CheckpointError, PlanError, join_names
from bamba_quant.files.reading import opened
from bamba_quant.printable import brief_repr

# No activations multiply the embedding, and llama-imatrix skips the output by default.
MAY_BE_MISSING = frozenset({"token_embd", "output"})

# What the GGUF form holds: key-values, and the suffixes of its tensors' names. llama.cpp ignores in_sum.
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MOST_TOKENS = 2**40
PARTS = ("in_sum2", "counts", "in_sum")


@dataclass(frozen=True)
class Imatrix:
    """``entries`` by tensor name, float32 of shape (columns,), for a stack of matrices those of one after the other's.

    ``dataset`` and ``chunks`` are the name and the length of the text they were measured on; ``file`` is None where
    no file holds them. Where ``strict``, a tensor without an entry is an error. ``largest`` are the largest
    magnitudes that entered tensors, None where they were not measured.
    """

    file: Path | None
    entries: Mapping[str, F32]
    dataset: str
    chunks: int
    strict: bool = False
    largest: Mapping[str, float] | None = None

    __repr__ = brief_repr

    def metadata(self) -> dict[str, GgufValue]:
        """The key-values llama-quantize writes; its strings are cut at 127 bytes."""
        values = {
            "quantize.imatrix.file": string(_truncate(str(self.file))),
            "quantize.imatrix.dataset": string(_truncate(self.dataset)),
            "quantize.imatrix.entries_count": uint32(len(self.entries)),
            "quantize.imatrix.chunks_count": uint32(self.chunks),
        }
        if self.file is None:
            del values["quantize.imatrix.file"]
        if not self.dataset:
            del values["quantize.imatrix.dataset"]
        if self.chunks <= 0:
            del values["quantize.imatrix.chunks_count"]
        return values

    def importance(self, name: str, role: str, columns: int, matrices: int = 1) -> F32 | None:
        """The importance of the columns of a tensor, or None without an entry, as in llama-quantize.

        Its shape is (columns,), of several stacked ``matrices`` (matrices, columns). Raises ``PlanError`` naming the
        tensor when its entry has another length, and when it is missing where ``strict``.
        """
        entry = self.entries.get(name)
        if entry is None:
            if role in MAY_BE_MISSING or not self.strict:
                return None
            raise PlanError(
                "the importance matrix has no entry for a tensor",
                where=f"{self.file or 'calibration'}, tensor {name}",
                found=f"{len(self.entries)} entries",
                fix="measure it on this model (entries are named as in its GGUF), or leave out --imatrix-strict",
            )
        if entry.size != matrices * columns:
            raise PlanError(
                "an entry of the importance matrix does not fit its tensor",
                where=f"{self.file or 'calibration'}, tensor {name}",
                found=f"{entry.size} values",
                expected=f"{matrices * columns}, one for each column",
                fix="measure it on this model",
            )
        return entry.reshape(matrices, columns) if matrices > 1 else entry

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ``PlanError`` when there is no entry for any of the tensors called ``names``."""
        if self.entries.keys().isdisjoint(names):
            raise PlanError(
                "the importance matrix has no entry for any tensor of this model",
                where=self.file or "calibration",
                found=f"{len(self.entries)} entries: {join_names(list(self.entries), 3)}",
                expected="entries named as the tensors of the model's GGUF",
                fix="measure it on this model",
            )


class PlaceholderImatrix(Imatrix):
    """Has an entry of ones for every matrix, so that a plan can be made before anything is measured."""

    def __init__(self) -> None:
        super().__init__(None, {}, "", 0, largest=defaultdict(lambda: 1.0))

    def importance(self, name: str, role: str, columns: int, matrices: int = 1) -> F32 | None:
        """Ones, but for what llama-imatrix has no entry for."""
        if role in MAY_BE_MISSING:
            return None
        return np.ones((matrices, columns) if matrices > 1 else columns, np.float32)

    def check_used(self, names: Iterable[str]) -> None:
        """Never an error: every tensor has an entry."""


def imatrix_from_sums(sums: ActivationSums, file: Path | None = None, *, strict: bool = False) -> Imatrix:
    """The importance matrix that quantizers weigh errors by; ``file`` is where the sums come from, if from one."""
    entries = {name: entry.mean_squares() for name, entry in sums.entries.items()}
    return Imatrix(file, entries, "".join(sums.datasets[:1]), sums.chunks, strict, sums.largest)


def read_imatrix(file: Path, *, strict: bool = False) -> Imatrix:
    """An importance matrix of either form; ``strict`` is the field of ``Imatrix``.

    Raises ``CheckpointError`` for a file that is neither form, is damaged, or holds values that are not mean squares.
    """
    return imatrix_from_sums(read_sums(file), file, strict=strict)


def read_sums(file: Path) -> ActivationSums:
    """The sums in an importance matrix of either form. Raises ``CheckpointError`` as ``read_imatrix`` does."""
    with opened(file, "an importance matrix") as (stream, size):
        is_gguf = stream.read(len(MAGIC)) == MAGIC
        stream.seek(0)
        sums = _read_gguf(file) if is_gguf else _read_dat(file, stream, size)
    for name, entry in sums.entries.items():
        values = entry.mean_squares()
        wrong = values[~(np.isfinite(values) & (values >= 0))]
        if wrong.size:
            raise CheckpointError(
                "the importance matrix has negative or non-finite values",
                where=f"{file}, tensor {name}",
                found=f"{wrong[0]:g}",
                expected="finite numbers of at least 0",
                fix="measure it again",
            )
    return sums


def _read_gguf(file: Path) -> ActivationSums:
    checkpoint = read_gguf(file)
    values, tensors = checkpoint.key_values, checkpoint.tensors
    if values.text(Keys.General.TYPE) != "imatrix" or CHUNK_COUNT not in values:
        raise CheckpointError(
            "this GGUF is not an importance matrix",
            where=file,
            found=f"general.type = {values.text(Keys.General.TYPE)!r}",
            expected="'imatrix', with imatrix.chunk_count",
        )
    entries: dict[str, TensorSums] = {}
    for name in tensors:
        tensor, _, kind = name.rpartition(".")
        if kind == "in_sum2":
            entries[tensor] = _entry(file, tensor, *(tensors.get(f"{tensor}.{part}") for part in PARTS))
        elif kind == "counts" and f"{tensor}.in_sum2" not in tensors:
            raise CheckpointError(
                "an entry of the importance matrix lacks its sums",
                where=f"{file}, {tensor}",
                fix="fetch or measure the importance matrix again",
            )
    return ActivationSums(
        entries,
        tuple(values.texts(DATASETS) or ()),
        values.integer(CHUNK_COUNT) or 0,
        max(1, values.integer(CHUNK_SIZE) or 0),
    )


def _entry(
    file: Path,
    tensor: str,
    squares: StoredTensor | None,
    counts: StoredTensor | None,
    sums: StoredTensor | None,
) -> TensorSums:
    """Sums, with one count for each stacked matrix; a file of ours also has the sums that are not squared."""
    given = {"sums": squares, "counts": counts, "plain sums": sums}
    found = [each for each in (squares, counts, sums) if each is not None]
    if (
        squares is None
        or counts is None
        or {each.format.name for each in found} != {"f32"}
        or not squares.elements
        or not counts.elements
        or squares.elements % counts.elements
        or (sums is not None and sums.elements != squares.elements)
    ):
        raise CheckpointError(
            "an entry of the importance matrix is malformed",
            where=f"{file}, {tensor}",
            found=", ".join(
                f"{name} of shape {each.shape}" if each else f"no {name}" for name, each in given.items()
            ),
            expected="float32 sums, and a float32 count for each matrix",
            fix="measure it again",
        )
    numbers = np.rint(read_tensor(counts)).reshape(-1)
    if not np.isfinite(numbers).all() or (numbers < 0).any() or (numbers > MOST_TOKENS).any():
        raise CheckpointError(
            "the importance matrix has invalid token counts",
            where=f"{file}, {tensor}",
            expected=f"finite numbers from 0 to {MOST_TOKENS:,}",
            fix="measure it again",
        )
    shape = (len(numbers), -1)
    return TensorSums(
        _to_float64(read_tensor(squares)).reshape(shape),
        numbers.astype(np.int64),
        None if sums is None else _to_float64(read_tensor(sums)).reshape(shape),
    )


def _to_float64(values: NDArray[Any]) -> F64:
    with np.errstate(invalid="ignore"):  # numpy's warning for signalling NaNs
        return values.astype(np.float64)


def _read_dat(file: Path, stream: BinaryIO, size: int) -> ActivationSums:
    entries: dict[str, TensorSums] = {}
    try:
        for name, calls, values in _dat_entries(stream, size):
            if name in entries:
                raise ValueError(f"the entry {name!r} twice")
            # Sums of means over ``calls`` chunks; 0 is taken as 1.
            entries[name] = TensorSums(_to_float64(values)[None], np.array([max(1, calls)], np.int64))
        left = stream.tell() < size
        chunks = _integer(stream, size) if left else 0
        dataset = _read_exactly(stream, size, _integer(stream, size, least=0)) if left else b""
    except ValueError as error:
        raise CheckpointError(
            "not an importance matrix, or a damaged one",
            where=f"{file}, byte {stream.tell()}",
            found=f"{error} ({size} bytes in all)",
            expected="a GGUF, or entries of name, calls and float32 values",
            fix="fetch or measure the importance matrix again",
        ) from None
    return ActivationSums(entries, (dataset.decode("utf-8", "replace"),), chunks, 0)


def _dat_entries(stream: BinaryIO, size: int) -> Iterator[tuple[str, int, F32]]:
    """Name, calls and sums of each entry. Raises ``ValueError`` as ``_read_exactly``."""
    count = _integer(stream, size, least=1)
    if count > MAX_TENSORS:
        raise ValueError(f"{count} entries; at most {MAX_TENSORS} are supported")
    for _ in range(count):
        name = _read_exactly(stream, size, _integer(stream, size, least=0)).decode("utf-8", "surrogateescape")
        calls = _integer(stream, size)
        yield (
            name,
            calls,
            np.frombuffer(_read_exactly(stream, size, 4 * _integer(stream, size, least=1)), dtype="<f4"),
        )


def _integer(stream: BinaryIO, size: int, least: int = -(2**31)) -> int:
    (found,) = struct.unpack("<i", _read_exactly(stream, size, 4))
    if found < least:
        raise ValueError(f"a count of {found}")
    return int(found)


def _read_exactly(stream: BinaryIO, size: int, count: int) -> bytes:
    """The next ``count`` bytes of a file of ``size``. Raises ``ValueError`` where there are not as many."""
    raw = stream.read(count) if stream.tell() + count <= size else b""
    if len(raw) < count:
        raise ValueError("the file ends too early")
    return raw


def _truncate(text: str) -> str:
    return text.encode("utf-8", "surrogateescape")[:127].decode("utf-8", "ignore")
