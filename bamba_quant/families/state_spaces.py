"""Mamba configurations as state-spaces' own code writes them: a few keys at the top, the rest in ``ssm_cfg``.

transformers' converted checkpoints keep these keys beside its own. What both say must agree. Source: mamba_ssm's
``config_mamba.py``, ``mixer_seq_simple.py``, ``mamba_simple.py`` and ``mamba2.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bamba_quant.families import hf_reading as reading
from bamba_reference.errors import ConfigError, repr_short

KEYS = frozenset(
    """
    d_model n_layer d_intermediate ssm_cfg attn_layer_idx rms_norm pad_vocab_size_multiple tie_embeddings d_inner
    """.split()
)

# What attention layers would be like, of which there are none, and how kernels are fused.
INERT = frozenset({"attn_cfg", "fused_add_norm"})

_SSM_INERT = frozenset(
    """
    layer dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path use_mem_eff_path A_init_range conv_init
    chunk_size sequence_parallel
    """.split()
)

# Choices that are not implemented, each with the value that stands for the usual.
_SSM_FIXED = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}


@dataclass(frozen=True)
class Spellings:
    """A configuration whose keys may have two names. ``original``: it has none of transformers' names."""

    hf: Mapping[str, Any]
    ssm_cfg: Mapping[str, Any]
    original: bool

    def top(self, key: str, other: str) -> tuple[Mapping[str, Any], str]:
        """Where a value stands, transformers' ``key`` or state-spaces' ``other``: for ``reading``'s functions."""
        return self._one((self.hf, key), (self.hf, other))

    def ssm(self, key: str, other: str) -> tuple[Mapping[str, Any], str]:
        """The same for a value that state-spaces keeps in ``ssm_cfg``."""
        return self._one((self.hf, key), (self.ssm_cfg, other))

    def vocab_size(self) -> int:
        """Rows of the embedding, which state-spaces' code rounds up and transformers' takes as it stands."""
        size = reading.vocab_size(self.hf)
        multiple = reading.integer(self.hf, "pad_vocab_size_multiple", default=8, most=2**16)
        return -(-size // multiple) * multiple if self.original else size

    @staticmethod
    def _one(*places: tuple[Mapping[str, Any], str]) -> tuple[Mapping[str, Any], str]:
        given = [(values, key) for values, key in places if values.get(key) is not None]
        if len(given) == 2 and given[0][0][given[0][1]] != given[1][0][given[1][1]]:
            raise ConfigError(
                f"{given[0][1]} and {given[1][1]} are two names of one thing and differ",
                found=" and ".join(repr_short(values[key]) for values, key in given),
                expected="the same value, or one of them alone",
            )
        return given[0] if given else places[0]


def spellings(
    hf: Mapping[str, Any], layer: str, ssm_keys: Collection[str], ignore: Collection[str]
) -> Spellings:
    """Check what only state-spaces says and nothing here implements: ``layer`` is the family's name in ``ssm_cfg``.

    ``ssm_keys`` are those of ``ssm_cfg`` that the family reads.
    """
    ssm_cfg = hf.get("ssm_cfg")
    ssm_cfg = {} if ssm_cfg is None else ssm_cfg
    if not isinstance(ssm_cfg, Mapping):
        raise reading.unsupported("ssm_cfg", ssm_cfg, "an object")
    if hf.get("rms_norm") not in (None, True):
        raise reading.unsupported("rms_norm", hf["rms_norm"], "true (LayerNorm is not implemented)")
    if hf.get("d_intermediate") not in (None, 0):
        raise reading.unsupported("d_intermediate", hf["d_intermediate"], "0 (no feed-forward network)")
    if hf.get("attn_layer_idx") not in (None, []):
        raise reading.unsupported("attn_layer_idx", hf["attn_layer_idx"], "[] (no attention layers)")
    if ssm_cfg.get("layer", layer) != layer:
        raise reading.unsupported("ssm_cfg.layer", ssm_cfg["layer"], layer)
    for key, usual in _SSM_FIXED.items():
        if ssm_cfg.get(key, usual) is not usual:
            raise reading.unsupported(f"ssm_cfg.{key}", ssm_cfg[key], str(usual).lower())
    known = {*ssm_keys, *_SSM_INERT, *_SSM_FIXED, *ignore}
    for key, value in ssm_cfg.items():
        if key not in known and value is not None:
            raise reading.unsupported(f"ssm_cfg.{key}", value, f"one of {', '.join(sorted(ssm_keys))}")
    return Spellings(hf, ssm_cfg, original="d_model" in hf and "hidden_size" not in hf)
