"""fp8 x fp8 with per-tensor, per-token and per-channel scales, or block scales promoted every 128 of K."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.conformance.bounds import gemm_expect
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, Role, TensorSpec
from lowbit.references.datapaths import Datapath
from lowbit.references.declarations import Contraction, Declaration, Join, Step, add, cast, mul
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, F16, F32, decode
from lowbit.references.interpret import Factor

__all__ = ["OP"]

_OUT = {"bf16": BF16, "f16": F16, "f32": F32}
_SCALED = (("variant", ("scaled",)),)
_BLOCK = (("variant", ("block",)),)


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """scaled: acc * channel * token, bias joined to the last product, one cast. block: each 128 of K is scaled by
    a_scale * w_scale and added to a running f32 total."""
    out = _OUT[problem.option("out")]
    bias = problem.option("bias")
    tail: list[Step] = [add("bias")] if bias == "bias" else []
    tail.append(cast(out))
    if bias == "biasafter":
        tail += [add("bias", format=out), cast(out)]
    if problem.variant == "block":
        return (Contraction(("a", "w"), path, segment=128, steps=(mul("a_scale", "w_scale", join=Join.EITHER),)), *tail)
    last = Join.EITHER if bias == "bias" else Join.SEPARATE
    return (Contraction(("a", "w"), path), mul("channel_scale"), mul("token_scale", join=last), *tail)


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """Codes as they are; a scale per tensor is broadcast; a 128 x 128 weight scale is repeated over its columns."""
    a, w = operands["a"], operands["w"]
    found: dict[str, Operand | Factor] = {"a": Operand(a.codes, a.format), "w": Operand(w.codes, w.format)}
    columns = w.codes.shape[0]
    for name, axis in (("a_scale", "m"), ("w_scale", "n")):
        if name in operands:
            values = decode(operands[name].codes, F32)
            if axis == "n" and values.shape[0] != columns:
                values = np.repeat(values, 128, axis=0)[:columns]
            found[name] = Factor(values, axis, grouped=True)
    for name, axis in (("token_scale", "m"), ("channel_scale", "n"), ("bias", "n")):
        if name in operands:
            tensor = operands[name]
            values = decode(tensor.codes, tensor.format)
            found[name] = Factor(values, axis if tensor.codes.size != 1 or name == "bias" else "")
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, from the declaration."""
    return gemm_expect(OP, case, operands, declaration)


OP = Op(
    name="gemm_w8a8_fp8",
    formula="D[m,n] = cast( token_scale[m] * channel_scale[n] * sum_k A[m,k] W[n,k] + bias[n] )",
    clauses=("W8A8-1", "W8A8-2", "W8A8-3", "W8A8-4", "GEM-1", "GEM-2", "GEM-3"),
    judged={"scaled": "W8A8-2", "block": "W8A8-3"},
    variants=("scaled", "block"),
    dims=("m", "n", "k"),
    options=(
        Option("out", ("bf16", "f16", "f32")), Option("format", ("fn", "fnuz")), Option("act_scale", ("token", "atensor")),
        Option("weight_scale", ("channel", "wtensor")), Option("bias", ("nobias", "bias", "biasafter")),
    ),
    tensors=(
        TensorSpec("a", "format", ("m", "k"), Role.ACTIVATION),
        TensorSpec("w", "format", ("n", "k"), Role.CONSTANT),
        TensorSpec("token_scale", F32, ("m",), Role.ACTIVATION, Family.OUTER_SCALE, (*_SCALED, ("act_scale", ("token",)))),
        TensorSpec("token_scale", F32, ("1",), Role.ACTIVATION, Family.OUTER_SCALE, (*_SCALED, ("act_scale", ("atensor",)))),
        TensorSpec("channel_scale", F32, ("n",), Role.CONSTANT, Family.OUTER_SCALE, (*_SCALED, ("weight_scale", ("channel",)))),
        TensorSpec("channel_scale", F32, ("1",), Role.CONSTANT, Family.OUTER_SCALE, (*_SCALED, ("weight_scale", ("wtensor",)))),
        TensorSpec("a_scale", F32, ("m", "k//128"), Role.ACTIVATION, Family.BLOCK_SCALE, _BLOCK),
        TensorSpec("w_scale", F32, ("ceil(n, 128)", "k//128"), Role.CONSTANT, Family.BLOCK_SCALE, _BLOCK),
        TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias", "biasafter")),)),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("k % 16 == 0 and k > 0", "W8A8-1"), Constraint("n % 8 == 0 and n > 0", "W8A8-1"),
        Constraint("variant == 'scaled' or k % 128 == 0", "W8A8-3"),
        Constraint("variant == 'scaled' or (act_scale == 'token' and weight_scale == 'channel')", "W8A8-3"),
        Constraint("bias != 'biasafter' or out != 'f32'", "W8A8-4"),
    ),
    ranges={"m": (0, 512, 1), "n": (8, 1024, 8), "k": (16, 16384, 16)},
    patterns=GEMM_PATTERNS,
    expect=expect, program=program, environment=environment, minimum_bits=14,
    edges=(
        "gemm_w8a8_fp8/scaled/m1n256k512/bf16.bias/normal/s1", "gemm_w8a8_fp8/scaled/m0n64k128/bf16/normal/s1",
        "gemm_w8a8_fp8/scaled/m1n64k16/bf16.atensor.wtensor/normal/s1", "gemm_w8a8_fp8/block/m3n136k256/bf16/normal/s1",
        "gemm_w8a8_fp8/block/m5n392k384/bf16/lognormal/s1",
    ),
    rejects=(
        ("gemm_w8a8_fp8/scaled/m4n64k40/bf16", "W8A8-1"), ("gemm_w8a8_fp8/scaled/m4n60k64/bf16", "W8A8-1"),
        ("gemm_w8a8_fp8/block/m4n64k192/bf16", "W8A8-3"),
    ),
)
