"""Gradients with respect to every weight and every activation are transformers'."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bamba_reference import torch_forward
from bamba_reference.backend import TORCH
from tests.reference.cases import RANDOM, random_case, random_tokens, relative_error

TOLERANCE = 5e-5  # a gradient passes through twice as many operations as a logit, of which 2e-5 is asked


@pytest.mark.parametrize("name", RANDOM)
def test_gradients(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 2, 45)
    # transformers gives the padding token's embedding no gradient, even where it stands as a token.
    tokens[tokens == case.config.pad_token_id] = 3
    ids = torch.from_numpy(tokens)
    direction = torch.randn(2, 45, case.config.vocab_size, generator=torch.Generator().manual_seed(1))

    names = list(case.weights)
    parameters = dict(case.oracle.named_parameters())
    oracle = case.oracle(ids, use_cache=False, output_hidden_states=True)
    activations = oracle.hidden_states[:-1]
    expected = torch.autograd.grad(
        (oracle.logits * direction).sum(), [*(parameters[n] for n in names), *activations]
    )

    weights = {n: torch.from_numpy(array.copy()).requires_grad_() for n, array in case.weights.items()}
    out = torch_forward.forward(torch_forward.load(case.config, weights), tokens, hidden_states=True)
    found = torch.autograd.grad(
        (out.logits * direction).sum(), [*(weights[n] for n in names), *out.hidden_states[:-1]]
    )
    for label, ours, theirs in zip([*names, *range(len(activations))], found, expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE, label


def test_linear_is_called_with_the_tensor_it_multiplies_by() -> None:
    """What calibration rests on: it watches inputs and takes gradients by replacing one operation."""
    case = random_case("plain")
    seen = {}

    def watched(x, weight, bias, name):
        y = TORCH.linear(x, weight, bias, name)
        y.requires_grad_()
        y.retain_grad()
        seen[name] = (x, y)
        return y

    backend = dataclasses.replace(TORCH, name="watched", linear=watched)
    model = torch_forward.load(case.config, case.weights, backend=backend)
    torch_forward.forward(model, [[1, 2, 3]]).logits.square().sum().backward()
    matrices = {n for n, w in case.weights.items() if w.ndim == 2 and "embed" not in n and "lm_head" not in n}
    assert seen.keys() == matrices
    for name, (x, y) in seen.items():
        assert x.shape[-1] == case.weights[name].shape[1]
        assert y.grad is not None and y.grad.abs().sum() > 0, name
