"""The one loop: cases go in, verdicts come out.

    text -> Case -> (Problem -> backend in its worker) + (Operands -> Expectation) -> Verdict -> Report

Decides: which cases a run has and in which order they are judged. Refuses: to let an exception end a run. What a backend does
ends in a verdict; what the suite itself gets wrong ends in an exception that names the case. One judgement is `session.py`.
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from . import properties, report, stability, tensors, vectors, waivers
from .case import Case
from .op import DomainError, parse_problem
from .ops import ops
from .selection import CONTRACT, Listed, audit_list, case_list, shard
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
from .verdict import Status, Verdict
from .worker import Worker

__all__ = [
    "Plan", "Rejudged", "Session", "batches_of", "certify", "expectations_of", "listed_cases", "listed_of",
    "operands_of", "products_of", "rejudge", "run_one",
]


def listed_cases(plan: Plan) -> list[Listed]:
    """Every case that the plan's level asks for, of all shards. Level L0 has no lane of its own: it asks for the first case of
    each op, to see that an output comes back at all."""
    names = plan.ops or tuple(ops())
    unknown = [name for name in names if name not in ops()]
    if unknown:
        raise DomainError(f"unknown op {', '.join(unknown)}; the ops are {', '.join(ops())}")
    if plan.level == 0:
        return [case_list(ops()[name], per_op=plan.per_op)[0] for name in names]
    found: list[Listed] = []
    for name in names:
        op = ops()[name]
        found += case_list(op, per_op=plan.per_op)
        found += [Listed(vector.case, "golden", 1) for vector in vectors.load(name)]
        found += audit_list(op)
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
    their cases are not run again. Raises DomainError, WorkerError (the backend does not load), ReportError (`done` is of
    another run)."""
    started, clock = datetime.now(UTC), time.monotonic()
    everything = listed_cases(plan)
    mine = shard(everything, *plan.shard)
    verdicts = _standing(tuple(done), plan, mine)
    finished = {verdict.case for verdict in verdicts}
    with Worker(plan.backend, timeout=plan.timeout, path=plan.path) as worker:
        session = Session(plan, worker)
        session.open()
        if on_start is not None:
            on_start(len(mine), session)
        for verdict in verdicts:
            session.recall(verdict)
        pending = [item for item in mine if str(item.case) not in finished]
        supports = worker.supports([item.case.problem for item in pending])
        for item, support in zip(pending, supports, strict=True):
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
