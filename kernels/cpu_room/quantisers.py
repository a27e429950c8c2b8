"""The quantisers: one straight function per source system, each step one binary32 operation (or one in the format of x).

Decides: codes, scales, zero points and global scales of every recipe. Refuses: a general quantiser with switches; where two
sources differ in one step, both steps are written out. Where a source uses an approximate reciprocal, the exact one, rounded,
stands for it. Where a source leaves an integer code undefined, 0 takes the place of NaN. x is [rows, K]; scales are in decode
direction unless a docstring says otherwise; `blocks` [rows, K / size, size] is x by blocks, a scale of it [rows, K / size, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    E2M1,
    F16,
    F32,
    UE4M3,
    Contraction,
    Declaration,
    Format,
    Order,
    Problem,
    cast,
)

from .codec import Array, codes_of, narrow_codes, rounded, values
from .encodings import swizzled

__all__ = ["QUANTISERS", "declare_projection"]

Tensors = Mapping[str, Array]

_FORMATS = {"bf16": BF16, "f16": F16, "f32": F32}
_ONE, _TINY, _HUGE = np.float32(1), np.finfo(np.float32).tiny, np.finfo(np.float32).max
_SIXTH = _ONE / np.float32(6)


def _number_max(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Largest magnitude; NaN does not count (fmaxf)."""
    return np.asarray(np.fmax.reduce(np.abs(x), axis=axis, keepdims=True, initial=np.float32(0)))


def _torch_max(x: Array, axis: int | tuple[int, ...] = -1) -> Array:
    """Largest magnitude; NaN if there is one."""
    return np.asarray(np.abs(x).max(axis=axis, keepdims=True, initial=np.float32(0)))


def _rcp(x: Array) -> Array:
    """rcp.approx.ftz, with no error: subnormal operands and results are zero."""
    inverse = _ONE / np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)
    return np.asarray(np.where(np.abs(inverse) < _TINY, np.copysign(np.float32(0), inverse), inverse))


