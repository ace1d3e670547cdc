"""Rows of a tensor from its bytes on a device: decoded there, and what its rule moves and scales undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bamba_quant.codecs import BlockCodec
from bamba_quant.families.transforms import Transform

if TYPE_CHECKING:
    import torch


def decoded_rows(
    codec: BlockCodec, raw: torch.Tensor, transform: Transform | None, first_row: int, dtype: torch.dtype
) -> torch.Tensor:
    """Bytes (rows, row bytes) as numbers of ``dtype``, plain ones of their own; ``transform`` is undone, if given.

    It moves and scales rows at most; ``first_row`` is the number of the first in the tensor. What is scaled is divided
    in float32 and rounded once to ``dtype``.
    """
    import torch

    from bamba_quant.codecs.gpu.decoding import decode

    divisors = None
    if transform is not None:
        moves, divisors = transform.scaled_moves(first_row, len(raw))
        raw = moves.invert(raw, first_row)
    if codec.dtype is not None:
        values = decode(codec, raw, getattr(torch, codec.dtype.name))
    else:
        values = decode(codec, raw, dtype if divisors is None else torch.float32)
    if divisors is None:
        return values
    rows = values.view(len(divisors), -1).float()
    return (rows / torch.from_numpy(divisors).to(rows.device)).to(dtype)
