"""The Triton GEMMs compiled for every machine of the backend, with the tiles of the dispatch: `compile_gemms.py` in a process
of its own.

Decides: that every build has its instructions and fits, and on sm_90 spills nothing and leaves alone what instructions in flight
read and write. Refuses: to run anything. Named check_ as check_gemm_cases.py; Triton reads whether it interprets when it is
imported, so that this cannot share a process with the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported without a folder of theirs on the path

import pytest
from machine_code import disturbed

from lowbit.kernels.triton_room.machine import MACHINES

LISTED = """
        /*0010*/                   MOV R8, R2 ;
        /*0020*/                   HGMMA.64x8x16.F32 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   HGMMA.64x8x16.F32 R24, R8, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/                   LDS.64 R6, [R0] ;
        /*0060*/              @P0  BRA 0x10 ;
        /*0070*/                   FADD R3, R3, R27 ;
"""
"""R4 to R7 and R8 to R11 are left operands, R24 to R27 sums. Past 40 the second product is in flight, until 40 comes again."""
SCRIPT = Path(__file__).with_name("compile_gemms.py")


def test_every_build_has_its_instructions(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, SCRIPT, "--json", tmp_path / "facts.json"], capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    builds = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    made = {(build["capability"], build["name"].split()[0].rstrip(",")) for build in builds}
    assert made == {(10 * major + minor, op) for major, minor in MACHINES for op in ("w8a8", "nvfp4", "int4", "w4a16", "w4a8")}
    assert not any(build["spills"] for build in builds if build["capability"] == 90)
    assert not any(build["missing"] for build in builds)
    assert "compiled, not executed here" in found.stdout


@pytest.mark.parametrize(("written", "instead", "early"), [
    ("", "", ["10 MOV R8, R2", "70 FADD R3, R3, R27"]),
    ("gsb0, 0x1", "gsb0, 0x0", []),
    ("LDS.64 R6", "LDS.128 R6", ["10 MOV R8, R2", "50 LDS.128 R6, [R0]", "50 LDS.128 R6, [R0]", "70 FADD R3, R3, R27"]),
    ("MOV R8, R2", "STS [R8], R2", ["70 FADD R3, R3, R27"]),
    ("R3, R3, R27", "R3, R3, R28", ["10 MOV R8, R2"]),
])
def test_registers_of_instructions_in_flight_are_seen(written: str, instead: str, early: list[str]) -> None:
    assert sorted(disturbed(LISTED.replace(written, instead) if written else LISTED)) == early
