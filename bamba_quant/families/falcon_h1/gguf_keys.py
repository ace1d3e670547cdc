"""The GGUF keys of Falcon-H1, ``falcon-h1`` in llama.cpp (src/models/falcon-h1.cpp)."""

from __future__ import annotations

import math

from bamba_quant.checkpoint.gguf_values import KeyValues, float32, uint32
from bamba_quant.errors import ArchitectureError
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.falcon_h1.hf_config import layers
from bamba_quant.families.falcon_h1.rules import multipliers
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config

# llama.cpp has no such keys and passes them over. A file without them has weights that are a checkpoint's times
# multipliers that it does not name.
_MULTIPLIER = "multiplier."


def write(config: Config) -> Metadata:
    """What llama.cpp reads for ``falcon-h1`` (falcon-h1.cpp, ``load_arch_hparams``), and the folded multipliers."""
    return {
        **shared.shape(config),
        "feed_forward_length": uint32(config.intermediate_size),
        **shared.attention(config),
        "attention.head_count_kv": uint32(config.num_key_value_heads),
        "rope.dimension_count": uint32(config.rotary_dim),
        **shared.mamba2(config),
        **{f"{_MULTIPLIER}{name}": float32(value) for name, value in multipliers(config).items()},
    }


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graph cannot represent; return what its weights lose."""
    limitations.check(
        (
            *limitations.mixer(config),
            *limitations.common(config),
            ("projectors_bias", config.mamba_out_bias, not config.mamba_out_bias, "false"),
            (
                "attention_bias",
                config.attention_bias,
                not config.attention_bias,
                "false (its graph does not add the bias of attention's output)",
            ),
        )
    )
    inexact = [name for name, value in multipliers(config).items() if math.frexp(value)[0] != 0.5]
    if not inexact:
        return ()
    return (
        f"the weights are multiplied by the model's multipliers ({', '.join(inexact)}: not powers of two); "
        "in f16 and bf16 that rounds them once more",
    )


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; biases show in tensor names. Raises ``ArchitectureError`` for missing keys."""
    reader = shared.Reader(values, tensors)
    fork = reader.key("ssm.has_mup")
    if fork in values:
        raise ArchitectureError(
            "the file is for the fork of llama.cpp that ran Falcon-H1 first, which multiplied activations",
            where=values.file,
            found=fork,
            expected="multipliers in the weights",
            fix="convert the original checkpoint",
        )
    attention = reader.attention()
    found = {name: reader.positive(_MULTIPLIER + name, 1.0) for name in _NAMES}
    return Config(
        **reader.shape(),
        intermediate_size=reader.count("feed_forward_length"),
        **attention | {"layers": layers(reader.blocks())},
        rotary_dim=reader.rotary_dim(attention["head_dim"]),
        mlp_bias=reader.has_bias("ffn_up"),
        **reader.mamba2(expands=False),
        projectors_bias=False,
        mamba_rms_norm=any(name.endswith("ssm_norm.weight") for name in tensors),
        embedding_multiplier=found["embedding"],
        logits_scaling=1 / found["head"],
        attention_in_multiplier=found["attention_in"],
        attention_out_multiplier=found["attention_out"],
        key_multiplier=found["key"],
        ssm_in_multiplier=found["ssm_in"],
        ssm_out_multiplier=found["ssm_out"],
        ssm_multipliers=tuple(found[f"ssm_{section}"] for section in ("z", "x", "B", "C", "dt")),
        mlp_multipliers=(found["ffn_gate"], found["ffn_down"]),
    )


_NAMES = (
    "embedding head attention_in attention_out key ssm_in ssm_out ssm_z ssm_x ssm_B ssm_C ssm_dt ffn_gate ffn_down"
).split()
