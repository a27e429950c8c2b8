"""Every code means what an independent derivation says: literal tables, counting up in steps, and two libraries as witnesses."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit.references import formats
from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    F16,
    F32,
    F64,
    FORMATS,
    INT4,
    INT8,
    INT32,
    UE4M3,
    UINT4,
    UINT8,
    Format,
    Special,
    code_of_key,
    container,
    decode,
    decode_scalar,
    is_nan,
    order_key,
)
from lowbit.references.numba_twin import decode_compiled
from lowbit.references.torch_twin import decode_torch

# Widening a signalling NaN raises NumPy's invalid flag; the value is NaN all the same.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")

NAN, INF = float("nan"), float("inf")
SMALL = [f for f in FORMATS.values() if f.bits <= 8]
UP_TO_16 = [f for f in FORMATS.values() if f.bits <= 16]
WIDE = [F16, BF16, F32, F64, INT32]


def all_codes(fmt: Format) -> Any:
    return np.arange(1 << fmt.bits).astype(container(fmt))


def sample_codes(fmt: Format) -> Any:
    """Every code up to 16 bits; beyond, a seeded draw with every exponent and both ends."""
    if fmt.bits <= 16:
        return all_codes(fmt)
    drawn = np.random.default_rng(20).integers(0, 1 << fmt.bits, 20000, dtype=np.uint64)
    ends = [0, 1, fmt.max_code, fmt.max_code + 1, fmt.min_code, fmt.sign_bit, (1 << fmt.bits) - 1]
    return np.concatenate([drawn, np.array(ends, dtype=np.uint64)]).astype(container(fmt))


def by_definition(codes: Any, fmt: Format) -> Any:
    named = {Special.NAN: NAN, Special.POS_INF: INF, Special.NEG_INF: -INF, Special.NEG_ZERO: -0.0}
    values = (decode_scalar(int(c), fmt) for c in codes.reshape(-1))
    return np.array([named[v] if isinstance(v, Special) else float(v) for v in values]).reshape(codes.shape)


def by_torch(codes: Any, fmt: Format) -> Any:
    signed = codes if codes.dtype == np.uint8 else codes.view(codes.dtype.str.replace("u", "i"))
    dtype = torch.float64 if fmt in (INT32, F64) else torch.float32
    return decode_torch(torch.from_numpy(signed.copy()), fmt, dtype).numpy().astype(np.float64)


def by_numba(codes: Any, fmt: Format) -> Any:
    return decode_compiled(codes, fmt).astype(np.float64)


def by_numba_threads(codes: Any, fmt: Format) -> Any:
    return decode_compiled(codes, fmt, parallel=True).astype(np.float64)


DECODERS = [by_definition, decode, by_numba, by_numba_threads, by_torch]


def assert_same(got: Any, want: Any) -> None:
    """Equal as values, -0 distinct from +0, NaN equal to NaN."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    same = (got == want) & (np.signbit(got) == np.signbit(want))
    wrong = ~(same | (np.isnan(got) & np.isnan(want)))
    assert not wrong.any(), (np.flatnonzero(wrong)[:5], got[wrong][:5], want[wrong][:5])


E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
INT4_VALUES = [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]

