"""Recorded calls: a file holds what is needed to judge it again, and refuses to be anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lowbit.conformance.cli import main
from lowbit.conformance.evals.activations import codes_of
from lowbit.conformance.evals.arms import ReferenceArm, call_operands
from lowbit.conformance.evals.quantise import RECIPES, quantise_linear
from lowbit.conformance.evals.recorded import Recorded, is_recorded, outside, read, store
from lowbit.conformance.exit_codes import ExitCode
from lowbit.conformance.report import ReportError
from lowbit.references.formats import BF16


def call(recipe: str) -> Recorded:
    """A call of one Linear [128, 256] on three rows."""
    draw, arm = torch.Generator().manual_seed(5), ReferenceArm("f32", 1, True)
    weight = torch.randn(128, 256, generator=draw).to(torch.bfloat16)
    x = torch.randn(3, 256, generator=draw).to(torch.bfloat16)
    linear = quantise_linear(RECIPES[recipe], "layers.7.up", weight, BF16, input_amax=4.0)
    layer = arm.prepare(linear, BF16, torch.device("cpu"))
    problem, operands = call_operands(linear, BF16, x)
    found = codes_of(arm.run(layer, x)).numpy().view(np.uint16)
    return Recorded("layers.7.up", arm.name, problem, operands, arm.declare(problem), found)


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8-fp8", "nvfp4", "w4a8-int8"])
def test_a_call_is_judged_again_from_its_file(recipe: str, tmp_path: Path) -> None:
    made = call(recipe)
    path = tmp_path / "a" / "call.safetensors"
    store(path, made)
    again = read(path)
    assert (again.layer, again.arm, again.problem, again.declaration) == (made.layer, made.arm, made.problem, made.declaration)
    assert again.operands.sha256() == made.operands.sha256()
    assert np.array_equal(again.found, made.found)
    assert outside(again) == outside(made) == 0


def test_a_wrong_output_stays_wrong_in_its_file(tmp_path: Path) -> None:
    made = call("w4a16")
    made.found[1, 5] ^= 0x0100  # four times as large, or a quarter
    made.found[2, 0] = 0x7FC0  # NaN
    store(tmp_path / "call.safetensors", made)
    assert outside(read(tmp_path / "call.safetensors")) == 2


def test_replay_takes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, made = tmp_path / "call.safetensors", call("w4a16")
    store(path, made)
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(path)])
    assert ended.value.code == ExitCode.REACHED
    made.found[0, 0] ^= 0x0100
    store(path, made)
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(path), "--json", str(tmp_path / "found.json")])
    assert ended.value.code == ExitCode.FAILED
    assert "1 of 384 outputs outside" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["outside"] == 1
    assert not is_recorded(tmp_path / "found.json")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "call.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(ReportError, match="is not a readable safetensors file"):
        read(path)
    save_file({"x": np.zeros(1, np.uint8)}, path)
    with pytest.raises(ReportError, match="is no recorded call"):
        read(path)
    store(path, call("w4a16"))
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    tensors = load_file(path)
    tensors["in.a"] = tensors["in.a"][:2].copy()
    metadata = {"lowbit": json.loads(header)["__metadata__"]["lowbit"]}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ReportError, match=r"in\.a is uint16\[2, 256\], expected uint16\[3, 256\]; localise again"):
        read(path)
    del tensors["in.a"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ReportError, match="make no sense"):
        read(path)


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (np.zeros(1, np.uint16), r"uint16\[1\]"), (np.zeros((0, 128), np.uint16), r"uint16\[0, 128\]"),
        (np.zeros((3, 128), np.uint8), r"uint8\[3, 128\]"), (np.zeros((3, 128), np.int16), r"int16\[3, 128\]"),
    ],
)
def test_outputs_of_another_shape_or_type_are_refused(found: Any, got: str, tmp_path: Path) -> None:
    store(tmp_path / "call.safetensors", replace(call("w4a16"), found=found))
    with pytest.raises(ReportError, match=rf"out\.d is {got}, expected uint16\[3, 128\]; localise again$"):
        read(tmp_path / "call.safetensors")
