"""Bounds on |emulated - exact| of a datapath.

Decides: `running_bound` (order of k known, step by step along the chain) and `agnostic_bound` (order unknown, K cut into at most
`splits` sums), each with the exact result that it is about.
Refuses: datapaths that align other than by truncation of un-normalised products, and sums that may clamp in an unknown order.

In a running bound x is the exact prefix sum and b a bound on |c - x|, c the accumulator. Every quantity is an upper bound,
computed outward (`outward` per step covers the float64 roundings of the bound itself).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .datapaths import Datapath, Family
from .dot_emulation import Lanes, check_pair, dot_emulated, read
from .dot_sums import Enclosure, Operand, dot_exact, low_bit, outward, two_sum, values
from .formats import INT32, Reals, decode
from .rounding import Rounding

__all__ = ["Weights", "agnostic_bound", "enclose", "half_steps", "pow2", "prepare", "rounding_loss", "running_bound", "weights"]


def pow2(x: Reals) -> Reals:
    """2^floor(log2 x) of x >= 0; 0 for zero and float64 subnormals, infinity for infinity."""
    return (np.ascontiguousarray(x).view(np.int64) & 0x7FF0000000000000).view(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Per element of an operand [rows, K]: value (0 where not finite), the power of two that aligns it (0 for a zero), the
    weight of its lowest set bit (infinity for a zero)."""

    value: Reals
    top: Reals
    low: Reals


def weights(lanes: Lanes) -> Weights:
    value = np.where(np.isfinite(lanes.value), lanes.value, 0.0)
    return Weights(value, np.where(value == 0, 0.0, np.ldexp(1.0, lanes.exponent)), low_bit(value))


def half_steps(path: Datapath) -> float:
    """Share of the last kept bit that a rounding of the result can lose: half of it to nearest, else all."""
    return 0.5 if path.output_rounding is Rounding.RNE else 1.0


def rounding_loss(x: Reals, before: Reals, slack: Reals, path: Datapath, bits: int, share: float) -> Reals:
    """Loss when |x| +- `before` is rounded to `bits` significant bits of the output format: `share` of the unit of the
    largest result, 0 where the value is exactly x (nothing lost before, prefix certified: slack 0) and x needs no rounding,
    infinity where it may overflow."""
    reach = np.abs(x) + before + slack
    unit = np.maximum(pow2(reach), 2.0**path.output.min_exponent) * 2.0 ** (1 - bits)
    exact = (before == 0) & (slack == 0) & (np.rint(x / unit) * unit == x)
    overflow = reach > float(path.output.max_finite)
    return np.where(overflow, np.inf, np.where(exact, 0.0, share * unit))


def prepare(
    a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None
) -> tuple[Weights, Weights, Enclosure, Enclosure, Reals]:
    """Weights of both sides, the prefix, the exact result (prefix included) and the float64 slack of prefix sums.

    Slack is 0 where every partial sum is exact in float64 (the certificate of `dot_exact`, prefix included).
    """
    if path.alignment_rounding is not Rounding.RZ or path.normalised:
        raise ValueError(f"{path.name}: got alignment other than truncation of un-normalised products; bounds cover only that")
    m, n, k = check_pair(a, w, None, path)
    zeros = np.zeros((m, n))
    before = Enclosure(zeros, zeros) if prefix is None else prefix
    if before.value.shape != (m, n) or before.radius.shape != (m, n):
        raise ValueError(f"{path.name}: got a prefix of shape {before.value.shape}, expected {(m, n)}")
    read_a, read_w = read(a, path), read(w, path)
    left, right = weights(read_a), weights(read_w)
    given_a, given_w = _given(a, read_a), _given(w, read_w)
    dot = dot_exact(given_a, given_w)
    with np.errstate(invalid="ignore", over="ignore"):
        total, error = two_sum(before.value, dot.value)
        error = np.where(np.isfinite(total), np.abs(error), 0.0)
        exact = Enclosure(total, (error + dot.radius + _reading_loss(given_a, given_w, left, right, path)) * outward)
        initial = np.where(np.isfinite(before.value), before.value, 0.0)
        size = (np.abs(left.value) @ np.abs(right.value).T + np.abs(initial)) * (1.0 + 2.0**-20)
        low = np.minimum(
            np.min(left.low, axis=1, initial=np.inf)[:, None] * np.min(right.low, axis=1, initial=np.inf)[None, :],
            low_bit(initial),
        )
        slack = np.where(size < 2.0**53 * low, 0.0, (k + 4) * 2.0**-52 * size)
    return left, right, Enclosure(initial, before.radius), exact, slack


