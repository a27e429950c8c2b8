"""gemm_w4a8_int8 in Triton: int8 activations and 4-bit weights with zero point 8, exact int32 sums within a group.

Decides: the kernel, how its weights are packed, and what it declares. The nibble q in the
upper half of a byte, its highest bit inverted, is 16 (q - 8) in two's complement: a group sum is 16 times what it should be,
exactly, and goes back by 2^-4 once it is binary32. It is then multiplied by the group's scale and added to a binary32 total, by
FMA where Machine.native is True. Refuses: problems outside gemm_w4a8_int8, and K from 2^17 on, where 16 times a sum could leave
int32.

Shapes: A [M, K] int8; W [N, ceil(K/64), 32] bytes: byte j of a block of 64 k holds k = j in its low nibble and k = 32 + j in its
high one, 8 beyond K, so that either half of a block meets neighbouring elements of A; group_scale [K/G, N], token_scale [M], bias
[N] and D [M, N] codes of the output format. Scales multiply (decode direction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
    Join,
    Problem,
    Step,
    TensorView,
    add,
    cast,
    mul,
)
from lowbit.kernels.triton_room.codes16 import code16, value16
from lowbit.kernels.triton_room.gemm_tiles import OPTIONS, SHARED_FAULTS, multiply_add, place_of, read_tile, store_tile
from lowbit.kernels.triton_room.machine import Machine, here
from lowbit.kernels.triton_room.memory import rows_of, tensor

__all__ = [
    "MUTANTS", "OPS", "Tile", "declaration", "gemm_w4a8_int8", "launch", "meta", "pack", "prepare", "run", "signature", "stage",
    "tactics", "tile_of", "unsupported", "w4a8_gemm", "workspace",
]

OPS = ("gemm_w4a8_int8",)
MUTANTS = (*SHARED_FAULTS, "zero_offset")

_OUT = {"bf16": BF16, "f16": F16}
_LONGEST = 1 << 17


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def half_block(  # type: ignore[no-untyped-def]
    a, both, part, first_m, m, first, k, a_stride, high, FAULT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """part + the 32 products from k = `first` on; `both` [BLOCK_N, 32] holds them in its low, or where high is 1, high
    nibbles."""
    left = read_tile(a, first_m, m, first, k, a_stride, BLOCK_M, 32, False, FAULT)
    right = ((both << tl.cast(4 - 4 * high, tl.int8)) & -16) ^ -128
    if FAULT == "zero_offset":
        right += 16
    return tl.dot(left, right.T, part, out_dtype=tl.int32)


@triton.jit
def w4a8_gemm(  # type: ignore[no-untyped-def]
    a, w, group_scale, token_scale, bias, d, m, n, k, g, a_stride, d_stride,
    WHOLE: tl.constexpr, VIA_F16: tl.constexpr, BIAS: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr,
    FAULT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):
    """One tile of D per program. WHOLE: groups are whole blocks of 64 k; otherwise they are multiples of 32 k."""
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.cdiv(k, 64) * 32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    low, high = tl.full((), 0, tl.int32), tl.full((), 1, tl.int32)
    for group in range(0, k // g):
        part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        if WHOLE:
            blocks = tl.cdiv(g, 64)
            if FAULT == "tail_skipped":
                blocks = g // 64
            for block in range(group * blocks, group * blocks + blocks):
                both = read_tile(w, tile_n * BLOCK_N, n, block * 32, width, width, BLOCK_N, 32, False, FAULT)
                part = half_block(a, both, part, tile_m * BLOCK_M, m, block * 64, k, a_stride, low, FAULT, BLOCK_M)
                part = half_block(a, both, part, tile_m * BLOCK_M, m, block * 64 + 32, k, a_stride, high, FAULT, BLOCK_M)
        else:
            for half in range(group * (g // 32), group * (g // 32) + g // 32):
                both = read_tile(w, tile_n * BLOCK_N, n, half // 2 * 32, width, width, BLOCK_N, 32, False, FAULT)
                part = half_block(a, both, part, tile_m * BLOCK_M, m, half * 32, k, a_stride, half % 2, FAULT, BLOCK_M)
        scale = tl.load(group_scale + tl.cast(group, tl.int64) * n + columns, mask=columns < n, other=0)
        total = multiply_add(part.to(tl.float32) * 0.0625, value16(scale, IS_BF16)[None, :], total, NATIVE)
    total = total * value16(tl.load(token_scale + rows, mask=rows < m, other=0), IS_BF16)[:, None]
    if BIAS:
        addend = value16(tl.load(bias + columns, mask=columns < n, other=0), IS_BF16)[None, :]
        if FAULT == "bias_dropped_at_m1":
            addend = tl.where(m == 1, 0.0, addend)
        total = total + addend
    if VIA_F16:
        total = value16(code16(total, False), False)
    store_tile(d, code16(total, IS_BF16), rows, m, columns, n, d_stride, FAULT)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes; `warps` and `stages` are Triton's num_warps and num_stages."""

    m: int
    n: int
    warps: int = 4
    stages: int = 4
    band: int = 8


_INTERPRETED = Tile(64, 128)
TILES: tuple[tuple[int, Tile], ...] = ((64, Tile(64, 64)), (1 << 62, Tile(128, 128, 8)))
"""(largest M, tile), in ascending M."""


