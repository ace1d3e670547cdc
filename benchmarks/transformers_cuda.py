"""transformers' Bamba of Bamba-9B's exact shape on a GPU, with random weights, in each way it can be run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.forward import BAMBA_9B

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
        tensor.normal_(0, 1 if leaf == "embed_tokens" else tensor.shape[1] ** -0.5)


def shape(layers: int) -> dict[str, Any]:
    attention = [i for i in BAMBA_9B["attn_layer_indices"] if i < layers]
    return BAMBA_9B | {"num_hidden_layers": layers, "attn_layer_indices": attention}


def oracle(layers: int) -> Any:
    """transformers' model on the GPU, its scan mamba_ssm's where that can be imported."""
    peers.let_mamba_ssm_be_imported()
    from transformers import BambaConfig, BambaForCausalLM

    with torch.device("meta"):
        model = BambaForCausalLM(BambaConfig(**shape(layers), pad_token_id=None)).to(torch.bfloat16)
    # Non-persistent buffers, such as the rotary frequencies, are not in the meta model: made again below.
    model = model.to_empty(device="cuda").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        draw(name, parameter)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to("cuda")
    return model


def paths() -> dict[str, Sequence[str]]:
    """Of each way to run transformers' model, the functions that stay in torch."""
    found = {TORCH_ONLY: (*SCAN, *CONVOLUTION), WITH_SCAN: CONVOLUTION}
    return found | ({WITH_BOTH: ()} if peers.kernels().conv else {})


@contextmanager
def in_torch(names: Sequence[str]) -> Iterator[None]:
    """transformers' functions of these names as they stand under their replacements from other packages."""
    from transformers.models.bamba import modeling_bamba as module

    before = {name: getattr(module, name) for name in names}
    for name, function in before.items():
        setattr(module, name, function.__wrapped__)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
