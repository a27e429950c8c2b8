"""Models whose Linears are replaced: which, from where, with what memory, and one sentence for what cannot be."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowbit.conformance.case import Tensor
from lowbit.conformance.evals.arms import ArmError, ReferenceArm
from lowbit.conformance.evals.backend_arm import BackendArm
from lowbit.conformance.evals.checkpoint import SINGLE, Checkpoint, CheckpointError, QuantisedLinear, open_checkpoint
from lowbit.conformance.evals.faults import FaultyArm
from lowbit.conformance.evals.linear import ContractLinear, Recorder
from lowbit.conformance.evals.quantise import RECIPES, RecipeError, quantise_linear
from lowbit.conformance.evals.schemes import Scheme
from lowbit.conformance.evals.swap import empty_linears, fuse, load_rest, swap
from lowbit.references.formats import BF16, E4M3FN, F32, decode

H, F, V = 128, 256, 32
STATIC = Scheme("g", "gemm_w8a8_fp8", "scaled", "float-quantized", 0, True, True, True, True)


class Attention(torch.nn.Module):
    """q, k and v beside each other, or stacked as qkv_proj."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv_proj = torch.nn.Linear(H, 3 * H, bias=True, dtype=torch.bfloat16)
        else:
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(H, H, bias=True, dtype=torch.bfloat16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            found: torch.Tensor = self.qkv_proj(x)
            return found
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


class Model(torch.nn.Module):
    """A stand-in for a transformer: embedding, one attention's projections, an MLP, a norm's weight and a head."""

    def __init__(self, fused: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(V, H, dtype=torch.bfloat16)
        self.attn = Attention(fused)
        self.up_proj = torch.nn.Linear(3 * H, F, bias=False, dtype=torch.bfloat16)
        self.down_proj = torch.nn.Linear(F, H, bias=False, dtype=torch.bfloat16)
        self.norm = torch.nn.Parameter(torch.ones(H, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.arange(4.0), persistent=False)
        self.lm_head = torch.nn.Linear(H, V, bias=False, dtype=torch.bfloat16)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lm_head(self.down_proj(self.up_proj(self.attn(self.embed(ids)))) * self.norm)
        return found


LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "up_proj", "down_proj")
IDS = torch.arange(V).reshape(4, 8)


def seeded(**named: bool) -> Model:
    torch.manual_seed(3)
    return Model(**named)


def config(**weights: Any) -> dict[str, Any]:
    """W4A16 in groups of 128 unless told otherwise."""
    given = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": given, "input_activations": None}
    return {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }}


def stored(linear: QuantisedLinear) -> dict[str, torch.Tensor]:
    """A W4A16 layer as compressed-tensors stores it: element i of a word in bits 4 i to 4 i + 3."""
    codes = linear.constants["w"].codes.astype(np.uint32).reshape(linear.n, -1, 8)
    words = sum((codes[:, :, i] << np.uint32(4 * i) for i in range(8)), np.zeros(codes.shape[:2], np.uint32))
    scales = linear.constants["scale"].codes.view(np.int16)
    return {
        "weight_packed": torch.from_numpy(words.view(np.int32)), "weight_shape": torch.tensor([linear.n, linear.k]),
        "weight_scale": torch.from_numpy(scales.copy()).view(torch.bfloat16),
    }


def written(folder: Path, tensors: Mapping[str, torch.Tensor], found: Mapping[str, Any]) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(found), encoding="utf-8")
    return open_checkpoint(folder)


