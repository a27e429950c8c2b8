"""How the operands of a case are drawn: one recipe of values per pattern, applied to each tensor by its family.

Every draw is exact arithmetic on the words of a `Stream` keyed by case id and tensor name, so a case id fixes its operands
on any machine. Values are drawn as reals and encoded by the formats' own definition, or drawn as codes.
Decides: what the patterns mean. Refuses: unknown patterns, and patterns an op does not list.

Exact lanes (`exactw8`, `exactw11`, `exactw14`, `exactw24`): rows of A are thinned until sum |a w| < 2^w q for every output, q
the weight of the lowest bit that a product may have. Every accumulator of at least w bits then gives the exact sum in any
order, so the interval of the judge is a point. Scales inside the sum are short (at most 3 significand bits): they count against
the width. Scales after it have every significand bit of their format (`_whole`), since one declared rounding follows the other
and a point stays a point; a kernel that keeps them in fewer bits shows. `exactw8` alone keeps them short, so that its epilogue is
exact: sums then lie at ties of the output, and relations between two runs (properties.py) hold whatever rounding is declared.
"""

from __future__ import annotations

import numpy as np

from lowbit.references import dot
from lowbit.references.dot import low_bit
from lowbit.references.formats import F32, UINT4, Codes, Format, Kind, Nan, Reals, container, decode, is_nan
from lowbit.references.interpret import Factor
from lowbit.references.rounding import encode

from .audit_probes import PATTERNS as AUDITS
from .case import Case, Operands, Stream, Tensor
from .op import DomainError, Family, Op, ResolvedTensor, Role, tensors_of

__all__ = ["EXACT_WIDTHS", "LANES", "draw_operands", "lane_of", "level_of", "pick_codes", "reals", "rows_probed"]

EXACT_WIDTHS = {"exactw8": 8, "exactw11": 11, "exactw14": 14, "exactw24": 24}
"""Accumulator bits that each exact lane needs."""

LANES = {
    **dict.fromkeys(EXACT_WIDTHS, "exact"), "onehot": "onehot", "scaleprobe": "scale", "golden": "golden", "all": "encoding",
    "tensors": "tensors", **dict.fromkeys(AUDITS, "audit"),
}
"""Lane of each pattern; patterns not named here belong to the lane of their op (`bounded`, `encoding`, `quantiser`)."""

_LEVELS = {
    "reject": 2, "exact": 1, "onehot": 1, "scale": 1, "golden": 1, "encoding": 1, "quantiser": 1, "bounded": 2, "property": 2,
    "tensors": 2, "audit": 2, "stability": 3,
}


def lane_of(op: Op, pattern: str) -> str:
    """The lane a case of this op and pattern is judged in."""
    if pattern.startswith("prop_"):
        return "property"
    if pattern in LANES:
        return LANES[pattern]
    if op.is_gemm:
        return "bounded"
    return "quantiser" if op.name.endswith("_quantize") else "encoding"


def level_of(lane: str) -> int:
    """The level of the ladder a lane belongs to."""
    return _LEVELS[lane]


