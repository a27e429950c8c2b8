"""Compiles one .cu file of this folder into a shared library for compute capability 9.0, and keeps it in the user's cache.

Decides: the compiler (`compiler`), the command, and the name of the result: a digest over the source, the headers that it
includes, macros, flags, compiler and kind of machine, so that a changed source is a new library and an unchanged one is never
compiled twice. What is no part of the digest does not reach the compiler: nvcc's variables that add flags are removed, and a
result whose sources changed meanwhile is thrown away. Each is made in a folder of its own under a lock and moved into place in
one step, whatever other processes do at the same time.
Refuses: a machine without nvcc or without a C++ compiler behind it, a cache that cannot be written to, and a source that does not
compile or keeps changing: each with a sentence that says what to try. Nothing here needs a device, torch, or a name of the
driver.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

__all__ = ["ROOM", "BuildError", "Unit", "build_all", "cache_folder", "command", "compiled", "compiler", "library", "sources"]

ROOM = Path(__file__).parent
"""The folder of the sources."""

_TARGET = ("-gencode", "arch=compute_90a,code=sm_90a")  # machine code alone: wgmma belongs to the architecture-specific set
_FLAGS = ("-O3", "-std=c++17", *_TARGET, "-shared", "-Xcompiler", "-fPIC")
_ADDING = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # variables by which nvcc takes further flags
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
_HINT = (
    "install the CUDA toolkit (12.8 or later) and put nvcc on PATH or set CUDA_HOME, or pip install nvidia-cuda-nvcc nvidia-nvvm "
    "nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"
)

Unit = tuple[str, Mapping[str, str | int], Sequence[str]]
"""One library: source, macros, further flags; the arguments of `compiled`."""


class BuildError(Exception):
    """A library that cannot be built; the message says what is missing or shows the compiler's first complaints."""


def cache_folder() -> Path:
    """Where libraries are kept: lowbit/hopper under $XDG_CACHE_HOME, or under .cache of the user's home."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lowbit" / "hopper"


def _candidates() -> Iterator[Path]:
    if found := shutil.which("nvcc"):
        yield Path(found)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home) / "bin" / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")
    wheels = importlib.util.find_spec("nvidia")  # a namespace that pip's CUDA packages share
    for folder in () if wheels is None else wheels.submodule_search_locations or ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def compiler() -> Path:
    """nvcc: on PATH, under CUDA_HOME, in its usual folder, or from pip's packages. Raises BuildError where it is in none."""
    for path in _candidates():
        if os.access(path, os.X_OK):
            return path
    raise BuildError(f"got no nvcc on PATH, under CUDA_HOME or among pip's packages, expected one for Hopper kernels; {_HINT}")


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in _ADDING}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=kept)


@cache
def _version(nvcc: Path) -> str:
    answer = _run((str(nvcc), "--version"))
    return (answer.stdout or answer.stderr).strip()


def sources(source: str) -> tuple[Path, ...]:
    """A source of this folder and the headers that it includes by a name in quotes, each once, the source first.

    Raises BuildError for a name that is not there."""
    found: list[Path] = []
    waiting = [(ROOM / source, "the room")]
    while waiting:
        path, asked = waiting.pop()
        if path in found:
            continue
        if not path.is_file():
            raise BuildError(f"got no {path.name} beside {asked}, expected a source of the Hopper kernels in {path.parent}")
        found.append(path)
        names = _INCLUDE.findall(path.read_text(encoding="utf-8"))
        waiting += [(Path(os.path.normpath(path.parent / name)), path.name) for name in names]
    return tuple(found)


def command(source: str, defines: Mapping[str, str | int], flags: Sequence[str], out: Path) -> tuple[str, ...]:
    """What is run to compile `source` into `out`. Raises BuildError where there is no nvcc."""
    nvcc = compiler()
    macros = (f"-D{name}={value}" for name, value in sorted(defines.items()))
    return (str(nvcc), *_FLAGS, *flags, *macros, str(ROOM / source), "-o", str(out))


