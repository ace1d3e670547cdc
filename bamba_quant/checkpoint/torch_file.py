"""A ``pytorch_model*.bin`` as named byte ranges, found by torch's weights-only loader: no pickled code runs."""

from __future__ import annotations

import zipfile
from pathlib import Path

from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.errors import CheckpointError
from bamba_quant.formats import format_named


def read_torch_file(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name, without reading a weight.

    Under a fake-tensor mode ``torch.load`` gives each storage the offset of its bytes in the (uncompressed) zip
    file: https://docs.pytorch.org/docs/stable/notes/serialization.html. Raises ``CheckpointError`` for a file of
    the format before torch 1.6, for anything but tensors in it, and for tensors that are not contiguous.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    if not file.is_file():
        raise CheckpointError("a file of the checkpoint is missing", where=file)
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            "a .bin file is no zip archive",
            where=file,
            expected="the format torch writes since 1.6",
            fix="fetch the file again, or save the model as safetensors",
        )
    try:
        with FakeTensorMode():
            state = torch.load(file, weights_only=True, map_location="cpu")
    # torch.load raises whatever its unpickler and zip reader raise, so the cause is quoted, not judged.
    except Exception as error:
        raise CheckpointError(
            "torch cannot read a file of the checkpoint as weights alone",
            where=file,
            found=str(error).splitlines()[0],
            expected="a dictionary of tensors saved by torch 1.6 or later",
            fix="fetch the file again, or save the model as safetensors",
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            "a .bin file holds no dictionary of tensors", where=file, found=type(state).__name__
        )
    tensors: dict[str, StoredTensor] = {}
    for name, value in state.items():
        where = f"{file}, tensor {name}"
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                "a .bin file holds something that is no tensor", where=where, found=type(value).__name__
            )
        if value.dtype not in names:
            raise CheckpointError(
                "a tensor has a dtype that weights cannot be read from",
                where=where,
                found=str(value.dtype).removeprefix("torch."),
                expected=", ".join(names.values()),
            )
        start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not value.is_contiguous():
            raise CheckpointError(
                "a tensor of a .bin file does not lie in one piece",
                where=where,
                found=f"strides {tuple(value.stride())} for shape {tuple(value.shape)}",
                fix="save the model as safetensors",
            )
        offset = int(start) + value.storage_offset() * value.element_size()
        tensors[str(name)] = StoredTensor(
            str(name), tuple(value.shape), format_named(names[value.dtype]), file, offset
        )
    size = file.stat().st_size
    for tensor in tensors.values():
        if tensor.offset + tensor.n_bytes > size:
            raise CheckpointError(
                "a .bin file is truncated",
                where=f"{file}, tensor {tensor.name}",
                found=f"{size} bytes",
                expected=f"at least {tensor.offset + tensor.n_bytes}",
            )
    return tensors
