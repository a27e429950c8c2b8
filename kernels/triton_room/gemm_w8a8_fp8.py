"""gemm_w8a8_fp8 in Triton: e4m3fn or e4m3fnuz, tensor, token and channel scales or block scales, bias before or after the cast.

Decides: the kernel, its tiles, and what it declares. Refuses: problems outside gemm_w8a8_fp8. Two tactics of `scaled`: "fast"
adds every product into the accumulator of the matrix unit; "promoted", where that is wgmma's of 14 bits, adds the sums of 128 k
into a binary32 total. `block` has one: its sums of 128 k are scaled and added by contract.

One compile-time branch, UNIT, parts the machines: "fp8" multiplies the codes by the matrix unit; "f16" decodes them by integers
to binary16 (exact: 4 significant bits, 2^-10 to 448) for units that have the other e4m3 or none; "binary32" decodes them to
binary32. Tiles, scales, bias and cast are the same lines in all of them.

Shapes: A [M, K] and W [N, K] uint8 codes; token_scale [M] or [1], channel_scale [N] or [1], a_scale [M, K/128], w_scale
[ceil(N/128), K/128] binary32; bias [N] and D [M, N] codes of the output format. Scales multiply (decode direction).
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
    Contraction,
    Declaration,
    Problem,
    Step,
    TensorView,
    add,
    cast,
    mul,
)
from lowbit.kernels.triton_room.codes8 import e4m3_value
from lowbit.kernels.triton_room.gemm_tiles import (
    BIASES,
    FORMATS,
    OPTIONS,
    SHARED_FAULTS,
    described,
    end,
    offsets,
    place_of,
    read_tile,
    store_tile,
    tiles_of_k,
)
from lowbit.kernels.triton_room.machine import Machine, here
from lowbit.kernels.triton_room.memory import rows_of, tensor

__all__ = [
    "MUTANTS", "OPS", "Tile", "declaration", "gemm_w8a8_fp8", "launch", "prepare", "run", "signature", "stage", "tactics",
    "tile_of", "unit_of", "unsupported", "w8a8_gemm", "workspace",
]

OPS = ("gemm_w8a8_fp8",)
MUTANTS = SHARED_FAULTS

_OUT = {"bf16": BF16, "f16": F16, "f32": F32}
_PROMOTION = 128


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def product(a, w, total, UNIT: tl.constexpr, FNUZ: tl.constexpr, CHAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """total [BLOCK_M, BLOCK_N] + a [BLOCK_M, BLOCK_K] w [BLOCK_N, BLOCK_K]^T. CHAIN: k after which the accumulator of the unit is
    added to `total` and starts again; 0: never."""
    if UNIT == "fp8":
        return tl.dot(a, w.T, total, max_num_imprecise_acc=CHAIN if CHAIN else None)
    elif UNIT == "f16":
        left, right = e4m3_value(a, FNUZ).to(tl.float16), e4m3_value(w, FNUZ).to(tl.float16)
        return tl.dot(left, right.T, total)
    else:
        return tl.dot(e4m3_value(a, FNUZ), e4m3_value(w, FNUZ).T, total, input_precision="ieee")


@triton.jit
def w8a8_gemm(  # type: ignore[no-untyped-def]
    a, w, token_scale, channel_scale, bias, d, m, n, k, a_stride, w_stride, d_stride,
    UNIT: tl.constexpr, FNUZ: tl.constexpr, BLOCKED: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    PROMOTED: tl.constexpr, BIAS: tl.constexpr, FORMAT: tl.constexpr, DESCRIBED: tl.constexpr, FAULT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):
    """One tile of D per program. BLOCKED: token_scale is a_scale and channel_scale is w_scale, BLOCK_K is 128 and BLOCK_N divides
    128. PROMOTED: every K tile is summed from zero and added to a binary32 total; an argument of wgmma, which others lack."""
    tile_m, tile_n = place_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), BAND)
    rows, columns = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tiles_of_k(k, BLOCK_K, FAULT)):
        left = read_tile(a, tile_m * BLOCK_M, m, step * BLOCK_K, k, a_stride, BLOCK_M, BLOCK_K, DESCRIBED, FAULT)
        right = read_tile(w, tile_n * BLOCK_N, n, step * BLOCK_K, k, w_stride, BLOCK_N, BLOCK_K, DESCRIBED, FAULT)
        if BLOCKED:
            part = product(left, right, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), UNIT, FNUZ, 0)
            blocks = k // BLOCK_K
            of_a = tl.load(token_scale + offsets(rows, blocks, FAULT) + step, mask=rows < m, other=0.0)
            of_w = tl.load(channel_scale + (tile_n * BLOCK_N // 128).to(tl.int64) * blocks + step)
            total = total + part * (of_a * of_w)[:, None]
        else:
            total = product(left, right, total, UNIT, FNUZ, BLOCK_K if PROMOTED else 0)
    if not BLOCKED:
        if PER_CHANNEL:
            total = total * tl.load(channel_scale + columns, mask=columns < n, other=0.0)[None, :]
        else:
            total = total * tl.load(channel_scale)
        if PER_TOKEN:
            total = total * tl.load(token_scale + rows, mask=rows < m, other=0.0)[:, None]
        else:
            total = total * tl.load(token_scale)
    store_tile(d, end(total, bias, columns, m, n, BIAS, FORMAT, FAULT), rows, m, columns, n, d_stride, FAULT)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time sizes; `warps` and `stages` are Triton's num_warps and num_stages, `band` rows of tiles are walked
    together."""

    m: int
    n: int
    k: int = 128
    warps: int = 4
    stages: int = 4
    band: int = 8


