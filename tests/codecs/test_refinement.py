"""Refined scales: never a greater error, the same for any cut of the rows, and what is stored is what was weighed."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.codecs import BlockCodec, codec_named, codecs
from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.compiled.refinement import refine
from bamba_quant.codecs.fields import FieldLayout

# Of what ggml's search leaves, on weights of a normal distribution and importance of a chi-squared one.
LEFT = {
    "q2_k": 0.95, "q3_k": 0.99, "q4_k": 0.97, "q5_k": 0.93, "q6_k": 0.94, "q8_0": 0.9, "q4_0": 0.99, "q4_1": 0.99,
    "q5_0": 0.98, "q5_1": 0.98, "iq4_nl": 0.99, "iq4_xs": 0.98,
}  # fmt: skip


def errors(codec: BlockCodec, packed: U8, x: F32, importance: F32) -> F32:
    """Of each block, by gguf-py's own dequantization."""
    kind = gguf.GGMLQuantizationType(codec.ggml_type)
    blocks = x.astype(np.float64).reshape(-1, codec.block_size)
    rest = gguf.dequantize(packed, kind).reshape(blocks.shape) - blocks
    weights = np.broadcast_to(importance, x.shape).reshape(blocks.shape)
    if codec.name in ("q2_k", "q3_k"):
        weights = weights * np.sqrt(2 * np.square(blocks).mean(1, keepdims=True) + blocks**2)
    found: F32 = (rest**2 * weights).sum(1)
    return found


def layout_of(codec: BlockCodec) -> FieldLayout:
    assert codec.fields is not None
    return codec.fields


def rows(seed: int, count: int = 24) -> tuple[F32, F32]:
    draw = np.random.default_rng(seed)
    importance = draw.chisquare(1, 512).astype(np.float32)
    return draw.standard_normal((count, 512)).astype(np.float32), importance


def test_which_codecs_have_scales_to_move() -> None:
    assert {each.name for each in codecs(BlockCodec) if each.has_method("refine")} >= LEFT.keys()


@pytest.mark.parametrize("name", LEFT)
def test_less_is_lost_in_every_block(name: str) -> None:
    codec = codec_named(name, BlockCodec)
    x, importance = rows(0)
    packed = codec.quantizer()(x, importance)
    refined = codec.quantizer("refine")(x, importance)
    before, after = (errors(codec, each, x, importance) for each in (packed, refined))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < LEFT[name] * before.sum()
    parts = [
        refine(layout_of(codec), packed[i : i + 5], x[i : i + 5], importance) for i in range(0, len(x), 5)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), refined)


@given(st.sampled_from(sorted(LEFT)), st.integers(0, 1000), st.floats(-30, 12), st.booleans())
@settings(max_examples=40, deadline=None)
def test_never_worse_whatever_the_weights(name: str, seed: int, power: float, weighted: bool) -> None:
    """Tiny and great ones, outliers, zeros and constant rows; without importance all errors count alike."""
    codec = codec_named(name, BlockCodec)
    x, importance = rows(seed, 4)
    x *= np.float32(2.0**power)
    x[0] = 0
    x[1] = x[1, 0]
    x[2, ::37] *= 50
    weights = importance if weighted else np.ones_like(importance)
    packed = codec.quantizer()(x, importance if weighted else None)
    refined = refine(layout_of(codec), packed, x, importance if weighted else None)
    before, after = (errors(codec, each, x, weights) for each in (packed, refined))
    finite = np.isfinite(before)  # ggml's own minima overflow in float16, too
    assert np.isfinite(after[finite]).all()
    assert (after <= before * (1 + 1e-4) + 1e-30)[finite].all()
