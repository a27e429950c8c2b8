"""The backend `cuda_hopper` on the emulated machine, for the suite's worker: python:tests/hopper/emulator/door.py:backend.

Decides: how a tactic names the machine it runs on: TACTIC@COPIES-PRODUCTS-sSEED-pPROCESSORS, then -ahead where activations exist
only once the work ahead on the stream is done, then -NAME for a changed source (mutants.py). A plain tactic runs on the machine
`Settings()`. Refuses: nothing that the room does not refuse.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.conformance.backend import Declaration, Problem, TensorView
from lowbit.kernels.cuda_hopper import CudaHopper, modules
from lowbit.kernels.hopper_room import gemm_w4a8

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))
import emulated
from mutants import HONEST, MUTANTS

__all__ = ["EmulatedHopper", "Run", "backend", "early_late", "late_early", "mixed"]

_TACTIC = re.compile(r"(\w+)@(early|late|either)-(early|late|either)-s(\d+)-p(\d+)(-ahead)?(?:-([a-z0-9_]+))?")


@dataclass(frozen=True, slots=True)
class Run:
    """A tactic and the machine it runs on."""

    tactic: str
    settings: emulated.Settings
    ahead: bool = False
    mutant: str = ""

    @property
    def text(self) -> str:
        """As the worker is told."""
        how = self.settings
        tail = ("-ahead" if self.ahead else "") + (f"-{self.mutant}" if self.mutant else "")
        return f"{self.tactic}@{how.copies}-{how.products}-s{how.seed}-p{how.processors}{tail}"

    @staticmethod
    def of(text: str, otherwise: emulated.Settings) -> Run:
        """What a text means."""
        found = _TACTIC.fullmatch(text)
        if found is None:
            return Run(text, otherwise)
        machine = emulated.Settings(found[2], found[3], int(found[4]), int(found[5]))
        return Run(found[1], machine, bool(found[6]), found[7] or "")


def _tensor(array: Any) -> Any:
    """A NumPy array as a torch tensor of the same memory; torch's containers are signed."""
    return torch.from_numpy(array.view(np.dtype(f"i{array.itemsize}")) if array.itemsize > 1 else array)


def _views(views: Mapping[str, TensorView]) -> dict[str, TensorView]:
    return {name: dataclasses.replace(view, memory=_tensor(view.memory)) for name, view in views.items()}


@dataclass(frozen=True, slots=True)
class EmulatedHopper(CudaHopper):
    """Backend protocol; `settings` is the machine of tactics that name none."""

    settings: emulated.Settings = field(default_factory=emulated.Settings)
    name: str = "cuda_hopper_emulated"

    @property
    def execution(self) -> str:
        return "emulated"

    @property
    def device(self) -> str:
        return "host"

    def describe(self) -> Mapping[str, str]:
        return {"device": f"emulated: {self.settings}"}

    def supports(self, problem: Problem) -> str | None:
        if problem.op not in modules():
            return f"cuda_hopper has no kernel for {problem.op!r}; it computes {', '.join(modules())}"
        return str(reason) if (reason := modules()[problem.op].unsupported(problem)) else None

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        run = Run.of(tactic, self.settings)
        if problem.op in gemm_w4a8.OPS:  # where K is cut depends on the machine
            return gemm_w4a8.declaration(problem, run.tactic, run.settings.processors)
        return CudaHopper.declare(self, problem, run.tactic)

    def workspace(self, problem: Problem, tactic: str) -> int:
        return CudaHopper.workspace(self, problem, Run.of(tactic, self.settings).tactic)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        run = Run.of(tactic, self.settings)
        with self._machine(run):
            return CudaHopper.prepare(self, problem, run.tactic, _views(constants))

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Any:
        return CudaHopper.stage(self, problem, Run.of(tactic, self.settings).tactic, _views(activations))

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        run, out = Run.of(tactic, self.settings), _views(outputs)
        scratch = dataclasses.replace(workspace, memory=_tensor(workspace.memory)) if workspace is not None else None
        with ExitStack() as stack:
            stack.enter_context(self._machine(run))
            if run.ahead:
                stack.enter_context(emulated.after(self._written(inputs, out)))
            return CudaHopper.run(self, problem, run.tactic, state, inputs, out, scratch, stream)

    def _machine(self, run: Run) -> Any:
        emulated.settings(*dataclasses.astuple(run.settings))
        changed = HONEST | {name: mutant.patches for name, mutant in MUTANTS.items()}
        return emulated.installed(changed[run.mutant] if run.mutant else None)

    def _written(self, inputs: Mapping[str, Any], outputs: Mapping[str, TensorView]) -> Any:
        """Take the activations away; the work that brings them, and destroys what was written to outputs before it."""
        kept = {name: tensor.clone() for name, tensor in inputs.items()}
        before = {name: view.memory.clone() for name, view in outputs.items()}
        for tensor in inputs.values():
            tensor.view(torch.uint8).fill_(0xFF)

        def work() -> None:
            for name, tensor in inputs.items():
                tensor.copy_(kept[name])
            for name, view in outputs.items():
                view.memory.copy_(before[name])

        return work


backend = EmulatedHopper()
early_late = backend
late_early = EmulatedHopper(settings=emulated.Settings("late", "early", 2, 3))
mixed = EmulatedHopper(settings=emulated.Settings("either", "either", 3, 5))
