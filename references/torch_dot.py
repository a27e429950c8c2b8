"""PyTorch twin of `dot_emulated` on CPU and CUDA: a third formulation, the same bits (optional, needs torch).

Decides nothing: `dot.py` defines. Codes are taken apart and put together by int64 operations alone, so no library cast, no
ldexp and no fp8 dtype is trusted; matrix products are used for integers only, in float64, where they are exact.
Refuses: families outside `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .datapaths import Datapath, Family
from .dot import Operand, check_pair, check_read, held_codes
from .formats import INT32, Codes, Format, Kind, Nan, Reals
from .rounding import Rounding

__all__ = ["FAMILIES", "dot_emulated_torch"]

FAMILIES = frozenset({Family.FUSED, Family.BLOCK_SCALED_FUSED, Family.GROUPED, Family.EMULATED_PAIRS, Family.INTEGER})
_GUARD = 26
"""Bits below the accumulator kept by the IEEE addition; the lowest is sticky. 24 + 26 + 1 bits are exact in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """value = significand * 2^(exponent - fraction bits); special: 0 finite, 1 +Inf, -1 -Inf, 2 NaN. int64 tensors."""

    significand: torch.Tensor
    exponent: torch.Tensor
    special: torch.Tensor


def _length(x: torch.Tensor) -> torch.Tensor:
    """Bit length of |x| < 2^53, from the exponent of its exact float64; 0 for zero."""
    exponent = (x.abs().double().view(torch.int64) >> 52) - 1022
    return torch.where(x == 0, 0, exponent)


