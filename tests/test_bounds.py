"""Soundness of what is derived from a declaration: whatever the declared kernel may produce lies in its interval.

Every product op, every datapath that takes its operands, adversarial operands among them. Each claim is shown to be able to
fail: with the radius of the sums cut, emulated results leave the intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance.bounds import check_declaration, power, restrict, sample_of, to_expectation
from lowbit.conformance.case import Case, Operands, Problem, Stream, Tensor
from lowbit.conformance.op import Op, make_problem, parse_case, parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import EXACT_WIDTHS, draw_operands
from lowbit.conformance.simulator import Simulator, simulated_program
from lowbit.references import dot, interpret
from lowbit.references.datapaths import DATAPATHS, Datapath, Evidence, Family
from lowbit.references.declarations import Claim, Contraction, Declaration, Join, Order, Start, Step, cast, mul
from lowbit.references.dot import Enclosure, Operand
from lowbit.references.formats import BF16, F16, F32, F64, Format, decode
from lowbit.references.interpret import Environment, Factor, Interval, bound, emulate
from lowbit.references.rounding import Overflow, Rounding, encode

PROBLEMS = (
    "gemm_w4a16/zp/m2n8k96g32/bf16.bias",
    "gemm_w4a16/sym/m2n8k96g32/f16.biasafter",
    "gemm_w8a8_fp8/scaled/m2n8k96/bf16.bias",
    "gemm_w8a8_fp8/scaled/m2n8k96/f16.fnuz.biasafter",
    "gemm_w8a8_fp8/block/m2n8k256/bf16.biasafter",
    "gemm_w4a8_fp8/folded/m2n8k128g64/bf16.bias",
    "gemm_w4a8_fp8/exact/m2n8k128g64/f16.bias",
    "gemm_w4a8_int8/direct/m2n8k96g32/f16.bias",
    "gemm_nvfp4/svdquant/m2n8k96r16/f16.lora.bias",
    "gemm_nvfp4/nunchaku/m2n8k96r16/bf16.lora.bias",
    "gemm_int4/f32/m2n8k128r16/f16.lora.bias",
    "gemm_int4/half/m2n8k128r16/f16.lora.bias",
)
PATTERNS = ("maxima", "normal", "zeros", "lognormal", "cancel")  # dealt to the datapaths in turn
Program = tuple[Contraction | Step, ...]


def with_join(program: Program, join: Join) -> Program:
    """The program with each choice of the compiler made one way."""

    def chosen(step: Step) -> Step:
        return replace(step, join=join) if step.join is Join.EITHER else step

    return tuple(
        chosen(item) if isinstance(item, Step) else replace(item, steps=tuple(map(chosen, item.steps))) for item in program
    )


def in_any_order(program: Program) -> Program:
    """The program that promises no order of K."""
    return tuple(
        replace(item, order=Order.UNKNOWN, reduction_order=Order.UNKNOWN) if isinstance(item, Contraction) else item
        for item in program
    )


def on_path(op: Op, problem: Problem, path: Datapath) -> Program | None:
    """The op's program on a datapath, both joins left open; None where the datapath does not take the operands."""
    simulator = Simulator(path.name, path, {})
    if simulator.supports(problem) is not None:
        return None
    made = simulated_program(op, problem, path, conversion=simulator._conversion(problem))
    assert op.program is not None
    open_steps = iter(step for item in op.program(problem, path) for step in ((item,) if isinstance(item, Step) else item.steps))
    joins = {step.operands: step.join for step in open_steps}

    def opened(step: Step) -> Step:
        return replace(step, join=joins.get(step.operands, step.join))

    return tuple(opened(item) if isinstance(item, Step) else replace(item, steps=tuple(map(opened, item.steps))) for item in made)


def escapes(allowed: Interval, emulated: Interval) -> int:
    """Elements of an emulated result that an interval does not hold."""
    value = (allowed.lo <= emulated.lo) & (emulated.lo <= allowed.hi)
    held = np.where(allowed.nan, emulated.nan, np.where(emulated.nan, allowed.maybe_nan, value))
    return int((~held).sum())


def environment_of(op: Op, problem: Problem, pattern: str, seed: int = 1) -> Environment:
    assert op.environment is not None
    return op.environment(problem, draw_operands(op, Case(problem, pattern, seed)))


