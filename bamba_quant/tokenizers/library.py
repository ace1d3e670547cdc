"""The guard around the tokenizers and sentencepiece libraries: their errors become a TokenizerError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bamba_quant.errors import BambaQuantError, TokenizerError


@contextmanager
def library_errors(
    where: object, what: str = "the tokenizer cannot be run", fix: str = "fetch the tokenizer's files again"
) -> Iterator[None]:
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
        if "retry-limit" in str(error):
            fix = "correct the pattern in tokenizer.json that takes too many steps on a text, or use another tokenizer"
        raise TokenizerError(
            what, where=where, found=shortened(str(error)) or type(error).__name__, fix=fix
        ) from error


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what is written to file descriptor 2: a panic of Rust code writes there before it can be caught.

    It is the descriptor of the whole process, so this is for loading a tokenizer, not for each text.
    """
    try:
        saved = os.dup(2)
    except OSError:  # closed: nothing can be written
        yield
        return
    try:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def shortened(text: str, most: int = 200) -> str:
    """The first line of ``text``, cut at ``most`` characters."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= most else line[:most] + "…"
