"""explain, reduce and bundles: a diagnosis is the planted fault, a reduction fails as it began, a bundle says what its run said.

Faulty outputs come from the cpu backend on operands that were changed here, so no diagnosis is found by the code that made it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.conformance import bundle as bundles
from lowbit.conformance.backend import TensorView
from lowbit.conformance.case import Case, Operands, Tensor
from lowbit.conformance.explain import explain, to_data, to_text
from lowbit.conformance.op import DomainError, Role, parse_case, parse_problem, tensors_of
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.reduce import reduce
from lowbit.conformance.report import ReportError
from lowbit.conformance.run import run_one
from lowbit.conformance.simulator import simulated_program
from lowbit.conformance.vectors import load
from lowbit.conformance.verdict import Execution, Status
from lowbit.conformance.worker import Ending, Outcome
from lowbit.kernels.cpu import backend as cpu_backend
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import EXACT_BITS, Declaration, Order
from lowbit.references.formats import BF16, Codes, container

CPU = cpu_backend()
FAULTY = '''
import numpy as np
from lowbit.kernels.cpu import Cpu


class Late(Cpu):
    """Wrong for the last 28 of K only."""
    __slots__ = ()

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        if self.lit(inputs)[100:].any():
            outputs["d"].memory[...] = 0
        return name

    def stage(self, problem, tactic, activations):
        staged = super().stage(problem, tactic, activations)
        return {**staged, "codes": activations["a"].memory}

    def lit(self, inputs):
        return (inputs.pop("codes") != 0).any(axis=0)


class Second(Cpu):
    """Two tactics, the second one wrong."""
    __slots__ = ()

    def tactics(self, problem):
        return ("plain", "split 2")

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        name = super().run(problem, "default", state, inputs, outputs, workspace, stream)
        if tactic == "split 2":
            outputs["d"].memory[0, 0] ^= 0x400
        return name


class Sometimes(Cpu):
    """Wrong in run 0, 2, 3, 5, 6, ... of all processes, by another bit in turn; `Once`: in run 0 alone."""
    __slots__ = ()
    wrong = staticmethod(lambda number: 0 if number % 3 == 1 else 0x200 << number % 3)

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        from pathlib import Path

        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        count = Path(__file__).with_suffix(".runs")
        number = len(count.read_text()) if count.exists() else 0
        count.write_text("x" * (number + 1))
        outputs["d"].memory[0, 0] ^= self.wrong(number)
        return name


class Once(Sometimes):
    __slots__ = ()
    wrong = staticmethod(lambda number: 0 if number else 0x400)


class Writer(Cpu):
    """Computes rightly and leaves its activations changed."""
    __slots__ = ()

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        memory = inputs.pop("given").memory
        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        memory[0, 0] ^= 1
        return name

    def stage(self, problem, tactic, activations):
        return {**super().stage(problem, tactic, activations), "given": activations["a"]}


class Mixed(Cpu):
    """Drifts from K = 192 on, raises below 128: a reduction may not end among the raising ones."""
    __slots__ = ()

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        if problem.dim("k") < 128:
            raise RuntimeError("short")
        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        if problem.dim("k") >= 192:
            outputs["d"].memory[...] ^= 0x400
        return name
'''


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[[str], str]:
    """Reference of a class of the module above."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    return lambda name: f"python:{tmp_path / 'faulty.py'}:{name}"


def call(case: Case, operands: Operands) -> dict[str, Codes]:
    """What the cpu backend makes of operands."""
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[case.problem.op], case.problem):
        memory: Codes = (
            np.zeros(spec.shape, container(spec.format)) if spec.role is Role.OUTPUT else operands[spec.name].codes.copy()
        )
        strides = tuple(step // memory.itemsize for step in memory.strides)
        views[spec.role][spec.name] = TensorView(spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, 0, memory)
    state = CPU.prepare(case.problem, "default", views[Role.CONSTANT])
    CPU.run(
        case.problem, "default", state, CPU.stage(case.problem, "default", views[Role.ACTIVATION]), views[Role.OUTPUT], None, None
    )
    return {name: view.memory for name, view in views[Role.OUTPUT].items()}


def stored(path: Path, text: str, changes: Mapping[str, Callable[[Codes], Codes]]) -> Path:
    """A bundle of a case whose outputs are those of changed operands, while it holds the right ones."""
    case = parse_case(text, ops())
    right = draw_operands(ops()[case.problem.op], case)
    spoiled = Operands(
        {
            name: Tensor(np.ascontiguousarray(changes[name](tensor.codes.copy())), tensor.format) if name in changes else tensor
            for name, tensor in right.items()
        }
    )
    outcome = Outcome(Ending.OK, outputs=call(case, spoiled), kernel="faulty")
    declared = CPU.declare(case.problem, "default")
    bundles._store(path, bundles.Bundle(case, 0, "faulty", "default", declared, right, outcome, Execution.EXECUTED))
    return path


def rolled(steps: int, axis: int) -> Callable[[Codes], Codes]:
    return lambda codes: np.roll(codes, steps, axis=axis)


def changed(place: Any, how: Callable[[Codes], Any]) -> Callable[[Codes], Codes]:
    def change(codes: Codes) -> Codes:
        codes[place] = how(codes[place])
        return codes

    return change


def swapped(codes: Codes) -> Codes:
    return codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)


