"""svdquant_quantize in Triton: x smoothed and quantised, and projected to low rank as it was read, in one launch.

Decides: which programs quantise and which project, the split of K over programs, and the sum of the parts. Refuses: problems
outside the contract's domain. Programs that project and programs that quantise the same rows run side by side, and x reaches both
through the cache. The projection takes x before smoothing; each of its programs walks a part of K upwards. Parts of lora_act are
added in ascending order by a second kernel: no atomics, the same bits in every run.

Shapes: x [M, K], smooth [K] and lora_down [K, R] in one format, bf16 or binary16. q is written packed, [rows, K/2] bytes, the
even k in bits 0 to 3; scales [K/16, rows] e4m3 or [K/64, rows] 16-bit codes; lora_act binary32 [rows, R]. rows = 256 ceil(M /
256): from M on every output is 0. The suite's one code per byte is made of q afterwards.

Division: under svdquant x / smooth and the quotient by the scale are IEEE quotients. `fast_tile` gives their codes and scales by
near quotients (nvfp4, where nothing but a tie comes near a tie) and by pairs of reciprocals (int4), because both divisors have at
most 11 significand bits. A program of which a block does not hold does its part again by the general division.
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
from lowbit.kernels.triton_room.division import by_pair, div, near_reciprocal, reciprocal, rest_of
from lowbit.kernels.triton_room.encodings import unpack_nibbles
from lowbit.kernels.triton_room.machine import Machine, here
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


def _away(bounded: str) -> str:
    """PTX of `away_word`; `bounded` bounds a pair of binary16 numbers in register {0} by 6 * 2^-14 in m."""
    bounds = "\n".join(bounded.format(pair) for pair in "abcd")
    return f"""{{
        .reg .b32 a, b, c, d, m, n;
        mov.b32 m, 0x0E000E00;
        mov.b32 n, 0x8E008E00;
        cvt.rz.f16x2.f32 a, $3, $1;
        cvt.rz.f16x2.f32 b, $7, $5;
        cvt.rz.f16x2.f32 c, $4, $2;
        cvt.rz.f16x2.f32 d, $8, $6;
        {bounds}
        prmt.b32 a, a, b, 0x7531;
        prmt.b32 c, c, d, 0x7531;
        mad.lo.u32 b, a, 8, 0x08080808;
        mad.lo.u32 d, c, 8, 0x08080808;
        lop3.b32 a, a, b, 0x80808080, 0xE4;
        lop3.b32 c, c, d, 0x80808080, 0xE4;
        shr.u32 a, a, 4;
        lop3.b32 $0, a, c, 0x0F0F0F0F, 0xE4;
        }}"""


AWAY_80 = tl.constexpr(_away("min.f16x2 {0}, {0}, m; max.f16x2 {0}, {0}, n;"))
AWAY_86 = tl.constexpr(_away("min.xorsign.abs.f16x2 {0}, {0}, m;"))
"""What `away_word` is on NVIDIA devices, from capability 8.0 and from 8.6 on."""

WHOLE = tl.constexpr("""{
    .reg .b32 a, b;
    prmt.b32 a, $1, $2, 0x0040;
    prmt.b32 b, $3, $4, 0x0040;
    prmt.b32 a, a, b, 0x5410;
    xor.b32 $0, a, 0x88888888;
    }""")
"""What `whole_word` makes of four bytes on NVIDIA devices."""


@triton.jit
def eighths(t):  # type: ignore[no-untyped-def]
    """The elements along the last axis of [a, b, 8], eight tensors [a, b]."""
    rows: tl.constexpr = t.shape[0]
    blocks: tl.constexpr = t.shape[1]
    even, odd = tl.split(tl.reshape(t, (rows, blocks, 4, 2)))
    t04, t26 = tl.split(tl.reshape(even, (rows, blocks, 2, 2)))
    t15, t37 = tl.split(tl.reshape(odd, (rows, blocks, 2, 2)))
    t0, t4 = tl.split(t04)
    t2, t6 = tl.split(t26)
    t1, t5 = tl.split(t15)
    t3, t7 = tl.split(t37)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def greater(a, b):  # type: ignore[no-untyped-def]
    """The greater number; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greatest(t):  # type: ignore[no-untyped-def]
    """Magnitude [a, b] of the greatest of t [a, b, 8]; NaN if one is."""
    t0, t1, t2, t3, t4, t5, t6, t7 = eighths(tl.abs(t))
    return greater(greater(greater(t0, t1), greater(t2, t3)), greater(greater(t4, t5), greater(t6, t7)))