def tile_of(m: int, machine: Machine) -> Tile:
    """The tile for M rows of D."""
    return next(tile for most, tile in TILES if m <= most) if machine.native else _INTERPRETED


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for a problem that the kernel computes, otherwise one sentence that says what it takes."""
    n, k, g = (problem.dim(letter) for letter in "nkg")
    takes = (
        (n > 0 and n % 8 == 0, f"N is a positive multiple of 8, got N = {n}"),
        (0 < k < _LONGEST and k % 8 == 0, f"K is a positive multiple of 8 below {_LONGEST}, got K = {k}"),
        (g > 0 and k % max(g, 1) == 0 and (g == k or g % 32 == 0),
         f"G divides K and is K or a multiple of 32, got G = {g}, K = {k}"),
    )
    return next((f"gemm_w4a8_int8: {sentence}" for good, sentence in takes if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """There is one."""
    return ("default",)


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The program of the kernel; it has one answer."""
    fused = Join.FUSED if machine.native else Join.SEPARATE
    steps = (cast(F32), mul("group_scale", join=fused))
    main = Contraction(("a", "w"), DATAPATHS[machine.datapaths["int8"]], segment=problem.dim("g"), steps=steps)
    before: tuple[Step, ...] = (add("bias"),) if problem.option("bias") == "bias" else ()
    via: tuple[Step, ...] = (cast(F16),) if problem.variant == "viaf16" else ()
    return Declaration((main, mul("token_scale"), *before, *via, cast(_OUT[problem.option("out")])), Claim.BIT_EXACT)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """No scratch memory."""
    return 0


def pack(q: torch.Tensor) -> torch.Tensor:
    """[N, K] uint8 codes 0 to 15 -> [N, ceil(K/64) 32] bytes as above."""
    count, k = q.shape
    blocks = torch.nn.functional.pad(q, (0, -k % 64), value=8).reshape(count, -1, 2, 32)
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(count, -1)


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """Packed weights and group scales K first."""
    found = {name: tensor(view).contiguous() for name, view in constants.items()}
    return found | {"w": pack(found["w"]), "group_scale": found["group_scale"].T.contiguous()}


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """The tensors as they lie."""
    return {name: rows_of(view)[0] for name, view in activations.items()}


def run(
    problem: Problem, tactic: str, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, TensorView], workspace: Any, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Launch the kernel and name it."""
    found = {**state, **inputs}
    return launch(
        found["a"], found["w"], found["group_scale"], found["token_scale"], found.get("bias"), tensor(outputs["d"]),
        g=problem.dim("g"), via_f16=problem.variant == "viaf16", bf16=problem.option("out") == "bf16", machine=machine,
        fault=mutant,
    )


def gemm_w4a8_int8(
    a: torch.Tensor, w: torch.Tensor, group_scale: torch.Tensor, token_scale: torch.Tensor, bias: torch.Tensor | None = None, *,
    via_f16: bool = False,
) -> torch.Tensor:
    """D [M, N] of the format of the scales. a [M, K] int8; w as `pack` makes it; group_scale [K/G, N] and token_scale [M] float16
    or bfloat16."""
    d = torch.empty((a.shape[0], w.shape[0]), dtype=token_scale.dtype, device=a.device)
    launch(
        a, w, group_scale.view(torch.int16), token_scale.view(torch.int16), None if bias is None else bias.view(torch.int16),
        d.view(torch.int16), g=a.shape[1] // group_scale.shape[0], via_f16=via_f16, bf16=d.dtype is torch.bfloat16,
        machine=here(),
    )
    return d


def launch(
    a: torch.Tensor, w: torch.Tensor, group_scale: torch.Tensor, token_scale: torch.Tensor, bias: torch.Tensor | None,
    d: torch.Tensor, *, g: int, via_f16: bool, bf16: bool, machine: Machine, fault: str = "", tile: Tile | None = None,
) -> str:
    """Compute D (int16 codes) on its device and the current stream; name the kernel. M = 0 launches nothing."""
    m, k, n = a.shape[0], a.shape[1], w.shape[0]
    shape = tile or tile_of(m, machine)
    if m:
        w4a8_gemm[(triton.cdiv(m, shape.m) * triton.cdiv(n, shape.n),)](
            a.view(torch.int8), w.view(torch.int8), group_scale, token_scale, d if bias is None else bias, d, m, n, k, g,
            a.stride(0), d.stride(0),
            **meta(whole=g % 64 == 0 or g == k, via_f16=via_f16, bias=bias is not None, bf16=bf16, native=machine.native,
                   fault=fault, tile=shape),
            num_warps=shape.warps, num_stages=shape.stages, **OPTIONS,
        )
    return f"w4a8_gemm_{shape.m}x{shape.n}"


def meta(
    *, whole: bool, via_f16: bool, bias: bool, bf16: bool, native: bool, fault: str, tile: Tile
) -> dict[str, int | str]:
    """Compile-time arguments of `w4a8_gemm`."""
    return {
        "WHOLE": int(whole), "VIA_F16": int(via_f16), "BIAS": int(bias), "IS_BF16": int(bf16), "NATIVE": int(native),
        "FAULT": fault, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BAND": tile.band,
    }


def signature() -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation."""
    codes = dict.fromkeys(("group_scale", "token_scale", "bias", "d"), "*i16")
    return {"a": "*i8", "w": "*i8", **codes, **dict.fromkeys(("m", "n", "k", "g", "a_stride", "d_stride"), "i32")}
