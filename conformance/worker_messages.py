"""What crosses between the suite and a worker: calls with their variations, outcomes, and the frames that carry them.

Decides: how a call can end (`Ending`, `Fault`, `Outcome`), what the suite varies without the backend noticing (`Variation`), the
bytes of a frame, and whether a record that came back is what its annotations say (`check_record`).
Refuses: to load objects of a backend's classes. Only the records named in `_RECORDS`, arrays of codes and plain builtins are read
from a frame, whatever the other side sends.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import IO, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from lowbit.references import datapaths, declarations, rounding
from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.formats import FORMATS, Codes, Format

from . import op
from .case import Problem
from .memory import POISONS, Bytes, Placement
from .verdict import Kernel

__all__ = [
    "BY_FILE", "TAIL", "VARIATIONS", "Ending", "Fault", "Outcome", "Variation", "WorkerError", "check_record", "decode_frame",
    "differences", "encode_frame", "first_difference", "in_unicode",
]

BY_FILE = "python:"  # references python:FILE.py:ATTRIBUTE name a backend by file instead of by entry point
TAIL = 4096  # bytes of the worker's output kept for messages


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
        f"output {name!r}: {first_difference(codes, varied.outputs[name])}"
        for name, codes in base.outputs.items()
        if not np.array_equal(codes, varied.outputs[name])
    )


def first_difference(left: Codes, right: Codes) -> str:
    """How many elements differ between two outputs of one shape, and the codes of the first."""
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
        declarations.Claim, declarations.Contraction, declarations.Cut, declarations.Declaration, declarations.Join,
        declarations.Order, declarations.Start, declarations.Step, declarations.StepKind, datapaths.Datapath, datapaths.Evidence,
        datapaths.Family, rounding.Rounding, op.Family, op.ResolvedTensor, op.Role, Problem,
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


def encode_frame(message: Any) -> list[Any]:
    """The buffers of a frame, in order."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    sizes = struct.pack(f"<{len(pickler.arrays)}Q", *(array.nbytes for array in pickler.arrays))
    head = _HEADER.pack(_MAGIC, file.tell(), len(pickler.arrays)) + sizes + file.getvalue()
    return [head, *(array for array in pickler.arrays if array.nbytes)]


def decode_frame(read: Callable[[int], bytearray]) -> Any:
    """The message of the next frame. Raises pickle.UnpicklingError for bytes that are no frame."""
    magic, size, count = _HEADER.unpack(read(_HEADER.size))
    if magic != _MAGIC:
        raise pickle.UnpicklingError("it is no frame; something else wrote to the socket of the suite")
    sizes = struct.unpack(f"<{count}Q", read(8 * count))
    body = bytes(read(size))
    return _Unpickler(io.BytesIO(body), [read(each) for each in sizes]).load()


def in_unicode(value: Any) -> Any:
    """A message whose strings, keys among them, can be written as UTF-8: lone surrogates become `\\udcXX`. Records stay."""
    if type(value) is str:
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if type(value) is dict:
        return {in_unicode(key): in_unicode(item) for key, item in value.items()}
    return type(value)(map(in_unicode, value)) if type(value) in (list, tuple) else value


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
    elif expected is str and in_unicode(value) != value:
        raise ValueError(f"{where}: got {in_unicode(value)!r}, expected a text that UTF-8 can hold")
    elif is_dataclass(expected) and expected is not Format:
        for item in fields(value):
            check_record(getattr(value, item.name), _hints(expected)[item.name], f"{where}.{item.name}")
        if expected is Datapath and value is not DATAPATHS.get(value.name, value):
            raise ValueError(f"{where}: a datapath called {value.name!r} exists and has other numbers; give yours another name")


def _type_name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) and not get_args(expected) else str(expected).replace("typing.", "")


def _mismatch(value: Any, expected: str, where: str) -> None:
    raise ValueError(f"{where}: got {str(value)[:60]!r} ({type(value).__name__}), expected {expected}")