def _cut(x: torch.Tensor, right: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """x * 2^-right to an integer."""
    left, right = (-right).clamp(min=0), right.clamp(0, 62)
    if rounding is Rounding.RZ:
        return torch.sign(x) * ((x.abs() << left) >> right)
    kept = (x << left) >> right
    if rounding is Rounding.FLOOR:
        return kept
    rest = (x << left) - (kept << right)
    half = (torch.ones_like(right) << right) >> 1
    return kept + ((rest > half) | ((rest == half) & (half > 0) & (kept & 1 == 1))).long()


def _take_apart(codes: Codes, fmt: Format, device: torch.device, bits: int = 0) -> _Numbers:
    """Codes of a float or E8M0 format; only the upper `bits` significand bits are used (0: all)."""
    dropped = fmt.precision - bits if bits else 0
    raw = torch.from_numpy(codes.astype(np.int64)).to(device) >> dropped << dropped
    zero = torch.zeros_like(raw)
    if fmt.kind is Kind.EXPONENT:
        return _Numbers(zero + 1, raw - fmt.bias, torch.where(raw == 255, 2, zero))
    ones = (1 << fmt.exponent_bits) - 1
    magnitude = raw & ((1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1)
    sign = torch.where(raw & fmt.sign_bit != 0, -1, 1)
    field, fraction = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    special = zero
    if fmt.nan is Nan.IEEE:
        special = torch.where(field == ones, torch.where(fraction == 0, sign, 2), zero)
    elif fmt.nan is Nan.ALL_ONES:
        special = torch.where(magnitude == magnitude.new_tensor((ones + 1 << fmt.mantissa_bits) - 1), 2, zero)
    significand = fraction + torch.where(field > 0, 1 << fmt.mantissa_bits, zero)
    significand = sign * (significand >> dropped)
    return _Numbers(torch.where(special == 0, significand, zero), field.clamp(min=1) - fmt.bias, special)


def _read(op: Operand, path: Datapath, device: torch.device) -> tuple[_Numbers, int]:
    """Operand [rows, K padded], and the fraction bits of its significands."""
    x = _take_apart(op.codes, op.format, device, path.operand_bits)
    bits = path.operand_bits - 1 if path.operand_bits else op.format.mantissa_bits
    significand, exponent, special = x.significand, x.exponent, x.special
    if path.operand_min_exponent:
        # A format with more exponent holds the small values as normal ones: move the leading bit up.
        up = torch.where(significand == 0, 0, (bits + 1 - _length(significand)).clamp(min=0))
        up = torch.minimum(up, (exponent - path.operand_min_exponent).clamp(min=0))
        significand, exponent = significand << up, exponent - up
    if op.scales is not None and op.scale_format is not None:
        scale = _take_apart(op.scales, op.scale_format, device)
        wide = [t.repeat_interleave(op.group, dim=1) for t in (scale.significand, scale.exponent, scale.special)]
        if path.family is Family.GROUPED:
            # Aligned by the scales alone: the element's exponent moves into its significand.
            lift = exponent - op.format.min_exponent
            significand, bits, exponent = (significand << lift) * wide[0], bits + op.scale_format.mantissa_bits, wide[1]
            bits -= op.format.min_exponent
        else:
            significand, exponent = significand * wide[0], exponent + wide[1]
        special = torch.where(wide[2] != 0, wide[2], special)
    pad = (0, -op.codes.shape[1] % path.instruction_k)
    return _Numbers(*(torch.nn.functional.pad(t, pad) for t in (significand, exponent, special))), bits


def _join(special: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sum of two special states: NaN wins, opposite infinities make NaN."""
    nan = (special == 2) | (other == 2) | (special * other == -1)
    return torch.where(nan, 2, torch.where(special != 0, special, other))


def _special_products(a: _Numbers, w: _Numbers) -> torch.Tensor:
    """State [m, n, k] of every product: 0 where it is finite."""
    left, right = a.special[:, None, :], w.special[None, :, :]
    sign_a = torch.where(left == 0, a.significand[:, None, :].sign(), left)
    sign_w = torch.where(right == 0, w.significand[None, :, :].sign(), right)
    infinite = (left.abs() == 1) | (right.abs() == 1)
    product = sign_a * sign_w
    nan = (left == 2) | (right == 2) | (infinite & (product == 0))
    return torch.where(nan, 2, torch.where(infinite, product, 0))


def _special_sum(states: torch.Tensor) -> torch.Tensor:
    """State of the sum over the last axis."""
    plus, minus, nan = (states == 1).any(-1), (states == -1).any(-1), (states == 2).any(-1)
    return torch.where(nan | (plus & minus), 2, plus.long() - minus.long())


def _finish(total: torch.Tensor, scale: torch.Tensor, bits: int, rounding: Rounding, path: Datapath) -> _Numbers:
    """total * 2^scale to `bits` significant bits: significand with the output's mantissa bits, exponent, special."""
    out = path.output
    exponent = (_length(total) - 1 + scale).clamp(min=out.min_exponent)
    kept = _cut(total, exponent - (bits - 1) - scale, rounding)
    carry = (kept.abs() >> bits) > 0
    kept, exponent = torch.where(carry, kept >> 1, kept), exponent + carry.long()
    over = (exponent > out.bias) & (kept != 0)
    kept = kept << (out.mantissa_bits - bits + 1)
    zero = torch.zeros_like(kept)
    return _Numbers(
        torch.where(over, zero, kept), torch.where(over | (kept == 0), out.min_exponent, exponent),
        torch.where(over, kept.sign(), zero),
    )


def _node(p: torch.Tensor, e: torch.Tensor, states: torch.Tensor, bits: int, c: _Numbers, path: Datapath) -> _Numbers:
    """One node: p [m, n, L] integers, e their exponents, states their specials (p = 0 there)."""
    shown = e + _length(p) - 1 - bits if path.normalised and path.family is not Family.GROUPED else e
    live = p != 0
    if path.family is Family.GROUPED:
        groups = (*p.shape[:-1], p.shape[-1] // path.group, path.group)
        p, live = p.reshape(groups).sum(-1), live.reshape(groups).any(-1)
        e = shown = e[..., :: path.group]
    shown = torch.where(live, shown, path.zero_exponent)
    own = torch.where(c.significand != 0, c.exponent, path.zero_exponent)
    top = torch.maximum(shown.amax(-1), own)
    unit = top - path.fraction_bits
    total = _cut(p, unit[..., None] - e + bits, path.alignment_rounding).sum(-1)
    total = total + _cut(c.significand, unit - c.exponent + path.output.mantissa_bits, path.alignment_rounding)
    finite = _finish(total, unit, path.output_bits, path.output_rounding, path)
    return _merge(finite, _join(_special_sum(states), c.special))


def _add(x: _Numbers, y: _Numbers, path: Datapath) -> _Numbers:
    """IEEE addition to nearest even of two finite values of the output format."""
    top = torch.maximum(x.exponent, y.exponent)
    total = torch.zeros_like(top)
    for part in (x, y):
        wide, right = part.significand << _GUARD, (top - part.exponent).clamp(max=62)
        kept = wide >> right
        total = total + (kept | (wide != kept << right).long())
    return _finish(total, top - path.output.mantissa_bits - _GUARD, path.output.precision, Rounding.RNE, path)


def _merge(finite: _Numbers, special: torch.Tensor) -> _Numbers:
    """A finite result overridden by specials."""
    state = torch.where(special != 0, special, finite.special)
    return _Numbers(torch.where(state == 0, finite.significand, 0), finite.exponent, state)


def dot_emulated_torch(
    a: Operand, w: Operand, path: Datapath, start: Reals | None = None, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """As `dot.dot_emulated`: the same bits as nonnegative int64 [M, N] on `device`. Raises ValueError as it does, and for
    families outside `FAMILIES`."""
    if path.family not in FAMILIES:
        names = sorted(family.name for family in FAMILIES)
        raise ValueError(f"{path.name}: got family {path.family.name}, expected one of {names}; use dot.py")
    m, n, _ = check_pair(a, w, start, path)
    check_read(a, path)
    check_read(w, path)
    where = torch.device(device)
    if path.family is Family.INTEGER:
        return _integer(a, w, path, start, where)
    (left, bits_a), (right, bits_w) = _read(a, path, where), _read(w, path, where)
    begin = held_codes(np.zeros((m, n)) if start is None else start, path)
    step = path.instruction_k if path.family is Family.EMULATED_PAIRS else path.products
    rows = max(1, (1 << 22) // max(1, n * step))
    out = torch.empty((m, n), dtype=torch.int64, device=where)
    for top in range(0, m, rows):
        c = _take_apart(begin[top : top + rows], path.output, where)
        for k in range(0, left.significand.shape[1], step):
            x, y = _part(left, slice(top, top + rows), k, step), _part(right, slice(None), k, step)
            p = x.significand[:, None, :] * y.significand[None, :, :]
            e = x.exponent[:, None, :] + y.exponent[None, :, :]
            finite = not (bool((x.special != 0).any()) or bool((y.special != 0).any()))
            states = torch.zeros_like(p[..., :1]).expand_as(p) if finite else _special_products(x, y)
            node = _pairs if path.family is Family.EMULATED_PAIRS else _node
            c = node(p, e, states, bits_a + bits_w, c, path)
        out[top : top + rows] = _put_together(c, path)
    return out


def _part(x: _Numbers, rows: slice, k: int, length: int) -> _Numbers:
    return _Numbers(*(t[rows, k : k + length] for t in (x.significand, x.exponent, x.special)))


def _pairs(p: torch.Tensor, e: torch.Tensor, states: torch.Tensor, bits: int, c: _Numbers, path: Datapath) -> _Numbers:
    """t from zero over the even runs of k, then the odd ones; then c + t."""
    zero = torch.zeros_like(c.significand)
    t = _Numbers(zero, zero + path.output.min_exponent, zero)
    second = torch.arange(p.shape[-1], device=p.device) // path.group % 2 == 1
    for side in (~second, second):
        for chunk in torch.split(side.nonzero().flatten(), path.products):
            t = _node(p[..., chunk], e[..., chunk], states[..., chunk], bits, t, path)
    return _merge(_add(t, c, path), _join(t.special, c.special))


def _put_together(c: _Numbers, path: Datapath) -> torch.Tensor:
    out = path.output
    magnitude = c.significand.abs()
    hidden = 1 << out.mantissa_bits
    code = torch.where(magnitude >= hidden, ((c.exponent + out.bias) << out.mantissa_bits) + magnitude - hidden, magnitude)
    code = torch.where(c.special.abs() == 1, out.max_code + 1, code)
    code = code | torch.where((c.significand < 0) | (c.special == -1), out.sign_bit, 0)
    return torch.where(c.special == 2, path.nan_code, code)


def _integer(a: Operand, w: Operand, path: Datapath, start: Reals | None, device: torch.device) -> torch.Tensor:
    left, right = (_integers(op, device) for op in (a, w))
    c = torch.zeros((left.shape[0], right.shape[0]), dtype=torch.int64, device=device)
    if start is not None:
        c = torch.from_numpy(np.array(start)).to(device).long()
    step = path.instruction_k if path.saturate else max(left.shape[1], 1)
    for k in range(0, left.shape[1], step):
        c = c + (left[:, k : k + step] @ right[:, k : k + step].T).long()
        c = c.clamp(-(1 << 31), INT32.max_code) if path.saturate else c
    return c & 0xFFFFFFFF


def _integers(op: Operand, device: torch.device) -> torch.Tensor:
    """Exact integer values as float64."""
    raw = torch.from_numpy(op.codes.astype(np.int64)).to(device)
    return torch.where(raw & op.format.sign_bit != 0, raw - (1 << op.format.bits), raw).double()
