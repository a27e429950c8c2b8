"""Faults of matrix products before the sum: which scale, which expert, which element, and what a code stands for.

Decides: each fault as an alteration of the cpu backend. Refuses: to alter a finished output.
"""

from __future__ import annotations

from .alteration import Altered
from .settings import UNMEASURED, declared

__all__ = ["WRONG_OPERANDS"]

_GEMM, _CODEC = "cpu_room.gemm", "cpu_room.codec"

_INDICES = (
    Altered(
        "scale_per_tile", ("gemm_w4a16",), "vllm#39705",
        "one group scale per 64 of K: groups below the tile share one",
        (
            (_GEMM, 'scale = np.repeat(tensors["scale"], group, axis=1)\n',
             'scale = np.repeat(tensors["scale"][:, :: max(1, 64 // group)], max(64, group), axis=1)[:, : '
             'tensors["w"].shape[1]]\n'),
        ),
        reached_by="gemm_w4a16/sym/m64n128k1024g32/bf16/normal/s1",
    ),
    Altered(
        "scales_within_group_squared", ("gemm_w4a16",), "vllm#9212",
        "the scales of a row end at the group size: wrong for K > G^2",
        (
            (_GEMM, 'scale = np.repeat(tensors["scale"], group, axis=1)\n',
             'scale = np.repeat(tensors["scale"][:, np.arange(tensors["scale"].shape[1]) % group], group, axis=1)\n'),
        ),
        reached_by="gemm_w4a16/sym/m64n128k1024g16/bf16/normal/s1",
    ),
    Altered(
        "first_group_at_one_row", ("gemm_w4a8_int8",), "torch-xpu-ops#5001",
        "M = 1: every group is scaled by group 0",
        (
            (_GEMM, '        part = _single(sums) * tensors["group_scale"][:, g]\n',
             '        part = _single(sums) * tensors["group_scale"][:, g if sums.shape[0] > 1 or problem.op != '
             '"gemm_w4a8_int8" else 0]\n'),
        ),
        reached_by="gemm_w4a8_int8/direct/m1n128k1024g64/f16/normal/s1",
    ),
    Altered(
        "block_scale_neighbour", ("gemm_nvfp4",), "svdquant-kernels aedba4d",
        "weight scales read with the two inner axes of a tile exchanged",
        (
            (_GEMM, '            found[side] = found[side] * np.repeat(found.pop(f"{side}_scale"), 16, axis=1)\n',
             '            scale = found.pop(f"{side}_scale")\n'
             '            order = np.arange(scale.shape[1]) ^ (side == "w" and scale.shape[1] % 4 == 0)\n'
             "            found[side] = found[side] * np.repeat(scale[:, order], 16, axis=1)\n"),
        ),
    ),
    Altered(
        "scale_stage_late", ("gemm_w4a8_fp8",), "vllm#39705, svdquant-kernels 5b2c2ad",
        "a kernel that declares f16 accumulators: at K = 512 of three whole stages of 512 or more it uses the scale of "
        "the group before",
        (
            (_GEMM, '    codes = narrow_codes(q * np.repeat(tensors["group_scale"], problem.dim("g"), axis=-1), "e4m3fn")\n',
             '    stages = np.arange(tensors["group_scale"].shape[-1])\n'
             "    if q.shape[-1] > 1024 and q.shape[-1] % 512 == 0:\n"
             '        stages[512 // problem.dim("g") : 512 // problem.dim("g") + 1] -= 1\n'
             '    codes = narrow_codes(q * np.repeat(tensors["group_scale"][..., stages], problem.dim("g"), '
             'axis=-1), "e4m3fn")\n'),
        ),
        setting=(
            UNMEASURED, declared("hopper_wgmma_fp8_f16"),
        ),
        reached_by="gemm_w4a8_fp8/folded/m64n128k2048g128/bf16/normal/s1",
    ),
    Altered(
        "swapped_scales_when_square", ("gemm_w8a8_fp8",), "pytorch#159940",
        "M = N: token and channel scales change places",
        (
            (_GEMM,
             '    a, w = tensors["a"], tensors["w"]\n'
             '    if problem.variant == "scaled":\n',
             '    a, w = tensors["a"], tensors["w"]\n'
             '    if "token_scale" in tensors and tensors["token_scale"].shape == tensors["channel_scale"].shape:\n'
             '        tensors = {**tensors, "token_scale": tensors["channel_scale"], "channel_scale": '
             'tensors["token_scale"]}\n'
             '    if problem.variant == "scaled":\n'),
        ),
        reached_by="gemm_w8a8_fp8/scaled/m128n128k1024/bf16/normal/s1",
    ),
    Altered(
        "channel_scale_by_cluster", ("gemm_nvfp4",), "svdquant-kernels b251149",
        "channel scales indexed modulo the tile of one CTA",
        (
            (_GEMM,
             'return _finish(problem, _with_lora(value, tensors) * tensors["channel_scale"], tensors)\n'
             "    return _with_lora(_affine(",
             'scale = tensors["channel_scale"][np.arange(value.shape[1]) % 64]\n'
             "        return _finish(problem, _with_lora(value, tensors) * scale, tensors)\n"
             "    return _with_lora(_affine("),
        ),
        reached_by="gemm_nvfp4/svdquant/m64n128k1024r0/bf16/normal/s1",
    ),
    Altered(
        "channel_tail_not_predicated", ("gemm_w8a8_fp8",), "vllm#6852",
        "columns past the last 16 use the scale of the tile's first column",
        (
            (_GEMM, 'value = _single(_dot(a, w)) * tensors["channel_scale"]',
             "columns = np.arange(w.shape[0])\n"
             "        columns = np.where(columns >= w.shape[0] // 16 * 16, w.shape[0] // 16 * 16, columns)\n"
             '        if tensors["channel_scale"].size == 1:\n'
             "            columns = np.zeros(1, dtype=np.int64)\n"
             '        value = _single(_dot(a, w)) * tensors["channel_scale"][columns]'),
        ),
        reached_by="gemm_w8a8_fp8/scaled/m64n120k1024/bf16/normal/s1",
    ),
    Altered(
        "expert_index_of_live", ("gemm_w4a8_fp8_grouped",), "vllm#40351",
        "experts without rows are not counted: later experts use weights of others",
        (
            (_GEMM, 'for expert, count in enumerate(tensors["counts"].astype(np.int64)):\n',
             'for expert, count in enumerate(c for c in tensors["counts"].astype(np.int64) if c):\n'),
        ),
    ),
    Altered(
        "expert_tile_not_predicated", ("gemm_w4a8_fp8_grouped",), "vllm#29691, vllm#40351",
        "the first tile of an expert starts on a multiple of four rows and overwrites the rows before",
        (
            (_GEMM,
             '            own = {name: array[start:stop] for name, array in tensors.items() if name in ("a", '
             '"token_scale")}\n',
             "            start = start // 4 * 4\n"
             '            own = {name: array[start:stop] for name, array in tensors.items() if name in ("a", '
             '"token_scale")}\n'),
        ),
    ),
    Altered(
        "operand_index_wraps", ("gemm_w8a8_fp8",), "vllm#6649, vllm#9425",
        "offsets into A wrap: int32 of the report scaled down to 16 bits",
        (
            (_GEMM,
             '    a, w = tensors["a"], tensors["w"]\n'
             '    if problem.variant == "scaled":\n',
             '    a, w = tensors["a"], tensors["w"]\n'
             "    a = a.reshape(-1)[np.arange(a.size) % (1 << 16)].reshape(a.shape)\n"
             '    if problem.variant == "scaled":\n'),
        ),
        reached_by="gemm_w8a8_fp8/scaled/m128n128k1024/bf16/normal/s1",
    ),
)

