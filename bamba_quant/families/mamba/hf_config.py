"""The config.json of Mamba and FalconMamba, of transformers and of state-spaces.

Defaults are those of transformers' ``MambaConfig`` and ``FalconMambaConfig``, which state-spaces' ``Mamba`` shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bamba_quant.families import hf_schema as schema
from bamba_quant.families import state_spaces
from bamba_reference.errors import ConfigError, repr_short

_KEYS = state_spaces.mixer_keys(
    "Mamba1",
    state_size=16,
    mamba_d_inner=schema.count(None, key="intermediate_size", write=lambda config: config.mamba_d_inner),
    mamba_time_step_rank=schema.count_or_auto(key="time_step_rank", other_key="ssm_cfg.dt_rank"),
    d_inner=schema.unchecked(),
)
# How dt was drawn before training, and which of several equal scans and losses is run.
_INERT = state_spaces.INERT | frozenset(
    """
    time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme dt_rank
    rescale_prenorm_residual use_mambapy use_falcon_mambapy use_associative_scan fuse_norm fuse_cross_entropy
    """.split()
)


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """``intermediate_size`` is the width inside the mixer, which in transformers overrules ``expand``.

    falcon-mamba-7b has expand 16, and its weights are 8192 wide: twice as wide as the model.
    """
    hidden_size = values["hidden_size"]
    d_inner = values["mamba_d_inner"] or values["mamba_expand"] * hidden_size
    expand = schema.quotient(d_inner, hidden_size, "intermediate_size", "hidden_size")
    if values["d_inner"] not in (None, d_inner):
        raise ConfigError(
            "d_inner is not the width of the mixer", found=repr_short(values["d_inner"]), expected=d_inner
        )
    return {
        **state_spaces.complete_mixers(values, hf, "mamba1", tied=True),
        "mamba_expand": expand,
        "mamba_time_step_rank": values["mamba_time_step_rank"] or -(-hidden_size // 16),
    }


MAMBA = schema.HfSchema("transformers' MambaConfig and state-spaces' MambaConfig", _KEYS, _complete, _INERT)
FALCON_MAMBA = schema.HfSchema(
    "transformers' FalconMambaConfig", {**_KEYS, "mixer_rms_eps": schema.positive(1e-6)}, _complete, _INERT
)
