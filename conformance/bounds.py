"""From a declaration to what a GEMM may output: admissible intervals, the power of a case, and large cases by sample.

Decides: the expectation of every GEMM output, whether a declaration is one of this op at all, and which faults a case would
have shown. Refuses: declarations that compute something else than the op, and scalar tolerances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import (
    Claim,
    Contraction,
    Declaration,
    Step,
    StepKind,
    determined,
    in_parts,
    misfit,
    signature,
)
from lowbit.references.formats import BF16, Codes, Format, Reals, code_of_key, container, decode, is_nan, order_key
from lowbit.references.interpret import Interval, bound, emulate, ideal
from lowbit.references.rounding import Overflow, Rounding, encode

from .case import Case, Operands, Problem, Stream, Tensor
from .op import Expectation, Flag, Op, Role, specs_of, tensors_of
from .op import Family as TensorFamily

__all__ = [
    "FAULTS", "SAMPLE_PRODUCTS", "Sample", "accumulator_bits", "check_declaration", "gemm_expect", "power", "restrict",
    "sample_of", "to_expectation",
]

SAMPLE_PRODUCTS = 1 << 27
"""Products above which a bounded case is judged on a sample of rows and columns."""


def to_expectation(interval: Interval, fmt: Format, exact: Reals | None = None) -> Expectation:
    """The expectation of an interval whose ends are values of `fmt` already (the program ended in a cast to it)."""
    lo = order_key(encode(interval.lo, fmt, Rounding.RNE, Overflow.SPECIAL), fmt)
    hi = lo if interval.hi is interval.lo else order_key(encode(interval.hi, fmt, Rounding.RNE, Overflow.SPECIAL), fmt)
    flags = np.zeros(lo.shape, dtype=np.uint8)
    flags[interval.nan] |= np.uint8(Flag.NAN_REQUIRED)
    flags[interval.maybe_nan] |= np.uint8(Flag.NAN_OK)
    return Expectation(fmt, lo, hi, flags, {}, exact, either_zero=True)


def gemm_expect(op: Op, case: Case, operands: Operands, declaration: Declaration) -> dict[str, Expectation]:
    """Expectation of the output `d` [M, N]: the emulated bits under a bit-exact claim, otherwise the derived interval."""
    assert op.environment is not None
    environment = op.environment(case.problem, operands)
    evaluate = emulate if declaration.claim is Claim.BIT_EXACT else bound
    output = next(spec for spec in tensors_of(op, case.problem) if spec.role is Role.OUTPUT)
    return {output.name: to_expectation(evaluate(declaration, environment), output.format, ideal(declaration, environment))}


# Declarations --------------------------------------------------------------------------------------------------------


def accumulator_bits(contraction: Contraction) -> int:
    """Significand bits of the narrowest place a partial sum passes: datapath, running total of segments, reduction of parts."""
    path = contraction.datapath
    bits = min(path.output_bits, path.fraction_bits + 1) if path.fraction_bits else path.output_bits
    bits = min(bits, contraction.running.precision) if contraction.segment else bits
    return min(bits, contraction.reduction.precision) if in_parts(contraction) else bits


_VALUE_BITS = {"e2m1": 6, "int4": 4, "uint4": 4, "e4m3fn": 4, "e4m3fnuz": 4, "e5m2": 3, "int8": 8, "f16": 11, "bf16": 8}
"""Significand bits that hold every value of an operand exactly, its block scale (NVFP4: 2 + 4 bits) included."""


def _lossy(op: Op, problem: Problem, contraction: Contraction) -> bool:
    """Whether a declared conversion of the operands rounds some of their values."""
    if contraction.conversion is None:
        return False
    formats = [spec.format.name for spec in tensors_of(op, problem) if spec.name in contraction.operands]
    return any(_VALUE_BITS.get(name, 53) > contraction.conversion.precision for name in formats)


def _step_bits(program: tuple[Contraction | Step, ...]) -> int:
    steps = [item for item in program[:-1] if isinstance(item, Step)]
    inner = [step for item in program if isinstance(item, Contraction) for step in item.steps]
    return min([step.format.precision for step in (*steps, *inner)], default=53)


def _misfit(op: Op, problem: Problem, contractions: list[Contraction]) -> str:
    """What is wrong with cuts and orders of K, as a sentence. The operands of a contraction are tensors [M, K] and [N, K] where
    the op has them by name; the interpreter sees the sizes of all."""
    if "e" in op.dims and any(c.cuts for c in contractions):
        return f"{op.name} has experts, and cuts of K speak of the rows of one product alone (clause DEC-6)"
    shapes = {spec.name: spec.logical for spec in tensors_of(op, problem)}
    for item in contractions:
        a, w = (shapes.get(name) for name in item.operands)
        wrong = misfit(item, a[0], w[0], a[1]) if a and w and len(a) == len(w) == 2 else ""
        if wrong:
            return f"{', '.join(item.operands)}: got {wrong} (clauses DEC-6 and DEC-7)"
    return ""


def check_declaration(op: Op, problem: Problem, declaration: Declaration) -> tuple[str, str]:
    """(what is wrong, class). The first is empty for a declaration of this op; the class is "as the contract", or says what
    is looser than the contract's minimum. Clauses DEC-1 to DEC-4."""
    if op.program is None:
        wrong = "" if declaration.claim is Claim.BIT_EXACT else "the op fixes every bit: declare EXACT_BITS (clause DEC-1)"
        return wrong, "as the contract"
    if not declaration.program:
        return "the program is empty; a GEMM declares its contractions and steps (clause DEC-1)", ""
    normative = op.program(problem, DATAPATHS["ieee_f32"])
    if signature(declaration.program) != signature(normative):
        got, want = " ".join(signature(declaration.program)), " ".join(signature(normative))
        return f"the declared program computes {got}, the contract {want} (clause DEC-2)", ""
    output = next(spec for spec in tensors_of(op, problem) if spec.role is Role.OUTPUT)
    last = declaration.program[-1]
    if not isinstance(last, Step) or last.kind is not StepKind.CAST or last.format is not output.format:
        return f"the program must end in a cast to {output.format} (clause DEC-3)", ""
    contractions = [item for item in declaration.program if isinstance(item, Contraction)]
    senseless = next((c for c in contractions if c.splits < 1 or c.segment < 0), None)
    if senseless is not None:
        return f"segments of {senseless.segment} and {senseless.splits} splits make no sense (clause DEC-1)", ""
    if any(c.steps and not c.segment for c in contractions):
        return "steps inside a contraction belong to segments of K; give `segment` (clause DEC-1)", ""
    if declaration.claim is Claim.BIT_EXACT and not all(determined(c) for c in contractions):
        return "a bit-exact claim needs a known order of K (clause DEC-4)", ""
    if wrong := _misfit(op, problem, contractions):
        return wrong, ""
    bits = min(accumulator_bits(c) for c in contractions)
    looser = []
    if op.minimum_bits and bits < op.minimum_bits:
        looser.append(f"accumulator of {bits} bits, the contract's minimum is {op.minimum_bits}")
    looser += [f"operands rounded to {c.conversion}" for c in contractions if _lossy(op, problem, c)]
    steps = _step_bits(declaration.program)
    if steps < min(24, _step_bits(normative)):
        looser.append(f"steps of {steps} significand bits, the contract's are {_step_bits(normative)}")
    return "", "; ".join(looser) or "as the contract"


