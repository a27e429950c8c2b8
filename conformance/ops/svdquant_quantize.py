"""svdquant_quantize: smooth and quantise the activations of a W4A4 layer, and project the unsmoothed ones to low rank.

Decides: codes and scales of x / smooth (NVFP4 or INT4) with their padding to 256 rows, and the interval of x @ lora_down.
Refuses: a projection of the smoothed activations, and padding that is left as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.references.datapaths import Datapath
from lowbit.references.declarations import Contraction, Declaration, Step, cast
from lowbit.references.dot import Operand
from lowbit.references.formats import E2M1, F16, F32, INT4, UE4M3, Codes, decode
from lowbit.references.interpret import bound, ideal
from lowbit.references.recipes import RECIPES, Recipe, Smoothing, smooth
from lowbit.references.rounding import encode

from ..admissible import padded, quantiser_expectations, transposed
from ..bounds import to_expectation
from ..case import Case, Operands, Problem, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec
from ..quantiser_draws import draw_x

__all__ = ["OP", "recipe_of"]

_NAMES = {
    ("nvfp4", "svdquant"): "svdquant_nvfp4",
    ("nvfp4", "svdquant_triton"): "svdquant_nvfp4_triton",
    ("nvfp4", "nunchaku"): "nunchaku_nvfp4",
    ("int4", "svdquant"): "svdquant_int4",
    ("int4", "nunchaku"): "nunchaku_int4",
}


def recipe_of(problem: Problem) -> Recipe:
    """The recipe that a problem names."""
    return RECIPES[_NAMES[problem.variant, problem.option("recipe")]]


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    if tensor.name == "smooth" and case.pattern in ("ties", "special", "extremes"):
        exponents = np.zeros(tensor.shape) if case.pattern == "extremes" else stream.integers(-1, 1, tensor.shape)
        return encode(np.exp2(exponents.astype(np.float64)), tensor.format)
    if tensor.name != "x":
        return None
    codes = draw_x(case, (tensor.shape[0], tensor.shape[1]), tensor.format, recipe_of(case.problem), stream)
    if codes is None or case.pattern != "ties":
        return codes
    factors = decode(_drawn_smooth(case, tensor), tensor.format)
    return encode(decode(codes, tensor.format) * factors, tensor.format)


def _drawn_smooth(case: Case, x: ResolvedTensor) -> Codes:
    """The powers of two that `smooth` holds in the pattern `ties`: x carries them, so that x / smooth is at the ties."""
    exponents = Stream(case, "smooth").integers(-1, 1, (x.shape[1],))
    return encode(np.exp2(exponents.astype(np.float64)), x.format)


def program(problem: Problem, path: Datapath) -> tuple[Contraction | Step, ...]:
    """x @ lora_down in one sum over K, to binary32."""
    return (Contraction(("x", "lora_down"), path), cast(F32))


def environment(problem: Problem, operands: Operands) -> Mapping[str, Any]:
    """Both operands as rows along K: x [m, k], lora_down turned to [r, k]."""
    x, down = operands["x"], operands["lora_down"]
    return {"x": Operand(x.codes, x.format), "lora_down": Operand(np.ascontiguousarray(down.codes.T), down.format)}


def _expect_given(
    case: Case, operands: Operands, declaration: Declaration, outputs: Mapping[str, Codes]
) -> Mapping[str, Expectation]:
    """Expectations beside the scales that a backend wrote: codes are judged with its own scale wherever that is admissible.

    `outputs`: codes of every output in the shape of its expectation; empty: no scales are known."""
    problem, x = case.problem, operands["x"]
    m, rows = problem.dim("m"), -(-problem.dim("m") // 256) * 256
    values, recipe = decode(x.codes, x.format), recipe_of(problem)
    rule = Smoothing.INPUT_APPROXIMATE if problem.option("recipe") == "nunchaku" else Smoothing.F32
    smoothed = smooth(values, x.format, decode(operands["smooth"].codes, x.format), rule)
    bounds = None if rule is Smoothing.F32 else (smoothed.low, smoothed.high)
    beside = np.ascontiguousarray(outputs["scales"].T[:m]) if outputs else None
    found = quantiser_expectations(smoothed.value, smoothed.fmt, recipe, beside=beside, bounds=bounds)
    terms = environment(problem, operands)
    found["lora_act"] = to_expectation(bound(declaration, terms), F32, ideal(declaration, terms))
    found = {name: padded(e, (rows, *e.lo.shape[1:])) for name, e in found.items()}
    return found | {"scales": transposed(found["scales"])}


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    return _expect_given(case, operands, declaration, {})


_M = "ceil(m,256)*256"
_NVFP4, _INT4 = ("variant", ("nvfp4",)), ("variant", ("int4",))

OP = Op(
    name="svdquant_quantize",
    formula="q, scales = quantise(x / smooth); lora_act = x @ lora_down; rows m..ceil(m / 256) * 256 are zero",
    clauses=("QNT-1", "QNT-2", "QNT-3", "QNT-4", "QNT-5", "QNT-6", "QNT-60", "QNT-61", "QNT-62", "QNT-63", "QNT-64", "QNT-65"),
    judged={"nvfp4": "QNT-62", "int4": "QNT-62"},
    variants=("nvfp4", "int4"),
    dims=("m", "k", "r"),
    options=(Option("x", ("bf16", "f16")), Option("recipe", ("svdquant", "svdquant_triton", "nunchaku"))),
    tensors=(
        TensorSpec("x", "x", ("m", "k"), Role.ACTIVATION, Family.REAL),
        TensorSpec("smooth", "x", ("k",), Role.CONSTANT, Family.SMOOTH),
        TensorSpec("lora_down", "x", ("k", "r"), Role.CONSTANT, Family.LORA),
        TensorSpec("lora_act", F32, (_M, "r"), Role.OUTPUT, Family.LORA),
        TensorSpec("q", E2M1, (_M, "k"), Role.OUTPUT, Family.ELEMENT, (_NVFP4,)),
        TensorSpec("q", INT4, (_M, "k"), Role.OUTPUT, Family.ELEMENT, (_INT4,)),
        TensorSpec("scales", UE4M3, ("k/16", _M), Role.OUTPUT, Family.BLOCK_SCALE, (_NVFP4,)),
        TensorSpec("scales", F16, ("k/64", _M), Role.OUTPUT, Family.BLOCK_SCALE, (_INT4, ("recipe", ("svdquant",)))),
        TensorSpec("scales", "x", ("k/64", _M), Role.OUTPUT, Family.BLOCK_SCALE, (_INT4, ("recipe", ("nunchaku",)))),
    ),
    constraints=(
        Constraint("k > 0 and k % 16 == 0", "QNT-60"),
        Constraint("variant != 'int4' or k % 64 == 0", "QNT-60"),
        Constraint("r > 0 and r % 16 == 0", "QNT-60"),
        Constraint("variant != 'int4' or recipe != 'svdquant_triton'", "QNT-61"),
    ),
    ranges={"m": (1, 512, 1), "k": (64, 1024, 64), "r": (16, 128, 16)},
    patterns=("normal", "positive", "shifted", "lognormal", "ties", "special", "zeros", "extremes", "tensors"),
    expect=_expect,
    expect_given=_expect_given,
    program=program,
    environment=environment,
    minimum_bits=22,
    edges=(
        "svdquant_quantize/nvfp4/m16k128r16/bf16/ties/s0", "svdquant_quantize/nvfp4/m16k128r16/bf16/special/s0",
        "svdquant_quantize/nvfp4/m257k64r32/f16/normal/s0", "svdquant_quantize/nvfp4/m256k64r16/bf16.svdquant_triton/ties/s0",
        "svdquant_quantize/nvfp4/m16k128r16/f16.nunchaku/ties/s0", "svdquant_quantize/nvfp4/m16k128r16/bf16.nunchaku/special/s0",
        "svdquant_quantize/nvfp4/m40k256r16/bf16.nunchaku/lognormal/s0", "svdquant_quantize/int4/m16k256r16/f16/ties/s0",
        "svdquant_quantize/int4/m1k64r16/f16/normal/s0", "svdquant_quantize/int4/m26k64r16/f16/special/s0",
        "svdquant_quantize/int4/m16k256r16/f16.nunchaku/lognormal/s0", "svdquant_quantize/int4/m16k256r16/bf16.nunchaku/ties/s0",
    ),
    rejects=(
        ("svdquant_quantize/nvfp4/m4k24r16/bf16", "QNT-60"), ("svdquant_quantize/int4/m4k32r16/f16", "QNT-60"),
        ("svdquant_quantize/nvfp4/m4k64r8/bf16", "QNT-60"), ("svdquant_quantize/int4/m4k64r16/f16.svdquant_triton", "QNT-61"),
    ),
    draw=_draw,
)