def reals(pattern: str, shape: tuple[int, ...], stream: Stream) -> Reals:
    """Unit-scale real values of a distribution, float64, the last axis being K.

    normal: bell, sigma 1. positive: its magnitude. shifted: mean 1, sigma 1/2. lognormal: sign, 2^e with e bell-shaped
    (sigma 2), a uniform significand, and one outlier of 64 times in 256. cancel: neighbours along K repeat, for an operand
    whose partner alternates in sign (`draw_operands` sees to that). maxima: +-large. zeros: whole rows and aligned blocks
    of 16 along K are zero. ramp: place in the row, modulo 61, centred.
    """
    match pattern:
        case "positive":
            return np.asarray(np.abs(stream.normal(shape)) + 2.0**-6)
        case "shifted":
            return np.asarray(stream.normal(shape) * 0.5 + 1.0)
        case "lognormal":
            exponent = np.rint(stream.normal(shape) * 2.0).astype(np.int64)
            words = stream.integers(0, (1 << 20) - 1, shape)
            sign = np.where(words & 1, -1.0, 1.0)
            outlier = np.where((words >> 1) & 0xFF == 0, 64.0, 1.0)
            return np.asarray(sign * outlier * np.ldexp(1.0 + (words >> 9) * 2.0**-11, exponent))
        case "cancel":
            x = stream.normal(shape)
            half = shape[-1] // 2
            x[..., 1 : 2 * half : 2] = x[..., 0 : 2 * half : 2]
            return x
        case "maxima":
            return np.where(stream.integers(0, 1, shape) == 1, 1.0, -1.0) * 1e6
        case "zeros":
            x = stream.normal(shape)
            rows, blocks = shape[0] if len(shape) > 1 else 1, -(-shape[-1] // 16)
            dead = stream.integers(0, 3, (rows, blocks)) == 0
            dead[stream.integers(0, 7, (rows,)) == 0] = True
            mask = np.repeat(dead, 16, axis=1)[:, : shape[-1]]
            return np.where(mask.reshape((rows,) + (1,) * (len(shape) - 2) + (shape[-1],)), 0.0, x)
        case "ramp":
            return np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.float64).reshape(shape) * 7.0 % 61.0 / 16.0 - 1.875
        case _:
            return stream.normal(shape)


def _amplitude(fmt: Format) -> float:
    """What a unit-scale value is multiplied by to use the range of an element format: max / 4.9 rounded down to a power of two
    times 1.5 for narrow formats; 1 for 16- and 32-bit floats, which carry real activations."""
    if fmt.bits > 8:
        return 1.0
    if fmt.kind is Kind.FLOAT and fmt.mantissa_bits > 1:
        return float(fmt.max_finite) / 8
    return float(fmt.max_finite) / 3


def pick_codes(fmt: Format, shape: tuple[int, ...], stream: Stream, *, nan: bool = False) -> Codes:
    """Uniform codes of a format of at most 16 bits; infinities and NaN only if `nan`."""
    codes = stream.integers(0, (1 << fmt.bits) - 1, shape).astype(container(fmt))
    if nan:
        return codes
    return np.where(np.isfinite(decode(codes, fmt)), codes, codes & container(fmt).type(0x0F)).astype(container(fmt))


def _specials(fmt: Format) -> list[int]:
    """Codes a format treats specially: zeros, subnormals, largest values, infinities, NaN."""
    top = fmt.max_code
    codes = [0, 1, top, top - 1]
    if fmt.kind is Kind.FLOAT:
        codes += [(1 << fmt.mantissa_bits) - 1, 1 << fmt.mantissa_bits]
        if fmt.signed:
            codes += [c | fmt.sign_bit for c in codes if fmt.has_neg_zero or c]
        if fmt.has_inf:
            codes += [top + 1, (top + 1) | fmt.sign_bit]
        if fmt.nan is not Nan.NONE:
            codes.append(fmt.nan_code)
    elif fmt.signed:
        codes += [fmt.min_code, (1 << fmt.bits) - 1]
    return sorted(set(codes))


