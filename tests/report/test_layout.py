"""Axes keep every value inside, in order, and mark round numbers; labels cover nothing."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.report.charts.layout import Box, linear, logarithmic, place_labels, text_width
from bamba_quant.report.charts.size_divergence import size_divergence
from tests.report.variants import EDGES

VALUES = st.lists(st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=20)
POSITIVE = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20)


@given(VALUES, st.integers(3, 10))
def test_linear_axes(values: list[float], most: int) -> None:
    scale = linear(values, 0, 100, most=most)
    slack = 1e-6 * (scale.high - scale.low)
    assert scale.low - slack <= min(values) <= max(values) <= scale.high + slack
    coordinates = [scale(value) for value in sorted(values)]
    assert coordinates == sorted(coordinates)
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in coordinates)
    ticks = scale.ticks(most)
    assert 2 <= len(ticks) <= most
    assert all(a < b for a, b in pairwise(ticks))


@given(POSITIVE, st.integers(3, 10))
def test_logarithmic_axes(values: list[float], most: int) -> None:
    scale = logarithmic(values, 100, 0)
    coordinates = [scale(value) for value in sorted(values)]
    assert coordinates == sorted(coordinates, reverse=True)
    assert all(0 < place < 100 for place in coordinates)
    ticks = scale.ticks(most)
    assert len(ticks) <= most
    assert all(
        scale.low <= tick <= scale.high and re.fullmatch(r"[1-9]e[+-]\d+", f"{tick:.0e}") for tick in ticks
    )


@given(st.lists(st.tuples(st.floats(20, 880), st.floats(20, 380)), min_size=1, max_size=25))
@settings(max_examples=50, deadline=None)
def test_labels_cover_nothing(anchors: list[tuple[float, float]]) -> None:
    frame = Box(0, 0, 900, 400)
    marks = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in anchors]
    boxes = place_labels(anchors, [70.0] * len(anchors), 16, frame, marks)
    assert boxes is not None
    assert all(frame.holds(box) for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(box.overlaps(mark) for box in boxes for mark in marks)


def test_no_room_is_said() -> None:
    assert place_labels([(5, 5)], [40], 16, Box(0, 0, 30, 30), []) is None


@pytest.mark.parametrize("width", [328.0, 600.0, 1032.0])
@pytest.mark.parametrize("name", EDGES)
def test_labels_of_the_size_plot(name: str, width: float) -> None:
    drawn = str(size_divergence(EDGES[name], width))
    labels = re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" class="strong halo">([^<]*)</text>', drawn)
    assert len(labels) == len(EDGES[name].candidates)
    boxes = [
        Box(float(x), float(y) - 12, float(x) + text_width(words, 12), float(y) + 4) for x, y, words in labels
    ]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.left >= 0 and box.right <= width for box in boxes)
