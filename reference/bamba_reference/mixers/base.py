"""What a block is to the definition: its tensors, and what it computes on one sequence in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bamba_reference.config import Config
from bamba_reference.numpy_ops import Array
from bamba_reference.packing import Bools, Ints

Shape = tuple[int, ...]
Scan = Literal["chunked", "sequential"]

# What the tokens so far leave in a block: two arrays, whose meaning is the block's own; none in a feed-forward block.
Memory = tuple[Array, Array] | None


@dataclass(frozen=True)
class Sequence:
    """What a mixer has to know about the L tokens besides their values.

    ``positions`` (L,) are the rotary embedding's; ``fresh`` (L,) marks tokens that begin a packed sequence, none
    where nothing is packed. ``scan`` and ``chunk`` choose how a recurrence is computed, not what.
    """

    positions: Ints
    fresh: Bools | None
    scan: Scan
    chunk: int


@dataclass(frozen=True)
class Mixer:
    """A kind of block. ``tensors`` gives each name within the layer its shape.

    ``wide`` ends the names of those that only enter arithmetic in float32 at least: they are kept so. ``mix``
    takes the layer's tensors by their names, the normed hidden states u (L, d) and what earlier tokens left, none
    before the first token; it returns what is added to the stream, (L, d), and what these tokens leave.
    """

    tensors: Callable[[Config], dict[str, Shape]]
    wide: tuple[str, ...]
    mix: Callable[[Config, Mapping[str, Array], Array, Memory, Sequence], tuple[Array, Memory]]


def linear_shapes(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    """The tensors of one matrix product."""
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
