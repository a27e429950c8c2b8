"""What follows from verdicts: how levels are granted, claims, power, counts and failures.

Decides: whether a level is granted and, if not, why; what a backend claims of each op; in which column a verdict counts; what is
to be said of a verdict in a sentence.
Refuses: a level over an absent lower one, over classes of which a lane saw no case, over too few cases and over a shortened run;
a claim made by refusing bad input; and power shown by a verdict that does not pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Literal

from .backend import NOT_EXECUTED
from .power import blind, power_of, supplied
from .report_records import AS_CONTRACT, JUDGED, LEVELS, Claim, Failure, Level, LevelResult, OpCounts, Run, Totals
from .selection import DRAWN_LANES, LEAST, PER_OP, REPEATS, class_lanes
from .verdict import FAILING, NOT_NAMED, PASSING, Execution, Status, Verdict

__all__ = [
    "claims_of", "computed", "counted", "counts_of", "failures_of", "granted", "op_of", "power_of", "sentence", "shortened",
    "totals_of", "where_executed",
]

_REJECT = "reject"
_GIVEN = frozenset({"golden", "tensors"})
"""Lanes whose problems come from files: a backend may honestly support none of them."""

_NAMED = 4
"""Classes that a sentence names."""


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


def computed(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Verdicts of cases that ask for a result: all but those of the reject lane, in which a refusal is the right answer."""
    return [verdict for verdict in verdicts if verdict.lane != _REJECT]


def claims_of(verdicts: Sequence[Verdict]) -> tuple[Claim, ...]:
    """What is claimed of each op, sorted by op; verdicts of the reject lane claim nothing."""
    claims = []
    for op, group in _by_op(computed(verdicts)).items():
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


def counts_of(verdicts: Sequence[Verdict]) -> tuple[OpCounts, ...]:
    """Per op, how many verdicts stand in each column."""
    columns = [f.name for f in fields(OpCounts)][1:]
    rows = []
    for op, group in _by_op(verdicts).items():
        seen = Counter(map(_column, group))
        rows.append(OpCounts(op, **{column: seen[column] for column in columns}))
    return tuple(rows)


def totals_of(verdicts: Sequence[Verdict], cases: Collection[str]) -> Totals:
    """Verdicts by status, and how many of the selected `cases` have none."""
    seen = Counter(str(verdict.status) for verdict in verdicts)
    judged = {verdict.case for verdict in verdicts}
    return Totals(len(verdicts), {str(status): seen[str(status)] for status in Status}, len(judged), len(set(cases) - judged))


