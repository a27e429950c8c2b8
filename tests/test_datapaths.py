"""Every datapath record against outputs of real devices, and against probes worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.kernels.hopper_probes import INSTRUCTIONS
from lowbit.references.datapaths import CONSTANTS, DATAPATHS, Datapath, Evidence, Family, constants
from lowbit.references.dot import Operand, dot_emulated
from lowbit.references.formats import BF16, E2M1, E4M3FN, E4M3FNUZ, E5M2, E8M0, F16, F32, INT8, UE4M3, Format, container, decode
from lowbit.references.numba_dot import EMULATED, dot_emulated_compiled
from lowbit.references.rounding import Rounding, encode
from lowbit.references.torch_dot import FAMILIES, dot_emulated_torch

Emulator = Callable[[Operand, Operand, Datapath, npt.NDArray[np.float64]], npt.NDArray[np.int64]]

VECTORS = np.load(Path(__file__).parents[1] / "golden" / "hardware" / "vectors.npz")
FORMAT = {"fp16": F16, "bf16": BF16, "tf32": F32, "e4m3": E4M3FN, "e5m2": E5M2}
CASES = [tuple(name.split("/")[:2]) for name in VECTORS.files if name.endswith("/d")]
EMULATORS: dict[str, Emulator] = {
    "numpy": lambda a, w, p, c: dot_emulated(a, w, p, c).astype(np.int64),
    "numba": lambda a, w, p, c: dot_emulated_compiled(a, w, p, c).astype(np.int64),
    "torch": lambda a, w, p, c: dot_emulated_torch(a, w, p, c).numpy(),
}


def mismatches(array: str, record: str, path: Datapath, emulator: str = "numpy", order: list[int] | None = None) -> int:
    """Rows of one hardware array that `path` does not reproduce; `order` permutes k."""
    fmt = FORMAT[array.split("_")[1]]
    a, b, c, d = (VECTORS[f"{array}/{name}"] for name in ("a", "b", f"{record}/c", f"{record}/d"))
    columns = list(range(a.shape[1])) if order is None else order
    wrong, block = 0, 20
    for top in range(0, len(d), block):
        part = slice(top, top + block)
        start = np.repeat(decode(c[part], path.output)[:, None], block, axis=1)
        got = EMULATORS[emulator](Operand(a[part][:, columns], fmt), Operand(b[part][:, columns], fmt), path, start)
        wrong += int((got.diagonal() != d[part]).sum())
    return wrong


# Records -----------------------------------------------------------------------------------------------------------------


def test_the_fixture_has_every_array_and_400_rows_of_each() -> None:
    assert len(CASES) == 22
    assert all(VECTORS["/".join((*case, "d"))].shape == (400,) for case in CASES)
    published, measured = {record for _, record in CASES}, {i.datapath for i in INSTRUCTIONS.values()}
    assert {name for name, path in DATAPATHS.items() if path.evidence is Evidence.MEASURED} == measured
    assert {name for name, path in DATAPATHS.items() if path.evidence is Evidence.HARDWARE_CHECKED} == published - measured


TF32 = ["ampere_tf32", "ada_tf32", "hopper_tf32", "hopper_tf32_k4", "blackwell_tf32", "cdna3_xf32"]
TWINS: dict[str, frozenset[Family]] = {"numpy": frozenset(Family), "numba": EMULATED, "torch": FAMILIES}


@pytest.mark.parametrize(
    ("name", "emulator"), [(name, twin) for name in TF32 for twin, kinds in TWINS.items() if DATAPATHS[name].family in kinds]
)
def test_the_low_bits_of_a_tf32_operand_are_not_read_even_of_a_nan(name: str, emulator: str) -> None:
    """binary32 has 23 fraction bits, tf32 the upper ten: 0x7F800001 is an infinity, 0x7F802000 the first NaN behind it. Times 1;
    the expected row is what H200 gave (E9)."""
    path = DATAPATHS[name]
    words = np.array([[0x3F801FFF], [0x7F800001], [0xFF801FFF], [0x7F802000], [0x7F800000]], np.uint32)
    one = Operand(np.array([[0x3F800000]], np.uint32), F32)
    got = EMULATORS[emulator](Operand(words, F32), one, path, np.zeros((5, 1)))
    assert got[:, 0].tolist() == [0x3F800000, 0x7F800000, 0xFF800000, path.nan_code, 0x7F800000]


@pytest.mark.parametrize("name", DATAPATHS)
def test_a_record_is_numbers(name: str) -> None:
    path = DATAPATHS[name]
    assert path.name == name
    assert path.source
    assert all(type(value) is int for value in constants(path))
    assert len(constants(path)) == len(CONSTANTS)
    numeric = {field.name for field in fields(Datapath)} - {"name", "source", "operands", "output", "scale_format"}
    assert all(isinstance(getattr(path, field), int) for field in numeric)
    assert path.instruction_k % path.products == 0


def test_constants_of_one_record() -> None:
    got = dict(zip(CONSTANTS, constants(DATAPATHS["hopper_wgmma_fp8"]), strict=True))
    # 32 products, 13 fraction bits, E8M13 truncated, zero exponent -133; f32: exponents -126..127.
    assert got["products"] == 32
    assert got["fraction_bits"] == 13
    assert got["output_bits"] == 14
    assert got["zero_exponent"] == -133
    assert got["output_min_exponent"] == -126
    assert got["output_max_exponent"] == 127
    assert got["output_size"] == 32
    assert got["output_rounding"] == 1
    assert got["nan_code"] == 0x7FFFFFFF
    integer = dict(zip(CONSTANTS, constants(DATAPATHS["imma_s32_satfinite"]), strict=True))
    assert integer["saturate"] == 1
    assert integer["output_max_exponent"] == 30


# Real devices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emulator", EMULATORS)
@pytest.mark.parametrize(("array", "record"), CASES)
def test_hardware_rows_are_reproduced_bit_for_bit(array: str, record: str, emulator: str) -> None:
    assert mismatches(array, record, DATAPATHS[record], emulator) == 0


def altered(path: Datapath) -> dict[str, Datapath]:
    """One feature changed at a time."""
    other = Rounding.RZ if path.output_rounding is Rounding.RNE else Rounding.RNE
    return {
        "F-1": replace(path, fraction_bits=path.fraction_bits - 1),
        "F+1": replace(path, fraction_bits=path.fraction_bits + 1),
        "P-1": replace(path, output_bits=path.output_bits - 1),
        "L/2": replace(path, products=path.products // 2),
        "floor": replace(path, alignment_rounding=Rounding.FLOOR),
        "normalised": replace(path, normalised=1),
        "output rounding": replace(path, output_rounding=other),
    }


@pytest.mark.parametrize(("array", "record"), CASES)
def test_each_altered_feature_is_refuted_by_the_hardware_rows(array: str, record: str) -> None:
    # An f16 result of 25 aligned bits hides the alignment; there only width, node length and rounding can be seen.
    path = DATAPATHS[record]
    hidden = {"F-1", "F+1", "floor", "normalised"} if path.output is F16 and path.fraction_bits > 20 else set()
    found = {feature: mismatches(array, record, other) for feature, other in altered(path).items()}
    assert {feature for feature, count in found.items() if not count} == hidden


@pytest.mark.parametrize("array", ["h100_e4m3", "h100_e5m2"])
def test_one_more_output_bit_is_refuted(array: str) -> None:
    path = DATAPATHS["hopper_wgmma_fp8"]
    assert mismatches(array, path.name, replace(path, output_bits=15)) > 50


@pytest.mark.parametrize(("array", "record"), [c for c in CASES if c[1] in ("ada_fp8", "ada_fp8_f16", "hopper_mma_fp8_f16")])
def test_the_order_of_k_matters_across_nodes(array: str, record: str) -> None:
    assert mismatches(array, record, DATAPATHS[record], order=[*range(1, 32, 2), *range(0, 32, 2)]) > 50


@pytest.mark.parametrize("array", ["h100_e4m3", "h100_e5m2"])
def test_the_order_of_k_does_not_matter_within_a_node(array: str) -> None:
    assert mismatches(array, "hopper_wgmma_fp8", DATAPATHS["hopper_wgmma_fp8"], order=list(range(31, -1, -1))) == 0


@pytest.mark.parametrize("array", ["h100_e4m3", "h100_e5m2"])
def test_one_gpu_computes_fp8_in_two_ways(array: str) -> None:
    assert mismatches(array, "hopper_mma_fp8_f16", DATAPATHS["hopper_wgmma_fp8_f16"]) > 50


# Probes worked out by hand -----------------------------------------------------------------------------------------------


def run(path: Datapath, a: list[float], b: list[float], c: float = 0.0, fmt: Format = E4M3FN) -> float:
    """One dot product on all emulators of the family, which must agree; the value of the result."""
    left, right = (Operand(encode(np.array([x], dtype=np.float64), fmt), fmt) for x in (a, b))
    start = np.array([[c]])
    bits = dot_emulated(left, right, path, start)
    if path.family in EMULATED:
        assert np.array_equal(dot_emulated_compiled(left, right, path, start), bits)
    if path.family in FAMILIES:
        assert np.array_equal(dot_emulated_torch(left, right, path, start).numpy(), bits)
    return float(decode(bits, path.output)[0, 0])


WGMMA = DATAPATHS["hopper_wgmma_fp8"]


@pytest.mark.parametrize(
    ("c", "want"),
    # 128 * 128 = 2^14 sets E = 14: the last bit is 2^(14 - 13) = 2. It cancels; c is cut toward zero to a multiple of 2.
    [(2.0, 2.0), (1.0, 0.0), (3.0, 2.0), (-3.0, -2.0)],
)
def test_wgmma_fp8_cuts_c_toward_zero(c: float, want: float) -> None:
    assert run(WGMMA, [128, -128], [128, 128], c) == want


@pytest.mark.parametrize(("x", "y", "want"), [(2.0, 1.0, 2.0), (1.0, 1.0, 0.0), (3.0, 0.5, 0.0), (-3.0, 0.5, 0.0)])
def test_wgmma_fp8_cuts_products_toward_zero(x: float, y: float, want: float) -> None:
    assert run(WGMMA, [128, -128, x], [128, 128, y]) == want


def test_wgmma_fp8_does_not_normalise_products() -> None:
    # (1.5 * 128)^2 = 2.25 * 2^14 aligns at 14, not 15, so 2 survives.
    assert run(WGMMA, [192, -192, 2], [192, 192, 1]) == 2.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_wgmma_fp8_truncates_its_result(sign: float) -> None:
    # 2^15 + 6 has 15 - 1 = 14 places above the units of 4: 32774 -> 32772; nearest even would give 32776.
    assert run(WGMMA, [128, 128, 3], [sign * 128, sign * 128, sign * 2]) == sign * 32772.0


def test_wgmma_fp8_keeps_14_bits_of_c() -> None:
    start = decode(np.array([[0x40401017]], dtype=np.uint32), F32)
    zero = Operand(np.zeros((1, 32), dtype=np.uint8), E4M3FN)
    assert int(dot_emulated(zero, zero, WGMMA, start)[0, 0]) == 0x40401000


@pytest.mark.parametrize(("steps", "want"), [(31, 3.875), (512, 64.0), (513, 64.0), (1024, 64.0)])
def test_wgmma_fp8_stagnates(steps: int, want: float) -> None:
    # 32 products of 2^-8 add 2^-3 per instruction until c = 2^6, whose last kept bit 2^(6 - 13) is above 2^-8.
    assert run(WGMMA, [0.0625] * 32 * steps, [0.0625] * 32 * steps) == want


def test_mma_fp8_adds_c_on_its_own() -> None:
    # The products meet in exact 25-bit nodes from zero; c meets their sum in one IEEE addition.
    assert run(DATAPATHS["hopper_mma_fp8"], [128, -128], [128, 128], 1.0 + 2.0**-23) == 1.0 + 2.0**-23


def test_fp16_keeps_25_fraction_bits() -> None:
    path = DATAPATHS["hopper_f16"]
    # E = 0: c = 2^-25 is the last bit kept, 2^-26 is cut.
    assert run(path, [1, -1], [1, 1], 2.0**-25, F16) == 2.0**-25
    assert run(path, [1, -1], [1, 1], 2.0**-26, F16) == 0.0


def test_nvfp4_is_exact_within_64_products_and_aligns_by_scales() -> None:
    path = DATAPATHS["blackwell_nvfp4"]
    # Scales 448 (e = 8) and 2^-9 (subnormal: e = -6), both sides: E = 16, groups at -12 keep their last bit 2^(-12 - 8)
    # because 16 - 35 = -19 > -20 only by one: 0.25 * 2^-18 = 2^-20 is cut, 0.5 * 2^-18 = 2^-19 is kept.
    for value, kept in ((1.0, 2.0**-19), (0.5, 0.0)):
        a = np.zeros((1, 64))
        a[0, [0, 1, 16]] = 1.0, -1.0, value
        w = np.zeros((1, 64))
        w[0, [0, 1, 16]] = 1.0, 1.0, 0.5
        scales = np.array([[0x7E, 0x01, 0x38, 0x38]], dtype=np.uint8)
        left, right = (Operand(encode(x, E2M1), E2M1, scales, UE4M3, 16) for x in (a, w))
        assert float(decode(dot_emulated(left, right, path), F32)[0, 0]) == kept


def test_integers_wrap_or_clamp() -> None:
    top = 2.0**31 - 1
    assert run(DATAPATHS["imma_s32"], [1], [1], top, INT8) == -(2.0**31)
    assert run(DATAPATHS["imma_s32_satfinite"], [1], [1], top, INT8) == top
    # Each instruction of 32 clamps its own result: +1 is lost, -1 in the next instruction is not.
    a = [1.0] + [0.0] * 31 + [-1.0]
    assert run(DATAPATHS["imma_s32_satfinite"], a, [1.0] * 33, top, INT8) == top - 1
    assert run(DATAPATHS["imma_s32"], a, [1.0] * 33, top, INT8) == top


@pytest.mark.parametrize(
    ("a", "b", "c", "want"),
    [
        (0x7F, 0x00, 0x00000000, 0x7FFFFFFF),  # NaN operand
        (0x00, 0x00, 0x7F800000, 0x7F800000),  # infinite c
        (0x00, 0x00, 0xFFC00001, 0x7FFFFFFF),  # NaN c becomes the canonical one
        (0x80, 0x00, 0x80000000, 0x00000000),  # nothing but negative zeros: +0
    ],
)
def test_special_values_of_wgmma_fp8(a: int, b: int, c: int, want: int) -> None:
    left, right = (Operand(np.array([[x]], dtype=np.uint8), E4M3FN) for x in (a, b))
    start = decode(np.array([[c]], dtype=np.uint32), F32)
    for emulator in EMULATORS.values():
        assert int(emulator(left, right, WGMMA, start)[0, 0]) == want


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([0x7C00], [0x0000], 0x7FFF),  # Inf * 0
        ([0x7C00, 0x7C00], [0x3C00, 0xBC00], 0x7FFF),  # Inf - Inf
        ([0x7C00, 0x3C00], [0xBC00, 0x3C00], 0xFC00),  # -Inf
        ([0x7BFF, 0x7BFF], [0x3C00, 0x3C00], 0x7C00),  # 2 * 65504 overflows
        ([0x7BFF, 0xCC00], [0x3C00, 0xBC00], 0x7C00),  # 65504 + 16 = 65520, the tie that rounds to 2^16
    ],
)
def test_special_values_of_f16_accumulators(a: list[int], b: list[int], want: int) -> None:
    left, right = (Operand(np.array([x], dtype=np.uint16), F16) for x in (a, b))
    for emulator in EMULATORS.values():
        assert int(emulator(left, right, DATAPATHS["hopper_f16_f16"], np.zeros((1, 1)))[0, 0]) == want


def test_cdna3_rounds_toward_minus_infinity_where_it_drops_bits() -> None:
    # E = 0 from 1 * 1 - 1 * 1; c = +-2^-25 is floored to a multiple of 2^-24: 0 and -2^-24.
    path = DATAPATHS["cdna3_f16"]
    assert run(path, [1, -1], [1, 1], 2.0**-25, F16) == 0.0
    assert run(path, [1, -1], [1, 1], -(2.0**-25), F16) == -(2.0**-24)


def test_cdna1_sums_exactly_and_cdna2_does_not() -> None:
    # 2^14 * 2^14 + 2^-20 - 2^28: the small term survives only an exact sum (CDNA2: (p0 + p1) loses it in 24 bits).
    a, b = [2.0**14, 2.0**-10, -(2.0**14)], [2.0**14, 2.0**-10, 2.0**14]
    assert run(DATAPATHS["cdna1_f16"], a, b, 0.0, F16) == 2.0**-20
    assert run(DATAPATHS["cdna2_f16"], a, b, 0.0, F16) == 0.0


def test_cdna2_flushes_subnormals() -> None:
    assert run(DATAPATHS["cdna2_f16"], [2.0**-24], [1.0], 0.0, F16) == 0.0
    assert run(DATAPATHS["cdna1_f16"], [2.0**-24], [1.0], 0.0, F16) == 2.0**-24


# Every number of a record is used ----------------------------------------------------------------------------------------

SEED = 20


def stimulus(path: Datapath, spread: float, tiny: float, specials: bool) -> tuple[Operand, Operand, npt.NDArray[np.float64]]:
    """Random operands [64, 2 instructions], log-normal with `spread` octaves around 2^tiny, some zeros, and a start.

    GROUPED: every group cancels to zero, one is zero: what is left is c as the alignment cuts it."""
    rng = np.random.default_rng(SEED)
    k = 2 * path.instruction_k if path.family is not Family.IEEE else 8
    sides: list[Operand] = []
    for _ in range(2):
        fmt = path.operands[0]
        x = rng.standard_normal((64, k)) * np.exp2(tiny + spread * rng.standard_normal((64, k)))
        x[:, 3] = 0.0
        if path.family is Family.GROUPED:
            x[:, 48:64] = 0.0
            x[:, 1::2] = -x[:, 0::2] if sides else x[:, 0::2]
        codes = encode(np.rint(x * 30) if fmt is INT8 else x, fmt)
        if specials:
            codes[0] = fmt.nan_code
        scales = None
        if path.scale_format is not None:
            low, high = (1, 0x7F) if path.scale_format is UE4M3 else (120, 135)
            scales = rng.integers(low, high, (64, k // path.scale_group)).astype(container(path.scale_format))
        sides.append(Operand(codes, fmt, scales, path.scale_format, path.scale_group))
    start = encode(rng.standard_normal((64, 64)) * np.exp2(2 * tiny + 2 * spread * rng.standard_normal((64, 64))), path.output)
    return sides[0], sides[1], decode(start, path.output)


# field, record, changed value, log2 spread, log2 centre, specials present
FLIPS = [
    ("family", "cdna3_f16", Family.EXACT_SUM, 2.0, 0.0, False),
    ("products", "hopper_wgmma_fp8", 16, 1.0, 0.0, False),
    ("products", "hopper_mma_fp8", 8, 3.0, 0.0, False),
    ("products", "cdna1_f16", 2, 2.0, 0.0, False),
    ("products", "cdna2_f16", 2, 2.0, 0.0, False),
    ("products", "cdna3_f16", 4, 2.0, 0.0, False),
    ("instruction_k", "hopper_mma_fp8_f16", 64, 1.0, 0.0, False),
    ("instruction_k", "imma_s32_satfinite", 64, 0.0, 0.0, False),
    ("output", "hopper_f16_f16", F32, 1.0, -8.0, False),
    ("output_bits", "hopper_f16", 23, 1.0, 0.0, False),
    ("output_bits", "ieee_f32", 23, 1.0, 0.0, False),
    ("output_bits", "cdna3_fp8", 23, 1.0, 0.0, False),
    ("output_rounding", "hopper_bf16", Rounding.RNE, 1.0, 0.0, False),
    ("output_rounding", "ieee_f32", Rounding.RZ, 1.0, 0.0, False),
    ("nan_code", "hopper_f16", 0x7FC00000, 1.0, 0.0, True),
    ("fraction_bits", "ada_fp8", 14, 1.0, 0.0, False),
    ("fraction_bits", "blackwell_nvfp4", 20, 1.0, 0.0, False),
    ("fraction_bits", "blackwell_mxf8f6f4", 24, 1.0, 0.0, False),
    ("fraction_bits", "cdna3_f16", 20, 3.0, 0.0, False),
    ("zero_exponent", "hopper_f16_f16", 10, 1.0, -8.0, False),
    ("zero_exponent", "blackwell_nvfp4", 30, 1.0, 0.0, False),
    ("zero_exponent", "cdna3_f16", 30, 1.0, -3.0, False),
    ("alignment_rounding", "hopper_wgmma_fp8", Rounding.FLOOR, 1.0, 0.0, False),
    ("normalised", "hopper_wgmma_fp8", 1, 1.0, 0.0, False),
    ("operand_bits", "ampere_tf32", 0, 0.0, 0.0, False),
    ("operand_bits", "cdna3_xf32", 0, 0.0, 0.0, False),
    ("operand_min_exponent", "hopper_wgmma_fp8", -14, 3.0, -6.0, False),
    ("group", "hopper_mma_fp8_f16", 4, 1.0, 0.0, False),
    ("group", "blackwell_nvfp4", 32, 2.0, 0.0, False),
    ("group", "cdna3_fp8", 2, 3.0, 0.0, False),
    ("carry_bits", "cdna3_f16", 25, 2.0, 0.0, False),
    ("flush", "cdna2_f16", 0, 1.0, -14.0, False),
    ("fused", "ieee_f16", 0, 1.0, 0.0, False),
    ("saturate", "imma_s32_satfinite", 0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("field", "name", "value", "spread", "tiny", "specials"), FLIPS, ids=[f"{f[0]}-{f[1]}" for f in FLIPS])
def test_every_field_of_a_record_changes_bits(
    field: str, name: str, value: int | Format, spread: float, tiny: float, specials: bool
) -> None:
    path = DATAPATHS[name]
    a, w, drawn = stimulus(path, spread, tiny, specials)
    change: dict[str, Any] = {field: value}
    other = replace(path, **change)
    start = drawn if other.output is path.output else None
    if path.family is Family.INTEGER:
        start = np.full(drawn.shape, 2.0**31 - 1)  # partial sums clamp
    before, after = dot_emulated(a, w, path, start), dot_emulated(a, w, other, start)
    if field == "nan_code":
        assert {0x7FFFFFFF, 0x7FC00000} <= {*before.ravel().tolist(), *after.ravel().tolist()}
    assert not np.array_equal(decode(before, path.output), decode(after, other.output), equal_nan=True) or field == "nan_code"
    if path.family in EMULATED and other.family in EMULATED:
        assert np.array_equal(dot_emulated_compiled(a, w, other, start), after)
    if path.family in FAMILIES and other.family in FAMILIES:
        assert np.array_equal(dot_emulated_torch(a, w, other, start).numpy(), after)


def test_every_number_of_a_record_is_flipped_above() -> None:
    """Left out: evidence (provenance, no arithmetic) and scale_group, operands, scale_format, which say what is refused."""
    free = {"name", "source", "evidence", "operands", "scale_group", "scale_format"}
    assert {field.name for field in fields(Datapath)} - free == {flip[0] for flip in FLIPS}


@pytest.mark.parametrize(
    ("name", "fmt", "scale", "group"),
    [
        ("hopper_wgmma_fp8", BF16, None, 0),
        ("hopper_wgmma_fp8", E4M3FN, E8M0, 32),
        ("blackwell_nvfp4", E2M1, None, 0),
        ("blackwell_nvfp4", E2M1, UE4M3, 32),
        ("blackwell_nvfp4", E2M1, E8M0, 16),
        ("cdna3_fp8", E4M3FN, None, 0),
        ("imma_s32", E4M3FNUZ, None, 0),
    ],
)
def test_operands_that_the_unit_does_not_take_are_refused(name: str, fmt: Format, scale: Format | None, group: int) -> None:
    codes = np.zeros((1, 64), dtype=container(fmt))
    scales = None if scale is None else np.zeros((1, 64 // group), dtype=np.uint8)
    op = Operand(codes, fmt, scales, scale, group)
    path = DATAPATHS[name]
    with pytest.raises(ValueError, match=rf"^{name}: got .* expected"):
        dot_emulated(op, op, path)
    if path.family in FAMILIES:
        with pytest.raises(ValueError, match=rf"^{name}: got .* expected"):
            dot_emulated_torch(op, op, path)
