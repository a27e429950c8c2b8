"""What is said of an evaluation: the file, the words, level L4 (EVA-7) and the drawings."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from copy import copy
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

import lowbit.conformance.evals
from lowbit.conformance.cli import main
from lowbit.conformance.evals.answers import Answered, EvalError, check_pairs, claim_folder
from lowbit.conformance.evals.checkpoint import CheckpointError
from lowbit.conformance.evals.page import page
from lowbit.conformance.evals.paired import Outcome, Table, compare
from lowbit.conformance.evals.records import (
    SCHEMA,
    Eval,
    Kernel,
    Operation,
    Ran,
    TaskResult,
    TextPair,
    alarms,
    drifts,
    read_eval,
    serving,
    summary,
    to_data,
    write_eval,
)
from lowbit.conformance.evals.tokens import Ratio, TextDifference, compare_tokens
from lowbit.conformance.exit_codes import ExitCode
from lowbit.conformance.report import Report, suite_version, to_json
from lowbit.conformance.report_records import Claim
from lowbit.conformance.selection import CONTRACT


@cache
def sample() -> Report:
    """The sample report of the report tests."""
    path = Path(__file__).with_name("report_samples.py")
    spec = importlib.util.spec_from_file_location("report_samples", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Report = module.report()
    return found


SAID = {"numpy": "2.0"}
RAN = Ran("cpu", "torch_twin", SAID, "executed", 3, 2)


def certificate(level: int | None = 3, backend: str = "cpu", **changes: object) -> Report:
    """The sample as if it granted a level to a backend, by this suite."""
    found = copy(sample())
    subject = replace(found.subject, reference=backend, describe={**SAID, "tensors": "weights.safetensors"})
    read = {"level_granted": level, "subject": subject, "suite": suite_version(), "contract": CONTRACT} | changes
    for name, value in read.items():
        object.__setattr__(found, name, value)  # a report checks itself; here only what L4 reads matters
    return found


P = "gemm_w4a16/sym/k128"


def task(name: str, table: Table, **changes: object) -> TaskResult:
    found = compare(table, margin=0.02)
    calm = compare(Table(table.both + table.backend_only, 0, 0, table.neither + table.reference_only), margin=0.02)
    right = {"reference": table.both + table.reference_only, "backend": table.both + table.backend_only}
    made = TaskResult(
        name, table.questions, right, found, calm, None, {"floor": 0.0, "backend": 0.25}, Ratio(0.99, 1.01),
        Table(table.questions, 0, 0, 0), 1.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def kernel(backend: float = 1.0, outside: int = 0, count: int = 16) -> Kernel:
    far = backend > 100
    texts = [TextDifference((backend * 1e-5, backend * 2e-5), int(far), 0 if far else -1) for _ in range(count)]
    floor = [TextDifference((1e-5, 2e-5), 0, -1) for _ in range(count)]
    tokens = compare_tokens(texts, floor)
    operations = (Operation("up", P, 64, 0, 0.25), Operation("down", P, 64, outside, 0.5))
    first = "down" if outside else None
    pairs = tuple(TextPair(f"t/{at}", 2, backend * 1.5e-5, 1.5e-5 if at else 0.0, text.flips) for at, text in enumerate(texts))
    return Kernel(
        tokens, 0.125, pairs, operations, ("t/0", "t/1"), first, "first/down.safetensors" if first else None,
        Outcome.DRIFTS if outside else tokens.outcome,
    )


def made(one: Kernel, *tasks: TaskResult, report: Report | None = None) -> Eval:
    settings = {"backend": "cpu", "reference": "reference", "recipe": "w4a16", "limit": None}
    said = serving(tasks, one, RAN, report)
    return Eval(SCHEMA, "1", settings, "a <model>", tasks, one, said, {"k": 3}, ("mmlu was not asked",), 1.5)


GOOD = Table(900, 2, 3, 95)
BAD = Table(800, 90, 10, 100)


def test_the_file_comes_back_and_others_are_refused(tmp_path: Path) -> None:
    found = made(kernel(), task("gsm8k", GOOD))
    path = tmp_path / "eval.json"
    write_eval(path, found)
    assert read_eval(path) == found
    assert to_data(found) == json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(to_data(found) | {"schema": "other/1"}), encoding="utf-8")
    with pytest.raises(EvalError, match="schema is 'other/1', expected 'lowbit-eval/1'"):
        read_eval(path)
    path.write_text("[", encoding="utf-8")
    with pytest.raises(EvalError, match=r"not a readable eval\.json"):
        read_eval(path)


def test_level_four_is_granted_over_level_three() -> None:
    found = made(kernel(), task("gsm8k", GOOD), report=certificate())
    assert found.serving.outcome == "granted"
    said = "SERVES on gsm8k (1000 questions, margin 2 points), token by token (32 tokens of 16 texts), and in 2 of 3 replaced"
    assert found.serving.reasons == (f"{said} Linears; executed",)
    assert not drifts(found)


@pytest.mark.parametrize(("one", "tasks", "report", "reason"), [
    (kernel(), [task("a", GOOD)], None, "L3 was not shown"),
    (kernel(), [task("a", GOOD)], certificate(2), "the certificate grants L2; L3 is needed"),
    (kernel(), [task("a", GOOD)], certificate(None), "the certificate grants no level"),
    (kernel(), [task("a", GOOD)], certificate(3, "other"), "the certificate is that of backend other"),
    (kernel(outside=1), [task("a", GOOD)], certificate(), "the kernel level is DRIFTS"),
    (kernel(500.0), [task("a", GOOD)], certificate(), "the kernel level is DRIFTS"),
    (kernel(), [task("a", GOOD), task("b", BAD)], certificate(), "b is DRIFTS: 1000 questions, margin 2 points"),
    (kernel(), [task("a", Table(8, 1, 0, 1))], certificate(), "a is INCONCLUSIVE: 10 questions"),
    (kernel(), [task("a", GOOD, lengths=Ratio(1.2, 1.3))], certificate(), "a: answers are 1.2 to 1.3 times as long"),
    (kernel(), [task("a", GOOD, lengths=Ratio(0.5, 0.8))], certificate(), "a: answers are 0.5 to 0.8 times as long"),
    (kernel(), [task("a", GOOD, lengths=Ratio(None, None))], certificate(), "a: answers are infinite to infinite times"),
    (kernel(), [task("a", GOOD, stopped=Table(90, 10, 0, 0), stop_p=2**-9)], certificate(), "a: 90 answers ended by themselves"),
])
def test_level_four_is_refused_for_one_reason(one: Kernel, tasks: list[TaskResult], report: Report | None, reason: str) -> None:
    found = serving(tasks, one, RAN, report)
    assert found.outcome == "refused"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith(reason)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"suite": "2020.1.0"}, "the certificate is of suite 2020.1.0, installed is"),
    ({"contract": "0"}, "the certificate is of contract 0, installed is"),
    ({"claims": (Claim("gemm_w4a16", 0, 9, {}, ()), Claim("int4_pack", 9, 9, {}, ()))},
     "the certificate claims no support of gemm_w4a16"),
])
def test_a_certificate_of_something_else_shows_nothing(changes: dict[str, object], reason: str) -> None:
    found = serving([task("a", GOOD)], kernel(), RAN, certificate(**changes))  # type: ignore[arg-type]
    assert (found.outcome, len(found.reasons)) == ("refused", 1)
    assert found.reasons[0].startswith(reason)


@pytest.mark.parametrize(("ran", "reason"), [
    (replace(RAN, judge="cpu"), "the judge was cpu, not the reference arithmetic"),
    (replace(RAN, reached=3), "2 of 3 Linears that were reached were judged on their own"),
    (replace(RAN, describe={"numpy": "2.1"}, execution="emulated"),
     "the certificate is of another build or device (emulated here): numpy was '2.0' there and is '2.1' here"),
])
def test_level_four_is_of_this_backend_by_this_judge(ran: Ran, reason: str) -> None:
    found = serving([task("a", GOOD)], kernel(), ran, certificate())
    assert (found.outcome, len(found.reasons)) == ("refused", 1)
    assert found.reasons[0].startswith(reason)


@pytest.mark.parametrize(("one", "tasks", "reason"), [
    (kernel(), [], "no task was asked"),
    (kernel(count=15), [task("a", GOOD)], "15 texts were compared token by token; at least 16 are needed"),
    (replace(kernel(), operations=()), [task("a", GOOD)], "0 of 2 Linears that were reached"),
    (kernel(), [task("a", GOOD, kernel=compare(GOOD, margin=0.5))], "a has a margin of 50 points at 95 %"),
    (kernel(), [task("a", GOOD, kernel=compare(GOOD, margin=0.02, confidence=0.6))], "a has a margin of 2 points at 60 %"),
])
def test_level_four_is_not_granted_on_nothing(one: Kernel, tasks: list[TaskResult], reason: str) -> None:
    found = serving(tasks, one, RAN, certificate())
    assert (found.outcome, len(found.reasons)) == ("refused", 1)
    assert found.reasons[0].startswith(reason)


def answered(*keys: str, context: str = "c", generated: bool = True) -> list[Answered]:
    return [Answered(key, True, context, "1", generated, 8) for key in keys]


def test_only_the_same_questions_are_paired() -> None:
    check_pairs("t", {"full": answered("a", "b"), "backend": answered("a", "b")})
    check_pairs("t", {"full": answered("a", generated=False), "backend": answered("a", context="d", generated=False)})
    with pytest.raises(EvalError, match="t: at place 0 backend answered question b, full a"):
        check_pairs("t", {"full": answered("a", "b"), "floor": answered("a", "b"), "backend": answered("b", "a")})
    with pytest.raises(EvalError, match="at place 0 backend answered a after other words"):
        check_pairs("t", {"full": answered("a"), "backend": answered("a", context="d")})
    with pytest.raises(EvalError, match="backend answered 1 questions, full 2"):
        check_pairs("t", {"full": answered("a", "b"), "backend": answered("a")})


def test_a_folder_is_that_of_one_run(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", {"a": 1})
    claim_folder(tmp_path / "run", {"a": 1})
    with pytest.raises(EvalError, match="holds answers of another run: a was 1 there and is 2 here"):
        claim_folder(tmp_path / "run", {"a": 2})
    (tmp_path / "reference-gsm8k.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(EvalError, match=r"holds reference-gsm8k\.jsonl and no settings\.json"):
        claim_folder(tmp_path, {"a": 1})
    assert not (tmp_path / "settings.json").exists()


def test_lengths_within_a_tenth_are_no_alarm() -> None:
    assert alarms(task("a", GOOD, lengths=Ratio(0.8, 1.09))) == []
    assert alarms(task("a", GOOD, lengths=None, stopped=None, stop_p=None)) == []


def test_who_is_accused() -> None:
    assert drifts(made(kernel(outside=1), task("a", GOOD)))
    assert drifts(made(kernel(), task("a", BAD)))
    both = task("a", BAD)
    assert not drifts(made(kernel(), replace(both, floor=both.kernel)))  # another honest order does it as well
    assert not drifts(made(kernel(), task("a", Table(8, 1, 0, 1))))


def test_the_words() -> None:
    text = summary(made(kernel(outside=3), task("gsm8k", BAD)))
    assert "gsm8k, 1000 questions: reference 89.0 %, backend 81.0 %" in text
    assert "kernel error (backend against reference): DRIFTS, -8.0 points" in text
    assert "down: 3 of 64 outputs outside" in text
    assert "kernel level: DRIFTS: first at down" in text
    assert "recipe KL 0.125" in text
    assert text.endswith("mmlu was not asked")


class Places(HTMLParser):
    """Ids and balance of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "rect", "line", "circle", "input", "br", "hr", "wbr", "path", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "circle"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Closed in place."""


def test_the_page_draws_what_was_found() -> None:
    found = made(kernel(500.0, outside=16), task("gsm8k", BAD))
    text = page(found)
    places = Places()
    places.feed(text)
    assert places.open == []
    assert places.ids == ["evals"]
    assert "a &lt;model&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    assert text.count('class="dot flipped"') == 16
    assert len(re.findall(r'class="(?:pass|fail|near)" viewBox="0 0 100 10" preserveAspectRatio="none" role="img"', text)) == 2
    assert "16 of 64 outside" in text
    assert '<rect class="fill" width="25.00" height="10"/></svg><span class="end">16 of 64 outside' in text  # 16 of 64
    assert '<rect class="fill" width="89.00" height="10"/></svg><span class="end">89.0 %' in text
    assert "first/down.safetensors" in text


def test_the_interval_and_the_margin_have_their_places() -> None:
    found = made(kernel(), task("gsm8k", Table(500, 0, 0, 500)))  # no discordant question: an interval around zero
    text = page(found)
    low = compare(Table(500, 0, 0, 500), margin=0.02).interval.lower
    assert low > -0.004
    assert 'class="margin" x1="25.00" x2="25.00"' in text  # the axis spans twice the margin to either side
    assert f'class="span" x1="{50 + 50 * low / 0.04:.2f}"' in text


def test_with_a_certificate_it_is_a_section_of_its_report() -> None:
    report = certificate()
    text = page(made(kernel(), task("gsm8k", GOOD), report=report), report)
    places = Places()
    places.feed(text)
    assert places.ids.index("certificate") < places.ids.index("evals")
    assert places.ids.count("evals") == 1
    assert '<a href="#evals">Evals</a>' in text
    assert "L4 serves: granted" in text


def test_infinite_divergence_is_said_and_not_drawn() -> None:
    one = replace(kernel(), texts=(TextPair("t/0", 2, None, 1e-5, 2),))
    assert 'class="plot"' not in page(made(one, task("a", GOOD)))
    two = replace(kernel(), texts=(TextPair("t/0", 2, None, 1e-5, 2), TextPair("t/1", 2, 1e-5, 1e-5, 0)))
    assert "1 texts are infinitely far and not drawn" in page(made(two, task("a", GOOD)))


# The command ----------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, given: Eval | BaseException, *arguments: str) -> tuple[int, dict[str, object]]:
    """Exit code of `lowbit eval` where the evaluation gives a result or raises, and what it was asked for."""
    asked: dict[str, object] = {}

    def evaluate(model: str, backend: str, **options: object) -> Eval:
        asked.update(options, model=model, backend=backend)
        if isinstance(given, BaseException):
            raise given
        return given

    room = ModuleType("lowbit.conformance.evals.runner")
    vars(room).update(evaluate=evaluate, REFUSALS=(EvalError,), CheckpointError=CheckpointError)
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setattr(lowbit.conformance.evals, "runner", room, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["eval", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, asked


def test_the_command_asks_for_what_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "found.json"
    found = made(kernel(), task("gsm8k", GOOD))
    code, asked = command(
        monkeypatch, found, "m", "-b", "cpu", "--tasks", "gsm8k,mmlu", "--limit", "7", "--out", str(out), "--localise", "--json",
        str(figures),
    )
    assert code == ExitCode.REACHED
    wanted = {"model": "m", "backend": "cpu", "tasks": ["gsm8k", "mmlu"], "limit": 7, "out": out, "localise": True}
    assert {name: asked[name] for name in wanted} == wanted
    assert json.loads(figures.read_text(encoding="utf-8")) == to_data(found)


@pytest.mark.parametrize(("given", "code", "said"), [
    (made(kernel(outside=1), task("a", GOOD)), ExitCode.FAILED, "the backend DRIFTS from the reference arithmetic"),
    (EvalError("no such task"), ExitCode.USAGE, "no such task"),
    (CheckpointError("no such file"), ExitCode.BAD_INPUT, "no such file"),
    (KeyboardInterrupt(), ExitCode.INTERRUPTED, "the same command goes on from what is in"),
])
def test_the_command_ends_with_a_code_and_a_sentence(
    given: Eval | BaseException, code: ExitCode, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, given, "m", "-b", "cpu", "--out", str(tmp_path / "out"))[0] == code
    assert said in capsys.readouterr().err


def test_a_stale_certificate_is_found_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, found = tmp_path / "report.json", made(kernel(), task("gsm8k", GOOD))
    file.write_text(to_json(sample()), encoding="utf-8")  # whole, and of contract 1
    code, asked = command(monkeypatch, found, "m", "-b", "cpu", "--certificate", str(file), "--out", str(tmp_path / "out"))
    assert (code, asked) == (ExitCode.BAD_INPUT, {})
    assert f"not fresh: the report is of contract 1, installed is {CONTRACT}; certify again" in capsys.readouterr().err


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(lowbit.conformance.evals, "runner", raising=False)
    monkeypatch.setitem(sys.modules, "lowbit.conformance.evals.runner", None)
    with pytest.raises(SystemExit) as ended:
        main(["eval", "embedded", "-b", "cpu"])
    assert ended.value.code == ExitCode.USAGE
    assert "install lowbit[evals]" in capsys.readouterr().err
