"""A model run by the kernels is the model: whole, packed, padded, in pieces, streamed and decoded."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

from bamba_reference.backends import backend_named, differentiable
from bamba_reference.kernels.decode import Decoder
from bamba_reference.runtime import stream
from bamba_reference.runtime.generate import generate_batch
from bamba_reference.tensors import tensor_shapes
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH, BackendError
from tests.reference.cases import random_case, random_tokens, relative_error
from tests.reference.families import CASES, REPRESENTATIVE

TOLERANCE = 2e-5
INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TRITON = backend_named("triton", DEVICE, torch.float32)


def pair(name: str) -> tuple[torch_forward.Model, torch_forward.Model]:
    """The first two layers of a case, a mixer and attention where it has both."""
    case = random_case(name)
    config = dataclasses.replace(case.config, layers=case.config.layers[:2])
    weights = {name: case.weights[name] for name in tensor_shapes(config)}
    return (
        torch_forward.load(config, weights, device=DEVICE),
        torch_forward.load(config, weights, device=DEVICE, backend=TRITON),
    )


@pytest.mark.parametrize("name", [*CASES["bamba"], *REPRESENTATIVE[1:]])
@torch.no_grad()
def test_logits(name: str) -> None:
    torch_model, triton_model = pair(name)
    tokens = random_tokens(random_case(name), 2, 9)
    packed = {"seq_idx": np.repeat([[0, 1, 2], [4, 5, 5]], [5, 1, 3], axis=1)}
    for arguments in ({}, packed) if name in ("plain", "mamba") else (packed,):
        expected = torch_forward.forward(torch_model, tokens, **arguments).logits.cpu()
        found = torch_forward.forward(triton_model, tokens, **arguments).logits.cpu()
        assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["plain", "mamba"])
@torch.no_grad()
def test_masks_may_lie_column_after_column(name: str) -> None:
    _, model = pair(name)
    tokens = random_tokens(random_case(name), 2, 4)
    packed = {"seq_idx": np.repeat([[0, 1, 2], [4, 5, 5]], [1, 1, 2], axis=1)}
    padded = {"attention_mask": np.repeat([[0, 1], [1, 1]], [1, 3], axis=1)}
    for arguments in (packed, padded):
        expected = torch_forward.forward(model, tokens, **arguments).logits
        turned = {key: np.asfortranarray(value) for key, value in arguments.items()}
        assert torch.equal(torch_forward.forward(model, tokens, **turned).logits, expected)


@torch.no_grad()
def test_streamed() -> None:
    case = random_case("plain")
    tokens = random_tokens(case, 2, 9)
    expected, found = (
        stream.final_hidden(case.config, [case.weights], tokens, device=DEVICE, backend=backend)[0]
        for backend in (TORCH, TRITON)
    )
    assert relative_error(found.cpu(), expected.cpu()) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["two groups, finite limit", "no attention, short convolution", "granite", "mamba2", "mamba"]
)
@torch.no_grad()
def test_decoder_continues_a_padded_prefill(name: str) -> None:
    torch_model, triton_model = pair(name)
    tokens = random_tokens(random_case(name), 2, 8)
    mask = np.ones((2, 5), int)
    mask[0, :2] = 0
    states = [torch_forward.new_state(model, 2) for model in (torch_model, triton_model)]
    for model, state in zip((torch_model, triton_model), states, strict=True):
        torch_forward.forward(model, tokens[:, :5], attention_mask=mask, state=state)
    decoder = Decoder(triton_model, states[1], room=7)
    for at in (5, 6):
        expected = torch_forward.forward(torch_model, tokens[:, at : at + 1], state=states[0])
        found = decoder(tokens[:, at : at + 1])
        assert relative_error(found.logits.cpu(), expected.logits.cpu()) <= TOLERANCE
        assert relative_error(found.last_hidden.cpu(), expected.last_hidden.cpu()) <= TOLERANCE
    with pytest.raises(IndexError, match="7 tokens"):
        decoder(tokens[:, 7:])


def test_generation_is_the_same() -> None:
    torch_model, triton_model = pair("plain")
    prompts = [[3, 4, 5, 6, 7], [9, 10]]
    expected = generate_batch(torch_model, prompts, max_new_tokens=4, stop=[])
    assert generate_batch(triton_model, prompts, max_new_tokens=4, stop=[]) == expected


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@torch.no_grad()
def test_a_graph_replays_with_bfloat16() -> None:
    """Few-row products, the one-token kernels and the recorded graph, in the dtype they are made for."""
    case = random_case("four groups, two attention layers")
    models = [
        torch_forward.load(case.config, case.weights, dtype=torch.bfloat16, device=DEVICE, backend=backend)
        for backend in (TORCH, TRITON)
    ]
    exact = torch_forward.load(case.config, case.weights, device=DEVICE)
    tokens = random_tokens(case, 1, 40)
    truth = torch_forward.forward(exact, tokens).logits[:, 20:]
    errors = []
    for model in models:
        state = torch_forward.new_state(model, 1)
        torch_forward.forward(model, tokens[:, :20], state=state)
        decoder = model.backend.decoder and model.backend.decoder(model, state, 40)
        steps = []
        for at in range(20, 40):
            token = tokens[:, at : at + 1]
            out = decoder(token) if decoder else torch_forward.forward(model, token, state=state)
            steps.append(out.logits.clone())
        errors.append(relative_error(torch.cat(steps, dim=1).cpu(), truth.cpu()))
    assert errors[1] <= 1.1 * errors[0]


def test_choice_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert backend_named("auto", cuda, torch.float64).name == "torch"
    assert backend_named("auto", cuda, torch.bfloat16).name == "triton"
    assert backend_named("torch", cuda, torch.float32) is TORCH
    assert [differentiable(device, torch.float32).name for device in (cpu, cuda)] == ["torch", "triton"]
    with pytest.raises(BackendError, match="jax"):
        backend_named("jax", cpu, torch.float32)
    with pytest.raises(BackendError, match="float64"):
        backend_named("triton", cuda, torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="GPU"):
        backend_named("triton", cpu, torch.float32)


def test_a_missing_package_is_an_error_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba_ssm", *(name for name in sys.modules if name.startswith("mamba_ssm."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"pip install .*mamba-ssm"):
        backend_named("mamba-ssm", torch.device("cuda"), torch.bfloat16)
