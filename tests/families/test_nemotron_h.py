"""What Nemotron-H's checkpoints have that no other family's has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bamba_quant.checkpoint import open_checkpoint
from bamba_quant.checkpoint.gguf_values import GgufValue, KeyValues, float32, uint32
from bamba_quant.errors import ArchitectureError, CheckpointError, ConfigError
from bamba_quant.families import family_of, family_of_gguf, read_config
from bamba_quant.inference.loading import load_model
from bamba_quant.planning.convert import plan_conversion
from bamba_quant.planning.export import plan_export
from bamba_quant.writers import write_plan
from bamba_reference.config import Layer
from tests.support.conversion import to_gguf
from tests.support.families import random_case, save
from tests.support.published import PUBLISHED

NANO_3 = PUBLISHED["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"].config
DENSE = PUBLISHED["nvidia/Nemotron-H-8B-Base-8K"].config
WORDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER_WORDS = WORDS | {"M": "mamba", "*": "attention"}


def spelled(config: dict[str, Any], words: dict[str, str]) -> dict[str, Any]:
    """The configuration with a list of names instead of letters, as transformers 5 writes it."""
    listed = [words[letter] for letter in config["hybrid_override_pattern"]]
    return config | {"hybrid_override_pattern": None, "num_hidden_layers": None, "layers_block_type": listed}


@pytest.mark.parametrize("published", [NANO_3, DENSE])
def test_layers_by_letters_and_by_names(published: dict[str, Any]) -> None:
    config = read_config(published)
    assert read_config(spelled(published, WORDS)) == config
    assert read_config(spelled(published, OLDER_WORDS)) == config
    assert read_config(family_of(published).to_hf_config(config)) == config


def test_nano_3() -> None:
    config = read_config(NANO_3)
    assert config.layers[:6] == (
        *(Layer(("mamba2",)), Layer(("moe", "mlp"))) * 2, Layer(("mamba2",)), Layer(("attention",))
    )  # fmt: skip
    assert (config.expert_intermediate_size, config.intermediate_size) == (1856, 3712)
    assert (config.mamba_d_inner, config.rotary_dim, config.expert_scores) == (4096, 0, "sigmoid")
    # Twice the hidden size, which NVIDIA's class does not read.
    assert read_config(NANO_3 | {"expand": 7}) == config


@pytest.mark.parametrize(
    ("good", "bad", "named"),
    [
        (NANO_3, {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
        (NANO_3, {"hybrid_override_pattern": "ME*"}, "name every layer"),
        (NANO_3, {"hybrid_override_pattern": None}, "what its layers are"),
        (NANO_3, {"layers_block_type": ["mamba"] * 52}, "different layers"),
        (NANO_3, {"n_shared_experts": 2}, "n_shared_experts"),
        (NANO_3, {"n_routed_experts": 1 << 30}, "n_routed_experts"),
        (NANO_3, {"n_group": 3}, "n_group"),
        (NANO_3, {"n_group": 128, "topk_group": 128}, "n_group"),
        (NANO_3, {"n_group": 2, "topk_group": 3}, "topk_group"),
        (NANO_3, {"n_group": 64, "topk_group": 2}, "num_experts_per_tok"),
        (NANO_3, {"moe_latent_size": 1024, "mlp_bias": True}, "mlp_bias"),
        (
            NANO_3,
            {"hybrid_override_pattern": "-" + NANO_3["hybrid_override_pattern"][1:]},
            "moe_shared_expert_intermediate_size",
        ),
        (NANO_3, {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        (NANO_3, {"block_configs": []}, "block_configs"),
        (DENSE, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        (DENSE, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (DENSE, {"attention_bias": True}, "attention_bias"),
        (DENSE, {"mamba_proj_bias": True}, "mamba_proj_bias"),
        (DENSE, {"n_groups": 3}, "n_groups"),
        (DENSE, {"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_what_is_not_implemented_is_named(good: dict[str, Any], bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(good | bad)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_group_count", uint32(3)),
        ("expert_group_count", uint32(8)),
        ("expert_group_used_count", uint32(5)),
        ("expert_used_count", uint32(7)),
        ("expert_weights_scale", float32(-2.0)),
    ],
)
def test_groups_that_do_not_fit_in_a_gguf(key: str, value: GgufValue, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        to_gguf(
            save(random_case("nemotron_h", "groups of experts"), tmp_path / "m"),
            tmp_path / "m.gguf",
            vocab=False,
        )
    )
    values = dict(checkpoint.key_values)
    family = family_of_gguf(KeyValues(values))
    config = family.config_of_gguf(KeyValues(values), checkpoint.tensors)
    assert (config.num_local_experts, config.expert_groups, config.used_expert_groups) == (8, 4, 2)
    changed = KeyValues(values | {f"nemotron_h_moe.{key}": value}, checkpoint.path)
    with pytest.raises((ArchitectureError, CheckpointError), match=key):
        family.config_of_gguf(changed, checkpoint.tensors)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    directory = save(random_case("nemotron_h"), tmp_path / "m")
    plain = to_gguf(directory, tmp_path / "plain.gguf", vocab=False)
    file = directory / "model.safetensors"
    more = {"mtp.layers.0.eh_proj.weight": torch.zeros(64, 128), "mtp.layers.1.norm.weight": torch.zeros(64)}
    save_file(load_file(file) | more, file)
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    (directory / "config.json").write_text(json.dumps(config))
    plan = plan_conversion(directory, vocab=False)
    assert any("2 tensors that predict further tokens are left out: mtp." in note for note in plan.notes)
    assert to_gguf(directory, tmp_path / "m.gguf", vocab=False).read_bytes() == plain.read_bytes()


def test_a_correction_that_16_bits_do_not_hold_stays_whole(tmp_path: Path) -> None:
    """A router that is rounded chooses other experts; NVIDIA's checkpoints have its correction in float32."""
    directory = save(random_case("nemotron_h", "groups of experts"), tmp_path / "m", dtype="bfloat16")
    name = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    correction = torch.linspace(0.1, 0.3, 8)
    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: correction}, file)
    gguf = to_gguf(directory, tmp_path / "m.gguf", "bf16", vocab=False)
    held = load_model(gguf).weights["model.layers.1.moe.router.correction"]
    np.testing.assert_array_equal(held, correction.numpy())
    write_plan(plan_export(gguf, vocab=False), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back[name], correction) and back[name].dtype == torch.float32
    assert back["backbone.layers.1.mixer.experts.7.up_proj.weight"].dtype == torch.bfloat16


def test_what_is_written_makes_transformers_keep_small_time_steps() -> None:
    """It takes the lower limit of dt from time_step_min, which published configurations set to 0.001."""
    config = read_config(DENSE)
    assert config.time_step_limit[0] == 0
    family = family_of(DENSE)
    assert family.to_hf_config(config)["time_step_min"] == 1e-30
    limited = dataclasses.replace(config, time_step_limit=(0.01, 0.1))
    written = family.to_hf_config(limited)
    assert (written["time_step_min"], written["time_step_limit"]) == (0.01, [0.01, 0.1])
