"""What kernels of other projects really do: codes and scale bytes counted by the million, against the contract and a reading.

Decides: for every problem of a quantiser op that a subject supports, how many codes, scales and global scales leave the contract
on half a million values per pattern (ties, special blocks, the whole exponent range, ...), and how many of those a *reading* of
the library leaves unexplained. A reading is a short model of what its source says it computes, in the references' own rounding;
where a reading explains every difference, the contract's description is what must be mended, or the difference is a finding.
Readings of products are of the kernels that x86 processors with AVX-512 and without AMX get.
Products (GEMMs) are read the same way, and so is every verdict of a certification that is not a pass.
Refuses: tolerances; a reading gives codes, or an interval derived from a declaration.

Run: python -m lowbit.conformance.survey --json FILE BACKEND [BACKEND ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import (
    EXACT_BITS,
    Claim,
    Contraction,
    Declaration,
    Join,
    Order,
    Start,
    Step,
    add,
    cast,
    mul,
)
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, E2M1, E4M3FN, F16, F32, INT8, UE4M3, UINT4, Codes, Format, Reals, decode
from lowbit.references.interpret import Factor
from lowbit.references.rounding import Overflow, Rounding, encode, round_to

from .bounds import gemm_expect
from .case import Case, Operands, Problem
from .op import DomainError, Expectation, Flag, Op, exactly, make_problem, parse_case, parse_problem, tensors_of
from .ops import ops
from .patterns import draw_operands, rows_probed
from .run import Plan, certify, operands_of
from .verdict import FAILING, Status, Verdict
from .worker import Ending, Worker

__all__ = [
    "PATTERNS", "PRODUCTS", "PRODUCT_READINGS", "READINGS", "main", "product_entry", "quantiser_entry", "quantiser_problems",
    "survey", "verdicts",
]

PATTERNS = (("ties", 0), ("special", 0), ("special", 1), ("extremes", 0), ("lognormal", 0), ("normal", 0), ("zeros", 0))
"""Patterns of the quantisers and their seeds: ties of elements and scales; zero, underflowing, Inf and NaN blocks (an odd seed
puts NaN and Inf into tensors that find their own global scale); every exponent; bell shapes; zero rows."""

_SIDE = 512
_DIMS: Mapping[str, Sequence[Mapping[str, int]]] = {
    "fp8_quantize": ({"m": _SIDE, "k": _SIDE, "p": 0},),
    "int8_quantize": ({"m": _SIDE, "k": _SIDE},),
    "int4_quantize": tuple({"n": _SIDE, "k": _SIDE, "g": g} for g in (32, 64, 128)),
    "nvfp4_quantize": ({"m": _SIDE, "k": _SIDE},),
}

PRODUCTS = (
    *(f"gemm_w4a16/{variant}/m{m}n80k512g{g}/{out}" for variant in ("sym", "zp") for m in (1, 4, 17) for g in (32, 128)
      for out in ("bf16", "f16")),
    *(f"gemm_w8a8_fp8/scaled/m{m}n80k{k}/{options}" for m, k in ((1, 512), (4, 16), (17, 512))
      for options in ("bf16", "f32", "f32.fnuz", "bf16.bias", "f32.atensor.wtensor")),
)
_PRODUCT_PATTERNS = (
    "exactw14", "exactw24", "onehot", "scaleprobe", "normal", "lognormal", "cancel", "special", "extremes", "maxima", "ramp")


def quantiser_problems() -> Iterator[Problem]:
    """Every problem of the quantiser ops at the survey's sizes."""
    for name, all_dims in _DIMS.items():
        op = ops()[name]
        for variant in op.variants:
            for tokens in itertools.product(*(option.tokens for option in op.options)):
                options = {option.name: token for option, token in zip(op.options, tokens, strict=True)}
                for dims in all_dims:
                    try:
                        yield make_problem(op, variant, dims, options)
                    except DomainError:
                        continue


# Readings of quantisers ----------------------------------------------------------------------------------------------

Reading = Callable[[Case, Operands, Mapping[str, Codes], Mapping[str, Expectation]], Mapping[str, Expectation]]
"""(case, operands, outputs, expectations of the contract) -> expectations of the reading."""


