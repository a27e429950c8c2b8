"""Arithmetic word problems in the format of GSM8K, from a seed: what a small model can be trained and asked on.

Decides: texts, solutions with calculator marks, answers, and which problems are held out. A problem is a fact about
somebody's things and two to four steps that change their number; every step is one line of the solution.
Refuses: problems whose intermediate results leave 1..400, and any data that was not generated here.
Held out are the problems whose question has a SHA-256 divisible by 16: training never meets a question of the test split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

__all__ = ["Problem", "choices", "held_out", "problems"]

_NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Kira", "Leo", "Maria", "Nils", "Olga",
    "Paul",
)
_THINGS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "plants", "shells", "stamps",
    "stickers", "stones", "tickets", "toys",
)
_PLACES = ("a shop", "a friend", "the market", "a neighbor", "the school", "an uncle")
_HIGHEST = 400


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `solution` ends in a line `#### ANSWER`, as in GSM8K."""

    question: str
    solution: str
    answer: int


@dataclass(frozen=True, slots=True)
class _State:
    """While a problem is told: whose things, how many, and what was written so far."""

    name: str
    things: str
    number: int


_Step = Callable[[Random, _State], tuple[str, str, int]]
"""Sentence of the question, formula of the solution, new number."""


def _gets(draw: Random, now: _State) -> tuple[str, str, int]:
    more = draw.randint(2, 60)
    verb = draw.choice(("buys", "finds", "gets"))
    said = f"{now.name} {verb} {more} more {now.things} from {draw.choice(_PLACES)}."
    return said, f"{now.number}+{more}", now.number + more


def _gives(draw: Random, now: _State) -> tuple[str, str, int]:
    away = draw.randint(1, max(1, min(60, now.number - 1)))
    verb = draw.choice(("gives away", "loses", "sells"))
    return f"Then {now.name} {verb} {away} {now.things}.", f"{now.number}-{away}", now.number - away


def _multiplies(draw: Random, now: _State) -> tuple[str, str, int]:
    times = draw.randint(2, 5)
    word = {2: "doubles", 3: "triples"}.get(times)
    if word is not None and draw.random() < 0.5:
        said = f"A week later the number of {now.things} {word}."
    else:
        said = f"A week later there are {times} times as many {now.things}."
    return said, f"{now.number}*{times}", now.number * times


def _shares(draw: Random, now: _State) -> tuple[str, str, int]:
    parts = [divisor for divisor in range(2, 10) if now.number % divisor == 0]
    if not parts:
        return _gives(draw, now)
    heads = draw.choice(parts)
    return f"The {now.things} are shared equally among {heads} people.", f"{now.number}/{heads}", now.number // heads


_STEPS: tuple[_Step, ...] = (_gets, _gets, _gives, _gives, _multiplies, _shares)


def _problem(draw: Random) -> Problem | None:
    """One problem, or None where a number leaves its range."""
    now = _State(draw.choice(_NAMES), draw.choice(_THINGS), draw.randint(3, 90))
    told, lines = [f"{now.name} has {now.number} {now.things}."], []
    kinds = draw.choices(_STEPS, k=draw.choice((2, 2, 3, 3, 4)))
    if kinds.count(_multiplies) > 1 or _shares in kinds[:-1]:
        return None
    for step in kinds:
        said, formula, number = step(draw, now)
        if not 1 <= number <= _HIGHEST:
            return None
        told.append(said)
        lines.append(f"{formula} = <<{formula}={number}>>{number} {now.things}")
        now = _State(now.name, now.things, number)
    shared = "/" in lines[-1]
    asked = f"How many {now.things} does each one get?" if shared else f"How many {now.things} does {now.name} have now?"
    return Problem(" ".join((*told, asked)), "\n".join((*lines, f"#### {now.number}")), now.number)


def held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the test split."""
    return int.from_bytes(hashlib.sha256(problem.question.encode()).digest()[:8], "big") % 16 == 0


def problems(seed: int, *, test: bool) -> Iterator[Problem]:
    """Problems of one split, without end; the same on every machine."""
    draw = Random(seed)
    while True:
        found = _problem(draw)
        if found is not None and held_out(found) == test:
            yield found


def choices(problem: Problem, seed: int) -> tuple[tuple[str, str, str, str], int]:
    """Four solutions of a problem, one right, and the place of the right one. The wrong ones differ in the last result: by one,
    by two, by ten, by a hundred, or in the order of its digits."""
    draw = Random(f"{seed} {problem.question}")
    right = problem.answer
    slips = {right + 1, right - 1, right + 10, right - 10, right + 2, right + 100, int(str(right)[::-1])} - {right}
    wrong = draw.sample(sorted(number for number in slips if number > 0), 3)
    body, _, _ = problem.solution.rpartition("\n")
    *above, last = body.split("\n")
    formula, _, rest = last.partition(" = ")
    things = rest.rpartition(" ")[2]

    def ending(number: int) -> str:
        return "\n".join((*above, f"{formula} = <<{formula}={number}>>{number} {things}", f"#### {number}"))

    place = draw.randrange(4)
    numbers = [*wrong[:place], right, *wrong[place:]]
    return (ending(numbers[0]), ending(numbers[1]), ending(numbers[2]), ending(numbers[3])), place
