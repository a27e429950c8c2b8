"""The recipes: definition against array twin, examples by hand, witnesses in binary32, admissible sets by enumeration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from enum import IntEnum
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    F16,
    F32,
    INT8,
    UE4M3,
    UINT4,
    Format,
    Reals,
    Special,
    decode,
    decode_scalar,
    order_key,
)
from lowbit.references.recipes import (
    CONSTANTS,
    DISAGREEMENTS,
    RECIPES,
    Choice,
    Disagreement,
    Division,
    Effective,
    GlobalGuard,
    GlobalRule,
    Join,
    NanAmax,
    NanCode,
    Order,
    Quantised,
    Recipe,
    Smoothing,
    Statistic,
    Using,
    Value,
    Width,
    ZeroPoint,
    ZeroScale,
    ZeroSign,
    admissible_codes,
    constants,
    float_bits,
    float_value,
    global_scale_of,
    quantise,
    quantise_block_scalar,
    smooth,
)
from lowbit.references.rounding import Rounding, encode, round_to

f32 = np.float32
INF, NAN = float("inf"), float("nan")


def exact(value: float) -> Value:
    """A Python float as the scalar definition takes it."""
    if value != value:
        return Special.NAN
    if value in (INF, -INF):
        return Special.POS_INF if value > 0 else Special.NEG_INF
    return Special.NEG_ZERO if value == 0 and np.signbit(value) else Fraction(value)


def small(recipe: Recipe, k: int = 16) -> Recipe:
    """The recipe with blocks of one row and k elements, so that one block is one row."""
    return replace(recipe, block_rows=1, block_k=k)


def run(recipe: Recipe, x: np.ndarray[Any, Any], fmt: Format, **options: Any) -> Quantised:
    if recipe.static:
        options.setdefault("static_scale", np.full((1, 1), 0.0123291015625))
    return quantise(np.asarray(x, dtype=np.float64), fmt, recipe, **options)


def hard_rows(fmt: Format) -> Reals:
    """Rows of 16 values of `fmt` that sit on the edges: ties, zeros, specials, scales that underflow or overflow."""
    ties = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5]
    halves = [7, 6.5, 5.5, 4.5, 3.5, 2.5, 1.5, 0.5, -7.5, -6.5, -5.5, -4.5, -3.5, -2.5, -1.5, -0.5]
    tiny = float(fmt.max_finite) if fmt is F16 else 2.0**100
    least = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    mixed = [1.0, -0.0, 0.0, 0.5, -1.5, 3.0, -8.0, 2.25, 0.1, -0.7, 0.001, 1e-5, -1e-5, 4.0, -0.3, 7.99]
    rows = [
        ties, halves, [0.0] * 16, [-0.0, 0.0] * 8, [*mixed], [v * 448 for v in ties], [v * 64 for v in halves],
        [least * (i - 8) for i in range(16)], [tiny, -tiny, *[0.0] * 6, *mixed[:8]], [1.0, NAN, *mixed[2:]], [INF, *mixed[1:]],
        [-INF, INF, NAN, *mixed[3:]], [NAN] * 16, [0.0] * 15 + [6.375], [5.1875, 6.375, *mixed[:14]], [abs(v) for v in mixed],
        [-abs(v) - 0.125 for v in mixed], [0.001 * i for i in range(16)], [2.0**-9 * 6 * (1 + i / 16) for i in range(16)],
        [0.0059] * 8 + [0.0058, 0.003, -0.0059, 0.0, -0.0, 0.001, -0.001, 0.0059],
    ]
    rng = np.random.default_rng(11)
    return np.concatenate([round_to(np.array(rows), fmt), round_to(rng.standard_normal((12, 16)), fmt)])


@pytest.mark.parametrize("fmt", [F16, BF16, F32], ids=repr)
@pytest.mark.parametrize("name", RECIPES)
def test_array_twin_is_the_definition(name: str, fmt: Format) -> None:
    recipe = small(RECIPES[name])
    globals_: list[float | None] = [None] if recipe.global_rule is GlobalRule.NONE else [1.0, 448.0, 2.0**-30, 0.0126953125]
    statics: list[float | None] = [0.0123291015625, 0.0, -0.5, INF, NAN, 2.0**-140] if recipe.static else [None]
    for g in globals_:
        for static in statics:
            for ub in (None, 0.75) if recipe.scale_ub else (None,):
                x = hard_rows(fmt)
                given = None if static is None else np.full((1, 1), static)
                options: dict[str, Any] = {"static_scale": given, "scale_ub": ub, "global_scale": g}
                got = quantise(x, fmt, recipe, **options)
                for r, row in enumerate(x):
                    want = quantise_block_scalar(
                        [exact(v) for v in row], fmt, recipe, static_scale=None if static is None else exact(static),
                        scale_ub=None if ub is None else exact(ub), global_scale=Fraction(1) if g is None else exact(g),
                    )
                    where = (name, fmt.name, g, static, ub, r, row.tolist())
                    codes = tuple(None if u else int(c) for c, u in zip(got.codes[r], got.undefined[r], strict=True))
                    assert codes == want.codes, where
                    if static is None:
                        assert int(got.scales[r, 0]) == want.scale, where
                    if got.zero_points is not None:
                        zero = None if got.undefined_zero_points[r, 0] else int(got.zero_points[r, 0])
                        assert zero == want.zero_point, where


def test_blocks_are_what_the_record_says() -> None:
    """Shapes, and that each scale covers its own block: one distinct power of two per 128 x 128 block."""
    x = np.ones((256, 384)) * np.repeat(np.repeat(2.0 ** np.arange(6).reshape(2, 3), 128, axis=0), 128, axis=1)
    want = 2.0 ** np.arange(6).reshape(2, 3)
    block = run(RECIPES["deepgemm_fp8_128x128"], x * 448, F32)
    assert np.array_equal(decode(block.scales, F32), want)
    assert (block.codes == 0x7E).all()
    assert np.array_equal(decode(run(RECIPES["deepgemm_fp8_1x128"], x * 448, F32).scales, F32), np.repeat(want, 128, axis=0))
    assert np.array_equal(decode(run(RECIPES["vllm_fp8_token"], x * 448, F32).scales, F32), np.repeat(want[:, 2:], 128, axis=0))
    tensor = run(RECIPES["vllm_fp8_tensor"], x * 448, F32)
    assert decode(tensor.scales, F32).tolist() == [[32.0]]
    assert tensor.codes[0, 0] == 0x56  # 448 / 32 = 14 = 1.75 * 2^3: exponent field 10, mantissa 6


def test_static_scales_cover_the_blocks_they_divide() -> None:
    static = np.array([[1.0, 2.0], [4.0, 8.0]])
    got = run(RECIPES["vllm_fp8_static"], np.full((4, 6), 8.0), F16, static_scale=static)
    # 8, 4, 2, 1 as e4m3fn: exponent fields 10, 9, 8, 7
    assert got.codes[::2, ::3].tolist() == [[0x50, 0x48], [0x40, 0x38]]
    assert got.codes[1::2, 2::3].tolist() == [[0x50, 0x48], [0x40, 0x38]]


def test_no_rows() -> None:
    for name in RECIPES:
        got = run(RECIPES[name], np.zeros((0, 128)), F16)
        assert got.codes.shape == (0, 128)
        assert got.code_lo.shape == (0, 128)


# Examples by hand. Each: recipe, format of x, leading values (the rest of the block is zero), options, scale, leading codes,
# and the code of the zeros that fill the block (None: undefined).
B16, H16, W32 = BF16, F16, F32
BY_HAND: list[tuple[str, Format, list[float], dict[str, Any], float, list[int | None], int | None]] = [
    # 448 / 448 = 1: 1 = exponent field 7 = 0x38, 0.25 = field 5, 464 would round to 448
    ("vllm_fp8_token", H16, [448, -1, 0.25, -0.0], {}, 1.0, [0x7E, 0xB8, 0x28, 0x80], 0),
    ("vllm_fp8_token", H16, [896, -1, NAN], {}, 2.0, [0x7E, 0xB0, 0x7E], 0),
    # amax is bounded before it is divided: 448 * 2 / 448; 1800 / 2 = 900 is bounded
    ("vllm_fp8_token", H16, [1800, 2], {"scale_ub": 896.0}, 2.0, [0x7E, 0x38], 0),
    ("vllm_fp8_token", H16, [INF, 1, -INF], {}, INF, [0x7E, 0x00, 0x7E], 0),  # Inf / Inf is NaN, and NaN gives the largest code
    ("vllm_fp8_token", H16, [0.0], {}, float(f32(1) / f32(448 * 512)), [0], 0),
    ("vllm_fp8_token_fnuz", H16, [224, -1, -0.0, NAN], {}, 1.0, [0x7E, 0xC0, 0x00, 0x7E], 0),  # fnuz: bias 8, no -0
    ("vllm_fp8_tensor", H16, [448, -1], {}, 1.0, [0x7E, 0xB8], 0),
    # three quarters of amax: 336, the midpoint of 320 (0x7A) and 352, goes to the even 320; x * fl(1 / s) lies above it
    ("vllm_fp8_token", H16, [0.99609375, 0.7470703125], {}, float(f32(0.99609375) / f32(448)), [0x7E, 0x7A], 0),
    ("vllm_fp8_tensor", H16, [0.99609375, 0.7470703125], {}, float(f32(0.99609375) / f32(448)), [0x7E, 0x7B], 0),
    ("vllm_fp8_tensor", H16, [-0.0], {}, 0.0, [0x7E], 0x7E),  # 1 / 0 = Inf, 0 * Inf = NaN
    ("vllm_fp8_static", H16, [448, -1, NAN, INF, -INF, -0.0], {"static_scale": 1.0}, 1.0,
     [0x7E, 0xB8, 0x7E, 0x7E, 0xFE, 0x80], 0),
    ("vllm_fp8_static", H16, [1, -1], {"static_scale": 0.0}, 0.0, [0x7E, 0xFE], 0x7E),
    ("vllm_native_fp8_static", H16, [448, NAN], {"static_scale": 1.0}, 1.0, [0x7E, 0x7F], 0),
    ("vllm_native_fp8_token", H16, [448, NAN], {}, NAN, [0x7F, 0x7F], 0x7F),
    ("vllm_native_fp8_token", H16, [-448, 1], {}, 1.0, [0xFE, 0x38], 0),
    ("vllm_native_fp8_tensor", H16, [0.0], {}, float(f32(1) / f32(448 * 512)), [0], 0),
    # fp8 max 224 over amax 128 is 1.75; 1.75 * 128 = 224; the returned scale is fl(1 / 1.75) = fl(4 / 7)
    ("vllm_fp8_scaled_quantize_fnuz", H16, [128, -64], {}, float(f32(4 / 7)), [0x7E, 0xF6], 0),
    ("vllm_fp8_scaled_quantize", H16, [128, -0.0], {}, float(f32(2 / 7)), [0x7E, 0x80], 0),
    ("vllm_fp8_group128", H16, [448, NAN, -1], {}, 1.0, [0x7E, 0xFE, 0xB8], 0),  # fminf(fmaxf(NaN, -448), 448) = -448
    ("vllm_fp8_group128", H16, [0.0], {}, float(f32(1e-10) / f32(448)), [0], 0),
    ("deepgemm_fp8_1x128", H16, [448, 1, -1], {}, 1.0, [0x7E, 0x38, 0xB8], 0),
    ("deepgemm_fp8_1x128", H16, [0.0], {}, float(f32(1e-4) / f32(448)), [0], 0),
    ("deepgemm_fp8_128x128", H16, [448, 1, -1], {}, 1.0, [0x7E, 0x38, 0xB8], 0),
    # int8: 127 / 127 = 1; ties to even: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2
    ("xpu_int8_token", H16, [127, 0.5, 1.5, 2.5, -0.5, -1.5], {}, 1.0, [127, 0, 2, 2, 0, 254], 0),
    # fp16 1.0014e-5 is 168 * 2^-24, the binary16 value nearest to 1e-5
    ("xpu_int8_token", H16, [2.0**-24, 0.0], {}, 168 * 2.0**-24, [0, 0], 0),
    ("xpu_int8_token", H16, [NAN, 1], {}, NAN, [None, None], None),
    # 2.96875 / 127 = 1531.47 * 2^-16 -> bf16 0x3CBF = 191 * 2^-13; 1.7578125 / that = 75.39: -75 as 8 bits is 181. In bf16 the
    # quotient has steps of 0.5: 75.5, a tie, to 76: 180
    ("xpu_int8_token", B16, [2.96875, -1.7578125], {}, 191 * 2.0**-13, [127, 181], 0),
    ("xpu_int8_token_eager", B16, [2.96875, -1.7578125], {}, 191 * 2.0**-13, [127, 180], 0),
    # max(3.5 / 7, 7 / 8) = 7/8: -7 -> -8, 3.5 -> 4, 0.4375 -> 0.5 -> 0
    ("vllm_int4", H16, [3.5, -7, 0.4375], {}, 0.875, [4, 8, 0], 0),
    ("vllm_uint4b8", H16, [3.5, -7, 0.4375], {}, 0.875, [12, 0, 8], 8),
    ("vllm_int4", H16, [7, 6.5, 5.5, -0.5, -1.5], {}, 1.0, [7, 6, 6, 0, 14], 0),
    ("vllm_int4", H16, [0.0], {}, 0.0, [None], None),
    ("vllm_int4", H16, [2.0**-24], {}, 0.0, [None], None),  # 2^-24 / 7 underflows in binary16, 2^-24 / 0 is infinite
    ("vllm_int4", B16, [INF, 1], {}, INF, [None, 0], 0),
    # (7.5 - 0) / 15 = 0.5, zero point 0; 0.25 / 0.5 = 0.5 -> 0
    ("vllm_uint4_zero", H16, [7.5, 0.25, 0.75], {}, 0.5, [15, 0, 2], 0),
    # (4 + 3.5) / 15 = 0.5, zero point RNE(|-3.5 / 0.5|) = 7; 0.25 -> 0 + 7; -0.75 -> -2 + 7
    ("vllm_uint4_zero", H16, [4, -3.5, 0.25, -0.75], {}, 0.5, [15, 0, 7, 5], 7),
    # 7.5 / 7.5 = 1: 7.5 is bounded to 7, -7.5 is rounded to -8
    ("compressed_tensors_int4", H16, [7.5, -7.5, 2.5, -0.5], {}, 1.0, [7, 8, 2, 0], 0),
    ("compressed_tensors_int4", B16, [0.0], {}, 2.0**-7, [0], 0),
    ("compressed_tensors_int4", H16, [0.0], {}, 2.0**-10, [0], 0),
    ("compressed_tensors_int4", W32, [0.0], {}, 2.0**-23, [0], 0),
    # range with 0: (7.5 - 0) / 15 = 0.5, zero point -8 - 0 = -8; 0.25 / 0.5 - 8 = -7.5 -> -8; 0.75 / 0.5 - 8 = -6.5 -> -6
    ("compressed_tensors_int4_zero", H16, [7.5, 0.25, 0.75], {}, 0.5, [7, 8, 10], 8),
    # (4 + 3.5) / 15 = 0.5, zero point -8 + 7 = -1; 0.25 / 0.5 - 1 = -0.5 -> 0 where RNE(0.5) - 1 would be -1
    ("compressed_tensors_int4_zero", H16, [4, -3.5, 0.25, -0.75], {}, 0.5, [7, 8, 0, 14], 15),
    ("svdquant_int4", H16, [7, -7, 6.5, 5.5, -0.5], {}, 1.0, [7, 9, 6, 6, 0], 0),
    ("svdquant_int4", H16, [0.0], {}, 0.0, [None], None),
    ("nunchaku_int4", H16, [0.0, -0.0], {}, 0.0, [0, 0], 0),
    ("nunchaku_int4", H16, [3.5, -3.5, 0.2], {}, 0.5, [7, 9, 0], 0),
    # e2m1, scale 1: the seven ties to even: 0 1 1 2 2 4 4 as values, codes 0 2 2 4 4 6 6
    ("nunchaku_nvfp4", H16, [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5], {}, 1.0, [7, 0, 2, 2, 4, 4, 6, 6, 8, 14], 0),
    # ties away: 0.5 1 1.5 2 3 4 6, codes 1..7; -0 loses its sign
    ("svdquant_nvfp4", H16, [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.0], {}, 1.0, [7, 1, 2, 3, 4, 5, 6, 7, 9, 0], 0),
    ("svdquant_nvfp4_triton", H16, [6, -0.1, -0.0], {}, 1.0, [7, 8, 0], 0),
    ("svdquant_nvfp4", H16, [0.0058, -0.001], {}, 0.0, [7, 15], 0),  # 0.0058 / 6 < 2^-10: scale 0, x / 0 = +-Inf, 0 / 0 -> 0
    ("svdquant_nvfp4", H16, [NAN, -1], {}, NAN, [0, 0], 0),
    ("nunchaku_nvfp4", H16, [0.0], {}, 0.0, [7], 7),
    ("nunchaku_nvfp4", H16, [6.375, 5.1875], {}, 1.0, [7, 6], 0),  # 5.1875 / 1.0625 = 4.88 -> 4, but 5.1875 / 1 -> 6
    ("nunchaku_nvfp4", H16, [6, NAN], {}, 1.0, [7, 7], 0),
    ("vllm_nvfp4", H16, [6, -0.0, NAN, 0.2], {"global_scale": 1.0}, 1.0, [7, 8, 7, 0], 0),
    ("vllm_nvfp4", H16, [0.0, -0.0], {"global_scale": 1.0}, 0.0, [0, 8], 0),
    ("vllm_nvfp4", H16, [INF, -1], {"global_scale": 1.0}, 448.0, [7, 8], 0),
    ("vllm_nvfp4_reference", H16, [12, -6, 2], {"global_scale": 2.0}, 4.0, [7, 13, 2], 0),  # 2 * 12 / 6 = 4; x * 2 / 4
    ("vllm_nvfp4_emulation", W32, [2.0**30], {"global_scale": 2.0**-60}, 0.0, [7], 0),  # 2^30 * 1e-8 = 10.7
    ("compressed_tensors_nvfp4", H16, [12, -6, 2], {"global_scale": 2.0}, 4.0, [7, 13, 2], 0),
    ("compressed_tensors_nvfp4", H16, [0.0], {"global_scale": 2.0}, 0.125, [0], 0),
    ("compressed_tensors_nvfp4", H16, [NAN], {"global_scale": 2.0}, NAN, [None], None),
    ("modelopt_nvfp4", H16, [12, -6, 2, -0.0], {"global_scale": 0.5}, 4.0, [7, 13, 2, 0], 0),  # 12 / (6 * 0.5); x / (4 * 0.5)
    ("modelopt_nvfp4", H16, [0.0], {"global_scale": 0.5}, 1.0, [0], 0),
    ("modelopt_nvfp4", H16, [2.0**-12], {"global_scale": 1.0}, 2.0**-9, [0], 0),
    ("torchao_nvfp4", H16, [12, -6, 2, -0.0], {"global_scale": 0.5}, 4.0, [7, 13, 2, 8], 0),
    ("torchao_nvfp4", H16, [0.0], {"global_scale": 0.5}, 2.0**-6, [0], 0),
    ("transformer_engine_nvfp4", H16, [12, -6, 2, NAN], {"global_scale": 2.0}, NAN, [7, 7, 7, 7], 7),
    ("transformer_engine_nvfp4", H16, [12, -6, 2], {"global_scale": 2.0}, 4.0, [7, 13, 2], 0),
    ("transformer_engine_nvfp4", H16, [2.0**-10, -(2.0**-14)], {"global_scale": 1.0}, 0.0, [7, 15], 0),
    # 6 and 4 are codes at scale 1 (error 0); at 1.5 they are 4 and 2.67
    ("four_over_six_nvfp4", H16, [6, 4, 3], {"global_scale": 1.0}, 1.0, [7, 6, 5], 0),
    # 6 and 4.5: at scale 1 4.5 -> 4, error 0.25; at scale 1.5 they are 4 and 3, error 0
    ("four_over_six_nvfp4", H16, [6, 4.5, -0.0], {"global_scale": 1.0}, 1.5, [6, 5, 0], 0),
    ("four_over_six_nvfp4", H16, [0.0], {"global_scale": 1.0}, 0.0, [0], 0),
    ("four_over_six_nvfp4", H16, [2.0**-12, -(2.0**-13)], {"global_scale": 1.0}, 0.0, [0, 8], 0),
    ("four_over_six_nvfp4", H16, [NAN, 1], {"global_scale": 1.0}, NAN, [None, None], None),
    ("four_over_six_nvfp4", H16, [INF, 1], {"global_scale": 1.0}, 448.0, [7, 0], 0),
    # ties toward zero: 0 0.5 1 1.5 2 3 4
    ("deepgemm_fp4", H16, [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, -0.0], {}, 1.0,
     [7, 0, 1, 2, 3, 4, 5, 6, 0, 14, 0], 0),
    # powers of two: 7 / 4 down to 1, up to 2; 7 / 6 up to 2, 6 / 6 = 1, 6 / 4 up to 2; a zero block has the least scale
    ("mxfp4_floor", B16, [7, -3.5, 0.25], {}, 1.0, [7, 14, 0], 0),
    ("mxfp4_ceil", B16, [6, -3.5, 0.25], {}, 2.0, [5, 12, 0], 0),
    ("mxfp4_rceil", B16, [7, -3.5, 0.25], {}, 2.0, [6, 12, 0], 0),
    ("mxfp4_rceil", B16, [6, -3.5, 0.25], {}, 1.0, [7, 14, 0], 0),
    ("mxfp4_floor", B16, [0.0, -0.0], {}, 2.0**-127, [0, 8], 0),
    ("mxfp4_rceil", B16, [2.0**-120], {}, 2.0**-122, [6], 0),
]


@pytest.mark.parametrize("case", BY_HAND, ids=[f"{i}-{c[0]}" for i, c in enumerate(BY_HAND)])
def test_examples_by_hand(case: tuple[str, Format, list[float], dict[str, Any], float, list[int | None], int | None]) -> None:
    name, fmt, values, options, scale, codes, rest = case
    recipe = RECIPES[name]
    rows = recipe.block_rows or 1
    x = np.zeros((rows, 128))
    x[:, : len(values)] = round_to(np.array(values), fmt)
    if "static_scale" in options:
        options = {"static_scale": np.full((1, 1), options["static_scale"])}
    got = quantise(x, fmt, recipe, **options)
    assert np.array_equal(decode(got.scales[:1, :1], recipe.scale_format(fmt)), [[scale]], equal_nan=True)
    block = recipe.block_k or 128
    want = codes + [rest] * (block - len(codes))
    assert [None if u else int(c) for c, u in zip(got.codes[0, :block], got.undefined[0, :block], strict=True)] == want


def test_every_recipe_has_an_example_by_hand() -> None:
    shown = {name for name, *_ in BY_HAND}
    assert {name.removesuffix("_fnuz") for name in RECIPES} == {name.removesuffix("_fnuz") for name in shown}


def test_zero_points_by_hand() -> None:
    x = np.array([[4, -3.5, 0.25, -0.75]])
    ratio = run(small(RECIPES["vllm_uint4_zero"], 4), x, F16)
    shifted = run(small(RECIPES["compressed_tensors_int4_zero"], 4), x, F16)
    assert ratio.zero_points is not None
    assert shifted.zero_points is not None
    assert (int(ratio.zero_points[0, 0]), int(shifted.zero_points[0, 0])) == (7, 0xF)
    # All positive, 5..8: 3 / 15 = 0.2 -> binary16; |5 / s| = 25 is bounded to 15; 0 in the range: 8 / 15, zero point -8
    x = np.array([[5.0, 8.0]])
    for name, want in (("vllm_uint4_zero", 15), ("compressed_tensors_int4_zero", 8)):
        points = run(small(RECIPES[name], 2), x, F16).zero_points
        assert points is not None
        assert points.tolist() == [[want]]


def test_global_scales_by_hand() -> None:
    x = np.array([[-6.0, 1.0]])
    want = {
        "vllm_nvfp4": 448.0, "compressed_tensors_nvfp4": 448.0, "transformer_engine_nvfp4": 448.0, "four_over_six_nvfp4": 256.0,
        "modelopt_nvfp4": float(f32(1 / 448)), "torchao_nvfp4": float(f32(1 / 448)),
    }
    assert {n: float(decode(global_scale_of(x, RECIPES[n]), F32)) for n in want} == want
    zero = {"vllm_nvfp4": INF, "compressed_tensors_nvfp4": 1.0, "transformer_engine_nvfp4": 1.0, "modelopt_nvfp4": 0.0}
    assert {n: float(decode(global_scale_of(0 * x, RECIPES[n]), F32)) for n in zero} == zero
    least = {"compressed_tensors_nvfp4": 1.0, "transformer_engine_nvfp4": float(F32.max_finite)}
    assert {n: float(decode(global_scale_of(np.full((1, 1), 2.0**-149), RECIPES[n]), F32)) for n in least} == least
    with pytest.raises(ValueError, match="expected a recipe that has one"):
        global_scale_of(x, RECIPES["svdquant_nvfp4"])


# --- witnesses: every recipe once more, as plain binary32 (or binary16, bf16) array code in the manner of its source ------------
# Library casts are used where they are known to be right: ml_dtypes rounds in-range values to nearest even.

Array = np.ndarray[Any, Any]
BFLOAT = ml_dtypes.bfloat16
ONE, SIX = f32(1), f32(6)
# code = number of thresholds passed: ties to even, away from zero, toward zero
THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
PASSED = {
    "even": (np.greater, np.greater_equal) * 3 + (np.greater,),
    "away": (np.greater_equal,) * 7,
    "zero": (np.greater,) * 7,
}


def e2m1_witness(v: Array, ties: str = "even") -> Array:
    """Magnitude by thresholds, sign bit from the sign of v; NaN gives +0."""
    magnitude = sum(passed(np.abs(v), t).astype(int) for passed, t in zip(PASSED[ties], THRESHOLDS, strict=True))
    return np.asarray(np.where(np.isnan(v), 0, magnitude | (np.signbit(v).astype(int) << 3)))


def e4m3_witness(v: Array, bound: float = 448.0, fnuz: bool = False, nan: int = 0x7F) -> Array:
    """ml_dtypes within the bounds; `nan` for NaN."""
    target = ml_dtypes.float8_e4m3fnuz if fnuz else ml_dtypes.float8_e4m3fn
    return np.where(np.isnan(v), np.uint8(nan), np.clip(v, -bound, bound).astype(target).view(np.uint8))


def inputs(fmt: Format) -> Array:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((300, 16)) * np.exp2(rng.integers(-6, 6, (300, 1)))
    grid = rng.integers(-96, 96, (150, 16)) / 16  # many ties
    return np.concatenate([hard_rows(fmt), round_to(np.concatenate([rows, grid]), fmt)]).astype(f32)


def kept(x: Array) -> Array:
    """Largest magnitude of each row, NaN if there is one."""
    return np.asarray(np.maximum.reduce(np.abs(x), axis=1, keepdims=True))


def dropped(x: Array) -> Array:
    """Largest magnitude of each row without its NaN."""
    return np.asarray(np.fmax.reduce(np.abs(x), axis=1, keepdims=True, initial=0))


def rcp(v: Any) -> Array:
    """Correctly rounded reciprocal with subnormal operands and results flushed to zero."""
    v = np.where(np.abs(v) < f32(2**-126), np.copysign(f32(0), v), v)
    r = ONE / v
    return np.asarray(np.where(np.abs(r) < f32(2**-126), np.copysign(f32(0), r), r))


def fp8_witness(name: str, x: Array, top: Any, bound: float, fnuz: bool, static: Any) -> tuple[Array, Array]:
    floor = ONE / (top * f32(512))
    high, low, nan = (0x7E, 0xFE, 0x80 if fnuz else 0x7F)
    tensor_kept, tensor_dropped = kept(x).max(keepdims=True), dropped(x).max(keepdims=True)
    static = np.full((1, 1), static, dtype=f32)
    inverse = top / np.maximum(kept(x), f32(1e-12))
    scale, rule, divide = {
        "vllm_fp8_static": (static, high, False),
        "vllm_fp8_tensor": (tensor_dropped / top, high, False),
        "vllm_fp8_token": (np.maximum(dropped(x) / top, floor), high, True),
        "vllm_native_fp8_static": (static, nan, False),
        "vllm_native_fp8_tensor": (np.maximum(tensor_kept / top, floor), nan, False),
        "vllm_native_fp8_token": (np.maximum(kept(x) / top, floor), nan, False),
        "vllm_fp8_scaled_quantize": (ONE / inverse, nan, False),
        "vllm_fp8_group128": (np.maximum(dropped(x), f32(1e-10)) / top, low, True),
        "deepgemm_fp8_1x128": (np.maximum(kept(x), f32(1e-4)) / top, nan, False),
        "deepgemm_fp8_128x128": (np.maximum(kept(x), f32(1e-4)) / top, nan, False),
    }[name]
    quotient = x / scale if divide else x * (inverse if name == "vllm_fp8_scaled_quantize" else ONE / scale)
    return scale, e4m3_witness(quotient, bound if name == "vllm_fp8_scaled_quantize" else float(top), fnuz, rule)


FP8 = [name for name, r in RECIPES.items() if r.element in (E4M3FN, E4M3FNUZ)]


@pytest.mark.parametrize("fmt", [F16, BF16, F32], ids=repr)
@pytest.mark.parametrize("name", FP8)
def test_fp8_witness(name: str, fmt: Format) -> None:
    fnuz = name.endswith("_fnuz")
    recipe = RECIPES[name]
    recipe = replace(recipe, block_rows=min(recipe.block_rows, 1), block_k=16 if recipe.block_k else 0)
    everything = inputs(fmt)
    calm = everything[np.isfinite(everything).all(axis=1)]
    slices = [calm[i:] for i in range(0, 280, 20)]
    for x in (everything, calm * 0, *slices) if recipe.block_rows == 0 else (everything, calm):
        for static in (0.0123291015625, 0.0, 3.0, NAN) if recipe.static else (1.0,):
            with np.errstate(all="ignore"):
                top, bound = f32(224 if fnuz else 448), 240.0 if fnuz else 448.0
                scale, codes = fp8_witness(name.removesuffix("_fnuz"), x, top, bound, fnuz, static)
            got = run(recipe, x, fmt, **({"static_scale": np.full((1, 1), static)} if recipe.static else {}))
            assert np.array_equal(decode(got.scales, F32), scale, equal_nan=True)
            assert np.array_equal(got.codes, codes)
            assert not got.undefined.any()


def half(v: Any, dtype: Any) -> Array:
    """Rounded to a half-width dtype, as binary32 again."""
    return np.asarray(np.asarray(v, dtype=f32).astype(dtype).astype(f32))


def int_witness(name: str, x: Array, dtype: Any) -> tuple[Array, Array, Array | None, Array]:
    """Scale, integers, zero points, undefined. Every intermediate of the weight quantisers is rounded to `dtype`."""
    top = np.maximum.reduce(x, axis=1, keepdims=True)
    bottom = np.minimum.reduce(x, axis=1, keepdims=True)
    epsilon = f32({np.float16: 2**-10, BFLOAT: 2**-7}[dtype])
    zero: Array | None = None
    if name.startswith("xpu"):
        scale = half(np.maximum(kept(x) / f32(127), f32(1e-5)), dtype)
        q = half(x / scale, dtype) if name.endswith("eager") else x / scale
        return scale, np.clip(np.rint(q), -128, 127), None, np.isnan(q)
    if name in ("vllm_int4", "vllm_uint4b8"):
        scale = np.maximum(np.abs(half(top / f32(7), dtype)), np.abs(half(bottom / f32(8), dtype)))
        q = half(x / scale, dtype)
        return scale, np.clip(np.rint(q), -8, 7) + (8 if name == "vllm_uint4b8" else 0), None, ~np.isfinite(q)
    if name == "vllm_uint4_zero":
        scale = half(np.maximum(half(top - bottom, dtype), half(f32(1e-5), dtype)) / f32(15), dtype)
        zero = np.clip(np.rint(np.abs(half(bottom / scale, dtype))), 0, 15)
        q = half(x / scale, dtype)
        return scale, np.clip(np.rint(q) + zero, 0, 15), zero, ~np.isfinite(q) | np.isnan(zero)
    if name == "compressed_tensors_int4":
        scale = half(kept(x) / f32(7.5), dtype)
        scale = np.where(scale == 0, epsilon, scale)
        q = np.clip(half(x / scale, dtype), -8, 7)
        return scale, np.rint(q), None, np.isnan(q)
    if name == "compressed_tensors_int4_zero":
        top, bottom = np.maximum(top, f32(0)), np.minimum(bottom, f32(0))
        scale = half(half(top - bottom, dtype) / f32(15), dtype)
        zero = np.rint(np.clip(half(f32(-8) - half(bottom / scale, dtype), dtype), -8, 7))
        scale = np.where(scale == 0, epsilon, scale)
        q = np.clip(half(half(x / scale, dtype) + zero, dtype), -8, 7)
        return scale, np.rint(q), zero, np.isnan(q)
    if name == "svdquant_int4":
        scale = half(np.minimum(np.maximum(kept(x) / f32(7), f32(1e-12)), f32(65504)), np.float16)
        q = x / scale
        return scale, np.clip(np.rint(q), -8, 7), None, np.isnan(q)
    unrounded = dropped(x) * (ONE / f32(7))
    q = x * rcp(unrounded)
    return half(unrounded, dtype), np.where(np.isnan(q), 0, np.clip(np.rint(q), -8, 7)), None, np.zeros(x.shape, dtype=bool)


@pytest.mark.parametrize("fmt", [F16, BF16], ids=repr)
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.element.mantissa_bits > 2 and r.element.exponent_bits == 0])
def test_int_witness(name: str, fmt: Format) -> None:
    x = inputs(fmt)
    recipe = small(RECIPES[name])
    got = run(recipe, x, fmt)
    with np.errstate(all="ignore"):
        scale, integers, zero, undefined = int_witness(name, x, np.float16 if fmt is F16 else BFLOAT)
    assert np.array_equal(decode(got.scales, recipe.scale_format(fmt)), scale, equal_nan=True)
    assert np.array_equal(got.undefined, undefined)
    defined = ~undefined
    mask = (1 << recipe.element.bits) - 1
    assert np.array_equal(got.codes[defined], integers[defined].astype(np.int64) & mask)
    if zero is not None:
        assert got.zero_points is not None
        assert np.array_equal(np.isnan(zero), got.undefined_zero_points)
        assert np.array_equal(got.zero_points[~np.isnan(zero)], zero[~np.isnan(zero)].astype(np.int64) & mask)


def e8m0_witness(v: Array, up: bool) -> Array:
    """Power of two at or below (above) a positive value, from its binary32 exponent; 2^-127 for what lies below."""
    mantissa, exponent = np.frexp(v.astype(np.float64))
    code = exponent - 1 + (mantissa > 0.5) * up + 127
    return np.where(np.isnan(v), 255, np.where(np.isinf(v), 254, np.where(v == 0, 0, np.clip(code, 0, 254)))).astype(np.uint8)


def fp4_witness(name: str, x: Array, g: Any) -> tuple[Array, Array, Array]:
    """Scale codes, element codes, undefined. `g` is the global scale in the recipe's own direction (d where it decodes)."""
    amax, loose, d = kept(x), dropped(x), g
    limit = f32(448)
    svdquant = np.minimum(np.maximum(amax / SIX, f32(1e-12)), limit)
    triton = np.minimum(np.maximum(amax * (ONE / SIX), f32(1e-12)), limit)
    block = amax / (SIX * d)
    scales: dict[str, Callable[[], Any]] = {
        "vllm_nvfp4": lambda: g * (loose * rcp(SIX)),
        "vllm_nvfp4_reference": lambda: g * (amax * (ONE / SIX)),
        "vllm_nvfp4_emulation": lambda: g * (amax * (ONE / SIX)),
        "compressed_tensors_nvfp4": lambda: g * (amax / SIX),
        "svdquant_nvfp4": lambda: svdquant,
        "svdquant_nvfp4_triton": lambda: triton,
        "nunchaku_nvfp4": lambda: np.minimum(loose * (ONE / SIX), limit),
        "modelopt_nvfp4": lambda: np.maximum(np.where(block == 0, ONE, block), f32(2**-9)),
        "torchao_nvfp4": lambda: np.maximum((amax / SIX) / d, f32(2**-6)),
        "transformer_engine_nvfp4": lambda: amax * (g * (ONE / SIX)),
        "deepgemm_fp4": lambda: np.maximum(amax, f32(1e-4)) / SIX,
        "mxfp4_floor": lambda: loose / f32(4),
        "mxfp4_ceil": lambda: loose / f32(4),
        "mxfp4_rceil": lambda: loose / SIX,
    }
    scale = scales[name]()
    if name == "deepgemm_fp4":
        code, s = np.where(np.isnan(scale), np.uint32(F32.nan_code), scale.view(np.uint32)), scale
    elif name.startswith("mxfp4"):
        code = e8m0_witness(scale, name != "mxfp4_floor")
        s = np.where(code == 255, NAN, np.ldexp(1.0, code.astype(int) - 127)).astype(f32)
    else:
        code = e4m3_witness(scale)
        if name == "compressed_tensors_nvfp4":
            code = np.where(code == 0, np.uint8(0x20), code)  # 0.125
        s = code.view(ml_dtypes.float8_e4m3fn).astype(f32)
    largest = np.finfo(f32).max
    quotients: dict[str, Callable[[], Any]] = {
        "vllm_nvfp4": lambda: x * np.where(s == 0, f32(0), rcp(s * rcp(g))),
        "vllm_nvfp4_reference": lambda: x * np.where(s == 0, f32(0), ONE / (s * (ONE / g))),
        "vllm_nvfp4_emulation": lambda: x * np.where(s == 0, f32(1e-8), ONE / (s * (ONE / g))),
        "compressed_tensors_nvfp4": lambda: x / (s / g),
        "nunchaku_nvfp4": lambda: x * rcp(scale),
        "modelopt_nvfp4": lambda: x / (s * d),
        "torchao_nvfp4": lambda: x * ((ONE / d) / s),
        "transformer_engine_nvfp4": lambda: x * np.minimum(ONE / (s * (ONE / g)), largest),
        "deepgemm_fp4": lambda: x * (ONE / s),
    }
    quotient = quotients[name]() if name in quotients else x / s
    ties = "away" if name.startswith("svdquant") else "zero" if name == "deepgemm_fp4" else "even"
    codes = e2m1_witness(quotient, ties)
    if name.startswith(("svdquant", "modelopt")):
        codes = np.where((codes == 8) & ~(x < 0), 0, codes)
    if name == "deepgemm_fp4":
        codes = np.where(codes == 8, 0, codes)
    undefined = np.isnan(quotient) & (name in ("compressed_tensors_nvfp4", "torchao_nvfp4"))
    to_six = not name.startswith(("svdquant", "deepgemm"))
    return code, np.where(np.isnan(quotient), 7 if to_six else 0, codes), undefined


