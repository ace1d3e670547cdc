"""Logits are transformers' to 2e-5, and as near to the float64 truth as transformers' own or nearer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bamba_reference import numpy_forward, torch_forward
from tests.reference.cases import (
    RANDOM,
    TRAINED,
    Case,
    eval_tokens,
    oracle_logits,
    random_case,
    random_tokens,
    relative_error,
    trained_case,
)

TOLERANCE = 2e-5


def numpy_logits(case: Case, tokens: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    return numpy_forward.forward(case.config, case.weights, tokens, dtype=dtype).logits


@torch.no_grad()
def torch_logits(case: Case, tokens: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    model = torch_forward.load(case.config, case.weights, dtype=dtype)
    return torch_forward.forward(model, tokens[None]).logits[0].numpy()


@pytest.mark.parametrize("name", RANDOM)
def test_random_models(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 300)
    oracle = oracle_logits(case, tokens)
    assert relative_error(numpy_logits(case, tokens), oracle) <= TOLERANCE
    assert relative_error(torch_logits(case, tokens), oracle) <= TOLERANCE


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(name: str) -> None:
    case, tokens = trained_case(name), eval_tokens(name, 600)
    oracle, truth = oracle_logits(case, tokens), numpy_logits(case, tokens, np.float64)
    for logits in (numpy_logits(case, tokens), torch_logits(case, tokens)):
        assert relative_error(logits, oracle) <= TOLERANCE
        assert relative_error(logits, truth) <= relative_error(oracle, truth)
    assert_bfloat16_is_no_worse(case, tokens)


def assert_bfloat16_is_no_worse(case: Case, tokens: np.ndarray) -> None:
    """Of the same weights, rounded to bfloat16 first: what is compared is the arithmetic."""
    weights = {k: torch.from_numpy(v).bfloat16().float().numpy() for k, v in case.weights.items()}
    rounded = dataclasses.replace(case, weights=weights)
    truth = numpy_logits(rounded, tokens, np.float64)
    found = relative_error(torch_logits(rounded, tokens, torch.bfloat16), truth)
    assert found <= relative_error(oracle_logits(case, tokens, torch.bfloat16), truth)


def test_rounding_errors_of_random_models_are_no_larger() -> None:
    """Over all configurations together: of two roundings of one number either may be the nearer."""
    errors: dict[str, list[float]] = {"transformers": [], "numpy": [], "torch": []}
    for name in RANDOM:
        for seed in range(3):
            case = random_case(name, seed)
            tokens = random_tokens(case, 300, seed=seed)
            truth = numpy_logits(case, tokens, np.float64)
            errors["transformers"].append(relative_error(oracle_logits(case, tokens), truth))
            errors["numpy"].append(relative_error(numpy_logits(case, tokens), truth))
            errors["torch"].append(relative_error(torch_logits(case, tokens), truth))
    mean = {path: float(np.exp(np.mean(np.log(found)))) for path, found in errors.items()}
    assert mean["numpy"] <= mean["transformers"], mean
    assert mean["torch"] <= mean["transformers"], mean


@pytest.mark.parametrize("name", RANDOM)
def test_bfloat16_is_no_worse_than_transformers(name: str) -> None:
    case = random_case(name)
    assert_bfloat16_is_no_worse(case, random_tokens(case, 300))


@pytest.mark.parametrize("name", RANDOM)
def test_torch_in_float64_is_the_definition(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 100)
    truth = numpy_logits(case, tokens, np.float64)
    assert relative_error(torch_logits(case, tokens, torch.float64), truth) <= 1e-13


@torch.no_grad()
def test_hidden_states_are_transformers() -> None:
    case = random_case("plain")
    tokens = random_tokens(case, 50)
    oracle = case.oracle(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states
    model = torch_forward.load(case.config, case.weights)
    out = torch_forward.forward(model, tokens[None], hidden_states=True)
    ours = numpy_forward.forward(case.config, case.weights, tokens, hidden_states=True).hidden_states
    assert out.hidden_states and ours
    # transformers gives the last one after the final norm.
    for i, expected in enumerate(oracle[:-1]):
        assert relative_error(out.hidden_states[i], expected) <= TOLERANCE
        assert relative_error(ours[i], expected[0]) <= TOLERANCE
    assert relative_error(out.last_hidden, oracle[-1]) <= TOLERANCE
    assert len(out.hidden_states) == len(ours) == case.config.num_hidden_layers + 1


@torch.no_grad()
def test_logits_to_keep() -> None:
    case = random_case("tied")
    tokens = random_tokens(case, 2, 40)
    model = torch_forward.load(case.config, case.weights)
    whole = torch_forward.forward(model, tokens).logits
    assert whole.shape == (2, 40, case.config.vocab_size)
    some = torch_forward.forward(model, tokens, logits_to_keep=3).logits
    chosen = torch_forward.forward(model, tokens, logits_to_keep=torch.tensor([0, 5])).logits
    assert relative_error(some, whole[:, -3:]) <= TOLERANCE
    assert relative_error(chosen, whole[:, [0, 5]]) <= TOLERANCE
    kept = numpy_forward.forward(case.config, case.weights, tokens[0], logits_to_keep=3).logits
    assert relative_error(kept, whole[0, -3:]) <= TOLERANCE


def test_logits_and_what_enters_wide_arithmetic_are_float32_in_every_dtype() -> None:
    case = random_case("plain")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = torch_forward.load(case.config, case.weights, dtype=dtype)
        for name, weight in model.weights.items():
            small = "norm" in name or name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias") or "conv1d" in name
            assert weight.dtype == (torch.float32 if small else dtype), name
        assert torch_forward.forward(model, [[1, 2, 3]]).logits.dtype == torch.float32
