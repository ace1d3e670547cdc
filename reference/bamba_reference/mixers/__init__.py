"""The kinds of layers by the names that ``Config.layer_types`` gives them; a new kind is registered here."""

from bamba_reference.config import LayerType
from bamba_reference.mixers.attention import ATTENTION
from bamba_reference.mixers.base import Memory, Mixer, Scan, Sequence, Shape, linear_shapes
from bamba_reference.mixers.mamba1 import MAMBA1
from bamba_reference.mixers.mamba2 import MAMBA2

MIXERS: dict[LayerType, Mixer] = {"attention": ATTENTION, "mamba": MAMBA2, "mamba1": MAMBA1}

__all__ = ["MIXERS", "Memory", "Mixer", "Scan", "Sequence", "Shape", "linear_shapes"]
