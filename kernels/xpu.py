"""The xpu target: W4A8-int8 GEMM, its activation quantiser and its weight packing, in OpenCL C for Intel GPUs.

Decides: which device computes and what that is called. On an Intel GPU a verdict is `executed`; where there is none the same
sources run on the CPU of an OpenCL runtime (PoCL), and every verdict says `emulated`; without one nothing runs.
Refuses: ops and variants that no kernel covers, one sentence each, and to fall back from a GPU that is visible and does not
start.

    backend argument      meaning
    (none)                the Intel GPU if there is one, else the CPU
    cpu                   the CPU, also where there is a GPU
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lowbit.conformance.backend import EXECUTIONS, Declaration, Problem, TensorView

from .xpu_room import launch
from .xpu_room.declare import OPS, declare, refusal
from .xpu_room.opencl import OPTIONS, Query, chosen, look, opened, why_compiled

__all__ = ["REMAINS", "Xpu", "backend", "main"]

REMAINS = (
    "that the kernels run on an Intel GPU at all, and what they give there",
    "that its driver keeps binary32 subnormals and rounds conversions to binary16 as OpenCL requires",
    "every time and throughput: nothing here measures speed",
)
"""What an emulated certificate leaves open, in plain words."""

_GPU = 4  # CL_DEVICE_TYPE_GPU


@dataclass(frozen=True, slots=True)
class Xpu:
    """Backend protocol over the kernels of xpu_room; a GEMM has two tactics, `rows1` and `rows8`. Tensors live in host memory,
    over which the kernels' buffers lie. `query` says which devices there are; tests put another in its place."""

    argument: str = ""
    query: Query = look
    name: str = "xpu"
    target: str = "xpu"

    def _device(self) -> Any:
        return chosen(self.query(), self.argument)

    @property
    def execution(self) -> str:
        """"executed" on an Intel GPU, "emulated" on a CPU, "compiled" where there is neither. Raises DeviceFault for a GPU that
        is visible and does not start."""
        executed, emulated, compiled = EXECUTIONS
        device = self._device()
        return compiled if device is None else executed if device.type & _GPU else emulated

    def describe(self) -> Mapping[str, str]:
        """The device and its runtime, the build options, and what is not shown without an Intel GPU."""
        device = self._device()
        about = {"kernels": f"OpenCL C, {OPTIONS}"}
        for distribution in ("pyopencl", "pocl-binary-distribution"):
            try:
                about[distribution] = version(distribution)
            except PackageNotFoundError:
                about[distribution] = "not installed"
        if device is None:
            return about | {"device": "none", "remains to be shown on silicon": "; ".join(REMAINS)}
        about |= {
            "device": f"{device.name}, {device.version}", "driver": device.driver_version, "runtime": device.platform.version,
        }
        if self.execution != EXECUTIONS[0]:
            about |= {
                "execution": "the OpenCL sources of the GPU, compiled for and run on the CPU by an OpenCL runtime",
                "remains to be shown on silicon": "; ".join(REMAINS),
            }
        return about

    def supports(self, problem: Problem) -> str | None:
        """None for gemm_w4a8_int8, int8_quantize, and int4_pack: `compressed_tensors`, `k_major` and `b8`."""
        device = self._device()
        return why_compiled(self.query()) if device is None else refusal(problem, divides=opened(device).divides)

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Rows of D per work item of the GEMM."""
        return tuple(launch.ROWS) if problem.op == "gemm_w4a8_int8" else ("default",)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """One program for both tactics of the GEMM, claimed to the bit; everything else: the contract's bits."""
        return declare(problem)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Mapping[str, Any]:
        """Weights of a GEMM in words of eight, interleaved, and their scales with N last."""
        return launch.weights(opened(self._device()), constants) if problem.op == "gemm_w4a8_int8" else {}

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Mapping[str, Any]:
        """Activations where they lie."""
        return launch.staged(activations)

    def run(
        self, problem: Problem, tactic: str, state: Mapping[str, Any], inputs: Mapping[str, Any],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Start the kernels of the op, wait, and name the last."""
        memory = {name: view.memory for name, view in outputs.items()}
        return launch.run(opened(self._device()), problem, tactic, {**state, **inputs}, memory)


def backend(argument: str | None = None) -> Xpu:
    """The backend `xpu`. `argument`: see the module. Raises ValueError for one it does not know."""
    if argument not in (None, "cpu"):
        raise ValueError(f"backend 'xpu' got argument {argument!r}; expected none, or cpu: --backend xpu:cpu")
    return Xpu(argument or "")


def main() -> None:
    """`python -m lowbit.kernels.xpu`: one line per op that says where it is computed here, then what the backend says of
    itself."""
    found = backend()
    about, execution = found.describe(), found.execution
    where = why_compiled(look()) if execution == EXECUTIONS[-1] else f"{execution} on {about['device']}"
    for op in OPS:
        print(f"{op}: {where}")
    for name, text in about.items():
        print(f"{name}: {text}")


if __name__ == "__main__":
    main()
