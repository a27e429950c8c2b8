"""The report as one record, one JSON text and one digest.

Decides: all that follows from the verdicts. A `Report` recomputes it when it is made, from a run (`build`) or from a text
(`from_json`), so that no report can say more than its verdicts do. The canonical text, its digest and the JSON Schema are here.
Refuses: totals that do not add up, two verdicts on one thing, a passing verdict of code that was only compiled, a level that its
verdicts do not grant, a digest that is not that of the text, and numbers that JSON cannot hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import date
from enum import Enum
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from .case import Case
from .report_coverage import coverage_of
from .report_levels import claims_of, counted, counts_of, failures_of, granted, power_of, shortened, totals_of
from .report_records import (
    LEVEL_OF_LANE,
    REFUTED,
    SCHEMA,
    Audited,
    Claim,
    CodeCoverage,
    CoverageRecord,
    Declared,
    Failure,
    Host,
    LevelResult,
    Manifest,
    OpCounts,
    ReportError,
    Run,
    Strength,
    Subject,
    Totals,
)
from .verdict import PASSING, Execution, Verdict
from .waivers import Waiver

__all__ = [
    "ADAPTER", "Report", "build", "canonical", "digest_of", "from_json", "host", "key_of", "manifest_of", "plain_data",
    "schema_faults", "schema_json", "suite_version", "to_json", "unexecuted", "verdict_json",
]


@dataclass(frozen=True, slots=True)
class Report:
    """All that is said of one run. Made by `build`, `merge` or `from_json`; raises ReportError where a part does not
    follow from the verdicts."""

    schema: Literal["lowbit-report/3"]
    suite: str  # CalVer of the distribution
    contract: str  # version of docs/contract.md
    subject: Subject
    run: Run
    manifest: Manifest
    level_requested: int
    level_granted: int | None
    levels: tuple[LevelResult, ...]
    totals: Totals
    counts: tuple[OpCounts, ...]
    claims: tuple[Claim, ...]
    failures: tuple[Failure, ...]
    power: Mapping[str, Mapping[str, int]]  # op/variant -> fault class -> passing verdicts that would have shown it
    coverage: CoverageRecord
    declarations: tuple[Declared, ...]
    audits: tuple[Audited, ...]
    waivers: tuple[Waiver, ...]
    strength: Strength | None
    peak_bytes: int  # largest resident memory of the judging process; 0: not measured
    verdicts: tuple[Verdict, ...]
    digest: str  # sha256 of the canonical JSON without this field

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            raise ReportError("; ".join(faults[:20]))


ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)


def unexecuted(report: Report) -> tuple[str, ...]:
    """Claimed ops of which no verdict passed on the device of the target."""
    executed = {row.op for row in report.counts if row.executed}
    return tuple(claim.op for claim in report.claims if claim.supported and claim.op not in executed)


def _derived(
    verdicts: Sequence[Verdict], manifest: Manifest, run: Run, requested: int, codes: tuple[CodeCoverage, ...],
) -> dict[str, Any]:
    """Every part of a report that follows from the rest."""
    power = power_of(verdicts)
    level, levels = granted(verdicts, power, requested)
    totals = totals_of(verdicts, manifest.cases)
    why = shortened(run, requested)
    if run.shard[1] > 1:
        why = f"shard {run.shard[0]} of {run.shard[1]} alone grants nothing: merge all shards"
    elif totals.not_run:
        why = f"the run is not complete: {counted(totals.not_run, 'selected case')} without a verdict"
    if why:
        refused = [(r, ("refused", (why,)) if r.outcome == "granted" else (r.outcome, r.reasons)) for r in levels]
        level = None
        levels = tuple(LevelResult(r.level, r.name, what[0], r.cases, r.waived, r.lanes, what[1]) for r, what in refused)
    return {
        "level_granted": level, "levels": levels, "totals": totals, "counts": counts_of(verdicts), "claims": claims_of(verdicts),
        "failures": failures_of(verdicts), "power": power, "coverage": coverage_of(verdicts, codes),
    }


def key_of(verdict: Verdict) -> tuple[str, str, str]:
    """What at most one verdict of a report may bear: case, tactic and lane."""
    return verdict.case, verdict.tactic, verdict.lane


def _faults_of_verdict(verdict: Verdict) -> list[str]:
    faults = []
    try:
        Case.split(verdict.case)
    except ValueError as error:
        faults.append(str(error))
    if LEVEL_OF_LANE.get(verdict.lane) != verdict.level:
        wanted = f"L{LEVEL_OF_LANE[verdict.lane]}" if verdict.lane in LEVEL_OF_LANE else "no level"
        faults.append(f"{verdict.case}: lane {verdict.lane!r} belongs to {wanted}, the verdict says L{verdict.level}")
    if verdict.execution is Execution.COMPILED and verdict.status in PASSING:
        faults.append(f"{verdict.case}: {verdict.status} of code that was compiled and never run")
    if not 0 <= verdict.wrong <= verdict.judged <= verdict.total:
        faults.append(f"{verdict.case}: {verdict.wrong} wrong, {verdict.judged} judged, {verdict.total} elements: impossible")
    if verdict.status in PASSING and verdict.wrong:
        faults.append(f"{verdict.case}: {verdict.status} with {verdict.wrong} wrong elements")
    if verdict.status not in PASSING and not verdict.reason:
        faults.append(f"{verdict.case}: {verdict.status} without a reason")
    return faults


def _group_of(case: str, tactic: str) -> tuple[str, str, str, str]:
    """(op, variant, options, tactic): what one audit is of."""
    op, variant, _, options, *_ = case.split("/")
    return op, variant, options, tactic


def _faults_of_audits(report: Report) -> list[str]:
    """Findings that do not follow from the verdicts of the probes."""
    probes = [verdict for verdict in report.verdicts if verdict.lane == "audit"]
    groups: dict[tuple[str, str, str, str], list[Verdict]] = {}
    for verdict in probes:
        groups.setdefault(_group_of(verdict.case, verdict.tactic), []).append(verdict)
    faults = []
    keys = [_group_of(row.problem, row.tactic) for row in report.audits]
    faults += [f"{'/'.join(key)}: audited twice" for key, count in Counter(keys).items() if count > 1]
    for row, key in zip(report.audits, keys, strict=True):
        failed = {verdict.case for verdict in groups.get(key, ()) if verdict.status not in PASSING}
        if key not in groups:
            faults.append(f"{row.problem} [{row.tactic}]: a finding without a probe")
        elif (row.standing == REFUTED) != bool(failed) or row.counterexample not in (failed or {""}):
            faults.append(f"{row.problem} [{row.tactic}]: {row.standing} does not follow from the verdicts of its probes")
    return faults


def _faults(report: Report) -> list[str]:
    """Why a report does not follow from its verdicts; empty if it does."""
    faults = [fault for verdict in report.verdicts for fault in _faults_of_verdict(verdict)]
    if faults:
        return faults
    i, n = report.run.shard
    if not 1 <= i <= n:
        faults.append(f"shard {i} of {n} is impossible: expected 1 <= i <= n")
    if min(report.run.per_op, report.run.repeats) < 1:
        faults.append(f"{report.run.per_op} drawn cases per op, {report.run.repeats} repeats: expected 1 or more of both")
    twice = [key for key, count in Counter(map(key_of, report.verdicts)).items() if count > 1]
    faults += [f"{case} [{tactic}] has more than one verdict in lane {lane}" for case, tactic, lane in twice]
    if manifest_of(report.manifest.cases) != report.manifest:
        faults.append("the manifest is not sorted, repeats a case, or has the wrong sha256")
    strange = sorted({verdict.case for verdict in report.verdicts} - set(report.manifest.cases))
    if strange:
        faults.append(f"{counted(len(strange), 'judged case')} not in the manifest, the first {strange[0]}")
    faults += _faults_of_audits(report)
    for name, value in _derived(
        report.verdicts, report.manifest, report.run, report.level_requested, report.coverage.codes,
    ).items():
        held = getattr(report, name)
        if held != value:
            parts = f": it holds {held}, they give {value}" if name in ("level_granted", "totals") else ""
            faults.append(f"{name} does not follow from the {counted(len(report.verdicts), 'verdict')}{parts}")
    return faults


def manifest_of(cases: Iterable[str]) -> Manifest:
    """The manifest of the selected case ids, of all shards, in any order."""
    ids = tuple(sorted(set(cases)))
    return Manifest(hashlib.sha256("\n".join(ids).encode()).hexdigest(), ids)


def suite_version() -> str:
    """CalVer of the installed distribution."""
    return version("lowbit")


def host() -> Host:
    """The machine and the interpreter of this process."""
    return Host(platform.python_version(), np.__version__, platform.platform(), os.cpu_count() or 1)


def build(
    *, contract: str, subject: Subject, run: Run, cases: Iterable[str], verdicts: Iterable[Verdict], requested: int,
    codes: tuple[CodeCoverage, ...] = (), declarations: Iterable[Declared] = (), audits: Iterable[Audited] = (),
    waivers: Sequence[Waiver] = (), strength: Strength | None = None, peak_bytes: int = 0, suite: str = "",
) -> Report:
    """The report of a run. `cases`: ids of all selected cases, of all shards. `verdicts`: of this run, in any order, after
    `waivers.apply`. `requested`: level 0..4. `codes`: of `Coverage.codes()`. `audits`: findings of the probes, in any order.
    `suite`: default, the installed version.

    Raises ReportError where the verdicts contradict each other or the manifest."""
    ordered = tuple(sorted(verdicts, key=key_of))
    faults = [fault for verdict in ordered for fault in _faults_of_verdict(verdict)]
    if faults:
        raise ReportError("; ".join(faults[:20]))
    manifest = manifest_of(cases)
    declared = tuple(sorted(declarations, key=lambda row: (row.op, row.text)))
    audited = tuple(sorted(audits, key=lambda row: (row.problem, row.tactic)))
    data = {
        "schema": SCHEMA, "suite": suite or suite_version(), "contract": contract, "subject": subject, "run": run,
        "manifest": manifest, "level_requested": requested, "declarations": declared, "audits": audited,
        "waivers": tuple(waivers),
        "strength": strength, "peak_bytes": peak_bytes, "verdicts": ordered,
        **_derived(ordered, manifest, run, requested, codes),
    }
    plain = plain_data(data)
    return _validated(canonical({**plain, "digest": digest_of(plain)}), "the report")


def plain_data(value: Any) -> Any:
    """JSON data of records, enums, dates and NumPy scalars. A number that is not finite becomes the largest finite double:
    a NaN where a number was due is as far outside as can be. Half of a surrogate pair becomes U+FFFD: no UTF-8 holds it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else math.copysign(sys.float_info.max, 1.0 if math.isnan(value) else value)
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, int):
        return value
    if isinstance(value, date):
        return value.isoformat()
    if is_dataclass(value):
        return {f.name: plain_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value]