def third_from_second(codes: Codes) -> Codes:
    codes[:, 2] = codes[:, 1]
    return codes


FAULTS: tuple[tuple[str, str, dict[str, Callable[[Codes], Codes]], str], ...] = (
    ("gemm_w8a8_fp8/scaled/m6n16k96/bf16.bias/normal/s1", "2,3", {"bias": np.zeros_like}, "the bias is missing"),
    (
        "gemm_w8a8_fp8/scaled/m6n16k96/bf16.bias/normal/s1",
        "2,3",
        {"token_scale": rolled(-1, 0)},
        "token_scale of the next row is used",
    ),
    (
        "gemm_w8a8_fp8/scaled/m6n16k96/f16/normal/s1",
        "2,3",
        {"channel_scale": rolled(1, 0)},
        "channel_scale of the previous column is used",
    ),
    (
        "gemm_w8a8_fp8/scaled/m6n16k96/f16/normal/s2",
        "5,15",
        {"a": changed((slice(None), slice(64, 96)), np.zeros_like)},
        "the terms k = 64..95 are missing",
    ),
    (
        "gemm_w8a8_fp8/scaled/m6n16k96/f16/normal/s2",
        "1,9",
        {"a": changed((slice(None), 17), np.zeros_like)},
        "the term k = 17 is missing",
    ),
    (
        "gemm_w4a8_fp8/exact/m6n16k128g64/f16/normal/s1",
        "3,3",
        {"w": swapped},
        "the two nibbles of every weight byte are exchanged",
    ),
    (
        "gemm_w4a8_fp8/folded/m6n16k128g64/f16/normal/s1",
        "3,3",
        {"group_scale": rolled(1, 1)},
        "group_scale of the previous group",
    ),
    (
        "gemm_w4a8_int8/direct/m6n16k96g32/f16/normal/s1",
        "4,7",
        {"w": changed((7, 40), lambda x: x ^ 8)},
        "weight k = 40 has bit 3 flipped",
    ),
    (
        "gemm_w4a8_int8/direct/m6n16k128g32/f16/normal/s1",
        "4,7",
        {"group_scale": third_from_second},
        "group 2 uses group_scale of group 1",
    ),
    ("gemm_nvfp4/svdquant/m6n16k64r16/bf16.lora/normal/s1", "0,0", {"lora_act": np.zeros_like}, "the low-rank term is missing"),
    (
        "gemm_int4/f32/m6n16k192r0/f16/normal/s1",
        "1,2",
        {"a_scale": rolled(-1, 1)},
        "a_scale of the next group is used for every group",
    ),
)


@pytest.mark.parametrize(
    ("text", "element", "changes", "sentence"), FAULTS, ids=[f"{fault[0].split('/')[0]}-{fault[3]}" for fault in FAULTS]
)
def test_diagnosis_is_the_planted_fault(
    tmp_path: Path, text: str, element: str, changes: dict[str, Callable[[Codes], Codes]], sentence: str
) -> None:
    """Among thousands of hypotheses the planted one gives the bits, here and in the wrong elements around."""
    found = explain(str(stored(tmp_path / "case.safetensors", text, changes)), element, "cpu")
    assert not found.inside
    assert any(sentence in told for told in found.diagnosis), found.diagnosis
    assert f"diverges:   {found.diagnosis[0]}" in to_text(found)
    assert to_data(found)["diagnosis"] == found.diagnosis


