"""Hybrid recipes: never a byte more than the recipe they are named after, and less lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bamba_quant.embedded import embedded_model
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.recipes import TypeOverrides, recipes
from bamba_reference.torch import forward as torch_forward
from tests.support import llama
from tests.support.conversion import english_chunks, to_gguf
from tests.support.published import PUBLISHED

HYBRID = [recipe.name for recipe in recipes() if recipe.candidates]
_BAMBA_9B = json.loads((Path(__file__).parents[1] / "support" / "bamba_9b.json").read_text())
MODELS: dict[str, dict[str, Any]] = {
    "bamba-9b": _BAMBA_9B,
    **{
        name: PUBLISHED[f"ibm-granite/{name}"].config | {"torch_dtype": "bfloat16"}
        for name in ("granite-4.0-h-micro", "granite-4.0-h-tiny")
    },
    "rows of 96 and 272": _BAMBA_9B | {
        "hidden_size": 96, "intermediate_size": 272, "mamba_d_head": 24, "mamba_n_heads": 8, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1], "vocab_size": 512,
        "attn_rotary_emb": 12,
    },
}  # fmt: skip


def size_of(model: Path, outtype: str, **options: Any) -> int:
    conversion = plan_conversion(model, outtype=outtype, allow_config_only=True, **options)
    return sum(conversion.paths(conversion.outfile).values())


@pytest.mark.parametrize("name", MODELS)
def test_never_a_byte_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    some = TypeOverrides(tensor_types=(("ssm_in", "q8_0"),), output_tensor_type="q4_k")
    for recipe, overrides in (*((recipe, TypeOverrides()) for recipe in HYBRID), ("q3_k_m_h", some)):
        hybrid = size_of(tmp_path, recipe, overrides=overrides)
        plain = size_of(tmp_path, recipe.removesuffix("_h"), overrides=overrides)
        assert 0.98 * plain < hybrid <= plain, recipe


def test_what_the_user_wishes_stays() -> None:
    overrides = TypeOverrides(tensor_types=(("ssm_out", "q2_k"),), token_embedding_type="q3_k")
    plan = plan_conversion(embedded_model(), outtype="q4_k_m_h", overrides=overrides)
    assert {row.format.name for row in plan.rows if row.role == "ssm_out"} == {"q2_k"}
    assert {row.format.name for row in plan.rows if row.role == "token_embd"} == {"q3_k"}


def test_less_is_lost_and_llama_cpp_runs_it(tmp_path: Path) -> None:
    """On a text that nothing was measured on; at Q4_K_M the gates of bamba-43m and bamba-mini are narrower."""
    chunks = english_chunks(embedded_model(), 256, 4)
    original = load_model(embedded_model())
    tokens = torch.tensor(chunks)

    def log_probabilities(path: Path) -> torch.Tensor:
        model = load_model(path)
        loaded = torch_forward.load(model.config, model.weights)
        return torch.log_softmax(torch_forward.forward(loaded, tokens).logits.double(), -1)

    expected = log_probabilities(original.checkpoint.path)
    lost = {}
    with torch.inference_mode():
        for name in ("q2_k", "q2_k_h", "q4_k_m", "q4_k_m_h"):
            file = to_gguf(embedded_model(), tmp_path / f"{name}.gguf", name)
            found = log_probabilities(file)
            lost[name] = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert lost["q2_k_h"] < 0.6 * lost["q2_k"]
    assert lost["q4_k_m_h"] < 0.8 * lost["q4_k_m"]
    ours = log_probabilities(tmp_path / "q4_k_m_h.gguf")[0]
    theirs = torch.log_softmax(
        torch.from_numpy(llama.logits(tmp_path / "q4_k_m_h.gguf", chunks[0])).double(), -1
    )
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 0.2 * lost["q4_k_m_h"]
