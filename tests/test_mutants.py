"""The gallery: every mutant is a change that shows, every lane sees one that no other sees, and silence is never certified.

The whole gallery takes minutes and runs as `nox -s mutants`; here each mutant is run once beside its control, and each lane is
judged on the case by which it alone kills.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance import run
from lowbit.conformance.backend import BackendError, TensorView
from lowbit.conformance.gallery.alteration import Altered, load
from lowbit.conformance.gallery.backends import MUTANTS
from lowbit.conformance.gallery.published import RULES, accepts
from lowbit.conformance.gallery.variants import VARIANTS
from lowbit.conformance.mutants import Gallery, Kill, Trial, judge_gallery, sound, to_data, to_text
from lowbit.conformance.op import DomainError, Role, parse_case, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.selection import Listed
from lowbit.conformance.verdict import PASSING, Status, Verdict
from lowbit.conformance.worker import Worker
from lowbit.references.formats import UINT8

ROOM = "lowbit.kernels"
Bytes = npt.NDArray[np.uint8]


# Every mutant changes what happens -----------------------------------------------------------------------------------


def loaded(altered: Altered, *, healed: bool = False) -> Any:
    """The backend from modules of its own; those of this process are put back."""
    kept = {name: module for name, module in sys.modules.items() if name == ROOM or name.startswith(f"{ROOM}.")}
    finders = list(sys.meta_path)
    for name in kept:
        del sys.modules[name]
    try:
        return load(altered, healed=healed)
    finally:
        for name in [name for name in sys.modules if name == ROOM or name.startswith(f"{ROOM}.")]:
            del sys.modules[name]
        sys.modules.update(kept)
        sys.meta_path[:] = finders


CONTROL = loaded(MUTANTS[0], healed=True)


@cache
def cases(op: str) -> tuple[Listed, ...]:
    """The ordinary list, golden vectors first: they are small and see most faults."""
    plan = run.Plan("", ops=(op,))
    return tuple(sorted(run.listed_cases(plan), key=lambda item: (item.lane != "golden", item.lane != "reject")))


def views(item: Listed) -> tuple[dict[Role, dict[str, TensorView]], list[npt.NDArray[Any]]]:
    """Tensors of a case by role, and all memory behind them. Rows of outputs are padded and eight rows follow the last."""
    op = ops()[item.case.problem.op]
    operands = run.operands_of(op, item.case)
    found: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    memory: list[npt.NDArray[Any]] = []
    for tensor in tensors_of(op, item.case.problem):
        if tensor.role is Role.OUTPUT:
            dtype = operands_dtype(tensor.format.bits)
            padded = (tensor.shape[0] + 8, *tensor.shape[1:-1], tensor.shape[-1] + 3) if len(tensor.shape) > 1 else tensor.shape
            whole = np.full(padded, np.iinfo(dtype).max // 3, dtype=dtype)
            array = whole[tuple(slice(size) for size in tensor.shape)]
        else:
            whole = array = operands[tensor.name].codes.copy()
        memory.append(whole)
        strides = tuple(step // array.itemsize for step in array.strides)
        found[tensor.role][tensor.name] = TensorView(
            tensor.name, tensor.format, tensor.shape, strides, tensor.role, tensor.layout, array.ctypes.data, array
        )
    return found, memory


def operands_dtype(bits: int) -> type[np.unsignedinteger[Any]]:
    """The container of a format: the smallest unsigned integer that holds it."""
    return next(dtype for dtype in (np.uint8, np.uint16, np.uint32) if np.iinfo(dtype).bits >= bits)


def trace(backend: Any, item: Listed) -> bytes:
    """Everything that two calls leave behind: whether the problem is taken, and all memory of its tensors."""
    problem = item.case.problem
    if item.lane in ("reject", "property") or backend.supports(problem) is not None:
        return str(backend.supports(problem) is None).encode()
    size = backend.workspace(problem, "default") if hasattr(backend, "workspace") else 0
    left: list[bytes] = []
    for _ in range(2):
        by_role, memory = views(item)
        scratch = np.full(size, 0x5A, dtype=np.uint8)
        workspace = TensorView("workspace", UINT8, (size,), (1,), Role.OUTPUT, "", scratch.ctypes.data, scratch)
        state: Any = by_role[Role.CONSTANT]
        inputs: Any = {**by_role[Role.ACTIVATION], **by_role[Role.INOUT]}
        if hasattr(backend, "prepare"):
            state, inputs = backend.prepare(problem, "default", state), backend.stage(problem, "default", inputs)
        backend.run(problem, "default", state, inputs, by_role[Role.OUTPUT], workspace, None)
        left += [array.tobytes() for array in memory]
    return b"|".join(left)


@pytest.mark.parametrize("altered", MUTANTS, ids=lambda altered: altered.name)
def test_a_mutant_differs_from_its_control(altered: Altered) -> None:
    faulty, control = loaded(altered), loaded(altered, healed=True)
    listed = [item for op in altered.ops for item in cases(op)]
    assert any(trace(faulty, item) != trace(control, item) for item in listed)


def test_a_control_does_not_differ_from_itself() -> None:
    """Otherwise the test above would prove nothing."""
    first, second = (loaded(MUTANTS[0], healed=True) for _ in range(2))
    items = [item for op in ("gemm_w8a8_fp8", "int4_pack", "nvfp4_quantize") for item in cases(op)[:40]]
    assert all(trace(first, item) == trace(second, item) for item in items)


def test_an_edit_whose_text_is_gone_is_an_error() -> None:
    gone = Altered("gone", ("int4_pack",), "", "", (("cpu_room.encodings", "no such text", ""),))
    with pytest.raises(BackendError, match="stands 0 times"):
        loaded(gone)


def test_an_edit_that_comes_too_late_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{ROOM}.cpu_room.gemm", sys)
    with pytest.raises(BackendError, match="imported already"):
        load(MUTANTS[0])


def test_the_lists_are_consistent() -> None:
    names = [item.name for item in (*MUTANTS, *VARIANTS)]
    assert len(names) == len(set(names))
    assert len(MUTANTS) >= 40
    assert len(VARIANTS) >= 12
    for item in (*MUTANTS, *VARIANTS):
        assert set(item.ops) <= set(ops()), item.name
        assert item.guards, item.name
        assert item.what, item.name
        assert not item.reached_by or parse_case(item.reached_by, ops()).problem.op in item.ops, item.name
    assert {op for item in MUTANTS for op in item.ops} == set(ops())


# Every lane sees what no other sees ----------------------------------------------------------------------------------

ALONE = {
    "audit": ("twenty_five_bits_declared_thirteen", "gemm_w4a8_fp8/folded/m64n128k1024g128/bf16/audit_cut/s1"),
    "bounded": ("zero_weights_skipped", "gemm_w8a8_fp8/scaled/m10n112k896/f16.fnuz.atensor.bias/special/s28"),
    "encoding": ("fold_by_reciprocal", "scale_fold/row/n26k16384/vllm/special/s0"),
    "exact": ("narrow_unit_ties_away", "gemm_w4a8_fp8/folded/m1n16k960g64/bf16.bias/exactw8/s1"),
    "golden": ("reciprocal_of_six", "nvfp4_quantize/none/m1k16/f32.svdquant/golden/s127"),
    "onehot": ("lowest_code_saturates", "gemm_w4a8_fp8/folded/m64n64k1536g64/bf16.bias/onehot/s5"),
    "property": ("rows_depend_on_m", "gemm_w4a8_fp8/folded/m3n32k640g128/bf16/prop_rows/s4"),
    "quantiser": ("quantiser_index_wraps", "fp8_quantize/token/m252k320p1/f32.fnuz/extremes/s88"),
    "reject": ("domain_not_checked", "gemm_nvfp4/plain/m4n64k48r0/bf16/reject/s0"),
    "scale": ("scale_stage_late", "gemm_w4a8_fp8/folded/m257n64k1536g128/f16.bias/scaleprobe/s149"),
    "stability": ("rows_taken_as_contiguous", "gemm_w4a16/zp/m128n112k1280g16/f16.biasafter/stable/s1"),
}
"""Lane -> a mutant that it alone kills, and a case that does."""


def test_every_lane_has_a_mutant_of_its_own() -> None:
    lanes = {item.lane for op in ops() for item in cases(op)} | {"stability"}
    assert set(ALONE) == lanes


def judged_by(reference: str, item: Listed) -> list[Verdict]:
    """What is said of a backend on one case."""
    with Worker(reference) as worker:
        session = run.Session(run.Plan(reference, level=3, repeats=8), worker)
        session.open()
        return list(session.judge(item, worker.supports([item.case.problem])[0]))


@pytest.mark.parametrize("lane", ALONE)
def test_a_lane_kills_a_mutant_and_not_its_control(lane: str) -> None:
    name, text = ALONE[lane]
    listed = run.listed_cases(run.Plan("", level=3, ops=(text.partition("/")[0],)))
    item = next((item for item in listed if str(item.case) == text), None) or run.listed_of(text)
    assert item.lane == lane
    assert {verdict.status for verdict in judged_by(f"mutant:{name}", item)} <= {Status.DRIFT, Status.MALFORMED}
    assert all(verdict.status in PASSING for verdict in judged_by(f"mutant:{name},healed", item))


# What may not be certified -------------------------------------------------------------------------------------------

ZERO = """
from lowbit.conformance.backend import find_backend

