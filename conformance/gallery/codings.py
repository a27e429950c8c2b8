"""Faults of encodings and quantisers: packing, reordering, constants, rounding, special values, padding, partial work.

Decides: each fault as an alteration of the cpu backend. Refuses: to alter a finished output, but for faults of the store.
"""

from __future__ import annotations

from .alteration import Altered

__all__ = ["WRONG_CODES"]

_ENC, _QNT, _CODEC, _DOOR = "cpu_room.encodings", "cpu_room.quantisers", "cpu_room.codec", "cpu"

_ENCODINGS = (
    Altered(
        "nibbles_exchanged", ("int4_pack",), "imp#567, imp#722",
        "the even element goes to the high half of a byte",
        (
            (_ENC, "(codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4)))",
             "(codes[..., 1::2] | (codes[..., 0::2] << np.uint8(4)))"),
        ),
    ),
    Altered(
        "negatives_not_masked", ("int4_pack",), "vllm#23198",
        "the sign of an int8 code runs into the nibbles above it",
        (
            (_ENC, 'q, variant = tensors["q"] & np.uint8(15), problem.variant\n',
             'q, variant = tensors["q"], problem.variant\n'),
            (_ENC, "return np.asarray(np.bitwise_or.reduce(split << _SHIFTS, axis=-1))",
             "return np.asarray(np.bitwise_or.reduce(np.where(split > 15, split | np.uint32(0xFFFFFF00), split) << "
             "_SHIFTS, axis=-1))"),
        ),
    ),
    Altered(
        "awq_order_inverted", ("int4_pack",), "lmdeploy#3652, gemlite#38",
        "the AWQ interleave is applied the wrong way round",
        (
            (_ENC, "along_n = np.concatenate((eights[..., 0::2], eights[..., 1::2]), axis=-1).reshape(along_n.shape)",
             "along_n = eights[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(along_n.shape)"),
        ),
    ),
    Altered(
        "zero_point_does_not_wrap", ("int4_pack",), "vllm#38966, GPTQModel#2351",
        "a stored zero point of 0 stays 0 instead of wrapping to 15",
        (
            (_ENC, "q = (q + np.uint8(15)) & np.uint8(15)\n", "q = np.where(q > 0, (q + np.uint8(15)) & np.uint8(15), q)\n"),
        ),
    ),
    Altered(
        "repack_not_transposed", ("int4_repack",), "vllm#42725, vllm#41689",
        "square weights are reordered in their words and not turned",
        (
            (_ENC, 'packed.T if problem.variant == "zeros" else _words(_nibbles(packed).T)',
             'packed.T if problem.variant == "zeros" else _words(_nibbles(packed) if packed.shape[0] == 8 * '
             "packed.shape[1] else _nibbles(packed).T)"),
        ),
    ),
    Altered(
        "borrow_crosses_nibbles", ("int4_encode",), "sparkinfer#723, sparkinfer#761",
        "two nibbles are subtracted in one byte",
        (
            (_ENC, "        low, high = _unified(q & np.uint8(15)), _unified(q >> np.uint8(4))\n",
             "        both = np.uint8(0x88) - q\n"
             "        low = np.where(q & np.uint8(8), q & np.uint8(15), both & np.uint8(7))\n"
             "        high = np.where(q & np.uint8(128), q >> np.uint8(4), (both >> np.uint8(4)) & np.uint8(7))\n"),
        ),
    ),
    Altered(
        "registers_exchanged", ("int4_encode",), "tilelang-ascend#438, nunchaku#67",
        "the order of K and N within a tile is exchanged",
        (
            (_ENC, "register = column // 16 % 2 * 2 + row // 8 % 2", "register = row // 8 % 2 * 2 + column // 16 % 2"),
        ),
    ),
    Altered(
        "product_table_overflows", ("scale_pack_e4m3",), "vllm#4570, Model-Optimizer#1397",
        "a product past 464 becomes NaN instead of 448",
        (
            (_ENC, '    return {"packed": narrow_codes(values(tensors["scales"], E4M3FN)[:, None] * factors, "e4m3fn")}\n',
             '    products = values(tensors["scales"], E4M3FN)[:, None] * factors\n'
             "    products = np.where(np.abs(products) > 464, np.copysign(np.float32(np.nan), products), products)\n"
             '    return {"packed": narrow_codes(products, "e4m3fn")}\n'),
        ),
    ),
    Altered(
        "fold_by_reciprocal", ("scale_fold",), "arch-com#905",
        "group scales are multiplied by 1 / c where the recipe divides",
        (
            (_ENC, "            quotient = np.fmax(-top, np.fmin(s / c, top))\n",
             "            quotient = np.fmax(-top, np.fmin(s * (np.float32(1) / c), top))\n"),
        ),
    ),
    Altered(
        "fold_nan_to_zero", ("scale_fold",), "lmdeploy#3652, vllm#37564",
        "a NaN scale becomes 0",
        (
            (_ENC, "            quotient = np.fmax(-top, np.fmin(s / c, top))\n",
             "            quotient = np.clip(np.nan_to_num(s / c, nan=0.0), -top, top)\n"),
        ),
    ),
    Altered(
        "swizzle_32_by_4", ("scale_swizzle",), "Fuser#4745",
        "rows of a tile are split as (32, 4) where (4, 32) is meant",
        (
            (_ENC, "m % 32 * 16 + m // 32 % 4 * 4 + g % 4", "m // 4 % 32 * 16 + m % 4 * 4 + g % 4"),
        ),
    ),
    Altered(
        "swizzle_padding_stale", ("scale_swizzle",), "vllm#31097, vllm#38148",
        "padding of the swizzled scales is not written",
        (
            (_DOOR, "            target.memory[...] = codes\n",
             '            if problem.op == "scale_swizzle":\n'
             '                m, g = np.meshgrid(*(np.arange(n) for n in tensors["scales"].memory.shape), indexing="ij")\n'
             "                place = (m // 128 * (codes.shape[1] // 4) + g // 4) * 512 + m % 32 * 16 + m // 32 % 4 * 4 "
             "+ g % 4\n"
             "                np.put(target.memory, place, codes.reshape(-1)[place])\n"
             "            else:\n"
             "                target.memory[...] = codes\n"),
        ),
    ),
    Altered(
        "fnuz_doubling_everywhere", ("fp8_convert_fnuz",), "vllm#14689",
        "scales are doubled on hardware that has no fnuz formats",
        (
            (_ENC, "np.uint32) if fnuz else tensors[name]", "np.uint32)"),
        ),
    ),
    Altered(
        "minus_zero_stays", ("fp8_convert_fnuz",), "triton#10745, triton#3997",
        "the byte of -0 stays and is NaN in fnuz",
        (
            (_ENC, "np.where(w == 0x80, np.uint8(0), w) if fnuz else w", "w"),
        ),
    ),
    Altered(
        "nan_byte_cleared", ("fp8_convert_fnuz",), "aiter#3807",
        "the byte 0x7F, NaN before and 240 after, becomes 0",
        (
            (_ENC, "np.where(w == 0x80, np.uint8(0), w) if fnuz else w",
             "np.where((w == 0x80) | (w == 0x7F), np.uint8(0), w) if fnuz else w"),
        ),
    ),
    Altered(
        "fnuz_range_448", ("fp8_requantize",), "vllm#31106, vllm#31179",
        "fnuz weights are bounded by 448, the range of the other format",
        (
            (_ENC, "top = np.float32(224 if fnuz else 448)", "top = np.float32(448)"),
        ),
    ),
    Altered(
        "scale_of_first_shard", ("fp8_requantize",), "vllm#47515, vllm#34476",
        "fused shards take the scale of the first one",
        (
            (_ENC, "    largest = np.max(scales)\n", "    largest = scales[0]\n"),
        ),
    ),
    Altered(
        "shards_of_equal_width", ("fp8_requantize",), "vllm#54974",
        "logical widths are ignored: rows are divided evenly among the shards",
        (
            (_ENC, 'scales, widths = values(tensors["scales"], F32), tensors["widths"].astype(np.int64)\n',
             'scales, widths = values(tensors["scales"], F32), tensors["widths"].astype(np.int64)\n'
             "    even = np.full_like(widths, widths.sum() // widths.size)\n"
             "    even[-1] += widths.sum() - even.sum()\n"
             "    widths = even\n"),
        ),
    ),
)

