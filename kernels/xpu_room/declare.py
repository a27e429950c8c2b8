"""Which problems the xpu kernels compute, and the arithmetic they declare.

Decides: what is refused, one sentence per rule, and the program of the GEMM. Refuses: groups whose sum could leave int32.
"""

from __future__ import annotations

from collections.abc import Callable

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    EXACT_BITS,
    F16,
    F32,
    Claim,
    Contraction,
    Declaration,
    Problem,
    Step,
    add,
    cast,
    mul,
)

__all__ = ["LARGEST_GROUP", "OPS", "declare", "refusal"]

LARGEST_GROUP = (1 << 21) - 8
"""Codes per group: 2^21 products of -128 and -8 are 2^31, one more than int32 holds."""

OPS = ("gemm_w4a8_int8", "int8_quantize", "int4_pack")
_CODES = {"compressed_tensors": "int8", "b8": "uint4"}
Rule = tuple[Callable[[Problem], bool], str]

_RULES: dict[str, tuple[Rule, ...]] = {
    "gemm_w4a8_int8": (
        (lambda p: p.variant in ("direct", "viaf16"), "the variant must be direct or viaf16"),
        (lambda p: p.dim("n") > 0 and p.dim("n") % 8 == 0, "N must be a positive multiple of 8"),
        (lambda p: p.dim("k") > 0 and p.dim("k") % 8 == 0, "K must be a positive multiple of 8"),
        (lambda p: p.dim("g") == p.dim("k") or (p.dim("g") > 0 and p.dim("g") % 32 == 0), "G must be K or a multiple of 32"),
        (lambda p: p.dim("k") % p.dim("g") == 0, "K must be a multiple of G"),
        (lambda p: p.dim("g") <= LARGEST_GROUP, f"G must be at most {LARGEST_GROUP}: the sum of a group is an int32"),
    ),
    "int8_quantize": ((lambda p: p.dim("k") > 0, "K must be positive"),),
    "int4_pack": (
        (lambda p: p.variant in ("compressed_tensors", "k_major", "b8"), "the variant must be compressed_tensors, k_major or b8"),
        (lambda p: p.dim("n") > 0 and p.dim("k") > 0, "N and K must be positive"),
        (lambda p: p.variant == "compressed_tensors" or p.dim("k") % 8 == 0, "K must be a multiple of 8 for k_major and b8"),
        (lambda p: p.option("codes") == _CODES.get(p.variant, p.option("codes")), "compressed_tensors takes int8, b8 uint4"),
    ),
}


def refusal(problem: Problem, *, divides: bool) -> str | None:
    """None for a problem that the kernels compute, otherwise one sentence that says why not. `divides`: whether the device
    rounds binary32 quotients correctly."""
    rules = _RULES.get(problem.op)
    if rules is None:
        return f"the xpu backend has no kernel for {problem.op!r}; it computes {', '.join(OPS)}"
    broken = next((text for kept, text in rules if not kept(problem)), None)
    if broken is None and problem.op == "int8_quantize" and not divides:
        broken = "this device does not round binary32 quotients correctly (CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT)"
    return broken and f"xpu, {problem.op}: {broken}"


def declare(problem: Problem) -> Declaration:
    """The arithmetic of a problem that `refusal` accepts. Sums of a group are exact, every later step is rounded on its own,
    groups ascend: the GEMM has one answer and claims it. A row is computed without the others."""
    if problem.op != "gemm_w4a8_int8":
        return EXACT_BITS
    group = Contraction(("a", "w"), DATAPATHS["imma_s32"], segment=problem.dim("g"), steps=(cast(F32), mul("group_scale")))
    program: list[Contraction | Step] = [group, mul("token_scale")]
    if problem.option("bias") == "bias":
        program.append(add("bias"))
    if problem.variant == "viaf16":
        program.append(cast(F16))
    program.append(cast(BF16 if problem.option("out") == "bf16" else F16))
    return Declaration(tuple(program), Claim.BIT_EXACT, batch_invariant=True)
