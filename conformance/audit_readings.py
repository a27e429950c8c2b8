"""What the probes of an accumulator show: its bits, its roundings, its nodes, its promotion, its splits and its order.

Decides: a fingerprint of one matrix product from the outputs of its probes alone; no declaration is looked at. Refuses: to say
more than the operands can show. Each number is exact, a bound, or not identifiable with the reason.

Terms: masks are products of +-2^E that cancel; the gap of a small product s is log2 of 2^E / |s|. F, `fraction_bits`, are the
bits kept below 2^E within a node, P, `output_bits`, the significand bits of a sum that is carried on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from .audit_probes import CUTS, Cut, Probed, cut_columns, held, triples
from .op import Op

__all__ = ["FIELDS", "LOSSLESS", "Fingerprint", "Reading", "fingerprint", "readings_of_cut", "segment_of_order"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One number or word of a fingerprint. `bound` says how it is meant; `why` is the reason of anything but an exact one."""

    value: int | str | None
    bound: Literal["exact", "at least", "at most", "none"] = "exact"
    why: str = ""

    @property
    def number(self) -> int | None:
        """The value, where it is a number."""
        return self.value if isinstance(self.value, int) else None

    def __str__(self) -> str:
        if self.value is None:
            return f"not identifiable: {self.why}"
        return str(self.value) if self.bound == "exact" else f"{self.bound} {self.value}"


