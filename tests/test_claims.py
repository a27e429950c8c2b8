"""The continuation of the case list over what a backend claims (LVL-8), and what rests on it: levels, verify, resumption."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lowbit.conformance import report
from lowbit.conformance.case import Problem
from lowbit.conformance.exit_codes import ExitCode
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.run import Plan, Session, certify, listed_cases, listed_of, misselected
from lowbit.conformance.selection import Listed, audit_list, case_list, claim_cases, class_lanes, class_of, is_claim, shard
from lowbit.conformance.shards import marks_of_run
from lowbit.conformance.verdict import FAILING, Status
from lowbit.conformance.worker import Worker

Command = Callable[..., subprocess.CompletedProcess[str]]
DRAWN = ("encoding", "quantiser", "exact", "onehot", "scale", "bounded")


def _of(refuses: Callable[[Problem], bool]) -> Callable[[Sequence[Problem]], list[bool]]:
    return lambda problems: [refuses(problem) for problem in problems]


def _shared(name: str) -> list[Listed]:
    return [*case_list(ops()[name]), *audit_list(ops()[name])]


def _supported(found: Sequence[Listed], refuses: Callable[[Problem], bool]) -> list[Listed]:
    return [item for item in found if item.lane in DRAWN and not refuses(item.case.problem)]


@cache
def _last(name: str) -> Problem:
    return case_list(ops()[name])[-1].case.problem


KINDS: Mapping[str, Callable[[Problem], bool]] = {
    "one choice of options": lambda problem: class_of(problem) != class_of(_last(problem.op)),
    "whole tiles of 64": lambda problem: any(size % 64 for letter, size in problem.dims if letter in "nk"),
}


NOTHING = {(name, "whole tiles of 64") for name in ("scale_pack_e4m3", "fp8_convert_fnuz", "fp8_requantize")}
"""No problem of the list is supported: it has no N of whole tiles. Nothing is claimed then, and no level granted."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_each_claimed_class_is_drawn_in_each_of_its_lanes(name: str, kind: str) -> None:
    """170 drawn cases are supported, no two alike but for the seed, none refused; every id gives its entry again."""
    shared, refuses = _shared(name), KINDS[kind]
    found = claim_cases(ops()[name], shared, _of(refuses))
    assert all(is_claim(item.case) and not refuses(item.case.problem) for item in found)
    assert not any(is_claim(item.case) for item in shared)
    drawn = _supported([*shared, *found], refuses)
    assert len({(item.case.problem, item.case.pattern) for item in drawn}) == len(drawn)
    if not drawn:
        assert (name, kind) in NOTHING
        return
    assert len(drawn) >= 170
    lanes = {(class_of(item.case.problem), item.lane) for item in drawn}
    assert {(group, lane) for group, _ in lanes for lane in class_lanes(name)} <= lanes
    assert [listed_of(str(item.case)) for item in found[::7]] == found[::7]


def test_the_draws_reach_large_sizes_and_ask_again_alike() -> None:
    """One class of gemm_w4a8_int8: M of 129, 200 and 257, K of 4,096; the same list twice."""
    name = "gemm_w4a8_int8"
    wanted = listed_of("gemm_w4a8_int8/direct/m9n32k128g64/f16/normal/s1").case.problem
    refuses = _of(lambda problem: class_of(problem) != class_of(wanted))
    found = claim_cases(ops()[name], _shared(name), refuses)
    bounded = [item.case.problem for item in found if item.lane == "bounded"]
    assert len(bounded) > 80
    assert {problem.dim("m") for problem in bounded} >= {129, 200, 257}
    assert max(problem.dim("k") for problem in bounded) >= 4096
    assert found == claim_cases(ops()[name], _shared(name), refuses)
    assert {item.case.pattern for item in found} == set(ops()[name].patterns) - {"golden", "tensors"}


def test_the_class_of_an_honest_simulator_has_a_one_hot_case() -> None:
    """The list has none of gemm_w8a8_fp8/scaled with scales per token and channel in bf16; the continuation draws it."""
    wanted = listed_of("gemm_w8a8_fp8/scaled/m64n64k128/bf16/normal/s1").case.problem
    shared, group = _shared("gemm_w8a8_fp8"), class_of(wanted)
    assert not [item for item in shared if class_of(item.case.problem) == group and item.lane == "onehot"]
    found = claim_cases(ops()["gemm_w8a8_fp8"], shared, _of(lambda problem: class_of(problem) != group))
    assert {item.lane for item in found} >= {"exact", "onehot", "bounded"}


def test_one_shape_gives_few_cases_and_draws_end() -> None:
    """A kernel of one problem: each pattern once."""
    shared = _shared("gemm_int4")
    only = next(item.case.problem for item in shared if item.lane == "bounded" and item.case.problem.dim("m") > 16)
    found = claim_cases(ops()["gemm_int4"], shared, _of(lambda problem: problem != only))
    assert {item.case.problem for item in found} <= {only}
    assert len(_supported([*shared, *found], lambda problem: problem != only)) <= 16


def test_shards_hold_the_continuation_once() -> None:
    plan = Plan("", ops=("int4_encode", "scale_pack_e4m3"))
    whole = listed_cases(plan, _of(lambda problem: False))
    assert [item for item in whole if not is_claim(item.case)] == listed_cases(plan)
    assert any(is_claim(item.case) for item in whole)
    parts = [shard(whole, index, 3) for index in (1, 2, 3)]
    assert sorted(str(item.case) for part in parts for item in part) == sorted(str(item.case) for item in whole)


