"""The Hopper kernels on the processor: the .cu files of the room, translated, compiled by g++ and run bit for bit on a model of
the machine that looks for races. It shows what a kernel computes and that its waits suffice; it says nothing about time.

Modelled. A thread is a fiber with a stack of its own; blocks that are resident at once take turns at every point where threads
meet or memory is handed over, in an order that the seed decides. Copies of the copy engine (bulk, tensor maps with 128-byte
swizzling, multicast), st.async and matrix products are executed EARLY, when they are issued, or LATE, when no thread can go on
without them. A product is executed warp by warp, as PTX orders no more than a warp; it reads fragments and shared memory when it
is executed, and its accumulators hold a NaN until the wait that returns them. The arithmetic of products is that of products.cpp
(e4m3, e5m2, f16, bf16 into binary32), written apart from references/ and held against it. Barriers count arrivals and bytes by
phase; named barriers, cluster barriers, setmaxnreg (the sum of registers), programmatic launches (a launch runs up to its wait
before the one ahead starts), atomics. Shared memory is NaN when a block starts and ends at memory that cannot be touched.

Faults that end a run with a sentence (`MachineError`): a deadlock, with who waits for what; more arrivals or bytes than a barrier
expects; a barrier that nobody initialised or fenced, or that was overwritten; a copy into a block that has ended, copies and
products that nobody waited for; accumulators written while products run; products without wgmma.fence before them; threads of a
warp or warpgroup that diverge at a collective; addresses that are misaligned or out of bounds. All else shows in the bits.

Not modelled: time and throughput; memory orderings weaker than the order in which fibers run (a missing __threadfence or acquire
is not seen); the fence between ordinary stores and the copy engine or wgmma (fence.proxy.async does nothing); bank conflicts;
descriptors without swizzling, operands along M or N; static shared arrays beside dynamic memory; clusters of more than one axis.
A loop over memory must contain an atomic, ld.acquire, __ldcv or __nanosleep: fibers are not interrupted. Needs g++ for x86-64 and
CUDA's headers, where kernels.hopper_room.build finds nvcc. One process has one machine, and one thread may use it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from translate import translated

from lowbit.kernels import hopper_room
from lowbit.kernels.hopper_room import build, device

__all__ = [
    "MODES", "MachineError", "Patches", "Settings", "after", "emulated_library", "finish", "installed", "machine", "settings",
]

HERE = Path(__file__).parent
MODES = ("early", "late", "either")
"""When work that is handed over is executed: at once, as late as possible, or one or the other by the seed."""

_FLAGS = ("-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w", "-Wno-psabi")
_MACHINE = ("machine.cpp", "products.cpp", "machine.h", "products.h")
_PRELUDE = ("prelude.h", "device.h", "ptx.h", "machine.h")
_REPORTED = [4]  # multiprocessors of the machine as it was set up last
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)

Patches = Mapping[str, Sequence[tuple[str, str]]]
"""File of the room -> (text that stands there once, text in its place): a planted defect."""


class MachineError(RuntimeError):
    """A fault that the machine found in a kernel, or a launch that it refuses."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One machine. `copies` and `products`: of `MODES`. `seed`: of the order of threads; modulo 5, who runs first: the last to
    become ready, any, mostly one of the last, any but one warp of each block, any but one block of each cluster. `processors`:
    what the runtime reports, and how many blocks are resident at most."""

    copies: str = "early"
    products: str = "late"
    seed: int = 1
    processors: int = 4


def _cache() -> Path:
    folder: Path = build.cache_folder()
    return folder.with_name("hopper_emulated")


@cache
def _headers() -> tuple[Path, ...]:
    """The folders of CUDA's headers, beside nvcc. Raises BuildError where there are none."""
    for path in build._candidates():
        for root in (path.parent.parent, path.resolve().parent.parent):
            if (root / "include" / "cuda_fp8.h").is_file():
                return root / "include", root / "include" / "cccl"
    raise build.BuildError(
        "got no cuda_fp8.h beside an nvcc, expected CUDA's headers; install the toolkit, or pip's nvidia-cuda-runtime and "
        "nvidia-cuda-cccl"
    )


def _built(name: str, words: Sequence[str], texts: Mapping[str, str]) -> Path:
    """The library that g++ makes of `texts` with `words`; one of the same bytes is made once. Raises BuildError."""
    if shutil.which("g++") is None:
        raise build.BuildError("got no g++ on PATH, expected one for the emulated kernels; install it")
    words = (*_FLAGS, *(f"-isystem{folder}" for folder in _headers()), *words)
    digest = hashlib.sha256("\0".join(words).encode())
    for key in sorted(texts):
        digest.update(f"\0{key}\0{texts[key]}".encode())
    kept = _cache() / f"{name}-{digest.hexdigest()[:24]}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        for key, text in texts.items():
            (Path(folder) / key).write_text(text, encoding="utf-8")
        answer = subprocess.run(["g++", *words, "-o", "made.so"], cwd=folder, capture_output=True, text=True, check=False)
        if answer.returncode:
            complaints = [line for line in answer.stderr.splitlines() if "error" in line] or [answer.stderr[-500:]]
            raise build.BuildError(f"got exit code {answer.returncode} from g++ for {name}: {' | '.join(complaints[:3])[:1500]}")
        os.replace(Path(folder) / "made.so", kept)
    return kept


