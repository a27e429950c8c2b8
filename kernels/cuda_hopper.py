"""The cuda_hopper backend: W4A8 and W8A8 products, their encodings and quantisers, for compute capability 9.0 (H100, H200).

Decides: whether it runs here, and which module of `hopper_room` computes an op. It is "executed" where a device of capability
9.0 is visible and starts, "compiled" where there is none; then every problem is refused in one sentence that says so. A device
that is visible and does not start is an error.
Refuses: ops that no module has, and what the module of an op names. It never falls back to another kernel: every tactic is called
by name. Loading this module needs neither a compiler nor torch.

    python -m lowbit.kernels.cuda_hopper --build      compiles every kernel ahead of the first call; needs nvcc and no device
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lowbit.conformance.backend import Declaration, Problem, TensorView

from .hopper_room.build import BuildError, Unit, build_all, compiler
from .hopper_room.device import Device, Query, chosen, look, why_compiled

__all__ = ["MODULES", "CudaHopper", "backend", "main", "modules", "units"]

MODULES = ("encodings", "quantisers", "gemm_w4a8", "gemm_w8a8")
"""The modules of `hopper_room` that compute ops, each those of its `OPS`."""

_ROOM = f"{__package__}.hopper_room"


@cache
def modules() -> Mapping[str, Any]:
    """Op -> the module that computes it."""
    found = (import_module(f"{_ROOM}.{name}") for name in MODULES)
    return {op: module for module in found for op in module.OPS}


def units() -> tuple[Unit, ...]:
    """Every library of the room."""
    return tuple(unit for module in dict.fromkeys(modules().values()) for unit in module.UNITS)


@dataclass(frozen=True, slots=True)
class CudaHopper:
    """Backend protocol. `query` says which devices there are; tests put another in its place."""

    query: Query = look
    name: str = "cuda_hopper"
    target: str = "cuda"

    def _device(self) -> Device | None:
        return chosen(self.query())

    @property
    def execution(self) -> str:
        """"executed" or "compiled". Raises DeviceFault where a device is visible and does not start."""
        return "compiled" if self._device() is None else "executed"

    @property
    def device(self) -> str:
        """Where the tensors live: the device of capability 9.0, "host" where there is none."""
        found = self._device()
        return "host" if found is None else f"cuda:{found.index}"

    def describe(self) -> Mapping[str, str]:
        """The device, the version of torch, and the compiler."""
        found = self._device()
        about = {"device": "none" if found is None else f"{found.name} ({found.capability[0]}.{found.capability[1]})"}
        try:
            about["torch"] = version("torch")
        except PackageNotFoundError:
            about["torch"] = "not installed"
        try:
            about["nvcc"] = str(compiler())
        except BuildError as error:
            about["nvcc"] = str(error)
        return about

    def supports(self, problem: Problem) -> str | None:
        """None where this device computes the problem. Raises DeviceFault where a device is visible and does not start."""
        if self._device() is None:
            return why_compiled(self.query())
        if problem.op not in modules():
            return f"cuda_hopper has no kernel for {problem.op!r}; it computes {', '.join(modules())}"
        return str(reason) if (reason := modules()[problem.op].unsupported(problem)) else None

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Every tactic that takes the problem, the one that is dispatched first."""
        return tuple(modules()[problem.op].tactics(problem))

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The arithmetic of a tactic, from its module."""
        found: Declaration = modules()[problem.op].declaration(problem, tactic)
        return found

    def workspace(self, problem: Problem, tactic: str) -> int:
        """Bytes of scratch memory."""
        return int(modules()[problem.op].workspace(problem, tactic))

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        """Constants as the kernels of a tactic read them."""
        return modules()[problem.op].prepare(problem, tactic, constants)

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Any:
        """Activations as the kernels of a tactic read them."""
        return modules()[problem.op].stage(problem, tactic, activations)

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Launch the tactic on the stream and return the name of the kernel."""
        return str(modules()[problem.op].run(problem, tactic, state, inputs, outputs, workspace, stream))


def backend(argument: str | None = None) -> CudaHopper:
    """The backend `cuda_hopper`. Raises ValueError for an argument: the device is found, not chosen."""
    if argument is not None:
        raise ValueError(f"backend 'cuda_hopper' takes no argument, got {argument!r}; write --backend cuda_hopper")
    return CudaHopper()


def main(arguments: Sequence[str]) -> int:
    """`--build`: compile every library. Exit code 0, 1 where one cannot be built, 2 for other arguments."""
    if list(arguments) != ["--build"]:
        print(f"cuda_hopper: got {' '.join(arguments) or 'no argument'}, expected --build", file=sys.stderr)
        return 2
    try:
        build_all(units())
    except BuildError as error:
        print(f"cuda_hopper: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
