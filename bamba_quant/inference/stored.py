"""Matrices held in memory as their file stores them: dequantized one at a time, or as they are multiplied.

Values are those of ``LazyWeights``. A product of many rows of activations dequantizes the whole matrix into a buffer
that all of them share; a product of few, as each new token is, dequantizes some rows in the processor's cache. The
order of its sums differs from that of the other product.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bamba_quant.checkpoint.base import Shape
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.blocks import BlockCodec
from bamba_quant.codecs.compiled.rows import row_kernels
from bamba_quant.codecs.decoding import decode
from bamba_quant.inference.weights import LazyWeights, Timings
from bamba_reference.config import Config
from bamba_reference.tensors import WIDE, check_names, check_shape, tensor_shapes
from bamba_reference.torch.backend import Backend
from bamba_reference.torch.forward import stored_dtype, to_tensor
from bamba_reference.torch.ops import HEAD_ROWS, wide

# Rows of activations whose product is computed with rows of weights as they are dequantized: of more, dequantizing
# the matrix first costs less than the slower product.
_FEW = 32


class StoredMatrix:
    """A matrix (rows, columns) in the bytes of its file, or a stack of them, whose matrices an index gives.

    ``divisors`` (all rows, 1): the file holds each row times one of these.
    """

    def __init__(self, raw: U8, shape: Shape, codec: BlockCodec, divisors: F32 | None = None) -> None:
        self.raw, self.shape, self.codec, self.divisors = raw, shape, codec, divisors

    def __getitem__(self, index: int) -> StoredMatrix:
        rows = self.shape[-2]
        here = slice(index * rows, (index + 1) * rows)
        return StoredMatrix(
            self.raw[here], self.shape[1:], self.codec, None if self.divisors is None else self.divisors[here]
        )

    def __len__(self) -> int:
        return self.shape[0]

    def float32(self, start: int = 0, stop: int | None = None, out: F32 | None = None) -> F32:
        """Rows ``start`` to ``stop`` of a matrix, into ``out`` if given."""
        found = decode(self.codec, self.raw[start:stop], out)
        return found if self.divisors is None else np.divide(found, self.divisors[start:stop], out=found)

    def chosen(self, rows: Tensor) -> F32:
        """These rows of a matrix."""
        found = decode(self.codec, self.raw[rows.numpy()])
        return found if self.divisors is None else found / self.divisors[rows.numpy()]

    def product(self, x: Tensor) -> Tensor | None:
        """x (…, columns) times a matrix transposed, where it has code to do so as it is dequantized."""
        kernels = row_kernels(self.codec, self.shape[-1])
        if kernels is None or x.dtype != torch.float32 or not 0 < x.numel() <= _FEW * x.shape[-1]:
            return None
        flat = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
        y = kernels.product(self.raw, flat)
        y = y if self.divisors is None else y / self.divisors[:, 0]
        return torch.from_numpy(y).view(*x.shape[:-1], self.shape[-2])


def held(weights: LazyWeights, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """A model's weights in memory: a ``StoredMatrix`` where that is smaller, else what ``torch.forward.load`` makes.

    Raises ``TensorError`` as that does.
    """
    check_names(config, weights)
    shapes = tensor_shapes(config)

    def weight(name: str) -> Any:
        check_shape(name, weights.info(name).shape, shapes[name])
        if held_bytes(weights, name, dtype) is None:
            return to_tensor(weights[name], stored_dtype(name, dtype), torch.device("cpu"))
        tensor, rule, moved = weights.stored(name)
        raw, _ = weights.raw(name, 0, shapes[name][0], Timings())
        if not moved:
            return StoredMatrix(raw, shapes[name], tensor.format)
        moves, divisors = rule.transform.scaled_moves(0, tensor.rows)
        return StoredMatrix(moves.invert(raw, 0), shapes[name], tensor.format, divisors)

    # Copying bytes from the page cache keeps a core busy.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(shapes, pool.map(weight, shapes), strict=True))


def held_bytes(weights: LazyWeights, name: str, dtype: torch.dtype) -> int | None:
    """The bytes of a matrix as it is stored, if it can be held so and is smaller than in ``dtype``."""
    tensor, rule, moved = weights.stored(name)
    n_bytes = tensor.rows * tensor.row_bytes
    plain = len(rule.shape) == 1 or name.endswith(WIDE) or (moved and not rule.transform.scales_rows_at_most)
    return None if plain or n_bytes >= tensor.elements * dtype.itemsize else n_bytes


def with_stored(backend: Backend, dtype: torch.dtype) -> Backend:
    """``backend`` for a CPU model of ``dtype`` whose matrices may be ``StoredMatrix``."""
    buffer = np.empty(0, np.float32)

    def whole(weight: StoredMatrix, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a matrix in ``dtype``, in the buffer if that is float32: until the next call."""
        nonlocal buffer
        rows, columns = len(weight.raw[start:stop]), weight.shape[-1]
        if buffer.size < rows * columns:
            buffer = np.empty(0, np.float32)  # freed first
            buffer = np.empty(rows * columns, np.float32)
        found = weight.float32(start, stop, buffer[: rows * columns].reshape(rows, columns))
        return torch.from_numpy(found).to(dtype)

    def linear(x: Tensor, weight: Any, bias: Tensor | None, name: str) -> Tensor:
        if not isinstance(weight, StoredMatrix):
            return backend.linear(x, weight, bias, name)
        y = weight.product(x)
        if y is None:
            return backend.linear(x, whole(weight), bias, name)
        return y if bias is None else y.add_(bias)

    def head(x: Tensor, weight: Any, name: str) -> Tensor:
        if not isinstance(weight, StoredMatrix):
            return backend.head(x, weight, name)
        logits = weight.product(x)
        if logits is not None:
            return logits
        logits = x.new_empty(*x.shape[:-1], len(weight), dtype=wide(x.dtype))
        for start in range(0, len(weight), HEAD_ROWS):
            stop = min(len(weight), start + HEAD_ROWS)
            logits[..., start:stop] = backend.head(x, whole(weight, start, stop), name)
        return logits

    def embedding(ids: Tensor, weight: Any) -> Tensor:
        if not isinstance(weight, StoredMatrix):
            return F.embedding(ids, weight)
        used, places = ids.unique(return_inverse=True)
        return F.embedding(places, torch.from_numpy(weight.chosen(used)).to(dtype))

    return replace(
        backend.with_linear(linear, head=head, embedding=embedding),
        name=f"{backend.name}, weights as stored",
        parallel=False,  # because of the buffer
    )
