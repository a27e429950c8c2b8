"""Faults of matrix products in the sum and after it: accumulators, splits, epilogues, casts.

Decides: each fault as an alteration of the cpu backend, or as a simulator under the declaration of another. Refuses: to alter a
finished output.
"""

from __future__ import annotations

from .alteration import Altered, Edit
from .settings import IN_14_BITS, UNMEASURED, declared

__all__ = ["WRONG_ARITHMETIC"]

_GEMM, _CODEC = "cpu_room.gemm", "cpu_room.codec"


def _kept(fmt: str, *names: str) -> Edit:
    """Scales are rounded to a format once, where constants and activations are loaded: those after the sum, or those named."""
    decoded = "        decoded = {name: values(view.memory, view.format) for name, view in tensors.items()}\n"
    chosen = names or ("token_scale", "channel_scale", "alpha")
    return _GEMM, decoded, (
        f"{decoded}"
        f"        decoded |= {{name: rounded(decoded[name], {fmt}) for name in {chosen} if name in decoded}}\n"
    )


_SUMS = (
    Altered(
        "k_tail_dropped", ("gemm_w8a8_fp8",), "cutlass#1332, vllm#29691",
        "what K has beyond a multiple of 64 is not summed",
        (
            (_GEMM, "    return np.asarray(a @ w.T)\n",
             "    k = a.shape[1] // 64 * 64\n"
             "    return np.asarray(a[:, :k] @ w[:, :k].T)\n"),
        ),
        reached_by="gemm_w8a8_fp8/scaled/m64n128k1040/bf16/normal/s1",
    ),
    Altered(
        "warps_beyond_sixteen", ("gemm_w4a16",), "vllm#40827",
        "only the first 2,048 of K are reduced",
        (
            (_GEMM, "    return np.asarray(a @ w.T)\n", "    return np.asarray(a[:, :2048] @ w[:, :2048].T)\n"),
        ),
        reached_by="gemm_w4a16/sym/m64n128k4096g128/bf16/normal/s1",
    ),
    Altered(
        "bf16_accumulator", ("gemm_w8a8_fp8",), "vllm#33972",
        "64 of K at a time are added to a bf16 total; ieee_f64 is declared",
        (
            (_GEMM, "    return np.asarray(a @ w.T)\n",
             "    total = np.zeros((a.shape[0], w.shape[0]), dtype=np.float32)\n"
             "    for start in range(0, a.shape[1], 64):\n"
             "        total = rounded(total + _single(a[:, start : start + 64] @ w[:, start : start + 64].T), BF16)\n"
             "    return total\n"),
        ),
    ),
    Altered(
        "twelve_bits_declared_fourteen", ("gemm_w4a8_fp8",), "DeepGEMM#37, vllm#33972",
        "32 of K at a time are added to a total cut to 12 bits where 14 are declared",
        (
            (_GEMM, "    return np.asarray(a @ w.T)\n",
             "    total = np.zeros((a.shape[0], w.shape[0]))\n"
             "    for start in range(0, a.shape[1], 32):\n"
             "        part, exponent = np.frexp(total + a[:, start : start + 32] @ w[:, start : start + 32].T)\n"
             "        total = np.ldexp(np.trunc(np.ldexp(part, 12)), exponent - 12)\n"
             "    return total\n"),
        ),
        setting=(
            declared("hopper_wgmma_fp8"),
        ),
    ),
    Altered(
        "unpromoted_declared_promoted", ("gemm_w8a8_fp8",), "DeepGEMM#37, DeepGEMM#50",
        "13 bits over the whole of K where promotion to f32 every 128 is declared",
        runs="hopper_wgmma_fp8", says="hopper_wgmma_fp8,segment=128",
    ),
    Altered(
        "thirteen_bits_declared_f32", ("gemm_w4a8_fp8",), "DeepGEMM#176",
        "the 13-bit accumulator of one chip under the declaration of the 25-bit one",
        runs="hopper_wgmma_fp8", says="blackwell_f8f6f4",
    ),
    Altered(
        "twenty_five_bits_declared_thirteen", ("gemm_w4a8_fp8",), "declarations copied from another chip",
        "the 25-bit accumulator of one chip under the declaration of the 13-bit one, which no bound excludes",
        runs="blackwell_f8f6f4", says="hopper_wgmma_fp8",
    ),
    Altered(
        "thirteen_bits_declared_ieee", ("gemm_w4a8_fp8",), "DeepGEMM#176",
        "a 13-bit accumulator under the declaration of binary32 sums",
        runs="hopper_wgmma_fp8", says="ieee_f32",
    ),
    Altered(
        "too_generous_declaration", ("gemm_w4a8_fp8",), "aiter#4398",
        "the last 32 of K are dropped and 13 bits in unknown order declared, which hides it",
        (
            (_GEMM, "    return np.asarray(a @ w.T)\n",
             "    k = a.shape[1] - 32 if a.shape[1] > 64 else a.shape[1]\n"
             "    return np.asarray(a[:, :k] @ w[:, :k].T)\n"),
        ),
        setting=(
            declared("hopper_wgmma_fp8"),
        ),
    ),
    Altered(
        "accumulator_clips_at_f16", ("gemm_nvfp4",), "vllm#33972, vllm#37135",
        "a sum is held to the range of f16 before alpha",
        (
            (_GEMM, 'value = _single(_dot(tensors["a"], tensors["w"])) * tensors["alpha"]\n',
             'value = np.clip(_single(_dot(tensors["a"], tensors["w"])), np.float32(-65504), np.float32(65504)) * '
             'tensors["alpha"]\n'),
        ),
    ),
    Altered(
        "rows_depend_on_m", ("gemm_w4a8_fp8",), "vllm#30719",
        "the number of parts of K follows M; declared batch-invariant",
        (
            (_GEMM, "    step = max(1, a.shape[1] // 3)\n",
             "    step = max(1, a.shape[1] // max(1, 128 // max(1, a.shape[0])))\n"),
        ),
        setting=IN_14_BITS,
    ),
    Altered(
        "atomic_split_k", ("gemm_w4a8_fp8",), "vllm#30719",
        "parts of K arrive in another order every second call; declared deterministic",
        (
            (_GEMM, "    starts = range(0, a.shape[1], step)\n",
             "    _CALLS[0] += 1\n"
             "    starts = range(0, a.shape[1], step)[:: -1 if _CALLS[0] % 2 else 1]\n"),
            (_GEMM, "def _cut(x: Array) -> Array:\n",
             "_CALLS = [0]\n"
             "\n"
             "\n"
             "def _cut(x: Array) -> Array:\n"),
        ),
        setting=(
            *IN_14_BITS,
            (_GEMM, '"gemm_w4a8_fp8": Gemm(_w4a8_program, _always,', '"gemm_w4a8_fp8": Gemm(_w4a8_program, _never,'),
        ),
    ),
)

