"""Bamba: Mamba-2 and attention layers with a partial rotary embedding, which llama.cpp runs as ``granitehybrid``.

Sources of the names: transformers' modeling_bamba.py; gguf-py's tensor_mapping.py.
"""

from bamba_quant.families.bamba import gguf_keys, hf_config
from bamba_quant.families.bamba.cases import SMALL_MODELS
from bamba_quant.families.gguf_keys import is_granite
from bamba_quant.families.registry import Family, register
from bamba_quant.families.runtime_compat import (
    ATTENTION_INPUTS,
    MERGED_ATTENTION,
    MERGED_FEED_FORWARD,
    MERGED_MIXER,
    Loaders,
)
from bamba_quant.families.shared_rules import ATTENTION, EMBEDDINGS, FEED_FORWARD_NORM, MAMBA2, MLP

BAMBA = register(
    Family(
        name="bamba",
        hf_architectures=("BambaForCausalLM",),
        gguf_architectures=("granitehybrid",),
        rules=(*EMBEDDINGS, *MAMBA2, *ATTENTION, FEED_FORWARD_NORM, *MLP),
        hf_schema=hf_config.SCHEMA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        reads_gguf=lambda values: not is_granite(values),
        # vLLM's class wrongly lists down_proj as a part of gate_up_proj (bamba.py, packed_modules_mapping).
        loaders=Loaders(
            vllm={".mamba.": ".mixer.", ".self_attn.": "."},
            units=(ATTENTION_INPUTS, frozenset({"ffn_gate", "ffn_up", "ffn_down"})),
            merged=(MERGED_ATTENTION, MERGED_MIXER, *MERGED_FEED_FORWARD),
        ),
        small_models=SMALL_MODELS,
    )
)
