"""Compile the xpu kernels for Intel GPUs that are not here, by Intel's offline compiler, and assert on the instructions.

Decides: chips and builds, that int8 products are dp4a (four products and three additions in one instruction), that nothing is
fused, that no call is left open, and that quotients are the correctly rounded sequence. Refuses: to run anything; every line ends
in `compiled, not executed on this machine`. ocloc comes from the Debian package intel-opencl-icd: what is installed, or, with
--fetch, what `apt-get download` brings, unpacked into a folder and not installed.

    python tests/xpu/compile_xpu_kernels.py [--fetch FOLDER] [--room FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit.conformance.backend import NEVER_EXECUTED
from lowbit.kernels import xpu_room
from lowbit.kernels.xpu_room.opencl import OPTIONS

ROOM = Path(next(iter(xpu_room.__path__)))
CHIPS = ("acm-g10", "tgllp", "pvc")  # Arc A770 (Xe HPG), Tiger Lake (Xe LP), Data Center GPU Max (Xe HPC)
PACKAGES = (  # intel-opencl-icd and what it loads, Debian 12
    "intel-opencl-icd", "libigc1", "libigdfcl1", "libigdgmm12", "libopencl-clang14", "libllvm14", "libllvmspirvlib14",
)
INSTALL = "install the system package intel-opencl-icd, which holds ocloc, or run with --fetch where apt-get download works"


@dataclass(frozen=True, slots=True)
class Build:
    """One program: its file, its defines, and what its instructions must hold: `dp4a` at least, division or not."""

    name: str
    file: str
    defines: str
    dp4a: int = 0
    divides: bool = False


BUILDS = (
    *(Build(f"gemm_w4a8_int8 {out} rows{rows}", "gemm_w4a8_int8.cl", f"-DFORMAT={form} -DROWS={rows}", dp4a=2 * rows)
      for form, out in ((0, "f16"), (1, "bf16")) for rows in (1, 8)),
    *(Build(f"int8_quantize {x}", "int8_quantize.cl", f"-DFORMAT={form}", divides=True)
      for form, x in ((0, "f16"), (1, "bf16"), (2, "f32"))),
    Build("pack_int4, convert_b8, interleave_int4", "int4_words.cl", "-DFORMAT=2"),
)


@dataclass(frozen=True, slots=True)
class Ocloc:
    """The compiler and the environment that finds its libraries."""

    program: str
    environment: Mapping[str, str]


def fetched(folder: Path) -> Ocloc:
    """ocloc from downloaded packages, unpacked below `folder`. Raises OSError or CalledProcessError where there is no apt."""
    tree = folder / "tree"
    if not (tree / "usr/bin/ocloc").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True, timeout=120)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(package), str(tree)], check=True, capture_output=True)
    libraries = (tree / "usr/lib/x86_64-linux-gnu", tree / "usr/lib/llvm-14/lib")
    return Ocloc(str(tree / "usr/bin/ocloc"), {"LD_LIBRARY_PATH": ":".join(map(str, libraries))})


def ocloc_of(folder: Path | None) -> Ocloc | None:
    """The installed compiler, else a fetched one, else None."""
    installed = shutil.which("ocloc")
    if installed:
        return Ocloc(installed, {})
    try:
        return None if folder is None else fetched(folder)
    except (OSError, subprocess.SubprocessError):
        return None


def assembly(ocloc: Ocloc, text: str, chip: str, defines: str) -> str:
    """Gen assembly of all kernels of a program. Raises RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory() as place:
        source, dump = Path(place) / "kernels.cl", Path(place) / "dump"
        source.write_text(text, encoding="utf-8")
        dump.mkdir()
        where = ("-file", str(source), "-device", chip, "-out_dir", place)
        command = [ocloc.program, "compile", *where, "-options", f"{OPTIONS} {defines}"]
        environment = os.environ | dict(ocloc.environment) | {"IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": str(dump)}
        made = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
        found = sorted(file for file in dump.glob("*_entry_*.asm"))
        if "Build succeeded" not in made.stdout or not found:
            raise RuntimeError(f"ocloc for {chip}: {(made.stdout + made.stderr)[-600:]}")
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in found)


def instructions(text: str) -> list[str]:
    """Instructions without predicates and comments."""
    lines = (re.sub(r"^\([^)]*\)\s*", "", line.partition("//")[0].strip()) for line in text.splitlines())
    return [line for line in lines if re.match(r"[a-z][a-z0-9.]* +\(", line)]


def complaints(build: Build, text: str) -> list[str]:
    """What the instructions of a build lack, one sentence each."""
    code = instructions(text)
    names = [line.split()[0] for line in code]
    fused = [line for line in code if re.match(r"mad[a-z]* ", line) and ":f" in line]
    checks = (
        (names.count("dp4a") >= build.dp4a, f"{names.count('dp4a')} dp4a, expected at least {build.dp4a}"),
        ("call" not in names, "a call is left open: a builtin that this compiler does not know"),
        (bool(fused) == build.divides, f"{len(fused)} binary32 multiply-adds; only the division may have them"),
        (any(name.startswith("math.in") for name in names) == build.divides, "a division is missing, or one too many"),
    )
    return [sentence for good, sentence in checks if not good]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per build and chip; 1 where one lacks an instruction, 2 where there is no compiler."""
    parser = argparse.ArgumentParser(description="Compile the xpu kernels for Intel GPUs.")
    parser.add_argument("--fetch", type=Path, help="folder to unpack the compiler into where none is installed")
    parser.add_argument("--room", type=Path, default=ROOM, help="folder of the sources")
    parser.add_argument("--json", type=Path, help="write the complaints by build and chip")
    given = parser.parse_args(arguments)
    ocloc = ocloc_of(given.fetch)
    if ocloc is None:
        print(f"Nothing was compiled for Intel GPUs: {INSTALL}.")
        return 2
    found: dict[str, list[str]] = {}
    for build in BUILDS:
        text = "\n".join((given.room / name).read_text(encoding="utf-8") for name in ("codes.cl", build.file))
        for chip in CHIPS:
            code = assembly(ocloc, text, chip, build.defines)
            found[f"{build.name} for {chip}"] = lacking = complaints(build, code)
            said = "FAILED " + "; ".join(lacking) if lacking else NEVER_EXECUTED
            count = len(re.findall(r"\bdp4a\b", code))
            print(f"{build.name} for {chip}: {len(instructions(code))} instructions, {count} dp4a; {said}")
    if given.json:
        given.json.write_text(json.dumps(found), encoding="utf-8")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
