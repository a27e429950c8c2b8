"""Plain weights to the constants of an op, one layer at a time: the named recipes of `--recipe`.

Decides: which op a recipe runs, how its weights are rounded (to nearest, no calibration of weights), and its low rank. Rounding
runs in torch on the device of the weight, by the recipes of the contract (int4: vllm_uint4b8; fp8: vllm_fp8_token per row; NVFP4:
compressed_tensors_nvfp4 with a global scale; INT4 with low rank: svdquant_int4 for f16, nunchaku_int4 for bf16).
Refuses: layers whose sizes no problem of the op admits, and weights that are not finite: one sentence that names the layer, and
the recipes that do fit.

A low-rank recipe keeps the `rank` largest singular pairs of W in 16 bits and quantises what is left of W after that rounding.
Smoothing factors and channel scales are 1. NVFP4 activations need a divisor: 2688 / amax of calibrated inputs (`input_maxima`),
else 1, under which block scales are those of one level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowbit.references.encodings import flip_int4_offset, fold_scales
from lowbit.references.formats import BF16, E2M1, E4M3FN, F16, F32, INT4, UE4M3, UINT4, Format, container

from ..case import Tensor
from ..op import DomainError, make_problem
from ..ops import ops
from .activations import DTYPES, InputRule, input_tensors
from .checkpoint import QuantisedLinear
from .schemes import Scheme

__all__ = ["RECIPES", "RecipeError", "WeightRecipe", "input_maxima", "low_rank", "quantise_linear", "refusal"]

_NVFP4_RANGE = 2688.0  # 6 * 448: the largest element times the largest block scale


class RecipeError(ValueError):
    """A layer that a recipe does not quantise."""


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """One way to quantise on the fly. `group`: K elements per weight scale, 0 for a whole row. `rank`: of the low-rank term."""

    name: str
    op: str
    variant: str
    group: int
    rank: int
    about: str


RECIPES: Mapping[str, WeightRecipe] = {
    recipe.name: recipe
    for recipe in (
        WeightRecipe("w4a16", "gemm_w4a16", "sym", 128, 0, "int4 weights per 128, activations as they are"),
        WeightRecipe("w4a16-g64", "gemm_w4a16", "sym", 64, 0, "int4 weights per 64, activations as they are"),
        WeightRecipe("w4a8-fp8", "gemm_w4a8_fp8", "folded", 128, 0, "int4 weights per 128, scales folded; e4m3 tokens"),
        WeightRecipe("w4a8-fp8-g64", "gemm_w4a8_fp8", "folded", 64, 0, "int4 weights per 64, scales folded; e4m3 tokens"),
        WeightRecipe("w4a8-int8", "gemm_w4a8_int8", "direct", 128, 0, "the codes and scales of w4a16, int8 tokens"),
        WeightRecipe("w8a8-fp8", "gemm_w8a8_fp8", "scaled", 0, 0, "e4m3 weights per channel, e4m3 tokens"),
        WeightRecipe("nvfp4", "gemm_nvfp4", "plain", 16, 0, "NVFP4 weights and activations, two levels of scales"),
        WeightRecipe("svdquant", "gemm_nvfp4", "svdquant", 16, 32, "NVFP4 weights and one-level activations, low rank of 32"),
        WeightRecipe("int4-lora", "gemm_int4", "f32", 64, 32, "int4 weights and activations per 64, low rank of 32"),
    )
}
"""Recipes by the name that `--recipe` takes."""


def refusal(recipe: WeightRecipe, n: int, k: int, out: Format) -> str | None:
    """Why weights [n, k] do not fit a recipe: the clause of the contract that they break; None where they fit."""
    op = ops()[recipe.op]
    sizes = {"m": 1, "n": n, "k": k, "g": recipe.group, "r": recipe.rank}
    options = {"out": "bf16" if out is BF16 else "f16"} | ({"lora": "lora"} if recipe.rank else {})
    try:
        make_problem(op, recipe.variant, {letter: sizes[letter] for letter in op.dims}, options)
    except DomainError as error:
        return str(error)
    return None


def quantise_linear(
    recipe: WeightRecipe, name: str, weight: torch.Tensor, out: Format, *, input_amax: float | None = None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> QuantisedLinear:
    """The Linear `name` with weights [N, K], of any floating dtype, to run with activations and outputs in `out` (BF16 or F16).
    `input_amax`: largest magnitude among its calibrated inputs (NVFP4 of two levels only). `factors`: low-rank terms by layer, of
    which a known one is not worked out again and a new one is kept. Raises RecipeError."""
    n, k = weight.shape
    broken = refusal(recipe, n, k, out)
    if broken is not None:
        fitting = [other.name for other in RECIPES.values() if refusal(other, n, k, out) is None]
        advice = f"choose one that fits ({', '.join(fitting)}) or ignore the layer" if fitting else "ignore the layer"
        raise RecipeError(f"{name}: weights [{n}, {k}] do not fit recipe {recipe.name}: {broken}; {advice}")
    if not bool(weight.isfinite().all()):
        count = int((~weight.isfinite()).sum())
        raise RecipeError(f"{name}: {count} of {weight.numel()} weights are not finite; load the model in bfloat16")
    scheme = Scheme(recipe.name, recipe.op, recipe.variant, "recipe", recipe.group)
    constants: dict[str, Tensor] = {}
    if recipe.rank:
        known = {} if factors is None else factors
        if name in known:
            (up, down), weight = known[name], _residual(weight, *known[name])
        else:
            up, down, weight = low_rank(weight, recipe.rank, DTYPES[out])
            known[name] = up, down
        constants = {
            "lora_up": _tensor(up, out), "lora_down": _tensor(down, out),
            "channel_scale": _tensor(torch.ones(n, dtype=DTYPES[out]), out),
        }
    quantised, static = _QUANTISED[recipe.op](weight, out, input_amax, recipe)
    return QuantisedLinear(name, scheme, n, k, constants | quantised, static)


def low_rank(weight: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(up [N, R], down [K, R], residual [N, K] in binary32): up @ down.T holds the `rank` largest singular pairs of W, both
    rounded to `dtype`; the residual is W less the product of the rounded factors. By the eigenvectors of the smaller Gram matrix
    in binary64: an error there only moves weight from the product to the residual. Columns beyond N or K are zeros."""
    wide = weight.double()
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    _, vectors = torch.linalg.eigh(tall.T @ tall)
    side = vectors[:, -rank:].flip(1)  # eigenvalues ascend
    side = torch.nn.functional.pad(side, (0, rank - side.shape[1]))
    other = tall @ side
    up, down = (other, side) if tall is wide else (side, other)
    up, down = up.to(dtype), down.to(dtype)
    return up, down, _residual(weight, up, down)


