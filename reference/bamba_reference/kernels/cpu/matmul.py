"""Matrix products of float32 near a core's peak, their sums added up in parts of 128 terms.

Both matrices are rearranged in memory first, so that a tile of the result reads them in order (Goto and van de
Geijn 2008): the activations once, the weights a block at a time, which costs less than reading them does. A sum
in one go has an error that grows with the square root of its terms; in parts of 128 that are added to the result it is
2.1e-7 for 512 terms, where MKL's is 2.4e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bamba_reference.kernels.cpu.launch import (
    FLOATS,
    SIZE,
    Floats,
    compiled,
    empty,
    inlined,
    memory,
    rows_apart,
    scratch,
    share,
    supported,
)
from bamba_reference.kernels.cpu.tiles import (
    LANES,
    ROWS,
    VECTORS,
    WIDE_TILES,
    WIDTH,
    multiply_1,
    multiply_2,
    multiply_3,
    transpose_lanes,
    transpose_rows,
)
from bamba_reference.torch import ops as torch_ops

# Terms that are summed in one go.
TERMS = 128

# Block sizes: columns and terms of the weights (1.5 MB), and rows of the activations with as many
# terms (0.4 MB, of a core's second cache).
BLOCK_COLUMNS, BLOCK_TERMS, BLOCK_ROWS = 8 * WIDTH, 1024, 12 * ROWS

# With fewer rows, rearranging the weights costs more than it saves.
LEAST_ROWS = 64

# Threads divide the columns of a product, for which they wait for the rearranged activations. A smaller product is done
# before that is worth while: each thread rearranges all weights for rows of its own, if they are enough.
LARGE, ROWS_OF_A_THREAD = 1 << 30, 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """``torch.ops.linear``: x (…, in) times weight (out, in) transposed, plus bias (out,): (…, out)."""
    if not _worthwhile(x, weight, bias):
        return torch_ops.linear(x, weight, bias, name)
    return matmul(x, weight, bias)


def head(x: Tensor, weight: Tensor, name: str) -> Tensor:
    """``torch.ops.head``: logits (…, V) of x (…, d) by weight (V, d)."""
    if not _worthwhile(x, weight):
        return torch_ops.head(x, weight, name)
    return matmul(x, weight, None)


def _worthwhile(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    fits = x.shape[-1] == weight.shape[1] and (bias is None or len(bias) == len(weight))
    return WIDE_TILES and fits and x.numel() >= LEAST_ROWS * x.shape[-1] and supported(x, weight, bias)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, in) times weight (out, in) transposed, plus bias (out,): (…, out)."""
    rows, weights = rows_apart(x), rows_apart(weight)
    (M, K), N = rows.shape, len(weights)
    panels, columns = -(-M // ROWS), -(-N // LANES)
    packed, out = scratch("rows", panels * K * ROWS), empty(M, N)
    given, matrix, products, step = memory(rows), memory(weights), memory(out), weights.stride(0)

    def multiply_columns(start: int, stop: int) -> None:
        """All activations by vectors start … stop of the weights."""
        _products(packed, matrix, products, _block(), M, N, K, step, start, stop)

    def multiply_rows(start: int, stop: int) -> None:
        """Panels start … stop of the activations by all weights."""
        _pack_rows(given, M, K, rows.stride(0), packed, start, stop)
        first, some = start * ROWS, min(M, stop * ROWS) - start * ROWS
        _products(packed[first * K :], matrix, products[first * N :], _block(), some, N, K, step, 0, columns)

    if M * N * K < LARGE and torch.get_num_threads() * ROWS_OF_A_THREAD <= M:
        share(multiply_rows, count=panels)
    else:
        share(_pack_rows, given, M, K, rows.stride(0), packed, count=panels)
        share(multiply_columns, count=columns, least=VECTORS)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], N)


def _block() -> Floats:
    return scratch("weights", BLOCK_COLUMNS * BLOCK_TERMS + ROWS * WIDTH)


