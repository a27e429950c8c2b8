"""Packing for the Blackwell kernel: the offline quantiser judged by conformance op nvfp4_quantize, layouts by hand and by
references.layouts, which the room does not import."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from lowbit.conformance.backend import EXACT_BITS, Format
from lowbit.conformance.op import parse_case
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels.blackwell_room import pack
from lowbit.references.formats import BF16, E2M1, F16, F32, UE4M3, decode
from lowbit.references.layouts import LAYOUTS
from lowbit.references.layouts import pack as lay

FORMATS: dict[str, Format] = {"f16": F16, "bf16": BF16}
MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


@pytest.mark.parametrize("pattern", ["normal", "lognormal", "ties", "zeros", "extremes", "maxima", "ramp", "shifted"])
@pytest.mark.parametrize("seed", range(3))
def test_the_quantiser_is_svdquants(pattern: str, seed: int) -> None:
    """Codes and scales are those that the contract fixes for the recipe, bit for bit."""
    op = ops()["nvfp4_quantize"]
    case = parse_case(f"nvfp4_quantize/none/m24k256/f32.svdquant/{pattern}/s{seed}", ops())
    operands = draw_operands(op, case)
    x = operands["x"].codes.view(np.float32)
    codes, scales = pack.quantise_blocks(x)
    expected = op.expect(case, operands, EXACT_BITS)
    for name, found in (("q", codes), ("scales", scales)):
        assert expected[name].admits(found).all(), name


def nearest_away(x: Fraction) -> int:
    """Code of the magnitude nearest to |x|, ties to the larger."""
    distances = [abs(abs(x) - magnitude) for magnitude in MAGNITUDES]
    best = min(distances)
    return max(code for code, distance in enumerate(distances) if distance == best)


def test_codes_of_one_block_by_fractions() -> None:
    """A block with amax 6: its scale is 1 (code 0x38), its codes the nearest magnitudes."""
    x = [6.0, -6.0, 0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.2, -0.2, 0.0, -0.0, 4.9, 1e-30]
    codes, scales = pack.quantise_blocks(np.array([x], np.float32))
    assert scales.tolist() == [[0x38]]
    wanted = [nearest_away(Fraction(float(np.float32(value)))) + 8 * (value < 0) for value in x]
    assert codes[0].tolist() == wanted
    assert wanted[:10] == [7, 15, 1, 9, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("code", range(1, 0x7F))
def test_every_scale_by_fractions(code: int) -> None:
    """amax = 6 * scale gives the scale back; halfway between two scales goes to the even code."""
    def value(c: int) -> Fraction:
        exponent, fraction = c >> 3, c & 7
        return Fraction(8 + fraction if exponent else fraction) * Fraction(2) ** (max(exponent, 1) - 10)

    assert pack.quantise_blocks(np.full((1, 16), float(6 * value(code)), np.float32))[1].tolist() == [[code]]
    middle = 6 * (value(code) + value(code - 1)) / 2  # of few bits: exact in binary32, and so is its sixth
    assert pack.quantise_blocks(np.full((1, 16), float(middle), np.float32))[1].tolist() == [[code - code % 2]]


@pytest.mark.parametrize("out", ["f16", "bf16"])
def test_channel_scales_round_up(out: str) -> None:
    """The stored scale is the least value of its format that is at least amax / 2688; 1 for a row of zeros."""
    fmt = FORMATS[out]
    values = [float(v) for v in decode(np.arange(0x7C00 if out == "f16" else 0x7F80, dtype=np.uint16), fmt)]
    amax = [0.0, 1.0, 2688.0, 2689.0, 1e-3, 0.05, 3.7, 1e-6, *(2688.0 * values[code] for code in (1, 2, 77, 5000, 20000)),
            *(float(np.nextafter(np.float32(2688.0 * values[code]), np.float32(np.inf))) for code in (77, 5000, 20000))]
    rows = np.array(amax, np.float32)
    codes, scales = pack.channel_scales(np.stack([rows, -rows / 3], axis=1).astype(np.float32), out)
    for i, row in enumerate(rows):
        wanted = Fraction(float(row)) / 2688 if row else Fraction(1)
        code = int(codes[i])
        assert Fraction(values[code]) == Fraction(float(scales[i]))
        assert Fraction(values[code]) >= wanted * (1 - Fraction(1, 1 << 52)), (out, float(row))
        assert code == 0 or Fraction(values[code - 1]) < wanted, (out, float(row))


def test_a_channel_scale_beyond_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond f16"):
        pack.channel_scales(np.full((1, 16), 65520.0 * 2688.0, np.float32), "f16")
    codes, _ = pack.channel_scales(np.full((1, 16), 65504.0 * 2688.0, np.float32), "f16")
    assert codes.tolist() == [0x7BFF]


@pytest.mark.parametrize("out", ["f16", "bf16"])
def test_a_packed_weight_decodes_to_within_its_gaps(out: str) -> None:
    """|w - code * block scale * channel scale| is at most half the widest gap of E2M1 near it, by Fractions on a sample, with the
    loss of the scale's own rounding: (1/6 of amax is 1 code unit) at most 2^-4 relative on the largest code."""
    w = np.random.default_rng(6).normal(size=(9, 64)).astype(np.float32) * np.float32(0.03)
    packed = pack.pack_weight(w, out)
    channel = decode(packed.channel, FORMATS[out])
    codes = np.stack((packed.codes & 15, packed.codes >> 4), axis=2).reshape(9, 64)
    for n in range(9):
        for k in range(64):
            row = n % 32 * 16 + n // 32 % 4 * 4 + k // 16  # 9 rows, 4 groups: one tile
            scale = Fraction(float(decode(packed.scales[row : row + 1], UE4M3)[0])) * Fraction(float(channel[n]))
            value = Fraction(float(decode(codes[n, k : k + 1], E2M1)[0])) * scale
            error = abs(Fraction(float(w[n, k])) - value)
            magnitude = MAGNITUDES[codes[n, k] & 7]
            gaps = [b - a for a, b in pairwise(MAGNITUDES) if magnitude in (a, b)]
            slack = Fraction(6, 16) if magnitude == 6 else Fraction(0)
            assert error <= (max(gaps) / 2 + slack + Fraction(1, 1 << 20)) * scale, (n, k)


