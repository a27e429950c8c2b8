"""Array twin of the definition of a recipe: whole matrices, and all that the recipe admits.

Decides: `quantise` (bit for bit what the definition gives for each block), the codes and scales that a recipe admits where one of
its steps is an approximate instruction (`admissible_codes`), the global scale of a matrix, and the smoothing before a quantiser.
Refuses: tolerances. A recipe made of IEEE operations has one answer, ties included. A recipe with an approximate reciprocal
has the answers that some reciprocal within the stated error gives, and no others.

A span is the least and the greatest value that a step can have. Where nothing is approximate both are the same array, and each
step is then computed once. float64 holds every binary32 product exactly, and a binary32 quotient rounded to float64 and then
to binary32 is rounded as once: 53 >= 2 * 24 + 2 significand bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import (
    BF16,
    F16,
    F32,
    INT32,
    Codes,
    Format,
    Kind,
    Reals,
    container,
    decode,
    decode_scalar,
    order_key,
)
from lowbit.references.recipe_definition import real
from lowbit.references.recipe_records import (
    MAX_F32,
    Choice,
    Division,
    Effective,
    GlobalGuard,
    GlobalRule,
    Join,
    Keys,
    Mask,
    NanAmax,
    NanCode,
    Order,
    Quantised,
    Recipe,
    Statistic,
    Using,
    Width,
    ZeroPoint,
    ZeroScale,
    ZeroSign,
    float_value,
)
from lowbit.references.rounding import Overflow, Rounding, encode, round_to, sum_odd

__all__ = ["Smoothed", "Smoothing", "admissible_codes", "global_scale_of", "quantise", "smooth"]

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
        result = np.asarray(1.0 if amax == 0 else np.minimum(result, float_value(MAX_F32)))
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
        scale = real(decode_scalar(int(candidate.scales[at]), recipe.scale_format(F32)))
        total = Fraction(0)
        for value, code in zip(x[at[0], columns], candidate.codes[at[0], columns], strict=True):
            total += (Fraction(float(value)) - real(decode_scalar(int(code), recipe.element)) * scale / Fraction(g)) ** 2
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