@inlined
def _pack(
    x: Floats, x0: int, step: int, count: int, K: int, full: int, out: Floats, o0: int, width: int
) -> None:
    """out[o0 + k width + r] = x[x0 + r step + k] for r < full, which is ROWS or LANES; 0 for r >= count."""
    whole = K // LANES * LANES if count == full else 0
    for k in range(0, whole, LANES):
        if full == ROWS:
            transpose_rows(x, x0 + k, step, out, o0 + k * width, width)
        else:
            transpose_lanes(x, x0 + k, step, out, o0 + k * width, width)
    for k in range(whole, K):
        for r in range(full):
            out[o0 + k * width + r] = x[x0 + r * step + k] if r < count else np.float32(0)


@compiled(FLOATS, SIZE, SIZE, SIZE, FLOATS, SIZE, SIZE)
def _pack_rows(x: Floats, M: int, K: int, step: int, out: Floats, start: int, stop: int) -> None:
    """Panels start … stop of x: out (panels, K, ROWS)."""
    for i in range(start, stop):
        _pack(x, i * ROWS * step, step, min(ROWS, M - i * ROWS), K, ROWS, out, i * K * ROWS, ROWS)


@compiled(FLOATS, FLOATS, FLOATS, FLOATS, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE)
def _products(
    a: Floats,
    weight: Floats,
    c: Floats,
    block: Floats,
    M: int,
    N: int,
    K: int,
    step: int,
    start: int,
    stop: int,
) -> None:
    """The LANES columns of the result from number start to stop, of packed activations a; block is ``_block()``."""
    b, edge = block[: BLOCK_COLUMNS * BLOCK_TERMS], block[BLOCK_COLUMNS * BLOCK_TERMS :]
    panels, last = (M + ROWS - 1) // ROWS, min(N, stop * LANES)
    for n0 in range(start * LANES, last, BLOCK_COLUMNS):
        n1 = min(last, n0 + BLOCK_COLUMNS)
        for k0 in range(0, K, BLOCK_TERMS):
            terms = min(BLOCK_TERMS, K - k0)
            for n in range(n0, n1, LANES):
                tile, lane = (n - n0) // WIDTH * WIDTH, (n - n0) % WIDTH
                width = min(WIDTH, (n1 - n0 - tile + LANES - 1) // LANES * LANES)
                _pack(
                    weight,
                    n * step + k0,
                    step,
                    min(LANES, N - n),
                    terms,
                    LANES,
                    b,
                    tile * terms + lane,
                    width,
                )
            for i0 in range(0, panels, BLOCK_ROWS // ROWS):
                for n in range(n0, n1, WIDTH):
                    vectors = min(VECTORS, (n1 - n + LANES - 1) // LANES)
                    width, b0 = vectors * LANES, (n - n0) * terms
                    for i in range(i0, min(panels, i0 + BLOCK_ROWS // ROWS)):
                        whole = (i + 1) * ROWS <= M and n + width <= N
                        for k in range(0, terms, TERMS):
                            some = min(TERMS, terms - k)
                            a0, bk = (i * K + k0 + k) * ROWS, b0 + k * width
                            kept = np.float32(0 if k0 + k == 0 else 1)
                            if whole:
                                _tile(vectors, a, a0, b, bk, c, i * ROWS * N + n, N, some, kept)
                            else:
                                _tile(vectors, a, a0, b, bk, edge, 0, WIDTH, some, np.float32(0))
                                for r in range(min(ROWS, M - i * ROWS)):
                                    for j in range(min(width, N - n)):
                                        place = (i * ROWS + r) * N + n + j
                                        c[place] = edge[r * WIDTH + j] + (c[place] if kept else np.float32(0))


@inlined
def _tile(
    vectors: int,
    a: Floats,
    a0: int,
    b: Floats,
    b0: int,
    c: Floats,
    c0: int,
    step: int,
    terms: int,
    kept: Any,
) -> None:
    if vectors == 3:
        multiply_3(a, a0, ROWS, b, b0, WIDTH, c, c0, step, terms, kept)
    elif vectors == 2:
        multiply_2(a, a0, ROWS, b, b0, 2 * LANES, c, c0, step, terms, kept)
    else:
        multiply_1(a, a0, ROWS, b, b0, LANES, c, c0, step, terms, kept)
