"""The sum as a matrix unit computes it: array form of the definition, bit for bit.

Decides: `dot_emulated`, a chain of nodes in ascending k from a start value, specials included; `read`, an operand as a datapath
reads it.
Refuses: operands, block scales, roundings and start values that the unit does not take, and any other order of k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .datapaths import Datapath, Family
from .dot_sums import Operand, two_sum, values
from .formats import F64, INT32, Codes, Kind, Reals, decode
from .rounding import Overflow, Rounding, encode, round_to, sum_odd

__all__ = ["Ints", "Lanes", "check_pair", "check_read", "dot_emulated", "held_codes", "read"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """An operand as a datapath reads it, K padded with zeros to whole instructions.

    value [rows, K]: exact, block scales applied, cut to `operand_bits`, flushed. exponent [rows, K]: that of alignment.
    """

    value: Reals
    exponent: Ints


def _floor_log2(x: Reals) -> Ints:
    """floor(log2 |x|) for finite x != 0; -1 for zero."""
    return np.frexp(x)[1].astype(np.int64) - 1


def check_read(op: Operand, path: Datapath) -> None:
    """Raises ValueError where the unit does not take the operand's format or its block scales.

    IEEE takes any block scales: a dequantised value (few bits times few bits) is exact, and so are its products."""
    if op.format not in path.operands:
        raise ValueError(f"{path.name}: got operand format {op.format.name}, expected one of {[f.name for f in path.operands]}")
    if path.family is not Family.IEEE and (op.scale_format, op.group) != (path.scale_format, path.scale_group):
        raise ValueError(
            f"{path.name}: got block scales {op.scale_format} per {op.group}, expected {path.scale_format} per "
            f"{path.scale_group}; scales that the instruction does not take belong to a later step"
        )


def _decoded(op: Operand, path: Datapath) -> Reals:
    """Values [rows, K] of the elements, block scales left out, their codes cut to `operand_bits` before they are taken for
    anything: a tf32 NaN whose payload lies in the 13 bits below is an infinity (measured on H200)."""
    dropped = op.codes.dtype.type(op.format.precision - path.operand_bits if path.operand_bits else 0)
    return values(Operand((op.codes >> dropped) << dropped, op.format))


def read(op: Operand, path: Datapath) -> Lanes:
    """Operand as `path` reads it. Raises ValueError as `check_read`."""
    check_read(op, path)
    value = _decoded(op, path)
    lowest = path.operand_min_exponent or (op.format.min_exponent if op.format.kind is Kind.FLOAT else 0)
    if path.flush:
        value = np.where(np.abs(value) < 2.0**op.format.min_exponent, 0.0, value)
    exponent = np.maximum(_floor_log2(np.where(np.isfinite(value), value, 0.0)), lowest)
    if op.scales is not None and op.scale_format is not None:
        scale = np.repeat(decode(op.scales, op.scale_format), op.group, axis=1)
        own = np.maximum(_floor_log2(np.where(np.isfinite(scale), scale, 0.0)), op.scale_format.min_exponent)
        exponent = own if path.family is Family.GROUPED else exponent + own
        with np.errstate(invalid="ignore"):
            value = value * scale
    pad = -op.codes.shape[1] % path.instruction_k
    return Lanes(np.pad(value, ((0, 0), (0, pad))), np.pad(exponent, ((0, 0), (0, pad))))


def check_pair(a: Operand, w: Operand, start: Reals | None, path: Datapath) -> tuple[int, int, int]:
    """(M, N, K). Raises ValueError where K differs, a rounding is none of RNE, RZ and FLOOR, or `start` is not [M, N] of values
    of the output format."""
    for mode in (path.output_rounding, path.alignment_rounding):
        if mode not in _ROUND:
            raise ValueError(f"{path.name}: got rounding {mode.name}, expected one of {[r.name for r in _ROUND]}")
    (m, k), (n, k_w) = a.codes.shape, w.codes.shape
    if k != k_w:
        raise ValueError(f"{path.name}: got K = {k} for A and {k_w} for W, expected one K")
    if start is not None:
        if start.shape != (m, n):
            raise ValueError(f"{path.name}: got start of shape {start.shape}, expected {(m, n)}")
        held = start if path.output is INT32 else round_to(start, path.output)
        integer = path.output is not INT32 or ((start == np.rint(start)) & (start >= -(2.0**31)) & (start < 2.0**31)).all()
        if not (integer and np.array_equal(held, start, equal_nan=True)):
            raise ValueError(f"{path.name}: got a start value outside {path.output.name}, expected its values; round it first")
    return m, n, k


def dot_emulated(a: Operand, w: Operand, path: Datapath, start: Reals | None = None) -> Codes:
    """Result bits [M, N] (container of `path.output`) of sum_k a[m, k] w[n, k] on `path`: a chain of nodes in ascending k.

    The chain begins with c = `start` (values of the output format) or zero. K is padded to whole instructions with zero
    products; such a product adds nothing but takes part in the search for the largest exponent as `zero_exponent`, which
    matters only where every term is smaller than 2^zero_exponent. NaN operands, Inf * 0 and Inf - Inf give `nan_code`;
    results of 2^(max + 1) and more give infinity; zero is +0 except in the IEEE family. Products need no range: they are
    exact. Raises ValueError for operands or starts that the unit does not take, and for F64 sums of other roundings.
    """
    m, n, _ = check_pair(a, w, start, path)
    left, right = read(a, path), read(w, path)
    if path.family is Family.INTEGER:
        return _emulate_integer(left.value, right.value, path, start)
    c = np.zeros((m, n)) if start is None else np.array(start, dtype=np.float64)
    step = {Family.EMULATED_PAIRS: path.instruction_k, Family.IEEE: 1}.get(path.family, path.products)
    rows = max(1, (1 << 20) // max(1, n * step))
    with np.errstate(invalid="ignore", over="ignore"):
        for top in range(0, m, rows):
            for k in range(0, left.value.shape[1], step):
                part = (slice(top, top + rows), None, slice(k, k + step))
                p = left.value[part] * right.value[None, :, k : k + step]
                e = left.exponent[part] + right.exponent[None, :, k : k + step]
                c[top : top + rows] = _NODES[path.family](p, e, c[top : top + rows], path)
    return held_codes(c, path)


def held_codes(c: Reals, path: Datapath) -> Codes:
    """Codes of accumulator values, which are values of the output format already; NaN becomes the unit's own."""
    codes: Codes = encode(c, path.output, Rounding.RNE, Overflow.SPECIAL)
    codes[np.isnan(c)] = path.nan_code
    return codes


