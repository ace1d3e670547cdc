"""Figures in words carry the digits their interval justifies: enough to tell, none that is noise."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.evaluation.result import Figure, FigureKind
from bamba_quant.report import wording

PLAIN = FigureKind("x", "x", "divergence")
PERCENT = FigureKind("x", "x", "agreement", percent=True)
REAL = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-12)


def around(value: float, half: float) -> Figure:
    return Figure(value, value - half, value + half, value - half, value + half)


@pytest.mark.parametrize(
    ("value", "half", "shown", "interval"),
    [
        (0.029, 0.0028, "0.0290", "0.0262 … 0.0318"),
        (3.12e-5, 1.2e-6, "3.12e-5", "3.00e-5 … 3.24e-5"),
        (1.00036, 0.000035, "1.000360", "1.000325 … 1.000395"),
        (22.2, 2.2, "22.2", "20.0 … 24.4"),
        (0.0, 1e-5, "0", "-1.0e-5 … 1.0e-5"),
        (0.0, 0.0, "0", "0 … 0"),
        (-1e-9, 1e-7, "0", "-1.0e-7 … 1.0e-7"),
    ],
)
def test_examples(value: float, half: float, shown: str, interval: str) -> None:
    assert wording.shown(PLAIN, around(value, half)) == shown
    assert wording.interval(PLAIN, around(value, half)) == interval


def test_percent_figures_are_shown_times_a_hundred() -> None:
    figure = around(0.8931, 0.0021)
    assert wording.shown(PERCENT, figure) == "89.31 %"
    assert wording.interval(PERCENT, figure) == "89.10 … 89.52"
    assert wording.limit(PERCENT, 0.895) == "89.5 %"


@given(REAL, st.floats(1e-9, 1e6))
def test_what_is_dropped_is_less_than_the_uncertainty(value: float, half: float) -> None:
    words = wording.shown(PLAIN, around(value, half))
    assert abs(float(words) - value) <= 0.06 * half + 1e-9 * abs(value)
    decimals = re.search(r"\.(\d+)", words)
    if decimals and "e" not in words:
        assert 10.0 ** -len(decimals[1]) >= half / 100 * (1 - 1e-9)


@given(st.lists(st.tuples(REAL, st.floats(1e-9, 1e6)), min_size=1, max_size=6))
def test_a_column_has_equal_decimals(entries: list[tuple[float, float]]) -> None:
    figures = [around(value, half) for value, half in entries]
    style = wording.column_style(PLAIN, figures)
    decimals = set()
    for figure, (value, half) in zip(figures, entries, strict=True):
        words = wording.shown(PLAIN, figure, style)
        assert abs(float(words) - value) <= max(half / 4, 5.01e-7) * (1 + 1e-9) + 1e-9 * abs(value)
        if "e" in words:
            assert abs(value) < 1e-4
        elif words != "0":
            decimals.add(len(words.partition(".")[2]))
    assert len(decimals) <= 1


def test_a_column_of_a_report() -> None:
    """q8_0, q4_k_m, bf16 and an exact copy: the uncertainty of the first decides; the third stays scientific."""
    figures = [around(2.1e-4, 2.2e-5), around(0.0274, 0.003), around(3.1e-7, 2e-8), around(0.0, 0.0)]
    style = wording.column_style(PLAIN, figures)
    assert [wording.shown(PLAIN, each, style) for each in figures] == ["0.00021", "0.02740", "3.10e-7", "0"]
    assert wording.interval(PLAIN, figures[1], style) == "0.02440 … 0.03040"


@given(REAL, st.floats(1e-9, 1e3))
def test_a_bound_that_fails_does_not_read_as_its_limit(limit: float, half: float) -> None:
    bound = limit + half / 20
    assert float(wording.bound(PLAIN, bound, around(limit, half))) > limit - 1e-9 * max(1, abs(limit))


@given(st.floats(1e-300, 1e300), st.integers(1, 6))
def test_significant_digits(value: float, count: int) -> None:
    assert math.isclose(float(wording.digits(value, count)), value, rel_tol=0.51 * 10.0 ** (1 - count))


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (26_722_304, "26.7 MB"), (999_600, "1.00 MB"), (9e15, "9000 TB")],
)  # fmt: skip
def test_sizes(n_bytes: float, text: str) -> None:
    assert wording.size(n_bytes) == text


@given(st.floats(1e-12, 1e12))
def test_plain_numbers_read_back(value: float) -> None:
    assert math.isclose(float(wording.plain(value)), value, rel_tol=1e-5)
