"""Plans a directory with quantized weights from a Hugging Face checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bamba_quant import __version__
from bamba_quant.checkpoint import ReadOptions, StackedTensor, StoredTensor
from bamba_quant.checkpoint.imatrix import Imatrix
from bamba_quant.codecs import BlockCodec, Ignored, SafetensorsCodec, codec_named
from bamba_quant.codecs.compressed_tensors import several_groups
from bamba_quant.errors import FormatError, PlanError, did_you_mean, join_names
from bamba_quant.planning import safetensors_layout
from bamba_quant.planning.model import Model, config_dtype, open_model
from bamba_quant.planning.plan import MAX_SHARD_BYTES, Plan, PlanRow
from bamba_quant.planning.small_files import small_files
from bamba_quant.recipes.loading import loading_notes
from bamba_quant.recipes.matrices import (
    SHARED,
    MatrixCandidate,
    group_modules,
    ignored_modules,
    select_matrices,
)
from bamba_quant.recipes.mixtures import Mixture, mixture_named

DTYPES = ("bf16", "stored")

# The recurrence's parameters keep their type: they are small, and runtimes compute with them in float32.
_KEPT = frozenset({"ssm_a", "ssm_d", "ssm_dt"})


def plan_quantization(
    model: str | Path,
    scheme: str | Mixture,
    *,
    method: str | None = None,
    keep: Sequence[str] = (),
    dtype: str = "bf16",
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    imatrix: Imatrix | None = None,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Plan:
    """Plan the directory that ``model``, a Hugging Face directory, becomes under ``scheme`` filled by ``method``.

    ``scheme`` is a mixture, or the name of a built-in one or of a scheme; ``method`` is by default each scheme's first.
    ``keep`` is ``select_matrices``'s. ``dtype`` is that of all other tensors: "bf16", or "stored", as they are.
    ``imatrix`` weighs the columns' errors. ``allow_config_only`` accepts a directory with only a config.json, or that
    file; the plan can then be printed, not written. The plan's rows are the matrices, then the other tensors. Raises
    a ``BambaQuantError`` for an input that is quantized already or not supported, for a matrix that does not divide
    as the scheme requires, and for a ``keep`` that cannot be followed.
    """
    if dtype not in DTYPES:
        raise PlanError(
            "unknown dtype for the tensors that are not quantized (--dtype)" + did_you_mean(dtype, DTYPES),
            found=dtype,
            expected=", ".join(DTYPES),
        )
    mixture = scheme if isinstance(scheme, Mixture) else mixture_named(scheme)
    source = open_model(
        model,
        weights="optional" if allow_config_only else "required",
        allow_quantized=False,
        reading=reading,
    )
    checkpoint = source.checkpoint
    if checkpoint.kind != "huggingface":
        raise PlanError(
            "quantized safetensors are made from a Hugging Face directory",
            where=checkpoint.path,
            found="a GGUF file",
            fix="make a directory of it first: bamba-quant export FILE.gguf DIRECTORY",
        )
    candidates = _candidates(source)
    loaders = source.architecture.loaders
    schemes = mixture.schemes(candidates, source.config, imatrix is not None)
    names = {name: codec.name for name, codec in schemes.items()}
    chosen = select_matrices(candidates, source.config, keep, loaders.units, names)
    if not chosen:
        raise PlanError(
            "no matrix remains to be quantized", where=checkpoint.path, fix="ignore fewer matrices"
        )
    unplaced = [
        _matrix(candidate, checkpoint.tensors[candidate.name], schemes[candidate.name], method, imatrix)
        if candidate.name in chosen
        else _other(candidate, checkpoint.tensors[candidate.name], dtype)
        for candidate in candidates
    ]
    placed = safetensors_layout.place_parts([row.parts for row in unplaced], max_shard_bytes)
    rows = [replace(row, parts=parts) for row, parts in zip(unplaced, placed, strict=True)]
    rows.sort(key=lambda row: row.method is None)
    matrices = {row.source.name: (row.shape[0], row.shape[1]) for row in rows if row.method}
    used = {codec: [c for c in candidates if schemes.get(c.name) is codec and c.name in chosen]
            for codec in dict.fromkeys(row.scheme for row in rows if row.method)}  # fmt: skip
    metadata = next(iter(used)).metadata(matrices, [row.name for row in rows if not row.method])
    shards = safetensors_layout.pack_shards([part for parts in placed for part in parts], metadata)
    plan = Plan(
        checkpoint,
        source.architecture.name,
        mixture.name,
        tuple(rows),
        "safetensors",
        model=source,
        method=", ".join(dict.fromkeys(row.method.name for row in rows if row.method)),
        shards=shards,
        skipped=source.skipped(),
    )
    rules = source.architecture.tensors(source.config)
    configuration = _configuration(
        {codec: group_modules(candidates, members, loaders) for codec, members in used.items()},
        ignored_modules(candidates, rules, chosen, loaders),
        mixture,
    )
    noted = partial(loading_notes, source.architecture, source.config, checkpoint.metadata)
    roles = {codec: {role for c in members for role in c.roles} for codec, members in used.items()}
    loading = list(dict.fromkeys(note for codec, found in roles.items() for note in noted(codec, found)))
    if len(used) > 1:
        loading.append(
            "transformers 5.23 dequantizes the layers of all groups but experts by the first one: load without "
            "dequantize=True"
        )
    if imatrix is not None:
        imatrix.check_used(rule.gguf for candidate in candidates for rule in candidate.rules if rule.gguf)
    account = [
        *_account(plan, imatrix is not None),
        *(f"Note: {note}." for note in loading),
    ]
    files, not_copied = small_files(checkpoint, configuration, account)
    notes = [*checkpoint.notes, *_notes(plan, source, configuration, dtype), *loading]
    without = [row.source.name for row in plan.matrices if row.importance is None]
    if imatrix is not None and not _weighs(plan):
        notes.append(f"the method {plan.method} does not use the importance matrix")
    elif imatrix is not None and without:
        notes.append(
            f"the importance matrix has no entry for {len(without)} matrices: {join_names(without, 3)}"
        )
    if not_copied:
        notes.append(f"not copied: {join_names(not_copied)}")
    return replace(plan, files={**safetensors_layout.index_file(shards), **files}, notes=tuple(notes))


def _candidates(model: Model) -> list[MatrixCandidate]:
    """The checkpoint's tensors that an output holds, each with its rules, in the order of these."""
    rules: dict[str, list[Any]] = {}
    numbers: dict[str, int] = {}
    for tensor, rule in model.pairs:
        for number, part in enumerate(tensor.stored):
            if not rule.skipped:
                rules.setdefault(part.name, []).append(rule)
            if isinstance(tensor, StackedTensor):
                numbers[part.name] = number
    tensors = model.checkpoint.tensors
    return [
        MatrixCandidate(name, tensors[name].shape, tuple(served), numbers.get(name))
        for name, served in rules.items()
    ]


