"""``python -m tests.fuzz``: runs cases of all readers, or one case again; exit code 1 when any failed."""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Before numpy and torch are imported: a forked process has one thread, and libraries start none of their own.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRITON_INTERPRET", "1")

import tests.fuzz  # noqa: E402
from tests.fuzz.failures import Failure, summary  # noqa: E402
from tests.fuzz.limits import MIB, Limits  # noqa: E402
from tests.fuzz.pool import Job, Tally, run_jobs  # noqa: E402
from tests.fuzz.registry import Reader, readers  # noqa: E402
from tests.fuzz.runner import run_case, strict_warnings  # noqa: E402
from tests.fuzz.tree import write_tree  # noqa: E402

_JOB = 25  # cases
_SECONDS_BETWEEN_LINES = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    known = readers(options.plugin)
    if options.list:
        for reader in known.values():
            print(f"{reader.name:24} weight {reader.weight:g}")
        return 0
    strange = [name for name in options.reader if name not in known]
    if strange:
        print(f"no such reader: {', '.join(strange)}; --list names them", file=sys.stderr)
        return 2
    chosen = {name: known[name] for name in options.reader} if options.reader else known
    limits = Limits(options.seconds, options.memory * MIB)
    place = options.directory or (Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=place) as work:
        if options.case is not None:
            return _again(chosen, options, Path(work), limits)
        if options.digest:
            return _digest(chosen, options)
        return _all(chosen, options, Path(work), limits)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=tests.fuzz.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reader", action="append", default=[], metavar="NAME", help="this one; repeatable")
    parser.add_argument(
        "--seed", type=int, default=0, help="other numbers, other cases (default: %(default)s)"
    )
    parser.add_argument("--cases", type=int, default=100_000, help="of all readers (default: %(default)s)")
    parser.add_argument("--case", type=int, help="run this case of one reader, and show everything")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="most of a case (default: %(default)s)")
    parser.add_argument(
        "--memory",
        type=int,
        default=1024,
        metavar="MIB",
        help="most of a case above idle (default: %(default)s)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the inputs of failures there")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for inputs (default: /dev/shm)")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="readers of this module instead"
    )
    parser.add_argument(
        "--digest", action="store_true", help="print a hash of each reader's inputs, and run none"
    )
    parser.add_argument("--list", action="store_true", help="list the readers")
    return parser


def _all(chosen: Mapping[str, Reader], options: argparse.Namespace, work: Path, limits: Limits) -> int:
    started = time.monotonic()
    # Before the processes are forked, which then share what it made.
    if not options.plugin:
        for reader in chosen.values():
            (work / reader.name).mkdir()
            reader.warm(work / reader.name)
    made = time.monotonic() - started
    jobs = _jobs(chosen, options.cases)
    print(
        f"seed {options.seed}: {sum(job.stop - job.first for job in jobs):,} cases of {len(chosen)} readers on "
        f"{options.workers} processes (valid inputs made in {made:.1f} s)",
        flush=True,
    )
    told = started

    def progress(tally: Tally) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            print(
                f"  {tally.cases:,} cases, {len(tally.failures)} failures, {now - started:.0f} s", flush=True
            )

    tally = Tally()
    ended = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_jobs(jobs, chosen, options.seed, work, limits, tally, workers=options.workers, progress=progress)
        ended = True
    except KeyboardInterrupt:
        print("interrupted; so far:")
    _print(tally, time.monotonic() - started)
    for failure in tally.failures if options.keep else ():
        _keep(options.keep, chosen[failure.reader], failure)
    if not ended:
        return 130
    return 1 if tally.failures else 0


def _jobs(chosen: Mapping[str, Reader], cases: int) -> list[Job]:
    """Cases by weight, at least every valid input, in an order that mixes the readers."""
    weights = sum(reader.weight for reader in chosen.values())
    jobs = []
    for reader in chosen.values():
        count = max(len(reader.valid), round(cases * reader.weight / weights))
        jobs += [Job(reader.name, first, min(first + _JOB, count)) for first in range(0, count, _JOB)]
    random.Random(0).shuffle(jobs)
    return jobs


def _print(tally: Tally, seconds: float) -> None:
    failed = dict.fromkeys(sorted(tally.accepted | tally.refused), 0)
    for failure in tally.failures:
        failed[failure.reader] = failed.get(failure.reader, 0) + 1
    print(f"{'reader':24} {'cases':>8} {'accepted':>9} {'refused':>9} {'failed':>8} {'ms a case':>10}")
    for name, count in failed.items():
        accepted, refused = tally.accepted[name], tally.refused[name]
        total = accepted + refused + count
        print(
            f"{name:24} {total:8,} {accepted:9,} {refused:9,} {count:8,} "
            f"{1000 * tally.seconds[name] / max(1, total):10.1f}"
        )
    lines = summary(tally.failures)
    kinds = sum(" × " in line for line in lines)
    print(f"{tally.cases:,} cases in {seconds:.0f} s: {len(tally.failures):,} failures of {kinds} kinds")
    for line in lines:
        print(line)


def _again(chosen: Mapping[str, Reader], options: argparse.Namespace, work: Path, limits: Limits) -> int:
    if len(chosen) != 1:
        print("--case wants one --reader", file=sys.stderr)
        return 2
    (reader,) = chosen.values()
    if options.keep:
        _keep(options.keep, reader, Failure(reader.name, options.seed, options.case, "", "", ""))
    # In a process of its own, so that one that dies can be told of; then, where it lives, in sight.
    if not options.plugin:
        (work / reader.name).mkdir()
        reader.warm(work / reader.name)
    job = Job(reader.name, options.case, options.case + 1)
    tally = Tally()
    run_jobs([job], chosen, options.seed, work, limits, tally, workers=1)
    if not tally.failures:
        print("accepted" if tally.accepted.total() else "refused")
        return 0
    for line in summary(tally.failures):
        print(line)
    if not tally.failures[0].kind.startswith("died by"):
        strict_warnings()
        print(run_case(reader, options.seed, options.case, work, limits).trace)
    return 1


def _digest(chosen: Mapping[str, Reader], options: argparse.Namespace) -> int:
    digests = {name: hashlib.sha256() for name in chosen}
    for job in _jobs(chosen, options.cases):
        for number in range(job.first, job.stop):
            tree, _ = chosen[job.reader].tree(options.seed, number)
            digests[job.reader].update(hashlib.sha256(repr(sorted(tree.items())).encode()).digest())
    for name, digest in digests.items():
        print(name, digest.hexdigest())
    return 0


def _keep(directory: Path, reader: Reader, failure: Failure) -> None:
    place = directory / f"{reader.name}-{failure.seed}-{failure.case}"
    if place.exists():
        return
    place.mkdir(parents=True)
    write_tree(reader.tree(failure.seed, failure.case)[0], place)
    print(f"kept: {place}")


if __name__ == "__main__":
    sys.exit(main())
