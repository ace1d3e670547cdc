"""Rules that several families share, under the reference's names: embeddings, mixers, attention, feed-forward."""

from __future__ import annotations

from dataclasses import replace

from bamba_quant.families.rules import Rule
from bamba_quant.families.transforms import IDENTITY, NEGATIVE_EXP, Transform, interleave_rotary
from bamba_reference.config import Block, Config

LAYER = "model.layers.{i}."
BLOCK = "blk.{i}."

# Models of mixers alone, as transformers, state-spaces' own code and mistral's call their tensors.
_MIXERS = {
    "model.final_layernorm": "backbone.norm_f",
    "model.layers": "backbone.layers",
    "input_layernorm": "norm",
    ".mamba.": ".mixer.",
}
MIXER_NAMES = (
    {"model.embed_tokens": "backbone.embeddings", **_MIXERS},
    {"model.embed_tokens": "backbone.embedding", **_MIXERS},
    {
        "model.embed_tokens": "backbone.embedding",
        **_MIXERS,
        "backbone": "model.backbone",
        "lm_head": "model.lm_head",
    },
)


def of_block(block: Block, *rules: Rule) -> tuple[Rule, ...]:
    """``rules`` for the layers that have this block."""
    return tuple(replace(rule, layers=lambda config: config.layers_of(block)) for rule in rules)


def feed_forward_layers(config: Config) -> tuple[int, ...]:
    """The layers with a second step."""
    return tuple(i for i, layer in enumerate(config.layers) if layer.feed_forward)


def in_proj_sections(config: Config) -> dict[str, int]:
    """The rows of Mamba-2's in_proj, in their order."""
    inner, states = config.mamba_d_inner, config.mamba_n_groups * config.mamba_d_state
    return {"z": inner, "x": inner, "B": states, "C": states, "dt": config.mamba_n_heads}


def has_attention_bias(config: Config) -> bool:
    return config.attention_bias


def has_mlp_bias(config: Config) -> bool:
    return config.mlp_bias


def has_projection_bias(config: Config) -> bool:
    return config.mamba_proj_bias


def has_convolution_bias(config: Config) -> bool:
    return config.mamba_conv_bias


def hidden(config: Config) -> tuple[int]:
    return (config.hidden_size,)


def embedding(config: Config) -> tuple[int, int]:
    return (config.vocab_size, config.hidden_size)


def up(config: Config) -> tuple[int, int]:
    return (config.intermediate_size, config.hidden_size)


def down(config: Config) -> tuple[int, int]:
    return (config.hidden_size, config.intermediate_size)


def router(config: Config) -> tuple[int, int]:
    return (config.num_local_experts, config.hidden_size)


def expert_up(config: Config) -> tuple[int, int, int]:
    return (config.num_local_experts, config.expert_intermediate_size, config.hidden_size)


def expert_down(config: Config) -> tuple[int, int, int]:
    return (config.num_local_experts, config.hidden_size, config.expert_intermediate_size)


def inner(config: Config) -> tuple[int]:
    return (config.mamba_d_inner,)


def projected_in(config: Config) -> tuple[int, int]:
    return (config.mamba_in_proj_dim, config.hidden_size)


def projected_out(config: Config) -> tuple[int, int]:
    return (config.hidden_size, config.mamba_d_inner)


def convolution(config: Config) -> tuple[int, int, int]:
    return (config.mamba_conv_dim, 1, config.mamba_d_conv)


def convolution_in_gguf(config: Config) -> tuple[int, int]:
    return (config.mamba_conv_dim, config.mamba_d_conv)


def _heads(config: Config) -> tuple[int]:
    return (config.mamba_n_heads,)


def _heads_by_one(config: Config) -> tuple[int, int]:
    return (config.mamba_n_heads, 1)


def _query(config: Config) -> tuple[int, int]:
    return (config.num_attention_heads * config.head_dim, config.hidden_size)


