"""Every safetensors codec: parts of the planned shape, the same for any cut of the rows, numpy and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.codecs import Method, SafetensorsCodec, codec_named, codecs, register
from bamba_quant.codecs.base import DTYPES, Parts
from bamba_quant.errors import FormatError
from tests.support.quantized import read_back

METHODS = [
    pytest.param(scheme, method, id=f"{scheme.name}-{method.name}")
    for scheme in codecs(SafetensorsCodec)
    for method in scheme.methods
]
SHAPES = [(256, 256), (300, 384), (7, 130)]


def drawn(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Normal weights with outliers, a row of zeros, signed zeros and some numbers that only float32 holds."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32) * np.float32(0.02)
    x *= rng.choice(np.float32([1, 1, 1, 1, 20, 1e-4, 0, -0.0]), shape)
    x[0] = 0
    x[-1, :2] = 1e-38, -1e-42
    return x


def importance(columns: int) -> np.ndarray:
    return np.random.default_rng(1).random(columns, np.float32) ** 4 + np.float32(1e-6)


def measured(method: Method, pieces: list[np.ndarray], weights: np.ndarray | None, compiled: bool) -> Any:
    if method.measure is None:
        return None
    measure = method.compiled_measure() if compiled and method.compiled_measure else method.measure
    assert method.combine is not None
    assert method.share is not None
    found = measure(pieces[-1], weights)
    for piece in pieces[:-1]:
        found = method.combine(found, measure(piece, weights))
    return method.share(found)


def encoded(
    scheme: SafetensorsCodec,
    method: Method,
    x: np.ndarray,
    weights: np.ndarray | None,
    cut: int,
    compiled: bool,
) -> Parts:
    """All parts, made by chunks of ``cut`` rows and put together as the plan places them."""
    rows, columns = x.shape
    pieces = [x[start : start + cut] for start in range(0, rows, cut)]
    shared = measured(method, pieces, weights, compiled)
    encode = method.compiled() if compiled and method.compiled else method.encode
    whole = {
        part.suffix: np.zeros(part.shape, DTYPES[part.dtype]) for part in scheme.parts(rows, columns)
    } | dict(scheme.whole(rows, columns, shared))
    for start, piece in zip(range(0, rows, cut), pieces, strict=True):
        found = encode(piece, weights, shared)
        for part in scheme.parts(rows, columns):
            if part.rows:
                first, stop = part.span(start, start + len(piece))
                place = (slice(None),) * part.axis + (slice(first, stop),)
                assert found[part.suffix].dtype == DTYPES[part.dtype]
                assert found[part.suffix].shape == whole[part.suffix][place].shape
                whole[part.suffix][place] = found[part.suffix]
    return whole


def assert_same(found: Parts, expected: Parts) -> None:
    assert found.keys() == expected.keys()
    for suffix, values in expected.items():
        assert found[suffix].dtype == values.dtype
        assert found[suffix].shape == values.shape
        assert found[suffix].tobytes() == values.tobytes(), suffix


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize(("scheme", "method"), METHODS)
def test_bytes_of_any_cut_and_version(scheme: SafetensorsCodec, method: Method, weighted: bool) -> None:
    shapes = [shape for shape in SHAPES if not scheme.misfit(*shape)]
    assert shapes
    for shape in shapes:
        x = drawn(shape)
        weights = importance(shape[1]) if weighted else None
        expected = encoded(scheme, method, x, weights, shape[0], compiled=False)
        for part in scheme.parts(*shape):
            assert expected[part.suffix].shape == part.shape
            assert expected[part.suffix].dtype == DTYPES[part.dtype]
            assert expected[part.suffix].nbytes == part.n_bytes
        assert sum(values.nbytes for values in expected.values()) == scheme.n_bytes(*shape)
        cut = -(-shape[0] // 3 // scheme.row_multiple) * scheme.row_multiple
        assert_same(encoded(scheme, method, x, weights, cut, compiled=False), expected)
        assert_same(encoded(scheme, method, x, weights, cut, compiled=True), expected)
        assert_same(encoded(scheme, method, x, weights, scheme.row_multiple, compiled=True), expected)


@pytest.mark.parametrize(("scheme", "method"), METHODS)
def test_decoded_weights_are_near(scheme: SafetensorsCodec, method: Method) -> None:
    for shape in (shape for shape in SHAPES if not scheme.misfit(*shape)):
        x = drawn(shape, seed=2)
        parts = encoded(scheme, method, x, None, shape[0], compiled=True)
        back = read_back(scheme, parts, shape)
        assert back.dtype == np.float32
        assert back.shape == shape
        assert np.square(back - x).sum() < 0.06 * np.square(x).sum()
        assert np.abs(back[0]).max() <= 1e-6  # a row of zeros, among whatever neighbours


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-120, 110), seed=st.integers(0, 10**6), at=st.integers(0, len(METHODS) - 1))
def test_magnitudes_of_any_size(exponent: int, seed: int, at: int) -> None:
    scheme, method = METHODS[at].values
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.standard_normal((128, 128)), exponent).astype(np.float32)
    parts = encoded(scheme, method, x, None, 128, compiled=True)
    assert_same(parts, encoded(scheme, method, x, None, 128, compiled=False))
    back = read_back(scheme, parts, (128, 128)).astype(np.float64)
    assert np.isfinite(back).all()
    if exponent > -100:
        assert np.square(back - x).sum() < 0.02 * np.square(x.astype(np.float64)).sum()


def test_unknown_names_and_duplicates() -> None:
    with pytest.raises(FormatError, match="fp8-dynamic"):
        codec_named("fp9", SafetensorsCodec)
    with pytest.raises(FormatError, match="absmax"):
        codec_named("FP8-Dynamic", SafetensorsCodec).method("best")
    with pytest.raises(ValueError, match="twice"):
        register(codecs(SafetensorsCodec)[0])
    with pytest.raises(FormatError, match="multiples of 128"):
        codec_named("fp8-block-inv", SafetensorsCodec).check(130, 128)
