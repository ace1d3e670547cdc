"""torchao's tensors as its safetensors support flattens them: ``Int4Tensor`` in plain packing, e4m3 by row.

Which tensor is what stands in the shards' headers, as JSON by name (torchao 0.18, prototype/safetensors).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeGuard

from bamba_quant.checkpoint.joining import E4M3, Stored, e4m3_decoder, integer_decoder, rounded_as
from bamba_quant.checkpoint.packed import Beside
from bamba_quant.checkpoint.safetensors_file import read_metadata
from bamba_quant.formats.base import F32, U8
from bamba_quant.formats.integers import Grid

_PLAIN = "Tensor"


def read_torchao(quantization: Mapping[str, Any], stored: Stored) -> None:
    """Join what the headers say belongs together. Raises ``CheckpointError`` naming what cannot be read."""
    for name, described in _descriptions(stored).items():
        kind = described.get("_type")
        if kind == _PLAIN:
            continue
        if kind not in _KINDS:
            expected = ", ".join((_PLAIN, *_KINDS))
            raise stored.unsupported("a weight", f"tensor {name}", reprlib.repr(kind), expected)
        data = described.get("_data")
        shape, block = ((data if isinstance(data, dict) else {}).get(key) for key in ("shape", "block_size"))
        if kind == "Float8Tensor":
            qdata = stored.left().get(_part(name, "qdata"))
            shape = list(qdata.shape) if shape is None and qdata is not None else shape
        parts = described.get("_tensor_data_names")
        if not (_two(shape) and _two(block) and isinstance(parts, list) and set(parts) == _KINDS[kind]):
            raise stored.unsupported(
                "a weight", f"tensor {name}", reprlib.repr(described), f"{kind} of {sorted(_KINDS[kind])}"
            )
        (_int4 if kind == "Int4Tensor" else _float8)(stored, name, *shape, *block)


_KINDS = {"Int4Tensor": {"qdata", "scale", "zero_point"}, "Float8Tensor": {"qdata", "scale"}}


def _descriptions(stored: Stored) -> dict[str, dict[str, Any]]:
    """The JSON of every tensor, from the headers of all files."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted({tensor.file for tensor in stored.left().values()}):
        for name, text in read_metadata(file).items():
            if "." not in name:
                continue
            try:
                described = json.loads(text)
            except (TypeError, ValueError):
                described = None
            if not isinstance(described, dict):
                raise stored.unsupported(
                    "a header", f"{file.name}, {name}", reprlib.repr(text), "torchao's JSON"
                )
            found[name] = described
    if not found:
        raise stored.unsupported(
            "the checkpoint", "__metadata__", "no word of torchao's", "a type by tensor name"
        )
    return found


def _two(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _part(name: str, part: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_{part}"


def _int4(stored: Stored, name: str, rows: int, columns: int, height: int, group: int) -> None:
    if height != 1 or group % 32 or columns % group:
        raise stored.unsupported(
            "a weight",
            f"tensor {name}",
            f"blocks of {height} × {group}",
            "1 × a multiple of 32 that fills a row",
        )
    codes = stored.take(_part(name, "qdata"), ("i8", "u8"), ((rows, columns // 2),))
    transposed = (columns // group, rows)
    scale = stored.take(_part(name, "scale"), shapes=(transposed,))
    zero = stored.take(_part(name, "zero_point"), shapes=(transposed,))
    decode = integer_decoder(Grid(4, "float", group), 0, columns, scale.format.name)
    described = f"torchao-int4-g{group}"
    stored.add(name, described, columns, decode, codes, Beside(scale, axis=1), Beside(zero, axis=1))


def _float8(stored: Stored, name: str, rows: int, columns: int, height: int, width: int) -> None:
    if (height, width) != (1, columns):
        raise stored.unsupported(
            "a weight", f"tensor {name}", f"blocks of {height} × {width}", "a scale a row"
        )
    codes = stored.take(_part(name, "qdata"), (E4M3,), ((rows, columns),))
    scale = stored.take(_part(name, "scale"), shapes=((rows, 1),))
    exact = e4m3_decoder(columns, width, "f32")

    def decode(packed: U8, scales: F32, zeros: F32) -> F32:
        return rounded_as(exact(packed, scales, zeros), "bf16")

    stored.add(name, "e4m3 by row", columns, decode, codes, Beside(scale))
