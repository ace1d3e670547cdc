"""95 % intervals cover the truth 93 to 97 times of 100 when tokens of a chunk depend on each other, and errors that
take tokens to be independent do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bamba_quant.evaluation import figures
from bamba_quant.evaluation.figures import MEANS, _columns, _columns_of_mean
from bamba_quant.evaluation.intervals import (
    LEAST_CHUNKS,
    Bootstrap,
    beta_quantile,
    beta_share,
    has_few_exceptions,
    least_tokens,
    quantile,
    quantile_bounds,
    share_bounds,
    student,
)
from bamba_quant.evaluation.scores import Scores

CHUNKS, TOKENS, TRIALS = 40, 64, 800


def simulated(rng: np.random.Generator, chunks: int, tokens: int = TOKENS) -> Scores:
    """Every score with a part that its chunk's tokens share, skewed where real scores are."""
    level = rng.standard_normal((chunks, 1))
    spread = np.exp(0.4 * rng.standard_normal((chunks, 1)))
    noise = [rng.standard_normal((chunks, tokens)) for _ in range(4)]
    base = np.abs(3 + 0.5 * level + 1.2 * noise[0])
    shift = 0.012 + 0.03 * rng.standard_normal((chunks, 1))
    alike = 1 / (1 + np.exp(-(2 + 0.4 * rng.standard_normal((chunks, 1)))))
    right_base = rng.random((chunks, tokens)) < 0.4 + 0.1 * np.tanh(level)
    return Scores(
        nll_base=base,
        nll=base + shift + 0.2 * noise[1] * np.sqrt(spread),
        kld=0.03 * spread * np.exp(1.2 * noise[2]),
        delta_p=-0.002 + 0.01 * rng.standard_normal((chunks, 1)) + 0.04 * np.sqrt(spread) * noise[3],
        same_top=rng.random((chunks, tokens)) < alike,
        overlap=rng.binomial(5, alike, size=(chunks, tokens)),
        right_base=right_base,
        right=np.where(rng.random((chunks, tokens)) < 0.03 * spread, ~right_base, right_base),
    )


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    return figures.values(simulated(np.random.default_rng(0), 40_000))


@pytest.fixture(scope="module")
def trials() -> list[Scores]:
    rng = np.random.default_rng(1)
    return [simulated(rng, CHUNKS) for _ in range(TRIALS)]


# One figure of each kind: a mean of skewed values, of signed ones, of a share; functions of several means; a root.
SMOOTH = ("kld_mean", "ppl_ratio", "same_top", "ppl_difference", "correlation", "delta_p_rms")


@pytest.mark.parametrize("key", SMOOTH)
def test_means_cover(key: str, trials: list[Scores], truth: dict[str, float]) -> None:
    bootstrap = Bootstrap(CHUNKS, seed=0, resamples=1000)
    mean = MEANS[key]
    found = [bootstrap.bounds(_columns_of_mean(_columns(s), mean).mean(1), mean.smooth) for s in trials]
    bounds = [each for each in found if each is not None]
    assert len(bounds) == TRIALS
    covered = np.mean([each.low <= truth[key] <= each.high for each in bounds])
    assert 0.93 <= covered <= 0.97
    for side in (
        [truth[key] <= each.upper for each in bounds],
        [truth[key] >= each.lower for each in bounds],
    ):
        assert 0.92 <= np.mean(side) <= 0.98
    naive = [figures.naive_errors(s).get(key) for s in trials]
    if key in ("ppl_ratio", "kld_mean"):
        values = [figures.values(s)[key] for s in trials[:200]]
        reach = [
            abs(value - truth[key]) <= 1.96 * (error or 0)
            for value, error in zip(values, naive, strict=False)
        ]
        assert np.mean(reach) < 0.9, "the tokens of these chunks hardly depend on each other"


@pytest.mark.parametrize(("of", "place"), [("kld", "median"), ("kld", "90"), ("kld", "99"), ("delta_p", "5")])
def test_quantiles_cover(of: str, place: str, trials: list[Scores], truth: dict[str, float]) -> None:
    bounds = [quantile_bounds(getattr(s, of), figures.QUANTILES[place]) for s in trials]
    covered = np.mean([b is not None and b.low <= truth[f"{of}_{place}"] <= b.high for b in bounds])
    assert 0.93 <= covered <= 0.97


