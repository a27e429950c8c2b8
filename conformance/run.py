"""The one loop: cases go in, verdicts come out.

    text -> Case -> (Problem -> backend in its worker) + (Operands -> Expectation) -> Verdict -> Report

Decides: which cases a run has and in which order they are judged, and whether the cases of a report are those of the contract.
Refuses: to resume the run of another backend, and to let an exception end a run. What a backend does ends in a verdict; what the
suite itself gets wrong ends in an exception that names the case. One judgement is `session.py`.
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from . import properties, report, stability, tensors, vectors, waivers
from .case import Case, Problem
from .op import DomainError, parse_problem
from .ops import ops
from .selection import CONTRACT, Listed, Refused, audit_list, case_list, claim_cases, is_claim, shard
from .session import (
    Plan,
    Rejudged,
    Session,
    batches_of,
    expectations_of,
    listed_of,
    operands_of,
    products_of,
    rejudge,
)
from .verdict import Execution, Status, Verdict
from .worker import Fault, Worker

__all__ = [
    "Plan", "Rejudged", "Session", "batches_of", "certify", "expectations_of", "listed_cases", "listed_of", "marks_of",
    "misselected", "operands_of", "products_of", "rejudge", "run_one",
]


def _names(plan: Plan) -> tuple[str, ...]:
    unknown = [name for name in plan.ops if name not in ops()]
    if unknown:
        raise DomainError(f"unknown op {', '.join(unknown)}; the ops are {', '.join(ops())}")
    return plan.ops or tuple(ops())


def listed_cases(plan: Plan, refused: Refused | None = None) -> list[Listed]:
    """Every case that the plan's level asks for, of all shards. Level L0 has no lane of its own: it asks for the first case of
    each op, to see that an output comes back at all. `refused`: which problems a backend refuses; with it the list goes on over
    what that backend claims (LVL-8), without it the list is the one that all backends share."""
    names = _names(plan)
    if plan.level == 0:
        return [case_list(ops()[name], per_op=plan.per_op)[0] for name in names]
    found: list[Listed] = []
    for name in names:
        op = ops()[name]
        shared = case_list(op, per_op=plan.per_op)
        shared += [Listed(vector.case, "golden", 1) for vector in vectors.load(name)]
        shared += audit_list(op)
        found += shared
        if refused is not None:
            found += claim_cases(op, shared, refused, per_op=plan.per_op)
        found += [Listed(case, "property", 2) for case in properties.property_cases(op)]
        found += [
            Listed(Case(parse_problem(text, ops(), check=False), "reject", number), "reject", 2)
            for number, (text, _) in enumerate(op.rejects)
        ]
        found += [Listed(case, "stability", 3) for case in stability.stability_cases(op)]
    if plan.tensors:
        found += [Listed(case, "tensors", 2) for case in tensors.tensor_cases(plan.tensors, plan.ops)]
    return [item for item in found if item.level <= plan.level]


OnVerdict = Callable[[Verdict], None]


def marks_of(plan: Plan, session: Session) -> dict[str, object]:
    """What fixes the verdicts of a run: options, versions, the backend's code and what it says of itself. Plain data; a run is
    resumed only under the same. Raises WorkerError."""
    return {
        "backend": plan.backend, "code": session.worker.code(), "describe": dict(session.describe), "level": plan.level,
        "ops": list(plan.ops), "shard": list(plan.shard), "per_op": plan.per_op, "repeats": plan.repeats, "tensors": plan.tensors,
        "suite": report.suite_version(), "contract": CONTRACT,
    }


class _Support:
    """What a backend says of problems, each asked once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._answers: dict[Problem, str | Fault | None] = {}

    def __call__(self, problems: Sequence[Problem]) -> list[str | Fault | None]:
        fresh = [problem for problem in dict.fromkeys(problems) if problem not in self._answers]
        self._answers.update(zip(fresh, self._session.worker.supports(fresh), strict=True))
        return [self._answers[problem] for problem in problems]

    def refused(self, problems: Sequence[Problem]) -> list[bool]:
        """Which problems it refuses; a `supports` that failed refuses nothing, and its verdict says so. Code that is only
        compiled computes nothing."""
        if self._session.execution is Execution.COMPILED:
            return [True] * len(problems)
        return [isinstance(answer, str) for answer in self(problems)]


def misselected(found: report.Report) -> tuple[str, ...]:
    """Why the cases of a report are not those that the contract lists for its ops, one sentence each; empty where they are.

    Claim cases are drawn again, on the word of the verdicts: a problem of the list is supported unless its verdict is
    UNSUPPORTED, and of other problems those that the report holds. Of a report of L1, or of a part of a run, the verdicts do
    not say enough: there only what the list has is looked for."""
    names = {case.partition("/")[0] for case in found.manifest.cases}
    unknown = sorted(names - set(ops()))
    if unknown or not names:
        return (f"manifest: {f'unknown op {unknown[0]}' if unknown else 'it holds no case'}",)
    plan = Plan(
        found.subject.reference, found.level_requested, tuple(name for name in ops() if name in names), per_op=found.run.per_op,
    )
    held = {case for case in found.manifest.cases if case.split("/")[4] != tensors.PATTERN}
    if found.level_requested < 2 or found.totals.not_run or found.run.shard != (1, 1):
        wanted = {str(item.case) for item in listed_cases(plan)}
        return _differing(wanted, held & wanted)
    try:
        supported = {case.problem for case in (listed_of(text).case for text in held) if is_claim(case)} | {
            listed_of(verdict.case).case.problem for verdict in found.verdicts
            if verdict.status is not Status.UNSUPPORTED and verdict.lane not in ("property", "reject", "tensors")
        }
    except DomainError as error:
        return (f"manifest: {error}",)
    again = listed_cases(plan, lambda asked: [problem not in supported for problem in asked])
    return _differing({str(item.case) for item in again}, held)


