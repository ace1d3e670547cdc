"""Other people's readers: what they refuse of a file, nobody should accept."""

from __future__ import annotations

import logging
from pathlib import Path

from tests.fuzz.runner import WrongError


def safetensors_accepts(file: Path) -> None:
    """Raise ``WrongError`` where the safetensors library refuses a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise WrongError("accepted what safetensors refuses", str(error)) from None


def gguf_accepts(file: Path) -> None:
    """Raise ``WrongError`` where gguf-py refuses a file for what its header says."""
    from gguf import GGUFReader

    logging.getLogger("gguf.gguf_reader").setLevel(logging.CRITICAL)
    try:
        GGUFReader(file)
    # It asks for UTF-8, of which llama.cpp knows nothing; what else it raises is its refusal.
    except UnicodeDecodeError:
        pass
    except (ValueError, KeyError, IndexError, OverflowError, OSError, TypeError) as error:
        raise WrongError("accepted what gguf-py refuses", repr(error)) from None
