"""Rounding: which code stands for a real number, under a stated rounding mode and overflow policy.

Decides: `encode_scalar`, the definition in Fractions; `encode`, its exact array twin; the codes on either side of a value;
float64 sums and products rounded to odd, so that one later rounding is the only one that counts.
Refuses: library casts as a definition, and rounding twice: every conversion rounds the exact input value once.

Rules that formats share:
- A float result is the exact value rounded at the format's own precision with an unbounded exponent above, subnormals below.
- NaN gives `nan_code` under both policies (sign and payload dropped; E2M1, which has no NaN, gives +6), and 0 for integers.
- -0 and negative values that round to zero give -0 where the format has it, else code 0 (fnuz, integers).
- UE4M3 has no sign: everything negative, -inf included, gives code 0 under both policies.
- E8M0 has neither sign nor zero: |x| is converted (FLOOR and CEIL act on |x|; RZ = FLOOR), nearest is by distance between the
  reals with ties up (RNTZ: down), zero and whatever rounds below 2^-127 give 0x00 = 2^-127. Source: PTX ISA cvt, CUDA fp8 header.
- Directed modes do not overflow towards zero: finite x > max gives max under RZ and FLOOR, finite x < -max gives -max under
  RZ and CEIL (IEEE 754-2019, 7.4). Infinities always overflow.
"""

from __future__ import annotations

from enum import IntEnum
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import BF16, F16, F32, F64, Codes, Format, Kind, Nan, Reals, Special, container, decode

__all__ = [
    "Overflow", "Rounding", "encode", "encode_scalar", "lookup_table", "mul_odd", "neighbours", "round_to", "sum_odd",
]

Mask = npt.NDArray[np.bool_]


class Rounding(IntEnum):
    """Which of the two neighbours an inexact value goes to."""

    RNE = 0  # nearest, ties to the even code
    RZ = 1  # toward zero
    RNA = 2  # nearest, ties away from zero
    FLOOR = 3  # toward minus infinity
    CEIL = 4  # toward plus infinity
    RNTZ = 5  # nearest, ties toward zero


class Overflow(IntEnum):
    """What a value beyond the largest finite one becomes.

    SATFINITE: the largest finite value with the sign of x, infinities included; integers clamp.
    SPECIAL: infinity with the sign of x where the format has one, else `nan_code` (positive canonical NaN, no sign kept), else,
    in a float format with neither (E2M1), as SATFINITE. Integers raise ValueError, for NaN too.
    """

    SATFINITE = 0
    SPECIAL = 1


def _round_fraction(value: Fraction, rounding: Rounding) -> int:
    """`value` to an integer."""
    floor, rest = divmod(value.numerator, value.denominator)
    tie, above = 2 * rest == value.denominator, 2 * rest > value.denominator
    up = {
        Rounding.RNE: above or (tie and floor % 2 == 1),
        Rounding.RZ: rest > 0 and value < 0,
        Rounding.RNA: above or (tie and value > 0),
        Rounding.FLOOR: False,
        Rounding.CEIL: rest > 0,
        Rounding.RNTZ: above or (tie and value < 0),
    }
    return floor + up[rounding]


def _floor_log2(value: Fraction) -> int:
    """Largest e with 2^e <= value, for value > 0."""
    n, d = value.numerator, value.denominator
    estimate = n.bit_length() - d.bit_length()
    return estimate if d << max(estimate, 0) <= n << max(-estimate, 0) else estimate - 1


