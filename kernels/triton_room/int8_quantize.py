"""int8_quantize in Triton: one scale per row, in the format of x, and codes by that scale.

Decides: two walks along a row, for its amax and for its codes. Refuses: problems outside the contract's domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView
from lowbit.kernels.triton_room.blocks import magnitudes, offset
from lowbit.kernels.triton_room.codes8 import OPTIONS, whole
from lowbit.kernels.triton_room.codes16 import code, rounded, value
from lowbit.kernels.triton_room.division import div
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.memory import rows_of, tensor

__all__ = ["MUTANTS", "OPS", "declaration", "int8_quantize", "prepare", "run", "stage", "tactics", "unsupported", "workspace"]

OPS = ("int8_quantize",)
MUTANTS = ("offsets_wrap",)

_FORMS = {"f32": 0, "f16": 1, "bf16": 2}


@triton.jit
def row_amax(  # type: ignore[no-untyped-def]
    x, start, inside, k, FORMAT: tl.constexpr, NAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """binary32 amax [ROWS] of rows that begin at x + start; `inside` says which exist. NAN as in `blocks.largest`."""
    best = tl.zeros((ROWS,), tl.int32)
    for first in range(0, k, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < k)[None, :]
        part = value(tl.load(x + start[:, None] + column[None, :], mask=mask, other=0), FORMAT)
        best = tl.maximum(best, tl.max(magnitudes(part, NAN), axis=1))
    return best.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["m", "scale_stride", "zero_stride"])
def int8_quantize_kernel(  # type: ignore[no-untyped-def]
    x, q, scales, zeros, m, k, x_stride, q_stride, scale_stride, zero_stride, FORMAT: tl.constexpr, NARROW: tl.constexpr,
    WRAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """ROWS rows per program. NARROW: the quotient is rounded to the format of x before it is rounded to a whole number."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < m
    start = offset(row, x_stride, WRAP)
    amax = row_amax(x, start, inside, k, FORMAT, 1, ROWS, COLUMNS)
    scale = div(amax, tl.full((ROWS,), 127.0, tl.float32))
    scale = rounded(tl.where(scale < 1e-5, 1e-5, scale), FORMAT)
    tl.store(scales + offset(row, scale_stride, 0), code(scale, FORMAT), mask=inside)
    tl.store(zeros + offset(row, zero_stride, 0), tl.zeros((ROWS,), tl.int32), mask=inside)
    for first in range(0, k, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < k)[None, :]
        part = value(tl.load(x + start[:, None] + column[None, :], mask=mask, other=0), FORMAT)
        quotient = div(part, scale[:, None])
        if NARROW:
            quotient = rounded(quotient, FORMAT)
        codes = (whole(quotient, -128, 127) & 255).to(tl.uint8)
        tl.store(q + offset(row, q_stride, 0)[:, None] + column[None, :], codes, mask=mask)


def int8_quantize(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, form: int, narrow: bool = False,
    wide: bool = False, wrap: bool = False,
) -> None:
    """x [m, K], codes of `form` (0 binary32, 1 binary16, 2 bf16; int32 or int16) -> q uint8 [m, K] of int8 codes, scales [m, 1]
    in the format of x, zeros int32 [m, 1]. `narrow`: the quotient is rounded to the format of x. `wide`: tiles for the
    interpreter."""
    m, k = x.shape
    if m == 0:
        return
    rows, columns = (256, min(triton.next_power_of_2(k), 4096)) if wide else (4, min(triton.next_power_of_2(k), 1024))
    int8_quantize_kernel[(triton.cdiv(m, rows),)](
        x, q, scales, zeros, m, k, x.stride(0), q.stride(0), scales.stride(0), zeros.stride(0), FORMAT=form, NARROW=int(narrow),
        WRAP=int(wrap), ROWS=rows, COLUMNS=columns, num_warps=4, **OPTIONS,
    )


# Door ----------------------------------------------------------------------------------------------------------------


def unsupported(problem: Problem, machine: Machine) -> str | None:
    """None where K is positive (QNT-2)."""
    return None if problem.dim("k") > 0 else f"int8_quantize: K must be positive, got {problem.dim('k')}"


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
    int8_quantize(
        rows_of(inputs["x"])[0], tensor(outputs["q"]), tensor(outputs["scales"]), tensor(outputs["zeros"]),
        form=_FORMS[problem.option("x")], narrow=problem.option("quotient") == "narrow", wide=not machine.native,
        wrap=mutant == "offsets_wrap",
    )
    return f"int8_quantize_{problem.option('quotient')}"
