"""Scores of tokens to the figures of a candidate: values, llama-perplexity's own errors, and intervals over chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bamba_quant.evaluation import intervals
from bamba_quant.evaluation.intervals import F64, Bounds
from bamba_quant.evaluation.result import FIGURES, ChunkMeans, Figure, Flips, Histogram
from bamba_quant.evaluation.scores import TOP, Scores

QUANTILES = {
    "99_9": 0.999, "99": 0.99, "95": 0.95, "90": 0.9, "75": 0.75, "median": 0.5, "25": 0.25, "10": 0.1, "5": 0.05,
    "1": 0.01, "0_1": 0.001,
}  # fmt: skip

KLD_EDGES = 10.0 ** np.linspace(-8, 2, 61)
DELTA_P_EDGES = np.linspace(-1, 1, 81)


@dataclass(frozen=True)
class Mean:
    """A figure of means over tokens of what ``columns`` names, with its gradient for the intervals."""

    columns: tuple[str, ...]
    smooth: intervals.SmoothStatistic


# Shares of tokens. No exception in a text does not mean that there is none in general.
SHARES = ("same_top", "top_5_overlap", "flips")


def _one(column: str, shown: intervals.Display = intervals.identity) -> Mean:
    return Mean((column,), intervals.SmoothStatistic(lambda m: m[..., 0], np.ones_like, shown))


def _correlation(m: F64) -> F64:
    a, b, a2, b2, ab = np.moveaxis(m, -1, 0)
    spread = np.sqrt(np.maximum(a2 - a * a, 0) * np.maximum(b2 - b * b, 0))
    r: F64 = np.divide(ab - a * b, spread, out=np.ones_like(spread), where=spread > 0)
    return r


def _correlation_gradient(m: F64) -> F64:
    a, b, a2, b2, ab = np.moveaxis(m, -1, 0)
    va, vb = np.maximum(a2 - a * a, 1e-300), np.maximum(b2 - b * b, 1e-300)
    spread = np.sqrt(va * vb)
    r = (ab - a * b) / spread
    return np.stack(
        [-b / spread + r * a / va, -a / spread + r * b / vb, -r / (2 * va), -r / (2 * vb), 1 / spread],
        axis=-1,
    )


# Perplexities and roots are increasing functions of a statistic, so intervals are converted with them.
MEANS: Mapping[str, Mean] = {
    "ppl": _one("nll", np.exp),
    "ppl_base": _one("nll_base", np.exp),
    "correlation": Mean(
        ("nll", "nll_base", "nll²", "nll_base²", "nll·nll_base"),
        intervals.SmoothStatistic(_correlation, _correlation_gradient),
    ),
    "ln_ppl_ratio": _one("nll - nll_base"),
    "ppl_ratio": _one("nll - nll_base", np.exp),
    "ppl_difference": Mean(
        ("nll", "nll_base"),
        intervals.SmoothStatistic(
            lambda m: np.exp(m[..., 0]) - np.exp(m[..., 1]),
            lambda m: np.stack([np.exp(m[..., 0]), -np.exp(m[..., 1])], axis=-1),
        ),
    ),
    "kld_mean": _one("kld"),
    "delta_p_mean": _one("delta_p"),
    "delta_p_rms": _one("delta_p²", lambda mean: np.sqrt(np.maximum(mean, 0))),
    "same_top": _one("same_top"),
    "top_5_overlap": _one("overlap"),
    "flips": _one("flips"),
    "accuracy_difference": _one("gain"),
}


def values(scores: Scores) -> dict[str, float]:
    """Every figure of ``FIGURES``, in its order, without intervals."""
    columns, ordered = _columns(scores), _ordered(scores)
    found = {}
    for key, mean in MEANS.items():
        means = _columns_of_mean(columns, mean).mean((0, 1))  # (k,)
        found[key] = float(mean.smooth.shown(mean.smooth.statistic(means)))
    for key in FIGURES:
        if key not in found:
            found[key] = _order_statistic(ordered, key)
    return {key: found[key] for key in FIGURES}


def figures(
    scores: Scores, bootstrap: intervals.Bootstrap, floors: Mapping[str, float] | None
) -> dict[str, Figure]:
    """Every figure of ``FIGURES``, in its order, with its intervals, errors and noise floor."""
    columns = _columns(scores)
    errors = naive_errors(scores)
    found: dict[str, Figure] = {}
    for key, value in values(scores).items():
        if key in MEANS:
            bounds = _share_bounds(key, columns) or _smooth_bounds(key, columns, bootstrap)
        else:
            bounds = _quantile_bounds(scores, key)
        found[key] = Figure(
            value,
            **(vars(bounds) if bounds else dict.fromkeys(("low", "high", "lower", "upper"))),
            naive_error=errors.get(key),
            floor=floors[key] if floors else None,
        )
    return found


def _smooth_bounds(key: str, columns: Mapping[str, F64], bootstrap: intervals.Bootstrap) -> Bounds | None:
    mean = MEANS[key]
    return bootstrap.bounds(_columns_of_mean(columns, mean).mean(1), mean.smooth)


def _share_bounds(key: str, columns: Mapping[str, F64]) -> Bounds | None:
    """Bounds of a share with few exceptions, or of the difference of two such; None of every other figure."""
    tokens = columns["flips"].size
    if key in SHARES:
        shares = columns[MEANS[key].columns[0]].mean(1)
        return intervals.share_bounds(shares, tokens) if intervals.has_few_exceptions(shares) else None
    if key == "accuracy_difference" and intervals.has_few_exceptions(columns["flips"].mean(1)):
        gained, lost = (
            intervals.share_bounds(np.maximum(sign * columns["gain"], 0).mean(1), tokens) for sign in (1, -1)
        )
        return intervals.gain_bounds(gained, lost) if gained and lost else None
    return None


def least_tokens_for(key: str) -> int:
    """How many scored tokens it takes for an interval of a figure, given enough chunks."""
    return 0 if key in MEANS else intervals.least_tokens(QUANTILES[_split(key)[1]])


def naive_errors(scores: Scores) -> dict[str, float]:
    """What llama-perplexity prints behind ±, in the units of the figures: N tokens taken as independent."""
    a, b = scores.nll.ravel(), scores.nll_base.ravel()
    n = a.size
    if n < 2:
        return {}
    error_a, error_b = _error(a), _error(b)
    covariance = (float((a * b).mean()) - float(a.mean()) * float(b.mean())) / (n - 1)
    ppl, ppl_base = math.exp(a.mean()), math.exp(b.mean())
    ln_ratio = math.sqrt(max(0.0, error_a**2 + error_b**2 - 2 * covariance))
    p = float(scores.same_top.mean())
    square = np.square(scores.delta_p)
    rms = math.sqrt(float(square.mean()))
    return {
        "ppl": ppl * error_a,
        "ppl_base": ppl_base * error_b,
        "ln_ppl_ratio": ln_ratio,
        "ppl_ratio": math.exp(a.mean() - b.mean()) * ln_ratio,
        "ppl_difference": math.sqrt(
            max(0.0, (ppl * error_a) ** 2 + (ppl_base * error_b) ** 2 - 2 * ppl * ppl_base * covariance)
        ),
        "kld_mean": _error(scores.kld),
        "delta_p_mean": _error(scores.delta_p),
        "delta_p_rms": 0.5 / rms * _error(square) if rms else 0.0,
        "same_top": math.sqrt(p * (1 - p) / (n - 1)),
    }


def flips(scores: Scores) -> Flips:
    """Right predictions lost and gained."""
    return mcnemar(
        int((scores.right_base & ~scores.right).sum()), int((scores.right & ~scores.right_base).sum())
    )


def mcnemar(lost: int, gained: int) -> Flips:
    """The exact two-sided binomial test of lost against gained (McNemar 1947)."""
    n, least = lost + gained, min(lost, gained)
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(least + 1)
    )
    return Flips(lost, gained, min(1.0, 2 * tail))


def chunk_means(scores: Scores) -> ChunkMeans:
    """Means over each chunk's tokens."""
    return ChunkMeans(
        *(
            tuple(np.asarray(column, np.float64).mean(1).tolist())
            for column in (scores.nll_base, scores.nll, scores.kld, scores.delta_p, scores.same_top)
        )
    )


