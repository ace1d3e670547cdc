"""What is quantized follows from roles, whole units at a time, and is said so that every runtime understands it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bamba_quant.codecs import Ignored
from bamba_quant.errors import PlanError
from bamba_quant.families import family_of, read_config
from bamba_quant.recipes.matrices import PRESETS, QUANTIZED, MatrixCandidate, ignored_modules, select_matrices
from bamba_reference.config import Config
from tests.support.models import SMALL
from tests.support.vllm import VIEWS, ignores, layers

HF: dict[str, Any] = SMALL | {
    "architectures": ["BambaForCausalLM"],
    "model_type": "bamba",
    "num_hidden_layers": 6,
    "attn_layer_indices": [1, 4],
}


def candidates(**overrides: Any) -> tuple[list[MatrixCandidate], Config, Any]:
    hf = HF | overrides
    config = read_config(hf)
    rules = family_of(hf).tensors(config)
    found = [MatrixCandidate(rule.hf, rule.shape, (rule,)) for rule in rules if not rule.skipped]
    return found, config, rules


def selected(*keep: str, **overrides: Any) -> tuple[set[str], Ignored]:
    found, config, rules = candidates(**overrides)
    loaders = family_of(HF | overrides).loaders
    chosen = select_matrices(found, config, keep, loaders.units)
    modules = {name.removesuffix(".weight") for name in chosen}
    return modules, ignored_modules(found, rules, chosen, loaders)


def test_linear_layers_of_the_layers_and_nothing_else() -> None:
    chosen, ignored = selected()
    leaves = {name.rsplit(".", 1)[-1] for name in chosen}
    expected = "in_proj out_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert leaves == set(expected.split())
    assert len(chosen) == 4 * 2 + 2 * 4 + 6 * 3
    assert ignored.modules == ("lm_head",)
    assert ignored.patterns == ()


def test_a_tied_output_is_ignored_too() -> None:
    assert selected(tie_word_embeddings=True)[1].modules == ("lm_head",)


def test_roles_stand_in_the_tables() -> None:
    found, _, _ = candidates()
    roles = {role for candidate in found for role in candidate.roles}
    assert {role for unit in family_of(HF).loaders.units for role in unit} <= roles
    assert {"ssm_in", "ssm_out"} <= roles & QUANTIZED


@pytest.mark.parametrize(
    "keep",
    [
        ["hybrid"],
        ["ssm_in"],
        ["attn_q", "attn_k", "attn_v"],
        ["*.layers.0.*"],
        ["model.layers.2.mamba.out_proj", "*.layers.5.feed_forward.*"],
        ["*.mamba.*", "*.self_attn.*"],
        ["ssm_out", "*.layers.[13].feed_forward.*_proj.weight"],
        ["out_proj", "self_attn"],
        ["blk.2", "layers.3"],
    ],
    ids=" ".join,
)
def test_kept_matrices_are_ignored_under_every_name(keep: list[str]) -> None:
    """By transformers' names, and by vLLM's in both of its ways to match."""
    chosen, ignored = selected(*keep)
    everything, _ = selected()
    kept = everything - chosen
    assert kept
    assert set(ignored.modules) == kept | {"lm_head"}
    assert ignored.unmatched == ("lm_head",)
    for module in everything:
        matched = [pattern for pattern in ignored.patterns if re.match(pattern, module)]
        assert bool(matched) == (module in kept), module
    configurations: list[dict[str, Any]] = [
        {
            "quant_method": "compressed-tensors",
            "ignore": [*ignored.unmatched, *(f"re:{pattern}" for pattern in ignored.patterns)],
        },
        {"quant_method": "fp8", "modules_to_not_convert": [*ignored.modules, *ignored.aliases]},
    ]
    for configuration in configurations:
        for prefix, modules in layers(HF).items():
            assert ignores(prefix, configuration, VIEWS["bamba"].packed) == (modules[0] in kept), prefix


def test_the_hybrid_preset() -> None:
    chosen, _ = selected("hybrid")
    everything, _ = selected()
    kept = {name.removeprefix("model.layers.") for name in everything - chosen}
    attention = {f"{i}.self_attn.{p}_proj" for i in (1, 4) for p in "qkvo"}
    assert kept == attention | {f"{i}.mamba.{p}_proj" for i in (0, 3) for p in ("in", "out")}
    assert set(PRESETS) == {"hybrid"}


@pytest.mark.parametrize(
    ("keep", "left", "others"),
    [
        ("ffn_down", "gate_proj", ["ffn_gate", "ffn_up"]),
        ("attn_k", "q_proj", ["attn_q", "attn_v"]),
        ("*.layers.2.feed_forward.gate_proj", "down_proj", ["*.layers.2.feed_forward.*"]),
    ],
)
def test_a_unit_is_not_split(keep: str, left: str, others: list[str]) -> None:
    with pytest.raises(PlanError, match="fuses would be ignored") as caught:
        selected(keep)
    assert left in str(caught.value.fix)
    selected(keep, *others)


@pytest.mark.parametrize(
    ("entry", "same"), [("out_proj", "ssm_out"), ("blk.*.ssm_in", "ssm_in"), ("layers.2", "*.layers.2.*")]
)
def test_names_of_hugging_face_and_gguf(entry: str, same: str) -> None:
    assert selected(entry)[0] == selected(same)[0] != selected()[0]


def test_what_matches_nothing_is_named() -> None:
    with pytest.raises(
        PlanError, match=r"did you mean attn_[qkv][\s\S]*--ignore attn_z[\s\S]*hybrid[\s\S]*ssm_in"
    ):
        selected("attn_z")
    with pytest.raises(PlanError, match=r"did you mean hybrid\?"):
        selected("hybird")
