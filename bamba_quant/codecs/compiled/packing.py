"""Functions of kernels that pack and unpack integers by the tables of ``layout``.

Integers lie in the rows of a tile as floats, as they are stored: none is negative. A row of ``packed`` is a byte of
each lane's block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import load, load_bytes, store, store_bytes, to_floats, to_ints
from bamba_quant.codecs.layout import Bits, Field

Pack = Callable[[Any, Any], None]


def packers(*fields: Field | None) -> tuple[Pack, ...]:
    """``pack(tile, packed)`` of each field that there is in a block; a kernel calls them in this order."""
    filled: set[int] = set()
    found = []
    for field in filter(None, fields):
        pack: Pack = _nothing
        for bits in field.bits:
            stored_in = bits.stored_in
            rows = set(range(stored_in.start, stored_in.stop))
            pack = _and_then(pack, _packer(bits, beside=bool(rows & filled)))
            filled |= rows
        found.append(pack)
    return tuple(found)


def unpacker(field: Field | None) -> Pack:
    """``unpack(tile, packed)``, the inverse of a field's ``pack``."""
    unpack: Pack = _nothing
    for bits in field.bits if field else ():
        unpack = _and_then(unpack, _unpacker(bits))
    return unpack


@inlined
def _nothing(tile: Any, packed: Any) -> None:
    pass


def _and_then(first: Pack, second: Pack) -> Pack:
    @inlined
    def both(tile: Any, packed: Any) -> None:
        first(tile, packed)
        second(tile, packed)

    return both


def _packer(bits: Bits, beside: bool) -> Pack:
    """Packs ``bits``, ``beside`` others that lie in the same bytes or over what the bytes held before."""
    at, width, run, per_byte, mask = bits.at, bits.width, bits.run, bits.per_byte, bits.mask
    first, low, shift, n_bytes = bits.first, bits.low, bits.shift, bits.count // bits.per_byte

    @inlined
    def pack(tile: Any, packed: Any) -> None:
        for chunk in range(0, n_bytes, run):
            for i in range(run):
                j = first + chunk * per_byte + i
                byte = ((to_ints(load(tile, j)) >> low) & mask) << shift
                for k in range(1, per_byte):
                    part = (to_ints(load(tile, j + k * run)) >> low) & mask
                    byte = byte | (part << (shift + k * width))
                if beside:
                    byte = byte | load_bytes(packed, at + chunk + i)
                store_bytes(packed, at + chunk + i, byte)

    return pack


def _unpacker(bits: Bits) -> Pack:
    at, width, run, per_byte, mask = bits.at, bits.width, bits.run, bits.per_byte, (1 << bits.width) - 1
    first, low, shift, n_bytes = bits.first, bits.low, bits.shift, bits.count // bits.per_byte

    @inlined
    def unpack(tile: Any, packed: Any) -> None:
        for chunk in range(0, n_bytes, run):
            for i in range(run):
                for k in range(per_byte):
                    j = first + chunk * per_byte + i + k * run
                    part = to_floats(
                        ((load_bytes(packed, at + chunk + i) >> (shift + k * width)) & mask) << low
                    )
                    # Higher bits follow the lower ones, whose part of the sum is there.
                    store(tile, j, part + load(tile, j) if low else part)

    return unpack