def encode_scalar(
    value: Fraction | Special, fmt: Format, rounding: Rounding = Rounding.RNE, overflow: Overflow = Overflow.SATFINITE
) -> int:
    """The definition: the code of one exact value (a zero Fraction is +0). The rules are those of the module docstring.

    Raises ValueError for integers under Overflow.SPECIAL where the value is not finite or rounds out of range.
    """
    if fmt.kind in (Kind.INT, Kind.UINT):
        return _integer_scalar(value, fmt, rounding, overflow)
    if value is Special.NAN:
        return fmt.nan_code
    negative = value in (Special.NEG_INF, Special.NEG_ZERO) if isinstance(value, Special) else value < 0
    if negative and not fmt.signed:
        if fmt.kind is Kind.FLOAT:
            return 0
        negative = False
    finite = not (value is Special.POS_INF or value is Special.NEG_INF)
    magnitude = Fraction(0) if isinstance(value, Special) else abs(value)
    exponent = max(_floor_log2(magnitude), fmt.min_exponent) if magnitude else fmt.min_exponent
    quantum = Fraction(2) ** (exponent - fmt.mantissa_bits)
    steps = abs(_round_fraction((-magnitude if negative else magnitude) / quantum, rounding))
    # Codes of one sign count the values in order, so a carry into the next binade needs no care; E8M0 starts at 1 * 2^-127.
    code = ((exponent - fmt.min_exponent) << fmt.mantissa_bits) + steps
    code = max(code - 1, 0) if fmt.kind is Kind.EXPONENT else code
    if code > fmt.max_code or not finite:
        inward = rounding is Rounding.RZ or rounding is (Rounding.CEIL if negative else Rounding.FLOOR)
        if overflow is Overflow.SATFINITE or (finite and inward) or fmt.nan is Nan.NONE:
            code = fmt.max_code
        elif fmt.has_inf:
            code = fmt.max_code + 1
        else:
            return fmt.nan_code
    return code | fmt.sign_bit if negative and (code or fmt.has_neg_zero) else code


def _integer_range(fmt: Format) -> tuple[int, int]:
    """Smallest and largest integer of the format."""
    return (-fmt.sign_bit if fmt.kind is Kind.INT else 0), fmt.max_code


def _integer_scalar(value: Fraction | Special, fmt: Format, rounding: Rounding, overflow: Overflow) -> int:
    low, high = _integer_range(fmt)
    special = {Special.NAN: 0, Special.NEG_ZERO: 0, Special.POS_INF: high, Special.NEG_INF: low}
    integer = special[value] if isinstance(value, Special) else _round_fraction(value, rounding)
    outside = not low <= integer <= high or (isinstance(value, Special) and value is not Special.NEG_ZERO)
    if overflow is Overflow.SPECIAL and outside:
        raise ValueError(_out_of_range(str(value), fmt))
    return min(max(integer, low), high) & ((1 << fmt.bits) - 1)


def _out_of_range(got: str, fmt: Format) -> str:
    low, high = _integer_range(fmt)
    return f"{fmt.name}: got {got}, expected a value that rounds into {low}..{high}; use Overflow.SATFINITE to clamp"


def encode(
    x: npt.NDArray[Any], fmt: Format, rounding: Rounding = Rounding.RNE, overflow: Overflow = Overflow.SATFINITE
) -> Codes:
    """Array twin of `encode_scalar`: codes of float16, float32 or float64 values, same shape, dtype `container(fmt)`.

    Each element is rounded once from its exact value. The fast paths assume that nothing in the process switched the
    processor to flush subnormals. Raises ValueError for another dtype, and where `encode_scalar` does.
    """
    x = np.asarray(x)
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"{fmt.name}: got dtype {x.dtype}, expected float16, float32 or float64; convert exactly first")
    flat = x.reshape(-1)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        flat = flat.astype(np.float32) if flat.dtype == np.float16 else flat
    if fmt.kind in (Kind.INT, Kind.UINT):
        codes = _encode_integers(flat, fmt, rounding, overflow)
    elif fmt.bits <= 8:
        codes = _encode_by_table(flat, lookup_table(fmt, rounding, overflow, flat.dtype.itemsize))
    elif rounding is Rounding.RNE and fmt in (BF16, F16, F32):
        codes = _encode_by_cast(flat, fmt, overflow)
    else:
        codes = _encode_bits(flat, fmt, rounding, overflow)
    return codes.reshape(x.shape)


