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

from bamba_quant.checkpoint.base import RawReader
from bamba_quant.errors import CheckpointError
from bamba_quant.evaluation.scores import TOP, BaseBlock
from bamba_quant.files.reading import open_regular
from bamba_quant.inference.distributed import SINGLE_PROCESS, Ranks
from bamba_quant.writers.atomic import atomic_files, output_error, partial_name

MAGIC = b"_logits_"
_HEAD = struct.Struct("<8sIii")
# llama-perplexity leaves entries this unlikely out of the divergence, because the file does not distinguish them.
CUT = -16.0
_RANGE = np.float32(16)
# How far the logarithm of a probability may lie above 0 by the rounding of float32.
_ROUNDING = 0.01
# Of a text, 256 MiB: a sparse file can claim any number.
_MOST_TOKENS = 1 << 26
# 1.5 · 2^23: adding it rounds half to even, as ggml's nearest_int does.
_ROUND = np.float32(12582912)

_MAKE = "make the file of logits again"

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
        return _scored(self.ctx)

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
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_logits_file(path: Path) -> LogitsFile:
    """The header of a file. Raises ``CheckpointError`` for another kind of file, and for one that is not whole."""
    try:
        descriptor, size = open_regular(path)
        with os.fdopen(descriptor, "rb") as stream:
            head = stream.read(_HEAD.size)
            if len(head) < _HEAD.size or not head.startswith(MAGIC):
                raise CheckpointError("not a file of llama-perplexity's logits", where=path, fix=_MAKE)
            _, ctx, vocab_size, chunks = _HEAD.unpack(head)
            if ctx < 3 or vocab_size < 1 or chunks < 1 or ctx * chunks > _MOST_TOKENS:
                raise CheckpointError(
                    "the header of a file of logits is not valid",
                    where=path,
                    found=f"context {ctx}, vocabulary {vocab_size}, {chunks} chunks",
                    expected=f"a context of 3 at least, and {_MOST_TOKENS:,} tokens at most in all chunks",
                    fix=_MAKE,
                )
            needed = _HEAD.size + chunks * (4 * ctx + 2 * _scored(ctx) * _row_words(vocab_size))
            if size != needed:
                raise CheckpointError(
                    "a file of logits is "
                    + ("truncated" if size < needed else "longer than its header says"),
                    where=path,
                    found=f"{size:,} bytes",
                    expected=f"{needed:,} for {chunks} chunks of {ctx} tokens and a vocabulary of {vocab_size}",
                    fix="make it again; llama-perplexity writes it only as far as it ran",
                )
    except OSError as error:
        raise CheckpointError("a file of logits cannot be read", where=path, found=error.strerror) from error
    tokens = np.empty((chunks, ctx), "<i4")
    with RawReader() as reader:
        reader.read_into(path, _HEAD.size, tokens.view(np.uint8).reshape(-1))
    strange = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(strange):
        raise CheckpointError(
            "a file of logits has tokens outside its vocabulary",
            where=path,
            found=f"{len(strange):,} of {tokens.size:,}, the first of them {strange[0]}",
            expected=f"0 to {vocab_size - 1}",
            fix=_MAKE,
        )
    return LogitsFile(path, ctx, vocab_size, tokens)


def base_blocks(
    file: LogitsFile, part: slice, blocks: Sequence[int], device: torch.device
) -> Iterator[BaseBlock]:
    """The rows of the chunks ``part`` as input of ``scores.score``, in ``blocks``: lengths in tokens.

    Entries at or below -16 are left out of the divergence, and p is not renormalized, as in llama-perplexity.
    Raises ``CheckpointError`` for rows that cannot be
    read, and for rows that cannot be logarithms of probabilities.
    """
    targets = file.tokens[:, file.ctx // 2 + 1 :].reshape(-1)
    first = part.start * file.scored
    with RawReader() as reader:
        for length in blocks:
            now = np.empty((length, file.row_words), "<u2")
            place = file.start + 2 * first * file.row_words
            reader.read_into(file.path, place, now.view(np.uint8).reshape(-1))
            _check_rows(now, first, file)
            wanted = torch.from_numpy(targets[first : first + length].astype(np.int64))
            first += length
            log_p = torch.from_numpy(decode_rows(now, file.vocab_size)).to(device)  # (t, V)
            yield BaseBlock(
                log_p,
                torch.zeros(len(now), 1, dtype=torch.float64, device=device),
                wanted.to(device),
                _likeliest(now[:, 4 : 4 + file.vocab_size]).to(device),
                CUT,
            )


def _check_rows(words: Words, first: int, file: LogitsFile) -> None:
    """Raise ``CheckpointError`` for the first row that does not hold logarithms of probabilities.

    ``first`` is the number of the scored token that the first row belongs to.
    """
    with np.errstate(invalid="ignore"):  # of signaling NaN, which a file can hold
        scale, least = (each.astype(np.float64) for each in _scale_and_least(words))
        sound = np.isfinite(scale) & np.isfinite(least) & (scale >= 0) & (65535 * scale + least <= _ROUNDING)
    if not sound.all():
        row = int(sound.argmin())
        chunk, token = divmod(first + row, file.scored)
        raise CheckpointError(
            "a row of a file of logits does not hold logarithms of probabilities",
            where=f"{file.path}, chunk {chunk}, scored token {token}",
            found=f"scale {scale[row]:g}, least {least[row]:g}",
            expected="finite numbers, the scale not below 0 and 65535 · scale + least not above 0",
            fix=_MAKE,
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
    ranks: Ranks = SINGLE_PROCESS,
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
    scale, least = _scale_and_least(words)[:, :, None]  # (t, 1) each
    decoded: NDArray[np.float32] = scale * words[:, 4 : 4 + vocab_size].astype(np.float32) + least
    return decoded


def _scale_and_least(words: Words) -> NDArray[np.float32]:
    """(2, t): the scales of the rows, and the least logarithms."""
    return np.ascontiguousarray(words[:, :4]).view("<f4").T


def _likeliest(words: Words) -> torch.Tensor:
    """The numbers of the five greatest words of each row; of equal ones the first comes first, as there."""
    place = np.arange(words.shape[1], 0, -1)
    ranked = torch.from_numpy(words.astype(np.int64) * len(place) + place)
    return ranked.topk(min(TOP, len(place))).indices


def _scored(ctx: int) -> int:
    return ctx - 1 - ctx // 2


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
