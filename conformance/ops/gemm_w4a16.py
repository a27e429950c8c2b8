"""f16 or bf16 activations x 4-bit weights with group scales: the weight is rounded to the activation's format first."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.conformance.bounds import gemm_expect
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, Role, TensorSpec
from lowbit.references.datapaths import Datapath
from lowbit.references.declarations import Contraction, Declaration, Step, add, cast
from lowbit.references.dot import Operand
from lowbit.references.encodings import Subtract, dequant_w4a16
from lowbit.references.formats import BF16, F16, UINT4, decode
from lowbit.references.interpret import Factor

__all__ = ["OP"]

_OUT = {"bf16": BF16, "f16": F16}
_ZERO = (("variant", ("zp", "zpafter")),)


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """One sum over K of rounded weights, a cast, and the bias before the cast in f32 or after it in the output format."""
    out, bias = _OUT[problem.option("out")], problem.option("bias")
    tail: list[Step] = [add("bias")] if bias == "bias" else []
    tail.append(cast(out))
    if bias == "biasafter":
        tail += [add("bias", format=out), cast(out)]
    return (Contraction(("a", "w"), path), *tail)


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """W[n,k] = RNE((q - z) * s) in the activation's format; variant zpafter: RNE(RNE(q * s) - RNE(z * s))."""
    a, fmt = operands["a"], _OUT[problem.option("out")]
    zeros = operands["zero"].codes if "zero" in operands else None
    order = Subtract.PRODUCTS if problem.variant == "zpafter" else Subtract.CODES
    codes = dequant_w4a16(operands["w"].codes, operands["scale"].codes, fmt, zero_points=zeros, order=order)
    found: dict[str, Operand | Factor] = {"a": Operand(a.codes, a.format), "w": Operand(codes, fmt)}
    if "bias" in operands:
        found["bias"] = Factor(decode(operands["bias"].codes, fmt), "n")
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, from the declaration."""
    return gemm_expect(OP, case, operands, declaration)


OP = Op(
    name="gemm_w4a16",
    formula="D[m,n] = cast( sum_k A[m,k] W[n,k] ) + bias[n], W = RNE_act((q - z) s)",
    clauses=("W4A16-1", "W4A16-2", "W4A16-3", "GEM-1", "GEM-2", "GEM-3"),
    judged={"sym": "W4A16-2", "zp": "W4A16-2", "zpafter": "W4A16-2"},
    variants=("sym", "zp", "zpafter"),
    dims=("m", "n", "k", "g"),
    options=(Option("out", ("bf16", "f16")), Option("bias", ("nobias", "bias", "biasafter"))),
    tensors=(
        TensorSpec("a", "out", ("m", "k"), Role.ACTIVATION, Family.REAL),
        TensorSpec("w", UINT4, ("n", "k"), Role.CONSTANT),
        TensorSpec("scale", "out", ("n", "k/g"), Role.CONSTANT, Family.BLOCK_SCALE),
        TensorSpec("zero", UINT4, ("n", "k/g"), Role.CONSTANT, Family.ZERO_POINT, _ZERO),
        TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias", "biasafter")),)),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("g in (16, 32, 64, 128, 256) or g == k", "W4A16-1"),
        Constraint("k > 0 and k % g == 0 and k % 8 == 0", "W4A16-1"),
        Constraint("n > 0 and n % 8 == 0", "W4A16-1"),
    ),
    ranges={"m": (0, 512, 1), "n": (8, 1024, 8), "k": (16, 16384, 16), "g": (16, 16384, 16)},
    patterns=tuple(name for name in GEMM_PATTERNS if name not in ("maxima",)),
    expect=expect, program=program, environment=environment, minimum_bits=24,
    edges=(
        "gemm_w4a16/sym/m1n64k256g16/f16/normal/s1", "gemm_w4a16/zp/m17n64k512g32/bf16.biasafter/normal/s1",
        "gemm_w4a16/sym/m5n32k96g96/bf16/normal/s1", "gemm_w4a16/sym/m0n32k64g32/bf16/normal/s1",
    ),
    rejects=(
        ("gemm_w4a16/sym/m4n64k96g64/bf16", "W4A16-1"), ("gemm_w4a16/sym/m4n60k64g32/bf16", "W4A16-1"),
        ("gemm_w4a16/zp/m4n64k144g48/bf16", "W4A16-1"),
    ),
)
