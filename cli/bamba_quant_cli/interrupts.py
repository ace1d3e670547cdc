"""How a command ends on a signal: it cleans up, prints one line about its output, and exits with 128 + n.

A signal raises ``Interrupted`` in the main thread, so that ``finally`` and ``with`` remove partial files on the way
out. Signals that arrive during that clean-up are ignored, except the third SIGINT, which ends the process at once. One
that arrives while an error is handled is raised a second later, so that it does not disturb that clean-up either. An
``Interrupted`` that a library swallows (a bare ``except``, a callback from C, a finalizer) is raised again.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # typing's, without the import: until ``run`` nothing of this module is in force
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType
    from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Set by --processes for the processes it starts: their number and the pid of the starter, as "count/pid".
STARTED = "BAMBA_QUANT_PROCESSES"
# In which the clean-up after an error may end, and after which an interrupt that was swallowed is raised again.
_SECONDS_TO_RAISE = 1.0
# Ends a progress line of a terminal, and what the terminal shows for Ctrl-C.
_CLEAR_LINE = "\r\x1b[K"

_NOTHING = "nothing written"
_message: Callable[[], str] = lambda: _NOTHING  # noqa: E731
_first = 0  # the signal that arrived first
_raised = False
_repeated = 0  # SIGINT during the clean-up
_held = 0
_waiting = 0  # a signal that arrived while signals were blocked


class Interrupted(SystemExit):
    """A signal ended the process. It is a ``SystemExit``, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def run(command: Callable[[], None]) -> None:
    """Run ``command``, which ends the process when it is interrupted; what comes after it cannot be."""
    try:
        try:
            _install()
            with preserve_interrupt():
                command()
        finally:
            _ignore()
    except Interrupted as error:
        _ignore()
        _say(error)
        raise


def set_interrupt_message(what: Callable[[], str]) -> None:
    """Have the line that an interrupt prints end in ``what`` says is left then."""
    global _message
    _message = what


def announce_outputs(*outputs: Path | None, unfinished: Path | None = None) -> None:
    """Have an interrupt say which of ``outputs``, files or directories that appear whole, were written from now on.

    In ``unfinished``, a directory or a file, an interrupt leaves what --resume needs to go on with the first of them.
    """
    before = {path: _state(path) for path in outputs if path}

    def left() -> str:
        if unfinished and unfinished.exists():
            options = "--resume --overwrite" if any(path.exists() for path in before) else "--resume"
            return f"finished parts are kept in {unfinished}; continue with {options}"
        changed = [str(path) for path, state in before.items() if _state(path) != state]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"written and complete: {changed[0]}{more}" if changed else _NOTHING

    set_interrupt_message(left)


@contextmanager
def block_signals() -> Iterator[None]:
    """Signals wait until the block ends; processes that are started in it have them blocked until ``run``."""
    global _held, _waiting
    _held += 1
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        _held -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        number, _waiting = _waiting, 0
        if number:
            _handle(number, None)


@contextmanager
def preserve_interrupt() -> Iterator[None]:
    """What an interrupt's clean-up raises, or a library that swallowed the interrupt, stays an interrupt."""
    try:
        yield
    except Exception as error:
        if not _raised:
            raise
        from bamba_reference.errors import BambaQuantError

        if _behind(error) and isinstance(error, BambaQuantError | OSError):
            what = str(error).splitlines()[0]
            set_interrupt_message(lambda: f"the clean-up failed: {what}")
        raise Interrupted(_first) from error


def _install() -> None:
    global _first, _message, _raised, _repeated
    _first, _raised, _repeated = 0, False, 0
    _message = lambda: _NOTHING  # noqa: E731  of an earlier command of this process
    for number in SIGNALS:
        # nohup and shells, of what runs in the background, have signals ignored: they stay so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    signal.signal(signal.SIGALRM, _raise_late)
    sys.unraisablehook = _unraisable
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _ignore() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: FrameType | None) -> None:
    global _first, _repeated, _waiting
    if _held:
        _waiting = _waiting or number
        return
    if not _on_its_way():
        _first = _first or number
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_RAISE, _SECONDS_TO_RAISE)
        if sys.exception() is None:
            _raise()
        return
    # One that --processes started gets a signal from the terminal and one from its starter, which limits its time.
    if number == signal.SIGINT and STARTED not in os.environ:
        _repeated += 1
        if _repeated == 2:
            _print(f"{_word(_first)}; the clean-up was cut short, partial files may be left")
            os._exit(128 + _first)


def _raise_late(number: int, frame: FrameType | None) -> None:
    if not _held and not _on_its_way():
        _raise()


def _raise() -> None:
    global _raised
    _raised = True
    raise Interrupted(_first)


def _on_its_way() -> bool:
    """Whether the code that runs now cleans up after an ``Interrupted``."""
    return _behind(sys.exception()) is not None


def _behind(error: BaseException | None) -> Interrupted | None:
    """The ``Interrupted`` that ``error`` is, or during whose handling it was raised."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    if not isinstance(lost.exc_value, Interrupted):  # that one is raised again
        sys.__unraisablehook__(lost)


def _say(error: Interrupted) -> None:
    # Of several processes the one that started them speaks; under torchrun the first.
    if STARTED in os.environ or os.environ.get("RANK", "0") != "0":
        return
    try:
        left = _message()
    except OSError:  # of a stream that is broken
        left = _NOTHING
    _print(f"{_word(error.number)}; {left}")


def _word(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"


def _print(line: str) -> None:
    from bamba_quant.printable import printable

    shown = printable(line, keep="")
    stream = sys.stderr
    with suppress(AttributeError, OSError, ValueError):  # of a stderr that is closed or broken
        stream.write(f"{_CLEAR_LINE if stream.isatty() else ''}{shown}\n")
        stream.flush()


def _state(path: Path) -> Any:
    """Inode, size and time, which differ when a file or a directory is replaced."""
    try:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    except OSError:
        return None