def test_weights_that_are_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            pack.pack_weight(np.array([[bad] * 16], np.float32), "f16")
    with pytest.raises(ValueError, match="K = 24"):
        pack.pack_weight(np.zeros((2, 24), np.float32), "f16")


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_codes_lie_even_k_low(library: str) -> None:
    rows = np.random.default_rng(1).integers(0, 16, (5, 32)).astype(np.uint8)
    found = pack.pack_codes(rows if library == "numpy" else torch.from_numpy(rows))
    assert np.array_equal(np.asarray(found).reshape(-1), lay(rows, LAYOUTS["nibble_low_first"]).reshape(-1))


@pytest.mark.parametrize(("rows", "groups"), [(1, 2), (128, 4), (129, 6), (300, 17), (256, 240)])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_scales_lie_in_the_contracts_tiles(rows: int, groups: int, library: str) -> None:
    """Byte for byte what scale_swizzle asks for, padding zero."""
    scales = np.random.default_rng(2).integers(1, 127, (rows, groups)).astype(np.uint8)
    storage, offsets = np.zeros(pack.scale_bytes(rows, groups * 16), np.uint8), pack.scale_offsets(rows, groups)
    if library == "torch":
        found = np.asarray(pack.place_scales(torch.from_numpy(storage), torch.from_numpy(offsets), torch.from_numpy(scales)))
    else:
        found = pack.place_scales(storage, offsets, scales)
    assert np.array_equal(found, lay(scales, LAYOUTS["scale_swizzle"]).reshape(-1))


def test_formats_named_here_have_the_widths_assumed() -> None:
    assert (F16.mantissa_bits, BF16.mantissa_bits, F32.mantissa_bits) == (10, 7, 23)
