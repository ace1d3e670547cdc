"""torchao's ``Int4Tensor`` in its plain packing: integers of 4 bits, a bfloat16 scale and float zero a group.

The bytes are those that torchao 0.18 flattens such a tensor to (prototype/safetensors), and every shard's header
carries the metadata of the whole checkpoint: transformers merges the headers, and the last list of names wins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bamba_quant.codecs.arrays import F32, Array
from bamba_quant.codecs.base import Part, Parts
from bamba_quant.codecs.integers.grid import IntegerGrid
from bamba_quant.codecs.integers.methods import GROUPS, as_bfloat16, integer_methods
from bamba_quant.codecs.safetensors import Ignored, SafetensorsCodec

WHOLE_RANGE = "the whole range, as torchao takes it"


def plain_int4(group: int) -> SafetensorsCodec:
    """The scheme whose scales and zeros cover ``group`` columns each."""
    grid = IntegerGrid(4, "float", group)

    def parts(rows: int, columns: int) -> tuple[Part, ...]:
        transposed = (columns // group, rows)
        return (
            Part("._weight_qdata", "I8", (rows, columns // 2)),
            Part("._weight_scale", "BF16", transposed, 1, 1),
            Part("._weight_zero_point", "BF16", transposed, 1, 1),
        )

    return SafetensorsCodec(
        name=scheme_name(group),
        about=f"torchao's plain int4, a scale and a float zero for {group} columns",
        tensors=parts,
        methods=integer_methods(grid, 0, _parts, WHOLE_RANGE),
        configuration=partial(configuration, group=group),
        kernels="a GPU with torchao's mslk kernels",
        fits=lambda rows, columns: "" if columns % group == 0 else f"columns in multiples of {group}",
        experts=False,
        metadata=partial(metadata, describe=partial(_describe, group=group)),
    )


def scheme_name(group: int, tile_packed: bool = False) -> str:
    return f"torchao-int4{'-tile-packed' if tile_packed else ''}-g{group}"


def _parts(packed: Array, scale: F32, zero: F32) -> Parts:
    return {
        "._weight_qdata": packed.view(np.int8),
        "._weight_scale": np.ascontiguousarray(as_bfloat16(scale).T),
        "._weight_zero_point": np.ascontiguousarray(as_bfloat16(zero).T),
    }


def configuration(ignored: Ignored, group: int, packing: str = "PLAIN") -> dict[str, Any]:
    """``TorchAoConfig(Int4WeightOnlyConfig(group_size=group))`` as transformers 5.23 writes it."""
    data = {
        "group_size": group,
        "set_inductor_config": True,
        "int4_packing_format": {"_type": "Int4PackingFormat", "_data": packing},
        "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
        "int4_tile_packed_ntile": 8,
    }
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": list(ignored.modules),
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": data}},
        "untie_embedding_weights": False,
    }


def metadata(
    matrices: Mapping[str, tuple[int, int]],
    others: Sequence[str],
    describe: Callable[[tuple[int, int]], dict[str, Any]],
) -> dict[str, str]:
    """The description of every tensor that torchao's ``flatten_tensor_state_dict`` writes, and their order."""
    described = {name: json.dumps({"_type": "Tensor"}) for name in others}
    described |= {name: json.dumps(describe(shape)) for name, shape in matrices.items()}
    return {"format": "pt", **described, "tensor_names": json.dumps(list(described))}


def _describe(shape: tuple[int, int], group: int) -> dict[str, Any]:
    data = {
        "activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        "block_size": [1, group],
        "shape": list(shape),
    }
    return {"_type": "Int4Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}


CODECS = tuple(plain_int4(group) for group in GROUPS)
