"""vLLM's view of a quantized directory, for vLLM itself cannot run here: which layers it quantizes, and how.

Restated from vLLM 0.23.0: names and fusion from model_executor/models/bamba.py, granitemoehybrid.py,
granitemoeshared.py, falcon_h1.py, mamba2.py, nemotron_h.py and layers/mamba/mamba_mixer.py, ``should_ignore_layer`` and
``get_moe_method`` from quantization/compressed_tensors, ``is_layer_skipped`` from quantization/utils/quant_utils.py,
and what schemes ask of shapes and scales from quantization/utils/fp8_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_QKV = ("q_proj", "k_proj", "v_proj")
Layers = dict[str, tuple[str, ...]]


class RefusalError(Exception):
    """What vLLM raises while it loads."""


@dataclass(frozen=True)
class View:
    """A class of vLLM: ``packed`` is its packed_modules_mapping.

    ``layer(config, number)`` gives Hugging Face's modules of every linear layer by vLLM's prefix for it, ``in_proj``
    the keys of config.json for heads, head size, groups and states.
    """

    packed: Mapping[str, Sequence[str]]
    layer: Callable[[Mapping[str, Any], int], Layers]
    in_proj: tuple[str, str, str, str]
    quantizes_the_output: bool = False


def _attends(config: Mapping[str, Any], number: int) -> bool:
    if "layer_types" in config:
        return config["layer_types"][number] in ("attention", "full_attention")
    return number in config["attn_layer_indices"]


def _mixer(ours: str, theirs: str) -> Layers:
    return {f"{theirs}.{leaf}": (f"{ours}.{leaf}",) for leaf in ("in_proj", "out_proj")}


def _attention(ours: str, theirs: str) -> Layers:
    return {
        f"{theirs}.qkv_proj": tuple(f"{ours}.{leaf}" for leaf in _QKV),
        f"{theirs}.o_proj": (f"{ours}.o_proj",),
    }


def _bamba(config: Mapping[str, Any], number: int) -> Layers:
    layer = f"model.layers.{number}"
    network = f"{layer}.feed_forward"
    mixer = (
        _attention(f"{layer}.self_attn", layer)
        if _attends(config, number)
        else _mixer(f"{layer}.mamba", f"{layer}.mixer")
    )
    return mixer | {
        f"{network}.gate_up_proj": (f"{network}.gate_proj", f"{network}.up_proj"),
        f"{network}.down_proj": (f"{network}.down_proj",),
    }


def _granite(config: Mapping[str, Any], number: int) -> Layers:
    layer = f"model.layers.{number}"
    network = f"{layer}.shared_mlp"
    mixer = (
        _attention(f"{layer}.self_attn", f"{layer}.self_attn")
        if _attends(config, number)
        else _mixer(f"{layer}.mamba", f"{layer}.mixer")
    )
    found = mixer | {
        f"{network}.{leaf}": (f"{network}.{leaf}",) for leaf in ("input_linear", "output_linear")
    }
    if config["num_local_experts"]:
        found[f"{layer}.block_sparse_moe.experts"] = ()
        found[f"{layer}.block_sparse_moe.experts.routed_experts"] = ()
    return found


def _falcon_h1(config: Mapping[str, Any], number: int) -> Layers:
    layer = f"model.layers.{number}"
    network = f"{layer}.feed_forward"
    return {
        **_attention(f"{layer}.self_attn", layer),
        **_mixer(f"{layer}.mamba", f"model.{config['num_hidden_layers'] + number}.mixer"),
        f"{network}.gate_up_proj": (f"{network}.gate_proj", f"{network}.up_proj"),
        f"{network}.down_proj": (f"{network}.down_proj",),
    }


def _mamba2(config: Mapping[str, Any], number: int) -> Layers:
    return _mixer(f"backbone.layers.{number}.mixer", f"backbone.layers.{number}.mixer")


def _nemotron(config: Mapping[str, Any], number: int) -> Layers:
    ours, theirs = (f"{root}.layers.{number}.mixer" for root in ("backbone", "model"))
    kind = config["layers_block_type"][number]
    if kind == "linear_attention":
        return _mixer(ours, theirs)
    if kind == "full_attention":
        return _attention(ours, theirs)
    shared = ".shared_experts" if kind == "moe" else ""
    found: Layers = {
        f"{theirs}{shared}.{leaf}": (f"{ours}{shared}.{leaf}",) for leaf in ("up_proj", "down_proj")
    }
    experts = (
        f"{ours}.experts.{e}.{leaf}_proj"
        for e in range(config["n_routed_experts"])
        for leaf in ("up", "down")
    )
    return found | ({f"{theirs}.experts": tuple(experts)} if shared else {})


def _mamba(config: Mapping[str, Any], number: int) -> Layers:
    raise RefusalError("MambaMixer takes no quantization")


_MAMBA2_KEYS = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state")
VIEWS = {
    # As the class declares it, wrong as it is: gate_up_proj consists of gate_proj and up_proj.
    "bamba": View({"qkv_proj": _QKV, "gate_up_proj": ("up_proj", "down_proj")}, _bamba, _MAMBA2_KEYS),
    "granitemoehybrid": View(
        {"qkv_proj": _QKV, "in_proj": ("in_proj",), "input_linear": ("input_linear",)},
        _granite,
        _MAMBA2_KEYS,
        quantizes_the_output=True,
    ),
    "falcon_h1": View({"qkv_proj": _QKV, "gate_up_proj": ("gate_proj", "up_proj")}, _falcon_h1, _MAMBA2_KEYS),
    "mamba2": View({}, _mamba2, ("num_heads", "head_dim", "n_groups", "state_size")),
    "nemotron_h": View(
        {"qkv_proj": _QKV}, _nemotron, ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    ),
    "mamba": View({}, _mamba, ("", "", "", "")),
    "falcon_mamba": View({}, _mamba, ("", "", "", "")),
    "jamba": View({}, _mamba, ("", "", "", "")),
}


def layers(config: Mapping[str, Any]) -> Layers:
    """Hugging Face's modules of every linear layer by vLLM's prefix for it; none for stacked experts."""
    view, found = VIEWS[config["model_type"]], {}
    for number in range(config.get("num_hidden_layers") or len(config["layers_block_type"])):
        found |= view.layer(config, number)
    return found


def ignores(prefix: str, quantization: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> bool:
    """Whether vLLM leaves a layer alone. Raises ``RefusalError`` where parts of a fused one disagree."""
    head, _, leaf = prefix.rpartition(".")
    if quantization["quant_method"] == "fp8":
        skipped = quantization["modules_to_not_convert"]
        if leaf not in packed and "experts" in prefix:
            return any(prefix in name for name in skipped if "experts" in name)

        def matches(name: str) -> bool:
            return name in skipped
    else:
        ignore = quantization["ignore"]

        def matches(name: str) -> bool:
            return any(
                re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in ignore
            )

    names = [prefix]
    if leaf in packed:
        names = [f"{head}.{part}" for part in packed[leaf]]
    elif ".experts" in prefix:
        names = [f"{prefix}.0.{part}_proj" for part in ("gate", "up", "down")]
    parts = {bool(matches(name)) for name in names}
    if len(parts) > 1:
        raise RefusalError(f"{prefix}: found a different quantization for its parts")
    return parts.pop()


def check(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]) -> int:
    """Raise ``RefusalError`` where vLLM would expect other tensors than there are; return how many it quantizes.

    ``shapes`` are those of all tensors, by name; ``values`` holds at least the scales of whole matrices.
    """
    quantization, view = config["quantization_config"], VIEWS[config["model_type"]]
    count = 0
    for prefix, modules in layers(config).items():
        ignored = ignores(prefix, quantization, view.packed)
        if not modules and not ignored:
            raise RefusalError(f"{prefix} wants quantized experts")
        for module in modules:
            extra = sorted(
                name.removeprefix(f"{module}.") for name in shapes if name.startswith(f"{module}.weight")
            )
            expected = ["weight"] if ignored else _expected(_of_layer(prefix, quantization, view.packed))
            if extra != sorted(expected):
                raise RefusalError(f"{prefix} wants {expected} of {module}, the files hold {extra}")
        if modules and not ignored:
            count += len(modules)
            here = _of_layer(prefix, quantization, view.packed)
            if not prefix.endswith(".experts"):  # each of which has scales of its own
                _check_fused(prefix, modules, here, shapes, values)
            if prefix.endswith("input_linear") and _block(here) and config["shared_intermediate_size"] % 128:
                raise RefusalError(f"{prefix}: a half is not whole blocks high")
            if prefix.endswith("mixer.in_proj") and _block(here):
                _check_partitions(config, view)
    if view.quantizes_the_output and not ignores("lm_head", quantization, view.packed):
        raise RefusalError("lm_head would be quantized")
    if "lm_head.weight" in shapes and "lm_head.weight_scale" in shapes:
        raise RefusalError("lm_head is built without a quantization")
    return count


def _of_layer(
    prefix: str, quantization: Mapping[str, Any], packed: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """``quantization`` with the one group of a layer (compressed_tensors/utils.py, ``find_matched_target``).

    Names come before classes, and a class before the names of a fused layer's parts, which must all have a target, of
    which the first counts. Experts are looked for as those of three matrices (``get_moe_method``).
    """
    if quantization["quant_method"] == "fp8":
        return dict(quantization)
    groups = quantization["config_groups"].values()
    targets = {target: group for group in groups for target in group["targets"]}

    def find(name: str) -> str | None:
        named = (t for t in targets if (re.match(t[3:], name) if t.startswith("re:") else t == name))
        return next(named, "Linear" if "Linear" in targets else None)

    head, _, leaf = prefix.rpartition(".")
    parts = [f"{head}.{part}" for part in packed.get(leaf, (leaf,))]
    if leaf == "experts":
        parts = [f"{prefix}.0.{part}_proj" for part in ("gate", "up", "down")]
    found = [find(prefix) or find(part) for part in parts]
    if None in found:
        raise RefusalError(f"{prefix}: no target for {parts}")
    groups_found = [targets[str(target)] for target in found]
    if any(group != groups_found[0] for group in groups_found):
        raise RefusalError(f"{prefix}: its parts are in different groups")
    return {**quantization, "config_groups": {"": groups_found[0]}, "format": groups_found[0]["format"]}


def _expected(quantization: Mapping[str, Any]) -> list[str]:
    if quantization["quant_method"] == "fp8":
        return ["weight", "weight_scale_inv"]
    (group,) = quantization["config_groups"].values()
    if group["weights"]["type"] == "int":
        if quantization["format"] != "pack-quantized":
            raise RefusalError("integers come as pack-quantized")
        names = ["weight_packed", "weight_scale", "weight_shape"]
        return names if group["weights"]["symmetric"] else [*names, "weight_zero_point"]
    if group["weights"]["num_bits"] == 4:
        packed = ["weight_packed", "weight_scale"]
        return [*packed, "weight_global_scale"] if group["weights"]["strategy"] == "tensor_group" else packed
    if quantization["format"] != "float-quantized":
        raise RefusalError("floats come as float-quantized")
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
        shared = {"tensor": "weight_scale", "tensor_group": "weight_global_scale"}
        if (part := shared.get(group["weights"]["strategy"])) is not None:
            # vLLM rounds the parts of a fused layer again, to the largest scale among them; of global scales it takes
            # the largest for all parts (schemes/compressed_tensors_w4a16_nvfp4.py).
            if len({float(values[f"{module}.{part}"].reshape(-1)[0]) for module in modules}) > 1:
                raise RefusalError(f"{prefix}: its parts have different scales")
            return
    if _block(quantization) and len(modules) > 1:
        # Every part but the last one of a fused layer must be whole blocks high.
        for module in modules[:-1]:
            if shapes[f"{module}.weight"][0] % 128:
                raise RefusalError(f"{prefix}: {module} has {shapes[f'{module}.weight'][0]} rows")


def _check_partitions(config: Mapping[str, Any], view: View) -> None:
    """in_proj counts as five outputs: gate, x, B, C, dt."""
    heads, size, groups, states = (config[key] for key in view.in_proj)
    inner, state = heads * size, groups * states
    if any(rows % 128 for rows in (inner, inner, state, state)):
        raise RefusalError("a part of in_proj is not whole blocks high")
