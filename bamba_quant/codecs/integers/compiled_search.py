"""Scale and zero of groups on lanes: the compiled version of ``integers.search``, a group a lane."""

from __future__ import annotations

from typing import Any

import numpy as np

from bamba_quant.codecs.compiled.arithmetic import MAGIC, nearest_clipped
from bamba_quant.codecs.compiled.compilation import inlined
from bamba_quant.codecs.compiled.lanes import (
    at_least,
    at_most,
    bits_of,
    floats,
    from_bits,
    fused,
    load,
    negative,
    store,
    where,
)
from bamba_quant.codecs.integers.search import EPSILON, TOGETHER

# Kinds of zero, as numbers: numba compiles a kernel for each and leaves the other branches out.
NONE, INTEGER, FLOAT = range(3)
ZEROS = {"none": NONE, "integer": INTEGER, "float": FLOAT}
# Rows of the scratch that holds the best parameters so far.
SCALE, ZERO, _ERROR, _BELOW, _ABOVE = range(5)
ROWS_OF_BEST = 5
_INFINITY = np.float32(np.inf)


@inlined
def bfloat16(v: Any) -> Any:
    """The nearest bfloat16 of float32 numbers, half to even."""
    bits = bits_of(v)
    return from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)


@inlined
def _weighted(w: Any, i: int, v: Any) -> Any:
    if w is None:
        return v
    return load(w, i) * v


@inlined
def _usable(scale: Any) -> Any:
    return where(scale == 0, EPSILON, scale)


@inlined
def _span(low: Any, high: Any, bits: int, zero_kind: int) -> Any:
    """``search.span``."""
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    exact = (high - low) / float(highest - lowest)
    scale = _usable(bfloat16(exact))
    if zero_kind == FLOAT:
        return scale, bfloat16(low - scale * float(lowest))
    zero = floats(lowest) - low / exact
    zero = where(zero < lowest, lowest, zero)
    zero = where(zero > highest, highest, zero)
    return scale, where(exact == 0, 0, nearest_clipped(zero, lowest, highest))


@inlined
def fit(
    tile: Any,
    w: Any,
    n: int,
    bits: int,
    zero_kind: int,
    effort: int,
    trials: Any,
    first_trials: int,
    best: Any,
) -> Any:
    """Scale and zero of each lane: ``rtn`` for effort 0, ``mse`` for 1, ``hqq`` for 2."""
    low = load(tile, 0)
    high = low
    for i in range(1, n):
        value = load(tile, i)
        low, high = where(value < low, value, low), where(value > high, value, high)
    if zero_kind == INTEGER:
        low, high = where(low > 0, 0, low), where(high < 0, 0, high)
    greatest = where(negative(low) > high, negative(low), high)
    scale, zero = floats(0), floats(0)
    if zero_kind == NONE:
        scale = _usable(bfloat16(greatest / (((1 << bits) - 1) / 2)))
    else:
        scale, zero = _span(low, high, bits, zero_kind)
    if effort == 0:
        return scale, zero
    per_scale = 1 / scale
    store(best, SCALE, scale)
    store(best, ZERO, zero)
    store(best, _ERROR, floats(_INFINITY))
    store(best, _BELOW, floats(1))
    store(best, _ABOVE, floats(1))
    _take(best, scale, zero, _error(tile, w, n, bits, zero_kind, scale, zero), per_scale, zero_kind)
    if zero_kind == NONE:
        widest = greatest if effort == 1 else where(negative(low) > high, negative(low), negative(high))
        low = widest / float(1 << (bits - 1))
    _search(tile, w, n, bits, zero_kind, low, high, per_scale, trials, first_trials, best)
    if effort == 2:
        scale, zero = _refit(tile, w, n, bits, zero_kind, load(best, SCALE), load(best, ZERO))
        scale = where(load(best, _ERROR) < _INFINITY, scale, 0)
        _take(best, scale, zero, _error(tile, w, n, bits, zero_kind, scale, zero), per_scale, zero_kind)
    return load(best, SCALE), load(best, ZERO)


@inlined
def _trial(low: Any, high: Any, below: Any, above: Any, bits: int, zero_kind: int) -> Any:
    """Scale and zero for fractions of a range; of a symmetric one ``low`` is the scale."""
    if zero_kind == NONE:
        return bfloat16(low * below), floats(0)
    return _span(low * below, high * above, bits, zero_kind)


