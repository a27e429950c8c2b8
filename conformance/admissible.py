"""From what a recipe yields to what a quantiser may output.

Decides: the admissible codes, scales and zero points of a quantiser, alone or beside the scales that a backend chose.
Refuses: to judge codes beside a scale that is itself not admissible; they are then judged beside the recipe's own scale.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import F32, Codes, Format, Reals, is_nan, order_key
from lowbit.references.recipes import Choice, Quantised, Recipe, Using, ZeroPoint, admissible_codes, quantise

from .op import Expectation, Flag, exactly

__all__ = ["padded", "quantiser_expectations", "transposed"]

Keys = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def _between(fmt: Format, lo: Codes, hi: Codes) -> Expectation:
    """Codes between two ends; where an end is NaN so may the code be, where both are it must be."""
    keys, nan = (order_key(lo, fmt), order_key(hi, fmt)), (is_nan(lo, fmt), is_nan(hi, fmt))
    flags = np.where(nan[0] & nan[1], np.uint8(Flag.NAN_REQUIRED), np.where(nan[0] | nan[1], np.uint8(Flag.NAN_OK), np.uint8(0)))
    low, high = np.where(nan[0], keys[1], keys[0]), np.where(nan[1], keys[0], keys[1])
    return Expectation(fmt, np.minimum(low, high), np.maximum(low, high), flags.astype(np.uint8))


def _spread(values: Codes, shape: tuple[int, ...]) -> Codes:
    """Values of a scale matrix at the elements [rows, K]."""
    rows, columns = (size // max(count, 1) for size, count in zip(shape, values.shape, strict=True))
    return np.repeat(np.repeat(values, rows, axis=0), columns, axis=1)


def quantiser_expectations(
    x: Reals,
    x_format: Format,
    recipe: Recipe,
    *,
    beside: Codes | None = None,
    bounds: tuple[Reals, Reals] | None = None,
    static_scale: Reals | None = None,
    scale_ub: float | None = None,
    global_scale: float | None = None,
) -> dict[str, Expectation]:
    """Expectations `q` [rows, K] and `scales` (shape of the scale matrix); `zeros` and `global_scale` where the recipe has them.

    The other arguments are those of `recipes.quantise`. `beside`: scale codes that a backend wrote; where they are admissible the
    codes are judged beside them, elsewhere beside the recipe's own scale. Without it a code is admissible if it is so beside some
    admissible scale. Codes that the recipe leaves undefined are free.
    """
    given = {"bounds": bounds, "static_scale": static_scale, "scale_ub": scale_ub, "global_scale": global_scale}
    found = quantise(x, x_format, recipe, **given)  # type: ignore[arg-type]
    fmt = recipe.scale_format(x_format)
    scales = _between(fmt, found.scale_lo, found.scale_hi)
    lo, hi, undefined = found.code_lo, found.code_hi, found.undefined
    if not recipe.exact and recipe.using is Using.STORED and recipe.choice is Choice.NONE and recipe.zero_point is ZeroPoint.NONE:
        ends = [found.scale_lo, found.scale_hi]
        if beside is not None:
            ends = [np.where(scales.admits(beside), beside, found.scales).astype(found.scales.dtype)]
        spans = [admissible_codes(x, x_format, recipe, end, **given) for end in ends]  # type: ignore[arg-type]
        lo, hi = np.minimum.reduce([s[0] for s in spans]), np.maximum.reduce([s[1] for s in spans])
        undefined = np.logical_or.reduce([s[2] for s in spans])
    flags = np.where(is_nan(found.codes, recipe.element), np.uint8(Flag.NAN_REQUIRED), np.uint8(0))
    codes = Expectation(recipe.element, lo, hi, np.where(undefined, np.uint8(Flag.FREE), flags).astype(np.uint8))
    if found.other is not None:
        codes, scales = _with_other(found, found.other, codes, scales, beside)
    result = {"q": codes, "scales": scales}
    if found.zero_points is not None:
        result["zeros"] = exactly(found.zero_points, recipe.element, free=found.undefined_zero_points)
    if found.global_scale is not None:
        result["global_scale"] = exactly(found.global_scale.reshape(1), F32)
    return result


def _with_other(
    found: Quantised, other: Quantised, codes: Expectation, scales: Expectation, beside: Codes | None
) -> tuple[Expectation, Expectation]:
    """Expectations with the blocks whose other candidate is as good: that scale too, and its codes beside it."""
    near = found.other_admissible
    second = near if beside is None else near & (beside == other.scales)
    own = np.ones_like(near) if beside is None else ~second
    pairs = {int(i): frozenset((int(found.scales.flat[i]), int(other.scales.flat[i]))) for i in np.flatnonzero(near)}
    wide_own, wide_second = _spread(own, found.codes.shape), _spread(second, found.codes.shape)
    both = wide_own & wide_second & (found.codes != other.codes)
    sets = {int(i): frozenset((int(found.codes.flat[i]), int(other.codes.flat[i]))) for i in np.flatnonzero(both)}
    lo, hi = np.where(wide_own, codes.lo, other.code_lo), np.where(wide_own, codes.hi, other.code_hi)
    return replace(codes, lo=lo, hi=hi, sparse=sets), replace(scales, sparse=pairs)


def padded(expectation: Expectation, shape: tuple[int, ...], flag: Flag = Flag.NONE) -> Expectation:
    """The expectation with elements appended along each axis up to `shape`: zero codes (either zero where the expectation takes
    either), or, with a flag, what the flag says."""
    extra = [(0, wide - size) for size, wide in zip(expectation.lo.shape, shape, strict=True)]
    inside = np.pad(np.ones(expectation.lo.shape, dtype=np.bool_), extra)
    flat = np.flatnonzero(inside.reshape(-1))
    flags = np.pad(expectation.flags, extra)
    flags[~inside] |= np.uint8(flag)
    exact = None if expectation.exact is None else np.pad(expectation.exact, extra)
    sparse = {int(flat[i]): codes for i, codes in expectation.sparse.items()}
    return replace(
        expectation, lo=np.pad(expectation.lo, extra), hi=np.pad(expectation.hi, extra), flags=flags, sparse=sparse, exact=exact
    )


def transposed(expectation: Expectation) -> Expectation:
    """The expectation of a matrix [rows, cols] for a tensor that holds it as [cols, rows]; without `exact`."""
    rows, columns = expectation.lo.shape
    sparse = {i % columns * rows + i // columns: codes for i, codes in expectation.sparse.items()}
    return replace(
        expectation, lo=expectation.lo.T, hi=expectation.hi.T, flags=expectation.flags.T, sparse=sparse, exact=None
    )
