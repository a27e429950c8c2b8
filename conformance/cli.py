"""The `lowbit` command. Each verb is a thin door: it parses, calls one room, prints, and ends with a documented code.

Decides: what a person sees on a terminal and which exit code follows from it. Refuses: tracebacks as messages. Every error a
user can cause is one sentence; a defect of lowbit itself saves its traceback and says where.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from . import report as reports
from . import waivers as waivers_room
from .audit_table import headline
from .backend import EXECUTIONS, NOT_EXECUTED, BackendError, backend_names, describe, execution_of, find_backend
from .exit_codes import ExitCode
from .op import DomainError
from .ops import ops
from .report import MergeError, OutputError, ReportError
from .selection import CONTRACT, PER_OP, REPEATS, case_list
from .verdict import FAILING, Status, Verdict
from .waivers import WaiverError
from .worker import WorkerError

__all__ = ["app", "main"]

app = typer.Typer(
    name="lowbit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Validate and certify low-bit matrix kernels (int4, NVFP4, fp8) against a written contract.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 bad input file, 4 nothing to certify, 5 not writable, 6 defect of lowbit.",
)

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)
_LONGEST = 1_000_000  # seconds of a timeout: what a system call waits for at most is not much more
_WITHOUT_OUTPUT = (Status.UNSUPPORTED, Status.RAISED, Status.CRASHED, Status.TIMEOUT)
_COLOUR = {Status.EXACT: "green", Status.WITHIN: "green", Status.UNSUPPORTED: "dim", Status.WAIVED: "yellow"}



def _writable(path: Path | None) -> Path | None:
    """The path, whose folder exists and can be written: found before anything is computed."""
    if path is not None:
        reports.prepare_folder(path.resolve().parent)
    return path


def _seconds(value: float) -> float:
    """A time that can be waited for."""
    if not 0 < value <= _LONGEST:
        raise Stop(ExitCode.USAGE, f"--timeout {value:g}: expected seconds above 0, at most {_LONGEST:,}")
    return value


JsonOption = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="Also write the figures to this file as JSON.")
]
TimeoutOption = Annotated[float, typer.Option(callback=_seconds, help="Seconds that one call of the backend may take.")]
BackendOption = Annotated[str, typer.Option("--backend", "-b", help="Backend: NAME, NAME:ARGUMENT or python:FILE.py:ATTRIBUTE.")]


class Stop(Exception):
    """An end with a code and, unless empty, one sentence."""

    def __init__(self, code: ExitCode, message: str = "") -> None:
        super().__init__(message)
        self.code, self.message = code, message


def _told(line: str) -> None:
    """One step of a long command, on stderr."""
    _err.print(line, markup=False)


def _write_json(path: Path | None, data: Any) -> None:
    if path is not None:
        reports.write_atomically(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


# list ----------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="ops, tensors, options, constraints, cases, backends, datapaths, recipes or layouts")
    ] = "ops",
    op: Annotated[
        str, typer.Option(help="For tensors, options, constraints, and cases (those that all backends share): only this op.")
    ] = "",
    json_path: JsonOption = None,
) -> None:
    """List what there is: ops with their tensors, options and constraints, cases, backends, datapaths, recipes, layouts."""
    from lowbit.references.datapaths import DATAPATHS
    from lowbit.references.layouts import LAYOUTS
    from lowbit.references.recipes import RECIPES

    rooms: dict[str, Any] = {
        "ops": lambda: [(o.name, o.formula, ", ".join(o.variants), str(len(o.patterns))) for o in ops().values()],
        "tensors": lambda: [
            (
                name, spec.name, spec.role.name.lower(), str(getattr(spec.format, "name", f"by option {spec.format}")),
                f"[{', '.join(spec.shape)}]", " and ".join(f"{key}: {' or '.join(tokens)}" for key, tokens in spec.when),
                spec.layout,
            )
            for name in _names(op) for spec in ops()[name].tensors
        ],
        "options": lambda: [
            (name, option.name, ", ".join(option.tokens)) for name in _names(op) for option in ops()[name].options
        ],
        "constraints": lambda: [(name, rule.clause, rule.expression) for name in _names(op) for rule in ops()[name].constraints],
        "cases": lambda: [
            (str(item.case), item.lane, f"L{item.level}") for name in _names(op) for item in case_list(ops()[name])
        ],
        "backends": lambda: [(name, *_about(name)) for name in backend_names()],
        "datapaths": lambda: [
            (p.name, p.family.name, str(p.products), str(p.fraction_bits), str(p.output_bits), p.evidence.name.lower(), p.source)
            for p in DATAPATHS.values()
        ],
        "recipes": lambda: [(name, recipe.source) for name, recipe in RECIPES.items()],
        "layouts": lambda: [(name, layout.source) for name, layout in LAYOUTS.items()],
    }
    heads = {
        "ops": ("op", "formula", "variants", "patterns"), "cases": ("case", "lane", "level"),
        "tensors": ("op", "tensor", "role", "format", "shape", "where", "layout"),
        "options": ("op", "option", "tokens, the default first"), "constraints": ("op", "clause", "must hold"),
        "backends": ("backend", "target", "status"),
        "datapaths": ("datapath", "family", "products", "fraction bits", "output bits", "evidence", "source"),
        "recipes": ("recipe", "source"), "layouts": ("layout", "source"),
    }
    if what not in rooms:
        raise Stop(ExitCode.USAGE, f"lowbit list {what}: unknown; list one of {', '.join(rooms)}")
    rows = rooms[what]()
    _write_json(json_path, [dict(zip(heads[what], row, strict=True)) for row in rows])
    if what == "cases":
        for row in rows:
            print("\t".join(row))
        return
    table = Table(*(Column(head, overflow="fold") for head in heads[what]), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    _out.print(table)


def _names(op: str) -> Sequence[str]:
    if op and op not in ops():
        raise DomainError(f"unknown op {op!r}; the ops are {', '.join(ops())}")
    return (op,) if op else tuple(ops())


def _about(name: str) -> tuple[str, str]:
    try:
        backend = find_backend(name)
    except BackendError as error:
        return "", f"a gallery; write {name}:NAME" if name in ("mutant", "variant") else str(error)
    try:
        execution = execution_of(backend)
    except Exception as error:  # a device that is there and does not start says so here
        return str(backend.target), f"{type(error).__name__}: {error}"
    return str(backend.target), {"executed": "ready", "emulated": "ready, emulated", "compiled": NOT_EXECUTED}[execution]


# certify -------------------------------------------------------------------------------------------------------------


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise Stop(ExitCode.USAGE, f"--shard {text}: expected i/n with 1 <= i <= n, for example 2/4")
    return int(first), int(last)


def _level(text: str) -> int:
    if text.upper() not in ("L0", "L1", "L2", "L3"):
        raise Stop(ExitCode.USAGE, f"--level {text}: expected L0, L1, L2 or L3 (L4: `lowbit eval`)")
    return int(text[1:])


@contextmanager
def _progress(total: int, title: str) -> Iterator[Any]:
    """Calls `step(label)` per case: a bar on a terminal, a plain line every few seconds elsewhere."""
    if _err.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        )
        with Progress(*columns, console=_err, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda label: bar.update(task, advance=1, description=f"{title} {label}")
        return
    state = {"done": 0, "last": time.monotonic()}

    def step(label: str) -> None:
        state["done"] += 1
        if time.monotonic() - state["last"] > 10:
            state["last"] = time.monotonic()
            _err.print(f"{title}: {state['done']:,.0f} of {total:,} cases, now {label}")

    yield step


def _headline(verdict: Verdict, where: str = "") -> Text:
    """Status in its colour, case, place, and the tactic where it is not the only one. A Text: ids are no markup."""
    tactic = f" [{verdict.tactic}]" if verdict.tactic != "default" else ""
    return Text.assemble((str(verdict.status), _COLOUR.get(verdict.status, "red")), f" {verdict.case}{where}{tactic}")


def _show(verdict: Verdict) -> None:
    """A failing verdict as three lines: what, why, how to see it again."""
    _err.print(_headline(verdict))
    _err.print(f"  {verdict.reason}" + (f" (clause {verdict.clause})" if verdict.clause else ""), markup=False)
    if verdict.worst is not None and verdict.wrong:
        w = verdict.worst
        place, exact = f"{w.tensor}{list(w.index)}", w.exact or "n/a"
        _err.print(f"  worst: {place} got {w.got} ({w.value}), expected {w.lo}..{w.hi}, exact {exact}", markup=False)
    _err.print(f"  {verdict.repro}", markup=False)


def _for_target(target: str) -> tuple[str, ...]:
    """The backends of a target to certify here: those that execute; where there is none those that are emulated; then those
    that are compiled only. Stops with code 4 where there is none at all. A device that is there and does not start stops it."""
    found: dict[str, list[str]] = {word: [] for word in EXECUTIONS}
    for name in backend_names():
        try:
            backend = find_backend(name)
        except BackendError:
            continue
        if backend.target != target:
            continue
        try:
            found[execution_of(backend)].append(name)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise Stop(ExitCode.NOTHING_TO_CERTIFY, f"target {target}: backend {name} cannot use its device: {said}") from error
    chosen = next((tuple(names) for names in found.values() if names), ())
    if not chosen:
        raise Stop(
            ExitCode.NOTHING_TO_CERTIFY,
            f"target {target}: nothing to certify, because this release ships no backend for it and none is installed; a backend "
            "registers under the entry-point group lowbit.backends (docs/backends.md)",
        )
    return chosen


@app.command()
def certify(
    backend: Annotated[str, typer.Argument(help="Backend: NAME, NAME:ARGUMENT or python:FILE.py:ATTRIBUTE.")] = "",
    level: Annotated[str, typer.Option(help="Highest level to ask for: L0 to L3.")] = "L2",
    ops_: Annotated[str, typer.Option("--ops", help="Only these ops, comma separated.")] = "",
    shard: Annotated[str, typer.Option(help="Run part i of n of the case list; `lowbit merge` joins the reports.")] = "1/1",
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.html, junit.xml.")] = Path("reports/run"),
    target: Annotated[str, typer.Option(help="Certify the backend of this target (cuda, ascend, rocm, xpu, cpu).")] = "",
    waivers: Annotated[Path | None, typer.Option(help="Waiver file (TOML).")] = None,
    tensors: Annotated[str, typer.Option(help="FILE.safetensors[:GLOB]: add a lane of real weights.")] = "",
    per_op: Annotated[int, typer.Option(min=1, help="Drawn cases per op; fewer than 170 is a shortened run: no level.")] = PER_OP,
    timeout: TimeoutOption = 60.0,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of a stability case (L3); fewer than 100: no level.")] = REPEATS,
    require_device: Annotated[
        bool, typer.Option("--require-device", help="Fail unless every claimed op ran on the device.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Keep the verdicts of a killed run in --out.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side, each with a part of the list.")] = 1,
    strength: Annotated[Path | None, typer.Option(help="Figures of `lowbit mutants --json` to show in the report.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Judge a backend on every case of a level and write a report; with --target each backend of the target that runs here, into
    a folder of its name where there are several."""
    from . import run

    if not backend and not target:
        raise Stop(ExitCode.USAGE, "certify needs a backend, for example `lowbit certify cpu`, or --target")
    if backend and target:
        raise Stop(ExitCode.USAGE, f"certify got a backend, {backend}, and --target {target}: expected one of the two")
    if jobs > 1 and _shard(shard) != (1, 1):
        raise Stop(ExitCode.USAGE, f"certify got --jobs {jobs} and --shard {shard}: expected one of the two")
    names = (backend,) if backend else _for_target(target)
    plans = [
        run.Plan(
            name, _level(level), tuple(op for op in ops_.split(",") if op), _shard(shard), per_op, timeout, (), repeats,
            tuple(waivers_room.read(waivers)) if waivers else (), tensors,
        )
        for name in names
    ]
    power = _strength(strength) if strength else None
    for op in plans[0].ops:
        _names(op)
    figures, ends = [], []
    for plan in plans:
        result = _certified(plan, out / plan.backend if len(plans) > 1 else out, level, resume, power, jobs)
        figures.append(_figures(result))
        try:
            _end(result, require_device)
        except Stop as stop:
            ends.append(Stop(stop.code, f"{plan.backend}: {stop.message}" if len(plans) > 1 and stop.message else stop.message))
    _write_json(json_path, figures if len(plans) > 1 else figures[0])
    if ends:
        raise Stop(min(end.code for end in ends), "; ".join(end.message for end in ends if end.message))


