"""The xpu kernels compiled for Intel GPUs: the instructions are there, and sources without them are refused.

Needs ocloc (see compile_xpu_kernels.py) and runs in `nox -s xpu` where it can be had: pytest tests/xpu/check_xpu_compiled.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.kernels import xpu_room

PROGRAM = Path(__file__).with_name("compile_xpu_kernels.py")
ROOM = Path(next(iter(xpu_room.__path__)))


def compiled(room: Path, folder: Path) -> dict[str, list[str]]:
    """Complaints by build and chip. OCLOC_FOLDER is where the session unpacked the compiler."""
    report = folder / "complaints.json"
    fetch = ["--fetch", os.environ["OCLOC_FOLDER"]] if "OCLOC_FOLDER" in os.environ else []
    command = [sys.executable, str(PROGRAM), "--room", str(room), "--json", str(report), *fetch]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.is_file(), made.stdout + made.stderr
    found: dict[str, list[str]] = json.loads(report.read_text(encoding="utf-8"))
    assert made.returncode == int(any(found.values()))
    return found


def test_every_build_has_its_instructions(tmp_path: Path) -> None:
    found = compiled(ROOM, tmp_path)
    assert len(found) == 24
    assert {build: lacking for build, lacking in found.items() if lacking} == {}


DOT = "a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w"
PLANTS = {  # text of the GEMM, what replaces it, of what every build of it complains
    "products in binary32": (DOT, "(int)((float)a.x * b.x + (float)a.y * b.y + (float)a.z * b.z + (float)a.w * b.w)", "0 dp4a"),
    "fused": ("total[r] + convert_float_rte(sum[r]) * scale", "fma(convert_float_rte(sum[r]), scale, total[r])",
              "binary32 multiply-adds"),
}


@pytest.mark.parametrize("plant", list(PLANTS))
def test_a_source_that_lacks_a_part_is_refused(plant: str, tmp_path: Path) -> None:
    text, other, words = PLANTS[plant]
    room = tmp_path / "room"
    shutil.copytree(ROOM, room)
    kernel = room / "gemm_w4a8_int8.cl"
    source = kernel.read_text(encoding="utf-8")
    assert source.count(text) == 1
    kernel.write_text(source.replace(text, other), encoding="utf-8")
    for build, lacking in compiled(room, tmp_path).items():
        assert any(words in sentence for sentence in lacking) is build.startswith("gemm"), build
