"""Activations to int4 with one binary16 scale per 64 of K, and their low-rank projection, in Triton: one source for every target.

Decides: two kernels (`int4_quantize`, `project_low_rank`), how their operands lie, and what they declare. Refuses: recipes other
than svdquant's and groups other than 64. The recipe: scale = RNE_f16(clamp(amax / 7, 1e-12, 65504)), q = clamp(RNE(x / scale),
-8, 7) by the stored scale, x first divided by smooth[k] where there is one. The projection takes x before that division.

Bits: divisions are `tl.div_rn`, because `/` is approximate on some targets. amax is a maximum of integers, the binary32 codes of
the magnitudes: there NaN is above infinity on every target. RNE to a whole number is one binary32 addition of 1.5 * 2^23; its sum
carries the two's-complement nibble in its lowest bits. A sum of the projection belongs to one program, which walks K upwards: no
atomics, the same bits in every run.

Shapes: x [M, K], smooth [K] and lora_down [K, R] are codes of one format, bf16 or binary16; q [rows, K/2] bytes, the even k in
the low nibble; scales binary16 codes; lora_act [rows, R] binary32. Rows from M on become zero in every output. A group of zeros
has scale 0 and codes 0; one with NaN has scale NaN and any codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from lowbit.conformance.backend import DATAPATHS, EXACT_BITS, F32, Contraction, Declaration, Order, Problem, Step, cast
from lowbit.kernels.triton_room.codes16 import value16

__all__ = [
    "OPTIONS", "Tile", "declaration", "int4_quantize", "launch", "project_low_rank", "refusal", "signature",
]

OPTIONS = {"enable_fp_fusion": False}
"""Compiler options that decide bits."""


@triton.jit
def halves(words, IS_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 values of the low and of the high 16-bit code of int32 words: of even and of odd k."""
    if IS_BF16:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        return value16(words.to(tl.int16), IS_BF16), value16((words >> 16).to(tl.int16), IS_BF16)


@triton.jit
def largest_magnitude(value):  # type: ignore[no-untyped-def]
    """Per row the largest binary32 code without its sign, as int32: NaN is above infinity."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def nibbles(value, divisor):  # type: ignore[no-untyped-def]
    """int32 0 to 15, two's complement, of clamp(RNE(value / divisor), -8, 7); value [BLOCK_M, 32], divisor [BLOCK_M]."""
    quotient = tl.div_rn(value, divisor[:, None].broadcast_to(value.shape))
    whole = tl.minimum(tl.maximum(quotient, -8.0), 7.0) + 12582912.0  # 1.5 * 2^23, whose code is 0x4B400000
    return whole.to(tl.int32, bitcast=True) & 15


@triton.jit
def int4_quantize(  # type: ignore[no-untyped-def]
    x, smooth, q, scales, m, rows, k64, group_stride, row_stride,
    SMOOTH: tl.constexpr, IS_BF16: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr,
):
    """BLOCK_M rows and GROUPS groups of 64 per program, grid (rows / BLOCK_M, K/64 / GROUPS), both rounded up. The scale of row i
    and group j is scales[j * group_stride + i * row_stride]. SMOOTH = 0: smooth is not read. x and smooth are read as int32 words
    of two neighbours along K: no tile is ever transposed, and no load has a stride."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = row.to(tl.int64)[:, None] * (k64 * 32)
    present, inside = (row < m)[:, None], (row < rows)[:, None]
    first = tl.program_id(1) * GROUPS
    for group in range(first, tl.minimum(first + GROUPS, k64)):
        pair = group * 32 + tl.arange(0, 32)
        even, odd = halves(tl.load(x + start + pair[None, :], mask=present, other=0), IS_BF16)
        if SMOOTH:
            low, high = halves(tl.load(smooth + pair), IS_BF16)
            even = tl.where(present, tl.div_rn(even, low[None, :].broadcast_to(even.shape)), 0.0)
            odd = tl.where(present, tl.div_rn(odd, high[None, :].broadcast_to(odd.shape)), 0.0)
        magnitude = tl.maximum(largest_magnitude(even), largest_magnitude(odd))
        seventh = tl.div_rn(magnitude.to(tl.float32, bitcast=True), tl.full((BLOCK_M,), 7.0, tl.float32))
        bounded = tl.minimum(tl.maximum(seventh, 1e-12), 65504.0)
        scale = tl.where(magnitude > 0x7F800000, seventh, bounded).to(tl.float16)
        divisor = tl.where(magnitude == 0, 1.0, scale.to(tl.float32))
        packed = (nibbles(even, divisor) | nibbles(odd, divisor) << 4).to(tl.uint8)
        tl.store(q + start + pair[None, :], packed, mask=inside)
        tl.store(scales + group * group_stride + row * row_stride, scale.to(tl.int16, bitcast=True), mask=row < rows)


@triton.jit
def project_low_rank(  # type: ignore[no-untyped-def]
    x, lora_down, lora_act, m, rows, k, r,
    IS_BF16: tl.constexpr, NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One tile of lora_act per program, grid (rows / BLOCK_M, R / BLOCK_R), rounded up. x and lora_down have their float type, so
    that matrix units load them without a detour. NATIVE: products of 16-bit operands by the matrix unit; otherwise of their
    binary32 values, which every target and the interpreter can do."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first in range(0, k, BLOCK_K):
        depth = first + tl.arange(0, BLOCK_K)
        left = tl.load(x + row.to(tl.int64)[:, None] * k + depth[None, :],
                       mask=(row < m)[:, None] & (depth < k)[None, :], other=0)
        right = tl.load(lora_down + depth.to(tl.int64)[:, None] * r + rank[None, :],
                        mask=(depth < k)[:, None] & (rank < r)[None, :], other=0)
        if NATIVE:
            total = tl.dot(left, right, total)
        else:
            total = tl.dot(value16(left, IS_BF16), value16(right, IS_BF16), total, input_precision="ieee")
    total = tl.where((row < m)[:, None], total, 0.0)  # 0 * infinity in lora_down would be NaN
    inside = (row < rows)[:, None] & (rank < r)[None, :]
    tl.store(lora_act + row.to(tl.int64)[:, None] * r + rank[None, :], total, mask=inside)


# Host ----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes: `m` and `groups` of the quantiser; `m`, `r` and `k` of the projection."""

    m: int = 32
    groups: int = 4
    r: int = 16
    k: int = 64


