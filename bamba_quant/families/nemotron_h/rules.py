"""The tensors of Nemotron-H, under NVIDIA's names, which transformers 5 writes too, and those it has in memory."""

from __future__ import annotations

from dataclasses import replace

from bamba_quant.families.rules import Rule, renamed
from bamba_quant.families.shared_rules import (
    ATTENTION,
    BLOCK,
    EMBEDDINGS,
    LAYER,
    MAMBA2,
    MIXER_NAMES,
    MLP,
    of_block,
)
from bamba_reference.config import Config

_DISK = {**MIXER_NAMES[0], ".self_attn.": ".mixer.", ".feed_forward.": ".mixer."}
_NAMES = (_DISK, {**_DISK, "backbone.": "model."})


def _alone(config: Config) -> tuple[int, ...]:
    return tuple(i for i in config.layers_of("mlp") if i not in config.layers_of("moe"))


def _beside_experts(rule: Rule) -> Rule:
    """A tensor of the network that all tokens use beside experts. llama.cpp adds no biases there."""
    gguf = None if rule.role == "bias" else str(rule.gguf).replace(".weight", "_shexp.weight")
    role = rule.role if rule.role == "bias" else f"{rule.role}_shexp"
    return replace(rule, gguf=gguf, role=role, layers=lambda config: config.layers_of("moe"))


def _up(config: Config) -> tuple[int, int, int]:
    return (
        config.num_local_experts,
        config.expert_intermediate_size,
        config.moe_latent_size or config.hidden_size,
    )


def _down(config: Config) -> tuple[int, int, int]:
    count, inner, outer = _up(config)
    return count, outer, inner


def _experts(name: str) -> tuple[str, ...]:
    """A tensor for each expert in checkpoints, one for all in memory."""
    path = f"layers.{{i}}.mixer.experts.*.{name}.weight"
    return (f"backbone.{path}", f"model.{path}", f"model.layers.{{i}}.mixer.experts.{name}")


_NETWORK = tuple(rule for rule in MLP if "gate_proj" not in rule.name)
_SHARED = renamed(
    tuple(map(_beside_experts, _NETWORK)),
    *({**names, ".feed_forward.": ".mixer.shared_experts."} for names in _NAMES),
)
_MIXTURE = {".moe.router.weight": ".mixer.gate.weight", ".moe.router.correction": ".mixer.gate.e_score_correction_bias",
            ".moe.latent_down": ".mixer.fc1_latent_proj", ".moe.latent_up": ".mixer.fc2_latent_proj"}  # fmt: skip

# fmt: off
_ROUTER = of_block(
    "moe",
    Rule(LAYER + "moe.router.weight", BLOCK + "ffn_gate_inp.weight", "ffn_gate_inp",
         lambda c: (c.num_local_experts, c.hidden_size)),
    Rule(LAYER + "moe.router.correction", BLOCK + "exp_probs_b.bias", "bias", lambda c: (c.num_local_experts,)),
    Rule(LAYER + "moe.latent_down.weight", BLOCK + "ffn_latent_down.weight", "ffn_latent_down",
         lambda c: (c.moe_latent_size, c.hidden_size), when=lambda c: c.moe_latent_size > 0),
    Rule(LAYER + "moe.latent_up.weight", BLOCK + "ffn_latent_up.weight", "ffn_latent_up",
         lambda c: (c.hidden_size, c.moe_latent_size), when=lambda c: c.moe_latent_size > 0),
)
_EXPERTS = of_block(
    "moe",
    Rule(LAYER + "moe.up_proj.weight", BLOCK + "ffn_up_exps.weight", "ffn_up_exps", _up, hf=_experts("up_proj")),
    Rule(LAYER + "moe.down_proj.weight", BLOCK + "ffn_down_exps.weight", "ffn_down_exps", _down,
         hf=_experts("down_proj")),
)
# fmt: on
RULES = (
    renamed((*EMBEDDINGS, *MAMBA2, *ATTENTION), *_NAMES)
    + tuple(replace(rule, layers=_alone) for rule in renamed(_NETWORK, *_NAMES))
    + renamed(_ROUTER, *({**_MIXTURE, **names} for names in _NAMES))
    + _EXPERTS
    + _SHARED
)
