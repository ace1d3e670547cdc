"""llama-perplexity's file of a base's log-probabilities, written and read byte for byte as it does.

Layout (llama.cpp, tools/perplexity/perplexity.cpp, all little-endian): the eight letters ``_logits_``, uint32 context,
int32 vocabulary V, int32 chunks, int32 tokens (chunks, context) of the text as it is, without the BOS that is put
before each chunk; then for every scored token float32 scale, float32 least ln p, and V uint16 q, one more where V is
odd: ln p = scale · q + least. Nothing below the likeliest token by more than 16 nats is kept apart.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bamba_quant.errors import CheckpointError
from bamba_quant.evaluation.scores import TOP, BaseBlock
from bamba_quant.ranks import ALONE, Ranks
from bamba_quant.writers.atomic import atomic_files, output_error, partial_name

MAGIC = b"_logits_"
_HEAD = struct.Struct("<8sIii")
# llama-perplexity leaves what is this unlikely out of the divergence, because the file does not tell it apart.
CUT = -16.0
_RANGE = np.float32(16)
# 1.5 · 2^23: adding it rounds half to even, as ggml's nearest_int does.
_ROUND = np.float32(12582912)

Words = NDArray[np.uint16]


@dataclass(frozen=True)
class LogitsFile:
    """What a file's header says: ``tokens`` (chunks, ctx), int32; ``scored`` tokens of each chunk have a row."""

    path: Path
    ctx: int
    vocab_size: int
    tokens: NDArray[np.int32]

    @property
    def chunks(self) -> int:
        return len(self.tokens)

    @property
    def scored(self) -> int:
        return self.ctx - 1 - self.ctx // 2

    @property
    def row_words(self) -> int:
        """16-bit words of a scored token's row."""
        return _row_words(self.vocab_size)

    @property
    def start(self) -> int:
        return _HEAD.size + self.tokens.nbytes

    @property
    def n_bytes(self) -> int:
        return self.start + 2 * self.chunks * self.scored * self.row_words


def is_logits_file(path: Path) -> bool:
    """Whether ``path`` is a file that begins as llama-perplexity's do."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_logits_file(path: Path) -> LogitsFile:
    """The header of a file. Raises ``CheckpointError`` for one that is none, or that is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(_HEAD.size)
            if len(head) < _HEAD.size or not head.startswith(MAGIC):
                raise CheckpointError("not a file of llama-perplexity's logits", where=path)
            _, ctx, vocab_size, chunks = _HEAD.unpack(head)
            if ctx < 3 or vocab_size < 1 or chunks < 1 or _HEAD.size + 4 * ctx * chunks > size:
                raise CheckpointError(
                    "the header of a file of logits makes no sense",
                    where=path,
                    found=f"context {ctx}, vocabulary {vocab_size}, {chunks} chunks in {size:,} bytes",
                )
            tokens = np.frombuffer(stream.read(4 * ctx * chunks), "<i4").reshape(chunks, ctx)
    except OSError as error:
        raise CheckpointError("a file of logits cannot be read", where=path, found=error.strerror) from error
    found = LogitsFile(path, ctx, vocab_size, tokens)
    if size < found.n_bytes:
        raise CheckpointError(
            "a file of logits is truncated",
            where=path,
            found=f"{size:,} bytes",
            expected=f"{found.n_bytes:,}",
            fix="make it again; llama-perplexity writes it only as far as it ran",
        )
    return found


