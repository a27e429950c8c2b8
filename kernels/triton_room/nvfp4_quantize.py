"""nvfp4_quantize in Triton: every recipe by one kernel, the recipe as compile-time numbers.

Decides: tiles, addresses of codes and scales (linear or in 128 x 4 tiles), and where a tensor's scale is found. Refuses: problems
outside the contract's domain. Arithmetic is in `blocks`, the tensor's scale in `tensor_scale`.

q is written packed, two codes a byte, the even k in bits 0 to 3; the suite's one code per byte is made of it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView
from lowbit.kernels.triton_room.blocks import NVFP4_RECIPES, Nvfp4Recipe, flags, nvfp4_block, offset, packed
from lowbit.kernels.triton_room.codes8 import OPTIONS
from lowbit.kernels.triton_room.codes16 import value
from lowbit.kernels.triton_room.encodings import unpack_nibbles
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import rows_of, scratch, tensor
from lowbit.kernels.triton_room.tensor_scale import find_scale, parts

__all__ = [
    "MUTANTS", "OPS", "declaration", "nvfp4_quantize", "prepare", "run", "stage", "tactics", "unsupported", "workspace",
]

OPS = ("nvfp4_quantize",)
MUTANTS = ("offsets_wrap", "padding_not_written")

_FORMS = {"f32": 0, "f16": 1, "bf16": 2}
_ONE_LEVEL = ("svdquant", "svdquant_triton", "nunchaku", "deepgemm")


@triton.jit(do_not_specialize=["m", "rows", "blocks", "columns", "scale_stride"])
def nvfp4_quantize_kernel(  # type: ignore[no-untyped-def]
    x, global_scale, q, scales, m, rows, blocks, columns, x_stride, q_stride, scale_stride,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, WRAP: tl.constexpr, LEVELS: tl.constexpr, SIZE: tl.constexpr,
    NAN: tl.constexpr, SIXTH: tl.constexpr, JOIN: tl.constexpr, FLOOR: tl.constexpr, CAP: tl.constexpr, ZERO: tl.constexpr,
    STORED: tl.constexpr, EFFECT: tl.constexpr, FLUSH: tl.constexpr, AT_ZERO: tl.constexpr, TIES: tl.constexpr,
    SIGN: tl.constexpr, NAN_CODE: tl.constexpr, CHOICE: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):
    """ROWS rows and BLOCKS blocks of SIZE along K per program. x [m, blocks * SIZE]; q [m, blocks * SIZE / 2] packed; scales
    [rows, columns], of which only [m, blocks] belong to x: the others become code 0. LEVELS = 2: global_scale[0] is read."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    present = (row < m)[:, None] & (block < blocks)[None, :]
    inner = (block * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
    start = offset(row, x_stride, WRAP)[:, None, None]
    elements = value(tl.load(x + start + inner[None, :, :], mask=present[:, :, None], other=0), FORMAT)
    g = tl.zeros((ROWS, BLOCKS), tl.float32)
    if LEVELS == 2:
        g += tl.load(global_scale).to(tl.float32, bitcast=True)
    codes, code = nvfp4_block(elements, g, NAN, SIXTH, JOIN, FLOOR, CAP, ZERO, STORED, EFFECT, FLUSH, AT_ZERO, TIES, SIGN,
                              NAN_CODE, CHOICE, WIDE)
    half = (block * (SIZE // 2))[:, None] + tl.arange(0, SIZE // 2)[None, :]
    tl.store(q + offset(row, q_stride, 0)[:, None, None] + half[None, :, :], packed(codes), mask=present[:, :, None])
    code = tl.where(present, code, 0)
    if SWIZZLED:
        down, across = row.to(tl.int64)[:, None], block[None, :]
        place = (down // 128 * (columns // 4) + across // 4) * 512 + down % 32 * 16 + down // 32 % 4 * 4 + across % 4
        place = place // columns * scale_stride + place % columns
    else:
        place = offset(row, scale_stride, 0)[:, None] + block[None, :]
    tl.store(scales + place, code, mask=(row < rows)[:, None] & (block < columns)[None, :])


def nvfp4_quantize(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, recipe: Nvfp4Recipe, *, form: int,
    global_scale: torch.Tensor | None = None, swizzled: bool = False, rows: int = -1, wide: bool = False, wrap: bool = False,
) -> None:
    """Codes and block scales of x [m, K], codes of `form` (0 binary32, 1 binary16, 2 bf16; int32 or int16 containers).

    q: uint8 [m, K / 2], packed. scales: uint8 [m, K / 16] e4m3, in layout `swizzled` [128 ceil(m / 128), 4 ceil(K / 64)]; recipe
    deepgemm: int32 [m, K / 128] binary32. Rows may be apart, the last axis is contiguous. global_scale: int32 [1], a binary32
    code, for recipes with two levels. `rows`: rows of `scales` to write (default all). `wide`: tiles for the interpreter. `wrap`:
    a planted fault.
    """
    m, k = x.shape
    size = 128 if recipe.wide else 16
    rows = scales.shape[0] if rows < 0 else rows
    columns = scales.shape[1]
    if rows == 0 or k == 0:
        return
    tile_rows, tile_blocks = (256, 1024 // size) if wide else (16, 256 // size)
    nvfp4_quantize_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_blocks))](
        x, x if global_scale is None else global_scale, q, scales, m, rows, k // size, columns, x.stride(0), q.stride(0),
        scales.stride(0), FORMAT=form, SWIZZLED=int(swizzled), WRAP=int(wrap), LEVELS=1 if global_scale is None else 2, SIZE=size,
        **flags(recipe), ROWS=tile_rows, BLOCKS=tile_blocks, num_warps=4, **OPTIONS,
    )


# Door ----------------------------------------------------------------------------------------------------------------


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for every problem in the contract's domain (QNT-40, 41, 42, 53), otherwise the rule that it breaks."""
    k, recipe = problem.dim("k"), problem.option("recipe")
    one = recipe in _ONE_LEVEL
    rules = (
        (k > 0 and k % 16 == 0, f"K must be a positive multiple of 16, got {k}"),
        (one == (problem.variant == "none"), f"recipe {recipe} has no variant {problem.variant}"),
        (recipe != "deepgemm" or (k % 128 == 0 and problem.option("layout") == "linear"),
         "deepgemm needs K a multiple of 128 and linear scales"),
        (recipe not in ("vllm", "nunchaku") or problem.option("x") != "f32", f"recipe {recipe} reads f16 and bf16"),
    )
    return next((f"nvfp4_quantize: {sentence}" for good, sentence in rules if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """One kernel."""
    return ("default",)


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The contract fixes every bit."""
    return EXACT_BITS


def _bytes(problem: Problem, machine: Machine) -> tuple[int, int]:
    """Bytes of packed codes and of partial maxima."""
    m, k = problem.dim("m"), problem.dim("k")
    return -(-m * (k // 2) // 16) * 16, 4 * parts(m, k, wide=not machine.native)


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """Packed codes, partial maxima and a global scale."""
    return sum(_bytes(problem, machine)) + 16


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
    """Quantise into packed codes, then lay out one code per byte."""
    m, k = problem.dim("m"), problem.dim("k")
    recipe, wide = NVFP4_RECIPES[problem.option("recipe")], not machine.native
    x, x_stride = rows_of(inputs["x"])
    codes_bytes, _ = _bytes(problem, machine)
    scale = None
    if problem.variant == "static":
        scale = tensor(inputs["global_scale"])
    elif problem.variant == "dynamic":
        scale = tensor(outputs["global_scale"])
        found = scratch(workspace, torch.int32, (parts(m, k, wide=wide),), codes_bytes)
        find_scale(x, x_stride, (m, k), scale, found, form=_FORMS[problem.option("x")], nan=recipe.nan, limit=recipe.range,
                   encode=recipe.encode, guard=recipe.guard, wide=wide)
    scales = tensor(outputs["scales"])
    if m:
        q = scratch(workspace, torch.uint8, (m, k // 2))
        nvfp4_quantize(
            x, q, scales, recipe, form=_FORMS[problem.option("x")], global_scale=scale,
            swizzled=problem.option("layout") == "swizzled", rows=m if mutant == "padding_not_written" else -1, wide=wide,
            wrap=mutant == "offsets_wrap",
        )
        unpack_nibbles(q, tensor(outputs["q"]), wide=wide)
    return f"nvfp4_quantize_{problem.option('recipe')}"
