"""How strong the suite is: faulty backends that it must catch, legitimate ones that it must not accuse.

    gallery/{products,codings,variants}.py -> run.Session over the ordinary case list -> kill matrix, false alarms, sole killers

Decides: which lanes kill a mutant, and whether every lane kills one that no other lane sees. Refuses: kills that prove nothing.
A case kills only where the backend without the fault passes it, and neither an exception nor UNTRUSTED is a kill.

In each lane a mutant is judged up to its first kill, variants are judged on every case. Stability cases are repeated
`REPEATS` times.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from time import monotonic
from typing import Any

import numpy as np

from lowbit.references.formats import Reals, decode

from .backend import BackendError
from .gallery.alteration import Altered
from .gallery.backends import MUTANTS, mutant, variant
from .gallery.published import RULES, accepts
from .gallery.variants import VARIANTS
from .op import DomainError, parse_case, tensors_of
from .ops import ops
from .patterns import draw_operands
from .run import Plan, Session, listed_cases
from .selection import Listed
from .verdict import PASSING, Status, Verdict
from .worker import Ending, Worker, WorkerError

__all__ = ["REPEATS", "Gallery", "Kill", "Trial", "judge_gallery", "mutant", "sound", "to_data", "to_text", "variant"]

REPEATS = 20
"""Runs of a stability case; `certify` takes 100."""

LEAST_MUTANTS, LEAST_VARIANTS = 40, 12
"""A smaller gallery says too little."""

_KILLING = frozenset({Status.DRIFT, Status.MALFORMED, Status.CRASHED, Status.TIMEOUT})
_ACCUSING = frozenset({*_KILLING, Status.RAISED})
_USUAL = {
    "gemm_w4a16": "gemm_w4a16/sym/m64n128k1024g128/bf16/normal/s1",
    "gemm_w8a8_fp8": "gemm_w8a8_fp8/scaled/m64n128k1024/bf16/normal/s1",
    "gemm_w4a8_fp8": "gemm_w4a8_fp8/folded/m64n128k1024g128/bf16/normal/s1",
    "gemm_w4a8_fp8_grouped": "gemm_w4a8_fp8_grouped/folded/e5m64n128k1024g128/bf16/normal/s1",
    "gemm_w4a8_int8": "gemm_w4a8_int8/direct/m64n128k1024g128/bf16/normal/s1",
    "gemm_nvfp4": "gemm_nvfp4/plain/m64n128k1024r0/bf16/normal/s1",
    "gemm_int4": "gemm_int4/f32/m64n128k1024r0/f16/normal/s1",
}
"""The case on which rules of others are measured, unless a mutant names one that reaches its fault."""


@dataclass(frozen=True, slots=True)
class Kill:
    """The first case of a lane that shows a fault. `reason`: the sentence of its verdict."""

    case: str
    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one backend of the gallery. `kills`: by lane, of a mutant. `statuses`: verdicts by status. `accused`: of a
    variant, its verdicts that hold something against it, as text. `rules`: published rule -> "killed", "lives", "alarm" where the
    rule refuses the backend without the fault too, or "unseen" where one plain call does not show the fault and no comparison of
    outputs can; empty where nothing is multiplied."""

    name: str
    is_mutant: bool
    lanes: tuple[str, ...]
    kills: Mapping[str, Kill] = field(default_factory=dict)
    statuses: Mapping[str, int] = field(default_factory=dict)
    accused: tuple[str, ...] = ()
    rules: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Gallery:
    """All trials, in the order of the gallery. `complete`: nothing was left out by name."""

    backend: str
    trials: tuple[Trial, ...]
    complete: bool
    seconds: float

    @property
    def mutants(self) -> tuple[Trial, ...]:
        """Trials of faulty backends."""
        return tuple(trial for trial in self.trials if trial.is_mutant)

    @property
    def variants(self) -> tuple[Trial, ...]:
        """Trials of legitimate backends."""
        return tuple(trial for trial in self.trials if not trial.is_mutant)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Mutants that no lane kills."""
        return tuple(trial.name for trial in self.mutants if not trial.kills)

    @property
    def false_alarms(self) -> tuple[str, ...]:
        """Variants that were accused."""
        return tuple(trial.name for trial in self.variants if trial.accused)

    def lanes(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """lane -> (mutants it kills, those that it alone kills)."""
        names = sorted({lane for trial in self.trials for lane in trial.lanes})
        return {
            lane: (sum(lane in trial.kills for trial in self.mutants),
                   tuple(trial.name for trial in self.mutants if tuple(trial.kills) == (lane,)))
            for lane in names
        }


# One backend ---------------------------------------------------------------------------------------------------------


@cache
def _listed(op: str) -> tuple[Listed, ...]:
    """The ordinary case list of one op, with the stability lane."""
    return tuple(listed_cases(Plan("", level=3, ops=(op,))))


def _opened(reference: str) -> Session:
    session = Session(Plan(reference, level=3, repeats=REPEATS), Worker(reference))
    session.open()
    return session


@cache
def _cpu() -> Session:
    """The unaltered backend, opened once per process; its worker ends with the process."""
    return _opened("cpu")


def _passes(session: Session, item: Listed) -> bool:
    support = session.worker.supports([item.case.problem])[0]
    return all(verdict.status in (*PASSING, Status.UNTRUSTED) for verdict in session.judge(item, support))


def _judge_mutant(altered: Altered) -> Trial:
    start = monotonic()
    kills: dict[str, Kill] = {}
    statuses: Counter[str] = Counter()
    listed = [item for name in altered.ops for item in _listed(name)]
    with ExitStack() as stack:
        session = _opened(f"mutant:{altered.name}")
        stack.enter_context(session.worker)
        control = _cpu()
        if altered.runs or altered.setting:
            control = _opened(f"mutant:{altered.name},healed")
            stack.enter_context(control.worker)
        supports = session.worker.supports([item.case.problem for item in listed])
        for item, support in zip(listed, supports, strict=True):
            if item.lane in kills:
                continue
            for verdict in session.judge(item, support):
                statuses[verdict.status] += 1
                if item.lane not in kills and verdict.status in _KILLING and _passes(control, item):
                    kills[item.lane] = Kill(verdict.case, verdict.status, verdict.reason)
        rules = _rules(altered, session, control) if altered.ops[0] in _USUAL else {}
    lanes = tuple(sorted({item.lane for item in listed}))
    return Trial(altered.name, True, lanes, dict(sorted(kills.items())), statuses, (), rules, monotonic() - start)


def _judge_variant(altered: Altered) -> Trial:
    start = monotonic()
    session = _opened(f"variant:{altered.name}")
    verdicts: list[Verdict] = []
    listed = [item for name in altered.ops for item in _listed(name)]
    with session.worker:
        supports = session.worker.supports([item.case.problem for item in listed])
        for item, support in zip(listed, supports, strict=True):
            verdicts += session.judge(item, support)
    accused = tuple(f"{verdict.status} {verdict.case}: {verdict.reason}" for verdict in verdicts if verdict.status in _ACCUSING)
    statuses = Counter(str(verdict.status) for verdict in verdicts)
    lanes = tuple(sorted({item.lane for item in listed}))
    return Trial(altered.name, False, lanes, {}, statuses, accused, {}, monotonic() - start)


def _output(session: Session, text: str) -> tuple[Reals, Reals] | None:
    """(output, result over the reals) of a product; None where the backend gives no output."""
    case = parse_case(text, ops())
    op = ops()[case.problem.op]
    operands, tensors = draw_operands(op, case), tensors_of(op, case.problem)
    declaration, _, _ = session.declaration(op, case.problem, "default")
    outcome = session.worker.execute(case.problem, "default", operands, tensors, timeout=session.plan.timeout)
    if declaration is None or outcome.status is not Ending.OK:
        return None
    expected = op.expect(case, operands, declaration)["d"]
    assert expected.exact is not None
    return decode(outcome.outputs["d"], expected.format), expected.exact


def _rules(altered: Altered, session: Session, control: Session) -> dict[str, str]:
    """What the published rules say of a faulty product."""
    text = altered.reached_by or _USUAL[altered.ops[0]]
    faulty, honest = _output(session, text), _output(control, text)
    if faulty is None or honest is None:
        return {rule.name: "killed" if honest else "alarm" for rule in RULES}
    if np.array_equal(faulty[0], honest[0], equal_nan=True):
        return dict.fromkeys((rule.name for rule in RULES), "unseen")
    return {
        rule.name: "alarm" if not accepts(rule, *honest) else "lives" if accepts(rule, *faulty) else "killed" for rule in RULES
    }


# The gallery ---------------------------------------------------------------------------------------------------------


def _judge(altered: Altered, is_mutant: bool) -> Trial:
    try:
        return _judge_mutant(altered) if is_mutant else _judge_variant(altered)
    except WorkerError as error:  # it does not survive the way back to the parent
        raise BackendError(str(error)) from None


def judge_gallery(
    backend: str = "cpu", only: Sequence[str] = (), on_step: Callable[[str], None] | None = None, processes: int = 2,
) -> Gallery:
    """Judge every mutant and every variant, or those named, in `processes` processes. `on_step` gets a line per backend.
    Raises DomainError for names that the gallery does not have, BackendError for a backend that does not load."""
    if backend != "cpu":
        raise DomainError(f"the gallery holds faulty copies of cpu; got backend {backend!r}")
    everything = [(item, True) for item in MUTANTS] + [(item, False) for item in VARIANTS]
    unknown = sorted(set(only) - {item.name for item, _ in everything})
    if unknown:
        raise DomainError(f"no mutant or variant is called {', '.join(unknown)}")
    chosen = [(item, is_mutant) for item, is_mutant in everything if not only or item.name in only]
    start, found = monotonic(), {}
    with ProcessPoolExecutor(min(processes, len(chosen), os.cpu_count() or 1), get_context("spawn")) as pool:
        # the slowest first: variants are judged on every case
        pending = {pool.submit(_judge, item, is_mutant): (item.name, is_mutant) for item, is_mutant in reversed(chosen)}
        try:
            for done in as_completed(pending):
                trial = found[pending[done]] = done.result()
                if on_step is not None:
                    on_step(f"{len(found):3d}/{len(chosen)} {_line(trial)}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    trials = tuple(found[item.name, is_mutant] for item, is_mutant in chosen)
    return Gallery(backend, trials, not only, monotonic() - start)


def _line(trial: Trial) -> str:
    if trial.is_mutant:
        said = f"killed by {', '.join(trial.kills)}" if trial.kills else "SURVIVES"
        return f"mutant {trial.name}: {said} ({trial.seconds:.1f} s)"
    said = f"ACCUSED {len(trial.accused)} times" if trial.accused else "not accused"
    return f"variant {trial.name}: {said} ({trial.seconds:.1f} s)"


def sound(gallery: Gallery) -> bool:
    """Every mutant is killed and no variant accused; of a complete gallery also: it is large enough, and every lane is the sole
    killer of a mutant."""
    clean = not gallery.survivors and not gallery.false_alarms
    if not gallery.complete:
        return clean
    large = len(gallery.mutants) >= LEAST_MUTANTS and len(gallery.variants) >= LEAST_VARIANTS
    return clean and large and all(sole for _, sole in gallery.lanes().values())


def to_data(gallery: Gallery) -> dict[str, Any]:
    """The result as plain data, for JSON."""
    return {
        "backend": gallery.backend,
        "complete": gallery.complete,
        "mutants": len(gallery.mutants),
        "killed": len(gallery.mutants) - len(gallery.survivors),
        "survivors": list(gallery.survivors),
        "variants": len(gallery.variants),
        "false_alarms": len(gallery.false_alarms),
        "accused": {trial.name: list(trial.accused) for trial in gallery.variants if trial.accused},
        "untrusted": {trial.name: count for trial in gallery.variants if (count := trial.statuses.get(Status.UNTRUSTED, 0))},
        "raised": {trial.name: count for trial in gallery.mutants if (count := trial.statuses.get(Status.RAISED, 0))},
        "lanes": {lane: {"kills": kills, "sole": list(sole)} for lane, (kills, sole) in gallery.lanes().items()},
        "killed_by": {trial.name: list(trial.kills) for trial in gallery.mutants},
        "witnesses": {trial.name: {lane: kill.case for lane, kill in trial.kills.items()} for trial in gallery.mutants},
        "tolerances": {trial.name: dict(trial.rules) for trial in gallery.mutants if trial.rules},
        "repeats": REPEATS,
        "seconds": round(gallery.seconds, 1),
    }


def to_text(gallery: Gallery) -> str:
    """Kill matrix, variants, sole killers and what published rules let live."""
    described = {item.name: item for item in (*MUTANTS, *VARIANTS)}
    lanes = gallery.lanes()
    width = max((len(trial.name) for trial in gallery.trials), default=0)
    lines = [f"{'mutant':<{width}}  {'  '.join(lanes)}"]
    for trial in gallery.mutants:
        signs = {lane: "x" if lane in trial.kills else "." if lane in trial.lanes else " " for lane in lanes}
        marks = "  ".join(sign.center(len(lane)) for lane, sign in signs.items())
        lines.append(f"{trial.name:<{width}}  {marks}  {'' if trial.kills else 'SURVIVES  '}{described[trial.name].what}")
    lines += ["", f"{'variant':<{width}}  verdicts"]
    for trial in gallery.variants:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(trial.statuses.items()))
        lines.append(f"{trial.name:<{width}}  {counts}")
        lines += [f"  ACCUSED {text}" for text in trial.accused[:4]]
    lines += ["", "lane        kills  kills alone"]
    lines += [f"{lane:<10}  {kills:>5}  {', '.join(sole) or 'nothing'}" for lane, (kills, sole) in lanes.items()]
    measured = [trial for trial in gallery.mutants if set(trial.rules.values()) - {"unseen"}]
    if measured:
        lines += ["", f"published rule  lets live, of {len(measured)} faulty products that one plain call shows"]
    for rule in RULES if measured else ():
        alive = [trial.name for trial in measured if trial.rules[rule.name] == "lives"]
        useless = sum(trial.rules[rule.name] == "alarm" for trial in measured)
        note = f" (refuses {useless} without a fault)" if useless else ""
        lines.append(f"{rule.name:<14}  {len(alive):>3}{note}  {rule.source}")
    idle = sum(not sole for _, sole in lanes.values())
    killed = len(gallery.mutants) - len(gallery.survivors)
    return "\n".join([
        *lines, "",
        f"{killed} of {len(gallery.mutants)} mutants killed, {len(gallery.false_alarms)} of {len(gallery.variants)} variants "
        f"accused, {idle} of {len(lanes)} lanes kill nothing alone, {gallery.seconds:.0f} s",
    ])
