"""gemm_w4a8_fp8 per expert: rows of A belong to experts in order, `counts` rows each, some of them none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lowbit.conformance.bounds import to_expectation
from lowbit.conformance.case import Case, Operands, Problem, Stream, Tensor
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec
from lowbit.references.declarations import Claim, Declaration
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, E4M3FN, F16, F32, INT4, INT32, Codes, Reals
from lowbit.references.interpret import Factor, Interval, bound, emulate, ideal

from .gemm_w4a8_fp8 import environment as dense_environment
from .gemm_w4a8_fp8 import program

__all__ = ["OP", "expert_rows"]


def expert_rows(operands: Operands) -> list[slice]:
    """Rows of A that belong to each expert."""
    ends = np.cumsum(operands["counts"].codes.astype(np.int64))
    return [slice(int(end - count), int(end)) for end, count in zip(ends, operands["counts"].codes, strict=True)]


def _expert(operands: Operands, expert: int, rows: slice) -> Operands:
    """The dense operands of one expert."""
    cut = {}
    for name, tensor in operands.items():
        if name in ("a", "token_scale"):
            cut[name] = Tensor(tensor.codes[rows], tensor.format)
        elif name != "counts":
            cut[name] = Tensor(tensor.codes[expert], tensor.format)
    return Operands(cut)


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """Of all experts, one below the other: what exact lanes need to thin A. Results come from `expect`."""
    whole = _expert(operands, 0, slice(None))
    found = dict(dense_environment(problem, whole))
    w = [dense_environment(problem, _expert(operands, e, slice(0, 0)))["w"] for e in range(problem.dim("e"))]
    stacked = [x for x in w if isinstance(x, Operand)]
    found["w"] = Operand(np.concatenate([x.codes for x in stacked]), stacked[0].format)
    if problem.variant == "exact":
        scales = [dense_environment(problem, _expert(operands, e, slice(0, 0)))["group_scale"] for e in range(problem.dim("e"))]
        found["group_scale"] = Factor(np.concatenate([x.values for x in scales if isinstance(x, Factor)]), "n", grouped=True)
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, expert by expert."""
    fmt = {"bf16": BF16, "f16": F16}[case.problem.option("out")]
    evaluate = emulate if declaration.claim is Claim.BIT_EXACT else bound
    m, n = case.problem.dim("m"), case.problem.dim("n")
    lo, hi, exact = (np.zeros((m, n)) for _ in range(3))
    nan, maybe = (np.zeros((m, n), dtype=np.bool_) for _ in range(2))
    for expert, rows in enumerate(expert_rows(operands)):
        if rows.stop > rows.start:
            local = dense_environment(case.problem, _expert(operands, expert, rows))
            found = evaluate(declaration, local)
            lo[rows], hi[rows], nan[rows], maybe[rows] = found.lo, found.hi, found.nan, found.maybe_nan
            exact[rows] = ideal(declaration, local)
    return {"d": to_expectation(Interval(lo, hi, nan, maybe), fmt, exact)}


def exact(problem: Problem, operands: Operands, declaration: Declaration) -> Reals:
    """D over the reals, expert by expert."""
    found = np.zeros((problem.dim("m"), problem.dim("n")))
    for expert, rows in enumerate(expert_rows(operands)):
        if rows.stop > rows.start:
            found[rows] = ideal(declaration, dense_environment(problem, _expert(operands, expert, rows)))
    return found


def draw(case: Case, spec: ResolvedTensor, stream: Stream) -> Codes | None:
    """Rows per expert: a seeded split of m in which about one expert in three has no rows."""
    if spec.family is not Family.COUNTS:
        return None
    experts, m = spec.shape[0], case.problem.dim("m")
    live = np.flatnonzero(stream.integers(0, 2, (experts,)) > 0)
    if not live.size:
        live = np.array([experts - 1])
    cuts = np.sort(stream.integers(0, m, (live.size - 1,)))
    counts = np.zeros(experts, dtype=np.uint32)
    counts[live] = np.diff(np.concatenate([[0], cuts, [m]]))
    return counts


def _stacked(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=("e", *spec.shape))


OP = Op(
    name="gemm_w4a8_fp8_grouped",
    formula="D[m,n] = gemm_w4a8_fp8 of row m with the weights of the expert it belongs to",
    clauses=("W4A8-5", "W4A8-1", "W4A8-2", "W4A8-3", "W4A8-4", "GEM-1", "GEM-2", "GEM-3"),
    judged={"folded": "W4A8-5", "exact": "W4A8-5"},
    variants=("folded", "exact"),
    dims=("e", "m", "n", "k", "g"),
    options=(Option("out", ("bf16", "f16")), Option("bias", ("nobias", "bias"))),
    tensors=(
        TensorSpec("a", E4M3FN, ("m", "k"), Role.ACTIVATION),
        TensorSpec("counts", INT32, ("e",), Role.ACTIVATION, Family.COUNTS),
        _stacked(TensorSpec("w", INT4, ("n", "k"), Role.CONSTANT)),
        _stacked(TensorSpec("group_scale", E4M3FN, ("n", "k/g"), Role.CONSTANT, Family.BLOCK_SCALE)),
        TensorSpec("token_scale", F32, ("m",), Role.ACTIVATION, Family.OUTER_SCALE),
        _stacked(TensorSpec("channel_scale", F32, ("n",), Role.CONSTANT, Family.OUTER_SCALE)),
        _stacked(TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias",)),))),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("e > 0", "W4A8-5"),
        Constraint("g in (64, 128)", "W4A8-1"),
        Constraint("k > 0 and k % g == 0", "W4A8-1"),
        Constraint("n > 0 and n % 8 == 0", "W4A8-1"),
    ),
    ranges={"e": (1, 17, 1), "m": (0, 256, 1), "n": (8, 256, 8), "k": (64, 17408, 64), "g": (64, 128, 64)},
    patterns=tuple(name for name in GEMM_PATTERNS if name not in ("scaleprobe", "tensors")),
    expect=expect,
    program=program,
    environment=environment,
    minimum_bits=14,
    draw=draw,
    exact=exact,
    edges=(
        "gemm_w4a8_fp8_grouped/folded/e5m33n64k256g128/bf16/normal/s1",
        "gemm_w4a8_fp8_grouped/exact/e4m0n64k128g128/bf16/normal/s1",
    ),
    rejects=(
        ("gemm_w4a8_fp8_grouped/folded/e2m4n64k192g128/bf16", "W4A8-1"),
        ("gemm_w4a8_fp8_grouped/folded/e2m4n60k128g128/bf16", "W4A8-1"),
    ),
)
