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
from bamba_quant.codecs.base import Encode, Method, Part, Parts
from bamba_quant.codecs.integers.grid import Grid, pack
from bamba_quant.codecs.integers.pack_quantized import ABOUT, GROUPS, as_stored
from bamba_quant.codecs.integers.search import quantize
from bamba_quant.codecs.safetensors import Ignored, SafetensorsCodec


def plain_int4(group: int) -> SafetensorsCodec:
    """The scheme whose scales and zeros cover ``group`` columns each."""
    grid = Grid(4, "float", group)

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
        methods=tuple(Method(name, about(name), *_encoders(grid, name)) for name in ABOUT),
        configuration=partial(configuration, group=group),
        kernels="a GPU with torchao's mslk kernels",
        fits=lambda rows, columns: "" if columns % group == 0 else f"columns in multiples of {group}",
        metadata=partial(metadata, describe=partial(_describe, group=group)),
    )


def scheme_name(group: int, tile_packed: bool = False) -> str:
    return f"torchao-int4{'-tile-packed' if tile_packed else ''}-g{group}"


def about(method: str) -> str:
    return "the whole range, as torchao takes it" if method == "rtn" else ABOUT[method]


def _encoders(grid: Grid, method: str) -> tuple[Encode, Callable[[], Encode]]:
    def encode(x: F32, importance: F32 | None, shared: Any) -> Parts:
        groups = quantize(grid, method, x, importance)
        return _parts(pack(groups.codes, 4, 0), groups.scale, groups.zero)

    def compiled() -> Encode:
        from bamba_quant.codecs.integers.compiled import quantizer

        run = quantizer(grid, method, 0)
        return lambda x, importance, shared: _parts(*run(x, importance))

    return encode, compiled


def _parts(packed: Array, scale: F32, zero: F32) -> Parts:
    return {
        "._weight_qdata": packed.view(np.int8),
        "._weight_scale": np.ascontiguousarray(as_stored(scale).T),
        "._weight_zero_point": np.ascontiguousarray(as_stored(zero).T),
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
    """What torchao's ``flatten_tensor_state_dict`` says of every tensor, and in which order they stand."""
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
