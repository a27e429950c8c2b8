"""gemm_nvfp4 in Triton for machines without block-scaled matrix units: operands decoded to bf16, which holds every product of a
code and its scale (2 by 4 significant bits), and multiplied as bf16.

Decides: two tactics. "decoded" writes both operands as bf16 into the workspace, by a kernel of its own, and multiplies them by
`gemm_16bit`; "fused" decodes every tile where it is multiplied and needs no workspace. Both have the arithmetic that
`declaration` says: no block scale is left for the sum, every operand element carries its own. Refuses: problems outside
gemm_nvfp4.

Shapes: A [M, K] and W [N, K] e2m1, two codes per byte along K, the even k in the low nibble; scales [rows, K/16] ue4m3, bit 7 not
read; alpha [1] binary32; lora_act [M, R], lora_up [N, R], channel_scale [N], bias [N] and D [M, N] codes of the output format.
Scales multiply (decode direction).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import Declaration, Problem, TensorView
from lowbit.kernels.triton_room import gemm_16bit
from lowbit.kernels.triton_room.blackwell_gemm_nvfp4 import (
    BIASES,
    EPILOGUES,
    Unit,
    dequantised,
    e2m1_value,
    epilogue,
    low_rank_codes,
    packed,
    program,
    refusal,
    ue4m3_value,
)
from lowbit.kernels.triton_room.gemm_tiles import OPTIONS, SHARED_FAULTS, offsets, place_of, store_tile, tiles_of_k
from lowbit.kernels.triton_room.machine import Machine, here
from lowbit.kernels.triton_room.memory import scratch, tensor

__all__ = [
    "MUTANTS", "OPS", "decode", "decode_nvfp4", "declaration", "fused_gemm", "gemm_nvfp4", "launch", "meta", "prepare", "run",
    "signature", "stage", "tactics", "unsupported", "workspace",
]

OPS = ("gemm_nvfp4",)
MUTANTS = (*SHARED_FAULTS, "one_scale_per_tile")

_FUSED_ROWS = 64
"""Rows up to which the dispatch decodes in place: W is read once, and decoding it into memory would cost more than it saves."""


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def decode_nvfp4(  # type: ignore[no-untyped-def]
    codes, scales, words, count, pairs, FAULT: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    """int32 words [count, pairs], each two bf16 neighbours along K, from packed codes [count, pairs] and scales
    [count, pairs / 8]. Grid (count / ROWS, pairs / PAIRS), rounded up."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = (rows < count)[:, None] & (columns < pairs)[None, :]
    places = offsets(rows, pairs, FAULT)[:, None] + columns[None, :]
    both = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
    block = columns // 8
    if FAULT == "one_scale_per_tile":
        block = columns // PAIRS * (PAIRS // 8)
    scale = ue4m3_value(tl.load(scales + offsets(rows, pairs // 8, FAULT)[:, None] + block[None, :], mask=inside, other=0))
    low = (e2m1_value(both & 15) * scale).to(tl.uint32, bitcast=True) >> 16
    high = (e2m1_value(both >> 4) * scale).to(tl.uint32, bitcast=True) & 0xFFFF0000
    tl.store(words + places, (low | high).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def decoded_tile(  # type: ignore[no-untyped-def]
    codes, scales, first, count, step, k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, NATIVE: tl.constexpr, FAULT: tl.constexpr
):
    """Values [ROWS, BLOCK_K] of one tile: bf16 under NATIVE, otherwise binary32; 0 outside."""
    rows = first + tl.arange(0, ROWS)
    columns, blocks = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2), step * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    present = (rows < count)[:, None]
    if FAULT == "one_scale_per_tile":
        blocks = tl.zeros_like(blocks) + step * (BLOCK_K // 16)
    both = tl.load(codes + offsets(rows, k // 2, FAULT)[:, None] + columns[None, :], mask=present & (columns < k // 2)[None, :],
                   other=0)
    scale = tl.load(scales + offsets(rows, k // 16, FAULT)[:, None] + blocks[None, :], mask=present & (blocks < k // 16)[None, :],
                    other=0)
    values = dequantised(both, scale, ROWS, BLOCK_K)
    if NATIVE:
        return values.to(tl.bfloat16)
    else:
        return values


@triton.jit
def fused_gemm(  # type: ignore[no-untyped-def]
    a, a_scale, w, w_scale, alpha, lora_act, lora_up, channel_scale, bias, d, m, n, k, d_stride,
    R: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, FAULT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BAND: tl.constexpr,
):
    """One tile of D per program; constants as in `blackwell_gemm_nvfp4.nvfp4_gemm`."""
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tiles_of_k(k, BLOCK_K, FAULT)):
        left = decoded_tile(a, a_scale, tile_m * BLOCK_M, m, step, k, BLOCK_M, BLOCK_K, NATIVE, FAULT)
        right = decoded_tile(w, w_scale, tile_n * BLOCK_N, n, step, k, BLOCK_N, BLOCK_K, NATIVE, FAULT)
        total = tl.dot(left, right.T, total, input_precision="ieee")  # of binary32 operands; bf16 has no other
    codes = epilogue(
        total, tl.load(alpha), lora_act, lora_up, channel_scale, bias, rows, m, columns, n, R, EPILOGUE, BIAS, IS_BF16, NATIVE,
        BLOCK_R, BLOCK_M, BLOCK_N, FAULT,
    )
    store_tile(d, codes, rows, m, columns, n, d_stride, FAULT)


# Host ----------------------------------------------------------------------------------------------------------------

FUSED = gemm_16bit.Tile(64, 64, 128, 4, 3)
_FUSED_INTERPRETED = gemm_16bit.Tile(64, 128, 128)


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for a problem that the kernels compute, otherwise one sentence that says what they take."""
    return refusal(problem)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """Both, the faster one first."""
    return ("fused", "decoded") if problem.dim("m") <= _FUSED_ROWS else ("decoded", "fused")


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """One program for both tactics: the operands are bf16 (exactly), the low-rank product starts from the value reached."""
    paths = machine.datapaths
    unit = Unit(paths["bf16"], {out: paths[out] for out in ("f16", "bf16")}, machine.native, machine.ascending, machine.native)
    return Declaration(program(problem, unit), batch_invariant=machine.native)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """"decoded": bf16 of both operands."""
    return 2 * (problem.dim("m") + problem.dim("n")) * problem.dim("k") if tactic == "decoded" else 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """Packed codes, alpha as binary32, the low-rank activation rounded to the output format; the others as they are."""
    found = {name: tensor(view).contiguous() for name, view in constants.items()}
    found |= {name: packed(found[name]) for name in ("a", "w") if name in found}
    if "alpha" in found:
        found["alpha"] = found["alpha"].view(torch.float32)
    if "lora_act" in found:
        found["lora_act"] = low_rank_codes(found["lora_act"].view(torch.float32), problem)
    return found


stage = prepare


def run(
    problem: Problem, tactic: str, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, TensorView], workspace: Any, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Launch the kernels and name them."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    words = scratch(workspace, torch.int16, (m + n, k)) if tactic == "decoded" and m else None
    return launch(
        {**state, **inputs}, tensor(outputs["d"]), words, epilogue=problem.variant, bias=problem.option("bias"),
        bf16=problem.option("out") == "bf16", machine=machine, fault=mutant,
    )


def gemm_nvfp4(
    a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, alpha: torch.Tensor, *,
    bias: torch.Tensor | None = None, channel_scale: torch.Tensor | None = None, lora_act: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None, out: torch.dtype = torch.bfloat16, epilogue: str = "plain", bias_after: bool = False,
) -> torch.Tensor:
    """D [M, N] by the epilogue of the contract (plain, svdquant, nunchaku). a, w uint8 packed; scales uint8 [rows, K/16]; alpha
    float32 [1]; lora_act and lora_up, channel_scale and bias of `out`. Allocates the workspace of the tactic that it takes."""
    m, n, k = a.shape[0], w.shape[0], 2 * a.shape[1]
    given = {"bias": bias, "channel_scale": channel_scale, "lora_act": lora_act, "lora_up": lora_up}
    tensors = {name: x.view(torch.int16) for name, x in given.items() if x is not None}
    d = torch.empty((m, n), dtype=out, device=a.device)
    words = torch.empty((m + n, k), dtype=torch.int16, device=a.device) if m > _FUSED_ROWS else None
    launch(
        {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale, "alpha": alpha, **tensors}, d.view(torch.int16), words,
        epilogue=epilogue, bias="nobias" if bias is None else "biasafter" if bias_after else "bias", bf16=out is torch.bfloat16,
        machine=here(),
    )
    return d


def decode(codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, fault: str = "") -> None:
    """int16 codes of bf16 [rows, K] into `words` from packed codes [rows, K/2] and scales [rows, K/16]."""
    rows, pairs = codes.shape
    decode_nvfp4[(triton.cdiv(rows, 8), triton.cdiv(pairs, 256))](
        codes, scales, words.view(torch.int32), rows, pairs, FAULT=fault, ROWS=8, PAIRS=256, num_warps=4, **OPTIONS,
    )


def launch(
    tensors: Mapping[str, torch.Tensor], d: torch.Tensor, words: torch.Tensor | None, *, epilogue: str, bias: str, bf16: bool,
    machine: Machine, fault: str = "", tile: gemm_16bit.Tile | None = None,
) -> str:
    """Compute D (int16 codes) on its device and the current stream; name the kernels. `words` int16 [M + N, K]: decode into it;
    None: decode every tile in place. `tensors` by the names of the op, contiguous. M = 0 launches nothing."""
    a, w = tensors["a"], tensors["w"]
    m, n, k = a.shape[0], w.shape[0], 2 * a.shape[1]
    others = {name: x for name, x in tensors.items() if name not in ("a", "a_scale", "w", "w_scale")}
    if words is not None:
        decode(a, tensors["a_scale"], words[:m], fault)
        decode(w, tensors["w_scale"], words[m:], fault)
        return "decode_nvfp4+" + gemm_16bit.launch(
            words[:m], words[m:], d, others, epilogue=epilogue, bias=bias, operands_bf16=True, bf16=bf16, machine=machine,
            fault=fault, tile=tile,
        )
    shape = tile or (FUSED if machine.native else _FUSED_INTERPRETED)
    if m:
        pointers = {name: others.get(name, d) for name in ("alpha", "lora_act", "lora_up", "channel_scale", "bias")}
        rank = others["lora_up"].shape[1] if "lora_up" in others else 0
        fused_gemm[(triton.cdiv(m, shape.m) * triton.cdiv(n, shape.n),)](
            a, tensors["a_scale"], w, tensors["w_scale"], **pointers, d=d, m=m, n=n, k=k, d_stride=d.stride(0),
            **meta(rank=rank, epilogue=epilogue, bias=bias, bf16=bf16, native=machine.native, fault=fault, tile=shape),
            num_warps=shape.warps, num_stages=shape.stages, **OPTIONS,
        )
    return f"fused_nvfp4_{epilogue}_{shape.m}x{shape.n}x{shape.k}"


def meta(
    *, rank: int, epilogue: str, bias: str, bf16: bool, native: bool, fault: str, tile: gemm_16bit.Tile
) -> dict[str, int | str]:
    """Compile-time arguments of `fused_gemm`."""
    return {
        "R": rank, "EPILOGUE": EPILOGUES[epilogue], "BIAS": BIASES[bias], "IS_BF16": int(bf16), "NATIVE": int(native),
        "FAULT": fault, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "BLOCK_R": min(tile.r, triton.next_power_of_2(max(rank, 16))), "BAND": tile.band,
    }


def signature() -> dict[str, str]:
    """Types of the run-time arguments of `fused_gemm` in their order, for an ahead-of-time compilation."""
    matrices = dict.fromkeys(("a", "a_scale", "w", "w_scale"), "*u8")
    codes = dict.fromkeys(("lora_act", "lora_up", "channel_scale", "bias", "d"), "*i16")
    return {**matrices, "alpha": "*fp32", **codes, **dict.fromkeys(("m", "n", "k", "d_stride"), "i32")}
