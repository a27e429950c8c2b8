"""The Triton kernels compiled for gfx942 and gfx950: opcodes, local memory, and that the branches differ in the product alone.

Needs triton and torch and no GPU; the kernels are compiled in a process of their own, which the interpreter does not touch:

    pytest tests/rocm/check_compiled.py
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowbit.kernels.rocm_room.devices import CHIPS

PROGRAM = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_kernels"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def compiling() -> dict[str, str]:
    """The environment of a process that compiles, whatever this one does."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One record per problem, chip and kernel; one process per chip."""
    folder = tmp_path_factory.mktemp("rocm")
    def compiled(chip: str) -> list[dict[str, Any]]:
        file = folder / f"{chip}.json"
        command = [sys.executable, str(PROGRAM), "--chip", chip, "--json", str(file)]
        made = subprocess.run(command, capture_output=True, text=True, check=False, env=compiling())
        assert file.is_file(), made.stderr
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return found

    with ThreadPoolExecutor() as pool:
        return [record for records in pool.map(compiled, CHIPS) for record in records]


def test_every_problem_has_its_opcode_on_every_chip(built: list[dict[str, Any]], program: ModuleType) -> None:
    assert {(record["problem"], record["chip"]) for record in built} == {
        (text, chip) for text, _ in program.PROBLEMS for chip in CHIPS}
    assert [record for record in built if record["lacking"]] == []
    refused = {(record["problem"].split("/")[0], record["chip"]) for record in built if not record["kernel"]}
    assert refused == {("gemm_w4a16", "gfx950")}  # the exceptions of gfx950: tiles that do not fit its local memory


@pytest.mark.parametrize(("problem", "chip", "kernel", "opcode"), [
    ("gemm_w8a8_fp8/scaled/m128n256k512/bf16.fnuz.bias", "gfx942", "w8a8_gemm", "v_mfma_f32_32x32x16_fp8_fp8"),
    ("gemm_w8a8_fp8/scaled/m128n256k512/bf16.fn.bias", "gfx950", "w8a8_gemm", "v_mfma_f32_32x32x64_f8f6f4"),
    ("gemm_w8a8_fp8/scaled/m1n256k2048/bf16.fnuz.atensor.wtensor.bias", "gfx942", "skinny_parts", "v_mfma_f32_16x16x32_fp8_fp8"),
    ("gemm_w8a8_fp8/scaled/m1n256k2048/bf16.fn.atensor.wtensor.bias", "gfx950", "skinny_parts", "v_mfma_f32_16x16x128_f8f6f4"),
    ("gemm_w4a8_int8/direct/m128n256k512g128/bf16.bias", "gfx942", "w4a8_gemm", "v_mfma_i32_32x32x16_i8"),
    ("gemm_w4a8_int8/direct/m128n256k512g128/bf16.bias", "gfx950", "w4a8_gemm", "v_mfma_i32_32x32x32_i8"),
])
def test_the_product_is_the_matrix_units(
    built: list[dict[str, Any]], problem: str, chip: str, kernel: str, opcode: str,
) -> None:
    wanted = (problem, chip, kernel)
    found = [record["opcodes"] for record in built if (record["problem"], record["chip"], record["kernel"]) == wanted]
    assert found
    assert all(opcode in opcodes for opcodes in found), found


def test_codes_of_the_other_e4m3_are_decoded_first(built: list[dict[str, Any]]) -> None:
    """The exceptions: e4m3fn on gfx942 and e4m3fnuz on gfx950 are multiplied as binary16."""
    for chip, other in (("gfx942", "fn"), ("gfx950", "fnuz")):
        units = {record["unit"] for record in built if record["kernel"] == "w8a8_gemm" and record["chip"] == chip
                 and f".{other}" in record["problem"].split("/")[3] + "." and re.search(rf"\.{other}(\.|$)", record["problem"])}
        assert units == {"f16"}, (chip, units)


def test_a_build_that_lacks_something_is_named(program: ModuleType) -> None:
    def made(assembly: str, shared: int = 0) -> list[Any]:
        return [program.Made("k", {}, assembly, 1, shared)]

    right = "v_mfma_f32_32x32x16_fp8_fp8 a, b"
    assert program.complaints("fnuz", "gfx942", made(right)) == []
    assert "v_mfma_f32_32x32x8_f16, expected" in program.complaints("fnuz", "gfx942", made("v_mfma_f32_32x32x8_f16 a, b"))[0]
    assert "no mfma, expected" in program.complaints("int8", "gfx950", made("v_dot4_i32_i8 a, b"))[0]
    assert "where nothing is multiplied" in program.complaints("none", "gfx942", made(right))[0]
    assert "65537 bytes of local memory, gfx942 has 65536" in program.complaints("fnuz", "gfx942", made(right, 65537))[0]
    assert program.complaints("fn", "gfx950", made("v_mfma_f32_32x32x64_f8f6f4 a, b", 65537)) == []


