"""A Hugging Face checkpoint planned as a quantized one: every tensor, byte and small file, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bamba_quant import __version__
from bamba_quant.checkpoint import ReadOptions, StoredTensor
from bamba_quant.checkpoint.imatrix import Imatrix
from bamba_quant.codecs import BlockCodec, Method, SafetensorsCodec, codec_named
from bamba_quant.codecs.arrays import F32
from bamba_quant.errors import FormatError, PlanError, join_names
from bamba_quant.families.transforms import IDENTITY
from bamba_quant.planning.model import Model, SkippedTensor, config_dtype, open_model
from bamba_quant.planning.plan import PlanRow
from bamba_quant.planning.small_files import small_files
from bamba_quant.recipes.loading import loading_notes
from bamba_quant.recipes.matrices import SHARED, Candidate, ignored_modules, select_matrices
from bamba_quant.writers.safetensors import entry_of
from bamba_quant.writers.shards import Entry, Shard, index_file, place, shards_of

MAX_SHARD_BYTES = 5 * 10**9
DTYPES = ("bf16", "stored")

# What the recurrence is made of stays in its type: it is small, and runtimes compute with it in float32.
_STAYS = frozenset({"ssm_a", "ssm_d", "ssm_dt"})


@dataclass(frozen=True)
class Matrix:
    """A tensor that becomes several: where it comes from, and its parts in the order of the scheme's.

    Matrices of the same ``unit`` share what the method measures. ``importance``, of shape (columns,), weighs the
    columns' errors.
    """

    source: StoredTensor
    module: str
    role: str
    unit: str
    entries: tuple[Entry, ...]
    importance: F32 | None = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.source.shape
        return rows, columns


@dataclass(frozen=True)
class Quantization:
    """A plan: matrices and other tensors in place, shards, small files by name, and what was decided unasked.

    A plan of a config-only model can be shown, not written.
    """

    source: Model
    scheme: SafetensorsCodec
    method: Method
    matrices: tuple[Matrix, ...]
    rows: tuple[PlanRow, ...]
    shards: tuple[Shard, ...]
    files: Mapping[str, bytes]
    skipped: tuple[SkippedTensor, ...]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the directory."""
        return {shard.name: shard.n_bytes for shard in self.shards} | {
            name: len(content) for name, content in self.files.items()
        }

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of weights by safetensors' name of their dtype, most first."""
        found: Counter[str] = Counter()
        for shard in self.shards:
            for entry in shard.entries:
                found[entry.dtype] += entry.n_bytes
        return dict(found.most_common())

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The tensors that are read: of matrices, then of rows."""
        return (*(matrix.source for matrix in self.matrices), *(row.source for row in self.rows))

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read for weights."""
        return tuple(sorted({file for source in self.sources for file in source.files}))

    @property
    def input_bytes(self) -> int:
        return sum(source.n_bytes for source in self.sources)

    @property
    def work_bytes(self) -> int:
        """Input bytes that are read, those of matrices twice where something is measured first."""
        again = sum(matrix.source.n_bytes for matrix in self.matrices) if self.method.measure else 0
        return self.input_bytes + again

    @property
    def elements(self) -> int:
        return sum(source.elements for source in self.sources)

    @property
    def quantized_elements(self) -> int:
        return sum(matrix.source.elements for matrix in self.matrices)


