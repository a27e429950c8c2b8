"""Dot products: the exact sum, the sum as a matrix unit computes it, and a bound on the difference.

Decides: `dot_exact` (certified float64 or an enclosure), `node_scalar` (the definition of every datapath, in Fractions),
`dot_emulated` (its array form, bit for bit) and two bounds on |emulated - exact|: order known, order unknown.
Refuses: tolerances, and any order other than ascending k: permute or cut the operands, then call per part.
All operands are [rows, K] with K contiguous; A is [M, K], W is [N, K], results are [M, N]: out[m, n] = sum_k a[m, k] w[n, k].
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from .datapaths import Datapath, Family
from .formats import F64, INT32, Codes, Format, Kind, Reals, Special, container, decode, decode_scalar
from .rounding import Overflow, Rounding, encode, round_to, sum_odd

__all__ = [
    "Enclosure", "Lanes", "Operand", "Term", "agnostic_bound", "bound", "check_pair", "check_read", "dot_emulated", "dot_exact",
    "dot_fraction", "emulate", "enclose", "half_steps", "held_codes", "low_bit", "node_scalar", "outward", "prepare", "read",
    "running_bound", "scalar_terms", "values",
]

Ints = npt.NDArray[np.int64]
outward = 1.0 + 2.0**-44
"""Outward factor after a sum of fewer than 2^8 nonnegative float64 terms."""


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One side of a dot product: `codes` [rows, K] of `format`, and block scales [rows, K / group] that multiply (decode
    direction: value = code * scale) `group` consecutive k each. group = 0: no scales."""

    codes: Codes
    format: Format
    scales: Codes | None = None
    scale_format: Format | None = None
    group: int = 0

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != container(self.format):
            raise ValueError(
                f"operand codes: got shape {self.codes.shape} of {self.codes.dtype}, expected [rows, K] of "
                f"{container(self.format)} for {self.format.name}"
            )
        if (self.scales is None, self.scale_format is None) != (self.group == 0,) * 2:
            raise ValueError(f"operand scales: got group {self.group}, expected scales, scale_format and group together or none")
        if self.scales is not None:
            rows, k = self.codes.shape
            if k % self.group or self.scales.shape != (rows, k // self.group):
                raise ValueError(f"operand scales: got shape {self.scales.shape}, expected {(rows, k / self.group)} for K = {k}")


@dataclass(frozen=True, slots=True, eq=False)
class Enclosure:
    """The number meant lies in [value - radius, value + radius], element by element; radius 0 means exactly `value`.

    float64 both. Where `value` is NaN or infinite the radius is 0. Finite zeros are +0.
    """

    value: Reals
    radius: Reals


def values(op: Operand) -> Reals:
    """Exact values [rows, K] of an operand, block scales applied (no format product here needs more than 53 bits)."""
    with np.errstate(invalid="ignore"):  # signalling NaN codes
        decoded = decode(op.codes, op.format)
        if op.scales is None or op.scale_format is None:
            return decoded
        return decoded * np.repeat(decode(op.scales, op.scale_format), op.group, axis=1)


# The exact sum ------------------------------------------------------------------------------------------------------


def dot_fraction(a_row: Reals, w_row: Reals) -> Fraction:
    """The definition: sum_k a[k] w[k] of two [K] rows. Raises ValueError where a value is not finite."""
    if not (np.isfinite(a_row).all() and np.isfinite(w_row).all()):
        raise ValueError("dot_fraction: got a value that is not finite, expected finite values; mask specials first")
    return sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a_row, w_row, strict=True)), Fraction(0))


def low_bit(x: Reals) -> Reals:
    """Weight of the lowest set bit of each finite value; infinity for zeros (a zero is a multiple of anything)."""
    significand, exponent = np.frexp(x)
    integer = np.abs(np.ldexp(significand, 53)).astype(np.int64)
    lowest = (integer & -integer).astype(np.float64)
    return np.where(x == 0, np.inf, np.ldexp(lowest, exponent - 53))




def dot_exact(a: Reals, w: Reals) -> Enclosure:
    """sum_k a[m, k] w[n, k] over the reals, enclosed: [M, K], [N, K] -> [M, N].

    With q = (lowest bit of row a) * (lowest bit of row w) every partial sum in any order is a multiple of q and at most
    S = sum |a| |w|, so S < 2^53 q makes float64 BLAS exact (matrix-unit notes, section 6.1). Elsewhere both rows are cut in
    two and the four sums added with their errors; the radius is then what float64 cannot hold. NaN operands, Inf * 0 and
    Inf - Inf give NaN, other infinities an infinity. Raises ValueError where the inner lengths differ, or where sums could
    leave 2^-1022..2^1022.
    """
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise ValueError(f"dot_exact: got shapes {a.shape} and {w.shape}, expected [M, K] and [N, K] with one K")
    a, w = np.asarray(a, dtype=np.float64), np.asarray(w, dtype=np.float64)
    finite_a, finite_w = np.where(np.isfinite(a), a, 0.0), np.where(np.isfinite(w), w, 0.0)
    enclosure = _dot_finite(finite_a, finite_w)
    special = _special_sum(a, w)
    if special is None:
        return enclosure
    hit = special != 0
    return Enclosure(np.where(hit, special, enclosure.value), np.where(hit, 0.0, enclosure.radius))


def _special_sum(a: Reals, w: Reals) -> Reals | None:
    """NaN, +Inf, -Inf or 0 (finite) per element of the product; None where every operand is finite."""
    if np.isfinite(a).all() and np.isfinite(w).all():
        return None

    def hits(pairs: Sequence[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]) -> npt.NDArray[np.bool_]:
        return np.asarray(np.any([x.astype(np.float64) @ y.astype(np.float64).T > 0 for x, y in pairs], axis=0))

    plus_a, minus_a, plus_w, minus_w = a == np.inf, a == -np.inf, w == np.inf, w == -np.inf
    plus = hits([(plus_a, w > 0), (minus_a, w < 0), (a > 0, plus_w), (a < 0, minus_w)])
    minus = hits([(plus_a, w < 0), (minus_a, w > 0), (a < 0, plus_w), (a > 0, minus_w)])
    nan = hits([(np.isinf(a), w == 0), (a == 0, np.isinf(w))])
    nan |= np.isnan(a).any(axis=1, keepdims=True) | np.isnan(w).any(axis=1, keepdims=True).T | (plus & minus)
    return np.where(nan, np.nan, np.where(plus, np.inf, np.where(minus, -np.inf, 0.0)))