@pytest.mark.parametrize("fmt", [F16, BF16, F32], ids=repr)
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.element is E2M1 and r.choice is Choice.NONE])
def test_fp4_witness(name: str, fmt: Format) -> None:
    x = inputs(fmt)
    has_global = RECIPES[name].global_rule is not GlobalRule.NONE
    for g in (f32(1), f32(97.3), f32(0.0123), f32(2.0**-30), f32(2.0**30)) if has_global else (f32(1),):
        got = run(small(RECIPES[name]), x, fmt, **({"global_scale": float(g)} if has_global else {}))
        with np.errstate(all="ignore"):
            scales, codes, undefined = fp4_witness(name, x, g)
        assert np.array_equal(got.scales, scales)
        assert np.array_equal(got.undefined, undefined)
        assert np.array_equal(got.codes[~undefined], codes[~undefined])


def test_four_over_six_witness() -> None:
    """Both candidates in binary32, compared by errors in float64 where these are apart."""
    x = inputs(BF16)
    x = x[np.isfinite(x).all(axis=1) & (np.abs(x).max(axis=1) < 100)]
    for g in (f32(1), f32(1536) / np.abs(x).max()):
        got = run(small(RECIPES["four_over_six_nvfp4"]), x, BF16, global_scale=float(g))
        candidates = []
        with np.errstate(all="ignore"):
            for factor in (ONE, f32(1.5)):
                code = e4m3_witness(g * (kept(x) / SIX) * factor)
                s = code.view(ml_dtypes.float8_e4m3fn).astype(f32)
                codes = e2m1_witness(x * np.where(s == 0, f32(0), ONE / (s * (ONE / g))))
                codes = np.where((codes == 8) & ~(x < 0), 0, codes)
                values = decode(codes.astype(np.uint8), E2M1) * s.astype(np.float64) / float(g)
                candidates.append((code, codes, ((values - x) ** 2).sum(axis=1, keepdims=True)))
        (code6, codes6, error6), (code4, codes4, error4) = candidates
        apart = (np.abs(error6 - error4) > 1e-9 * (error6 + error4))[:, 0]
        assert apart.sum() > 250
        four = error4 < error6
        assert np.array_equal(got.scales[apart], np.where(four, code4, code6)[apart])
        assert np.array_equal(got.codes[apart], np.where(four, codes4, codes6)[apart])


