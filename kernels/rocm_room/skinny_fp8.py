"""gemm_w8a8_fp8 for one to four rows in Triton: one scale per operand, K split over programs, the bias never dropped.

Decides: two kernels. `skinny_parts` gives every compute unit a part of K of 64 columns; `skinny_end` adds the parts in ascending
order, so that the result does not depend on which program ended first, multiplies by both scales, adds the bias in binary32 and
rounds once. Refuses: what dispatch.takes_skinny refuses. The product of two tiles is the one of gemm_w8a8_fp8, branch by branch.

Shapes: A [M, K] and W [N, K] uint8 or fp8 codes; parts [splits, M, N] binary32; token_scale [1], channel_scale [1] binary32; bias
[N] and D [M, N] codes of the output format. Scales multiply (decode direction).
"""

from __future__ import annotations

from collections.abc import Mapping
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
from lowbit.kernels.rocm_room.devices import CHIPS
from lowbit.kernels.rocm_room.dispatch import takes_skinny
from lowbit.kernels.triton_room.gemm_tiles import BIASES, FORMATS, OPTIONS, end, offsets, store_tile
from lowbit.kernels.triton_room.gemm_w8a8_fp8 import product, unit_of
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import scratch, tensor

__all__ = [
    "MUTANTS", "chip_of", "declaration", "launch", "meta_end", "meta_parts", "part_of", "run", "signatures", "skinny_end",
    "skinny_parts", "splits_of", "takes", "workspace",
]

MUTANTS = ("bias_dropped_at_m1", "last_part_lost")

_ROWS, _COLUMNS, _DEPTH = 16, 64, 256  # rows of an MFMA tile; columns and k of one
_MOST_SPLITS = 8
_INSTRUCTION_K = 32  # a multiple of that of every branch: fp8 of gfx942 32, binary16 8, binary32 1
_OUT = {"bf16": BF16, "f16": F16, "f32": F32}


