"""Value encodings of weights and scales: what a conversion of stored codes into other stored codes yields.

Decides: the int4 offset, the eight-product scale table of W4A8 kernels and the weight it stands for, group
scales folded into e4m3, e4m3fn to e4m3fnuz, one scale for several shards, and the rounded weight of a W4A16 kernel.
Refuses: packing and permutations (see layouts) and finding scales from data (see recipes).
Codes are one per container; weights are [N, K] (output channels, reduction axis), scales [N, K / G].
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from lowbit.references.formats import (
    BF16,
    E4M3FN,
    E4M3FNUZ,
    F16,
    F32,
    INT4,
    UINT4,
    Codes,
    Format,
    Reals,
    decode,
)
from lowbit.references.recipes import RECIPES, Recipe, quantise
from lowbit.references.rounding import Overflow, Rounding, encode, round_to, sum_odd

__all__ = [
    "FUSED_SENTINEL", "Subtract", "channelwise_scales", "convert_fnuz", "dequant_w4a16", "flip_int4_offset", "fold_scales",
    "folded_weight", "pack_scale_e4m3", "requantize_max_scale",
]

FUSED_SENTINEL = -float(F32.max_finite)
"""Scale of a shard slot that a checkpoint fused on disk never fills: the least finite binary32 value (vLLM w8a8_utils)."""


class Subtract(IntEnum):
    """Where a W4A16 weight meets its zero point."""

    CODES = 0  # (q - z) * s: exact difference, one rounding (vLLM triton_w4a16)
    PRODUCTS = 1  # q * s - z * s: three roundings (vLLM quantize_weights, ref_zero_points_after_scales)


def flip_int4_offset(codes: Codes) -> Codes:
    """uint4b8 codes (value + 8) to int4 two's complement and back: bit 3 is inverted. Its own inverse."""
    return np.asarray(codes ^ np.uint8(8))


def pack_scale_e4m3(codes: Codes) -> Codes:
    """e4m3fn scales of any shape to uint8 [..., 8]: byte j is the e4m3fn code of s * (j - 8), nearest even, saturating.

    A NaN scale gives eight times 0x7F, +0 gives 0x80 (-0). Source: vLLM cutlass_pack_scale_fp8.
    """
    return encode(decode(codes, E4M3FN)[..., None] * np.arange(-8.0, 0.0), E4M3FN)


def folded_weight(q: Codes, scales: Codes) -> Codes:
    """The e4m3fn weight that a W4A8 kernel multiplies with: int4 codes [N, K] and e4m3fn scales [N, K / G] to codes [N, K].

    The value is s * q to nearest even, saturating; q = 0 gives -0 (0x80) whatever the scale, NaN and negative scales included,
    because the table lookup turns only seven of its eight bytes positive. Positive q take the byte of -q, sign inverted: a NaN
    scale gives 0x7F for negative and 0xFF for positive q. Raises ValueError where the shapes do not fit.
    """
    group = _group(q, scales)
    table = np.repeat(pack_scale_e4m3(scales), group, axis=1)
    value = decode(q, INT4).astype(np.int64)
    place = np.where(value > 0, 8 - value, value + 8) % 8
    negative = np.take_along_axis(table, place[..., None], axis=2)[..., 0]
    codes = np.where(value > 0, negative ^ np.uint8(0x80), negative)
    return np.where(value == 0, np.uint8(0x80), codes).astype(np.uint8)


def fold_scales(scales: Codes, recipe: Recipe = RECIPES["vllm_fp8_token"]) -> tuple[Codes, Codes]:
    """bf16 group scales [N, K / G] (codes) to e4m3fn group scales [N, K / G] and binary32 channel scales [N, 1] (codes).

    Each row is quantised to e4m3fn by `recipe` (per row, c = max(amax / 448, floor)); its codes are divided by 8 and rounded to
    e4m3fn again, so that -8 times a scale stays within 448; the channel scale is 8 * c. group * channel is in decode direction.
    The division loses low bits of 24 codes. Source: vLLM convert_bf16_scales_to_fp8.
    """
    rows = quantise(decode(scales, BF16), BF16, recipe)
    groups = encode(decode(rows.codes, E4M3FN) / 8.0, E4M3FN)
    return groups, _ieee(decode(rows.scales, F32) * 8.0, F32)


def convert_fnuz(codes: Codes, weight_scale: Codes, input_scale: Codes | None) -> tuple[Codes, Codes, Codes | None]:
    """e4m3fn codes to e4m3fnuz codes of half the value, and both binary32 scales (codes, any shape) doubled.

    -0 (0x80) becomes +0, all other bytes stay; the NaN bytes 0x7F and 0xFF therefore become +-240. To be applied once, and only
    for fnuz hardware. Source: vLLM normalize_e4m3fn_to_e4m3fnuz.
    """
    doubled = [None if s is None else _ieee(decode(s, F32) * 2.0, F32) for s in (weight_scale, input_scale)]
    assert doubled[0] is not None
    return np.where(codes == 0x80, np.uint8(0), codes).astype(np.uint8), doubled[0], doubled[1]


