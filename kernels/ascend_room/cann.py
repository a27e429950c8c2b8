"""The CANN runtime, loaded when a device is looked for: memory, copies, a stream and kernel launches, through ctypes.

Decides: whether there is an NPU, and how its memory is filled and read. Refuses: to go on after a call that did not return 0, and
to take a device that is visible but does not start for one that is absent. Importing this module loads nothing.

Signatures: CANN acl/acl_base.h and acl/acl_rt.h (Runtime API reference, 8.x): every function returns an aclError, 0 for success.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .entries import Access, Entry

__all__ = ["CannError", "Runtime", "devices", "launch", "open_runtime", "toolkit"]

Array = npt.NDArray[Any]

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2  # aclrtMemcpyKind
_HUGE_FIRST = 0  # aclrtMemMallocPolicy ACL_MEM_MALLOC_HUGE_FIRST
_REPEAT_INITIALIZE = 100002  # the process, torch_npu for one, has called aclInit before
_P, _SIZE, _I32, _U32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_uint32

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aclInit": (ctypes.c_char_p,),
    "aclrtGetDeviceCount": (ctypes.POINTER(_U32),),
    "aclrtSetDevice": (_I32,),
    "aclrtCreateStream": (ctypes.POINTER(_P),),
    "aclrtMalloc": (ctypes.POINTER(_P), _SIZE, _I32),
    "aclrtFree": (_P,),
    "aclrtMemcpy": (_P, _SIZE, _P, _SIZE, _I32),
    "aclrtSynchronizeStream": (_P,),
}
_HINTS = {
    100000: "a parameter is invalid: CANN and driver of one release? compare `npu-smi info` with the toolkit's version.info",
    107001: "no such device id: look at ASCEND_RT_VISIBLE_DEVICES",
    107002: "no context: the device was reset by another part of the process",
    207001: "out of device memory: look at `npu-smi info` for other processes",
    507000: "internal runtime error: look at the plog files under ~/ascend/log",
    507008: "the SoC is not the one the kernel was compiled for: expected a 910B (dav-2201)",
    507014: "the kernel ran into the time limit, as one that waits for a flag that nobody sets would",
    507015: "a core raised an exception, for example an illegal address: look at the plog files under ~/ascend/log",
    507035: "a vector core raised an exception, for example an illegal address: look at the plog files under ~/ascend/log",
    507899: "driver error: is the user in the group that owns /dev/davinci*, and does `npu-smi info` list the device?",
}


class CannError(Exception):
    """A call of the CANN runtime that failed; the message has the function, the aclError and what to try."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The runtime, initialised, with a stream on one device. Addresses and the stream are integers."""

    library: ctypes.CDLL
    device: int
    stream: int
    soc: str


