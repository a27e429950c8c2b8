"""gemm_int4 in Triton by int8 products: for matrix units that multiply int8 and not int4. One source for every target.

Decides: the kernel, how its operands lie, and what it declares. Refuses: the variant `half`, and problems outside gemm_int4. The
int32 sum of each group of 64 is converted to binary32 (exact: at most 64 * 8 * 8), multiplied by a_scale, then by w_scale, each
product rounded, and added to a running binary32 total, groups ascending; then the low-rank sum, channel scale, bias and one cast.

Shapes: A [M, K] and W [N, K] int8, one code per byte; a_scale [K/64, M] and w_scale [K/64, N], K first, as the quantiser writes
them; lora_act [M, R], lora_up [N, R], channel_scale [N], bias [N] and D [M, N]. lora_act and lora_up are elements of the output
format, the others its codes as int16. Scales multiply (decode direction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    F16,
    F32,
    Claim,
    Contraction,
    Declaration,
    Order,
    Problem,
    Step,
    add,
    cast,
    mul,
)
from lowbit.kernels.triton_room.codes16 import code16, value16

__all__ = ["OPTIONS", "Tile", "declaration", "int8_gemm", "launch", "meta", "refusal", "signature"]

OPTIONS = {"enable_fp_fusion": False}
"""Compiler options that decide bits: every product of the dequantisation is rounded on its own."""


@triton.jit
def group_sum(a, w, rows, m, columns, n, k, first):  # type: ignore[no-untyped-def]
    """int32 [BLOCK_M, BLOCK_N] sum of the 64 products from K index `first` on."""
    depth = first + tl.arange(0, 64)
    left = tl.load(a + rows.to(tl.int64)[:, None] * k + depth[None, :], mask=(rows < m)[:, None], other=0)
    right = tl.load(w + columns.to(tl.int64)[:, None] * k + depth[None, :], mask=(columns < n)[:, None], other=0)
    return tl.dot(left, tl.trans(right), out_dtype=tl.int32)


@triton.jit
def low_rank_sum(  # type: ignore[no-untyped-def]
    lora_act, lora_up, rows, m, columns, n, R: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """binary32 [BLOCK_M, BLOCK_N] of lora_act lora_up^T. NATIVE as in `int4_quantize.project_low_rank`."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, R, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        left = tl.load(lora_act + rows.to(tl.int64)[:, None] * R + rank[None, :],
                       mask=(rows < m)[:, None] & (rank < R)[None, :], other=0)
        right = tl.load(lora_up + columns.to(tl.int64)[:, None] * R + rank[None, :],
                        mask=(columns < n)[:, None] & (rank < R)[None, :], other=0)
        if NATIVE:
            total = tl.dot(left, tl.trans(right), total)
        else:
            total = tl.dot(value16(left, IS_BF16), tl.trans(value16(right, IS_BF16)), total, input_precision="ieee")
    return total


