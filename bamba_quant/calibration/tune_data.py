"""The tokens that are learned from, step by step, and those that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bamba_quant.calibration.self_text import write_text
from bamba_quant.calibration.texts import Text, split_held_out, token_chunks
from bamba_quant.calibration.tune_options import TuneError, TuneOptions
from bamba_quant.calibration.tune_record import SELF
from bamba_quant.tokenizers.encoder import Encoder
from bamba_reference.torch_forward import Model

Ints = NDArray[np.int64]

_CHARACTERS_A_TOKEN = 4
_MOST_HELD_OUT, _LEAST_HELD_OUT = 0.1, 16384  # of a text, and characters
_CUSTOMARY_TOKENS, _CUSTOMARY_STEPS = 3_700_000, 1200


class Batches:
    """What each step learns from, a function of seed and step alone.

    ``chunks`` (n, ctx) come in another order each epoch.
    """

    def __init__(self, chunks: Ints, batch: int, seed: int) -> None:
        self.chunks, self._batch, self._seed = chunks, batch, seed
        self._held: tuple[int, Ints] | None = None

    @property
    def tokens(self) -> int:
        return self.chunks.size

    def step(self, number: int) -> Ints:
        """The chunks (batch,) of a step, counted from 0; an epoch's last step goes on with the next epoch."""
        wanted = np.arange(number * self._batch, (number + 1) * self._batch)
        epochs = wanted // len(self.chunks)
        return np.concatenate(
            [self._order(e)[wanted[epochs == e] % len(self.chunks)] for e in np.unique(epochs)]
        )

    def _order(self, epoch: int) -> Ints:
        if self._held is None or self._held[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._held = epoch, rng.permutation(len(self.chunks))
        return self._held[1]


@dataclass(frozen=True)
class TuneData:
    """``batches`` to learn from and chunks ``held_out`` (n, ctx); ``names`` and ``sha256`` of where they come from."""

    batches: Batches
    held_out: Ints
    names: tuple[str, ...]
    sha256: tuple[str, ...]


def tune_data(
    encoder: Encoder, texts: Sequence[Text], model: Model, options: TuneOptions, batch: int
) -> TuneData:
    """The texts, and text of the model's own, as tokens. Raises a ``BambaQuantError`` for texts that are too short."""
    ctx, bos = options.ctx, encoder.bos
    chunks: list[Ints] = []
    held: list[Ints] = []
    names, hashes = [text.path.name for text in texts], [text.sha256 for text in texts]
    if not texts and not options.self_tokens:
        raise TuneError("there is no text to tune on", fix="give one, or let the model write it")
    if texts:
        characters = sum(len(text.content) for text in texts)
        wanted = max(_LEAST_HELD_OUT, options.held_out * ctx * _CHARACTERS_A_TOKEN)
        learned, kept = split_held_out(texts, min(_MOST_HELD_OUT, wanted / characters))
        parts = [np.asarray(encoder.plain(text.content), np.int64) for text in learned]
        chunks.append(_cut(np.concatenate(_limited(parts, options.tokens)), ctx, bos))
        held.append(token_chunks(encoder, kept, ctx, options.held_out))
    if options.self_tokens:
        spared = 0 if texts else options.held_out
        written = write_text(model, -(-options.self_tokens // ctx) + spared, ctx, bos, options.seed)
        names.append(SELF)
        hashes.append(hashlib.sha256(written.astype("<i8").tobytes()).hexdigest())
        learned_from, rest = np.split(written, [len(written) - spared])
        chunks.append(learned_from)
        held.append(rest)
    batches = Batches(np.concatenate(chunks), batch, options.seed)
    if not len(batches.chunks):
        raise TuneError(
            "the text is too short to tune on",
            found=f"{batches.tokens} tokens",
            expected=f"at least {2 * ctx} beside those held out",
        )
    return TuneData(batches, np.concatenate(held), tuple(names), tuple(hashes))


def customary_steps(tokens: int) -> int:
    """How many steps so many tokens are worth: 1,200 for 3.7 million, 400 for 0.23 million, as measured."""
    share: float = min(1.0, (tokens / _CUSTOMARY_TOKENS) ** 0.4)
    return max(50, round(_CUSTOMARY_STEPS * share))


def _cut(stream: Ints, ctx: int, bos: int | None) -> Ints:
    """Tokens (T,) as chunks (n, ctx), BOS in the first place of each where there is one."""
    count = len(stream) // ctx
    chunks = stream[: count * ctx].reshape(count, ctx).copy()
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def _limited(parts: list[Ints], tokens: int | None) -> list[Ints]:
    """The first tokens of every part, ``tokens`` in all."""
    total = sum(map(len, parts))
    if tokens is None or tokens >= total:
        return parts
    return [part[: round(len(part) * tokens / total)] for part in parts]
