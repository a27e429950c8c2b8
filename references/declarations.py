"""What one kernel promises about its arithmetic, as data.

A `Declaration` is an ordered program of contractions (sums over K) and steps (scale, bias, cast), each with the format
and the rounding of its result. The emulator and the bound both interpret this one record (`interpret.py`), so a kernel
that declares narrow arithmetic is judged by it, and a kernel that declares arithmetic it does not have is caught by it.
Refuses: anything that is not numbers, and cuts of K that do not fit the product (`misfit`). No function hides in a record, no
chip has a class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from math import lcm

import numpy as np

from .datapaths import Datapath, Family
from .formats import F32, Format
from .rounding import Rounding

__all__ = [
    "EXACT_BITS", "Claim", "Contraction", "Cut", "Declaration", "Join", "Order", "Start", "Step", "StepKind", "add", "cast",
    "determined", "in_parts", "misfit", "mul", "multiset_tokens", "restricted", "signature", "text_of",
]


class Claim(IntEnum):
    """What is claimed of the output: the bits of the emulated program, or a place in the interval derived from it."""

    BIT_EXACT = 0
    BOUNDED = 1


class Order(IntEnum):
    """Order in which the elements of K reach the accumulator."""

    ASCENDING = 0
    UNKNOWN = 1


class Start(IntEnum):
    """What a contraction's accumulator holds before the first product."""

    ZERO = 0
    PREVIOUS = 1  # the value the program has reached: one accumulator for two contractions


class StepKind(IntEnum):
    """What a step does to the value the program has reached."""

    MUL = 0
    ADD = 1
    CAST = 2


class Join(IntEnum):
    """Whether a multiplication is rounded before the addition that follows it."""

    SEPARATE = 0  # rounded on its own
    FUSED = 1  # one rounding for both (FMA)
    EITHER = 2  # the compiler may choose; both results are admissible


@dataclass(frozen=True, slots=True)
class Step:
    """value <- round(value op operand). `operands` name factors of the op; several are first multiplied together, from
    left to right, each product rounded to `operand_format`."""

    kind: StepKind
    operands: tuple[str, ...]
    format: Format = F32
    rounding: Rounding = Rounding.RNE
    join: Join = Join.SEPARATE
    operand_format: Format = F32


def mul(*operands: str, format: Format = F32, join: Join = Join.SEPARATE, operand_format: Format = F32) -> Step:
    """value <- RNE_format(value * operand). `join` says whether the rounding is omitted before a following add."""
    return Step(StepKind.MUL, operands, format, Rounding.RNE, join, operand_format)


def add(operand: str, format: Format = F32) -> Step:
    """value <- RNE_format(value + operand)."""
    return Step(StepKind.ADD, (operand,), format)


