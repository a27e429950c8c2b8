"""The rocm kernels in Triton's CPU interpreter: every case of docs/w8a8_utils.md, the shapes of W4A16, and planted faults.

Decides: that each documented case is run for both chips and passes; that K is split where the declarations say; that known faults
are caught. Refuses: to stand in for a GPU.
Named check_ so that `pytest` does not collect it by itself: it needs triton, and runs in `nox -s rocm`:

    pytest tests/rocm/check_kernels.py
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the workers, too

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.op import make_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.verdict import Execution, Status
from lowbit.conformance.worker import Worker
from lowbit.kernels.rocm_room import skinny_fp8
from lowbit.kernels.rocm_room.devices import CHIPS, emulated
from lowbit.kernels.triton_room.machine import Machine
from lowbit.references.interpret import segments

HERE = Path(__file__).parent


def beside(name: str) -> ModuleType:
    """A module of this folder: pytest does not put it on the path."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


LINEAR: dict[str, Any] = beside("linear_cases").CASES
DOCUMENTED = sorted({row.case for row in beside("documented").rows()})
PASSING = (Status.EXACT, Status.WITHIN)


@contextmanager
def opened(folder: Path, argument: str) -> Iterator[Session]:
    """A worker whose backend is rocm with that argument."""
    file = folder / "door.py"
    file.write_text(f"from lowbit.kernels.rocm import backend as made\nbackend = made({argument!r})\n", encoding="utf-8")
    name = f"python:{file}:backend"
    with Worker(name, timeout=120.0, path=()) as worker:
        session = Session(Plan(name, timeout=120.0), worker)
        session.open()
        yield session


def judged(session: Session, case: str) -> dict[str, Status]:
    """Status by tactic."""
    listed = listed_of(case)
    verdicts = list(session.judge(listed, session.worker.supports([listed.case.problem])[0]))
    assert {verdict.execution for verdict in verdicts} == {Execution.EMULATED}
    return {verdict.tactic: verdict.status for verdict in verdicts}