# The branch that the interpreter executes and the one that a chip would, side by side -----------------------------------


def resolved(text: str) -> tuple[list[str], list[str]]:
    """(operations of the loop over K, operations after it), every name replaced by a digest of what defines it: equal lines are
    equal operations on equal values, whatever those are called. Arguments of the kernel keep their names, the result of the loop
    is `loop`, and e4m3 codes are bytes in both branches."""
    known: dict[str, str] = {}
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])  # before the loop, in it, after it
    place = 0
    for raw in text.splitlines():
        line = re.sub(r"\s*loc\(.*$", "", raw).strip().replace("f8E4M3FNUZ", "i8")
        line = re.sub(r"dense<0\.0+e\+00>( : tensor<\w+xi8>)", r"dense<0>\1", line)  # the code of zero
        if not line or line.startswith(("#", "module", "}", "tt.func")):
            continue
        name, _, body = line.partition(" = ") if line.startswith("%") else ("", "", line)
        if "scf.for" in line:
            step = re.search(r"scf\.for (%\w+) = (.*) iter_args\((.*)\) ->", body)
            assert step is not None
            assert place == 0, "one loop"
            known[step[1]] = "index of " + re.sub(r"%\w+", lambda found: known.get(found[0], found[0]), step[2])
            for carried in step[3].split(", "):
                inner, _, start = carried.partition(" = ")
                known[inner] = f"carried from {known[start]}"
            known[name] = "loop"
            place = 1
            continue
        body = re.sub(r"%\w+", lambda found: known.get(found[0], found[0]), body)
        if name:
            known[name] = hashlib.sha256(body.encode()).hexdigest()[:16]
        parts[place].append(body)
        place = 2 if "scf.yield" in body else place
    assert place == 2
    return parts[1], parts[2]


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Triton's code by kernel and UNIT."""
    file = tmp_path_factory.mktemp("branches") / "branches.json"
    subprocess.run([sys.executable, str(PROGRAM), "--branches", str(file)], check=True, env=compiling())
    found: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kernel", ["w8a8_gemm", "skinny_parts"])
def test_the_branches_differ_in_the_product_alone(branches: dict[str, dict[str, str]], kernel: str) -> None:
    """After the loop every operation is the same on the same values, in the same order: scales, bias, cast and store. In the loop
    the same tiles are loaded from the same places under the same masks, and there is one product."""
    (loop_chip, after_chip), (loop_here, after_here) = (resolved(branches[kernel][unit]) for unit in ("fp8", "binary32"))
    assert after_chip == after_here
    assert any("tt.store" in line for line in after_chip)
    assert "loop" in " ".join(after_chip)
    loads = [[line for line in loop if "tt.load" in line] for loop in (loop_chip, loop_here)]
    assert loads[0] == loads[1]
    assert len(set(loads[0])) == 2
    assert [sum("tt.dot" in line for line in loop) for loop in (loop_chip, loop_here)] == [1, 1]
    own = ("tt.dot", "tt.trans", "scf.yield")
    assert [line for line in loop_chip if line not in loop_here and not any(word in line for word in own)] == []
    assert [line for line in loop_here if line not in loop_chip]  # codes become values by integers: there and nowhere else


@pytest.mark.parametrize("kernel", ["w8a8_gemm", "skinny_parts"])
def test_names_count(branches: dict[str, dict[str, str]], kernel: str) -> None:
    """A load under the other load's mask, and a store of another value, are seen though every line has the same shape."""
    text = branches[kernel]["fp8"]
    first, second = re.findall(r"tt\.load %\w+, (%\w+), %\w+", text.partition("scf.for")[2].partition("scf.yield")[0])
    assert first != second
    crossed = re.sub(rf"(tt\.load %\w+, ){first}\b", rf"\g<1>{second}", text)
    assert resolved(crossed)[0] != resolved(text)[0]
    (begin, end) = re.search(r"tt\.store %\w+, (%\w+)", text).span(1)  # type: ignore[union-attr]
    moved = f"{text[:begin]}%n{text[end:]}"
    assert resolved(moved)[1] != resolved(text)[1]
