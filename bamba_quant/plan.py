"""Everything about an output file, decided from the input's headers alone, as data: executing it decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bamba_quant.architectures import Architecture, TensorRule
from bamba_quant.architectures.transforms import Transform
from bamba_quant.checkpoint import Checkpoint, StoredTensor
from bamba_quant.checkpoint.gguf_values import Value
from bamba_quant.errors import PlanError, listed
from bamba_quant.formats import Format, format_named
from bamba_quant.recipes import Recipe, recipe_named

ALIGNMENT = 32  # GGUF's default


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the output: where it comes from, what happens to it, where it goes.

    ``offset`` counts bytes from the start of the data section of shard ``shard``. ``note`` says what the tool
    chose on its own for this tensor.
    """

    source: StoredTensor
    name: str
    role: str
    transform: Transform
    format: Format
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    note: str = ""

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) in which the tensor streams; a vector whose rows a transform moves counts as a column."""
        if len(self.shape) == 1:
            return (self.shape[0], 1) if self.transform.rows > 1 else (1, self.shape[0])
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        rows, columns = self.matrix
        return rows * self.format.row_bytes(columns)


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the input that the output does not need; ``equal_to`` must then hold the same bytes, if given."""

    source: StoredTensor
    reason: str
    equal_to: StoredTensor | None = None


@dataclass(frozen=True)
class Plan:
    """An output: its rows in file order, its key-values, its shards and what was decided without being asked."""

    architecture: str
    recipe: str
    rows: tuple[PlanRow, ...]
    metadata: Mapping[str, Value]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    shard_count: int = 1

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, padding between tensors included."""
        return sum(self.shard_bytes(shard) for shard in range(self.shard_count))

    def shard_bytes(self, shard: int) -> int:
        """Length of the data section of a shard."""
        return sum(padded(row.n_bytes) for row in self.rows if row.shard == shard)

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(row.n_bytes for row in self.rows) / max(1, self.elements)


def padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def resolve_recipe(name: str, checkpoint: Checkpoint) -> Recipe:
    """The recipe called ``name``; "auto" is the 16-bit type of the input: f16 for f16, bf16 for bf16 and f32."""
    if name.lower() != "auto":
        return recipe_named(name)
    stored = {tensor.format.name for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1}
    return recipe_named("f16" if stored == {"f16"} else "bf16")


def match_tensors(
    checkpoint: Checkpoint, rules: tuple[TensorRule, ...]
) -> list[tuple[StoredTensor, TensorRule]]:
    """Pair every tensor of a Hugging Face checkpoint with its rule, in the rules' order.

    Raises ``PlanError`` naming tensors that no rule covers, that are missing, or whose shape is not the rule's.
    """
    by_name = {rule.hf: rule for rule in rules}
    uncovered = [tensor for name, tensor in checkpoint.tensors.items() if name not in by_name]
    if uncovered:
        raise PlanError(
            "the checkpoint has tensors that the architecture does not know",
            where=uncovered[0].file,
            found=listed([tensor.name for tensor in uncovered]),
            expected="the tensors that config.json implies",
            fix="check config.json (biases, layer types); adapters must be merged before conversion",
        )
    missing = [rule.hf for rule in rules if rule.hf not in checkpoint.tensors and rule.gguf is not None]
    if missing:
        raise PlanError(
            "the checkpoint lacks tensors that config.json implies",
            where=checkpoint.path,
            found=listed(missing) + " missing",
            fix="fetch all shards, or correct config.json (tie_word_embeddings, biases, layer types)",
        )
    pairs = [(checkpoint.tensors[rule.hf], rule) for rule in rules if rule.hf in checkpoint.tensors]
    for tensor, rule in pairs:
        if tensor.shape != rule.shape:
            raise PlanError(
                "a tensor has another shape than config.json implies",
                where=f"{tensor.file}, tensor {tensor.name}",
                found=tensor.shape,
                expected=rule.shape,
                fix="check that config.json and the weights belong together",
            )
    return pairs


def plan_gguf(
    checkpoint: Checkpoint,
    architecture: Architecture,
    rules: tuple[TensorRule, ...],
    recipe: Recipe,
    metadata: Mapping[str, Value],
    *,
    split_max_bytes: int | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan that turns a Hugging Face checkpoint into a GGUF file under ``recipe``."""
    rows: list[PlanRow] = []
    left_out: list[LeftOut] = []
    for tensor, rule in match_tensors(checkpoint, rules):
        if rule.gguf is None:
            twin = checkpoint.tensors[rule.equal_to] if rule.equal_to else None
            left_out.append(LeftOut(tensor, rule.left_out, twin))
            continue
        number_format, note = _choose(recipe, rule)
        rows.append(
            PlanRow(tensor, rule.gguf, rule.role, rule.transform, number_format, rule.gguf_shape, note=note)
        )
    placed, shard_count = _place(rows, split_max_bytes)
    return Plan(architecture.name, recipe.name, placed, metadata, tuple(left_out), notes, shard_count)


def _choose(recipe: Recipe, rule: TensorRule) -> tuple[Format, str]:
    wanted = format_named(recipe.format_for(rule.role))
    number_format = wanted
    columns = rule.gguf_shape[-1]
    while not number_format.fits(columns):
        number_format = format_named(recipe.fallbacks[number_format.name])
    if number_format is wanted:
        return wanted, ""
    return (
        number_format,
        f"{wanted.name} needs rows of a multiple of {wanted.block_size}, this one has {columns}",
    )


def _place(rows: list[PlanRow], split_max_bytes: int | None) -> tuple[tuple[PlanRow, ...], int]:
    """Give every row its shard and offset: a shard is closed before the tensor that would overfill it."""
    placed: list[PlanRow] = []
    shard, offset = 0, 0
    for row in rows:
        if split_max_bytes is not None and offset and offset + row.n_bytes > split_max_bytes:
            shard, offset = shard + 1, 0
        placed.append(replace(row, shard=shard, offset=offset))
        offset += padded(row.n_bytes)
    return tuple(placed), shard + 1