def _sprinkle(codes: Codes, fmt: Format, stream: Stream) -> Codes:
    """Special codes at a handful of places: at most one row in four carries one that is not finite."""
    flat = codes.reshape(-1).copy()
    if flat.size == 0:
        return codes
    specials = _specials(fmt)
    count = max(2, min(24, flat.size // 64))
    places = stream.integers(0, flat.size - 1, (count,))
    chosen = np.array(specials, dtype=np.int64)[stream.integers(0, len(specials) - 1, (count,))]
    row = codes.shape[-1] if codes.ndim > 1 else 1
    finite = np.isfinite(decode(chosen.astype(codes.dtype), fmt))
    keep = finite | ((places // row) % 4 == 3)
    flat[places[keep]] = chosen[keep].astype(codes.dtype)
    return flat.reshape(codes.shape)


def _elements(pattern: str, spec: ResolvedTensor, stream: Stream) -> Codes:
    fmt, shape = spec.format, spec.shape
    if pattern == "ramp" and fmt.bits <= 8:
        index = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        rows = index // max(shape[-1], 1)
        codes = ((index * 5 + rows * 3) % (1 << fmt.bits)).astype(container(fmt))
        return np.where(np.isfinite(decode(codes, fmt)), codes, container(fmt).type(1)).astype(container(fmt))
    base = "normal" if pattern in ("special", "extremes") else pattern
    codes = encode(reals(base, shape, stream) * _amplitude(fmt), fmt)
    return _sprinkle(codes, fmt, stream) if pattern == "special" else codes


def _powers(low: int, high: int, bits: int, shape: tuple[int, ...], stream: Stream) -> Reals:
    """(1 + f) * 2^e, e uniform in low..high, f uniform over `bits` bits."""
    fraction = stream.integers(0, (1 << bits) - 1, shape) * 2.0**-bits if bits else np.zeros(shape)
    return np.asarray(np.ldexp(1.0 + fraction, stream.integers(low, high, shape)))


def _block_scales(pattern: str, spec: ResolvedTensor, stream: Stream) -> Codes:
    """Block scales: spread over 2^-3..2^3 (8-bit) or 2^-7..2^-2 (16-bit). extremes: also subnormal, largest, zero and, where
    the format has a sign, negative ones. special: a NaN now and then."""
    fmt, shape = spec.format, spec.shape
    if pattern == "ramp" and fmt.bits <= 8:
        count = fmt.max_code
        start = int(stream.integers(0, count - 1, (1,))[0])
        return ((np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape) + start) * 5 % count + 1).astype(container(fmt))
    low, high = (-3, 3) if fmt.bits <= 8 else (-7, -2)
    codes = encode(_powers(low, high, fmt.mantissa_bits, shape, stream), fmt)
    if pattern == "extremes":
        pool = [0, 1, 2, 7, fmt.max_code, fmt.max_code - 1, fmt.max_code - 2]
        if fmt.bits > 8:  # keep sums of products of 16-bit scales within f32
            pool = [0, 1, 7, int(encode(np.array([2.0**-14]), fmt)[0]), int(encode(np.array([60000.0]), fmt)[0])]
        if fmt.signed:
            pool += [code | fmt.sign_bit for code in (int(codes.reshape(-1)[0]) if codes.size else 1, 0, 3)]
        hit = stream.integers(0, 2, shape) == 0
        codes = np.where(hit, np.array(pool)[stream.integers(0, len(pool) - 1, shape)], codes).astype(container(fmt))
    if pattern == "zeros":
        codes = np.where(stream.integers(0, 3, shape) == 0, 0, codes).astype(container(fmt))
    if pattern == "special" and codes.size and fmt.nan is not Nan.NONE:
        flat = codes.reshape(-1)
        flat[int(stream.integers(0, flat.size - 1, (1,))[0])] = fmt.nan_code
    return codes


def _outer_scales(pattern: str, spec: ResolvedTensor, stream: Stream) -> Codes:
    """Token, channel and tensor scales: 2^-6..2^-1 with full significands; negative and extreme ones in `extremes`, zero in
    `zeros`, NaN and infinity in `special`."""
    fmt, shape = spec.format, spec.shape
    values = _powers(-6, -1, min(20, fmt.mantissa_bits), shape, stream)
    if pattern == "extremes":
        kind = stream.integers(0, 5, shape)
        values = np.select([kind == 0, kind == 1, kind == 2], [-values, values * 2.0**-12, values * 2.0**10], values)
    if pattern == "zeros":
        values = np.where(stream.integers(0, 3, shape) == 0, 0.0, values)
    codes = encode(values, fmt)
    if pattern == "special" and codes.size > 3:
        flat = codes.reshape(-1)
        pool = _specials(fmt)[-3:]
        flat[int(stream.integers(0, flat.size - 1, (1,))[0])] = pool[int(stream.integers(0, len(pool) - 1, (1,))[0])]
    return codes


def _scale_of_output(op: Op, case: Case) -> int:
    """Exponent of the size that outputs of a bounded GEMM case are likely to have: from K and the formats, integers only."""
    exponent = 0
    for spec in tensors_of(op, case.problem):
        if spec.family is Family.ELEMENT and spec.role is not Role.OUTPUT and spec.format.bits <= 8:
            exponent += int(np.frexp(_amplitude(spec.format))[1]) - 1
        if spec.family is Family.BLOCK_SCALE and spec.format.bits > 8:
            exponent -= 4
        if spec.family in (Family.OUTER_SCALE, Family.GLOBAL_SCALE):
            exponent -= 3
    return exponent + dict(case.problem.dims).get("k", 1).bit_length() // 2


def _bias(op: Op, case: Case, spec: ResolvedTensor, stream: Stream) -> Codes:
    values = np.ldexp(reals("normal", spec.shape, stream), _scale_of_output(op, case))
    if case.pattern == "special":
        return _sprinkle(encode(values, spec.format), spec.format, stream)
    return encode(values, spec.format)


def _lora(op: Op, case: Case, spec: ResolvedTensor, stream: Stream) -> Codes:
    """Low-rank operands: the down-projected activation is sized so that its term is comparable with the main sum."""
    base = case.pattern if case.pattern in ("positive", "cancel", "lognormal", "zeros") else "normal"
    values = reals(base, spec.shape, stream)
    if spec.format is F32:
        values = np.ldexp(values, max(-10, min(9, _scale_of_output(op, case) + 2)))
    return encode(np.clip(values, -512.0 * 64, 512.0 * 64), spec.format)


def _plain(op: Op, case: Case, spec: ResolvedTensor, stream: Stream) -> Codes:
    match spec.family:
        case Family.BLOCK_SCALE:
            return _block_scales(case.pattern, spec, stream)
        case Family.OUTER_SCALE | Family.GLOBAL_SCALE:
            return _outer_scales(case.pattern, spec, stream)
        case Family.BIAS:
            return _bias(op, case, spec, stream)
        case Family.LORA:
            return _lora(op, case, spec, stream)
        case Family.SMOOTH:
            return encode(_powers(-2, 2, min(7, spec.format.mantissa_bits), spec.shape, stream), spec.format)
        case Family.ZERO_POINT:
            return stream.integers(0, 15, spec.shape).astype(container(spec.format))
        case _:
            return _elements(case.pattern, spec, stream)


def _zero_opposite(a: Tensor, w: Tensor) -> Codes:
    """Weights with a zero code in one column at every k where A is not finite: NaN and infinity times zero are NaN."""
    codes = w.codes.copy()
    lost = np.flatnonzero(~np.isfinite(decode(a.codes, a.format)).reshape(-1, a.codes.shape[-1]).all(axis=0))
    codes[..., lost % codes.shape[-2], lost] = 0
    return codes


# Exact lanes ---------------------------------------------------------------------------------------------------------

_SHORT = (1.0, 1.25, 1.5, 1.75)


def _short(low: int, high: int, fmt: Format, shape: tuple[int, ...], stream: Stream, significands: int = 4) -> Codes:
    """Values of at most three significand bits times a power of two."""
    picks = np.array(_SHORT[:significands])[stream.integers(0, significands - 1, shape)]
    return encode(np.ldexp(picks, stream.integers(low, high, shape)), fmt)


def _whole(low: int, high: int, fmt: Format, shape: tuple[int, ...], stream: Stream, bits: int | None = None) -> Codes:
    """Values of either sign that need all significand bits of a float format, or `bits` below the leading one: the last is 1.
    No narrower format holds one of them; exponents are uniform in low..high."""
    bits = fmt.mantissa_bits if bits is None else bits
    fraction = stream.integers(0, (1 << bits) - 1, shape) | 1
    sign = np.where(stream.integers(0, 1, shape) == 1, -1.0, 1.0)
    return encode(sign * np.ldexp(1.0 + fraction * 2.0**-bits, stream.integers(low, high, shape)), fmt)


def _exact_tensor(op: Op, case: Case, spec: ResolvedTensor, stream: Stream, width: int) -> Codes:
    """One tensor of an exact lane, before rows are thinned. Wide lanes use every code and three-bit block scales; at w = 8 and 11
    these are powers of two so that something is left of the budget. A global scale before a low-rank term is short: that term
    is a sum, and what it is added to counts against its accumulator."""
    fmt, shape = spec.format, spec.shape
    wide = width >= 14
    match spec.family:
        case Family.BLOCK_SCALE:
            top = 1 if fmt.bits <= 8 else -2
            return _short(top - (1 if wide else 0), top, fmt, shape, stream, 4 if width >= 24 else (2 if wide else 1))
        case Family.OUTER_SCALE | Family.GLOBAL_SCALE:
            inner = spec.family is Family.GLOBAL_SCALE and _has_lora(op, case)
            if width == 8 or inner:
                return _short(-2, 1, fmt, shape, stream, 1 if width >= 24 else 2)
            return _whole(-2, 0, fmt, shape, stream)
        case Family.BIAS:
            return encode(stream.integers(-3, 3, shape) * 0.5, fmt)
        case Family.ZERO_POINT:
            return stream.integers(0, 15, shape).astype(container(fmt))
        case Family.LORA:
            return encode(stream.integers(-1, 1, shape).astype(np.float64), fmt)
    if spec.role is Role.CONSTANT:
        if fmt.bits <= 4:
            return stream.integers(0, 15, shape).astype(container(fmt))
        high = 15 if width >= 24 else (7 if wide else 2)
        return encode(stream.integers(-high, high, shape).astype(np.float64), fmt)
    if fmt.kind is Kind.FLOAT and fmt.bits == 4:
        return stream.integers(0, 15, shape).astype(container(fmt))
    high = min({8: 1, 11: 3, 14: 7, 24: 15}[width], int(fmt.max_finite))
    return encode(stream.integers(-high, high, shape).astype(np.float64), fmt)


def _has_lora(op: Op, case: Case) -> bool:
    return any(spec.family is Family.LORA for spec in tensors_of(op, case.problem))


def _thin(codes: Codes, weights: Reals, budget: float, zero: int) -> Codes:
    """Rows of A cut to zero from the right, in a fixed scattered order of k, where sum |a| max_n |w| passes the budget."""
    rows, k = codes.shape
    order = (np.arange(k) * _coprime(k)) % k if k else np.arange(0)
    spent = np.cumsum(weights[:, order], axis=1)
    keep = np.empty((rows, k), dtype=np.bool_)
    keep[:, order] = spent <= budget
    return np.where(keep, codes, codes.dtype.type(zero))


def _coprime(k: int) -> int:
    """An odd step near the golden section of k that has no factor in common with it."""
    step = max(1, int(k * 0.381966)) | 1
    while np.gcd(step, k) != 1:
        step += 2
    return step


def draw_operands(op: Op, case: Case, batch: int = 0) -> Operands:
    """The operands of a case, by tensor name in the op's order (INOUT tensors included, outputs not).

    One-hot and scale-probe cases have several batches of activations for one set of constants (`rows_probed`). Raises
    DomainError where the op does not list the pattern."""
    if case.pattern not in op.patterns:
        raise DomainError(f"{op.name} has no pattern {case.pattern!r}; it has {', '.join(op.patterns)}")
    tensors: dict[str, Tensor] = {}
    width = EXACT_WIDTHS.get(case.pattern, 0)
    for spec in tensors_of(op, case.problem):
        if spec.role is Role.OUTPUT:
            continue
        stream = Stream(case, spec.name)
        codes = op.draw(case, spec, stream) if op.draw is not None else None
        if codes is None:
            if width:
                codes = _exact_tensor(op, case, spec, stream, width)
            elif case.pattern in ("onehot", "scaleprobe"):
                codes = _probe_tensor(op, case, spec, stream, batch)
            else:
                codes = _plain(op, case, spec, stream)
        tensors[spec.name] = Tensor(np.ascontiguousarray(codes), spec.format)
    if case.pattern == "cancel" and "w" in tensors:
        tensors["w"] = Tensor(_alternate(tensors["w"]), tensors["w"].format)
    if case.pattern == "special" and "w" in tensors and "a" in tensors:
        tensors["w"] = Tensor(_zero_opposite(tensors["a"], tensors["w"]), tensors["w"].format)
    if case.pattern == "special" and "group_scale" in tensors:
        tensors["w"] = Tensor(_zeros_under_nan(tensors["w"], tensors["group_scale"]), tensors["w"].format)
    operands = Operands(tensors)
    if width:
        operands = _fit(op, case, operands, width)
    return operands


def _zeros_under_nan(w: Tensor, scales: Tensor) -> Codes:
    """Weights whose groups under a NaN scale are zero in every second row: the product of 0 and NaN is a clause of its own."""
    dead = is_nan(scales.codes, scales.format)
    dead &= (np.arange(scales.codes.shape[-2]) % 2 == 0)[:, None]
    zero = w.codes.dtype.type(8 if w.format is UINT4 else 0)
    return np.where(np.repeat(dead, w.codes.shape[-1] // max(1, dead.shape[-1]), axis=-1), zero, w.codes)


def _alternate(w: Tensor) -> Codes:
    """Weights whose odd places along K hold the negated value of the even place before them, so that sums cancel."""
    codes = w.codes.copy()
    half = codes.shape[-1] // 2
    even = codes[..., 0 : 2 * half : 2]
    if w.format.kind is Kind.FLOAT:
        codes[..., 1 : 2 * half : 2] = even ^ w.format.sign_bit
    elif w.format.kind is Kind.INT:
        negated = (-even.astype(np.int64)) & ((1 << w.format.bits) - 1)
        lowest = w.format.min_code
        codes[..., 1 : 2 * half : 2] = np.where(even == lowest, w.format.max_code, negated).astype(codes.dtype)
    return codes


def _fit(op: Op, case: Case, operands: Operands, width: int) -> Operands:
    """Thin the rows of the activation until the exactness of the lane holds for the operands as the op uses them."""
    assert op.environment is not None
    environment = op.environment(case.problem, operands)
    a, w = environment["a"], environment["w"]
    assert isinstance(a, dot.Operand)
    assert isinstance(w, dot.Operand)
    values_a, values_w = dot.values(a), dot.values(w)
    for factor in environment.values():  # group scales on the accumulator count as part of their operand
        if isinstance(factor, Factor) and factor.grouped and factor.values.shape[-1]:
            span = -(-values_a.shape[1] // factor.values.shape[-1])
            spread = np.repeat(factor.values, span, axis=-1)[:, : values_a.shape[1]]
            if factor.axis == "m":
                values_a = values_a * spread
            else:
                values_w = values_w * spread
    unit = float(np.min(low_bit(values_a), initial=np.inf) * np.min(low_bit(values_w), initial=np.inf))
    if not np.isfinite(unit):
        return operands
    ceiling = np.max(np.abs(values_w), axis=0, initial=0.0)
    reserve = 0.5 if _has_lora(op, case) else 1.0
    source = operands["a"]
    codes = source.codes.reshape(-1, source.codes.shape[-1])
    thinned = _thin(codes, np.abs(values_a) * ceiling, reserve * (2.0**width - 1) * unit, _zero_code(source.format))
    tensors = dict(operands.tensors)
    tensors["a"] = Tensor(thinned.reshape(source.codes.shape), source.format)
    return Operands(tensors)


def _zero_code(fmt: Format) -> int:
    """The code of zero; UINT4 activations do not occur."""
    return 0


# Probes --------------------------------------------------------------------------------------------------------------


def rows_probed(op: Op, case: Case) -> list[int]:
    """The k that a one-hot or scale-probe case lights, one per row of A over all its batches.

    onehot: every k up to K = 1,024; beyond, every residue modulo 256 in the first, the last and one seeded group of 256.
    scaleprobe: one k in every group.
    """
    dims = dict(case.problem.dims)
    k, group = dims["k"], dims.get("g", 0) or 16
    if case.pattern == "scaleprobe":
        inside = Stream(case, "inside").integers(0, min(group, k) - 1, (-(-k // group),))
        return [min(k - 1, int(g * group + inside[g])) for g in range(-(-k // group))]
    if k <= 1024:
        return list(range(k))
    middle = int(Stream(case, "group").integers(1, max(1, k // 256 - 2), (1,))[0])
    starts = sorted({0, middle * 256, k - 256})
    return [start + residue for start in starts for residue in range(256)]


def _probe_scales(spec: ResolvedTensor, stream: Stream) -> Codes:
    """Block scales of 16 and 32 bits for scaleprobe. They stay within one binade: the sum is one scale, or the product of two,
    and the smallest weight of a bit is that of all groups, so that 2^P of ADM-3 is as far away as the significands are long.
    Two binary32 scales that meet have twelve bits each and a product of 24."""
    if spec.format is F32:
        return _whole(-3, -3, spec.format, spec.shape, stream, 11)
    if spec.name.startswith("a_"):
        return encode(np.ones(spec.shape), spec.format)
    return _whole(-3, -3, spec.format, spec.shape, stream)


def _probe_tensor(op: Op, case: Case, spec: ResolvedTensor, stream: Stream, batch: int) -> Codes:
    """One-hot rows of A against random weights (onehot), or against weights 1 under distinct scales (scaleprobe). Scales after
    the sum have all bits of their format."""
    fmt, shape = spec.format, spec.shape
    match spec.family:
        case Family.BLOCK_SCALE:
            if case.pattern == "scaleprobe" and fmt.bits > 8:
                return _probe_scales(spec, stream)
            if spec.name.startswith("a_"):
                return encode(np.ones(shape), fmt)
            if case.pattern == "scaleprobe":
                return encode(_powers(-4, 4, fmt.mantissa_bits, shape, stream), fmt)
            return encode(_powers(-5, -2, 3, shape, stream) if fmt.bits > 8 else _powers(-2, 2, 2, shape, stream), fmt)
        case Family.OUTER_SCALE | Family.GLOBAL_SCALE:
            return _whole(-1, 0, fmt, shape, stream)
        case Family.BIAS | Family.LORA:
            return np.zeros(shape, dtype=container(fmt))
        case Family.ZERO_POINT:
            return stream.integers(0, 15, shape).astype(container(fmt))
    if spec.role is Role.CONSTANT:
        if case.pattern == "scaleprobe" and fmt not in (UINT4,):
            return encode(np.ones(shape), fmt)
        return pick_codes(fmt, shape, stream)
    lit = rows_probed(op, case)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    codes = np.full((rows, shape[-1]), 0, dtype=container(fmt))
    one = int(encode(np.ones(1), fmt)[0])
    for row in range(rows):
        place = batch * rows + row
        codes[row, lit[place % len(lit)]] = one
    return codes.reshape(shape)


