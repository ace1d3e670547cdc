"""The kinds of layers in torch by the names that ``Config.layer_types`` gives them; a new kind is registered here."""

from bamba_reference.config import LayerType
from bamba_reference.torch.mixers.attention import ATTENTION, AttentionState
from bamba_reference.torch.mixers.base import LayerWeights, MambaState, Model, Sequences, TorchMixer
from bamba_reference.torch.mixers.mamba1 import MAMBA1
from bamba_reference.torch.mixers.mamba2 import MAMBA2

TORCH_MIXERS: dict[LayerType, TorchMixer] = {"attention": ATTENTION, "mamba": MAMBA2, "mamba1": MAMBA1}

__all__ = [
    "TORCH_MIXERS",
    "AttentionState",
    "LayerWeights",
    "MambaState",
    "Model",
    "Sequences",
    "TorchMixer",
]
