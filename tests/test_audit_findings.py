"""What an audit says of true, false and loose declarations, and what follows for verdicts, levels, reports and the command."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from lowbit.conformance import audit_findings as findings
from lowbit.conformance import audit_table, simulator
from lowbit.conformance.audit import audit
from lowbit.conformance.audit_probes import battery, probe_operands
from lowbit.conformance.audit_readings import FIELDS, Fingerprint, Reading
from lowbit.conformance.html import page
from lowbit.conformance.op import parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.report import CONSISTENT, FINER, REFUTED, Audited, ReportError, from_json, to_json
from lowbit.conformance.report_levels import granted, power_of
from lowbit.conformance.run import Plan, Session, listed_of, run_one
from lowbit.conformance.selection import LEAST
from lowbit.conformance.verdict import Status, Verdict
from lowbit.conformance.worker import Worker
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Claim, Contraction, Declaration, Order
from lowbit.references.formats import BF16, F64, code_of_key
from lowbit.references.interpret import bound


def _samples() -> ModuleType:
    """The module beside this one, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("report_samples.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


samples = _samples()
W8 = "gemm_w8a8_fp8/scaled/m64n64k1024/bf16"
BACKENDS = Path(__file__).with_name("audit_backends.py")


def said(name: str) -> str:
    return f"python:{BACKENDS}:{name}"


@cache
def found(name: str, text: str = W8) -> findings.Found:
    """The finding of one battery."""
    problem = parse_problem(text, ops())
    reference = name if name == "cpu" or ":" in name else said(name)
    with Worker(reference) as worker:
        session = Session(Plan(reference), worker)
        session.open()
        result = session.finding(ops()[problem.op], problem, "default")
    assert result is not None
    return result


# Standings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "standing", "what"), [
    ("honest", CONSISTENT, ""), ("split", CONSISTENT, ""), ("cpu", CONSISTENT, ""),
    ("finer", FINER, "25 fraction bits, 13 declared; 24 significand bits, 14 declared"),
    ("wider", FINER, "at least 34 significand bits, 24 declared"),
    ("promoted", FINER, "promotion every 128 of K, none declared"),
    ("nearest", FINER, "sums to nearest, truncation declared"),
    ("coarser", REFUTED, "outside their admissible set"),
    ("unpromoted", REFUTED, "1024 of K are summed in one accumulator, promotion every 128 is declared"),
    ("truncating", REFUTED, "sums are truncated, rounding to nearest is declared (ieee_f32)"),
    ("ordered", REFUTED, "outside their admissible set"),
])
def test_standing_of_a_declaration(name: str, standing: str, what: str) -> None:
    """AUD-6. `coarser` has 13 bits under binary32, `ordered` 25 under 13 in known order, `finer` the same in unknown order."""
    record = found(name).record
    assert (record.standing, what in record.said) == (standing, True)
    assert bool(record.counterexample) is (standing == REFUTED)
    assert (found(name).gain is not None) is (standing == FINER)


@pytest.mark.parametrize(("name", "clause", "honest"), [
    ("ordered", "AUD-2", "sim:hopper_wgmma_fp8"), ("coarser", "AUD-3", "sim:ieee_f32"), ("truncating", "AUD-4", "sim:ieee_f32"),
    ("unpromoted", "AUD-4", "sim:hopper_wgmma_fp8,segment=128"),
])
def test_the_counterexample_refutes_again_and_accuses_no_honest_one(name: str, clause: str, honest: str) -> None:
    """AUD-1: `lowbit run` of the named case, without the rest of the battery."""
    case = found(name).record.counterexample
    (verdict,) = run_one(case, said(name))
    assert (verdict.status, verdict.clause, verdict.lane, verdict.level) == (Status.DRIFT, clause, "audit", 2)
    assert verdict.repro == f"lowbit run '{case}' --backend {said(name)}"
    (cleared,) = run_one(case, honest)
    assert cleared.status is Status.EXACT
    assert not cleared.ulp_histogram


def test_int32_and_binary64_lose_nothing() -> None:
    """AUD-6: of accumulators wider than the operands span, consistent means that nothing was lost."""
    record = found("cpu").record
    assert record.readings["fraction_bits"] == "at least 33"
    assert record.readings["chunk"].startswith("not identifiable: nothing was lost in any probe")
    exact = found("sim:imma_s32", "gemm_int4/f32/m64n128k1024r0/f16").record
    assert (exact.standing, exact.readings["running_bits"]) == (CONSISTENT, "24")


