"""vLLM's view of a quantized Bamba directory, for vLLM itself cannot run here: which layers it quantizes, and how.

Restated from vLLM 0.23.0: names and fusion from model_executor/models/bamba.py, ``should_ignore_layer`` from
quantization/compressed_tensors/utils.py, ``is_layer_skipped`` from quantization/utils/quant_utils.py, and what schemes
ask of shapes and scales from quantization/utils/fp8_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# As the class declares it, wrong as it is: gate_up_proj consists of gate_proj and up_proj.
PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["up_proj", "down_proj"]}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class RefusalError(Exception):
    """What vLLM raises while it loads."""


def layers(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Hugging Face's modules of every linear layer by vLLM's prefix for it; the output has no quantization at all."""
    found: dict[str, tuple[str, ...]] = {}
    for number in range(config["num_hidden_layers"]):
        ours = theirs = f"model.layers.{number}"
        if number in config["attn_layer_indices"]:
            found[f"{theirs}.qkv_proj"] = tuple(f"{ours}.self_attn.{leaf}" for leaf in STACKED["qkv_proj"])
            found[f"{theirs}.o_proj"] = (f"{ours}.self_attn.o_proj",)
        else:
            for leaf in ("in_proj", "out_proj"):
                found[f"{theirs}.mixer.{leaf}"] = (f"{ours}.mamba.{leaf}",)
        stacked = tuple(f"{ours}.feed_forward.{leaf}" for leaf in STACKED["gate_up_proj"])
        found[f"{theirs}.feed_forward.gate_up_proj"] = stacked
        found[f"{theirs}.feed_forward.down_proj"] = (f"{ours}.feed_forward.down_proj",)
    return found


def ignores(prefix: str, quantization: Mapping[str, Any]) -> bool:
    """Whether vLLM leaves a layer alone. Raises ``RefusalError`` where parts of a fused one disagree."""
    if quantization["quant_method"] == "fp8":
        skipped = quantization["modules_to_not_convert"]

        def matches(name: str) -> bool:
            return name in skipped
    else:
        ignore = quantization["ignore"]

        def matches(name: str) -> bool:
            return any(
                re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in ignore
            )

    head, _, leaf = prefix.rpartition(".")
    if leaf not in PACKED_MODULES:
        return matches(prefix)
    parts = {matches(f"{head}.{part}") for part in PACKED_MODULES[leaf]}
    if len(parts) > 1:
        raise RefusalError(f"{prefix}: found a different quantization for its parts")
    return parts.pop()


def check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]) -> int:
    """Raise ``RefusalError`` where vLLM would expect other tensors than there are; return how many it quantizes.

    ``shapes`` are those of all tensors, by name; ``values`` holds at least the scales of whole matrices.
    """
    quantization = config["quantization_config"]
    count = 0
    for prefix, modules in layers(config).items():
        ignored = ignores(prefix, quantization)
        for module in modules:
            extra = sorted(
                name.removeprefix(f"{module}.") for name in shapes if name.startswith(f"{module}.weight")
            )
            expected = ["weight"] if ignored else _expected(quantization)
            if extra != sorted(expected):
                raise RefusalError(f"{prefix} wants {expected} of {module}, the files hold {extra}")
        if not ignored:
            count += len(modules)
            _check_fused(prefix, modules, quantization, shapes, values)
            if prefix.endswith("mixer.in_proj") and _block(quantization):
                _check_partitions(config)
    if "lm_head.weight" in shapes and "lm_head.weight_scale" in shapes:
        raise RefusalError("lm_head is built without a quantization")
    return count


def _expected(quantization: Mapping[str, Any]) -> list[str]:
    if quantization["quant_method"] == "fp8":
        return ["weight", "weight_scale_inv"]
    (group,) = quantization["config_groups"].values()
    if group["weights"]["type"] == "int":
        if quantization["format"] != "pack-quantized":
            raise RefusalError("integers come as pack-quantized")
        names = ["weight_packed", "weight_scale", "weight_shape"]
        return names if group["weights"]["symmetric"] else [*names, "weight_zero_point"]
    if quantization["format"] != "float-quantized" or group["targets"] != ["Linear"]:
        raise RefusalError("floats come as float-quantized, for linear layers")
    if group["weights"]["dynamic"] or not group["input_activations"]["dynamic"]:
        raise RefusalError("weights are static and activations dynamic")
    return ["weight", "weight_scale"]


def _block(quantization: Mapping[str, Any]) -> bool:
    if quantization["quant_method"] == "fp8":
        return True
    (group,) = quantization["config_groups"].values()
    return bool(group["weights"]["strategy"] == "block")


def _check_fused(
    prefix: str,
    modules: Sequence[str],
    quantization: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Any],
) -> None:
    if quantization["quant_method"] != "fp8":
        (group,) = quantization["config_groups"].values()
        if group["weights"]["strategy"] == "tensor":
            # vLLM rounds the parts of a fused layer again, to the largest scale among them.
            if len({float(values[f"{module}.weight_scale"].reshape(-1)[0]) for module in modules}) > 1:
                raise RefusalError(f"{prefix}: its parts would be quantized again")
            return
    if _block(quantization) and len(modules) > 1:
        # Every part but the last one of a fused layer must be whole blocks high.
        for module in modules[:-1]:
            if shapes[f"{module}.weight"][0] % 128:
                raise RefusalError(f"{prefix}: {module} has {shapes[f'{module}.weight'][0]} rows")


def _check_partitions(config: Mapping[str, Any]) -> None:
    """in_proj counts as five outputs: gate, x, B, C, dt."""
    inner = config["mamba_expand"] * config["hidden_size"]
    state = config["mamba_n_groups"] * config["mamba_d_state"]
    if any(rows % 128 for rows in (inner, inner, state, state)):
        raise RefusalError("a part of in_proj is not whole blocks high")
