"""gemm_int4 in Triton for matrix units that multiply int8: exact int32 within a group of 64, then binary32 or the output format.

Decides: three tactics. "unpacked" writes both operands as int8 into the workspace, by a kernel of its own; "e4m3", where the
matrix unit has e4m3fn, as e4m3fn, whose sums of 64 products are exact, too: multiples of 1 of at most 4096, with 14 bits to hold
them (DATAPATHS), and need no conversion to binary32. "fused" unpacks every tile where it is multiplied: a nibble in the upper
half of a byte is 16 times its value, so that a sum is 256 times what it should be, exactly, and a_scale is divided by 256 (exact:
its lowest bit is 2^-133 or above). The variant `f32` adds groups in binary32 by fma(fl(sum a_scale), w_scale, total), without FMA
(Machine.native is False) by a product and a sum; `half` does so in the output format. Both then go through the epilogues of
gemm_nvfp4, svdquant and nunchaku. Refuses: problems outside gemm_int4.

Shapes: A [M, K] and W [N, K] int4, two codes per byte along K, the even k in the low nibble; a_scale [K/64, M] and w_scale
[K/64, N], K first, as the quantiser writes them, rows apart by a stride; lora_act [M, R], lora_up [N, R], channel_scale [N], bias
[N], D [M, N], all codes of the output format. Scales multiply (decode direction).
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
    E4M3FN,
    F16,
    F32,
    Claim,
    Contraction,
    Declaration,
    Join,
    Problem,
    Start,
    Step,
    TensorView,
    add,
    cast,
    mul,
)
from lowbit.kernels.triton_room.blackwell_gemm_nvfp4 import BIASES, epilogue, fma16, low_rank_codes, packed
from lowbit.kernels.triton_room.codes8 import e4m3_code, e4m3_value, int4_value
from lowbit.kernels.triton_room.codes16 import code16, value16
from lowbit.kernels.triton_room.gemm_tiles import (
    OPTIONS,
    SHARED_FAULTS,
    described,
    multiply_add,
    offsets,
    place_of,
    read_tile,
    store_tile,
)
from lowbit.kernels.triton_room.machine import Machine, here
from lowbit.kernels.triton_room.memory import scratch, tensor

__all__ = [
    "MUTANTS", "OPS", "Tile", "declaration", "gemm_int4", "int4_gemm", "launch", "prepare", "run", "signature", "stage",
    "tactics", "tile_of", "unpack", "unpack_int4", "unsupported", "workspace",
]

OPS = ("gemm_int4",)
MUTANTS = (*SHARED_FAULTS, "one_scale_per_tile")

_OUT = {"bf16": BF16, "f16": F16}
_FUSED_ROWS = 64
"""Rows up to which the dispatch unpacks in place."""


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def unpack_int4(  # type: ignore[no-untyped-def]
    codes, values, count, pairs, E4M3: tl.constexpr, FAULT: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    """int16 [count, pairs], each two neighbours along K as int8, or as e4m3fn codes, from packed codes [count, pairs]. Grid
    (count / ROWS, pairs / PAIRS), rounded up."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = (rows < count)[:, None] & (columns < pairs)[None, :]
    places = offsets(rows, pairs, FAULT)[:, None] + columns[None, :]
    both = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
    low, high = int4_value(both), int4_value(both >> 4)
    if E4M3:
        low, high = e4m3_code(low.to(tl.float32), 0, 448.0).to(tl.int32), e4m3_code(high.to(tl.float32), 0, 448.0).to(tl.int32)
    tl.store(values + places, ((low & 255) | (high << 8)).to(tl.int16), mask=inside)


