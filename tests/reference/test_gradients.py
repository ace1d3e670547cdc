"""Gradients with respect to every weight and every activation are transformers'."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH
from tests.reference.cases import RANDOM, oracle_streams, random_case, random_tokens, relative_error
from tests.reference.families import own_names

TOLERANCE = 5e-5  # a gradient passes through twice as many operations as a logit, whose tolerance is 2e-5


@pytest.mark.parametrize("name", RANDOM)
def test_gradients(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 2, 45)
    # transformers gives the padding token's embedding no gradient, even where it occurs as a token.
    tokens[tokens == case.config.pad_token_id] = 3
    ids = torch.from_numpy(tokens)
    direction = torch.randn(2, 45, case.config.vocab_size, generator=torch.Generator().manual_seed(1))

    parameters = dict(case.oracle.named_parameters())
    oracle = case.oracle(ids, use_cache=False, output_hidden_states=True)
    streams = oracle_streams(case, oracle.hidden_states)
    gradients = torch.autograd.grad(
        (oracle.logits * direction).sum(), [*parameters.values(), *streams.values()]
    )
    expected = own_names(case.oracle, dict(zip(parameters, gradients, strict=False)))
    # A sigmoid router's correction only chooses.
    constant = {n: array for n, array in case.weights.items() if n.endswith("router.correction")}
    assert expected.keys() == case.weights.keys() - constant.keys()

    weights = {n: torch.from_numpy(case.weights[n].copy()).requires_grad_() for n in expected}
    out = torch_forward.forward(
        torch_forward.load(case.config, weights | constant), tokens, hidden_states=True
    )
    found = torch.autograd.grad(
        (out.logits * direction).sum(), [*weights.values(), *(out.hidden_states[i] for i in streams)]
    )
    labels = [*weights, *(f"stream before layer {i}" for i in streams)]
    truth = [*(expected[name] for name in weights), *gradients[len(parameters) :]]
    for label, ours, theirs in zip(labels, found, truth, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE, label


@pytest.mark.parametrize("name", RANDOM)
def test_linear_is_called_with_the_tensor_it_multiplies_by(name: str) -> None:
    """Calibration depends on it: it observes inputs and takes gradients by replacing one operation.

    Expert e's matrix is the e-th of the stacked tensor, named so.
    """
    case = random_case(name)
    seen = {}

    def watched(x, weight, bias, name):
        y = TORCH.linear(x, weight, bias, name)
        y.requires_grad_()
        y.retain_grad()
        seen[name] = (x, y)
        return y

    backend = dataclasses.replace(TORCH, name="watched", linear=watched)
    model = torch_forward.load(case.config, case.weights, backend=backend)
    torch_forward.forward(model, random_tokens(case, 1, 40)).logits.square().sum().backward()
    expected = set()
    for tensor, weight in case.weights.items():
        if tensor.endswith(("_proj.weight", "router.weight", "latent_down.weight", "latent_up.weight")):
            expected |= {f"{tensor}[{e}]" for e in range(len(weight))} if weight.ndim == 3 else {tensor}
    assert seen.keys() == expected
    for label, (x, y) in seen.items():
        assert x.shape[-1] == case.weights[label.split("[")[0]].shape[-1]
        # The softmax of a single logit is 1 whatever it is.
        single = case.config.num_experts_per_tok == 1 and case.config.norm_topk_prob
        indifferent = "router" in label and single
        assert y.grad is not None and (y.grad.abs().sum() > 0) != indifferent, label
