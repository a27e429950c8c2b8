"""One test body for the definition and its array, compiled and torch twins; expectations from Fractions compared here."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    F16,
    F32,
    F64,
    FORMATS,
    INT4,
    INT8,
    INT32,
    UE4M3,
    UINT4,
    UINT8,
    Codes,
    Format,
    Kind,
    Special,
    container,
    decode,
    decode_scalar,
    is_nan,
    order_key,
)
from lowbit.references.numba_twin import encode_compiled
from lowbit.references.rounding import (
    Overflow,
    Rounding,
    encode,
    encode_scalar,
    lookup_table,
    mul_odd,
    neighbours,
    round_to,
    sum_odd,
)
from lowbit.references.torch_twin import encode_torch

RNE, RZ, RNA, FLOOR, CEIL, RNTZ = Rounding
SATFINITE, SPECIAL = Overflow
NAN, INF = float("nan"), float("inf")
SMALL_FLOATS = [f for f in FORMATS.values() if f.bits <= 8 and f.kind in (Kind.FLOAT, Kind.EXPONENT)]
INTEGERS = [INT4, UINT4, INT8, UINT8]
POLICIES = [(r, o) for r in Rounding for o in Overflow]
Encoder = Callable[[Any, Format, Rounding, Overflow], Codes]


def exact(x: float) -> Fraction | Special:
    if np.isnan(x):
        return Special.NAN
    if np.isinf(x):
        return Special.POS_INF if x > 0 else Special.NEG_INF
    return Special.NEG_ZERO if x == 0 and np.signbit(x) else Fraction(float(x))


def by_definition(x: Any, fmt: Format, rounding: Rounding, overflow: Overflow) -> Codes:
    codes = [encode_scalar(exact(v), fmt, rounding, overflow) for v in x.reshape(-1)]
    return np.array(codes, dtype=np.uint64).astype(container(fmt)).reshape(x.shape)


def by_numba(x: Any, fmt: Format, rounding: Rounding, overflow: Overflow) -> Codes:
    return encode_compiled(x, fmt, rounding, overflow)


def by_numba_threads(x: Any, fmt: Format, rounding: Rounding, overflow: Overflow) -> Codes:
    return encode_compiled(x, fmt, rounding, overflow, parallel=True)


def by_torch(x: Any, fmt: Format, rounding: Rounding, overflow: Overflow) -> Codes:
    codes: Codes = encode_torch(torch.from_numpy(np.array(x)), fmt, rounding, overflow).numpy()
    return codes.view(container(fmt))


FLOAT32_ONLY = (by_numba, by_numba_threads)
ENCODERS = [by_definition, encode, by_numba, by_numba_threads, by_torch]
TWINS = [encode, by_numba, by_numba_threads, by_torch]


def float32_of(x: Any) -> Any:
    """The elements that float32 holds exactly, as float32."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = x.astype(np.float32)
    return narrow[(narrow.astype(np.float64) == x) | np.isnan(x)]


def inputs(encoder: Encoder, x: Any) -> list[Any]:
    return [float32_of(x)] if encoder in FLOAT32_ONLY else [x] if encoder is by_definition else [x, float32_of(x)]


def assert_codes(got: Codes, want: Iterable[int], x: Any, fmt: Format) -> None:
    want = np.asarray(want, dtype=np.uint64)
    assert got.dtype == container(fmt)
    assert got.shape == x.shape
    wrong = np.flatnonzero(got.reshape(-1) != want)
    assert wrong.size == 0, [(x.flat[i], hex(got.flat[i]), hex(want[i])) for i in wrong[:5]]


# The oracle: the non-negative values of a format, and comparisons of Fractions with the values and midpoints around a point.


@cache
def ladder(fmt: Format) -> list[Fraction]:
    """Finite values >= 0 in order of their codes, then the one that would follow with an unbounded exponent."""
    values = [v for c in range(fmt.max_code + 1) if isinstance(v := decode_scalar(c, fmt), Fraction)]
    beyond = 2 * values[-1] if fmt is E8M0 else 2 * values[-1] - values[-2]
    return [*values, beyond]


def goes_up(position: int, low_is_even: bool, negative: bool, rounding: Rounding) -> bool:
    """`position`: -1 below the midpoint, 0 on it, 1 above."""
    if rounding in (RZ, FLOOR, CEIL):
        return (rounding is FLOOR and negative) or (rounding is CEIL and not negative)
    return position > 0 or (position == 0 and (rounding is RNA or (rounding is RNE and not low_is_even)))


NAN_CODES = {E2M1: 0x7, E4M3FN: 0x7F, UE4M3: 0x7F, E5M2: 0x7F, E4M3FNUZ: 0x80, E5M2FNUZ: 0x80, E8M0: 0xFF}


