"""int4 x int4 with one scale per 64 on both sides: exact int32 within a group; f32 or half accumulation across groups."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.conformance.bounds import gemm_expect
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, Role, TensorSpec
from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.declarations import Contraction, Declaration, Join, Start, Step, add, cast, mul
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, F16, F32, INT4, decode
from lowbit.references.interpret import Factor
from lowbit.references.rounding import Overflow, Rounding, encode

__all__ = ["OP"]

_OUT = {"bf16": BF16, "f16": F16}
_LORA = (("lora", ("lora",)),)


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """f32: group sum to f32, times a_scale, times w_scale, running f32 total, + lora, * channel + bias, one cast.
    half: the same walk in the output format, a_scale * w_scale rounded first, every addition an FMA."""
    out = _OUT[problem.option("out")]
    bias = problem.option("bias") == "bias"
    lora = (Contraction(("lora_act", "lora_up"), DATAPATHS["ieee_f32"]),) if problem.option("lora") == "lora" else ()
    if problem.variant == "f32":
        main = Contraction(("a", "w"), path, segment=64, steps=(cast(F32), mul("a_scale"), mul("w_scale")))
        tail: list[Step] = [mul("channel_scale", join=Join.EITHER if bias else Join.SEPARATE)]
        return (main, *lora, *tail, *((add("bias"),) if bias else ()), cast(out))
    scale = mul("a_scale", "w_scale", format=out, operand_format=out, join=Join.FUSED)
    main = Contraction(("a", "w"), path, segment=64, steps=(cast(F32), cast(out), scale), running=out)
    affine: list[Step] = [mul("channel_scale", format=out, join=Join.FUSED if bias else Join.SEPARATE)]
    if bias:
        affine.append(add("bias", format=out))
    last = (Contraction(lora[0].operands, lora[0].datapath, start=Start.PREVIOUS),) if lora else ()
    return (main, *affine, *last, cast(out))


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """Codes, scales per group of 64, the low-rank activation rounded to the output format (RNE)."""
    out = _OUT[problem.option("out")]
    found: dict[str, Operand | Factor] = {side: Operand(operands[side].codes, INT4) for side in ("a", "w")}
    for name, axis in (("a_scale", "m"), ("w_scale", "n")):
        found[name] = Factor(decode(operands[name].codes, out), axis, grouped=True)
    if "lora_act" in operands:
        act = encode(decode(operands["lora_act"].codes, F32), out, Rounding.RNE, Overflow.SPECIAL)
        found["lora_act"] = Operand(act, out)
        found["lora_up"] = Operand(operands["lora_up"].codes, out)
    for name in ("channel_scale", "bias"):
        if name in operands:
            found[name] = Factor(decode(operands[name].codes, operands[name].format), "n")
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, from the declaration."""
    return gemm_expect(OP, case, operands, declaration)


OP = Op(
    name="gemm_int4",
    formula="D[m,n] = cast( (sum_g a_scale[m,g] w_scale[n,g] sum_{k in g} a w + lora) * channel_scale[n] + bias[n] )",
    clauses=("INT-1", "INT-2", "INT-3", "INT-4", "GEM-1", "GEM-2", "GEM-3"),
    judged={"f32": "INT-2", "half": "INT-4"},
    variants=("f32", "half"),
    dims=("m", "n", "k", "r"),
    options=(Option("out", ("f16", "bf16")), Option("lora", ("nolora", "lora")), Option("bias", ("nobias", "bias"))),
    tensors=(
        TensorSpec("a", INT4, ("m", "k"), Role.ACTIVATION),
        TensorSpec("a_scale", "out", ("m", "k/64"), Role.ACTIVATION, Family.BLOCK_SCALE),
        TensorSpec("w", INT4, ("n", "k"), Role.CONSTANT),
        TensorSpec("w_scale", "out", ("n", "k/64"), Role.CONSTANT, Family.BLOCK_SCALE),
        TensorSpec("lora_act", F32, ("m", "r"), Role.ACTIVATION, Family.LORA, _LORA),
        TensorSpec("lora_up", "out", ("n", "r"), Role.CONSTANT, Family.LORA, _LORA),
        TensorSpec("channel_scale", "out", ("n",), Role.CONSTANT, Family.OUTER_SCALE),
        TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias",)),)),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("k > 0 and k % 64 == 0", "INT-1"),
        Constraint("n > 0 and n % 8 == 0", "INT-1"),
        Constraint("(lora == 'lora' and r > 0 and r % 16 == 0) or (lora == 'nolora' and r == 0)", "INT-3"),
    ),
    ranges={"m": (0, 512, 1), "n": (8, 1024, 8), "k": (64, 16384, 64), "r": (0, 256, 16)},
    patterns=GEMM_PATTERNS,
    expect=expect,
    program=program,
    environment=environment,
    minimum_bits=0,
    edges=(
        "gemm_int4/f32/m64n128k128r32/f16.lora/normal/s1",
        "gemm_int4/half/m17n64k4160r16/bf16.lora.bias/normal/s1",
        "gemm_int4/f32/m0n64k64r0/f16/normal/s1",
        "gemm_int4/f32/m17n24k15360r128/f16.lora.bias/normal/s1",
        "gemm_int4/f32/m5n136k15360r0/f16/extremes/s1",
        "gemm_int4/f32/m33n40k128r256/f16.lora.bias/zeros/s1",
    ),
    rejects=(
        ("gemm_int4/f32/m4n64k96r0/f16", "INT-1"),
        ("gemm_int4/f32/m4n64k64r8/f16.lora", "INT-3"),
        ("gemm_int4/half/m4n60k64r0/f16", "INT-1"),
    ),
)
