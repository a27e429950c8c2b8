"""Writes the golden vectors: small inputs and the bits they must give, by a third implementation of the contracts.

Decides: every file of golden/*.json. Refuses: to share a line with the judge. Everything here is Python integers and
Fractions, one element at a time; the codecs search tables, the layouts are evaluated as the sources write them, and no other
module of the product is imported. Run by path, needs nothing but Python: python golden/generate.py --out DIR

A value is a Fraction, or one of the floats nan, inf, -inf and -0.0, which no Fraction holds.
"""

from __future__ import annotations

import argparse
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, partial, reduce
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

VERSION = "golden/generate.py 1"
Value = Fraction | float
NAN, INF, NEG_ZERO = math.nan, math.inf, -0.0
ZERO, ONE = Fraction(0), Fraction(1)


@cache
def two(exponent: int) -> Fraction:
    """2^exponent."""
    return Fraction(2) ** exponent


# Extended reals ------------------------------------------------------------------------------------------------------


def is_nan(v: Value) -> bool:
    return type(v) is float and math.isnan(v)


def is_inf(v: Value) -> bool:
    return type(v) is float and math.isinf(v)


def negative(v: Value) -> bool:
    """The sign bit; False for NaN."""
    return v < 0 if isinstance(v, Fraction) else math.copysign(1.0, v) < 0 and not math.isnan(v)


def size(v: Value) -> Value:
    """|v|."""
    if isinstance(v, Fraction):
        return abs(v)
    return abs(v) if v else ZERO


def real(v: Value) -> Fraction:
    """A finite value as a Fraction; -0 is 0."""
    return v if isinstance(v, Fraction) else Fraction(v)


def signed(minus: bool, magnitude: Value) -> Value:
    if minus:
        return NEG_ZERO if magnitude == 0 else -magnitude
    return magnitude


def times(a: Value, b: Value) -> Value:
    """IEEE product before rounding."""
    if type(a) is Fraction and type(b) is Fraction:
        found = a * b
        return found if found or (a < 0) == (b < 0) else NEG_ZERO
    p, q = size(a), size(b)
    if is_nan(p) or is_nan(q) or (is_inf(p) and q == 0) or (is_inf(q) and p == 0):
        return NAN
    return signed(negative(a) != negative(b), INF if is_inf(p) or is_inf(q) else real(p) * real(q))


def over(a: Value, b: Value) -> Value:
    """IEEE quotient before rounding."""
    p, q = size(a), size(b)
    if is_nan(p) or is_nan(q) or (is_inf(p) and is_inf(q)) or (p == 0 and q == 0):
        return NAN
    minus = negative(a) != negative(b)
    if is_inf(q):
        return signed(minus, ZERO)
    return signed(minus, INF if is_inf(p) or q == 0 else real(p) / real(q))


def plus(a: Value, b: Value) -> Value:
    """IEEE sum before rounding; two negative zeros give -0, every other zero is +0."""
    if type(a) is Fraction and type(b) is Fraction:
        return a + b
    if is_nan(a) or is_nan(b) or (is_inf(a) and is_inf(b) and a != b):
        return NAN
    if is_inf(a) or is_inf(b):
        return a if is_inf(a) else b
    return NEG_ZERO if a == b == 0 and negative(a) and negative(b) else real(a) + real(b)


def minus(a: Value, b: Value) -> Value:
    return plus(a, times(b, Fraction(-1)))


def log2(v: Fraction) -> int:
    """floor(log2 |v|), v != 0."""
    v = abs(v)
    guess = v.numerator.bit_length() - v.denominator.bit_length()
    return guess if v >= two(guess) else guess - 1


# Formats -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """One encoding. nan: "ieee" (exponent all ones: inf and NaN), "ones" (all bits but the sign), "minus zero", "none".
    Integers have no exponent bits; e8m0 has no mantissa and no zero."""

    name: str
    bits: int
    exponent: int
    mantissa: int
    bias: int
    signed: bool
    nan: str

    @property

    def digits(self) -> int:
        return -(-self.bits // 4)

    @property

    def low_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias if self.exponent else 0

    @property

    def nan_code(self) -> int:
        if self.nan == "ieee":  # e5m2 alone has all mantissa bits set: PTX cvt
            return 0x7F if self.bits == 8 else ((1 << self.exponent) - 1 << self.mantissa) | 1 << self.mantissa - 1
        return {"ones": (1 << self.exponent + self.mantissa) - 1, "minus zero": 0x80, "none": 0x7}[self.nan]

    @property

    def sign(self) -> int:
        return 1 << self.bits - 1 if self.signed else 0


FORMATS = {f.name: f for f in (
    Format("int4", 4, 0, 3, 0, True, "none"), Format("uint4", 4, 0, 4, 0, False, "none"),
    Format("int8", 8, 0, 7, 0, True, "none"), Format("uint8", 8, 0, 8, 0, False, "none"),
    Format("int32", 32, 0, 31, 0, True, "none"),
    Format("e2m1", 4, 2, 1, 1, True, "none"), Format("e4m3fn", 8, 4, 3, 7, True, "ones"),
    Format("e4m3fnuz", 8, 4, 3, 8, True, "minus zero"), Format("e5m2", 8, 5, 2, 15, True, "ieee"),
    Format("e5m2fnuz", 8, 5, 2, 16, True, "minus zero"), Format("e8m0", 8, 8, 0, 127, False, "ones"),
    Format("ue4m3", 7, 4, 3, 7, False, "ones"), Format("f16", 16, 5, 10, 15, True, "ieee"),
    Format("bf16", 16, 8, 7, 127, True, "ieee"), Format("f32", 32, 8, 23, 127, True, "ieee"),
)}


@cache
def decode(name: str, code: int) -> Value:
    """The value of one code."""
    f = FORMATS[name]
    if not f.exponent:
        return Fraction(code - (f.sign << 1) if code & f.sign else code)
    if name == "e8m0":
        return NAN if code == 0xFF else two(code - 127)
    minus_sign, rest = bool(code & f.sign), code & ~f.sign
    top, low = divmod(rest, 1 << f.mantissa)
    if f.nan == "ieee" and top == (1 << f.exponent) - 1:
        return NAN if low else signed(minus_sign, INF)
    if (f.nan == "ones" and rest == f.nan_code & ~f.sign) or (f.nan == "minus zero" and code == f.sign):
        return NAN
    whole = low + (1 << f.mantissa if top else 0)
    return signed(minus_sign, whole * two(max(top, 1) - f.bias - f.mantissa))


@cache
def ladder(name: str) -> tuple[tuple[Fraction, ...], int]:
    """Finite values of the codes without a sign in ascending order (place = code), one more step above, and the largest code."""
    f = FORMATS[name]
    found: list[Fraction] = []
    for code in range(f.sign or 1 << f.bits):
        value = decode(name, code)
        if isinstance(value, float):
            break
        found.append(value)
    last = found[-1] - found[-2] if name != "e8m0" else found[-1]
    return (*found, found[-1] + last), len(found) - 1


MODES = ("rne", "rz", "rna", "floor", "ceil", "rntz")


def _step(low: Fraction, high: Fraction, value: Fraction, odd: bool, mode: str, minus_sign: bool) -> bool:
    """Whether a magnitude strictly between two neighbours goes to the upper one; `odd`: the lower code is odd."""
    if mode in ("rz", "floor", "ceil"):
        return mode == ("floor" if minus_sign else "ceil")
    twice = 2 * value - low - high
    return twice > 0 or (twice == 0 and (mode == "rna" or (mode == "rne" and odd)))


def encode(name: str, value: Value, mode: str = "rne", saturate: bool = False) -> int:
    """The code of a value. Beyond the largest finite value: the largest with `saturate`, else infinity, else NaN, else the
    largest. Integers always clamp."""
    f = FORMATS[name]
    if is_nan(value):
        return f.nan_code if f.exponent else 0
    minus_sign = negative(value)
    if minus_sign and not f.signed:
        if name != "e8m0":
            return 0
        minus_sign = False
    magnitude = size(value)
    if not f.exponent:
        least, most = (-f.sign, f.sign - 1) if f.signed else (0, (1 << f.bits) - 1)
        if is_inf(value):
            return (least if minus_sign else most) & (1 << f.bits) - 1
        below = math.floor(real(value))
        whole = real(magnitude)
        inner = Fraction(math.floor(whole))
        if below != real(value):
            up = _step(inner, inner + 1, whole, int(inner) % 2 == 1, mode, minus_sign)
            below = int(inner + up) * (-1 if minus_sign else 1)
        return min(max(below, least), most) & (1 << f.bits) - 1
    if f.bits <= 8:
        values, largest = ladder(name)
        code = largest + 1
        if not is_inf(magnitude) and magnitude < values[-1]:
            place = bisect_left(values, magnitude)
            code = place
            if values[place] != magnitude:
                if place == 0:  # e8m0, below 2^-127
                    return 0
                odd = (place - 1) % 2 == 1 or name == "e8m0"  # e8m0: ties go up
                code = place - 1 + _step(values[place - 1], values[place], real(magnitude), odd, mode, minus_sign)
    else:
        code, largest = _wide(f, magnitude, mode, minus_sign), ((1 << f.exponent) - 1 << f.mantissa) - 1
    if code > largest:
        inward = not is_inf(value) and mode in ("rz", "ceil" if minus_sign else "floor")
        if inward or saturate or f.nan == "none":
            code = largest
        elif f.nan == "ieee":
            code = largest + 1
        else:
            return f.nan_code
    return code if not minus_sign or (f.nan == "minus zero" and code == 0) else code | f.sign


def _wide(f: Format, magnitude: Value, mode: str, minus_sign: bool) -> int:
    """Code of a magnitude in f16, bf16 or f32; beyond the largest, some code above it."""
    if is_inf(magnitude):
        return 1 << f.bits
    value = real(magnitude)
    if value == 0:
        return 0
    exponent = max(log2(value), f.low_exponent)
    quotient = value / two(exponent - f.mantissa)
    inner = Fraction(quotient.numerator // quotient.denominator)
    steps = int(inner)
    if inner != quotient:
        steps += _step(inner, inner + 1, quotient, steps % 2 == 1, mode, minus_sign)
    return steps + (exponent - f.low_exponent << f.mantissa)


def fit(name: str, value: Value) -> Value:
    """The value of its nearest code, ties to even, overflow to infinity: one IEEE operation."""
    return decode(name, encode(name, value))


def f32(value: Value) -> Value:
    return fit("f32", value)


def code_text(name: str, codes: Iterable[int]) -> str:
    return "".join(f"{code:0{FORMATS[name].digits}x}" for code in codes)


# Tensors and vectors -------------------------------------------------------------------------------------------------


@dataclass
class Tensor:
    """Codes in row-major order; of a packed tensor the storage words."""

    format: str
    shape: tuple[int, ...]
    codes: list[int]
    any_of: dict[int, tuple[int, ...]] = field(default_factory=dict)
    free: tuple[int, ...] = ()
    untouched: tuple[int, ...] = ()
    either_zero: bool = False
    nan_bytes: bool = False  # NaN codes are compared as codes

    def __post_init__(self) -> None:
        assert len(self.codes) == math.prod(self.shape), (self.format, self.shape, len(self.codes))
        assert all(0 <= code < 1 << FORMATS[self.format].bits for code in self.codes)

    def values(self) -> list[Value]:
        return [decode(self.format, code) for code in self.codes]

    def row(self, *index: int) -> list[Value]:
        """Values of the last axis at the leading indices."""
        width = self.shape[-1]
        place = reduce(lambda total, pair: total * pair[0] + pair[1], zip(self.shape, index, strict=False), 0)
        return [decode(self.format, code) for code in self.codes[place * width : (place + 1) * width]]

    def text(self) -> str:
        """Codes in hexadecimal, most significant digit first; 32 equal codes and more as code*count, set off by spaces."""
        parts: list[str] = []
        for code, run in groupby(self.codes):
            count, digits = len(list(run)), code_text(self.format, [code])
            parts.append(f" {digits}*{count} " if count >= 32 else digits * count)
        return "".join(parts).strip().replace("  ", " ")

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"format": self.format, "shape": list(self.shape), "codes": self.text()}
        if self.any_of:
            digits = FORMATS[self.format].digits
            found["any_of"] = [[place, [f"{code:0{digits}x}" for code in codes]] for place, codes in sorted(self.any_of.items())]
        for name in ("free", "untouched"):
            if getattr(self, name):
                found[name] = list(getattr(self, name))
        for name in ("either_zero", "nan_bytes"):
            if getattr(self, name):
                found[name] = True
        return found


def tensor(name: str, shape: Sequence[int], values: Callable[..., Value | int | float] | Iterable[Value | int | float]) -> Tensor:
    """A tensor of exact values: a function of the indices, or a flat list. Refuses values that are no value of the format."""
    flat = [values(*index) for index in product(*map(range, shape))] if callable(values) else list(values)
    exact: list[Value] = [v if isinstance(v, Fraction) or (isinstance(v, float) and (not math.isfinite(v) or str(v) == "-0.0"))
                          else Fraction(v) for v in flat]
    codes = [encode(name, v) for v in exact]
    for value, code in zip(exact, codes, strict=True):
        assert decode(name, code) == value or is_nan(value), (name, value)
    return Tensor(name, tuple(shape), codes)


def coded(name: str, shape: Sequence[int], codes: Callable[..., int] | Iterable[int]) -> Tensor:
    """A tensor of codes: a function of the indices, or a flat list."""
    flat = [codes(*index) for index in product(*map(range, shape))] if callable(codes) else list(codes)
    return Tensor(name, tuple(shape), flat)


@dataclass
class Vector:
    family: str
    case: str
    comment: str
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    min_bits: int = 0
    declaration: str = ""


OPTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gemm_w4a16": (("bf16", "f16"), ("nobias", "bias", "biasafter")),
    "gemm_w8a8_fp8": (("bf16", "f16", "f32"), ("fn", "fnuz"), ("token", "atensor"), ("channel", "wtensor"),
                      ("nobias", "bias", "biasafter")),
    "gemm_w4a8_fp8": (("bf16", "f16"), ("nobias", "bias")),
    "gemm_w4a8_fp8_grouped": (("bf16", "f16"), ("nobias", "bias")),
    "gemm_w4a8_int8": (("bf16", "f16"), ("nobias", "bias")),
    "gemm_nvfp4": (("bf16", "f16"), ("nolora", "lora"), ("nobias", "bias", "biasafter")),
    "gemm_int4": (("f16", "bf16"), ("nolora", "lora"), ("nobias", "bias")),
    "int4_pack": (("uint4", "int8"),), "int4_repack": (), "int4_encode": (), "scale_swizzle": (), "scale_pack_e4m3": (),
    "scale_fold": (("vllm", "vllm_native"),), "fp8_convert_fnuz": (("fnuz", "fn"), ("dynamic", "static")),
    "fp8_requantize": (("fn", "fnuz"), ("unfused", "fused")),
    "fp8_quantize": (("bf16", "f16", "f32"), ("fn", "fnuz"), ("vllm", "vllm_native", "scaled_quantize", "deepgemm"),
                     ("no_ub", "ub")),
    "int8_quantize": (("bf16", "f16", "f32"), ("wide", "narrow")),
    "int4_quantize": (("bf16", "f16", "f32"), ("quantize_weights", "compressed_tensors", "svdquant", "nunchaku")),
    "nvfp4_quantize": (
        ("bf16", "f16", "f32"),
        ("vllm", "vllm_reference", "vllm_emulation", "compressed_tensors", "modelopt", "torchao", "transformer_engine",
         "four_over_six", "svdquant", "svdquant_triton", "nunchaku", "deepgemm"),
        ("linear", "swizzled"),
    ),
    "svdquant_quantize": (("bf16", "f16"), ("svdquant", "svdquant_triton", "nunchaku")),
}
"""Tokens of every option, the default first, in the order of the contract."""


def problem_text(op: str, variant: str, dims: str, *tokens: str) -> str:
    """op/variant/dims/options: the first option always, the others where they are not at their default."""
    shown = []
    for place, option in enumerate(OPTIONS[op]):
        chosen = [token for token in tokens if token in option] or [option[0]]
        assert len(chosen) == 1, (op, tokens)
        if place == 0 or chosen[0] != option[0]:
            shown.append(chosen[0])
    assert all(any(token in option for option in OPTIONS[op]) for token in tokens), (op, tokens)
    return f"{op}/{variant}/{dims}/{'.'.join(shown) or 'plain'}"


# GEMMs ---------------------------------------------------------------------------------------------------------------


@dataclass
class Width:
    """Bits an accumulator needs so that no order of addition and no alignment loses anything, over all sums seen."""

    bits: int = 1


Term = tuple[Value, int]
"""A factor of a product: its value, and the exponent that a matrix unit aligns it by (subnormals keep the lowest one)."""


def terms(t: Tensor, index: tuple[int, ...], scales: Tensor | None = None, group: int = 0) -> list[Term]:
    """One row of an operand, with its block scales."""

    def term(name: str, value: Value) -> Term:
        finite = real(value) if not is_nan(value) and not is_inf(value) else ZERO
        lowest = FORMATS[name].low_exponent
        return value, max(log2(finite), lowest) if finite else lowest

    row = [term(t.format, v) for v in t.row(*index)]
    if scales is None:
        return row
    factors = [term(scales.format, v) for v in scales.row(*index)]
    return [(times(v, factors[k // group][0]), e + factors[k // group][1]) for k, (v, e) in enumerate(row)]


def dot(a: Sequence[Term], w: Sequence[Term], width: Width, start: Value = ZERO) -> Value:
    """The exact sum of products on top of `start`; records the bits it needs. Every partial sum is a multiple of the lowest
    set bit of all products, and none is larger than the sum of their magnitudes."""
    pairs = [(times(x, y), i + j) for (x, i), (y, j) in zip(a, w, strict=True) if x or type(y) is float]
    pairs.append((start, log2(real(start)) if not is_nan(start) and not is_inf(start) and start else 0))
    total: Value = ZERO
    for value, _ in pairs:
        total = plus(total, value)
    live = [(real(p), e) for p, e in pairs if not is_nan(p) and not is_inf(p) and p]
    if live:
        unit = min(p.numerator & -p.numerator if p.denominator == 1 else Fraction(1, p.denominator) for p, _ in live)
        most = sum(abs(p) for p, _ in live) / unit
        top = max(e for _, e in live)
        width.bits = max(width.bits, int(most).bit_length(), top - log2(Fraction(unit)) + 1)
    return total


@dataclass
class Trace:
    """Whether a step before the last one has rounded since the trace was cleared: then the bits hold for the normative program
    alone, otherwise for every program of the same formula."""

    rounded: bool = False

    def fit(self, fmt: str, value: Value) -> Value:
        found = fit(fmt, value)
        self.rounded = self.rounded or not (is_nan(value) or found == value)
        return found


TRACE = Trace()
Outcomes = frozenset[Value]
"""Values a step may have, where the contract lets the compiler fuse a product with the addition that follows it."""


def each(values: Outcomes, step: Callable[[Value], Value]) -> Outcomes:
    return frozenset(step(v) for v in values)


def scale(values: Outcomes, factor: Value, fmt: str = "f32") -> Outcomes:
    return each(values, lambda v: TRACE.fit(fmt, times(v, factor)))


def shift(values: Outcomes, addend: Value, fmt: str = "f32") -> Outcomes:
    return each(values, lambda v: TRACE.fit(fmt, plus(v, addend)))


def scale_shift(values: Outcomes, factor: Value, addends: Outcomes, how: str, fmt: str = "f32") -> Outcomes:
    """v * factor + addend, rounded once ("fused"), twice ("separate"), or either way."""
    found: set[Value] = set()
    for v, addend in product(values, addends):
        if how != "fused":
            found.add(TRACE.fit(fmt, plus(TRACE.fit(fmt, times(v, factor)), addend)))
        if how != "separate":
            found.add(TRACE.fit(fmt, plus(times(v, factor), addend)))
    return frozenset(found)


def output(fmt: str, shape: tuple[int, int], cells: Sequence[Outcomes]) -> Tensor:
    """The tensor D. Zeros are written as +0 and either zero is right; NaN cells hold the format's NaN and any NaN is right."""
    codes, any_of = [], {}
    for place, cell in enumerate(cells):
        found = sorted({encode(fmt, v) & ~(FORMATS[fmt].sign if v == 0 else 0) for v in cell})
        codes.append(found[0])
        if len(found) > 1:
            any_of[place] = tuple(found)
    return Tensor(fmt, shape, codes, any_of=any_of, either_zero=True)


Inputs = dict[str, Tensor]


def at(t: Tensor | None, *index: int) -> Value:
    """One value of a tensor; of a tensor of one element, that element."""
    assert t is not None
    if len(t.codes) == 1:
        return decode(t.format, t.codes[0])
    place = reduce(lambda total, pair: total * pair[0] + pair[1], zip(t.shape, index, strict=True), 0)
    return decode(t.format, t.codes[place])


def finish(values: Outcomes, out: str, bias: Value | None, when: str) -> Outcomes:
    """Cast to the output format; `when` "after": the bias is added in the output format, a second rounding."""
    if bias is None or when != "biasafter":
        return each(values, lambda v: fit(out, v))
    return each(each(values, lambda v: TRACE.fit(out, v)), lambda v: fit(out, plus(v, bias)))


