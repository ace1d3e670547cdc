"""The searches of ``bamba_quant.codecs.search`` on lanes, each of which walks through its group as C would.

A group is ``n`` rows of a tile from row ``at``. Where numpy keeps the best integers, these return the
numbers that made them: recomputing the integers once costs less than keeping them at every step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import largest, nearest_clipped, nearest_int, ratio
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    any_lane,
    at_most,
    complement,
    floats,
    load,
    magnitude,
    negative,
    square_root,
    store,
    to_floats,
    where,
)
from bamba_quant.codecs.compiled.tiles import scratch
from bamba_quant.codecs.search import GROUP_MAX_EPS, SWEEPS


@inlined
def square_sum(x: Any, n: int) -> Any:
    """x[0]² + x[1]² + … in that order."""
    total = floats(0)
    for i in range(n):
        total = total + load(x, i) * load(x, i)
    return total


@inlined
def weigh(x: Any, n: int, sigma2: Any, w: Any) -> None:
    """Importance in w becomes importance·√(σ² + x²)."""
    for i in range(n):
        store(w, i, load(w, i) * square_root(sigma2 + load(x, i) * load(x, i)))


@inlined
def fit_qx(x: Any, at: int, n: int, nmax: int, spans: Any, w: Any, w_at: int) -> Any:
    """make_qx_quants (ggml-quants.c:628): scale, the inverse that gives the integers, and a mask.

    The last is a mask of the groups below 1e-15: scale 0, and integers that are 0 with nmax included.
    """
    greatest = largest(x, at, n)
    iscale = float(-nmax) / greatest
    sumlx, suml2 = _qx_sums(x, at, n, nmax, iscale, w, w_at)
    scale = where(suml2 != 0, sumlx / suml2, 0)
    best = scale * sumlx
    for i in range(spans.size):
        step = negative(floats(spans[i])) / greatest
        sumlx, suml2 = _qx_sums(x, at, n, nmax, step, w, w_at)
        better = (suml2 > 0) & (sumlx * sumlx > best * suml2)
        iscale = where(better, step, iscale)
        scale = where(better, sumlx / suml2, scale)
        best = where(better, scale * sumlx, best)
    tiny = magnitude(greatest) < GROUP_MAX_EPS
    return where(tiny, 0, scale), iscale, tiny


@inlined
def _qx_sums(x: Any, at: int, n: int, nmax: int, iscale: Any, w: Any, w_at: int) -> Any:
    sumlx, suml2 = floats(0), floats(0)
    for i in range(n):
        value, weight = load(x, at + i), load(w, w_at + i)
        q = nearest_clipped(iscale * value, -nmax, nmax - 1)
        sumlx = sumlx + weight * value * q
        suml2 = suml2 + weight * q * q
    return sumlx, suml2


@inlined
def fit_q3(x: Any, groups: int, n: int, nmax: int, L: Any, scales: Any) -> None:
    """make_q3_quants (ggml-quants.c:697) of successive groups: a scale each, and in L the integers plus nmax.

    The sweeps visit element i of every group before element i + 1 of any: within a group each move waits
    for the one before it, so only other groups can fill the time. Groups that a sweep left alone are done.
    """
    sums = scratch(2 * groups)
    active = np.empty(groups, np.intp)
    moved = np.empty(groups, np.bool_)
    for g in range(groups):
        iscale = float(-nmax) / largest(x, g * n, n)
        sumlx, suml2 = floats(0), floats(0)
        for i in range(g * n, g * n + n):
            value = load(x, i)
            w = value * value
            q = nearest_clipped(iscale * value, -nmax, nmax - 1)
            store(L, i, q)
            sumlx = sumlx + w * value * q
            suml2 = suml2 + w * q * q
        store(sums, 2 * g, sumlx)
        store(sums, 2 * g + 1, suml2)
        active[g] = g
    n_active = groups
    for _ in range(SWEEPS):
        moved[:] = False
        for i in range(n):
            for k in range(n_active):
                g = active[k]
                sumlx, suml2 = load(sums, 2 * g), load(sums, 2 * g + 1)
                value, kept = load(x, g * n + i), load(L, g * n + i)
                w = value * value
                slx = sumlx - w * value * kept
                sl2 = suml2 - w * kept * kept
                q = nearest_clipped(value * sl2 / slx, -nmax, nmax - 1)
                moves = (slx > 0) & (q != kept)
                slx = slx + w * value * q
                sl2 = sl2 + w * q * q
                moves = moves & (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
                store(L, g * n + i, where(moves, q, kept))
                store(sums, 2 * g, where(moves, slx, sumlx))
                store(sums, 2 * g + 1, where(moves, sl2, suml2))
                moved[g] |= any_lane(moves)
        still = 0
        for k in range(n_active):
            if moved[active[k]]:
                active[still] = active[k]
                still += 1
        n_active = still
    for g in range(groups):
        tiny = magnitude(largest(x, g * n, n)) < GROUP_MAX_EPS
        store(scales, g, where(tiny, 0, ratio(load(sums, 2 * g), load(sums, 2 * g + 1))))
        for i in range(g * n, g * n + n):
            store(L, i, where(tiny, 0, load(L, i) + nmax))


@inlined
def fit_qkx(
    x: Any, at: int, n: int, nmax: int, spans: Any, absolute: bool, w: Any, w_at: int, trial: Any
) -> Any:
    """make_qkx2/3_quants (ggml-quants.c:799, :993): scale, minimum, and inverse and origin of the integers.

    The integers are round(inverse·(x - origin)). A group of one value has scale, inverse and origin 0.
    ``trial`` is scratch of n rows.
    """
    low = load(x, at)
    high, sum_w = low, load(w, w_at)
    sum_x = sum_w * low
    for i in range(1, n):
        value, weight = load(x, at + i), load(w, w_at + i)
        low = where(value < low, value, low)
        high = where(value > high, value, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * value
    low = where(low > 0, 0, low)
    flat = high == low
    origin, inverse = low, floats(nmax) / (high - low)
    scale = 1 / inverse
    best = floats(0)
    for i in range(n):
        value = load(x, at + i)
        difference = scale * nearest_clipped(inverse * (value - low), 0, nmax) + low - value
        best = best + load(w, w_at + i) * (magnitude(difference) if absolute else difference * difference)
    for s in range(spans.size):
        step = floats(spans[s]) / (high - low)
        sum_l, sum_l2, sum_xl = floats(0), floats(0), floats(0)
        for i in range(n):
            value = load(x, at + i)
            q = nearest_clipped(step * (value - low), 0, nmax)
            store(trial, i, q)
            wq = load(w, w_at + i) * q
            sum_l = sum_l + wq
            sum_l2 = sum_l2 + wq * q
            sum_xl = sum_xl + wq * value
        D = sum_w * sum_l2 - sum_l * sum_l
        step_scale = (sum_w * sum_xl - sum_x * sum_l) / D
        step_low = (sum_l2 * sum_x - sum_l * sum_xl) / D
        above = step_low > 0
        step_scale = where(above, sum_xl / sum_l2, step_scale)
        step_low = where(above, 0, step_low)
        error = floats(0)
        for i in range(n):
            difference = step_scale * load(trial, i) + step_low - load(x, at + i)
            error = error + load(w, w_at + i) * (
                magnitude(difference) if absolute else difference * difference
            )
        better = (D > 0) & (error < best) & complement(flat)
        origin, inverse = where(better, low, origin), where(better, step, inverse)
        best = where(better, error, best)
        scale = where(better, step_scale, scale)
        low = where(better, step_low, low)
    return where(flat, 0, scale), low, where(flat, 0, inverse), where(flat, 0, origin)


@inlined
def fit_qp(x: Any, n: int, nmax: int, spans: Any, w: Any, L: Any) -> Any:
    """make_qp_quants (ggml-quants.c:1076) of the first n rows: scale; L receives the integers, wrapped to uint8."""
    greatest = floats(0)
    for i in range(n):
        greatest = where(greatest > load(x, i), greatest, load(x, i))
    inverse = floats(nmax) / greatest
    scale = 1 / inverse
    best = floats(0)
    for i in range(n):
        difference = load(x, i) - scale * to_floats(nearest_int(inverse * load(x, i)) & 255)
        best = best + load(w, i) * difference * difference
    for s in range(spans.size):
        step = floats(spans[s]) / greatest
        scale = 1 / step
        error = floats(0)
        for i in range(n):
            difference = load(x, i) - scale * to_floats(at_most(nearest_int(step * load(x, i)), nmax))
            error = error + load(w, i) * difference * difference
        better = error < best
        best = where(better, error, best)
        inverse = where(better, step, inverse)
    sumlx, suml2 = floats(0), floats(0)
    for i in range(n):
        value, weight = load(x, i), load(w, i)
        kept = at_most(nearest_int(inverse * value), nmax)
        q = to_floats(kept)
        store(L, i, to_floats(kept & 255))
        sumlx = sumlx + weight * value * q
        suml2 = suml2 + weight * q * q
    for _ in range(SWEEPS):
        moved = False
        for i in range(n):
            value, weight, old = load(x, i), load(w, i), load(L, i)
            slx = sumlx - weight * value * old
            sl2 = suml2 - weight * old * old
            kept = at_most(nearest_int(value * sl2 / slx), nmax)
            q = to_floats(kept)
            moves = (slx > 0) & (sl2 > 0) & (q != old)
            slx = slx + weight * value * q
            sl2 = sl2 + weight * q * q
            moves = moves & (slx * slx * suml2 > sumlx * sumlx * sl2)
            store(L, i, where(moves, to_floats(kept & 255), old))
            sumlx, suml2 = where(moves, slx, sumlx), where(moves, sl2, suml2)
            moved |= any_lane(moves)
        if not moved:
            break
    tiny = greatest < GROUP_MAX_EPS
    for i in range(n):
        store(L, i, where(tiny, 0, load(L, i)))
    return where(tiny, 0, ratio(sumlx, suml2))
