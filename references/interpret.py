"""One interpreter for declared programs: the emulator, the bound and the exact value all walk the same record.

`emulate` gives the bits a kernel produces that does exactly what it declares. `bound` gives, per element, an interval that
holds every result such a kernel may produce. `ideal` gives the result over the reals. An interval travels through each step
with that step's own rounding: rounding is monotone, so the rounded ends enclose every rounded inner value.
Refuses: a bit-exact claim over an unknown order, and programs whose products would need more than float64 to be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from . import dot
from .datapaths import Datapath, Family
from .declarations import Contraction, Declaration, Join, Order, Start, Step, StepKind, determined, misfit
from .dot import Enclosure, Operand, low_bit
from .formats import F32, F64, Codes, Format, Reals, decode
from .rounding import Overflow, Rounding, encode, mul_odd, round_to, sum_odd

__all__ = ["Environment", "Factor", "Interval", "ProgramError", "bound", "emulate", "exact_by_width", "ideal", "segments"]


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A scale or an addend of a program. `axis`: 'm' one per output row, 'n' one per output column, '' one in all, 'mn' one
    per element. With `grouped`, a last axis counts the segments of K. Values are exact in float64, at most 24 bits each."""

    values: Reals
    axis: str
    grouped: bool = False

    def at(self, segment: int = 0) -> Reals:
        """Values of one segment, broadcastable to [M, N]."""
        values = self.values[..., segment] if self.grouped else self.values
        if self.axis == "m":
            return values.reshape(-1, 1)
        return values.reshape(1, -1) if self.axis == "n" else values


Environment = Mapping[str, Operand | Factor]


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """lo <= value <= hi per element [M, N] (float64, may be infinite), or NaN.

    `nan`: certainly NaN (then lo and hi say nothing). `maybe_nan`: a value of the interval or NaN.
    Where lo is hi (the same array) the value is known exactly and is computed once.
    """

    lo: Reals
    hi: Reals
    nan: npt.NDArray[np.bool_]
    maybe_nan: npt.NDArray[np.bool_]

    @staticmethod
    def point(values: Reals) -> Interval:
        """The interval of exactly these values; NaN becomes the mask."""
        nan = np.isnan(values)
        values = np.where(nan, 0.0, values)
        return Interval(values, values, nan, np.zeros_like(nan))

    @staticmethod
    def of(lo: Reals, hi: Reals) -> Interval:
        """The interval between two ends; an end that is NaN makes NaN possible, two make it certain."""
        both = np.isnan(lo) & np.isnan(hi)
        some = np.isnan(lo) | np.isnan(hi)
        low, high = np.fmin(lo, hi), np.fmax(lo, hi)
        return Interval(np.where(both, 0.0, low), np.where(both, 0.0, high), both, some & ~both)

    def at(self, here: tuple[slice, slice]) -> Interval:
        """The interval of some rows and columns; a point stays one."""
        lo = self.lo[here]
        return Interval(lo, lo if self.hi is self.lo else self.hi[here], self.nan[here], self.maybe_nan[here])

    def masks(self, other: Interval) -> Interval:
        """Self with the NaN masks of another value joined in."""
        nan = self.nan | other.nan
        return Interval(self.lo, self.hi, nan, (self.maybe_nan | other.maybe_nan) & ~nan)


def _widen(enclosure: Enclosure) -> Interval:
    """Interval of an enclosure, its ends pushed out by one ulp of float64 where the radius is not zero. An infinite radius says
    that the accumulator may overflow; infinities of both signs may then meet, so NaN is possible, too."""
    value, radius = enclosure.value, enclosure.radius
    if not radius.any():
        return Interval.point(value)
    with np.errstate(invalid="ignore"):
        lo = np.where(radius > 0, np.nextafter(value - radius, -np.inf), value)
        hi = np.where(radius > 0, np.nextafter(value + radius, np.inf), value)
    plain = ~np.isfinite(value) & np.isfinite(radius)
    found = Interval.of(np.where(plain, value, lo), np.where(plain, value, hi))
    return _unbounded(found, np.isinf(radius))


