"""The cases as pytest items, in a pytest of its own: the same cases and verdicts as `lowbit certify`, one item each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.conformance.run import Plan, listed_cases

Command = Callable[..., subprocess.CompletedProcess[str]]
FAULTY = '''
from lowbit.kernels.cpu import Cpu


class Faulty(Cpu):
    """Codes of rows past the seventh are one too large; nothing of static scales."""
    __slots__ = ()

    def supports(self, problem):
        return "no static scales yet" if problem.variant == "static" else super().supports(problem)

    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        name = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        outputs["q"].memory[7:] ^= 1
        return name
'''


def items(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pytest --pyargs lowbit.conformance -p lowbit.conformance.plugin ...` in a folder without a configuration."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "--pyargs",
        "lowbit.conformance",
        "-p",
        "lowbit.conformance.plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "-q",
        "-rs",
        "--rootdir",
        str(folder),
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_items_are_the_cases_of_certify(tmp_path: Path) -> None:
    """Collected ids are the case ids of the plan, in its order."""
    done = items(
        tmp_path,
        "--collect-only",
        "--backend",
        "cpu",
        "--lowbit-ops",
        "int8_quantize,gemm_w4a8_int8",
        "--per-op",
        "1",
        "--level",
        "L3",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = re.findall(r"test_contract\.py::test_case\[(.+)\]", done.stdout)
    plan = Plan("cpu", 3, ("int8_quantize", "gemm_w4a8_int8"), per_op=1)
    assert collected == [str(item.case) for item in listed_cases(plan)]


def test_passing_backend_passes_every_item(tmp_path: Path) -> None:
    done = items(tmp_path, "--backend", "cpu", "--lowbit-ops", "scale_fold", "--per-op", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = len(listed_cases(Plan("cpu", 2, ("scale_fold",), per_op=1)))
    assert re.search(rf"^{expected} passed", done.stdout, re.MULTILINE)


def test_failures_print_their_repro_line_and_unsupported_keeps_its_reason(inside: Command, tmp_path: Path) -> None:
    """The line of a failed item fails by the command too; refusals are counted with the backend's own words."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    done = items(
        tmp_path, "--backend", "python:faulty.py:Faulty", "--lowbit-ops", "fp8_quantize", "--per-op", "1", "--level", "L1"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed, passed, skipped = (
        int(found[1])
        for what in ("failed", "passed", "skipped")
        for found in [re.search(rf"(\d+) {what}", done.stdout.splitlines()[-1])]
        if found is not None
    )
    listed = listed_cases(Plan("cpu", 1, ("fp8_quantize",), per_op=1))
    assert failed + passed + skipped == len(listed)
    assert skipped == sum(item.case.problem.variant == "static" for item in listed)
    assert "no static scales yet" in done.stdout
    line = re.search(r"lowbit run '([^']+)' --backend python:faulty.py:Faulty", done.stdout)
    assert line is not None
    again = inside("run", line[1], "--backend", "python:faulty.py:Faulty")
    assert (again.returncode, again.stdout.split()[0]) == (1, "DRIFT")
    assert inside("run", line[1], "--backend", "cpu").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--backend", "nosuch"), "unknown backend 'nosuch'"),
        (("--lowbit-ops", "nosuch"), "unknown op nosuch"),
        (("--level", "L7"), "invalid choice: 'L7'"),
    ],
)
def test_wrong_options_are_said_once(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    """Before any case runs, as pytest's own usage error."""
    done = items(tmp_path, "--per-op", "1", *arguments)
    told = done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, told
    assert told.count(sentence) == 1, told
    assert "Traceback" not in told


def test_without_the_plugin_the_suite_says_how_to_load_it(tmp_path: Path) -> None:
    """`--pyargs lowbit.conformance` alone: one sentence with the command that works, no fixture error."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "--pyargs",
        "lowbit.conformance",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "pytest --pyargs lowbit.conformance -p lowbit.conformance.plugin --backend NAME" in done.stdout + done.stderr
