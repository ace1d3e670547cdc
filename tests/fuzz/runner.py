"""One case from its number to what came of it, in this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bamba_reference.errors import BambaQuantError
from tests.fuzz.failures import Failure, cut, frames_of, kind_of, ours
from tests.fuzz.limits import MIB, Limits, TimeUp, limited, reset_peak, status
from tests.fuzz.registry import Case, Reader
from tests.fuzz.tree import Shrinks, Tree, changes, listing, shrinking, write_tree

# An error's text is a few lines; lists of names in it are cut.
MOST_TEXT = 5000
MOST_LINES = 50


class WrongError(Exception):
    """A call ended well and its result is wrong, or not what another library says of the same file: ``kind``."""

    def __init__(self, kind: str, message: str = "") -> None:
        self.kind = kind
        super().__init__(message)


@dataclass(frozen=True)
class Outcome:
    """``trace`` is the whole traceback of a failure."""

    accepted: bool
    failure: Failure | None = None
    trace: str = ""


def strict_warnings() -> None:
    """Warnings of values and of code are errors; those of what libraries will drop one day are not."""
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    for category in (RuntimeWarning, UserWarning, SyntaxWarning, FutureWarning):
        warnings.simplefilter("error", category)
    warnings.filterwarnings("ignore", module="torch")
    # What weights hold, infinity among it, is nothing that their readers judge.
    warnings.filterwarnings("ignore", module=r"bamba_quant\.(codecs|families|checkpoint\.dequantize)")


def run_case(
    reader: Reader,
    seed: int,
    number: int,
    work: Path,
    limits: Limits,
    begins: Callable[[], None] = lambda: None,
) -> Outcome:
    """Make the input below ``work``, call the reader, and say what came of it; ``begins`` is told of the call."""
    tree, random = reader.tree(seed, number)
    place, directory = work / "case", work / "cwd"
    place.mkdir()
    directory.mkdir(exist_ok=True)
    os.chdir(directory)
    try:
        write_tree(tree, place)
        before = listing(place)
        case = Case(place, random, tree, valid=number < len(reader.valid))
        begins()
        told = _call(reader, case, limits)
        wrong = _left_behind(reader, tree, before, listing(place), listing(directory))
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for leftover in directory.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
            with contextlib.suppress(OSError):
                leftover.unlink()
    if told.kind is None and wrong:
        told = _Told(None, "files left behind or changed", f"reader {reader.name}", wrong)
    failure = None
    if told.kind is not None:
        failure = Failure(
            reader.name,
            seed,
            number,
            told.kind,
            told.where,
            cut(told.message.replace(f"{work}/", "")),
            told.frames,
        )
    return Outcome(bool(told.accepted), failure, told.trace)


@dataclass
class _Told:
    accepted: bool | None
    kind: str | None = None
    where: str = ""
    message: str = ""
    frames: tuple[str, ...] = ()
    trace: str = ""


def _call(reader: Reader, case: Case, limits: Limits) -> _Told:
    reset_peak()
    idle, started = status("VmRSS"), time.process_time()
    try:
        with shrinking(case.tree, case.path, ours), limited(limits):
            reader.call(case)
        told = _Told(True)
    except BambaQuantError as error:
        told = _refused(error, case)
    except TimeUp as error:
        told = _failed(error, "time", f"more than {limits.seconds:g} s")
    except WrongError as error:
        told = _failed(error, error.kind, str(error))
    # A panic of Rust code, SystemExit and the like are no exceptions of the usual kind.
    except BaseException as error:  # noqa: BLE001
        told = _failed(error, kind_of(error), _text(error))
    seconds, peak = time.process_time() - started, status("VmHWM") - idle
    where = f"reader {reader.name}"
    if told.kind is None and seconds > limits.seconds:
        return _Told(None, "time", where, f"{seconds:.1f} s")
    if told.kind is None and peak > limits.memory:
        return _Told(None, "memory", where, f"a peak of {peak // MIB} MiB above idle")
    return told


def _refused(error: BambaQuantError, case: Case) -> _Told:
    text = str(error)
    if case.valid:
        return _failed(error, "valid input refused", text)
    if len(text) > MOST_TEXT or text.count("\n") >= MOST_LINES:
        return _failed(
            error, "long error text", f"{len(text)} characters, {text.count(chr(10)) + 1} lines: {text}"
        )
    return _Told(False)


def _failed(error: BaseException, kind: str, message: str) -> _Told:
    frames = frames_of(error.__traceback__)
    trace = "".join(traceback.format_exception(error, limit=-40))
    return _Told(None, kind, frames[-1] if frames else "", message, frames, trace)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001 - an error that cannot be shown is shown as what that raised
        return f"its text cannot be made: {second!r}"


def _left_behind(reader: Reader, tree: Tree, before: dict, after: dict, directory: dict) -> str:
    found = [f"in the working directory, {name}" for name in directory]
    if not reader.leaves:
        shrunk = any(isinstance(entry, Shrinks) for entry in tree.values())
        found += changes(dict.fromkeys(before), dict.fromkeys(after)) if shrunk else changes(before, after)
    return "; ".join(found)


def tried(*calls: Callable[[], object]) -> None:
    """Make every call, also where one before was refused, and raise the first refusal in the end."""
    refused: BambaQuantError | None = None
    for call in calls:
        try:
            call()
        except BambaQuantError as error:
            refused = refused or error
    if refused is not None:
        raise refused
