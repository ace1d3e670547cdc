"""What the tokenizers library takes from a tokenizer.json's post-processor without a check, checked here."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from bamba_quant.errors import TokenizerError


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


def _id(piece: object, kind: str) -> object:
    entry = piece.get(kind) if isinstance(piece, Mapping) else None
    found = entry.get("id") if isinstance(entry, Mapping) else None
    return found if isinstance(found, str) else None
