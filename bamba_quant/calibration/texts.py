"""Calibration texts: read from files, cut into chunks of tokens, split into a part to learn from and a held-out one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bamba_quant.errors import CheckpointError
from bamba_quant.inference.loading import read_text
from bamba_quant.tokenizers.encoder import Encoder
from bamba_reference.packing import InputError

# Of a single file about so many parts are held out, at even distances.
_PLACES = 4
_LEAST_CHARACTERS = 4096


@dataclass(frozen=True)
class Text:
    """A text, or a part of one.

    ``sha256`` is that of the whole file's text, decompressed (``xzcat FILE | sha256sum``).
    """

    path: Path
    sha256: str
    content: str


def read_texts(paths: Sequence[Path]) -> tuple[Text, ...]:
    """The UTF-8 texts in ``paths``, plain or .xz, each of at most 256 MiB.

    Raises ``CheckpointError`` for what is not such a text, for none, and for two files with the same content.
    """
    if not paths:
        raise CheckpointError("there is no calibration text", fix="give one with --text")
    texts: dict[str, Text] = {}
    for path in paths:
        content, sha256 = read_text(path)
        if sha256 in texts:
            raise CheckpointError(
                "a calibration text is given twice",
                where=path,
                found=f"the content of {texts[sha256].path}",
                fix="name every text once",
            )
        texts[sha256] = Text(path, sha256, content)
    return tuple(texts.values())


def token_chunks(
    encoder: Encoder, texts: Sequence[Text], ctx: int, limit: int | None = None
) -> NDArray[np.int64]:
    """Chunks of tokens (n, ctx), int64: the texts one after the other, BOS in each chunk's first place if there is one.

    With ``limit``, n is at most that, and every text gives its first chunks in proportion to its length; of a single
    text these are the chunks of llama-imatrix. The tokens left at the end are not used. Raises ``InputError`` for
    texts of less than one chunk, and for a context or a limit that is not a positive number.
    """
    if ctx < 2:
        raise InputError("the context is too short", found=ctx, expected="at least 2 tokens, customarily 512")
    if limit is not None and limit < 1:
        raise InputError("the number of chunks is too small", found=limit, expected="at least 1")
    each = [np.asarray(encoder.encode(text.content), np.int64) for text in texts]
    ids = np.concatenate([*each, np.empty(0, np.int64)])  # (T,)
    count = len(ids) // ctx
    if not count:
        raise InputError(
            "the calibration text is too short",
            found=f"{len(ids)} tokens",
            expected=f"at least {ctx}, one chunk",
            fix="use a longer text, or a shorter context where the command has --ctx",
        )
    chunks: NDArray[np.int64] = ids[: count * ctx].reshape(count, ctx)
    if limit is not None and limit < count:
        lengths = np.array([len(some) for some in each])
        ends = np.cumsum(lengths)
        starts = np.arange(count) * ctx
        owner = np.searchsorted(ends, starts, side="right")
        how_far = (starts - (ends - lengths)[owner]) / lengths[
            owner
        ]  # 0 at the beginning of a text, 1 at its end
        chunks = chunks[np.sort(np.argsort(how_far, kind="stable")[:limit])]
    chunks = chunks.copy()
    if encoder.bos is not None:
        chunks[:, 0] = encoder.bos
    return chunks


def split_held_out(texts: Sequence[Text], fraction: float = 0.1) -> tuple[tuple[Text, ...], tuple[Text, ...]]:
    """The texts to learn from, and about ``fraction`` of all characters held out.

    What is held out is whole documents: files, and of a file that is long beside all texts together contiguous parts
    of it that begin and end at blank lines. A line that both sides have is dropped from what is held out. The result
    depends on nothing but the texts. Raises ``InputError`` for texts that are too short to be split.
    """
    if not 0 < fraction < 1:
        raise InputError("the fraction to hold out is not between 0 and 1", found=fraction)
    total = sum(len(text.content) for text in texts)
    size = max(_LEAST_CHARACTERS, int(total * fraction / _PLACES))
    learned: list[Text] = []
    held: list[Text] = []
    owed = 0.0
    for part in (part for text in texts for part in _parts(text, size)):
        length = len(part.content)
        owed += length * fraction
        if owed < length / 2:
            learned.append(part)
        else:
            held.append(part)
            owed -= length
    known = {line for part in learned for line in map(str.strip, part.content.splitlines()) if line}
    kept = [replace(part, content=_without(part.content, known)) for part in held]
    kept = [part for part in kept if part.content.strip()]
    if not learned or not kept:
        raise InputError(
            "the calibration text is too short to hold a part of it out",
            found=f"{total:,} characters, {len(learned)} parts to learn from and {len(kept)} held out",
            expected=f"several parts of at least {_LEAST_CHARACTERS:,} characters that differ",
            fix="give more text",
        )
    return tuple(learned), tuple(kept)


def _parts(text: Text, size: int) -> list[Text]:
    """A text in parts of ``size`` characters or a little more, cut after blank lines, else lines, else anywhere."""
    content, start, parts = text.content, 0, []
    while start < len(content):
        end = start + size
        if len(content) - end < size // 2:
            end = len(content)
        for mark in ("\n\n", "\n"):
            found = content.find(mark, end, end + size // 2)
            if found >= 0:
                end = found + len(mark)
                break
        parts.append(replace(text, content=content[start:end]))
        start = end
    return parts


def _without(content: str, lines: set[str]) -> str:
    return "".join(line for line in content.splitlines(keepends=True) if line.strip() not in lines)
