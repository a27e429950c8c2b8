"""The interpreter of declared programs against an evaluation in rational numbers that shares no rounding with it.

`Walk` below is a second reading of references/declarations.py: Fractions, one `nearest` of its own, IEEE sums one product at a
time, integer sums as integers. Datapaths with nodes are the matter of test_dot; here it is segments, splits, steps and joins.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest

from lowbit.conformance.case import Case
from lowbit.conformance.op import parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.references import dot
from lowbit.references.datapaths import DATAPATHS, Family
from lowbit.references.declarations import (
    Claim,
    Contraction,
    Cut,
    Declaration,
    Join,
    Order,
    Start,
    Step,
    StepKind,
    add,
    cast,
    mul,
)
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, F16, F32, INT8, Format
from lowbit.references.interpret import Environment, Factor, Interval, ProgramError, bound, emulate, ideal
from lowbit.references.rounding import Overflow, Rounding, encode

PROBLEMS = (
    "gemm_w4a16/zp/m2n8k96g32/bf16.bias",
    "gemm_w4a16/sym/m2n8k96g32/f16.biasafter",
    "gemm_w8a8_fp8/scaled/m2n8k96/bf16.bias",
    "gemm_w8a8_fp8/block/m2n8k256/bf16.biasafter",
    "gemm_w4a8_fp8/folded/m2n8k128g64/bf16.bias",
    "gemm_w4a8_fp8/exact/m2n8k128g64/f16.bias",
    "gemm_w4a8_int8/direct/m2n8k96g32/f16.bias",
    "gemm_w4a8_int8/viaf16/m2n8k96g96/bf16",
    "gemm_nvfp4/plain/m2n8k96r0/bf16.biasafter",
    "gemm_nvfp4/svdquant/m2n8k96r16/f16.lora.bias",
    "gemm_nvfp4/nunchaku/m2n8k96r16/bf16.lora.bias",
    "gemm_int4/f32/m2n8k128r16/f16.lora.bias",
    "gemm_int4/half/m2n8k128r16/bf16.lora.bias",
)


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def nearest(x: Fraction, fmt: Format, rounding: Rounding = Rounding.RNE) -> Fraction:
    """x rounded to the significand bits of a format, subnormals included: half to even by Python's own round of a Fraction."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < power(exponent)
    unit = power(max(exponent, fmt.min_exponent) - fmt.precision + 1)
    steps = Fraction(round(x / unit) if rounding is Rounding.RNE else int(x / unit))
    assert abs(steps * unit) <= fmt.max_finite, "drawn cases stay finite"
    return steps * unit


