"""Readers of what an interrupted ``fp8`` or ``int4`` left: the run is resumed after its files were damaged."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from random import Random

from bamba_quant.writers import write_plan
from bamba_quant.writers.journal import NAME
from bamba_reference.errors import BambaQuantError
from tests.fuzz.mutations.blind import blind, odd_entry
from tests.fuzz.mutations.json_text import json_text
from tests.fuzz.registry import Case, reader
from tests.fuzz.runner import WrongError
from tests.fuzz.seeds import quantized
from tests.fuzz.tree import Sparse, Tree, changes, listing, write_tree

_LINES = (
    b"[[0,1e400]]", b"[[1e400,0]]", b"[[NaN,0]]", b"[[-1,0]]", b"[[99999,0]]", b"[[0,7]]", b"[]", b"null", b"[[0]]",
    b'[["0","0"]]', b"[[true,false]]", b"[[" + b"9" * 5000 + b",0]]", b"[" * 100_000, b"\xff", b"", b"0", b"{}", b'""',
)  # fmt: skip


def _same(random: Random, tree: Tree) -> Tree:
    """The model is not changed: what the run left is, once there is something."""
    return tree


def _model() -> list[Tree]:
    return [{f"in/{name}": content for name, content in quantized.wide().items()}]


def _resumed(scheme: str, case: Case) -> None:
    path = case.path
    _interrupt(path, scheme, case.random.randrange(1, 12))
    left_over = next(entry for entry in path.iterdir() if (entry / NAME).is_file())
    honest = True if case.valid else _damage(case.random, left_over)
    before = listing(path)
    try:
        write_plan(quantized.planned(path, scheme), path / "out", threads=1, resume=True)
    except BambaQuantError:
        _check_left(path, before)
        raise
    left = [name for name in os.listdir(path) if name not in ("in", "out")]  # noqa: PTH208
    if left:
        raise WrongError("files left behind or changed", ", ".join(left))
    made, expected = quantized.read_tree(path / "out"), quantized.written(scheme)
    # A journal that lists what was never written is beyond anyone's notice; one that lost lines is not.
    if honest and made != expected:
        raise WrongError(
            "another output than an undisturbed run's", ", ".join(sorted(made.keys() ^ expected.keys()))
        )


def _interrupt(path: Path, scheme: str, chunks: int) -> None:
    """Begin a run and end it after some chunks."""

    def count(n_bytes: int) -> None:
        nonlocal chunks
        chunks -= 1
        if not chunks:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_plan(quantized.planned(path, scheme), path / "out", threads=1, progress=count)


def _damage(random: Random, directory: Path) -> bool:
    """Change what the run left; whether its journal still tells the truth."""
    journal = directory / NAME
    raw = journal.read_bytes()
    lines = raw.split(b"\n")
    choice = random.random()
    if choice < 0.25:  # torn
        journal.write_bytes(raw[: random.randrange(len(raw) + 1)])
        return True
    if choice < 0.35:
        journal.write_bytes(b"\n".join(line for line in lines if random.random() < 0.8 or line is lines[0]))
        return True
    if choice < 0.6:
        place = random.randrange(len(lines))
        lines[place] = json_text(random, lines[place] or b"[[0, 0]]").replace(b"\n", b" ")
        journal.write_bytes(b"\n".join(lines))
    elif choice < 0.7:
        journal.write_bytes(raw + random.choice(_LINES) + b"\n")
    elif choice < 0.8:
        journal.write_bytes(blind(random, raw))
    elif choice < 0.9:
        name = random.choice(sorted(file.name for file in directory.iterdir()))
        entry = odd_entry(random, (directory / name).read_bytes())
        if isinstance(entry, Sparse):  # which a run may well copy: not beyond what a disk holds
            entry = Sparse(entry.content, min(entry.size, 1 << 24))
        (directory / name).unlink()
        write_tree({name: entry}, directory)
    else:
        file = random.choice(sorted(file for file in directory.iterdir() if file.name != NAME))
        random.choice(
            (
                file.unlink,
                partial(file.write_bytes, b""),
                partial(os.truncate, file, file.stat().st_size // 2),
            )
        )()
    return False


def _check_left(path: Path, before: dict[str, tuple[int, int]]) -> None:
    """After an error: nothing new beside what the run before left."""
    names = dict.fromkeys(before)
    new = [each for each in changes(names, dict.fromkeys(listing(path))) if each.startswith("new: ")]
    if new or not (path / "in" / "config.json").is_file():
        raise WrongError("files left behind or changed", "; ".join(new))


# fp8 has one step, and int4's codes stand beside scales and zeros; both measure nothing first.
reader("journal_fp8", seeds=_model, mutate=_same, weight=2, leaves=True)(partial(_resumed, "fp8-dynamic"))
reader("journal_int4", seeds=_model, mutate=_same, weight=2, leaves=True)(partial(_resumed, "w4a16-asym-g32"))
