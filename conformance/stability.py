"""Level L3 in its host form: what may not change a bit when nothing that the contract knows of has changed.

Decides: which variations of one call are compared, and what each may change. Repeats, poison patterns and other calls in
between may change nothing where the declaration says deterministic. Placement, alignment, row padding and a side stream may
pick another kernel, so each such outcome is judged against the expectation. Refuses: to call a spread a defect where the
declaration does not promise determinism.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lowbit.references.declarations import Declaration

from .case import Case, Operands, Problem, Stream
from .op import Op
from .patterns import draw_operands
from .selection import case_list
from .verdict import judge_outputs
from .worker import VARIATIONS, Ending, Outcome, Variation, differences

__all__ = ["PATTERN", "Execute", "Finding", "Refused", "judge_stability", "stability_cases"]

PATTERN = "stable"
"""Pattern part of the ids of stability cases; operands are those of the pattern `normal` (or the op's first)."""

Execute = Callable[[Problem, Operands, Variation], Outcome]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a relation between several runs gave. `wrong` of `judged` elements disagree; `reason` is one sentence if any do."""

    reason: str
    clause: str
    wrong: int
    judged: int
    operands: str
    kernel: str


class Refused(Exception):
    """The backend does not support a problem that is run beside the one under judgement."""


def stability_cases(op: Op, count: int = 4) -> list[Case]:
    """A few problems of the op's list, spread over its variants and sizes."""
    problems = list(dict.fromkeys(item.case.problem for item in case_list(op)))
    stream = Stream("stability", op.name)
    picked: list[Case] = []
    for number in range(min(count, len(problems))):
        place = int(stream.integers(0, len(problems) - 1, (1,))[0])
        picked.append(Case(problems[place], PATTERN, number + 1))
    return list({case.problem: case for case in picked}.values())


def judge_stability(op: Op, case: Case, declaration: Declaration, execute: Execute, repeats: int) -> Finding | Outcome:
    """Run the case as it is, then under every variation. Returns the outcome itself where a run gives nothing to compare."""
    pattern = "normal" if "normal" in op.patterns else op.patterns[0]
    source = Case(case.problem, pattern, case.seed)
    operands = draw_operands(op, source)
    expected = op.expect(source, operands, declaration)
    base = execute(case.problem, operands, Variation())
    if base.status is not Ending.OK:
        return base
    wrong, judged, sentences = 0, 0, []
    for name, variation in VARIATIONS.items():
        varied = execute(case.problem, operands, replace(variation, repeats=repeats) if variation.repeats > 1 else variation)
        if varied.status is not Ending.OK:
            if varied.status is Ending.RAISED and name in ("padded rows", "side stream"):
                sentences.append(f"{name}: refused ({varied.reason})")  # it may refuse strides or streams, not get them wrong
                continue
            return varied
        judgement = judge_outputs(expected, varied.outputs, varied.untouched)
        judged += judgement.judged
        if judgement.wrong:
            wrong += judgement.wrong
            sentences.append(f"{name}: {judgement.wrong} elements leave their admissible set")
        if declaration.deterministic:
            if varied.distinct > 1:
                wrong += 1
                sentences.append(f"{name}: {varied.distinct} different outputs over {repeats} repeats ({varied.variation})")
            if name in ("repeats", "poison"):
                changed = differences(base, varied)
                wrong += len(changed)
                sentences += [f"{name}: {sentence}" for sentence in changed]
    for other in _others(op, case):
        try:
            execute(other.problem, draw_operands(op, other), Variation())
        except Refused:
            continue
        again = execute(case.problem, operands, Variation())
        if again.status is not Ending.OK:
            return again
        judgement = judge_outputs(expected, again.outputs, again.untouched)
        judged += judgement.judged
        changed = differences(base, again) if declaration.deterministic else ()
        wrong += judgement.wrong + len(changed)
        sentences += [f"after {other}: {judgement.wrong} elements leave their admissible set"] if judgement.wrong else []
        sentences += [f"after {other}: {sentence}" for sentence in changed]
    return Finding("; ".join(sentences), "STA-1", wrong, max(judged, wrong), operands.sha256(), base.kernel)


def _others(op: Op, case: Case, count: int = 4) -> list[Case]:
    """Other problems of the op in a seeded order, run between repeats of the case: no state may leak from one to the next."""
    problems = [problem for problem in dict.fromkeys(item.case.problem for item in case_list(op)) if problem != case.problem]
    places = Stream("sequence", case).integers(0, max(0, len(problems) - 1), (count if problems else 0,))
    pattern = "normal" if "normal" in op.patterns else op.patterns[0]
    return [Case(problems[int(place)], pattern, number + 1) for number, place in enumerate(places)]
