"""How a matrix is stored: one package a codec, or a few that share code, each with its list ``CODECS``."""

import sys

from bamba_quant.codecs.base import Codec, Method, Part
from bamba_quant.codecs.blocks import BlockCodec
from bamba_quant.codecs.registry import codec_named, codecs, register, register_package
from bamba_quant.codecs.safetensors import Ignored, SafetensorsCodec

register_package(sys.modules[__name__])

__all__ = [
    "BlockCodec",
    "Codec",
    "Ignored",
    "Method",
    "Part",
    "SafetensorsCodec",
    "codec_named",
    "codecs",
    "register",
    "register_package",
]
