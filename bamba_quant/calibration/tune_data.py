"""The tokens that are learned from, step by step, and those that are held out."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bamba_quant.calibration.texts import Text, split_held_out, token_chunks
from bamba_quant.calibration.tune_options import TuneError, TuneOptions
from bamba_quant.metadata.tune_record import SELF
from bamba_quant.tokenizers.encoder import Encoder
from bamba_reference.packing import InputError, check_tokens
from bamba_reference.torch.forward import Model, forward, new_state

Ints = NDArray[np.int64]

_CHARACTERS_A_TOKEN = 4
_MOST_HELD_OUT, _LEAST_HELD_OUT = 0.1, 16384  # of a text, and characters
_CUSTOMARY_TOKENS, _CUSTOMARY_STEPS = 3_700_000, 1200


class Batches:
    """What each step learns from, a function of seed and step alone.

    ``stream`` (T,) is text, cut into chunks of ``ctx`` tokens: at other places in every epoch, unless ``fixed``.
    ``whole`` (n, ctx) are chunks that stay as they are. All come in another order each epoch.
    """

    def __init__(
        self, stream: Ints, whole: Ints, bos: int | None, batch: int, seed: int, fixed: bool
    ) -> None:
        self._stream, self._whole, self._bos, self._batch, self._seed = stream, whole, bos, batch, seed
        self._ctx = whole.shape[1]
        self._fixed = fixed
        self._cut = len(stream) // self._ctx if fixed else max(0, (len(stream) - self._ctx + 1) // self._ctx)
        self.count = self._cut + len(whole)
        self.tokens = len(stream) + whole.size
        self._held: tuple[int, Ints, Ints] | None = None

    def batch(self, number: int) -> tuple[Ints, Ints]:
        """The tokens (batch, ctx) of a step, counted from 0, and the numbers (batch,) of their chunks.

        An epoch's last step goes on with the next epoch.
        """
        wanted = np.arange(number * self._batch, (number + 1) * self._batch)
        epochs = wanted // self.count
        parts = [self._epoch(e, wanted[epochs == e] % self.count) for e in np.unique(epochs)]
        tokens, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
        return tokens, numbers

    def chunks(self, epoch: int = 0) -> Ints:
        """All chunks (n, ctx) of an epoch by their numbers."""
        offset = 0 if self._fixed else int(np.random.default_rng([self._seed, epoch]).integers(self._ctx))
        cut = self._stream[offset : offset + self._cut * self._ctx].reshape(self._cut, self._ctx)
        chunks: Ints = np.concatenate([cut, self._whole])
        if self._bos is not None:
            chunks[:, 0] = self._bos
        return chunks

    def _epoch(self, epoch: int, places: Ints) -> tuple[Ints, Ints]:
        if self._held is None or self._held[0] != epoch:
            order = np.random.default_rng([self._seed, epoch, 1]).permutation(self.count)
            self._held = epoch, self.chunks(epoch), order
        numbers = self._held[2][places]
        return self._held[1][numbers], numbers


@dataclass(frozen=True)
class TuneData:
    """``batches`` to learn from and chunks ``held_out`` (n, ctx); ``names`` and ``sha256`` of where they come from."""

    batches: Batches
    held_out: Ints
    names: tuple[str, ...]
    sha256: tuple[str, ...]


def tune_data(
    encoder: Encoder,
    texts: Sequence[Text],
    model: Model,
    options: TuneOptions,
    batch: int,
    fixed: bool = False,
) -> TuneData:
    """The texts, and text of the model's own, as tokens; ``fixed`` is the field of ``Batches``.

    Raises a ``BambaQuantError`` for texts that are too short or have tokens that ``model`` lacks.
    """
    ctx, bos = options.ctx, encoder.bos
    stream, whole = np.empty(0, np.int64), np.empty((0, ctx), np.int64)
    held: list[Ints] = []
    names, hashes = [text.path.name for text in texts], [text.sha256 for text in texts]
    if not texts and not options.self_tokens:
        raise TuneError(
            "there is no text to tune on", fix="give one, or let the model write it (--tune self)"
        )
    if texts:
        characters = sum(len(text.content) for text in texts)
        wanted = max(_LEAST_HELD_OUT, options.held_out * ctx * _CHARACTERS_A_TOKEN)
        learned, kept = split_held_out(texts, min(_MOST_HELD_OUT, wanted / max(1, characters)))
        parts = [np.asarray(encoder.plain(text.content), np.int64) for text in learned]
        stream = np.concatenate(_limited(parts, options.tokens))
        held.append(token_chunks(encoder, kept, ctx, options.held_out))
    if options.self_tokens:
        spared = 0 if texts else options.held_out
        written = write_text(model, -(-options.self_tokens // ctx) + spared, ctx, bos, options.seed)
        names.append(SELF)
        hashes.append(hashlib.sha256(written.astype("<i8").tobytes()).hexdigest())
        whole, rest = np.split(written, [len(written) - spared])
        held.append(rest)
    for tokens in (stream, *held):
        if tokens.size:
            check_tokens(tokens, model.config.vocab_size)
    batches = Batches(stream, whole, bos, batch, options.seed, fixed)
    if not batches.count:
        raise TuneError(
            "the text is too short to tune on",
            found=f"{batches.tokens} tokens",
            expected=f"at least {2 * ctx} beside those held out",
            fix="use a longer text, or more tokens of it (--tune-tokens)",
        )
    return TuneData(batches, np.concatenate(held), tuple(names), tuple(hashes))


def customary_steps(tokens: int) -> int:
    """How many steps so many tokens are worth: 1,200 for 3.7 million, 400 for 0.23 million, as measured."""
    share: float = min(1.0, (tokens / _CUSTOMARY_TOKENS) ** 0.4)
    return max(50, round(_CUSTOMARY_STEPS * share))


def _limited(parts: list[Ints], tokens: int | None) -> list[Ints]:
    """The first tokens of every part, ``tokens`` in all."""
    total = sum(map(len, parts))
    if tokens is None or tokens >= total:
        return parts
    return [part[: round(len(part) * tokens / total)] for part in parts]


_ROWS = {"cpu": 64, "cuda": 1024}  # sequences that are written together


@torch.no_grad()
def write_text(model: Model, chunks: int, ctx: int, bos: int | None, seed: int) -> NDArray[np.int64]:
    """``chunks`` sequences (chunks, ctx) drawn at temperature 1, each behind BOS; the same seed draws the same.

    Raises ``InputError`` for a model without a BOS token.
    """
    if bos is None:
        raise InputError(
            "the model has no BOS token to begin its own text with", fix="give a text (--tune TEXT)"
        )
    generator = torch.Generator(model.device).manual_seed(seed)
    written = []
    rows = _ROWS.get(model.device.type, _ROWS["cpu"])
    for start in range(0, chunks, rows):
        state = new_state(model, min(rows, chunks - start))
        tokens = torch.full((state.batch, 1), bos, dtype=torch.int64, device=model.device)
        columns = [tokens]
        for _ in range(ctx - 1):
            logits = forward(model, tokens, state=state).logits[:, -1]
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            columns.append(tokens)
        written.append(torch.cat(columns, dim=1).cpu().numpy())
    return np.concatenate(written)
