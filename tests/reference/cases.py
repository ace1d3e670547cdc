"""The models that the reference's tests run over, each with its configuration and its weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BambaForCausalLM, DynamicCache

from bamba_quant.families import read_config
from bamba_quant.families.hf_keys import NO_POSITIONS
from bamba_reference import Config
from bamba_reference.kernels.cpu.backend import NUMBA
from bamba_reference.torch.backend import TORCH
from tests.reference.families import FAMILY_OF, own_names, random_model
from tests.support.shared import shared

# Every random model of every family, by the name of its case.
RANDOM = tuple(FAMILY_OF)
TRAINED = ("bamba-mini", "bamba-43m")
# Every backend that runs on a CPU at full speed.
BACKENDS = (TORCH, NUMBA)
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


@dataclass(frozen=True)
class Case:
    """A float32 transformers model, the oracle, and the same model as the reference takes it."""

    oracle: Any
    config: Config
    weights: dict[str, np.ndarray]


@functools.cache
def random_case(name: str, seed: int = 0) -> Case:
    model = random_model(name, seed)
    written = json.loads(model.config.to_json_string(use_diff=False))
    return Case(model, read_config(written | {"architectures": [type(model).__name__]}), own_weights(model))


def own_weights(model: Any) -> dict[str, np.ndarray]:
    """The float32 weights under the reference's names, without ``lm_head.weight`` where it is tied."""
    own = own_names(model, model.state_dict())
    return {name: tensor.detach().float().numpy() for name, tensor in own.items()}


@functools.cache
def trained_case(name: str) -> Case:
    directory = shared(f"models/{name}")
    model = BambaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = read_config(json.loads((directory / "config.json").read_text()))
    return Case(model, config, own_weights(model))


@functools.cache
def eval_tokens(model: str, count: int) -> np.ndarray:
    """The first tokens of the evaluation text, which the trained models have not seen: (count,)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared(f"models/{model}/tokenizer.json")))
    ids = tokenizer.encode(shared("data/eval.txt").read_text()[: 8 * count]).ids[:count]
    assert len(ids) == count
    return np.array(ids)


def random_tokens(case: Case, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(case.config.vocab_size, size=shape)


@torch.no_grad()
def oracle_logits(case: Case, tokens: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """transformers' logits of (L,) or (B, L) tokens, in float64."""
    ids = torch.from_numpy(np.atleast_2d(tokens))
    if dtype == torch.float32:
        logits = case.oracle(ids, use_cache=False).logits
    else:
        copy = type(case.oracle)(case.oracle.config).eval()
        copy.load_state_dict(case.oracle.state_dict())
        logits = copy.to(dtype)(ids, use_cache=False).logits
    return logits.double().numpy().reshape(*tokens.shape, -1)


@torch.no_grad()
def oracle_pieces(case: Case, *pieces: np.ndarray, positions: bool = True) -> torch.Tensor:
    """transformers' logits (L, V) of the last of these pieces of one text, run one after the other with its cache.

    Without ``positions`` transformers counts them.
    """
    has_positions = case.config.max_position_embeddings != NO_POSITIONS
    cache, past = DynamicCache(config=case.oracle.config), 0
    for piece in pieces:
        said: dict[str, Any] = {"past_key_values" if has_positions else "cache_params": cache}
        if has_positions and positions:
            said["position_ids"] = torch.arange(past, past + len(piece))[None]
        logits = case.oracle(torch.from_numpy(piece)[None], use_cache=True, **said).logits[0]
        past += len(piece)
    return logits


@torch.no_grad()
def oracle_padded(case: Case, tokens: np.ndarray, padding: int) -> torch.Tensor:
    """transformers' logits (L, V) of tokens after ``padding`` masked tokens."""
    ids = torch.from_numpy(np.concatenate([np.full(padding, 2), tokens]))[None]
    mask = torch.tensor([[0] * padding + [1] * len(tokens)])
    said = {}
    if case.config.max_position_embeddings != NO_POSITIONS:
        said["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return case.oracle(ids, attention_mask=mask, use_cache=False, **said).logits[0, padding:]


def oracle_streams(case: Case, hidden_states: tuple[torch.Tensor, ...]) -> dict[int, torch.Tensor]:
    """transformers' hidden states by the number of layers before them, without the last, which transformers normalizes.

    Its Mamba classes begin with the first layer's output, the others with its input.
    """
    first = 0 if case.config.intermediate_size else 1
    return {first + i: hidden for i, hidden in enumerate(hidden_states[:-1])}


def relative_error(found: Any, truth: Any) -> float:
    """‖found − truth‖ / ‖truth‖ in float64; of a truth that is zero, ‖found‖."""
    found, truth = (np.asarray(torch.as_tensor(v).detach().double()) for v in (found, truth))
    assert found.shape == truth.shape
    return float(np.linalg.norm(found - truth) / (np.linalg.norm(truth) or 1))
