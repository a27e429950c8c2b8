"""Exact sums against Fractions, emulators against the scalar definition, bounds against the emulators."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.references import dot
from lowbit.references.datapaths import DATAPATHS, Datapath, Family
from lowbit.references.dot import (
    Enclosure,
    Operand,
    agnostic_bound,
    dot_emulated,
    dot_exact,
    dot_fraction,
    node_scalar,
    running_bound,
    scalar_terms,
)
from lowbit.references.formats import (
    E2M1,
    E4M3FN,
    E5M2,
    E8M0,
    F16,
    F32,
    INT8,
    UE4M3,
    Format,
    Kind,
    Special,
    container,
    decode,
    decode_scalar,
)
from lowbit.references.numba_dot import BOUNDED, EMULATED, dot_emulated_compiled, running_bound_compiled
from lowbit.references.rounding import Overflow, Rounding, encode, round_to
from lowbit.references.torch_dot import FAMILIES, dot_emulated_torch

Reals = npt.NDArray[np.float64]
FLOATING = [name for name, path in DATAPATHS.items() if path.family is not Family.INTEGER]

# The exact sum -----------------------------------------------------------------------------------------------------------


def rows(kind: str, seed: int) -> tuple[Reals, Reals]:
    """A [5, K] and W [4, K] of one kind of difficulty."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 200))
    a, w = rng.standard_normal((5, k)), rng.standard_normal((4, k))
    if kind == "float32":
        return a.astype(np.float32).astype(np.float64), w.astype(np.float32).astype(np.float64)
    if kind == "e5m2":
        a, w = (np.ldexp(x, rng.integers(-16, 15, x.shape)) for x in (a, w))
        return round_to(a, E5M2, overflow=Overflow.SATFINITE), round_to(w, E5M2, overflow=Overflow.SATFINITE)
    if kind == "wide":
        a, w = (np.ldexp(np.rint(8 * x), rng.integers(-200, 200, x.shape)) for x in (a, w))
    if kind == "cancelling":
        a, w = np.concatenate([a, a, a[:, :1]], axis=1), np.concatenate([w, -w, w[:, :1] * 2.0**-60], axis=1)
    if kind == "sparse":
        return a * (rng.random(a.shape) < 0.1), w
    return a, w


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["float64", "float32", "e5m2", "wide", "cancelling", "sparse"])
def test_dot_exact_encloses_the_sum_of_fractions(kind: str, seed: int) -> None:
    a, w = rows(kind, seed)
    found = dot_exact(a, w)
    for m in range(a.shape[0]):
        for n in range(w.shape[0]):
            want = sum((Fraction(x) * Fraction(y) for x, y in zip(a[m].tolist(), w[n].tolist(), strict=True)), Fraction(0))
            assert abs(want - Fraction(float(found.value[m, n]))) <= Fraction(float(found.radius[m, n]))
            assert dot_fraction(a[m], w[n]) == want


def test_dot_exact_certifies_narrow_formats_without_a_radius() -> None:
    rng = np.random.default_rng(1)
    for fmt, k in ((E4M3FN, 4096), (E5M2, 512), (F16, 512), (INT8, 4096)):
        a, w = (decode(rng.integers(0, 1 << (fmt.bits - 1), (4, k)).astype(container(fmt)), fmt) for _ in range(2))
        a, w = (np.where(np.isfinite(x), x, 0.0) for x in (a, w))
        found = dot_exact(a, w)
        exact = [[dot_fraction(x, y) for y in w] for x in a]
        fits = [[float(v) == v for v in line] for line in exact]
        assert np.array_equal(found.radius == 0, fits)
        assert found.value.tolist() == [[float(v) for v in line] for line in exact]


def test_the_certificate_fails_one_bit_above_53() -> None:
    # 2^53 + 1 is no float64: plain float64 summation returns 2^53 and says nothing.
    ones = np.ones((1, 2))
    top = np.array([[2.0**53, 1.0]])
    assert float((ones @ top.T)[0, 0]) == 2.0**53
    found = dot_exact(ones, top)
    assert found.radius[0, 0] >= 1.0
    assert abs(found.value[0, 0] - 2.0**53) <= 2.0
    # One bit lower the sum is exact, and the cut in two proves it although the magnitudes reach 2^53.
    found = dot_exact(np.ones((1, 3)), np.array([[2.0**53, -(2.0**53), 1.0]]))
    assert (found.value[0, 0], found.radius[0, 0]) == (1.0, 0.0)


