"""Exact lanes: what their operands look like, that no accumulator of their width can lose a bit, and that a short scale shows.

Expected values come from integers and Fractions: significands from the bits of a code, the lowest bit of a product from its
denominator, a rounding from a division of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance.backend import TensorView
from lowbit.conformance.case import Case, Operands, Tensor
from lowbit.conformance.op import Family, Role, parse_case, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import EXACT_WIDTHS, draw_operands
from lowbit.conformance.selection import case_list
from lowbit.kernels.cpu import backend
from lowbit.references import dot
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Declaration, Order, Step, StepKind
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, F16, F32, Codes, Format, container, decode
from lowbit.references.interpret import Factor

CPU = backend()
LANES = ("exact", "onehot", "scale")
SCALED = ("gemm_w8a8_fp8", "gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped", "gemm_w4a8_int8", "gemm_nvfp4", "gemm_int4")
"""Ops with scales after the sum; gemm_w4a16 has none."""
OUTER = (Family.OUTER_SCALE, Family.GLOBAL_SCALE)
FRACTION_BITS = {"f32": 23, "f16": 10, "bf16": 7}
BIAS = {"f32": 127, "f16": 15, "bf16": 127}


@cache
def cases(op: str) -> tuple[Case, ...]:
    """The cases of the exact lanes that have rows, the small ones."""
    listed = (item.case for item in case_list(ops()[op]) if item.lane in LANES and item.case.problem.dim("m"))
    return tuple(case for case in listed if products(case) < 2e8)


def products(case: Case) -> int:
    """Products of a case, over all experts."""
    dims = dict(case.problem.dims)
    return dims["m"] * dims["n"] * dims["k"] * dims.get("e", 1)


@cache
def operands_of(case: Case) -> Operands:
    return draw_operands(ops()[case.problem.op], case)


def outer_scales(case: Case) -> Iterator[tuple[Family, Tensor]]:
    for spec in tensors_of(ops()[case.problem.op], case.problem):
        if spec.family in OUTER:
            yield spec.family, operands_of(case)[spec.name]


def exponents(codes: npt.NDArray[np.int64], fmt: Format) -> set[int]:
    """Exponents of normal float codes, from their bits."""
    bits = FRACTION_BITS[fmt.name]
    field = (codes >> bits) & ((1 << (fmt.bits - 1 - bits)) - 1)
    return set((field - BIAS[fmt.name]).reshape(-1).tolist())


# What is drawn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", SCALED)
def test_outer_scales_need_every_bit_of_their_format(op: str) -> None:
    """The last bit of each significand is 1, both signs occur, and magnitudes lie in [2^-2, 2^1). Two are short by the contract:
    those of exactw8 and an alpha before a low-rank term; of these all but the two leading fraction bits are 0."""
    signs, short, whole = set(), 0, 0
    for case in cases(op):
        for family, scales in outer_scales(case):
            name, codes = scales.format.name, scales.codes.astype(np.int64).reshape(-1)
            bits = FRACTION_BITS[name]
            inner = family is Family.GLOBAL_SCALE and dict(case.problem.options).get("lora") == "lora"
            if case.pattern == "exactw8" or (inner and case.pattern in EXACT_WIDTHS):
                assert not (codes & ((1 << (bits - 2)) - 1)).any(), case
                short += 1
                continue
            assert (codes & 1).all(), case
            assert exponents(codes, scales.format) <= {-2, -1, 0}, case
            signs |= set((codes >> (scales.format.bits - 1)).tolist())
            whole += 1
    assert signs == {0, 1}
    assert whole > 2 * short > 0


@pytest.mark.parametrize(("op", "bits"), [
    ("gemm_w4a16", None), ("gemm_w4a8_int8", None), ("gemm_int4", None), ("gemm_w8a8_fp8", 11),
])
def test_probed_block_scales_do_not_fit_a_narrower_format(op: str, bits: int | None) -> None:
    """16-bit scales have their last bit set. The two binary32 scales of gemm_w8a8_fp8 have twelve significand bits each, so that
    bf16 (eight) holds none of them and their product has 24."""
    seen = 0
    for case in cases(op):
        if case.pattern == "scaleprobe":
            for spec in tensors_of(ops()[op], case.problem):
                if spec.family is Family.BLOCK_SCALE and not (spec.name == "a_scale" and bits is None):
                    codes, fraction = operands_of(case)[spec.name].codes.astype(np.int64), FRACTION_BITS[spec.format.name]
                    low = fraction - (bits or fraction)
                    assert ((codes >> low) & 1).all(), case
                    assert not (codes & ((1 << low) - 1)).any(), case
                    assert exponents(codes, spec.format) == {-3}, case
                    seen += 1
    assert seen


# ADM-3 ---------------------------------------------------------------------------------------------------------------


def lowest_bit(value: Fraction) -> Fraction:
    """The weight of the lowest bit of a dyadic number other than zero."""
    whole = value.numerator & -value.numerator
    return Fraction(whole, value.denominator)


def grouped(side: str, values: npt.NDArray[np.float64], environment: Any) -> npt.NDArray[np.float64]:
    """Operand values with the scales that the declared steps multiply into the sums of groups."""
    for factor in environment.values():
        if isinstance(factor, Factor) and factor.grouped and factor.axis == side:
            values = values * np.repeat(factor.values, values.shape[1] // factor.values.shape[1], axis=1)
    return values


@pytest.mark.parametrize("op", [*SCALED, "gemm_w4a16"])
def test_no_accumulator_of_the_width_of_an_exact_lane_loses_a_bit(op: str) -> None:
    """For rows and columns picked across the output: with q the lowest bit of any product of the element, sum |a w| < 2^N q, so
    every partial sum in any order is a multiple of q with at most N significant bits."""
    seen = set()
    for case in cases(op):
        if case.pattern in EXACT_WIDTHS and (case.problem.variant, case.pattern) not in seen:
            seen.add((case.problem.variant, case.pattern))
            environment = ops()[op].environment(case.problem, operands_of(case))  # type: ignore[misc]
            a, w = environment["a"], environment["w"]
            assert isinstance(a, Operand)
            assert isinstance(w, Operand)
            left, right = grouped("m", dot.values(a), environment), grouped("n", dot.values(w), environment)
            for m in {0, left.shape[0] // 2, left.shape[0] - 1}:
                live = np.flatnonzero(left[m])
                x = [Fraction(float(v)) for v in left[m, live]]
                for n in {0, right.shape[0] // 2, right.shape[0] - 1}:
                    products = [p for p in (u * Fraction(float(v)) for u, v in zip(x, right[n, live], strict=True)) if p]
                    if products:
                        q = min(map(lowest_bit, products))
                        assert sum(map(abs, products)) < 2 ** EXACT_WIDTHS[case.pattern] * q, (case, m, n)
    assert {pattern for _, pattern in seen} == set(EXACT_WIDTHS)


# The judge stays at a point ------------------------------------------------------------------------------------------


def nearest(value: Fraction, bits: int) -> Fraction:
    """The nearest number of `bits` significand bits, ties to even, of any exponent."""
    if not value:
        return value
    exponent = 0
    while abs(value) * Fraction(2) ** exponent < 1 << (bits - 1):
        exponent += 1
    while abs(value) * Fraction(2) ** exponent >= 1 << bits:
        exponent -= 1
    scaled = value * Fraction(2) ** exponent
    return round(scaled) / Fraction(2) ** exponent


def unordered(program: tuple[Contraction | Step, ...]) -> tuple[Contraction | Step, ...]:
    return tuple(replace(item, order=Order.UNKNOWN) if isinstance(item, Contraction) else item for item in program)


@pytest.mark.parametrize(("text", "bits"), [
    ("gemm_w8a8_fp8/scaled/m5n16k512/bf16/exactw11/s3", 8), ("gemm_w8a8_fp8/scaled/m5n16k512/f32.atensor/exactw14/s3", 24),
    ("gemm_w8a8_fp8/scaled/m5n16k512/f16.wtensor/exactw14/s4", 11),
])
def test_a_point_stays_a_point_under_whole_scales(text: str, bits: int) -> None:
    """In no order and on a 14-bit unit: D = round(round32(round32(sum channel) token)), by integers."""
    case = parse_case(text, ops())
    op, given = ops()[case.problem.op], operands_of(case)
    assert op.program is not None
    program = unordered(op.program(case.problem, DATAPATHS["hopper_wgmma_fp8"]))
    expected = op.expect(case, given, Declaration(program))["d"]
    assert (expected.lo == expected.hi).all()
    assert [item.operands for item in program if isinstance(item, Step) and item.kind is StepKind.MUL] == [
        ("channel_scale",), ("token_scale",)]
    a, w = (decode(given[name].codes, given[name].format) for name in ("a", "w"))
    scales = {name: decode(given[name].codes, F32) for name in ("channel_scale", "token_scale")}
    got = decode(expected.example(), expected.format)
    for m, n in np.ndindex(*got.shape):
        total = sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[m], w[n], strict=True)), Fraction(0))
        for name, place in (("channel_scale", n), ("token_scale", m)):
            total = nearest(total * Fraction(float(scales[name][place % scales[name].size])), 24)
        assert Fraction(float(got[m, n])) == nearest(total, bits), (m, n)


# A scale in fewer bits shows -----------------------------------------------------------------------------------------


def cut_to(fmt: Format) -> Callable[[Codes, Format], Codes]:
    """Rounding of scales to a format that keeps the leading bits: to nearest, ties away from zero. Exponents are in range."""

    def cut(codes: Codes, held: Format) -> Codes:
        drop = FRACTION_BITS[held.name] - FRACTION_BITS[fmt.name]
        kept = codes if drop <= 0 else ((codes + codes.dtype.type(1 << (drop - 1))) >> drop) << drop
        return np.asarray(kept.astype(codes.dtype))

    return cut


def output(case: Case, operands: Operands) -> Codes:
    """What the cpu backend writes."""
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[case.problem.op], case.problem):
        memory = np.zeros(spec.shape, container(spec.format)) if spec.role is Role.OUTPUT else operands[spec.name].codes.copy()
        strides = tuple(step // memory.itemsize for step in memory.strides)
        views[spec.role][spec.name] = TensorView(
            spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, memory.ctypes.data, memory)
    state = CPU.prepare(case.problem, "default", views[Role.CONSTANT])
    inputs = CPU.stage(case.problem, "default", views[Role.ACTIVATION])
    scratch = np.zeros(0, dtype=np.uint8)
    empty = TensorView("workspace", F32, (0,), (1,), Role.OUTPUT, "", scratch.ctypes.data, scratch)
    CPU.run(case.problem, "default", state, inputs, views[Role.OUTPUT], empty, None)
    found: Codes = views[Role.OUTPUT]["d"].memory
    return found


def declared(case: Case) -> Declaration:
    """fp8 sums without group scales: a 14-bit unit, in no order. Others as the cpu backend declares them."""
    op = ops()[case.problem.op]
    assert op.program is not None
    fp8 = (case.problem.op, case.problem.variant) in (
        ("gemm_w8a8_fp8", "scaled"), ("gemm_w4a8_fp8", "folded"), ("gemm_w4a8_fp8_grouped", "folded"))
    if fp8 and dict(case.problem.options).get("format") != "fnuz":
        return Declaration(unordered(op.program(case.problem, DATAPATHS["hopper_wgmma_fp8"])))
    return CPU.declare(case.problem, "default")


CUTS = [
    (op, out, fmt) for op, outs in (
        ("gemm_w8a8_fp8", "bf16 f16 f32"), ("gemm_w4a8_fp8", "bf16 f16"), ("gemm_w4a8_fp8_grouped", "bf16 f16"),
        ("gemm_nvfp4", "bf16 f16"), ("gemm_w4a8_int8", "f16"), ("gemm_int4", "f16"),
    ) for out in outs.split() for fmt in (BF16, F16) if not (fmt is F16 and op in ("gemm_w4a8_int8", "gemm_int4"))
]
"""Scales of gemm_w4a8_int8 and gemm_int4 have the format of the output: cut to f16 they change nothing, nor do bf16 ones."""


@pytest.mark.parametrize(("op", "out", "fmt"), CUTS, ids=lambda value: str(getattr(value, "name", value)))
def test_outer_scales_in_fewer_bits_leave_the_admissible_set(op: str, out: str, fmt: Format) -> None:
    """Each variant shows it in the lane of exact sums, although the unit is declared in no order with 14 bits, and some variant
    in a probe. The right output is admitted by each case that was searched."""
    cut, shown, searched = cut_to(fmt), set(), set()
    for case in sorted(cases(op), key=products):
        lane = "exact" if case.pattern in ("exactw11", "exactw14") else case.pattern
        key = case.problem.variant, lane
        if case.problem.option("out") != out or lane not in ("exact", "onehot", "scaleprobe") or key in shown:
            continue
        true, tensors = operands_of(case), dict(operands_of(case).tensors)
        for spec in tensors_of(ops()[op], case.problem):
            if spec.family in OUTER:
                tensors[spec.name] = Tensor(cut(true[spec.name].codes, spec.format), spec.format)
        if all((tensors[name].codes == true[name].codes).all() for name in tensors):
            continue
        searched.add(key)
        expected = ops()[op].expect(case, true, declared(case))["d"]
        assert expected.admits(output(case, true)).all(), case
        if not expected.admits(output(case, Operands(tensors))).all():
            shown.add(key)
    assert {variant for variant, _ in searched} == set(ops()[op].variants) - {"block"}
    assert {variant for variant, lane in searched - shown if lane == "exact"} == set()
    assert {lane for _, lane in shown} > {"exact"} or op == "gemm_w4a8_fp8_grouped"


@pytest.mark.parametrize(("op", "variant"), [
    ("gemm_w8a8_fp8", "block"), ("gemm_w4a16", "sym"), ("gemm_w4a16", "zp"), ("gemm_w4a16", "zpafter"),
    ("gemm_w4a8_int8", "direct"), ("gemm_w4a8_int8", "viaf16"), ("gemm_int4", "f32"), ("gemm_int4", "half"),
])
def test_block_scales_in_bf16_leave_a_point(op: str, variant: str) -> None:
    """One scale, or the product of two, is a point in any order; cut to bf16 it is another."""
    cut, shown = cut_to(BF16), []
    for case in cases(op):
        narrow = op != "gemm_w8a8_fp8" and case.problem.option("out") == "bf16"
        if case.pattern == "scaleprobe" and case.problem.variant == variant and not narrow:
            true, tensors = operands_of(case), dict(operands_of(case).tensors)
            for name in ("scale", "group_scale", "a_scale", "w_scale"):
                if name in tensors:
                    tensors[name] = Tensor(cut(true[name].codes, true[name].format), true[name].format)
            program = unordered(CPU.declare(case.problem, "default").program)
            expected = ops()[op].expect(case, true, Declaration(program))["d"]
            assert (expected.lo == expected.hi).all(), case
            assert expected.admits(output(case, true)).all(), case
            shown.append(not expected.admits(output(case, Operands(tensors))).all())
    assert any(shown)