# OCP 8-bit floating point 1.0 table 2; fnuz table of arXiv 2206.02915; OCP MX 1.0 section 5; IEEE 754-2019 section 3.6.
ANCHORS: dict[Format, dict[int, float]] = {
    E2M1: dict(enumerate(E2M1_VALUES)),
    INT4: dict(enumerate(INT4_VALUES)),
    UINT4: {c: c for c in range(16)},
    INT8: {0: 0, 1: 1, 0x7F: 127, 0x80: -128, 0x81: -127, 0xFF: -1},
    UINT8: {0: 0, 1: 1, 0x7F: 127, 0x80: 128, 0xFF: 255},
    INT32: {0: 0, 0x7FFFFFFF: 2147483647, 0x80000000: -2147483648, 0xFFFFFFFF: -1},
    E4M3FN: {
        0: 0.0, 1: 2.0**-9, 7: 7 * 2.0**-9, 8: 2.0**-6, 0x38: 1.0, 0x39: 1.125, 0x77: 240.0, 0x7E: 448.0, 0x7F: NAN,
        0x80: -0.0, 0x81: -(2.0**-9), 0xB8: -1.0, 0xFE: -448.0, 0xFF: NAN,
    },
    UE4M3: {0: 0.0, 1: 2.0**-9, 8: 2.0**-6, 0x38: 1.0, 0x7E: 448.0, 0x7F: NAN},
    E4M3FNUZ: {
        0: 0.0, 1: 2.0**-10, 7: 7 * 2.0**-10, 8: 2.0**-7, 0x40: 1.0, 0x7E: 224.0, 0x7F: 240.0, 0x80: NAN, 0x81: -(2.0**-10),
        0xC0: -1.0, 0xFF: -240.0,
    },
    E5M2: {
        0: 0.0, 1: 2.0**-16, 3: 3 * 2.0**-16, 4: 2.0**-14, 0x3C: 1.0, 0x3D: 1.25, 0x7B: 57344.0, 0x7C: INF, 0x7D: NAN,
        0x7E: NAN, 0x7F: NAN, 0x80: -0.0, 0xFB: -57344.0, 0xFC: -INF, 0xFD: NAN, 0xFF: NAN,
    },
    E5M2FNUZ: {0: 0.0, 1: 2.0**-17, 4: 2.0**-15, 0x40: 1.0, 0x7F: 57344.0, 0x80: NAN, 0x81: -(2.0**-17), 0xFF: -57344.0},
    E8M0: {0: 2.0**-127, 1: 2.0**-126, 0x7E: 0.5, 0x7F: 1.0, 0x80: 2.0, 0xFE: 2.0**127, 0xFF: NAN},
    F16: {
        0: 0.0, 1: 2.0**-24, 0x400: 2.0**-14, 0x3C00: 1.0, 0x7BFF: 65504.0, 0x7C00: INF, 0x7E00: NAN, 0x8000: -0.0,
        0xFBFF: -65504.0,
    },
    BF16: {0: 0.0, 1: 2.0**-133, 0x80: 2.0**-126, 0x3F80: 1.0, 0x7F7F: 255 * 2.0**120, 0x7F80: INF, 0x7FC0: NAN, 0x8000: -0.0},
    F32: {
        0: 0.0, 1: 2.0**-149, 0x3F800000: 1.0, 0x7F7FFFFF: (2.0**24 - 1) * 2.0**104, 0x7F800000: INF, 0x7FC00000: NAN,
        1 << 31: -0.0,
    },
    F64: {0: 0.0, 1: 5e-324, 0x3FF << 52: 1.0, 0x7FF << 52: INF, 1 << 63: -0.0, (0xBFF << 52) + 1: -1.0000000000000002},
}


def test_every_format_has_anchors() -> None:
    assert set(ANCHORS) == set(FORMATS.values())
    assert all(FORMATS[f.name] is f for f in ANCHORS)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("decoder", DECODERS)
def test_anchor_values(decoder: Callable[[Any, Format], Any], fmt: Format) -> None:
    if decoder in (by_numba, by_numba_threads) and fmt in (INT32, F64):
        with pytest.raises(ValueError, match="float32 does not hold"):
            decoder(np.zeros(1, dtype=container(fmt)), fmt)
        return
    codes = np.array(list(ANCHORS[fmt]), dtype=np.uint64).astype(container(fmt))
    assert_same(decoder(codes, fmt), list(ANCHORS[fmt].values()))


# name: fraction bits, exponent of the smallest subnormal, number of finite non-negative codes
STEPS = {
    "e2m1": (1, -1, 8), "e4m3fn": (3, -9, 127), "ue4m3": (3, -9, 127), "e4m3fnuz": (3, -10, 128), "e5m2": (2, -16, 124),
    "e5m2fnuz": (2, -17, 128), "f16": (10, -24, 0x7C00), "bf16": (7, -133, 0x7F80),
}


