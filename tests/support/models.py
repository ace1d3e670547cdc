"""Small random models whose every part moves the logits, and Bamba's checkpoints on disk.

transformers' own initialization hides mistakes: its attention is nearly uniform, its norms are ones and its
heads all forget at once. Here each of them is drawn so that getting it wrong shows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BambaConfig, BambaForCausalLM

from bamba_quant.families.bamba.cases import SMALL_MODELS

SMALL: dict[str, Any] = dict(SMALL_MODELS.keys)

ALSO_WRITTEN = (
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "use_cache",
    "num_logits_to_keep",
)

Model = TypeVar("Model", bound=torch.nn.Module)
Spelling = Literal[4, 5, "5+layer_types"]


def random_bamba(seed: int = 0, **overrides: Any) -> BambaForCausalLM:
    """A float32 model in eval mode: four layers, the second of them attention, half of each head rotated.

    ``overrides`` are keys of transformers' ``BambaConfig``, laid over ``SMALL``. The same arguments
    give the same weights.
    """
    return drawn(BambaForCausalLM(BambaConfig(**{**SMALL, **overrides})), seed)


def drawn(model: Model, seed: int) -> Model:
    """A transformers model in eval mode with every weight drawn; the same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator))
        for name, buffer in model.named_buffers():
            if name.endswith(
                "correction_bias"
            ):  # as far apart as the scores of experts that tokens choose between
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A_log":  # decay rates from 1/2 to 16, as Mamba-2 is initialized and trained
        return torch.log(0.5 + 15.5 * torch.rand(shape, generator=generator))
    if leaf == "dt_bias" or name.endswith("dt_proj.bias"):  # steps from 0.001 to 0.3 after softplus
        dt = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(0.3), generator=generator))
        return dt + torch.log(-torch.expm1(-dt))
    if leaf == "D" or "norm" in leaf:
        return 1 + 0.3 * normal
    if leaf == "bias":
        return 0.3 * normal
    if leaf in ("embed_tokens", "embeddings"):  # 0.3 keeps logits near 1 where the head is tied to it
        return 0.3 * normal
    if leaf == "conv1d":
        return 0.5 * normal
    fan_in = shape[-1]
    # Scores of deviation 6 instead of 1: attention that picks, so that a rotation gone wrong picks otherwise. A
    # router that is undecided between experts decides otherwise with the next rounding.
    gain = {"q_proj": 2.5, "k_proj": 2.5, "router": 3.0, "gate": 3.0}.get(leaf, 1.0)
    return gain * normal / math.sqrt(fan_in)


def numpy_weights(model: BambaForCausalLM) -> dict[str, np.ndarray]:
    """The float32 weights by their Hugging Face names, without ``lm_head.weight`` where it is tied."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def hf_config(model: BambaForCausalLM, spelling: Spelling = 4) -> dict[str, Any]:
    """The model's ``config.json`` as transformers 4 or 5 writes it, or as 5 does for other hybrids.

    ``"5+layer_types"`` names each layer's kind as well, which transformers 5.23 writes for other families and
    refuses to read for this one: the oracle cannot load it, a converter has to.
    """
    config = model.config
    rope = config.rope_parameters
    written = json.loads(config.to_json_string(use_diff=False))
    kept = {"architectures": ["BambaForCausalLM"], "model_type": "bamba"}
    kept |= {key: written[key] for key in (*SMALL, *ALSO_WRITTEN)}
    low, high = config.time_step_limit
    if spelling == 4:
        head_dim = config.hidden_size // config.num_attention_heads
        kept["attn_rotary_emb"] = int(head_dim * rope["partial_rotary_factor"])
        kept["rope_theta"] = rope["rope_theta"]
        kept["torch_dtype"] = "float32"
        if (low, high) != (0.0, math.inf):
            kept["time_step_limit"] = [low, high]
        return kept
    kept["rope_parameters"] = dict(rope)
    if spelling == "5+layer_types":
        kept["layer_types"] = list(config.layers_block_type)
    kept["time_step_limit"] = [low, {"__float__": "Infinity"} if high == math.inf else high]
    kept["dtype"] = "float32"
    kept["transformers_version"] = "5.23.0"
    return kept


def save_checkpoint(
    model: BambaForCausalLM,
    directory: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shards: int = 1,
    spelling: Spelling = 4,
) -> Path:
    """Write a Hugging Face directory: ``config.json`` and one safetensors file, or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(model, spelling)
    config["torch_dtype" if spelling == 4 else "dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    stored = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(array).to(stored) for name, array in numpy_weights(model).items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensors[name] for name in names[shard::shards]}
        save_file(held, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory
