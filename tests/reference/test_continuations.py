"""Continuations that share a context's state have the likelihoods of whole passes over context and continuation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference import model as numpy_model
from bamba_reference.packing import InputError
from bamba_reference.runtime import continuations
from bamba_reference.runtime.continuations import Likelihood, log_likelihoods
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH, Backend
from tests.reference.cases import Case, every_backend, random_case
from tests.reference.families import REPRESENTATIVE

Requests = list[tuple[list[int], list[int]]]


def load(case: Case, backend: Backend = TORCH) -> torch_forward.Model:
    return torch_forward.load(case.config, case.weights, backend=backend)


def truth(case: Case, context: list[int], continuation: list[int]) -> Likelihood:
    """One pass over both in float64."""
    logits = numpy_model.forward(case.config, case.weights, [*context, *continuation[:-1]]).logits
    logits = logits[len(context) - 1 :]
    highest = logits.max(-1, keepdims=True)
    log_p = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    value = log_p[np.arange(len(continuation)), continuation].sum()
    return Likelihood(float(value), logits.argmax(-1).tolist() == continuation)


def drawn(case: Case, seed: int, contexts: int, most: int) -> Requests:
    """Contexts with one to four continuations each, some twice and one of them greedy, in any order."""
    random = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        return random.integers(case.config.vocab_size, size=random.integers(1, most + 1)).tolist()

    requests: Requests = []
    for _ in range(contexts):
        context = tokens(most)
        found = [tokens(6) for _ in range(random.integers(1, 5))]
        likeliest = numpy_model.forward(case.config, case.weights, context).logits[-1].argmax()
        requests += [(context, each) for each in (*found, found[0], [int(likeliest)])]
    random.shuffle(requests)
    return requests


@every_backend
@pytest.mark.parametrize("name", REPRESENTATIVE)
@settings(max_examples=4, deadline=None)
@given(rows=st.sampled_from([None, 1, 3]), seed=st.integers(0, 2**32 - 1))
def test_likelihoods_are_those_of_whole_passes(
    name: str, backend: Backend, rows: int | None, seed: int
) -> None:
    case = random_case(name)
    requests = drawn(case, seed, contexts=4, most=30)
    done: list[int] = []
    found = log_likelihoods(load(case, backend), requests, rows=rows, progress=done.append)
    assert sum(done) == len(requests)
    for (context, continuation), likelihood in zip(requests, found, strict=True):
        expected = truth(case, context, continuation)
        assert likelihood.value == pytest.approx(expected.value, abs=2e-4)
        assert likelihood.greedy == expected.greedy
    assert any(each.greedy for each in found)


def test_long_contexts_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a scored token lies in another piece than its context, and the head takes few positions at a time."""
    case = random_case("plain")
    requests = [*drawn(case, 0, contexts=3, most=30), ([5], list(range(1, 40)))]
    monkeypatch.setattr(continuations, "_PIECE", 7)
    monkeypatch.setattr(continuations, "_HEAD_TOKENS", 3)
    found = log_likelihoods(load(case), requests, rows=4)
    for (context, continuation), likelihood in zip(requests, found, strict=True):
        assert likelihood.value == pytest.approx(truth(case, context, continuation).value, abs=2e-4)


def test_memory_bounds_the_rows_whose_states_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case("plain")
    model = load(case)
    one = torch_forward.new_state(model, 1).n_bytes
    attention = case.config.layers_of("attention")
    keys = len(attention) * 2 * case.config.num_key_value_heads * case.config.head_dim * 4
    monkeypatch.setattr(continuations, "_STATE_BYTES", 3 * (one + 10 * keys) + 1)
    parts = continuations.batches(model, [10] * 7, lambda length: length)
    assert [len(part) for part in parts] == [3, 3, 1]


@pytest.mark.parametrize(("request_", "found"), [(([], [1]), "context"), (([1], []), "continuation")])
def test_nothing_to_score(request_: tuple[list[int], list[int]], found: str) -> None:
    with pytest.raises(InputError, match=f"found: an empty {found}"):
        log_likelihoods(load(random_case("plain")), [([1], [2]), request_])
