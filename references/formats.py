"""Number formats as records, and what each code means.

Decides: which real number (or NaN, infinity) every code of a format stands for, and the total order of the codes.
Refuses: library dtypes and library casts. Two of them disagree with each other on overflow, so none is a reference.
Codes live in unsigned containers (uint8 up to 8 bits, uint16, uint32, uint64), least significant bit = bit 0; signed
integers are two's complement in the low `bits` bits of their container. One element, one container: nothing is packed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "BF16", "E2M1", "E4M3FN", "E4M3FNUZ", "E5M2", "E5M2FNUZ", "E8M0", "F16", "F32", "F64", "FORMATS", "INT32", "INT4",
    "INT8", "UE4M3", "UINT4", "UINT8", "Codes", "Format", "Kind", "Nan", "Reals", "Special", "code_of_key", "container",
    "decode", "decode_scalar", "is_nan", "order_key",
]

Codes = npt.NDArray[Any]
"""Unsigned integer array of codes, one element per container."""
Reals = npt.NDArray[np.float64]
"""Exact values in float64. Every format here except F64 sums fits without rounding."""


class Kind(IntEnum):
    """What the bits of a code are."""

    FLOAT = 0  # sign (if any), exponent, mantissa
    INT = 1  # two's complement
    UINT = 2  # plain binary
    EXPONENT = 3  # E8M0: a power of two, no sign, no zero


class Nan(IntEnum):
    """Which codes are NaN."""

    NONE = 0
    IEEE = 1  # exponent all ones and mantissa not zero; mantissa zero is infinity
    ALL_ONES = 2  # all exponent and mantissa bits set (both signs); there is no infinity
    MINUS_ZERO = 3  # only the code of -0; there is no infinity and no -0


class Special(Enum):
    """The values of a scalar that no Fraction holds."""

    NAN = 0
    POS_INF = 1
    NEG_INF = 2
    NEG_ZERO = 3


@dataclass(frozen=True, slots=True)
class Format:
    """One element encoding.

    Value of a FLOAT code with exponent field e and mantissa field f (width `mantissa_bits` = p):
    e > 0: (1 + f/2^p) * 2^(e - bias); e = 0: f/2^p * 2^(1 - bias) (subnormal, or zero when f = 0).
    """

    name: str
    bits: int
    kind: Kind
    exponent_bits: int
    mantissa_bits: int
    bias: int
    signed: bool
    nan: Nan
    nan_code: int  # what a conversion of NaN yields; -1: the format cannot hold the result of converting a NaN
    source: str

    @property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        if self.kind is Kind.INT:
            return (1 << (self.bits - 1)) - 1
        top = (1 << (self.bits - (1 if self.signed else 0))) - 1
        if self.kind is Kind.UINT:
            return top
        if self.kind is Kind.EXPONENT:
            return top - 1
        if self.nan is Nan.IEEE:
            return top - (1 << self.mantissa_bits)
        return top - (1 if self.nan is Nan.ALL_ONES else 0)

    @property
    def min_code(self) -> int:
        """Code of the most negative finite value (of the smallest value where there is no sign)."""
        if self.kind is Kind.INT:
            return 1 << (self.bits - 1)
        return self.max_code | self.sign_bit if self.signed else 0

    @property
    def sign_bit(self) -> int:
        """Mask of the sign bit, 0 where there is none."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def has_inf(self) -> bool:
        """Only formats with IEEE specials hold infinities."""
        return self.nan is Nan.IEEE

    @property
    def has_neg_zero(self) -> bool:
        """-0 exists in every signed float but the fnuz ones."""
        return self.kind is Kind.FLOAT and self.signed and self.nan is not Nan.MINUS_ZERO

    @property
    def precision(self) -> int:
        """Significand bits of a normal value, the hidden bit counted."""
        return self.mantissa_bits + 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share it."""
        return -127 if self.kind is Kind.EXPONENT else 1 - self.bias

    @property
    def max_finite(self) -> Fraction:
        """The largest finite value, exactly."""
        value = decode_scalar(self.max_code, self)
        assert isinstance(value, Fraction)
        return value

    @property
    def size(self) -> int:
        """Bytes of one container."""
        return container(self).itemsize

    def __repr__(self) -> str:
        return self.name


_OCP = "OCP 8-bit floating point specification 1.0"
_OCP_MX = "OCP microscaling formats (MX) 1.0"
_FNUZ = "graphcore/AMD/Qualcomm fnuz, arXiv 2206.02915; AMD CDNA3 ISA"
_IEEE = "IEEE 754-2019"
_F, _I, _U = Kind.FLOAT, Kind.INT, Kind.UINT

INT4 = Format("int4", 4, _I, 0, 3, 0, True, Nan.NONE, -1, "two's complement")
UINT4 = Format("uint4", 4, _U, 0, 4, 0, False, Nan.NONE, -1, "plain binary; zero points are kept beside it")
INT8 = Format("int8", 8, _I, 0, 7, 0, True, Nan.NONE, -1, "two's complement")
UINT8 = Format("uint8", 8, _U, 0, 8, 0, False, Nan.NONE, -1, "plain binary")
INT32 = Format("int32", 32, _I, 0, 31, 0, True, Nan.NONE, -1, "two's complement")
E2M1 = Format("e2m1", 4, _F, 2, 1, 1, True, Nan.NONE, 0x7, _OCP_MX + "; NaN converts to +6 (PTX cvt.satfinite)")
E4M3FN = Format("e4m3fn", 8, _F, 4, 3, 7, True, Nan.ALL_ONES, 0x7F, _OCP)
E4M3FNUZ = Format("e4m3fnuz", 8, _F, 4, 3, 8, True, Nan.MINUS_ZERO, 0x80, _FNUZ)
E5M2 = Format("e5m2", 8, _F, 5, 2, 15, True, Nan.IEEE, 0x7F, _OCP + "; NaN converts to 0x7F (PTX cvt)")
E5M2FNUZ = Format("e5m2fnuz", 8, _F, 5, 2, 16, True, Nan.MINUS_ZERO, 0x80, _FNUZ)
E8M0 = Format("e8m0", 8, Kind.EXPONENT, 8, 0, 127, False, Nan.ALL_ONES, 0xFF, _OCP_MX)
UE4M3 = Format("ue4m3", 7, _F, 4, 3, 7, False, Nan.ALL_ONES, 0x7F, "NVFP4 block scale: e4m3fn without a sign; PTX ISA")
F16 = Format("f16", 16, _F, 5, 10, 15, True, Nan.IEEE, 0x7E00, _IEEE)
BF16 = Format("bf16", 16, _F, 8, 7, 127, True, Nan.IEEE, 0x7FC0, "bfloat16: the upper half of binary32")
F32 = Format("f32", 32, _F, 8, 23, 127, True, Nan.IEEE, 0x7FC00000, _IEEE)
F64 = Format("f64", 64, _F, 11, 52, 1023, True, Nan.IEEE, 0x7FF8000000000000, _IEEE)

FORMATS = {
    f.name: f
    for f in (INT4, UINT4, INT8, UINT8, INT32, E2M1, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E8M0, UE4M3, F16, BF16, F32, F64)
}


def container(fmt: Format) -> np.dtype[Any]:
    """NumPy dtype that holds one code of `fmt`."""
    return np.dtype(np.uint8 if fmt.bits <= 8 else f"u{fmt.bits // 8}")


def decode_scalar(code: int, fmt: Format) -> Fraction | Special:
    """The definition: the value of one code. Raises ValueError where `code` is not one of the format."""
    if not 0 <= code < 1 << fmt.bits:
        raise ValueError(f"{fmt.name}: code {code:#x} is outside 0..{(1 << fmt.bits) - 1:#x}")
    if fmt.kind is Kind.UINT:
        return Fraction(code)
    if fmt.kind is Kind.INT:
        return Fraction(code - (1 << fmt.bits) if code & fmt.sign_bit else code)
    if fmt.kind is Kind.EXPONENT:
        return Special.NAN if code == 0xFF else Fraction(2) ** (code - fmt.bias)
    magnitude = code & ~fmt.sign_bit
    negative = bool(code & fmt.sign_bit)
    exponent, fraction = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    ones = (1 << fmt.exponent_bits) - 1
    if fmt.nan is Nan.IEEE and exponent == ones:
        return Special.NAN if fraction else (Special.NEG_INF if negative else Special.POS_INF)
    if fmt.nan is Nan.ALL_ONES and magnitude == (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1:
        return Special.NAN
    if negative and magnitude == 0:
        return Special.NAN if fmt.nan is Nan.MINUS_ZERO else Special.NEG_ZERO
    value = Fraction(fraction, 1 << fmt.mantissa_bits) + (1 if exponent else 0)
    value *= Fraction(2) ** (max(exponent, 1) - fmt.bias)
    return -value if negative else value


_SPECIAL_FLOAT = {
    Special.NAN: float("nan"), Special.POS_INF: float("inf"), Special.NEG_INF: -float("inf"), Special.NEG_ZERO: -0.0,
}


@cache
def _table(fmt: Format) -> Reals:
    """All values of a format of at most 16 bits, by code."""
    values = (decode_scalar(code, fmt) for code in range(1 << fmt.bits))
    table = np.array([_SPECIAL_FLOAT[v] if isinstance(v, Special) else float(v) for v in values], dtype=np.float64)
    table.setflags(write=False)
    return table


def decode(codes: Codes, fmt: Format) -> Reals:
    """Array twin of `decode_scalar`: exact values in float64, same shape as `codes` (an array of `container(fmt)`).

    NaN codes give NaN, infinities infinities, -0 gives -0.0. Raises ValueError where a code does not fit the format.
    """
    codes = np.asarray(codes)
    if fmt.bits < 8 * codes.dtype.itemsize and codes.size and int(codes.max()) >> fmt.bits:
        raise ValueError(f"{fmt.name}: code {int(codes.max()):#x} is outside 0..{(1 << fmt.bits) - 1:#x}")
    if fmt.bits <= 8 or fmt is F16:
        return _table(fmt)[codes]
    if fmt is INT32:
        return codes.view(np.int32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        if fmt is BF16:
            return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
        return codes.view(np.float32 if fmt is F32 else np.float64).astype(np.float64)


def is_nan(codes: Codes, fmt: Format) -> npt.NDArray[np.bool_]:
    """Which codes are NaN."""
    codes = np.asarray(codes)
    magnitude = codes & codes.dtype.type((1 << fmt.bits) - 1 - fmt.sign_bit)
    if fmt.nan is Nan.NONE:
        return np.zeros(codes.shape, dtype=np.bool_)
    if fmt.nan is Nan.MINUS_ZERO:
        return np.asarray(codes == fmt.sign_bit)
    if fmt.nan is Nan.ALL_ONES:
        return np.asarray(magnitude == (1 << (fmt.bits - (1 if fmt.signed else 0))) - 1)
    return np.asarray(magnitude > ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits)


def order_key(codes: Codes, fmt: Format) -> npt.NDArray[np.int64]:
    """Place of each code in the total order of the format's values, as int64: -0 < +0, neighbours differ by one.

    Floats: the magnitude for positive codes, -1 - magnitude for negative ones. Integers: the value. NaN codes get the
    place their bits would have; ask `is_nan` first.
    """
    wide = np.asarray(codes).astype(np.int64)
    if fmt.kind is Kind.INT:
        return np.where(wide & fmt.sign_bit, wide - (1 << fmt.bits), wide)
    if not fmt.signed:
        return wide
    magnitude = wide & ((1 << (fmt.bits - 1)) - 1)
    negative = wide < 0 if fmt.bits == 64 else (wide & fmt.sign_bit) != 0
    return np.where(negative, -1 - magnitude, magnitude)


def code_of_key(keys: npt.NDArray[np.int64], fmt: Format) -> Codes:
    """Inverse of `order_key`, in the format's container."""
    keys = np.asarray(keys, dtype=np.int64)
    if fmt.kind is Kind.INT:
        return (keys & ((1 << fmt.bits) - 1)).astype(container(fmt))
    if not fmt.signed:
        return keys.astype(container(fmt))
    magnitude = np.where(keys < 0, -1 - keys, keys).astype(np.uint64)
    sign = np.where(keys < 0, np.uint64(fmt.sign_bit), np.uint64(0))
    return (magnitude | sign).astype(container(fmt))
