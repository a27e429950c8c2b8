"""`sim:blackwell_nvfp4`, the arithmetic of an NVFP4 kernel whose low-rank product goes into the accumulator of the main one.

Decides: that the simulator declares that accumulator, that its bits are those of a second derivation in integers (below, from the
published model of tcgen05.mma: MMA-Sim tables, arXiv 2511.10909), and that the suite admits them, at the depths K and R of seed
004's production shapes. Refuses: any tolerance; elements are equal or they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from lowbit.conformance.bounds import check_declaration, gemm_expect
from lowbit.conformance.case import Operands, Problem, Tensor
from lowbit.conformance.op import parse_case, parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.simulator import backend
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Declaration, Start, Step, StepKind
from lowbit.references.formats import Codes
from lowbit.references.interpret import emulate

OP = ops()["gemm_nvfp4"]
SIMULATOR = backend("blackwell_nvfp4")

PRODUCTION = ((4352, 3072, 3840, 128), (4352, 15360, 3840, 128), (4352, 3840, 15360, 128), (4352, 3072, 10240, 32))
"""M, N, K and R of seed 004's production shapes. An element depends on K and R alone; M and N are cut to 5 and 24 here."""


def bits_of(problem: Problem, operands: Operands) -> Codes:
    """Codes of D as the declared program gives them."""
    assert OP.environment is not None
    values = emulate(SIMULATOR.declare(problem, "default"), OP.environment(problem, operands))
    fmt = {"f16": np.float16, "bf16": None}[problem.option("out")]
    assert not values.nan.any()
    if fmt is not None:
        return values.lo.astype(fmt).view(np.uint16)
    return (values.lo.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# What is declared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["f16", "bf16"])
@pytest.mark.parametrize("variant", ["svdquant", "nunchaku"])
def test_the_low_rank_product_starts_from_the_accumulator(variant: str, out: str) -> None:
    problem = parse_problem(f"gemm_nvfp4/{variant}/m4n16k64r32/{out}.lora.bias", ops())
    declared = SIMULATOR.declare(problem, "default")
    main, low_rank = (item for item in declared.program if isinstance(item, Contraction))
    assert (main.datapath, main.start) == (DATAPATHS["blackwell_nvfp4"], Start.ZERO)
    assert (low_rank.datapath, low_rank.start) == (DATAPATHS[f"blackwell_{out}"], Start.PREVIOUS)
    assert check_declaration(OP, problem, declared) == ("", "as the contract")
    casts = [item for item in declared.program if isinstance(item, Step) and item.kind is StepKind.CAST]
    assert len(casts) == {"svdquant": 1, "nunchaku": 2}[variant]


def test_another_datapath_keeps_its_own_low_rank_sum() -> None:
    problem = parse_problem("gemm_nvfp4/svdquant/m4n16k64r32/f16.lora.bias", ops())
    declared = backend("hopper_bf16").declare(problem, "default")
    _, low_rank = (item for item in declared.program if isinstance(item, Contraction))
    assert (low_rank.datapath, low_rank.start) == (DATAPATHS["ieee_f32"], Start.ZERO)


def one_element(a_scale: int, act: float, bias: float) -> tuple[Problem, Operands]:
    """svdquant with A = W = 1 at one k, under block scales `a_scale` x 448, and one low-rank term act x 1."""
    problem = parse_problem("gemm_nvfp4/svdquant/m1n8k32r16/bf16.lora.bias", ops())
    one, ones = np.zeros((8, 32), np.uint8), np.zeros((8, 16), np.uint16)
    one[:, 0], ones[:, 0] = 0x2, 0x3F80
    acts = np.zeros((1, 16), np.float32)
    acts[0, 0] = act
    codes: dict[str, Codes] = {
        "a": one[:1], "a_scale": np.full((1, 2), a_scale, np.uint8), "w": one, "w_scale": np.full((8, 2), 0x7E, np.uint8),
        "alpha": np.array([0x42000000], np.uint32),  # 32
        "lora_act": acts.view(np.uint32), "lora_up": ones, "channel_scale": np.full(8, 0x3F80, np.uint16),
        "bias": np.full(8, np.float32(bias).view(np.uint32) >> 16, np.uint16),
    }
    drawn = draw_operands(OP, parse_case(f"{problem}/zeros/s1", ops()))
    return problem, Operands({name: Tensor(codes[name].astype(drawn[name].codes.dtype), drawn[name].format) for name in codes})


@pytest.mark.parametrize(("act", "d"), [(0.1875, 0.0), (0.25, 0.25), (0.4375, 0.25), (-0.0625, -0.25)])
def test_the_low_rank_product_is_cut_where_the_accumulator_ends(act: float, d: float) -> None:
    """448 x 256 x 32 = 3.5 x 2^20 = 3670016 lies in [2^21, 2^22): the accumulator ends at 2^-2 and is cut toward zero. The bias
    takes 3670016 away again and shows the rest. A sum of its own, added to nearest, would have shown 0.25, 0.25, 0.5 and 0."""
    problem, operands = one_element(a_scale=0x78, act=act, bias=-3670016.0)
    expected = np.full((1, 8), np.float32(d).view(np.uint32) >> 16, np.uint16)
    assert np.array_equal(bits_of(problem, operands) & 0x7FFF if d == 0 else bits_of(problem, operands), expected)


# A second derivation -------------------------------------------------------------------------------------------------


def log2(x: Fraction) -> int:
    """floor(log2 |x|)."""
    guess = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return guess if abs(x) >= Fraction(2) ** guess else guess - 1


def nearest(x: Fraction, bits: int, lowest: int) -> Fraction:
    """x to nearest even with `bits` significant bits, subnormal below 2^lowest. Python's round() of a Fraction is to even."""
    unit = Fraction(2) ** (max(log2(x), lowest) - bits + 1) if x else Fraction(1)
    return round(x / unit) * unit


def toward_zero(x: Fraction, unit: Fraction) -> Fraction:
    return int(x / unit) * unit


def accumulate(terms: Sequence[tuple[Fraction, int]], c: Fraction, fraction_bits: int) -> Fraction:
    """(value, exponent) of live terms, and c: aligned to the largest exponent E, cut below 2^(E - F), added, cut to 24 bits."""
    parts = [*terms, (c, max(log2(c), -126))] if c else list(terms)
    if not parts:
        return Fraction(0)
    unit = Fraction(2) ** (max(exponent for _, exponent in parts) - fraction_bits)
    total = sum((toward_zero(value, unit) for value, _ in parts), Fraction(0))
    return toward_zero(total, Fraction(2) ** (max(log2(total), -126) - 23)) if total else total


def e2m1_halves(code: int) -> int:
    magnitude = (0, 1, 2, 3, 4, 6, 8, 12)[code & 7]
    return -magnitude if code & 8 else magnitude


def ue4m3(code: int) -> tuple[Fraction, int]:
    """(value, exponent that aligns it) of a scale."""
    exponent, fraction = code >> 3, code & 7
    power = max(exponent, 1) - 7
    return Fraction(fraction + (8 if exponent else 0), 8) * Fraction(2) ** power, power


def main_product(a: Codes, a_scale: Codes, w: Codes, w_scale: Codes) -> Fraction:
    """One element of the main product: 64 of K per instruction, four sums of 16 under their scales, 35 fraction bits."""
    c = Fraction(0)
    for k in range(0, a.size, 64):
        terms = []
        for j in range(k, min(k + 64, a.size), 16):
            products = [e2m1_halves(int(x)) * e2m1_halves(int(y)) for x, y in zip(a[j : j + 16], w[j : j + 16], strict=True)]
            (left, e), (right, f) = ue4m3(int(a_scale[j // 16])), ue4m3(int(w_scale[j // 16]))
            if any(products) and left and right:
                terms.append((Fraction(sum(products), 4) * left * right, e + f))
        c = accumulate(terms, c, 35)
    return c


def low_rank_product(act: Sequence[Fraction], up: Sequence[Fraction], c: Fraction, lowest: int) -> Fraction:
    """c + one element of the low-rank product: 16 of R per instruction, 25 fraction bits, products not normalised."""
    for r in range(0, len(act), 16):
        pairs = [(x, y) for x, y in zip(act[r : r + 16], up[r : r + 16], strict=True) if x and y]
        c = accumulate([(x * y, max(log2(x), lowest) + max(log2(y), lowest)) for x, y in pairs], c, 25)
    return c


def element(operands: Operands, variant: str, out: str, m: int, n: int) -> Fraction:
    """One element of D with low-rank term and bias, before the last cast: a cast to 16 bits would hide most differences."""
    bits, lowest = {"f16": (11, -14), "bf16": (8, -126)}[out]

    def half(name: str, *index: int) -> Fraction:
        code = operands[name].codes[index]
        return Fraction(float(code.view(np.float16) if out == "f16" else (code.astype(np.uint32) << 16).view(np.float32)))

    def narrow(x: Fraction) -> Fraction:
        return nearest(x, bits, lowest)

    ranks = range(operands["lora_up"].codes.shape[1])
    act = [narrow(Fraction(float(x))) for x in operands["lora_act"].codes[m].view(np.float32)]
    up = [half("lora_up", n, r) for r in ranks]
    total = main_product(*(operands[name].codes[row] for name, row in (("a", m), ("a_scale", m), ("w", n), ("w_scale", n))))
    total = nearest(total * Fraction(float(operands["alpha"].codes.view(np.float32).ravel()[0])), 24, -126)
    if variant == "svdquant":
        total = low_rank_product(act, up, total, lowest)
        total = nearest(total * half("channel_scale", n), 24, -126)
        return nearest(total + half("bias", n), 24, -126)
    total = narrow(narrow(total) * half("channel_scale", n) + half("bias", n))
    return low_rank_product(act, up, total, lowest)


@pytest.mark.parametrize("shape", PRODUCTION, ids=lambda shape: "m{}n{}k{}r{}".format(*shape))
@pytest.mark.parametrize(("variant", "out", "pattern"), [
    ("svdquant", "bf16", "normal"), ("svdquant", "f16", "lognormal"), ("nunchaku", "bf16", "lognormal"),
    ("nunchaku", "f16", "normal"),
])
def test_bits_at_production_depth_are_those_of_the_second_derivation(
    shape: tuple[int, int, int, int], variant: str, out: str, pattern: str
) -> None:
    _, _, k, r = shape
    case = parse_case(f"gemm_nvfp4/{variant}/m5n24k{k}r{r}/{out}.lora.bias/{pattern}/s4", ops())
    operands = draw_operands(OP, case)
    declared: Declaration = SIMULATOR.declare(case.problem, "default")
    assert gemm_expect(OP, case, operands, declared)["d"].admits(bits_of(case.problem, operands)).all()
    assert OP.environment is not None
    before_cast = emulate(replace(declared, program=declared.program[:-1]), OP.environment(case.problem, operands)).lo
    for m, n in ((0, 0), (1, 23), (2, 11), (4, 7)):
        assert Fraction(float(before_cast[m, n])) == element(operands, variant, out, m, n), (m, n)
