"""The programs that judge cuda_hopper on a device, without one: their small forms run, and count what is planted.

hopper_encodings.py runs whole on the cpu backend; of hopper_must_pass.py the list is held against the contract, of
hopper_stability.py only that it says what is missing.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lowbit.conformance.op import parse_case
from lowbit.conformance.ops import ops
from lowbit.kernels import cpu, cuda_hopper
from lowbit.kernels.blackwell_room.device import Sight
from lowbit.kernels.hopper_room import gemm_w4a8, gemm_w4a8_f16

PROGRAMS = Path(__file__).parent / "device"
NAMES = ("hopper_encodings", "hopper_must_pass", "hopper_stability")


@pytest.fixture(name="programs", scope="module")
def _programs() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(PROGRAMS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(PROGRAMS))
        for name in NAMES:
            sys.modules.pop(name, None)


def judged(programs: dict[str, ModuleType], values: int = 16384) -> list[Any]:
    """Rows of the small form on the cpu backend, references in this process."""
    program = programs["hopper_encodings"]
    rows = []
    for problem, given, want in program.encoding_cases(values):
        rows += program.judged(cpu.backend(), "encodings", str(problem), problem, given, want)
    return rows


def test_the_small_form_runs_and_agrees(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, str(PROGRAMS / "hopper_encodings.py"), "--backend", "cpu", "--values", "16384", "--no-large",
               "--workers", "1", "--json", str(record)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(record.read_text(encoding="utf-8"))
    compared = {row["section"] for row in found["rows"]}
    assert compared == {"encodings", "quantisers"}
    assert sum(row["differing"] for row in found["rows"]) == 0
    named = " ".join(row["name"] for row in found["rows"])
    variants = {f"{name}/{variant}/" for name in ("int4_encode", "int4_pack", "scale_pack_e4m3", "scale_fold", "fp8_requantize",
                                                  "fp8_quantize") for variant in ops()[name].variants}
    assert {text for text in variants if text not in named} == set()
    assert "hard quotients" in named


@pytest.mark.parametrize(("op", "output"), [
    ("int4_encode", "encoded"), ("int4_pack", "packed"), ("scale_pack_e4m3", "packed"), ("scale_fold", "channel_scale"),
    ("fp8_requantize", "w_out"),
])
def test_a_planted_defect_is_counted(
    programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, op: str, output: str
) -> None:
    honest = cpu._BITWISE[op]

    def faulty(problem: Any, tensors: Any) -> Any:
        results = honest(problem, tensors)
        if output in results:
            changed = np.array(results[output])
            changed.reshape(-1)[-1] ^= 1
            results[output] = changed
        return results

    assert sum(row.differing for row in judged(programs)) == 0
    monkeypatch.setitem(cpu._BITWISE, op, faulty)
    wrong = [row for row in judged(programs) if row.differing]
    assert wrong
    assert all(row.differing == 1 and row.name.startswith(op) and row.first for row in wrong)


def test_hard_quotients_are_hard(programs: dict[str, ModuleType]) -> None:
    """The quotients lie within 2^-40 of half a unit beside a value of five significant bits, and the scale is found."""
    x = programs["hopper_encodings"].hard_quotients().view(np.float32)
    assert x.shape[0] > 500
    scale = x[:, :1] / np.float32(448)
    taken = x[:, 1:33:2]
    quotient = taken.astype(np.longdouble) / scale.astype(np.longdouble)
    mantissa, _ = np.frexp(quotient[taken > 0])
    distance = np.abs(mantissa * 2.0**25 - np.rint(mantissa * 2.0**25))  # in half units of the last place
    assert float(distance.max()) < 2.0**-14
    assert set((np.rint(mantissa * 2.0**25).astype(np.int64) % (1 << 20)).tolist()) == {1, (1 << 20) - 1}


def test_the_must_pass_list_is_of_the_contract(programs: dict[str, ModuleType]) -> None:
    cases = [parse_case(text, ops()) for text in programs["hopper_must_pass"].CASES]
    assert [str(case) for case in cases] == list(programs["hopper_must_pass"].CASES)
    assert {case.problem.op for case in cases} == set(cuda_hopper.modules())
    assert [str(case) for case in cases if cuda_hopper.modules()[case.problem.op].unsupported(case.problem)] == []


def test_the_must_pass_list_cuts_tiles_by_every_tactic_that_can(programs: dict[str, ModuleType]) -> None:
    """On 132 multiprocessors (H200) and on 114 (H100 with a PCIe connector)."""
    program = programs["hopper_must_pass"]
    for count in (132, 114):
        found: dict[str, set[str]] = {}
        for text, named in program.SHARED:
            case = parse_case(text, ops())
            assert str(case) == text
            cutting = program.sharing(case.problem, count)
            assert set(named) <= set(cutting), text
            found.setdefault(case.problem.variant, set()).update(named or cutting)
        dealt = {name for name, tactic in gemm_w4a8.TACTICS.items() if tactic.stream}
        exact = {name for name in dealt if gemm_w4a8.takes(name, "exact", 8, 1024, 64, False)}
        assert found == {"folded": dealt, "exact": exact | set(gemm_w4a8_f16.TACTICS)}


def test_the_must_pass_list_walks_from_tile_to_tile(programs: dict[str, ModuleType]) -> None:
    """More tiles than the 132 multiprocessors of an H200, by tactics that take the problem."""
    for text, named in programs["hopper_must_pass"].WALKS:
        problem = parse_case(text, ops()).problem
        assert str(parse_case(text, ops())) == text
        tactics = cuda_hopper.modules()[problem.op].tactics(problem)
        assert set(named) <= set(tactics)
        for tactic in named or tactics[:1]:
            height = re.match(r"(\d+)x|(?:fast|promoted|block)_m\d+n(\d+)", tactic)
            assert height, tactic
            width = int(height[1] or height[2]) * (2 if tactic.endswith("f16x2") else 1)
            assert -(-problem.dim("n") // width) > (66 if tactic.endswith("f16x2") else 132), tactic


@pytest.mark.parametrize("name", NAMES)
def test_without_a_device_a_program_says_so(
    programs: dict[str, ModuleType], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_hopper, "backend", lambda: cuda_hopper.CudaHopper(query=lambda: Sight(absence="no driver")))
    assert programs[name].main([]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: ")
