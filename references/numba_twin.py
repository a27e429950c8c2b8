"""Compiled twin of the codecs in `rounding` and `formats`, for float32 data at memory speed.

Decides: nothing; every function is bit-equal to `encode` (float32 input) or `decode` (where float32 holds the values exactly).
Refuses: other input dtypes, and formats that float32 does not hold (INT32, F64 when decoding). Numba is optional: importing this
module without it raises ImportError.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import BF16, F16, F32, F64, INT32, Codes, Format, Kind, Nan, container, decode
from lowbit.references.rounding import Overflow, Rounding, encode, lookup_table

try:
    from numba import njit, prange
except ImportError as missing:
    raise ImportError("lowbit.references.numba_twin needs numba; install it or use lowbit.references.rounding") from missing

__all__ = ["decode_compiled", "encode_compiled"]

Floats = npt.NDArray[np.float32]


def encode_compiled(
    x: Floats, fmt: Format, rounding: Rounding = Rounding.RNE, overflow: Overflow = Overflow.SATFINITE, parallel: bool = False
) -> Codes:
    """Codes of float32 values: `encode(x, fmt, rounding, overflow)`, same shape and dtype. `parallel` uses Numba's threads.

    Raises ValueError where x is not float32, and where `encode` does (integers under Overflow.SPECIAL).
    """
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise ValueError(f"{fmt.name}: got values of dtype {x.dtype}, expected float32; use lowbit.references.rounding.encode")
    integer = fmt.kind in (Kind.INT, Kind.UINT)
    nearest_even = rounding is Rounding.RNE
    # NumPy's own casts are as fast as compiled code; an integer out of range must be named.
    if fmt in (F64, INT32) or (integer and overflow is Overflow.SPECIAL) or (nearest_even and fmt in (F16, F32)):
        return encode(x, fmt, rounding, overflow)
    bits = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    codes = np.empty(bits.shape, dtype=container(fmt))
    if fmt is BF16 and nearest_even:
        (_bf16_threads if parallel else _bf16_serial)(bits, codes, int(overflow is Overflow.SATFINITE))
    elif fmt.bits > 8:
        (_bits_threads if parallel else _bits_serial)(bits, codes, *_wide(fmt, overflow), int(rounding))
    elif integer:
        (_lookup_threads if parallel else _lookup_serial)(bits, codes, _integer_table(fmt, rounding), 14)
    else:
        (_lookup_threads if parallel else _lookup_serial)(bits, codes, lookup_table(fmt, rounding, overflow, 4), 15)
    return codes.reshape(x.shape)


def decode_compiled(codes: Codes, fmt: Format, parallel: bool = False) -> Floats:
    """Values of codes in float32, exact, same shape: `decode(codes, fmt)` narrowed without rounding.

    Raises ValueError for INT32 and F64, whose values float32 does not hold, for a wrong container, and where a code does not fit.
    """
    codes = np.asarray(codes)
    if fmt in (INT32, F64):
        raise ValueError(f"{fmt.name}: float32 does not hold its values; use lowbit.references.formats.decode")
    if codes.dtype != container(fmt):
        raise ValueError(f"{fmt.name}: got codes of dtype {codes.dtype}, expected {container(fmt)}")
    flat = np.ascontiguousarray(codes).reshape(-1)
    if fmt is F32:
        return flat.view(np.float32).reshape(codes.shape).copy()
    values = np.empty(flat.shape, dtype=np.float32)
    if fmt is BF16:
        (_upper_threads if parallel else _upper_serial)(flat, values.view(np.uint32))
    elif not (_gather_threads if parallel else _gather_serial)(flat, values, _values(fmt)):
        decode(codes, fmt)  # names the code that does not fit
    return values.reshape(codes.shape)


@cache
def _values(fmt: Format) -> Floats:
    """All values by code; every format here of at most 16 bits fits float32."""
    return decode(np.arange(1 << fmt.bits).astype(container(fmt)), fmt).astype(np.float32)


@cache
def _integer_table(fmt: Format, rounding: Rounding) -> Codes:
    """Saturated codes by the top 17 bits and a sticky bit of a float32.

    Eight fraction bits: an integer of up to 8 bits has 7 below its leading one, and one more decides ties.
    """
    index = np.arange(1 << 18, dtype=np.uint32)
    representative = ((index >> np.uint32(1)) << np.uint32(15)) | (index & np.uint32(1))
    return encode(representative.view(np.float32), fmt, rounding, Overflow.SATFINITE)


def _wide(fmt: Format, overflow: Overflow) -> tuple[int, int, int, int, int]:
    """What `_bits` needs to know of a 16- or 32-bit float format."""
    special = overflow is Overflow.SPECIAL and fmt.nan is Nan.IEEE
    return fmt.mantissa_bits, fmt.min_exponent, fmt.max_code, fmt.nan_code, fmt.max_code + (1 if special else 0)


_compiled: Any = njit(nogil=True, cache=False)
_compiled_threads: Any = njit(nogil=True, cache=False, parallel=True)


def _lookup(bits: Any, codes: Any, table: Any, low: int) -> None:
    mask = np.uint32((1 << low) - 1)
    for i in prange(bits.size):
        b = bits[i]
        # Adding the mask carries into bit `low` exactly when one of the bits below it is set: the sticky bit.
        codes[i] = table[(b | ((b & mask) + mask)) >> np.uint32(low)]


def _bf16(bits: Any, codes: Any, saturate: int) -> None:
    """Nearest even to bfloat16, without branches so that it vectorises."""
    for i in prange(bits.size):
        b = bits[i]
        rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        infinite = np.uint32((rounded & np.uint32(0x7FFF)) == np.uint32(0x7F80))
        nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        codes[i] = np.uint32(0x7FC0) if nan else rounded - infinite * np.uint32(saturate)


def _gather(codes: Any, values: Any, table: Any) -> Any:
    """Values by code; False where a code lies outside the table."""
    beyond = np.int64(0)
    mask = table.size - 1
    for i in prange(codes.size):
        code = codes[i]
        beyond += np.int64(code > mask)
        values[i] = table[code & mask]
    return beyond == 0


def _upper(codes: Any, bits: Any) -> None:
    for i in prange(codes.size):
        bits[i] = np.uint32(codes[i]) << np.uint32(16)


def _wide_code_of(
    b: Any, mantissa_bits: Any, min_exponent: Any, max_code: Any, nan_code: Any, over_code: Any, sign_bit: Any, rounding: Any
) -> Any:
    """One float32 pattern to a code of an IEEE-like format; the arithmetic of `rounding.encode` on one element."""
    magnitude = np.int64(b) & 0x7FFFFFFF
    negative = (np.int64(b) >> 31) != 0
    if magnitude > 0x7F800000:
        return nan_code
    field = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | (np.int64(field > 0) << 23)
    exponent = (field if field > 0 else 1) - 127
    top = exponent if exponent > min_exponent else min_exponent
    shift = top - exponent + 23 - mantissa_bits
    shift = shift if shift < 40 else 40
    kept = significand >> shift
    rest = significand & ((1 << shift) - 1)
    half = (1 << shift) >> 1
    if rounding == 0:
        up = rest > half or (rest == half and half > 0 and (kept & 1) == 1)
    elif rounding == 2:
        up = rest > half or (rest == half and half > 0)
    elif rounding == 5:
        up = rest > half
    else:
        up = rest > 0 and ((rounding == 3 and negative) or (rounding == 4 and not negative))
    code = ((top - min_exponent) << mantissa_bits) + kept + np.int64(up)
    if code > max_code or magnitude == 0x7F800000:
        inward = rounding == 1 or (rounding == 3 and not negative) or (rounding == 4 and negative)
        code = max_code if inward and magnitude != 0x7F800000 else over_code
    return code | sign_bit if negative else code


_wide_code = _compiled(_wide_code_of)


def _bits(
    bits: Any, codes: Any, mantissa_bits: int, min_exponent: int, max_code: int, nan_code: int, over_code: int, rounding: int
) -> None:
    sign_bit = 1 << (8 * codes.itemsize - 1)
    for i in prange(bits.size):
        codes[i] = _wide_code(bits[i], mantissa_bits, min_exponent, max_code, nan_code, over_code, sign_bit, rounding)


_lookup_serial, _lookup_threads = _compiled(_lookup), _compiled_threads(_lookup)
_bf16_serial, _bf16_threads = _compiled(_bf16), _compiled_threads(_bf16)
_gather_serial, _gather_threads = _compiled(_gather), _compiled_threads(_gather)
_upper_serial, _upper_threads = _compiled(_upper), _compiled_threads(_upper)
_bits_serial, _bits_threads = _compiled(_bits), _compiled_threads(_bits)