def _emulate_integer(a: Reals, w: Reals, path: Datapath, start: Reals | None) -> Codes:
    """Exact in float64 BLAS: |products| <= 2^16, so any K below 2^36 stays within 2^53."""
    c = np.zeros((a.shape[0], w.shape[0])) if start is None else start
    if not path.saturate:
        total = (a @ w.T).astype(np.int64) + c.astype(np.int64)
        return (total & 0xFFFFFFFF).astype(np.uint32)
    for k in range(0, a.shape[1], path.instruction_k):
        part = slice(k, k + path.instruction_k)
        c = np.clip(c + a[:, part] @ w[:, part].T, -(2.0**31), 2.0**31 - 1)
    return c.astype(np.int32).view(np.uint32)


def _round_bits(x: Reals, path: Datapath) -> Reals:
    """Exact values, or values rounded to odd in float64, to `output_bits` of the output format; no upper end."""
    unit = np.maximum(_floor_log2(x), path.output.min_exponent) - (path.output_bits - 1)
    return np.asarray(np.ldexp(_ROUND[path.output_rounding](np.ldexp(x, -unit)), unit))


def _finish(x: Reals, path: Datapath) -> Reals:
    """The result of a matrix unit: rounded, infinite above the format's range, zero always +0."""
    rounded = _round_bits(x, path)
    return np.where(np.abs(rounded) < 2.0 ** (path.output.bias + 1), rounded, np.copysign(np.inf, x)) + 0.0


_ROUND: dict[Rounding, Callable[[Reals], Reals]] = {Rounding.RNE: np.rint, Rounding.RZ: np.trunc, Rounding.FLOOR: np.floor}


def _specials(p: Reals, c: Reals) -> tuple[Reals, Reals, Reals]:
    """Finite parts of p and c, and the special sum: 0, an infinity, or NaN."""
    p_ok, c_ok = np.isfinite(p), np.isfinite(c)
    if p_ok.all() and c_ok.all():
        return p, c, np.zeros_like(c)
    special = np.where(p_ok, 0.0, p).sum(axis=-1) + np.where(c_ok, 0.0, c)
    return np.where(p_ok, p, 0.0), np.where(c_ok, c, 0.0), special


def _aligned_sum(p: Reals, e: Ints, live: npt.NDArray[np.bool_], c: Reals, path: Datapath) -> Reals:
    """Exact value of T * 2^(E - F): terms [..., L] and c [...] aligned to E and cut. |T| stays far below 2^53."""
    e = np.where(live, e, path.zero_exponent)
    own = np.where(c == 0, path.zero_exponent, np.maximum(_floor_log2(c), path.output.min_exponent))
    top = np.maximum(e.max(axis=-1), own)
    shift = path.fraction_bits - top
    cut = _ROUND[path.alignment_rounding]
    total = cut(np.ldexp(p, shift[..., None])).sum(axis=-1) + cut(np.ldexp(c, shift))
    return np.asarray(np.ldexp(total, -shift))


