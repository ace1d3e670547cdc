"""Plans a Hugging Face directory from a GGUF file, by the inverse of the rules that make GGUF files.

Types follow from the file. A matrix stored plainly keeps its type. A quantized one becomes the file's 16-bit type:
that of its plain matrices, else bf16, or f16 where only that holds its vectors. GGUF stores vectors and convolutions
as f32 whatever they were, so one whose values all fit into the 16-bit type was that, and becomes it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import Keys

from bamba_quant.checkpoint import StoredTensor, read_tensor
from bamba_quant.checkpoint.gguf_file import split_stem
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.codecs.arrays import F32
from bamba_quant.errors import PlanError, did_you_mean
from bamba_quant.families import TensorRule
from bamba_quant.families.transforms import rounded
from bamba_quant.metadata.model_card import render_model_card
from bamba_quant.planning import safetensors_layout
from bamba_quant.planning.model import Model, open_model
from bamba_quant.planning.plan import MAX_SHARD_BYTES, Plan, PlanRow
from bamba_quant.planning.row_order import check_row_order
from bamba_quant.recipes.base import ALWAYS_F32
from bamba_quant.tokenizers.export import as_json, generation_config, tokenizer_files

DTYPES = ("auto", "f32", "f16", "bf16")
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def plan_export(
    file: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    vocab: bool = True,
) -> Plan:
    """Plan the directory that ``file``, a GGUF or any shard of one, becomes; reads headers and vectors only.

    ``dtype`` is "auto" (see above) or the type of every tensor. ``vocab`` says whether to write the tokenizer.
    Raises a ``BambaQuantError`` for a file whose rows are misplaced, whose architecture is not supported or whose
    vocabulary cannot be rebuilt.
    """
    if dtype not in DTYPES:
        what = f"unknown dtype to export to{did_you_mean(dtype, DTYPES)}"
        raise PlanError(what, found=dtype, expected=", ".join(DTYPES))
    model = open_model(file)
    checkpoint = model.checkpoint
    if checkpoint.kind != "gguf":
        raise PlanError(
            "export reads a GGUF file", where=checkpoint.path, found="a directory", expected="a .gguf file"
        )
    check_row_order(checkpoint)
    main, chosen = _types(model, dtype)
    chosen = _one_type_a_tensor(model, chosen)
    rows = [
        row
        for (tensor, rule), codec in zip(model.pairs, chosen, strict=True)
        for row in _rows(tensor, rule, codec)
    ]
    # Sections of a tensor are rows of one part.
    parts = {row.name: row.parts[0] for row in rows}
    placed = {
        part.name: part
        for (part,) in safetensors_layout.place_parts([[p] for p in parts.values()], max_shard_bytes)
    }
    rows = sorted(
        (replace(row, parts=(placed[row.name],)) for row in rows),
        key=lambda row: (row.parts[0].shard, row.parts[0].offset),
    )
    shards = safetensors_layout.pack_shards(list(placed.values()), {"format": "pt"})
    files, notes = _small_files(model, main, vocab)
    return Plan(
        checkpoint,
        model.architecture.name,
        main,
        tuple(rows),
        "safetensors",
        model=model,
        shards=shards,
        files={**safetensors_layout.index_file(shards), **files},
        notes=(*_type_notes(rows, main), *notes),
    )


def _rows(tensor: StoredTensor, rule: TensorRule, codec: BlockCodec) -> Iterator[PlanRow]:
    """The tensor's row; for a stack of which a checkpoint has each matrix alone, one for each."""
    alone = "*" in rule.hf
    for number, (name, whole) in enumerate(rule.stored(rule.hf).items()):
        shape = whole if alone else rule.shape
        matrix_bytes = tensor.n_bytes // rule.shape[0]
        source = (
            replace(tensor, shape=shape, offset=tensor.offset + number * matrix_bytes) if alone else tensor
        )
        yield PlanRow(
            source,
            rule.role,
            codec,
            shape,
            (safetensors_layout.tensor_part(name, codec, whole),),
            transform=rule.transform.inverse(),
            section=None if alone else rule.section,
        )


