"""The triton backend: SVDQuant W4A4, W4A16, W8A8 and W4A8-int8, their quantisers and encodings, from one Triton source.

Decides: whether it runs here, and which module of `triton_room` computes an op. It is "executed" on a CUDA device, "emulated"
where the environment asks for Triton's CPU interpreter (TRITON_INTERPRET=1), and "compiled" elsewhere, on a device of another
capability than `machine.MACHINES` has, too; then every problem is refused in one sentence that says why. Refuses: ops without a
module, what that module refuses, and to go on where the driver lists a device and torch cannot use it: `DeviceFault`, never a
fall back. Loading this module needs neither Triton nor torch, and making the backend looks at no device.

    backend argument      meaning
    (none)                the device or the interpreter
    mutant=NAME           the same, with a known fault compiled in. A lane of the suite catches each, but for int32_offsets:
                          its rows would have to lie 2^31 elements apart
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit.conformance.backend import NOT_EXECUTED, Declaration, Problem, TensorView

from .triton_room.machine import INTERPRETER, MACHINES, Machine, interpreted

__all__ = ["MODULES", "DeviceFault", "Place", "Query", "Triton", "backend", "look", "look_through"]

MODULES: Mapping[str, str] = {
    "nvfp4_quantize": "nvfp4_quantize", "svdquant_quantize": "svdquant_quantize", "fp8_quantize": "fp8_quantize",
    "int8_quantize": "int8_quantize", "int4_quantize": "int4_quantize",
    "int4_pack": "encodings", "int4_repack": "encodings", "scale_swizzle": "encodings", "fp8_convert_fnuz": "encodings",
    "fp8_requantize": "encodings",
    "gemm_nvfp4": "gemm_nvfp4", "gemm_int4": "gemm_int4", "gemm_w4a16": "gemm_w4a16", "gemm_w8a8_fp8": "gemm_w8a8_fp8",
    "gemm_w4a8_int8": "gemm_w4a8_int8",
}
"""Op -> module of `triton_room`."""

_DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where the Linux driver lists its devices, whatever torch was built for."""


class DeviceFault(Exception):
    """A device that is visible and cannot be used; the message says which and what to try."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where kernels run: `execution`, `device` as the suite names it, the record that kernels take, and why nothing runs.
    `fault`: what is wrong with a device that is visible and cannot be used."""

    execution: str
    device: str
    machine: Machine | None
    reason: str = ""
    fault: str = ""


Query = Callable[[], Place]


def _nowhere(reason: str = "", fault: str = "") -> Place:
    return Place("compiled", "host", None, reason, fault)


def look_through(torch: Any, listed: int) -> Place:
    """What `torch` (the module, or None where it is not installed) sees, beside the number of devices that the driver lists."""
    visible = f"{listed} NVIDIA device(s) are visible to the driver"
    if torch is None or torch.version.cuda is None:
        lacking = "torch is not installed" if torch is None else f"torch {torch.__version__} is built without CUDA"
        return _nowhere(fault=f"{visible}, but {lacking}; install a CUDA build of torch") if listed else _nowhere(lacking)
    if not torch.cuda.is_available():
        said = f"{visible}, but torch {torch.__version__} cannot use one; see nvidia-smi and which driver this torch needs"
        return _nowhere(fault=said) if listed else _nowhere("torch sees no CUDA device")
    try:
        capability, name = tuple(torch.cuda.get_device_capability(0)), str(torch.cuda.get_device_name(0))
    except Exception as error:
        return _nowhere(fault=f"CUDA device 0 is visible and does not initialise: {type(error).__name__}: {error}")
    if capability not in MACHINES:
        known = ", ".join(f"{major}.{minor}" for major, minor in MACHINES)
        return _nowhere(f"needs compute capability {known}, found {name} ({capability[0]}.{capability[1]})")
    return Place("executed", "cuda:0", MACHINES[capability])


