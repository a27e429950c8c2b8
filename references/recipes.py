"""Recipes: how a matrix of numbers becomes scales and codes, one record per source system.

Decides: `RECIPES`, the rules of every source system by name, and `DISAGREEMENTS`, an input for each place where two of them
differ in bits. What a record means is said by recipe_records, computed for one block by recipe_definition
(`quantise_block_scalar`) and for matrices by recipe_arrays (`quantise`, `admissible_codes`, `smooth`);
all of it is imported from here.
Refuses: a recipe that is not a record, and a number of a source system without its source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E8M0,
    F16,
    F32,
    INT4,
    INT8,
    UE4M3,
    UINT4,
    Format,
    Kind,
    Reals,
    container,
    decode,
)
from lowbit.references.recipe_arrays import Smoothed, Smoothing, admissible_codes, global_scale_of, quantise, smooth
from lowbit.references.recipe_definition import quantise_block_scalar
from lowbit.references.recipe_records import (
    CONSTANTS,
    INF_F32,
    MAX_F32,
    BlockCodes,
    Choice,
    Division,
    Effective,
    GlobalGuard,
    GlobalRule,
    Join,
    Keys,
    Mask,
    NanAmax,
    NanCode,
    Order,
    Quantised,
    Recipe,
    Statistic,
    Using,
    Value,
    Width,
    ZeroPoint,
    ZeroScale,
    ZeroSign,
    constants,
    float_bits,
    float_value,
)
from lowbit.references.rounding import Rounding

__all__ = [
    "CONSTANTS", "DISAGREEMENTS", "RECIPES", "BlockCodes", "Choice", "Disagreement", "Division", "Effective", "GlobalGuard",
    "GlobalRule", "Join", "Keys", "Mask", "NanAmax", "NanCode", "Order", "Quantised", "Recipe", "Smoothed", "Smoothing",
    "Statistic", "Using", "Value", "Width", "ZeroPoint", "ZeroScale", "ZeroSign", "admissible_codes", "constants", "float_bits",
    "float_value", "global_scale_of", "quantise", "quantise_block_scalar", "smooth",
]

_VLLM = "vLLM 28be48fa"
_CT = "compressed-tensors ac8e2ba8"
_SVDQUANT = "svdquant-kernels 7885f31"
_NUNCHAKU = "nunchaku 3a3cc3d"
_RCP = "rcp.approx.ftz.f32: at most 1 ulp, PTX ISA"


def _record(name: str, source: str, element: Format, bound: float, base: Recipe | None = None, **fields: Any) -> Recipe:
    """`base` with another name, source, element and symmetric bounds, and the given fields."""
    low = -bound if element.kind is Kind.FLOAT else -bound - 1
    symmetric = {"low": float_bits(low), "high": float_bits(bound)}
    return replace(base or _IEEE, name=name, source=source, element=element, **(symmetric | fields))


_IEEE = Recipe(
    name="", source="", element=E4M3FN, low=0, high=0, scale=F32, block_rows=1, block_k=0, static=0, scale_ub=0,
    statistic=Statistic.ABSMAX, include_zero=0, nan_amax=NanAmax.IGNORED, amax_floor=0, divisor=float_bits(1.0), divisor_low=0,
    scale_division=Division.DIVIDE, arithmetic=Width.F32, scale_floor=0, scale_cap=INF_F32, zero_scale=ZeroScale.KEPT,
    scale_rounding=Rounding.RNE, global_rule=GlobalRule.NONE, global_range=float_bits(2688.0), global_guard=GlobalGuard.NONE,
    join=Join.NONE, using=Using.STORED, effective=Effective.SCALE, apply=Division.DIVIDE, quotient=Width.F32,
    zero_inverse=INF_F32, inverse_cap=INF_F32, reciprocal_ulps=0, flush=0, zero_point=ZeroPoint.NONE, order=Order.ROUND_FIRST,
    code_offset=0, rounding=Rounding.RNE, nan_code=NanCode.NAN, zero_sign=ZeroSign.SIGN_BIT, choice=Choice.NONE, second=0,
)


def _fp8(suffix: str, element: Format, top: float, finfo_max: float) -> tuple[Recipe, ...]:
    """The fp8 recipes of one format. `top`: the range scales are made for; `finfo_max`: the largest value of the format."""
    native: dict[str, Any] = {"divisor": float_bits(top), "nan_amax": NanAmax.PROPAGATED, "apply": Division.RECIPROCAL}
    kernel: dict[str, Any] = {"divisor": float_bits(top), "nan_code": NanCode.HIGH}
    floor: dict[str, Any] = {"scale_floor": float_bits(1.0 / (top * 512.0))}
    static, tensor = f"{_VLLM} static_scaled_fp8_quant", f"{_VLLM} dynamic_scaled_fp8_quant"
    token, group = f"{_VLLM} dynamic_per_token_scaled_fp8_quant", f"{_VLLM} per_token_group_quant_fp8"
    forward, scaled, deepgemm = f"{_VLLM} QuantFP8.forward_native", f"{_VLLM} scaled_quantize", "DeepGEMM per_token_cast_to_fp8"
    return (
        _record(f"vllm_fp8_static{suffix}", f"{static}: clamp(x * (1 / scale))", element, top, **kernel, static=1,
                apply=Division.RECIPROCAL),
        _record(f"vllm_fp8_tensor{suffix}", f"{tensor}: no floor, reciprocal", element, top, **kernel, block_rows=0,
                apply=Division.RECIPROCAL),
        _record(f"vllm_fp8_token{suffix}", f"{token}: floor 1 / (max * 512), division", element, top, **kernel, **floor,
                scale_ub=1),
        _record(f"vllm_native_fp8_static{suffix}", forward, element, top, **native, static=1),
        _record(f"vllm_native_fp8_tensor{suffix}", forward, element, top, **native, **floor, block_rows=0),
        _record(f"vllm_native_fp8_token{suffix}", forward, element, top, **native, **floor, scale_ub=1),
        _record(f"vllm_fp8_scaled_quantize{suffix}", f"{scaled}: x * (max / amax), returns the inverse; bounds of the format",
                element, finfo_max, divisor=float_bits(top), nan_amax=NanAmax.PROPAGATED, amax_floor=float_bits(1e-12),
                scale_division=Division.INVERSE, block_k=128),
        _record(f"vllm_fp8_group128{suffix}", f"{group}: amax >= 1e-10, division, fminf(fmaxf(v, low), high)", element, top,
                **(kernel | {"nan_code": NanCode.LOW}), block_k=128, amax_floor=float_bits(1e-10)),
        _record(f"deepgemm_fp8_1x128{suffix}", f"{deepgemm}: max(amax, 1e-4) / max, x * (1 / sf)", element, top, **native,
                block_k=128, amax_floor=float_bits(1e-4)),
        _record(f"deepgemm_fp8_128x128{suffix}", f"{deepgemm}, 128 x 128 blocks of weights", element, top, **native,
                block_rows=128, block_k=128, amax_floor=float_bits(1e-4)),
    )


_XPU = "vLLM dynamic_per_token_int8_quant_ref: max(amax / 127, 1e-5) rounded to the format of x"
_INT8 = _record(
    "xpu_int8_token", _XPU + "; quotient in binary32", INT8, 127.0, scale=None, nan_amax=NanAmax.PROPAGATED,
    divisor=float_bits(127.0), scale_floor=float_bits(1e-5), nan_code=NanCode.UNDEFINED,
)

_Q1 = f"{_VLLM} quantize_weights, all arithmetic in the format of the weight"
_WEIGHT: dict[str, Any] = {
    "scale": None, "nan_amax": NanAmax.PROPAGATED, "arithmetic": Width.INPUT, "quotient": Width.INPUT, "block_k": 128,
}
_PAIR: dict[str, Any] = _WEIGHT | {
    "statistic": Statistic.SIGNED_PAIR, "divisor": float_bits(7.0), "divisor_low": float_bits(8.0),
    "nan_code": NanCode.UNDEFINED_INFINITE,
}
_SEVEN: dict[str, Any] = {"divisor": float_bits(7.0), "block_k": 64}
_INT4 = (
    _record("vllm_int4", f"{_Q1}: max(max/7, |min|/8)", INT4, 7.0, **_PAIR),
    _record("vllm_uint4b8", f"{_Q1}: max(max/7, |min|/8), codes + 8", UINT4, 7.0, **_PAIR, code_offset=8),
    _record("vllm_uint4_zero", f"{_Q1}: max(max - min, 1e-5) / 15, zero point RNE(|min / s|)", UINT4, 15.0, **_WEIGHT,
            low=0, statistic=Statistic.RANGE, divisor=float_bits(15.0), amax_floor=float_bits(1e-5),
            zero_point=ZeroPoint.RATIO, nan_code=NanCode.UNDEFINED_INFINITE),
    _record("compressed_tensors_int4", f"{_CT}: absmax / 7.5, zero scale -> eps of its format", INT4, 7.0, **_WEIGHT,
            divisor=float_bits(7.5), zero_scale=ZeroScale.EPSILON, order=Order.CLAMP_FIRST, nan_code=NanCode.UNDEFINED),
    _record("compressed_tensors_int4_zero", f"{_CT}: (max - min) / 15 with 0 in the range, zero point RNE(-8 - min / s)", INT4,
            7.0, **_WEIGHT, statistic=Statistic.RANGE, include_zero=1, divisor=float_bits(15.0), zero_scale=ZeroScale.EPSILON,
            zero_point=ZeroPoint.SHIFTED, order=Order.CLAMP_FIRST, nan_code=NanCode.UNDEFINED),
    _record("svdquant_int4", f"{_SVDQUANT} quantize_int4_rows: binary16 scale clamp(amax / 7, 1e-12, 65504), x / s", INT4, 7.0,
            **_SEVEN, scale=F16, nan_amax=NanAmax.PROPAGATED, scale_floor=float_bits(1e-12), scale_cap=float_bits(65504.0),
            nan_code=NanCode.UNDEFINED),
    _record("nunchaku_int4", f"{_NUNCHAKU}: amax * (1/7), stored in the format of x, x * rcp(unrounded); {_RCP}", INT4, 7.0,
            **_SEVEN, scale=None, scale_division=Division.RECIPROCAL, using=Using.UNROUNDED, apply=Division.APPROXIMATE,
            reciprocal_ulps=1, flush=1, nan_code=NanCode.ZERO),
)

_NVFP4 = _record(
    "", "", E2M1, 6.0, scale=UE4M3, block_k=16, divisor=float_bits(6.0), nan_code=NanCode.HIGH, scale_cap=float_bits(448.0)
)
_TORCH: dict[str, Any] = {"base": _NVFP4, "nan_amax": NanAmax.PROPAGATED}
_ENCODE: dict[str, Any] = {"global_rule": GlobalRule.ENCODE, "join": Join.TIMES_QUOTIENT}
_DECODE: dict[str, Any] = {"global_rule": GlobalRule.DECODE}
_VLLM_NVFP4: dict[str, Any] = _ENCODE | {"effective": Effective.TIMES_RECIPROCAL, "zero_inverse": 0}
_SVDQUANT_NVFP4: dict[str, Any] = _TORCH | {
    "scale_floor": float_bits(1e-12), "rounding": Rounding.RNA, "nan_code": NanCode.ZERO, "zero_sign": ZeroSign.NEGATIVE,
}
_NVFP4S = (
    _record("vllm_nvfp4", f"{_VLLM} scaled_fp4_quant: g * (amax * rcp(6)), x * rcp(s * rcp(g)); {_RCP}", E2M1, 6.0, _NVFP4,
            **_VLLM_NVFP4, scale_division=Division.APPROXIMATE, apply=Division.APPROXIMATE, reciprocal_ulps=1, flush=1),
    _record("vllm_nvfp4_reference", f"{_VLLM} test reference and FlashInfer: as the kernel, with IEEE reciprocals", E2M1, 6.0,
            **_TORCH, **_VLLM_NVFP4, scale_division=Division.RECIPROCAL, apply=Division.RECIPROCAL),
    _record("vllm_nvfp4_emulation", f"{_VLLM} NVFP4 emulation: as the test reference, 1 / 0 -> 1e-8", E2M1, 6.0,
            **_TORCH, **(_VLLM_NVFP4 | {"zero_inverse": float_bits(1e-8)}), scale_division=Division.RECIPROCAL,
            apply=Division.RECIPROCAL),
    _record("compressed_tensors_nvfp4", f"{_CT} nvfp4-pack-quantized: g * (amax / 6), zero scale -> 0.125, x / (s / g)", E2M1,
            6.0, **_TORCH, **_ENCODE, global_guard=GlobalGuard.FINITE, zero_scale=ZeroScale.EPSILON,
            effective=Effective.OVER_GLOBAL, nan_code=NanCode.UNDEFINED),
    _record("svdquant_nvfp4", f"{_SVDQUANT} baseline: clamp(amax / 6, 1e-12, 448), x / s, ties away", E2M1, 6.0,
            **_SVDQUANT_NVFP4),
    _record("svdquant_nvfp4_triton", f"{_SVDQUANT} Triton: amax * (1/6), otherwise the baseline", E2M1, 6.0, **_SVDQUANT_NVFP4,
            scale_division=Division.RECIPROCAL),
    _record("nunchaku_nvfp4", f"{_NUNCHAKU}: min(amax * (1/6), 448), x * rcp(unrounded); {_RCP}", E2M1, 6.0, _NVFP4,
            scale_division=Division.RECIPROCAL, using=Using.UNROUNDED, apply=Division.APPROXIMATE, reciprocal_ulps=1, flush=1),
    _record("modelopt_nvfp4", "TensorRT Model Optimizer NVFP4QTensor: amax / (6 * d), 0 -> 1, [2^-9, 448], x / (s * d)", E2M1,
            6.0, **_TORCH, **_DECODE, join=Join.OVER_PRODUCT, zero_scale=ZeroScale.ONE, scale_floor=float_bits(2.0**-9),
            effective=Effective.TIMES_GLOBAL, zero_sign=ZeroSign.NEGATIVE),
    _record("torchao_nvfp4", "torchao nvfp4_quantize: (amax / 6) / d, clamp [2^-6, 448], x * ((1 / d) / s)", E2M1, 6.0, **_TORCH,
            **_DECODE, join=Join.OVER_QUOTIENT, scale_floor=float_bits(2.0**-6), effective=Effective.RECIPROCAL_OVER,
            apply=Division.RECIPROCAL, nan_code=NanCode.UNDEFINED),
    _record("transformer_engine_nvfp4", "Transformer Engine: amax * (g * fl(1/6)), x * min(1 / (s * (1 / g)), FLT_MAX)", E2M1,
            6.0, **_TORCH, global_rule=GlobalRule.ENCODE, global_guard=GlobalGuard.NONZERO, join=Join.TIMES_CONSTANT,
            scale_division=Division.RECIPROCAL, effective=Effective.TIMES_RECIPROCAL, apply=Division.RECIPROCAL,
            zero_inverse=MAX_F32, inverse_cap=MAX_F32),
    _record("four_over_six_nvfp4", "fouroversix, arXiv 2512.02010: range 6 * 256, s and 1.5 s, smaller squared error", E2M1, 6.0,
            **_TORCH, **_ENCODE, global_range=float_bits(1536.0), global_guard=GlobalGuard.NONZERO,
            effective=Effective.TIMES_RECIPROCAL, apply=Division.RECIPROCAL, zero_inverse=0, nan_code=NanCode.UNDEFINED,
            zero_sign=ZeroSign.NEGATIVE, choice=Choice.SQUARED_ERROR, second=float_bits(1.5)),
    _record("deepgemm_fp4", "DeepGEMM per_token_cast_to_fp4: max(amax, 1e-4) / 6, x * (1 / sf), ties toward zero, no -0", E2M1,
            6.0, **_TORCH, scale=F32, scale_cap=INF_F32, block_k=128, amax_floor=float_bits(1e-4), apply=Division.RECIPROCAL,
            rounding=Rounding.RNTZ, nan_code=NanCode.ZERO, zero_sign=ZeroSign.PLUS),
)

_MX: dict[str, Any] = {"base": _NVFP4, "scale": E8M0, "scale_cap": INF_F32, "block_k": 32, "divisor": float_bits(4.0)}
_MXFP4S = (
    _record("mxfp4_floor", "OCP MX 1.0, microxcaling, torchao default: 2^(floor(log2 amax) - 2)", E2M1, 6.0, **_MX,
            scale_rounding=Rounding.FLOOR),
    _record("mxfp4_ceil", "torchao CEIL: 2^(ceil(log2 amax) - 2)", E2M1, 6.0, **_MX, scale_rounding=Rounding.CEIL),
    _record("mxfp4_rceil", "cuBLAS, torchao RCEIL: amax / 6 up to a power of two, PTX cvt.rp.ue8m0", E2M1, 6.0,
            **(_MX | {"divisor": float_bits(6.0)}), scale_rounding=Rounding.CEIL),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *_fp8("", E4M3FN, 448.0, 448.0),
        # vLLM makes fnuz scales for 224, not for the largest value 240 (get_fp8_min_max). DeepGEMM has no fnuz of its own.
        *_fp8("_fnuz", E4M3FNUZ, 224.0, 240.0),
        _INT8,
        replace(_INT8, name="xpu_int8_token_eager", source=_XPU + "; quotient rounded to it too", quotient=Width.INPUT),
        *_INT4,
        *_NVFP4S,
        *_MXFP4S,
    )
}
"""Every recipe by name. Group sizes of int4 recipes are those of the source; use dataclasses.replace for another `block_k`."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An input on which two recipes give different codes, scales or zero points.

    The input is one row of K = 128: `values`, codes of `x_format`, repeated. `global_scale`, a binary32 pattern, is given to both
    recipes where it is not 0. `item`: 1 scale rule, 2 scale in use, 3 division, 4 ties, 5 global scale, 6 zero block, 11 range.
    """

    item: int
    first: str
    second: str
    x_format: Format
    values: tuple[int, ...]
    global_scale: int
    about: str

    @property
    def x(self) -> Reals:
        """The row, [1, 128]."""
        return decode(np.resize(np.array(self.values, dtype=container(self.x_format)), (1, 128)), self.x_format)


_ZERO, _ONE_F32 = (0,), float_bits(1.0)

DISAGREEMENTS: tuple[Disagreement, ...] = (
    # binary16: 0x4700 = 7, 0xC700 = -7, 0x4300 = 3.5
    Disagreement(1, "svdquant_int4", "compressed_tensors_int4", F16, (0x4700, 0), 0, "int4 scale 7/7 or 7/7.5"),
    Disagreement(1, "svdquant_int4", "vllm_int4", F16, (0xC700, 0x4300), 0, "int4 scale 7/7 or max(3.5/7, 7/8)"),
    Disagreement(1, "compressed_tensors_int4", "vllm_int4", F16, (0xC700, 0x4300), 0, "int4 scale 7/7.5 or max(3.5/7, 7/8)"),
    # bf16: 0x40CC = 6.375, whose scale 1.0625 is stored as 1; 0x40A6 = 5.1875
    Disagreement(2, "svdquant_nvfp4", "nunchaku_nvfp4", BF16, (0x40CC, 0x40A6), 0, "stored or unrounded scale in use"),
    Disagreement(3, "vllm_fp8_token", "vllm_native_fp8_token", F16, (0x3BF8, 0x39FA), 0, "division or reciprocal of the scale"),
    Disagreement(3, "vllm_fp8_group128", "vllm_fp8_scaled_quantize", F16, (0x3BDC, 0x35E5), 0, "amax / 448 or 448 / amax"),
    # just below 0.111328125 = 6 * (2^-6 + 2^-9 * 1.5), six times a midpoint of e4m3
    Disagreement(3, "svdquant_nvfp4", "svdquant_nvfp4_triton", F32, (0x3DE3FFFF,), 0, "amax / 6 or amax * fl(1/6)"),
    Disagreement(3, "vllm_nvfp4_reference", "compressed_tensors_nvfp4", BF16, (0xC00A, 0x3FA1), 0, "reciprocals or divisions"),
    Disagreement(3, "modelopt_nvfp4", "torchao_nvfp4", BF16, (0x3FB4, 0x3F96), 0, "x / (s * d) or x * ((1 / d) / s)"),
    Disagreement(3, "xpu_int8_token", "xpu_int8_token_eager", BF16, (0x403E, 0xBFE1), 0, "quotient in binary32 or in bf16"),
    # binary16: 6, 0.25, 1.25, 2.5, 5 and 6, 0.75, 1.75, 3.5
    Disagreement(4, "nunchaku_nvfp4", "svdquant_nvfp4", F16, (0x4600, 0x3400, 0x3D00, 0x4100, 0x4500), 0, "ties to even or away"),
    Disagreement(4, "nunchaku_nvfp4", "deepgemm_fp4", F16, (0x4600, 0x3A00, 0x3F00, 0x4300), 0, "ties to even or toward zero"),
    Disagreement(5, "compressed_tensors_nvfp4", "modelopt_nvfp4", F16, (0x4600,), 0, "global scale 2688 / amax or amax / 2688"),
    Disagreement(5, "compressed_tensors_nvfp4", "svdquant_nvfp4", F16, (0x4600,), 0, "global scale or none"),
    Disagreement(5, "four_over_six_nvfp4", "compressed_tensors_nvfp4", F16, (0x4600,), 0, "global scale for 256 or for 448"),
    Disagreement(6, "vllm_nvfp4_reference", "compressed_tensors_nvfp4", F16, _ZERO, _ONE_F32, "zero block: scale 0 or 0.125"),
    Disagreement(6, "vllm_nvfp4_reference", "transformer_engine_nvfp4", F16, (0x1400,), _ONE_F32,
                 "underflowed scale: codes 0 or +-6"),
    Disagreement(6, "vllm_nvfp4_reference", "vllm_nvfp4_emulation", F32, (float_bits(2.0**30),), float_bits(2.0**-60),
                 "underflowed scale: inverse 0 or 1e-8"),
    Disagreement(6, "svdquant_nvfp4", "nunchaku_nvfp4", F16, _ZERO, 0, "zero block: 0/0 gives code 0 or +6"),
    Disagreement(6, "modelopt_nvfp4", "torchao_nvfp4", F16, _ZERO, _ONE_F32, "zero block: scale 1 or 2^-6"),
    Disagreement(6, "vllm_fp8_token", "vllm_fp8_tensor", F16, _ZERO, 0, "zero row: floor, or scale 0 and codes 0x7E"),
    Disagreement(6, "vllm_fp8_token", "deepgemm_fp8_1x128", F16, _ZERO, 0, "zero row: floor 1/(448*512) or amax 1e-4"),
    Disagreement(6, "vllm_int4", "compressed_tensors_int4", F16, _ZERO, 0, "zero group: undefined, or eps"),
    Disagreement(6, "vllm_uint4_zero", "compressed_tensors_int4_zero", F16, _ZERO, 0, "zero group: range 1e-5, or undefined"),
    Disagreement(6, "svdquant_int4", "nunchaku_int4", F16, _ZERO, 0, "zero group: undefined, or code 0"),
    Disagreement(11, "vllm_fp8_token", "vllm_fp8_token_fnuz", F16, (0x4600,), 0, "range 448 or 224"),
    Disagreement(1, "vllm_uint4_zero", "compressed_tensors_int4_zero", F16, (0x4700, 0x3C00), 0, "range without or with 0"),
)
"""Every place where the source systems' conventions differ in bits, one constructed input each."""
