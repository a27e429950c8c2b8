"""The program that compares the torch twins on a device, run on torch's "cpu": nothing differs, planted defects are counted."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.references import torch_dot, torch_twin
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.formats import FORMATS, Kind

CPU = torch.device("cpu")
INTEGERS = {fmt.name for fmt in FORMATS.values() if fmt.kind in (Kind.INT, Kind.UINT)}


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    path = Path(__file__).parent / "device" / "check_torch_twins.py"
    spec = importlib.util.spec_from_file_location("check_torch_twins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tiny(program: Any) -> Any:
    return program.Size(
        patterns=400, stride=997, doubles=400, block=300, rows=2, instructions=2, long=2, hardware=8, chunked=False)


@pytest.fixture(scope="module")
def tallies(program: Any) -> Any:
    return program.check(CPU, program.SMALL)


def subjects(tallies: Any, section: str) -> set[str]:
    return {tally.subject for tally in tallies if tally.section == section}


def test_nothing_differs_on_cpu(tallies: Any) -> None:
    assert [(tally.section, tally.subject, tally.first) for tally in tallies if tally.mismatches] == []
    assert all(tally.elements > 0 for tally in tallies)


def test_every_format_and_every_datapath_of_the_twin_is_compared(program: Any, tallies: Any) -> None:
    assert subjects(tallies, "encode") == subjects(tallies, "decode") == set(FORMATS)
    assert subjects(tallies, "refusals") == INTEGERS | {"e2m1", "ue4m3"}
    supported = {name for name, path in DATAPATHS.items() if path.family in torch_dot.FAMILIES}
    assert subjects(tallies, "dot") == supported
    assert len(subjects(tallies, "hardware")) == 22
    assert sum(tally.elements for tally in tallies if tally.section == "hardware") == 22 * 400
    for section, sources in (("encode", program.CODEC_SOURCES), ("dot", [f"{kind} operands" for kind in program.OPERANDS])):
        for subject in subjects(tallies, section):
            assert {tally.source for tally in tallies if (tally.section, tally.subject) == (section, subject)} == set(sources)


def test_every_class_of_result_occurs_on_every_datapath(tallies: Any) -> None:
    for subject in subjects(tallies, "dot"):
        seen = {name for tally in tallies if tally.subject == subject for name, count in tally.results.items() if count}
        assert seen == ({"zero", "finite"} if subject.startswith("imma") else {"zero", "finite", "infinite", "nan"})


def test_a_full_run_has_a_million_nodes_per_datapath_and_ten_million_patterns(program: Any) -> None:
    nodes = dict.fromkeys(program.PATHS, 0)
    for task in program.dot_tasks(program.FULL):
        nodes[task.path] += program.nodes_of(program.PATHS[task.path], task.m, task.n, task.k)
    assert min(nodes.values()) >= 10**6
    blocks = [task for task in program.codec_tasks(program.FULL) if (task.source, task.fmt) == ("float32 bits", "bf16")]
    assert len(blocks) * program.FULL.block == 12 * 10**7  # six roundings, two overflow policies
    assert program.drawn("bfloat16 patterns", 0, "f32", program.FULL).size == 65_536


def one_more(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with 1 added to what it returns."""
    return lambda *arguments: function(*arguments) + 1


def never_up(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every yes turned into no."""
    return lambda *arguments: torch.zeros_like(function(*arguments))


# module, function, how it is spoiled, sections and subjects that must show it
DEFECTS = [
    (torch_twin, "_table", one_more, {"encode": {"e2m1", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0", "ue4m3"}}),
    (torch_twin, "_away", never_up, {"encode": {"f16", "bf16", "f32"} | INTEGERS, "refusals": INTEGERS}),
    (torch_twin, "_widened", one_more, {"encode": {"f64"}, "decode": {"bf16", "f32"}}),
    (torch_twin, "_values", one_more, {"decode": set(FORMATS) - {"int32", "bf16", "f32", "f64"}}),
    (torch_dot, "_length", one_more, {"dot": {"hopper_wgmma_fp8", "blackwell_nvfp4", "blackwell_mxf8f6f4", "hopper_mma_fp8_f16"},
                                      "hardware": {"h100_e4m3/hopper_wgmma_fp8"}}),
    (torch_dot, "_special_sum", never_up, {"dot": {"hopper_bf16", "blackwell_nvfp4", "hopper_mma_fp8_f16", "ampere_tf32"}}),
    (torch_dot, "_integers", one_more, {"dot": {"imma_s32", "imma_s32_satfinite"}}),
]


@pytest.mark.parametrize(("module", "name", "spoil", "shown"), DEFECTS, ids=[defect[1] for defect in DEFECTS])
def test_a_planted_defect_is_counted(
    program: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, spoil: Any, shown: dict[str, set[str]]
) -> None:
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))
    found: Any = {}
    if module is torch_twin:
        program.check_encode(found, tiny, CPU, map)
        program.check_decode(found, tiny, CPU)
        program.check_refusals(found, CPU)
    else:
        monkeypatch.setattr(program, "PATHS", {subject: DATAPATHS[subject] for subject in shown["dot"]})
        program.check_dot(found, tiny, CPU, map)
        program.check_hardware(found, tiny, CPU)
    wrong = [tally for tally in found.values() if tally.mismatches]
    for section, names in shown.items():
        assert names - subjects(wrong, section) == set()
    assert all(tally.first for tally in wrong)


def test_a_result_elsewhere_of_another_shape_or_refused_does_not_count_as_equal(program: Any) -> None:
    with pytest.raises(ValueError, match="got a result on cpu, expected it on meta"):
        program.answer(lambda: torch.zeros(1), torch.device("meta"))
    want = np.zeros((3, 1), dtype=np.int64)
    tally = program.note({}, ("encode", "f16", "x"), program.answer(lambda: torch.zeros(3), CPU), want, "here")
    assert (tally.mismatches, tally.first) == (3, "here, got shape (3,), expected (3, 1)")

    def refuse() -> torch.Tensor:
        raise ValueError("f16: no")

    tally = program.note({}, ("encode", "f16", "x"), program.answer(refuse, CPU), want, "here")
    assert (tally.mismatches, tally.first) == (3, "here, refused: f16: no")


def test_the_program_ends_with_1_where_something_differs(
    program: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "SMALL", tiny)
    monkeypatch.setattr(program, "POLICIES", program.POLICIES[:2])
    monkeypatch.setattr(program, "PATHS", {"hopper_wgmma_fp8": DATAPATHS["hopper_wgmma_fp8"]})
    arguments = ["--device", "cpu", "--small", "--json", str(tmp_path / "found.json")]
    assert program.main(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["device_type"], found["mismatches"], found["torch"]) == ("cpu", 0, torch.__version__)
    assert found["elements"] == sum(row["elements"] for row in found["rows"]) > 0
    monkeypatch.setattr(torch_dot, "_length", one_more(torch_dot._length))
    assert program.main(arguments) == 1
    assert json.loads((tmp_path / "found.json").read_text())["mismatches"] > 0
    assert "hardware, h100_e4m3/hopper_wgmma_fp8, published rows: rows from " in capsys.readouterr().out
