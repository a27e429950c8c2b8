"""Encodings of weights and scales: exhaustive over codes, with counts and values derived in Fractions."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from lowbit.references.encodings import (
    FUSED_SENTINEL,
    Subtract,
    channelwise_scales,
    convert_fnuz,
    dequant_w4a16,
    flip_int4_offset,
    fold_scales,
    folded_weight,
    pack_scale_e4m3,
    requantize_max_scale,
)
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
    Special,
    decode,
    decode_scalar,
)
from lowbit.references.recipes import RECIPES
from lowbit.references.rounding import Overflow, Rounding, encode

ALL = np.arange(256, dtype=np.uint8)


def codes(values: list[float] | list[list[float]], fmt: Format) -> Codes:
    return encode(np.array(values, dtype=np.float64), fmt, Rounding.RNE, Overflow.SPECIAL)


@cache
def e4m3_code(value: Fraction) -> tuple[int, bool, bool]:
    """Magnitude code nearest to a positive value (ties to even), whether exact, whether a tie: by search over all values."""
    table = [decode_scalar(c, E4M3FN) for c in range(0x7F)]
    distance = [abs(v - value) for v in table if isinstance(v, Fraction)]
    best = min(distance)
    winners = [c for c, d in enumerate(distance) if d == best]
    return next((c for c in winners if c % 2 == 0), winners[0]), best == 0, len(winners) == 2


def test_flip_is_an_involution_on_values() -> None:
    nibbles = np.arange(16, dtype=np.uint8)
    assert decode(flip_int4_offset(nibbles), INT4).tolist() == list(range(-8, 8))
    assert np.array_equal(flip_int4_offset(flip_int4_offset(nibbles)), nibbles)


def test_pack_scale_by_search_for_all_codes() -> None:
    table = pack_scale_e4m3(ALL)
    assert table.shape == (256, 8)
    for code in range(256):
        scale = decode_scalar(code, E4M3FN)
        for j, got in enumerate(table[code].tolist()):
            if scale is Special.NAN:
                assert got == 0x7F
                continue
            negative = bool(code & 0x80)
            product = (Fraction(0) if isinstance(scale, Special) else abs(scale)) * (8 - j)
            # j - 8 is negative: the product has the other sign
            assert got == min(e4m3_code(product)[0], 0x7E) | (0 if negative else 0x80)


def test_pack_scale_by_hand() -> None:
    assert pack_scale_e4m3(codes([1.0], E4M3FN)).tolist() == [[0xD0, 0xCE, 0xCC, 0xCA, 0xC8, 0xC4, 0xC0, 0xB8]]  # -8 .. -1
    assert pack_scale_e4m3(np.array([0x00, 0x80], dtype=np.uint8)).tolist() == [[0x80] * 8, [0x00] * 8]
    assert pack_scale_e4m3(codes([60.0], E4M3FN))[0, 0] == 0xFE  # -480 saturates
    assert pack_scale_e4m3(codes([-60.0], E4M3FN))[0, 0] == 0x7E


def test_counts_of_exact_and_tied_products() -> None:
    """Over all positive normal scales with |product| <= 448: how many products are e4m3 values, and how many are ties."""
    exact: dict[int, list[int]] = {c: [0, 0] for c in range(1, 9)}
    ties, worst = 0, Fraction(0)
    for code in range(0x08, 0x7F):
        scale = decode_scalar(code, E4M3FN)
        assert isinstance(scale, Fraction)
        for c in range(1, 9):
            if scale * c > 448:
                continue
            nearest, is_exact, is_tie = e4m3_code(scale * c)
            got = int(pack_scale_e4m3(np.array([code], dtype=np.uint8))[0, 8 - c])
            assert got == nearest | 0x80
            exact[c][0] += int((decode(np.array([got]), E4M3FN)[0]) == -float(scale * c))
            exact[c][1] += 1
            ties += is_tie
            assert is_exact == (decode(np.array([got]), E4M3FN)[0] == -float(scale * c))
            rounded = decode_scalar(nearest, E4M3FN)
            assert isinstance(rounded, Fraction)
            worst = max(worst, abs(rounded / (scale * c) - 1))
    assert {c: tuple(v) for c, v in exact.items() if c in (3, 5, 6, 7)} == {3: (40, 106), 5: (25, 100), 6: (37, 98), 7: (13, 97)}
    assert all(exact[c][0] == exact[c][1] for c in (1, 2, 4, 8))
    assert ties == 77
    assert sum(exact[c][1] for c in (3, 5, 6, 7)) == 401
    assert worst == Fraction(1, 21)


def test_folded_weight_is_the_rounded_product() -> None:
    q = np.tile(np.arange(16, dtype=np.uint8), (256, 1))
    got = folded_weight(q, ALL[:, None])
    for code in range(256):
        scale = decode_scalar(code, E4M3FN)
        for nibble in range(16):
            value = nibble - 16 if nibble > 7 else nibble
            if value == 0:
                want = 0x80
            elif scale is Special.NAN:
                want = 0xFF if value > 0 else 0x7F
            else:
                magnitude = Fraction(0) if isinstance(scale, Special) else abs(scale)
                want = min(e4m3_code(magnitude * abs(value))[0], 0x7E) | (0x80 if (code >= 0x80) != (value < 0) else 0)
            assert got[code, nibble] == want, (code, value)


def test_folded_weight_groups_along_k() -> None:
    scales = codes([[1.0, 2.0], [4.0, 8.0]], E4M3FN)
    got = decode(folded_weight(np.ones((2, 6), dtype=np.uint8), scales), E4M3FN)
    assert got.tolist() == [[1, 1, 1, 2, 2, 2], [4, 4, 4, 8, 8, 8]]
    with pytest.raises(ValueError, match=r"expected \[N, K\] and \[N, K / G\]"):
        folded_weight(np.ones((2, 5), dtype=np.uint8), scales)


def test_division_by_eight_loses_24_codes() -> None:
    """Rows of one code and 448: the row scale is 1, so the group scale is the code over 8."""
    lost, zero = [], []
    for code in range(1, 0x7F):
        value = decode_scalar(code, E4M3FN)
        assert isinstance(value, Fraction)
        groups, channel = fold_scales(codes([[448.0, float(value)]], BF16))
        assert decode(channel, F32).tolist() == [[8.0]]
        assert groups[0, 0] == 0x66  # 56
        folded = decode_scalar(int(groups[0, 1]), E4M3FN)
        assert isinstance(folded, Fraction)
        assert folded == decode_scalar(e4m3_code(value / 8)[0], E4M3FN)
        if folded * 8 != value:
            lost.append(value)
        if folded == 0:
            zero.append(value)
    assert len(lost) == 24
    assert max(lost) < Fraction(1, 8)
    assert max(zero) == Fraction(1, 128)


def test_fold_scales_by_hand() -> None:
    # 7 / 448 = 2^-6: rows 7, 3.5, 0 -> 448, 224, 0 -> 56, 28, 0; channel 8 * 2^-6
    groups, channel = fold_scales(codes([[7.0, 3.5, 0.0], [-7.0, 0.0, -0.0]], BF16))
    assert decode(groups, E4M3FN).tolist() == [[56, 28, 0], [-56, 0, 0]]
    assert decode(channel, F32).tolist() == [[0.125], [0.125]]
    _, native = fold_scales(codes([[7.0, 3.5, 0.0]], BF16), RECIPES["vllm_native_fp8_token"])
    assert decode(native, F32).tolist() == [[0.125]]
    _, floor = fold_scales(codes([[0.0, 0.0]], BF16))
    assert decode(floor, F32)[0, 0] == 8 * float(np.float32(1) / np.float32(448 * 512))


def test_convert_fnuz_halves_every_value() -> None:
    scale = codes([0.5, 3.0e38], F32)
    converted, weight, inputs = convert_fnuz(ALL, scale, None)
    assert inputs is None
    assert decode(weight, F32).tolist() == [1.0, float("inf")]
    for code in range(256):
        before, after = decode_scalar(code, E4M3FN), decode_scalar(int(converted[code]), E4M3FNUZ)
        if before is Special.NAN:
            assert after == (240 if code == 0x7F else -240)
        else:
            assert not isinstance(before, Special) or before is Special.NEG_ZERO
            assert after == (0 if isinstance(before, Special) else before / 2)
    _, _, doubled = convert_fnuz(ALL, scale, codes([0.25], F32))
    assert doubled is not None
    assert decode(doubled, F32).tolist() == [0.5]


def test_requantize_by_hand() -> None:
    weights = codes([[1.0, -448.0], [1.0, 448.0], [8.0, 1.0]], E4M3FN)
    got, scale = requantize_max_scale(weights, codes([0.5, 2.0], F32), (2, 1))
    assert decode(scale, F32) == 2.0
    assert decode(got, E4M3FN).tolist() == [[0.25, -112.0], [0.25, 112.0], [8.0, 1.0]]
    # one scale on disk: the other slots keep the sentinel, nothing is touched
    fused, scale = requantize_max_scale(weights, codes([2.0, FUSED_SENTINEL], F32), (2, 1))
    assert np.array_equal(fused, weights)
    assert decode(scale, F32) == 2.0
    # an empty shard still counts for the largest scale
    empty, _ = requantize_max_scale(weights, codes([1.0, 4.0, 1.0], F32), (2, 0, 1))
    assert decode(empty, E4M3FN).tolist() == [[0.25, -112.0], [0.25, 112.0], [2.0, 0.25]]
    fnuz, _ = requantize_max_scale(codes([[240.0], [8.0]], E4M3FNUZ), codes([1.0, 1.0], F32), (1, 1), fmt=E4M3FNUZ)
    assert decode(fnuz, E4M3FNUZ).tolist() == [[224.0], [8.0]]  # bounded by 224, not by 240
    nan, _ = requantize_max_scale(np.array([[0x7F]], dtype=np.uint8), codes([1.0], F32), (1,))
    assert nan.tolist() == [[0x7E]]


def test_requantize_intermediates_differ() -> None:
    """448 * 200 overflows binary16; a scale of 2^-25 * 3 is 2^-23 in binary16, and products below 2^-25 vanish there."""
    weights, scales = codes([[448.0], [1.0]], E4M3FN), codes([200.0, 400.0], F32)
    assert decode(requantize_max_scale(weights, scales, (1, 1))[0], E4M3FN).tolist() == [[224.0], [1.0]]
    assert decode(requantize_max_scale(weights, scales, (1, 1), intermediate=F16)[0], E4M3FN).tolist() == [[448.0], [1.0]]
    weights, scales = codes([[4.0], [4.0]], E4M3FN), codes([3 * 2.0**-25, 3 * 2.0**-24], F32)
    assert decode(requantize_max_scale(weights, scales, (1, 1), intermediate=F16)[0], E4M3FN).tolist() == [[2.0], [4.0]]
    rounded = requantize_max_scale(weights, scales, (1, 1), intermediate=F16, scale_format=F16)[0]
    # 4 * 2^-23 / (3 * 2^-24) = 8/3 -> 2.75
    assert decode(rounded, E4M3FN).tolist() == [[2.75], [4.0]]


@pytest.mark.parametrize(
    ("scales", "widths", "match"),
    [
        ([1.0], (1, 1), "expected one each"),
        ([1.0, 1.0], (1, 2), "sum 2"),
        ([1.0, 1.0], (3, -1), "sum 2"),
        ([float("nan"), 1.0], (1, 1), "positive finite"),
        ([0.0, 1.0], (1, 1), "positive finite"),
        ([-1.0, 1.0], (1, 1), "positive finite"),
        ([float("inf"), 1.0], (1, 1), "positive finite"),
        ([FUSED_SENTINEL, FUSED_SENTINEL], (1, 1), "positive finite"),
        ([FUSED_SENTINEL, 1.0], (1, 1), "all slots filled"),
    ],
)
def test_requantize_refuses(scales: list[float], widths: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        requantize_max_scale(np.zeros((2, 1), dtype=np.uint8), codes(scales, F32), widths)


def test_requantize_refuses_formats() -> None:
    with pytest.raises(ValueError, match="expected e4m3fn or e4m3fnuz"):
        requantize_max_scale(np.zeros((1, 1), dtype=np.uint8), codes([1.0], F32), (1,), fmt=BF16)


def test_channelwise_scales() -> None:
    got = channelwise_scales(codes([0.5, 2.0, 4.0], F32), (2, 0, 1))
    assert decode(got, F32).tolist() == [[0.5], [0.5], [4.0]]
    with pytest.raises(ValueError, match="one scale per width"):
        channelwise_scales(codes([0.5], F32), (1, 1))


@pytest.mark.parametrize("fmt", [F16, BF16], ids=repr)
def test_dequant_all_codes_and_zero_points(fmt: Format) -> None:
    """Integers by hand: the product of q - z and the scale's significand, cut to the format's precision."""
    rng = np.random.default_rng(0)
    scales = codes(rng.uniform(0.5, 1, (16, 1)).tolist(), fmt)
    q = np.tile(np.arange(16, dtype=np.uint8), (16, 1))
    z = np.arange(16, dtype=np.uint8)[:, None]
    got = decode(dequant_w4a16(q, scales, fmt, zero_points=z), fmt)
    p = fmt.precision
    for r in range(16):
        significand = int(decode(scales, fmt)[r, 0] * 2**p)  # an integer: the scale is in [1/2, 1)
        for c in range(16):
            product = abs(c - r) * significand
            drop = max(product.bit_length() - p, 0)
            kept, rest = product >> drop, product & ((1 << drop) - 1)
            half = (1 << drop) >> 1
            kept += rest > half or (rest == half and half > 0 and kept % 2 == 1)
            want = (kept << drop) / 2**p
            assert got[r, c] == (want if c >= r else -want), (r, c)


def test_dequant_orders_and_bias_differ() -> None:
    # bf16 has 8 bits. s = 129/128: 15 s = 1935/128 -> 15.125; 8 s = 1032/128 = 8.0625; 7 s = 903/128 = 7.0546875 -> 7.0625.
    scale = codes([[129 / 128]], BF16)
    q = np.array([[15, 7]], dtype=np.uint8)
    first = dequant_w4a16(q, scale, BF16)
    second = dequant_w4a16(q, scale, BF16, order=Subtract.PRODUCTS)
    assert decode(first, BF16).tolist() == [[7.0625, -129 / 128]]
    assert decode(second, BF16).tolist() == [[15.125 - 8.0625, 7.0625 - 8.0625]]
    assert decode(dequant_w4a16(q, scale, BF16, bias=0), BF16).tolist() == [[15.125, 7.0625]]


def test_dequant_specials_and_groups() -> None:
    q = np.array([[15, 8, 0, 15]], dtype=np.uint8)
    assert decode(q, UINT4).tolist() == [[15, 8, 0, 15]]
    got = decode(dequant_w4a16(q, codes([[60000.0, 1.0]], F16), F16), F16)
    assert got.tolist() == [[float("inf"), 0.0, -8.0, 7.0]]
    with pytest.raises(ValueError, match="expected that of the scales"):
        dequant_w4a16(q, codes([[1.0]], F16), F16, zero_points=np.zeros((1, 2), dtype=np.uint8))
