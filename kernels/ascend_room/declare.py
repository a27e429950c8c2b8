"""Which problems the ascend kernels compute, and the arithmetic they declare.

Decides: what is refused, one sentence per rule, and the program of each op. Refuses: to claim bits for sums of 16-bit products on
the cube, whose order and internal width nobody has published: those are declared as binary32 sums in unknown order.
"""

from __future__ import annotations

from collections.abc import Callable

from lowbit.conformance.backend import (
    DATAPATHS,
    EXACT_BITS,
    F16,
    F32,
    Claim,
    Contraction,
    Declaration,
    Order,
    Problem,
    Step,
    add,
    cast,
    mul,
)

__all__ = ["ASSUMED", "declare", "refusal"]

ASSUMED = (
    "assumed: sums of 16-bit products on the cube are binary32 sums in unknown order; no bit model of that unit is published. "
    "Exact where every partial sum is exact; integer and dequantisation stages have one order and are claimed to the bit"
)
"""What the declared datapath of the low-rank stages rests on."""

Rule = tuple[Callable[[Problem], bool], str]
_LARGEST_K = 131008  # row strides of the copy into fractals are 16 bits wide (gemm_int4.cpp)
_MOST_ROWS = 1 << 20  # strides between rows of scales are 16 bits wide and count 32 bytes (quantize_int4.cpp)


def _multiple(letter: str, step: int) -> Rule:
    return (lambda p: p.dim(letter) > 0 and p.dim(letter) % step == 0), f"{letter.upper()} must be a positive multiple of {step}"


def _short(letter: str, largest: int) -> Rule:
    return (lambda p: p.dim(letter) <= largest), f"{letter.upper()} must be at most {largest}"


def _token(option: str, *tokens: str) -> Rule:
    return (lambda p: p.option(option) in tokens), f"{option} must be {' or '.join(tokens)}"


def _variant(*names: str) -> Rule:
    return (lambda p: p.variant in names), f"the variant must be {' or '.join(names)}"


def _low_rank(problem: Problem) -> bool:
    r = problem.dim("r")
    return r % 16 == 0 and (r > 0) == (problem.option("lora") == "lora")


def _whole_words(problem: Problem) -> bool:
    return problem.dim("k") % {"nibble": 2, "k_major": 8, "b8": 8}.get(problem.variant, 1) == 0


def _known_codes(problem: Problem) -> bool:
    return problem.option("codes") == {"compressed_tensors": "int8", "b8": "uint4"}.get(problem.variant, problem.option("codes"))


_RULES: dict[str, tuple[Rule, ...]] = {
    "gemm_int4": (
        _variant("f32"), _token("out", "f16"), _multiple("k", 64), _short("k", _LARGEST_K), _multiple("n", 8),
        (_low_rank, "R must be a positive multiple of 16 with a low-rank term, and 0 without"),
    ),
    "int4_quantize": (
        _variant("sym"), _token("recipe", "svdquant"), _token("x", "f16", "bf16"), _multiple("k", 64),
        (lambda p: p.dim("g") == 64, "G must be 64"), _short("n", _MOST_ROWS),
    ),
    "svdquant_quantize": (
        _variant("int4"), _token("recipe", "svdquant"), _token("x", "f16", "bf16"), _multiple("k", 64), _short("k", 65472),
        _short("m", _MOST_ROWS), _multiple("r", 16),
    ),
    "int4_pack": (
        _variant("nibble", "k_major", "compressed_tensors", "b8"), _multiple("n", 1), _multiple("k", 1),
        (_whole_words, "K must be even for nibble and a multiple of 8 for k_major and b8"),
        (_known_codes, "compressed_tensors takes int8 codes, b8 uint4 words"),
    ),
}


def refusal(problem: Problem) -> str | None:
    """None for a problem that the kernels compute; otherwise one sentence that says why not."""
    rules = _RULES.get(problem.op)
    if rules is None:
        return f"the ascend backend has no kernel for {problem.op!r}; it computes {', '.join(_RULES)}"
    broken = next((text for kept, text in rules if not kept(problem)), None)
    return broken and f"ascend, {problem.op}: {broken}"


def _gemm(problem: Problem) -> Declaration:
    main = Contraction(("a", "w"), DATAPATHS["imma_s32"], segment=64, steps=(cast(F32), mul("a_scale"), mul("w_scale")))
    low_rank = problem.option("lora") == "lora"
    program: list[Contraction | Step] = [main]
    if low_rank:
        program.append(Contraction(("lora_act", "lora_up"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN))
    program.append(mul("channel_scale"))
    if problem.option("bias") == "bias":
        program.append(add("bias"))
    return Declaration((*program, cast(F16)), Claim.BOUNDED if low_rank else Claim.BIT_EXACT)


def declare(problem: Problem) -> Declaration:
    """The arithmetic of a problem that `refusal` accepts. Integer sums of 64 codes are exact, each scale is one binary32
    multiplication, totals run over ascending groups; with a low-rank term the result is bounded, without it claimed to the
    bit."""
    if problem.op == "gemm_int4":
        return _gemm(problem)
    if problem.op == "svdquant_quantize":
        projection = Contraction(("x", "lora_down"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN)
        return Declaration((projection, cast(F32)))
    return EXACT_BITS
