"""What went wrong in a case, and many of them as few lines: one group for each kind of exception and place."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_OURS = re.compile(r"/(bamba_quant|bamba_quant_cli|bamba_reference)/")
_MOST_FRAMES = 4
_MOST_MESSAGE = 300


@dataclass(frozen=True)
class Failure:
    """``kind`` and ``where`` are what failures are grouped by; ``frames`` are the last of the package's own."""

    reader: str
    seed: int
    case: int
    kind: str
    where: str
    message: str
    frames: tuple[str, ...] = ()

    @property
    def again(self) -> str:
        """The command that runs this case alone."""
        return f"python -m tests.fuzz --reader {self.reader} --seed {self.seed} --case {self.case}"

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "frames": list(self.frames)}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Failure:
        return cls(**{**told, "frames": tuple(told["frames"])})


def ours(file: str) -> bool:
    """Whether a source file belongs to the packages that are fuzzed, and not to their tests."""
    return _OURS.search(file) is not None


def frames_of(trace: TracebackType | None) -> tuple[str, ...]:
    """The package's frames of a traceback, outermost first, each as ``file:line function``."""
    return _named([(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(trace)])


_DUMPED = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')


def frames_of_dump(text: str) -> tuple[str, ...]:
    """The same of what faulthandler wrote, which begins with the innermost frame."""
    return _named([(file, int(line), name) for file, line, name in _DUMPED.findall(text)][::-1])


def _named(frames: Sequence[tuple[str, int, str]]) -> tuple[str, ...]:
    # Not where the alarm rang: where it was heard.
    frames = [frame for frame in frames if not frame[0].endswith("/tests/fuzz/limits.py")]
    own = [frame for frame in frames if ours(frame[0])] or frames[-1:]
    short = (
        f"{re.sub(r'^.*?/(?=(bamba_quant|bamba_quant_cli|bamba_reference)/)', '', file)}:{line} {name}"
        for file, line, name in own[-_MOST_FRAMES:]
    )
    return tuple(short)


def kind_of(error: BaseException) -> str:
    """The exception's type, with its module where that is not the interpreter's."""
    kind = type(error)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def cut(text: str) -> str:
    """The beginning of a message, on one line and with nothing that a terminal would obey."""
    line = " ".join(text[: 2 * _MOST_MESSAGE].split())
    line = line.encode("unicode_escape", "backslashreplace").decode("ascii")
    return line if len(line) <= _MOST_MESSAGE else f"{line[:_MOST_MESSAGE]} …"


def summary(failures: Sequence[Failure]) -> list[str]:
    """The groups, the most frequent first, each with its count, one message and how to run its first case again."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.kind, failure.where), []).append(failure)
    lines = []
    for (kind, where), found in sorted(groups.items(), key=lambda group: -len(group[1])):
        first = min(found, key=lambda failure: (failure.case, failure.reader))
        readers = Counter(failure.reader for failure in found)
        lines += [
            f"{len(found):6} × {kind} at {where}",
            f"         {first.message}",
            f"         readers: {', '.join(f'{name} {count}' for name, count in readers.most_common())}",
            f"         frames: {' > '.join(first.frames)}",
            f"         again: {first.again}",
        ]
    return lines