def expected(x: float, fmt: Format, rounding: Rounding, overflow: Overflow) -> int:
    if np.isnan(x):
        return NAN_CODES[fmt]
    negative = bool(np.signbit(x))
    if fmt is UE4M3 and negative:
        return 0
    if fmt is E8M0:
        negative = False
    steps = ladder(fmt)
    finite = len(steps) - 1
    if np.isinf(x):
        code, over = finite, True
    else:
        magnitude = abs(Fraction(x))
        below = bisect_right(steps, magnitude) - 1
        if below < 0:  # E8M0 has nothing below 2^-127
            code = 0
        elif below == finite:
            code = finite if rounding not in (RZ, CEIL if negative else FLOOR) else finite - 1
        elif magnitude == steps[below]:
            code = below
        else:
            middle = (steps[below] + steps[below + 1]) / 2
            # E8M0 counts significands 1 and 2: a tie goes up whatever the code.
            even = below % 2 == 0 and fmt is not E8M0
            code = below + goes_up((magnitude > middle) - (magnitude < middle), even, negative, rounding)
        over = code >= finite
    if over and (overflow is SATFINITE or fmt is E2M1):
        code = finite - 1
    elif over:
        if fmt is not E5M2:
            return NAN_CODES[fmt]
        code = 0x7C
    keeps_sign = code > 0 or fmt in (E2M1, E4M3FN, E5M2)
    return code | (0x8 if fmt is E2M1 else 0x80) if negative and keeps_sign else code


@cache
def critical_points(fmt: Format) -> Any:
    """Values, ties, one float64 and one float32 ulp on either side of each, overflow points, both ends of float32 and float64."""
    steps = ladder(fmt)
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    centres = np.array([float(v) for v in steps + middles] + [float(steps[-1]) * 2, 1e30, 1e300])
    assert all(Fraction(float(c)) == v for c, v in zip(centres, steps + middles, strict=False))
    with np.errstate(over="ignore", under="ignore"):
        single = centres.astype(np.float32)
        singles = [np.nextafter(single, np.float32(s)) for s in (INF, -INF)]
    points = [centres, *(np.nextafter(centres, s) for s in (INF, -INF)), *(s.astype(np.float64) for s in singles)]
    # One lone bit just below the top 16 bits of a float64 (five fraction bits) and of a float32 (eight).
    points += [centres[len(steps) :] * (1 + 2.0**-e) for e in (5, 8)]
    ends = [0.0, 5e-324, 2.0**-1060, 2.0**-1022, 2.0**-149, 2.0**-140, 2.0**-126]
    ends += [3.4028234663852886e38, 1.7976931348623157e308, INF]
    both = np.concatenate([*points, ends])
    return np.concatenate([both, -both, [NAN]])


@cache
def expectations(fmt: Format, rounding: Rounding, overflow: Overflow) -> dict[str, int]:
    """By the value's bits, so that -0 and +0 are two entries."""
    return {float(x).hex(): expected(x, fmt, rounding, overflow) for x in critical_points(fmt)}


@pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_value_and_tie(encoder: Encoder, fmt: Format) -> None:
    for x in inputs(encoder, critical_points(fmt)):
        for rounding, overflow in POLICIES:
            table = expectations(fmt, rounding, overflow)
            assert_codes(encoder(x, fmt, rounding, overflow), [table[float(v).hex()] for v in x], x, fmt)


@pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_round_trip(encoder: Encoder, fmt: Format) -> None:
    codes = np.arange(1 << fmt.bits).astype(np.uint8)
    codes = codes[~is_nan(codes, fmt)]
    x = decode(codes, fmt)
    for rounding, overflow in POLICIES:
        kept = np.isfinite(x) | (overflow is SPECIAL)
        for values in inputs(encoder, x[kept]):
            assert_codes(encoder(values, fmt, rounding, overflow), codes[kept], values, fmt)


