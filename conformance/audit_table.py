"""Findings of audits as a headline and as a table.

Decides: how a reading is written in little room. Refuses: to drop a finding, whatever its standing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .audit_readings import FIELDS
from .report_records import CONSISTENT, FINER, REFUTED, Audited

__all__ = ["HEADS", "headline", "name_of", "row_of", "unread"]

HEADS = {
    "fraction_bits": "F", "alignment_rounding": "alignment", "normalised": "normalised", "output_bits": "P",
    "output_rounding": "rounding", "chunk": "chunk", "segment": "segment", "splits": "splits", "running_bits": "running",
    "order": "order",
}
"""Readings -> heads of their columns. F: bits kept below the largest exponent of a node; P: significand bits of a carried sum."""

_UNREAD = "not identifiable: "


def headline(findings: Sequence[Audited]) -> str:
    """How many findings there are of each kind, gravest first, in a few words; empty where there are none."""
    counts = Counter(row.standing for row in findings)
    told = [f"{counts[word]} {word}" for word in (REFUTED, FINER, CONSISTENT) if counts[word]]
    return f"{len(findings)} audited: {', '.join(told)}" if told else ""


def name_of(row: Audited) -> str:
    """Op, variant, options and, where it is not the only one, the tactic of a finding."""
    op, variant, _, options = row.problem.split("/")
    return f"{op}/{variant}/{options}" + (f" [{row.tactic}]" if row.tactic != "default" else "")


def _cell(text: str) -> str:
    if text.startswith(_UNREAD):
        return "-"
    return text.replace("at least ", ">=").replace("at most ", "<=").replace("ascending, nodes interleaved", "ascending*")


def row_of(row: Audited) -> tuple[str, ...]:
    """One cell per reading, in the order of `FIELDS`. What is not identifiable is a dash, a bound is written >= or <=, and a star
    marks nodes whose k are not neighbours."""
    return tuple(_cell(row.readings[field]) for field in FIELDS)


def unread(findings: Sequence[Audited]) -> list[tuple[str, str, int]]:
    """(head, reason, products) of what was not identifiable."""
    reasons = Counter(
        (HEADS[name], text.removeprefix(_UNREAD)) for row in findings for name, text in row.readings.items()
        if text.startswith(_UNREAD)
    )
    return [(head, why, count) for (head, why), count in sorted(reasons.items())]
