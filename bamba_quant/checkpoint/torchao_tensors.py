"""torchao's tensors as its safetensors support flattens them: int4 plain or in tiles, e4m3 by row.

The shards' headers describe each tensor, as JSON by name (torchao 0.18, prototype/safetensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bamba_quant.checkpoint.assemble import E4M3, WeightAssembler, are_two_lengths
from bamba_quant.checkpoint.dequantize import Float8Dequantizer, IntegerDequantizer, TorchaoTiles
from bamba_quant.checkpoint.packed import Activations, CodeTensor, ScaleTensor
from bamba_quant.checkpoint.safetensors_file import read_metadata
from bamba_quant.codecs.integers.grid import IntegerGrid
from bamba_quant.codecs.integers.torchao_tiles import TILE, padded
from bamba_quant.errors import repr_short
from bamba_quant.files.json_file import parse_json

_PLAIN = "Tensor"


def read_torchao(quantization: Mapping[str, Any], stored: WeightAssembler) -> None:
    """Assemble what belongs together by the headers. Raises ``CheckpointError`` naming what cannot be read."""
    for name, described in _descriptions(stored).items():
        kind = described.get("_type")
        if kind == _PLAIN:
            continue
        if not isinstance(kind, str) or kind not in _KINDS:
            expected = ", ".join((_PLAIN, *_KINDS))
            raise stored.unsupported(f"tensor {name}", repr_short(kind), expected)
        data = described.get("_data")
        shape, block = ((data if isinstance(data, dict) else {}).get(key) for key in ("shape", "block_size"))
        if kind == "Float8Tensor":
            qdata = stored.get(_part_name(name, "qdata"))
            shape = list(qdata.shape) if shape is None and qdata is not None else shape
        parts = described.get("_tensor_data_names")
        has_parts = isinstance(parts, list) and _has_parts(parts, _KINDS[kind])
        if not (are_two_lengths(shape) and are_two_lengths(block) and has_parts):
            expected = f"{kind} of {sorted(_KINDS[kind])}"
            raise stored.unsupported(f"tensor {name}", repr_short(described), expected)
        _ASSEMBLE[kind](stored, name, *shape, *block)
        activations = _activations_torchao(data) if isinstance(data, dict) else None
        stored.weights[name] = replace(stored.weights[name], activations=activations)


_KINDS = {
    "Int4Tensor": {"qdata", "scale", "zero_point"},
    "Int4TilePackedTo4dTensor": {"qdata", "scale_and_zero"},
    "Float8Tensor": {"qdata", "scale"},
}


def _descriptions(stored: WeightAssembler) -> dict[str, dict[str, Any]]:
    """The JSON of every tensor, from the headers of all files."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted({tensor.file for tensor in stored.remaining().values()}):
        for name, text in read_metadata(file).items():
            if "." in name:
                described = parse_json(text.encode(), f"{file}, __metadata__ of {name}")
                found[name.removeprefix(stored.prefix)] = described
    if not found:
        raise stored.unsupported(
            "__metadata__", "nothing from torchao", "a type by tensor name", "the checkpoint"
        )
    return found


def _has_parts(parts: list[Any], expected: set[str]) -> bool:
    return all(isinstance(part, str) for part in parts) and set(parts) == expected


def _part_name(name: str, part: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_{part}"


def _int4(stored: WeightAssembler, name: str, rows: int, columns: int, height: int, group: int) -> None:
    _check_groups(stored, name, columns, height, group)
    codes = stored.take(_part_name(name, "qdata"), ("i8", "u8"), ((rows, columns // 2),))
    transposed = (columns // group, rows)
    scale = stored.take(_part_name(name, "scale"), shapes=(transposed,))
    zero = stored.take(_part_name(name, "zero_point"), shapes=(transposed,))
    values = IntegerDequantizer(IntegerGrid(4, "float", group), 0, columns, scale.format.name)
    described = f"torchao-int4-g{group}"
    stored.add(
        name, described, (rows, columns), values, codes, ScaleTensor(scale, axis=1), ScaleTensor(zero, axis=1)
    )


def _tiles(stored: WeightAssembler, name: str, rows: int, columns: int, height: int, group: int) -> None:
    _check_groups(stored, name, columns, height, group)
    wide = padded(columns)
    tiles = stored.take(_part_name(name, "qdata"), ("i32",), ((-(-rows // TILE), wide // 128, 4 * TILE, 4),))
    tall = tiles.shape[0] * TILE
    both = stored.take(
        _part_name(name, "scale_and_zero"), shapes=((wide // group, tall, 2), (wide // group, rows, 2))
    )
    codes = CodeTensor(tiles, columns // 2, TILE, TorchaoTiles(columns))
    values = IntegerDequantizer(IntegerGrid(4, "float", group), 0, columns, both.format.name)
    described = f"torchao-int4-tile-packed-g{group}"
    scale, zero = (ScaleTensor(both, axis=1, item=item) for item in (0, 1))
    stored.add(name, described, (rows, columns), values, codes, scale, zero)


def _check_groups(stored: WeightAssembler, name: str, columns: int, height: int, group: int) -> None:
    if height != 1 or group % 32 or columns % group:
        found = f"blocks of {height} × {group}"
        raise stored.unsupported(f"tensor {name}", found, "1 × a multiple of 32 that fills a row")


def _float8(stored: WeightAssembler, name: str, rows: int, columns: int, height: int, width: int) -> None:
    if (height, width) != (1, columns):
        raise stored.unsupported(f"tensor {name}", f"blocks of {height} × {width}", "a scale a row")
    codes = stored.take(_part_name(name, "qdata"), (E4M3,), ((rows, columns),))
    scale = stored.take(_part_name(name, "scale"), shapes=((rows, 1),))
    stored.add(
        name,
        "e4m3 by row",
        (rows, columns),
        Float8Dequantizer(columns, width, "bf16"),
        codes,
        ScaleTensor(scale),
    )


_ASSEMBLE = {"Int4Tensor": _int4, "Int4TilePackedTo4dTensor": _tiles, "Float8Tensor": _float8}


def _activations_torchao(described: Mapping[str, Any]) -> Activations | None:
    """The rounding of activations in the ``_data`` of torchao's ``Float8Tensor``, None without any."""
    given = described.get("act_quant_kwargs")
    return None if given is None else Activations(unknown=f"act_quant_kwargs {repr_short(given)}")
