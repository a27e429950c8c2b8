"""fp8_quantize in Triton: one scale per tensor, token, 1 x 128 block or 128 x 128 tile, every recipe by compile-time numbers.

Decides: walks and addresses of the three kernels (a scale from memory, a scale per row, a scale per block) and the bounds of
codes. Refuses: problems outside the contract's domain. Rows of q from M on become 0 under every recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView
from lowbit.kernels.triton_room.blocks import magnitudes, offset
from lowbit.kernels.triton_room.codes8 import OPTIONS, e4m3_code
from lowbit.kernels.triton_room.codes16 import value
from lowbit.kernels.triton_room.division import div, reciprocal
from lowbit.kernels.triton_room.int8_quantize import row_amax
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import rows_of, scratch, tensor
from lowbit.kernels.triton_room.tensor_scale import find_scale, parts

__all__ = [
    "FP8_RECIPES", "MUTANTS", "OPS", "Fp8Recipe", "declaration", "fp8_by_blocks", "fp8_by_rows", "fp8_by_scale", "prepare", "run",
    "stage", "tactics", "unsupported", "workspace",
]

OPS = ("fp8_quantize",)
MUTANTS = ("offsets_wrap", "padding_not_written")

_FORMS = {"f32": 0, "f16": 1, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Fp8Recipe:
    """One source system. nan: 1, a NaN reaches the scale. floor: 1, scales are at least fl(1 / (512 max)). least: of amax before
    the division. divide: 1, q = x / scale; 0, q = x fl(1 / scale). inverse: 1, elements are multiplied by m = fl(max / amax) and
    fl(1 / m) is stored. nan_code: of a NaN quotient, 0 NaN, 1 the upper bound, 2 the lower one. whole: 1, codes may reach the
    largest value of the format (240 of e4m3fnuz) and not only max."""

    nan: int = 1
    floor: int = 0
    least: float = 0.0
    divide: int = 0
    inverse: int = 0
    nan_code: int = 0
    whole: int = 0


FP8_RECIPES: Mapping[tuple[str, str], Fp8Recipe] = {
    ("static", "vllm"): Fp8Recipe(nan_code=1), ("static", "vllm_native"): Fp8Recipe(),
    ("tensor", "vllm"): Fp8Recipe(nan=0, nan_code=1), ("tensor", "vllm_native"): Fp8Recipe(floor=1),
    ("token", "vllm"): Fp8Recipe(nan=0, floor=1, divide=1, nan_code=1), ("token", "vllm_native"): Fp8Recipe(floor=1),
    ("block", "vllm"): Fp8Recipe(nan=0, least=float(np.float32(1e-10)), divide=1, nan_code=2),
    ("block", "scaled_quantize"): Fp8Recipe(least=float(np.float32(1e-12)), inverse=1, whole=1),
    ("block", "deepgemm"): Fp8Recipe(least=float(np.float32(1e-4))),
    ("tile", "deepgemm"): Fp8Recipe(least=float(np.float32(1e-4))),
}
"""By variant and the recipe's token. Sources of the numbers: clauses QNT-10 to QNT-18 of the contract."""


