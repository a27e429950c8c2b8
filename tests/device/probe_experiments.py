"""Experiments E1 to E14: single matrix instructions on operands chosen by hand, as data.

Decides: what is asked of an instruction, what the datapath record says it answers (worked out by hand, not by the emulator), and
which other answer each excluded alternative would give. Answers are bits of D.
Refuses: nothing; whether the answers are right is for the instrument to say.

The unit of a node is 2^(E - F): E the largest exponent of its terms, F the record's fraction bits. For fp8 on wgmma F = 13; with
a product of 2^14 in the node the unit is 2.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["EXPERIMENTS", "Experiment", "Row", "bits_of"]

Answer = int | float
"""A result, an accumulator or an operand: an int is bits, a float is a value of the format."""


def bits_of(answer: Answer, d: str) -> int:
    """Bits of an answer in the accumulator type `d` (f32, f16 or s32; integers are always bits there)."""
    if isinstance(answer, float):
        return int.from_bytes(struct.pack("<f" if d == "f32" else "<e", answer), "little")
    return answer & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Row:
    """One dot product. Elements that are not named are `rest`. NaN and infinities are values like others."""

    note: str
    a: Mapping[int, Answer]
    w: Mapping[int, Answer]
    c: Answer
    predicted: Answer
    excluded: Mapping[str, Answer] = field(default_factory=dict)  # alternative -> its answer
    rest: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Rows asked of one instruction; K = steps instructions."""

    id: str
    question: str
    instruction: str
    rows: tuple[Row, ...]
    steps: int = 1


_FP8 = "wgmma_n64k32_f32_e4m3_e4m3"
_INF, _NAN = float("inf"), float("nan")
_NAN32 = 0x7FFFFFFF


def _pairs(*products: tuple[Answer, Answer]) -> tuple[dict[int, Answer], dict[int, Answer]]:
    return {k: a for k, (a, _) in enumerate(products)}, {k: w for k, (_, w) in enumerate(products)}


def _row(note: str, products: tuple[tuple[Answer, Answer], ...], c: Answer, predicted: Answer, **excluded: Answer) -> Row:
    a, w = _pairs(*products)
    different = {name.replace("_", " "): answer for name, answer in excluded.items() if answer != predicted}
    return Row(note, a, w, c, predicted, different)


def _output_width() -> Iterator[Experiment]:
    """E1: no products. What is left of c shows how many bits the result keeps, and how it is cut."""
    rows = tuple(
        _row(f"c = {c:#010x}", (), c, kept, the_whole_binary32=c, to_nearest=nearest)
        for c, kept, nearest in (
            (0x404013FF, 0x40401000, 0x40401400), (0xC04013FF, 0xC0401000, 0xC0401400), (0x3F8003FF, 0x3F800000, 0x3F800400),
            (0x7F7FFFFF, 0x7F7FFC00, 0x7F800000), (0x00800BFF, 0x00800800, 0x00800C00), (0x000003FF, 0x00000000, 0x00000400),
            (0x00000400, 0x00000400, 0x00000400), (0x80000BFF, 0x80000800, 0x80000C00),
        )
    )
    yield Experiment("E1", "How many bits of c pass an fp8 node without products?", _FP8, rows)
    yield Experiment("E1", "The same with e5m2 operands", _FP8.replace("e4m3", "e5m2"), rows)


_UP, _DOWN = (128.0, 128.0), (-128.0, 128.0)  # +-2^14: the unit of the node is 2


