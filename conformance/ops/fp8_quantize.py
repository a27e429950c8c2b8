"""fp8_quantize: 16- or 32-bit activations to fp8 codes and binary32 scales.

Decides: codes and scales for one scale per call (given or found), per token, per 1 x 128 block and per 128 x 128 tile, after each
source system. Refuses: combinations that no source system has.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.formats import F32, Codes, decode
from lowbit.references.recipes import RECIPES, Recipe
from lowbit.references.rounding import encode

from ..admissible import padded, quantiser_expectations
from ..case import Case, Operands, Problem, Stream
from ..op import Constraint, Expectation, Family, Flag, Op, Option, ResolvedTensor, Role, TensorSpec
from ..quantiser_draws import SPECIAL_BLOCKS, draw_x

__all__ = ["OP", "recipe_of"]

_NAMES = {
    ("static", "vllm"): "vllm_fp8_static",
    ("tensor", "vllm"): "vllm_fp8_tensor",
    ("token", "vllm"): "vllm_fp8_token",
    ("block", "vllm"): "vllm_fp8_group128",
    ("static", "vllm_native"): "vllm_native_fp8_static",
    ("tensor", "vllm_native"): "vllm_native_fp8_tensor",
    ("token", "vllm_native"): "vllm_native_fp8_token",
    ("block", "scaled_quantize"): "vllm_fp8_scaled_quantize",
    ("block", "deepgemm"): "deepgemm_fp8_1x128",
    ("tile", "deepgemm"): "deepgemm_fp8_128x128",
}


def recipe_of(problem: Problem) -> Recipe:
    """The recipe that a problem names."""
    suffix = "_fnuz" if problem.option("format") == "fnuz" else ""
    return RECIPES[_NAMES[problem.variant, problem.option("recipe")] + suffix]


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    if tensor.name == "scale_ub":
        return encode(np.array([1.5 if case.pattern != "ties" else 2.0**20]), F32)
    if tensor.name == "scale":
        fixed = 1.0 if case.pattern == "ties" else 0.0 if case.pattern == "zeros" and case.seed % 2 else None
        return None if fixed is None else encode(np.array([fixed]), F32)
    return draw_x(case, (tensor.shape[0], tensor.shape[1]), tensor.format, recipe_of(case.problem), stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    problem, x = case.problem, operands["x"]
    static = decode(operands["scale"].codes, F32).reshape(1, 1) if "scale" in operands else None
    ub = float(decode(operands["scale_ub"].codes, F32)[0]) if "scale_ub" in operands else None
    found = quantiser_expectations(decode(x.codes, x.format), x.format, recipe_of(problem), static_scale=static, scale_ub=ub)
    m, k, p = (problem.dim(letter) for letter in "mkp")
    beyond = Flag.NONE if problem.option("recipe") == "vllm_native" else Flag.FREE
    result = {"q": padded(found["q"], (max(m, p), k), beyond)}
    return result if static is not None else result | {"scales": _shaped(found["scales"], problem)}


def _shaped(scales: Expectation, problem: Problem) -> Expectation:
    """One scale has shape [1], not [1, 1]."""
    if problem.variant != "tensor":
        return scales
    return Expectation(scales.format, scales.lo.reshape(1), scales.hi.reshape(1), scales.flags.reshape(1))


def _scales(variant: str, *shape: str) -> TensorSpec:
    return TensorSpec("scales", F32, shape, Role.OUTPUT, Family.OUTER_SCALE, (("variant", (variant,)),))


OP = Op(
    name="fp8_quantize",
    formula="scales = max(amax, ..) / max_fp8; q = RNE_sat(clamp(x / scales)), the division by the recipe's own rule",
    clauses=(
        "QNT-1", "QNT-2", "QNT-3", "QNT-4", "QNT-5", "QNT-10", "QNT-11", "QNT-12", "QNT-13", "QNT-14", "QNT-15", "QNT-16",
        "QNT-17", "QNT-18",
    ),
    judged={"static": "QNT-11", "tensor": "QNT-12", "token": "QNT-13", "block": "QNT-15", "tile": "QNT-17"},
    variants=("static", "tensor", "token", "block", "tile"),
    dims=("m", "k", "p"),
    options=(
        Option("x", ("bf16", "f16", "f32")),
        Option("format", ("fn", "fnuz")),
        Option("recipe", ("vllm", "vllm_native", "scaled_quantize", "deepgemm")),
        Option("ub", ("no_ub", "ub")),
    ),
    tensors=(
        TensorSpec("x", "x", ("m", "k"), Role.ACTIVATION, Family.REAL),
        TensorSpec("scale", F32, ("1",), Role.ACTIVATION, Family.OUTER_SCALE, (("variant", ("static",)),)),
        TensorSpec("scale_ub", F32, ("1",), Role.ACTIVATION, Family.OUTER_SCALE, (("ub", ("ub",)),)),
        TensorSpec("q", "format", ("max(m,p)", "k"), Role.OUTPUT),
        _scales("tensor", "1"),
        _scales("token", "m", "1"),
        _scales("block", "m", "k/128"),
        _scales("tile", "m/128", "k/128"),
    ),
    constraints=(
        Constraint("k > 0", "QNT-2"),
        Constraint("variant not in ('static', 'tensor', 'token') or recipe in ('vllm', 'vllm_native')", "QNT-10"),
        Constraint("variant != 'block' or recipe in ('vllm', 'scaled_quantize', 'deepgemm')", "QNT-10"),
        Constraint("variant != 'tile' or recipe == 'deepgemm'", "QNT-10"),
        Constraint("variant not in ('block', 'tile') or k % 128 == 0", "QNT-14"),
        Constraint("variant != 'tile' or m % 128 == 0", "QNT-14"),
        Constraint("ub == 'no_ub' or variant == 'token'", "QNT-13"),
        Constraint("p <= m or variant in ('static', 'tensor', 'token')", "QNT-18"),
    ),
    ranges={"m": (1, 384, 1), "k": (64, 1024, 64), "p": (1, 64, 1)},
    patterns=("normal", "positive", "shifted", "lognormal", "ties", "special", "zeros", "extremes", "maxima", "ramp", "tensors"),
    expect=_expect,
    edges=(
        "fp8_quantize/static/m16k256p0/bf16/ties/s0", "fp8_quantize/static/m16k256p0/bf16.fnuz/ties/s0",
        "fp8_quantize/static/m26k17p0/f32/special/s0", "fp8_quantize/static/m5k1025p17/f16/normal/s0",
        "fp8_quantize/static/m5k64p17/bf16.vllm_native/normal/s0", "fp8_quantize/static/m8k64p0/bf16/zeros/s3",
        "fp8_quantize/tensor/m16k256p0/bf16/ties/s0", "fp8_quantize/tensor/m16k256p0/f32.fnuz/ties/s0",
        *(f"fp8_quantize/tensor/m4k{64 + kind}p0/bf16/special/s{kind}" for kind in range(len(SPECIAL_BLOCKS))),
        "fp8_quantize/tensor/m0k64p0/bf16/normal/s0", "fp8_quantize/tensor/m3k65p16/f32/lognormal/s0",
        "fp8_quantize/tensor/m4k64p0/bf16.vllm_native/special/s8", "fp8_quantize/tensor/m16k256p0/bf16.vllm_native/ties/s0",
        "fp8_quantize/token/m16k256p0/bf16/ties/s0", "fp8_quantize/token/m16k256p0/f16.fnuz/ties/s0",
        "fp8_quantize/token/m26k64p0/bf16/special/s0", "fp8_quantize/token/m26k64p0/f32.fnuz/special/s0",
        "fp8_quantize/token/m26k64p0/bf16.vllm_native/special/s0", "fp8_quantize/token/m7k1026p0/bf16.ub/lognormal/s0",
        "fp8_quantize/token/m26k64p0/f32.vllm_native.ub/special/s0", "fp8_quantize/token/m1k17p17/bf16/normal/s0",
        "fp8_quantize/token/m64k128p0/f32/extremes/s0", "fp8_quantize/token/m0k128p4/bf16/normal/s0",
        "fp8_quantize/block/m8k512p0/bf16/ties/s0", "fp8_quantize/block/m8k512p0/bf16/special/s0",
        "fp8_quantize/block/m8k512p0/bf16.scaled_quantize/ties/s0", "fp8_quantize/block/m8k512p0/f32.scaled_quantize/special/s0",
        "fp8_quantize/block/m8k512p0/bf16.fnuz.scaled_quantize/lognormal/s0",
        "fp8_quantize/block/m8k512p0/bf16.deepgemm/ties/s0", "fp8_quantize/block/m8k512p0/bf16.deepgemm/special/s0",
        "fp8_quantize/tile/m256k384p0/bf16.deepgemm/ties/s0", "fp8_quantize/tile/m128k256p0/f32.fnuz.deepgemm/lognormal/s0",
        "fp8_quantize/tile/m256k128p0/f16.deepgemm/zeros/s0", "fp8_quantize/tile/m256k1664p0/bf16.deepgemm/special/s0",
    ),
    rejects=(
        ("fp8_quantize/token/m4k0p0/bf16", "QNT-2"), ("fp8_quantize/token/m4k64p0/bf16.deepgemm", "QNT-10"),
        ("fp8_quantize/block/m4k64p0/bf16", "QNT-14"), ("fp8_quantize/tile/m100k128p0/bf16.deepgemm", "QNT-14"),
        ("fp8_quantize/tensor/m4k64p0/bf16.ub", "QNT-13"), ("fp8_quantize/block/m4k128p8/bf16", "QNT-18"),
    ),
    draw=_draw,
)