@triton.jit
def int8_gemm(  # type: ignore[no-untyped-def]
    a, a_scale, w, w_scale, lora_act, lora_up, channel_scale, bias, d, m, n, k64,
    R: tl.constexpr, BIAS: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """One tile of D per program, grid (M / BLOCK_M, N / BLOCK_N), rounded up. lora_act, lora_up and bias are not read where R and
    BIAS are 0."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, k64):
        part = group_sum(a, w, rows, m, columns, n, k64 * 64, group * 64).to(tl.float32)
        left = value16(tl.load(a_scale + group * m + rows, mask=rows < m, other=0), IS_BF16)
        right = value16(tl.load(w_scale + group * n + columns, mask=columns < n, other=0), IS_BF16)
        total = total + part * left[:, None] * right[None, :]
    if R != 0:
        total = total + low_rank_sum(lora_act, lora_up, rows, m, columns, n, R, IS_BF16, NATIVE, BLOCK_M, BLOCK_N, BLOCK_R)
    total = total * value16(tl.load(channel_scale + columns, mask=columns < n, other=0), IS_BF16)[None, :]
    if BIAS:
        total = total + value16(tl.load(bias + columns, mask=columns < n, other=0), IS_BF16)[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(d + rows.to(tl.int64)[:, None] * n + columns[None, :], code16(total, IS_BF16), mask=inside)


# Host ----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes, `r` along the rank."""

    m: int = 64
    n: int = 64
    r: int = 16


def signature(*, bf16: bool) -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation."""
    codes = {"a": "*i8", "a_scale": "*i16", "w": "*i8", "w_scale": "*i16"}
    low_rank = dict.fromkeys(("lora_act", "lora_up"), "*bf16" if bf16 else "*fp16")
    rest = dict.fromkeys(("channel_scale", "bias", "d"), "*i16")
    return {**codes, **low_rank, **rest, **dict.fromkeys(("m", "n", "k64"), "i32")}


def refusal(problem: Problem) -> str | None:
    """None for a problem that the kernel computes, otherwise one sentence that says what it takes."""
    if problem.op != "gemm_int4":
        return f"int8_gemm computes gemm_int4, not {problem.op}"
    n, k, r = (problem.dim(letter) for letter in "nkr")
    takes = (
        (problem.variant == "f32", f"the variant is f32, got {problem.variant}"),
        (n > 0 and n % 8 == 0, f"N is a positive multiple of 8, got N = {n}"),
        (k > 0 and k % 64 == 0, f"K is a positive multiple of 64, got K = {k}"),
        (r >= 0 and r % 16 == 0 and (r > 0) == (problem.option("lora") == "lora"),
         f"the rank is a multiple of 16, 0 without lora, got R = {r}"),
    )
    return next((f"int8_gemm: {sentence}" for good, sentence in takes if not good), None)


def declaration(problem: Problem, datapath: str = "ieee_f32", order: Order = Order.UNKNOWN) -> Declaration:
    """The program above. `datapath` and `order` are those of the low-rank products; without them the result has one answer."""
    out = BF16 if problem.option("out") == "bf16" else F16
    program: list[Contraction | Step] = [
        Contraction(("a", "w"), DATAPATHS["imma_s32"], segment=64, steps=(cast(F32), mul("a_scale"), mul("w_scale"))),
    ]
    if problem.dim("r"):
        program.append(Contraction(("lora_act", "lora_up"), DATAPATHS[datapath], order=order))
    program.append(mul("channel_scale"))
    if problem.option("bias") == "bias":
        program.append(add("bias"))
    return Declaration((*program, cast(out)), Claim.BOUNDED if problem.dim("r") else Claim.BIT_EXACT)


def meta(problem: Problem, tile: Tile, *, native: bool) -> dict[str, int]:
    """Compile-time arguments of `int8_gemm` for a problem."""
    return {
        "R": problem.dim("r"), "BIAS": int(problem.option("bias") == "bias"), "IS_BF16": int(problem.option("out") == "bf16"),
        "NATIVE": int(native), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": tile.r,
    }


def launch(problem: Problem, tensors: Mapping[str, Any], *, native: bool, tile: Tile = Tile()) -> str:
    """Compute D on the device of `tensors["d"]` and its current stream; name the kernel. M = 0 launches nothing.

    `tensors` by the names of the op, contiguous torch tensors in the layouts above: a and w int8, the others int16 codes. Raises
    ValueError for a problem outside the domain.
    """
    import torch  # here, because the kernel is compiled in environments without it

    reason = refusal(problem)
    if reason is not None:
        raise ValueError(reason)
    m, n, k = (problem.dim(letter) for letter in "mnk")
    if m:
        element = torch.bfloat16 if problem.option("out") == "bf16" else torch.float16
        low_rank = {name: tensors.get(name, tensors["d"]).view(element) for name in ("lora_act", "lora_up")}
        others = {name: tensors[name] for name in ("a", "a_scale", "w", "w_scale", "channel_scale", "d")}
        int8_gemm[(triton.cdiv(m, tile.m), triton.cdiv(n, tile.n))](
            **others, **low_rank, bias=tensors.get("bias", tensors["d"]), m=m, n=n, k64=k // 64,
            **meta(problem, tile, native=native), **OPTIONS,
        )
    return f"int8_gemm_{tile.m}x{tile.n}"