def failures_of(verdicts: Sequence[Verdict]) -> tuple[Failure, ...]:
    """The failing verdicts, in order."""
    return tuple(Failure(v.case, v.tactic, v.lane, v.status, sentence(v), v.repro) for v in verdicts if v.status in FAILING)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 case`, `1,000 cases`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _class_of(verdict: Verdict) -> str:
    """variant/options of a verdict's case."""
    _, variant, _, options, *_ = verdict.case.split("/")
    return f"{variant}/{options}"


def _classes_of(verdicts: Iterable[Verdict]) -> dict[str, list[str]]:
    """op -> the classes that it claims, sorted: those of a problem that is supported; weights from files claim none."""
    found: dict[str, set[str]] = defaultdict(set)
    for verdict in computed(verdicts):
        if verdict.status is not Status.UNSUPPORTED and verdict.lane != "tensors":
            found[op_of(verdict)].add(_class_of(verdict))
    return {op: sorted(classes) for op, classes in found.items()}


def shortened(run: Run, requested: int) -> str:
    """What a run left out of the contract's list, as a sentence (LVL-7); empty for a run of the whole list. Repeats count where
    level 3 is asked for."""
    parts = [f"{run.per_op} of {PER_OP} drawn cases per op"] if run.per_op < PER_OP else []
    parts += [f"{run.repeats} of {REPEATS} repeats"] if requested >= 3 and run.repeats < REPEATS else []
    return f"shortened run: {', '.join(parts)}" if parts else ""


def _gaps(level: Level, op: str, group: Sequence[Verdict], classes: Sequence[str]) -> list[str]:
    """What the drawn cases of an op leave open of LVL-8: classes without a judged case in a lane of this level that has others,
    and too few judged cases."""
    drawn = [verdict for verdict in group if verdict.lane in DRAWN_LANES and verdict.status in JUDGED]
    reasons = []
    for lane in (lane for lane in class_lanes(op) if lane in level.lanes):
        seen = {_class_of(verdict) for verdict in drawn if verdict.lane == lane}
        absent = [name for name in classes if name not in seen]
        if seen and absent:
            more = f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
            reasons.append(f"{op}: no case was judged in {lane} of {', '.join(absent[:_NAMED])}{more}")
    cases = len({verdict.case for verdict in drawn})
    if 0 < cases < LEAST:
        lanes = ", ".join(lane for lane in level.lanes if lane in {verdict.lane for verdict in drawn})
        reasons.append(f"{op}: {counted(cases, 'drawn case')} judged in {lanes}, {LEAST} are the least: the run is shortened, "
                       "or the backend refuses too many of the sizes that are drawn")
    return reasons


def _refusals(
    level: Level, here: Sequence[Verdict], claimed: Sequence[str], classes: Mapping[str, Sequence[str]],
) -> list[str]:
    """Why `level` cannot be granted on its own cases (`here`), lower levels left aside."""
    reasons = []
    for status in Status:
        failed = [verdict for verdict in here if verdict.status is status] if status in FAILING else []
        if failed:
            ops = ", ".join(sorted({op_of(verdict) for verdict in failed}))
            reasons.append(f"{counted(len(failed), 'verdict')} {status} in {ops}")
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
        reasons += _gaps(level, op, group, classes.get(op, ()))
        for relation in sorted(_unnamed(group)):
            reasons.append(f"{op}: {relation} was judged by no tactic; name one for the sizes that the relation needs")
    return reasons


def _unnamed(group: Iterable[Verdict]) -> set[str]:
    """Relations that no tactic was judged by, one of which at least was not named for the sizes that they need (BCK-4)."""
    refused, judged = set[str](), set[str]()
    for verdict in group:
        if verdict.lane == "property":
            if verdict.status in JUDGED:
                judged.add(verdict.case.split("/")[4])
            elif verdict.status is Status.UNSUPPORTED and NOT_NAMED in verdict.reason:
                refused.add(verdict.case.split("/")[4])
    return refused - judged


def granted(
    verdicts: Sequence[Verdict], power: Mapping[str, Mapping[str, int]], requested: int,
) -> tuple[int | None, tuple[LevelResult, ...]]:
    """The highest level granted (None: not even 0) and what became of each level.

    A level is granted iff it is requested, every lower one is granted, and of its own cases: none fails (WAIVED is noted);
    each claimed op, one of whose problems at least is supported, has a judged case in each lane that the level requires of
    it and in each lane in which it has cases at all (problems that come from files left aside), one of each class that it
    claims in each of its drawn lanes, and in these `LEAST` cases (LVL-8); and, for level 2, each fault class of each claimed
    op and variant is shown by a passing case (`power`: op/variant -> fault class -> such cases) and, where no bounded case
    shows it, by one that is judged to a point, which the level then names (PWR-3). UNSUPPORTED fails nothing; it counts in the
    claims. A refusal in the reject lane claims nothing."""
    claims, classes = claims_of(verdicts), _classes_of(verdicts)
    claimed = [claim.op for claim in claims if claim.supported]
    supported, asked = sum(claim.supported for claim in claims), sum(claim.total for claim in claims)
    best: int | None = None
    results = []
    for level in LEVELS:
        here = [verdict for verdict in verdicts if verdict.lane in level.lanes]
        waived = sum(verdict.status is Status.WAIVED for verdict in here)
        outcome: Literal["granted", "refused", "not requested", "not run"] = "refused"
        if level.number == 4:
            outcome, reasons = "not run", ["decided by `lowbit eval`, over a report that grants L3"]
        elif level.number > requested:
            outcome, reasons = "not requested", [f"level L{requested} was requested"]
        elif not claimed:
            reasons = ["no op is claimed: the backend supports none of the selected problems"]
        elif level.number == 0 and not any(verdict.status in JUDGED for verdict in computed(verdicts)):
            reasons = ["no case gave an output: every run raised, crashed or timed out"]
        else:
            reasons = _refusals(level, here, claimed, classes)
            reasons += blind(verdicts, claimed, power) if level.number == 2 else []
            if level.number and best != level.number - 1:
                reasons.append(f"L{level.number - 1} is not granted")
            if not reasons:
                outcome, best = "granted", level.number
                reasons = [f"over {counted(len(claimed), 'op')} and {supported:,} of {asked:,} selected problems"]
                reasons += [f"waived {waived}"] if waived else []
                reasons += supplied(verdicts, claimed) if level.number == 2 else []
        results.append(LevelResult(level.number, level.name, outcome, len(here), waived, level.lanes, tuple(reasons)))
    return best, tuple(results)


def where_executed(verdicts: Iterable[Verdict]) -> str:
    """Where the passing verdicts were computed: `executed`, `emulated`, `partly emulated`, or `nothing passed`; of a backend
    that cannot run here `compiled, never executed on a device`."""
    verdicts = list(verdicts)
    if verdicts and all(verdict.execution is Execution.COMPILED for verdict in verdicts):
        return NOT_EXECUTED
    seen = {verdict.execution for verdict in computed(verdicts) if verdict.status in PASSING}
    if not seen:
        return "nothing passed"
    return str(min(seen)) if len(seen) == 1 else "partly emulated"
