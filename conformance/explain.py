"""One output element under a lens: its exact terms, its admissible set, both candidate roundings, and what would explain it.

Decides: which single fault, out of a list, reproduces the bits that came back. A hypothesis is a change of operands (one term
gone, one block of K gone, a neighbour's scale, no bias, ...) evaluated over the reals and rounded once; it is named only if it
gives the code that was read, and if no other gives more of the wrong elements around it. Refuses: to guess. Without such a
hypothesis it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references import dot
from lowbit.references.dot import Operand
from lowbit.references.formats import Codes, Format, code_of_key, decode, is_nan, order_key
from lowbit.references.interpret import ideal
from lowbit.references.rounding import Overflow, Rounding, encode

from . import bundle as bundles
from .bounds import restrict
from .case import Operands, Problem, Tensor
from .op import DomainError, Expectation, Op, Role, specs_of
from .ops import ops
from .run import expectations_of

__all__ = ["Explanation", "Term", "explain", "to_data", "to_text"]

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Term:
    """One product of the main sum: its place in K, both values and the product, exactly."""

    k: int
    a: str
    w: str
    product: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of one element. Codes in hexadecimal, values as text; `diagnosis`: the faults that give the very bits."""

    case: str
    backend: str
    tactic: str
    tensor: str
    index: tuple[int, ...]
    got: str
    got_value: str
    lo: str
    hi: str
    exact: str
    main_sum: str
    candidates: tuple[str, ...]
    inside: bool
    terms: tuple[Term, ...]
    diagnosis: tuple[str, ...]


def _hex(code: int, fmt: Format) -> str:
    return f"{int(code):#0{2 + -(-fmt.bits // 4)}x}"


def _bundle_of(source: str, backend: str, tactic: str) -> bundles.Bundle:
    """The bundle behind a file, or a run of the case made now."""
    if Path(source).is_file():
        return bundles.load(Path(source))
    return bundles.capture(source, backend, tactic)


def _index(text: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != len(shape) or not all(part.strip().isdigit() for part in parts):
        raise DomainError(f"element {text!r}: expected {len(shape)} numbers joined by commas, for an output of shape {shape}")
    index = tuple(int(part) for part in parts)
    if any(i >= size for i, size in zip(index, shape, strict=True)):
        raise DomainError(f"element {text} lies outside the output of shape {shape}")
    return index


def explain(source: str, element: str, backend: str, tactic: str = "default", terms: int = 8) -> Explanation:
    """Explain element `ROW,COL` of the first output of a case id (run now) or of a bundle file. Raises DomainError."""
    found = _bundle_of(source, backend, tactic)
    op, case = ops()[found.case.problem.op], found.case
    name, codes = next(iter(found.outputs.items()))
    index = _index(element, codes.shape)
    expectation = expectations_of(op, case, found.operands, found.declaration)[name]
    if op.expect_given is not None and case.pattern != "golden":
        expectation = op.expect_given(case, found.operands, found.declaration, found.outputs)[name]
    fmt = expectation.format
    got = int(codes[index])
    exact = None if expectation.exact is None else float(expectation.exact[index])
    lo, hi = (int(code_of_key(keys[index].reshape(1), fmt)[0]) for keys in (expectation.lo, expectation.hi))
    inside = bool(expectation.admits(codes)[index])
    listed: tuple[Term, ...] = ()
    main = ""
    diagnosis: list[str] = []
    if op.is_gemm and "e" not in op.dims:
        problem, part = restrict(op, case.problem, found.operands, np.array([index[0]]), np.array([index[1]]))
        listed, main = _terms(op, problem, part, terms)
        if not inside:
            diagnosis = _diagnose(op, found, index, codes, expectation)
    candidates = () if exact is None or not np.isfinite(exact) else tuple(_candidates(exact, fmt))
    value = repr(float(decode(codes[index].reshape(1), fmt)[0]))
    return Explanation(
        str(case),
        found.backend,
        found.tactic,
        name,
        index,
        _hex(got, fmt),
        value,
        _hex(lo, fmt),
        _hex(hi, fmt),
        "" if exact is None else repr(exact),
        main,
        candidates,
        inside,
        listed,
        tuple(diagnosis),
    )


def _candidates(exact: float, fmt: Format) -> Iterator[str]:
    for rounding in (Rounding.FLOOR, Rounding.CEIL):
        code = encode(np.array([exact]), fmt, rounding, Overflow.SPECIAL)
        yield f"{_hex(int(code[0]), fmt)} = {float(decode(code, fmt)[0])!r}"


def _terms(op: Op, problem: Problem, operands: Operands, count: int) -> tuple[tuple[Term, ...], str]:
    """The largest products of the main sum of a 1 x 1 problem, and the sum, as exact fractions."""
    assert op.environment is not None
    environment = op.environment(problem, operands)
    a, w = environment["a"], environment["w"]
    assert isinstance(a, Operand)
    assert isinstance(w, Operand)
    left, right = dot.values(a)[0], dot.values(w)[0]
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return (), "not finite"
    products = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(left, right, strict=True)]
    order = sorted(range(len(products)), key=lambda k: -abs(products[k]))[:count]
    return tuple(Term(k, repr(float(left[k])), repr(float(right[k])), str(products[k])) for k in order), str(sum(products))


