"""Groups of integers: codes near their weights, searches that never lose, lanes that repeat numpy bit for bit."""

from __future__ import annotations

from functools import partial
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
)

from bamba_quant.codecs import BlockCodec, codec_named
from bamba_quant.codecs.arrays import F32
from bamba_quant.codecs.integers.compiled import quantizer
from bamba_quant.codecs.integers.grid import Groups, IntegerGrid, Zero, dequantize, pack, unpack
from bamba_quant.codecs.integers.search import METHODS, TOGETHER, quantize, trials_of
from bamba_quant.errors import FormatError
from tests.codecs.inputs import importances, weights

# Between them every kind of zero, number of bits and size of a group.
GRIDS = [
    IntegerGrid(4, "none", 128),
    IntegerGrid(4, "integer", 32),
    IntegerGrid(4, "float", 64),
    IntegerGrid(8, "none", 32),
    IntegerGrid(8, "integer", 128),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"int{g.bits}-{g.zero}-{g.group}")
every_method = pytest.mark.parametrize("method", METHODS)
SANE = {
    name: x for name, x in weights().items() if name not in ("huge", "near overflow", "mixed", "subnormal")
}


def error(grid: IntegerGrid, groups: Groups, x: F32, importance: F32 | None = None) -> np.ndarray:
    """Weighted squared error of each group, float64."""
    difference = (dequantize(grid, groups) - x).astype(np.float64) ** 2
    if importance is not None:
        difference *= importance
    return difference.reshape(-1, grid.group).sum(axis=1)


@every_grid
@every_method
def test_lanes_repeat_numpy_bit_for_bit(grid: IntegerGrid, method: str) -> None:
    offset = 1 << grid.bits - 1
    compiled = quantizer(grid, method, offset)
    x = np.concatenate(list(weights().values()))
    for importance in importances().values():
        for rows in (x, x[:1]):
            groups = quantize(grid, method, rows, importance)
            packed, scale, zero = compiled(rows, importance)
            np.testing.assert_array_equal(packed, pack(groups.codes, grid.bits, offset))
            np.testing.assert_array_equal(scale.view(np.uint32), groups.scale.view(np.uint32))
            np.testing.assert_array_equal(zero.view(np.uint32), groups.zero.view(np.uint32))


@every_grid
def test_rounding_to_nearest_stays_within_half_a_step(grid: IntegerGrid) -> None:
    for name, x in SANE.items():
        groups = quantize(grid, "rtn", x)
        step = np.repeat(groups.scale, grid.group, axis=1)
        distance = np.abs(dequantize(grid, groups).astype(np.float64) - x)
        inside = (groups.codes > grid.low) & (groups.codes < grid.high)
        # A quotient of float32 that is nearly half way is rounded to it.
        room = 1 + 1e-5 if grid.zero == "none" else 1 + 1e-3
        assert np.all(distance[inside] <= room * step[inside] / 2), name
        # The ends are cut where the range was rounded to a bfloat16, of eight bits, and symmetric ones by half a step.
        reach = np.abs(x).max() if grid.zero == "float" else grid.high * step
        assert np.all(distance <= step / 2 + 2.0**-7 * reach + step / 2 * (grid.zero == "none")), name


@every_grid
@pytest.mark.parametrize("importance", importances().values(), ids=importances())
def test_a_search_never_loses_to_rounding(grid: IntegerGrid, importance: F32 | None) -> None:
    for name, x in SANE.items():
        base = error(grid, quantize(grid, "rtn", x, importance), x, importance)
        for method in ("mse", "hqq"):
            found = error(grid, quantize(grid, method, x, importance), x, importance)
            # Trials are compared in float32, with reciprocals.
            assert np.all(found <= base * (1 + 1e-4) + 1e-30), (name, method)


