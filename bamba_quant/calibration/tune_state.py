"""The state file from which an interrupted tuning goes on: safetensors, with what it belongs to in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.calibration.tune_options import TuneError
from bamba_quant.checkpoint.base import read_tensor
from bamba_quant.checkpoint.safetensors_file import read_metadata, read_safetensors
from bamba_quant.errors import CheckpointError
from bamba_quant.files.json_file import parse_json
from bamba_quant.planning import safetensors_layout
from bamba_quant.writers.atomic import atomic_files
from bamba_quant.writers.stream import write_at
from bamba_reference.errors import repr_short

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "bamba_quant.tune"
_DTYPES = {"float32": "F32", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class TuneState:
    """``arrays`` of float32, int8 or uint8 by name, and ``about``: plain values."""

    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]


def write_state(
    file: Path, tensors: Mapping[str, Tensor], belongs: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write the state whole, or leave the file as it was. Raises ``OutputError``.

    ``belongs`` must be the same in a run that goes on from here. Tensors are copied from their device one at a time.
    """
    parts = [
        [
            safetensors_layout.tensor_part(
                name, _DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)
            )
        ]
        for name, tensor in tensors.items()
    ]
    header = json.dumps({"belongs": belongs, "about": about})
    placed = [part for (part,) in safetensors_layout.place_parts(parts, None)]
    (shard,) = safetensors_layout.pack_shards(placed, {_KEY: header})
    with atomic_files([(file, shard.n_bytes)], overwrite=True) as (descriptor,):
        write_at(descriptor, 0, np.frombuffer(shard.header, np.uint8))
        for part in shard.parts:
            array = np.ascontiguousarray(tensors[part.name].detach().cpu().numpy())
            write_at(descriptor, len(shard.header) + part.offset, array.reshape(-1).view(np.uint8))


def is_state(file: Path) -> bool:
    """Whether ``file`` is the state of a tuning, of this run or another."""
    try:
        return _KEY in read_metadata(file)
    except CheckpointError:
        return False


def state_belongs(file: Path) -> dict[str, Any]:
    """What the run of a state was, nothing for another file. Raises ``CheckpointError`` for a damaged one."""
    found = parse_json(read_metadata(file).get(_KEY, "null").encode(), f"{file}, {_KEY}")
    belongs = found.get("belongs") if isinstance(found, dict) else None
    return belongs if isinstance(belongs, dict) else {}


def read_state(file: Path, belongs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> TuneState:
    """The state in ``file``. Raises ``TuneError`` for one of another run, ``CheckpointError`` for a damaged file.

    ``shapes`` are the arrays that it must have.
    """
    found = parse_json(read_metadata(file).get(_KEY, "null").encode(), f"{file}, {_KEY}")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), dict) for key in ("belongs", "about")
    ):
        raise TuneError(
            "this is not the state of tuning",
            where=file,
            found=repr_short(found),
            fix="tune without --resume, or name another file (--tune-state)",
        )
    wanted = json.loads(json.dumps(belongs))
    other = [key for key in {*wanted, *found["belongs"]} if wanted.get(key) != found["belongs"].get(key)]
    if other:
        key = min(other)
        raise TuneError(
            "the state belongs to another run",
            where=file,
            found=f"{key} {repr_short(found['belongs'].get(key))}",
            expected=f"{key} {repr_short(wanted.get(key))}",
            fix="tune with the same models, texts and options, or without --resume",
        )
    tensors = read_safetensors(file, quantized=True)
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise TuneError(
                "the tuning state lacks a tensor of this run",
                where=file,
                found=f"no {name}",
                fix="tune without --resume",
            )
        if tensor.shape != shape or tensor.format.name.upper() not in _DTYPES.values():
            raise TuneError(
                "a tensor of the tuning state has another shape or dtype than in this run",
                where=f"{file}, {name}",
                found=f"{tensor.format.name} {tensor.shape}",
                expected=f"{' or '.join(_DTYPES.values())} {shape}",
                fix="tune without --resume",
            )
    return TuneState({name: read_tensor(tensors[name]) for name in shapes}, found["about"])
