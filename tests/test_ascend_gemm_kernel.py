"""The AscendC int4 GEMM, compiled by g++ with the emulation headers, against arithmetic done here, and its planted defects.

Expected values come from Python integers and single f32 operations in the order that the kernel's clause names; one test repeats
them in Fractions with a rounding of its own. Low-rank operands are integers, so their f32 sum is exact in every order; where they
are drawn from the reals, the result must lie between the two results that the rounding bound of an f32 sum allows.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.kernels.ascend_room.build import DEVICE, EMULATION, emulated_library, source_digest
from lowbit.kernels.ascend_room.entries import ENTRIES
from lowbit.kernels.ascend_room.rules import RULES

Array = npt.NDArray[Any]

GROUP, TILE, SLOTS = 64, 128, 4
SLOT_BYTES = TILE * TILE * 4
READ, WRITE, INITIALISED = 1, 2, 4


class Buffer(ctypes.Structure):
    """One argument of a launch: where it lies, its bytes, and what may be done with it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Operands:
    """a [M, K] and w [N, K] codes -8..7; a_scale [K/64, M], w_scale [K/64, N], lora_act [M, R], lora_up [N, R], channel_scale [N]
    and bias [N] f16; R may be 0, the last two None."""

    a: Array
    w: Array
    a_scale: Array
    w_scale: Array
    lora_act: Array
    lora_up: Array
    channel_scale: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a launch returned: its code, its sentence, and the 16-bit codes of D [M, N]."""

    code: int
    message: str
    d: Array

    @property
    def rule(self) -> str:
        return self.message.partition(":")[0]


def packed(codes: Array) -> Array:
    """Two codes per byte along the last axis, the even one in bits 3..0."""
    nibbles = (codes & 15).astype(np.uint8)
    return np.ascontiguousarray(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)


def drawn(m: int, n: int, k: int, r: int, *, scaled: bool = False, biased: bool = False, seed: int = 0) -> Operands:
    """Codes over their whole range, scales of both signs, low-rank integers small enough for an exact sum in any order."""
    random = np.random.default_rng((seed, m, n, k, r))
    return Operands(
        random.integers(-8, 8, (m, k)).astype(np.int8),
        random.integers(-8, 8, (n, k)).astype(np.int8),
        random.normal(0, 0.02, (k // GROUP, m)).astype(np.float16),
        random.normal(0, 0.02, (k // GROUP, n)).astype(np.float16),
        random.integers(-8, 9, (m, r)).astype(np.float16),
        random.integers(-8, 9, (n, r)).astype(np.float16),
        random.normal(0, 1, (n,)).astype(np.float16) if scaled else None,
        random.normal(0, 4, (n,)).astype(np.float16) if biased else None,
    )


def totals(operands: Operands) -> Array:
    """[M, N] f32: the groups' exact sums, times a_scale, times w_scale, added up in ascending order, every step rounded."""
    m, n, groups = len(operands.a), len(operands.w), len(operands.a_scale)
    total = np.zeros((m, n), np.float32)
    for g in range(groups):
        part = slice(g * GROUP, (g + 1) * GROUP)
        sums = operands.a[:, part].astype(np.int64) @ operands.w[:, part].astype(np.int64).T
        product = sums.astype(np.float32) * operands.a_scale[g].astype(np.float32)[:, None]
        total = total + product * operands.w_scale[g].astype(np.float32)[None, :]
    return total


def finished(total: Array, operands: Operands, lora: Array) -> Array:
    """[M, N] f16 of an f32 total: + lora, * channel_scale, + bias in f32, one cast."""
    value = total + lora if operands.lora_act.shape[1] else total
    if operands.channel_scale is not None:
        value = value * operands.channel_scale.astype(np.float32)
    if operands.bias is not None:
        value = value + operands.bias.astype(np.float32)
    assert value.dtype == np.float32
    return value.astype(np.float16)


def expected(operands: Operands) -> Array:
    """Codes of D [M, N] for operands whose low-rank part is integers."""
    with np.errstate(over="ignore", invalid="ignore"):
        lora = (operands.lora_act.astype(np.int64) @ operands.lora_up.astype(np.int64).T).astype(np.float32)
        return finished(totals(operands), operands, lora).view(np.uint16)