# What counts against a declaration -----------------------------------------------------------------------------------


def _declared(argument: str, order: Order = Order.ASCENDING) -> Declaration:
    program = simulator.backend(argument).declare(parse_problem(W8, ops()), "default").program
    return Declaration(tuple(replace(item, order=order) if isinstance(item, Contraction) else item for item in program))


def test_probes_are_judged_by_bits_only_where_the_declaration_fixes_them() -> None:
    known, unknown = _declared("hopper_wgmma_fp8"), _declared("hopper_wgmma_fp8", Order.UNKNOWN)
    assert findings.must_equal(known).claim is Claim.BIT_EXACT
    assert findings.must_equal(unknown) == unknown
    assert (findings.leaves_open(known), findings.leaves_open(unknown)) == (False, True)
    assert not findings.leaves_open(_declared("ieee_f64", Order.UNKNOWN))
    split = _declared("hopper_wgmma_fp8,splits=2")
    loose = tuple(replace(i, reduction_order=Order.UNKNOWN) if isinstance(i, Contraction) else i for i in split.program)
    assert findings.known_order(split)
    assert not findings.known_order(Declaration(loose))


def test_order_nodes_and_splits_are_not_held_against_an_unknown_order() -> None:
    """AUD-4: three splits and nodes of 32 under a declaration without splits."""
    readings = found("split").record.readings
    assert (readings["splits"], readings["chunk"], readings["order"]) == ("3", "32", "ascending")
    assert found("split").record.standing == CONSISTENT


@pytest.mark.parametrize(("change", "said"), [
    ({"fraction_bits": 12}, "12 bits below the largest product are kept, 13 are declared (hopper_wgmma_fp8)"),
    ({"output_bits": 13}, "a sum carries 13 significand bits, 14 are declared (hopper_wgmma_fp8)"),
    ({}, ""),
], ids=str)
def test_one_bit_less_than_declared_contradicts_an_unknown_order(change: dict[str, int], said: str) -> None:
    """AUD-4, though every output lies in the interval of ADM-2."""
    problem = parse_problem(W8, ops())
    op, case = ops()[problem.op], battery(ops()[problem.op], problem)[2]
    operands, declared = probe_operands(op, case), _declared("hopper_wgmma_fp8", Order.UNKNOWN)
    path = replace(DATAPATHS["hopper_wgmma_fp8"], **change)  # type: ignore[arg-type]
    computed = op.expect(case, operands, Declaration(simulator.simulated_program(op, problem, path), Claim.BIT_EXACT))["d"]
    codes = code_of_key(computed.lo, computed.format)
    assert op.expect(case, operands, declared)["d"].admits(codes).all()
    assert findings.contradiction(op, case, operands, declared, codes) == said


def test_promotion_half_as_often_as_declared_contradicts_an_unknown_order() -> None:
    problem = parse_problem(W8, ops())
    op, case = ops()[problem.op], battery(ops()[problem.op], problem)[0]
    operands, computing = probe_operands(op, case), simulator.backend("hopper_wgmma_fp8,segment=256").declare(problem, "default")
    codes = code_of_key(op.expect(case, operands, replace(computing, claim=Claim.BIT_EXACT))["d"].lo, BF16)
    said = findings.contradiction(op, case, operands, _declared("hopper_wgmma_fp8,segment=128", Order.UNKNOWN), codes)
    assert said == "256 of K are summed in one accumulator, promotion every 128 is declared"
    assert findings.contradiction(op, case, operands, _declared("hopper_wgmma_fp8,segment=256", Order.UNKNOWN), codes) == ""


@pytest.mark.parametrize(("other", "same"), [
    ("hopper_wgmma_fp8", True), ("hopper_wgmma_fp8,splits=2", False), ("hopper_wgmma_fp8,segment=128", False), ("ada_fp8", False),
])
def test_what_was_measured_holds_for_the_same_sum_alone(other: str, same: bool) -> None:
    assert findings.alike(_declared("hopper_wgmma_fp8"), _declared(other)) is same