def test_right_elements_and_unknown_faults_are_not_explained_away(tmp_path: Path) -> None:
    """Inside: nothing diverges. Two faults at once: the list has no single one, and it says so."""
    text = "gemm_w8a8_fp8/scaled/m6n16k96/bf16.bias/normal/s1"
    right = explain(str(stored(tmp_path / "right.safetensors", text, {})), "2,3", "cpu")
    assert (right.inside, right.diagnosis) == (True, ())
    assert "diverges" not in to_text(right)
    twice: dict[str, Callable[[Codes], Codes]] = {
        "bias": np.zeros_like,
        "a": changed((slice(None), slice(0, 40)), lambda x: x ^ 0x81),
        "token_scale": rolled(2, 0),
    }
    both = explain(str(stored(tmp_path / "both.safetensors", text, twice)), "2,3", "cpu")
    assert not both.inside
    assert "diverges:   no single fault of the list gives these bits" in to_text(both)


@pytest.mark.parametrize(
    ("text", "element"),
    [
        ("int8_quantize/token/m4k32/bf16/normal/s1", "3,31"),
        ("gemm_w4a8_fp8_grouped/folded/e3m9n8k128g64/bf16/normal/s1", "8,7"),
        ("gemm_w8a8_fp8/scaled/m6n16k96/f16/special/s1", "3,0"),
        (str(load("gemm_w4a16")[0].case), "0,0"),
    ],
)
def test_every_kind_of_case_can_be_explained(text: str, element: str) -> None:
    """Quantisers, experts, special values and golden vectors: what was got, what was admissible, no crash."""
    found = explain(text, element, "cpu")
    assert found.inside
    assert found.got.startswith("0x")


# Bundles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bundle_says_what_the_run_said(tmp_path: Path, name: str) -> None:
    """One file per op: the replayed verdict is that of the run, to the digest, and the operands are those of the id."""
    text = ops()[name].edges[0]
    run = run_one(text, "cpu")[0]
    bundles.record(text, "cpu", "default", tmp_path / "case.safetensors")
    again = bundles.replay(tmp_path / "case.safetensors")
    assert run.status in (Status.EXACT, Status.WITHIN)
    for field in (
        "case",
        "backend",
        "tactic",
        "lane",
        "level",
        "status",
        "reason",
        "kernel",
        "operands",
        "wrong",
        "judged",
        "total",
        "sample",
        "products",
        "worst",
        "ulp_histogram",
        "power",
        "output_sha256",
    ):
        assert getattr(run, field) == getattr(again, field), field


def test_bundle_holds_the_batch_that_fails(tmp_path: Path, faulty: Callable[[str], str]) -> None:
    """A one-hot case of 16 batches whose last ones are wrong: the stored batch is one of those, not the first."""
    text = "gemm_w8a8_fp8/scaled/m8n8k128/bf16/onehot/s1"
    assert run_one(text, faulty("Late"))[0].status is Status.DRIFT
    bundle = bundles.record(text, faulty("Late"), "default", tmp_path / "late.safetensors")
    assert bundle is not None
    assert bundle.batch == 100 // 8
    assert bundles.load(tmp_path / "late.safetensors").batch == 12
    assert bundles.replay(tmp_path / "late.safetensors").status is Status.DRIFT


def test_bundle_of_the_command_is_of_the_tactic_that_fails(inside: Any, faulty: Callable[[str], str]) -> None:
    case = "gemm_w4a8_int8/direct/m4n8k64g32/f16/normal/s1"
    done = inside("run", case, "--backend", faulty("Second"), "--bundle", "b.safetensors")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if "on python:" in line] == ["EXACT", "DRIFT"]
    assert "a second run" not in done.stdout
    assert inside("replay", "b.safetensors").stdout.startswith(f"DRIFT {case}")
    assert bundles.load(Path("b.safetensors")).tactic == "split 2"


def test_bundle_of_a_kernel_that_does_not_repeat_its_bits_fails_too(inside: Any, faulty: Callable[[str], str]) -> None:
    """Run 0 is judged, run 1 is right and is not kept, run 2 fails by another bit."""
    case = "gemm_w4a8_int8/direct/m4n8k64g32/f16/normal/s1"
    done = inside("run", case, "--backend", faulty("Sometimes"), "--bundle", "b.safetensors")
    assert done.returncode == 1
    assert "of a second run, whose bits are not those judged above" in done.stdout
    assert Path(faulty("Sometimes").split(":")[1]).with_suffix(".runs").read_text() == "xxx"
    assert inside("replay", "b.safetensors").stdout.startswith(f"DRIFT {case}")


