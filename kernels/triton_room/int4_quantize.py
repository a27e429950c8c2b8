"""int4_quantize in Triton: every recipe by one kernel, a group of any size along K per row.

Decides: two walks along a group, for its statistics and for its codes. Refuses: problems outside the contract's domain.
Arithmetic is in `blocks`. q is written as one code per byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView
from lowbit.kernels.triton_room.blocks import INT4_RULES, int4_codes, int4_scale, key_of, magnitudes, offset, value_of_key
from lowbit.kernels.triton_room.codes8 import OPTIONS
from lowbit.kernels.triton_room.codes16 import code, value
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import rows_of, tensor

__all__ = ["MUTANTS", "OPS", "declaration", "int4_quantize", "prepare", "run", "stage", "tactics", "unsupported", "workspace"]

OPS = ("int4_quantize",)
MUTANTS = ("offsets_wrap",)

_FORMS = {"f32": 0, "f16": 1, "bf16": 2}


@triton.jit(do_not_specialize=["n", "scale_stride", "zero_stride"])
def int4_quantize_kernel(  # type: ignore[no-untyped-def]
    x, q, scales, zeros, n, g, x_stride, q_stride, scale_stride, zero_stride, FORMAT: tl.constexpr, RULE: tl.constexpr,
    OFFSET: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """ROWS rows of one group of g elements per program, grid (rows, groups). OFFSET is added to every code. zeros is written
    where RULE has zero points."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    inside = row < n
    start = offset(row, x_stride, WRAP) + group.to(tl.int64) * g
    best = tl.zeros((ROWS,), tl.int32)
    high = tl.full((ROWS,), -0x80000000, tl.int32)
    low = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
    for first in range(0, g, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < g)[None, :]
        part = value(tl.load(x + start[:, None] + column[None, :], mask=mask, other=0), FORMAT)
        best = tl.maximum(best, tl.max(magnitudes(part, RULE != 5), axis=1))
        high = tl.maximum(high, tl.max(tl.where(mask, key_of(part), -0x80000000), axis=1))
        low = tl.minimum(low, tl.min(tl.where(mask, key_of(part), 0x7FFFFFFF), axis=1))
    stored, scale, zero = int4_scale(best.to(tl.float32, bitcast=True), value_of_key(high), value_of_key(low), RULE, FORMAT)
    tl.store(scales + offset(row, scale_stride, 0) + group, code(stored, 1 if RULE == 4 else FORMAT), mask=inside)
    if (RULE == 1) | (RULE == 3):
        tl.store(zeros + offset(row, zero_stride, 0) + group, (zero.to(tl.int32) & 15).to(tl.uint8), mask=inside)
    for first in range(0, g, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < g)[None, :]
        part = value(tl.load(x + start[:, None] + column[None, :], mask=mask, other=0), FORMAT)
        codes = int4_codes(part, scale, zero, RULE, FORMAT) + OFFSET
        target = q + (offset(row, q_stride, 0) + group.to(tl.int64) * g)[:, None] + column[None, :]
        tl.store(target, (codes & 15).to(tl.uint8), mask=mask)


def int4_quantize(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, *, form: int, rule: int, shift: int = 0,
    wide: bool = False, wrap: bool = False,
) -> None:
    """x [N, K], codes of `form` (0 binary32, 1 binary16, 2 bf16) -> q uint8 [N, K], one nibble per byte, scales [N, K / G] in the
    format of x (rule 4: binary16), zeros uint8 [N, K / G] for rules 1 and 3. `rule`: a value of `INT4_RULES`. `shift`: added to
    each code modulo 16. `wide`: tiles for the interpreter. `wrap`: a planted fault."""
    n, groups = scales.shape
    if n == 0:
        return
    g = x.shape[1] // groups
    rows, columns = (256, min(triton.next_power_of_2(g), 4096)) if wide else (8, min(triton.next_power_of_2(g), 512))
    other = q if zeros is None else zeros
    int4_quantize_kernel[(triton.cdiv(n, rows), groups)](
        x, q, scales, other, n, g, x.stride(0), q.stride(0), scales.stride(0), other.stride(0), FORMAT=form, RULE=rule,
        OFFSET=shift, WRAP=int(wrap), ROWS=rows, COLUMNS=columns, num_warps=4, **OPTIONS,
    )


# Door ----------------------------------------------------------------------------------------------------------------


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None for every problem in the contract's domain (QNT-30, 31, 35, 36), otherwise the rule that it breaks."""
    k, g, recipe, variant = problem.dim("k"), problem.dim("g"), problem.option("recipe"), problem.variant
    own = recipe in ("svdquant", "nunchaku")
    rules = (
        (k > 0 and g > 0 and k % g == 0, f"G must divide K, got G = {g}, K = {k}"),
        (g in (32, 64, 128, k), f"G is 32, 64, 128 or K, got {g}"),
        (variant == "sym" or (variant == "asym" and not own) or recipe == "quantize_weights",
         f"recipe {recipe} has no variant {variant}"),
        (not own or g == 64, f"{recipe} has groups of 64, got {g}"),
        (recipe != "nunchaku" or problem.option("x") != "f32", "nunchaku reads f16 and bf16"),
    )
    return next((f"int4_quantize: {sentence}" for good, sentence in rules if not good), None)


def tactics(problem: Problem, machine: Machine) -> tuple[str, ...]:
    """One kernel."""
    return ("default",)


def declaration(problem: Problem, tactic: str, machine: Machine) -> Declaration:
    """The contract fixes every bit."""
    return EXACT_BITS


def workspace(problem: Problem, tactic: str, machine: Machine) -> int:
    """None."""
    return 0


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
    asymmetric, recipe = problem.variant == "asym", problem.option("recipe")
    int4_quantize(
        rows_of(inputs["x"])[0], tensor(outputs["q"]), tensor(outputs["scales"]),
        tensor(outputs["zeros"]) if asymmetric else None, form=_FORMS[problem.option("x")], rule=INT4_RULES[asymmetric, recipe],
        shift=8 * (problem.variant == "uint4b8"), wide=not machine.native, wrap=mutant == "offsets_wrap",
    )
    return f"int4_quantize_{problem.variant}_{recipe}"
