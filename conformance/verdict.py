"""What is said of one case, and how an outcome is judged against its expectations.

Decides: the status of a case from the bytes read back. Refuses: to skip. Every case that was asked for ends in a verdict.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import Codes, Reals, code_of_key, decode, is_nan, order_key
from lowbit.references.rounding import Overflow, Rounding, encode

from .op import Expectation, Flag, in_format

__all__ = [
    "FAILING", "NOT_NAMED", "PASSING", "Execution", "Judgement", "Kernel", "Status", "Verdict", "Worst", "digest_outputs",
    "judge_outputs",
]


class Status(StrEnum):
    """How a case ended."""

    EXACT = "EXACT"  # every code is the only admissible one, or the claim is of bits and all bits agree
    WITHIN = "WITHIN"  # every code lies in the interval derived from the declaration
    DRIFT = "DRIFT"  # a code lies outside
    MALFORMED = "MALFORMED"  # memory written where none was to be, inputs changed, wrong shapes, an illegal declaration
    RAISED = "RAISED"  # the backend raised
    CRASHED = "CRASHED"  # the worker process died
    TIMEOUT = "TIMEOUT"  # no answer in time; the worker was killed
    UNSUPPORTED = "UNSUPPORTED"  # the backend says, with a reason, that it does not compute this problem
    UNTRUSTED = "UNTRUSTED"  # the comparison could not have failed: an all-zero output, say, would have passed
    WAIVED = "WAIVED"  # failed as a waiver file says it does


PASSING = frozenset({Status.EXACT, Status.WITHIN})
FAILING = frozenset({Status.DRIFT, Status.MALFORMED, Status.RAISED, Status.CRASHED, Status.TIMEOUT, Status.UNTRUSTED})
NOT_NAMED = "tactics() does not name"
"""In the reason of a relation that a tactic could not be asked (BCK-4): levels look for it (LVL-3)."""


class Execution(StrEnum):
    """Where the arithmetic of a verdict happened. Reports never blur these."""

    EXECUTED = "executed"  # on the device of the target
    EMULATED = "emulated"  # by a model or an emulation of it
    COMPILED = "compiled"  # compiled only; never a passing verdict


class Kernel(StrEnum):
    """How the name of the kernel is known."""

    OBSERVED = "observed"  # by a launch hook or a profiler of the suite
    CLAIMED = "claimed"  # by the backend's word


@dataclass(frozen=True, slots=True)
class Worst:
    """The element furthest outside (or, in a passing case, nearest to the edge of) its admissible set.

    `got`, `lo`, `hi`: codes in hexadecimal. `value` and `exact`: what the code stands for and the exact result before
    the output's rounding, as repr of float64. `ulps`: distance in codes to the nearest admissible one, 0 inside.
    `share`: |got - exact| over the admissible distance on that side; above 1 is outside; None where it has no meaning.
    """

    tensor: str
    index: tuple[int, ...]
    got: str
    lo: str
    hi: str
    value: str
    exact: str
    ulps: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one (case, tactic)."""

    case: str
    backend: str
    tactic: str
    lane: str  # exact, onehot, scale, bounded, golden, property, encoding, quantiser, reject, stability, tensors
    level: int  # 0..4: the level of the ladder this case belongs to
    status: Status
    reason: str = ""  # one sentence for anything but EXACT and WITHIN
    clause: str = ""  # the clause that is broken, or the first that is judged
    execution: Execution = Execution.EXECUTED
    kernel: str = ""
    kernel_source: Kernel = Kernel.CLAIMED
    operands: str = ""  # sha256 of the operands
    wrong: int = 0  # elements outside
    judged: int = 0  # elements judged (all, or the stated sample)
    total: int = 0  # elements of the outputs
    sample: str = ""  # statement of the sample where judged < total
    products: int = 0  # multiplications a plain evaluation of the op performs
    worst: Worst | None = None
    ulp_histogram: Mapping[str, int] = field(default_factory=dict)  # ULPs from RNE(exact), "0".."8", ">8" -> elements
    power: Mapping[str, bool] = field(default_factory=dict)  # fault class -> would have been seen by this case
    seconds: float = 0.0
    heat: tuple[tuple[float, ...], ...] = ()  # worst share per cell of a grid over the output, for failing and worst cases
    declared: str = ""  # class of the declaration: "as the contract", or what is looser
    source: str = ""  # file of the weights, in the lane of real weights
    output_sha256: str = ""  # digest over the output codes, in order of tensor name

    @property
    def repro(self) -> str:
        """The shell line that runs this case again."""
        tactic = f" --tactic {shlex.quote(self.tactic)}" if self.tactic != "default" else ""
        source = f" --tensors {shlex.quote(self.source)}" if self.source else ""
        return f"lowbit run '{self.case}' --backend {shlex.quote(self.backend)}{tactic}{source}"


_GRID = 24
"""Cells per side of a heat grid, at most."""
_FAR = 1 << 62
"""Distance of a code that is NaN where none is admissible, or none where one is required."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the comparison of outputs with expectations gave, before it becomes a verdict."""

    wrong: int
    judged: int
    pointed: bool  # nothing was left to choose: every admissible set is one value
    worst: Worst | None
    ulp_histogram: Mapping[str, int]
    heat: tuple[tuple[float, ...], ...]


