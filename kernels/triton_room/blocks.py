"""The arithmetic of one block in Triton: statistics, scales and codes of 4-bit recipes.

Decides: every step between binary32 values of a block and its scale, codes and zero point, by compile-time numbers of a recipe
(`NVFP4_RECIPES`, `INT4_RULES`). Refuses: addresses; those belong to the kernels. Every operation is one IEEE operation in
binary32, rounded once more where a recipe computes in the format of x; where a source uses an approximate reciprocal the exact
one, rounded, stands for it.

A block lies along the last axis. NaN is a magnitude above infinity, so that a maximum of integers keeps or drops it on every
target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import triton
import triton.language as tl

from lowbit.kernels.triton_room.codes8 import e2m1_value, magnitude_code, magnitude_of, sign_of, ue4m3_code, ue4m3_value, whole
from lowbit.kernels.triton_room.codes16 import rounded
from lowbit.kernels.triton_room.division import div, flushed_reciprocal, reciprocal

__all__ = [
    "INT4_RULES", "NVFP4_RECIPES", "Nvfp4Recipe", "flags", "int4_codes", "int4_scale", "key_of", "largest", "magnitudes",
    "nvfp4_block", "offset", "packed", "value_of_key",
]

_SIXTH = float(np.float32(1) / np.float32(6))


@triton.jit
def offset(row, stride, WRAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Containers before a row, as int64. WRAP plants the fault of 32-bit offsets, scaled down to 14 bits for small matrices."""
    places = row.to(tl.int64) * stride
    return places & 0x3FFF if WRAP else places


