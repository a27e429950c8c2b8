"""The embedded model as stored checkpoints: W4A16, and the W4A8 that `lowbit convert` derives from it. Single Linears, judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowbit.conformance.backend import find_backend
from lowbit.conformance.case import Problem
from lowbit.conformance.evals.arms import Arm, ReferenceArm
from lowbit.conformance.evals.backend_arm import BackendArm
from lowbit.conformance.evals.checkpoint import CheckpointError, open_checkpoint
from lowbit.conformance.evals.convert import convert
from lowbit.conformance.evals.models import Feed, Loaded, Source, answer_logits, load, source
from lowbit.conformance.evals.operations import judge_operations
from lowbit.conformance.evals.paired import Outcome
from lowbit.conformance.evals.quantise import RECIPES, quantise_linear
from lowbit.conformance.evals.records import Operation
from lowbit.conformance.evals.runner import evaluate
from lowbit.conformance.evals.swap import empty_linears, stored_bias, swap
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


# One Linear on its own ------------------------------------------------------------------------------------------------

DRAW = torch.Generator().manual_seed(9)
X = torch.randn(128, 256, generator=DRAW).to(torch.bfloat16)
PLAIN = {"qkv_proj.weight": torch.randn(384, 256, generator=DRAW).to(torch.bfloat16)}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
SPLIT = {"quantization_config": {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": [],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": FP8 | {"strategy": "channel", "dynamic": False},
        "input_activations": FP8 | {"strategy": "token", "dynamic": True},
    }},
}}


def shards(*, without: str = "") -> dict[str, torch.Tensor]:
    """q, k and v in fp8, each with a bias that is not small; `without`: the name of a tensor that is left out."""
    found: dict[str, torch.Tensor] = {}
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        found[f"{name}.weight"] = PLAIN["qkv_proj.weight"][128 * number :][:128].to(torch.float8_e4m3fn)
        found[f"{name}.weight_scale"] = torch.full((128, 1), 0.125, dtype=torch.bfloat16)
        found[f"{name}.bias"] = torch.arange(128).to(torch.bfloat16) + 1000 * number
    return {name: tensor for name, tensor in found.items() if name != without}


def written(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], recipe: str = "") -> Source:
    """A checkpoint of these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Source(folder, open_checkpoint(folder), RECIPES.get(recipe), torch.bfloat16, "cpu")


def judged(given: Source, arm: Arm, *, bias: bool = False, closely: bool = False) -> Operation:
    """A model of one fused Linear, by the reference and by an arm."""
    loaded = []
    for each in (ReferenceArm(), arm):
        with empty_linears():
            model = torch.nn.ModuleDict({"qkv_proj": torch.nn.Linear(256, 384, bias=bias, dtype=torch.bfloat16)})
        loaded.append(Loaded(model, swap(model, each, checkpoint=given.checkpoint, recipe=given.recipe)))
    inputs, folder = {"qkv_proj": X.clone()}, given.folder / "first"
    reference, backend = loaded
    (found,) = judge_operations(given, reference, backend, arm, inputs, folder, closely=closely)
    assert torch.equal(inputs["qkv_proj"], X)
    assert any(folder.glob("*.safetensors")) == (found.outside > 0)
    return found


class Cpu:
    """The cpu backend, spoilt: `zeroes` its activations in place before it reads them; `most` rows are computed."""

    name, target = "spoilt", "cpu"

    def __init__(self, *, zeroes: bool = False, most: int = 128) -> None:
        self.inner: Any = find_backend("cpu")
        self.zeroes, self.most = zeroes, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def stage(self, problem: Problem, tactic: str, inputs: Any) -> Any:
        if self.zeroes:
            inputs["a"].memory[...] = 0
        return self.inner.stage(problem, tactic, inputs)

    def run(self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Any, workspace: Any, stream: Any) -> str:
        kernel: str = self.inner.run(problem, tactic, state, inputs, outputs, workspace, stream)
        outputs["d"].memory[self.most :] = 0
        return kernel


def test_one_row_and_blocks_are_judged(tmp_path: Path) -> None:
    given = written(tmp_path, PLAIN, {}, "w4a16")
    found = judged(given, BackendArm(Cpu()))
    assert (found.outputs, found.outside) == ((1 + 16 + 128) * 384, 0)
    found = judged(given, BackendArm(Cpu(most=100)))
    assert found.outputs == (1 + 16 + 128) * 384
    assert found.outside >= 28 * 380  # an interval may hold a zero, few do
    assert judged(given, BackendArm(Cpu()), closely=True).outputs == (1 + 5 + 16 + 67 + 128) * 384


def test_a_kernel_that_destroys_its_inputs_is_judged_by_what_it_was_given(tmp_path: Path) -> None:
    found = judged(written(tmp_path, PLAIN, {}, "w4a16"), BackendArm(Cpu(zeroes=True)))
    assert found.outside >= found.outputs * 95 // 100
    assert found.differing >= 0.95


def test_the_biases_of_fused_shards_belong_to_the_operation(tmp_path: Path) -> None:
    given = written(tmp_path, shards(), SPLIT)
    found = judged(given, BackendArm("cpu"), bias=True)
    assert found.problem.endswith("bf16.bias")
    assert (found.outputs, found.outside) == ((1 + 16 + 128) * 384, 0)
    bias = stored_bias(given.checkpoint, "qkv_proj", torch.bfloat16)
    assert bias is not None
    wanted = [1000 * number + place for number in range(3) for place in range(128)]
    assert torch.equal(torch.from_numpy(bias.codes.view("int16")).view(torch.bfloat16), torch.tensor(wanted).to(torch.bfloat16))
    assert stored_bias(given.checkpoint, "gate_up_proj", torch.bfloat16) is None


def test_shards_of_which_one_lacks_its_bias_are_refused(tmp_path: Path) -> None:
    given = written(tmp_path, shards(without="k_proj.bias"), SPLIT)
    with pytest.raises(CheckpointError, match=r"tensor k_proj\.bias is in none of its files"):
        judged(given, BackendArm("cpu"), bias=True)


def test_as_many_threads_as_there_are_find_the_same(tmp_path: Path) -> None:
    given, before = written(tmp_path, PLAIN, {}, "w4a16"), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(judged(given, BackendArm(Cpu(most=100)), closely=True))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert found[0].outside > 0
