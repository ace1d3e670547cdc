"""What a quantized checkpoint says of the activations that enter a matrix: in which groups they are rounded to e4m3."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Strategy = Literal["token", "tensor", "group"]
_EXPECTED = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}


@dataclass(frozen=True)
class Activations:
    """e4m3 under scales found as activations come: one a token, one a tensor, or one for ``group`` columns of a token.

    ``unknown`` describes any other rounding, which nothing here can do; the rest then has no meaning.
    """

    strategy: Strategy = "token"
    group: int = 0
    unknown: str = ""

    def __str__(self) -> str:
        return self.unknown or f"e4m3 by {self.group or self.strategy}"


def activations_of_group(group: Mapping[str, Any]) -> Activations | None:
    """What a group of compressed-tensors' ``config_groups`` says, None where activations stay as they are."""
    inputs, outputs = group.get("input_activations"), group.get("output_activations")
    if not inputs and not outputs:
        return None
    found: Mapping[str, Any] = inputs if isinstance(inputs, dict) and not outputs else {}
    if all(type(found.get(key)) is type(value) and found[key] == value for key, value in _EXPECTED.items()):
        size = found.get("group_size")
        for strategy in get_args(Strategy):
            if strategy == found.get("strategy") and strategy != "group":
                return Activations(strategy)
        if found.get("strategy") == "group" and type(size) is int and size > 0:
            return Activations("group", size)
    return Activations(
        unknown=f"input_activations {reprlib.repr(inputs)}, output_activations {reprlib.repr(outputs)}"
    )


def activations_of_hf_fp8(quantization: Mapping[str, Any], width: int) -> Activations:
    """What transformers' own FP8 form says: groups as wide as the weights' blocks (finegrained_fp8.py)."""
    scheme = quantization.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        return Activations(unknown=f"activation_scheme {reprlib.repr(scheme)}")
    return Activations("group", width)


def activations_of_torchao(described: Mapping[str, Any]) -> Activations | None:
    """What the ``_data`` of torchao's ``Float8Tensor`` says, None where activations stay as they are."""
    given = described.get("act_quant_kwargs")
    return None if given is None else Activations(unknown=f"act_quant_kwargs {reprlib.repr(given)}")