def _certified(
    plan: Any, out: Path, level: str, resume: bool, power: reports.Strength | None, jobs: int
) -> reports.Report:
    """Run one plan with its progress, and write the three reports into `out`."""
    from . import html, junit, run, shards

    reports.prepare_folder(out)
    partial = out / "verdicts.jsonl"
    done = reports.load_partial(partial) if resume and partial.exists() else ()
    progress: dict[str, Any] = {}
    told: set[str] = set()

    def start(total: int, name: str, marks: Mapping[str, object]) -> None:
        if resume and partial.exists():
            reports.check_partial(partial, marks)
        else:
            reports.begin_partial(partial, marks)
        progress["context"] = _progress(total, f"certify {name} {level}")
        progress["step"] = progress["context"].__enter__()

    def verdict(found: Verdict) -> None:
        reports.append_verdict(partial, found)
        if found.case not in told:  # one step for all tactics of a case
            told.add(found.case)
            progress["step"](found.case.split("/")[0])
        if found.status in FAILING:
            _show(found)

    def alone(total: int, session: Any) -> None:
        start(total, session.name, shards.marks_of_run(plan, session, 1))

    try:
        if jobs > 1:
            result = shards.certify_side_by_side(plan, jobs, on_start=start, on_verdict=verdict, done=done, strength=power)
        else:
            result = run.certify(plan, on_start=alone, on_verdict=verdict, done=done, strength=power)
    except shards.ShardError as error:
        raise Stop(ExitCode.INTERRUPTED, str(error)) from error
    finally:
        if "context" in progress:
            progress["context"].__exit__(None, None, None)
    reports.write_atomically(out / "report.json", reports.to_json(result))
    reports.write_atomically(out / "junit.xml", junit.junit(result))
    reports.write_atomically(out / "report.html", html.page(result))
    partial.unlink(missing_ok=True)
    _summary(result, out)
    return result