# Samples of large cases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows and columns of D that are judged: their product holds at least one element of every 64 x 64 tile and all tile
    corners."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    shape: tuple[int, int]

    def statement(self) -> str:
        """What the sample can miss, in one sentence."""
        share = self.rows.size * self.columns.size / max(1, self.shape[0] * self.shape[1])
        count = self.rows.size * self.columns.size
        missed = 1.0 - 0.01 ** (1.0 / max(1, count))
        judged = f"{self.rows.size} rows x {self.columns.size} columns of {self.shape[0]} x {self.shape[1]} ({share:.2%})"
        return (
            f"{judged}; scattered faults of a rate above {missed:.1e} are missed with 1 % probability; every aligned 64 x 64 "
            "tile is hit"
        )


def _picked(size: int, stream: Stream) -> npt.NDArray[np.int64]:
    starts = np.arange(0, size, 64)
    ends = np.minimum(starts + 63, size - 1)
    inside = starts + stream.integers(0, 63, starts.shape) % (ends - starts + 1)
    return np.unique(np.concatenate([starts, ends, inside]))


def sample_of(case: Case, limit: int = SAMPLE_PRODUCTS) -> Sample | None:
    """The seeded sample of a case whose products pass `limit`; None where every element is judged."""
    dims = dict(case.problem.dims)
    m, n, k = dims.get("m", 0), dims.get("n", 0), dims.get("k", 0)
    if m * n * k <= limit or "e" in dims:
        return None
    return Sample(_picked(m, Stream(case, "rows")), _picked(n, Stream(case, "columns")), (m, n))