@pytest.mark.parametrize("name", ["finer", "wider", "nearest", "promoted"])
def test_what_was_measured_takes_the_place_of_what_was_declared(name: str) -> None:
    """AUD-5: the interval by the measured numbers lies within the one by the declared numbers, and is narrower somewhere."""
    result = found(name)
    assert result.gain is not None
    measured = findings.refined(result.declaration, result.gain)
    path = findings.main_contraction(measured).datapath
    if name == "finer":
        assert (path.fraction_bits, path.output_bits, path.products) == (25, 24, 32)
    if name == "wider":
        assert (path.output, path.output_bits) == (F64, 34)
    assert findings.main_contraction(measured).segment == (128 if name == "promoted" else 0)
    op, case = ops()["gemm_w8a8_fp8"], listed_of("gemm_w8a8_fp8/scaled/m16n64k1024/f32/positive/s1").case
    assert op.environment is not None
    environment = op.environment(case.problem, draw_operands(op, case))
    tail = (replace(result.declaration.program[-1], format=DATAPATHS["ieee_f32"].output),)  # type: ignore[arg-type]
    narrow, wide = (
        bound(replace(item, program=(*item.program[:-1], *tail)), environment) for item in (measured, result.declaration)
    )
    assert (wide.lo <= narrow.lo).all()
    assert (narrow.hi <= wide.hi).all()
    assert (narrow.hi - narrow.lo < wide.hi - wide.lo).any()


def test_a_fault_behind_a_loose_declaration_shows_by_what_was_measured() -> None:
    """25 bits in unknown order, 13 declared, and the last 32 of K dropped outside the probes: by the declaration every output is
    admissible, by the readings it is not."""
    item = listed_of("gemm_w8a8_fp8/scaled/m16n64k1024/bf16/normal/s1")
    op = ops()["gemm_w8a8_fp8"]
    operands = draw_operands(op, item.case)
    with Worker(said("hiding")) as worker:
        declaration = worker.declare(item.case.problem, "default")
        outcome = worker.execute(item.case.problem, "default", operands, tensors_of(op, item.case.problem))
    assert op.expect(item.case, operands, declaration)["d"].admits(outcome.outputs["d"]).all()
    (verdict,) = run_one(str(item.case), said("hiding"))
    assert verdict.status is Status.DRIFT
    assert verdict.declared == "measured: 25 fraction bits, 13 declared; 24 significand bits, 14 declared"
    (passing,) = run_one(str(item.case), said("finer"))
    assert (passing.status, passing.declared) == (Status.WITHIN, verdict.declared)


def test_nodes_shorter_than_declared_round_more_often() -> None:
    """By hand, ADM-2: nodes of 4 at F = 23 and P = 24 lose 8 (5 + 1) 2^-23 over 32 of K, one node of 32 would lose 34 2^-23."""
    nothing = Reading(None, "none", "not asked")
    readings = Fingerprint(**{name: nothing for name in FIELDS} | {
        "fraction_bits": Reading(23), "output_bits": Reading(24), "chunk": Reading(4), "segment": Reading(0),
        "splits": Reading(1),
    })
    declared = _declared("hopper_wgmma_fp8", Order.UNKNOWN)
    gain = findings.finer(declared, readings)
    assert gain is not None
    assert findings.main_contraction(findings.refined(declared, gain)).datapath.products == 4


# Levels and reports --------------------------------------------------------------------------------------------------


def _gemm(pattern: str, seed: int = 1, **given: object) -> Verdict:
    power = {"power": {"zero output": True}} if pattern == "lognormal" else {}
    made: Verdict = samples.verdict(f"gemm_w4a16/plain/m64n64k1024g64/bf16/{pattern}/s{seed}", **{**power, **given})
    return made


WHOLE = [
    *(_gemm(pattern, seed) for seed in range(LEAST) for pattern in ("exactw14", "lognormal")),
    *(_gemm(pattern) for pattern in ("onehot", "scaleprobe", "audit_cut")),
]


def test_a_refuted_declaration_reaches_no_bounded_level() -> None:
    assert granted(WHOLE, power_of(WHOLE), 2)[0] == 2
    refuted = [*WHOLE[:-1], _gemm("audit_cut", status=Status.DRIFT, reason="13 bits are kept", wrong=1)]
    best, results = granted(refuted, power_of(refuted), 2)
    assert best == 1
    assert results[2].reasons[0] == "1 verdict DRIFT in gemm_w4a16"
    best, results = granted(WHOLE[:-1], power_of(WHOLE), 2)
    assert (best, results[2].reasons) == (1, ("gemm_w4a16: no case was judged in audit",))