def test_the_radius_is_no_more_than_float64_cannot_hold() -> None:
    a, w = rows("float32", 3)
    found = dot_exact(a, w)
    assert (found.radius <= np.spacing(np.abs(found.value))).all()


def test_special_operands_follow_ieee_mathematics() -> None:
    inf, nan = np.inf, np.nan
    a = np.array([[1.0, inf], [nan, 0.0], [0.0, -inf], [inf, inf], [-0.0, 2.0]])
    w = np.array([[1.0, 0.0], [1.0, 2.0], [-1.0, -inf], [nan, 1.0], [inf, 1.0]])
    with np.errstate(invalid="ignore"):
        want = np.array([[(x * y).sum() for y in w] for x in a])
    found = dot_exact(a, w)
    assert np.array_equal(found.value, want, equal_nan=True)
    assert not found.radius.any()
    assert np.isnan(want).any()
    assert np.isposinf(want).any()
    assert np.isneginf(want).any()
    assert np.isfinite(want).any()


def test_dot_exact_of_nothing_is_plus_zero() -> None:
    found = dot_exact(np.zeros((2, 0)), np.zeros((3, 0)))
    assert found.value.tolist() == [[0.0] * 3] * 2
    assert not np.signbit(found.value).any()
    assert not found.radius.any()
    assert not np.signbit(dot_exact(np.array([[-1.0]]), np.array([[0.0]])).value).any()


@pytest.mark.parametrize(
    ("a", "w"),
    [((2, 3), (2, 4)), ((3,), (3,))],
)
def test_dot_exact_refuses_shapes(a: tuple[int, ...], w: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"dot_exact: got shapes .* expected"):
        dot_exact(np.zeros(a), np.zeros(w))


@pytest.mark.parametrize("x", [2.0**481, 2.0**-501, 2.0**-450 * (1 + 2.0**-51)])
def test_dot_exact_refuses_ranges_it_cannot_certify(x: float) -> None:
    with pytest.raises(ValueError, match="dot_exact: got lowest bits"):
        dot_exact(np.array([[x]]), np.array([[1.0]]))


def test_dot_fraction_refuses_specials() -> None:
    with pytest.raises(ValueError, match="not finite"):
        dot_fraction(np.array([np.inf]), np.array([1.0]))


# Operands ----------------------------------------------------------------------------------------------------------------


def test_values_apply_block_scales() -> None:
    codes = np.array([[0x2, 0x3, 0x4, 0xD]], dtype=np.uint8)  # 1, 1.5, 2, -3
    op = Operand(codes, E2M1, np.array([[0x38, 0x40]], dtype=np.uint8), UE4M3, 2)  # scales 1 and 2
    assert dot.values(op).tolist() == [[1.0, 1.5, 4.0, -6.0]]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((np.zeros(4, dtype=np.uint8), E4M3FN), "operand codes"),
        ((np.zeros((1, 4), dtype=np.uint16), E4M3FN), "operand codes"),
        ((np.zeros((1, 4), dtype=np.uint8), E4M3FN, None, None, 2), "operand scales"),
        ((np.zeros((1, 4), dtype=np.uint8), E4M3FN, np.zeros((1, 2), dtype=np.uint8), E8M0, 0), "operand scales"),
        ((np.zeros((1, 4), dtype=np.uint8), E4M3FN, np.zeros((1, 3), dtype=np.uint8), E8M0, 2), "operand scales"),
        ((np.zeros((1, 5), dtype=np.uint8), E4M3FN, np.zeros((1, 2), dtype=np.uint8), E8M0, 2), "operand scales"),
    ],
)
def test_malformed_operands_are_refused(arguments: tuple[Any, ...], what: str) -> None:
    with pytest.raises(ValueError, match=f"{what}: got"):
        Operand(*arguments)


# Emulators ---------------------------------------------------------------------------------------------------------------


def value_of(raw: npt.NDArray[np.unsignedinteger], fmt: Format) -> Reals:
    """Values of any codes, signalling NaN included."""
    with np.errstate(invalid="ignore"):
        return np.asarray(decode(raw, fmt))