_DECODING = (
    Altered(
        "offset_seven", ("gemm_w4a16",), "tilelang#2477",
        "int4 decoded as nibble - 7",
        (
            (_GEMM, 'if "zero" in tensors else np.float32(8)\n', 'if "zero" in tensors else np.float32(7)\n'),
        ),
    ),
    Altered(
        "sign_not_extended", ("gemm_w4a8_fp8", "gemm_int4"), "tilelang#2482",
        "negative nibbles are zero-extended",
        (
            (_CODEC, "return ((codes ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(np.float32)",
             "return codes.astype(np.float32)"),
        ),
    ),
    Altered(
        "gptq_zero_point", ("gemm_w4a16",), "vllm#26092, GPTQModel#2350",
        "zero points read as stored one less, 15 wrapping to 0",
        (
            (_GEMM, 'zero = np.repeat(tensors["zero"], group, axis=1)',
             'zero = np.repeat((tensors["zero"] + np.float32(1)) % np.float32(16), group, axis=1)'),
        ),
        reached_by="gemm_w4a16/zp/m64n128k1024g128/bf16/normal/s1",
    ),
    Altered(
        "zero_point_saturates", ("gemm_w4a16",), "vllm#26092",
        "zero point 15 read as 14: a decrement that does not wrap, then an increment",
        (
            (_GEMM, 'zero = np.repeat(tensors["zero"], group, axis=1)',
             'zero = np.repeat(np.minimum(tensors["zero"], np.float32(14)), group, axis=1)'),
        ),
        reached_by="gemm_w4a16/zp/m64n128k1024g128/bf16/normal/s1",
    ),
    Altered(
        "weight_not_rounded", ("gemm_w4a8_fp8",), "the rounded product q s of vllm's W4A8",
        "q s enters the product unrounded",
        (
            (_GEMM, '    return tensors | {"w": np.where(q == 0, np.float32(-0.0), values(codes, E4M3FN))}\n',
             '    codes = q * np.repeat(tensors["group_scale"], problem.dim("g"), axis=-1)\n'
             '    return tensors | {"w": np.where(q == 0, np.float32(-0.0), codes)}\n'),
        ),
    ),
    Altered(
        "lowest_code_saturates", ("gemm_w4a8_fp8",), "sparkinfer#723",
        "a 13-bit kernel decodes -8 as -7 in the last of K, beyond 1,024",
        (
            (_GEMM, '    q = tensors["w"]\n',
             '    q = tensors["w"].copy()\n'
             "    if q.shape[-1] > 1024:\n"
             "        q[..., -1] = np.maximum(q[..., -1], -7)\n"),
        ),
        setting=(
            UNMEASURED, declared("hopper_wgmma_fp8"),
        ),
    ),
    Altered(
        "subnormal_scales_flushed", ("gemm_nvfp4",), "vllm#34577, vllm#37502",
        "block scales below 2^-6 are zero",
        (
            (_GEMM, '            found[side] = found[side] * np.repeat(found.pop(f"{side}_scale"), 16, axis=1)\n',
             '            scale = found.pop(f"{side}_scale")\n'
             "            scale = np.where(np.abs(scale) < np.float32(2.0**-6), np.float32(0), scale)\n"
             "            found[side] = found[side] * np.repeat(scale, 16, axis=1)\n"),
        ),
    ),
    Altered(
        "zero_weights_skipped", ("gemm_w8a8_fp8", "gemm_w4a8_fp8"), "products skipped for zero weights",
        "a product by a zero weight is left out, so NaN times zero is lost",
        (
            (_GEMM, "    return np.asarray(a @ w.T)\n",
             "    found = np.nan_to_num(a, nan=0.0) @ w.T\n"
             "    hit = np.isnan(a).astype(np.float64) @ (np.nan_to_num(w, nan=1.0) != 0).astype(np.float64).T\n"
             "    return np.where(hit > 0, np.nan, found)\n"),
        ),
    ),
)

WRONG_OPERANDS: tuple[Altered, ...] = (*_INDICES, *_DECODING)
"""Mutants of GEMMs that multiply the wrong numbers."""
