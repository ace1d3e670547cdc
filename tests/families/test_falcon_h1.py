"""Falcon-H1's multipliers where they are not powers of two, and what llama.cpp's own converter makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bamba_quant.errors import ArchitectureError, ConfigError
from bamba_quant.families import read_config
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.writers import write_plan
from bamba_reference.model import forward
from tests.support import llama
from tests.support.conversion import random_tokens, to_gguf, transformers_logits
from tests.support.families import FAMILIES, save

FALCON = FAMILIES["falcon_h1"]
PUBLISHED = FALCON.small.reference_cases["falcon h1"]


@pytest.mark.parametrize("tied", [False, True])
def test_any_multipliers_are_folded(tied: bool, tmp_path: Path) -> None:
    model = FALCON.random(**PUBLISHED, tie_word_embeddings=tied)
    directory = save(model, tmp_path / "m")
    file = to_gguf(directory, tmp_path / "m.gguf", vocab=False)
    tokens = random_tokens(160, 60)
    expected = transformers_logits(model, tokens)
    assert np.abs(llama.logits(file, tokens) - expected).max() <= 1e-3 * expected.std()
    loaded = load_model(file)
    found = forward(loaded.config, loaded.weights, tokens, dtype=np.float32).logits
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("multiplier", [1e-30, 1e30])
def test_products_that_float32_does_not_hold(multiplier: float, tmp_path: Path) -> None:
    model = FALCON.random(attention_in_multiplier=multiplier, key_multiplier=multiplier)
    with pytest.raises(ArchitectureError, match="product of the model's multipliers"):
        plan_conversion(save(model, tmp_path / "m"), vocab=False)


@pytest.mark.parametrize(
    ("dtype", "back", "outtype"),
    [("bfloat16", "bf16", "f32"), ("float16", "f16", "f32"), ("bfloat16", "bf16", "bf16")],
)
def test_export_takes_them_out(
    dtype: Literal["bfloat16", "float16"], back: str, outtype: str, tmp_path: Path
) -> None:
    """Exactly of float32; of bfloat16 most weights, and the others to the neighbouring number."""
    directory = save(FALCON.random(**PUBLISHED), tmp_path / "m", dtype=dtype)
    plan = plan_conversion(directory, outtype=outtype, outfile=tmp_path / "m.gguf", vocab=False)
    assert any("not powers of two" in note for note in plan.notes)
    write_plan(plan, tmp_path / "m.gguf")
    write_plan(plan_export(tmp_path / "m.gguf", dtype=back, vocab=False), tmp_path / "back")
    before = load_file(directory / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if outtype == "f32":
            assert torch.equal(after[key], tensor), key
            continue
        apart = (after[key].view(torch.int16).int() - tensor.view(torch.int16).int()).abs()
        assert apart.max() <= 1, key
        assert (apart > 0).float().mean() < 0.5, key


def test_llama_cpps_converter_forgets_that_a_head_is_tied(tmp_path: Path) -> None:
    """conversion/falcon_h1.py multiplies token_embd alone, of which llama.cpp makes the head, too.

    Its file is what this package writes where the last norm is scaled against that. With the multipliers of
    tiiuae/Falcon-H1-Tiny-90M-Instruct logits are 1.42 times too large.
    """
    tiny = {"embedding_multiplier": 0.11083984375, "lm_head_multiplier": 0.078125}
    model = FALCON.random(**tiny, tie_word_embeddings=True)
    tokens = random_tokens(160, 60)
    expected = transformers_logits(model, tokens)
    with torch.no_grad():
        model.model.final_layernorm.weight *= tiny["embedding_multiplier"] / tiny["lm_head_multiplier"]
    found = llama.logits(to_gguf(save(model, tmp_path / "m"), tmp_path / "m.gguf", vocab=False), tokens)
    np.testing.assert_allclose(found, 1.41875 * expected, rtol=0, atol=1e-3 * expected.std())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention_bias": True}, "attention_bias"),
    ({"projectors_bias": True}, "projectors_bias"),
    ({"mamba_proj_bias": True}, "mamba_proj_bias"),
    ({"mamba_conv_bias": False}, "mamba_conv_bias"),
]


@pytest.mark.parametrize(("overrides", "key"), REFUSED)
def test_what_llama_cpp_has_no_place_for(overrides: dict[str, Any], key: str, tmp_path: Path) -> None:
    FALCON.config(**overrides, architectures=["FalconH1ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=f"cannot represent this model's {key}"):
        plan_conversion(tmp_path, vocab=False, allow_config_only=True)


def test_configurations() -> None:
    base = {"architectures": ["FalconH1ForCausalLM"], "num_hidden_layers": 2}
    width = {"mamba_n_heads": 8, "hidden_size": 64, "num_attention_heads": 4}
    # transformers' default width of the mixer, and the one that null implies.
    assert read_config({**base, **width, "num_key_value_heads": 2}).mamba_d_inner == 1024
    assert read_config({**base, **width, "num_key_value_heads": 2, "mamba_d_ssm": None}).mamba_d_inner == 128
    # transformers' default is 8, and null means as many as heads.
    assert read_config({**base, **width, "num_attention_heads": 16}).num_key_value_heads == 8
    assert read_config({**base, **width, "num_key_value_heads": None}).num_key_value_heads == 4
    for wrong, key in (
        ({"mamba_rms_norm": True}, "mamba_norm_before_gate"),
        ({"mlp_multipliers": [1.0]}, "mlp_multipliers"),
        ({"ssm_multipliers": [1, 1, 0, 1, 1]}, "ssm_multipliers"),
        ({"lm_head_multiplier": 0}, "lm_head_multiplier"),
        ({"mamba_use_mlp": False}, "mamba_use_mlp"),
        ({"mamba_d_ssm": 100}, "mamba_d_ssm"),
    ):
        with pytest.raises(ConfigError, match=key):
            read_config({**base, **width, "num_key_value_heads": 2, **wrong})
