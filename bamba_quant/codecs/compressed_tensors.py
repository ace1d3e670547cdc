"""The ``quantization_config`` that compressed-tensors reads, transformers and vLLM through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bamba_quant.codecs.safetensors import Ignored


def compressed_tensors(ignored: Ignored, weights: dict[str, Any], activations: dict[str, Any] | None,
                       form: str) -> dict[str, Any]:  # fmt: skip
    """compressed-tensors' configuration of one group over all linear layers, with every key that it writes."""
    unset: dict[str, Any] = {"observer_kwargs": {}, "scale_dtype": None, "zp_dtype": None}
    absent = {"actorder": None, "block_structure": None, "group_size": None}
    weights = (
        {"symmetric": True, "dynamic": False, "observer": "memoryless_minmax"} | absent | unset | weights
    )
    if activations is not None:
        activations = {"symmetric": True, "dynamic": True, "observer": None} | absent | unset | activations
    group = {
        "format": form,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": _listed(ignored),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        # Without this transformers loads the codes unscaled, and all logits are NaN.
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
    }


def several_groups(groups: Sequence[tuple[dict[str, Any], Ignored]]) -> dict[str, Any]:
    """The configuration of several groups, each the one of a ``compressed_tensors`` configuration and its layers.

    Layers are named, not their class: of names and a class vLLM looks for the class of a fused layer before it looks
    for the names of its parts (compressed_tensors/utils.py, ``find_matched_target``).
    """
    named = {
        f"group_{number}": each["config_groups"]["group_0"] | {"targets": _listed(layers)}
        for number, (each, layers) in enumerate(groups)
    }
    forms = {each["format"] for each, _ in groups}
    form = forms.pop() if len(forms) == 1 else "mixed-precision"
    return groups[0][0] | {"config_groups": named, "format": form}


def _listed(layers: Ignored) -> list[str]:
    return [*layers.unmatched, *(f"re:{pattern}" for pattern in layers.patterns)]