@triton.jit
def away_nibble(y):  # type: ignore[no-untyped-def]
    """int32 e2m1 code of 2^14 y, binary32, ties away from zero, bounded, the sign that of y; no NaN.

    Times 2^-126 the smallest normal number of e2m1 is that of binary32 and its subnormal numbers are binary32's, so that a
    magnitude's code is its top bits, and half of what lies below them, added, rounds.
    """
    bits = (y * 1.9259299443872359e-34).to(tl.int32, bitcast=True)  # 2^-112
    return tl.minimum(((bits & 0x7FFFFFFF) + 0x200000) >> 22, 7) | ((bits >> 28) & 8)


@triton.jit
def away_word(y, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [a, b] of the eight `away_nibble` of y [a, b, 8], the first in bits 0 to 3.

    In PTX the same in binary16, two to a register: rounded toward zero, a number stays on its side of a tie, and bits 1 to 3 of
    its upper byte are the code of its magnitude, bit 0 the half that rounds it.
    """
    t0, t1, t2, t3, t4, t5, t6, t7 = eighths(y)
    if PTX == 2:
        return tl.inline_asm_elementwise(
            AWAY_86, "=r,r,r,r,r,r,r,r,r", [t0, t1, t2, t3, t4, t5, t6, t7], dtype=tl.int32, is_pure=True, pack=1)
    elif PTX == 1:
        return tl.inline_asm_elementwise(
            AWAY_80, "=r,r,r,r,r,r,r,r,r", [t0, t1, t2, t3, t4, t5, t6, t7], dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = away_nibble(t0) | (away_nibble(t1) << 4) | (away_nibble(t2) << 8) | (away_nibble(t3) << 12)
        word |= (away_nibble(t4) << 16) | (away_nibble(t5) << 20) | (away_nibble(t6) << 24)
        return word | (away_nibble(t7) << 28)


@triton.jit
def whole_word(q, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [a, b] of eight two's complement nibbles, RNE of q [a, b, 8] of magnitude at most 7.5, the first in bits 0 to 3."""
    numbers = (q + 12582920.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23 + 8: code 0x4B400008 plus the number, no borrow from it
    t0, t1, t2, t3, t4, t5, t6, t7 = eighths(numbers)
    b0, b1, b2, b3 = t1 * 16 + t0, t3 * 16 + t2, t5 * 16 + t4, t7 * 16 + t6
    if PTX:
        return tl.inline_asm_elementwise(WHOLE, "=r,r,r,r,r", [b0, b1, b2, b3], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return ((b0 & 255) | ((b1 & 255) << 8) | ((b2 & 255) << 16) | (b3 << 24)) ^ -0x77777778


@triton.jit
def widened(words, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 [a, b, 8] of words [a, b, 4] that hold two codes each, the first below."""
    if FORMAT == 2:
        even, odd = (words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True)
    else:
        even, odd = value16(words.to(tl.int16), 0), value16((words >> 16).to(tl.int16), 0)
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 8))


@triton.jit
def fast_tile(  # type: ignore[no-untyped-def]
    low, high, low_factors, high_factors, low_rests, high_rests, VARIANT: tl.constexpr, PTX: tl.constexpr,
):
    """(int32 words of codes [rows, blocks, 2], scale codes [rows, blocks], binary32 codes of 2^64 amax [rows, blocks]) of runs of
    16 along K, of which `low` and `high` [rows, blocks, 8] are the halves: codes and scales of the recipes svdquant and
    svdquant_triton. int4: four runs make a group and bear its scale. `_factors` and `_rests`: what `inverses` gives.

    nvfp4 takes near quotients. x, s and a scale c have at most 11, 11 and 4 significand bits, so that x / s is t c, for a tie t
    of e2m1, or further from it than 2^-18 of its size; and amax / 6 likewise of a tie of ue4m3. Near quotients are within 2^-20:
    those of elements are made larger by 2^-19, so that ties become greater numbers, and an amax within 16 units in the last
    place of a tie is one. A scale of 0 counts as 2^-178: by it the least quotient is beyond 6, and that of a zero is 0.

    int4 has ties that are closer: its quotients are IEEE.
    """
    if VARIANT == 0:
        low, high = tl.fma(low, low_factors, 0.0), tl.fma(high, high_factors, 0.0)  # -0 becomes +0
    else:
        low, high = by_pair(low, low_factors, low_rests), by_pair(high, high_factors, high_rests)
    amax = greater(greatest(low), greatest(high))
    if VARIANT == 0:
        part = (amax * 2.0194839173657902e-28) * 3.365806528942984e-29  # 2^-92, 2^-92 / 6: the code begins at bit 20
        bits = part.to(tl.int32, bitcast=True)
        code = tl.minimum((bits + 0x7FFF0 + ((bits >> 15) & 32)) >> 20, 126)
        # 2^127 and 2^71 (1 - 2^-19)
        divisor = (code << 20).to(tl.float32, bitcast=True) * 1.7014118346046923e38 * 2.3611787378351952e21
        inverse = tl.expand_dims(near_reciprocal(tl.maximum(divisor, 7.888609052210118e-31), PTX), -1)  # 2^-100
        words = tl.join(away_word(low * inverse, PTX), away_word(high * inverse, PTX))
        return words, code.to(tl.uint8), amax.to(tl.int32, bitcast=True)
    else:
        groups: tl.constexpr = (low.shape[0], low.shape[1] // 4, 4)
        bits = tl.expand_dims(tl.max(tl.reshape(amax.to(tl.int32, bitcast=True), groups), axis=2), 2)
        amax = tl.reshape(tl.broadcast_to(bits, groups), (low.shape[0], low.shape[1])).to(tl.float32, bitcast=True)
        part = by_pair(amax, 0.1428571492433548, -6.38621200366174e-09) * 5.421010862427522e-20  # fl(1/7), its rest; 2^-64
        narrow = tl.minimum(part, 65504.0).to(tl.float16)
        divisor = tl.maximum(narrow.to(tl.float32) * 1.8446744073709552e19, 1073741824.0)  # 2^64; 2^30 for a group of zeros
        inverse = near_reciprocal(divisor, PTX)
        inverse, rest = tl.expand_dims(inverse, -1), tl.expand_dims(rest_of(divisor, inverse), -1)
        words = tl.join(whole_word(by_pair(low, inverse, rest), PTX), whole_word(by_pair(high, inverse, rest), PTX))
        return words, narrow.to(tl.int16, bitcast=True), amax.to(tl.int32, bitcast=True)


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
    codes, scale, q, scales, row, first, present, inside, q_stride, scale_stride, SIZE: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Codes and scales of one tile that begins at K index `first`, rows `inside` only, 0 in rows that are not `present`."""
    codes = tl.where(present[:, None, None], codes, 0)
    half = first // 2 + tl.arange(0, DEPTH // 2)
    places = q + (offset(row, q_stride, 0) * 8)[:, None] + half[None, :]
    tl.store(places, tl.reshape(packed(codes), (ROWS, DEPTH // 2)), mask=inside[:, None])
    block = first // SIZE + tl.arange(0, DEPTH // SIZE)
    places = scales + offset(block, scale_stride, 0)[None, :] + row[:, None]
    tl.store(places, tl.where(present[:, None], scale, 0), mask=inside[:, None])


@triton.jit
def step(begin, stride):  # type: ignore[no-untyped-def]
    """begin stride, neither negative, as int64: one multiplication of 32 bits."""
    return begin.to(tl.uint32).to(tl.uint64) * stride.to(tl.uint32).to(tl.uint64)


@triton.jit
def load_runs(source, begin, stride, WRAP: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Halves of RUNS runs of 16 elements of ROWS rows from `begin` on, as words [ROWS, RUNS, 4]."""
    places = source + (step(begin, stride) & 0x1FFF if WRAP else step(begin, stride))
    return (tl.reshape(tl.load(places), (ROWS, RUNS, 4)), tl.reshape(tl.load(places + 4), (ROWS, RUNS, 4)))


@triton.jit
def load_inverses(inverse, first, ROWS: tl.constexpr, RUNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Halves of RUNS runs of 16 numbers from `first` on, as [ROWS, RUNS, 8]: of every row the same."""
    place = tl.arange(0, RUNS * 8)
    places = inverse + first + place // 8 * 16 + place % 8
    low, high = tl.reshape(tl.load(places), (1, RUNS, 8)), tl.reshape(tl.load(places + 8), (1, RUNS, 8))
    return tl.broadcast_to(low, (ROWS, RUNS, 8)), tl.broadcast_to(high, (ROWS, RUNS, 8))


@triton.jit
def quantise_runs(  # type: ignore[no-untyped-def]
    low, high, low_factors, high_factors, low_rests, high_rests, target, spot, begin, q_stride, most, least,
    VARIANT: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr,
):
    """Quantise the words of rows from `begin` on and store them; (most, least) over these blocks and those before. `least` is
    of bits + 0x7FFFFFFF, of which 0 is the greatest."""
    codes, scale, bits = fast_tile(widened(low, FORMAT), widened(high, FORMAT), low_factors, high_factors, low_rests, high_rests,
                                   VARIANT, PTX)
    tl.store(target + step(begin, q_stride) * 2, tl.reshape(codes, (low.shape[0], low.shape[1] * 2)))
    tl.store(spot + begin, tl.reshape(scale, (low.shape[0] * low.shape[1],)))
    return tl.maximum(most, bits), tl.minimum(least, bits + 0x7FFFFFFF)


@triton.jit
def fast_columns(  # type: ignore[no-untyped-def]
    x, inverse, q, scales, start_row, count, first, m, rows, k, x_stride, q_stride, scale_stride, VARIANT: tl.constexpr,
    FORMAT: tl.constexpr, SIZE: tl.constexpr, WRAP: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Quantise as `quantise_columns` by `fast_tile`; 1 if every block holds, so that its codes and scale are right.

    A block holds if its amax is at most 2^60, nvfp4, or 0 or 2^-16 to 2^18, int4, where no code needs a bound. Tiles are whole:
    the last lies over the one before it, and where there are fewer rows than that the last row is there more than once. A
    thread has a run of 16 of a row. Rows are q_stride 8 bytes apart, which is what a thread has of a row of q, and is all that
    the compiler is to know: a wider store would move codes between threads.
    """
    runs: tl.constexpr = DEPTH // 16
    low_factors, high_factors = load_inverses(inverse, first, ROWS, runs)
    low_rests, high_rests = low_factors, high_factors
    if VARIANT == 1:
        low_rests, high_rests = load_inverses(inverse + k, first, ROWS, runs)
    end = tl.minimum(start_row + count, m)
    last = tl.maximum(end - ROWS, start_row)
    words = x_stride // 2
    highest = end - start_row - 1
    row = tl.minimum(tl.arange(0, ROWS), highest)
    word = tl.arange(0, DEPTH // 4)
    source = x.to(tl.pointer_type(tl.int32)) + step(row, words)[:, None] + (first // 2 + word // 4 * 8 + word % 4)[None, :]
    half = tl.arange(0, DEPTH // 8)
    target = q.to(tl.pointer_type(tl.int32)) + step(row, q_stride)[:, None] * 2 + (first // 8 + half)[None, :]
    place = tl.arange(0, ROWS * runs)
    block = (first + place % runs * 16) // SIZE
    spot = scales + offset(block, scale_stride, 0) + tl.minimum(place // runs, highest)
    most = tl.zeros((ROWS, runs), tl.int32)
    least = tl.full((ROWS, runs), 0x7FFFFFFF, tl.int32)
    first_low, first_high = load_runs(source, start_row, words, WRAP, ROWS, runs)
    second_low, second_high = load_runs(source, tl.minimum(start_row + ROWS, last), words, WRAP, ROWS, runs)
    for walked in range(start_row, end, 4 * ROWS):
        second, third, fourth = walked + ROWS, walked + 2 * ROWS, walked + 3 * ROWS
        third_low, third_high = load_runs(source, tl.minimum(third, last), words, WRAP, ROWS, runs)
        fourth_low, fourth_high = load_runs(source, tl.minimum(fourth, last), words, WRAP, ROWS, runs)
        most, least = quantise_runs(
            first_low, first_high, low_factors, high_factors, low_rests, high_rests, target, spot, tl.minimum(walked, last),
            q_stride, most, least, VARIANT, FORMAT, PTX)
        most, least = quantise_runs(
            second_low, second_high, low_factors, high_factors, low_rests, high_rests, target, spot, tl.minimum(second, last),
            q_stride, most, least, VARIANT, FORMAT, PTX)
        following = walked + 4 * ROWS
        if following < end:
            first_low, first_high = load_runs(source, tl.minimum(following, last), words, WRAP, ROWS, runs)
            second_low, second_high = load_runs(source, tl.minimum(following + ROWS, last), words, WRAP, ROWS, runs)
        most, least = quantise_runs(
            third_low, third_high, low_factors, high_factors, low_rests, high_rests, target, spot, tl.minimum(third, last),
            q_stride, most, least, VARIANT, FORMAT, PTX)
        most, least = quantise_runs(
            fourth_low, fourth_high, low_factors, high_factors, low_rests, high_rests, target, spot, tl.minimum(fourth, last),
            q_stride, most, least, VARIANT, FORMAT, PTX)
    tl.debug_barrier()  # what follows may replace what was written for a row twice
    padded = tl.minimum(start_row + count, rows)
    for empty in range(end, padded, ROWS):
        absent = empty + tl.arange(0, ROWS)
        places = q.to(tl.pointer_type(tl.int32)) + step(absent, q_stride)[:, None] * 2 + (first // 8 + half)[None, :]
        tl.store(places, tl.zeros((ROWS, DEPTH // 8), tl.int32), mask=(absent < padded)[:, None] & (half >= 0)[None, :])
        beside = empty + place // runs
        tl.store(scales + offset(block, scale_stride, 0) + beside, tl.zeros((ROWS * runs,), tl.int32), mask=beside < padded)
    tops: tl.constexpr = 0x68800000 if VARIANT == 1 else 0x7D800000  # 2^82, 2^124
    held = tl.max(tl.max(most, axis=1), axis=0) <= tops
    if VARIANT == 1:
        held = held & (tl.min(tl.min(least, axis=1), axis=0) >= -0x28800001)  # of 2^48
    return held.to(tl.int32)


@triton.jit
def quantise_columns(  # type: ignore[no-untyped-def]
    x, smooth, inverse, q, scales, start_row, count, first, m, rows, k, x_stride, q_stride, scale_stride,
    VARIANT: tl.constexpr, FORMAT: tl.constexpr, NUNCHAKU: tl.constexpr, RULE: tl.constexpr,
    NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, FAST: tl.constexpr,
    WRAP: tl.constexpr, PTX: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):
    """Quantise x[start_row : start_row + count, first : first + DEPTH], ROWS rows at a time, by the fast divisions where they
    hold."""
    held = 0
    if FAST:
        held = fast_columns(x, inverse, q, scales, start_row, count, first, m, rows, k, x_stride, q_stride, scale_stride, VARIANT,
                            FORMAT, SIZE, WRAP, PTX, ROWS, DEPTH)
        tl.debug_barrier()  # what follows may replace the codes above
    if held == 0:
        depth = first + tl.arange(0, DEPTH)
        factors = value16(tl.reshape(tl.load(smooth + depth), (1, DEPTH // SIZE, SIZE)), FORMAT == 2)
        for ahead_by in range(0, count, ROWS):
            row = start_row + ahead_by + tl.arange(0, ROWS)
            tile = tl.load(x + offset(row, x_stride, WRAP)[:, None] + depth[None, :], mask=(row < m)[:, None], other=0)
            values = tl.reshape(value16(tile, FORMAT == 2), (ROWS, DEPTH // SIZE, SIZE))
            codes, scale, _smoothed = general_tile(
                values, factors, VARIANT, FORMAT, NUNCHAKU, RULE, NAN, SIXTH, JOIN, FLOOR, CAP, ZERO, STORED, EFFECT, FLUSH,
                AT_ZERO, TIES, SIGN, NAN_CODE, CHOICE, WIDE)
            store_tile(codes, scale, q, scales, row, first, row < m, row < rows, q_stride, scale_stride, SIZE, ROWS, DEPTH)


@triton.jit
def project_rows(  # type: ignore[no-untyped-def]
    x, smooth, down, act, start_row, begin, end, first_rank, m, rows, k, r, x_stride, act_stride, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, LORA_SMOOTHED: tl.constexpr, WRAP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, DEPTH: tl.constexpr,
):
    """act[start_row : start_row + ROWS, first_rank : first_rank + RANKS] = x @ down over K indices begin to end, binary32. EVEN:
    end - begin and r are multiples of DEPTH and RANKS. Rows beyond m read the last."""
    row = start_row + tl.arange(0, ROWS)
    rank = first_rank + tl.arange(0, RANKS)
    start = offset(tl.minimum(row, m - 1), x_stride, WRAP)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for first in range(begin, end, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        left_places = x + start[:, None] + depth[None, :]
        right_places = down + depth.to(tl.int64)[:, None] * r + rank[None, :]
        if EVEN:
            left, right = tl.load(left_places), tl.load(right_places)
        else:
            left = tl.load(left_places, mask=(depth < end)[None, :], other=0)
            right = tl.load(right_places, mask=(depth < end)[:, None] & (rank < r)[None, :], other=0)
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


@triton.jit(do_not_specialize=["m", "rows", "splits", "q_stride"])
def svdquant_kernel(  # type: ignore[no-untyped-def]
    x, smooth, inverse, down, q, scales, act, m, rows, k, r, part, splits, x_stride, q_stride, scale_stride, act_stride, act_part,
    VARIANT: tl.constexpr, FORMAT: tl.constexpr, NUNCHAKU: tl.constexpr, RULE: tl.constexpr,
    NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, FAST: tl.constexpr,
    NATIVE: tl.constexpr, LORA_SMOOTHED: tl.constexpr, WRAP: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
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
            first_rank, m, rows, k, r, x_stride, act_stride, FORMAT, NATIVE, LORA_SMOOTHED, WRAP, EVEN, ROWS, RANKS, DEPTH)
    else:
        first = tl.multiple_of(tl.minimum((place - projecting) * WIDTH, k - WIDTH), 16)  # the last over the one before it
        quantise_columns(
            x, smooth, inverse, q, scales, start_row, GROUP, first, m, rows, k, x_stride, q_stride,
            scale_stride, VARIANT, FORMAT, NUNCHAKU, RULE, NAN, SIXTH, JOIN, FLOOR, CAP, ZERO, STORED, EFFECT, FLUSH, AT_ZERO,
            TIES, SIGN, NAN_CODE, CHOICE, WIDE, SIZE, FAST, WRAP, PTX, HEIGHT, WIDTH)


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
    """inverse[0, i], inverse[1, i]: fl(2^64 / factors[i]) and what it leaves, NaN where a factor is outside 2^-16 to 2^16."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = value16(tl.load(factors + place, mask=place < count, other=0), FORMAT == 2)
    usable = (factor >= 1.52587890625e-05) & (factor <= 65536.0)
    divisor = tl.where(usable, factor, 1.0) * 5.421010862427522e-20  # 2^-64
    found = reciprocal(divisor)
    tl.store(inverse + place, tl.where(usable, found, float("nan")), mask=place < count)
    tl.store(inverse + count + place, rest_of(divisor, found), mask=place < count)


# Host ----------------------------------------------------------------------------------------------------------------


def inverses(smooth: torch.Tensor, *, form: int) -> torch.Tensor:
    """binary32 [2, K]: what `svdquant_quantize` takes as `inverse` beside smooth [K] (int16 codes of `form`): 2^64 / smooth,
    rounded, and the rest."""
    inverse = torch.empty((2, smooth.shape[0]), dtype=torch.float32, device=smooth.device)
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

    x [M, K], smooth [K], down [K, R] contiguous: int16 codes of `form` (1 binary16, 2 bf16); x is copied where its rows are not
    whole words apart. inverse: what `inverses` gives. q uint8 [rows, K / 2] packed; scales uint8 [K / 16, rows] (`variant` nvfp4)
    or int16 [K / 64, rows] (int4); act binary32 [rows, R]; rows = 256 ceil(M / 256), the last axes contiguous. `parts`: binary32
    [splits, rows, R] for `splits` above 1. `native`: products by the matrix unit of an NVIDIA device. `mutant`: a planted fault
    of `MUTANTS`. Raises ValueError for splits without parts and for those that are not whole instructions.
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
    if x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.clone(memory_format=torch.contiguous_format)
    size = 16 if variant == "nvfp4" else 64
    lora_smoothed = mutant == "lora_of_smoothed"
    tile = _tile_of(k, r, native=native)
    record = NVFP4_RECIPES[recipe if variant == "nvfp4" else "svdquant"]
    matrix_unit = native and not lora_smoothed
    element = (torch.bfloat16 if form == 2 else torch.float16) if matrix_unit else torch.int16
    part = k // splits
    run = 256 // tile.rows * splits * triton.cdiv(r, tile.ranks) + triton.cdiv(k, tile.width)
    svdquant_kernel[(rows // 256 * run,)](
        x.view(element), smooth, inverse, down.view(element), q, scales, target, m,
        m if mutant == "padding_not_written" else rows, k, r, part, splits, x.stride(0), q.stride(0) // 8, scales.stride(0),
        target.stride(-2), 0 if splits == 1 else rows * r,
        VARIANT=int(variant == "int4"), FORMAT=form, NUNCHAKU=int(recipe == "nunchaku"),
        RULE=INT4_RULES[False, recipe] if variant == "int4" else 0, **flags(record), SIZE=size, FAST=int(recipe != "nunchaku"),
        NATIVE=int(matrix_unit), LORA_SMOOTHED=int(lora_smoothed), WRAP=int(mutant == "offsets_wrap"),
        PTX=_dialect(native=native), EVEN=int(part % tile.depth == 0 and r % tile.ranks == 0), GROUP=256, ROWS=tile.rows,
        RANKS=tile.ranks, DEPTH=tile.depth, HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers, **OPTIONS,
    )
    if splits > 1:
        sum_of_parts_kernel[(triton.cdiv(rows * r, 1024),)](
            target, act, rows * r, rows * r, r, act.stride(0), SPLITS=splits, BLOCK=1024, enable_fp_fusion=False,
        )


def _dialect(*, native: bool) -> int:
    """PTX that kernels may hold: 0 none, 1 that of capability 8.0, 2 that of 8.6 and later."""
    return (1 if here().name == "ampere" else 2) if native else 0


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes: `rows`, `ranks` and `depth` (along K) of a projecting program, `height` and `width` of a quantising
    one, `warps`, `stages` of the loads that feed the matrix unit, and the most `registers` of a thread. `rows` and 4 `height`
    divide 256."""

    rows: int
    ranks: int
    depth: int
    height: int
    width: int
    warps: int = 4
    stages: int = 3
    registers: int | None = None


def _tile_of(k: int, r: int, *, native: bool) -> Tile:
    """Sizes for K and a rank: the widest columns that K holds."""
    ranks = min(triton.next_power_of_2(max(r, 16)), 128)
    wide = 64 if native else 512
    width = wide if k >= wide else 64 if k >= 64 else 16
    if not native:
        return Tile(256, ranks, 512, 64, width, stages=1)
    return Tile(64, ranks, 64, 32, width, registers=96 if ranks <= 32 else 128)


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
