"""Key-values and keys of config.json that several families share, written and read back."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from gguf import Keys

from bamba_quant.architectures.rules import Metadata, Values
from bamba_quant.checkpoint.gguf_values import float32, uint32
from bamba_quant.errors import ArchitectureError
from bamba_reference.config import Config, LayerType

# llama.cpp wants these two keys of every model.
NO_ATTENTION: Metadata = {"feed_forward_length": uint32(0), "attention.head_count": uint32(0)}
# The fields of ``Config`` of a model whose layers are mixers and nothing else.
ONLY_MIXERS: dict[str, Any] = {
    "intermediate_size": 0,
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
    "head_dim": 0,
    "rotary_dim": 0,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "residual_in_fp32": True,
}


class Reader:
    """The key-values below a file's architecture."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self.architecture = str(values[Keys.General.ARCHITECTURE].value)

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of ``key``. Raises ``ArchitectureError`` when it is missing and there is no default."""
        found = self._values.get(f"{self.architecture}.{key}")
        if found is None and default is None:
            raise ArchitectureError(
                "the file lacks a key-value its architecture needs", found=f"no {self.architecture}.{key}"
            )
        return default if found is None else found.value

    def count(self, key: str, default: Any = None) -> int:
        """The positive integer under ``key``. Raises ``ArchitectureError`` for anything else, as when it is missing."""
        found = self(key, default)
        if not isinstance(found, int) or found < 1:
            raise ArchitectureError(
                "a key-value of the file is no count",
                found=f"{self.architecture}.{key} = {found}",
                expected="an integer of at least 1",
            )
        return found

    def special_tokens(self) -> dict[str, Any]:
        """The fields of ``Config`` that GGUF keeps with the vocabulary."""
        bos, eos, padding = (
            self._values[key].value if key in self._values else None
            for key in (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID, Keys.Tokenizer.PAD_ID)
        )
        return {
            "bos_token_id": bos,
            "eos_token_ids": (eos,) if eos is not None else (),
            "pad_token_id": padding,
        }

    def vocab_size(self) -> int:
        """Rows of the embedding; a file that does not say has as many as tokens."""
        tokens = self._values.get(Keys.Tokenizer.LIST)
        return self.count("vocab_size", None if tokens is None else len(tokens.value))

    def shape(self, tensors: Collection[str]) -> dict[str, Any]:
        """The fields of ``Config`` that every family has; tying shows in the tensors' names."""
        return {
            "vocab_size": self.vocab_size(),
            "hidden_size": self.count("embedding_length"),
            "rms_norm_eps": float(self("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "output.weight" not in tensors,
            "max_position_embeddings": self.count("context_length"),
            **self.special_tokens(),
        }

    def layers(self, kind: LayerType) -> dict[str, Any]:
        """The field of ``Config`` of a model with one kind of layer."""
        return {"layer_types": (kind,) * self.count("block_count")}

    def mamba2(self, tensors: Collection[str]) -> dict[str, Any]:
        """The fields of ``Config`` that Mamba-2 layers have; biases show in the tensors' names."""
        heads, d_inner = self.count("ssm.time_step_rank"), self.count("ssm.inner_size")
        return {
            "mamba_expand": d_inner // self.count("embedding_length"),
            "mamba_n_heads": heads,
            "mamba_d_head": d_inner // heads,
            "mamba_n_groups": self.count("ssm.group_count"),
            "mamba_d_state": self.count("ssm.state_size"),
            "mamba_d_conv": self.count("ssm.conv_kernel"),
            "mamba_conv_bias": has_convolution_bias(tensors),
            "mamba_proj_bias": False,
            "time_step_limit": (0.0, math.inf),
        }

    def attention(self, tensors: Collection[str]) -> dict[str, Any]:
        """The fields of ``Config`` that attention layers have; a layer without key-value heads is none."""
        heads, blocks = self.count("attention.head_count"), self.count("block_count")
        kv_heads = self("attention.head_count_kv")
        if not isinstance(kv_heads, list):
            kv_heads = [kv_heads] * blocks
        if len(kv_heads) != blocks or not all(isinstance(each, int) and each >= 0 for each in kv_heads):
            raise ArchitectureError(
                "the file does not say which layers are attention",
                found=f"{self.architecture}.attention.head_count_kv = {kv_heads}",
                expected=f"key-value heads of each of {blocks} layers",
            )
        return {
            "layer_types": tuple("attention" if count else "mamba" for count in kv_heads),
            "num_attention_heads": heads,
            "num_key_value_heads": max(kv_heads),
            "head_dim": self.count("attention.key_length", self.count("embedding_length") // heads),
            "rope_theta": float(self("rope.freq_base", 10000.0)),
            "attention_bias": has_bias(tensors, "attn_q"),
        }


def has_bias(tensors: Collection[str], kind: str) -> bool:
    """Whether a file has biases of this kind."""
    return any(name.endswith(f"{kind}.bias") for name in tensors)


def has_convolution_bias(tensors: Collection[str]) -> bool:
    """The same of the convolution; true where there is none, as llama.cpp runs no other."""
    return has_bias(tensors, "ssm_conv1d") or not any(name.endswith("ssm_conv1d.weight") for name in tensors)


def shape(config: Config) -> Metadata:
    """What ``Reader.shape`` reads."""
    return {
        "block_count": uint32(config.num_hidden_layers),
        "context_length": uint32(config.max_position_embeddings),
        "embedding_length": uint32(config.hidden_size),
        "vocab_size": uint32(config.vocab_size),
        "attention.layer_norm_rms_epsilon": float32(config.rms_norm_eps),
    }


def attention(config: Config) -> Metadata:
    """What ``Reader.attention`` reads, but for key-value heads, whose form differs between architectures."""
    return {
        "attention.head_count": uint32(config.num_attention_heads),
        "attention.key_length": uint32(config.head_dim),
        "attention.value_length": uint32(config.head_dim),
        "rope.freq_base": float32(config.rope_theta),
    }


def mamba2(config: Config) -> Metadata:
    """What ``Reader.mamba2`` reads."""
    return {
        "ssm.conv_kernel": uint32(config.mamba_d_conv),
        "ssm.inner_size": uint32(config.mamba_d_inner),
        "ssm.state_size": uint32(config.mamba_d_state),
        # For Mamba-2 llama.cpp reads the number of heads under this name.
        "ssm.time_step_rank": uint32(config.mamba_n_heads),
        "ssm.group_count": uint32(config.mamba_n_groups),
    }


def hf_special_tokens(config: Config) -> dict[str, Any]:
    """Written even where there is none: transformers' defaults are other ids."""
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def hf_mamba2(config: Config) -> dict[str, Any]:
    """Mamba-2 layers in the keys of Bamba and Granite."""
    return {
        "mamba_expand": config.mamba_expand,
        "mamba_n_heads": config.mamba_n_heads,
        "mamba_d_head": config.mamba_d_head,
        "mamba_n_groups": config.mamba_n_groups,
        "mamba_d_state": config.mamba_d_state,
        "mamba_d_conv": config.mamba_d_conv,
        "mamba_conv_bias": config.mamba_conv_bias,
        "mamba_proj_bias": config.mamba_proj_bias,
        **_hf_time_step_limit(config),
    }


def _hf_time_step_limit(config: Config) -> dict[str, Any]:
    return (
        {} if config.time_step_limit == (0.0, math.inf) else {"time_step_limit": list(config.time_step_limit)}
    )


def hf_mixers(config: Config) -> dict[str, Any]:
    """A model of mixers alone in the keys that Mamba, FalconMamba and Mamba-2 share."""
    written: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "state_size": config.mamba_d_state,
        "conv_kernel": config.mamba_d_conv,
        "expand": config.mamba_expand,
        "use_bias": config.mamba_proj_bias,
        "use_conv_bias": config.mamba_conv_bias,
        "hidden_act": config.hidden_act,
        "layer_norm_epsilon": shortest(config.rms_norm_eps),
        "residual_in_fp32": config.residual_in_fp32,
        "tie_word_embeddings": config.tie_word_embeddings,
        **hf_special_tokens(config),
        "use_cache": True,
    }
    return written | _hf_time_step_limit(config)


def hf_attention(config: Config) -> dict[str, Any]:
    """Attention layers, but for their rotary embedding."""
    written: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "attention_bias": config.attention_bias,
        "rope_theta": shortest(config.rope_theta),
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        written["head_dim"] = config.head_dim
    return written


def shortest(number: float) -> float:
    """The shortest decimal among those a file's float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def is_granite(values: Values) -> bool:
    """Whether a file has multipliers or experts, which tell a Granite's ``granitehybrid`` from a Bamba's."""
    name = values[Keys.General.ARCHITECTURE].value
    return any(
        values[f"{name}.{key}"].value
        for key in ("embedding_scale", "residual_scale", "attention.scale", "logit_scale", "expert_count")
        if f"{name}.{key}" in values
    )
