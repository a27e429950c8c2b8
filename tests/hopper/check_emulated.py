"""The Hopper kernels on an emulated machine: every instance gives the declared bits under every timing tried, and planted defects
show.

Decides: that the matrix unit of the machine is that of the records; that every tactic of both products, the quantisers and the
encodings equal what the suite expects, bit for bit, on machines that execute handed-over work early or late, run threads in
different orders and have few multiprocessors, so that blocks take several tiles, or several blocks one tile; and that every
defect of mutants.py is caught where it is said to be. Refuses: to say anything about time, or about what the head
of emulated.py lists as not modelled.
Named check_ so that `pytest` does not collect it by itself: it needs g++ and CUDA's headers, and runs in `nox -s hopper`:

    pytest tests/hopper/check_emulated.py
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.conformance.case import Case
from lowbit.conformance.op import parse_case, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.run import Plan, certify
from lowbit.conformance.session import expectations_of, operands_of
from lowbit.conformance.verdict import PASSING, judge_outputs
from lowbit.conformance.worker import Ending, Worker
from lowbit.kernels.hopper_room import gemm_w4a8, gemm_w4a8_f16, gemm_w8a8
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.dot import Operand, emulate
from lowbit.references.formats import BF16, E4M3FN, E5M2, F16, Codes, Format, container

FOLDER = Path(__file__).parent / "emulator"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
emulated: Any = import_module("emulated")
door: Any = import_module("door")
MUTANTS: Any = import_module("mutants").MUTANTS
REFERENCE = f"python:{FOLDER / 'door.py'}:backend"

MACHINES = (  # copies, products, seed, multiprocessors, whether activations come from work ahead on the stream
    ("early", "late", 1, 2, False), ("early", "late", 3, 3, True), ("late", "early", 2, 4, False), ("late", "early", 4, 2, True),
    ("early", "early", 8, 3, False), ("early", "early", 9, 4, False), ("either", "either", 5, 5, True),
)


def run_of(tactic: str, machine: tuple[str, str, int, int, bool], changed: str = "") -> Any:
    *settings, ahead = machine
    return door.Run(tactic, emulated.Settings(*settings), ahead, changed)


# The matrix unit ----------------------------------------------------------------------------------------------------------

UNITS: tuple[tuple[int, Format, int, Format, str], ...] = (
    (0, E4M3FN, 0, E4M3FN, "hopper_wgmma_fp8"), (1, E5M2, 1, E5M2, "hopper_wgmma_fp8"), (0, E4M3FN, 1, E5M2, "hopper_wgmma_fp8"),
    (2, F16, 2, F16, "hopper_f16"), (3, BF16, 3, BF16, "hopper_bf16"),
)


def drawn(rng: np.random.Generator, rows: int, k: int, form: Format, kind: str) -> Codes:
    """Codes [rows, k]: all of them, those below the highest exponent, few that are not zero, or tiny ones."""
    codes: npt.NDArray[np.int64] = rng.integers(0, 1 << form.bits, (rows, k), dtype=np.int64)
    top = ((1 << form.exponent_bits) - 1) << (form.precision - 1)
    if kind != "all":
        codes = np.where((codes & top) == top, codes & ~(1 << (form.bits - 2)), codes)
    if kind == "sparse":
        codes[rng.random(codes.shape) < 0.9] = 0
    if kind == "tiny":
        codes &= 1 << (form.bits - 1) | ((1 << form.precision) - 1)
    made: Codes = codes.astype(container(form))
    return made


@pytest.mark.parametrize(("left", "a_format", "right", "w_format", "path"), UNITS, ids=lambda value: str(value))
def test_products_are_those_of_the_record(left: int, a_format: Format, right: int, w_format: Format, path: str) -> None:
    rng = np.random.default_rng(left * 8 + right)
    k, chain, machine = DATAPATHS[path].instruction_k, 4, emulated.machine()
    for kind in ("all", "finite", "sparse", "tiny"):
        for n in (8, 96):
            a, w = drawn(rng, 64, k * chain, a_format, kind), drawn(rng, n, k * chain, w_format, kind)
            got = np.zeros((64, n), dtype=np.float32)
            for step in range(chain):
                parts = [np.ascontiguousarray(codes[:, step * k : (step + 1) * k]) for codes in (a, w)]
                places = [ctypes.c_void_p(array.ctypes.data) for array in (*parts, got)]
                machine.emulator_multiply(left, right, n, *places, int(step > 0))
            want = emulate(Operand(a, a_format), Operand(w, w_format), DATAPATHS[path])
            assert np.array_equal(got.view(np.uint32), want), (kind, n)


# The kernels, judged ------------------------------------------------------------------------------------------------------


@pytest.fixture(name="spread", scope="module")
def _spread() -> Iterator[Callable[..., list[Any]]]:
    """`spread(job, items)`: job(worker, item) for every item, on as many workers as there are processors, at most four."""
    count = max(1, min(4, os.cpu_count() or 1))
    workers = [Worker(REFERENCE, timeout=120.0) for _ in range(count)]
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def spread(job: Callable[[Worker, Any], Any], items: Iterable[Any]) -> list[Any]:
        def one(item: Any) -> Any:
            worker = free.get()
            try:
                return job(worker, item)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, items))

    yield spread
    for worker in workers:
        worker.close()


def said(worker: Worker, case: Case, run: Any, known: dict[Any, Any]) -> str:
    """What a run of a case shows: nothing, "bits", or what went wrong. `known`: expectations by case and tactic."""
    op, declared = ops()[case.problem.op], door.backend.declare(case.problem, run.text)
    key = (case, str(declared))
    if key not in known:
        operands = operands_of(op, case)
        known[key] = operands, expectations_of(op, case, operands, declared)
    operands, expected = known[key]
    outcome = worker.execute(case.problem, run.text, operands, tensors_of(op, case.problem))
    if outcome.status is not Ending.OK or outcome.findings:
        return outcome.reason or "; ".join(outcome.findings)
    found = judge_outputs(expected, outcome.outputs, outcome.untouched)
    assert found.pointed
    assert found.judged == sum(codes.size for codes in outcome.outputs.values())
    return f"bits: {found.wrong} of {found.judged} differ" if found.wrong else ""


def wrong(spread: Callable[..., list[Any]], jobs: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Case and run -> what was wrong, for the jobs that were."""
    known: dict[Any, Any] = {}
    found = spread(lambda worker, job: said(worker, parse_case(job[0], ops()), job[1], known), jobs)
    return {f"{case} {run.text}": text for (case, run), text in zip(jobs, found, strict=True) if text}


