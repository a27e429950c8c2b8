"""int8 activations x 4-bit weights: exact int32 sums within a group, group scales in f32 arithmetic, a scale per token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.conformance.bounds import gemm_expect
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, Role, TensorSpec
from lowbit.references.datapaths import Datapath
from lowbit.references.declarations import Contraction, Declaration, Join, Step, add, cast, mul
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, F16, F32, INT4, INT8, UINT4, decode
from lowbit.references.interpret import Factor

__all__ = ["OP"]

_OUT = {"bf16": BF16, "f16": F16}


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """Group sums to f32, times group scale, running f32 total; token scale; bias; cast. viaf16: cast to f16 first."""
    bias = problem.option("bias") == "bias"
    group = Contraction(
        ("a", "w"), path, segment=problem.dim("g"), steps=(cast(F32), mul("group_scale", join=Join.EITHER)))
    tail: list[Step] = [mul("token_scale", join=Join.EITHER if bias else Join.SEPARATE)]
    if bias:
        tail.append(add("bias"))
    if problem.variant == "viaf16":
        tail.append(cast(F16))
    return (group, *tail, cast(_OUT[problem.option("out")]))


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """W[n,k] = q - 8, an int4."""
    w = ((operands["w"].codes.astype(np.int16) - 8) & 0xF).astype(np.uint8)
    found: dict[str, Operand | Factor] = {"a": Operand(operands["a"].codes, INT8), "w": Operand(w, INT4)}
    scale = operands["group_scale"]
    found["group_scale"] = Factor(decode(scale.codes, scale.format), "n", grouped=True)
    for name, axis in (("token_scale", "m"), ("bias", "n")):
        if name in operands:
            found[name] = Factor(decode(operands[name].codes, operands[name].format), axis)
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, from the declaration."""
    return gemm_expect(OP, case, operands, declaration)


OP = Op(
    name="gemm_w4a8_int8",
    formula="D[m,n] = cast( token_scale[m] * sum_g group_scale[n,g] * sum_{k in g} A[m,k] (q[n,k] - 8) + bias[n] )",
    clauses=("W4I8-1", "W4I8-2", "W4I8-3", "GEM-1", "GEM-2", "GEM-3"),
    judged={"direct": "W4I8-2", "viaf16": "W4I8-3"},
    variants=("direct", "viaf16"),
    dims=("m", "n", "k", "g"),
    options=(Option("out", ("bf16", "f16")), Option("bias", ("nobias", "bias"))),
    tensors=(
        TensorSpec("a", INT8, ("m", "k"), Role.ACTIVATION),
        TensorSpec("w", UINT4, ("n", "k"), Role.CONSTANT),
        TensorSpec("group_scale", "out", ("n", "k/g"), Role.CONSTANT, Family.BLOCK_SCALE),
        TensorSpec("token_scale", "out", ("m",), Role.ACTIVATION, Family.OUTER_SCALE),
        TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias",)),)),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("g == k or g % 32 == 0", "W4I8-1"), Constraint("k > 0 and k % g == 0 and k % 8 == 0", "W4I8-1"),
        Constraint("n > 0 and n % 8 == 0", "W4I8-1"),
    ),
    ranges={"m": (0, 512, 1), "n": (8, 1024, 8), "k": (32, 17408, 8), "g": (32, 17408, 8)},
    patterns=GEMM_PATTERNS,
    expect=expect, program=program, environment=environment, minimum_bits=24,
    edges=(
        "gemm_w4a8_int8/direct/m1n64k128g64/f16/normal/s1", "gemm_w4a8_int8/viaf16/m8n64k256g128/bf16.bias/maxima/s1",
        "gemm_w4a8_int8/direct/m7n16k40g40/bf16/normal/s1",
    ),
    rejects=(
        ("gemm_w4a8_int8/direct/m4n64k96g48/bf16", "W4I8-1"), ("gemm_w4a8_int8/direct/m4n62k64g32/bf16", "W4I8-1"),
    ),
)
