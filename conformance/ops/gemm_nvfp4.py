"""NVFP4 x NVFP4: e2m1 codes with one e4m3 scale per 16, alpha, low-rank term, channel scale and bias in three orders."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.conformance.bounds import gemm_expect
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import GEMM_PATTERNS, Constraint, Expectation, Family, Op, Option, Role, TensorSpec
from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.declarations import Contraction, Declaration, Join, Start, Step, add, cast, mul
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, E2M1, F16, F32, UE4M3, decode
from lowbit.references.interpret import Factor
from lowbit.references.rounding import Overflow, Rounding, encode

__all__ = ["OP"]

_OUT = {"bf16": BF16, "f16": F16}
_LORA = (("lora", ("lora",)),)
_AFFINE = (("variant", ("svdquant", "nunchaku")),)


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """plain: alpha, cast, bias after it. svdquant: (alpha * main + lora) * channel + bias in f32, one cast. nunchaku: alpha
    to the output format, channel scale and bias by one FMA in it, then the low-rank term on top in f32, cast again."""
    out, bias = _OUT[problem.option("out")], problem.option("bias")
    main = Contraction(("a", "w"), path)
    second = path if path.output is F32 and not path.fraction_bits else DATAPATHS["ieee_f32"]
    lora = Contraction(("lora_act", "lora_up"), second)
    has_lora = problem.option("lora") == "lora"
    if problem.variant == "plain":
        tail: list[Step] = [add("bias")] if bias == "bias" else []
        tail.append(cast(out))
        if bias == "biasafter":
            tail += [add("bias", format=out), cast(out)]
        return (main, mul("alpha", join=Join.EITHER if bias == "bias" else Join.SEPARATE), *tail)
    if problem.variant == "svdquant":
        steps: list[Contraction | Step] = [main, mul("alpha")]
        if has_lora:
            steps.append(lora)
        steps.append(mul("channel_scale", join=Join.EITHER if bias == "bias" else Join.SEPARATE))
        if bias == "bias":
            steps.append(add("bias"))
        return (*steps, cast(out))
    affine: list[Step] = [mul("channel_scale", format=out, join=Join.FUSED if bias == "bias" else Join.SEPARATE)]
    if bias == "bias":
        affine.append(add("bias", format=out))
    last = (Contraction(lora.operands, lora.datapath, start=Start.PREVIOUS),) if has_lora else ()
    return (main, mul("alpha"), cast(out), *affine, *last, cast(out))


def environment(problem: Problem, operands: Operands) -> Mapping[str, Operand | Factor]:
    """Codes with their block scales; the low-rank activation rounded to the output format (RNE) before its product."""
    out = _OUT[problem.option("out")]
    found: dict[str, Operand | Factor] = {
        side: Operand(operands[side].codes, E2M1, operands[f"{side}_scale"].codes, UE4M3, 16) for side in ("a", "w")
    }
    if "lora_act" in operands:
        act = encode(decode(operands["lora_act"].codes, F32), out, Rounding.RNE, Overflow.SPECIAL)
        found["lora_act"] = Operand(act, out)
        found["lora_up"] = Operand(operands["lora_up"].codes, out)
    for name, axis in (("alpha", ""), ("channel_scale", "n"), ("bias", "n")):
        if name in operands:
            found[name] = Factor(decode(operands[name].codes, operands[name].format), axis)
    return found


def expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    """Interval or bits of D, from the declaration."""
    return gemm_expect(OP, case, operands, declaration)


OP = Op(
    name="gemm_nvfp4",
    formula="D[m,n] = cast( (alpha * sum_k a s_a w s_w + sum_r lora_act[m,r] lora_up[n,r]) * channel_scale[n] + bias[n] )",
    clauses=("NVF-1", "NVF-2", "NVF-3", "NVF-4", "NVF-5", "GEM-1", "GEM-2", "GEM-3"),
    judged={"plain": "NVF-2", "svdquant": "NVF-4", "nunchaku": "NVF-5"},
    variants=("plain", "svdquant", "nunchaku"),
    dims=("m", "n", "k", "r"),
    options=(
        Option("out", ("bf16", "f16")), Option("lora", ("nolora", "lora")), Option("bias", ("nobias", "bias", "biasafter")),
    ),
    tensors=(
        TensorSpec("a", E2M1, ("m", "k"), Role.ACTIVATION),
        TensorSpec("a_scale", UE4M3, ("m", "k/16"), Role.ACTIVATION, Family.BLOCK_SCALE),
        TensorSpec("w", E2M1, ("n", "k"), Role.CONSTANT),
        TensorSpec("w_scale", UE4M3, ("n", "k/16"), Role.CONSTANT, Family.BLOCK_SCALE),
        TensorSpec("alpha", F32, ("1",), Role.CONSTANT, Family.GLOBAL_SCALE),
        TensorSpec("lora_act", F32, ("m", "r"), Role.ACTIVATION, Family.LORA, _LORA),
        TensorSpec("lora_up", "out", ("n", "r"), Role.CONSTANT, Family.LORA, _LORA),
        TensorSpec("channel_scale", "out", ("n",), Role.CONSTANT, Family.OUTER_SCALE, _AFFINE),
        TensorSpec("bias", "out", ("n",), Role.CONSTANT, Family.BIAS, (("bias", ("bias", "biasafter")),)),
        TensorSpec("d", "out", ("m", "n"), Role.OUTPUT),
    ),
    constraints=(
        Constraint("k > 0 and k % 32 == 0", "NVF-1"), Constraint("n > 0 and n % 8 == 0", "NVF-1"),
        Constraint("(lora == 'lora' and r > 0 and r % 16 == 0) or (lora == 'nolora' and r == 0)", "NVF-3"),
        Constraint("variant != 'plain' or lora == 'nolora'", "NVF-2"),
        Constraint("variant == 'plain' or bias != 'biasafter'", "NVF-4"),
    ),
    ranges={"m": (0, 512, 1), "n": (8, 1024, 8), "k": (32, 16384, 32), "r": (0, 256, 16)},
    patterns=GEMM_PATTERNS,
    expect=expect, program=program, environment=environment, minimum_bits=24,
    edges=(
        "gemm_nvfp4/plain/m1n32k64r0/bf16/normal/s1", "gemm_nvfp4/svdquant/m33n64k256r32/f16.lora.bias/normal/s1",
        "gemm_nvfp4/nunchaku/m17n64k256r16/bf16.lora.bias/normal/s1", "gemm_nvfp4/plain/m0n32k64r0/bf16/normal/s1",
    ),
    rejects=(
        ("gemm_nvfp4/plain/m4n64k48r0/bf16", "NVF-1"), ("gemm_nvfp4/svdquant/m4n64k64r24/bf16.lora", "NVF-3"),
        ("gemm_nvfp4/plain/m4n60k64r0/bf16", "NVF-1"),
    ),
)