def _types(model: Model, dtype: str) -> tuple[str, list[BlockCodec]]:
    """The directory's dtype, and that of each tensor."""
    if dtype != "auto":
        return dtype, [codec_named(dtype, BlockCodec)] * len(model.pairs)
    vectors = {
        tensor.name: _values(tensor, rule)
        for tensor, rule in model.pairs
        if rule.role in ALWAYS_F32 and tensor.format.name == "f32"
    }
    main = _main_type(model.pairs, list(vectors.values()))
    chosen: list[BlockCodec] = []
    for tensor, _ in model.pairs:
        narrow = tensor.name in vectors and main != "f32" and fits(vectors[tensor.name], main)
        keep = tensor.format.dtype is not None and not narrow
        chosen.append(tensor.format if keep else codec_named(main, BlockCodec))
    return main, chosen


def _one_type_a_tensor(model: Model, chosen: Sequence[BlockCodec]) -> list[BlockCodec]:
    """The chosen types, but f32, which holds all others, for a tensor whose sections' types differ."""
    by_tensor: dict[str, set[str]] = {}
    for (_, rule), codec in zip(model.pairs, chosen, strict=True):
        by_tensor.setdefault(rule.hf, set()).add(codec.name)
    return [
        codec if len(by_tensor[rule.hf]) == 1 else codec_named("f32", BlockCodec)
        for (_, rule), codec in zip(model.pairs, chosen, strict=True)
    ]


def _values(tensor: StoredTensor, rule: TensorRule) -> F32:
    """What a small tensor holds in the checkpoint, in any order, as one row."""
    stored: F32 = read_tensor(tensor).reshape(-1, rule.shape[-1] if len(rule.shape) > 1 else 1)
    return rule.transform.invert(stored, 0).reshape(1, -1)


def _main_type(pairs: Sequence[tuple[StoredTensor, TensorRule]], vectors: Sequence[F32]) -> str:
    n_bytes: Counter[str] = Counter()
    for tensor, rule in pairs:
        if rule.role not in ALWAYS_F32:
            n_bytes[tensor.format.name if tensor.format.dtype is not None else ""] += tensor.n_bytes
    for name, _ in n_bytes.most_common():
        if name in ("bf16", "f16"):
            return name
    if not n_bytes[""]:
        return "f32"
    everywhere = [name for name in ("bf16", "f16") if all(fits(values, name) for values in vectors)]
    return everywhere[0] if everywhere else "bf16"


def fits(values: F32, name: str) -> bool:
    """Whether a 16-bit type holds every value exactly."""
    return bool(np.array_equal(rounded(values, name), values))


def _type_notes(rows: Sequence[PlanRow], main: str) -> list[str]:
    counts = Counter(
        (row.source.format.name, row.format.name)
        for row in rows
        if row.source.format.dtype is None
        or (row.role not in ALWAYS_F32 and row.format.name != row.source.format.name)
    )
    notes = [f"{count} tensors were {old} and become {new}" for (old, new), count in counts.items()]
    kept = sum(row.role in ALWAYS_F32 and row.format.name == "f32" for row in rows)
    if kept and main != "f32":
        notes.append(f"{kept} vectors and convolutions stay f32: {main} does not hold their values")
    return notes


def _small_files(model: Model, main: str, vocab: bool) -> tuple[dict[str, bytes], tuple[str, ...]]:
    path, values = model.checkpoint.path, model.checkpoint.key_values
    config = model.architecture.to_hf_config(model.config) | {"torch_dtype": _TORCH_NAMES[main]}
    files = {"config.json": as_json(path, config)}
    notes: tuple[str, ...] = ()
    if vocab:
        tokenizer, notes = tokenizer_files(path, values, model.config.max_position_embeddings)
        files |= tokenizer
    files |= generation_config(path, values)
    packed = sorted({t.format.name for t, _ in model.pairs if t.format.dtype is None})
    stem = split_stem(path).name
    origin = f"Exported from `{path.name}` by bamba-quant" + (
        f"; its {', '.join(packed)} weights were dequantized, so what quantization lost stays lost."
        if packed
        else "."
    )
    files["README.md"] = render_model_card(values, title=stem, origin=origin)
    if Keys.General.NAME not in values:
        notes = (*notes, f"the file does not name its model; the model card says {stem}")
    return files, notes
