"""A text gives the same logits whole, in pieces, token by token, packed beside others and behind padding."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference import model as numpy_model
from bamba_reference.runtime.workers import Workers
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.state import MambaState
from tests.reference.cases import Case, every_backend, random_case, random_tokens, relative_error
from tests.reference.families import CASES, REPRESENTATIVE

TOLERANCE = 2e-5
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None)


def truth(case: Case, tokens: np.ndarray) -> np.ndarray:
    """One pass over one sequence in float64."""
    return numpy_model.forward(case.config, case.weights, tokens).logits


def load(case: Case, backend: Backend = TORCH) -> torch_forward.Model:
    return torch_forward.load(case.config, case.weights, backend=backend)


@every_backend
@pytest.mark.parametrize("family", CASES)
@few
@given(data=st.data(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=seeds)
@torch.no_grad()
def test_pieces_are_the_whole(
    family: str, backend: Backend, data: st.DataObject, lengths: list[int], seed: int
) -> None:
    case = random_case(data.draw(st.sampled_from(sorted(CASES[family]))))
    tokens = random_tokens(case, 2, sum(lengths), seed=seed)
    model = load(case, backend)
    state, numpy_state = torch_forward.new_state(model, 2), numpy_model.NumpyState()
    parts, numpy_parts = [], []
    for piece in np.split(tokens, np.cumsum(lengths)[:-1], axis=1):
        parts.append(torch_forward.forward(model, piece, state=state).logits)
        out = numpy_model.forward(case.config, case.weights, piece[0], dtype=np.float32, state=numpy_state)
        numpy_parts.append(out.logits)
    for row in range(2):
        assert relative_error(torch.cat(parts, dim=1)[row], truth(case, tokens[row])) <= TOLERANCE
    assert relative_error(np.concatenate(numpy_parts), truth(case, tokens[0])) <= TOLERANCE


@every_backend
@pytest.mark.parametrize("family", CASES)
@few
@given(data=st.data(), prompt=st.integers(1, 70), new=st.integers(1, 8), seed=seeds)
@torch.no_grad()
def test_prefill_and_decode_are_one_pass(
    family: str, backend: Backend, data: st.DataObject, prompt: int, new: int, seed: int
) -> None:
    case = random_case(data.draw(st.sampled_from(sorted(CASES[family]))))
    tokens = random_tokens(case, 1, prompt + new, seed=seed)
    model = load(case, backend)
    state = torch_forward.new_state(model, 1)
    parts = [torch_forward.forward(model, tokens[:, :prompt], state=state).logits]
    for i in range(prompt, prompt + new):
        parts.append(torch_forward.forward(model, tokens[:, i : i + 1], state=state).logits)
    assert relative_error(torch.cat(parts, dim=1)[0], truth(case, tokens[0])) <= TOLERANCE


def packing(lengths: list[int], how: str) -> dict[str, np.ndarray]:
    """The packing of sequences of these lengths, as transformers' padding-free inputs say it."""
    seq_idx = np.repeat(np.arange(len(lengths)), lengths)
    said = {
        "seq_idx": seq_idx[None],
        "cu_seq_lens": np.cumsum([0, *lengths]),
        "position_ids": np.concatenate([np.arange(n) for n in lengths])[None],
    }
    return said if how == "all" else {how: said[how]}


@every_backend
@pytest.mark.parametrize("family", CASES)
@few
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    how=st.sampled_from(["seq_idx", "cu_seq_lens", "position_ids", "all"]),
    seed=seeds,
)
@torch.no_grad()
def test_packed_is_separate(
    family: str, backend: Backend, data: st.DataObject, lengths: list[int], how: str, seed: int
) -> None:
    case = random_case(data.draw(st.sampled_from(sorted(CASES[family]))))
    tokens = random_tokens(case, sum(lengths), seed=seed)
    expected = np.concatenate([truth(case, part) for part in np.split(tokens, np.cumsum(lengths)[:-1])])
    said = packing(lengths, how)
    found = torch_forward.forward(load(case, backend), tokens[None], **said).logits[0]
    assert relative_error(found, expected) <= TOLERANCE
    ours = numpy_model.forward(case.config, case.weights, tokens, dtype=np.float32, **said).logits
    assert relative_error(ours, expected) <= TOLERANCE


