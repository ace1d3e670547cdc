"""The random models of every family that the reference's tests run over, under the reference's names.

Every configuration key that changes the mathematics occurs at least once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bamba_quant.families import families, family_of, read_config
from tests.support.families import FAMILIES, STACKED

# Family -> name of a case -> keys of transformers' configuration.
CASES = {family.name: family.small_models.reference_cases for family in families()}
FAMILY_OF = {name: family for family, cases in CASES.items() for name in cases}

# One case of each family, and one with stacked experts.
REPRESENTATIVE = (
    *(next(iter(cases)) for cases in CASES.values()),
    next(name for name in CASES[STACKED[0][0]] if "experts" in name),
)

# Cases whose mixers' projections have biases, and whose dt is bounded: transformers errs there
# (test_transformers_faults).
PROJECTION_BIASES = tuple(
    name
    for cases in CASES.values()
    for name, keys in cases.items()
    if keys.get("mamba_proj_bias") or keys.get("use_bias")
)
FINITE_LIMIT = tuple(
    name for cases in CASES.values() for name, keys in cases.items() if "time_step_limit" in keys
)


def random_model(name: str, seed: int) -> Any:
    """A float32 transformers model in eval mode."""
    family = FAMILY_OF[name]
    return FAMILIES[family].random(seed, **CASES[family][name])


def own_names(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors of a model, weights or their gradients, under the reference's names.

    transformers 5 calls some by other names in memory than on disk, so that a rule's every spelling is looked up.
    """
    hf = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    own: dict[str, torch.Tensor] = {}
    for rule in family_of(hf).tensors(read_config(hf)):
        tensor = next((tensors[name] for name in rule.hf_names if name in tensors), None)
        if tensor is not None and not rule.skipped:
            rows = rule.section
            own[rule.name] = tensor if rows is None else tensor.narrow(-2, rows.start, rows.length)
    return own
