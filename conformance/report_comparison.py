"""Reports held against each other, and against what is installed: merge, diff and verify.

Decides: whether shards make one complete run (`merge`), what changed between two reports (`diff`), and what is wrong with one
(`verify`).
Refuses: a merge of shards that is not complete, overlaps or mixes two runs; a comparison of outputs of different operands; and
a report that is not fresh.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from . import waivers as waivers_module
from .report_coverage import Coverage
from .report_files import text_of
from .report_levels import counted
from .report_records import Declared, Failure, MergeError, ReportError, Run, Subject
from .report_schema import ADAPTER, Report, build, canonical, digest_of, key_of, plain_data, schema_faults, suite_version
from .waivers import Waiver

__all__ = ["Change", "diff", "merge", "verify"]


def _one(values: Iterable[Any], what: str) -> Any:
    distinct = {canonical(plain_data(value)): value for value in values}
    if len(distinct) > 1:
        raise MergeError(f"the shards differ in {what}: {' and '.join(distinct)[:400]}")
    return next(iter(distinct.values()))


def _told(descriptions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the shards' machines say of themselves; where they differ, all of it."""
    keys = sorted({key for description in descriptions for key in description})
    return {key: " | ".join(sorted({d[key] for d in descriptions if key in d})) for key in keys}


