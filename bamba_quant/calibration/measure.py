"""From a path and texts to an importance matrix: what ``bamba-quant imatrix`` and ``--calibrate`` do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bamba_quant.calibration.collect import Round, collect
from bamba_quant.calibration.texts import Text, read_texts, token_chunks
from bamba_quant.checkpoint import ReadOptions
from bamba_quant.checkpoint.activation_sums import ActivationSums, merge_sums, sums_for_model
from bamba_quant.checkpoint.imatrix import Imatrix, imatrix_from_sums, read_sums
from bamba_quant.errors import CheckpointError, join_names
from bamba_quant.inference.loading import load_model_and_tokenizer

CTX = 512
_SHOWN = 8  # experts of a tensor


@dataclass(frozen=True)
class Measured:
    """``sums`` over ``tokens`` tokens of ``texts``, and over those of earlier files; ``notes`` say what is missing."""

    sums: ActivationSums
    texts: tuple[Text, ...]
    tokens: int
    notes: tuple[str, ...]


def measure_imatrix(
    model: str | Path,
    texts: Sequence[Path],
    *,
    chunks: int | None = None,
    ctx: int = CTX,
    output: bool = False,
    merge: Sequence[Path] = (),
    tokenizer: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    reading: ReadOptions = ReadOptions(),
    progress: Callable[[Round], None] = lambda now: None,
) -> Measured:
    """Measure the importance matrix of a model of any kind and format that can be run.

    ``texts`` are cut into chunks of ``ctx`` tokens, of which at most ``chunks`` are run; ``output`` measures the output
    matrix as well. The sums in the files ``merge`` are added. Raises a ``BambaQuantError`` for texts, models and files
    that cannot be read or do not belong together.
    """
    if not texts and not merge:
        raise CheckpointError("there is nothing to measure", fix="give a text with --text")
    loaded, encoder = load_model_and_tokenizer(Path(model), tokenizer, reading)
    rules = [loaded.weights.stored(name)[1] for name in loaded.weights]
    shapes = {
        rule.gguf: (math.prod(rule.shape[:-2]), rule.shape[-1])
        for rule in rules
        if rule.gguf and len(rule.shape) > 1
    }
    earlier = [sums_for_model(read_sums(file), shapes, ctx, file) for file in merge]
    notes, given, tokens = list(loaded.checkpoint.notes), read_texts(texts) if texts else (), 0
    if texts:
        cut = token_chunks(encoder, given, ctx, chunks)
        names = tuple(str(text.path) for text in given)
        earlier.append(
            collect(loaded, cut, names, output=output, device=device, dtype=dtype, progress=progress)
        )
        tokens = cut.size
    sums = merge_sums(earlier, ctx)
    if output and loaded.config.tie_word_embeddings:
        notes.append(
            "the output is tied to the embedding, which has no entry (llama.cpp's quantizer has none for it)"
        )
    notes += _without_data(sums)
    if without := [name for name, entry in sums.entries.items() if entry.sums is None]:
        notes.append(
            f"{len(without)} entries have no means (in_sum), since a merged file has none: {join_names(without, 3)}"
        )
    return Measured(sums, given, tokens, tuple(notes))


def calibrated(
    model: str | Path,
    texts: Sequence[Path],
    *,
    chunks: int | None = None,
    device: str = "cpu",
    strict: bool = False,
    reading: ReadOptions = ReadOptions(),
    progress: Callable[[Round], None] = lambda now: None,
) -> tuple[Imatrix, tuple[str, ...]]:
    """The importance matrix that ``measure_imatrix`` would write, for quantizing at once, and its notes."""
    measured = measure_imatrix(model, texts, chunks=chunks, device=device, reading=reading, progress=progress)
    return imatrix_from_sums(measured.sums, strict=strict), measured.notes


def _without_data(sums: ActivationSums) -> list[str]:
    notes = []
    for name, experts in sums.without_data.items():
        shown = join_names([str(expert) for expert in experts], _SHOWN)
        notes.append(
            f"{name}: no token reached {len(experts)} of {len(sums.entries[name].counts)} experts ({shown}); "
            "quantizers will weigh their columns alike. More text reaches more experts"
        )
    return notes
