"""Legitimate backends that round differently from the cpu backend, each under an honest declaration. None may be accused.

Decides: what a kernel may choose (order, tiles, splits, promotion, width, fusion, tactics) and how it declares the choice.
Refuses: declarations wider than what the variant computes; a suite that accuses none because all hide behind loose bounds
proves nothing.
"""

from __future__ import annotations

from .alteration import Altered, Edit
from .settings import DOT, declared

__all__ = ["VARIANTS"]

_GEMM, _QNT, _DOOR = "cpu_room.gemm", "cpu_room.quantisers", "cpu"
_FP8 = ("gemm_w8a8_fp8", "gemm_w4a8_fp8")
_ENCODINGS = (
    "int4_pack", "int4_repack", "int4_encode", "scale_pack_e4m3", "scale_fold", "scale_swizzle", "fp8_convert_fnuz",
    "fp8_requantize",
)
_QUANTISERS = ("fp8_quantize", "int8_quantize", "int4_quantize", "nvfp4_quantize", "svdquant_quantize")
_PRODUCTS = ("gemm_w4a16", *_FP8, "gemm_w4a8_fp8_grouped", "gemm_w4a8_int8", "gemm_nvfp4", "gemm_int4")
_CHANNEL = 'return (*head, *_lora(problem), mul("channel_scale"), *_tail(problem))'
_FMA: Edit = (
    _GEMM,
    '        return _finish(problem, _with_lora(value, tensors) * tensors["channel_scale"], tensors)\n'
    '    return _with_lora(_affine(',
    '        value, out = _with_lora(value, tensors), _OUT[problem.option("out")]\n'
    '        if problem.option("bias") != "bias":\n'
    '            return rounded(value * tensors["channel_scale"], out)\n'
    '        return rounded(_single(value.astype(np.float64) * tensors["channel_scale"] + tensors["bias"]), out)\n'
    '    return _with_lora(_affine(',
)
"""Channel scale and bias of the svdquant order by one rounding."""


def _simulated(name: str, ops: tuple[str, ...], datapath: str, what: str) -> Altered:
    return Altered(name, ops, "matrix units as published", what, runs=datapath)


def _joined(join: str) -> Edit:
    bias = f'Join.{join} if problem.option("bias") == "bias" else Join.SEPARATE'
    return _GEMM, _CHANNEL, _CHANNEL.replace('mul("channel_scale")', f'mul("channel_scale", join={bias})')