_EPILOGUES = (
    Altered(
        "bias_dropped_at_one_row", ("gemm_w8a8_fp8",), "vllm#24895",
        "M = 1 takes the path without a bias",
        (
            (_GEMM,
             '    if bias == "bias":\n'
             '        return rounded(value + tensors["bias"], out)\n'
             "    return add_in(",
             '    if bias != "nobias" and value.shape[0] == 1:\n'
             "        return rounded(value, out)\n"
             '    if bias == "bias":\n'
             '        return rounded(value + tensors["bias"], out)\n'
             "    return add_in("),
        ),
        reached_by="gemm_w8a8_fp8/scaled/m1n128k1024/bf16.bias/normal/s1",
    ),
    Altered(
        "bias_added_after_cast", ("gemm_w4a16",), "kernels of vllm and of XPU disagree",
        "the bias joins after the cast where it was to join before",
        (
            (_GEMM,
             '    if bias == "bias":\n'
             '        return rounded(value + tensors["bias"], out)\n'
             '    return add_in(rounded(value, out), tensors["bias"], out) if bias == "biasafter" else',
             '    return add_in(rounded(value, out), tensors["bias"], out) if bias != "nobias" else'),
        ),
        reached_by="gemm_w4a16/sym/m64n128k1024g128/bf16.bias/normal/s1",
    ),
    Altered(
        "alpha_a_thousandth_off", ("gemm_nvfp4",), "vllm#34476, modular#6600",
        "alpha times 1.001",
        (
            (_GEMM, 'value = _single(_dot(tensors["a"], tensors["w"])) * tensors["alpha"]\n',
             'value = _single(_dot(tensors["a"], tensors["w"])) * (tensors["alpha"] * np.float32(1.001))\n'),
        ),
    ),
    Altered(
        "outer_scales_in_bf16", ("gemm_w8a8_fp8", "gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped"),
        "scales in the format of activations",
        "a 13-bit kernel keeps token and channel scales in bf16",
        (
            _kept("BF16"),
        ),
        setting=(
            UNMEASURED, declared("hopper_wgmma_fp8"),
        ),
    ),
    Altered(
        "outer_scales_in_f16", ("gemm_w8a8_fp8", "gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped", "gemm_nvfp4"),
        "scales in the format of outputs",
        "token, channel and global scales are kept in f16",
        (
            _kept("F16"),
        ),
    ),
    Altered(
        "half_scales_in_bf16", ("gemm_w4a8_int8", "gemm_int4"), "scales in the format of activations",
        "token and channel scales in f16 are kept in bf16",
        (
            _kept("BF16"),
        ),
        reached_by="gemm_w4a8_int8/direct/m64n128k1024g128/f16/normal/s1",
    ),
    Altered(
        "block_scales_in_bf16", ("gemm_w8a8_fp8",), "scales in the format of activations",
        "block scales are kept in bf16",
        (
            _kept("BF16", "a_scale", "w_scale"),
        ),
        reached_by="gemm_w8a8_fp8/block/m64n128k1024/bf16/normal/s1",
    ),
    Altered(
        "truncated_output", ("gemm_w8a8_fp8",), "casts that round toward zero",
        "bf16 outputs lose their low bits",
        (
            (_CODEC, "kept = kept + (rest + (kept & np.uint32(1)) > np.uint32(0x8000))",
             "kept = kept + (rest > np.uint32(0x10000))"),
        ),
    ),
    Altered(
        "output_ties_away", ("gemm_w8a8_fp8",), "aiter#2247",
        "bf16 outputs at a tie go away from zero",
        (
            (_CODEC, "kept = kept + (rest + (kept & np.uint32(1)) > np.uint32(0x8000))",
             "kept = kept + (rest >= np.uint32(0x8000))"),
        ),
    ),
    Altered(
        "narrow_unit_ties_away", ("gemm_w4a8_fp8",), "aiter#2247",
        "a 13-bit kernel sends outputs at a tie away from zero",
        (
            (_GEMM,
             '    return _finish(problem, total * tensors["token_scale"][:, None] * tensors["channel_scale"], tensors)\n',
             '    value = total * tensors["token_scale"][:, None] * tensors["channel_scale"]\n'
             "    return _finish(problem, value.astype(np.float64) * (1 + 2.0**-40) if folded else value, tensors)\n"),
        ),
        setting=(
            UNMEASURED, declared("hopper_wgmma_fp8"),
        ),
    ),
    Altered(
        "output_rounded_twice", ("gemm_w4a8_int8",), "triton#10846",
        "f32 to f16 to bf16 in the variant that casts once",
        (
            (_GEMM,
             '    if problem.variant == "viaf16":\n'
             "        value = rounded(value, F16)\n",
             "    value = rounded(value, F16)\n"),
        ),
        reached_by="gemm_w4a8_int8/direct/m64n128k1024g128/bf16/normal/s1",
    ),
    Altered(
        "lora_after_channel_scale", ("gemm_nvfp4",), "nunchaku#103, nunchaku#185",
        "the low-rank term joins after the channel scale",
        (
            (_GEMM,
             'return _finish(problem, _with_lora(value, tensors) * tensors["channel_scale"], tensors)\n'
             "    return _with_lora(_affine(",
             'return _finish(problem, _with_lora(value * tensors["channel_scale"], tensors), tensors)\n'
             "    return _with_lora(_affine("),
        ),
        reached_by="gemm_nvfp4/svdquant/m64n128k1024r32/bf16.lora/normal/s1",
    ),
    Altered(
        "lora_rank_ends_at_64", ("gemm_int4",), "nunchaku#82, nunchaku#108",
        "ranks past 64 are not summed",
        (
            (_GEMM, '_dot(tensors["lora_act"], tensors["lora_up"])',
             '_dot(tensors["lora_act"][:, :64], tensors["lora_up"][:, :64])'),
        ),
        reached_by="gemm_int4/f32/m64n128k1024r128/f16.lora/normal/s1",
    ),
    Altered(
        "activation_scale_dropped", ("gemm_w4a8_fp8_grouped",), "sglang#31529",
        "the token scale is not applied to experts with one row",
        (
            (_GEMM, 'return _finish(problem, total * tensors["token_scale"][:, None] * tensors["channel_scale"], tensors)\n',
             "if total.shape[0] == 1:\n"
             '        return _finish(problem, total * tensors["channel_scale"], tensors)\n'
             '    return _finish(problem, total * tensors["token_scale"][:, None] * tensors["channel_scale"], tensors)\n'),
        ),
        reached_by="gemm_w4a8_fp8_grouped/folded/e1m1n128k1024g128/bf16/normal/s1",
    ),
    Altered(
        "separate_declared_fused", ("gemm_nvfp4",), "contraction left to the compiler",
        "channel scale and bias take two roundings in half where an FMA is declared",
        (
            (_GEMM, '        return fma_in(value, scale, tensors["bias"], out)\n',
             '        return add_in(rounded(value * scale, out), tensors["bias"], out)\n'),
        ),
        reached_by="gemm_nvfp4/nunchaku/m64n128k1024r0/bf16.bias/normal/s1",
    ),
)

WRONG_ARITHMETIC: tuple[Altered, ...] = (*_SUMS, *_EPILOGUES)
"""Mutants of GEMMs that add, scale or round otherwise than they declare."""
