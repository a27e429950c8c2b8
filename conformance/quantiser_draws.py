"""Draws that need to know a code space or a recipe: every code in every place, ties of an element format, blocks at the edges.

Decides: integers and reals of a stated shape from the words of a stream. Refuses: to know an op. Ops call this room from their
`draw`, so that one tie means the same thing in every quantiser.
"""

from __future__ import annotations

import numpy as np

from lowbit.references.formats import Codes, Format, Reals, container, decode
from lowbit.references.recipes import Recipe, Statistic, float_value
from lowbit.references.rounding import Overflow, encode, round_to

from .case import Case, Stream

__all__ = [
    "SPECIAL_BLOCKS", "bytes_of", "draw_x", "every_code", "extreme_blocks", "nibbles", "special_blocks", "tie_blocks", "ties_of",
]


def every_code(shape: tuple[int, ...], bits: int) -> Codes:
    """Codes of `bits` bits (4 or 8, uint8) such that every byte of the packed tensor takes every value in every place of a word.

    8 bits: element i holds i mod 257 (256 wraps to 0); 257 is odd, so after 257 * w elements each code has stood in each of w
    places. 4 bits: elements 2i and 2i + 1 are the low and the high nibble of that byte. The last axis is the packed one.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if bits == 8:
        return (np.arange(count) % 257).astype(np.uint8).reshape(shape)
    byte = (np.arange((count + 1) // 2) % 257).astype(np.uint8)
    return np.stack((byte & np.uint8(15), byte >> np.uint8(4)), axis=1).reshape(-1)[:count].reshape(shape)


def nibbles(pattern: str, shape: tuple[int, ...], stream: Stream, packed_axis: int = -1) -> Codes:
    """4-bit codes of a packing case. all: `every_code` along the packed axis. ramp: 5i + 3 row mod 16, so that no two neighbours
    agree. zeros: 0. extremes: 0x7, 0x8, 0xF and 0x0 only, the codes at which a sign bit shows. Otherwise uniform."""
    if pattern == "all":
        turned = tuple(np.moveaxis(np.empty(shape, dtype=np.bool_), packed_axis, -1).shape)
        return np.moveaxis(every_code(turned, 4), -1, packed_axis)
    if pattern == "ramp":
        index = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        return np.asarray((index * 5 + index // max(shape[-1], 1) * 3) % 16, dtype=np.uint8)
    if pattern == "zeros":
        return np.zeros(shape, dtype=np.uint8)
    if pattern == "extremes":
        return np.take(np.array([0x7, 0x8, 0xF, 0x0], dtype=np.uint8), stream.integers(0, 3, shape))
    return stream.integers(0, 15, shape).astype(np.uint8)


def bytes_of(pattern: str, shape: tuple[int, ...], stream: Stream) -> Codes:
    """8-bit codes of an encoding case. all: `every_code`. ramp: one code above the element before it, from a seeded start.
    zeros: 0. special: 0x00, 0x80, 0x7F, 0xFF, 0x7E, 0xFE and 0x01. Otherwise uniform."""
    if pattern == "all":
        return every_code(shape, 8)
    if pattern == "ramp":
        start = stream.integers(0, 255, (1,))[0]
        return np.asarray((np.arange(int(np.prod(shape, dtype=np.int64))) + start) % 256, dtype=np.uint8).reshape(shape)
    if pattern == "zeros":
        return np.zeros(shape, dtype=np.uint8)
    if pattern == "special":
        return np.take(np.array([0x00, 0x80, 0x7F, 0xFF, 0x7E, 0xFE, 0x01], dtype=np.uint8), stream.integers(0, 6, shape))
    return stream.integers(0, 255, shape).astype(np.uint8)


def ties_of(fmt: Format) -> Reals:
    """Midpoints of neighbouring values of an element or scale format of at most 8 bits that lie above 0, ascending."""
    values = np.unique(decode(np.arange(1 << fmt.bits, dtype=container(fmt)), fmt))
    values = values[np.isfinite(values) & (values >= 0)]
    return np.asarray((values[:-1] + values[1:]) / 2)


def _around(values: Reals, fmt: Format) -> Reals:
    """Each value of `fmt` between its two neighbours in the format, all of them with both signs. Values are positive."""
    codes = encode(values, fmt).astype(np.int64)
    triples = decode(np.stack((codes - 1, codes, codes + 1), axis=1).astype(container(fmt)), fmt).reshape(-1)
    return np.stack((triples, -triples), axis=1).reshape(-1)


def _extents(recipe: Recipe, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block; (0, 0) where the matrix has no element."""
    return (recipe.block_rows or shape[0], recipe.block_k or shape[1]) if 0 not in shape else (0, 0)


