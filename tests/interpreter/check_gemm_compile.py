"""The Triton GEMMs compiled for every machine of the backend, with the tiles of the dispatch: `compile_gemms.py` in a process
of its own.

Decides: that every build has its instructions and fits, and on sm_90 spills nothing. Refuses: to run anything. Named check_ as
check_gemm_cases.py; Triton reads whether it interprets when it is imported, so that this cannot share a process with the
interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lowbit.kernels.triton_room.machine import MACHINES

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
