"""The triton backend in Triton's CPU interpreter against NumPy: codecs, large cases, the ordinary cases, and planted faults.

Decides: that encodings and IEEE-defined recipes agree bit for bit on 10^6 values with every tie, that recipes with an approximate
step stay in the admissible set, that each fault is caught by a named lane, and that K is split where the declarations say.
Refuses: to stand in for a device.
Named check_ so that `pytest` does not collect it by itself: it needs triton and the interpreter, and runs in the session that
installs it:

    TRITON_INTERPRET=1 pytest tests/interpreter/check_interpreter.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parent))  # tests are imported without a folder of theirs on the path

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from bit_cases import CASES, TIES, codec_faults, division_faults, tie_faults
from ptx_text import executed

from lowbit.conformance.op import make_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.run import listed_cases
from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.verdict import PASSING, Status, Verdict
from lowbit.conformance.worker import Worker
from lowbit.kernels.triton import MODULES
from lowbit.kernels.triton_room import svdquant_quantize as svdquant
from lowbit.kernels.triton_room.division import reciprocal
from lowbit.kernels.triton_room.machine import INTERPRETER, MACHINES, Machine
from lowbit.references.formats import E2M1
from lowbit.references.interpret import segments
from lowbit.references.rounding import Overflow, Rounding, encode

HERE = Path(__file__).parent

OWN = ("nvfp4_quantize", "svdquant_quantize", "fp8_quantize", "int8_quantize", "int4_quantize", "int4_pack", "int4_repack",
       "scale_swizzle", "fp8_convert_fnuz", "fp8_requantize")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy says so where a float overflows, as kernels let it


@contextmanager
def opened(attribute: str) -> Iterator[Session]:
    """A worker whose backend is the interpreted one, honest or with a fault."""
    backend = f"python:{HERE / 'interpreted.py'}:{attribute}"
    with Worker(backend, timeout=120.0, path=()) as worker:
        session = Session(Plan(backend, timeout=120.0), worker)
        session.open()
        yield session


@pytest.fixture(scope="module")
def honest() -> Iterator[Session]:
    """One worker for all cases of the backend without a fault."""
    with opened("honest") as session:
        yield session


@pytest.fixture(scope="module")
def faulty() -> Iterator[Callable[[str], Session]]:
    """A worker per fault, kept for all its cases."""
    with ExitStack() as stack:
        yield cache(lambda mutant: stack.enter_context(opened(mutant)))


def verdicts(session: Session, case: str) -> list[Verdict]:
    listed = listed_of(case)
    return list(session.judge(listed, session.worker.supports([listed.case.problem])[0]))


def statuses(session: Session, case: str) -> list[tuple[Status, str]]:
    return [(verdict.status, f"{verdict.reason} {verdict.worst}") for verdict in verdicts(session, case)]


def test_codecs_are_the_references_on_a_million_values_and_every_tie() -> None:
    assert codec_faults("cpu", 1_000_000) == []


def test_short_divisions_are_ieee() -> None:
    assert division_faults("cpu", 1_000_000) == []


@pytest.mark.parametrize(("variant", "form"), TIES)
def test_codes_and_scales_at_every_tie_and_beside_it(variant: str, form: int) -> None:
    assert tie_faults("cpu", variant, form) == []


@triton.jit  # type: ignore[untyped-decorator]
def lesser_reciprocal(b, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """As little as `near_reciprocal` may give."""
    return reciprocal(b) * 0.9999995231628418  # 1 - 2^-21


@triton.jit  # type: ignore[untyped-decorator]
def greater_reciprocal(b, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """As much as `near_reciprocal` may give."""
    return reciprocal(b) * 1.000000476837158  # 1 + 2^-21


@pytest.mark.parametrize(("variant", "form"), [("nvfp4", 1), ("int4", 2)])
@pytest.mark.parametrize("near", [lesser_reciprocal, greater_reciprocal], ids=["lesser", "greater"])
def test_ties_do_not_depend_on_the_near_reciprocal(monkeypatch: pytest.MonkeyPatch, variant: str, form: int, near: Any) -> None:
    """A device approximates it; the bits of the outputs are those of any within 2^-21."""
    monkeypatch.setattr(svdquant, "near_reciprocal", near)
    assert tie_faults("cpu", variant, form) == []


@pytest.mark.parametrize("text", [svdquant.AWAY_80.value, svdquant.AWAY_86.value], ids=["sm_80", "sm_86"])
def test_the_ptx_of_e2m1_codes_is_the_reference(text: str) -> None:
    """In each of eight places every finite binary16 number, the binary32 numbers beside it, and larger ones."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    beside = (np.nextafter(numbers, np.float32(np.inf)), np.nextafter(numbers, np.float32(-np.inf)))
    y = np.concatenate([numbers, *beside, numbers * np.float32(2.0**100), numbers * np.float32(2.0**-20)])
    codes = encode(y.astype(np.float64) * 2.0**14, E2M1, Rounding.RNA, Overflow.SATFINITE).astype(np.uint32)
    columns = [np.roll(np.arange(y.size), 7919 * place) for place in range(8)]
    found = executed(text, [y[column].view(np.uint32) for column in columns])
    for place, column in enumerate(columns):
        assert ((found >> np.uint32(4 * place)) & 15 == codes[column]).all(), place


