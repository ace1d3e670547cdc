"""Plans a GGUF file from a Hugging Face directory or another GGUF file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from bamba_quant.checkpoint import Checkpoint, ReadOptions, StoredTensor, packed_like
from bamba_quant.checkpoint.imatrix import MAY_BE_MISSING, Imatrix, read_imatrix
from bamba_quant.codecs import BlockCodec
from bamba_quant.errors import PlanError
from bamba_quant.families.transforms import IDENTITY
from bamba_quant.metadata.general import tool_version_key
from bamba_quant.planning.gguf_layout import gguf_part, lay_out_gguf
from bamba_quant.planning.gguf_metadata import describe_directory, describe_gguf, output_file
from bamba_quant.planning.model import Model, open_model
from bamba_quant.planning.plan import Plan, PlanRow
from bamba_quant.recipes import Recipe, TypeOverrides, recipe_named, select_formats
from bamba_quant.tokenizers import has_tokenizer


def plan_conversion(
    model: str | Path,
    *,
    outtype: str | Recipe = "auto",
    outfile: str | Path | None = None,
    overrides: TypeOverrides | None = None,
    imatrix: str | Path | Imatrix | None = None,
    imatrix_strict: bool = False,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
    keep_split: bool = False,
    model_name: str | None = None,
    metadata: str | Path | None = None,
    pre: str | None = None,
    vocab: bool = True,
    vocab_only: bool = False,
    allow_config_only: bool = False,
    reading: ReadOptions = ReadOptions(),
) -> Plan:
    """Plan the conversion of a Hugging Face directory or a GGUF file to GGUF, reading headers and small files only.

    ``outtype`` is a recipe, the name of one, or "auto"; ``outfile`` is a file (in which ``{ftype}`` stands for the
    type) or a directory, by default the model's own. ``metadata``, ``model_name``, ``pre`` and ``vocab`` are for
    directories: a GGUF has its own. With ``imatrix_strict`` a tensor that the file ``imatrix`` has no entry for is
    an error. ``allow_config_only`` accepts a directory with only a config.json, or that file; the plan can then be
    printed, not written. Raises a ``BambaQuantError`` for whatever llama.cpp could not run.
    """
    source = open_model(
        model,
        weights="none" if vocab_only else "optional" if allow_config_only else "required",
        reading=reading,
    )
    checkpoint = source.checkpoint
    differences = source.architecture.check_gguf(source.config)
    recipe = outtype if isinstance(outtype, Recipe) else _recipe(outtype, checkpoint)
    if checkpoint.kind == "gguf":
        if model_name or metadata or pre or not vocab or vocab_only:
            raise PlanError(
                "a GGUF input brings its metadata and vocabulary with it",
                where=checkpoint.path,
                fix="leave out --model-name, --metadata, --pre, --vocab-only and --no-vocab",
            )
        values, notes, stem = describe_gguf(checkpoint, recipe)
    else:
        if keep_split:
            raise PlanError("--keep-split is for GGUF inputs", fix="take --split-max-size for a directory")
        # A model without weights may also have no tokenizer.
        vocab = vocab and not (source.config_only and not has_tokenizer(checkpoint.path))
        values, notes, stem = describe_directory(
            source,
            recipe,
            model_name=model_name,
            overrides=Path(metadata) if metadata else None,
            pre=pre,
            vocab=vocab,
            vocab_only=vocab_only,
        )
    if isinstance(imatrix, str | Path):
        imatrix = read_imatrix(Path(imatrix), strict=imatrix_strict)
    rows = _rows(source, recipe, overrides or TypeOverrides(), imatrix, allow_requantize)
    files = sorted({row.source.file for row in rows})
    return lay_out_gguf(
        Plan(
            checkpoint,
            source.architecture.name,
            recipe.name,
            tuple(rows),
            "gguf",
            model=source,
            refine=recipe.refine,
            outfile=output_file(outfile, checkpoint.path, stem, recipe.name),
            metadata=values | (imatrix.metadata() if imatrix else {}) | tool_version_key(),
            skipped=source.skipped(),
            notes=(*checkpoint.notes, *notes, *differences),
        ),
        split_max_bytes,
        [files.index(row.source.file) for row in rows] if keep_split else None,
    )


def _recipe(name: str, checkpoint: Checkpoint) -> Recipe:
    """The recipe called ``name``; "auto" is f16 where most of the input's bytes are f16, and bf16 elsewhere."""
    if name.lower() != "auto":
        return recipe_named(name, "--outtype", auto=True)
    n_bytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        n_bytes[tensor.format.name] += tensor.n_bytes
    return recipe_named("f16" if n_bytes and n_bytes.most_common(1)[0][0] == "f16" else "bf16")


def _rows(
    source: Model,
    recipe: Recipe,
    overrides: TypeOverrides,
    imatrix: Imatrix | None,
    allow_requantize: bool,
) -> list[PlanRow]:
    """The tensors of the GGUF under ``recipe`` and the user's ``overrides``, not placed yet.

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
    for (tensor, rule), selection in zip(kept, selected, strict=True):
        name, codec, note = str(rule.gguf), selection.format, selection.note
        _check_requantization(tensor, codec, allow_requantize)
        importance = None
        if imatrix is not None and codec.dtype is None:
            importance = imatrix.importance(
                name, rule.role, rule.gguf_shape[-1], math.prod(rule.gguf_shape[:-2])
            )
            if importance is None:
                note = "; ".join(filter(None, [note, "the importance matrix has no entry for it"]))
        if importance is None and codec.name in recipe.needs_importance and rule.role not in MAY_BE_MISSING:
            raise PlanError(
                f"{recipe.name} stores tensors in {codec.name} only with an importance matrix",
                where=f"tensor {name}",
                fix="give one with --imatrix, or choose a larger type",
            )
        row = PlanRow(
            tensor,
            rule.role,
            codec,
            rule.gguf_shape,
            parts=(),
            transform=rule.transform if source.checkpoint.kind == "huggingface" else IDENTITY,
            note=note,
            importance=importance,
        )
        rows.append(gguf_part(row, name))
    if imatrix is not None:
        imatrix.check_used(row.name for row in rows)
    return rows


def _check_requantization(tensor: StoredTensor, codec: BlockCodec, allowed: bool) -> None:
    if packed_like(tensor) is not None and codec.dtype is not None:
        return  # GGUF has no type for such codes, and plain numbers hold their values
    if tensor.format.dtype is None and codec != tensor.format and not allowed:
        raise PlanError(
            "the input is quantized already, and quantizing it again loses more than quantizing the original",
            where=f"{tensor.file}, tensor {tensor.name}",
            found=tensor.format.name,
            expected="f32, f16 or bf16",
            fix="give the original, or accept the loss with --allow-requantize",
        )