@every_backend
@pytest.mark.parametrize("name", REPRESENTATIVE)
@torch.no_grad()
def test_rows_may_be_packed_differently(name: str, backend: Backend) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 2, 30)
    seq_idx = np.array([[0] * 30, [4] * 10 + [2] * 20])
    found = torch_forward.forward(load(case, backend), tokens, seq_idx=seq_idx).logits
    assert relative_error(found[0], truth(case, tokens[0])) <= TOLERANCE
    assert relative_error(found[1, :10], truth(case, tokens[1, :10])) <= TOLERANCE
    assert relative_error(found[1, 10:], truth(case, tokens[1, 10:])) <= TOLERANCE


@every_backend
@pytest.mark.parametrize("family", CASES)
@few
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    border=st.integers(1, 40),
    new=st.integers(0, 3),
    seed=seeds,
)
@torch.no_grad()
def test_left_padded_is_unpadded(
    family: str, backend: Backend, data: st.DataObject, lengths: list[int], border: int, new: int, seed: int
) -> None:
    """In two pieces, the first of which may be nothing but padding, and with tokens decoded after them."""
    case = random_case(data.draw(st.sampled_from(sorted(CASES[family]))))
    L, rows = max(lengths), len(lengths)
    tokens = random_tokens(case, rows, L + new, seed=seed)
    mask = (np.arange(L + new) >= L - np.array(lengths)[:, None]).astype(int)
    model = load(case, backend)
    state = torch_forward.new_state(model, rows)
    parts, start = [], 0
    for stop in sorted({min(border, L), L}):
        piece = tokens[:, start:stop]
        parts.append(torch_forward.forward(model, piece, state=state, attention_mask=mask[:, :stop]).logits)
        start = stop
    for i in range(L, L + new):
        parts.append(torch_forward.forward(model, tokens[:, i : i + 1], state=state).logits)
    found = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        expected = truth(case, tokens[row, L - length :])
        assert relative_error(found[row, L - length :], expected) <= TOLERANCE


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_float32_and_can_branch(name: str, dtype: torch.dtype) -> None:
    case = random_case(name)
    model = torch_forward.load(case.config, case.weights, dtype=dtype)
    state = torch_forward.new_state(model, 1)
    torch_forward.forward(model, [[5, 6, 7]], state=state)
    kept = next(each for each in state.layers[0].values() if isinstance(each, MambaState))
    assert not any(t.requires_grad for t in (kept.h, kept.tail))
    assert kept.h.dtype == torch.float32
    branch = copy.deepcopy(state)
    first = torch_forward.forward(model, [[8]], state=state).logits
    torch_forward.forward(model, [[9]], state=state)
    assert torch.equal(torch_forward.forward(model, [[8]], state=branch).logits, first)


@pytest.mark.parametrize("gradients", [False, True])
def test_threads_run_rows_of_their_own(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch is divided among threads by its rows, unless gradients are wanted, and nothing else changes."""
    case = random_case("two groups, finite limit")
    model = load(case)
    for weight in model.weights.values():
        weight.requires_grad_(gradients)
    tokens = random_tokens(case, 3, 400)
    mask = np.ones_like(tokens)
    mask[1, :7] = 0
    names: set[str] = set()
    layer = torch_forward.layer

    def noted(*arguments: Any) -> torch.Tensor:
        names.add(threading.current_thread().name)
        return layer(*arguments)

    def run(threads: int) -> torch_forward.Output:
        names.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return torch_forward.forward(model, tokens, attention_mask=mask, hidden_states=True, logits_to_keep=5)

    monkeypatch.setattr(torch_forward, "layer", noted)
    with torch.set_grad_enabled(gradients):
        one = run(1)
        assert len(names) == 1
        two = run(2)
        assert len(names) == (1 if gradients else 2)
    assert two.logits.requires_grad == gradients
    assert one.hidden_states and two.hidden_states and len(one.hidden_states) == len(two.hidden_states)
    for found, expected in zip(
        (*two.hidden_states, two.logits), (*one.hidden_states, one.logits), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_pool_within_a_piece() -> None:
    """Whatever the other threads do, a piece is computed alike: it is not divided again."""

    def pools(piece: int) -> int:
        with Workers(torch.device("cpu"), 4) as inner:
            return inner.count

    torch.set_num_threads(4)
    try:
        with Workers(torch.device("cpu"), 2) as workers:
            assert workers.count == 2 and list(workers.map(pools, range(6))) == [1] * 6
        with Workers(torch.device("cpu"), 1) as alone:
            assert list(alone.map(pools, range(2))) == [1] * 2
        assert pools(0) == 4
    finally:
        torch.set_num_threads(1)
