"""Recipes on plain weights: codes against the contract's array twin, low rank by construction, refusals that help."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.evals.activations import DTYPES
from lowbit.conformance.evals.arms import ReferenceArm, problem_of
from lowbit.conformance.evals.checkpoint import QuantisedLinear
from lowbit.conformance.evals.quantise import (
    RECIPES,
    RecipeError,
    input_maxima,
    low_rank,
    quantise_linear,
    refusal,
)
from lowbit.references.encodings import fold_scales
from lowbit.references.formats import BF16, E2M1, F16, F32, UE4M3, Format, decode
from lowbit.references.recipes import RECIPES as CONTRACT
from lowbit.references.recipes import global_scale_of, quantise

N, K = 40, 256
FORMATS = pytest.mark.parametrize("out", [BF16, F16], ids=str)


def weights(out: Format) -> torch.Tensor:
    """Bell-shaped weights with one row of one size, one row of ties, one group of zeros and outliers."""
    draw = np.random.Generator(np.random.PCG64(3))
    found = draw.normal(0, 0.03, (N, K))
    found[1] = 0.5
    found[2] = np.arange(K) % 15 - 7.5
    found[3, :128] = 0.0
    found[:, 40] *= 25
    return torch.from_numpy(found).to(DTYPES[out])


def exactly(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    return weight.double().numpy()


def made(recipe: str, out: Format, **named: Any) -> QuantisedLinear:
    return quantise_linear(RECIPES[recipe], "m.up", weights(out), out, **named)


@FORMATS
def test_int4_codes_are_those_of_the_contract(out: Format) -> None:
    want = quantise(exactly(weights(out)), out, CONTRACT["vllm_uint4b8"])
    zero = want.undefined  # a group of zeros: any code is right
    for recipe, scale in (("w4a16", "scale"), ("w4a8-int8", "group_scale")):
        found = made(recipe, out)
        assert np.array_equal(found.constants["w"].codes[~zero], want.codes[~zero])
        assert np.array_equal(found.constants[scale].codes, want.scales)
        assert found.constants[scale].format is out


def test_int4_by_hand() -> None:
    # max 7 / 7 = 1, |min| 4 / 8 = 0.5: scale 1, codes value + 8; halves to even
    row = [7.0, -4.0, 0.5, 1.5] + [0.0] * 124
    found = quantise_linear(RECIPES["w4a16"], "x", torch.tensor([row] * 8, dtype=torch.bfloat16), BF16)
    assert found.constants["scale"].codes[0].tolist() == [0x3F80]
    assert found.constants["w"].codes[0, :5].tolist() == [15, 4, 8, 10, 8]


def test_groups_of_64() -> None:
    want = quantise(exactly(weights(BF16)), BF16, replace(CONTRACT["vllm_uint4b8"], block_k=64))
    assert np.array_equal(made("w4a16-g64", BF16).constants["scale"].codes, want.scales)
    assert str(made("w4a8-fp8-g64", F16).problem(1, F16)) == f"gemm_w4a8_fp8/folded/m1n{N}k{K}g64/f16"


@FORMATS
def test_w4a8_folds_the_same_codes(out: Format) -> None:
    want = quantise(exactly(weights(out).to(torch.bfloat16)), BF16, CONTRACT["vllm_int4"])
    found = made("w4a8-fp8", out)
    groups, channels = fold_scales(want.scales)
    assert np.array_equal(found.constants["w"].codes[~want.undefined], want.codes[~want.undefined])
    assert np.array_equal(found.constants["group_scale"].codes, groups)
    assert np.array_equal(found.constants["channel_scale"].codes, channels.reshape(-1))


@FORMATS
def test_fp8_weights_per_channel(out: Format) -> None:
    want = quantise(exactly(weights(out)), out, CONTRACT["vllm_fp8_token"])
    found = made("w8a8-fp8", out)
    assert np.array_equal(found.constants["w"].codes, want.codes)
    assert np.array_equal(found.constants["channel_scale"].codes, want.scales.reshape(-1))
    assert found.input_scale is None


@FORMATS
def test_nvfp4_has_two_levels(out: Format) -> None:
    x = exactly(weights(out))
    shared = CONTRACT["compressed_tensors_nvfp4"]
    want, divisor = quantise(x, out, shared), float(decode(global_scale_of(x, shared), F32))
    assert divisor == float(np.float32(2688.0) / np.float32(np.abs(x).max()))
    found = made("nvfp4", out, input_amax=21.0)  # 2688 / 21 = 128
    assert np.array_equal(found.constants["w"].codes, want.codes)
    assert np.array_equal(found.constants["w_scale"].codes, want.scales)
    assert found.input_scale is not None
    assert decode(found.input_scale.codes, F32).tolist() == [128.0]
    alpha = float(np.float32(1) / (np.float32(128) * np.float32(divisor)))
    assert decode(found.constants["alpha"].codes, F32).tolist() == [alpha]
    plain = made("nvfp4", out)
    assert plain.input_scale is not None
    assert decode(plain.input_scale.codes, F32).tolist() == [1.0]


@FORMATS
@pytest.mark.parametrize("recipe", ["svdquant", "int4-lora"])
def test_a_low_rank_layer_quantises_the_residual(recipe: str, out: Format) -> None:
    found = made(recipe, out)
    up, down = (decode(found.constants[name].codes, out) for name in ("lora_up", "lora_down"))
    assert (up.shape, down.shape) == ((N, 32), (K, 32))
    residual = torch.from_numpy(exactly(weights(out)) - up @ down.T).float().to(DTYPES[out])
    name = "compressed_tensors_nvfp4" if recipe == "svdquant" else "svdquant_int4" if out is F16 else "nunchaku_int4"
    want = quantise(exactly(residual), out, CONTRACT[name])
    assert np.array_equal(found.constants["w"].codes, want.codes)
    assert np.array_equal(found.constants["w_scale"].codes, want.scales)
    assert set(found.constants["channel_scale"].codes.tolist()) == {0x3F80 if out is BF16 else 0x3C00}
    text = {"svdquant": f"gemm_nvfp4/svdquant/m2n{N}k{K}r32", "int4-lora": f"gemm_int4/f32/m2n{N}k{K}r32"}[recipe]
    assert str(problem_of(found, 2, out)).startswith(text)


@pytest.mark.parametrize("shape", [(64, 160), (160, 64)])
def test_low_rank_takes_the_largest_singular_pairs(shape: tuple[int, int]) -> None:
    """W of known singular values 64, 32, .., on axes: rank 2 leaves 16 as the largest that is left."""
    w = torch.zeros(shape)
    for place in range(5):
        w[place + 3, 2 * place + 1] = 64.0 / 2**place
    up, down, rest = low_rank(w, 2, torch.bfloat16)
    assert (up.shape, down.shape, rest.shape) == ((shape[0], 2), (shape[1], 2), shape)
    kept = up.double() @ down.double().T
    assert kept[3, 1] == 64
    assert kept[4, 3] == 32
    assert float(rest.abs().max()) == 16
    assert torch.equal(kept.float() + rest, w)


def test_known_low_rank_factors_are_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(matrix: torch.Tensor) -> None:
        raise AssertionError("worked out again")

    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    first = quantise_linear(RECIPES["svdquant"], "l", w, BF16, factors=factors)
    monkeypatch.setattr(torch.linalg, "eigh", refused)
    again = quantise_linear(RECIPES["svdquant"], "l", w, BF16, factors=factors)
    assert list(factors) == ["l"]
    assert first.constants.keys() == again.constants.keys()
    assert all(np.array_equal(first.constants[name].codes, held.codes) for name, held in again.constants.items())
    with pytest.raises(AssertionError, match="worked out again"):
        quantise_linear(RECIPES["svdquant"], "another", w, BF16, factors=factors)


def test_low_rank_beyond_the_matrix_is_zeros() -> None:
    w = torch.from_numpy(np.random.Generator(np.random.PCG64(1)).normal(0, 1, (8, 128)))
    up, down, rest = low_rank(w, 16, torch.bfloat16)
    assert (up.shape, down.shape) == ((8, 16), (128, 16))
    assert not up[:, 8:].any()
    assert not down[:, 8:].any()
    assert float(rest.abs().max()) < 2.0**-5  # what rounding to 8 bits leaves of values below 4


@FORMATS
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_of_every_recipe_is_near_the_plain_one(recipe: str, out: Format) -> None:
    """The mean square error of D stays under what the weight and activation formats admit (4 bits: 2 %, e4m3: 0.2 %)."""
    draw = np.random.Generator(np.random.PCG64(5))
    weight = torch.from_numpy(draw.normal(0, 0.03, (64, 256))).to(DTYPES[out])
    x = torch.from_numpy(draw.normal(0, 1.0, (16, 256))).to(DTYPES[out])
    arm = ReferenceArm()
    layer = arm.prepare(quantise_linear(RECIPES[recipe], "x", weight, out, input_amax=4.0), out, torch.device("cpu"))
    exact = x.double() @ weight.double().T
    error = float(((arm.run(layer, x).double() - exact) ** 2).mean() / (exact**2).mean())
    limit = 0.002 if recipe == "w8a8-fp8" else 0.05 if recipe in ("nvfp4", "svdquant", "int4-lora") else 0.02
    assert 0 < error < limit


def test_sizes_that_do_not_fit_name_what_does() -> None:
    with pytest.raises(RecipeError) as caught:
        quantise_linear(RECIPES["w4a16"], "model.layers.0.q_proj", torch.zeros(576, 576), BF16)
    text = str(caught.value)
    assert text.startswith("model.layers.0.q_proj: weights [576, 576] do not fit recipe w4a16: gemm_w4a16/sym/m1n576k576g128/")
    fitting = "w4a16-g64, w4a8-fp8-g64, w8a8-fp8, nvfp4, svdquant, int4-lora"
    assert text.endswith(f"(clause W4A16-1); choose one that fits ({fitting}) or ignore the layer")
    with pytest.raises(RecipeError, match=r"do not fit recipe nvfp4: .*; ignore the layer$"):
        quantise_linear(RECIPES["nvfp4"], "x", torch.zeros(7, 33), BF16)
    assert refusal(RECIPES["w4a16"], 576, 640, BF16) is None


def test_weights_that_are_no_numbers_are_refused() -> None:
    weight = torch.zeros(8, 128)
    weight[2, 5], weight[3, 1] = float("nan"), float("inf")
    with pytest.raises(RecipeError, match=r"^layer: 2 of 1024 weights are not finite; load the model in bfloat16$"):
        quantise_linear(RECIPES["w4a16"], "layer", weight, BF16)


def test_calibrated_inputs() -> None:
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2)
    first.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, -5.0]]))

    def run() -> None:
        second(first(torch.tensor([[1.0, -2.0]])))
        second(first(torch.zeros(0, 2)))
        second(first(torch.tensor([[-1.5, 0.0]])))

    assert input_maxima(torch.nn.Sequential(first, second, torch.nn.Linear(2, 2)), run) == {"0": 2.0, "1": 10.0}
    assert not first._forward_pre_hooks


def test_formats_of_the_constants() -> None:
    found = made("nvfp4", BF16).constants
    assert [found[name].format for name in ("w", "w_scale", "alpha")] == [E2M1, UE4M3, F32]
