"""Mamba and FalconMamba: layers of the selective scan alone, which llama.cpp runs as ``mamba``."""

from dataclasses import replace

from bamba_quant.families.mamba import gguf_keys, hf_config
from bamba_quant.families.mamba.cases import FALCON_MAMBA_MODELS, MAMBA_MODELS
from bamba_quant.families.mamba.rules import RULES
from bamba_quant.families.registry import Family, register
from bamba_quant.families.runtime_compat import Loaders

MAMBA = register(
    Family(
        name="mamba",
        hf_architectures=("MambaForCausalLM",),
        state_spaces_layer="Mamba1",
        gguf_architectures=("mamba",),
        rules=RULES,
        hf_schema=hf_config.MAMBA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        reads_gguf=lambda values: not gguf_keys.is_falcon(values),
        # vLLM's MambaMixer makes every layer without a quantization (layers/mamba/mamba_mixer.py).
        loaders=Loaders(vllm=None, initialized=frozenset({"ssm_out"})),
        small_models=MAMBA_MODELS,
    )
)
FALCON_MAMBA = register(
    replace(
        MAMBA,
        name="falcon_mamba",
        hf_architectures=("FalconMambaForCausalLM",),
        state_spaces_layer=None,
        hf_schema=hf_config.FALCON_MAMBA,
        reads_gguf=gguf_keys.is_falcon,
        small_models=FALCON_MAMBA_MODELS,
    )
)
