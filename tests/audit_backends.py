"""Simulators whose declaration is another one, or leaves the order of K open: what an audit has to tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowbit.conformance import simulator
from lowbit.conformance.backend import TensorView
from lowbit.conformance.case import Problem
from lowbit.references.declarations import Contraction, Declaration, Order


@dataclass(frozen=True)
class Said:
    """Computes as the simulator `runs`, declares as the simulator `says`; `unordered`: with the order of K left open."""

    runs: simulator.Simulator
    says: simulator.Simulator
    unordered: bool
    name: str = "said"
    target: str = "sim"
    execution: str = "emulated"

    def supports(self, problem: Problem) -> str | None:
        """Where both simulators take the problem."""
        return self.runs.supports(problem) or self.says.supports(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """What the other one computes."""
        found = self.says.declare(problem, tactic)
        if not self.unordered:
            return found
        program = tuple(replace(i, order=Order.UNKNOWN) if isinstance(i, Contraction) else i for i in found.program)
        return replace(found, program=program, batch_invariant=False)

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Emulate."""
        return self.runs.run(problem, tactic, state, inputs, outputs, workspace, stream)


def _said(runs: str, says: str, unordered: bool = True) -> Said:
    return Said(simulator.backend(runs), simulator.backend(says), unordered)


honest = _said("hopper_wgmma_fp8", "hopper_wgmma_fp8")
"""13 bits in an order that is not said."""
finer = _said("blackwell_f8f6f4", "hopper_wgmma_fp8")
"""25 bits where 13 are declared."""
coarser = _said("hopper_wgmma_fp8", "ieee_f32")
"""13 bits where binary32 is declared."""
wider = _said("ieee_f64", "ieee_f32")
"""binary64 where binary32 is declared."""
unpromoted = _said("hopper_wgmma_fp8", "hopper_wgmma_fp8,segment=128")
"""One accumulator over K where promotion every 128 is declared."""
promoted = _said("hopper_wgmma_fp8,segment=128", "hopper_wgmma_fp8")
"""Promotion every 128 where none is declared."""
nearest = _said("ieee_f32", "ieee_f32_rz")
"""Sums to nearest where truncation is declared."""
truncating = _said("ieee_f32_rz", "ieee_f32")
"""Truncated sums where rounding to nearest is declared."""
split = _said("blackwell_f8f6f4,splits=3", "blackwell_f8f6f4")
"""Three parts of K, whose number an unknown order leaves open."""
ordered = _said("blackwell_f8f6f4", "hopper_wgmma_fp8", unordered=False)
"""25 bits where 13 are declared, in known order."""


@dataclass(frozen=True)
class Hiding(Said):
    """As `Said`, but the last 32 of K are lost wherever M is not that of the probes."""

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Emulate, with a hole."""
        if problem.dim("m") != 64:
            short = inputs["a"].memory.copy()
            short[:, -32:] = 0
            inputs = {**inputs, "a": replace(inputs["a"], memory=short)}
        return self.runs.run(problem, tactic, state, inputs, outputs, workspace, stream)


hiding = Hiding(simulator.backend("blackwell_f8f6f4"), simulator.backend("hopper_wgmma_fp8"), True)
"""25 bits and a dropped tail of K, hidden behind 13 bits in unknown order."""


@dataclass(frozen=True)
class Partial(Said):
    """Takes no product of K = 2,048, and so not every probe of any product."""

    def supports(self, problem: Problem) -> str | None:
        """Where both simulators take the problem, but for one K."""
        return "K = 2,048 is not mine" if problem.dim("k") == 2048 else Said.supports(self, problem)


partial = Partial(finer.runs, finer.says, True)
"""25 bits where 13 are declared, and one probe refused."""
