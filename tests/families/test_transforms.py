"""Transforms undo themselves, do not depend on where rows are cut, and do what their definition says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.families.transforms import NEGATIVE_EXP, interleave_rotary, interleaved_order


@st.composite
def head_shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """heads, head size, rotated rows."""
    head_dim = 2 * draw(st.integers(1, 32))
    return draw(st.integers(1, 4)), head_dim, 2 * draw(st.integers(1, head_dim // 2))


@given(head_shapes(), st.integers(0, 3))
def test_rotary_order_undoes_itself_and_ignores_cuts(shape: tuple[int, int, int], cut: int) -> None:
    heads, head_dim, rotary_dim = shape
    transform = interleave_rotary(head_dim, rotary_dim)
    rows = np.arange(heads * head_dim * 3).reshape(heads * head_dim, 3)
    moved = transform.apply(rows)
    np.testing.assert_array_equal(transform.invert(moved), rows)
    at = min(cut, heads) * head_dim
    np.testing.assert_array_equal(
        np.concatenate([transform.apply(rows[:at]), transform.apply(rows[at:])]), moved
    )


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

    moved = [interleave_rotary(head_dim, rotary_dim).apply(x[:, None])[:, 0] for x in (q, k)]
    assert half(q) @ k == pytest.approx(neighbours(moved[0]) @ moved[1], rel=1e-12)


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50))
def test_negative_exp(a_log: list[float]) -> None:
    x = np.array([a_log], dtype=np.float32)
    found = NEGATIVE_EXP.apply(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, -np.exp(x.astype(np.float64)), rtol=6e-8)
    # What was stored in bfloat16 comes back to the bit.
    stored = x.astype(ml_dtypes.bfloat16)
    back = NEGATIVE_EXP.invert(NEGATIVE_EXP.apply(stored.astype(np.float32))).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back, np.where(np.abs(stored.astype(np.float32)) < 1e-5, back, stored))