def _given(op: Operand, lanes: Lanes) -> Reals:
    """Values of an operand as given; special ones as the unit reads them (tf32 takes some NaN for infinities)."""
    value = values(op)
    return np.where(np.isfinite(value), value, lanes.value[:, : value.shape[1]])


def _reading_loss(a: Reals, w: Reals, left: Weights, right: Weights, path: Datapath) -> Reals | float:
    """Bound on sum |a w - a' w'| where the unit reads a', w': operands cut to `operand_bits`, or flushed."""
    if not (path.operand_bits or path.flush):
        return 0.0
    k = a.shape[1]
    a, w = (np.where(np.isfinite(x), x, 0.0) for x in (a, w))
    first = dot_exact(np.abs(a - left.value[:, :k]), np.abs(w))
    second = dot_exact(np.abs(left.value[:, :k]), np.abs(w - right.value[:, :k]))
    return (first.value + first.radius + second.value + second.radius) * outward


def running_bound(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None = None) -> Enclosure:
    """Exact result [M, N] and a bound on |emulated - exact| for `path` in ascending k: value = prefix.value + sum_k a w of the
    operands as given, and the result of `dot_emulated` lies in [value - radius, value + radius]. What the unit drops when it
    reads an operand (tf32, flushed subnormals) counts as its error.

    `prefix` is what the accumulator stands for at the start: its exact value, and how far the accumulator may be from it.
    A radius of 0 says that the emulated result is exact. Infinite where the result may overflow. INTEGER: the value is the
    result itself, wrapped or clamped, and the prefix must be exact. Elements with special operands have the special value.
    Raises ValueError where `dot_emulated` does, and for records that align other than by truncation.
    """
    if path.family is Family.INTEGER:
        return _integer_bound(a, w, path, prefix)
    left, right, before, exact, slack = prepare(a, w, path, prefix)
    k = left.value.shape[1]
    step = {Family.EMULATED_PAIRS: path.instruction_k, Family.IEEE: 1}.get(path.family, path.products)
    m, n = exact.value.shape
    radius = np.empty((m, n))
    rows = max(1, (1 << 14) // max(1, n))
    with np.errstate(invalid="ignore", over="ignore"):
        for top in range(0, m, rows):
            part = slice(top, top + rows)
            x, b = before.value[part], before.radius[part].copy()
            block = Weights(left.value[part], left.top[part], left.low[part])
            for first in range(0, k, step):
                x, b = _STEPS[path.family](_Node(block, right, range(first, first + step)), x, b, slack[part], path)
            radius[part] = b
    return enclose(exact, radius)


def enclose(exact: Enclosure, radius: Reals) -> Enclosure:
    """Add the uncertainty of the exact value; a special value is meant exactly unless the accumulator may overflow."""
    total = np.where(np.isfinite(exact.value), (radius + exact.radius) * outward, np.where(np.isinf(radius), np.inf, 0.0))
    return Enclosure(exact.value, np.where(total > 0, total, 0.0))


def _integer_bound(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None) -> Enclosure:
    if prefix is not None and prefix.radius.any():
        raise ValueError(f"{path.name}: got a prefix with a radius, expected exact integers")
    codes = dot_emulated(a, w, path, None if prefix is None else prefix.value)
    value = decode(codes, INT32)
    return Enclosure(value, np.zeros_like(value))


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """The products of one node between a block of rows and all columns."""

    a: Weights
    w: Weights
    index: Sequence[int]

    def product(self, k: int) -> Reals:
        return self.a.value[:, k, None] * self.w.value[None, :, k]

    def top(self) -> Reals:
        """Largest aligning power of two of a nonzero product; 0 where there is none."""
        largest = np.zeros((self.a.top.shape[0], self.w.top.shape[0]))
        for k in self.index:
            np.maximum(largest, self.a.top[:, k, None] * self.w.top[None, :, k], out=largest)
        return largest

    def low(self, k: int) -> Reals:
        return self.a.low[:, k, None] * self.w.low[None, :, k]

    def take(self, keep: Callable[[int], bool]) -> _Node:
        return _Node(self.a, self.w, [k for i, k in enumerate(self.index) if keep(i)])

    def runs(self, length: int) -> Iterator[Sequence[int]]:
        for i in range(0, len(self.index), length):
            yield self.index[i : i + length]


def _aligned_top(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    """Upper bound of |c| and of the power of two that the node aligns to."""
    reach = np.abs(x) + b + slack
    own = np.where(reach > 0, np.maximum(pow2(reach), 2.0**path.output.min_exponent), 0.0)
    return reach, np.maximum(np.maximum(node.top(), own), 2.0**path.zero_exponent)


def _step_fused(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    """A term is cut only where its lowest bit is below 2^(E - F), and then loses less than that and than itself."""
    reach, top = _aligned_top(node, x, b, slack, path)
    unit = top * 2.0**-path.fraction_bits
    kept = (b == 0) & (slack == 0) & (np.rint(x / unit) * unit == x)
    before = b + np.where(kept, 0.0, np.minimum(unit, reach))
    for run in node.runs(path.group if path.family is Family.GROUPED else 1):
        p, low = node.product(run[0]), node.low(run[0])
        for k in run[1:]:
            p = p + node.product(k)
            low = np.minimum(low, node.low(k))
        before = before + np.where(low < unit, np.minimum(np.abs(p), unit), 0.0)
        x = x + p
    loss = rounding_loss(x, before, slack, path, path.output_bits, half_steps(path))
    return x, (before + loss) * outward


def _step_pairs(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    t, t_bound = np.zeros_like(x), np.zeros_like(x)
    for parity in (0, 1):
        side = node.take(lambda i, parity=parity: i // path.group % 2 == parity)  # type: ignore[misc]
        for run in side.runs(path.products):
            t, t_bound = _step_fused(_Node(node.a, node.w, run), t, t_bound, slack, path)
    x, before = x + t, b + t_bound
    return x, (before + rounding_loss(x, before, slack, path, path.output.precision, 0.5)) * outward


def _step_ieee(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    p, none = node.product(node.index[0]), np.zeros_like(x)
    before = b if path.fused else b + rounding_loss(p, none, none, path, path.output_bits, half_steps(path))
    x = x + p
    return x, (before + rounding_loss(x, before, slack, path, path.output_bits, half_steps(path))) * outward


def _step_exact(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    for k in node.index:
        x = x + node.product(k)
    return x, (b + rounding_loss(x, b, slack, path, path.output_bits, 0.5)) * outward


def _flushing_loss(x: Reals, before: Reals, slack: Reals, path: Datapath) -> Reals:
    """A rounding that also flushes: results below the smallest normal become zero."""
    smallest = 2.0**path.output.min_exponent
    safe = (before == 0) & (slack == 0) & ((x == 0) | (np.abs(x) >= smallest)) | (np.abs(x) > 2 * (before + slack) + 2 * smallest)
    return rounding_loss(x, before, slack, path, path.output_bits, 0.5) + np.where(safe, 0.0, smallest)


def _step_tree(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    none = np.zeros_like(x)
    level = []
    for k in node.index:
        p = node.product(k)
        level.append((p, _flushing_loss(p, none, none, path)))
    while len(level) > 1:
        sums = [(p + q, e + f) for (p, e), (q, f) in zip(level[::2], level[1::2], strict=True)]
        level = [(s, (e + _flushing_loss(s, e, slack, path)) * outward) for s, e in sums]
    s, error = level[0]
    reach = np.abs(x) + b + slack
    smallest = 2.0**path.output.min_exponent
    flushed_c = np.where((reach == 0) | (np.abs(x) - b - slack >= smallest), 0.0, smallest)
    x, before = x + s, b + error + flushed_c
    return x, (before + _flushing_loss(x, before, slack, path)) * outward


def _step_truncated(node: _Node, x: Reals, b: Reals, slack: Reals, path: Datapath) -> tuple[Reals, Reals]:
    """Cuts of the products, floors of the sums to the common exponent, floor of c, floor of the sum, rounding."""
    reach = np.abs(x) + b + slack
    pairs = path.family is Family.TRUNCATED_PAIRS
    sides = [node.take(lambda i, s=s: i // path.group % 2 == s) for s in (0, 1)] if pairs else [node]  # type: ignore[misc]
    tops = [side.top() for side in sides]
    dot_top = np.maximum(tops[0], tops[-1])
    top = np.maximum(dot_top, np.maximum(pow2(reach), 2.0**path.output.min_exponent))
    unit = top * 2.0**-path.fraction_bits
    kept = (b == 0) & (slack == 0) & (np.rint(x / unit) * unit == x)
    before = b + np.where(kept, 0.0, unit)
    for side, own in zip(sides, tops, strict=True):
        own_unit = own * 2.0**-path.fraction_bits
        lowest = np.full_like(x, np.inf)
        for k in side.index:
            p, low = node.product(k), node.low(k)
            before = before + np.where(low < own_unit, np.minimum(np.abs(p), own_unit), 0.0)
            before = before + np.where(np.abs(p) >= 2.0 ** (path.output.bias + 1), np.inf, 0.0)
            lowest = np.minimum(lowest, low)
            x = x + p
        lowest = np.maximum(lowest, own_unit)
        joint = dot_top * 2.0**-path.fraction_bits
        before = before + np.where((lowest < joint) & pairs, joint, 0.0)
        carry = top * 2.0 ** (-path.carry_bits - 1)
        before = before + np.where(np.where(pairs, np.maximum(lowest, joint), lowest) < carry, carry, 0.0)
    before = before + rounding_loss(x, before, slack, path, path.carry_bits + 1, 1.0)
    return x, (before + rounding_loss(x, before, slack, path, path.output_bits, 0.5)) * outward


_STEPS: dict[Family, Callable[[_Node, Reals, Reals, Reals, Datapath], tuple[Reals, Reals]]] = {
    Family.FUSED: _step_fused, Family.GROUPED: _step_fused, Family.BLOCK_SCALED_FUSED: _step_fused,
    Family.EMULATED_PAIRS: _step_pairs, Family.IEEE: _step_ieee, Family.EXACT_SUM: _step_exact,
    Family.PAIR_TREE: _step_tree, Family.TRUNCATED_SUM: _step_truncated, Family.TRUNCATED_PAIRS: _step_truncated,
}


def agnostic_bound(a: Operand, w: Operand, path: Datapath, splits: int = 1) -> Enclosure:
    """Exact sum and a bound on |emulated - exact| whatever the order of k, K cut into at most `splits` sums that are then
    added in the output format, in any order.

    With S = sum |a| |w| and the largest aligned power of two M, no accumulator exceeds top = max(S, M, smallest normal) times
    the growth of its roundings, so each of J nodes loses at most a fixed share of that. IEEE: n u / (1 - n u) S, n = K,
    plus an underflow term (Higham, Accuracy and Stability, 3.1). INTEGER as `running_bound`, clamping excluded.
    Raises ValueError as `running_bound`, for splits < 1, and for INTEGER sums that may clamp on the way.
    """
    if splits < 1:
        raise ValueError(f"{path.name}: got splits {splits}, expected at least 1")
    if path.family is Family.INTEGER:
        return _integer_agnostic(a, w, path)
    left, right, _, exact, _ = prepare(a, w, path, None)
    k = a.codes.shape[1]
    reach = dot_exact(np.abs(left.value), np.abs(right.value))
    size = (reach.value + reach.radius) * outward
    share, node_count = _node_share(path), -(-k // path.products) + splits - 1
    unit = half_steps(path) * 2.0 ** (1 - path.output_bits)
    joins = (splits - 1) * 2.0**-path.output.precision
    smallest = 2.0**path.output.min_exponent
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if path.family is Family.IEEE:
            spent = (k + splits) * unit
            radius = np.full_like(size, np.inf)
            if spent < 1:
                radius = (spent * size + (k + splits) * 2 * unit * smallest) / (1.0 - spent)
            grown = size + radius
        else:
            if path.family is Family.EMULATED_PAIRS:
                node_count = 2 * (-(-k // path.instruction_k) + splits - 1)
                joins += node_count * 2.0**-path.output.precision
            if path.family is Family.PAIR_TREE:
                node_count, share = k + splits, unit
            largest = np.maximum(_largest_top(left, right), smallest)
            grown = np.maximum(size, largest) * np.exp(node_count * share + joins) * (1.0 + 2.0**-20)
            radius = (node_count * share + joins) * grown
            if path.flush:
                radius = radius + 2 * (k + splits) * smallest
        radius = np.where(grown > float(path.output.max_finite), np.inf, radius * (1.0 + 2.0**-20))
    return enclose(exact, radius)


def _node_share(path: Datapath) -> float:
    """Largest loss of one node, relative to the largest power of two or value it meets."""
    unit = half_steps(path) * 2.0 ** (1 - path.output_bits)
    terms = path.products // path.group if path.family is Family.GROUPED else path.products
    if path.family is Family.EXACT_SUM:
        return unit
    if path.family in (Family.TRUNCATED_SUM, Family.TRUNCATED_PAIRS):
        return (terms + 3) * 2.0**-path.fraction_bits + 2.0 ** (2 - path.carry_bits) + unit
    return (terms + 1) * 2.0**-path.fraction_bits + unit


def _largest_top(a: Weights, w: Weights) -> Reals:
    largest = np.zeros((a.top.shape[0], w.top.shape[0]))
    for k in range(a.top.shape[1]):
        np.maximum(largest, a.top[:, k, None] * w.top[None, :, k], out=largest)
    return largest


def _integer_agnostic(a: Operand, w: Operand, path: Datapath) -> Enclosure:
    left, right = read(a, path).value, read(w, path).value
    if path.saturate and (np.abs(left) @ np.abs(right).T >= 2.0**31).any():
        raise ValueError(
            f"{path.name}: got sums that may clamp in some order, expected sum |a| |w| below 2^31; declare the order of k"
        )
    return _integer_bound(a, w, path, None)