@pytest.mark.parametrize("text", PROBLEMS)
def test_emulated_results_lie_in_the_interval(text: str) -> None:
    """Each way to join lies in the interval of its own declaration, of the one that leaves it open, and of the one that promises
    no order; on every datapath, with special values, overflow, negative and zero scales."""
    problem = parse_problem(text, ops())
    op = ops()[problem.op]
    seen = specials = 0
    for number, path in enumerate(DATAPATHS.values()):
        program = on_path(op, problem, path)
        if program is None:
            continue
        for pattern in {"special", "extremes", PATTERNS[number % 5]} & set(op.patterns):
            environment = environment_of(op, problem, pattern)
            wider = [bound(Declaration(p), environment) for p in (program, in_any_order(program))]
            for join in (Join.SEPARATE, Join.FUSED) if any_open(program) else (Join.SEPARATE,):
                chosen = with_join(program, join)
                result = emulate(Declaration(chosen), environment)
                for which, allowed in enumerate((bound(Declaration(chosen), environment), *wider)):
                    assert escapes(allowed, result) == 0, (path, pattern, join.name, which)
                seen += 1
                specials += int(result.nan.sum() + np.isinf(result.lo).sum())
    assert seen >= 2 * 6
    assert specials > 0


def any_open(program: Program) -> bool:
    steps = [step for item in program for step in ((item,) if isinstance(item, Step) else item.steps)]
    return any(step.join is Join.EITHER for step in steps)


def test_problems_reach_every_family_of_datapath() -> None:
    found = {
        path.family
        for text in PROBLEMS
        for problem in [parse_problem(text, ops())]
        for path in DATAPATHS.values()
        if on_path(ops()[problem.op], problem, path) is not None
    }
    assert found == set(Family) - {Family.BLOCK_SCALED_FUSED}  # e8m0 scales: no op of this contract has them; see below


# Datapaths alone -----------------------------------------------------------------------------------------------------


