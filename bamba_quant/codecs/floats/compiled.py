"""F16 and BF16 on lanes: the compiled version of ``floats``, sixteen neighbouring weights at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import to_half
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import LANES, bits_of, load, store_words
from bamba_quant.codecs.compiled.tiles import scratch, word_scratch


def _f16(x: Any, importance: Any, out: Any) -> None:
    source, target = x.reshape(-1), out.reshape(-1).view(np.uint16)
    whole = source.size // LANES
    for i in range(whole):
        store_words(target, i, to_half(load(source, i)))
    rest, words = _rest(source)
    store_words(words, 0, to_half(load(rest, 0)))
    target[whole * LANES :] = words[0, : source.size - whole * LANES]


def _bf16(x: Any, importance: Any, out: Any) -> None:
    source, target = x.reshape(-1), out.reshape(-1).view(np.uint16)
    whole = source.size // LANES
    for i in range(whole):
        store_words(target, i, _bfloat16_bits(load(source, i)))
    rest, words = _rest(source)
    store_words(words, 0, _bfloat16_bits(load(rest, 0)))
    target[whole * LANES :] = words[0, : source.size - whole * LANES]


@inlined
def _bfloat16_bits(v: Any) -> Any:
    """Bits of v as bfloat16: half an ulp less one, plus the last kept bit, carries where even rounds up."""
    bits = bits_of(v)
    return (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16


@inlined
def _rest(source: Any) -> Any:
    """What sixteens leave over, padded with 0, and room for its words."""
    rest = scratch(1)
    rest[:] = 0
    whole = source.size // LANES * LANES
    for i in range(whole, source.size):
        rest[0, i - whole] = source[i]
    return rest, word_scratch(1)


KERNELS = {"f16": _f16, "bf16": _bf16}
