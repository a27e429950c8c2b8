"""e4m3fn activations x int4 weights with e4m3 group scales: folded into the weight (rounded), or on the accumulator (exact)."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.conformance.bounds import gemm_expect
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, Role, TensorSpec
from lowbit.references.datapaths import Datapath
from lowbit.references.declarations import Contraction, Declaration, Join, Step, add, cast, mul
from lowbit.references.dot import Operand
from lowbit.references.encodings import folded_weight
from lowbit.references.formats import BF16, E4M3FN, F16, F32, INT4, decode
from lowbit.references.interpret import Factor

__all__ = ["OP", "environment", "program"]

_OUT = {"bf16": BF16, "f16": F16}


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """folded: one sum over K. exact: each group is summed, multiplied by its scale and added to a running f32 total. Then
    token scale, channel scale, bias joined to the last product, one cast."""
    bias = problem.option("bias") == "bias"
    tail: list[Step] = [mul("token_scale"), mul("channel_scale", join=Join.EITHER if bias else Join.SEPARATE)]
    if bias:
        tail.append(add("bias"))
    tail.append(cast(_OUT[problem.option("out")]))
    if problem.variant == "folded":
        return (Contraction(("a", "w"), path), *tail)
    group = Contraction(("a", "w"), path, segment=problem.dim("g"), steps=(mul("group_scale", join=Join.EITHER),))
    return (group, *tail)


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """folded: W[n,k] = RNE_e4m3(q * s), saturating, -0 for q = 0. exact: W = q, the scales are factors per group."""
    a, w, scale = operands["a"], operands["w"], operands["group_scale"]
    found: dict[str, Operand | Factor] = {"a": Operand(a.codes, a.format)}
    if problem.variant == "folded":
        found["w"] = Operand(folded_weight(w.codes, scale.codes), E4M3FN)
    else:
        found["w"] = Operand(w.codes, INT4)
        found["group_scale"] = Factor(decode(scale.codes, scale.format), "n", grouped=True)
    for name, axis in (("token_scale", "m"), ("channel_scale", "n"), ("bias", "n")):
        if name in operands:
            found[name] = Factor(decode(operands[name].codes, operands[name].format), axis)
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, from the declaration."""
    return gemm_expect(OP, case, operands, declaration)


OP = Op(
    name="gemm_w4a8_fp8",
    formula="D[m,n] = cast( channel_scale[n] * token_scale[m] * sum_k A[m,k] W[n,k] + bias[n] ), W = RNE_e4m3(q s)",
    clauses=("W4A8-1", "W4A8-2", "W4A8-3", "W4A8-4", "GEM-1", "GEM-2", "GEM-3"),
    judged={"folded": "W4A8-2", "exact": "W4A8-3"},
    variants=("folded", "exact"),
    dims=("m", "n", "k", "g"),
    options=(Option("out", ("bf16", "f16")), Option("bias", ("nobias", "bias"))),
    tensors=(
        TensorSpec("a", E4M3FN, ("m", "k"), Role.ACTIVATION),
        TensorSpec("w", INT4, ("n", "k"), Role.CONSTANT),
        TensorSpec("group_scale", E4M3FN, ("n", "k/g"), Role.CONSTANT, Family.BLOCK_SCALE),
        TensorSpec("token_scale", F32, ("m",), Role.ACTIVATION, Family.OUTER_SCALE),
        TensorSpec("channel_scale", F32, ("n",), Role.CONSTANT, Family.OUTER_SCALE),
        TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias",)),)),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("g in (64, 128)", "W4A8-1"),
        Constraint("k > 0 and k % g == 0", "W4A8-1"),
        Constraint("n > 0 and n % 8 == 0", "W4A8-1"),
    ),
    ranges={"m": (0, 512, 1), "n": (8, 1024, 8), "k": (64, 32768, 64), "g": (64, 128, 64)},
    patterns=GEMM_PATTERNS,
    expect=expect,
    program=program,
    environment=environment,
    minimum_bits=14,
    edges=(
        "gemm_w4a8_fp8/folded/m1n128k128g128/bf16/normal/s1",
        "gemm_w4a8_fp8/folded/m17n384k1024g128/bf16/lognormal/s7",
        "gemm_w4a8_fp8/exact/m0n64k128g128/bf16/normal/s1",
    ),
    rejects=(
        ("gemm_w4a8_fp8/folded/m4n64k192g128/bf16", "W4A8-1"),
        ("gemm_w4a8_fp8/folded/m4n64k128g32/bf16", "W4A8-1"),
        ("gemm_w4a8_fp8/exact/m4n60k128g128/bf16", "W4A8-1"),
    ),
)
