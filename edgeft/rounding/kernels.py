"""Loops that numba compiles; :mod:`edgeft.rounding.compiled` calls them and says what they are.

Each works on the blocks ``start`` to ``end`` of ``x``, a tile at a time: [weights of a block, tile].
Comparisons are written so that what is no number stays none, as in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

TILE = 64  # blocks: a few vector registers side by side, and all of it in the core's own cache
_compiled = njit(nogil=True, cache=True, error_model="numpy")
_inlined = njit(inline="always", error_model="numpy")

Array = Any
_ZERO, _ONE = np.float32(0), np.float32(1)


@_inlined
def _code(value: Any, least: Any, most: Any) -> Any:
    code = np.rint(value)
    code = least if code < least else code
    return most if code > most else code


@_inlined
def _load(x: Array, at: int, count: int, tile: Array) -> None:
    for i in range(x.shape[0]):
        for j in range(count):
            tile[i, j] = x[i, at + j]


@_inlined
def _farthest(v: Array, far: Array) -> None:
    """What is farthest from zero, the first of equals."""
    for j in range(TILE):
        far[j] = v[0, j]
    for i in range(1, v.shape[0]):
        for j in range(TILE):
            far[j] = v[i, j] if abs(v[i, j]) > abs(far[j]) else far[j]


@_compiled
def affine(
    x: Array,
    start: int,
    end: int,
    weights: Array,
    most: Any,
    counts: Array,
    square: bool,
    scales: Array,
    lows: Array,
) -> None:
    n = x.shape[0]
    v, w, c = (
        np.zeros((n, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
    )
    rows = np.zeros((13, TILE), np.float32)
    low, high, scale, best, step = rows[0], rows[1], rows[2], rows[3], rows[4]
    sum_w, sum_x, new, least = rows[5], rows[6], rows[7], rows[8]
    sum_l, sum_l2, sum_xl, error = rows[9], rows[10], rows[11], rows[12]
    for at in range(start, end, TILE):
        count = min(TILE, end - at)
        _load(x, at, count, v)
        _load(weights, at, count, w)
        for j in range(TILE):
            low[j], high[j] = v[0, j], v[0, j]
            sum_w[j], sum_x[j] = w[0, j], w[0, j] * v[0, j]
        for i in range(1, n):
            for j in range(TILE):
                low[j] = min(low[j], v[i, j])
                high[j] = max(high[j], v[i, j])
                sum_w[j] += w[i, j]
                sum_x[j] += w[i, j] * v[i, j]
        for j in range(TILE):
            low[j] = min(low[j], _ZERO)
        flat = high == low
        for number in range(-1, len(counts)):
            for j in range(TILE):
                span = _ONE if flat[j] else high[j] - low[j]
                step[j] = (most if number < 0 else counts[number]) / span
                sum_l[j], sum_l2[j], sum_xl[j], error[j] = _ZERO, _ZERO, _ZERO, _ZERO
            for i in range(n):
                for j in range(TILE):
                    code = _code((v[i, j] - low[j]) * step[j], _ZERO, most)
                    c[i, j] = code
                    share = w[i, j] * code
                    sum_l[j] += share
                    sum_l2[j] += share * code
                    sum_xl[j] += share * v[i, j]
            for j in range(TILE):
                determinant = sum_w[j] * sum_l2[j] - sum_l[j] * sum_l[j]
                first = (sum_w[j] * sum_xl[j] - sum_x[j] * sum_l[j]) / determinant
                second = (sum_l2[j] * sum_x[j] - sum_l[j] * sum_xl[j]) / determinant
                above = second > _ZERO
                new[j] = sum_xl[j] / sum_l2[j] if above else first
                least[j] = _ZERO if above else second
                sum_l[j] = determinant
                if number < 0:
                    new[j], least[j], sum_l[j] = _ONE / step[j], low[j], _ONE
            for i in range(n):
                for j in range(TILE):
                    off = c[i, j] * new[j] + least[j] - v[i, j]
                    error[j] += (off * off if square else abs(off)) * w[i, j]
            for j in range(TILE):
                if number < 0 or (sum_l[j] > _ZERO and error[j] < best[j]):
                    best[j], scale[j] = error[j], new[j]
                    low[j] = low[j] if flat[j] else least[j]
        for j in range(count):
            scales[at + j] = _ZERO if flat[j] else scale[j]
            lows[at + j] = low[j]


@_compiled
def signed(x: Array, start: int, end: int, most: Any, counts: Array, scales: Array) -> None:
    n = x.shape[0]
    v, square, cube = (
        np.zeros((n, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
    )
    rows = np.zeros((6, TILE), np.float32)
    far, scale, best, of_x, of_codes, step = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    for at in range(start, end, TILE):
        count = min(TILE, end - at)
        _load(x, at, count, v)
        _farthest(v, far)
        for i in range(n):
            for j in range(TILE):
                square[i, j] = v[i, j] * v[i, j]
                cube[i, j] = square[i, j] * v[i, j]
        for number in range(len(counts)):
            for j in range(TILE):
                step[j] = counts[number] / far[j]
                of_x[j], of_codes[j] = _ZERO, _ZERO
            for i in range(n):
                for j in range(TILE):
                    code = _code(v[i, j] * step[j], -most, most - _ONE)
                    of_x[j] += cube[i, j] * code
                    of_codes[j] += square[i, j] * code * code
            _keep(number == 0, of_x, of_codes, scale, best)
        for j in range(count):
            scales[at + j] = _ZERO if abs(far[j]) < np.float32(1e-15) else scale[j]


@_inlined
def _nearest(values: Array, step: Array, levels: Array, scaled: Array, near: Array) -> None:
    """Of each value times its step the nearest level; half way to the next the upper one."""
    for j in range(TILE):
        scaled[j] = values[j] * step[j]
        near[j] = levels[0]
    for k in range(1, len(levels)):
        middle, rise = (levels[k] + levels[k - 1]) / np.float32(2), levels[k] - levels[k - 1]
        for j in range(TILE):
            near[j] += rise if scaled[j] >= middle else _ZERO


@_compiled
def nonlinear(x: Array, start: int, end: int, levels: Array, scales: Array, codes: Array) -> None:
    n = x.shape[0]
    v, square = np.zeros((n, TILE), np.float32), np.zeros((n, TILE), np.float32)
    rows = np.zeros((8, TILE), np.float32)
    far, scale, best, of_x, of_codes, step = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    scaled, near = rows[6], rows[7]
    for at in range(start, end, TILE):
        count = min(TILE, end - at)
        _load(x, at, count, v)
        _farthest(v, far)
        for i in range(n):
            for j in range(TILE):
                square[i, j] = v[i, j] * v[i, j]
        for number in range(-8, 8):
            for j in range(TILE):
                if number < -7:
                    widest = -far[j] / levels[0]
                    step[j] = _ONE / widest if widest != _ZERO else _ZERO
                else:
                    step[j] = (np.float32(number) + levels[0]) / far[j]
                of_x[j], of_codes[j] = _ZERO, _ZERO
            for i in range(n):
                _nearest(v[i], step, levels, scaled, near)
                for j in range(TILE):
                    share = square[i, j] * near[j]
                    of_x[j] += share * v[i, j]
                    of_codes[j] += share * near[j]
            _keep(number < -7, of_x, of_codes, scale, best)
        for j in range(TILE):
            scale[j] = _ZERO if abs(far[j]) < np.float32(1e-15) else scale[j]
            step[j] = _ONE / scale[j] if scale[j] != _ZERO else _ZERO
        for i in range(n):
            _nearest(v[i], step, levels, scaled, near)
            for j in range(count):
                codes[i, at + j] = near[j]
        for j in range(count):
            scales[at + j] = scale[j]


@_inlined
def _keep(first: bool, of_x: Array, of_codes: Array, scale: Array, best: Array) -> None:
    """The scale of the least error so far."""
    for j in range(TILE):
        if first:
            scale[j] = of_x[j] / of_codes[j] if of_codes[j] != _ZERO else _ZERO
            best[j] = scale[j] * of_x[j]
        elif of_codes[j] > _ZERO and of_x[j] * of_x[j] > best[j] * of_codes[j]:
            scale[j] = of_x[j] / of_codes[j]
            best[j] = scale[j] * of_x[j]


@_inlined
def _eight(parts: Array, j: int) -> Any:
    """numpy's order for eight partial sums."""
    return ((parts[0, j] + parts[1, j]) + (parts[2, j] + parts[3, j])) + (
        (parts[4, j] + parts[5, j]) + (parts[6, j] + parts[7, j])
    )


