"""Compiles one kernel entry into a shared library: by g++ with the emulation headers, or by bisheng for the device.

Decides: the command, and the name of the result: a digest over every source, flag and compiler and the kind of machine, so that
a changed source is a new library, an unchanged one is never compiled twice, and homes shared by x86-64 and aarch64 hosts work.
Refuses: to return a library of a failed compilation, or a half-written one: each is made in a folder of its own and moved into
place in one step, whatever other processes do at the same time; and a folder that cannot be written to.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from .entries import Entry

__all__ = [
    "DEVICE", "EMULATION", "SANITIZERS", "BuildError", "cache_folder", "compiler", "device_library", "emulated_library",
    "mutants", "source_digest",
]

ROOM = Path(__file__).parent
DEVICE, EMULATION = ROOM / "device", ROOM / "emulation"
"""The kernels, as the vendor's compiler reads them, and the headers by which g++ reads the same files."""

SANITIZERS = ("address", "undefined", "thread")
"""What g++ can be asked to check at run time; "address" and "thread" need their library loaded before the interpreter's."""

# No contraction: a fused multiply-add rounds once where the device's vector unit rounds twice.
_GCC = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_BISHENG = ("-x", "asc", "--npu-arch=dav-2201", "-std=c++17", "-O2", "-fPIC", "-shared")  # dav-2201: the 910B family


class BuildError(Exception):
    """A library that cannot be built; the message says what is missing or shows the compiler's first complaints."""


def mutants() -> tuple[str, ...]:
    """Faults that can be built into a kernel, lower case: the macros LOWBIT_MUTANT_NAME that the sources ask for."""
    texts = (path.read_text(encoding="utf-8") for path in _sources(DEVICE))
    return tuple(sorted({name.lower() for text in texts for name in re.findall(r"ifdef LOWBIT_MUTANT_(\w+)", text)}))


def cache_folder() -> Path:
    """Where libraries are kept: lowbit/ascend under $XDG_CACHE_HOME, or under .cache of the user's home."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lowbit" / "ascend"


def compiler(name: str, hint: str, folders: Iterable[Path] = ()) -> Path:
    """The compiler `name`, looked for in `folders` and then on PATH. Raises BuildError, which ends in `hint`."""
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return folder / name
    if found := shutil.which(name):
        return Path(found)
    raise BuildError(f"got no {name} on PATH, expected one to compile the kernels of {DEVICE.name}/; {hint}")


@cache
def _version(path: Path) -> str:
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return (answer.stdout or answer.stderr).partition("\n")[0]


def _sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cpp"))


def source_digest(*folders: Path) -> str:
    """SHA-256 over names and contents of the sources in these folders, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in _sources(*folders):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _built(entry: Entry, command: Sequence[str], glue: str, suffix: str, digest: str) -> Path:
    """The library of `command`, in which GLUE stands for the file that `glue` is written to and OUT for the result."""
    parts = (*command, glue, digest, _version(Path(command[0])), platform.machine())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    kept = cache_folder() / key / f"{entry.name}.so"
    if kept.exists():
        return kept
    print(f"lowbit: compiling {entry.name} with {Path(command[0]).name}, once; kept in {kept.parent}", file=sys.stderr)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=kept.parent).close()
    except OSError as error:
        raise BuildError(
            f"got {error} for the folder of compiled kernels, expected one to write to; set XDG_CACHE_HOME to such a folder"
        ) from None
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        source, made = Path(folder) / f"glue{suffix}", Path(folder) / kept.name
        source.write_text(glue, encoding="utf-8")
        places = {"GLUE": str(source), "OUT": str(made)}
        answer = subprocess.run([places.get(word, word) for word in command], capture_output=True, text=True, check=False)
        if answer.returncode:
            complaints = [line for line in answer.stderr.splitlines() if "error" in line] or [answer.stderr[-500:]]
            raise BuildError(
                f"got exit code {answer.returncode} from {command[0]}, expected a library of {entry.source}: "
                f"{' | '.join(complaints[:3])}; to see all of it, run {shlex.join(command)} on a file that holds: {glue!r}"
            )
        os.replace(made, kept)
    return kept


def emulated_library(entry: Entry, mutant: str = "", sanitize: str = "") -> Path:
    """Library with `lowbit_emulate` for one entry, compiled by g++ from the unchanged kernel source. Raises BuildError.

    `mutant`: a fault, for the entry that can have one; `sanitize`: one of `SANITIZERS`.
    """
    gcc = compiler("g++", "install it (Debian: apt install g++; Fedora: dnf install gcc-c++)")
    flags = [*_GCC, *([f"-DLOWBIT_MUTANT_{mutant.upper()}"] if mutant and entry.faults else [])]
    flags += [f"-fsanitize={sanitize}", "-g", "-fno-sanitize-recover=all"] if sanitize else []
    glue = (
        f'#include "launch.h"\n#include "{entry.source}"\n'
        'extern "C" int lowbit_emulate(uint32_t blocks, const lowbit::Buffer* buffers, size_t count, char* message, '
        "size_t message_size)\n{\n"
        f"    return lowbit::Launch(&{entry.name}, lowbit::Mode::{entry.cores.value}, blocks, buffers, count, message, "
        "message_size);\n}\n"
    )
    parts = [str(path) for path in _sources(EMULATION) if path.suffix == ".cpp"]
    command = [str(gcc), *flags, f"-I{DEVICE}", f"-I{EMULATION}", "GLUE", *parts, "-o", "OUT", "-ldl"]
    return _built(entry, command, glue, ".cpp", source_digest(DEVICE, EMULATION))


def device_library(entry: Entry, toolkit: Path | None) -> Path:
    """Library with `lowbit_launch(blocks, stream, addresses)` for one entry, compiled by bisheng for the 910B. Raises BuildError.

    `toolkit`: the CANN installation. The kernel is started by its own launch syntax, which passes what mixed kernels need.
    """
    folders = () if toolkit is None else tuple(toolkit / part for part in ("bin", "compiler/ccec_compiler/bin"))
    bisheng = compiler("bisheng", "install the CANN toolkit (8.5 or later) and source its set_env.sh", folders)
    count = len(entry.arguments) + 2
    addresses = ", ".join(f"addresses[{place}]" for place in range(count))
    glue = (
        f'#include "{entry.source}"\n'
        'extern "C" void lowbit_launch(uint32_t blocks, void* stream, uint8_t** addresses)\n{\n'
        f"    {entry.name}<<<blocks, nullptr, stream>>>({addresses});\n}}\n"
    )
    command = [str(bisheng), *_BISHENG, f"-I{DEVICE}", "GLUE", "-o", "OUT"]
    return _built(entry, command, glue, ".asc", source_digest(DEVICE))