# PTX ISA cvt.rn.satfinite and the CUDA fp8 and fp4 headers; literal codes.
HARDWARE = [
    *((E2M1, x, RNE, c) for x, c in zip([.25, .75, 1.25, 1.75, 2.5, 3.5, 5.0], [0, 2, 2, 4, 4, 6, 6], strict=True)),
    *((E2M1, x, RNA, c) for x, c in zip([.25, .75, 1.25, 1.75, 2.5, 3.5, 5.0], [1, 2, 3, 4, 5, 6, 7], strict=True)),
    *((E2M1, x, RNTZ, c) for x, c in zip([.25, .75, 1.25, 1.75, 2.5, 3.5, 5.0], [0, 1, 2, 3, 4, 5, 6], strict=True)),
    (E2M1, 5.0000005, RNE, 7), (E2M1, 1e30, RNE, 7), (E2M1, INF, RNE, 7), (E2M1, -INF, RNE, 15), (E2M1, NAN, RNE, 7),
    (E2M1, -0.0, RNE, 8), (E2M1, -0.2, RNE, 8), (E2M1, -0.25, RNE, 8), (E2M1, -5.5, RNE, 15), (E2M1, 7.0, RNE, 7),
    (E4M3FN, 464.0, RNE, 0x7E), (E4M3FN, 1e6, RNE, 0x7E), (E4M3FN, -1e6, RNE, 0xFE), (E4M3FN, INF, RNE, 0x7E),
    (E4M3FN, -INF, RNE, 0xFE), (E4M3FN, NAN, RNE, 0x7F), (E4M3FN, -0.0, RNE, 0x80), (E4M3FN, -1e-9, RNE, 0x80),
    (E4M3FN, 2.0**-10, RNE, 0), (E4M3FN, 2.0**-10, RNA, 1),
    (E5M2, 61440.0, RNE, 0x7B), (E5M2, INF, RNE, 0x7B), (E5M2, -INF, RNE, 0xFB), (E5M2, NAN, RNE, 0x7F),
    (E4M3FNUZ, 248.0, RNE, 0x7F), (E4M3FNUZ, -0.0, RNE, 0), (E4M3FNUZ, -1e-9, RNE, 0), (E4M3FNUZ, NAN, RNE, 0x80),
    (E5M2FNUZ, -0.0, RNE, 0), (E5M2FNUZ, 1e9, RNE, 0x7F), (E5M2FNUZ, -1e9, RNE, 0xFF),
    (UE4M3, -1.0, RNE, 0), (UE4M3, -INF, RNE, 0), (UE4M3, 500.0, RNE, 0x7E), (UE4M3, NAN, RNE, 0x7F), (UE4M3, -0.0, RNE, 0),
    *((E8M0, x, RZ, c) for x, c in zip([1.5, 3.0, 6.0, 1.0, 1.99], [127, 128, 129, 127, 127], strict=True)),
    *((E8M0, x, CEIL, c) for x, c in zip([1.5, 3.0, 6.0, 1.0, 1.01], [128, 129, 130, 127, 128], strict=True)),
    *((E8M0, x, RNE, c) for x, c in zip([1.5, 3.0, 6.0, 1.0, 1.49], [128, 129, 130, 127, 127], strict=True)),
    (E8M0, 0.0, RZ, 0), (E8M0, 0.0, CEIL, 0), (E8M0, -0.0, RNE, 0), (E8M0, -1.0, RZ, 127), (E8M0, -3.0, CEIL, 129),
    (E8M0, NAN, RZ, 0xFF), (E8M0, INF, CEIL, 0xFE), (E8M0, -INF, RZ, 0xFE), (E8M0, 1.75 * 2.0**127, CEIL, 0xFE),
    (E8M0, 2.0**-140, CEIL, 0),
    (INT4, 0.5, RNE, 0), (INT4, 1.5, RNE, 2), (INT4, -0.5, RNE, 0), (INT4, -1.5, RNE, 0xE), (INT4, 2.5, RNA, 3),
    (INT4, -2.5, RNA, 0xD), (INT4, 99.0, RNE, 7), (INT4, -99.0, RNE, 8), (INT4, NAN, RNE, 0), (INT4, INF, RNE, 7),
    (INT4, -INF, RNE, 8), (INT4, -8.5, FLOOR, 8),
    (UINT4, -1.0, RNE, 0), (UINT4, 15.5, RNE, 15), (INT8, 127.5, RNE, 127), (INT8, -128.5, RNE, 0x80),
    (INT8, -0.75, CEIL, 0),
    (UINT8, 254.5, RNE, 254), (UINT8, 254.5, RNA, 255), (UINT8, 255.5, RNE, 255),
    (INT32, 2.0**31, RNE, 0x7FFFFFFF), (INT32, -(2.0**31), RNE, 0x80000000), (INT32, -1.0, RNE, 0xFFFFFFFF),
    (INT32, 1e30, RNE, 0x7FFFFFFF), (INT32, 2.0**30, RNE, 1 << 30),
]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_hardware_rules(encoder: Encoder) -> None:
    for fmt, x, rounding, code in HARDWARE:
        values = np.array([x], dtype=np.float32 if encoder in FLOAT32_ONLY else np.float64)
        assert_codes(encoder(values, fmt, rounding, SATFINITE), [code], values, fmt)


# What SPECIAL gives: (input, RNE code, code under the mode that rounds toward zero there).
NON_SATURATING = [
    (E4M3FN, 464.00003, 0x7F, 0x7E), (E4M3FN, -480.0, 0x7F, 0xFE), (E4M3FN, INF, 0x7F, 0x7F), (E4M3FN, 464.0, 0x7E, 0x7E),
    (E5M2, 61440.0, 0x7C, 0x7B), (E5M2, -1e9, 0xFC, 0xFB), (E5M2, 61439.99, 0x7B, 0x7B), (E5M2, -INF, 0xFC, 0xFC),
    (E4M3FNUZ, 248.0, 0x80, 0x7F), (E5M2FNUZ, -61440.0, 0x80, 0xFF), (E2M1, 100.0, 0x7, 0x7), (E2M1, -INF, 0xF, 0xF),
    (E8M0, 1.5 * 2.0**127, 0xFF, 0xFE), (E8M0, INF, 0xFF, 0xFF), (UE4M3, 500.0, 0x7F, 0x7E), (UE4M3, -500.0, 0, 0),
    (F16, 65520.0, 0x7C00, 0x7BFF), (F16, -65519.996, 0xFBFF, 0xFBFF),
    (BF16, 3.4e38, 0x7F80, 0x7F7F), (F16, -INF, 0xFC00, 0xFC00),
    (F32, 3.4028234663852886e38, 0x7F7FFFFF, 0x7F7FFFFF),
]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_overflow_to_special(encoder: Encoder) -> None:
    for fmt, x, nearest, truncated in NON_SATURATING:
        values = np.array([x], dtype=np.float32 if encoder in FLOAT32_ONLY else np.float64)
        assert_codes(encoder(values, fmt, RNE, SPECIAL), [nearest], values, fmt)
        for inward in (RZ, CEIL if x < 0 and fmt is not E8M0 else FLOOR):
            assert_codes(encoder(values, fmt, inward, SPECIAL), [truncated], values, fmt)


