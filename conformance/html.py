"""The report as one HTML page: a view of what `report.py` decided, with nothing added to it.

Decides: what a reader sees first (failures), how verdicts are gathered so that thousands of them stay below a few
megabytes, and the coordinates of the drawings. Refuses: anything from outside the file. The page holds its style, its
script and its data, forbids the network to itself, and says in attributes of the root element what became of it when it was
opened: `data-sections` (ids of those that rendered), `data-errors` (how many its script met), `data-width` and `data-overflow`
(of the window, and what sticks out of it, in pixels).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .audit_readings import FIELDS
from .audit_table import HEADS, headline, name_of, row_of, unread
from .backend import NEVER_EXECUTED
from .case import Case
from .report import AS_CONTRACT, CONSISTENT, REFUTED, CodeCoverage, Report, op_of, sentence, shortened, where_executed
from .verdict import FAILING, PASSING, Status, Verdict

__all__ = ["SECTIONS", "page"]

SECTIONS = (
    ("certificate", "Certificate"), ("failures", "Failures"), ("why", "Levels"), ("grid", "Verdicts"), ("executed", "Executed"),
    ("share", "Bound"), ("ulps", "ULPs"), ("heat", "Heat map"), ("power", "Power"), ("coverage", "Coverage"),
    ("mutants", "Mutants"), ("claims", "Claims"), ("audit", "Audit"), ("declarations", "Declarations"), ("waivers", "Waivers"),
    ("environment", "Environment"), ("cases", "All cases"),
)
"""Ids and titles of the sections, in their order. All are always there; an empty one says so in a sentence."""

_MARKS = {"pass": "✓", "fail": "✗", "unsupported": "–", "waived": "w"}
_GRAVEST_FIRST = (Status.CRASHED, Status.TIMEOUT, Status.MALFORMED, Status.RAISED, Status.DRIFT, Status.UNTRUSTED)
_ULPS = (*map(str, range(9)), ">8")
_HEAT_SHADES = 8
_MORE_PER_GROUP = 400  # further failures listed in one group; the table of all cases holds the rest
_REASONS_SHOWN = 4
_TILE = 64  # elements per side of the smallest tile that the heat map draws


@dataclass(frozen=True, slots=True)
class _Bar:
    """One labelled bar; `width` in percent of the drawing."""

    label: str
    text: str
    width: float
    kind: str
    note: str = ""


def _kind_of(status: Status) -> str:
    return "pass" if status in PASSING else "fail" if status in FAILING else str(status).lower()


def _number(value: float) -> str:
    """Three significant digits; what only stands for infinity is written as it."""
    return "∞" if value > 1e300 else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.2e}"


def _time(text: str) -> str:
    """An ISO 8601 time as a reader likes it; any other text as it is."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    return found.strftime("%Y-%m-%d %H:%M:%S ") + (found.strftime("%Z") or "without zone")


_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def _printable(value: Any) -> Any:
    """Text without control characters, which a backend's message may hold; anything else as it is."""
    return value.translate(_CONTROLS) if isinstance(value, str) else value


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _facts(verdict: Verdict) -> list[tuple[str, str]]:
    """What is known of the worst element and of the run, as pairs of name and value."""
    worst, facts = verdict.worst, []
    if worst is not None:
        wanted = worst.lo if worst.lo == worst.hi else f"{worst.lo} … {worst.hi}"
        place = ", ".join(map(str, worst.index))
        facts += [("worst element", f"{worst.tensor}[{place}]"), ("got", f"{worst.got} = {worst.value}"), ("admissible", wanted),
                  ("exact", worst.exact)]
        facts += [("outside by", f"{worst.ulps:,} ulp")] if worst.ulps else []
        facts += [("share of the bound", f"{_number(worst.share)}×")] if worst.share is not None else []
    facts += [("wrong", f"{verdict.wrong:,} of {verdict.judged:,} judged, {verdict.total:,} in all")] if verdict.wrong else []
    facts += [("kernel", f"{verdict.kernel} ({verdict.kernel_source})")] if verdict.kernel else []
    facts += [("sample", verdict.sample)] if verdict.sample else []
    return facts


