"""Torch twin of the codecs in `rounding` and `formats`, for tensors that already live on a device.

Decides: nothing; every function is bit-equal to `encode` and `decode`. Only integer operations on bit patterns and table gathers,
so the bits are the same on every device. Refuses: torch's casts to low-bit dtypes, whose overflow rule changed between releases.
Torch is optional: importing this module without it raises ImportError.

Containers: torch.uint8 up to 8 bits; torch.int16, torch.int32, torch.int64 beyond, holding the bits of NumPy's uint16, uint32 and
uint64 containers (torch has few operations on those): `codes.cpu().numpy().view(container(fmt))` gives the NumPy codes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from lowbit.references.formats import BF16, F32, F64, INT32, Format, Kind, Nan, container, decode
from lowbit.references.rounding import Overflow, Rounding, lookup_table

try:
    import torch
except ImportError as missing:
    raise ImportError("lowbit.references.torch_twin needs torch; install it or use lowbit.references.rounding") from missing

__all__ = ["decode_torch", "encode_torch"]

_CONTAINER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DECODED = (torch.float32, torch.float64)


def encode_torch(
    x: torch.Tensor, fmt: Format, rounding: Rounding = Rounding.RNE, overflow: Overflow = Overflow.SATFINITE
) -> torch.Tensor:
    """Codes of float16, bfloat16, float32 or float64 values: same shape and device; containers as in the module docstring.

    Raises ValueError for another dtype, and for an integer format under Overflow.SPECIAL where a value is not finite or rounds
    out of range (this synchronises with the device).
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    if x.dtype not in _DECODED:
        raise ValueError(f"{fmt.name}: got dtype {x.dtype}, expected float16, bfloat16, float32 or float64")
    x = x.contiguous()
    if fmt.bits <= 8 and fmt.kind in (Kind.FLOAT, Kind.EXPONENT):
        bits, low = (x.view(torch.int32), 15) if x.dtype == torch.float32 else (x.view(torch.int64), 47)
        index = ((bits >> low) & 0x1FFFF) | ((bits & ((1 << low) - 1)) != 0)
        return _table(fmt, rounding, overflow, x.element_size(), x.device)[index.long()]
    # 32-bit arithmetic is enough for float32 values, but for the two formats wider than their significand.
    narrow = x.dtype == torch.float32 and fmt not in (F64, INT32)
    bits = x.view(torch.int32) if narrow else _widened(x) if x.dtype == torch.float32 else x.view(torch.int64)
    code = (_integer_codes if fmt.kind in (Kind.INT, Kind.UINT) else _float_codes)(bits, fmt, rounding, overflow)
    return code.to(_CONTAINER[container(fmt).itemsize])


