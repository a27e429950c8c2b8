"""The report of a run: one record, one JSON text, one digest; how levels are granted; merge, diff and verify.

Decides: what follows from the verdicts (totals, claims, power, coverage, failures, levels). A `Report` recomputes all of it
when it is made, from a run or from a file, so that no report can say more than its verdicts do.
Refuses: totals that do not add up, two verdicts on one thing, a passing verdict of code that was only compiled, a level
over an absent lower one, a merge of shards that is not complete, and numbers that JSON cannot hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import date, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from . import waivers as waivers_module
from .case import Case, Operands
from .selection import FIXED_GROUPS
from .verdict import FAILING, PASSING, Execution, Status, Verdict
from .waivers import Waiver

__all__ = [
    "AS_CONTRACT", "JUDGED", "LEVELS", "SCHEMA", "Change", "Claim", "CodeCoverage", "Coverage", "CoverageRecord",
    "Declared", "Failure", "Host", "Level", "LevelResult", "Manifest", "MergeError", "OpCounts", "OutputError", "Report",
    "ReportError", "Run", "Strength", "Subject", "Totals", "append_verdict", "build", "canonical", "digest_of", "diff",
    "from_json", "granted", "host", "load", "load_partial", "manifest_of", "merge", "op_of", "power_of", "prepare_folder",
    "schema_json", "sentence", "suite_version", "to_json", "unexecuted", "verdict_json", "verify", "where_executed",
    "write_atomically", "write_bytes_atomically",
]

SCHEMA = "lowbit-report/1"
"""Name and version of the report's schema; a change that a reader could trip over raises the number."""

AS_CONTRACT = "as the contract"
"""`Verdict.declared` of a declaration that is at least the op's minimum class."""

JUDGED = frozenset({*PASSING, Status.DRIFT, Status.MALFORMED, Status.UNTRUSTED, Status.WAIVED})
"""Statuses of cases whose output was read back; only these count as coverage."""

_REJECT = "reject"
_GIVEN = frozenset({"golden", "tensors"})
"""Lanes whose problems come from files: a backend may honestly support none of them."""


class ReportError(ValueError):
    """A report that cannot be read, breaks its schema, or does not follow from its verdicts."""


class MergeError(ReportError):
    """Shards that do not add up to one complete run; the message says what is missing or doubled."""


class OutputError(OSError):
    """The output cannot be written; nothing partial is left behind."""


@dataclass(frozen=True, slots=True)
class Level:
    """One rung of the ladder. `lanes` are frozen per contract version: a case belongs to the level of its lane.
    `every_op`, `gemms`: lanes in which each claimed op, each claimed GEMM must have a judged case."""

    number: int
    name: str
    promise: str
    lanes: tuple[str, ...]
    every_op: tuple[str, ...] = ()
    gemms: tuple[str, ...] = ()


LEVELS = (
    Level(0, "loads", "the backend loads and answers", ()),
    Level(1, "exact", "encodings, quantisers, golden vectors and constructed inputs agree bit for bit",
          ("encoding", "quantiser", "golden", "exact", "onehot", "scale"), gemms=("exact", "onehot")),
    Level(2, "bounded", "every output lies in the interval derived from the declaration, and the faults looked for would show",
          ("bounded", "property", "reject", "tensors"), gemms=("bounded",)),
    Level(3, "stable", "repeats, poisons, placement, streams and sequences change nothing", ("stability",),
          every_op=("stability",)),
    Level(4, "serves", "end-to-end evaluation against the reference arithmetic", ()),
)
"""The ladder of contract version 1. Level 4 is not part of this release and is always reported as not run."""

_LEVEL_OF_LANE = {lane: level.number for level in LEVELS for lane in level.lanes}


@dataclass(frozen=True, slots=True)
class Subject:
    """What was judged: the backend's name, the reference it was found by, its target, and what it says of itself."""

    name: str
    reference: str
    target: str
    describe: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """The machine of a run, as far as a reader needs it to reproduce one."""

    python: str
    numpy: str
    platform: str
    processors: int


