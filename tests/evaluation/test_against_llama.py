"""The table of GGUF files is llama-perplexity's: its definitions on llama.cpp's own logits, the same files and text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.embedded import embedded_model
from bamba_quant.evaluation import figures
from bamba_quant.evaluation.activations import q8_0, q8_k
from bamba_quant.evaluation.evaluate import evaluate
from bamba_quant.evaluation.logits_file import writing
from bamba_quant.evaluation.run import EvaluationOptions
from bamba_quant.evaluation.scores import base_block, collect, score
from bamba_quant.inference.loading import load_model_and_tokenizer
from bamba_reference.runtime.perplexity import cut_chunks
from tests.support import ggml, llama
from tests.support.conversion import to_gguf

# Fewer chunks do not do: where activations are rounded to 8 bits, a last digit decides which way, and perplexities of
# kernels that differ by 1e-7 scatter by 0.1 % over 24 chunks, 0.04 % over 60.
CTX, CHUNKS = 512, 60
OPTIONS = EvaluationOptions(ctx=CTX, chunks=CHUNKS, noise_floor="none", drift_chunks=0, resamples=1000)
# Where activations are not rounded.
FEW = 8
FEW_OPTIONS = dataclasses.replace(OPTIONS, chunks=FEW)
# One of each way to round activations: Q8_0, and Q8_K.
CANDIDATES = ("q8_0", "q4_k_m")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "help.txt"
    file.write_text("\n".join(topics[name] for name in sorted(topics))[: 16 * CTX * CHUNKS], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("files")
    names = ("f32", "bf16", *CANDIDATES)
    return {name: to_gguf(embedded_model(), directory / f"{name}.gguf", name) for name in names}


@pytest.fixture(scope="module")
def tokens(text: Path) -> tuple[np.ndarray, np.ndarray]:
    """The text's own chunks, and the same with BOS in front."""
    loaded, encoder = load_model_and_tokenizer(embedded_model())
    ids = encoder.encode(text.read_text())
    cut = cut_chunks(ids, vocab_size=loaded.config.vocab_size, ctx=CTX, bos=encoder.bos, chunks=CHUNKS)
    return np.array(ids[: cut.size]).reshape(cut.shape), cut


@pytest.fixture(scope="module")
def logits(files: dict[str, Path], tokens: tuple[np.ndarray, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """llama.cpp's logits of the scored tokens of each chunk."""
    return {
        name: [
            rows[CTX // 2 : -1]
            for rows in llama.chunk_logits(file, tokens[1][: FEW if name == "f32" else None].tolist())
        ]
        for name, file in files.items()
    }


def theirs(
    logits: dict[str, list[np.ndarray]],
    tokens: tuple[np.ndarray, np.ndarray],
    base: str,
    name: str,
    chunks: int = CHUNKS,
) -> dict[str, float]:
    """The figures from llama.cpp's logits; that ``scores`` computes llama-perplexity's is tested on its own."""
    blocks = [
        score(base_block(torch.from_numpy(b), cut[CTX // 2 + 1 :]), torch.from_numpy(c))
        for b, c, cut in zip(logits[base][:chunks], logits[name][:chunks], tokens[1][:chunks], strict=True)
    ]
    return figures.values(collect(blocks, chunks))


@pytest.fixture(scope="module")
def ours(files: dict[str, Path], text: Path) -> dict[str, dict[str, float]]:
    """The figures of all candidates, of one call."""
    candidates = evaluate(files["bf16"], [files[name] for name in CANDIDATES], text, OPTIONS).candidates
    return {
        name: {key: figure.value for key, figure in candidate.figures.items()}
        for name, candidate in zip(CANDIDATES, candidates, strict=True)
    }


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_same_table(
    name: str,
    ours: dict[str, dict[str, float]],
    logits: dict[str, list[np.ndarray]],
    tokens: tuple[np.ndarray, np.ndarray],
) -> None:
    found, expected = ours[name], theirs(logits, tokens, "bf16", name)
    for key in ("ppl", "ppl_base", "ppl_ratio"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3), key
    assert found["kld_mean"] == pytest.approx(expected["kld_mean"], rel=0.02, abs=1e-5)
    assert found["kld_90"] == pytest.approx(expected["kld_90"], rel=0.05)
    # Of 15,300 tokens some are near ties, which a last digit decides either way.
    assert found["same_top"] == pytest.approx(expected["same_top"], abs=3e-3)
    assert found["delta_p_rms"] == pytest.approx(expected["delta_p_rms"], rel=0.05)


def test_in_float32_there_is_no_difference_at_all(
    files: dict[str, Path],
    text: Path,
    logits: dict[str, list[np.ndarray]],
    tokens: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    """llama.cpp's logits of an f32 file, as a base of ours."""
    saved = tmp_path / "llama.kld"
    with writing(saved, tokens[0][:FEW], logits["f32"][0].shape[1]) as write:
        for rows in logits["f32"]:
            write(rows)
    candidate = evaluate(saved, [files["f32"]], text, FEW_OPTIONS).candidates[0]
    expected = theirs(logits, tokens, "f32", "f32", FEW)
    assert candidate.figures["ppl"].value == pytest.approx(expected["ppl"], rel=1e-5)
    # What is left is the file's own 16 bits.
    assert abs(candidate.figures["kld_mean"].value) < 2e-5
    assert candidate.figures["same_top"].value > 0.998


def test_the_weights_alone_lose_less(
    files: dict[str, Path],
    text: Path,
    logits: dict[str, list[np.ndarray]],
    tokens: tuple[np.ndarray, np.ndarray],
) -> None:
    exact = evaluate(
        files["bf16"], [files["q8_0"]], text, dataclasses.replace(FEW_OPTIONS, activations="none")
    ).candidates[0]
    rounded = theirs(logits, tokens, "bf16", "q8_0", FEW)
    assert 0 < exact.figures["kld_mean"].value < 0.7 * rounded["kld_mean"]


def test_activations_are_rounded_as_ggml_rounds() -> None:
    """Q8_0 in ggml's own bytes, away from ties, of which it rounds some differently when it quantizes a file."""
    x = np.random.default_rng(0).standard_normal((50, 512)).astype(np.float32)
    form = codec_named("q8_0", BlockCodec)
    expected = form.dequantize(ggml.quantize(form, x))
    np.testing.assert_allclose(q8_0(torch.from_numpy(x)).numpy(), expected, rtol=1e-6)
    rounded = q8_k(torch.from_numpy(x)).numpy()
    step = np.abs(x.reshape(50, 2, 256)).max(-1, keepdims=True) / 127
    error = (rounded - x).reshape(50, 2, 256)
    assert (np.abs(error) <= 0.5001 * step).all() and (np.abs(error) > 0.45 * step).any()
    zero = torch.zeros(1, 256)
    assert torch.equal(q8_0(zero), zero) and torch.equal(q8_k(zero), zero)