def test_bounds_nest_and_are_seeded() -> None:
    scores = simulated(np.random.default_rng(2), 20)
    tables = [figures.figures(scores, Bootstrap(20, seed, 1000), None) for seed in (3, 3, 4)]
    assert tables[0] == tables[1] != tables[2]
    for key, figure in tables[0].items():
        if figure.low is not None:
            assert figure.high is not None and figure.lower is not None and figure.upper is not None
            assert figure.low <= figure.lower <= figure.upper <= figure.high, key
            assert figure.low <= figure.value <= figure.high, key


def test_what_too_little_text_cannot_say() -> None:
    few = figures.figures(
        simulated(np.random.default_rng(3), LEAST_CHUNKS - 1), Bootstrap(LEAST_CHUNKS - 1, 0), None
    )
    assert all(figure.low is figure.upper is None for figure in few.values())
    enough = simulated(np.random.default_rng(3), LEAST_CHUNKS)
    table = figures.figures(enough, Bootstrap(LEAST_CHUNKS, 0), None)
    assert enough.kld.size < least_tokens(0.99) and enough.kld.size >= least_tokens(0.95)
    assert table["kld_99"].upper is None and table["kld_max"].upper is None
    assert table["kld_95"].upper is not None and table["kld_mean"].upper is not None


def test_a_figure_without_spread_is_exact() -> None:
    scores = simulated(np.random.default_rng(4), 12)
    same = Scores(**vars(scores) | {"nll": scores.nll_base})
    found = figures.figures(same, Bootstrap(12, 0, 1000), None)["ppl_ratio"]
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_no_exception_seen_is_not_none_at_all() -> None:
    scores = simulated(np.random.default_rng(4), 12)
    same = Scores(**vars(scores) | {"same_top": np.ones_like(scores.same_top), "right": scores.right_base})
    found = figures.figures(same, Bootstrap(12, 0, 1000), None)
    tokens = scores.kld.size
    top, flips = found["same_top"], found["flips"]
    assert top.lower is not None and flips.upper is not None and top.low is not None
    # Were the share this small, a text of so many tokens would show none in 5 of 100 cases.
    assert (1 - flips.upper) ** tokens == pytest.approx(0.05) == pytest.approx(top.lower**tokens)
    assert top.low**tokens == pytest.approx(0.025)
    assert (top.value, top.high, flips.value, flips.low) == (1.0, 1.0, 0.0, 0.0)


def exceptions(count: int, chunks: int = 32) -> Scores:
    """Scores of which ``count`` tokens, each in another chunk, have another top and another rightness."""
    scores = simulated(np.random.default_rng(4), chunks)
    same_top, right = np.ones_like(scores.same_top), scores.right_base.copy()
    same_top[:count, 5] = False
    right[:count, 7] ^= True
    overlap = np.where(same_top, 5, 4)
    return Scores(**vars(scores) | {"same_top": same_top, "right": right, "overlap": overlap})


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 7, 8, 12])
def test_shares_with_few_exceptions_have_bounds(count: int) -> None:
    """Most resamples of chunks have none of one exception, and their own spread says nothing then."""
    found = figures.figures(exceptions(count), Bootstrap(32, 0), None)
    seen = count / (32 * TOKENS)
    most = (count + 4.2 * math.sqrt(count + 1) + 4) / (32 * TOKENS)
    for key in ("same_top", "flips", "top_5_overlap", "accuracy_difference"):
        figure = found[key]
        assert figure.low is not None and figure.lower is not None
        assert figure.high is not None and figure.upper is not None
        assert figure.low <= figure.lower <= figure.value <= figure.upper <= figure.high, key
        if key == "flips":
            assert seen <= figure.upper <= figure.high <= most
        elif key != "accuracy_difference":
            assert 1 - most <= figure.low <= figure.lower <= 1
        else:
            assert -most <= figure.low and figure.high <= most


