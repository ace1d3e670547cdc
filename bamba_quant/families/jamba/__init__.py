"""Jamba: Mamba's selective scan with norms on dt, B and C, attention without rotary embedding, and experts."""

from bamba_quant.families import runtime_compat
from bamba_quant.families.jamba import gguf_keys, hf_config
from bamba_quant.families.jamba.cases import SMALL_MODELS
from bamba_quant.families.jamba.rules import EXPERTS, RULES
from bamba_quant.families.registry import Family, register
from bamba_quant.families.runtime_compat import Loaders

register(
    Family(
        name="jamba",
        hf_architectures=("JambaForCausalLM",),
        gguf_architectures=("jamba",),
        rules=RULES,
        hf_schema=hf_config.SCHEMA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        # vLLM's MambaMixer makes every layer without a quantization (layers/mamba/mamba_mixer.py).
        loaders=Loaders(vllm=None, units=(runtime_compat.EXPERTS,), experts=(EXPERTS,)),
        small_models=SMALL_MODELS,
    )
)
