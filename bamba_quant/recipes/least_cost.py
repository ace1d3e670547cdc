"""Chooses one option for each tensor so that the costs are small and the bytes stay within a budget.

The multiple-choice knapsack problem: Lagrangian steps along each tensor's lower convex hull (Sinha and Zoltners 1979),
then single changes and exchanges of pairs until none helps; or, where asked for, dynamic programming over the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bamba_quant.errors import PlanError

_MOST_EXCHANGES = 2000
_MOST_SIZES = 1 << 18  # steps of bytes between the smallest choice and the budget, in dynamic programming


@dataclass(frozen=True)
class Option:
    """A choice for a tensor: its bytes in the file and its cost, in any unit that adds up."""

    n_bytes: int
    cost: float


def least_cost(tensors: Sequence[Sequence[Option]], budget: int, *, thorough: bool = False) -> list[int]:
    """The number of the chosen option of each tensor; their bytes together are at most ``budget``.

    With ``thorough`` it is the best choice there is, where bytes come in few enough sizes, in seconds. Raises
    ``PlanError`` when even the smallest options take more.
    """
    chosen = [
        min(range(len(options)), key=lambda i: (options[i].n_bytes, options[i].cost)) for options in tensors
    ]
    room = budget - sum(options[i].n_bytes for options, i in zip(tensors, chosen, strict=True))
    if room < 0:
        raise PlanError(
            "the file is too large even with the smallest types",
            found=f"{budget - room:,} bytes",
            expected=f"at most {budget:,}",
            fix="choose a larger size, or allow smaller types",
        )
    steps: list[tuple[float, int, int, int]] = []
    for number, options in enumerate(tensors):
        hull = _hull(options)
        for before, after in pairwise(hull):
            more = options[after].n_bytes - options[before].n_bytes
            steps.append(((options[before].cost - options[after].cost) / more, number, before, after))
    for _, number, before, after in sorted(steps, key=lambda step: -step[0]):
        more = tensors[number][after].n_bytes - tensors[number][before].n_bytes
        if chosen[number] == before and more <= room:
            chosen[number], room = after, room - more
    chosen = _exchanged(tensors, chosen, room)
    if not thorough:
        return chosen
    best = _programmed(tensors, budget)
    room = budget - sum(options[i].n_bytes for options, i in zip(tensors, best, strict=True))
    return min(chosen, _exchanged(tensors, best, room), key=lambda each: _cost(tensors, each))


def _cost(tensors: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return math.fsum(options[i].cost for options, i in zip(tensors, chosen, strict=True))


def _programmed(tensors: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The choice of least cost by dynamic programming over the bytes beyond each tensor's smallest option.

    These are counted in their greatest common divisor, and in more, rounded up, where that makes too many sizes.
    """
    least = [min(option.n_bytes for option in options) for options in tensors]
    beyond = [
        [option.n_bytes - low for option in options] for options, low in zip(tensors, least, strict=True)
    ]
    room = budget - sum(least)
    unit = max(math.gcd(*(more for each in beyond for more in each)), -(-room // _MOST_SIZES), 1)
    sizes = room // unit + 1
    costs = np.zeros(sizes)
    picks = np.zeros((len(tensors), sizes), np.uint8)
    for pick, options, each in zip(picks, tensors, beyond, strict=True):
        lowest = np.full(sizes, np.inf)
        for number, (option, more) in enumerate(zip(options, each, strict=True)):
            units = -(-more // unit)
            if units < sizes:
                tried = costs[: sizes - units] + option.cost
                better = tried < lowest[units:]
                lowest[units:][better] = tried[better]
                pick[units:][better] = number
        costs = lowest
    chosen, left = [], sizes - 1
    for pick, each in zip(picks[::-1], beyond[::-1], strict=True):
        chosen.append(int(pick[left]))
        left -= -(-each[chosen[-1]] // unit)
    return chosen[::-1]


def _hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull of bytes and cost, from the smallest on, costs falling."""
    hull: list[int] = []
    for number in sorted(range(len(options)), key=lambda i: (options[i].n_bytes, options[i].cost)):
        new = options[number]
        if hull and new.cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1:
            first, last = options[hull[-2]], options[hull[-1]]
            if (first.cost - last.cost) * (new.n_bytes - last.n_bytes) > (last.cost - new.cost) * (
                last.n_bytes - first.n_bytes
            ):
                break
            hull.pop()
        hull.append(number)
    return hull


def _exchanged(tensors: Sequence[Sequence[Option]], chosen: list[int], room: int) -> list[int]:
    """Single changes and exchanges of two that make the sum of costs smaller within ``room``, the best one first."""
    owner = np.repeat(np.arange(len(tensors)), [len(options) for options in tensors])
    flat = [(number, i) for number, options in enumerate(tensors) for i in range(len(options))]
    all_bytes = np.array([option.n_bytes for options in tensors for option in options], np.int64)
    all_costs = np.array([option.cost for options in tensors for option in options])
    chosen = list(chosen)
    for _ in range(_MOST_EXCHANGES):
        now = [options[i] for options, i in zip(tensors, chosen, strict=True)]
        more = all_bytes - np.array([each.n_bytes for each in now], np.int64)[owner]
        gain = np.array([each.cost for each in now])[owner] - all_costs
        best = _best_change(more, gain, owner, room)
        if not best:
            break
        for place in best:
            number, option = flat[place]
            chosen[number] = option
            room -= int(more[place])
    return chosen


def _best_change(
    more: NDArray[np.int64], gain: NDArray[np.float64], owner: NDArray[np.int64], room: int
) -> list[int]:
    """The change, or the two of different tensors, with the greatest gain among those that fit; none without gain."""
    least = 1e-12 * float(np.abs(gain).max(initial=0))
    best, most = [], least
    fitting = np.flatnonzero(more <= room)
    if fitting.size and gain[fitting].max() > most:
        place = int(fitting[gain[fitting].argmax()])
        best, most = [place], float(gain[place])
    smaller = np.flatnonzero((more < 0) & (gain < 0))
    for place in np.flatnonzero((gain > most) & (more > room)):
        partners = smaller[(more[smaller] <= room - more[place]) & (owner[smaller] != owner[place])]
        if partners.size:
            partner = int(partners[gain[partners].argmax()])
            if gain[place] + gain[partner] > most:
                best, most = [int(place), partner], float(gain[place] + gain[partner])
    return best
