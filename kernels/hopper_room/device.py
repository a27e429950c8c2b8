"""Which NVIDIA device is at hand, and what follows from it for kernels of compute capability 9.0.

Decides: which device this target would run on (`chosen`), how many multiprocessors share its work (`processors`), and the
sentence that says why nothing runs (`why_compiled`).
Refuses: tensors on another device (`check`, `same_device`), and to go on where a device is visible and does not start: that is an
error, never a reason to report something weaker. What is visible is found by `look`, as for the other NVIDIA target.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from lowbit.conformance.backend import NOT_EXECUTED

from ..blackwell_room.device import Device, DeviceFault, Query, Sight, look

__all__ = [
    "CAPABILITY", "PROCESSORS", "Device", "DeviceFault", "Query", "Sight", "check", "chosen", "look", "processors", "same_device",
    "stream_handle", "why_compiled",
]

CAPABILITY = (9, 0)
"""The compute capability whose machine code is built (H100, H200, GH200). It runs on no other: sm_90a has no successor."""

PROCESSORS = 132
"""Multiprocessors of an H200, as the driver reports them (cudaDevAttrMultiProcessorCount); an H100 SXM has as many (NVIDIA H100
Tensor Core GPU Architecture). What is declared where no device is there is declared for such a one."""


def chosen(sight: Sight) -> Device | None:
    """The first device of compute capability 9.0, None where there is none. Raises DeviceFault for one that does not start."""
    if sight.fault:
        raise DeviceFault(sight.fault)
    return next((device for device in sight.devices if device.capability == CAPABILITY), None)


def why_compiled(sight: Sight) -> str:
    """The sentence for a machine without such a device: `NOT_EXECUTED`, then what was found."""
    others = ", ".join(f"{device.name} ({device.capability[0]}.{device.capability[1]})" for device in sight.devices)
    found = f"needs compute capability 9.0, found {others}" if others else sight.absence
    return f"{NOT_EXECUTED}: {found}"


@cache
def processors() -> int:
    """Multiprocessors of the device that this target runs on, asked once; `PROCESSORS` where there is none. Raises DeviceFault
    for one that does not start."""
    found = chosen(look())
    if found is None:
        return PROCESSORS
    return int(import_module("torch").cuda.get_device_properties(found.index).multi_processor_count)


@cache
def _capability(index: int) -> tuple[int, int]:
    return tuple(import_module("torch").cuda.get_device_capability(index))


def check(name: str, tensor: Any) -> None:
    """Raises ValueError where a torch tensor does not lie on a device of compute capability 9.0."""
    if tensor.device.type != "cuda":
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected a CUDA device of capability 9.0; move it there")
    found = _capability(tensor.device.index)
    if found != CAPABILITY:
        raise ValueError(
            f"{name}: got {tensor.device} of compute capability {found[0]}.{found[1]}, expected 9.0 (H100, H200), for which "
            "alone these kernels are built"
        )


def same_device(name: str, like: Any, **tensors: Any) -> None:
    """Raises ValueError for the first of `tensors` (torch, None: not given) that lies on another device than `like`, the output
    of the function `name`: an address of the host or of another device is none to a kernel."""
    for what, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{name}: got {what} on {tensor.device}, expected {like.device}, where the output lies; move it there"
            )


def stream_handle(stream: Any, device: Any) -> int:
    """The address of a CUDA stream for a launch: of `stream` (torch), or of the current one of `device` where it is None."""
    torch = import_module("torch")
    return int((torch.cuda.current_stream(device) if stream is None else stream).cuda_stream)