def canonical(data: Any) -> str:
    """Canonical JSON: keys sorted, no white space, non-ASCII escaped, floats by their shortest text that reads back equal."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(data: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a report's data without its field `digest`."""
    return hashlib.sha256(canonical({key: value for key, value in data.items() if key != "digest"}).encode()).hexdigest()


def schema_faults(error: ValidationError) -> list[str]:
    """One sentence per fault that the schema found."""
    return [f"{'.'.join(map(str, item['loc'])) or 'report'}: {item['msg']}" for item in error.errors(include_url=False)[:20]]


def _validated(text: str, where: str) -> Report:
    try:
        return ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ReportError(f"{where} is not a {SCHEMA}: {'; '.join(schema_faults(error))}") from error


def to_json(report: Report) -> str:
    """The canonical JSON text of a report, with a line feed at its end."""
    return canonical(plain_data(report)) + "\n"


def from_json(text: str, where: str = "the report") -> Report:
    """The report behind a JSON text. Raises ReportError where it breaks the schema, does not follow from its verdicts, or
    does not have the digest it states."""
    report = _validated(text, where)
    digest = digest_of(json.loads(text))
    if digest != report.digest:
        raise ReportError(f"{where} was changed after it was written: its digest is {digest}, it states {report.digest}")
    return report


def verdict_json(verdict: Verdict) -> str:
    """One verdict as canonical JSON, without a line feed."""
    return canonical(plain_data(verdict))


def schema_json() -> str:
    """The JSON Schema (draft 2020-12) of a report, as shipped in report.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ADAPTER.json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"
