"""The definition of every datapath: one node of a matrix unit, in Fractions.

Decides: `node_scalar`, the result of one instruction on finite operands, and `scalar_terms`, what the unit makes of the codes.
Refuses: special values (the array form decides them), chains of nodes, and arrays (see dot_emulation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from .datapaths import Datapath, Family
from .dot_sums import Operand
from .formats import Kind, Special, decode_scalar
from .rounding import Rounding

__all__ = ["Term", "node_scalar", "scalar_terms"]

Term = tuple[Fraction, int]
"""An operand as a node sees it: its value, block scale included, and the exponent that aligns it (not always floor log2:
subnormals keep their format's minimum, and the group sums of GROUPED are aligned by their scales alone)."""


def _log2(x: Fraction) -> int:
    """floor(log2 |x|), x != 0."""
    x = abs(x)
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if x >= Fraction(2) ** guess else guess - 1


def scalar_terms(op: Operand, row: int, path: Datapath) -> list[Term]:
    """One row of an operand as `path` reads it, from the codes: finite values and their alignment exponents, not padded."""
    lowest = path.operand_min_exponent or (op.format.min_exponent if op.format.kind is Kind.FLOAT else 0)
    terms = []
    for k, code in enumerate(op.codes[row].tolist()):
        if path.operand_bits:
            code -= code % (1 << (op.format.precision - path.operand_bits))
        x = decode_scalar(code, op.format)
        x = Fraction(0) if isinstance(x, Special) else x
        if path.flush and abs(x) < Fraction(2) ** op.format.min_exponent:
            x = Fraction(0)
        exponent = max(_log2(x), lowest) if x else lowest
        if op.scales is not None and op.scale_format is not None:
            scale = decode_scalar(int(op.scales[row, k // op.group]), op.scale_format)
            scale = Fraction(0) if isinstance(scale, Special) else scale
            own = max(_log2(scale), op.scale_format.min_exponent) if scale else op.scale_format.min_exponent
            x, exponent = x * scale, own if path.family is Family.GROUPED else exponent + own
        terms.append((x, exponent))
    return terms


_TO_INTEGER: dict[Rounding, Callable[[Fraction], int]] = {
    Rounding.RNE: round,
    Rounding.RZ: int,
    Rounding.FLOOR: lambda x: x.numerator // x.denominator,
}


def _cut(x: Fraction, unit: int, rounding: Rounding) -> Fraction:
    """x rounded to a multiple of 2^unit."""
    return _TO_INTEGER[rounding](x / Fraction(2) ** unit) * Fraction(2) ** unit


def _result(x: Fraction | Special, path: Datapath, bits: int = 0, rounding: Rounding | None = None) -> Fraction | Special:
    """x to `bits` significant bits of the output format (default: the path's own), above 2^(max + 1): infinity."""
    if isinstance(x, Special) or x == 0:
        return x
    out = path.output
    unit = max(_log2(x), out.min_exponent) - (bits or path.output_bits) + 1
    rounded = _cut(x, unit, path.output_rounding if rounding is None else rounding)
    if abs(rounded) >= Fraction(2) ** (out.bias + 1):
        if path.family is Family.IEEE and path.output_rounding is Rounding.RZ:
            return out.max_finite if x > 0 else -out.max_finite
        return Special.POS_INF if x > 0 else Special.NEG_INF
    return rounded


def node_scalar(a: Sequence[Term], b: Sequence[Term], c: Fraction, path: Datapath) -> Fraction | Special:
    """The definition of one node (one instruction for EMULATED_PAIRS) on finite operands and a finite c.

    len(a) = len(b) = `path.products` (`path.instruction_k` for EMULATED_PAIRS). The value of the result; zeros have no sign.
    Raises ValueError for INTEGER, whose definition is Python's integer sum.
    """
    terms = [(x * y, i + j) for (x, i), (y, j) in zip(a, b, strict=True)]
    if path.normalised and path.family is not Family.GROUPED:
        terms = [(p, _log2(p) if p else e) for p, e in terms]
    if path.family in (Family.FUSED, Family.BLOCK_SCALED_FUSED):
        return _result(_fused_sum(terms, c, path), path)
    if path.family is Family.GROUPED:
        runs = [terms[i : i + path.group] for i in range(0, len(terms), path.group)]
        sums = [(sum((p for p, _ in run), Fraction(0)), run[0][1]) for run in runs]
        live = [any(p != 0 for p, _ in run) for run in runs]
        return _result(_fused_sum(sums, c, path, live), path)
    if path.family is Family.EMULATED_PAIRS:
        t: Fraction | Special = Fraction(0)
        for parity in (0, 1):
            half = [term for k, term in enumerate(terms) if k // path.group % 2 == parity]
            for i in range(0, len(half), path.products):
                if isinstance(t, Special):
                    return t
                t = _result(_fused_sum(half[i : i + path.products], t, path), path)
        return t if isinstance(t, Special) else _result(t + c, path, path.output.precision, Rounding.RNE)
    products = [p for p, _ in terms]
    if path.family is Family.EXACT_SUM:
        return _result(sum(products, c), path)
    if path.family is Family.IEEE:
        p = products[0] if path.fused else _result(products[0], path)
        return p if isinstance(p, Special) else _result(p + c, path)
    if path.family is Family.PAIR_TREE:
        return _tree_scalar([*products], c, path)
    if path.family in (Family.TRUNCATED_SUM, Family.TRUNCATED_PAIRS):
        return _truncated_scalar(terms, c, path)
    raise ValueError(f"node_scalar: got {path.name} of family {path.family.name}, expected a floating-point family")


def _fused_sum(terms: Sequence[Term], c: Fraction, path: Datapath, live: Sequence[bool] | None = None) -> Fraction:
    """Align to the largest exponent E, cut below 2^(E - F), add."""
    own = (max(_log2(c), path.output.min_exponent) if c else path.zero_exponent)
    alive = [p != 0 for p, _ in terms] if live is None else live
    top = max([own] + [e if on else path.zero_exponent for (_, e), on in zip(terms, alive, strict=True)])
    unit = top - path.fraction_bits
    return sum((_cut(x, unit, path.alignment_rounding) for x in [c, *(p for p, _ in terms)]), Fraction(0))


def _tree_scalar(products: list[Fraction], c: Fraction, path: Datapath) -> Fraction | Special:
    """Pairwise tree; operands come flushed, every product and sum is flushed after its rounding."""
    level: list[Fraction] = []
    for x in [*products, c]:
        r = _flushed(x, path)
        if isinstance(r, Special):
            return r
        level.append(r)
    c, level = level[-1], level[:-1]
    while len(level) > 1:
        sums = [_flushed(x + y, path) for x, y in zip(level[::2], level[1::2], strict=True)]
        for s in sums:
            if isinstance(s, Special):
                return s
        level = [s for s in sums if isinstance(s, Fraction)]
    return _flushed(c + level[0], path)


def _flushed(x: Fraction, path: Datapath) -> Fraction | Special:
    r = _result(x, path)
    small = path.flush and isinstance(r, Fraction) and abs(r) < Fraction(2) ** path.output.min_exponent
    return Fraction(0) if small else r


def _truncated_scalar(terms: Sequence[Term], c: Fraction, path: Datapath) -> Fraction | Special:
    """Products summed truncated; c joins by floors: product sum to carry_bits + 1 fraction bits, c to F, the sum to
    carry_bits; then one rounding. Two product sums (TRUNCATED_PAIRS) are first floored to the common exponent."""
    bits, low = path.fraction_bits, path.output.min_exponent
    over = [p for p, _ in terms if abs(p) >= Fraction(2) ** (path.output.bias + 1)]
    if over:
        signs = {p > 0 for p in over}
        return Special.NAN if len(signs) == 2 else (Special.POS_INF if over[0] > 0 else Special.NEG_INF)
    pairs = path.family is Family.TRUNCATED_PAIRS
    parts = [[t for k, t in enumerate(terms) if k // path.group % 2 == i] for i in (0, 1)] if pairs else [list(terms)]
    tops = [max(e if p else path.zero_exponent for p, e in part) for part in parts]
    sums = [
        sum((_cut(p, top - bits, path.alignment_rounding) for p, _ in part), Fraction(0))
        for part, top in zip(parts, tops, strict=True)
    ]
    dot_top, own = max(tops), (max(_log2(c), low) if c else low)
    dot = sum((_cut(s, dot_top - bits, Rounding.FLOOR) for s in sums), Fraction(0)) if pairs else sums[0]
    top = max(dot_top, own)
    carried = Fraction(0) if pairs and own < top - bits - 1 else _cut(c, top - bits, Rounding.FLOOR)
    total = _cut(dot, top - path.carry_bits - 1, Rounding.FLOOR) + carried
    if total:
        total = _cut(total, max(_log2(total), low) - path.carry_bits, Rounding.FLOOR)
    return _result(total, path)
