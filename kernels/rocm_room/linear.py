"""An fp8 linear layer on an AMD chip, from checkpoint to output: conversion, merging of shards, quantiser, choice of product.

Decides: what is done to weights when they are loaded (`load`) and to activations when they arrive (`apply`), in the order of
vLLM's Fp8LinearOp, and says which product ran. Refuses: fp8 activations of the other e4m3 or without a scale, and outputs in fp8.
Differences from the source, each because it loses something there: the bias reaches the skinny product, an upper bound reaches
the quantiser of tokens whatever the product and is refused beside any other, and rows that only pad are zeros.

Shapes: activations [.., K] in binary32, binary16, bf16 or the chip's e4m3; weights [N, K]. Scales multiply (decode direction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton

from lowbit.kernels.rocm_room import skinny_fp8
from lowbit.kernels.rocm_room.dispatch import Call, fused_on_disk, one_scale, product_of, takes_skinny
from lowbit.kernels.triton_room import gemm_w8a8_fp8
from lowbit.kernels.triton_room.encodings import channel_scales_kernel, convert_fnuz, requantize_fp8
from lowbit.kernels.triton_room.fp8_quantize import FP8_RECIPES, fp8_by_rows, fp8_by_scale, top_of
from lowbit.kernels.triton_room.machine import Machine
from lowbit.kernels.triton_room.tensor_scale import find_scale, parts

__all__ = ["Layer", "Quantised", "apply", "channelwise", "load", "merged", "quantise", "to_chip"]

_FORMS = {torch.float32: ("f32", 0), torch.float16: ("f16", 1), torch.bfloat16: ("bf16", 2)}
_OWN = {True: torch.float8_e4m3fnuz, False: torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Layer:
    """`codes` uint8 [N, K] in e4m3fnuz (`fnuz`) or e4m3fn; `scale` binary32 [1], [S] (a scale per shard) or [N, 1]; `input_scale`
    binary32 [1] or None."""

    codes: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    fnuz: bool


@dataclass(frozen=True, slots=True)
class Quantised:
    """Codes uint8 [p, K], p at least the rows of x, and their binary32 scale [1] or [p, 1]; rows that only pad are 0."""

    codes: torch.Tensor
    scale: torch.Tensor


def to_chip(layer: Layer, machine: Machine) -> Layer:
    """A layer of e4m3fn as the chip reads it: exactly once, and only where the chip multiplies e4m3fnuz."""
    if layer.fnuz or not machine.fnuz:
        return layer
    codes, wide = torch.empty_like(layer.codes), not machine.native
    scales = [layer.scale] if layer.input_scale is None else [layer.scale, layer.input_scale]
    doubled = [torch.empty_like(scale) for scale in scales]
    pairs = tuple((old.view(torch.int32), new.view(torch.int32)) for old, new in zip(scales, doubled, strict=True))
    convert_fnuz(layer.codes, codes, pairs, fnuz=True, wide=wide)
    return Layer(codes, doubled[0], doubled[1] if len(doubled) > 1 else None, fnuz=True)


def merged(layer: Layer, widths: Sequence[int], machine: Machine, *, via_f16: bool = False) -> Layer:
    """One scale, the largest, for the shards of `widths` rows. Codes of a checkpoint that was fused on disk stay."""
    codes, scale = torch.empty_like(layer.codes), torch.empty(1, dtype=torch.float32, device=layer.codes.device)
    rows = torch.tensor(widths, dtype=torch.int32, device=layer.codes.device)
    requantize_fp8(
        layer.codes, layer.scale.view(torch.int32), rows, codes, scale.view(torch.int32), fnuz=layer.fnuz, via_f16=via_f16,
        wide=not machine.native,
    )
    return replace(layer, codes=codes, scale=scale)


def channelwise(layer: Layer, widths: Sequence[int]) -> Layer:
    """The scale of each shard repeated over its rows, [N, 1]; codes stay."""
    n = layer.codes.shape[0]
    scale = torch.empty((n, 1), dtype=torch.float32, device=layer.codes.device)
    rows = torch.tensor(widths, dtype=torch.int32, device=layer.codes.device)
    channel_scales_kernel[(triton.cdiv(n, 1024),)](
        layer.scale.view(torch.int32), rows, scale.view(torch.int32), n, len(widths), 1, ROWS=1024)
    return replace(layer, scale=scale)


def load(layer: Layer, widths: Sequence[int], machine: Machine, *, by_channel: bool = False) -> Layer:
    """A checkpoint's layer for the chip: converted, then its shards under one scale, or (`by_channel`) a scale per row. Shards
    that share a scale keep their codes."""
    found = to_chip(layer, machine)
    if found.scale.shape == (found.codes.shape[0], 1):
        return found
    scales = found.scale.tolist()
    if one_scale(scales):
        return replace(found, scale=found.scale[:1])
    return channelwise(found, widths) if by_channel and not fused_on_disk(scales) else merged(found, widths, machine)


def quantise(
    x: torch.Tensor, machine: Machine, *, input_scale: torch.Tensor | None = None, scale_ub: torch.Tensor | None = None,
    per_token: bool = False, padding: int | None = None,
) -> Quantised:
    """x [M, K] by the recipe vllm: the given scale, one per token, or one for all. An x of the chip's e4m3 passes with its scale.
    `scale_ub` bounds the magnitudes of tokens. Raises ValueError for an x of the other e4m3, or without a scale, and for a bound
    where no scale per token is computed."""
    if scale_ub is not None and (input_scale is not None or not per_token):
        which = "one dynamic scale" if input_scale is None else "a static scale"
        raise ValueError(f"scale_ub: got a bound beside {which}; it bounds scales per token, leave it out or take per_token")
    if x.dtype in _OWN.values():
        if x.dtype is not _OWN[machine.fnuz] or input_scale is None:
            raise ValueError(f"fp8 activations: got {x.dtype}, scale {input_scale}; expected {_OWN[machine.fnuz]} and its scale")
        return Quantised(x.view(torch.uint8), input_scale)
    m, k = x.shape
    rows, form, wide = max(m, padding or 0), _FORMS[x.dtype][1], not machine.native
    codes = torch.empty((rows, k), dtype=torch.uint8, device=x.device)
    given = x.view(torch.int32 if form == 0 else torch.int16)
    if input_scale is None and per_token:
        scale = torch.zeros((rows, 1), dtype=torch.float32, device=x.device)
        bound = None if scale_ub is None else scale_ub.view(torch.int32)
        fp8_by_rows(given, codes, scale.view(torch.int32), FP8_RECIPES["token", "vllm"], form=form, fnuz=machine.fnuz,
                    bound=bound, wide=wide)
        return Quantised(codes, scale)
    scale = torch.empty(1, dtype=torch.float32, device=x.device) if input_scale is None else input_scale
    if input_scale is None:
        found = torch.empty(parts(m, k, wide=wide), dtype=torch.int32, device=x.device)
        find_scale(given, given.stride(0), (m, k), scale.view(torch.int32), found, form=form, nan=0,
                   limit=top_of(fnuz=machine.fnuz), encode=0, wide=wide)
    fp8_by_scale(given, scale.view(torch.int32), codes, FP8_RECIPES["static", "vllm"], form=form, fnuz=machine.fnuz, wide=wide)
    return Quantised(codes, scale)


def apply(
    layer: Layer, x: torch.Tensor, machine: Machine, *, out: torch.dtype | None = None, scale_ub: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, per_token: bool = False, padding: int | None = None, rocm: bool = True,
    per_row: bool = True, skinny: bool = True,
) -> tuple[torch.Tensor, str]:
    """(D [.., N], the product that computed it) of activations [.., K]. `out`: by default the format of x. `padding`: rows that
    the quantiser pads to. `rocm`, `per_row`, `skinny`: what dispatch asks. Raises ValueError for what `quantise` refuses and for
    fp8 outputs."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = x.dtype if out is None else out
    if out not in _FORMS:
        raise ValueError(f"output: got {out}, expected float32, float16 or bfloat16; name one by out=")
    form = _FORMS[out][0]
    q = quantise(flat, machine, input_scale=layer.input_scale, scale_ub=scale_ub, per_token=per_token, padding=padding)
    (rows, k), n = q.codes.shape, layer.codes.shape[0]
    product = product_of(Call(
        cutlass=False, one_weight_scale=layer.scale.numel() == 1, one_activation_scale=q.scale.numel() == 1, per_token=per_token,
        rocm=rocm, per_row=per_row,
    ))
    d = torch.empty((rows, n), dtype=out, device=x.device)
    container = torch.int32 if form == "f32" else torch.int16
    addend = None if bias is None else bias.to(out).view(container)
    whole = product == "rocm_per_tensor"
    if whole and takes_skinny(rows, k, one_scale_each=True, own_format=layer.fnuz == machine.fnuz, enabled=skinny):
        space = torch.empty((skinny_fp8.splits_of(n, k, machine), rows, n), dtype=torch.float32, device=x.device)
        skinny_fp8.launch(q.codes, layer.codes, q.scale, layer.scale, addend, d.view(container), space, out=form, bias="bias",
                          machine=machine)
        product = "rocm_per_tensor.skinny"
    else:
        gemm_w8a8_fp8.launch(q.codes, layer.codes, q.scale, layer.scale, addend, d.view(container), out=form, fnuz=layer.fnuz,
                             blocked=False, promoted=False, bias_after=False, machine=machine)
    return d[: flat.shape[0]].reshape(*x.shape[:-1], n), product