def _unbounded(value: Interval, where: npt.NDArray[np.bool_]) -> Interval:
    """The interval with everything admitted, NaN included, in some places."""
    if not where.any():
        return value
    lo, hi = np.where(where, -np.inf, value.lo), np.where(where, np.inf, value.hi)
    return Interval(lo, hi, value.nan & ~where, value.maybe_nan | where)


def _product(x: Reals, factor: Reals, exact: bool) -> Reals:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(x * factor if exact else mul_odd(x, factor))


def _multiply(value: Interval, factor: Reals, exact: bool) -> Interval:
    """value * factor, unrounded. A negative factor swaps the ends; 0 * inf and a NaN factor give NaN."""
    low = _product(value.lo, factor, exact)
    if value.hi is value.lo:
        return Interval.point(low).masks(value)
    found = Interval.of(low, _product(value.hi, factor, exact))
    # Between ends that both become NaN, or that 0 or infinity turns into ordinary values, lie values that do otherwise.
    spans = value.lo < value.hi
    crossing = spans & np.isinf(factor) & (value.lo <= 0) & (value.hi >= 0)
    partly = crossing | (spans & (factor == 0) & (np.isinf(value.lo) | np.isinf(value.hi)))
    lo, hi = np.where(partly & found.nan, 0.0, found.lo), np.where(partly & found.nan, 0.0, found.hi)
    return Interval(lo, hi, found.nan & ~partly, found.maybe_nan | partly).masks(value)


def _sum(a: Interval, b: Interval) -> Interval:
    """a + b, rounded to odd: one later rounding is the only one that counts."""
    low = sum_odd(a.lo, b.lo)
    if a.hi is a.lo and b.hi is b.lo:
        return Interval.point(low).masks(a).masks(b)
    result = Interval.of(low, sum_odd(a.hi, b.hi))
    opposed = ((a.hi == np.inf) & (b.lo == -np.inf)) | ((a.lo == -np.inf) & (b.hi == np.inf))
    return Interval(result.lo, result.hi, result.nan, result.maybe_nan | (opposed & ~result.nan)).masks(a).masks(b)


def _round(value: Interval, fmt: Format, rounding: Rounding) -> Interval:
    low = round_to(value.lo, fmt, rounding)
    high = low if value.hi is value.lo else round_to(value.hi, fmt, rounding)
    return Interval(low, high, value.nan, value.maybe_nan)


def _hull(a: Interval, b: Interval) -> Interval:
    nan = a.nan & b.nan
    return Interval(np.minimum(a.lo, b.lo), np.maximum(a.hi, b.hi), nan, (a.nan | b.nan | a.maybe_nan | b.maybe_nan) & ~nan)


def _factor(step: Step, environment: Environment, segment: int) -> Reals:
    """The product of a step's operands, from left to right, each product rounded to the step's operand format."""
    result: Reals | None = None
    for name in step.operands:
        factor = environment[name]
        assert isinstance(factor, Factor)
        values = factor.at(segment)
        result = values if result is None else round_to(_product(result, values, True), step.operand_format)
    assert result is not None
    return result


