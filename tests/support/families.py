"""Every supported family as small random transformers models, in each spelling its checkpoints are found in.

transformers itself writes the files: the names and shapes on disk are its own.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from tests.support.models import SMALL, drawn

Spelling = Literal[4, 5, "state-spaces"]
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_ATTENTION_ONLY = {"layer_types": ["attention"] * 4}


@dataclass(frozen=True)
class Family:
    """``cases`` are keys of transformers' configuration laid over ``small``, each changing what is computed.

    ``divides`` are keys under which every side of every matrix that is quantized divides by 128. ``original`` gives
    state-spaces' own config.json, where there is such a thing, and ``original_cases`` are those that it can say.
    """

    name: str
    model: type[Any]
    config: type[Any]
    small: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    divides: dict[str, Any]
    original: Callable[[Any], dict[str, Any]] | None = None
    original_cases: tuple[str, ...] = ()

    def random(self, seed: int = 0, **overrides: Any) -> Any:
        """A float32 model in eval mode; the same arguments give the same weights."""
        return drawn(self.model(self.config(**{**self.small, **overrides})), seed)


def _mamba_original(config: Any) -> dict[str, Any]:
    return {
        "d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": config.vocab_size - 3,
        "ssm_cfg": {"d_state": config.state_size, "dt_rank": config.time_step_rank}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }  # fmt: skip


def _mamba2_original(config: Any) -> dict[str, Any]:
    ssm = {
        "layer": "Mamba2",
        "d_state": config.state_size,
        "headdim": config.head_dim,
        "ngroups": config.n_groups,
    }
    return _mamba_original(config) | {
        "ssm_cfg": ssm, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "pad_vocab_size_multiple": 16,
        "tie_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


_GRANITE: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key != "attn_layer_indices"},
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "intermediate_size": 96,
    "shared_intermediate_size": 96,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
    "position_embedding_type": "nope",
}
_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}
_MIXERS: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "conv_kernel": 4, **_TOKENS,
}  # fmt: skip
# in_proj has 2 · 256 + 2 · 56 + 16 = 640 rows.
_WIDE_HYBRID = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "mamba_n_heads": 16,
                "mamba_d_state": 56}  # fmt: skip
_WIDE_MIXERS = {"hidden_size": 128}
_MAMBA_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "rank 7, state 8": {"time_step_rank": 7, "state_size": 8},
    "vocabulary of 161": {"vocab_size": 161},
    "large epsilon": {"layer_norm_epsilon": 3e-2},
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "bamba",
            BambaForCausalLM,
            BambaConfig,
            SMALL,
            {
                "plain": {},
                "tied": {"tie_word_embeddings": True},
                "groups 2": {"mamba_n_groups": 2},
                "biases": {"attention_bias": True, "mlp_bias": True},
            },
            _WIDE_HYBRID,
        ),
        Family(
            "granitemoehybrid",
            GraniteMoeHybridForCausalLM,
            GraniteMoeHybridConfig,
            _GRANITE,
            {
                "plain": {},
                "tied": {"tie_word_embeddings": True},
                "groups 2": {"mamba_n_groups": 2},
                "rotary": {"position_embedding_type": "rope", "attention_bias": True},
                "vocabulary of 161": {"vocab_size": 161},
                "six experts": _EXPERTS,
                "one expert": {**_EXPERTS, "num_local_experts": 1, "num_experts_per_tok": 1},
                "eight experts, tied": {**_EXPERTS, "num_local_experts": 8, "tie_word_embeddings": True},
                "attention alone": {**_ATTENTION_ONLY, "position_embedding_type": "rope"},
                "attention alone, no rotary": _ATTENTION_ONLY,
                "attention alone, experts": {
                    **_ATTENTION_ONLY,
                    **_EXPERTS,
                    "position_embedding_type": "rope",
                },
            },
            {**_WIDE_HYBRID, "shared_intermediate_size": 128},
        ),
        Family(
            "mamba2",
            Mamba2ForCausalLM,
            Mamba2Config,
            {**_MIXERS, "num_heads": 8, "head_dim": 16, "n_groups": 1},
            {
                "plain": {},
                "tied": {"tie_word_embeddings": True},
                "groups 2": {"n_groups": 2},
                "expanded four times": {"expand": 4, "num_heads": 16},
                "vocabulary of 161": {"vocab_size": 161},
                "large epsilon": {"layer_norm_epsilon": 3e-2},
            },
            {**_WIDE_MIXERS, "num_heads": 16, "state_size": 56},
            _mamba2_original,
            ("plain", "tied", "groups 2"),
        ),
        Family(
            "mamba",
            MambaForCausalLM,
            MambaConfig,
            _MIXERS,
            _MAMBA_CASES,
            _WIDE_MIXERS,
            _mamba_original,
            ("plain", "rank 7, state 8"),
        ),
        Family("falcon_mamba", FalconMambaForCausalLM, FalconMambaConfig, _MIXERS, _MAMBA_CASES, _WIDE_MIXERS),
    )
}
CASES = [(family.name, case) for family in FAMILIES.values() for case in family.cases]
SPELLED: list[tuple[str, str, Spelling]] = [
    (name, case, spelling) for name, case in CASES for spelling in (4, 5)
]
SPELLED += [
    (family.name, case, "state-spaces") for family in FAMILIES.values() for case in family.original_cases
]


def random_case(name: str, case: str = "plain", seed: int = 0) -> Any:
    """The model of a family's case."""
    return FAMILIES[name].random(seed, **FAMILIES[name].cases[case])


def wide_case(name: str, case: str = "plain", seed: int = 0) -> Any:
    """The model of a family's case with matrices of whole blocks of 128."""
    family = FAMILIES[name]
    return family.random(seed, **{**family.divides, **family.cases[case]})


def save(
    model: Any,
    directory: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    spelling: Spelling = 4,
    shards: int = 1,
) -> Path:
    """The checkpoint directory that transformers writes, its config.json put into an older spelling if wanted."""
    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    size = sum(parameter.nbytes for parameter in stored.parameters())
    stored.save_pretrained(directory, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    config = json.loads((directory / "config.json").read_text())
    if spelling == 4:
        config = _of_version_4(config)
    elif spelling == "state-spaces":
        original = FAMILIES[config["model_type"]].original
        assert original is not None
        config = original(model.config)
        _as_state_spaces(stored, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def _of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    old = {key: value for key, value in config.items() if key != "transformers_version"}
    old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if rope is not None:
        old["rope_theta"], old["rope_scaling"] = rope["rope_theta"], None
    if "partial_rotary_factor" in (rope or {}):
        old["attn_rotary_emb"] = int(
            old["hidden_size"] // old["num_attention_heads"] * rope["partial_rotary_factor"]
        )
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    if "layer_types" in old:
        old["layer_types"] = [names.get(kind, kind) for kind in old["layer_types"]]
    if "time_step_limit" in old:
        old["time_step_limit"] = [0.0, math.inf]
    return old


def _as_state_spaces(model: Any, directory: Path) -> None:
    """Their own checkpoints are pickles, name the embedding otherwise and repeat it where it is tied."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    tensors = {name.replace("embeddings", "embedding"): value for name, value in model.state_dict().items()}
    torch.save(tensors, directory / "pytorch_model.bin")
