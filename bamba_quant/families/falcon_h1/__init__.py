"""Falcon-H1: Mamba-2 beside attention in every layer, with multipliers, which llama.cpp runs as ``falcon-h1``."""

from bamba_quant.families.falcon_h1 import gguf_keys, hf_config
from bamba_quant.families.falcon_h1.cases import SMALL_MODELS
from bamba_quant.families.falcon_h1.rules import RULES
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
        name="falcon_h1",
        hf_architectures=("FalconH1ForCausalLM",),
        gguf_architectures=("falcon-h1",),
        rules=RULES,
        hf_schema=hf_config.SCHEMA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        # vLLM's falcon_h1.py, FalconH1ParallelHybrid: mixers are named as if they were layers after the last.
        loaders=Loaders(
            vllm={"layers.{i}.mamba.": "{beside}.mixer.", ".self_attn.": "."},
            units=(ATTENTION_INPUTS, frozenset({"ffn_gate", "ffn_up"})),
            merged=(MERGED_ATTENTION, MERGED_MIXER, *MERGED_FEED_FORWARD),
        ),
        small_models=SMALL_MODELS,
    )
)
