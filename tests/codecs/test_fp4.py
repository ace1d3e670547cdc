"""FP4: codes and scales are compressed-tensors' own, the search finds the least error, and bytes come back."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.checkpoint.compressed_fp4 import _divided, _exponents, _multiplied, _powers
from bamba_quant.checkpoint.dequantize import Float4Dequantizer
from bamba_quant.codecs import Ignored, SafetensorsCodec, codec_named
from bamba_quant.codecs.fp4 import MXFP4, NVFP4, VALUES, Scheme, encode, global_scale, nearest
from bamba_quant.codecs.fp4 import compiled as fp4_compiled
from bamba_quant.codecs.mxfp4 import VALUES as OF_GGUF
from tests.codecs.test_safetensors import encoded, importance
from tests.support.quantized import read_back, to_torch

SCHEMES = [("nvfp4a16", NVFP4), ("mxfp4a16", MXFP4)]
every_scheme = pytest.mark.parametrize(("name", "scheme"), SCHEMES, ids=[name for name, _ in SCHEMES])
SHAPE = (64, 256)


def weights(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, SHAPE).astype(np.float32) * np.float32(0.02)


def theirs(codec: SafetensorsCodec) -> tuple[type[BaseCompressor], QuantizationScheme]:
    config = QuantizationConfig.model_validate(codec.configuration(Ignored()))
    (group,) = config.config_groups.values()
    return BaseCompressor.get_value_from_registry(config.format), group


@every_scheme
def test_absmax_is_compressed_tensors_own(name: str, scheme: Scheme) -> None:
    """Global scale, block scales and codes: every byte."""
    codec = codec_named(name, SafetensorsCodec)
    x = weights(1)
    compressor, group = theirs(codec)
    assert group.weights is not None
    tensor = torch.from_numpy(x)
    blocks = tensor.unflatten(1, (-1, scheme.block))
    state: dict[str, torch.Tensor] = {"weight": tensor}
    if scheme is NVFP4:
        state["weight_global_scale"] = generate_gparam(tensor.min(), tensor.max())
    low, high = blocks.amin(-1), blocks.amax(-1)
    state["weight_scale"], _ = calculate_qparams(low, high, group.weights, state.get("weight_global_scale"))
    expected = compressor.compress(state, group)
    found = encoded(codec, codec.method("absmax"), x, None, SHAPE[0], compiled=True)
    assert {f".{key}" for key in expected} == found.keys()
    for suffix, part in found.items():
        mine, other = to_torch(part), expected[suffix[1:]]
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8)), suffix
    np.testing.assert_array_equal(
        read_back(codec, found, SHAPE), compressor.decompress(expected, group)["weight"].float().numpy()
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=32, max_size=32))
def test_each_code_is_the_nearest(values: list[float]) -> None:
    x = np.array([values], np.float32)
    codes, numbers = nearest(np.abs(x))
    np.testing.assert_array_equal(VALUES[codes], numbers)
    exact = np.minimum(np.abs(x), 6).astype(np.float64)[..., None]
    assert (np.abs(numbers - exact[..., 0]) == np.abs(VALUES[:8] - exact).min(-1)).all()
    # Steps of 1: the compiled version's codes are these, with the sign.
    one = np.full((1, 1), 127, np.uint8)
    steps = MXFP4.steps(None)
    for run in (encode, fp4_compiled.encode):
        packed, chosen = run(x, None, steps, one, MXFP4, (0,))
        assert chosen == one
        np.testing.assert_array_equal(
            Float4Dequantizer(32).values(packed, np.ones((1, 1), np.float32), np.empty((1, 0), np.float32)),
            np.copysign(numbers, x),
        )


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@every_scheme
def test_search_finds_the_least_error(name: str, scheme: Scheme, weighted: bool) -> None:
    """No block is worse than under absmax, nor under any other scale that the format has."""
    codec = codec_named(name, SafetensorsCodec)
    x, each = weights(2), importance(SHAPE[1]) if weighted else None
    weight = np.ones(SHAPE[1]) if each is None else each.astype(np.float64)
    shared = global_scale(np.abs(x).max().reshape(1))
    steps = scheme.steps(shared)

    def error(back: np.ndarray) -> np.ndarray:
        squared = np.square(back.astype(np.float64) - x) * weight
        return squared.reshape(len(x), -1, scheme.block).sum(-1)

    def values(chosen: Mapping[str, np.ndarray]) -> np.ndarray:
        step = np.repeat(steps[chosen[".weight_scale"].view(np.uint8)], scheme.block, axis=1)
        return np.copysign(nearest(np.abs(x) / step)[1] * step, x)

    found, plain = (
        encoded(codec, codec.method(m), x, each, len(x), compiled=True) for m in ("search", "absmax")
    )
    least = np.full((len(x), SHAPE[1] // scheme.block), np.inf)
    for step in steps[scheme.low : scheme.high + 1]:
        with np.errstate(all="ignore"):
            least = np.minimum(least, error(np.copysign(nearest(np.abs(x) / step)[1] * step, x)))
    mine = error(values(found))
    assert (mine <= error(values(plain)) * (1 + 1e-5)).all()
    # A few weighted blocks have their least error beyond the scales that are tried.
    assert (mine <= least * (1 + 1e-5)).mean() > (0.93 if weighted else 0.999)
    assert mine.sum() < (1.02 if weighted else 1.0001) * least.sum()
    assert mine.sum() < (0.85 if scheme is NVFP4 else 0.99) * error(values(plain)).sum()


def test_scales_return_to_their_bytes() -> None:
    every = np.arange(256, dtype=np.uint8)
    exponents = every[:, None]
    np.testing.assert_array_equal(_exponents(_powers(exponents, 256)), exponents)
    positive = every[:127, None].view(ml_dtypes.float8_e4m3fn)
    for amax in (1e-38, 3e-5, 1.0, 77.7, 3e38):
        divisor = global_scale(np.array([amax], np.float32))[0]
        assert np.isfinite(divisor) and divisor > 0
        back = _multiplied(_divided(positive.astype(np.float32), divisor), divisor)
        back = back.astype(ml_dtypes.float8_e4m3fn)
        assert back.tobytes() == positive.tobytes()


def test_one_table_of_values() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import kE2M1ToFloat

    np.testing.assert_array_equal(VALUES[:8], kE2M1ToFloat.numpy())
    np.testing.assert_array_equal(2 * VALUES, OF_GGUF)