def test_rare_exceptions_are_covered() -> None:
    """At least as often as is claimed: what is as rare as this cannot be covered exactly 95 times of 100."""
    rng = np.random.default_rng(7)
    shares = 0.0015 * np.exp(0.5 * rng.standard_normal((1000, CHUNKS, 1)))
    truth, covered, upper = 0.0015 * math.exp(0.125), [], []
    for share in shares:
        seen = (rng.random((CHUNKS, TOKENS)) < share).mean(1)
        if not has_few_exceptions(seen):
            continue
        bounds = share_bounds(seen, CHUNKS * TOKENS)
        assert bounds is not None
        covered.append(bounds.low <= truth <= bounds.high)
        upper.append(truth <= bounds.upper)
    assert len(covered) > 850
    assert np.mean(covered) >= 0.95 and np.mean(upper) >= 0.95


def test_exceptions_that_gather_widen_the_bounds() -> None:
    apart, together = np.zeros(CHUNKS), np.zeros(CHUNKS)
    apart[:6], together[0] = 1 / TOKENS, 6 / TOKENS
    one, other = (share_bounds(shares, CHUNKS * TOKENS) for shares in (apart, together))
    assert one is not None and other is not None
    assert other.upper > 1.3 * one.upper and other.lower < one.lower


def test_a_figure_that_one_chunk_decides_has_no_interval() -> None:
    scores = simulated(np.random.default_rng(4), 12)
    nll = scores.nll_base.copy()
    nll[3, 3] += 1
    found = figures.figures(Scores(**vars(scores) | {"nll": nll}), Bootstrap(12, 0), None)["ppl_ratio"]
    assert found.value > 1 and found.low is found.high is found.lower is found.upper is None


@given(st.integers(1, 300), st.integers(0, 299), st.floats(0.001, 0.999))
@settings(max_examples=60, deadline=None)
def test_the_beta_distribution_is_the_binomials(n: int, k: int, x: float) -> None:
    k = k % n + 1
    at_least = math.fsum(math.comb(n, i) * x**i * (1 - x) ** (n - i) for i in range(k, n + 1))
    assert beta_share(x, k, n - k + 1) == pytest.approx(at_least, rel=1e-9, abs=1e-13)


@given(st.floats(0.5, 400), st.floats(0.5, 400), st.floats(0.001, 0.999))
@settings(max_examples=60, deadline=None)
def test_the_beta_distribution_between_whole_numbers(a: float, b: float, x: float) -> None:
    """DLMF 8.17.20."""
    log_term = math.lgamma(a + b) - math.lgamma(a + 1) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    assert beta_share(x, a, b) - beta_share(x, a + 1, b) == pytest.approx(
        math.exp(log_term), rel=1e-7, abs=1e-11
    )


@given(st.floats(0.5, 400), st.floats(0.5, 400), st.floats(1e-9, 1 - 1e-9))
@settings(max_examples=60, deadline=None)
def test_beta_quantiles_are_where_their_share_lies(a: float, b: float, level: float) -> None:
    assert beta_share(beta_quantile(level, a, b), a, b) == pytest.approx(level, rel=1e-7)


@pytest.mark.parametrize(
    ("a", "b", "level", "expected"), [(1, 20, 0.95, 1 - 0.05 ** (1 / 20)), (7, 1, 0.3, 0.3 ** (1 / 7))]
)
def test_beta_quantiles_in_closed_form(a: float, b: float, level: float, expected: float) -> None:
    assert beta_quantile(level, a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.999, 1.0])
def test_quantiles_interpolate_as_numpy_does(fraction: float) -> None:
    for size in (1, 2, 999, 1000):
        values = np.sort(np.random.default_rng(size).standard_normal(size))
        assert quantile(values, fraction) == pytest.approx(np.quantile(values, fraction), abs=1e-12)


def _t_distribution(x: float, degrees: int) -> float:
    """The distribution function by plain integration of the density."""
    grid = np.linspace(0, x, 200_001)
    density = (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    area = float(np.trapezoid(density, grid))
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    return 0.5 + math.exp(log_scale) * area


@pytest.mark.parametrize("degrees", [7, 11, 39, 1000])
@pytest.mark.parametrize("level", [0.95, 0.975])
def test_students_t(level: float, degrees: int) -> None:
    assert _t_distribution(student(level, degrees), degrees) == pytest.approx(level, abs=2e-4)