def digest_outputs(outputs: Mapping[str, Codes]) -> str:
    """sha256 over names, shapes and little-endian bytes of all outputs, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(outputs):
        codes = outputs[name]
        digest.update(f"{name}:{codes.shape};".encode())
        digest.update(np.ascontiguousarray(codes).astype(codes.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _distance(codes: Codes, expectation: Expectation, ok: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Codes between each output and its nearest admissible code, 0 inside."""
    keys = order_key(codes, expectation.format)
    below, above = expectation.lo - keys, keys - expectation.hi
    far = is_nan(codes, expectation.format) | ((expectation.flags & Flag.NAN_REQUIRED) != 0)
    distance = np.where(far, _FAR, np.maximum(np.maximum(below, above), 1))
    return np.where(ok, 0, distance).astype(np.int64)


def _shares(codes: Codes, expectation: Expectation) -> Reals:
    """|got - exact| over the admissible distance on that side; 0 where the set is one value or nothing exact is known."""
    if expectation.exact is None:
        return np.zeros(codes.shape)
    got, exact = decode(codes, expectation.format), expectation.exact
    lo = decode(code_of_key(expectation.lo, expectation.format), expectation.format)
    hi = decode(code_of_key(expectation.hi, expectation.format), expectation.format)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        room = np.where(got >= exact, hi - exact, exact - lo)
        share = np.abs(got - exact) / room
    usable = (expectation.hi > expectation.lo) & np.isfinite(share) & (room > 0)
    return np.where(usable, share, 0.0)


def _histogram(codes: Codes, expectation: Expectation) -> dict[str, int]:
    """Elements by distance, in codes, from the exact result rounded once (RNE). NaN outputs are left out."""
    if expectation.exact is None:
        return {}
    ideal = encode(expectation.exact, expectation.format, Rounding.RNE, Overflow.SPECIAL)
    usable = ~is_nan(ideal, expectation.format) & ~is_nan(codes, expectation.format)
    away = np.abs(order_key(codes, expectation.format) - order_key(ideal, expectation.format))[usable]
    zero = (decode(codes, expectation.format) == 0)[usable] & (decode(ideal, expectation.format) == 0)[usable]
    counts = np.bincount(np.minimum(np.where(zero, 0, away), 9), minlength=10)
    return {(">8" if i == 9 else str(i)): int(n) for i, n in enumerate(counts) if n}


def _heat(measure: Reals) -> tuple[tuple[float, ...], ...]:
    """Largest value per cell of a grid of at most 24 x 24 over a matrix."""
    if measure.ndim != 2 or not measure.size:
        return ()
    rows, columns = (np.array_split(np.arange(n), min(n, _GRID)) for n in measure.shape)
    return tuple(tuple(round(float(measure[np.ix_(r, c)].max()), 4) for c in columns) for r in rows)


def _worst(name: str, codes: Codes, expectation: Expectation, distance: npt.NDArray[np.int64], shares: Reals) -> Worst | None:
    if not codes.size:
        return None
    measure = distance if distance.any() else shares
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(measure)), codes.shape))
    fmt = expectation.format
    width = 2 + -(-fmt.bits // 4)

    def text(code: object) -> str:
        return f"{int(code):#0{width}x}"  # type: ignore[call-overload]

    ends = [text(code_of_key(keys[index].reshape(1), fmt)[0]) for keys in (expectation.lo, expectation.hi)]
    if expectation.flags[index] & Flag.NAN_REQUIRED:
        ends = ["NaN", "NaN"]
    exact = "" if expectation.exact is None else repr(float(expectation.exact[index]))
    value = repr(float(decode(codes[index].reshape(1), fmt)[0]))
    share = float(shares[index]) if shares[index] else None
    return Worst(name, index, text(codes[index]), ends[0], ends[1], value, exact, int(min(distance[index], _FAR)), share)


def judge_outputs(
    expectations: Mapping[str, Expectation], outputs: Mapping[str, Codes], untouched: Mapping[str, npt.NDArray[np.bool_]],
) -> Judgement:
    """Compare every output with its admissible set. Shapes agree; the worker made them from the op's tensors."""
    wrong = judged = 0
    pointed = True
    worst: Worst | None = None
    histogram: dict[str, int] = {}
    heat: tuple[tuple[float, ...], ...] = ()
    for name, expectation in expectations.items():
        codes = outputs[name]
        ok = expectation.admits(codes, untouched.get(name))
        codes = in_format(codes, expectation.format)
        wrong += int((~ok).sum())
        judged += codes.size
        pointed &= not expectation.sparse and bool((expectation.lo == expectation.hi).all())
        distance, shares = _distance(codes, expectation, ok), _shares(codes, expectation)
        found = _worst(name, codes, expectation, distance, shares)
        if found is not None and (worst is None or (found.ulps, found.share or 0.0) > (worst.ulps, worst.share or 0.0)):
            worst = found
            heat = _heat(np.where(distance > 0, 1.0 + np.minimum(distance, 1e6), shares))
        for label, count in _histogram(codes, expectation).items():
            histogram[label] = histogram.get(label, 0) + count
    return Judgement(wrong, judged, pointed, worst, histogram, heat)