# --- admissible sets by enumeration -----------------------------------------------------------------------------------------


def reciprocals(value: np.float32) -> list[Any]:
    """Every binary32 within one unit in the last place of 1 / value (positive, normal), by Fractions."""
    wanted = 1 / Fraction(float(value))
    near = f32(float(wanted))
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= wanted:
        exponent += 1
    while Fraction(2) ** exponent > wanted:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    found = []
    for step in range(-4, 5):
        candidate = (np.array(near).view(np.int32) + np.int32(step)).view(f32)[()]
        if abs(Fraction(float(candidate)) - wanted) <= ulp:
            found.append(candidate)
    return found


def extremes(codes: list[np.ndarray[Any, Any]], fmt: Format) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    keys = [order_key(c.astype(np.uint8), fmt) for c in codes]
    return np.minimum.reduce(keys), np.maximum.reduce(keys)


def test_reciprocal_within_one_ulp_has_two_or_more_values() -> None:
    assert [float(r) for r in reciprocals(f32(2.0))] == [0.5 - 2.0**-24, 0.5 - 2.0**-25, 0.5, 0.5 + 2.0**-24]


def test_nunchaku_admits_what_a_reciprocal_within_one_ulp_gives() -> None:
    rng = np.random.default_rng(4)
    x = round_to(rng.integers(-240, 240, (300, 64)) / 32, F16).astype(f32)
    spread = 0
    for name, block, element in (("nunchaku_int4", 64, None), ("nunchaku_nvfp4", 16, E2M1)):
        got = run(RECIPES[name], x, F16)
        for r in range(x.shape[0]):
            for b in range(64 // block):
                part = x[r, b * block : (b + 1) * block]
                scale = np.abs(part).max() * f32(1 / 7 if element is None else 1 / 6)
                quotients = [part * inverse for inverse in reciprocals(scale)]
                lo, hi = got.code_lo[r, b * block : (b + 1) * block], got.code_hi[r, b * block : (b + 1) * block]
                if element is None:
                    integers = [np.clip(np.rint(q), -8, 7).astype(np.int64) for q in quotients]
                    want = np.minimum.reduce(integers), np.maximum.reduce(integers)
                else:
                    want = extremes([e2m1_witness(q) for q in quotients], element)
                assert np.array_equal(lo, want[0])
                assert np.array_equal(hi, want[1])
                spread += int((lo != hi).sum())
    assert spread > 20


def test_vllm_nvfp4_admits_what_reciprocals_within_one_ulp_give() -> None:
    rng = np.random.default_rng(6)
    x = round_to(np.clip(rng.standard_normal((250, 16)), -1, 1), BF16).astype(f32)
    x[:, 0] = round_to(np.linspace(1, 4, 250), BF16)
    g = f32(384)  # scale 64 * amax: the midpoints of e4m3 are among the inputs
    got = run(RECIPES["vllm_nvfp4"], x, BF16, global_scale=float(g))
    lo, hi, undefined = admissible_codes(x.astype(np.float64), BF16, RECIPES["vllm_nvfp4"], got.scale_hi, global_scale=float(g))
    assert not undefined.any()
    for r, row in enumerate(x):
        scales = [int(e4m3_witness(np.array(g * (np.abs(row).max() * six)))) for six in reciprocals(f32(6))]
        assert (int(got.scale_lo[r, 0]), int(got.scale_hi[r, 0])) == (min(scales), max(scales))
        for used, low, high in ((got.scales, got.code_lo, got.code_hi), (got.scale_hi, lo, hi)):
            stored = decode_scalar(int(used[r, 0]), UE4M3)
            assert isinstance(stored, Fraction)
            s = f32(stored)
            inverses = [i for one_over_g in reciprocals(g) for i in reciprocals(s * one_over_g)]
            want = extremes([e2m1_witness(row * i) for i in inverses], E2M1)
            assert np.array_equal(low[r], want[0])
            assert np.array_equal(high[r], want[1])
    assert (got.code_lo != got.code_hi).any()
    assert (got.scale_lo != got.scale_hi).any()


@pytest.mark.parametrize("name", RECIPES)
def test_nominal_answer_is_admissible(name: str) -> None:
    recipe = small(RECIPES[name])
    for fmt in (F16, BF16):
        got = run(recipe, hard_rows(fmt), fmt)
        keys = order_key(got.codes, recipe.element)
        assert ((got.code_lo <= keys) & (keys <= got.code_hi) | got.undefined).all()
        assert ((got.scale_lo <= got.scales) & (got.scales <= got.scale_hi)).all()
        if recipe.exact:
            assert np.array_equal(got.code_lo, got.code_hi)


def test_smoothing_by_enumeration() -> None:
    rng = np.random.default_rng(8)
    x = round_to(rng.standard_normal((40, 16)), F16)
    factors = round_to(rng.uniform(0.25, 4, 16), F16)
    single = smooth(x, F16, factors, Smoothing.F32)
    assert np.array_equal(single.value, (x.astype(f32) / factors.astype(f32)).astype(np.float64))
    halves = smooth(x, F16, factors, Smoothing.INPUT_APPROXIMATE)
    for r in range(40):
        for c in range(16):
            wanted = Fraction(x[r, c]) / Fraction(factors[c])
            near = np.array(f32(x[r, c]) / f32(factors[c]))
            ulp = Fraction(float(np.spacing(np.abs(near)))) if wanted else Fraction(0)
            reached = [
                float((near.view(np.int32) + np.int32(k)).view(f32)) for k in range(-3, 4)
            ] if wanted else [float(near)]
            reached = [v for v in reached if abs(Fraction(v) - wanted) <= 2 * ulp]
            assert halves.low[r, c] == min(float(np.float16(v)) for v in reached)
            assert halves.high[r, c] == max(float(np.float16(v)) for v in reached)
            assert halves.value[r, c] == float(np.float16(near))
    got = run(RECIPES["nunchaku_nvfp4"], halves.value, F16, bounds=(halves.low, halves.high))
    plain = run(RECIPES["nunchaku_nvfp4"], halves.value, F16)
    assert (got.code_lo <= plain.code_lo).all()
    assert (got.code_hi >= plain.code_hi).all()
    for end in (halves.low, halves.high):
        keys = order_key(run(RECIPES["nunchaku_nvfp4"], end, F16).codes, E2M1)
        assert ((got.code_lo <= keys) & (keys <= got.code_hi)).all()
    with pytest.raises(ValueError, match=r"expected 2\^-126"):
        smooth(x, F16, 0 * factors, Smoothing.INPUT_APPROXIMATE)


def test_four_over_six_pairs() -> None:
    x = round_to(np.random.default_rng(9).standard_normal((200, 64)), BF16)
    recipe = RECIPES["four_over_six_nvfp4"]
    got = quantise(x, BF16, recipe)
    assert got.other is not None
    assert got.global_scale is not None
    g = Fraction(float(decode(got.global_scale, F32)))
    taken = 0
    for r in range(200):
        for b in range(4):
            block = slice(16 * b, 16 * b + 16)
            errors = []
            for q in (got, got.other):
                s = Fraction(float(decode(q.scales[r, b], UE4M3)))
                pairs = zip(decode(q.codes[r, block], E2M1), x[r, block], strict=True)
                errors.append(sum(((Fraction(float(v)) * s / g - Fraction(w)) ** 2 for v, w in pairs), Fraction(0)))
            assert errors[0] <= errors[1]
            taken += int(got.scales[r, b] > got.other.scales[r, b])
            if got.other_admissible[r, b]:
                assert abs(errors[0] - errors[1]) <= Fraction(1, 2**16) * (errors[0] + errors[1])
    assert 200 < taken < 600  # both candidates are taken often
    tie = quantise(np.zeros((1, 16)), BF16, recipe)
    assert tie.other_admissible.all()


def test_four_over_six_admits_a_choice_made_in_binary32() -> None:
    """Errors summed in binary32 may choose otherwise; where they do, the other candidate is admissible."""
    x = np.random.default_rng(1).integers(-96, 96, (6000, 16)) / 16.0
    got = quantise(x, BF16, RECIPES["four_over_six_nvfp4"], global_scale=float(f32(1.1)))
    assert got.other is not None
    errors = []
    for q in (got, got.other):
        values = (decode(q.codes, E2M1) * decode(q.scales, UE4M3)).astype(f32) / f32(1.1)
        errors.append(((values - x.astype(f32)) ** 2).sum(axis=1, keepdims=True, dtype=f32))
    otherwise = errors[1] < errors[0]
    assert otherwise.any()
    assert got.other_admissible[otherwise].all()
    assert got.other_admissible.sum() < 20  # of 6000: the band is narrow


# --- disagreements, fields, errors ------------------------------------------------------------------------------------------


def outcome(recipe: Recipe, x: Reals, fmt: Format, **options: Any) -> object:
    """Everything a judge would see, as one comparable value."""
    try:
        q = quantise(x, fmt, recipe, **options)
    except ValueError:
        return "refused"
    keys = order_key(q.codes, recipe.element)
    arrays = [q.codes, q.scales, q.zero_points, q.global_scale, q.undefined, q.scale_lo, q.scale_hi]
    parts = [None if a is None else (a.shape, a.tolist()) for a in arrays]
    return [*parts, (q.code_lo - keys).tolist(), (q.code_hi - keys).tolist(), q.scales.dtype]


@pytest.mark.parametrize("case", DISAGREEMENTS, ids=[f"{d.item}-{d.first}-{d.second}-{i}" for i, d in enumerate(DISAGREEMENTS)])
def test_disagreements(case: Disagreement) -> None:
    options = {"global_scale": float_value(case.global_scale)} if case.global_scale else {}
    first, second = (outcome(RECIPES[n], case.x, case.x_format, **options) for n in (case.first, case.second))
    assert case.x.shape == (1, 128)
    assert first != second


def test_disagreements_cover_the_items() -> None:
    assert {d.item for d in DISAGREEMENTS} == {1, 2, 3, 4, 5, 6, 11}


ROW = np.array([[6, -5, 2.5, 1.25, 0.75, 0.25, -0.25, 0.1, 3.5, 4.5, -1.75, 0.0, -0.0, 0.5, 1.0, -2.0]])
TINY, ZERO = ROW * 2.0**-14, ROW * 0
# field, recipe, another value, format, input, options
FLIPS: list[tuple[str, str, Any, Format, Reals, dict[str, Any]]] = [
    ("element", "vllm_fp8_token", E4M3FNUZ, F16, ROW, {}),
    ("low", "vllm_fp8_token", float_bits(-224.0), F16, -ROW, {"scale_ub": 1.0}),
    ("high", "vllm_fp8_token", float_bits(224.0), F16, ROW, {}),
    ("scale", "vllm_nvfp4", F32, F16, ROW * 1.1875, {}),
    ("block_rows", "vllm_fp8_token", 0, F16, np.concatenate([ROW, ROW / 2]), {}),
    ("block_k", "vllm_nvfp4", 8, F16, ROW, {}),
    ("static", "vllm_fp8_token", 1, F16, ROW, {}),
    ("scale_ub", "vllm_fp8_token", 0, F16, ROW, {"scale_ub": 1.0}),
    ("statistic", "svdquant_int4", Statistic.RANGE, F16, ROW, {}),
    ("include_zero", "compressed_tensors_int4_zero", 0, F16, np.abs(ROW) + 1, {}),
    ("nan_amax", "vllm_fp8_token", NanAmax.PROPAGATED, F16, ROW * [[NAN] + [1.0] * 15], {}),
    ("amax_floor", "deepgemm_fp8_1x128", 0, F16, ZERO, {}),
    ("divisor", "svdquant_int4", float_bits(7.5), F16, ROW, {}),
    ("divisor_low", "vllm_int4", float_bits(7.0), F16, -ROW, {}),
    ("scale_division", "vllm_fp8_token", Division.RECIPROCAL, F16, ROW / 6 * np.arange(1, 41)[:, None], {}),
    # 257.5 is 258 in bf16; 258 / 15 -> 17.25, 257.5 / 15 -> 17.125
    ("arithmetic", "compressed_tensors_int4_zero", Width.F32, BF16, np.array([[256, -1.5]]), {}),
    ("scale_floor", "vllm_fp8_token", 0, F16, ZERO, {}),
    ("scale_cap", "nunchaku_nvfp4", float_bits(1.5), F16, ROW * 2, {}),
    ("zero_scale", "compressed_tensors_nvfp4", ZeroScale.KEPT, F16, ZERO, {}),
    ("scale_rounding", "vllm_nvfp4", Rounding.CEIL, F16, ROW, {"global_scale": 1.05}),
    ("global_rule", "vllm_nvfp4", GlobalRule.DECODE, F16, ROW, {}),
    ("global_range", "vllm_nvfp4", float_bits(1536.0), F16, ROW, {}),
    ("global_guard", "compressed_tensors_nvfp4", GlobalGuard.NONE, F16, ZERO, {}),
    ("join", "vllm_nvfp4", Join.OVER_QUOTIENT, F16, ROW, {}),
    ("using", "svdquant_nvfp4", Using.UNROUNDED, BF16, DISAGREEMENTS[3].x, {}),
    ("effective", "vllm_nvfp4", Effective.SCALE, F16, ROW, {}),
    ("apply", "vllm_fp8_token", Division.RECIPROCAL, F16, DISAGREEMENTS[4].x, {}),
    ("quotient", "xpu_int8_token", Width.INPUT, BF16, DISAGREEMENTS[9].x, {}),
    ("zero_inverse", "vllm_nvfp4", float_bits(INF), F16, ZERO, {"global_scale": 1.0}),
    ("inverse_cap", "transformer_engine_nvfp4", float_bits(0.25), F16, ROW, {}),
    ("reciprocal_ulps", "nunchaku_nvfp4", 0, F16, ROW * 1.0625, {}),
    ("flush", "nunchaku_nvfp4", 0, BF16, ROW * 2.0**-128, {}),
    ("zero_point", "vllm_uint4_zero", ZeroPoint.NONE, F16, ROW, {}),
    ("order", "compressed_tensors_int4_zero", Order.ROUND_FIRST, F16, np.array([[4, -3.5, 0.25, -0.75]]), {}),
    ("code_offset", "vllm_uint4b8", 7, F16, ROW, {}),
    ("rounding", "svdquant_nvfp4", Rounding.RNE, F16, ROW, {}),
    ("nan_code", "vllm_fp8_token", NanCode.NAN, F16, ROW * [[NAN] + [1.0] * 15], {}),
    ("zero_sign", "nunchaku_nvfp4", ZeroSign.NEGATIVE, F16, ROW, {}),
    ("choice", "four_over_six_nvfp4", Choice.NONE, F16, np.array([[6, 4.5] + [0.0] * 14]), {"global_scale": 1.0}),
    ("second", "four_over_six_nvfp4", float_bits(1.25), F16, np.array([[6, 4.5] + [0.0] * 14]), {"global_scale": 1.0}),
]


@pytest.mark.parametrize("case", FLIPS, ids=[c[0] for c in FLIPS])
def test_every_field_counts(case: tuple[str, str, Any, Format, Reals, dict[str, Any]]) -> None:
    field, name, value, fmt, x, options = case
    recipe = small(RECIPES[name], x.shape[1])
    x = round_to(x, fmt)
    if "global_scale" in options:
        options = {"global_scale": float(f32(options["global_scale"]))}
    changed = replace(recipe, **{field: value})
    assert getattr(recipe, field) != value
    assert outcome(recipe, x, fmt, **options) != outcome(changed, x, fmt, **options)


def test_every_field_is_flipped_and_is_data() -> None:
    names = {f.name for f in fields(Recipe)} - {"name", "source"}
    assert {c[0] for c in FLIPS} == names
    for recipe in RECIPES.values():
        assert recipe.source
        for name in names:
            value = getattr(recipe, name)
            assert isinstance(value, (int, IntEnum, Format)) or (name == "scale" and value is None), (recipe.name, name)


def test_constants_are_plain_integers_in_field_order() -> None:
    got = dict(zip(CONSTANTS, constants(RECIPES["vllm_fp8_token"]), strict=True))
    assert all(type(v) is int for v in got.values())
    assert set(got) == {f.name for f in fields(Recipe)} - {"name", "source", "element", "scale"}
    assert (got["high"], got["divisor"], got["scale_ub"]) == (0x43E00000, 0x43E00000, 1)  # 448 in binary32


def test_which_recipes_have_a_global_scale() -> None:
    rules = {
        GlobalRule.ENCODE: {
            "vllm_nvfp4", "vllm_nvfp4_reference", "vllm_nvfp4_emulation", "compressed_tensors_nvfp4", "transformer_engine_nvfp4",
            "four_over_six_nvfp4",
        },
        GlobalRule.DECODE: {"modelopt_nvfp4", "torchao_nvfp4"},
    }
    for rule, names in rules.items():
        assert {name for name, r in RECIPES.items() if r.global_rule is rule} == names


def test_which_recipes_are_approximate() -> None:
    approximate = {
        name: (r.scale_division, r.apply, r.using, r.reciprocal_ulps, r.flush) for name, r in RECIPES.items() if not r.exact
    }
    assert approximate == {
        "vllm_nvfp4": (Division.APPROXIMATE, Division.APPROXIMATE, Using.STORED, 1, 1),
        "nunchaku_nvfp4": (Division.RECIPROCAL, Division.APPROXIMATE, Using.UNROUNDED, 1, 1),
        "nunchaku_int4": (Division.RECIPROCAL, Division.APPROXIMATE, Using.UNROUNDED, 1, 1),
    }


def test_bounds_are_codes_of_the_element_format() -> None:
    """What makes the order of clamp and rounding invisible for floats."""
    for recipe in RECIPES.values():
        for bits in (recipe.low, recipe.high):
            value = float_value(bits)
            if recipe.element not in (INT8, UINT4):
                assert decode(encode(np.array([value]), recipe.element), recipe.element)[0] == value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x_format": E4M3FN}, "expected f16, bf16 or f32"),
        ({"x": np.zeros(128)}, r"expected \[rows, K\]"),
        ({"x": np.zeros((2, 0))}, r"expected \[rows, K\]"),
        ({"x": np.full((1, 128), 0.1)}, "round x to it first"),
        ({"x": np.zeros((1, 100)), "recipe": RECIPES["vllm_nvfp4"]}, "expected multiples of the block"),
        ({"scale_ub": 1.0, "recipe": RECIPES["vllm_fp8_tensor"]}, "no upper bound of amax"),
        ({"static_scale": np.ones((1, 1))}, "static_scale must be given"),
        ({"recipe": RECIPES["vllm_fp8_static"]}, "static_scale must be given"),
        ({"recipe": RECIPES["vllm_fp8_static"], "static_scale": np.ones((1, 3))}, "two extents that divide"),
        ({"recipe": RECIPES["vllm_fp8_static"], "static_scale": np.full((1, 1), 0.1)}, "not a binary32 value"),
        ({"global_scale": 1.0}, "expected none; the recipe has one level"),
        ({"recipe": RECIPES["vllm_nvfp4"], "global_scale": 0.1}, "not a binary32 value"),
        ({"recipe": RECIPES["vllm_int4"], "bounds": (np.zeros((1, 128)),) * 2}, "only recipes on amax"),
        ({"bounds": (np.ones((1, 128)),) * 2}, "expected matrices around x"),
    ],
)
def test_refusals(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"x": np.zeros((1, 128)), "x_format": F16, "recipe": RECIPES["vllm_fp8_token"], **change}
    with pytest.raises(ValueError, match=match):
        quantise(**arguments)


def test_refusals_of_admissible_codes() -> None:
    x = np.zeros((1, 128))
    with pytest.raises(ValueError, match="expected neither"):
        admissible_codes(x, F16, RECIPES["four_over_six_nvfp4"], np.zeros((1, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="got scales of shape"):
        admissible_codes(x, F16, RECIPES["nunchaku_nvfp4"], np.zeros((1, 4), dtype=np.uint8))
