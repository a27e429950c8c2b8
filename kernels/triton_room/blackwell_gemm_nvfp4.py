"""gemm_nvfp4 in Triton: NVFP4 x NVFP4 by `tl.dot_scaled`, the low-rank product into the same accumulator, three epilogues.

Decides: the kernel, how its operands lie in memory, and what it declares per unit. Refuses: problems outside gemm_nvfp4 and scale
layouts it cannot tile; it never falls back. Codes are read and written by integers, because bits matter and because the CPU
interpreter rounds to bf16 wrongly. One compile-time branch, NATIVE, parts the matrix units from binary32: NATIVE multiplies
packed codes by `tl.dot_scaled`, 16-bit low-rank operands by `tl.dot`, and has FMA; without it the same tiles are decoded and
multiplied in binary32, which every device can do, and the interpreter, where dot_scaled and FMA give other bits.

Shapes: A [M, K], W [N, K], D [M, N]; two codes per byte along K, the even k in the low nibble; one ue4m3 scale per 16 of K and
row, plain [rows, K/16] or in 128x4 tiles (`swizzled`); lora_act [M, R] and lora_up [N, R]. Scales multiply (decode direction).
16-bit operands are codes of the output format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import BF16, DATAPATHS, F16, Contraction, Join, Order, Problem, Start, Step, add, cast, mul
from lowbit.kernels.triton_room.codes16 import code16, value16

__all__ = [
    "BIASES", "EPILOGUES", "OPTIONS", "TILES", "UNITS", "Tile", "Unit", "dequantised", "epilogue", "launch", "low_rank_codes",
    "meta", "nvfp4_gemm", "packed", "program", "refusal", "signature", "swizzled",
]

_OUT = {"bf16": BF16, "f16": F16}
EPILOGUES = {"plain": 0, "svdquant": 1, "nunchaku": 2}
BIASES = {"nobias": 0, "bias": 1, "biasafter": 2}

OPTIONS = {"enable_fp_fusion": False}
"""Compiler options that decide bits."""


# Codecs --------------------------------------------------------------------------------------------------------------


@triton.jit
def e2m1_value(code):  # type: ignore[no-untyped-def]
    """Value of an e2m1 code (bit 3 sign, bits 2..1 exponent, bit 0 fraction) in binary32, from its integer number of halves."""
    exponent = (code >> 1) & 3
    halves = tl.where(exponent == 0, code & 1, (2 + (code & 1)) << tl.where(exponent == 0, 0, exponent - 1))
    magnitude = halves.to(tl.float32) * 0.5
    return tl.where(code >= 8, -magnitude, magnitude)


@triton.jit
def ue4m3_value(code):  # type: ignore[no-untyped-def]
    """Value of a ue4m3 code (bits 6..3 exponent, bias 7; bits 2..0 fraction) in binary32; 0x7F is NaN. Bit 7 is not read."""
    bits = (code & 0x7F).to(tl.uint32)
    exponent = bits >> 3
    significand = tl.where(exponent == 0, bits, 8 + (bits & 7)).to(tl.float32)
    power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)  # 2^(exponent - 10)
    nan = tl.full(bits.shape, 0x7FC00000, tl.uint32).to(tl.float32, bitcast=True)
    return tl.where(bits == 0x7F, nan, significand * power)


@triton.jit
def fma16(x, y, z, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 code of x * y + z, rounded once to the format of the three codes.

    Without the instruction: the product is exact in binary64; so is the sum, unless one term is far below the other. Far below z
    it changes nothing, z being a value of the format. Far below the product only the sign of z counts, so z is raised to 2^-30 of
    the product, below the product's own 16 bits (of f16's 22-bit products only those beyond its range are so far above a z)."""
    if NATIVE:
        if IS_BF16:
            terms = (x.to(tl.bfloat16, bitcast=True), y.to(tl.bfloat16, bitcast=True), z.to(tl.bfloat16, bitcast=True))
        else:
            terms = (x.to(tl.float16, bitcast=True), y.to(tl.float16, bitcast=True), z.to(tl.float16, bitcast=True))
        return tl.fma(terms[0], terms[1], terms[2]).to(tl.int16, bitcast=True)
    else:
        product = value16(x, IS_BF16).to(tl.float64) * value16(y, IS_BF16).to(tl.float64)
        addend = value16(z, IS_BF16).to(tl.float64)
        if IS_BF16:
            least = tl.abs(product) * 9.313225746154785e-10  # 2^-30
            hidden = (tl.abs(addend) < least) & (addend != 0) & (least < float("inf"))
            addend = tl.where(hidden, tl.where(addend < 0, -least, least), addend)
        total = product + addend
        # to binary32 by rounding to odd, so that the rounding to 16 bits is the only one that counts
        single = total.to(tl.float32)
        back = single.to(tl.float64)
        bits = single.to(tl.uint32, bitcast=True)
        cut = tl.where(tl.abs(back) > tl.abs(total), bits - 1, bits) | 1
        odd = tl.where((back != total) & (total == total), cut, bits)
        return code16(odd.to(tl.float32, bitcast=True), IS_BF16)


