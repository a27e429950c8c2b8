"""Which NVIDIA device is at hand, and what follows from it for a kernel of compute capability 10.x.

Decides: what is visible (`look`), which device this target would run on (`chosen`), and the sentence that says why nothing runs.
Refuses: to go on where a device is visible and does not start. That is an error, never a reason to report something weaker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from lowbit.conformance.backend import NOT_EXECUTED

__all__ = ["MAJOR", "Device", "DeviceFault", "Query", "Sight", "chosen", "look", "look_through", "why_compiled"]

MAJOR = 10
"""Major number of the compute capability that the kernel is compiled for (10.0: B200, 10.3: B300). 12.x has no tcgen05 (PTX ISA,
target notes of tcgen05); 11.x has it, but needs code of its own, which is not built here."""

_DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where the Linux driver lists its devices, whatever torch was built for."""


class DeviceFault(Exception):
    """A device that is visible and cannot be used; the message says which and what to try."""


@dataclass(frozen=True, slots=True)
class Device:
    """One CUDA device: its index for torch, its name, its compute capability (major, minor)."""

    index: int
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sight:
    """What was found. `fault` is not empty where a device is visible and does not start; `absence` says in a few words why there
    is no device, where there is none."""

    devices: tuple[Device, ...] = ()
    absence: str = ""
    fault: str = ""


Query = Callable[[], Sight]


def look_through(torch: Any, listed: int) -> Sight:
    """What `torch` (the module, or None where it is not installed) sees, beside the number of devices that the driver lists."""
    if torch is None or torch.version.cuda is None:
        lacking = "torch is not installed" if torch is None else f"torch {torch.__version__} is built without CUDA"
        if listed:
            said = f"{listed} NVIDIA device(s) are visible to the driver, but {lacking}; install a CUDA build of torch"
            return Sight(fault=said)
        return Sight(absence=f"{lacking} and the driver lists no NVIDIA device")
    count = torch.cuda.device_count()
    if not count:
        return Sight(absence=f"torch {torch.__version__} sees no CUDA device")
    try:
        torch.cuda.init()
        found = tuple(
            Device(index, str(torch.cuda.get_device_name(index)), tuple(torch.cuda.get_device_capability(index)))
            for index in range(count)
        )
    except Exception as error:
        return Sight(fault=f"{count} CUDA device(s) are visible and do not initialise: {type(error).__name__}: {error}")
    return Sight(devices=found)


@cache
def look() -> Sight:
    """What this machine shows, once per process."""
    listed = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0
    try:
        torch = import_module("torch")
    except ImportError:
        torch = None
    return look_through(torch, listed)


def chosen(sight: Sight) -> Device | None:
    """The first device of compute capability 10.x, None where there is none. Raises DeviceFault for one that does not start."""
    if sight.fault:
        raise DeviceFault(sight.fault)
    return next((device for device in sight.devices if device.capability[0] == MAJOR), None)


def why_compiled(sight: Sight) -> str:
    """The sentence for a machine without such a device: `NOT_EXECUTED`, then what was found."""
    others = ", ".join(f"{device.name} ({device.capability[0]}.{device.capability[1]})" for device in sight.devices)
    found = f"needs compute capability {MAJOR}.x, found {others}" if others else sight.absence
    return f"{NOT_EXECUTED}: {found}"