def arguments(operands: Operands, blocks: int) -> tuple[list[tuple[Array, int]], Array]:
    """(bytes, flags) per argument of the kernel, in its order, and D among them, poisoned."""
    m, n, k, r = len(operands.a), len(operands.w), operands.a.shape[1], operands.lora_act.shape[1]
    nothing = np.zeros(0, np.float16)
    present = READ | INITIALISED
    d = np.full((m, n), 0x7D1F, np.uint16)  # a NaN that no conversion gives
    words = (m, n, k, r, int(operands.channel_scale is not None), int(operands.bias is not None))
    workspace = np.full(blocks * SLOTS * SLOT_BYTES, 0xA5, np.uint8)
    return [
        (packed(operands.a), present),
        (packed(operands.w), present),
        (np.ascontiguousarray(operands.a_scale), present),
        (np.ascontiguousarray(operands.w_scale), present),
        (np.ascontiguousarray(operands.lora_act), present),
        (np.ascontiguousarray(operands.lora_up), present),
        (nothing if operands.channel_scale is None else operands.channel_scale, present),
        (nothing if operands.bias is None else operands.bias, present),
        (d, WRITE),
        (workspace, READ | WRITE),
        (np.frombuffer(struct.pack("<6I", *words), np.uint32), present),
    ], d


def launch(operands: Operands, *, blocks: int = 1, mutant: str = "") -> Outcome:
    """Run the kernel, or one of its mutants, on the emulated device."""
    library = ctypes.CDLL(str(emulated_library(ENTRIES["gemm_int4"], mutant)))
    given, d = arguments(operands, blocks)
    addresses = [array.ctypes.data if array.size else None for array, _ in given]
    records = [Buffer(at, array.nbytes, flags) for at, (array, flags) in zip(addresses, given, strict=True)]
    buffers = (Buffer * len(given))(*records)
    message = ctypes.create_string_buffer(1024)
    code = library.lowbit_emulate(
        ctypes.c_uint32(blocks), buffers, ctypes.c_size_t(len(given)), message, ctypes.c_size_t(len(message))
    )
    return Outcome(code, message.value.decode(), d)


def check(operands: Operands, *, blocks: int = 1) -> None:
    outcome = launch(operands, blocks=blocks)
    assert outcome.code == 0, outcome.message
    wanted = expected(operands)
    wrong = [tuple(place) for place in np.argwhere(outcome.d != wanted)]
    shown = [(place, hex(outcome.d[place]), hex(wanted[place])) for place in wrong[:4]]
    assert not wrong, f"got {len(wrong)} wrong elements of {wanted.size}; first (place, got, expected): {shown}"


def covering() -> Iterator[Any]:
    """Every pair of an M and an N, with the Ks, ranks, tails and block counts taken in turn."""
    sizes = itertools.product((1, 5, 16, 17, 63, 64, 65, 130), (8, 24, 128, 136, 264))
    for place, ((m, n), k, r) in enumerate(
        zip(sizes, itertools.cycle((64, 128, 192, 960, 576)), itertools.cycle((0, 16, 32, 48, 128, 256, 144)), strict=False)
    ):
        options = {"scaled": place % 2 == 1, "biased": place % 3 == 1}
        yield pytest.param(m, n, k, r, options, 1 + place % 4, id=f"m{m}n{n}k{k}r{r}b{1 + place % 4}")


@pytest.mark.parametrize(("m", "n", "k", "r", "options", "blocks"), list(covering()))
def test_bits(m: int, n: int, k: int, r: int, options: Mapping[str, bool], blocks: int) -> None:
    check(drawn(m, n, k, r, **options), blocks=blocks)


EVERY = [(64, 128, 128, 32), (17, 24, 15360, 32), (1, 8, 15360, 256), (128, 128, 512, 128)]


@pytest.mark.parametrize(("m", "n", "k", "r"), EVERY)
def test_bits_with_every_operand(m: int, n: int, k: int, r: int) -> None:
    """The shape on which the first kernel of this operation gave NaN, K of 240 groups, and a tile without padding."""
    check(drawn(m, n, k, r, scaled=True, biased=True))