def _shared(codes: Codes, axis: int, columns: Codes | slice, n: int) -> Codes:
    """Block scales that 128 columns share: whole blocks where the columns are, otherwise one row per column kept."""
    if isinstance(columns, slice):
        start, stop, _ = columns.indices(n)
        if start % 128 == 0 and (stop % 128 == 0 or stop == n):
            return codes.take(np.arange(start // 128, -(-stop // 128)), axis=axis)
    return np.repeat(codes, 128, axis=axis).take(np.arange(n)[columns], axis=axis)


def restrict(
    op: Op, problem: Problem, operands: Operands, rows: Codes | slice, columns: Codes | slice
) -> tuple[Problem, Operands]:
    """The same problem for some rows of A and some rows of W. Tensors are cut along the axes whose size is `m` or `n`."""
    tensors = {}
    names = {spec.name: spec for spec in specs_of(op, problem)}
    for name, tensor in operands.items():
        codes = tensor.codes
        for axis, text in enumerate(names[name].shape):
            if text == "m":
                codes = codes[(slice(None),) * axis + (rows,)]
            elif text == "n":
                codes = codes[(slice(None),) * axis + (columns,)]
            elif text == "ceil(n, 128)":
                codes = _shared(codes, axis, columns, dict(problem.dims)["n"])
        tensors[name] = Tensor(np.ascontiguousarray(codes), tensor.format)
    dims = dict(problem.dims)
    kept = {letter: np.arange(dims[letter])[part].size for letter, part in (("m", rows), ("n", columns)) if letter in dims}
    cut = tuple((letter, kept.get(letter, size)) for letter, size in problem.dims)
    return Problem(problem.op, problem.variant, cut, problem.options, problem.defaults), Operands(tensors)


# Power ---------------------------------------------------------------------------------------------------------------

FAULTS = ("zero_output", "k_block_dropped", "scale_step", "weight_step", "outer_scales_cut", "bias_dropped", "lora_dropped")
"""Fault classes whose trace each case of a product is searched for (clause PWR-1)."""


_OUTER = (TensorFamily.OUTER_SCALE, TensorFamily.GLOBAL_SCALE)


def _stepped(codes: Codes, fmt: Format, place: tuple[int, ...]) -> Codes:
    """A copy with the code at `place` moved one step up in the order of values, or down from the top."""
    changed = codes.copy()
    key = order_key(codes[place].reshape(1), fmt)
    up = code_of_key(key + 1, fmt)
    top = order_key(np.array([fmt.max_code], dtype=container(fmt)), fmt)
    changed[place] = (code_of_key(key - 1, fmt) if key >= top or is_nan(up, fmt).any() else up)[0]
    return changed


def _replace(operands: Operands, name: str, codes: Codes) -> Operands:
    tensors = dict(operands.tensors)
    tensors[name] = Tensor(codes, tensors[name].format)
    return Operands(tensors)


def _cut_outer_scales(op: Op, problem: Problem, operands: Operands) -> Operands | None:
    """Operands whose scales after the sum are rounded to bf16 (RNE); None where every one of them is a bf16 value or NaN."""
    cut = operands
    for spec in tensors_of(op, problem):
        if spec.family in _OUTER and spec.name in operands:
            codes, fmt = operands[spec.name].codes, spec.format
            values = decode(encode(decode(codes, fmt), BF16, Rounding.RNE, Overflow.SPECIAL), BF16)
            rounded = np.where(is_nan(codes, fmt), codes, encode(values, fmt, Rounding.RNE, Overflow.SPECIAL))
            if (rounded != codes).any():
                cut = _replace(cut, spec.name, rounded.astype(codes.dtype))
    return None if cut is operands else cut


def _faulty(op: Op, case: Case, operands: Operands) -> dict[str, Operands]:
    """Operands that a faulty kernel would have used, per fault class that the problem admits."""
    found: dict[str, Operands] = {}
    a, w = operands["a"].codes, operands["w"].codes
    k = a.shape[-1]
    values = np.abs(np.nan_to_num(decode(a, operands["a"].format), nan=0.0, posinf=0.0, neginf=0.0)).reshape(-1, k)
    live = np.flatnonzero(values.any(axis=0))
    if not live.size:
        return found
    place = int(live[live.size // 2])
    width = 32 if k >= 64 else max(1, k // 2)
    block = a.copy()
    block[..., place // width * width : place // width * width + width] = 0
    found["k_block_dropped"] = _replace(operands, "a", block)
    row = (0,) * (w.ndim - 1)
    found["weight_step"] = _replace(operands, "w", _stepped(w, operands["w"].format, (*row, place)))
    for name in ("group_scale", "w_scale", "scale"):
        if name in operands:
            scales = operands[name]
            groups = scales.codes.shape[-1]
            index = (*((0,) * (scales.codes.ndim - 1)), place * groups // k)
            if groups and not is_nan(scales.codes[index].reshape(1), scales.format).any():
                found["scale_step"] = _replace(operands, name, _stepped(scales.codes, scales.format, index))
    outer = _cut_outer_scales(op, case.problem, operands)
    if outer is not None:
        found["outer_scales_cut"] = outer
    for name, fault in (("bias", "bias_dropped"), ("lora_act", "lora_dropped")):
        if name in operands and operands[name].codes.size:
            found[fault] = _replace(operands, name, np.zeros_like(operands[name].codes))
    return found


def _outside(values: Reals, expectation: Expectation) -> bool:
    codes = encode(values, expectation.format, Rounding.RNE, Overflow.SPECIAL)
    return bool((~expectation.admits(codes)).any())


def power(op: Op, case: Case, operands: Operands, declaration: Declaration, expectation: Expectation) -> Mapping[str, bool]:
    """Fault class -> whether the exact result with that fault leaves the admissible set somewhere. Classes that the problem
    does not have, or whose fault changes nothing over the reals, are left out."""
    assert op.environment is not None
    exact = expectation.exact
    if exact is None or exact.size == 0:
        return {}
    shown: dict[str, bool] = {}
    if np.nan_to_num(exact).any():
        zeros = np.zeros(exact.shape, dtype=container(expectation.format))
        shown["zero_output"] = bool((~expectation.admits(zeros)).any())
    for fault, faulty in _faulty(op, case, operands).items():
        exactly = op.exact(case.problem, faulty, declaration) if op.exact else None
        values = ideal(declaration, op.environment(case.problem, faulty)) if exactly is None else exactly
        with np.errstate(invalid="ignore"):
            if np.any(values != exact):
                shown[fault] = _outside(values, expectation)
    return shown


