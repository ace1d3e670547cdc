"""llama-perplexity's statistics once more, token by token in plain Python, from two sets of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def table(base: np.ndarray, candidate: np.ndarray, targets: Sequence[int]) -> dict[str, float]:
    """The figures of logits (T, V) before the tokens ``targets``, under the keys of ``FIGURES``; errors as "± key"."""
    nll, nll_base, kld, delta_p, same = [], [], [], [], 0
    for row, row_base, target in zip(candidate, base, targets, strict=True):
        log_p, log_p_base = _log_softmax(row), _log_softmax(row_base)
        nll.append(-log_p[target])
        nll_base.append(-log_p_base[target])
        kld.append(math.fsum(math.exp(b) * (b - a) for a, b in zip(log_p, log_p_base, strict=True)))
        delta_p.append(math.exp(log_p[target]) - math.exp(log_p_base[target]))
        same += _first_greatest(row) == _first_greatest(row_base)
    n = len(targets)
    (a, error_a), (b, error_b) = _mean(nll), _mean(nll_base)
    covariance = (math.fsum(x * y for x, y in zip(nll, nll_base, strict=True)) / n - a * b) / (n - 1)
    ratio_error = math.sqrt(error_a**2 + error_b**2 - 2 * covariance)
    square, square_error = _mean([d * d for d in delta_p])
    found = {
        "ppl": math.exp(a),
        "± ppl": math.exp(a) * error_a,
        "ppl_base": math.exp(b),
        "± ppl_base": math.exp(b) * error_b,
        "correlation": covariance / (error_a * error_b),
        "ln_ppl_ratio": a - b,
        "± ln_ppl_ratio": ratio_error,
        "ppl_ratio": math.exp(a - b),
        "± ppl_ratio": math.exp(a - b) * ratio_error,
        "ppl_difference": math.exp(a) - math.exp(b),
        "± ppl_difference": math.sqrt(
            (math.exp(a) * error_a) ** 2 + (math.exp(b) * error_b) ** 2 - 2 * math.exp(a) * math.exp(b) * covariance
        ),
        "kld_mean": _mean(kld)[0],
        "± kld_mean": _mean(kld)[1],
        "delta_p_mean": _mean(delta_p)[0],
        "± delta_p_mean": _mean(delta_p)[1],
        "delta_p_rms": math.sqrt(square),
        "± delta_p_rms": 0.5 / math.sqrt(square) * square_error,
        "same_top": same / n,
        "± same_top": math.sqrt(same / n * (1 - same / n) / (n - 1)),
    }  # fmt: skip
    shares = {"99_9": 0.999, "99": 0.99, "95": 0.95, "90": 0.9, "10": 0.1, "5": 0.05, "1": 0.01, "0_1": 0.001}
    for name, values in (("kld", sorted(kld)), ("delta_p", sorted(delta_p))):
        found |= {f"{name}_max": values[-1], f"{name}_min": values[0]}
        found[f"{name}_median"] = (values[(n - 1) // 2] + values[n // 2]) / 2
        found |= {f"{name}_{key}": _percentile(values, share) for key, share in shares.items()}
    found["delta_p_75"], found["delta_p_25"] = (_percentile(sorted(delta_p), share) for share in (0.75, 0.25))
    return found


def _log_softmax(row: np.ndarray) -> list[float]:
    greatest = float(row.max())
    total = math.log(math.fsum(math.exp(float(x) - greatest) for x in row))
    return [float(x) - greatest - total for x in row]


def _first_greatest(row: np.ndarray) -> int:
    return row.tolist().index(row.max())


def _mean(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt((math.fsum(v * v for v in values) / n - mean * mean) / (n - 1))


def _percentile(values: Sequence[float], fraction: float) -> float:
    place = fraction * (len(values) - 1)
    below = math.floor(place)
    return (1 - (place - below)) * values[below] + (place - below) * values[min(below + 1, len(values) - 1)]