def _with_sign(expectation: Expectation) -> Expectation:
    """The scales in eight bits: a NaN may carry the sign that torch's casts give it, 0xFF as well as 0x7F."""
    return replace(expectation, format=E4M3FN)


def _blocks(x: Reals) -> Reals:
    return x.reshape(x.shape[0], -1, 16)


def _signed_by_quotient(codes: Codes, quotient: Reals) -> Codes:
    """A zero code has a sign where the quotient, not x, is below zero: a quotient of -0 gives +0."""
    return np.where(((codes & 7) == 0) & ~(quotient < 0), np.uint8(0), codes).astype(np.uint8)


def _input(operands: Operands) -> tuple[Reals, Format]:
    x = operands["x"]
    return decode(x.codes, x.format), x.format


def _global(operands: Operands, outputs: Mapping[str, Codes]) -> float:
    """The given global scale, or the one that the library wrote."""
    codes = operands["global_scale"].codes if "global_scale" in operands else outputs["global_scale"]
    return float(decode(codes, F32)[0])


def _nvfp4_codes(quotient: Reals, shape: tuple[int, ...]) -> Expectation:
    """E2M1 codes of quotients; NaN is left free."""
    number = np.clip(np.nan_to_num(quotient, nan=0.0), -6.0, 6.0)
    codes = _signed_by_quotient(encode(number, E2M1), quotient)
    return exactly(codes.reshape(shape), E2M1, free=np.isnan(quotient).reshape(shape))


def _nan_scales(scales: Codes, nan: np.ndarray[Any, np.dtype[np.bool_]]) -> Expectation:
    found = exactly(scales, E4M3FN)
    flags = np.where(nan, np.uint8(Flag.NAN_REQUIRED), found.flags).astype(np.uint8)
    return replace(found, flags=flags)


@np.errstate(all="ignore")
def _compressed_tensors(
    case: Case, operands: Operands, outputs: Mapping[str, Codes], contract: Mapping[str, Expectation]
) -> Mapping[str, Expectation]:
    """amax / 6 is rounded to the format of x; the product with g and everything after it is binary32. A global scale is
    fl_x(2688 * fl_x(1 / amax)), NaN and Inf become 1. (The library bounds amax by the least normal number of x first; where
    that matters the product overflows with the bound as without it.)"""
    if case.problem.op != "nvfp4_quantize":
        return contract
    x, fmt = _input(operands)
    g, found = _global(operands, outputs), {}
    if "global_scale" in outputs:
        own = round_to(2688.0 * round_to(1.0 / np.abs(x).max(), fmt), fmt)
        found["global_scale"] = exactly(encode(np.where(np.isfinite(own), own, 1.0).reshape(1), F32), F32)
    amax = np.abs(_blocks(x)).max(axis=2)
    raw = round_to(round_to(amax / 6.0, fmt) * g, F32)
    scales = encode(np.nan_to_num(np.clip(raw, -448.0, 448.0), nan=1.0), UE4M3)
    scales = np.where(scales == 0, encode(np.array(0.125), UE4M3), scales).astype(np.uint8)
    value = np.where(np.isnan(raw), np.nan, decode(scales, UE4M3))
    quotient = round_to(_blocks(x) / round_to(value / g, F32)[:, :, None], F32)
    return found | {"q": _nvfp4_codes(quotient, x.shape), "scales": _nan_scales(scales, np.isnan(raw))}


@np.errstate(all="ignore")
def _modelopt(
    case: Case, operands: Operands, outputs: Mapping[str, Codes], contract: Mapping[str, Expectation]
) -> Mapping[str, Expectation]:
    """The contract's recipe, with the sign of a zero code taken from the quotient and NaN scales of either sign."""
    x, _ = _input(operands)
    scale = decode(outputs["scales"] & np.uint8(0x7F), UE4M3)
    quotient = round_to(_blocks(x) / round_to(scale * _global(operands, outputs), F32)[:, :, None], F32).reshape(x.shape)
    low = contract["q"].lo == -1  # the key of -0
    plus = low & (contract["q"].hi == -1) & ~(quotient < 0)
    q = replace(contract["q"], lo=np.where(plus, 0, contract["q"].lo), hi=np.where(plus, 0, contract["q"].hi))
    return {**contract, "q": q, "scales": _with_sign(contract["scales"])}