def _grouped(x: Array, size: int) -> Array:
    return x.reshape(x.shape[0], x.shape[1] // size, size)


# fp8_quantize --------------------------------------------------------------------------------------------------------


def fp8_quantize(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """q [max(m, p), k] and, but for the variant `static`, scales. Rows from m on are zero."""
    x = values(tensors["x"], _FORMATS[problem.option("x")])
    name, top, most = ("e4m3fnuz", 224, 240) if problem.option("format") == "fnuz" else ("e4m3fn", 448, 448)
    high, recipe = np.float32(top), problem.option("recipe")
    with np.errstate(all="ignore"):
        if problem.variant == "static":
            scale = values(tensors["scale"], F32)
            quotient, scales = x * (_ONE / scale), scale
        elif problem.variant == "tensor":
            quotient, scales = _fp8_tensor(x, high, recipe)
        elif problem.variant == "token":
            bound = values(tensors["scale_ub"], F32) if "scale_ub" in tensors else None
            quotient, scales = _fp8_token(x, high, recipe, bound)
        elif problem.variant == "tile":
            quotient, scales = _fp8_tile(x, high)
        else:
            quotient, scales = _fp8_block(x, high, recipe)
        if recipe == "vllm" and problem.variant == "block":
            bounded = np.fmin(np.fmax(quotient, -high), high)  # NaN becomes the lower bound
        elif recipe == "vllm":
            bounded = np.fmax(-high, np.fmin(quotient, high))  # NaN becomes the upper bound
        else:
            most = most if recipe == "scaled_quantize" else top
            bounded = np.clip(quotient, np.float32(-most), np.float32(most))  # NaN stays
    q = np.zeros((max(problem.dim("m"), problem.dim("p")), x.shape[1]), dtype=np.uint8)
    q[: x.shape[0]] = narrow_codes(bounded, name)
    return {"q": q} if problem.variant == "static" else {"q": q, "scales": codes_of(scales, F32)}


def _fp8_floor(top: np.float32) -> np.float32:
    return _ONE / (top * np.float32(512))


def _fp8_tensor(x: Array, top: np.float32, recipe: str) -> tuple[Array, Array]:
    """vllm: amax / top with no floor. vllm_native: floored. Both multiply by the reciprocal. Scale [1]."""
    whole = (0, 1)
    scale = _number_max(x, whole) / top if recipe == "vllm" else np.maximum(_torch_max(x, whole) / top, _fp8_floor(top))
    return x * (_ONE / scale), scale.reshape(1)


def _fp8_token(x: Array, top: np.float32, recipe: str, bound: Array | None) -> tuple[Array, Array]:
    """The bound is one of amax, not of the scale. vllm divides; vllm_native multiplies by the reciprocal. Scales [m, 1]."""
    if recipe == "vllm":
        amax = _number_max(x)
        scale = np.maximum((amax if bound is None else np.minimum(amax, bound)) / top, _fp8_floor(top))
        return x / scale, scale
    amax = _torch_max(x)
    scale = np.maximum((amax if bound is None else np.minimum(amax, bound)) / top, _fp8_floor(top))
    return x * (_ONE / scale), scale


def _fp8_block(x: Array, top: np.float32, recipe: str) -> tuple[Array, Array]:
    """1 x 128. vllm: amax >= 1e-10, division. deepgemm: amax >= 1e-4, reciprocal. scaled_quantize: the elements are multiplied by
    top / amax and its reciprocal is the scale. Scales [m, k / 128]."""
    blocks = _grouped(x, 128)
    if recipe == "vllm":
        scale = np.maximum(_number_max(blocks), np.float32(1e-10)) / top
        quotient = blocks / scale
    elif recipe == "deepgemm":
        scale = np.maximum(_torch_max(blocks), np.float32(1e-4)) / top
        quotient = blocks * (_ONE / scale)
    else:
        factor = top / np.maximum(_torch_max(blocks), np.float32(1e-12))
        scale, quotient = _ONE / factor, blocks * factor
    return quotient.reshape(x.shape), scale[..., 0]


def _fp8_tile(x: Array, top: np.float32) -> tuple[Array, Array]:
    """128 x 128, otherwise as the deepgemm block."""
    rows, columns = x.shape[0] // 128, x.shape[1] // 128
    tiles = x.reshape(rows, 128, columns, 128)
    scale = np.maximum(_torch_max(tiles, (1, 3)), np.float32(1e-4)) / top
    return (tiles * (_ONE / scale)).reshape(x.shape), scale.reshape(rows, columns)


# int8_quantize and int4_quantize -------------------------------------------------------------------------------------


def _integers(value: Array, low: int, high: int) -> Array:
    """Whole numbers in low..high as int8; where the value is NaN, 0."""
    return np.asarray(np.where(np.isnan(value), np.float32(0), np.clip(value, low, high)).astype(np.int8))


def int8_quantize(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """Scale max(amax / 127, 1e-5) in the format of x [m, 1]; RNE(x / scale), the quotient in binary32 (wide) or in it too."""
    fmt = _FORMATS[problem.option("x")]
    x = values(tensors["x"], fmt)
    with np.errstate(all="ignore"):
        scale = rounded(np.maximum(_torch_max(x) / np.float32(127), np.float32(1e-5)), fmt)
        quotient = x / scale if problem.option("quotient") == "wide" else rounded(x / scale, fmt)
        q = _integers(np.rint(quotient), -128, 127).view(np.uint8)
    return {"q": q, "scales": codes_of(scale, fmt), "zeros": np.zeros(scale.shape, dtype=np.uint32)}


def int4_quantize(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """q [n, k] with scales and, for `asym`, zero points [n, k / g]."""
    fmt = _FORMATS[problem.option("x")]
    x = values(tensors["x"], fmt)
    blocks, kernel = _grouped(x, problem.dim("g")), _INT4[problem.variant == "asym", problem.option("recipe")]
    with np.errstate(all="ignore"):
        q, scale, zero = kernel(blocks, fmt)
    offset = np.int8(8 if problem.variant == "uint4b8" else 0)
    stored = F16 if problem.option("recipe") == "svdquant" else fmt
    result = {"q": _nibble(q + offset).reshape(x.shape), "scales": codes_of(scale[..., 0], stored)}
    return result if zero is None else result | {"zeros": _nibble(zero[..., 0])}


def _nibble(q: Array) -> Array:
    return q.view(np.uint8) & np.uint8(15)


Int4 = tuple[Array, Array, Array | None]


def _quantize_weights(blocks: Array, fmt: Format) -> Int4:
    """Scale max(|max / 7|, |min / 8|), everything in the format of x; no guard against zero."""
    high = rounded(blocks.max(axis=-1, keepdims=True) / np.float32(7), fmt)
    low = rounded(blocks.min(axis=-1, keepdims=True) / np.float32(8), fmt)
    scale = np.maximum(np.abs(high), np.abs(low))
    return _integers(np.rint(rounded(blocks / scale, fmt)), -8, 7), scale, None


def _quantize_weights_zero(blocks: Array, fmt: Format) -> Int4:
    """Scale max(max - min, 1e-5) / 15, zero point RNE(|min / scale|), code RNE(x / scale) + zero point, bounded last."""
    top, bottom = blocks.max(axis=-1, keepdims=True), blocks.min(axis=-1, keepdims=True)
    spread = np.maximum(rounded(top - bottom, fmt), rounded(np.array(1e-5, dtype=np.float32), fmt))
    scale = rounded(spread / np.float32(15), fmt)
    zero = np.rint(np.clip(np.abs(rounded(bottom / scale, fmt)), 0, 15))
    return _integers(np.rint(rounded(blocks / scale, fmt)) + zero, 0, 15), scale, _integers(zero, 0, 15)


_EPSILON = {"bf16": np.float32(2.0**-7), "f16": np.float32(2.0**-10), "f32": np.float32(2.0**-23)}
"""What compressed-tensors puts for a scale of zero: the epsilon of its format."""


def _compressed_tensors(blocks: Array, fmt: Format) -> Int4:
    """Scale amax / 7.5; the quotient is bounded before it is rounded."""
    scale = rounded(_torch_max(blocks) / np.float32(7.5), fmt)
    scale = np.where(scale == 0, _EPSILON[fmt.name], scale)
    return _integers(np.rint(np.clip(rounded(blocks / scale, fmt), -8, 7)), -8, 7), scale, None


def _compressed_tensors_zero(blocks: Array, fmt: Format) -> Int4:
    """Scale (max - min) / 15 with 0 between them; the zero point -8 - min / scale comes from the scale before its guard."""
    top = np.maximum(blocks.max(axis=-1, keepdims=True), np.float32(0))
    bottom = np.minimum(blocks.min(axis=-1, keepdims=True), np.float32(0))
    scale = rounded(rounded(top - bottom, fmt) / np.float32(15), fmt)
    zero = np.rint(np.clip(rounded(np.float32(-8) - rounded(bottom / scale, fmt), fmt), -8, 7))
    scale = np.where(scale == 0, _EPSILON[fmt.name], scale)
    shifted = rounded(rounded(blocks / scale, fmt) + zero, fmt)
    return _integers(np.rint(np.clip(shifted, -8, 7)), -8, 7), scale, _integers(zero, -8, 7)


def _svdquant_int4(blocks: Array, fmt: Format) -> Int4:
    """Scale clamp(amax / 7, 1e-12, 65504) in binary16, which makes the floor 0; x / scale in binary32."""
    scale = rounded(np.clip(_torch_max(blocks) / np.float32(7), np.float32(1e-12), np.float32(65504)), F16)
    return _integers(np.rint(blocks / scale), -8, 7), scale, None


def _nunchaku_int4(blocks: Array, fmt: Format) -> Int4:
    """Scale amax * (1 / 7), stored in the format of x; the codes come from the scale before that rounding."""
    scale = _number_max(blocks) * (_ONE / np.float32(7))
    return _integers(np.rint(blocks * _rcp(scale)), -8, 7), rounded(scale, fmt), None


_INT4: dict[tuple[bool, str], Callable[[Array, Format], Int4]] = {
    (False, "quantize_weights"): _quantize_weights, (True, "quantize_weights"): _quantize_weights_zero,
    (False, "compressed_tensors"): _compressed_tensors, (True, "compressed_tensors"): _compressed_tensors_zero,
    (False, "svdquant"): _svdquant_int4, (False, "nunchaku"): _nunchaku_int4,
}


# nvfp4_quantize ------------------------------------------------------------------------------------------------------

_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], dtype=np.float32)
"""Halfway between neighbouring magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of E2M1."""

Fp4 = tuple[Array, Array]
"""E2M1 codes and decoded block scales."""


def nvfp4_quantize(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """q [m, k], block scales [m, k / 16] (e4m3, swizzled where asked) or [m, k / 128] (binary32), a found global scale [1]."""
    x, recipe = values(tensors["x"], _FORMATS[problem.option("x")]), problem.option("recipe")
    result: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        if recipe in _ONE_LEVEL:
            q, scale = _ONE_LEVEL[recipe](_grouped(x, 128 if recipe == "deepgemm" else 16))
        else:
            find, kernel = _TWO_LEVEL[recipe]
            g = values(tensors["global_scale"], F32) if problem.variant == "static" else find(x)
            q, scale = kernel(_grouped(x, 16), g)
            if problem.variant == "dynamic":
                result["global_scale"] = codes_of(g, F32)
    scales = codes_of(scale, F32) if recipe == "deepgemm" else narrow_codes(scale, "ue4m3")
    if problem.option("layout") == "swizzled":
        scales = swizzled(scales[..., 0], -(-x.shape[0] // 128) * 128, -(-x.shape[1] // 64) * 4)[..., None]
    return result | {"q": q.reshape(x.shape), "scales": scales[..., 0]}


def _e4m3(x: Array) -> Array:
    """Scales to the nearest e4m3 value, saturating; NaN stays."""
    table = values(np.arange(128, dtype=np.uint8), UE4M3)
    return np.take(table, narrow_codes(x, "ue4m3"))


def _signed_below_zero(magnitude: Array, x: Array) -> Array:
    """The sign bit is set where x < 0: -0 becomes +0, a small negative x becomes -0."""
    return np.asarray(magnitude & np.uint8(7)) | np.where(x < 0, np.uint8(8), np.uint8(0))


def _find_encode(x: Array, span: float, amax: Array) -> Array:
    return (np.float32(span) / amax).reshape(1)


def _vllm_global(x: Array) -> Array:
    """448 * 6 / amax: elements are multiplied by it."""
    return _find_encode(x, 2688, _number_max(x, (0, 1)))


def _vllm_reference_global(x: Array) -> Array:
    return _find_encode(x, 2688, _torch_max(x, (0, 1)))


def _vllm(blocks: Array, g: Array) -> Fp4:
    """s = e4m3(g (amax rcp(6))); x rcp(s rcp(g)), 0 where s is 0."""
    scale = _e4m3(g * (_number_max(blocks) * _SIXTH))
    inverse = np.where(scale != 0, _rcp(scale * _rcp(g)), np.float32(0))
    return narrow_codes(blocks * inverse, "e2m1"), scale


def _vllm_reference(blocks: Array, g: Array, at_zero: float = 0.0) -> Fp4:
    """The same with IEEE reciprocals and a NaN that spreads over its block."""
    scale = _e4m3(g * (_torch_max(blocks) * _SIXTH))
    inverse = np.where(scale == 0, np.float32(at_zero), _ONE / (scale * (_ONE / g)))
    return narrow_codes(blocks * inverse, "e2m1"), scale


def _vllm_emulation(blocks: Array, g: Array) -> Fp4:
    return _vllm_reference(blocks, g, 1e-8)


def _compressed_tensors_global(x: Array) -> Array:
    """448 * 6 / amax; 1 where that is not finite."""
    g = _vllm_reference_global(x)
    return np.asarray(np.where(np.isfinite(g), g, _ONE))


def _compressed_tensors_nvfp4(blocks: Array, g: Array) -> Fp4:
    """s = e4m3(g (amax / 6)), 0.125 where that is 0; x / (s / g)."""
    scale = _e4m3(g * (_torch_max(blocks) / np.float32(6)))
    scale = np.where(scale == 0, np.float32(0.125), scale)
    return narrow_codes(blocks / (scale / g), "e2m1"), scale


def _decode_global(x: Array) -> Array:
    """amax / (6 * 448): values are multiplied by it."""
    return (_torch_max(x, (0, 1)) / np.float32(2688)).reshape(1)


def _modelopt(blocks: Array, d: Array) -> Fp4:
    """s = amax / (6 d), 1 where that is 0, in 2^-9..448; x / (s d)."""
    scale = _torch_max(blocks) / (np.float32(6) * d)
    scale = _e4m3(np.clip(np.where(scale == 0, _ONE, scale), np.float32(2.0**-9), np.float32(448)))
    quotient = blocks / (scale * d)
    return _signed_below_zero(narrow_codes(quotient, "e2m1"), np.where(np.isnan(quotient), _ONE, blocks)), scale


def _torchao(blocks: Array, d: Array) -> Fp4:
    """s = (amax / 6) / d in 2^-6..448; x ((1 / d) / s)."""
    scale = _torch_max(blocks) / np.float32(6) / d
    scale = _e4m3(np.clip(scale, np.float32(2.0**-6), np.float32(448)))
    return narrow_codes(blocks * ((_ONE / d) / scale), "e2m1"), scale


def _guarded_global(x: Array, span: float) -> Array:
    """span / amax, at most the largest binary32 value; 1 where amax is 0."""
    amax = _torch_max(x, (0, 1))
    return np.where(amax == 0, _ONE, np.minimum(np.float32(span) / amax, _HUGE)).reshape(1)


def _transformer_engine_global(x: Array) -> Array:
    return _guarded_global(x, 2688)


def _transformer_engine(blocks: Array, g: Array) -> Fp4:
    """s = e4m3(amax (g fl(1/6))), which may be 0; x min(1 / (s (1 / g)), largest)."""
    scale = _e4m3(_torch_max(blocks) * (g * _SIXTH))
    inverse = np.minimum(_ONE / (scale * (_ONE / g)), _HUGE)
    return narrow_codes(blocks * inverse, "e2m1"), scale


def _four_over_six_global(x: Array) -> Array:
    return _guarded_global(x, 6 * 256)


def _four_over_six(blocks: Array, g: Array) -> Fp4:
    """s = e4m3(g (amax / 6)) and e4m3(1.5 g (amax / 6)), by block whichever has the smaller squared error, the first at a tie."""
    wide = g * (_torch_max(blocks) / np.float32(6))
    found: list[tuple[Array, Array, Array]] = []
    for scale in (_e4m3(wide), _e4m3(wide * np.float32(1.5))):
        inverse = np.where(scale == 0, np.float32(0), _ONE / (scale * (_ONE / g)))
        codes = _signed_below_zero(narrow_codes(blocks * inverse, "e2m1"), blocks)
        decoded = values(codes, E2M1).astype(np.float64) * scale / g
        found.append((codes, scale, np.square(blocks - decoded).sum(axis=-1, keepdims=True)))
    (codes_6, scale_6, error_6), (codes_4, scale_4, error_4) = found
    four = error_4 < error_6
    return np.where(four, codes_4, codes_6), np.where(four, scale_4, scale_6)


def _svdquant(blocks: Array) -> Fp4:
    """s = e4m3(clamp(amax / 6, 1e-12, 448)), which may be 0; x / s, ties away from zero."""
    return _svdquant_codes(blocks, _torch_max(blocks) / np.float32(6))


def _svdquant_triton(blocks: Array) -> Fp4:
    """The same from amax * (1 / 6)."""
    return _svdquant_codes(blocks, _torch_max(blocks) * _SIXTH)


def _svdquant_codes(blocks: Array, scale: Array) -> Fp4:
    scale = _e4m3(np.clip(scale, np.float32(1e-12), np.float32(448)))
    quotient = blocks / scale
    steps = np.searchsorted(_TIES, np.abs(quotient), side="right").astype(np.uint8)
    return _signed_below_zero(np.where(np.isnan(quotient), np.uint8(0), steps), np.where(np.isnan(quotient), 0, blocks)), scale


def _nunchaku(blocks: Array) -> Fp4:
    """s = min(amax * (1 / 6), 448), stored in e4m3; x rcp(s before that rounding)."""
    scale = np.minimum(_number_max(blocks) * _SIXTH, np.float32(448))
    return narrow_codes(blocks * _rcp(scale), "e2m1"), _e4m3(scale)


def _deepgemm(blocks: Array) -> Fp4:
    """s = max(amax, 1e-4) / 6 in binary32; x (1 / s), ties toward zero, no -0."""
    scale = np.maximum(_torch_max(blocks), np.float32(1e-4)) / np.float32(6)
    quotient = blocks * (_ONE / scale)
    steps = np.searchsorted(_TIES, np.abs(quotient), side="left").astype(np.uint8)
    steps[np.isnan(quotient)] = 0
    return np.where((steps > 0) & (quotient < 0), steps + np.uint8(8), steps), scale


_TWO_LEVEL: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Fp4]]] = {
    "vllm": (_vllm_global, _vllm), "vllm_reference": (_vllm_reference_global, _vllm_reference),
    "vllm_emulation": (_vllm_reference_global, _vllm_emulation),
    "compressed_tensors": (_compressed_tensors_global, _compressed_tensors_nvfp4),
    "modelopt": (_decode_global, _modelopt), "torchao": (_decode_global, _torchao),
    "transformer_engine": (_transformer_engine_global, _transformer_engine),
    "four_over_six": (_four_over_six_global, _four_over_six),
}
_ONE_LEVEL: dict[str, Callable[[Array], Fp4]] = {
    "svdquant": _svdquant, "svdquant_triton": _svdquant_triton, "nunchaku": _nunchaku, "deepgemm": _deepgemm,
}


# svdquant_quantize ---------------------------------------------------------------------------------------------------


def svdquant_quantize(problem: Problem, tensors: Tensors) -> dict[str, Array]:
    """q, scales and lora_act for ceil(m / 256) * 256 rows, zero from m on. Codes are of x / smooth, lora_act is of x itself.

    q: [rows, k]. scales: [k / 16, rows] (e4m3) or [k / 64, rows] (16 bits). lora_act: binary32 [rows, r].
    """
    fmt, recipe = _FORMATS[problem.option("x")], problem.option("recipe")
    x, factors, down = (values(tensors[name], fmt) for name in ("x", "smooth", "lora_down"))
    rows = -(-x.shape[0] // 256) * 256
    with np.errstate(all="ignore"):
        smoothed = rounded(x / factors, fmt) if recipe == "nunchaku" else x / factors
        if problem.variant == "nvfp4":
            q, scale = _ONE_LEVEL[recipe](_grouped(smoothed, 16))
            stored = narrow_codes(scale[..., 0], "ue4m3")
        else:
            integers, scale, _ = _INT4[False, recipe](_grouped(smoothed, 64), fmt)
            q, stored = _nibble(integers), codes_of(scale[..., 0], F16 if recipe == "svdquant" else fmt)
        projected = x.astype(np.float64) @ down.astype(np.float64)
    return {
        "q": _with_rows(q.reshape(x.shape), rows), "scales": _with_rows(stored, rows).T,
        "lora_act": _with_rows(codes_of(projected, F32), rows),
    }


def _with_rows(codes: Array, rows: int) -> Array:
    """`codes` with zeros below it."""
    return np.concatenate((codes, np.zeros((rows - codes.shape[0], codes.shape[1]), dtype=codes.dtype)))


def declare_projection(problem: Problem) -> Declaration:
    """lora_act of svdquant_quantize: one sum over K in binary64, then binary32. Codes and scales are fixed by the contract."""
    projection = Contraction(("x", "lora_down"), DATAPATHS["ieee_f64"], order=Order.UNKNOWN)
    return Declaration((projection, cast(F32)), batch_invariant=False)


QUANTISERS: dict[str, Callable[[Problem, Tensors], dict[str, Array]]] = {
    "fp8_quantize": fp8_quantize, "int8_quantize": int8_quantize, "int4_quantize": int4_quantize,
    "nvfp4_quantize": nvfp4_quantize, "svdquant_quantize": svdquant_quantize,
}
"""Kernels by op."""
