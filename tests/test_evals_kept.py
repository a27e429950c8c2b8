"""Runs that were brought back: what is kept of them, and that the tables of docs/evals.md are those of the kept runs."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.conformance.evals.paired import Comparison, Interval, Outcome, Table
from lowbit.conformance.evals.records import SCHEMA, Eval, Kernel, Operation, Serving, TaskResult, read_eval, write_eval
from lowbit.conformance.evals.tokens import Ratio, TokenComparison

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    path = ROOT / "tests" / "device" / "evals_kept.py"
    spec = importlib.util.spec_from_file_location("evals_kept", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def compared(table: Table, lower: float, upper: float, outcome: Outcome) -> Comparison:
    return Comparison(table, 0.625, Interval(lower, upper), 0.95, 0.02, 0.0314, outcome)


def found() -> Eval:
    """200 questions, of which the reference gets 50 right, the backend 49 and full precision 60; 1 of 2 Linears is outside."""
    kernel = compared(Table(47, 3, 2, 148), -0.0271, 0.0169, Outcome.INCONCLUSIVE)
    floor = compared(Table(50, 0, 0, 150), 0.0, 0.0, Outcome.SERVES)
    recipe = compared(Table(45, 15, 5, 135), -0.09, -0.01, Outcome.DRIFTS)
    task = TaskResult(
        "gsm8k", 200, {"full": 60, "reference": 50, "backend": 49, "floor": 50}, kernel, floor, recipe, {}, Ratio(0.9, 1.1),
        Table(200, 0, 0, 0), 1.0,
    )
    choices = replace(task, name="mmlu", right={"reference": 50, "backend": 49, "floor": 50}, recipe=None)
    tokens = TokenComparison(64, 12_345, 0.0012, 0.0023, 0.0, 0.0, 0, None, Ratio(0.456, None), 4.0, Outcome.SERVES)
    operations = (Operation("up", "p", 64, 0, 0.0), Operation("down", "p", 64, 2, 0.5))
    said = Kernel(tokens, 0.125, (), operations, (), "down", "/tmp/run/one/first/down.safetensors", Outcome.DRIFTS)
    settings = {"backend": "triton", "base": "/tmp/evals/qwen", "data": "/tmp/evals/q/data", "recipe": "w4a16", "limit": None}
    return Eval(SCHEMA, "1", settings, "m", (task, choices), said, Serving("refused", ("r",), None), {}, (), 1.0)


LOG = """\
full: gsm8k 128 of 200 requests, about 5 s left
piece ended with 124 after 10 s
full: gsm8k 200 of 200 requests, about 0 s left
full: gsm8k asked, 72 requests in 30 s
backend: gsm8k 200 of 200 requests, about 0 s left
backend: gsm8k asked, 200 requests in 321 s
backend: mmlu 64 of 800 requests, about 9 s left
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One run that ended after it was killed once, one that did not."""
    for name in ("one", "cut"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "log").write_text(LOG, encoding="utf-8")
    write_eval(tmp_path / "runs" / "one" / "eval.json", found())
    return tmp_path / "runs"


def test_what_is_kept_names_no_folder(program: Any, runs: Path, tmp_path: Path) -> None:
    assert program.keep(runs, tmp_path / "kept") == 1
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["one.json", "runs.json"]
    kept = read_eval(tmp_path / "kept" / "one.json")
    assert (kept.settings["base"], kept.settings["data"], kept.kernel.bundle) == ("qwen", "data", "down.safetensors")
    assert "/tmp" not in (tmp_path / "kept" / "one.json").read_text(encoding="utf-8")
    assert kept.tasks == found().tasks
    index = json.loads((tmp_path / "kept" / "runs.json").read_text(encoding="utf-8"))
    assert index["one"] == {
        "ended": True, "seconds": {"full": {"gsm8k": 30}, "backend": {"gsm8k": 321}},
        "timed": {"full": {"gsm8k": 72}, "backend": {"gsm8k": 200}},
        "requests": {"full": {"gsm8k": [200, 200]}, "backend": {"gsm8k": [200, 200], "mmlu": [64, 800]}},
    }
    assert index["cut"] == {**index["one"], "ended": False}


def test_the_tables_say_the_figures(program: Any, runs: Path, tmp_path: Path) -> None:
    program.keep(runs, tmp_path / "kept")
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{program.MARKS[0]}\nold\n{program.MARKS[1]}\nafter\n", encoding="utf-8")
    assert program.main(["table", str(tmp_path / "kept"), str(page)], io.StringIO()) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{program.MARKS[0]}\n\n| run | ")
    assert text.endswith(f"{program.MARKS[1]}\nafter\n")
    assert "old" not in text
    row = "| one | triton | gsm8k | 200 | 30.0 % | 25.0 % | 24.5 % | -5.0 (-9.0 to -1.0) | -0.5 (-2.7 to +1.7) "
    assert f"{row}| +0.0 (+0.0 to +0.0) | 0.62 | 3.1 | INCONCLUSIVE |\n" in text
    assert "| one | triton | mmlu | 200 |  | 25.0 % | 24.5 % | not measured | -0.5 " in text
    row = "| one | 12,345 of 64 | 0.0012 and 0.0023 | 0.46 to infinite | 0.12 | 1 of 2 | DRIFTS | gsm8k 321 s |\n"
    assert row in text
    came = "full gsm8k 200 of 200, backend gsm8k 200 of 200, backend mmlu 64 of 800"
    assert f"- cut did not end; requests answered: {came}.\n" in text
    again = page.read_text(encoding="utf-8")
    program.table(tmp_path / "kept", page)
    assert page.read_text(encoding="utf-8") == again


def test_what_cannot_be_used_is_one_sentence(program: Any, runs: Path, tmp_path: Path) -> None:
    told = io.StringIO()
    assert program.main(["keep", str(tmp_path), str(tmp_path / "kept")], told) == 1
    assert told.getvalue() == f"keep: {tmp_path}: no run is there; expected NAME/log below it\n"
    program.keep(runs, tmp_path / "kept")
    (tmp_path / "page.md").write_text(program.MARKS[0], encoding="utf-8")
    assert program.main(["table", str(tmp_path / "kept"), str(tmp_path / "page.md")], told) == 1
    assert "are not both there" in told.getvalue()
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == program.MARKS[0]


def test_the_page_shows_the_kept_runs(program: Any) -> None:
    """docs/evals.md holds the tables of reports/evals/h200, and none where no run is kept."""
    text, kept = (ROOT / "docs" / "evals.md").read_text(encoding="utf-8"), ROOT / "reports" / "evals" / "h200"
    between = text.partition(program.MARKS[0])[2].partition(program.MARKS[1])[0]
    assert between == (f"\n\n{program.tables(kept)}\n\n" if (kept / "runs.json").exists() else "")