@pytest.mark.parametrize("fmt", [F16, BF16, F32, E5M2], ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_outward_modes_overflow_to_infinity(encoder: Encoder, fmt: Format) -> None:
    top = float(fmt.max_finite)
    x = np.nextafter(np.array([top, -top]), [INF, -INF]) if fmt is F32 else np.array([top, -top]) * (1 + 2.0**-10)
    if encoder in FLOAT32_ONLY:
        x = np.array([INF, -INF], dtype=np.float32) if fmt is F32 else x.astype(np.float32)
    infinity, finite = fmt.max_code + 1, fmt.max_code
    inward = infinity if np.isinf(x[0]) else finite
    assert_codes(encoder(x, fmt, CEIL, SPECIAL), [infinity, inward | fmt.sign_bit], x, fmt)
    assert_codes(encoder(x, fmt, FLOOR, SPECIAL), [inward, infinity | fmt.sign_bit], x, fmt)
    assert_codes(encoder(x, fmt, CEIL, SATFINITE), [finite, finite | fmt.sign_bit], x, fmt)


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_integers(encoder: Encoder, fmt: Format) -> None:
    """Quarters around the whole range and one ulp beside each half, against comparisons of Fractions."""
    low, high = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}[fmt.name]
    quarters = np.arange(4 * (low - 3), 4 * (high + 3) + 1) / 4
    halves = quarters[(2 * quarters) % 2 == 1]
    narrow = halves.astype(np.float32)
    around = [quarters, *(np.nextafter(halves, s) for s in (INF, -INF))]
    around += [np.nextafter(narrow, np.float32(s)).astype(np.float64) for s in (INF, -INF)]
    tiny = [-0.0, 5e-324, -5e-324, 2.0**-149, -(2.0**-149)]
    points = np.concatenate([*around, tiny])
    far = np.array([1e9, -1e9, 1e300, -1e300, INF, -INF, NAN, 2.0**31, -(2.0**31)])
    for rounding in Rounding:
        def nearest(v: float, rounding: Rounding = rounding) -> int:
            value = Fraction(float(v))
            below = value.numerator // value.denominator
            if value == below:
                return below
            position = (value > below + Fraction(1, 2)) - (value < below + Fraction(1, 2))
            if value > 0:
                return below + goes_up(position, below % 2 == 0, False, rounding)
            return below + 1 - goes_up(-position, (below + 1) % 2 == 0, True, rounding)

        for x in inputs(encoder, points):
            rounded = np.array([nearest(v) for v in x])
            want = np.clip(rounded, low, high) % (1 << fmt.bits)
            assert_codes(encoder(x, fmt, rounding, SATFINITE), want, x, fmt)
            inside = (rounded >= low) & (rounded <= high)
            assert_codes(encoder(x[inside], fmt, rounding, SPECIAL), want[inside], x[inside], fmt)
            for outside in x[~inside][:4]:
                with pytest.raises(ValueError, match=f"{fmt.name}: got "):
                    encoder(np.array([0.0, outside], dtype=x.dtype), fmt, rounding, SPECIAL)
        for x in inputs(encoder, far):
            want = [0 if np.isnan(v) else (high if v > 0 else low) % (1 << fmt.bits) for v in x]
            assert_codes(encoder(x, fmt, rounding, SATFINITE), want, x, fmt)
            for outside in x:
                with pytest.raises(ValueError, match=f"{fmt.name}: got "):
                    encoder(np.array([outside], dtype=x.dtype), fmt, rounding, SPECIAL)


@pytest.mark.parametrize("fmt", SMALL_FLOATS + INTEGERS, ids=str)
def test_every_16_bit_pattern(fmt: Format) -> None:
    """All bfloat16 and binary16 values, every mode: the twins on all, the definition on all (floats, RNE) or one in 61."""
    patterns = np.arange(1 << 16).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        halves = patterns.view(np.float16).astype(np.float32)
    x = np.concatenate([(patterns.astype(np.uint32) << np.uint32(16)).view(np.float32), halves])
    for rounding, overflow in POLICIES:
        if fmt in INTEGERS and overflow is SPECIAL:
            continue
        codes = encode(x, fmt, rounding, overflow)
        picked = slice(None, None, 1 if (rounding, overflow) == (RNE, SATFINITE) and fmt not in INTEGERS else 61)
        want = by_definition(x[picked], fmt, rounding, overflow)
        np.testing.assert_array_equal(codes[picked], want)
        np.testing.assert_array_equal(by_numba(x, fmt, rounding, overflow), codes)
        np.testing.assert_array_equal(by_torch(x, fmt, rounding, overflow), codes)
        with np.errstate(invalid="ignore"):
            wide = x.astype(np.float64)
        np.testing.assert_array_equal(encode(wide, fmt, rounding, overflow), codes)
        np.testing.assert_array_equal(by_torch(wide, fmt, rounding, overflow), codes)
        np.testing.assert_array_equal(encode(patterns.view(np.float16), fmt, rounding, overflow), codes[1 << 16 :])
        signed = torch.from_numpy(patterns.view(np.int16))
        for dtype, part in ((torch.bfloat16, codes[: 1 << 16]), (torch.float16, codes[1 << 16 :])):
            np.testing.assert_array_equal(encode_torch(signed.view(dtype), fmt, rounding, overflow).numpy(), part)