def _node_fused(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    p, c, special = _specials(p, c)
    if path.normalised and path.family is not Family.GROUPED:
        e = _floor_log2(p)
    live = p != 0
    if path.family is Family.GROUPED:
        shape = (*p.shape[:-1], p.shape[-1] // path.group, path.group)
        p, e, live = p.reshape(shape).sum(axis=-1), e.reshape(shape)[..., 0], live.reshape(shape).any(axis=-1)
    return np.where(special != 0, special, _finish(_aligned_sum(p, e, live, c, path), path))


def _node_pairs(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    """t from zero over the even runs of k, then over the odd runs; the IEEE addition of c is correctly rounded through
    float64, which has more than twice the bits of the output plus two."""
    second = np.arange(p.shape[-1]) // path.group % 2 == 1
    t = np.zeros_like(c)
    for side in (~second, second):
        part_p, part_e = p[..., side], e[..., side]
        for k in range(0, part_p.shape[-1], path.products):
            t = _node_fused(part_p[..., k : k + path.products], part_e[..., k : k + path.products], t, path)
    return np.asarray(round_to(t + c, path.output))


def _round_ieee(x: Reals, path: Datapath) -> Reals:
    """As IEEE 754: zeros keep their sign, directed roundings do not overflow inward."""
    return np.asarray(round_to(_round_bits(x, path), path.output, path.output_rounding))


def _node_ieee(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    product = p[..., 0] if path.fused else _round_ieee(p[..., 0], path)
    if path.output is F64:
        return c + product
    return _round_ieee(sum_odd(c, product), path)


def _node_exact(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    """Exact sum as a growing expansion of float64 (each component below the next one's last bit), then one rounding."""
    p, c, special = _specials(p, c)
    parts = [c]
    for i in range(p.shape[-1]):
        carry = p[..., i]
        for j, part in enumerate(parts):
            carry, parts[j] = two_sum(carry, part)
        parts.append(carry)
    rest = np.zeros_like(c)
    for part in parts[:-1]:
        rest = sum_odd(part, rest)
    return np.where(special != 0, special, _finish(sum_odd(parts[-1], rest), path))


def _round_flush(x: Reals, path: Datapath) -> Reals:
    """Rounded, small results zero; infinities and NaN pass."""
    special = ~np.isfinite(x)
    finite = _finish(np.where(special, 0.0, x), path)
    if path.flush:
        finite = np.where(np.abs(finite) < 2.0**path.output.min_exponent, 0.0, finite)
    return np.where(special, x, finite)


def _node_tree(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    """Sums of two binary32 values are correctly rounded through float64 to nearest (53 >= 2 * 24 + 2)."""
    p, c = _round_flush(p, path), _round_flush(c, path)
    while p.shape[-1] > 1:
        p = _round_flush(p[..., ::2] + p[..., 1::2], path)
    return _round_flush(c + p[..., 0], path)


def _node_truncated(p: Reals, e: Ints, c: Reals, path: Datapath) -> Reals:
    bits, low = path.fraction_bits, path.output.min_exponent
    p = np.where(np.abs(p) >= 2.0 ** (path.output.bias + 1), np.copysign(np.inf, p), p)
    p, c, special = _specials(p, c)
    e = np.where(p == 0, path.zero_exponent, e)
    pairs = path.family is Family.TRUNCATED_PAIRS
    second = np.arange(p.shape[-1]) // max(path.group, 1) % 2 == 1
    sides = (~second, second) if pairs else (np.ones_like(second),)
    tops = [e[..., side].max(axis=-1) for side in sides]
    cut = _ROUND[path.alignment_rounding]
    sums = [cut(np.ldexp(p[..., s], bits - top[..., None])).sum(axis=-1) for s, top in zip(sides, tops, strict=True)]
    dot_top = tops[0] if len(tops) == 1 else np.maximum(tops[0], tops[1])
    dot = np.zeros_like(c)
    for total, top in zip(sums, tops, strict=True):
        dot += np.floor(np.ldexp(total, top - dot_top))
    own = np.where(c == 0, low, np.maximum(_floor_log2(c), low))
    top = np.maximum(dot_top, own)
    extra = path.carry_bits + 1 - bits
    carried = np.floor(np.ldexp(c, bits - top))
    if pairs:
        carried = np.where(own < top - bits - 1, 0.0, carried)
    x = np.floor(np.ldexp(dot, dot_top - top + extra)) + np.ldexp(carried, extra)
    x = np.ldexp(x, top - bits - extra)
    unit = np.maximum(_floor_log2(x), low) - path.carry_bits
    x = np.ldexp(np.floor(np.ldexp(x, -unit)), unit)
    return np.where(special != 0, special, _finish(x, path))


_NODES: dict[Family, Callable[[Reals, Ints, Reals, Datapath], Reals]] = {
    Family.FUSED: _node_fused, Family.GROUPED: _node_fused, Family.BLOCK_SCALED_FUSED: _node_fused,
    Family.EMULATED_PAIRS: _node_pairs, Family.IEEE: _node_ieee, Family.EXACT_SUM: _node_exact,
    Family.PAIR_TREE: _node_tree, Family.TRUNCATED_SUM: _node_truncated, Family.TRUNCATED_PAIRS: _node_truncated,
}
