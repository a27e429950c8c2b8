"""OpenCL for the kernels of this folder: which device there is, their programs, and buffers over memory of the suite.

Decides: which device computes, in which state of the target (`Sight`), how the sources are built, and that tensors are used where
they lie: a buffer over host memory is no copy on a CPU, so that a read or write beyond a tensor meets the guard page behind it.
Refuses: to go on where an Intel GPU is visible and does not answer, and devices without what the bits rest on (binary32
subnormals, infinities and nearest-even; for quotients the correctly rounded division).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import NOT_EXECUTED

__all__ = [
    "INSTALL", "KERNELS", "OPTIONS", "Buffer", "DeviceFault", "Place", "Query", "Sight", "chosen", "look", "opened", "over",
    "program_text", "room_for", "sight_of", "start", "synchronise", "why_compiled",
]

INSTALL = (
    "install the wheel pyopencl and an OpenCL runtime: the system package pocl-opencl-icd or the wheel pocl-binary-distribution"
)
"""What to do where there is nothing to run on."""

KERNELS = {  # kernel -> file
    "gemm_w4a8_int8": "gemm_w4a8_int8.cl", "int8_quantize": "int8_quantize.cl", "pack_int4": "int4_words.cl",
    "convert_b8": "int4_words.cl", "interleave_int4": "int4_words.cl",
}
OPTIONS = "-cl-std=CL1.2 -cl-fp32-correctly-rounded-divide-sqrt"
"""Build options that decide bits; without any of the -cl-fast-... family, contraction is off by codes.cl."""

_NEEDED = {"subnormals": 1, "infinities and NaN": 2, "rounding to nearest even": 4}  # bits of CL_DEVICE_SINGLE_FP_CONFIG, cl.h
_DIVIDES = 128  # CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT
_CPU, _GPU = 2, 4  # bits of CL_DEVICE_TYPE
_INTEL = "0x8086"  # PCI vendor number
_NODES, _SYSFS = Path("/dev/dri"), Path("/sys/class/drm")

Array = npt.NDArray[Any]


class DeviceFault(Exception):
    """A device that is visible and cannot be used; the message says which and what to try."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What was found: an OpenCL device of an Intel GPU, one of a CPU, the words for why there is neither, or a fault."""

    gpu: Any = None
    cpu: Any = None
    absence: str = ""
    fault: str = ""


Query = Callable[[], Sight]


@cache
def _nodes() -> tuple[str, ...]:
    """Device nodes of Intel GPUs that this process could open."""
    vendors = ((node, _SYSFS / node.name / "device" / "vendor") for node in sorted(_NODES.glob("renderD*")))
    return tuple(str(node) for node, file in vendors if file.is_file() and file.read_text().strip() == _INTEL)


def sight_of(devices: Sequence[Any], nodes: Sequence[str], builds: Callable[[Any], bool]) -> Sight:
    """`devices`: pyopencl devices, `nodes`: device nodes of Intel GPUs. A node that no device answers for is a fault. `builds`:
    whether a runtime can compile for its CPU; one that cannot is passed over."""
    intel = [device for device in devices if device.type & _GPU and "intel" in device.vendor.lower()]
    cpus = [device for device in devices if device.type & _CPU and builds(device)]
    if nodes and not intel:
        said = f"{nodes[0]} is an Intel GPU, but no OpenCL platform offers it; install intel-opencl-icd, or open its permissions"
        return Sight(cpu=cpus[0] if cpus else None, fault=said)
    if not (intel or cpus):
        found = f"OpenCL offers {len(devices)} device(s), no Intel GPU and no CPU that it compiles for"
        return Sight(absence=f"{found}; {INSTALL}")
    return Sight(gpu=intel[0] if intel else None, cpu=cpus[0] if cpus else None)


def _builds(device: Any) -> bool:
    """Whether the runtime of a device compiles an empty kernel for it: PoCL 3.0 refuses CPUs that its LLVM does not know."""
    cl = import_module("pyopencl")
    try:
        cl.Program(cl.Context([device]), "__kernel void nothing(void) {}").build()
    except cl.Error:
        return False
    return True


@cache
def look() -> Sight:
    """What this machine shows, once per process."""
    try:
        cl = import_module("pyopencl")
    except ImportError as error:
        return Sight(absence=f"pyopencl does not import ({error}); {INSTALL}")
    try:
        devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except cl.Error as error:
        return Sight(absence=f"there is no OpenCL platform ({error}); {INSTALL}")
    return sight_of(devices, _nodes(), _builds)