def _alignment() -> Iterator[Experiment]:
    """E2 to E5: cancelling products of 2^14 leave what the alignment kept of the third term."""
    yield Experiment("E2", "What does the alignment keep of c?", _FP8, (
        _row("c = 2", (_UP, _DOWN), 2.0, 2.0, F_is_12=0.0),
        _row("c = 1", (_UP, _DOWN), 1.0, 0.0, F_is_14=1.0),
        _row("c = 3", (_UP, _DOWN), 3.0, 2.0, to_nearest=4.0, F_is_14=3.0),
        _row("c = -3", (_UP, _DOWN), -3.0, -2.0, floor=-4.0, to_nearest=-4.0),
        _row("c = -1", (_UP, _DOWN), -1.0, 0.0, floor=-2.0, a_zero_with_a_sign=0x80000000),
    ))
    yield Experiment("E3", "What does the alignment keep of a product?", _FP8, (
        _row("2 * 1", (_UP, _DOWN, (2.0, 1.0)), 0.0, 2.0, F_is_12=0.0),
        _row("1 * 1", (_UP, _DOWN, (1.0, 1.0)), 0.0, 0.0, F_is_14=1.0),
        _row("3 * 0.5", (_UP, _DOWN, (3.0, 0.5)), 0.0, 0.0, to_nearest=2.0),
        _row("-3 * 0.5", (_UP, _DOWN, (-3.0, 0.5)), 0.0, 0.0, floor=-2.0, to_nearest=-2.0),
        _row("two of 1 * 1, each cut", (_UP, _DOWN, (1.0, 1.0), (1.0, 1.0)), 0.0, 0.0, summed_before_the_cut=2.0),
    ))
    # (1.5 * 2^7)^2 = 2.25 * 2^14: aligned as 2^14 its unit is 2, renormalised to 1.125 * 2^15 the unit would be 4.
    yield Experiment("E4", "Are products renormalised before the alignment?", _FP8, (
        _row("2 * 1 beside 192 * 192", ((192.0, 192.0), (-192.0, 192.0), (2.0, 1.0)), 0.0, 2.0, renormalised=0.0),
        _row("c = 2 beside 192 * 192", ((192.0, 192.0), (-192.0, 192.0)), 2.0, 2.0, renormalised=0.0),
    ))
    # 2^14 + 2^14 + 6 = 32774: a multiple of the unit 2, but the result has the unit 4.
    yield Experiment("E5", "How is the result cut to its 14 bits?", _FP8, (
        _row("32774", (_UP, _UP, (3.0, 2.0)), 0.0, 32772.0, to_nearest=32776.0, fifteen_bits=32774.0),
        _row("-32774", (_DOWN, _DOWN, (-3.0, 2.0)), 0.0, -32772.0, to_nearest=-32776.0, floor=-32776.0),
    ))


def _stagnation() -> Iterator[Experiment]:
    """E6: 32 products of 2^-8 per instruction. From c = 64 on the unit is 2^-7 and each of them is cut to nothing."""
    small = dict.fromkeys(range(32), 0.0625)
    yield Experiment("E6", "Do small products reach a large c?", _FP8, (
        Row("onto 64", small, small, 64.0, 64.0, {"products summed first": 64.125, "binary32": 64.125}),
        Row("onto 64 - 2^-7", small, small, 63.9921875, 64.1171875, {"F is 12": 63.9921875}),
    ))
    for steps, reached in ((31, 63.875), (32, 64.0), (33, 64.0), (64, 64.0)):
        yield Experiment("E6", f"Where does a chain of {steps} from 60 end?", _FP8, (
            Row("60 + steps / 8", {}, {}, 60.0, reached, {} if steps < 33 else {"binary32": 60.0 + steps / 8}, (0.0625, 0.0625)),
        ), steps)


def _masked(k: int, i: int, j: int, big: tuple[float, float], one: tuple[float, float], survivors: int, unit: float,
            **excluded: int) -> Row:
    """+M at i, -M at j, small ones elsewhere: the ones that joined after both masks had met survive."""
    return Row(
        f"masks at {i} and {j} of {k}", {i: big[0], j: -big[0]}, {i: big[1], j: big[1]}, 0.0, survivors * unit,
        {name.replace("_", " "): count * unit for name, count in excluded.items()}, one,
    )


