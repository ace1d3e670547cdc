"""A model's configuration as one frozen record for all families, which the forward pass and every converter read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

# Mamba-2's state-space block, Mamba's selective scan, causal attention, a feed-forward network, a mixture of experts.
Block = Literal["mamba2", "mamba1", "attention", "mlp", "moe"]


class Layer(NamedTuple):
    """The blocks of one layer, in one or two residual steps: x = x + the sum of block(norm(x)) over its blocks.

    The blocks of a step read the same normed input in parallel. ``feed_forward`` is the second step, with a norm
    of its own; empty where a layer has one step only. Bamba has ``(("mamba2",), ("mlp",))`` and
    ``(("attention",), ("mlp",))``, Granite with experts ``(("mamba2",), ("moe", "mlp"))``, Mamba
    ``(("mamba1",), ())``; Falcon-H1's layers are ``(("mamba2", "attention"), ("mlp",))`` and Nemotron-H's
    ``(("mamba2",), ())``, ``(("attention",), ())``, ``(("mlp",), ())`` or ``(("moe", "mlp"), ())``.
    """

    blocks: tuple[Block, ...]
    feed_forward: tuple[Block, ...] = ()


def has_attention(layer_type: str) -> bool:
    """Whether a layer has attention, alone or beside other blocks; ``layer_type`` is one of ``Config.layer_types``."""
    return "attention" in layer_type.split("+")


def single_block_layers(blocks: Iterable[Block], feed_forward: tuple[Block, ...] = ()) -> tuple[Layer, ...]:
    """One layer for each of ``blocks``, with the same second step in all."""
    return tuple(Layer((block,), feed_forward) for block in blocks)


@dataclass(frozen=True)
class Config:
    """One model, in Bamba's names where transformers has several.

    ``layers`` lists the blocks of each layer (see ``Layer``); all blocks of one kind have the same sizes. Sizes are
    counts of elements, 0 where a model has no such block: Mamba and Mamba-2 have no attention heads, Mamba's scan
    has no heads or groups.

    ``rotary_dim`` of the ``head_dim`` elements of each query and key head are rotated, the rest unchanged.
    ``time_step_limit`` bounds dt after softplus. ``max_position_embeddings`` is 2^20 for a family whose
    configurations have no such key. Token ids may be None.

    Embeddings are multiplied by ``embedding_multiplier``, the sum of each residual step by ``residual_multiplier``,
    attention scores by ``attention_multiplier``, where None means head_dim^-1/2; logits are divided by
    ``logits_scaling``. Falcon-H1 multiplies more: the input and the output of attention by ``attention_in_multiplier``
    and ``attention_out_multiplier``, keys by ``key_multiplier``, the input and the output of Mamba-2 by
    ``ssm_in_multiplier`` and ``ssm_out_multiplier``, the sections z, x, B, C and dt of in_proj's output by
    ``ssm_multipliers``, and ``mlp``'s gate and output by ``mlp_multipliers``.

    ``intermediate_size`` is the width of ``mlp``; ``moe`` uses ``num_experts_per_tok`` of ``num_local_experts``
    experts, each ``expert_intermediate_size`` wide. ``hidden_act`` of both is "silu" (SwiGLU) or "relu2" (ReLU² without
    a gate). The router is described in ``routing``; ``moe_latent_size`` is the width that experts read and write, 0 for
    ``hidden_size``.

    Without ``mamba_rms_norm`` Mamba-2's output is gated and not normalized. ``projectors_bias`` says whether its
    out_proj has a bias; None means as in_proj, whose is ``mamba_proj_bias``.

    Mamba's dt comes from ``mamba_time_step_rank`` elements; where ``mixer_rms_eps`` is given, these and B and C
    are normalized, with weights if ``mixer_norm_weights``. ``residual_in_fp32`` keeps the residual stream in float32.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    # mlp
    intermediate_size: int = 0
    mlp_bias: bool = False
    hidden_act: str = "silu"
    # attention
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    rotary_dim: int = 0
    rope_theta: float = 10000.0
    attention_bias: bool = False
    # mamba2, and as far as sizes are alike mamba1
    mamba_expand: int = 0
    mamba_n_heads: int = 0
    mamba_d_head: int = 0
    mamba_n_groups: int = 0
    mamba_d_state: int = 0
    mamba_d_conv: int = 0
    mamba_conv_bias: bool = False
    mamba_proj_bias: bool = False
    projectors_bias: bool | None = None
    mamba_rms_norm: bool = True
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    # mamba1
    mamba_time_step_rank: int = 0
    mixer_rms_eps: float | None = None
    mixer_norm_weights: bool = False
    # moe
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    expert_intermediate_size: int = 0
    expert_scores: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    expert_weights_scale: float = 1.0
    expert_groups: int = 1
    used_expert_groups: int = 1
    moe_latent_size: int = 0
    # Granite's multipliers
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    residual_in_fp32: bool = False
    # Falcon-H1's further multipliers
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    key_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    mlp_multipliers: tuple[float, ...] = (1.0, 1.0)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The blocks of each layer's first step, joined by ``+``, as reports print them; ``mamba`` means Mamba-2."""
        return tuple(
            "+".join("mamba" if block == "mamba2" else block for block in layer.blocks)
            for layer in self.layers
        )

    def layers_of(self, block: Block) -> tuple[int, ...]:
        """The indices of the layers that have this block, in either step."""
        return tuple(
            i for i, layer in enumerate(self.layers) if block in layer.blocks or block in layer.feed_forward
        )

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return self.layers_of("attention")

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """The layers with a Mamba-2 block; ``layers_of("mamba1")`` returns those with Mamba's."""
        return self.layers_of("mamba2")

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores before the softmax."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def has_gate(self) -> bool:
        """Whether feed-forward networks and experts have a gate."""
        return self.hidden_act == "silu"

    @property
    def mamba_d_inner(self) -> int:
        """Width of x and z: with heads, heads times head size."""
        return self.mamba_n_heads * self.mamba_d_head or self.mamba_expand * self.hidden_size

    @property
    def mamba_out_bias(self) -> bool:
        """Whether the output projection of mixers has a bias."""
        return self.mamba_proj_bias if self.projectors_bias is None else self.projectors_bias

    @property
    def mamba_conv_dim(self) -> int:
        """Channels of the causal convolution: x, and with groups B and C."""
        return self.mamba_d_inner + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def mamba_in_proj_dim(self) -> int:
        """Rows of the input projection, in order: z, x, B, C, dt; of Mamba's: x, z."""
        return self.mamba_d_inner + self.mamba_conv_dim + self.mamba_n_heads
