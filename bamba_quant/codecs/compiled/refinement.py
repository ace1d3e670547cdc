"""Moves the scales of quantized rows to the ones, among their neighbours, whose weighted squared error is least.

ggml's searches fit a group's scale as a real number and round it afterwards. Here every trial is a scale as the file
stores it, a lane each, with its codes rounded anew; then the block's floats are fitted to codes and scales by least
squares, and the trials begin again. A block keeps what ggml's search gave it where nothing is better.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numba import types

from bamba_quant.codecs.arrays import F32, U8
from bamba_quant.codecs.compiled.arithmetic import from_half, nearest_clipped, reciprocal, to_half
from bamba_quant.codecs.compiled.compilation import compile_kernel, inlined
from bamba_quant.codecs.compiled.lanes import LANES, floats, load, store, where
from bamba_quant.codecs.fields import FieldLayout

SWEEPS = 3
STARTS = (1.0, 0.97, 1.03)  # of the block's float, in parts of what it is
_FEW = 8  # with so few codes values shrink: then large weights count more, as ggml weighs them
_NEAR = LANES // 2  # a lane is a scale so many below its number
_MINIMA = 3  # minima tried on each side
_LEAST_STEPS = 1 / 64  # of a scale that is a float, in parts of it; finer where codes reach far


def refine(layout: FieldLayout, packed: U8, x: F32, importance: F32 | None) -> U8:
    """``packed`` (rows, row_bytes), which holds ``x`` (rows, columns), with scales and codes of no greater error.

    The error is Σ importance·(x - what is stored)², of each block; without ``importance`` (columns,) all count alike.
    Of formats of at most 8 codes each square also counts by √(2·mean x² + x²), as in ggml's searches.
    Rows are independent, and any number of threads may refine at once.
    """
    found = layout.unpack(packed)
    rows, columns = x.shape
    groups = columns // layout.group
    values = _values(layout)
    first = 0 if layout.table is not None else layout.codes[0]
    codes = found.codes.astype(np.int32) - first
    d = found.d.astype(np.float32)
    scales = np.ones((rows, groups), np.int32) if found.scales is None else found.scales.astype(np.int32)
    dmin = np.zeros_like(d) if found.dmin is None else found.dmin.astype(np.float32)
    minima = np.ones((rows, groups), np.int32) if found.minima is None else found.minima.astype(np.int32)
    weights = np.ones(columns, np.float32) if importance is None else importance
    scales_within, minima_within = layout.scales or (1, 1), layout.minima or (1, 1)
    _compiled(layout.table is not None, found.scales is not None, found.dmin is not None)(
        np.require(x, np.float32, ["C", "A"]),
        np.require(weights, np.float32, ["C", "A"]),
        values,
        codes,
        d,
        scales,
        dmin,
        minima,
        np.array([layout.block, layout.group, *scales_within, *minima_within], np.int64),
    )
    parts = {"codes": codes + first, "d": d, "scales": scales, "dmin": dmin, "minima": minima}
    there = {name: part for name, part in vars(found).items() if part is not None}
    return layout.pack(
        replace(found, **{name: parts[name].astype(part.dtype) for name, part in there.items()})
    )


def _values(layout: FieldLayout) -> F32:
    """The values of the codes, in increasing order of the codes."""
    low, high = layout.codes
    values = np.arange(low, high + 1, dtype=np.float32) if layout.table is None else layout.table
    return np.ascontiguousarray(values, np.float32)


@cache
def _compiled(table: bool, coded: bool, offset: bool) -> Any:
    """The kernel for codes of a ``table``, scales that are ``coded`` as integers, and blocks with an ``offset``."""
    line = types.Array(types.float32, 1, "C", readonly=True)
    real, whole = types.Array(types.float32, 2, "C"), types.Array(types.int32, 2, "C")
    signature = types.void(
        types.Array(types.float32, 2, "C", readonly=True), line, line, whole, real, whole, real, whole,
        types.Array(types.int64, 1, "C", readonly=True),
    )  # fmt: skip

    def kernel(
        x: Any, w: Any, values: Any, codes: Any, d: Any, scales: Any, dmin: Any, minima: Any, geometry: Any
    ) -> None:
        _refine(x, w, values, codes, d, scales, dmin, minima, geometry, table, coded, offset)

    return compile_kernel(kernel, signature)


@inlined
def _refine(
    x: Any, importance: Any, values: Any, codes: Any, d: Any, scales: Any, dmin: Any, minima: Any, geometry: Any,
    table: bool, coded: bool, offset: bool,
) -> None:  # fmt: skip
    block, group, scale_low, scale_high = geometry[0], geometry[1], geometry[2], geometry[3]
    each, w = block // group, importance.copy()
    steps, errors = np.empty((1, LANES), np.float32), np.empty((1, LANES), np.float32)
    scale, minimum = np.empty(each, np.int32), np.empty(each, np.int32)
    kept_scale, kept_minimum = np.empty(each, np.int32), np.empty(each, np.int32)
    for row in range(x.shape[0]):
        for number in range(x.shape[1] // block):
            at, g0 = number * block, number * each
            if len(values) <= _FEW:
                _weigh(x, importance, row, at, block, w)
            kept_step, kept_low, first = d[row, number], dmin[row, number], np.float32(0)
            for g in range(each):
                kept_scale[g], kept_minimum[g] = scales[row, g0 + g], minima[row, g0 + g]
                steps[0, :] = kept_step * np.float32(kept_scale[g])
                lower = kept_low * np.float32(kept_minimum[g])
                _errors(x, w, values, row, at + g * group, group, steps, lower, table, errors)
                first += errors[0, 0]
            least = first
            for start in STARTS:
                step, low = _rounded_to_half(d[row, number] * np.float32(start), dmin[row, number], steps)
                for g in range(each):
                    near = int(np.rint(scales[row, g0 + g] / start)) if coded else 1
                    scale[g], minimum[g] = min(max(near, scale_low), scale_high), minima[row, g0 + g]
                for _ in range(SWEEPS):
                    total = np.float32(0)
                    for g in range(each):
                        error, scale[g], minimum[g], step = _nearby(
                            x, w, values, row, at + g * group, group, scale[g], minimum[g], step, low, geometry,
                            steps, errors, table, coded, offset,
                        )  # fmt: skip
                        total += error
                    if total < least:
                        least, kept_step, kept_low = total, step, low
                        kept_scale[:], kept_minimum[:] = scale, minimum
                    fitted = _fitted(x, w, values, row, at, group, scale, minimum, step, low, table, offset)
                    step, low = _rounded_to_half(fitted[0], fitted[1], steps)
            if least < first:
                d[row, number], dmin[row, number] = kept_step, kept_low
                for g in range(each):
                    scales[row, g0 + g], minima[row, g0 + g] = kept_scale[g], kept_minimum[g]
                    lower = kept_low * np.float32(kept_minimum[g])
                    one = kept_step * np.float32(kept_scale[g])
                    if one != 0:
                        for i in range(at + g * group, at + (g + 1) * group):
                            codes[row, i] = _code((x[row, i] + lower) / one, values, table)


@inlined
def _weigh(x: Any, importance: Any, row: int, at: int, block: int, w: Any) -> None:
    """Importance by √(2·mean x² + x²) of a block, into ``w``."""
    square = np.float32(0)
    for i in range(at, at + block):
        square += x[row, i] * x[row, i]
    square *= np.float32(2) / np.float32(block)
    for i in range(at, at + block):
        w[i] = importance[i] * np.sqrt(square + x[row, i] * x[row, i])


@inlined
def _rounded_to_half(step: Any, low: Any, scratch: Any) -> Any:
    """Both rounded to float16."""
    scratch[0, :] = step
    scratch[0, 1] = low
    store(scratch, 0, from_half(to_half(load(scratch, 0))))
    return scratch[0, 0], scratch[0, 1]


@inlined
def _nearby(
    x: Any, w: Any, values: Any, row: int, at: int, group: int, scale: Any, minimum: Any, step: Any, low: Any,
    geometry: Any, steps: Any, errors: Any, table: bool, coded: bool, offset: bool,
) -> Any:  # fmt: skip
    """The least error of a group with scales and minima around these, and the scale, minimum and d that give it."""
    spacing = min(_LEAST_STEPS, 0.5 / max(abs(values[0]), 1.0))
    least, best_scale, best_minimum, best_step = np.float32(np.inf), scale, minimum, step
    reach = _MINIMA if offset and geometry[5] > geometry[4] else 0
    for lower in range(max(minimum - reach, geometry[4]), min(minimum + reach, geometry[5]) + 1):
        for lane in range(LANES):
            if coded:
                steps[0, lane] = step * np.float32(scale + lane - _NEAR)
            else:
                steps[0, lane] = step * np.float32(1 + (lane - _NEAR) * spacing)
        if not coded:
            store(steps, 0, from_half(to_half(load(steps, 0))))
        _errors(x, w, values, row, at, group, steps, low * np.float32(lower), table, errors)
        for lane in range(LANES):
            tried = scale + lane - _NEAR
            if errors[0, lane] < least and (not coded or geometry[2] <= tried <= geometry[3]):
                least, best_minimum = errors[0, lane], lower
                if coded:
                    best_scale = tried
                else:
                    best_step = steps[0, lane]
    return least, best_scale, best_minimum, best_step


@inlined
def _errors(
    x: Any, w: Any, values: Any, row: int, at: int, n: int, steps: Any, low: Any, table: bool, errors: Any
) -> None:
    """Σ w·(x - step·value + low)² of n weights, for each lane's step, codes rounded to the nearest."""
    step = load(steps, 0)
    inverse = reciprocal(step)
    total = floats(0)
    for i in range(at, at + n):
        raised = floats(x[row, i] + low)
        v = inverse * raised
        if table:
            value = floats(values[0])
            for k in range(len(values) - 1):
                value = value + where(
                    v < (values[k] + values[k + 1]) * np.float32(0.5), 0, floats(values[k + 1] - values[k])
                )
        else:
            value = nearest_clipped(v, int(values[0]), int(values[-1]))
        rest = raised - step * value
        total = total + rest * rest * w[i]
    store(errors, 0, total)