# Hypotheses ----------------------------------------------------------------------------------------------------------


def _changed(operands: Operands, name: str, codes: Codes) -> Operands:
    tensors = dict(operands.tensors)
    tensors[name] = Tensor(np.ascontiguousarray(codes), tensors[name].format)
    return Operands(tensors)


def _hypotheses(op: Op, problem: Problem, whole: Operands, rows: Places, columns: Places) -> Iterator[tuple[str, Operands]]:
    """(sentence, operands of the problem of these rows and columns that a faulty kernel would have used), simplest first."""
    _, part = restrict(op, problem, whole, rows, columns)
    shapes = {spec.name: spec.shape for spec in specs_of(op, problem) if spec.role is not Role.OUTPUT}
    k = part["a"].codes.shape[-1]
    for name, what in (("bias", "the bias"), ("lora_act", "the low-rank term")):
        if name in part:
            yield f"{what} is missing", _changed(part, name, np.zeros_like(part[name].codes))
    for width in (256, 128, 64, 32, 16, 8, 1):
        for start in range(0, k, width) if width < k else ():
            codes = part["a"].codes.copy()
            codes[..., start : start + width] = 0
            last = min(k, start + width) - 1
            what = f"the terms k = {start}..{last} are missing" if last > start else f"the term k = {start} is missing"
            yield what, _changed(part, "a", codes)
    for name, shape in shapes.items():
        scales = part[name].codes
        if len(shape) < 2 or not shape[-1].startswith("k/") or scales.shape[-1] < 2:
            continue
        for shift, what in ((1, "of the next group"), (-1, "of the previous group")):
            yield f"{name} {what} is used for every group", _changed(part, name, np.roll(scales, -shift, axis=-1))
        yield f"{name} of group 0 is used for every group", _changed(part, name, np.broadcast_to(scales[..., :1], scales.shape))
        for group in range(scales.shape[-1]):
            for other in sorted({max(0, group - 1), min(scales.shape[-1] - 1, group + 1), 0} - {group}):
                changed = scales.copy()
                changed[..., group] = scales[..., other]
                yield f"group {group} uses {name} of group {other}", _changed(part, name, changed)
    for axis, letter, here in (("m", "row", rows), ("n", "column", columns)):
        for name, shape in shapes.items():
            if shape[0] != axis:
                continue
            codes = whole[name].codes
            for step, what in ((1, f"the next {letter}"), (-1, f"the previous {letter}"), (-codes.shape[0], f"{letter} 0")):
                places = np.clip(here + step, 0, codes.shape[0] - 1)
                if places[0] != here[0]:
                    yield f"{name} of {what} is used", _changed(part, name, codes[places])
    w = part["w"]
    if w.format.bits == 4 and k % 2 == 0:
        swapped = w.codes.reshape(*w.codes.shape[:-1], k // 2, 2)[..., ::-1].reshape(w.codes.shape)
        yield "the two nibbles of every weight byte are exchanged", _changed(part, "w", swapped)
    for place in range(k):
        for bit in range(w.format.bits):
            codes = w.codes.copy()
            codes[..., place] ^= codes.dtype.type(1 << bit)
            yield f"weight k = {place} has bit {bit} flipped", _changed(part, "w", codes)


def _witnesses(wrong: npt.NDArray[np.bool_], index: tuple[int, ...]) -> tuple[Places, Places]:
    """The element's row and column, each first, and up to three others that hold most of the wrong elements."""
    found = []
    for axis, here in enumerate(index):
        counts = wrong.sum(axis=1 - axis)
        others = [int(i) for i in np.argsort(-counts, kind="stable") if i != here and counts[i]][:3]
        found.append(np.array([here, *others], dtype=np.int64))
    return found[0], found[1]


def _diagnose(op: Op, found: bundles.Bundle, index: tuple[int, ...], codes: Codes, expectation: Expectation) -> list[str]:
    """Up to three hypotheses that give the code that was read and, among those, most of the wrong codes around it.

    A hypothesis gives a code if it comes as near to it as the admissible interval is wide: to the bit where that is a point."""
    fmt = expectation.format
    wrong = ~expectation.admits(codes)
    rows, columns = _witnesses(wrong, index)
    place = np.ix_(rows, columns)
    got, room, wrong = order_key(codes[place], fmt), (expectation.hi - expectation.lo)[place], wrong[place]
    wrong &= ~is_nan(codes[place], fmt)
    if not wrong[0, 0]:
        return []
    problem, _ = restrict(op, found.case.problem, found.operands, rows, columns)
    assert op.environment is not None
    scored: list[tuple[int, str]] = []
    if decode(codes[index].reshape(1), fmt)[0] == 0:
        zeros = int((decode(codes[place], fmt) == 0)[wrong].sum())
        scored.append((zeros, "the element is zero: it may not have been computed at all"))
    for sentence, operands in _hypotheses(op, found.case.problem, found.operands, rows, columns):
        values = ideal(found.declaration, op.environment(problem, operands))
        faulty = encode(values, fmt, Rounding.RNE, Overflow.SPECIAL)
        given = wrong & (np.abs(order_key(faulty, fmt) - got) <= room) & np.isfinite(values)
        if given[0, 0]:
            scored.append((int(given.sum()), sentence))
    best = max((score for score, _ in scored), default=0)
    others = int(wrong.sum()) - 1
    told = f" (and gives {best - 1} of {others} other wrong elements looked at)" if others else ""
    return [sentence + told for score, sentence in scored if score == best][:3]


# Text ----------------------------------------------------------------------------------------------------------------


def to_data(found: Explanation) -> dict[str, Any]:
    """Plain data of an explanation."""
    return asdict(found)


def to_text(found: Explanation) -> str:
    """An explanation for a terminal."""
    lines = [
        f"{found.case} on {found.backend}: {found.tensor}{list(found.index)}",
        f"  got         {found.got} = {found.got_value}",
        f"  admissible  {found.lo} .. {found.hi}" + ("" if found.inside else "   <- outside"),
    ]
    if found.exact:
        lines.append(f"  exact       {found.exact}; either side of it: {' and '.join(found.candidates)}")
    if found.main_sum:
        lines.append(f"  main sum    {found.main_sum}")
    lines += [f"  term k={term.k:<6} {term.a} x {term.w} = {term.product}" for term in found.terms]
    if not found.inside:
        lines.append("  diverges:   " + ("; or ".join(found.diagnosis) or "no single fault of the list gives these bits"))
    return "\n".join(lines)
