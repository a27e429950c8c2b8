"""The cpu target: every op in NumPy on the host, by techniques that share nothing with the judge.

Decides: which room computes an op. Refuses: ops it does not know, with one sentence; it never falls back. GEMMs sum in binary64
by BLAS (`cpu_room.gemm`), encodings shift integers (`cpu_room.encodings`), quantisers are straight binary32 arithmetic, one
function per recipe (`cpu_room.quantisers`); all read and write codes by `cpu_room.codec`.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView

from .cpu_room.encodings import ENCODINGS
from .cpu_room.gemm import GEMMS
from .cpu_room.quantisers import QUANTISERS, declare_projection
from .domain import refusal

__all__ = ["Cpu", "backend"]

_BITWISE = {**ENCODINGS, **QUANTISERS}


@dataclass(frozen=True, slots=True)
class Cpu:
    """Backend protocol over the tables `GEMMS`, `ENCODINGS` and `QUANTISERS`; one tactic, "default", for every problem."""

    name: str = "cpu"
    target: str = "cpu"

    def describe(self) -> Mapping[str, str]:
        """Versions that may change a bit of a binary64 sum, and the machine."""
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {
            "numpy": np.__version__, "blas": f"{blas['name']} {blas.get('version', 'of unknown version')}",
            "python": platform.python_version(), "platform": platform.platform(), "processor": platform.machine(),
        }

    def supports(self, problem: Problem) -> str | None:
        """None for every problem of the ops in the tables that lies in the contract's domain."""
        if problem.op in GEMMS or problem.op in _BITWISE:
            return refusal(problem)
        return f"the cpu backend has no kernel for {problem.op!r}; it computes {', '.join((*_BITWISE, *GEMMS))}"

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """GEMMs, and the low-rank projection of svdquant_quantize: their program. Everything else: the contract's bits."""
        if problem.op in GEMMS:
            return GEMMS[problem.op].declare(problem)
        return declare_projection(problem) if problem.op == "svdquant_quantize" else EXACT_BITS

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Mapping[str, Any]:
        """Weights and scales of a GEMM in floating point; for other ops the tensors as they are."""
        return GEMMS[problem.op].load(problem, constants) if problem.op in GEMMS else constants

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Mapping[str, Any]:
        """Activations of a GEMM in floating point; for other ops the tensors as they are."""
        return GEMMS[problem.op].load(problem, activations) if problem.op in GEMMS else activations

    def run(
        self, problem: Problem, tactic: str, state: Mapping[str, Any], inputs: Mapping[str, Any],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Compute, write the codes of each output or of an INOUT tensor, and name the kernel."""
        tensors = {**state, **inputs}
        if problem.op in GEMMS:
            results = GEMMS[problem.op].run(problem, tensors)
        else:
            results = _BITWISE[problem.op](problem, {name: view.memory for name, view in tensors.items()})
        for name, codes in results.items():
            target = outputs[name] if name in outputs else tensors[name]
            target.memory[...] = codes
        return f"numpy_{problem.op}_{problem.variant}"


def backend(argument: str | None = None) -> Cpu:
    """The backend `cpu`. Raises ValueError for an argument: there is nothing to choose."""
    if argument is not None:
        raise ValueError(f"backend 'cpu' takes no argument, got {argument!r}; write --backend cpu")
    return Cpu()
