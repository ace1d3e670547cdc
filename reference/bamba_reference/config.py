"""A Bamba model's shape as one frozen record: what the forward pass and every converter read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

LayerType = Literal["mamba", "attention"]


@dataclass(frozen=True)
class Config:
    """One Bamba model, in transformers' names where it has them.

    Sizes are counts of elements. ``rotary_dim`` of the ``head_dim`` elements of each query and key head are
    rotated, the rest pass. ``time_step_limit`` bounds dt after softplus. Token ids may be absent.
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

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "attention")

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "mamba")

    @property
    def mamba_d_inner(self) -> int:
        """Width of x and z: heads times head size."""
        return self.mamba_n_heads * self.mamba_d_head

    @property
    def mamba_conv_dim(self) -> int:
        """Channels that pass the causal convolution: x, B and C."""
        return self.mamba_d_inner + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def mamba_in_proj_dim(self) -> int:
        """Rows of the input projection, in order: z, x, B, C, dt."""
        return self.mamba_d_inner + self.mamba_conv_dim + self.mamba_n_heads

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, ignore: Collection[str] = ()) -> Config:
        """Read a ``config.json`` already parsed, in the spelling of transformers 4 or 5.

        ``ignore`` names keys the caller vouches for. Raises ``ConfigError`` naming the key, the value found and
        what is supported.
        """
        from bamba_reference.hf_config import read_hf_config

        return read_hf_config(hf, ignore)