# 16- and 32-bit targets: points built around seeded pairs of neighbouring codes.


def wide_points(fmt: Format, count: int) -> tuple[Any, Any, Any]:
    """Lower code, position of the point in its gap (-2 on the code, -1, 0, 1), and the point; non-negative, float64."""
    rng = np.random.default_rng(7)
    drawn = rng.integers(0, fmt.max_code, count)
    edges = [0, 1, 2, (1 << fmt.mantissa_bits) - 1, 1 << fmt.mantissa_bits, (2 << fmt.mantissa_bits) - 1, fmt.max_code - 1]
    low = np.concatenate([drawn, edges]).astype(container(fmt))
    a, b = decode(low, fmt), decode(low + container(fmt).type(1), fmt)
    middle = a + (b - a) / 2
    for lower, upper, half in zip(a[-20:], b[-20:], middle[-20:], strict=True):
        assert Fraction(lower) + Fraction(upper) == 2 * Fraction(half)
    points = [a, np.nextafter(a, INF), np.nextafter(middle, 0), middle, np.nextafter(middle, INF), np.nextafter(b, 0)]
    positions = np.repeat([-2, -1, -1, 0, 1, 1], low.size)
    return np.tile(low, 6), positions, np.concatenate(points)


@pytest.mark.parametrize("fmt", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_wide_formats_round_once(encoder: Encoder, fmt: Format) -> None:
    low, position, points = wide_points(fmt, 120 if encoder is by_definition else 4000)
    for sign in (1.0, -1.0):
        x = sign * points
        kept = np.full(x.shape, True)
        if encoder in FLOAT32_ONLY:
            with np.errstate(under="ignore"):
                kept = x.astype(np.float32) == x
            x = x.astype(np.float32)
        for rounding in Rounding:
            gaps = zip(low.tolist(), position.tolist(), strict=True)
            up = [p != -2 and goes_up(p, c % 2 == 0, sign < 0, rounding) for c, p in gaps]
            want = low.astype(np.uint64) + np.array(up, dtype=np.uint64) + np.uint64(fmt.sign_bit if sign < 0 else 0)
            for overflow in Overflow:
                assert_codes(encoder(x[kept], fmt, rounding, overflow), want[kept], x[kept], fmt)
            if rounding is RNE and fmt in (F16, BF16) and encoder not in FLOAT32_ONLY:
                with np.errstate(under="ignore"):
                    twice = encode(x.astype(np.float32), fmt, rounding, SPECIAL)
                assert (twice != want).any(), "no point here tells one rounding from two"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_wide_specials(encoder: Encoder) -> None:
    x = np.array([0.0, -0.0, NAN, INF, -INF, -(2.0**-149), 2.0**-149])
    x = x.astype(np.float32) if encoder in FLOAT32_ONLY else x
    for fmt, nan, infinity, least in ((F16, 0x7E00, 0x7C00, 0), (BF16, 0x7FC0, 0x7F80, 0), (F32, 0x7FC00000, 0x7F800000, 1)):
        sign = fmt.sign_bit
        want = [0, sign, nan, infinity, infinity | sign, least | sign, least]
        assert_codes(encoder(x, fmt, RNE, SPECIAL), want, x, fmt)
        want[3:5] = [infinity - 1, (infinity - 1) | sign]
        assert_codes(encoder(x, fmt, RNE, SATFINITE), want, x, fmt)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_kind_of_nan(encoder: Encoder, dtype: Any) -> None:
    """Either sign, quiet and signalling, first and last payload bit: one code, whatever the rounding and the policy."""
    if encoder in FLOAT32_ONLY and dtype is not np.float32:
        with pytest.raises(ValueError, match="expected float32"):
            encoder(np.zeros(1, dtype=dtype), E4M3FN, RNE, SATFINITE)
        return
    real = np.finfo(dtype)
    infinity = ((1 << real.bits - 1 - real.nmant) - 1) << real.nmant
    payloads = [1, 1 << (real.nmant - 1), (1 << real.nmant) - 1, 1 << (real.nmant - 2), 3]
    patterns = [sign | infinity | p for sign in (0, 1 << (real.bits - 1)) for p in payloads]
    x = np.array(patterns, dtype=np.uint64).astype(f"u{real.bits // 8}").view(dtype)
    assert np.isnan(x).all()
    wide = {F16: 0x7E00, BF16: 0x7FC0, F32: 0x7FC00000, F64: 0x7FF8000000000000}
    for fmt, nan in (NAN_CODES | wide | dict.fromkeys([*INTEGERS, INT32], 0)).items():
        for rounding, overflow in POLICIES:
            if fmt.kind is Kind.FLOAT or overflow is SATFINITE:
                assert_codes(encoder(x, fmt, rounding, overflow), [nan] * x.size, x, fmt)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_f64_keeps_every_value(encoder: Encoder) -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 64, 500, dtype=np.uint64)
    x = np.concatenate([bits.view(np.float64), [0.0, -0.0, 5e-324, -2.0**-149, 2.0**-130, 3 * 2.0**-149, 1.0, INF, -INF]])
    x = x[~np.isnan(x)]
    if encoder in FLOAT32_ONLY:
        x = float32_of(x)
        assert x.size >= 8
    for rounding in Rounding:
        assert_codes(encoder(x, F64, rounding, SPECIAL), x.astype(np.float64).view(np.uint64), x, F64)
    top = np.array([INF, NAN, -INF], dtype=x.dtype)
    assert_codes(encoder(top, F64, RNE, SATFINITE), [0x7FEFFFFFFFFFFFFF, 0x7FF8000000000000, 0xFFEFFFFFFFFFFFFF], top, F64)