def requantize_max_scale(
    codes: Codes,
    scales: Codes,
    widths: tuple[int, ...],
    *,
    fmt: Format = E4M3FN,
    intermediate: Format = F32,
    scale_format: Format = F32,
    sentinel: float = FUSED_SENTINEL,
) -> tuple[Codes, Codes]:
    """Shards of fp8 weights [sum(widths), K], a binary32 scale each (codes [shards]), to one scale: codes and scale, shape [].

    The scale is the largest one. Each shard's value is fl(code * scale) in `intermediate`, then coded by the static recipe
    (times fl(1 / largest), bounded, nearest even; NaN gives the largest code). The source does this in binary16 (`intermediate`
    F16, where products overflow; `scale_format` F16 where the device rounds the scale to binary16 first). A last scale that is
    not above `sentinel` marks weights already fused: they are returned as they are. Raises ValueError for widths that do not add
    up, another format than e4m3fn or e4m3fnuz, and scales that are NaN, infinite, zero or negative outside unfilled slots.
    Source: vLLM requantize_with_max_scale.
    """
    values = decode(scales, F32)
    if fmt not in (E4M3FN, E4M3FNUZ) or intermediate not in (F16, F32) or scale_format not in (F16, F32):
        raise ValueError(f"requantize: got {fmt}, {intermediate}, {scale_format}, expected e4m3fn or e4m3fnuz, f16 or f32 twice")
    if scales.shape != (len(widths),) or sum(widths) != codes.shape[0] or min(widths, default=-1) < 0:
        raise ValueError(f"requantize: got widths {widths} and scales {scales.shape}, expected one each, sum {codes.shape[0]}")
    filled = values[values > sentinel]
    if np.isnan(values).any() or filled.size == 0 or not ((filled > 0) & np.isfinite(filled)).all():
        raise ValueError(f"requantize: got scales {values.tolist()}, expected positive finite ones or the sentinel {sentinel}")
    largest = values.max()
    if not values[-1] > sentinel:
        return codes.copy(), encode(largest, F32)
    if filled.size != values.size:
        raise ValueError(f"requantize: got scales {values.tolist()}, expected all slots filled where the last one is")
    recipe = RECIPES["vllm_fp8_static" if fmt is E4M3FN else "vllm_fp8_static_fnuz"]
    per_row = round_to(np.repeat(values, widths), scale_format)[:, None]
    value = round_to(round_to(decode(codes, fmt) * per_row, F32), intermediate)
    return quantise(value, intermediate, recipe, static_scale=np.full((1, 1), largest)).codes, encode(largest, F32)


def channelwise_scales(scales: Codes, widths: tuple[int, ...]) -> Codes:
    """Shard scales [shards] repeated over the rows of each shard: [sum(widths), 1]. Source: vLLM convert_to_channelwise."""
    if scales.shape != (len(widths),) or min(widths, default=0) < 0:
        raise ValueError(f"channelwise: got widths {widths} and scales of shape {scales.shape}, expected one scale per width")
    return np.repeat(scales, widths)[:, None]


def dequant_w4a16(
    codes: Codes,
    scales: Codes,
    fmt: Format,
    *,
    zero_points: Codes | None = None,
    bias: int = 8,
    order: Subtract = Subtract.CODES,
) -> Codes:
    """The weight a W4A16 kernel multiplies with: uint4 codes [N, K], scales [N, K / G] in `fmt` (f16 or bf16) to `fmt` codes.

    `zero_points` [N, K / G] are uint4 codes; without them every zero point is `bias` (8 for uint4b8). Each operation of `order`
    is rounded to nearest even in `fmt`; differences of codes are exact. Raises ValueError where the shapes do not fit.
    """
    group = _group(codes, scales)
    if zero_points is not None and zero_points.shape != scales.shape:
        raise ValueError(f"dequant: got zero points of shape {zero_points.shape}, expected that of the scales {scales.shape}")
    q, s = decode(codes, UINT4), np.repeat(decode(scales, fmt), group, axis=1)
    z = np.full(q.shape, float(bias)) if zero_points is None else np.repeat(decode(zero_points, UINT4), group, axis=1)
    with np.errstate(invalid="ignore"):
        if order is Subtract.CODES:
            return _ieee((q - z) * s, fmt)
        return _ieee(sum_odd(round_to(q * s, fmt), -round_to(z * s, fmt)), fmt)


def _ieee(x: Reals, fmt: Format) -> Codes:
    """Nearest even, overflow to infinity."""
    return encode(x, fmt, Rounding.RNE, Overflow.SPECIAL)


def _group(codes: Codes, scales: Codes) -> int:
    """Elements per scale along K."""
    if codes.ndim != 2 or scales.ndim != 2 or codes.shape[0] != scales.shape[0] or codes.shape[1] % max(scales.shape[1], 1):
        raise ValueError(f"got codes {codes.shape} and scales {scales.shape}, expected [N, K] and [N, K / G]")
    return int(codes.shape[1]) // max(int(scales.shape[1]), 1)
