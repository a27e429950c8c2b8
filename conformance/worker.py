"""The process in which a backend runs, and the parent's side of it.

Decides: what came of one call of a backend (`Outcome`): the bytes read back, or that it raised, crashed, hung or wrote where
it must not; and, after a crash or a hang, whether the suspect fails alone or only after the cases before it.
Refuses: to import a backend in the parent, and to load objects of a backend's classes there. Only the records named in
`_RECORDS`, arrays of codes and plain builtins cross the socket, whatever the worker sends.

One worker serves many calls: importing a framework takes a second, a call takes milliseconds. The worker is killed after a
hang, started again when the next call needs it, and dies with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import hashlib
import importlib.util
import io
import math
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import TracebackType, UnionType
from typing import IO, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from lowbit.references import datapaths, declarations, rounding
from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.declarations import Declaration
from lowbit.references.formats import FORMATS, UINT8, Codes, Format, container

from . import op
from .backend import BackendError, TensorView, describe, find_backend, tactics_of
from .case import Operands, Problem
from .device import Allocation, Device, open_device
from .memory import POISONS, Bytes, Placement, check_placement, zone_pattern
from .op import ResolvedTensor, Role
from .verdict import Kernel

__all__ = ["VARIATIONS", "Ending", "Fault", "Outcome", "Variation", "Worker", "WorkerError", "check_record", "differences"]

_PYTHON = "python:"  # references python:FILE.py:ATTRIBUTE name a backend by file instead of by entry point
_TAIL = 4096  # bytes of the worker's output kept for messages
_LOG_LIMIT = 1 << 20  # bytes of the worker's output kept on disk between calls
_POLL = 0.25  # seconds between two looks at whether the worker is alive
_GUARD_HINT = ", probably an access outside its buffers: guard pages surround every tensor"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Ending(StrEnum):
    """How one call of a backend ended."""

    OK = "ok"
    RAISED = "raised"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Fault:
    """A call that gave no answer to judge. `reason` is one sentence, `log` the end of the traceback or of the worker's output."""

    ending: Ending
    reason: str
    log: str = ""


class WorkerError(Exception):
    """Raised by `hello`, `tactics` and `declare` where the backend gives no usable answer; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Variation:
    """How the suite calls a backend that should not notice. `poison`: index into `POISONS`. `row_pad`: containers of poison
    after each row of an output without a layout. `side_stream`: run on a new stream, where the device has streams."""

    poison: int = 0
    placement: Placement = "end"
    repeats: int = 1
    row_pad: int = 0
    side_stream: bool = False


VARIATIONS: dict[str, Variation] = {
    "repeats": Variation(repeats=100),
    "poison": Variation(poison=1),
    "start": Variation(placement="start"),
    "shift": Variation(placement=16),
    "padded rows": Variation(row_pad=3),
    "side stream": Variation(side_stream=True),
}
"""What level L3 varies, one at a time. Repeats and poison may not change a bit where the declaration is deterministic;
placement, padding and stream may change which kernel runs, and each outcome is judged on its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of `Worker.execute`.

    `outputs`: codes of every OUTPUT and INOUT tensor in the tensor's shape, dtype as handed in or `container(format)`, from
    the first repeat; also given for MALFORMED where the run ended. `digests`: BLAKE2b of the outputs over the repeats, the
    distinct ones in order of appearance, none for a single run; `variation` says where the first differing repeat differs.
    `findings`: sentences on what the suite saw of its memory. `seconds`: the first run, synchronised, without preparation.
    `sequence`: the fault does not appear when the call is made alone in a fresh worker; `after`: the labels of the calls that
    came before it in its worker, oldest first.
    """

    status: Ending
    reason: str = ""
    outputs: Mapping[str, Codes] = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    variation: str = ""
    kernel: str = ""
    kernel_source: Kernel = Kernel.CLAIMED
    findings: tuple[str, ...] = ()
    seconds: float = 0.0
    poison: int = POISONS[0]
    sequence: bool = False
    after: tuple[str, ...] = ()
    log: str = ""

    @property
    def distinct(self) -> int:
        """Number of different outputs over the repeats; 1 for a kernel that repeats its bits, 0 where there is no output."""
        return len(self.digests) or int(bool(self.outputs))

    @property
    def untouched(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Per output, which elements still hold this run's poison in every byte. An element that a run wrote with the very
        value of the poison is among them: only one that is untouched under both poisons was not written."""
        return {
            name: codes == codes.dtype.type(int.from_bytes(bytes((self.poison,)) * codes.itemsize, "little"))
            for name, codes in self.outputs.items()
        }


