"""The embedded model from end to end: quantised, swapped, asked through lm-eval, paired and judged (EVA-6).

`nox -s evals` runs this."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from lowbit.conformance import simulator
from lowbit.conformance.case import Problem, Tensor
from lowbit.conformance.evals import arms, models
from lowbit.conformance.evals.answers import Answers, EvalError, to_stderr
from lowbit.conformance.evals.arms import Arm, ReferenceArm
from lowbit.conformance.evals.asking import ask
from lowbit.conformance.evals.checkpoint import QuantisedLinear
from lowbit.conformance.evals.faults import FaultyArm
from lowbit.conformance.evals.paired import Outcome
from lowbit.conformance.evals.recorded import outside, read
from lowbit.conformance.evals.records import Eval, read_eval, summary
from lowbit.conformance.evals.runner import evaluate
from lowbit.conformance.evals.tasks import EMBEDDED, suite
from lowbit.references.declarations import Declaration
from lowbit.references.formats import Format

QUESTIONS, TEXTS = 16, 16
FAULTS = (  # the last: what the logits alone say; a factor of 1.001 in one layer is no larger than what batching does to them
    ("w4a16", "scale_group", "model.layers.3.self_attn.o_proj", Outcome.DRIFTS),
    ("w8a8-fp8", "alpha", "model.layers.1.mlp.down_proj", Outcome.INCONCLUSIVE),
    ("w4a16", "k_tail", "model.layers.1.mlp.down_proj", Outcome.DRIFTS),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, arm: Arm | str, recipe: str, *, localise: bool = False) -> Eval:
    found = evaluate("embedded", arm, out=folder, recipe=recipe, limit=QUESTIONS, texts=TEXTS, batch=16, localise=localise)
    print(summary(found))
    assert read_eval(folder / "eval.json") == found
    assert 'id="evals"' in (folder / "report.html").read_text(encoding="utf-8")
    return found


def unnoticed(found: Eval) -> bool:
    """Whether no task's accuracy tells the backend from the reference."""
    return all(task.kernel.outcome is not Outcome.DRIFTS and task.kernel.p_value > 0.05 for task in found.tasks)


@pytest.mark.parametrize(("recipe", "fault", "layer", "logits"), FAULTS)
def test_a_fault_drifts_where_accuracy_sees_nothing(
    recipe: str, fault: str, layer: str, logits: Outcome, tmp_path: Path
) -> None:
    found = run(tmp_path / "run", FaultyArm(ReferenceArm("f32", 1, True), fault, layer), recipe, localise=True)
    assert unnoticed(found)
    assert found.kernel.tokens.outcome is logits
    assert found.kernel.outcome is Outcome.DRIFTS
    assert found.kernel.first == layer
    assert [operation.layer for operation in found.kernel.operations if operation.outside] == [layer]
    assert found.kernel.bundle is not None
    again = read(Path(found.kernel.bundle))
    assert again.layer == layer
    assert outside(again) > 0
    assert found.serving.outcome == "refused"


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8-fp8"])
def test_another_summation_order_serves(recipe: str, tmp_path: Path) -> None:
    found = run(tmp_path / "run", ReferenceArm("three parts", 3, True), recipe)
    assert found.kernel.outcome is Outcome.SERVES
    assert found.kernel.first is None
    assert unnoticed(found)
    assert len(found.kernel.operations) == 28
    asked = {task.name: task for task in found.tasks}
    assert asked["embedded_gsm8k"].right["full"] >= QUESTIONS * 3 // 4  # a real signal: chance is near zero
    assert asked["embedded_choices"].right["full"] >= QUESTIONS * 3 // 4  # chance is a quarter


whole = arms._summed


def cut(*arguments: Any) -> torch.Tensor:
    """Sums of 13 significant bits, truncated."""
    fraction, exponent = torch.frexp(whole(*arguments))
    return torch.ldexp((fraction * 2.0**13).trunc(), exponent - 13)


