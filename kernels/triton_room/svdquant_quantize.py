"""svdquant_quantize in Triton: x smoothed and quantised, and projected to low rank as it was read, in one launch.

Decides: which programs quantise and which project, the split of K over programs, and the sum of the parts. Refuses: problems
outside the contract's domain. Programs that project and programs that quantise the same rows run side by side, and x reaches both
through the cache. The projection takes x before smoothing; each of its programs walks a part of K upwards. Parts of lora_act are
added in ascending order by a second kernel: no atomics, the same bits in every run.

Shapes: x [M, K], smooth [K] and lora_down [K, R] in one format, bf16 or binary16. q is written packed, [rows, K/2] bytes, the
even k in bits 0 to 3; scales [K/16, rows] e4m3 or [K/64, rows] 16-bit codes; lora_act binary32 [rows, R]. rows = 256 ceil(M /
256): from M on every output is 0. The suite's one code per byte is made of q afterwards.

Division: under svdquant x / smooth and the quotient by the scale are IEEE quotients. Both divisors have at most 11 significand
bits, so that `division.by_short` gives the same bits from one reciprocal per column or block. Where a magnitude is outside its
range, the program does its part again by the general division.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import DATAPATHS, F32, Contraction, Declaration, Problem, TensorView, cast
from lowbit.kernels.triton_room.blocks import (
    INT4_RULES,
    NVFP4_RECIPES,
    flags,
    int4_codes,
    int4_scale,
    largest,
    nvfp4_block,
    offset,
    packed,
)
from lowbit.kernels.triton_room.codes8 import OPTIONS
from lowbit.kernels.triton_room.codes16 import code, rounded, value16
from lowbit.kernels.triton_room.division import by_short, div, reciprocal, short_reciprocal
from lowbit.kernels.triton_room.encodings import unpack_nibbles
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import rows_of, scratch, tensor

__all__ = [
    "MUTANTS", "OPS", "SPLITS", "declaration", "inverses", "prepare", "run", "stage", "svdquant_quantize", "tactics",
    "unsupported", "workspace",
]

OPS = ("svdquant_quantize",)
MUTANTS = ("lora_of_smoothed", "offsets_wrap", "padding_not_written")
SPLITS = {"whole": 1, "split4": 4, "split8": 8}
"""Tactics: equal parts of K, each whole instructions of the matrix unit, that programs share a row by."""

_INSTRUCTION_K = 16
"""K of the widest 16-bit instruction of any machine: parts that are whole ones are those of `Contraction(splits=..)`."""


@triton.jit
def away_code(x):  # type: ignore[no-untyped-def]
    """int32 of which bits 0 to 2 are the e2m1 magnitude code of binary32 x, ties away from zero, bounded, and bits 3 to 7 are 0.

    Every tie has at most two fraction bits, so that what lies below them changes nothing and is cut off. The number of a code,
    as a function of what is left, is the least of 2x, x + 2 and x / 2 + 4, rounded; a sixteenth sends ties up and nothing else.
    """
    kept = (x.to(tl.int32, bitcast=True) & 0x7FE00000).to(tl.float32, bitcast=True)
    number = tl.minimum(tl.fma(kept, 2.0, 0.0625), kept + 2.0625)
    number = tl.minimum(tl.minimum(tl.fma(kept, 0.5, 4.0625), 7.0), number)
    return (number + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23, whose code ends in 22 zeros


@triton.jit
def fast_tile(x, factors, inverses, VARIANT: tl.constexpr, SIXTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(codes, scale codes, whether they hold) of the recipes svdquant and svdquant_triton: as `general_tile`, by short
    divisions. Bits 0 to 3 of a code count; bits 4 to 7 are 0. A block holds if its amax is at most 2^60. inverses: fl(1 /
    factors), NaN where a factor is outside 2^-16 to 2^16: its blocks do not hold.

    By a scale of 0 the quotient of a zero is 0 and that of another number infinite: so it is here with -2^100 and 2^126 for the
    scale and its reciprocal, where the step that corrects the quotient makes it larger. (0 / 0 is NaN: code 0 of e2m1, undefined
    in int4.)
    """
    smoothed = by_short(x, factors, inverses)
    amax = largest(smoothed, 1)
    if VARIANT == 0:
        part = amax * SIXTH if SIXTH > 0 else by_short(amax, tl.full(amax.shape, 6.0, tl.float32), 0.1666666716337204)  # fl(1/6)
        part = tl.minimum(part, 448.0)
        exponent = tl.maximum(part.to(tl.int32, bitcast=True) >> 23, 121)
        anchor = ((exponent + 20) << 23) | 0x400000
        total = part + anchor.to(tl.float32, bitcast=True)
        scale = total - anchor.to(tl.float32, bitcast=True)
        code = ((exponent - 121) << 3) + (total.to(tl.int32, bitcast=True) - anchor)
    else:
        part = by_short(amax, tl.full(amax.shape, 7.0, tl.float32), 0.1428571492433548)  # fl(1/7)
        narrow = tl.minimum(part, 65504.0).to(tl.float16)
        scale, code = narrow.to(tl.float32), narrow.to(tl.int16, bitcast=True)
    positive = scale > 0
    divisor = tl.where(positive, scale, -1.2676506002282294e30)
    inverse = tl.where(positive, short_reciprocal(tl.where(positive, scale, 1.0)), 8.507059173023462e37)
    quotient = by_short(smoothed, tl.expand_dims(divisor, -1), tl.expand_dims(inverse, -1))
    holds = amax <= 1.152921504606847e18
    if VARIANT == 0:
        negative = (smoothed.to(tl.int32, bitcast=True) >> 28) & 8
        return away_code(quotient) | negative, code.to(tl.uint8), holds
    else:
        nearest = tl.minimum(tl.maximum(quotient, -8.0), 7.0) + 12582912.0  # 1.5 * 2^23
        return nearest.to(tl.int32, bitcast=True) & 15, code, holds