@triton.jit
def group_sum(  # type: ignore[no-untyped-def]
    a, w, first_m, m, first_n, n, group, k, UNIT: tl.constexpr, DESCRIBED: tl.constexpr, FAULT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """binary32 [BLOCK_M, BLOCK_N] sum of the 64 products of a group, exact; 256 times that sum of packed codes."""
    if UNIT == "packed":
        left = read_tile(a, first_m, m, group * 32, k // 2, k // 2, BLOCK_M, 32, DESCRIBED, FAULT)
        right = read_tile(w, first_n, n, group * 32, k // 2, k // 2, BLOCK_N, 32, DESCRIBED, FAULT)
        even = tl.dot(left << 4, (right << 4).T, out_dtype=tl.int32)
        return tl.dot(left & -16, (right & -16).T, even, out_dtype=tl.int32).to(tl.float32)
    else:
        left = read_tile(a, first_m, m, group * 64, k, k, BLOCK_M, 64, DESCRIBED, FAULT)
        right = read_tile(w, first_n, n, group * 64, k, k, BLOCK_N, 64, DESCRIBED, FAULT)
        if UNIT == "int8":
            return tl.dot(left, right.T, out_dtype=tl.int32).to(tl.float32)
        elif UNIT == "fp8":
            return tl.dot(left, right.T)
        else:
            return tl.dot(e4m3_value(left, 0), e4m3_value(right, 0).T, input_precision="ieee")


@triton.jit
def scales_of(scales, group, stride, places, count, FAULT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of the scales of one group."""
    if FAULT == "one_scale_per_tile":
        group = group // 2 * 2
    return tl.load(scales + offsets(group, stride, FAULT) + places, mask=places < count, other=0)


@triton.jit
def int4_gemm(  # type: ignore[no-untyped-def]
    a, a_scale, w, w_scale, lora_act, lora_up, channel_scale, bias, d, m, n, k, a_scale_stride, w_scale_stride, d_stride,
    R: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, UNIT: tl.constexpr,
    DESCRIBED: tl.constexpr, FAULT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of D per program. HALF: groups are added in the output format. The scales of a group are fetched while the
    products of the one before are summed."""
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    factor: tl.constexpr = 0.00390625 if UNIT == "packed" else 1.0  # 2^-8
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int16 if HALF else tl.float32)
    groups = k // 64
    if FAULT == "tail_skipped":
        groups = groups // 2 * 2
    left, right = scales_of(a_scale, 0, a_scale_stride, rows, m, FAULT), scales_of(w_scale, 0, w_scale_stride, columns, n, FAULT)
    for group in range(0, groups):
        later = tl.minimum(group + 1, groups - 1)
        next_left = scales_of(a_scale, later, a_scale_stride, rows, m, FAULT)
        next_right = scales_of(w_scale, later, w_scale_stride, columns, n, FAULT)
        part = group_sum(a, w, tile_m * BLOCK_M, m, tile_n * BLOCK_N, n, group, k, UNIT, DESCRIBED, FAULT, BLOCK_M, BLOCK_N)
        if HALF:
            scale = code16(value16(left, IS_BF16)[:, None] * value16(right, IS_BF16)[None, :], IS_BF16)
            total = fma16(code16(part * factor, IS_BF16), scale, total, IS_BF16, NATIVE)
        else:
            term = part * (value16(left, IS_BF16) * factor)[:, None]
            total = multiply_add(term, value16(right, IS_BF16)[None, :], total, NATIVE)
        left, right = next_left, next_right
    reached = value16(total, IS_BF16) if HALF else total
    codes = epilogue(
        reached, 1.0, lora_act, lora_up, channel_scale, bias, rows, m, columns, n, R, 2 if HALF else 1, BIAS, IS_BF16, NATIVE,
        BLOCK_R, BLOCK_M, BLOCK_N, FAULT,
    )
    store_tile(d, codes, rows, m, columns, n, d_stride, FAULT)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes, `r` along the rank; `warps` and `stages` are Triton's num_warps and num_stages."""

    m: int
    n: int
    warps: int = 8
    stages: int = 4
    r: int = 32
    band: int = 8


_INTERPRETED = Tile(64, 128)
TILE = Tile(64, 128, 4, 4)
"""The fastest of those tried on an H200 at M = 4352 (tests/device/triton_gemms.py tune): larger ones leave no registers for a
second program on the multiprocessor, whose products would hide the scaling of these."""


def tile_of(machine: Machine) -> Tile:
    """The tile of D."""
    return TILE if machine.native else _INTERPRETED


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for a problem that the kernels compute, otherwise one sentence that says what they take."""
    n, k, r = (problem.dim(letter) for letter in "nkr")
    takes = (
        (n > 0 and n % 8 == 0, f"N is a positive multiple of 8, got N = {n}"),
        (k > 0 and k % 64 == 0, f"K is a positive multiple of 64, got K = {k}"),
        (r >= 0 and r % 16 == 0 and (r > 0) == (problem.option("lora") == "lora"),
         f"the rank is a multiple of 16, 0 without lora, got R = {r}"),
    )
    return next((f"gemm_int4: {sentence}" for good, sentence in takes if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """All, the fastest first. Without a unit for e4m3fn there is no "e4m3"; the interpreter computes it in binary32."""
    wide = ("unpacked",) if machine.native and not _has_e4m3fn(machine) else ("e4m3", "unpacked")
    return ("fused", *wide) if problem.dim("m") <= _FUSED_ROWS else (*wide, "fused")


def _has_e4m3fn(machine: Machine) -> bool:
    return not machine.fnuz and machine.datapaths["fp8"] != machine.datapaths["f16"]


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The program of the kernel; the sums of groups are exact in every tactic. Without a low-rank term the result has one
    answer."""
    name, half, bias = problem.option("out"), problem.variant == "half", problem.option("bias") == "bias"
    out, fused = _OUT[name], Join.FUSED if machine.native else Join.SEPARATE
    sums = Contraction(("a", "w"), DATAPATHS[machine.datapaths["int8"]], segment=64)
    if tactic == "e4m3":
        sums = Contraction(
            ("a", "w"), DATAPATHS[machine.datapaths["fp8"]], order=machine.order, segment=64, conversion=E4M3FN)
    second = Contraction(
        ("lora_act", "lora_up"), DATAPATHS[machine.datapaths[name]], order=machine.order, start=Start.PREVIOUS)
    lora = (second,) * (problem.dim("r") > 0)
    before: tuple[Step, ...] = (add("bias", format=out if half else F32),) if bias else ()
    if half:
        steps: tuple[Step, ...] = (
            cast(F32), cast(out), mul("a_scale", "w_scale", format=out, operand_format=out, join=Join.FUSED))
        main = replace(sums, steps=steps, running=out)
        channel = mul("channel_scale", format=out, join=Join.FUSED if bias else Join.SEPARATE)
        program: tuple[Contraction | Step, ...] = (main, channel, *before, *lora, cast(out))
    else:
        main = replace(sums, steps=(cast(F32), mul("a_scale"), mul("w_scale", join=fused)))
        channel = mul("channel_scale", join=fused if bias else Join.SEPARATE)
        program = (main, *lora, channel, *before, cast(out))
    claim = Claim.BOUNDED if lora or tactic == "e4m3" else Claim.BIT_EXACT
    return Declaration(program, claim, batch_invariant=machine.native or not lora)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """A byte per element of both operands, where they are unpacked."""
    return (problem.dim("m") + problem.dim("n")) * problem.dim("k") if tactic != "fused" else 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """Packed codes, scales K first, the low-rank activation rounded to the output format; the others as they are."""
    found = {name: tensor(view).contiguous() for name, view in constants.items()}
    found |= {name: packed(found[name]) for name in ("a", "w") if name in found}
    found |= {name: found[name].T.contiguous() for name in ("a_scale", "w_scale") if name in found}
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
    values = scratch(workspace, torch.int8, (m + n, k)) if tactic != "fused" and m else None
    return launch(
        {**state, **inputs}, tensor(outputs["d"]), values, half=problem.variant == "half", bf16=problem.option("out") == "bf16",
        e4m3=tactic == "e4m3", machine=machine, fault=mutant,
    )


def gemm_int4(
    a: torch.Tensor, a_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, channel_scale: torch.Tensor, *,
    bias: torch.Tensor | None = None, lora_act: torch.Tensor | None = None, lora_up: torch.Tensor | None = None,
    out: torch.dtype = torch.float16, half: bool = False,
) -> torch.Tensor:
    """D [M, N] = cast((sum + lora) channel_scale + bias). a [M, K/2] and w [N, K/2] uint8 packed; a_scale [K/64, at least M],
    w_scale [K/64, N], lora_act [M, R], lora_up [N, R], channel_scale and bias of `out`. Allocates the workspace of its tactic."""
    m, n, k = a.shape[0], w.shape[0], 2 * a.shape[1]
    given = {
        "a_scale": a_scale, "w_scale": w_scale, "channel_scale": channel_scale, "bias": bias, "lora_act": lora_act,
        "lora_up": lora_up,
    }
    tensors = {name: x.view(torch.int16) for name, x in given.items() if x is not None}
    d = torch.empty((m, n), dtype=out, device=a.device)
    values = torch.empty((m + n, k), dtype=torch.int8, device=a.device) if m > _FUSED_ROWS else None
    machine = here()
    launch({"a": a, "w": w, **tensors}, d.view(torch.int16), values, half=half, bf16=out is torch.bfloat16,
           e4m3=_has_e4m3fn(machine), machine=machine)
    return d


def unpack(codes: torch.Tensor, values: torch.Tensor, *, e4m3: bool, fault: str = "") -> None:
    """int8, or e4m3fn codes, [rows, K] into `values` from packed codes [rows, K/2]."""
    rows, pairs = codes.shape
    unpack_int4[(triton.cdiv(rows, 8), triton.cdiv(pairs, 512))](
        codes, values.view(torch.int16), rows, pairs, E4M3=int(e4m3), FAULT=fault, ROWS=8, PAIRS=512, num_warps=4, **OPTIONS,
    )


def launch(
    tensors: Mapping[str, torch.Tensor], d: torch.Tensor, values: torch.Tensor | None, *, half: bool, bf16: bool,
    e4m3: bool, machine: Machine, fault: str = "", tile: Tile | None = None,
) -> str:
    """Compute D (int16 codes) on its device and the current stream; name the kernels. `values` int8 [M + N, K]: unpack into it,
    as e4m3fn codes where `e4m3`; None: unpack every tile in place. `tensors` by the names of the op. M = 0 launches nothing."""
    a, w = tensors["a"], tensors["w"]
    m, n, k = a.shape[0], w.shape[0], 2 * a.shape[1]
    shape = tile or tile_of(machine)
    unit, element = "packed", torch.int8
    if values is not None and m:
        unpack(a, values[:m], e4m3=e4m3, fault=fault)
        unpack(w, values[m:], e4m3=e4m3, fault=fault)
        a, w = values[:m], values[m:]
        unit = "int8" if not e4m3 else "fp8" if machine.native else "binary32"
        element = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "binary32": torch.uint8}[unit]
    if m:
        a, w = a.view(element), w.view(element)
        deep = 32 if unit == "packed" else 64
        left, right = described(a, shape.m, deep), described(w, shape.n, deep)
        use = machine.native and left is not None and right is not None
        pointers = {name: tensors.get(name, d) for name in ("lora_act", "lora_up", "channel_scale", "bias")}
        int4_gemm[(triton.cdiv(m, shape.m) * triton.cdiv(n, shape.n),)](
            left if use else a, tensors["a_scale"], right if use else w, tensors["w_scale"], **pointers, d=d, m=m, n=n, k=k,
            a_scale_stride=tensors["a_scale"].stride(0), w_scale_stride=tensors["w_scale"].stride(0), d_stride=d.stride(0),
            **meta(
                rank=tensors["lora_up"].shape[1] if "lora_up" in tensors else 0, half=half, bias="bias" in tensors, bf16=bf16,
                native=machine.native, unit=unit, described=use, fault=fault, tile=shape,
            ), num_warps=shape.warps, num_stages=shape.stages, **OPTIONS,
        )
    return f"int4_gemm_{'half' if half else 'f32'}_{unit}_{shape.m}x{shape.n}"


def meta(
    *, rank: int, half: bool, bias: bool, bf16: bool, native: bool, unit: str, described: bool, fault: str, tile: Tile
) -> dict[str, int | str]:
    """Compile-time arguments of `int4_gemm`."""
    return {
        "R": rank, "HALF": int(half), "BIAS": BIASES["bias" if bias else "nobias"], "IS_BF16": int(bf16), "NATIVE": int(native),
        "UNIT": unit, "DESCRIBED": int(described), "FAULT": fault, "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "BLOCK_R": min(tile.r, triton.next_power_of_2(max(rank, 16))), "BAND": tile.band,
    }


def signature(unit: str, *, described: bool, tile: Tile) -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation."""
    element, deep = "fp8e4nv" if unit == "fp8" else "i8", 32 if unit == "packed" else 64
    a, w = (f"tensordesc<{element}[{rows},{deep}]>" if described else f"*{element}" for rows in (tile.m, tile.n))
    codes = dict.fromkeys(("lora_act", "lora_up", "channel_scale", "bias", "d"), "*i16")
    sizes = dict.fromkeys(("m", "n", "k", "a_scale_stride", "w_scale_stride", "d_stride"), "i32")
    return {"a": a, "a_scale": "*i16", "w": w, "w_scale": "*i16", **codes, **sizes}