def _key_value(config: Config) -> tuple[int, int]:
    return (config.num_key_value_heads * config.head_dim, config.hidden_size)


def _rotary(config: Config) -> Transform:
    return interleave_rotary(config.head_dim, config.rotary_dim) if config.rotary_dim else IDENTITY


def _selected(config: Config) -> tuple[int, int]:
    return (config.mamba_time_step_rank + 2 * config.mamba_d_state, config.mamba_d_inner)


def _states(config: Config) -> tuple[int, int]:
    return (config.mamba_d_inner, config.mamba_d_state)


def _decay(config: Config) -> Transform:
    # Its inverse finds out what type the values had, from all of them.
    return replace(NEGATIVE_EXP, unit=config.mamba_d_inner)


# fmt: off
EMBEDDINGS = (
    Rule("model.embed_tokens.weight", "token_embd.weight", "token_embd", embedding),
    Rule("lm_head.weight", "output.weight", "output", embedding, when=lambda c: not c.tie_word_embeddings),
    Rule("lm_head.weight", None, "output", embedding, when=lambda c: c.tie_word_embeddings,
         skipped="tied to the embedding", equal_to="model.embed_tokens.weight"),
    Rule("model.final_layernorm.weight", "output_norm.weight", "norm", hidden),
    Rule(LAYER + "input_layernorm.weight", BLOCK + "attn_norm.weight", "norm", hidden),
)

