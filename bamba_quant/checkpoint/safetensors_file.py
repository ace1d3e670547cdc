"""A safetensors header, read and checked against the file's size before any weight is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bamba_quant.checkpoint.base import StoredTensor, are_counts, is_shape
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.codecs.base import DTYPES as DTYPES_OF_PARTS
from bamba_quant.errors import CheckpointError, repr_short
from bamba_quant.files.json_file import JSON_BYTES, parse_json
from bamba_quant.files.reading import file_changed, opened

# Names of the safetensors specification: dtypes of weights, and of the codes and scales of quantized weights.
DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_MOST_TENSORS = 1 << 17  # of one file, as of a GGUF
SIDE_DTYPES = ("F8_E4M3", "I64", "I32", "I8", "U8")


def read_safetensors(file: Path, *, quantized: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of one file by name; with ``quantized`` codes and whole numbers too, whose format has their dtype.

    Raises ``CheckpointError`` for a file that is truncated or not a safetensors file.
    """
    header, data_start, size = _header(file)
    formats = {dtype: codec_named(name, BlockCodec) for dtype, name in DTYPES.items()}
    if quantized:
        formats |= {dtype: _plain(dtype) for dtype in SIDE_DTYPES}
    tensors = {
        name: _tensor(file, name, entry, data_start, size, formats)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_tiling(file, tensors, data_start, size)
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of one file. Raises as ``read_safetensors``."""
    return dict(_header(file)[0].get("__metadata__", {}))


def _plain(dtype: str) -> BlockCodec:
    """A format for numbers that are not weights."""
    numpy_dtype = DTYPES_OF_PARTS[dtype]
    return BlockCodec(
        name=dtype.lower(),
        ggml_type=-1,
        block_size=1,
        block_bytes=numpy_dtype.itemsize,
        dequantize=partial(_refuse, dtype),
        dtype=numpy_dtype,
    )


def _refuse(dtype: str, *arrays: Any) -> NoReturn:
    raise CheckpointError("these numbers are not weights", found=dtype)


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    with opened(file) as (stream, size):
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(JSON_BYTES, size - 8):
            raise CheckpointError(
                "the file is not a complete safetensors file",
                where=file,
                found=f"{size} bytes, with a header length of {length} bytes",
                expected=f"8 bytes of header length, a header of at most {JSON_BYTES:,} bytes, then the weights",
                fix="fetch the file again (a Git LFS pointer is a small text file in its place)",
            )
        header = stream.read(length)
        if len(header) != length:
            raise file_changed(file, 8 + len(header), size)
    parsed = parse_json(header, f"{file}, its header")
    metadata = parsed.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(
            "the metadata of a safetensors header is malformed",
            where=f"{file}, __metadata__",
            found=repr_short(metadata),
            expected="an object of strings",
        )
    if len(parsed) > _MOST_TENSORS:
        raise CheckpointError(
            "a safetensors file has too many tensors",
            where=file,
            found=f"{len(parsed):,}",
            expected=f"at most {_MOST_TENSORS:,}",
            fix="save the model in several files",
        )
    return parsed, 8 + length, size


def _tensor(
    file: Path, name: str, entry: Any, data_start: int, size: int, formats: Mapping[str, BlockCodec]
) -> StoredTensor:
    where = f"{file}, tensor {name}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (
        isinstance(dtype, str)
        and isinstance(shape, list)
        and is_shape(shape)
        and isinstance(offsets, list)
        and are_counts(offsets)
        and len(offsets) == 2
    ):
        raise CheckpointError(
            "a tensor's entry in a safetensors header is malformed",
            where=where,
            found=repr_short(entry),
            expected="dtype (a name), shape (at most 32 lengths; less than 2^63 bytes in all) and "
            "data_offsets (two whole numbers of at least 0)",
        )
    begin, end = offsets
    if dtype not in formats:
        raise CheckpointError(
            "a tensor has a dtype that is not supported for weights",
            where=where,
            found=repr_short(dtype),
            expected=", ".join(formats),
            fix="give the unquantized checkpoint (bf16, f16 or f32)"
            + ("; config.json has no quantization_config" if dtype in SIDE_DTYPES else ""),
        )
    tensor = StoredTensor(name, tuple(shape), formats[dtype], file, data_start + begin)
    if end - begin != tensor.n_bytes:
        raise CheckpointError(
            "a tensor's byte range does not fit its shape",
            where=where,
            found=f"{end - begin} bytes",
            expected=f"{math.prod(shape)} × {tensor.format.block_bytes} bytes",
        )
    if data_start + end > size:
        raise CheckpointError(
            "a safetensors file is truncated",
            where=where,
            found=f"{size} bytes in the file",
            expected=f"at least {data_start + end}",
            fix="fetch the file again",
        )
    return tensor


def _check_tiling(file: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    """The specification's rule: tensors are contiguous, without a gap or an overlap, up to the end of the file."""
    position, before = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != position:
            raise CheckpointError(
                "tensors of a safetensors file leave a gap or overlap",
                where=f"{file}, tensor {tensor.name}",
                found=f"begins at byte {tensor.offset - data_start} of the data",
                expected=f"{position - data_start}, where {before} ends",
                fix="fetch the file again, or write it again with the safetensors library",
            )
        position, before = tensor.offset + tensor.n_bytes, tensor.name
    if position != size:
        raise CheckpointError(
            "a safetensors file has bytes after its last tensor",
            where=file,
            found=f"{size} bytes",
            expected=f"{position}, where {before} ends",
            fix="fetch the file again, or write it again with the safetensors library",
        )
