"""The report: what follows from verdicts, who may be granted a level, and which edits of a file are noticed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from lowbit.conformance import report as module
from lowbit.conformance.case import Case, Operands, Problem, Tensor
from lowbit.conformance.junit import junit
from lowbit.conformance.report import (
    LEVELS,
    Change,
    Coverage,
    Host,
    MergeError,
    OutputError,
    Report,
    ReportError,
    Run,
    Subject,
    append_verdict,
    begin_partial,
    build,
    check_partial,
    diff,
    from_json,
    granted,
    load,
    load_partial,
    manifest_of,
    merge,
    power_of,
    prepare_folder,
    schema_json,
    sentence,
    to_json,
    unexecuted,
    verify,
    where_executed,
    write_atomically,
)
from lowbit.conformance.verdict import Execution, Status, Verdict, Worst
from lowbit.conformance.waivers import Waiver
from lowbit.references.formats import BF16, E4M3FN, INT4

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def _samples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_samples", Path(__file__).with_name("report_samples.py"))
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


samples = _samples()


@pytest.fixture(scope="module")
def sample() -> Report:
    """The faulty sample: 259 verdicts over all ops."""
    found: Report = samples.report()
    return found


@pytest.fixture(scope="module")
def data(sample: Report) -> str:
    """Its JSON text."""
    return to_json(sample)


def _pack(pattern: str = "codes", seed: int = 0, **given: Any) -> Verdict:
    found: Verdict = samples.verdict(f"int4_pack/plain/m8k64/plain/{pattern}/s{seed}", **given)
    return found


def _gemm(pattern: str, seed: int = 0, m: int = 16, k: int = 256, **given: Any) -> Verdict:
    power = {"power": {"zero output": True, "bias dropped": True}} if pattern == "lognormal" else {}
    found: Verdict = samples.verdict(f"gemm_w4a16/plain/m{m}n64k{k}g64/bf16/{pattern}/s{seed}", **{**power, **given})
    return found


REJECTED = Verdict("int4_pack/plain/m8k63/plain/reject/s0", "acme", "default", "reject", 2, Status.EXACT)


def _small(verdicts: list[Verdict], **given: Any) -> Report:
    run = Run("2026-11-20T01:00:00+00:00", "2026-11-20T02:00:00+00:00", 3600.0, "lowbit certify acme", 7, 170, 100,
              hosts=(Host("3", "2", "x", 2),))
    standard = {"suite": "2026.11.0", "contract": "1", "subject": Subject("acme", "acme", "cpu"), "run": run, "requested": 2,
                "cases": [v.case for v in verdicts]}
    return build(verdicts=verdicts, **{**standard, **given})


def _resigned(data: dict[str, Any]) -> str:
    """The text of edited data with a digest that fits it."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "digest": hashlib.sha256(text.encode()).hexdigest()})


# Schema and text ---------------------------------------------------------------------------------------------------------


def test_the_shipped_schema_is_the_one_in_force() -> None:
    shipped = Path(module.__file__).with_name("report.schema.json").read_text(encoding="utf-8")
    assert shipped == schema_json(), "write lowbit.conformance.report.schema_json() to conformance/report.schema.json"


def test_no_record_of_the_schema_takes_strange_fields() -> None:
    schema = json.loads(schema_json())
    records = [schema, *schema["$defs"].values()]
    closed = [record for record in records if "properties" in record]
    assert len(closed) == 18
    assert [record["title"] for record in closed if record["additionalProperties"] is not False] == []


def test_a_report_reads_back_as_it_was(sample: Report, data: str, tmp_path: Path) -> None:
    assert from_json(data) == sample
    write_atomically(tmp_path / "report.json", data)
    assert load(tmp_path / "report.json") == sample
    assert to_json(load(tmp_path / "report.json")) == data