@pytest.mark.parametrize("zero", ("none", "integer", "float"))
def test_searches_pay_on_gaussian_weights(zero: Zero) -> None:
    """Compared with the error after hundreds of trials in small steps, for scale and zero."""
    grid = IntegerGrid(4, zero, 128)
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    losses = {method: error(grid, quantize(grid, method, x), x).sum() for method in METHODS}
    assert losses["mse"] < 0.92 * losses["rtn"]
    assert losses["hqq"] < 0.90 * losses["rtn"]
    assert losses["hqq"] < losses["mse"]
    # A float zero is one number more to search.
    searched, refitted = (1.03, 1.015) if zero == "float" else (1.003, 1.003)
    assert losses["mse"] < searched * exhaustive(grid, x, signs=(1,))
    assert losses["hqq"] < refitted * exhaustive(grid, x, signs=(1, -1))


def exhaustive(grid: IntegerGrid, x: F32, signs: tuple[int, ...]) -> float:
    """The squared error of the best of scales a hundredth of the widest apart, and of zeros."""
    groups = x.reshape(-1, grid.group)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    least = np.full(len(groups), np.inf)
    for fraction in np.linspace(0.5, 1.1, 61, dtype=np.float32):
        if grid.zero == "none":
            widest = np.maximum(high, -low) / np.float32(-grid.low)
            pairs = [(np.float32(sign) * fraction * widest, np.zeros_like(low)) for sign in signs]
        else:
            scale = (high - low) * fraction / np.float32(grid.high - grid.low)
            zeros = range(-5, 5) if grid.zero == "integer" else np.arange(20, dtype=np.float32) / 20
            middle = (low + high) / 2 if grid.zero == "float" else 0
            pairs = [(scale, middle + (scale if grid.zero == "float" else 1) * np.float32(z)) for z in zeros]
        for scale, zero in pairs:
            difference = grid.values(grid.codes(groups, scale, zero), scale, zero) - groups
            least = np.minimum(least, np.square(difference, dtype=np.float64).sum(axis=1))
    return float(least.sum())


@every_grid
def test_trials_come_in_whole_sets(grid: IntegerGrid) -> None:
    """The compiled search takes so many at a time and would leave out the rest."""
    first, near = trials_of(grid)
    assert first.shape[0] % TOGETHER == near.shape[0] % TOGETHER == 0
    assert first.shape[1] == near.shape[1] == 2
    assert first.dtype == near.dtype == np.float32


@every_grid
@every_method
def test_what_counts_for_nothing_is_rounded_to_nearest(grid: IntegerGrid, method: str) -> None:
    x = weights()["normal"]
    found = quantize(grid, method, x, np.zeros(x.shape[1], np.float32))
    expected = quantize(grid, "rtn", x)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_importance_moves_error_to_columns_that_matter_less() -> None:
    x = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 8 == 0, 100, 1).astype(np.float32)
    for zero, method in product(("none", "integer", "float"), ("mse", "hqq")):
        grid = IntegerGrid(4, zero, 128)  # type: ignore[arg-type]
        weighted = error(grid, quantize(grid, method, x, importance), x, importance).sum()
        without = error(grid, quantize(grid, method, x), x, importance).sum()
        assert weighted < 0.95 * without


@every_grid
def test_scales_are_bfloat16_and_zeros_what_they_should_be(grid: IntegerGrid) -> None:
    for method, x in product(METHODS, SANE.values()):
        groups = quantize(grid, method, x)
        assert np.array_equal(groups.scale.astype(ml_dtypes.bfloat16).astype(np.float32), groups.scale)
        assert np.all(groups.scale != 0)
        if method != "hqq" or grid.zero != "none":
            assert np.all(groups.scale > 0)
        if grid.zero == "float":
            assert np.array_equal(groups.zero.astype(ml_dtypes.bfloat16).astype(np.float32), groups.zero)
        else:
            assert np.array_equal(np.clip(np.rint(groups.zero), grid.low, grid.high), groups.zero)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("symmetric", (True, False))
