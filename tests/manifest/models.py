"""Small random checkpoints of every family, and other inputs, drawn by numpy from fixed seeds."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_HYBRID: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False, "attention_bias": False, **_TOKENS,
}  # fmt: skip
# 256 columns in every matrix: each codec is used as it is, no other one instead of it.
_WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 64,
    "mamba_d_state": 60,
}  # fmt: skip
_GRANITE: dict[str, Any] = {
    **{key: value for key, value in _HYBRID.items() if key != "attn_layer_indices"},
    "layer_types": ["mamba", "attention", "mamba", "mamba"], "shared_intermediate_size": 96,
    "num_local_experts": 0, "num_experts_per_tok": 0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
    "attention_multiplier": 0.2, "logits_scaling": 2.5, "position_embedding_type": "nope", "rope_theta": 10000.0,
    "normalization_function": "rmsnorm",
}  # fmt: skip
_MIXERS: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "conv_kernel": 4, "expand": 2,
    "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "residual_in_fp32": True,
    "tie_word_embeddings": True, **_TOKENS,
}  # fmt: skip
_BAMBA = {"architectures": ["BambaForCausalLM"], "model_type": "bamba", "rope_theta": 10000.0, **_HYBRID}
_GRANITE_KIND = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    **_GRANITE,
}
_MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", **_MIXERS, "num_heads": 8, "head_dim": 16,
    "n_groups": 1, "tie_word_embeddings": False,
}  # fmt: skip
_MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    **_MIXERS,
    "intermediate_size": 128,
    "time_step_rank": 4,
}
_FALCON = {
    **_MAMBA,
    "architectures": ["FalconMambaForCausalLM"],
    "model_type": "falcon_mamba",
    "mixer_rms_eps": 1e-6,
}
_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}

# Name -> the keys of config.json, the type of the weights, the number of shards.
MODELS: dict[str, tuple[dict[str, Any], str, int]] = {
    "bamba": ({**_BAMBA, "attn_rotary_emb": 8}, "F32", 1),
    "bamba-biases": (
        {**_BAMBA, "attn_rotary_emb": 8, "attention_bias": True, "mlp_bias": True, "mamba_n_groups": 2},
        "BF16",
        3,
    ),
    "bamba-tied": (
        {**_BAMBA, "attn_rotary_emb": 8, "tie_word_embeddings": True, "num_key_value_heads": 4},
        "F16",
        1,
    ),
    "bamba-wide": ({**_BAMBA, **_WIDE, "attn_rotary_emb": 32}, "BF16", 2),
    "bamba-vocabulary": ({**_BAMBA, "attn_rotary_emb": 8, "vocab_size": 2048}, "BF16", 1),
    "granite": (_GRANITE_KIND, "BF16", 1),
    "granite-experts": ({**_GRANITE_KIND, **_EXPERTS}, "BF16", 2),
    "granite-experts-wide": (
        {**_GRANITE_KIND, **_WIDE, **_EXPERTS, "num_local_experts": 8, "intermediate_size": 256,
         "shared_intermediate_size": 512, "mamba_d_state": 56, "num_hidden_layers": 2,
         "layer_types": ["mamba", "attention"]},
        "BF16",
        1,
    ),
    "granite-attention": (
        {**_GRANITE_KIND, "layer_types": ["attention"] * 4, "position_embedding_type": "rope", "attention_bias": True},
        "F32",
        1,
    ),
    "granite-attention-experts": (
        {**_GRANITE_KIND, **_EXPERTS, "layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
        "F16",
        1,
    ),
    "mamba2": (_MAMBA2, "F32", 1),
    "mamba2-wide": ({**_MAMBA2, "hidden_size": 256, "num_heads": 8, "head_dim": 64, "n_groups": 2,
                     "state_size": 60}, "BF16", 1),
    "mamba": (_MAMBA, "BF16", 1),
    "mamba-wide": ({**_MAMBA, "hidden_size": 256, "intermediate_size": 512, "time_step_rank": 16}, "F32", 1),
    "falcon-mamba": (_FALCON, "BF16", 1),
}  # fmt: skip


def shapes_of(config: dict[str, Any]) -> Shapes:
    """Every tensor of the checkpoint by the name that transformers 4 writes."""
    kind = config["model_type"]
    if kind in ("mamba", "falcon_mamba", "mamba2"):
        return _pure(config, "mamba" if kind != "mamba2" else kind)
    c, granite = config, kind == "granitemoehybrid"
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    head = hidden // c["num_attention_heads"]
    types = c.get("layer_types") or [
        "attention" if i in c["attn_layer_indices"] else "mamba" for i in range(c["num_hidden_layers"])
    ]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i, layer in enumerate(types):
        at = f"model.layers.{i}."
        shapes[at + "input_layernorm.weight"] = (hidden,)
        if layer == "attention":
            rows = {
                "q": hidden,
                "k": head * c["num_key_value_heads"],
                "v": head * c["num_key_value_heads"],
                "o": hidden,
            }
            for leaf, count in rows.items():
                shapes[f"{at}self_attn.{leaf}_proj.weight"] = (count, hidden)
                if c["attention_bias"]:
                    shapes[f"{at}self_attn.{leaf}_proj.bias"] = (count,)
        else:
            shapes |= _mamba2_mixer(
                at + "mamba.", hidden, c["mamba_n_heads"], c["mamba_d_head"], c["mamba_n_groups"],
                c["mamba_d_state"], c["mamba_d_conv"],
            )  # fmt: skip
        shapes |= _granite_feed_forward(at, c) if granite else _bamba_feed_forward(at, c)
    shapes["model.norm.weight" if granite else "model.final_layernorm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _bamba_feed_forward(at: str, c: dict[str, Any]) -> Shapes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    rows = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: Shapes = {at + "pre_ff_layernorm.weight": (hidden,)}
    for leaf, shape in rows.items():
        shapes[f"{at}feed_forward.{leaf}_proj.weight"] = shape
        if c.get("mlp_bias"):
            shapes[f"{at}feed_forward.{leaf}_proj.bias"] = shape[:1]
    return shapes


def _granite_feed_forward(at: str, c: dict[str, Any]) -> Shapes:
    hidden, shared, inner, experts = (
        c[key]
        for key in ("hidden_size", "shared_intermediate_size", "intermediate_size", "num_local_experts")
    )
    shapes: Shapes = {
        at + "post_attention_layernorm.weight": (hidden,),
        at + "shared_mlp.input_linear.weight": (2 * shared, hidden),
        at + "shared_mlp.output_linear.weight": (hidden, shared),
    }
    if experts:
        shapes |= {
            at + "block_sparse_moe.input_linear.weight": (experts, 2 * inner, hidden),
            at + "block_sparse_moe.output_linear.weight": (experts, hidden, inner),
            at + "block_sparse_moe.router.layer.weight": (experts, hidden),
        }
    return shapes


def _mamba2_mixer(
    at: str, hidden: int, heads: int, head: int, groups: int, state: int, kernel: int
) -> Shapes:
    inner = heads * head
    channels = inner + 2 * groups * state
    return {
        at + "A_log": (heads,), at + "D": (heads,), at + "dt_bias": (heads,),
        at + "conv1d.weight": (channels, 1, kernel), at + "conv1d.bias": (channels,),
        at + "in_proj.weight": (inner + channels + heads, hidden), at + "norm.weight": (inner,),
        at + "out_proj.weight": (hidden, inner),
    }  # fmt: skip


def _pure(c: dict[str, Any], mixer: str) -> Shapes:
    hidden, vocab, kernel, state = (
        c[key] for key in ("hidden_size", "vocab_size", "conv_kernel", "state_size")
    )
    shapes: Shapes = {"backbone.embeddings.weight": (vocab, hidden)}
    for i in range(c["num_hidden_layers"]):
        at = f"backbone.layers.{i}.mixer."
        shapes[f"backbone.layers.{i}.norm.weight"] = (hidden,)
        if mixer == "mamba2":
            shapes |= _mamba2_mixer(at, hidden, c["num_heads"], c["head_dim"], c["n_groups"], state, kernel)
            continue
        inner, rank = c["intermediate_size"], c["time_step_rank"]
        shapes |= {
            at + "A_log": (inner, state), at + "D": (inner,), at + "conv1d.weight": (inner, 1, kernel),
            at + "conv1d.bias": (inner,), at + "in_proj.weight": (2 * inner, hidden),
            at + "x_proj.weight": (rank + 2 * state, inner), at + "dt_proj.weight": (inner, rank),
            at + "dt_proj.bias": (inner,), at + "out_proj.weight": (hidden, inner),
        }  # fmt: skip
    shapes["backbone.norm_f.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def draw(model: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values that depend on the two names only; no part is trivial (norms are not ones)."""
    random = np.random.default_rng(zlib.crc32(f"{model} {name}".encode()))
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A_log":
        return random.uniform(-0.7, 2.7, shape).astype(np.float32)
    if leaf == "dt_bias" or name.endswith("dt_proj.bias"):
        return random.uniform(-7, -1, shape).astype(np.float32)
    normal = random.standard_normal(shape)
    if leaf == "D" or "norm" in leaf:
        return (1 + 0.3 * normal).astype(np.float32)
    scale = {"bias": 0.3, "embed_tokens": 0.3, "embeddings": 0.3, "conv1d": 0.5}.get(leaf, shape[-1] ** -0.5)
    return (scale * normal).astype(np.float32)