def codes(rng: np.random.Generator, shape: tuple[int, int], fmt: Format, kind: str) -> npt.NDArray[np.unsignedinteger]:
    """Codes of one distribution; `bits` are uniform over all finite codes."""
    if kind == "bits":
        drawn = rng.integers(0, 1 << fmt.bits, shape, dtype=np.uint64).astype(container(fmt))
        return np.asarray(np.where(np.isfinite(value_of(drawn, fmt)), drawn, container(fmt).type(0)))
    x = rng.standard_normal(shape)
    if kind == "positive":
        x = np.abs(x) + 0.1
    if kind == "lognormal":
        x = x * np.exp2(np.rint(3 * rng.standard_normal(shape)))
    if kind == "subnormal":
        x = x * 2.0 ** (fmt.min_exponent if fmt.exponent_bits else 0)
    if kind == "ones":
        x = np.sign(x)
    if kind in ("cancelling", "anticancelling"):
        half = shape[1] // 2
        x[:, half : 2 * half] = x[:, :half] * (1 if kind == "cancelling" else -1)
    return np.asarray(encode(x * 20 if fmt.kind in (Kind.INT, Kind.UINT) else x, fmt))


def operand(rng: np.random.Generator, n: int, k: int, path: Datapath, kind: str, fmt: Format | None = None) -> Operand:
    fmt = path.operands[int(rng.integers(len(path.operands)))] if fmt is None else fmt
    elements = codes(rng, (n, k), fmt, kind)
    if path.scale_format is None:
        return Operand(elements, fmt)
    shape = (n, -(-k // path.scale_group))
    low, high = (0x38, 0x39) if kind == "ones" else ((0, 0x7F) if path.scale_format is UE4M3 else (120, 135))
    if path.scale_format is E8M0 and kind == "ones":
        low, high = 127, 128
    scales = rng.integers(low, high, shape).astype(np.uint8)
    return Operand(elements, fmt, scales, path.scale_format, path.scale_group)


def length(path: Datapath, instructions: int = 2) -> int:
    return 12 * instructions if path.family is Family.IEEE else path.instruction_k * instructions


def chain_scalar(a: Operand, w: Operand, m: int, n: int, c: Fraction | Special, path: Datapath) -> Fraction | Special:
    """The chain of nodes by the scalar definition; stops at the first special value."""
    left, right = scalar_terms(a, m, path), scalar_terms(w, n, path)
    step = path.instruction_k if path.family is Family.EMULATED_PAIRS else path.products
    for k in range(0, len(left), step):
        if isinstance(c, Special):
            return c
        c = node_scalar(left[k : k + step], right[k : k + step], c, path)
    return c


@pytest.mark.parametrize("kind", ["bits", "lognormal", "subnormal"])
@pytest.mark.parametrize("name", FLOATING)
def test_emulation_is_the_scalar_definition(name: str, kind: str) -> None:
    path = DATAPATHS[name]
    rng = np.random.default_rng(sum(map(ord, name + kind)))
    k = length(path, 1)
    a, w = operand(rng, 3, k, path, kind), operand(rng, 3, k, path, kind)
    scale = 2.0 ** (2 * path.operands[0].min_exponent) if kind == "subnormal" else 1.0
    start = decode(encode(rng.standard_normal((3, 3)) * scale, path.output), path.output)
    got = dot_emulated(a, w, path, start)
    for m in range(3):
        for n in range(3):
            want = chain_scalar(a, w, m, n, Fraction(float(start[m, n])), path)
            found = decode_scalar(int(got[m, n]), path.output)
            found = Fraction(0) if found is Special.NEG_ZERO else found
            if want is not Special.NAN and not (isinstance(want, Special) and isinstance(found, Special)):
                assert found == want


def test_the_ieee_f64_chain_is_float64_arithmetic() -> None:
    rng = np.random.default_rng(4)
    path = DATAPATHS["ieee_f64"]
    a, w = (Operand(rng.standard_normal((3, 50)).astype(np.float32).view(np.uint32), F32) for _ in range(2))
    total = np.zeros((3, 3))
    for k in range(50):
        total = total + dot.values(a)[:, k, None] * dot.values(w)[None, :, k]
    assert np.array_equal(dot_emulated(a, w, path), total.view(np.uint64))


@pytest.mark.parametrize("kind", ["bits", "lognormal", "subnormal", "cancelling"])
@pytest.mark.parametrize("name", [n for n, p in DATAPATHS.items() if p.family in EMULATED | FAMILIES])
def test_twins_give_the_same_bits(name: str, kind: str) -> None:
    path = DATAPATHS[name]
    rng = np.random.default_rng(sum(map(ord, name + kind)))
    k = length(path) - (path.scale_group or 3)  # not a whole number of instructions
    a, w = operand(rng, 9, k, path, kind), operand(rng, 7, k, path, kind)
    if path.family is not Family.INTEGER and path.scale_format is None:
        for op in (a, w):  # special codes in one row and one column
            op.codes[0] = rng.integers(0, 1 << op.format.bits, k, dtype=np.uint64).astype(op.codes.dtype)
    start = None
    if kind == "bits":
        start = rng.standard_normal((9, 7))
        if path.output.bits < 64:
            drawn = rng.integers(0, 1 << path.output.bits, (9, 7), dtype=np.uint64)
            start = value_of(drawn.astype(container(path.output)), path.output)
    want = dot_emulated(a, w, path, start)
    if path.family in EMULATED:
        assert np.array_equal(dot_emulated_compiled(a, w, path, start), want)
    if path.family in FAMILIES:
        assert np.array_equal(dot_emulated_torch(a, w, path, start).numpy(), want)
    assert np.array_equal(dot.emulate(a, w, path, start), want)


def test_a_padded_k_is_zero_products() -> None:
    rng = np.random.default_rng(9)
    path = DATAPATHS["hopper_wgmma_fp8"]
    a, w = operand(rng, 4, 40, path, "lognormal", E4M3FN), operand(rng, 4, 40, path, "lognormal", E4M3FN)
    wide_a, wide_w = (Operand(np.pad(x.codes, ((0, 0), (0, 24))), E4M3FN) for x in (a, w))
    assert np.array_equal(dot_emulated(a, w, path), dot_emulated(wide_a, wide_w, path))


def test_a_chain_can_be_continued() -> None:
    rng = np.random.default_rng(10)
    for path in (DATAPATHS["hopper_wgmma_fp8"], DATAPATHS["ieee_f16"], DATAPATHS["cdna3_f16"]):
        fmt = path.operands[0]
        a, w = operand(rng, 4, 64, path, "normal", fmt), operand(rng, 4, 64, path, "normal", fmt)
        parts = [[Operand(x.codes[:, part], fmt) for x in (a, w)] for part in (slice(0, 32), slice(32, 64))]
        (first_a, first_w), (rest_a, rest_w) = parts
        middle = decode(dot_emulated(first_a, first_w, path), path.output)
        assert np.array_equal(dot_emulated(rest_a, rest_w, path, middle), dot_emulated(a, w, path))


def test_malformed_calls_are_refused() -> None:
    path = DATAPATHS["hopper_f16_f16"]
    a, w = (Operand(np.zeros((2, k), dtype=np.uint16), F16) for k in (16, 32))
    with pytest.raises(ValueError, match="got K = 16 for A and 32 for W"):
        dot_emulated(a, w, path)
    with pytest.raises(ValueError, match="got start of shape"):
        dot_emulated(a, a, path, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="got a start value outside f16"):
        dot_emulated(a, a, path, np.full((2, 2), 1.0 + 2.0**-12))
    with pytest.raises(ValueError, match="got family PAIR_TREE"):
        dot_emulated_compiled(a, a, DATAPATHS["cdna2_f16"])
    with pytest.raises(ValueError, match="got family PAIR_TREE"):
        dot_emulated_torch(a, a, DATAPATHS["cdna2_f16"])
    with pytest.raises(ValueError, match="got family PAIR_TREE"):
        running_bound_compiled(a, a, DATAPATHS["cdna2_f16"])


# Bounds ------------------------------------------------------------------------------------------------------------------

KINDS = ["normal", "positive", "lognormal", "subnormal", "cancelling", "ones"]


def assert_sound(got: Reals, found: Enclosure) -> None:
    """The emulated values lie in the enclosure, with exact subtraction where the radius is small."""
    assert not np.isnan(found.radius).any()
    assert (found.radius >= 0).all()
    triples = zip(*(x.ravel().tolist() for x in (got, found.value, found.radius)), strict=True)
    for value, centre, radius in triples:
        if radius != np.inf:
            assert abs(Fraction(value) - Fraction(centre)) <= Fraction(radius)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATAPATHS)
def test_bounds_hold_on_every_element(name: str, kind: str) -> None:
    path = DATAPATHS[name]
    rng = np.random.default_rng(sum(map(ord, name + kind)))
    k = length(path, 6)
    a, w = operand(rng, 8, k, path, kind), operand(rng, 8, k, path, "anticancelling" if kind == "cancelling" else kind)
    got = decode(dot_emulated(a, w, path), path.output)
    found = running_bound(a, w, path)
    assert_sound(got, found)
    assert_sound(got, agnostic_bound(a, w, path))
    if path.family is not Family.INTEGER:
        for m, n in ((0, 0), (3, 5)):  # the centre is the exact sum
            want = dot_fraction(dot.values(a)[m], dot.values(w)[n]) if not path.operand_bits else None
            if want is not None:
                assert abs(want - Fraction(float(found.value[m, n]))) <= Fraction(float(found.radius[m, n]))
    if kind == "ones":
        assert not found.radius.any()
    if path.family in BOUNDED:
        twin = running_bound_compiled(a, w, path)
        assert np.array_equal(twin.radius, found.radius)
        assert np.array_equal(twin.value, found.value)
        assert np.array_equal(dot.bound(a, w, path).radius, found.radius)


@pytest.mark.parametrize("name", FLOATING)
def test_bounds_hold_from_a_prefix(name: str) -> None:
    path = DATAPATHS[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    a, w = operand(rng, 8, length(path, 4), path, "normal"), operand(rng, 8, length(path, 4), path, "normal")
    start = round_to(rng.standard_normal((8, 8)) * np.exp2(rng.integers(-8, 8, (8, 8))), path.output)
    got = decode(dot_emulated(a, w, path, start), path.output)
    off = np.abs(start) * 2.0**-6
    for prefix in (Enclosure(start, np.zeros((8, 8))), Enclosure(start - off, off), Enclosure(start + off, 2 * off)):
        found = running_bound(a, w, path, prefix)
        assert_sound(got, found)
        if path.family in BOUNDED:
            assert np.array_equal(running_bound_compiled(a, w, path, prefix).radius, found.radius)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", FLOATING)
def test_the_agnostic_bound_holds_in_any_order_and_split(name: str, splits: int) -> None:
    path = DATAPATHS[name]
    rng = np.random.default_rng(sum(map(ord, name)) + splits)
    k = length(path, 6)
    block = path.scale_group or 1
    for kind in ("positive", "normal"):
        a, w = operand(rng, 8, k, path, kind), operand(rng, 8, k, path, kind)
        found = agnostic_bound(a, w, path, splits)
        order = rng.permutation(k // block)
        total: Reals | None = None
        for piece in np.array_split(order, splits):
            index = (piece[:, None] * block + np.arange(block)).ravel()
            part_a, part_w = (
                Operand(x.codes[:, index], x.format, None if x.scales is None else x.scales[:, piece], x.scale_format, x.group)
                for x in (a, w)
            )
            value = decode(dot_emulated(part_a, part_w, path), path.output)
            total = value if total is None else round_to(total + value, path.output)
        assert total is not None
        assert_sound(total, found)


def test_bounds_are_tight_enough_to_see_a_fault() -> None:
    # Bands of error / bound, K = 4096: N(0, 1) on wgmma fp8 and bf16, all positive on wgmma fp8.
    rng = np.random.default_rng(7)
    for name, kind, low, high in (
        ("hopper_wgmma_fp8", "normal", 0.02, 0.2),
        ("hopper_wgmma_fp8", "positive", 0.3, 0.6),
        ("hopper_bf16", "normal", 0.1, 0.5),
    ):
        path = DATAPATHS[name]
        a, w = (operand(rng, 32, 4096, path, kind, path.operands[0]) for _ in range(2))
        found = running_bound_compiled(a, w, path)
        ratio = np.abs(decode(dot_emulated_compiled(a, w, path), path.output) - found.value) / found.radius
        assert low < ratio.max() < high
        # The bound that ignores the order is far looser on data that cancels.
        if kind == "normal":
            assert (agnostic_bound(a, w, path).radius > 20 * found.radius).all()


def test_results_that_may_overflow_are_unbounded() -> None:
    path = DATAPATHS["hopper_f16_f16"]
    a = Operand(np.full((1, 16), 0x5C00, dtype=np.uint16), F16)  # 256: 16 * 2^16 is beyond f16
    assert np.isinf(running_bound(a, a, path).radius).all()
    assert np.isinf(agnostic_bound(a, a, path).radius).all()
    assert np.isinf(running_bound_compiled(a, a, path).radius).all()


def test_special_operands_have_special_bounds() -> None:
    path = DATAPATHS["hopper_wgmma_fp8"]
    a = Operand(np.array([[0x7F, 0x38], [0x38, 0x38]], dtype=np.uint8), E4M3FN)
    w = Operand(np.array([[0x38, 0x38]], dtype=np.uint8), E4M3FN)
    for found in (running_bound(a, w, path), running_bound_compiled(a, w, path), agnostic_bound(a, w, path)):
        assert np.isnan(found.value[0, 0])
        assert found.radius[0, 0] == 0.0
        assert found.value[1, 0] == 2.0


def test_integer_bounds_are_the_result() -> None:
    path = DATAPATHS["imma_s32"]
    a = Operand(np.full((1, 2), 0x80, dtype=np.uint8), INT8)  # (-128)^2 * 2 = 2^15
    prefix = Enclosure(np.array([[2.0**31 - 2.0**15]]), np.zeros((1, 1)))
    assert running_bound(a, a, path, prefix).value.tolist() == [[-(2.0**31)]]
    assert running_bound(a, a, DATAPATHS["imma_s32_satfinite"], prefix).value.tolist() == [[2.0**31 - 1]]
    with pytest.raises(ValueError, match="expected exact integers"):
        running_bound(a, a, path, Enclosure(prefix.value, np.ones((1, 1))))


def test_malformed_bounds_are_refused() -> None:
    path = DATAPATHS["hopper_wgmma_fp8"]
    a = Operand(np.zeros((2, 32), dtype=np.uint8), E4M3FN)
    with pytest.raises(ValueError, match="got splits 0"):
        agnostic_bound(a, a, path, 0)
    with pytest.raises(ValueError, match="got a prefix of shape"):
        running_bound(a, a, path, Enclosure(np.zeros((1, 2)), np.zeros((1, 2))))
    for other in (replace(path, alignment_rounding=Rounding.FLOOR), replace(path, normalised=1)):
        with pytest.raises(ValueError, match="bounds cover only that"):
            running_bound(a, a, other)
    with pytest.raises(ValueError, match="got rounding CEIL"):
        dot_emulated(a, a, replace(path, output_rounding=Rounding.CEIL))
    wide = Operand(np.full((1, 1 << 17), 0x80, dtype=np.uint8), INT8)
    with pytest.raises(ValueError, match="may clamp in some order"):
        agnostic_bound(wide, wide, DATAPATHS["imma_s32_satfinite"])


def test_bounds_take_special_operands_as_the_unit_reads_them() -> None:
    """A NaN by its lowest 13 bits is an infinity to a tf32 unit, and its product the same."""
    words = Operand(np.array([[0x7F800001], [0xFF801FFF], [0x7F802000]], np.uint32), F32)
    one = Operand(np.array([[0x3F800000]], np.uint32), F32)
    for name in ("hopper_tf32", "cdna3_xf32"):
        for found in (running_bound(words, one, DATAPATHS[name]), agnostic_bound(words, one, DATAPATHS[name])):
            assert np.array_equal(found.value[:, 0], [np.inf, -np.inf, np.nan], equal_nan=True)


def test_what_a_unit_drops_on_reading_counts_as_its_error() -> None:
    # tf32 keeps 11 bits: 1 + 2^-11 is read as 1. CDNA2 reads the f16 subnormal 2^-24 as zero.
    x = Operand(np.array([[1.0 + 2.0**-11]], dtype=np.float32).view(np.uint32), F32)
    one = Operand(np.array([[1.0]], dtype=np.float32).view(np.uint32), F32)
    tiny, half_one = Operand(np.array([[1]], dtype=np.uint16), F16), Operand(np.array([[0x3C00]], dtype=np.uint16), F16)
    for name, a, w, value, lost in (
        ("hopper_tf32", x, one, 1.0 + 2.0**-11, 2.0**-11), ("cdna2_f16", tiny, half_one, 2.0**-24, 2.0**-24),
    ):
        for found in (running_bound(a, w, DATAPATHS[name]), agnostic_bound(a, w, DATAPATHS[name])):
            assert found.value[0, 0] == value
            assert lost <= found.radius[0, 0] <= 1.01 * lost
