"""Inputs of a Linear as operands of its op: quantised in torch, bit for bit as the recipes of the contract say.

Decides: which recipe the input of each scheme gets, and every code and scale of it. All steps are single binary32 operations of
torch, which are IEEE operations on every device torch has; codes come from lowbit.references.torch_twin.
Refuses: dtypes other than bfloat16 and float16. There is no smoothing: the factors of svdquant_quantize are 1.

Codes lie in torch containers: uint8 up to 8 bits, int16 and int32 for the bits of 16- and 32-bit formats. Scales are in decode
direction, but for the global scale of NVFP4, a divisor as in compressed-tensors: values are codes * scale / divisor.
Where a recipe leaves a code undefined (NaN in, integers out) the code is 0. Approximate reciprocals are correctly rounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from lowbit.references.formats import BF16, E2M1, E4M3FN, F16, F32, UE4M3, Codes, Format
from lowbit.references.rounding import Rounding
from lowbit.references.torch_twin import decode_torch, encode_torch

from .checkpoint import QuantisedLinear

__all__ = [
    "DTYPES", "InputRule", "codes_of", "input_rule", "input_tensors", "recipe_name", "torch_codes", "values_of",
]

DTYPES = {BF16: torch.bfloat16, F16: torch.float16}
"""Formats of activations and outputs, and their torch dtypes."""

_CONTAINERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_FP8_FLOOR = 1.0 / (448.0 * 512.0)
_FLUSHED = 2.0**-126  # rcp.approx.ftz: magnitudes below count as zero


@dataclass(frozen=True, slots=True, eq=False)
class InputRule:
    """How one Linear's input becomes operands. `recipe`: a name of lowbit.references.recipes.RECIPES, empty where activations
    stay as they are. `given` binary32 [1]: the static scale, for NVFP4 the divisor. `lora_down` [K, R]: projects to low rank."""

    recipe: str
    out: Format
    given: torch.Tensor | None = None
    lora_down: torch.Tensor | None = None


def torch_codes(codes: Codes, device: torch.device | str = "cpu") -> torch.Tensor:
    """NumPy codes (uint8, uint16, uint32) in the torch container of their bits, on a device."""
    array = np.ascontiguousarray(codes)
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[array.dtype.itemsize]
    return torch.from_numpy(array.view(signed).copy()).to(device)


def codes_of(values: torch.Tensor) -> torch.Tensor:
    """The bits of bfloat16, float16 or float32 values."""
    return values.contiguous().view(_CONTAINERS[values.element_size()])


@cache
def _table(fmt: Format, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return decode_torch(torch.arange(1 << fmt.bits, dtype=torch.uint8), fmt).to(device=device, dtype=dtype)


def values_of(codes: torch.Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of codes, exact in float32 or float64, same shape. Formats of up to 8 bits, bf16, f16 and f32."""
    if fmt.bits <= 8:
        return _table(fmt, dtype, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
    own = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}[fmt]
    return codes.view(own).to(torch.float32).to(dtype)


def recipe_name(linear: QuantisedLinear, out: Format) -> str:
    """The recipe of a Linear's input, empty where activations stay in their format."""
    scheme = linear.scheme
    match scheme.op, scheme.variant:
        case "gemm_w4a16", _:
            return ""
        case "gemm_w4a8_fp8", _:
            return "vllm_fp8_token"
        case "gemm_w4a8_int8", _:
            return "xpu_int8_token"
        case "gemm_w8a8_fp8", "block":
            return "vllm_fp8_group128"
        case "gemm_w8a8_fp8", _:
            return f"vllm_fp8_{'static' if scheme.static_input else 'tensor' if scheme.input_per_tensor else 'token'}"
        case "gemm_nvfp4", "plain":
            return "compressed_tensors_nvfp4"
        case "gemm_nvfp4", _:
            return "svdquant_nvfp4"
        case "gemm_int4", _:
            return "svdquant_int4" if out is F16 else "nunchaku_int4"
    raise ValueError(f"{linear.name}: {scheme.op}/{scheme.variant} takes no activations by any recipe here; name another op")


def input_rule(linear: QuantisedLinear, out: Format, device: torch.device | str = "cpu") -> InputRule:
    """The rule for a Linear with activations in `out` (BF16 or F16), its constants on `device`. Raises ValueError where a static
    scale is missing."""
    recipe = recipe_name(linear, out)
    given = None
    if recipe in ("vllm_fp8_static", "compressed_tensors_nvfp4"):
        if linear.input_scale is None:
            raise ValueError(f"{linear.name}: its inputs have a static scale and none was given; quantise with calibrated inputs")
        given = torch_codes(linear.input_scale.codes.reshape(1), device).view(torch.float32)
    down = None
    if "lora_down" in linear.constants:
        down = torch_codes(linear.constants["lora_down"].codes, device).view(DTYPES[out])
    return InputRule(recipe, out, given, down)


