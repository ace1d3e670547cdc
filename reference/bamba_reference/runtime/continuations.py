"""Log-likelihoods of continuations of contexts, of which many share one, as the choices of a question do.

A context is run once and its state is copied for each of its continuations; the head is applied to those positions only
that predict a token of a continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bamba_reference.packing import InputError, Ints
from bamba_reference.torch.forward import Model, forward, head, new_state
from bamba_reference.torch.state import State

# Tokens that are run together on a CPU and elsewhere, and the bytes of their states.
_TOKENS, _STATE_BYTES = 512, 1 << 30
_TOKENS_ON_GPU, _STATE_BYTES_ON_GPU = 16_384, 1 << 33
# Tokens of a row that are run at once; longer contexts run in pieces.
_PIECE = 2048
# Positions whose logits exist together.
_HEAD_TOKENS = 512
_NO_LOGITS = torch.empty(0, dtype=torch.int64)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Likelihood:
    """A continuation's natural log-likelihood, and whether each of its tokens is the likeliest one."""

    value: float
    greedy: bool


# The tokens of a context, and its continuations with the request that asks for each.
_Context = tuple[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]


@dataclass
class _Scores:
    """Sums over the tokens scored so far of each distinct request."""

    value: np.ndarray[tuple[int], np.dtype[np.float64]]
    greedy: np.ndarray[tuple[int], np.dtype[np.bool_]]


