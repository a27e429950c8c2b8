"""Recipes: how a matrix of numbers becomes scales and codes, one record per source system.

Decides: `quantise_block_scalar`, the definition for one block in Fractions; `quantise`, its array twin; the codes and scales
that a recipe admits where one of its steps is an approximate instruction (`admissible_codes`).
Refuses: tolerances. A recipe made of IEEE operations has one answer, ties included. A recipe with an approximate reciprocal
has the answers that some reciprocal within the stated error gives, and no others.

The steps, each a field of the record:
1. The statistic of a block: the largest magnitude (amax), or the largest and the smallest value.
2. The block scale: statistic over divisor, joined with the global scale, floored, capped; rounded to the scale format.
3. The quotient: each element over the stored or the unrounded scale, by division or by a reciprocal.
4. The code: quotient (plus zero point) rounded into the element format, bounded by `low` and `high`.
Every operation of steps 1 to 3 is one IEEE operation rounded to nearest even in binary32, or in the format of x where the
record says INPUT (the result is then rounded once more, to that format: the first rounding never changes the second, since
binary32 has at least 2p + 2 significand bits for the p = 8 or 11 of bf16 and binary16).

There is no field for the order of clamp and rounding of float elements: each bound is a code of the element format, rounding is
monotone and leaves codes where they are, so both orders give the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E8M0,
    F16,
    F32,
    INT4,
    INT8,
    INT32,
    UE4M3,
    UINT4,
    Codes,
    Format,
    Kind,
    Reals,
    Special,
    container,
    decode,
    decode_scalar,
    order_key,
)
from lowbit.references.rounding import Overflow, Rounding, encode, encode_scalar, round_to, sum_odd

__all__ = [
    "CONSTANTS", "DISAGREEMENTS", "RECIPES", "BlockCodes", "Choice", "Disagreement", "Division", "Effective", "GlobalGuard",
    "GlobalRule", "Join", "Keys", "Mask", "NanAmax", "NanCode", "Order", "Quantised", "Recipe", "Smoothed", "Smoothing",
    "Statistic", "Using", "Value", "Width", "ZeroPoint", "ZeroScale", "ZeroSign", "admissible_codes", "constants", "float_bits",
    "float_value", "global_scale_of", "quantise", "quantise_block_scalar", "smooth",
]

Mask = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.int64]
Value = Fraction | Special


class Statistic(IntEnum):
    """What of a block the scale is made of."""

    ABSMAX = 0  # largest magnitude
    SIGNED_PAIR = 1  # max(|max / divisor|, |min / divisor_low|)
    RANGE = 2  # max - min


class NanAmax(IntEnum):
    """What a NaN in a block does to its statistic."""

    IGNORED = 0  # IEEE maximumNumber (fmaxf): as if the element were absent
    PROPAGATED = 1  # IEEE maximum (torch amax): the scale is NaN


class Division(IntEnum):
    """How a quotient a / b is made."""

    DIVIDE = 0  # fl(a / b)
    RECIPROCAL = 1  # fl(a * fl(1 / b))
    APPROXIMATE = 2  # fl(a * r), r a binary32 value within `reciprocal_ulps` of 1 / b
    INVERSE = 3  # scales only: m = fl(b / a) multiplies the elements, the stored scale is fl(1 / m)


class Width(IntEnum):
    """Where an intermediate is rounded to."""

    F32 = 0
    INPUT = 1  # the format of x


class GlobalRule(IntEnum):
    """What the global scale is."""

    NONE = 0
    ENCODE = 1  # g = fl(global_range / amax): elements are multiplied by g before they are coded; values are divided by it
    DECODE = 2  # d = fl(amax / global_range): values are multiplied by it


class GlobalGuard(IntEnum):
    """What a useless tensor amax does to the global scale."""

    NONE = 0  # IEEE result as it comes
    FINITE = 1  # a result that is NaN or infinite becomes 1
    NONZERO = 2  # amax = 0 gives 1, a result beyond the largest binary32 value gives that value


class Join(IntEnum):
    """How the global scale enters the block scale (a: statistic, c: divisor, (/): the recipe's `scale_division`)."""

    NONE = 0  # a (/) c
    TIMES_QUOTIENT = 1  # g * (a (/) c)
    OVER_QUOTIENT = 2  # (a (/) c) / d
    TIMES_CONSTANT = 3  # a * (g (/) c)
    OVER_PRODUCT = 4  # a / (c * d)


class Effective(IntEnum):
    """What an element is divided by, from the block scale s and the global scale."""

    SCALE = 0  # s
    OVER_GLOBAL = 1  # s / g
    TIMES_GLOBAL = 2  # s * d
    TIMES_RECIPROCAL = 3  # s * (1 / g)
    RECIPROCAL_OVER = 4  # the element is multiplied by (1 / d) / s


class ZeroScale(IntEnum):
    """What replaces a block scale of exactly zero."""

    KEPT = 0
    ONE = 1  # 1.0, before floor, cap and rounding
    EPSILON = 2  # 2^-mantissa_bits of the scale format, after rounding


class Using(IntEnum):
    """Which scale the elements are divided by."""

    STORED = 0
    UNROUNDED = 1


class ZeroPoint(IntEnum):
    """Zero points of asymmetric integer codes."""

    NONE = 0
    RATIO = 1  # clamp(RNE(|min / s|), low, high)
    SHIFTED = 2  # RNE(clamp(low - min / s, low, high)), with the scale before its guard and rounding


class Order(IntEnum):
    """Where the zero point is added and the bounds are applied."""

    ROUND_FIRST = 0  # clamp(RNE(x / s) + z)
    CLAMP_FIRST = 1  # RNE(clamp(x / s + z))


class NanCode(IntEnum):
    """The code of an element whose quotient is NaN."""

    NAN = 0  # the NaN of the format
    HIGH = 1  # the code of `high`: fmax(low, fmin(v, high)), and cvt of NaN to E2M1
    LOW = 2  # the code of `low`: fmin(fmax(v, low), high)
    ZERO = 3
    UNDEFINED = 4  # a conversion that the source leaves undefined; infinities are bounded
    UNDEFINED_INFINITE = 5  # the same, and infinite quotients too: they are converted before they are bounded


class ZeroSign(IntEnum):
    """The sign bit of a float code of value zero."""

    SIGN_BIT = 0  # that of x
    NEGATIVE = 1  # set where x < 0: -0 gives +0, a small negative x gives -0
    PLUS = 2  # never set


class Choice(IntEnum):
    """Whether a block tries a second scale."""

    NONE = 0
    SQUARED_ERROR = 1  # scale and scale * `second`; the second is taken where its squared error is smaller


@dataclass(frozen=True, slots=True)
class Recipe:
    """One quantiser. Floats are binary32 bit patterns. `scale` None: scales are stored in the format of x.

    The value of a code is (code - code_offset - zero point) * scale * d, or / g for GlobalRule.ENCODE.
    """

    name: str
    source: str
    element: Format
    low: int  # bounds of the quotient (plus zero point)
    high: int
    scale: Format | None
    block_rows: int  # elements per scale; 0: the whole axis
    block_k: int
    static: int  # 1: the scale is given
    scale_ub: int  # 1: an upper bound of amax may be given
    statistic: Statistic
    include_zero: int  # 1: max >= 0 and min <= 0 are enforced
    nan_amax: NanAmax
    amax_floor: int
    divisor: int
    divisor_low: int
    scale_division: Division
    arithmetic: Width  # of steps 1 and 2
    scale_floor: int
    scale_cap: int
    zero_scale: ZeroScale
    scale_rounding: Rounding
    global_rule: GlobalRule
    global_range: int
    global_guard: GlobalGuard
    join: Join
    using: Using
    effective: Effective
    apply: Division
    quotient: Width
    zero_inverse: int  # what stands for 1 / s where s is zero; infinity: IEEE
    inverse_cap: int
    reciprocal_ulps: int  # of an approximate reciprocal, in units in the last place of the exact one
    flush: int  # 1: an approximate reciprocal treats subnormal operands and results as zero
    zero_point: ZeroPoint
    order: Order
    code_offset: int
    rounding: Rounding
    nan_code: NanCode
    zero_sign: ZeroSign
    choice: Choice
    second: int

    @property
    def exact(self) -> bool:
        """True where every step is an IEEE operation: one answer for each input."""
        return Division.APPROXIMATE not in (self.scale_division, self.apply)

    def scale_format(self, x_format: Format) -> Format:
        """Format of the stored scales for an input format."""
        return self.scale or x_format

    def __repr__(self) -> str:
        return self.name


CONSTANTS = tuple(f.name for f in fields(Recipe) if f.name not in ("name", "source", "element", "scale"))
"""Names of the integers of `constants`, in the order of the record's fields."""


def constants(recipe: Recipe) -> tuple[int, ...]:
    """What a kernel takes at compile time: plain ints in the order of `CONSTANTS`; the two formats are passed beside them."""
    return tuple(int(getattr(recipe, name)) for name in CONSTANTS)


@dataclass(frozen=True, slots=True)
class Quantised:
    """Codes of x [rows, K] with what is needed to read and to judge them.

    `codes` and `scales` are the answer of the recipe with every reciprocal correctly rounded. Where the recipe has one answer the
    interval fields are that answer. `global_scale` is a binary32 code in the recipe's own direction (see `global_rule`).
    """

    codes: Codes  # [rows, K], container of the element format
    scales: Codes  # [rows / block_rows, K / block_k], container of the scale format
    zero_points: Codes | None  # shape of `scales`, codes of the element format
    global_scale: Codes | None  # shape []
    scale_lo: Codes  # least and greatest admissible scale codes, same shape as `scales`
    scale_hi: Codes
    code_lo: Keys  # least and greatest admissible codes beside `scales`, as order keys of the element format, [rows, K]
    code_hi: Keys
    undefined: Mask  # [rows, K]: the source leaves this code undefined
    undefined_zero_points: Mask  # shape of `scales`
    other: Quantised | None  # recipes with a choice: the candidate that was not taken, block by block
    other_admissible: Mask  # shape of `scales`: that candidate (scale and codes together) is as good within the error of binary32


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """One block of the scalar definition; None where the source leaves the code undefined."""

    scale: int
    zero_point: int | None
    codes: tuple[int | None, ...]


def float_bits(value: float) -> int:
    """Binary32 pattern of the value nearest to `value`."""
    return int(np.float32(value).view(np.uint32))


def float_value(bits: int) -> float:
    """The value of a binary32 pattern."""
    return float(np.uint32(bits).view(np.float32))


_INF = 0x7F800000
_MAX_F32 = 0x7F7FFFFF

# --- the definition ---------------------------------------------------------------------------------------------------------


def _is_infinite(value: Value) -> bool:
    """Special members compare equal to small integers, so a Fraction must never be compared with one."""
    return value is Special.POS_INF or value is Special.NEG_INF


def _is_zero(value: Value) -> bool:
    return value is Special.NEG_ZERO or (isinstance(value, Fraction) and value == 0)


def _sign_magnitude(value: Value) -> tuple[bool, Fraction | None]:
    """Sign and magnitude of a number; None is infinity."""
    if isinstance(value, Special):
        return value is not Special.POS_INF, Fraction(0) if value is Special.NEG_ZERO else None
    return value < 0, abs(value)


def _signed(negative: bool, magnitude: Fraction | None) -> Value:
    if magnitude is None:
        return Special.NEG_INF if negative else Special.POS_INF
    if magnitude == 0 and negative:
        return Special.NEG_ZERO
    return -magnitude if negative else magnitude


def _times(a: Value, b: Value) -> Value:
    """Exact product with IEEE's rules for zeros, infinities and NaN."""
    if a is Special.NAN or b is Special.NAN:
        return Special.NAN
    (s, p), (t, q) = _sign_magnitude(a), _sign_magnitude(b)
    if (p is None and q == 0) or (q is None and p == 0):
        return Special.NAN
    return _signed(s != t, None if p is None or q is None else p * q)


def _over(a: Value, b: Value) -> Value:
    """Exact quotient with IEEE's rules for zeros, infinities and NaN."""
    if a is Special.NAN or b is Special.NAN:
        return Special.NAN
    (s, p), (t, q) = _sign_magnitude(a), _sign_magnitude(b)
    if (p is None and q is None) or (p == 0 and q == 0):
        return Special.NAN
    if q is None:
        return _signed(s != t, Fraction(0))
    return _signed(s != t, None if p is None or q == 0 else p / q)


def _plus(a: Value, b: Value) -> Value:
    """Exact sum; the sign of a zero sum is not followed (no recipe depends on it)."""
    for value, other in ((a, b), (b, a)):
        if value is Special.NAN or (value is Special.POS_INF and other is Special.NEG_INF):
            return Special.NAN
    for value in (a, b):
        if _is_infinite(value):
            return value
    return _real(a) + _real(b)


def _real(value: Value) -> Fraction:
    """A finite value as a Fraction."""
    return value if isinstance(value, Fraction) else Fraction(0)


def _negated(value: Value) -> Value:
    return Special.NAN if value is Special.NAN else _times(value, Fraction(-1))


def _magnitude(value: Value) -> Value:
    return Special.NAN if value is Special.NAN else _signed(False, _sign_magnitude(value)[1])


def _less(a: Value, b: Value) -> bool:
    """a < b; False where one is NaN."""
    if a is Special.NAN or b is Special.NAN:
        return False
    order = {Special.NEG_INF: -1, Special.POS_INF: 1, Special.NEG_ZERO: 0}
    ranks = [order[v] if isinstance(v, Special) else 0 for v in (a, b)]
    return ranks[0] < ranks[1] or (ranks == [0, 0] and _real(a) < _real(b))


def _largest(values: list[Value], rule: NanAmax) -> Value:
    numbers = [v for v in values if v is not Special.NAN]
    if rule is NanAmax.PROPAGATED and len(numbers) < len(values):
        return Special.NAN
    top: Value = numbers[0] if numbers else Fraction(0)
    for value in numbers:
        top = value if _less(top, value) else top
    return top


def _at_least(value: Value, bits: int) -> Value:
    bound = decode_scalar(bits, F32)
    return bound if _less(value, bound) else value


def _at_most(value: Value, bits: int) -> Value:
    bound = decode_scalar(bits, F32)
    return bound if _less(bound, value) else value


def _rounded(value: Value, fmt: Format) -> Value:
    """One IEEE operation: the exact result to nearest even, overflow to infinity."""
    return decode_scalar(encode_scalar(value, fmt, Rounding.RNE, Overflow.SPECIAL), fmt)


def _reciprocal_scalar(value: Value, method: Division, recipe: Recipe, nudge: int) -> Value:
    """1 / value; an approximate one `nudge` units in the last place away from the correctly rounded one."""
    if method is not Division.APPROXIMATE:
        return _rounded(_over(Fraction(1), value), F32)
    tiny = Fraction(1, 2**126)
    if recipe.flush and _less(_magnitude(value), tiny) and value is not Special.NAN:
        value = _signed(_sign_magnitude(value)[0], Fraction(0))
    result = _rounded(_over(Fraction(1), value), F32)
    if isinstance(result, Fraction) and result:
        step = nudge if result > 0 else -nudge
        result = decode_scalar(encode_scalar(result, F32) + step, F32)
    if recipe.flush and _less(_magnitude(result), tiny) and result is not Special.NAN:
        result = _signed(_sign_magnitude(result)[0], Fraction(0))
    return result


def _divide_scalar(a: Value, b: Value, method: Division, recipe: Recipe, fmt: Format, nudge: int) -> Value:
    if method in (Division.DIVIDE, Division.INVERSE):
        return _rounded(_over(a, b), fmt)
    return _rounded(_times(a, _reciprocal_scalar(b, method, recipe, nudge)), fmt)


def _unrounded_scalar(
    values: list[Value], x_format: Format, recipe: Recipe, global_scale: Value, scale_ub: Value | None, nudge: int
) -> tuple[Value, Value, Value]:
    """Scale before its guard and rounding, the statistic's minimum, and the INVERSE rule's multiplier."""
    fmt = x_format if recipe.arithmetic is Width.INPUT else F32
    divisor, divisor_low = decode_scalar(recipe.divisor, F32), decode_scalar(recipe.divisor_low, F32)
    zero: list[Value] = [Fraction(0)] if recipe.include_zero else []
    top = _largest(values + zero, recipe.nan_amax)
    bottom = _negated(_largest([_negated(v) for v in values + zero], recipe.nan_amax))
    if recipe.statistic is Statistic.SIGNED_PAIR:
        high = _magnitude(_divide_scalar(top, divisor, recipe.scale_division, recipe, fmt, nudge))
        low = _magnitude(_divide_scalar(bottom, divisor_low, recipe.scale_division, recipe, fmt, nudge))
        return _largest([high, low], NanAmax.PROPAGATED), bottom, Special.NAN
    amax = _largest([_magnitude(v) for v in values], recipe.nan_amax)
    if recipe.statistic is Statistic.RANGE:
        amax = _rounded(_plus(top, _negated(bottom)), fmt)
    amax = amax if scale_ub is None or not _less(scale_ub, amax) else scale_ub
    floor = _rounded(decode_scalar(recipe.amax_floor, F32), fmt)
    amax = floor if _less(amax, floor) else amax
    method = recipe.scale_division
    if method is Division.INVERSE:
        multiplier = _rounded(_over(divisor, amax), fmt)
        return _rounded(_over(Fraction(1), multiplier), fmt), bottom, multiplier
    if recipe.join is Join.TIMES_CONSTANT:
        scale = _rounded(_times(amax, _divide_scalar(global_scale, divisor, method, recipe, fmt, nudge)), fmt)
    elif recipe.join is Join.OVER_PRODUCT:
        scale = _rounded(_over(amax, _rounded(_times(divisor, global_scale), fmt)), fmt)
    else:
        scale = _divide_scalar(amax, divisor, method, recipe, fmt, nudge)
        if recipe.join is Join.TIMES_QUOTIENT:
            scale = _rounded(_times(global_scale, scale), fmt)
        elif recipe.join is Join.OVER_QUOTIENT:
            scale = _rounded(_over(scale, global_scale), fmt)
    return scale, bottom, Special.NAN


def _stored_scalar(scale: Value, x_format: Format, recipe: Recipe) -> tuple[Value, int]:
    """Guarded, floored and capped scale, and its code."""
    fmt = recipe.scale_format(x_format)
    if not recipe.static:
        scale = Fraction(1) if recipe.zero_scale is ZeroScale.ONE and _is_zero(scale) else scale
        scale = _at_most(_at_least(scale, recipe.scale_floor), recipe.scale_cap)
    code = encode_scalar(scale, fmt, recipe.scale_rounding, Overflow.SPECIAL if fmt.has_inf else Overflow.SATFINITE)
    if recipe.zero_scale is ZeroScale.EPSILON and _is_zero(decode_scalar(code, fmt)):
        code = encode_scalar(Fraction(1, 2**fmt.mantissa_bits), fmt)
    return scale, code


def _quotient_scalar(
    x: Value, scale: Value, multiplier: Value, x_format: Format, recipe: Recipe, global_scale: Value, nudge: int
) -> Value:
    fmt = x_format if recipe.quotient is Width.INPUT else F32
    if recipe.scale_division is Division.INVERSE:
        return _rounded(_times(x, multiplier), fmt)
    if _is_zero(scale):
        return _rounded(_times(x, decode_scalar(recipe.zero_inverse, F32)), fmt)
    if recipe.effective is Effective.RECIPROCAL_OVER:
        inverse = _rounded(_over(_rounded(_over(Fraction(1), global_scale), F32), scale), F32)
        return _rounded(_times(x, _at_most(inverse, recipe.inverse_cap)), fmt)
    if recipe.effective is Effective.OVER_GLOBAL:
        scale = _rounded(_over(scale, global_scale), F32)
    elif recipe.effective is Effective.TIMES_GLOBAL:
        scale = _rounded(_times(scale, global_scale), F32)
    elif recipe.effective is Effective.TIMES_RECIPROCAL:
        scale = _rounded(_times(scale, _reciprocal_scalar(global_scale, recipe.apply, recipe, nudge)), F32)
    if recipe.apply is Division.DIVIDE:
        return _rounded(_over(x, scale), fmt)
    inverse = _at_most(_reciprocal_scalar(scale, recipe.apply, recipe, nudge), recipe.inverse_cap)
    return _rounded(_times(x, inverse), fmt)


def _zero_point_scalar(bottom: Value, scale: Value, x_format: Format, recipe: Recipe) -> Value:
    """The zero point as an integer; NaN where the source leaves it undefined."""
    fmt = x_format if recipe.quotient is Width.INPUT else F32
    ratio = _rounded(_over(bottom, scale), fmt)
    if recipe.zero_point is ZeroPoint.SHIFTED:
        ratio = _rounded(_plus(decode_scalar(recipe.low, F32), _negated(ratio)), fmt)
    elif ratio is not Special.NAN:
        ratio = _magnitude(ratio)
    bounded = _at_most(_at_least(ratio, recipe.low), recipe.high)
    return bounded if isinstance(bounded, Special) else _whole(bounded, Rounding.RNE)


def _whole(value: Fraction, rounding: Rounding) -> Fraction:
    """`value` rounded to an integer of at most 32 bits."""
    return _real(decode_scalar(encode_scalar(value, INT32, rounding), INT32))


def _code_scalar(x: Value, quotient: Value, zero_point: Value, x_format: Format, recipe: Recipe) -> int | None:
    undefined_inf = recipe.nan_code is NanCode.UNDEFINED_INFINITE
    if zero_point is Special.NAN or (undefined_inf and _is_infinite(quotient)):
        return None
    fmt, is_integer = recipe.element, recipe.element.kind is not Kind.FLOAT
    low, high = decode_scalar(recipe.low, F32), decode_scalar(recipe.high, F32)
    if quotient is Special.NAN:
        rule: dict[NanCode, Value] = {NanCode.HIGH: high, NanCode.LOW: low, NanCode.ZERO: Fraction(0)}
        if recipe.nan_code is NanCode.NAN:
            return fmt.nan_code
        if recipe.nan_code not in rule:
            return None
        return encode_scalar(_plus(rule[recipe.nan_code], Fraction(recipe.code_offset if is_integer else 0)), fmt)
    if not is_integer:
        bounded = _at_most(_at_least(quotient, recipe.low), recipe.high)
        code = encode_scalar(bounded, fmt, recipe.rounding)
        zero = code & ~fmt.sign_bit == 0
        clear = recipe.zero_sign is ZeroSign.PLUS or (recipe.zero_sign is ZeroSign.NEGATIVE and not _less(x, Fraction(0)))
        return 0 if zero and clear else code
    width = x_format if recipe.quotient is Width.INPUT else F32
    if recipe.order is Order.CLAMP_FIRST:
        quotient = _at_most(_at_least(_rounded(_plus(quotient, zero_point), width), recipe.low), recipe.high)
        integer = _whole(_real(quotient), recipe.rounding)
    else:
        reach = _at_most(_at_least(quotient, float_bits(-(2.0**20))), float_bits(2.0**20))
        integer = min(max(_whole(_real(reach), recipe.rounding) + _real(zero_point), _real(low)), _real(high))
    return encode_scalar(integer + recipe.code_offset, fmt)


def quantise_block_scalar(
    values: list[Value],
    x_format: Format,
    recipe: Recipe,
    *,
    static_scale: Value | None = None,
    scale_ub: Value | None = None,
    global_scale: Value = Fraction(1),
    nudge: int = 0,
) -> BlockCodes:
    """The definition: scale, zero point and codes of one block of exact values of `x_format`.

    `global_scale` is a binary32 value in the recipe's own direction. `nudge` moves every approximate reciprocal by that many
    units in the last place from the correctly rounded one.
    """
    if recipe.choice is Choice.SQUARED_ERROR:
        return _chosen_scalar(values, x_format, recipe, global_scale)
    bottom: Value = Fraction(0)
    multiplier: Value = Special.NAN
    if static_scale is not None:
        unrounded = static_scale
    else:
        unrounded, bottom, multiplier = _unrounded_scalar(values, x_format, recipe, global_scale, scale_ub, nudge)
    scale, code = _stored_scalar(unrounded, x_format, recipe)
    if recipe.using is Using.STORED:
        scale = decode_scalar(code, recipe.scale_format(x_format))
    zero_point: Value = Fraction(0)
    if recipe.zero_point is not ZeroPoint.NONE:
        zero_point = _zero_point_scalar(bottom, unrounded, x_format, recipe)
    codes = tuple(
        _code_scalar(
            x, _quotient_scalar(x, scale, multiplier, x_format, recipe, global_scale, nudge), zero_point, x_format, recipe
        )
        for x in values
    )
    if recipe.zero_point is ZeroPoint.NONE or zero_point is Special.NAN:
        return BlockCodes(code, None, codes)
    return BlockCodes(code, encode_scalar(zero_point, recipe.element), codes)


def _chosen_scalar(values: list[Value], x_format: Format, recipe: Recipe, global_scale: Value) -> BlockCodes:
    """The better of two scales by exact squared error; the first where they are equal or a value is not finite."""
    unrounded, _, _ = _unrounded_scalar(values, x_format, recipe, global_scale, None, 0)
    second = _rounded(_times(unrounded, decode_scalar(recipe.second, F32)), F32)
    plain = replace(recipe, choice=Choice.NONE, static=1)
    candidates = [
        quantise_block_scalar(values, x_format, plain, static_scale=s, global_scale=global_scale) for s in (unrounded, second)
    ]
    errors = [_squared_error(values, c, recipe, global_scale) for c in candidates]
    take_second = errors[0] is not None and errors[1] is not None and errors[1] < errors[0]
    return candidates[1 if take_second else 0]


def _squared_error(values: list[Value], block: BlockCodes, recipe: Recipe, global_scale: Value) -> Fraction | None:
    """Exact sum of squares of x - code * s / g; None where something is not finite."""
    scale = decode_scalar(block.scale, recipe.scale_format(F32))
    if not isinstance(global_scale, Fraction) or not isinstance(scale, Fraction):
        return None
    total = Fraction(0)
    for x, code in zip(values, block.codes, strict=True):
        if code is None or x is Special.NAN or _is_infinite(x):
            return None
        total += (_real(x) - _real(decode_scalar(code, recipe.element)) * scale / global_scale) ** 2
    return total


# --- the array twin ---------------------------------------------------------------------------------------------------------
# A span is the least and the greatest value that a step can have. Where nothing is approximate both are the same array, and each
# step is then computed once. float64 holds every binary32 product exactly, and a binary32 quotient rounded to float64 and then
# to binary32 is rounded as once: 53 >= 2 * 24 + 2 significand bits.

Span = tuple[Reals, Reals]


def _round_span(span: Span, fmt: Format) -> Span:
    lo = round_to(span[0], fmt)
    return (lo, lo) if span[0] is span[1] else (lo, round_to(span[1], fmt))


def _combine(a: Span, b: Span, product: bool) -> Span:
    """a * b or a / b, unrounded. NaN at the lower end only: some values of the spans give NaN, others do not."""

    def apply(p: Reals, q: Reals) -> Reals:
        with np.errstate(all="ignore"):
            return np.asarray(p * q if product else p / q)

    first = apply(a[0], b[0])
    if a[0] is a[1] and b[0] is b[1]:
        return first, first
    corners = [first, apply(a[0], b[1]), apply(a[1], b[0]), apply(a[1], b[1])]
    return np.minimum.reduce(corners), np.fmax.reduce(corners)


def _reciprocal(span: Span, method: Division, recipe: Recipe, ulps: int) -> Span:
    """1 / value for each end, widened by the error of an approximate reciprocal."""
    if method is not Division.APPROXIMATE:
        return _round_span(_combine(_both(1.0), span, False), F32)
    ends = []
    for value in span[:1] if span[0] is span[1] else span:
        if recipe.flush:
            value = np.where(np.abs(value) < 2.0**-126, np.copysign(0.0, value), value)
        with np.errstate(all="ignore"):
            exact = np.asarray(1.0 / value)
        ends.append(_reachable(exact, ulps))
    lo, hi = np.minimum(ends[0][0], ends[-1][0]), np.maximum(ends[0][1], ends[-1][1])
    if recipe.flush:
        lo, hi = (np.where(np.abs(v) < 2.0**-126, np.copysign(0.0, v), v) for v in (lo, hi))
    return (lo, hi) if ulps or span[0] is not span[1] else (lo, lo)


def _reachable(exact: Reals, ulps: int) -> Span:
    """Least and greatest binary32 value within `ulps` units in the last place of each exact value; 0: the nearest."""
    nearest = round_to(exact, F32)
    if not ulps:
        return nearest, nearest
    finite = np.isfinite(exact) & (exact != 0)
    exponent = np.maximum(np.frexp(np.where(finite, exact, 1.0))[1] - 1, -126)
    reach = np.ldexp(float(ulps), exponent - 23)
    lo = round_to(exact - reach, F32, Rounding.CEIL)
    hi = round_to(exact + reach, F32, Rounding.FLOOR)
    return np.where(finite, lo, nearest), np.where(finite, hi, nearest)


def _divide(a: Span, b: Span, method: Division, recipe: Recipe, fmt: Format, ulps: int) -> Span:
    if method in (Division.DIVIDE, Division.INVERSE):
        return _round_span(_combine(a, b, False), fmt)
    return _round_span(_combine(a, _reciprocal(b, method, recipe, ulps), True), fmt)


def _both(value: float | Reals) -> Span:
    array = np.asarray(value, dtype=np.float64)
    return array, array


def _map(span: Span, function: Any) -> Span:
    lo = np.asarray(function(span[0]))
    return (lo, lo) if span[0] is span[1] else (lo, np.asarray(function(span[1])))


def _blocks(x: Reals, shape: tuple[int, int]) -> Reals:
    """View of [rows, K] as [row blocks, rows of a block, K blocks, K of a block]."""
    return x.reshape(shape[0], x.shape[0] // max(shape[0], 1), shape[1], x.shape[1] // max(shape[1], 1))


def _spread(v: npt.NDArray[Any], x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values of a scale matrix at the elements of x [rows, K]."""
    return np.repeat(np.repeat(v, x.shape[0] // max(v.shape[0], 1), axis=0), x.shape[1] // max(v.shape[1], 1), axis=1)


def _extreme(x: Reals, shape: tuple[int, int], rule: NanAmax, initial: float) -> Reals:
    """Largest value of each block, not below `initial`."""
    ufunc = np.fmax if rule is NanAmax.IGNORED else np.maximum
    blocks = _blocks(x, shape)
    return np.asarray(ufunc.reduce(ufunc.reduce(blocks, axis=3, initial=initial), axis=1, initial=initial))


def _magnitudes(x: Span) -> Span:
    lo, hi = np.abs(x[0]), np.abs(x[1])
    return (lo, lo) if x[0] is x[1] else (np.minimum(lo, hi), np.maximum(lo, hi))


@dataclass(frozen=True, slots=True)
class _Scales:
    """Step 2 for all blocks."""

    raw: Span  # before guard, floor, cap and rounding
    guarded: Span
    codes: tuple[Codes, Codes]
    bottom: Reals  # least value of each block
    multiplier: Span  # INVERSE only


def _unrounded(
    x: Span, x_format: Format, recipe: Recipe, shape: tuple[int, int], g: Span, scale_ub: float | None, ulps: int
) -> tuple[Span, Reals, Span]:
    fmt = x_format if recipe.arithmetic is Width.INPUT else F32
    divisor, rule, method = _both(float_value(recipe.divisor)), recipe.nan_amax, recipe.scale_division
    start = 0.0 if recipe.include_zero else -np.inf
    bottom = np.asarray(-_extreme(-x[0], shape, rule, start))
    nothing = _both(np.nan)
    if recipe.statistic is not Statistic.ABSMAX:
        top = _extreme(x[0], shape, rule, start)
    if recipe.statistic is Statistic.SIGNED_PAIR:
        high = _divide(_both(top), divisor, method, recipe, fmt, ulps)[0]
        low = _divide(_both(bottom), _both(float_value(recipe.divisor_low)), method, recipe, fmt, ulps)[0]
        return _both(np.maximum(np.abs(high), np.abs(low))), bottom, nothing
    if recipe.statistic is Statistic.RANGE:
        amax = _both(round_to(sum_odd(top, -bottom), fmt))
    else:
        amax = _map(_magnitudes(x), lambda v: _extreme(v, shape, rule, 0.0))
    if scale_ub is not None:
        amax = _map(amax, lambda v: np.minimum(v, scale_ub))
    floor = round_to(np.asarray(float_value(recipe.amax_floor)), fmt)
    amax = _map(amax, lambda v: np.maximum(v, floor))
    if method is Division.INVERSE:
        multiplier = _round_span(_combine(divisor, amax, False), fmt)
        return _round_span(_combine(_both(1.0), multiplier, False), fmt), bottom, multiplier
    if recipe.join is Join.TIMES_CONSTANT:
        return _round_span(_combine(amax, _divide(g, divisor, method, recipe, fmt, ulps), True), fmt), bottom, nothing
    if recipe.join is Join.OVER_PRODUCT:
        return _round_span(_combine(amax, _round_span(_combine(divisor, g, True), fmt), False), fmt), bottom, nothing
    scale = _divide(amax, divisor, method, recipe, fmt, ulps)
    if recipe.join is not Join.NONE:
        scale = _round_span(_combine(scale, g, recipe.join is Join.TIMES_QUOTIENT), fmt)
    return scale, bottom, nothing


def _store(raw: Span, x_format: Format, recipe: Recipe) -> tuple[Span, tuple[Codes, Codes]]:
    """Guarded scales and their codes."""
    fmt = recipe.scale_format(x_format)
    overflow = Overflow.SPECIAL if fmt.has_inf else Overflow.SATFINITE

    def guard(v: Reals) -> Reals:
        v = np.where(v == 0, 1.0, v) if recipe.zero_scale is ZeroScale.ONE else v
        return np.asarray(np.minimum(np.maximum(v, float_value(recipe.scale_floor)), float_value(recipe.scale_cap)))

    def code(v: Reals) -> Codes:
        codes = encode(v, fmt, recipe.scale_rounding, overflow)
        if recipe.zero_scale is ZeroScale.EPSILON:
            codes[decode(codes, fmt) == 0] = encode(np.array([2.0**-fmt.mantissa_bits]), fmt)[0]
        return codes

    guarded = raw if recipe.static else _map(raw, guard)
    first = code(guarded[0])
    return guarded, (first, first if guarded[0] is guarded[1] else code(guarded[1]))


def _quotients(
    x: Span, scale: Span, multiplier: Span, x_format: Format, recipe: Recipe, g: Span, ulps: int
) -> Span:
    """Step 3. `scale` is the one in use, as a matrix of scales; results have the shape of x."""
    fmt = x_format if recipe.quotient is Width.INPUT else F32

    def spread(span: Span) -> Span:
        return _map(span, lambda v: _spread(v, x[0]))

    if recipe.scale_division is Division.INVERSE:
        return _round_span(_combine(x, spread(multiplier), True), fmt)
    is_zero = _map(scale, lambda v: _spread(v == 0, x[0]))
    divisor = scale
    if recipe.effective is Effective.OVER_GLOBAL:
        divisor = _round_span(_combine(scale, g, False), F32)
    elif recipe.effective is Effective.TIMES_GLOBAL:
        divisor = _round_span(_combine(scale, g, True), F32)
    elif recipe.effective is Effective.TIMES_RECIPROCAL:
        divisor = _round_span(_combine(scale, _reciprocal(g, recipe.apply, recipe, ulps), True), F32)
    if recipe.apply is Division.DIVIDE and recipe.effective is not Effective.RECIPROCAL_OVER:
        quotient = _round_span(_combine(x, spread(divisor), False), fmt)
    else:
        if recipe.effective is Effective.RECIPROCAL_OVER:
            inverse = _round_span(_combine(_round_span(_combine(_both(1.0), g, False), F32), scale, False), F32)
        else:
            inverse = _reciprocal(divisor, recipe.apply, recipe, ulps)
        inverse = _map(inverse, lambda v: np.minimum(v, float_value(recipe.inverse_cap)))
        quotient = _round_span(_combine(x, spread(inverse), True), fmt)
    at_zero = _round_span(_combine(x, _both(float_value(recipe.zero_inverse)), True), fmt)
    # A span of scales that begins at zero reaches both rules.
    lo = np.where(is_zero[0], np.where(is_zero[1], at_zero[0], np.minimum(at_zero[0], quotient[0])), quotient[0])
    if quotient[0] is quotient[1] and is_zero[0] is is_zero[1]:
        return lo, lo
    return lo, np.where(is_zero[0], np.where(is_zero[1], at_zero[1], np.fmax(at_zero[1], quotient[1])), quotient[1])


def _zero_points(bottom: Reals, raw: Reals, x_format: Format, recipe: Recipe) -> Reals:
    """Zero points of all blocks as integers, NaN where undefined."""
    fmt = x_format if recipe.quotient is Width.INPUT else F32
    with np.errstate(all="ignore"):
        ratio = round_to(bottom / raw, fmt)
    low, high = float_value(recipe.low), float_value(recipe.high)
    shifted = recipe.zero_point is ZeroPoint.SHIFTED
    ratio = round_to(sum_odd(np.full(ratio.shape, low), -ratio), fmt) if shifted else np.abs(ratio)
    return np.asarray(np.rint(np.minimum(np.maximum(ratio, low), high)))


def _codes(x: Reals, quotient: Reals, zero: Reals, x_format: Format, recipe: Recipe) -> tuple[Codes, Mask]:
    """Step 4 for one end of the span: codes, and where the source leaves them undefined (code 0 there)."""
    fmt, low, high = recipe.element, float_value(recipe.low), float_value(recipe.high)
    nan = np.isnan(quotient)
    number = np.where(nan, 0.0, quotient)
    if fmt.kind is Kind.FLOAT:
        codes = encode(np.clip(number, low, high), fmt, recipe.rounding)
        if recipe.zero_sign is not ZeroSign.SIGN_BIT:
            clear = (codes & ~container(fmt).type(fmt.sign_bit)) == 0
            codes[clear if recipe.zero_sign is ZeroSign.PLUS else clear & ~(x < 0)] = 0
    else:
        zero_point = np.where(np.isnan(zero), 0.0, zero)
        if recipe.order is Order.CLAMP_FIRST:
            total = round_to(sum_odd(number, zero_point), x_format if recipe.quotient is Width.INPUT else F32)
            integer = decode(encode(np.clip(total, low, high), INT32, recipe.rounding), INT32)
        else:
            whole = decode(encode(np.clip(number, -(2.0**20), 2.0**20), INT32, recipe.rounding), INT32)
            integer = np.clip(whole + zero_point, low, high)
        codes = encode(integer + recipe.code_offset, fmt)
    undefined = np.isnan(zero) if recipe.zero_point is not ZeroPoint.NONE else np.zeros(nan.shape, dtype=np.bool_)
    offset = recipe.code_offset if fmt.kind is not Kind.FLOAT else 0
    if recipe.nan_code is NanCode.NAN:
        codes[nan] = fmt.nan_code
    elif recipe.nan_code in (NanCode.HIGH, NanCode.LOW, NanCode.ZERO):
        value = {NanCode.HIGH: high, NanCode.LOW: low, NanCode.ZERO: 0.0}[recipe.nan_code] + offset
        codes[nan] = encode(np.array([value]), fmt)[0]
    else:
        undefined = undefined | nan
        if recipe.nan_code is NanCode.UNDEFINED_INFINITE:
            undefined = undefined | np.isinf(quotient)
    codes[undefined] = 0
    return codes, undefined


def global_scale_of(x: Reals, recipe: Recipe) -> Codes:
    """Global scale of x [rows, K] by the recipe's rule: a binary32 code, shape [], in the recipe's own direction.

    Raises ValueError where the recipe has none.
    """
    if recipe.global_rule is GlobalRule.NONE:
        raise ValueError(f"{recipe.name}: got a request for a global scale, expected a recipe that has one")
    amax = _extreme(np.abs(x), (1, 1), recipe.nan_amax, 0.0)[0, 0]
    span = np.float64(float_value(recipe.global_range))
    with np.errstate(all="ignore"):
        result = round_to(span / amax if recipe.global_rule is GlobalRule.ENCODE else amax / span, F32)
    if recipe.global_guard is GlobalGuard.FINITE and not np.isfinite(result):
        result = np.asarray(1.0)
    if recipe.global_guard is GlobalGuard.NONZERO:
        result = np.asarray(1.0 if amax == 0 else np.minimum(result, float_value(_MAX_F32)))
    return encode(result, F32, Rounding.RNE, Overflow.SPECIAL)


def _checked(x: Reals, x_format: Format, recipe: Recipe) -> Reals:
    x = np.asarray(x, dtype=np.float64)
    if x_format not in (F16, BF16, F32):
        raise ValueError(f"{recipe.name}: got input format {x_format.name}, expected f16, bf16 or f32")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{recipe.name}: got x of shape {x.shape}, expected [rows, K] with K > 0")
    rounded = round_to(x, x_format)
    wrong = ~((rounded == x) | (np.isnan(rounded) & np.isnan(x)))
    if wrong.any():
        raise ValueError(f"{recipe.name}: got {x[wrong].flat[0]}, expected values of {x_format.name}; round x to it first")
    return x


def _shape(x: Reals, recipe: Recipe, static_scale: Reals | None) -> tuple[int, int]:
    """Shape of the scale matrix."""
    rows, k = x.shape
    if recipe.static != (static_scale is not None):
        raise ValueError(f"{recipe.name}: static_scale must be given for static recipes and for no other")
    if static_scale is not None:
        if static_scale.ndim != 2 or any(s == 0 or n % s for s, n in zip(static_scale.shape, x.shape, strict=True) if n):
            raise ValueError(
                f"{recipe.name}: got static_scale of shape {static_scale.shape}, expected two extents that divide {x.shape}"
            )
        return static_scale.shape[0], static_scale.shape[1]
    block_rows, block_k = recipe.block_rows, recipe.block_k
    if (block_rows and rows % block_rows) or (block_k and k % block_k):
        raise ValueError(f"{recipe.name}: got x of shape {x.shape}, expected multiples of the block {(block_rows, block_k)}")
    return rows // block_rows if block_rows else 1, k // block_k if block_k else 1


def _global(x: Reals, recipe: Recipe, global_scale: float | None) -> Codes | None:
    if recipe.global_rule is GlobalRule.NONE:
        if global_scale is not None:
            raise ValueError(f"{recipe.name}: got a global scale, expected none; the recipe has one level of scales")
        return None
    if global_scale is None:
        return global_scale_of(x, recipe)
    _check_binary32(np.asarray(global_scale, dtype=np.float64), "global_scale", recipe)
    return encode(np.asarray(global_scale, dtype=np.float64), F32, Rounding.RNE, Overflow.SPECIAL)


def _check_binary32(value: Reals, name: str, recipe: Recipe) -> None:
    if not np.array_equal(round_to(value, F32), value, equal_nan=True):
        raise ValueError(f"{recipe.name}: got {name} that is not a binary32 value, expected one; round it first")


def _scales(
    x: Span, x_format: Format, recipe: Recipe, static_scale: Reals | None, scale_ub: float | None, g: Span, ulps: int,
    expansion: int,
) -> _Scales:
    shape = _shape(x[0], recipe, static_scale)
    if static_scale is not None:
        _check_binary32(static_scale, "static_scale", recipe)
        span = _both(static_scale)
        return _Scales(span, *_store(span, x_format, recipe), np.zeros(shape), _both(np.nan))
    raw, bottom, multiplier = _unrounded(x, x_format, recipe, shape, g, scale_ub, ulps)
    if expansion:
        raw = _round_span(_combine(raw, _both(float_value(expansion)), True), F32)
    return _Scales(raw, *_store(raw, x_format, recipe), bottom, multiplier)


def _one(
    x: Reals, span: Span, x_format: Format, recipe: Recipe, static_scale: Reals | None, scale_ub: float | None,
    global_scale: Codes | None, expansion: int,
) -> Quantised:
    """All steps with the nominal reciprocals, then with their spans."""
    fmt = recipe.scale_format(x_format)
    g = _both(np.nan if global_scale is None else decode(global_scale, F32))
    nominal = _both(x)
    s = _scales(nominal, x_format, recipe, static_scale, scale_ub, g, 0, expansion)
    used = _both(decode(s.codes[0], fmt)) if recipe.using is Using.STORED else s.guarded
    zero = np.zeros(s.raw[0].shape)
    if recipe.zero_point is not ZeroPoint.NONE:
        zero = _zero_points(s.bottom, s.raw[0], x_format, recipe)
    quotient = _quotients(nominal, used, s.multiplier, x_format, recipe, g, 0)
    codes, undefined = _codes(x, quotient[0], _spread(zero, x), x_format, recipe)
    key = order_key(codes, recipe.element)
    points = None
    if recipe.zero_point is not ZeroPoint.NONE:
        points = encode(np.where(np.isnan(zero), 0.0, zero), recipe.element)
    result = Quantised(
        codes, s.codes[0], points, global_scale, s.codes[0], s.codes[0], key, key, undefined, np.isnan(zero), None,
        np.zeros(zero.shape, dtype=np.bool_),
    )
    if recipe.exact and span[0] is span[1]:
        return result
    wide = _scales(span, x_format, recipe, static_scale, scale_ub, g, recipe.reciprocal_ulps, expansion)
    lo, hi, undefined = _admissible(span, x_format, recipe, wide, s.codes[0], g)
    return replace(result, scale_lo=wide.codes[0], scale_hi=wide.codes[1], code_lo=lo, code_hi=hi, undefined=undefined)


def _admissible(
    x: Span, x_format: Format, recipe: Recipe, wide: _Scales, scales: Codes, g: Span
) -> tuple[Keys, Keys, Mask]:
    used = _both(decode(scales, recipe.scale_format(x_format))) if recipe.using is Using.STORED else wide.guarded
    quotient = _quotients(x, used, wide.multiplier, x_format, recipe, g, recipe.reciprocal_ulps)
    zero = np.zeros(x[0].shape)
    ends = [_codes(x[0], q, zero, x_format, recipe) for q in quotient]
    keys = [order_key(codes, recipe.element) for codes, _ in ends]
    mixed = np.isnan(quotient[0]) != np.isnan(quotient[1])
    return np.minimum(*keys), np.maximum(*keys), ends[0][1] | ends[1][1] | mixed


def quantise(
    x: Reals,
    x_format: Format,
    recipe: Recipe,
    *,
    bounds: tuple[Reals, Reals] | None = None,
    static_scale: Reals | None = None,
    scale_ub: float | None = None,
    global_scale: float | None = None,
) -> Quantised:
    """Scales and codes of x [rows, K], exact values of `x_format` in float64; array twin of `quantise_block_scalar`.

    `bounds` (two matrices of the shape of x): the input is known only to lie between them, as after an approximate smoothing;
    x is then its nominal value, and the admissible scales and codes are those of matrices in between (an element and the scale of
    its block are bounded one by one, so the set is not smaller than what is reachable). `static_scale` [a, b] in binary32 values,
    for static recipes: each covers rows / a by K / b elements. `scale_ub` bounds amax (recipes with `scale_ub`). `global_scale`
    is a binary32 value in the recipe's own direction; without it the recipe's own rule is used on x.
    Raises ValueError for shapes that the blocks do not divide, values outside their format, and arguments a recipe does not take.
    """
    x, span = _inputs(x, bounds, x_format, recipe, scale_ub)
    g = _global(x, recipe, global_scale)
    first = _one(x, span, x_format, recipe, static_scale, scale_ub, g, 0)
    if recipe.choice is Choice.NONE:
        return first
    second = _one(x, span, x_format, recipe, static_scale, scale_ub, g, recipe.second)
    return _choose(x, first, second, recipe)


def admissible_codes(
    x: Reals,
    x_format: Format,
    recipe: Recipe,
    scales: Codes,
    *,
    bounds: tuple[Reals, Reals] | None = None,
    static_scale: Reals | None = None,
    scale_ub: float | None = None,
    global_scale: float | None = None,
) -> tuple[Keys, Keys, Mask]:
    """Least and greatest admissible codes (order keys, [rows, K]) beside a backend's own `scales`, and where any code is free.

    Judge the scales first, by `quantise(...).scale_lo` and `scale_hi`: codes mean nothing beside a scale that is not admissible.
    Recipes that divide by the unrounded scale give the same interval for any `scales`. Raises ValueError as `quantise` does,
    for scales of another shape, for recipes with zero points, and for recipes with a choice (judge those by `other`).
    """
    x, span = _inputs(x, bounds, x_format, recipe, scale_ub)
    if recipe.choice is not Choice.NONE or recipe.zero_point is not ZeroPoint.NONE:
        raise ValueError(f"{recipe.name}: got a recipe with a choice or zero points, expected neither; compare with quantise")
    code = _global(x, recipe, global_scale)
    g = _both(np.nan if code is None else decode(code, F32))
    wide = _scales(span, x_format, recipe, static_scale, scale_ub, g, recipe.reciprocal_ulps, 0)
    if scales.shape != wide.codes[0].shape:
        raise ValueError(f"{recipe.name}: got scales of shape {scales.shape}, expected {wide.codes[0].shape}")
    return _admissible(span, x_format, recipe, wide, scales, g)


def _inputs(
    x: Reals, bounds: tuple[Reals, Reals] | None, x_format: Format, recipe: Recipe, scale_ub: float | None
) -> tuple[Reals, Span]:
    if scale_ub is not None and not recipe.scale_ub:
        raise ValueError(f"{recipe.name}: got scale_ub, expected none; this recipe has no upper bound of amax")
    x = _checked(x, x_format, recipe)
    if bounds is None:
        return x, (x, x)
    if recipe.statistic is not Statistic.ABSMAX or recipe.choice is not Choice.NONE:
        raise ValueError(f"{recipe.name}: got bounds of x, expected none; only recipes on amax without a choice take them")
    lo, hi = (_checked(bound, x_format, recipe) for bound in bounds)
    if lo.shape != x.shape or hi.shape != x.shape or (lo > x).any() or (x > hi).any():
        raise ValueError(f"{recipe.name}: got bounds {lo.shape} and {hi.shape}, expected matrices around x {x.shape}")
    return x, (lo, hi)


def _choose(x: Reals, first: Quantised, second: Quantised, recipe: Recipe) -> Quantised:
    """Block by block the candidate of smaller squared error, the first where equal; the other one beside it."""
    shape = first.scales.shape
    assert first.global_scale is not None
    g = float(decode(first.global_scale, F32))
    fmt = recipe.scale_format(F32)
    errors, bands, values = [], [], []
    for candidate in (first, second):
        with np.errstate(all="ignore"):
            unscaled = decode(candidate.codes, recipe.element) * _spread(decode(candidate.scales, fmt), x)
            value = unscaled / g
            e = value - x
            # In binary32 (u = 2^-24) a value takes at most four roundings, the difference one, the square one, the sum of a
            # block of n one per term in any order; second-order terms are covered by rounding 4 up to 5 and adding 2 to n.
            u, n = 2.0**-24, recipe.block_k
            band = 2 * np.abs(e) * u * (5 * np.abs(value) + np.abs(e)) + 32 * (u * value) ** 2 + (n + 2) * u * e * e
            total = [_blocks(v, shape).sum(axis=(1, 3)) for v in (e * e, band)]
        errors.append(total[0])
        bands.append(total[1])
        values.append(unscaled)
    same = (_blocks(values[0], shape) == _blocks(values[1], shape)).all(axis=(1, 3))
    with np.errstate(invalid="ignore"):
        near = np.isfinite(g) & (np.abs(errors[1] - errors[0]) <= bands[0] + bands[1])
        take = (errors[1] < errors[0]) & ~same
    for r, c in zip(*np.nonzero(near & ~same), strict=True):
        take[r, c] = _second_is_better(x, (first, second), (int(r), int(c)), recipe, g)
    mixed = _select(take, first, second)
    return replace(mixed, other=_select(~take, first, second), other_admissible=near)


def _second_is_better(x: Reals, pair: tuple[Quantised, Quantised], at: tuple[int, int], recipe: Recipe, g: float) -> bool:
    """Exact comparison of one block's squared errors."""
    columns = slice(at[1] * recipe.block_k, (at[1] + 1) * recipe.block_k)
    errors = []
    for candidate in pair:
        scale = _real(decode_scalar(int(candidate.scales[at]), recipe.scale_format(F32)))
        total = Fraction(0)
        for value, code in zip(x[at[0], columns], candidate.codes[at[0], columns], strict=True):
            total += (Fraction(float(value)) - _real(decode_scalar(int(code), recipe.element)) * scale / Fraction(g)) ** 2
        errors.append(total)
    return errors[1] < errors[0]


def _select(take: Mask, first: Quantised, second: Quantised) -> Quantised:
    """`second` in the blocks where `take`, else `first`."""
    wide = _spread(take, first.codes)
    return Quantised(
        np.where(wide, second.codes, first.codes), np.where(take, second.scales, first.scales), None, first.global_scale,
        np.where(take, second.scale_lo, first.scale_lo), np.where(take, second.scale_hi, first.scale_hi),
        np.where(wide, second.code_lo, first.code_lo), np.where(wide, second.code_hi, first.code_hi),
        np.where(wide, second.undefined, first.undefined), first.undefined_zero_points, None, first.other_admissible,
    )


class Smoothing(IntEnum):
    """How x is divided by the smoothing factors before it is quantised."""

    F32 = 0  # fl32(x / smooth): the quantiser sees binary32. svdquant-kernels baseline
    INPUT_APPROXIMATE = 1  # __fdividef in binary32 (2 ulp, CUDA C++ Programming Guide), then rounded to the format of x. nunchaku


@dataclass(frozen=True, slots=True)
class Smoothed:
    """x / smooth. `value` is the nominal result; the truth lies in [`low`, `high`]; all are values of `fmt`."""

    value: Reals
    low: Reals
    high: Reals
    fmt: Format


def smooth(x: Reals, x_format: Format, factors: Reals, rule: Smoothing) -> Smoothed:
    """x [rows, K] over smoothing factors [K], both values of `x_format`.

    Raises ValueError for factors outside 2^-126..2^126 in magnitude under INPUT_APPROXIMATE: the instruction's error is not
    specified there.
    """
    magnitude = np.abs(factors)
    if rule is Smoothing.INPUT_APPROXIMATE and not ((magnitude >= 2.0**-126) & (magnitude <= 2.0**126)).all():
        raise ValueError(f"smooth: got a factor of magnitude {magnitude.min()}..{magnitude.max()}, expected 2^-126..2^126")
    with np.errstate(all="ignore"):
        exact = np.asarray(x / factors)
    if rule is Smoothing.F32:
        value = round_to(exact, F32)
        return Smoothed(value, value, value, F32)
    lo, hi = _reachable(exact, 2)
    value = round_to(round_to(exact, F32), x_format)
    return Smoothed(value, round_to(lo, x_format), round_to(hi, x_format), x_format)


# --- the records ------------------------------------------------------------------------------------------------------------

_VLLM = "vLLM 28be48fa"
_CT = "compressed-tensors ac8e2ba8"
_SVDQUANT = "svdquant-kernels 7885f31"
_NUNCHAKU = "nunchaku 3a3cc3d"
_RCP = "rcp.approx.ftz.f32: at most 1 ulp, PTX ISA"


def _record(name: str, source: str, element: Format, bound: float, base: Recipe | None = None, **fields: Any) -> Recipe:
    """`base` with another name, source, element and symmetric bounds, and the given fields."""
    low = -bound if element.kind is Kind.FLOAT else -bound - 1
    symmetric = {"low": float_bits(low), "high": float_bits(bound)}
    return replace(base or _IEEE, name=name, source=source, element=element, **(symmetric | fields))


_IEEE = Recipe(
    name="", source="", element=E4M3FN, low=0, high=0, scale=F32, block_rows=1, block_k=0, static=0, scale_ub=0,
    statistic=Statistic.ABSMAX, include_zero=0, nan_amax=NanAmax.IGNORED, amax_floor=0, divisor=float_bits(1.0), divisor_low=0,
    scale_division=Division.DIVIDE, arithmetic=Width.F32, scale_floor=0, scale_cap=_INF, zero_scale=ZeroScale.KEPT,
    scale_rounding=Rounding.RNE, global_rule=GlobalRule.NONE, global_range=float_bits(2688.0), global_guard=GlobalGuard.NONE,
    join=Join.NONE, using=Using.STORED, effective=Effective.SCALE, apply=Division.DIVIDE, quotient=Width.F32, zero_inverse=_INF,
    inverse_cap=_INF, reciprocal_ulps=0, flush=0, zero_point=ZeroPoint.NONE, order=Order.ROUND_FIRST, code_offset=0,
    rounding=Rounding.RNE, nan_code=NanCode.NAN, zero_sign=ZeroSign.SIGN_BIT, choice=Choice.NONE, second=0,
)


def _fp8(suffix: str, element: Format, top: float, finfo_max: float) -> tuple[Recipe, ...]:
    """The fp8 recipes of one format. `top`: the range scales are made for; `finfo_max`: the largest value of the format."""
    native: dict[str, Any] = {"divisor": float_bits(top), "nan_amax": NanAmax.PROPAGATED, "apply": Division.RECIPROCAL}
    kernel: dict[str, Any] = {"divisor": float_bits(top), "nan_code": NanCode.HIGH}
    floor: dict[str, Any] = {"scale_floor": float_bits(1.0 / (top * 512.0))}
    static, tensor = f"{_VLLM} static_scaled_fp8_quant", f"{_VLLM} dynamic_scaled_fp8_quant"
    token, group = f"{_VLLM} dynamic_per_token_scaled_fp8_quant", f"{_VLLM} per_token_group_quant_fp8"
    forward, scaled, deepgemm = f"{_VLLM} QuantFP8.forward_native", f"{_VLLM} scaled_quantize", "DeepGEMM per_token_cast_to_fp8"
    return (
        _record(f"vllm_fp8_static{suffix}", f"{static}: clamp(x * (1 / scale))", element, top, **kernel, static=1,
                apply=Division.RECIPROCAL),
        _record(f"vllm_fp8_tensor{suffix}", f"{tensor}: no floor, reciprocal", element, top, **kernel, block_rows=0,
                apply=Division.RECIPROCAL),
        _record(f"vllm_fp8_token{suffix}", f"{token}: floor 1 / (max * 512), division", element, top, **kernel, **floor,
                scale_ub=1),
        _record(f"vllm_native_fp8_static{suffix}", forward, element, top, **native, static=1),
        _record(f"vllm_native_fp8_tensor{suffix}", forward, element, top, **native, **floor, block_rows=0),
        _record(f"vllm_native_fp8_token{suffix}", forward, element, top, **native, **floor, scale_ub=1),
        _record(f"vllm_fp8_scaled_quantize{suffix}", f"{scaled}: x * (max / amax), returns the inverse; bounds of the format",
                element, finfo_max, divisor=float_bits(top), nan_amax=NanAmax.PROPAGATED, amax_floor=float_bits(1e-12),
                scale_division=Division.INVERSE, block_k=128),
        _record(f"vllm_fp8_group128{suffix}", f"{group}: amax >= 1e-10, division, fminf(fmaxf(v, low), high)", element, top,
                **(kernel | {"nan_code": NanCode.LOW}), block_k=128, amax_floor=float_bits(1e-10)),
        _record(f"deepgemm_fp8_1x128{suffix}", f"{deepgemm}: max(amax, 1e-4) / max, x * (1 / sf)", element, top, **native,
                block_k=128, amax_floor=float_bits(1e-4)),
        _record(f"deepgemm_fp8_128x128{suffix}", f"{deepgemm}, 128 x 128 blocks of weights", element, top, **native,
                block_rows=128, block_k=128, amax_floor=float_bits(1e-4)),
    )


_XPU = "vLLM dynamic_per_token_int8_quant_ref: max(amax / 127, 1e-5) rounded to the format of x"
_INT8 = _record(
    "xpu_int8_token", _XPU + "; quotient in binary32", INT8, 127.0, scale=None, nan_amax=NanAmax.PROPAGATED,
    divisor=float_bits(127.0), scale_floor=float_bits(1e-5), nan_code=NanCode.UNDEFINED,
)

_Q1 = f"{_VLLM} quantize_weights, all arithmetic in the format of the weight"
_WEIGHT: dict[str, Any] = {
    "scale": None, "nan_amax": NanAmax.PROPAGATED, "arithmetic": Width.INPUT, "quotient": Width.INPUT, "block_k": 128,
}
_PAIR: dict[str, Any] = _WEIGHT | {
    "statistic": Statistic.SIGNED_PAIR, "divisor": float_bits(7.0), "divisor_low": float_bits(8.0),
    "nan_code": NanCode.UNDEFINED_INFINITE,
}
_SEVEN: dict[str, Any] = {"divisor": float_bits(7.0), "block_k": 64}
_INT4 = (
    _record("vllm_int4", f"{_Q1}: max(max/7, |min|/8)", INT4, 7.0, **_PAIR),
    _record("vllm_uint4b8", f"{_Q1}: max(max/7, |min|/8), codes + 8", UINT4, 7.0, **_PAIR, code_offset=8),
    _record("vllm_uint4_zero", f"{_Q1}: max(max - min, 1e-5) / 15, zero point RNE(|min / s|)", UINT4, 15.0, **_WEIGHT,
            low=0, statistic=Statistic.RANGE, divisor=float_bits(15.0), amax_floor=float_bits(1e-5),
            zero_point=ZeroPoint.RATIO, nan_code=NanCode.UNDEFINED_INFINITE),
    _record("compressed_tensors_int4", f"{_CT}: absmax / 7.5, zero scale -> eps of its format", INT4, 7.0, **_WEIGHT,
            divisor=float_bits(7.5), zero_scale=ZeroScale.EPSILON, order=Order.CLAMP_FIRST, nan_code=NanCode.UNDEFINED),
    _record("compressed_tensors_int4_zero", f"{_CT}: (max - min) / 15 with 0 in the range, zero point RNE(-8 - min / s)", INT4,
            7.0, **_WEIGHT, statistic=Statistic.RANGE, include_zero=1, divisor=float_bits(15.0), zero_scale=ZeroScale.EPSILON,
            zero_point=ZeroPoint.SHIFTED, order=Order.CLAMP_FIRST, nan_code=NanCode.UNDEFINED),
    _record("svdquant_int4", f"{_SVDQUANT} quantize_int4_rows: binary16 scale clamp(amax / 7, 1e-12, 65504), x / s", INT4, 7.0,
            **_SEVEN, scale=F16, nan_amax=NanAmax.PROPAGATED, scale_floor=float_bits(1e-12), scale_cap=float_bits(65504.0),
            nan_code=NanCode.UNDEFINED),
    _record("nunchaku_int4", f"{_NUNCHAKU}: amax * (1/7), stored in the format of x, x * rcp(unrounded); {_RCP}", INT4, 7.0,
            **_SEVEN, scale=None, scale_division=Division.RECIPROCAL, using=Using.UNROUNDED, apply=Division.APPROXIMATE,
            reciprocal_ulps=1, flush=1, nan_code=NanCode.ZERO),
)

_NVFP4 = _record(
    "", "", E2M1, 6.0, scale=UE4M3, block_k=16, divisor=float_bits(6.0), nan_code=NanCode.HIGH, scale_cap=float_bits(448.0)
)
_TORCH: dict[str, Any] = {"base": _NVFP4, "nan_amax": NanAmax.PROPAGATED}
_ENCODE: dict[str, Any] = {"global_rule": GlobalRule.ENCODE, "join": Join.TIMES_QUOTIENT}
_DECODE: dict[str, Any] = {"global_rule": GlobalRule.DECODE}
_VLLM_NVFP4: dict[str, Any] = _ENCODE | {"effective": Effective.TIMES_RECIPROCAL, "zero_inverse": 0}
_SVDQUANT_NVFP4: dict[str, Any] = _TORCH | {
    "scale_floor": float_bits(1e-12), "rounding": Rounding.RNA, "nan_code": NanCode.ZERO, "zero_sign": ZeroSign.NEGATIVE,
}
_NVFP4S = (
    _record("vllm_nvfp4", f"{_VLLM} scaled_fp4_quant: g * (amax * rcp(6)), x * rcp(s * rcp(g)); {_RCP}", E2M1, 6.0, _NVFP4,
            **_VLLM_NVFP4, scale_division=Division.APPROXIMATE, apply=Division.APPROXIMATE, reciprocal_ulps=1, flush=1),
    _record("vllm_nvfp4_reference", f"{_VLLM} test reference and FlashInfer: as the kernel, with IEEE reciprocals", E2M1, 6.0,
            **_TORCH, **_VLLM_NVFP4, scale_division=Division.RECIPROCAL, apply=Division.RECIPROCAL),
    _record("vllm_nvfp4_emulation", f"{_VLLM} NVFP4 emulation: as the test reference, 1 / 0 -> 1e-8", E2M1, 6.0,
            **_TORCH, **(_VLLM_NVFP4 | {"zero_inverse": float_bits(1e-8)}), scale_division=Division.RECIPROCAL,
            apply=Division.RECIPROCAL),
    _record("compressed_tensors_nvfp4", f"{_CT} nvfp4-pack-quantized: g * (amax / 6), zero scale -> 0.125, x / (s / g)", E2M1,
            6.0, **_TORCH, **_ENCODE, global_guard=GlobalGuard.FINITE, zero_scale=ZeroScale.EPSILON,
            effective=Effective.OVER_GLOBAL, nan_code=NanCode.UNDEFINED),
    _record("svdquant_nvfp4", f"{_SVDQUANT} baseline: clamp(amax / 6, 1e-12, 448), x / s, ties away", E2M1, 6.0,
            **_SVDQUANT_NVFP4),
    _record("svdquant_nvfp4_triton", f"{_SVDQUANT} Triton: amax * (1/6), otherwise the baseline", E2M1, 6.0, **_SVDQUANT_NVFP4,
            scale_division=Division.RECIPROCAL),
    _record("nunchaku_nvfp4", f"{_NUNCHAKU}: min(amax * (1/6), 448), x * rcp(unrounded); {_RCP}", E2M1, 6.0, _NVFP4,
            scale_division=Division.RECIPROCAL, using=Using.UNROUNDED, apply=Division.APPROXIMATE, reciprocal_ulps=1, flush=1),
    _record("modelopt_nvfp4", "TensorRT Model Optimizer NVFP4QTensor: amax / (6 * d), 0 -> 1, [2^-9, 448], x / (s * d)", E2M1,
            6.0, **_TORCH, **_DECODE, join=Join.OVER_PRODUCT, zero_scale=ZeroScale.ONE, scale_floor=float_bits(2.0**-9),
            effective=Effective.TIMES_GLOBAL, zero_sign=ZeroSign.NEGATIVE),
    _record("torchao_nvfp4", "torchao nvfp4_quantize: (amax / 6) / d, clamp [2^-6, 448], x * ((1 / d) / s)", E2M1, 6.0, **_TORCH,
            **_DECODE, join=Join.OVER_QUOTIENT, scale_floor=float_bits(2.0**-6), effective=Effective.RECIPROCAL_OVER,
            apply=Division.RECIPROCAL, nan_code=NanCode.UNDEFINED),
    _record("transformer_engine_nvfp4", "Transformer Engine: amax * (g * fl(1/6)), x * min(1 / (s * (1 / g)), FLT_MAX)", E2M1,
            6.0, **_TORCH, global_rule=GlobalRule.ENCODE, global_guard=GlobalGuard.NONZERO, join=Join.TIMES_CONSTANT,
            scale_division=Division.RECIPROCAL, effective=Effective.TIMES_RECIPROCAL, apply=Division.RECIPROCAL,
            zero_inverse=_MAX_F32, inverse_cap=_MAX_F32),
    _record("four_over_six_nvfp4", "fouroversix, arXiv 2512.02010: range 6 * 256, s and 1.5 s, smaller squared error", E2M1, 6.0,
            **_TORCH, **_ENCODE, global_range=float_bits(1536.0), global_guard=GlobalGuard.NONZERO,
            effective=Effective.TIMES_RECIPROCAL, apply=Division.RECIPROCAL, zero_inverse=0, nan_code=NanCode.UNDEFINED,
            zero_sign=ZeroSign.NEGATIVE, choice=Choice.SQUARED_ERROR, second=float_bits(1.5)),
    _record("deepgemm_fp4", "DeepGEMM per_token_cast_to_fp4: max(amax, 1e-4) / 6, x * (1 / sf), ties toward zero, no -0", E2M1,
            6.0, **_TORCH, scale=F32, scale_cap=_INF, block_k=128, amax_floor=float_bits(1e-4), apply=Division.RECIPROCAL,
            rounding=Rounding.RNTZ, nan_code=NanCode.ZERO, zero_sign=ZeroSign.PLUS),
)

_MX: dict[str, Any] = {"base": _NVFP4, "scale": E8M0, "scale_cap": _INF, "block_k": 32, "divisor": float_bits(4.0)}
_MXFP4S = (
    _record("mxfp4_floor", "OCP MX 1.0, microxcaling, torchao default: 2^(floor(log2 amax) - 2)", E2M1, 6.0, **_MX,
            scale_rounding=Rounding.FLOOR),
    _record("mxfp4_ceil", "torchao CEIL: 2^(ceil(log2 amax) - 2)", E2M1, 6.0, **_MX, scale_rounding=Rounding.CEIL),
    _record("mxfp4_rceil", "cuBLAS, torchao RCEIL: amax / 6 up to a power of two, PTX cvt.rp.ue8m0", E2M1, 6.0,
            **(_MX | {"divisor": float_bits(6.0)}), scale_rounding=Rounding.CEIL),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *_fp8("", E4M3FN, 448.0, 448.0),
        # vLLM makes fnuz scales for 224, not for the largest value 240 (get_fp8_min_max). DeepGEMM has no fnuz of its own.
        *_fp8("_fnuz", E4M3FNUZ, 224.0, 240.0),
        _INT8,
        replace(_INT8, name="xpu_int8_token_eager", source=_XPU + "; quotient rounded to it too", quotient=Width.INPUT),
        *_INT4,
        *_NVFP4S,
        *_MXFP4S,
    )
}
"""Every recipe by name. Group sizes of int4 recipes are those of the source; use dataclasses.replace for another `block_k`."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An input on which two recipes give different codes, scales or zero points.

    The input is one row of K = 128: `values`, codes of `x_format`, repeated. `global_scale`, a binary32 pattern, is given to both
    recipes where it is not 0. `item`: 1 scale rule, 2 scale in use, 3 division, 4 ties, 5 global scale, 6 zero block, 11 range.
    """

    item: int
    first: str
    second: str
    x_format: Format
    values: tuple[int, ...]
    global_scale: int
    about: str

    @property
    def x(self) -> Reals:
        """The row, [1, 128]."""
        return decode(np.resize(np.array(self.values, dtype=container(self.x_format)), (1, 128)), self.x_format)


_ZERO, _ONE_F32 = (0,), float_bits(1.0)

DISAGREEMENTS: tuple[Disagreement, ...] = (
    # binary16: 0x4700 = 7, 0xC700 = -7, 0x4300 = 3.5
    Disagreement(1, "svdquant_int4", "compressed_tensors_int4", F16, (0x4700, 0), 0, "int4 scale 7/7 or 7/7.5"),
    Disagreement(1, "svdquant_int4", "vllm_int4", F16, (0xC700, 0x4300), 0, "int4 scale 7/7 or max(3.5/7, 7/8)"),
    Disagreement(1, "compressed_tensors_int4", "vllm_int4", F16, (0xC700, 0x4300), 0, "int4 scale 7/7.5 or max(3.5/7, 7/8)"),
    # bf16: 0x40CC = 6.375, whose scale 1.0625 is stored as 1; 0x40A6 = 5.1875
    Disagreement(2, "svdquant_nvfp4", "nunchaku_nvfp4", BF16, (0x40CC, 0x40A6), 0, "stored or unrounded scale in use"),
    Disagreement(3, "vllm_fp8_token", "vllm_native_fp8_token", F16, (0x3BF8, 0x39FA), 0, "division or reciprocal of the scale"),
    Disagreement(3, "vllm_fp8_group128", "vllm_fp8_scaled_quantize", F16, (0x3BDC, 0x35E5), 0, "amax / 448 or 448 / amax"),
    # just below 0.111328125 = 6 * (2^-6 + 2^-9 * 1.5), six times a midpoint of e4m3
    Disagreement(3, "svdquant_nvfp4", "svdquant_nvfp4_triton", F32, (0x3DE3FFFF,), 0, "amax / 6 or amax * fl(1/6)"),
    Disagreement(3, "vllm_nvfp4_reference", "compressed_tensors_nvfp4", BF16, (0xC00A, 0x3FA1), 0, "reciprocals or divisions"),
    Disagreement(3, "modelopt_nvfp4", "torchao_nvfp4", BF16, (0x3FB4, 0x3F96), 0, "x / (s * d) or x * ((1 / d) / s)"),
    Disagreement(3, "xpu_int8_token", "xpu_int8_token_eager", BF16, (0x403E, 0xBFE1), 0, "quotient in binary32 or in bf16"),
    # binary16: 6, 0.25, 1.25, 2.5, 5 and 6, 0.75, 1.75, 3.5
    Disagreement(4, "nunchaku_nvfp4", "svdquant_nvfp4", F16, (0x4600, 0x3400, 0x3D00, 0x4100, 0x4500), 0, "ties to even or away"),
    Disagreement(4, "nunchaku_nvfp4", "deepgemm_fp4", F16, (0x4600, 0x3A00, 0x3F00, 0x4300), 0, "ties to even or toward zero"),
    Disagreement(5, "compressed_tensors_nvfp4", "modelopt_nvfp4", F16, (0x4600,), 0, "global scale 2688 / amax or amax / 2688"),
    Disagreement(5, "compressed_tensors_nvfp4", "svdquant_nvfp4", F16, (0x4600,), 0, "global scale or none"),
    Disagreement(5, "four_over_six_nvfp4", "compressed_tensors_nvfp4", F16, (0x4600,), 0, "global scale for 256 or for 448"),
    Disagreement(6, "vllm_nvfp4_reference", "compressed_tensors_nvfp4", F16, _ZERO, _ONE_F32, "zero block: scale 0 or 0.125"),
    Disagreement(6, "vllm_nvfp4_reference", "transformer_engine_nvfp4", F16, (0x1400,), _ONE_F32,
                 "underflowed scale: codes 0 or +-6"),
    Disagreement(6, "vllm_nvfp4_reference", "vllm_nvfp4_emulation", F32, (float_bits(2.0**30),), float_bits(2.0**-60),
                 "underflowed scale: inverse 0 or 1e-8"),
    Disagreement(6, "svdquant_nvfp4", "nunchaku_nvfp4", F16, _ZERO, 0, "zero block: 0/0 gives code 0 or +6"),
    Disagreement(6, "modelopt_nvfp4", "torchao_nvfp4", F16, _ZERO, _ONE_F32, "zero block: scale 1 or 2^-6"),
    Disagreement(6, "vllm_fp8_token", "vllm_fp8_tensor", F16, _ZERO, 0, "zero row: floor, or scale 0 and codes 0x7E"),
    Disagreement(6, "vllm_fp8_token", "deepgemm_fp8_1x128", F16, _ZERO, 0, "zero row: floor 1/(448*512) or amax 1e-4"),
    Disagreement(6, "vllm_int4", "compressed_tensors_int4", F16, _ZERO, 0, "zero group: undefined, or eps"),
    Disagreement(6, "vllm_uint4_zero", "compressed_tensors_int4_zero", F16, _ZERO, 0, "zero group: range 1e-5, or undefined"),
    Disagreement(6, "svdquant_int4", "nunchaku_int4", F16, _ZERO, 0, "zero group: undefined, or code 0"),
    Disagreement(11, "vllm_fp8_token", "vllm_fp8_token_fnuz", F16, (0x4600,), 0, "range 448 or 224"),
    Disagreement(1, "vllm_uint4_zero", "compressed_tensors_int4_zero", F16, (0x4700, 0x3C00), 0, "range without or with 0"),
)
"""Every place where the source systems' conventions differ in bits, one constructed input each."""