def _distinct(records: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({canonical(plain_data(record)): record for record in records}.values())


def merge(reports: Sequence[Report]) -> Report:
    """One report of all shards 1/n .. n/n of one run, in any order.

    Raises MergeError unless each shard is there once, all are of one suite, contract, backend, seed, length, level and manifest,
    no case is in two shards, and together they hold every case of the manifest."""
    if not reports:
        raise MergeError("nothing to merge: give the reports of all shards")
    n = _one((report.run.shard[1] for report in reports), "the number of shards")
    held = Counter(report.run.shard[0] for report in reports)
    missing = [f"{i}/{n}" for i in range(1, n + 1) if i not in held]
    doubled = [f"{i}/{n}" for i, count in sorted(held.items()) if count > 1]
    if missing or doubled:
        told = (("missing shards", missing), ("shards given twice", doubled))
        raise MergeError("; ".join(f"{what}: {', '.join(which)}" for what, which in told if which))
    for what in ("suite", "contract", "level_requested"):
        _one((getattr(report, what) for report in reports), what)
    for what in ("name", "reference", "target"):
        _one((getattr(report.subject, what) for report in reports), f"the backend's {what}")
    for field, what in (("seed", "the seed"), ("per_op", "the drawn cases per op"), ("repeats", "the repeats")):
        _one((getattr(report.run, field) for report in reports), what)
    _one((report.manifest.sha256 for report in reports), "the manifest of selected cases")
    owners: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        for case in sorted({verdict.case for verdict in report.verdicts}):
            owners[case].append(f"{report.run.shard[0]}/{n}")
    first = reports[0]
    shared = {case: shards for case, shards in owners.items() if len(shards) > 1}
    absent = [case for case in first.manifest.cases if case not in owners]
    if shared:
        case, shards = min(shared.items())
        raise MergeError(f"{counted(len(shared), 'case')} in more than one shard, the first {case} in {' and '.join(shards)}")
    if absent:
        raise MergeError(f"no shard holds {len(absent)} of {len(first.manifest.cases)} selected cases: {', '.join(absent[:5])}"
                         f"{' ...' if len(absent) > 5 else ''}; run the shards again to their ends")
    coverage = Coverage()
    hits: Counter[str] = Counter()
    declared: dict[tuple[str, str], set[str]] = defaultdict(set)
    for report in reports:
        coverage.merge(report.coverage.codes)
        hits.update({waiver.id: waiver.hits for waiver in report.waivers})
        for row in report.declarations:
            declared[row.op, row.text] |= set(row.tactics)
    _one((sorted(waiver.id for waiver in report.waivers) for report in reports), "their waivers")
    ordered = sorted(reports, key=lambda report: report.run.shard)
    run = Run(
        min(report.run.started for report in reports), max(report.run.finished for report in reports),
        math.fsum(report.run.seconds for report in reports), " ; ".join(_distinct(report.run.command for report in ordered)),
        first.run.seed, first.run.per_op, first.run.repeats, (1, 1),
        _distinct(found for report in ordered for found in report.run.hosts),
    )
    subject = first.subject
    waivers = [Waiver(w.case, w.clause, w.issue, w.expires, w.backend, w.tactic, hits[w.id]) for w in first.waivers]
    return build(
        contract=first.contract, run=run, cases=first.manifest.cases, requested=first.level_requested, codes=coverage.codes(),
        subject=Subject(subject.name, subject.reference, subject.target, _told([r.subject.describe for r in ordered])),
        verdicts=[verdict for report in reports for verdict in report.verdicts],
        declarations=[Declared(op, tuple(sorted(tactics)), text) for (op, text), tactics in sorted(declared.items())],
        audits=[row for report in reports for row in report.audits], waivers=waivers,
        strength=next((r.strength for r in ordered if r.strength is not None), None),
        peak_bytes=max(report.peak_bytes for report in reports), suite=first.suite,
    )


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two reports. `kind`: status, output (same operands, other bits), operands (the case means
    other inputs), kernel, declared, added, removed."""

    case: str
    tactic: str
    lane: str
    kind: Literal["status", "output", "operands", "kernel", "declared", "added", "removed"]
    before: str
    after: str


def diff(before: Report, after: Report) -> tuple[Change, ...]:
    """What changed per (case, tactic, lane), sorted by case. Output digests are compared where both reports hold one and
    the operands are the same."""
    old, new = ({key_of(verdict): verdict for verdict in report.verdicts} for report in (before, after))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if a is None or b is None:
            there = b or a
            assert there is not None
            changes.append(Change(*key, "removed" if b is None else "added", "" if a is None else str(a.status),
                                  "" if b is None else str(there.status)))
            continue
        if a.status is not b.status:
            changes.append(Change(*key, "status", str(a.status), str(b.status)))
        if a.operands and b.operands and a.operands != b.operands:
            changes.append(Change(*key, "operands", a.operands, b.operands))
        elif a.output_sha256 and b.output_sha256 and a.output_sha256 != b.output_sha256:
            changes.append(Change(*key, "output", a.output_sha256, b.output_sha256))
        if a.kernel != b.kernel:
            changes.append(Change(*key, "kernel", a.kernel, b.kernel))
        if a.declared != b.declared:
            changes.append(Change(*key, "declared", a.declared, b.declared))
    return tuple(changes)


def _repro_fault(failure: Failure) -> str:
    try:
        words = shlex.split(failure.repro)
    except ValueError as error:
        return f"repro line {failure.repro!r} is not a shell line: {error}"
    head = words[:4] == ["lowbit", "run", failure.case, "--backend"] and words[4:5] not in ([], [""])
    rest = words[5:]
    if len(rest) >= 2 and rest[-2] == "--tensors" and failure.lane == "tensors":
        rest = rest[:-2]
    tactic = rest == ([] if failure.tactic == "default" else ["--tactic", failure.tactic])
    return "" if head and tactic else f"repro line {failure.repro!r} does not run {failure.case} [{failure.tactic}]"


def _when(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else None


def verify(source: Path | Mapping[str, Any], now: datetime, *, contract: str, suite: str = "") -> tuple[str, ...]:
    """What is wrong with a report, one sentence each; empty means that it holds.

    `source`: a file, or the data read from one. `now`: with a zone; waivers are held against its date. `contract`, `suite`:
    the installed versions (`suite` by default that of the distribution); a report of others is not fresh. Checked: schema,
    all that follows from the verdicts, digest, waivers, freshness, repro lines."""
    try:
        text = text_of(source) if isinstance(source, Path) else json.dumps(source)
        data = json.loads(text)
        digest = digest_of(data) if isinstance(data, dict) else ""
    except ReportError as error:
        return (str(error),)
    except ValueError as error:
        return (f"the report is not JSON: {error}",)
    if not isinstance(data, dict):
        return (f"the report is a JSON {type(data).__name__}, expected an object",)
    found = []
    if data.get("digest") != digest:
        found.append(f"digest: changed after it was written: the report states {data.get('digest')}, its content has {digest}")
    try:
        report = ADAPTER.validate_json(text)
    except ValidationError as error:
        return (*found, *schema_faults(error))
    ids = report.manifest.cases
    found += waivers_module.findings(report.verdicts, report.waivers, ids, now.date())
    for what, held, installed in (("suite", report.suite, suite or suite_version()), ("contract", report.contract, contract)):
        if held != installed:
            found.append(f"not fresh: the report is of {what} {held}, installed is {installed}; certify again")
    started, finished = _when(report.run.started), _when(report.run.finished)
    if started is None or finished is None:
        found.append(f"run: {report.run.started!r} to {report.run.finished!r} are not ISO 8601 times with a zone")
    elif not started <= finished <= now:
        found.append(f"run: it started {report.run.started} and finished {report.run.finished}, not in order or not past")
    if report.totals.not_run:
        found.append(f"incomplete: {counted(report.totals.not_run, 'selected case')} without a verdict")
    found += filter(None, map(_repro_fault, report.failures))
    return tuple(found)
