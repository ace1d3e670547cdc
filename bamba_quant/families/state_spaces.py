"""Mamba configurations as state-spaces' own code writes them: a few keys at the top, the rest in ``ssm_cfg``.

transformers' converted checkpoints keep these keys beside its own. What both say must agree. Source: mamba_ssm's
``config_mamba.py``, ``mixer_seq_simple.py``, ``mamba_simple.py`` and ``mamba2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bamba_quant.families import hf_keys
from bamba_quant.families import hf_schema as schema
from bamba_reference.config import Block, single_block_layers

# What attention layers would be like, of which there are none, how dt was drawn, and which kernels run.
INERT = frozenset({"attn_cfg", "fused_add_norm"}) | {
    f"ssm_cfg.{key}"
    for key in """
    dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path use_mem_eff_path A_init_range conv_init
    chunk_size sequence_parallel
    """.split()
}


def _ssm_cfg(value: Any) -> Mapping[str, Any]:
    schema.require(isinstance(value, Mapping))
    return dict(value)


def mixer_keys(layer: str, state_size: int, **others: schema.HfKey) -> dict[str, schema.HfKey]:
    """The keys of a model of mixers alone, in the order in which they are written, and then ``others``.

    ``layer`` is the name of the mixer in ``ssm_cfg``, ``state_size`` its default.
    """
    return {
        "vocab_size": schema.count(most=schema.MOST_TOKENS),
        "hidden_size": schema.count(other_key="d_model"),
        "num_hidden_layers": schema.count(
            most=schema.MOST_LAYERS, other_key="n_layer", write=lambda config: config.num_hidden_layers
        ),
        "mamba_d_state": schema.count(state_size, key="state_size", other_key="ssm_cfg.d_state"),
        "mamba_d_conv": schema.count(4, key="conv_kernel", other_key="ssm_cfg.d_conv"),
        "mamba_expand": schema.count(2, key="expand", other_key="ssm_cfg.expand"),
        "mamba_proj_bias": schema.flag(False, key="use_bias", other_key="ssm_cfg.bias"),
        "mamba_conv_bias": schema.flag(True, key="use_conv_bias", other_key="ssm_cfg.conv_bias"),
        "hidden_act": hf_keys.SILU,
        "rms_norm_eps": schema.positive(1e-5, key="layer_norm_epsilon"),
        "residual_in_fp32": schema.flag(True),
        "tie_word_embeddings": schema.flag(None, other_key="tie_embeddings"),
        **hf_keys.SPECIAL_TOKENS,
        **hf_keys.USE_CACHE,
        **others,
        "ssm_cfg": schema.HfKey(_ssm_cfg, "an object", {}),
        "pad_vocab_size_multiple": schema.count(8, most=2**16),
        "rms_norm": schema.only(True, expected="true (LayerNorm is not implemented)"),
        "d_intermediate": schema.only(0, expected="0 (no feed-forward network)"),
        "attn_layer_idx": schema.only([], expected="[] (no attention layers)"),
        "ssm_cfg.layer": schema.only(layer, expected=layer, null_is_default=False),
        "ssm_cfg.D_has_hdim": schema.only(False, expected="false", null_is_default=False),
        "ssm_cfg.rmsnorm": schema.only(True, expected="true", null_is_default=False),
        "ssm_cfg.norm_before_gate": schema.only(False, expected="false", null_is_default=False),
    }


def complete_mixers(
    values: Mapping[str, Any], hf: Mapping[str, Any], block: Block, tied: bool
) -> dict[str, Any]:
    """The fields that follow for a model of mixers alone; ``tied`` is transformers' default for the embedding.

    state-spaces' code rounds the vocabulary up and ties the embedding; transformers' takes the former as it is.
    """
    size, multiple, original = values["vocab_size"], values["pad_vocab_size_multiple"], is_original(hf)
    tie = values["tie_word_embeddings"]
    return {
        "vocab_size": -(-size // multiple) * multiple if original else size,
        "layers": single_block_layers((block,) * values["num_hidden_layers"]),
        "tie_word_embeddings": (tied or original) if tie is None else tie,
        "max_position_embeddings": hf_keys.NO_POSITIONS,
    }


def is_original(hf: Mapping[str, Any]) -> bool:
    """Whether a configuration is state-spaces' own, without transformers' names."""
    return "d_model" in hf and "hidden_size" not in hf