def test_the_text_is_canonical(data: str) -> None:
    parsed = json.loads(data)
    assert data == json.dumps(parsed, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
    digest = parsed.pop("digest")
    assert digest == hashlib.sha256(json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        target: Any = data
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
    return edit


@pytest.mark.parametrize("edit", [
    _put("mood", value="good"),
    _put("run", "mood", value="good"),
    _put("verdicts", 0, "mood", value="good"),
    _put("verdicts", 0, "level", value="3"),
    _put("totals", "selected", value="259"),
    _put("verdicts", 0, "status", value="FINE"),
    _put("verdicts", 0, "seconds", value=None),
    _put("schema", value="lowbit-report/0"),
    _put("level_requested", value=2.5),
    _put("run", "shard", value=[1, 1, 1]),
    _put("waivers", 0, "expires", value="soon"),
    lambda data: data.pop("contract"),
    lambda data: data["verdicts"][0].pop("case"),
])
def test_a_breach_of_the_schema_is_refused(data: str, edit: Callable[[dict[str, Any]], None]) -> None:
    changed = json.loads(data)
    edit(changed)
    text = _resigned(changed)
    with pytest.raises(ReportError, match="is not a lowbit-report/3"):
        from_json(text)
    assert verify(json.loads(text), NOW, contract="1", suite="2026.11.0") != ()


@pytest.mark.parametrize(("name", "edit"), [
    ("totals", _put("totals", "selected", value=251)),
    ("totals", _put("totals", "statuses", "EXACT", value=0)),
    ("totals", _put("totals", "not_run", value=1)),
    ("counts", _put("counts", 0, "executed", value=6)),
    ("claims", _put("claims", 3, "supported", value=21)),
    ("claims", _put("claims", 5, "lower_classes", value=[])),
    ("failures", _put("failures", value=[])),
    ("power", _put("power", "gemm_w4a16/folded", "bias dropped", value=3)),
    ("coverage", _put("coverage", "products", value=10**15)),
    ("coverage", _put("coverage", "long_k", "gemm_nvfp4", value=99)),
    ("level_granted", _put("level_granted", value=3)),
    ("levels", _put("levels", 1, "outcome", value="granted")),
    ("manifest", _put("manifest", "sha256", value="0" * 64)),
    ("WAIVED without a reason", _put("verdicts", 0, "status", value="WAIVED")),
    ("not in the manifest", lambda data: data["manifest"]["cases"].pop()),
])
def test_what_does_not_follow_from_the_verdicts_is_refused(data: str, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    changed = json.loads(data)
    edit(changed)
    with pytest.raises(ReportError, match=name):
        from_json(_resigned(changed))


def test_a_change_after_the_fact_breaks_the_digest(data: str) -> None:
    changed = json.loads(data)
    changed["subject"]["describe"]["driver"] = "571.0"
    with pytest.raises(ReportError, match="was changed after it was written"):
        from_json(json.dumps(changed))
    from_json(_resigned(changed))


def test_numbers_that_json_cannot_hold_become_the_largest() -> None:
    worst = Worst("d", (0, 0), "0x7fc0", "0x0", "0x0", "nan", "0.0", 9, float("nan"))
    heat = ((float("inf"), np.float64(0.5)),)
    found = _small([_gemm("lognormal", status=Status.DRIFT, reason="NaN", wrong=1, worst=worst, heat=heat)])
    (verdict,) = found.verdicts
    assert verdict.worst is not None
    assert verdict.worst.share == sys.float_info.max
    assert verdict.heat == ((sys.float_info.max, 0.5),)
    assert "Infinity" not in to_json(found)


def test_numpy_scalars_are_written_as_numbers() -> None:
    assert _small([_pack(judged=np.int64(5), total=np.int64(5), seconds=np.float32(0.5))]).verdicts[0].judged == 5


# What follows from verdicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "message"), [
    (_pack(execution=Execution.COMPILED), "compiled and never run"),
    (_pack(lane="bounded"), "lane 'bounded' belongs to L2, the verdict says L1"),
    (_pack(lane="cheap"), "belongs to no level"),
    (_pack(wrong=1), "EXACT with 1 wrong"),
    (_pack(judged=65), "impossible"),
    (_pack(status=Status.UNSUPPORTED), "UNSUPPORTED without a reason"),
    (replace(_pack(), case="int4_pack/plain"), "malformed"),
])
def test_a_verdict_that_cannot_be_is_refused(bad: Verdict, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        _small([bad])


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_a_shard_that_cannot_be_is_refused(shard: tuple[int, int]) -> None:
    run = replace(_small([_pack()]).run, shard=shard)
    with pytest.raises(ReportError, match=r"shard \d of \d is impossible"):
        _small([_pack()], run=run)


def test_two_verdicts_on_one_thing_are_refused() -> None:
    with pytest.raises(ReportError, match="more than one verdict in lane encoding"):
        _small([_pack(), _pack(seconds=1.0)])
    assert _small([_pack(), _pack(tactic="split2")]).totals.selected == 2


def test_totals_and_columns() -> None:
    found = _small([
        _pack(seed=0), _pack(seed=1, execution=Execution.EMULATED), _pack(seed=2, status=Status.DRIFT, reason="x", wrong=1),
        _pack(seed=3, status=Status.UNSUPPORTED, reason="no"),
        _pack(seed=4, status=Status.WAIVED, reason="waived by w-00000000 (x): y"),
        _pack(seed=5, status=Status.UNSUPPORTED, reason="compiled, never run", execution=Execution.COMPILED),
        _pack(seed=0, tactic="b"), REJECTED,
    ], cases=[*(_pack(seed=seed).case for seed in range(9)), REJECTED.case])
    assert (found.totals.selected, found.totals.cases, found.totals.not_run) == (8, 7, 3)
    counted = {status: count for status, count in found.totals.statuses.items() if count}
    assert counted == {"EXACT": 4, "DRIFT": 1, "UNSUPPORTED": 2, "WAIVED": 1}
    (row,) = found.counts
    assert (row.executed, row.emulated, row.compiled, row.rejected) == (2, 1, 1, 1)
    assert (row.failing, row.waived, row.unsupported) == (1, 1, 1)


def test_where_it_ran_is_never_blurred() -> None:
    emulated = _pack(seed=1, execution=Execution.EMULATED)
    failed = _pack(seed=2, status=Status.DRIFT, reason="x")
    assert where_executed([_pack(), failed]) == "executed"
    assert where_executed([emulated]) == "emulated"
    assert where_executed([_pack(), emulated]) == "partly emulated"
    assert where_executed([failed]) == "nothing passed"
    assert unexecuted(_small([_gemm("vector"), emulated])) == ("int4_pack",)


def test_claims_count_problems_not_cases() -> None:
    no: dict[str, Any] = {"status": Status.UNSUPPORTED, "reason": "K too long"}
    (claim,) = _small([
        _gemm("vector", 0), _gemm("vector", 1), _gemm("onehot", 0), _gemm("vector", k=512, **no), _gemm("onehot", k=512, **no),
        _gemm("vector", k=1024, status=Status.UNSUPPORTED, reason="K far too long", declared="as the contract"),
        _gemm("vector", m=1, declared="14 fraction bits"), _gemm("vector", 0, tactic="split2", **no),
    ]).claims
    assert (claim.op, claim.supported, claim.total) == ("gemm_w4a16", 2, 4)
    assert claim.reasons == {"K far too long": 1, "K too long": 1}
    assert claim.lower_classes == ("14 fraction bits",)


def test_power_counts_passing_cases_alone() -> None:
    verdicts = [
        _gemm("lognormal", 0, power={"zero output": True, "bias dropped": False}),
        _gemm("lognormal", 1, power={"zero output": True}),
        _gemm("lognormal", 2, power={"zero output": True, "bias dropped": True}, status=Status.DRIFT, reason="x"),
        _pack(),
    ]
    assert power_of(verdicts) == {"gemm_w4a16/plain": {"bias dropped": 0, "zero output": 2}}


def test_a_failure_is_a_sentence_and_a_line() -> None:
    worst = Worst("d", (3, 4), "0x41", "0x3f", "0x40", "2.5", "2.1", 1, 1.5)
    bad = _gemm("lognormal", tactic="split4", status=Status.DRIFT, reason="off by one.", wrong=2, worst=worst)
    (failure,) = _small([bad, _pack()]).failures
    assert failure.sentence == ("off by one. 2 of 64 judged elements are outside; worst is d[3, 4]: got 0x41 (2.5), "
                                "admissible 0x3f..0x40, exact 2.1, 1 ulp outside")
    assert failure.repro == f"lowbit run '{bad.case}' --backend acme --tactic split4"
    assert sentence(_pack()) == "EXACT"


# Levels --------------------------------------------------------------------------------------------------------------------

_PATTERNS = ("onehot", "scaleprobe", "audit_cut", "repeat")
WHOLE = [
    *(_pack(seed=100 + seed) for seed in range(44)), _pack("repeat"), *(_gemm(pattern) for pattern in _PATTERNS),
    *(_gemm("exactw14", 100 + seed) for seed in range(44)), *(_gemm("lognormal", 100 + seed) for seed in range(44)),
]
"""LVL-8: 44 drawn cases in the lanes of a level, of the one class that each op claims here."""


def _level(verdicts: list[Verdict], requested: int = 3) -> tuple[int | None, str]:
    """The level granted and the reasons of the first that is not."""
    best, results = granted(verdicts, power_of(verdicts), requested)
    first = next(result for result in results if result.outcome != "granted")
    return best, "; ".join(first.reasons)


def _without(pattern: str, *more: Verdict) -> list[Verdict]:
    return [verdict for verdict in WHOLE if f"/{pattern}/" not in verdict.case] + list(more)


def test_a_whole_run_is_granted_what_was_asked() -> None:
    assert _level(WHOLE) == (3, "decided by `lowbit eval`, over a report that grants L3")
    assert _level(WHOLE, 1) == (1, "level L1 was requested")
    assert _level(WHOLE, 4)[0] == 3
    best, results = granted(WHOLE, power_of(WHOLE), 2)
    assert [result.outcome for result in results] == ["granted", "granted", "granted", "not requested", "not run"]
    assert [result.cases for result in results] == [0, 44 + 46, 44 + 1, 2, 0]
    assert results[2].reasons == ("over 2 ops and 2 of 2 selected problems",)
    assert best == 2


FAIL: dict[str, Any] = {"status": Status.DRIFT, "reason": "x", "wrong": 1}
NO: dict[str, Any] = {"status": Status.UNSUPPORTED, "reason": "no"}


@pytest.mark.parametrize(("verdicts", "level", "reason"), [
    ([], None, "no op is claimed"),
    ([_pack(**NO), _gemm("lognormal", **NO)], None, "no op is claimed"),
    ([_pack(status=Status.CRASHED, reason="signal 11")], None, "every run raised, crashed or timed out"),
    ([*WHOLE, _pack(seed=1, **FAIL)], 0, "1 verdict DRIFT in int4_pack"),
    ([*WHOLE, _gemm("lognormal", 1, **FAIL)], 1, "1 verdict DRIFT in gemm_w4a16"),
    ([*WHOLE, _gemm("lognormal", 1, status=Status.UNTRUSTED, reason="zero passes")], 1, "1 verdict UNTRUSTED in gemm_w4a16"),
    ([*WHOLE, _gemm("repeat", 1, **FAIL)], 2, "1 verdict DRIFT in gemm_w4a16"),
    (_without("onehot"), 0, "gemm_w4a16: no case was judged in onehot"),
    (_without("exactw14"), 0, "gemm_w4a16: no case was judged in exact"),
    (_without("exactw14", _gemm("exactw14", **NO)), 0, "gemm_w4a16: no case was judged in exact"),
    (_without("scaleprobe", _gemm("scaleprobe", **NO)), 0, "gemm_w4a16: no case was judged in scale"),
    (_without("codes"), 0, "int4_pack: no case was judged in any lane"),
    (_without("lognormal"), 1, "gemm_w4a16: no case was judged in bounded"),
    (_without("lognormal", _gemm("lognormal", power={"zero output": True, "bias dropped": False})), 1,
     "gemm_w4a16/plain: no passing case would have shown bias dropped"),
    (_without("lognormal", _gemm("lognormal", power={})), 1, "gemm_w4a16/plain: the power of its cases was not measured"),
    ([v for v in WHOLE if "int4_pack" not in v.case or "repeat" not in v.case], 2, "int4_pack: no case was judged in stability"),
])
def test_why_not_higher(verdicts: list[Verdict], level: int | None, reason: str) -> None:
    found, said = _level(verdicts)
    assert found == level
    assert reason in said


def test_a_refusal_in_the_reject_lane_claims_and_executes_nothing() -> None:
    nothing = [REJECTED, *(_pack(seed=seed, **NO) for seed in range(3))]
    assert _level(nothing) == (None, "no op is claimed: the backend supports none of the selected problems")
    found = _small(nothing)
    assert [(claim.supported, claim.total) for claim in found.claims] == [(0, 1)]
    assert where_executed(found.verdicts) == "nothing passed"
    assert found.coverage.problems == {}
    assert _level([*WHOLE, REJECTED], 2)[0] == 2
    assert _level([*WHOLE, replace(REJECTED, **FAIL, judged=1, total=1)])[1] == "1 verdict DRIFT in int4_pack"


def test_problems_that_come_from_files_may_be_unsupported() -> None:
    assert _level([*WHOLE, _gemm("vector", **NO)])[0] == 3
    assert _level([*WHOLE, _gemm("vector", **FAIL)])[0] == 0


def test_no_level_stands_over_an_absent_lower_one() -> None:
    best, results = granted([*WHOLE, _pack(seed=1, **FAIL)], power_of(WHOLE), 3)
    assert best == 0
    assert [result.outcome for result in results] == ["granted", "refused", "refused", "refused", "not run"]
    assert results[2].reasons == ("L1 is not granted",)


def test_a_waiver_grants_aloud() -> None:
    _, results = granted([*WHOLE, _pack(seed=1, status=Status.WAIVED, reason="waived by w-00000000 (x): y")], power_of(WHOLE), 3)
    assert (results[1].outcome, results[1].waived) == ("granted", 1)
    assert "waived 1" in results[1].reasons
    assert results[2].reasons == ("over 2 ops and 2 of 2 selected problems",)


def test_each_claimed_class_needs_its_lanes() -> None:
    """LVL-8: another choice of options is another class; the sentence names it with its lane. UNSUPPORTED claims nothing."""

    def other(pattern: str, name: str = "f16", **given: Any) -> Verdict:
        found = _gemm(pattern, **given)
        return replace(found, case=found.case.replace("/bf16/", f"/{name}/"))

    assert _level([*WHOLE, other("exactw14", **NO), other("onehot", **NO), other("lognormal", **NO)])[0] == 3
    assert _level([*WHOLE, other("vector")]) == (
        0, "gemm_w4a16: no case was judged in exact of plain/f16; gemm_w4a16: no case was judged in onehot of plain/f16")
    assert _level([*WHOLE, other("exactw14"), other("onehot")]) == (1, "gemm_w4a16: no case was judged in bounded of plain/f16")
    assert _level([*WHOLE, other("exactw14"), other("onehot"), other("lognormal")])[0] == 3
    failing = other("onehot", status=Status.CRASHED, reason="signal 9")
    assert "in onehot of plain/f16" in _level([*WHOLE, other("exactw14"), failing])[1]
    many = [other("scaleprobe", f"o{number}") for number in range(7)]
    assert "in exact of plain/o0, plain/o1, plain/o2, plain/o3 and 3 more; " in _level([*WHOLE, *many])[1]
    packed = [replace(_pack("vector"), case=_pack("vector").case.replace("/plain/vector", "/int8/vector"))]
    assert _level([*WHOLE, *packed]) == (0, "int4_pack: no case was judged in encoding of plain/int8")


@pytest.mark.parametrize(("pattern", "level", "lanes"), [
    ("codes", 0, "int4_pack: 43 drawn cases judged in encoding"),
    ("lognormal", 1, "gemm_w4a16: 43 drawn cases judged in bounded"),
])
def test_a_level_needs_44_drawn_cases_of_each_op(pattern: str, level: int, lanes: str) -> None:
    """LVL-8. Cases count, not tactics; stored vectors are not drawn."""
    fewer = [verdict for verdict in WHOLE if not verdict.case.endswith(f"/{pattern}/s100")]
    assert len(fewer) == len(WHOLE) - 1
    again = next(verdict for verdict in fewer if f"/{pattern}/" in verdict.case)
    more = [*fewer, replace(again, tactic="split2"), _pack("vector"), _gemm("vector")]
    said = f"{lanes}, 44 are the least: the run is shortened, or the backend refuses too many of the sizes that are drawn"
    assert _level(more) == (level, said)


def _short(per_op: int, repeats: int, requested: int) -> Report:
    return _small(WHOLE, run=replace(_small(WHOLE).run, per_op=per_op, repeats=repeats), requested=requested)


@pytest.mark.parametrize(("per_op", "repeats", "requested", "said"), [
    (10, 100, 2, "shortened run: 10 of 170 drawn cases per op"),
    (169, 99, 3, "shortened run: 169 of 170 drawn cases per op, 99 of 100 repeats"),
    (170, 99, 3, "shortened run: 99 of 100 repeats"),
    (170, 99, 2, ""),
    (400, 1000, 3, ""),
])
def test_a_shortened_run_is_granted_no_level(per_op: int, repeats: int, requested: int, said: str) -> None:
    """LVL-7: not even L0; JUnit and the text of the report say what was left out. Repeats are of L3."""
    found = _short(per_op, repeats, requested)
    assert (found.run.per_op, found.run.repeats) == (per_op, repeats)
    assert found.level_granted == (None if said else requested)
    outcomes = {row.outcome for row in found.levels[: requested + 1]}
    assert outcomes == ({"refused"} if said else {"granted"})
    if said:
        assert {row.reasons for row in found.levels[: requested + 1]} == {(said,)}
    suites = ET.fromstring(junit(found)).findall("testsuite")
    told = {suite.find("properties/property[@name='cases']").get("value") for suite in suites}  # type: ignore[union-attr]
    assert told == {said or "the whole list"}
    changed = json.loads(to_json(found))
    changed["run"]["per_op"] = 170 if per_op < 170 else 169
    with pytest.raises(ReportError, match=r"level(s|_granted) does not follow"):
        from_json(_resigned(changed))


@pytest.mark.parametrize(("per_op", "repeats"), [(0, 100), (-3, 100), (170, 0)])
def test_a_run_of_no_cases_is_refused(per_op: int, repeats: int) -> None:
    with pytest.raises(ReportError, match="expected 1 or more of both"):
        _short(per_op, repeats, 2)


def test_what_is_not_supported_counts_in_the_claim() -> None:
    best, results = granted([*WHOLE, _gemm("lognormal", k=512, **NO)], power_of(WHOLE), 2)
    assert best == 2
    assert results[2].reasons == ("over 2 ops and 2 of 3 selected problems",)


def test_every_lane_belongs_to_one_level() -> None:
    lanes = [lane for level in LEVELS for lane in level.lanes]
    assert len(lanes) == len(set(lanes))
    assert [level.number for level in LEVELS] == [0, 1, 2, 3, 4]


def test_a_part_of_a_run_grants_nothing() -> None:
    whole = _small(WHOLE)
    assert whole.level_granted == 2
    unfinished = _small(WHOLE, cases=[*(v.case for v in WHOLE), _pack(seed=9).case])
    assert (unfinished.level_granted, unfinished.levels[2].outcome) == (None, "refused")
    assert unfinished.levels[2].reasons == ("the run is not complete: 1 selected case without a verdict",)
    shard = _small(WHOLE, run=replace(whole.run, shard=(1, 2)))
    assert (shard.level_granted, shard.levels[2].reasons) == (None, ("shard 1 of 2 alone grants nothing: merge all shards",))


# Coverage ------------------------------------------------------------------------------------------------------------------


def _operands(**tensors: Tensor) -> Operands:
    return Operands(tensors)


CASE = Case(Problem("gemm_w4a16", "plain", (("m", 2),), ()), "uniform", 0)


def test_codes_are_counted_by_tensor() -> None:
    coverage = Coverage()
    coverage.add(CASE, _operands(w=Tensor(np.array([[0, 15], [4, 4]], np.uint8), INT4), d=Tensor(np.zeros(3, np.uint16), BF16)))
    coverage.add(CASE, _operands(w=Tensor(np.array([1], np.uint8), INT4), a=Tensor(np.array([0x80, 0xFF], np.uint8), E4M3FN)))
    a, w = coverage.codes()
    assert (w.op, w.tensor, w.format, w.bits, w.elements) == ("gemm_w4a16", "w", "int4", 4, 5)
    assert w.bitmap == "8013"  # bits 0, 1, 4 and 15
    assert (a.tensor, a.elements, a.bitmap) == ("a", 2, "80000000000000000000000000000001" + "0" * 32)


def test_counts_of_codes_merge() -> None:
    first, second = Coverage(), Coverage()
    first.add(CASE, _operands(w=Tensor(np.arange(8, dtype=np.uint8), INT4)))
    second.add(CASE, _operands(w=Tensor(np.arange(6, 16, dtype=np.uint8), INT4)))
    first.merge(second.codes())
    (row,) = first.codes()
    assert (row.elements, row.bitmap) == (18, "ffff")


def test_codes_are_counted_beyond_one_chunk() -> None:
    codes = np.zeros((1 << 20) + 3, dtype=np.uint8)
    codes[-1] = 9
    coverage = Coverage()
    coverage.add(CASE, _operands(w=Tensor(codes, INT4)))
    assert coverage.codes()[0].bitmap == "0201"


def test_sizes_patterns_and_kernels() -> None:
    found = _small([
        _gemm("lognormal", 0, m=17, k=4160, kernel="mma", products=100), _gemm("lognormal", 1, m=17, k=4160, products=50),
        _gemm("onehot", 0, m=32, k=4096, tactic="split2"), _gemm("vector", 0, m=5, k=64, **NO, products=7),
        _gemm("vector", 0, m=6, k=64, status=Status.CRASHED, reason="signal 9"), _pack(),
    ]).coverage
    rows = found.residues["gemm_w4a16"]
    assert rows["m mod 16"] == (1, 2, *[0] * 14)
    assert rows["n mod 8"] == (3, *[0] * 7)
    assert rows["k mod 64"] == (3, *[0] * 63)
    assert rows["n mod 16"] == (3, *[0] * 15)
    assert found.patterns["gemm_w4a16/plain/bf16"] == {"lognormal": 2, "onehot": 1}
    assert found.problems == {"gemm_w4a16": 2, "int4_pack": 1}
    assert found.long_k == {"gemm_w4a16": 2}  # 4,160 > 64^2, 4,096 is not
    assert found.median_k == 4160.0
    assert found.tactics["gemm_w4a16"] == {"default": 2, "split2": 1}
    assert found.kernels == {"gemm_w4a16": {"mma (claimed)": 1}}
    assert found.products == 150


# Files ---------------------------------------------------------------------------------------------------------------------


def test_verdicts_are_kept_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    for verdict in WHOLE:
        append_verdict(path, verdict)
    assert load_partial(path) == tuple(WHOLE)
    assert path.read_text().count("\n") == len(WHOLE)


def test_a_torn_line_costs_one_verdict(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    for verdict in WHOLE[:3]:
        append_verdict(path, verdict)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert load_partial(path) == tuple(WHOLE[:2])
    append_verdict(path, WHOLE[3])
    assert load_partial(path) == (*WHOLE[:2], WHOLE[3])
    path.write_bytes(b'{"case": "x')
    assert load_partial(path) == ()
    append_verdict(path, WHOLE[0])
    assert load_partial(path) == (WHOLE[0],)


def test_a_whole_line_that_is_no_verdict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    append_verdict(path, WHOLE[0])
    for line in ('{"case": "x"}', "{", '{"mood": 1, ' + path.read_text()[1:]):
        other = tmp_path / "other.jsonl"
        other.write_text(path.read_text() + line + "\n")
        with pytest.raises(ReportError, match=r"other\.jsonl does not hold one verdict per line"):
            load_partial(other)
    with pytest.raises(ReportError, match="cannot be read"):
        load_partial(tmp_path / "absent.jsonl")


def test_verdicts_say_what_run_they_are_of(tmp_path: Path) -> None:
    """The first line: a run is resumed only under the same. An older file without it is of no run."""
    path = tmp_path / "verdicts.jsonl"
    run = {"backend": "acme", "code": "1f", "shard": (1, 1), "describe": {"driver": "5"}}
    begin_partial(path, run)
    append_verdict(path, WHOLE[0])
    assert load_partial(path) == (WHOLE[0],)
    check_partial(path, run)
    for other in ({"code": "2f"}, {"describe": {"driver": "6"}}, {"shard": (1, 2)}):
        with pytest.raises(ReportError, match=rf"are of another run: it differs in {next(iter(other))}; repeat the command"):
            check_partial(path, run | other)
    begin_partial(path, run)
    assert load_partial(path) == ()
    append_verdict(tmp_path / "old.jsonl", WHOLE[0])
    with pytest.raises(ReportError, match="differs in backend, code, describe, shard"):
        check_partial(tmp_path / "old.jsonl", run)
    path.write_text('{"run":{"backend"')
    with pytest.raises(ReportError, match="does not begin with what run"):
        check_partial(path, run)


_WRITER = """
import sys
from pathlib import Path
from lowbit.conformance.report import append_verdict
from lowbit.conformance.verdict import Status, Verdict
for seed in range(10**9):
    case = f"int4_pack/plain/m8k64/plain/codes/s{seed}"
    append_verdict(Path(sys.argv[1]), Verdict(case, "acme", "default", "encoding", 1, Status.EXACT))
    if seed == 20:
        print("ready", flush=True)
"""


def test_kill_9_keeps_what_was_reached(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        os.kill(writer.pid, signal.SIGKILL)
    kept = load_partial(path)
    assert len(kept) >= 21
    assert [verdict.case.rsplit("/", 1)[1] for verdict in kept] == [f"s{seed}" for seed in range(len(kept))]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match=r"output folder .*/file cannot be written"):
        prepare_folder(blocked)
    with pytest.raises(OutputError, match="cannot be written"):
        prepare_folder(blocked / "below")
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomically(blocked / "report.json", "x")
    with pytest.raises(OutputError, match="cannot be written"):
        append_verdict(tmp_path, WHOLE[0])
    assert prepare_folder(tmp_path / "new" / "deep").is_dir()
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_atomically(path, "new")
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


# Merge, diff, verify -------------------------------------------------------------------------------------------------------


def _shards(n: int = 3) -> list[Report]:
    found = samples.verdicts()
    cases = [verdict.case for verdict in found]
    return [samples.report(found[i::n], shard=(i + 1, n), cases=cases) for i in range(n)]


def test_merged_shards_are_the_whole_run(sample: Report) -> None:
    one, two, three = _shards()
    assert {report.level_granted for report in (one, two, three)} == {None}
    merged = merge([three, one, two])
    for name in ("verdicts", "totals", "counts", "claims", "failures", "power", "levels", "level_granted", "manifest",
                 "declarations"):
        assert getattr(merged, name) == getattr(sample, name), name
    assert merged.waivers[0].hits == sample.waivers[0].hits == 2
    assert merged.run.shard == (1, 1)
    assert merged.run.seconds == 3 * 2522.0
    assert verify(json.loads(to_json(merged)), NOW, contract="1", suite="2026.11.0") == ()


def _with(report: Report, **changes: Any) -> Report:
    return build(
        suite=report.suite, contract=report.contract, subject=report.subject, run=replace(report.run, **changes),
        cases=report.manifest.cases, verdicts=report.verdicts, requested=report.level_requested, waivers=report.waivers,
    )


def test_a_merge_that_is_not_complete_is_refused() -> None:
    one, two, three = _shards()
    cases = list(one.manifest.cases)
    lost = samples.report([v for v in samples.verdicts()[1::3] if "int4_pack" not in v.case], shard=(2, 3), cases=cases)
    shared = samples.report([*samples.verdicts()[1::3], samples.verdicts()[0]], shard=(2, 3), cases=cases)
    fewer = samples.report(samples.verdicts()[1::3], shard=(2, 3), cases=[*cases, _pack(seed=77).case])
    four = samples.report(samples.verdicts()[1::3], shard=(2, 4), cases=cases)
    for reports, message in (
        ([], "nothing to merge"),
        ([one, three], "missing shards: 2/3"),
        ([one, two, two], "missing shards: 3/3; shards given twice: 2/3"),
        ([one, two, three, three], "shards given twice: 3/3"),
        ([one, four, three], "differ in the number of shards"),
        ([one, fewer, three], "differ in the manifest"),
        ([one, lost, three], r"no shard holds \d+ of 259 selected cases: int4_pack/"),
        ([one, shared, three], "1 case in more than one shard, the first .* in 1/3 and 2/3"),
        ([one, _with(two, seed=1), three], "differ in the seed"),
        ([one, _with(two, per_op=10), three], "differ in the drawn cases per op"),
        ([one, _with(two, repeats=10), three], "differ in the repeats"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(reports)


def test_machines_of_merged_shards_are_all_told() -> None:
    verdicts = [_pack(seed=0), _pack(seed=1)]
    cases = [verdict.case for verdict in verdicts]
    run = _small(verdicts).run
    parts = [
        _small([verdicts[i]], cases=cases, subject=Subject("acme", "acme", "cpu", {"device": f"chip {i}", "driver": "5"}),
               run=replace(run, shard=(i + 1, 2), hosts=(Host("3", "2", f"machine {i}", 2),)))
        for i in range(2)
    ]
    merged = merge(parts)
    assert merged.subject.describe == {"device": "chip 0 | chip 1", "driver": "5"}
    assert [found.platform for found in merged.run.hosts] == ["machine 0", "machine 1"]
    assert merged.totals.not_run == 0


def test_drift_between_two_reports() -> None:
    before = _small([
        _pack(seed=0, output_sha256="aa"), _pack(seed=1, output_sha256="aa"), _pack(seed=2, output_sha256="aa"), _pack(seed=3),
        _pack(seed=4, output_sha256="aa"), _pack(seed=5, kernel="k1", declared="as the contract"),
    ])
    after = _small([
        _pack(seed=0, output_sha256="aa"), _pack(seed=1, output_sha256="bb"), _pack(seed=2, output_sha256="bb", operands="other"),
        _pack(seed=4, output_sha256="", status=Status.CRASHED, reason="signal 6"),
        _pack(seed=5, kernel="k2", declared="14 bits"), _pack(seed=6),
    ])
    digest = hashlib.sha256(_pack(seed=2).case.encode()).hexdigest()
    case = "int4_pack/plain/m8k64/plain/codes/s{}".format
    assert diff(before, after) == (
        Change(case(1), "default", "encoding", "output", "aa", "bb"),
        Change(case(2), "default", "encoding", "operands", digest, "other"),
        Change(case(3), "default", "encoding", "removed", "EXACT", ""),
        Change(case(4), "default", "encoding", "status", "EXACT", "CRASHED"),
        Change(case(5), "default", "encoding", "kernel", "k1", "k2"),
        Change(case(5), "default", "encoding", "declared", "as the contract", "14 bits"),
        Change(case(6), "default", "encoding", "added", "", "EXACT"),
    )
    assert diff(before, before) == ()


def test_a_sound_report_verifies(sample: Report, data: str, tmp_path: Path) -> None:
    assert verify(json.loads(data), NOW, contract="1", suite="2026.11.0") == ()
    path = tmp_path / "report.json"
    path.write_text(data)
    assert verify(path, NOW, contract="1", suite="2026.11.0") == ()


def _one_finding(report: Report | str, when: datetime = NOW, contract: str = "1", suite: str = "2026.11.0") -> str:
    text = report if isinstance(report, str) else to_json(report)
    (found,) = verify(json.loads(text), when, contract=contract, suite=suite)
    return found


def test_findings_of_verify(sample: Report, data: str, tmp_path: Path) -> None:
    run = sample.run
    assert "not fresh: the report is of suite 2026.11.0, installed is 2026.12.0" in _one_finding(sample, suite="2026.12.0")
    assert "not fresh: the report is of contract 1, installed is 2" in _one_finding(sample, contract="2")
    assert "not in order or not past" in _one_finding(sample, datetime(2026, 11, 20, 1, 30, tzinfo=UTC))
    assert "expired on 2026-12-01" in _one_finding(sample, datetime(2026, 12, 2, tzinfo=UTC))
    small = _small(WHOLE, run=replace(run, started="yesterday"))
    assert "not ISO 8601 times with a zone" in _one_finding(small)
    assert "not in order" in _one_finding(_small(WHOLE, run=replace(run, started=run.finished, finished=run.started)))
    assert "incomplete: 1 selected case" in _one_finding(_small(WHOLE, cases=[*(v.case for v in WHOLE), _pack(seed=9).case]))
    passing = Waiver("int4_pack/*", "PACK-1", "https://example.org/1", date(2027, 1, 1))
    assert "matches 45 passing verdicts" in _one_finding(_small(WHOLE, waivers=[passing]))
    assert "matches none of" in _one_finding(_small(WHOLE, waivers=[replace(passing, case="scale_fold/*")]))
    changed = json.loads(data)
    changed["run"]["command"] = "lowbit certify"
    assert _one_finding(json.dumps(changed)).startswith("digest: changed after it was written")
    assert "No such file or directory" in verify(tmp_path / "absent.json", NOW, contract="1")[0]
    for text, said in (("{", "not JSON"), ("[]", "JSON list, expected an object"), ('{"a": NaN}', "not JSON")):
        path = tmp_path / "bad.json"
        path.write_text(text)
        (found,) = verify(path, NOW, contract="1")
        assert said in found


def test_a_repro_line_that_does_not_run_its_case_is_found() -> None:
    assert "repro line" in _one_finding(_small([_pack(), _pack(seed=1, backend="", **FAIL)]))


@pytest.mark.parametrize("backend", ["ac me", "acme; rm x", "it's"])
def test_a_repro_line_quotes_what_a_shell_would_read(backend: str) -> None:
    verdict = _pack(seed=1, backend=backend, **FAIL)
    assert shlex.split(verdict.repro)[-1] == backend


# JUnit ---------------------------------------------------------------------------------------------------------------------


def test_junit_counts_and_names(sample: Report) -> None:
    root = ET.fromstring(junit(sample))
    assert root.tag == "testsuites"
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "259", "failures": "6", "errors": "4", "skipped": "32"}
    assert [suite.get("name") for suite in root] == sorted(samples.OPS)
    cases = root.findall("testsuite/testcase")
    assert len(cases) == 259
    assert len({case.get("name") for case in cases}) == 259
    assert len(root.findall("testsuite/testcase/failure")) == 6
    assert len(root.findall("testsuite/testcase/error")) == 4
    assert len(root.findall("testsuite/testcase/skipped")) == 32
    assert all(int(suite.get("tests", "")) == len(suite.findall("testcase")) for suite in root)


def test_junit_says_what_and_how_to_run_it_again() -> None:
    bad = _gemm("lognormal", tactic="split4", status=Status.DRIFT, reason="a < b & \x1b[31mred\x00\ud800", wrong=1,
                clause="GEMM-7", seconds=0.25)
    no = _pack(status=Status.UNSUPPORTED, reason="no int4")
    gemm, pack = ET.fromstring(junit(_small([bad, no]))).findall("testsuite")
    case = gemm.find("testcase")
    assert case is not None
    assert (case.get("classname"), case.get("name"), case.get("time")) == ("gemm_w4a16.plain", f"{bad.case}[split4]", "0.250000")
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("message") == "DRIFT: a < b & \ufffd[31mred\ufffd\ufffd"
    assert f"lowbit run '{bad.case}' --backend acme --tactic split4" in (failure.text or "")
    skipped = pack.find("testcase/skipped")
    assert skipped is not None
    assert skipped.get("message") == "UNSUPPORTED: no int4"


def test_the_manifest_is_of_a_set() -> None:
    a, b = _pack(seed=0).case, _pack(seed=1).case
    assert manifest_of([b, a, b]) == manifest_of([a, b])
    assert manifest_of([a, b]).sha256 == hashlib.sha256(f"{a}\n{b}".encode()).hexdigest()