def test_a_failure_that_does_not_come_back_has_no_bundle(inside: Any, faulty: Callable[[str], str]) -> None:
    case = "gemm_w4a8_int8/direct/m4n8k64g32/f16/normal/s1"
    done = inside("run", case, "--backend", faulty("Once"), "--bundle", "b.safetensors", "--json", "run.json")
    assert done.returncode == 1
    assert done.stdout.startswith("DRIFT")
    assert f"no bundle: run again {bundles.ATTEMPTS} times the case passed" in done.stdout
    assert not Path("b.safetensors").exists()
    assert json.loads(Path("run.json").read_text())[0]["status"] == "DRIFT"


def test_bundle_remembers_what_was_done_to_memory(tmp_path: Path, faulty: Callable[[str], str]) -> None:
    """Right outputs beside a changed input: MALFORMED in the run and in the replay, with the same sentence."""
    text = "gemm_w4a8_int8/direct/m4n8k64g32/f16/normal/s1"
    run = run_one(text, faulty("Writer"))[0]
    assert (run.status, run.reason) == (Status.MALFORMED, "input 'a' was changed, first in byte 0")
    bundles.record(text, faulty("Writer"), "default", tmp_path / "w.safetensors")
    again = bundles.replay(tmp_path / "w.safetensors")
    assert (again.status, again.reason) == (run.status, run.reason)


@pytest.mark.parametrize("pattern", ["prop_rows", "stable"])
def test_cases_of_several_runs_have_no_bundle(pattern: str) -> None:
    with pytest.raises(DomainError, match="a bundle is one run"):
        bundles.bundled(f"gemm_w4a8_int8/direct/m4n8k64g32/f16/{pattern}/s1")


def test_declarations_survive_as_plain_data() -> None:
    """Every normative program on every datapath, with every field away from its default somewhere."""
    for text in (
        "gemm_w4a8_int8/direct/m3n8k160g32/f16.bias",
        "gemm_int4/half/m3n8k192r16/f16.lora.bias",
        "gemm_nvfp4/svdquant/m2n8k96r16/f16.lora",
    ):
        problem = parse_problem(text, ops())
        for path in DATAPATHS.values():
            program = simulated_program(ops()[problem.op], problem, path, splits=3, segment=64, conversion=BF16)
            first = replace(program[0], order=Order.UNKNOWN, reduction=BF16, running=BF16)  # type: ignore[arg-type]
            for declaration in (Declaration((first, *program[1:]), deterministic=False, batch_invariant=False), EXACT_BITS):
                assert bundles.declaration_from_data(bundles.declaration_to_data(declaration)) == declaration
    other = replace(DATAPATHS["ieee_f32"], name="acme")
    program = simulated_program(ops()["gemm_w4a8_int8"], parse_problem("gemm_w4a8_int8/direct/m3n8k160g32/f16", ops()), other)
    with pytest.raises(ReportError, match="datapath 'acme' is not one of lowbit's records"):
        bundles.declaration_to_data(Declaration(program))


# Reductions ----------------------------------------------------------------------------------------------------------


def test_reduction_keeps_the_way_in_which_the_case_fails(faulty: Callable[[str], str]) -> None:
    """Smaller cases raise; the smallest that drifts has K = 192. Every step fails with the status of the start."""
    steps: list[str] = []
    start = "gemm_w4a8_int8/direct/m16n64k512g32/f16.bias/normal/s3"
    found = reduce(start, faulty("Mixed"), on_step=steps.append)
    dims = Case.split(found.end)[2]
    assert (found.status, dims["k"], dims["m"], dims["n"]) == (Status.DRIFT, 192, 1, 8)
    assert all(step.startswith("still DRIFT: ") for step in steps)
    assert found.products_before == 16 * 64 * 512
    assert found.products_after == 8 * 192
    assert found.tries >= len(steps)
    assert run_one(found.end, faulty("Mixed"))[0].status is Status.DRIFT
    limited = reduce(start, faulty("Mixed"), limit=2)
    assert limited.tries == 2


def test_replay_says_where_the_outputs_came_from(tmp_path: Path) -> None:
    for backend, execution in (("cpu", "executed"), ("sim:hopper_wgmma_fp8", "emulated")):
        path = tmp_path / f"{execution}.safetensors"
        bundles.record("gemm_w4a8_fp8/folded/m2n8k128g128/bf16/normal/s1", backend, "default", path)
        assert bundles.replay(path).execution == execution