ROWS = {16: 40, 32: 72, 64: 100, 128: 140, 256: 300}
"""Tokens of a tile -> M: more than one tile, the last one not full."""
DEALT = (("early", "late", 3, 10, True), ("late", "early", 4, 7, True), ("either", "either", 5, 5, False))
"""As MACHINES. On the first two every tactic cuts tiles; on the last, workers of two blocks have whole ones."""


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("variant", ["folded", "exact"])
def test_w4a8(spread: Callable[..., list[Any]], variant: str, group: int) -> None:
    jobs = []
    for name, tactic in gemm_w4a8.TACTICS.items():
        m = ROWS.get(tactic.tokens, 0)
        if tactic.stream or not gemm_w4a8.takes(name, variant, m, 1280, group, False):
            continue
        start = f"gemm_w4a8_fp8/{variant}"
        case = f"{start}/m{m}n200k1280g{group}/f16.bias/normal/s1"
        jobs += [(case, run_of(name, machine)) for machine in MACHINES]
        jobs.append((case, run_of(name, MACHINES[0], "two_stages")))
        if tactic.parts == 1:
            odd = {64: 1216, 128: 1152}[group]  # an odd number of blocks of 128, the last of them half empty with groups of 64
            jobs += [(f"{start}/m17n72k{odd}g{group}/bf16/special/s2", run_of(name, machine)) for machine in MACHINES[1:3]]
            jobs.append((f"{start}/m1n8k{group}g{group}/bf16/normal/s3", run_of(name, MACHINES[0])))
    assert len(jobs) >= 8 * 7
    assert wrong(spread, jobs) == {}


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("variant", ["folded", "exact"])
def test_w4a8_with_k_dealt_out(spread: Callable[..., list[Any]], variant: str, group: int) -> None:
    """Through the backend's own door: its scratch memory, its declaration, which says where the machine cuts K."""
    jobs: list[tuple[str, Any]] = []
    tiles = {name: (tactic.tokens, tactic.bands, tactic.stream) for name, tactic in gemm_w4a8.TACTICS.items() if tactic.stream}
    tiles |= {name: (tactic.tokens, 4, tactic.cluster) for name, tactic in gemm_w4a8_f16.TACTICS.items()}
    for name, (tokens, bands, cluster) in tiles.items():
        m, n = tokens - 3 if name in gemm_w4a8_f16.TACTICS else tokens + 9, 328  # of these f16 takes no more than one tile
        if not gemm_w4a8.takes(name, variant, m, 1280, group, False):
            continue
        count = -(-m // tokens) * -(-n // (64 * bands * cluster))
        for machine in DEALT[:2]:  # a worker has four blocks of 128 k or more: at most two have a tile of 1280
            assert count % min(machine[3] // cluster, 2 * count), "no tile is cut"
        start = f"gemm_w4a8_fp8/{variant}/m{m}n{n}"
        odd = {64: 1216, 128: 1152}[group]
        jobs += [(f"{start}k1280g{group}/f16.bias/{pattern}/s1", run_of(name, machine)) for pattern, machine in
                 zip(("normal", "cancel"), DEALT[:2], strict=True)]
        jobs += [(f"{start}k{odd}g{group}/bf16/{pattern}/s2", run_of(name, DEALT[2])) for pattern in ("exactw14", "special")]
    assert len(jobs) >= 4 * 11
    assert wrong(spread, jobs) == {}


@pytest.mark.parametrize(("variant", "group"), [("folded", 64), ("folded", 128), ("exact", 128)])
def test_w4a8_grouped(spread: Callable[..., list[Any]], variant: str, group: int) -> None:
    case = f"gemm_w4a8_fp8_grouped/{variant}/e5m90n72k1280g{group}/bf16.bias/normal/s4"
    counts = operands_of(ops()["gemm_w4a8_fp8_grouped"], parse_case(case, ops()))["counts"].codes
    assert 0 in counts
    assert np.count_nonzero(counts) > 1
    names = [name for name in gemm_w4a8.TACTICS if gemm_w4a8.takes(name, variant, 90, 1280, group, True)]
    assert wrong(spread, [(case, run_of(name, machine)) for name in names for machine in MACHINES[1:4]]) == {}


@pytest.mark.parametrize("kind", ["fast", "promoted", "block"])
def test_w8a8(spread: Callable[..., list[Any]], kind: str) -> None:
    variant = "block" if kind == "block" else "scaled"
    jobs = []
    for tile in gemm_w8a8.TILES[kind]:
        name = f"{kind}_{tile}"
        m = 5 if tile.startswith(("m8n", "m32n")) else 140
        k = 640 if kind == "block" else 1040
        jobs += [(f"gemm_w8a8_fp8/{variant}/m{m}n392k{k}/bf16.bias/normal/s1", run_of(name, machine)) for machine in MACHINES]
        more = ("f16.biasafter", "f32") if kind == "block" else ("f16.biasafter", "f32.atensor.wtensor")
        jobs += [
            (f"gemm_w8a8_fp8/{variant}/m{m}n392k{256 if kind == 'block' else 400}/{options}/special/s2", run_of(name, machine))
            for options, machine in zip(more, MACHINES[1:3], strict=True)
        ]
    assert wrong(spread, jobs) == {}


def test_quantisers_and_encodings() -> None:
    """The suite's own loop over the ordinary cases, golden vectors and properties of every op."""
    names = ("fp8_quantize", "int4_encode", "int4_pack", "scale_pack_e4m3", "scale_fold", "fp8_convert_fnuz", "fp8_requantize")
    report = certify(Plan(REFERENCE, level=2, ops=names, per_op=4, timeout=120.0))
    assert {verdict.status for verdict in report.verdicts} <= set(PASSING)
    assert {verdict.case.split("/")[0] for verdict in report.verdicts} == set(names)
    assert len(report.verdicts) > 400


def test_packing_takes_words_and_bytes() -> None:
    """Both forms of the weights, and codes that are value + 8, give the same packed bytes."""
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 16, (2, 72, 192), dtype=np.uint8)
    scales = torch.from_numpy(rng.integers(0, 256, (2, 72, 3), dtype=np.uint8))
    shifts = np.arange(8, dtype=np.uint32) * 4
    words = (codes.reshape(2, 72, 24, 8).astype(np.uint32) << shifts).sum(axis=3, dtype=np.uint32)
    emulated.settings("early", "early", 1, 3)
    with emulated.installed():
        one = gemm_w4a8.pack_weights(torch.from_numpy(codes), scales)
        two = gemm_w4a8.pack_weights(torch.from_numpy(words.view(np.int32)), scales)
        three = gemm_w4a8.pack_weights(torch.from_numpy((words ^ 0x88888888).view(np.int32)), scales, flip=True)
    assert torch.equal(one.memory, two.memory)
    assert torch.equal(one.memory, three.memory)


# Planted defects ----------------------------------------------------------------------------------------------------------


def test_every_planted_defect_is_caught(spread: Callable[..., list[Any]]) -> None:
    known: dict[Any, Any] = {}

    def caught(worker: Worker, name: str) -> str:
        mutant = MUTANTS[name]
        run = door.Run.of(mutant.run, emulated.Settings())
        text = said(worker, parse_case(mutant.case, ops()), door.Run(run.tactic, run.settings, run.ahead, name), known)
        honest = said(worker, parse_case(mutant.case, ops()), run, known)
        return f"without the defect: {honest}" if honest else "" if re.search(mutant.shows, text) else f"shows {text!r}"

    found = dict(zip(MUTANTS, spread(caught, MUTANTS), strict=True))
    assert {name: text for name, text in found.items() if text} == {}
    assert len(found) >= 30