@cache
def float32_sweep() -> Any:
    """One float32 pattern in 4,099, all exponents and both signs, NaN left out."""
    x = np.arange(0, 1 << 32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return x[~np.isnan(x)]


@pytest.mark.parametrize("twin", TWINS)
def test_numpy_and_ml_dtypes_agree(twin: Encoder) -> None:
    x = float32_sweep()
    with np.errstate(over="ignore", under="ignore"):
        assert_codes(twin(x, F16, RNE, SPECIAL), x.astype(np.float16).view(np.uint16), x, F16)
        assert_codes(twin(x, BF16, RNE, SPECIAL), x.astype(ml_dtypes.bfloat16).view(np.uint16), x, BF16)
    assert_codes(twin(x, F32, RNE, SPECIAL), x.view(np.uint32), x, F32)
    for fmt, dtype in ((E4M3FN, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2), (E2M1, ml_dtypes.float4_e2m1fn),
                       (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz), (E5M2FNUZ, ml_dtypes.float8_e5m2fnuz)):
        inside = x[np.abs(x) <= float(fmt.max_finite)]
        assert_codes(twin(inside, fmt, RNE, SPECIAL), inside.astype(dtype).view(np.uint8), inside, fmt)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bit_arithmetic_equals_numpy_casts(dtype: Any) -> None:
    """The torch twin rounds F16 and F32 by integers, NumPy by its own cast: they check each other on a million points."""
    rng = np.random.default_rng(11)
    x = rng.integers(0, 1 << 64, 1 << 18, dtype=np.uint64).view(np.float64)
    x = np.concatenate([x[~np.isnan(x)], rng.standard_normal(1 << 18) * np.exp2(rng.integers(-160, 140, 1 << 18))])
    with np.errstate(over="ignore", under="ignore"):
        x = x.astype(dtype)
        for fmt, target in ((F16, np.float16), (F32, np.float32)):
            want = x.astype(target).view(container(fmt))
            assert_codes(by_torch(x, fmt, RNE, SPECIAL), want, x, fmt)
            assert_codes(encode(x, fmt, RNE, SPECIAL), want, x, fmt)


@pytest.mark.parametrize("fmt", [F16, BF16, F32, *SMALL_FLOATS], ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_modes_bracket_the_value(twin: Encoder, fmt: Format) -> None:
    x = float32_sweep()[::8]
    ends = float(fmt.max_finite)
    x = x[(np.abs(x) <= ends) & (x >= (2.0**-127 if fmt is E8M0 else -ends if fmt.signed else 0))]
    codes = {r: twin(x, fmt, r, SPECIAL) for r in Rounding}
    values = {r: decode(codes[r], fmt) for r in Rounding}
    assert (values[FLOOR] <= x).all()
    assert (values[CEIL] >= x).all()
    gap = order_key(codes[CEIL], fmt) - order_key(codes[FLOOR], fmt)
    allowed = {0, 1, 2} if fmt.nan.name == "MINUS_ZERO" else {0, 1}  # fnuz: the place of -0 is NaN
    assert set(np.unique(gap)) <= allowed
    np.testing.assert_array_equal(gap == 0, values[FLOOR] == x)
    np.testing.assert_array_equal(values[RZ], np.where(x < 0, values[CEIL], values[FLOOR]))
    for r in (RNE, RNA, RNTZ):
        assert ((values[r] == values[FLOOR]) | (values[r] == values[CEIL])).all()
        assert (np.abs(values[r] - x) <= np.minimum(x - values[FLOOR], values[CEIL] - x)).all()


@pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=str)
def test_neighbours(fmt: Format) -> None:
    steps = ladder(fmt)[:-1]
    for code, (a, b) in enumerate(pairwise(steps)):
        a_float, b_float = float(a), float(b)
        x = np.array([a_float, np.nextafter(a_float, INF), float((a + b) / 2), np.nextafter(b_float, 0), b_float])
        low, high = neighbours(x, fmt)
        assert low.tolist() == [code, code, code, code, code + 1]
        assert high.tolist() == [code, code + 1, code + 1, code + 1, code + 1]
        if fmt.signed and code:
            high, low = neighbours(-x, fmt)
            assert (low - fmt.sign_bit).tolist() == [code, code, code, code, code + 1]
            assert (high - fmt.sign_bit).tolist() == [code, code + 1, code + 1, code + 1, code + 1]
    top = np.nextafter(float(steps[-1]), INF)
    outside = [top, INF, NAN, -INF] + ([-top] if fmt.signed else [-5e-324]) + ([0.0] if fmt is E8M0 else [])
    for x in outside:
        with pytest.raises(ValueError, match="expected values in"):
            neighbours(np.array([1.0, x]), fmt)


def test_neighbours_of_integers() -> None:
    low, high = neighbours(np.array([-8.0, -7.5, -0.25, 0.25, 6.5, 7.0]), INT4)
    assert low.tolist() == [8, 8, 0xF, 0, 6, 7]
    assert high.tolist() == [8, 9, 0, 1, 7, 7]
    with pytest.raises(ValueError, match=r"got 7\.5"):
        neighbours(np.array([7.5]), INT4)


@pytest.mark.parametrize("fmt", [F64, F32, BF16, F16, E5M2, E4M3FN, E2M1], ids=str)
def test_round_to(fmt: Format) -> None:
    x = np.concatenate([critical_points(E5M2), np.random.default_rng(5).standard_normal(500) * 1e5]).reshape(-1, 1)
    for rounding, overflow in POLICIES:
        got = round_to(x, fmt, rounding, overflow)
        want = decode(encode(x, fmt, rounding, overflow), fmt)
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got[~np.isnan(want)]), np.signbit(want[~np.isnan(want)]))