@cache
def look() -> Place:
    """What this process has, looked for once."""
    missing = [name for name in ("triton", "torch") if getattr(find_spec(name), "origin", None) is None]  # a folder has none
    if interpreted() and not missing:
        return Place("emulated", "host", INTERPRETER)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    listed = 0 if hidden or not _DRIVER.is_dir() else len(list(_DRIVER.iterdir()))
    found = look_through(None if "torch" in missing else import_module("torch"), listed)
    if found.fault:
        return found
    if missing:
        return _nowhere(f"{' and '.join(missing)} cannot be imported here")
    if found.machine is None:
        return _nowhere(f"{found.reason}; TRITON_INTERPRET=1 runs the kernels on the CPU")
    return found


@cache
def _module(op: str) -> Any:
    return import_module(f"lowbit.kernels.triton_room.{MODULES[op]}")


@dataclass(frozen=True, slots=True)
class Triton:
    """Backend protocol over the modules of `triton_room`. `mutant`: a fault to compile in. `query` says what there is; tests put
    another in its place."""

    mutant: str = ""
    query: Query = look
    name: str = "triton"
    target: str = "cuda"

    def _place(self) -> Place:
        place = self.query()
        if place.fault:
            raise DeviceFault(f"{place.fault}; TRITON_INTERPRET=1 runs the kernels on the CPU")
        return place

    @property
    def execution(self) -> str:
        """"executed", "emulated" or "compiled". Raises DeviceFault where a device is visible and torch cannot use it."""
        return self._place().execution

    @property
    def device(self) -> str:
        """Where the tensors live."""
        return self._place().device

    def describe(self) -> Mapping[str, str]:
        """Versions and the machine that the kernels were told of."""
        place = self._place()
        about = {"python": platform.python_version()}
        for name in ("triton", "torch", "numpy"):
            try:
                about[name] = version(name)
            except PackageNotFoundError:
                about[name] = "not installed"
        about["machine"] = "none" if place.machine is None else place.machine.name
        if place.execution == "executed":
            about["device"] = str(import_module("torch").cuda.get_device_name(0))
        if self.mutant:
            about["mutant"] = self.mutant
        return about

    def supports(self, problem: Problem) -> str | None:
        """None where a module takes the problem; otherwise why not."""
        if problem.op not in MODULES:
            return f"the triton backend has no kernel for {problem.op!r}; it computes {', '.join(MODULES)}"
        place = self._place()
        if place.machine is None:
            return f"{NOT_EXECUTED}: {place.reason}"
        module = _module(problem.op)
        if self.mutant and self.mutant not in module.MUTANTS:
            return f"{problem.op} has no mutant {self.mutant!r}; it has {', '.join(module.MUTANTS) or 'none'}"
        refused: str | None = module.unsupported(problem, place.machine)
        return refused

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """What the module offers, the dispatch's choice first."""
        return tuple(_module(problem.op).tactics(problem, self._place().machine))

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """What the module declares."""
        declared: Declaration = _module(problem.op).declaration(problem, tactic, self._place().machine)
        return declared

    def workspace(self, problem: Problem, tactic: str) -> int:
        """Bytes of scratch memory."""
        return int(_module(problem.op).workspace(problem, tactic, self._place().machine))

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        """Weights as the kernels read them."""
        return _module(problem.op).prepare(problem, tactic, constants, self._place().machine)

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Any:
        """Activations as the kernels read them."""
        return _module(problem.op).stage(problem, tactic, activations, self._place().machine)

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Launch on the stream and name the kernel."""
        with nullcontext() if stream is None else import_module("torch").cuda.stream(stream):
            ran = _module(problem.op).run(
                problem, tactic, state, inputs, outputs, workspace, stream, self._place().machine, self.mutant,
            )
        return str(ran)


def backend(argument: str | None = None) -> Triton:
    """The backend `triton`, or with `mutant=NAME` a faulty one. Raises ValueError for another argument."""
    if argument is None:
        return Triton()
    key, _, name = argument.partition("=")
    if key != "mutant" or not name:
        raise ValueError(f"backend 'triton' takes no argument or mutant=NAME, got {argument!r}")
    return Triton(name)