def _two_sum(a: Reals, b: Reals) -> tuple[Reals, Reals]:
    """Rounded sum and its exact error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _dot_certified(a: Reals, w: Reals) -> Enclosure:
    """One BLAS product: radius 0 where the width certificate holds, else K roundings relative to sum |a| |w|."""
    k = a.shape[1]
    magnitude = np.abs(a) @ np.abs(w).T
    low_a = np.min(low_bit(a), axis=1, initial=np.inf)
    low_w = np.min(low_bit(w), axis=1, initial=np.inf)
    with np.errstate(over="ignore"):
        exact = magnitude * (1.0 + 2.0**-40) < 2.0**53 * low_a[:, None] * low_w[None, :]
    return Enclosure(a @ w.T + 0.0, np.where(exact, 0.0, (k + 2) * 2.0**-53 * (1.0 + 2.0**-20) * magnitude))


def _dot_finite(a: Reals, w: Reals) -> Enclosure:
    k = a.shape[1]
    low = min(float(np.min(low_bit(a), initial=1.0)), 1.0), min(float(np.min(low_bit(w), initial=1.0)), 1.0)
    high = float(np.max(np.abs(a), initial=1.0)), float(np.max(np.abs(w), initial=1.0))
    if low[0] < 2.0**-500 or low[1] < 2.0**-500 or high[0] > 2.0**480 or high[1] > 2.0**480:
        raise ValueError(
            f"dot_exact: got lowest bits {low} and largest values {high}, expected 2^-500 and 2^480 at the outside; "
            "scale the operands by powers of two"
        )
    whole = _dot_certified(a, w)
    rows, columns = np.flatnonzero(whole.radius.any(axis=1)), np.flatnonzero(whole.radius.any(axis=0))
    if rows.size == 0:
        return whole
    # The upper parts keep `width` bits below the largest value of their row, so that their own product is always exact.
    width = (53 - max(k, 1).bit_length()) // 2 - 1
    parts = [_split(x[index], width) for x, index in ((a, rows), (w, columns))]
    (a_high, a_low), (w_high, w_low) = parts
    terms = [_dot_certified(x, y) for x, y in ((a_high, w_high), (a_high, w_low), (a_low, w_high), (a_low, w_low))]
    middle, error_1 = _two_sum(terms[1].value, terms[2].value)
    middle, error_2 = _two_sum(middle, terms[3].value)
    total, error_3 = _two_sum(terms[0].value, middle)
    errors, error_4 = _two_sum(error_1, error_2)
    errors, error_5 = _two_sum(error_3, errors)
    total, error_6 = _two_sum(total, errors)
    radius = np.abs(error_4) + np.abs(error_5) + np.abs(error_6)
    for term in terms:
        radius += term.radius
    radius *= outward
    value, outer = whole.value.copy(), whole.radius.copy()
    grid = np.ix_(rows, columns)
    better = radius < outer[grid]
    value[grid] = np.where(better, total + 0.0, value[grid])
    outer[grid] = np.where(better, radius, outer[grid])
    return Enclosure(value, outer)


def _split(x: Reals, width: int) -> tuple[Reals, Reals]:
    """x = upper + lower exactly, the upper part a multiple of 2^(e - width), e the exponent of the row's largest value."""
    exponent = np.frexp(np.max(np.abs(x), axis=1, keepdims=True, initial=0.0))[1] - 1 - width
    upper = np.ldexp(np.trunc(np.ldexp(x, -exponent)), exponent)
    return upper, x - upper


# One node, in Fractions ---------------------------------------------------------------------------------------------

Term = tuple[Fraction, int]
"""An operand as a node sees it: its value, block scale included, and the exponent that aligns it (not always floor log2:
subnormals keep their format's minimum, and the group sums of GROUPED are aligned by their scales alone)."""


def _log2(x: Fraction) -> int:
    """floor(log2 |x|), x != 0."""
    x = abs(x)
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if x >= Fraction(2) ** guess else guess - 1


