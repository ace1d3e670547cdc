"""Reads a small TOML file in bounds that the parser's time and memory are known for."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from bamba_quant.errors import BambaQuantError, CheckpointError
from bamba_quant.files.reading import read_text

_MOST_BYTES = 1 << 20
_MOST_PARTS = 100  # of a key: the parser's time grows with their square


def read_toml(file: Path, what: str, error: type[BambaQuantError]) -> dict[str, Any]:
    """The tables of a TOML file; ``what`` names its content in messages. Raises ``error``."""
    try:
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise error(
                f"the file of {what} is too large",
                where=file,
                found=f"{size:,} bytes",
                expected=f"{_MOST_BYTES:,} at most",
            )
        text = read_text(file, f"a TOML file of {what}")
    except OSError as cause:
        raise error(f"the {what} cannot be read", where=file, found=cause.strerror) from cause
    except CheckpointError as cause:
        raise error(f"the {what} cannot be read", where=file, found=cause.found or cause.what) from cause
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _MOST_PARTS and not line.lstrip().startswith("#"):
            raise error(f"a key of the {what} has too many parts", where=f"{file}, line {number}")
    try:
        return tomllib.loads(text)
    except RecursionError as cause:
        raise error(f"the {what} are nested too deeply", where=file) from cause
    except ValueError as cause:  # the parser's own, and Python's of integers of thousands of digits
        raise error(f"the {what} are not TOML", where=file, found=str(cause)) from cause
