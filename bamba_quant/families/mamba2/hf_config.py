"""The config.json of Mamba-2: transformers', Codestral-Mamba's and state-spaces' own.

Defaults are those of transformers' ``Mamba2Config``, in state-spaces' keys those of its ``Mamba2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bamba_quant.families import hf_keys, state_spaces
from bamba_quant.families import hf_schema as schema
from bamba_reference.errors import ConfigError, repr_short

_KEYS = state_spaces.mixer_keys(
    "Mamba2",
    state_size=128,
    time_step_limit=replace(hf_keys.TIME_STEP_LIMIT, other_key="ssm_cfg.dt_limit"),
    mamba_n_heads=schema.count(None, key="num_heads"),
    mamba_d_head=schema.count(64, key="head_dim", other_key="ssm_cfg.headdim"),
    mamba_n_groups=schema.count(None, key="n_groups", other_key="ssm_cfg.ngroups"),
    mamba_d_inner=schema.unchecked(key="intermediate_size"),
    d_inner=schema.unchecked(),
    d_ssm=schema.unchecked(key="ssm_cfg.d_ssm"),
)
# How dt was drawn before training. ``norm_before_gate``, true in Codestral-Mamba, is not read by transformers 5.23,
# which normalizes after the gate, as state-spaces' code does where ``ssm_cfg`` says nothing else.
_INERT = state_spaces.INERT | frozenset(
    """
    time_step_rank time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme
    rescale_prenorm_residual norm_before_gate
    """.split()
)


def _complete(values: dict[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    expand, hidden_size = values["mamba_expand"], values["hidden_size"]
    for name in ("mamba_d_inner", "d_inner", "d_ssm"):
        if values[name] not in (None, expand * hidden_size):
            raise ConfigError(
                f"{_KEYS[name].key or name} is not expand × hidden_size",
                found=repr_short(values[name]),
                expected=f"{expand} × {hidden_size} = {expand * hidden_size}",
            )
    shape = {
        "mamba_n_heads": values["mamba_n_heads"] or max(1, expand * hidden_size // values["mamba_d_head"]),
        "mamba_n_groups": values["mamba_n_groups"] or (1 if state_spaces.is_original(hf) else 8),
    }
    hf_keys.complete_mamba2({**values, **shape}, _KEYS)
    return {**state_spaces.complete_mixers(values, hf, "mamba2", tied=False), **shape}


SCHEMA = schema.HfSchema("transformers' Mamba2Config and state-spaces' MambaConfig", _KEYS, _complete, _INERT)
