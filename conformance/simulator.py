"""Backends that compute what a datapath record says: `sim:hopper_wgmma_fp8`, `sim:blackwell_nvfp4`, `sim:imma_s32`.

They certify the bounds (an honest narrow accumulator must pass) and stand in for chips that are not at hand. Their verdicts
are labelled emulated. They share the judge's emulator on purpose, so they are no evidence for the emulator itself: that is
what the recorded hardware outputs in golden/hardware are for.
An argument may end in options: `sim:hopper_wgmma_fp8,segment=128,splits=2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.declarations import Claim, Contraction, Declaration, Join, Step, cast
from lowbit.references.dot import Operand
from lowbit.references.formats import BF16, F32, F64, Format, container
from lowbit.references.interpret import emulate
from lowbit.references.rounding import Overflow, Rounding, encode

from .backend import BackendError, TensorView
from .case import Case, Operands, Problem, Tensor
from .op import Op, outside_domain
from .ops import ops
from .patterns import draw_operands

__all__ = ["Simulator", "backend", "simulated_program"]


def _joined(step: Step) -> Step:
    """A simulator makes one choice where the contract leaves two."""
    return replace(step, join=Join.SEPARATE) if step.join is Join.EITHER else step


def simulated_program(
    op: Op, problem: Problem, path: Datapath, *, segment: int = 0, splits: int = 1, conversion: Format | None = None
) -> tuple[Contraction | Step, ...]:
    """The normative program on a datapath, every choice made. `segment`: promotion to f32 every so many of K, where the op
    has no groups of its own; `splits`: parts of K reduced in f32; `conversion`: what both operands are rounded to first."""
    assert op.program is not None
    items: list[Contraction | Step] = []
    for number, item in enumerate(op.program(problem, path)):
        if isinstance(item, Step):
            items.append(_joined(item))
            continue
        steps = tuple(_joined(step) for step in item.steps)
        if path.output is F64 and steps and number == 0:
            steps = (cast(F32), *steps)
        if number == 0:
            item = replace(item, splits=splits, conversion=conversion, segment=item.segment or segment)
        items.append(replace(item, steps=steps))
        if path.output is F64 and number == 0 and not steps:
            items.append(cast(F32))
    return tuple(items)


class Simulator:
    """One datapath in a backend's clothes. Supports the GEMMs whose operands the datapath accepts."""

    target = "sim"

    def __init__(self, name: str, path: Datapath, options: Mapping[str, int]) -> None:
        self.name, self._path, self._options = name, path, dict(options)

    def describe(self) -> Mapping[str, str]:
        """Where the numbers come from."""
        return {"datapath": self._path.name, "source": self._path.source, "evidence": self._path.evidence.name.lower()}

    def _conversion(self, problem: Problem) -> Format | None:
        """NVFP4 operands on a datapath without block scales are dequantised to bf16, which is exact."""
        return BF16 if problem.op == "gemm_nvfp4" and self._path.scale_format is None else None

    def supports(self, problem: Problem) -> str | None:
        """None where the datapath takes the operands of the op's main product."""
        op = ops().get(problem.op)
        if op is None or op.program is None or "n" not in op.dims:
            return f"{self.name} simulates matrix products only"
        if "e" in op.dims:
            return f"{self.name} simulates dense products only"
        broken = outside_domain(op, problem)
        if broken:
            return broken
        conversion = self._conversion(problem)
        operands = [] if conversion else _main_operands(problem)
        formats = {conversion} if conversion else {operand.format for operand in operands}
        if any((operand.scale_format, operand.group) != (self._path.scale_format, self._path.scale_group) for operand in operands):
            wanted = f"{self._path.scale_format} per {self._path.scale_group}" if self._path.scale_format else "no block scales"
            return f"datapath {self._path} takes {wanted}, which the operands of {problem.op} do not have"
        missing = [fmt.name for fmt in formats if fmt not in self._path.operands]
        return f"datapath {self._path} does not take {', '.join(sorted(missing))}" if missing else None

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """Exactly what `run` computes."""
        op = ops()[problem.op]
        program = simulated_program(op, problem, self._path, conversion=self._conversion(problem), **self._options)
        return Declaration(program, Claim.BOUNDED, batch_invariant=True)

    def run(
        self, problem: Problem, tactic: str, state: Mapping[str, TensorView], inputs: Mapping[str, TensorView],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Emulate the declared program bit for bit."""
        views = {**state, **inputs}
        operands = Operands({
            name: Tensor(view.memory.copy().astype(container(view.format)), view.format) for name, view in views.items()
        })
        op = ops()[problem.op]
        assert op.environment is not None
        values = emulate(self.declare(problem, tactic), op.environment(problem, operands))
        view = outputs["d"]
        codes = encode(values.lo, view.format, Rounding.RNE, Overflow.SPECIAL)
        codes[values.nan] = view.format.nan_code
        view.memory[...] = codes
        return f"emulate[{self._path}]"


def _main_operands(problem: Problem) -> list[Operand]:
    """Operands of the main product, as the op's environment hands them to the datapath."""
    op = ops()[problem.op]
    assert op.environment is not None
    small = Problem(problem.op, problem.variant, tuple((k, min(v, 1) if k == "m" else v) for k, v in problem.dims), problem.options)
    environment = op.environment(small, draw_operands(op, Case(small, "zeros", 1)))
    return [operand for name in ("a", "w") for operand in [environment[name]] if isinstance(operand, Operand)]


def backend(argument: str = "hopper_wgmma_fp8") -> Simulator:
    """The simulator of `DATAPATH[,segment=N][,splits=N]`. Raises BackendError for an unknown datapath or option."""
    name, *extra = argument.split(",")
    if name not in DATAPATHS:
        raise BackendError(f"sim:{argument}: unknown datapath {name!r}; `lowbit list datapaths` shows them all")
    options: dict[str, int] = {}
    for text in extra:
        key, _, value = text.partition("=")
        if key not in ("segment", "splits") or not value.isdigit():
            raise BackendError(f"sim:{argument}: option {text!r} is not segment=N or splits=N")
        options[key] = int(value)
    return Simulator(f"sim:{argument}", DATAPATHS[name], options)