VARIANTS: tuple[Altered, ...] = (
    _simulated("truncates_at_13_bits", _FP8, "hopper_wgmma_fp8", "13 fraction bits, cut, over the whole of K"),
    _simulated("promoted_every_128", ("gemm_w8a8_fp8",), "hopper_wgmma_fp8,segment=128", "13 bits within 128 of K, f32 between"),
    _simulated("split_k_2", ("gemm_w4a8_fp8",), "hopper_wgmma_fp8,splits=2", "two halves of K added in f32"),
    _simulated("split_k_3", ("gemm_w8a8_fp8",), "blackwell_f8f6f4,splits=3", "three parts of K added in f32, 25 bits"),
    _simulated("split_k_8", ("gemm_w4a16",), "hopper_bf16,splits=8", "eight parts of K added in f32"),
    _simulated("eight_products_a_node", ("gemm_w4a16",), "ampere_f16", "24 bits, nodes of eight products"),
    _simulated("sixteen_products_a_node", ("gemm_w4a16",), "hopper_f16", "25 bits, nodes of sixteen products"),
    _simulated("pairs_then_f32", ("gemm_w4a8_fp8",), "hopper_mma_fp8", "two chained nodes, then an addition in f32"),
    _simulated("fnuz_pairs", ("gemm_w8a8_fp8",), "cdna3_fp8", "even and odd k apart, floored"),
    _simulated("native_block_scales", ("gemm_nvfp4",), "blackwell_nvfp4", "runs of 16 summed exactly, scaled, 35 bits"),
    _simulated("dequantised_to_bf16", ("gemm_nvfp4",), "hopper_bf16", "block scales multiplied into bf16 operands, 25 bits"),
    _simulated("integer_unit", ("gemm_int4", "gemm_w4a8_int8"), "imma_s32", "int32 sums per group, f32 between"),
    Altered(
        "reversed_k", ("gemm_w4a16", "gemm_nvfp4"), "order unknown, as declared",
        "K from its end",
        ((_GEMM, DOT, "    return np.asarray(np.ascontiguousarray(a[:, ::-1]) @ np.ascontiguousarray(w[:, ::-1]).T)\n"),),
    ),
    Altered(
        "tiles_of_96", ("gemm_w4a16", "gemm_nvfp4"), "order unknown, as declared",
        "tiles of 96 along K, 40 along M and N",
        (
            (_GEMM, DOT,
             "    total = np.zeros((a.shape[0], w.shape[0]))\n"
             "    for k in range(0, a.shape[1], 96):\n"
             "        for m in range(0, a.shape[0], 40):\n"
             "            for n in range(0, w.shape[0], 40):\n"
             "                total[m : m + 40, n : n + 40] += a[m : m + 40, k : k + 96] @ w[n : n + 40, k : k + 96].T\n"
             "    return total\n"),
        ),
    ),
    Altered(
        "binary32_sums", ("gemm_w4a16", "gemm_w4a8_fp8"), "f32 accumulators of most kernels",
        "sums in f32 by BLAS, declared ieee_f32 in unknown order",
        (
            declared("ieee_f32"),
            (_GEMM, '"gemm_w4a8_fp8": Gemm(_w4a8_program, _always,', '"gemm_w4a8_fp8": Gemm(_w4a8_program, _never,'),
            (_GEMM, DOT, "    return np.asarray(_single(a) @ _single(w).T)\n"),
        ),
    ),
    Altered(
        "fma_epilogue_fused", ("gemm_nvfp4",), "FMA where one is declared",
        "channel scale and bias by one FMA, declared fused",
        (_joined("FUSED"), _FMA),
    ),
    Altered(
        "fma_epilogue_either", ("gemm_nvfp4",), "contraction left to the compiler",
        "channel scale and bias by one FMA, declared either",
        (_joined("EITHER"), _FMA),
    ),
    Altered(
        "half_group_totals", ("gemm_int4",), "half accumulation of nunchaku and svdquant kernels",
        "group sums are added in the output format, as declared",
        (
            (_GEMM, '        main = Contraction(("a", "w"), _INTEGER, segment=64, steps=steps)\n',
             '        main = Contraction(("a", "w"), _INTEGER, segment=64, steps=steps, running=out)\n'),
            (_GEMM,
             "            part = _single(sums) * left * right\n"
             "            total = part if total is None else total + part\n",
             "            part = _single(sums) * left * right\n"
             "            total = rounded(part if total is None else total.astype(np.float64) + part, out)\n"),
        ),
    ),
    Altered(
        "approximate_reciprocal", ("nvfp4_quantize",), "rcp.approx of CUDA kernels",
        "reciprocals are rounded up, less than the one ulp that the recipe admits",
        (
            (_QNT, "    inverse = _ONE / np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)\n",
             "    exact = 1.0 / np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x).astype(np.float64)\n"
             "    nearest = exact.astype(np.float32)\n"
             "    inverse = np.nextafter(nearest, np.copysign(np.float32(np.inf), nearest))\n"
             "    inverse = np.where(np.abs(nearest) < np.abs(exact), inverse, nearest)\n"),
        ),
    ),
    Altered(
        "two_tactics", ("gemm_int4",), "kernels with several schedules",
        "the same arithmetic listed as two tactics",
        (
            (_DOOR, "    def prepare(",
             "    def tactics(self, problem: Problem) -> tuple[str, ...]:\n"
             '        return ("tile_64", "tile_128")\n\n'
             "    def prepare("),
        ),
    ),
    Altered("control", (*_ENCODINGS, *_QUANTISERS, *_PRODUCTS), "what all of these alter", "the cpu backend as it is"),
)
"""Backends whose verdicts may not be DRIFT, MALFORMED, RAISED, CRASHED or TIMEOUT."""