def _residual(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """W less the product of its rounded factors, in binary32."""
    return (weight.double() - up.double() @ down.double().T).float()


def input_maxima(model: torch.nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Largest magnitude of the inputs of each torch Linear while `run()` calls the model; layers that were not called are left
    out."""
    found: dict[str, float] = {}

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def see(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].numel():
                found[name] = max(found.get(name, 0.0), float(inputs[0].detach().abs().max()))
        return see

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


# One op each --------------------------------------------------------------------------------------------------------------

_Result = tuple[dict[str, Tensor], Tensor | None]


def _tensor(codes: torch.Tensor, fmt: Format) -> Tensor:
    """A torch container, or values of a 16-bit dtype, as codes."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[codes.element_size()]
    return Tensor(codes.contiguous().view(integer).cpu().numpy().view(container(fmt)), fmt)


def _int4_codes(weight: torch.Tensor, fmt: Format, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """QNT-32: uint4 codes (value + 8) [N, K] and scales max(max / 7, |min| / 8) [N, K / group], every operation in `fmt`."""
    groups = weight.to(DTYPES[fmt]).reshape(weight.shape[0], -1, group)
    seven, eight = (torch.full((), value, dtype=groups.dtype, device=groups.device) for value in (7.0, 8.0))
    scale = torch.maximum((groups.amax(-1) / seven).abs(), (groups.amin(-1) / eight).abs())
    quotient = (groups / scale.unsqueeze(-1)).float()
    codes = quotient.nan_to_num(nan=0.0, posinf=7.0, neginf=-8.0).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).flatten(1), scale


def _w4a16(weight: torch.Tensor, out: Format, amax: float | None, recipe: WeightRecipe) -> _Result:
    codes, scale = _int4_codes(weight, out, recipe.group)
    return {"w": _tensor(codes, UINT4), "scale": _tensor(scale, out)}, None


def _w4a8_int8(weight: torch.Tensor, out: Format, amax: float | None, recipe: WeightRecipe) -> _Result:
    codes, scale = _int4_codes(weight, out, recipe.group)
    return {"w": _tensor(codes, UINT4), "group_scale": _tensor(scale, out)}, None


def _w4a8_fp8(weight: torch.Tensor, out: Format, amax: float | None, recipe: WeightRecipe) -> _Result:
    codes, scale = _int4_codes(weight, BF16, recipe.group)
    folded, channels = fold_scales(_tensor(scale, BF16).codes)
    constants = {
        "w": Tensor(flip_int4_offset(_tensor(codes, UINT4).codes), INT4), "group_scale": Tensor(folded, E4M3FN),
        "channel_scale": Tensor(channels.reshape(-1), F32),
    }
    return constants, None


def _w8a8_fp8(weight: torch.Tensor, out: Format, amax: float | None, recipe: WeightRecipe) -> _Result:
    found = input_tensors(InputRule("vllm_fp8_token", out), weight.to(DTYPES[out]))
    return {"w": _tensor(found["a"], E4M3FN), "channel_scale": _tensor(found["token_scale"], F32)}, None


def _nvfp4(weight: torch.Tensor, out: Format, amax: float | None, recipe: WeightRecipe) -> _Result:
    """alpha = fl(1 / fl(activation divisor * weight divisor)); one-level activations have no divisor."""
    narrow = weight.to(DTYPES[out])
    divisor = _divisor(float(narrow.abs().max()))
    found = input_tensors(InputRule("compressed_tensors_nvfp4", out, torch.tensor([divisor], device=weight.device)), narrow)
    static = np.float32(1.0) if recipe.variant != "plain" or amax is None else _divisor(amax)
    alpha = np.array([np.float32(1.0) / (static * divisor)], np.float32)
    constants = {
        "w": _tensor(found["a"], E2M1), "w_scale": _tensor(found["a_scale"], UE4M3), "alpha": Tensor(alpha.view(np.uint32), F32),
    }
    given = Tensor(np.array([static], np.float32).view(np.uint32), F32) if recipe.variant == "plain" else None
    return constants, given


def _divisor(amax: float) -> np.float32:
    """QNT-45's global scale fl(2688 / amax); 1 where that is not finite or is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(_NVFP4_RANGE) / np.float32(amax)
    return found if np.isfinite(found) and found > 0 else np.float32(1.0)


def _int4(weight: torch.Tensor, out: Format, amax: float | None, recipe: WeightRecipe) -> _Result:
    found = input_tensors(InputRule("svdquant_int4" if out is F16 else "nunchaku_int4", out), weight.to(DTYPES[out]))
    return {"w": _tensor(found["a"], INT4), "w_scale": _tensor(found["a_scale"], out)}, None


_QUANTISED: Mapping[str, Callable[[torch.Tensor, Format, float | None, WeightRecipe], _Result]] = {
    "gemm_w4a16": _w4a16, "gemm_w4a8_fp8": _w4a8_fp8, "gemm_w4a8_int8": _w4a8_int8, "gemm_w8a8_fp8": _w8a8_fp8,
    "gemm_nvfp4": _nvfp4, "gemm_int4": _int4,
}