def _strength(path: Path) -> reports.Strength:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        killed_by = {str(name): tuple(map(str, lanes)) for name, lanes in data["killed_by"].items()}
        return reports.Strength(killed_by, int(data["variants"]), int(data["false_alarms"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ReportError(f"{path} does not hold the figures of `lowbit mutants --json` ({said})") from error


def _figures(result: reports.Report) -> dict[str, Any]:
    return {
        "backend": result.subject.reference, "contract": result.contract, "level": result.level_granted,
        "shortened": reports.shortened(result.run, result.level_requested),
        "statuses": dict(result.totals.statuses), "cases": result.totals.cases, "seconds": result.run.seconds,
        "products": result.coverage.products, "median_k": result.coverage.median_k,
        "problems": dict(result.coverage.problems), "long_k": dict(result.coverage.long_k), "peak_bytes": result.peak_bytes,
    }


def _summary(result: reports.Report, out: Path) -> None:
    counts = ", ".join(f"{number:,} {status}" for status, number in sorted(result.totals.statuses.items()) if number)
    granted = "no level" if result.level_granted is None else f"level L{result.level_granted}"
    where, seconds = reports.where_executed(result.verdicts), result.run.seconds
    _out.print(f"{result.subject.name}: {granted} granted, contract {result.contract}, {where}", markup=False)
    cases, products = result.totals.cases, result.coverage.products
    _out.print(f"  {counts}; {cases:,} cases, {products:,} products, {seconds:,.0f} s", markup=False)
    if result.audits:
        _out.print(f"  accumulators: {headline(result.audits)}", markup=False)
    short = reports.shortened(result.run, result.level_requested)
    if short:
        _out.print(f"  {short}; a level asks for the whole list", markup=False)
    for row in result.levels:
        if row.outcome == "refused" and row.reasons != (short,):
            for reason in row.reasons[:8]:
                _out.print(f"  L{row.level} {row.name} refused: {reason}", markup=False)
    _out.print(f"  report: {out / 'report.html'}", markup=False)


def _end(result: reports.Report, require_device: bool) -> None:
    failed = any(verdict.status in FAILING for verdict in result.verdicts)
    owed = waivers_room.findings(result.verdicts, result.waivers, result.manifest.cases, datetime.now(UTC).date())
    if failed or owed:
        raise Stop(ExitCode.FAILED, "; ".join(owed))
    whole = result.run.shard == (1, 1)
    if whole and reports.where_executed(result.verdicts) == NOT_EXECUTED:
        reason = next(verdict.reason for verdict in result.verdicts)
        raise Stop(ExitCode.NOTHING_TO_CERTIFY, f"{result.subject.name}: {reason}")
    if whole and all(verdict.status is Status.UNSUPPORTED for verdict in result.verdicts if verdict.lane != "reject"):
        raise Stop(ExitCode.NOTHING_TO_CERTIFY, "no case was judged: the backend supports none of the selected problems")
    if require_device and reports.unexecuted(result):
        missing = ", ".join(reports.unexecuted(result))
        raise Stop(ExitCode.NOTHING_TO_CERTIFY, f"--require-device: not executed on the device: {missing}")
    if reports.shortened(result.run, result.level_requested):
        return  # it asks for no level
    if whole and result.level_granted != result.level_requested:
        raise Stop(ExitCode.FAILED, f"level L{result.level_requested} was asked for and is not granted; the report says why")


# one case ------------------------------------------------------------------------------------------------------------


@app.command("run")
def run_(
    case: Annotated[str, typer.Argument(help="A case id.")], backend: BackendOption = "cpu",
    tactic: Annotated[str, typer.Option(help="Only this tactic.")] = "",
    bundle: Annotated[Path | None, typer.Option(help="Write operands, outputs and expectation to this file.")] = None,
    timeout: TimeoutOption = 60.0,
    tensors: Annotated[str, typer.Option(help="FILE.safetensors[:GLOB] of a case of real weights.")] = "",
    json_path: JsonOption = None,
) -> None:
    """Run one case on a backend and print its verdict."""
    from . import bundle as bundles
    from . import run

    if bundle is not None:
        bundles.bundled(case)
        reports.prepare_folder(bundle.resolve().parent)
    found = run.run_one(case, backend, tactic=tactic, timeout=timeout, source=tensors)
    if not found:
        raise Stop(ExitCode.USAGE, f"{backend} has no tactic {tactic!r} for this case")
    for verdict in found:
        _print_verdict(verdict)
    shown = next((verdict for verdict in found if verdict.status in FAILING), found[0])
    _write_json(json_path, [json.loads(reports.verdict_json(verdict)) for verdict in found])
    if bundle is not None and shown.status in _WITHOUT_OUTPUT:
        _out.print(f"no bundle: {shown.status} leaves no output to store", markup=False)
    elif bundle is not None:
        kept = bundles.record(case, backend, shown.tactic, bundle, timeout=timeout, failing=shown.status in FAILING)
        if kept is None:
            said = f"no bundle: run again {bundles.ATTEMPTS} times the case passed; the kernel does not repeat its bits"
        elif kept.batch or kept.output_sha256 == shown.output_sha256:
            said = f"bundle: {bundle}"
        else:
            said = f"bundle: {bundle}\n  of a second run, whose bits are not those judged above: the kernel does not repeat them"
        _out.print(said, markup=False)
    _end_verdicts(found)


def _print_verdict(verdict: Verdict) -> None:
    _out.print(_headline(verdict, f" on {verdict.backend}"))
    for line in (verdict.reason, verdict.sample):
        if line:
            _out.print(f"  {line}", markup=False)
    if verdict.worst is not None:
        w = verdict.worst
        share = f", {w.share:.1%} of the bound" if w.share is not None else ""
        place, exact = f"{w.tensor}{list(w.index)}", w.exact or "n/a"
        _out.print(f"  worst {place}: got {w.got} = {w.value}, admissible {w.lo}..{w.hi}, exact {exact}{share}", markup=False)
    if verdict.power:
        shown = ", ".join(f"{name} {'shown' if seen else 'NOT shown'}" for name, seen in verdict.power.items())
        _out.print(f"  power: {shown}", markup=False)
    if verdict.kernel:
        _out.print(f"  kernel: {verdict.kernel} ({verdict.kernel_source})", markup=False)
    if verdict.status in FAILING:
        _out.print(f"  {verdict.repro}", markup=False)


def _end_verdicts(found: Sequence[Verdict]) -> None:
    if any(verdict.status in FAILING for verdict in found):
        raise Stop(ExitCode.FAILED)
    if all(verdict.status is Status.UNSUPPORTED for verdict in found):
        raise Stop(ExitCode.NOTHING_TO_CERTIFY, "the backend does not support this problem")


@app.command()
def explain(
    source: Annotated[str, typer.Argument(help="A case id or a bundle file.")],
    element: Annotated[str, typer.Argument(help="ROW,COL of the output.")],
    backend: BackendOption = "cpu", tactic: Annotated[str, typer.Option(help="Tactic to explain.")] = "default",
    terms: Annotated[int, typer.Option(help="Largest terms to print.")] = 8, json_path: JsonOption = None,
) -> None:
    """Explain one output element: exact terms, bound, where it diverges, both candidate roundings."""
    from . import explain as room

    found = room.explain(source, element, backend, tactic, terms)
    _out.print(room.to_text(found), markup=False)
    _write_json(json_path, room.to_data(found))


@app.command()
def reduce(
    case: Annotated[str, typer.Argument(help="A failing case id.")], backend: BackendOption = "cpu",
    tactic: Annotated[str, typer.Option(help="Only this tactic.")] = "default",
    timeout: TimeoutOption = 60.0,
    tensors: Annotated[str, typer.Option(help="FILE.safetensors[:GLOB] of a case of real weights.")] = "",
    json_path: JsonOption = None,
) -> None:
    """Find the smallest case that still fails in the same way."""
    from . import reduce as room

    found = room.reduce(case, backend, tactic=tactic, timeout=timeout, source=tensors, on_step=_told)
    _out.print(room.to_text(found), markup=False)
    _write_json(json_path, room.to_data(found))
    raise Stop(ExitCode.FAILED)


@app.command()
def replay(bundle: Annotated[Path, typer.Argument(help="A bundle file.")], json_path: JsonOption = None) -> None:
    """Judge the outputs stored in a bundle again, without the backend; also those of a call that `lowbit eval` kept."""
    from . import bundle as bundles
    from .evals import recorded

    if recorded.is_recorded(bundle):
        call = recorded.read(bundle)
        wrong, total = recorded.outside(call), call.found.size
        _out.print(f"{call.layer}, {call.problem} by {call.arm}: {wrong:,} of {total:,} outputs outside", markup=False)
        data = {"layer": call.layer, "problem": str(call.problem), "arm": call.arm, "outside": wrong, "outputs": total}
        _write_json(json_path, data)
        if wrong:
            raise Stop(ExitCode.FAILED)
        return
    verdict = bundles.replay(bundle)
    _print_verdict(verdict)
    _write_json(json_path, json.loads(reports.verdict_json(verdict)))
    _end_verdicts([verdict])


# reports -------------------------------------------------------------------------------------------------------------


@app.command()
def diff(before: Path, after: Path, json_path: JsonOption = None) -> None:
    """Verdicts and output bits that changed between two reports."""
    changes = reports.diff(reports.load(before), reports.load(after))
    for change in changes:
        _out.print(f"{change.kind} {change.case} [{change.tactic}] {change.before} -> {change.after}", markup=False)
    _out.print(f"{len(changes)} changes", markup=False)
    _write_json(json_path, [asdict(change) for change in changes])
    if changes:
        raise Stop(ExitCode.FAILED)


@app.command()
def verify(report: Path, json_path: JsonOption = None) -> None:
    """Check a report: schema, totals, digest, waivers, freshness, and that its cases are the contract's."""
    findings = _findings(report)
    for finding in findings:
        _out.print(finding, markup=False)
    _write_json(json_path, list(findings))
    if findings:
        raise Stop(ExitCode.BAD_INPUT, f"{len(findings)} findings")
    _out.print("the report is consistent, complete and current", markup=False)


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="report.json of every shard.")],
    out: Annotated[Path, typer.Option(help="Folder for the whole report.")] = Path("reports/merged"),
) -> None:
    """Join the reports of all shards; refuses where one is missing."""
    from . import html, junit

    result = reports.merge([reports.load(path) for path in parts])
    reports.prepare_folder(out)
    reports.write_atomically(out / "report.json", reports.to_json(result))
    reports.write_atomically(out / "junit.xml", junit.junit(result))
    reports.write_atomically(out / "report.html", html.page(result))
    _summary(result, out)
    _end(result, False)


