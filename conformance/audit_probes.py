"""Operands that make a matrix product show its accumulator: which problems are probed, and what is put into them.

Every output of a probe is a sum of very few products: two or more large ones that cancel (the masks) and one small one between,
before or after them. What is left of the small product says whether it met the masks in one accumulator, and how many of its
bits lie below the last one that is kept. All outer scales are 1, so that the output shows the sum.
Decides: the operands of the patterns `audit_order`, `audit_cut` and `audit_stagnation`, from the case alone, and where each
probe lies. Refuses: ops without a matrix product, and problems in which the probes have no room. Readings are `audit_readings`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product

import numpy as np

from lowbit.references.dot import Operand, values
from lowbit.references.formats import UINT4, Codes, Format, Kind, Reals, container, decode
from lowbit.references.interpret import Factor
from lowbit.references.rounding import encode

from .case import Case, Operands, Problem, Stream, Tensor
from .op import DomainError, Family, Op, ResolvedTensor, Role, TensorSpec, make_problem, tensors_of

__all__ = [
    "CUT", "CUTS", "LEVELS_OF_A", "ORDER", "PATTERNS", "STAGNATION", "Cut", "Probed", "Triple", "battery", "check_room",
    "cut_columns", "held", "probe_operands", "probed", "problems", "subject_of", "triples",
]

ORDER, CUT, STAGNATION = "audit_order", "audit_cut", "audit_stagnation"
PATTERNS = (ORDER, CUT, STAGNATION)
"""order: one small product for each pair of masks, over all of K. cut: one small product of each size next to masks. stagnation:
a large start, then K/2 small products, then the negated start."""

_M, _K, _G = 64, 1024, 128


# What is probed ------------------------------------------------------------------------------------------------------


def _formatted(op: Op) -> list[str]:
    """Options that name the format of an operand of the main product or of its output."""
    named = {spec.format for spec in op.tensors if spec.name in ("a", "w", "d") and isinstance(spec.format, str)}
    return [option.name for option in op.options if option.name in named]


def _columns(op: Op) -> int:
    """N of the probed problems: twice as many columns where block scales are probed, too."""
    return 2 * _M if any(scale is not None for scale in _scales(op.tensors).values()) else _M


def _problem(op: Op, variant: str, options: dict[str, str], k: int) -> Problem | None:
    sizes = {"m": _M, "n": _columns(op), "k": k, "g": _G, "r": 0, "e": 1}
    try:
        return make_problem(op, variant, {letter: sizes[letter] for letter in op.dims}, options)
    except DomainError:
        return None


def problems(op: Op) -> list[Problem]:
    """The probed problems of a GEMM at K = 1,024: every variant with every choice of operand and output formats, other options
    at their defaults. Empty for other ops."""
    if not op.is_gemm:
        return []
    names = _formatted(op)
    tokens = [next(option.tokens for option in op.options if option.name == name) for name in names]
    found = [
        _problem(op, variant, dict(zip(names, chosen, strict=True)), _K) for variant in op.variants for chosen in product(*tokens)
    ]
    return [problem for problem in found if problem is not None]


def battery(op: Op, problem: Problem) -> tuple[Case, ...]:
    """The cases of one audit: what one op, variant and choice of formats is probed by. `problem`: one of `problems`."""
    longer = make_problem(op, problem.variant, dict(problem.dims) | {"k": 2 * _K}, dict(problem.options))
    return (Case(problem, ORDER, 1), Case(longer, ORDER, 1), Case(problem, CUT, 1), Case(problem, STAGNATION, 1))


def subject_of(op: Op, problem: Problem) -> Problem | None:
    """The probed problem that stands for a problem: the same op, variant and formats. None where there is none."""
    wanted = {name: problem.option(name) for name in _formatted(op)}
    return next(
        (found for found in problems(op)
         if found.variant == problem.variant and all(found.option(name) == token for name, token in wanted.items())), None,
    )


# One side of the product ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """An operand: the format of its elements, that of its block scales (None: none that could be probed), k per scale, and the
    exponents of the masks and of the smallest value of one significand bit."""

    format: Format
    scale: Format | None
    group: int
    top: int
    low: int


def _scales(specs: tuple[TensorSpec, ...] | tuple[ResolvedTensor, ...]) -> dict[str, str | None]:
    """Side -> the tensor of its block scales; None where it has none in a narrow format."""
    found: dict[str, str | None] = {"a": None, "w": None}
    for spec in specs:
        narrow = spec.format if isinstance(spec.format, str) else spec.format.name
        if spec.family is Family.BLOCK_SCALE and narrow != "f32":
            found["a" if spec.name.startswith("a_") else "w"] = spec.name
    return found


_PLAIN = {"e4m3fn": (8, -9), "e4m3fnuz": (7, -10), "f16": (13, -14), "bf16": (13, -18), "int8": (6, 0)}
"""Elements without block scales -> exponents of masks and of the smallest value; masks stay below 2^16 as a product."""

_SCALED = {"e4m3fn": (7, -9), "ue4m3": (8, -9), "f16": (8, -12), "bf16": (8, -14)}
"""Block scales -> the same of elements that carry them."""


def _side(specs: dict[str, ResolvedTensor], name: str) -> _Side:
    spec, scale = specs[name], _scales(tuple(specs.values()))[name]
    if scale is None:
        top, low = _PLAIN[spec.format.name]
        return _Side(spec.format, None, 0, top if name == "a" else min(top, 7), low)
    held = specs[scale]
    top, low = _SCALED[held.format.name]
    other = specs["w" if name == "a" else "a"]
    if other.format.name in ("f16", "bf16"):
        top = 2  # 16-bit activations span enough by themselves
    elif other.format.name == "int8":
        top = 9
    elif name == "a" and spec.format.kind is Kind.INT:
        top = 7
    fraction = 1 if spec.format.kind is Kind.FLOAT else 0  # e2m1 has a half
    return _Side(spec.format, held.format, spec.shape[-1] // held.shape[-1], top, low - fraction)


def _sides(op: Op, problem: Problem) -> tuple[_Side, _Side]:
    specs = {spec.name: spec for spec in tensors_of(op, problem)}
    return _side(specs, "a"), _side(specs, "w")


def _element_codes(wanted: Reals, fmt: Format) -> Codes:
    """Codes of element values; uint4 has its zero at 8."""
    return encode(wanted + 8.0, fmt) if fmt is UINT4 else encode(wanted, fmt)


def _element_values(codes: Codes, fmt: Format) -> Reals:
    return decode(codes, fmt) - (8.0 if fmt is UINT4 else 0.0)


def _encoded(wanted: Reals, side: _Side) -> tuple[Codes, Codes | None]:
    """Codes and block scales of values [rows, K]. Scales are powers of two: the largest value of a group is an element of
    exponent 0 or, where smaller ones would be lost, as far up as elements go. What still is not representable is rounded."""
    if side.scale is None:
        return _element_codes(wanted, side.format), None
    rows, k = wanted.shape
    grouped = wanted.reshape(rows, k // side.group, side.group)
    top = np.max(np.abs(grouped), axis=2)
    exponent = np.where(top > 0, np.frexp(top)[1] - 1, 0)
    lowest = side.scale.min_exponent - side.scale.mantissa_bits if side.scale.bits <= 8 else -14
    codes = np.zeros(grouped.shape, dtype=container(side.format))
    chosen = np.zeros(top.shape, dtype=np.int64)
    done = np.zeros(top.shape, dtype=np.bool_)
    for up in (0, 1, 2):
        scale = np.clip(exponent - up, lowest, 8 if side.scale.bits <= 8 else 14)
        found = _element_codes(np.ldexp(grouped, -scale[:, :, None]), side.format)
        exact = (np.ldexp(_element_values(found, side.format), scale[:, :, None]) == grouped).all(axis=2)
        take = ~done & (exact | (up == 2))
        codes[take], chosen[take] = found[take], scale[take]
        done |= take
    return codes.reshape(rows, k), encode(np.ldexp(1.0, chosen), side.scale)


# Places --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """One arrangement of a cut probe: places of the masks, of what cancels them, and of the small product. `wide`: the masks hold
    the significand 2.25 instead of 1. `lower`: masks are 2^lower times smaller, where several add up."""

    name: str
    masks: tuple[int, ...]
    cancel: tuple[int, ...]
    small: int
    wide: bool = False
    lower: int = 0


_FOUR = (0, 2, 4, 6)


def _shifted(places: tuple[int, ...], base: int) -> tuple[int, ...]:
    return tuple(base + place for place in places)


CUTS: tuple[Cut, ...] = (
    Cut("near", (0,), (2,), 1),
    Cut("near4", (64,), (68,), 65),
    Cut("near_wide", (128,), (130,), 129, wide=True),
    Cut("near4_wide", (192,), (196,), 193, wide=True),
    Cut("carry", _shifted(_FOUR, 256), _shifted(_FOUR, 354), 263, lower=2),
    Cut("carry17", _shifted(_FOUR, 384), _shifted(_FOUR, 482), 401, lower=2),
    Cut("group", (512,), (528,), 545),
    Cut("group_wide", (576,), (592,), 609, wide=True),
    Cut("far", (640,), (900,), 770),
    Cut("strided", (704,), (960,), 832),
)
"""All within 1,024 of K, each from a multiple of 64 on, so that no node, block or group is shared. `near`: three neighbours.
`near4`: masks in one pair of pairs. `group`: masks in neighbouring runs of 16, the small product in the third. `carry`: four
masks add up and are cancelled later, so that the sum is rounded in between. `far`: three runs of 128. `strided`: the same modulo
128, so that it shows what accumulators of every other k, or of every 32nd, hide from arrangements of neighbours."""

LEVELS_OF_A = 32
"""Sizes of the small product by A, at most; with both signs they fill the rows."""


def cut_columns(op: Op, problem: Problem) -> list[tuple[Cut, int]]:
    """(arrangement, how far below its masks the weight of the small product lies, in powers of two) of each column in use."""
    a, w = _sides(op, problem)
    step = a.top - a.low
    whole = w.top - w.low
    lags = sorted({0, min(2, whole), *range(step, whole, step), whole})
    return [(cut, lag) for lag in lags for cut in CUTS][: problem.dim("n")]


@dataclass(frozen=True, slots=True)
class _Order:
    """Rows (first mask, second mask), columns (place of the small product; whether masks that share its group are left out)."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, bool], ...]


