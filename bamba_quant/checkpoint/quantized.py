"""Checkpoints whose config.json has a ``quantization_config``: several stored tensors become one weight each.

Whatever is not understood is an error that names it: an unknown method, a tensor that belongs to no weight, a weight
that lacks a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bamba_quant.checkpoint.assemble import WeightAssembler
from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.checkpoint.compressed_tensors import read_compressed_tensors
from bamba_quant.checkpoint.hf_fp8 import read_hf_fp8
from bamba_quant.checkpoint.modelopt import METHOD, read_modelopt
from bamba_quant.checkpoint.safetensors_file import SIDE_DTYPES
from bamba_quant.checkpoint.torchao_tensors import read_torchao
from bamba_quant.errors import CheckpointError, repr_short

_KEY = "quantization_config"
_METHODS: dict[str, Callable[[Mapping[str, Any], WeightAssembler], None]] = {
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_hf_fp8,
    METHOD: read_modelopt,
    "torchao": read_torchao,
}
_SIDE_FORMATS = frozenset(dtype.lower() for dtype in SIDE_DTYPES)


def is_quantized(config: Mapping[str, Any]) -> bool:
    return config.get(_KEY) is not None


def assemble_weights(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], directory: Path, prefix: str = ""
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The weights that ``tensors``, all those of a directory, make up under the configuration's method, by name.

    With them the names of tensors that only quantized activations need. ``prefix`` was removed from the names of
    ``tensors``; those in the files' headers have it. Raises ``CheckpointError`` for a method that is not known, and
    naming the tensor that does not fit.
    """
    quantization = config[_KEY]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            "the checkpoint's quantization method is not supported",
            where=f"{directory / 'config.json'}, {_KEY}",
            found=f"quant_method {repr_short(method)}",
            expected="one of " + ", ".join(_METHODS),
            fix=f"give the unquantized checkpoint; if its weights are plain, remove {_KEY}",
        )
    stored = WeightAssembler(directory, tensors, prefix)
    stored.split_stacks()
    _METHODS[method](quantization, stored)
    for name, tensor in stored.remaining().items():
        if tensor.format.name in _SIDE_FORMATS:
            raise CheckpointError(
                "a tensor of a quantized checkpoint does not belong to any weight",
                where=f"{tensor.file}, tensor {name}",
                found=f"{tensor.format.name} of shape {tensor.shape}",
                expected=f"a weight as {method} stores it",
            )
    return stored.assembled(), tuple(sorted(stored.unused))