_QUANTISERS = (
    Altered(
        "token_scale_by_reciprocal", ("fp8_quantize",), "arch-com#905",
        "x is multiplied by 1 / scale where the recipe divides",
        (
            (_QNT, "        return x / scale, scale\n", "        return x * (_ONE / scale), scale\n"),
        ),
    ),
    Altered(
        "fnuz_top_240", ("fp8_quantize",), "vllm#31106, vllm#42893",
        "fnuz scales are made for 240 instead of 224",
        (
            (_QNT, '("e4m3fnuz", 224, 240)', '("e4m3fnuz", 240, 240)'),
        ),
    ),
    Altered(
        "bound_on_scale", ("fp8_quantize",), "vllm#4570",
        "the upper bound of amax is taken for one of the scale",
        (
            (_QNT,
             "        amax = _number_max(x)\n"
             "        scale = np.maximum((amax if bound is None else np.minimum(amax, bound)) / top, _fp8_floor(top))\n",
             "        amax = _number_max(x)\n"
             "        scale = np.maximum(amax / top if bound is None else np.minimum(amax / top, bound), _fp8_floor(top))\n"),
        ),
    ),
    Altered(
        "nan_laundered_to_max", ("fp8_quantize",), "triton#10745, aiter#4289",
        "NaN becomes the largest value in the recipe that keeps it",
        (
            (_QNT, "            bounded = np.clip(quotient, np.float32(-most), np.float32(most))  # NaN stays\n",
             "            bounded = np.fmax(np.float32(-most), np.fmin(quotient, np.float32(most)))\n"),
        ),
    ),
    Altered(
        "padded_rows_not_written", ("fp8_quantize",), "vllm#20188",
        "rows of codes past the last token are not cleared",
        (
            (_DOOR, "            target.memory[...] = codes\n",
             '            rows = problem.dim("m") if problem.op == "fp8_quantize" and name == "q" else len(codes)\n'
             "            target.memory[:rows] = codes[:rows]\n"),
        ),
    ),
    Altered(
        "zero_row_divides_by_zero", ("fp8_quantize",), "kernels-community#680, ao#4713",
        "no floor under the token scale: a row of zeros is 0 / 0",
        (
            (_QNT, "    return _ONE / (top * np.float32(512))\n", "    return np.float32(0) * top\n"),
        ),
    ),
    Altered(
        "quantiser_index_wraps", ("fp8_quantize",), "vllm#6649, vllm#9425",
        "offsets into x wrap: int32 of the report scaled down to 16 bits",
        (
            (_QNT,
             '    x = values(tensors["x"], _FORMATS[problem.option("x")])\n'
             "    name, top, most",
             '    x = values(tensors["x"], _FORMATS[problem.option("x")])\n'
             "    x = x.reshape(-1)[np.arange(x.size) % (1 << 16)].reshape(x.shape)\n"
             "    name, top, most"),
        ),
    ),
    Altered(
        "int8_ties_away", ("int8_quantize",), "aiter#2247",
        "quotients at a tie go away from zero",
        (
            (_QNT, "        q = _integers(np.rint(quotient), -128, 127).view(np.uint8)\n",
             "        q = _integers(np.trunc(quotient + np.copysign(np.float32(0.5), quotient)), -128, 127).view(np.uint8)\n"),
        ),
    ),
    Altered(
        "int8_truncated", ("int8_quantize",), "triton#10846",
        "quotients are cut to integers",
        (
            (_QNT, "        q = _integers(np.rint(quotient), -128, 127).view(np.uint8)\n",
             "        q = _integers(np.trunc(quotient), -128, 127).view(np.uint8)\n"),
        ),
    ),
    Altered(
        "divisor_seven", ("int4_quantize",), "compressed-tensors#541",
        "amax / 7 where the recipe divides by 7.5",
        (
            (_QNT, "scale = rounded(_torch_max(blocks) / np.float32(7.5), fmt)",
             "scale = rounded(_torch_max(blocks) / np.float32(7), fmt)"),
        ),
    ),
    Altered(
        "clamped_before_zero_point", ("int4_quantize",), "compressed-tensors#458",
        "codes are bounded before the zero point is added, and wrap",
        (
            (_QNT,
             "    return _integers(np.rint(rounded(blocks / scale, fmt)) + zero, 0, 15), scale, _integers(zero, 0, 15)\n",
             "    q = np.clip(np.rint(rounded(blocks / scale, fmt)), -8, 7) + zero\n"
             "    return _integers(q, 0, 15), scale, _integers(zero, 0, 15)\n"),
        ),
    ),
    Altered(
        "group_of_zeros", ("int4_quantize",), "lmdeploy#3652, gemlite#38",
        "a group of zeros keeps the scale 0",
        (
            (_QNT,
             "    scale = rounded(_torch_max(blocks) / np.float32(7.5), fmt)\n"
             "    scale = np.where(scale == 0, _EPSILON[fmt.name], scale)\n",
             "    scale = rounded(_torch_max(blocks) / np.float32(7.5), fmt)\n"),
        ),
    ),
    Altered(
        "e2m1_ties_away", ("nvfp4_quantize",), "aiter#2247, aiter#3992",
        "e2m1 codes at a tie go away from zero",
        (
            (_CODEC, "        steps = np.rint(np.ldexp(magnitude, rule.fraction + 1 - exponent))\n",
             "        scaled = np.ldexp(magnitude, rule.fraction + 1 - exponent)\n"
             '        steps = np.floor(scaled + np.float32(0.5)) if name == "e2m1" else np.rint(scaled)\n'),
        ),
    ),
    Altered(
        "e2m1_through_bf16", ("nvfp4_quantize",), "compressed-tensors#820",
        "quotients are rounded to bf16 on their way to e2m1",
        (
            (_QNT, '    return narrow_codes(blocks / (scale / g), "e2m1"), scale\n',
             '    return narrow_codes(rounded(blocks / (scale / g), BF16), "e2m1"), scale\n'),
        ),
    ),
    Altered(
        "scale_past_448", ("nvfp4_quantize",), "Model-Optimizer#1397",
        "a block scale past 464 becomes the NaN byte",
        (
            (_QNT, "scale = _e4m3(np.clip(np.where(scale == 0, _ONE, scale), np.float32(2.0**-9), np.float32(448)))",
             "scale = np.maximum(np.where(scale == 0, _ONE, scale), np.float32(2.0**-9))\n"
             "    scale = _e4m3(np.where(scale > 464, np.float32(np.nan), scale))"),
        ),
    ),
    Altered(
        "half_of_the_block", ("nvfp4_quantize",), "vllm#35210",
        "amax looks at 8 of the 16 elements of a block",
        (
            (_QNT, "    scale = _e4m3(g * (_number_max(blocks) * _SIXTH))\n",
             "    scale = _e4m3(g * (_number_max(blocks[..., :8]) * _SIXTH))\n"),
        ),
    ),
    Altered(
        "reciprocal_of_six", ("nvfp4_quantize",), "arch-com#905",
        "amax times fl(1/6) in the recipe that divides by 6",
        (
            (_QNT, "return _svdquant_codes(blocks, _torch_max(blocks) / np.float32(6))",
             "return _svdquant_codes(blocks, _torch_max(blocks) * _SIXTH)"),
        ),
    ),
    Altered(
        "zero_scale_divides", ("nvfp4_quantize",), "ao#4714, aiter#4289",
        "a block whose scale rounds to zero is divided by it",
        (
            (_QNT, "    inverse = np.where(scale != 0, _rcp(scale * _rcp(g)), np.float32(0))\n",
             "    inverse = _rcp(scale * _rcp(g))\n"),
        ),
    ),
    Altered(
        "scales_lost_for_some_m", ("nvfp4_quantize",), "flashinfer#3398",
        "swizzled scales are all zero where M mod 32 is between 1 and 8 and M passes 32",
        (
            (_QNT, "        scales = swizzled(scales[..., 0], ",
             "        if x.shape[0] > 32 and 1 <= x.shape[0] % 32 <= 8:\n"
             "            scales = scales * np.uint8(0)\n"
             "        scales = swizzled(scales[..., 0], "),
        ),
    ),
    Altered(
        "lora_of_smoothed_activation", ("svdquant_quantize",), "nunchaku#33, nunchaku#95",
        "the low-rank projection is of x / smooth",
        (
            (_QNT, "projected = x.astype(np.float64) @ down.astype(np.float64)",
             "projected = smoothed.astype(np.float64) @ down.astype(np.float64)"),
        ),
    ),
    Altered(
        "padding_repeats_last_row", ("svdquant_quantize",), "vllm#38148, flashinfer#2861",
        "padded rows repeat the last row",
        (
            (_QNT,
             "    return np.concatenate((codes, np.zeros((rows - codes.shape[0], codes.shape[1]), dtype=codes.dtype)))\n",
             "    return np.concatenate((codes, np.repeat(codes[-1:], rows - codes.shape[0], axis=0)))\n"),
        ),
    ),
)

WRONG_CODES: tuple[Altered, ...] = (*_ENCODINGS, *_QUANTISERS)
"""Mutants of the encodings and the quantisers."""
