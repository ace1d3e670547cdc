"""Converting a model in a test, and the oracle's logits to compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from bamba_quant.checkpoint import RawReader, open_checkpoint
from bamba_quant.families.transforms import interleave_rotary
from bamba_quant.metadata.general import TOOL_VERSION_KEY
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.gguf_layout import with_key_values
from bamba_quant.planning.plan import PlanRow
from bamba_quant.writers import write_plan


def to_gguf(model: Path, target: Path, outtype: str = "f32", **options: Any) -> Path:
    """Convert the checkpoint directory ``model`` to the single file ``target``."""
    conversion = plan_conversion(model, outtype=outtype, outfile=target, **options)
    (file,) = write_plan(conversion, conversion.outfile)
    return file


def faulty(model: Path, target: Path, outtype: str = "f32", **options: Any) -> Path:
    """What llama.cpp's converter writes for ``model``: whole heads interleaved, no key of this tool."""
    planned = plan_conversion(model, outtype=outtype, outfile=target, vocab=False, **options)

    def misplaced(row: PlanRow) -> PlanRow:
        if row.transform.unit == 1:
            return row
        return replace(row, transform=interleave_rotary(row.transform.unit, row.transform.unit))

    metadata = {key: value for key, value in planned.metadata.items() if key != TOOL_VERSION_KEY}
    plan = with_key_values(replace(planned, rows=tuple(map(misplaced, planned.rows))), metadata)
    return write_plan(plan, planned.outfile)[0]


def transformers_logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits of a transformers model at every position, float32 of shape (len(tokens), vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def random_tokens(vocab_size: int, count: int = 200, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, count).tolist()


def english_chunks(model: Path, length: int, count: int) -> list[list[int]]:
    """Token ids of Python's own help texts, which every machine has, cut into chunks."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text[: 16 * length * count]).ids
    assert len(ids) >= length * count
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def perplexity(logits: list[np.ndarray], chunks: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of each next token, over all chunks."""
    losses = []
    for scores, tokens in zip(logits, chunks, strict=True):
        rows = scores[:-1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        log_p = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        losses.append(-log_p[np.arange(len(rows)), tokens[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Two GGUF files hold the same tensors: names, types, shapes but for axes of one, and bytes."""
    ours, theirs = open_checkpoint(found).tensors, open_checkpoint(expected).tensors
    assert ours.keys() == theirs.keys()
    with RawReader() as reader:
        for name, tensor in theirs.items():
            mine = ours[name]
            assert mine.format.name == tensor.format.name, (
                f"{name}: {mine.format.name}, not {tensor.format.name}"
            )
            assert [n for n in mine.shape if n > 1] == [n for n in tensor.shape if n > 1], name
            pair = np.empty((2, tensor.n_bytes), dtype=np.uint8)
            reader.read_into(ours[name].file, ours[name].offset, pair[0])
            reader.read_into(tensor.file, tensor.offset, pair[1])
            np.testing.assert_array_equal(pair[0], pair[1], err_msg=name)