def _assemble(blocks: Reals, extents: tuple[int, int], shape: tuple[int, int]) -> Reals:
    """Blocks [count, elements], in row-major order of the blocks, to the matrix [rows, K]."""
    rows, columns = (size // extent for size, extent in zip(shape, extents, strict=True))
    return np.asarray(blocks.reshape(rows, columns, *extents).transpose(0, 2, 1, 3).reshape(shape))


def tie_blocks(shape: tuple[int, int], fmt: Format, recipe: Recipe, stream: Stream, unit: float = 1.0) -> Codes:
    """x [rows, K] in codes of `fmt` whose quotients are ties of the element format, or one unit in the last place beside one.

    The first element of a block makes its scale `unit` * 2^j exactly, j in -2..2: it is the divisor times that. In every fourth
    block, where the scale format has at most 8 bits, it lies at a tie of the scale or one unit beside it instead. The ties follow
    each other through the tensor from a seeded start. `unit` is a power of two. Static recipes: the scale is `unit` everywhere,
    and quotients pass the bounds.
    """
    extents = _extents(recipe, shape)
    size = extents[0] * extents[1]
    if not size:
        return np.zeros(shape, dtype=container(fmt))
    count = shape[0] * shape[1] // size
    step = np.full((count, 1), unit) if recipe.static else np.ldexp(unit, stream.integers(-2, 2, (count, 1)))
    if recipe.statistic is Statistic.RANGE:
        return encode(_assemble(_range_ties(count, size, step, fmt), extents, shape), fmt)
    high, divisor = float_value(recipe.high), float_value(recipe.divisor)
    ties = ties_of(recipe.element)
    pool = _around(ties[ties < high], fmt)
    if recipe.static:
        pool = np.concatenate((pool, _around(np.array([high, 2 * high]), fmt)))
    # The statistic takes the place of one element of each block; the start moves on with it so that no tie is left out.
    place = np.arange(count * size).reshape(count, size)
    blocks = pool[(stream.integers(0, pool.size - 1, (1,))[0] + place - place // size - 1) % pool.size] * step
    if recipe.static:
        return encode(_assemble(blocks, extents, shape), fmt)
    blocks[:, 0] = divisor * step[:, 0]
    scale = recipe.scale_format(fmt)
    if scale.bits <= 8:
        middle = ties_of(scale)
        top = divisor * middle[(middle >= 0.25) & (middle <= 4)]
        top = top[round_to(top, fmt) == top]
        tops = _around(top, fmt)[0::2] * unit
        hit = np.arange(count) % 4 == 3
        blocks[hit] *= 0.25 / step[hit]  # small enough to leave the first element the largest
        blocks[hit, 0] = tops[stream.integers(0, tops.size - 1, (int(hit.sum()),))]
    return encode(_assemble(blocks, extents, shape), fmt)


def _range_ties(count: int, size: int, step: Reals, fmt: Format) -> Reals:
    """Blocks whose range is 15 * step: block b has its least value at -(b mod 16) steps, or half a step lower (a tie of the zero
    point), and between the ends every half-integer number of steps with its neighbours."""
    index = np.arange(count)[:, None]
    low = -(index % 16) - np.where(index // 16 % 2, 0.5, 0.0)
    place = np.arange(size)[None, :]
    middle = encode((np.floor(low) + place % 15 + 0.5) * step, fmt).astype(np.int64) + place // 15 % 3 - 1
    blocks = np.clip(decode(middle.astype(container(fmt)), fmt), low * step, (low + 15.0) * step)
    blocks[:, :1], blocks[:, 1:2] = low * step, (low + 15.0) * step
    return blocks


SPECIAL_BLOCKS = (
    "plus_zero", "minus_zero", "both_zeros", "underflow", "subnormal", "largest", "negative", "single",
    "nan", "plus_inf", "minus_inf", "both_inf", "all_nan",
)
"""What a block of the pattern `special` holds; the last five are not finite."""


def special_blocks(
    shape: tuple[int, int], fmt: Format, recipe: Recipe, stream: Stream, first: int = 0, *, finite: bool = False
) -> Codes:
    """x [rows, K] in codes of `fmt`: every second block is one of `SPECIAL_BLOCKS`, in turn from number `first` on, the others
    are bell-shaped; where there is one block, it is a special one. `finite` leaves out what is not finite.

    underflow: 2^-24 and below, where 8-bit block scales are zero. single: one element, the others zero.
    """
    extents = _extents(recipe, shape)
    size = extents[0] * extents[1]
    if not size:
        return np.zeros(shape, dtype=container(fmt))
    count = shape[0] * shape[1] // size
    blocks = round_to(stream.normal((count, size)), fmt)
    sign = np.where(stream.integers(0, 1, (count, size)) == 1, -1.0, 1.0)
    places = stream.integers(0, size - 1, (count,))
    least, most = float(decode(np.array([1], dtype=container(fmt)), fmt)[0]), float(fmt.max_finite)
    kinds = SPECIAL_BLOCKS[:-5] if finite else SPECIAL_BLOCKS
    for b in range(0, count, 2 if count > 1 else 1):
        row, at = blocks[b], int(places[b])
        match kinds[(first + b // 2) % len(kinds)]:
            case "plus_zero":
                row[:] = 0.0
            case "minus_zero":
                row[:] = -0.0
            case "both_zeros":
                row[:] = 0.0 * sign[b]
            case "underflow":
                row[:] = round_to(row * 2.0**-24, fmt)
            case "subnormal":
                row[:] = np.rint(row) * least
            case "largest":
                row[:] = most * sign[b]
            case "negative":
                row[:] = -np.abs(row)
            case "single":
                row[np.arange(size) != at] = 0.0
            case "nan":
                row[at] = np.nan
            case "plus_inf":
                row[at] = np.inf
            case "minus_inf":
                row[at] = -np.inf
            case "both_inf":
                row[at], row[(at + 1) % size] = np.inf, -np.inf
            case _:
                row[:] = np.nan
    return encode(_assemble(blocks, extents, shape), fmt, overflow=Overflow.SPECIAL)


def extreme_blocks(shape: tuple[int, int], fmt: Format, recipe: Recipe, stream: Stream) -> Codes:
    """x [rows, K] in codes of `fmt`: bell-shaped blocks, each times 2^e with e uniform over the exponents of the format, largest
    values bounded to it; one element in eight of a block is smaller by a further 2^-12."""
    extents = _extents(recipe, shape)
    size = extents[0] * extents[1]
    if not size:
        return np.zeros(shape, dtype=container(fmt))
    count = shape[0] * shape[1] // size
    top = int(np.frexp(float(fmt.max_finite))[1]) - 1
    exponent = stream.integers(fmt.min_exponent - fmt.mantissa_bits, top, (count, 1))
    small = np.where(stream.integers(0, 7, (count, size)) == 0, 12, 0)
    return encode(_assemble(np.ldexp(stream.normal((count, size)), exponent - small), extents, shape), fmt)


def draw_x(case: Case, shape: tuple[int, int], fmt: Format, recipe: Recipe, stream: Stream, unit: float = 1.0, *,
           finite: bool = False) -> Codes | None:
    """The quantiser's own draw of x for the patterns that need its recipe, None for the others."""
    match case.pattern:
        case "ties":
            return tie_blocks(shape, fmt, recipe, stream, unit)
        case "special":
            return special_blocks(shape, fmt, recipe, stream, case.seed, finite=finite)
        case "extremes":
            return extreme_blocks(shape, fmt, recipe, stream)
        case _:
            return None