def quantised(folder: Path, model: Model, *, leave: str = "", **weights: Any) -> Checkpoint:
    """The model as a W4A16 checkpoint; `leave`: a layer that is left out."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or not tied(model)}
    for name in LINEARS:
        weight = tensors.pop(f"{name}.weight")
        if name != leave:
            made = quantise_linear(RECIPES["w4a16"], name, weight, BF16)
            tensors |= {f"{name}.{key}": tensor for key, tensor in stored(made).items()}
    return written(folder, tensors, config(**weights))


def tied(model: Model) -> bool:
    return model.lm_head.weight is model.embed.weight


# What is replaced -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_replaces_all_but_the_head(recipe: str) -> None:
    model = seeded(tied=False)
    plain = model(IDS)
    summary = swap(model, ReferenceArm(), recipe=RECIPES[recipe])
    assert tuple(layer.name for layer in summary.layers) == LINEARS
    assert summary.kept == ("lm_head",)
    assert summary.ops == {f"{RECIPES[recipe].op}/{RECIPES[recipe].variant}": 5}
    assert [layer.bytes_before for layer in summary.layers] == [2 * (H * H + H)] * 3 + [2 * 3 * H * F, 2 * F * H]
    assert all(isinstance(model.get_submodule(name), ContractLinear) for name in LINEARS)
    found = model(IDS)
    assert found.shape == plain.shape
    correlation = float(np.corrcoef(found.float().detach().numpy().reshape(-1), plain.float().detach().numpy().reshape(-1))[0, 1])
    assert correlation > 0.97


def test_weights_take_little_more_than_a_byte() -> None:
    summary = swap(seeded(), ReferenceArm(), recipe=RECIPES["w4a8-fp8"])
    assert [(layer.n, layer.k) for layer in summary.layers] == [(H, H)] * 3 + [(F, 3 * H), (H, F)]
    # codes, binary32 channel scales, binary32 biases of the first three
    assert [layer.bytes_after for layer in summary.layers] == [H * H + 8 * H] * 3 + [3 * H * F + 4 * F, F * H + 4 * H]
    text = "reference: 5 as gemm_w4a8_fp8/folded; 0.3 MiB of weights became 0.2 MiB; 1 kept"
    assert str(summary) == text.replace("0.3", f"{(6 * H * H + 6 * H + 6 * H * F + 2 * F * H) / 2**20:.1f}")


def test_the_original_goes_before_the_next_is_read() -> None:
    """An arm that looks at how many original weights are alive when it is called."""
    model = seeded()
    alive = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
    seen: list[int] = []

    class Watching:
        name = "watching"

        def prepare(self, linear: QuantisedLinear, *rest: Any) -> Any:
            gc.collect()
            seen.append(sum(ref() is not None for ref in alive))
            return ReferenceArm().prepare(linear, *rest)

        def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("nothing is computed")

        def declare(self, problem: Any) -> Any:
            raise AssertionError("nothing is judged")

    swap(model, Watching(), recipe=RECIPES["w4a16"])
    gc.collect()
    assert seen == [5, 4, 3, 2, 1]
    assert sum(ref() is not None for ref in alive) == 0


def test_tied_embeddings_stay() -> None:
    model = seeded(tied=True)
    summary = swap(model, ReferenceArm(), recipe=RECIPES["w8a8-fp8"], ignore=())
    assert summary.kept == ("lm_head",)
    assert tied(model)
    model = seeded(tied=False)
    assert swap(model, ReferenceArm(), recipe=RECIPES["w8a8-fp8"], ignore=("attn.q_proj",)).kept == ("attn.q_proj",)


def recorder(taps: dict[str, torch.Tensor]) -> Recorder:
    def see(layer: str, x: torch.Tensor, y: torch.Tensor) -> None:
        taps[layer] = y

    return see


def test_arms_differ_only_where_a_fault_is() -> None:
    outputs = []
    for arm in (ReferenceArm(), BackendArm("cpu"), FaultyArm(ReferenceArm(), "scale_group", "up_proj")):
        model = seeded()
        swap(model, arm, recipe=RECIPES["w4a16"])
        taps: dict[str, torch.Tensor] = {}
        for name in LINEARS:
            module = model.get_submodule(name)
            assert isinstance(module, ContractLinear)
            module.recorder = recorder(taps)
        model(IDS)
        outputs.append(taps)
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in LINEARS)
    differing = [name for name in LINEARS if not torch.equal(outputs[0][name], outputs[2][name])]
    assert differing == ["up_proj", "down_proj"]  # the layer and what follows it


# From checkpoints -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_the_same_model_as_its_recipe(tmp_path: Path) -> None:
    first = seeded()
    checkpoint = quantised(tmp_path, first)
    swap(first, ReferenceArm(), recipe=RECIPES["w4a16"])
    with empty_linears():
        second = Model()
    assert second.up_proj.weight.is_meta
    summary = swap(second, ReferenceArm(), checkpoint=checkpoint)
    assert load_rest(second, checkpoint) == 2  # embedding and norm; the head is tied, the steps are not persistent
    assert not any(tensor.is_meta for tensor in second.state_dict().values())
    assert torch.equal(first(IDS), second(IDS))
    again = summary.linear("up_proj")
    assert np.array_equal(again.constants["w"].codes, checkpoint.linear("up_proj", again.scheme, BF16).constants["w"].codes)


def test_a_head_of_its_own_is_loaded(tmp_path: Path) -> None:
    first = seeded(tied=False)
    checkpoint = quantised(tmp_path, first)
    with empty_linears():
        second = Model(tied=False)
    swap(second, ReferenceArm(), checkpoint=checkpoint)
    assert load_rest(second, checkpoint) == 3
    assert torch.equal(second.lm_head.weight, first.lm_head.weight)
    torch.nn.Linear(2, 2).weight.sum().item()  # outside, Linears have memory again


def test_plain_weights_from_files(tmp_path: Path) -> None:
    first = seeded()
    tensors = {name: tensor for name, tensor in first.state_dict().items() if name != "lm_head.weight"}
    checkpoint = written(tmp_path, tensors, {})
    with empty_linears():
        second = Model()
    summary = swap(second, ReferenceArm(), recipe=RECIPES["int4-lora"], checkpoint=checkpoint)
    load_rest(second, checkpoint)
    held = swap(first, ReferenceArm(), recipe=RECIPES["int4-lora"])
    assert torch.equal(first(IDS), second(IDS))
    assert summary.linear("up_proj").n == F
    with pytest.raises(RecipeError, match=r"^up_proj: its plain weights are gone from the model; give the checkpoint"):
        held.linear("up_proj")


def test_shards_of_a_fused_module_are_stacked(tmp_path: Path) -> None:
    first = seeded()
    checkpoint = quantised(tmp_path, first)
    swap(first, ReferenceArm(), recipe=RECIPES["w4a16"])
    with empty_linears():
        second = Model(fused=True)
    swap(second, ReferenceArm(), checkpoint=checkpoint)
    load_rest(second, checkpoint)
    assert isinstance(second.attn.qkv_proj, ContractLinear)
    assert torch.equal(first(IDS), second(IDS))


def shard(name: str, n: int, scale: float, **named: Any) -> QuantisedLinear:
    """fp8 weights of 1 with one scale per tensor and a static input scale of 0.5."""
    constants = {"w": Tensor(np.full((n, 32), 0x38, np.uint8), E4M3FN), "channel_scale": single(scale)}
    return replace(QuantisedLinear(name, STATIC, n, 32, constants, single(0.5)), **named)


def single(value: float) -> Tensor:
    return Tensor(np.array([value], np.float32).view(np.uint32), F32)


def test_unequal_shard_scales_become_one_per_channel() -> None:
    found = fuse("qkv_proj", [shard("q", 16, 0.25), shard("k", 8, 0.5), shard("v", 8, 0.25)])
    assert (found.n, found.k, found.scheme) == (32, 32, replace(STATIC, per_tensor=False))
    assert decode(found.constants["channel_scale"].codes, F32).tolist() == [0.25] * 16 + [0.5] * 8 + [0.25] * 8
    assert str(found.problem(1, BF16)) == "gemm_w8a8_fp8/scaled/m1n32k32/bf16.atensor"
    layer = ReferenceArm().prepare(found, BF16, torch.device("cpu"))
    x = torch.ones(2, 32, dtype=torch.bfloat16)  # 1 / 0.5 = 2; 32 * 2 * 0.5 = 32, times the channel scale
    assert ReferenceArm().run(layer, x).tolist() == [[8.0] * 16 + [16.0] * 8 + [8.0] * 8] * 2


def test_equal_shard_scales_stay_one() -> None:
    found = fuse("qkv_proj", [shard("q", 16, 0.25), shard("k", 8, 0.25)])
    assert found.scheme == STATIC
    assert found.constants["channel_scale"].codes.size == 1


def test_shards_that_share_what_the_op_holds_once() -> None:
    with pytest.raises(CheckpointError, match=r"^p: its shards have different input scales; quantise them with one, or keep"):
        fuse("p", [shard("q", 8, 0.5), shard("k", 8, 0.5, input_scale=single(0.25))])
    with pytest.raises(CheckpointError, match=r"^p: its shards have different schemes"):
        fuse("p", [shard("q", 8, 0.5), shard("k", 8, 0.5, k=64)])
    made = [quantise_linear(RECIPES["nvfp4"], "x", torch.full((8, 32), value), BF16) for value in (1.0, 3.0)]
    with pytest.raises(CheckpointError, match=r"^p: its shards have different global scales"):
        fuse("p", made)
    assert fuse("p", [made[0], made[0]]).n == 16
    block = Scheme("g", "gemm_w8a8_fp8", "block", "float-quantized", 128)
    with pytest.raises(CheckpointError, match=r"^p: rows \[8, 8\] of its shards cut blocks of 128"):
        fuse("p", [shard("q", 8, 0.5, scheme=block), shard("k", 8, 0.5, scheme=block)])


# What is refused ------------------------------------------------------------------------------------------------------------


def test_a_missing_layer_is_one_sentence(tmp_path: Path) -> None:
    checkpoint = quantised(tmp_path, seeded(), leave="up_proj")
    with pytest.raises(CheckpointError, match=r": up_proj is in none of its files; take the configuration of this model$"):
        swap(seeded(), ReferenceArm(), checkpoint=checkpoint)


def test_a_layer_stored_plain_is_one_sentence(tmp_path: Path) -> None:
    model = seeded()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    checkpoint = written(tmp_path, tensors, config())
    with pytest.raises(CheckpointError, match=r"^attn.q_proj is stored without weight_scale, though .*; add it to `ignore`$"):
        swap(model, ReferenceArm(), checkpoint=checkpoint)


def test_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = quantised(tmp_path, seeded())
    other = seeded()
    other.up_proj = torch.nn.Linear(F, F, bias=False, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"^up_proj: the checkpoint has weights \[256, 384\], the model \[256, 256\]; take"):
        swap(other, ReferenceArm(), checkpoint=checkpoint)
    other = seeded()
    other.norm = torch.nn.Parameter(torch.ones(3))
    swap(other, ReferenceArm(), checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r"^norm has shape \[128\] in the checkpoint, \[3\] in the model$"):
        load_rest(other, checkpoint)
    other = seeded()
    other.extra = torch.nn.Parameter(torch.ones(3))
    swap(other, ReferenceArm(), checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=r": extra is in none of its files; take the configuration of this model$"):
        load_rest(other, checkpoint)


def test_dtypes_recipes_and_arms_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"^attn.q_proj: the model is float32, expected bfloat16 or float16; load"):
        swap(seeded().float(), ReferenceArm(), recipe=RECIPES["w4a16"])
    with pytest.raises(RecipeError, match=r"^neither checkpoint nor recipe was given"):
        swap(seeded(), ReferenceArm())
    odd = torch.nn.Sequential(torch.nn.Linear(100, 8, dtype=torch.bfloat16))
    with pytest.raises(RecipeError, match=r"^0: weights \[8, 100\] do not fit recipe w4a16"):
        swap(odd, ReferenceArm(), recipe=RECIPES["w4a16"])
    with pytest.raises(ArmError, match=r"^attn.q_proj: gemm_w4a16 has no two scale groups along K; name a layer"):
        swap(seeded(), FaultyArm(ReferenceArm(), "scale_group", "attn.q_proj"), recipe=RECIPES["w4a16"])
    with empty_linears():
        empty = Model()
    with pytest.raises(RecipeError, match=r"^attn.q_proj: its plain weights are gone from the model"):
        swap(empty, ReferenceArm(), recipe=RECIPES["w4a16"])
