"""The definition of a recipe: one block in Fractions, step by step.

Decides: `quantise_block_scalar`, the scale, the zero point and the codes of one block of exact values.
Refuses: arrays and speed (see recipe_arrays), and intervals: an approximate reciprocal is moved by a given number of units in the
last place, so that a caller may try each.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from lowbit.references.formats import F32, INT32, Format, Kind, Special, decode_scalar
from lowbit.references.recipe_records import (
    BlockCodes,
    Choice,
    Division,
    Effective,
    Join,
    NanAmax,
    NanCode,
    Order,
    Recipe,
    Statistic,
    Using,
    Value,
    Width,
    ZeroPoint,
    ZeroScale,
    ZeroSign,
    float_bits,
)
from lowbit.references.rounding import Overflow, Rounding, encode_scalar

__all__ = ["quantise_block_scalar", "real"]


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
    return real(a) + real(b)


def real(value: Value) -> Fraction:
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
    return ranks[0] < ranks[1] or (ranks == [0, 0] and real(a) < real(b))


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
    return real(decode_scalar(encode_scalar(value, INT32, rounding), INT32))


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
        integer = _whole(real(quotient), recipe.rounding)
    else:
        reach = _at_most(_at_least(quotient, float_bits(-(2.0**20))), float_bits(2.0**20))
        integer = min(max(_whole(real(reach), recipe.rounding) + real(zero_point), real(low)), real(high))
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
        total += (real(x) - real(decode_scalar(code, recipe.element)) * scale / global_scale) ** 2
    return total
