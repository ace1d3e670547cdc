"""transformers' models of published models' exact shapes on a GPU, with random weights, in each way they can be run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.forward import BAMBA_9B

# Falcon-H1-7B with the multipliers of Falcon-H1-0.5B, which cost as much as its own.
FALCON_H1_7B: dict[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"], "vocab_size": 130048, "hidden_size": 3072, "intermediate_size": 12288,
    "num_hidden_layers": 44, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128, "mamba_n_groups": 1, "mamba_d_state": 256,
    "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_chunk_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11}, "embedding_multiplier": 5.656854249492381,
    "lm_head_multiplier": 0.0390625, "attention_out_multiplier": 0.9375, "key_multiplier": 0.390625,
    "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
}  # fmt: skip
SHAPES = {"bamba-9b": BAMBA_9B, "falcon-h1-7b": FALCON_H1_7B}

# What transformers does in torch where it lacks a package, by the package that would do it otherwise.
SCAN = ("mamba2_chunk_scan", "mamba2_selective_state_update")
CONVOLUTION = ("causal_conv1d_fn", "causal_conv1d_update")
TORCH_ONLY, WITH_SCAN, WITH_BOTH = (
    f"transformers, {packages}" for packages in ("torch", "mamba_ssm", "mamba_ssm and causal_conv1d")
)


def draw(name: str, tensor: Tensor) -> None:
    """Values as a trained model's, so that activations neither vanish nor overflow."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A_log":
        tensor.copy_(torch.log(0.5 + 15.5 * torch.rand(tensor.shape, device=tensor.device)))
    elif leaf == "dt_bias":
        dt = torch.exp(torch.empty(tensor.shape, device=tensor.device).uniform_(-6.9, -1.2))
        tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
    elif leaf == "D" or "norm" in leaf:
        tensor.normal_(1, 0.1)
    elif leaf == "bias":
        tensor.normal_(0, 0.1)
    elif leaf == "conv1d":
        tensor.normal_(0, 0.5)
    else:
        tensor.normal_(0, 1 if leaf in ("embed_tokens", "embeddings") else tensor.shape[-1] ** -0.5)


def shape(model: str, layers: int | None) -> dict[str, Any]:
    """The configuration of one of ``SHAPES``, of fewer layers if ``layers`` says so."""
    keys = dict(SHAPES[model])
    layers = keys["num_hidden_layers"] = layers or keys["num_hidden_layers"]
    if "attn_layer_indices" in keys:
        keys["attn_layer_indices"] = [i for i in keys["attn_layer_indices"] if i < layers]
    return keys


def oracle(keys: dict[str, Any]) -> Any:
    """transformers' model on the GPU, its scan mamba_ssm's where that can be imported."""
    peers.let_mamba_ssm_be_imported()
    import transformers
    from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector

    made = getattr(transformers, keys["architectures"][0])
    with torch.device("meta"):
        model = made(made.config_class(**keys, pad_token_id=None)).to(torch.bfloat16)
    # Non-persistent buffers, such as the rotary frequencies, are not in the meta model: made again below.
    model = model.to_empty(device="cuda").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        draw(name, parameter)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to("cuda")
    for layer in model.model.layers:
        if getattr(getattr(layer, "mamba", None), "mup_vector", None) is not None:
            layer.mamba.mup_vector = compute_mup_vector(model.config).to("cuda", torch.bfloat16)
    return model


def paths() -> dict[str, Sequence[str]]:
    """Of each way to run transformers' model with what is installed, the functions that stay in torch."""
    theirs, found = peers.kernels(), {TORCH_ONLY: (*SCAN, *CONVOLUTION)}
    found |= {WITH_SCAN: CONVOLUTION} if theirs.scan else {}
    return found | ({WITH_BOTH: ()} if theirs.scan and theirs.conv else {})


def prefill(model: Any, ids: Tensor, in_torch_alone: bool) -> None:
    """Logits of tokens (B, L); in torch alone a row at a time, because its scan of four takes 128 GiB at once."""
    for rows in ids.split(1 if in_torch_alone else len(ids)):
        model(rows, use_cache=False)


@contextmanager
def in_torch(names: Sequence[str]) -> Iterator[None]:
    """transformers' functions of these names as they stand under their replacements from other packages."""
    families = ("bamba", "falcon_h1", "nemotron_h")
    modules = [
        importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in families
    ]
    before = [(module, name, getattr(module, name)) for module in modules for name in names]
    for module, name, function in before:
        setattr(module, name, function.__wrapped__)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
