"""The evaluation as HTML: a section of report.html where the backend's certificate is given, else a page of its own.

Decides: what is drawn and the coordinates of the drawings. Refuses: anything that records.py did not decide, and anything from
outside the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .. import html
from ..report import Report
from .paired import Comparison, Outcome
from .records import Eval, alarms

__all__ = ["page", "section"]

_KINDS = {Outcome.SERVES: "pass", Outcome.DRIFTS: "fail", Outcome.INCONCLUSIVE: "near"}
_ARMS = {"full": "full precision", "reference": "reference arithmetic", "floor": "another honest order", "backend": "backend"}
_LEAST = 1e-9  # divergences below are drawn there


@dataclass(frozen=True, slots=True)
class _Interval:
    """One line of the drawing of differences: places in percent of its width, text at its end."""

    title: str
    kind: str
    low: float
    middle: float
    high: float
    text: str


def _intervals(task: Any, span: float) -> list[_Interval]:
    """Paired differences of one task on an axis from minus to plus `span`, as shares."""
    rows: list[tuple[str, Comparison | None]] = [
        ("recipe loss", task.recipe), ("noise floor", task.floor), ("kernel error", task.kernel),
    ]
    found = []
    for title, one in rows:
        if one is None:
            continue
        places = [_place(value, span) for value in (one.interval.lower, float(one.table.difference), one.interval.upper)]
        middle, low, high = (100 * value for value in (float(one.table.difference), one.interval.lower, one.interval.upper))
        text = (
            f"{middle:+.1f} points ({low:+.1f} to {high:+.1f}), p = {one.p_value:.2g}, "
            f"detectable {100 * one.detectable:.1f}: {one.outcome}"
        )
        found.append(_Interval(title, _KINDS[one.outcome], places[0], places[1], places[2], text))
    return found


def _place(value: float, span: float) -> float:
    return 50 + 50 * min(max(value / span, -1.0), 1.0)


def _tasks(found: Eval) -> list[dict[str, Any]]:
    """Per task: a bar per arm, and the intervals of the paired differences with the margin."""
    drawn = []
    for task in found.tasks:
        wide = [one for one in (task.kernel, task.floor, task.recipe) if one is not None]
        reach = max(max(-one.interval.lower, one.interval.upper) for one in wide)
        span = min(1.0, max(reach * 1.1, 2 * task.kernel.margin))
        bars = [
            {"title": _ARMS[arm], "width": 100 * right / task.questions, "text": f"{100 * right / task.questions:.1f} %"}
            for arm, right in task.right.items()
        ]
        drawn.append({
            "task": task, "bars": bars, "intervals": _intervals(task, span), "margin": _place(-task.kernel.margin, span),
            "kind": _KINDS[task.kernel.outcome], "span": f"{100 * span:.0f}", "alarms": alarms(task),
        })
    return drawn


def _texts(found: Eval) -> dict[str, Any] | None:
    """Divergences of texts, floor across and backend upwards, both logarithmic, with the lines of equal and of `factor` times."""
    pairs = [pair for pair in found.kernel.texts if pair.backend is not None and pair.floor is not None]
    if not pairs:
        return None
    values = [max(value, _LEAST) for pair in pairs for value in (pair.backend or 0.0, pair.floor or 0.0)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)

    def at(value: float) -> float:
        return 100 * (math.log10(max(value, _LEAST)) - low) / (high - low)

    shift = 100 * math.log10(found.kernel.tokens.factor) / (high - low)
    return {
        "dots": [(at(pair.floor or 0.0), 100 - at(pair.backend or 0.0), pair) for pair in pairs],
        "ticks": [(f"1e{power}", 100 * (power - low) / (high - low)) for power in range(low, high + 1)],
        "shift": shift, "hidden": len(found.kernel.texts) - len(pairs),
    }


def _operations(found: Eval) -> list[dict[str, Any]]:
    """A bar per Linear: the share of outputs outside its interval where there are any, else of bits unlike the reference's."""
    return [
        {"row": row, "kind": "fail" if row.outside else "pass",
         "width": 100 * (row.outside / row.outputs if row.outside else row.differing),
         "text": f"{row.outside:,} of {row.outputs:,} outside" if row.outside else f"{100 * row.differing:.2g} % other bits"}
        for row in found.kernel.operations
    ]


def section(found: Eval) -> str:
    """The section, without style: the classes are those of report.html."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("section.html.j2").read_text(encoding="utf-8"))
    return template.render(
        found=found, kernel=found.kernel, tokens=found.kernel.tokens, tasks=_tasks(found), texts=_texts(found),
        operations=_operations(found), kind=_KINDS[found.kernel.outcome], served=found.serving.outcome == "granted",
    )


def page(found: Eval, certificate: Report | None = None) -> str:
    """The HTML text: the certificate's report with the section before its end, or the section alone in the same style."""
    if certificate is None:
        template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
            Path(__file__).with_name("alone.html.j2").read_text(encoding="utf-8")
        )
        return template.render(section=section(found), found=found)
    whole = html.page(certificate)
    head, end, rest = whole.rpartition("</main>")
    link = '<a href="#certificate">'
    return (head + section(found) + end + rest).replace(link, f'<a href="#evals">Evals</a>\n{link}', 1)
