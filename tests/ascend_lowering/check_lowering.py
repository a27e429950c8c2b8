"""The Triton int4 kernels lowered for an Ascend 910B: the operations are there, and a kernel without them is refused.

Decides: that the builds of `lower.py` pass, and that each planted variant fails the assertion that is about it. Refuses: to stand
in for a device or for the vendor's back end.
Named check_ so that `pytest` does not collect it by itself: it needs triton-ascend and ascendnpu-ir, and runs in the session that
installs them:

    pytest tests/ascend_lowering/check_lowering.py
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowbit.kernels import triton_room

PROGRAM = Path(__file__).with_name("lower.py")
ROOM = Path(next(iter(triton_room.__path__)))


def lowered(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lower", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lower"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_build_has_its_operations(tmp_path: Path) -> None:
    found = lowered("--json", str(tmp_path / "facts.json"))
    assert found.returncode == 0, found.stdout + found.stderr
    builds: list[dict[str, Any]] = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))["builds"]
    matrix = {build["name"]: sorted(name for name in build["cube"] if name.startswith("mma_tile")) for build in builds}
    assert matrix == {
        "quantise.f16.smooth": [], "quantise.bf16": [], "project.f16": ["mma_tile_half_to_float"],
        "project.bf16": ["mma_tile_bfloat16_t_to_float"], "gemm.f16": ["mma_tile_int8_t_to_int32_t_tb"],
        "gemm.f16.lora.bias": ["mma_tile_half_to_float_tb", "mma_tile_int8_t_to_int32_t_tb"],
    }
    assert "never compiled to a binary and never executed on a device" in found.stdout


PLANTS = {
    "no product": (
        "ascend_gemm_int4.py", "tl.dot(left, tl.trans(right), out_dtype=tl.int32)",
        "tl.sum(left.to(tl.int32), axis=1)[:, None] + tl.sum(right.to(tl.int32), axis=1)[None, :]",
        "gemm.f16", "mma_tile_int8_t_to_int32_t in a loop of the cube core: 0",
    ),
    "product of floats": (
        "ascend_gemm_int4.py", "tl.dot(left, tl.trans(right), out_dtype=tl.int32)",
        "tl.dot(left.to(tl.float16), tl.trans(right.to(tl.float16)))",
        "gemm.f16", "no product of another type on the cube",
    ),
    "one scale": (
        "ascend_gemm_int4.py", "part * left[:, None] * right[None, :]", "part * left[:, None]",
        "gemm.f16", "vmul_2d_float on the vector core: 2",
    ),
    "code not rounded": (
        "ascend_int4_quantize.py", "7.0) + 12582912.0", "7.0)", "quantise.bf16", "vadds_vs_1d_float on the vector core: 0",
    ),
    "reciprocal": (
        "ascend_int4_quantize.py", "quotient = tl.div_rn(value, divisor[:, None].broadcast_to(value.shape))",
        "quotient = value * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)[:, None]",
        "quantise.bf16", "vdiv_2d_float on the vector core: 1",
    ),
    "operand changed on its way": (
        "ascend_int4_quantize.py", "tl.dot(left, right, total)", "tl.dot(left + left, right, total)",
        "project.f16", "no operand of the cube passes through the vector core",
    ),
    # triton-ascend 3.2.0 makes a load whose mask compares a strided index one copy of the whole span, whatever the mask says
    "strided load": (
        "ascend_int4_quantize.py", "pair[None, :], mask=present, other=0",
        "(pair * 2)[None, :], mask=present & (pair * 2 < k64 * 32)[None, :], other=0",
        "quantise.bf16", "masked loads that are not cut to their mask: 1 of 1",
    ),
    # a strided store is parted element by element, each in 32 bytes of its own
    "strided store": (
        "ascend_int4_quantize.py", "pair = group * 32 + tl.arange(0, 32)", "pair = group * 32 + tl.arange(0, 32) * 2",
        "quantise.bf16", "buffers fit at once",
    ),
}


@pytest.mark.parametrize("plant", list(PLANTS))
def test_a_kernel_that_lacks_a_part_is_refused(plant: str, tmp_path: Path) -> None:
    file, text, other, build, words = PLANTS[plant]
    for name in ("ascend_int4_quantize.py", "ascend_gemm_int4.py"):
        shutil.copy(ROOM / name, tmp_path / name)
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert text in source
    (tmp_path / file).write_text(source.replace(text, other), encoding="utf-8")
    found = lowered("--room", str(tmp_path), "--only", build)
    assert found.returncode == 1, found.stdout + found.stderr
    assert f"FAILED {words}" in found.stdout


def test_a_build_that_does_not_exist_is_named() -> None:
    found = lowered("--only", "quantise.f64")
    assert found.returncode == 2
    assert "quantise.f64" in found.stderr


def test_calls_are_counted_by_loop(program: ModuleType) -> None:
    lines = [
        "  func.func @k() {", "    call @before() : () -> ()", "    scf.for %i = %a to %b step %c {", "      scf.if %d {",
        "        func.call @inside() : () -> ()", "      }", "      func.call @inside() : () -> ()", "    } {attribute}",
        "    call @after() : () -> ()",
    ]
    assert +program.calls(lines, looped=True) == {"inside": 2}
    assert program.calls(lines, looped=False) == {"before": 1, "inside": 2, "after": 1}
    assert program.counted({"vmul_2d_float": 2, "vmul_2d_float_x": 1, "vmul_2d_floaty": 4}, "vmul_2d_float") == 3
