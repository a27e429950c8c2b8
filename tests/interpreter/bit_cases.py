"""Cases of up to 10^6 values on which interpreter, device and NumPy references have to agree, and the codecs beside them.

Decides: which cases, one pattern of ties and one of all exponents for every recipe, and how codecs and short divisions are
compared with the references. Refuses: to know where the kernels run; `check_interpreter.py` and `tests/device/triton_kernels.py`
say that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from lowbit.kernels.triton_room import svdquant_quantize as svdquant
from lowbit.kernels.triton_room.codes8 import (
    OPTIONS,
    e2m1_code,
    e2m1_value,
    e4m3_code,
    e4m3_value,
    int4_value,
    ue4m3_code,
    ue4m3_value,
    whole,
)
from lowbit.kernels.triton_room.codes16 import code16, value16
from lowbit.kernels.triton_room.division import by_pair, div, near_reciprocal, rest_of
from lowbit.kernels.triton_room.svdquant_quantize import away_nibble
from lowbit.references.formats import BF16, E2M1, E4M3FN, E4M3FNUZ, F16, INT4, UE4M3, Format, decode
from lowbit.references.rounding import Overflow, Rounding, encode

__all__ = ["CASES", "TIES", "codec_faults", "division_faults", "tie_faults"]

_TWO_LEVEL = ("vllm", "vllm_reference", "vllm_emulation", "compressed_tensors", "modelopt", "torchao", "transformer_engine",
              "four_over_six")
_ONE_LEVEL = ("svdquant", "svdquant_triton", "nunchaku", "deepgemm")


def _cases() -> Iterator[str]:
    for pattern, m in (("ties", 977), ("extremes", 245)):
        for name in _TWO_LEVEL:
            yield f"nvfp4_quantize/static/m{m}k1024/bf16.{name}/{pattern}/s1"
        yield f"nvfp4_quantize/dynamic/m{m}k1024/f16.vllm_reference.swizzled/{pattern}/s2"
        for name in _ONE_LEVEL:
            yield f"nvfp4_quantize/none/m{m}k1024/bf16.{name}/{pattern}/s1"
        for out in ("", ".fnuz"):
            yield f"fp8_quantize/static/m{m}k1024p0/bf16{out}/{pattern}/s1"
            yield f"fp8_quantize/tensor/m{m}k1024p0/f16{out}/{pattern}/s1"
            yield f"fp8_quantize/token/m{m}k1024p1000/bf16{out}/{pattern}/s1"
            yield f"fp8_quantize/block/m{m}k1024p0/bf16{out}.scaled_quantize/{pattern}/s1"
            yield f"fp8_quantize/tile/m{-(-m // 128) * 128}k1024p0/f32{out}.deepgemm/{pattern}/s1"
        yield f"fp8_quantize/static/m{m}k1024p1000/f32.vllm_native/{pattern}/s1"
        yield f"fp8_quantize/tensor/m{m}k1024p0/bf16.vllm_native/{pattern}/s1"
        yield f"fp8_quantize/token/m{m}k1024p1000/f16.vllm_native.ub/{pattern}/s1"
        yield f"fp8_quantize/block/m{m}k1024p0/bf16/{pattern}/s1"
        yield f"fp8_quantize/block/m{m}k1024p0/f16.deepgemm/{pattern}/s1"
        for x, quotient in (("bf16", ""), ("bf16", ".narrow"), ("f16", ""), ("f16", ".narrow")):
            yield f"int8_quantize/token/m{m}k1024/{x}{quotient}/{pattern}/s1"
        for variant, recipe in (("sym", ""), ("uint4b8", ""), ("asym", ""), ("sym", ".compressed_tensors"),
                                ("asym", ".compressed_tensors")):
            yield f"int4_quantize/{variant}/n{m}k1024g128/bf16{recipe}/{pattern}/s1"
        for recipe in ("svdquant", "nunchaku"):
            yield f"int4_quantize/sym/n{m}k1024g64/f16.{recipe}/{pattern}/s1"
        for name in ("", ".svdquant_triton", ".nunchaku"):
            yield f"svdquant_quantize/nvfp4/m{m}k1024r16/bf16{name}/{pattern}/s1"
        for name in ("", ".nunchaku"):
            yield f"svdquant_quantize/int4/m{m}k1024r16/f16{name}/{pattern}/s1"
    for variant in ("gptq", "k_major", "along_n", "awq", "nibble", "zeros_v1", "b8"):
        yield f"int4_pack/{variant}/n1024k1024/plain/all/s1"
    yield "int4_pack/compressed_tensors/n1024k1023/int8/all/s1"
    yield "int4_repack/weight/n1024k1024/plain/all/s1"
    yield "int4_repack/zeros/n1024k1024/plain/all/s1"
    yield "scale_swizzle/tile128x4/m1000g1021/plain/all/s1"
    yield "fp8_convert_fnuz/channel/n1024k1024/fnuz.static/all/s1"
    for variant in ("max_scale", "max_scale_f16"):
        for out in ("fn", "fnuz"):
            yield f"fp8_requantize/{variant}/n1024k1024s3/{out}/ties/s1"


CASES = tuple(_cases())
"""Every recipe meets every tie of its element format on 10^6 values (pattern `ties`), and all exponents on a quarter of them."""


# Codecs --------------------------------------------------------------------------------------------------------------



@triton.jit  # type: ignore[untyped-decorator]
def encode_kernel(x, codes, count, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """codes[i]: int32 code of binary32 x[i]; KIND is a place in `_ENCODERS`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count, other=0)
    if KIND == 0:
        code = e4m3_code(value, 0, 448.0).to(tl.int32)
    elif KIND == 1:
        code = e4m3_code(value, 1, 240.0).to(tl.int32)
    elif KIND == 2:
        code = ue4m3_code(value).to(tl.int32)
    elif KIND == 3:
        code = e2m1_code(value, 0)
    elif KIND == 4:
        code = e2m1_code(value, 1)
    elif KIND == 5:
        code = e2m1_code(value, 2)
    elif KIND == 6:
        code = code16(value, 1).to(tl.int32) & 0xFFFF
    elif KIND == 7:
        code = code16(value, 0).to(tl.int32) & 0xFFFF
    elif KIND == 8:
        code = whole(value, -8, 7) & 15
    else:  # twelve significand bits, as no value that a kernel rounds so is nearer to a tie
        kept = (value.to(tl.int32, bitcast=True) & 0x7FFFF800).to(tl.float32, bitcast=True) * 6.103515625e-05  # 2^-14
        code = tl.where(value == value, away_nibble(kept) | ((value.to(tl.int32, bitcast=True) >> 28) & 8), 7)
    tl.store(codes + place, code, mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(codes, x, count, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[i]: binary32 value of code codes[i]; KIND is a place in `_DECODERS`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + place, mask=place < count, other=0)
    if KIND == 0:
        value = e4m3_value(code.to(tl.uint8), 0)
    elif KIND == 1:
        value = e4m3_value(code.to(tl.uint8), 1)
    elif KIND == 2:
        value = ue4m3_value(code.to(tl.uint8))
    elif KIND == 3:
        value = e2m1_value(code)
    elif KIND == 4:
        value = value16(code.to(tl.int16), 1)
    elif KIND == 5:
        value = value16(code.to(tl.int16), 0)
    else:
        value = int4_value(code).to(tl.float32)
    tl.store(x + place, value, mask=place < count)


_ENCODERS: tuple[tuple[Format, Rounding, Overflow], ...] = (
    (E4M3FN, Rounding.RNE, Overflow.SATFINITE), (E4M3FNUZ, Rounding.RNE, Overflow.SATFINITE),
    (UE4M3, Rounding.RNE, Overflow.SATFINITE), (E2M1, Rounding.RNE, Overflow.SATFINITE), (E2M1, Rounding.RNA, Overflow.SATFINITE),
    (E2M1, Rounding.RNTZ, Overflow.SATFINITE), (BF16, Rounding.RNE, Overflow.SPECIAL), (F16, Rounding.RNE, Overflow.SPECIAL),
    (INT4, Rounding.RNE, Overflow.SATFINITE), (E2M1, Rounding.RNA, Overflow.SATFINITE),
)
_DECODERS = (E4M3FN, E4M3FNUZ, UE4M3, E2M1, BF16, F16, INT4)


def values_of(count: int) -> npt.NDArray[np.float32]:
    """binary32 values: `count` bit patterns of every exponent, and every tie of the narrow formats with both neighbours."""
    patterns = np.random.default_rng(5).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32).view(np.float32)
    found = [patterns, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45], dtype=np.float32)]
    for fmt in (E4M3FN, E4M3FNUZ, UE4M3, E2M1, F16, BF16, INT4):
        numbers = decode(np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8), fmt)
        numbers = np.unique(numbers[np.isfinite(numbers)])
        ties = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)  # one bit more than the format: exact in binary32
        beside = (np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)))
        found.extend((ties, *beside, numbers.astype(np.float32)))
    return np.concatenate(found)


