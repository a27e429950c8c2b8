"""gemm_w4a16 in Triton: f16 or bf16 activations and 4-bit weights, rounded to the format of the activations group by group.

Decides: "whole" and "splitN" decode weights where they are multiplied, over the whole of K or over N equal parts of it whose
binary32 sums are added by a second kernel, parts ascending; "decoded" writes the weights into the workspace and multiplies them
by `gemm_16bit`. All have one weight, W = RNE((q - z) s), or RNE(RNE(q s) - RNE(z s)) for `zpafter`: q - z is an exact difference
of two numbers of the format (128 + q and 128 + z in bf16, 1024 + in binary16), the products are the format's own. Groups need not
match K tiles: every quarter of a block of 128 k looks its groups up. The dispatch takes its tactic by M, so that rows have the
same bits whatever M is under one tactic only. Refuses: problems outside gemm_w4a16.

Weights are the left operand, which comes from registers: D^T [BLOCK_N, BLOCK_M] is what accumulates. One product per block of
128 k, and nothing else touches the sum: only then do Triton and ptxas leave its instructions in flight (after a second product in
the loop Triton waits; where the loop could be skipped, ptxas may, after every instruction). The next weights are loaded and taken
apart meanwhile, and made when the instructions are done (`settled`); then the matrix unit has other programs and warp groups.

Shapes: A [M, K]; W [ceil(K/128), N, 32] int16, so that a tile is one piece of memory: word j of a block of 128 k holds k = j,
32 + j, 64 + j and 96 + j, the first in bits 0 to 3, so that two words in a register are four pairs of neighbours; scales [K/G, N]
int32: the code of a scale in bits 0 to 15, the zero point above, so that one copy of 4 bytes brings both; bias [N] and D [M, N];
A, bias and D are codes of the format of the activations. Scales multiply (decode direction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    F16,
    F32,
    Contraction,
    Declaration,
    Problem,
    Step,
    TensorView,
    add,
    cast,
)
from lowbit.kernels.triton_room import gemm_16bit
from lowbit.kernels.triton_room.codes16 import code16, value16
from lowbit.kernels.triton_room.gemm_tiles import (
    BIASES,
    OPTIONS,
    SHARED_FAULTS,
    described,
    end,
    offsets,
    place_of,
    read_tile,
    speaks_ptx,
    store_tile,
)
from lowbit.kernels.triton_room.machine import Machine, here
from lowbit.kernels.triton_room.memory import rows_of, scratch, tensor

__all__ = [
    "MUTANTS", "OPS", "Tile", "decode", "decode_w4a16", "declaration", "dialect", "gemm_w4a16", "launch", "meta", "pack",
    "pack_scales", "prepare", "run", "signature", "splits_of", "stage", "tactics", "tactics_of", "tile_of", "unsupported",
    "w4a16_gemm", "workspace",
]

OPS = ("gemm_w4a16",)
MUTANTS = (*SHARED_FAULTS, "one_scale_per_tile", "zero_offset")

_OUT = {"bf16": BF16, "f16": F16}
_ZEROS = {"sym": 0, "zp": 1, "zpafter": 2}
_BLOCK = 128


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def unpacked(words, IS_BF16: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The four nibbles of int16 words, lowest first: int16 0 to 15, or under PTX elements of the format with value 128 + q (bf16)
    or 1024 + q, two words at a time in one register."""
    if PTX:
        if IS_BF16:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 x;
                lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 x, $4, 4;
                lop3.b32 $1, x, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 x, $4, 8;
                lop3.b32 $2, x, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 x, $4, 12;
                lop3.b32 $3, x, 0x000F000F, 0x43004300, 0xEA;
                }""", "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 x;
                lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 x, $4, 4;
                lop3.b32 $1, x, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 x, $4, 8;
                lop3.b32 $2, x, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 x, $4, 12;
                lop3.b32 $3, x, 0x000F000F, 0x64006400, 0xEA;
                }""", "=r,=r,=r,=r,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=2)
    else:
        return words & 15, (words >> 4) & 15, (words >> 8) & 15, (words >> 12) & 15