class Coarse:
    """Honest sums of fewer bits, cut after the thirteenth, by an arm that declares a unit of that kind."""

    name = "coarse"

    def __init__(self) -> None:
        self.inner, self.unit = ReferenceArm("f32", 1, True), simulator.backend("hopper_wgmma_fp8")

    def declare(self, problem: Problem) -> Declaration:
        return self.unit.declare(problem, "")

    def prepare(self, linear: QuantisedLinear, out: Format, device: torch.device, bias: Tensor | None = None) -> Any:
        return self.inner.prepare(linear, out, device, bias)

    def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(arms, "_summed", cut):
            return self.inner.run(layer, x)


def test_a_unit_of_fewer_bits_that_says_so_is_not_accused(tmp_path: Path) -> None:
    """Its texts are further from the reference's than any order of binary32 sums takes them, and as far as its calls explain."""
    found = run(tmp_path / "run", Coarse(), "w8a8-fp8")
    assert found.kernel.outcome is Outcome.SERVES
    assert min(operation.differing for operation in found.kernel.operations) > 0.01
    assert not any(operation.outside for operation in found.kernel.operations)


def test_a_backend_serves_inside_the_model(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "cpu", "w4a8-fp8")
    assert found.kernel.outcome is Outcome.SERVES
    assert not any(operation.outside for operation in found.kernel.operations)
    assert sum(found.kernels.values()) > 0
    assert [text for text in found.missing if "--data" in text]  # what was not asked is said, in one sentence


def test_mmlu_pro_is_paired_like_any_task(tmp_path: Path) -> None:
    """Four made questions, asked of every arm with chains of thought: the pairing, not the accuracy, of which there is none."""
    place = tmp_path / "TIGER-Lab" / "MMLU-Pro"
    place.mkdir(parents=True)
    made = [
        {
            "question": f"What is {at} plus 0?", "options": [str(number) for number in range(10)], "answer": "ABCDEFGHIJ"[at],
            "category": "math", "cot_content": f"A: Let's think step by step. The answer is ({'ABCDEFGHIJ'[at]}).",
        }
        for at in range(4)
    ]
    for split in ("test", "validation"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    found = evaluate(
        "embedded", "torch_f32", out=tmp_path / "run", tasks=["mmlu_pro"], data=tmp_path, texts=4, batch=2, fewshot=1,
    )
    (task,) = found.tasks
    assert (task.name, task.questions, sorted(task.right)) == ("mmlu_pro", 4, ["backend", "floor", "full", "reference"])
    assert task.kernel.table.questions == 4
    assert task.texts is not None
    assert found.kernel.outcome is not Outcome.DRIFTS
    assert any(sentence.startswith("mmlu_pro: answers have at most 1024 tokens") for sentence in found.missing)
    given = (tmp_path / "run" / "answers" / "backend-mmlu_pro.jsonl").read_text(encoding="utf-8").splitlines()
    assert [type(json.loads(line)["value"]) for line in given] == [str] * 4


def test_missing_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"^gsm8k: .*test\.jsonl is missing; --data takes a folder in the hub's layout"):
        evaluate("embedded", "cpu", out=tmp_path / "run", tasks=["gsm8k"], data=tmp_path)


