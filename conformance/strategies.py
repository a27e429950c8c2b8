"""Hypothesis strategies of an op's cases, from the same record that everything else reads: its domain.

Decides: which problems are drawn, small ones first, so that a failure shrinks towards the smallest case that shows it. Every
drawn problem is one that the contract admits; none is drawn and thrown away. Refuses: ops without a problem of the size asked
for, before Hypothesis sees them. Needs the extra `property`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from math import prod

from hypothesis import strategies as st

from .case import Case, Problem
from .op import DomainError, Op, make_problem, possible_options
from .ops import ops
from .properties import relations_of

__all__ = ["cases", "problems", "property_cases"]

_FROM_ELSEWHERE = ("golden", "tensors")  # patterns whose operands come from files
_STEPS = (0, 1, 2, 3, 5, 8, 16)
_SIZES = (1, 2, 3, 5, 8, 17, 32, 64, 96, 128, 130, 256)


def _sizes(op: Op, letter: str) -> list[int]:
    """Sizes of one dim within its range: ordinary ones, and multiples of its step."""
    low, high, multiple = op.ranges[letter]
    found = {*_SIZES, *(multiple * step for step in _STEPS), low}
    return sorted(size for size in found if low <= size <= high and size % multiple == 0)


def _weight(sizes: tuple[int, ...], letters: tuple[str, ...]) -> int:
    """What a problem costs: the product of its dims, groups left aside."""
    return prod(max(1, size) for size, letter in zip(sizes, letters, strict=True) if letter != "g")


def _admitted(op: Op, variant: str, options: Mapping[str, str], largest: int) -> Iterator[Problem]:
    """Problems in no particular order."""
    for sizes in product(*(_sizes(op, letter) for letter in op.dims)):
        if _weight(sizes, op.dims) > largest:
            continue
        try:
            yield make_problem(op, variant, dict(zip(op.dims, sizes, strict=True)), options)
        except DomainError:
            continue


@cache
def _pool(name: str, variant: str, chosen: tuple[tuple[str, str], ...], largest: int) -> tuple[Problem, ...]:
    """Problems of a variant and options, the smallest first."""
    found = _admitted(ops()[name], variant, dict(chosen), largest)
    return tuple(sorted(found, key=lambda p: _weight(tuple(size for _, size in p.dims), tuple(letter for letter, _ in p.dims))))


@cache
def _choices(name: str, largest: int) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Variants with options that have a problem."""
    op = ops()[name]
    found = []
    for variant in op.variants:
        for tokens in product(*(option.tokens for option in op.options)):
            chosen = tuple(zip((option.name for option in op.options), tokens, strict=True))
            if (
                possible_options(op, variant, dict(chosen))
                and next(_admitted(op, variant, dict(chosen), largest), None) is not None
            ):
                found.append((variant, chosen))
    if not found:
        raise DomainError(f"{name} has no problem whose dims multiply to at most {largest}; ask for a larger size")
    return tuple(found)


def problems(op: Op, *, largest: int = 1 << 15) -> st.SearchStrategy[Problem]:
    """Problems of an op whose dims multiply to at most `largest`. Raises DomainError where there is none."""
    return st.sampled_from(_choices(op.name, largest)).flatmap(lambda choice: st.sampled_from(_pool(op.name, *choice, largest)))


def cases(op: Op, *, largest: int = 1 << 15) -> st.SearchStrategy[Case]:
    """Cases of an op: a problem, a pattern that is drawn (none that comes from files) and a seed."""
    patterns = st.sampled_from([pattern for pattern in op.patterns if pattern not in _FROM_ELSEWHERE])
    return st.builds(Case, problems(op, largest=largest), patterns, st.integers(0, 99))


def property_cases(op: Op, *, largest: int = 1 << 15) -> st.SearchStrategy[Case]:
    """Cases of the relations between runs, on problems of at least two rows and columns. Raises DomainError for ops that have no
    relation."""
    found = _related(op.name, largest)
    if not found:
        raise DomainError(f"the contract has no relation between runs of {op.name} on problems of that size")
    related = st.sampled_from(found).map(lambda problem: (problem, relations_of(op, problem))).filter(lambda pair: bool(pair[1]))
    return related.flatmap(lambda pair: st.builds(Case, st.just(pair[0]), st.sampled_from(pair[1]), st.integers(1, 99)))


@cache
def _related(name: str, largest: int) -> tuple[Problem, ...]:
    """Up to six problems, small and large, of each variant and options that have relations."""
    op = ops()[name]
    found: list[Problem] = []
    for choice in _choices(name, largest):
        several = [p for p in _pool(name, *choice, largest) if all(size >= 2 for letter, size in p.dims if letter in "mn")]
        if several and relations_of(op, several[-1]):
            found += several[:: max(1, len(several) // 5)]
    return tuple(found)
