"""Model directories of every family, each of a few small layers, as ``{file name: bytes}``."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bamba_quant.families import families
from bamba_quant.families.bamba import BAMBA
from bamba_quant.planning.model import open_model
from tests.fuzz.seeds.tokenizers import VOCAB_SIZE, byte_level_bpe
from tests.fuzz.tree import Tree

_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_HYBRID: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, **_TOKENS,
}  # fmt: skip
_STATE_SPACES: dict[str, Any] = {
    "d_model": 32, "n_layer": 2, "vocab_size": VOCAB_SIZE - 3, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": {
        **_HYBRID, "architectures": ["BambaForCausalLM"], "model_type": "bamba", "attn_layer_indices": [1],
        "attn_rotary_emb": 8,
        "tie_word_embeddings": False, "torch_dtype": "float32",
    },
    "bamba of transformers 5": {
        **_HYBRID, "architectures": ["BambaForCausalLM"], "model_type": "bamba", "layer_types": ["mamba",
        "attention"], "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, {"__float__": "Infinity"}], "attention_bias": True, "mlp_bias": True,
    },
    **{
        family.name if kind == family.small_models.kinds[0] else f"{family.name}, {kind}": {
            **family.small_models.keys, **family.small_models.cases[kind], "model_type": family.name,
            "architectures": [*family.hf_architectures[:1]], "vocab_size": VOCAB_SIZE,
        }
        for family in families() if family is not BAMBA for kind in family.small_models.kinds
    },
    "mamba of state-spaces": {**_STATE_SPACES, "ssm_cfg": {"d_state": 8, "dt_rank": 2},
    "pad_vocab_size_multiple": 8},
    "mamba2 of state-spaces": {
        **_STATE_SPACES, "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 1},
        "d_intermediate": 0, "attn_layer_idx": [],
        "attn_cfg": {}, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    },
}  # fmt: skip
WITH_EXPERTS = next(name for name in CONFIGS if "experts" in name)
# Every side of every matrix divides by 128.
WIDE: dict[str, Any] = {
    **CONFIGS["bamba"], "hidden_size": 128, "intermediate_size": 128, "mamba_n_heads": 8, "mamba_d_head": 32,
    "mamba_d_state": 60,
    "head_dim": 128, "attn_rotary_emb": 64,
}  # fmt: skip

CARD = b"""---
license: apache-2.0
language:
- en
tags:
- bamba
base_model: acme/Mill-1B
datasets:
- acme/books
library_name: transformers
---

# Mill 1B

A model.
"""
GENERATION = {
    "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 2, "do_sample": True, "temperature": 0.6,
    "top_p": 0.9, "top_k": 40,
    "transformers_version": "5.0.0",
}  # fmt: skip


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


@cache
def weights(family: str) -> dict[str, np.ndarray]:
    """The tensors of a family's configuration, by name."""
    return drawn(CONFIGS[family])


def drawn(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """A random float32 tensor for each name and shape that a configuration implies."""
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_bytes(as_json(config))
        tensors = open_model(directory, weights="optional").checkpoint.tensors
    return {name: generator.uniform(0.1, 0.9, t.shape).astype(np.float32) for name, t in tensors.items()}


Stored = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # safetensors' dtype, shape, bytes


def plain(tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> Stored:
    """Tensors in one of the three types of weights."""
    return {name: (dtype, array.shape, _bytes(array, dtype)) for name, array in tensors.items()}


def _bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return array.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def safetensors(tensors: Stored, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values())


@cache
def directory(family: str, dtype: str = "F32") -> Tree:
    """A whole model directory."""
    return {
        "config.json": as_json(CONFIGS[family]),
        "model.safetensors": safetensors(plain(weights(family), dtype)),
        **byte_level_bpe(),
        "generation_config.json": as_json(GENERATION),
        "README.md": CARD,
    }


@cache
def sharded(family: str) -> Tree:
    """The same in two shards with an index."""
    tensors = plain(weights(family))
    names = list(tensors)
    tree = {name: content for name, content in directory(family).items() if name != "model.safetensors"}
    placed: dict[str, str] = {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        held = {name: tensors[name] for name in names[number::2]}
        tree[file] = safetensors(held)
        placed |= dict.fromkeys(held, file)
    size = sum(len(raw) for _, _, raw in tensors.values())
    tree["model.safetensors.index.json"] = as_json({"metadata": {"total_size": size}, "weight_map": placed})
    return tree
