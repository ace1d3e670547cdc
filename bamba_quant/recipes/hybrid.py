"""Moves bits between the tensors of a hybrid model at a plain recipe's size, by the costs measured on other models.

Measured, the divergence that quantizing one tensor adds is proportional to its relative squared error, so that one
number a tensor gives its cost in every format. Here that number follows from the tensor's role: the geometric mean of
the divergences of bamba-43m and bamba-mini, by ``calibration.sensitivity`` over calib.txt, for all layers of the role
together (benchmarks/hybrid_recipes.py prints them). The cost of one layer is the role's divided by the number of
layers, whatever their width. That of the embedding is divided by the number of layers that follow it; that of the
output is not divided.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from bamba_quant.checkpoint.gguf_header import padded_size
from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.families import TensorRule
from bamba_quant.recipes.base import FALLBACKS
from bamba_quant.recipes.least_cost import Option, least_cost

# Cost of a format relative to q4_k, without an importance matrix, scales refined; within 5 % for most tensors of
# bamba-43m.
ERRORS: Mapping[str, float] = {
    "q2_k": 14.6,
    "q3_k": 4.38,
    "q4_0": 1.45,
    "q4_1": 1.2,
    "iq4_xs": 1.17,
    "iq4_nl": 1.14,
    "q4_k": 1.0,
    "q5_0": 0.36,
    "q5_1": 0.281,
    "q5_k": 0.239,
    "q6_k": 0.058,
    "q8_0": 0.0046,
}

# Divergence of all layers of a role in q4_k, nats a token; that of the embedding for a model of ten layers.
ROLE_COSTS: Mapping[str, float] = {
    "token_embd": 0.0038,
    "output": 0.0076,
    "ssm_in": 0.0094,
    "ssm_out": 0.0068,
    "ssm_x": 0.0068,
    "ssm_dt_proj": 0.0068,
    "attn_q": 0.0011,
    "attn_k": 0.0018,
    "attn_v": 0.0040,
    "attn_output": 0.0018,
    "ffn_gate": 0.0053,
    "ffn_up": 0.0039,
    "ffn_down": 0.0051,
    # Not measured: what experts read costs as their inputs do, what they write as their outputs.
    "ffn_latent_down": 0.0039,
    "ffn_latent_up": 0.0051,
}
_EMBEDDING_LAYERS = 10
# The cost of mixers' matrices relative to the middle layers: in the first layer, in those after it, and in the last.
_FIRST, _EARLY, _LATE = 4.0, 1.4, 0.6

# Reserved for key-values that the plain file does not have: the recipe's name, and a record of tuning.
HEADER_ROOM = 4096


def estimated_costs(rule: TensorRule, layers: int, formats: Collection[str], tied: bool) -> dict[str, float]:
    """The cost of a tensor in each of ``formats``, or in its fallback where rows are not whole blocks.

    ``tied`` says that the embedding is the output too. Nats a token.
    """
    columns = rule.gguf_shape[-1]
    names = (
        name if codec_named(name, BlockCodec).fits(columns) else FALLBACKS.get(name, name) for name in formats
    )
    unit = _unit_cost(rule, layers, tied)
    return {
        name: unit * ERRORS[name]
        for name in names
        if name in ERRORS and codec_named(name, BlockCodec).fits(columns)
    }


def _unit_cost(rule: TensorRule, layers: int, tied: bool) -> float:
    role = rule.role
    for kind in ("_exps", "_shexp"):
        role = role.removesuffix(kind)
    cost = ROLE_COSTS[role]
    if role == "token_embd":
        return cost * _EMBEDDING_LAYERS / max(1, layers) + (ROLE_COSTS["output"] if tied else 0.0)
    if rule.layer is None:
        return cost
    if role.startswith("ssm_"):
        depth = rule.layer / max(1, layers - 1)
        cost *= _EARLY + (_LATE - _EARLY) * depth if rule.layer else _FIRST
    return cost / layers


def move_bits(
    rules: Sequence[TensorRule], formats: Sequence[str], candidates: Collection[str], layers: int, tied: bool
) -> list[str]:
    """Formats for the tensors of ``rules`` at the estimated least cost, in no more bytes than they take in ``formats``.

    Each is one of ``candidates``, of what its rows take instead of one, or stays as it is. ``HEADER_ROOM`` is left
    free, or what of it the smallest formats leave.
    """
    options: list[dict[str, Option]] = []
    for rule, name in zip(rules, formats, strict=True):
        costs = {}
        if name in ERRORS:
            costs = estimated_costs(rule, layers, (*candidates, name), tied)
        known = {each: Option(_tensor_bytes(rule, each), cost) for each, cost in costs.items()}
        options.append(known or {name: Option(_tensor_bytes(rule, name), 0.0)})
    budget = sum(known[name].n_bytes for known, name in zip(options, formats, strict=True)) - HEADER_ROOM
    least = sum(min(option.n_bytes for option in known.values()) for known in options)
    chosen = least_cost([list(known.values()) for known in options], max(budget, least))
    return [list(known)[number] for known, number in zip(options, chosen, strict=True)]


def _tensor_bytes(rule: TensorRule, name: str) -> int:
    *rows, columns = rule.gguf_shape
    return padded_size(math.prod(rows) * codec_named(name, BlockCodec).row_bytes(columns))
