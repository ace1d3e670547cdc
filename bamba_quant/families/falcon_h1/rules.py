"""The tensors of Falcon-H1, and which multipliers are folded into each of them in GGUF.

Sources: transformers' modeling_falcon_h1.py; llama.cpp's src/models/falcon-h1.cpp, whose graph has no multipliers, and
conversion/falcon_h1.py; gguf-py's tensor_mapping.py.

GGUF keeps norms and convolutions in float32, so that folding into them rounds least. Sections x, B and C of in_proj are
folded into the convolution, which is linear before its bias. A tied head is the embedding with its multiplier, which
the last norm takes out again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bamba_quant.errors import ArchitectureError
from bamba_quant.families.rules import Rule
from bamba_quant.families.shared_rules import (
    ATTENTION,
    EMBEDDINGS,
    FEED_FORWARD_NORM,
    MAMBA2,
    MLP,
    in_proj_sections,
)
from bamba_quant.families.transforms import IDENTITY, Transform, scaled, scaled_sections
from bamba_reference.config import Config


def multipliers(config: Config) -> dict[str, float]:
    """Every multiplier by the name it has in our GGUF keys, as float32 has it."""
    gate, down = config.mlp_multipliers
    sections = zip(in_proj_sections(config), config.ssm_multipliers, strict=True)
    values = {
        "embedding": config.embedding_multiplier,
        "head": 1 / config.logits_scaling,
        "attention_in": config.attention_in_multiplier,
        "attention_out": config.attention_out_multiplier,
        "key": config.key_multiplier,
        "ssm_in": config.ssm_in_multiplier,
        "ssm_out": config.ssm_out_multiplier,
        **{f"ssm_{section}": value for section, value in sections},
        "ffn_gate": gate,
        "ffn_down": down,
    }
    return {name: float(np.float32(value)) for name, value in values.items()}


def _factor(config: Config, *names: str, per: str = "") -> float:
    """The product of these multipliers, divided by another one, if named. Raises ``ArchitectureError`` where float32
    does not hold it.
    """
    values = multipliers(config)
    factor = math.prod(values[name] for name in names) / (values[per] if per else 1.0)
    if not 2.0**-126 <= factor < 2.0**128:
        raise ArchitectureError(
            "float32 does not hold the product of the model's multipliers",
            found=f"{factor:g}, of {', '.join(names)}" + (f" divided by {per}" if per else ""),
            expected="2^-126 to 2^128",
            fix="correct the multipliers in config.json",
        )
    return factor


def _product(*names: str) -> Callable[[Config], Transform]:
    return lambda config: scaled(_factor(config, *names))


def _last_norm(config: Config) -> Transform:
    return scaled(_factor(config, "head", per="embedding")) if config.tie_word_embeddings else IDENTITY


def _in_proj(config: Config) -> Transform:
    here = {section: _factor(config, "ssm_in", f"ssm_{section}") for section in ("z", "dt")}
    sections = in_proj_sections(config).items()
    return scaled_sections("multipliers", [(rows, here.get(name, 1.0)) for name, rows in sections])


def _convolution(config: Config) -> Transform:
    sections = in_proj_sections(config)
    return scaled_sections(
        "multipliers",
        [(sections[name], _factor(config, "ssm_in", f"ssm_{name}")) for name in ("x", "B", "C")],
    )


# By the ends of the reference's names. What is not here is stored as it is: q and k, too, as llama.cpp rotates them as
# transformers does.
_TRANSFORMS: dict[str, Callable[[Config], Transform]] = {
    "embed_tokens.weight": _product("embedding"),
    "lm_head.weight": _product("head"),
    "final_layernorm.weight": _last_norm,
    "in_proj.weight": _in_proj,
    "conv1d.weight": _convolution,
    "A_log": next(rule.transform for rule in MAMBA2 if rule.name.endswith("A_log")),
    "out_proj.weight": _product("ssm_out"),
    "q_proj.weight": _product("attention_in"),
    "k_proj.weight": _product("attention_in", "key"),
    "v_proj.weight": _product("attention_in"),
    "o_proj.weight": _product("attention_out"),
    "gate_proj.weight": _product("ffn_gate"),
    "gate_proj.bias": _product("ffn_gate"),
    "down_proj.weight": _product("ffn_down"),
    "down_proj.bias": _product("ffn_down"),
}


def _folded(rule: Rule) -> Rule:
    found = (transform for end, transform in _TRANSFORMS.items() if rule.name.endswith(end))
    return replace(rule, transform=next(found, lambda config: IDENTITY))


# llama.cpp's name of one norm lacks ``.weight``.
_FEED_FORWARD_NORM = replace(FEED_FORWARD_NORM, gguf="blk.{i}.ffn_norm")
RULES = tuple(map(_folded, (*EMBEDDINGS, *MAMBA2, *ATTENTION, _FEED_FORWARD_NORM, *MLP)))