@inlined
def _code(v: Any, values: Any, table: bool) -> int:
    """The index of the nearest one of ``values``."""
    if not table:
        return int(min(max(np.rint(v), values[0]), values[-1]) - values[0])
    index = 0
    for k in range(len(values) - 1):
        if not v < (values[k] + values[k + 1]) * np.float32(0.5):
            index = k + 1
    return index


@inlined
def _fitted(
    x: Any, w: Any, values: Any, row: int, at: int, group: int, scale: Any, minimum: Any, step: Any, low: Any,
    table: bool, offset: bool,
) -> Any:  # fmt: skip
    """d and dmin of the least weighted error for the codes that the scales give; as they are where none is."""
    squares, cross, lows, products, sums = 0.0, 0.0, 0.0, 0.0, 0.0
    for g in range(len(scale)):
        one, lower = step * np.float32(scale[g]), low * np.float32(minimum[g])
        if one == 0:
            continue
        m = float(minimum[g])
        for i in range(at + g * group, at + (g + 1) * group):
            value = float(values[_code((x[row, i] + lower) / one, values, table)]) * scale[g]
            weight = float(w[i])
            squares += weight * value * value
            products += weight * value * x[row, i]
            if offset:
                cross += weight * value * m
                lows += weight * m * m
                sums += weight * m * x[row, i]
    if not offset:
        return (np.float32(products / squares) if squares > 0 else step), low
    determinant = squares * lows - cross * cross
    if not determinant > 1e-9 * squares * lows:
        return step, low
    lower = (products * cross - squares * sums) / determinant
    if lower < 0:
        return (np.float32(products / squares) if low == 0 else step), low
    return np.float32((products * lows - sums * cross) / determinant), np.float32(lower)
