"""The GGUF keys of Mamba-2, ``mamba2`` in llama.cpp (src/models/mamba2.cpp)."""

from __future__ import annotations

from bamba_quant.checkpoint.gguf_values import KeyValues
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config


def write(config: Config) -> Metadata:
    """What llama.cpp reads for ``mamba2`` (mamba2.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    return {**shared.shape(config), **shared.NO_ATTENTION, **shared.mamba2(config)}


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graph for ``mamba2`` cannot represent."""
    limitations.check((*limitations.mixer(config), *limitations.common(config)))
    return ()


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    reader = shared.Reader(values, tensors)
    return Config(**reader.shape(), **reader.layers("mamba2"), **reader.mamba2(), residual_in_fp32=True)
