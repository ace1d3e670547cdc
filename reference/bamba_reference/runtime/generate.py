"""Generates tokens that continue prompts; the same seed gives the same tokens, alone or in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bamba_reference.packing import InputError
from bamba_reference.torch.forward import Model, forward, new_state

# Prompt tokens run at once; longer prompts run in pieces, which is exact and bounds the memory of a prefill.
_PIECE = 2048


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    ``temperature`` divides the logits; 0 chooses the likeliest token. ``top_p`` keeps the likeliest tokens
    whose probabilities first reach it (Holtzman et al. 2019, 1904.09751), 1 keeps all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                "the temperature cannot be used", found=self.temperature, expected="0 (greedy) or more"
            )
        if not 0 < self.top_p <= 1:
            raise InputError("top-p cannot be used", found=self.top_p, expected="more than 0, at most 1")
        if self.seed < 0:
            raise InputError("the seed cannot be used", found=self.seed, expected="0 or more")


GREEDY = Sampling()


def generate(
    model: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] | None = None,
) -> Iterator[int]:
    """Yield tokens as they come, until a stop token, which is not yielded, or ``max_new_tokens``.

    ``stop`` defaults to the configuration's end-of-sequence tokens. Raises ``InputError`` for an empty
    prompt and for token ids out of range.
    """
    for row in _steps(model, [prompt], max_new_tokens, sampling, stop, [True]):
        yield from (token for token in row if token is not None)


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] | None = None,
    complete: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """The new tokens of prompts run together, padded on the left; row 0 draws as ``generate`` does.

    A row also ends where ``complete`` is true of its new tokens, such as after a text to stop at.
    """
    new: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    for row in _steps(model, prompts, max_new_tokens, sampling, stop, going):
        for number, (tokens, token) in enumerate(zip(new, row, strict=True)):
            if token is not None:
                tokens.append(token)
                going[number] = complete is None or not complete(tokens)
    return new


def choose(logits: npt.NDArray[np.float64], sampling: Sampling, random: np.random.Generator) -> int:
    """Draw a token from logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-p, kind="stable")
    reached = np.cumsum(p[order]) / p.sum()
    kept = order[: int(np.searchsorted(reached, sampling.top_p)) + 1]
    at = np.searchsorted(np.cumsum(p[kept]), random.random() * p[kept].sum(), side="right")
    return int(kept[min(int(at), len(kept) - 1)])


def _steps(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int] | None,
    going: list[bool],
) -> Iterator[list[int | None]]:
    """For each step the new token of each row, None for rows that have stopped.

    ``going`` says which rows have not; the caller may stop a row between two steps.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise InputError(
            "there is nothing to continue",
            found="an empty prompt",
            expected="at least one token",
            fix="begin with the model's BOS token",
        )
    ends = set(model.config.eos_token_ids if stop is None else stop)
    L, rows = max(lengths), len(prompts)
    tokens, mask = np.zeros((rows, L), np.int64), np.zeros((rows, L), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, L - lengths[row] :] = prompt
        mask[row, L - lengths[row] :] = 1
    state = new_state(model, rows)
    randoms = [np.random.default_rng([sampling.seed, row]) for row in range(rows)]
    for start in range(0, L, _PIECE):
        stop_at = min(L, start + _PIECE)
        piece, seen = tokens[:, start:stop_at], mask[:, :stop_at]
        with torch.no_grad():  # around each pass, because the caller runs between the steps
            out = forward(model, piece, attention_mask=seen, state=state, logits_to_keep=1)
    decoder = None
    # The experts of a step depend on its tokens, so a recorded step cannot run them.
    if model.backend.decoder is not None and not model.config.layers_of("moe"):
        decoder = model.backend.decoder(model, state, L + max_new_tokens)
    for step in range(max_new_tokens):
        last = out.logits[:, -1]  # (rows, V)
        if sampling.temperature == 0:
            drawn = [token if on else 0 for token, on in zip(last.argmax(-1).tolist(), going, strict=True)]
        else:
            logits = last.double().cpu().numpy()
            drawn = [choose(logits[row], sampling, randoms[row]) if going[row] else 0 for row in range(rows)]
        going[:] = [on and token not in ends for on, token in zip(going, drawn, strict=True)]
        if not any(going):
            return
        yield [token if on else None for on, token in zip(going, drawn, strict=True)]
        if step + 1 < max_new_tokens and any(going):
            after = np.array(drawn)[:, None]
            with torch.no_grad():
                out = decoder(after) if decoder else forward(model, after, state=state)
