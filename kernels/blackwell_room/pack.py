"""From weights in floating point to what the kernel reads: E2M1 codes two to a byte, block scales in 128x4 tiles, channel scales.

Decides: the arithmetic of the offline quantiser (`quantise_blocks` is svdquant's: binary32, scale RNE to e4m3, division by the
stored scale, ties away from zero), and where codes and scales lie in memory. Refuses: shapes that blocks do not divide, weights
that are not finite. Nothing here is shared with the references; conformance op nvfp4_quantize judges `quantise_blocks`.

A weight is w[n, k] = code * block_scale[n, k // 16] * channel_scale[n], all scales in decode direction. `pack_codes` and
`place_scales` take NumPy arrays and torch tensors alike, so that the same lines pack on the host and on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .schedule import SCALE_GROUP, scale_offset

__all__ = [
    "Bytes", "Packed", "Reals", "channel_scales", "pack_codes", "pack_weight", "place_scales", "quantise_blocks", "scale_bytes",
    "scale_offsets",
]

Bytes = npt.NDArray[np.uint8]
Reals = npt.NDArray[np.float32]

_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of E2M1 (OCP MX 1.0)."""

_LARGEST = np.float32(6)
_SCALE_LARGEST = np.float32(448)
_SCALE_FLOOR = np.float32(1e-12)  # svdquant-kernels 7885f31, quantize_nvfp4_rows; RNE to e4m3 makes it 0
_MANTISSA = {"f16": (10, 14), "bf16": (7, 126)}
"""Fraction bits and the magnitude of the least normal exponent of the formats that a channel scale is stored in."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A weight as the kernel reads it. codes: uint8 [N, K / 2], even k in bits 3..0. scales: uint8, flat, the e4m3 codes of
    [N, K / 16] in 128x4 tiles, zero where padded. channel: uint16 [N], codes of the output format."""

    codes: Bytes
    scales: Bytes
    channel: npt.NDArray[np.uint16]


def _round_e4m3(x: Reals) -> Bytes:
    """Codes of binary32 values in [0, 448], nearest even: steps of 2^-9 below 2^-6, eight steps to each binade from there on."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)  # frexp has significands in [1/2, 1)
    steps = np.rint(np.ldexp(x, 3 - exponent)).astype(np.int32)
    return np.asarray((exponent + 6) * 8 + steps, dtype=np.uint8)


def _e4m3(codes: Bytes) -> Reals:
    """Values of e4m3 codes below 0x7F without a sign."""
    exponent, fraction = codes.astype(np.int32) >> 3, codes.astype(np.int32) & 7
    normal = exponent > 0
    significand = np.where(normal, fraction + 8, fraction).astype(np.float32)
    return np.asarray(np.ldexp(significand, np.maximum(exponent, 1) - 10))


def quantise_blocks(x: Reals) -> tuple[Bytes, Bytes]:
    """x [rows, K] in binary32 -> (codes uint8 [rows, K], e4m3 scale codes uint8 [rows, K / 16]).

    scale = RNE_e4m3(min(max(amax / 6, 1e-12), 448)); code = the number of midpoints that |x / scale| reaches, so that ties go
    away from zero; bit 3 is set where x < 0. A block whose scale becomes 0 (amax <= 6 * 2^-10) has the value 0 whatever its
    codes: x / 0 counts as infinite, 0 / 0 as code 0. Raises ValueError where K is not a positive multiple of 16.
    """
    rows, k = x.shape
    if k == 0 or k % SCALE_GROUP:
        raise ValueError(f"pack: K = {k} is not a positive multiple of {SCALE_GROUP}, one block scale; pad the weight with zeros")
    blocks = x.reshape(rows, k // SCALE_GROUP, SCALE_GROUP)
    amax = np.abs(blocks).max(axis=2, initial=np.float32(0))
    scales = _round_e4m3(np.minimum(np.maximum(amax / _LARGEST, _SCALE_FLOOR), _SCALE_LARGEST))
    with np.errstate(divide="ignore", invalid="ignore"):
        magnitude = np.abs(blocks / _e4m3(scales)[:, :, None])
    codes = np.zeros(blocks.shape, np.uint8)
    for threshold in _THRESHOLDS:
        codes += magnitude >= np.float32(threshold)
    return (codes | (blocks < 0).astype(np.uint8) << np.uint8(3)).reshape(rows, k), scales


def channel_scales(w: Reals, out: str) -> tuple[npt.NDArray[np.uint16], Reals]:
    """(codes uint16 [N] in format `out`, their values) for w [N, K]: amax of the row / 2688, rounded up, so that the largest
    block scale of a row is at most 448 and its largest code at most 6. 1 for a row of zeros. Raises ValueError where a row needs
    more than `out` holds."""
    fraction, lowest = _MANTISSA[out]
    amax = np.abs(w).max(axis=1, initial=np.float32(0)).astype(np.float64)
    wanted = np.where(amax > 0, amax / float(_LARGEST * _SCALE_LARGEST), 1.0)
    exponent = np.maximum(np.frexp(wanted)[1] - 1, -lowest)
    steps = np.ceil(np.ldexp(wanted, fraction - exponent)).astype(np.int64)
    codes = ((exponent + lowest) << fraction) + steps
    if codes.size and int(codes.max()) >= (2 * lowest + 3) << fraction:
        raise ValueError(f"pack: the largest channel scale {wanted.max()} is beyond {out}; scale the weight down or use bf16")
    return codes.astype(np.uint16), np.ldexp(steps.astype(np.float64), exponent - fraction).astype(np.float32)


def pack_codes(codes: Any) -> Any:
    """uint8 [rows, K] of one code each -> uint8 [rows, K / 2], even k in bits 3..0, odd k in bits 7..4."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def scale_bytes(rows: int, k: int) -> int:
    """Bytes of the scales of a [rows, K] operand in 128x4 tiles: rows up to a multiple of 128, K / 16 up to one of 4."""
    groups = k // SCALE_GROUP
    return (rows + -rows % 128) * (groups + -groups % 4)


def scale_offsets(rows: int, groups: int) -> npt.NDArray[np.int64]:
    """int64 [rows, groups]: the byte where the scale of (row, group of k) lies, by the map that the kernel reads by."""
    row: Any = np.arange(rows, dtype=np.int64)[:, None]  # arrays pass through the map as integers do
    group: Any = np.arange(groups, dtype=np.int64)[None, :]
    return np.asarray(scale_offset(row, group, groups))


def place_scales(storage: Any, offsets: Any, scales: Any) -> Any:
    """`storage` (flat uint8, zero) with the scales [rows, groups] written at `offsets` (of `scale_offsets`, same library)."""
    storage[offsets.reshape(-1)] = scales.reshape(-1)
    return storage


def pack_weight(w: Reals, out: str) -> Packed:
    """w [N, K] binary32 -> what the kernel reads, with channel scales in `out` ("f16" or "bf16"). The low-rank part, if any, is
    subtracted by the caller before: this packs the residual. Raises ValueError for a weight that is not finite, and as
    `quantise_blocks` and `channel_scales` do."""
    if not np.isfinite(w).all():
        raise ValueError("pack: the weight holds NaN or infinite values, which E2M1 has no code for")
    channel, values = channel_scales(w, out)
    codes, scales = quantise_blocks(w / values[:, None])
    rows, groups = scales.shape
    storage = np.zeros(scale_bytes(rows, groups * SCALE_GROUP), np.uint8)
    return Packed(pack_codes(codes), place_scales(storage, scale_offsets(rows, groups), scales), channel)