@cache
def machine() -> Any:
    """The machine itself, one per process. Raises BuildError."""
    texts = {name: (HERE / name).read_text(encoding="utf-8") for name in _MACHINE}
    path = _built("machine", ("-O2", "machine.cpp", "products.cpp"), texts)
    found: Any = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    found.emulator_settings.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_ulonglong, ctypes.c_int]
    found.emulator_message.restype = ctypes.c_char_p
    return found


def emulated_library(
    source: str, defines: Mapping[str, str | int] | None = None, flags: Sequence[str] = (), *, room: Path = build.ROOM,
    patches: Patches | None = None,
) -> Path:
    """The library of `source`, a name in `room`, with these macros, for the machine. nvcc's `flags` mean nothing here: nothing is
    contracted anyway. Raises BuildError where it does not compile, ValueError for a patch whose text does not stand there
    once."""
    texts = {name: (HERE / name).read_text(encoding="utf-8") for name in _PRELUDE}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        text = (room / name).read_text(encoding="utf-8")
        waiting += _INCLUDE.findall(text)
        for before, instead in (patches or {}).get(name, ()):
            if text.count(before) != 1:
                raise ValueError(f"{name}: got {text.count(before)} places of {before!r}, expected one; write the patch anew")
            text = text.replace(before, instead)
        texts[name] = translated(text)
    macros = (f"-D{name}={value}" for name, value in sorted((defines or {}).items()))
    return _built(Path(source).stem, ("-O1", *macros, "-include", "prelude.h", "-x", "c++", source), texts)


@cache
def _loaded(path: Path, processors: int = 0) -> ctypes.CDLL:
    """The library, one copy per number of multiprocessors: host code may remember what it asked the runtime once."""
    machine()  # its functions are what the library calls
    own = path.with_name(f"{path.stem}-p{processors}{path.suffix}")
    if not own.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(shutil.copy(path, folder), own)
    return ctypes.CDLL(str(own))


def settings(copies: str | int = "early", products: str | int = "late", seed: int = 1, processors: int = 4) -> None:
    """Set up the machine for the launches that follow; modes by name or by place in `MODES`."""
    numbers = [MODES.index(mode) if isinstance(mode, str) else mode for mode in (copies, products)]
    machine().emulator_settings(*numbers, seed, processors)
    _REPORTED[:] = [processors]


def finish() -> None:
    """Run what was launched. Raises MachineError for the first fault; what was not run then is dropped."""
    if machine().emulator_finish():
        raise MachineError(machine().emulator_message().decode())


@contextmanager
def after(work: Callable[[], None]) -> Iterator[None]:
    """Launches in the block come after `work` on the stream: one that may overlap what is ahead runs up to its wait first."""
    kept = ctypes.CFUNCTYPE(None)(work)
    machine().emulator_before(kept)
    yield
    del kept  # the machine called it when the launch ran


def _launch(name: str, function: Callable[..., int], like: Any, stream: Any, *arguments: Any) -> None:
    if code := function(*arguments, None):
        raise MachineError(f"{name}: got error {code} of the runtime from a launch")
    finish()


def _any(name: str, tensor: Any) -> None:
    """In place of the check of a tensor's device: all memory is the machine's."""


@contextmanager
def installed(patches: Patches | None = None) -> Iterator[None]:
    """In the block the room runs on the machine: its libraries, launches and checks of devices are replaced, its host code is
    not. Modules of the room that are to run must be imported before. Tensors are torch's, on the CPU."""
    def library(source: str, *, defines: Mapping[str, str | int] | None = None, flags: Sequence[str] = ()) -> ctypes.CDLL:
        return _loaded(emulated_library(source, defines, flags, patches=patches), _REPORTED[0])

    replaced = {"library": library, "launch": _launch, "check": _any}
    room = [
        module for name, module in list(sys.modules.items())
        if name.startswith(f"{hopper_room.__name__}.") and module not in (build, device)
    ]
    kept = [(module, name, vars(module)[name]) for module in room for name in replaced if name in vars(module)]
    caches = [each for module in room for each in vars(module).values() if hasattr(each, "cache_clear")]
    for module, name, _ in kept:
        setattr(module, name, replaced[name])
    for each in caches:
        each.cache_clear()
    try:
        yield
    finally:
        for module, name, before in kept:
            setattr(module, name, before)
        for each in caches:
            each.cache_clear()