def _steps(value: Interval, steps: tuple[Step, ...], environment: Environment, bits: int, segment: int = 0,
           total: Interval | None = None, running: tuple[Format, Rounding] = (F32, Rounding.RNE)) -> tuple[Interval, int]:
    """Walk steps; if `total` is given, add the result to it at the end, rounded to `running`. Returns value and its bits."""
    pending: list[tuple[Interval, Interval, Join]] = []  # (rounded product, unrounded product, join) awaiting an addition

    def settle(addend: Interval | None, fmt: Format, rounding: Rounding) -> None:
        nonlocal value
        if not pending:
            if addend is not None:
                value = _round(_sum(value, addend), fmt, rounding)
            return
        rounded, plain, join = pending.pop()
        if addend is None:
            value = rounded
        elif join is Join.SEPARATE:
            value = _round(_sum(rounded, addend), fmt, rounding)
        elif join is Join.FUSED:
            value = _round(_sum(plain, addend), fmt, rounding)
        else:
            value = _hull(_round(_sum(rounded, addend), fmt, rounding), _round(_sum(plain, addend), fmt, rounding))

    for step in steps:
        if step.kind is StepKind.ADD:
            addend = environment[step.operands[0]]
            assert isinstance(addend, Factor)
            settle(Interval.point(np.broadcast_to(addend.at(segment), value.lo.shape)), step.format, step.rounding)
            bits = step.format.precision
            continue
        settle(None, F32, Rounding.RNE)
        if step.kind is StepKind.CAST:
            value = _round(value, step.format, step.rounding)
        else:
            if step.join is not Join.SEPARATE and bits + 24 > 53:
                raise ValueError(f"a fused multiplication by {step.operands} needs a value of at most 29 bits; cast it first")
            plain = _multiply(value, _factor(step, environment, segment), bits + 24 <= 53)
            pending.append((_round(plain, step.format, step.rounding), plain, step.join))
        bits = step.format.precision
    settle(total, *running)
    return value, running[0].precision if total is not None else bits