@triton.jit
def scaled_and_biased(x, channel, bias, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x * channel + bias in binary32, x [BLOCK_M, BLOCK_N]: one rounding under NATIVE, otherwise two."""
    if NATIVE:
        return tl.fma(x, channel.broadcast_to(x.shape), bias.broadcast_to(x.shape))
    else:
        return x * channel + bias


# Tiles ---------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, column) of a tile: GROUP_M rows of tiles are walked column by column, so that neighbours share operands in L2."""
    band = index // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = index % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def code_tile(codes, rows, count, step, k, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Packed codes [rows, BLOCK_K / 2] of K block `step`; zero outside the operand."""
    columns = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    inside = (rows < count)[:, None] & (columns < k // 2)[None, :]
    return tl.load(codes + rows.to(tl.int64)[:, None] * (k // 2) + columns[None, :], mask=inside, other=0)


@triton.jit
def scale_tile(  # type: ignore[no-untyped-def]
    scales, first, count, step, k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SWIZZLED: tl.constexpr
):
    """Scale codes [ROWS, BLOCK_K / 16] of the rows from `first` on and of K block `step`; zero outside the operand.

    SWIZZLED: tiles of 128 rows x 4 scales lie one after another, K first; scale (row, j) of a tile is byte
    (row % 32) * 16 + row // 32 * 4 + j. Whole tiles are read as they lie and turned in registers."""
    if SWIZZLED:
        tl.static_assert(ROWS % 128 == 0 and BLOCK_K % 64 == 0, "a block holds whole tiles of 128 x 4 scales")
        wide = (k + 63) // 64
        across = step * (BLOCK_K // 64) + tl.arange(0, BLOCK_K // 64)
        down = first // 128 + tl.arange(0, ROWS // 128)
        starts = (down.to(tl.int64)[:, None] * wide + across[None, :]) * 512
        inside = (down * 128 < count)[:, None] & (across < wide)[None, :]
        places = starts[:, :, None] + tl.arange(0, 512)[None, None, :]
        tile = tl.load(scales + places, mask=inside[:, :, None], other=0)
        tile = tl.reshape(tile, (ROWS // 128, BLOCK_K // 64, 32, 4, 4))
        return tl.reshape(tl.trans(tile, (0, 3, 2, 1, 4)), (ROWS, BLOCK_K // 16))
    else:
        rows = first + tl.arange(0, ROWS)
        columns = step * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
        inside = (rows < count)[:, None] & (columns < k // 16)[None, :]
        return tl.load(scales + rows.to(tl.int64)[:, None] * (k // 16) + columns[None, :], mask=inside, other=0)


@triton.jit
def dequantised(codes, scales, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 values [ROWS, BLOCK_K] of packed codes and their scales; each product has 6 bits and is exact."""
    values = tl.join(e2m1_value((codes & 15).to(tl.int32)), e2m1_value((codes >> 4).to(tl.int32)))
    blocks = tl.reshape(values, (ROWS, BLOCK_K // 16, 16)) * ue4m3_value(scales)[:, :, None]
    return tl.reshape(blocks, (ROWS, BLOCK_K))


@triton.jit
def main_product(  # type: ignore[no-untyped-def]
    a, a_scale, w, w_scale, total, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NATIVE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """total [BLOCK_M, BLOCK_N] + one K block. SCALED = False leaves the block scales out: the variant that a check must catch."""
    if NATIVE:
        if SCALED:
            left, right = a_scale.to(tl.float8e4nv, bitcast=True), w_scale.to(tl.float8e4nv, bitcast=True)
            return tl.dot_scaled(a, left, "e2m1", w.T, right, "e2m1", total)
        else:
            return tl.dot_scaled(a, None, "e2m1", w.T, None, "e2m1", total)
    else:
        left, right = dequantised(a, a_scale, BLOCK_M, BLOCK_K), dequantised(w, w_scale, BLOCK_N, BLOCK_K)
        return tl.dot(left, right.T, total, input_precision="ieee")


@triton.jit
def low_rank_product(act, up, total, IS_BF16: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + act [BLOCK_M, R] up [BLOCK_N, R]^T of 16-bit codes, started from `total`: one accumulator for both products."""
    if NATIVE:
        if IS_BF16:
            return tl.dot(act.to(tl.bfloat16, bitcast=True), up.to(tl.bfloat16, bitcast=True).T, total)
        else:
            return tl.dot(act.to(tl.float16, bitcast=True), up.to(tl.float16, bitcast=True).T, total)
    else:
        return tl.dot(value16(act, IS_BF16), value16(up, IS_BF16).T, total, input_precision="ieee")


@triton.jit
def with_low_rank(  # type: ignore[no-untyped-def]
    total, lora_act, lora_up, rows, m, columns, n, R: tl.constexpr, BLOCK_R: tl.constexpr, IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """total + lora_act [M, R] lora_up [N, R]^T."""
    for start in tl.static_range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        act = tl.load(lora_act + rows.to(tl.int64)[:, None] * R + ranks[None, :],
                      mask=(rows < m)[:, None] & (ranks < R)[None, :], other=0)
        up = tl.load(lora_up + columns.to(tl.int64)[:, None] * R + ranks[None, :],
                     mask=(columns < n)[:, None] & (ranks < R)[None, :], other=0)
        total = low_rank_product(act, up, total, IS_BF16, NATIVE)
    return total


@triton.jit
def epilogue(  # type: ignore[no-untyped-def]
    total, alpha, lora_act, lora_up, channel_scale, bias, rows, m, columns, n, R: tl.constexpr, EPILOGUE: tl.constexpr,
    BIAS: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FAULT: tl.constexpr,
):
    """Codes of one tile of D from its main sum; EPILOGUE and BIAS as in `nvfp4_gemm`, FAULT as in gemm_tiles."""
    total = total * alpha
    if EPILOGUE == 1:
        total = with_low_rank(total, lora_act, lora_up, rows, m, columns, n, R, BLOCK_R, IS_BF16, NATIVE)
    if EPILOGUE != 0:
        channel = tl.load(channel_scale + columns, mask=columns < n, other=0)[None, :]
    if BIAS != 0:
        addend = tl.load(bias + columns, mask=columns < n, other=0)[None, :]
        if FAULT == "bias_dropped_at_m1":
            addend = tl.where(m == 1, tl.zeros_like(addend), addend)
    if EPILOGUE == 2:
        codes = code16(total, IS_BF16)
        if BIAS == 1:
            channel, addend = channel.broadcast_to((BLOCK_M, BLOCK_N)), addend.broadcast_to((BLOCK_M, BLOCK_N))
            codes = fma16(codes, channel, addend, IS_BF16, NATIVE)
        else:
            codes = code16(value16(codes, IS_BF16) * value16(channel, IS_BF16), IS_BF16)
        total = with_low_rank(
            value16(codes, IS_BF16), lora_act, lora_up, rows, m, columns, n, R, BLOCK_R, IS_BF16, NATIVE)
    elif EPILOGUE == 1:
        if BIAS == 1:
            total = scaled_and_biased(total, value16(channel, IS_BF16), value16(addend, IS_BF16), NATIVE)
        else:
            total = total * value16(channel, IS_BF16)
    elif BIAS == 1:
        total = total + value16(addend, IS_BF16)
    codes = code16(total, IS_BF16)
    if EPILOGUE == 0 and BIAS == 2:  # a sum of two 16-bit values keeps its rounding through binary32: 24 >= 2 * 11 + 2 bits
        codes = code16(value16(codes, IS_BF16) + value16(addend, IS_BF16), IS_BF16)
    return codes


@triton.jit
def nvfp4_gemm(  # type: ignore[no-untyped-def]
    a, a_scale, w, w_scale, lora_act, lora_up, channel_scale, bias, d, alpha, m, n8, k32,
    R: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr, IS_BF16: tl.constexpr, SWIZZLED: tl.constexpr,
    NATIVE: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile of D per program. EPILOGUE: 0 plain, 1 svdquant, 2 nunchaku; BIAS: 0 none, 1 in binary32 before the cast
    (nunchaku: by FMA in the output format), 2 in the output format after it. lora_act, lora_up, channel_scale and bias are not
    read where the epilogue has none. The sizes come as M, N / 8 and K / 32, whole by contract: so the compiler knows that rows
    are aligned. SCALED = False leaves the block scales out: a variant for the assertions on the compiled code, never launched."""
    n, k = n8 * 8, k32 * 32
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        a_scales = scale_tile(a_scale, tile_m * BLOCK_M, m, step, k, BLOCK_M, BLOCK_K, SWIZZLED)
        w_scales = scale_tile(w_scale, tile_n * BLOCK_N, n, step, k, BLOCK_N, BLOCK_K, SWIZZLED)
        total = main_product(
            code_tile(a, rows, m, step, k, BLOCK_K), a_scales, code_tile(w, columns, n, step, k, BLOCK_K), w_scales, total,
            BLOCK_M, BLOCK_N, BLOCK_K, NATIVE, SCALED,
        )
    codes = epilogue(
        total, alpha, lora_act, lora_up, channel_scale, bias, rows, m, columns, n, R, EPILOGUE, BIAS, IS_BF16, NATIVE, BLOCK_R,
        BLOCK_M, BLOCK_N, "",
    )
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(d + rows.to(tl.int64)[:, None] * n + columns[None, :], codes, mask=inside)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes, `r` along the rank. `warps` and `stages` are Triton's num_warps and num_stages."""

    m: int = 128
    n: int = 128
    k: int = 256
    r: int = 32
    warps: int = 8
    stages: int = 4  # with 128 x 128 x 256 three buffers of operands: two blocks share one SM's 227 KiB


TILES = {"default": Tile(), "small": Tile(k=128, stages=2)}
"""Tiles by name. Tensor memory holds two accumulators of `default` with their scales; `small` is for chips that keep accumulators
in registers (sm_90, sm_120). Wider tiles spill registers in the epilogue."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What multiplies: `main` and `low_rank` (by output format) name datapaths; `native` is the branch NATIVE; `ascending`,
    whether K reaches the accumulator in ascending order; `dequantised`, whether the operands become bf16 first (exactly)."""

    main: str
    low_rank: Mapping[str, str]
    native: bool
    ascending: bool = True
    dequantised: bool = False


UNITS = {
    "blackwell": Unit("blackwell_nvfp4", {"f16": "blackwell_f16", "bf16": "blackwell_bf16"}, native=True),
    "hopper": Unit("hopper_bf16", {"f16": "hopper_f16", "bf16": "hopper_bf16"}, native=True, dequantised=True),
    "binary32": Unit("ieee_f32", {"f16": "ieee_f32", "bf16": "ieee_f32"}, native=False, ascending=False),
}
"""sm_100 and sm_103; sm_90, where Triton dequantises to bf16; and the other side of NATIVE, in an order that nobody promises."""


def refusal(problem: Problem) -> str | None:
    """None for a problem that the kernel computes, otherwise one sentence that says what it takes."""
    if problem.op != "gemm_nvfp4":
        return f"nvfp4_gemm computes gemm_nvfp4, not {problem.op}"
    m, n, k, r = (problem.dim(letter) for letter in "mnkr")
    lora, bias = problem.option("lora"), problem.option("bias")
    takes = (
        (m >= 0 and n > 0 and n % 8 == 0, f"N is a positive multiple of 8, got N = {n}"),
        (k > 0 and k % 32 == 0, f"K is a positive multiple of 32, got K = {k}"),
        (r >= 0 and r % 16 == 0 and (r > 0) == (lora == "lora"), f"the rank is a multiple of 16, 0 without lora, got R = {r}"),
        (problem.variant in EPILOGUES, f"the variants are {', '.join(EPILOGUES)}, got {problem.variant}"),
        (problem.variant != "plain" or lora == "nolora", "plain has no low-rank term"),
        (problem.variant == "plain" or bias != "biasafter", "only plain adds the bias after the cast"),
    )
    return next((f"nvfp4_gemm: {sentence}" for good, sentence in takes if not good), None)


def program(problem: Problem, unit: Unit) -> tuple[Contraction | Step, ...]:
    """What the kernel computes: the low-rank product starts from the value reached. Channel scale and bias are one FMA where the
    unit has it, in the output format under nunchaku; every other product of the epilogue is rounded, because `OPTIONS` keeps the
    compiler from fusing it."""
    out, bias = _OUT[problem.option("out")], problem.option("bias")
    order = Order.ASCENDING if unit.ascending else Order.UNKNOWN
    head = Contraction(("a", "w"), DATAPATHS[unit.main], order=order, conversion=BF16 if unit.dequantised else None)
    second = DATAPATHS[unit.low_rank[problem.option("out")]]
    low_rank = (Contraction(("lora_act", "lora_up"), second, order=order, start=Start.PREVIOUS),) * (problem.dim("r") > 0)
    before = (add("bias"),) if bias == "bias" else ()
    if problem.variant == "plain":
        after = (add("bias", format=out), cast(out)) if bias == "biasafter" else ()
        return (head, mul("alpha"), *before, cast(out), *after)
    if problem.variant == "svdquant":
        join = Join.FUSED if unit.native and before else Join.SEPARATE
        return (head, mul("alpha"), *low_rank, mul("channel_scale", join=join), *before, cast(out))
    fused = (mul("channel_scale", format=out, join=Join.FUSED), add("bias", format=out))
    affine = fused if bias == "bias" else (mul("channel_scale", format=out),)
    return (head, mul("alpha"), cast(out), *affine, *low_rank, cast(out))


def packed(codes: torch.Tensor) -> torch.Tensor:
    """[rows, K] uint8 codes -> [rows, K/2] bytes, the even k in the low nibble."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).contiguous()


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """[rows, K/16] scale codes -> 128x4 tiles one after another, K first, padding zero: flat bytes as `scale_tile` reads them."""
    rows, blocks = scales.shape
    down, across = -(-rows // 128), -(-blocks // 4)
    padded = torch.nn.functional.pad(scales, (0, across * 4 - blocks, 0, down * 128 - rows))
    return padded.reshape(down, 4, 32, across, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def low_rank_codes(act: torch.Tensor, problem: Problem) -> torch.Tensor:
    """lora_act [M, R] float32 -> int16 codes of the output format, nearest even, overflow to infinity."""
    return act.to(torch.bfloat16 if problem.option("out") == "bf16" else torch.float16).view(torch.int16)


def signature() -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation."""
    pointers = {
        **dict.fromkeys(("a", "a_scale", "w", "w_scale"), "*u8"),
        **dict.fromkeys(("lora_act", "lora_up", "channel_scale", "bias", "d"), "*i16"),
    }
    return {**pointers, "alpha": "fp32", **dict.fromkeys(("m", "n8", "k32"), "i32")}


def meta(problem: Problem, unit: Unit, tile: Tile, *, swizzled_scales: bool, scaled: bool = True) -> dict[str, int]:
    """Compile-time arguments of `nvfp4_gemm` for a problem."""
    rank = problem.dim("r")
    return {
        "R": rank, "EPILOGUE": EPILOGUES[problem.variant], "BIAS": BIASES[problem.option("bias")],
        "IS_BF16": int(problem.option("out") == "bf16"), "SWIZZLED": int(swizzled_scales), "NATIVE": int(unit.native),
        "SCALED": int(scaled), "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "BLOCK_R": min(tile.r, triton.next_power_of_2(max(rank, 16))), "GROUP_M": 8,
    }


def launch(
    problem: Problem, tensors: Mapping[str, torch.Tensor], alpha: float, *, unit: Unit = UNITS["blackwell"],
    tile: Tile = TILES["default"], swizzled_scales: bool = True,
) -> str:
    """Compute D on the device of `tensors["d"]`, on the current stream, and name the kernel. M = 0 launches nothing.

    `tensors` by the names of the op, contiguous: a and w uint8, packed; a_scale and w_scale uint8, swizzled by default;
    d [M, N] and the others int16 codes of the output format (lora_act as `low_rank_codes` makes it). `alpha` is a binary32 value.
    Raises ValueError for a problem outside the domain and for tiles that cut scale tiles.
    """
    reason = refusal(problem)
    if reason is not None:
        raise ValueError(reason)
    if swizzled_scales and (tile.m % 128 or tile.n % 128 or tile.k % 64):
        got = f"{tile.m} x {tile.n} x {tile.k}"
        raise ValueError(f"nvfp4_gemm: got tile {got}, which cuts 128x4 scale tiles; use multiples of 128, 128 and 64")
    m, n, k = (problem.dim(letter) for letter in "mnk")
    if m:
        pointers: dict[str, Any] = {name: tensors.get(name, tensors["d"]) for name, kind in signature().items() if "*" in kind}
        nvfp4_gemm[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
            **pointers, alpha=alpha, m=m, n8=n // 8, k32=k // 32, **meta(problem, unit, tile, swizzled_scales=swizzled_scales),
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )
    return f"nvfp4_gemm_{problem.variant}_{tile.m}x{tile.n}x{tile.k}"
