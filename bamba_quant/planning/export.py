"""The way back: a GGUF file planned as a Hugging Face directory, by the inverse of the rules that made it.

Types follow from the file. A matrix stored plainly keeps its type. A quantized one becomes the file's 16-bit type:
that of its plain matrices, else bf16, or f16 where only that holds its vectors. GGUF stores vectors and convolutions
as f32 whatever they were, so one whose values all fit into the 16-bit type was that, and becomes it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import Keys

from bamba_quant.checkpoint import StoredTensor, read_tensor
from bamba_quant.checkpoint.gguf_file import split_stem
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.codecs.arrays import F32
from bamba_quant.errors import PlanError
from bamba_quant.families import TensorRule
from bamba_quant.families.transforms import rounded
from bamba_quant.metadata.model_card import render_model_card
from bamba_quant.planning.model import Model, open_model
from bamba_quant.planning.plan import PlanRow
from bamba_quant.planning.repair import needs_repair
from bamba_quant.recipes.selection import ALWAYS_F32
from bamba_quant.tokenizers.export import as_json, generation_config, tokenizer_files
from bamba_quant.writers.safetensors import layout, place, write_directory
from bamba_quant.writers.shards import index_file
from bamba_quant.writers.tasks import Progress

DTYPES = ("auto", "f32", "f16", "bf16")
MAX_SHARD_BYTES = 5 * 10**9
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Export:
    """A plan: the GGUF it reads, its tensors in place, the small files by name, and what was decided unasked."""

    source: Model
    dtype: str
    rows: tuple[PlanRow, ...]
    files: Mapping[str, bytes]
    notes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the directory."""
        shards = layout(self.rows)
        small = {**index_file(shards), **self.files}
        return {shard.name: shard.n_bytes for shard in shards} | {
            name: len(content) for name, content in small.items()
        }

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)


def plan_export(
    file: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    vocab: bool = True,
) -> Export:
    """Plan the directory that ``file``, a GGUF or any shard of one, becomes; reads headers and vectors only.

    ``dtype`` is "auto" (see above) or the type of every tensor. ``vocab`` says whether to write the tokenizer.
    Raises a ``BambaQuantError`` for a file whose rows are misplaced, whose architecture is not supported or whose
    vocabulary cannot be rebuilt.
    """
    if dtype not in DTYPES:
        raise PlanError("no such dtype to export to", found=dtype, expected=", ".join(DTYPES))
    source = open_model(file)
    checkpoint = source.checkpoint
    if checkpoint.kind != "gguf":
        raise PlanError(
            "export wants a GGUF file", where=checkpoint.path, found="a directory", expected="a .gguf file"
        )
    if not isinstance(needs_repair(checkpoint.key_values), str):
        raise PlanError(
            "the file's q and k rows are in the wrong order, as llama.cpp's converter leaves them",
            where=checkpoint.path,
            fix="put them right first: bamba-quant repair FILE",
        )
    main, chosen = _types(source, dtype)
    chosen = _one_type_a_tensor(source, chosen)
    rows = [_row(tensor, rule, codec) for (tensor, rule), codec in zip(source.pairs, chosen, strict=True)]
    files, notes = _small_files(source, main, vocab)
    return Export(source, main, place(rows, max_shard_bytes), files, (*_type_notes(rows, main), *notes))


def write_export(
    export: Export,
    directory: Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda n_bytes: None,
) -> tuple[Path, ...]:
    """Execute a plan: ``writers.safetensors.write_directory`` says what it guarantees."""
    return write_directory(
        export.rows, export.files, directory, threads=threads, overwrite=overwrite, progress=progress
    )


def _row(tensor: StoredTensor, rule: TensorRule, codec: BlockCodec) -> PlanRow:
    return PlanRow(
        tensor, rule.hf, rule.role, rule.transform.inverse(), codec, rule.shape, section=rule.section
    )


def _types(source: Model, dtype: str) -> tuple[str, list[BlockCodec]]:
    """The directory's dtype, and that of each tensor."""
    if dtype != "auto":
        return dtype, [codec_named(dtype, BlockCodec)] * len(source.pairs)
    vectors = {
        tensor.name: _values(tensor, rule)
        for tensor, rule in source.pairs
        if rule.role in ALWAYS_F32 and tensor.format.name == "f32"
    }
    main = _main_type(source.pairs, list(vectors.values()))
    chosen: list[BlockCodec] = []
    for tensor, _ in source.pairs:
        narrow = tensor.name in vectors and main != "f32" and fits(vectors[tensor.name], main)
        keep = tensor.format.dtype is not None and not narrow
        chosen.append(tensor.format if keep else codec_named(main, BlockCodec))
    return main, chosen


def _one_type_a_tensor(source: Model, chosen: Sequence[BlockCodec]) -> list[BlockCodec]:
    """The chosen types, but f32, which holds all others, for a tensor whose sections' types differ."""
    by_tensor: dict[str, set[str]] = {}
    for (_, rule), codec in zip(source.pairs, chosen, strict=True):
        by_tensor.setdefault(rule.hf, set()).add(codec.name)
    return [
        codec if len(by_tensor[rule.hf]) == 1 else codec_named("f32", BlockCodec)
        for (_, rule), codec in zip(source.pairs, chosen, strict=True)
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


def _small_files(source: Model, main: str, vocab: bool) -> tuple[dict[str, bytes], tuple[str, ...]]:
    path, values = source.checkpoint.path, source.checkpoint.key_values
    config = source.architecture.hf_config(source.config) | {"torch_dtype": _TORCH_NAMES[main]}
    files = {"config.json": as_json(path, config)}
    notes: tuple[str, ...] = ()
    if vocab:
        tokenizer, notes = tokenizer_files(path, values, source.config.max_position_embeddings)
        files |= tokenizer
    files |= generation_config(path, values)
    packed = sorted({t.format.name for t, _ in source.pairs if t.format.dtype is None})
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
