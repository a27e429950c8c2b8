"""Runs of `lowbit eval` that were brought back from a device: what is kept of them, and the tables of docs/evals.md.

Decides: what is kept of a run (eval.json with names in place of its folders, the seconds and requests of each arm and task as the
log tells them), and how its figures are said. A run that did not end is kept as how far each arm came.
Refuses: a folder without runs, and a page without the two marks: one sentence.

    python tests/device/evals_kept.py keep RUNS KEPT      RUNS/NAME/{log,settings.json,eval.json,answers}
    python tests/device/evals_kept.py table KEPT PAGE     writes the tables between the marks of PAGE
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from lowbit.conformance.evals.paired import Comparison
from lowbit.conformance.evals.records import Eval, read_eval, write_eval

__all__ = ["MARKS", "keep", "main", "table", "tables"]

MARKS = ("<!-- runs: written by tests/device/evals_kept.py -->", "<!-- end of runs -->")
"""Lines of a page between which its tables stand."""

_ASKED = re.compile(r"^(\w+): (\w+) asked, (\d+) requests in (\d+) s$", re.MULTILINE)
_PROGRESS = re.compile(r"^(\w+): (\w+) (\d+) of (\d+) requests, about ", re.MULTILINE)
_PLACES = ("base", "data")  # settings that are folders of the machine


class KeptError(ValueError):
    """Runs or a page that cannot be used."""


# From a device ----------------------------------------------------------------------------------------------------------------


def keep(runs: Path, kept: Path) -> int:
    """Every run below `runs` into `kept`: NAME.json where it ended, and runs.json on all. Returns how many ended."""
    found = sorted(path.parent for path in runs.glob("*/log"))
    if not found:
        raise KeptError(f"{runs}: no run is there; expected NAME/log below it")
    kept.mkdir(parents=True, exist_ok=True)
    index = {}
    for run in found:
        index[run.name] = {"ended": (run / "eval.json").exists()} | _timed((run / "log").read_text(encoding="utf-8"))
        if index[run.name]["ended"]:
            write_eval(kept / f"{run.name}.json", _named(read_eval(run / "eval.json")))
    (kept / "runs.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return sum(run["ended"] for run in index.values())


def _timed(log: str) -> dict[str, Any]:
    """Seconds by arm and task, and requests as [answered, of] by arm and task. A run that was killed has several pieces: their
    seconds are added, and those of a piece that was killed are not told."""
    seconds: dict[str, dict[str, int]] = {}
    timed: dict[str, dict[str, int]] = {}
    for arm, task, count, taken in _ASKED.findall(log):
        for held, value in ((seconds, taken), (timed, count)):
            held.setdefault(arm, {})[task] = held.get(arm, {}).get(task, 0) + int(value)
    requests: dict[str, dict[str, list[int]]] = {}
    for arm, task, done, of in _PROGRESS.findall(log):
        requests.setdefault(arm, {})[task] = [int(done), int(of)]
    return {"seconds": seconds, "timed": timed, "requests": requests}


def _named(found: Eval) -> Eval:
    """The same with names in place of folders."""
    settings = {key: Path(value).name if key in _PLACES and value else value for key, value in found.settings.items()}
    bundle = None if found.kernel.bundle is None else Path(found.kernel.bundle).name
    return replace(found, settings=settings, kernel=replace(found.kernel, bundle=bundle))


# To a page ------------------------------------------------------------------------------------------------------------------


def _points(found: Comparison | None) -> str:
    if found is None:
        return "not measured"
    low, high = (f"{100 * limit:+.1f}" for limit in (found.interval.lower, found.interval.upper))
    return f"{100 * float(found.table.difference):+.1f} ({low} to {high})"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2g}"


def _answers(name: str, found: Eval) -> list[list[str]]:
    rows = []
    for task in found.tasks:
        right = [task.right.get(arm) for arm in ("full", "reference", "backend")]
        shares = ["" if count is None else f"{100 * count / task.questions:.1f} %" for count in right]
        kernel = task.kernel
        judged = [f"{kernel.p_value:.2g}", f"{100 * kernel.detectable:.1f}", str(kernel.outcome)]
        said = [_points(task.recipe), _points(kernel), _points(task.floor)]
        rows.append([name, str(found.settings["backend"]), task.name, str(task.questions), *shares, *said, *judged])
    return rows


def _kernel(name: str, found: Eval, about: Mapping[str, Any]) -> list[str]:
    kernel, tokens = found.kernel, found.kernel.tokens
    outside = sum(operation.outside > 0 for operation in kernel.operations)
    divergence = f"{_number(tokens.kl)} and {_number(tokens.floor_kl)}"
    ratio = f"{_number(tokens.ratio.lower)} to {_number(tokens.ratio.upper)}"
    return [
        name, f"{tokens.tokens:,} of {tokens.texts}", divergence, ratio, _number(kernel.recipe_kl),
        f"{outside} of {len(kernel.operations)}", str(kernel.outcome), _seconds(about),
    ]


def _seconds(about: Mapping[str, Any]) -> str:
    """Seconds of the backend's arm by task, of those tasks that were asked in one piece."""
    whole = {
        task: taken for task, taken in about["seconds"].get("backend", {}).items()
        if about["timed"]["backend"][task] == about["requests"]["backend"][task][1]
    }
    return ", ".join(f"{task} {taken} s" for task, taken in whole.items()) or "not in one piece"


def _unended(name: str, about: Mapping[str, Any]) -> str:
    came = [
        f"{arm} {task} {done} of {of}" for arm, tasks in about["requests"].items() for task, (done, of) in tasks.items()
    ]
    return f"- {name} did not end; requests answered: {', '.join(came) or 'none'}."


def tables(kept: Path) -> str:
    """What `keep` kept, as Markdown."""
    index = json.loads((kept / "runs.json").read_text(encoding="utf-8"))
    found = {name: read_eval(kept / f"{name}.json") for name, about in index.items() if about["ended"]}
    parts = []
    if found:
        head = [
            "run", "backend", "task", "questions", "full precision", "reference", "backend's", "recipe loss", "kernel error",
            "noise floor", "p", "detectable", "verdict",
        ]
        parts.append(_rows(head, [row for name, one in found.items() for row in _answers(name, one)]))
        head = [
            "run", "tokens of texts", "KL of kernel and floor", "ratio", "KL of recipe", "Linears outside", "kernel level",
            "backend's arm took",
        ]
        parts.append(_rows(head, [_kernel(name, one, index[name]) for name, one in found.items()]))
    left = [_unended(name, about) for name, about in index.items() if not about["ended"]]
    return "\n\n".join([*parts, *(["\n".join(left)] if left else [])])


def table(kept: Path, page: Path) -> None:
    """Write the tables between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, first, rest = text.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not (first and last):
        raise KeptError(f"{page}: the lines {MARKS[0]!r} and {MARKS[1]!r} are not both there; put them where the tables belong")
    page.write_text(f"{before}{first}\n\n{tables(kept)}\n\n{last}{after}", encoding="utf-8")


_STEPS: Mapping[str, Callable[[Path, Path], object]] = {"keep": keep, "table": table}


def main(arguments: list[str] | None = None, told: IO[str] = sys.stderr) -> int:
    """0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    try:
        done = _STEPS[given.step](given.source, given.target)
    except KeptError as error:
        print(f"{given.step}: {error}", file=told)
        return 1
    print(f"{given.step}: {given.target}{'' if done is None else f', {done} runs ended'}", file=told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