@pytest.mark.parametrize("name", STEPS)
def test_values_counted_up_in_steps(name: str) -> None:
    """A float format counts up from zero; the step doubles at each power of two from the second normal binade on."""
    fmt = FORMATS[name]
    fraction_bits, exponent, count = STEPS[name]
    value, step, values = Fraction(0), Fraction(2) ** exponent, []
    for code in range(count):
        values.append(value)
        if code >= 2 << fraction_bits and code % (1 << fraction_bits) == 0:
            step *= 2
        value += step
    want = np.array([float(v) for v in values])
    codes = np.arange(count).astype(container(fmt))
    assert_same(decode(codes, fmt), want)
    assert fmt.max_finite == values[-1]
    assert fmt.max_code == count - 1
    assert not is_nan(codes, fmt).any()
    if fmt.signed:
        negative = decode(codes[1:] | container(fmt).type(1 << (fmt.bits - 1)), fmt)
        assert_same(negative, -want[1:])


WITNESSES: list[tuple[Format, Any]] = [
    (E2M1, ml_dtypes.float4_e2m1fn), (E4M3FN, ml_dtypes.float8_e4m3fn), (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    (E5M2, ml_dtypes.float8_e5m2), (E5M2FNUZ, ml_dtypes.float8_e5m2fnuz), (E8M0, ml_dtypes.float8_e8m0fnu),
    (BF16, ml_dtypes.bfloat16), (F16, np.float16), (INT4, ml_dtypes.int4), (UINT4, ml_dtypes.uint4), (INT8, np.int8),
    (UINT8, np.uint8),
]


@pytest.mark.parametrize(("fmt", "dtype"), WITNESSES, ids=lambda v: getattr(v, "name", ""))
def test_numpy_and_ml_dtypes_agree(fmt: Format, dtype: Any) -> None:
    codes = all_codes(fmt)
    with np.errstate(invalid="ignore"):
        assert_same(decode(codes, fmt), codes.view(dtype).astype(np.float32).astype(np.float64))


GFLOAT = [
    (E2M1, gf.format_info_ocp_e2m1), (E4M3FN, gf.format_info_ocp_e4m3), (E5M2, gf.format_info_ocp_e5m2),
    (E8M0, gf.format_info_ocp_e8m0), (F16, gf.format_info_binary16), (BF16, gf.format_info_bfloat16),
]


@pytest.mark.parametrize(("fmt", "info"), GFLOAT, ids=lambda v: v.name)
def test_gfloat_agrees(fmt: Format, info: Any) -> None:
    codes = all_codes(fmt)[:: 1 if fmt.bits <= 8 else 37]
    assert_same(decode(codes, fmt), [gfloat.decode_float(info, int(c)).fval for c in codes])


@pytest.mark.parametrize("decoder", [decode, by_numba, by_numba_threads, by_torch])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_twins_equal_the_definition(decoder: Callable[[Any, Format], Any], fmt: Format) -> None:
    codes = sample_codes(fmt)
    if decoder in (by_numba, by_numba_threads) and fmt in (INT32, F64):
        with pytest.raises(ValueError, match="float32 does not hold"):
            decoder(codes, fmt)
        return
    want = by_definition(codes, fmt)
    assert_same(decoder(codes, fmt), want)
    assert_same(decoder(codes[:6].reshape(2, 3), fmt), want[:6].reshape(2, 3))
    assert decoder(codes[:0], fmt).shape == (0,)
    assert_same(decoder(codes[::2], fmt), want[::2])


@pytest.mark.parametrize("fmt", [BF16, F32], ids=str)
def test_torch_decodes_to_float64_exactly(fmt: Format) -> None:
    codes = sample_codes(fmt)
    signed = torch.from_numpy(codes.view(codes.dtype.str.replace("u", "i")).copy())
    assert_same(decode_torch(signed, fmt, torch.float64).numpy(), decode(codes, fmt))


@pytest.mark.parametrize("fmt", UP_TO_16, ids=str)
def test_nan_and_order_of_every_code(fmt: Format) -> None:
    codes = all_codes(fmt)
    nan = is_nan(codes, fmt)
    np.testing.assert_array_equal(nan, np.isnan(decode(codes, fmt)))
    keys = order_key(codes, fmt)
    assert keys.dtype == np.int64
    np.testing.assert_array_equal(code_of_key(keys, fmt), codes)
    assert code_of_key(keys, fmt).dtype == container(fmt)
    assert np.unique(keys).size == codes.size
    assert keys.max() - keys.min() == codes.size - 1
    ordered = codes[np.argsort(keys)]
    ordered = ordered[~is_nan(ordered, fmt)]
    values = decode(ordered, fmt)
    zeros = (values[1:] == 0) & (values[:-1] == 0) & np.signbit(values[:-1]) & ~np.signbit(values[1:])
    assert ((values[1:] > values[:-1]) | zeros).all()


@pytest.mark.parametrize("fmt", WIDE, ids=str)
def test_wide_keys(fmt: Format) -> None:
    codes = sample_codes(fmt)
    codes = codes[~is_nan(codes, fmt)]
    keys = order_key(codes, fmt)
    np.testing.assert_array_equal(code_of_key(keys, fmt), codes)
    ordered = decode(codes[np.argsort(keys)], fmt)
    assert (ordered[1:] >= ordered[:-1]).all()
    np.testing.assert_array_equal(is_nan(sample_codes(fmt), fmt), np.isnan(decode(sample_codes(fmt), fmt)))


@pytest.mark.parametrize(
    ("fmt", "code", "key"),
    [(E4M3FN, 0x80, -1), (E4M3FN, 0x00, 0), (E4M3FN, 0x01, 1), (E4M3FN, 0x81, -2), (E2M1, 0xF, -8), (INT4, 0x8, -8),
     (INT4, 0xF, -1), (UINT8, 0xFF, 255), (E8M0, 0, 0), (UE4M3, 0x7E, 0x7E), (F64, 1 << 63, -1), (F32, 0x80000001, -2),
     (INT32, 1 << 31, -(1 << 31))],
)
def test_literal_keys(fmt: Format, code: int, key: int) -> None:
    assert order_key(np.array([code], dtype=container(fmt)), fmt).tolist() == [key]
    assert code_of_key(np.array([key]), fmt).tolist() == [code]


def test_properties_by_hand() -> None:
    maxima: dict[Format, int | Fraction] = {
        E2M1: 6, E4M3FN: 448, E4M3FNUZ: 240, E5M2: 57344, E5M2FNUZ: 57344, UE4M3: 448, E8M0: 2**127, INT4: 7, UINT4: 15,
        INT8: 127, UINT8: 255, INT32: 2**31 - 1, F16: 65504, BF16: 255 * 2**120, F32: (2**24 - 1) * 2**104,
        F64: (2**53 - 1) * 2**971,
    }
    assert {f: f.max_finite for f in FORMATS.values()} == maxima
    minima = {f: -m for f, m in maxima.items()} | {INT4: -8, INT8: -128, INT32: -(2**31)}
    minima |= {UINT4: 0, UINT8: 0, UE4M3: 0, E8M0: Fraction(1, 2**127)}
    lowest = {f: decode_scalar(f.min_code, f) for f in FORMATS.values()}
    assert {f: Fraction(0) if v is Special.NEG_ZERO else v for f, v in lowest.items()} == minima
    assert {f for f in FORMATS.values() if f.has_inf} == {E5M2, F16, BF16, F32, F64}
    assert {f for f in FORMATS.values() if f.has_neg_zero} == {E2M1, E4M3FN, E5M2, F16, BF16, F32, F64}
    assert [container(f).itemsize for f in (INT4, UE4M3, E8M0, F16, F32, F64)] == [1, 1, 1, 2, 4, 8]


@pytest.mark.parametrize("fmt", SMALL, ids=str)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_code_outside_the_format_is_refused(decoder: Callable[[Any, Format], Any], fmt: Format) -> None:
    for code in {1 << fmt.bits, 255} if fmt.bits < 8 else ():
        with pytest.raises(ValueError, match=f"{fmt.name}: code {code:#x} is outside"):
            decoder(np.array([0, code], dtype=np.uint8), fmt)


def test_a_wrong_container_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        decode_compiled(np.zeros(2, dtype=np.uint16), E2M1)
    with pytest.raises(ValueError, match=r"expected torch\.uint8"):
        decode_torch(torch.zeros(2, dtype=torch.int16), E2M1)
    with pytest.raises(ValueError, match="holds every value"):
        decode_torch(torch.zeros(2, dtype=torch.int32), INT32)
    with pytest.raises(ValueError, match="is outside"):
        decode_scalar(-1, formats.E4M3FN)