def _matrix(
    candidate: MatrixCandidate,
    tensor: StoredTensor,
    codec: SafetensorsCodec,
    method: str | None,
    imatrix: Imatrix | None,
) -> PlanRow:
    rows, columns = tensor.shape
    try:
        codec.check(rows, columns)
    except FormatError as error:
        raise FormatError(
            error.what,
            where=f"{tensor.file}, tensor {tensor.name}",
            found=error.found,
            expected=error.expected,
            fix="choose another scheme, or keep what does not divide with --ignore",
        ) from None
    rule = candidate.rules[0]
    importance = None
    if imatrix is not None and rule.gguf is not None:
        stack = 1 if candidate.matrix is None else rule.shape[0]
        importance = imatrix.importance(rule.gguf, rule.role, columns, stack)
        if importance is not None and stack > 1:
            importance = importance[candidate.matrix]
    group = candidate.group(SHARED)
    return PlanRow(
        tensor,
        "+".join(sorted(candidate.roles)),
        codec,
        tensor.shape,
        tuple(
            safetensors_layout.tensor_part(candidate.module + part.suffix, part.dtype, part.shape)
            for part in codec.parts(rows, columns)
        ),
        method=codec.method(method),
        unit=candidate.module if group is None else f"{group}, {candidate.matrix}, {codec.name}",
        importance=importance,
    )