@triton.jit
def general_tile(  # type: ignore[no-untyped-def]
    x, factors, VARIANT: tl.constexpr, FORMAT: tl.constexpr, NUNCHAKU: tl.constexpr, RULE: tl.constexpr,
    NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr,
):
    """(int32 codes [rows, blocks, size], scale codes [rows, blocks], smoothed x) of x / factors, binary32 [rows, blocks, size]:
    by the definition, every division IEEE."""
    smoothed = div(x, factors)
    if NUNCHAKU:
        smoothed = rounded(smoothed, FORMAT)
    if VARIANT == 0:
        g = tl.zeros((x.shape[0], x.shape[1]), tl.float32)
        codes, scale = nvfp4_block(smoothed, g, NAN, SIXTH, JOIN, FLOOR, CAP, ZERO, STORED, EFFECT, FLUSH, AT_ZERO, TIES, SIGN,
                                   NAN_CODE, CHOICE, WIDE)
    else:
        amax = largest(smoothed, RULE != 5)
        stored, divisor, zero = int4_scale(amax, amax, amax, RULE, FORMAT)
        codes = int4_codes(smoothed, divisor, zero, RULE, FORMAT) & 15
        scale = code(stored, FORMAT if RULE == 5 else 1)
    return codes, scale, smoothed


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    codes, scale, q, scales, row, first, present, inside, k, q_words, scale_stride, SIZE: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, ZEROED: tl.constexpr,
):
    """Codes and scales of one tile that begins at K index `first`, rows `inside` only. Rows of q are q_words of 4 bytes apart: by
    no more than 4 is all that the compiler is to know, since 4 bytes are what a thread has of a row, and a wider store would move
    codes between threads. ZEROED: they are 0 already in rows that
    are not `present`, else they become 0."""
    if not ZEROED:
        codes = tl.where(present[:, None, None], codes, 0)
        scale = tl.where(present[:, None], scale, 0)
    half = first // 2 + tl.arange(0, DEPTH // 2)
    places = q + (offset(row, q_words, 0) * 4)[:, None] + half[None, :]
    tl.store(places, tl.reshape(packed(codes), (ROWS, DEPTH // 2)), mask=inside[:, None] & (half < k // 2)[None, :])
    block = first // SIZE + tl.arange(0, DEPTH // SIZE)
    places = scales + offset(block, scale_stride, 0)[None, :] + row[:, None]
    tl.store(places, scale, mask=inside[:, None] & (block < k // SIZE)[None, :])


@triton.jit
def load_columns(factors, first, k, SIZE: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of factors[first : first + DEPTH] as [1, DEPTH / SIZE, SIZE]; 0 beyond k."""
    depth = first + tl.arange(0, DEPTH)
    found = tl.load(factors + depth, mask=depth < k, other=0)
    return tl.reshape(found, (1, DEPTH // SIZE, SIZE))


@triton.jit
def quantise_columns(  # type: ignore[no-untyped-def]
    x, smooth, inverse, q, scales, start_row, count, first, m, rows, k, x_stride, q_words, scale_stride,
    VARIANT: tl.constexpr, FORMAT: tl.constexpr, NUNCHAKU: tl.constexpr, RULE: tl.constexpr,
    NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, FAST: tl.constexpr,
    WRAP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Quantise x[start_row : start_row + count, first : first + DEPTH], ROWS rows at a time, the next ones loaded meanwhile."""
    depth = first + tl.arange(0, DEPTH)
    there = (depth < k)[None, :]
    factors = value16(load_columns(smooth, first, k, SIZE, DEPTH), FORMAT == 2)
    if FAST:
        inverses = load_columns(inverse, first, k, SIZE, DEPTH)
        hold = tl.full((ROWS, DEPTH // SIZE), 1, tl.int32)
        row = start_row + tl.arange(0, ROWS)
        tile = tl.load(x + offset(row, x_stride, WRAP)[:, None] + depth[None, :], mask=(row < m)[:, None] & there, other=0)
        for walked in range(0, count, ROWS):
            row = start_row + walked + tl.arange(0, ROWS)
            following = row + ROWS
            ahead = (following < m) & (following < start_row + count)
            places = x + offset(following, x_stride, WRAP)[:, None] + depth[None, :]
            later = tl.load(places, mask=ahead[:, None] & there, other=0)
            values = tl.reshape(value16(tile, FORMAT == 2), (ROWS, DEPTH // SIZE, SIZE))
            codes, scale, holds = fast_tile(values, factors, inverses, VARIANT, SIXTH)
            hold = hold & holds.to(tl.int32)
            store_tile(codes, scale, q, scales, row, first, row < m, row < rows, k, q_words, scale_stride, SIZE, ROWS, DEPTH, 1)
            tile = later
        held = tl.min(tl.min(hold, axis=1), axis=0)
        tl.debug_barrier()  # what follows may replace the codes above
    else:
        held = 0
    if held == 0:
        for ahead_by in range(0, count, ROWS):
            row = start_row + ahead_by + tl.arange(0, ROWS)
            tile = tl.load(x + offset(row, x_stride, WRAP)[:, None] + depth[None, :], mask=(row < m)[:, None] & there, other=0)
            values = tl.reshape(value16(tile, FORMAT == 2), (ROWS, DEPTH // SIZE, SIZE))
            codes, scale, _smoothed = general_tile(
                values, factors, VARIANT, FORMAT, NUNCHAKU, RULE, NAN, SIXTH, JOIN, FLOOR, CAP, ZERO, STORED, EFFECT, FLUSH,
                AT_ZERO, TIES, SIGN, NAN_CODE, CHOICE, WIDE)
            store_tile(codes, scale, q, scales, row, first, row < m, row < rows, k, q_words, scale_stride, SIZE, ROWS, DEPTH, 0)


@triton.jit
def project_rows(  # type: ignore[no-untyped-def]
    x, smooth, down, act, start_row, begin, end, first_rank, m, rows, k, r, x_stride, act_stride, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, LORA_SMOOTHED: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """act[start_row : start_row + ROWS, first_rank : first_rank + RANKS] = x @ down over K indices begin to end, binary32."""
    row = start_row + tl.arange(0, ROWS)
    rank = first_rank + tl.arange(0, RANKS)
    start = offset(row, x_stride, WRAP)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for first in range(begin, end, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        left = tl.load(x + start[:, None] + depth[None, :], mask=(row < m)[:, None] & (depth < end)[None, :], other=0)
        right = tl.load(down + depth.to(tl.int64)[:, None] * r + rank[None, :],
                        mask=(depth < end)[:, None] & (rank < r)[None, :], other=0)
        if NATIVE:
            total = tl.dot(left, right, total)
        else:
            values = value16(left, FORMAT == 2)
            if LORA_SMOOTHED:
                factors = value16(tl.load(smooth + depth, mask=depth < k, other=0), FORMAT == 2)
                values = div(values, tl.where(depth < k, factors, 1.0)[None, :])
            total = tl.dot(values, value16(right, FORMAT == 2), total, input_precision="ieee")
    total = tl.where((row < m)[:, None], total, 0.0)  # 0 * infinity in lora_down would be NaN
    places = act + offset(row, act_stride, 0)[:, None] + rank[None, :]
    tl.store(places, total, mask=(row < rows)[:, None] & (rank < r)[None, :])


@triton.jit(do_not_specialize=["m", "rows", "splits", "q_words"])
def svdquant_kernel(  # type: ignore[no-untyped-def]
    x, smooth, inverse, down, q, scales, act, m, rows, k, r, part, splits, x_stride, q_words, scale_stride, act_stride, act_part,
    VARIANT: tl.constexpr, FORMAT: tl.constexpr, NUNCHAKU: tl.constexpr, RULE: tl.constexpr,
    NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, LORA_SMOOTHED: tl.constexpr, WRAP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):
    """One-dimensional grid; GROUP rows after each other share a run of programs: first those that project them (ROWS rows, RANKS
    ranks and `part` K indices each), then those that quantise them (WIDTH columns each, HEIGHT rows at a time). Programs of a run
    are on the chip together, so that x comes from memory once. Part i of lora_act begins at act + act_part * i. WRAP and
    LORA_SMOOTHED plant faults."""
    ranges = tl.cdiv(r, RANKS)
    projecting = (GROUP // ROWS) * splits * ranges
    run = projecting + tl.cdiv(k, WIDTH)
    start_row = tl.program_id(0) // run * GROUP
    place = tl.program_id(0) % run
    if place < projecting:
        split = place % splits
        first_rank = place // splits % ranges * RANKS
        begin = split * part
        target = act + offset(split, act_part, 0)
        project_rows(
            x, smooth, down, target, start_row + place // (splits * ranges) * ROWS, begin, tl.minimum(begin + part, k),
            first_rank, m, rows, k, r, x_stride, act_stride, FORMAT, NATIVE, LORA_SMOOTHED, WRAP, ROWS, RANKS, DEPTH)
    else:
        quantise_columns(
            x, smooth, inverse, q, scales, start_row, GROUP, (place - projecting) * WIDTH, m, rows, k, x_stride, q_words,
            scale_stride, VARIANT, FORMAT, NUNCHAKU, RULE, NAN, SIXTH, JOIN, FLOOR, CAP, ZERO, STORED, EFFECT, FLUSH, AT_ZERO,
            TIES, SIGN, NAN_CODE, CHOICE, WIDE, SIZE, FAST, WRAP, HEIGHT, WIDTH)


@triton.jit
def sum_of_parts_kernel(parts, act, count, size, r, act_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """act[i] = parts[0][i] + parts[1][i] + .., ascending, binary32; i runs over `count` places of rows of r."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(parts + place, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + tl.cast(size, tl.int64) * split + place, mask=inside, other=0)
    tl.store(act + place // r * act_stride + place % r, total, mask=inside)


@triton.jit
def invert_kernel(factors, inverse, count, FORMAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """inverse[i]: fl(1 / factors[i]), NaN where a factor is outside 2^-16 to 2^16."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = value16(tl.load(factors + place, mask=place < count, other=0), FORMAT == 2)
    usable = (factor >= 1.52587890625e-05) & (factor <= 65536.0)
    found = tl.where(usable, reciprocal(tl.where(usable, factor, 1.0)), float("nan"))
    tl.store(inverse + place, found, mask=place < count)


# Host ----------------------------------------------------------------------------------------------------------------


def inverses(smooth: torch.Tensor, *, form: int) -> torch.Tensor:
    """binary32 [K]: what `svdquant_quantize` takes as `inverse` beside smooth [K] (int16 codes of `form`)."""
    inverse = torch.empty(smooth.shape[0], dtype=torch.float32, device=smooth.device)
    invert_kernel[(triton.cdiv(smooth.shape[0], 1024),)](
        smooth, inverse, smooth.shape[0], FORMAT=form, BLOCK=1024, enable_fp_fusion=False,
    )
    return inverse


def svdquant_quantize(
    x: torch.Tensor, smooth: torch.Tensor, inverse: torch.Tensor, down: torch.Tensor, q: torch.Tensor, scales: torch.Tensor,
    act: torch.Tensor, parts: torch.Tensor | None, *, variant: str, recipe: str, form: int, native: bool, splits: int = 1,
    mutant: str = "",
) -> None:
    """Quantise x / smooth and project x, on the current stream.

    x [M, K], smooth [K], down [K, R] contiguous: int16 codes of `form` (1 binary16, 2 bf16). inverse: what `inverses` gives. q
    uint8 [rows, K / 2] packed; scales uint8 [K / 16, rows] (`variant` nvfp4) or int16 [K / 64, rows] (int4); act binary32 [rows,
    R]; rows = 256 ceil(M / 256), the last axes contiguous. `parts`: binary32 [splits, rows, R] for `splits` above 1. `native`:
    products by the matrix unit. `mutant`: a planted fault of `MUTANTS`. Raises ValueError for splits without parts and for those
    that are not whole instructions.
    """
    m, k = x.shape
    rows, r = act.shape
    target = act
    if splits > 1:
        if parts is None:
            raise ValueError(f"svdquant_quantize: got {splits} splits without parts; give `parts` of [{splits}, {rows}, {r}]")
        target = parts
    if not _whole(k, splits):
        raise ValueError(
            f"svdquant_quantize: got {splits} splits of K = {k}; expected parts of whole {_INSTRUCTION_K} k, or splits = 1")
    if rows == 0:
        return
    size = 16 if variant == "nvfp4" else 64
    lora_smoothed = mutant == "lora_of_smoothed"
    tile = _tile_of(r, native=native)
    record = NVFP4_RECIPES[recipe if variant == "nvfp4" else "svdquant"]
    matrix_unit = native and not lora_smoothed
    element = (torch.bfloat16 if form == 2 else torch.float16) if matrix_unit else torch.int16
    part = k // splits
    run = 256 // tile.rows * splits * triton.cdiv(r, tile.ranks) + triton.cdiv(k, tile.width)
    svdquant_kernel[(rows // 256 * run,)](
        x.view(element), smooth, inverse, down.view(element), q, scales, target, m,
        m if mutant == "padding_not_written" else rows, k, r, part, splits, x.stride(0), q.stride(0) // 4, scales.stride(0),
        target.stride(-2), 0 if splits == 1 else rows * r,
        VARIANT=int(variant == "int4"), FORMAT=form, NUNCHAKU=int(recipe == "nunchaku"),
        RULE=INT4_RULES[False, recipe] if variant == "int4" else 0, **flags(record), SIZE=size, FAST=int(recipe != "nunchaku"),
        NATIVE=int(matrix_unit), LORA_SMOOTHED=int(lora_smoothed), WRAP=int(mutant == "offsets_wrap"), GROUP=256, ROWS=tile.rows,
        RANKS=tile.ranks, DEPTH=tile.depth, HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.warps, num_stages=tile.stages,
        **OPTIONS,
    )
    if splits > 1:
        sum_of_parts_kernel[(triton.cdiv(rows * r, 1024),)](
            target, act, rows * r, rows * r, r, act.stride(0), SPLITS=splits, BLOCK=1024, enable_fp_fusion=False,
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes: `rows`, `ranks` and `depth` (along K) of a projecting program, `height` and `width` of a quantising
    one, `warps`, and `stages` of the loads that feed the matrix unit. `rows` and `height` divide 256."""

    rows: int
    ranks: int
    depth: int
    height: int
    width: int
    warps: int = 4
    stages: int = 3


def _tile_of(r: int, *, native: bool) -> Tile:
    """Sizes for a rank."""
    ranks = min(triton.next_power_of_2(max(r, 16)), 128)
    if not native:
        return Tile(256, ranks, 512, 256, 512, stages=1)
    return Tile(64, ranks, 64, 32, 64)


# Door ----------------------------------------------------------------------------------------------------------------

_FORMS = {"f16": 1, "bf16": 2}


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for every problem in the contract's domain (QNT-60, 61), otherwise the rule that it breaks."""
    k, r, variant = problem.dim("k"), problem.dim("r"), problem.variant
    step = 16 if variant == "nvfp4" else 64
    rules = (
        (k > 0 and k % step == 0, f"{variant} needs K a positive multiple of {step}, got {k}"),
        (r > 0 and r % 16 == 0, f"R must be a positive multiple of 16, got {r}"),
        (variant == "nvfp4" or problem.option("recipe") != "svdquant_triton", "svdquant_triton has no int4"),
    )
    return next((f"svdquant_quantize: {sentence}" for good, sentence in rules if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """Splits of K into equal parts of whole instructions and at least 256 k; first one with two projecting programs per
    multiprocessor of a large chip, each of no more than 2,048 of K."""
    rows, k = -(-problem.dim("m") // 64), problem.dim("k")
    legal = tuple(name for name, splits in SPLITS.items() if splits == 1 or (_whole(k, splits) and k >= 256 * splits))
    enough = (name for name in legal if rows * SPLITS[name] >= 256 and k <= 2048 * SPLITS[name])
    wanted = next(enough, legal[-1])
    return (wanted, *(name for name in legal if name != wanted))


def _whole(k: int, splits: int) -> bool:
    """Whether K is `splits` equal parts of whole instructions."""
    return splits == 1 or k % (splits * _INSTRUCTION_K) == 0


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """Codes and scales to the bit; lora_act as one sum over K, or as the parts that the tactic names."""
    splits = SPLITS[tactic]
    datapath = DATAPATHS[machine.datapaths[problem.option("x")]]
    main = Contraction(("x", "lora_down"), datapath, order=machine.order, splits=splits)
    return Declaration((main, cast(F32)), batch_invariant=machine.native)


def _bytes(problem: Problem) -> int:
    """Bytes of packed codes."""
    return -(-problem.dim("m") // 256) * 256 * (problem.dim("k") // 2)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """Packed codes, and the parts of lora_act where K is split."""
    splits, rows = SPLITS[tactic], -(-problem.dim("m") // 256) * 256
    return _bytes(problem) + (4 * splits * rows * problem.dim("r") if splits > 1 else 0)


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """smooth, its reciprocals, and lora_down without gaps."""
    smooth = tensor(constants["smooth"]).contiguous()
    return {
        "smooth": smooth, "inverse": inverses(smooth, form=_FORMS[problem.option("x")]),
        "down": tensor(constants["lora_down"]).contiguous(),
    }


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView], machine: Machine) -> Any:
    """The tensors as they are."""
    return activations


def run(
    problem: Problem, tactic: str, state: Mapping[str, torch.Tensor], inputs: Mapping[str, TensorView],
    outputs: Mapping[str, TensorView], workspace: TensorView, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Quantise into packed codes, then lay out one code per byte."""
    m, k, r = (problem.dim(letter) for letter in "mkr")
    if m == 0:
        return "svdquant_quantize (nothing to launch)"
    rows, splits = -(-m // 256) * 256, SPLITS[tactic]
    q = scratch(workspace, torch.uint8, (rows, k // 2))
    parts = scratch(workspace, torch.float32, (splits, rows, r), _bytes(problem)) if splits > 1 else None
    act = tensor(outputs["lora_act"]).view(torch.float32)
    svdquant_quantize(
        rows_of(inputs["x"])[0], state["smooth"], state["inverse"], state["down"], q, tensor(outputs["scales"]), act, parts,
        variant=problem.variant, recipe=problem.option("recipe"), form=_FORMS[problem.option("x")], native=machine.native,
        splits=splits, mutant=mutant,
    )
    unpack_nibbles(q, tensor(outputs["q"]), wide=not machine.native)
    return f"svdquant_quantize_{problem.variant}_{problem.option('recipe')}_{tactic}"