# GGUF cannot hold the biases of the projections: ``limitations.mixer`` rejects a model that has them.
MAMBA2 = of_block(
    "mamba2",
    Rule(LAYER + "mamba.in_proj.weight", BLOCK + "ssm_in.weight", "ssm_in", projected_in,
         row_sections=in_proj_sections),
    Rule(LAYER + "mamba.in_proj.bias", None, "bias", lambda c: projected_in(c)[:1], when=has_projection_bias),
    Rule(LAYER + "mamba.conv1d.weight", BLOCK + "ssm_conv1d.weight", "ssm_conv1d", convolution,
         gguf_shape=convolution_in_gguf),
    Rule(LAYER + "mamba.conv1d.bias", BLOCK + "ssm_conv1d.bias", "bias", lambda c: convolution(c)[:1],
         when=has_convolution_bias),
    Rule(LAYER + "mamba.dt_bias", BLOCK + "ssm_dt.bias", "ssm_dt", _heads),
    Rule(LAYER + "mamba.A_log", BLOCK + "ssm_a", "ssm_a", _heads, gguf_shape=_heads_by_one,
         transform=lambda c: NEGATIVE_EXP),
    Rule(LAYER + "mamba.D", BLOCK + "ssm_d", "ssm_d", _heads, gguf_shape=_heads_by_one),
    Rule(LAYER + "mamba.norm.weight", BLOCK + "ssm_norm.weight", "norm", inner,
         gguf_shape=lambda c: (c.mamba_n_groups, c.mamba_d_inner // c.mamba_n_groups),
         when=lambda c: c.mamba_rms_norm),
    Rule(LAYER + "mamba.out_proj.weight", BLOCK + "ssm_out.weight", "ssm_out", projected_out),
    Rule(LAYER + "mamba.out_proj.bias", None, "bias", hidden, when=lambda c: c.mamba_out_bias),
)

MAMBA1 = of_block(
    "mamba1",
    Rule(LAYER + "mamba.in_proj.weight", BLOCK + "ssm_in.weight", "ssm_in", projected_in,
         row_sections=lambda c: {"x": c.mamba_d_inner, "z": c.mamba_d_inner}),
    Rule(LAYER + "mamba.in_proj.bias", None, "bias", lambda c: projected_in(c)[:1], when=has_projection_bias),
    Rule(LAYER + "mamba.conv1d.weight", BLOCK + "ssm_conv1d.weight", "ssm_conv1d", convolution,
         gguf_shape=convolution_in_gguf),
    Rule(LAYER + "mamba.conv1d.bias", BLOCK + "ssm_conv1d.bias", "bias", inner, when=has_convolution_bias),
    Rule(LAYER + "mamba.x_proj.weight", BLOCK + "ssm_x.weight", "ssm_x", _selected,
         row_sections=lambda c: {"dt": c.mamba_time_step_rank, "B": c.mamba_d_state, "C": c.mamba_d_state}),
    Rule(LAYER + "mamba.dt_proj.weight", BLOCK + "ssm_dt.weight", "ssm_dt_proj",
         lambda c: (c.mamba_d_inner, c.mamba_time_step_rank)),
    Rule(LAYER + "mamba.dt_proj.bias", BLOCK + "ssm_dt.bias", "ssm_dt", inner),
    Rule(LAYER + "mamba.A_log", BLOCK + "ssm_a", "ssm_a", _states, transform=_decay),
    Rule(LAYER + "mamba.D", BLOCK + "ssm_d", "ssm_d", inner),
    Rule(LAYER + "mamba.out_proj.weight", BLOCK + "ssm_out.weight", "ssm_out", projected_out),
    Rule(LAYER + "mamba.out_proj.bias", None, "bias", hidden, when=has_projection_bias),
)

ATTENTION = of_block(
    "attention",
    Rule(LAYER + "self_attn.q_proj.weight", BLOCK + "attn_q.weight", "attn_q", _query, transform=_rotary),
    Rule(LAYER + "self_attn.k_proj.weight", BLOCK + "attn_k.weight", "attn_k", _key_value, transform=_rotary),
    Rule(LAYER + "self_attn.v_proj.weight", BLOCK + "attn_v.weight", "attn_v", _key_value),
    Rule(LAYER + "self_attn.o_proj.weight", BLOCK + "attn_output.weight", "attn_output",
         lambda c: (c.hidden_size, c.num_attention_heads * c.head_dim)),
    Rule(LAYER + "self_attn.q_proj.bias", BLOCK + "attn_q.bias", "bias", lambda c: _query(c)[:1], transform=_rotary,
         when=has_attention_bias),
    Rule(LAYER + "self_attn.k_proj.bias", BLOCK + "attn_k.bias", "bias", lambda c: _key_value(c)[:1],
         transform=_rotary, when=has_attention_bias),
    Rule(LAYER + "self_attn.v_proj.bias", BLOCK + "attn_v.bias", "bias", lambda c: _key_value(c)[:1],
         when=has_attention_bias),
    Rule(LAYER + "self_attn.o_proj.bias", BLOCK + "attn_output.bias", "bias", hidden, when=has_attention_bias),
    Rule(LAYER + "self_attn.rotary_emb.inv_freq", None, "rotary", lambda c: (c.rotary_dim // 2,),
         skipped="recomputed from rope_theta"),
)

FEED_FORWARD_NORM = Rule(LAYER + "pre_ff_layernorm.weight", BLOCK + "ffn_norm.weight", "norm", hidden,
                         layers=feed_forward_layers)
MLP = of_block(
    "mlp",
    Rule(LAYER + "feed_forward.gate_proj.weight", BLOCK + "ffn_gate.weight", "ffn_gate", up),
    Rule(LAYER + "feed_forward.up_proj.weight", BLOCK + "ffn_up.weight", "ffn_up", up),
    Rule(LAYER + "feed_forward.down_proj.weight", BLOCK + "ffn_down.weight", "ffn_down", down),
    Rule(LAYER + "feed_forward.gate_proj.bias", BLOCK + "ffn_gate.bias", "bias", lambda c: up(c)[:1],
         when=has_mlp_bias),
    Rule(LAYER + "feed_forward.up_proj.bias", BLOCK + "ffn_up.bias", "bias", lambda c: up(c)[:1], when=has_mlp_bias),
    Rule(LAYER + "feed_forward.down_proj.bias", BLOCK + "ffn_down.bias", "bias", hidden, when=has_mlp_bias),
)
# fmt: on