@pytest.mark.parametrize("blocks", [1, 2, 5, 24])
def test_blocks_do_not_change_bits(blocks: int) -> None:
    """Six tiles on fewer blocks, as many, and more blocks than tiles."""
    check(drawn(130, 264, 320, 48, scaled=True, biased=True), blocks=blocks)


@pytest.mark.parametrize("r", [0, 16])
@pytest.mark.parametrize("groups", range(1, 11))
def test_ring_drains_after_every_number_of_groups(groups: int, r: int) -> None:
    """Fewer slots than the ring has, as many, and several times around; the emulation refuses a flag left over or short."""
    check(drawn(3, 8, groups * GROUP, r))


def test_no_rows() -> None:
    outcome = launch(drawn(0, 8, 64, 16))
    assert (outcome.code, outcome.message) == (0, "")


def extremes() -> Iterator[Any]:
    plain = drawn(34, 72, 640, 32, scaled=True, biased=True)
    assert plain.channel_scale is not None
    half, minus = np.float16, np.int8(-8)
    ones = {"a_scale": np.ones_like(plain.a_scale), "w_scale": np.ones_like(plain.w_scale)}
    zero_group = plain.a.copy()
    zero_group[:, 64:128] = 0
    spread = np.tile(np.array([6e-8, -6e-8, 65504, -65504, 6.1e-5, 0], half), -(-plain.a_scale.size // 6))[: plain.a_scale.size]
    some_infinite = plain.w_scale.copy()
    some_infinite[3, ::5] = np.inf
    yield "least codes", replace(plain, a=np.full_like(plain.a, minus), w=np.full_like(plain.w, minus))
    yield "least codes, scales of one", replace(plain, a=np.full_like(plain.a, minus), w=np.full_like(plain.w, minus), **ones)
    yield "zero codes", replace(plain, a=np.zeros_like(plain.a))
    yield "a zero group", replace(plain, a=zero_group)
    yield "zero scales", replace(plain, a_scale=np.zeros_like(plain.a_scale))
    yield "negative zero scales", replace(plain, w_scale=np.full_like(plain.w_scale, -0.0), lora_act=plain.lora_act * half(0))
    yield "negative channel scale of a zero total", replace(
        plain, a=np.zeros_like(plain.a), lora_act=plain.lora_act * half(0), channel_scale=-np.abs(plain.channel_scale), bias=None
    )
    yield "subnormal, largest and zero scales", replace(plain, a_scale=spread.reshape(plain.a_scale.shape))
    yield "infinite scales", replace(plain, w_scale=some_infinite)
    yield "a subnormal result", replace(
        plain, a_scale=np.full_like(plain.a_scale, 6e-8), lora_act=plain.lora_act * half(0), bias=None
    )


@pytest.mark.parametrize("operands", [pytest.param(value, id=name) for name, value in extremes()])
def test_extremes(operands: Operands) -> None:
    outcome = launch(operands, blocks=2)
    assert outcome.code == 0, outcome.message
    wanted = expected(operands)
    nan, told = np.isnan(wanted.view(np.float16)), np.isnan(outcome.d.view(np.float16))
    assert np.array_equal(nan, told)
    assert np.array_equal(outcome.d[~nan], wanted[~nan])
    assert not np.any(outcome.d == 0x7D1F)


def nearest(value: Fraction, precision: int, least: int) -> Fraction:
    """`value` to the nearest number of `precision` bits whose smallest normal is 2^least, ties to even."""
    if value == 0:
        return value
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    return round(value / unit) * unit


def exact(value: object) -> Fraction:
    """The number that an f16 or f32 element is."""
    assert isinstance(value, np.floating)
    return Fraction(float(value))


def test_bits_against_fractions() -> None:
    """The same D from rational numbers: what numpy rounds above, `nearest` rounds here."""
    operands = drawn(5, 8, 320, 16, scaled=True, biased=True, seed=1)
    outcome = launch(operands)
    assert outcome.code == 0, outcome.message
    for i, j in itertools.product(range(5), range(8)):
        total = Fraction(0)
        for g in range(5):
            dot = sum(int(operands.a[i, k]) * int(operands.w[j, k]) for k in range(g * GROUP, g * GROUP + GROUP))
            product = nearest(dot * exact(operands.a_scale[g, i]), 24, -126)
            total = nearest(total + nearest(product * exact(operands.w_scale[g, j]), 24, -126), 24, -126)
        pairs = zip(operands.lora_act[i], operands.lora_up[j], strict=True)
        lora = sum((exact(x) * exact(y) for x, y in pairs), Fraction(0))
        assert operands.channel_scale is not None
        assert operands.bias is not None
        total = nearest(nearest(total + lora, 24, -126) * exact(operands.channel_scale[j]), 24, -126)
        total = nearest(nearest(total + exact(operands.bias[j]), 24, -126), 11, -14)
        assert total == exact(outcome.d.view(np.float16)[i, j])


@pytest.mark.parametrize(("r", "seed"), [(16, 0), (144, 1), (256, 2)])
def test_real_low_rank_operands_stay_within_the_bound_of_an_f32_sum(r: int, seed: int) -> None:
    """A product of two f16 is exact in f32 (22 bits). An f32 sum of R of them differs from the exact one, in any order and with
    any of the two roundings a cube may do (nearest or toward zero: at most 2^-23 relative each), by at most
    h = R 2^-23 / (1 - R 2^-23) times the sum of magnitudes. What follows is monotone in it, so D lies between the ends."""
    operands = drawn(17, 24, 128, r, scaled=True, biased=True, seed=seed)
    random = np.random.default_rng(seed)
    operands = replace(
        operands,
        lora_act=random.normal(0, 1, operands.lora_act.shape).astype(np.float16),
        lora_up=random.normal(0, 1, operands.lora_up.shape).astype(np.float16),
    )
    outcome = launch(operands)
    assert outcome.code == 0, outcome.message
    share = r * 2.0**-23 / (1 - r * 2.0**-23)
    ends, short = np.empty((2, 17, 24), np.float32), np.empty((17, 24), np.float32)
    for i, j in itertools.product(range(17), range(24)):
        products = [float(x) * float(y) for x, y in zip(operands.lora_act[i], operands.lora_up[j], strict=True)]
        middle, width = math.fsum(products), share * math.fsum(map(abs, products))
        ends[0, i, j] = np.nextafter(np.float32(middle - width), np.float32(-np.inf))
        ends[1, i, j] = np.nextafter(np.float32(middle + width), np.float32(np.inf))
        short[i, j] = np.float32(math.fsum(products[:-1]))
    both = np.stack([finished(totals(operands), operands, end) for end in ends])
    least, most = both.min(0), both.max(0)
    got, short_by_one = outcome.d.view(np.float16), finished(totals(operands), operands, short)
    assert np.all((least <= got) & (got <= most))
    assert np.mean((short_by_one < least) | (most < short_by_one)) > 0.9  # narrow enough to miss one product of R


WIDE = drawn(64, 72, 576, 32, scaled=True, biased=True)
"""Rows for both vector cores, a second set of 64 lanes that is not full, a second panel of groups, two fractals of rank."""

CAUGHT: Mapping[str, tuple[Operands, str]] = {
    "scale_k_major": (WIDE, ""),
    "stale_mask": (WIDE, "MASK-STALE"),
    "missing_flag": (WIDE, "SYNC-WRITE"),
    "uninitialised_workspace": (WIDE, "UNINIT-GM"),
    "slot_not_awaited": (WIDE, "SYNC-CROSS-CORE"),
    "total_not_zeroed": (WIDE, "UNINIT-LOCAL"),
    "lora_collision": (WIDE, "SYNC-WRITE"),
    "lora_l0c_stale": (WIDE, ""),
    "lora_fractal_order": (WIDE, ""),
    "head_only": (WIDE, "UNINIT-LOCAL"),
    "drain_count": (drawn(3, 8, 128, 16), "SYNC-DEADLOCK"),
}
"""Per mutant of device/gemm_int4_mutants.h: the problem, and the rule that stops it; "" where it runs to wrong bits."""


@pytest.mark.parametrize("mutant", CAUGHT)
def test_mutant_is_caught(mutant: str) -> None:
    operands, rule = CAUGHT[mutant]
    outcome = launch(operands, mutant=mutant)
    assert (outcome.code, outcome.rule) == (int(bool(rule)), rule)
    if not rule:
        assert np.any(outcome.d != expected(operands))


def test_low_rank_products_on_top_of_integer_sums_are_nan() -> None:
    """A negative int32 near zero is a NaN when read as f32: the symptom with which the first kernel of this operation stopped."""
    assert np.isnan(launch(WIDE, mutant="lora_l0c_stale").d.view(np.float16)).mean() > 0.25


def test_rules_that_catch_mutants_are_rules_of_the_emulation() -> None:
    assert {rule for _, rule in CAUGHT.values() if rule} <= {rule.id for rule in RULES}


def test_every_mutant_flag_has_its_case() -> None:
    text = (DEVICE / "gemm_int4_mutants.h").read_text(encoding="utf-8")
    flags = {word.removeprefix("LOWBIT_MUTANT_").lower() for word in text.split() if word.startswith("LOWBIT_MUTANT_")}
    assert flags == set(CAUGHT)


def test_kernel_source_knows_nothing_of_the_emulation() -> None:
    for name in ("gemm_int4.cpp", "tiling.h"):
        text = (DEVICE / name).read_text(encoding="utf-8")
        directives = [line for line in text.splitlines() if line.startswith("#") and not line.startswith(("#include", "#endif"))]
        assert "lowbit::" not in text
        assert "std::" not in text
        assert all("LOWBIT_ASCEND" in line for line in directives)


# A program instead of a library: a sanitizer's runtime must be there before anything else. Arguments: blocks, and one file that
# holds, per argument, u64 bytes, u64 flags and the contents; D is written to standard output.
_PROGRAM = """
#include "launch.h"
#include "gemm_int4.cpp"
#include <cstdio>
#include <cstdlib>
#include <vector>
int main(int, char** words)
{
    std::FILE* file = std::fopen(words[2], "rb");
    std::vector<std::vector<uint8_t>> contents;
    std::vector<lowbit::Buffer> buffers;
    for (uint64_t head[2]; std::fread(head, 8, 2, file) == 2;) {
        contents.emplace_back(head[0]);
        if (head[0] != 0 && std::fread(contents.back().data(), 1, head[0], file) != head[0]) return 3;
        buffers.push_back({nullptr, head[0], static_cast<uint32_t>(head[1]), 0});
    }
    std::fclose(file);
    for (size_t index = 0; index < buffers.size(); ++index) buffers[index].data = contents[index].data();
    char message[1024] = {};
    const uint32_t blocks = static_cast<uint32_t>(std::atoi(words[1]));
    const int code = lowbit::Launch(&gemm_int4, lowbit::Mode::MIX_AIC_1_2, blocks, buffers.data(), buffers.size(), message, 1024);
    std::fputs(message, stderr);
    std::fwrite(contents[8].data(), 1, contents[8].size(), stdout);
    return code;
}
"""


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_are_silent(sanitizers: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two blocks, three tiles, both kinds of product; the program is compiled once per state of the sources."""
    folder = request.config.cache.mkdir("lowbit-ascend-sanitized")
    program = folder / f"{sanitizers.replace(',', '-')}-{source_digest(DEVICE, EMULATION)}"
    if not program.exists():
        source, made = tmp_path / "program.cpp", tmp_path / "program"
        source.write_text(_PROGRAM, encoding="utf-8")
        subprocess.run(
            ["g++", "-std=c++17", "-O0", "-g", "-ffp-contract=off", "-pthread", f"-fsanitize={sanitizers}",
             "-fno-sanitize-recover=all", f"-I{DEVICE}", f"-I{EMULATION}", source, *EMULATION.glob("*.cpp"), "-o", made],
            check=True,
        )  # fmt: skip
        made.replace(program)
    operands = drawn(17, 264, 128, 48, scaled=True, biased=True)
    given, _ = arguments(operands, 2)
    packet = tmp_path / "arguments"
    packet.write_bytes(b"".join(struct.pack("<2Q", array.nbytes, flags) + array.tobytes() for array, flags in given))
    answer = subprocess.run([program, "2", packet], capture_output=True, timeout=120, check=False)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert answer.stdout == expected(operands).tobytes()