def plan_quantization(
    model: str | Path,
    scheme: str,
    *,
    method: str | None = None,
    keep: Sequence[str] = (),
    dtype: str = "bf16",
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    imatrix: Imatrix | None = None,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Quantization:
    """Plan the directory that ``model``, a Hugging Face directory, becomes under ``scheme`` filled by ``method``.

    ``keep`` is ``select_matrices``'s. ``dtype`` is that of all other tensors: "bf16", or "stored", as they are.
    ``imatrix`` weighs the columns' errors. With ``allow_config_only`` a directory with only a config.json will do, or
    that file, and the plan is for show. Raises a ``BambaQuantError`` for an input that is quantized already or not
    supported, for a matrix that does not divide as the scheme wants, and for a ``keep`` that cannot be followed.
    """
    if dtype not in DTYPES:
        raise PlanError("no such dtype of the other tensors", found=dtype, expected=", ".join(DTYPES))
    chosen_scheme = codec_named(scheme, SafetensorsCodec)
    chosen_method = chosen_scheme.method(method)
    source = open_model(
        model,
        weights="optional" if allow_config_only else "required",
        allow_quantized=False,
        reading=reading,
    )
    if source.checkpoint.kind != "huggingface":
        raise PlanError(
            "quantized safetensors are made from a Hugging Face directory",
            where=source.checkpoint.path,
            found="a GGUF file",
            fix="make a directory of it first: bamba-quant export FILE.gguf DIRECTORY",
        )
    candidates = _candidates(source)
    loaders = source.architecture.loaders
    chosen = select_matrices(candidates, source.config, keep, loaders.units)
    if not chosen:
        raise PlanError("nothing is left to quantize", where=source.checkpoint.path, fix="keep less")
    matrices: list[Matrix] = []
    rows: list[PlanRow] = []
    groups: list[list[Entry]] = []
    for candidate in candidates:
        tensor = source.checkpoint.tensors[candidate.name]
        if candidate.name in chosen:
            matrices.append(_matrix(candidate, tensor, chosen_scheme, imatrix))
            groups.append(list(matrices[-1].entries))
        else:
            rows.append(_row(candidate, tensor, dtype))
            groups.append([entry_of(rows[-1])])
    placed = [entry for group in place(groups, max_shard_bytes) for entry in group]
    at = {entry.name: entry for entry in placed}
    metadata = chosen_scheme.metadata(
        {matrix.source.name: matrix.shape for matrix in matrices}, [row.name for row in rows]
    )
    shards = shards_of(placed, metadata)
    plan = Quantization(
        source,
        chosen_scheme,
        chosen_method,
        tuple(replace(m, entries=tuple(at[entry.name] for entry in m.entries)) for m in matrices),
        tuple(replace(row, shard=at[row.name].shard, offset=at[row.name].offset) for row in rows),
        shards,
        {},
        source.skipped(),
        (),
    )
    rules = source.architecture.tensors(source.config)
    configuration = chosen_scheme.configuration(ignored_modules(candidates, rules, chosen, loaders))
    loading = loading_notes(
        source.architecture,
        source.config,
        source.checkpoint.metadata,
        chosen_scheme,
        {role for candidate in candidates if candidate.name in chosen for role in candidate.roles},
    )
    if imatrix is not None:
        imatrix.check_used(rule.gguf for candidate in candidates for rule in candidate.rules if rule.gguf)
    account = [*_account(plan, imatrix is not None), *(f"Note: {note}." for note in loading)]
    files, not_copied = small_files(source.checkpoint, configuration, account)
    notes = [*source.checkpoint.notes, *_notes(plan, configuration, dtype), *loading]
    without = [matrix.source.name for matrix in plan.matrices if matrix.importance is None]
    if imatrix is not None and without:
        notes.append(
            f"the importance matrix has no entry for {len(without)} matrices: {join_names(without, 3)}"
        )
    if not_copied:
        notes.append(f"not copied: {join_names(not_copied)}")
    return replace(plan, files={**index_file(shards), **files}, notes=tuple(notes))


def _candidates(source: Model) -> list[Candidate]:
    """The checkpoint's tensors that an output holds, each with its rules, in the order of these."""
    rules: dict[str, list[Any]] = {}
    for tensor, rule in source.pairs:
        if not rule.skipped:
            rules.setdefault(tensor.name, []).append(rule)
    tensors = source.checkpoint.tensors
    return [Candidate(name, tensors[name].shape, tuple(served)) for name, served in rules.items()]


def _matrix(
    candidate: Candidate, tensor: StoredTensor, scheme: SafetensorsCodec, imatrix: Imatrix | None
) -> Matrix:
    rows, columns = tensor.shape
    try:
        scheme.check(rows, columns)
    except FormatError as error:
        raise FormatError(
            error.what,
            where=f"{tensor.file}, tensor {tensor.name}",
            found=error.found,
            expected=error.expected,
            fix="choose another scheme, or keep what does not divide with --keep",
        ) from None
    rule = candidate.rules[0]
    importance = None
    if imatrix is not None and rule.gguf is not None:
        importance = imatrix.importance(rule.gguf, rule.role, columns)
    group = candidate.group(SHARED)
    return Matrix(
        tensor,
        candidate.module,
        "+".join(sorted(candidate.roles)),
        candidate.module if group is None else f"{group}",
        tuple(
            Entry(candidate.module + part.suffix, part.dtype, part.shape)
            for part in scheme.parts(rows, columns)
        ),
        importance,
    )


def _row(candidate: Candidate, tensor: StoredTensor, dtype: str) -> PlanRow:
    stays = dtype == "stored" or candidate.roles <= _STAYS
    return PlanRow(
        tensor,
        candidate.name,
        "+".join(sorted(candidate.roles)),
        IDENTITY,
        tensor.format if stays else codec_named(dtype, BlockCodec),
        tensor.shape,
    )


def _notes(plan: Quantization, configuration: dict[str, Any], dtype: str) -> list[str]:
    """What a user would want to know before relying on the output."""
    notes: list[str] = []
    asked = config_dtype(plan.source.checkpoint)
    experts = sum(row.source.elements for row in plan.rows if _is_expert(row))
    if experts:
        notes.append(
            f"the experts, {experts / plan.elements:.0%} of the weights, stay as they are: they are stacked in one "
            "tensor, for which transformers has no quantized layer in these forms"
        )
    if plan.source.config_only:
        notes.append(plan.source.note)
    if any(row.source.format.name == "f16" and row.format.name == "bf16" for row in plan.rows):
        notes.append(
            "float16 tensors that are not quantized lose three bits as bfloat16, which is not smaller: --dtype stored "
            "keeps them"
        )
    if asked == "f16":
        notes.append(
            "config.json asks for float16, to which loaders cast scales: below 2^-17 these lose digits"
        )
    if asked == "f32" and dtype == "bf16" and configuration["quant_method"] == "fp8":
        notes.append(
            "config.json asks for float32, and in this form transformers leaves all other tensors in the type they "
            "are stored in: load with dtype=torch.bfloat16, or write with --dtype stored"
        )
    return notes


def _is_expert(row: PlanRow) -> bool:
    return "_exps" in row.role


def _account(plan: Quantization, weighted: bool) -> list[str]:
    """What was done, in the words of the card."""
    sizes = ", ".join(f"{n_bytes / 1e9:.3f} GB {dtype}" for dtype, n_bytes in plan.bytes_by_dtype.items())
    kept = sorted(
        row.name
        for row in plan.rows
        if (len(row.shape) == 2 and row.name.endswith(".weight")) or _is_expert(row)
    )
    weights = " weighted by measured activations," if weighted else ""
    return [
        f"{len(plan.matrices)} matrices ({plan.quantized_elements:,} of {plan.elements:,} weights) were quantized by "
        f"bamba-quant {__version__}: scheme `{plan.scheme.name}` ({plan.scheme.about}), method "
        f"`{plan.method.name}` ({plan.method.about}),{weights} each code rounded once from the original in float32.",
        f"All other tensors are not quantized, these matrices among them: {join_names([f'`{n}`' for n in kept], 8)}.",
        f"Weights take {sizes}; the input took {plan.input_bytes / 1e9:.3f} GB.",
    ]
