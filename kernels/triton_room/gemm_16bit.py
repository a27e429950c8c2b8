"""The product of two matrices of 16-bit elements in Triton: what is left of a GEMM once its operands are decoded.

Decides: one kernel with the epilogues of gemm_nvfp4, of which `plain` without alpha is that of every other GEMM. Refuses: to
decode; the caller does, into memory that it owns.

Shapes: A [M, K] and W [N, K] bf16 or binary16, rows apart by their strides; alpha [1] binary32; lora_act [M, R], lora_up [N, R],
channel_scale [N], bias [N] and D [M, N] codes of the output format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lowbit.kernels.triton_room.blackwell_gemm_nvfp4 import BIASES, EPILOGUES, epilogue
from lowbit.kernels.triton_room.codes16 import value16
from lowbit.kernels.triton_room.gemm_tiles import OPTIONS, described, place_of, read_tile, store_tile, tiles_of_k
from lowbit.kernels.triton_room.machine import Machine

__all__ = ["Tile", "gemm_16bit", "launch", "meta", "signature", "tile_of"]


@triton.jit
def product16(left, right, total, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """total [BLOCK_M, BLOCK_N] + left [BLOCK_M, BLOCK_K] right [BLOCK_N, BLOCK_K]^T: elements under NATIVE, otherwise codes."""
    if NATIVE:
        return tl.dot(left, right.T, total)
    else:
        return tl.dot(value16(left, IS_BF16), value16(right, IS_BF16).T, total, input_precision="ieee")


@triton.jit
def gemm_16bit(  # type: ignore[no-untyped-def]
    a, w, alpha, lora_act, lora_up, channel_scale, bias, d, m, n, k, a_stride, w_stride, d_stride,
    R: tl.constexpr, EPILOGUE: tl.constexpr, ALPHA: tl.constexpr, BIAS: tl.constexpr, OPERANDS_BF16: tl.constexpr,
    IS_BF16: tl.constexpr, NATIVE: tl.constexpr, DESCRIBED: tl.constexpr, FAULT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BAND: tl.constexpr,
):
    """One tile of D per program. ALPHA = 0: alpha is not read. The others as in `blackwell_gemm_nvfp4.nvfp4_gemm`."""
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # never 0 tiles: where the loop could be skipped, ptxas may wait after every matrix instruction
    for step in range(0, tl.maximum(tiles_of_k(k, BLOCK_K, FAULT), 1)):
        left = read_tile(a, tile_m * BLOCK_M, m, step * BLOCK_K, k, a_stride, BLOCK_M, BLOCK_K, DESCRIBED, FAULT)
        right = read_tile(w, tile_n * BLOCK_N, n, step * BLOCK_K, k, w_stride, BLOCK_N, BLOCK_K, DESCRIBED, FAULT)
        total = product16(left, right, total, OPERANDS_BF16, NATIVE)
    factor = tl.load(alpha) if ALPHA else 1.0
    codes = epilogue(
        total, factor, lora_act, lora_up, channel_scale, bias, rows, m, columns, n, R, EPILOGUE, BIAS, IS_BF16, NATIVE, BLOCK_R,
        BLOCK_M, BLOCK_N, FAULT,
    )
    store_tile(d, codes, rows, m, columns, n, d_stride, FAULT)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes, `r` along the rank; `warps` and `stages` are Triton's num_warps and num_stages."""

    m: int
    n: int
    k: int = 64
    warps: int = 8
    stages: int = 4
    r: int = 32
    band: int = 8


_INTERPRETED = Tile(64, 128)
TILES: tuple[tuple[int, Tile], ...] = ((64, Tile(64, 128, 64, 4, 4)), (1 << 62, Tile(128, 256, 64, 8, 3)))
"""(largest M, tile), in ascending M: the fastest of those tried on an H200 at M = 4352 (tests/device/triton_gemms.py tune)."""


def tile_of(m: int, machine: Machine) -> Tile:
    """The tile for M rows of D."""
    return next(tile for most, tile in TILES if m <= most) if machine.native else _INTERPRETED


def launch(
    a: torch.Tensor, w: torch.Tensor, d: torch.Tensor, others: Mapping[str, torch.Tensor], *, epilogue: str, bias: str,
    operands_bf16: bool, bf16: bool, machine: Machine, fault: str = "", tile: Tile | None = None,
) -> str:
    """Compute D (int16 codes) on its device and the current stream; name the kernel. a and w int16 codes with contiguous rows;
    `others`: alpha, lora_act, lora_up, channel_scale and bias, where there are any. M = 0 launches nothing."""
    m, k, n = a.shape[0], a.shape[1], w.shape[0]
    shape = tile or tile_of(m, machine)
    if m:
        if machine.native:
            a, w = (x.view(torch.bfloat16 if operands_bf16 else torch.float16) for x in (a, w))
        left, right = described(a, shape.m, shape.k), described(w, shape.n, shape.k)
        use = machine.native and left is not None and right is not None
        pointers = {name: others.get(name, d) for name in ("alpha", "lora_act", "lora_up", "channel_scale", "bias")}
        rank = others["lora_up"].shape[1] if "lora_up" in others else 0
        gemm_16bit[(triton.cdiv(m, shape.m) * triton.cdiv(n, shape.n),)](
            left if use else a, right if use else w, **pointers, d=d, m=m, n=n, k=k,
            a_stride=a.stride(0), w_stride=w.stride(0), d_stride=d.stride(0), **meta(
                rank=rank, epilogue=epilogue, alpha="alpha" in others, bias=bias, operands_bf16=operands_bf16, bf16=bf16,
                native=machine.native, described=use, fault=fault, tile=shape,
            ), num_warps=shape.warps, num_stages=shape.stages, **OPTIONS,
        )
    return f"gemm_16bit_{epilogue}_{shape.m}x{shape.n}x{shape.k}"


def meta(
    *, rank: int, epilogue: str, alpha: bool, bias: str, operands_bf16: bool, bf16: bool, native: bool, described: bool,
    fault: str, tile: Tile,
) -> dict[str, int | str]:
    """Compile-time arguments of `gemm_16bit`."""
    return {
        "R": rank, "EPILOGUE": EPILOGUES[epilogue], "ALPHA": int(alpha), "BIAS": BIASES[bias],
        "OPERANDS_BF16": int(operands_bf16), "IS_BF16": int(bf16), "NATIVE": int(native), "DESCRIBED": int(described),
        "FAULT": fault, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "BLOCK_R": min(tile.r, triton.next_power_of_2(max(rank, 16))), "BAND": tile.band,
    }


def signature(*, operands_bf16: bool, described: bool, tile: Tile) -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation for a machine with 16-bit products."""
    element = "bf16" if operands_bf16 else "fp16"
    operands = {"a": tile.m, "w": tile.n}
    kinds = {name: f"tensordesc<{element}[{rows},{tile.k}]>" if described else f"*{element}" for name, rows in operands.items()}
    codes = dict.fromkeys(("lora_act", "lora_up", "channel_scale", "bias", "d"), "*i16")
    return {**kinds, "alpha": "*fp32", **codes, **dict.fromkeys(("m", "n", "k", "a_stride", "w_stride", "d_stride"), "i32")}