def _order(op: Op, problem: Problem) -> _Order:
    k = problem.dim("k")
    near = [(0, j) for j in range(2, 64, 2)]
    marks = [k // 16 * t - 2 for t in range(1, 17)]
    rows = [*near, (1, 3), (k - 4, k - 2), (0, 130), *((mark, k - 2) for mark in marks[:-1]), *pairwise(marks[:-1])]
    small = [*range(1, 67, 2), 2, *(k // 32 * t + 1 for t in range(3, 32))]
    columns = [(place, False) for place in small]
    if _sides(op, problem)[1].scale is not None:
        columns += [(place, True) for place in small]
    return _Order(tuple(rows), tuple(columns))


def check_room(op: Op, case: Case) -> None:
    """Raises DomainError where the op is no matrix product, or the problem has no room for the probes."""
    if not op.is_gemm or case.pattern not in PATTERNS:
        raise DomainError(f"{op.name} has no pattern {case.pattern!r}: only matrix products have an accumulator to probe")
    problem, dims = case.problem, dict(case.problem.dims)
    if dims["k"] < _K or dims["k"] % 512 or dims["m"] < _M or dims["n"] < _columns(op) or dims.get("e", 1) != 1:
        raise DomainError(
            f"{problem}: a probe of the accumulator needs m of at least {_M}, n of at least {_columns(op)}, k from {_K} on in "
            "steps of 512 and one expert"
        )


# Operands ------------------------------------------------------------------------------------------------------------


def _order_values(op: Op, problem: Problem, a: _Side, w: _Side) -> tuple[Reals, Reals]:
    """Row m holds masks at its two places and small values wherever a column may have one; column n holds masks wherever a row
    may have one and its own small value. Masks and small values never share a parity of k, so that no other product arises."""
    plan, (m, n, k) = _order(op, problem), (problem.dim(letter) for letter in "mnk")
    left, right = np.zeros((m, k)), np.zeros((n, k))
    places = sorted({place for place, _ in plan.columns})
    masks = sorted({place for pair in plan.rows for place in pair})
    for row, (first, second) in enumerate(plan.rows):
        left[row, [place for place in places if (place - first) % 2]] = 2.0**a.low
        if a.scale is not None:
            for place in (first, second):
                left[row, place // a.group * a.group : (place // a.group + 1) * a.group] = 0.0
        left[row, first], left[row, second] = 2.0**a.top, -(2.0**a.top)
    for column, (place, alone) in enumerate(plan.columns):
        there = [mask for mask in masks if (mask - place) % 2]
        right[column, there] = 2.0**w.top
        low = w.low if w.scale is None or alone else w.top - 2
        if alone:
            right[column, place // w.group * w.group : (place // w.group + 1) * w.group] = 0.0
        right[column, place] = 2.0**low
    return left, right


def _cut_values(op: Op, problem: Problem, a: _Side, w: _Side) -> tuple[Reals, Reals]:
    """Rows 2i and 2i + 1 hold 1.5 * 2^(top - i) at every small place, with both signs; columns hold one arrangement each."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    left, right = np.zeros((m, k)), np.zeros((n, k))
    levels = min(LEVELS_OF_A, a.top - a.low)
    for level, sign in product(range(levels), (1.0, -1.0)):
        row = 2 * level + (sign < 0)
        for cut in CUTS:
            mask = sign * (1.5 if cut.wide else 1.0) * 2.0 ** (a.top - cut.lower)
            left[row, list(cut.masks)], left[row, list(cut.cancel)] = mask, -mask
            left[row, cut.small] = sign * 1.5 * 2.0 ** (a.top - level)
    for column, (cut, lag) in enumerate(cut_columns(op, problem)):
        right[column, [*cut.masks, *cut.cancel]] = (1.5 if cut.wide else 1.0) * 2.0**w.top
        right[column, cut.small] = 2.0 ** (w.top - lag)
    return left, right


def _stagnation_values(op: Op, problem: Problem, a: _Side, w: _Side) -> tuple[Reals, Reals]:
    """A mask, then a small product at every odd k, then the negated mask. Rows 2i, 2i + 1: smaller by 2^i, with both signs; the
    columns go from the smallest weight up to 2^-10 of a mask."""
    m, n, k = (problem.dim(letter) for letter in "mnk")
    left, right = np.zeros((m, k)), np.zeros((n, k))
    levels = a.top - a.low
    for row in range(m):
        sign = -1.0 if row % 2 else 1.0
        left[row, 1::2] = sign * 2.0 ** (a.top - 1 - row // 2 % levels)
        _clear(left[row], (0, k - 2), a)
        left[row, 0], left[row, k - 2] = sign * 2.0 ** (a.top - 1), -sign * 2.0 ** (a.top - 1)
    deepest = w.top - w.low
    for column in range(n):
        right[column, 1::2] = 2.0 ** (w.low + column % max(1, deepest - 9))
        _clear(right[column], (0, k - 2), w)
        right[column, [0, k - 2]] = 2.0**w.top
    return left, right


def _clear(row: Reals, places: tuple[int, ...], side: _Side) -> None:
    """Zeros wherever a value would share a block scale with a mask."""
    for place in places if side.scale is not None else ():
        row[place // side.group * side.group : (place // side.group + 1) * side.group] = 0.0


_VALUES = {ORDER: _order_values, CUT: _cut_values, STAGNATION: _stagnation_values}


def _other(op: Op, case: Case, spec: ResolvedTensor) -> Codes:
    """Tensors beside the two operands: scales of 1, zero points of 8, rows per expert as the op counts them."""
    if spec.family is Family.COUNTS and op.draw is not None:
        codes = op.draw(case, spec, Stream(case, spec.name))
        assert codes is not None
        return codes
    if spec.family is Family.ZERO_POINT:
        return np.full(spec.shape, 8, dtype=container(spec.format))
    if spec.family in (Family.BIAS, Family.LORA):
        return np.zeros(spec.shape, dtype=container(spec.format))
    return encode(np.ones(spec.shape), spec.format)


def probe_operands(op: Op, case: Case) -> Operands:
    """The operands of a probe, by tensor name in the op's order. Raises DomainError as `check_room`."""
    check_room(op, case)
    sides = dict(zip("aw", _sides(op, case.problem), strict=True))
    wanted = dict(zip("aw", _VALUES[case.pattern](op, case.problem, sides["a"], sides["w"]), strict=True))
    made = {name: _encoded(wanted[name], sides[name]) for name in "aw"}
    specs = [spec for spec in tensors_of(op, case.problem) if spec.role is not Role.OUTPUT]
    scales = {scale: side for side, scale in _scales(tuple(specs)).items() if scale is not None}
    tensors: dict[str, Tensor] = {}
    for spec in specs:
        if spec.name in made:
            codes: Codes | None = made[spec.name][0]
        elif spec.name in scales:
            codes = made[scales[spec.name]][1]
        else:
            codes = _other(op, case, spec)
        assert codes is not None
        tensors[spec.name] = Tensor(np.ascontiguousarray(codes.reshape(spec.shape)), spec.format)
    return Operands(tensors)


# What came back ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """One probe with its outputs: effective operands [M, K] and [N, K] (block scales multiplied in) and D [M, N], as reals."""

    case: Case
    a: Reals
    w: Reals
    d: Reals
    output: Format


def probed(op: Op, case: Case, operands: Operands, codes: Codes) -> Probed:
    """The probe behind a case, its operands as the op reads them, and the codes of D."""
    assert op.environment is not None
    environment = op.environment(case.problem, operands)
    sides = {}
    for name, axis in (("a", "m"), ("w", "n")):
        operand = environment[name]
        assert isinstance(operand, Operand)
        real = values(operand)
        for factor in environment.values():
            if isinstance(factor, Factor) and factor.grouped and factor.axis == axis:
                real = real * np.repeat(factor.values, real.shape[1] // factor.values.shape[-1], axis=-1)
        sides[name] = real
    output = next(spec.format for spec in tensors_of(op, case.problem) if spec.role is Role.OUTPUT)
    return Probed(case, sides["a"], sides["w"], decode(codes, output), output)


@dataclass(frozen=True, slots=True)
class Triple:
    """One probe of an `audit_order` case: masks of +-`mask` at k = `first` and `second`, a product `small` at k = `place`, and
    the output."""

    first: int
    second: int
    place: int
    gap: int  # log2 of mask / small
    small: float
    output: float


@lru_cache(maxsize=4096)
def held(x: float, fmt: Format) -> bool:
    """Whether a format holds x exactly."""
    return bool(decode(encode(np.array([x]), fmt), fmt)[0] == x)


def triples(op: Op, probe: Probed) -> Iterator[Triple]:
    """The probes of an order case in which both masks cancel over the reals and nothing but the small product is left."""
    plan = _order(op, probe.case.problem)
    rows, columns = np.arange(len(plan.rows)), np.arange(len(plan.columns))
    first, second = (np.array([pair[i] for pair in plan.rows]) for i in (0, 1))
    place = np.array([where for where, _ in plan.columns])
    a, w = probe.a[rows], probe.w[columns]
    mask = a[rows, first][:, None] * w[:, first].T
    other = a[rows, second][:, None] * w[:, second].T
    small = a[:, place] * w[columns, place][None, :]
    told = (mask != 0) & (mask == -other) & (small != 0)
    told &= (place[None, :] != first[:, None]) & (place[None, :] != second[:, None])
    told &= np.abs(a) @ np.abs(w).T == np.abs(mask) + np.abs(other) + np.abs(small)
    told &= decode(encode(small, probe.output), probe.output) == small
    for row, column in np.argwhere(told):
        size = float(small[row, column])
        gap = round(math.log2(abs(float(mask[row, column]) / size)))
        yield Triple(
            int(first[row]), int(second[row]), int(place[column]), gap, size, float(probe.d[row, column])
        )