@triton.jit
def weights(  # type: ignore[no-untyped-def]
    q, words, ZERO: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr, FAULT: tl.constexpr
):
    """Weights of what `unpacked` gives and of int32 words, the code of a scale below and a zero point above: elements of the
    format under NATIVE, otherwise their binary32 values."""
    scale, zero = words.to(tl.int16), (words >> 16).to(tl.int16)
    if FAULT == "zero_offset":
        zero -= 1
    if NATIVE:
        if IS_BF16:
            code = q if PTX else (q | 0x4300).to(tl.bfloat16, bitcast=True)
            base, factor = (zero | 0x4300).to(tl.bfloat16, bitcast=True), scale.to(tl.bfloat16, bitcast=True)
        else:
            code = q if PTX else (q | 0x6400).to(tl.float16, bitcast=True)
            base, factor = (zero | 0x6400).to(tl.float16, bitcast=True), scale.to(tl.float16, bitcast=True)
        if ZERO == 2:
            nothing: tl.constexpr = 128.0 if IS_BF16 else 1024.0
            return (code - nothing) * factor - (base - nothing) * factor
        else:
            return (code - base) * factor
    else:
        factor = value16(scale, IS_BF16)
        if ZERO == 2:
            first = value16(code16(q.to(tl.float32) * factor, IS_BF16), IS_BF16)
            second = value16(code16(zero.to(tl.float32) * factor, IS_BF16), IS_BF16)
            return value16(code16(first - second, IS_BF16), IS_BF16)
        else:
            return value16(code16((q - zero).to(tl.float32) * factor, IS_BF16), IS_BF16)