@pytest.fixture(scope="module")
def told() -> str:
    return to_json(samples.report())


@pytest.mark.parametrize(("change", "why"), [
    ({"standing": REFUTED, "said": "x", "counterexample": "y"}, "does not follow from the verdicts of its probes"),
    ({"counterexample": "y"}, "does not follow from the verdicts of its probes"),
    ({"problem": "gemm_w4a16/none/m64n64k1024g128/bf16"}, "a finding without a probe"),
])
def test_a_finding_follows_from_the_verdicts_of_its_probes(change: Mapping[str, str], why: str) -> None:
    whole = samples.report()
    rows = [Audited(**{**{name: getattr(row, name) for name in Audited.__slots__}, **change}) for row in whole.audits[:1]]
    with pytest.raises(ReportError, match=why):
        replace(whole, audits=tuple(rows))
    with pytest.raises(ReportError, match="audited twice"):
        replace(whole, audits=(whole.audits[0], whole.audits[0]))


def test_findings_read_back_and_are_shown(told: str) -> None:
    report = from_json(told)
    assert {row.standing for row in report.audits} == {CONSISTENT, FINER}
    html = page(report)
    section = html[html.index('id="audit"'):html.index('id="declarations"')]
    assert section.count("<tr><th scope=\"row\"") == len(report.audits) == 6
    assert section.index("finer than declared</span>") < section.index("consistent</span>")
    assert "25 fraction bits, 13 declared" in section
    assert audit_table.headline(report.audits) == "6 audited: 2 finer than declared, 4 consistent"
    assert audit_table.headline(()) == ""
    assert audit_table.row_of(report.audits[0])[0] == "13"
    assert "&lt;=32" in section


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    return tmp_path / "audit.json"


def test_the_command_prints_a_fingerprint(inside: Callable[..., subprocess.CompletedProcess[str]], figures: Path) -> None:
    done = inside("audit", "sim:imma_s32", "--ops", "gemm_int4", "--json", figures)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "sim:imma_s32 on sim, emulated: 4 audited: 4 consistent"
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("gemm_int4/half/f16 "))
    assert row[-5:] == ["-", "1", "11", "ascending", "consistent"]
    data = json.loads(figures.read_text(encoding="utf-8"))
    assert {finding["standing"] for finding in data["findings"]} == {CONSISTENT}
    assert data["failures"] == []


def test_the_command_fails_on_a_refuted_declaration(
    inside: Callable[..., subprocess.CompletedProcess[str]], figures: Path
) -> None:
    done = inside("audit", said("ordered"), "--ops", "gemm_w4a8_fp8", "--json", figures)
    assert done.returncode == 1
    assert "REFUTED gemm_w4a8_fp8/folded/bf16: " in done.stdout
    data = json.loads(figures.read_text(encoding="utf-8"))
    cases = [row["counterexample"] for row in data["findings"]]
    assert all(f"lowbit run '{case}' --backend {said('ordered')}" in done.stdout for case in cases)
    assert set(cases) <= {row["case"] for row in data["failures"]}


@pytest.mark.parametrize(("arguments", "code", "why"), [
    (("audit", "cpu", "--ops", "int4_pack"), 2, "only matrix products have an accumulator to audit"),
    (("audit", "cpu", "--ops", "gemm"), 2, "unknown op gemm"),
    (("audit", "sim:volta_f16", "--ops", "gemm_int4"), 4, "the backend supports none of the products that are probed"),
])
def test_ends_of_the_command(
    inside: Callable[..., subprocess.CompletedProcess[str]], arguments: tuple[str, ...], code: int, why: str
) -> None:
    done = inside(*arguments)
    assert done.returncode == code
    assert why in done.stderr


def test_a_product_of_which_a_probe_is_refused_is_not_measured() -> None:
    """AUD-7: this arithmetic is finer than declared where all probes are taken; here nothing is found, and nothing said."""
    assert {row.standing for row in audit(said("finer"), ("gemm_w4a8_fp8",)).findings} == {FINER}
    assert audit(said("partial"), ("gemm_w4a8_fp8",)).findings == ()
