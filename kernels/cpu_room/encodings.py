"""The encodings: 4-bit codes packed, reordered and renamed, scales multiplied out, folded, swizzled and converted.

Decides: the storage of each output, by shifts and index arithmetic on integers. Refuses: a table of layouts; every variant
says its own axes. Word j of a packed axis holds elements 8j .. 8j + 7, element 8j + i in bits 4i .. 4i + 3, unless a variant
says otherwise. Every function takes a problem and its tensors as they lie in memory, and returns what belongs into each output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lowbit.conformance.backend import BF16, E4M3FN, E4M3FNUZ, F16, F32, Problem

from .codec import Array, narrow_codes, rounded, values

__all__ = ["ENCODINGS", "Tensors", "swizzled"]

Tensors = Mapping[str, Array]

_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


def _words(codes: Array) -> Array:
    """[.., 8j] 4-bit codes to [.., j] words."""
    split = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).astype(np.uint32)
    return np.asarray(np.bitwise_or.reduce(split << _SHIFTS, axis=-1))


def _nibbles(words: Array) -> Array:
    """Inverse of `_words`; codes in uint8."""
    split = (words.astype(np.uint32)[..., None] >> _SHIFTS) & np.uint32(15)
    return np.reshape(split.astype(np.uint8), (*words.shape[:-1], words.shape[-1] * 8))


def _bytes(codes: Array) -> Array:
    """[.., 2j] 4-bit codes to [.., j] bytes, the even element in bits 0..3."""
    return np.asarray((codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))).astype(np.uint8))


def int4_pack(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """q [N, K] to the storage that the variant names; b8: every nibble of `words` from value + 8 to two's complement or back."""
    if problem.variant == "b8":
        return {"words": tensors["words"] ^ np.uint32(0x88888888)}
    q, variant = tensors["q"] & np.uint8(15), problem.variant
    if variant == "nibble":
        return {"packed": _bytes(q)}
    if variant == "compressed_tensors":  # value + 8; the rest of the last word holds code 0
        wide = np.zeros((q.shape[0], -(-q.shape[1] // 8) * 8), dtype=np.uint8)
        wide[:, : q.shape[1]] = (q + np.uint8(8)) & np.uint8(15)
        return {"packed": _words(wide)}
    if variant == "k_major":
        return {"packed": _words(q)}
    if variant == "gptq":
        return {"packed": _words(q).T}
    if variant == "zeros_v1":  # stored one less
        q = (q + np.uint8(15)) & np.uint8(15)
    along_n = q.T
    if variant == "awq":  # bits 4i hold n = 8j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
        eights = along_n.reshape(along_n.shape[0], -1, 8)
        along_n = np.concatenate((eights[..., 0::2], eights[..., 1::2]), axis=-1).reshape(along_n.shape)
    return {"packed": _words(along_n)}


def int4_repack(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """weight: words along K [N, K/8] to words along N [K, N/8]. zeros: both lie along N, so that [N/8, G] is only turned."""
    packed = tensors["packed"]
    return {"repacked": packed.T if problem.variant == "zeros" else _words(_nibbles(packed).T)}


def int4_encode(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """Nibble v in 1..7 becomes 8 - v; then, but for `unified`, nibbles go to the register order of the Hopper e4m3 MMA.

    q is bytes [n, k / 2] (unified), words [n, k / 8] (dense) or words [e, n, k / 8] (grouped, reordered expert by expert).
    """
    q = tensors["q"]
    if problem.variant == "unified":
        low, high = _unified(q & np.uint8(15)), _unified(q >> np.uint8(4))
        return {"encoded": low | (high << np.uint8(4))}
    n, k = problem.dim("n"), problem.dim("k")
    codes = _unified(_nibbles(q)).reshape(-1, n * k)
    reordered = np.empty_like(codes)
    reordered[:, _register_slots(n, k)] = codes
    return {"encoded": _words(reordered).reshape(*q.shape[:-2], k // 8, n)}


def _unified(v: Array) -> Array:
    return np.where(v < 8, (np.uint8(8) - v) & np.uint8(7), v).astype(np.uint8)


def _register_slots(n: int, k: int) -> Array:
    """Slot of nibble (n, k), flat in row-major order: tiles of 16 x 32, K slowest; in a tile 32 lanes of 16 nibbles, lane
    4 (n % 8) + k / 4 % 4, in it four registers of four: k / 16 % 2 before n / 8 % 2 before k % 4."""
    row, column = np.arange(n)[:, None], np.arange(k)[None, :]
    tile = (column // 32) * (n // 16) + row // 16
    lane = row % 8 * 4 + column // 4 % 4
    register = column // 16 % 2 * 2 + row // 8 % 2
    return np.ravel((tile * 32 + lane) * 16 + register * 4 + column % 4)


def scale_pack_e4m3(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """Eight products of each scale: -8, -7, .., -1 times it, in e4m3fn."""
    factors = np.arange(-8, 0).astype(np.float32)
    return {"packed": narrow_codes(values(tensors["scales"], E4M3FN)[:, None] * factors, "e4m3fn")}


def scale_fold(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """Row scale c = max(amax / 448, 1 / (448 * 512)); e4m3 codes of s / c, divided by 8 and coded again; channel scale 8 c.

    vllm: NaN does not count in amax, and the quotient is bounded so that NaN becomes 448. vllm_native: NaN stays NaN everywhere,
    and the quotient is s * (1 / c).
    """
    s = values(tensors["scales"], BF16)
    top, floor = np.float32(448), np.float32(1 / (448 * 512))
    with np.errstate(all="ignore"):
        if problem.option("recipe") == "vllm":
            c = np.maximum(np.fmax.reduce(np.abs(s), axis=1, keepdims=True, initial=0) / top, floor)
            quotient = np.fmax(-top, np.fmin(s / c, top))
        else:
            c = np.maximum(np.abs(s).max(axis=1, keepdims=True) / top, floor)
            quotient = s * (np.float32(1) / c)
        codes = narrow_codes(quotient, "e4m3fn")
        group = narrow_codes(values(codes, E4M3FN) / np.float32(8), "e4m3fn")
        return {"group_scale": group, "channel_scale": (c * np.float32(8)).view(np.uint32)}


def scale_swizzle(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """Byte (m, g) goes to ((m / 128) T + g / 4) 512 + (m % 32) 16 + (m / 32 % 4) 4 + g % 4, T = ceil(G / 4); the rest is zero."""
    scales = tensors["scales"]
    m, g = scales.shape
    return {"swizzled": swizzled(scales, -(-m // 128) * 128, -(-g // 4) * 4)}


def swizzled(scales: Array, rows: int, columns: int) -> Array:
    """[m, g] bytes in [rows, columns] bytes of 128 x 4 tiles."""
    m, g = np.arange(scales.shape[0])[:, None], np.arange(scales.shape[1])[None, :]
    flat = np.zeros(rows * columns, dtype=np.uint8)
    flat[(m // 128 * (columns // 4) + g // 4) * 512 + m % 32 * 16 + m // 32 % 4 * 4 + g % 4] = scales
    return flat.reshape(rows, columns)


def fp8_convert_fnuz(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """On fnuz hardware -0 becomes +0, other bytes stay, and every scale is doubled; on fn hardware nothing changes."""
    fnuz = problem.option("hardware") == "fnuz"
    w = tensors["w"]
    result = {"w_out": np.where(w == 0x80, np.uint8(0), w) if fnuz else w}
    for name in ("weight_scale", "input_scale"):
        if name in tensors:
            scale = values(tensors[name], F32)
            with np.errstate(all="ignore"):
                result[f"{name}_out"] = (scale + scale).view(np.uint32) if fnuz else tensors[name]
    return result


def fp8_requantize(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """Shards of w [N, K] from a scale each to the largest scale; channel: the scale of its shard for every row.

    A last scale that was never filled (the least finite binary32 value) marks weights that are fused already: they stay.
    max_scale_f16: the decoded weights pass through binary16.
    """
    scales, widths = values(tensors["scales"], F32), tensors["widths"].astype(np.int64)
    rows = np.repeat(scales, widths)[:, None] if problem.variant == "channel" or scales[-1] > np.finfo(np.float32).min else None
    if problem.variant == "channel" and rows is not None:
        return {"channel_scale": rows.view(np.uint32)}
    largest = np.max(scales)
    if rows is None:
        return {"w_out": tensors["w"], "scale": largest.reshape(1).view(np.uint32)}
    fnuz = problem.option("format") == "fnuz"
    top = np.float32(224 if fnuz else 448)
    with np.errstate(all="ignore"):
        value = values(tensors["w"], E4M3FNUZ if fnuz else E4M3FN) * rows
        if problem.variant == "max_scale_f16":
            value = rounded(value, F16)
        bounded = np.fmax(-top, np.fmin(value * (np.float32(1) / largest), top))  # NaN becomes the upper bound
    return {"w_out": narrow_codes(bounded, "e4m3fnuz" if fnuz else "e4m3fn"), "scale": largest.reshape(1).view(np.uint32)}


ENCODINGS: dict[str, Callable[[Problem, Tensors], dict[str, Array]]] = {
    "int4_pack": int4_pack, "int4_repack": int4_repack, "int4_encode": int4_encode, "scale_pack_e4m3": scale_pack_e4m3,
    "scale_fold": scale_fold, "scale_swizzle": scale_swizzle, "fp8_convert_fnuz": fp8_convert_fnuz,
    "fp8_requantize": fp8_requantize,
}
"""Kernels by op."""