def test_the_ptx_of_int4_codes_packs_every_pair() -> None:
    numbers = np.arange(-7, 8, dtype=np.int64)
    first, second = (n.reshape(-1) for n in np.meshgrid(numbers, numbers))
    magic = 0x4B400008  # 1.5 * 2^23 + 8
    word = (((magic + second) * 16 + magic + first) % (1 << 32)).astype(np.uint32)
    places = [np.roll(np.arange(word.size), 31 * place) for place in range(4)]
    found = executed(svdquant.WHOLE.value, [word[place] for place in places])
    for byte, place in enumerate(places):
        assert ((found >> np.uint32(8 * byte)) & 255 == ((first[place] & 15) | (second[place] & 15) << 4)).all(), byte


@pytest.mark.parametrize("case", CASES)
def test_a_million_values(honest: Session, case: str) -> None:
    found = statuses(honest, case)
    assert found, case
    assert [entry for entry in found if entry[0] not in (Status.EXACT, Status.WITHIN)] == []
    if not case.startswith("svdquant"):  # lora_act is a bounded sum, everything else has its bits
        assert {status for status, _ in found} == {Status.EXACT}


@pytest.mark.parametrize("op", OWN)
def test_the_ordinary_cases(honest: Session, op: str) -> None:
    """Edges, refusals and a seeded choice of the drawn cases."""
    plan = Plan("", ops=(op,), per_op=12)
    listed = [item for item in listed_cases(plan) if item.lane != "tensors"]
    supports = honest.worker.supports([item.case.problem for item in listed])
    wrong = [
        (verdict.case, verdict.status, verdict.reason)
        for item, support in zip(listed, supports, strict=True) for verdict in honest.judge(item, support)
        if verdict.status not in PASSING
    ]
    assert wrong == []


def test_every_recipe_has_a_case_of_a_million_values() -> None:
    """No recipe of the contract that this backend computes is left to small cases."""
    recipes = {
        (name, token) for name in OWN for option in ops()[name].options if option.name == "recipe" for token in option.tokens
    }
    seen = set()
    for case in CASES:
        problem = listed_of(case).case.problem
        if "recipe" in dict(problem.options):
            seen.add((problem.op, problem.option("recipe")))
    assert recipes <= seen
    assert set(OWN) == {listed_of(case).case.problem.op for case in CASES} == set(OWN) & set(MODULES)


MUTANTS = (
    ("lora_of_smoothed", "quantiser", "svdquant_quantize/nvfp4/m17k128r16/bf16/normal/s1", "lora_act"),
    ("lora_of_smoothed", "quantiser", "svdquant_quantize/int4/m17k128r16/f16/normal/s1", "lora_act"),
    ("padding_not_written", "quantiser", "svdquant_quantize/nvfp4/m257k64r32/f16/normal/s0", "scales"),
    ("padding_not_written", "quantiser", "nvfp4_quantize/static/m90k48/bf16.swizzled/normal/s0", "scales"),
    ("padding_not_written", "quantiser", "fp8_quantize/token/m5k64p17/bf16.vllm_native/normal/s0", "q"),
    ("padding_not_written", "encoding", "scale_swizzle/tile128x4/m100g10/plain/normal/s1", "swizzled"),
    ("offsets_wrap", "quantiser", "svdquant_quantize/nvfp4/m257k128r16/bf16/normal/s1", ""),
    ("offsets_wrap", "quantiser", "nvfp4_quantize/none/m129k256/bf16.svdquant/normal/s1", ""),
    ("offsets_wrap", "quantiser", "fp8_quantize/token/m129k256p0/bf16/normal/s1", ""),
    ("offsets_wrap", "quantiser", "int8_quantize/token/m129k256/bf16/normal/s1", ""),
    ("offsets_wrap", "quantiser", "int4_quantize/sym/n129k256g128/bf16/normal/s1", ""),
    ("offsets_wrap", "encoding", "int4_pack/k_major/n129k256/plain/normal/s1", ""),
    ("offsets_wrap", "encoding", "fp8_requantize/max_scale/n129k256s3/fn/normal/s1", ""),
)
"""(fault, lane that catches it, a case of it, output in which it shows; empty: whichever)."""