def operand(values: npt.NDArray[np.float64], path: Datapath, fmt: Format) -> Operand:
    """Values [rows, K] as the datapath takes them, under block scales of 2^-6 to 2^5 with full significands where it has such."""
    codes = encode(values, fmt, Rounding.RNE, Overflow.SATFINITE)
    if path.scale_format is None:
        return Operand(codes, fmt)
    stream, shape = Stream("scales", codes.tobytes()), (values.shape[0], values.shape[1] // path.scale_group)
    scales = encode(np.ldexp(1.0 + stream.uniform(shape), stream.integers(-6, 5, shape)), path.scale_format)
    return Operand(codes, fmt, scales, path.scale_format, path.scale_group)


def adversaries(path: Datapath, k: int) -> Iterator[tuple[Operand, Operand]]:
    """Bell-shaped, all positive, one large first (all later terms are cut), spread exponents, cancelling pairs."""
    fmt = path.operands[0]
    base = min(float(fmt.max_finite) / 8, 8.0)
    for name in ("normal", "positive", "first", "spread", "cancel"):
        sides = []
        for side in "aw":
            stream = Stream(path.name, k, name, side)
            x = stream.normal((6, k)) * base / 4
            if name == "positive":
                x = np.abs(x)
            elif name == "first":
                x = np.abs(x) / 16
                x[:, 0] = base * 0.99
            elif name == "spread":
                x = np.ldexp(1.0 + stream.uniform((6, k)), stream.integers(-6, 3, (6, k)))
            elif name == "cancel":
                x[:, 1::2] = x[:, ::2][:, : k // 2] * (-1.0 if side == "a" else 1.0)
            sides.append(operand(x, path, fmt))
        yield sides[0], sides[1]


def lengths(path: Datapath) -> tuple[int, ...]:
    unit = max(path.scale_group, path.instruction_k)
    return (unit, 2 * unit, -(-160 // unit) * unit)


def shares(path: Datapath, derive: Callable[..., Enclosure]) -> float:
    """The largest share of a bound that an emulated result uses; above 1 it is outside."""
    largest = 0.0
    for k in lengths(path):
        for a, w in adversaries(path, k):
            result = decode(dot.emulate(a, w, path), path.output)
            allowed = derive(a, w, path)
            distance = np.abs(result - allowed.value)
            usable = np.isfinite(allowed.radius) & np.isfinite(result)
            assert usable.any()
            ratio = np.divide(distance, allowed.radius, out=np.where(distance > 0, np.inf, 0.0), where=allowed.radius > 0)
            largest = max(largest, float(ratio[usable].max(initial=0.0)))
    return largest


FLOATING = [path for path in DATAPATHS.values() if path.family is not Family.INTEGER]


@pytest.mark.parametrize("path", FLOATING, ids=str)
def test_bounds_hold_and_could_not_be_half_as_wide(path: Datapath) -> None:
    """Known order: some result uses half of the bound, so one of half the width would be caught. Unknown order:
    more than a sixty-fourth (it covers orders and widths that one emulation does not take). Binary64 is its own measure."""
    running, agnostic = shares(path, dot.bound), shares(path, dot.agnostic_bound)
    assert (0 if path.output is F64 else 0.49) < running <= 1
    assert 1 / 64 < agnostic <= 1


@pytest.mark.parametrize("path", FLOATING, ids=str)
def test_any_permutation_of_k_lies_in_the_interval_without_order(path: Datapath) -> None:
    """K permuted by whole blocks that share a scale; a program that promises no order admits each result."""
    for number, (a, w) in enumerate(adversaries(path, 160 if not path.scale_group else 192)):
        unit = path.scale_group or 1
        places = np.argsort(Stream(path.name, "permutation", number).uniform((a.codes.shape[1] // unit,)), kind="stable")
        index = (places[:, None] * unit + np.arange(unit)).reshape(-1)
        program = in_any_order((Contraction(("a", "w"), path), cast(F32)))
        allowed = bound(Declaration(program), {"a": a, "w": w})
        moved = {
            name: Operand(
                side.codes[:, index],
                side.format,
                None if side.scales is None else side.scales[:, places],
                side.scale_format,
                side.group,
            )
            for name, side in (("a", a), ("w", w))
        }
        result = emulate(Declaration((Contraction(("a", "w"), path), cast(F32))), moved)
        assert escapes(allowed, result) == 0


def test_permuted_segments_and_splits_lie_in_the_interval_without_order() -> None:
    """Group scales, narrow totals, two splits: segments of K added in another order."""
    for running, number in ((F32, 0), (F16, 1), (BF16, 2)):
        stream = Stream("segments", number)
        a, w = (operand(stream.normal((4, 160)), DATAPATHS["ieee_f32"], F16) for _ in "aw")
        scale = Factor(encode_values(stream.uniform((4, 5)) + 0.5), "n", grouped=True)
        item = Contraction(("a", "w"), DATAPATHS["ieee_f32"], segment=32, steps=(mul("s"),), running=running)
        for splits in (1, 2, 3):
            declared = replace(item, splits=splits, order=Order.UNKNOWN, reduction_order=Order.UNKNOWN)
            allowed = bound(Declaration((declared, cast(F32))), {"a": a, "w": w, "s": scale})
            for turn in range(1, 5):
                places = np.roll(np.arange(5), turn)
                index = (places[:, None] * 32 + np.arange(32)).reshape(-1)
                moved: dict[str, Operand | Factor] = {
                    "a": Operand(a.codes[:, index], F16),
                    "w": Operand(w.codes[:, index], F16),
                    "s": Factor(scale.values[:, places], "n", grouped=True),
                }
                result = emulate(Declaration((replace(item, splits=splits), cast(F32))), moved)
                assert escapes(allowed, result) == 0, (running, splits, turn)


def encode_values(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return decode(encode(x, F16), F16)


@pytest.mark.parametrize(("name", "divisor"), [("bound", 2), ("agnostic_bound", 64)])
def test_a_planted_unsound_bound_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, divisor: int) -> None:
    """The radius of the sums divided: emulated programs leave the interval (undivided they do not: see above)."""
    right = getattr(dot, name)

    def planted(*arguments: Any) -> Enclosure:
        found: Enclosure = right(*arguments)
        return Enclosure(found.value, found.radius / divisor)

    monkeypatch.setattr(dot, name, planted)
    escaped = dict.fromkeys((path.family for path in FLOATING), 0)
    for path in FLOATING:
        for k in lengths(path)[1:] if path.output is F32 and path.evidence > Evidence.HARDWARE_CHECKED else ():
            for a, w in adversaries(path, k):
                program: Program = (Contraction(("a", "w"), path), cast(F64))  # a cast to f32 could round a result back in
                declared = in_any_order(program) if name == "agnostic_bound" else program
                allowed = bound(Declaration(declared), {"a": a, "w": w})
                escaped[path.family] += escapes(allowed, emulate(Declaration(program), {"a": a, "w": w}))
    assert all(escaped.values()), escaped


def _unswapped(value: Interval, factor: npt.NDArray[np.float64], exact: bool) -> Interval:
    """A multiplication of intervals that forgets that a negative factor exchanges the ends."""
    del exact
    return Interval(value.lo * factor, value.hi * factor, value.nan, value.maybe_nan)


@pytest.mark.parametrize(
    ("name", "spoiled", "text", "path", "pattern"),
    [
        ("_hull", lambda a, b: a, "gemm_w4a8_int8/direct/m2n8k96g32/f16.bias", "imma_s32", "normal"),
        ("_multiply", _unswapped, "gemm_w8a8_fp8/scaled/m2n8k96/bf16", "hopper_wgmma_fp8", "extremes"),
        ("_unbounded", lambda value, where: value, "gemm_w8a8_fp8/scaled/m2n8k96/bf16.bias", "hopper_mma_fp8_f16", "maxima"),
    ],
)
@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_unsound_step_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoiled: Callable[..., Interval],
    text: str,
    path: str,
    pattern: str,
    planted: bool,
) -> None:
    """The walk of the interval spoiled in one place at a time: a choice left out, ends not exchanged, overflow forgotten."""
    problem = parse_problem(text, ops())
    op = ops()[problem.op]
    program = on_path(op, problem, DATAPATHS[path])
    assert program is not None
    program = (*program[:-1], cast(F32))  # the last cast hides a bit of f32
    escaped = 0
    for seed in range(1, 9):
        environment = environment_of(op, problem, pattern, seed)
        results = [emulate(Declaration(with_join(program, join)), environment) for join in (Join.SEPARATE, Join.FUSED)]
        with monkeypatch.context() as patch:
            if planted:
                patch.setattr(interpret, name, spoiled)
            allowed = bound(Declaration(program), environment)
        escaped += sum(escapes(allowed, result) for result in results)
    assert (escaped > 0) == planted


@pytest.mark.parametrize("planted", [True, False])
def test_accumulator_carried_into_a_second_contraction_keeps_its_error(monkeypatch: pytest.MonkeyPatch, planted: bool) -> None:
    """A sum of 14 bits, then an exact one from where it ended: with the first error forgotten, results leave the interval."""
    path = DATAPATHS["hopper_wgmma_fp8"]
    program = (Contraction(("a", "w"), path), Contraction(("x", "y"), DATAPATHS["ieee_f32"], start=Start.PREVIOUS), cast(F32))
    if planted:
        monkeypatch.setattr(interpret, "_prefix", lambda value: Enclosure(value.lo / 2 + value.hi / 2, np.zeros_like(value.lo)))
    escaped = 0
    for a, w in adversaries(path, 160):
        small = Operand(encode(np.full((6, 4), 2.0**-6), F32), F32)
        environment = {"a": a, "w": w, "x": small, "y": small}
        escaped += escapes(bound(Declaration(program), environment), emulate(Declaration(program), environment))
    assert (escaped > 0) == planted


# Exact lanes ---------------------------------------------------------------------------------------------------------


def accumulator_bits(path: Datapath) -> int:
    """Significand bits that every sum keeps: what the datapath's record says, read here and not taken from the judge."""
    return path.output_bits if not path.fraction_bits else min(path.output_bits, path.fraction_bits + 1)


@pytest.mark.parametrize("text", PROBLEMS)
def test_exact_lanes_leave_one_value_for_every_wide_enough_accumulator(text: str) -> None:
    """In known and in unknown order the interval of an exact lane is one value on every datapath of at least its width, the same
    on all of them, and the emulated one; below the width some lane of the op has room, so the width is what makes it exact."""
    problem = parse_problem(text, ops())
    op = ops()[problem.op]
    tested = 0
    for pattern, width in EXACT_WIDTHS.items():
        environment = environment_of(op, problem, pattern)
        values = []
        for path in DATAPATHS.values():
            program = on_path(op, problem, path)
            narrowest = min(
                [item.running.precision for item in program or () if isinstance(item, Contraction) and item.segment]
                + [step.format.precision for item in program or () if isinstance(item, Contraction) for step in item.steps],
                default=53,
            )
            if program is None or min(accumulator_bits(path), narrowest) < width:
                continue
            for declared in (program, in_any_order(program)):
                allowed = bound(Declaration(declared[:-1]), environment)
                assert not (allowed.nan | allowed.maybe_nan).any()
                assert (allowed.lo == allowed.hi).all(), (path, pattern, declared is program)
                values.append(allowed.lo)
            tested += 1
            assert (emulate(Declaration(with_join(program, Join.SEPARATE)[:-1]), environment).lo == values[-1]).all()
        assert all((value == values[0]).all() for value in values)
        if values:
            assert np.count_nonzero(values[0]) > values[0].size // 4
    assert tested >= 3


def cleared(side: Operand) -> Operand:
    """The operand with one bit of significand left to every value."""
    bits = max(0, side.format.mantissa_bits - 1)
    return replace(side, codes=(side.codes >> bits) << bits)


def turned(side: Operand, length: int) -> Operand:
    """The first `length` of K, the last block of them first."""
    unit = side.group or 1
    scales = None if side.scales is None else np.roll(side.scales[:, : length // unit], 1, axis=1)
    return replace(side, codes=np.roll(side.codes[:, :length], unit, axis=1), scales=scales)


def test_exactness_by_width_is_the_sum_in_any_order() -> None:
    """Where `exact_by_width` says so, the emulated sum of a turned K is the exact one; on every datapath it says so somewhere."""
    for path in FLOATING:
        said = 0
        for a, w in adversaries(path, 160 if not path.scale_group else 192):
            for sides in ((a, w), (cleared(a), cleared(w))):
                for length in (path.scale_group or 4, 32 if not path.scale_group else 64):
                    left, right = (turned(side, length) for side in sides)
                    exact = interpret.exact_by_width(left, right, path)
                    said += int(exact.sum())
                    if exact.any():
                        got = decode(dot.emulate(left, right, path), path.output)
                        assert (got == dot.values(left) @ dot.values(right).T)[exact].all(), path
        assert said > 0, path


# What is made of an interval -----------------------------------------------------------------------------------------


def test_expectation_of_an_interval_by_hand() -> None:
    """Ends become keys, NaN masks become flags: one element of each kind, and what each admits."""
    lo = np.array([[1.0, -1.0, 0.0, 0.0, -np.inf]])
    hi = np.array([[1.0, 1.0, 0.0, 0.0, np.inf]])
    nan = np.array([[False, False, False, True, False]])
    maybe = np.array([[False, True, False, False, True]])
    expected = to_expectation(Interval(lo, hi, nan, maybe), F16)
    rows = {  # code -> which elements admit it
        0x3C00: [True, True, False, False, True],
        0x3C01: [False, False, False, False, True],
        0xBC00: [False, True, False, False, True],
        0x0000: [False, True, True, False, True],
        0x8000: [False, True, True, False, True],
        0x7C00: [False, False, False, False, True],
        0x7E00: [False, True, False, True, True],
        0xFE01: [False, True, False, True, True],
    }
    for code, want in rows.items():
        assert expected.admits(np.full((1, 5), code, np.uint16))[0].tolist() == want, hex(code)


@pytest.mark.parametrize(("m", "n", "k"), [(1000, 1008, 4096), (129, 8200, 1024), (64, 16384, 128), (65, 72, 40000)])
def test_sample_of_a_large_case_hits_every_tile_and_corner(m: int, n: int, k: int) -> None:
    """Rows and columns: both ends of each 64 x 64 tile and a seeded one inside; small cases have no sample."""
    op = ops()["gemm_w8a8_fp8"]
    case = Case(make_problem(op, "scaled", {"m": m, "n": n, "k": k}), "normal", 5)
    sample = sample_of(case)
    if m * n * k <= 1 << 27:
        assert sample is None
        return
    assert sample is not None
    for picked, size in ((sample.rows, m), (sample.columns, n)):
        assert (np.diff(picked) > 0).all()
        assert picked.max() < size
        for start in range(0, size, 64):
            inside = picked[(picked >= start) & (picked < start + 64)].tolist()
            assert {start, min(start + 63, size - 1)} <= set(inside)
            assert len(inside) <= 3
    assert f"of {m} x {n}" in sample.statement()
    assert sample_of(replace(case, seed=6)).rows.tolist() != sample.rows.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", [text for text in PROBLEMS if "block" not in text] + ["gemm_w8a8_fp8/block/m2n264k256/bf16.bias"]
)
def test_restricted_problem_has_the_rows_and_columns_of_the_whole(text: str) -> None:
    """The bound of a part is the part of the bound."""
    case = parse_case(f"{text}/normal/s2", ops())
    op = ops()[case.problem.op]
    assert op.environment is not None
    operands = draw_operands(op, case)
    n = case.problem.dim("n")
    rows, columns = np.array([1, 0]), np.array([n - 1, 1, 3])
    problem, part = restrict(op, case.problem, operands, rows, columns)
    path = next(path for path in DATAPATHS.values() if on_path(op, case.problem, path) is not None)
    program = on_path(op, case.problem, path)
    assert program is not None
    whole = bound(Declaration(program), op.environment(case.problem, operands))
    some = bound(Declaration(program), op.environment(problem, part))
    assert (whole.lo[np.ix_(rows, columns)] == some.lo).all()
    assert (whole.hi[np.ix_(rows, columns)] == some.hi).all()


def _with_scales(operands: Operands, code: int) -> Operands:
    """The operands with one binary32 code for each token and channel scale."""
    scales = {name: np.full_like(operands[name].codes, code) for name in ("token_scale", "channel_scale")}
    return Operands({
        name: Tensor(scales[name], tensor.format) if name in scales else tensor for name, tensor in operands.items()
    })


def test_power_sees_faults_and_says_where_it_would_not() -> None:
    """On operands of an exact lane every fault shows; under 14 bits in no order and K of 4,096 an all-zero output would pass."""
    case = parse_case("gemm_w8a8_fp8/scaled/m3n8k4096/bf16.bias/exactw14/s1", ops())
    op = ops()[case.problem.op]
    operands = draw_operands(op, case)
    assert op.program is not None
    good = Declaration(op.program(case.problem, DATAPATHS["ieee_f32"]))
    shown = power(op, case, operands, good, op.expect(case, operands, good)["d"])
    assert shown == {
        name: True for name in ("zero_output", "k_block_dropped", "weight_step", "outer_scales_cut", "bias_dropped")
    }
    narrow = _with_scales(operands, 0x3FC00000)  # 1.5 is a bf16 value: rounding it changes nothing
    assert "outer_scales_cut" not in power(op, case, narrow, good, op.expect(case, narrow, good)["d"])
    odd = _with_scales(operands, 0x3FC07FFF)
    assert power(op, case, odd, good, op.expect(case, odd, good)["d"])["outer_scales_cut"] is True
    loose_case = replace(case, pattern="normal")
    operands = draw_operands(op, loose_case)
    loose = Declaration(in_any_order(op.program(case.problem, DATAPATHS["hopper_wgmma_fp8"])))
    blind = power(op, loose_case, operands, loose, op.expect(loose_case, operands, loose)["d"])
    assert blind["zero_output"] is False
    assert blind["outer_scales_cut"] is False
    assert check_declaration(op, case.problem, good) == ("", "as the contract")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: (), "the program is empty"),
        (lambda p: p[1:], "the contract dot(a,w)"),
        (lambda p: (*p[:-1], cast(F16)), "must end in a cast to bf16"),
        (lambda p: (replace(p[0], segment=-1), *p[1:]), "make no sense"),
        (lambda p: (replace(p[0], splits=0), *p[1:]), "make no sense"),
        (lambda p: (p[0], p[2], *p[3:]), "the contract dot(a,w) *channel_scale *token_scale"),
        (lambda p: (replace(p[0], steps=(cast(F32),)), *p[1:]), "give `segment`"),
    ],
)
def test_declarations_of_something_else_are_refused(change: Callable[[Any], Program], sentence: str) -> None:
    problem = parse_problem("gemm_w8a8_fp8/scaled/m2n8k96/bf16", ops())
    op = ops()[problem.op]
    assert op.program is not None
    wrong, _ = check_declaration(op, problem, Declaration(change(op.program(problem, DATAPATHS["ieee_f32"]))))
    assert sentence in wrong


def test_bit_exact_claim_needs_an_order() -> None:
    problem = parse_problem("gemm_w8a8_fp8/scaled/m2n8k96/bf16", ops())
    op = ops()[problem.op]
    assert op.program is not None
    program = op.program(problem, DATAPATHS["ieee_f32"])
    assert check_declaration(op, problem, Declaration(program, Claim.BIT_EXACT))[0] == ""
    assert "known order of K" in check_declaration(op, problem, Declaration(in_any_order(program), Claim.BIT_EXACT))[0]
