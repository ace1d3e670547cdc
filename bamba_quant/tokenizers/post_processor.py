"""The post-processor of a tokenizer.json: checked for what the tokenizers library does not, and what it adds."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any

from bamba_quant.errors import TokenizerError
from bamba_quant.tokenizers.library import library_errors, quiet_stderr

_TEXT = 2**32 - 1  # the largest id that the library has


def check_post_processor(tokenizer: Mapping[str, Any], where: object) -> None:
    """Raise ``TokenizerError`` for a template with which the library's Rust code would panic.

    A panic prints a backtrace on stderr before it can be caught.
    """
    left = [tokenizer.get("post_processor")]
    while left:
        step = left.pop()
        if not isinstance(step, Mapping):
            continue  # the library refuses it
        if isinstance(step.get("processors"), list):
            left += step["processors"]
        single, tokens = step.get("single"), step.get("special_tokens")
        if not isinstance(single, list) or not isinstance(tokens, Mapping):
            continue
        for piece in single:
            token, sequence = (_id(piece, kind) for kind in ("SpecialToken", "Sequence"))
            if (token is not None and token not in tokens) or sequence not in (None, "A"):
                raise TokenizerError(
                    "the tokenizer's post-processor cannot be run: it names a token or a sequence that is unknown",
                    where=where,
                    found=reprlib.repr(piece),
                    expected="sequence A, and the tokens in its special_tokens",
                    fix="fetch tokenizer.json again",
                )


def tokens_around(tokenizer: Mapping[str, Any], where: object) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and behind a text.

    It runs behind a vocabulary of one token, whose id no real token has, so that what it adds stands out. Raises
    ``TokenizerError`` for one that cannot be run, or whose result does not hold the text once.
    """
    from tokenizers import Tokenizer

    check_post_processor(tokenizer, where)
    bare: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": tokenizer.get("post_processor"),
        "model": {"type": "BPE", "vocab": {"a": _TEXT}, "merges": []},
    }
    with library_errors(where, "the tokenizer's post-processor cannot be run"), quiet_stderr():
        whole = Tokenizer.from_str(json.dumps(bare)).encode("a").ids
    if whole.count(_TEXT) != 1:
        raise TokenizerError(
            "the tokenizer's post-processor cannot be run: its result does not hold the text once",
            where=where,
            found=reprlib.repr(whole),
            expected="special tokens, sequence A once, special tokens",
            fix="fetch tokenizer.json again",
        )
    place = whole.index(_TEXT)
    return whole[:place], whole[place + 1 :]


def _id(piece: object, kind: str) -> object:
    entry = piece.get(kind) if isinstance(piece, Mapping) else None
    found = entry.get("id") if isinstance(entry, Mapping) else None
    return found if isinstance(found, str) else None
