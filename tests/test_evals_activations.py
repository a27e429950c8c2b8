"""Every activation recipe of the evals, to the bit: against the array twin of the contract's recipes, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.case import Tensor
from lowbit.conformance.evals.activations import (
    DTYPES,
    InputRule,
    codes_of,
    input_rule,
    input_tensors,
    recipe_name,
    torch_codes,
    values_of,
)
from lowbit.conformance.evals.checkpoint import QuantisedLinear
from lowbit.conformance.evals.schemes import Scheme
from lowbit.references.formats import BF16, E2M1, E4M3FN, F16, F32, INT4, UE4M3, Format, decode
from lowbit.references.recipes import RECIPES, quantise

FORMATS = pytest.mark.parametrize("out", [BF16, F16], ids=str)
K = 256
TOKEN = {"vllm_fp8_token", "vllm_fp8_tensor", "vllm_fp8_static", "xpu_int8_token"}
SINGLE = {"vllm_fp8_static": 0.00537109375, "compressed_tensors_nvfp4": 56.0}  # binary32 values


def rows(out: Format) -> np.ndarray[Any, Any]:
    """Values of `out` [M, K] in float64: random bit patterns (NaN, infinities and subnormals among them), rows of one size, rows
    of zeros of both signs, single large, tiny and infinite elements, and rows whose quotients are ties."""
    draw = np.random.Generator(np.random.PCG64(7))
    found = [decode(draw.integers(0, 1 << 16, (24, K)).astype(np.uint16), out)]
    for spread in (1e-3, 1.0, 300.0):
        found.append(decode(nearest(draw.normal(0, spread, (24, K)), out), out))
    for special in (0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-14, 2.0**-24, 57344.0):
        row = np.where(np.arange(K) % 7 == 0, special, draw.choice([-2.5, -0.25, 0.0, 0.75, 1.25, 5.0], K))
        found.append(row[None, :])
        found.append(np.full((1, K), special))
    ties = draw.integers(-30, 31, (16, K)) * 0.25
    ties[:, ::16] = 6.0
    ties[8:, ::16] = 7.0
    # Under the divisor 56 an amax of 7/64 has the block scale 1, and 1/56 is rounded up: 1/32 and 1/16 are ties of 1/56 and no
    # ties of what it is rounded to.
    row = np.where(np.arange(K) % 16 == 0, 7 / 64, (-1.0) ** np.arange(K) / np.where(np.arange(K) % 3, 32, 16))
    found.append(row[None, :] * 2.0 ** np.arange(-2, 3)[:, None])
    tiny = np.where(np.arange(K) % 5 == 0, 2.0**-124, 2.0**-125)  # amax / 7 is subnormal in binary32; zeros in binary16
    return np.concatenate([*found, ties, decode(nearest(tiny[None, :], out), out)]).astype(np.float64)


def nearest(values: np.ndarray[Any, Any], out: Format) -> np.ndarray[Any, Any]:
    """Codes of a 16-bit format beside the values, by torch's own conversion."""
    return torch.from_numpy(values).to(DTYPES[out]).view(torch.int16).numpy().view(np.uint16)


def tensor(values: np.ndarray[Any, Any], out: Format) -> torch.Tensor:
    return torch.from_numpy(values).to(DTYPES[out])


@FORMATS
@pytest.mark.parametrize("recipe", [
    "vllm_fp8_token", "vllm_fp8_tensor", "vllm_fp8_static", "vllm_fp8_group128", "xpu_int8_token", "compressed_tensors_nvfp4",
    "svdquant_nvfp4", "svdquant_int4", "nunchaku_int4",
])
def test_codes_and_scales_are_those_of_the_recipe(recipe: str, out: Format) -> None:
    x = rows(out)
    given = SINGLE.get(recipe)
    static = np.full((1, 1), given) if recipe == "vllm_fp8_static" else None
    shared = given if recipe == "compressed_tensors_nvfp4" else None
    # One scale for all elements: one NaN or infinity would be all that there is to see, so each row is a tensor of its own.
    parts = [x[i : i + 1] for i in range(len(x))] if recipe == "vllm_fp8_tensor" else [x]
    rule = InputRule(recipe, out, None if given is None else torch.tensor([given], dtype=torch.float32))
    for part in parts:
        want = quantise(part, out, RECIPES[recipe], static_scale=static, global_scale=shared)
        got = input_tensors(rule, tensor(part, out))
        scale = got["token_scale" if recipe in TOKEN else "a_scale"].numpy()
        assert np.array_equal(got["a"].numpy(), want.codes.view(np.uint8))
        expected = want.scales.view(scale.dtype)
        assert np.array_equal(same_nan(scale, out, recipe), same_nan(expected.reshape(scale.shape), out, recipe))


def same_nan(scale: np.ndarray[Any, Any], out: Format, recipe: str) -> np.ndarray[Any, Any]:
    """Scales with every NaN of a wide format as one code: which NaN it is nobody promises."""
    fmt = RECIPES[recipe].scale_format(out)
    patterns = scale.view(f"u{scale.dtype.itemsize}")
    nan = np.isnan(decode(patterns, fmt))
    return np.where(nan, 0, patterns.astype(np.int64)) - nan


def test_a_token_by_hand() -> None:
    # amax 7 / 448 = 2^-6; 0.109375 * 64 = 7; -1.0625 * 64 = -68 and 4.25 * 64 = 272 are ties of 64 and 72, 256 and 288: to even
    x = torch.tensor([[7.0, 0.109375, -1.0625, 4.25]], dtype=torch.bfloat16)
    got = input_tensors(InputRule("vllm_fp8_token", BF16), x)
    assert values_of(got["a"], E4M3FN).tolist() == [[448.0, 7.0, -64.0, 256.0]]
    assert values_of(got["token_scale"], F32).tolist() == [2.0**-6]


