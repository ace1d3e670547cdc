"""The guard around the tokenizers and sentencepiece libraries: their errors become a TokenizerError."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

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
            what, where=where, found=first_line(str(error)) or type(error).__name__, fix=fix
        ) from error


class _QuietStderr:
    """File descriptor 2 led to nowhere while any thread wants that, since it is the descriptor of the whole process."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._wanted = 0
        self._saved: int | None = None

    def __enter__(self) -> None:
        with self._changing:
            self._wanted += 1
            if self._wanted == 1:
                with suppress(OSError):  # closed: nothing can be written
                    self._saved = os.dup(2)
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, 2)
                    os.close(null)

    def __exit__(self, *error: object) -> None:
        with self._changing:
            self._wanted -= 1
            if self._wanted == 0 and self._saved is not None:
                os.dup2(self._saved, 2)
                os.close(self._saved)
                self._saved = None


_quiet = _QuietStderr()


def quiet_stderr() -> AbstractContextManager[None]:
    """Drop what is written to file descriptor 2: a panic of Rust code writes there before it can be caught.

    For loading a tokenizer, not for each text. Several threads may be inside at once, and a thread more than once.
    """
    return _quiet


def first_line(text: str, most: int = 200) -> str:
    """The first line of ``text``, cut at ``most`` characters."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= most else line[:most] + "…"
