"""Mamba-2 (transformers', Codestral-Mamba's and state-spaces' own checkpoints), which llama.cpp runs as ``mamba2``.

Sources: transformers' modeling_mamba2.py, mamba_ssm's mixer_seq_simple.py and mistral's names for the left-hand
side; llama.cpp's src/models/mamba2.cpp and gguf-py's tensor_mapping.py for the right-hand one.
"""

from __future__ import annotations

from typing import Any

from bamba_quant.families import keys
from bamba_quant.families import limitations as refusals
from bamba_quant.families.gguf_reader import Reader
from bamba_quant.families.rows import EMBEDDINGS, MAMBA2, MIXER_DIALECTS
from bamba_quant.families.rules import Architecture, Metadata, Tensors, Values, register, spelled
from bamba_quant.families.runtime_compat import MERGED_MIXER, Loaders
from bamba_reference.config import Config


def _gguf_metadata(config: Config) -> Metadata:
    """What llama.cpp reads for ``mamba2`` (mamba2.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    return {**keys.shape(config), **keys.NO_ATTENTION, **keys.mamba2(config)}


def _check_gguf(config: Config) -> tuple[str, ...]:
    """What llama.cpp's graph for ``mamba2`` has no place for. Raises ``ArchitectureError``."""
    refusals.refuse((*refusals.mixer(config), *refusals.common(config)))
    return ()


def _config_of_gguf(values: Values, tensors: Tensors) -> Config:
    """``_gguf_metadata`` read back; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    read = Reader(values, tensors)
    return Config(
        **read.shape(),
        **keys.ONLY_MIXERS,
        **read.layers("mamba"),
        **read.mamba2(),
    )


def _hf_config(config: Config) -> dict[str, Any]:
    """config.json in the keys of transformers 4 and 5 (configuration_mamba2.py)."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **keys.hf_mixers(config),
        "num_heads": config.mamba_n_heads,
        "head_dim": config.mamba_d_head,
        "n_groups": config.mamba_n_groups,
    }


MAMBA2_MODEL = register(
    Architecture(
        name="mamba2",
        hf_architectures=("Mamba2ForCausalLM",),
        gguf_architectures=("mamba2",),
        rules=spelled(EMBEDDINGS + MAMBA2, *MIXER_DIALECTS),
        gguf_metadata=_gguf_metadata,
        check_gguf=_check_gguf,
        config_of_gguf=_config_of_gguf,
        hf_config=_hf_config,
        loaders=Loaders(vllm={}, merged=(MERGED_MIXER,), initialized=frozenset({"ssm_out"})),
    )
)
