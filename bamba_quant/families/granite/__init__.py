"""Granite 4.0, dense or with experts: ``granitehybrid`` where it has Mamba-2 layers, else ``granite(moe)``."""

from bamba_quant.families.gguf_keys import is_granite
from bamba_quant.families.granite import gguf_keys, hf_config
from bamba_quant.families.granite.cases import SMALL_MODELS
from bamba_quant.families.granite.rules import EXPERTS, RULES
from bamba_quant.families.registry import Family, register
from bamba_quant.families.runtime_compat import (
    ATTENTION_INPUTS,
    MERGED_ATTENTION,
    MERGED_FEED_FORWARD,
    MERGED_MIXER,
    Loaders,
)

register(
    Family(
        name="granitemoehybrid",
        hf_architectures=("GraniteMoeHybridForCausalLM",),
        gguf_architectures=(gguf_keys.HYBRID, gguf_keys.DENSE, gguf_keys.EXPERTS),
        gguf_name=gguf_keys.gguf_architecture,
        rules=RULES,
        hf_schema=hf_config.SCHEMA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        reads_gguf=is_granite,
        # vLLM's granitemoehybrid.py; transformers' modeling_granitemoehybrid.py calls the experts by the first of
        # these names, and so did vLLM before they were a layer of their own.
        loaders=Loaders(
            vllm={".mamba.": ".mixer."},
            units=(ATTENTION_INPUTS,),
            merged=(MERGED_ATTENTION, MERGED_MIXER, *MERGED_FEED_FORWARD),
            experts=(EXPERTS + "experts", EXPERTS + "experts.routed_experts"),
        ),
        small_models=SMALL_MODELS,
    )
)
