"""Backends that cut K in each quarter of D at places of its own, and declare it; others that declare it and do not.

Decides: nothing by the interpreter of declarations. Parts are chains of the datapath, one at a time, added here.
Refuses: all but gemm_w4a8_fp8 without a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import Cut, TensorView
from lowbit.conformance.case import Operands, Problem, Tensor
from lowbit.conformance.ops import ops
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Claim, Contraction, Declaration, Join, Order, cast, mul
from lowbit.references.dot import Operand, emulate
from lowbit.references.formats import BF16, E4M3FN, F16, F32, Reals, container, decode
from lowbit.references.interpret import Factor
from lowbit.references.rounding import Overflow, Rounding, encode, round_to, sum_odd

PATH = DATAPATHS["hopper_wgmma_fp8"]
BLOCK = 128


def quarters(m: int, n: int, k: int) -> Iterator[Cut]:
    """Of D, each cut at the multiples of 128 that its number, 0 to 3, leaves: quarter q has a cut behind block b where b % 4 is
    not q, and one of b and q is odd."""
    halves = [[span for span in ((0, size // 2), (size // 2, size)) if span[0] < span[1]] for size in (m, n)]
    for i, rows in enumerate(halves[0]):
        for j, columns in enumerate(halves[1]):
            q = 2 * i + j
            ends = (BLOCK * (b + 1) for b in range(-(-k // BLOCK) - 1) if b % 4 != q and (b + q) % 2)
            yield Cut(rows, columns, (*ends, k))


@dataclass(frozen=True)
class Quartered:
    """`early`: each cut a block before where it is declared. `descending`: the last part is added first. `turned`: each quarter
    has the cuts of the next. `unordered`: an order of the totals is not declared, nor any cut."""

    early: bool = False
    descending: bool = False
    turned: bool = False
    unordered: bool = False
    name: str = "quartered"
    target: str = "sim"
    execution: str = "emulated"

    def supports(self, problem: Problem) -> str | None:
        """W4A8 without a bias."""
        if problem.op != "gemm_w4a8_fp8" or problem.option("bias") == "bias":
            return "quartered computes gemm_w4a8_fp8 without a bias"
        constraints = problem.dim("n") % 8 or problem.dim("g") not in (64, 128) or problem.dim("k") % problem.dim("g")
        return f"{problem} is outside the op's domain" if constraints else None

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """Quarters, to the bit; or, `unordered`, one total of groups in any order."""
        m, n, k = (problem.dim(letter) for letter in "mnk")
        cuts = () if self.unordered or not m else tuple(quarters(m, n, k))
        if problem.variant == "exact":
            item = Contraction(
                ("a", "w"), PATH, segment=problem.dim("g"), steps=(mul("group_scale", join=Join.FUSED),), conversion=E4M3FN,
                cuts=cuts, reduction_order=Order.UNKNOWN if self.unordered else Order.ASCENDING,
            )
        else:
            item = Contraction(("a", "w"), PATH, cuts=cuts, order=Order.UNKNOWN if self.unordered else Order.ASCENDING)
        out = cast({"bf16": BF16, "f16": F16}[problem.option("out")])
        claim = Claim.BOUNDED if self.unordered else Claim.BIT_EXACT
        return Declaration((item, mul("token_scale"), mul("channel_scale"), out), claim, batch_invariant=False)

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Part by part."""
        given = {
            name: Tensor(view.memory.copy().astype(container(view.format)), view.format)
            for name, view in {**state, **inputs}.items()
        }
        op = ops()[problem.op]
        assert op.environment is not None
        environment = op.environment(problem, Operands(given))
        a, w = environment["a"], environment["w"]
        assert isinstance(a, Operand)
        assert isinstance(w, Operand)
        if w.format is not E4M3FN:
            w = Operand(encode(decode(w.codes, w.format), E4M3FN), E4M3FN)
        scales = environment.get("group_scale")
        m, n, k = (problem.dim(letter) for letter in "mnk")
        declared = list(quarters(m, n, k))
        used = [cut.ends for cut in declared]
        if self.turned:
            used = used[1:] + used[:1]
        if self.early:
            used = [tuple(dict.fromkeys([*(end - BLOCK for end in each[:-1] if end > BLOCK), k])) for each in used]
        total = np.zeros((m, n))
        for cut, ends in zip(declared, used, strict=True):
            rows, columns = slice(*cut.rows), slice(*cut.columns)
            factor = scales.values[columns] if isinstance(scales, Factor) else None
            left, right = Operand(a.codes[rows], E4M3FN), Operand(w.codes[columns], E4M3FN)
            parts = [_part(left, right, factor, problem.dim("g"), span) for span in pairwise((0, *ends))]
            if self.descending:
                parts.reverse()
            value = parts[0]
            for other in parts[1:]:
                value = round_to(value + other, F32)
            total[rows, columns] = value
        token, channel = (environment[name] for name in ("token_scale", "channel_scale"))
        assert isinstance(token, Factor)
        assert isinstance(channel, Factor)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = round_to(round_to(total * token.values.reshape(-1, 1), F32) * channel.values.reshape(1, -1), F32)
        view = outputs["d"]
        codes = encode(scaled, view.format, Rounding.RNE, Overflow.SPECIAL)
        codes[np.isnan(scaled)] = view.format.nan_code
        view.memory[...] = codes
        return "quartered"


@dataclass(frozen=True)
class Several(Quartered):
    """Tactics `first` and `second` declare what they compute, `loose` leaves the order open."""

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Three."""
        return "first", "loose", "second"

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """Quarters, or any order."""
        return replace(honest, unordered=tactic == "loose").declare(problem, tactic)


def _part(a: Operand, w: Operand, scales: Reals | None, group: int, span: tuple[int, int]) -> npt.NDArray[np.float64]:
    """One part of K [M, N]: a chain, or one per group, each times its scale into a total by one rounding."""
    def chain(first: int, last: int) -> Reals:
        here = slice(first, last)
        return decode(emulate(Operand(a.codes[:, here], E4M3FN), Operand(w.codes[:, here], E4M3FN), PATH), F32)

    if scales is None:
        return chain(*span)
    total = np.zeros((len(a.codes), len(w.codes)))
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(*span, group):
            total = round_to(sum_odd(total, chain(first, min(first + group, span[1])) * scales[:, first // group]), F32)
    return total


honest = Quartered()
early = replace(honest, early=True)
descending = replace(honest, descending=True)
turned = replace(honest, turned=True)
unordered = replace(honest, unordered=True)
several = Several()
