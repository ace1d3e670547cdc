"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: one block a layer, in llama.cpp ``nemotron_h`` or ``nemotron_h_moe``.

A layer is Mamba-2, attention without a rotary embedding, a ReLU² network without a gate, or a mixture of such networks.
Sources: transformers' configuration_nemotron_h.py, modeling_nemotron_h.py and conversion_mapping.py; gguf-py's
tensor_mapping.py.
"""

from bamba_quant.families.nemotron_h import gguf_keys, hf_config
from bamba_quant.families.nemotron_h.cases import SMALL_MODELS
from bamba_quant.families.nemotron_h.rules import RULES
from bamba_quant.families.registry import Family, register
from bamba_quant.families.runtime_compat import (
    ATTENTION_INPUTS,
    EXPERTS,
    MERGED_ATTENTION,
    MERGED_MIXER,
    Loaders,
)

register(
    Family(
        name="nemotron_h",
        hf_architectures=("NemotronHForCausalLM",),
        gguf_architectures=(gguf_keys.DENSE, gguf_keys.EXPERTS),
        gguf_name=gguf_keys.gguf_architecture,
        rules=RULES,
        # Layers that predict further tokens, which transformers does not load either.
        left_out=("mtp.",),
        hf_schema=hf_config.SCHEMA,
        gguf_metadata=gguf_keys.write,
        check_gguf=gguf_keys.check,
        config_of_gguf=gguf_keys.read,
        # vLLM's nemotron_h.py.
        loaders=Loaders(
            vllm={"backbone.": "model."},
            units=(ATTENTION_INPUTS, EXPERTS),
            merged=(MERGED_ATTENTION, MERGED_MIXER),
            experts=("model.layers.{i}.mixer.experts", "model.layers.{i}.mixer.experts.routed_experts"),
            renamed=True,
        ),
        small_models=SMALL_MODELS,
    )
)