def _failure_groups(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Failing verdicts by op, status and clause, gravest first; each group is shown by its smallest case."""
    groups: dict[tuple[int, str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.status in FAILING:
            groups[_GRAVEST_FIRST.index(verdict.status), op_of(verdict), verdict.clause].append(verdict)
    shown = []
    for (rank, op, clause), group in sorted(groups.items()):
        first, *rest = sorted(group, key=lambda verdict: (verdict.products, verdict.total, verdict.case, verdict.tactic))
        more = [{"said": sentence(verdict), "repro": verdict.repro} for verdict in rest[:_MORE_PER_GROUP]]
        shown.append({
            "status": _GRAVEST_FIRST[rank], "op": op, "clause": clause, "count": len(group), "first": first,
            "said": first.reason or sentence(first), "facts": _facts(first), "more": more, "left": len(rest) - len(more),
        })
    return shown


def _grid(verdicts: Iterable[Verdict]) -> tuple[list[str], list[tuple[str, list[dict[str, Any] | None]]]]:
    """(patterns, rows of op and cells). A cell counts verdicts by kind; None where the op has no case of the pattern."""
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for verdict in verdicts:
        cells[op_of(verdict), verdict.case.rsplit("/", 2)[1]][_kind_of(verdict.status)] += 1
    ops, patterns = (sorted({key[i] for key in cells}) for i in (0, 1))
    rows = []
    for op in ops:
        row: list[dict[str, Any] | None] = []
        for pattern in patterns:
            count = cells.get((op, pattern))
            if count is None:
                row.append(None)
                continue
            kind = next(kind for kind in ("fail", "waived", "pass", "unsupported") if count[kind])
            parts = [(name, f"{mark}{count[name]}") for name, mark in _MARKS.items() if count[name]]
            title = f"{op} {pattern}: " + ", ".join(f"{count[name]} {name}" for name in _MARKS if count[name])
            row.append({"kind": kind, "parts": parts, "title": title, "find": f"{op}/ /{pattern}/"})
        rows.append((op, row))
    return patterns, rows


def _share_bars(verdicts: Iterable[Verdict]) -> list[_Bar]:
    """The worst share of the bound per op, largest first; the drawing ends at 1.25 times the bound."""
    worst: dict[str, Verdict] = {}
    for verdict in verdicts:
        share = verdict.worst.share if verdict.worst else None
        best = worst.get(op_of(verdict))
        if share is not None and (best is None or best.worst is None or share > (best.worst.share or 0.0)):
            worst[op_of(verdict)] = verdict
    bars = []
    for op, verdict in worst.items():
        share = verdict.worst.share if verdict.worst and verdict.worst.share is not None else 0.0
        kind = "fail" if share > 1 else "near" if share > 0.9 else "pass"
        bars.append((share, _Bar(op, f"{_number(share)}×", min(share, 1.25) * 80, kind, verdict.case)))
    return [bar for _, bar in sorted(bars, key=lambda item: -item[0])]


def _histogram(verdicts: Iterable[Verdict]) -> list[_Bar]:
    """Elements by distance in ULPs from the correctly rounded exact result; bar lengths are logarithmic."""
    total: Counter[str] = Counter()
    for verdict in verdicts:
        total.update(verdict.ulp_histogram)
    elements = sum(total.values())
    if not elements:
        return []
    top = math.log1p(max(total.values()))
    far = max((i for i, key in enumerate(_ULPS[:-1]) if total[key]), default=0)
    keys = [*_ULPS[: max(far, 2) + 1], _ULPS[-1], *sorted(set(total) - set(_ULPS))]
    return [_Bar(key, f"{total[key]:,}", 100 * math.log1p(total[key]) / top, "pass" if key == "0" else "plain",
                 f"{100 * total[key] / elements:.3g} %") for key in keys]


def _histograms(verdicts: Sequence[Verdict]) -> list[tuple[str, list[_Bar]]]:
    """The histogram over all ops, then that of each op that has one."""
    ops = sorted({op_of(verdict) for verdict in verdicts if verdict.ulp_histogram})
    per_op = [(op, _histogram(verdict for verdict in verdicts if op_of(verdict) == op)) for op in ops]
    return [("all ops", _histogram(verdicts)), *per_op] if ops else []


def _tile_lines(size: int) -> tuple[int, list[float]]:
    """(tile side, places of the lines in percent) along an axis of `size` elements: 64, doubled until 32 lines are enough."""
    step = _TILE
    while size > 32 * step:
        step *= 2
    return step, [100 * edge / size for edge in range(step, size, step)]


def _heat(verdict: Verdict, title: str) -> dict[str, Any]:
    """Rectangles and tile lines of one heat map, in percent of the drawing; rows of the output run downwards."""
    dims = Case.split(verdict.case)[2]
    rows, columns = len(verdict.heat), max(map(len, verdict.heat))
    cells = []
    for i, row in enumerate(verdict.heat):
        for j, share in enumerate(row):
            shade = "x" if share > 1 else str(math.ceil(min(max(share, 0.0), 1.0) * _HEAT_SHADES))
            cells.append((100 * j / columns, 100 * i / rows, shade, f"cell {i} down, {j} across: {_number(share)}× the bound"))
    across, down = _tile_lines(dims.get("n", 0)), _tile_lines(dims.get("m", 0))
    return {"title": title, "verdict": verdict, "cells": cells, "width": 100 / columns, "height": 100 / rows, "rows": rows,
            "columns": columns, "across": across, "down": down, "dims": dims,
            "over": sum(share > 1 for row in verdict.heat for share in row),
            "top": _number(max(share for row in verdict.heat for share in row))}


def _heats(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Heat maps of the worst failing and of the worst passing case, as far as there are any."""
    drawn = [verdict for verdict in verdicts if any(map(len, verdict.heat))]
    maps = []
    for title, statuses in (("Worst failing case", FAILING | {Status.WAIVED}), ("Passing case nearest to its bound", PASSING)):
        here = [verdict for verdict in drawn if verdict.status in statuses]
        if here:
            maps.append(_heat(max(here, key=lambda verdict: max(share for row in verdict.heat for share in row)), title))
    return maps


def _power(power: Mapping[str, Mapping[str, int]]) -> tuple[list[str], list[tuple[str, list[int | None]]]]:
    faults = sorted({fault for row in power.values() for fault in row})
    return faults, [(op, [row.get(fault) for fault in faults]) for op, row in power.items()]


def _code_maps(codes: Iterable[CodeCoverage]) -> list[dict[str, Any]]:
    """Per format, which codes any op saw, as cells of a square of 16 codes a row."""
    seen: dict[tuple[str, int], int] = defaultdict(int)
    elements: Counter[tuple[str, int]] = Counter()
    for row in codes:
        seen[row.format, row.bits] |= int(row.bitmap, 16)
        elements[row.format, row.bits] += row.elements
    maps = []
    for (name, bits), bitmap in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0])):
        size = 1 << bits
        missing = [f"0x{code:0{2 if bits > 4 else 1}x}" for code in range(size) if not bitmap >> code & 1]
        maps.append({
            "format": name, "bits": bits, "count": size - len(missing), "size": size, "elements": elements[name, bits],
            "missing": missing, "rows": max(size // 16, 1),
            "cells": [(code % 16, code // 16, bool(bitmap >> code & 1), f"0x{code:02x}") for code in range(size)],
        })
    return maps


def _code_rows(codes: Iterable[CodeCoverage]) -> list[tuple[str, str, str, int, int, int]]:
    return [(row.op, row.tensor, row.format, int(row.bitmap, 16).bit_count(), 1 << row.bits, row.elements) for row in codes]


def _residues(report: Report) -> tuple[list[str], list[tuple[str, list[dict[str, Any] | None]]]]:
    """(names of residues, rows of op and cells): which residues of each size the judged cases had."""
    names = sorted({name for rows in report.coverage.residues.values() for name in rows})
    table: list[tuple[str, list[dict[str, Any] | None]]] = []
    for op, rows in report.coverage.residues.items():
        row: list[dict[str, Any] | None] = []
        for name in names:
            counts = rows.get(name)
            if counts is None:
                row.append(None)
                continue
            top = math.log1p(max(counts))
            bars = [(i, 100 * math.log1p(count) / top) for i, count in enumerate(counts) if count]
            row.append({"seen": sum(map(bool, counts)), "of": len(counts), "bars": bars})
        table.append((op, row))
    return names, table


def _mutants(report: Report) -> dict[str, Any] | None:
    strength = report.strength
    if strength is None:
        return None
    lanes = sorted({lane for killers in strength.killed_by.values() for lane in killers})
    rows = sorted(strength.killed_by.items(), key=lambda item: (bool(item[1]), item[0]))
    return {"strength": strength, "lanes": lanes, "rows": rows, "survivors": [mutant for mutant, killers in rows if not killers]}


def _waivers(report: Report) -> list[dict[str, Any]]:
    """Waivers with the days they had left when the run ended, soonest first."""
    ended = date.fromisoformat(report.run.finished[:10])
    rows = []
    for waiver in sorted(report.waivers, key=lambda waiver: (waiver.expires, waiver.id)):
        left = (waiver.expires - ended).days
        kind = "fail" if left < 0 else "near" if left < 30 else "pass"
        rows.append({"waiver": waiver, "left": left, "kind": kind, "width": 100 * min(max(left, 0), 365) / 365})
    return rows


def _status_bar(report: Report) -> list[tuple[str, str, int, float]]:
    """(status, kind, verdicts, percent) of the statuses that occur."""
    selected = max(report.totals.selected, 1)
    counts = [(status, report.totals.statuses[str(status)]) for status in Status]
    return [(str(status), _kind_of(status), count, 100 * count / selected) for status, count in counts if count]


def _case_rows(verdicts: Iterable[Verdict]) -> list[tuple[Any, ...]]:
    """What the table of all cases is made of: case, tactic, lane, status, share, seconds, sentence."""
    return [
        (verdict.case, verdict.tactic, verdict.lane, str(verdict.status),
         None if verdict.worst is None or verdict.worst.share is None else _number(verdict.worst.share),
         round(verdict.seconds, 4), "" if verdict.status in PASSING else verdict.reason)
        for verdict in verdicts
    ]


def _audits(report: Report) -> list[dict[str, Any]]:
    """Findings of the probes, those that are not consistent first."""
    kinds = {REFUTED: "fail", CONSISTENT: "pass"}
    rows = [
        {"name": name_of(row), "kind": kinds.get(row.standing, "near"), "cells": row_of(row), "row": row} for row in report.audits
    ]
    return sorted(rows, key=lambda row: ("fail", "near", "pass").index(row["kind"]))


def _summary(report: Report) -> str:
    """The outcome in a sentence."""
    failing = sum(row.failing for row in report.counts)
    where = where_executed(report.verdicts)
    if report.level_granted is None:
        if where == NEVER_EXECUTED:
            return f"No level is granted: {where}."
        why = shortened(report.run, report.level_requested) or "see the reasons below"
        why = f"{failing:,} of {report.totals.selected:,} verdicts fail" if failing else why
        return f"No level is granted: {why}."
    told = {"executed": "Executed on the device of the target.",
            "emulated": "Emulated: nothing ran on the device of the target.",
            "partly emulated": "Partly emulated: not every verdict was reached on the device of the target."}
    level = report.levels[report.level_granted]
    below = "" if report.level_granted == report.level_requested else f", below the requested L{report.level_requested}"
    waived = report.totals.statuses[str(Status.WAIVED)]
    excused = f" {waived:,} failing verdict{' is' if waived == 1 else 's are'} waived." if waived else ""
    audited = f" Accumulators {headline(report.audits)}." if report.audits else ""
    return f"L{level.level} “{level.name}” is granted {level.reasons[0]}{below}. {told.get(where, '')}{excused}{audited}"


def page(report: Report) -> str:
    """The HTML text of a report. It needs no other file and no network."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              finalize=_printable)
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    patterns, grid = _grid(report.verdicts)
    faults, power = _power(report.power)
    residues, residue_rows = _residues(report)
    return template.render(
        report=report, sections=SECTIONS, summary=_summary(report), where=where_executed(report.verdicts),
        groups=_failure_groups(report.verdicts), failing=sum(row.failing for row in report.counts), patterns=patterns, grid=grid,
        marks=_MARKS, statuses=_status_bar(report), shares=_share_bars(report.verdicts), histograms=_histograms(report.verdicts),
        heats=_heats(report.verdicts), shades=[*map(str, range(_HEAT_SHADES + 1)), "x"], faults=faults, power=power,
        code_maps=_code_maps(report.coverage.codes), code_rows=_code_rows(report.coverage.codes), residues=residues,
        residue_rows=residue_rows, mutants=_mutants(report), waivers=_waivers(report), reasons_shown=_REASONS_SHOWN,
        cases=_case_rows(report.verdicts), as_contract=AS_CONTRACT, size=_bytes, time=_time, duration=_duration, number=_number,
        audits=_audits(report), audit_heads=[HEADS[name] for name in FIELDS], unread=unread(report.audits),
        told=headline(report.audits), short=shortened(report.run, report.level_requested),
        failing_statuses=sorted(map(str, FAILING)), passing_statuses=sorted(map(str, PASSING)),
    )
