"""A vendor's backend from outside: a package of its own, found by entry point, judged, and its fault tracked down.

The package is the one of docs/backends.md with one line spoiled. What each fault does to an element is worked out here in
integers from the operands in the bundle, so that neither the judge nor the references say what the right diagnosis is.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lowbit.conformance.case import Case

Command = Callable[..., subprocess.CompletedProcess[str]]
CASE = "gemm_w4a8_int8/direct/m5n16k256g64/f16/normal/s1"


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the documented backend, what it becomes, and the sentence that names the fault."""

    line: str
    spoiled: str
    sentence: str


FAULTS = {
    "scale": Fault(
        "* scale[:, i]", "* scale[:, i if i < problem.dim('k') // g - 1 else 0]", "group 3 uses group_scale of group 0"
    ),
    "block": Fault("q = state[", "inputs['a'].memory[:, 64:128] = 0\n        q = state[", ""),
    "dropped": Fault("a = inputs[", "a = self.holed(inputs)\n        unused = inputs[", "the terms k = 64..127 are missing"),
}
_HOLED = """
    def holed(self, inputs):
        a = inputs["a"].memory.view(np.int8).astype(np.int64)
        a[:, 64:128] = 0
        return a
"""


@pytest.fixture(scope="module")
def sites(
    tmp_path_factory: pytest.TempPathFactory,
    documented: Mapping[str, tuple[str, ...]],
    install: Callable[[Path, Mapping[str, str]], Path],
) -> dict[str, Path]:
    """Where each faulty package is installed."""
    source, project = documented["python"][0], documented["toml"][0]
    found = {}
    for name, fault in FAULTS.items():
        assert source.count(fault.line) == 1
        spoiled = source.replace(fault.line, fault.spoiled) + (_HOLED if "holed" in fault.spoiled else "")
        files = {"pyproject.toml": project, "acme_lowbit/__init__.py": "", "acme_lowbit/backend.py": spoiled}
        found[name] = install(tmp_path_factory.mktemp(name), files)
    return found


def repro_of(text: str) -> list[str]:
    """Arguments of the first line that reproduces a failure."""
    return shlex.split(next(line for line in text.splitlines() if line.strip().startswith("lowbit run ")))[1:]


def test_entry_point_alone_makes_a_backend_known(lowbit: Command, sites: dict[str, Path]) -> None:
    """It is listed with its package on the path, and unknown without it."""
    assert re.search(r"^acme +cpu +ready", lowbit("list", "backends", site=sites["scale"]).stdout, re.MULTILINE)
    missing = lowbit("run", CASE, "--backend", "acme")
    assert missing.returncode == 2
    assert "unknown backend 'acme'" in missing.stderr


def test_planted_fault_fails_and_its_printed_line_reproduces_it(lowbit: Command, sites: dict[str, Path], tmp_path: Path) -> None:
    """certify fails with DRIFT in every lane that the fault touches; the line printed with a failure gives that verdict again."""
    done = lowbit("certify", "acme", "--ops", "gemm_w4a8_int8", "--per-op", "1", "--out", "out", site=sites["scale"])
    assert done.returncode == 1
    assert "no level granted" in done.stdout
    assert "shortened run: 1 of 170 drawn cases per op; a level asks for the whole list" in done.stdout
    verdicts = json.loads((tmp_path / "out" / "report.json").read_text())["verdicts"]
    statuses = {verdict["status"] for verdict in verdicts}
    assert statuses == {"DRIFT", "EXACT", "UNSUPPORTED"}
    assert {"exact", "bounded", "golden"} <= {verdict["lane"] for verdict in verdicts if verdict["status"] == "DRIFT"}
    for verdict in verdicts:  # one group only: group 0 is the last one, and the spoiled line changes nothing
        dims = Case.split(verdict["case"])[2]
        if verdict["status"] == "DRIFT" and verdict["lane"] != "property":
            assert dims["k"] > dims["g"], verdict["case"]
    again = lowbit(*repro_of(done.stderr), site=sites["scale"])
    assert again.returncode == 1
    case = repro_of(done.stderr)[1]
    digest = next(verdict["output_sha256"] for verdict in verdicts if verdict["case"] == case)
    told = lowbit(*repro_of(again.stdout), "--json", "again.json", site=sites["scale"])
    assert told.stdout == again.stdout
    assert json.loads((tmp_path / "again.json").read_text())[0]["output_sha256"] == digest


