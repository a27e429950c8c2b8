"""The worker's side: the process in which a backend runs.

Decides: how a backend is found and called, how its tensors lie in guarded, poisoned memory, and what is seen of that memory after
every run.
Refuses: to outlive its parent, to let an exception of the backend end the process, and to send what is no record of the suite.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import hashlib
import importlib.util
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import UINT8, Codes, container

from . import op
from .backend import GROUP, BackendError, TensorView, describe, execution_of, find_backend, tactics_of
from .device import Allocation, Device, open_device
from .memory import POISONS, Bytes, zone_pattern
from .op import ResolvedTensor, Role
from .worker_messages import BY_FILE, TAIL, Variation, decode_frame, encode_frame, first_difference

__all__ = ["attributes_of", "code_digest", "resolve", "serve"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def resolve(reference: str) -> Any:
    """The backend behind an entry-point name, or behind `python:FILE.py:ATTRIBUTE` (an object with the methods of a backend,
    or a callable that returns one). Raises BackendError."""
    if not reference.startswith(BY_FILE):
        return find_backend(reference)
    path, _, attribute = reference[len(BY_FILE):].rpartition(":")
    if not Path(path).is_file() or not attribute:
        raise BackendError(f"backend {reference!r}: expected python:FILE.py:ATTRIBUTE, and {path!r} to be a file")
    # Not the stem alone: a backend in a file called copy.py would stand in for that module of the standard library.
    digest = hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()
    spec = importlib.util.spec_from_file_location(f"backend_{Path(path).stem}_{digest[:16]}", path)
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
        sys.modules.pop(spec.name, None)
        raise BackendError(f"backend {reference!r} does not load: {type(error).__name__}: {error}") from error
    missing = [name for name in ("name", "target", "supports", "declare", "run") if not hasattr(found, name)]
    if missing:
        raise BackendError(f"backend {reference!r} lacks {', '.join(missing)}; see docs/backends.md")
    return found


def attributes_of(thing: Any) -> dict[str, Any]:
    """What an object holds by itself; nothing for a module, which holds all that it imports."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return {} if isinstance(thing, ModuleType) else dict(getattr(thing, "__dict__", {}))


def _modules_of(reference: str, thing: Any) -> set[str]:
    """Names of the modules that an object's code lies in, with those of the backends that it holds."""
    found = {thing.__name__ if isinstance(thing, ModuleType) else type(thing).__module__}
    found.add(getattr(getattr(thing, "run", None), "__module__", None) or "")
    if not reference.startswith(BY_FILE):
        found |= {point.module for point in entry_points(group=GROUP) if point.name == reference.partition(":")[0]}
    for held in attributes_of(thing).values():
        if hasattr(held, "run") and hasattr(held, "supports") and held is not thing:
            found |= _modules_of("", held)
    return found


def _files_of(name: str) -> dict[str, Path]:
    """Files of a module's package by their names in it; of a module without package itself, by no name."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return {}
    package = module.__spec__.parent if module.__spec__ is not None else ""
    if not package:
        return {"": Path(file)}
    folder = Path(file).parent
    return {
        f"{package}/{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def code_digest(reference: str, thing: Any) -> str:
    """sha256 over the contents of all files of a backend or an arm: the FILE of `python:FILE.py:ATTRIBUTE`, and for modules of a
    package every file of the package's folder, kernels in other languages among them. Code that a backend reaches in other
    packages is not seen: their versions belong into its `describe`. `reference`: by which a backend was found, or empty."""
    digests = set[str]()
    if reference.startswith(BY_FILE):
        own = Path(reference[len(BY_FILE):].rpartition(":")[0])
        digests.add(f" {hashlib.sha256(own.read_bytes()).hexdigest()}")
    for name in _modules_of(reference, thing):
        digests |= {f"{where} {hashlib.sha256(path.read_bytes()).hexdigest()}" for where, path in _files_of(name).items()}
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


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
                    text = first_difference(answer["outputs"][name], outputs[name])
                    answer["variation"] = f"repeat {repeat + 1} differs from the first in output {name!r}: {text}"
                digests[_digest(outputs)] = None
            if findings:
                where = f" (repeat {repeat + 1} of {how.repeats})" if how.repeats > 1 else ""
                answer["findings"] = [text + where for text in findings]
                break
        return answer | {"digests": list(digests)}


def _hello(backend: Any, device: str) -> dict[str, Any]:
    return {
        "name": str(backend.name), "target": str(backend.target), "device": device, "execution": execution_of(backend),
        "describe": {str(key): str(value) for key, value in describe(backend).items()},
        "unpack": hasattr(backend, "unpack"), "probe": hasattr(backend, "probe"),
    }


def _raised(stage: _Stage) -> dict[str, Any]:
    """An exception of the backend as plain data."""
    error = stage.__cause__
    text = "".join(traceback.format_exception(error))[-TAIL:]
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


def serve(argv: Sequence[str] | None = None) -> None:
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
            frame = encode_frame({"answer": function(*args)})
        except _Stage as stage:
            frame = encode_frame(_raised(stage) | {"lost": _lost(*loaded[1:])})
        except Exception as error:
            text = f"no answer could be sent: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            frame = encode_frame({"raised": text, "log": traceback.format_exc()[-TAIL:]})
        for buffer in frame:
            link.sendall(buffer)

    first = decode_frame(read)
    sys.path.extend(first["path"])
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        backend = _call("load", resolve, first["reference"])
        name = str(getattr(backend, "device", "host"))
        loaded.extend((backend, _call("open_device", open_device, name)))
        return _call("describe", _hello, backend, name)  # type: ignore[no-any-return]

    answer(load)
    while True:
        request = decode_frame(read)
        backend, device = loaded
        match request["call"]:
            case "supports":
                for problem in request["problems"]:
                    answer(_call, "supports", backend.supports, problem)
            case "code":
                answer(_call, "code", code_digest, first["reference"], backend)
            case "tactics":
                answer(_call, "tactics", tactics_of, backend, request["problem"])
            case "declare":
                answer(_call, "declare", backend.declare, request["problem"], request["tactic"])
            case "execute":
                answer(_execute, backend, device, request)
