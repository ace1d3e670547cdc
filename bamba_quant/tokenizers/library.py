"""The guard around the tokenizers and sentencepiece libraries: whatever they raise becomes a TokenizerError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bamba_quant.errors import BambaQuantError, TokenizerError


@contextmanager
def library_errors(where: object, what: str = "the tokenizer cannot be run") -> Iterator[None]:
    """Turn any error of a library into a ``TokenizerError``, a panic of its Rust code included.

    The libraries raise plain exceptions of many kinds for a vocabulary that they cannot run. pyo3's PanicException
    derives from BaseException; KeyboardInterrupt and SystemExit pass through.
    """
    try:
        yield
    except BambaQuantError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            what,
            where=where,
            found=shortened(str(error)) or type(error).__name__,
            fix="fetch the tokenizer's files again",
        ) from error


def shortened(text: str, most: int = 200) -> str:
    """The first line of ``text``, cut at ``most`` characters."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= most else line[:most] + "…"
