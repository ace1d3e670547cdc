"""The searches of ``bamba_quant.codecs.search`` in Triton: a thread walks through one group as C would.

A group is a tuple of tensors, one a weight, so that loops over it unroll and the group stays in registers.
The spans to try begin with nmax itself, ggml's starting point, so that one unrolled body serves all tries.
"""
# Triton reads this syntax otherwise: tuples grow by adding, and a name may change its type.
# mypy: disable-error-code="untyped-decorator, assignment, attr-defined"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from bamba_quant.codecs.cuda.arithmetic import largest, like, nearest_clipped, nearest_int, ratio

GROUP_MAX_EPS: tl.constexpr = tl.constexpr(1e-15)


@triton.jit
def serial_sum(rows: tl.tuple) -> tl.tensor:
    """rows[0] + rows[1] + … in that order."""
    total = like(rows[0], 0.0)
    for i in tl.static_range(len(rows)):
        total = total + rows[i]
    return total


@triton.jit
def squares(rows: tl.tuple) -> tl.tensor:
    products = ()
    for i in tl.static_range(len(rows)):
        products = products + (rows[i] * rows[i],)
    return products


@triton.jit
def weigh(rows: tl.tuple, importance: tl.tensor, sigma2: tl.tensor) -> tl.tensor:
    """importance·√(σ² + x²)."""
    weights = ()
    for i in tl.static_range(len(rows)):
        weights = weights + (importance[i] * tl.sqrt_rn(sigma2 + rows[i] * rows[i]),)
    return weights


@triton.jit
def fit_qx(x: tl.tuple, w: tl.tuple, spans: tl.tensor, NMAX: tl.constexpr) -> tl.tensor:
    """make_qx_quants (ggml-quants.c:628): scale, the inverse that the integers come from, and where not."""
    greatest = largest(x)
    inverse = like(greatest, 0.0)
    scale = like(greatest, 0.0)
    best = like(greatest, 0.0)
    for s in range(19):
        step = tl.div_rn(like(greatest, -tl.load(spans + s)), greatest)
        sumlx = like(greatest, 0.0)
        suml2 = like(greatest, 0.0)
        for i in tl.static_range(len(x)):
            q = nearest_clipped(step * x[i], -NMAX, NMAX - 1)
            sumlx = sumlx + w[i] * x[i] * q
            suml2 = suml2 + w[i] * q * q
        better = (s == 0) | ((suml2 > 0) & (sumlx * sumlx > best * suml2))
        inverse = tl.where(better, step, inverse)
        scale = tl.where(better, tl.where(suml2 != 0, tl.div_rn(sumlx, suml2), 0.0), scale)
        best = tl.where(better, scale * sumlx, best)
    tiny = tl.abs(greatest) < GROUP_MAX_EPS
    return tl.where(tiny, 0.0, scale), inverse, tiny


@triton.jit
def fit_q3(x: tl.tuple, NMAX: tl.constexpr) -> tl.tensor:
    """make_q3_quants (ggml-quants.c:697): scale and the integers, nmax included."""
    greatest = largest(x)
    inverse = tl.div_rn(like(greatest, -NMAX), greatest)
    sumlx = like(greatest, 0.0)
    suml2 = like(greatest, 0.0)
    L = ()
    for i in tl.static_range(len(x)):
        w = x[i] * x[i]
        q = nearest_clipped(inverse * x[i], -NMAX, NMAX - 1)
        sumlx = sumlx + w * x[i] * q
        suml2 = suml2 + w * q * q
        L = L + (q,)
    for _ in range(5):
        swept = ()
        for i in tl.static_range(len(x)):
            w = x[i] * x[i]
            slx = sumlx - w * x[i] * L[i]
            sl2 = suml2 - w * L[i] * L[i]
            q = nearest_clipped(tl.div_rn(x[i] * sl2, slx), -NMAX, NMAX - 1)
            moves = (slx > 0) & (q != L[i])
            slx = slx + w * x[i] * q
            sl2 = sl2 + w * q * q
            moves = moves & (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            swept = swept + (tl.where(moves, q, L[i]),)
            sumlx = tl.where(moves, slx, sumlx)
            suml2 = tl.where(moves, sl2, suml2)
        L = swept
    tiny = tl.abs(greatest) < GROUP_MAX_EPS
    integers = ()
    for i in tl.static_range(len(x)):
        integers = integers + (tl.where(tiny, 0.0, L[i] + NMAX),)
    return tl.where(tiny, 0.0, ratio(sumlx, suml2)), integers


@triton.jit
def fit_qkx(
    x: tl.tuple, w: tl.tuple, spans: tl.tensor, n_spans: tl.tensor, NMAX: tl.constexpr, ABSOLUTE: tl.constexpr
) -> tl.tensor:
    """make_qkx2/3_quants (ggml-quants.c:799, :993): scale, minimum, and inverse and origin of the integers.

    The integers are round(inverse·(x - origin)). A group of one value has scale, inverse and origin 0.
    """
    low = x[0]
    high = x[0]
    sum_w = w[0]
    sum_x = w[0] * x[0]
    for i in tl.static_range(1, len(x)):
        low = tl.where(x[i] < low, x[i], low)
        high = tl.where(x[i] > high, x[i], high)
        sum_w = sum_w + w[i]
        sum_x = sum_x + w[i] * x[i]
    low = tl.where(low > 0, 0.0, low)
    flat = high == low
    origin = low
    inverse = like(low, 0.0)
    scale = like(low, 0.0)
    best = like(low, 0.0)
    for s in range(n_spans):
        first = s == 0
        step = tl.div_rn(like(low, tl.load(spans + s)), high - low)
        sum_l = like(low, 0.0)
        sum_l2 = like(low, 0.0)
        sum_xl = like(low, 0.0)
        for i in tl.static_range(len(x)):
            q = nearest_clipped(step * (x[i] - low), 0, NMAX)
            wq = w[i] * q
            sum_l = sum_l + wq
            sum_l2 = sum_l2 + wq * q
            sum_xl = sum_xl + wq * x[i]
        D = sum_w * sum_l2 - sum_l * sum_l
        step_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, D)
        step_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, D)
        above = step_low > 0
        step_scale = tl.where(above, tl.div_rn(sum_xl, sum_l2), step_scale)
        step_scale = tl.where(first, tl.div_rn(like(low, 1.0), step), step_scale)
        step_low = tl.where(first, low, tl.where(above, 0.0, step_low))
        error = like(low, 0.0)
        for i in tl.static_range(len(x)):
            difference = step_scale * nearest_clipped(step * (x[i] - low), 0, NMAX) + step_low - x[i]
            error = error + w[i] * (tl.abs(difference) if ABSOLUTE else difference * difference)
        better = first | ((D > 0) & (error < best) & ~flat)
        origin = tl.where(better, low, origin)
        inverse = tl.where(better, step, inverse)
        best = tl.where(better, error, best)
        scale = tl.where(better, step_scale, scale)
        low = tl.where(better, step_low, low)
    return tl.where(flat, 0.0, scale), low, tl.where(flat, 0.0, inverse), tl.where(flat, 0.0, origin)