def scalar_terms(op: Operand, row: int, path: Datapath) -> list[Term]:
    """One row of an operand as `path` reads it, from the codes: finite values and their alignment exponents, not padded."""
    lowest = path.operand_min_exponent or (op.format.min_exponent if op.format.kind is Kind.FLOAT else 0)
    terms = []
    for k, code in enumerate(op.codes[row].tolist()):
        if path.operand_bits:
            code -= code % (1 << (op.format.precision - path.operand_bits))
        x = decode_scalar(code, op.format)
        x = Fraction(0) if isinstance(x, Special) else x
        if path.flush and abs(x) < Fraction(2) ** op.format.min_exponent:
            x = Fraction(0)
        exponent = max(_log2(x), lowest) if x else lowest
        if op.scales is not None and op.scale_format is not None:
            scale = decode_scalar(int(op.scales[row, k // op.group]), op.scale_format)
            scale = Fraction(0) if isinstance(scale, Special) else scale
            own = max(_log2(scale), op.scale_format.min_exponent) if scale else op.scale_format.min_exponent
            x, exponent = x * scale, own if path.family is Family.GROUPED else exponent + own
        terms.append((x, exponent))
    return terms


_TO_INTEGER: dict[Rounding, Callable[[Fraction], int]] = {
    Rounding.RNE: round,
    Rounding.RZ: int,
    Rounding.FLOOR: lambda x: x.numerator // x.denominator,
}


def _cut(x: Fraction, unit: int, rounding: Rounding) -> Fraction:
    """x rounded to a multiple of 2^unit."""
    return _TO_INTEGER[rounding](x / Fraction(2) ** unit) * Fraction(2) ** unit


def _result(x: Fraction | Special, path: Datapath, bits: int = 0, rounding: Rounding | None = None) -> Fraction | Special:
    """x to `bits` significant bits of the output format (default: the path's own), above 2^(max + 1): infinity."""
    if isinstance(x, Special) or x == 0:
        return x
    out = path.output
    unit = max(_log2(x), out.min_exponent) - (bits or path.output_bits) + 1
    rounded = _cut(x, unit, path.output_rounding if rounding is None else rounding)
    if abs(rounded) >= Fraction(2) ** (out.bias + 1):
        if path.family is Family.IEEE and path.output_rounding is Rounding.RZ:
            return out.max_finite if x > 0 else -out.max_finite
        return Special.POS_INF if x > 0 else Special.NEG_INF
    return rounded


def node_scalar(a: Sequence[Term], b: Sequence[Term], c: Fraction, path: Datapath) -> Fraction | Special:
    """The definition of one node (one instruction for EMULATED_PAIRS) on finite operands and a finite c.

    len(a) = len(b) = `path.products` (`path.instruction_k` for EMULATED_PAIRS). The value of the result; zeros have no sign.
    Raises ValueError for INTEGER, whose definition is Python's integer sum.
    """
    terms = [(x * y, i + j) for (x, i), (y, j) in zip(a, b, strict=True)]
    if path.normalised and path.family is not Family.GROUPED:
        terms = [(p, _log2(p) if p else e) for p, e in terms]
    if path.family in (Family.FUSED, Family.BLOCK_SCALED_FUSED):
        return _result(_fused_sum(terms, c, path), path)
    if path.family is Family.GROUPED:
        runs = [terms[i : i + path.group] for i in range(0, len(terms), path.group)]
        sums = [(sum((p for p, _ in run), Fraction(0)), run[0][1]) for run in runs]
        live = [any(p != 0 for p, _ in run) for run in runs]
        return _result(_fused_sum(sums, c, path, live), path)
    if path.family is Family.EMULATED_PAIRS:
        t: Fraction | Special = Fraction(0)
        for parity in (0, 1):
            half = [term for k, term in enumerate(terms) if k // path.group % 2 == parity]
            for i in range(0, len(half), path.products):
                if isinstance(t, Special):
                    return t
                t = _result(_fused_sum(half[i : i + path.products], t, path), path)
        return t if isinstance(t, Special) else _result(t + c, path, path.output.precision, Rounding.RNE)
    products = [p for p, _ in terms]
    if path.family is Family.EXACT_SUM:
        return _result(sum(products, c), path)
    if path.family is Family.IEEE:
        p = products[0] if path.fused else _result(products[0], path)
        return p if isinstance(p, Special) else _result(p + c, path)
    if path.family is Family.PAIR_TREE:
        return _tree_scalar([*products], c, path)
    if path.family in (Family.TRUNCATED_SUM, Family.TRUNCATED_PAIRS):
        return _truncated_scalar(terms, c, path)
    raise ValueError(f"node_scalar: got {path.name} of family {path.family.name}, expected a floating-point family")


def _fused_sum(terms: Sequence[Term], c: Fraction, path: Datapath, live: Sequence[bool] | None = None) -> Fraction:
    """Align to the largest exponent E, cut below 2^(E - F), add."""
    own = (max(_log2(c), path.output.min_exponent) if c else path.zero_exponent)
    alive = [p != 0 for p, _ in terms] if live is None else live
    top = max([own] + [e if on else path.zero_exponent for (_, e), on in zip(terms, alive, strict=True)])
    unit = top - path.fraction_bits
    return sum((_cut(x, unit, path.alignment_rounding) for x in [c, *(p for p, _ in terms)]), Fraction(0))


def _tree_scalar(products: list[Fraction], c: Fraction, path: Datapath) -> Fraction | Special:
    """Pairwise tree; operands come flushed, every product and sum is flushed after its rounding."""
    level: list[Fraction] = []
    for x in [*products, c]:
        r = _flushed(x, path)
        if isinstance(r, Special):
            return r
        level.append(r)
    c, level = level[-1], level[:-1]
    while len(level) > 1:
        sums = [_flushed(x + y, path) for x, y in zip(level[::2], level[1::2], strict=True)]
        for s in sums:
            if isinstance(s, Special):
                return s
        level = [s for s in sums if isinstance(s, Fraction)]
    return _flushed(c + level[0], path)


def _flushed(x: Fraction, path: Datapath) -> Fraction | Special:
    r = _result(x, path)
    small = path.flush and isinstance(r, Fraction) and abs(r) < Fraction(2) ** path.output.min_exponent
    return Fraction(0) if small else r


def _truncated_scalar(terms: Sequence[Term], c: Fraction, path: Datapath) -> Fraction | Special:
    """Products summed truncated; c joins by floors: product sum to carry_bits + 1 fraction bits, c to F, the sum to
    carry_bits; then one rounding. Two product sums (TRUNCATED_PAIRS) are first floored to the common exponent."""
    bits, low = path.fraction_bits, path.output.min_exponent
    over = [p for p, _ in terms if abs(p) >= Fraction(2) ** (path.output.bias + 1)]
    if over:
        signs = {p > 0 for p in over}
        return Special.NAN if len(signs) == 2 else (Special.POS_INF if over[0] > 0 else Special.NEG_INF)
    pairs = path.family is Family.TRUNCATED_PAIRS
    parts = [[t for k, t in enumerate(terms) if k // path.group % 2 == i] for i in (0, 1)] if pairs else [list(terms)]
    tops = [max(e if p else path.zero_exponent for p, e in part) for part in parts]
    sums = [
        sum((_cut(p, top - bits, path.alignment_rounding) for p, _ in part), Fraction(0))
        for part, top in zip(parts, tops, strict=True)
    ]
    dot_top, own = max(tops), (max(_log2(c), low) if c else low)
    dot = sum((_cut(s, dot_top - bits, Rounding.FLOOR) for s in sums), Fraction(0)) if pairs else sums[0]
    top = max(dot_top, own)
    carried = Fraction(0) if pairs and own < top - bits - 1 else _cut(c, top - bits, Rounding.FLOOR)
    total = _cut(dot, top - path.carry_bits - 1, Rounding.FLOOR) + carried
    if total:
        total = _cut(total, max(_log2(total), low) - path.carry_bits, Rounding.FLOOR)
    return _result(total, path)


# The emulated sum ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """An operand as a datapath reads it, K padded with zeros to whole instructions.

    value [rows, K]: exact, block scales applied, cut to `operand_bits`, flushed. exponent [rows, K]: that of alignment.
    """

    value: Reals
    exponent: Ints


def _floor_log2(x: Reals) -> Ints:
    """floor(log2 |x|) for finite x != 0; -1 for zero."""
    return np.frexp(x)[1].astype(np.int64) - 1


def check_read(op: Operand, path: Datapath) -> None:
    """Raises ValueError where the unit does not take the operand's format or its block scales.

    IEEE takes any block scales: a dequantised value (few bits times few bits) is exact, and so are its products."""
    if op.format not in path.operands:
        raise ValueError(f"{path.name}: got operand format {op.format.name}, expected one of {[f.name for f in path.operands]}")
    if path.family is not Family.IEEE and (op.scale_format, op.group) != (path.scale_format, path.scale_group):
        raise ValueError(
            f"{path.name}: got block scales {op.scale_format} per {op.group}, expected {path.scale_format} per "
            f"{path.scale_group}; scales that the instruction does not take belong to a later step"
        )


def read(op: Operand, path: Datapath) -> Lanes:
    """Operand as `path` reads it. Raises ValueError as `check_read`."""
    check_read(op, path)
    value = values(replace(op, scales=None, scale_format=None, group=0))
    lowest = path.operand_min_exponent or (op.format.min_exponent if op.format.kind is Kind.FLOAT else 0)
    if path.operand_bits:
        dropped = np.uint32(op.format.precision - path.operand_bits)
        cut = values(Operand((op.codes >> dropped) << dropped, op.format))
        value = np.where(np.isnan(value), value, cut)
    if path.flush:
        value = np.where(np.abs(value) < 2.0**op.format.min_exponent, 0.0, value)
    exponent = np.maximum(_floor_log2(np.where(np.isfinite(value), value, 0.0)), lowest)
    if op.scales is not None and op.scale_format is not None:
        scale = np.repeat(decode(op.scales, op.scale_format), op.group, axis=1)
        own = np.maximum(_floor_log2(np.where(np.isfinite(scale), scale, 0.0)), op.scale_format.min_exponent)
        exponent = own if path.family is Family.GROUPED else exponent + own
        with np.errstate(invalid="ignore"):
            value = value * scale
    pad = -op.codes.shape[1] % path.instruction_k
    return Lanes(np.pad(value, ((0, 0), (0, pad))), np.pad(exponent, ((0, 0), (0, pad))))


def check_pair(a: Operand, w: Operand, start: Reals | None, path: Datapath) -> tuple[int, int, int]:
    """(M, N, K). Raises ValueError where K differs, a rounding is none of RNE, RZ and FLOOR, or `start` is not [M, N] of values
    of the output format."""
    for mode in (path.output_rounding, path.alignment_rounding):
        if mode not in _ROUND:
            raise ValueError(f"{path.name}: got rounding {mode.name}, expected one of {[r.name for r in _ROUND]}")
    (m, k), (n, k_w) = a.codes.shape, w.codes.shape
    if k != k_w:
        raise ValueError(f"{path.name}: got K = {k} for A and {k_w} for W, expected one K")
    if start is not None:
        if start.shape != (m, n):
            raise ValueError(f"{path.name}: got start of shape {start.shape}, expected {(m, n)}")
        held = start if path.output is INT32 else round_to(start, path.output)
        integer = path.output is not INT32 or ((start == np.rint(start)) & (start >= -(2.0**31)) & (start < 2.0**31)).all()
        if not (integer and np.array_equal(held, start, equal_nan=True)):
            raise ValueError(f"{path.name}: got a start value outside {path.output.name}, expected its values; round it first")
    return m, n, k


def dot_emulated(a: Operand, w: Operand, path: Datapath, start: Reals | None = None) -> Codes:
    """Result bits [M, N] (container of `path.output`) of sum_k a[m, k] w[n, k] on `path`: a chain of nodes in ascending k.

    The chain begins with c = `start` (values of the output format) or zero. K is padded to whole instructions with zero
    products; such a product adds nothing but takes part in the search for the largest exponent as `zero_exponent`, which
    matters only where every term is smaller than 2^zero_exponent. NaN operands, Inf * 0 and Inf - Inf give `nan_code`;
    results of 2^(max + 1) and more give infinity; zero is +0 except in the IEEE family. Products need no range: they are
    exact. Raises ValueError for operands or starts that the unit does not take, and for F64 sums of other roundings.
    """
    m, n, _ = check_pair(a, w, start, path)
    left, right = read(a, path), read(w, path)
    if path.family is Family.INTEGER:
        return _emulate_integer(left.value, right.value, path, start)
    c = np.zeros((m, n)) if start is None else np.array(start, dtype=np.float64)
    step = {Family.EMULATED_PAIRS: path.instruction_k, Family.IEEE: 1}.get(path.family, path.products)
    rows = max(1, (1 << 20) // max(1, n * step))
    with np.errstate(invalid="ignore", over="ignore"):
        for top in range(0, m, rows):
            for k in range(0, left.value.shape[1], step):
                part = (slice(top, top + rows), None, slice(k, k + step))
                p = left.value[part] * right.value[None, :, k : k + step]
                e = left.exponent[part] + right.exponent[None, :, k : k + step]
                c[top : top + rows] = _NODES[path.family](p, e, c[top : top + rows], path)
    return held_codes(c, path)


def held_codes(c: Reals, path: Datapath) -> Codes:
    """Codes of accumulator values, which are values of the output format already; NaN becomes the unit's own."""
    codes: Codes = encode(c, path.output, Rounding.RNE, Overflow.SPECIAL)
    codes[np.isnan(c)] = path.nan_code
    return codes


def _emulate_integer(a: Reals, w: Reals, path: Datapath, start: Reals | None) -> Codes:
    """Exact in float64 BLAS: |products| <= 2^16, so any K below 2^36 stays within 2^53."""
    c = np.zeros((a.shape[0], w.shape[0])) if start is None else start
    if not path.saturate:
        total = (a @ w.T).astype(np.int64) + c.astype(np.int64)
        return (total & 0xFFFFFFFF).astype(np.uint32)
    for k in range(0, a.shape[1], path.instruction_k):
        part = slice(k, k + path.instruction_k)
        c = np.clip(c + a[:, part] @ w[:, part].T, -(2.0**31), 2.0**31 - 1)
    return c.astype(np.int32).view(np.uint32)


def _round_bits(x: Reals, path: Datapath) -> Reals:
    """Exact values, or values rounded to odd in float64, to `output_bits` of the output format; no upper end."""
    unit = np.maximum(_floor_log2(x), path.output.min_exponent) - (path.output_bits - 1)
    return np.asarray(np.ldexp(_ROUND[path.output_rounding](np.ldexp(x, -unit)), unit))


def _finish(x: Reals, path: Datapath) -> Reals:
    """The result of a matrix unit: rounded, infinite above the format's range, zero always +0."""
    rounded = _round_bits(x, path)
    return np.where(np.abs(rounded) < 2.0 ** (path.output.bias + 1), rounded, np.copysign(np.inf, x)) + 0.0


_ROUND: dict[Rounding, Callable[[Reals], Reals]] = {Rounding.RNE: np.rint, Rounding.RZ: np.trunc, Rounding.FLOOR: np.floor}


def _specials(p: Reals, c: Reals) -> tuple[Reals, Reals, Reals]:
    """Finite parts of p and c, and the special sum: 0, an infinity, or NaN."""
    p_ok, c_ok = np.isfinite(p), np.isfinite(c)
    if p_ok.all() and c_ok.all():
        return p, c, np.zeros_like(c)
    special = np.where(p_ok, 0.0, p).sum(axis=-1) + np.where(c_ok, 0.0, c)
    return np.where(p_ok, p, 0.0), np.where(c_ok, c, 0.0), special


def _aligned_sum(p: Reals, e: Ints, live: npt.NDArray[np.bool_], c: Reals, path: Datapath) -> Reals:
    """Exact value of T * 2^(E - F): terms [..., L] and c [...] aligned to E and cut. |T| stays far below 2^53."""
    e = np.where(live, e, path.zero_exponent)
    own = np.where(c == 0, path.zero_exponent, np.maximum(_floor_log2(c), path.output.min_exponent))
    top = np.maximum(e.max(axis=-1), own)
    shift = path.fraction_bits - top
    cut = _ROUND[path.alignment_rounding]
    total = cut(np.ldexp(p, shift[..., None])).sum(axis=-1) + cut(np.ldexp(c, shift))
    return np.asarray(np.ldexp(total, -shift))


def _node_fused(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    p, c, special = _specials(p, c)
    if path.normalised and path.family is not Family.GROUPED:
        e = _floor_log2(p)
    live = p != 0
    if path.family is Family.GROUPED:
        shape = (*p.shape[:-1], p.shape[-1] // path.group, path.group)
        p, e, live = p.reshape(shape).sum(axis=-1), e.reshape(shape)[..., 0], live.reshape(shape).any(axis=-1)
    return np.where(special != 0, special, _finish(_aligned_sum(p, e, live, c, path), path))


def _node_pairs(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    """t from zero over the even runs of k, then over the odd runs; the IEEE addition of c is correctly rounded through
    float64, which has more than twice the bits of the output plus two."""
    second = np.arange(p.shape[-1]) // path.group % 2 == 1
    t = np.zeros_like(c)
    for side in (~second, second):
        part_p, part_e = p[..., side], e[..., side]
        for k in range(0, part_p.shape[-1], path.products):
            t = _node_fused(part_p[..., k : k + path.products], part_e[..., k : k + path.products], t, path)
    return np.asarray(round_to(t + c, path.output))


def _round_ieee(x: Reals, path: Datapath) -> Reals:
    """As IEEE 754: zeros keep their sign, directed roundings do not overflow inward."""
    return np.asarray(round_to(_round_bits(x, path), path.output, path.output_rounding))


def _node_ieee(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    product = p[..., 0] if path.fused else _round_ieee(p[..., 0], path)
    if path.output is F64:
        return c + product
    return _round_ieee(sum_odd(c, product), path)


def _node_exact(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    """Exact sum as a growing expansion of float64 (each component below the next one's last bit), then one rounding."""
    p, c, special = _specials(p, c)
    parts = [c]
    for i in range(p.shape[-1]):
        carry = p[..., i]
        for j, part in enumerate(parts):
            carry, parts[j] = _two_sum(carry, part)
        parts.append(carry)
    rest = np.zeros_like(c)
    for part in parts[:-1]:
        rest = sum_odd(part, rest)
    return np.where(special != 0, special, _finish(sum_odd(parts[-1], rest), path))


def _round_flush(x: Reals, path: Datapath) -> Reals:
    """Rounded, small results zero; infinities and NaN pass."""
    special = ~np.isfinite(x)
    finite = _finish(np.where(special, 0.0, x), path)
    if path.flush:
        finite = np.where(np.abs(finite) < 2.0**path.output.min_exponent, 0.0, finite)
    return np.where(special, x, finite)


def _node_tree(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    """Sums of two binary32 values are correctly rounded through float64 to nearest (53 >= 2 * 24 + 2)."""
    p, c = _round_flush(p, path), _round_flush(c, path)
    while p.shape[-1] > 1:
        p = _round_flush(p[..., ::2] + p[..., 1::2], path)
    return _round_flush(c + p[..., 0], path)


def _node_truncated(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    bits, low = path.fraction_bits, path.output.min_exponent
    p = np.where(np.abs(p) >= 2.0 ** (path.output.bias + 1), np.copysign(np.inf, p), p)
    p, c, special = _specials(p, c)
    e = np.where(p == 0, path.zero_exponent, e)
    pairs = path.family is Family.TRUNCATED_PAIRS
    second = np.arange(p.shape[-1]) // max(path.group, 1) % 2 == 1
    sides = (~second, second) if pairs else (np.ones_like(second),)
    tops = [e[..., side].max(axis=-1) for side in sides]
    cut = _ROUND[path.alignment_rounding]
    sums = [cut(np.ldexp(p[..., s], bits - top[..., None])).sum(axis=-1) for s, top in zip(sides, tops, strict=True)]
    dot_top = tops[0] if len(tops) == 1 else np.maximum(tops[0], tops[1])
    dot = np.zeros_like(c)
    for total, top in zip(sums, tops, strict=True):
        dot += np.floor(np.ldexp(total, top - dot_top))
    own = np.where(c == 0, low, np.maximum(_floor_log2(c), low))
    top = np.maximum(dot_top, own)
    extra = path.carry_bits + 1 - bits
    carried = np.floor(np.ldexp(c, bits - top))
    if pairs:
        carried = np.where(own < top - bits - 1, 0.0, carried)
    x = np.floor(np.ldexp(dot, dot_top - top + extra)) + np.ldexp(carried, extra)
    x = np.ldexp(x, top - bits - extra)
    unit = np.maximum(_floor_log2(x), low) - path.carry_bits
    x = np.ldexp(np.floor(np.ldexp(x, -unit)), unit)
    return np.where(special != 0, special, _finish(x, path))


_NODES: dict[Family, Callable[[Reals, Ints, Reals, Datapath], Reals]] = {
    Family.FUSED: _node_fused, Family.GROUPED: _node_fused, Family.BLOCK_SCALED_FUSED: _node_fused,
    Family.EMULATED_PAIRS: _node_pairs, Family.IEEE: _node_ieee, Family.EXACT_SUM: _node_exact,
    Family.PAIR_TREE: _node_tree, Family.TRUNCATED_SUM: _node_truncated, Family.TRUNCATED_PAIRS: _node_truncated,
}


def emulate(a: Operand, w: Operand, path: Datapath, start: Reals | None = None) -> Codes:
    """`dot_emulated` by the compiled twin where numba is installed and compiles the family, else by NumPy: the same bits."""
    twin = _compiled()
    if twin is None or path.family not in twin.EMULATED:
        return dot_emulated(a, w, path, start)
    codes: Codes = twin.dot_emulated_compiled(a, w, path, start)
    return codes


def bound(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None = None) -> Enclosure:
    """`running_bound` by the compiled twin where it can be had, else by NumPy: the same float64 values."""
    twin = _compiled()
    if twin is None or path.family not in twin.BOUNDED:
        return running_bound(a, w, path, prefix)
    found: Enclosure = twin.running_bound_compiled(a, w, path, prefix)
    return found


def _compiled() -> Any:
    """The module of compiled twins, or None without numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(".numba_dot", __package__)


# Bounds on |emulated - exact| -----------------------------------------------------------------------------------------
#
# x is the exact prefix sum and b a bound on |c - x|, c the accumulator. Every quantity is an upper bound computed outward
# (`outward` per step covers the float64 roundings of the bound itself). pow2 is the largest power of two not above a value.


def pow2(x: Reals) -> Reals:
    """2^floor(log2 x) of x >= 0; 0 for zero and float64 subnormals, infinity for infinity."""
    return (np.ascontiguousarray(x).view(np.int64) & 0x7FF0000000000000).view(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Per element of an operand [rows, K]: value (0 where not finite), the power of two that aligns it (0 for a zero), the
    weight of its lowest set bit (infinity for a zero)."""

    value: Reals
    top: Reals
    low: Reals


def weights(lanes: Lanes) -> Weights:
    value = np.where(np.isfinite(lanes.value), lanes.value, 0.0)
    return Weights(value, np.where(value == 0, 0.0, np.ldexp(1.0, lanes.exponent)), low_bit(value))


def half_steps(path: Datapath) -> float:
    """Share of the last kept bit that a rounding of the result can lose: half of it to nearest, else all."""
    return 0.5 if path.output_rounding is Rounding.RNE else 1.0


def rounding_loss(x: Reals, before: Reals, slack: Reals, path: Datapath, bits: int, share: float) -> Reals:
    """Loss when |x| +- `before` is rounded to `bits` significant bits of the output format: `share` of the unit of the
    largest result, 0 where the value is exactly x (nothing lost before, prefix certified: slack 0) and x needs no rounding,
    infinity where it may overflow."""
    reach = np.abs(x) + before + slack
    unit = np.maximum(pow2(reach), 2.0**path.output.min_exponent) * 2.0 ** (1 - bits)
    exact = (before == 0) & (slack == 0) & (np.rint(x / unit) * unit == x)
    overflow = reach > float(path.output.max_finite)
    return np.where(overflow, np.inf, np.where(exact, 0.0, share * unit))


def prepare(
    a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None
) -> tuple[Weights, Weights, Enclosure, Enclosure, Reals]:
    """Weights of both sides, the prefix, the exact result (prefix included) and the float64 slack of prefix sums.

    Slack is 0 where every partial sum is exact in float64 (the certificate of `dot_exact`, prefix included).
    """
    if path.alignment_rounding is not Rounding.RZ or path.normalised:
        raise ValueError(f"{path.name}: got alignment other than truncation of un-normalised products; bounds cover only that")
    m, n, k = check_pair(a, w, None, path)
    zeros = np.zeros((m, n))
    before = Enclosure(zeros, zeros) if prefix is None else prefix
    if before.value.shape != (m, n) or before.radius.shape != (m, n):
        raise ValueError(f"{path.name}: got a prefix of shape {before.value.shape}, expected {(m, n)}")
    read_a, read_w = read(a, path), read(w, path)
    left, right = weights(read_a), weights(read_w)
    given_a, given_w = values(a), values(w)
    dot = dot_exact(given_a, given_w)
    with np.errstate(invalid="ignore", over="ignore"):
        total, error = _two_sum(before.value, dot.value)
        error = np.where(np.isfinite(total), np.abs(error), 0.0)
        exact = Enclosure(total, (error + dot.radius + _reading_loss(given_a, given_w, left, right, path)) * outward)
        initial = np.where(np.isfinite(before.value), before.value, 0.0)
        size = (np.abs(left.value) @ np.abs(right.value).T + np.abs(initial)) * (1.0 + 2.0**-20)
        low = np.minimum(
            np.min(left.low, axis=1, initial=np.inf)[:, None] * np.min(right.low, axis=1, initial=np.inf)[None, :],
            low_bit(initial),
        )
        slack = np.where(size < 2.0**53 * low, 0.0, (k + 4) * 2.0**-52 * size)
    return left, right, Enclosure(initial, before.radius), exact, slack


def _reading_loss(a: Reals, w: Reals, left: Weights, right: Weights, path: Datapath) -> Reals | float:
    """Bound on sum |a w - a' w'| where the unit reads a', w': operands cut to `operand_bits`, or flushed."""
    if not (path.operand_bits or path.flush):
        return 0.0
    k = a.shape[1]
    a, w = (np.where(np.isfinite(x), x, 0.0) for x in (a, w))
    first = dot_exact(np.abs(a - left.value[:, :k]), np.abs(w))
    second = dot_exact(np.abs(left.value[:, :k]), np.abs(w - right.value[:, :k]))
    return (first.value + first.radius + second.value + second.radius) * outward


def running_bound(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None = None) -> Enclosure:
    """Exact result [M, N] and a bound on |emulated - exact| for `path` in ascending k: value = prefix.value + sum_k a w of the
    operands as given, and the result of `dot_emulated` lies in [value - radius, value + radius]. What the unit drops when it
    reads an operand (tf32, flushed subnormals) counts as its error.

    `prefix` is what the accumulator stands for at the start: its exact value, and how far the accumulator may be from it.
    A radius of 0 says that the emulated result is exact. Infinite where the result may overflow. INTEGER: the value is the
    result itself, wrapped or clamped, and the prefix must be exact. Elements with special operands have the special value.
    Raises ValueError where `dot_emulated` does, and for records that align other than by truncation.
    """
    if path.family is Family.INTEGER:
        return _integer_bound(a, w, path, prefix)
    left, right, before, exact, slack = prepare(a, w, path, prefix)
    k = left.value.shape[1]
    step = {Family.EMULATED_PAIRS: path.instruction_k, Family.IEEE: 1}.get(path.family, path.products)
    m, n = exact.value.shape
    radius = np.empty((m, n))
    rows = max(1, (1 << 14) // max(1, n))
    with np.errstate(invalid="ignore", over="ignore"):
        for top in range(0, m, rows):
            part = slice(top, top + rows)
            x, b = before.value[part], before.radius[part].copy()
            block = Weights(left.value[part], left.top[part], left.low[part])
            for first in range(0, k, step):
                x, b = _STEPS[path.family](_Node(block, right, range(first, first + step)), x, b, slack[part], path)
            radius[part] = b
    return enclose(exact, radius)


def enclose(exact: Enclosure, radius: Reals) -> Enclosure:
    """Add the uncertainty of the exact value; a special value is meant exactly unless the accumulator may overflow."""
    total = np.where(np.isfinite(exact.value), (radius + exact.radius) * outward, np.where(np.isinf(radius), np.inf, 0.0))
    return Enclosure(exact.value, np.where(total > 0, total, 0.0))


def _integer_bound(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None) -> Enclosure:
    if prefix is not None and prefix.radius.any():
        raise ValueError(f"{path.name}: got a prefix with a radius, expected exact integers")
    codes = dot_emulated(a, w, path, None if prefix is None else prefix.value)
    value = decode(codes, INT32)
    return Enclosure(value, np.zeros_like(value))


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """The products of one node between a block of rows and all columns."""

    a: Weights
    w: Weights
    index: Sequence[int]

    def product(self, k: int) -> Reals:
        return self.a.value[:, k, None] * self.w.value[None, :, k]

    def top(self) -> Reals:
        """Largest aligning power of two of a nonzero product; 0 where there is none."""
        largest = np.zeros((self.a.top.shape[0], self.w.top.shape[0]))
        for k in self.index:
            np.maximum(largest, self.a.top[:, k, None] * self.w.top[None, :, k], out=largest)
        return largest

    def low(self, k: int) -> Reals:
        return self.a.low[:, k, None] * self.w.low[None, :, k]

    def take(self, keep: Callable[[int], bool]) -> _Node:
        return _Node(self.a, self.w, [k for i, k in enumerate(self.index) if keep(i)])

    def runs(self, length: int) -> Iterator[Sequence[int]]:
        for i in range(0, len(self.index), length):
            yield self.index[i : i + length]


def _aligned_top(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    """Upper bound of |c| and of the power of two that the node aligns to."""
    reach = np.abs(x) + b + slack
    own = np.where(reach > 0, np.maximum(pow2(reach), 2.0**path.output.min_exponent), 0.0)
    return reach, np.maximum(np.maximum(node.top(), own), 2.0**path.zero_exponent)


def _step_fused(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    """A term is cut only where its lowest bit is below 2^(E - F), and then loses less than that and than itself."""
    reach, top = _aligned_top(node, x, b, slack, path)
    unit = top * 2.0**-path.fraction_bits
    kept = (b == 0) & (slack == 0) & (np.rint(x / unit) * unit == x)
    before = b + np.where(kept, 0.0, np.minimum(unit, reach))
    for run in node.runs(path.group if path.family is Family.GROUPED else 1):
        p, low = node.product(run[0]), node.low(run[0])
        for k in run[1:]:
            p = p + node.product(k)
            low = np.minimum(low, node.low(k))
        before = before + np.where(low < unit, np.minimum(np.abs(p), unit), 0.0)
        x = x + p
    loss = rounding_loss(x, before, slack, path, path.output_bits, half_steps(path))
    return x, (before + loss) * outward


def _step_pairs(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    t, t_bound = np.zeros_like(x), np.zeros_like(x)
    for parity in (0, 1):
        side = node.take(lambda i, parity=parity: i // path.group % 2 == parity)  # type: ignore[misc]
        for run in side.runs(path.products):
            t, t_bound = _step_fused(_Node(node.a, node.w, run), t, t_bound, slack, path)
    x, before = x + t, b + t_bound
    return x, (before + rounding_loss(x, before, slack, path, path.output.precision, 0.5)) * outward


def _step_ieee(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    p, none = node.product(node.index[0]), np.zeros_like(x)
    before = b if path.fused else b + rounding_loss(p, none, none, path, path.output_bits, half_steps(path))
    x = x + p
    return x, (before + rounding_loss(x, before, slack, path, path.output_bits, half_steps(path))) * outward


def _step_exact(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    for k in node.index:
        x = x + node.product(k)
    return x, (b + rounding_loss(x, b, slack, path, path.output_bits, 0.5)) * outward


def _flushing_loss(x: Reals, before: Reals, slack: Reals, path: Datapath) -> Reals:
    """A rounding that also flushes: results below the smallest normal become zero."""
    smallest = 2.0**path.output.min_exponent
    safe = (before == 0) & (slack == 0) & ((x == 0) | (np.abs(x) >= smallest)) | (np.abs(x) > 2 * (before + slack) + 2 * smallest)
    return rounding_loss(x, before, slack, path, path.output_bits, 0.5) + np.where(safe, 0.0, smallest)


def _step_tree(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    none = np.zeros_like(x)
    level = []
    for k in node.index:
        p = node.product(k)
        level.append((p, _flushing_loss(p, none, none, path)))
    while len(level) > 1:
        sums = [(p + q, e + f) for (p, e), (q, f) in zip(level[::2], level[1::2], strict=True)]
        level = [(s, (e + _flushing_loss(s, e, slack, path)) * outward) for s, e in sums]
    s, error = level[0]
    reach = np.abs(x) + b + slack
    smallest = 2.0**path.output.min_exponent
    flushed_c = np.where((reach == 0) | (np.abs(x) - b - slack >= smallest), 0.0, smallest)
    x, before = x + s, b + error + flushed_c
    return x, (before + _flushing_loss(x, before, slack, path)) * outward


def _step_truncated(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    """Cuts of the products, floors of the sums to the common exponent, floor of c, floor of the sum, rounding."""
    reach = np.abs(x) + b + slack
    pairs = path.family is Family.TRUNCATED_PAIRS
    sides = [node.take(lambda i, s=s: i // path.group % 2 == s) for s in (0, 1)] if pairs else [node]  # type: ignore[misc]
    tops = [side.top() for side in sides]
    dot_top = np.maximum(tops[0], tops[-1])
    top = np.maximum(dot_top, np.maximum(pow2(reach), 2.0**path.output.min_exponent))
    unit = top * 2.0**-path.fraction_bits
    kept = (b == 0) & (slack == 0) & (np.rint(x / unit) * unit == x)
    before = b + np.where(kept, 0.0, unit)
    for side, own in zip(sides, tops, strict=True):
        own_unit = own * 2.0**-path.fraction_bits
        lowest = np.full_like(x, np.inf)
        for k in side.index:
            p, low = node.product(k), node.low(k)
            before = before + np.where(low < own_unit, np.minimum(np.abs(p), own_unit), 0.0)
            before = before + np.where(np.abs(p) >= 2.0 ** (path.output.bias + 1), np.inf, 0.0)
            lowest = np.minimum(lowest, low)
            x = x + p
        lowest = np.maximum(lowest, own_unit)
        joint = dot_top * 2.0**-path.fraction_bits
        before = before + np.where((lowest < joint) & pairs, joint, 0.0)
        carry = top * 2.0 ** (-path.carry_bits - 1)
        before = before + np.where(np.where(pairs, np.maximum(lowest, joint), lowest) < carry, carry, 0.0)
    before = before + rounding_loss(x, before, slack, path, path.carry_bits + 1, 1.0)
    return x, (before + rounding_loss(x, before, slack, path, path.output_bits, 0.5)) * outward


_STEPS: dict[Family, Callable[[_Node, Reals, Reals, Reals, Datapath], tuple[Reals, Reals]]] = {
    Family.FUSED: _step_fused, Family.GROUPED: _step_fused, Family.BLOCK_SCALED_FUSED: _step_fused,
    Family.EMULATED_PAIRS: _step_pairs, Family.IEEE: _step_ieee, Family.EXACT_SUM: _step_exact,
    Family.PAIR_TREE: _step_tree, Family.TRUNCATED_SUM: _step_truncated, Family.TRUNCATED_PAIRS: _step_truncated,
}


def agnostic_bound(a: Operand, w: Operand, path: Datapath, splits: int = 1) -> Enclosure:
    """Exact sum and a bound on |emulated - exact| whatever the order of k, K cut into at most `splits` sums that are then
    added in the output format, in any order.

    With S = sum |a| |w| and the largest aligned power of two M, no accumulator exceeds top = max(S, M, smallest normal) times
    the growth of its roundings, so each of J nodes loses at most a fixed share of that. IEEE: n u / (1 - n u) S, n = K,
    plus an underflow term (Higham, Accuracy and Stability, 3.1). INTEGER as `running_bound`, clamping excluded.
    Raises ValueError as `running_bound`, for splits < 1, and for INTEGER sums that may clamp on the way.
    """
    if splits < 1:
        raise ValueError(f"{path.name}: got splits {splits}, expected at least 1")
    if path.family is Family.INTEGER:
        return _integer_agnostic(a, w, path)
    left, right, _, exact, _ = prepare(a, w, path, None)
    k = a.codes.shape[1]
    reach = dot_exact(np.abs(left.value), np.abs(right.value))
    size = (reach.value + reach.radius) * outward
    share, node_count = _node_share(path), -(-k // path.products) + splits - 1
    unit = half_steps(path) * 2.0 ** (1 - path.output_bits)
    joins = (splits - 1) * 2.0**-path.output.precision
    smallest = 2.0**path.output.min_exponent
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if path.family is Family.IEEE:
            spent = (k + splits) * unit
            radius = np.full_like(size, np.inf)
            if spent < 1:
                radius = (spent * size + (k + splits) * 2 * unit * smallest) / (1.0 - spent)
            grown = size + radius
        else:
            if path.family is Family.EMULATED_PAIRS:
                node_count = 2 * (-(-k // path.instruction_k) + splits - 1)
                joins += node_count * 2.0**-path.output.precision
            if path.family is Family.PAIR_TREE:
                node_count, share = k + splits, unit
            largest = np.maximum(_largest_top(left, right), smallest)
            grown = np.maximum(size, largest) * np.exp(node_count * share + joins) * (1.0 + 2.0**-20)
            radius = (node_count * share + joins) * grown
            if path.flush:
                radius = radius + 2 * (k + splits) * smallest
        radius = np.where(grown > float(path.output.max_finite), np.inf, radius * (1.0 + 2.0**-20))
    return enclose(exact, radius)


def _node_share(path: Datapath) -> float:
    """Largest loss of one node, relative to the largest power of two or value it meets."""
    unit = half_steps(path) * 2.0 ** (1 - path.output_bits)
    terms = path.products // path.group if path.family is Family.GROUPED else path.products
    if path.family is Family.EXACT_SUM:
        return unit
    if path.family in (Family.TRUNCATED_SUM, Family.TRUNCATED_PAIRS):
        return (terms + 3) * 2.0**-path.fraction_bits + 2.0 ** (2 - path.carry_bits) + unit
    return (terms + 1) * 2.0**-path.fraction_bits + unit


def _largest_top(a: Weights, w: Weights) -> Reals:
    largest = np.zeros((a.top.shape[0], w.top.shape[0]))
    for k in range(a.top.shape[1]):
        np.maximum(largest, a.top[:, k, None] * w.top[None, :, k], out=largest)
    return largest


def _integer_agnostic(a: Operand, w: Operand, path: Datapath) -> Enclosure:
    left, right = read(a, path).value, read(w, path).value
    if path.saturate and (np.abs(left) @ np.abs(right).T >= 2.0**31).any():
        raise ValueError(
            f"{path.name}: got sums that may clamp in some order, expected sum |a| |w| below 2^31; declare the order of k"
        )
    return _integer_bound(a, w, path, None)