def test_int8_by_hand() -> None:
    # amax 127 -> scale 1; halves go to the even integer
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]], dtype=torch.bfloat16)
    got = input_tensors(InputRule("xpu_int8_token", BF16), x)
    assert got["a"].view(torch.int8).tolist() == [[127, 0, 2, -2, -127]]
    assert got["token_scale"].tolist() == [0x3F80]


def test_nvfp4_divisor_by_hand() -> None:
    # g = 16: amax 3 gives 16 * (3 / 6) = 8; elements over 8 / 16: 3 -> 6, 0.625 -> 1.25, a tie, to even 1, -0.125 -> -0.25 -> -0
    block = [3.0, 0.625, -0.125, 0.0] + [0.0] * 12
    rule = InputRule("compressed_tensors_nvfp4", BF16, torch.tensor([16.0]))
    got = input_tensors(rule, torch.tensor([block], dtype=torch.bfloat16))
    assert values_of(got["a"], E2M1).tolist()[0][:4] == [6.0, 1.0, -0.0, 0.0]
    assert values_of(got["a_scale"], UE4M3).tolist() == [[8.0]]


def test_int4_by_hand() -> None:
    # amax 14 / 7 = 2: 14 -> 7, 5 -> 2.5 -> 2, -3 -> -1.5 -> -2, -1 -> -0.5 -> 0
    row = [14.0, 5.0, -3.0, -1.0] + [0.0] * 60
    got = input_tensors(InputRule("svdquant_int4", F16), torch.tensor([row], dtype=torch.float16))
    assert decode(got["a"].numpy(), INT4).tolist()[0][:4] == [7.0, 2.0, -2.0, 0.0]
    assert got["a_scale"].tolist() == [[0x4000]]


def test_low_rank_projection_is_the_exact_sum_rounded_once() -> None:
    # 2^24 + 1 + 1 = 16777218 is a binary32 value; a binary32 sum of one term after the other stays at 2^24
    down = torch.tensor([[1.0]] * 16, dtype=torch.bfloat16)
    x = torch.tensor([[2.0**24, 1.0, 1.0] + [0.0] * 13], dtype=torch.bfloat16)
    got = input_tensors(InputRule("svdquant_nvfp4", BF16, None, down), x)
    assert values_of(got["lora_act"], F32).tolist() == [[16777218.0]]


SCHEMES = [
    (Scheme("g", "gemm_w4a16", "sym", "s", 128), BF16, ""),
    (Scheme("g", "gemm_w4a8_fp8", "folded", "s", 128), BF16, "vllm_fp8_token"),
    (Scheme("g", "gemm_w4a8_int8", "direct", "s", 128), BF16, "xpu_int8_token"),
    (Scheme("g", "gemm_w8a8_fp8", "scaled", "s", 0), BF16, "vllm_fp8_token"),
    (Scheme("g", "gemm_w8a8_fp8", "scaled", "s", 0, True, True, False, True), BF16, "vllm_fp8_tensor"),
    (Scheme("g", "gemm_w8a8_fp8", "scaled", "s", 0, True, True, True, True), BF16, "vllm_fp8_static"),
    (Scheme("g", "gemm_w8a8_fp8", "block", "s", 128), BF16, "vllm_fp8_group128"),
    (Scheme("g", "gemm_nvfp4", "plain", "s", 16), BF16, "compressed_tensors_nvfp4"),
    (Scheme("g", "gemm_nvfp4", "svdquant", "s", 16), BF16, "svdquant_nvfp4"),
    (Scheme("g", "gemm_int4", "f32", "s", 64), F16, "svdquant_int4"),
    (Scheme("g", "gemm_int4", "f32", "s", 64), BF16, "nunchaku_int4"),
]


@pytest.mark.parametrize(("scheme", "out", "recipe"), SCHEMES)
def test_the_recipe_of_a_scheme(scheme: Scheme, out: Format, recipe: str) -> None:
    assert recipe_name(QuantisedLinear("l", scheme, 8, 256, {}), out) == recipe


def test_a_static_scale_comes_from_the_checkpoint() -> None:
    static = Tensor(np.array([0.5], np.float32).view(np.uint32), F32)
    rule = input_rule(QuantisedLinear("l", SCHEMES[5][0], 8, 256, {}, static), BF16)
    assert rule.given is not None
    assert rule.given.tolist() == [0.5]
    with pytest.raises(ValueError, match=r"^l: its inputs have a static scale and none was given"):
        input_rule(QuantisedLinear("l", SCHEMES[5][0], 8, 256, {}), BF16)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs are torch.float32, the layer was prepared for torch.bfloat16"):
        input_tensors(InputRule("", BF16), torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"^l: gemm_x/plain takes no activations by any recipe"):
        recipe_name(QuantisedLinear("l", Scheme("g", "gemm_x", "plain", "s", 0), 8, 256, {}), BF16)


def test_activations_that_stay_are_their_bits() -> None:
    assert input_tensors(InputRule("", F16), torch.tensor([[1.0, -2.0]], dtype=torch.float16))["a"].tolist() == [
        [0x3C00, 0xC000 - 0x10000]]
    assert codes_of(torch.tensor([1.0])).tolist() == [0x3F800000]


@pytest.mark.parametrize("fmt", [E4M3FN, UE4M3, E2M1, INT4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_are_those_of_the_formats(fmt: Format, dtype: torch.dtype) -> None:
    every = np.arange(1 << fmt.bits, dtype=np.uint8)
    got = values_of(torch_codes(every), fmt, dtype)
    assert got.dtype is dtype
    assert np.array_equal(got.double().numpy(), decode(every, fmt), equal_nan=True)