@triton.jit
def words_of(  # type: ignore[no-untyped-def]
    scales, n, k, block, quarter: tl.constexpr, GROUP: tl.constexpr, FAULT: tl.constexpr
):
    """Words of scales and zero points of one quarter of a block of 128 k: [BLOCK_N, 1] where its 32 k lie in one group, otherwise
    [BLOCK_N, 32]. `scales`: pointers [BLOCK_N] into the first group. GROUP: k of a group, 0 for all of K. Beyond K the last group
    stands in. One column is a load of its own shape: it leaves the layout of the codes alone."""
    if GROUP == 0:
        return tl.load(scales + offsets(block * 128 // k, n, FAULT))[:, None]
    elif GROUP >= 128 or FAULT == "one_scale_per_tile":
        return tl.load(scales + offsets(block * 128 // GROUP, n, FAULT))[:, None]
    elif GROUP >= 32:
        group = tl.minimum(block * (128 // GROUP) + 32 * quarter // GROUP, k // GROUP - 1)
        return tl.load(scales + offsets(group, n, FAULT))[:, None]
    else:
        group = tl.minimum((block * 128 + 32 * quarter + tl.arange(0, 32)) // GROUP, k // GROUP - 1)
        return tl.load(scales[:, None] + offsets(group, n, FAULT)[None, :])


@triton.jit
def quarter_of(  # type: ignore[no-untyped-def]
    q, words, block, k, quarter: tl.constexpr, ZERO: tl.constexpr, RAGGED: tl.constexpr, IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr, PTX: tl.constexpr, FAULT: tl.constexpr,
):
    """Weights [BLOCK_N, 32] of one quarter of a block of 128 k. RAGGED: 0 beyond K."""
    weight = weights(q, words, ZERO, IS_BF16, NATIVE, PTX, FAULT)
    if RAGGED:
        return tl.where((block * 128 + 32 * quarter + tl.arange(0, 32) < k)[None, :], weight, 0.0)
    else:
        return weight


@triton.jit
def settled(words, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 `words`, under PTX = 2 once no matrix instruction of the warp group is unfinished.

    The weights made of them take the registers from which the instructions of the block before have their left operand. Triton
    3.6 lets them: it waits for the first of eight groups of instructions only (PTX ISA, wgmma.wait_group; wrong sums on an H200).
    """
    if PTX == 2:
        return tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return words


@triton.jit
def visible(words, PTX: tl.constexpr, DESCRIBED: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 `words` of a block, under PTX = 2 once its tile of A is visible to matrix instructions, where the copy engine did not
    bring it (PTX ISA, async proxy). The words were copied with it: this comes after the barrier behind both."""
    if PTX == 2 and not DESCRIBED:
        return tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return words


@triton.jit
def block_of(  # type: ignore[no-untyped-def]
    w, scales, n, k, block, ZERO: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr, PTX: tl.constexpr, DESCRIBED: tl.constexpr, FAULT: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Weights [BLOCK_N, 128] of a block of 128 k, its quarters side by side: elements under NATIVE, otherwise binary32 values.
    `w`, `scales`: pointers [BLOCK_N, 32] into the first block and [BLOCK_N] into the first group. Words of scales are loaded anew
    where a quarter begins a group."""
    q0, q1, q2, q3 = unpacked(tl.load(w + offsets(block, n, FAULT) * 32), IS_BF16, PTX)
    s0 = settled(visible(words_of(scales, n, k, block, 0, GROUP, FAULT), PTX, DESCRIBED), PTX)
    s1, s2, s3 = s0, s0, s0
    if GROUP > 0 and GROUP < 128 and FAULT != "one_scale_per_tile":
        s2 = settled(words_of(scales, n, k, block, 2, GROUP, FAULT), PTX)
        s1, s3 = s0, s2
        if GROUP < 64:
            s1 = settled(words_of(scales, n, k, block, 1, GROUP, FAULT), PTX)
            s3 = settled(words_of(scales, n, k, block, 3, GROUP, FAULT), PTX)
    w0 = quarter_of(q0, s0, block, k, 0, ZERO, RAGGED, IS_BF16, NATIVE, PTX, FAULT)
    w1 = quarter_of(q1, s1, block, k, 1, ZERO, RAGGED, IS_BF16, NATIVE, PTX, FAULT)
    w2 = quarter_of(q2, s2, block, k, 2, ZERO, RAGGED, IS_BF16, NATIVE, PTX, FAULT)
    w3 = quarter_of(q3, s3, block, k, 3, ZERO, RAGGED, IS_BF16, NATIVE, PTX, FAULT)
    return tl.join(tl.join(w0, w1), tl.join(w2, w3)).permute(0, 3, 2, 1).reshape(BLOCK_N, 128)


@triton.jit
def product16(left, right, total, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """total [BLOCK_N, BLOCK_M] + left [BLOCK_N, 128] right [BLOCK_M, 128]^T; without NATIVE, right is codes."""
    if NATIVE:
        return tl.dot(left, right.T, total)
    else:
        return tl.dot(left, value16(right, IS_BF16).T, total, input_precision="ieee")


@triton.jit
def w4a16_gemm(  # type: ignore[no-untyped-def]
    a, w, scales, bias, d, partial, m, n, k, a_stride, d_stride,
    SPLITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr,
    IS_BF16: tl.constexpr, NATIVE: tl.constexpr, PTX: tl.constexpr, DESCRIBED: tl.constexpr, FAULT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):
    """One tile of D and one part of K per program, grid (tiles, SPLITS). GROUP: k of a group, 0 for all of K. SPLITS > 1:
    binary32 sums go to `partial` [SPLITS, M, N] and bias and d are left alone. Columns beyond N repeat the last one and are not
    stored."""
    tile_n, tile_m = place_of(tl.program_id(0), tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M), BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = k // 128 if FAULT == "tail_skipped" else tl.cdiv(k, 128)
    share = tl.maximum(blocks // SPLITS, 1)  # never below: the compiler is to see that the loop is not skipped
    within = tl.minimum(columns, n - 1)
    words, scale_words = w + offsets(within, 32, FAULT)[:, None] + tl.arange(0, 32)[None, :], scales + within
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(0, share):
        block = tl.program_id(1) * share + step
        left = block_of(words, scale_words, n, k, block, ZERO, GROUP, RAGGED, IS_BF16, NATIVE, PTX, DESCRIBED, FAULT, BLOCK_N)
        right = read_tile(a, tile_m * BLOCK_M, m, block * 128, k, a_stride, BLOCK_M, 128, DESCRIBED, FAULT)
        total = product16(left, right, total, IS_BF16, NATIVE)
    if SPLITS == 1:
        codes = end(total.T, bias, columns, m, n, BIAS, 2 if IS_BF16 else 1, FAULT)
        store_tile(d, codes, rows, m, columns, n, d_stride, FAULT)
    else:
        part = partial + tl.program_id(1).to(tl.int64) * m * n
        store_tile(part, total.T, rows, m, columns, n, n, FAULT)


@triton.jit
def add_splits(  # type: ignore[no-untyped-def]
    partial, bias, d, m, n, d_stride, SPLITS: tl.constexpr, BIAS: tl.constexpr, IS_BF16: tl.constexpr, FAULT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row and BLOCK_N columns per program: the sum of SPLITS parts, ascending, then bias and cast."""
    rows, columns = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = read_tile(partial, tl.program_id(0), m, tl.program_id(1) * BLOCK_N, n, n, 1, BLOCK_N, False, FAULT)
    for part in tl.static_range(1, SPLITS):
        base = partial + tl.full((), part, tl.int64) * m * n
        total = total + read_tile(base, tl.program_id(0), m, tl.program_id(1) * BLOCK_N, n, n, 1, BLOCK_N, False, FAULT)
    store_tile(d, end(total, bias, columns, m, n, BIAS, 2 if IS_BF16 else 1, FAULT), rows, m, columns, n, d_stride, FAULT)


@triton.jit
def decode_w4a16(  # type: ignore[no-untyped-def]
    w, scales, decoded, n, k, ZERO: tl.constexpr, GROUP: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr,
    PTX: tl.constexpr, FAULT: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Codes (without NATIVE) or elements [N, K] of the weights; one block of 128 k and BLOCK_N rows per program."""
    block, columns = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.minimum(columns, n - 1)
    part = w + offsets(block, n, FAULT) * 32 + offsets(within, 32, FAULT)[:, None] + tl.arange(0, 32)[None, :]
    quarters = unpacked(tl.load(part), IS_BF16, PTX)
    for quarter in tl.static_range(4):
        words = words_of(scales + within, n, k, block, quarter, GROUP, FAULT)
        found = weights(quarters[quarter], words, ZERO, IS_BF16, NATIVE, PTX, FAULT)
        if not NATIVE:
            found = code16(found, IS_BF16)
        depth = block * 128 + 32 * quarter + tl.arange(0, 32)
        inside = (columns < n)[:, None] & (depth < k)[None, :]
        tl.store(decoded + offsets(columns, k, FAULT)[:, None] + depth[None, :], found, mask=inside)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes; `warps` and `stages` are Triton's num_warps and num_stages. `described`: A comes by descriptors, where
    its memory allows them."""

    m: int
    n: int
    warps: int = 4
    stages: int = 4
    described: bool = True
    band: int = 8


_INTERPRETED = Tile(64, 128)
TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile(16, 128)), (32, Tile(32, 128)), (64, Tile(64, 128)), (128, Tile(128, 128, 8)), (1 << 62, Tile(256, 128, 8, 3)),
)
"""(largest M, tile), in ascending M. Sizes, warps and stages: the fastest of those tried on an H200 (tests/device/triton_gemms.py
tune) or within a tenth of it. A comes by the copy engine: by pointers, with the fence that those need, up to 16 rows took from a
twentieth less to a tenth more."""
DECODED = gemm_16bit.Tile(256, 128)
"""The tile of the product of decoded weights, found likewise."""

_SPLITS = (1, 2, 4, 8)
_LONGEST: tuple[tuple[int, int], ...] = ((32, 3072), (64, 6144))
"""(largest M, longest part of K): up to 64 rows weights are what there is to read, and parts of so much bring enough of them at
once. On an H200 these were within a tenth of the fastest of 2, 4 and 8 parts."""
_SPLIT_ROWS = 512
"""Rows beyond which K is not split: the tiles of D are enough programs."""
_FILLED = 0.8
"""Share of their rounds of the device that the programs of 65 to 512 rows are to fill: on an H200, further parts of K cost more
in adding them than they filled."""
_MULTIPROCESSORS = 132


def tile_of(m: int, machine: Machine) -> Tile:
    """The tile for M rows of D."""
    return next(tile for most, tile in TILES if m <= most) if machine.native else _INTERPRETED


def splits_of(m: int, n: int, k: int, machine: Machine) -> int:
    """Equal parts of K, each whole blocks, that the dispatch takes. Up to 64 rows the fewest that are within `_LONGEST` and that
    give every multiprocessor a program, otherwise the most; up to 512 the fewest whose programs fill four fifths of their rounds
    of the device, otherwise those that fill most; beyond, and for M = 0, 1."""
    fit = [parts for parts in _SPLITS if 0 < m <= _SPLIT_ROWS and k % (parts * _BLOCK) == 0]
    shape = tile_of(m, machine)
    programs = -(-m // shape.m) * -(-n // shape.n)
    longest = next((length for most, length in _LONGEST if m <= most), 0)
    if longest:
        enough = (parts for parts in fit if k // parts <= longest and programs * parts >= _MULTIPROCESSORS)
        return next(enough, max(fit, default=1))
    filled = {parts: programs * parts / (-(-programs * parts // _MULTIPROCESSORS) * _MULTIPROCESSORS) for parts in fit}
    return next((parts for parts in fit if filled[parts] >= _FILLED), max(fit, key=lambda parts: filled[parts], default=1))


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for a problem that the kernels compute, otherwise one sentence that says what they take."""
    n, k, g = (problem.dim(letter) for letter in "nkg")
    takes = (
        (n > 0 and n % 8 == 0, f"N is a positive multiple of 8, got N = {n}"),
        (k > 0 and k % 8 == 0, f"K is a positive multiple of 8, got K = {k}"),
        (g > 0 and k % max(g, 1) == 0 and (g == k or g in (16, 32, 64, 128, 256)),
         f"G divides K and is 16, 32, 64, 128, 256 or K, got G = {g}, K = {k}"),
    )
    return next((f"gemm_w4a16: {sentence}" for good, sentence in takes if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """The dispatch's choice first."""
    return tactics_of(problem.dim("m"), problem.dim("n"), problem.dim("k"), machine)


def tactics_of(m: int, n: int, k: int, machine: Machine) -> tuple[str, ...]:
    """The dispatch's choice first; "whole" and "decoded" take every problem. The choice depends on M: batch invariance, which
    `declaration` says, is that of a tactic, not of the dispatch."""
    splits = splits_of(m, n, k, machine)
    return (*((f"split{splits}",) if splits > 1 else ()), "whole", "decoded")


def _splits(tactic: str, k: int) -> int:
    """Parts of K under a tactic. Raises ValueError where K is not that many parts of whole blocks."""
    splits = int(tactic.removeprefix("split")) if tactic.startswith("split") else 1
    if splits > 1 and k % (splits * _BLOCK):
        raise ValueError(f"gemm_w4a16: tactic {tactic} takes K a multiple of {splits * _BLOCK}, got K = {k}; take whole")
    return splits


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """One sum of the rounded weights, or several parts of it."""
    name, bias = problem.option("out"), problem.option("bias")
    out = _OUT[name]
    path, splits = DATAPATHS[machine.datapaths[name]], _splits(tactic, problem.dim("k"))
    main = Contraction(("a", "w"), path, order=machine.order, splits=splits)
    before: tuple[Step, ...] = (add("bias"),) if bias == "bias" else ()
    after: tuple[Step, ...] = (add("bias", format=out), cast(out)) if bias == "biasafter" else ()
    return Declaration((main, cast(F32), *before, cast(out), *after), batch_invariant=machine.native)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """"decoded": W in 16 bits; "splitN": the binary32 sums of N parts."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    if tactic == "decoded":
        return 2 * n * k
    splits = _splits(tactic, k)
    return 4 * splits * m * n if splits > 1 else 0


def pack_scales(scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    """[N, K/G] int16 codes of scales and uint8 zero points (without them 8) -> [K/G, N] int32 as above."""
    above = 8 if zero is None else zero.to(torch.int32)
    return ((scale.to(torch.int32) & 0xFFFF) | above << 16).T.contiguous()


def pack(q: torch.Tensor) -> torch.Tensor:
    """[N, K] uint8 codes 0 to 15 -> [ceil(K/128), N, 32] int16 as above, 0 beyond K."""
    blocks = torch.nn.functional.pad(q, (0, -q.shape[1] % _BLOCK)).reshape(q.shape[0], -1, 4, 32).to(torch.int32)
    words = blocks[:, :, 0] | blocks[:, :, 1] << 4 | blocks[:, :, 2] << 8 | blocks[:, :, 3] << 12
    return words.to(torch.int16).transpose(0, 1).contiguous()


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """Packed weights, words of scales and zero points, and the bias."""
    found = {name: tensor(view).contiguous() for name, view in constants.items()}
    packed = {"w": pack(found["w"]), "scales": pack_scales(found["scale"], found.get("zero"))}
    return packed | {name: found[name] for name in ("bias",) if name in found}


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """A as it lies."""
    return {name: rows_of(view)[0] for name, view in activations.items()}


def run(
    problem: Problem, tactic: str, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, TensorView], workspace: Any, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Launch the kernels and name them."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    splits, memory = _splits(tactic, k), None
    if tactic == "decoded" and m:
        memory = scratch(workspace, torch.int16, (n, k))
    elif splits > 1 and m:
        memory = scratch(workspace, torch.float32, (splits, m, n))
    return launch(
        {**state, **inputs}, tensor(outputs["d"]), memory, variant=problem.variant, bias=problem.option("bias"),
        bf16=problem.option("out") == "bf16", machine=machine, fault=mutant,
    )


def gemm_w4a16(
    a: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, *, variant: str = "sym",
    bias_after: bool = False,
) -> torch.Tensor:
    """D [M, N] of the format of a [M, K]. w and scales as `pack` and `pack_scales` make them; variant as in the contract.
    Allocates the workspace of the tactic that it takes."""
    m, n, k, machine = a.shape[0], w.shape[1], a.shape[1], here()
    splits = splits_of(m, n, k, machine)
    memory = torch.empty((splits, m, n), dtype=torch.float32, device=a.device) if splits > 1 else None
    given = {"a": a, "bias": bias}
    tensors = {name: x.view(torch.int16) for name, x in given.items() if x is not None} | {"w": w, "scales": scales}
    d = torch.empty((m, n), dtype=a.dtype, device=a.device)
    launch(
        tensors, d.view(torch.int16), memory, variant=variant,
        bias="nobias" if bias is None else "biasafter" if bias_after else "bias", bf16=a.dtype is torch.bfloat16, machine=machine,
    )
    return d


def decode(
    w: torch.Tensor, scales: torch.Tensor, decoded: torch.Tensor, *, variant: str, bf16: bool, machine: Machine, fault: str = "",
) -> None:
    """int16 codes of the weights [N, K] into `decoded`."""
    n, k = decoded.shape
    g = k // scales.shape[0]
    element = torch.bfloat16 if bf16 else torch.float16
    decode_w4a16[(triton.cdiv(n, 64), triton.cdiv(k, _BLOCK))](
        w, scales, decoded.view(element) if machine.native else decoded, n, k, ZERO=_ZEROS[variant],
        GROUP=_group(k, g), IS_BF16=int(bf16), NATIVE=int(machine.native), PTX=int(speaks_ptx(machine)), FAULT=fault,
        BLOCK_N=64, num_warps=4, **OPTIONS,
    )


def dialect(machine: Machine) -> int:
    """PTX that `w4a16_gemm` may hold: 0 none, 1 that of every NVIDIA device, 2 also that of warp-group products."""
    return int(speaks_ptx(machine)) + int(machine.name == "hopper")


def _group(k: int, g: int) -> int:
    """G as `w4a16_gemm` wants it: 0 where it is K."""
    return 0 if g == k else g


def launch(
    tensors: Mapping[str, torch.Tensor], d: torch.Tensor, memory: torch.Tensor | None, *, variant: str, bias: str, bf16: bool,
    machine: Machine, fault: str = "", tile: Tile | gemm_16bit.Tile | None = None,
) -> str:
    """Compute D (int16 codes) on its device and the current stream; name the kernels. `memory` says the tactic: int16 [N, K] for
    decoded weights, float32 [splits, M, N] for parts, None for neither. `tensors`: a, w, scales and bias. M = 0 launches
    nothing."""
    a, w, scales = tensors["a"], tensors["w"], tensors["scales"]
    m, k, n = a.shape[0], a.shape[1], w.shape[1]
    g = k // scales.shape[0]
    if memory is not None and memory.dtype is torch.int16:
        decode(w, scales, memory, variant=variant, bf16=bf16, machine=machine, fault=fault)
        others = {"bias": tensors["bias"]} if "bias" in tensors else {}
        return "decode_w4a16+" + gemm_16bit.launch(
            a, memory, d, others, epilogue="plain", bias=bias, operands_bf16=bf16, bf16=bf16, machine=machine, fault=fault,
            tile=tile if isinstance(tile, gemm_16bit.Tile) else DECODED if machine.native and m > 64 else None,
        )
    shape = tile if isinstance(tile, Tile) else tile_of(m, machine)
    if g < 32 and g != k:  # a word of scales per element: room for fewer tiles
        shape = replace(shape, n=min(shape.n, 64), stages=2)
    splits = 1 if memory is None else memory.shape[0]
    if m:
        if machine.native:
            a = a.view(torch.bfloat16 if bf16 else torch.float16)
        left = described(a, shape.m, _BLOCK) if machine.native and shape.described else None
        addend = tensors.get("bias", d)
        w4a16_gemm[(triton.cdiv(m, shape.m) * triton.cdiv(n, shape.n), splits)](
            a if left is None else left, w, scales, addend, d, d if memory is None else memory, m, n, k, a.stride(0),
            d.stride(0),
            **meta(splits=splits, variant=variant, k=k, g=g, bias=bias, bf16=bf16, native=machine.native, ptx=dialect(machine),
                   described=left is not None, fault=fault, tile=shape),
            num_warps=shape.warps, num_stages=shape.stages, **OPTIONS,
        )
        if splits > 1:
            add_splits[(m, triton.cdiv(n, 1024))](
                memory, addend, d, m, n, d.stride(0), SPLITS=splits, BIAS=BIASES[bias], IS_BF16=int(bf16), FAULT=fault,
                BLOCK_N=1024, num_warps=4, **OPTIONS,
            )
    return f"w4a16_gemm_{shape.m}x{shape.n}" + (f"_split{splits}+add_splits" if splits > 1 else "")


def meta(
    *, splits: int, variant: str, k: int, g: int, bias: str, bf16: bool, native: bool, ptx: int, described: bool, fault: str,
    tile: Tile,
) -> dict[str, int | str]:
    """Compile-time arguments of `w4a16_gemm`."""
    return {
        "SPLITS": splits, "ZERO": _ZEROS[variant], "GROUP": _group(k, g), "RAGGED": int(k % _BLOCK != 0),
        "BIAS": BIASES[bias], "IS_BF16": int(bf16), "NATIVE": int(native), "PTX": ptx, "DESCRIBED": int(described),
        "FAULT": fault, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BAND": tile.band,
    }


def signature(*, bf16: bool, described: bool, splits: int, tile: Tile) -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation for a machine with 16-bit products."""
    element = "bf16" if bf16 else "fp16"
    a = f"tensordesc<{element}[{tile.m},{_BLOCK}]>" if described else f"*{element}"
    rest = {"scales": "*i32", "bias": "*i16", "d": "*i16", "partial": "*fp32" if splits > 1 else "*i16"}
    return {"a": a, "w": "*i16", **rest, **dict.fromkeys(("m", "n", "k", "a_stride", "d_stride"), "i32")}