def chosen(sight: Sight, argument: str) -> Any:
    """The OpenCL device: an Intel GPU, else a CPU; with the argument "cpu" the CPU. None where there is none. Raises DeviceFault
    for a GPU that is visible and that OpenCL does not offer."""
    if argument == "cpu":
        return sight.cpu
    if sight.fault:
        raise DeviceFault(f"{sight.fault}; the backend xpu:cpu runs the kernels on the CPU")
    return sight.gpu or sight.cpu


def why_compiled(sight: Sight) -> str:
    """The sentence for a machine without OpenCL: `NOT_EXECUTED`, then what was found and what to install."""
    return f"{NOT_EXECUTED}: {sight.absence or 'OpenCL offers no CPU'}"


def program_text(file: str) -> str:
    """OpenCL C of one file of this folder, the codes in front."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in ("codes.cl", file))


@dataclass(frozen=True, slots=True)
class Place:
    """A device with its context and its queue, in order."""

    device: Any
    context: Any
    queue: Any

    @property
    def divides(self) -> bool:
        """Whether binary32 quotients are correctly rounded."""
        return bool(self.device.single_fp_config & _DIVIDES)


@cache
def opened(device: Any) -> Place:
    """Context and queue on a device. Raises DeviceFault where it does not start, or lacks what the bits rest on."""
    lacking = [name for name, bit in _NEEDED.items() if not device.single_fp_config & bit]
    if lacking:
        raise DeviceFault(f"{device.name} has binary32 without {', '.join(lacking)}, on which every result rests; use xpu:cpu")
    cl = import_module("pyopencl")
    try:
        context = cl.Context([device])
        return Place(device, context, cl.CommandQueue(context))
    except cl.Error as error:
        raise DeviceFault(f"{device.name} does not start: {error}") from error


@cache
def _kernels(device: Any, file: str, defines: str) -> Any:
    cl, place = import_module("pyopencl"), opened(device)
    options = [option for option in OPTIONS.split() if place.divides or "divide" not in option]
    program = cl.Program(place.context, program_text(file)).build(options=[*options, *defines.split()])
    return {kernel.function_name: kernel for kernel in program.all_kernels()}


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer, the stride between its rows in elements, and the host memory that it lies over, if any."""

    memory: Any
    stride: int = 0
    host: Any = None


def over(place: Place, array: Array, *, written: bool = False) -> Buffer:
    """A buffer over the memory of an array of rows, which are contiguous but may lie apart. It needs one element at least."""
    flags = import_module("pyopencl").mem_flags
    span = sum((size - 1) * step for size, step in zip(array.shape, array.strides, strict=True)) + array.itemsize
    host = (ctypes.c_ubyte * span).from_address(array.ctypes.data)
    mode = flags.READ_WRITE if written else flags.READ_ONLY  # written: bytes between rows must survive
    return Buffer(import_module("pyopencl").Buffer(place.context, mode | flags.USE_HOST_PTR, hostbuf=host),
                  array.strides[0] // array.itemsize, array)


def room_for(place: Place, nbytes: int) -> Buffer:
    """A buffer of the device's own."""
    cl = import_module("pyopencl")
    return Buffer(cl.Buffer(place.context, cl.mem_flags.READ_WRITE, nbytes))


def start(
    place: Place, kernel: str, defines: Mapping[str, int], sizes: Sequence[int], group: Sequence[int] | None, *arguments: Any,
) -> None:
    """Enqueue a kernel over `sizes` work items. Arguments: buffers, NumPy integers, or None for a pointer that is not read."""
    cl = import_module("pyopencl")
    found = _kernels(place.device, KERNELS[kernel], " ".join(f"-D{name}={number}" for name, number in defines.items()))[kernel]
    found.set_args(*(argument.memory if isinstance(argument, Buffer) else argument for argument in arguments))
    cl.enqueue_nd_range_kernel(place.queue, found, tuple(sizes), None if group is None else tuple(group))


def synchronise(place: Place, *written: Buffer) -> None:
    """Wait for the queue; afterwards the host memory under these buffers holds what the kernels wrote."""
    cl = import_module("pyopencl")
    for buffer in written:
        mapped, _ = cl.enqueue_map_buffer(
            place.queue, buffer.memory, cl.map_flags.READ, 0, (buffer.memory.size,), np.uint8, is_blocking=True)
        mapped.base.release(place.queue)
    place.queue.finish()
