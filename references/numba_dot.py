"""Compiled twins of `dot_emulated` and `running_bound`: another formulation, the same bits (optional, needs numba).

Decides nothing: `dot.py` defines. The emulation here is integer arithmetic on significands (the definition is float64 and
Fractions); the bound repeats the definition's float64 operations in the same order. The datapath's constants are runtime
numbers, so a new record compiles nothing. Refuses: families outside `EMULATED` and `BOUNDED`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from .datapaths import Datapath, Family
from .dot import Enclosure, Lanes, Operand, check_pair, dot_emulated, enclose, half_steps, held_codes, outward, prepare, read
from .formats import Codes, Format, Kind, Reals
from .rounding import Rounding

__all__ = ["BOUNDED", "EMULATED", "dot_emulated_compiled", "running_bound_compiled"]

EMULATED = frozenset({Family.FUSED, Family.BLOCK_SCALED_FUSED, Family.GROUPED, Family.EMULATED_PAIRS, Family.IEEE})
BOUNDED = EMULATED

Ints = npt.NDArray[np.int32]
_UP = outward
_RNE, _RZ, _FLOOR = int(Rounding.RNE), int(Rounding.RZ), int(Rounding.FLOOR)


@numba.njit(cache=True, inline="always")
def _shift(x: Any, right: Any, rounding: int) -> Any:
    """x * 2^-right cut to an integer."""
    if right <= 0:
        return x << -right
    if right > 62:
        right = 62
    if rounding == _FLOOR:
        return x >> right
    if rounding == _RZ:
        sign = x >> 63
        return (((x ^ sign) - sign) >> right ^ sign) - sign
    half = 1 << (right - 1)
    kept = x >> right
    rest = x - (kept << right)
    return kept + (1 if rest > half or (rest == half and kept & 1) else 0)


@numba.njit(cache=True)
def _bit_length(x: int) -> int:
    return math.frexp(float(x))[1]


@numba.njit(cache=True)
def _chain(a: Ints, ea: Ints, w: Ints, ew: Ints, c: int, ec: int, const: Any) -> tuple[int, int, bool]:
    """All nodes over one row pair; c = significand * 2^(ec - mantissa). Returns c, ec and whether it became infinite."""
    (products, run, bits, fraction, zero, cut, normalised, out_bits, mantissa, low, high, rounding) = const
    for first in range(0, a.size, products):
        top = ec if c != 0 else zero
        for k in range(first, first + products, run):
            alive = False
            for i in range(k, k + run):
                alive |= a[i] != 0 and w[i] != 0
            e = ea[k] + ew[k] if alive else zero
            if normalised and run == 1 and alive:
                e += _bit_length(np.int64(a[k]) * w[k]) - 1 - fraction
            top = max(top, e)
        total = _shift(c, top - ec - bits + mantissa, cut)
        for k in range(first, first + products, run):
            p = np.int64(0)
            for i in range(k, k + run):
                p += np.int64(a[i]) * w[i]
            total += _shift(p, top - (ea[k] + ew[k]) - bits + fraction, cut)
        if total == 0:
            c, ec = 0, low
            continue
        scale = top - bits
        ec = max(_bit_length(abs(total)) - 1 + scale, low)
        c = _shift(total, ec - (out_bits - 1) - scale, rounding)
        if abs(c) >> out_bits:
            c, ec = c >> 1, ec + 1
        if ec > high:
            return c, ec, True
        c <<= mantissa - (out_bits - 1)
    return c, ec, False


@numba.njit(cache=True)
def _chain_simple(a: Ints, ea: Ints, w: Ints, ew: Ints, c: int, ec: int, const: Any) -> tuple[int, int, bool]:
    """`_chain` for truncated, un-normalised single products: the shape of every shipped FUSED record, twice as fast."""
    (products, _, bits, fraction, zero, _, _, out_bits, mantissa, low, high, rounding) = const
    for first in range(0, a.size, products):
        top = ec if c != 0 else zero
        for k in range(first, first + products):
            live = a[k] * w[k] != 0
            top = max(top, ea[k] + ew[k] if live else zero)
        total = _shift(c, top - ec - bits + mantissa, _RZ)
        base = np.int64(top - bits + fraction)
        for k in range(first, first + products):
            p = np.int64(a[k] * w[k])
            right = base - (ea[k] + ew[k])
            left = max(-right, 0)
            right = min(max(right, 0), 62)
            sign = p >> 63
            magnitude = (((p ^ sign) - sign) << left) >> right
            total += (magnitude ^ sign) - sign
        if total == 0:
            c, ec = 0, low
            continue
        scale = top - bits
        ec = max(_bit_length(abs(total)) - 1 + scale, low)
        c = _shift(total, ec - (out_bits - 1) - scale, rounding)
        if abs(c) >> out_bits:
            c, ec = c >> 1, ec + 1
        if ec > high:
            return c, ec, True
        c <<= mantissa - (out_bits - 1)
    return c, ec, False


@numba.njit(cache=True)
def _round(x: float, bits: int, low: float, rounding: int) -> float:
    """x to `bits` significant bits, units not below those at `low`: adding 1.5 * 2^52 units rounds to nearest even."""
    if x == 0.0:
        return x
    unit = max(math.ldexp(1.0, math.frexp(x)[1] - 1), low) * math.ldexp(1.0, 1 - bits)
    anchor = 6755399441055744.0 * unit
    r = (x + anchor) - anchor
    if (rounding == _FLOOR and r > x) or (rounding == _RZ and abs(r) > abs(x)):
        r -= math.copysign(unit, r) if rounding == _RZ else unit
    return math.copysign(r, x) if r == 0.0 else r


@numba.njit(cache=True, parallel=True)
def _emulate(
    a: Ints, ea: Ints, w: Ints, ew: Ints, c: npt.NDArray[np.int64], ec: npt.NDArray[np.int64],
    state: npt.NDArray[np.int64], const: Any, tile: int, precision: int,
) -> None:
    """In place on c, ec and state [M, N] (0 finite, +-1 infinite, 2 NaN).

    tile > 0: t from zero over each tile, then an IEEE addition of c.
    """
    run, cut, normalised = const[1], const[5], const[6]
    mantissa, low, high = const[8], const[9], const[10]
    simple = run == 1 and cut == _RZ and normalised == 0
    for m in numba.prange(c.shape[0]):
        for n in range(c.shape[1]):
            if tile == 0:
                if simple:
                    c[m, n], ec[m, n], over = _chain_simple(a[m], ea[m], w[n], ew[n], c[m, n], ec[m, n], const)
                else:
                    c[m, n], ec[m, n], over = _chain(a[m], ea[m], w[n], ew[n], c[m, n], ec[m, n], const)
                if over:
                    state[m, n] = 1 if c[m, n] > 0 else -1
                continue
            for k in range(0, a.shape[1], tile):
                part = slice(k, k + tile)
                t, et, over = _chain(a[m, part], ea[m, part], w[n, part], ew[n, part], 0, low, const)
                if over:
                    sign = 1 if t > 0 else -1
                    state[m, n] = sign if state[m, n] == 0 or state[m, n] == sign else 2
                if state[m, n] != 0:
                    continue
                total = math.ldexp(float(c[m, n]), ec[m, n] - mantissa) + math.ldexp(float(t), et - mantissa)
                total = _round(total, precision, math.ldexp(1.0, low), _RNE)
                exponent = max(math.frexp(total)[1] - 1, low) if total != 0.0 else low
                c[m, n], ec[m, n] = np.int64(math.ldexp(total, mantissa - exponent)), exponent
                if exponent > high:
                    state[m, n] = 1 if total > 0.0 else -1


@numba.njit(cache=True, parallel=True)
def _emulate_ieee(a: Reals, w: Reals, c: Reals, const: Any) -> None:
    """In place on c [M, N]: one product after the other; the sum is rounded to odd in float64 before the one rounding."""
    (bits, low, largest, rounding, fused, double) = const
    for m in numba.prange(c.shape[0]):
        for n in range(c.shape[1]):
            s = c[m, n]
            for k in range(a.shape[1]):
                p = a[m, k] * w[n, k]
                if double:
                    s = s + p
                    continue
                if not fused:
                    p = _saturated(_round(p, bits, low, rounding), p, largest, rounding)
                if math.isinf(s) or math.isinf(p):
                    s = s + p
                    continue
                total = s + p
                back = total - s
                error = (s - (total - back)) + (p - back)
                if error != 0.0:
                    word = np.float64(total).view(np.int64)
                    if word & 1 == 0:
                        total = np.int64(word + (1 if (error > 0.0) == (total > 0.0) else -1)).view(np.float64)
                s = _saturated(_round(total, bits, low, rounding), total, largest, rounding)
            c[m, n] = s


@numba.njit(cache=True)
def _saturated(r: float, x: float, largest: float, rounding: int) -> float:
    """Overflow: infinity, or the largest finite value where the rounding points inward."""
    if abs(r) <= largest:
        return r
    inward = rounding == _RZ or (rounding == _FLOOR and x > 0.0)
    return math.copysign(largest if inward else math.inf, x)


def _fraction_bits(fmt: Format, scale: Format | None, path: Datapath) -> int:
    """Fraction bits of the integer significands: value = significand * 2^(exponent - bits)."""
    bits = path.operand_bits - 1 if path.operand_bits else fmt.mantissa_bits
    if path.family is Family.GROUPED and scale is not None:
        return scale.mantissa_bits + fmt.mantissa_bits - (fmt.min_exponent if fmt.kind is Kind.FLOAT else 0)
    return bits


def _significands(lanes: Lanes, bits: int, order: npt.NDArray[np.int64]) -> tuple[Ints, Ints]:
    value = np.where(np.isfinite(lanes.value), lanes.value, 0.0)
    significand = np.ldexp(value, bits - lanes.exponent)
    return np.ascontiguousarray(significand[:, order]).astype(np.int32), np.ascontiguousarray(lanes.exponent[:, order], np.int32)


def _check_family(path: Datapath, allowed: frozenset[Family]) -> None:
    if path.family not in allowed:
        names = sorted(family.name for family in allowed)
        raise ValueError(f"{path.name}: got family {path.family.name}, expected one of {names}; use dot.py")


def dot_emulated_compiled(a: Operand, w: Operand, path: Datapath, start: Reals | None = None) -> Codes:
    """As `dot.dot_emulated`, bit for bit. Rows with special values go through the definition.

    Raises ValueError as the definition does, and for families outside `EMULATED`.
    """
    _check_family(path, EMULATED)
    m, n, _ = check_pair(a, w, start, path)
    c = np.zeros((m, n)) if start is None else np.array(start, dtype=np.float64)
    left, right = read(a, path), read(w, path)
    finite = np.where(np.isfinite(c), c, 0.0)
    codes = _ieee(left, right, finite, path) if path.family is Family.IEEE else _fused(a, w, left, right, finite, path)
    rows = np.flatnonzero(~np.isfinite(left.value).all(axis=1) | ~np.isfinite(c).all(axis=1))
    columns = np.flatnonzero(~np.isfinite(right.value).all(axis=1))
    if rows.size:
        codes[rows] = dot_emulated(_rows(a, rows), w, path, c[rows])
    if columns.size:
        codes[:, columns] = dot_emulated(a, _rows(w, columns), path, c[:, columns])
    return codes


def _rows(op: Operand, index: npt.NDArray[np.intp]) -> Operand:
    return replace(op, codes=op.codes[index], scales=None if op.scales is None else op.scales[index])


def _ieee(left: Lanes, right: Lanes, c: Reals, path: Datapath) -> Codes:
    out = path.output
    const = (
        path.output_bits, 2.0**out.min_exponent, float(out.max_finite), int(path.output_rounding), bool(path.fused),
        out.bits == 64,
    )
    values_a, values_w = (np.where(np.isfinite(x.value), x.value, 0.0) for x in (left, right))
    _emulate_ieee(values_a, values_w, c, const)
    return held_codes(c, path)


def _fused(a: Operand, w: Operand, left: Lanes, right: Lanes, c: Reals, path: Datapath) -> Codes:
    out = path.output
    bits_a, bits_w = _fraction_bits(a.format, a.scale_format, path), _fraction_bits(w.format, w.scale_format, path)
    order, tile = _order(left.value.shape[1], path)
    sides = (*_significands(left, bits_a, order), *_significands(right, bits_w, order))
    exponent = np.maximum(np.frexp(c)[1].astype(np.int64) - 1, out.min_exponent)
    exponent = np.where(c == 0, out.min_exponent, exponent)
    significand = np.ldexp(c, out.mantissa_bits - exponent).astype(np.int64)
    state = np.zeros(c.shape, dtype=np.int64)
    const = (
        path.products, path.group if path.family is Family.GROUPED else 1, path.fraction_bits, bits_a + bits_w,
        path.zero_exponent, int(path.alignment_rounding), path.normalised, path.output_bits, out.mantissa_bits,
        out.min_exponent, out.bias, int(path.output_rounding),
    )
    _emulate(*sides, significand, exponent, state, const, tile, out.precision)
    finite = state == 0
    value = np.ldexp(np.where(finite, significand, 0).astype(np.float64), np.where(finite, exponent - out.mantissa_bits, 0))
    value[state == 2] = np.nan
    value[np.abs(state) == 1] = state[np.abs(state) == 1] * np.inf
    return held_codes(value, path)


@numba.njit(cache=True)
def _pow2(x: float) -> float:
    return np.int64(np.float64(x).view(np.int64) & np.int64(0x7FF0000000000000)).view(np.float64)


@numba.njit(cache=True)
def _loss(x: float, before: float, slack: float, bits: int, share: float, low: float, largest: float) -> float:
    reach = abs(x) + before + slack
    if reach > largest:
        return math.inf
    unit = max(_pow2(reach), low) * math.ldexp(1.0, 1 - bits)
    if before == 0.0 and slack == 0.0 and np.rint(x / unit) * unit == x:
        return 0.0
    return share * unit


@numba.njit(cache=True)
def _bound_node(
    a: Any, w: Any, index: npt.NDArray[np.int64], x: float, b: float, slack: float, const: Any
) -> tuple[float, float]:
    (run, bits, zero, out_bits, share, low, largest) = const
    (value_a, top_a, low_a), (value_w, top_w, low_w) = a, w
    reach = abs(x) + b + slack
    top = max(zero, max(_pow2(reach), low) if reach > 0.0 else 0.0)
    for k in index:
        top = max(top, top_a[k] * top_w[k])
    unit = top * math.ldexp(1.0, -bits)
    before = b
    if not (b == 0.0 and slack == 0.0 and np.rint(x / unit) * unit == x):
        before = b + min(unit, reach)
    for first in range(0, index.size, run):
        k = index[first]
        p, lowest = value_a[k] * value_w[k], low_a[k] * low_w[k]
        for i in range(first + 1, first + run):
            k = index[i]
            p += value_a[k] * value_w[k]
            lowest = min(lowest, low_a[k] * low_w[k])
        if lowest < unit:
            before += min(abs(p), unit)
        x += p
    return x, (before + _loss(x, before, slack, out_bits, share, low, largest)) * _UP


@numba.njit(cache=True, parallel=True)
def _bound(a: Any, w: Any, start: Reals, radius: Reals, slack: Reals, index: npt.NDArray[np.int64], products: int, tile: int,
           precision: int, ieee: bool, fused: bool, const: Any) -> None:
    """In place on radius [M, N]. `index`: order of k. tile > 0: t from zero over each tile, then an IEEE addition."""
    out_bits, share, low, largest = const[3], const[4], const[5], const[6]
    for m in numba.prange(radius.shape[0]):
        for n in range(radius.shape[1]):
            x, b, s = start[m, n], radius[m, n], slack[m, n]
            row, column = (a[0][m], a[1][m], a[2][m]), (w[0][n], w[1][n], w[2][n])
            if ieee:
                for k in range(index.size):
                    p = row[0][k] * column[0][k]
                    before = b if fused else b + _loss(p, 0.0, 0.0, out_bits, share, low, largest)
                    x += p
                    b = (before + _loss(x, before, s, out_bits, share, low, largest)) * _UP
            elif tile == 0:
                for k in range(0, index.size, products):
                    x, b = _bound_node(row, column, index[k : k + products], x, b, s, const)
            else:
                for k in range(0, index.size, tile):
                    t, spread = 0.0, 0.0
                    for i in range(k, k + tile, products):
                        t, spread = _bound_node(row, column, index[i : i + products], t, spread, s, const)
                    x += t
                    before = b + spread
                    b = (before + _loss(x, before, s, precision, 0.5, low, largest)) * _UP
            radius[m, n] = b


def _order(k: int, path: Datapath) -> tuple[npt.NDArray[np.int64], int]:
    """Order in which k reaches the nodes, and the tile of EMULATED_PAIRS (0 for the others)."""
    order = np.arange(k)
    if path.family is not Family.EMULATED_PAIRS:
        return order, 0
    tile = path.instruction_k
    return order[np.lexsort((order, order % tile // path.group % 2, order // tile))], tile


def running_bound_compiled(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None = None) -> Enclosure:
    """As `dot.running_bound`, the same float64 values. Raises ValueError as it does, and for families outside `BOUNDED`."""
    _check_family(path, BOUNDED)
    left, right, before, exact, slack = prepare(a, w, path, prefix)
    order, tile = _order(left.value.shape[1], path)
    out = path.output
    const = (
        path.group if path.family is Family.GROUPED else 1, path.fraction_bits, 2.0**path.zero_exponent, path.output_bits,
        half_steps(path), 2.0**out.min_exponent, float(out.max_finite),
    )
    radius = before.radius.copy()
    _bound(
        (left.value, left.top, left.low), (right.value, right.top, right.low), before.value, radius, slack, order, path.products,
        tile, out.precision, path.family is Family.IEEE, bool(path.fused), const,
    )
    return enclose(exact, radius)
