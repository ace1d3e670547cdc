"""FP8: every code is the nearest there is under its stored scale, and a searched scale never does worse."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.codecs import SafetensorsCodec, codec_named, codecs
from bamba_quant.codecs.fp8 import codes, spread
from bamba_quant.codecs.fp8.scales import (
    CANDIDATES,
    SMALLEST_SCALE,
    as_bfloat16,
    of_largest,
    scale_of_candidate,
)
from tests.codecs.test_safetensors import drawn, encoded, importance
from tests.support.quantized import read_back

FP8 = [scheme for scheme in codecs(SafetensorsCodec) if scheme.name.startswith("fp8")]
EVERY = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
VALUES = np.unique(EVERY[np.isfinite(EVERY)])
TILES = {"fp8-dynamic": (1, 0), "fp8-block": (128, 128), "fp8-block-inv": (128, 128)}


def scales_of(scheme: SafetensorsCodec, parts: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The stored scale of every weight."""
    (suffix,) = (suffix for suffix in parts if suffix != ".weight")
    scales = parts[suffix].astype(np.float32)
    if scheme.name in TILES:
        scales = spread(scales, TILES[scheme.name], *shape)
    return np.broadcast_to(scales, shape)


@pytest.mark.parametrize("method", ["search", "absmax"])
@pytest.mark.parametrize("scheme", FP8, ids=lambda scheme: scheme.name)
def test_each_code_is_the_nearest(scheme: SafetensorsCodec, method: str) -> None:
    shape = (256, 256)
    x = drawn(shape, seed=3)
    parts = encoded(scheme, scheme.method(method), x, None, shape[0], compiled=True)
    scales = scales_of(scheme, parts, shape)
    assert (scales == as_bfloat16(scales)).all()
    assert (scales >= SMALLEST_SCALE).all()
    quotient = (x / scales).astype(np.float64)
    above = np.searchsorted(VALUES, quotient).clip(1, len(VALUES) - 1)
    half_step = (VALUES[above] - VALUES[above - 1]) / 2
    stored = parts[".weight"].astype(np.float64)
    beyond = np.abs(quotient) > 448
    assert (np.abs(stored - quotient) <= half_step)[~beyond].all()
    assert (np.abs(stored) == 448)[beyond].all()
    # Only rounding a scale to bfloat16 lets a magnitude exceed 448, and by less than half a step of codes.
    assert np.abs(quotient).max() <= 448 * (1 + 2**-8)
    # Loaders multiply in the scales' own type.
    product = stored.astype(np.float32) * scales
    exact = scheme.name == "fp8-block-inv"
    np.testing.assert_array_equal(read_back(scheme, parts, shape), product if exact else as_bfloat16(product))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=40))
def test_codes_are_those_of_torch(values: list[float]) -> None:
    x = np.array([values], np.float32)
    expected = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert codes(x, np.float32(1)).tobytes() == expected.view(torch.uint8).numpy().tobytes()
    compiled = codec_named("fp8-tensor", SafetensorsCodec).method().compiled
    assert compiled is not None
    found = compiled()(x, None, np.ones(1, np.float32))[".weight"]
    assert found.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", FP8, ids=lambda scheme: scheme.name)
def test_search_finds_the_least_error(scheme: SafetensorsCodec, weighted: bool) -> None:
    """Compared with absmax, and with every bfloat16 scale of an octave."""
    shape = (256, 256)
    x = np.random.default_rng(5).standard_t(4, shape).astype(ml_dtypes.bfloat16).astype(np.float32)
    weights = importance(shape[1]) if weighted else None
    each = np.ones(shape[1]) if weights is None else weights.astype(np.float64)

    def error(parts: dict[str, np.ndarray]) -> np.ndarray:
        product = parts[".weight"].astype(np.float64) * scales_of(scheme, parts, shape)
        squared = np.square(product - x) * each
        if scheme.name == "fp8-tensor":
            return squared.sum()
        height, width = (1, 256) if scheme.name == "fp8-dynamic" else (128, 128)
        return squared.reshape(256 // height, height, 256 // width, width).sum((1, 3))

    found = error(encoded(scheme, scheme.method("search"), x, weights, 256, compiled=True))
    assert (
        found <= error(encoded(scheme, scheme.method("absmax"), x, None, 256, compiled=True)) * (1 + 1e-9)
    ).all()
    scales = scales_of(
        scheme, encoded(scheme, scheme.method("search"), x, weights, 256, compiled=True), shape
    )
    exponent = np.frexp(scales)[1]
    for candidate in range(CANDIDATES):
        other = np.ldexp(np.float32(0.5) + np.float32(candidate) / (2 * CANDIDATES), exponent)
        back = codes(x, other).astype(np.float64) * other
        squared = np.square(back - x) * each
        height, width = {"fp8-tensor": (256, 256), "fp8-dynamic": (1, 256)}.get(scheme.name, (128, 128))
        tried = squared.reshape(256 // height, height, 256 // width, width).sum((1, 3))
        assert (found <= tried * (1 + 1e-4) + 1e-12).all(), candidate


@settings(max_examples=200, deadline=None)
@given(st.integers(0, CANDIDATES - 1), st.floats(2.0**-100, 2.0**100, width=32))
def test_scales_just_avoid_saturation(candidate: int, largest: float) -> None:
    amax = np.array([largest], np.float32)
    scale = scale_of_candidate(np.array([candidate]), amax)
    assert np.float64(amax[0]) / np.float64(scale[0]) <= 448
    assert np.float64(amax[0]) / np.float64(scale[0]) > 224
    assert (scale == as_bfloat16(scale)).all()


def test_scales_of_zeros_and_of_the_smallest() -> None:
    assert of_largest(np.zeros(1, np.float32)) == 1
    assert scale_of_candidate(np.array([3]), np.zeros(1, np.float32)) == 1
    assert of_largest(np.full(1, 1e-40, np.float32)) == SMALLEST_SCALE


@pytest.mark.parametrize("scheme", FP8, ids=lambda scheme: scheme.name)
def test_absmax_is_what_llm_compressor_scales_by(scheme: SafetensorsCodec) -> None:
    x = drawn((256, 256), seed=6).astype(ml_dtypes.bfloat16).astype(np.float32)
    scales = scales_of(scheme, encoded(scheme, scheme.method("absmax"), x, None, 256, compiled=True), x.shape)
    height, width = TILES.get(scheme.name, (256, 256))
    tiles = np.abs(x).reshape(256 // height, height, 256 // (width or 256), width or 256).max((1, 3))
    expected = torch.from_numpy(tiles) / 448
    expected = torch.where(expected > 0, expected.clamp(min=2.0**-126), 1).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(scales[::height, :: width or 256], expected)
