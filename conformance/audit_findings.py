"""What the readings of a product say of its declaration: consistent, refuted, or finer than declared.

Decides: which bits a probe must give (those of the declared program, where the order of K is known), which readings contradict a
declaration that leaves the order open, and which declaration takes its place where the product keeps more than it declares.
Refuses: to hold an order, a chunk or splits against a declaration that says the order is unknown, and to call anything a
contradiction that rests on a bound rather than on an exact reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowbit.references.datapaths import Datapath, Family
from lowbit.references.declarations import Claim, Contraction, Declaration, Step, StepKind, cast, determined, text_of
from lowbit.references.formats import F32, F64, Codes
from lowbit.references.rounding import Rounding

from .audit_probes import CUT, ORDER, Probed, probed
from .audit_readings import FIELDS, LOSSLESS, Fingerprint, Reading, fingerprint, readings_of_cut, segment_of_order
from .case import Case, Operands, Problem
from .op import Op
from .report_records import CONSISTENT, FINER, REFUTED, Audited
from .verdict import PASSING, Verdict

__all__ = [
    "Found", "Gain", "alike", "contradiction", "finer", "found_of", "known_order", "leaves_open", "main_contraction",
    "must_equal", "refined",
]


def main_contraction(declaration: Declaration) -> Contraction:
    """The product of the operands: the first contraction of a program."""
    return next(item for item in declaration.program if isinstance(item, Contraction))


def known_order(declaration: Declaration) -> bool:
    """Whether the declared program has one result on given operands, but for fusions left to the compiler."""
    return all(determined(item) for item in declaration.program if isinstance(item, Contraction))


def must_equal(declaration: Declaration) -> Declaration:
    """The declaration that a probe is judged by: of bits where the order of K is known (AUD-2), as it is elsewhere (AUD-3)."""
    return replace(declaration, claim=Claim.BIT_EXACT) if known_order(declaration) else declaration


def leaves_open(declaration: Declaration) -> bool:
    """Whether readings, not bits, decide: the order of the main product is unknown and its accumulator narrower than binary64."""
    main = main_contraction(declaration)
    return not known_order(declaration) and main.datapath.family is not Family.INTEGER and main.datapath.output is not F64


# Numbers of a declaration --------------------------------------------------------------------------------------------


def _fraction_bits(path: Datapath) -> int:
    return path.fraction_bits or path.output_bits - 1


def _segment(main: Contraction) -> int:
    return main.segment or (main.datapath.instruction_k if main.datapath.family is Family.EMULATED_PAIRS else 0)


def _exact(reading: Reading) -> int | None:
    return reading.number if reading.bound == "exact" else None


def _at_least(reading: Reading) -> int:
    """How much is surely kept; 0 where nothing is known to be."""
    return (reading.number or 0) if reading.bound in ("exact", "at least") else 0


def _carried(found: Fingerprint) -> int:
    """Significand bits that every sum of a product surely has: those of a part of K and, where K is not one part, those of the
    total that parts are added to. 0 where the parts are unknown: what survived may be sums that never met."""
    bits = _at_least(found.output_bits)
    if found.order.why == LOSSLESS or (found.segment == Reading(0) and found.splits == Reading(1)):
        return bits
    if found.segment.value is None:
        return 0
    running = _at_least(found.running_bits)
    return min(bits, running or F32.precision)


def contradiction(op: Op, case: Case, operands: Operands, declaration: Declaration, codes: Codes) -> str:
    """What the outputs of one probe show to be coarser than a declaration that leaves the order of K open, as a sentence; empty
    where nothing does (AUD-4). Declarations in known order are judged by bits."""
    main = main_contraction(declaration)
    path = main.datapath
    if known_order(declaration) or path.family is Family.INTEGER:
        return ""
    probe = probed(op, case, operands, codes)
    if case.pattern == CUT:
        found = readings_of_cut(op, probe)
        fraction, bits = _exact(found.fraction_bits), _exact(found.output_bits)
        if fraction is not None and fraction < min(_fraction_bits(path), path.output_bits - 1):
            return f"{fraction} bits below the largest product are kept, {_fraction_bits(path)} are declared ({path})"
        if bits is not None and bits < path.output_bits:
            return f"a sum carries {bits} significand bits, {path.output_bits} are declared ({path})"
        if bits is not None and path.output_rounding is Rounding.RNE and found.output_rounding.value in ("truncated", "floored"):
            return f"sums are {found.output_rounding.value}, rounding to nearest is declared ({path})"
    if case.pattern == ORDER and _segment(main) and path.output_bits < main.running.precision:
        length = segment_of_order(op, probe)
        if length is not None and length > _segment(main):
            return f"{length} of K are summed in one accumulator, promotion every {_segment(main)} is declared"
    return ""


@dataclass(frozen=True, slots=True)
class Gain:
    """What a product has beyond its declaration. 0, None: nothing. `products`: per node, where nodes are shorter than declared
    and so round more often. `words`: the same as text."""

    fraction_bits: int = 0
    output_bits: int = 0
    rounding: Rounding | None = None
    segment: int = 0
    products: int = 0
    words: tuple[str, ...] = ()


def finer(declaration: Declaration, found: Fingerprint) -> Gain | None:
    """What the readings show beyond a declaration that leaves the order open; None where they show nothing (AUD-5). Lower bounds
    count: that many bits were seen to survive. Bits count only as far as the parts of K show that all sums have them: of
    interleaved accumulators a survivor says that it met nothing."""
    if not leaves_open(declaration):
        return None
    main = main_contraction(declaration)
    path = main.datapath
    words: list[str] = []
    fraction, bits, rounding, segment = 0, 0, None, 0
    sure = _carried(found)
    if path.fraction_bits and sure and _at_least(found.fraction_bits) > path.fraction_bits:
        fraction = _at_least(found.fraction_bits)
        words.append(f"{found.fraction_bits} fraction bits, {path.fraction_bits} declared")
    if sure > path.output_bits:
        bits = sure
        exact = found.output_bits == Reading(bits)
        words.append(f"{'' if exact else 'at least '}{bits} significand bits, {path.output_bits} declared")
    nearest = found.output_rounding.value == "nearest" and _exact(found.output_bits) is not None
    if nearest and path.output_rounding is Rounding.RZ:
        rounding = Rounding.RNE
        words.append("sums to nearest, truncation declared")
    length = _exact(found.segment)
    carried = bits or path.output_bits
    cut = bool(main.steps) or any(len(one.ends) > 1 for one in main.cuts)
    if length and not _segment(main) and not cut and carried < main.running.precision:
        segment = length
        words.append(f"promotion every {length} of K, none declared")
    shorter = path.family is Family.FUSED and found.chunk.bound in ("exact", "at most")
    products = min(found.chunk.number or path.products, path.products) if shorter else 0
    return Gain(fraction, bits, rounding, segment, products, tuple(words)) if words else None


def refined(declaration: Declaration, gain: Gain) -> Declaration:
    """The declaration with what was measured in place of what was declared: its main product on the measured datapath. A carried
    sum wider than binary32 is followed by a cast to it, as the next step would round it."""
    main = main_contraction(declaration)
    path = main.datapath
    bits = min(gain.output_bits or path.output_bits, F64.precision)
    wide = bits > path.output.precision
    measured = replace(
        path, name=f"{path.name}_measured", fraction_bits=gain.fraction_bits or path.fraction_bits, output_bits=bits,
        output_rounding=path.output_rounding if gain.rounding is None else gain.rounding, output=F64 if wide else path.output,
        source="measured by lowbit audit", products=gain.products or path.products,
    )
    narrow = (cast(F32),) if wide else ()
    steps = (*narrow, *main.steps) if main.segment else main.steps
    main_measured = replace(main, datapath=measured, segment=main.segment or gain.segment, steps=steps)
    program: list[Contraction | Step] = []
    for item in declaration.program:
        program.append(main_measured if item is main else item)
        follows = declaration.program[len(program)] if len(program) < len(declaration.program) else None
        if item is main and narrow and not main.segment and not (isinstance(follows, Step) and follows.kind is StepKind.CAST):
            return replace(declaration, program=(*program, *narrow, *declaration.program[len(program) :]))
    return replace(declaration, program=tuple(program))


# One audit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of one battery: the record of the report, the declaration that was audited, what the product has beyond it."""

    record: Audited
    declaration: Declaration
    gain: Gain | None


def alike(first: Declaration, second: Declaration) -> bool:
    """Whether two declarations promise the same of the sum over K, so that what was measured under one holds under the other."""
    a, b = main_contraction(first), main_contraction(second)
    first_sum, second_sum = (
        (c.datapath, c.order, c.splits, bool(c.segment), c.conversion, bool(c.cuts), c.k_order) for c in (a, b)
    )
    return first_sum == second_sum


def found_of(
    op: Op, problem: Problem, tactic: str, declaration: Declaration, verdicts: Sequence[Verdict], probes: Sequence[Probed]
) -> Found:
    """The outcome of a battery: its verdicts, one per probe, and its outputs (AUD-6)."""
    readings = fingerprint(op, probes)
    failed = next((verdict for verdict in verdicts if verdict.status not in PASSING), None)
    gain = None if failed is not None else finer(declaration, readings)
    standing = REFUTED if failed is not None else CONSISTENT if gain is None else FINER
    said = failed.reason if failed is not None else "; ".join(gain.words) if gain is not None else ""
    record = Audited(
        str(problem), tactic, standing, said, failed.case if failed is not None else "", text_of(declaration),
        {name: str(getattr(readings, name)) for name in FIELDS},
    )
    return Found(record, declaration, gain)
