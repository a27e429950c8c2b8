"""What one kernel promises about its arithmetic, as data.

A `Declaration` is an ordered program of contractions (sums over K) and steps (scale, bias, cast), each with the format
and the rounding of its result. The emulator and the bound both interpret this one record (`interpret.py`), so a kernel
that declares narrow arithmetic is judged by it, and a kernel that declares arithmetic it does not have is caught by it.
Refuses: anything that is not numbers. No function hides in a record, no chip has a class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from .datapaths import Datapath
from .formats import F32, Format
from .rounding import Rounding

__all__ = [
    "EXACT_BITS", "Claim", "Contraction", "Declaration", "Join", "Order", "Start", "Step", "StepKind", "add", "cast", "mul",
    "multiset_tokens", "signature", "text_of",
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
class Contraction:
    """sum_k operands[0][m, k] * operands[1][n, k] on one datapath.

    `segment` elements of K are summed from a fresh accumulator (0: the whole of K), the sum goes through `steps` (group
    scales live here), then is added to a running total of format `running`. `splits` such totals over contiguous parts of
    K (each a whole number of segments, the last one shorter) are added in `reduction` format. The `join` of the last
    multiplication in `steps` says whether it is fused into the running addition.
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
    """What a program computes, with all that a kernel may choose left out: formats, roundings, datapaths, splits, fusion
    and the order of multiplications that follow each other. Two programs with one signature agree over the reals."""
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