@triton.jit
def fp8_code(quotient, FNUZ: tl.constexpr, TOP: tl.constexpr, NAN_CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 code of a quotient bounded by TOP; a NaN becomes TOP (1), -TOP (2) or stays (0)."""
    if NAN_CODE == 1:
        quotient = tl.where(quotient == quotient, quotient, TOP)
    elif NAN_CODE == 2:
        quotient = tl.where(quotient == quotient, quotient, -TOP)
    return e4m3_code(quotient, FNUZ, TOP)


@triton.jit(do_not_specialize=["m", "rows"])
def fp8_by_scale_kernel(  # type: ignore[no-untyped-def]
    x, scale, q, m, rows, k, x_stride, q_stride, FORMAT: tl.constexpr, FNUZ: tl.constexpr, TOP: tl.constexpr,
    NAN_CODE: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """q [rows, k] of x [m, k] times fl(1 / scale[0]); rows from m on are 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present, inside = (row < m)[:, None], (column < k)[None, :]
    inverse = reciprocal(tl.zeros((1, 1), tl.float32) + tl.load(scale).to(tl.float32, bitcast=True))
    start = offset(row, x_stride, WRAP)[:, None]
    part = value(tl.load(x + start + column[None, :], mask=present & inside, other=0), FORMAT)
    codes = tl.where(present, fp8_code(part * inverse, FNUZ, TOP, NAN_CODE), 0).to(tl.uint8)
    tl.store(q + offset(row, q_stride, 0)[:, None] + column[None, :], codes, mask=(row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["m", "rows", "scale_stride"])
def fp8_by_rows_kernel(  # type: ignore[no-untyped-def]
    x, bound, q, scales, m, rows, k, x_stride, q_stride, scale_stride, FORMAT: tl.constexpr, FNUZ: tl.constexpr,
    TOP: tl.constexpr, NAN: tl.constexpr, FLOOR: tl.constexpr, DIVIDE: tl.constexpr, NAN_CODE: tl.constexpr,
    BOUNDED: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One scale per row of x [m, k]; bound[0] is the largest amax (BOUNDED). Rows of q from m to `rows` are 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < m
    start = offset(row, x_stride, WRAP)
    amax = row_amax(x, start, present, k, FORMAT, NAN, ROWS, COLUMNS)
    if BOUNDED:
        most = tl.load(bound).to(tl.float32, bitcast=True)
        amax = tl.where(amax > most, most, amax)
    scale = div(amax, tl.full((ROWS,), TOP, tl.float32))
    scale = tl.where(scale < FLOOR, FLOOR, scale)
    tl.store(scales + offset(row, scale_stride, 0), scale.to(tl.int32, bitcast=True), mask=present)
    for first in range(0, k, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < k)[None, :]
        part = value(tl.load(x + start[:, None] + column[None, :], mask=present[:, None] & inside, other=0), FORMAT)
        quotient = div(part, scale[:, None]) if DIVIDE else part * reciprocal(scale)[:, None]
        codes = tl.where(present[:, None], fp8_code(quotient, FNUZ, TOP, NAN_CODE), 0).to(tl.uint8)
        tl.store(q + offset(row, q_stride, 0)[:, None] + column[None, :], codes, mask=(row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["m", "scale_stride"])
def fp8_by_blocks_kernel(  # type: ignore[no-untyped-def]
    x, q, scales, m, x_stride, q_stride, scale_stride, FORMAT: tl.constexpr, FNUZ: tl.constexpr, TOP: tl.constexpr,
    MOST: tl.constexpr, NAN: tl.constexpr, LEAST: tl.constexpr, DIVIDE: tl.constexpr, INVERSE: tl.constexpr,
    NAN_CODE: tl.constexpr, TILE: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr,
):
    """ROWS rows and 128 columns per program: a scale per row, or (TILE, ROWS = 128) one for all. MOST bounds the codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < m)[:, None]
    part = value(tl.load(x + offset(row, x_stride, WRAP)[:, None] + column[None, :], mask=inside, other=0), FORMAT)
    best = tl.max(magnitudes(part, NAN), axis=1)
    if TILE:
        best = tl.zeros((ROWS,), tl.int32) + tl.max(best, axis=0)
    amax = best.to(tl.float32, bitcast=True)
    amax = tl.where(amax < LEAST, LEAST, amax)
    top = tl.full((ROWS,), TOP, tl.float32)
    if INVERSE:
        factor = div(top, amax)
        scale, quotient = reciprocal(factor), part * factor[:, None]
    else:
        scale = div(amax, top)
        quotient = div(part, scale[:, None]) if DIVIDE else part * reciprocal(scale)[:, None]
    codes = fp8_code(quotient, FNUZ, MOST, NAN_CODE)
    tl.store(q + offset(row, q_stride, 0)[:, None] + column[None, :], codes, mask=inside)
    if TILE:
        place = tl.program_id(0).to(tl.int64) * scale_stride + tl.program_id(1) + tl.zeros((ROWS,), tl.int64)
        tl.store(scales + place, scale.to(tl.int32, bitcast=True), mask=(row % ROWS) == 0)
    else:
        place = offset(row, scale_stride, 0) + tl.program_id(1)
        tl.store(scales + place, scale.to(tl.int32, bitcast=True), mask=row < m)


def top_of(*, fnuz: bool) -> float:
    """The range that scales are made for (QNT-10)."""
    return 224.0 if fnuz else 448.0


def floor_of(*, fnuz: bool) -> float:
    """fl(1 / (512 max))."""
    return float(np.float32(1) / np.float32(512 * top_of(fnuz=fnuz)))


def fp8_by_scale(
    x: torch.Tensor, scale: torch.Tensor, q: torch.Tensor, recipe: Fp8Recipe, *, form: int, fnuz: bool, rows: int = -1,
    wide: bool = False, wrap: bool = False,
) -> None:
    """x [m, K], codes of `form` (0 binary32, 1 binary16, 2 bf16), with one scale (int32 binary32 code [1], decode direction) ->
    uint8 q [p, K], p at least m: rows from m on are 0. `rows`: rows of q to write (default all). `wide`: tiles for the
    interpreter."""
    m, k = x.shape
    rows = q.shape[0] if rows < 0 else rows
    if rows == 0:
        return
    tile = (256, min(triton.next_power_of_2(k), 4096)) if wide else (8, min(triton.next_power_of_2(k), 512))
    fp8_by_scale_kernel[(triton.cdiv(rows, tile[0]), triton.cdiv(k, tile[1]))](
        x, scale, q, m, rows, k, x.stride(0), q.stride(0), FORMAT=form, FNUZ=int(fnuz), TOP=top_of(fnuz=fnuz),
        NAN_CODE=recipe.nan_code, WRAP=int(wrap), ROWS=tile[0], COLUMNS=tile[1], **OPTIONS,
    )


def fp8_by_rows(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, recipe: Fp8Recipe, *, form: int, fnuz: bool,
    bound: torch.Tensor | None = None, rows: int = -1, wide: bool = False, wrap: bool = False,
) -> None:
    """As `fp8_by_scale` with a scale per row, found: int32 binary32 codes [m, 1]. bound: int32 code [1] of the largest amax."""
    m, k = x.shape
    rows = q.shape[0] if rows < 0 else rows
    if rows == 0:
        return
    tile = (256, min(triton.next_power_of_2(k), 4096)) if wide else (4, min(triton.next_power_of_2(k), 1024))
    fp8_by_rows_kernel[(triton.cdiv(rows, tile[0]),)](
        x, scales if bound is None else bound, q, scales, m, rows, k, x.stride(0), q.stride(0), scales.stride(0), FORMAT=form,
        FNUZ=int(fnuz), TOP=top_of(fnuz=fnuz), NAN=recipe.nan, FLOOR=floor_of(fnuz=fnuz) if recipe.floor else 0.0,
        DIVIDE=recipe.divide, NAN_CODE=recipe.nan_code, BOUNDED=int(bound is not None), WRAP=int(wrap), ROWS=tile[0],
        COLUMNS=tile[1], **OPTIONS,
    )


def fp8_by_blocks(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, recipe: Fp8Recipe, *, form: int, fnuz: bool, tile: bool = False,
    wide: bool = False, wrap: bool = False,
) -> None:
    """x [m, K], K a multiple of 128 -> uint8 q [m, K] and int32 binary32 scales [m, K / 128]; `tile`: [m / 128, K / 128]."""
    m, k = x.shape
    if m == 0:
        return
    rows = 128 if tile else (256 if wide else 16)
    fp8_by_blocks_kernel[(triton.cdiv(m, rows), k // 128)](
        x, q, scales, m, x.stride(0), q.stride(0), scales.stride(0), FORMAT=form, FNUZ=int(fnuz), TOP=top_of(fnuz=fnuz),
        MOST=(240.0 if fnuz else 448.0) if recipe.whole else top_of(fnuz=fnuz), NAN=recipe.nan, LEAST=recipe.least,
        DIVIDE=recipe.divide, INVERSE=recipe.inverse, NAN_CODE=recipe.nan_code, TILE=int(tile), WRAP=int(wrap), ROWS=rows,
        num_warps=8 if tile else 4, **OPTIONS,
    )


# Door ----------------------------------------------------------------------------------------------------------------


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for every problem in the contract's domain (QNT-2, 10, 13, 14, 18), otherwise the rule that it breaks."""
    k, variant, recipe = problem.dim("k"), problem.variant, problem.option("recipe")
    by_blocks = variant in ("block", "tile")
    rules = (
        (k > 0, f"K must be positive, got {k}"),
        ((variant, recipe) in FP8_RECIPES, f"recipe {recipe} has no variant {variant}"),
        (not by_blocks or k % 128 == 0, f"{variant} needs K a multiple of 128, got {k}"),
        (variant != "tile" or problem.dim("m") % 128 == 0, f"tile needs M a multiple of 128, got {problem.dim('m')}"),
        (problem.option("ub") == "no_ub" or variant == "token", "only per-token scales take an upper bound"),
        (not by_blocks or problem.dim("p") <= problem.dim("m"), "block scales have no row padding"),
    )
    return next((f"fp8_quantize: {sentence}" for good, sentence in rules if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """One kernel."""
    return ("default",)


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The contract fixes every bit."""
    return EXACT_BITS


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """Partial maxima of the variant `tensor`."""
    tensor_wide = problem.variant == "tensor"
    return 4 * parts(problem.dim("m"), problem.dim("k"), wide=not machine.native) if tensor_wide else 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView], machine: Machine) -> Any:
    """The tensors as they are: there are none."""
    return constants


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView], machine: Machine) -> Any:
    """The tensors as they are."""
    return activations


def run(
    problem: Problem, tactic: str, state: Any, inputs: Mapping[str, TensorView], outputs: Mapping[str, TensorView],
    workspace: TensorView, stream: Any, machine: Machine, mutant: str = "",
) -> str:
    """Quantise."""
    variant, m, k = problem.variant, problem.dim("m"), problem.dim("k")
    recipe = FP8_RECIPES[variant, problem.option("recipe")]
    form, fnuz, wide = _FORMS[problem.option("x")], problem.option("format") == "fnuz", not machine.native
    x, x_stride = rows_of(inputs["x"])
    q, wrap = tensor(outputs["q"]), mutant == "offsets_wrap"
    rows = m if mutant == "padding_not_written" else -1
    if variant in ("block", "tile"):
        fp8_by_blocks(x, q, tensor(outputs["scales"]), recipe, form=form, fnuz=fnuz, tile=variant == "tile", wide=wide, wrap=wrap)
    elif variant == "token":
        bound = tensor(inputs["scale_ub"]) if problem.option("ub") == "ub" else None
        fp8_by_rows(x, q, tensor(outputs["scales"]), recipe, form=form, fnuz=fnuz, bound=bound, rows=rows, wide=wide, wrap=wrap)
    else:
        scale = tensor(inputs["scale"]) if variant == "static" else tensor(outputs["scales"])
        if variant == "tensor":
            found = scratch(workspace, torch.int32, (parts(m, k, wide=wide),))
            find_scale(x, x_stride, (m, k), scale, found, form=form, nan=recipe.nan, limit=top_of(fnuz=fnuz), encode=0,
                       floor=floor_of(fnuz=fnuz) if recipe.floor else 0.0, wide=wide)
        fp8_by_scale(x, scale, q, recipe, form=form, fnuz=fnuz, rows=rows, wide=wide, wrap=wrap)
    return f"fp8_quantize_{variant}_{problem.option('recipe')}"