@dataclass(frozen=True, slots=True)
class Run:
    """When, where and how. `started`, `finished`: ISO 8601 with zone. `seconds`: wall clock, summed over merged shards.
    `shard`: (i, n), 1 <= i <= n; (1, 1) is a whole run."""

    started: str
    finished: str
    seconds: float
    command: str
    seed: int
    shard: tuple[int, int] = (1, 1)
    hosts: tuple[Host, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The cases that the run selected, of all shards, sorted; `sha256` over the ids joined by newlines."""

    sha256: str
    cases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LevelResult:
    """What became of one level. `reasons`: why it is not granted, or notes on a granted one. `cases`: its verdicts."""

    level: int
    name: str
    outcome: Literal["granted", "refused", "not requested", "not run"]
    cases: int
    waived: int
    lanes: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """What the backend claims of one op: problems it supports of those selected, the reasons for the others (reason ->
    problems), and the classes of declarations below the contract's minimum."""

    op: str
    supported: int
    total: int
    reasons: Mapping[str, int]
    lower_classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Declared:
    """One distinct declaration of an op: its text form and the tactics that make it."""

    op: str
    tactics: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class OpCounts:
    """Every verdict of an op in exactly one column. `executed`, `emulated`: passing verdicts by where they were computed;
    `compiled`: compiled and never run, whatever the status; `rejected`: problems outside the contract that the backend
    refused, as it must: passing, and nothing was computed."""

    op: str
    executed: int
    emulated: int
    compiled: int
    rejected: int
    failing: int
    waived: int
    unsupported: int


@dataclass(frozen=True, slots=True)
class Totals:
    """`selected` = sum of `statuses` = number of verdicts. `cases`: distinct cases judged. `not_run`: cases of the manifest
    without a verdict in this report (those of other shards among them)."""

    selected: int
    statuses: Mapping[str, int]
    cases: int
    not_run: int


@dataclass(frozen=True, slots=True)
class Failure:
    """One failing verdict: what went wrong in a sentence, and the shell line that runs it again."""

    case: str
    tactic: str
    lane: str
    status: Status
    sentence: str
    repro: str


@dataclass(frozen=True, slots=True)
class CodeCoverage:
    """Codes of one operand tensor (formats of at most 8 bits) that judged cases held. `bitmap`: hexadecimal of the integer
    whose bit c is set where code c was seen, `2^bits / 4` digits. `elements`: how many were counted."""

    op: str
    tensor: str
    format: str
    bits: int
    elements: int
    bitmap: str


@dataclass(frozen=True, slots=True)
class CoverageRecord:
    """What the judged verdicts reached. `residues`: op -> `k mod 64` -> cases per residue, from 0. `patterns`: op/variant/first
    option (the output format) -> pattern -> cases. `problems`: op -> distinct variants, dims and options. `long_k`: op ->
    cases with K > G^2. `median_k`: of judged GEMM cases, None where there is none. `tactics`, `kernels`: op -> names ->
    verdicts. `products`: multiplications that a plain evaluation performs, over all judged verdicts."""

    codes: tuple[CodeCoverage, ...]
    residues: Mapping[str, Mapping[str, tuple[int, ...]]]
    patterns: Mapping[str, Mapping[str, int]]
    problems: Mapping[str, int]
    long_k: Mapping[str, int]
    median_k: float | None
    tactics: Mapping[str, Mapping[str, int]]
    kernels: Mapping[str, Mapping[str, int]]
    products: int


@dataclass(frozen=True, slots=True)
class Strength:
    """How strong the suite is, from its own faulty backends. `killed_by`: mutant -> lanes that failed it (none: survivor).
    `variants`: legitimate backends tried; `false_alarms`: those of them that were accused."""

    killed_by: Mapping[str, tuple[str, ...]]
    variants: int
    false_alarms: int

    @property
    def mutants(self) -> int:
        """How many faulty backends were tried."""
        return len(self.killed_by)

    @property
    def killed(self) -> int:
        """How many of them failed in some lane."""
        return sum(bool(lanes) for lanes in self.killed_by.values())


@dataclass(frozen=True, slots=True)
class Report:
    """All that is said of one run. Made by `build`, `merge` or `from_json`; raises ReportError where a part does not
    follow from the verdicts."""

    schema: Literal["lowbit-report/1"]
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
    power: Mapping[str, Mapping[str, int]]  # op -> fault class -> passing verdicts that would have shown it
    coverage: CoverageRecord
    declarations: tuple[Declared, ...]
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


_ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)


