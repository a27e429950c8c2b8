"""The report as JUnit XML, for machines that collect test results.

Decides: which verdict is a failure, an error or a skip in JUnit's words. DRIFT, MALFORMED and UNTRUSTED are failures; RAISED,
CRASHED and TIMEOUT are errors; UNSUPPORTED and WAIVED are skips with their reason. Refuses: characters that XML 1.0 cannot
hold, which a backend's message may; they become U+FFFD.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from xml.etree import ElementTree as ET

from .report import Report, op_of, sentence, shortened, where_executed
from .verdict import FAILING, Execution, Status, Verdict

__all__ = ["junit"]

_ILLEGAL = re.compile("[^\\t\\n\\r\\x20-\\uD7FF\\uE000-\\uFFFD\\U00010000-\\U0010FFFF]")
_ERRORS = frozenset({Status.RAISED, Status.CRASHED, Status.TIMEOUT})
_SKIPS = frozenset({Status.UNSUPPORTED, Status.WAIVED})


def _legal(text: object) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def _element(parent: ET.Element, tag: str, /, **attributes: object) -> ET.Element:
    return ET.SubElement(parent, tag, {key: _legal(value) for key, value in attributes.items()})


def _counts(verdicts: Iterable[Verdict]) -> dict[str, object]:
    verdicts = tuple(verdicts)
    statuses = [verdict.status for verdict in verdicts]
    return {
        "tests": len(verdicts), "failures": sum(status in FAILING - _ERRORS for status in statuses),
        "errors": sum(status in _ERRORS for status in statuses), "skipped": sum(status in _SKIPS for status in statuses),
        "time": f"{sum(verdict.seconds for verdict in verdicts):.6f}",
    }


def _properties(parent: ET.Element, pairs: dict[str, object]) -> None:
    holder = _element(parent, "properties")
    for name, value in pairs.items():
        _element(holder, "property", name=name, value=value)


def _testcase(suite: ET.Element, verdict: Verdict) -> None:
    variant = verdict.case.split("/")[1]
    name = f"{verdict.case}[{verdict.tactic}]"
    case = _element(suite, "testcase", classname=f"{op_of(verdict)}.{variant}", name=name, time=f"{verdict.seconds:.6f}")
    pairs: dict[str, object] = {"status": verdict.status, "lane": verdict.lane, "level": verdict.level}
    pairs |= {"execution": verdict.execution} if verdict.execution is not Execution.EXECUTED else {}
    pairs |= {"kernel": f"{verdict.kernel} ({verdict.kernel_source})"} if verdict.kernel else {}
    _properties(case, pairs)
    if verdict.status in _SKIPS:
        _element(case, "skipped", message=f"{verdict.status}: {verdict.reason}")
    elif verdict.status in FAILING:
        kind = "error" if verdict.status in _ERRORS else "failure"
        said = _element(case, kind, type=verdict.status, message=f"{verdict.status}: {verdict.reason or sentence(verdict)}")
        clause = f"clause {verdict.clause}\n" if verdict.clause else ""
        said.text = _legal(f"{sentence(verdict)}\n{clause}{verdict.repro}\n")


def junit(report: Report) -> str:
    """The XML text: one testsuite per op, one testcase per verdict, named after case and tactic."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in report.verdicts:
        groups[op_of(verdict)].append(verdict)
    root = ET.Element("testsuites", {key: str(value) for key, value in {"name": "lowbit", **_counts(report.verdicts)}.items()})
    for op, verdicts in sorted(groups.items()):
        counts = _counts(verdicts)
        suite = _element(root, "testsuite", name=op, timestamp=report.run.started, **counts)
        short = shortened(report.run, report.level_requested)
        _properties(suite, {
            "backend": report.subject.name, "target": report.subject.target, "contract": report.contract, "suite": report.suite,
            "level": "none" if report.level_granted is None else f"L{report.level_granted}", "digest": report.digest,
            "computed": where_executed(verdicts),
            "cases": short or "the whole list",
        })
        for verdict in verdicts:
            _testcase(suite, verdict)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
