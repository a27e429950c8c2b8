"""What an evaluation found: eval.json, level L4, and a summary in words.

Decides: the schema, when a backend serves, and how each verdict is said. Shares are of all questions, differences are backend
minus reference.
Refuses: files of another schema, and level L4 where one task is not SERVES within two points, the kernel level is not, too little
was asked, another backend was the judge, answers became longer, shorter or endless, or level L3 was not shown of the ops that
ran, by this suite and contract, on this device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ..report import Report, suite_version
from ..selection import CONTRACT
from .answers import EvalError
from .paired import Comparison, Outcome, Table
from .tokens import Ratio, TokenComparison

__all__ = [
    "JUDGE", "SCHEMA", "Eval", "Kernel", "Operation", "Ran", "Serving", "TaskResult", "TextPair", "alarms", "drifts", "read_eval",
    "schema", "serving", "summary", "to_data", "write_eval",
]

SCHEMA = "lowbit-eval/1"
_LENGTH = 0.1  # answers that are longer or shorter by a tenth on the whole interval are an alarm
_STOP_LEVEL = 0.01  # of the exact test that as many answers ended by themselves
_STABLE = 3  # the level below this one
_MARGIN, _CONFIDENCE, _TEXTS = 0.02, 0.95, 16  # the least that level L4 asks for
JUDGE = "torch_twin"
"""The reference arithmetic, as `--reference` names it: the only judge of level L4."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One Linear. `outputs`: how many were judged; `outside`: those that its declaration does not admit; `differing`: share of
    outputs whose bits are not those of the reference arm on the same inputs. `problem`: that of the call with most outside."""

    layer: str
    problem: str
    outputs: int
    outside: int
    differing: float


@dataclass(frozen=True, slots=True)
class TextPair:
    """One text of the per-token test: mean divergence of backend and floor from the reference, None where infinite, and the
    tokens whose likeliest successor differs under the backend."""

    key: str
    tokens: int
    backend: float | None
    floor: float | None
    flips: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task. `right`: questions answered right per arm. `kernel`: backend against reference. `floor`: another honest order and
    batch size against reference. `recipe`: reference against the full-precision model, None without that arm. `texts`: share of
    generated answers that are not the reference's, per arm. `lengths`: tokens of the backend's answers over the reference's,
    95 %. `stopped`: questions whose answer ended by itself, paired; its exact p-value is `stop_p`. None for choices."""

    name: str
    questions: int
    right: Mapping[str, int]
    kernel: Comparison
    floor: Comparison
    recipe: Comparison | None
    texts: Mapping[str, float] | None
    lengths: Ratio | None
    stopped: Table | None
    stop_p: float | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is said of the backend's kernels. `tokens`: per-token test over all tasks, its floor with the deviations that judged
    operations showed. `recipe_kl`: mean divergence of the full-precision model from the reference on these texts. `operations`:
    each Linear on its own, in the order of the forward. `first`: the first with an output outside its admissible interval,
    `bundle`: the file that holds its call. `localised`: keys of the texts whose inputs the operations were judged on. `outcome`:
    DRIFTS where there is such an operation, else what the per-token test says."""

    tokens: TokenComparison
    recipe_kl: float | None
    texts: tuple[TextPair, ...]
    operations: tuple[Operation, ...]
    localised: tuple[str, ...]
    first: str | None
    bundle: str | None
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Serving:
    """Level L4. `certificate`: digest of the report that showed L3, None without one."""

    outcome: Literal["granted", "refused"]
    reasons: tuple[str, ...]
    certificate: str | None


@dataclass(frozen=True, slots=True)
class Eval:
    """One run of `lowbit eval`. `settings`: what fixes the answers. `kernels`: names that the backend's calls returned, and how
    often, this time. `missing`: what was not asked or cannot be shown, in sentences."""

    schema: str
    suite: str
    settings: Mapping[str, Any]
    model: str
    tasks: tuple[TaskResult, ...]
    kernel: Kernel
    serving: Serving
    kernels: Mapping[str, int]
    missing: tuple[str, ...]
    seconds: float


_ADAPTER: TypeAdapter[Eval] = TypeAdapter(Eval)


def schema() -> dict[str, Any]:
    """JSON schema of eval.json."""
    return _ADAPTER.json_schema()


def drifts(found: Eval) -> bool:
    """Whether the backend is accused: at kernel level, or by a task whose noise floor does not drift as well."""
    tasks = (task.kernel.outcome is Outcome.DRIFTS and task.floor.outcome is not Outcome.DRIFTS for task in found.tasks)
    return found.kernel.outcome is Outcome.DRIFTS or any(tasks)


def alarms(task: TaskResult) -> list[str]:
    """What the lengths and ends of a task's answers say, either way: sentences."""
    found = []
    if task.lengths is not None:
        low, high = task.lengths.lower, task.lengths.upper
        if low is None or low > 1 + _LENGTH or (high is not None and high < 1 - _LENGTH):
            found.append(f"{task.name}: answers are {_ratio(task.lengths)} times as long as the reference's")
    if task.stop_p is not None and task.stop_p < _STOP_LEVEL and task.stopped is not None:
        ends = task.stopped
        backend, reference = ends.both + ends.backend_only, ends.both + ends.reference_only
        found.append(f"{task.name}: {backend} answers ended by themselves, {reference} of the reference (p = {task.stop_p:.2g})")
    return found


