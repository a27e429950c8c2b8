"""The record of a recipe: every step of a quantiser as a field, and what a quantiser returns.

Decides: which rules a quantiser can be made of (`Recipe` and its enumerations), the integers that kernels take at compile time
(`constants`), and the form of an answer (`Quantised` for a matrix, `BlockCodes` for a block).
Refuses: to compute (see recipe_definition and recipe_arrays) and to know a source system (see recipes).

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

from dataclasses import dataclass, fields
from enum import IntEnum
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import Codes, Format, Special
from lowbit.references.rounding import Rounding

__all__ = [
    "CONSTANTS", "INF_F32", "MAX_F32", "BlockCodes", "Choice", "Division", "Effective", "GlobalGuard", "GlobalRule", "Join",
    "Keys", "Mask", "NanAmax", "NanCode", "Order", "Quantised", "Recipe", "Statistic", "Using", "Value", "Width", "ZeroPoint",
    "ZeroScale", "ZeroSign", "constants", "float_bits", "float_value",
]

INF_F32 = 0x7F800000
MAX_F32 = 0x7F7FFFFF

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
