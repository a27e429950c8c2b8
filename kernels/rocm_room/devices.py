"""Which AMD chip is at hand, and what the kernels are told of it.

Decides: the record of each supported chip (`CHIPS`), which one this process runs on, and the sentence that says why none does.
Refuses: to go on where a supported chip is visible and torch cannot use it; that is an error, never a reason to emulate in
silence. Emulation is asked for: TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit.conformance.backend import NOT_EXECUTED, Problem
from lowbit.kernels.triton_room.machine import INTERPRETER, Machine, interpreted

__all__ = ["ASSUMED", "CHIPS", "Chip", "DeviceFault", "Query", "Sight", "emulated", "look", "look_through", "too_large",
           "why_compiled"]


class DeviceFault(Exception):
    """A chip that is visible and cannot be used; the message says which and what to try."""


@dataclass(frozen=True, slots=True)
class Chip:
    """`version` is the number under which the kernel driver lists it, `units` the compute units of its largest product."""

    machine: Machine
    version: int
    units: int


def _machine(name: str, fp8: str, *, fnuz: bool) -> Machine:
    paths = {"f16": "cdna3_f16", "bf16": "cdna3_bf16", "fp8": fp8, "int8": "imma_s32"}
    return Machine(name, native=True, datapaths=paths, ascending=False, fnuz=fnuz)


CHIPS: Mapping[str, Chip] = {
    "gfx942": Chip(_machine("gfx942", "cdna3_fp8", fnuz=True), 90402, 304),  # MI300X
    "gfx950": Chip(_machine("gfx950", "ieee_f32", fnuz=False), 90500, 256),  # MI350X: OCP e4m3
}
"""By the name that the compiler gives the chip. CDNA4's sums are not published; see ASSUMED."""

ASSUMED = (
    "assumed: Triton's K order on MFMA units is not promised, so every sum is declared in unknown order; on gfx950 16-bit "
    "products as those of CDNA3 and fp8 products as binary32 sums, because no bit model of CDNA4 is published"
)
"""What the declared datapaths rest on."""


def too_large(problem: Problem, machine: Machine) -> str | None:
    """A sentence for a problem whose tiles do not fit the local memory of a chip: gfx950 has 160 KiB, and those of gemm_w4a16 for
    more than 64 rows, made for an H200, take up to 200 KiB with the copies in flight that the compiler plans there."""
    if machine.name == "gfx950" and problem.op == "gemm_w4a16" and problem.dim("m") > 64:
        return f"gemm_w4a16 for gfx950 takes at most 64 rows, got M = {problem.dim('m')}: larger tiles exceed its local memory"
    return None


def emulated(chip: str) -> Machine:
    """The record for Triton's CPU interpreter in the place of a chip."""
    return Machine(
        f"{chip}, interpreted", native=False, datapaths=INTERPRETER.datapaths, ascending=False, fnuz=CHIPS[chip].machine.fnuz)


@dataclass(frozen=True, slots=True)
class Sight:
    """What was found: `chip` on which torch computes; `interpreter`, whether the kernels run in Triton's; else why nothing runs,
    or a fault."""

    chip: str = ""
    interpreter: bool = False
    absence: str = ""
    fault: str = ""


Query = Callable[[], Sight]

_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")


def _listed(topology: Path) -> tuple[str, ...]:
    """Supported chips that the kernel driver lists."""
    texts = [file.read_text(encoding="ascii") for file in sorted(topology.glob("*/properties"))]
    versions = {int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("gfx_target_version ")}
    return tuple(name for name, chip in CHIPS.items() if chip.version in versions)


def look_through(torch: Any, listed: tuple[str, ...]) -> Sight:
    """What `torch` (the module, or None where it is not installed) sees, beside the supported chips that the driver lists."""
    hip = None if torch is None else torch.version.hip
    if hip is None:
        lacking = "torch is not installed" if torch is None else f"torch {torch.__version__} is built without ROCm"
        if listed:
            return Sight(fault=f"{listed[0]} is visible to the driver, but {lacking}; install a ROCm build of torch")
        return Sight(absence=f"{lacking} and the driver lists no {' or '.join(CHIPS)}")
    if not torch.cuda.is_available():
        if listed:
            return Sight(fault=f"{listed[0]} is visible to the driver, but torch {torch.__version__} sees no device")
        return Sight(absence=f"torch {torch.__version__} sees no device")
    found = str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    return Sight(chip=found) if found in CHIPS else Sight(absence=f"needs {' or '.join(CHIPS)}, found {found}")


@cache
def look() -> Sight:
    """What this process has, looked for once."""
    missing = [name for name in ("triton", "torch") if getattr(find_spec(name), "origin", None) is None]  # a folder has none
    if interpreted() and not missing:
        return Sight(interpreter=True)
    found = look_through(None if "torch" in missing else import_module("torch"), _listed(_TOPOLOGY))
    if missing and not found.fault:
        return Sight(absence=f"{' and '.join(missing)} cannot be imported here")
    if found.chip or found.fault:
        return found
    return Sight(absence=f"{found.absence}; TRITON_INTERPRET=1 runs the kernels on the CPU")


def why_compiled(sight: Sight) -> str:
    """The sentence for a process in which nothing runs: `NOT_EXECUTED`, then what was found."""
    return f"{NOT_EXECUTED}: {sight.absence}"
