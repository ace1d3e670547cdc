"""Which files are worth their size: the frontier of file size and divergence, and which file beats which.

Divergences are compared chunk by chunk, since all candidates saw the same chunks: the difference of two candidates'
mean KL divergences has a Student interval over chunks (95 %), much tighter than either's own interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from bamba_quant.evaluation.intervals import LEAST_CHUNKS, student
from bamba_quant.evaluation.result import Candidate, Evaluation
from bamba_quant.report.wording import listed, short_names


@dataclass(frozen=True)
class Standing:
    """How a candidate compares with those of its size or smaller; ``by`` is the other candidate's index.

    ``frontier``: each smaller file diverges more from the base. ``dominated``: ``by`` is not larger and diverges less.
    ``tied``: ``by`` is smaller, and the text cannot tell which of the two diverges less. ``unknown``: the text has too
    few chunks to compare files.
    """

    state: Literal["frontier", "dominated", "tied", "unknown"]
    by: int | None = None


def standings(evaluation: Evaluation) -> tuple[Standing, ...]:
    """Every candidate's standing, in the candidates' order."""
    candidates = evaluation.candidates
    floor = evaluation.noise_floor.figures.get("kld_mean", 0.0) if evaluation.noise_floor else 0.0
    n = min((len(candidate.chunks.kld) for candidate in candidates), default=0)
    if n < LEAST_CHUNKS or any(len(candidate.chunks.kld) != n for candidate in candidates):
        return (Standing("unknown"),) * len(candidates)
    klds = [fmean(candidate.chunks.kld) for candidate in candidates]
    found: dict[int, Standing] = {}
    frontier: list[int] = []
    for i in sorted(range(len(candidates)), key=lambda i: (candidates[i].model.file_bytes, klds[i])):
        orders = {j: _compared(candidates[i], candidates[j], floor) for j in found}
        nearer = [j for j, order in orders.items() if order > 0]
        # Of the files that beat this one, name the best; one that is beaten itself only where no other does.
        if nearer:
            by = min(nearer, key=lambda j: (found[j].state != "frontier", klds[j]))
            found[i] = Standing("dominated", by)
            continue
        smaller = [j for j in frontier if candidates[j].model.file_bytes < candidates[i].model.file_bytes]
        alike = [j for j in smaller if orders[j] == 0]
        if alike:
            found[i] = Standing("tied", min(alike, key=lambda j: klds[j]))
        else:
            found[i] = Standing("frontier")
            frontier.append(i)
    return tuple(found[i] for i in range(len(candidates)))


def _compared(one: Candidate, other: Candidate, floor: float) -> int:
    """1 where ``one`` diverges more than ``other``, -1 where less, 0 where that is not certain."""
    apart = [a - b for a, b in zip(one.chunks.kld, other.chunks.kld, strict=True)]
    mean, n = fmean(apart), len(apart)
    half = student(0.975, n - 1) * stdev(apart) / math.sqrt(n)
    return 0 if abs(mean) <= max(half, floor) else 1 if mean > 0 else -1


def frontier_lines(evaluation: Evaluation) -> tuple[str, ...]:
    """The judgement in sentences: the files on the frontier, then those that another beats. None for one candidate."""
    names, found = short_names(evaluation), standings(evaluation)
    if len(names) < 2:
        return ()
    if found[0].state == "unknown":
        n = evaluation.text.chunks
        return (f"Too few chunks to compare the files with each other: {n}, and {LEAST_CHUNKS} are needed.",)
    sizes = [candidate.model.file_bytes for candidate in evaluation.candidates]
    order = sorted(range(len(names)), key=lambda i: sizes[i])
    best = [names[i] for i in order if found[i].state == "frontier"]
    lines = [f"On the frontier of size and divergence: {', '.join(best)}."]
    groups: dict[tuple[str, int, bool], list[str]] = {}
    for i in order:
        by = found[i].by
        if by is not None:
            groups.setdefault((found[i].state, by, sizes[i] > sizes[by]), []).append(names[i])
    for (state, by, larger), members in groups.items():
        verb, size = "is" if len(members) == 1 else "are", "larger" if larger else "no smaller"
        if state == "dominated":
            said = f"{size} and further from the original than {names[by]}"
        else:
            said = f"larger than {names[by]}, and this text cannot tell which is nearer to the original"
        lines.append(f"{listed(members)} {verb} {said}.")
    return tuple(lines)
