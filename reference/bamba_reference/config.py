"""A model's shape as one frozen record for the whole family: what the forward pass and every converter read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerType = Literal["mamba", "mamba1", "attention"]


@dataclass(frozen=True)
class Config:
    """One model, in Bamba's names where transformers has several; fields with a default are not Bamba's.

    A layer is a norm and a mixer, ``layer_types``: ``mamba`` is Mamba-2's, ``mamba1`` the selective scan. A norm
    and a feed-forward network follow unless ``intermediate_size`` is 0. Sizes are counts of elements, 0 where a
    model has nothing of the kind: Mamba and Mamba-2 have no attention heads, Mamba's scan no heads or groups.

    ``rotary_dim`` of the ``head_dim`` elements of each query and key head are rotated, the rest pass.
    ``time_step_limit`` bounds dt after softplus. ``max_position_embeddings`` is 2^20 for a family whose
    configurations say nothing about positions. Token ids may be absent.

    Embeddings, and what each mixer and feed-forward network adds to the stream, are multiplied by
    ``embedding_multiplier`` and ``residual_multiplier``, attention scores by ``attention_multiplier``, for which
    none stands for head_dim^-1/2; logits are divided by ``logits_scaling``. ``num_experts_per_tok`` of
    ``num_local_experts`` experts, each ``expert_intermediate_size`` wide, are added to the feed-forward network.
    Mamba's dt comes from ``mamba_time_step_rank`` elements; where ``mixer_rms_eps`` is given, these and B and C
    are normalized without weights. ``residual_in_fp32`` keeps the stream between layers in float32.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[LayerType, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    mamba_expand: int
    mamba_n_heads: int
    mamba_d_head: int
    mamba_n_groups: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    time_step_limit: tuple[float, float]
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    expert_intermediate_size: int = 0
    mamba_time_step_rank: int = 0
    mixer_rms_eps: float | None = None
    residual_in_fp32: bool = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def layers_of(self, kind: LayerType) -> tuple[int, ...]:
        """The layers whose mixer is of this kind."""
        return tuple(i for i, other in enumerate(self.layer_types) if other == kind)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return self.layers_of("attention")

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """Mamba-2's; ``layers_of("mamba1")`` has Mamba's."""
        return self.layers_of("mamba")

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by before the softmax."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def mamba_d_inner(self) -> int:
        """Width of x and z; with heads, heads times head size."""
        return self.mamba_expand * self.hidden_size

    @property
    def mamba_conv_dim(self) -> int:
        """Channels that pass the causal convolution: x, and with groups B and C."""
        return self.mamba_d_inner + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def mamba_in_proj_dim(self) -> int:
        """Rows of the input projection, in order: z, x, B, C, dt; of Mamba's: x, z."""
        return self.mamba_d_inner + self.mamba_conv_dim + self.mamba_n_heads
