"""Kernels beside others' on the same inputs: how far each is from the truth, and which is nearer.

Errors are relative, ‖found − truth‖ / ‖truth‖. Times are medians with a cold L2. A kernel that is less exact than its
peer is marked, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from math import inf, isnan, nan
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, points
from benchmarks.points import Point

# Tokens of an input, and the sizes of Bamba-9B, for those that take them.
LENGTHS = (1, 7, 64, 500, 2048, 8192)
WIDTH, INNER, FFN, EPS = 4096, 8192, 14336, 1e-5
# An error below this share above the peer's is the same error: both are samples of roundings.
SAME = 1.02


@dataclass(frozen=True)
class Contest:
    """One kernel on one input: each function gives the tensors that ``truth`` holds in float64.

    ``against`` names who made the peer, which is None where that is not installed. An error up to ``floor`` is none.
    """

    kernel: str
    case: str
    truth: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[], tuple[Tensor, ...]]
    peer: Callable[[], tuple[Tensor, ...]] | None
    timed: bool = False
    against: str = "mamba_ssm"
    floor: float = 0.0


# A group of contests on the same inputs, which are drawn when it is begun.
Contests = Callable[[], Iterator[Contest]]


def doubles(*values: Any) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def relative(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Of each tensor; of a truth of zeros, as a gradient may be, 0 or infinity."""
    errors = []
    for f, t in zip(found, truth, strict=True):
        off = (f.double() - t.double()).norm().item() if f.isfinite().all() else nan
        errors.append(off and off / (t.double().norm().item() or 1e-300))
    return errors


def milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))


@dataclass(frozen=True)
class Outcome:
    """How a contest ended: who it was against, whether it was lost (None: no peer), and what its ``floor`` was."""

    against: str
    lost: bool | None
    floor: float


def outcome(contest: Contest) -> Outcome:
    """Also prints a line that tells of it; of more than two tensors, of the one that is the worst beside its peer."""
    truth = contest.truth()
    ours = relative(contest.ours(), truth)
    peer = relative(contest.peer(), truth) if contest.peer else [inf] * len(ours)
    del truth
    # What is not finite is nan, and further from the truth than anything.
    allowed = [max(SAME * (inf if isnan(other) else other), contest.floor) for other in peer]
    lost = any(not mine <= most for mine, most in zip(ours, allowed, strict=True))
    if len(ours) > 2:
        worst = max(
            range(len(ours)),
            key=lambda i: (not ours[i] <= allowed[i], ours[i] / (allowed[i] or 1e-300), ours[i]),
        )
        ours, peer = [ours[worst]], [peer[worst]]
    shown = [" ".join(f"{error:.2e}" for error in errors) for errors in (ours, peer)]
    if not contest.peer:
        shown[1] = "not measured" if not lost else "not finite"
    took = [milliseconds(run) for run in (contest.ours, contest.peer) if run] if contest.timed else []
    line = f"{contest.kernel:18}{contest.case:34}{shown[0]:>18}{shown[1]:>18}"
    line += "".join(f"{time:9.4f}" for time in took) + f"  {contest.against}{'  WORSE' if lost else ''}"
    print(line, flush=True)
    if not contest.peer and not lost:
        return Outcome(contest.against, None, contest.floor)
    return Outcome(contest.against, lost, contest.floor)


def outcomes(module: str, options: argparse.Namespace, job: int = 0) -> list[Outcome]:
    """Of every ``options.jobs``-th group of ``module``'s contests from ``job`` on."""
    torch.set_grad_enabled(False)
    theirs, groups = peers.kernels(), list[Contests]()
    for name in options.dtype:
        groups += import_module(module).all_contests(theirs, getattr(torch, name), options.times)
    found = []
    for number in range(job, len(groups), options.jobs):
        torch.manual_seed(number)  # so that a group's inputs are the same in any number of processes
        found += [outcome(contest) for contest in groups[number]()]
    return found


def main(module: str, description: str | None, what: str = "kernels") -> None:
    """Run the contests of ``module``, in as many processes as asked for, because compiling takes the longest.

    ``what`` they compare is named in the figures, but for the selective scan's, which have a floor.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"]
    )
    parser.add_argument("--times", action="store_true", help="a few large inputs with times, instead of all")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="processes"
    )
    points.add_option(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    if options.times:
        options.jobs = 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; errors against float64; ms, cold L2")
    print(f"{'kernel':18}{'case':34}{'ours':>18}{'peer':>18}{' ours ms  peer ms' if options.times else ''}")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        shares = pool.map(partial(outcomes, module, options), range(options.jobs))
        found = list(chain.from_iterable(shares))
    counted, worse, alone = (
        Counter((each.against, each.floor) for each in found if counts(each.lost))
        for counts in (lambda lost: lost is not None, bool, lambda lost: lost is None)
    )
    print(f"{worse.total()} of {counted.total()} less exact than their peers, {alone.total()} without a peer")
    inputs = " and ".join(options.dtype)
    points.write(
        [
            Point(
                f"{'selective scan' if floor else what} against float64 beside {against}'s, {inputs}",
                f"none less exact by over {SAME - 1:.0%}" + (f" and {floor:.0e} in all" if floor else ""),
                f"{worse[against, floor]} of {count} inputs less exact" if count else "not installed",
                not worse[against, floor] if count else None,
            )
            for (against, floor), count in {**dict.fromkeys(alone, 0), **counted}.items()
        ],
        options.points,
    )
    sys.exit(1 if worse.total() else 0)