@dataclass(frozen=True, slots=True)
class Walk:
    """One element (m, n) of a program."""

    environment: Environment
    m: int
    n: int

    def factor(self, name: str, segment: int) -> Fraction:
        found = self.environment[name]
        assert isinstance(found, Factor)
        index = ({"m": (self.m,), "n": (self.n,), "": ()}[found.axis]) + ((segment,) if found.grouped else ())
        return Fraction(float(found.values[index] if index else found.values.reshape(-1)[0]))

    def steps(self, value: Fraction, steps: tuple[Step, ...], segment: int) -> tuple[Fraction, Fraction]:
        """(value, value before the rounding of a fused multiplication that nothing was added to yet)."""
        exact = value
        for step in steps:
            if step.kind is StepKind.CAST:
                value = exact = nearest(value, step.format, step.rounding)
            elif step.kind is StepKind.ADD:
                value = exact = nearest(exact + self.factor(step.operands[0], segment), step.format)
            else:
                scale = self.factor(step.operands[0], segment)
                for name in step.operands[1:]:
                    scale = nearest(scale * self.factor(name, segment), step.operand_format)
                exact = value * scale
                value = nearest(exact, step.format)
                assert step.join is not Join.EITHER
                if step.join is Join.SEPARATE:
                    exact = value
        return value, exact

    def sum(self, item: Contraction, start: Fraction, span: range) -> Fraction:
        a, w = (self.environment[name] for name in item.operands)
        assert isinstance(a, Operand)
        assert isinstance(w, Operand)
        left, right = dot.values(a)[self.m], dot.values(w)[self.n]
        total, path, period = start, item.datapath, len(item.k_order) or 1
        for place in span:
            k = place - place % period + (item.k_order[place % period] if item.k_order else 0)
            product = Fraction(float(left[k])) * Fraction(float(right[k]))
            if path.family is Family.INTEGER:
                total += product
            elif path.fused:
                total = nearest(total + product, path.output, path.output_rounding)
            else:
                total = nearest(total + nearest(product, path.output), path.output)
        return total

    def contraction(self, item: Contraction, start: Fraction) -> Fraction:
        a = self.environment[item.operands[0]]
        assert isinstance(a, Operand)
        k = a.codes.shape[1]
        ends = next((cut.ends for cut in item.cuts if self.m in range(*cut.rows) and self.n in range(*cut.columns)), (k,))
        if not item.segment and item.splits == len(ends) == 1:
            return self.sum(item, start, range(k))
        unit = item.segment or item.datapath.instruction_k
        length = -(-k // (unit * item.splits)) * unit
        if not item.cuts:
            ends = (*range(length, k, length), k)
        totals = []
        for first, last in itertools.pairwise((0, *ends)):
            total: Fraction | None = None
            for begin in range(first, last, item.segment or last - first):
                part = self.sum(item, Fraction(0), range(begin, min(last, begin + (item.segment or last - first))))
                value, exact = self.steps(part, item.steps, begin // item.segment if item.segment else 0)
                if total is None:
                    total = nearest(value, item.running, item.running_rounding) if item.segment else value
                else:
                    total = nearest(total + exact, item.running, item.running_rounding)
            assert total is not None
            totals.append(total)
        if item.start is Start.PREVIOUS:
            totals.insert(0, start)
        result = totals[0]
        for other in totals[1:]:
            result = nearest(result + other, item.reduction)
        return result

    def program(self, program: tuple[Contraction | Step, ...]) -> Fraction:
        value: Fraction | None = None
        pending: list[Step] = []
        for item in program:
            if isinstance(item, Step):
                pending.append(item)
                continue
            if pending:
                assert value is not None
                value, _ = self.steps(value, tuple(pending), 0)
                pending.clear()
            if value is None:
                value = self.contraction(item, Fraction(0))
            elif item.start is Start.PREVIOUS:
                value = self.contraction(item, value)
            else:
                value = nearest(value + self.contraction(item, Fraction(0)), item.reduction)
        assert value is not None
        return self.steps(value, tuple(pending), 0)[0]

    def real(self, program: tuple[Contraction | Step, ...]) -> Fraction:
        """The same over the reals."""
        value = Fraction(0)
        for item in program:
            if isinstance(item, Contraction):
                plain = Contraction(item.operands, DATAPATHS["imma_s32"], start=Start.PREVIOUS)
                if not item.steps:
                    value = self.sum(plain, value, range(self.length(item)))
                for begin in range(0, self.length(item), item.segment) if item.steps else ():
                    part = self.sum(plain, Fraction(0), range(begin, min(self.length(item), begin + item.segment)))
                    for step in item.steps:
                        for name in step.operands:
                            part *= self.factor(name, begin // item.segment)
                    value += part
            elif item.kind is StepKind.ADD:
                value += self.factor(item.operands[0], 0)
            elif item.kind is StepKind.MUL:
                for name in item.operands:
                    value *= self.factor(name, 0)
        return value

    def length(self, item: Contraction) -> int:
        a = self.environment[item.operands[0]]
        assert isinstance(a, Operand)
        return int(a.codes.shape[1])


def joined(program: tuple[Contraction | Step, ...], join: Join) -> tuple[Contraction | Step, ...]:
    """The program with each choice of the compiler made one way."""

    def chosen(step: Step) -> Step:
        return replace(step, join=join) if step.join is Join.EITHER else step

    return tuple(
        chosen(item) if isinstance(item, Step) else replace(item, steps=tuple(map(chosen, item.steps))) for item in program
    )


def drawn(text: str, pattern: str, path: str) -> tuple[tuple[Contraction | Step, ...], Environment]:
    """Normative program of a problem on a datapath, and its environment on drawn operands."""
    problem = parse_problem(text, ops())
    op = ops()[problem.op]
    assert op.program is not None
    assert op.environment is not None
    return op.program(problem, DATAPATHS[path]), op.environment(problem, draw_operands(op, Case(problem, pattern, 3)))


def agree(program: tuple[Contraction | Step, ...], environment: Environment) -> None:
    """Every element of the emulated program is the number that `Walk` finds, and the exact value is that over the reals."""
    found = emulate(Declaration(program), environment)
    assert found.lo is found.hi
    assert not found.nan.any()
    exact = ideal(Declaration(program), environment)
    for m, n in itertools.product(*map(range, found.lo.shape)):
        walk = Walk(environment, m, n)
        assert Fraction(float(found.lo[m, n])) == walk.program(program), (m, n)
        real = walk.real(program)
        size = sum(abs(x) for x in (real, Fraction(float(exact[m, n])))) + 1
        assert abs(Fraction(float(exact[m, n])) - real) <= size * power(-36), (m, n)


@pytest.mark.parametrize("text", PROBLEMS)
def test_every_normative_program_is_evaluated_as_written(text: str) -> None:
    """Both ways to join, on the datapath of the op's kind: rounded products and sums, groups, scales, bias, casts."""
    int8 = "int8" in text or "int4" in text
    for join, pattern in ((Join.SEPARATE, "normal"), (Join.FUSED, "shifted")):
        for path in ("imma_s32",) if int8 else ("ieee_f32", "ieee_f32_unfused"):
            program, environment = drawn(text, pattern, path)
            agree(joined(program, join), environment)


@pytest.mark.parametrize(
    ("splits", "segment", "running", "reduction", "rounding"),
    [
        (2, 0, F32, F32, Rounding.RNE),
        (3, 0, F32, BF16, Rounding.RNE),
        (1, 32, F32, F32, Rounding.RZ),
        (1, 20, F16, F32, Rounding.RNE),
        (2, 16, BF16, F16, Rounding.RNE),
        (5, 32, F32, F32, Rounding.RNE),
        (4, 96, F32, F32, Rounding.RNE),
    ],
)
def test_segments_and_splits_are_cut_and_added_as_declared(
    splits: int, segment: int, running: Format, reduction: Format, rounding: Rounding
) -> None:
    """Parts of K that do not divide it, a last split that is shorter or absent, narrow totals."""
    program, environment = drawn("gemm_w8a8_fp8/scaled/m2n8k96/bf16.bias", "normal", "ieee_f32")
    first, *rest = joined(program, Join.SEPARATE)
    assert isinstance(first, Contraction)
    cut = replace(first, splits=splits, segment=segment, running=running, reduction=reduction, running_rounding=rounding)
    agree((cut, *rest), environment)


QUADRANTS = (  # of 2 x 8, at multiples of 16 of 96
    Cut((0, 1), (0, 3), (32, 96)), Cut((0, 1), (3, 8), (32, 48, 64, 96)), Cut((1, 2), (0, 5), (96,)),
    Cut((1, 2), (5, 8), (80, 96)),
)


@pytest.mark.parametrize(("segment", "running", "reduction", "k_order"), [
    (0, F32, F32, ()), (0, F32, BF16, (3, 0, 2, 1)), (16, BF16, F16, ()), (8, F16, F32, (7, 6, 5, 4, 3, 2, 1, 0)),
])
def test_rectangles_are_cut_on_their_own(
    segment: int, running: Format, reduction: Format, k_order: tuple[int, ...]
) -> None:
    """DEC-6, DEC-7. A rectangle's cuts used for its neighbour, or one position off, are other numbers."""
    program, environment = drawn("gemm_w8a8_fp8/scaled/m2n8k96/bf16.bias", "normal", "ieee_bf16")
    first, *rest = joined(program, Join.SEPARATE)
    assert isinstance(first, Contraction)
    item = replace(first, cuts=QUADRANTS, segment=segment, running=running, reduction=reduction, k_order=k_order)
    agree((item, *rest), environment)
    sums = emulate(Declaration((item,)), environment).lo
    width = max(segment, 4)
    turned = tuple(replace(cut, ends=other.ends) for cut, other in zip(QUADRANTS, (*QUADRANTS[1:], QUADRANTS[0]), strict=True))
    early = tuple(replace(cut, ends=(*(end - width for end in cut.ends[:-1]), cut.ends[-1])) for cut in QUADRANTS)
    for wrong in (turned, early):
        assert (emulate(Declaration((replace(item, cuts=wrong),)), environment).lo != sums).any()
    interval = bound(Declaration((item,)), environment)
    assert ((interval.lo <= sums) & (sums <= interval.hi)).all()


def test_scales_of_rows_and_columns_stay_with_their_rectangle() -> None:
    """DEC-6 where segments have factors of either axis. With totals in unknown order the interval holds the bits of the known."""
    program, environment = drawn("gemm_w8a8_fp8/block/m3n8k384/bf16.bias", "normal", "ieee_bf16")
    first, *rest = joined(program, Join.SEPARATE)
    assert isinstance(first, Contraction)
    cuts = (Cut((0, 2), (0, 8), (128, 384)), Cut((2, 3), (0, 5), (384,)), Cut((2, 3), (5, 8), (256, 384)))
    item = replace(first, cuts=cuts, running=BF16)
    agree((item, *rest), environment)
    sums = emulate(Declaration((item,)), environment).lo
    open_ = bound(Declaration((replace(item, reduction_order=Order.UNKNOWN),)), environment)
    assert ((open_.lo <= sums) & (sums <= open_.hi)).all()
    assert (open_.lo < sums).any()


def test_a_cut_contraction_goes_on_from_the_value_before() -> None:
    """DEC-6 with one accumulator for two contractions: where K is not cut the second goes on in it, elsewhere parts are added."""
    program, environment = drawn("gemm_nvfp4/svdquant/m2n8k96r16/f16.lora.bias", "normal", "ieee_f32")
    cuts = (Cut((0, 2), (0, 4), (16,)), Cut((0, 2), (4, 8), (3, 9, 16)))
    items = joined(program, Join.SEPARATE)
    low_rank = next(item for item in items if isinstance(item, Contraction) and item.operands[0] == "lora_act")
    changed = tuple(replace(low_rank, start=Start.PREVIOUS, cuts=cuts) if item is low_rank else item for item in items)
    agree(changed, environment)


def test_cuts_by_hand() -> None:
    """DEC-6 in binary16, 11 bits: 2048 + 1 is a tie and stays 2048. One accumulator loses three ones, a part of its own keeps
    those that it has. With a reduction in binary16 ascending order loses them again, 1 + 1 + 1 + 2048 = 2051 would give 2052."""
    environment: Environment = {
        "a": Operand(encode(np.array([[2048.0, 1.0, 1.0, 1.0]]), F16), F16), "w": Operand(encode(np.ones((5, 4)), F16), F16),
    }
    ends = ((4,), (1, 4), (2, 4), (3, 4), (1, 2, 3, 4))
    cuts = tuple(Cut((0, 1), (n, n + 1), each) for n, each in enumerate(ends))
    item = main("ieee_f16", cuts=cuts)
    assert emulate(Declaration((item,)), environment).lo.tolist() == [[2048.0, 2051.0, 2050.0, 2049.0, 2051.0]]
    narrow = replace(item, reduction=F16)
    assert emulate(Declaration((narrow,)), environment).lo.tolist() == [[2048.0, 2052.0, 2050.0, 2048.0, 2048.0]]
    turned = replace(item, k_order=(1, 2, 3, 0), cuts=tuple(replace(cut, ends=(4,)) for cut in cuts))
    assert emulate(Declaration((turned,)), environment).lo.tolist() == [[2052.0] * 5]  # 3, then 2051


def test_a_sum_of_totals_in_unknown_order_has_no_bits() -> None:
    """DEC-4: of several segments or parts; of one alone nothing is left open."""
    environment = one([1.0, 2.0], [1.0, 1.0])
    for open_ in ({"segment": 1}, {"splits": 2}, {"cuts": (Cut((0, 1), (0, 1), (1, 2)),)}):
        item = main(reduction_order=Order.UNKNOWN, **open_)
        with pytest.raises(ProgramError, match="unknown order"):
            emulate(Declaration((item,)), environment)
        assert ends(bound(Declaration((item,)), environment))[:2] == (3.0, 3.0)
    assert ends(emulate(Declaration((main(reduction_order=Order.UNKNOWN),)), environment))[0] == 3.0


def test_second_contraction_starts_from_the_first_or_beside_it() -> None:
    """The low-rank term in the same accumulator, and added afterwards: different bits, each as declared."""
    program, environment = drawn("gemm_nvfp4/svdquant/m2n8k96r16/f16.lora.bias", "normal", "ieee_f32")
    results = []
    for start, splits in ((Start.PREVIOUS, 1), (Start.ZERO, 1), (Start.PREVIOUS, 2)):
        changed = tuple(
            replace(item, start=start, splits=splits)
            if isinstance(item, Contraction) and item.operands[0] == "lora_act"
            else item
            for item in joined(program, Join.SEPARATE)
        )
        agree(changed, environment)
        results.append(emulate(Declaration(changed[:-1]), environment).lo)
    assert (results[0] != results[1]).any()


# By hand -------------------------------------------------------------------------------------------------------------


def one(a: list[float], w: list[float], fmt: Format = F16, /, **factors: float) -> dict[str, Operand | Factor]:
    """Environment of one element."""
    found: dict[str, Operand | Factor] = {
        name: Operand(encode(np.array([row]), fmt, Rounding.RNE, Overflow.SPECIAL), fmt) for name, row in (("a", a), ("w", w))
    }
    return found | {name: Factor(np.array([value]), "") for name, value in factors.items()}


def main(path: str = "ieee_f32", **more: object) -> Contraction:
    return replace(Contraction(("a", "w"), DATAPATHS[path]), **more)  # type: ignore[arg-type]


def ends(found: Interval) -> tuple[float, float, bool, bool]:
    return float(found.lo[0, 0]), float(found.hi[0, 0]), bool(found.nan[0, 0]), bool(found.maybe_nan[0, 0])


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("a", "w", "steps", "factors", "want"),
    [
        ([3.0], [5.0], (cast(F16),), {}, 15.0),
        ([3.0], [5.0], (mul("s"), cast(F16)), {"s": -1.0}, -15.0),
        ([300.0], [300.0], (cast(F16),), {}, INF),  # 90,000 is past 65,520
        ([255.875], [256.0], (cast(F16),), {}, 65504.0),
        ([300.0], [-300.0], (cast(F16),), {}, -INF),
        ([300.0], [300.0], (mul("s"), cast(F16)), {"s": 0.5}, 44992.0),  # scaled in f32, before the cast
        ([300.0], [300.0], (cast(F16), mul("s"), cast(F16)), {"s": 0.5}, INF),  # after it
        ([300.0], [300.0], (cast(F16), mul("s"), cast(F16)), {"s": 0.0}, NAN),  # infinity times zero
        ([INF], [1.0], (cast(F16),), {}, INF),
        ([INF], [0.0], (cast(F16),), {}, NAN),
        ([INF, 1.0], [1.0, -INF], (cast(F16),), {}, NAN),
        ([0.0], [1.0], (mul("s"), cast(F16)), {"s": INF}, NAN),
        ([1.0], [1.0], (mul("s"), cast(F16)), {"s": NAN}, NAN),
        ([1.0], [1.0], (add("b"), cast(F16)), {"b": -INF}, -INF),
        ([INF], [1.0], (add("b"), cast(F16)), {"b": -INF}, NAN),
        ([1.0], [1.0], (mul("s"), cast(F16)), {"s": 2.0**-25}, 0.0),  # half of the smallest subnormal: to even
        ([1.0], [1.0], (mul("s"), cast(F16)), {"s": 3 * 2.0**-26}, 2.0**-24),
        ([], [], (add("b"), cast(F16)), {"b": 2.5}, 2.5),  # K = 0
    ],
)
def test_special_values_by_hand(
    a: list[float], w: list[float], steps: tuple[Step, ...], factors: dict[str, float], want: float
) -> None:
    """The emulated value, and a bound that is that value alone."""
    environment = one(a, w, **factors)
    for found in (emulate(Declaration((main(), *steps)), environment), bound(Declaration((main(), *steps)), environment)):
        if np.isnan(want):
            assert ends(found)[2:] == (True, False)
        else:
            assert ends(found) == (want, want, False, False)


def test_separate_fused_and_either_by_hand() -> None:
    """(1 + 2^-9)^2 - 1 in f16 steps: the square is 1 + 2^-8 + 2^-18; rounded to 11 bits it loses 2^-18, fused it keeps it."""
    x = 1 + 2.0**-9
    environment = one([1.0], [x], s=x, b=-1.0)
    got = {}
    for join in Join:
        program = (main(), cast(F16), mul("s", format=F16, join=join), add("b", format=F16), cast(F16))
        got[join] = ends(bound(Declaration(program), environment))
    assert got[Join.SEPARATE] == (2.0**-8, 2.0**-8, False, False)
    assert got[Join.FUSED] == (2.0**-8 + 2.0**-18, 2.0**-8 + 2.0**-18, False, False)
    assert got[Join.EITHER] == (got[Join.SEPARATE][0], got[Join.FUSED][0], False, False)


def test_negative_factor_turns_the_interval_round() -> None:
    """1 + 2^-24 + 2^-24 in any order is 1 or 1 + 2^-23; times -2 the larger one is the lower end."""
    environment = one([1.0, 2.0**-12, 2.0**-12], [1.0, 2.0**-12, 2.0**-12], s=-2.0)
    loose = main(order=Order.UNKNOWN)
    low, high, *_ = ends(bound(Declaration((loose, cast(F32))), environment))
    assert low <= 1.0 < 1 + 2.0**-23 <= high
    turned = ends(bound(Declaration((loose, mul("s"), cast(F32))), environment))
    assert turned == (-2 * high, -2 * low, False, False)
    ascending = ends(bound(Declaration((main(), cast(F32))), environment))
    assert ascending[0] <= 1.0 <= ascending[1]
    assert ends(emulate(Declaration((main(), cast(F32))), environment))[0] == 1.0


OVERFLOWING = one([240.0, 240.0, -240.0, -240.0], [250.0] * 4, s=0.0, t=INF, b=1.0)
"""60,000 + 60,000 - 60,000 - 60,000 in f16: 0, infinite of either sign or NaN, by the order of the additions."""


@pytest.mark.parametrize("order", Order)
def test_accumulator_that_may_overflow_admits_everything(order: Order) -> None:
    """In ascending order it stays at infinity; in any order all four happen, and what follows keeps them possible."""
    half = main("ieee_f16", order=order)
    assert ends(emulate(Declaration((main("ieee_f16"), cast(F32))), OVERFLOWING))[0] == INF
    assert ends(bound(Declaration((half, cast(F32))), OVERFLOWING)) == (-INF, INF, False, True)
    times_zero = ends(bound(Declaration((half, mul("s"), cast(F32))), OVERFLOWING))
    assert times_zero == (0.0, 0.0, False, True)
    assert ends(bound(Declaration((half, mul("t"), cast(F32))), OVERFLOWING)) == (-INF, INF, False, True)
    assert ends(bound(Declaration((half, add("t"), cast(F32))), OVERFLOWING)) == (INF, INF, False, True)
    again = replace(half, start=Start.PREVIOUS)
    assert ends(bound(Declaration((half, again, cast(F32))), OVERFLOWING)) == (-INF, INF, False, True)
    beside = replace(half, start=Start.ZERO)
    assert ends(bound(Declaration((half, beside, cast(F32))), OVERFLOWING)) == (-INF, INF, False, True)


def test_running_total_that_may_overflow_in_some_order_admits_everything() -> None:
    """Segments of one product, total in f16, order unknown: 60,000 twice may come first."""
    segments = main(order=Order.UNKNOWN, segment=1, running=F16, steps=(cast(F32),))
    found = ends(bound(Declaration((segments, cast(F32))), OVERFLOWING))
    assert found == (-INF, INF, False, True)
    small = one([2.0, 2.0, -2.0, -2.0], [3.0] * 4)
    assert ends(bound(Declaration((segments, cast(F32))), small)) == (0.0, 0.0, False, False)


def test_programs_without_a_value_are_refused_in_one_sentence() -> None:
    """What a backend may declare and nobody can evaluate."""
    environment = one([1.0], [1.0], s=1.0, b=1.0)
    unknown = Declaration((main(order=Order.UNKNOWN), cast(F16)), Claim.BIT_EXACT)
    with pytest.raises(ProgramError, match=r"the bits of a sum in unknown order on ieee_f32 are not determined"):
        emulate(unknown, environment)
    with pytest.raises(ProgramError, match="hopper_wgmma_fp8"):
        bound(Declaration((main("hopper_wgmma_fp8"), cast(F16))), environment)
    wide = (main("ieee_f64"), mul("s", join=Join.FUSED), add("b"), cast(F16))
    with pytest.raises(ProgramError, match="at most 29 bits"):
        bound(Declaration(wide), environment)
    integers = one([1.0], [1.0], INT8)
    twice = (main("imma_s32"), main("imma_s32", start=Start.PREVIOUS), cast(F16))
    with pytest.raises(ProgramError, match="an integer accumulator starts from zero"):
        bound(Declaration(twice), integers)
    with pytest.raises(ProgramError):
        bound(Declaration((main(splits=0, segment=1), cast(F16))), environment)
