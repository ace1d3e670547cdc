"""Generation is the likeliest continuation, or the same random one for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_reference import model as numpy_model
from bamba_reference.packing import InputError
from bamba_reference.runtime.generate import Sampling, choose, generate, generate_batch
from bamba_reference.torch import forward as torch_forward
from tests.reference.cases import RANDOM, eval_tokens, random_case, random_tokens, trained_case
from tests.reference.families import FINITE_LIMIT, REPRESENTATIVE

PROMPTS = [[5], [7, 3, 9, 11, 2, 8], [4, 4, 1]]


def model(name: str = "plain") -> torch_forward.Model:
    case = random_case(name)
    return torch_forward.load(case.config, case.weights)


def test_greedy_takes_the_likeliest_token() -> None:
    case = random_case("plain")
    tokens = [5, 6, 7]
    for token in generate(model(), [5, 6, 7], max_new_tokens=12, stop=[]):
        assert token == numpy_model.forward(case.config, case.weights, tokens).logits[-1].argmax()
        tokens.append(token)
    assert len(tokens) == 15


def test_greedy_is_transformers() -> None:
    case = trained_case("bamba-mini")
    prompt = eval_tokens("bamba-mini", 60)
    theirs = case.oracle.generate(torch.from_numpy(prompt)[None], max_new_tokens=20, do_sample=False)[0, 60:]
    ours = generate(torch_forward.load(case.config, case.weights), prompt.tolist(), max_new_tokens=20)
    assert list(ours) == theirs.tolist()


@pytest.mark.parametrize(
    "name",
    [name for name in RANDOM if name not in FINITE_LIMIT and name != "no attention, short convolution"],
)
def test_every_family_generates_as_transformers_does(name: str) -> None:
    case = random_case(name)
    prompt = torch.from_numpy(random_tokens(case, 1, 30))
    everything = torch.ones_like(prompt)
    theirs = case.oracle.generate(
        prompt,
        attention_mask=everything,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )[0, 30:]
    ours = generate(
        torch_forward.load(case.config, case.weights), prompt[0].tolist(), max_new_tokens=12, stop=[]
    )
    assert list(ours) == theirs.tolist()


@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)])
def test_a_batch_gives_each_prompt_its_own(name: str, sampling: Sampling) -> None:
    together = generate_batch(model(name), PROMPTS, max_new_tokens=10, sampling=sampling, stop=[])
    assert all(len(tokens) == 10 for tokens in together)
    assert generate_batch(model(name), PROMPTS, max_new_tokens=10, sampling=sampling, stop=[]) == together
    assert (
        list(generate(model(name), PROMPTS[0], max_new_tokens=10, sampling=sampling, stop=[])) == together[0]
    )
    if sampling.temperature == 0:
        for prompt, tokens in zip(PROMPTS, together, strict=True):
            assert list(generate(model(name), prompt, max_new_tokens=10, stop=[])) == tokens


def test_seeds_differ_and_repeat() -> None:
    def drawn(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return list(generate(model(), [5, 6], max_new_tokens=16, sampling=sampling, stop=[]))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_long_prompts_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate_batch(model(), PROMPTS, max_new_tokens=5, stop=[])
    monkeypatch.setattr("bamba_reference.runtime.generate._PIECE", 2)
    assert generate_batch(model(), PROMPTS, max_new_tokens=5, stop=[]) == whole


def test_stop_tokens_end_a_row_and_are_not_given() -> None:
    free = generate_batch(model(), PROMPTS, max_new_tokens=8, stop=[])
    stop = free[1][3]
    expected = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in free]
    assert generate_batch(model(), PROMPTS, max_new_tokens=8, stop=[stop]) == expected
    assert list(generate(model(), PROMPTS[1], max_new_tokens=8, stop=[stop])) == expected[1]


def test_the_end_of_sequence_token_stops_by_default() -> None:
    case = random_case("plain")
    first = next(generate(model(), [5, 6], max_new_tokens=1, stop=[]))
    import dataclasses

    ending = dataclasses.replace(case.config, eos_token_ids=(first,))
    assert not list(generate(torch_forward.load(ending, case.weights), [5, 6], max_new_tokens=4))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), top_p=st.floats(0.05, 1), temperature=st.floats(0.1, 3))
def test_top_p_keeps_the_likeliest(seed: int, top_p: float, temperature: float) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=30) * 3
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    token = choose(logits, Sampling(temperature, top_p), random)
    assert p[p > p[token]].sum() < top_p + 1e-9


def test_draws_follow_the_probabilities() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    random = np.random.default_rng(0)
    drawn = np.bincount([choose(logits, Sampling(1.0, 0.9), random) for _ in range(4000)], minlength=4)
    assert drawn[3] == 0
    assert np.abs(drawn[:3] / 4000 - np.array([0.5, 0.3, 0.15]) / 0.95).max() < 0.03


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        Sampling(**bad)


def test_bad_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to continue"):
        list(generate(model(), [], max_new_tokens=1))
    with pytest.raises(InputError, match="out of the vocabulary's range"):
        list(generate(model(), [160], max_new_tokens=1))
