"""The Hopper kernels without a device: every library compiles, and its machine code is what the kernels are written for.

Decides: that all is built for sm_90a, that products run on the warpgroup matrix unit, for fp8 or (gemm_w4a8_f16.cu) binary16, and
on no other, fed by the copy engine, that several products run between two fences (the compiler makes each wait for the one before
where it cannot follow their registers), that nothing is kept in local memory, and that conversions and 16-byte loads are single
instructions. Each rule is also shown to refuse an altered disassembly. Refuses: to stand in for a device.
Named check_ so that `pytest` does not collect it by itself: it needs nvcc and cuobjdump, and runs in the session that installs
them:

    pytest tests/hopper/check_compile.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowbit.kernels import cuda_hopper
from lowbit.kernels.hopper_room import build
from lowbit.kernels.hopper_room.build import build_all, compiler

_MATRIX = re.compile(r"^(Q|H|I|D)?G?MMA$")
_HALF = ("gemm_w4a8_f16.cu",)
_CONVERSION = "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C"


def parts(sass: str) -> dict[str, Counter[str]]:
    """Function -> how often each opcode, with its qualifiers, stands in it."""
    found: dict[str, Counter[str]] = {}
    for block in re.split(r"\n\s*Function : ", sass)[1:]:
        name, _, code = block.partition("\n")
        opcodes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
        found[name.strip()] = Counter(opcodes)
    return found


def architectures(sass: str) -> set[str]:
    return set(re.findall(r"^\s*arch = (\S+)$", sass, re.MULTILINE))


def complaints(source: str, sass: str) -> Iterator[str]:
    """What a disassembly of a library of `source` shows that should not be there, or lacks."""
    if architectures(sass) != {"sm_90a"}:
        yield f"architectures {sorted(architectures(sass))}"
    functions, unit = parts(sass), "HGMMA" if source in _HALF else "QGMMA"
    if not functions:
        yield "no function"
    roots = Counter[str]()
    for name, opcodes in functions.items():
        here = Counter[str]()
        for opcode, count in opcodes.items():
            here[opcode.partition(".")[0]] += count
        roots += here
        if here["LDL"] + here["STL"]:
            yield f"{name}: {here['LDL'] + here['STL']} accesses to local memory"
        others = [root for root in here if _MATRIX.match(root) and root != unit]
        if others:
            yield f"{name}: matrix opcodes {others}"
        if here[unit] and opcodes["WARPGROUP.ARRIVE"] >= here[unit]:
            yield f"{name}: {here[unit]} products wait for each other"
    all_opcodes = sum(functions.values(), Counter[str]())
    products = source.startswith("gemm") and not source.endswith("_pack.cu")
    if products and not roots[unit]:
        yield f"no {unit}"
    if products and not roots["UTMALDG"] + roots["UBLKCP"]:
        yield "no copy by the engine"
    if not products and roots[unit]:
        yield f"{unit} where nothing is multiplied"
    if source in ("quantisers.cu", "encodings.cu"):
        if not any(opcode.startswith("LDG.E") and ".128" in opcode for opcode in all_opcodes):
            yield "no loads of 16 bytes"
        if not all_opcodes[_CONVERSION]:
            yield f"no {_CONVERSION}: {sorted(opcode for opcode in all_opcodes if opcode.startswith('F2FP'))}"


def disassembled(library: Path) -> str:
    folders = [str(path.parent) for path in (compiler(), *build._candidates())]
    tool = shutil.which("cuobjdump", path=os.pathsep.join((*folders, os.environ["PATH"])))
    assert tool is not None, "got no cuobjdump beside nvcc or on PATH; install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
    environment = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}  # it calls nvdisasm
    return subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True, env=environment).stdout


@pytest.fixture(name="built", scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """(source, disassembly) of every library; LOWBIT_HOPPER_CACHE=keep takes those of the user's cache."""
    patch = pytest.MonkeyPatch()
    if os.environ.get("LOWBIT_HOPPER_CACHE") != "keep":
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    units = cuda_hopper.units()
    made = build_all(units)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [(unit[0], text) for unit, text in zip(units, pool.map(disassembled, made), strict=True)]
    patch.undo()
    return found


def test_every_library_is_what_its_source_is_for(built: list[tuple[str, str]]) -> None:
    assert {source: found for source, text in built if (found := list(complaints(source, text)))} == {}
    assert {source for source, _ in built} >= {"encodings.cu", "quantisers.cu"}


def altered(source: str, text: str) -> Iterator[tuple[str, str]]:
    """(altered disassembly, what must be said of it)."""
    yield text.replace("sm_90a", "sm_90"), "architectures ['sm_90']"
    yield text.replace("LDG.E", "LDL.E"), "local memory"
    if source.startswith("gemm") and "GMMA" in text:
        unit = "HGMMA" if "HGMMA" in text else "QGMMA"
        yield text.replace(unit, "FFMA"), f"no {unit}"
        yield text.replace(unit, "IGMMA"), "matrix opcodes ['IGMMA']"
        line = next(line for line in text.splitlines() if "WARPGROUP.ARRIVE" in line)
        yield text.replace(line, "\n".join([line] * 99), 1), "products wait for each other"
        yield text.replace("UTMALDG", "LDG").replace("UBLKCP", "LDG"), "no copy by the engine"
    elif source in ("encodings.cu", "quantisers.cu"):
        yield text.replace(_CONVERSION, "F2FP.F16.F32.PACK_AB"), f"no {_CONVERSION}"
        yield text.replace(".128", ".64"), "no loads of 16 bytes"
        yield text.replace("IMAD", "QGMMA"), "QGMMA where nothing is multiplied"


def test_every_rule_refuses_what_it_is_for(built: list[tuple[str, str]]) -> None:
    first = {source: text for source, text in reversed(built)}
    tried = 0
    for source, text in first.items():
        for changed, wanted in altered(source, text):
            tried += 1
            assert changed != text
            assert any(wanted in said for said in complaints(source, changed)), (source, wanted)
    assert tried >= 10