@pytest.mark.parametrize(("mutant", "lane", "case", "output"), MUTANTS)
def test_a_fault_is_caught_by_its_lane(
    honest: Session, faulty: Callable[[str], Session], mutant: str, lane: str, case: str, output: str
) -> None:
    assert all(status in PASSING for status, _ in statuses(honest, case))
    found = verdicts(faulty(mutant), case)
    assert found
    for verdict in found:
        assert (verdict.status, verdict.lane) == (Status.DRIFT, lane), verdict
        assert output in f"{verdict.reason} {verdict.worst}", verdict


# Parts of K ----------------------------------------------------------------------------------------------------------

LENGTHS = (64, 256, 512, 1024, 1040, 2048, 2064, 2304, 3328, 3840, 4096, 4112, 5120, 7680, 10240, 15360)


def declared_parts(k: int, tactic: str, machine: Machine) -> list[tuple[int, int]]:
    """(first k, first k after it) of each part of K that a tactic declares, as the interpreter of declarations cuts them."""
    problem = make_problem(ops()["svdquant_quantize"], "nvfp4", {"m": 64, "k": k, "r": 16})
    main = svdquant.declaration(problem, tactic, machine).program[0]
    return [(slices[0].start, slices[-1].stop) for slices in segments(main, k)]  # type: ignore[arg-type]


