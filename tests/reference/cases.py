"""The models that the reference's tests run over, each with its configuration and its weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BambaForCausalLM

from bamba_reference import Config
from tests.support.models import hf_config, numpy_weights, random_bamba
from tests.support.shared import shared

# What a configuration may say that changes the mathematics, each at least once.
RANDOM: dict[str, dict[str, Any]] = {
    "plain": {},
    "two groups, finite limit": {"mamba_n_groups": 2, "time_step_limit": (0.01, 0.1)},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "every bias but the convolution's": {
        "attention_bias": True,
        "mlp_bias": True,
        "mamba_proj_bias": True,
        "mamba_conv_bias": False,
    },
    "four groups, two attention layers": {
        "mamba_n_groups": 4,
        "attn_layer_indices": [0, 3],
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        "rms_norm_eps": 1e-3,
    },
    "no attention, short convolution": {"attn_layer_indices": None, "mamba_d_conv": 2, "mamba_d_state": 24},
}
TRAINED = ("bamba-mini", "bamba-43m")


@dataclass(frozen=True)
class Case:
    """A float32 transformers model, the oracle, and the same model as the reference takes it."""

    oracle: BambaForCausalLM
    config: Config
    weights: dict[str, np.ndarray]


@functools.cache
def random_case(name: str, seed: int = 0) -> Case:
    model = random_bamba(seed, **RANDOM[name])
    return Case(model, Config.from_hf(hf_config(model)), numpy_weights(model))


@functools.cache
def trained_case(name: str) -> Case:
    directory = shared(f"models/{name}")
    model = BambaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = Config.from_hf(json.loads((directory / "config.json").read_text()))
    return Case(model, config, numpy_weights(model))


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


def relative_error(found: Any, truth: Any) -> float:
    """‖found − truth‖ / ‖truth‖ in float64."""
    found, truth = (np.asarray(torch.as_tensor(v).detach().double()) for v in (found, truth))
    assert found.shape == truth.shape
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