def differences(base: Outcome, varied: Outcome) -> tuple[str, ...]:
    """One sentence per output whose bits differ between two outcomes of the same call: how many elements, and the first.
    KeyError where `varied` lacks an output of `base`: outcomes that did not end well cannot be compared."""
    return tuple(
        f"output {name!r}: {_first_difference(codes, varied.outputs[name])}"
        for name, codes in base.outputs.items()
        if not np.array_equal(codes, varied.outputs[name])
    )


def _first_difference(left: Codes, right: Codes) -> str:
    where = np.argwhere(left != right)
    index = tuple(int(i) for i in where[0])
    width = 2 * left.itemsize + 2
    codes = f"{left[index]:#0{width}x} and {right[index]:#0{width}x}"
    return f"{len(where)} of {left.size} elements differ, first {list(index)}: {codes}"


# Messages. A frame is a header, a pickle of records and builtins, and the raw bytes of the arrays in it.

_HEADER = struct.Struct("<4sQQ")  # magic, bytes of the pickle, number of arrays
_MAGIC = b"lbw1"
_DTYPES = ("|b1", "|u1", "<u2", "<u4", "<u8")

_RECORDS: dict[tuple[str, str], type] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        declarations.Claim, declarations.Contraction, declarations.Declaration, declarations.Join, declarations.Order,
        declarations.Start, declarations.Step, declarations.StepKind, datapaths.Datapath, datapaths.Evidence, datapaths.Family,
        rounding.Rounding, op.Family, op.ResolvedTensor, op.Role, Problem,
    )
}


class _Pickler(pickle.Pickler):
    """Formats and known datapaths go by name, so that both sides hold the one record; arrays go beside the pickle."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=5)
        self.arrays: list[Bytes] = []

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if type(obj) is Format and FORMATS.get(obj.name) == obj:
            return ("format", obj.name)
        if type(obj) is Datapath and DATAPATHS.get(obj.name) == obj:
            return ("datapath", obj.name)
        if type(obj) is np.ndarray and obj.dtype.str in _DTYPES:
            self.arrays.append(np.ascontiguousarray(obj).reshape(-1).view(np.uint8))
            return ("array", len(self.arrays) - 1, obj.dtype.str, obj.shape)
        return None


class _Unpickler(pickle.Unpickler):
    """Admits `_RECORDS` and builtins that pickle needs no class for."""

    def __init__(self, file: IO[bytes], arrays: Sequence[bytearray]) -> None:
        super().__init__(file)
        self._arrays = arrays

    def find_class(self, module: str, name: str) -> type:
        found = _RECORDS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no record of the suite")
        return found

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("format", str(name)):
                return FORMATS[name]
            case ("datapath", str(name)):
                return DATAPATHS[name]
            case ("array", int(index), str(dtype), shape) if dtype in _DTYPES:
                return np.frombuffer(self._arrays[index], dtype=dtype).reshape(shape)
        raise pickle.UnpicklingError("it holds a reference of unknown kind")


def _encode(message: Any) -> list[Any]:
    """The buffers of a frame, in order."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    sizes = struct.pack(f"<{len(pickler.arrays)}Q", *(array.nbytes for array in pickler.arrays))
    head = _HEADER.pack(_MAGIC, file.tell(), len(pickler.arrays)) + sizes + file.getvalue()
    return [head, *(array for array in pickler.arrays if array.nbytes)]


def _decode(read: Callable[[int], bytearray]) -> Any:
    """The message of the next frame. Raises pickle.UnpicklingError for bytes that are no frame."""
    magic, size, count = _HEADER.unpack(read(_HEADER.size))
    if magic != _MAGIC:
        raise pickle.UnpicklingError("it is no frame; something else wrote to the socket of the suite")
    sizes = struct.unpack(f"<{count}Q", read(8 * count))
    body = bytes(read(size))
    return _Unpickler(io.BytesIO(body), [read(each) for each in sizes]).load()


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def check_record(value: Any, expected: Any, where: str = "declaration") -> None:
    """Check every field of a record against its annotation, all the way down; ints are not bools nor enum members.

    `expected` is a type of the annotations that records use: a class, a union, tuple[X, ...] or tuple[X, Y]. Raises ValueError
    naming the field, and where a record bears the name of a known datapath and differs from it.
    """
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        match = next((arg for arg in args if type(value) is arg), None)
        if match is None:
            _mismatch(value, " or ".join(_type_name(arg) for arg in args), where)
        check_record(value, match, where)
    elif origin is tuple:
        if type(value) is not tuple or (args[-1] is not Ellipsis and len(value) != len(args)):
            _mismatch(value, _type_name(expected), where)
        for i, item in enumerate(value):
            check_record(item, args[0] if args[-1] is Ellipsis else args[i], f"{where}[{i}]")
    elif type(value) is not expected:
        _mismatch(value, _type_name(expected), where)
    elif is_dataclass(expected) and expected is not Format:
        for item in fields(value):
            check_record(getattr(value, item.name), _hints(expected)[item.name], f"{where}.{item.name}")
        if expected is Datapath and value is not DATAPATHS.get(value.name, value):
            raise ValueError(f"{where}: a datapath called {value.name!r} exists and has other numbers; give yours another name")