@dataclass(frozen=True, slots=True)
class Ran:
    """Who ran, for level L4. `backend`, `judge`: references as given. `describe`, `execution`: what the backend says of itself
    here. `replaced`, `reached`: Linears of the model that the arms compute, and those of them that the judged texts came to."""

    backend: str
    judge: str
    describe: Mapping[str, str]
    execution: str
    replaced: int
    reached: int


def serving(tasks: Sequence[TaskResult], kernel: Kernel, ran: Ran, certificate: Report | None) -> Serving:
    """Level L4, and if not, why."""
    reasons = [] if kernel.outcome is Outcome.SERVES else [f"the kernel level is {kernel.outcome}"]
    if ran.judge != JUDGE:
        reasons.append(f"the judge was {ran.judge}, not the reference arithmetic; leave --reference out")
    if not tasks:
        reasons.append("no task was asked")
    if kernel.tokens.texts < _TEXTS:
        reasons.append(f"{kernel.tokens.texts} texts were compared token by token; at least {_TEXTS} are needed")
    if not kernel.operations or len(kernel.operations) != ran.reached:
        reasons.append(f"{len(kernel.operations)} of {ran.reached} Linears that were reached were judged on their own")
    for task in tasks:
        found = task.kernel
        if found.outcome is not Outcome.SERVES:
            reasons.append(f"{task.name} is {found.outcome}: {task.questions} questions, margin {100 * found.margin:g} points")
        elif found.margin > _MARGIN or found.confidence < _CONFIDENCE:
            asked = f"a margin of {100 * found.margin:g} points at {100 * found.confidence:g} %"
            reasons.append(f"{task.name} has {asked}; {100 * _MARGIN:g} points at {100 * _CONFIDENCE:g} % are the most")
        reasons += alarms(task)
    reasons += _of_certificate({operation.problem.partition("/")[0] for operation in kernel.operations}, ran, certificate)
    digest = None if certificate is None else certificate.digest
    if reasons:
        return Serving("refused", tuple(reasons), digest)
    names = ", ".join(f"{task.name} ({task.questions} questions, margin {100 * task.kernel.margin:g} points)" for task in tasks)
    text = f"SERVES on {names}, token by token ({kernel.tokens.tokens} tokens of {kernel.tokens.texts} texts)"
    return Serving("granted", (f"{text}, and in {ran.reached} of {ran.replaced} replaced Linears; {ran.execution}",), digest)


def _of_certificate(ran_ops: Collection[str], ran: Ran, certificate: Report | None) -> list[str]:
    """Why a certificate does not show level L3 of what ran."""
    if certificate is None:
        return [f"L{_STABLE} was not shown: give the report of `lowbit certify --level L{_STABLE}` by --certificate"]
    if certificate.subject.reference != ran.backend:
        return [f"the certificate is that of backend {certificate.subject.reference}"]
    found = []
    if certificate.level_granted is None or certificate.level_granted < _STABLE:
        level = "no level" if certificate.level_granted is None else f"L{certificate.level_granted}"
        found.append(f"the certificate grants {level}; L{_STABLE} is needed")
    for what, version, here in (("suite", certificate.suite, suite_version()), ("contract", certificate.contract, CONTRACT)):
        if version != here:
            found.append(f"the certificate is of {what} {version}, installed is {here}; certify again")
    claimed = {claim.op for claim in certificate.claims if claim.supported}
    lacking = sorted(set(ran_ops) - claimed)
    if lacking:
        found.append(f"the certificate claims no support of {', '.join(lacking)}, which ran here; certify without --ops")
    held = {key: value for key, value in certificate.subject.describe.items() if key != "tensors"}  # the run's, not the backend's
    changed = sorted(key for key in held.keys() | ran.describe.keys() if held.get(key) != ran.describe.get(key))
    if changed:
        key = changed[0]
        told = f"{key} was {held.get(key)!r} there and is {ran.describe.get(key)!r} here"
        found.append(f"the certificate is of another build or device ({ran.execution} here): {told}; certify again")
    return found