@triton.jit
def magnitudes(x, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 binary32 codes of |x|; NAN = 0: a NaN counts as 0."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits if NAN else tl.where(bits > 0x7F800000, 0, bits)


@triton.jit
def largest(x, NAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 amax along the last axis; NAN = 1: NaN if there is one, 0: as if it were not there."""
    return tl.max(magnitudes(x, NAN), axis=len(x.shape) - 1).to(tl.float32, bitcast=True)


@triton.jit
def key_of(x):  # type: ignore[no-untyped-def]
    """int32 that orders binary32 values as integers; -0 below +0, NaN outside the infinities."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of_key(key):  # type: ignore[no-untyped-def]
    """Inverse of `key_of`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def bounded(x, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """x between LOW and HIGH; NaN stays."""
    return tl.where(x < LOW, LOW, tl.where(x > HIGH, HIGH, x))


@triton.jit
def packed(codes):  # type: ignore[no-untyped-def]
    """int32 nibbles [a, b, 2j] -> uint8 bytes [a, b, j], the even element in bits 0 to 3."""
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1], codes.shape[2] // 2, 2)))
    return (even | (odd << 4)).to(tl.uint8)


# NVFP4 ---------------------------------------------------------------------------------------------------------------


@triton.jit
def nvfp4_scale(  # type: ignore[no-untyped-def]
    amax, g, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
):
    """binary32 block scale before its rounding, from amax and the global scale."""
    sixth = amax * SIXTH if SIXTH > 0 else div(amax, tl.full(amax.shape, 6.0, tl.float32))
    if JOIN == 1:
        scale = g * sixth
    elif JOIN == 2:
        scale = div(sixth, g)
    elif JOIN == 3:
        scale = amax * (g * SIXTH)
    elif JOIN == 4:
        scale = div(amax, 6.0 * g)
    else:
        scale = sixth
    if ZERO == 1:
        scale = tl.where(scale == 0, 1.0, scale)
    return bounded(scale, FLOOR, CAP)


@triton.jit
def nvfp4_codes(  # type: ignore[no-untyped-def]
    x, scale, g, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr, SIGN: tl.constexpr,
    NAN_CODE: tl.constexpr,
):
    """int32 e2m1 codes of a block from the scale that its elements are divided by, and the global scale."""
    if EFFECT == 0:
        quotient = div(x, tl.expand_dims(scale, -1))
    elif EFFECT == 1:
        quotient = div(x, tl.expand_dims(div(scale, g), -1))
    elif EFFECT == 2:
        quotient = div(x, tl.expand_dims(scale * g, -1))
    else:
        if EFFECT == 5:
            inverse = div(reciprocal(g), scale)
        elif EFFECT == 4:
            inverse = flushed_reciprocal(scale * flushed_reciprocal(g)) if FLUSH else reciprocal(scale * reciprocal(g))
        else:
            inverse = flushed_reciprocal(scale) if FLUSH else reciprocal(scale)
        if AT_ZERO >= 0:
            inverse = tl.where(scale == 0, AT_ZERO, inverse)
        else:
            largest_finite: tl.constexpr = 3.4028234663852886e38
            inverse = tl.where(inverse > largest_finite, largest_finite, inverse) if AT_ZERO < -1 else inverse
        quotient = x * tl.expand_dims(inverse, -1)
    magnitude = magnitude_code(magnitude_of(quotient, 6.0), 127, 1, TIES)
    if SIGN == 0:
        negative = sign_of(quotient)
    elif SIGN == 1:
        negative = (x < 0).to(tl.int32)
    else:
        negative = ((quotient < 0) & (magnitude > 0)).to(tl.int32)
    return tl.where(quotient == quotient, magnitude | (negative << 3), NAN_CODE)


@triton.jit
def nvfp4_block(  # type: ignore[no-untyped-def]
    x, g, NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr,
):
    """(int32 codes [.., 16], scale codes [..]) of x [.., 16]: uint8 e4m3, or WIDE int32 binary32. g: global scale, broadcast to
    the scales. Fields as in `Nvfp4Recipe`."""
    amax = largest(x, NAN)
    unrounded = nvfp4_scale(amax, g, SIXTH, JOIN, FLOOR, CAP, ZERO)
    if WIDE:
        return (nvfp4_codes(x, unrounded, g, EFFECT, FLUSH, AT_ZERO, TIES, SIGN, NAN_CODE),
                unrounded.to(tl.int32, bitcast=True))
    else:
        code = ue4m3_code(unrounded)
        if ZERO == 2:
            code = tl.where(code == 0, 0x20, code).to(tl.uint8)  # 0.125
        scale = ue4m3_value(code) if STORED else unrounded
        codes = nvfp4_codes(x, scale, g, EFFECT, FLUSH, AT_ZERO, TIES, SIGN, NAN_CODE)
        if CHOICE:
            second = ue4m3_code(unrounded * 1.5)
            narrow = ue4m3_value(second)
            others = nvfp4_codes(x, narrow, g, EFFECT, FLUSH, AT_ZERO, TIES, SIGN, NAN_CODE)
            unit = tl.minimum(tl.maximum(amax.to(tl.int32, bitcast=True) >> 23, 17), 237)  # exponents -110 to 110
            unit = ((254 - unit) << 23).to(tl.float32, bitcast=True)
            better = squared_error(x, others, narrow, g, unit) < squared_error(x, codes, scale, g, unit)
            codes = tl.where(tl.expand_dims(better, -1), others, codes)
            code = tl.where(better, second, code)
        return codes, code


@triton.jit
def squared_error(x, codes, scale, g, unit):  # type: ignore[no-untyped-def]
    """Sum over a block of (x - code scale / g)^2 in binary32, of values times a power of two near 1 / amax: no square
    overflows."""
    error = x * tl.expand_dims(unit, -1) - e2m1_value(codes) * tl.expand_dims(div(scale * unit, g), -1)
    return tl.sum(error * error, axis=len(x.shape) - 1)


@dataclass(frozen=True, slots=True)
class Nvfp4Recipe:
    """One source system as compile-time arguments of `nvfp4_block`.

    nan: 1, a NaN reaches the scale; 0, it does not count. sixth: amax is multiplied by it; 0, divided by 6. join: how the global
    scale g enters: 0 not at all, 1 g (amax / 6), 2 (amax / 6) / g, 3 amax (g / 6), 4 amax / (6 g). floor, cap: bounds before
    rounding. zero: what a scale of 0 becomes, 0 stays, 1 one before its bounds, 2 0.125 after rounding. stored: 1, elements are
    divided by the scale as stored; 0, before rounding. effect: the quotient, 0 x / s, 1 x / (s / g), 2 x / (s g), 3 x (1 / s), 4
    x (1 / (s (1 / g))), 5 x ((1 / g) / s). flush: reciprocals take subnormals as zeros. at_zero: the reciprocal where s is 0; -1
    as IEEE has it, -2 bounded by the largest binary32 value. ties: EVEN, AWAY, TOWARD_ZERO. sign: of codes, 0 that of the
    quotient, 1 set where x < 0, 2 as 0 and never on a zero. nan_code: code of a NaN quotient. choice: 1, scale and 1.5 scale are
    tried. wide: 1, binary32 scales. encode: the global scale is 1, range / amax; 0, amax / range. guard: 1, a global scale that
    is not finite is 1; 2, an amax of 0 gives 1 and none exceeds the largest binary32 value. range: for the global scale.
    """

    nan: int = 1
    sixth: float = 0.0
    join: int = 0
    floor: float = 0.0
    cap: float = float("inf")
    zero: int = 0
    stored: int = 1
    effect: int = 0
    flush: int = 0
    at_zero: float = -1.0
    ties: int = 0
    sign: int = 0
    nan_code: int = 7
    choice: int = 0
    wide: int = 0
    encode: int = 1
    guard: int = 0
    range: float = 2688.0


_FIELDS = (
    "nan", "sixth", "join", "floor", "cap", "zero", "stored", "effect", "flush", "at_zero", "ties", "sign", "nan_code", "choice",
    "wide",
)
"""Fields that `nvfp4_block` takes, in upper case."""

_REFERENCE = {"sixth": _SIXTH, "join": 1, "effect": 4, "at_zero": 0.0}
_NEAREST_AWAY = {"floor": float(np.float32(1e-12)), "cap": 448.0, "ties": 1, "sign": 1, "nan_code": 0}

NVFP4_RECIPES: Mapping[str, Nvfp4Recipe] = {
    "vllm": Nvfp4Recipe(**_REFERENCE, nan=0, flush=1),  # type: ignore[arg-type]
    "vllm_reference": Nvfp4Recipe(**_REFERENCE),  # type: ignore[arg-type]
    "vllm_emulation": Nvfp4Recipe(**{**_REFERENCE, "at_zero": float(np.float32(1e-8))}),  # type: ignore[arg-type]
    "compressed_tensors": Nvfp4Recipe(join=1, zero=2, effect=1, guard=1),
    "modelopt": Nvfp4Recipe(join=4, zero=1, floor=2.0**-9, cap=448.0, effect=2, sign=1, encode=0),
    "torchao": Nvfp4Recipe(join=2, floor=2.0**-6, cap=448.0, effect=5, encode=0),
    "transformer_engine": Nvfp4Recipe(sixth=_SIXTH, join=3, effect=4, at_zero=-2.0, guard=2),
    "four_over_six": Nvfp4Recipe(join=1, effect=4, at_zero=0.0, sign=1, choice=1, guard=2, range=1536.0),
    "svdquant": Nvfp4Recipe(**_NEAREST_AWAY),  # type: ignore[arg-type]
    "svdquant_triton": Nvfp4Recipe(**_NEAREST_AWAY, sixth=_SIXTH),  # type: ignore[arg-type]
    "nunchaku": Nvfp4Recipe(nan=0, sixth=_SIXTH, cap=448.0, stored=0, effect=3, flush=1),
    "deepgemm": Nvfp4Recipe(floor=float(np.float32(1e-4) / np.float32(6)), effect=3, ties=2, sign=2, nan_code=0, wide=1),
}
"""By the recipe's token. Sources of the numbers: clauses QNT-42 to QNT-53 of the contract."""


def flags(recipe: Nvfp4Recipe) -> dict[str, float]:
    """Compile-time arguments of `nvfp4_block` by name."""
    fields = asdict(recipe)
    return {name.upper(): fields[name] for name in _FIELDS}


# int4 ----------------------------------------------------------------------------------------------------------------

INT4_RULES: Mapping[tuple[bool, str], int] = {
    (False, "quantize_weights"): 0, (True, "quantize_weights"): 1, (False, "compressed_tensors"): 2, (True,
    "compressed_tensors"): 3, (False, "svdquant"): 4, (False, "nunchaku"): 5,
}
"""(with zero points, recipe's token) -> RULE. Sources of the numbers: clauses QNT-32 to QNT-36 of the contract."""


@triton.jit
def int4_scale(amax, top, bottom, RULE: tl.constexpr, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(scale to store, scale that elements are divided by, zero point), binary32, from amax, the largest and the smallest value
    of a group; the zero point is a whole number. FORMAT: that of x. amax is NaN where a NaN counts."""
    zero = tl.zeros(amax.shape, tl.float32)
    if RULE == 0:
        high = rounded(div(top, tl.full(amax.shape, 7.0, tl.float32)), FORMAT)
        low = rounded(div(bottom, tl.full(amax.shape, 8.0, tl.float32)), FORMAT)
        scale = tl.where(amax == amax, tl.maximum(tl.abs(high), tl.abs(low)), amax)
        return scale, scale, zero
    elif RULE == 1:
        smallest = rounded(tl.full(amax.shape, 1e-5, tl.float32), FORMAT)
        spread = rounded(top - bottom, FORMAT)
        spread = tl.where(amax == amax, tl.where(spread < smallest, smallest, spread), amax)
        scale = rounded(div(spread, tl.full(amax.shape, 15.0, tl.float32)), FORMAT)
        zero = whole(tl.abs(rounded(div(bottom, scale), FORMAT)), 0, 15).to(tl.float32)
        return scale, scale, zero
    elif RULE == 2:
        scale = rounded(div(amax, tl.full(amax.shape, 7.5, tl.float32)), FORMAT)
        scale = tl.where(scale == 0, epsilon(FORMAT), scale)
        return scale, scale, zero
    elif RULE == 3:
        low = tl.minimum(bottom, 0.0)
        spread = tl.where(amax == amax, rounded(tl.maximum(top, 0.0) - low, FORMAT), amax)
        scale = rounded(div(spread, tl.full(amax.shape, 15.0, tl.float32)), FORMAT)
        zero = whole(rounded(-8.0 - rounded(div(low, scale), FORMAT), FORMAT), -8, 7).to(tl.float32)
        scale = tl.where(scale == 0, epsilon(FORMAT), scale)
        return scale, scale, zero
    elif RULE == 4:
        scale = rounded(bounded(div(amax, tl.full(amax.shape, 7.0, tl.float32)), 1e-12, 65504.0), 1)
        return scale, scale, zero
    else:
        scale = amax * 0.1428571492433548  # fl(1/7)
        return rounded(scale, FORMAT), scale, zero


@triton.jit
def epsilon(FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^-23, 2^-10 or 2^-7: the epsilon of binary32, binary16, bf16."""
    return 1.1920928955078125e-07 if FORMAT == 0 else (0.0009765625 if FORMAT == 1 else 0.0078125)


@triton.jit
def int4_codes(x, scale, zero, RULE: tl.constexpr, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 codes -8 to 7 (RULE 1: 0 to 15) of x [.., G] beside its scale and zero point [..]; NaN quotients give 0."""
    if RULE == 5:
        return whole(x * tl.expand_dims(flushed_reciprocal(scale), -1), -8, 7)
    quotient = div(x, tl.expand_dims(scale, -1))
    if RULE != 4:
        quotient = rounded(quotient, FORMAT)
    if RULE == 1:
        code = whole(quotient, -1048576, 1048576) + tl.expand_dims(zero, -1).to(tl.int32)
        return tl.minimum(tl.maximum(code, 0), 15)
    elif RULE == 3:
        return whole(rounded(quotient + tl.expand_dims(zero, -1), FORMAT), -8, 7)
    else:
        return whole(quotient, -8, 7)