def test_held_out_problems_are_solved(tmp_path: Path) -> None:
    """lm-eval's gsm8k task on 100 held-out problems drawn at random: 80 % is what the model was shipped for."""
    given = models.load_full(EMBEDDED, torch.bfloat16, "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    model = HFLM(pretrained=given.model, tokenizer=tokenizer, batch_size=25, device="cpu")
    for name, least in (("embedded_gsm8k", 80), ("embedded_choices", 80)):
        kept = Answers(tmp_path / f"{name}.jsonl")
        asked = ask(suite(name, limit=100), "full", kept, lambda: model, batch=25, seed=1, told=to_stderr)
        assert sum(answer.right for answer in asked) >= least


RUN = """
import sys
from pathlib import Path
import torch
from lowbit.conformance.evals.answers import Answers, EvalError, to_stderr
from lowbit.conformance.evals.arms import ReferenceArm
from lowbit.conformance.evals.runner import evaluate
torch.set_num_threads(1)
evaluate("embedded", ReferenceArm("three parts", 3, True), out=Path(sys.argv[1]), recipe="w4a16", limit=8, texts=4, batch=2)
"""


@cache
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def answers(folder: Path) -> dict[str, list[str]]:
    return {path.relative_to(folder).as_posix(): path.read_text().splitlines() for path in sorted(folder.rglob("*.jsonl"))}


def lines(folder: Path) -> int:
    return sum(map(len, answers(folder).values()))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen([sys.executable, "-c", RUN, str(killed)], env=environment()) as process:
        while lines(killed) < 60 and process.poll() is None:  # into the second arm
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = answers(killed)
    assert not (killed / "eval.json").exists()
    subprocess.run([sys.executable, "-c", RUN, str(killed)], env=environment(), check=True)
    subprocess.run([sys.executable, "-c", RUN, str(whole)], env=environment(), check=True)
    after, wanted = answers(killed), answers(whole)
    for name, known in before.items():
        assert after[name][: len(known)] == known  # not asked again, not written again
    assert {name: [json.loads(line) for line in found] for name, found in after.items()} == {
        name: [json.loads(line) for line in found] for name, found in wanted.items()
    }
    first, second = (read_eval(folder / "eval.json") for folder in (killed, whole))
    assert (first.tasks, first.kernel) == (second.tasks, second.kernel)


# Level L4 through the command -----------------------------------------------------------------------------------------

DOOR = """
from dataclasses import replace

from lowbit.kernels.cpu import Cpu


class Door(Cpu):
    def prepare(self, problem, tactic, constants):
        given = dict(constants)
        if {faulty} and (problem.op, problem.dim("n"), problem.dim("k")) == ("gemm_w4a16", 256, 768):
            scale = given["scale"].memory.copy()
            scale[:, -1] = scale[:, -2]
            given["scale"] = replace(given["scale"], memory=scale, pointer=scale.ctypes.data)
        return super().prepare(problem, tactic, given)


backend = Door("door")
"""
"""The cpu backend; faulty, it takes the last scale group of one shape, that of down_proj, from the group before it."""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    lowbit = Path(sysconfig.get_path("scripts")) / "lowbit"
    one = {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    return subprocess.run(
        [lowbit, *arguments], cwd=folder, env={**environment(), **one}, capture_output=True, text=True, check=False,
    )


@pytest.mark.parametrize("faulty", [False, True], ids=["honest", "faulty"])
def test_level_4_is_granted_to_an_honest_backend_only(faulty: bool, tmp_path: Path) -> None:
    """Both are granted L3: no drawn case has the shape that the faulty one gets wrong. A margin of 2 points takes 189 questions
    without a difference, at 95 %."""
    (tmp_path / "door.py").write_text(DOOR.format(faulty=faulty), encoding="utf-8")
    reference = f"python:{tmp_path / 'door.py'}:backend"
    given = ("--ops", "gemm_w4a16", "--out", "certificate")
    certified = command(tmp_path, "certify", reference, "--level", "L3", *given)
    assert certified.returncode == 0, certified.stderr
    assert "level L3 granted" in certified.stdout
    sizes = ("--tasks", "embedded_choices", "--limit", "190", "--texts", "16", "--certificate", "certificate/report.json")
    found = command(tmp_path, "eval", "embedded", "--backend", reference, *sizes, "--out", "run")
    assert found.returncode == int(faulty), found.stderr
    kept = read_eval(tmp_path / "run" / "eval.json")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    digest = json.loads((tmp_path / "certificate" / "report.json").read_text(encoding="utf-8"))["digest"]
    assert kept.serving.certificate == digest
    if not faulty:
        said = "L4 serves: granted: SERVES on embedded_choices (190 questions, margin 2 points), token by token ("
        assert said in found.stdout
        assert kept.serving.outcome == "granted"
        assert "in 28 of 28 replaced Linears; executed" in kept.serving.reasons[0]
        assert "L4 serves: granted" in page
        return
    assert kept.serving.reasons == ("the kernel level is DRIFTS",)
    assert kept.kernel.first == "model.layers.0.mlp.down_proj"
    assert {operation.layer for operation in kept.kernel.operations if operation.outside} == {
        f"model.layers.{number}.mlp.down_proj" for number in range(4)
    }
    assert "L4 serves: refused: the kernel level is DRIFTS" in found.stdout
    assert "L4 serves: refused" in page
