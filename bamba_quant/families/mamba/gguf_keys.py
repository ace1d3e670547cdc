"""The GGUF keys of Mamba and FalconMamba, both ``mamba`` in llama.cpp (src/models/mamba.cpp)."""

from __future__ import annotations

from bamba_quant.checkpoint.gguf_values import KeyValues, boolean, float32
from bamba_quant.families import gguf_keys as shared
from bamba_quant.families import limitations
from bamba_quant.families.mamba.rules import epsilon_exponent
from bamba_quant.families.rules import Metadata, Tensors
from bamba_reference.config import Config

_NORMED = "ssm.dt_b_c_rms"
# llama.cpp has no such key and passes it over; a file without it has ssm_x as the checkpoint has it.
_NORMED_EPSILON = "ssm.dt_b_c_rms_epsilon"


def is_falcon(values: KeyValues) -> bool:
    return values.flag(f"{shared.gguf_architecture_of(values)}.{_NORMED}") or False


def write(config: Config) -> Metadata:
    """What llama.cpp reads for ``mamba`` (mamba.cpp, ``load_arch_hparams``; llama-model.cpp)."""
    written = {
        **shared.shape(config),
        **shared.NO_ATTENTION,
        **shared.mamba1(config),
        _NORMED: boolean(config.mixer_rms_eps is not None),
    }
    return written | ({_NORMED_EPSILON: float32(config.mixer_rms_eps)} if config.mixer_rms_eps else {})


def check(config: Config) -> tuple[str, ...]:
    """Raise ``ArchitectureError`` for what llama.cpp's graph cannot represent; return what it computes differently."""
    limitations.check(
        (limitations.expansion(config), *limitations.mixer(config), *limitations.common(config))
    )
    if config.mixer_rms_eps in (None, config.rms_norm_eps):
        return ()
    exponent = epsilon_exponent(config)
    return (
        f"llama.cpp norms dt, B and C with the model's epsilon, {config.rms_norm_eps:g}, and not with the mixer's, "
        f"{config.mixer_rms_eps:g}; ssm_x is stored times 2^{exponent}, under which it acts like "
        f"{config.rms_norm_eps / 4**exponent:.3g}",
    )


def read(values: KeyValues, tensors: Tensors) -> Config:
    """``write`` inverted; biases show in tensor names. Raises ``ArchitectureError`` for missing shared."""
    reader = shared.Reader(values, tensors)
    shape = reader.shape()
    return Config(
        **shape,
        **reader.layers("mamba1"),
        **reader.mamba1(),
        residual_in_fp32=True,
        mixer_rms_eps=reader.positive(_NORMED_EPSILON, shape["rms_norm_eps"]) if is_falcon(values) else None,
    )