# ---------------------------------------------------------------------------------------------------------------------------
# What follows from verdicts


def op_of(verdict: Verdict) -> str:
    """The op of a verdict's case."""
    return verdict.case.partition("/")[0]


def _problem_of(verdict: Verdict) -> str:
    return verdict.case.rsplit("/", 2)[0]


def _by_op(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[op_of(verdict)].append(verdict)
    return dict(sorted(groups.items()))


def sentence(verdict: Verdict) -> str:
    """What is to be said of a verdict: its reason, and the worst element where there is one."""
    parts = [verdict.reason] if verdict.reason else []
    worst = verdict.worst
    if worst is not None:
        wanted = worst.lo if worst.lo == worst.hi else f"{worst.lo}..{worst.hi}"
        place = ", ".join(map(str, worst.index))
        parts.append(f"{verdict.wrong} of {verdict.judged} judged elements are outside; worst is {worst.tensor}[{place}]: got "
                     f"{worst.got} ({worst.value}), admissible {wanted}, exact {worst.exact}, {worst.ulps} ulp outside")
    return ". ".join(part.rstrip(". ") for part in parts) or str(verdict.status)


def power_of(verdicts: Iterable[Verdict]) -> dict[str, dict[str, int]]:
    """op -> fault class -> passing verdicts that would have shown it; 0 where the class applies and none did."""
    power: dict[str, dict[str, int]] = {}
    for op, group in _by_op(verdicts).items():
        classes = sorted({fault for verdict in group for fault in verdict.power})
        if classes:
            passing = [verdict for verdict in group if verdict.status in PASSING]
            power[op] = {fault: sum(verdict.power.get(fault, False) for verdict in passing) for fault in classes}
    return power


def _computed(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Verdicts of cases that ask for a result: all but those of the reject lane, in which a refusal is the right answer."""
    return [verdict for verdict in verdicts if verdict.lane != _REJECT]


def _claims(verdicts: Sequence[Verdict]) -> tuple[Claim, ...]:
    claims = []
    for op, group in _by_op(_computed(verdicts)).items():
        supported = {_problem_of(verdict) for verdict in group if verdict.status is not Status.UNSUPPORTED}
        refused = {_problem_of(verdict): verdict.reason for verdict in group if _problem_of(verdict) not in supported}
        lower = sorted({verdict.declared for verdict in group} - {"", AS_CONTRACT})
        reasons = dict(sorted(Counter(refused.values()).items()))
        claims.append(Claim(op, len(supported), len(supported) + len(refused), reasons, tuple(lower)))
    return tuple(claims)


def _column(verdict: Verdict) -> str:
    if verdict.execution is Execution.COMPILED:
        return "compiled"
    if verdict.status in PASSING:
        return "rejected" if verdict.lane == _REJECT else str(verdict.execution)
    return "failing" if verdict.status in FAILING else str(verdict.status).lower()


def _counts(verdicts: Sequence[Verdict]) -> tuple[OpCounts, ...]:
    columns = [f.name for f in fields(OpCounts)][1:]
    rows = []
    for op, group in _by_op(verdicts).items():
        seen = Counter(map(_column, group))
        rows.append(OpCounts(op, **{column: seen[column] for column in columns}))
    return tuple(rows)


def _totals(verdicts: Sequence[Verdict], cases: Collection[str]) -> Totals:
    seen = Counter(str(verdict.status) for verdict in verdicts)
    judged = {verdict.case for verdict in verdicts}
    return Totals(len(verdicts), {str(status): seen[str(status)] for status in Status}, len(judged), len(set(cases) - judged))


def _failures(verdicts: Sequence[Verdict]) -> tuple[Failure, ...]:
    return tuple(Failure(v.case, v.tactic, v.lane, v.status, sentence(v), v.repro) for v in verdicts if v.status in FAILING)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _refusals(level: Level, here: Sequence[Verdict], claimed: Sequence[str], power: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Why `level` cannot be granted on its own cases (`here`), lower levels left aside."""
    reasons = []
    for status in Status:
        failed = [verdict for verdict in here if verdict.status is status] if status in FAILING else []
        if failed:
            ops = ", ".join(sorted({op_of(verdict) for verdict in failed}))
            reasons.append(f"{_count(len(failed), 'verdict')} {status} in {ops}")
    groups = _by_op(here)
    for op in claimed:
        group = groups.get(op, [])
        judged = {verdict.lane for verdict in group if verdict.status in JUDGED}
        required = {*level.every_op, *(level.gemms if op.startswith("gemm_") else ()), *(verdict.lane for verdict in group)}
        absent = [lane for lane in level.lanes if lane in required - judged - _GIVEN]
        if absent:
            reasons.append(f"{op}: no case was judged in {', '.join(absent)}")
        elif level.number == 1 and not judged:
            reasons.append(f"{op}: no case was judged in any lane of this level")
    if level.number == 2:
        for op in claimed:
            blind = [fault for fault, shown in sorted(power.get(op, {}).items()) if not shown]
            if blind:
                reasons.append(f"{op}: no passing case would have shown {', '.join(blind)}")
            if op.startswith("gemm_") and not power.get(op):
                reasons.append(f"{op}: the power of its cases was not measured")
    return reasons


def granted(
    verdicts: Sequence[Verdict], power: Mapping[str, Mapping[str, int]], requested: int,
) -> tuple[int | None, tuple[LevelResult, ...]]:
    """The highest level granted (None: not even 0) and what became of each level.

    A level is granted iff it is requested, every lower one is granted, and of its own cases: none fails (WAIVED is noted);
    each claimed op, one of whose problems at least is supported, has a judged case in each lane that the level requires of
    it and in each lane in which it has cases at all (problems that come from files left aside); and, for level 2, each
    fault class of each claimed op is shown by a passing case (`power`: op -> fault class -> such cases). UNSUPPORTED fails
    nothing; it counts in the claims. A refusal in the reject lane claims nothing."""
    claims = _claims(verdicts)
    claimed = [claim.op for claim in claims if claim.supported]
    supported, asked = sum(claim.supported for claim in claims), sum(claim.total for claim in claims)
    best: int | None = None
    results = []
    for level in LEVELS:
        here = [verdict for verdict in verdicts if verdict.lane in level.lanes]
        waived = sum(verdict.status is Status.WAIVED for verdict in here)
        outcome: Literal["granted", "refused", "not requested", "not run"] = "refused"
        if level.number == 4:
            outcome, reasons = "not run", ["end-to-end evaluations are not in this release"]
        elif level.number > requested:
            outcome, reasons = "not requested", [f"level L{requested} was requested"]
        elif not claimed:
            reasons = ["no op is claimed: the backend supports none of the selected problems"]
        elif level.number == 0 and not any(verdict.status in JUDGED for verdict in _computed(verdicts)):
            reasons = ["no case gave an output: every run raised, crashed or timed out"]
        else:
            reasons = _refusals(level, here, claimed, power)
            if level.number and best != level.number - 1:
                reasons.append(f"L{level.number - 1} is not granted")
            if not reasons:
                outcome, best = "granted", level.number
                reasons = [f"over {_count(len(claimed), 'op')} and {supported:,} of {asked:,} selected problems"]
                reasons += [f"waived {waived}"] if waived else []
        results.append(LevelResult(level.number, level.name, outcome, len(here), waived, level.lanes, tuple(reasons)))
    return best, tuple(results)


def where_executed(verdicts: Iterable[Verdict]) -> str:
    """Where the passing verdicts were computed: `executed`, `emulated`, `partly emulated`, or `nothing passed`."""
    seen = {verdict.execution for verdict in _computed(verdicts) if verdict.status in PASSING}
    if not seen:
        return "nothing passed"
    return str(min(seen)) if len(seen) == 1 else "partly emulated"


def unexecuted(report: Report) -> tuple[str, ...]:
    """Claimed ops of which no verdict passed on the device of the target."""
    executed = {row.op for row in report.counts if row.executed}
    return tuple(claim.op for claim in report.claims if claim.supported and claim.op not in executed)


# ---------------------------------------------------------------------------------------------------------------------------
# Coverage

_CHUNK = 1 << 20  # elements counted at a time: NumPy widens an index array to eight bytes per element
_RESIDUES = (("m", 16), ("n", 8), ("n", 16), ("k", 64))


class Coverage:
    """Counts, while a run goes on, the codes that operands held. `add` once per judged case; `merge` joins two counts."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str, int], npt.NDArray[np.bool_]] = {}
        self._elements: Counter[tuple[str, str, str, int]] = Counter()

    def add(self, case: Case, operands: Operands) -> None:
        """Count the codes of all tensors of `operands` whose format has at most 8 bits."""
        for name, tensor in operands.items():
            if tensor.format.bits > 8:
                continue
            key = (case.problem.op, name, tensor.format.name, tensor.format.bits)
            seen = self._seen.setdefault(key, np.zeros(1 << tensor.format.bits, dtype=np.bool_))
            flat = tensor.codes.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                seen[flat[start : start + _CHUNK]] = True
            self._elements[key] += int(flat.size)

    def merge(self, codes: Iterable[CodeCoverage]) -> None:
        """Add what another count, or a shard's report, saw."""
        for row in codes:
            key = (row.op, row.tensor, row.format, row.bits)
            bits = int(row.bitmap, 16)
            other = np.array([bits >> code & 1 for code in range(1 << row.bits)], dtype=np.bool_)
            self._seen[key] = self._seen.get(key, np.zeros_like(other)) | other
            self._elements[key] += row.elements

    def codes(self) -> tuple[CodeCoverage, ...]:
        """The count so far, sorted by op, tensor and format."""
        rows = []
        for key in sorted(self._seen):
            op, tensor, fmt, bits = key
            number = sum(1 << int(code) for code in np.flatnonzero(self._seen[key]))
            bitmap = f"{number:0{max((1 << bits) // 4, 1)}x}"
            rows.append(CodeCoverage(op, tensor, fmt, bits, self._elements[key], bitmap))
        return tuple(rows)


def _tally(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    counts = Counter(pairs)
    table: dict[str, dict[str, int]] = {}
    for outer, inner in sorted(counts):
        table.setdefault(outer, {})[inner] = counts[outer, inner]
    return table


def _coverage(verdicts: Sequence[Verdict], codes: tuple[CodeCoverage, ...]) -> CoverageRecord:
    judged = [verdict for verdict in _computed(verdicts) if verdict.status in JUDGED]
    residues: dict[str, dict[str, list[int]]] = {}
    patterns, problems, long_k, ks = [], set(), Counter[str](), []
    for text in sorted({verdict.case for verdict in judged}):
        op, variant, dims, options, pattern, _ = Case.split(text)
        problems.add((op, text.rsplit("/", 2)[0]))
        patterns.append((f"{op}/{variant}/{options[0]}", pattern))
        for letter, modulus in _RESIDUES:
            if letter in dims:
                row = residues.setdefault(op, {}).setdefault(f"{letter} mod {modulus}", [0] * modulus)
                row[dims[letter] % modulus] += 1
        if op.startswith("gemm_"):
            ks += [dims["k"]] if "k" in dims else []
            group = dims.get("g", 0 if (op, variant) == ("gemm_w8a8_fp8", "scaled") else FIXED_GROUPS.get(op, 0))
            long_k[op] += bool(group) and dims.get("k", 0) > group**2
    return CoverageRecord(
        codes,
        {op: {name: tuple(row) for name, row in sorted(rows.items())} for op, rows in sorted(residues.items())},
        _tally(patterns),
        dict(sorted(Counter(op for op, _ in problems).items())),
        dict(sorted(long_k.items())),
        float(statistics.median(ks)) if ks else None,
        _tally((op_of(verdict), verdict.tactic) for verdict in judged),
        _tally((op_of(verdict), f"{verdict.kernel} ({verdict.kernel_source})") for verdict in judged if verdict.kernel),
        sum(verdict.products for verdict in judged),
    )


# ---------------------------------------------------------------------------------------------------------------------------
# Building and checking


def _derived(
    verdicts: Sequence[Verdict], manifest: Manifest, run: Run, requested: int, codes: tuple[CodeCoverage, ...],
) -> dict[str, Any]:
    """Every part of a report that follows from the rest."""
    power = power_of(verdicts)
    level, levels = granted(verdicts, power, requested)
    totals = _totals(verdicts, manifest.cases)
    why = ""
    if run.shard[1] > 1:
        why = f"shard {run.shard[0]} of {run.shard[1]} alone grants nothing: merge all shards"
    elif totals.not_run:
        why = f"the run is not complete: {_count(totals.not_run, 'selected case')} without a verdict"
    if why:
        refused = [(r, ("refused", (why,)) if r.outcome == "granted" else (r.outcome, r.reasons)) for r in levels]
        level = None
        levels = tuple(LevelResult(r.level, r.name, what[0], r.cases, r.waived, r.lanes, what[1]) for r, what in refused)
    return {
        "level_granted": level, "levels": levels, "totals": totals, "counts": _counts(verdicts), "claims": _claims(verdicts),
        "failures": _failures(verdicts), "power": power, "coverage": _coverage(verdicts, codes),
    }


def _key(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.case, verdict.tactic, verdict.lane


def _faults_of_verdict(verdict: Verdict) -> list[str]:
    faults = []
    try:
        Case.split(verdict.case)
    except ValueError as error:
        faults.append(str(error))
    if _LEVEL_OF_LANE.get(verdict.lane) != verdict.level:
        wanted = f"L{_LEVEL_OF_LANE[verdict.lane]}" if verdict.lane in _LEVEL_OF_LANE else "no level"
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


def _faults(report: Report) -> list[str]:
    """Why a report does not follow from its verdicts; empty if it does."""
    faults = [fault for verdict in report.verdicts for fault in _faults_of_verdict(verdict)]
    if faults:
        return faults
    i, n = report.run.shard
    if not 1 <= i <= n:
        faults.append(f"shard {i} of {n} is impossible: expected 1 <= i <= n")
    twice = [key for key, count in Counter(map(_key, report.verdicts)).items() if count > 1]
    faults += [f"{case} [{tactic}] has more than one verdict in lane {lane}" for case, tactic, lane in twice]
    if manifest_of(report.manifest.cases) != report.manifest:
        faults.append("the manifest is not sorted, repeats a case, or has the wrong sha256")
    strange = sorted({verdict.case for verdict in report.verdicts} - set(report.manifest.cases))
    if strange:
        faults.append(f"{_count(len(strange), 'judged case')} not in the manifest, the first {strange[0]}")
    for name, value in _derived(
        report.verdicts, report.manifest, report.run, report.level_requested, report.coverage.codes,
    ).items():
        held = getattr(report, name)
        if held != value:
            parts = f": it holds {held}, they give {value}" if name in ("level_granted", "totals") else ""
            faults.append(f"{name} does not follow from the {_count(len(report.verdicts), 'verdict')}{parts}")
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
    codes: tuple[CodeCoverage, ...] = (), declarations: Iterable[Declared] = (), waivers: Sequence[Waiver] = (),
    strength: Strength | None = None, peak_bytes: int = 0, suite: str = "",
) -> Report:
    """The report of a run. `cases`: ids of all selected cases, of all shards. `verdicts`: of this run, in any order, after
    `waivers.apply`. `requested`: level 0..4. `codes`: of `Coverage.codes()`. `suite`: default, the installed version.

    Raises ReportError where the verdicts contradict each other or the manifest."""
    ordered = tuple(sorted(verdicts, key=_key))
    faults = [fault for verdict in ordered for fault in _faults_of_verdict(verdict)]
    if faults:
        raise ReportError("; ".join(faults[:20]))
    manifest = manifest_of(cases)
    declared = tuple(sorted(declarations, key=lambda row: (row.op, row.text)))
    data = {
        "schema": SCHEMA, "suite": suite or suite_version(), "contract": contract, "subject": subject, "run": run,
        "manifest": manifest, "level_requested": requested, "declarations": declared, "waivers": tuple(waivers),
        "strength": strength, "peak_bytes": peak_bytes, "verdicts": ordered,
        **_derived(ordered, manifest, run, requested, codes),
    }
    plain = _plain(data)
    return _validated(canonical({**plain, "digest": digest_of(plain)}), "the report")


# ---------------------------------------------------------------------------------------------------------------------------
# Text form


def _plain(value: Any) -> Any:
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
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]


def canonical(data: Any) -> str:
    """Canonical JSON: keys sorted, no white space, non-ASCII escaped, floats by their shortest text that reads back equal."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(data: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a report's data without its field `digest`."""
    return hashlib.sha256(canonical({key: value for key, value in data.items() if key != "digest"}).encode()).hexdigest()


def _said(error: ValidationError) -> list[str]:
    """One sentence per fault that the schema found."""
    return [f"{'.'.join(map(str, item['loc'])) or 'report'}: {item['msg']}" for item in error.errors(include_url=False)[:20]]


def _validated(text: str, where: str) -> Report:
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ReportError(f"{where} is not a {SCHEMA}: {'; '.join(_said(error))}") from error


def to_json(report: Report) -> str:
    """The canonical JSON text of a report, with a line feed at its end."""
    return canonical(_plain(report)) + "\n"


def from_json(text: str, where: str = "the report") -> Report:
    """The report behind a JSON text. Raises ReportError where it breaks the schema, does not follow from its verdicts, or
    does not have the digest it states."""
    report = _validated(text, where)
    digest = digest_of(json.loads(text))
    if digest != report.digest:
        raise ReportError(f"{where} was changed after it was written: its digest is {digest}, it states {report.digest}")
    return report


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"report {path} cannot be read: {error}") from error


def load(path: Path) -> Report:
    """The report in a file. Raises ReportError."""
    return from_json(_read(path), str(path))


def schema_json() -> str:
    """The JSON Schema (draft 2020-12) of a report, as shipped in report.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_ADAPTER.json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


# ---------------------------------------------------------------------------------------------------------------------------
# Files


def prepare_folder(folder: Path) -> Path:
    """Make `folder` and prove that a file can be made in it. Raises OutputError; call it before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be written: {error.strerror or error}; try another --out") from error


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new, never a part. A link is written through. Raises
    OutputError."""
    temporary = ""
    try:
        target = path.resolve()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; give another folder by --out") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text as UTF-8, in one step, line feeds as they are. Raises OutputError."""
    write_bytes_atomically(path, text.encode("utf-8"))


def verdict_json(verdict: Verdict) -> str:
    """One verdict as canonical JSON, without a line feed."""
    return canonical(_plain(verdict))


def append_verdict(path: Path, verdict: Verdict) -> None:
    """Add one verdict as one line. What an earlier process left of a line it could not finish is cut off first, so that a
    kill at any moment costs one verdict at most. Raises OutputError."""
    try:
        with open(path, "ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(verdict_json(verdict).encode() + b"\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; give another folder by --out") from error


_VERDICTS: TypeAdapter[tuple[Verdict, ...]] = TypeAdapter(tuple[Verdict, ...], config=ConfigDict(extra="forbid", strict=True))


def load_partial(path: Path) -> tuple[Verdict, ...]:
    """The verdicts that `append_verdict` wrote, in order; a last line without its end is left out. Raises ReportError where
    the file cannot be read or a whole line is no verdict."""
    lines = _read(path).split("\n")[:-1]
    try:
        return _VERDICTS.validate_json("[" + ",\n".join(lines) + "]")
    except ValidationError as error:
        raise ReportError(f"{path} does not hold one verdict per line: {'; '.join(_said(error))}") from error


# ---------------------------------------------------------------------------------------------------------------------------
# Merge, diff, verify


def _one(values: Iterable[Any], what: str) -> Any:
    distinct = {canonical(_plain(value)): value for value in values}
    if len(distinct) > 1:
        raise MergeError(f"the shards differ in {what}: {' and '.join(distinct)[:400]}")
    return next(iter(distinct.values()))


def _told(descriptions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the shards' machines say of themselves; where they differ, all of it."""
    keys = sorted({key for description in descriptions for key in description})
    return {key: " | ".join(sorted({d[key] for d in descriptions if key in d})) for key in keys}


def _distinct(records: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({canonical(_plain(record)): record for record in records}.values())


def merge(reports: Sequence[Report]) -> Report:
    """One report of all shards 1/n .. n/n of one run, in any order.

    Raises MergeError unless each shard is there once, all are of one suite, contract, backend, seed, level and manifest,
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
    _one((report.run.seed for report in reports), "the seed")
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
        raise MergeError(f"{_count(len(shared), 'case')} in more than one shard, the first {case} in {' and '.join(shards)}")
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
        first.run.seed, (1, 1), _distinct(found for report in ordered for found in report.run.hosts),
    )
    subject = first.subject
    waivers = [Waiver(w.case, w.clause, w.issue, w.expires, w.backend, w.tactic, hits[w.id]) for w in first.waivers]
    return build(
        contract=first.contract, run=run, cases=first.manifest.cases, requested=first.level_requested, codes=coverage.codes(),
        subject=Subject(subject.name, subject.reference, subject.target, _told([r.subject.describe for r in ordered])),
        verdicts=[verdict for report in reports for verdict in report.verdicts],
        declarations=[Declared(op, tuple(sorted(tactics)), text) for (op, text), tactics in sorted(declared.items())],
        waivers=waivers, strength=next((r.strength for r in ordered if r.strength is not None), None),
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
    old, new = ({_key(verdict): verdict for verdict in report.verdicts} for report in (before, after))
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
    tactic = words[5:] == ([] if failure.tactic == "default" else ["--tactic", failure.tactic])
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
        text = _read(source) if isinstance(source, Path) else json.dumps(source)
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
        report = _ADAPTER.validate_json(text)
    except ValidationError as error:
        return (*found, *_said(error))
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
        found.append(f"incomplete: {_count(report.totals.not_run, 'selected case')} without a verdict")
    found += filter(None, map(_repro_fault, report.failures))
    return tuple(found)
