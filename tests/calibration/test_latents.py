"""Latent codes: they begin as the file is, return to bytes that decode to what was learned, and pass gradients."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.calibration.latents import LatentMatrix
from bamba_quant.calibration.tune_options import PARTS
from bamba_quant.checkpoint.base import StoredTensor
from bamba_quant.codecs import BlockCodec, codecs
from bamba_quant.families import TensorRule
from bamba_quant.families.transforms import IDENTITY, Transform, interleave_rotary, power_of_two

ROWS, COLUMNS = 8, 512
NAMES = [each.name for each in codecs(BlockCodec) if each.fields is not None]
CPU = torch.device("cpu")


SCRATCH = tempfile.TemporaryDirectory()


def stored(codec: BlockCodec, raw: np.ndarray) -> StoredTensor:
    """A tensor in a file of its own, from which its codes are read again in the end."""
    file = Path(SCRATCH.name) / f"{uuid4()}"
    file.write_bytes(raw.tobytes())
    return StoredTensor("blk.0.x.weight", (ROWS, COLUMNS), codec, file, 0)


def rule(transform: Transform = IDENTITY) -> TensorRule:
    shape = (ROWS, COLUMNS)
    return TensorRule("x", "x", ("x",), "x", "x", 0, shape, shape, shape, None, transform, "", None, {})


def latent(
    codec: BlockCodec, w: np.ndarray, transform: Transform = IDENTITY
) -> tuple[LatentMatrix, np.ndarray]:
    raw = codec.quantize(transform.apply(w, 0), None)
    moved = bool(transform.name)
    assert codec.fields is not None
    fields = codec.fields.unpack(raw)
    return LatentMatrix(stored(codec, raw), rule(transform), moved, w, fields, PARTS, 1.5, CPU), raw


def weights(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = 0.02 * rng.standard_t(4, (ROWS, COLUMNS))
    w[1] = 0
    return w.astype(np.float32)


every_format = pytest.mark.parametrize(
    "codec", [f for f in codecs(BlockCodec) if f.fields], ids=lambda f: f.name
)
# Rows that move and are scaled by section.
BOTH = replace(interleave_rotary(4, 4), name="both", row_factors=np.float32([0.5, 4]).repeat(4))

transforms = pytest.mark.parametrize(
    "transform", [IDENTITY, interleave_rotary(4, 4), power_of_two(-3), BOTH], ids=lambda t: t.name
)


@every_format
@transforms
def test_the_start_is_the_file(codec: BlockCodec, transform: Transform) -> None:
    w = weights(0)
    matrix, raw = latent(codec, w, transform)
    expected = transform.invert(codec.dequantize(raw), 0)
    np.testing.assert_array_equal(matrix.weight().detach().numpy(), expected)
    np.testing.assert_array_equal(matrix.raw(matrix.snapshot()), raw)
    assert matrix.changed(matrix.snapshot()) == 0
    # A latent code stands where the original's weight does, but for what clipping took.
    offset = matrix.parameters["codes"].detach().numpy()
    assert np.abs(offset).max() <= 0.5
    if matrix.table is None:
        with torch.no_grad():
            step, low = matrix._scaling()
        places = (matrix.start + torch.from_numpy(offset)).reshape(ROWS, -1, matrix.layout.group)
        found = (places * step - (0 if low is None else low)).numpy().reshape(ROWS, COLUMNS)
        inside = np.abs(offset) < 0.5
        np.testing.assert_allclose(found[inside], transform.apply(w, 0)[inside], atol=1e-6, rtol=1e-4)


@every_format
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_bytes_of_any_state_decode_to_its_weights(codec: BlockCodec, seed: int) -> None:
    matrix, _ = latent(codec, weights(seed), interleave_rotary(4, 4))
    generator = torch.Generator().manual_seed(seed)
    spread = {"codes": 1.0, "scales": 1.5, "minima": 1.5, "d": 0.01, "dmin": 0.01}
    with torch.no_grad():
        for name, parameter in matrix.parameters.items():
            parameter += spread[name] * torch.randn(parameter.shape, generator=generator)
    matrix.clamp()
    raw = matrix.raw(matrix.snapshot())
    found = interleave_rotary(4, 4).invert(codec.dequantize(raw), 0)
    np.testing.assert_array_equal(found, matrix.weight().detach().numpy())
    assert 0 < matrix.changed(matrix.snapshot()) < ROWS * COLUMNS


@every_format
def test_gradients_are_those_of_the_formula_without_rounding(codec: BlockCodec) -> None:
    """A code's is the step between neighbouring values, and scales' are differences of the formula itself."""
    matrix, _ = latent(codec, weights(3))
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    (matrix.weight() * direction).sum().backward()
    for name, parameter in matrix.parameters.items():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        move = {"codes": 1.0, "scales": 1.0, "minima": 1.0, "d": 2.0**-5, "dmin": 2.0**-5}[name]
        at = tuple(int(i) for i in np.unravel_index(int(parameter.grad.abs().argmax()), parameter.shape))
        low, high = (matrix.low, matrix.high) if name == "codes" else (None, None)
        with torch.no_grad():
            before = (matrix.weight() * direction).double().sum()
            if (
                name == "codes"
            ):  # to the neighbour on the side on which the latent is, or on the only one there is
                start, now = int(matrix.start[at]), float(parameter[at])
                assert low is not None and high is not None
                move = 1.0 if (now >= 0 and start < high) or start == low else -1.0
                parameter[at] = move
            else:
                parameter[at] += move
            after = (matrix.weight() * direction).double().sum()
        expected = float(after - before) / move
        tolerance = 0.05 if name in ("d", "dmin") else 1e-3  # the floats are rounded to float16
        if (
            name == "codes"
            and matrix.table is not None
            and abs(float(parameter.grad[at]) / expected - 1) > tolerance
        ):
            continue  # clipped beyond the outermost value: the gradient is that of the last interval
        assert float(parameter.grad[at]) == pytest.approx(expected, rel=tolerance), name


def test_a_code_keeps_within_reach_and_within_its_bits() -> None:
    q4_k = next(f for f in codecs(BlockCodec) if f.name == "q4_k")
    matrix, _ = latent(q4_k, weights(1))
    with torch.no_grad():
        matrix.parameters["codes"] += 100
    matrix.clamp()
    codes = matrix.start + matrix.parameters["codes"].round()
    assert codes.max() == 15
    assert (codes - matrix.start).max() == 2  # 1.5 rounds to 2