def test_rounding_is_compressed_tensors_own(bits: int, symmetric: bool) -> None:
    grid = IntegerGrid(bits, "none" if symmetric else "integer", 128)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=128,
                            scale_dtype=torch.bfloat16, zp_dtype=None if symmetric else torch.int8)  # fmt: skip
    for name, x in SANE.items():
        if name == "smallest subnormal":
            continue  # theirs is no bfloat16 scale of float32 subnormals
        theirs = torch.from_numpy(x)
        grouped = theirs.reshape(len(x), -1, 128)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        codes = their_quantize(theirs, scale.float(), zero, args, dtype=torch.int8)
        ours = quantize(grid, "rtn", x)
        np.testing.assert_array_equal(ours.scale, scale.float().numpy(), err_msg=name)
        np.testing.assert_array_equal(ours.codes, codes.numpy(), err_msg=name)
        if not symmetric:
            np.testing.assert_array_equal(ours.zero, zero.float().numpy(), err_msg=name)


def test_a_float_zero_means_what_torchao_means() -> None:
    """torchao's codes are ours plus 8; on its codes its dequantization gives our values."""
    grid = IntegerGrid(4, "float", 128)
    x = weights()["normal"]
    theirs = torch.from_numpy(x)
    block = (1, 128)
    scale, zero = _choose_qparams_affine_tinygemm(theirs, MappingType.ASYMMETRIC, block, torch.int32, 0, 15)
    codes = _quantize_affine_tinygemm(theirs, block, scale, zero, torch.int32, 0, 15)
    values = _dequantize_affine_tinygemm(
        codes, block, scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
    )
    groups = Groups(
        (codes - 8).to(torch.int8).numpy(), *(p.float().numpy().reshape(len(x), -1) for p in (scale, zero))
    )
    np.testing.assert_allclose(dequantize(grid, groups), values.numpy(), rtol=1e-6, atol=1e-9)
    # Its range is [least, greatest] like ours; scales differ by their rounding to bfloat16.
    np.testing.assert_allclose(quantize(grid, "rtn", x).scale, groups.scale, rtol=2.0**-8)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from((4, 8)), st.integers(0, 255))
def test_packing_loses_no_code(data: st.DataObject, bits: int, offset: int) -> None:
    rows, columns = data.draw(st.integers(0, 5)), 2 * data.draw(st.integers(0, 40))
    low = -(1 << bits - 1)
    codes = data.draw(arrays(np.int8, (rows, columns), elements=st.integers(low, -low - 1)))
    packed = pack(codes, bits, offset)
    assert packed.shape == (rows, columns * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, offset), codes)


def test_an_importance_of_other_columns_is_an_error() -> None:
    """Compiled code would read behind its end."""
    compiled = codec_named("q4_k", BlockCodec).method().compiled
    assert compiled is not None
    q4_k = compiled()
    grid, x, importance = IntegerGrid(4, "none", 32), np.ones((2, 1024), np.float32), np.ones(32, np.float32)
    for run in (
        partial(quantize, grid, "hqq"),
        quantizer(grid, "hqq", 8),
        lambda rows, weights: q4_k(rows, weights, None),
    ):
        with pytest.raises(ValueError, match="broadcast"):
            run(x, importance)


def test_errors_say_what_is_wrong() -> None:
    grid = IntegerGrid(4, "none", 128)
    with pytest.raises(FormatError, match=r"100 columns\n.*a multiple of 128"):
        quantize(grid, "rtn", np.zeros((2, 100), np.float32))
    with pytest.raises(FormatError, match=r"100 columns\n.*a multiple of 128"):
        quantizer(grid, "rtn", 8)(np.zeros((2, 100), np.float32), None)
    with pytest.raises(FormatError, match=r"'gptq'\n.*rtn, mse, hqq"):
        quantize(grid, "gptq", np.zeros((2, 128), np.float32))
    with pytest.raises(FormatError, match=r"'gptq'\n.*rtn, mse, hqq"):
        quantizer(grid, "gptq", 8)
    with pytest.raises(FormatError, match="3 bits"):
        IntegerGrid(3, "none", 128)
