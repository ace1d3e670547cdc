"""Mamba-2: transformers', Codestral-Mamba's and state-spaces' own checkpoints, which llama.cpp runs as ``mamba2``.

Sources of the names: transformers' modeling_mamba2.py, mamba_ssm's mixer_seq_simple.py and mistral's checkpoints;
gguf-py's tensor_mapping.py.
"""

from bamba_quant.families.mamba2 import gguf_keys, hf_config
from bamba_quant.families.mamba2.cases import SMALL_MODELS
from bamba_quant.families.registry import Family, register
from bamba_quant.families.rules import renamed
from bamba_quant.families.runtime_compat import MERGED_MIXER, Loaders
from bamba_quant.families.shared_rules import EMBEDDINGS, MAMBA2, MIXER_NAMES

register(
    Family(
        name="mamba2",
        hf_architectures=("Mamba2ForCausalLM",),
        state_spaces_layer="Mamba2",
        gguf_architectures=("mamba2",),
        rules=renamed(EMBEDDINGS + MAMBA2, *MIXER_NAMES),
        hf_schema=hf_config.SCHEMA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        loaders=Loaders(vllm={}, merged=(MERGED_MIXER,), initialized=frozenset({"ssm_out"})),
        small_models=SMALL_MODELS,
    )
)