def toolkit() -> Path | None:
    """The CANN installation that the environment names (ASCEND_HOME_PATH or ASCEND_TOOLKIT_HOME), None where it names none."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if (value := os.environ.get(name)) and Path(value).is_dir():
            return Path(value)
    return None


def _call(library: ctypes.CDLL, name: str, *arguments: Any, accept: Sequence[int] = ()) -> None:
    try:
        function = getattr(library, name)
    except AttributeError:
        raise CannError(
            f"got a libascendcl.so without {name}, expected that of CANN 8.0 or later; source its set_env.sh"
        ) from None
    function.argtypes, function.restype = _SIGNATURES[name], ctypes.c_int
    code = int(function(*arguments))
    if code and code not in accept:
        hint = _HINTS.get(code, "look the number up in the aclError table of the CANN documentation")
        raise CannError(f"{name} returned aclError {code}, expected 0{_recent(library)}; {hint}")


def _recent(library: ctypes.CDLL) -> str:
    """What the runtime itself says of its last failure, where it says anything."""
    try:
        function = library.aclGetRecentErrMsg
    except AttributeError:
        return ""
    function.argtypes, function.restype = (), ctypes.c_char_p
    text = function()
    return f" ({' '.join(text.decode(errors='replace').split())[:300]})" if text else ""


def _load(nodes: Path) -> tuple[ctypes.CDLL | None, bool]:
    """(the library, None where it does not load; whether the machine has device nodes). Raises CannError for nodes without it."""
    visible = any(node.name[7:].isdigit() for node in nodes.glob("davinci*"))
    home = toolkit()
    names = [home / "lib64" / "libascendcl.so"] if home else []
    for name in (*(str(path) for path in names if path.exists()), "libascendcl.so"):
        try:
            return ctypes.CDLL(name), visible
        except OSError as error:
            reason = str(error)
    if visible:
        raise CannError(
            f"got an NPU ({nodes}/davinci*) and no usable libascendcl.so ({reason}), expected both; source set_env.sh of the "
            "CANN toolkit, or hide the device to certify the emulation"
        )
    return None, False


def devices(nodes: Path = Path("/dev")) -> int:
    """Number of NPUs: 0 where there is neither a device node nor a runtime that counts one.

    Raises CannError where `nodes` holds device nodes (davinci0, ...) and the runtime does not load, start or count them.
    """
    library, visible = _load(nodes)
    if library is None:
        return 0
    count = _U32(0)
    try:
        _call(library, "aclInit", None, accept=(_REPEAT_INITIALIZE,))
        _call(library, "aclrtGetDeviceCount", ctypes.byref(count))
    except CannError:
        if visible:
            raise
        return 0
    if visible and not count.value:
        raise CannError(
            f"got 0 devices from aclrtGetDeviceCount, expected those of {nodes}/davinci*; is ASCEND_RT_VISIBLE_DEVICES set?"
        )
    return int(count.value)


@cache
def open_runtime(device: int = 0) -> Runtime:
    """The runtime with a stream on `device`. Raises CannError, with the function and its aclError."""
    library, _ = _load(Path("/dev"))
    if library is None:
        raise CannError("got no libascendcl.so, expected that of CANN 8.0 or later; source set_env.sh of the toolkit")
    _call(library, "aclInit", None, accept=(_REPEAT_INITIALIZE,))
    _call(library, "aclrtSetDevice", device)
    stream = _P()
    _call(library, "aclrtCreateStream", ctypes.byref(stream))
    return Runtime(library, device, int(stream.value or 0), _soc(library))


def _soc(library: ctypes.CDLL) -> str:
    try:
        function = library.aclrtGetSocName
    except AttributeError:
        return "unknown"
    function.argtypes, function.restype = (), ctypes.c_char_p
    text = function()
    return text.decode(errors="replace") if text else "unknown"


def _address(argument: Any) -> int | None:
    """The device address of an argument that is one (int) or has one (a torch_npu tensor); None for host memory or None."""
    if isinstance(argument, int):
        return argument
    pointer = getattr(argument, "data_ptr", None)
    if pointer is None:
        return None
    if argument.device.type != "npu" or not argument.is_contiguous():
        raise ValueError(
            f"ascend: got a tensor on {argument.device} (contiguous: {argument.is_contiguous()}), expected a contiguous one on "
            "npu; call .npu().contiguous()"
        )
    return int(pointer())


def launch(
    runtime: Runtime, library: Path, entry: Entry, blocks: int, arguments: Sequence[Any], tiling: Array, stream: int = 0
) -> None:
    """Run one entry and wait for it.

    `arguments` in the order of `entry.arguments`: a C-contiguous NumPy array (uploaded before, downloaded after if it is
    written), a device address, a contiguous torch_npu tensor, or None for an operand that is absent. `stream`: 0 for the
    runtime's own.
    Raises CannError, ValueError; device memory that was allocated here is freed in any case.
    """
    acl, owned = runtime.library, []
    chosen = stream or runtime.stream

    def room(size: int) -> int:
        address = _P()
        _call(acl, "aclrtMalloc", ctypes.byref(address), max(size, 1), _HUGE_FIRST)
        owned.append(int(address.value or 0))
        return owned[-1]

    def uploaded(array: Array) -> int:
        address = room(array.nbytes)
        if array.nbytes:
            _call(acl, "aclrtMemcpy", address, array.nbytes, array.ctypes.data, array.nbytes, _HOST_TO_DEVICE)
        return address

    try:
        addresses = []
        for argument in arguments:
            known = 0 if argument is None else _address(argument)
            addresses.append(uploaded(argument) if known is None else known)
        addresses.append(room(entry.scratch * blocks))
        addresses.append(uploaded(tiling))
        start = ctypes.CDLL(str(library)).lowbit_launch
        start.argtypes, start.restype = (_U32, _P, ctypes.POINTER(_P)), None
        start(blocks, chosen, (_P * len(addresses))(*addresses))
        _call(acl, "aclrtSynchronizeStream", chosen)
        for (_, access), argument, address in zip(entry.arguments, arguments, addresses, strict=False):
            if access is not Access.READ and isinstance(argument, np.ndarray) and argument.nbytes:
                _call(acl, "aclrtMemcpy", argument.ctypes.data, argument.nbytes, address, argument.nbytes, _DEVICE_TO_HOST)
    finally:
        for address in owned:
            _call(acl, "aclrtFree", address)