def histogram(of: F64, edges: F64) -> Histogram:
    """How many of ``of`` lie between neighbouring edges, and outside all."""
    counts, _ = np.histogram(of, edges)
    return Histogram(
        tuple(edges.tolist()), tuple(counts.tolist()), int((of < edges[0]).sum()), int((of > edges[-1]).sum())
    )


def _columns(scores: Scores) -> dict[str, NDArray[np.float64]]:
    a, b = scores.nll, scores.nll_base
    right, right_base = scores.right.astype(np.float64), scores.right_base.astype(np.float64)
    return {
        "nll": a,
        "nll_base": b,
        "nll²": a * a,
        "nll_base²": b * b,
        "nll·nll_base": a * b,
        "nll - nll_base": a - b,
        "kld": scores.kld,
        "delta_p": scores.delta_p,
        "delta_p²": np.square(scores.delta_p),
        "same_top": scores.same_top.astype(np.float64),
        "overlap": scores.overlap / TOP,
        "flips": np.abs(right - right_base),
        "gain": right - right_base,
    }


def _columns_of_mean(columns: Mapping[str, F64], mean: Mean) -> F64:
    """(chunks, tokens, k)"""
    return np.stack([columns[name] for name in mean.columns], axis=-1)


def _ordered(scores: Scores) -> dict[str, F64]:
    return {"kld": np.sort(scores.kld, axis=None), "delta_p": np.sort(scores.delta_p, axis=None)}


def _split(key: str) -> tuple[str, str]:
    """A figure of a distribution: what is distributed, and which place in it."""
    of = "kld" if key.startswith("kld_") else "delta_p"
    return of, key.removeprefix(f"{of}_")


def _order_statistic(ordered: Mapping[str, F64], key: str) -> float:
    of, place = _split(key)
    if place in ("min", "max"):
        return float(ordered[of][0 if place == "min" else -1])
    return intervals.quantile(ordered[of], QUANTILES[place])


def _quantile_bounds(scores: Scores, key: str) -> Bounds | None:
    of, place = _split(key)
    return intervals.quantile_bounds(getattr(scores, of), QUANTILES[place]) if place in QUANTILES else None


def _error(of: F64) -> float:
    """The standard error of a mean of independent values."""
    return float(math.sqrt(max(0.0, float(of.var())) / (of.size - 1)))
