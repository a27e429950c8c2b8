"""What codes stand for and how results become codes, in binary32 arithmetic of the host.

Decides: the value of every code that the ops carry, and rounding to nearest even into each of their formats.
Refuses: the judge's tables and roundings. A format record only tells which rule below applies; every constant here is written
down again. Narrow floats are read by laying their bits over the top of a binary32 and multiplying by a power of two, which is
exact for subnormals too; they are written by scaling to the step of the result and rounding to an integer.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import BF16, F16, F32, INT4, INT8, INT32, UINT4, Format

__all__ = ["Array", "Narrow", "add_in", "codes_of", "fma_in", "narrow_codes", "rounded", "values"]

Array = npt.NDArray[Any]


class Narrow(NamedTuple):
    """A float format of at most 8 bits: fraction bits, exponent bias, magnitude code of the largest finite value, the code a NaN
    becomes, and whether -0 exists."""

    fraction: int
    bias: int
    top: int
    nan: int
    minus_zero: bool


_NARROW = {
    "e2m1": Narrow(1, 1, 0x7, 0x7, True),  # OCP MX: no NaN; a NaN becomes +6
    "e4m3fn": Narrow(3, 7, 0x7E, 0x7F, True),  # OCP 8-bit floats
    "e4m3fnuz": Narrow(3, 8, 0x7F, 0x80, False),  # the code of -0 is the NaN
    "ue4m3": Narrow(3, 7, 0x7E, 0x7F, False),
}
_NAN_CODES = {"e2m1": (), "e4m3fn": (0x7F, 0xFF), "e4m3fnuz": (0x80,), "ue4m3": (0x7F,)}


@cache
def _table(name: str) -> Array:
    """binary32 values of a narrow float by code."""
    rule = _NARROW[name]
    size = {"e2m1": 16, "ue4m3": 128}.get(name, 256)
    code = np.arange(size, dtype=np.uint32)
    sign = code if name == "ue4m3" else code & np.uint32(size // 2 - 1)
    magnitude = (sign << np.uint32(23 - rule.fraction)).view(np.float32) * np.float32(2.0 ** (127 - rule.bias))
    table = np.where(sign == code, magnitude, -magnitude)
    table[list(_NAN_CODES[name])] = np.nan
    return table


def values(codes: Array, fmt: Format) -> Array:
    """binary32 values of codes, same shape; binary64 for int32 codes, which need 31 bits. NaN codes give NaN."""
    if fmt.name in _NARROW:
        return np.take(_table(fmt.name), codes)
    if fmt is INT4:
        return ((codes ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(np.float32)
    if fmt is UINT4:
        return codes.astype(np.float32)
    if fmt is INT8:
        return codes.view(np.int8).astype(np.float32)
    if fmt is INT32:
        return codes.view(np.int32).astype(np.float64)
    if fmt is F16:
        return codes.view(np.float16).astype(np.float32)
    if fmt is BF16:
        upper: Array = codes.astype(np.uint32) << np.uint32(16)
        return upper.view(np.float32)
    if fmt is F32:
        return np.array(codes).view(np.float32)
    raise ValueError(f"cpu: got codes of {fmt}, which no op of this backend carries")


def rounded(x: Array, fmt: Format) -> Array:
    """x (binary32 or binary64) to nearest even in f16, bf16 or f32, in one rounding; binary32 values. Overflow gives infinity."""
    with np.errstate(all="ignore"):
        if fmt is F32:
            return x.astype(np.float32)
        if fmt is F16:
            return x.astype(np.float16).astype(np.float32)
        if x.dtype == np.float32:
            bits = np.ascontiguousarray(x).view(np.uint32)
            kept, rest = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
            kept = kept + (rest + (kept & np.uint32(1)) > np.uint32(0x8000))
            return np.where(np.isnan(x), np.float32(np.nan), (kept << np.uint32(16)).view(np.float32).reshape(x.shape))
        exponent = np.maximum(np.frexp(x)[1], -125)  # subnormals of bf16 share the step of its first binade, 2^(-125 - 8)
        return np.asarray(np.ldexp(np.rint(np.ldexp(x, 8 - exponent)), exponent - 8).astype(np.float32))


def codes_of(x: Array, fmt: Format) -> Array:
    """Codes of x (binary32 or binary64), nearest even, one code per container of f16, bf16 or f32. Overflow gives infinity."""
    result = np.ascontiguousarray(rounded(x, fmt)).reshape(x.shape)
    with np.errstate(all="ignore"):
        if fmt is F16:
            return result.astype(np.float16).view(np.uint16)
        bits: Array = result.view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16) if fmt is BF16 else bits


def narrow_codes(x: Array, name: str) -> Array:
    """Codes of binary32 values in "e2m1", "e4m3fn", "e4m3fnuz" or "ue4m3": nearest even, saturating, infinities included.

    NaN gives the format's NaN, +6 in e2m1. Negative values that round to zero keep their sign where -0 exists; ue4m3 has no sign
    and takes negative values as zero.
    """
    rule = _NARROW[name]
    size = 8 if name == "e2m1" else 128
    largest = _table(name)[rule.top]
    with np.errstate(all="ignore"):
        magnitude = np.minimum(np.abs(x), largest)
        lowest = 2 - rule.bias  # frexp counts from significands in [1/2, 1)
        exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1], lowest), lowest)
        steps = np.rint(np.ldexp(magnitude, rule.fraction + 1 - exponent))
        steps = np.where(np.isnan(x), 0, steps).astype(np.int32)
    code = np.minimum(((exponent - lowest) << rule.fraction) + steps, rule.top)
    negative = np.signbit(x) & (rule.minus_zero | (code > 0))
    code = np.where(negative, 0 if name == "ue4m3" else code + size, code)
    return np.where(np.isnan(x), rule.nan, code).astype(np.uint8)


def add_in(a: Array, b: Array, fmt: Format) -> Array:
    """a + b of values of f16, bf16 or f32, rounded once to it. binary32 has 2p + 2 bits for the narrow ones: its own rounding of
    a sum of two of their values never changes theirs."""
    with np.errstate(all="ignore"):
        return rounded(np.asarray(a + b, dtype=np.float32), fmt)


def fma_in(a: Array, b: Array, c: Array, fmt: Format) -> Array:
    """a * b + c of values of f16 or bf16, rounded once to it.

    The product is exact in binary64. So is the sum, unless one term is far below the other. Far below c: no rounding to 11 or 8
    bits sees it, c being a value of the format. Far below the product, which bf16 alone allows short of overflow: only its sign
    counts (the product may be a tie), so it is first raised to 2^-30 of the product, below the product's own 16 bits.
    """
    with np.errstate(all="ignore"):
        product, addend = np.asarray(a, dtype=np.float64) * b, np.asarray(c, dtype=np.float64)
        if fmt is BF16:
            floor = np.abs(product) * 2.0**-30
            hidden = (np.abs(addend) < floor) & (addend != 0) & np.isfinite(product)
            addend = np.where(hidden, np.copysign(floor, addend), addend)
        return rounded(product + addend, fmt)