def _encode_bits(flat: npt.NDArray[Any], fmt: Format, rounding: Rounding, overflow: Overflow) -> Codes:
    """Any float or E8M0 target, by integer arithmetic on the bits of the input."""
    narrow = flat.dtype == np.float32 and fmt.mantissa_bits <= 23 and fmt.min_exponent >= -126
    p, bias = (23, 127) if narrow else (52, 1023)
    real, integer = np.dtype(np.float32 if narrow else np.float64), np.int32 if narrow else np.int64
    with np.errstate(invalid="ignore"):  # a signalling NaN
        bits: npt.NDArray[Any] = np.ascontiguousarray(flat, dtype=real).view(integer)
    one = integer(1)
    magnitude = bits & np.iinfo(integer).max
    negative = bits < 0 if fmt.kind is Kind.FLOAT else np.zeros(bits.shape, dtype=np.bool_)
    infinity = integer((2 * bias + 1) << p)
    field = magnitude >> p
    significand = (magnitude & ((one << p) - one)) | np.where(field > 0, one << p, one - one)
    exponent = np.maximum(field, one) - integer(bias)
    top = np.maximum(exponent, integer(fmt.min_exponent))
    # A significand shifted right by 30 (62) bits is all remainder and below half, as for any longer shift.
    shift = np.minimum(top - exponent + integer(p - fmt.mantissa_bits), integer(8 * real.itemsize - 2))
    kept = significand >> shift
    rest = significand & ((one << shift) - one)
    code = ((top - integer(fmt.min_exponent)) << fmt.mantissa_bits) + kept
    code += _away(kept, rest, (one << shift) >> 1, negative, rounding)
    if fmt.kind is Kind.EXPONENT:
        code = np.maximum(code - one, integer(0))
    infinite = magnitude == infinity
    over = (code > fmt.max_code) | infinite
    code[over] = fmt.max_code
    flagged = over if overflow is Overflow.SPECIAL and fmt.nan is not Nan.NONE else np.zeros_like(over)
    inward = {Rounding.RZ: np.ones_like(over), Rounding.FLOOR: ~negative, Rounding.CEIL: negative}
    if rounding in inward:
        flagged = flagged & (infinite | ~inward[rounding])
    if fmt.has_inf:
        code[flagged] = fmt.max_code + 1
    codes: Codes = code.astype(container(fmt))
    if fmt.signed:
        codes[negative if fmt.has_neg_zero else negative & (code != 0)] |= container(fmt).type(fmt.sign_bit)
    elif fmt.kind is Kind.FLOAT:
        codes[negative] = 0
        flagged = flagged & ~negative
    codes[(magnitude > infinity) if fmt.has_inf else flagged | (magnitude > infinity)] = fmt.nan_code
    return codes


def _away(
    kept: npt.NDArray[Any], rest: npt.NDArray[Any], half: npt.NDArray[Any], negative: Mask, rounding: Rounding
) -> Mask:
    """Which magnitudes go up to the next code; `half` is 0 where nothing is cut off."""
    if rounding is Rounding.RZ:
        return np.zeros(rest.shape, dtype=np.bool_)
    if rounding in (Rounding.FLOOR, Rounding.CEIL):
        inexact: Mask = rest > 0
        return inexact & (negative if rounding is Rounding.FLOOR else ~negative)
    tie: Mask = (rest == half) & (half > 0)
    if rounding is Rounding.RNE:
        tie &= (kept & 1) == 1
    elif rounding is Rounding.RNTZ:
        tie[:] = False
    above: Mask = rest > half
    return above | tie


@cache
def lookup_table(fmt: Format, rounding: Rounding, overflow: Overflow, itemsize: int) -> Codes:
    """Codes by the top 16 bits and a sticky bit of a float32 (itemsize 4) or float64 (8): 131,072 codes, read-only.

    index = (bits >> 15) | (bits & 0x7FFF != 0) for float32, 47 and 2^47 - 1 for float64. Float targets of at most 8 bits: the
    rounding position and the bit below it are then among the 16 (float64 keeps 4 fraction bits, e4m3 needs 3 + 1; subnormal
    results need fewer), so the bits further down matter only by being zero or not.
    """
    if fmt.bits > 8 or fmt.kind in (Kind.INT, Kind.UINT):
        raise ValueError(f"{fmt.name}: got a format without a table, expected a float format of at most 8 bits; use encode")
    index = np.arange(1 << 17, dtype=np.uint64)
    representative = ((index >> np.uint64(1)) << np.uint64(8 * itemsize - 16)) | (index & np.uint64(1))
    real = np.dtype(f"f{itemsize}")
    table = _encode_bits(representative.astype(f"u{itemsize}").view(real), fmt, rounding, overflow)
    table.setflags(write=False)
    return table


