"""int4_quantize: weights or activations to 4-bit codes with one scale, and where asked one zero point, per group along K.

Decides: codes, scales and zero points after each source system. Refuses: groups that do not divide K, and combinations that no
source system has. Packing is another op (int4_pack): codes here are one per element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lowbit.references.declarations import Declaration
from lowbit.references.formats import F16, INT4, UINT4, Codes, decode
from lowbit.references.recipes import RECIPES, Recipe

from ..admissible import quantiser_expectations
from ..case import Case, Operands, Problem, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec
from ..quantiser_draws import draw_x

__all__ = ["OP", "recipe_of"]

_NAMES = {
    ("sym", "quantize_weights"): "vllm_int4",
    ("sym", "compressed_tensors"): "compressed_tensors_int4",
    ("sym", "svdquant"): "svdquant_int4",
    ("sym", "nunchaku"): "nunchaku_int4",
    ("uint4b8", "quantize_weights"): "vllm_uint4b8",
    ("asym", "quantize_weights"): "vllm_uint4_zero",
    ("asym", "compressed_tensors"): "compressed_tensors_int4_zero",
}


def recipe_of(problem: Problem) -> Recipe:
    """The recipe that a problem names, with the problem's group."""
    return replace(RECIPES[_NAMES[problem.variant, problem.option("recipe")]], block_k=problem.dim("g"))


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    return draw_x(case, (tensor.shape[0], tensor.shape[1]), tensor.format, recipe_of(case.problem), stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    x = operands["x"]
    return quantiser_expectations(decode(x.codes, x.format), x.format, recipe_of(case.problem))


_SIGNED = (("variant", ("sym",)),)
_OFFSET = (("variant", ("uint4b8",)),)
_ASYM_UNSIGNED = (("variant", ("asym",)), ("recipe", ("quantize_weights",)))
_ASYM_SIGNED = (("variant", ("asym",)), ("recipe", ("compressed_tensors",)))
_OWN_SCALE = (("recipe", ("quantize_weights", "compressed_tensors", "nunchaku")),)

OP = Op(
    name="int4_quantize",
    formula="scales = f(group); q = clamp(RNE(x / scales) [+ zeros]); value = (q - zeros) * scales",
    clauses=(
        "QNT-1", "QNT-2", "QNT-3", "QNT-4", "QNT-5", "QNT-6", "QNT-30", "QNT-31", "QNT-32", "QNT-33", "QNT-34", "QNT-35",
        "QNT-36", "QNT-37",
    ),
    judged={"sym": "QNT-32", "uint4b8": "QNT-32", "asym": "QNT-33"},
    variants=("sym", "uint4b8", "asym"),
    dims=("n", "k", "g"),
    options=(
        Option("x", ("bf16", "f16", "f32")), Option("recipe", ("quantize_weights", "compressed_tensors", "svdquant", "nunchaku")),
    ),
    tensors=(
        TensorSpec("x", "x", ("n", "k"), Role.ACTIVATION, Family.REAL),
        *(TensorSpec("q", INT4, ("n", "k"), Role.OUTPUT, when=when) for when in (_SIGNED, _ASYM_SIGNED)),
        *(TensorSpec("q", UINT4, ("n", "k"), Role.OUTPUT, when=when) for when in (_OFFSET, _ASYM_UNSIGNED)),
        TensorSpec("scales", "x", ("n", "k/g"), Role.OUTPUT, Family.BLOCK_SCALE, _OWN_SCALE),
        TensorSpec("scales", F16, ("n", "k/g"), Role.OUTPUT, Family.BLOCK_SCALE, (("recipe", ("svdquant",)),)),
        TensorSpec("zeros", INT4, ("n", "k/g"), Role.OUTPUT, Family.ZERO_POINT, _ASYM_SIGNED),
        TensorSpec("zeros", UINT4, ("n", "k/g"), Role.OUTPUT, Family.ZERO_POINT, _ASYM_UNSIGNED),
    ),
    constraints=(
        Constraint("k > 0 and g > 0 and k % g == 0", "QNT-30"),
        Constraint("g in (32, 64, 128) or g == k", "QNT-30"),
        Constraint("variant != 'uint4b8' or recipe == 'quantize_weights'", "QNT-31"),
        Constraint("variant != 'asym' or recipe in ('quantize_weights', 'compressed_tensors')", "QNT-31"),
        Constraint("recipe not in ('svdquant', 'nunchaku') or g == 64", "QNT-35"),
        Constraint("recipe != 'nunchaku' or x != 'f32'", "QNT-36"),
    ),
    ranges={"n": (0, 256, 1), "k": (32, 1024, 32), "g": (32, 128, 32)},
    patterns=("normal", "positive", "shifted", "lognormal", "ties", "special", "zeros", "extremes", "maxima", "ramp", "tensors"),
    expect=_expect,
    edges=(
        "int4_quantize/sym/n8k512g128/bf16/ties/s0", "int4_quantize/sym/n8k416g32/f16/special/s0",
        "int4_quantize/sym/n8k256g64/f32/ties/s0", "int4_quantize/sym/n26k200g200/bf16/special/s0",
        "int4_quantize/sym/n8k512g128/bf16.compressed_tensors/ties/s0",
        "int4_quantize/sym/n8k416g32/bf16.compressed_tensors/special/s0",
        "int4_quantize/sym/n8k512g64/f16.svdquant/ties/s0", "int4_quantize/sym/n8k256g64/f16.svdquant/special/s0",
        "int4_quantize/sym/n8k512g64/f16.nunchaku/ties/s0", "int4_quantize/sym/n8k256g64/bf16.nunchaku/special/s0",
        "int4_quantize/uint4b8/n8k512g128/bf16/ties/s0", "int4_quantize/uint4b8/n8k416g32/f16/special/s0",
        "int4_quantize/asym/n8k512g64/bf16/ties/s0", "int4_quantize/asym/n8k512g32/f16/positive/s0",
        "int4_quantize/asym/n8k416g32/bf16/special/s0", "int4_quantize/asym/n8k512g64/bf16.compressed_tensors/ties/s0",
        "int4_quantize/asym/n8k512g128/f16.compressed_tensors/positive/s0",
        "int4_quantize/asym/n8k416g32/f32.compressed_tensors/special/s0", "int4_quantize/sym/n0k128g128/bf16/normal/s0",
    ),
    rejects=(
        ("int4_quantize/sym/n4k100g64/bf16", "QNT-30"), ("int4_quantize/sym/n4k128g16/bf16", "QNT-30"),
        ("int4_quantize/uint4b8/n4k128g64/bf16.svdquant", "QNT-31"), ("int4_quantize/asym/n4k128g64/bf16.nunchaku", "QNT-31"),
        ("int4_quantize/sym/n4k128g128/bf16.svdquant", "QNT-35"), ("int4_quantize/sym/n4k128g64/f32.nunchaku", "QNT-36"),
    ),
    draw=_draw,
)
