"""The CuTe kernel without a device: every instance compiled and its machine code asserted on, broken kernels rejected.

Decides: that `compile_gemm.py` compiles all instances for sm_100a and sm_103a and none for sm_120a, that `check_disassembly.py`
accepts what came out, and that it rejects a kernel without its low-rank MMA, one without block scales, and every altered fact.
Refuses: to stand in for a device, and to pass where the compiler is absent.
Named check_ so that `pytest` does not collect it by itself: it needs nvidia-cutlass-dsl, and runs where a session installs that:

    pytest tests/blackwell/check_cute.py
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.kernels.blackwell_room.schedule import CONFIGS

HERE = Path(__file__).parent
WITH_LORA = "m256n128c2x1_bf16_lora"
Facts = list[dict[str, Any]]


def compile_gemm(out: Path, *arguments: str) -> Facts:
    """Run the compilation in a process of its own, and read what it found."""
    command = [sys.executable, str(HERE / "compile_gemm.py"), "--out", str(out), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"nothing was compiled, so nothing is shown: {found.stdout}{found.stderr}"
    facts: Facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    return facts


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "check_disassembly.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Facts]:
    """All instances for all architectures."""
    out = tmp_path_factory.mktemp("cute")
    return out, compile_gemm(out)


@pytest.fixture(scope="session")
def judge() -> Callable[[dict[str, Any], str], list[str]]:
    """`broken` of check_disassembly.py."""
    spec = importlib.util.spec_from_file_location("check_disassembly", HERE / "check_disassembly.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    broken: Callable[[dict[str, Any], str], list[str]] = module.broken
    return broken


def test_every_instance_has_its_instructions(built: tuple[Path, Facts]) -> None:
    out, facts = built
    found = check(out / "facts.json")
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "compiled, never executed on a device" in found.stdout
    names = {config.name for config in CONFIGS}
    for arch in ("sm_100a", "sm_103a"):
        assert {fact["name"] for fact in facts if fact["arch"] == arch and not fact["refused"]} == names
    assert {fact["name"] for fact in facts if fact["arch"] == "sm_120a" and fact["refused"]} == names  # it has no tcgen05


@pytest.mark.parametrize(("variant", "words"), [
    ("no_lora_mma", "low-rank MMA: 0 in PTX"), ("no_block_scales", "block-scaled MMA: 0 in PTX"),
])
def test_a_kernel_that_lacks_a_product_is_rejected(variant: str, words: str, tmp_path: Path) -> None:
    compile_gemm(tmp_path, "--variant", variant, "--only", WITH_LORA, "--arch", "sm_100a,sm_103a")
    found = check(tmp_path / "facts.json")
    assert found.returncode == 1
    assert words in found.stderr
    assert check(tmp_path / "facts.json", "--expect-fault", words).returncode == 0
    assert check(tmp_path / "facts.json", "--expect-fault", "spills").returncode == 1


ALTERATIONS: tuple[tuple[str, Callable[[dict[str, Any]], object], str], ...] = (
    ("outside the loop", lambda f: f["ptx_mma"].__setitem__(0, [*f["ptx_mma"][0][:2], 1]), "outside the loop over K blocks"),
    ("another accumulator", lambda f: f["ptx_mma"].__setitem__(7, [f["ptx_mma"][7][0], "%r1", 2]), "one accumulator: the MMAs"),
    ("address changed", lambda f: f["written"].update({next(iter(f["written"])): 2}), "one accumulator: its address"),
    ("machine accumulator", lambda f: f["sass_mma"].__setitem__(0, [f["sass_mma"][0][0], "UR99"]), "the machine code writes"),
    ("low rank first", lambda f: f["ptx_mma"].reverse(), "stands before a block-scaled one"),
    ("two scales per 64", lambda f: f["ptx_mma"].__setitem__(
        0, [f["ptx_mma"][0][0].replace("4X", "2X").replace("block16", "block32"), *f["ptx_mma"][0][1:]]), "without four scales"),
    ("e8m0 scales", lambda f: f["descriptors"][0].update(scales=1), "instruction descriptor of kind::mxf4nvf4"),
    ("f16 for bf16", lambda f: f["descriptors"][7].update(a=0), "instruction descriptor of kind::f16"),
    ("one CTA", lambda f: f.update(sass_mma=[[o.replace(".2CTA", ""), u] for o, u in f["sass_mma"]]), ".2CTA"),
    ("spill", lambda f: f.update(spills=1), "spills: 1"),
    ("stack", lambda f: f.update(local_bytes=8), "local memory: 8"),
    ("registers", lambda f: f.update(registers=256), "registers: 256"),
    ("shared memory", lambda f: f.update(shared_bytes=240000), "shared memory: 240000 of"),
    ("unaccounted bytes", lambda f: f.update(shared_bytes=f["shared_bytes"] - 16), "accounted for"),
    ("tensor memory", lambda f: f.update(tmem_columns=1024), "tensor memory: 1024 of"),
    ("narrow tensor memory", lambda f: f.update(tmem_columns=256), "columns allocated"),
    ("bytes", lambda f: f["announced"].__setitem__(0, f["announced"][0] // 2), "bytes announced"),
    ("stage", lambda f: f["stage_bytes"].__setitem__(1, 16384), "bytes of a stage"),
    ("half of W", lambda f: f["coordinates"][1].__setitem__(1, f["coordinates"][0][1]), "coordinates of the loads"),
    ("no coordinates", lambda f: f.update(coordinates=[]), "coordinates of the loads"),
    ("register map", lambda f: f["load_map"]["1"].reverse(), "load_map: thread 1"),
    ("store map", lambda f: f["store_map"]["64"].reverse(), "store_map: thread 64"),
    ("no map", lambda f: f.update(load_map={}), "load_map was not traced"),
    ("scale place", lambda f: f["scale_bytes"].__setitem__(5, [*f["scale_bytes"][5][:2], 7]), "scale of row"),
    ("no scales", lambda f: f.update(scale_bytes=[]), "scale_bytes was not traced"),
    ("another chip", lambda f: f.update(arch="sm_120a"), "sm_120a was compiled"),
    ("refused", lambda f: f.update(refused="no"), "the compiler refused it: no"),
)


@pytest.mark.parametrize(("alter", "words"), [(a, w) for _, a, w in ALTERATIONS], ids=[name for name, _, _ in ALTERATIONS])
def test_an_altered_fact_is_rejected(
    alter: Callable[[dict[str, Any]], object], words: str, built: tuple[Path, Facts],
    judge: Callable[[dict[str, Any], str], list[str]],
) -> None:
    out, facts = built
    fact = next(fact for fact in facts if (fact["name"], fact["arch"]) == (WITH_LORA, "sm_100a"))
    ptx = (out / f"{WITH_LORA}.sm_100a.ptx").read_text(errors="replace")
    assert judge(fact, ptx) == []
    changed = copy.deepcopy(fact)
    alter(changed)
    assert any(words in sentence for sentence in judge(changed, ptx)), judge(changed, ptx)


def test_altered_barriers_are_rejected(
    built: tuple[Path, Facts], judge: Callable[[dict[str, Any], str], list[str]]
) -> None:
    out, facts = built
    fact = next(fact for fact in facts if (fact["name"], fact["arch"]) == (WITH_LORA, "sm_100a"))
    lines = (out / f"{WITH_LORA}.sm_100a.ptx").read_text(errors="replace").splitlines()
    first = next(i for i, line in enumerate(lines) if "mbarrier.init" in line)
    assert any("arrivals of the barriers" in text for text in judge(fact, "\n".join(lines[:first] + lines[first + 1 :])))


def test_nothing_compiled_is_no_pass(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text("[]")
    found = check(tmp_path / "facts.json")
    assert found.returncode == 1
    assert "nothing was compiled" in found.stderr
