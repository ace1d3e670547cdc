"""The point of the whole: a converted file computes in llama.cpp what the checkpoint computes in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bamba_quant.embedded import embedded_model
from tests.support import llama
from tests.support.conversion import english_chunks, perplexity, random_tokens, to_gguf, transformers_logits
from tests.support.models import random_bamba, save_checkpoint
from tests.support.shared import shared

HEAD_128 = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "mamba_d_head": 64}
RANDOM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "groups 2": ({"mamba_n_groups": 2}, {}),
    "head dim 128, 64 rotated": (HEAD_128, {}),
    "quarter rotated": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0,
                                             "partial_rotary_factor": 0.25}}, {}),
    "wholly rotated": ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                            "partial_rotary_factor": 1.0}}, {"spelling": 5}),
    "vocabulary of 161": ({"vocab_size": 161}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "three shards": ({}, {"shards": 3}),
    "transformers 5": ({}, {"spelling": 5}),
    "transformers 5 with layer types": ({}, {"spelling": "5+layer_types"}),
    "large epsilon": ({"rms_norm_eps": 3e-2}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "head size auto": ({"mamba_d_head": "auto"}, {}),
    "attention first and last": ({"attn_layer_indices": [0, 3]}, {}),
}  # fmt: skip


def assert_same_logits(file: Path, reference: np.ndarray, tokens: list[int]) -> None:
    difference = np.abs(llama.logits(file, tokens) - reference).max()
    assert difference <= 1e-3 * reference.std(), f"{difference / reference.std():.2e} standard deviations"


@pytest.mark.parametrize("case", RANDOM)
def test_random_checkpoints_f32(case: str, tmp_path: Path) -> None:
    overrides, saving = RANDOM[case]
    model = random_bamba(seed=len(case), **overrides)
    directory = save_checkpoint(model, tmp_path / "model", **saving)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    tokens = random_tokens(model.config.vocab_size)
    assert_same_logits(file, transformers_logits(model, tokens), tokens)


def test_pytorch_bin(tmp_path: Path) -> None:
    model = random_bamba(seed=3)
    directory = save_checkpoint(model, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    tokens = random_tokens(model.config.vocab_size)
    file = to_gguf(directory, tmp_path / "model.gguf", vocab=False)
    assert_same_logits(file, transformers_logits(model, tokens), tokens)


def trained_models() -> dict[str, Any]:
    return {"bamba-mini": embedded_model, "bamba-43m": lambda: shared("models/bamba-43m")}


@pytest.mark.parametrize("name", trained_models())
def test_trained_models(name: str, tmp_path: Path) -> None:
    directory = trained_models()[name]()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    chunks = english_chunks(directory, length=512, count=2)
    references = [transformers_logits(model, chunk) for chunk in chunks]
    f32 = to_gguf(directory, tmp_path / "f32.gguf")
    assert_same_logits(f32, references[0][:200], chunks[0][:200])
    original = perplexity(references, chunks)
    for outtype in ("f16", "bf16", "q8_0"):
        file = to_gguf(directory, tmp_path / f"{outtype}.gguf", outtype)
        change = perplexity(llama.chunk_logits(file, chunks), chunks) / original - 1
        assert abs(change) <= 0.005, f"{outtype}: perplexity changes by {100 * change:.2f} %"