def _other(candidate: MatrixCandidate, tensor: StoredTensor, dtype: str) -> PlanRow:
    kept = dtype == "stored" or candidate.roles <= _KEPT
    codec = tensor.format if kept else codec_named(dtype, BlockCodec)
    part = safetensors_layout.tensor_part(candidate.name, codec, tensor.shape)
    return PlanRow(tensor, "+".join(sorted(candidate.roles)), codec, tensor.shape, (part,))


def _notes(plan: Plan, model: Model, configuration: dict[str, Any], dtype: str) -> list[str]:
    """What a user would want to know before relying on the output."""
    notes: list[str] = []
    asked = config_dtype(model.checkpoint)
    experts = sum(row.source.elements for row in plan.others if _is_expert(row) and len(row.shape) == 3)
    if experts:
        notes.append(
            f"the experts, {experts / plan.elements:.0%} of the weights, stay as they are: transformers has no "
            "quantized layer for stacked experts in this form"
        )
    notes += model.notes
    if any(row.source.format.name == "f16" and row.codec.name == "bf16" for row in plan.others):
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


def _weighs(plan: Plan) -> bool:
    return any(row.method.weighs for row in plan.matrices if row.method)


def _configuration(
    groups: dict[SafetensorsCodec, Ignored], ignored: Ignored, mixture: Mixture
) -> dict[str, Any]:
    """The ``quantization_config`` of all groups. Raises ``PlanError`` for schemes that cannot be mixed."""
    found = [(codec.configuration(ignored), layers) for codec, layers in groups.items()]
    if len(found) == 1:
        return found[0][0]
    alone = [
        codec.name for codec, (each, _) in zip(groups, found, strict=True) if "config_groups" not in each
    ]
    if alone:
        raise PlanError(
            "a scheme has a form of its own, in which no other scheme can stand",
            where=mixture.name,
            found=", ".join(alone),
            expected="schemes of compressed-tensors' form",
            fix="choose other schemes for the mixture",
        )
    return several_groups(found)


def _account(plan: Plan, measured: bool) -> list[str]:
    """What was done, in the words of the card."""
    sizes = ", ".join(f"{n_bytes / 1e9:.3f} GB {dtype}" for dtype, n_bytes in plan.bytes_by_dtype.items())
    kept = sorted(
        row.name
        for row in plan.others
        if (len(row.shape) == 2 and row.name.endswith(".weight")) or _is_expert(row)
    )
    weights = " weighted by measured activations," if measured and _weighs(plan) else ""
    counts = Counter((row.scheme, row.method) for row in plan.matrices if row.method)
    schemes = "; ".join(
        f"scheme `{codec.name}` ({codec.about}), method `{method.name}` ({method.about})"
        + (f", for {count} matrices" if len(counts) > 1 else "")
        for (codec, method), count in counts.items()
    )
    return [
        f"{len(plan.matrices)} matrices ({plan.quantized_elements:,} of {plan.elements:,} weights) were quantized by "
        f"bamba-quant {__version__}: {schemes},{weights} each code rounded once from the original in float32.",
        f"All other tensors are not quantized, these matrices among them: {join_names([f'`{n}`' for n in kept], 8)}.",
        f"Weights take {sizes}; the input took {plan.input_bytes / 1e9:.3f} GB.",
    ]
