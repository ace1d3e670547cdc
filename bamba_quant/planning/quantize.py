"""Plans a directory with quantized weights from a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bamba_quant import __version__
from bamba_quant.checkpoint import ReadOptions, StackedTensor, StoredTensor
from bamba_quant.checkpoint.imatrix import Imatrix
from bamba_quant.codecs import BlockCodec, Method, SafetensorsCodec, codec_named
from bamba_quant.errors import FormatError, PlanError, did_you_mean, join_names
from bamba_quant.planning import safetensors_layout
from bamba_quant.planning.cache_scales import NOTE, cache_scheme, scale_tensors
from bamba_quant.planning.model import Model, config_dtype, open_model
from bamba_quant.planning.plan import MAX_SHARD_BYTES, Plan, PlanRow
from bamba_quant.planning.small_files import small_files
from bamba_quant.recipes.loading import loading_notes
from bamba_quant.recipes.matrices import SHARED, MatrixCandidate, ignored_modules, select_matrices

DTYPES = ("bf16", "stored")

# The recurrence's parameters keep their type: they are small, and runtimes compute with them in float32.
_KEPT = frozenset({"ssm_a", "ssm_d", "ssm_dt"})


def plan_quantization(
    model: str | Path,
    scheme: str,
    *,
    method: str | None = None,
    keep: Sequence[str] = (),
    dtype: str = "bf16",
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    imatrix: Imatrix | None = None,
    cache_scales: Mapping[str, tuple[float, float]] | None = None,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Plan:
    """Plan the directory that ``model``, a Hugging Face directory, becomes under ``scheme`` filled by ``method``.

    ``keep`` is ``select_matrices``'s. ``dtype`` is that of all other tensors: "bf16", or "stored", as they are.
    ``imatrix`` weighs the columns' errors. With ``cache_scales`` (``cache_scales.scale_tensors``) the directory has
    those of an FP8 cache. ``allow_config_only`` accepts a directory with only a config.json, or that
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
    codec = codec_named(scheme, SafetensorsCodec)
    chosen_method = codec.method(method)
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
    chosen = select_matrices(candidates, source.config, keep, loaders.units, codec.experts)
    if not chosen:
        raise PlanError(
            "no matrix remains to be quantized", where=checkpoint.path, fix="ignore fewer matrices"
        )
    unplaced = [
        _matrix(candidate, checkpoint.tensors[candidate.name], codec, chosen_method, imatrix)
        if candidate.name in chosen
        else _other(candidate, checkpoint.tensors[candidate.name], dtype)
        for candidate in candidates
    ]
    constants = {} if cache_scales is None else scale_tensors(candidates, cache_scales)
    scales = [(safetensors_layout.tensor_part(name, "BF16", (1,)),) for name in constants]
    placed = safetensors_layout.place_parts([*(row.parts for row in unplaced), *scales], max_shard_bytes)
    rows = [replace(row, parts=parts) for row, parts in zip(unplaced, placed, strict=False)]
    rows.sort(key=lambda row: row.method is None)
    matrices = {row.source.name: (row.shape[0], row.shape[1]) for row in rows if row.method}
    metadata = codec.metadata(matrices, [row.name for row in rows if not row.method])
    shards = safetensors_layout.pack_shards([part for parts in placed for part in parts], metadata)
    plan = Plan(
        checkpoint,
        source.architecture.name,
        codec.name,
        tuple(rows),
        "safetensors",
        model=source,
        method=chosen_method.name,
        shards=shards,
        constants=constants,
        skipped=source.skipped(),
    )
    rules = source.architecture.tensors(source.config)
    configuration = codec.configuration(ignored_modules(candidates, rules, chosen, loaders))
    if constants:
        configuration = cache_scheme(configuration, codec.name)
    loading = [NOTE] * bool(constants) + loading_notes(
        source.architecture,
        source.config,
        checkpoint.metadata,
        codec,
        {role for candidate in candidates if candidate.name in chosen for role in candidate.roles},
    )
    if imatrix is not None:
        imatrix.check_used(rule.gguf for candidate in candidates for rule in candidate.rules if rule.gguf)
    account = [
        *_account(plan, codec, chosen_method, imatrix is not None and chosen_method.weighs),
        *(f"Note: {note}." for note in loading),
    ]
    files, not_copied = small_files(checkpoint, configuration, account)
    notes = [*checkpoint.notes, *_notes(plan, source, configuration, dtype), *loading]
    without = [row.source.name for row in plan.matrices if row.importance is None]
    if imatrix is not None and not chosen_method.weighs:
        notes.append(f"the method {chosen_method.name} does not use the importance matrix")
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
    method: Method,
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
        method=method,
        unit=candidate.module if group is None else f"{group}",
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


def _account(plan: Plan, codec: SafetensorsCodec, method: Method, weighted: bool) -> list[str]:
    """What was done, in the words of the card."""
    sizes = ", ".join(f"{n_bytes / 1e9:.3f} GB {dtype}" for dtype, n_bytes in plan.bytes_by_dtype.items())
    kept = sorted(
        row.name
        for row in plan.others
        if (len(row.shape) == 2 and row.name.endswith(".weight")) or _is_expert(row)
    )
    weights = " weighted by measured activations," if weighted else ""
    return [
        f"{len(plan.matrices)} matrices ({plan.quantized_elements:,} of {plan.elements:,} weights) were quantized by "
        f"bamba-quant {__version__}: scheme `{codec.name}` ({codec.about}), method "
        f"`{method.name}` ({method.about}),{weights} each code rounded once from the original in float32.",
        f"All other tensors are not quantized, these matrices among them: {join_names([f'`{n}`' for n in kept], 8)}.",
        f"Weights take {sizes}; the input took {plan.input_bytes / 1e9:.3f} GB.",
    ]