def input_tensors(rule: InputRule, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes of the op's activation tensors for x [M, K], M at least 1: `a` [M, K], and by op `token_scale` [M] or [1], `a_scale`
    [M, K / block], `lora_act` [M, R]. Raises ValueError for another dtype than that of the rule."""
    if x.dtype is not DTYPES[rule.out]:
        raise ValueError(f"inputs are {x.dtype}, the layer was prepared for {DTYPES[rule.out]}; load the model in that dtype")
    if not rule.recipe:
        return {"a": codes_of(x)}
    found = _RECIPES[rule.recipe](x, rule.given)
    if rule.lora_down is not None:
        found["lora_act"] = codes_of((x.double() @ rule.lora_down.double()).float())
    return found


# Recipes: x [M, K] of 16 bits, and the given scale ------------------------------------------------------------------------


def _over(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor, correctly rounded: torch turns a division by a Python number into a multiplication on CUDA."""
    return x / torch.full((), divisor, dtype=torch.float32, device=x.device)


def _fp8(quotient: torch.Tensor, nan: float) -> torch.Tensor:
    """e4m3fn codes of bounded quotients; NaN gives the code of `nan`."""
    return encode_torch(torch.where(quotient.isnan(), nan, quotient).clamp(-448.0, 448.0), E4M3FN)


def _numbers_amax(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude along the last axis, NaN ignored."""
    return torch.where(x.isnan(), 0.0, x.abs()).amax(-1, keepdim=True)


def _fp8_token(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-13, vllm."""
    x = x.float()
    scale = _over(_numbers_amax(x), 448.0).clamp(min=_FP8_FLOOR)
    return {"a": _fp8(x / scale, 448.0), "token_scale": codes_of(scale.reshape(-1))}


def _fp8_static(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-11, vllm: multiplied by the rounded reciprocal."""
    assert given is not None
    return {"a": _fp8(x.float() * (1.0 / given), 448.0), "token_scale": codes_of(given)}


def _fp8_tensor(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-12, vllm."""
    return _fp8_static(x, _over(_numbers_amax(x.float().reshape(1, -1)).reshape(1), 448.0))


def _fp8_group(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-15, vllm: one scale per 128 along K."""
    blocks = x.float().reshape(x.shape[0], -1, 128)
    scale = _over(_numbers_amax(blocks).clamp(min=1e-10), 448.0)
    return {"a": _fp8(blocks / scale, -448.0).flatten(1), "a_scale": codes_of(scale.squeeze(-1))}


def _int8_token(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-21, wide: the quotient by the stored scale, rounded to binary32."""
    wide = x.float()
    scale = _over(wide.abs().amax(-1, keepdim=True), 127.0).clamp(min=1e-5).to(x.dtype)
    codes = _integers(wide / scale.float(), -128, 127).to(torch.int8).view(torch.uint8)
    return {"a": codes, "token_scale": codes_of(scale.reshape(-1))}


def _integers(quotient: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Quotients to nearest even integers, bounded; NaN gives 0."""
    return quotient.nan_to_num(nan=0.0, posinf=float(high), neginf=float(low)).round().clamp(low, high)


def _nvfp4_two_levels(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-45, compressed_tensors, the divisor given: s = RNE(g * (amax / 6)), 0 replaced by 0.125; x / (s / g)."""
    assert given is not None
    blocks = x.float().reshape(x.shape[0], -1, 16)
    scale = encode_torch((given * _over(blocks.abs().amax(-1), 6.0)).clamp(0.0, 448.0), UE4M3)
    scale = torch.where(scale == 0, 0x20, scale)  # 0.125
    quotient = blocks / (values_of(scale, UE4M3) / given).unsqueeze(-1)
    codes = encode_torch(torch.where(quotient.isnan(), 0.0, quotient).clamp(-6.0, 6.0), E2M1)
    return {"a": codes.flatten(1), "a_scale": scale}


def _nvfp4_one_level(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-50, svdquant: s = RNE(clamp(amax / 6, 1e-12, 448)), ties away from zero, -0 only for x below 0."""
    blocks = x.float().reshape(x.shape[0], -1, 16)
    scale = encode_torch(_over(blocks.abs().amax(-1), 6.0).clamp(1e-12, 448.0), UE4M3)
    quotient = blocks / values_of(scale, UE4M3).unsqueeze(-1)
    codes = encode_torch(quotient.clamp(-6.0, 6.0).nan_to_num(nan=0.0), E2M1, Rounding.RNA)
    codes = torch.where((codes == 8) & ~(blocks < 0) | quotient.isnan(), 0, codes)
    return {"a": codes.flatten(1), "a_scale": scale}


def _int4_stored(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-35, svdquant: binary16 scales clamp(amax / 7, 1e-12, 65504), x / s by the stored scale."""
    blocks = x.float().reshape(x.shape[0], -1, 64)
    scale = _over(blocks.abs().amax(-1), 7.0).clamp(1e-12, 65504.0).to(torch.float16)
    codes = _integers(blocks / scale.float().unsqueeze(-1), -8, 7)
    return {"a": _nibbles(codes).flatten(1), "a_scale": codes_of(scale)}


def _int4_unrounded(x: torch.Tensor, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """QNT-36, nunchaku: s = amax * fl(1/7), stored in the format of x; x * (1 / s) by the unrounded scale."""
    blocks = x.float().reshape(x.shape[0], -1, 64)
    scale = _numbers_amax(blocks) * torch.tensor(1.0 / 7.0, dtype=torch.float32, device=x.device)
    codes = _integers(blocks * (1.0 / torch.where(scale < _FLUSHED, 0.0, scale)), -8, 7)  # 1 / s is never that small
    return {"a": _nibbles(codes).flatten(1), "a_scale": codes_of(scale.squeeze(-1).to(x.dtype))}


def _nibbles(integers: torch.Tensor) -> torch.Tensor:
    """int4 codes of integers -8..7."""
    return integers.to(torch.int8).view(torch.uint8) & 0xF


_RECIPES: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor]]] = {
    "vllm_fp8_token": _fp8_token, "vllm_fp8_static": _fp8_static, "vllm_fp8_tensor": _fp8_tensor, "vllm_fp8_group128": _fp8_group,
    "xpu_int8_token": _int8_token, "compressed_tensors_nvfp4": _nvfp4_two_levels, "svdquant_nvfp4": _nvfp4_one_level,
    "svdquant_int4": _int4_stored, "nunchaku_int4": _int4_unrounded,
}
