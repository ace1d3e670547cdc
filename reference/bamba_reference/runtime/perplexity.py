"""Perplexity exactly as llama-perplexity defines it, over any of the forward passes.

The text is cut into ⌊T / ctx⌋ chunks that share nothing; the first token of each is replaced by BOS where
the model's tokenizer adds one; the second half of each is scored: the logits at ctx/2 … ctx-2 predict the
tokens at ctx/2 + 1 … ctx-1. Perplexity is exp of the mean negative log-likelihood, and its error the
standard error of that mean times the perplexity (llama.cpp, tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bamba_reference import model as numpy_model
from bamba_reference.config import Config
from bamba_reference.packing import InputError, Ints, check_tokens

if TYPE_CHECKING:
    from bamba_reference.torch.forward import Model

Likelihoods = npt.NDArray[np.float64]

# Chunks (n, ctx) -> for each of them, in order, the negative log-likelihoods (ctx - 1 - ctx // 2,) of its
# second half. An iterable, so that an estimate runs along.
Scorer = Callable[[Ints], Iterable[Likelihoods]]

# Tokens that go through a model at once.
_BATCH_TOKENS = 2048
# Logits that exist together.
_MOST_LOGITS = 1 << 28


@dataclass(frozen=True)
class Estimate:
    """``perplexity`` ± ``error`` over ``scored`` tokens of ``chunks`` of ``total`` chunks of ``ctx``."""

    perplexity: float
    error: float
    mean_nll: float
    scored: int
    chunks: int
    total: int
    ctx: int


def perplexity(
    score: Scorer,
    tokens: Any,
    *,
    vocab_size: int,
    ctx: int = 512,
    bos: int | None = None,
    chunks: int | None = None,
    progress: Callable[[Estimate], None] | None = None,
) -> Estimate:
    """The perplexity of a text given as token ids (T,), special tokens included.

    ``bos``: the token that begins each chunk, none for a tokenizer that adds none. ``chunks``: how many at
    most. ``progress`` receives the estimate so far after each chunk. Raises ``InputError`` for a text
    shorter than two contexts, a context too short to score, and token ids out of range.
    """
    cut = cut_chunks(tokens, vocab_size=vocab_size, ctx=ctx, bos=bos, chunks=chunks)
    count, total, squares, estimate = 0, 0.0, 0.0, None
    for done, nll in enumerate(score(cut), start=1):
        count, total, squares = (
            count + len(nll),
            total + float(nll.sum()),
            squares + float(np.square(nll).sum()),
        )
        mean = total / count
        variance = max(0.0, squares / count - mean * mean)
        error = math.sqrt(variance / (count - 1)) if count > 1 else math.nan
        estimate = Estimate(math.exp(mean), math.exp(mean) * error, mean, count, done, len(cut), ctx)
        if progress:
            progress(estimate)
    if estimate is None or estimate.chunks != len(cut):
        raise ValueError(f"the scorer gave {estimate.chunks if estimate else 0} of {len(cut)} chunks")
    return estimate


def cut_chunks(
    tokens: Any, *, vocab_size: int, ctx: int, bos: int | None = None, chunks: int | None = None
) -> Ints:
    """The chunks (n, ctx) of a text (T,), ``bos`` in each one's first place; errors as ``perplexity``'s."""
    ids = np.asarray(tokens, np.int64)  # (T,)
    if ctx < 3:
        raise InputError(
            "the context is too short for its second half to be scored",
            found=ctx,
            expected="at least 3 tokens, customarily 512",
        )
    if chunks is not None and chunks < 1:
        raise InputError("the number of chunks is too small", found=chunks, expected="at least 1")
    if len(ids) < 2 * ctx:
        raise InputError(
            "the text is too short",
            found=f"{len(ids)} tokens",
            expected=f"at least {2 * ctx}, two contexts of {ctx}",
            fix="use a longer text or a shorter context (--ctx)",
        )
    check_tokens(ids, vocab_size)
    count = min(len(ids) // ctx, chunks or len(ids))
    cut = ids[: count * ctx].reshape(count, ctx).copy()
    if bos is not None:
        check_tokens(np.array([bos]), vocab_size)
        cut[:, 0] = bos
    return cut


def numpy_scorer(config: Config, weights: Mapping[str, Any], dtype: npt.DTypeLike = np.float64) -> Scorer:
    """Score by ``model.forward``, in float32 or float64."""

    def score(cut: Ints) -> Iterator[Likelihoods]:
        first = cut.shape[1] // 2
        for row in cut:
            out = numpy_model.forward(config, weights, row, dtype=dtype, logits_to_keep=len(row) - first)
            logits = out.logits[:-1].astype(np.float64)  # (scored, V)
            highest = logits.max(axis=-1)
            logsumexp = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))  # (scored,)
            yield logsumexp - np.take_along_axis(logits, row[first + 1 :, None], axis=-1)[:, 0]

    return score


def torch_scorer(model: Model) -> Scorer:
    """Score by ``torch.forward.forward``, several chunks at a time."""
    from bamba_reference.runtime.workers import Workers
    from bamba_reference.torch.forward import forward

    def score(cut: Ints) -> Iterator[Likelihoods]:
        n, ctx = cut.shape
        first, rows = ctx // 2, batched(ctx)

        def piece(some: Ints) -> list[Likelihoods]:
            logits = forward(model, some, logits_to_keep=ctx - first).logits  # (rows, scored + 1, V)
            # One by one: softmax copies them.
            return [_nll(row[:-1], chunk[first + 1 :]) for row, chunk in zip(logits, some, strict=True)]

        most = max(1, _MOST_LOGITS // (rows * (ctx - first) * model.config.vocab_size))
        most = most if model.backend.parallel else 1
        with Workers(model.device, min(most, -(-n // rows))) as workers:
            for nll in workers.map(piece, (cut[start : start + rows] for start in range(0, n, rows))):
                yield from nll

    return score


def batched(ctx: int) -> int:
    """How many chunks of ``ctx`` tokens ``torch_scorer`` scores at a time: a text split between such batches has
    the same likelihoods to the last bit. ``stream.together`` is the same for ``stream_scorer``.
    """
    return max(1, _BATCH_TOKENS // ctx)


def stream_scorer(
    config: Config,
    source: Mapping[str, Any],
    *,
    on_layer: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Scorer:
    """Score layer by layer (``stream``); ``options`` are ``stream.final_hidden``'s.

    The estimate begins when the last layer is done.
    """
    from bamba_reference.runtime.stream import Head, final_hidden, head_blocks
    from bamba_reference.runtime.workers import Workers
    from bamba_reference.torch.backend import TORCH

    def score(cut: Ints) -> Iterator[Likelihoods]:
        n, ctx = cut.shape
        first = ctx // 2
        (hidden,) = final_hidden(config, [source], cut, on_layer=on_layer, **options)  # (n, ctx, d)
        kept = hidden[:, first:-1].reshape(-1, hidden.shape[-1])  # (n * scored, d)
        del hidden
        blocks = head_blocks(n, ctx, kept.device)
        head = Head(
            config, source, dtype=kept.dtype, device=kept.device, backend=options.get("backend", TORCH)
        )
        wanted = np.split(cut[:, first + 1 :].reshape(-1), np.cumsum(blocks)[:-1])
        waiting = np.empty(0)
        # Each thread holds a block's logits and softmax's copy of them.
        most = max(1, _MOST_LOGITS // (2 * blocks[0] * config.vocab_size))
        with Workers(kept.device, min(most, len(blocks))) as workers:
            pieces = zip(kept.split(blocks), wanted, strict=True)
            for nll in workers.map(lambda piece: _nll(head(piece[0]), piece[1]), pieces):
                waiting = np.concatenate([waiting, nll])
                while len(waiting) >= ctx - 1 - first:
                    yield waiting[: ctx - 1 - first]
                    waiting = waiting[ctx - 1 - first :]

    return score


def _nll(logits: Any, targets: Ints) -> Likelihoods:
    """Negative log-likelihoods, shaped as targets, of logits (…, V)."""
    import torch
    from torch.nn.functional import cross_entropy

    wanted = torch.from_numpy(np.ascontiguousarray(targets)).to(logits.device).flatten()
    nll = cross_entropy(logits.flatten(0, -2), wanted, reduction="none")
    result: Likelihoods = nll.double().cpu().numpy().reshape(targets.shape)
    return result