def _differing(wanted: set[str], held: set[str]) -> tuple[str, ...]:
    sentences = (("lacks", "has", sorted(wanted - held)), ("holds", "does not have", sorted(held - wanted)))
    return tuple(
        f"manifest: it {what} {len(cases):,} of the cases that the contract's list {said}, the first {cases[0]}"
        for what, said, cases in sentences if cases
    )


def _standing(done: Sequence[Verdict], plan: Plan, mine: Sequence[Listed]) -> list[Verdict]:
    """What an earlier run leaves standing: all but the waived verdicts, which no longer say how they failed, and those of the
    last case, which may lack a tactic. Raises ReportError where the verdicts are not of this plan."""
    cases = {str(item.case) for item in mine}
    foreign = next((verdict for verdict in done if verdict.backend != plan.backend or verdict.case not in cases), None)
    if foreign is not None:
        raise report.ReportError(
            f"the verdicts to resume from are of another run: {foreign.case} on {foreign.backend} is no case of this one; "
            "repeat the command of the killed run, or leave out --resume"
        )
    dropped = {verdict.case for verdict in done if verdict.status is Status.WAIVED} | {verdict.case for verdict in done[-1:]}
    latest = {(verdict.case, verdict.tactic): verdict for verdict in done}  # a resumed run that was killed judged some again
    return [verdict for verdict in latest.values() if verdict.case not in dropped]


def certify(
    plan: Plan,
    *,
    on_start: Callable[[int, Session], None] | None = None,
    on_verdict: OnVerdict | None = None,
    done: Iterable[Verdict] = (),
    strength: report.Strength | None = None,
) -> report.Report:
    """Judge every case of the plan's shard and build the report. `done`: verdicts of an earlier, killed run of the same plan:
    their cases are not run again. `on_start`: called with the number of cases to judge before any is. Raises DomainError,
    WorkerError (the backend does not load), ReportError (`done` is of another run)."""
    started, clock = datetime.now(UTC), time.monotonic()
    _names(plan)  # a wrong op or file ends the run before a worker starts
    if plan.tensors:
        tensors.tensor_cases(plan.tensors, plan.ops)
    with Worker(plan.backend, timeout=plan.timeout, path=plan.path) as worker:
        session = Session(plan, worker)
        session.open()
        support_of = _Support(session)
        everything = listed_cases(plan, support_of.refused)
        mine = shard(everything, *plan.shard)
        reached = tuple(done)
        if on_start is not None:  # the last case is judged again: it may lack a tactic
            on_start(len({str(item.case) for item in mine} - {verdict.case for verdict in reached[:-1]}), session)
        verdicts = _standing(reached, plan, mine)
        finished = {verdict.case for verdict in verdicts}
        pending = [item for item in mine if str(item.case) not in finished]
        for verdict in verdicts:
            session.recall(verdict)
        for item, support in zip(pending, support_of([item.case.problem for item in pending]), strict=True):
            for verdict in session.judge(item, support):
                verdicts.append(verdict)
                if on_verdict is not None:
                    on_verdict(waivers.apply([verdict], plan.waivers, started.date())[0][0])
        audits = session.audits(verdicts)
    waived, counted = waivers.apply(verdicts, plan.waivers, started.date())
    about = dict(session.describe)
    if plan.tensors:
        about["tensors"] = f"{plan.tensors} sha256:{tensors.digest(plan.tensors)}"
    subject = report.Subject(session.name, plan.backend, session.target, about)
    run = report.Run(
        started.isoformat(),
        datetime.now(UTC).isoformat(),
        round(time.monotonic() - clock, 3),
        shlex.join(["lowbit", *sys.argv[1:]]),
        0,
        plan.per_op,
        plan.repeats,
        plan.shard,
        (report.host(),),
    )
    texts: dict[tuple[str, str], list[str]] = {}
    for name, tactic, text in session.declared:
        texts.setdefault((name, text), []).append(tactic)
    return report.build(
        contract=CONTRACT,
        subject=subject,
        run=run,
        cases=[str(item.case) for item in everything],
        verdicts=waived,
        requested=plan.level,
        codes=session.coverage.codes(),
        declarations=[report.Declared(name, tuple(sorted(tactics)), text) for (name, text), tactics in sorted(texts.items())],
        audits=audits,
        waivers=counted,
        strength=strength,
        peak_bytes=1024
        * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss),
    )


def run_one(
    text: str,
    backend: str,
    *,
    tactic: str = "",
    timeout: float = 60.0,
    path: tuple[str, ...] = (),
    repeats: int = 100,
    source: str = "",
) -> list[Verdict]:
    """The verdicts of one case id, on all tactics or on one; `source` is the file of a case of real weights. Raises
    ValueError for ids that mean nothing."""
    item = listed_of(text)
    plan = Plan(backend, timeout=timeout, path=path, repeats=repeats, tensors=source)
    with Worker(backend, timeout=timeout, path=path) as worker:
        session = Session(plan, worker)
        session.open()
        found = list(session.judge(item, worker.supports([item.case.problem])[0]))
    return [verdict for verdict in found if not tactic or verdict.tactic == tactic]