@triton.jit
def skinny_parts(  # type: ignore[no-untyped-def]
    a, w, parts, m, n, k, part_k, a_stride, w_stride, UNIT: tl.constexpr, FNUZ: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):
    """parts[s, i, j]: sum of A[i, k] W[j, k] over part s of K. Program (tile of columns, s)."""
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * part_k
    last = tl.minimum(first + part_k, k)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        of_a, of_w = (rows < m)[:, None] & (depth < last)[None, :], (columns < n)[:, None] & (depth < last)[None, :]
        left = tl.load(a + offsets(rows, a_stride, "")[:, None] + depth[None, :], mask=of_a, other=0.0)
        right = tl.load(w + offsets(columns, w_stride, "")[:, None] + depth[None, :], mask=of_w, other=0.0)
        total = product(left, right, total, UNIT, FNUZ, 0)
    place = tl.program_id(1).to(tl.int64) * m * n + offsets(rows, n, "")[:, None] + columns[None, :]
    tl.store(parts + place, total, mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def skinny_end(  # type: ignore[no-untyped-def]
    parts, token_scale, channel_scale, bias, d, m, n, splits, d_stride, BIAS: tl.constexpr, FORMAT: tl.constexpr,
    FAULT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """D from the parts, COLUMNS columns per program."""
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for split in range(0, splits - 1 if FAULT == "last_part_lost" else splits):
        place = tl.cast(split, tl.int64) * m * n + offsets(rows, n, "")[:, None] + columns[None, :]
        total = total + tl.load(parts + place, mask=inside, other=0.0)
    total = total * tl.load(channel_scale) * tl.load(token_scale)
    store_tile(d, end(total, bias, columns, m, n, BIAS, FORMAT, FAULT), rows, m, columns, n, d_stride, FAULT)


# Host ----------------------------------------------------------------------------------------------------------------


def chip_of(machine: Machine) -> str:
    """The chip behind a record, interpreted or not."""
    return machine.name.partition(",")[0]


def splits_of(n: int, k: int, machine: Machine) -> int:
    """Parts of K, equal and of whole instructions: as many as fill the compute units of the chip, at most 8, none below 512 k."""
    tiles = triton.cdiv(n, _COLUMNS)
    most = max(1, min(_MOST_SPLITS, CHIPS[chip_of(machine)].units // int(tiles), k // 512))
    return next(splits for splits in range(most, 0, -1) if splits == 1 or k % (_INSTRUCTION_K * splits) == 0)


def part_of(k: int, splits: int) -> int:
    """k per part. Raises ValueError for several parts that are not equal and whole instructions: `Contraction(splits=..)` would
    cut K elsewhere on a datapath of another instruction."""
    if splits > 1 and k % (_INSTRUCTION_K * splits):
        raise ValueError(f"skinny_fp8: got {splits} parts of K = {k}; expected K a multiple of {_INSTRUCTION_K * splits}, or one")
    return k // splits


def takes(problem: Problem, machine: Machine) -> bool:
    """Whether this is a tactic of a problem of gemm_w8a8_fp8."""
    scales = (problem.option("act_scale"), problem.option("weight_scale")) == ("atensor", "wtensor")
    own = (problem.option("format") == "fnuz") == machine.fnuz
    return problem.variant == "scaled" and takes_skinny(problem.dim("m"), problem.dim("k"), one_scale_each=scales, own_format=own)


def declaration(problem: Problem, machine: Machine) -> Declaration:
    """One sum per part, parts ascending, every later step rounded on its own. NumPy's products, on which the interpreter rests,
    sum a row by its place in the tile: there no row is promised to be alone."""
    out, bias, unit = _OUT[problem.option("out")], problem.option("bias"), unit_of(machine.fnuz, machine)
    path = DATAPATHS[machine.datapaths["fp8" if unit == "fp8" else "f16"]]
    before: tuple[Step, ...] = (add("bias"),) if bias == "bias" else ()
    after: tuple[Step, ...] = (add("bias", format=out), cast(out)) if bias == "biasafter" else ()
    splits = splits_of(problem.dim("n"), problem.dim("k"), machine)
    main = Contraction(("a", "w"), path, order=machine.order, splits=splits, conversion=F16 if unit == "f16" else None)
    program: tuple[Contraction | Step, ...] = (
        main, cast(F32), mul("channel_scale"), mul("token_scale"), *before, cast(out), *after,
    )
    return Declaration(program, batch_invariant=machine.native)


def workspace(problem: Problem, machine: Machine) -> int:
    """Bytes of the parts."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    return 4 * splits_of(n, k, machine) * m * n


def run(
    problem: Problem, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, TensorView],
    space: TensorView, machine: Machine, mutant: str = "",
) -> str:
    """Launch both kernels and name them. Tensors as gemm_w8a8_fp8 prepares them."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    parts = scratch(space, torch.float32, (splits_of(n, k, machine), m, n))
    return launch(
        inputs["a"], state["w"], inputs["token_scale"], state["channel_scale"], state.get("bias"), tensor(outputs["d"]), parts,
        out=problem.option("out"), bias=problem.option("bias"), machine=machine, fault=mutant,
    )


def launch(
    a: torch.Tensor, w: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor, addend: torch.Tensor | None,
    d: torch.Tensor, parts: torch.Tensor, *, out: str, bias: str, machine: Machine, fault: str = "",
) -> str:
    """Compute D on its device and the current stream. a and w uint8 codes in the chip's own e4m3, rows contiguous; parts binary32
    [splits, M, N]; addend and d containers of `out`."""
    m, k, n, splits = a.shape[0], a.shape[1], w.shape[0], parts.shape[0]
    unit = unit_of(machine.fnuz, machine)
    if unit == "fp8":
        element = torch.float8_e4m3fnuz if machine.fnuz else torch.float8_e4m3fn
        a, w = a.view(element), w.view(element)
    tiles = triton.cdiv(n, _COLUMNS)
    skinny_parts[(tiles, splits)](a, w, parts, m, n, k, part_of(k, splits), a.stride(0), w.stride(0), **meta_parts(unit, machine),
                                  num_warps=4, **OPTIONS)
    skinny_end[(tiles,)](
        parts, token_scale, channel_scale, d if addend is None else addend, d, m, n, splits, d.stride(0),
        **meta_end(out, "nobias" if addend is None else bias, fault), num_warps=4, **OPTIONS,
    )
    return f"skinny_{unit}_{splits}"


def signatures(unit: str, out: str, machine: Machine) -> dict[str, dict[str, str]]:
    """Types of the run-time arguments of both kernels in their order, for an ahead-of-time compilation."""
    element = {"fp8": "fp8e4b8" if machine.fnuz else "fp8e4nv"}.get(unit, "u8")
    sizes, code = ("m", "n", "k", "part_k", "a_stride", "w_stride"), "*i32" if out == "f32" else "*i16"
    first = {"a": f"*{element}", "w": f"*{element}", "parts": "*fp32", **dict.fromkeys(sizes, "i32")}
    pointers = {"parts": "*fp32", "token_scale": "*fp32", "channel_scale": "*fp32", "bias": code, "d": code}
    return {"skinny_parts": first, "skinny_end": {**pointers, **dict.fromkeys(("m", "n", "splits", "d_stride"), "i32")}}


def meta_parts(unit: str, machine: Machine) -> dict[str, Any]:
    """Compile-time arguments of `skinny_parts`."""
    return {"UNIT": unit, "FNUZ": int(machine.fnuz), "ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH}


def meta_end(out: str, bias: str, fault: str = "") -> dict[str, Any]:
    """Compile-time arguments of `skinny_end`."""
    return {"BIAS": BIASES[bias], "FORMAT": FORMATS[out], "FAULT": fault, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
