"""The parts of a report as records, and the ladder of levels.

Decides: what each part of a report holds, in which lanes a level is earned (`LEVELS`), and which statuses count as judged.
Refuses: to derive anything (see report_levels and report_coverage), and a report as a whole (see report_schema).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .verdict import PASSING, Status

__all__ = [
    "AS_CONTRACT", "CONSISTENT", "FINER", "JUDGED", "LEVELS", "LEVEL_OF_LANE", "REFUTED", "SCHEMA", "Audited", "Claim",
    "CodeCoverage", "CoverageRecord", "Declared", "Failure", "Host", "Level", "LevelResult", "Manifest", "MergeError",
    "OpCounts", "OutputError", "ReportError", "Run", "Standing", "Strength", "Subject", "Totals",
]

SCHEMA = "lowbit-report/3"
"""Name and version of the report's schema; a change that a reader could trip over raises the number."""

AS_CONTRACT = "as the contract"
"""`Verdict.declared` of a declaration that is at least the op's minimum class."""

JUDGED = frozenset({*PASSING, Status.DRIFT, Status.MALFORMED, Status.UNTRUSTED, Status.WAIVED})
"""Statuses of cases whose output was read back; only these count as coverage."""


class ReportError(ValueError):
    """A report that cannot be read, breaks its schema, or does not follow from its verdicts."""


class MergeError(ReportError):
    """Shards that do not add up to one complete run; the message says what is missing or doubled."""


class OutputError(OSError):
    """The output cannot be written; nothing partial is left behind."""


@dataclass(frozen=True, slots=True)
class Level:
    """One rung of the ladder. `lanes` are frozen per contract version: a case belongs to the level of its lane.
    `every_op`, `gemms`: lanes in which each claimed op, each claimed GEMM must have a judged case; its drawn lanes also ask
    for a judged case of each claimed class, and for enough of them (LVL-8)."""

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
          ("bounded", "audit", "property", "reject", "tensors"), gemms=("bounded", "audit")),
    Level(3, "stable", "repeats, poisons, placement, streams and sequences change nothing", ("stability",),
          every_op=("stability",)),
    Level(4, "serves", "end-to-end evaluation against the reference arithmetic", ()),
)
"""The ladder of contract version 1. Level 4 is decided by `lowbit eval`: a certification reports it as not run."""

LEVEL_OF_LANE = {lane: level.number for level in LEVELS for lane in level.lanes}


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
    """When, where, how and how much. `started`, `finished`: ISO 8601 with zone. `seconds`: wall clock, summed over merged shards.
    `per_op`: drawn cases per op that were asked for. `repeats`: runs of a stability case. `shard`: (i, n), 1 <= i <= n; (1, 1)
    is a whole run."""

    started: str
    finished: str
    seconds: float
    command: str
    seed: int
    per_op: int
    repeats: int
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


Standing = Literal["consistent", "refuted", "finer than declared"]
"""What an audit says of a declaration."""

CONSISTENT: Standing = "consistent"
REFUTED: Standing = "refuted"
FINER: Standing = "finer than declared"


@dataclass(frozen=True, slots=True)
class Audited:
    """What the probes of one accumulator say of its declaration. `problem`: the first probed one, which stands for its op,
    variant and formats. `said`: what is finer, or what refutes it. `counterexample`: the case that refutes it, else
    empty. `readings`: name -> what was read, as text (`not identifiable: ...` where the operands cannot show it)."""

    problem: str
    tactic: str
    standing: Standing
    said: str
    counterexample: str
    declared: str
    readings: Mapping[str, str]


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
