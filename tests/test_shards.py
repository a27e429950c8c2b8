"""A run in several processes: the report of one process, what a caller hears of it, and how all of them end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.conformance.exit_codes import ExitCode
from lowbit.conformance.report import Report, ReportError
from lowbit.conformance.run import Plan, certify
from lowbit.conformance.shards import ShardError, certify_side_by_side
from lowbit.conformance.verdict import Verdict
from lowbit.conformance.worker import WorkerError

PLAN = Plan("cpu", level=1, ops=("scale_fold", "int4_repack"), per_op=2)
LOWBIT = Path(sysconfig.get_path("scripts")) / "lowbit"
ODD = '''
import os, pathlib, signal, time

class Killer:
    """Ends the process that judges it."""
    name, target = "killer", "cpu"
    def supports(self, problem):
        return None
    def declare(self, problem, tactic):
        os.kill(os.getppid(), signal.SIGKILL)
    def run(self, problem, tactic, state, inputs, outputs, workspace, stream):
        return "none"

class Sleeper(Killer):
    """Says that it was asked, and never answers."""
    name = "sleeper"
    def declare(self, problem, tactic):
        pathlib.Path(__file__).with_name(f"asked-{os.getpid()}").touch()
        time.sleep(600)

class Counting(Killer):
    """Writes down how many threads its process may take, and supports nothing."""
    name = "counting"
    def supports(self, problem):
        path = pathlib.Path(__file__).with_name(f"threads-{os.getpid()}")
        path.write_text(" ".join(os.environ[name] for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")))
        return "it counts"
'''


def essence(found: Report) -> Counter[tuple[str, str, str, str, str]]:
    return Counter((v.case, v.tactic, str(v.status), v.operands, v.output_sha256) for v in found.verdicts)


@pytest.fixture(name="whole", scope="module")
def _whole() -> Report:
    return certify(PLAN)


def test_the_report_is_that_of_one_process(whole: Report) -> None:
    heard: list[str] = []

    def start(total: int, name: str, marks: Mapping[str, object]) -> None:
        assert not heard, "verdicts come after the start"
        assert (total, name) == (len(whole.manifest.cases), "cpu")
        assert (marks["shard"], marks["jobs"]) == ([1, 1], 2)

    found = certify_side_by_side(PLAN, 2, on_start=start, on_verdict=lambda verdict: heard.append(verdict.case))
    assert essence(found) == essence(whole)
    assert Counter(heard) == Counter(verdict.case for verdict in whole.verdicts)
    assert (found.levels, found.totals, found.manifest) == (whole.levels, whole.totals, whole.manifest)
    assert found.coverage == whole.coverage
    assert found.run.shard == (1, 1)


def test_each_process_goes_on_from_its_own_verdicts(whole: Report) -> None:
    """The last case of each shard is judged again: it may lack a tactic."""
    first: list[Verdict] = []
    certify_side_by_side(PLAN, 2, on_verdict=first.append)
    again: list[str] = []
    found = certify_side_by_side(PLAN, 2, done=first, on_verdict=lambda verdict: again.append(verdict.case))
    assert essence(found) == essence(whole)
    assert len(set(again)) == 2
    other = replace(first[0], operands="0" * 64)
    with pytest.raises(ReportError, match="is of other operands"):
        certify_side_by_side(PLAN, 2, done=[other, *first[1:]])


def test_what_a_process_raises_is_raised(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="unknown backend 'absent'"):
        certify_side_by_side(replace(PLAN, backend="absent"), 2)
    file = tmp_path / "odd.py"
    file.write_text(ODD, encoding="utf-8")
    with pytest.raises(ShardError, match=r"shard [12]/2 ended without a report; --resume goes on"):
        certify_side_by_side(replace(PLAN, backend=f"python:{file}:Killer"), 2)
    with pytest.raises(ValueError, match=r"got shard 1/2 and 2 jobs"):
        certify_side_by_side(replace(PLAN, shard=(1, 2)), 2)


def descendants(process: int) -> set[int]:
    """Every process below one, by the table of the kernel."""
    try:
        tasks = [(task / "children").read_text() for task in Path(f"/proc/{process}/task").iterdir()]
    except OSError:
        return set()
    listed = [int(word) for text in tasks for word in text.split()]
    return set(listed).union(*(descendants(each) for each in listed))


def alive(processes: set[int]) -> set[int]:
    return {each for each in processes if Path(f"/proc/{each}/stat").exists()
            and Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] != "Z"}


def ended(processes: set[int]) -> bool:
    deadline = time.monotonic() + 20
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(processes)


def started(folder: Path, *words: str) -> Any:
    command = [str(LOWBIT), "certify", *words, "--level", "L1", "--jobs", "2", "--out", "out"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def test_no_process_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    """Not even one that waits for its backend."""
    (tmp_path / "odd.py").write_text(ODD, encoding="utf-8")
    process = started(tmp_path, "python:odd.py:Sleeper", "--ops", "scale_fold")
    while len(list(tmp_path.glob("asked-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    below = descendants(process.pid)
    assert len(below) >= 4, "two processes and their workers"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert ended(below)


def test_an_interrupted_command_ends_and_keeps_what_was_reached(tmp_path: Path) -> None:
    process, partial = started(tmp_path, "cpu", "--ops", "gemm_w4a8_int8"), tmp_path / "out" / "verdicts.jsonl"
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait() == ExitCode.INTERRUPTED
    assert ended(below)
    words = ("certify", "cpu", "--ops", "gemm_w4a8_int8", "--level", "L1", "--out", "out", "--resume")
    refused = subprocess.run([str(LOWBIT), *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == ExitCode.BAD_INPUT
    assert "of another run: it differs in jobs" in " ".join(refused.stderr.split())
    assert partial.exists(), "what was reached stays"


def test_the_command_writes_one_report(tmp_path: Path) -> None:
    words = ("certify", "cpu", "--ops", "scale_fold", "--per-op", "1", "--level", "L1", "--out", "out")
    answer = subprocess.run([str(LOWBIT), *words, "--jobs", "2"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.html", "junit.xml"}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["run"]["shard"] == [1, 1]
    both = subprocess.run(
        [str(LOWBIT), *words, "--jobs", "2", "--shard", "1/2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert both.returncode == ExitCode.USAGE
    assert "expected one of the two" in both.stderr


def test_each_process_takes_its_share_of_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set stays, and the caller's own variables are as before."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (tmp_path / "odd.py").write_text(ODD)
    before = dict(os.environ)
    certify_side_by_side(replace(PLAN, backend=f"python:{tmp_path / 'odd.py'}:Counting"), 2)
    assert dict(os.environ) == before
    assert {path.read_text() for path in tmp_path.glob("threads-*")} == {"6 7"}