@app.command()
def audit(
    backend: Annotated[str, typer.Argument(help="Backend: NAME, NAME:ARGUMENT or python:FILE.py:ATTRIBUTE.")],
    ops_: Annotated[str, typer.Option("--ops", help="Only these ops, comma separated.")] = "",
    timeout: TimeoutOption = 60.0, json_path: JsonOption = None,
) -> None:
    """Probe the accumulators of a backend: fingerprint, and whether its declarations are true."""
    from . import audit as room

    found = room.audit(backend, tuple(name for name in ops_.split(",") if name), timeout=timeout, on_step=_told)
    _out.print(room.to_text(found), markup=False)
    _write_json(json_path, room.to_data(found))
    if found.refuted:
        raise Stop(ExitCode.FAILED)
    if not found.findings:
        raise Stop(ExitCode.NOTHING_TO_CERTIFY, "the backend supports none of the products that are probed")


@app.command()
def mutants(
    backend: Annotated[str, typer.Argument(help="The backend whose faulty copies are judged; only cpu has a gallery.")] = "cpu",
    only: Annotated[str, typer.Option(help="Only these mutants or variants, comma separated.")] = "",
    json_path: JsonOption = None,
) -> None:
    """Judge the gallery of faulty backends and of legitimate variants: kill matrix and false alarms."""
    from . import mutants as room

    found = room.judge_gallery(backend, tuple(name for name in only.split(",") if name), on_step=_told)
    _out.print(room.to_text(found), markup=False)
    _write_json(json_path, room.to_data(found))
    if not room.sound(found):
        raise Stop(ExitCode.FAILED, "a mutant survived, a variant was accused, or a lane kills nothing alone")