# Rounding to odd.


def odd(value: Fraction) -> float:
    """To odd at 53 bits, from the two neighbours of the nearest float64."""
    nearest = float(value)
    if Fraction(nearest) == value or int(np.float64(nearest).view(np.int64)) % 2:
        return nearest
    return float(np.nextafter(nearest, INF if value > Fraction(nearest) else -INF))


def operand_pairs() -> tuple[Any, Any]:
    """Seeded pairs of all relative sizes, and pairs whose plain sum is a tie of bf16, f16 or f32 that the exact sum misses."""
    rng = np.random.default_rng(13)
    a = rng.standard_normal(3000) * np.exp2(rng.integers(-70, 70, 3000))
    b = rng.standard_normal(3000) * np.exp2(rng.integers(-70, 70, 3000))
    ties = np.concatenate([1.0 + (2 * np.arange(40.0) + 1) * 2.0 ** -(p + 1) for p in (7, 10, 23)])
    ties = np.concatenate([ties, -ties])
    tails = np.array([s * 2.0**-e for e in (54, 60, 100, 1000) for s in (1.0, -1.0)])
    a, b = np.concatenate([a, np.repeat(ties, tails.size)]), np.concatenate([b, np.tile(tails, ties.size)])
    powers = np.array([1.0, 2.0, 2.0**100, -4.0])
    return np.concatenate([a, powers, powers]), np.concatenate([b, powers * -(2.0**-55), powers * 2.0**-80])


