"""Which files are worth their size: what the figures of each chunk show, and nothing that they leave open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamba_quant.evaluation.result import Evaluation
from bamba_quant.report.charts.terminal import size_divergence_text
from bamba_quant.report.frontier import frontier_lines, standings
from tests.report.variants import EDGES
from tests.support.evaluations import make_evaluation

NAMES = ("q2_k", "q4_k_m", "q8_0", "fp8-dynamic", "int4-gptq")


def measured(sizes: Sequence[int], klds: Sequence[Sequence[float]]) -> Evaluation:
    """An evaluation whose candidates have these sizes in bytes and these divergences, chunk by chunk."""
    plain = make_evaluation(NAMES[: len(sizes)])
    return replace(
        plain,
        candidates=tuple(
            replace(
                candidate,
                model=replace(candidate.model, file_bytes=n_bytes),
                chunks=replace(candidate.chunks, kld=tuple(kld)),
            )
            for candidate, n_bytes, kld in zip(plain.candidates, sizes, klds, strict=True)
        ),
    )


def around(mean: float, spread: float = 0.1, seed: int = 0, chunks: int = 40) -> list[float]:
    noise = np.random.default_rng(seed).standard_normal(chunks)
    return (mean * (1 + spread * (noise - noise.mean()))).tolist()


def test_a_larger_and_worse_file_is_dominated() -> None:
    found = measured((20, 30, 50, 60), (around(0.4), around(0.03), around(0.0002), around(0.004, seed=1)))
    assert [each.state for each in standings(found)] == ["frontier"] * 3 + ["dominated"]
    assert frontier_lines(found) == (
        "On the frontier of size and divergence: q2_k, q4_k_m, q8_0.",
        "fp8-dynamic is larger and further from the original than q8_0.",
    )


def test_files_of_one_size_and_those_that_share_a_better_one() -> None:
    found = measured((20, 20, 30, 40), (around(0.1), around(0.2), around(0.15), around(0.3)))
    assert frontier_lines(found) == (
        "On the frontier of size and divergence: q2_k.",
        "q4_k_m is no smaller and further from the original than q2_k.",
        "q8_0 and fp8-dynamic are larger and further from the original than q2_k.",
    )


@pytest.mark.parametrize(("gain", "state"), [(0.0005, "tied"), (0.02, "frontier"), (-0.02, "dominated")])
def test_chunks_decide_whether_a_difference_is_certain(gain: float, state: str) -> None:
    """Both vary by 10 % from chunk to chunk, apart from each other: a fiftieth of that is no difference."""
    found = measured((20, 30), (around(0.1), around(0.1 - gain, seed=1)))
    assert [each.state for each in standings(found)] == ["frontier", state]
    if state == "tied":
        line = frontier_lines(found)[1]
        assert (
            line == "q4_k_m is larger than q2_k, and this text cannot tell which is nearer to the original."
        )


def test_chunks_are_compared_in_pairs() -> None:
    """Each file's own interval is far wider than the difference, which every chunk shows."""
    common = np.array(around(0.1, spread=0.5))
    found = measured((20, 30), (common.tolist(), (common - 0.001).tolist()))
    assert [each.state for each in standings(found)] == ["frontier", "frontier"]


def test_nothing_below_the_noise_floor_is_a_difference() -> None:
    found = measured((20, 30), ([1e-6] * 40, [5e-7] * 40))
    assert found.noise_floor is not None
    for floor, state in ((1e-7, "frontier"), (1e-6, "tied")):
        noise = replace(found.noise_floor, figures={**found.noise_floor.figures, "kld_mean": floor})
        assert standings(replace(found, noise_floor=noise))[1].state == state


def test_a_file_is_tied_with_files_of_the_frontier_only() -> None:
    """The second is like the first and the third like the second; the third is nearer than the first all the same."""
    first, third = around(0.1, 0.02), around(0.097, 0.02, seed=2)
    found = measured((20, 30, 40), (first, around(0.0985, 0.2, seed=1), third))
    assert [each.state for each in standings(found)] == ["frontier", "tied", "frontier"]


def test_few_chunks_tell_nothing() -> None:
    found = measured((20, 30), ([0.1] * 7, [0.01] * 7))
    assert {each.state for each in standings(found)} == {"unknown"}
    (line,) = frontier_lines(replace(found, text=replace(found.text, chunks=7)))
    assert "7, and 8 are needed" in line
    assert frontier_lines(make_evaluation(("q8_0",))) == ()


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(1e-6, 1.0), st.integers(0, 9)), min_size=2, max_size=5)
)
def test_the_judgement_is_consistent(files: list[tuple[int, float, int]]) -> None:
    found = measured(
        [size for size, _, _ in files], [around(kld, seed=seed, chunks=10) for _, kld, seed in files]
    )
    candidates, places = found.candidates, standings(found)
    smallest = min(candidate.model.file_bytes for candidate in candidates)
    assert any(
        place.state == "frontier" and candidate.model.file_bytes == smallest
        for candidate, place in zip(candidates, places, strict=True)
    )
    for candidate, place in zip(candidates, places, strict=True):
        assert (place.by is None) == (place.state == "frontier")
        if place.by is not None:
            other = candidates[place.by]
            assert other.model.file_bytes <= candidate.model.file_bytes
            if place.state == "dominated":
                assert np.mean(other.chunks.kld) < np.mean(candidate.chunks.kld)
            else:
                assert other.model.file_bytes < candidate.model.file_bytes
                assert places[place.by].state == "frontier"


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize(("width", "height"), [(60, 8), (80, 13), (100, 13)])
def test_the_picture_in_characters_fits(name: str, width: int, height: int) -> None:
    evaluation = EDGES[name]
    lines = size_divergence_text(evaluation, width, height)
    assert len(lines) == height and max(map(len, lines)) <= width
    marks = sum(line.count("●") + line.count("○") for line in lines[1:])
    assert 1 <= marks <= len(evaluation.candidates)


def test_the_picture_in_characters_has_each_file_in_its_place() -> None:
    lines = size_divergence_text(make_evaluation(tuple(NAMES)), 80, 13)
    places = {
        name: next((i, line.index(name)) for i, line in enumerate(lines) if name in line) for name in NAMES
    }
    assert places["q2_k"][0] < places["q4_k_m"][0] < places["fp8-dynamic"][0] < places["q8_0"][0]
    assert places["q2_k"][1] < places["q4_k_m"][1] < places["q8_0"][1]
