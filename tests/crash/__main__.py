"""``python -m tests.crash --cases 100 --seed 1``: kill every command so often, and print what was left each time.

A case kills a command, looks at what is there, and runs the command again. It fails when what was there is neither the
old output nor the new one and a reader took it, or the next start did not make it one of them; when the second run did
not end with the bytes of an undisturbed one; and when anything else was left over.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a child of a process with threads would wait for them forever

import torch

from bamba_quant.errors import BambaQuantError
from tests.crash.children import Ended, Kill, run, warm
from tests.crash.commands import COMMANDS, Command, Tree, build, inputs, tree

WHOLE = ("old", "new", "nothing")


@dataclass(frozen=True)
class Setting:
    """A command over an old output or over none, what the system cannot do, and the ``calls`` that change names."""

    command: Command
    variant: str
    replaces: bool
    old: Tree
    new: Tree
    calls: int
    seconds: float

    def __str__(self) -> str:
        what = "replaces" if self.replaces else "new"
        return ", ".join(filter(None, [self.command.name, what, self.variant]))


@dataclass
class Tally:
    """What came of the cases of a command."""

    cases: int = 0
    killed: int = 0
    points: int = 0
    points_covered: set[tuple[str, int, bool]] = field(default_factory=set)
    found: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Place:
    """A directory for inputs, one to write in, and a log."""

    def __init__(self, root: Path) -> None:
        self.inputs, self.work, self._log = root / "inputs", root / "work", root / "log"

    def run(
        self, setting_of: Command, variant: str, seed: int, options: tuple[str, ...], kill: Kill = Kill()
    ) -> Ended:
        words = setting_of.words(self.inputs, self.work, seed)
        return run([*words, *options], self.work, self._log, kill, setting_of.variants[variant])


def settings(command: Command, place: Place, every: bool) -> Iterator[Setting]:
    """A command's situations with undisturbed results: ``every`` one, or each variant, new and replacing in turn."""
    before = command.before(place.inputs)
    build(place.work, before)
    if not command.threads:
        warm(command.words(place.inputs, place.work, 0))
    replaced = (
        (False, True) if not before else (False,)
    )  # replacing what was there before is all that it does
    pairs = itertools.product(command.variants, replaced)
    for variant, replaces in (
        pairs if every else zip(command.variants, itertools.cycle(replaced), strict=False)
    ):
        options = command.overwrite if replaces else ()
        old = before
        if replaces:
            build(place.work, {})
            assert place.run(command, variant, 1, ()).code == 0
            old = tree(place.work)
        build(place.work, old)
        ended = place.run(command, variant, 0, options)
        assert ended.code == 0, ended.output
        yield Setting(command, variant, replaces, old, tree(place.work), ended.calls, ended.seconds)


def case(setting: Setting, place: Place, kill: Kill, restore: bool, tally: Tally) -> str | None:
    """Kill, look, run again; what is wrong, if anything. With ``restore`` the next start's first step is looked at."""
    command = setting.command
    options = command.overwrite if setting.replaces else ()
    build(place.work, setting.old)
    ended = place.run(command, setting.variant, 0, options, kill)
    tally.cases += 1
    tally.killed += ended.code == -1
    if ended.code > 0:
        return f"the run failed: {ended.output}"
    shown = {name: command.shown(wanted) for name, wanted in (("new", setting.new), ("old", setting.old))}

    def look() -> str:
        there = command.shown(tree(place.work))
        found = next((name for name, wanted in shown.items() if there == wanted), "mixed")
        if found == "old" and not there:
            return "nothing"
        try:
            command.read(place.work)
        except BambaQuantError:
            return "refused" if found == "mixed" else f"{found}, but it cannot be read"
        except AssertionError:
            return "mixed"
        return found

    found = look()
    tally.found[found] += 1
    refusing = found == "refused" and (command.between or setting.variant)
    if found not in WHOLE and not refusing and found != command.between:
        return f"{found} is there"
    if restore:
        command.restore(place.work)
        if (found := look()) not in WHOLE:
            return f"{found} is there after the next start"
    again = place.run(command, setting.variant, 0, (*options, *command.again))
    left = tree(place.work)
    if left != setting.new:
        names = sorted(
            name for name in left.keys() | setting.new.keys() if left.get(name, 0) != setting.new.get(name, 0)
        )
        return f"{found} was there, and the next run ended with other files: {names}: {again.output[:300]}"
    # What was finished already is refused, or is not to be done again.
    if again.code != 0 and not (again.code == 2 and found == "new"):
        return f"{found} was there, and the next run ended with {again.code}: {again.output[:300]}"
    return None


def kills(
    found: list[Setting], cases: int, points: int | None, draw: random.Random
) -> Iterator[tuple[Setting, Kill]]:
    """``cases`` random moments, and every call of every situation, or ``points`` of them, but ``cases`` at least."""
    for _ in range(cases):
        setting = draw.choice(found)
        yield setting, Kill(seconds=draw.uniform(0.0005, setting.seconds))
    every = [
        (setting, Kill(call, after))
        for setting in found
        for call in range(1, setting.calls + 1)
        for after in (False, True)
    ]
    draw.shuffle(every)
    yield from itertools.islice(itertools.cycle(every), max(cases, len(every)) if points is None else points)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=100, help="of each command at random moments, and at calls"
    )
    parser.add_argument(
        "--points", type=int, help="calls of each command; by default every one, in every situation"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=[command.name for command in COMMANDS], action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="bamba-quant-crash-"))
    tallies: dict[str, Tally] = {}
    try:
        place = Place(root)
        inputs(place.inputs)
        for command in COMMANDS:
            if options.command and command.name not in options.command:
                continue
            draw = random.Random(f"{options.seed} {command.name}")
            tally = tallies[command.name] = Tally()
            found = list(settings(command, place, options.points is None))
            tally.points = sum(2 * setting.calls for setting in found)
            for number, (setting, kill) in enumerate(kills(found, options.cases, options.points, draw)):
                wrong = case(setting, place, kill, number % 2 == 0, tally)
                if kill.call:
                    tally.points_covered.add((str(setting), kill.call, kill.after))
                if wrong:
                    tally.failures.append(f"{setting}, killed {kill}: {wrong}")
            _print_row(command.name, tally)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for failure in itertools.chain.from_iterable(tally.failures for tally in tallies.values()):
        print(failure, file=sys.stderr)
    return int(any(tally.failures for tally in tallies.values()))


def _print_row(name: str, tally: Tally) -> None:
    if not _print_row.__dict__.setdefault("begun", False):
        _print_row.__dict__["begun"] = True
        print(f"{'command':26} {'cases':>6} {'killed':>6} {'kill points':>12} {'failures':>8}  found")
    covered = f"{len(tally.points_covered)} of {tally.points}"
    found = ", ".join(f"{count} {what}" for what, count in tally.found.most_common())
    print(
        f"{name:26} {tally.cases:6} {tally.killed:6} {covered:>12} {len(tally.failures):8}  {found}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