def _encode_by_table(flat: npt.NDArray[Any], table: Codes) -> Codes:
    """Look codes up block by block, small enough for the cache."""
    integer, low = (np.dtype(np.uint32), 15) if flat.dtype.itemsize == 4 else (np.dtype(np.uint64), 47)
    bits: npt.NDArray[Any] = np.ascontiguousarray(flat).view(integer)
    mask = integer.type((1 << low) - 1)
    codes = np.empty(bits.shape, dtype=table.dtype)
    block = 1 << 14
    index = np.empty(block, dtype=np.intp)
    sticky: npt.NDArray[Any] = np.empty(block, dtype=integer)
    for start in range(0, bits.size, block):
        part = bits[start : start + block]
        n = part.size
        np.bitwise_and(part, mask, out=sticky[:n])
        sticky[:n] += mask  # carries into bit `low` exactly when one of the bits below is set
        np.bitwise_or(sticky[:n], part, out=sticky[:n])
        np.right_shift(sticky[:n], integer.type(low), out=index[:n], casting="unsafe")
        np.take(table, index[:n], out=codes[start : start + n], mode="clip")
    return codes


def _encode_by_cast(flat: npt.NDArray[Any], fmt: Format, overflow: Overflow) -> Codes:
    """Nearest even to binary16 and binary32, where NumPy's cast is IEEE's but for NaN and overflow, and to bfloat16."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if fmt is BF16:
            bits = _single_odd(flat)
            codes = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
        else:
            codes = flat.astype(np.float16 if fmt is F16 else np.float32).view(container(fmt))
    codes[np.isnan(flat)] = fmt.nan_code
    if overflow is Overflow.SATFINITE:
        one = container(fmt).type(1)
        codes[(codes & ~container(fmt).type(fmt.sign_bit)) == fmt.max_code + 1] -= one
    return codes


def _single_odd(flat: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Bits of float32 or float64 values rounded to odd in float32; 24 bits with an odd last one decide any 8-bit significand."""
    single = np.ascontiguousarray(flat, dtype=np.float32)
    bits: npt.NDArray[np.uint32] = single.view(np.uint32)
    if flat.dtype == np.float32:
        return bits
    exact, nearest = np.abs(flat), np.abs(single.astype(np.float64))
    step = (exact > nearest).astype(np.uint32) - (exact < nearest).astype(np.uint32)
    bits += step * (~bits & np.uint32(1))
    return bits


def _encode_integers(flat: npt.NDArray[Any], fmt: Format, rounding: Rounding, overflow: Overflow) -> Codes:
    """Integer targets: whole part and remainder are exact in float64."""
    directed = {Rounding.RNE: np.rint, Rounding.RZ: np.trunc, Rounding.FLOOR: np.floor, Rounding.CEIL: np.ceil}
    with np.errstate(invalid="ignore"):
        flat = flat.astype(np.float64)
        if rounding in directed:
            rounded = directed[rounding](flat)
        else:
            whole = np.trunc(flat)
            rest = np.abs(flat - whole)
            up = rest >= 0.5 if rounding is Rounding.RNA else rest > 0.5
            rounded = whole + np.where(up, np.copysign(1.0, flat), 0.0)
    low, high = _integer_range(fmt)
    if overflow is Overflow.SPECIAL:
        outside = ~((rounded >= low) & (rounded <= high))
        if outside.any():
            where = int(np.argmax(outside))
            raise ValueError(_out_of_range(f"{flat[where]} at flat index {where}", fmt))
    integers = np.where(np.isnan(rounded), 0.0, np.clip(rounded, low, high)).astype(np.int64)
    return (integers & ((1 << fmt.bits) - 1)).astype(container(fmt))


