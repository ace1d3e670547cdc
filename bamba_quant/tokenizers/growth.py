"""Bounds on the steps of a tokenizer.json that make a text longer, and on their patterns, before any of them runs."""

from __future__ import annotations

import base64
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from bamba_quant.errors import TokenizerError

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
            if growth > _MOST_GROWTH or number >= _MOST_STEPS or len(pattern) > _MOST_PATTERN:
                raise TokenizerError(
                    f"the tokenizer's {part} could take unbounded time or memory",
                    where=where,
                    found=f"step {number + 1}: {reprlib.repr(step)}",
                    expected=f"at most {_MOST_STEPS} steps that make a text {_MOST_GROWTH} times as long, and regular "
                    f"expressions of at most {_MOST_PATTERN} characters",
                    fix="fetch tokenizer.json again",
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
    left = [whole]
    while left:
        step = left.pop()
        if isinstance(step, Mapping):
            inner = step.get(nested)
            if isinstance(inner, list):
                left += reversed(inner)
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
