"""Codes of at most 8 bits in Triton kernels, by integers and one exact addition: the same bits on every target.

Decides: the value of every code of e2m1, e4m3fn, e4m3fnuz, ue4m3 and int4, and rounding of binary32 into each. Refuses:
conversions of the language, which differ between targets and versions and which the CPU interpreter gets wrong.

Rounding: a value below 2^24 steps plus 1.5 * 2^23 steps is a binary32 number whose unit in the last place is the step, so that
one IEEE addition rounds to whole steps, nearest even, and the low bits of the sum are their number. With E the exponent of the
value, not below that of the smallest normal number, and m fraction bits the step is 2^(E - m), and the magnitude's code is (E -
E_min) 2^m + steps: for normal numbers the implicit bit is among the steps, for subnormal ones it is not, and a carry runs into
the exponent. Kernels that use it are compiled without contraction (`OPTIONS`), or a product before it would lose its rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "AWAY", "EVEN", "OPTIONS", "TOWARD_ZERO", "e2m1_code", "e2m1_value", "e4m3_code", "e4m3_value", "int4_value", "ue4m3_code",
    "ue4m3_value", "whole",
]

OPTIONS = {"enable_fp_fusion": False}
"""Compiler options that decide bits."""

EVEN, AWAY, TOWARD_ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Values of the compile-time argument TIES."""


@triton.jit
def magnitude_code(magnitude, SMALLEST: tl.constexpr, FRACTION: tl.constexpr, TIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 code of a binary32 magnitude of at most the format's largest value. SMALLEST: biased binary32 exponent of the
    smallest normal number; FRACTION: fraction bits."""
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) >> 23, SMALLEST)
    anchor = ((exponent + (23 - FRACTION)) << 23) | 0x400000
    total = magnitude + anchor.to(tl.float32, bitcast=True)
    steps = total.to(tl.int32, bitcast=True) - anchor
    if TIES != 0:  # both differences are exact
        beyond = magnitude - (total - anchor.to(tl.float32, bitcast=True))
        half = ((exponent - (FRACTION + 1)) << 23).to(tl.float32, bitcast=True)
        if TIES == 1:
            steps += (beyond == half).to(tl.int32)
        else:
            steps -= (beyond == -half).to(tl.int32)
    return ((exponent - SMALLEST) << FRACTION) + steps


@triton.jit
def magnitude_of(x, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """|x| bounded by TOP; of NaN nothing is said."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits.to(tl.float32, bitcast=True), TOP)


@triton.jit
def sign_of(x):  # type: ignore[no-untyped-def]
    """int32 0 or 1: the sign bit of binary32 x."""
    return (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def e4m3_code(x, FNUZ: tl.constexpr, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 e4m3fn (FNUZ = 0) or e4m3fnuz code of binary32 x, nearest even, magnitudes bounded by TOP, a value of the format
    (448; 240 or 224). NaN: 0x7F with its sign, or 0x80; e4m3fnuz has no -0."""
    magnitude = magnitude_code(magnitude_of(x, TOP), 120 if FNUZ else 121, 3, 0)
    if FNUZ:
        coded = tl.where(magnitude == 0, 0, magnitude | (sign_of(x) << 7))
        return tl.where(x == x, coded, 0x80).to(tl.uint8)
    else:
        return (tl.where(x == x, magnitude, 0x7F) | (sign_of(x) << 7)).to(tl.uint8)


@triton.jit
def e4m3_value(code, FNUZ: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 value of a uint8 e4m3fn or e4m3fnuz code, exact; NaN codes give NaN."""
    byte = code.to(tl.int32)
    field, fraction = (byte >> 3) & 15, byte & 7
    normal = (((field + (119 if FNUZ else 120)) << 23) | (fraction << 20)).to(tl.float32, bitcast=True)
    subnormal = fraction.to(tl.float32) * (0.0009765625 if FNUZ else 0.001953125)  # 2^-10, 2^-9
    magnitude = tl.where(field == 0, subnormal, normal)
    signed = (magnitude.to(tl.int32, bitcast=True) | ((byte & 128) << 24)).to(tl.float32, bitcast=True)
    nan = (byte == 128) if FNUZ else ((byte & 127) == 127)
    return tl.where(nan, float("nan"), signed)


@triton.jit
def ue4m3_code(x):  # type: ignore[no-untyped-def]
    """uint8 code 0 to 126 of binary32 x, nearest even, bounded by 448; negative values 0, NaN 0x7F."""
    code = magnitude_code(magnitude_of(x, 448.0), 121, 3, 0)
    return tl.where(x == x, tl.where(sign_of(x) != 0, 0, code), 0x7F).to(tl.uint8)


@triton.jit
def ue4m3_value(code):  # type: ignore[no-untyped-def]
    """binary32 value of a uint8 code whose bit 7 is 0; 0x7F gives NaN."""
    return e4m3_value(code, 0)


@triton.jit
def e2m1_code(x, TIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 code 0 to 15 of binary32 x, magnitudes bounded by 6, the sign bit that of x; NaN gives 7 (+6)."""
    code = magnitude_code(magnitude_of(x, 6.0), 127, 1, TIES) | (sign_of(x) << 3)
    return tl.where(x == x, code, 7)


@triton.jit
def e2m1_value(code):  # type: ignore[no-untyped-def]
    """binary32 value of the low four bits of an int32 code; exact."""
    magnitude, exponent = code & 1, (code >> 1) & 3
    normal = ((126 + exponent) << 23) | (magnitude << 22)
    bits = tl.where(exponent == 0, magnitude * 0x3F000000, normal) | ((code & 8) << 28)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def int4_value(code):  # type: ignore[no-untyped-def]
    """int32 value -8 to 7 of a two's complement nibble in the low four bits of an int32."""
    return ((code & 15) ^ 8) - 8


@triton.jit
def whole(x, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 RNE of binary32 x bounded to LOW and HIGH, integers below 2^22 in magnitude; NaN gives 0."""
    bounded = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), LOW * 1.0), HIGH * 1.0)
    return (bounded + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2^23
