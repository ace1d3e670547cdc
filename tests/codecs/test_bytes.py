"""Every format, in numpy and compiled, writes ggml's bytes and reads its numbers."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bamba_quant.codecs import BlockCodec, codec_named, codecs
from bamba_quant.codecs.arrays import F32
from tests.codecs.inputs import COLUMNS, importances, weights
from tests.support import ggml

WRITABLE = [codec for codec in codecs(BlockCodec) if codec.writable]
VERSIONS = {"numpy": False, "compiled": True}

every_format = pytest.mark.parametrize("codec", codecs(BlockCodec), ids=lambda f: f.name)
every_writable = pytest.mark.parametrize("codec", WRITABLE, ids=lambda f: f.name)


def test_the_formats_of_llama_quantize_are_writable() -> None:
    names = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs tq1_0 tq2_0 mxfp4"
    assert {codec.name for codec in WRITABLE} >= set(names.split())


@every_format
def test_geometry_is_ggufs(codec: BlockCodec) -> None:
    assert (codec.block_size, codec.block_bytes) == GGML_QUANT_SIZES[codec.ggml_type]
    assert codec.ggml_type == GGMLQuantizationType[codec.name.upper()]


@every_writable
@pytest.mark.parametrize("importance", importances())
def test_bytes_are_ggmls(codec: BlockCodec, importance: str) -> None:
    weight = importances()[importance]
    for name, x in weights().items():
        expected = ggml.quantize(codec, x, weight)
        for version, compiled in VERSIONS.items():
            found = codec.quantizer(compiled=compiled)(x, weight)
            wrong = np.flatnonzero(found != expected)
            assert not wrong.size, f"{version}, {name}: {wrong.size} bytes of {found.size} differ"


@st.composite
def rows_of_weights(draw: st.DrawFn) -> tuple[F32, F32 | None]:
    """One to three rows of one or two blocks of 256: any finite bits, or any texture at any scale."""
    shape = draw(st.integers(1, 3)), 256 * draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
        x = (
            np.where(bits & 0x7F800000 == 0x7F800000, bits & 0xFF7FFFFF, bits)
            .astype(np.uint32)
            .view(np.float32)
        )
    else:
        values = draw(arrays.arrays(np.float32, 8, elements=st.floats(-2, 2, width=32)))
        texture = rng.choice(values, shape) + draw(st.sampled_from((0, 0.01, 1))) * rng.normal(size=shape)
        x = np.ldexp(texture, draw(st.integers(-140, 120))).astype(np.float32)
    if draw(st.booleans()):
        return x, None
    exponent = draw(st.integers(-40, 40))
    return x, np.ldexp(np.maximum(rng.random(shape[1]) - draw(st.floats(0, 1)), 0), exponent).astype(
        np.float32
    )


@every_writable
@settings(max_examples=40, deadline=None)
@given(rows_of_weights())
def test_bytes_are_ggmls_for_any_weights(codec: BlockCodec, rows: tuple[F32, F32 | None]) -> None:
    expected = ggml.quantize(codec, *rows)
    for version, compiled in VERSIONS.items():
        np.testing.assert_array_equal(codec.quantizer(compiled=compiled)(*rows), expected, err_msg=version)


def test_mxfp4_rounds_the_logarithm_as_c_does() -> None:
    """Just below a power of two log2f may return that power; how far below differs from power to power."""
    power = np.ldexp(np.float32(1), np.arange(-148, 128))
    below = power.view(np.int32)[:, None] - np.array([0, 1, 2, 3, 5, 6, 11, 12, 22, 23, 44, 45, 46])
    x = np.zeros((below.size, 32), np.float32)
    x[:, 5] = np.maximum(below, 1).astype(np.int32).view(np.float32).ravel()
    mxfp4 = codec_named("mxfp4", BlockCodec)
    for compiled in VERSIONS.values():
        np.testing.assert_array_equal(mxfp4.quantizer(compiled=compiled)(x), ggml.quantize(mxfp4, x))


def _raw_rows(codec: BlockCodec) -> list[np.ndarray]:
    """Bytes as written, and bytes that no quantizer would write."""
    rng = np.random.default_rng(6)
    noise = rng.integers(0, 256, (64, codec.row_bytes(COLUMNS)), dtype=np.uint8)
    written = [codec.quantize(x, None) for x in weights().values()] if codec.writable else []
    return [*written, noise]


@every_format
def test_numbers_are_read_as_by_gguf_and_ggml(codec: BlockCodec) -> None:
    for raw in _raw_rows(codec):
        with np.errstate(all="ignore"):
            found = codec.dequantize(raw)
            theirs = gguf.quants.dequantize(raw, codec.ggml_type)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, theirs)
        if codec.name != "f32":
            np.testing.assert_array_equal(found, ggml.dequantize(codec, raw, COLUMNS))


@every_writable
def test_weights_up_to_max_abs_stay_finite(codec: BlockCodec) -> None:
    bound = np.float32(min(codec.max_abs, float(np.finfo(np.float32).max)))
    if float(bound) > codec.max_abs:
        bound = np.nextafter(bound, np.float32(0))
    for name, x in weights().items():
        x = x / (np.abs(x).max(axis=1, keepdims=True) + np.float32(1e-45))
        for x_bound in (bound * x, bound * np.sign(x), -bound * np.abs(x)):
            for importance in importances().values():
                quantized = codec.quantizer()(x_bound.astype(np.float32), importance)
                with np.errstate(all="ignore"):
                    read = codec.dequantize(quantized)
                assert np.isfinite(read).all(), name
