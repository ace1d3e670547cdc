"""Random checkpoints with Bamba-9B's layer shapes, made once and kept, for every benchmark that needs size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bamba_quant.families import family_of, read_config

BAMBA_9B: dict[str, Any] = {
    "architectures": ["BambaForCausalLM"], "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "mamba_n_heads": 128, "mamba_d_head": 64,
    "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
    "mamba_conv_bias": True, "mamba_proj_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-05,
    "max_position_embeddings": 262144, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip

_DTYPES = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float32": ("F32", np.dtype(np.float32)),
}

# A tensor's bytes, of its name and shape.
Draw = Callable[[str, tuple[int, ...]], Iterator[Any]]


def make_checkpoint(
    directory: Path,
    layers: int = 3,
    attention: tuple[int, ...] = (1,),
    vocab_size: int = 128256,
    dtype: str = "bfloat16",
    draw: Draw | None = None,
) -> Path:
    """A checkpoint of ``layers`` layers in Bamba-9B's shapes: 1.83 billion weights with three layers.

    Weights are normal with deviation 0.02, drawn from a fixed seed, in bfloat16 or float32, or what ``draw`` gives
    of that dtype; a directory that is whole already is kept.
    """
    if (directory / "config.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    hf = BAMBA_9B | {"num_hidden_layers": layers, "attn_layer_indices": list(attention), "torch_dtype": dtype}
    hf |= {"vocab_size": vocab_size, "bos_token_id": vocab_size - 256, "eos_token_id": vocab_size - 255}
    rules = [rule for rule in family_of(hf).tensors(read_config(hf)) if not rule.skipped]
    draw = draw or _normal(np.random.default_rng(9), dtype)
    weight_map: dict[str, str] = {}
    shards = [
        [rule for rule in rules if rule.layer in group] for group in ({None}, *({i} for i in range(layers)))
    ]
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {rule.hf: file for rule in shard}
        _write_shard(directory / file, {rule.hf: rule.shape for rule in shard}, draw, dtype)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    write_tokenizer(directory, hf["bos_token_id"])
    (directory / "config.json").write_text(json.dumps(hf))
    return directory


def write_tokenizer(directory: Path, size: int) -> None:
    """tokenizer.json of ``size`` tokens and two special ones after these."""
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(size)))


def random_text(file: Path, words: int) -> Path:
    """Letters at random: as good as any text for random weights."""
    import random

    letters = random.Random(0)
    file.write_text(" ".join("".join(letters.choices("etaoinshrdlu", k=5)) for _ in range(words)))
    return file


def _normal(rng: np.random.Generator, dtype: str) -> Draw:
    stored = _DTYPES[dtype][1]

    def draw(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        left = math.prod(shape)
        while left:
            count = min(left, 1 << 24)
            x = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            yield x.astype(stored).tobytes()
            left -= count

    return draw


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], draw: Draw, dtype: str) -> None:
    name_in_header, stored = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": name_in_header,
            "shape": shape,
            "data_offsets": [offset, offset + stored.itemsize * math.prod(shape)],
        }
        offset += stored.itemsize * math.prod(shape)
    packed = json.dumps(header).encode()
    packed = packed.ljust(-(-len(packed) // 8) * 8)
    with file.open("wb") as stream:
        stream.write(len(packed).to_bytes(8, "little") + packed)
        for name, shape in shapes.items():
            stream.writelines(draw(name, shape))


def _tokenizer(size: int) -> dict[str, Any]:
    """A byte-level BPE of ``size`` tokens merged at random: as large to read as a real one."""
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    tokens = sorted(ByteLevel.alphabet())
    known, merges = set(tokens), []
    while len(tokens) < size:
        left, right = (tokens[int(len(tokens) * u**3)] for u in rng.random(2))
        if left + right not in known and len(left + right) < 24:
            known.add(left + right)
            tokens.append(left + right)
            merges.append([left, right])
    special = [
        {
            "id": size + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, text in enumerate(("<|begin_of_text|>", "<|end_of_text|>"))
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {text: i for i, text in enumerate(tokens)}, "merges": merges},
    }  # fmt: skip
