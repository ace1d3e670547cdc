"""A plan: each tensor and file of an output, and where each byte goes. A writer executes it and decides nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bamba_quant.checkpoint import Checkpoint, Section, StoredTensor
from bamba_quant.checkpoint.gguf_file import split_name, split_stem
from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.codecs import BlockCodec, Method, SafetensorsCodec
from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.base import Parts
from bamba_quant.families.transforms import IDENTITY, Transform
from bamba_quant.planning.matching import Pairs
from bamba_quant.planning.model import Model, SkippedTensor
from bamba_quant.printable import brief_repr

MAX_SHARD_BYTES = 5 * 10**9  # of safetensors files, by default


@dataclass(frozen=True)
class Part:
    """A tensor of the output. ``offset`` counts bytes from the end of the header of shard number ``shard``.

    ``dtype`` is the name that the container uses: a GGUF type in lower case, or a safetensors dtype.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    shard: int = 0
    offset: int = 0


Group = Sequence[Part]  # parts that stay in one shard


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the input, what happens to it, and the ``parts`` of the output that it becomes.

    ``shape`` is that of the tensor after ``transform``. A ``BlockCodec`` makes one part. With ``section`` the row is
    those rows of its part. A ``SafetensorsCodec`` makes several parts by ``method``; rows of the same ``unit`` are
    measured together. ``importance``, of shape (columns,), or (matrices, columns) for a stack of matrices, weighs the
    squared errors of columns. ``constants`` are parts that the plan knows, by suffix. ``note`` tells the user what
    the tool chose for this tensor.
    """

    source: StoredTensor
    role: str
    codec: BlockCodec | SafetensorsCodec
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transform: Transform = IDENTITY
    method: Method | None = None
    unit: str = ""
    section: Section | None = None
    note: str = ""
    importance: F32 | None = field(default=None, compare=False, repr=False)
    constants: Parts = field(default_factory=dict, compare=False, repr=False)

    __repr__ = brief_repr

    @property
    def format(self) -> BlockCodec:
        """The codec of a row with one part."""
        assert isinstance(self.codec, BlockCodec)
        return self.codec

    @property
    def scheme(self) -> SafetensorsCodec:
        """The codec of a row with several parts."""
        assert isinstance(self.codec, SafetensorsCodec)
        return self.codec

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) in which the tensor streams; a vector is a row, a column if the transform depends on it."""
        if len(self.shape) < 2:
            return (self.elements, 1) if self.transform.depends_on_row else (1, self.elements)
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the output; of a section, those of its rows alone."""
        if isinstance(self.codec, SafetensorsCodec):
            return sum(part.n_bytes for part in self.parts)
        rows, columns = self.matrix
        return rows * self.codec.row_bytes(columns)


@dataclass(frozen=True)
class Shard:
    """A file of weights: its header, its tensors in the order of their offsets, and its size.

    ``name`` is the file's name in a directory; GGUF files are named by ``Plan.paths``.
    """

    name: str
    header: bytes = field(repr=False)
    parts: tuple[Part, ...]
    n_bytes: int

    __repr__ = brief_repr


@dataclass(frozen=True)
class Plan:
    """An output: a GGUF file, its shards, or a directory of safetensors with small ``files`` by name.

    ``recipe`` is the name of the GGUF type, of the scheme, or of the dtype; ``metadata`` are a GGUF's key-values.
    ``outfile`` is the GGUF's path. With ``refine`` the scales of GGUF types are searched further than ggml does.
    ``constants`` are the bytes of parts, by their names, that no row makes. A plan of a config-only model can be
    printed, not written.
    """

    checkpoint: Checkpoint
    architecture: str
    recipe: str
    rows: tuple[PlanRow, ...]
    container: Literal["gguf", "safetensors"]
    model: Model | None = None  # None for a repair, which reads a GGUF without matching it with its rules
    method: str = ""
    refine: bool = False
    outfile: Path = Path()
    metadata: Mapping[str, GgufValue] = field(default_factory=dict, repr=False)
    shards: tuple[Shard, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    constants: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    skipped: tuple[SkippedTensor, ...] = ()
    notes: tuple[str, ...] = ()

    __repr__ = brief_repr

    @property
    def config_only(self) -> bool:
        return self.model is not None and self.model.config_only

    @property
    def pairs(self) -> Pairs:
        """The tensors of the input with their rules."""
        return self.model.pairs if self.model is not None else ()

    @property
    def matrices(self) -> tuple[PlanRow, ...]:
        """The rows that a scheme quantizes."""
        return tuple(row for row in self.rows if row.method is not None)

    @property
    def others(self) -> tuple[PlanRow, ...]:
        """The rows that no scheme quantizes."""
        return tuple(row for row in self.rows if row.method is None)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read for weights."""
        return tuple(sorted({file for row in self.rows for file in row.source.files}))

    @property
    def input_bytes(self) -> int:
        return sum(row.source.n_bytes for row in self.rows)

    @property
    def work_bytes(self) -> int:
        """Input bytes that are read: those of a matrix twice where its method measures it first."""
        return self.input_bytes + sum(
            row.source.n_bytes for row in self.rows if row.method is not None and row.method.measure
        )

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def quantized_elements(self) -> int:
        """Weights that a scheme quantizes."""
        return sum(row.elements for row in self.matrices)

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, padding between tensors included."""
        return sum(shard.n_bytes - len(shard.header) for shard in self.shards)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of weights by the dtype of the output, most first."""
        found: Counter[str] = Counter()
        for shard in self.shards:
            for part in shard.parts:
                found[part.dtype] += part.n_bytes
        return dict(found.most_common())

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(row.n_bytes for row in self.rows) / max(1, self.elements)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file of a directory."""
        return {shard.name: shard.n_bytes for shard in self.shards} | {
            name: len(content) for name, content in self.files.items()
        }

    def paths(self, output: Path) -> dict[Path, int]:
        """The files of the output at ``output``, weights first, with their bytes."""
        if self.container == "safetensors":
            return {output / name: n_bytes for name, n_bytes in self.sizes.items()}
        count = len(self.shards)
        names = [output] if count == 1 else [split_name(split_stem(output), n, count) for n in range(count)]
        return {name: shard.n_bytes for name, shard in zip(names, self.shards, strict=True)}


def shard_numbers(groups: Sequence[Group], max_bytes: int | None, alignment: int = 1) -> list[int]:
    """The shard of each group: a shard ends before the group that would exceed ``max_bytes`` of weights."""
    numbers: list[int] = []
    number = filled = 0
    for group in groups:
        n_bytes = sum(part.n_bytes for part in group)
        if max_bytes is not None and filled and filled + n_bytes > max_bytes:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += _padded(n_bytes, alignment)
    return numbers


def place(
    groups: Sequence[Group],
    shards: Sequence[int],
    alignment: int = 1,
    sort_key: Callable[[Part], int] = lambda part: 0,
) -> list[tuple[Part, ...]]:
    """``groups`` with the shard and offset of every part.

    ``shards`` has a number for each group. In a shard parts follow each other in the order of ``sort_key``, each at a
    multiple of ``alignment``.
    """
    placed = [list(group) for group in groups]
    ends: defaultdict[int, int] = defaultdict(int)
    positions = [(g, i) for g, group in enumerate(groups) for i in range(len(group))]
    for g, i in sorted(positions, key=lambda at: sort_key(groups[at[0]][at[1]])):
        part, shard = groups[g][i], shards[g]
        placed[g][i] = replace(part, shard=shard, offset=ends[shard])
        ends[shard] += _padded(part.n_bytes, alignment)
    return list(map(tuple, placed))


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
