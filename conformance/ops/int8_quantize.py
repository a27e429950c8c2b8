"""int8_quantize: activations to int8 codes with one scale per token, in the activation's own format.

Decides: codes, scales and the zero points that a symmetric kernel hands on. Refuses: nothing; NaN leaves its row's codes open.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.formats import INT8, INT32, Codes, decode
from lowbit.references.recipes import RECIPES, Recipe

from ..admissible import quantiser_expectations
from ..case import Case, Operands, Problem, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import draw_x

__all__ = ["OP", "recipe_of"]


def recipe_of(problem: Problem) -> Recipe:
    """The recipe that a problem names."""
    return RECIPES["xpu_int8_token" if problem.option("quotient") == "wide" else "xpu_int8_token_eager"]


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    return draw_x(case, (tensor.shape[0], tensor.shape[1]), tensor.format, recipe_of(case.problem), stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    x = operands["x"]
    found = quantiser_expectations(decode(x.codes, x.format), x.format, recipe_of(case.problem))
    return found | {"zeros": exactly(np.zeros((x.codes.shape[0], 1), dtype=np.uint32), INT32)}


OP = Op(
    name="int8_quantize",
    formula="scales = RNE_x(max(amax / 127, 1e-5)); q = clamp(RNE(x / scales), -128, 127); zeros = 0",
    clauses=("QNT-1", "QNT-2", "QNT-3", "QNT-5", "QNT-20", "QNT-21", "QNT-22"),
    judged={"token": "QNT-21"},
    variants=("token",),
    dims=("m", "k"),
    options=(Option("x", ("bf16", "f16", "f32")), Option("quotient", ("wide", "narrow"))),
    tensors=(
        TensorSpec("x", "x", ("m", "k"), Role.ACTIVATION, Family.REAL),
        TensorSpec("q", INT8, ("m", "k"), Role.OUTPUT),
        TensorSpec("scales", "x", ("m", "1"), Role.OUTPUT, Family.OUTER_SCALE),
        TensorSpec("zeros", INT32, ("m", "1"), Role.OUTPUT, Family.ZERO_POINT),
    ),
    constraints=(Constraint("k > 0", "QNT-2"),),
    ranges={"m": (0, 256, 1), "k": (1, 2048, 1)},
    patterns=("normal", "positive", "shifted", "lognormal", "ties", "special", "zeros", "extremes", "maxima", "ramp", "tensors"),
    expect=_expect,
    edges=(
        "int8_quantize/token/m16k512/bf16/ties/s0", "int8_quantize/token/m16k512/f16/ties/s0",
        "int8_quantize/token/m16k512/bf16.narrow/ties/s0", "int8_quantize/token/m26k64/bf16/special/s0",
        "int8_quantize/token/m26k64/f16/special/s0", "int8_quantize/token/m64k128/f16/extremes/s0",
        "int8_quantize/token/m64k129/bf16/lognormal/s0", "int8_quantize/token/m0k64/bf16/normal/s0",
        "int8_quantize/token/m1k1/bf16/normal/s0",
    ),
    rejects=(("int8_quantize/token/m4k0/bf16", "QNT-2"),),
    draw=_draw,
)
