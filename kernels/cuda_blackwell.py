"""The cuda_blackwell backend: NVFP4 W4A4 with a low-rank term, for NVIDIA devices of compute capability 10.x.

Decides: whether it runs here. It is "executed" where a device of capability 10.x is visible and starts, "compiled" where there is
none; then every problem is refused in one sentence that says so. A device that is visible and does not start is an error.
Refuses: every op but gemm_nvfp4, and what `blackwell_room.declare.unsupported` names. It never falls back to another kernel: each
CuTe instance is a tactic under its name, the Triton twin is one more, and the suite calls them by name. Loading this module needs
neither a compiler nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lowbit.conformance.backend import Declaration, Problem, TensorView

from .blackwell_room import launch as room
from .blackwell_room.declare import declaration, unsupported
from .blackwell_room.device import Device, Query, chosen, look, why_compiled

__all__ = ["CudaBlackwell", "backend"]

Launch = Callable[[Problem, str, Mapping[str, Any], Any, float, Any], None]

_OPEN = (
    "everything that a run shows: results, that no launch hangs, speed; shown without a device are the instructions, the "
    "budgets, the schedule and the barriers (tests/blackwell), and the declared arithmetic (sim:blackwell_nvfp4)"
)
_DISTRIBUTIONS = ("nvidia-cutlass-dsl", "triton", "torch")


@dataclass(frozen=True, slots=True)
class CudaBlackwell:
    """Backend protocol. `query` says which devices there are and `launch` starts a kernel; tests put others in their place."""

    query: Query = look
    launch: Launch = room.launch
    name: str = "cuda_blackwell"
    target: str = "cuda"

    def _device(self) -> Device | None:
        return chosen(self.query())

    @property
    def execution(self) -> str:
        """"executed" or "compiled". Raises DeviceFault where a device is visible and does not start."""
        return "compiled" if self._device() is None else "executed"

    @property
    def device(self) -> str:
        """Where the tensors live: the device of capability 10.x, "host" where there is none."""
        found = self._device()
        return "host" if found is None else f"cuda:{found.index}"

    def describe(self) -> Mapping[str, str]:
        """The device, the versions of what compiles for it, and without a device what is not shown."""
        found = self._device()
        about = {"device": "none" if found is None else f"{found.name} ({found.capability[0]}.{found.capability[1]})"}
        for name in _DISTRIBUTIONS:
            try:
                about[name] = version(name)
            except PackageNotFoundError:
                about[name] = "not installed"
        if found is None:
            about["remains to be shown on silicon"] = _OPEN
        return about

    def supports(self, problem: Problem) -> str | None:
        """None where this device computes the problem. Raises DeviceFault where a device is visible and does not start."""
        return why_compiled(self.query()) if self._device() is None else unsupported(problem)

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Names of the CuTe instances that take the problem, and the Triton twin."""
        return room.tactics(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """One program for all tactics: the CuTe instances differ in tiles only, and the Triton twin rounds where they do."""
        return declaration(problem)

    def workspace(self, problem: Problem, tactic: str) -> int:
        """Bytes of an output without gaps between rows: a tensor map stores rows at multiples of 16 bytes."""
        return 2 * problem.dim("m") * problem.dim("n")

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> room.Weights:
        """Weights, scales, low-rank factor, channel scale, bias and alpha as the kernels read them."""
        return room.weights(constants)

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Mapping[str, Any]:
        """Activations, their scales and the low-rank activation as the kernels read them."""
        return room.activations(problem, activations)

    def run(
        self, problem: Problem, tactic: str, state: room.Weights, inputs: Mapping[str, Any],
        outputs: Mapping[str, TensorView], workspace: TensorView, stream: Any,
    ) -> str:
        """Launch the tactic on the stream. An output whose rows are apart is computed in the workspace and copied."""
        d, m, n = outputs["d"], problem.dim("m"), problem.dim("n")
        if m == 0:
            return f"{tactic} (nothing to launch)"
        torch = import_module("torch")
        whole = d.strides == (n, 1)
        target = d.memory if whole else workspace.memory.view(torch.int16).view(m, n)
        self.launch(problem, tactic, {**state.tensors, **inputs}, target, state.alpha, stream)
        if not whole:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                d.memory.copy_(target)
        return tactic


def backend(argument: str | None = None) -> CudaBlackwell:
    """The backend `cuda_blackwell`. Raises ValueError for an argument: the device is found, not chosen."""
    if argument is not None:
        raise ValueError(f"backend 'cuda_blackwell' takes no argument, got {argument!r}; write --backend cuda_blackwell")
    return CudaBlackwell()
