"""Weights from either kind of checkpoint are the model's own, and run here as llama.cpp runs the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import LlamaFileType

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.embedded import embedded_model
from bamba_quant.errors import ArchitectureError, CheckpointError, PlanError
from bamba_quant.families import read_config
from bamba_quant.inference.loading import load_model, read_text
from bamba_quant.inference.weights import Timings
from bamba_reference.runtime.perplexity import cut_chunks, perplexity, torch_scorer
from bamba_reference.torch.forward import forward, load
from tests.support import llama
from tests.support.conversion import english_chunks, random_tokens, to_gguf
from tests.support.models import hf_config, numpy_weights, random_bamba, save_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups 2": {"mamba_n_groups": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "vocabulary of 161": {"vocab_size": 161},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["huggingface", "gguf"])
def test_weights_come_back(case: str, kind: str, tmp_path: Path) -> None:
    model = random_bamba(**CASES[case])
    path = save_checkpoint(model, tmp_path / "m")
    if kind == "gguf":
        path = to_gguf(path, tmp_path / "m.gguf", vocab=False)
    loaded = load_model(path)
    expected = numpy_weights(model)
    assert loaded.weights.keys() == expected.keys()
    for name, array in expected.items():
        found = np.asarray(loaded.weights[name])
        assert found.shape == array.shape
        if name.endswith("A_log") and kind == "gguf":
            np.testing.assert_allclose(found, array, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(found, array)
    config = read_config(hf_config(model))
    for field, value in vars(loaded.config).items():
        if field not in (
            "bos_token_id",
            "eos_token_ids",
            "pad_token_id",
        ):  # GGUF keeps these with a vocabulary
            given = getattr(config, field)
            assert value == (given if field == "layers" else pytest.approx(given)), field


def test_special_tokens_come_back(tmp_path: Path) -> None:
    original = load_model(embedded_model()).config
    found = load_model(to_gguf(embedded_model(), tmp_path / "m.gguf")).config
    # GGUF keeps this one in float32.
    assert replace(found, rms_norm_eps=original.rms_norm_eps) == original


def test_same_file_same_logits_as_llama_cpp(tmp_path: Path) -> None:
    file = to_gguf(embedded_model(), tmp_path / "f32.gguf")
    loaded = load_model(file)
    tokens = random_tokens(loaded.config.vocab_size)
    expected = llama.logits(file, tokens)
    found = forward(load(loaded.config, loaded.weights), [tokens]).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-3 * expected.std()


def test_perplexity_is_llama_cpps(tmp_path: Path) -> None:
    """llama-perplexity's figure, computed from llama.cpp's own logits of the same f32 file."""
    file = to_gguf(embedded_model(), tmp_path / "f32.gguf")
    loaded = load_model(file)
    ctx, count = 128, 8
    tokens = [token for chunk in english_chunks(embedded_model(), ctx, count) for token in chunk]
    estimate = perplexity(
        torch_scorer(load(loaded.config, loaded.weights)), tokens, vocab_size=2048, ctx=ctx, bos=0
    )
    chunks = cut_chunks(tokens, vocab_size=2048, ctx=ctx, bos=0)
    losses = []
    for logits, chunk in zip(llama.chunk_logits(file, chunks.tolist()), chunks, strict=True):
        rows = logits[ctx // 2 : -1].astype(np.float64)
        log_p = (
            rows
            - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
            - rows.max(1, keepdims=True)
        )
        losses.append(-log_p[np.arange(len(rows)), chunk[ctx // 2 + 1 :]])
    assert estimate.perplexity == pytest.approx(np.exp(np.concatenate(losses).mean()), rel=1e-3)


@pytest.mark.parametrize("file_type", [LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_IQ4_XS])
def test_files_quantized_elsewhere_are_read(file_type: LlamaFileType, tmp_path: Path) -> None:
    llama.quantize(to_gguf(embedded_model(), tmp_path / "bf16.gguf", "bf16"), tmp_path / "q.gguf", file_type)
    original, quantized = load_model(embedded_model()), load_model(tmp_path / "q.gguf")
    for name in original.weights:
        a, b = (np.asarray(loaded.weights[name], dtype=np.float32) for loaded in (original, quantized))
        assert np.linalg.norm(a - b) <= 0.12 * np.linalg.norm(a), name


def test_files_that_are_no_bamba(tmp_path: Path) -> None:
    file = to_gguf(save_checkpoint(random_bamba(), tmp_path / "m"), tmp_path / "m.gguf", vocab=False)
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"granitehybrid", b"granitehybrix"))
    with pytest.raises(ArchitectureError, match="granitehybrix"):
        load_model(file)
    file.write_bytes(raw.replace(b"blk.0.ssm_in.weight", b"blk.0.ssm_xx.weight"))
    with pytest.raises(PlanError, match=r"missing blk\.0\.ssm_in\.weight; unknown blk\.0\.ssm_xx\.weight"):
        load_model(file)
    file.write_bytes(raw.replace(b"granitehybrid.ssm.state_size", b"granitehybrid.ssm.state_sizf"))
    with pytest.raises(ArchitectureError, match="state_size"):
        load_model(file)
    assert open_checkpoint(file).tensors


def test_what_is_compiled_meanwhile_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 17.0, 20.0, 21.0])
    monkeypatch.setattr("bamba_quant.inference.weights.time.perf_counter", lambda: next(clock))
    timings = Timings()
    with timings.spent("decoding"):
        timings.compiling += 5.0
    with timings.spent("reading"):
        pass
    assert (timings.reading, timings.decoding, timings.compiling) == (1.0, 2.0, 5.0)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_text_that_is_a_device_is_refused(device: str) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_text(Path(device))
