"""The tensors of Mamba and FalconMamba.

Sources: transformers' modeling_mamba.py and modeling_falcon_mamba.py, mamba_ssm's mixer_seq_simple.py for the names
in checkpoints; gguf-py's tensor_mapping.py for those in GGUF.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bamba_quant.families.rules import renamed
from bamba_quant.families.shared_rules import EMBEDDINGS, MAMBA1, MIXER_NAMES
from bamba_quant.families.transforms import Transform, power_of_two
from bamba_reference.config import Config


def epsilon_exponent(config: Config) -> int:
    """k for which rows of x_proj times 2^k make llama.cpp's epsilon act like the mixer's own.

    llama.cpp norms dt, B and C with the model's epsilon e. Of rows times c, x c / sqrt(c^2 m + e) is what the norm
    of the rows themselves is under e / c^2; 2^2k comes within a factor of two of e over the mixer's epsilon. As
    GGUF keeps them, in float32.
    """
    if config.mixer_rms_eps is None:
        return 0
    ratio = np.float32(config.rms_norm_eps) / np.float32(config.mixer_rms_eps)
    return round(math.log2(ratio) / 2)


def _balanced(config: Config) -> Transform:
    return power_of_two(epsilon_exponent(config))


_MAMBA = tuple(replace(rule, transform=_balanced) if rule.role == "ssm_x" else rule for rule in MAMBA1)
RULES = renamed(EMBEDDINGS + _MAMBA, *MIXER_NAMES)