@inlined
def _search(
    tile: Any,
    w: Any,
    n: int,
    bits: int,
    zero_kind: int,
    low: Any,
    high: Any,
    per_scale: Any,
    trials: Any,
    first_trials: int,
    best: Any,
) -> None:
    """``search._search``, TOGETHER trials at a time, which share the reads of the tile."""
    below, above = floats(0), floats(0)
    for k in range(0, trials.size, 2 * TOGETHER):
        if k == first_trials:
            below, above = load(best, _BELOW), load(best, _ABOVE)
        below0, above0 = below + trials[k], above + trials[k + 1]
        below1, above1 = below + trials[k + 2], above + trials[k + 3]
        below2, above2 = below + trials[k + 4], above + trials[k + 5]
        below3, above3 = below + trials[k + 6], above + trials[k + 7]
        scale0, zero0 = _trial(low, high, below0, above0, bits, zero_kind)
        scale1, zero1 = _trial(low, high, below1, above1, bits, zero_kind)
        scale2, zero2 = _trial(low, high, below2, above2, bits, zero_kind)
        scale3, zero3 = _trial(low, high, below3, above3, bits, zero_kind)
        inverse0, inverse1, inverse2, inverse3 = 1 / scale0, 1 / scale1, 1 / scale2, 1 / scale3
        error0, error1, error2, error3 = floats(0), floats(0), floats(0), floats(0)
        for i in range(n):
            value = load(tile, i)
            error0 = error0 + _weighted(w, i, _loss(value, inverse0, zero0, bits, zero_kind))
            error1 = error1 + _weighted(w, i, _loss(value, inverse1, zero1, bits, zero_kind))
            error2 = error2 + _weighted(w, i, _loss(value, inverse2, zero2, bits, zero_kind))
            error3 = error3 + _weighted(w, i, _loss(value, inverse3, zero3, bits, zero_kind))
        _take_range(best, _take(best, scale0, zero0, error0, per_scale, zero_kind), below0, above0)
        _take_range(best, _take(best, scale1, zero1, error1, per_scale, zero_kind), below1, above1)
        _take_range(best, _take(best, scale2, zero2, error2, per_scale, zero_kind), below2, above2)
        _take_range(best, _take(best, scale3, zero3, error3, per_scale, zero_kind), below3, above3)


@inlined
def _take(best: Any, scale: Any, zero: Any, error: Any, per_scale: Any, zero_kind: int) -> Any:
    """Keep parameters in the lanes where their error is less; return which lanes these are."""
    relative = scale * per_scale
    relative_error = error * (relative * relative)
    usable = (scale != 0) if zero_kind == NONE else (scale > 0)
    better = (relative_error < load(best, _ERROR)) & usable
    store(best, SCALE, where(better, scale, load(best, SCALE)))
    store(best, ZERO, where(better, zero, load(best, ZERO)))
    store(best, _ERROR, where(better, relative_error, load(best, _ERROR)))
    return better


@inlined
def _take_range(best: Any, better: Any, below: Any, above: Any) -> None:
    store(best, _BELOW, where(better, below, load(best, _BELOW)))
    store(best, _ABOVE, where(better, above, load(best, _ABOVE)))


@inlined
def _start(value: Any, zero: Any, zero_kind: int) -> Any:
    return value - zero if zero_kind == FLOAT else value


@inlined
def _integer(start: Any, inverse: Any, zero: Any, bits: int, zero_kind: int) -> Any:
    """The nearest integer in range, less an integer zero, as a float.

    The sum with MAGIC rounds the exact product to whole numbers, and is cut to those there are before MAGIC leaves:
    as bits, which order as these numbers do and take any unit of the CPU. NaN, which no trial survives, becomes one.
    """
    least, most = MAGIC - float(1 << (bits - 1)), MAGIC + float((1 << (bits - 1)) - 1)
    low, high = floats(least), floats(most)
    if zero_kind == INTEGER:
        low, high = low - zero, high - zero
    sum_ = bits_of(fused(start, inverse, MAGIC))
    return from_bits(at_least(at_most(sum_, bits_of(high)), bits_of(low))) - MAGIC


@inlined
def _error(tile: Any, w: Any, n: int, bits: int, zero_kind: int, scale: Any, zero: Any) -> Any:
    inverse, error = 1 / scale, floats(0)
    for i in range(n):
        error = error + _weighted(w, i, _loss(load(tile, i), inverse, zero, bits, zero_kind))
    return error


@inlined
def _loss(value: Any, inverse: Any, zero: Any, bits: int, zero_kind: int) -> Any:
    """The squared error of an element, in steps."""
    start = _start(value, zero, zero_kind)
    rest = fused(start, inverse, negative(_integer(start, inverse, zero, bits, zero_kind)))
    return rest * rest


@inlined
def _refit(tile: Any, w: Any, n: int, bits: int, zero_kind: int, scale: Any, zero: Any) -> Any:
    """``search._refit``."""
    inverse = 1 / scale
    sum_qq, sum_qx, sum_w, sum_q, sum_x = floats(0), floats(0), floats(0), floats(0), floats(0)
    for i in range(n):
        value = load(tile, i)
        q = _integer(_start(value, zero, zero_kind), inverse, zero, bits, zero_kind)
        wq = _weighted(w, i, q)
        sum_qq = sum_qq + wq * q
        sum_qx = sum_qx + wq * value
        if zero_kind == FLOAT:
            sum_w = sum_w + _weighted(w, i, floats(1))
            sum_q = sum_q + wq
            sum_x = sum_x + _weighted(w, i, value)
    if zero_kind != FLOAT:
        return bfloat16(sum_qx / sum_qq), zero
    trial = bfloat16((sum_w * sum_qx - sum_q * sum_x) / (sum_w * sum_qq - sum_q * sum_q))
    return trial, bfloat16((sum_x - trial * sum_q) / sum_w)