def codec_faults(device: str, count: int) -> list[str]:
    """Codecs that differ from the references on `device`, each with its first value; empty if none does. Codes of NaN are
    compared for floats (any NaN of a format that has one) and are nobody's business for integers."""
    faults = []
    x = values_of(count)
    block = 1 << 20 if device == "cpu" else 1024
    values = torch.from_numpy(x).to(device)
    for kind, (fmt, rounding, overflow) in enumerate(_ENCODERS):
        found = torch.empty(x.size, dtype=torch.int32, device=device)
        encode_kernel[(triton.cdiv(x.size, block),)](values, found, x.size, KIND=kind, BLOCK=block, **OPTIONS)
        expected = encode(x, fmt, rounding, overflow).astype(np.int32)
        numbers = ~np.isnan(x)
        wrong = np.flatnonzero((found.cpu().numpy() != expected) & numbers)
        if fmt is not INT4:
            back = decode(found.cpu().numpy()[~numbers].astype(np.uint16 if fmt.bits == 16 else np.uint8), fmt)
            kept = np.isnan(back) if np.isnan(decode(encode(np.array([np.nan]), fmt), fmt)).all() else back == 6
            if not kept.all():
                faults.append(f"encode {kind} {fmt}: a NaN became {back[~kept][0]}")
        if wrong.size:
            at = wrong[0]
            got = int(found[at])
            faults.append(f"encode {kind} {fmt}: {wrong.size} of {x.size}, {x[at]!r} gave {got}, expected {expected[at]}")
    for kind, fmt in enumerate(_DECODERS):
        codes = np.arange(1 << fmt.bits, dtype=np.int32)
        result = torch.empty(codes.size, dtype=torch.float32, device=device)
        grid = (triton.cdiv(codes.size, 1024),)
        decode_kernel[grid](torch.from_numpy(codes).to(device), result, codes.size, KIND=kind, BLOCK=1024, **OPTIONS)
        wanted = decode(codes.astype(np.uint16 if fmt.bits == 16 else np.uint8), fmt).astype(np.float32)
        same = result.cpu().numpy().view(np.uint32) == wanted.view(np.uint32)
        same |= np.isnan(result.cpu().numpy()) & np.isnan(wanted)
        if not same.all():
            faults.append(f"decode {kind} {fmt}: code {int(codes[~same][0])} gave {result.cpu().numpy()[~same][0]!r}")
    return faults