def cast(format: Format, rounding: Rounding = Rounding.RNE) -> Step:
    """value <- round_format(value); overflow goes to infinity where the format has one."""
    return Step(StepKind.CAST, (), format, rounding)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where K is cut in one rectangle of D (DEC-6). rows, columns: half-open ranges (first, behind the last); ends: where the
    parts of K end, ascending, the last at K."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """sum_k operands[0][m, k] * operands[1][n, k] on one datapath.

    `segment` elements of K are summed from a fresh accumulator (0: the whole of K), the sum goes through `steps` (group
    scales live here), then is added to a running total of format `running`. `splits` such totals over contiguous parts of
    K (each a whole number of segments, the last one shorter) are added in `reduction` format. The `join` of the last
    multiplication in `steps` says whether it is fused into the running addition.

    `reduction_order`: in which order the totals of segments and of parts are added, where there are several.
    `cuts`: where K is cut, rectangle by rectangle of D, in place of `splits`; empty: the same everywhere.
    `k_order`: a permutation of 0 .. P - 1: of each P of K the datapath takes element k_order[i] as its i-th; empty: as they come.
    """

    operands: tuple[str, str]
    datapath: Datapath
    order: Order = Order.ASCENDING
    start: Start = Start.ZERO
    segment: int = 0
    steps: tuple[Step, ...] = ()
    running: Format = F32
    running_rounding: Rounding = Rounding.RNE
    splits: int = 1
    reduction: Format = F32
    reduction_order: Order = Order.ASCENDING
    conversion: Format | None = None
    cuts: tuple[Cut, ...] = ()
    k_order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Declaration:
    """The whole promise for one (problem, tactic). `program` is empty for ops whose contract fixes every bit.

    A contraction with `Start.ZERO` that is not the first is computed beside the value reached so far and added to it,
    rounded to its `reduction` format. `deterministic`: the same call gives the same bits on every repeat.
    `batch_invariant`: a row of the output does not depend on the other rows nor on M.
    """

    program: tuple[Contraction | Step, ...]
    claim: Claim = Claim.BOUNDED
    deterministic: bool = True
    batch_invariant: bool = True


def in_parts(item: Contraction) -> bool:
    """Whether K may be summed in several parts, which are then added in `reduction` format."""
    return item.splits > 1 or any(len(cut.ends) > 1 for cut in item.cuts)


def determined(item: Contraction) -> bool:
    """Whether a contraction has one result on given operands: the order of K is declared, or every sum is of integers; and so is
    the order in which totals of segments and of parts are added, where there are several."""
    inside = item.order is Order.ASCENDING or item.datapath.family is Family.INTEGER
    return inside and (item.reduction_order is Order.ASCENDING or not (item.segment or in_parts(item)))


def _unaligned(item: Contraction, k: int) -> str:
    """What is wrong with the order of K, and with where it is cut."""
    unit, period = item.segment or item.datapath.instruction_k, len(item.k_order) or 1
    if item.k_order and (sorted(item.k_order) != list(range(period)) or item.order is Order.UNKNOWN):
        return f"an order of K of {item.k_order}, expected a permutation of 0 to {period - 1}, and that the order is not unknown"
    if k % period or (item.segment and item.segment % period) or (item.splits > 1 and unit % period):
        return f"an order of each {period} of K, expected one of which K = {k}, segments and splits are whole multiples"
    for cut in item.cuts:
        parts = [stop - start for start, stop in pairwise((0, *cut.ends))]
        if not parts or min(parts) < 1 or cut.ends[-1] != k:
            return f"parts of K that end at {cut.ends}, expected positions that ascend to K = {k}"
        if any(end % lcm(unit, period) for end in cut.ends[:-1]):
            return f"parts of K that end at {cut.ends}, expected multiples of {lcm(unit, period)} before K = {k}"
    return ""


def misfit(item: Contraction, m: int, n: int, k: int) -> str:
    """What is wrong with the cuts and the order of K of a contraction of [m, k] and [n, k], as half a sentence; empty where
    nothing is: rectangles cover D exactly once, parts ascend to K, each a whole number of segments (of instructions, without
    segments) but for the last, and `k_order` permutes within them (DEC-6, DEC-7)."""
    if item.cuts and item.splits != 1:
        return f"cuts of K and {item.splits} splits, expected one of both"
    if wrong := _unaligned(item, k):
        return wrong
    if not item.cuts:
        return ""
    for cut in item.cuts:
        if not all(0 <= first < last <= size for (first, last), size in ((cut.rows, m), (cut.columns, n))):
            return f"a rectangle of rows {cut.rows} and columns {cut.columns}, expected one inside D of {m} x {n}"
    down = sorted({0, m} | {row for cut in item.cuts for row in cut.rows})
    along = sorted({0, n} | {column for cut in item.cuts for column in cut.columns})
    row_at, column_at = ({place: i for i, place in enumerate(places)} for places in (down, along))
    times = np.zeros((len(down) - 1, len(along) - 1), dtype=np.int64)
    for cut in item.cuts:
        times[slice(*map(row_at.get, cut.rows)), slice(*map(column_at.get, cut.columns))] += 1
    wrong_at = np.argwhere(times != 1)
    if len(wrong_at):
        row, column = down[wrong_at[0][0]], along[wrong_at[0][1]]
        return f"rectangles of which {times[tuple(wrong_at[0])]} hold row {row}, column {column}, expected exactly one"
    return ""


def restricted(declaration: Declaration, rows: np.ndarray, columns: np.ndarray) -> Declaration:
    """The declaration for some rows and columns of D alone (indices, strictly ascending): cuts of K where they then lie.
    Raises ValueError for indices that do not ascend."""
    if any((np.diff(places) < 1).any() for places in (rows, columns)):
        raise ValueError("got rows or columns of D that do not ascend, expected each once and in order")

    def placed(span: tuple[int, int], kept: np.ndarray) -> tuple[int, int]:
        first, last = np.searchsorted(kept, span)
        return int(first), int(last)

    def local(item: Contraction | Step) -> Contraction | Step:
        if not isinstance(item, Contraction) or not item.cuts:
            return item
        found = (Cut(placed(cut.rows, rows), placed(cut.columns, columns), cut.ends) for cut in item.cuts)
        return replace(item, cuts=tuple(c for c in found if c.rows[0] < c.rows[1] and c.columns[0] < c.columns[1]))

    return replace(declaration, program=tuple(map(local, declaration.program)))


EXACT_BITS = Declaration((), Claim.BIT_EXACT)
"""The declaration of encodings and quantisers: the contract names every bit, there is nothing to choose."""


def multiset_tokens(steps: tuple[Step, ...]) -> Iterator[str]:
    """Names of what a run of steps multiplies by and adds, products in alphabetical order between two additions."""
    factors: list[str] = []
    for step in steps:
        if step.kind is StepKind.MUL:
            factors.extend(step.operands)
        elif step.kind is StepKind.ADD:
            yield from (f"*{name}" for name in sorted(factors))
            factors.clear()
            yield f"+{step.operands[0]}"
    yield from (f"*{name}" for name in sorted(factors))


def signature(program: tuple[Contraction | Step, ...]) -> tuple[str, ...]:
    """What a program computes, with all that a kernel may choose left out: formats, roundings, datapaths, splits, cuts,
    fusion and the order of multiplications that follow each other. Two programs with one signature agree over the reals."""
    tokens: list[str] = []
    pending: list[Step] = []
    for item in program:
        if isinstance(item, Step):
            pending.append(item)
            continue
        tokens.extend(multiset_tokens(tuple(pending)))
        pending.clear()
        inner = "".join(multiset_tokens(item.steps))
        tokens.append(f"dot({item.operands[0]},{item.operands[1]}{f';{item.segment}{inner}' if inner else ''})")
    tokens.extend(multiset_tokens(tuple(pending)))
    return tuple(tokens)


def _inner_text(steps: tuple[Step, ...]) -> str:
    return "".join(
        f" {step.kind.name.lower()}({','.join(step.operands) or step.format.name}:{step.format}:{step.join.name.lower()})"
        for step in steps
    )


def _contraction_text(item: Contraction) -> str:
    parts = [f"dot({', '.join(item.operands)}) on {item.datapath}"]
    parts += [f"K {item.order.name.lower()}", f"from {item.start.name.lower()}"]
    if item.conversion is not None:
        parts.append(f"operands to {item.conversion}")
    if item.segment:
        parts.append(f"segments of {item.segment}:{_inner_text(item.steps)} into {item.running}")
    if item.splits > 1:
        parts.append(f"{item.splits} splits added in {item.reduction}")
    if item.cuts:
        parts.append(f"K cut by rectangle of D, parts added in {item.reduction}")
    if item.k_order:
        parts.append(f"{len(item.k_order)} of K in the order {' '.join(map(str, item.k_order))}")
    if not determined(item) and item.order is Order.ASCENDING:
        parts.append("totals added in unknown order")
    return ", ".join(parts)


def _step_text(item: Step) -> str:
    text = f"{item.kind.name.lower()}({', '.join(item.operands) or item.format.name}) -> {item.format} {item.rounding.name}"
    return text + (f", {item.join.name.lower()}" if item.join else "")


def text_of(declaration: Declaration) -> str:
    """A declaration as one line for a report: its items in order, then what is claimed of it."""
    lines = [_contraction_text(item) if isinstance(item, Contraction) else _step_text(item) for item in declaration.program]
    traits = [declaration.claim.name.lower().replace("_", "-")]
    traits += ["deterministic"] if declaration.deterministic else []
    traits += ["batch-invariant"] if declaration.batch_invariant else []
    return "; ".join([*lines, " ".join(traits)])
