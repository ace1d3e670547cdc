"""Transforms undo themselves, do not depend on where rows are cut, and do what their definition says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.families.transforms import (
    NEGATIVE_EXP,
    Transform,
    interleave_rotary,
    interleaved_order,
    scaled_sections,
)


@st.composite
def head_shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """heads, head size, rotated rows."""
    head_dim = 2 * draw(st.integers(1, 32))
    return draw(st.integers(1, 4)), head_dim, 2 * draw(st.integers(1, head_dim // 2))


@st.composite
def transforms(draw: st.DrawFn) -> tuple[Transform, int, int]:
    """A transform with any of its parts, and the rows and columns of a tensor for it; its factors are exact."""
    unit, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rows = unit * draw(st.integers(1, 5))
    part = st.sampled_from((True, False))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    made = Transform(
        "x",
        unit,
        row_order=generator.permutation(unit) if draw(part) else None,
        column_order=generator.permutation(columns) if draw(part) else None,
        row_factors=np.exp2(generator.integers(-9, 9, rows)).astype(np.float32) if draw(part) else None,
        column_factors=np.exp2(generator.integers(-9, 9, columns)).astype(np.float32) if draw(part) else None,
    )
    return made.inverse() if draw(part) else made, rows, columns


@given(transforms(), st.data())
def test_transforms_are_inverted_and_do_not_depend_on_the_cut(
    case: tuple[Transform, int, int], data: st.DataObject
) -> None:
    transform, rows, columns = case
    values = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    whole = transform.apply(values, 0)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(transform.invert(whole, 0), values)
    np.testing.assert_array_equal(transform.inverse().invert(values, 0), whole)
    cut = transform.unit * data.draw(st.integers(0, rows // transform.unit))
    pieces = [transform.apply(values[:cut], 0), transform.apply(values[cut:], cut)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    if transform.moves_rows_only:
        packed = values.view(np.uint8).reshape(rows, -1)
        np.testing.assert_array_equal(transform.apply(packed, 0).view(np.float32), whole)


def test_sections_of_rows_are_scaled_by_their_own_factors() -> None:
    transform = scaled_sections("muP", [(2, 0.5), (1, 3.0), (2, 1.0)])
    rows = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    expected = rows * np.array([[0.5], [0.5], [3], [1], [1]])
    np.testing.assert_array_equal(transform.apply(rows, 0), expected)
    np.testing.assert_array_equal(transform.apply(rows[2:4], 2), expected[2:4])
    assert not transform.moves_rows_only and transform.depends_on_row


@given(head_shapes())
def test_rotary_order_pairs_what_rotate_half_pairs(shape: tuple[int, int, int]) -> None:
    _, head_dim, rotary_dim = shape
    order = interleaved_order(head_dim, rotary_dim)
    for i in range(rotary_dim // 2):
        assert order[2 * i] == i
        assert order[2 * i + 1] == i + rotary_dim // 2
    np.testing.assert_array_equal(order[rotary_dim:], np.arange(rotary_dim, head_dim))


def test_scores_survive_the_order() -> None:
    """transformers' rotation of the original rows and ggml's of the moved ones give the same q·k."""
    head_dim, rotary_dim, position = 16, 8, 7
    q, k = np.random.default_rng(0).standard_normal((2, head_dim))
    theta = position * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = np.cos(theta), np.sin(theta)

    def half(x: np.ndarray) -> np.ndarray:
        a, b, rest = np.split(x, [rotary_dim // 2, rotary_dim])
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest])

    def neighbours(x: np.ndarray) -> np.ndarray:
        a, b, rest = x[0:rotary_dim:2], x[1:rotary_dim:2], x[rotary_dim:]
        return np.concatenate([np.stack([a * cos - b * sin, b * cos + a * sin], 1).ravel(), rest])

    moved = [interleave_rotary(head_dim, rotary_dim).apply(x[:, None], 0)[:, 0] for x in (q, k)]
    assert half(q) @ k == pytest.approx(neighbours(moved[0]) @ moved[1], rel=1e-12)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50))
def test_negative_exp(a_log: list[float]) -> None:
    x = np.array([a_log], dtype=np.float32)
    found = NEGATIVE_EXP.apply(x, 0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, -np.exp(x.astype(np.float64)), rtol=6e-8)
    # What was stored in bfloat16 comes back to the bit.
    stored = x.astype(ml_dtypes.bfloat16)
    back = NEGATIVE_EXP.invert(NEGATIVE_EXP.apply(stored.astype(np.float32), 0), 0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back, np.where(np.abs(stored.astype(np.float32)) < 1e-5, back, stored))
