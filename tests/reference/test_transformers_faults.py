"""Where transformers 5.23 is wrong or raises, the reference keeps to the float64 truth.

Each test shows the fault too, so that a release that mends it is noticed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from bamba_reference import numpy_forward, torch_forward
from tests.reference.cases import Case, random_case, random_tokens, relative_error

TOLERANCE = 2e-5


def decoded(case: Case, tokens: np.ndarray) -> torch.Tensor:
    """The reference's logits of the last token (V,), decoded after a prefill of the others."""
    model = torch_forward.load(case.config, case.weights)
    state = torch_forward.new_state(model, 1)
    torch_forward.forward(model, tokens[None, :-1], state=state)
    return torch_forward.forward(model, tokens[None, -1:], state=state).logits[0, -1]


def oracle_decoded(case: Case, tokens: np.ndarray, with_positions: bool) -> torch.Tensor:
    ids = torch.from_numpy(tokens)[None]
    cache = DynamicCache(config=case.oracle.config)
    case.oracle(ids[:, :-1], past_key_values=cache, use_cache=True)
    positions = {"position_ids": torch.tensor([[len(tokens) - 1]])} if with_positions else {}
    return case.oracle(ids[:, -1:], past_key_values=cache, use_cache=True, **positions).logits[0, -1]


@torch.no_grad()
def test_decoding_restarts_the_rotary_embedding_without_position_ids() -> None:
    case = random_case("plain")
    tokens = random_tokens(case, 40)
    truth = numpy_forward.forward(case.config, case.weights, tokens).logits[-1]
    assert relative_error(oracle_decoded(case, tokens, with_positions=True), truth) <= TOLERANCE
    assert relative_error(oracle_decoded(case, tokens, with_positions=False), truth) > 1e-3
    assert relative_error(decoded(case, tokens), truth) <= TOLERANCE


@torch.no_grad()
def test_decoding_ignores_a_finite_time_step_limit() -> None:
    case = random_case("two groups, finite limit")
    tokens = random_tokens(case, 40)
    truth = numpy_forward.forward(case.config, case.weights, tokens).logits[-1]
    assert relative_error(oracle_decoded(case, tokens, with_positions=True), truth) > 1e-3
    assert relative_error(decoded(case, tokens), truth) <= TOLERANCE


@torch.no_grad()
def test_packed_sequences_leak_or_raise() -> None:
    case = random_case("plain")
    tokens = random_tokens(case, 40)
    separate = [
        numpy_forward.forward(case.config, case.weights, part).logits for part in np.split(tokens, [15])
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


@torch.no_grad()
def test_left_padding_with_projection_biases_reaches_the_first_tokens() -> None:
    """transformers zeroes padding before the input projection, whose bias then enters the convolution."""
    case = random_case("every bias but the convolution's")
    tokens = random_tokens(case, 20)
    truth = numpy_forward.forward(case.config, case.weights, tokens).logits
    padded = torch.from_numpy(np.concatenate([np.full(5, 2), tokens]))[None]
    mask = torch.tensor([[0] * 5 + [1] * 20])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = case.oracle(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 5:]
    assert relative_error(theirs, truth) > 1e-3
    model = torch_forward.load(case.config, case.weights)
    ours = torch_forward.forward(model, padded, attention_mask=mask, position_ids=positions).logits[0, 5:]
    assert relative_error(ours, truth) <= TOLERANCE


@torch.no_grad()
def test_a_model_without_attention_cannot_use_its_cache() -> None:
    case = random_case("no attention, short convolution")
    tokens = random_tokens(case, 30)
    with pytest.raises(ValueError, match="get_seq_length"):
        case.oracle(torch.from_numpy(tokens)[None], use_cache=True)
    truth = numpy_forward.forward(case.config, case.weights, tokens).logits[-1]
    assert relative_error(decoded(case, tokens), truth) <= TOLERANCE