def gemm_w4a16(i: Inputs, variant: str, out: str, bias: str, group: int) -> tuple[Tensor, Width]:
    """W = RNE((q - z) s) in the format of A (zpafter: RNE(RNE(q s) - RNE(z s))); f32 sum; bias before or after the cast."""
    width, (m, _), (n, k) = Width(), i["a"].shape, i["w"].shape
    cells, columns = [], []
    for column in range(n):
        weights: list[Term] = []
        for place in range(k):
            q, s = at(i["w"], column, place), at(i["scale"], column, place // group)
            z = at(i["zero"], column, place // group) if variant != "sym" else Fraction(8)
            w = fit(out, minus(fit(out, times(q, s)), fit(out, times(z, s)))) if variant == "zpafter" else (
                fit(out, times(minus(q, z), s)))
            weights.append((w, log2(real(w)) if not is_nan(w) and not is_inf(w) and w else -999))
        columns.append(weights)
    a = [terms(i["a"], (row,)) for row in range(m)]
    for row, column in product(range(m), range(n)):
        value = frozenset({dot(a[row], columns[column], width)})
        b = at(i["bias"], column) if bias != "nobias" else None
        if bias == "bias":
            value = shift(value, at(i["bias"], column))
        cells.append(finish(value, out, b, bias))
    return output(out, (m, n), cells), width


def gemm_w8a8(i: Inputs, variant: str, out: str, bias: str) -> tuple[Tensor, Width]:
    """scaled: acc * channel * token (+ bias, joined to the last product). block: every 128 of K times a_scale * w_scale, added
    to a running f32 total."""
    width, (m, k), (n, _) = Width(), i["a"].shape, i["w"].shape
    cells, every_a, every_w = [], [terms(i["a"], (row,)) for row in range(m)], [terms(i["w"], (column,)) for column in range(n)]
    for row, column in product(range(m), range(n)):
        a, w = every_a[row], every_w[column]
        b = at(i["bias"], column) if bias != "nobias" else None
        if variant == "scaled":
            value = scale(frozenset({dot(a, w, width)}), at(i["channel_scale"], column))
            token = at(i["token_scale"], row)
            if bias == "bias":
                assert b is not None
                value = scale_shift(value, token, frozenset({b}), "either")
            else:
                value = scale(value, token)
        else:
            value = frozenset()
            for block in range(k // 128):
                piece = slice(128 * block, 128 * block + 128)
                factor = TRACE.fit("f32", times(at(i["a_scale"], row, block), at(i["w_scale"], column // 128, block)))
                part = frozenset({dot(a[piece], w[piece], width)})
                value = scale_shift(part, factor, value, "either") if block else scale(part, factor)
            if bias == "bias":
                assert b is not None
                value = shift(value, b)
        cells.append(finish(value, out, b, bias))
    return output(out, (m, n), cells), width


@cache
def folded(q: Value, s: int) -> Value:
    """The weight of a W4A8 kernel: RNE_e4m3(q s), saturating, -0 for q = 0; the byte for +q is that of -q, sign inverted."""
    if q == 0:
        return NEG_ZERO
    code = encode("e4m3fn", times(-size(q), decode("e4m3fn", s)), saturate=True)
    return decode("e4m3fn", code ^ (0 if negative(q) else 0x80))


def w4a8_rows(i: Inputs, rows: Sequence[tuple[int, tuple[int, ...]]], variant: str, out: str, bias: str, group: int,
              width: Width) -> list[Outcomes]:
    """Cells of the listed rows of A; each comes with the leading indices of its expert (none in the dense op)."""
    n, k = i["w"].shape[-2:]
    cells = []
    every_a = {row: terms(i["a"], (row,)) for row, _ in rows}
    for (row, expert), column in product(rows, range(n)):
        a, at_n = every_a[row], (*expert, column)
        q = i["w"].row(*at_n)
        groups = i["group_scale"].shape[-1]
        place = reduce(lambda total, pair: total * pair[0] + pair[1], zip(i["w"].shape, at_n, strict=False), 0) * groups
        scales = i["group_scale"].codes[place : place + groups]
        value: Outcomes = frozenset()
        if variant == "folded":
            weights = [folded(v, scales[j // group]) for j, v in enumerate(q)]
            low = FORMATS["e4m3fn"].low_exponent
            w = [(v, max(log2(real(v)), low) if not is_nan(v) and v else low) for v in weights]
            value = frozenset({dot(a, w, width)})
        else:
            codes = [(v, log2(real(v)) if v else 0) for v in q]
            for g in range(k // group):
                piece = slice(g * group, (g + 1) * group)
                part, s = frozenset({dot(a[piece], codes[piece], width)}), decode("e4m3fn", scales[g])
                value = scale_shift(part, s, value, "either") if g else scale(part, s)
        value = scale(value, at(i["token_scale"], row))
        channel = at(i["channel_scale"], *at_n)
        if bias == "bias":
            value = scale_shift(value, channel, frozenset({at(i["bias"], *at_n)}), "either")
        else:
            value = scale(value, channel)
        cells.append(finish(value, out, None, bias))
    return cells


def gemm_w4a8(i: Inputs, variant: str, out: str, bias: str, group: int) -> tuple[Tensor, Width]:
    """acc * token * channel (+ bias joined to the last product), one cast."""
    width, m, n = Width(), i["a"].shape[0], i["w"].shape[0]
    return output(out, (m, n), w4a8_rows(i, [(row, ()) for row in range(m)], variant, out, bias, group, width)), width


def gemm_grouped(i: Inputs, variant: str, out: str, bias: str, group: int) -> tuple[Tensor, Width]:
    """gemm_w4a8 of each row with the weights of its expert; experts own `counts` rows each, in order."""
    owners = [e for e, count in enumerate(i["counts"].codes) for _ in range(count)]
    width, (m, _), n = Width(), i["a"].shape, i["w"].shape[1]
    assert len(owners) == m
    rows = [(row, (owner,)) for row, owner in enumerate(owners)]
    return output(out, (m, n), w4a8_rows(i, rows, variant, out, bias, group, width)), width


def gemm_int8(i: Inputs, variant: str, out: str, bias: str, group: int) -> tuple[Tensor, Width]:
    """Exact int32 per group, to f32, times the group scale, running f32 total; token scale; bias; viaf16: to f16 first."""
    width, (m, k), (n, _) = Width(), i["a"].shape, i["w"].shape
    cells = []
    for row, column in product(range(m), range(n)):
        a = terms(i["a"], (row,))
        w = [(v - 8, log2(real(v - 8)) if v != 8 else 0) for v in i["w"].row(column)]
        value: Outcomes = frozenset()
        for g in range(k // group):
            piece = slice(g * group, (g + 1) * group)
            part = frozenset({f32(dot(a[piece], w[piece], width))})
            s = at(i["group_scale"], column, g)
            value = scale_shift(part, s, value, "either") if g else scale(part, s)
        token = at(i["token_scale"], row)
        b = frozenset({at(i["bias"], column)}) if bias == "bias" else None
        value = scale(value, token) if b is None else scale_shift(value, token, b, "either")
        if variant == "viaf16":
            value = each(value, lambda v: TRACE.fit("f16", v))
        cells.append(finish(value, out, None, bias))
    return output(out, (m, n), cells), width


def low_rank(i: Inputs, row: int, column: int, out: str) -> tuple[list[Term], list[Term]]:
    """lora_act rounded to the output format, and lora_up."""
    act = [fit(out, v) for v in i["lora_act"].row(row)]
    exponents = [(v, log2(real(v)) if not is_nan(v) and not is_inf(v) and v else -99) for v in act]
    return exponents, terms(i["lora_up"], (column,))


def chained(a: Sequence[Term], w: Sequence[Term], start: Value) -> Value:
    """start + sum of products, one f32 rounding per product, ascending."""
    for (x, _), (y, _) in zip(a, w, strict=True):
        start = TRACE.fit("f32", plus(start, times(x, y)))
    return start


def half_affine(values: Outcomes, channel: Value, bias: Value | None, out: str) -> Outcomes:
    """One FMA in the output format; without a bias, one product."""
    return scale(values, channel, out) if bias is None else scale_shift(values, channel, frozenset({bias}), "fused", out)


def gemm_nvfp4(i: Inputs, variant: str, out: str, lora: str, bias: str) -> tuple[Tensor, Width]:
    """plain: alpha, bias, cast. svdquant: ((main * alpha + lora) * channel) + bias in f32, one cast. nunchaku: main * alpha to
    the output format, channel and bias by one FMA in it, then lora on top in f32, cast."""
    width, m, n = Width(), i["a"].shape[0], i["w"].shape[0]
    cells = []
    for row, column in product(range(m), range(n)):
        a, w = terms(i["a"], (row,), i["a_scale"], 16), terms(i["w"], (column,), i["w_scale"], 16)
        value, alpha = frozenset({dot(a, w, width)}), at(i["alpha"])
        b = at(i["bias"], column) if bias != "nobias" else None
        if variant == "plain":
            value = scale(value, alpha) if bias != "bias" or b is None else (
                scale_shift(value, alpha, frozenset({b}), "either"))
            cells.append(finish(value, out, b, bias))
            continue
        value, channel = scale(value, alpha), at(i["channel_scale"], column)
        if variant == "svdquant":
            if lora == "lora":
                value = shift(value, dot(*low_rank(i, row, column, out), width))
            value = scale(value, channel) if b is None else scale_shift(value, channel, frozenset({b}), "either")
        else:
            value = half_affine(each(value, lambda v: TRACE.fit(out, v)), channel, b, out)
            if lora == "lora":
                act, up = low_rank(i, row, column, out)
                dot(act, up, width)
                value = each(value, lambda v, act=act, up=up: chained(act, up, v))  # type: ignore[misc]
        cells.append(finish(value, out, None, bias))
    return output(out, (m, n), cells), width


def gemm_int4(i: Inputs, variant: str, out: str, lora: str, bias: str) -> tuple[Tensor, Width]:
    """Per 64 of K an exact int32. f32: * a_scale * w_scale, running f32 total, + lora, * channel + bias, one cast. half: to the
    output format, FMA with RNE(a_scale * w_scale) onto a running total in it, channel and bias by one FMA, lora on top."""
    width, (m, k), (n, _) = Width(), i["a"].shape, i["w"].shape
    cells = []
    for row, column in product(range(m), range(n)):
        a, w = terms(i["a"], (row,)), terms(i["w"], (column,))
        b, channel = at(i["bias"], column) if bias == "bias" else None, at(i["channel_scale"], column)
        value: Outcomes = frozenset()
        for g in range(k // 64):
            piece = slice(64 * g, 64 * g + 64)
            part = frozenset({f32(dot(a[piece], w[piece], width))})
            sa, sw = at(i["a_scale"], row, g), at(i["w_scale"], column, g)
            if variant == "f32":
                part = scale(scale(part, sa), sw)
                value = frozenset(TRACE.fit("f32", plus(p, v)) for p, v in product(part, value)) if g else part
            else:
                part, factor = each(part, lambda v: TRACE.fit(out, v)), TRACE.fit(out, times(sa, sw))
                value = scale_shift(part, factor, value, "fused", out) if g else scale(part, factor, out)
        if variant == "f32":
            if lora == "lora":
                value = shift(value, dot(*low_rank(i, row, column, out), width))
            value = scale(value, channel) if b is None else scale_shift(value, channel, frozenset({b}), "either")
        else:
            value = half_affine(value, channel, b, out)
            if lora == "lora":
                act, up = low_rank(i, row, column, out)
                dot(act, up, width)
                value = each(value, lambda v, act=act, up=up: chained(act, up, v))  # type: ignore[misc]
        cells.append(finish(value, out, None, bias))
    return output(out, (m, n), cells), width


# Books: the vectors of one op ----------------------------------------------------------------------------------------


@dataclass
class Book:
    """The vectors of one op, by family. `families`: name -> (what it guards against, clause of the contract)."""

    op: str
    families: dict[str, tuple[str, str]]
    vectors: list[Vector] = field(default_factory=list)

    def add(self, family: str, variant: str, dims: str, tokens: str, comment: str, inputs: Inputs, expected: Inputs,
            bits: int = 0, declaration: str = "") -> Inputs:
        """Append one vector; its index is its place, and the seed of its case."""
        assert family in self.families, (self.op, family)
        case = f"{problem_text(self.op, variant, dims, *tokens.split())}/golden/s{len(self.vectors) + 1}"
        self.vectors.append(Vector(family, case, comment, inputs, expected, bits, declaration))
        return expected

    def gemm(self, family: str, variant: str, dims: str, tokens: str, comment: str, inputs: Inputs) -> Tensor:
        """One GEMM vector, D computed by the op's function."""
        sizes = {letter: int(text) for letter, text in _sizes(dims)}
        option = [next((t for t in tokens.split() if t in choice), choice[0]) for choice in OPTIONS[self.op]]
        out, bias = option[0], option[-1]
        TRACE.rounded = False
        d: Tensor
        match self.op:
            case "gemm_w8a8_fp8":
                d, width = gemm_w8a8(inputs, variant, out, bias)
            case "gemm_nvfp4":
                d, width = gemm_nvfp4(inputs, variant, out, option[1], bias)
            case "gemm_int4":
                d, width = gemm_int4(inputs, variant, out, option[1], bias)
            case _:
                function = {"gemm_w4a16": gemm_w4a16, "gemm_w4a8_fp8": gemm_w4a8, "gemm_w4a8_fp8_grouped": gemm_grouped,
                            "gemm_w4a8_int8": gemm_int8}[self.op]
                d, width = function(inputs, variant, out, bias, sizes["g"])
        assert width.bits <= 14, (self.op, family, dims, width.bits)
        declaration = "normative" if TRACE.rounded or d.any_of else "any"
        self.add(family, variant, dims, tokens, comment, inputs, {"d": d}, width.bits, declaration)
        return d

    def record(self) -> dict[str, Any]:
        unused = set(self.families) - {v.family for v in self.vectors}
        assert not unused, (self.op, unused)
        vectors = []
        for index, v in enumerate(self.vectors, 1):
            found: dict[str, Any] = {"index": index, "case": v.case, "family": v.family, "comment": v.comment}
            if v.min_bits:
                found |= {"min_bits": v.min_bits, "declaration": v.declaration}
            found["inputs"] = {name: t.record() for name, t in v.inputs.items()}
            found["expected"] = {name: t.record() for name, t in v.expected.items()}
            vectors.append(found)
        families = {name: {"guards": guards, "clause": clause} for name, (guards, clause) in self.families.items()}
        return {"schema": "lowbit-golden/1", "op": self.op, "source": VERSION, "families": families, "vectors": vectors}


def _sizes(dims: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for character in dims:
        if character.isalpha():
            found.append((character, ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + character)
    return found


def small(i: int, j: int, low: int, high: int) -> int:
    """A fixed scatter of small integers over a matrix: neighbours, rows and columns all differ."""
    return low + (i * 31 + j * 17 + i * j * 7 + (j // 16) * 5) % (high - low + 1)


def hot(places: Mapping[tuple[int, int], Value | int | float]) -> Callable[[int, int], Value | int | float]:
    """A matrix of zeros but for the listed places."""
    return lambda i, j: places.get((i, j), 0)


def nan_at(codes: Tensor, place: int, code: int) -> Tensor:
    """The tensor with one code replaced."""
    return replace(codes, codes=[*codes.codes[:place], code, *codes.codes[place + 1 :]])


GEMM_FAMILIES = {
    "ramp": "imp#567, imp#722, vllm#42725: nibbles swapped, weight transposed twice; N is not K",
    "sign_extension": "tilelang#2482, tilelang#2477: nibble zero-extended, or decoded with the wrong offset",
    "scale_index": "vllm#39705, svdquant-kernels aedba4d: group scale of the wrong group or the wrong row",
    "bias": "vllm#24895: bias dropped at M = 1",
    "bias_rounding": "disagreement 12: bias inside the f32 epilogue, or added after the cast with a second rounding",
    "tail": "vllm#6852, cutlass#1332: rows or columns beyond the last full tile",
    "special": "vllm#33972, vllm#37135: NaN and infinity lost, or made where none is",
    "zero_group": "lmdeploy#3652, gemlite#38: a group whose scale is zero",
}


def families(**clauses: str) -> dict[str, tuple[str, str]]:
    """Families of a GEMM by name, each with its clause; a text in GUARDS stands for what it guards."""
    return {name: ({**GEMM_FAMILIES, **GUARDS}[name], clause) for name, clause in clauses.items()}


GUARDS = {
    "many_groups": "vllm#9212: scale extent taken for the group size, wrong where K > G * G",
    "weight_rounding": "operations, trap 2: a reference that does not round the weight to the format of the activation",
    "zero_point": "vllm#26092, GPTQModel#2350: zero points off by one; 0 and 15 wrap",
    "zero_order": "vllm quantize_weights: (q - z) s against q s - z s, three roundings",
    "scales_axis": "pytorch#159940, vllm#12696: token and channel scales swapped or told apart by their size",
    "scale_order": "cutlass_scaled_mm, cutlass_w4a8_mm: each product of the epilogue rounded to f32, in the order given",
    "fnuz": "vllm#14689, vllm#31106: one byte, half the value; 0x80 is NaN, 0x7F is 240",
    "block_scale": "vllm#42725: 128 x 128 weight scale transposed, or its column block not found",
    "promotion": "DeepGEMM#37: each 128 of K scaled by both scales, then added in f32",
    "folded_rounding": "vllm#23198: e4m3 product of scale and code rounded half away, or not at all",
    "saturation": "vllm#4570, Model-Optimizer#1397: -8 s beyond 448 becomes NaN instead of 448",
    "minus_zero": "vllm#23198: q = 0 is -0 in the lookup table, whatever the scale, NaN included",
    "folding": "folded weight against exact group scale on the accumulator",
    "experts": "vllm#29691: weights, scales or bias of another expert; experts without rows",
    "empty": "vllm#29691: no rows at all",
    "asymmetric_range": "sparkinfer#723: -128 and -8 in both lanes",
    "via_f16": "disagreement 15: output forced through binary16 before the cast",
    "alpha": "modular#6600: global scale dropped, doubled or inverted",
    "lora_order": "disagreement 7: channel scale on the low-rank term, or the low-rank term on top",
    "lora_layout": "disagreement 8, nunchaku#67: lora_up read as [R, N]",
    "lora_rounding": "operations S3: lora_act rounded to the output format before its product",
    "accumulation": "disagreement 14: f32 total across groups, or FMA in the output format",
    "half_rounding": "nunchaku K3: group sums above 256 are not bf16 values",
}


# W4A16 ---------------------------------------------------------------------------------------------------------------


def w4a16() -> Book:
    book = Book("gemm_w4a16", families(
        ramp="W4A16-1", sign_extension="W4A16-2", scale_index="W4A16-1", many_groups="W4A16-1", weight_rounding="W4A16-2",
        zero_point="W4A16-2", zero_order="W4A16-2", bias="W4A16-3", bias_rounding="W4A16-3", tail="W4A16-1", special="GEM-2",
        zero_group="W4A16-2"))

    def ramp(n: int, k: int) -> int:
        return (5 * k + 3 * n) % 16

    def a3(m: int, k: int) -> int:
        return small(m, k, -3, 3)

    for out in ("bf16", "f16"):
        book.gemm("ramp", "sym", "m4n8k32g32", out, "every code at even and odd k, unit scale", {
            "a": tensor(out, (4, 32), a3), "w": coded("uint4", (8, 32), ramp), "scale": tensor(out, (8, 1), lambda *_: 1)})
    book.gemm("sign_extension", "sym", "m3n8k16g16", "f16", "all weights negative, -8 to -1", {
        "a": tensor("f16", (3, 16), lambda m, k: m + 1 if k % (m + 1) == 0 else 0),
        "w": coded("uint4", (8, 16), lambda n, k: (3 * k + n) % 8), "scale": tensor("f16", (8, 1), lambda *_: 1)})
    book.gemm("scale_index", "sym", "m5n8k64g16", "bf16", "powers of two that differ by group and row; row m sees group m alone",
        {
        "a": tensor("bf16", (5, 64), lambda m, k: 1 if k // 16 == m or (m == 4 and k % 16 == 3) else 0),
        "w": coded("uint4", (8, 64), ramp), "scale": tensor("bf16", (8, 4), lambda n, g: two((3 * g + n) % 5 - 2))})
    book.gemm("many_groups", "sym", "m5n8k272g16", "bf16", "17 groups of 16: row m sees group 0, 1, 15, 16 or one k of each", {
        "a": tensor("bf16", (5, 272), lambda m, k: 1 if (k // 16 == (0, 1, 15, 16, k // 16)[m] and (m < 4 or k % 16 == 5))
            else 0),
        "w": coded("uint4", (8, 272), ramp), "scale": tensor("bf16", (8, 17), lambda n, g: 1 + (3 * g + n) % 7)})
    book.gemm("many_groups", "zp", "m2n8k1056g32", "f16", "33 groups of 32 with zero points", {
        "a": tensor("f16", (2, 1056), lambda m, k: 1 if k % 32 == 7 + m else 0), "w": coded("uint4", (8, 1056), ramp),
        "scale": tensor("f16", (8, 33), lambda n, g: 1 + (2 * g + n) % 5),
        "zero": coded("uint4", (8, 33), lambda n, g: (g + n) % 16)})
    for out, s in (("bf16", Fraction(171, 128)), ("f16", Fraction(1371, 1024))):
        a = tensor(out, (2, 16), hot({(0, 0): 1, (0, 1): -1, (1, 2): 1, (1, 5): -1}))
        w = coded("uint4", (8, 16), lambda n, k: (15, 11, 14, 1, 3, 13, 8, 0)[(k + n) % 8])
        d = book.gemm("weight_rounding", "sym", "m2n8k16g16", out,
            "q s is no value of the format; a difference shows the rounding", {
            "a": a, "w": w, "scale": tensor(out, (8, 1), [s] * 8)})
        assert d.codes[0] != encode(out, 4 * s)
    zero_points = {"a": tensor("f16", (3, 32), a3), "w": coded("uint4", (8, 32), ramp),
                   "scale": tensor("f16", (8, 2), lambda n, g: two((n + g) % 3 - 1)),
                   "zero": coded("uint4", (8, 2), lambda n, g: (0, 15, 8, 7, 1, 14, 0, 15)[n] if g == 0
                       else (15, 0, 1, 8)[n % 4])}
    book.gemm("zero_point", "zp", "m3n8k32g16", "f16", "zero points 0 and 15 among others", zero_points)
    book.gemm("zero_point", "zpafter", "m3n8k32g16", "f16", "the same operands; with powers of two both orders agree",
        zero_points)
    rounded = {"a": tensor("bf16", (2, 16), hot({(0, 0): 1, (0, 9): 1, (1, 3): -2})),
        "w": coded("uint4", (8, 16), lambda n, k: 11 - k % 4),
               "scale": tensor("bf16", (8, 1), lambda n, _: Fraction(129 + 6 * n, 128)),
               "zero": coded("uint4", (8, 1), lambda n, _: 3 + n)}
    d1 = book.gemm("zero_order", "zp", "m2n8k16g16", "bf16", "difference of codes, one rounding", rounded)
    d2 = book.gemm("zero_order", "zpafter", "m2n8k16g16", "bf16", "difference of rounded products, the same operands", rounded)
    assert d1.codes != d2.codes
    biased = {"a": tensor("bf16", (1, 16), lambda _, k: 1 + k % 3), "w": coded("uint4", (8, 16), lambda n, k: (k + n) % 16),
              "scale": tensor("bf16", (8, 1), lambda *_: Fraction(1, 4)), "bias": tensor("bf16", (8,), lambda n: 3 * n - 7)}
    book.gemm("bias", "sym", "m1n8k16g16", "bf16 bias", "one row and a bias", biased)
    book.gemm("bias", "sym", "m1n8k16g16", "bf16 biasafter", "one row and a bias after the cast", biased)
    # the sum 257 is no bf16 value: 257 + 0.5 rounds up only before the cast
    twice = {"a": tensor("bf16", (2, 32), lambda m, k: (8, 8, 8, 8, 33 + 2 * m)[k] if k < 5 else 0),
             "w": coded("uint4", (8, 32), lambda n, k: (15, 15, 15, 15, 9)[k] if k < 5 else 8),
             "scale": tensor("bf16", (8, 1), lambda *_: 1), "bias": tensor("bf16", (8,), lambda n: Fraction(n + 1, 2))}
    d1 = book.gemm("bias_rounding", "sym", "m2n8k32g32", "bf16 bias", "an odd sum above 256: bias added in f32", twice)
    d2 = book.gemm("bias_rounding", "sym", "m2n8k32g32", "bf16 biasafter", "the same operands, bias after the cast", twice)
    assert d1.codes != d2.codes
    book.gemm("tail", "sym", "m5n24k48g16", "f16", "M, N and K are multiples of no tile", {
        "a": tensor("f16", (5, 48), a3), "w": coded("uint4", (24, 48), ramp),
        "scale": tensor("f16", (24, 3), lambda n, g: two((n + g) % 3))})
    book.gemm("tail", "sym", "m2n8k96g96", "bf16", "the group is the whole of K and no power of two", {
        "a": tensor("bf16", (2, 96), a3), "w": coded("uint4", (8, 96), ramp),
        "scale": tensor("bf16", (8, 1), lambda n, _: 1 + n)})
    plain = {"a": tensor("f16", (4, 16), lambda m, k: (64 if m == 1 else 1) * (k % 2 + 1)),
        "w": coded("uint4", (8, 16), lambda n, k: 15 - n % 2),
             "scale": tensor("f16", (8, 1), lambda n, _: 64 if n < 7 else -64)}
    plain["a"] = nan_at(nan_at(plain["a"], 5, 0x7E01), 47, 0xFC00)
    book.gemm("special", "sym", "m4n8k16g16", "f16", "rows with NaN, with binary16 overflow, with -infinity; a negative scale",
        plain)
    book.gemm("zero_group", "sym", "m2n8k32g16", "bf16", "scales 0 and -0 beside live ones", {
        "a": tensor("bf16", (2, 32), a3), "w": coded("uint4", (8, 32), ramp),
        "scale": tensor("bf16", (8, 2), lambda n, g: (0, NEG_ZERO, 1, 2)[(n + 2 * g) % 4])})
    return book


# W8A8 ----------------------------------------------------------------------------------------------------------------


def _ones(*shape: int) -> Tensor:
    return tensor("f32", shape, lambda *_: 1)


def w8a8() -> Book:
    book = Book("gemm_w8a8_fp8", families(
        ramp="W8A8-1", scales_axis="W8A8-2", scale_order="W8A8-2", fnuz="W8A8-1", block_scale="W8A8-3", promotion="W8A8-3",
        bias="W8A8-4", bias_rounding="W8A8-4", tail="W8A8-1", special="GEM-2"))

    def a(fmt: str, m: int, k: int) -> Tensor:
        return tensor(fmt, (m, k), lambda i, j: small(i, j, -3, 3))

    def w(fmt: str, n: int, k: int) -> Tensor:
        return tensor(fmt, (n, k), lambda i, j: Fraction(small(i, j + 3, -7, 7), 2))

    for out in ("bf16", "f16", "f32"):
        book.gemm("ramp", "scaled", "m4n8k32", out, "small values, unit scales", {
            "a": a("e4m3fn", 4, 32), "w": w("e4m3fn", 8, 32), "token_scale": _ones(4), "channel_scale": _ones(8)})
    scaled = {"a": a("e4m3fn", 5, 16), "w": w("e4m3fn", 8, 16), "token_scale": tensor("f32", (5,), lambda m: two(m - 2)),
              "channel_scale": tensor("f32", (8,), lambda n: two(3 * n - 9))}
    book.gemm("scales_axis", "scaled", "m5n8k16", "f32", "powers of two per token and per channel", scaled)
    square = {"a": a("e4m3fn", 8, 16), "w": w("e4m3fn", 8, 16), "token_scale": tensor("f32", (8,), lambda m: two(m)),
              "channel_scale": tensor("f32", (8,), lambda n: two(-n))}
    book.gemm("scales_axis", "scaled", "m8n8k16", "bf16", "as many tokens as channels", square)
    for tokens, ta, wa in (("atensor", 1, 8), ("wtensor", 3, 1), ("atensor wtensor", 1, 1)):
        book.gemm("scales_axis", "scaled", "m3n8k16", f"bf16 {tokens}", "one scale for a whole tensor", {
            "a": a("e4m3fn", 3, 16), "w": w("e4m3fn", 8, 16), "token_scale": tensor("f32", (ta,), lambda m: Fraction(3 + m, 4)),
            "channel_scale": tensor("f32", (wa,), lambda n: Fraction(5 + n, 8))})
    thirds = {"a": a("e4m3fn", 4, 16), "w": w("e4m3fn", 8, 16), "token_scale": tensor("f32", (4,),
        lambda m: f32(Fraction(3 * m + 1, 7))),
              "channel_scale": tensor("f32", (8,), lambda n: f32(Fraction(2 * n + 1, 3)))}
    d = book.gemm("scale_order", "scaled", "m4n8k16", "f32", "full significands: the order of the two products shows", thirds)
    other = [f32(times(f32(times(dot(terms(thirds["a"], (m,)), terms(thirds["w"], (n,)), Width()), at(thirds["token_scale"], m))),
                       at(thirds["channel_scale"], n))) for m, n in product(range(4), range(8))]
    assert [encode("f32", v) for v in other] != d.codes
    codes = coded("uint8", (3, 16), lambda m,
        k: (5 * k + 17 * m) % 64 + (0x80 if (k + m) % 3 == 0 and (5 * k + 17 * m) % 64 else 0)).codes
    weights = coded("uint8", (8, 16), lambda n, k: 0x38 + (k + n) % 2 * 8 + (0x80 if (k + n) % 5 == 0 else 0)).codes
    codes = [code & ~7 | 0x20 if code & 0x7F else 0 for code in codes]
    for fmt, token in (("e4m3fn", "fn"), ("e4m3fnuz", "fnuz")):
        book.gemm("fnuz", "scaled", "m3n8k16", f"bf16 {token}", "the same bytes in both formats: a factor of four", {
            "a": Tensor(fmt, (3, 16), codes), "w": Tensor(fmt, (8, 16), weights), "token_scale": _ones(3),
            "channel_scale": _ones(8)})
    book.gemm("fnuz", "scaled", "m4n8k16", "f32 fnuz", "0x80 is NaN, 0x7F and 0xFF are 240 and -240", {
        "a": Tensor("e4m3fnuz", (4, 16),
            [{0: 0x7F, 17: 0x80, 34: 0xFF, 48: 0x7F, 49: 0xFF}.get(place, 0) for place in range(64)]),
        "w": tensor("e4m3fnuz", (8, 16), lambda n, k: 1 + n % 3), "token_scale": _ones(4), "channel_scale": _ones(8)})
    blocks = {"a": tensor("e4m3fn", (3, 256), lambda i, j: small(i, j, -1, 1)),
        "w": tensor("e4m3fn", (8, 256), lambda i, j: small(i, j, -2, 2)),
              "a_scale": tensor("f32", (3, 2), lambda m, g: f32(Fraction(5 * m + 3 * g + 1, 7))),
              "w_scale": tensor("f32", (1, 2), lambda _, g: f32(Fraction(4 * g + 2, 3)))}
    book.gemm("promotion", "block", "m3n8k256", "f32",
        "full significands: product of scales, then of the sum, then the f32 total", blocks)
    book.gemm("promotion", "block", "m3n8k256", "bf16", "the same operands to bf16", blocks)
    book.gemm("promotion", "block", "m3n8k256", "f32 bias", "the same operands and a bias", {
        **blocks, "bias": tensor("f32", (8,), lambda n: f32(Fraction(n, 3)))})
    d = book.gemm("promotion", "block", "m1n8k256", "f32",
        "-1, then three times RNE(1/3): the second product may be fused with the total", {
        "a": tensor("e4m3fn", (1, 256), lambda _, k: {3: -1, 130: 3}.get(k, 0)),
        "w": tensor("e4m3fn", (8, 256), lambda n, k: two(n % 4)),
        "a_scale": tensor("f32", (1, 2), [1, f32(Fraction(1, 3))]), "w_scale": tensor("f32", (1, 2), [1, 1])})
    assert d.any_of
    book.gemm("block_scale", "block", "m2n8k384", "f32", "powers of two per block of K, rows of A apart", {
        "a": tensor("e4m3fn", (2, 384), lambda i, j: 1 if j % 128 in (0, 127) else 0),
        "w": tensor("e4m3fn", (8, 384), lambda i, j: 1 + (i + j) % 3),
        "a_scale": tensor("f32", (2, 3), lambda m, g: two(4 * g + 12 * m)),
        "w_scale": tensor("f32", (1, 3), lambda _, g: two(-7 * g))})
    book.gemm("block_scale", "block", "m1n136k128", "f32", "columns 128 to 135 belong to the second block of columns", {
        "a": tensor("e4m3fn", (1, 128), lambda i, j: 1 if j % 32 == 5 else 0),
        "w": tensor("e4m3fn", (136, 128), lambda i, j: 1 + i % 7 if j == 5 else 0), "a_scale": _ones(1, 1),
        "w_scale": tensor("f32", (2, 1), lambda n, _: 1 + 2 * n)})
    one = {"a": a("e4m3fn", 1, 16), "w": w("e4m3fn", 8, 16), "token_scale": _ones(1), "channel_scale": _ones(8)}
    for out in ("bf16", "f16", "f32"):
        book.gemm("bias", "scaled", "m1n8k16", f"{out} bias", "one row and a bias",
            {**one, "bias": tensor(out, (8,), lambda n: 5 * n - 9)})
    joined = {**thirds, "bias": tensor("f32", (8,), lambda n: f32(Fraction(-(7 * n + 5), 3)))}
    d = book.gemm("bias_rounding", "scaled", "m4n8k16", "f32 bias", "the last product may or may not be fused with the bias",
        joined)
    assert d.any_of
    late = {"a": tensor("e4m3fn", (2, 16), lambda m, k: (16, 1)[k] if k < 2 else 0),
            "w": tensor("e4m3fn", (8, 16), lambda n, k: (16, 1)[k] if k < 2 else 0), "token_scale": _ones(2),
            "channel_scale": _ones(8), "bias": tensor("bf16", (8,), lambda n: Fraction(n + 1, 2))}
    d1 = book.gemm("bias_rounding", "scaled", "m2n8k16", "bf16 bias", "257 is no bf16 value: bias in f32", late)
    d2 = book.gemm("bias_rounding", "scaled", "m2n8k16", "bf16 biasafter", "the same operands, bias after the cast", late)
    assert d1.codes != d2.codes
    book.gemm("tail", "scaled", "m5n24k48", "bf16", "M, N and K are multiples of no tile", {
        "a": tensor("e4m3fn", (5, 48), lambda i, j: small(i, j, -3, 3)), "w": w("e4m3fn", 24, 48), "token_scale": _ones(5),
        "channel_scale": _ones(24)})
    for out in ("bf16", "f16"):
        book.gemm("special", "scaled", "m4n8k16", out,
            "NaN bytes 0x7F and 0xFF; 448 * 448 * 4 overflows binary16; token scales 0, -1 and infinity", {
            "a": Tensor("e4m3fn", (4, 16),
                [{0: 0x7F, 20: 0x7E, 21: 0x7E, 22: 0x7E, 23: 0x7E, 33: 0xB8, 50: 0x38}.get(place, 0) for place in range(64)]),
            "w": Tensor("e4m3fn", (8, 16), [0xFF if place == 30 else 0x7E if place % 16 > 3 else 0x38 for place in range(128)]),
            "token_scale": tensor("f32", (4,), [1, 1, -1, INF]), "channel_scale": tensor("f32", (8,), lambda n: n % 3)})
    return book


# W4A8 fp8 ------------------------------------------------------------------------------------------------------------


def _w4a8_operands(m: int, n: int, k: int, g: int, *, e: int = 0, **given: Tensor) -> Inputs:
    lead = (e,) if e else ()
    found = {
        "a": tensor("e4m3fn", (m, k), lambda i, j: small(i, j, -2, 2) if j % 5 == i % 5 else 0),
        "w": coded("int4", (*lead, n, k), lambda *i: (5 * i[-1] + 3 * i[-2] + (7 * i[0] if e else 0)) % 16),
        "group_scale": tensor("e4m3fn", (*lead, n, k // g), lambda *i: two((i[-1] + i[-2] + (i[0] if e else 0)) % 3)),
        "token_scale": _ones(m), "channel_scale": _ones(*lead, n),
    }
    return found | given


def _w4a8_families(**more: str) -> dict[str, tuple[str, str]]:
    return families(ramp="W4A8-1", sign_extension="W4A8-2", scale_index="W4A8-1", many_groups="W4A8-1", folded_rounding="W4A8-2",
                    saturation="W4A8-2", minus_zero="W4A8-2", folding="W4A8-3", scales_axis="W4A8-4", bias="W4A8-4",
                    bias_rounding="W4A8-4", tail="W4A8-1", special="GEM-2", zero_group="W4A8-2", **more)


def _above_one(count: int) -> Tensor:
    """Scales 1 + i 2^-23 with i near 3000: times those of `_below_one`, the product has 46 bits and is nearly 1."""
    return tensor("f32", (count,), lambda m: 1 + (3000 + 37 * m) * two(-23))


def _below_one(*shape: int) -> Tensor:
    return tensor("f32", shape, lambda *i: 1 - (2990 + 41 * i[-1] + (7 * i[0] if len(i) > 1 else 0)) * two(-23))


def _thirds(count: int, step: int, *lead: int) -> Tensor:
    return tensor("f32", (*lead, count), lambda *i: f32(Fraction(step * sum(i) + 1, 3 + 2 * step)))


def w4a8() -> Book:
    book = Book("gemm_w4a8_fp8", _w4a8_families())
    for variant in ("folded", "exact"):
        for g in (64, 128):
            book.gemm("ramp", variant, f"m4n8k128g{g}", "bf16", "every code at even and odd k, powers of two as scales",
                      _w4a8_operands(4, 8, 128, g))
        book.gemm("sign_extension", variant, "m2n8k64g64", "f16", "all weights negative, -8 to -1", _w4a8_operands(
            2, 8, 64, 64, w=coded("int4", (8, 64), lambda n, k: 8 + (3 * k + n) % 8)))
        book.gemm("scale_index", variant, "m5n8k256g64", "bf16", "row m sees group m alone, row 4 one k of each", _w4a8_operands(
            5, 8, 256, 64, a=tensor("e4m3fn", (5, 256), lambda m, k: 1 if (k // 64 == m and k % 4 == 1)
                or (m == 4 and k % 64 == 9) else 0),
            group_scale=tensor("e4m3fn", (8, 4), lambda n, g: two((3 * g + n) % 5 - 2))))
        wide = _w4a8_operands(1, 8, 192, 64, a=tensor("e4m3fn", (1, 192), lambda m, k: 1 if k % 64 in (3, 40) else 0),
                              group_scale=tensor("e4m3fn", (8, 3), lambda n, g: Fraction(8 + (n + 3) % 8, 8) * two(g)),
                              w=coded("int4", (8, 192), lambda n, k: (3 if k % 64 == 3 else -5 - n % 2) % 16))
        book.gemm("folding", variant, "m1n8k192g64", "f16",
            "scales with three mantissa bits: folding rounds, the exact group scale does not", wide)
        saturated = _w4a8_operands(2, 8, 64, 64, a=tensor("e4m3fn", (2, 64), hot({(0, 0): 1, (1, 1): 1})),
                                   w=coded("int4", (8, 64), lambda n, k: 8 if k == 0 else 7),
                                   group_scale=tensor("e4m3fn", (8, 1), [52, 56, 60, 64, 72, 448, -64, -448]))
        book.gemm("saturation", variant, "m2n8k64g64", "bf16", "-8 s and 7 s at and beyond 448", saturated)
        book.gemm("scales_axis", variant, "m3n8k64g64", "f16", "full significands: a scale per token and one per channel",
            _w4a8_operands(
            3, 8, 64, 64, token_scale=_thirds(3, 2), channel_scale=_thirds(8, 4)))
        for m in (1, 3):
            book.gemm("bias", variant, f"m{m}n8k64g64", "bf16 bias", "a bias, one row and three", _w4a8_operands(
                m, 8, 64, 64, bias=tensor("bf16", (8,), lambda n: 3 * n - 8)))
        d = book.gemm("bias_rounding", variant, "m4n8k64g64", "bf16 bias",
            "token times channel is 1 and a little, the bias is -1: one rounding or two", _w4a8_operands(
            4, 8, 64, 64, a=tensor("e4m3fn", (4, 64), lambda m, k: 1 if k == 9 else 0), w=coded("int4", (8, 64), lambda n, k: 1),
            group_scale=tensor("e4m3fn", (8, 1), lambda n, g: 1), token_scale=_above_one(4), channel_scale=_below_one(8),
            bias=tensor("bf16", (8,), lambda n: -1)))
        assert d.any_of
        book.gemm("tail", variant, "m5n24k192g64", "bf16", "M, N and K are multiples of no tile", _w4a8_operands(5, 24, 192, 64))
        special = _w4a8_operands(4, 8, 64, 64, token_scale=tensor("f32", (4,), [1, INF, 0, two(100)]))
        special["a"] = nan_at(special["a"], 3, 0x7F)
        book.gemm("special", variant, "m4n8k64g64", "bf16", "a NaN activation; token scales infinite, zero and 2^100", special)
        zero = _w4a8_operands(2, 8, 128, 64, group_scale=tensor("e4m3fn", (8, 2), lambda n,
            g: (0, NEG_ZERO, 1, -2)[(n + 2 * g) % 4]))
        book.gemm("zero_group", variant, "m2n8k128g64", "bf16", "scales 0, -0 and negative ones", zero)
    tie = _w4a8_operands(2, 8, 64, 64, a=tensor("e4m3fn", (2, 64), hot({(0, 0): 1, (0, 1): 1, (1, 2): 1, (1, 3): -1})),
                         w=coded("int4", (8, 64), lambda n, k: (3, 5, 6, 7)[k] if k < 4 else 0),
                         group_scale=tensor("e4m3fn", (8, 1), lambda n, _: Fraction(8 + n, 8)))
    book.gemm("folded_rounding", "folded", "m2n8k64g64", "f16",
        "3 s, 5 s, 6 s and 7 s for the eight significands: ties among them", tie)
    nan_scale = _w4a8_operands(2, 8, 64, 64, a=tensor("e4m3fn", (2, 64), hot({(0, 0): 1, (1, 1): 1})),
                               w=coded("int4", (8, 64), lambda n, k: (0, 3)[k] if k < 2 else 0))
    nan_scale["group_scale"] = Tensor("e4m3fn", (8, 1), [0x7F, 0xFF, 0x38, 0x00, 0x80, 0xB8, 0x7E, 0x01])
    book.gemm("minus_zero", "folded", "m2n8k64g64", "bf16",
        "a NaN scale leaves q = 0 at -0 and makes q = 3 NaN: the whole row of D, since 0 times NaN is NaN", nan_scale)
    book.gemm("minus_zero", "exact", "m2n8k64g64", "bf16",
        "the same scales on the accumulator: NaN reaches every element of the group", nan_scale)
    long = _w4a8_operands(1, 8, 4160, 64, a=tensor("e4m3fn", (1, 4160), lambda m, k: 1 if k % 64 == k // 64 % 64 else 0),
                          group_scale=tensor("e4m3fn", (8, 65), lambda n, g: 1 + (3 * g + n) % 4))
    book.gemm("many_groups", "folded", "m1n8k4160g64", "f16", "65 groups of 64, one live k in each", long)
    return book


def grouped() -> Book:
    book = Book("gemm_w4a8_fp8_grouped", {
        name: pair for name, pair in _w4a8_families(experts="W4A8-5", empty="W4A8-5").items()
        if name in ("ramp", "scale_index", "folding", "bias", "bias_rounding", "tail", "special", "experts", "empty",
            "scales_axis")})

    def counts(*rows: int) -> Tensor:
        return coded("int32", (len(rows),), rows)

    for variant in ("folded", "exact"):
        book.gemm("ramp", variant, "e2m4n8k64g64", "bf16", "two experts with other weights and scales", {
            **_w4a8_operands(4, 8, 64, 64, e=2), "counts": counts(2, 2)})
        same = tensor("e4m3fn", (4, 64), lambda m, k: 1 if k in (2, 33) else 0)
        book.gemm("experts", variant, "e4m4n8k64g64", "bf16",
            "equal rows of A, one per expert: outputs differ by the expert alone", {
            **_w4a8_operands(4, 8, 64, 64, e=4, a=same, channel_scale=tensor("f32", (4, 8), lambda e, n: two(e) * (1 + n % 2))),
            "counts": counts(1, 1, 1, 1)})
        book.gemm("experts", variant, "e5m3n8k64g64", "f16", "first, last and a middle expert without rows", {
            **_w4a8_operands(3, 8, 64, 64, e=5), "counts": counts(0, 2, 0, 1, 0)})
        book.gemm("experts", variant, "e3m4n8k64g64", "bf16", "all rows to the last expert", {
            **_w4a8_operands(4, 8, 64, 64, e=3), "counts": counts(0, 0, 4)})
        book.gemm("scale_index", variant, "e2m4n8k128g64", "bf16", "group scales per expert, row and group", {
            **_w4a8_operands(4, 8, 128, 64, e=2, a=tensor("e4m3fn", (4, 128), lambda m,
                k: 1 if k // 64 == m % 2 and k % 64 in (5, 62) else 0),
                             group_scale=tensor("e4m3fn", (2, 8, 2), lambda e, n, g: two((5 * e + 3 * g + n) % 7 - 3))),
                             "counts": counts(2, 2)})
        book.gemm("bias", variant, "e2m3n8k64g64", "bf16 bias", "a bias per expert; one expert has one row", {
            **_w4a8_operands(3, 8, 64, 64, e=2, bias=tensor("bf16", (2, 8), lambda e, n: 16 * e + n - 3)),
            "counts": counts(1, 2)})
        d1 = book.gemm("bias_rounding", variant, "e2m3n8k64g64", "bf16 bias",
            "token times channel is 1 and a little, the bias is -1: one rounding or two", {
            **_w4a8_operands(3, 8, 64, 64, e=2, a=tensor("e4m3fn", (3, 64), lambda m, k: 1 if k == 9 else 0),
                w=coded("int4", (2, 8, 64), lambda *_: 1),
                             group_scale=tensor("e4m3fn", (2, 8, 1), lambda *_: 1), token_scale=_above_one(3),
                             channel_scale=_below_one(2, 8),
                             bias=tensor("bf16", (2, 8), lambda *_: -1)), "counts": counts(2, 1)})
        assert d1.any_of
        book.gemm("scales_axis", variant, "e2m3n8k64g64", "f16",
            "full significands: a scale per token and one per channel of the expert", {
            **_w4a8_operands(3, 8, 64, 64, e=2, token_scale=_thirds(3, 2), channel_scale=_thirds(8, 4, 2)),
            "counts": counts(1, 2)})
    wide = _w4a8_operands(2, 8, 64, 64, e=2, a=tensor("e4m3fn", (2, 64), lambda m, k: 1 if k in (3, 40) else 0),
                          group_scale=tensor("e4m3fn", (2, 8, 1), lambda e, n, g: Fraction(8 + (n + 3) % 8, 8) * two(e)),
                          w=coded("int4", (2, 8, 64), lambda e, n, k: (3 if k == 3 else -5 - n % 2) % 16)) | {"counts": counts(1,
                              1)}
    d = [book.gemm("folding", variant, "e2m2n8k64g64", "f16", "folding rounds, the exact group scale does not", wide)
        for variant in ("folded", "exact")]
    assert d[0].codes != d[1].codes
    book.gemm("tail", "folded", "e3m5n24k192g64", "bf16", "M, N and K are multiples of no tile", {
        **_w4a8_operands(5, 24, 192, 64, e=3), "counts": counts(2, 0, 3)})
    special = _w4a8_operands(3, 8, 64, 64, e=2, token_scale=tensor("f32", (3,), [1, INF, 1])) | {"counts": counts(2, 1)}
    special["a"] = nan_at(special["a"], 0, 0xFF)
    book.gemm("special", "folded", "e2m3n8k64g64", "bf16", "a NaN activation and an infinite token scale stay in their rows",
        special)
    book.gemm("empty", "folded", "e3m0n8k64g64", "bf16", "no rows, three experts",
        {**_w4a8_operands(0, 8, 64, 64, e=3), "counts": counts(0, 0, 0)})
    return book


# W4A8 int8 -----------------------------------------------------------------------------------------------------------


def w4a8_int8() -> Book:
    book = Book("gemm_w4a8_int8", families(
        ramp="W4I8-1", sign_extension="W4I8-2", asymmetric_range="W4I8-2", scale_index="W4I8-1", many_groups="W4I8-2",
        via_f16="W4I8-3",
        bias="W4I8-3", bias_rounding="W4I8-3", scales_axis="W4I8-3", tail="W4I8-1", special="GEM-2", zero_group="W4I8-2"))

    def operands(out: str, m: int, n: int, k: int, g: int, **given: Tensor) -> Inputs:
        return {"a": tensor("int8", (m, k), lambda i, j: small(i, j, -9, 9)),
            "w": coded("uint4", (n, k), lambda i, j: (5 * j + 3 * i) % 16),
                "group_scale": tensor(out, (n, k // g), lambda i, j: two((i + 2 * j) % 4 - 3)),
                "token_scale": tensor(out, (m,), lambda i: two(i % 2))} | given

    for out in ("bf16", "f16"):
        book.gemm("ramp", "direct", "m4n8k32g32", out, "every code at even and odd k", operands(out, 4, 8, 32, 32))
    book.gemm("sign_extension", "direct", "m2n8k32g32", "f16", "all weights and all activations negative", operands(
        "f16", 2, 8, 32, 32, a=tensor("int8", (2, 32), lambda m, k: -1 - (k + m) % 5),
        w=coded("uint4", (8, 32), lambda n, k: (3 * k + n) % 8)))
    book.gemm("asymmetric_range", "direct", "m3n8k32g32", "bf16", "-128 against -8 and 7, 127 against -8 and 7", operands(
        "bf16", 3, 8, 32, 32, a=tensor("int8", (3, 32), lambda m, k: (-128, 127, -128 + 255 * (k % 2))[m] if k < 8 else 0),
        w=coded("uint4", (8, 32), lambda n, k: 15 * ((k + n) % 2))))
    book.gemm("scale_index", "direct", "m5n8k128g32", "bf16", "row m sees group m alone, row 4 one k of each", operands(
        "bf16", 5, 8, 128, 32, a=tensor("int8", (5, 128), lambda m, k: 1 if (k // 32 == m and k % 4 == 1)
            or (m == 4 and k % 32 == 9) else 0),
        group_scale=tensor("bf16", (8, 4), lambda n, g: two((3 * g + n) % 11 - 5))))
    book.gemm("many_groups", "direct", "m1n8k1056g32", "f16", "33 groups of 32, one live k in each", operands(
        "f16", 1, 8, 1056, 32, a=tensor("int8", (1, 1056), lambda m, k: 1 if k % 32 == k // 32 % 32 else 0),
        group_scale=tensor("f16", (8, 33), lambda n, g: 1 + (3 * g + n) % 5)))
    thirds = operands("f16", 3, 8, 96, 32, group_scale=tensor("f16", (8, 3), lambda n, g: fit("f16", Fraction(n + 3 * g + 1, 3))),
                      token_scale=tensor("f16", (3,), lambda m: fit("f16", Fraction(m + 1, 7))))
    book.gemm("scales_axis", "direct", "m3n8k96g32", "f16", "full significands: group scale, f32 total, token scale", thirds)
    large = operands("bf16", 2, 8, 32, 32, a=tensor("int8", (2, 32), lambda m, k: 16 * (m + 1) if k < 4 else 0),
                     w=coded("uint4", (8, 32), lambda n, k: 8 + n % 8), group_scale=tensor("bf16", (8, 1), lambda n, _: 64),
                     token_scale=tensor("bf16", (2,), lambda m: 2))
    # 4113 * 2^-12 = 1 + 2^-8 + 2^-12 lies above a tie of bf16; binary16 drops the last bit and leaves the tie
    close = operands("bf16", 2, 8, 32, 32, a=tensor("int8", (2, 32), lambda m,
        k: (127, 127, 127, 127, 79, 4 + 2 * m)[k] if k < 6 else 0),
                     w=coded("uint4", (8, 32), lambda n, k: 8 + (7 if k < 5 else 1) * (1 - 2 * (n % 2))),
                     group_scale=tensor("bf16", (8, 1), lambda n, _: two(n - 8)),
                     token_scale=tensor("bf16", (2,), lambda m: two(-4)))
    for inputs, text in ((large, "results beyond 65504: infinite through binary16"), (close, "double rounding through binary16")):
        d = [book.gemm("via_f16", variant, "m2n8k32g32", "bf16", f"{text}; {variant}", inputs)
            for variant in ("direct", "viaf16")]
        assert d[0].codes != d[1].codes
    for m in (1, 3):
        book.gemm("bias", "direct", f"m{m}n8k32g32", "f16 bias", "a bias, one row and three", operands(
            "f16", m, 8, 32, 32, bias=tensor("f16", (8,), lambda n: 3 * n - 8)))
    # 16375 * 2047 / 2048 has 25 bits and lies half way between two f32 values near 16368
    tied = operands("f16", 1, 8, 32, 32, a=tensor("int8", (1, 32), lambda _,
        k: 127 if k < 18 else (53 if k == 18 else (2 if k == 19 else 0))),
                    w=coded("uint4", (8, 32), lambda n, k: 8 + (7 if k < 19 else 1) * (1 - 2 * (n % 2))),
                    group_scale=tensor("f16", (8, 1), lambda n, _: two(-n)),
                    token_scale=tensor("f16", (1,), [Fraction(2047, 2048)]),
                    bias=tensor("f16", (8,), lambda n: -16368 * two(-n) * (1 - 2 * (n % 2))))
    tie = book.gemm("bias_rounding", "direct", "m1n8k32g32", "f16 bias", "the token scale and the bias: one rounding or two",
        tied)
    assert tie.any_of
    groups = operands("f16", 1, 8, 64, 32, a=tensor("int8", (1, 64), lambda _,
        k: (127 if k % 32 < 18 else {18: 53, 19: 2}.get(k, {50: 127, 51: 0}.get(k, 0)))),
                      w=coded("uint4", (8, 64), lambda n, k: 8 - (7 if k < 19 else 1) if k < 32 else 8 + (7 if k < 50 else 3)),
                      group_scale=tensor("f16", (8, 2), lambda n, g: (Fraction(2047, 2048) if g else ONE) * two(-n)),
                      token_scale=tensor("f16", (1,), [1]))
    tie = book.gemm("bias_rounding", "direct", "m1n8k64g32", "f16", "the group scale and the running total: one rounding or two",
        groups)
    assert tie.any_of
    book.gemm("bias", "viaf16", "m2n8k32g32", "bf16 bias", "the bias is added before the cast to binary16", operands(
        "bf16", 2, 8, 32, 32, bias=tensor("bf16", (8,), lambda n: 3 * n - 8)))
    book.gemm("tail", "direct", "m5n24k96g32", "bf16", "M, N and K are multiples of no tile", operands("bf16", 5, 24, 96, 32))
    book.gemm("tail", "direct", "m2n8k40g40", "f16", "the group is the whole of K and no power of two",
        operands("f16", 2, 8, 40, 40))
    special = operands("bf16", 3, 8, 32, 32, token_scale=tensor("bf16", (3,), [INF, NAN, two(120)]))
    book.gemm("special", "direct", "m3n8k32g32", "bf16", "token scales infinite, NaN and 2^120", special)
    book.gemm("zero_group", "direct", "m2n8k64g32", "bf16", "scales 0, -0 and negative ones", operands(
        "bf16", 2, 8, 64, 32, group_scale=tensor("bf16", (8, 2), lambda n, g: (0, NEG_ZERO, 1, -2)[(n + 2 * g) % 4])))
    return book


# NVFP4 ---------------------------------------------------------------------------------------------------------------


def _alpha(value: Value | int) -> Tensor:
    return tensor("f32", (1,), [value])


def _fp4(m: int, n: int, k: int, r: int, out: str, **given: Tensor) -> Inputs:
    found = {
        "a": coded("e2m1", (m, k), lambda i, j: (7 * j + 5 * i) % 16 if (j + i) % 3 == 0 else 0),
        "a_scale": tensor("ue4m3", (m, k // 16), lambda i, j: two((i + j) % 2)),
        "w": coded("e2m1", (n, k), lambda i, j: (5 * j + 3 * i) % 16), "w_scale": tensor("ue4m3", (n, k // 16), lambda i,
            j: two((i + 2 * j) % 3 - 1)),
        "alpha": _alpha(1),
    }
    if r:
        found |= {"lora_act": tensor("f32", (m, r), lambda i, j: small(i, j, -2, 2) if j % 3 == 0 else 0),
                  "lora_up": tensor(out, (n, r), lambda i, j: small(i, j, -3, 3))}
    return found | given


def _affine(n: int, out: str, bias: bool = True) -> Inputs:
    found = {"channel_scale": tensor(out, (n,), lambda i: Fraction(3 + i, 4) * (-1 if i == 5 else 1))}
    return found | ({"bias": tensor(out, (n,), lambda i: 2 * i - 5)} if bias else {})


def nvfp4() -> Book:
    book = Book("gemm_nvfp4", families(
        ramp="NVF-1", scale_index="NVF-1", many_groups="NVF-1", alpha="NVF-4", lora_order="NVF-5", lora_layout="NVF-3",
        lora_rounding="NVF-3",
        bias="NVF-2", bias_rounding="NVF-2", tail="NVF-1", special="GEM-2", zero_group="NVF-1"))
    for out in ("bf16", "f16"):
        book.gemm("ramp", "plain", "m4n8k32r0", out, "every code at even and odd k, -0 included", _fp4(4, 8, 32, 0, out))
    book.gemm("scale_index", "plain", "m5n8k64r0", "bf16", "row m sees block m alone, row 4 one k of each", _fp4(
        5, 8, 64, 0, "bf16", a=tensor("e2m1", (5, 64), lambda m, k: 1 if (k // 16 == m and k % 4 == 1) or (m == 4 and k % 16 == 9)
            else 0),
        a_scale=tensor("ue4m3", (5, 4), lambda m, g: two((2 * g + m) % 3)),
        w_scale=tensor("ue4m3", (8, 4), lambda n, g: two((3 * g + n) % 5 - 3))))
    book.gemm("many_groups", "plain", "m2n8k288r0", "bf16", "18 blocks of 16, one live k in each", _fp4(
        2, 8, 288, 0, "bf16", a=tensor("e2m1", (2, 288), lambda m, k: 1 if k % 16 == (k // 16 + m) % 16 else 0),
        a_scale=tensor("ue4m3", (2, 18), lambda m, g: 1 + (g + m) % 2),
        w_scale=tensor("ue4m3", (8, 18), lambda n, g: 1 + (3 * g + n) % 4)))
    for value in (Fraction(1, 3), two(-9), Fraction(-5, 4)):
        book.gemm("alpha", "plain", "m3n8k32r0", "f16", "alpha is neither one nor its own inverse",
            _fp4(3, 8, 32, 0, "f16", alpha=_alpha(f32(value))))
    third = _alpha(f32(Fraction(1, 3)))
    for variant in ("svdquant", "nunchaku"):
        book.gemm("alpha", variant, "m3n8k32r0", "bf16", "alpha before the channel scale, no low-rank term",
                  {**_fp4(3, 8, 32, 0, "bf16", alpha=third), **_affine(8, "bf16", bias=False)})
    ordered = {**_fp4(3, 8, 32, 16, "f16", alpha=third), **_affine(8, "f16")}
    d = [book.gemm("lora_order", variant, "m3n8k32r16", "f16 lora bias", f"low-rank term, channel scale and bias after {variant}",
        ordered)
         for variant in ("svdquant", "nunchaku")]
    assert d[0].codes != d[1].codes
    for variant in ("svdquant", "nunchaku"):
        book.gemm("lora_order", variant, "m3n8k32r16", "bf16 lora", "low-rank term and channel scale, no bias",
                  {**_fp4(3, 8, 32, 16, "bf16", alpha=third), **_affine(8, "bf16", bias=False)})
    up = tensor("bf16", (16, 16), lambda n, r: small(n, r, -3, 3) * (2 if r > n else 1))
    turned = tensor("bf16", (16, 16), lambda n, r: small(r, n, -3, 3) * (2 if n > r else 1))
    for t, text in ((up, "lora_up is [N, R], here N = R"),
            (turned, "the transposed lora_up: what a reader of [R, N] makes of the vector before")):
        book.gemm("lora_layout", "svdquant", "m3n16k32r16", "bf16 lora", text,
            {**_fp4(3, 16, 32, 16, "bf16", lora_up=t), **_affine(16, "bf16", bias=False)})
    act = tensor("f32", (2, 16), lambda m, r: Fraction(4097 + 2 * m, 4096) if r == 0 else (-1 if r == 1 else 0))
    book.gemm("lora_rounding", "svdquant", "m2n8k32r16", "f16 lora",
        "lora_act is no binary16 value: it is rounded before its product", {
        **_fp4(2, 8, 32, 16, "f16", lora_act=act, a=coded("e2m1", (2, 32), lambda *_: 0),
            lora_up=tensor("f16", (8, 16), lambda n, r: 1)),
        **_affine(8, "f16", bias=False)})
    book.gemm("lora_rounding", "nunchaku", "m2n8k32r16", "f16 lora", "lora_act of 65520 and more is infinite in binary16", {
        **_fp4(2, 8, 32, 16, "f16", lora_act=tensor("f32", (2, 16), hot({(0, 0): 65519, (1, 0): 65520}))),
        **_affine(8, "f16", bias=False)})
    one = _fp4(1, 8, 32, 0, "bf16", bias=tensor("bf16", (8,), lambda n: 3 * n - 8))
    for when in ("bias", "biasafter"):
        book.gemm("bias", "plain", "m1n8k32r0", f"bf16 {when}", "one row and a bias", one)
    late = _fp4(2, 8, 32, 0, "bf16", a=tensor("e2m1", (2, 32), hot({(0, 0): 4, (0, 16): 1, (1, 0): 4, (1, 16): 3})),
                a_scale=tensor("ue4m3", (2, 2), [16, 1, 16, 1]), w=tensor("e2m1", (8, 32), lambda n, k: 4 if k == 0 else 1),
                w_scale=tensor("ue4m3", (8, 2), lambda n, g: 1), bias=tensor("bf16", (8,), lambda n: Fraction(n + 1, 2)))
    d = [book.gemm("bias_rounding", "plain", "m2n8k32r0", f"bf16 {when}", f"257 is no bf16 value; {when}", late)
        for when in ("bias", "biasafter")]
    assert d[0].codes != d[1].codes
    threes = _fp4(1, 8, 32, 0, "bf16", alpha=third, a=tensor("e2m1", (1, 32), hot({(0, 17): 3})),
        w=tensor("e2m1", (8, 32), lambda n, k: 1),
                  a_scale=tensor("ue4m3", (1, 2), [1, 1]), w_scale=tensor("ue4m3", (8, 2), lambda n, g: two(n % 4)),
                  bias=tensor("bf16", (8,), lambda n: -two(n % 4)))
    d = [book.gemm("bias_rounding", "plain", "m1n8k32r0", "bf16 bias", "three times RNE(1/3), and minus 1: one rounding or two",
        threes),
         book.gemm("bias_rounding", "svdquant", "m1n8k32r0", "bf16 bias", "the channel scale is three: one rounding or two", {
             **threes, "a": tensor("e2m1", (1, 32), hot({(0, 17): 1})), "channel_scale": tensor("bf16", (8,), lambda n: 3)})]
    assert all(x.any_of for x in d)
    book.gemm("tail", "plain", "m5n24k96r0", "bf16", "M, N and K are multiples of no tile", _fp4(5, 24, 96, 0, "bf16"))
    wide = _fp4(3, 8, 32, 0, "f16", a=coded("e2m1", (3, 32), lambda m, k: 7 if k % 16 == 0 else 0),
        w=coded("e2m1", (8, 32), lambda n, k: 7),
                a_scale=Tensor("ue4m3", (3, 2), [0x7E, 0x7E, 0x38, 0x7F, 0x38, 0x38]),
                w_scale=tensor("ue4m3", (8, 2), lambda n, g: 448))
    book.gemm("special", "plain", "m3n8k32r0", "f16", "scales of 448 overflow binary16; a NaN scale makes its row NaN", wide)
    book.gemm("zero_group", "plain", "m2n8k32r0", "bf16", "block scales of zero, and the smallest one 2^-9", _fp4(
        2, 8, 32, 0, "bf16", a_scale=tensor("ue4m3", (2, 2), [0, 1, two(-9), 0]),
        w_scale=tensor("ue4m3", (8, 2), lambda n, g: n % 2)))
    return book


# INT4 ----------------------------------------------------------------------------------------------------------------


def _rounded_fractions(fmt: str, shape: tuple[int, int], step_: int, divisor: int) -> Tensor:
    """(i + step j + 1) / divisor, rounded to the format."""
    return tensor(fmt, shape, lambda i, j: fit(fmt, Fraction(i + step_ * j + 1, divisor)))


def int4() -> Book:
    book = Book("gemm_int4", families(
        ramp="INT-1", sign_extension="INT-1", scale_index="INT-2", accumulation="INT-4", half_rounding="INT-4",
        lora_order="INT-3",
        lora_layout="INT-3", lora_rounding="INT-3", bias="INT-3", bias_rounding="INT-4", tail="INT-1", special="GEM-2",
        zero_group="INT-2"))

    def operands(out: str, m: int, n: int, k: int, r: int = 0, bias: bool = False, **given: Tensor) -> Inputs:
        found = {"a": coded("int4", (m, k), lambda i, j: (7 * j + 5 * i) % 16 if (j + i) % 3 == 0 else 0),
                 "a_scale": tensor(out, (m, k // 64), lambda i, j: two((i + j) % 2)),
                 "w": coded("int4", (n, k), lambda i, j: (5 * j + 3 * i) % 16),
                 "w_scale": tensor(out, (n, k // 64), lambda i, j: two((i + 2 * j) % 3 - 1))}
        if r:
            found |= {"lora_act": tensor("f32", (m, r), lambda i, j: small(i, j, -2, 2) if j % 3 == 0 else 0),
                      "lora_up": tensor(out, (n, r), lambda i, j: small(i, j, -3, 3))}
        return found | _affine(n, out, bias) | given

    def unit(out: str, n: int) -> Tensor:
        return tensor(out, (n,), lambda i: 1)

    for variant in ("f32", "half"):
        for out in ("f16", "bf16"):
            book.gemm("ramp", variant, "m4n8k64r0", out, "every code at even and odd k",
                operands(out, 4, 8, 64, channel_scale=unit(out, 8)))
        book.gemm("sign_extension", variant, "m2n8k64r0", "f16", "all codes negative on both sides", operands(
            "f16", 2, 8, 64, a=coded("int4", (2, 64), lambda m, k: 8 + (k + m) % 8),
            w=coded("int4", (8, 64), lambda n, k: 8 + (3 * k + n) % 8),
            channel_scale=unit("f16", 8)))
        book.gemm("scale_index", variant, "m5n8k256r0", "bf16", "row m sees group m alone, row 4 one k of each", operands(
            "bf16", 5, 8, 256, a=tensor("int4", (5, 256), lambda m, k: 1 if (k // 64 == m and k % 4 == 1)
                or (m == 4 and k % 64 == 9) else 0),
            a_scale=tensor("bf16", (5, 4), lambda m, g: two((2 * g + m) % 3)),
            w_scale=tensor("bf16", (8, 4), lambda n, g: two((3 * g + n) % 5 - 3)),
            channel_scale=unit("bf16", 8)))
        book.gemm("lora_order", variant, "m3n8k64r16", "f16 lora bias", f"low-rank term, channel scale and bias, {variant}",
            operands("f16", 3, 8, 64, 16, True))
        book.gemm("lora_rounding", variant, "m2n8k64r16", "f16 lora",
            "lora_act is no binary16 value: it is rounded before its product", operands(
            "f16", 2, 8, 64, 16, a=coded("int4", (2, 64), lambda *_: 0), lora_up=tensor("f16", (8, 16), lambda n, r: 1),
            lora_act=tensor("f32", (2, 16), lambda m, r: Fraction(4097 + 2 * m, 4096) if r == 0 else (-1 if r == 1 else 0))))
        for m in (1, 3):
            book.gemm("bias", variant, f"m{m}n8k64r0", "bf16 bias", "a bias, one row and three",
                operands("bf16", m, 8, 64, 0, True))
        book.gemm("tail", variant, "m5n24k192r0", "bf16", "M, N and K are multiples of no tile", operands("bf16", 5, 24, 192))
        book.gemm("zero_group", variant, "m2n8k128r0", "f16", "scales 0, -0 and negative ones", operands(
            "f16", 2, 8, 128, w_scale=tensor("f16", (8, 2), lambda n, g: (0, NEG_ZERO, 1, -2)[(n + 2 * g) % 4])))
        special = operands("f16", 4, 8, 64, a_scale=tensor("f16", (4, 1), [NAN, INF, 16384, 1]), channel_scale=unit("f16", 8))
        book.gemm("special", variant, "m4n8k64r0", "f16", "activation scales NaN, infinite and large enough to overflow binary16",
            special)
    thirds: dict[str, Inputs] = {}
    for out in ("f16", "bf16"):
        thirds[out] = operands(out, 3, 8, 192, a_scale=_rounded_fractions(out, (3, 3), 2, 3),
                               w_scale=_rounded_fractions(out, (8, 3), 1, 7))
        d = [book.gemm("accumulation", variant, "m3n8k192r0", out, f"three groups, full significands, total in {variant}",
            thirds[out]) for variant in ("f32", "half")]
        assert d[0].codes != d[1].codes
    large = operands("bf16", 2, 8, 64, a=tensor("int4", (2, 64), lambda m, k: 7 if k < 6 else (m + 1 if k == 6 else 0)),
                     w=tensor("int4", (8, 64), lambda n, k: 7 if k < 6 else 1 + n % 3),
                     a_scale=tensor("bf16", (2, 1), lambda *_: 1),
                     w_scale=tensor("bf16", (8, 1), lambda *_: Fraction(3, 2)), channel_scale=unit("bf16", 8))
    d = [book.gemm("half_rounding", variant, "m2n8k64r0", "bf16", f"group sums 295 to 300, {variant}", large)
        for variant in ("f32", "half")]
    assert d[0].codes != d[1].codes
    up = tensor("f16", (16, 16), lambda n, r: small(n, r, -3, 3) * (2 if r > n else 1))
    turned = tensor("f16", (16, 16), lambda n, r: small(r, n, -3, 3) * (2 if n > r else 1))
    for t, text in ((up, "lora_up is [N, R], here N = R"),
            (turned, "the transposed lora_up: what a reader of [R, N] makes of the vector before")):
        book.gemm("lora_layout", "f32", "m3n16k64r16", "f16 lora", text, operands("f16", 3, 16, 64, 16, lora_up=t))
    columns = ((279, 1983, 1480), (187, 1501, 1979), (217, 1938, 1930), (89, 1164, 1547), (237, 1695, 1568), (237, 1384, 1606),
        (246, 1341, 1335), (302, 1441, 1344))
    near = operands("f16", 1, 8, 64, 0, a=tensor("int4", (1, 64), lambda _, k: 7 if k < 7 else (1 if k == 7 else 0)),
        a_scale=tensor("f16", (1, 1), [Fraction(2020, 1024)]),
                    w=tensor("int4", (8, 64), lambda n, k: columns[n][0] % 7 if k == 7
                        else min(max(columns[n][0] // 7 - 7 * k, 0), 7)),
                    w_scale=tensor("f16", (8, 1), lambda n, _: Fraction(columns[n][1], 1024)),
                    channel_scale=tensor("f16", (8,), lambda n: Fraction(columns[n][2], 1024)))
    exact = [Fraction(s * 2020 * w * c, 2**30) for s, w, c in columns]
    d = [book.gemm("bias_rounding", "f32", "m1n8k64r0", "f16 bias",
        "the bias is the product, rounded and negated: one rounding or two", {
        **near, "bias": tensor("f16", (8,), lambda n: -real(fit("f16", exact[n])))})]
    assert d[0].any_of
    d0 = book.gemm("bias_rounding", "f32", "m3n8k192r0", "f16 bias", "the channel scale and the bias may be one rounding or two",
        {
        **thirds["f16"], "bias": tensor("f16", (8,), lambda n: fit("f16", Fraction(-(7 * n + 1), 3)))})
    book.gemm("bias_rounding", "half", "m3n8k192r0", "f16 bias", "the same operands: one FMA in binary16", {
        **thirds["f16"], "bias": tensor("f16", (8,), lambda n: fit("f16", Fraction(-(7 * n + 1), 3)))})
    assert d0.codes
    return book


# Layouts, written as their sources write them ------------------------------------------------------------------------


def words(codes: Sequence[Sequence[int]]) -> bytes:
    """32-bit little-endian words, element i of each in bits 4i to 4i + 3."""
    return b"".join(sum(code << 4 * i for i, code in enumerate(group)).to_bytes(4, "little") for group in codes)


def stored(layout: str, codes: Sequence[int], rows: int, cols: int) -> bytes:
    """The bytes of a row-major code matrix [rows, cols] in a public layout."""

    def element(row: int, col: int) -> int:
        return codes[row * cols + col]

    match layout:
        case "gptq":  # int32 [K/8, N]
            return words([[element(n, 8 * j + i) for i in range(8)] for j in range(cols // 8) for n in range(rows)])
        case "int32_k" | "compressed_tensors":  # int32 [N, K/8]
            return words([[element(n, 8 * j + i) for i in range(8)] for n in range(rows) for j in range(cols // 8)])
        case "int32_n" | "zeros_n":  # int32 [K, N/8]
            return words([[element(8 * j + i, k) for i in range(8)] for k in range(cols) for j in range(rows // 8)])
        case "awq":  # columns interleaved, then as int32_n
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            return words([[element(8 * j + i, k) for i in order] for k in range(cols) for j in range(rows // 8)])
        case "compressed_tensors_zeros":  # int32 [N/8, K/G]
            return words([[element(8 * j + i, k) for i in range(8)] for j in range(rows // 8) for k in range(cols)])
        case "nibble_low_first":
            return bytes(element(n, k) | element(n, k + 1) << 4 for n in range(rows) for k in range(0, cols, 2))
        case "scale_swizzle":  # reshape [M/128, 4, 32, G/4, 4], permute to [M/128, G/4, 32, 4, 4]
            return bytes(element(128 * tile + 32 * quarter + lane, 4 * column + place)
                         for tile in range(rows // 128) for column in range(cols // 4) for lane in range(32)
                         for quarter in range(4) for place in range(4))
        case "reorder_e4m3":
            slots = [0] * (rows * cols)
            for n, k in product(range(rows), range(cols)):
                slots[reorder_slot(n, k, rows)] = element(n, k)
            return bytes(low | high << 4 for low, high in zip(slots[::2], slots[1::2], strict=True))
    raise ValueError(layout)


REORDER_ATOM = (((8, 64), (2, 4)), ((4, 1), (4, 16), (2, 8)))
"""CUTLASS compute_memory_reordering_atom<float_e4m3_t>: ((8,2),(4,4,2)):((64,4),(1,16,8)), digits of n, digits of k."""


def reorder_slot(n: int, k: int, rows: int) -> int:
    """Slot of nibble (n, k): the atom, tiled with the tiles along N fastest."""
    slot, index = 0, [n, k]
    for axis, digits in enumerate(REORDER_ATOM):
        for radix, stride in digits:
            index[axis], digit = divmod(index[axis], radix)
            slot += digit * stride
    return slot + 512 * (index[0] + rows // 16 * index[1])


def laid(t: Tensor, layout: str) -> Tensor:
    """The storage tensor of a code matrix; leading axes are matrices one after the other."""
    rows, cols = t.shape[-2:]
    one_matrix = rows * cols
    memory = b"".join(stored(layout, t.codes[i : i + one_matrix], rows, cols) for i in range(0, len(t.codes), one_matrix))
    if layout == "scale_swizzle":
        return replace(t, codes=list(memory))
    if layout == "nibble_low_first":
        return Tensor("uint8", (*t.shape[:-1], cols // 2), list(memory))
    shape = {"gptq": (cols // 8, rows), "reorder_e4m3": (cols // 8, rows), "int32_k": (rows, cols // 8),
        "compressed_tensors": (rows, cols // 8),
             "compressed_tensors_zeros": (rows // 8, cols)}.get(layout, (cols, rows // 8))
    return Tensor("int32", (*t.shape[:-2], *shape),
        [int.from_bytes(memory[i : i + 4], "little") for i in range(0, len(memory), 4)])


# Encodings -----------------------------------------------------------------------------------------------------------


def encodings() -> list[Book]:
    pack = Book("int4_pack", {
        "nibble_order": ("imp#567, imp#722: order of the nibbles of a word or byte", "ENC-2"),
        "packed_axis": ("disagreement 10: packed along K or along N; vllm#30364", "ENC-3"),
        "interleave": ("vllm#13227: AWQ order 0, 2, 4, 6, 1, 3, 5, 7", "ENC-4"),
        "byte": ("imp#567: even k in the low nibble", "ENC-5"),
        "sign_extension": ("vllm#23198: negative codes not masked before they are packed", "ENC-7"),
        "offset": ("disagreement 9, tilelang#2477: value + 8; missing k decode to -8", "ENC-6"),
        "zero_point": ("vllm#26092, GPTQModel#2350: format 1 stores zero - 1, 0 becomes 15", "ENC-8"),
        "in_place": ("vllm#33078: every nibble XOR 8, in place", "ENC-9"),
    })
    q = coded("uint4", (8, 16), lambda n, k: (5 * k + 3 * n) % 16)
    ordered = coded("uint4", (8, 8), lambda n, k: k if n % 2 else 15 - k)
    by_n = coded("uint4", (8, 8), lambda n, k: n if k % 2 else 15 - n)
    minus_eight = coded("int8", (8, 16), lambda n, k: (0xF0 | 8 + (k + n) % 8))
    wide = coded("int8", (8, 16), lambda n, k: (v if (v := (5 * k + 3 * n) % 16) < 8 else 0xF0 | v))

    def packed(family: str, variant: str, layout: str, t: Tensor, comment: str) -> Inputs:
        n, k = t.shape
        codes = [code & 15 for code in t.codes]
        cols = -(-k // 8) * 8 if variant == "compressed_tensors" else k
        if variant == "compressed_tensors":
            codes = [(t.codes[r * k + c] + 8) % 16 if c < k else 0 for r in range(n) for c in range(cols)]
        if variant == "zeros_v1":
            codes = [(code + 15) % 16 for code in codes]
        tokens = "int8" if t.format == "int8" else ""
        return pack.add(family, variant, f"n{n}k{k}", tokens, comment, {"q": t},
            {"packed": laid(Tensor("uint4", (n, cols), codes), layout)})

    layouts = {"gptq": "gptq", "k_major": "int32_k", "along_n": "int32_n", "awq": "awq", "nibble": "nibble_low_first"}
    families_of = {"gptq": "nibble_order", "k_major": "nibble_order", "along_n": "packed_axis", "awq": "interleave",
        "nibble": "byte"}
    for variant, layout in layouts.items():
        packed(families_of[variant], variant, layout, q, "all 16 codes at even and odd places; [8, 16], not square")
        packed(families_of[variant], variant, layout, by_n if variant in ("along_n", "awq") else ordered,
            "0 to 7 and 15 to 8 along the packed axis")
        packed("sign_extension", variant, layout, minus_eight, "all values negative, given as sign-extended bytes")
        packed("sign_extension", variant, layout, wide, "all 16 values given as sign-extended bytes")
    packed("byte", "nibble", "nibble_low_first", coded("uint4", (16, 16), lambda n, k: (n, k // 2 % 16)[k % 2]),
        "every high nibble beside every low one, half of them")
    packed("packed_axis", "along_n", "int32_n", coded("uint4", (16, 3), lambda n, k: (n + 5 * k) % 16),
        "two words along N, three k")
    packed("nibble_order", "gptq", "gptq", coded("uint4", (3, 16), lambda n, k: (k + 5 * n) % 16), "two words along K, three n")
    for n, k in ((8, 16), (2, 13), (3, 7), (1, 1)):
        t = coded("int8", (n, k), lambda i, j: (v if (v := (5 * j + 3 * i + 8) % 16) < 8 else 0xF0 | v))
        packed("offset", "compressed_tensors", "compressed_tensors", t, "value + 8; places beyond K hold 0")
    packed("offset", "compressed_tensors", "compressed_tensors", wide, "the operands of the other layouts")
    points = coded("uint4", (8, 3), lambda n, g: (0, 15, 8, 7, 1, 14, 2, 9)[(n + g) % 8])
    for variant in ("zeros_v1", "zeros_v2"):
        packed("zero_point", variant, "zeros_n", points, f"zero points 0 and 15 among others, {variant}")
        packed("zero_point", variant, "zeros_n", coded("uint4", (16, 1), lambda n, g: n), f"all 16 zero points, {variant}")
    for shape, function in (((2, 16), lambda n, k: (k + n) % 16), ((8, 16), lambda n, k: (5 * k + 3 * n) % 16),
                            ((1, 8), lambda n, k: 8 * (k % 2)), ((3, 24), lambda n, k: 15 - (7 * k + n) % 16)):
        t = coded("uint4", shape, function)
        pack.add("in_place", "b8", f"n{shape[0]}k{shape[1]}", "", "bit 3 of every nibble inverted", {"words": laid(t, "int32_k")},
                 {"words": laid(replace(t, codes=[(code + 8) % 16 for code in t.codes]), "int32_k")})

    packed("interleave", "awq", "awq", coded("uint4", (16, 3), lambda n, k: (n + 5 * k) % 16), "two words along N, three k")

    repack = Book("int4_repack", {
        "transpose": ("vllm#41689, vllm#42725: weight transposed twice, or not at all; N is not K", "ENC-10"),
        "zero_point": ("compressed-tensors#458: zero points left as they were packed", "ENC-11")})
    for n, k in ((8, 8), (8, 24), (24, 8), (16, 16)):
        t = coded("uint4", (n, k), lambda i, j: (5 * j + 3 * i + i // 8) % 16)
        repack.add("transpose", "weight", f"n{n}k{k}", "", "along k to along n", {"packed": laid(t, "int32_k")},
            {"repacked": laid(t, "int32_n")})
    for n, k in ((8, 1), (8, 3), (24, 2), (16, 5)):
        t = coded("uint4", (n, k), lambda i, j: (7 * j + 3 * i + i // 8) % 16)
        repack.add("zero_point", "zeros", f"n{n}k{k}", "", "[N/8, G] to [G, N/8]",
            {"packed": laid(t, "compressed_tensors_zeros")},
                   {"repacked": laid(t, "zeros_n")})

    unified = Book("int4_encode", {
        "nibble_map": ("vllm#23198: 1 to 7 become 7 to 1, 0 and negatives stay", "ENC-12"),
        "double_encode": ("vllm#23198: encoding twice is the identity on 1 to 7: the input is the output of another vector",
            "ENC-12"),
        "reorder": ("cutlass#2176: place of every nibble in the register order of the e4m3 MMA", "ENC-13"),
        "experts": ("vllm#29691: each expert reordered on its own", "ENC-14")})
    table = [0, *range(7, 0, -1), *range(8, 16)]

    def mapped(t: Tensor) -> Tensor:
        return Tensor("uint4", t.shape, [table[code] for code in t.codes])

    every = coded("int4", (16, 32), lambda i, j: i if j % 2 else j // 2)
    unified.add("nibble_map", "unified", "e1n16k32", "", "every byte", {"q": laid(every, "nibble_low_first")},
        {"encoded": laid(mapped(every), "nibble_low_first")})
    twice = Tensor("int4", every.shape, mapped(every).codes)
    unified.add("double_encode", "unified", "e1n16k32", "", "the codes of the vector before, once more",
        {"q": laid(twice, "nibble_low_first")},
                {"encoded": laid(mapped(twice), "nibble_low_first")})
    for n, k, function in ((1, 32, lambda i, j: j % 16), (2, 16, lambda i, j: 8 + j % 8), (4, 8, lambda i, j: 1 + (i + j) % 7)):
        t = coded("int4", (n, k), function)
        unified.add("nibble_map", "unified", f"e1n{n}k{k}", "", "one sign, or all codes in order",
            {"q": laid(t, "nibble_low_first")},
                    {"encoded": laid(mapped(t), "nibble_low_first")})
    for n, k in ((16, 128), (32, 128), (16, 256)):
        t = coded("int4", (n, k), lambda i, j: (j + 5 * (j // 16) + 3 * i + 7 * (i // 8)) % 16)
        unified.add("reorder", "dense", f"e1n{n}k{k}", "", "a ramp over n and k", {"q": laid(t, "int32_k")},
            {"encoded": laid(mapped(t), "reorder_e4m3")})
    for k_bit in (1, 4, 16, 32):
        t = coded("int4", (16, 128), [12 if j & k_bit else (8 + i % 8 if j == 0 else 0) for i in range(16) for j in range(128)])
        unified.add("reorder", "dense", "e1n16k128", "", f"bit {k_bit} of k alone", {"q": laid(t, "int32_k")},
            {"encoded": laid(mapped(t), "reorder_e4m3")})
    for e in (1, 2):
        t = coded("int4", (e, 16, 256), lambda x, i, j: (j + 5 * (j // 16) + 3 * i + 9 * x) % 16)
        unified.add("experts", "grouped", f"e{e}n16k256", "", "experts with other codes", {"q": laid(t, "int32_k")},
            {"encoded": laid(mapped(t), "reorder_e4m3")})

    products = Book("scale_pack_e4m3", {
        "products": ("vllm#23198: order -8 s to -1 s", "ENC-15"),
        "ties": ("operations 1.4: 77 products are ties; half away shows in them", "ENC-15"),
        "saturation": ("vllm#4570, operations 16.1: 8 s beyond 448 and at 464", "ENC-15"),
        "special": ("operations W3: NaN, zeros and negative scales", "ENC-16")})

    def eight(s: int) -> list[int]:
        value = decode("e4m3fn", s)
        return [encode("e4m3fn", times(value, Fraction(c)), saturate=True) for c in range(-8, 0)]

    def table8(family: str, comment: str, scales: Sequence[int]) -> None:
        products.add(family, "table8", f"n{len(scales)}", "", comment, {"scales": Tensor("e4m3fn", (len(scales),), list(scales))},
                     {"packed": Tensor("uint8", (len(scales), 8), [code for s in scales for code in eight(s)])})
    table8("products", "all 256 scales", range(256))
    table8("ties", "the eight significands in three binades",
        [code for top in (0x30, 0x38, 0x08) for code in range(top, top + 8)])
    table8("saturation", "52 to 448",
        [code for code in range(0x60, 0x7F) if code % 3 == 0 or code in (0x65, 0x66, 0x67, 0x68, 0x69)])
    table8("special", "both NaN, both zeros, subnormal and negative scales",
        [0x7F, 0xFF, 0x00, 0x80, 0x01, 0x81, 0x07, 0xB8, 0xFE])

    swizzle = Book("scale_swizzle", {
        "tile": ("Fuser#4745: (32, 4) and (4, 32) confused, wrong for m >= 32; svdquant-kernels aedba4d", "ENC-17"),
        "padding": ("vllm#31097, vllm#38148, vllm#42988: padding left as it was", "ENC-18"),
        "unpadded_shape": ("vllm#23140: shape of the padded result", "ENC-18")})
    for m, g, family in ((128, 4, "tile"), (33, 4, "tile"), (128, 8, "tile"), (1, 1, "padding"), (90, 3, "padding"),
            (31, 5, "padding"), (130, 2, "unpadded_shape"), (150, 5, "unpadded_shape")):
        t = coded("uint8", (m, g), lambda i, j: (i + 37 * j + 5 * (i // 32) + 1) % 256)
        rows, cols = -(-m // 128) * 128, -(-g // 4) * 4
        filled_up = [t.codes[i * g + j] if i < m and j < g else 0 for i, j in product(range(rows), range(cols))]
        swizzle.add(family, "tile128x4", f"m{m}g{g}", "", f"{m} rows, {g} scales each", {"scales": t},
            {"swizzled": laid(Tensor("uint8", (rows, cols), filled_up), "scale_swizzle")})
    return [pack, repack, unified, products, swizzle]


# Quantisers ----------------------------------------------------------------------------------------------------------

Codes = frozenset[int]


@dataclass
class Block:
    """Scale, codes and zero point of one block. Several codes: an approximate step may give any of them. None: undefined."""

    scale: Codes
    codes: list[Codes | None]
    zero: int | None = None


def one(code: int) -> Codes:
    return frozenset((code,))


def largest(values: Sequence[Value], nan_counts: bool) -> Value:
    """Largest magnitude; NaN is ignored (fmax), or the result."""
    numbers = [size(v) for v in values if not is_nan(v)]
    if nan_counts and len(numbers) < len(values):
        return NAN
    return max(numbers, default=ZERO)


def at_least(v: Value, bound: Value) -> Value:
    return v if is_nan(v) or v >= bound else bound


def at_most(v: Value, bound: Value) -> Value:
    return v if is_nan(v) or v <= bound else bound


def clamp(v: Value, low: Value, high: Value) -> Value:
    return at_most(at_least(v, low), high)


def rounded(v: Value) -> Fraction:
    """A finite value to an integer, ties to even."""
    return Fraction(round(real(v)))


def literal(v: float) -> Value:
    """A constant of a source as binary32."""
    return f32(Fraction(v))


FLT_MAX = Fraction(2**24 - 1) * two(104)


def fp8_codes(values: Sequence[Value], fmt: str, top: Value, quotient: Callable[[Value], Value],
        nan: Value | None) -> list[Codes | None]:
    """clamp(quotient, -top, top) to fp8; `nan`: the value NaN becomes, None: it stays."""
    found: list[Codes | None] = []
    for x in values:
        v = quotient(x)
        v = nan if is_nan(v) and nan is not None else clamp(v, -real(top), top)
        found.append(one(encode(fmt, v, saturate=True)))
    return found


def fp8_block(recipe: str, variant: str, values: Sequence[Value], fmt: str, given: Value | None, ub: Value | None) -> Block:
    """One block (or row, or tensor) of fp8_quantize."""
    top = Fraction(448 if fmt == "e4m3fn" else 224)
    torch = recipe != "vllm"
    amax = largest(values, torch)
    if ub is not None:
        amax = at_most(amax, ub)
    floor = f32(1 / (top * 512))
    if recipe == "scaled_quantize":
        bound = Fraction(448 if fmt == "e4m3fn" else 240)
        m = f32(over(top, at_least(amax, literal(1e-12))))
        return Block(one(encode("f32", f32(over(ONE, m)))), fp8_codes(values, fmt, bound, lambda x: f32(times(x, m)), None))
    if recipe == "deepgemm":
        scale: Value = f32(over(at_least(amax, literal(1e-4)), top))
    elif variant == "static":
        assert given is not None
        scale = given
    elif variant == "block":
        scale = f32(over(at_least(amax, literal(1e-10)), top))
    else:
        scale = f32(over(amax, top))
        if variant == "token" or torch:
            scale = at_least(scale, floor)
    inverse = f32(over(ONE, scale))
    divides = recipe == "vllm" and variant in ("token", "block")
    nan = None if torch else (-top if variant == "block" else top)
    return Block(one(encode("f32", scale)),
                 fp8_codes(values, fmt, top, lambda x: f32(over(x, scale) if divides else times(x, inverse)), nan))


def fp8_rule(recipe: str, variant: str, fmt: str, values: list[Value]) -> Block:
    """fp8_block without a given scale or bound."""
    return fp8_block(recipe, variant, values, fmt, None, None)


def int8_block(values: Sequence[Value], fmt: str, narrow: bool) -> Block:
    scale = fit(fmt, at_least(f32(over(largest(values, True), Fraction(127))), literal(1e-5)))
    codes: list[Codes | None] = []
    for x in values:
        v = fit(fmt if narrow else "f32", over(x, scale))
        codes.append(None if is_nan(v) else one(int(rounded(clamp(v, Fraction(-128), Fraction(127)))) & 255))
    return Block(one(encode(fmt, scale)), codes)


def reciprocals(v: Value) -> list[Value]:
    """Every binary32 value within one unit in the last place of 1 / v; subnormal operands and results count as zero."""
    if not is_nan(v) and not is_inf(v) and size(v) < two(-126):
        v = signed(negative(v), ZERO)
    exact = over(ONE, v)
    if is_nan(exact) or is_inf(exact) or exact == 0:
        return [exact]
    magnitude = real(size(exact))
    unit = two(max(log2(magnitude), -126) - 23)
    low, high = encode("f32", magnitude - unit, "ceil"), encode("f32", magnitude + unit, "floor")
    found = [decode("f32", code) for code in range(low, high + 1)]
    return [signed(negative(exact), ZERO if r < two(-126) else r) for r in found]


def to_int4(v: Value, offset: int = 0, bits: str = "int4") -> Codes:
    """clamp(RNE(v), -8, 7) + offset."""
    return one(encode(bits, rounded(clamp(v, Fraction(-100), Fraction(100))) if offset == 0 else
                      Fraction(clamp(rounded(clamp(v, Fraction(-100), Fraction(100))), Fraction(-8), Fraction(7))) + offset))


def int4_block(recipe: str, variant: str, values: Sequence[Value], fmt: str) -> Block:
    """One group of int4_quantize."""

    def narrow(v: Value) -> Value:
        return fit(fmt, v)

    if recipe == "svdquant":
        scale = encode("f16", clamp(f32(over(largest(values, True), Fraction(7))), literal(1e-12), Fraction(65504)))
        quotients = [f32(over(x, decode("f16", scale))) for x in values]
        return Block(one(scale), [None if is_nan(v) else to_int4(v) for v in quotients])
    if recipe == "nunchaku":
        s = f32(times(largest(values, False), f32(Fraction(1, 7))))
        codes: list[Codes | None] = []
        for x in values:
            found = [f32(times(x, r)) for r in reciprocals(s)]
            codes.append(frozenset(code for v in found for code in (one(0) if is_nan(v) else to_int4(v))))
        return Block(one(encode(fmt, s)), codes)
    has_nan = any(is_nan(v) for v in values)
    top, bottom = (NAN, NAN) if has_nan else (max(values), min(values))
    if variant != "asym" and recipe == "quantize_weights":
        high, low = size(narrow(over(top, Fraction(7)))), size(narrow(over(bottom, Fraction(8))))
        s = NAN if has_nan else max(high, low)
        quotients = [narrow(over(x, s)) for x in values]
        offset, bits = (8, "uint4") if variant == "uint4b8" else (0, "int4")
        return Block(one(encode(fmt, s)), [None if is_nan(v) or is_inf(v) else to_int4(v, offset, bits) for v in quotients])
    if recipe == "quantize_weights":
        s = narrow(over(at_least(narrow(minus(top, bottom)), narrow(literal(1e-5))), Fraction(15)))
        ratio = size(narrow(over(bottom, s)))
        if is_nan(ratio):
            return Block(one(encode(fmt, s)), [None] * len(values))
        zero = rounded(clamp(ratio, ZERO, Fraction(15)))
        quotients = [narrow(over(x, s)) for x in values]
        return Block(one(encode(fmt, s)), [
            None if is_nan(v) or is_inf(v) else
            one(int(clamp(rounded(clamp(v, Fraction(-100), Fraction(100))) + zero, ZERO, Fraction(15)))) for v in quotients],
            int(zero))
    epsilon = {"bf16": two(-7), "f16": two(-10), "f32": two(-23)}[fmt]
    if variant == "asym":
        top, bottom = at_least(top, ZERO), at_most(bottom, ZERO)
        s = narrow(over(narrow(minus(top, bottom)), Fraction(15)))
        shifted = narrow(minus(Fraction(-8), narrow(over(bottom, s))))
        point = None if is_nan(shifted) else rounded(clamp(shifted, Fraction(-8), Fraction(7)))
    else:
        s, point = narrow(over(largest(values, True), Fraction(15, 2))), ZERO
    used = epsilon if s == 0 else s
    if point is None:
        return Block(one(encode(fmt, used)), [None] * len(values))
    quotients = [narrow(plus(narrow(over(x, used)), point)) for x in values]
    found2: list[Codes | None] = [
        None if is_nan(v) else one(int(rounded(clamp(v, Fraction(-8), Fraction(7)))) & 15) for v in quotients]
    return Block(one(encode(fmt, used)), found2, int(point) & 15 if variant == "asym" else None)


def e2m1(v: Value, x: Value, mode: str = "rne", zero: str = "sign", nan: int | None = 7) -> Codes | None:
    """The e2m1 code of a quotient. zero: "sign" keeps the sign of a zero result, "negative" sets it where x < 0, "plus" never."""
    if is_nan(v):
        return None if nan is None else one(nan)
    code = encode("e2m1", v, mode, saturate=True)
    if code & 7 == 0 and (zero == "plus" or (zero == "negative" and not (x < 0))):
        code = 0
    return one(code)


def fp4_block(recipe: str, values: Sequence[Value], g: Value) -> Block:
    """One block of nvfp4_quantize; g is the global scale in the recipe's own direction."""

    def scale_code(v: Value) -> int:
        return encode("ue4m3", v, saturate=True)

    sixth, six = f32(Fraction(1, 6)), Fraction(6)
    if recipe == "vllm":
        amax = largest(values, False)
        scales = frozenset(scale_code(f32(times(g, f32(times(amax, r))))) for r in reciprocals(six))
        found: list[set[int]] = [set() for _ in values]
        for code in scales:
            s = decode("ue4m3", code)
            inverses = [ZERO] if s == 0 else [r for rg in reciprocals(g) for r in reciprocals(f32(times(s, rg)))]
            for place, x in enumerate(values):
                for inverse in inverses:
                    found[place] |= e2m1(f32(times(x, inverse)), x) or set()
        return Block(scales, [frozenset(f) for f in found])
    if recipe == "nunchaku":
        unrounded = at_most(f32(times(largest(values, False), sixth)), Fraction(448))
        codes = [frozenset(c for r in reciprocals(unrounded) for c in e2m1(f32(times(x, r)), x) or ()) for x in values]
        return Block(one(scale_code(unrounded)), [*codes])
    amax = largest(values, True)
    if recipe in ("svdquant", "svdquant_triton"):
        raw = f32(over(amax, six) if recipe == "svdquant" else times(amax, sixth))
        code = scale_code(clamp(raw, literal(1e-12), Fraction(448)))
        s = decode("ue4m3", code)
        return Block(one(code), [e2m1(f32(over(x, s)), x, "rna", "negative", 0) for x in values])
    if recipe == "deepgemm":
        s = f32(over(at_least(amax, literal(1e-4)), six))
        inverse = f32(over(ONE, s))
        return Block(one(encode("f32", s)), [e2m1(f32(times(x, inverse)), x, "rntz", "plus", 0) for x in values])
    if recipe in ("vllm_reference", "vllm_emulation"):
        code = scale_code(f32(times(g, f32(times(amax, sixth)))))
        s = decode("ue4m3", code)
        inverse = f32(over(ONE, f32(times(s, f32(over(ONE, g)))))) if s != 0 else (ZERO if recipe == "vllm_reference"
            else literal(1e-8))
        return Block(one(code), [e2m1(f32(times(x, inverse)), x) for x in values])
    if recipe == "compressed_tensors":
        code = scale_code(f32(times(g, f32(over(amax, six)))))
        code = encode("ue4m3", Fraction(1, 8)) if code == 0 else code
        divisor = f32(over(decode("ue4m3", code), g))
        return Block(one(code), [e2m1(f32(over(x, divisor)), x, nan=None) for x in values])
    if recipe == "modelopt":
        raw = f32(over(amax, f32(times(six, g))))
        code = scale_code(clamp(ONE if raw == 0 else raw, two(-9), Fraction(448)))
        divisor = f32(times(decode("ue4m3", code), g))
        return Block(one(code), [e2m1(f32(over(x, divisor)), x, zero="negative") for x in values])
    if recipe == "torchao":
        code = scale_code(clamp(f32(over(f32(over(amax, six)), g)), two(-6), Fraction(448)))
        inverse = f32(over(f32(over(ONE, g)), decode("ue4m3", code)))
        return Block(one(code), [e2m1(f32(times(x, inverse)), x, nan=None) for x in values])
    if recipe == "transformer_engine":
        code = scale_code(f32(times(amax, f32(times(g, sixth)))))
        s = decode("ue4m3", code)
        inverse = at_most(f32(over(ONE, f32(times(s, f32(over(ONE, g)))))), FLT_MAX)
        return Block(one(code), [e2m1(f32(times(x, inverse)), x) for x in values])
    assert recipe == "four_over_six"
    first = f32(times(g, f32(over(amax, six))))
    candidates = []
    for s32 in (first, f32(times(first, Fraction(3, 2)))):
        code = scale_code(s32)
        s = decode("ue4m3", code)
        inverse = ZERO if s == 0 else f32(over(ONE, f32(times(s, f32(over(ONE, g))))))
        codes6 = [e2m1(f32(times(x, inverse)), x, zero="negative", nan=None) for x in values]
        error: Value = ZERO
        for x, c in zip(values, codes6, strict=True):
            if c is None or is_inf(x) or is_nan(s) or is_nan(g) or is_inf(g):
                error = NAN
                break
            e = minus(x, over(times(decode("e2m1", min(c)), s), g))
            error = plus(error, times(e, e))
        candidates.append((error, Block(one(code), [*codes6])))
    (error1, block1), (error2, block2) = candidates
    if is_nan(error1) or is_nan(error2):
        return block1
    apart = abs(real(error1) - real(error2))
    if apart > (error1 + error2) * two(-16):
        return block2 if error2 < error1 else block1
    assert apart <= (error1 + error2) * two(-22), "so near that a bound on binary32 evaluation would decide: choose other values"
    return Block(block1.scale | block2.scale, [None if a is None or b is None else a | b for a,
        b in zip(block1.codes, block2.codes, strict=True)])


def apart(fmt: str, element: str, first: Callable[[list[Value]], Block], second: Callable[[list[Value]], Block]) -> list[Value]:
    """The first block of a fixed sequence on which two rules of fp8 give other codes or another scale. amax is 7 j / 16, so that
    the scale amax / 448 is exact and its reciprocal is not; the elements are ties under that scale."""
    top = 448 if element == "e4m3fn" else 224
    for j in range(3, 4096, 2):
        ladder_ = [Fraction(7 * j, 16 * top) * t for t in ties(element, 3)]
        block = [fit(fmt, Fraction(7 * j, 16)), *(fit(fmt, v) for v in ladder_ if v < Fraction(7 * j, 16))][:31]
        a, b = first(block), second(block)
        if a.scale != b.scale or a.codes != b.codes:
            return block
    raise AssertionError((fmt, element))


def global_scale(recipe: str, values: Sequence[Value]) -> Value:
    """The tensor's own global scale, in the recipe's direction."""
    amax = largest(values, recipe != "vllm")
    if recipe in ("modelopt", "torchao"):
        return f32(over(amax, Fraction(2688)))
    g = f32(over(Fraction(1536 if recipe == "four_over_six" else 2688), amax))
    if recipe == "compressed_tensors":
        return ONE if is_nan(g) or is_inf(g) else g
    if recipe in ("transformer_engine", "four_over_six"):
        return ONE if amax == 0 else at_most(g, FLT_MAX)
    return g


def collected(fmt: str, shape: tuple[int, ...], cells: Sequence[Codes | None]) -> Tensor:
    """A tensor from admissible codes; undefined cells hold 0 and are free."""
    return Tensor(fmt, shape, [0 if c is None else min(c) for c in cells],
                  any_of={i: tuple(sorted(c)) for i, c in enumerate(cells) if c is not None and len(c) > 1},
                  free=tuple(i for i, c in enumerate(cells) if c is None))


def blockwise(x: Tensor, rows: int, columns: int, block: Callable[[list[Value]], Block]) -> tuple[list[Codes | None],
        list[Block]]:
    """Codes of all elements in row-major order, and the blocks of rows x columns."""
    m, k = x.shape
    values = x.values()
    cells: list[Codes | None] = [None] * (m * k)
    blocks = []
    for top, left in product(range(0, m, rows or 1), range(0, k, columns)):
        places = [r * k + c for r in range(top, top + rows) for c in range(left, left + columns)]
        found = block([values[p] for p in places])
        blocks.append(found)
        for p, codes in zip(places, found.codes, strict=True):
            cells[p] = codes
    return cells, blocks


def step(fmt: str, value: Value, by: int) -> Value:
    """The value of a positive finite one's neighbour in a format, `by` codes up."""
    return decode(fmt, encode(fmt, value) + by)


def ties(fmt: str, every: int = 1) -> list[Fraction]:
    """Midpoints of neighbouring non-negative values of an element format, each `every`th."""
    values, largest_code = ladder(fmt)
    return [(values[i] + values[i + 1]) / 2 for i in range(0, largest_code, every)]


def around(fmt: str, value: Fraction) -> list[Value]:
    """A value of a format with its two neighbours."""
    return [step(fmt, value, -1), value, step(fmt, value, 1)]


Row = Sequence[Value | int | float]


def filled(fmt: str, rows: Sequence[Row], k: int) -> Tensor:
    """A matrix of given rows, each cut or filled up with zeros to k, values rounded to the format first."""

    def exact(v: Value | int | float) -> Value:
        if isinstance(v, float) and (not math.isfinite(v) or (v == 0 and negative(v))):
            return fit(fmt, v)
        return fit(fmt, v if isinstance(v, Fraction) else Fraction(v))

    return tensor(fmt, (len(rows), k), [exact(v) for row in rows for v in [*row, *[0] * k][:k]])


FULL = [Fraction((37 * i + 11) * (-1 if i % 3 == 1 else 1), 23 + i % 5) for i in range(64)]
"""Values with full significands in every format, both signs, magnitudes 0.4 to 98."""


def fp8_quantize() -> Book:
    book = Book("fp8_quantize", {
        "ties": ("aiter#3992, arch-com#905: ties of the element format and one step beside them, both signs", "QNT-4"),
        "saturation": ("vllm#4570, disagreement 13: 448, 464 and beyond stay finite; a cast that does not saturate gives NaN",
            "QNT-11"),
        "division": ("disagreement 3, arch-com#905: division, reciprocal or max / amax", "QNT-13"),
        "zero_block": ("disagreement 6: floor of the scale, or scale 0 and codes 0x7E", "QNT-12"),
        "special": ("triton#10745: NaN laundered or kept, infinity, -0", "QNT-13"),
        "range": ("disagreement 11, vllm#31106: 448, 240 and 224", "QNT-10"),
        "upper_bound": ("pytorch#190449: the bound is of amax, not of the scale", "QNT-13"),
        "negative": ("operations, trap 5: positive inputs alone show no sign error", "QNT-4"),
        "padding": ("vllm#20188: rows of padding", "QNT-18"),
        "block": ("vllm#42725: the scale of the wrong block or the wrong row", "QNT-15")})

    def add(family: str, variant: str, tokens: str, comment: str, x: Tensor, *, given: Value | None = None,
        ub: Value | None = None,
            p: int = 0) -> Inputs:
        m, k = x.shape
        words_ = tokens.split()
        fmt = "e4m3fnuz" if "fnuz" in words_ else "e4m3fn"
        recipe = next((t for t in words_ if t in ("vllm_native", "scaled_quantize", "deepgemm")), "vllm")
        rows, columns = {"static": (1, k), "tensor": (m, k), "token": (1, k), "block": (1, 128), "tile": (128, 128)}[variant]
        cells, blocks = blockwise(x, rows, columns, lambda values: fp8_block(recipe, variant, values, fmt, given, ub))
        if variant == "tensor" and m == 0:
            blocks = [fp8_block(recipe, variant, [], fmt, given, ub)]
        extra = max(p - m, 0)
        cells += [one(0) if recipe == "vllm_native" else None] * (extra * k)
        inputs = {"x": x}
        expected = {"q": collected(fmt, (m + extra, k), cells)}
        if given is not None:
            inputs["scale"] = tensor("f32", (1,), [given])
        if ub is not None:
            inputs["scale_ub"] = tensor("f32", (1,), [ub])
        if variant != "static":
            shape = {"tensor": (1,), "token": (m, 1), "block": (m, k // 128), "tile": (m // 128, k // 128)}[variant]
            expected["scales"] = collected("f32", shape, [b.scale for b in blocks])
        return book.add(family, variant, f"m{m}k{k}p{p}", tokens, comment, inputs, expected)

    for fmt, token in (("e4m3fn", "fn"), ("e4m3fnuz", "fnuz")):
        top = 448 if token == "fn" else 224
        beside = [v for t in ties(fmt, 9) for v in around("f32", t)]
        both = [beside, [times(v, Fraction(-1)) for v in beside]]
        for recipe in ("vllm", "vllm_native"):
            tokens = f"f32 {token} {recipe}"
            add("ties", "static", tokens, "scale 1: every ninth tie with its binary32 neighbours, both signs",
                filled("f32", both, len(beside)), given=ONE)
            edge: list[Value | int | float] = [top, top + 2, 464, step("f32", Fraction(464), 1), 466, 240, 248, 250, 480, 10**6,
                two(-11), 3 * two(-12), ZERO]
            add("saturation", "static", tokens, "at and beyond 224, 240, 448 and 464, scale 1",
                filled("f32", [edge, [-Fraction(v) for v in edge]], 13), given=ONE)
            odd: list[Value | int | float] = [NAN, INF, -INF, NEG_ZERO, 0, two(-140), -two(-140), 1]
            add("special", "static", tokens, "NaN, infinities, zeros and subnormals, scale 3/4", filled("f32", [odd], 8),
                given=Fraction(3, 4))
            add("zero_block", "static", f"bf16 {token} {recipe}", "scale 0: its reciprocal is infinite",
                filled("bf16", [[0, 1, -1, NEG_ZERO]], 4), given=ZERO)
            add("division", "static", f"f32 {token} {recipe}", "a scale with a full significand; x at ties times the scale",
                filled(
                "f32", [[times(t, f32(Fraction(5, 7))) for t in ties(fmt, 5)]], 24), given=f32(Fraction(5, 7)))
            scaled_ties = [times(v, two(-3)) for t in ties(fmt, 13)[:-1] for v in around("bf16", t) if v < top]
            for variant in ("token", "tensor"):
                add("ties", variant, f"bf16 {token} {recipe}", "the first element makes the scale 1/8; ties times 1/8", filled(
                    "bf16", [[Fraction(top, 8), *scaled_ties], [-Fraction(top, 8),
                        *(times(v, Fraction(-1)) for v in scaled_ties)]], len(scaled_ties) + 1))
                add("division", variant, f"f16 {token} {recipe}", "full significands; a tie that the reciprocal misses",
                    filled("f16", [
                    FULL[:24], FULL[24:48], FULL[40:64], *([decode("f16", top_code), decode("f16", code)] for top_code,
                        code in ((0x3C50, 0x3A78), (0x3EE4, 0x392B)))], 24)
                    if variant == "token" else filled("f16", [[decode("f16", 0x3C50), decode("f16", 0x3A78)], FULL[:0]], 24))
                add("zero_block", variant, f"bf16 {token} {recipe}", "all zero, both signs",
                    filled("bf16", [[0, NEG_ZERO] * 4], 8))
                add("special", variant, f"bf16 {token} {recipe}",
                    "a row with NaN, one with infinity, one with both infinities, one tiny", filled(
                    "bf16", [[1, NAN, -3, 2], [1, INF, -3, NEG_ZERO], [INF, -INF, 0, NAN], [two(-130), -two(-133), 0, two(-131)]],
                    4))
                add("negative", variant, f"bf16 {token} {recipe}", "all negative",
                    filled("bf16", [[-abs(v) for v in FULL[:8]]], 8))
            add("padding", "token", f"f16 {token} {recipe}", "five rows of codes for three tokens",
                filled("f16", [FULL[i : i + 6] for i in (0, 7, 20)], 6), p=5)
        for ub in (Fraction(3, 2), Fraction(1000), f32(Fraction(1, 100))):
            for recipe in ("vllm", "vllm_native"):
                add("upper_bound", "token", f"f16 {token} {recipe} ub", "amax above and below the bound", filled(
                    "f16", [FULL[:8], [v / 128 for v in FULL[8:16]], [0] * 8], 8), ub=ub)
        lines = [[Fraction(-7, 3), ONE, *FULL], [*FULL[30:64], *[v / 1000 for v in FULL]]]
        marked = [[*row, *[ZERO] * 128][:128] for row in lines]
        wide = [[*row, *(v / 64 for v in other)] for row, other in (marked, marked[::-1])]
        for recipe in ("vllm", "scaled_quantize", "deepgemm"):
            add("block", "block", f"bf16 {token} {recipe}", "two rows of two blocks of other magnitudes",
                filled("bf16", wide, 256))
            add("division", "block", f"f16 {token} {recipe}", "one block with full significands",
                filled("f16", [[Fraction(1007, 1024), Fraction(2021, 4096 * 2), *FULL]], 128))
            add("zero_block", "block", f"bf16 {token} {recipe}", "a block of zeros beside a tiny one",
                filled("bf16", [[0, NEG_ZERO, *[0] * 126, two(-40), -two(-41)]], 256))
            add("special", "block", f"bf16 {token} {recipe}", "NaN in one block, infinity in the other",
                filled("bf16", [[1, NAN, -3, *[0] * 125, 2, -INF, 5]], 256))
            add("range", "block", f"bf16 {token} {recipe}", "amax 448, 240 and 224 times powers of two",
                filled("bf16", [[448, 240, 224, 200, -448], [Fraction(240, 64), Fraction(-224, 64), 1]], 128))
        for fmt16 in ("bf16", "f16"):
            for pair in (("vllm", "deepgemm"), ("vllm", "scaled_quantize"), ("deepgemm", "scaled_quantize")):
                rows = [apart(fmt16, fmt, *(partial(fp8_rule, r, "block", fmt) for r in pair))]
                for recipe in pair:
                    add("division", "block", f"{fmt16} {token} {recipe}", f"a block on which {pair[0]} and {pair[1]} differ",
                        filled(fmt16, rows, 128))
            for variant in ("token", "tensor"):
                rows = [apart(fmt16, fmt, *(partial(fp8_rule, r, "token", fmt) for r in ("vllm", "vllm_native")))]
                for recipe in ("vllm", "vllm_native"):
                    add("division", variant, f"{fmt16} {token} {recipe}", "a row on which a division and a reciprocal differ",
                        filled(fmt16, rows, 32))
        tie_block: list[Value] = [Fraction(top, 4),
            *(times(v, two(-2)) for t in ties(fmt, 5)[:-2] for v in around("bf16", t) if v < top)]
        for recipe in ("vllm", "scaled_quantize", "deepgemm"):
            add("ties", "block", f"bf16 {token} {recipe}", "the first element makes the scale 1/4; ties times 1/4", filled(
                "bf16", [tie_block, [times(v, Fraction(-1)) for v in tie_block]], 128))
        for comment, sparse in (("NaN in the last row", {127 * 128 + 5: 0x7FC0, 3: 0x4000}),
            ("below the floor, both signs", {0: 0x3800, 16383: 0xB700}),
                                ("ties of the element format", {i * 129: encode("bf16", v) for i,
                                        v in enumerate(tie_block[:127])})):
            add("ties" if "ties" in comment else "special", "tile", f"bf16 {token} deepgemm", comment,
                Tensor("bf16", (128, 128), [sparse.get(i, 0) for i in range(128 * 128)]))
        tile = coded("bf16", (128, 128), lambda m, k: 0x3F80 + m + 128 * (k % 2) if m == k else 0)
        add("block", "tile", f"bf16 {token} deepgemm", "a diagonal: the largest element is in the last row", tile)
    odd_pair = {"x": filled("f16", [[6, -5, 4, 3]], 4)}["x"]
    for token in ("fn", "fnuz"):
        add("range", "token", f"f16 {token}", "the same row for both formats", odd_pair)
    for recipe in ("vllm", "vllm_native"):
        add("zero_block", "tensor", f"bf16 fn {recipe}", "no rows at all", Tensor("bf16", (0, 4), []))
    for fmt, token in (("e4m3fn", "fn"), ("e4m3fnuz", "fnuz")):
        row = apart("bf16", fmt, *(partial(fp8_rule, recipe, "block", fmt) for recipe in ("vllm", "deepgemm")))
        add("division", "tile", f"bf16 {token} deepgemm", "one live row, on which a division and a reciprocal differ", filled(
            "bf16", [row, *[[0]] * 127], 128))
    return book


def int8_quantize() -> Book:
    book = Book("int8_quantize", {
        "ties": ("arch-com#905: ties to even, and one step beside them, both signs", "QNT-21"),
        "floor": ("operations X1: 1e-5, rounded to the format of x (0x00A8 in binary16)", "QNT-20"),
        "stored_scale": ("operations X1: the scale is rounded first; -128 can be reached", "QNT-21"),
        "division": ("disagreement 3, arch-com#905: division or reciprocal", "QNT-21"),
        "narrow": ("disagreement 3: quotient rounded to the format of x, then to an integer", "QNT-21"),
        "special": ("compressed-tensors#393: NaN and infinity", "QNT-22"),
        "zero_row": ("disagreement 6: zero rows", "QNT-20"),
        "negative": ("operations, trap 5: sign", "QNT-21")})

    def add(family: str, tokens: str, comment: str, x: Tensor) -> Inputs:
        m, k = x.shape
        cells, blocks = blockwise(x, 1, k, lambda values: int8_block(values, x.format, "narrow" in tokens))
        return book.add(family, "token", f"m{m}k{k}", tokens, comment, {"x": x}, {
            "q": collected("int8", (m, k), cells), "scales": collected(x.format, (m, 1), [b.scale for b in blocks]),
            "zeros": Tensor("int32", (m, 1), [0] * m)})

    for fmt in ("bf16", "f16", "f32"):
        places = [Fraction(2 * i + 1, 2) for i in (0, 1, 2, 3, 30, 31, 61, 62)]
        near = [v for t in places for v in around(fmt, t)]
        row = [127, *near, *(times(v, Fraction(-1)) for v in near)]
        for quotient in ("wide", "narrow"):
            add("ties", f"{fmt} {quotient}", "amax 127 makes the scale 1; ties with their neighbours",
                filled(fmt, [row, [times(Fraction(v), two(-3)) for v in row]], len(row)))
            add("narrow", f"{fmt} {quotient}", "full significands", filled(fmt, [FULL[:32], FULL[32:64]], 32))
        add("stored_scale", fmt, "a scale that is rounded down: |x / scale| passes 127",
            filled(fmt, [[-v, v, v / 2, -v / 3] for v in (
            Fraction(127 * 257, 256), Fraction(129), Fraction(1000, 7), Fraction(-31, 3), Fraction(12345, 67))], 4))
        add("floor", fmt, "amax / 127 below, at and above 1e-5", filled(fmt,
            [[two(-12), -two(-11)], [Fraction(127, 10**5), two(-16)], [two(-9), 0], [two(-23), -two(-20)]], 2))
        add("zero_row", fmt, "zeros of both signs", filled(fmt, [[0, 0, 0], [NEG_ZERO, 0, NEG_ZERO]], 3))
        add("special", fmt, "NaN; infinity; both infinities; the largest finite value",
            filled(fmt, [[1, NAN, -2], [INF, 3, -1], [-INF, INF, 0], [60000, -1, 5]], 3))
        add("negative", fmt, "all negative", filled(fmt, [[-abs(v) for v in FULL[:16]]], 16))
    add("division", "bf16", "quotients that a reciprocal rounds to the other integer", filled(
        "bf16", [[decode("bf16", code) for code in pair] for pair in ((0x406E, 0x3E43), (0x404E, 0x3E29))], 2))
    add("special", "bf16 narrow", "NaN; infinity; both infinities", filled("bf16", [[1, NAN, -2], [INF, 3, -1], [-INF, INF, 0]],
        3))
    return book


def int4_quantize() -> Book:
    book = Book("int4_quantize", {
        "scale_rule": ("disagreement 1: amax / 7, amax / 7.5 or max(max / 7, |min| / 8)", "QNT-32"),
        "ties": ("arch-com#905: ties to even, and one step beside them", "QNT-3"),
        "zero_group": ("disagreement 6, lmdeploy#3652, gemlite#38: zero groups", "QNT-37"),
        "special": ("compressed-tensors#637: NaN and infinity", "QNT-5"),
        "offset": ("disagreement 9, tilelang#2477: value + 8", "QNT-31"),
        "zero_point": ("vllm#26092, compressed-tensors#458: zero points at both ends, min > 0, max < 0", "QNT-33"),
        "unrounded": ("disagreement 2: codes from the scale before it is rounded", "QNT-36"),
        "group": ("vllm#39705: scale of the wrong group", "QNT-30"),
        "division": ("disagreement 3, arch-com#905: division or reciprocal", "QNT-35"),
        "negative": ("operations, trap 5: one sign alone", "QNT-32")})

    def add(family: str, variant: str, tokens: str, comment: str, x: Tensor, g: int = 64) -> Inputs:
        n, k = x.shape
        recipe = next((t for t in tokens.split() if t in OPTIONS["int4_quantize"][1]), "quantize_weights")
        cells, blocks = blockwise(x, 1, g, lambda values: int4_block(recipe, variant, values, x.format))
        unsigned = variant == "uint4b8" or (variant == "asym" and recipe == "quantize_weights")
        element = "uint4" if unsigned else "int4"
        shape = (n, k // g)
        expected = {"q": collected(element, (n, k), cells),
                    "scales": collected("f16" if recipe == "svdquant" else x.format, shape, [b.scale for b in blocks])}
        if variant == "asym":
            expected["zeros"] = collected(element, shape, [None if b.zero is None else one(b.zero) for b in blocks])
        return book.add(family, variant, f"n{n}k{k}g{g}", tokens, comment, {"x": x}, expected)

    def tie_row(fmt: str, top: Fraction, low: int, high: int) -> list[Value]:
        near = [v for i in range(high) for v in around(fmt, Fraction(2 * i + 1, 2))]
        return [top, *near, *(times(v, Fraction(-1)) for v in near if size(v) < -low)][:64]

    shared = filled("f16", [[-7, Fraction(7, 2), 1, 3, -2, 5, Fraction(-9, 2)], [7, -1, 2, Fraction(5, 2), -3], FULL[:64]], 64)
    systems = (("sym", "quantize_weights"), ("sym", "compressed_tensors"), ("sym", "svdquant"), ("sym", "nunchaku"),
               ("uint4b8", "quantize_weights"), ("asym", "quantize_weights"), ("asym", "compressed_tensors"))
    for variant, recipe in systems:
        f16, bf16 = f"f16 {recipe}", f"bf16 {recipe}"
        top = {"compressed_tensors": Fraction(15, 2)}.get(recipe, Fraction(7))
        add("scale_rule", variant, f16, "the same rows for every recipe: -7 beside 3.5, 7, full significands", shared)
        if variant == "asym":
            low, spread = (-7, 8) if recipe == "quantize_weights" else (-8, 7)
            for fmt in ("bf16", "f16"):
                near = [v for i in range(1, 7) for v in around(fmt, Fraction(2 * i + 1, 2))]
                add("ties", variant, f"{fmt} {recipe}", "range 15 makes the scale 1; ties with their neighbours", filled(
                    fmt, [[low, spread, *near, *(times(v, Fraction(-1)) for v in near)],
                        [Fraction(2 * low + 1, 2), Fraction(2 * spread + 1, 2), *near]], 64))
            add("zero_point", variant, bf16, "min 0, max 0, min > 0, max < 0",
                filled("bf16", [[0, 15, 4, 7], [0, -15, -4, -7], [2, 17, 5, 8] * 16, [-2, -17, -5, -8] * 16], 64))
            add("negative", variant, bf16, "all of one sign, full significands",
                filled("bf16", [[abs(v) for v in FULL], [-abs(v) for v in FULL]], 64))
            add("offset", variant, f16, "zero points 1 to 14", filled("f16",
                [[-i, 15 - i, 1, Fraction(1, 2)] for i in (1, 3, 8, 12, 14)], 64))
        else:
            for fmt in ("bf16", "f16"):
                add("ties", variant, f"{fmt} {recipe}", "the first element makes the scale 1; ties with their neighbours", filled(
                    fmt, [tie_row(fmt, top, -8, 7), [times(v, two(-3)) for v in tie_row(fmt, top, -8, 7)]], 64))
            add("negative", variant, bf16, "all of one sign, full significands",
                filled("bf16", [[abs(v) for v in FULL], [-abs(v) for v in FULL]], 64))
            add("offset", variant, f16, "-8, -7 and 7 after rounding", filled("f16",
                [[-8, 7, 1], [8, -7, 1], [Fraction(15, 2), Fraction(-15, 2), 1]], 64))
        add("zero_group", variant, bf16, "a group of zeros beside a live one",
            filled("bf16", [[*[0, NEG_ZERO] * 32, *FULL]], 128))
        add("special", variant, bf16, "NaN; infinity; minus infinity; both; underflow", filled("bf16", [
            [1, NAN, -3], [1, INF, -3], [2, -INF, 5], [INF, -INF, 1], [two(-100), -two(-101)], [two(-133), -two(-132)]], 64))
        if recipe in ("quantize_weights", "compressed_tensors"):
            add("group", variant, f"bf16 {recipe}", "groups of 32 whose scales differ by powers of two", filled("bf16", [
                [times(v, two(i // 32 * 3)) for i, v in enumerate([*FULL, *FULL])]], 128), g=32)
            add("group", variant, f"f16 {recipe}", "the group is the whole of K and no power of two",
                filled("f16", [FULL[:24], FULL[24:48]], 24), g=24)
            add("unrounded", variant, f"f32 {recipe}", "binary32 weights", filled("f32", [FULL], 64))
        else:
            add("group", variant, f"bf16 {recipe}", "two groups of other magnitudes",
                filled("bf16", [[*FULL, *[v / 256 for v in FULL]]], 128))
            add("unrounded", variant, bf16, "amax 7.03125 / 7 is no bf16 value",
                filled("bf16", [[Fraction(225, 32), *(Fraction(2 * i + 1, 2) for i in range(7))]], 64))
    for recipe, pairs in (("svdquant", ((0x40B6, 0x40A9), (0x40D2, 0x40C3))),
            ("quantize_weights", ((0x40FA, 0x3FD6), (0x40AC, 0x3EC6)))):
        add("division", "sym", f"bf16 {recipe}", "quotients that a reciprocal rounds to the other integer", filled(
            "bf16", [[decode("bf16", code) for code in pair] for pair in pairs], 64))
    add("scale_rule", "sym", "f32 svdquant", "a scale beyond 65504 is bounded", filled("f32", [[10**6, -10**6, 3 * 10**5]], 64))
    return book


def nvfp4_quantize() -> Book:
    book = Book("nvfp4_quantize", {
        "ties": ("disagreement 4, aiter#2247: 0.25, 1.25, 2.5 and 5 to even or away; compressed-tensors#820: neighbours of ties",
            "QNT-50"),
        "stored_scale": ("disagreement 2: codes from the stored or the unrounded scale", "QNT-51"),
        "division": ("disagreement 3: division, reciprocal, approximate reciprocal", "QNT-42"),
        "global_scale": ("disagreement 5, modular#6600: divisor, multiplier or none", "QNT-41"),
        "zero_block": ("disagreement 6, hf kernels#680: scale 0, 0.125, 1 or 2^-6, codes 0 or 6", "QNT-45"),
        "underflow": ("vllm#34577, disagreement 6: a scale that rounds to zero under live elements", "QNT-44"),
        "saturation": ("Model-Optimizer#1397: a block scale of 448 and more becomes NaN", "QNT-40"),
        "special": ("triton#3997: NaN is +6, infinities, -0 and small negatives", "QNT-40"),
        "swizzle": ("vllm#23140, Fuser#4745, svdquant-kernels aedba4d: scales in 128x4 tiles, padding zero", "QNT-52"),
        "choice": ("fouroversix: 4 or 6 by the squared error", "QNT-49"),
        "block": ("vllm#35210: half of the columns processed; svdquant-kernels aedba4d: scale of another block", "QNT-40")})
    encode_side = ("vllm", "vllm_reference", "vllm_emulation", "compressed_tensors", "transformer_engine", "four_over_six")
    decode_side = ("modelopt", "torchao")
    one_level = ("svdquant", "svdquant_triton", "nunchaku", "deepgemm")

    def add(family: str, recipe: str, fmt: str, comment: str, x: Tensor, *, g: Value | None = None, dynamic: bool = False,
            swizzled: bool = False) -> Inputs:
        m, k = x.shape
        width = 128 if recipe == "deepgemm" else 16
        used = global_scale(recipe, x.values()) if dynamic else (g if g is not None else ONE)
        cells, blocks = blockwise(x, 1, width, lambda values: fp4_block(recipe, values, used))
        scales = collected("f32" if recipe == "deepgemm" else "ue4m3", (m, k // width), [b.scale for b in blocks])
        if swizzled:
            rows, cols = -(-m // 128) * 128, -(-(k // 16) // 4) * 4
            assert not scales.any_of
            scales = laid(coded("ue4m3", (rows, cols), lambda i, j: scales.codes[i * (k // 16) + j] if i < m and j < k // 16
                else 0), "scale_swizzle")
        inputs, expected = {"x": x}, {"q": collected("e2m1", (m, k), cells), "scales": scales}
        if dynamic:
            expected["global_scale"] = tensor("f32", (1,), [used])
        elif g is not None:
            inputs["global_scale"] = tensor("f32", (1,), [g])
        variant = "dynamic" if dynamic else ("static" if g is not None else "none")
        return book.add(family, variant, f"m{m}k{k}", f"{fmt} {recipe}" + (" swizzled" if swizzled else ""), comment, inputs,
            expected)

    points = [Fraction(n, 4) for n in (1, 3, 5, 7, 10, 14, 20)]
    tie_rows: list[Row] = [[6, *points, *(-p for p in points), -6]]
    near: list[Row] = [[6, *(step("bf16", p, by) for p in points), *(-real(step("bf16", p, by)) for p in points), 0]
        for by in (-1, 1)]
    rows_all: list[Row] = [*tie_rows, *near, [Fraction(51, 8), Fraction(83, 16), *FULL[:14]]]
    special_rows: list[list[Value | int | float]] = [
        [1, NAN, -3, 2, NEG_ZERO], [1, INF, -3, NEG_ZERO, 0], [-INF, INF, 2, -1, 0],
        [6, NEG_ZERO, two(-20), -two(-20), Fraction(-1, 8)], [NAN] * 16]
    for recipe in (*encode_side, *decode_side, *one_level):
        two_level = recipe not in one_level
        fmt = "bf16"
        k = 128 if recipe == "deepgemm" else 16
        reveal = [f32(Fraction(2688, 37)), two(5)] if recipe in encode_side else [f32(Fraction(37, 2688)), two(-5)]
        unit = ONE if two_level else None
        add("ties", recipe, fmt, "amax 6 makes the scale 1: all ties and their neighbours, then a scale tie",
            filled(fmt, rows_all, k), g=unit)
        add("zero_block", recipe, fmt, "zeros of both signs beside a live row",
            filled(fmt, [[0] * 16, [NEG_ZERO] * 16, [0, 3, NEG_ZERO, -6]], k), g=unit)
        add("special", recipe, fmt, "NaN, infinities, -0, small negatives, a block of NaN", filled(fmt, special_rows, k), g=unit)
        add("underflow", recipe, "f16", "block scales below, at and above half of 2^-9", filled("f16", [
            [6 * two(-10), -two(-10)], [6 * two(-10) + two(-17), -two(-9)], [6 * two(-11), two(-12), -two(-12)],
            [two(-24), -two(-23)]], k), g=unit)
        add("saturation", recipe, fmt, "block scales of 440 to 480 and beyond",
            filled(fmt, [[2688, 1344, -100], [2784, 2000, -2784], [2800, -2688], [10**6, 1]], k), g=unit)
        add("stored_scale", recipe, "f16", "6.375 / 6 is a tie of the scale format; full significands", filled("f16", [
            [Fraction(51, 8), Fraction(83, 16), Fraction(17, 8)], FULL[:16], FULL[16:32], [v / 64 for v in FULL[32:48]]], k),
            g=unit)
        if two_level:
            for value in reveal:
                add("global_scale", recipe, fmt, "a global scale that is not its own inverse",
                    filled(fmt, [FULL[:16], [v / 8 for v in FULL[16:32]]], 16), g=value)
        if two_level and recipe != "vllm":
            add("global_scale", recipe, fmt, "the tensor's own global scale",
                filled(fmt, [FULL[:16], [v / 8 for v in FULL[16:32]]], 16), dynamic=True)
            add("zero_block", recipe, fmt, "a tensor of zeros", filled(fmt, [[0] * 16], 16), dynamic=True)
        wide = 256 if recipe == "deepgemm" else 64
        add("block", recipe, fmt, "four blocks of other magnitudes", filled(fmt,
            [[times(FULL[i % 64], two(-(i * 8 // wide))) for i in range(wide)]], wide), g=unit)
        if recipe == "vllm":
            continue
        add("division", recipe, "f32", "binary32 activations", filled("f32", [FULL[:16], [Fraction(v, 3) for v in FULL[16:32]]],
            k), g=unit) if (
            recipe != "nunchaku") else None
        if recipe != "deepgemm":
            add("swizzle", recipe, fmt, "34 rows of three blocks: two padded columns, 94 padded rows", filled(
                fmt, [[times(FULL[(i * 5 + j) % 64], two(i % 4 - j // 16)) for j in range(48)] for i in range(34)], 48), g=unit,
                swizzled=True) if (
                recipe in ("vllm_reference", "svdquant")) else None
    add("division", "svdquant", "f32", "amax / 6 just below a tie of the scale", filled("f32", [[decode("f32", 0x3DE3FFFF)]], 16))
    add("division", "svdquant_triton", "f32", "amax * fl(1/6) at that tie", filled("f32", [[decode("f32", 0x3DE3FFFF)]], 16))
    for name in ("svdquant", "nunchaku", "deepgemm"):
        add("ties", name, "bf16", "one row of 128 for the three rules of ties", filled("bf16", tie_rows, 128))
    for name in ("compressed_tensors", "modelopt", "vllm_reference"):
        add("global_scale", name, "bf16", "the same number as divisor and as multiplier", filled("bf16", [FULL[:16]], 16),
            g=two(3))
    for name in ("vllm_reference", "compressed_tensors", "modelopt", "torchao", "transformer_engine"):
        add("zero_block", name, "f16", "one zero block, global scale 1", filled("f16", [[0] * 16], 16), g=ONE)

    def told(one_recipe: str, other: str, fmt: str) -> None:
        """Rows on which two recipes differ: elements at ties of e2m1 under a scale of amax / 6, then a scale at a tie."""
        dynamic, found = one_recipe not in one_level, 0
        for j in range(7, 1024):
            block = [fit(fmt, Fraction(3 * j, 8)),
                *(fit(fmt, Fraction(sign * j * int(4 * p), 64)) for p in points for sign in (1, -1)), ZERO]
            row = [*block, *(fit(fmt, times(v, Fraction(17 + 2 * (j % 8), 56))) for v in block)]
            answers = []
            for name in (one_recipe, other):
                g = global_scale(name, row) if dynamic else ONE
                blocks = [fp4_block(name, part, g) for part in (row[:16], row[16:])]
                answers.append([(b.scale, b.codes) for b in blocks])
            if answers[0] != answers[1]:
                found += 1
                for name in (one_recipe, other):
                    add("division", name, fmt, f"a row on which {one_recipe} and {other} differ", filled(fmt, [row], 32),
                        dynamic=dynamic)
            if found == 2:
                return
        raise AssertionError((one_recipe, other, fmt, found))

    for fmt in ("bf16", "f16"):
        for pair in (("vllm_reference", "compressed_tensors"), ("vllm_reference", "transformer_engine"), ("modelopt", "torchao"),
                     ("svdquant", "nunchaku")):
            told(*pair, fmt)
    add("choice", "four_over_six", "bf16", "a block that 4 fits better, one that 6 fits better, one that both fit",
        filled("bf16", [
        [4, 3, 2, 1, 4, 4, -4, -3], [6, 5, 4, 3, 2, 1, -6], [6, 6, 6, 0, -6], [4, Fraction(8, 3), Fraction(4, 3), -4]], 16),
        g=ONE)
    return book


def svdquant_quantize() -> Book:
    book = Book("svdquant_quantize", {
        "lora_raw": ("nunchaku#33, nunchaku#95: low-rank term from the smoothed activations", "QNT-63"),
        "smooth": ("operations S2: x / smooth, not times", "QNT-62"),
        "ties": ("disagreement 4: ties of e2m1, and of int4", "QNT-61"),
        "padding": ("svdquant-kernels quantize: rows up to a multiple of 256 left as they were", "QNT-64"),
        "scale_layout": ("svdquant-kernels aedba4d: scales stored along K first", "QNT-65"),
        "zero_block": ("disagreement 6: zero rows", "QNT-61")})

    def add(family: str, variant: str, tokens: str, comment: str, x: Tensor, smooth: Tensor, down: Tensor) -> Inputs:
        (m, k), r = x.shape, down.shape[1]
        words_ = tokens.split()
        recipe = next((t for t in words_ if t != x.format), "svdquant")
        rows, width = -(-m // 256) * 256, 16 if variant == "nvfp4" else 64
        fmt, values = ("f32" if recipe != "nunchaku" else x.format), []
        for place, v in enumerate(x.values()):
            exact = over(v, decode(smooth.format, smooth.codes[place % k]))
            if recipe == "nunchaku" and real(exact):  # 2 ulp of binary32 either way must not show in the format of x
                reach = 2 * two(log2(real(exact)) - 23)
                assert fit(fmt, f32(plus(exact, reach))) == fit(fmt, f32(minus(exact, reach))), (family, place)
            values.append(fit(fmt, f32(exact)))
        smoothed = Tensor(fmt, (m, k), [encode(fmt, v) for v in values])

        def block(part: list[Value]) -> Block:
            return fp4_block(recipe, part, ONE) if variant == "nvfp4" else int4_block(recipe, "sym", part, x.format)

        cells, blocks = blockwise(smoothed, 1, width, block)
        cells += [one(0)] * ((rows - m) * k)
        scales = [b.scale for b in blocks] + [one(0)] * ((rows - m) * (k // width))
        bits = Width()
        columns = [[down.codes[i * r + j] for i in range(k)] for j in range(r)]
        sums = [dot(terms(x, (row,)), terms(Tensor(down.format, (1, k), column), (0,)), bits) for row in range(m)
            for column in columns]
        act = [encode("f32", v) & (0x7FFFFFFF if v == 0 else 0xFFFFFFFF) for v in sums] + [0] * ((rows - m) * r)
        assert bits.bits <= 14, bits
        scale_format = "ue4m3" if variant == "nvfp4" else ("f16" if recipe == "svdquant" else x.format)
        return book.add(family, variant, f"m{m}k{k}r{r}", tokens, comment, {"x": x, "smooth": smooth, "lora_down": down}, {
            "lora_act": replace(Tensor("f32", (rows, r), act), either_zero=True),
            "q": collected("e2m1" if variant == "nvfp4" else "int4", (rows, k), cells),
            "scales": collected(scale_format, (k // width, rows),
                [scales[row * (k // width) + g] for g in range(k // width) for row in range(rows)]),
        }, bits.bits, "any")

    def down(fmt: str, k: int, r: int = 16) -> Tensor:
        return tensor(fmt, (k, r), lambda i, j: small(i, j, -2, 2) if (i + j) % 3 == 0 else 0)

    points = [Fraction(n, 4) for n in (1, 3, 5, 7, 10, 14, 20)]
    halves = [Fraction(2 * i + 1, 2) for i in range(7)]
    for variant, recipe in (("nvfp4", "svdquant"), ("nvfp4", "svdquant_triton"), ("nvfp4", "nunchaku"), ("int4", "svdquant"),
            ("int4", "nunchaku")):
        k = 32 if variant == "nvfp4" else 64
        for fmt in ("bf16", "f16"):
            tokens = f"{fmt} {recipe}"
            ones = tensor(fmt, (k,), lambda i: 1)
            powers = tensor(fmt, (k,), lambda i: two(i % 3 - 1))
            tie: list[Value | int] = [6, *points, *(-p for p in points), -6] if variant == "nvfp4" else [7, *halves,
                *(-h for h in halves)]
            rows: list[list[Value | int | float]] = [[*tie, *[Fraction(v) / 2 for v in tie]],
                [*[Fraction(v) / 4 for v in tie], *tie]]
            add("ties", variant, tokens, "ties of the elements, smooth 1", filled(fmt, rows, k), ones, down(fmt, k))
            ramp = filled(fmt, [[small(i, j, -12, 12) for j in range(k)] for i in range(3)], k)
            add("smooth", variant, tokens, "smooth by powers of two", ramp, powers, down(fmt, k))
            add("zero_block", variant, tokens, "a row of zeros beside a live one",
                filled(fmt, [[0] * k, [small(5, j, -9, 9) for j in range(k)]], k), powers, down(fmt, k))
            if recipe != "nunchaku":
                uneven = tensor(fmt, (k,), lambda i: Fraction(3 + i % 5, 4))
                add("lora_raw", variant, tokens, "smooth by 3/4 to 7/4: the low-rank term sees x itself", ramp, uneven,
                    down(fmt, k))
    one_live = filled("bf16", [[small(i, j, -7, 7) * (1 + 7 * (j // 16)) for j in range(64)] for i in range(2)], 64)
    eights = tensor("bf16", (64,), lambda i: two(i // 16))
    add("scale_layout", "nvfp4", "bf16 svdquant", "four blocks per row, scales apart", one_live, eights,
        tensor("bf16", (64, 16), lambda i, j: 1 if i % 16 == j else 0))
    add("scale_layout", "int4", "f16 svdquant", "two groups per row, scales apart",
        filled("f16", [[small(i, j, -7, 7) * (1 + 3 * (j // 64)) for j in range(128)] for i in range(2)], 128),
        tensor("f16", (128,), lambda i: 1), tensor("f16", (128, 16), lambda i, j: 1 if i % 16 == j else 0))
    add("padding", "nvfp4", "bf16 svdquant", "one row: 255 rows of padding", filled("bf16", [[1] * 16], 16),
        tensor("bf16", (16,), lambda i: 2), down("bf16", 16))
    add("padding", "int4", "f16 svdquant", "257 rows: 255 rows of padding in the second tile",
        tensor("f16", (257, 64), lambda i, j: small(i, j, -7, 7) if j == i % 64 else 0),
        tensor("f16", (64,), lambda i: 2), tensor("f16", (64, 16), lambda i, j: 1 if i == j else 0))
    return book


def conversions() -> list[Book]:
    fold = Book("scale_fold", {
        "double_rounding": ("operations W6: 24 codes lose bits when they are divided by 8", "ENC-20"),
        "quantise": ("operations W6, disagreement 3: division or reciprocal", "ENC-19"),
        "zero_row": ("disagreement 6: floor 1 / (448 * 512)", "ENC-21"),
        "special": ("compressed-tensors#637: NaN and infinity", "ENC-21"),
        "saturation": ("operations W6: no group scale beyond 56, so that -8 s is at most 448", "ENC-20")})

    def fold_rows(family: str, comment: str, scales: Tensor) -> None:
        n, groups = scales.shape
        for recipe in ("vllm", "vllm_native"):
            def block(values: list[Value], recipe: str = recipe) -> Block:
                return fp8_block(recipe, "token", values, "e4m3fn", None, None)

            cells, blocks = blockwise(scales, 1, groups, block)
            halved = [encode("e4m3fn", over(decode("e4m3fn", min(c or ())), Fraction(8))) for c in cells]
            channel = [encode("f32", times(decode("f32", min(b.scale)), Fraction(8))) for b in blocks]
            fold.add(family, "row", f"n{n}k{128 * groups}", recipe, comment, {"scales": scales}, {
                "group_scale": Tensor("e4m3fn", (n, groups), halved), "channel_scale": Tensor("f32", (n, 1), channel)})
    every = [decode("e4m3fn", code) for code in range(0x7F)]
    fold_rows("double_rounding", "row amax 448: every e4m3 value", filled("bf16",
        [every, [times(v, Fraction(-1)) for v in every]], 127))
    fold_rows("double_rounding", "row amax 448: ties of e4m3 and their bf16 neighbours",
        filled("bf16", [[448, *(v for t in ties("e4m3fn", 6) for v in around("bf16", t))]], 64))
    fold_rows("quantise", "full significands",
        filled("bf16", [FULL[:16], [v / 7 for v in FULL[16:32]], [v / 1000 for v in FULL[32:48]]], 16))
    fold_rows("quantise", "one group per row", filled("bf16", [[v] for v in FULL[:8]], 1))
    fold_rows("zero_row", "zeros, and rows below the floor", filled("bf16",
        [[0, NEG_ZERO, 0], [two(-20), -two(-30), 0], [two(-9), two(-10), -two(-12)]], 3))
    fold_rows("special", "NaN; infinity; both", filled("bf16", [[1, NAN, -2], [1, INF, -2], [-INF, NAN, 3]], 3))
    fold_rows("saturation", "a wide row", filled("bf16", [[1000, 999, -1000, 1, two(-8), two(-12), -two(-14)]], 7))

    convert = Book("fp8_convert_fnuz", {
        "bytes": ("triton#10745: 0x80 alone becomes 0; 0x7F and 0xFF become 240 and -240", "ENC-22"),
        "scales": ("vllm#14689: doubled once, on fnuz hardware alone", "ENC-23"),
        "overflow": ("vllm#14689: doubling beyond binary32 is infinite", "ENC-23"),
        "kept": ("vllm#14689, vllm#42893: e4m3fn hardware keeps everything", "ENC-23")})

    def converted(family: str, variant: str, tokens: str, comment: str, w: Tensor, weight: Sequence[Value],
            given: Value | None) -> None:
        fnuz = "fn" not in tokens.split()
        n, k = w.shape
        shape = (1,) if variant == "tensor" else (n, 1)
        inputs = {"w": w, "weight_scale": tensor("f32", shape, list(weight))}
        factor = Fraction(2) if fnuz else ONE
        expected = {"w_out": replace(w, codes=[0 if code == 0x80 and fnuz else code for code in w.codes]),
                    "weight_scale_out": tensor("f32", shape, [f32(times(v, factor)) for v in weight])}
        if given is not None:
            inputs["input_scale"] = tensor("f32", (1,), [given])
            expected["input_scale_out"] = tensor("f32", (1,), [f32(times(given, factor))])
        convert.add(family, variant, f"n{n}k{k}", tokens, comment, inputs, expected)
    every_byte = coded("uint8", (8, 32), lambda i, j: 32 * i + j)
    odd = coded("uint8", (3, 5), lambda i, j: (0x80, 0x7F, 0xFF, 0x00, 0x01)[(i + j) % 5])
    for hardware, family in (("fnuz", "bytes"), ("fn", "kept")):
        converted(family, "tensor", hardware, "every byte", every_byte, [Fraction(3, 4)], None)
        converted(family, "tensor", f"{hardware} static", "special bytes, a static input scale", odd, [Fraction(5, 4)],
            Fraction(3, 8))
        converted(family, "channel", f"{hardware} static", "a scale per channel", odd, [Fraction(1), Fraction(3, 2), two(-149)],
            two(-126))
    converted("scales", "channel", "fnuz", "a scale per channel, subnormal, negative and zero", odd,
        [two(-149), Fraction(-3), ZERO], None)
    converted("overflow", "channel", "fnuz static", "2^127 and beyond", odd, [two(127), FLT_MAX, two(126)], FLT_MAX)

    again = Book("fp8_requantize", {
        "max_scale": ("vllm#34476: every shard by the largest scale, widths as given", "ENC-26"),
        "via_f16": ("operations D2: the product in binary16 overflows and rounds", "ENC-26"),
        "fused": ("vllm#39765: the slot of a fused checkpoint holds the least finite value", "ENC-27"),
        "channel": ("operations D2: each shard's scale over its own rows", "ENC-28"),
        "special": ("vllm#4570: NaN bytes become the largest code; saturation", "ENC-26"),
        "ties": ("arch-com#905: reciprocal of the scale, not a division", "ENC-26")})

    def shards(family: str, variant: str, tokens: str, comment: str, w: Tensor, scales: Sequence[Value],
            widths: Sequence[int]) -> None:
        n, k = w.shape
        inputs = {"w": w, "scales": tensor("f32", (len(scales),), list(scales)), "widths": coded("int32", (len(widths),), widths)}
        owner = [shard for shard, count in enumerate(widths) for _ in range(count)]
        assert len(owner) == n
        dims = f"n{n}k{k}s{len(widths)}"
        if variant == "channel":
            again.add(family, variant, dims, tokens, comment, inputs,
                {"channel_scale": tensor("f32", (n, 1), [scales[o] for o in owner])})
            return
        biggest = max(scales)
        if "fused" in tokens.split():
            out = replace(w, nan_bytes=True)
        else:
            top, inverse = Fraction(448 if w.format == "e4m3fn" else 224), f32(over(ONE, biggest))
            codes = []
            for place, v in enumerate(w.values()):
                value = f32(times(v, scales[owner[place // k]]))
                value = fit("f16", value) if variant == "max_scale_f16" else value
                quotient = f32(times(value, inverse))
                codes.append(encode(w.format, top if is_nan(quotient) else clamp(quotient, -top, top), saturate=True))
            out = Tensor(w.format, w.shape, codes)
        again.add(family, variant, dims, tokens, comment, inputs, {"w_out": out, "scale": tensor("f32", (1,), [biggest])})
    sentinel = -FLT_MAX
    for fmt, token in (("e4m3fn", "fn"), ("e4m3fnuz", "fnuz")):
        bytes_ = coded("uint8", (8, 32), lambda i, j: 32 * i + j).codes
        w = Tensor(fmt, (8, 32), bytes_)
        uneven = [f32(Fraction(3, 7)), f32(Fraction(5, 3)), f32(Fraction(1, 50))]
        shards("max_scale", "max_scale", token, "every byte, three shards of unequal width", w, uneven, [2, 5, 1])
        shards("max_scale", "max_scale", token, "one shard", Tensor(fmt, (3, 8), bytes_[8:32]), [f32(Fraction(7, 3))], [3])
        shards("ties", "max_scale", token, "powers of two: shards of every byte at ties", Tensor(fmt, (16, 16), bytes_),
            [two(-1), two(0), two(-3)], [6, 5, 5])
        shards("via_f16", "max_scale_f16", token, "every byte, three shards", w, uneven, [2, 5, 1])
        shards("via_f16", "max_scale_f16", token, "products beyond 65504", w, [Fraction(1000), Fraction(200), Fraction(300)],
            [2, 5, 1])
        shards("special", "max_scale", token, "the same operands without binary16", w,
            [Fraction(1000), Fraction(200), Fraction(300)], [2, 5, 1])
        shards("fused", "max_scale", f"{token} fused", "bytes and scale stay", w, [uneven[0], sentinel, sentinel], [2, 5, 1])
        shards("fused", "max_scale_f16", f"{token} fused", "bytes and scale stay", w, [uneven[0], sentinel], [7, 1])
        shards("channel", "channel", token, "three shards", Tensor(fmt, (6, 4), bytes_[:24]), uneven, [1, 3, 2])
        shards("channel", "channel", token, "one shard", Tensor(fmt, (2, 4), bytes_[:8]), uneven[:1], [2])
    return [fold, convert, again]


# Formats and datapaths -----------------------------------------------------------------------------------------------


def value_text(v: Value) -> str:
    if isinstance(v, Fraction):
        return f"{v.numerator}/{v.denominator}"
    return "nan" if is_nan(v) else ("-0" if v == 0 else ("inf" if v > 0 else "-inf"))


def formats() -> dict[str, Any]:
    """Every code of every format of at most 8 bits, and what ties and edges become under each rounding."""
    found: dict[str, Any] = {}
    for name, f in FORMATS.items():
        if f.bits > 8:
            continue
        values = [decode(name, code) for code in range(1 << f.bits)]
        numbers = sorted({real(v) for v in values if isinstance(v, Fraction)})
        inputs: list[int] = []
        middles = [(a + b) / 2 for a, b in pairwise(numbers)]
        edge = numbers[-1] + (numbers[-1] - numbers[-2] if name != "e8m0" else numbers[-1])
        if name == "e8m0":  # every seventh tie, and those at both ends
            middles = [m for i, m in enumerate(middles) if i % 7 == 0 or i < 3 or i > len(middles) - 4]
        if f.signed and f.exponent:
            middles += [(edge + numbers[-1]) / 2, -(edge + numbers[-1]) / 2]
        for m in [*middles, (edge + numbers[-1]) / 2, edge, numbers[-1], numbers[0]]:
            code = encode("f32", m)
            inputs += [code - 1, code, code + 1] if m else [0x80000001, 0x80000000, 0, 1]
        inputs += [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]
        inputs = [code for code in dict.fromkeys(inputs) if 0 <= code < 1 << 32]
        rounded_codes = {}
        for mode in MODES:
            for policy in ("satfinite", "special") if f.exponent else ("satfinite",):
                codes = [encode(name, decode("f32", code), mode, policy == "satfinite") for code in inputs]
                rounded_codes[f"{mode}/{policy}"] = code_text(name, codes)
        found[name] = {"values": [value_text(v) for v in values], "inputs": code_text("f32", inputs), "rounded": rounded_codes}
    return {"schema": "lowbit-golden-formats/1", "source": VERSION, "input_format": "f32", "formats": found}


@dataclass(frozen=True)
class Unit:
    """A matrix unit that fuses `products` products and the accumulator: aligned to the largest exponent, cut toward zero
    below `fraction` bits, summed exactly, the result cut to `significand` bits."""

    products: int
    fraction: int
    significand: int
    zero_exponent: int


UNITS = {"hopper_wgmma_fp8": Unit(32, 13, 14, -133), "ada_fp8": Unit(16, 13, 14, -132),
    "blackwell_f8f6f4": Unit(32, 25, 24, -133)}
"""Figures of microsoft/MMA-Sim (arXiv 2511.10909), checked there and in MATLAB-tensor-core on devices."""


def toward_zero(v: Fraction, unit: int) -> Fraction:
    """v cut to a multiple of 2^unit."""
    return math.trunc(v / two(unit)) * two(unit)


def node(pairs: Sequence[tuple[Fraction, int]], c: Fraction, u: Unit) -> Fraction:
    """One fused node: T-FDPA. Each product keeps the sum of its operands' exponents, not renormalised."""
    own = max(log2(c), -126) if c else u.zero_exponent
    top = max([own, *(e if p else u.zero_exponent for p, e in pairs)])
    total = sum((toward_zero(v, top - u.fraction) for v in (c, *(p for p, _ in pairs))), ZERO)
    return toward_zero(total, max(log2(total), -126) - u.significand + 1) if total else ZERO


def accumulated(a: Tensor, w: Tensor, name: str, segment: int) -> Fraction:
    """One row times one row on a unit; every `segment` of K (0: all) from a fresh accumulator into an f32 total, nearest even."""
    pairs = [(real(times(x, y)), i + j) for (x, i), (y, j) in zip(terms(a, (0,)), terms(w, (0,)), strict=True)]
    length = segment or len(pairs)
    total: Value = ZERO
    for start in range(0, len(pairs), length):
        part = pairs[start : start + length]
        c: Value = ZERO
        if name == "ieee_f32":
            for p, _ in part:
                c = f32(plus(c, p))
        else:
            u = UNITS[name]
            for i in range(0, len(part), u.products):
                c = node(part[i : i + u.products], real(c), u)
        total = f32(plus(total, c)) if start else c
    return real(total)


def datapaths() -> dict[str, Any]:
    """Disagreement 16: one row times one row of e4m3fn, the same operands on several units."""

    def mixed(k: int, seed: int) -> tuple[Tensor, Tensor]:
        a = coded("e4m3fn", (1, k), lambda _,
            j: 0x20 + (13 * j + 7 * seed + j // 32) % 40 + (0x80 if (j * (seed + 3)) % 5 < 2 else 0))
        w = coded("e4m3fn", (1, k), lambda _,
            j: 0x24 + (29 * j + 11 * seed + j // 16) % 36 + (0x80 if (j * (seed + 1)) % 7 < 3 else 0))
        return a, w

    def positive(k: int, seed: int) -> tuple[Tensor, Tensor]:
        return (coded("e4m3fn", (1, k), lambda _, j: 0x30 + (11 * j + seed) % 16),
            coded("e4m3fn", (1, k), lambda _, j: 0x30 + (7 * j + 3 * seed) % 16))

    def tiny(k: int, seed: int) -> tuple[Tensor, Tensor]:
        return (coded("e4m3fn", (1, k), lambda _, j: 0x78 if j == seed else 1 + j % 7),
            coded("e4m3fn", (1, k), lambda _, j: 0x70 if j == seed else 0x38))

    vectors = []
    cases = [("mixed signs", mixed(256, 1)), ("mixed signs", mixed(384, 2)),
        ("positive products: truncation drifts one way", positive(512, 1)),
             ("positive products", positive(1024, 5)), ("one large product first, small ones after it", tiny(256, 0)),
             ("small products, a large one in the second block", tiny(256, 130)),
             ("subnormal operands beside normal ones", tiny(128, 64))]
    for index, (comment, (a, w)) in enumerate(cases, 1):
        results = []
        for name, segment in (("hopper_wgmma_fp8", 0), ("hopper_wgmma_fp8", 128), ("ada_fp8", 0), ("blackwell_f8f6f4", 0),
                ("ieee_f32", 0)):
            value = accumulated(a, w, name, segment)
            results.append({"datapath": name, "segment": segment, "f32": code_text("f32", [encode("f32", value)])})
        exact = sum((real(times(x, y)) for x, y in zip(a.values(), w.values(), strict=True)), ZERO)
        vectors.append({"index": index, "comment": comment, "a": a.record(), "w": w.record(), "exact": value_text(exact),
            "results": results})
    return {"schema": "lowbit-golden-datapaths/1", "source": VERSION, "vectors": vectors}


# Files ---------------------------------------------------------------------------------------------------------------


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "additionalProperties": False,
        "properties": {**required, **(optional or {})}}


def _array(items: Any, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


def schema() -> dict[str, Any]:
    """JSON Schema of the files here; each file names its kind in `schema`."""
    text, hexadecimal, count = {"type": "string", "minLength": 1}, {"type": "string",
        "pattern": "^[0-9a-f]*$"}, {"type": "integer", "minimum": 0}
    item = r"[0-9a-f]+(\*[0-9]+)?"
    fraction = {"type": "string", "pattern": "^(-?[0-9]+/[0-9]+|nan|-0|inf|-inf)$"}
    name = {"type": "string", "pattern": "^[a-z0-9_]+$"}
    plain = {"format": {"enum": list(FORMATS)}, "shape": _array(count, 1),
        "codes": {"type": "string", "pattern": f"^({item}( {item})*)?$"}}
    rules = {"any_of": _array({"type": "array"}, 1), "free": _array(count, 1), "untouched": _array(count, 1),
             "either_zero": {"const": True}, "nan_bytes": {"const": True}}
    vector = _object(
        {"index": {"type": "integer", "minimum": 1}, "case": {"type": "string",
            "pattern": "^[a-z0-9_]+/[a-z0-9_]+/([a-z][0-9]+)*/[a-z0-9_.]+/golden/s[0-9]+$"},
         "family": name, "comment": text, "inputs": {"type": "object", "additionalProperties": {"$ref": "#/$defs/input"}},
         "expected": {"type": "object", "additionalProperties": {"$ref": "#/$defs/output"}}},
        {"min_bits": {"type": "integer", "minimum": 1}, "declaration": {"enum": ["any", "normative"]}})
    family = _object({"guards": text, "clause": {"type": "string", "pattern": "^[A-Z0-9]+-[0-9]+$"}})
    ops = _object({"schema": {"const": "lowbit-golden/1"}, "op": name, "source": text,
                   "families": {"type": "object", "additionalProperties": family}, "vectors": _array(vector, 1)})
    of_format = _object({"values": _array(fraction, 1), "inputs": hexadecimal,
        "rounded": {"type": "object", "additionalProperties": hexadecimal}})
    all_formats = _object({"schema": {"const": "lowbit-golden-formats/1"}, "source": text, "input_format": {"const": "f32"},
                           "formats": {"type": "object", "additionalProperties": of_format}})
    result = _object({"datapath": name, "segment": count, "f32": hexadecimal})
    one_dot = _object({"index": {"type": "integer", "minimum": 1}, "comment": text, "a": {"$ref": "#/$defs/input"},
        "w": {"$ref": "#/$defs/input"},
                       "exact": fraction, "results": _array(result, 1)})
    all_datapaths = _object({"schema": {"const": "lowbit-golden-datapaths/1"}, "source": text, "vectors": _array(one_dot, 1)})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lowbit golden vectors",
            "$defs": {"input": _object(plain), "output": _object(plain, rules)}, "oneOf": [ops, all_formats, all_datapaths]}


def layered(value: Any, depth: int, indent: str = "") -> str:
    """JSON with line breaks down to `depth`, compact below."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, separators=(", ", ": "))
    inner, (first, last) = indent + " ", ("{}" if isinstance(value, dict) else "[]")
    if isinstance(value, dict):
        items = [f"{inner}{json.dumps(key)}: {layered(item, depth - 1, inner)}" for key, item in value.items()]
    else:
        items = [inner + layered(item, depth - 1, inner) for item in value]
    return f"{first}\n" + ",\n".join(items) + f"\n{indent}{last}"


def files() -> dict[str, str]:
    """Name -> text of every file."""
    books = [*encodings(), *conversions(), fp8_quantize(), int8_quantize(), int4_quantize(), nvfp4_quantize(),
        svdquant_quantize(),
             w4a16(), w8a8(), w4a8(), grouped(), w4a8_int8(), nvfp4(), int4()]
    found = {f"{book.op}.json": layered(book.record(), 4) for book in books}
    found |= {"formats.json": layered(formats(), 4), "datapaths.json": layered(datapaths(), 4),
        "schema.json": layered(schema(), 6)}
    return {name: text + "\n" for name, text in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the files; made if it is missing")
    out = parser.parse_args().out
    written = files()
    out.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {len(written)} files, {sum(map(len, written.values()))} bytes, to {out}")


if __name__ == "__main__":
    main()
