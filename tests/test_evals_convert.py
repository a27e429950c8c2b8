"""W4A16 to W4A8: the codes stay, the configuration changes, and nothing is half-written (EVA-2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.conformance import cli
from lowbit.conformance.evals.checkpoint import SINGLE, CheckpointError, open_checkpoint
from lowbit.conformance.evals.convert import convert
from lowbit.conformance.evals.schemes import SchemeError
from lowbit.conformance.exit_codes import ExitCode
from lowbit.references.formats import BF16, decode

N, K = 16, 256
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def config(**weights: Any) -> dict[str, Any]:
    part = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "actorder": None} | weights
    return {"model_type": "llama", "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": part, "input_activations": None}},
    }}


def model(folder: Path, scales: torch.Tensor, settings: dict[str, Any] | None = None) -> Path:
    """Two W4A16 layers, an embedding and a tokenizer file."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(3)
    tensors = {"model.embed_tokens.weight": torch.ones(8, K, dtype=torch.bfloat16)}
    for layer in LAYERS:
        drawn = torch.randint(-(2**31), 2**31, (N, K // 8), generator=draw, dtype=torch.int64)
        tensors[f"{layer}.weight_packed"] = drawn.to(torch.int32)
        tensors[f"{layer}.weight_scale"] = scales.clone()
        tensors[f"{layer}.weight_shape"] = torch.tensor([N, K])
    save_file(tensors, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(settings or config()), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / SINGLE), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_stays_and_the_activations_become_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    source = model(tmp_path / "src", torch.tensor([[1.0, 0.5]] * N, dtype=dtype))
    told: list[str] = []
    found = convert(source, tmp_path / "dst", told=told.append)
    before, after = tensors_of(source), tensors_of(tmp_path / "dst")
    assert sorted(before) == sorted(after)
    for name, tensor in after.items():
        assert torch.equal(tensor.to(torch.float64), before[name].to(torch.float64)), name
        assert tensor.dtype == (torch.bfloat16 if name.endswith("weight_scale") else before[name].dtype)
    given = json.loads((tmp_path / "dst" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    inputs = given["config_groups"]["group_0"]["input_activations"]
    assert (inputs["type"], inputs["num_bits"]) == ("float", 8)
    assert (tmp_path / "dst" / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    # c = RNE(1 / 448) in binary32 is not 1 / 448, so every folded value is off by that rounding and by nothing else
    assert (found.layers, found.scales, found.zeroed, found.changed) == (2, 4 * N, 0, 4 * N)
    assert 0 < found.worst < 2**-24
    assert told == [f"write {SINGLE}", "checked 2 of 2 layers"]
    (tmp_path / "other").mkdir()
    assert (tmp_path / "dst").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_both_arms_read_the_same_weights(tmp_path: Path) -> None:
    source = model(tmp_path / "src", torch.tensor([[1.0, 0.5]] * N, dtype=torch.bfloat16))
    convert(source, tmp_path / "dst")
    arms = [open_checkpoint(path) for path in (source, tmp_path / "dst")]
    for layer in LAYERS:
        wide, narrow = (arm.linear(layer, scheme, BF16) for arm in arms if (scheme := arm.schemes().of(layer)))
        assert (wide.scheme.op, narrow.scheme.op) == ("gemm_w4a16", "gemm_w4a8_fp8")
        signed = decode(narrow.constants["w"].codes, narrow.constants["w"].format)
        assert (decode(wide.constants["w"].codes, wide.constants["w"].format) - 8 == signed).all()


def test_what_folding_loses_is_counted(tmp_path: Path) -> None:
    """Beside 1, 2^-16 becomes 448 * 2^-16 = 7 * 2^-10: an odd multiple of 2^-10, tied to 8 * 2^-10; an eighth of it, 2^-10, ties
    to 0. 1 / 16 becomes 28 and 3.5: nothing is lost."""
    source = model(tmp_path / "src", torch.tensor([[1.0, 2.0**-16], [1.0, 0.0625]] * (N // 2), dtype=torch.bfloat16))
    found = convert(source, tmp_path / "dst")
    assert (found.scales, found.zeroed) == (4 * N, N)


@pytest.mark.parametrize(("settings", "said"), [
    (config(group_size=32), "weights int4 group of 32 with inputs float8 token dynamic; supported: gemm_w4a8_fp8"),
    (config(symmetric=False), "with zero points"),
    (config(strategy="channel", group_size=None), "int4 channel with inputs float8 token dynamic"),
])
def test_what_w4a8_does_not_have_is_refused_first(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    source = model(tmp_path / "src", torch.ones(N, 2, dtype=torch.bfloat16), settings)
    with pytest.raises(SchemeError) as caught:
        convert(source, tmp_path / "dst")
    assert said in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_w4a8_source_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "src", torch.ones(N, 2, dtype=torch.bfloat16))
    convert(source, tmp_path / "dst")
    with pytest.raises(SchemeError, match="config group 'group_0' is gemm_w4a8_fp8; convert takes gemm_w4a16"):
        convert(tmp_path / "dst", tmp_path / "again")


def test_scales_that_bf16_does_not_hold_leave_nothing_behind(tmp_path: Path) -> None:
    source = model(tmp_path / "src", torch.full((N, 2), 1 + 2.0**-10))
    with pytest.raises(CheckpointError, match="bf16 does not hold all of its scales"):
        convert(source, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = model(tmp_path / "src", torch.ones(N, 2, dtype=torch.bfloat16))
    (tmp_path / "dst").mkdir()
    with pytest.raises(FileExistsError, match="convert writes a new folder"):
        convert(source, tmp_path / "dst")


def test_a_folder_without_packed_weights_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    save_file({"x": torch.ones(1)}, source / SINGLE)
    (source / "config.json").write_text(json.dumps(config()), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no tensor is named"):
        convert(source, tmp_path / "dst")




# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_says_what_folding_costs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = model(tmp_path / "src", torch.tensor([[1.0, 2.0**-16]] * N, dtype=torch.bfloat16))
    assert cli._main(["convert", str(source), str(tmp_path / "dst"), "--json", str(tmp_path / "c.json")]) == ExitCode.REACHED
    out, _ = capfd.readouterr()
    assert f"2 layers, {4 * N} group scales; every code is kept" in out
    assert f"{2 * N} scales become 0" in out
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["zeroed"] == 2 * N


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("src", "src"), ExitCode.NOT_WRITABLE, "convert writes a new folder"),
    (("nosuch", "dst"), ExitCode.BAD_INPUT, "config.json cannot be read"),
    (("wide", "dst"), ExitCode.BAD_INPUT, "int4 group of 32"),
    (("src", "file/dst"), ExitCode.NOT_WRITABLE, "cannot be written"),
])
def test_a_mistake_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, str], code: ExitCode, said: str
) -> None:
    model(tmp_path / "src", torch.ones(N, 2, dtype=torch.bfloat16))
    model(tmp_path / "wide", torch.ones(N, 2, dtype=torch.bfloat16), config(group_size=32))
    (tmp_path / "file").write_text("", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert cli._main(["convert", *(str(tmp_path / name) for name in arguments)]) == code
    _, err = capfd.readouterr()
    assert said in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
