"""How long a case may take and how much memory: alarms in this process, a limit of the system, the peak measured.

Seconds are of the processor, so that a busy machine makes no failures; one that waits has twice as many by the clock.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

MIB = 1 << 20


class TimeUp(BaseException):
    """A case took too long; no ``except Exception`` may hide it."""


@dataclass(frozen=True)
class Limits:
    """Of one case: seconds, and bytes above what the process had before it."""

    seconds: float = 5.0
    memory: int = 1 << 30

    @property
    def waiting(self) -> float:
        """Seconds by the clock."""
        return 2 * self.seconds


def _ring(number: int, frame: FrameType | None) -> None:
    raise TimeUp


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Raise ``TimeUp`` after the seconds, and let no allocation exceed the memory."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limits.memory, most))
    timers = (
        (signal.ITIMER_PROF, signal.SIGPROF, limits.seconds),
        (signal.ITIMER_REAL, signal.SIGALRM, limits.waiting),
    )
    for timer, number, seconds in timers:
        signal.signal(number, _ring)
        # Again every half second, should something swallow the first.
        signal.setitimer(timer, seconds, 0.5)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def status(key: str) -> int:
    """Bytes that the kernel says of this process: VmRSS, VmHWM (the peak), VmData."""
    with open("/proc/self/status", "rb") as stream:  # noqa: PTH123 - before every case
        text = stream.read()
    start = text.index(key.encode() + b":") + len(key) + 1
    return int(text[start : text.index(b"kB", start)]) * 1024


def reset_peak() -> None:
    """Let ``VmHWM`` begin again at the present size."""
    with open("/proc/self/clear_refs", "wb") as stream:  # noqa: PTH123
        stream.write(b"5")
