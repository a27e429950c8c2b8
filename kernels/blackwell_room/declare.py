"""The arithmetic of every tactic as a program: what the judge holds the kernels to.

Decides: datapaths, order of K, joins and roundings, read off the kernels. CuTe (cute_mma, cute_epilogue): K ascending in one
accumulator, one rounded product with alpha, then the rank in the same accumulator, then channel scale and bias by one fused
multiply-add, then one cast. Triton (triton_room.blackwell_gemm_nvfp4): the same, and it has a bias after the cast and nunchaku's
order besides; its own `program` is compared with this one by tests/blackwell. Refuses: problems that no tactic computes
(`unsupported`), one sentence each.
"""

from __future__ import annotations

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    F16,
    Contraction,
    Declaration,
    Format,
    Join,
    Problem,
    Start,
    Step,
    add,
    cast,
    mul,
)

from .schedule import refusal

__all__ = ["TRITON", "declaration", "in_one_cast", "unsupported"]

TRITON = "triton_dot_scaled"
"""Tactic of the Triton twin; every other tactic is the name of a CuTe instance."""

_FORMATS: dict[str, Format] = {"f16": F16, "bf16": BF16}


def in_one_cast(problem: Problem) -> bool:
    """Whether all before the cast to the output format is f32, and nothing comes after it: what the CuTe kernel computes."""
    return problem.variant in ("plain", "svdquant") and problem.option("bias") != "biasafter"


def unsupported(problem: Problem) -> str | None:
    """Why no tactic computes this problem; None where one does. M = 0 is computed: there is nothing to launch."""
    if problem.op != "gemm_nvfp4":
        return f"cuda_blackwell computes gemm_nvfp4, got {problem.op}"
    ranked = problem.option("lora") == "lora"
    if ranked and problem.variant == "plain":
        return f"{problem}: plain has no low-rank term"
    if ranked != (problem.dim("r") > 0):
        return f"{problem}: R must be positive with a low-rank term, and 0 without, got {problem.dim('r')}"
    if problem.variant != "plain" and problem.option("bias") == "biasafter":
        return f"{problem}: only plain adds a bias after the cast"
    reason = refusal(max(1, problem.dim("m")), problem.dim("n"), problem.dim("k"), problem.dim("r"))
    return None if reason is None else f"{problem}: {reason}"


def declaration(problem: Problem) -> Declaration:
    """mxf4nvf4 sums 64 products at a time in ascending K; the f16 or bf16 instruction 16 at a time, ascending, from what the
    accumulator holds. The product with alpha is rounded to f32, in tensor memory where a low-rank product follows. Channel
    scale and bias are one fused multiply-add where both are there. All tactics of a problem share one program."""
    out, bias = _FORMATS[problem.option("out")], problem.option("bias")
    main = Contraction(("a", "w"), DATAPATHS["blackwell_nvfp4"])
    low_rank: tuple[Contraction | Step, ...] = ()
    if problem.option("lora") == "lora":
        path = DATAPATHS[f"blackwell_{problem.option('out')}"]
        low_rank = (Contraction(("lora_act", "lora_up"), path, start=Start.PREVIOUS),)
    if problem.variant == "nunchaku":
        fused = (mul("channel_scale", format=out, join=Join.FUSED), add("bias", format=out))
        affine = fused if bias == "bias" else (mul("channel_scale", format=out),)
        return Declaration((main, mul("alpha"), cast(out), *affine, *low_rank, cast(out)))
    program: list[Contraction | Step] = [main, mul("alpha"), *low_rank]
    if problem.variant == "svdquant":
        program.append(mul("channel_scale", join=Join.FUSED if bias == "bias" else Join.SEPARATE))
    if bias == "bias":
        program.append(add("bias"))
    program.append(cast(out))
    return Declaration((*program, add("bias", format=out), cast(out)) if bias == "biasafter" else tuple(program))
