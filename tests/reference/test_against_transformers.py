"""Logits are transformers' to 2e-5, and as near to the float64 truth as transformers' own or nearer.

Cases where transformers is wrong (``test_transformers_faults``) are skipped here.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch

from bamba_reference import model as numpy_model
from bamba_reference.packing import layout
from bamba_reference.torch import forward as torch_forward
from bamba_reference.torch.backend import TORCH, Backend
from bamba_reference.torch.blocks import BLOCKS, LayerWeights
from tests.reference.cases import (
    BACKENDS,
    RANDOM,
    TRAINED,
    Case,
    eval_tokens,
    every_backend,
    oracle_logits,
    oracle_padded,
    oracle_pieces,
    oracle_streams,
    random_case,
    random_tokens,
    relative_error,
    trained_case,
)
from tests.reference.families import CASES, FAMILY_OF, FINITE_LIMIT, PROJECTION_BIASES
from tests.support.families import STACKED

TOLERANCE = 2e-5


def numpy_logits(case: Case, tokens: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    return numpy_model.forward(case.config, case.weights, tokens, dtype=dtype).logits


@torch.no_grad()
def torch_logits(
    case: Case, tokens: np.ndarray, dtype: torch.dtype = torch.float32, backend: Backend = TORCH
) -> np.ndarray:
    model = torch_forward.load(case.config, case.weights, dtype=dtype, backend=backend)
    return torch_forward.forward(model, tokens[None]).logits[0].numpy()


@pytest.mark.parametrize("name", RANDOM)
def test_random_models(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 300)
    oracle = oracle_logits(case, tokens)
    assert relative_error(numpy_logits(case, tokens), oracle) <= TOLERANCE
    for backend in BACKENDS:
        assert relative_error(torch_logits(case, tokens, backend=backend), oracle) <= TOLERANCE


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(name: str) -> None:
    case, tokens = trained_case(name), eval_tokens(name, 300)
    oracle, truth = oracle_logits(case, tokens), numpy_logits(case, tokens, np.float64)
    ours = (torch_logits(case, tokens, backend=backend) for backend in BACKENDS)
    for logits in (numpy_logits(case, tokens), *ours):
        assert relative_error(logits, oracle) <= TOLERANCE
        assert relative_error(logits, truth) <= relative_error(oracle, truth)
    assert_bfloat16_is_no_worse(case, tokens)


def assert_bfloat16_is_no_worse(case: Case, tokens: np.ndarray) -> None:
    """With the same weights, rounded to bfloat16 first: the arithmetic is compared."""
    weights = {k: torch.from_numpy(v).bfloat16().float().numpy() for k, v in case.weights.items()}
    rounded = dataclasses.replace(case, weights=weights)
    truth = numpy_logits(rounded, tokens, np.float64)
    found = relative_error(torch_logits(rounded, tokens, torch.bfloat16), truth)
    assert found <= relative_error(oracle_logits(case, tokens, torch.bfloat16), truth)


@pytest.mark.parametrize("family", CASES)
def test_rounding_errors_of_random_models_are_no_larger(family: str) -> None:
    """Over all configurations of a family together: of two roundings of one number either may be the nearer."""
    errors: dict[str, list[float]] = collections.defaultdict(list)
    for name in CASES[family]:
        for seed in range(2):
            case = random_case(name, seed)
            tokens = random_tokens(case, 300, seed=seed)
            truth = numpy_logits(case, tokens, np.float64)
            errors["transformers"].append(relative_error(oracle_logits(case, tokens), truth))
            errors["numpy"].append(relative_error(numpy_logits(case, tokens), truth))
            for backend in BACKENDS:
                logits = torch_logits(case, tokens, backend=backend)
                errors[f"backend {backend.name}"].append(relative_error(logits, truth))
    mean = {path: float(np.exp(np.mean(np.log(found)))) for path, found in errors.items()}
    assert len(mean) == 2 + len(BACKENDS) and max(mean.values()) == mean["transformers"], mean


# Models that use some of their experts: where a rounding changes which, either choice may be nearer the truth.
CHOOSING = tuple(
    name
    for name, family in FAMILY_OF.items()
    if (keys := CASES[family][name]).get("num_experts_per_tok", 0)
    < keys.get("num_local_experts", keys.get("n_routed_experts", 0))
)


@pytest.mark.parametrize("name", [name for name in RANDOM if name not in CHOOSING])
def test_bfloat16_is_no_worse_than_transformers(name: str) -> None:
    case = random_case(name)
    assert_bfloat16_is_no_worse(case, random_tokens(case, 300))


@pytest.mark.parametrize("name", [name for name in CHOOSING if FAMILY_OF[name] == STACKED[0][0]])
def test_experts_are_chosen_by_unrounded_logits(name: str) -> None:
    """In bfloat16 transformers rounds the router's logits, and some tokens go to other experts than float64's."""
    case = random_case(name)
    router, k = case.weights["model.layers.0.moe.router.weight"], case.config.num_experts_per_tok
    u = torch.randn(4000, router.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.from_numpy(router).bfloat16()
    chosen: list[torch.Tensor] = []

    def watched(x, w, bias, label):
        y = TORCH.linear(x, w, bias, label)
        if "router" in label:
            chosen.append(y.topk(k).indices.sort().values)
        return y

    backend = dataclasses.replace(TORCH, linear=watched)
    rounded = case.weights | {"model.layers.0.moe.router.weight": weight.float().numpy()}
    model = torch_forward.load(case.config, rounded, dtype=torch.bfloat16, backend=backend)
    weights = LayerWeights(model, "model.layers.0.")
    sequences = torch_forward.prepare(case.config, layout((1, len(u))), model.dtype, model.device)
    BLOCKS["moe"](model, weights, u[None], sequences, None)
    truth = (u.double() @ weight.double().T).topk(k).indices.sort().values
    layer = case.oracle.model.layers[0].block_sparse_moe.router
    theirs = type(layer)(case.oracle.config).bfloat16()
    theirs.load_state_dict({"weight": weight})
    assert torch.equal(chosen[0], truth)
    assert not torch.equal(theirs(u)[2].sort().values, truth)


@pytest.mark.parametrize("name", RANDOM)
def test_torch_in_float64_is_the_definition(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 100)
    truth = numpy_logits(case, tokens, np.float64)
    assert relative_error(torch_logits(case, tokens, torch.float64), truth) <= 1e-13


@pytest.mark.parametrize("name", RANDOM)
@torch.no_grad()
def test_hidden_states_are_transformers(name: str) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 50)
    oracle = case.oracle(
        torch.from_numpy(tokens)[None], use_cache=False, output_hidden_states=True
    ).hidden_states
    model = torch_forward.load(case.config, case.weights)
    out = torch_forward.forward(model, tokens[None], hidden_states=True)
    ours = numpy_model.forward(case.config, case.weights, tokens, hidden_states=True).hidden_states
    assert out.hidden_states and ours
    for i, expected in oracle_streams(case, oracle).items():
        assert relative_error(out.hidden_states[i], expected) <= TOLERANCE
        assert relative_error(ours[i], expected[0]) <= TOLERANCE
    assert relative_error(out.last_hidden, oracle[-1]) <= TOLERANCE
    assert len(out.hidden_states) == len(ours) == case.config.num_hidden_layers + 1


@every_backend
@pytest.mark.parametrize("name", [name for name in RANDOM if name not in PROJECTION_BIASES])
@torch.no_grad()
def test_behind_padding(name: str, backend: Backend) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 40)
    padded, mask = np.concatenate([np.full(7, 2), tokens]), [[0] * 7 + [1] * 40]
    model = torch_forward.load(case.config, case.weights, backend=backend)
    ours = torch_forward.forward(model, padded[None], attention_mask=mask).logits[0, 7:]
    assert relative_error(ours, oracle_padded(case, tokens, 7)) <= TOLERANCE


@every_backend
@pytest.mark.parametrize(
    "name",
    [name for name in RANDOM if name not in FINITE_LIMIT and name != "no attention, short convolution"],
)
@torch.no_grad()
def test_decoding(name: str, backend: Backend) -> None:
    case = random_case(name)
    tokens = random_tokens(case, 41)
    model = torch_forward.load(case.config, case.weights, backend=backend)
    state = torch_forward.new_state(model, 1)
    torch_forward.forward(model, tokens[None, :-1], state=state)
    ours = torch_forward.forward(model, tokens[None, -1:], state=state).logits[0]
    assert relative_error(ours, oracle_pieces(case, tokens[:-1], tokens[-1:])) <= TOLERANCE


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
    kept = numpy_model.forward(case.config, case.weights, tokens[0], logits_to_keep=3).logits
    assert relative_error(kept, whole[0, -3:]) <= TOLERANCE


@pytest.mark.parametrize("name", RANDOM)
def test_logits_and_what_enters_wide_arithmetic_are_float32_in_every_dtype(name: str) -> None:
    case = random_case(name)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = torch_forward.load(case.config, case.weights, dtype=dtype)
        for tensor, weight in model.weights.items():
            small = weight.dim() == 1 and not tensor.endswith(("in_proj.bias", "out_proj.bias"))
            small &= "self_attn" not in tensor and "feed_forward" not in tensor
            small |= any(part in tensor for part in ("conv1d", "A_log", "router"))
            assert weight.dtype == (torch.float32 if small else dtype), tensor
        out = torch_forward.forward(model, [[1, 2, 3]], hidden_states=True)
        assert out.logits.dtype == torch.float32
        assert out.last_hidden.dtype == dtype
        stream = torch.float32 if case.config.residual_in_fp32 else dtype
        assert out.hidden_states and all(hidden.dtype == stream for hidden in out.hidden_states)
