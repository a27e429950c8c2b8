"""The embedded model as stored checkpoints: W4A16, and the W4A8 that `lowbit convert` derives from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.conformance.evals.arms import ReferenceArm
from lowbit.conformance.evals.convert import convert
from lowbit.conformance.evals.models import Feed, answer_logits, load, source
from lowbit.conformance.evals.paired import Outcome
from lowbit.conformance.evals.quantise import RECIPES, quantise_linear
from lowbit.conformance.evals.runner import evaluate
from lowbit.conformance.evals.tasks import EMBEDDED
from lowbit.references.formats import BF16

CONFIG = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None,
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "actorder": None},
    }},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every Linear packed, eight codes to a word, the first in its lowest bits."""
    folder = tmp_path_factory.mktemp("stored") / "w4a16"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("data", "provenance.json"))
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(str(EMBEDDED / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)
            if not name.endswith("proj.weight"):
                tensors[name] = tensor
                continue
            layer = name.removesuffix(".weight")
            linear = quantise_linear(RECIPES["w4a16"], layer, tensor, BF16)
            codes = torch.from_numpy(linear.constants["w"].codes).long().reshape(linear.n, -1, 8)
            words = (codes << torch.arange(0, 32, 4)).sum(-1)
            scale = torch.from_numpy(linear.constants["scale"].codes.view("int16").copy()).view(torch.bfloat16)
            tensors[f"{layer}.weight_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
            tensors[f"{layer}.weight_scale"] = scale
            tensors[f"{layer}.weight_shape"] = torch.tensor([linear.n, linear.k])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}), encoding="utf-8")
    return folder


def logits(folder: Path, recipe: str) -> torch.Tensor:
    model = load(source(folder, recipe, "bfloat16", "cpu"), ReferenceArm()).model
    return answer_logits(model, [0, *range(20, 60)], list(range(100, 112)), Feed.WHOLE)


def test_stored_codes_compute_what_the_recipe_computes(stored: Path) -> None:
    assert torch.equal(logits(stored, ""), logits(EMBEDDED, "w4a16"))


def test_the_derived_checkpoint_serves(stored: Path, tmp_path: Path) -> None:
    convert(stored, tmp_path / "w4a8")
    found = evaluate(str(tmp_path / "w4a8"), "cpu", out=tmp_path / "run", base=EMBEDDED, limit=2, texts=2, batch=2)
    assert found.kernel.outcome is Outcome.SERVES
    assert {operation.problem.split("/")[0] for operation in found.kernel.operations} == {"gemm_w4a8_fp8"}
    assert found.tasks[0].recipe is not None
    assert not any("--base" in sentence for sentence in found.missing)
    without = evaluate(str(stored), "cpu", out=tmp_path / "without", limit=2, texts=2, batch=2)
    assert without.tasks[0].recipe is None
    assert any("--base" in sentence for sentence in without.missing)
