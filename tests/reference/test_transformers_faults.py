"""Where transformers 5.23 is wrong or raises, the reference keeps to the float64 truth.

Each test shows the fault too, so that it fails when a release corrects it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from bamba_reference import model as numpy_model
from bamba_reference.torch import forward as torch_forward
from tests.reference.cases import (
    Case,
    oracle_padded,
    oracle_pieces,
    random_case,
    random_tokens,
    relative_error,
)
from tests.reference.families import CASES, PROJECTION_BIASES
from tests.support.families import FAMILIES

TOLERANCE = 2e-5


def decoded(case: Case, tokens: np.ndarray) -> torch.Tensor:
    """The reference's logits of the last token (V,), decoded after a prefill of the others."""
    model = torch_forward.load(case.config, case.weights)
    state = torch_forward.new_state(model, 1)
    torch_forward.forward(model, tokens[None, :-1], state=state)
    return torch_forward.forward(model, tokens[None, -1:], state=state).logits[0, -1]


@torch.no_grad()
def test_decoding_restarts_the_rotary_embedding_without_position_ids() -> None:
    case = random_case("plain")
    tokens = random_tokens(case, 40)
    truth = numpy_model.forward(case.config, case.weights, tokens).logits[-1]
    pieces = tokens[:-1], tokens[-1:]
    assert relative_error(oracle_pieces(case, *pieces)[-1], truth) <= TOLERANCE
    assert relative_error(oracle_pieces(case, *pieces, positions=False)[-1], truth) > 1e-3
    assert relative_error(decoded(case, tokens), truth) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "two groups, finite limit",
        "granite, projection biases, finite limit",
        "mamba2, tied, two groups, finite limit",
    ],
)
@torch.no_grad()
def test_decoding_ignores_a_finite_time_step_limit(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 40)
    truth = numpy_model.forward(case.config, case.weights, tokens).logits[-1]
    assert relative_error(oracle_pieces(case, tokens[:-1], tokens[-1:])[-1], truth) > 1e-3
    assert relative_error(decoded(case, tokens), truth) <= TOLERANCE


@pytest.mark.parametrize("name", [*CASES["mamba"], *CASES["falcon_mamba"]])
@torch.no_grad()
def test_the_selective_scan_of_a_second_piece_begins_with_nothing(name: str) -> None:
    """transformers' scan of several tokens takes no state; that of one token does."""
    case = random_case(name)
    tokens = random_tokens(case, 40)
    pieces = tokens[:20], tokens[20:]
    truth = numpy_model.forward(case.config, case.weights, tokens).logits[20:]
    assert relative_error(oracle_pieces(case, *pieces), truth) > 1e-3
    model = torch_forward.load(case.config, case.weights)
    state = torch_forward.new_state(model, 1)
    for piece in pieces:
        ours = torch_forward.forward(model, piece[None], state=state).logits[0]
    assert relative_error(ours, truth) <= TOLERANCE


@pytest.mark.parametrize("name", [*CASES["bamba"], *CASES["granitemoehybrid"]])
@torch.no_grad()
def test_packed_sequences_leak_or_raise(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 40)
    separate = [
        numpy_model.forward(case.config, case.weights, part).logits for part in np.split(tokens, [15])
    ]
    truth = np.concatenate(separate)
    packing = {
        "seq_idx": torch.tensor([[0] * 15 + [1] * 25], dtype=torch.int32),
        "position_ids": torch.tensor([[*range(15), *range(25)]]),
    }
    ids = torch.from_numpy(tokens)[None]
    try:
        theirs = case.oracle(ids, use_cache=False, **packing).logits[0]
    except (TypeError, ValueError):
        pass
    else:
        assert relative_error(theirs, truth) > 1e-3
    model = torch_forward.load(case.config, case.weights)
    assert relative_error(torch_forward.forward(model, ids, **packing).logits[0], truth) <= TOLERANCE


@pytest.mark.parametrize("name", PROJECTION_BIASES)
@torch.no_grad()
def test_left_padding_with_projection_biases_reaches_the_first_tokens(name: str) -> None:
    """transformers zeroes padding before the input projection, whose bias then enters the convolution."""
    case = random_case(name)
    tokens = random_tokens(case, 20)
    truth = numpy_model.forward(case.config, case.weights, tokens).logits
    assert relative_error(oracle_padded(case, tokens, 5), truth) > 1e-3
    padded, mask = np.concatenate([np.full(5, 2), tokens]), [[0] * 5 + [1] * 20]
    model = torch_forward.load(case.config, case.weights)
    ours = torch_forward.forward(model, padded[None], attention_mask=mask).logits[0, 5:]
    assert relative_error(ours, truth) <= TOLERANCE


@torch.no_grad()
def test_nemotron_h_raises_small_time_steps() -> None:
    """To ``time_step_min``, by which dt was drawn before training, and not to the limit of ``time_step_limit``."""
    family, keys = FAMILIES["nemotron_h"], {"time_step_min": 0.1, "time_step_limit": [0.0, math.inf]}
    oracle = family.random(**CASES["nemotron_h"]["nemotron"], **keys)
    case = random_case("nemotron")
    tokens = random_tokens(case, 40)
    theirs = oracle(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    truth = numpy_model.forward(case.config, case.weights, tokens).logits
    assert relative_error(theirs, truth) > 1e-2
    raised = dataclasses.replace(case.config, time_step_limit=(0.1, math.inf))
    assert relative_error(theirs, numpy_model.forward(raised, case.weights, tokens).logits) <= TOLERANCE


@torch.no_grad()
def test_a_model_without_attention_cannot_use_its_cache() -> None:
    case = random_case("no attention, short convolution")
    tokens = random_tokens(case, 30)
    with pytest.raises(ValueError, match="get_seq_length"):
        case.oracle(torch.from_numpy(tokens)[None], use_cache=True)
    truth = numpy_model.forward(case.config, case.weights, tokens).logits[-1]
    assert relative_error(decoded(case, tokens), truth) <= TOLERANCE
