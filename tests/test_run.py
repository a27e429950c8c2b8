"""The loop on real backends: ids that give their verdicts again, shards, resumption, and what a backend may declare or refuse.

tests/test_loop.py holds the case lists and the levels of empty and vacuous backends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from lowbit.conformance import report
from lowbit.conformance.op import DomainError
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.report import CONSISTENT, FINER, MergeError, ReportError
from lowbit.conformance.run import Plan, certify, listed_cases, listed_of, run_one
from lowbit.conformance.selection import CONTRACT, case_list, manifest, shard
from lowbit.conformance.verdict import Status, Verdict
from lowbit.conformance.waivers import Waiver

BACKENDS = '''
from dataclasses import replace
from lowbit.conformance.backend import DATAPATHS, Order
from lowbit.kernels.cpu import Cpu


class Zero(Cpu):
    """Writes zeros everywhere."""
    __slots__ = ()

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        for view in outputs.values():
            view.memory[...] = 0
        return "zeros"


def _on(found, path, order):
    first = replace(found.program[0], datapath=DATAPATHS[path], order=order)
    return replace(found, program=(first, *found.program[1:]))


class Loose(Cpu):
    """Right, and declares 14 bits in no order: its intervals say nearly nothing."""
    __slots__ = ()

    def supports(self, problem):
        return "hopper takes no fnuz" if "fnuz" in dict(problem.options).values() else Cpu.supports(self, problem)

    def declare(self, problem, tactic):
        return _on(Cpu.declare(self, problem, tactic), "hopper_wgmma_fp8", Order.UNKNOWN)


class Foreign(Cpu):
    """Declares a datapath that does not take the operands."""
    __slots__ = ()

    def declare(self, problem, tactic):
        return _on(Cpu.declare(self, problem, tactic), "ampere_bf16", Order.ASCENDING)


class Two(Cpu):
    """Two tactics."""
    __slots__ = ()

    def tactics(self, problem):
        return ("one", "two")


class Plain(Cpu):
    """Knows no bias and no empty M."""
    __slots__ = ()

    def supports(self, problem):
        if dict(problem.options).get("bias", "nobias") != "nobias" or dict(problem.dims).get("m") == 0:
            return "no bias and no empty M"
        return super().supports(problem)


class Raising(Cpu):
    """Takes an empty M and raises."""
    __slots__ = ()

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        if problem.dim("m") == 0:
            raise RuntimeError("no rows to compute")
        return super().run(problem, tactic, state, inputs, outputs, workspace, stream)


class Stale(Cpu):
    """An empty M leaves something behind that changes the next call."""
    __slots__ = ()
    left = []

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        if problem.dim("m") == 0:
            self.left.append(problem)
        elif self.left:
            outputs["d"].memory[0, 0] ^= 0x4000
        return name


class Misspelt(Cpu):
    """Its supports ends in a NameError where K is odd to it."""
    __slots__ = ()

    def supports(self, problem):
        return super().supports(problem) and no_such_name


class Wrong(Cpu):
    """Drifts in problems of the row variant."""
    __slots__ = ()

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        if problem.variant == "row":
            next(iter(outputs.values())).memory[0] ^= 1
        return name
'''


@pytest.fixture
def backend(tmp_path: Path) -> Callable[[str], str]:
    """Reference of a class of the module above."""
    (tmp_path / "backends.py").write_text(BACKENDS)
    return lambda name: f"python:{tmp_path / 'backends.py'}:{name}"


# Selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_case_list_covers_the_op_and_has_no_doubles(name: str) -> None:
    """Every variant x token of the first option x pattern that the domain has; every edge; no two differ in the seed alone."""
    op = ops()[name]
    cases = [item.case for item in case_list(op, per_op=1)]
    assert len({(case.problem, case.pattern) for case in cases}) == len(cases)
    assert {str(case) for case in cases} >= {edge for edge in op.edges if edge.rsplit("/", 2)[1] != "golden"}
    drawn = {(case.problem.variant, case.problem.options[0][1] if case.problem.options else "", case.pattern) for case in cases}
    patterns = set(op.patterns) - {"golden", "tensors"}
    for variant in op.variants:
        tokens = {token for other, token, _ in drawn if other == variant}
        assert tokens
        assert {(variant, token, pattern) for token in tokens for pattern in patterns} <= drawn
    if op.options:
        assert {token for _, token, _ in drawn} == set(op.options[0].tokens)


def test_every_listed_case_is_found_again_by_its_id() -> None:
    """The id in a repro line gives the entry of the list: same lane, same level, of all lanes of all ops."""
    listed = listed_cases(Plan("cpu", 3, per_op=1))
    assert len({str(item.case) for item in listed}) == len(listed)
    assert {item.lane for item in listed} == {
        "encoding",
        "quantiser",
        "golden",
        "exact",
        "onehot",
        "scale",
        "audit",
        "bounded",
        "property",
        "reject",
        "stability",
    }
    for item in listed:
        assert listed_of(str(item.case)) == item


def test_level_chooses_lanes_and_wrong_names_are_refused() -> None:
    levels = {
        level: Counter(item.level for item in listed_cases(Plan("cpu", level, ("gemm_int4",), per_op=1))) for level in range(4)
    }
    assert sum(levels[0].values()) == 1  # loads: the first case of the op, whatever its lane
    assert [set(levels[level]) for level in range(1, 4)] == [{1}, {1, 2}, {1, 2, 3}]
    assert levels[3][1] == levels[1][1]
    with pytest.raises(DomainError, match="unknown op gemm_int5; the ops are int4_pack"):
        listed_cases(Plan("cpu", ops=("gemm_int4", "gemm_int5")))


def test_list_is_the_same_in_another_process() -> None:
    """No hash seed, no order of a set, no clock in it."""
    program = (
        "from lowbit.conformance.run import Plan, listed_cases; from lowbit.conformance.selection import manifest; "
        "print(manifest(listed_cases(Plan('cpu', 3, ('scale_fold', 'fp8_quantize')))))"
    )
    here = manifest(listed_cases(Plan("cpu", 3, ("scale_fold", "fp8_quantize"))))
    for seed in ("1", "2"):
        command = [sys.executable, "-P", "-c", program]
        done = subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == here


def test_part_of_a_list_does_not_depend_on_the_rest_of_it() -> None:
    listed = listed_cases(Plan("cpu", 3, ("gemm_int4", "int4_pack"), per_op=1))
    for count in (1, 2, 3, 7):
        parts = [shard(listed, index, count) for index in range(1, count + 1)]
        assert sorted(str(item.case) for part in parts for item in part) == sorted(str(item.case) for item in listed)
        assert shard(listed[::2], 1, count) == [item for item in listed[::2] if item in parts[0]]
    for index, count in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"shard {index}/{count} does not exist"):
            shard(listed, index, count)


# Shards and resumption -----------------------------------------------------------------------------------------------

SMALL = Plan("cpu", 2, ("scale_fold", "int4_repack"))


def essence(found: report.Report) -> set[tuple[str, str, Status, str, str]]:
    return {(v.case, v.tactic, v.status, v.operands, v.output_sha256) for v in found.verdicts}


def test_merged_shards_are_the_whole_and_a_missing_one_is_refused() -> None:
    """1/3 to 3/3 in any order: the same cases, statuses and bits; the same level, coverage and manifest."""
    whole = certify(SMALL)
    parts = [certify(replace(SMALL, shard=(index, 3))) for index in (1, 2, 3)]
    assert all(0 < len(part.verdicts) < len(whole.verdicts) for part in parts)
    merged = report.merge([parts[2], parts[0], parts[1]])
    assert essence(merged) == essence(whole)
    assert (merged.level_granted, merged.totals, merged.manifest) == (whole.level_granted, whole.totals, whole.manifest)
    assert merged.coverage.codes == whole.coverage.codes
    assert whole.level_granted == 2
    with pytest.raises(MergeError, match="missing shards: 2/3"):
        report.merge([parts[0], parts[2]])
    with pytest.raises(MergeError, match="given twice: 1/3"):
        report.merge([parts[0], parts[0], parts[1], parts[2]])
    assert report.verify(json.loads(report.to_json(merged)), datetime.now(UTC), contract=CONTRACT) == ()


def test_resumed_run_judges_only_what_is_left_and_what_is_in_doubt(backend: Callable[[str], str]) -> None:
    """Kept: whole cases. Again: the last one, which may lack a tactic."""
    plan = replace(SMALL, backend=backend("Two"), ops=("scale_fold",), level=1)
    whole = certify(plan)
    assert {verdict.tactic for verdict in whole.verdicts} == {"one", "two"}
    for kept in (1, 7, 8):  # in the middle of a case, and at its end
        again: list[Verdict] = []
        resumed = certify(plan, done=whole.verdicts[:kept], on_verdict=again.append)
        assert essence(resumed) == essence(whole)
        assert resumed.coverage == whole.coverage
        standing = {verdict.case for verdict in whole.verdicts[:kept]} - {whole.verdicts[kept - 1].case}
        assert {verdict.case for verdict in again} == {verdict.case for verdict in whole.verdicts} - standing
    with pytest.raises(ReportError, match=r"of another run: .* on cpu is no case of this one"):
        certify(plan, done=[replace(whole.verdicts[0], backend="cpu")])
    with pytest.raises(ReportError, match="is of other operands"):
        certify(plan, done=[replace(whole.verdicts[0], operands="0" * 64), whole.verdicts[-1]])


def test_waived_failures_of_a_resumed_run_are_counted_once(backend: Callable[[str], str]) -> None:
    """A waiver's hits are the same whether the run was killed or not, and the level is."""
    plan = replace(SMALL, backend=backend("Wrong"), ops=("scale_fold",), level=1)
    clauses = {verdict.clause for verdict in certify(plan).verdicts if verdict.status is Status.DRIFT}
    waivers = tuple(Waiver("scale_fold/row/*", clause, "https://example.org/1", date(2999, 1, 1)) for clause in sorted(clauses))
    plan = replace(plan, waivers=waivers)
    whole = certify(plan)
    hits = sum(verdict.status is Status.WAIVED for verdict in whole.verdicts)
    assert hits > 2
    assert sum(waiver.hits for waiver in whole.waivers) == hits
    resumed = certify(plan, done=whole.verdicts[: len(whole.verdicts) // 2])
    assert resumed.waivers == whole.waivers
    assert resumed.level_granted == whole.level_granted == 1


# What a backend may declare and refuse -------------------------------------------------------------------------------


def test_right_bits_under_a_vacuous_declaration_are_judged_by_what_was_measured(backend: Callable[[str], str]) -> None:
    """14 bits in no order, computed in binary64. By the declaration zeros would have passed and nothing reached L2; the probes
    show 34 bits or more, and by those every bounded case of `scaled` is judged (AUD-5). In `block` each run of 128 is a sum of
    its own, and probes cannot tell binary64 within it from accumulators that never meet: nothing is held to be measured there."""
    found = certify(Plan(backend("Loose"), 2, ("gemm_w8a8_fp8",), per_op=1))
    assert {verdict.status for verdict in found.verdicts} <= {Status.EXACT, Status.WITHIN, Status.UNSUPPORTED}
    assert {(row.problem.split("/")[1], row.standing) for row in found.audits} == {("scaled", FINER), ("block", CONSISTENT)}
    judged = [verdict for verdict in found.verdicts if verdict.lane == "bounded" and verdict.status is not Status.UNSUPPORTED]
    classes = {verdict.declared for verdict in judged if "/scaled/" in verdict.case}
    assert classes
    assert all(text.startswith("measured: at least 3") for text in classes)
    (claim,) = found.claims
    assert classes <= set(claim.lower_classes)


def test_declaration_that_no_one_can_evaluate_is_a_verdict(backend: Callable[[str], str]) -> None:
    """A datapath that does not take the operands: MALFORMED in every lane that computes, and the run goes on."""
    found = certify(Plan(backend("Foreign"), 3, ("gemm_w8a8_fp8",), per_op=1, repeats=2))
    malformed = [verdict for verdict in found.verdicts if verdict.status is Status.MALFORMED]
    assert {verdict.lane for verdict in malformed} >= {"exact", "bounded", "onehot", "stability"}
    assert all("declaration: ampere_bf16: got operand format e4m3fn" in verdict.reason for verdict in malformed)
    assert {verdict.status for verdict in found.verdicts} <= {Status.MALFORMED, Status.EXACT}


def test_relations_that_need_an_unsupported_problem_are_unsupported(backend: Callable[[str], str]) -> None:
    """A backend without bias fails no relation about the bias; refusing an empty M is a right (BCK-2) that shows nothing."""
    reference = backend("Plain")
    case = "gemm_w4a8_int8/direct/m9n32k128g64/f16"
    bias = run_one(f"{case}/prop_bias/s1", reference)[0]
    assert bias.status is Status.UNSUPPORTED
    assert "no bias and no empty M" in bias.reason
    empty = run_one(f"{case}/prop_empty/s1", reference)[0]
    assert (empty.status, empty.reason.rpartition(": ")[2]) == (Status.UNSUPPORTED, "no bias and no empty M")
    assert run_one(f"{case}/prop_rows/s1", reference)[0].status is Status.EXACT


@pytest.mark.parametrize(("name", "status", "said"), [
    ("Cpu", Status.EXACT, ""),
    ("Raising", Status.RAISED, "no rows to compute"),
    ("Stale", Status.DRIFT, "the next call is as before it"),
])
def test_an_empty_call_raises_nothing_and_leaves_nothing(
    backend: Callable[[str], str], name: str, status: Status, said: str
) -> None:
    """CAS-4, PRP-7: M = 0 is legal once it is supported."""
    found = run_one("gemm_w4a8_int8/direct/m9n32k128g64/f16/prop_empty/s1", backend(name))[0]
    assert found.status is status
    assert said in found.reason
    assert found.judged == (9 * 32 if status is not Status.RAISED else 0)
    assert found.clause == ("PRP-7" if status is not Status.RAISED else "BCK-3")


def test_an_exception_of_supports_refuses_nothing(backend: Callable[[str], str]) -> None:
    """BCK-2: a problem outside the domain is refused by a sentence; a name that does not exist is no refusal."""
    text = f"{ops()['gemm_w4a8_int8'].rejects[0][0]}/reject/s0"
    assert run_one(text, "cpu")[0].status is Status.EXACT
    found = run_one(text, backend("Misspelt"))[0]
    assert (found.status, found.clause) == (Status.RAISED, "BCK-2")
    assert "supports() raised NameError" in found.reason


def test_repro_line_of_every_lane_gives_the_verdict_of_the_run(backend: Callable[[str], str]) -> None:
    """One failing case per lane, run again alone by its id: same status, same reason."""
    found = certify(Plan(backend("Zero"), 3, ("gemm_int4",), per_op=1, repeats=2))
    lanes = {verdict.lane: verdict for verdict in found.verdicts if verdict.status is Status.DRIFT}
    assert {"exact", "onehot", "bounded", "golden", "stability"} <= set(lanes)
    for verdict in lanes.values():
        again = run_one(verdict.case, backend("Zero"), repeats=2)[0]
        told = (again.status, again.reason, again.lane, again.output_sha256)
        assert told == (verdict.status, verdict.reason, verdict.lane, verdict.output_sha256)
