"""The exact sum of products, enclosed.

Decides: what a side of a dot product is (`Operand`, `values`), the sum as a Fraction (`dot_fraction`), and the same for matrices
in float64 with a certificate or a radius (`dot_exact`).
Refuses: any rounding of a matrix unit (see dot_definition), and a float64 sum that nothing certifies: where float64 cannot hold
the sum, the radius says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from .formats import Codes, Format, Reals, container, decode

__all__ = ["Enclosure", "Operand", "dot_exact", "dot_fraction", "low_bit", "outward", "two_sum", "values"]

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
    S = sum |a| |w|, so S < 2^53 q makes float64 BLAS exact. Elsewhere both rows are cut in two and the four sums added with
    their errors; the radius is then what float64 cannot hold. NaN operands, Inf * 0 and Inf - Inf give NaN, other infinities
    an infinity. Raises ValueError where the inner lengths differ, or where sums could leave 2^-1022..2^1022.
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


def two_sum(a: Reals, b: Reals) -> tuple[Reals, Reals]:
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
    middle, error_1 = two_sum(terms[1].value, terms[2].value)
    middle, error_2 = two_sum(middle, terms[3].value)
    total, error_3 = two_sum(terms[0].value, middle)
    errors, error_4 = two_sum(error_1, error_2)
    errors, error_5 = two_sum(error_3, errors)
    total, error_6 = two_sum(total, errors)
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
