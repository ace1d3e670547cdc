"""The blocks of layers in torch by the names that ``Config.layers`` gives them; a new block is registered here."""

from bamba_reference.config import Block
from bamba_reference.torch.mixers.attention import ATTENTION, AttentionState
from bamba_reference.torch.mixers.base import BatchTokens, LayerWeights, MambaState, Model, TorchMixer
from bamba_reference.torch.mixers.feed_forward import MLP, MOE, gated
from bamba_reference.torch.mixers.mamba1 import MAMBA1
from bamba_reference.torch.mixers.mamba2 import MAMBA2

TORCH_MIXERS: dict[Block, TorchMixer] = {
    "attention": ATTENTION,
    "mamba2": MAMBA2,
    "mamba1": MAMBA1,
    "mlp": MLP,
    "moe": MOE,
}

__all__ = [
    "TORCH_MIXERS",
    "AttentionState",
    "BatchTokens",
    "LayerWeights",
    "MambaState",
    "Model",
    "TorchMixer",
    "gated",
]