CPU = find_backend("cpu")


class Zero:
    name, target = "zero", "cpu"
    supports, declare = CPU.supports, CPU.declare

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        for view in outputs.values():
            view.memory[...] = 0
        return "memset"


backend = Zero()
"""


def test_an_all_zero_output_reaches_no_level(tmp_path: Path) -> None:
    path = tmp_path / "zero.py"
    path.write_text(ZERO, encoding="utf-8")
    report = run.certify(run.Plan(f"python:{path}:backend", level=2, ops=("gemm_nvfp4",)))
    assert report.level_granted == 0  # it loads
    for verdict in report.verdicts:
        if verdict.lane in ("bounded", "exact", "onehot", "scale") and verdict.status in PASSING:
            op, case = ops()["gemm_nvfp4"], run.listed_of(verdict.case).case
            expected = op.expect(case, run.operands_of(op, case), CONTROL.declare(case.problem, "default"))["d"]
            assert expected.exact is not None
            assert not np.nan_to_num(expected.exact).any(), verdict.case


def test_thirteen_bits_in_unknown_order_do_not_reach_l2() -> None:
    """Honest, and too loose to be told from silence on some cases; one shape of the fingerprint is refused, so nothing finer is
    known of it."""
    report = run.certify(run.Plan("mutant:lowest_code_saturates,healed", level=2, ops=("gemm_w4a8_fp8",)))
    assert report.level_granted == 0
    others = {verdict.status for verdict in report.verdicts if verdict.status not in PASSING}
    assert others == {Status.UNTRUSTED, Status.UNSUPPORTED}


# Published rules and the report --------------------------------------------------------------------------------------


def verdicts(got: list[float], want: list[float]) -> set[str]:
    """Rules that accept."""
    return {rule.name for rule in RULES if accepts(rule, np.array(got), np.array(want))}


def test_published_rules_by_hand() -> None:
    everything = {rule.name for rule in RULES}
    assert verdicts([1.0, -2.0], [1.0, -2.0]) == everything
    assert "vllm-fp8" in verdicts([1.625], [1.0])  # 0.15 + 0.5
    assert "vllm-fp8" not in verdicts([1.6875], [1.0])
    assert not {"sqnr-40", "vllm-nvfp4"} & verdicts([10.0, 7.5], [10.0, 10.0])  # 200 / 6.25 = 15.05 dB
    assert "sqnr-16" not in verdicts([10.0, 7.5], [10.0, 10.0])
    assert "sqnr-16" in verdicts([10.0, 8.0], [10.0, 10.0])  # 200 / 4 = 16.99 dB
    assert "cosine-.97" in verdicts([3.0, 4.0], [6.0, 8.0])  # blind to a factor of two
    assert "deepgemm-fp4" not in verdicts([3.0, 4.0], [6.0, 8.0])  # 1 - 2 * 50 / 125
    assert "te-nvfp4" in verdicts([0.0], [float("nan")])
    assert "vllm-nvfp4" not in verdicts([0.0], [float("nan")])
    assert "aiter" in verdicts([2.0, *[1.0] * 19], [1.0] * 20)
    assert "aiter" not in verdicts([2.0, 2.0, *[1.0] * 18], [1.0] * 20)


def sample(*, complete: bool = False, second: tuple[str, ...] = ("golden", "encoding"), accused: tuple[str, ...] = ()) -> Gallery:
    """Two mutants and a variant over two lanes."""
    lanes = ("encoding", "golden")
    names = ("nibbles_exchanged", "awq_order_inverted")
    trials = [
        Trial(name, True, lanes, {lane: Kill("case", Status.DRIFT, "") for lane in killers})
        for name, killers in zip(names, (("encoding",), second), strict=True)
    ]
    trials.append(Trial("control", False, lanes, statuses={"EXACT": 7, "UNTRUSTED": 2}, accused=accused))
    return Gallery("cpu", tuple(trials), complete, 1.0)


def test_the_figures_add_up() -> None:
    data = to_data(sample())
    assert (data["mutants"], data["killed"], data["variants"], data["false_alarms"]) == (2, 2, 1, 0)
    assert data["lanes"] == {"encoding": {"kills": 2, "sole": ["nibbles_exchanged"]}, "golden": {"kills": 1, "sole": []}}
    assert data["killed_by"] == {"nibbles_exchanged": ["encoding"], "awq_order_inverted": ["golden", "encoding"]}
    assert data["untrusted"] == {"control": 2}
    assert "2 of 2 mutants killed, 0 of 1 variants accused, 1 of 2 lanes kill nothing alone" in to_text(sample())


@pytest.mark.parametrize(("gallery", "expected"), [
    (sample(), True),
    (sample(second=()), False),
    (sample(accused=("DRIFT",)), False),
    (sample(complete=True), False),
], ids=["killed", "survivor", "accused", "too small"])
def test_sound(gallery: Gallery, expected: bool) -> None:
    assert sound(gallery) is expected


def test_judge_gallery() -> None:
    judged = judge_gallery("cpu", ("nibbles_exchanged", "approximate_reciprocal"), processes=1)
    assert {"encoding", "golden"} <= set(judged.mutants[0].kills)
    assert judged.variants[0].statuses == {"EXACT": len(run.listed_cases(run.Plan("", level=3, ops=("nvfp4_quantize",))))}
    assert sound(judged)


@pytest.mark.parametrize(("backend", "only"), [("sim", ()), ("cpu", ("no_such_mutant",))])
def test_what_the_gallery_does_not_have(backend: str, only: tuple[str, ...]) -> None:
    with pytest.raises(DomainError):
        judge_gallery(backend, only)
