"""Places the tensors of an output: which shard each goes into, and at which byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from bamba_quant.planning.plan import Part

Group = Sequence[Part]  # parts that stay in one shard


def shard_numbers(groups: Sequence[Group], max_bytes: int | None, alignment: int = 1) -> list[int]:
    """The shard of each group: a shard ends before the group that would exceed ``max_bytes`` of weights."""
    numbers: list[int] = []
    number = filled = 0
    for group in groups:
        n_bytes = sum(part.n_bytes for part in group)
        if max_bytes is not None and filled and filled + n_bytes > max_bytes:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += _padded(n_bytes, alignment)
    return numbers


def place(
    groups: Sequence[Group],
    shards: Sequence[int],
    alignment: int = 1,
    sort_key: Callable[[Part], int] = lambda part: 0,
) -> list[tuple[Part, ...]]:
    """``groups`` with the shard and offset of every part.

    ``shards`` has a number for each group. In a shard parts follow each other in the order of ``sort_key``, each at a
    multiple of ``alignment``.
    """
    placed = [list(group) for group in groups]
    ends: defaultdict[int, int] = defaultdict(int)
    positions = [(g, i) for g, group in enumerate(groups) for i in range(len(group))]
    for g, i in sorted(positions, key=lambda at: sort_key(groups[at[0]][at[1]])):
        part, shard = groups[g][i], shards[g]
        placed[g][i] = replace(part, shard=shard, offset=ends[shard])
        ends[shard] += _padded(part.n_bytes, alignment)
    return list(map(tuple, placed))


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
