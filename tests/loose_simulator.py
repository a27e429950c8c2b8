"""An honest emulation of Hopper's fp8 wgmma that declares less than it has: the order of K is said to be unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowbit.conformance import simulator
from lowbit.conformance.backend import TensorView
from lowbit.conformance.case import Problem
from lowbit.references.declarations import Contraction, Declaration, Order


@dataclass(frozen=True)
class Loose:
    """The simulator `honest`, with `Order.UNKNOWN` declared; it computes in ascending order."""

    honest: simulator.Simulator
    name: str = "loose"
    target: str = "sim"

    def supports(self, problem: Problem) -> str | None:
        """As the simulator."""
        return self.honest.supports(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """What the simulator computes, the order left open."""
        found = self.honest.declare(problem, tactic)
        program = tuple(replace(i, order=Order.UNKNOWN) if isinstance(i, Contraction) else i for i in found.program)
        return replace(found, program=program, batch_invariant=False)

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """As the simulator."""
        return self.honest.run(problem, tactic, state, inputs, outputs, workspace, stream)


def backend(argument: str = "hopper_wgmma_fp8") -> Loose:
    """The simulator of one datapath."""
    return Loose(simulator.backend(argument))