def test_sum_odd() -> None:
    a, b = operand_pairs()
    got = sum_odd(a, b)
    exact_sums = [Fraction(x) + Fraction(y) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == [odd(v) for v in exact_sums]
    for fmt in (BF16, F16, F32):
        want = [encode_scalar(v, fmt, RNE, SPECIAL) for v in exact_sums]
        assert encode(got, fmt, RNE, SPECIAL).tolist() == want
        assert encode(a + b, fmt, RNE, SPECIAL).tolist() != want, "no pair tells a sum rounded to odd from a plain one"


def test_mul_odd() -> None:
    """31 by 24 significant bits (products of 55), among them those whose float64 product is an f32 tie; 53 by 53 bits."""
    rng = np.random.default_rng(17)
    a = rng.integers(1 << 30, 1 << 31, 3000).astype(np.float64) * np.exp2(rng.integers(-90, 40, 3000))
    b = rng.integers(-(1 << 24), 1 << 24, 3000).astype(np.float64) * np.exp2(rng.integers(-90, 40, 3000))
    # n * m of 55 bits with 2^30 + 1 or 2^30 - 1 in its low 31: the float64 product is an f32 tie, the exact one is not.
    tails = {v: (1 << 30) + (1 if v % 4 == 1 else -1) for v in range((1 << 24) - 4001, 1 << 24, 2)}
    pairs = [(pow(m, -1, 1 << 31) * tail % (1 << 31), m) for m, tail in tails.items()]
    adversarial = np.array([p for p in pairs if p[0] >> 30], dtype=np.float64)
    full = rng.standard_normal((2, 3000))
    a = np.concatenate([a, adversarial[:, 0], full[0], [1.0 + 2.0**-52] * 2])
    b = np.concatenate([b, adversarial[:, 1], full[1], [3.0, -1.0 - 2.0**-52]])
    got = mul_odd(a, b)
    exact_products = [Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == [odd(v) for v in exact_products]
    assert (a * b != got).any()
    want = [encode_scalar(v, F32, RNE, SPECIAL) for v in exact_products]
    assert encode(got, F32, RNE, SPECIAL).tolist() == want
    assert encode(a * b, F32, RNE, SPECIAL).tolist() != want, "no pair tells a product rounded to odd from a plain one"


def test_odd_specials_and_ranges() -> None:
    with np.errstate(invalid="ignore"):
        specials = [(INF, 1.0), (-INF, 1.0), (INF, -INF), (NAN, 1.0), (INF, 0.0)]
        for a, b in [*specials, (0.0, -0.0), (-0.0, -0.0), (1.0, -1.0), (0.0, -3.0)]:
            x, y = np.array(a), np.array(b)
            for got, want in ((sum_odd(x, y), x + y), (mul_odd(x, y), x * y)):
                assert got.shape == ()
                np.testing.assert_array_equal(got, want)
                assert np.isnan(want) or np.signbit(got) == np.signbit(want)
    assert sum_odd(np.ones((3, 1)), np.full(4, 2.0**-60)).shape == (3, 4)
    edge = np.array([2.0**1022, 2.0**-480, 2.0**480 * (1 - 2.0**-53), 2.0**-480 * (1 + 2.0**-52)])
    assert sum_odd(edge[:1], edge[:1]).tolist() == [2.0**1023]
    for x in edge[1:]:
        for y in edge[1:]:
            assert float(mul_odd(np.array(x), np.array(y))) == odd(Fraction(x) * Fraction(y))
    for operand in (2.0**1023, -(2.0**1023)):
        with pytest.raises(ValueError, match="sum_odd: got operand"):
            sum_odd(np.array([0.0, operand]), np.array([1.0, 1.0]))
    for operand in (2.0**481, -(2.0**-481)):
        with pytest.raises(ValueError, match="mul_odd: got operand"):
            mul_odd(np.array([1.0]), np.array([operand]))


# Shapes, dtypes, refusals.


@pytest.mark.parametrize("fmt", [E4M3FN, BF16, INT8, F64], ids=str)
@pytest.mark.parametrize("twin", TWINS)
def test_shapes_and_strides(twin: Encoder, fmt: Format) -> None:
    base = np.random.default_rng(2).standard_normal((6, 10)).astype(np.float32)
    for x in (base, base.T, base[::2, 1::3], base[2, 3], base[:0], base[None, :, :, None], np.asfortranarray(base)):
        x = np.asarray(x)
        before = x.copy()
        np.testing.assert_array_equal(twin(x, fmt, RNE, SATFINITE), by_definition(x, fmt, RNE, SATFINITE))
        assert twin(x, fmt, RNE, SATFINITE).dtype == container(fmt)
        np.testing.assert_array_equal(x, before)


def test_blocks_of_the_array_twin() -> None:
    """Sizes around the internal block: the codes of a part are the part of the codes."""
    x = np.random.default_rng(4).standard_normal((1 << 15) + 3).astype(np.float32)
    whole = encode(x, E4M3FN)
    for n in (1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, x.size):
        np.testing.assert_array_equal(encode(x[:n], E4M3FN), whole[:n])
    picked = np.r_[0:50, (1 << 14) - 25 : (1 << 14) + 25, x.size - 50 : x.size]
    np.testing.assert_array_equal(whole[picked], by_definition(x[picked], E4M3FN, RNE, SATFINITE))


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="got dtype int64"):
        encode(np.arange(3), E4M3FN)
    with pytest.raises(ValueError, match="expected float32"):
        by_numba(np.zeros(3), E4M3FN, RNE, SATFINITE)
    with pytest.raises(ValueError, match=r"got dtype torch\.int32"):
        encode_torch(torch.zeros(3, dtype=torch.int32), E4M3FN)
    with pytest.raises(ValueError, match="format without a table"):
        lookup_table(F16, RNE, SATFINITE, 4)
    with pytest.raises(ValueError, match="at flat index 2"):
        encode(np.array([0.0, 7.4, 7.5]), INT4, RNE, SPECIAL)


@pytest.mark.parametrize(("itemsize", "integer"), [(4, np.uint32), (8, np.uint64)])
@pytest.mark.parametrize("fmt", SMALL_FLOATS, ids=str)
def test_lookup_table_is_the_definition(fmt: Format, itemsize: int, integer: Any) -> None:
    """Entries in a stride, each at the two ends of the inputs it stands for."""
    low = 8 * itemsize - 16
    index = np.arange(0, 1 << 17, 251, dtype=integer)
    index = np.concatenate([index, index + integer(1)])[: (1 << 17) - 1]
    index = index[index < 1 << 17]
    top, sticky = index >> integer(1), index & integer(1)
    for tail in (integer(1), integer((1 << low) - 1)):
        x = ((top << integer(low)) | (sticky * tail)).view(f"f{itemsize}")
        table = lookup_table(fmt, RNE, SATFINITE, itemsize)
        np.testing.assert_array_equal(table[index], by_definition(x, fmt, RNE, SATFINITE))