def operands(k: int, splits: int, rows: int) -> dict[str, Any]:
    """x of zeros, smooth and lora_down of ones, and outputs."""
    ones = torch.ones((k, 16), dtype=torch.bfloat16).view(torch.int16)
    return {
        "x": torch.zeros((rows, k), dtype=torch.int16), "smooth": ones[:, 0].contiguous(),
        "inverse": svdquant.inverses(ones[:, 0].contiguous(), form=2),
        "down": ones, "q": torch.zeros((256, k // 2), dtype=torch.uint8),
        "scales": torch.zeros((k // 16, 256), dtype=torch.uint8), "act": torch.zeros((256, 16)),
        "parts": torch.zeros((splits, 256, 16)) if splits > 1 else None,
    }


def quantise(tensors: dict[str, Any], splits: int, *, native: bool = False) -> None:
    svdquant.svdquant_quantize(**tensors, variant="nvfp4", recipe="svdquant", form=2, native=native, splits=splits)


@pytest.mark.parametrize("machine", [INTERPRETER, *MACHINES.values()], ids=lambda machine: machine.name)
def test_launched_parts_of_k_are_the_declared_ones(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    names = svdquant.svdquant_kernel.arg_names

    def launch(*arguments: Any, **_: Any) -> None:
        launched.append(dict(zip(names, arguments, strict=False)))

    monkeypatch.setattr(svdquant, "svdquant_kernel", type("Recorded", (), {"__getitem__": lambda self, grid: launch})())
    seen = set()
    for k in LENGTHS:
        problem = make_problem(ops()["svdquant_quantize"], "nvfp4", {"m": 64, "k": k, "r": 16})
        for tactic in svdquant.tactics(problem, machine):
            splits = svdquant.SPLITS[tactic]
            quantise(operands(k, splits, 1), splits, native=machine.native)
            part = launched[-1]["part"]
            found = [(first, min(first + part, k)) for first in range(0, splits * part, part)]
            assert found == declared_parts(k, tactic, machine), (k, tactic)
            seen.add(tactic)
    assert seen == set(svdquant.SPLITS)


@pytest.mark.parametrize(("k", "tactic"), [(3840, "split8"), (2304, "split4"), (4096, "split8")])
def test_a_part_holds_the_products_of_its_k_and_no_others(k: int, tactic: str) -> None:
    """x is 1 at one k of a row, the first or the last of a part: the sum of that part is 1 and every other 0."""
    splits, bounds = svdquant.SPLITS[tactic], declared_parts(k, tactic, INTERPRETER)
    assert len(bounds) == splits
    edges = [(part, place) for part, (first, end) in enumerate(bounds) for place in (first, end - 1)]
    tensors = operands(k, splits, len(edges))
    for row, (_, place) in enumerate(edges):
        tensors["x"][row, place] = 0x3F80  # bf16 1
    quantise(tensors, splits)
    for row, (part, place) in enumerate(edges):
        assert tensors["parts"][:, row, 0].tolist() == [float(i == part) for i in range(splits)], (part, place)


def test_parts_that_are_not_whole_instructions_are_refused() -> None:
    for k, splits, offered in ((2064, 8, False), (1040, 4, False), (3840, 8, True)):
        problem = make_problem(ops()["svdquant_quantize"], "nvfp4", {"m": 64, "k": k, "r": 16})
        assert (f"split{splits}" in svdquant.tactics(problem, INTERPRETER)) is offered
    with pytest.raises(ValueError, match="got 8 splits of K = 2064"):
        quantise(operands(2064, 8, 1), 8)


@pytest.mark.parametrize("machine", [INTERPRETER, *MACHINES.values()], ids=lambda machine: machine.name)
def test_batch_invariance_is_declared_where_the_matrix_unit_multiplies(machine: Machine) -> None:
    """NumPy sums a row by itself in another order than among others."""
    problem = make_problem(ops()["svdquant_quantize"], "nvfp4", {"m": 64, "k": 3840, "r": 16})
    for tactic in svdquant.SPLITS:
        assert svdquant.declaration(problem, tactic, machine).batch_invariant is machine.native


def test_parts_beyond_2_to_the_31_elements_are_added() -> None:
    """Parts 2^30 elements apart, of bytes, as much memory before them as behind: a wrapped offset lands inside, on zeros. Pages
    that nobody touches cost nothing."""
    size, splits = 1 << 30, 4
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * size * splits, flags=flags), dtype=torch.uint8)
    parts = memory[size * splits :].as_strided((splits, 16), (size, 1))
    parts[:] = torch.tensor([1, 2, 4, 8], dtype=torch.uint8)[:, None]
    act = torch.zeros((1, 16), dtype=torch.uint8)
    svdquant.sum_of_parts_kernel[(1,)](parts, act, 16, size, 16, 16, SPLITS=splits, BLOCK=16)
    assert act.tolist() == [[15] * 16]


# Compiled ------------------------------------------------------------------------------------------------------------


def facts(capability: int, variant: str, fast: int) -> dict[str, int]:
    """What `compile_svdquant.py` counts in the PTX for a capability, 10 major + minor; Triton interprets or compiles, never both
    in one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_svdquant.py"), str(capability), variant, str(fast)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(answer.stdout)
    return found


LONGEST = {"nvfp4": 8 * 64, "int4": 11 * 64}
"""Instructions that the loop on sm_90 may have for 64 elements."""


@pytest.mark.parametrize("variant", ["nvfp4", "int4"])
@pytest.mark.parametrize("capability", [10 * major + minor for major, minor in MACHINES])
def test_the_compiled_kernel_keeps_every_rounding(capability: int, variant: str) -> None:
    """No subnormal is flushed but by the near reciprocal of a scale, products meet the matrix unit, on sm_90 that of the warp
    group, offsets have 64 bits. Without the fast tile every quotient is IEEE and nothing is contracted; with it the general ones
    are still there. On sm_90 its loop is short, and codes stay in the threads that loaded them."""
    general, fast = facts(capability, variant, 0), facts(capability, variant, 1)
    assert (general["approximate"], general["fma"], general["ftz"]) == (0, 0, 0)
    assert general["ieee"] > 0
    assert fast["fma"] > 0
    assert fast["ieee"] >= general["ieee"]
    assert fast["ftz"] == fast["approximate"] > 0
    for found in (general, fast):
        assert found["wgmma" if capability == 90 else "mma"] > 0
        assert found["mma" if capability == 90 else "wgmma"] == 0
        assert found["wide_offsets"] > 0
    if capability == 90:
        assert general["loop"] == 0
        assert 0 < fast["loop"] <= LONGEST[variant]
        assert fast["detours"] == 0