def to_data(found: Eval) -> Any:
    """Plain data of eval.json."""
    return _ADAPTER.dump_python(found, mode="json")


def write_eval(path: Path, found: Eval) -> None:
    """Write eval.json, whole or not at all."""
    work = path.with_suffix(".tmp")
    work.write_bytes(_ADAPTER.dump_json(found, indent=1) + b"\n")
    os.replace(work, path)


def read_eval(path: Path) -> Eval:
    """eval.json again. Raises EvalError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise EvalError(f"{path}: schema is {data.get('schema')!r}, expected {SCHEMA!r}; evaluate again with this version")
        return _ADAPTER.validate_python(data)
    except (OSError, ValidationError, AttributeError, json.JSONDecodeError) as error:
        raise EvalError(f"{path}: not a readable eval.json ({' '.join(str(error).split())[:200]}); evaluate again") from error


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _said(title: str, found: Comparison) -> str:
    level = round(100 * found.confidence)
    low, high = _points(found.interval.lower), _points(found.interval.upper)
    return (
        f"  {title}: {found.outcome}, {_points(float(found.table.difference))} points ({level} %: {low} to {high}; margin "
        f"{100 * found.margin:.1f}; {found.table.discordant} discordant, p = {found.p_value:.3g}; detectable "
        f"{100 * found.detectable:.1f} points)"
    )


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3g}"


def _ratio(found: Ratio) -> str:
    return f"{_number(found.lower)} to {_number(found.upper)}"


def summary(found: Eval) -> str:
    """The verdicts in a few lines."""
    lines = [f"{found.model}, backend {found.settings['backend']} against {found.settings['reference']}"]
    for task in found.tasks:
        shares = ", ".join(f"{arm} {100 * right / task.questions:.1f} %" for arm, right in task.right.items())
        lines.append(f"{task.name}, {task.questions} questions: {shares}")
        lines.append(_said("kernel error (backend against reference)", task.kernel))
        lines.append(_said("noise floor (another honest order and batch size)", task.floor))
        if task.recipe is not None:
            lines.append(_said("recipe loss (reference against full precision)", task.recipe))
        if task.texts is not None and task.lengths is not None and task.stopped is not None:
            texts = ", ".join(f"{arm} {100 * share:.0f} %" for arm, share in task.texts.items())
            ends = task.stopped
            lines.append(
                f"  texts unlike the reference's: {texts}; answer length ratio {_ratio(task.lengths)}; stopped by themselves: "
                f"backend {ends.both + ends.backend_only}, reference {ends.both + ends.reference_only} (p = {task.stop_p:.3g})"
            )
    kernel, tokens = found.kernel, found.kernel.tokens
    flips = f"top-1 flips {100 * tokens.flips:.2f} %, floor {100 * tokens.floor_flips:.2f} %"
    lines.append(
        f"per token, {tokens.tokens} tokens of {tokens.texts} texts: KL {_number(tokens.kl)}, floor {_number(tokens.floor_kl)}, "
        f"ratio {_ratio(tokens.ratio)} against a factor of {tokens.factor:g}: {tokens.outcome}; {flips}"
        f"{'' if tokens.first is None else f', first at token {tokens.first:.0f}'}"
        f"{'' if kernel.recipe_kl is None else f'; recipe KL {kernel.recipe_kl:.3g}'}"
    )
    outside = [operation for operation in kernel.operations if operation.outside]
    lines.append(f"per operation, {len(kernel.operations)} Linears: {len(outside)} leave their admissible interval")
    lines += [f"  {op.layer}: {op.outside} of {op.outputs} outputs outside, {op.problem}" for op in outside[:3]]
    where = f": first at {kernel.first}" if kernel.first else ""
    lines.append(f"kernel level: {kernel.outcome}{where}")
    lines.append(f"L4 serves: {found.serving.outcome}: {'; '.join(found.serving.reasons)}")
    lines += found.missing
    return "\n".join(lines)