def decode_torch(codes: torch.Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of codes in `dtype` (float32 or float64), exact, same shape and device.

    Codes come in the containers of the module docstring. Raises ValueError for a wrong container, for a dtype that does not hold
    the values (INT32 and F64 need float64), and where a code does not fit the format (this synchronises with the device).
    """
    expected = _CONTAINER[container(fmt).itemsize]
    if codes.dtype != expected:
        raise ValueError(f"{fmt.name}: got codes of dtype {codes.dtype}, expected {expected}")
    if dtype not in _DECODED or (dtype == torch.float32 and fmt in (INT32, F64)):
        raise ValueError(f"{fmt.name}: got dtype {dtype}, expected one that holds every value exactly; use torch.float64")
    if fmt.bits < 8 and codes.numel() and int(codes.max()) >> fmt.bits:
        raise ValueError(f"{fmt.name}: code {int(codes.max()):#x} is outside 0..{(1 << fmt.bits) - 1:#x}")
    if fmt is F64:
        return codes.clone().view(torch.float64)
    if fmt is INT32:
        return codes.to(torch.float64)
    if fmt in (BF16, F32):
        single = (codes.to(torch.int32) << (16 if fmt is BF16 else 0)).view(torch.float32)
        return single if dtype == torch.float32 else _widened(single).view(torch.float64)
    return _values(fmt, dtype, codes.device)[codes.long() & ((1 << fmt.bits) - 1)]


@cache
def _table(fmt: Format, rounding: Rounding, overflow: Overflow, itemsize: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(lookup_table(fmt, rounding, overflow, itemsize).copy()).to(device)


@cache
def _values(fmt: Format, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    values = decode(np.arange(1 << fmt.bits).astype(container(fmt)), fmt)
    return torch.from_numpy(values.astype(np.float32 if dtype == torch.float32 else np.float64)).to(device)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """float64 bits (int64) of float32 values. In integers: a device's own conversion may flush subnormals."""
    bits = x.view(torch.int32).to(torch.int64)
    sign, field, fraction = bits & -(1 << 63), (bits >> 23) & 0xFF, bits & 0x7FFFFF
    normal = ((field + 896) << 52) | (fraction << 29)
    # Subnormals: the position of the leading one, by halving steps, then as a normal value.
    lead, rest = torch.zeros_like(fraction), fraction
    for step in (16, 8, 4, 2, 1):
        above = (rest >> step) > 0
        lead = torch.where(above, lead + step, lead)
        rest = torch.where(above, rest >> step, rest)
    subnormal = ((lead + 874) << 52) | ((fraction << (52 - lead)) & ((1 << 52) - 1))
    special = (0x7FF << 52) | (fraction << 29)
    magnitude = torch.where(field == 0, torch.where(fraction == 0, fraction, subnormal), normal)
    return sign | torch.where(field == 0xFF, special, magnitude)


def _away(
    kept: torch.Tensor, rest: torch.Tensor, shift: torch.Tensor, negative: torch.Tensor, rounding: Rounding
) -> torch.Tensor:
    """True where a magnitude goes up to the next step."""
    half = (1 << shift) >> 1
    if rounding is Rounding.RZ:
        return torch.zeros_like(negative)
    if rounding in (Rounding.FLOOR, Rounding.CEIL):
        return (rest > 0) & (negative if rounding is Rounding.FLOOR else ~negative)
    if rounding is Rounding.RNTZ:
        return rest > half
    tie = (rest == half) & (half > 0)
    return (rest > half) | (tie if rounding is Rounding.RNA else tie & ((kept & 1) == 1))


def _split(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Of float32 (int32) or float64 (int64) bits: sign, magnitude bits, significand, exponent, then fraction width and infinity.

    Value = significand * 2^(exponent - fraction width).
    """
    width, bias = (52, 1023) if bits.dtype == torch.int64 else (23, 127)
    infinity = (2 * bias + 1) << width
    magnitude = bits & (infinity | ((1 << width) - 1))
    field = magnitude >> width
    significand = (magnitude & ((1 << width) - 1)) | ((field > 0).to(bits.dtype) << width)
    return bits < 0, magnitude, significand, field.clamp(min=1) - bias, width, infinity


def _float_codes(bits: torch.Tensor, fmt: Format, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    """Codes of the IEEE-like formats (16 bits and wider), signed as in the containers."""
    assert fmt.nan is Nan.IEEE
    negative, magnitude, significand, exponent, width, infinity = _split(bits)
    top = exponent.clamp(min=fmt.min_exponent)
    shift = (top - exponent + (width - fmt.mantissa_bits)).clamp(max=8 * bits.element_size() - 2)
    kept = significand >> shift
    rest = significand & ((1 << shift) - 1)
    code = ((top - fmt.min_exponent) << fmt.mantissa_bits) + kept + _away(kept, rest, shift, negative, rounding)
    infinite = magnitude == infinity
    beyond = infinite | (code > fmt.max_code)
    code = code.masked_fill(beyond, fmt.max_code)
    if overflow is Overflow.SPECIAL:
        inward = {Rounding.RZ: torch.ones_like(negative), Rounding.FLOOR: ~negative, Rounding.CEIL: negative}.get(rounding)
        flagged = beyond if inward is None else beyond & (infinite | ~inward)
        code = code.masked_fill(flagged, fmt.max_code + 1)
    code = torch.where(negative, code | -fmt.sign_bit, code)
    return code.masked_fill(magnitude > infinity, fmt.nan_code)


def _integer_codes(bits: torch.Tensor, fmt: Format, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    """Codes of INT and UINT formats (two's complement in the low bits)."""
    negative, magnitude, significand, exponent, width, infinity = _split(bits)
    shift = (width - exponent).clamp(min=0, max=8 * bits.element_size() - 2)
    kept = significand >> shift
    rest = significand & ((1 << shift) - 1)
    # Where the exponent exceeds the fraction width, the significand alone is already far out of range.
    steps = kept + _away(kept, rest, shift, negative, rounding)
    integer = torch.where(negative, -steps, steps)
    low, high = (-fmt.sign_bit if fmt.kind is Kind.INT else 0), fmt.max_code
    if overflow is Overflow.SPECIAL:
        outside = (integer < low) | (integer > high) | (magnitude >= infinity)
        if bool(outside.any()):
            raise ValueError(f"{fmt.name}: got values that are not finite or round outside {low}..{high}; use Overflow.SATFINITE")
    integer = integer.clamp(min=low, max=high).masked_fill(magnitude > infinity, 0)
    return integer if fmt is INT32 else integer & ((1 << fmt.bits) - 1)
