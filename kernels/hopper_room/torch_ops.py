"""The public functions of this folder as operators of torch: torch.ops.lowbit.*, with shapes and dtypes for torch.compile.

Decides: the schema of each operator, and what it allocates: outputs, and the scratch memory of one scale per tensor and of
products whose sums several workers share, by torch's own allocator, so that graphs may capture them. Operands may come from the
kernel just ahead on the stream: no product starts to read them before it has ended. Importing this module registers all of them,
once per process.
Refuses: what the functions refuse. Nothing here computes, and there is no gradient: codes are steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import encodings, gemm_w4a8, gemm_w8a8, quantisers

__all__ = ["NAMES", "define"]

Tensor = torch.Tensor

_TORCH: Any = torch  # parts of it have no types
_LIBRARY = _TORCH.library.Library("lowbit", "FRAGMENT")

NAMES: list[str] = []
"""Names of the operators that are registered, without the namespace."""


def define(name: str, schema: str, on_device: Callable[..., Any], shaped: Callable[..., Any]) -> None:
    """Register torch.ops.lowbit.NAME. `schema`: arguments and results as torch writes them. `shaped`: empty outputs, to trace."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_device, "CUDA")
    torch.library.register_fake(f"lowbit::{name}", shaped, lib=_LIBRARY)
    NAMES.append(name)


def _fp8(fnuz: bool) -> torch.dtype:
    return torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn


