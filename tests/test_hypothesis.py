"""Drawn cases: every op's backend, relations and references hold on whatever the domain holds, and a failure names its case.

The backend is called in this process, without guard pages: what is tested is arithmetic. Cases are derived from a fixed seed,
the same on every machine.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from lowbit.conformance.backend import TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.op import Op, Role, parse_case, tensors_of
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.properties import judge_property
from lowbit.conformance.stability import Finding
from lowbit.conformance.strategies import cases, problems, property_cases
from lowbit.conformance.verdict import judge_outputs
from lowbit.conformance.worker import Ending, Outcome, Variation
from lowbit.kernels.cpu import backend as cpu_backend
from lowbit.references import layouts
from lowbit.references.formats import FORMATS, Codes, Format, Kind, container, decode, is_nan, order_key
from lowbit.references.rounding import Overflow, Rounding, encode

Command = Callable[..., subprocess.CompletedProcess[str]]
CPU = cpu_backend()
CI = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def call(backend: Any, problem: Problem, operands: Operands) -> dict[str, Codes]:
    """What a backend writes for a problem: codes of every OUTPUT and INOUT tensor."""
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[problem.op], problem):
        memory: Codes = (
            np.full(spec.shape, 0x5A, container(spec.format)) if spec.role is Role.OUTPUT else operands[spec.name].codes.copy()
        )
        strides = tuple(step // memory.itemsize for step in memory.strides)
        address = memory.__array_interface__["data"][0]
        views[spec.role][spec.name] = TensorView(
            spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, address, memory
        )
    state = backend.prepare(problem, "default", views[Role.CONSTANT])
    inputs = backend.stage(problem, "default", views[Role.ACTIVATION] | views[Role.INOUT])
    backend.run(problem, "default", state, inputs, views[Role.OUTPUT], None, None)
    return {name: view.memory for name, view in (views[Role.OUTPUT] | views[Role.INOUT]).items()}


def verdict(backend: Any, case: Case) -> str:
    """Empty if the outputs of a case are admissible, else the sentence with its repro line."""
    op = ops()[case.problem.op]
    operands = draw_operands(op, case)
    declaration = backend.declare(case.problem, "default")
    wrong, _ = check_declaration(op, case.problem, declaration)
    outputs = call(backend, case.problem, operands)
    expected = op.expect(case, operands, declaration)
    if op.expect_given is not None:
        expected = op.expect_given(case, operands, declaration, outputs)
    found = judge_outputs(expected, outputs, {})
    return wrong or (f"{found.wrong} of {found.judged} outside, worst {found.worst}" if found.wrong else "")


def check(backend: Any, case: Case) -> None:
    """What a property test does with a drawn case: on failure its id is in the report, as the line that runs it again."""
    note(f"lowbit run '{case}' --backend cpu")
    assert verdict(backend, case) == ""


@pytest.mark.parametrize("name", NAMES)
def test_cpu_backend_passes_whatever_is_drawn(name: str) -> None:
    """Every variant, option, pattern and shape that the domain has: none is refused, none drifts."""
    seen: set[Case] = set()

    @CI
    @given(cases(ops()[name]))
    def drawn(case: Case) -> None:
        assert parse_case(str(case), ops()) == case
        assert CPU.supports(case.problem) is None
        seen.add(case)
        check(CPU, case)

    drawn()
    assert len(seen) >= 20


RELATED = [name for name in NAMES if name.startswith("gemm_")] + [
    "fp8_quantize",
    "int8_quantize",
    "int4_quantize",
    "nvfp4_quantize",
    "int4_pack",
    "int4_encode",
]


@pytest.mark.parametrize("name", RELATED)
def test_relations_between_runs_hold_whatever_is_drawn(name: str) -> None:
    """The relations of level L2 on drawn problems, run in this process."""
    op = ops()[name]
    patterns: set[str] = set()

    def execute(problem: Problem, operands: Operands, variation: Variation) -> Outcome:
        del variation
        return Outcome(Ending.OK, outputs=call(CPU, problem, operands), kernel="cpu")

    @settings(CI, max_examples=15)
    @given(property_cases(op))
    def drawn(case: Case) -> None:
        note(f"lowbit run '{case}' --backend cpu")
        patterns.add(case.pattern)
        found = judge_property(op, case, "default", CPU.declare(case.problem, "default"), execute)
        assert isinstance(found, Finding)
        assert found.wrong == 0, found.reason

    drawn()
    assert patterns


def samples(op: Op, count: int) -> list[Case]:
    """What a strategy yields in a run of so many examples."""
    found: list[Case] = []

    @settings(CI, max_examples=count, phases=(Phase.generate,))
    @given(cases(op))
    def drawn(case: Case) -> None:
        found.append(case)

    drawn()
    return found


def test_strategies_cover_the_domain() -> None:
    """Every variant, option token and drawn pattern of every op comes up, and sizes stay small."""
    for name in NAMES:
        op = ops()[name]
        variants: set[str] = set()
        tokens: set[str] = set()
        patterns: set[str] = set()
        for case in samples(op, 200):
            variants.add(case.problem.variant)
            tokens.update(token for _, token in case.problem.options)
            patterns.add(case.pattern)
            assert np.prod([max(1, size) for letter, size in case.problem.dims if letter != "g"]) <= 1 << 15
        assert variants == set(op.variants), name
        assert tokens == {token for option in op.options for token in option.tokens}, name
        assert patterns == set(op.patterns) - {"golden", "tensors"}, name


def test_empty_strategies_are_refused_before_drawing() -> None:
    with pytest.raises(ValueError, match="no problem whose dims multiply to at most 10"):
        problems(ops()["gemm_int4"], largest=10)
    for name in sorted(set(NAMES) - set(RELATED)):
        with pytest.raises(ValueError, match=f"no relation between runs of {name}"):
            property_cases(ops()[name])


# A planted fault -----------------------------------------------------------------------------------------------------

MUTANT = '''
from lowbit.kernels.cpu import Cpu


class Mutant(Cpu):
    """The last group of 32 along K uses the scale of the one before it."""
    __slots__ = ()

    def prepare(self, problem, tactic, constants):
        scale = constants["group_scale"].memory
        spoiled = scale.copy()
        if scale.shape[1] > 2:
            spoiled[:, -1] = spoiled[:, -2]
        view = type(constants["group_scale"])
        old = constants["group_scale"]
        new = view(old.name, old.format, old.shape, old.strides, old.role, old.layout, old.pointer, spoiled)
        return super().prepare(problem, tactic, {**constants, "group_scale": new})
'''


def test_planted_fault_is_found_and_the_printed_case_reproduces_it(inside: Command, tmp_path: Path) -> None:
    """Hypothesis finds it and makes it smaller, and the printed line fails by the command."""
    (tmp_path / "mutant.py").write_text(MUTANT)
    namespace: dict[str, Any] = {}
    exec(compile(MUTANT.replace("super()", "super(Mutant, self)"), "mutant.py", "exec"), namespace)
    mutant = namespace["Mutant"]()

    @settings(CI, max_examples=200)
    @given(cases(ops()["gemm_w4a8_int8"]))
    def drawn(case: Case) -> None:
        check(mutant, case)

    with pytest.raises(AssertionError) as caught:
        drawn()
    told = "\n".join(getattr(caught.value, "__notes__", []))
    line = re.search(r"lowbit run '([^']+)' --backend cpu", told)
    assert line is not None, told
    case = parse_case(line[1], ops())
    dims = dict(case.problem.dims)
    assert dims["k"] // dims["g"] > 2
    assert dims["m"] * dims["n"] * dims["k"] <= 1 << 13  # the least is 768; drawn problems go to 32,768
    assert inside("run", line[1], "--backend", "cpu").returncode == 0
    done = inside("run", line[1], "--backend", "python:mutant.py:Mutant")
    assert (done.returncode, done.stdout.split()[0]) == (1, "DRIFT")


# References ----------------------------------------------------------------------------------------------------------

SMALL = [fmt for fmt in FORMATS.values() if fmt.bits <= 16]
MODES = (Rounding.RNE, Rounding.RZ, Rounding.FLOOR, Rounding.CEIL)


def reals(fmt: Format) -> st.SearchStrategy[float]:
    """Values around the range of a format, its own values and midpoints among them."""
    top = float(fmt.max_finite)
    ordinary = st.floats(-1.25 * top, 1.25 * top, allow_nan=False)
    codes = st.integers(0, (1 << fmt.bits) - 1).map(lambda code: float(decode(np.array([code], container(fmt)), fmt)[0]))
    finite = codes.filter(np.isfinite)
    if fmt.kind is Kind.EXPONENT:  # powers of two: neither zero nor a negative value has a code
        ordinary, finite = ordinary.map(lambda x: max(abs(x), 2.0**-127)), finite.filter(lambda x: x > 0)
    middles = st.tuples(finite, finite).map(lambda pair: pair[0] / 2 + pair[1] / 2)
    return ordinary | finite | middles


@pytest.mark.parametrize("fmt", SMALL, ids=lambda fmt: fmt.name)
def test_rounding_is_monotone_and_lands_next_to_the_value(fmt: Format) -> None:
    """x <= y gives code(x) <= code(y) in every mode; floor and ceil enclose x and nothing lies between them."""

    @settings(CI, max_examples=60)
    @given(reals(fmt), reals(fmt))
    def drawn(x: float, y: float) -> None:
        low, high = min(x, y), max(x, y)
        for mode in MODES:
            codes = encode(np.array([low, high]), fmt, mode, Overflow.SATFINITE)
            first, second = (float(value) for value in decode(codes, fmt))
            assert first <= second
            top, bottom = float(fmt.max_finite), float(decode(np.array([fmt.min_code], container(fmt)), fmt)[0])
            if bottom <= low <= top and mode is not Rounding.RNE:
                assert (first <= low) if mode is Rounding.FLOOR or (mode is Rounding.RZ and low >= 0) else (first >= low)
        floor, ceil = (
            float(decode(encode(np.array([low]), fmt, mode, Overflow.SATFINITE), fmt)[0])
            for mode in (Rounding.FLOOR, Rounding.CEIL)
        )
        nearest = float(decode(encode(np.array([low]), fmt, Rounding.RNE, Overflow.SATFINITE), fmt)[0])
        assert nearest in (floor, ceil)
        assert abs(Fraction(nearest) - Fraction(low)) == min(abs(Fraction(end) - Fraction(low)) for end in (floor, ceil))

    drawn()


@pytest.mark.parametrize("fmt", SMALL, ids=lambda fmt: fmt.name)
def test_every_code_survives_decode_and_encode(fmt: Format) -> None:
    """decode then encode gives the code back, NaN some NaN, and order_key orders codes as their values are ordered."""
    codes = np.arange(1 << fmt.bits).astype(container(fmt))
    values = decode(codes, fmt)
    again = encode(values, fmt, Rounding.RNE, Overflow.SPECIAL)
    nan = is_nan(codes, fmt)
    assert (again == codes)[~nan & (values != 0)].all()
    assert is_nan(again[nan], fmt).all()
    assert (values[values == 0] == decode(again[values == 0], fmt)).all()
    keys, real = order_key(codes[~nan], fmt), values[~nan]
    order = np.argsort(keys, kind="stable")
    assert (np.diff(real[order]) >= 0).all()
    assert fmt.kind is Kind.FLOAT or (np.diff(real[order]) > 0).all()


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_layouts_give_back_what_was_packed(name: str) -> None:
    """pack then unpack is the identity, and two matrices that differ have storage that differs."""
    layout = layouts.LAYOUTS[name]
    legal = [
        (rows, columns)
        for rows in (1, 2, 8, 16, 48, 64, 128, 130)
        for columns in (1, 4, 8, 16, 32, 64, 128, 256)
        if _fits(layout, rows, columns)
    ]
    assert legal

    @CI
    @given(st.sampled_from(legal), st.integers(0, 2**32 - 1), st.data())
    def drawn(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
        codes = (
            np.random.Generator(np.random.Philox(seed))
            .integers(0, 1 << layout.bits, shape)
            .astype(np.uint8 if layout.bits <= 8 else np.uint16)
        )
        stored = layouts.pack(codes, layout)
        assert (layouts.unpack(stored, layout, *shape) == codes).all()
        other = codes.copy()
        place = data.draw(st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1)))
        other[place] ^= codes.dtype.type(1)
        assert (layouts.pack(other, layout) != stored).any()

    drawn()


def _fits(layout: layouts.Layout, rows: int, columns: int) -> bool:
    try:
        layouts.storage_shape(layout, rows, columns)
    except ValueError:
        return False
    return True


def test_mapping_of_operands_is_a_function_of_the_case_alone() -> None:
    """Two draws of one case are the same bytes; another seed gives others (patterns without randomness left aside)."""

    @CI
    @given(st.sampled_from(NAMES).flatmap(lambda name: cases(ops()[name])))
    def drawn(case: Case) -> None:
        op = ops()[case.problem.op]
        first: Mapping[str, Any] = draw_operands(op, case).tensors
        assert draw_operands(op, case).sha256() == draw_operands(op, parse_case(str(case), ops())).sha256()
        assert {spec.name for spec in tensors_of(op, case.problem) if spec.role is not Role.OUTPUT} == set(first)

    drawn()