def signature(kernel: str, *, bf16: bool) -> dict[str, str]:
    """Types of the run-time arguments of a kernel in their order, for an ahead-of-time compilation."""
    if kernel == "int4_quantize":
        sizes = dict.fromkeys(("m", "rows", "k64", "group_stride", "row_stride"), "i32")
        return {"x": "*i32", "smooth": "*i32", "q": "*u8", "scales": "*i16", **sizes}
    operand = "*bf16" if bf16 else "*fp16"
    return {"x": operand, "lora_down": operand, "lora_act": "*fp32", **dict.fromkeys(("m", "rows", "k", "r"), "i32")}


def refusal(problem: Problem) -> str | None:
    """None for a problem that the kernels compute, otherwise one sentence that says what they take."""
    if problem.op not in ("int4_quantize", "svdquant_quantize"):
        return f"int4_quantize computes int4_quantize and svdquant_quantize, not {problem.op}"
    k = problem.dim("k")
    takes = [
        (problem.option("recipe") == "svdquant", f"the recipe is svdquant, got {problem.option('recipe')}"),
        (problem.option("x") in ("bf16", "f16"), f"x is bf16 or f16, got {problem.option('x')}"),
        (k > 0 and k % 64 == 0, f"K is a positive multiple of 64, got K = {k}"),
    ]
    if problem.op == "svdquant_quantize":
        r = problem.dim("r")
        takes += [(problem.variant == "int4", f"the variant is int4, got {problem.variant}"),
                  (r > 0 and r % 16 == 0, f"the rank is a positive multiple of 16, got R = {r}")]
    else:
        takes += [(problem.variant == "sym", f"the variant is sym, got {problem.variant}"),
                  (problem.dim("g") == 64, f"the group is 64, got {problem.dim('g')}")]
    return next((f"int4_quantize: {sentence}" for good, sentence in takes if not good), None)


def declaration(problem: Problem, datapath: str = "ieee_f32", order: Order = Order.UNKNOWN) -> Declaration:
    """Codes and scales to the bit; lora_act as one sum over K by the datapath of the unit that multiplies. The default holds for
    every unit that sums in binary32."""
    if problem.op == "int4_quantize":
        return EXACT_BITS
    program: tuple[Contraction | Step, ...] = (Contraction(("x", "lora_down"), DATAPATHS[datapath], order=order), cast(F32))
    return Declaration(program)


def launch(problem: Problem, tensors: Mapping[str, Any], *, native: bool, tile: Tile = Tile()) -> str:
    """Fill q, scales and, for svdquant_quantize, lora_act on the device of the tensors and its current stream; name the kernels.

    `tensors` by the names of the op, contiguous torch tensors: x, smooth, lora_down and scales as int16 codes, q as packed uint8,
    lora_act float32; x and smooth begin at a multiple of 4 bytes. int4_quantize: x [N, K], q [N, K/2], scales [N, K/64].
    svdquant_quantize: rows = 256 ceil(M / 256), scales [K/64, rows]. Without a row nothing is launched. `native` as in
    `project_low_rank`. Raises ValueError for a problem outside the domain.
    """
    import torch  # here, because the kernels are compiled in environments without it

    reason = refusal(problem)
    if reason is not None:
        raise ValueError(reason)
    smoothed = problem.op == "svdquant_quantize"
    k, bf16 = problem.dim("k"), int(problem.option("x") == "bf16")
    m = problem.dim("m" if smoothed else "n")
    rows = -(-m // 256) * 256 if smoothed else m
    if rows == 0:
        return "none"
    x = tensors["x"].view(torch.int32)
    smooth = tensors["smooth"].view(torch.int32) if smoothed else x
    strides = (rows, 1) if smoothed else (1, k // 64)
    int4_quantize[(triton.cdiv(rows, tile.m), triton.cdiv(k // 64, tile.groups))](
        x, smooth, tensors["q"], tensors["scales"], m, rows, k // 64, *strides,
        SMOOTH=int(smoothed), IS_BF16=bf16, BLOCK_M=tile.m, GROUPS=tile.groups, **OPTIONS,
    )
    if not smoothed:
        return "int4_quantize"
    r, element = problem.dim("r"), torch.bfloat16 if bf16 else torch.float16
    project_low_rank[(triton.cdiv(rows, tile.m), triton.cdiv(r, tile.r))](
        tensors["x"].view(element), tensors["lora_down"].view(element), tensors["lora_act"], m, rows, k, r,
        IS_BF16=bf16, NATIVE=int(native), BLOCK_M=tile.m, BLOCK_R=tile.r, BLOCK_K=tile.k, **OPTIONS,
    )
    return "int4_quantize+project_low_rank"