# speed ---------------------------------------------------------------------------------------------------------------


@app.command("bench")
def bench_(
    backend: Annotated[str, typer.Argument(help="Backend: NAME, NAME:ARGUMENT or python:FILE.py:ATTRIBUTE.")],
    against: Annotated[
        str, typer.Option(help="Peers, comma separated: backends; of one given as python:FILE.py:ATTRIBUTE, every tactic.")
    ] = "",
    ops_: Annotated[str, typer.Option("--ops", help="OP, OP/VARIANT or OP/VARIANT/OPTIONS, comma separated.")] = "",
    shapes: Annotated[str, typer.Option(help="M,M,...@NxK,NxK,...; by default 36 shapes of linear layers.")] = "",
    rounds: Annotated[int, typer.Option(min=5, help="Alternating rounds; five or more.")] = 5,
    milliseconds: Annotated[float, typer.Option(min=1.0, help="Replays of one kernel in one round.")] = 25.0,
    tune: Annotated[bool, typer.Option("--tune", help="Time every tactic, and add a dispatch table to the JSON.")] = False,
    json_path: JsonOption = None,
) -> None:
    """Time the kernels of a backend on its device, side by side with peers, against a roof measured in the same run."""
    from . import bench_figures, bench_kernels
    from .bench_device import Stopwatch
    from .device import DeviceError
    from .worker_process import resolve

    subject = resolve(backend)
    names = [name for name in against.split(",") if name]
    peers = [(resolve(name), name.startswith("python:")) for name in names]
    plan = bench_kernels.BenchPlan(tuple(name for name in ops_.split(",") if name), shapes, rounds, milliseconds, tune)
    bench_kernels.problems_of(plan)
    try:
        watch = Stopwatch(bench_kernels.device_of(subject))
    except (BackendError, DeviceError) as error:
        raise Stop(ExitCode.NOTHING_TO_CERTIFY, str(error)) from error

    header = {
        "suite": reports.suite_version(), "date": datetime.now(UTC).isoformat(timespec="seconds"), "backend": str(subject.name),
        "against": names, "environment": {**describe(subject), **watch.environment()}, "method": bench_kernels.method_of(plan),
    }

    def told(rates: Mapping[str, float], rows: Sequence[bench_figures.Row]) -> None:
        row = rows[-1]
        fastest = bench_figures.best_of(row)
        best = "" if fastest is None else f", fastest peer {row.peers[fastest]:.2f}"
        _told(f"{row.op}/{row.variant}/{row.dims} [{row.tactic}] {row.us:.2f} us, roof {row.roof_us:.2f}{best}")
        _write_json(json_path, bench_figures.to_data(header, rates, rows))

    try:
        rates, rows = bench_kernels.bench(plan, subject, peers, watch, told)
    except (bench_kernels.BenchError, DeviceError) as error:
        raise Stop(ExitCode.FAILED, str(error)) from error
    _out.print(bench_figures.table_text(rows), markup=False)
    _out.print("Peers: their time / ours, above 1 ours is faster. * dispatched, h launched from the host.", markup=False)
    for item in bench_figures.classes_of(rows):
        what = "share of the roof" if item.peer == "roof" else f"{item.peer} / ours"
        spread = f"{item.ratio:.3f} ({item.low:.3f} to {item.high:.3f})"
        _out.print(f"{item.op}/{item.variant}/{item.options} m{item.m}: {what} {spread}, {item.shapes} shape(s)", markup=False)
        left_out = bench_figures.left_out_text(item)
        if item.peer == "roof" and left_out:  # the one class that is always there
            _out.print(f"{item.op}/{item.variant}/{item.options} m{item.m}: not in best: {left_out}", markup=False)
    _out.print(bench_figures.to_plot(rows), markup=False)
    _out.print(bench_figures.roof_text(rates), markup=False)