def _unknown(why: str) -> Reading:
    return Reading(None, "none", why)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What was read of one matrix product. `chunk`: products per node. `segment`: k summed before promotion, 0 for never.
    `splits`: parts of K summed apart. `running_bits`: significand bits of the total that promoted or split sums are added to."""

    fraction_bits: Reading
    alignment_rounding: Reading
    normalised: Reading
    output_bits: Reading
    output_rounding: Reading
    chunk: Reading
    segment: Reading
    splits: Reading
    running_bits: Reading
    order: Reading


FIELDS = tuple(field.name for field in fields(Fingerprint))
"""Names of the readings, in their order."""

LOSSLESS = "nothing was lost in any probe: the accumulator is wider than the operands span"
"""Why a fingerprint has no nodes, parts and order."""

_SPAN = "the operands of a probe span only 2^{} there, and nothing was lost"
_ROUNDINGS = {(1.0, 1.0): "truncated", (1.0, 2.0): "floored", (2.0, 2.0): "nearest", (2.0, 1.0): "raised"}
"""(what is left of +1.5 units, of -1.5 units) in units of the last kept place -> rounding."""


# Cuts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Edge:
    """The smallest gap at which a bit of 1.5 * 2^(E - gap) is lost (None: none is), the largest below it at which none is, and
    the multiples of 2^(E - gap) that are left of it with either sign."""

    lost: int | None
    kept: int
    left: tuple[float, float] = (0.0, 0.0)

    @property
    def bits(self) -> int:
        """Bits below 2^E that are surely kept."""
        return self.kept + 1

    @property
    def exact(self) -> bool:
        """Whether the neighbouring gap was probed, too."""
        return self.lost == self.kept + 1


def _samples(op: Op, probe: Probed, cut: Cut) -> dict[tuple[int, float], float]:
    """(gap, sign) -> what is left of the small product, in multiples of 2^(E - gap): 1.5 where nothing is lost."""
    found: dict[tuple[int, float], float] = {}
    places = [*cut.masks, *cut.cancel, cut.small]
    columns = [i for i, (own, _) in enumerate(cut_columns(op, probe.case.problem)) if own is cut]
    for column in columns:
        products = probe.a[:, places] * probe.w[column, places]
        rest = np.abs(probe.a) @ np.abs(probe.w[column])
        for row in range(products.shape[0]):
            *masks, small = (float(x) for x in products[row])
            unit = abs(masks[0]) / (2.25 if cut.wide else 1.0)
            half = len(masks) // 2
            apart = any(abs(x) != abs(masks[0]) for x in masks) or sum(masks[:half]) != -sum(masks[half:])
            if not small or not unit or apart or rest[row] != sum(map(abs, masks)) + abs(small) or not held(small, probe.output):
                continue
            step = abs(small) / 1.5
            left = float(probe.d[row, column]) / step
            if math.isfinite(left) and math.frexp(step)[0] == 0.5:
                found[round(math.log2(unit / step)), math.copysign(1.0, small)] = left
    return found


def _edge(op: Op, probe: Probed, cut: Cut) -> _Edge | None:
    """Where bits begin to be lost; None where the arrangement has no room in these operands."""
    samples = _samples(op, probe, cut)
    gaps = sorted({gap for gap, sign in samples if sign > 0})
    if not gaps:
        return None
    lost = next((gap for gap in gaps if samples[gap, 1.0] != 1.5), None)
    kept = max((gap for gap in gaps if lost is None or gap < lost), default=gaps[0] - 1)
    if lost is None:
        return _Edge(None, kept)
    return _Edge(lost, kept, (samples[lost, 1.0], -samples.get((lost, -1.0), math.nan)))


@dataclass(frozen=True, slots=True)
class _Cuts:
    """The readings of one cut probe, and the largest number of bits at which anything was lost anywhere (None: nothing was)."""

    fraction_bits: Reading
    alignment_rounding: Reading
    normalised: Reading
    output_bits: Reading
    output_rounding: Reading
    far: _Edge | None
    widest: int | None


def _rounding(edge: _Edge | None, fallback: str) -> Reading:
    if edge is None or edge.lost is None:
        return _unknown(fallback)
    word = _ROUNDINGS.get(edge.left)
    return Reading(word) if word else _unknown(f"{edge.left[0]:g} and {edge.left[1]:g} units are left of +-1.5 units")


def _in_node(edges: dict[str, _Edge | None]) -> tuple[Reading, str]:
    """F, and the arrangement that shows it: the one in which most bits survive and some are lost."""
    exact = {name: edge for name in ("near", "near4", "group") if (edge := edges[name]) is not None and edge.exact}
    if exact:
        name = max(exact, key=lambda name: exact[name].bits)
        return Reading(exact[name].bits), name
    near = edges["near"]
    if near is None:
        return _unknown("these operands have no room for three neighbours of such different size"), ""
    return Reading(near.bits, "at least", _SPAN.format(near.kept)), ""


def readings_of_cut(op: Op, probe: Probed) -> _Cuts:
    """What one `audit_cut` case shows."""
    edges = {cut.name: _edge(op, probe, cut) for cut in CUTS}
    fraction, shown = _in_node(edges)
    nothing = "no bit was lost within a node"
    alignment = _rounding(edges[shown] if shown else None, nothing)
    normalised = _unknown(nothing)
    wide = edges[f"{shown}_wide"] if shown else None
    plain = edges[shown] if shown else None
    if wide is not None and plain is not None and wide.exact and plain.exact:
        normalised = Reading("yes" if wide.bits < plain.bits else "no")
    carries = [edge for name in ("carry", "carry17") if (edge := edges[name]) is not None]
    carried = next((edge for edge in carries if edge.exact), None)
    if carried is not None:
        bits = Reading(carried.bits + 3)
    elif carries:
        best = max(edge.bits for edge in carries)
        bits = Reading(best + 3, "at least", _SPAN.format(best))
    else:
        bits = _unknown("these operands have no room for four masks and a small product")
    found = [edge.bits for edge in edges.values() if edge is not None and edge.exact]
    return _Cuts(
        fraction, alignment, normalised, bits, _rounding(carried, "no bit of a carried sum was lost"), edges["far"],
        max(found, default=None),
    )


# Order ---------------------------------------------------------------------------------------------------------------

_State = bool | None
"""Whether a small product was lost against the masks; None where the operands cannot tell."""


@dataclass(frozen=True, slots=True)
class _Survey:
    """The outcome of one order case: (first mask, second mask) -> place -> lost or not."""

    k: int
    lost: dict[tuple[int, int], dict[int, _State]]

    def row(self, first: int, second: int) -> dict[int, _State]:
        """Places and their states, those that say something."""
        return {place: state for place, state in self.lost.get((first, second), {}).items() if state is not None}


def _survey(op: Op, probe: Probed, cuts: _Cuts) -> _Survey:
    """A survivor says that it did not meet the masks only where its gap is one at which something would have been lost: F next to
    the masks, the largest number of bits anywhere between parts of K."""
    k = probe.case.problem.dim("k")
    fraction = cuts.fraction_bits.number if cuts.fraction_bits.bound == "exact" else None
    gaps: dict[tuple[int, int, int], int] = {}
    lost: dict[tuple[int, int], dict[int, _State]] = {}
    for item in triples(op, probe):
        pair, key = (item.first, item.second), (item.first, item.second, item.place)
        if item.gap <= gaps.get(key, -1):
            continue
        gaps[key] = item.gap
        need = fraction if item.second <= 64 or item.first == k - 4 else cuts.widest
        absorbed = item.output != item.small
        told = absorbed or (need is not None and item.gap > need)
        lost.setdefault(pair, {})[item.place] = absorbed if told else None
    return _Survey(k, lost)


_NEAR = range(1, 66, 2)
_NO_SMALLER = "smaller products next to the masks cannot be made"


def _chunk(survey: _Survey) -> tuple[Reading, bool]:
    """(products per node, whether nodes are runs of neighbouring k). Masks at 0 and at each even j: what is lost with them
    changes only where a node begins."""
    rows = {j: survey.row(0, j) for j in range(2, 64, 2)}
    whole = all(set(_NEAR) <= set(row) for row in rows.values())
    lost = {j: frozenset(place for place in _NEAR if row.get(place)) for j, row in rows.items()}
    if not any(lost.values()):
        first = min((place for row in rows.values() for place in row if place > 2), default=None)
        if first is None or whole:
            return _unknown("no small product was lost next to a mask"), True
        return Reading(first - 1, "at most", _NO_SMALLER), True
    if not whole:
        known = rows[2]
        end = max((place for place in known if known[place]), default=0) + 1
        if end == 1 and known:
            return Reading(min(known) - 1, "at most", _NO_SMALLER), True
        if not known:
            return _unknown(_NO_SMALLER), True
        if not all(known[place] for place in known if place < end):
            return _unknown("what is lost next to the masks is no run of k"), False
        return (Reading(end) if any(place > end for place in known) else Reading(end, "at least")), True
    sets = sorted(set(lost.values()), key=len)
    runs = all(found == frozenset(range(1, 2 * len(found), 2)) for found in sets)
    if not all(a < b for a, b in pairwise(sets)):
        return _unknown("what is lost next to the masks does not grow with k"), False
    if len(sets[-1]) == len(_NEAR) and len(sets) == 1:
        return Reading(len(_NEAR) * 2, "at least", "the probes reach no further"), True
    steps = [len(b) - len(a) for a, b in pairwise(sets)] or [len(sets[0])]
    alone = all(found == frozenset(range(1, j, 2)) for j, found in lost.items()) and survey.row(1, 3).get(2) is True
    return Reading(1 if alone else 2 * min(steps)), runs


def _extent(row: dict[int, _State], k: int) -> int | None:
    """How far from the end of K on products are lost with masks at the end; None where nothing is or it is no run."""
    places = sorted(row, reverse=True)
    run: list[int] = []
    for place in places:
        if not row[place]:
            break
        run.append(place)
    if not run or any(row[place] for place in places[len(run) :]):
        return None
    return k if run[-1] <= 65 else k - run[-1] + 1


def _tails(short: _Survey, long: _Survey, chunk: Reading) -> tuple[int | None, int | None]:
    """Length of the part of K that ends at its end and is summed in one accumulator, for both lengths of K. Where both masks lie
    in one node that sums exactly nothing is lost; masks further apart then tell."""
    short_tail, long_tail = (_extent(survey.row(survey.k - 4, survey.k - 2), survey.k) for survey in (short, long))
    if short_tail is None and chunk.value is not None and chunk.bound == "exact":
        pairs = ((survey, survey.k // 16 * 15 - 2) for survey in (short, long))
        short_tail, long_tail = (_extent(survey.row(first, survey.k - 2), survey.k) for survey, first in pairs)
    return short_tail, long_tail


def _begins(survey: _Survey) -> dict[tuple[int, int], int] | None:
    """Pairs of neighbouring marks -> where that begins which is lost with them: the beginning of the part of K that holds both,
    or, where they lie in two parts, of all that those two are added to. None where what is lost is no run of k."""
    found: dict[tuple[int, int], int] = {}
    for first, second in survey.lost:
        row = {place: lost for place, lost in survey.row(first, second).items() if place < first}
        lost = [place for place in row if row[place]]
        if first < 62 or second - first != survey.k // 16 or not lost:
            continue
        if not all(row[place] for place in row if place > min(lost)):
            return None
        found[first, second] = 0 if min(lost) <= max(_NEAR) else min(lost) - 1
    return found


def _starts(survey: _Survey, segment: int) -> set[int] | None:
    """Where parts of K begin that are summed on their own. Pairs within one promoted segment say nothing of those."""
    begins = _begins(survey)
    if begins is None:
        return None
    return {start for (first, second), start in begins.items() if not segment or first // segment != second // segment}


def _period(short: _Survey, long: _Survey, tails: tuple[int | None, int | None]) -> int:
    """The length of segments that both lengths of K are cut into alike, the last one shorter; 0 where there is none."""
    edges: set[int] = set()
    for survey, tail in zip((short, long), tails, strict=True):
        edges |= (_starts(survey, 0) or set()) | ({survey.k - tail} if tail else set())
    common = math.gcd(*edges)
    longest = max(tail or 0 for tail in tails)
    for length in (n for n in range(max(1, longest), common + 1) if common % n == 0):
        fits = all(tail is None or tail in (survey.k % length, length) for survey, tail in zip((short, long), tails, strict=True))
        pairs = [(pair, start) for survey in (short, long) for pair, start in (_begins(survey) or {}).items()]
        if fits and all(start == a // length * length for (a, b), start in pairs if a // length == b // length):
            return length
    return 0


_NOT_A_RUN = "what is lost with masks at the end of K is no run of k"


def _splits(survey: _Survey, segment: int, tail: int | None) -> Reading:
    """How many parts of K are summed apart, `segment` being what is promoted within them (0: nothing)."""
    starts = _starts(survey, segment)
    if not starts:
        return _unknown(_NOT_A_RUN if starts is None else "nothing was lost between parts of K")
    if not segment and tail:
        starts.add(survey.k - tail)
        if len(starts) == 2 and survey.k % tail == 0:  # parts too short to hold two marks each
            return Reading(survey.k // tail)
    return Reading(len(starts))


def _parts(short: _Survey, long: _Survey, chunk: Reading) -> tuple[Reading, Reading]:
    """(segment, splits) from two lengths of K: segments stay as they are, splits grow with K."""
    tails = _tails(short, long, chunk)
    if tails[0] is None:
        kept = any(not lost for lost in short.row(short.k - 4, short.k - 2).values())
        why = _NOT_A_RUN if kept else "sums of neighbouring k lost nothing"
        return _unknown(why), _splits(long, _GROUP, None)
    if tails[0] == short.k and tails[1] != long.k:
        either = _unknown(f"either segments of {tails[1]} or splits of a K beyond {short.k}")
        return either, either
    period = _period(short, long, tails) if tails[0] < short.k else 0
    if period:
        return Reading(period), _splits(long, period, None)
    if tails[1] is not None and tails[1] * short.k == tails[0] * long.k:
        return Reading(0), _splits(long, 0, tails[1])
    return _unknown("the parts of K that are summed on their own follow no one length"), _splits(long, 0, tails[1])


_GROUP = 128
"""Largest group of k that shares a scale in a probe."""

_FAR = next(cut for cut in CUTS if cut.name == "far")
_TOO_FEW = "too few probes can be made far from the masks"
_AWAY = 256
"""Beyond every node, and beyond the parts of K that hold masks at 0 and 130, where parts are at most 128 long."""


def _direction(survey: _Survey, runs: bool) -> Reading:
    """Whether what comes late in K meets the sum of what comes early."""
    k = survey.k
    head, back = survey.row(0, 130), survey.row(k // 2 - 2, k - 2)
    between = [state for place, state in back.items() if place > k // 2]
    after = [state for place, state in head.items() if place > _AWAY]
    before = [state for place, state in back.items() if place < k // 2 - _AWAY // 2]
    if len(after) < 3 or len(before) < 3:
        return _unknown(_TOO_FEW)
    if not any(after) and any(before):
        return Reading("ascending" if runs else "ascending, nodes interleaved")
    if all(after) and not any(before) and between and all(between):
        return Reading("descending")
    return _unknown("nothing was lost between parts of K") if not any(after) and not any(before) else Reading("mixed")


def segment_of_order(op: Op, probe: Probed) -> int | None:
    """From one `audit_order` case: the length of the part at the end of K that is summed in one accumulator; None where it is no
    run of k."""
    lost: dict[int, _State] = {}
    k = probe.case.problem.dim("k")
    for item in triples(op, probe):
        if (item.first, item.second) == (k - 4, k - 2):
            lost[item.place] = lost.get(item.place, False) or item.output != item.small
    return _extent(lost, k)


def fingerprint(op: Op, probes: Iterable[Probed]) -> Fingerprint:
    """The fingerprint of one matrix product from the outputs of its battery (two order cases, one cut case)."""
    by_pattern: dict[str, list[Probed]] = {}
    for probe in probes:
        by_pattern.setdefault(probe.case.pattern, []).append(probe)
    (cut,), orders = by_pattern["audit_cut"], sorted(by_pattern["audit_order"], key=lambda p: p.case.problem.dim("k"))
    return _combined(readings_of_cut(op, cut), op, orders)


def _combined(cuts: _Cuts, op: Op, orders: Sequence[Probed]) -> Fingerprint:
    short, long = (_survey(op, probe, cuts) for probe in orders)
    if cuts.widest is None and not any(any(row.values()) for survey in (short, long) for row in survey.lost.values()):
        nothing = _unknown(LOSSLESS)
        return Fingerprint(
            cuts.fraction_bits, cuts.alignment_rounding, cuts.normalised, cuts.output_bits, cuts.output_rounding, nothing,
            nothing, nothing, nothing, nothing,
        )
    chunk, runs = _chunk(short)
    segment, splits = _parts(short, long, chunk)
    tail, far = _tails(short, long, chunk)[0], cuts.far
    fraction, bits, running = cuts.fraction_bits, cuts.output_bits, _unknown("sums are not promoted")
    if tail == short.k:
        if far is not None and far.exact:
            fraction, bits = _raised(fraction, far.bits), _raised(bits, far.bits + 1)
    elif not _three_parts(short, segment, tail) or (segment.value is None and (far is None or not far.exact)):
        running = _unknown("the probes do not lie in three parts of K whose sums are added one after the other")
    elif far is not None:
        running = Reading(far.bits + 1) if far.exact else Reading(far.bits + 1, "at least", _SPAN.format(far.kept))
    order = _direction(short, runs)
    if not str(order.value).startswith("ascending") and order.why != _TOO_FEW:
        fraction, bits = _unordered(fraction), _unordered(bits)
        if order.value == "descending":
            chunk = segment = splits = running = _unknown("the probes of nodes and parts take an order that ascends")
    return Fingerprint(
        fraction, cuts.alignment_rounding, cuts.normalised, bits, cuts.output_rounding, chunk, segment, splits, running, order,
    )


def _three_parts(survey: _Survey, segment: Reading, tail: int | None) -> bool:
    """Whether the places of the far probe lie in three parts of K, and, where parts are promoted, in one split."""
    if segment.value is None or segment.value:
        within = segment.number or _GROUP
        return within <= _GROUP and max(_starts(survey, within) or {0}) <= _FAR.masks[0]
    begins = sorted((_starts(survey, 0) or set()) | {survey.k - (tail or survey.k)})
    return len({sum(begin <= place for begin in begins) for place in (*_FAR.masks, _FAR.small, *_FAR.cancel)}) == 3


def _unordered(reading: Reading) -> Reading:
    """What is left of a number of bits where products may have met in another order than that of k, or never: a loss that was
    seen bounds it from above, a survivor says nothing."""
    if reading.bound == "exact":
        return replace(reading, bound="at most", why="the order of K does not ascend")
    return _unknown("the order of K does not ascend: what survived may have met nothing")


def _raised(reading: Reading, bits: int) -> Reading:
    """A lower bound raised by what a sum carried over K shows."""
    if reading.bound == "exact" or (reading.number or 0) >= bits:
        return reading
    return replace(reading, value=bits, bound="at least")
