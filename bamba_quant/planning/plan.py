"""Everything about an output file, decided from the input's headers alone, as data: executing it decides nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bamba_quant.checkpoint import Checkpoint, PackedTensor, Section, StoredTensor
from bamba_quant.checkpoint.gguf_header import padded_size
from bamba_quant.checkpoint.gguf_values import GgufValue
from bamba_quant.checkpoint.imatrix import MAY_BE_MISSING, Imatrix
from bamba_quant.codecs import BlockCodec
from bamba_quant.codecs.arrays import F32
from bamba_quant.errors import PlanError
from bamba_quant.families.transforms import IDENTITY, Transform
from bamba_quant.planning.model import Model, SkippedTensor
from bamba_quant.recipes import Recipe, TypeOverrides, recipe_named, select_formats


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the output: where it comes from, what happens to it, where it goes.

    ``offset`` counts bytes from the start of the data section of shard ``shard``. ``note`` says what the tool
    chose on its own for this tensor; ``importance``, of shape (columns,), or (matrices, columns) for a stack of
    matrices, weighs its columns' errors. With ``section`` the row is those rows of the output's tensor ``name``.
    """

    source: StoredTensor
    name: str
    role: str
    transform: Transform
    format: BlockCodec
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    note: str = ""
    importance: F32 | None = field(default=None, compare=False, repr=False)
    section: Section | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the output's tensor, of which this row may be a section."""
        if self.section is None:
            return self.shape
        return (*self.shape[:-2], self.section.period, self.shape[-1])

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
        rows, columns = self.matrix
        return rows * self.format.row_bytes(columns)


@dataclass(frozen=True)
class Plan:
    """An output: its rows in file order, its key-values, its shards and what was decided without being asked.

    One of an ``config_only`` source can be shown, not written. With ``refine`` the scales of what is quantized are
    searched further than ggml does.
    """

    architecture: str
    recipe: str
    rows: tuple[PlanRow, ...]
    metadata: Mapping[str, GgufValue]
    skipped: tuple[SkippedTensor, ...] = ()
    notes: tuple[str, ...] = ()
    shard_count: int = 1
    config_only: bool = False
    refine: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, padding between tensors included."""
        return sum(self.shard_bytes(shard) for shard in range(self.shard_count))

    def shard_bytes(self, shard: int) -> int:
        """Length of the data section of a shard."""
        return sum(padded_size(row.n_bytes) for row in self.rows if row.shard == shard)

    def in_one_file(self) -> Plan:
        """The same rows in a single file."""
        rows, count = _place(list(self.rows), None)
        return replace(self, rows=rows, shard_count=count)

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(row.n_bytes for row in self.rows) / max(1, self.elements)


def resolve_recipe(name: str, checkpoint: Checkpoint) -> Recipe:
    """The recipe called ``name``; "auto" is f16 where most of the input's bytes are f16, and bf16 elsewhere."""
    if name.lower() != "auto":
        return recipe_named(name)
    n_bytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        n_bytes[tensor.format.name] += tensor.n_bytes
    return recipe_named("f16" if n_bytes and n_bytes.most_common(1)[0][0] == "f16" else "bf16")


def plan_gguf(
    source: Model,
    recipe: Recipe,
    overrides: TypeOverrides,
    metadata: Mapping[str, GgufValue],
    *,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
    keep_split: bool = False,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan that turns a model into a GGUF file under ``recipe`` and the user's ``overrides``.

    Raises ``PlanError`` for an input that is quantized already, unless ``allow_requantize``, for a recipe that
    needs importance and has none, and for importance that does not fit.
    """
    kept = [(tensor, rule) for tensor, rule in source.pairs if rule.gguf is not None]
    selected = select_formats(
        [rule for _, rule in kept],
        recipe,
        overrides,
        [tensor.format for tensor, _ in kept],
        grouped_query=source.config.num_attention_heads // source.config.num_key_value_heads
        if "attention" in source.config.layers[0].blocks
        else 0,
        experts=source.config.num_local_experts,
        imatrix=imatrix is not None,
    )
    rows: list[PlanRow] = []
    for (tensor, rule), (codec, note) in zip(kept, ((s.format, s.note) for s in selected), strict=True):
        _check_requantization(tensor, codec, allow_requantize)
        importance = None
        if imatrix is not None and codec.dtype is None:
            importance = imatrix.importance(
                str(rule.gguf), rule.role, rule.gguf_shape[-1], math.prod(rule.gguf_shape[:-2])
            )
            if importance is None:
                note = "; ".join(filter(None, [note, "the importance matrix has no entry for it"]))
        if importance is None and codec.name in recipe.needs_importance and rule.role not in MAY_BE_MISSING:
            raise PlanError(
                f"{recipe.name} stores tensors in {codec.name} only with an importance matrix",
                where=f"tensor {rule.gguf}",
                fix="give one with --imatrix, or choose a larger type",
            )
        transform = rule.transform if source.checkpoint.kind == "huggingface" else IDENTITY
        rows.append(
            PlanRow(
                tensor,
                str(rule.gguf),
                rule.role,
                transform,
                codec,
                rule.gguf_shape,
                note=note,
                importance=importance,
            )
        )
    if imatrix is not None:
        imatrix.check_used(row.name for row in rows)
    placed, shard_count = _place_as_found(rows) if keep_split else _place(rows, split_max_bytes)
    return Plan(
        source.architecture.name,
        recipe.name,
        placed,
        metadata,
        source.skipped(),
        notes,
        shard_count,
        source.config_only,
        recipe.refine,
    )


def _check_requantization(tensor: StoredTensor, wanted: BlockCodec, allowed: bool) -> None:
    if isinstance(tensor, PackedTensor) and wanted.dtype is not None:
        return  # GGUF has no type for such codes, and plain numbers hold what they stand for
    if tensor.format.dtype is None and wanted != tensor.format and not allowed:
        raise PlanError(
            "the input is quantized already, and quantizing it again loses more than quantizing the original",
            where=f"{tensor.file}, tensor {tensor.name}",
            found=tensor.format.name,
            expected="f32, f16 or bf16",
            fix="give the original, or accept the loss with --allow-requantize",
        )


def _place(rows: list[PlanRow], split_max_bytes: int | None) -> tuple[tuple[PlanRow, ...], int]:
    """Give every row its shard and offset: a shard is closed before the tensor that would overfill it."""
    placed: list[PlanRow] = []
    shard, offset = 0, 0
    for row in rows:
        if split_max_bytes is not None and offset and offset + row.n_bytes > split_max_bytes:
            shard, offset = shard + 1, 0
        placed.append(replace(row, shard=shard, offset=offset))
        offset += padded_size(row.n_bytes)
    return tuple(placed), shard + 1


def _place_as_found(rows: list[PlanRow]) -> tuple[tuple[PlanRow, ...], int]:
    """Give every row the shard it has in the input."""
    files = sorted({row.source.file for row in rows})
    placed: list[PlanRow] = []
    for shard, file in enumerate(files):
        offset = 0
        for row in rows:
            if row.source.file == file:
                placed.append(replace(row, shard=shard, offset=offset))
                offset += padded_size(row.n_bytes)
    return tuple(placed), len(files)