# Division ------------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def quotient_kernel(a, b, paired, whole_quotient, count, PTX: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """paired[i], whole_quotient[i]: a[i] / b[i] by `by_pair` and by `div`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    above, below = tl.load(a + place, mask=place < count, other=0), tl.load(b + place, mask=place < count, other=1)
    near = near_reciprocal(below, PTX)
    tl.store(paired + place, by_pair(above, near, rest_of(below, near)), mask=place < count)
    tl.store(whole_quotient + place, div(above, below), mask=place < count)


def operands_of(count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Dividends of 24 and of 11 significand bits, divisors of every 11-bit significand, magnitudes 2^-30 to 2^30; and the hard
    ones: dividends next to (2j + 1) b / 2^25, whose quotients are as close to a point between two numbers as they can be."""
    rng = np.random.default_rng(11)
    significand = (1024 + np.arange(count) % 1024).astype(np.float64)
    b = significand * np.exp2(rng.integers(-40, 20, count))
    a = rng.integers(1 << 23, 1 << 24, count) * np.exp2(rng.integers(-53, 6, count)) * rng.choice((-1.0, 1.0), count)
    a[::4] = rng.integers(1 << 10, 1 << 11, a[::4].size) * np.exp2(rng.integers(-40, 19, a[::4].size))
    middle = (2 * rng.integers(1 << 23, 1 << 24, a[1::4].size) + 1) / 2.0**25
    a[1::4] = middle * b[1::4]
    return a.astype(np.float32), b.astype(np.float32)


def division_faults(device: str, count: int) -> list[str]:
    """Quotients by `by_pair` and `div` that are not the nearest binary32 number; empty if there is none."""
    a, b = operands_of(count)
    block = 1 << 20 if device == "cpu" else 1024
    found = [torch.empty(count, dtype=torch.float32, device=device) for _ in range(2)]
    quotient_kernel[(triton.cdiv(count, block),)](
        torch.from_numpy(a).to(device), torch.from_numpy(b).to(device), *found, count, PTX=int(device != "cpu"), BLOCK=block,
        **OPTIONS,
    )
    expected = (a.astype(np.float64) / b.astype(np.float64)).astype(np.float32)  # 53 >= 2 * 24 + 2: rounded as once
    faults = []
    for name, result in zip(("by_pair", "div"), found, strict=True):
        wrong = np.flatnonzero(result.cpu().numpy().view(np.uint32) != expected.view(np.uint32))
        if wrong.size:
            at = wrong[0]
            faults.append(f"{name}: {wrong.size} of {count}, {a[at]!r} / {b[at]!r} gave {float(result[at])!r}")
    return faults




# Ties of svdquant_quantize --------------------------------------------------------------------------------------------

TIES = (("nvfp4", 1), ("nvfp4", 2), ("int4", 1), ("int4", 2))
"""(variant, form of x) of `tie_faults`."""

_SIGNIFICANDS = {1: 11, 2: 8}


def short(x: npt.NDArray[np.float64], form: int, step: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The number of the form that is `step` numbers above the one at x or next below it in magnitude; no subnormal ones."""
    exponent = np.frexp(x)[1]
    unit = np.exp2(exponent - _SIGNIFICANDS[form])
    found: npt.NDArray[np.float64] = (np.trunc(x / unit) + step) * unit
    return found


def codes_of(x: npt.NDArray[np.float64], form: int) -> npt.NDArray[np.int16]:
    """int16 codes of numbers of binary16 (1) or bf16 (2)."""
    if form == 1:
        return x.astype(np.float16).view(np.int16)
    return (x.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.int16)


def tie_operands(variant: str, form: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """x [M, K] and smooth [K], numbers of the form.

    smooth has every significand, and often a short one, without which no code is at a tie of int4. Of each block the first
    element makes amax: a tie of the scale's rounding or a number beside one, from below the least scale to above the largest,
    times its smooth. The others are next to a tie of codes times the scale times their smooth, on it, or on either side, and tiny
    where the scale is 0.
    """
    rng = np.random.default_rng(17)
    size, m = (16, 2048) if variant == "nvfp4" else (64, 1024)
    k = 1088 if form == 1 else 256
    bits = _SIGNIFICANDS[form]
    smooth = (1 + (np.arange(k) % (1 << (bits - 1))) / (1 << (bits - 1))) * np.exp2(rng.integers(-2, 3, k))
    smooth[::3] = np.resize(np.arange(8, 16) / 8, smooth[::3].size)
    smooth[::size] = (8 + np.arange(k // size) % 8) / 8 if form == 1 else 1  # products that have no more bits than x
    blocks = (m, k // size)
    if variant == "nvfp4":
        ties = (decode(np.arange(126), UE4M3) + decode(np.arange(1, 127), UE4M3)) / 2
        odd, most = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), 6
        top = most * np.concatenate([ties, decode(np.arange(1, 127), UE4M3), [500.0, 1000.0, 2.0**-12]])
    else:
        odd, most = np.arange(0.5, 7.5), 7
        top = most * np.concatenate([1 + (2 * np.arange(1024) + 1) / 2048, np.resize(np.arange(8, 16) / 8, 1024)]) * 2.0**-3
    first = short(rng.choice(top, blocks) * smooth[::size], form, rng.choice((-1, 0, 0, 1), blocks))
    quotient = ((first / smooth[::size]).astype(np.float32) / np.float64(most)).astype(np.float32)
    fmt, bound = (UE4M3, 448) if variant == "nvfp4" else (F16, 65504)
    codes = encode(np.minimum(quotient, np.float32(bound)), fmt, Rounding.RNE, Overflow.SATFINITE)
    scale = np.repeat(decode(codes, fmt), size, axis=1)
    tie = rng.choice(odd, (m, k)) * np.where(scale > 0, scale, 2.0**-13 if form == 1 else 2.0**-110) * smooth
    x = short(tie, form, rng.integers(-1, 3, (m, k)))
    x = np.where(np.abs(x / smooth) > np.repeat(first / smooth[::size], size, axis=1), 0.0, x) * rng.choice((-1.0, 1.0), (m, k))
    x[:, ::size] = first * rng.choice((-1.0, 1.0), blocks)
    return x, smooth


def tie_faults(device: str, variant: str, form: int) -> list[str]:
    """Codes and scales of svdquant_quantize on `tie_operands` that are not those of IEEE quotients, each rounded to binary32
    once; empty if there is none."""
    x, smooth = tie_operands(variant, form)
    (m, k), size = x.shape, 16 if variant == "nvfp4" else 64
    narrow = (torch.from_numpy(codes_of(values, form)).to(device) for values in (x, smooth))
    x_codes, smooth_codes = narrow
    q = torch.empty((m, k // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((k // size, m), dtype=torch.uint8 if variant == "nvfp4" else torch.int16, device=device)
    svdquant.svdquant_quantize(
        x_codes, smooth_codes, svdquant.inverses(smooth_codes, form=form), torch.zeros((k, 16), dtype=torch.int16, device=device),
        q, scales, torch.empty((m, 16), device=device), None, variant=variant, recipe="svdquant", form=form,
        native=device != "cpu",
    )
    smoothed = (x / smooth).astype(np.float32).reshape(m, k // size, size)  # 53 >= 2 * 24 + 2: rounded as once
    fmt, most, bound = (UE4M3, 6.0, 448) if variant == "nvfp4" else (F16, 7.0, 65504)
    part = np.minimum((np.abs(smoothed).max(-1) / np.float64(most)).astype(np.float32), np.float32(bound))
    stored = encode(part, fmt, Rounding.RNE, Overflow.SATFINITE)
    scale = decode(stored, fmt)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(smoothed == 0, np.float32(0), (smoothed / scale).astype(np.float32))
    if variant == "nvfp4":
        found_codes = encode(np.abs(quotient), E2M1, Rounding.RNA, Overflow.SATFINITE).astype(np.uint8) | (8 * (smoothed < 0))
    else:
        found_codes = encode(quotient, INT4, Rounding.RNE, Overflow.SATFINITE).astype(np.uint8) & 15
    codes = found_codes.reshape(m, k).astype(np.uint8)
    faults = []
    for name, found, expected in (("q", q.cpu().numpy(), codes[:, ::2] | (codes[:, 1::2] << 4)),
                                  ("scales", scales.cpu().numpy().view(stored.dtype), stored.T)):
        wrong = np.argwhere(found != expected)
        if wrong.size:
            at = tuple(wrong[0])
            faults.append(f"{name}: {len(wrong)} of {found.size}, {at} is {found[at]}, expected {expected[at]}")
    return faults