def hand(bundle: Path, row: int, column: int, fault: str) -> Fraction:
    """Element of the faulty result over the rationals, from the codes in the bundle."""
    codes = load_file(bundle)
    a, q = (codes[name].astype(np.int64) for name in ("in.a", "in.w"))
    a = np.where(a > 127, a - 256, a)
    scale = [Fraction(float(x)) for x in codes["in.group_scale"].view(np.float16)[column]]
    used = [scale[0] if fault == "scale" and g == 3 else scale[g] for g in range(4)]
    dead = range(64, 128) if fault == "dropped" else ()
    total = sum(used[k // 64] * int(a[row, k]) * (int(q[column, k]) - 8) for k in range(256) if k not in dead)
    return Fraction(total) * Fraction(float(codes["in.token_scale"].view(np.float16)[row]))


@pytest.mark.parametrize("fault", ["scale", "dropped"])
def test_bundle_is_explained_and_judged_again_without_the_backend(
    lowbit: Command, sites: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """`explain` names the planted fault and gives the sums; `replay` gives the same verdict where the package is absent."""
    run = lowbit("run", CASE, "--backend", "acme", "--bundle", "case.safetensors", "--json", "run.json", site=sites[fault])
    assert run.returncode == 1
    bundle = tmp_path / "case.safetensors"
    for element in ("0,0", "3,7", "4,15"):
        told = lowbit("explain", bundle, element, "--json", "why.json")
        assert told.returncode == 0, told.stderr
        assert f"diverges:   {FAULTS[fault].sentence}" in told.stdout
        why = json.loads((tmp_path / "why.json").read_text())
        row, column = map(int, element.split(","))
        got = Fraction(float(np.array([int(why["got"], 16)], np.uint16).view(np.float16)[0]))
        faulty = hand(bundle, row, column, fault)
        assert abs(got - faulty) <= abs(faulty) / 1024  # an f16 result of an f32 evaluation: within an ulp of the faulty sum
        assert not why["inside"]
        right = hand(bundle, row, column, "")
        low, high = sorted(Fraction(float(text.split(" = ")[1])) for text in why["candidates"])
        assert low <= right <= high
        codes = load_file(bundle)
        a = codes["in.a"][row].view(np.int8).astype(int)
        assert Fraction(why["main_sum"]) == int(a @ (codes["in.w"][column].astype(int) - 8))
        largest = max(abs(int(x) * (int(y) - 8)) for x, y in zip(a, codes["in.w"][column], strict=True))
        assert abs(Fraction(why["terms"][0]["product"])) == largest
    replay = lowbit("replay", bundle, "--json", "replay.json")
    assert replay.returncode == 1
    first, second = json.loads((tmp_path / "run.json").read_text())[0], json.loads((tmp_path / "replay.json").read_text())
    same = (
        "case",
        "backend",
        "status",
        "reason",
        "wrong",
        "judged",
        "worst",
        "operands",
        "output_sha256",
        "power",
        "lane",
        "products",
    )
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_reduce_finds_a_smaller_case_that_fails(lowbit: Command, sites: dict[str, Path], tmp_path: Path) -> None:
    """The reduced case has one row, the fewest columns and the fewest groups that show the fault, and fails by its own line."""
    for fault, k, g in (("scale", 64, 32), ("dropped", 96, 32)):
        done = lowbit("reduce", CASE, "--backend", "acme", "--json", "reduced.json", site=sites[fault])
        assert done.returncode == 1, done.stderr
        found = json.loads((tmp_path / "reduced.json").read_text())
        dims = Case.split(found["end"])[2]
        assert dims == {"m": 1, "n": 8, "k": k, "g": g}
        assert found["products_before"] == 5 * 16 * 256
        assert found["products_after"] == 8 * k
        assert found["status"] == "DRIFT"
        again = lowbit(*repro_of(done.stdout), site=sites[fault])
        assert again.returncode == 1
        assert again.stdout.startswith(f"DRIFT {found['end']}")


def test_writing_to_an_input_is_found_and_told_apart_from_a_wrong_sum(lowbit: Command, sites: dict[str, Path]) -> None:
    """The same 64 terms dropped by zeroing the suite's own activations: MALFORMED, not DRIFT."""
    done = lowbit("run", CASE, "--backend", "acme", site=sites["block"])
    assert done.returncode == 1
    assert done.stdout.startswith("MALFORMED")
    assert "'a'" in done.stdout
