"""Runs kernel entries on what is here: an NPU through CANN, else our emulation of AscendC compiled by g++.

Decides: which of the two it is, once per process and argument, and how many blocks are started. Refuses: to fall back. A device
that is visible but does not start raises, and so does an emulated kernel that breaks a rule of the device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .build import SANITIZERS, BuildError, compiler, device_library, emulated_library, mutants
from .cann import Runtime, devices, open_runtime, toolkit
from .cann import launch as launch_on_device
from .entries import ENTRIES, Access, Cores, Entry

__all__ = ["EMULATED_BLOCKS", "Choice", "EmulationError", "Engine", "choice_of", "engine", "library_of", "run"]

Array = npt.NDArray[Any]

_READABLE, _WRITABLE, _INITIALISED = 1, 2, 4  # flags of lowbit::Buffer
_FLAGS = {
    Access.READ: _READABLE | _INITIALISED, Access.WRITE: _READABLE | _WRITABLE,
    Access.CHANGE: _READABLE | _WRITABLE | _INITIALISED,
}
_MESSAGE = 4096
EMULATED_BLOCKS = 2
"""Blocks of an emulated launch: more than one, so that the split of the work over blocks is executed."""

_DEVICE_BLOCKS = {Cores.BOTH: 20, Cores.CUBE: 20, Cores.VECTOR: 40}  # every model of the 910B has at least 20 cube cores


class EmulationError(Exception):
    """A kernel that did under emulation what the device would punish; the message begins with the rule."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was asked for. `emulate`: the emulation even where there is an NPU. `mutant` and `sanitize` change how the emulation
    is compiled."""

    emulate: bool = False
    mutant: str = ""
    sanitize: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """Where kernels run. `runtime` is None for the emulation."""

    choice: Choice
    runtime: Runtime | None

    @property
    def execution(self) -> str:
        """ "executed" on a device, "emulated" without one."""
        return "emulated" if self.runtime is None else "executed"


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("reserved", ctypes.c_uint32))


def choice_of(argument: str | None) -> Choice:
    """The choice that a backend's argument names: "", "emulate", or "mutant=NAME" and "sanitize=NAME", joined by commas, which
    are emulated too. Raises ValueError."""
    given: dict[str, str] = {}
    legal = {"emulate": ("",), "mutant": mutants(), "sanitize": SANITIZERS}
    for part in (argument or "").split(","):
        name, _, value = part.partition("=")
        if part and value not in legal.get(name, ()):
            raise ValueError(
                f"backend 'ascend' got argument {part!r}, expected emulate, mutant=NAME or sanitize=NAME; mutants are "
                f"{', '.join(legal['mutant'])}; sanitizers are {', '.join(SANITIZERS)}"
            )
        given |= {name: value} if part else {}
    return Choice(bool(given), given.get("mutant", ""), given.get("sanitize", ""))


@cache
def engine(choice: Choice) -> Engine:
    """The engine for a choice. Raises CannError for a device that is visible but does not start, BuildError where there is
    neither a device nor g++."""
    if not choice.emulate and devices():
        return Engine(choice, open_runtime())
    try:
        compiler("g++", "install it, and the kernels run under emulation")
    except BuildError as error:
        raise BuildError(f"no NPU here, and the emulation cannot be compiled: {error}") from None
    return Engine(choice, None)


def library_of(place: Engine, entry: Entry) -> Path:
    """The compiled library of an entry, from the cache or compiled now. Raises BuildError."""
    if place.runtime is None:
        return emulated_library(entry, place.choice.mutant, place.choice.sanitize)
    return device_library(entry, toolkit())


@cache
def _emulation(library: Path) -> Any:
    function = ctypes.CDLL(str(library)).lowbit_emulate
    function.argtypes = (ctypes.c_uint32, ctypes.POINTER(_Buffer), ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


def _buffer(array: Array | None, access: Access) -> _Buffer:
    if array is None:
        return _Buffer(None, 0, _READABLE, 0)
    return _Buffer(array.ctypes.data, array.nbytes, _FLAGS[access], 0)


def _emulate(library: Path, entry: Entry, arguments: Sequence[Array | None], tiling: Array) -> None:
    scratch = np.empty(entry.scratch * EMULATED_BLOCKS, np.uint8)
    buffers = [_buffer(array, access) for array, (_, access) in zip(arguments, entry.arguments, strict=True)]
    buffers += [_buffer(scratch, Access.WRITE), _buffer(tiling, Access.READ)]
    message = ctypes.create_string_buffer(_MESSAGE)
    if _emulation(library)(EMULATED_BLOCKS, (_Buffer * len(buffers))(*buffers), len(buffers), message, _MESSAGE):
        raise EmulationError(message.value.decode(errors="replace"))


def run(place: Engine, name: str, operands: dict[str, Any], sizes: dict[str, int], stream: int = 0) -> str:
    """Run the entry `name` and wait for it; its name is returned.

    `operands`: C-contiguous NumPy arrays by argument name, written in place; on a device also addresses (int) and torch_npu
    tensors. What is left out is absent. `sizes`: the words of its tiling by name. `stream`: a device's stream, 0 for our own.
    Raises EmulationError, CannError, BuildError, ValueError.
    """
    entry = ENTRIES[name]
    arguments = [operands.get(argument) for argument, _ in entry.arguments]
    tiling = np.array([sizes[word] for word in entry.words], np.uint32)
    for argument, (label, _) in zip(arguments, entry.arguments, strict=True):
        if isinstance(argument, np.ndarray) and not argument.flags.c_contiguous:
            raise ValueError(f"{name}: got {label} with strides {argument.strides}, expected a C-contiguous array")
    library = library_of(place, entry)
    if place.runtime is None:
        _emulate(library, entry, arguments, tiling)
    else:
        launch_on_device(place.runtime, library, entry, _DEVICE_BLOCKS[entry.cores], arguments, tiling, stream)
    return name