def segments(contraction: Contraction, k: int, ends: tuple[int, ...] = ()) -> list[list[slice]]:
    """Per part of K, the slices that are summed from a fresh accumulator. Parts end at `ends`; without them they are `splits`,
    each a whole number of segments (or of instructions, where a part is one segment), the last one shorter."""
    unit = contraction.segment or contraction.datapath.instruction_k
    per_split = -(-k // (unit * contraction.splits)) * unit
    result = []
    for start, stop in pairwise((0, *(ends or (*range(per_split, k, per_split or 1), k)))) if k else ():
        length = contraction.segment or stop - start
        result.append([slice(i, min(i + length, stop)) for i in range(start, stop, length)])
    return result


def _part(operand: Operand, piece: slice) -> Operand:
    """Columns of K of an operand, with the block scales that belong to them."""
    scales = operand.scales
    if scales is not None:
        if piece.start % operand.group:
            raise ValueError(f"a segment starts at k = {piece.start}, inside a block of {operand.group} that shares a scale")
        scales = scales[:, piece.start // operand.group : -(-piece.stop // operand.group)]
    return Operand(operand.codes[:, piece], operand.format, scales, operand.scale_format, operand.group)


def _finite(values: Reals) -> Reals:
    return np.where(np.isfinite(values), values, 0.0)


def _open(value: Interval) -> npt.NDArray[np.bool_]:
    """Elements that may be infinite and need not be."""
    return np.asarray(~value.nan & (value.lo < value.hi) & (np.isinf(value.lo) | np.isinf(value.hi)))


def _prefix(value: Interval) -> Enclosure:
    with np.errstate(invalid="ignore"):
        middle = np.where(_open(value), 0.0, np.where(value.nan, np.nan, value.lo / 2 + value.hi / 2))
        radius = np.maximum(value.hi - middle, middle - value.lo)
    radius = np.where(radius > 0, np.nextafter(radius, np.inf), 0.0)
    return Enclosure(middle, np.where(np.isfinite(middle), radius, 0.0))


def _top(operand: Operand, path: Family) -> Reals:
    """Per row, the largest 2^e an operand brings to the alignment: e is the exponent of a normal value, the minimum
    exponent of a subnormal one. GROUPED datapaths align by their scales alone."""
    if path is Family.GROUPED and operand.scales is not None and operand.scale_format is not None:
        x, fmt = np.abs(decode(operand.scales, operand.scale_format)), operand.scale_format
    else:
        x, fmt = np.abs(dot.values(operand)), operand.format
    floor = 2.0**fmt.min_exponent if fmt.exponent_bits and operand.scales is None else 0.0
    power = np.where(x == 0, 0.0, np.maximum(np.ldexp(0.5, np.frexp(x)[1]), floor))
    return np.asarray(np.max(np.where(np.isfinite(power), power, np.inf), axis=1, initial=0.0))


def exact_by_width(a: Operand, w: Operand, path: Datapath, previous: Interval | None = None) -> npt.NDArray[np.bool_]:
    """Elements [M, N] whose sum no accumulator of this datapath can get wrong, in any order.

    With q the product of the rows' lowest bits, every partial sum is a multiple of q. Nothing is cut if the largest product
    exponent is at most 2^F q, and nothing is rounded if sum |a| |w| (plus the start) stays below 2^min(F + 1, P) q."""
    values_a, values_w = dot.values(a), dot.values(w)
    finite = np.asarray(np.isfinite(values_a).all(axis=1))[:, None] & np.asarray(np.isfinite(values_w).all(axis=1))[None, :]
    values_a, values_w = np.where(np.isfinite(values_a), values_a, 0.0), np.where(np.isfinite(values_w), values_w, 0.0)
    magnitude = np.abs(values_a) @ np.abs(values_w).T
    low_a = np.min(low_bit(values_a), axis=1, initial=np.inf)
    low_w = np.min(low_bit(values_w), axis=1, initial=np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        unit = low_a[:, None] * low_w[None, :]
        if previous is not None:
            magnitude = magnitude + np.abs(previous.lo)
            unit = np.minimum(unit, low_bit(previous.lo))
            finite = finite & (previous.lo == previous.hi) & ~previous.nan & ~previous.maybe_nan & np.isfinite(previous.lo)
        bits = path.output_bits if not path.fraction_bits else min(path.output_bits, path.fraction_bits + 1)
        fits = magnitude * (1.0 + 2.0**-40) < 2.0**bits * unit
        if path.fraction_bits:
            top = _top(a, path.family)[:, None] * _top(w, path.family)[None, :]
            fits &= top <= 2.0**path.fraction_bits * unit
        fits &= (unit >= 2.0 ** (path.output.min_exponent + (0 if path.flush else 1 - path.output_bits))) | np.isinf(unit)
        fits &= magnitude < 2.0**path.output.bias if path.output.exponent_bits else True
    return np.asarray(fits & finite)


def _dot_bound(a: Operand, w: Operand, contraction: Contraction, previous: Interval | None) -> Interval:
    """Interval of one segment's accumulator, its output format included."""
    if previous is None:
        return _accumulated(a, w, contraction, None)
    if contraction.datapath.family is Family.INTEGER:
        raise ValueError(f"{contraction.datapath}: an integer accumulator starts from zero; declare Start.ZERO")
    found = _unbounded(_accumulated(a, w, contraction, previous), _open(previous))
    return found.masks(previous)


def _accumulated(a: Operand, w: Operand, contraction: Contraction, previous: Interval | None) -> Interval:
    path = contraction.datapath
    prefix = None if previous is None else _prefix(previous)
    if path.family is Family.INTEGER:
        return _widen(dot.agnostic_bound(a, w, path))
    for operand in (a, w):
        dot.check_read(operand, path)
    exact = exact_by_width(a, w, path, previous)
    if exact.all():
        found = dot.dot_exact(dot.values(a), dot.values(w))
        return Interval.point(found.value + (0.0 if prefix is None else prefix.value))
    if contraction.order is Order.ASCENDING:
        found = dot.bound(a, w, path, prefix)
    else:
        found = dot.agnostic_bound(a, w, path)
        if prefix is not None:
            extra = (a.codes.shape[1] + 2) * 4 * 2.0 ** (1 - path.output_bits) * (np.abs(prefix.value) + prefix.radius)
            total = sum_odd(found.value, prefix.value)
            slack = np.where(np.isfinite(total), np.spacing(np.abs(total)), 0.0)
            radius = found.radius + prefix.radius + np.where(np.isfinite(extra), extra, 0.0) + slack
            size = np.abs(_finite(dot.values(a))) @ np.abs(_finite(dot.values(w))).T + np.abs(_finite(prefix.value)) + radius
            radius = np.where(size < float(path.output.max_finite), radius, np.inf)
            found = Enclosure(total, np.where(np.isfinite(total), radius, 0.0))
    return _widen(Enclosure(found.value, np.where(exact, 0.0, found.radius)))


def _dot_emulated(a: Operand, w: Operand, contraction: Contraction, previous: Interval | None) -> Interval:
    path = contraction.datapath
    start = None if previous is None else np.where(previous.nan, np.nan, previous.lo)
    return Interval.point(decode(dot.emulate(a, w, path, start), path.output))


def _converted(operand: Operand, fmt: Format) -> Codes:
    return encode(dot.values(operand), fmt, Rounding.RNE, Overflow.SPECIAL)


def _ordered(operand: Operand, k_order: tuple[int, ...]) -> Operand:
    """The operand with its columns in the order in which a datapath takes them."""
    period = len(k_order)
    if operand.scales is not None and operand.group % period:
        raise ValueError(f"an order of each {period} of K in blocks of {operand.group} that share a scale; dequantise first")
    columns = np.arange(operand.codes.shape[1]).reshape(-1, period)[:, np.array(k_order)].reshape(-1)
    return Operand(operand.codes[:, columns], operand.format, operand.scales, operand.scale_format, operand.group)


def _rows(operand: Operand, rows: slice) -> Operand:
    scales = None if operand.scales is None else operand.scales[rows]
    return Operand(operand.codes[rows], operand.format, scales, operand.scale_format, operand.group)


def _within(contraction: Contraction, environment: Environment, rows: slice, columns: slice) -> Environment:
    """What a contraction reads, for one rectangle of D."""
    places: dict[str, tuple[slice, ...]] = {"m": (rows,), "n": (columns,), "mn": (rows, columns), "": ()}
    found: dict[str, Operand | Factor] = {}
    for name, item in environment.items():
        if isinstance(item, Factor):
            values = item.values[places[item.axis]] if item.axis else item.values
            found[name] = Factor(values, item.axis, item.grouped)
    for name, part in zip(contraction.operands, (rows, columns), strict=True):
        operand = environment[name]
        assert isinstance(operand, Operand)
        found[name] = _rows(operand, part)
    return found


def _contract(contraction: Contraction, environment: Environment, previous: Interval | None, emulated: bool) -> Interval:
    a, w = (environment[name] for name in contraction.operands)
    assert isinstance(a, Operand)
    assert isinstance(w, Operand)
    if contraction.start is Start.ZERO:
        previous = None
    shape, k = (a.codes.shape[0], w.codes.shape[0]), a.codes.shape[1]
    if wrong := misfit(contraction, *shape, k):
        raise ValueError(f"{contraction.operands}: got {wrong}")
    if contraction.conversion is not None:
        a, w = (Operand(_converted(x, contraction.conversion), contraction.conversion) for x in (a, w))
    if contraction.k_order:
        a, w = (_ordered(x, contraction.k_order) for x in (a, w))
    evaluate = _dot_emulated if emulated else _dot_bound

    def chain(here: tuple[slice, slice], piece: slice, before: Interval | None) -> Interval:
        return evaluate(_part(_rows(a, here[0]), piece), _part(_rows(w, here[1]), piece), contraction, before)

    @cache
    def segment(start: int, stop: int) -> Interval:
        """Of all of D: it is the same wherever K is cut."""
        return chain(everywhere, slice(start, stop), None)

    def in_segments(here: tuple[slice, slice], piece: slice, before: Interval | None) -> Interval:
        return segment(piece.start, piece.stop).at(here)

    everywhere = (slice(None), slice(None))
    if not contraction.cuts:
        return _parts(contraction, environment, partial(chain, everywhere), shape, k, previous, emulated)
    local_chain = in_segments if contraction.segment else chain
    lo, hi = np.zeros(shape), np.zeros(shape)
    nan, maybe_nan = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    points = True
    for cut in contraction.cuts:
        rows, columns = here = (slice(*cut.rows), slice(*cut.columns))
        local = _within(contraction, environment, rows, columns)
        before = None if previous is None else previous.at(here)
        size = (cut.rows[1] - cut.rows[0], cut.columns[1] - cut.columns[0])
        found = _parts(contraction, local, partial(local_chain, here), size, k, before, emulated, cut.ends)
        lo[here], hi[here], nan[here], maybe_nan[here] = found.lo, found.hi, found.nan, found.maybe_nan
        points &= found.hi is found.lo
    return Interval(lo, lo if points else hi, nan, maybe_nan)


Chain = Callable[[slice, Interval | None], Interval]
"""(some of K, what the accumulator holds before) -> the accumulator behind them [M, N]."""


def _parts(contraction: Contraction, environment: Environment, chain: Chain, shape: tuple[int, int], k: int,
           previous: Interval | None, emulated: bool, ends: tuple[int, ...] = ()) -> Interval:
    """The contraction where K is cut alike for all of D, [M, N] of `shape`: into parts that end at `ends`, or into `splits`."""
    plain = not contraction.segment and contraction.splits == 1 and len(ends) < 2
    if plain and k:
        return chain(slice(0, k), previous)
    partials: list[Interval] = []
    for pieces in segments(contraction, k, ends):
        total: Interval | None = None
        for piece in pieces:
            value, _ = _steps(
                chain(piece, None), contraction.steps, environment, contraction.datapath.output_bits,
                piece.start // contraction.segment if contraction.segment else 0,
                total, (contraction.running, contraction.running_rounding),
            )
            if total is None and contraction.segment:
                value = _round(value, contraction.running, contraction.running_rounding)
            total = value
        assert total is not None
        partials.append(total)
    if previous is not None:
        partials.insert(0, previous)
    if not partials:
        return Interval.point(np.zeros(shape))
    result = partials[0]
    for other in partials[1:]:
        result = _round(_sum(result, other), contraction.reduction, Rounding.RNE)
    unordered = contraction.reduction_order is Order.UNKNOWN or contraction.order is Order.UNKNOWN
    if unordered and not emulated and (len(partials) > 2 or contraction.segment):
        result = _any_order(result, contraction, environment, k, len(partials), previous)
    return result


def _any_order(result: Interval, contraction: Contraction, environment: Environment, k: int, count: int,
               previous: Interval | None) -> Interval:
    """Widen a sum of segments and splits so that it holds for every order of additions: terms * u * sum of magnitudes. Where
    every term is a multiple of one unit and their sum fits the format, no order rounds and nothing is widened. Where some order
    may overflow, everything is admitted."""
    left, right = _sides(contraction, environment)
    magnitude = np.abs(dot.dot_exact(np.abs(left), np.abs(right)).value)
    terms = count + (-(-k // contraction.segment) if contraction.segment else 0)
    formats = (contraction.running, contraction.reduction)
    bits = min(fmt.precision for fmt in (*formats, *(step.format for step in contraction.steps)))
    least = max(2.0 ** (fmt.min_exponent + 1 - fmt.precision) for fmt in formats)
    largest = min(float(fmt.max_finite) for fmt in formats)
    with np.errstate(invalid="ignore", over="ignore"):
        lowest = np.min(low_bit(np.nan_to_num(left)), axis=1, initial=np.inf)[:, None]
        unit = lowest * np.min(low_bit(np.nan_to_num(right)), axis=1, initial=np.inf)[None, :]
        if previous is not None:
            magnitude = magnitude + np.maximum(np.abs(previous.lo), np.abs(previous.hi))
            unit = np.where(previous.lo == previous.hi, np.minimum(unit, low_bit(_finite(previous.lo))), 0.0)
        rounds = ~((magnitude * (1.0 + 2.0**-40) < 2.0**bits * unit) & (unit >= least))
        radius = np.where(rounds & np.isfinite(magnitude), 2.0 * terms * (2.0 ** (1 - bits) * magnitude + least), 0.0)
        overflow = np.isfinite(magnitude) & (magnitude + radius > largest)
    return _unbounded(Interval(result.lo - radius, result.hi + radius, result.nan, result.maybe_nan), overflow)


def _run(declaration: Declaration, environment: Environment, emulated: bool) -> Interval:
    value: Interval | None = None
    bits = F64.precision
    pending: list[Step] = []
    for item in (*declaration.program, None):
        if isinstance(item, Step):
            pending.append(item)
            continue
        if pending:
            assert value is not None
            value, bits = _steps(value, tuple(pending), environment, bits)
            pending.clear()
        if item is None:
            break
        if emulated and not determined(item):
            raise ValueError(f"{item.operands}: the bits of a sum in unknown order on {item.datapath} are not determined")
        result = _contract(item, environment, value, emulated)
        if value is None or item.start is Start.PREVIOUS:
            last = item.running.precision if item.segment else item.datapath.output_bits
            value, bits = result, max(last, item.reduction.precision)
        else:
            value, bits = _round(_sum(value, result), item.reduction, Rounding.RNE), item.reduction.precision
    assert value is not None
    return value


class ProgramError(ValueError):
    """A declared program that has no value on these operands: the datapath does not take them, or the record makes no sense."""


def emulate(declaration: Declaration, environment: Environment) -> Interval:
    """The exact output values of the declared program, as a point interval [M, N]. Raises ProgramError."""
    return _evaluated(declaration, environment, emulated=True)


def bound(declaration: Declaration, environment: Environment) -> Interval:
    """An interval per output element [M, N] that holds whatever a kernel of this declaration may produce. Raises ProgramError."""
    return _evaluated(declaration, environment, emulated=False)


def _evaluated(declaration: Declaration, environment: Environment, emulated: bool) -> Interval:
    try:
        return _run(declaration, environment, emulated)
    except (ValueError, ArithmeticError, LookupError) as error:
        raise ProgramError(str(error) or type(error).__name__) from error


def _sides(contraction: Contraction, environment: Environment) -> list[Reals]:
    """Values of both operands [rows, K], the group scales that belong to them multiplied in."""
    sides = []
    for name, axis in zip(contraction.operands, "mn", strict=True):
        operand = environment[name]
        assert isinstance(operand, Operand)
        values = dot.values(operand)
        for step in contraction.steps:
            for factor_name in step.operands if step.kind is StepKind.MUL else ():
                factor = environment[factor_name]
                assert isinstance(factor, Factor)
                if factor.axis == axis:
                    values = values * np.repeat(factor.values, contraction.segment, axis=-1)[:, : values.shape[1]]
        sides.append(values)
    return sides


def _ideal_dot(contraction: Contraction, environment: Environment) -> Reals:
    """The contraction over the reals, group scales included, in float64 (relative error below K * 2^-52)."""
    left, right = _sides(contraction, environment)
    return dot.dot_exact(left, right).value


def ideal(declaration: Declaration, environment: Environment) -> Reals:
    """The declared program over the reals [M, N], before the last cast: no intermediate rounding, float64 throughout."""
    value: Reals | None = None
    with np.errstate(invalid="ignore", over="ignore"):
        for item in declaration.program:
            if isinstance(item, Contraction):
                found = _ideal_dot(item, environment)
                value = found if value is None else value + found
            elif item.kind is not StepKind.CAST:
                assert value is not None
                for name in item.operands:
                    factor = environment[name]
                    assert isinstance(factor, Factor)
                    value = value * factor.at() if item.kind is StepKind.MUL else value + factor.at()
    assert value is not None
    return value
