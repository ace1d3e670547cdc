"""Values from files as short texts for error messages."""

from __future__ import annotations

import reprlib
from typing import Any


def shown(value: Any) -> str:
    """``repr`` of a value of any type and size, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python converts
        return (
            f"an integer of {value.bit_length():,} bits" if isinstance(value, int) else type(value).__name__
        )