@pytest.fixture(scope="module")
def acme(documented: Mapping[str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References of the backend of docs/backends.md, right, and with rows from 128 on that repeat row 0."""
    source, folder = documented["python"][0], tmp_path_factory.mktemp("acme")
    line = '        return "acme_numpy_w4a8"'
    assert source.count(line) == 1
    spoiled = source.replace(line, f'        outputs["d"].memory[128:] = outputs["d"].memory[:1]\n{line}')
    found = {}
    for name, text in (("right", source), ("rows", spoiled)):
        (folder / f"{name}.py").write_text(text)
        found[name] = f"python:{folder / name}.py:Acme"
    return found


def test_a_fault_beyond_128_rows_of_a_narrow_backend_is_seen(acme: dict[str, str]) -> None:
    """The list holds 19 drawn cases of what it claims, none of them bounded with M above 128."""
    found = certify(Plan(acme["rows"], ops=("gemm_w4a8_int8",)))
    failing = [verdict for verdict in found.verdicts if verdict.status in FAILING]
    assert {verdict.status for verdict in failing} == {Status.DRIFT}
    assert {verdict.lane for verdict in failing} >= {"exact", "bounded"}
    rows = [listed_of(verdict.case).case.problem.dim("m") for verdict in failing]
    assert min(rows) > 128
    assert all(is_claim(listed_of(verdict.case).case) for verdict in failing if verdict.lane == "bounded")
    assert found.level_granted == 0
    assert misselected(found) == ()


def _cut(found: report.Report, keep: Callable[[str], bool]) -> report.Report:
    """The report of the same run over fewer cases, as if no others had been selected."""
    verdicts = [verdict for verdict in found.verdicts if keep(verdict.case)]
    return report.build(
        contract=found.contract, subject=found.subject, run=found.run, cases=filter(keep, found.manifest.cases),
        verdicts=verdicts, requested=found.level_requested, codes=found.coverage.codes,
    )


def test_a_report_over_other_cases_than_the_contracts_is_found() -> None:
    """Cases taken out or added."""
    found = certify(Plan("cpu", ops=("int4_encode",)))
    assert found.level_granted == 2
    assert misselected(found) == ()
    gone = next(case for case in found.manifest.cases if not is_claim(listed_of(case).case) and "/reject/" not in case)
    lacks, *_ = misselected(_cut(found, lambda case: case != gone))  # what is drawn after it may change with it
    assert lacks.startswith("manifest: it lacks ")
    assert sum(is_claim(listed_of(case).case) for case in found.manifest.cases) == 170 - 145
    assert misselected(_cut(found, lambda case: "/reject/" in case))[0].startswith("manifest: it lacks ")
    stranger = replace(found.verdicts[0], case=found.verdicts[0].case.rpartition("/")[0] + "/s9000")
    more = report.build(
        contract=found.contract, subject=found.subject, run=found.run, cases=[*found.manifest.cases, stranger.case],
        verdicts=[*found.verdicts, stranger], requested=2, codes=found.coverage.codes,
    )
    said = f"manifest: it holds 1 of the cases that the contract's list does not have, the first {stranger.case}"
    assert misselected(more)[-1] == said


@pytest.mark.parametrize("option", [("--per-op", 0), ("--per-op", -3), ("--repeats", 0)])
def test_a_run_of_nothing_is_a_usage_error(inside: Command, tmp_path: Path, option: tuple[object, ...]) -> None:
    done = inside("certify", "cpu", "--ops", "int4_pack", *option, "--out", "out")
    assert done.returncode == ExitCode.USAGE
    assert str(option[0]) in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_shortened_run_ends_well_without_a_level_and_is_verified(inside: Command, tmp_path: Path) -> None:
    """LVL-7: exit code 0, no level, and the report says so."""
    done = inside("certify", "cpu", "--ops", "scale_pack_e4m3", "--level", "L3", "--repeats", 1, "--per-op", 1, "--out", "out")
    assert done.returncode == ExitCode.REACHED
    assert done.stdout.startswith("cpu: no level granted")
    assert "shortened run: 1 of 170 drawn cases per op, 1 of 100 repeats; a level asks for the whole list" in done.stdout
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (data["run"]["per_op"], data["run"]["repeats"], data["level_granted"]) == (1, 1, None)
    assert inside("verify", "out/report.json").returncode == ExitCode.REACHED


def test_verdicts_of_another_kernel_are_not_resumed(inside: Command, acme: dict[str, str], tmp_path: Path) -> None:
    """The file of verdicts bears the digest of the backend's code."""
    file, partial = tmp_path / "kernel.py", tmp_path / "out" / "verdicts.jsonl"
    source = Path(acme["right"].split(":")[1]).read_text()
    file.write_text(source)
    plan = Plan(f"python:{file}:Acme", 1, ("gemm_w4a8_int8",), per_op=1)
    partial.parent.mkdir()
    with Worker(plan.backend) as worker:
        session = Session(plan, worker)
        session.open()
        report.begin_partial(partial, marks_of_run(plan, session, 1))
    arguments = ("certify", plan.backend, "--ops", "gemm_w4a8_int8", "--per-op", 1, "--level", "L1", "--out", "out", "--resume")
    file.write_text(source + "# another kernel\n")
    done = inside(*arguments)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "are of another run: it differs in code; repeat the command" in done.stderr
    assert "differs in per_op" in inside(*(2 if word == 1 else word for word in arguments)).stderr.replace("code, ", "")
    file.write_text(source)
    assert inside(*arguments).returncode == ExitCode.REACHED
    assert not partial.exists()
