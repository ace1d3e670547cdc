"""Sums of what enters each matrix of a transformers model, by forward hooks, under the GGUF's tensor names."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from bamba_quant.inference.loading import LoadedModel

# Σ a² (matrices, columns), Σ a alike, and tokens (matrices,)
Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def hooked_sums(oracle: Any, loaded: LoadedModel, chunks: np.ndarray) -> dict[str, Found]:
    """By tensor, in float64; the output's too, the embedding's not."""
    rules = [loaded.weights.stored(name)[1] for name in loaded.weights]
    inputs: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    shapes = {str(rule.gguf): rule.shape for rule in rules}

    config = loaded.config
    # In transformers these multiply the input, in GGUF and here the matrix.
    before = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_in_multiplier)
    before["in_proj"] = config.ssm_in_multiplier

    def watch(module: Any, names: list[str], multiplier: float) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            for name in names:
                inputs[name].append((0, arguments[0].flatten(0, -2).double() / multiplier))

        return module.register_forward_pre_hook(hook)

    def watch_experts(module: Any, prefix: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            x, chosen, _ = arguments
            gated = hasattr(module, "gate_up_proj")
            for e, matrix in enumerate(module.gate_up_proj if gated else module.up_proj):
                some = x[(chosen == e).any(-1)]
                products = torch.nn.functional.linear(some, matrix).chunk(2 if gated else 1, dim=-1)
                hidden = module.act_fn(products[0]) * (products[1] if gated else 1)
                for name, values in (("gate", some), ("up", some), ("down", hidden))[not gated :]:
                    inputs[f"{prefix}ffn_{name}_exps.weight"].append((e, values.double()))

        return module.register_forward_pre_hook(hook)

    def watch_steps(module: Any, name: str) -> Any:
        """transformers multiplies by dt_proj.weight without calling the module."""
        epsilon = getattr(oracle.config, "mixer_rms_eps", None)

        def hook(module: Any, arguments: Any, out: torch.Tensor) -> None:
            rank = getattr(oracle.config, "time_step_rank", out.shape[-1])
            dt = out[..., :rank].flatten(0, -2).double()
            if epsilon is not None:
                dt = dt / (dt.square().mean(-1, keepdim=True) + epsilon).sqrt()
            inputs[name].append((0, dt))

        return module.register_forward_hook(hook)

    hooks = []
    normed = any(key.endswith("dt_layernorm") for key, _ in oracle.named_modules())
    for key, module in oracle.named_modules():
        if key.endswith((".block_sparse_moe.experts", ".mixer.experts", "feed_forward.experts")):
            hooks.append(watch_experts(module, f"blk.{key.split('.')[2]}."))
        # What dt_proj multiplies comes from here, or from the norm behind it.
        if key.endswith("dt_layernorm" if normed else "x_proj"):
            hooks.append(watch_steps(module, f"blk.{key.split('.')[2]}.ssm_dt.weight"))
        if key.endswith(("_proj", "lm_head", "_linear", "router", ".gate")):
            served = [rule for rule in rules if f"{key}.weight" in rule.hf_names]
            if served:
                multiplier = before.get(key.rpartition(".")[2], 1.0)
                hooks.append(watch(module, [str(rule.gguf) for rule in served], multiplier))
    with torch.no_grad():
        for chunk in chunks:
            oracle(torch.from_numpy(chunk[None]), use_cache=False)
    for each in hooks:
        each.remove()
    found = {}
    for name, pieces in inputs.items():
        matrices = int(np.prod(shapes[name][:-2], dtype=int))
        squares, sums = np.zeros((2, matrices, shapes[name][-1]))
        counts = np.zeros(matrices, int)
        for e, values in pieces:
            squares[e] += values.square().sum(0).numpy()
            sums[e] += values.sum(0).numpy()
            counts[e] += len(values)
        found[name] = squares, sums, counts
    return found
