"""Fingerprints of whole matrix products: order, promotion and split of k, found by masked sums and proven on random operands.

Decides: nothing about arithmetic. A product function is asked twice: on masked operands, whose results count the terms that
joined after two large ones had met, and on random operands. Every candidate model is asked the same; those that answer alike,
bit for bit, are named.
Refuses: to name a model that the random operands refute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.datapaths import DATAPATHS, Datapath, Family
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, E4M3FN, E5M2, F16, F32, FORMATS, INT8, INT32, Codes, Format, Reals, container, decode
from lowbit.references.rounding import Overflow, Rounding, encode, round_to

__all__ = [
    "FINGERPRINTS", "Candidate", "Fingerprint", "Product", "Shape", "candidates", "fingerprint", "masked_operands", "modelled",
    "parts_of", "told",
]

Product = Callable[[Codes, Codes], Codes]
"""A [M, K] codes, W [N, K] codes -> codes [M, N] of the output format: sum over k."""
Emulator = Callable[[Operand, Operand, Datapath, int], Codes]
"""(A, W, record, segment) -> codes of the record's output; see cuda_dot.emulate_tiles for segments."""


@dataclass(frozen=True, slots=True)
class Shape:
    """M = N = rows; K."""

    rows: int
    k: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model of a product function: parts of `part` neighbouring k (0: one part, the last may be shorter), each a chain of nodes
    promoted every `segment` k (0: never). Parts are rounded to `partial`, added in ascending k, every sum rounded to `total`;
    the last is rounded to the output."""

    path: str
    segment: int = 0
    part: int = 0
    partial: str = ""  # format names; empty: the accumulator's
    total: str = ""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A product function by name. `big` and `one` are values (of A, of W) whose products mask and count."""

    name: str
    formats: tuple[Format, Format]
    output: Format
    paths: tuple[str, ...]
    big: float
    one: float


_FP8 = ("hopper_wgmma_fp8", "hopper_mma_fp8")
_BF16 = ("hopper_bf16", "ampere_bf16", "ieee_f32")
_F16 = ("hopper_f16", "ampere_f16", "hopper_f16_f16", "ieee_f32")
_CORNER = 64  # rows and columns on which candidates are tried first
_SPLITS = (2, 3, 4, 5, 6, 7, 8, 16)
_BLOCK = 128  # bytes of k in a tile of shared memory, the largest that the swizzle modes know: parts are whole blocks
_SMALL = 2.0**-9  # its square counts: 2^-18, far below the unit 2 of a node that holds 2^14, even a thousand times


def _fingerprints() -> Iterator[Fingerprint]:
    for fast in ("fast", "slow"):
        for scales, output in (("tensor", F32), ("tensor", BF16), ("row", BF16)):
            yield Fingerprint(f"scaled_mm, {fast}, {scales} scales, {output.name}", (E4M3FN, E4M3FN), output, _FP8, 128.0, _SMALL)
    yield Fingerprint("scaled_mm, fast, e5m2 by e4m3", (E5M2, E4M3FN), F32, _FP8, 128.0, _SMALL)
    for kind, fmt, paths in (("bf16", BF16, _BF16), ("f16", F16, _F16)):
        for output in (F32, fmt):
            yield Fingerprint(f"matmul, {kind} to {output.name}", (fmt, fmt), output, paths, 2.0**10, _SMALL)
    yield Fingerprint("int_mm", (INT8, INT8), INT32, ("imma_s32",), 127.0, 1.0)
    for limit in ("default", "32", "64", "128"):
        yield Fingerprint(f"triton dot, e4m3, max_num_imprecise_acc {limit}", (E4M3FN, E4M3FN), F32, _FP8, 128.0, _SMALL)
    yield Fingerprint("triton dot, bf16", (BF16, BF16), F32, _BF16, 2.0**10, _SMALL)
    yield Fingerprint("triton dot, int8", (INT8, INT8), INT32, ("imma_s32",), 127.0, 1.0)


FINGERPRINTS: dict[str, Fingerprint] = {f.name: f for f in _fingerprints()}