def _sign_of_nan(
    case: Case, operands: Operands, outputs: Mapping[str, Codes], contract: Mapping[str, Expectation]
) -> Mapping[str, Expectation]:
    return {**contract, "scales": _with_sign(contract["scales"])}


READINGS: Mapping[str, Reading] = {
    "compressed_tensors": _compressed_tensors, "modelopt": _modelopt, "torchao": _sign_of_nan,
}
"""Backend name -> what its source says where the contract says something else."""


# Readings of products ------------------------------------------------------------------------------------------------

Program = tuple[Contraction | Step, ...]
Environment = Mapping[str, Operand | Factor]
ProductReading = Callable[[Problem, Operands], tuple[Environment, Declaration]]

_OUT = {"bf16": BF16, "f16": F16, "f32": F32}


def _single(values: Reals) -> Operand:
    """Values as binary32 operands, each rounded once."""
    return Operand(encode(values, F32, Rounding.RNE, Overflow.SPECIAL), F32)


def _grouped(values: Reals, k: int) -> Reals:
    return np.repeat(values, k // values.shape[1], axis=1)


def _wide_weights(problem: Problem, operands: Operands) -> Reals:
    """(q - z) * s without a rounding to the activation's format; exact in binary32."""
    q, k = decode(operands["w"].codes, UINT4), problem.dim("k")
    zero = _grouped(decode(operands["zero"].codes, UINT4), k) if "zero" in operands else 8.0
    return np.asarray((q - zero) * _grouped(decode(operands["scale"].codes, operands["scale"].format), k))


def _tail(problem: Problem, operands: Operands, sides: dict[str, Operand | Factor]) -> Program:
    """The cast to the output format, and the bias before or after it, as the contract has them."""
    out = _OUT[problem.option("out")]
    if "bias" not in operands:
        return (cast(out),)
    sides["bias"] = Factor(decode(operands["bias"].codes, operands["bias"].format), "n")
    after = problem.option("bias") == "biasafter"
    return (cast(out), add("bias", format=out), cast(out)) if after else (add("bias"), cast(out))


def _unrounded(order: Order, claim: Claim) -> ProductReading:
    """Weights stay in binary32; products are added by FMA."""

    def read(problem: Problem, operands: Operands) -> tuple[Environment, Declaration]:
        a = operands["a"]
        sides: dict[str, Operand | Factor] = {"a": Operand(a.codes, a.format), "w": _single(_wide_weights(problem, operands))}
        main = Contraction(("a", "w"), DATAPATHS["ieee_f32"], order=order)
        return sides, Declaration((main, *_tail(problem, operands, sides)), claim)

    return read


def _scaled_operands(problem: Problem, operands: Operands) -> tuple[Environment, Declaration]:
    """Each operand is multiplied by its scale and rounded to binary32 before the sum."""
    sides: dict[str, Operand | Factor] = {}
    for name, scale in (("a", "token_scale"), ("w", "channel_scale")):
        values = decode(operands[name].codes, operands[name].format)
        sides[name] = _single(values * decode(operands[scale].codes, F32).reshape(-1, 1))
    main = Contraction(("a", "w"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN)
    return sides, Declaration((main, *_tail(problem, operands, sides)))


def _vector_max(x: Reals) -> Reals:
    """Largest magnitude over the last axis as sixteen lanes of `maxps` find it: where an operand is NaN the second one is taken,
    so a NaN is lost unless it stands in lane 3 of the last sixteen elements."""

    def greater(first: Reals, second: Reals) -> Reals:
        return np.where(first > second, first, second)

    found = np.zeros((*x.shape[:-1], 16))
    for start in range(0, x.shape[-1], 16):
        found = greater(found, np.abs(x[..., start : start + 16]))
    for width in (8, 4, 2):
        low, high = found[..., :width], found[..., width : 2 * width]
        found = greater(high, low) if width > 2 else greater(low, high)
    return greater(found[..., 0], found[..., 1])


@np.errstate(all="ignore")
def _int8_blocks(problem: Problem, operands: Operands) -> tuple[Environment, Declaration]:
    """Activations become int8 per block of g: s = fl(amax / 127), code = RNE(fl(a * fl(127 / amax))), 0 for NaN. The integer sums
    of a block with the unsigned weight codes are scaled and added in binary32; what the zero points take away is a second sum,
    over blocks."""
    g, k = problem.dim("g"), problem.dim("k")
    a = decode(operands["a"].codes, operands["a"].format).reshape(-1, k // g, g)
    amax = _vector_max(a)
    inverse = np.where(amax == 0, 0.0, round_to(127.0 / amax, F32))
    codes = np.nan_to_num(np.rint(round_to(a * inverse[:, :, None], F32)), nan=0.0)
    a_scale, w_scale = round_to(amax / 127.0, F32), decode(operands["scale"].codes, operands["scale"].format)
    zero = decode(operands["zero"].codes, UINT4) if "zero" in operands else np.full(w_scale.shape, 8.0)
    sides: dict[str, Operand | Factor] = {
        "a": Operand(encode(codes.reshape(-1, k), INT8), INT8), "w": Operand(operands["w"].codes, UINT4),
        "a_scale": Factor(a_scale, "m", grouped=True), "w_scale": Factor(w_scale, "n", grouped=True),
        "a_sum": _single(a_scale * codes.sum(axis=2)), "w_zero": _single(-w_scale * zero),
    }
    steps = (cast(F32), mul("a_scale", "w_scale", join=Join.EITHER))
    main = Contraction(("a", "w"), DATAPATHS["imma_s32"], order=Order.UNKNOWN, segment=g, steps=steps)
    less = Contraction(("a_sum", "w_zero"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN, start=Start.PREVIOUS)
    return sides, Declaration((main, less, *_tail(problem, operands, sides)))


PRODUCT_READINGS: Mapping[tuple[str, str, str], ProductReading] = {
    ("torch_cpu", "gemm_w4a16", "default"): _unrounded(Order.ASCENDING, Claim.BIT_EXACT),
    ("torch_cpu", "gemm_w8a8_fp8", "scaled_mm"): _scaled_operands,
    ("onnxruntime", "gemm_w4a16", "accuracy_level_0"): _unrounded(Order.UNKNOWN, Claim.BOUNDED),
    ("onnxruntime", "gemm_w4a16", "accuracy_level_4"): _int8_blocks,
}
"""(backend name, op, tactic) -> operands and program by which the library computes, where they are not the contract's."""


# Counting ------------------------------------------------------------------------------------------------------------


def _first(name: str, codes: Codes, expectation: Expectation, operands: Operands) -> dict[str, Any]:
    """The first element outside: where, what was written, what is admissible, and the block of x it belongs to."""
    at = tuple(int(i) for i in np.argwhere(~expectation.admits(codes))[0])
    example = expectation.example()
    required = bool(expectation.flags[at] & Flag.NAN_REQUIRED)
    found: dict[str, Any] = {
        "index": list(at), "got": f"{int(codes[at]):#x}", "admissible": "NaN" if required else f"{int(example[at]):#x}"}
    if "x" in operands and name in ("q", "scales"):
        x = operands["x"].codes
        width = x.shape[1] // codes.shape[1] if name == "scales" else 16
        start = at[1] * width if name == "scales" else at[1] // width * width
        row = at[0] * (x.shape[0] // codes.shape[0]) if codes.ndim == 2 else 0
        found["x"] = [f"{int(code):#x}" for code in x[row, start : start + min(width, 16)]]
    if "global_scale" in operands:
        found["global_scale"] = f"{int(operands['global_scale'].codes[0]):#x}"
    return found


def _contract(op: Op, case: Case, operands: Operands, outputs: Mapping[str, Codes]) -> Mapping[str, Expectation]:
    """What a quantiser op admits, beside the scales that were written where it looks at them."""
    if op.expect_given is not None:
        return op.expect_given(case, operands, EXACT_BITS, outputs)
    return op.expect(case, operands, EXACT_BITS)


def quantiser_entry(
    worker: Worker, backend: str, problem: Problem, patterns: Sequence[tuple[str, int]] = PATTERNS
) -> dict[str, Any]:
    """Counts of one problem: per output tensor elements, those outside the contract, those outside the reading (-1: there is no
    reading), and the first element outside the contract. `faults`: runs that gave nothing to judge."""
    op = ops()[problem.op]
    entry: dict[str, Any] = {"problem": str(problem), "values": 0, "patterns": {}, "first": {}, "faults": []}
    for pattern, seed in patterns:
        case = Case(problem, pattern, seed)
        operands = draw_operands(op, case, 0)
        outcome = worker.execute(problem, "default", operands, tensors_of(op, problem), label=str(case))
        if outcome.status is not Ending.OK:
            entry["faults"].append({"case": str(case), "reason": outcome.reason})
            continue
        outputs, reading = outcome.outputs, READINGS.get(backend)
        contract = _contract(op, case, operands, outputs)
        read = None if reading is None else reading(case, operands, outputs, contract)
        entry["values"] += operands["x"].codes.size
        counts = entry["patterns"][f"{pattern}/s{seed}"] = {}
        for name, expectation in contract.items():
            outside = int((~expectation.admits(outputs[name])).sum())
            unread = -1 if read is None else int((~read[name].admits(outputs[name])).sum())
            counts[name] = [int(outputs[name].size), outside, unread]
            if outside and name not in entry["first"]:
                entry["first"][name] = {"case": str(case), **_first(name, outputs[name], expectation, operands)}
    return entry


def _read_product(reading: ProductReading, op: Op, case: Case, operands: Operands) -> Expectation:
    environment, declaration = reading(case.problem, operands)
    return gemm_expect(replace(op, environment=lambda problem, operands: environment), case, operands, declaration)["d"]


def product_entry(worker: Worker, backend: str, problem: Problem, tactic: str) -> dict[str, Any] | None:
    """Counts of one product on one tactic: per pattern elements of D, those outside the contract, those outside the reading.
    None where there is no reading of this kernel."""
    reading = PRODUCT_READINGS.get((backend, problem.op, tactic))
    if reading is None:
        return None
    op, declaration = ops()[problem.op], worker.declare(problem, tactic)
    entry: dict[str, Any] = {"problem": str(problem), "tactic": tactic, "patterns": {}, "first": {}, "faults": []}
    for pattern in (pattern for pattern in _PRODUCT_PATTERNS if pattern in op.patterns):
        case = Case(problem, pattern, 0)
        operands = draw_operands(op, case, 0)
        outcome = worker.execute(problem, tactic, operands, tensors_of(op, problem), label=str(case))
        if outcome.status is not Ending.OK:
            entry["faults"].append({"case": str(case), "reason": outcome.reason})
            continue
        codes = outcome.outputs["d"]
        with np.errstate(all="ignore"):
            contract = op.expect(case, operands, declaration)["d"]
            expected = _read_product(reading, op, case, operands)
        outside = int((~contract.admits(codes)).sum())
        entry["patterns"][pattern] = {"d": [int(codes.size), outside, int((~expected.admits(codes)).sum())]}
        if outside and not entry["first"]:
            entry["first"] = {"d": {"case": str(case), **_first("d", codes, contract, operands)}}
    return entry


def _batches(op: Op, case: Case) -> int:
    rows = case.problem.dim("m") if case.pattern in ("onehot", "scaleprobe") else 0
    return max(1, -(-len(rows_probed(op, case)) // rows)) if rows else 1


def _unexplained(worker: Worker, backend: str, verdict: Verdict) -> int:
    """Elements of a failing case that its reading does not admit; all wrong ones where there is no reading or no output."""
    case = parse_case(verdict.case, ops())
    op, left = ops()[case.problem.op], 0
    product, quantiser = PRODUCT_READINGS.get((backend, op.name, verdict.tactic)), READINGS.get(backend)
    if verdict.status is not Status.DRIFT or not verdict.judged or (product is None and quantiser is None):
        return max(verdict.wrong, 1)
    for batch in range(_batches(op, case)):
        operands = operands_of(op, case, batch)
        outputs = worker.execute(case.problem, verdict.tactic, operands, tensors_of(op, case.problem)).outputs
        with np.errstate(all="ignore"):
            if product is not None:
                expected: Mapping[str, Expectation] = {"d": _read_product(product, op, case, operands)}
            else:
                assert quantiser is not None
                expected = quantiser(case, operands, outputs, _contract(op, case, operands, outputs))
        left += sum(int((~expectation.admits(outputs[name])).sum()) for name, expectation in expected.items())
    return left


def _worst(verdict: Verdict) -> dict[str, Any]:
    """The element furthest outside."""
    w = verdict.worst
    if w is None:
        return {}
    return {"tensor": w.tensor, "index": list(w.index), "got": w.got, "admissible": [w.lo, w.hi], "exact": w.exact}


def verdicts(reference: str, ops_asked: tuple[str, ...] = (), per_op: int = 170) -> dict[str, Any]:
    """A certification to level L2 in short: verdicts by op, tactic and status, and every failing one with what its reading leaves
    unexplained."""
    counts: dict[str, dict[str, int]] = {}
    failing: list[Verdict] = []

    def note(verdict: Verdict) -> None:
        row = counts.setdefault(f"{verdict.case.partition('/')[0]} {verdict.tactic}", {})
        row[verdict.status.value] = row.get(verdict.status.value, 0) + 1
        if verdict.status in FAILING:
            failing.append(verdict)

    certify(Plan(reference, level=2, ops=ops_asked, per_op=per_op), on_verdict=note)
    with Worker(reference) as worker:
        name = worker.hello()["name"]
        rows = [{
            "case": v.case, "tactic": v.tactic, "status": v.status.value, "wrong": v.wrong, "judged": v.judged,
            "unexplained": _unexplained(worker, name, v), "worst": _worst(v),
        } for v in failing]
    return {"counts": counts, "failing": rows}


def survey(reference: str) -> dict[str, Any]:
    """All entries of one backend."""
    with Worker(reference) as worker:
        hello = worker.hello()
        name = hello["name"]
        problems = list(quantiser_problems())
        answers = worker.supports(problems)
        quantisers = [quantiser_entry(worker, name, p) for p, answer in zip(problems, answers, strict=True) if answer is None]
        problems = [parse_problem(text, ops()) for text in PRODUCTS]
        supported = [p for p, answer in zip(problems, worker.supports(problems), strict=True) if answer is None]
        products = [product_entry(worker, name, p, tactic) for p in supported for tactic in worker.tactics(p)]
    return {
        "backend": name, "versions": hello["describe"], "verdicts": verdicts(reference), "quantisers": quantisers,
        "products": [entry for entry in products if entry is not None],
    }


def _totals(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line per tensor: elements, outside the contract, outside the reading."""
    sums: dict[str, list[int]] = {}
    for entry in entries:
        for counts in entry["patterns"].values():
            for name, (elements, outside, unread) in counts.items():
                total = sums.setdefault(name, [0, 0, 0])
                for i, value in enumerate((elements, outside, unread if unread >= 0 else outside)):
                    total[i] += value
    return "; ".join(f"{name}: {n:,} judged, {out:,} outside, {left:,} not explained" for name, (n, out, left) in sums.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Survey the named backends and write one JSON file."""
    parser = argparse.ArgumentParser(prog="lowbit.conformance.survey", description=str(__doc__).partition("\n")[0])
    parser.add_argument("backends", nargs="+", metavar="BACKEND")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    found = []
    for reference in arguments.backends:
        found.append(survey(reference))
        failing = found[-1]["verdicts"]["failing"]
        left = sum(bool(row["unexplained"]) for row in failing)
        sys.stdout.write(f"{found[-1]['backend']} verdicts: {len(failing)} fail, {left} of them not explained\n")
        for kind in ("quantisers", "products"):
            if found[-1][kind]:
                sys.stdout.write(f"{found[-1]['backend']} {kind}, {len(found[-1][kind])} problems: {_totals(found[-1][kind])}\n")
    arguments.json.write_text(json.dumps({"subjects": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
