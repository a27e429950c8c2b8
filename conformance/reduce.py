"""The smallest case that still fails in the same way.

Decides: a path of smaller problems, one change at a time (fewer rows, fewer columns, less K, options at their defaults,
plainer patterns), each kept if the status stays. Refuses: to call a case smaller that fails differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .case import Case, Problem
from .op import DomainError, Op, make_problem
from .ops import ops
from .run import Plan, Session, listed_of, products_of
from .selection import Listed
from .verdict import FAILING, Status, Verdict
from .worker import Worker

__all__ = ["Reduction", "reduce", "to_data", "to_text"]


@dataclass(frozen=True, slots=True)
class Reduction:
    """From where to where, and what it took."""

    start: str
    end: str
    status: Status
    tries: int
    products_before: int
    products_after: int
    repro: str


def _dims(op: Op, problem: Problem) -> Iterator[Problem]:
    """Problems with one dim made smaller, the boldest first."""
    sizes = dict(problem.dims)
    for letter in sorted(sizes, key=lambda name: -sizes[name]):
        low, _, multiple = op.ranges[letter]
        now = sizes[letter]
        step = max(multiple, sizes.get("g", 0)) if letter == "k" and sizes.get("g") != now else multiple
        targets = {max(low, multiple), now // 2 // step * step, now - step, now - multiple, now - 1}
        for target in sorted(target for target in targets if max(low, 1) <= target < now):
            smaller = {**sizes, letter: target}
            if letter == "k" and sizes.get("g") == now:
                smaller["g"] = target
            try:
                yield make_problem(op, problem.variant, smaller, dict(problem.options))
            except DomainError:
                continue


def _options(op: Op, problem: Problem) -> Iterator[Problem]:
    """Problems with one option back at its default."""
    chosen = dict(problem.options)
    for option in op.options:
        if chosen[option.name] != option.tokens[0]:
            dims = dict(problem.dims)
            if option.name == "lora" and "r" in dims:
                dims["r"] = 0
            try:
                yield make_problem(op, problem.variant, dims, {**chosen, option.name: option.tokens[0]})
            except DomainError:
                continue


def _smaller(op: Op, case: Case) -> Iterator[Case]:
    for problem in (*_dims(op, case.problem), *_options(op, case.problem)):
        yield Case(problem, case.pattern, case.seed)
    for pattern in ("onehot", "exactw8", "normal"):
        if pattern in op.patterns and pattern != case.pattern and case.pattern not in ("onehot", "exactw8", "golden"):
            yield Case(case.problem, pattern, case.seed)


def _size(op: Op, case: Case) -> int:
    dims = dict(case.problem.dims)
    total = products_of(op, case.problem)
    if not total:
        total = 1
        for letter, size in dims.items():
            total *= 1 if letter == "g" else max(1, size)
    return total


def reduce(
    text: str,
    backend: str,
    *,
    tactic: str = "default",
    timeout: float = 60.0,
    path: tuple[str, ...] = (),
    source: str = "",
    on_step: Callable[[str], None] | None = None,
    limit: int = 400,
) -> Reduction:
    """Shrink a failing case. Raises DomainError where the case does not fail on this backend."""
    item = listed_of(text)
    op = ops()[item.case.problem.op]
    with Worker(backend, timeout=timeout, path=path) as worker:
        session = Session(Plan(backend, timeout=timeout, path=path, tensors=source), worker)
        session.open()

        def verdict(case: Case) -> Verdict | None:
            listed = Listed(case, item.lane, item.level) if case.pattern == item.case.pattern else listed_of(str(case))
            support = worker.supports([case.problem])[0]
            return next((found for found in session.judge(listed, support) if found.tactic == tactic), None)

        first = verdict(item.case)
        if first is None or first.status not in FAILING:
            raise DomainError(f"{text} does not fail on {backend} [{tactic}]; there is nothing to reduce")
        best, found, tries, going = item.case, first, 0, True
        while going and tries < limit:
            going = False
            for case in _smaller(op, best):
                tries += 1
                tried = verdict(case)
                if tried is not None and tried.status is first.status:
                    best, found, going = case, tried, True
                    if on_step is not None:
                        on_step(f"still {tried.status}: {case}")
                    break
                if tries >= limit:
                    break
    return Reduction(text, str(best), first.status, tries, _size(op, item.case), _size(op, best), found.repro)


def to_data(found: Reduction) -> dict[str, Any]:
    """Plain data of a reduction."""
    return asdict(found)


def to_text(found: Reduction) -> str:
    """A reduction for a terminal."""
    return (
        f"{found.status}: {found.start}\n  smallest: {found.end}\n"
        f"  {found.products_before:,} -> {found.products_after:,} products, {found.tries} tries\n  {found.repro}"
    )