# models --------------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a W4A16 checkpoint (compressed-tensors, pack-quantized).")],
    target: Annotated[Path, typer.Argument(help="New folder for the W4A8-fp8 checkpoint.")],
    json_path: JsonOption = None,
) -> None:
    """Derive a W4A8-fp8 checkpoint from a W4A16 one, on identical codes."""
    try:
        from .evals import convert as room
    except ImportError as error:
        raise Stop(ExitCode.USAGE, f"convert needs torch, which is not installed ({error}); install lowbit[evals]") from error
    try:
        found = room.convert(source, target, told=_told)
    except OSError as error:
        said = str(error) if target.exists() else f"{target} cannot be written: {error}"
        raise Stop(ExitCode.NOT_WRITABLE, said) from error
    except (room.CheckpointError, room.SchemeError) as error:
        raise Stop(ExitCode.BAD_INPUT, str(error)) from error
    _out.print(f"{found.layers:,} layers, {found.scales:,} group scales; every code is kept", markup=False)
    lost = f"{found.zeroed:,} scales become 0, the others change by at most {found.worst:.3g} of their value"
    _out.print(f"folded into e4m3 by a kernel: {lost}", markup=False)
    _out.print(f"written: {target}", markup=False)
    _write_json(json_path, asdict(found))


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(help="Folder of a model (config.json, tokenizer, safetensors), or `embedded`.")],
    backend: BackendOption,
    reference: Annotated[str, typer.Option(help="torch_twin, or the backend whose arithmetic counts as right.")] = "torch_twin",
    tasks: Annotated[str, typer.Option(help="Comma separated; default: the embedded ones, with --data gsm8k and mmlu too.")] = "",
    recipe: Annotated[str, typer.Option(help="How plain weights are quantised, for example w4a16.")] = "",
    base: Annotated[Path | None, typer.Option(help="Plain folder of a quantised checkpoint: measures recipe loss.")] = None,
    data: Annotated[Path | None, typer.Option(help="Datasets in the hub's layout; nothing is fetched.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Questions per task, drawn at random.")] = None,
    texts: Annotated[int, typer.Option(min=2, help="Texts per task in the per-token test.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time; the noise floor takes half.")] = 16,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples per question, if not the task's own number.")] = None,
    margin: Annotated[float, typer.Option(help="Loss of accuracy that is acceptable, as a share.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Draws questions, examples and texts.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where the model runs, for example cpu or cuda:0.")] = "cpu",
    localise: Annotated[
        bool, typer.Option("--localise", help="Judge each Linear on the texts changed most; keep the first fault.")
    ] = False,
    certificate: Annotated[Path | None, typer.Option(help="The backend's report.json, for level L4: it needs L3.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for eval.json and report.html; a killed run goes on.")] = Path("reports/eval"),
    samples_out: Annotated[Path | None, typer.Option(help="Folder for the answers; by default OUT/answers.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Ask a model questions with a backend's kernels and with the reference arithmetic; compare answers and tokens in pairs."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries read these when they are imported
    if data is not None or not tasks:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from .evals import records, runner
    except ImportError as error:
        raise Stop(ExitCode.USAGE, f"eval needs more than is installed ({error}); install lowbit[evals]") from error
    try:
        reports.prepare_folder(out)
        held = None if certificate is None else _held(certificate)
        found = runner.evaluate(
            model, backend, out=out, reference=reference, tasks=[name for name in tasks.split(",") if name], recipe=recipe,
            base=base, data=data, limit=limit, texts=texts, batch=batch, fewshot=fewshot, margin=margin, seed=seed, dtype=dtype,
            device=device, samples=samples_out, localise=localise,
            certificate=held, told=_told,
        )
    except KeyboardInterrupt as error:
        raise Stop(ExitCode.INTERRUPTED, f"interrupted; the same command goes on from what is in {out}") from error
    except runner.CheckpointError as error:
        raise Stop(ExitCode.BAD_INPUT, str(error)) from error
    except runner.REFUSALS as error:
        raise Stop(ExitCode.USAGE, str(error)) from error
    _out.print(records.summary(found), markup=False)
    _out.print(f"written: {out / 'eval.json'}, {out / 'report.html'}", markup=False)
    _write_json(json_path, records.to_data(found))
    if records.drifts(found):
        raise Stop(ExitCode.FAILED, "the backend DRIFTS from the reference arithmetic")


def _findings(path: Path) -> Sequence[str]:
    """What is wrong with a report: with its text and, where that is sound, with its list of cases."""
    from . import run

    return reports.verify(path, datetime.now(UTC), contract=CONTRACT) or run.misselected(reports.load(path))


def _held(certificate: Path) -> reports.Report:
    """A report that `lowbit verify` finds nothing in. Stops with code 3 where it does."""
    findings = _findings(certificate)
    if findings:
        raise Stop(ExitCode.BAD_INPUT, f"certificate {certificate}: {'; '.join(findings[:3])}")
    return reports.load(certificate)


# the door ------------------------------------------------------------------------------------------------------------

_SENTENCES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (OutputError, ExitCode.NOT_WRITABLE), (MergeError, ExitCode.BAD_INPUT), (ReportError, ExitCode.BAD_INPUT),
    (WaiverError, ExitCode.BAD_INPUT), (DomainError, ExitCode.USAGE), (BackendError, ExitCode.USAGE),
)


_LOADING = "load() raised BackendError: "


def _worker_code(error: WorkerError) -> ExitCode:
    """A backend that does not exist is a mistake of the command line; one that does not load or lacks a method has failed L0."""
    text = str(error)
    named_wrong = text.startswith(_LOADING) and "does not load" not in text and " lacks " not in text
    return ExitCode.USAGE if named_wrong else ExitCode.FAILED


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with a code of the table."""
    raise SystemExit(int(_main(arguments)))


def _interrupted(words: Sequence[str]) -> ExitCode:
    """Ctrl-C, which typer returns as a number or raises, by version."""
    kept = "; the verdicts so far are in verdicts.jsonl, continue with --resume" if words[0] == "certify" else ""
    _err.print(f"lowbit: interrupted{kept}", markup=False)
    return ExitCode.INTERRUPTED


def _sentence_of(error: Exception) -> tuple[ExitCode, str] | None:
    """Code and sentence of an error that is no defect of lowbit; None where it is one."""
    code = next((code for kind, code in _SENTENCES if isinstance(error, kind)), None)
    if code is not None:
        return code, str(error)
    if hasattr(error, "format_message"):  # typer's own errors, whose class moved between its versions
        return ExitCode.USAGE, str(error.format_message())
    if isinstance(error, MemoryError):
        said = str(error) or "a tensor could not be allocated"
        return ExitCode.USAGE, f"this machine has too little memory: {said}; take a smaller case"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ExitCode.NOT_WRITABLE, f"no space left on the device that {error.filename or 'the output'} lies on"
    if isinstance(error, RecursionError) and Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name == "json":
        return ExitCode.BAD_INPUT, "a file given is nested deeper than any that lowbit writes"
    return None


def _main(arguments: Sequence[str] | None) -> ExitCode:
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        ended = app(args=words, standalone_mode=False)
        return _interrupted(words) if ended == ExitCode.INTERRUPTED else ExitCode.REACHED
    except Stop as stop:
        if stop.message:
            _err.print(f"lowbit: {stop.message}", markup=False)
        return stop.code
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted(words)
    except WorkerError as error:
        _err.print(f"lowbit: {str(error).removeprefix(_LOADING)}", markup=False)
        return _worker_code(error)
    except Exception as error:
        known = _sentence_of(error)
        if known is not None:
            _err.print(f"lowbit: {known[1]}", markup=False)
            return known[0]
        with tempfile.NamedTemporaryFile("w", prefix="lowbit-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        said = f"{type(error).__name__}: {error}"
        _err.print(f"lowbit: a defect of lowbit itself: {said}; the traceback is in {log.name}", markup=False)
        return ExitCode.INTERNAL