def round_to(
    x: Reals, fmt: Format, rounding: Rounding = Rounding.RNE, overflow: Overflow = Overflow.SPECIAL
) -> Reals:
    """Values of `fmt` nearest to x in the sense of `rounding`: decode(encode(x)), float64 of the same shape."""
    x = np.asarray(x, dtype=np.float64)
    if fmt is F64 and overflow is Overflow.SPECIAL:
        return x.copy()
    if fmt in (F16, F32) and rounding is Rounding.RNE and overflow is Overflow.SPECIAL:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return x.astype(np.float16 if fmt is F16 else np.float32).astype(np.float64)
    return decode(encode(x, fmt, rounding, overflow), fmt)


def neighbours(x: npt.NDArray[Any], fmt: Format) -> tuple[Codes, Codes]:
    """Codes of the largest value <= x and of the smallest value >= x, each of the shape of x; equal where x is a value.

    A negative x above the smallest subnormal has -0 as its upper neighbour where the format has -0. Raises ValueError where an
    element is NaN or outside the format's finite range (for E8M0: below 2^-127, so also zero).
    """
    x = np.asarray(x)
    ends = decode(np.array([fmt.min_code, fmt.max_code], dtype=container(fmt)), fmt)
    outside = ~((x >= ends[0]) & (x <= ends[1]))
    if outside.any():
        raise ValueError(f"{fmt.name}: got {x[outside].flat[0]}, expected values in {ends[0]}..{ends[1]}; clamp them first")
    return encode(x, fmt, Rounding.FLOOR), encode(x, fmt, Rounding.CEIL)


def _to_odd(nearest: Reals, error: Reals) -> Reals:
    """`nearest` + `error` rounded to odd: where inexact, the one of the two enclosing floats whose last bit is 1."""
    bits = np.ascontiguousarray(nearest).view(np.int64)
    even = (error != 0) & np.isfinite(nearest) & ((bits & 1) == 0)
    step = np.where((error > 0) == (nearest > 0), 1, -1)
    return np.where(even, bits + step, bits).view(np.float64).reshape(nearest.shape)


def sum_odd(a: Reals, b: Reals) -> Reals:
    """a + b in float64 rounded to odd; broadcasts. Infinities and NaN give what IEEE addition gives.

    Rounding the result to a format of at most 51 significand bits is rounding the exact sum (two bits to spare, and an odd last
    bit is never a tie). Raises ValueError where finite operands exceed 2^1022 in magnitude: the sum could overflow.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for operand in (a, b):
        _check_range("sum_odd", operand, 0.0, 2.0**1022)
    with np.errstate(invalid="ignore"):
        total = np.asarray(a + b)
        b_part = total - a
        error = (a - (total - b_part)) + (b - b_part)
    return _to_odd(total, error)


def mul_odd(a: Reals, b: Reals) -> Reals:
    """a * b in float64 rounded to odd; broadcasts. Infinities, NaN and zeros give what IEEE multiplication gives.

    Rounding the result to a format of at most 51 significand bits is rounding the exact product. Raises ValueError where a
    nonzero finite operand lies outside 2^-480..2^480 in magnitude: beyond it the error term may not be a float64.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for operand in (a, b):
        _check_range("mul_odd", operand, 2.0**-480, 2.0**480)
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.asarray(a * b)
        a_high, b_high = _upper_half(a), _upper_half(b)
        a_low, b_low = a - a_high, b - b_high
        error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return _to_odd(product, error)


def _upper_half(x: Reals) -> Reals:
    """x to 26 significant bits or fewer, so that the remainder has 26 too and all four partial products are exact."""
    scaled = x * (2.0**27 + 1.0)
    return scaled - (scaled - x)


def _check_range(name: str, x: Reals, low: float, high: float) -> None:
    magnitude = np.abs(x)
    outside = ((magnitude > high) & np.isfinite(x)) | ((magnitude < low) & (x != 0))
    if outside.any():
        got = x[outside].flat[0]
        raise ValueError(f"{name}: got operand {got}, expected magnitudes in {low}..{high}, zero or non-finite; rescale exactly")