def write_safetensors(file: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write_bytes(
        struct.pack("<Q", len(raw)) + raw + b"".join(array.tobytes() for array in tensors.values())
    )


def write_model(name: str, directory: Path) -> None:
    """The checkpoint ``MODELS[name]``, without a tokenizer."""
    config, dtype, shards = MODELS[name]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": _NAMES[dtype]}, indent=2))
    tensors = {key: draw(name, key, shape).astype(DTYPES[dtype]) for key, shape in shapes_of(config).items()}
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return
    files: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = {key: tensors[key] for key in list(tensors)[shard::shards]}
        write_safetensors(directory / file, held, dtype)
        files |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_state_spaces(directory: Path) -> None:
    """Mamba as state-spaces publishes it: their config.json, and a pickle with the embedding twice."""
    import torch

    config = MODELS["mamba"][0]
    directory.mkdir()
    original = {
        "d_model": 64, "n_layer": 3, "vocab_size": 157, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(original))
    tensors = {
        name.replace("embeddings", "embedding"): torch.from_numpy(draw("state-spaces", name, shape))
        for name, shape in shapes_of(config).items()
    }
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch.save(tensors, directory / "pytorch_model.bin")


def write_imatrix(file: Path, config: dict[str, Any], vocabulary: bool = False) -> None:
    """A .dat importance matrix for a Bamba model with this configuration."""
    leaves = {
        "in_proj": "ssm_in", "out_proj": "ssm_out", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    entries: dict[str, int] = {}
    for name, shape in shapes_of(config).items():
        parts = name.split(".")
        if len(parts) > 4 and parts[-2] in leaves and parts[-1] == "weight":
            entries[f"blk.{parts[2]}.{leaves[parts[-2]]}.weight"] = shape[-1]
    if vocabulary:
        entries["output.weight"] = config["hidden_size"]
    raw = struct.pack("<i", len(entries))
    for name, columns in entries.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = (random.random(columns) ** 4 + 1e-3).astype("<f4")
        encoded = name.encode()
        raw += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, columns) + values.tobytes()
    dataset = b"random"
    file.write_bytes(raw + struct.pack("<ii", 1, len(dataset)) + dataset)


def write_text(file: Path, words: int = 6000) -> None:
    """Sentences of common words in a random order."""
    known = (
        "the of and a to in is you that it he was for on are as with his they I at be this have from or one had "
        "by word but not what all were we when your can said there use an each which she do how their if will up "
        "other about out many then them these so some her would make like him into time has look two more write go "
        "see number no way could people my than first water been call who oil its now find long down day did get"
    ).split()
    random = np.random.default_rng(5)
    chosen = [known[i] for i in random.integers(0, len(known), words)]
    ends = np.cumsum(random.integers(4, 15, words // 8))
    for end in ends[ends < words]:
        chosen[end] += "."
    file.write_text(" ".join(chosen) + "\n")


def with_tokenizer(name: str, directory: Path, mini: Path) -> None:
    """The checkpoint ``name`` with bamba-mini's tokenizer."""
    write_model(name, directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(mini / file, directory / file)