def _type_name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) and not get_args(expected) else str(expected).replace("typing.", "")


def _mismatch(value: Any, expected: str, where: str) -> None:
    raise ValueError(f"{where}: got {str(value)[:60]!r} ({type(value).__name__}), expected {expected}")


# The worker's side.


def _resolve(reference: str) -> Any:
    """The backend behind an entry-point name, or behind `python:FILE.py:ATTRIBUTE` (an object with the methods of a backend,
    or a callable that returns one). Raises BackendError."""
    if not reference.startswith(_PYTHON):
        return find_backend(reference)
    path, _, attribute = reference[len(_PYTHON):].rpartition(":")
    if not Path(path).is_file() or not attribute:
        raise BackendError(f"backend {reference!r}: expected python:FILE.py:ATTRIBUTE, and {path!r} to be a file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise BackendError(f"backend {reference!r}: {path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        found = getattr(module, attribute)
        if not hasattr(found, "run") or isinstance(found, type):
            found = found()
    except Exception as error:
        raise BackendError(f"backend {reference!r} does not load: {type(error).__name__}: {error}") from error
    missing = [name for name in ("name", "target", "supports", "declare", "run") if not hasattr(found, name)]
    if missing:
        raise BackendError(f"backend {reference!r} lacks {', '.join(missing)}; see docs/backends.md")
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """A tensor in memory. `original`: bytes given, for inputs; poison and padding, for outputs with padded rows."""

    tensor: ResolvedTensor
    dtype: np.dtype[Any]
    strides: tuple[int, ...]  # in containers
    allocation: Allocation
    view: TensorView
    original: Bytes | None


def _strides(shape: tuple[int, ...], row_pad: int) -> tuple[int, ...]:
    """Row-major strides in elements, rows longer by `row_pad`."""
    strides = [1]
    for i, size in enumerate(reversed(shape[1:])):
        strides.append(strides[-1] * (size + (row_pad if i == 0 else 0)))
    return tuple(reversed(strides)) if shape else ()


def _index(shape: tuple[int, ...], strides: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Flat position of every element, in elements."""
    grids = np.meshgrid(*(np.arange(size, dtype=np.int64) * stride for size, stride in zip(shape, strides, strict=True)),
                        indexing="ij", sparse=True)
    return np.asarray(sum(grids, np.zeros(shape, dtype=np.int64)))


def _place(
    stack: contextlib.ExitStack, device: Device, tensor: ResolvedTensor, codes: Codes | None, how: Variation, guarded: bool
) -> _Placed:
    """Put one tensor on the device until the stack unwinds: uploaded where it is given, poisoned where it is not."""
    dtype = container(tensor.format) if codes is None else codes.dtype
    pad = how.row_pad if tensor.role is Role.OUTPUT and not tensor.layout and len(tensor.shape) > 1 else 0
    strides = _strides(tensor.shape, pad)
    count = 0 if 0 in tensor.shape else 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    allocation = device.alloc(count * dtype.itemsize, how.placement, guarded=guarded)
    stack.callback(device.free, allocation)
    original: Bytes | None = None
    if codes is not None:
        original = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    elif pad and count:
        original = zone_pattern(0, count * dtype.itemsize)
        poison = int.from_bytes(bytes((POISONS[how.poison],)) * dtype.itemsize, "little")
        original.view(dtype)[_index(tensor.shape, strides)] = dtype.type(poison)
    memory = device.view(allocation, dtype.itemsize, tensor.shape, strides)
    view = TensorView(
        tensor.name, tensor.format, tensor.shape, strides, tensor.role, tensor.layout, allocation.pointer, memory
    )
    placed = _Placed(tensor, dtype, strides, allocation, view, original)
    _write(device, placed, POISONS[how.poison])
    return placed


def _write(device: Device, placed: _Placed, poison: int) -> None:
    """Give a tensor the contents it has before a run."""
    if placed.original is None:
        device.fill(placed.allocation, poison)
    else:
        device.upload(placed.allocation, placed.original)


def _read(device: Device, placed: _Placed, findings: list[str]) -> Codes:
    """The codes of an output, and a finding where the padding of its rows was written."""
    raw, shape = device.download(placed.allocation), placed.tensor.shape
    flat = raw.view(placed.dtype)
    if placed.tensor.role is not Role.OUTPUT or placed.original is None:
        return flat.reshape(shape)
    index = _index(shape, placed.strides)
    changed = flat != placed.original.view(placed.dtype)
    changed[index] = False
    if changed.any():
        at = int(np.flatnonzero(changed)[0])
        pitch = placed.strides[-2]
        findings.append(
            f"output {placed.tensor.name!r}: {int(changed.sum())} element(s) of padding between rows written, first after row "
            f"{at // pitch} at column {at % pitch} (strides {placed.strides})"
        )
    return flat[index]


def _look(device: Device, tensors: Sequence[_Placed]) -> list[str]:
    """What was done to memory that nobody was to write."""
    findings: list[str] = []
    for placed in tensors:
        name = placed.tensor.name
        findings.extend(f"tensor {name!r}: {damage}" for damage in device.damage(placed.allocation))
        if placed.tensor.role in (Role.CONSTANT, Role.ACTIVATION) and placed.original is not None:
            at = device.first_difference(placed.allocation, placed.original)
            if at is not None:
                findings.append(f"input {name!r} was changed, first in byte {at}")
    return findings


class _Stage(Exception):
    """An exception of the backend, with the method it came from."""


def _call(method: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except BaseException as error:  # a backend that exits has failed, too
        raise _Stage(method) from error


def _digest(outputs: Mapping[str, Codes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for codes in outputs.values():
        digest.update(np.ascontiguousarray(codes).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _execute(backend: Any, device: Device, request: Mapping[str, Any]) -> dict[str, Any]:
    """One call with its repeats. `prepare` is called once, `stage` before every run; outputs, workspace and INOUT tensors
    get their contents anew before every run."""
    problem, tactic, how = request["problem"], request["tactic"], Variation(*request["variation"])
    tensors, codes, guarded = request["tensors"], request["codes"], request["guarded"]
    with contextlib.ExitStack() as stack:
        size = _call("workspace", backend.workspace, problem, tactic) if hasattr(backend, "workspace") else 0
        if type(size) is not int or size < 0:
            return {"findings": [f"workspace() returned {str(size)[:60]!r}, expected a number of bytes"]}
        placed = [_place(stack, device, tensor, codes.get(tensor.name), how, guarded) for tensor in tensors]
        memory = ResolvedTensor("workspace", UINT8, (size,), Role.OUTPUT, op.Family.ELEMENT, "", (size,))
        scratch = _place(stack, device, memory, None, how, guarded)
        everything = [*placed, scratch]
        by_role = {role: {each.tensor.name: each.view for each in placed if each.tensor.role is role} for role in Role}
        written = [each for each in placed if each.tensor.role in (Role.OUTPUT, Role.INOUT)]
        stream = device.new_stream() if how.side_stream else None
        device.synchronize()

        state: Any = by_role[Role.CONSTANT]
        if hasattr(backend, "prepare"):
            state = _call("prepare", backend.prepare, problem, tactic, by_role[Role.CONSTANT])
        answer: dict[str, Any] = {"findings": _look(device, everything), "observed": [], "variation": "", "kernel": ""}
        digests: dict[str, None] = {}
        for repeat in range(how.repeats if not answer["findings"] else 0):
            for each in [*written, scratch] if repeat else []:
                _write(device, each, POISONS[how.poison])
            activations = by_role[Role.ACTIVATION] | by_role[Role.INOUT]
            inputs: Any = activations
            if hasattr(backend, "stage"):
                inputs = _call("stage", backend.stage, problem, tactic, activations)
            device.synchronize()
            watch = device.observe() if request["observe"] and not repeat else contextlib.nullcontext([])
            start = time.perf_counter()
            with watch as names:
                kernel = _call(
                    "run", backend.run, problem, tactic, state, inputs, by_role[Role.OUTPUT], scratch.view, stream
                )
                _call("run", device.synchronize)
            seconds = time.perf_counter() - start
            findings = _look(device, everything)
            outputs = {each.tensor.name: _read(device, each, findings) for each in written}
            if not isinstance(kernel, str) or not kernel:
                got = f"{type(kernel).__name__} {str(kernel)[:60]!r}"
                findings.insert(0, f"run() returned {got}, expected the name of the kernel")
            if not repeat:
                answer |= {"outputs": outputs, "seconds": seconds, "observed": names, "kernel": str(kernel)[:500]}
                if how.repeats > 1:
                    digests[_digest(outputs)] = None
            elif not all(np.array_equal(first, outputs[name]) for name, first in answer["outputs"].items()):
                if len(digests) == 1:
                    name = next(n for n, first in answer["outputs"].items() if not np.array_equal(first, outputs[n]))
                    text = _first_difference(answer["outputs"][name], outputs[name])
                    answer["variation"] = f"repeat {repeat + 1} differs from the first in output {name!r}: {text}"
                digests[_digest(outputs)] = None
            if findings:
                where = f" (repeat {repeat + 1} of {how.repeats})" if how.repeats > 1 else ""
                answer["findings"] = [text + where for text in findings]
                break
        return answer | {"digests": list(digests)}


def _hello(backend: Any, device: str) -> dict[str, Any]:
    return {
        "name": str(backend.name), "target": str(backend.target), "device": device,
        "describe": {str(key): str(value) for key, value in describe(backend).items()},
        "unpack": hasattr(backend, "unpack"), "probe": hasattr(backend, "probe"),
    }


def _raised(stage: _Stage) -> dict[str, Any]:
    """An exception of the backend as plain data."""
    error = stage.__cause__
    text = "".join(traceback.format_exception(error))[-_TAIL:]
    message = " ".join(str(error).split())[:500]
    return {"raised": f"{stage}() raised {type(error).__name__}{f': {message}' if message else ''}", "log": text}


def _lost(device: Device | None = None) -> str:
    """Why the device can do no more work in this process, empty where it can: a bad access ends the context of an accelerator."""
    try:
        if device:
            device.synchronize()
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _die_with(parent: int) -> None:
    """Ask for a kill when the parent's thread that started us ends. Linux only; elsewhere the closed socket ends the worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the parent ended before its worker started")


def _serve(argv: Sequence[str] | None = None) -> None:
    """Answer requests until the socket closes."""
    parser = argparse.ArgumentParser(prog="lowbit.conformance.worker", description="The process in which a backend runs.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args(argv)
    _die_with(arguments.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    link = socket.socket(fileno=arguments.fd)
    link.set_inheritable(False)

    def read(size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = link.recv_into(view)
            if not count:
                os._exit(0)  # the parent is gone; threads of the backend must not hold us
            view = view[count:]
        return data

    def answer(function: Callable[..., Any], *args: Any) -> None:
        try:
            frame = _encode({"answer": function(*args)})
        except _Stage as stage:
            frame = _encode(_raised(stage) | {"lost": _lost(*loaded[1:])})
        except Exception as error:
            text = f"no answer could be sent: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            frame = _encode({"raised": text, "log": traceback.format_exc()[-_TAIL:]})
        for buffer in frame:
            link.sendall(buffer)

    first = _decode(read)
    sys.path.extend(first["path"])
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        backend = _call("load", _resolve, first["reference"])
        name = str(getattr(backend, "device", "host"))
        loaded.extend((backend, _call("open_device", open_device, name)))
        return _call("describe", _hello, backend, name)  # type: ignore[no-any-return]

    answer(load)
    while True:
        request = _decode(read)
        backend, device = loaded
        match request["call"]:
            case "supports":
                for problem in request["problems"]:
                    answer(_call, "supports", backend.supports, problem)
            case "tactics":
                answer(_call, "tactics", tactics_of, backend, request["problem"])
            case "declare":
                answer(_call, "declare", backend.declare, request["problem"], request["tactic"])
            case "execute":
                answer(_execute, backend, device, request)


# The parent's side.


class _Gone(Exception):
    """The worker died, hung or sent what is no answer."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A submitted call: all that is needed to make it again."""

    request: Mapping[str, Any]
    label: str
    timeout: float
    deadline: float
    after: tuple[str, ...]
    fault: Fault | None  # the worker failed before it had the request


@cache
def _spawner() -> ThreadPoolExecutor:
    """A thread that lives as long as the process. Linux kills a worker when the THREAD that started it ends."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowbit-spawn")


class Worker:
    """One backend in a process of its own. Not for use by several threads at once.

    `reference`: `name` or `name:argument` of an entry point, or `python:FILE.py:ATTRIBUTE`. `timeout`: seconds for one answer;
    `start_timeout`: seconds for starting the process and loading the backend. `path`: folders added to the worker's sys.path.
    The environment (OMP_NUM_THREADS, say) is the parent's. The process starts with the first call that needs it.
    """

    def __init__(
        self, reference: str, *, timeout: float = 60.0, start_timeout: float = 120.0, path: Sequence[str] = ()
    ) -> None:
        self.reference, self.timeout, self.start_timeout = reference, timeout, start_timeout
        self.starts = 0  # processes started so far
        self._path = tuple(path)
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._log: IO[bytes] | None = None
        self._greeting: dict[str, Any] = {}
        self._history: list[str] = []
        self._pending: _Pending | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, None where none runs."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the process. A later call starts a new one."""
        self._pending = None
        if self._link:
            self._link.close()
            self._link = None
            if self._process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)
        self._kill()

    def hello(self) -> dict[str, Any]:
        """name, target, device: str; describe: dict of str; unpack, probe, registered: bool (registered: found by entry
        point). Raises WorkerError where the backend does not load."""
        try:
            self._start()
        except _Gone as gone:
            raise WorkerError(gone.fault) from None
        return dict(self._greeting)

    def supports(self, problems: Sequence[Problem]) -> list[str | Fault | None]:
        """Per problem None (supported), a sentence (not, and why) or the Fault of a `supports` that failed on it."""
        self._idle()
        answers: list[str | Fault | None] = []
        while len(answers) < len(problems):
            try:
                self._start()
            except _Gone as gone:
                return answers + [gone.fault] * (len(problems) - len(answers))
            try:
                self._send({"call": "supports", "problems": list(problems[len(answers):])}, self.timeout)
                while len(answers) < len(problems):
                    answers.append(self._support(self._receive(time.monotonic() + self.timeout, self.timeout)))
            except _Gone as gone:
                answers.append(gone.fault)
        return answers

    @staticmethod
    def _support(reply: Any) -> str | Fault | None:
        if "raised" in reply:
            return Fault(Ending.RAISED, reply["raised"], reply["log"])
        answer = reply["answer"]
        if answer is None or (type(answer) is str and answer.strip()):
            return " ".join(answer.split()) if answer else None
        return Fault(Ending.MALFORMED, f"supports() returned {str(answer)[:60]!r}, expected None or a sentence that says why not")

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """Names of the tactics for a problem. Raises WorkerError."""
        names = self._ask({"call": "tactics", "problem": problem})
        good = type(names) is tuple and names and all(type(name) is str and name for name in names)
        if not good or len(set(names)) != len(names):
            raise WorkerError(Fault(Ending.MALFORMED, f"tactics() returned {names!r}, expected distinct non-empty names"))
        return tuple(names)

    def declare(self, problem: Problem, tactic: str = "default") -> Declaration:
        """The backend's declaration, every field checked. Raises WorkerError."""
        found = self._ask({"call": "declare", "problem": problem, "tactic": tactic})
        try:
            check_record(found, Declaration)
        except ValueError as error:
            raise WorkerError(Fault(Ending.MALFORMED, f"declare() is malformed: {error}")) from None
        declaration: Declaration = found
        return declaration

    def execute(
        self, problem: Problem, tactic: str, operands: Operands, tensors: Sequence[ResolvedTensor],
        variation: Variation = Variation(), *, observe: bool = False, label: str = "", timeout: float | None = None,
    ) -> Outcome:
        """`submit`, then `collect`."""
        self.submit(problem, tactic, operands, tensors, variation, observe=observe, label=label, timeout=timeout)
        return self.collect()

    def submit(
        self, problem: Problem, tactic: str, operands: Operands, tensors: Sequence[ResolvedTensor],
        variation: Variation = Variation(), *, observe: bool = False, label: str = "", timeout: float | None = None,
    ) -> None:
        """Start one call of the backend and return. `operands`: codes of every tensor that is not OUTPUT, in its `shape`.
        `observe`: watch which kernels are launched (the first repeat only, and slower). `label`: name of the call in
        messages. `timeout`: seconds for the whole call with its repeats. Raises ValueError for operands that do not fit, and
        RuntimeError where another call is not collected yet."""
        self._idle()
        check_placement(variation.placement)
        if variation.poison not in range(len(POISONS)) or variation.repeats < 1 or variation.row_pad < 0:
            raise ValueError(f"{variation} needs poison 0 or 1, repeats >= 1 and row_pad >= 0")
        codes = {}
        for tensor in tensors:
            if tensor.role is Role.OUTPUT:
                continue
            if tensor.name not in operands or operands[tensor.name].codes.shape != tensor.shape:
                got = operands[tensor.name].codes.shape if tensor.name in operands else "nothing"
                raise ValueError(f"{problem}: tensor {tensor.name!r} needs codes of shape {tensor.shape}, got {got}")
            codes[tensor.name] = operands[tensor.name].codes
        request = {
            "call": "execute", "problem": problem, "tactic": tactic, "tensors": tuple(tensors), "codes": codes,
            "variation": astuple(variation), "observe": observe, "guarded": True,
        }
        timeout = self.timeout if timeout is None else timeout
        self._pending = self._begin(request, label or str(problem), timeout)

    def collect(self) -> Outcome:
        """The outcome of the submitted call. A call that crashes or hangs is made again alone in a fresh worker, and a crash
        once more with open guards, which shows where a write went. Raises RuntimeError where nothing was submitted."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("collect() without submit()")
        try:
            return self._finish(pending)
        except _Gone as gone:
            fault = gone.fault
        if not pending.after:
            return self._explain(pending, fault)
        try:
            alone = self._again(pending)
        except _Gone as gone:
            return self._explain(pending, gone.fault)
        reason = (
            f"{fault.reason}; alone in a fresh worker the same call ends {alone.status}, so look at the calls before it: "
            f"{len(pending.after)} in this worker, the last {pending.after[-1]}"
        )
        return Outcome(fault.ending, reason, poison=alone.poison, sequence=True, after=pending.after, log=fault.log)

    def _again(self, pending: _Pending, *, guarded: bool = True) -> Outcome:
        self._kill()
        return self._finish(self._begin({**pending.request, "guarded": guarded}, pending.label, pending.timeout))

    def _explain(self, pending: _Pending, fault: Fault) -> Outcome:
        """The outcome of a call that fails by itself."""
        reason = fault.reason
        if _GUARD_HINT in reason:
            try:
                opened = self._again(pending, guarded=False)
            except _Gone:
                reason += "; it also dies with the guard pages opened, so the access is far from every tensor of the suite"
            else:
                where = "; ".join(opened.findings) or "no byte around any tensor changes, so it read outside its buffers"
                reason += f"; with the guard pages opened it ends {opened.status}: {where}"
            self._kill()
        poison = POISONS[pending.request["variation"][0]]
        return Outcome(fault.ending, reason, poison=poison, after=pending.after, log=fault.log)

    def _begin(self, request: Mapping[str, Any], label: str, timeout: float) -> _Pending:
        fault: Fault | None = None
        after: tuple[str, ...] = ()
        try:
            self._start()
            after = tuple(self._history)
            self._history.append(label)
            self._send(request, timeout)
        except _Gone as gone:
            fault = gone.fault
        return _Pending(request, label, timeout, time.monotonic() + timeout, after, fault)

    def _finish(self, pending: _Pending) -> Outcome:
        if pending.fault:
            raise _Gone(pending.fault)
        reply = self._receive(pending.deadline, pending.timeout)
        if reply.get("lost"):
            self._kill()
            reason = f"{reply['raised']}; the device does no more work in that process ({reply['lost']})"
            raise _Gone(Fault(Ending.CRASHED, reason, reply["log"]))
        poison = POISONS[pending.request["variation"][0]]
        if "raised" in reply:
            return Outcome(Ending.RAISED, reply["raised"], poison=poison, after=pending.after, log=reply["log"])
        answer = reply["answer"]
        findings, observed = tuple(answer["findings"]), answer.get("observed", ())
        reason = findings[0] + (f" (and {len(findings) - 1} more)" if len(findings) > 1 else "") if findings else ""
        return Outcome(
            Ending.MALFORMED if findings else Ending.OK, reason, answer.get("outputs", {}), tuple(answer.get("digests", ())),
            answer.get("variation", ""), ", ".join(observed) or answer.get("kernel", ""),
            Kernel.OBSERVED if observed else Kernel.CLAIMED, findings, answer.get("seconds", 0.0), poison, after=pending.after,
        )

    def _idle(self) -> None:
        if self._pending:
            raise RuntimeError(f"{self._pending.label} was submitted and not collected")

    def _ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to a small request. Raises WorkerError."""
        self._idle()
        try:
            self._start()
            self._send(request, self.timeout)
            reply = self._receive(time.monotonic() + self.timeout, self.timeout)
        except _Gone as gone:
            raise WorkerError(gone.fault) from None
        if "raised" in reply:
            raise WorkerError(Fault(Ending.RAISED, reply["raised"], reply["log"]))
        return reply["answer"]

    def _start(self) -> None:
        """Start the process where none runs. Raises _Gone where the backend does not load."""
        if self._process:
            return
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile("a+b")  # noqa: SIM115  (it lives as long as the process)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        command = [sys.executable, "-P", "-m", __name__, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs:
            self._process = _spawner().submit(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(theirs.fileno(),),
                start_new_session=True,
            ).result()
        self._link, self._log, self._history = ours, log, []
        self.starts += 1
        self._send({"reference": self.reference, "path": self._path}, self.start_timeout)
        reply = self._receive(time.monotonic() + self.start_timeout, self.start_timeout)
        if "raised" in reply:
            self._kill()
            raise _Gone(Fault(Ending.RAISED, reply["raised"], reply["log"]))
        self._greeting = {**reply["answer"], "registered": not self.reference.startswith(_PYTHON)}

    def _send(self, message: Any, timeout: float) -> None:
        link = self._link
        if link is None:
            raise _Gone(Fault(Ending.CRASHED, "the worker is gone"))
        link.settimeout(timeout)
        try:
            for buffer in _encode(message):
                link.sendall(buffer)
        except TimeoutError:
            raise _Gone(self._hung(timeout)) from None
        except OSError:
            raise _Gone(self._died()) from None

    def _receive(self, deadline: float, timeout: float) -> Any:
        """The next answer. Raises _Gone, with the worker killed, where none comes until `deadline`, which is the end of
        `timeout` seconds."""

        def read(size: int) -> bytearray:
            data = bytearray(size)
            view = memoryview(data)
            while view:
                count = self._read_some(view, deadline, timeout)
                view = view[count:]
            return data

        try:
            reply = _decode(read)
            if type(reply) is not dict or not ({"raised", "log"} <= reply.keys() or "answer" in reply):
                raise pickle.UnpicklingError("it is no reply")
        except _Gone:
            raise
        except Exception as error:  # whatever a hostile pickle raises
            fault = Fault(Ending.MALFORMED, f"the worker's answer cannot be read: {error}", self._tail())
            self._kill()
            raise _Gone(fault) from None
        if self._log and os.fstat(self._log.fileno()).st_size > _LOG_LIMIT:
            os.ftruncate(self._log.fileno(), 0)
        return reply

    def _read_some(self, view: memoryview, deadline: float, timeout: float) -> int:
        """Read at least one byte. What the worker has already sent is read even past the deadline."""
        link, process = self._link, self._process
        if link is None or process is None:
            raise _Gone(Fault(Ending.CRASHED, "the worker is gone"))
        dead = False
        while True:
            link.settimeout(max(min(_POLL, deadline - time.monotonic()), 0.001))
            try:
                count = link.recv_into(view)
            except TimeoutError:
                if dead:  # a child of the worker holds the socket open
                    raise _Gone(self._died()) from None
                dead = process.poll() is not None
                if not dead and time.monotonic() > deadline:
                    raise _Gone(self._hung(timeout)) from None
                continue
            except OSError:
                count = 0
            if not count:
                raise _Gone(self._died())
            return count

    def _tail(self) -> str:
        if self._log is None:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _TAIL, max(size - _TAIL, 0)).decode(errors="replace")

    def _hung(self, seconds: float) -> Fault:
        if self._process:  # faulthandler writes where it hangs
            self._process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)
        fault = Fault(Ending.TIMEOUT, f"no answer within {math.ceil(seconds * 10) / 10:g} s; the worker was killed", self._tail())
        self._kill()
        return fault

    def _died(self) -> Fault:
        code: int | None = None
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(2.0)
        reason = "the worker closed its connection and was killed"
        if code is not None and code < 0:
            known = {each.value: each.name for each in signal.Signals}
            reason = f"the worker died of {known.get(-code, f'signal {-code}')}"
            if -code in (signal.SIGSEGV, signal.SIGBUS) and self._greeting.get("device") == "host":
                reason += _GUARD_HINT
            if -code == signal.SIGKILL:
                reason += "; a machine that runs out of memory does this"
        elif code is not None:
            reason = f"the worker exited with status {code} in the middle of the call"
        fault = Fault(Ending.CRASHED, reason, self._tail())
        self._kill()
        return fault

    def _kill(self) -> None:
        """End the worker and all processes of its group."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._link:
            self._link.close()
            self._link = None
        if self._log:
            self._log.close()
            self._log = None


if __name__ == "__main__":
    _serve()
