"""The audit of a backend: probes through its ordinary interface, a fingerprint per product, and what it says of the declaration.

Decides: which products are probed and how the findings are told. Refuses: to look into a backend. What is probed is what would be
certified: the same worker, the same buffers, the same case ids, so that `lowbit run` repeats each probe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import report
from .audit_readings import FIELDS
from .audit_table import HEADS, headline, name_of, row_of, unread
from .op import DomainError
from .ops import ops
from .selection import audit_list
from .session import Plan, Session
from .verdict import FAILING, Status, Verdict
from .worker import Worker

__all__ = ["Audit", "audit", "to_data", "to_text"]

@dataclass(frozen=True, slots=True)
class Audit:
    """The findings of one backend, the verdicts of the probes, and why problems were not probed (reason -> problems)."""

    backend: str
    target: str
    execution: str
    findings: tuple[report.Audited, ...]
    verdicts: tuple[Verdict, ...]
    refused: dict[str, int]

    @property
    def refuted(self) -> bool:
        """Whether a probe contradicts a declaration, or gave no output."""
        return any(verdict.status in FAILING for verdict in self.verdicts)


def audit(
    backend: str, names: Sequence[str] = (), *, timeout: float = 60.0, path: tuple[str, ...] = (),
    on_step: Callable[[str], None] | None = None,
) -> Audit:
    """Probe every product that a backend claims, on every tactic. `names`: ops, empty for all. `on_step` gets a line per
    finding. Raises DomainError for an unknown op, WorkerError for a backend that does not load."""
    unknown = [name for name in names if name not in ops()]
    if unknown:
        raise DomainError(f"unknown op {', '.join(unknown)}; the ops are {', '.join(ops())}")
    listed = [item for name in names or ops() for item in audit_list(ops()[name])]
    if not listed:
        raise DomainError(f"{', '.join(names)}: only matrix products have an accumulator to audit")
    verdicts: list[Verdict] = []
    with Worker(backend, timeout=timeout, path=path) as worker:
        session = Session(Plan(backend, timeout=timeout, path=path), worker)
        session.open()
        supports = worker.supports([item.case.problem for item in listed])
        for item, support in zip(listed, supports, strict=True):
            found = list(session.judge(item, support))
            verdicts += found
            if on_step is not None:
                for verdict in found:
                    on_step(f"{verdict.status} {verdict.case}" + (f" [{verdict.tactic}]" if verdict.tactic != "default" else ""))
        findings = session.audits(verdicts)
    refused = Counter(verdict.reason for verdict in verdicts if verdict.status is Status.UNSUPPORTED)
    return Audit(session.name, session.target, str(session.execution), findings, tuple(verdicts), dict(sorted(refused.items())))


def to_text(found: Audit) -> str:
    """The table of readings, then per finding what is finer or refuted, then the reasons of what is not identifiable."""
    rows = [("product", *(HEADS[name] for name in FIELDS), "standing")]
    rows += [(name_of(row), *row_of(row), row.standing) for row in found.findings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for row in found.findings:
        if row.standing != report.CONSISTENT:
            lines += ["", f"{row.standing.upper()} {name_of(row)}: {row.said}", f"  declared: {row.declared}"]
    for verdict in found.verdicts:
        if verdict.status in FAILING:
            lines += ["", f"{verdict.status} {verdict.case}: {verdict.reason} (clause {verdict.clause})", f"  {verdict.repro}"]
    reasons = unread(found.findings)
    lines += ["", "not identifiable:"] if reasons else []
    lines += [f"  {head} of {count}: {why}" for head, why, count in reasons]
    lines += ["", "not supported:"] if found.refused else []
    lines += [f"  {count} probes: {why}" for why, count in found.refused.items()]
    told = headline(found.findings) or "nothing was audited"
    return "\n".join([*lines, "", f"{found.backend} on {found.target}, {found.execution}: {told}"])


def to_data(found: Audit) -> dict[str, Any]:
    """The findings as plain data, for JSON."""
    return {
        "backend": found.backend, "target": found.target, "execution": found.execution,
        "findings": [asdict(row) for row in found.findings],
        "failures": [
            {"case": v.case, "tactic": v.tactic, "status": str(v.status), "reason": v.reason, "repro": v.repro}
            for v in found.verdicts if v.status in FAILING
        ],
        "unsupported": found.refused,
    }