def parts_of(subject: Fingerprint, k: int) -> list[int]:
    """Lengths of the parts that splits of k may have: equal ones, and as even as whole blocks allow. 0: one part."""
    block = _BLOCK // subject.formats[0].size
    found = {0: None}
    for splits in _SPLITS:
        even = [k // splits] if k % splits == 0 else []
        found |= dict.fromkeys(n for n in (*even, -(-k // (block * splits)) * block) if -(-k // n) == splits)
    return list(found)


def candidates(subject: Fingerprint, k: int) -> list[Candidate]:
    """Models worth trying for one subject at one K. Integer sums have one."""
    found = []
    for name in subject.paths:
        path = DATAPATHS[name]
        if path.family is Family.INTEGER:
            return [Candidate(name)]
        wide, narrow = path.output.name, subject.output.name
        joins = [("", "")] + ([(narrow, ""), (narrow, narrow)] if narrow != wide else [])
        for part in parts_of(subject, k):
            if part % path.instruction_k:
                continue
            for segment in (0,) if path.family is Family.IEEE else (0, 32, 64, 128, 256, 512):
                if segment < (part or k) and segment % path.instruction_k == 0:
                    found += [Candidate(name, segment, part, *join) for join in (joins if part else joins[:1])]
    return found


def partial_sums(a: Operand, w: Operand, candidate: Candidate, emulator: Emulator) -> list[Reals]:
    """Values [M, N] of the parts of k, in ascending k, as the accumulators hold them."""
    path, k = DATAPATHS[candidate.path], a.codes.shape[1]
    found = []
    for first in range(0, k, candidate.part or k):
        part = slice(first, first + (candidate.part or k))
        sides = [Operand(np.ascontiguousarray(op.codes[:, part]), op.format) for op in (a, w)]
        with np.errstate(invalid="ignore"):
            found.append(decode(emulator(sides[0], sides[1], path, candidate.segment), path.output))
    return found


def joined(parts: list[Reals], candidate: Candidate, output: Format) -> Codes:
    """What a candidate makes of the sums of its parts: codes [M, N] of the output."""
    own = DATAPATHS[candidate.path].output
    partial, running = (FORMATS[name] if name else own for name in (candidate.partial, candidate.total))
    total: Reals | None = None
    with np.errstate(invalid="ignore"):
        for value in parts:
            value = value if partial is own else round_to(value, partial)
            total = value if total is None else round_to(total + value, running)
    assert total is not None
    return encode(total, output, Rounding.RNE, Overflow.SATFINITE if output is INT32 else Overflow.SPECIAL)


def modelled(a: Operand, w: Operand, candidate: Candidate, output: Format, emulator: Emulator) -> Codes:
    """What a candidate answers, codes [M, N] of the output."""
    return joined(partial_sums(a, w, candidate, emulator), candidate, output)


def described(candidate: Candidate, k: int) -> dict[str, Any]:
    """A candidate for the record, with the number of its parts."""
    return {**asdict(candidate), "splits": -(-k // (candidate.part or k))}


def masked_operands(subject: Fingerprint, shape: Shape, first: int = 0) -> tuple[Operand, Operand, npt.NDArray[np.int64]]:
    """Row r of A and row r of W hold big at `first` and at position[r] (opposite signs), one elsewhere: results [r, r] count.

    Positions run over all k behind `first`, or over evenly spread ones where there are more k than rows.
    """
    rest = [k for k in range(shape.k) if k != first]
    chosen = np.unique(np.linspace(0, len(rest) - 1, min(shape.rows, len(rest))).astype(np.int64))
    position = np.array(rest)[chosen]
    sides = []
    for sign, fmt in ((-1.0, subject.formats[0]), (1.0, subject.formats[1])):
        x = np.full((shape.rows, shape.k), subject.one)
        x[:, first] = subject.big
        x[np.arange(position.size), position] = sign * subject.big
        sides.append(Operand(encode(x, fmt), fmt))
    return sides[0], sides[1], position


def random_operands(subject: Fingerprint, shape: Shape, seed: int) -> tuple[Operand, Operand]:
    """Normal values times powers of two: sums that every width and order rounds in another way."""
    rng = np.random.default_rng([30, seed])
    sides = []
    for fmt in subject.formats:
        x = rng.standard_normal((shape.rows, shape.k)) * np.exp2(rng.integers(-3, 4, (shape.rows, shape.k)))
        sides.append(Operand(encode(x * (10.0 if fmt is INT8 else 1.0), fmt), fmt))
    return sides[0], sides[1]


def fingerprint(subject: Fingerprint, product: Product, shape: Shape, emulator: Emulator) -> dict[str, Any]:
    """Ask one product function, and every candidate; a JSON record.

    survivors: per mask position, the number of ones that joined after the masks had met. consistent: the candidates that answer
    both operands alike, in every element asked (several where they are one function at this K).
    closest: those that differ least on a corner of the random product, and by how much.
    """
    a, w, position = masked_operands(subject, shape)
    left, right = random_operands(subject, shape, len(subject.name))
    seen, drawn = product(a.codes, w.codes), product(left.codes, right.codes)
    for codes in (seen, drawn):
        if codes.shape != (shape.rows, shape.rows) or codes.dtype != container(subject.output):
            raise ValueError(f"{subject.name}: got {codes.dtype} {codes.shape}, expected {container(subject.output)} of {shape}")
    again = product(left.codes, right.codes)
    diagonal = np.arange(position.size)
    corner = [Operand(op.codes[:_CORNER], op.format) for op in (left, right)]
    closest = []
    for chains, same in groupby(candidates(subject, shape.k), lambda c: replace(c, partial="", total="")):
        parts = partial_sums(corner[0], corner[1], chains, emulator)
        for candidate in same:
            want = joined(parts, candidate, subject.output)
            closest.append((int((want != drawn[:_CORNER, :_CORNER]).sum()), candidate))
    closest.sort(key=lambda pair: pair[0])
    consistent = []
    for candidate in (c for differing, c in closest if differing == 0):
        masked = modelled(a, w, candidate, subject.output, emulator)[diagonal, diagonal]
        whole = modelled(left, right, candidate, subject.output, emulator)
        if np.array_equal(whole, drawn) and np.array_equal(masked, seen[diagonal, diagonal]):
            consistent.append(described(candidate, shape.k))
    return {
        "name": subject.name, "m": shape.rows, "n": shape.rows, "k": shape.k, "position": position.tolist(),
        "survivors": [float(x) if x % 1 else int(x) for x in decode(seen[diagonal, diagonal], subject.output) / subject.one**2],
        "consistent": consistent, "closest": [{"differing": differing, **described(c, shape.k)} for differing, c in closest[:3]],
        "repeated_alike": bool(np.array_equal(drawn, again)),
    }


def told(row: dict[str, Any]) -> str:
    """A candidate of a record in words."""
    words = [row["path"]]
    words += [f"promoted every {row['segment']}"] if row["segment"] else []
    words += [f"{row['splits']} parts of {row['part']}"] if row["part"] else []
    words += [f"parts in {row['partial']}"] if row["partial"] else []
    words += [f"summed in {row['total']}"] if row["total"] else []
    return ", ".join(words)
