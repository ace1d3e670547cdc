"""Guards around the tokenizers and sentencepiece libraries: their errors, and bounds on what they run."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from bamba_quant.errors import BambaQuantError, TokenizerError, repr_short


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
    """Redirects file descriptor 2, which all threads share, to /dev/null while any thread is inside."""

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


_TEXT_ID = 2**32 - 1  # the largest id that the library has


def check_post_processor(tokenizer: Mapping[str, Any], where: object) -> None:
    """Raise ``TokenizerError`` for a template with which the library's Rust code would panic.

    A panic prints a backtrace on stderr before it can be caught.
    """
    pending = [tokenizer.get("post_processor")]
    while pending:
        step = pending.pop()
        if not isinstance(step, Mapping):
            continue  # the library refuses it
        if isinstance(step.get("processors"), list):
            pending += step["processors"]
        single, tokens = step.get("single"), step.get("special_tokens")
        if not isinstance(single, list) or not isinstance(tokens, Mapping):
            continue
        for piece in single:
            token, sequence = (_id(piece, kind) for kind in ("SpecialToken", "Sequence"))
            if (token is not None and token not in tokens) or sequence not in (None, "A"):
                raise TokenizerError(
                    "the tokenizer's post-processor cannot be run: it names a token or a sequence that is unknown",
                    where=where,
                    found=repr_short(piece),
                    expected="sequence A, and the tokens in its special_tokens",
                    fix="fetch tokenizer.json again",
                )


def tokens_around(tokenizer: Mapping[str, Any], where: object) -> tuple[list[int], list[int]]:
    """The ids that the post-processor adds before and after a text.

    It runs with a vocabulary of one token, whose id no real token has; all other ids are added ones. Raises
    ``TokenizerError`` for one that cannot be run, or whose result does not hold the text once.
    """
    from tokenizers import Tokenizer

    check_post_processor(tokenizer, where)
    bare: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": tokenizer.get("post_processor"),
        "model": {"type": "BPE", "vocab": {"a": _TEXT_ID}, "merges": []},
    }
    with library_errors(where, "the tokenizer's post-processor cannot be run"), quiet_stderr():
        whole = Tokenizer.from_str(json.dumps(bare)).encode("a").ids
    if whole.count(_TEXT_ID) != 1:
        raise TokenizerError(
            "the tokenizer's post-processor cannot be run: its result does not contain the text exactly once",
            where=where,
            found=repr_short(whole),
            expected="special tokens, sequence A once, special tokens",
            fix="fetch tokenizer.json again",
        )
    position = whole.index(_TEXT_ID)
    return whole[:position], whole[position + 1 :]


def _id(piece: object, kind: str) -> object:
    entry = piece.get(kind) if isinstance(piece, Mapping) else None
    found = entry.get("id") if isinstance(entry, Mapping) else None
    return found if isinstance(found, str) else None


_MOST_GROWTH = 128  # times the length of a text; the steps of published tokenizers come to 72 at most
_MOST_STEPS = 100
_MOST_PATTERN = 4096  # characters of a regular expression; llama.cpp's longest has 400
_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
_LONGEST = 18  # characters that NFKC makes of one, U+FDFA


def check_pipeline(tokenizer: Mapping[str, Any], where: object) -> None:
    """Raise ``TokenizerError`` for steps that could multiply a text, or for a pattern that is too long.

    A few replacements in a row can make a gigabyte out of a word.
    """
    for part, nested in _STEPS.items():
        growth = 1
        for number, step in enumerate(_flattened(tokenizer.get(part), nested)):
            growth *= _growth(step)
            pattern = _pattern(step)[0]
            for size, most, found in (
                (number + 1, _MOST_STEPS, f"{number + 1} steps or more"),
                (growth, _MOST_GROWTH, f"texts up to {growth} times as long"),
                (len(pattern), _MOST_PATTERN, f"a regular expression of {len(pattern)} characters"),
            ):
                if size > most:
                    raise TokenizerError(
                        f"the tokenizer's {part} could take unbounded time or memory",
                        where=f"{where}, step {number + 1}: {repr_short(step)}",
                        found=found,
                        expected=f"at most {most}",
                        fix="fetch tokenizer.json again, or use another tokenizer",
                    )


def check_charsmap(charsmap: bytes, where: object) -> None:
    """Raise ``TokenizerError`` for a precompiled charsmap of SentencePiece that could multiply a text."""
    growth = charsmap_growth(charsmap)
    if growth > _MOST_GROWTH:
        raise TokenizerError(
            "the tokenizer's normalization could take unbounded time or memory",
            where=where,
            found=f"a character becomes {growth} bytes",
            expected=f"at most {_MOST_GROWTH}",
            fix="fetch the tokenizer's files again",
        )


def charsmap_growth(charsmap: bytes) -> int:
    """Characters that a precompiled charsmap of SentencePiece makes of one, at most.

    It is the size of a trie, the trie, and the replacements, each ended by a zero byte.
    """
    replacements = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    longest = max(map(len, replacements.split(b"\0")))
    return _LONGEST if longest <= 3 * _LONGEST else longest


def _flattened(whole: object, nested: str) -> Iterator[Mapping[str, Any]]:
    """The steps in order; the library refuses what is not an object."""
    pending = [whole]
    while pending:
        step = pending.pop()
        if isinstance(step, Mapping):
            inner = step.get(nested)
            if isinstance(inner, list):
                pending += reversed(inner)
            else:
                yield step


def _pattern(step: Mapping[str, Any]) -> tuple[str, bool]:
    """The pattern of a step, and whether it is a regular expression."""
    pattern = step.get("pattern")
    if isinstance(pattern, Mapping):
        for kind in ("Regex", "String"):
            if isinstance(pattern.get(kind), str):
                return pattern[kind], kind == "Regex"
    return (pattern if isinstance(pattern, str) else ""), False


def _growth(step: Mapping[str, Any]) -> int:
    """Characters that a step makes of one, at most."""
    kind = step.get("type")
    if kind == "Replace":
        content, (pattern, regex) = step.get("content"), _pattern(step)
        made = len(content) if isinstance(content, str) else 0
        if regex or not pattern:  # it may match between any two characters
            return made + 1
        return max(1, -(-made // len(pattern)))
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend", "")))
    if kind == "ByteLevel":
        return 4
    if kind == "BertNormalizer":
        return 3  # a space on each side of a Chinese character
    if kind == "Precompiled":
        try:
            return charsmap_growth(base64.b64decode(str(step.get("precompiled_charsmap"))))
        except ValueError:
            return 1  # the library refuses it
    return 1