def _order() -> Iterator[Experiment]:
    """E7: which products meet in one node. A node of L takes all of its products at once, so the survivors are those behind the
    node of the later mask."""
    for steps in (1, 2, 4):
        k = 32 * steps
        rows = []
        for i in range(k):
            for j in range(i + 1, k):
                after = k - 32 * (j // 32 + 1)
                other = {} if j % 32 >= 16 else {"nodes_of_16": k - 16 * (j // 16 + 1)}
                rows.append(_masked(k, i, j, (128.0, 128.0), (2.0**-9, 2.0**-9), after, 2.0**-18, **other))
        yield Experiment("E7", f"Which products of {k} share a node?", _FP8, tuple(rows), steps)


def _integers() -> Iterator[Experiment]:
    """E8: exact sums, and what happens at the ends of int32."""
    top, bottom = 0x7FFFFFFF, 0x80000000
    for unit in ("wgmma_n64k32", "mma_k32"):
        for clamp in (False, True):
            name = f"{unit}_s32_s8_s8" + "_satfinite" * clamp
            full = {"a": dict.fromkeys(range(32), 127.0), "b": dict.fromkeys(range(32), -128.0)}
            rows = (
                Row("32 * 127^2 + 5", full["a"], full["a"], 5, 32 * 127 * 127 + 5),
                Row("32 * 128^2", full["b"], full["b"], 0, 32 * 128 * 128),
                Row("-32 * 127 * 128", full["a"], full["b"], 0, -32 * 127 * 128 & 0xFFFFFFFF),
                _row("2^31 - 1 + 1", ((1.0, 1.0),), top, top if clamp else bottom, wraps=bottom, clamps=top),
                _row("-2^31 - 1", ((-1.0, 1.0),), bottom, bottom if clamp else top, wraps=top, clamps=bottom),
                _row("up and down again within one instruction", ((127.0, 127.0), (-127.0, 127.0)), top, top,
                     **({"clamps every product": top - 127 * 127} if clamp else {})),
            )
            yield Experiment("E8", f"Does {name} wrap or clamp, and on which sums?", name, rows)
            excluded = {"clamps the last sum alone": top} if clamp else {"clamps": top - 1}
            between = Row("up by 1, in the next instruction down by 1", {0: 1.0, 32: -1.0}, {0: 1.0, 32: 1.0}, top,
                          top - 1 if clamp else top, excluded)
            yield Experiment("E8", f"Does {name} clamp in between?", name, (between,), 2)
        yield Experiment("E8", "Are unsigned operands unsigned, side by side?", f"{unit}_s32_s8_u8", (
            _row("-1 * 255", ((-1.0, 255.0),), 0, -255 & 0xFFFFFFFF, both_signed=1),))


def _specials() -> Iterator[Experiment]:
    """E9: NaN, infinities, zeros and subnormals. That zeros lose their sign is an open prediction."""
    minus = -0.0
    zero: dict[str, Answer] = {"a zero with a sign": 0x80000000}
    for unit in ("wgmma_n64k32", "mma_k32"):
        wide = f"{unit}_f32_e5m2_e5m2"
        yield Experiment("E9", "NaN, infinities and zeros", wide, (
            _row("NaN * 1", ((_NAN, 1.0),), 0.0, _NAN32, quiet_NaN=0x7FC00000),
            _row("Inf * 0", ((_INF, 0.0),), 0.0, _NAN32, quiet_NaN=0x7FC00000, zero=0.0),
            _row("Inf - Inf", ((_INF, 1.0), (-_INF, 1.0)), 0.0, _NAN32, quiet_NaN=0x7FC00000),
            _row("Inf * 1", ((_INF, 1.0),), 0.0, 0x7F800000, largest_finite=0x7F7FFFFF),
            _row("Inf * -1", ((_INF, -1.0),), 0.0, 0xFF800000),
            _row("c = Inf, product -Inf", ((-_INF, 1.0),), 0x7F800000, _NAN32, quiet_NaN=0x7FC00000),
            _row("c = NaN with a payload", (), 0x7FC00123, _NAN32, payload=0x7FC00123),
            _row("c = -NaN", (), 0xFFC00000, _NAN32, sign_kept=0xFFFFFFFF),
            _row("c = -Inf", ((1.0, 1.0),), 0xFF800000, 0xFF800000),
            Row("every term -0", {}, {}, 0x80000000, 0.0, zero, (minus, 1.0)),
            _row("c = -0, products +0", (), 0x80000000, 0.0, a_zero_with_a_sign=0x80000000),
            _row("1 - 1", ((1.0, 1.0), (-1.0, 1.0)), 0.0, 0.0, a_zero_with_a_sign=0x80000000),
            _row("smallest subnormals, 2^-32", ((2.0**-16, 2.0**-16),), 0.0, 2.0**-32, flushed=0.0),
        ))
        yield Experiment("E9", "NaN and subnormals of e4m3", f"{unit}_f32_e4m3_e4m3", (
            _row("NaN * 0", ((_NAN, 0.0),), 0.0, _NAN32, quiet_NaN=0x7FC00000, as_480=0.0),
            _row("smallest subnormals, 2^-18", ((2.0**-9, 2.0**-9),), 0.0, 2.0**-18, flushed=0.0),
            Row("every term -0", {}, {}, 0x80000000, 0.0, zero, (minus, 1.0)),
        ))
        yield Experiment("E9", "NaN and overflow of an f16 accumulator", f"{unit}_f16_e5m2_e5m2", (
            _row("NaN * 1", ((_NAN, 1.0),), 0.0, 0x7FFF, quiet_NaN=0x7E00),
            _row("65504 + 16: a tie below infinity", ((4.0, 4.0),), 65504.0, 0x7C00, toward_zero=65504.0),
            _row("65504 + 8", ((4.0, 2.0),), 65504.0, 65504.0),
        ))
    for name in ("wgmma_n64k16_f32_bf16_bf16", "mma_k16_f32_bf16_bf16", "wgmma_n64k16_f32_f16_f16", "mma_k16_f32_f16_f16"):
        yield Experiment("E9", f"Zeros and NaN of {name}", name, (
            _row("NaN * 1", ((_NAN, 1.0),), 0.0, _NAN32, quiet_NaN=0x7FC00000),
            Row("every term -0", {}, {}, 0x80000000, 0.0, zero, (minus, 1.0)),
            _row("c = -0, products +0", (), 0x80000000, 0.0, a_zero_with_a_sign=0x80000000),
            _row("c subnormal", (), 0x00000001, 0x00000001, flushed=0x00000000),
            _row("c a negative subnormal", (), 0x80000003, 0x80000003, flushed=0x80000000),
        ))


def _cut_operands() -> Iterator[Experiment]:
    """E9: tf32 operands are binary32 words whose lowest 13 bits are not read, not even to tell a NaN from an infinity."""
    for name in ("wgmma_n64k8_f32_tf32_tf32", "mma_k8_f32_tf32_tf32", "mma_k4_f32_tf32_tf32"):
        yield Experiment("E9", f"What do the lowest 13 bits of an operand do in {name}?", name, (
            _row("1 + 2^-10 - 2^-23", ((0x3F801FFF, 1.0),), 0.0, 1.0, to_nearest=1.0 + 2.0**-10),
            _row("NaN by its lowest bit", ((0x7F800001, 1.0),), 0.0, 0x7F800000, a_NaN=_NAN32),
            _row("-NaN by 13 bits", ((0xFF801FFF, 1.0),), 0.0, 0xFF800000, a_NaN=_NAN32),
            _row("NaN by the 14th bit", ((0x7F802000, 1.0),), 0.0, _NAN32, an_infinity=0x7F800000),
        ))


def _emulated() -> Iterator[Experiment]:
    """E10: mma.sync on fp8 is made of f16 instructions: c joins last, by an addition of its own, and k comes in runs of two."""
    name = "mma_k32_f32_e4m3_e4m3"
    yield Experiment("E10", "Is c added by an IEEE addition?", name, (
        _row("c alone", (), 0x404013FF, 0x404013FF, fourteen_bits=0x40401000),
        _row("c beside 2^14 - 2^14", (_UP, _DOWN), 0x404013FF, 0x404013FF, aligned_with_the_products=0x40400000),
        # 2^14 has the unit 2^-9 as a binary32: 3 * 2^-10 is one and a half of it.
        _row("2^14 + c to nearest", (_UP,), 3 * 2.0**-10, 16384.0 + 2.0**-8, toward_zero=16384.0 + 2.0**-9),
    ))
    rows = []
    for i in range(32):
        for j in range(i + 1, 32):
            both_first = i % 4 < 2 and j % 4 < 2
            other = {} if both_first == (j < 16) else {"halves_of_16_in_order": 16 if j < 16 else 0}
            rows.append(_masked(32, i, j, (128.0, 128.0), (2.0**-9, 2.0**-9), 16 if both_first else 0, 2.0**-18, **other))
    yield Experiment("E10", "Which products of 32 share a node?", name, tuple(rows))


def _wide() -> Iterator[Experiment]:
    """E11: bf16, f16 and tf32 keep 25 fraction bits; with 2^14 in the node the unit is 2^-11, that of the result 2^-9."""
    kinds = (("bf16", 16, ("wgmma_n64k16", "mma_k16")), ("f16", 16, ("wgmma_n64k16", "mma_k16")),
             ("tf32", 8, ("wgmma_n64k8", "mma_k8")), ("tf32", 4, ("mma_k4",)))
    for kind, products, units in kinds:
        for unit in units:
            name = f"{unit}_f32_{kind}_{kind}"
            yield Experiment("E11", f"Alignment and result of {name}", name, (
                _row("c = 2^-11", (_UP, _DOWN), 2.0**-11, 2.0**-11, F_is_24=0.0),
                _row("c = 2^-12", (_UP, _DOWN), 2.0**-12, 0.0, F_is_26=2.0**-12),
                _row("c = 3 * 2^-12", (_UP, _DOWN), 3 * 2.0**-12, 2.0**-11, to_nearest=2.0**-10),
                _row("c = -3 * 2^-12", (_UP, _DOWN), -3 * 2.0**-12, -(2.0**-11), floor=-(2.0**-10)),
                _row("product 2^-11", (_UP, _DOWN, (2.0**-6, 2.0**-5)), 0.0, 2.0**-11, F_is_24=0.0),
                _row("c = 2^-11 beside 192 * 192", ((192.0, 192.0), (-192.0, 192.0)), 2.0**-11, 2.0**-11, renormalised=0.0),
                _row("2^14 + 3 * 2^-10", (_UP, (3.0, 2.0**-10)), 0.0, 16384.0 + 2.0**-9, to_nearest=16384.0 + 2.0**-8),
            ))
            rows = []
            k = 4 * products
            big, one = ((2.0**14, 2.0**14), (2.0**-9, 2.0**-9))  # 2^28 has the unit 2^3
            for i in range(k):
                for j in range(i + 1, k):
                    rows.append(_masked(k, i, j, big, one, k - products * (j // products + 1), 2.0**-18,
                                        **({} if j % products >= products // 2 else
                                           {"nodes_of_half": k - products // 2 * (j // (products // 2) + 1)})))
            yield Experiment("E11", f"Which products of {k} share a node of {name}?", name, tuple(rows), 4)


def _halves(x: float) -> tuple[float, float]:
    """Two powers of two, of nearly the same exponent, whose product is the power of two x."""
    exponent = math.frexp(x)[1] - 1
    half = max(exponent // 2, -9) if exponent >= -25 else exponent // 2  # 2^-9 is the least that e4m3 holds
    return 2.0**half, 2.0 ** (exponent - half)


def _minus(x: float) -> tuple[float, float]:
    left, right = _halves(x)
    return -left, right


def _small_terms() -> Iterator[Experiment]:
    """E13: where terms that are zero or subnormal stand when a node looks for its largest exponent. A zero stands at 2^-133 (f32)
    or 2^-21 (f16), which only smaller products can show; a subnormal stands at the least exponent of its format."""
    tiny = 2.0**-149  # the last place of a subnormal binary32: 2^-149 - e is 0 where e is seen, 2^-149 where it is cut
    for name in ("wgmma_n64k16_f32_bf16_bf16", "mma_k16_f32_bf16_bf16", "wgmma_n64k8_f32_tf32_tf32", "mma_k8_f32_tf32_tf32",
                 "mma_k4_f32_tf32_tf32"):
        yield Experiment("E13", f"Where do zeros and a subnormal c stand in {name}?", name, (
            _row("2^-149 - 2^-158", (_halves(tiny), _minus(2.0**-158)), 0.0, 0.0, zeros_stand_above=tiny),
            _row("2^-149 - 2^-159", (_halves(tiny), _minus(2.0**-159)), 0.0, tiny, zeros_stand_below=0.0),
            _row("c = 2^-149, - 2^-151", (_minus(2.0**-151),), 1, 0.0, F_is_24=tiny),
            _row("c = 2^-149, - 2^-152", (_minus(2.0**-152),), 1, tiny, c_stands_where_its_value_does=0.0),
        ))
    half = 2.0**-25  # a tie between 0 and the smallest f16
    for name in ("wgmma_n64k16_f16_f16_f16", "mma_k16_f16_f16_f16"):
        yield Experiment("E13", f"Where do zeros stand in {name}?", name, (
            _row("2^-25 + 2^-46", (_halves(half), _halves(2.0**-46)), 0.0, 2.0**-24, zeros_stand_above=0.0),
            _row("2^-25 + 2^-47", (_halves(half), _halves(2.0**-47)), 0.0, 0.0, zeros_stand_below=2.0**-24),
        ))
    # The smallest product of e5m2 is 2^-32: with F = 13 it is kept wherever zeros stand below 2^-18.
    yield Experiment("E13", "Do zeros stand below 2^-18 in wgmma from fp8 to f16?", "wgmma_n64k32_f16_e5m2_e5m2", (
        _row("2^-25 + 2^-32", (_halves(half), _halves(2.0**-32)), 0.0, 2.0**-24, zeros_stand_above=0.0),
    ))
    # (instruction, smallest subnormal of A, largest power of two of W, least exponent of A, F): the unit follows from the least
    # exponent of the format, not from the value.
    for name, small, large, least, kept in (
        ("wgmma_n64k32_f32_e4m3_e4m3", 2.0**-9, 8, -6, 13), ("wgmma_n64k32_f32_e5m2_e5m2", 2.0**-16, 15, -14, 13),
        ("wgmma_n64k16_f32_f16_f16", 2.0**-24, 15, -14, 25), ("mma_k16_f32_f16_f16", 2.0**-24, 15, -14, 25),
        ("wgmma_n64k16_f32_bf16_bf16", 2.0**-133, 127, -126, 25), ("mma_k16_f32_bf16_bf16", 2.0**-133, 127, -126, 25),
        ("wgmma_n64k8_f32_tf32_tf32", 2.0**-136, 127, -126, 25), ("mma_k4_f32_tf32_tf32", 2.0**-136, 127, -126, 25),
        ("mma_k32_f32_e5m2_e5m2", 2.0**-16, 15, -14, 25),
    ):
        left, unit = small * 2.0**large, 2.0 ** (least + large - kept)
        yield Experiment("E13", f"Where does a subnormal operand stand in {name}?", name, (
            _row("one unit of the format's least exponent", ((small, 2.0**large), _minus(unit)), 0.0, left - unit,
                 stands_higher=left),
            _row("half of it", ((small, 2.0**large), _minus(unit / 2)), 0.0, left, stands_where_its_value_does=left - unit / 2),
        ))
    # mma.sync converts e4m3 to f16 first, where 2^-9 is a normal value: the unit is 2^(-9 + 15 - 25).
    yield Experiment("E13", "Is a subnormal of e4m3 a normal f16 in mma.sync?", "mma_k32_f32_e4m3_e5m2", (
        _row("2^6 - 2^-17", ((2.0**-9, 2.0**15), _minus(2.0**-17)), 0.0, 64.0 - 2.0**-17, stands_higher=64.0),
    ))


def _ties() -> Iterator[Experiment]:
    """E14: an f16 result is rounded to nearest even, so that a tie tells whether anything was left behind it: the tie 1 + 2^-11
    rounds down to 1, and up where more was kept."""
    nothing = (0.0, 0.0)
    one, tie, odd = (1.0, 1.0), _halves(2.0**-11), _halves(2.0**-10)
    # (instruction, F, a subnormal of A, a power of two of W, exponent at which their product stands)
    for name, kept, small, large, stands in (
        ("wgmma_n64k16_f16_f16_f16", 25, 2.0**-24, 15, 1), ("mma_k16_f16_f16_f16", 25, 2.0**-24, 15, 1),
        ("mma_k32_f16_e5m2_e5m2", 25, 2.0**-16, 15, 1), ("mma_k32_f16_e4m3_e5m2", 25, 2.0**-9, 15, 6),
        ("wgmma_n64k32_f16_e5m2_e5m2", 13, 0.0, 0, 0), ("wgmma_n64k32_f16_e4m3_e4m3", 13, 2.0**-9, 8, 2),
    ):
        def row(note: str, terms: tuple[tuple[float, float], ...], predicted: float, **excluded: float) -> Row:
            spread = tuple(pair for i in range(0, len(terms), 2) for pair in (*terms[i : i + 2], nothing, nothing))
            return _row(note, spread if name.startswith("mma_k32") else terms, 0.0, predicted, **excluded)  # noqa: B023

        last, below = _halves(2.0**-kept), _minus(2.0 ** (-kept - 1))
        rows = [
            row("1 + 2^-11 + 2^-F", (one, tie, last), 1.0 + 2.0**-10, one_bit_less=1.0),
            row("2.25 + 2^-10 + 2^-F", ((1.5, 1.5), odd, last), 2.25 + 2.0**-9, renormalised=2.25),
        ]
        if not (kept == 25 and "e4m3" in name):  # the least product of e4m3 and e5m2 is 2^-25
            rows += [
                row("1 + 2^-11 + 2^-(F + 1)", (one, tie, _halves(2.0 ** (-kept - 1))), 1.0, one_bit_more=1.0 + 2.0**-10),
                row("1 + 2^-10 + 2^-11 - 2^-(F + 1)", (one, odd, tie, below), 1.0 + 2.0**-9, floor=1.0 + 2.0**-10),
            ]
        left, unit = small * 2.0**large, 2.0 ** (stands - kept)
        if kept == 25:
            ends = left, left * (1.0 + 2.0**-10)
            rows += [
                row("a subnormal, a tie, one unit", ((small, 2.0**large), _halves(left / 2048), _halves(unit)), ends[1],
                    stands_higher=ends[0]),
                row("a subnormal, a tie, half a unit", ((small, 2.0**large), _halves(left / 2048), _halves(unit / 2)), ends[0],
                    stands_lower=ends[1]),
            ]
        elif small:
            rows += [
                row("a subnormal and one unit", ((small, 2.0**large), _minus(unit)), left - unit, stands_higher=left),
                row("a subnormal and half a unit", ((small, 2.0**large), _minus(unit / 2)), left, stands_lower=left - unit / 2),
            ]
        yield Experiment("E14", f"What do ties show of {name}?", name, tuple(rows))


_GROUPS: tuple[Callable[[], Iterator[Experiment]], ...] = (
    _output_width, _alignment, _stagnation, _order, _integers, _specials, _cut_operands,
    _emulated, _wide, _small_terms, _ties,
)
EXPERIMENTS: tuple[Experiment, ...] = tuple(experiment for group in _GROUPS for experiment in group())
"""E1 to E11, E13 and E14. E12 asks for invariances, which have no answer by hand: see run_probes.py."""
