"""Importance matrices as llama-imatrix writes them: the mean square of each input channel of each matrix.

Two forms: GGUF (tools/imatrix/imatrix.cpp, ``save_imatrix``) and the older .dat (common/imatrix-loader.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import Keys

from bamba_quant.checkpoint import read_tensor
from bamba_quant.checkpoint.gguf_file import MAGIC, read_gguf
from bamba_quant.checkpoint.gguf_values import Value, string, uint32
from bamba_quant.errors import CheckpointError, PlanError
from bamba_quant.formats.base import F32

# No activations multiply the embedding, and llama-imatrix leaves the output out unless told otherwise.
MAY_BE_MISSING = frozenset({"token_embd", "output"})


@dataclass(frozen=True)
class Imatrix:
    """``entries`` by tensor name, float32 of shape (columns,), for a stack of matrices those of one after the other's.

    ``dataset`` and ``chunks`` say where and over how much text they were measured.
    """

    file: Path
    entries: Mapping[str, F32]
    dataset: str
    chunks: int

    def metadata(self) -> dict[str, Value]:
        """The key-values llama-quantize writes; its strings are cut at 127 bytes."""
        values = {
            "quantize.imatrix.file": string(_cut(str(self.file))),
            "quantize.imatrix.dataset": string(_cut(self.dataset)),
            "quantize.imatrix.entries_count": uint32(len(self.entries)),
            "quantize.imatrix.chunks_count": uint32(self.chunks),
        }
        if not self.dataset:
            del values["quantize.imatrix.dataset"]
        if self.chunks <= 0:
            del values["quantize.imatrix.chunks_count"]
        return values

    def importance(self, name: str, role: str, columns: int, matrices: int = 1) -> F32 | None:
        """The importance of the columns of a tensor, or None where llama-imatrix measures none.

        Its shape is (columns,), of several stacked ``matrices`` (matrices, columns). Raises ``PlanError`` naming the
        tensor when its entry is missing or has another length.
        """
        entry = self.entries.get(name)
        if entry is None:
            if role in MAY_BE_MISSING:
                return None
            raise PlanError(
                "the importance matrix has no entry for a tensor",
                where=f"{self.file}, tensor {name}",
                found=f"{len(self.entries)} entries",
                fix="measure it on this model; entries are named as in its GGUF",
            )
        if entry.size != matrices * columns:
            raise PlanError(
                "an entry of the importance matrix does not fit its tensor",
                where=f"{self.file}, tensor {name}",
                found=f"{entry.size} values",
                expected=f"{matrices * columns}, one for each column",
                fix="measure it on this model",
            )
        return entry.reshape(matrices, columns) if matrices > 1 else entry


def read_imatrix(file: Path) -> Imatrix:
    """An importance matrix of either form. Raises ``CheckpointError`` for a file that is neither, or holds NaN."""
    try:
        with file.open("rb") as stream:
            is_gguf = stream.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CheckpointError(
            "the importance matrix cannot be read", where=file, found=error.strerror
        ) from error
    found = _read_gguf(file) if is_gguf else _read_dat(file)
    for name, entry in found.entries.items():
        if not np.isfinite(entry).all() or (entry < 0).any():
            raise CheckpointError(
                "the importance matrix holds values that are no mean squares",
                where=f"{file}, tensor {name}",
                expected="finite numbers of at least 0",
                fix="measure it again",
            )
    return found


def _read_gguf(file: Path) -> Imatrix:
    checkpoint = read_gguf(file)
    values = {key: value.value for key, value in checkpoint.metadata.items()}
    if values.get(Keys.General.TYPE) != "imatrix" or "imatrix.chunk_count" not in values:
        raise CheckpointError(
            "this GGUF is no importance matrix",
            where=file,
            found=f"general.type = {values.get(Keys.General.TYPE)!r}",
            expected="'imatrix', with imatrix.chunk_count",
        )
    entries: dict[str, F32] = {}
    for name in checkpoint.tensors:
        if not name.endswith(".in_sum2"):
            continue
        tensor = name.removesuffix(".in_sum2")
        if f"{tensor}.counts" not in checkpoint.tensors:
            raise CheckpointError(
                "an entry of the importance matrix lacks its counts", where=f"{file}, {tensor}"
            )
        sums = read_tensor(checkpoint.tensors[name]).astype(np.float32).reshape(-1)
        counts = np.rint(read_tensor(checkpoint.tensors[f"{tensor}.counts"])).astype(np.float32).reshape(-1)
        per_matrix = sums.reshape(len(counts), -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(counts[:, None] > 0, per_matrix / counts[:, None], np.float32(1))
        entries[tensor] = means.astype(np.float32).reshape(-1)
    datasets = values.get("imatrix.datasets") or [""]
    return Imatrix(file, entries, str(datasets[0]), int(values["imatrix.chunk_count"]))


def _read_dat(file: Path) -> Imatrix:
    raw = file.read_bytes()
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if count < 0 or position + count > len(raw):
            raise CheckpointError(
                "not an importance matrix, or one that ends too early",
                where=f"{file}, byte {position}",
                found=f"{len(raw)} bytes",
                expected="a GGUF, or entries of name, calls and float32 values",
            )
        position += count
        return raw[position - count : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries: dict[str, F32] = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls = number()
        values = np.frombuffer(take(4 * number()), dtype="<f4")
        entries[name] = (values / np.float32(calls) if calls > 0 else values).astype(np.float32)
    chunks = number() if position < len(raw) else 0
    dataset = take(number()).decode("utf-8", "replace") if position < len(raw) else ""
    return Imatrix(file, entries, dataset, chunks)


def _cut(text: str) -> str:
    return text.encode("utf-8")[:127].decode("utf-8", "ignore")