def _place(source: str, defines: Mapping[str, str | int], flags: Sequence[str]) -> Path:
    """Where the library of the sources as they are now is kept."""
    return cache_folder() / f"{Path(source).stem}-{_key(source, command(source, defines, flags, Path('/out')))}.so"


def _key(source: str, words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sources(source):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    # where the sources and the compiler lie is no part of what comes out
    parts = [_version(compiler()), platform.machine(), *(word for word in words if not word.startswith("/"))]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes and threads that ask for the same file; the file stays."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"lowbit: {text}", file=sys.stderr, flush=True)


def compiled(
    source: str, *, defines: Mapping[str, str | int] | None = None, flags: Sequence[str] = (), progress: str = ""
) -> Path:
    """The library of `source` (a name in this folder) with these macros and further nvcc flags, compiled if it is not kept yet.

    `progress` ends the message that is printed when a compiler has to run. Sources that change while it runs are compiled once
    more. Raises BuildError."""
    for _ in range(2):
        kept = _place(source, defines or {}, flags)
        if not kept.exists():
            _compile(kept, source, defines or {}, flags, progress)
        if kept.exists():
            return kept
    raise BuildError(f"got sources of {source} that changed twice while they were compiled, expected them at rest; try again")


def _compile(kept: Path, source: str, defines: Mapping[str, str | int], flags: Sequence[str], progress: str) -> None:
    """Make the library `kept`, unless another process has or the sources are no longer those of its name. Raises BuildError."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=kept.parent).close()
    except OSError as error:
        raise BuildError(
            f"got {error} for the folder of compiled kernels, expected one to write to; set XDG_CACHE_HOME to such a folder"
        ) from None
    with _locked(kept.with_suffix(".lock")):
        if kept.exists():
            return
        macros = "".join(f" {name}={value}" for name, value in sorted(defines.items()))
        _say(f"compiling {source}{macros} for sm_90a, once; kept in {kept.parent}{progress}")
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            made = Path(folder) / kept.name
            words = command(source, defines, flags, made)
            answer = _run(words)
            if answer.returncode:
                text = answer.stderr + answer.stdout
                complaints = [line for line in text.splitlines() if "error" in line or "fatal" in line] or [text[-500:]]
                absent = "no g++ on PATH, which nvcc calls: install it; " if shutil.which("g++") is None else ""
                raise BuildError(
                    f"got exit code {answer.returncode} from {words[0]}, expected a library of {source}: {absent}"
                    f"{' | '.join(complaints[:3])}; to see all of it, run {shlex.join(words)}"
                )
            if _place(source, defines, flags) == kept:
                os.replace(made, kept)


_LOADED: dict[Path, ctypes.CDLL] = {}
_LOADING = Lock()


def library(source: str, *, defines: Mapping[str, str | int] | None = None, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The loaded library of `source`, one per process; see `compiled`. Raises BuildError.

    Loading needs no device; a launch does."""
    return _load(source, tuple(sorted((defines or {}).items())), tuple(flags), str(cache_folder()))


@cache
def _load(source: str, defines: tuple[tuple[str, str | int], ...], flags: tuple[str, ...], folder: str) -> ctypes.CDLL:
    path = compiled(source, defines=dict(defines), flags=flags)
    with _LOADING:
        if path not in _LOADED:
            _LOADED[path] = ctypes.CDLL(str(path))
        return _LOADED[path]


def build_all(units: Sequence[Unit], workers: int | None = None) -> tuple[Path, ...]:
    """The libraries of all units, several at a time, with a count of those done. Raises BuildError for the first that fails."""
    total = len(units)

    def one(place: int, unit: Unit) -> Path:
        source, defines, flags = unit
        return compiled(source, defines=defines, flags=flags, progress=f" ({place} of {total})")

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        made = tuple(pool.map(one, range(1, total + 1), units))
    _say(f"{total} of {total} libraries are in {cache_folder()}")
    return made
