"""What the passing cases of a report would have shown: fault classes per op and variant, and the lane that shows each.

Decides: whether the cases of a variant show every fault class that they were searched for (clause PWR-2), and what is said of a
class that the intervals of the declared arithmetic are too wide to show (clause PWR-3).
Refuses: power shown by a verdict that does not pass, by another variant of the op, or, where no bounded case shows a class, by
anything but a case that is judged to a point.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from .verdict import PASSING, Status, Verdict

__all__ = ["blind", "power_of", "supplied", "too_wide"]

_WIDE = frozenset({"bounded", "tensors"})
"""Lanes whose admissible sets are as wide as the declared arithmetic."""
_REJECT = "reject"

Shown = Mapping[str, Mapping[str, int]]
"""op/variant -> fault class -> passing verdicts that would have shown it."""


def _product_of(verdict: Verdict) -> str:
    """Op and variant of a verdict's case."""
    return "/".join(verdict.case.split("/", 2)[:2])


def power_of(verdicts: Iterable[Verdict]) -> dict[str, dict[str, int]]:
    """op/variant -> fault class -> passing verdicts that would have shown it; 0 where the class applies and none did."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.power:
            groups[_product_of(verdict)].append(verdict)
    return {
        product: {
            fault: sum(verdict.power.get(fault, False) for verdict in group if verdict.status in PASSING)
            for fault in sorted({fault for verdict in group for fault in verdict.power})
        }
        for product, group in sorted(groups.items())
    }


def too_wide(verdicts: Iterable[Verdict]) -> dict[str, dict[str, tuple[str, ...]]]:
    """op/variant -> fault class that its bounded cases were searched for and none that passes shows -> the lanes, sorted, in
    which a case judged to a point does. Variants and classes without such a gap are left out."""
    shown_wide: dict[tuple[str, str], bool] = {}
    points: dict[tuple[str, str], set[str]] = defaultdict(set)
    for verdict in verdicts:
        for fault, seen in verdict.power.items():
            key, shown = (_product_of(verdict), fault), seen and verdict.status in PASSING
            if verdict.lane in _WIDE:
                shown_wide[key] = shown_wide.get(key, False) or shown
            elif shown and verdict.status is Status.EXACT:
                points[key].add(verdict.lane)
    gaps: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for product, fault in sorted(key for key, shown in shown_wide.items() if not shown):
        gaps[product][fault] = tuple(sorted(points[product, fault]))
    return dict(gaps)


def _claimed(products: Iterable[str], ops: Collection[str]) -> list[str]:
    return sorted(product for product in set(products) if product.partition("/")[0] in ops)


def blind(verdicts: Sequence[Verdict], ops: Collection[str], power: Shown) -> list[str]:
    """Why level 2 is refused for want of power: a sentence per gap of each variant of the claimed `ops` that has a supported
    case. `power`: `power_of(verdicts)`."""
    reasons, wide = [], too_wide(verdicts)
    supported = (v for v in verdicts if v.status is not Status.UNSUPPORTED and v.lane != _REJECT)
    for product in _claimed(map(_product_of, supported), ops):
        shown = power.get(product, {})
        if product.startswith("gemm_") and not shown:
            reasons.append(f"{product}: the power of its cases was not measured")
        unseen = [fault for fault, count in shown.items() if not count]
        if unseen:
            reasons.append(f"{product}: no passing case would have shown {', '.join(unseen)}")
        alone = [fault for fault, lanes in wide.get(product, {}).items() if not lanes and fault not in unseen]
        if alone:
            reasons.append(f"{product}: declared arithmetic too wide: neither a bounded case nor one that is judged to a point "
                           f"would have shown {', '.join(alone)}")
    return reasons


def supplied(verdicts: Sequence[Verdict], ops: Collection[str]) -> list[str]:
    """What a granted level 2 says of the fault classes that no bounded case of a variant shows: which lanes do."""
    wide = too_wide(verdicts)
    return [
        f"{product}: declared arithmetic too wide: no bounded case would have shown "
        + "; ".join(f"{fault} (shown by {', '.join(lanes)})" for fault, lanes in wide[product].items())
        for product in _claimed(wide, ops)
    ]