_INTERPRETED = Tile(64, 128)
TILES = {
    "blocked": Tile(64, 64), "decoded": Tile(128, 128, 128, 8, 3), "promoted": Tile(128, 128, 128, 8, 4),
    "low": Tile(64, 64, 256, 4, 3), "narrow": Tile(128, 128, 128, 4, 4), "wide": Tile(128, 256, 128, 8, 4),
}
"""The fastest of those tried on an H200 (tests/device/triton_gemms.py tune); "blocked" and "decoded" are not tuned."""
_MULTIPROCESSORS = 132  # of that device, one program of the larger tiles on each at a time


def tile_of(m: int, n: int, unit: str, *, blocked: bool, promoted: bool) -> Tile:
    """The tile for D [M, N]: of the two large ones that whose programs fill fewer rounds of the device, weighed by their size."""
    if unit == "binary32":
        return _INTERPRETED
    if blocked or promoted or unit == "f16":
        return TILES["blocked" if blocked else "decoded" if unit == "f16" else "promoted"]
    if m <= TILES["low"].m:
        return TILES["low"]
    rounds = [-(-(-(-m // tile.m) * -(-n // tile.n)) // _MULTIPROCESSORS) for tile in (TILES["narrow"], TILES["wide"])]
    return TILES["wide" if m > TILES["wide"].m and 2 * rounds[1] <= rounds[0] else "narrow"]


def unit_of(fnuz: bool, machine: Machine) -> str:
    """What multiplies: "fp8" where the matrix unit has this e4m3, "f16" where it has another or none, "binary32" without one."""
    if not machine.native:
        return "binary32"
    return "fp8" if fnuz == machine.fnuz and machine.datapaths["fp8"] != machine.datapaths["f16"] else "f16"


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for a problem that the kernel computes, otherwise one sentence that says what it takes."""
    n, k, blocked = problem.dim("n"), problem.dim("k"), problem.variant == "block"
    options = (problem.option("act_scale"), problem.option("weight_scale"))
    takes = (
        (n > 0 and n % 8 == 0, f"N is a positive multiple of 8, got N = {n}"),
        (k > 0 and k % 16 == 0, f"K is a positive multiple of 16, got K = {k}"),
        (not blocked or k % 128 == 0, f"with block scales K is a multiple of 128, got K = {k}"),
        (not blocked or options == ("token", "channel"), f"block scales leave no choice of scales, got {', '.join(options)}"),
        (problem.option("bias") != "biasafter" or problem.option("out") != "f32", "a bias after the cast needs a 16-bit output"),
    )
    return next((f"gemm_w8a8_fp8: {sentence}" for good, sentence in takes if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """`block` has one way; `scaled` chains in the matrix unit, or promotes."""
    if problem.variant == "block":
        return ("default",)
    return ("fast", "promoted") if _promotes(problem.option("format") == "fnuz", machine) else ("fast",)


def _promotes(fnuz: bool, machine: Machine) -> bool:
    """Whether the unit that multiplies can be told to end its chains: the fp8 instruction of Hopper."""
    return unit_of(fnuz, machine) == "fp8" and machine.datapaths["fp8"] == "hopper_wgmma_fp8"


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The program of the kernel, every step rounded on its own."""
    out, bias = _OUT[problem.option("out")], problem.option("bias")
    unit = unit_of(problem.option("format") == "fnuz", machine)
    path = DATAPATHS[machine.datapaths["fp8" if unit == "fp8" else "f16"]]
    conversion = F16 if unit == "f16" else None
    before: tuple[Step, ...] = (add("bias"),) if bias == "bias" else ()
    after: tuple[Step, ...] = (add("bias", format=out), cast(out)) if bias == "biasafter" else ()
    if problem.variant == "block":
        steps = (cast(F32), mul("a_scale", "w_scale"))
        main = Contraction(("a", "w"), path, order=machine.order, segment=_PROMOTION, steps=steps, conversion=conversion)
        return Declaration((main, *before, cast(out), *after), batch_invariant=machine.native)
    segment = _PROMOTION if tactic == "promoted" else 0
    main = Contraction(("a", "w"), path, order=machine.order, segment=segment, conversion=conversion)
    program: tuple[Contraction | Step, ...] = (
        main, cast(F32), mul("channel_scale"), mul("token_scale"), *before, cast(out), *after,
    )
    return Declaration(program, batch_invariant=machine.native)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """No scratch memory."""
    return 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> dict[str, torch.Tensor]:
    """The tensors as they lie; scales as binary32."""
    found = {name: rows_of(view)[0] if name in ("a", "w") else tensor(view).contiguous() for name, view in constants.items()}
    return {name: found[name].view(torch.float32) if name.endswith("scale") else found[name] for name in found}


stage = prepare


def run(
    problem: Problem, tactic: str, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, TensorView], workspace: Any, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Launch the kernel and name it."""
    tensors, blocked = {**state, **inputs}, problem.variant == "block"
    scales = ("a_scale", "w_scale") if blocked else ("token_scale", "channel_scale")
    return launch(
        tensors["a"], tensors["w"], tensors[scales[0]], tensors[scales[1]], tensors.get("bias"), tensor(outputs["d"]),
        out=problem.option("out"), fnuz=problem.option("format") == "fnuz", blocked=blocked, promoted=tactic == "promoted",
        bias_after=problem.option("bias") == "biasafter", machine=machine, fault=mutant,
    )


def gemm_w8a8_fp8(
    a: torch.Tensor, w: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor, bias: torch.Tensor | None = None,
    out: torch.dtype = torch.bfloat16, *, bias_after: bool = False, promoted: bool = False,
) -> torch.Tensor:
    """D [M, N] = cast(token_scale sum channel_scale + bias). a [M, K] and w [N, K] both float8_e4m3fn or both float8_e4m3fnuz;
    scales float32 of M or 1 and N or 1 elements; bias [N] of `out`. `promoted`: sums of 128 k are added in binary32, where the
    unit can be told to. Raises ValueError for a shape that the kernel does not take, operands of two formats or of another, and a
    bias of another format than `out`."""
    m, n, k = a.shape[0], w.shape[0], a.shape[1]
    if w.shape[1] != k or k % 16 or n % 8:
        got = f"a {tuple(a.shape)} and w {tuple(w.shape)}"
        raise ValueError(f"gemm_w8a8_fp8: got {got}; expected [M, K] and [N, K], K a multiple of 16 and N of 8")
    if a.dtype is not w.dtype or a.dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        got = f"a of {a.dtype} and w of {w.dtype}"
        raise ValueError(f"gemm_w8a8_fp8: got {got}; expected both float8_e4m3fn or both float8_e4m3fnuz")
    if bias is not None and (bias.dtype is not out or bias.shape != (n,)):
        raise ValueError(f"gemm_w8a8_fp8: got a bias {tuple(bias.shape)} of {bias.dtype}; expected ({n},) of out, {out}")
    d = torch.empty((m, n), dtype=out, device=a.device)
    container = torch.int32 if out is torch.float32 else torch.int16
    launch(
        a.view(torch.uint8), w.view(torch.uint8), token_scale, channel_scale, None if bias is None else bias.view(container),
        d.view(container), out={torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[out],
        fnuz=a.dtype is torch.float8_e4m3fnuz, blocked=False, promoted=promoted, bias_after=bias_after, machine=here(),
    )
    return d


def launch(
    a: torch.Tensor, w: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor, bias: torch.Tensor | None,
    d: torch.Tensor, *, out: str, fnuz: bool, blocked: bool, promoted: bool, bias_after: bool, machine: Machine,
    fault: str = "", tile: Tile | None = None,
) -> str:
    """Compute D on its device and the current stream; name the kernel. a and w uint8 with contiguous rows, bias and d containers
    of the output format. M = 0 launches nothing."""
    m, k, n = a.shape[0], a.shape[1], w.shape[0]
    unit, promoted = unit_of(fnuz, machine), promoted and _promotes(fnuz, machine)
    tile = tile or tile_of(m, n, unit, blocked=blocked, promoted=promoted)
    if unit == "fp8":
        element = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
        a, w = a.view(element), w.view(element)
    if m:
        left, right = described(a, tile.m, tile.k), described(w, tile.n, tile.k)
        use = machine.native and left is not None and right is not None
        w8a8_gemm[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
            left if use else a, right if use else w, token_scale, channel_scale, d if bias is None else bias, d, m, n, k,
            a.stride(0), w.stride(0), d.stride(0), **meta(
                out=out, unit=unit, fnuz=fnuz, blocked=blocked, per_token=token_scale.numel() != 1,
                per_channel=channel_scale.numel() != 1, promoted=promoted,
                bias="nobias" if bias is None else "biasafter" if bias_after else "bias", described=use, fault=fault, tile=tile,
            ), num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )
    return f"w8a8_gemm_{unit}_{tile.m}x{tile.n}x{tile.k}"


def meta(
    *, out: str, unit: str, fnuz: bool, blocked: bool, per_token: bool, per_channel: bool, promoted: bool, bias: str,
    described: bool, fault: str, tile: Tile,
) -> dict[str, int | str]:
    """Compile-time arguments of `w8a8_gemm`."""
    return {
        "UNIT": unit, "FNUZ": int(fnuz), "BLOCKED": int(blocked), "PER_TOKEN": int(per_token), "PER_CHANNEL": int(per_channel),
        "PROMOTED": int(promoted), "BIAS": BIASES[bias], "FORMAT": FORMATS[out], "DESCRIBED": int(described), "FAULT": fault,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BAND": tile.band,
    }


def signature(unit: str, out: str, *, fnuz: bool, described: bool, tile: Tile) -> dict[str, str]:
    """Types of the run-time arguments in their order, for an ahead-of-time compilation."""
    element = {"fp8": "fp8e4b8" if fnuz else "fp8e4nv"}.get(unit, "u8")
    operands = {"a": tile.m, "w": tile.n}
    kinds = {name: f"tensordesc<{element}[{rows},{tile.k}]>" if described else f"*{element}" for name, rows in operands.items()}
    code = "*i32" if out == "f32" else "*i16"
    sizes = dict.fromkeys(("m", "n", "k", "a_stride", "w_stride", "d_stride"), "i32")
    return {**kinds, "token_scale": "*fp32", "channel_scale": "*fp32", "bias": code, "d": code, **sizes}
