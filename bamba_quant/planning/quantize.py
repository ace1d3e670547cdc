"""Plans a directory with quantized weights from a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.checkpoint import ReadOptions, StackedTensor, StoredTensor
from bamba_quant.checkpoint.imatrix import Imatrix
from bamba_quant.codecs import BlockCodec, Ignored, SafetensorsCodec, codec_named
from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.base import Parts
from bamba_quant.codecs.compressed_tensors import several_groups
from bamba_quant.codecs.fp4 import global_scale
from bamba_quant.errors import FormatError, PlanError, did_you_mean, join_names
from bamba_quant.planning import safetensors_layout
from bamba_quant.planning.cache_scales import NOTE, cache_scheme, scale_tensors
from bamba_quant.planning.model import Model, open_model
from bamba_quant.planning.notes import account, notes_on, weighs
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
    cache_scales: Mapping[str, tuple[float, float]] | None = None,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Plan:
    """Plan the directory that ``model``, a Hugging Face directory, becomes under ``scheme`` filled by ``method``.

    ``scheme`` is a mixture, or the name of a built-in one or of a scheme; ``method`` is by default each scheme's first.
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
    if not allow_config_only and (imatrix is None or imatrix.largest is None):
        measured = next(
            (codec.name for name, codec in schemes.items() if name in chosen and codec.measured), None
        )
        if measured:
            raise PlanError(
                "the scheme stores what enters each matrix at most, which a text has to show",
                where=measured,
                found="no text" if imatrix is None else "an importance matrix, which does not hold it",
                fix="give a text with --calibrate",
            )
    unplaced = [
        _matrix(candidate, checkpoint.tensors[candidate.name], schemes[candidate.name], method, imatrix)
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
        constants=constants,
        skipped=source.skipped(),
    )
    rules = source.architecture.tensors(source.config)
    configuration = _configuration(
        {codec: group_modules(candidates, members, loaders) for codec, members in used.items()},
        ignored_modules(candidates, rules, chosen, loaders),
        mixture,
    )
    if constants:
        configuration = cache_scheme(configuration, mixture.name)
    noted = partial(loading_notes, source.architecture, source.config, checkpoint.metadata)
    roles = {codec: {role for c in members for role in c.roles} for codec, members in used.items()}
    loading = list(dict.fromkeys(note for codec, found in roles.items() for note in noted(codec, found)))
    loading += [NOTE] * bool(constants)
    if len(used) > 1:
        loading.append(
            "transformers 5.23 dequantizes the layers of all groups but experts by the first one: load without "
            "dequantize=True"
        )
    if imatrix is not None:
        imatrix.check_used(rule.gguf for candidate in candidates for rule in candidate.rules if rule.gguf)
    said = [
        *account(plan, imatrix is not None),
        *(f"Note: {note}." for note in loading),
    ]
    files, not_copied = small_files(checkpoint, configuration, said)
    notes = [*checkpoint.notes, *notes_on(plan, source, configuration, dtype), *loading]
    without = [row.source.name for row in plan.matrices if row.importance is None]
    if imatrix is not None and not weighs(plan):
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
    constants: Parts = {}
    if codec.measured and imatrix is not None and imatrix.largest is not None:
        constants = {codec.measured: _input_scale(imatrix, str(rule.gguf))}
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
        constants=constants,
    )


def _input_scale(imatrix: Imatrix, name: str) -> F32:
    """What compressed-tensors stores of the inputs of a tensor. Raises ``PlanError`` where none were seen."""
    assert imatrix.largest is not None
    try:
        return global_scale(np.array([imatrix.largest[name]], np.float32))
    except KeyError:
        raise PlanError(
            "nothing entered a matrix whose inputs the scheme has to know",
            where=f"calibration, tensor {name}",
            found=f"{len(imatrix.largest)} other tensors",
            fix="calibrate with another or a longer text",
        ) from None


def _other(candidate: MatrixCandidate, tensor: StoredTensor, dtype: str) -> PlanRow:
    kept = dtype == "stored" or candidate.roles <= _KEPT
    codec = tensor.format if kept else codec_named(dtype, BlockCodec)
    part = safetensors_layout.tensor_part(candidate.name, codec, tensor.shape)
    return PlanRow(tensor, "+".join(sorted(candidate.roles)), codec, tensor.shape, (part,))


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