@_compiled
def k_quant(x: Array, start: int, end: int, counts: Array, out: Array) -> None:
    n = x.shape[1]
    v, w, c = (
        np.zeros((n, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
        np.zeros((n, TILE), np.float32),
    )
    p, q, r = (
        np.zeros((8, TILE), np.float32),
        np.zeros((8, TILE), np.float32),
        np.zeros((8, TILE), np.float32),
    )
    rows = np.zeros((8, TILE), np.float32)
    low, high, scale, best, step = rows[0], rows[1], rows[2], rows[3], rows[4]
    sum_w, sum_x, new = rows[5], rows[6], rows[7]
    least = np.zeros(TILE, np.float32)
    for at in range(start, end, TILE):
        count = min(TILE, end - at)
        for j in range(count):
            for i in range(n):
                v[i, j] = x[at + j, i]
        p[:] = _ZERO
        for j in range(TILE):
            low[j], high[j] = v[0, j], v[0, j]
        for i in range(n):
            for j in range(TILE):
                low[j] = min(low[j], v[i, j])
                high[j] = max(high[j], v[i, j])
                p[i % 8, j] += v[i, j] * v[i, j]
        for j in range(TILE):
            new[j] = np.float32(np.sqrt(np.float64(_eight(p, j) / np.float32(n))))
        p[:] = _ZERO
        q[:] = _ZERO
        for i in range(n):
            for j in range(TILE):
                w[i, j] = new[j] + abs(v[i, j])
                p[i % 8, j] += w[i, j]
                q[i % 8, j] += w[i, j] * v[i, j]
        for j in range(TILE):
            sum_w[j], sum_x[j] = _eight(p, j), _eight(q, j)
        for number in range(len(counts)):
            p[:] = _ZERO
            q[:] = _ZERO
            r[:] = _ZERO
            for j in range(TILE):
                span = high[j] - low[j]
                step[j] = counts[number] / span if span != _ZERO else _ONE
            for i in range(n):
                for j in range(TILE):
                    code = _code((v[i, j] - low[j]) * step[j], _ZERO, counts[0])
                    c[i, j] = code
                    share = w[i, j] * code
                    p[i % 8, j] += share
                    q[i % 8, j] += share * code
                    r[i % 8, j] += share * v[i, j]
            for j in range(TILE):
                sum_l, sum_l2, sum_xl = _eight(p, j), _eight(q, j), _eight(r, j)
                determinant = sum_w[j] * sum_l2 - sum_l * sum_l
                new[j] = (sum_w[j] * sum_xl - sum_x[j] * sum_l) / determinant
                least[j] = (sum_l2 * sum_x[j] - sum_l * sum_xl) / determinant
                if number == 0:
                    new[j], least[j] = _ONE / step[j], low[j]
            p[:] = _ZERO
            for i in range(n):
                for j in range(TILE):
                    off = c[i, j] * new[j] + least[j] - v[i, j]
                    p[i % 8, j] += off * off * w[i, j]
            for j in range(TILE):
                error = _eight(p, j)
                if number == 0 or error < best[j]:
                    best[j], scale[j], low[j] = error, new[j], least[j]
        for j in range(TILE):
            zero = np.float64(_code(-low[j] / scale[j], _ZERO, counts[0]))
            for i in range(n):
                code = np.rint(np.float64(v[i, j]) / np.float64(scale[j]) + zero)
                code = 0.0 if code < 0.0 else code
                code = 15.0 if code > 15.0 else code
                c[i, j] = np.float32(code - zero) * scale[j]
        for j in range(count):
            for i in range(n):
                out[at + j, i] = c[i, j]
