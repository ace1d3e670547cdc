"""The blocks of layers by the names that ``Config.layers`` gives them; a new block is registered here."""

from bamba_reference.config import Block
from bamba_reference.mixers.attention import ATTENTION
from bamba_reference.mixers.base import Memory, Mixer, Scan, Sequence, Shape, linear_shapes
from bamba_reference.mixers.feed_forward import MLP, MOE
from bamba_reference.mixers.mamba1 import MAMBA1
from bamba_reference.mixers.mamba2 import MAMBA2

MIXERS: dict[Block, Mixer] = {
    "attention": ATTENTION,
    "mamba2": MAMBA2,
    "mamba1": MAMBA1,
    "mlp": MLP,
    "moe": MOE,
}

__all__ = ["MIXERS", "Memory", "Mixer", "Scan", "Sequence", "Shape", "linear_shapes"]
