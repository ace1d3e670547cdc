"""Patterns of --tensor-type and --ignore: GGUF's and Hugging Face's names, as llama-quantize searches or as globs."""

from __future__ import annotations

import re

import pytest

from bamba_quant.errors import PlanError
from bamba_quant.families import TensorRule, family_of, read_config
from bamba_quant.recipes.base import ALWAYS_F32
from bamba_quant.recipes.patterns import glob_matches, tensors_matching
from tests.support.models import SMALL

BAMBA = SMALL | {"architectures": ["BambaForCausalLM"], "model_type": "bamba"}
BAMBA |= {"num_hidden_layers": 12, "attn_layer_indices": [2]}


def rules_of(**overrides: object) -> tuple[TensorRule, ...]:
    hf = BAMBA | overrides
    rules = family_of(hf).tensors(read_config(hf))
    return tuple(rule for rule in rules if rule.gguf is not None and rule.role not in ALWAYS_F32)


RULES = rules_of()


def by_role(*roles: str, layers: tuple[int, ...] | None = None) -> set[str]:
    return {str(rule.gguf) for rule in RULES if rule.role in roles and (not layers or rule.layer in layers)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("out_proj", by_role("ssm_out")),
        ("mamba.out_proj", by_role("ssm_out")),
        ("*.mamba.*_proj.weight", by_role("ssm_in", "ssm_out")),
        ("*ffn_d*", by_role("ffn_down")),
        ("layers.1.mamba", by_role("ssm_in", "ssm_out", layers=(1,))),
        ("layers.1*.feed_forward.up_proj", by_role("ffn_up", layers=(1, 10, 11))),
        ("layers.[03].feed_forward.up_proj", by_role("ffn_up", layers=(0, 3))),
        (r"layers\.(0|3)\.feed_forward\.up", by_role("ffn_up", layers=(0, 3))),
        ("model.layers.4.feed_forward.gate_proj.weight", by_role("ffn_gate", layers=(4,))),
        ("lm_head", by_role("output")),
        ("embed_tokens", by_role("token_embd")),
    ],
)
def test_names_of_hugging_face_and_globs(pattern: str, expected: set[str]) -> None:
    assert expected
    assert tensors_matching(pattern, RULES) == expected


@pytest.mark.parametrize(
    "pattern", ["ssm_out", "attn_.*weight", r"blk\.[0-3]\.ffn_down", "output", "blk.1.*up"]
)
def test_what_is_found_in_names_of_gguf_is_llama_quantizes(pattern: str) -> None:
    """Also where Hugging Face's names would match more."""
    found = {str(rule.gguf) for rule in RULES if re.search(pattern, str(rule.gguf))}
    assert found and tensors_matching(pattern, RULES) == found


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [
        ("outproj", "out_proj"),
        ("ssm_oout", "ssm_out"),
        ("feed_forward.upproj", "up_proj"),
        ("blk.99.ssm_out.weight", "blk.9.ssm_out.weight"),
        ("norm", ""),
        ("(", ""),
    ],
)
def test_what_matches_nothing_names_the_closest(pattern: str, closest: str) -> None:
    with pytest.raises(PlanError, match="matches no tensor that can be quantized") as caught:
        tensors_matching(pattern, RULES)
    assert closest in caught.value.what and f"--tensor-type {pattern}" in str(caught.value.found)
    assert ("not a regular expression" in str(caught.value.found)) == (pattern == "(")
    assert "out_proj" in str(caught.value.expected)


def test_globs_match_whole_parts() -> None:
    assert glob_matches("layers.1", ["model.layers.1.mamba.in_proj.weight"])
    assert not glob_matches("layers.1", ["model.layers.10.mamba.in_proj.weight"])
    assert not glob_matches("proj", ["model.layers.10.mamba.in_proj.weight"])