@pytest.fixture(scope="module")
def gfx942(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with opened(tmp_path_factory.mktemp("gfx942"), "gfx942") as found:
        yield found


@pytest.fixture(scope="module")
def gfx950(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with opened(tmp_path_factory.mktemp("gfx950"), "gfx950") as found:
        yield found


@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("case", [case for case in DOCUMENTED if case.partition("/")[0] not in ("linear", "dispatch")])
def test_a_documented_case_passes(gfx942: Session, gfx950: Session, case: str, chip: str) -> None:
    found = judged({"gfx942": gfx942, "gfx950": gfx950}[chip], case)
    assert found
    assert set(found.values()) <= set(PASSING), found
    skinny, own = "/m1n" in case or "/m4n" in case, ".fnuz" in case  # the documented ids with few rows are of gfx942's e4m3
    assert ("skinny" in found) is (case.startswith("gemm_w8a8_fp8/") and skinny and own is CHIPS[chip].machine.fnuz), found


@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("case", sorted(LINEAR))
def test_a_layer_gives_its_exact_results(case: str, chip: str) -> None:
    with np.errstate(all="ignore"):  # the interpreter computes by NumPy, which warns of infinities
        LINEAR[case](emulated(chip))


def test_every_documented_layer_is_a_case_and_every_case_documented() -> None:
    assert {case for case in DOCUMENTED if case.startswith("linear/")} == set(LINEAR)


FN = (
    "gemm_w8a8_fp8/scaled/m1n264k4096/bf16.fn.atensor.wtensor.bias/lognormal/s1",
    "gemm_w8a8_fp8/scaled/m4n72k1040/f16.fn.atensor.wtensor/exactw14/s2",
    "fp8_quantize/token/m5k64p17/bf16.vllm_native/normal/s0",
)


@pytest.mark.parametrize("case", FN)
def test_gfx950_has_the_other_e4m3(gfx950: Session, case: str) -> None:
    found = judged(gfx950, case)
    assert set(found.values()) <= set(PASSING), found
    assert ("skinny" in found) is case.startswith("gemm")


def test_the_skinny_product_is_of_the_chips_own_e4m3(gfx942: Session, gfx950: Session) -> None:
    fnuz = FN[1].replace(".fn.", ".fnuz.")
    found = ["skinny" in judged(session, case) for session in (gfx942, gfx950) for case in (FN[1], fnuz)]
    assert found == [False, True, True, False]


def parts(k: int, machine: Machine) -> tuple[list[tuple[int, int]], int]:
    """(first k and first k after it of each part that the skinny product declares, parts that are launched)."""
    options = {"out": "bf16", "format": "fnuz" if machine.fnuz else "fn", "act_scale": "atensor", "weight_scale": "wtensor"}
    problem = make_problem(ops()["gemm_w8a8_fp8"], "scaled", {"m": 1, "n": 8, "k": k}, options)
    assert skinny_fp8.takes(problem, machine)
    main = skinny_fp8.declaration(problem, machine).program[0]
    found = [(slices[0].start, slices[-1].stop) for slices in segments(main, k)]  # type: ignore[arg-type]
    return found, skinny_fp8.splits_of(8, k, machine)


MACHINES = [machine for chip in CHIPS for machine in (CHIPS[chip].machine, emulated(chip))]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_launched_parts_of_k_are_the_declared_ones(machine: Machine) -> None:
    counts = set()
    for k in (16, 512, 1024, 1040, 1056, 1088, 2048, 2064, 3072, 3840, 4096, 4112, 4608, 5120, 14336):
        declared, splits = parts(k, machine)
        part = skinny_fp8.part_of(k, splits)
        assert [(first, min(first + part, k)) for first in range(0, splits * part, part)] == declared, k
        counts.add(splits)
    assert {1, 2, 8} <= counts


@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("k", [1024, 1088, 3840, 4096])
def test_a_part_holds_the_products_of_its_k_and_no_others(k: int, chip: str) -> None:
    """Row i of A is 1 at the first k of a part, row i + 1 at the last: the sum of that part is 1 and every other 0."""
    machine = emulated(chip)
    declared, splits = parts(k, machine)
    one = 0x40 if machine.fnuz else 0x38
    for part, bounds in enumerate(declared):
        a, w = torch.zeros((2, k), dtype=torch.uint8), torch.full((8, k), one, dtype=torch.uint8)
        a[0, bounds[0]] = a[1, bounds[1] - 1] = one
        sums, scale = torch.zeros((splits, 2, 8)), torch.ones(1)
        skinny_fp8.launch(a, w, scale, scale, None, torch.zeros((2, 8), dtype=torch.int32), sums, out="f32", bias="nobias",
                          machine=machine)
        assert sums[:, :, 0].tolist() == [[float(i == part)] * 2 for i in range(splits)]


def test_parts_that_are_not_whole_instructions_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 parts of K = 1040; expected K a multiple of 64"):
        skinny_fp8.part_of(1040, 2)


# Shapes and groups with which vLLM tests triton_w4a16, the kernel of MI300; `nox -s interpreter` has all of them.
W4A16 = tuple(
    f"gemm_w4a16/{variant}/m{m}n{n}k{k}g{g}/{out}/normal/s1" for variant, m, k, n, g, out in (
        ("sym", 1, 256, 256, 32, "f16"), ("sym", 17, 256, 512, 32, "bf16"), ("sym", 32, 512, 256, 64, "f16"),
        ("sym", 33, 512, 512, 128, "bf16"), ("zp", 64, 512, 512, 64, "f16"),
    )
)


@pytest.mark.parametrize("case", W4A16)
def test_the_shapes_of_w4a16_pass(gfx942: Session, case: str) -> None:
    found = judged(gfx942, case)
    assert found
    assert set(found.values()) <= set(PASSING), found


FAULTS = {
    "bias_dropped_at_m1": ("gemm_w8a8_fp8/scaled/m1n72k512/bf16.fnuz.atensor.wtensor.bias/normal/s1", ("fast", "skinny")),
    "last_part_lost": ("gemm_w8a8_fp8/scaled/m2n72k2048/f16.fnuz.atensor.wtensor/normal/s1", ("skinny",)),
    "tail_skipped": ("gemm_w8a8_fp8/scaled/m5n72k144/bf16.fnuz/normal/s1", ("fast",)),
    "padding_not_written": ("fp8_quantize/token/m5k64p17/bf16.fnuz.vllm_native/normal/s0", ("default",)),
    "one_scale_per_tile": ("gemm_w4a16/sym/m5n64k256g32/f16/scaleprobe/s1", ("whole",)),
    "zero_offset": ("gemm_w4a16/zp/m5n64k256g32/f16/normal/s1", ("whole",)),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_known_fault_is_caught(fault: str, tmp_path: Path) -> None:
    case, tactics = FAULTS[fault]
    with opened(tmp_path, f"gfx942,mutant={fault}") as session:
        found = judged(session, case)
    assert {found[tactic] for tactic in tactics} == {Status.DRIFT}, found
