"""Cuts a sequence into runs of whole chunks, so that what a scan computes at once fits where it should."""

from __future__ import annotations

from collections.abc import Iterator


def pieces(length: int, chunk: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, chunk size): runs of at most ``most`` whole chunks, then the rest as a short chunk."""
    whole = length // chunk * chunk
    for start in range(0, whole, max(1, most) * chunk):
        yield start, min(whole, start + max(1, most) * chunk), chunk
    if whole < length:
        yield whole, length, length - whole
