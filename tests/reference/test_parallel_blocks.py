"""Layers of several blocks side by side, and of one step: numpy and torch agree, whole, in pieces and streamed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bamba_reference import model as numpy_model
from bamba_reference.config import Config, Layer
from bamba_reference.runtime.stream import final_hidden
from bamba_reference.tensors import layer_tensors, tensor_shapes
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import Backend
from tests.reference.cases import every_backend, random_case, relative_error

# Falcon-H1's layer, Nemotron-H's three, and a mixture beside attention.
LAYERS = (
    Layer(("mamba2", "attention"), ("mlp",)),
    Layer(("mlp",)),
    Layer(("attention",)),
    Layer(("mamba2",)),
    Layer(("attention", "moe"), ("moe", "mlp")),
)


@pytest.fixture(scope="module")
def config() -> Config:
    plain = random_case("plain").config
    return replace(
        plain, layers=LAYERS, num_local_experts=4, num_experts_per_tok=2, expert_intermediate_size=24
    )


@pytest.fixture(scope="module")
def weights(config: Config) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.normal(1 if name.endswith("norm.weight") else 0, 0.1, shape).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }


def test_tensors_of_both_steps(config: Config) -> None:
    assert [config.layers_of(block) for block in ("mamba2", "attention", "mlp", "moe")] == [
        (0, 3), (0, 2, 4), (0, 1, 4), (4,)
    ]  # fmt: skip
    assert config.layer_types == ("mamba+attention", "mlp", "attention", "mamba", "attention+moe")
    assert {name.split(".")[0] for name in layer_tensors(config, 0)} == {
        "input_layernorm", "mamba", "self_attn", "pre_ff_layernorm", "feed_forward"
    }  # fmt: skip
    assert [*layer_tensors(config, 1)] == [
        "input_layernorm.weight",
        *(f"feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")),
    ]


@torch.no_grad()
def test_torch_in_float64_is_the_definition(config: Config, weights: dict[str, np.ndarray]) -> None:
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=70)
    model = torch_forward.load(config, weights, dtype=torch.float64)
    truth = numpy_model.forward(config, weights, tokens, hidden_states=True)
    found = torch_forward.forward(model, tokens[None], hidden_states=True)
    assert relative_error(found.logits[0], truth.logits) <= 1e-13
    for ours, theirs in zip(found.hidden_states, truth.hidden_states, strict=True):
        assert relative_error(ours[0], theirs) <= 1e-13


@every_backend
@torch.no_grad()
def test_pieces_and_padding(config: Config, weights: dict[str, np.ndarray], backend: Backend) -> None:
    """Every block keeps a state of its own: numpy's and torch's, behind padding and token by token."""
    tokens = np.random.default_rng(2).integers(config.vocab_size, size=45)
    truth = numpy_model.forward(config, weights, tokens).logits
    model = torch_forward.load(config, weights, backend=backend)
    state, numpy_state = torch_forward.new_state(model, 1), numpy_model.NumpyState()
    mask = np.ones((1, 48), int)
    mask[:, :3] = 0
    found, numpy_found = [], []
    for start, stop in ((0, 20), (20, 40), *((i, i + 1) for i in range(40, 45))):
        piece, first = tokens[start:stop], 3 if start == 0 else 0
        padded = np.concatenate([np.full(first, 2), piece])[None]
        out = torch_forward.forward(model, padded, state=state, attention_mask=mask[:, : 3 + stop])
        found.append(out.logits[0, first:])
        numpy_found.append(numpy_model.forward(config, weights, piece, state=numpy_state).logits)
    assert relative_error(torch.cat(found), truth) <= 2e-5
    assert relative_error(np.concatenate(numpy_found), truth) <= 1e-12


@every_backend
def test_streamed_is_whole(config: Config, weights: dict[str, np.ndarray], backend: Backend) -> None:
    tokens = np.random.default_rng(3).integers(config.vocab_size, size=(2, 40))
    (hidden,) = final_hidden(config, [weights], tokens, backend=backend)
    with torch.no_grad():
        whole = torch_forward.forward(torch_forward.load(config, weights, backend=backend), tokens)
    assert relative_error(hidden, whole.last_hidden) <= 1e-6
