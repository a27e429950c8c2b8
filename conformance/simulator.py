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
from lowbit.references.declarations import Claim, Contraction, Declaration, Join, Start, Step, cast
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

_SAME_ACCUMULATOR = {"blackwell_nvfp4": {"f16": "blackwell_f16", "bf16": "blackwell_bf16"}}
"""Datapath of a main product -> datapath of the low-rank product, by the format of its operands, on chips where one kernel issues
both into one accumulator: tcgen05.mma of kind mxf4nvf4, then of kind f16."""


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
        elif path.name in _SAME_ACCUMULATOR:
            second = DATAPATHS[_SAME_ACCUMULATOR[path.name][problem.option("out")]]
            item = replace(item, datapath=second, start=Start.PREVIOUS)
        items.append(replace(item, steps=steps))
        if path.output is F64 and number == 0 and not steps:
            items.append(cast(F32))
    return tuple(items)


class Simulator:
    """One datapath in a backend's clothes. Supports the GEMMs whose operands the datapath accepts."""

    target = "sim"
    execution = "emulated"

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
        operands = _operands(problem)
        for item in self.declare(problem, "default").program:
            if isinstance(item, Step):
                continue
            for name in item.operands:
                refused = _refused(operands[name], item)
                if refused:
                    return f"datapath {item.datapath} takes {refused}"
        return None

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


def _operands(problem: Problem) -> Mapping[str, Operand]:
    """What the op's environment hands to the datapaths, for one row of A."""
    op = ops()[problem.op]
    assert op.environment is not None
    dims = tuple((letter, min(size, 1) if letter == "m" else size) for letter, size in problem.dims)
    small = Problem(problem.op, problem.variant, dims, problem.options)
    environment = op.environment(small, draw_operands(op, Case(small, "zeros", 1)))
    return {name: operand for name, operand in environment.items() if isinstance(operand, Operand)}


def _refused(operand: Operand, item: Contraction) -> str:
    """What the datapath of a contraction takes instead of an operand; empty where it takes that."""
    path = item.datapath
    fmt = item.conversion or operand.format
    if fmt not in path.operands:
        return f"{', '.join(other.name for other in path.operands)}, not {fmt}"
    own, taken = (operand.scale_format, operand.group), (path.scale_format, path.scale_group)
    if item.conversion is None and path.scale_format is not None and own != taken:
        return f"block scales of {path.scale_format} per {path.scale_group}, which the operands of this problem do not have"
    return ""


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