def log_likelihoods(
    model: Model,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its context: ``requests`` are pairs of token ids.

    Contexts of similar length are run together, ``rows`` at most, by default as many as fit a budget of tokens and of
    memory for their states. ``progress`` is called with the number of further requests that are done. Raises
    ``InputError`` for an empty context or continuation and for ids out of range.
    """
    places: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise InputError(
                "there is nothing to score" if context else "there is nothing to continue",
                where=f"request {number}",
                found="an empty continuation" if context else "an empty context",
                expected="at least one token",
            )
        places.setdefault(tuple(context), {}).setdefault(tuple(continuation), []).append(number)
    contexts: list[_Context] = [
        (context, [(numbers[0], continuation) for continuation, numbers in found.items()])
        for context, found in places.items()
    ]
    contexts.sort(key=lambda each: len(_first_run(each)), reverse=True)
    scores = _Scores(np.zeros(len(requests)), np.ones(len(requests), bool))
    for batch in batches(model, contexts, lambda each: len(_first_run(each)), rows):
        _score_contexts(model, batch, scores)
        for context, continuations in batch:
            for _, continuation in continuations:
                first, *same = places[context][continuation]
                scores.value[same], scores.greedy[same] = scores.value[first], scores.greedy[first]
                progress(1 + len(same))
    return [Likelihood(float(v), bool(g)) for v, g in zip(scores.value, scores.greedy, strict=True)]


def batches(
    model: Model, items: Sequence[Item], length: Callable[[Item], int], rows: int | None = None, past: int = 0
) -> Iterator[Sequence[Item]]:
    """``items`` in parts that are run together: of ``rows`` each, or of what the budgets of the device allow.

    ``length`` gives the tokens of each, which do not rise, and ``past`` those that their states hold already.
    """
    on_cpu = model.device.type == "cpu"
    tokens, memory = (_TOKENS, _STATE_BYTES) if on_cpu else (_TOKENS_ON_GPU, _STATE_BYTES_ON_GPU)
    config = model.config
    empty = State(config, 1, model.dtype, torch.device("meta")).n_bytes
    heads = 2 * config.num_key_value_heads * len(config.layers_of("attention"))
    start = 0
    while start < len(items):
        longest = max(1, length(items[start]))
        n_bytes = empty + heads * config.head_dim * model.dtype.itemsize * (past + longest)
        count = rows or max(1, min(tokens // longest, memory // n_bytes))
        yield items[start : start + count]
        start += count


def _first_run(context: _Context) -> tuple[int, ...]:
    """The tokens of a context's first pass: with its only continuation, or alone."""
    tokens, continuations = context
    return tokens + continuations[0][1][:-1] if len(continuations) == 1 else tokens


def _score_contexts(model: Model, batch: Sequence[_Context], scores: _Scores) -> None:
    runs = [_first_run(each) for each in batch]
    L = max(map(len, runs))
    tokens, mask = np.zeros((len(runs), L), np.int64), np.zeros((len(runs), L), np.int64)
    wanted = []  # row, column of the position, the token that it predicts, the request
    later = []  # row, request, continuation
    for row, (run, (context, continuations)) in enumerate(zip(runs, batch, strict=True)):
        tokens[row, L - len(run) :], mask[row, L - len(run) :] = run, 1
        last = L - len(run) + len(context) - 1
        for request, continuation in continuations:
            alone = len(continuations) == 1
            scored = continuation if alone else continuation[:1]
            wanted += [(row, last + i, token, request) for i, token in enumerate(scored)]
            if not alone and len(continuation) > 1:
                later.append((row, request, continuation))
    state = new_state(model, len(runs)) if later or L > _PIECE else None
    targets = np.array(wanted)
    for start in range(0, L, _PIECE):
        piece = slice(start, min(L, start + _PIECE))
        hidden = _hidden(model, tokens[:, piece], state, mask[:, : piece.stop])
        inside = targets[(targets[:, 1] >= start) & (targets[:, 1] < piece.stop)]
        _add(model, hidden, inside - [0, start, 0, 0], scores)
    if state is None:
        return
    later.sort(key=lambda each: len(each[2]), reverse=True)
    for part in batches(model, later, lambda each: len(each[2]), past=L):
        _score_continuations(model, part, state, scores)


def _score_continuations(
    model: Model, part: Sequence[tuple[int, int, tuple[int, ...]]], state: State, scores: _Scores
) -> None:
    """The tokens after the first one of continuations (row of ``state``, request, tokens)."""
    # Padding on the right reaches no token before it, and these states are not used again.
    tokens = np.zeros((len(part), max(len(each) for _, _, each in part) - 1), np.int64)
    wanted = []
    for row, (_, request, continuation) in enumerate(part):
        tokens[row, : len(continuation) - 1] = continuation[:-1]
        wanted += [(row, i, token, request) for i, token in enumerate(continuation[1:])]
    hidden = _hidden(model, tokens, state.select([row for row, _, _ in part]))
    _add(model, hidden, np.array(wanted), scores)


def _hidden(model: Model, tokens: Ints, state: State | None, mask: Ints | None = None) -> Tensor:
    """The input of the head (B, L, d)."""
    with torch.no_grad():
        return forward(model, tokens, state=state, attention_mask=mask, logits_to_keep=_NO_LOGITS).last_hidden


def _add(model: Model, hidden: Tensor, wanted: Ints, scores: _Scores) -> None:
    """Add the log-likelihoods of the tokens in ``wanted`` (n, 4): row and column of ``hidden``, token, request."""
    row, column, token, request = wanted.T
    positions, place = np.unique(row * hidden.shape[1] + column, return_inverse=True)
    kept = hidden.flatten(0, 1)[torch.from_numpy(positions).to(hidden.device)]  # (P, d)
    for start in range(0, len(positions), _HEAD_TOKENS):
        here = np.flatnonzero((place >= start) & (place < start + _HEAD_TOKENS))
        at, next_ = (
            torch.from_numpy(each[here]).to(hidden.device) for each in (place - start, token)
        )  # (n,), (n,)
        with torch.no_grad():
            logits = head(model, kept[start : start + _HEAD_TOKENS])  # (P', V)
            values = logits[at, next_] - logits.logsumexp(-1)[at]
            likeliest = logits.argmax(-1)[at] == next_
        np.add.at(scores.value, request[here], values.double().cpu().numpy())
        np.logical_and.at(scores.greedy, request[here], likeliest.cpu().numpy())
