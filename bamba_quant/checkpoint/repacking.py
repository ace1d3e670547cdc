"""Rows of a weight as its format takes them, put back into the bytes of the stored tensors that it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bamba_quant.checkpoint.base import RawReader, Section, StoredTensor, row_runs
from bamba_quant.checkpoint.packed import PackedTensor, ScaleTensor
from bamba_quant.checkpoint.stack import StackedTensor
from bamba_quant.codecs.arrays import U8

StoredArrays = dict[str, NDArray[Any]]


def repack(tensor: StoredTensor, raw: U8, into: StoredArrays) -> None:
    """Put all rows of ``tensor``, uint8 (rows, ``row_bytes``), into the tensors of the file by their names there.

    ``into`` gains or keeps uint8 (rows of the whole, bytes) of a plain tensor, and of a packed one its codes and the
    scales that are a row's own, in their dtype and shape; a tensor that several weights share is read from the file
    once and filled by each. Zeros, and scales that rows share, stay the file's.
    """
    if isinstance(tensor, StackedTensor):
        for matrix, rows in zip(tensor.matrices, np.split(raw, len(tensor.matrices)), strict=True):
            repack(matrix, rows, into)
        return
    if not isinstance(tensor, PackedTensor):
        section = tensor.section
        count = tensor.rows if section is None else tensor.rows // section.length * section.period
        whole = _whole(tensor.name, tensor, np.dtype(np.uint8), (count, tensor.row_bytes), into)
        _put(tensor.section, whole, raw)
        return
    codes = tensor.codes
    dtype = codes.tensor.format.dtype
    assert dtype is not None
    whole = _whole(codes.tensor.name, codes.tensor, dtype, codes.tensor.shape, into)
    indices = whole.view(np.uint8).reshape(len(whole), -1)
    packed = raw[:, : codes.row_bytes]
    if codes.order is None:
        _put(tensor.section, indices, packed)
    else:
        indices[:] = codes.order.stored(packed, indices)
    if tensor.scale.rows == 1:
        at = codes.row_bytes
        numbers = np.ascontiguousarray(raw[:, at : at + 4 * tensor.scale.width]).view(np.float32)
        _put_numbers(tensor.section, tensor.scale, numbers, into)


def _put_numbers(
    section: Section | None, part: ScaleTensor, numbers: NDArray[np.float32], into: StoredArrays
) -> None:
    dtype = part.tensor.format.dtype
    assert dtype is not None
    whole = _whole(part.tensor.name, part.tensor, dtype, part.tensor.shape, into)
    if part.axis == 0:
        stored = numbers.astype(dtype) if part.pack is None else part.pack(numbers)
        _put(section, whole.reshape(len(whole), -1), stored)
    else:
        items = whole.reshape(*whole.shape[:2], -1)[..., part.item]  # (numbers of a row, rows), a view
        _put(section, items.T, numbers.astype(dtype))


def _put(section: Section | None, whole: NDArray[Any], rows: NDArray[Any]) -> None:
    for row, place, count in row_runs(section, 0, len(rows)):
        whole[place : place + count] = rows[row : row + count]


def _whole(
    name: str, tensor: StoredTensor, dtype: np.dtype[Any], shape: tuple[int, ...], into: StoredArrays
) -> NDArray[Any]:
    """What ``into`` holds of a stored tensor so far, at first what the file holds."""
    if name not in into:
        whole = np.empty(shape, dtype)
        with RawReader() as reader:
            reader.read_into(tensor.file, tensor.offset, whole.view(np.uint8).reshape(-1))
        into[name] = whole
    return into[name]
