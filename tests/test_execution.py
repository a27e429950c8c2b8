"""Where a backend's arithmetic happens: what it may say, what a report then says, and which backends `--target` takes (BCK-5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.conformance import cli, report
from lowbit.conformance.backend import NOT_EXECUTED, BackendError, execution_of
from lowbit.conformance.bundle import record, replay
from lowbit.conformance.exit_codes import ExitCode
from lowbit.conformance.html import page
from lowbit.conformance.run import Plan, certify, run_one
from lowbit.conformance.verdict import PASSING, Execution, Status

CASE = "gemm_w4a8_int8/direct/m3n8k64g32/f16.nobias/normal/s1"


def backend_file(tmp_path: Path, execution: str, reason: str = "None") -> str:
    """The cpu backend under another word for where it runs."""
    path = tmp_path / "said.py"
    path.write_text(
        "from lowbit.kernels.cpu import Cpu\n\n\n"
        "class Said(Cpu):\n"
        f"    execution = {execution!r}\n\n"
        "    def supports(self, problem):\n"
        f"        return {reason} or Cpu.supports(self, problem)\n\n\n"
        'backend = Said("said", "nowhere")\n',
        encoding="utf-8",
    )
    return f"python:{path}:backend"


class Fake:
    """What `--target` looks at."""

    def __init__(self, target: str, execution: str | Exception) -> None:
        self.name, self.target, self._execution = "fake", target, execution

    @property
    def execution(self) -> str:
        if isinstance(self._execution, Exception):
            raise self._execution
        return self._execution


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers fake backends, by name, in the place of all others."""
    def register(**backends: Fake) -> None:
        def find(name: str) -> Any:
            if name not in backends:
                raise BackendError(f"{name} does not load")
            return backends[name]

        monkeypatch.setattr(cli, "backend_names", lambda: (*backends, "broken"))
        monkeypatch.setattr(cli, "find_backend", find)
    return register


def test_a_backend_that_says_nothing_executes() -> None:
    assert execution_of(object()) == "executed"


def test_another_word_is_refused() -> None:
    with pytest.raises(BackendError, match=r"'fake' says execution 'simulated'; expected one of executed, emulated, compiled"):
        execution_of(Fake("t", "simulated"))


@pytest.mark.parametrize("word", ["executed", "emulated"])
def test_a_verdict_bears_the_word_of_its_backend(tmp_path: Path, word: str) -> None:
    verdict, *_ = run_one(CASE, backend_file(tmp_path, word))
    assert (verdict.status in PASSING, verdict.execution) == (True, Execution(word))


def test_a_replayed_bundle_bears_it_too(tmp_path: Path) -> None:
    record(CASE, backend_file(tmp_path, "emulated"), "default", tmp_path / "b.safetensors")
    assert replay(tmp_path / "b.safetensors").execution is Execution.EMULATED


@pytest.mark.parametrize(("reason", "said"), [
    ("None", NOT_EXECUTED), ('"not mine"', NOT_EXECUTED),
    (f'"{NOT_EXECUTED}: no device of capability 10.x"', f"{NOT_EXECUTED}: no device of capability 10.x"),
])
def test_what_was_only_compiled_is_unsupported_and_says_so(tmp_path: Path, reason: str, said: str) -> None:
    found = certify(Plan(backend_file(tmp_path, "compiled", reason), 2, ("gemm_w4a8_int8",), per_op=2))
    assert {(v.status, v.reason, v.execution) for v in found.verdicts} == {(Status.UNSUPPORTED, said, Execution.COMPILED)}
    assert found.level_granted is None
    assert report.where_executed(found.verdicts) == NOT_EXECUTED
    assert [(row.op, row.compiled) for row in found.counts] == [("gemm_w4a8_int8", len(found.verdicts))]
    assert f"No level is granted: {NOT_EXECUTED}." in page(found)


def test_the_command_ends_with_the_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reference = backend_file(tmp_path, "compiled")
    code = cli._main(["certify", reference, "--ops", "gemm_w4a8_int8", "--per-op", "1", "--out", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    contract = report.load(tmp_path / "out" / "report.json").contract
    assert code == ExitCode.NOTHING_TO_CERTIFY
    assert f"said: {NOT_EXECUTED}" in err
    assert f"no level granted, contract {contract}, {NOT_EXECUTED}" in out


@pytest.mark.parametrize(("backends", "chosen"), [
    ({"a": Fake("t", "emulated"), "b": Fake("t", "executed"), "c": Fake("u", "executed"), "d": Fake("t", "executed")},
     ("b", "d")),
    ({"a": Fake("t", "compiled"), "b": Fake("t", "emulated")}, ("b",)),
    ({"a": Fake("t", "compiled")}, ("a",)),
])
def test_a_target_is_judged_where_the_most_can_be_said(
    registered: Callable[..., None], backends: dict[str, Fake], chosen: tuple[str, ...]
) -> None:
    registered(**backends)
    assert cli._for_target("t") == chosen


def test_a_device_that_does_not_start_is_an_error_and_no_fallback(registered: Callable[..., None]) -> None:
    registered(a=Fake("t", RuntimeError("driver too old")), b=Fake("t", "emulated"))
    with pytest.raises(cli.Stop, match="target t: backend a cannot use its device: RuntimeError: driver too old"):
        cli._for_target("t")
    assert cli._about("a") == ("t", "RuntimeError: driver too old")


@pytest.mark.parametrize(("execution", "status"), [
    ("executed", "ready"), ("emulated", "ready, emulated"), ("compiled", NOT_EXECUTED),
])
def test_the_list_says_it(registered: Callable[..., None], execution: str, status: str) -> None:
    registered(a=Fake("t", execution))
    assert cli._about("a") == ("t", status)


def test_several_backends_of_a_target_are_certified_each_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_for_target", lambda target: ("cpu", "sim"))
    out = tmp_path / "out"
    code = cli._main(["certify", "--target", "t", "--ops", "gemm_w4a8_int8", "--per-op", "1", "--level", "L0", "--out", str(out)])
    capfd.readouterr()
    # the default datapath of the simulator takes fp8: it supports no problem of this op, and the whole command ends so
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("report.json")) == ["cpu/report.json", "sim/report.json"]
    assert code == ExitCode.NOTHING_TO_CERTIFY