@triton.jit
def fit_qp(x: tl.tuple, w: tl.tuple, spans: tl.tensor, NMAX: tl.constexpr) -> tl.tensor:
    """make_qp_quants (ggml-quants.c:1076): scale, and the integers as a uint8 keeps them."""
    greatest = like(x[0], 0.0)
    for i in tl.static_range(len(x)):
        greatest = tl.where(greatest > x[i], greatest, x[i])
    inverse = tl.div_rn(like(greatest, NMAX), greatest)
    scale = tl.div_rn(like(greatest, 1.0), inverse)
    best = like(greatest, 0.0)
    for i in tl.static_range(len(x)):
        difference = x[i] - scale * (nearest_int(inverse * x[i]) & 255).to(tl.float32)
        best = best + w[i] * difference * difference
    for s in range(8):
        step = tl.div_rn(like(greatest, tl.load(spans + s)), greatest)
        scale = tl.div_rn(like(greatest, 1.0), step)
        error = like(greatest, 0.0)
        for i in tl.static_range(len(x)):
            difference = x[i] - scale * tl.minimum(nearest_int(step * x[i]), NMAX).to(tl.float32)
            error = error + w[i] * difference * difference
        better = error < best
        best = tl.where(better, error, best)
        inverse = tl.where(better, step, inverse)
    sumlx = like(greatest, 0.0)
    suml2 = like(greatest, 0.0)
    L = ()
    for i in tl.static_range(len(x)):
        kept = tl.minimum(nearest_int(inverse * x[i]), NMAX)
        q = kept.to(tl.float32)
        sumlx = sumlx + w[i] * x[i] * q
        suml2 = suml2 + w[i] * q * q
        L = L + ((kept & 255).to(tl.float32),)
    for _ in range(5):
        swept = ()
        for i in tl.static_range(len(x)):
            slx = sumlx - w[i] * x[i] * L[i]
            sl2 = suml2 - w[i] * L[i] * L[i]
            kept = tl.minimum(nearest_int(tl.div_rn(x[i] * sl2, slx)), NMAX)
            q = kept.to(tl.float32)
            moves = (slx > 0) & (sl2 > 0) & (q != L[i])
            slx = slx + w[i] * x[i] * q
            sl2 = sl2 + w[i] * q * q
            moves = moves & (slx * slx * suml2 > sumlx * sumlx * sl2)
            swept = swept + (tl.where(moves, (kept & 255).to(tl.float32), L[i]),)
            sumlx = tl.where(moves, slx, sumlx)
            suml2 = tl.where(moves, sl2, suml2)
        L = swept
    tiny = greatest < GROUP_MAX_EPS
    integers = ()
    for i in tl.static_range(len(x)):
        integers = integers + (tl.where(tiny, 0.0, L[i]),)
    return tl.where(tiny, 0.0, ratio(sumlx, suml2)), integers