def base_blocks(
    file: LogitsFile, part: slice, blocks: Sequence[int], device: torch.device
) -> Iterator[BaseBlock]:
    """The rows of the chunks ``part`` as what ``scores.score`` compares with, in blocks of so many tokens.

    Least entries stand for whatever is less likely: those at or below -16 are left out of the divergence, and what
    is given for p is not renormalized, as in llama-perplexity.
    """
    targets = file.tokens[:, file.ctx // 2 + 1 :].reshape(-1)
    rows = np.memmap(file.path, "<u2", "r", file.start, (file.chunks * file.scored, file.row_words))
    start = part.start * file.scored
    for length in blocks:
        now = np.array(rows[start : start + length])
        wanted = torch.from_numpy(targets[start : start + length].astype(np.int64))
        start += length
        log_p = torch.from_numpy(decode_rows(now, file.vocab_size)).to(device)  # (t, V)
        yield BaseBlock(
            log_p,
            torch.zeros(len(now), 1, dtype=torch.float64, device=device),
            wanted.to(device),
            _likeliest(now[:, 4 : 4 + file.vocab_size]).to(device),
            CUT,
        )


@contextmanager
def writing(
    path: Path,
    tokens: NDArray[np.int64],
    vocab_size: int,
    *,
    overwrite: bool = False,
    inputs: Collection[Path] = (),
    part: slice = slice(None),
    ranks: Ranks = ALONE,
) -> Iterator[Callable[[NDArray[np.float32]], None]]:
    """A function to be given the logits (t, V) of all scored tokens in order; the file appears when all are there.

    ``tokens`` (chunks, ctx) are the text's own. Each of ``ranks`` gives those of its ``part``, into one file that
    the first of them has made, so all have to reach its directory. Raises ``OutputError`` where the file exists, is
    one of ``inputs`` or cannot be written.
    """
    file = LogitsFile(path, tokens.shape[1], vocab_size, np.asarray(tokens, "<i4"))
    first, last, _ = part.indices(file.chunks)
    begin, stop = (file.start + 2 * chunk * file.scored * file.row_words for chunk in (first, last))
    at = begin
    mark = ranks.share(secrets.token_hex(4))
    with ExitStack() as stack:
        if ranks.first:
            (descriptor,) = stack.enter_context(
                atomic_files([(path, file.n_bytes)], overwrite=overwrite, inputs=inputs, mark=mark)
            )
            head = _HEAD.pack(MAGIC, file.ctx, vocab_size, file.chunks) + file.tokens.tobytes()
            _write(descriptor, head, 0)
        ranks.gather("made")
        if not ranks.first:
            stack.enter_context(_refused(path))
            descriptor = os.open(partial_name(path, mark), os.O_WRONLY)
            stack.callback(os.close, descriptor)

        def write(logits: NDArray[np.float32]) -> None:
            nonlocal at
            raw = encode_rows(logits).tobytes()
            _write(descriptor, raw, at)
            at += len(raw)

        yield write
        if at != stop:
            raise ValueError(f"{at - begin:,} of {stop - begin:,} bytes were given to {path}")
        os.fsync(descriptor)
        ranks.gather("written")


def encode_rows(logits: NDArray[np.float32]) -> Words:
    """Logits (t, V) to rows of words (t, ``row_words``), in llama-perplexity's own float32 steps."""
    count, vocab_size = logits.shape
    out = np.zeros((count, _row_words(vocab_size)), np.uint16)
    for row, words in zip(logits, out, strict=True):
        highest = row.max()
        lowest = np.maximum(row.min(), highest - _RANGE)
        total = np.exp(row - highest).sum(dtype=np.float64)
        log_total = np.float32(np.log(total))
        scale = (highest - lowest) / np.float32(65535)
        words[:4] = np.array([scale, lowest - highest - log_total], "<f4").view(np.uint16)
        if scale:
            inverse = np.float32(1) / scale
            steps = (inverse * (row - lowest) + _ROUND).view(np.uint32) & 0xFFFF
            words[4 : 4 + vocab_size] = np.where(row > lowest, steps, 0)
    return out


def decode_rows(words: Words, vocab_size: int) -> NDArray[np.float32]:
    """ln p (t, V) of rows (t, ``row_words``), in float32 as llama-perplexity computes it."""
    scale, least = np.ascontiguousarray(words[:, :4]).view("<f4").T[:, :, None]  # (t, 1) each
    decoded: NDArray[np.float32] = scale * words[:, 4 : 4 + vocab_size].astype(np.float32) + least
    return decoded


def _likeliest(words: Words) -> torch.Tensor:
    """The numbers of the five greatest words of each row; of equal ones the first comes first, as there."""
    place = np.arange(words.shape[1], 0, -1)
    ranked = torch.from_numpy(words.astype(np.int64) * len(place) + place)
    return ranked.topk(min(TOP, len(place))).indices


def _row_words(vocab_size: int) -> int:
    return 2 * ((vocab_size + 1) // 2) + 4


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Says of ``path`` what the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise output_error(error, path) from error


def _write(descriptor: int, raw: bytes, at: int) -> None:
    view = memoryview(raw)
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count