def _quantised(
    x: Tensor, variant: str = "token", recipe: str = "vllm", scale_ub: Tensor | None = None, fnuz: bool = False, rows: int = 0
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    shapes = {"token": (m, 1), "block": (m, k // 128), "tile": (m // 128, k // 128), "tensor": (1,)}
    if variant not in shapes:
        raise ValueError(
            f"fp8_quantize: got variant {variant!r}, expected one of {', '.join(shapes)}; static is fp8_quantize_static"
        )
    q = torch.empty((_TORCH.sym_max(m, rows), k), dtype=_fp8(fnuz), device=x.device)
    return q, torch.empty(shapes[variant], dtype=torch.float32, device=x.device)


def _quantise(
    x: Tensor, variant: str = "token", recipe: str = "vllm", scale_ub: Tensor | None = None, fnuz: bool = False, rows: int = 0
) -> tuple[Tensor, Tensor]:
    q, scales = _quantised(x, variant, recipe, scale_ub, fnuz, rows)
    scratch = torch.empty(16, dtype=torch.uint8, device=x.device) if variant == "tensor" else None
    quantisers.fp8_quantize(x, q, scales, variant=variant, recipe=recipe, fnuz=fnuz, scale_ub=scale_ub, workspace=scratch)
    return q, scales


def _quantised_static(x: Tensor, scale: Tensor, recipe: str = "vllm", fnuz: bool = False, rows: int = 0) -> Tensor:
    return torch.empty((_TORCH.sym_max(x.shape[0], rows), x.shape[1]), dtype=_fp8(fnuz), device=x.device)


def _quantise_static(x: Tensor, scale: Tensor, recipe: str = "vllm", fnuz: bool = False, rows: int = 0) -> Tensor:
    q = _quantised_static(x, scale, recipe, fnuz, rows)
    quantisers.fp8_quantize(x, q, None, variant="static", recipe=recipe, fnuz=fnuz, scale=scale)
    return q


def _encoded(q: Tensor) -> Tensor:
    *stack, n, k = q.shape
    return torch.empty((n, k) if q.dtype == torch.uint8 else (*stack, k, n), dtype=q.dtype, device=q.device)


def _encode(q: Tensor) -> Tensor:
    encoded = _encoded(q)
    encodings.int4_encode(q, encoded)
    return encoded


def _packed(q: Tensor, layout: str) -> Tensor:
    n, k = q.shape
    if layout == "nibble":
        return torch.empty((n, k // 2), dtype=torch.uint8, device=q.device)
    shape = {"gptq": (k // 8, n), "k_major": (n, k // 8), "compressed_tensors": (n, -(-k // 8))}.get(layout, (k, n // 8))
    return torch.empty(shape, dtype=torch.int32, device=q.device)


def _pack(q: Tensor, layout: str) -> Tensor:
    packed = _packed(q, layout)
    encodings.int4_pack(q, packed, layout=layout)
    return packed


def _flip(words: Tensor) -> None:
    encodings.uint4b8_to_int4(words)


def _nothing(words: Tensor) -> None:
    """The operand is changed in place."""


def _products(scales: Tensor) -> Tensor:
    return torch.empty((scales.shape[0], 8), dtype=torch.uint8, device=scales.device)


def _pack_scales(scales: Tensor) -> Tensor:
    packed = _products(scales)
    encodings.scale_pack_e4m3(scales, packed)
    return packed


def _folded(scales: Tensor, recipe: str = "vllm") -> tuple[Tensor, Tensor]:
    group = torch.empty(scales.shape, dtype=torch.float8_e4m3fn, device=scales.device)
    return group, torch.empty((scales.shape[0], 1), dtype=torch.float32, device=scales.device)


def _fold(scales: Tensor, recipe: str = "vllm") -> tuple[Tensor, Tensor]:
    group, channel = _folded(scales, recipe)
    encodings.scale_fold(scales, group, channel, recipe=recipe)
    return group, channel


def _requantised(
    w: Tensor, scales: Tensor, widths: Tensor, through_half: bool = False, fnuz: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.empty(w.shape, dtype=w.dtype, device=w.device), torch.empty(1, dtype=torch.float32, device=w.device)


def _requantize(
    w: Tensor, scales: Tensor, widths: Tensor, through_half: bool = False, fnuz: bool = False
) -> tuple[Tensor, Tensor]:
    out, scale = _requantised(w, scales, widths, through_half, fnuz)
    encodings.fp8_requantize(w, scales, widths, out, scale, through_half=through_half, fnuz=fnuz)
    return out, scale


def _expanded(scales: Tensor, widths: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, 1), dtype=torch.float32, device=scales.device)


def _expand(scales: Tensor, widths: Tensor, rows: int) -> Tensor:
    channel = _expanded(scales, widths, rows)
    encodings.expand_scales(scales, widths, channel)
    return channel


_QUANTISER = '(Tensor x, str variant="token", str recipe="vllm", Tensor? scale_ub=None, bool fnuz=False, int rows=0)'
_STATIC = '(Tensor x, Tensor scale, str recipe="vllm", bool fnuz=False, int rows=0)'

define("fp8_quantize", f"{_QUANTISER} -> (Tensor, Tensor)", _quantise, _quantised)
define("fp8_quantize_static", f"{_STATIC} -> Tensor", _quantise_static, _quantised_static)
define("int4_encode", "(Tensor q) -> Tensor", _encode, _encoded)
define("int4_pack", "(Tensor q, str layout) -> Tensor", _pack, _packed)
define("uint4b8_to_int4_", "(Tensor(a!) words) -> ()", _flip, _nothing)
define("scale_pack_e4m3", "(Tensor scales) -> Tensor", _pack_scales, _products)
define("scale_fold", '(Tensor scales, str recipe="vllm") -> (Tensor, Tensor)', _fold, _folded)
define(
    "fp8_requantize", "(Tensor w, Tensor scales, Tensor widths, bool through_half=False, bool fnuz=False) -> (Tensor, Tensor)",
    _requantize, _requantised,
)
define("expand_scales", "(Tensor scales, Tensor widths, int rows) -> Tensor", _expand, _expanded)


# Products ------------------------------------------------------------------------------------------------------------


def _packed_weights(weights: Tensor, scales: Tensor, flip: bool = False) -> Tensor:
    stack = weights.shape[:-2]
    n, k = weights.shape[-2], weights.shape[-1] * (8 if weights.dtype == torch.int32 else 1)
    size = gemm_w4a8.packed_bytes(stack[0] if stack else 1, n, k, k // scales.shape[-1])
    return torch.empty(size, dtype=torch.uint8, device=weights.device)


def _pack_weights(weights: Tensor, scales: Tensor, flip: bool = False) -> Tensor:
    memory: Tensor = gemm_w4a8.pack_weights(weights, scales, flip=flip).memory
    return memory


def _product(
    a: Tensor, packed: Tensor, token_scale: Tensor, channel_scale: Tensor, group: int, bias: Tensor | None = None,
    counts: Tensor | None = None, variant: str = "folded", out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return torch.empty((a.shape[0], channel_scale.shape[-1]), dtype=out_dtype, device=a.device)


def _multiply(
    a: Tensor, packed: Tensor, token_scale: Tensor, channel_scale: Tensor, group: int, bias: Tensor | None = None,
    counts: Tensor | None = None, variant: str = "folded", out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    out = _product(a, packed, token_scale, channel_scale, group, bias, counts, variant, out_dtype)
    experts = 1 if counts is None else int(counts.shape[0])
    weights = gemm_w4a8.PackedWeights(packed, experts, int(channel_scale.shape[-1]), int(a.shape[1]), group)
    gemm_w4a8.gemm_w4a8_fp8(a, weights, token_scale, channel_scale, out, bias=bias, counts=counts, variant=variant)
    return out


def _product8(
    a: Tensor, w: Tensor, token_scale: Tensor, channel_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return torch.empty((a.shape[0], w.shape[0]), dtype=out_dtype, device=a.device)


def _multiply8(
    a: Tensor, w: Tensor, token_scale: Tensor, channel_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    out = _product8(a, w, token_scale, channel_scale, bias, out_dtype)
    gemm_w8a8.gemm_w8a8_fp8(a, w, out, token_scale=token_scale, channel_scale=channel_scale, bias=bias)
    return out


def _multiply8_blocks(
    a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    out = _product8(a, w, a_scale, w_scale, bias, out_dtype)
    gemm_w8a8.gemm_w8a8_fp8(a, w, out, a_scale=a_scale, w_scale=w_scale, bias=bias)
    return out


_OUT = "ScalarType out_dtype=bfloat16) -> Tensor"

define("pack_w4a8", "(Tensor weights, Tensor scales, bool flip=False) -> Tensor", _pack_weights, _packed_weights)
define(
    "gemm_w4a8_fp8",
    "(Tensor a, Tensor packed, Tensor token_scale, Tensor channel_scale, int group, Tensor? bias=None, Tensor? counts=None, "
    f'str variant="folded", {_OUT}', _multiply, _product,
)
define(
    "gemm_w8a8_fp8", f"(Tensor a, Tensor w, Tensor token_scale, Tensor channel_scale, Tensor? bias=None, {_OUT}", _multiply8,
    _product8,
)
define(
    "gemm_w8a8_fp8_block", f"(Tensor a, Tensor w, Tensor a_scale, Tensor w_scale, Tensor? bias=None, {_OUT}", _multiply8_blocks,
    _product8,
)
