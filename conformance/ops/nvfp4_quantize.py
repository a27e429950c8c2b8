"""nvfp4_quantize: tensors to E2M1 codes with one scale per block along K, with and without a global scale.

Decides: codes and scales after each source system, and the set of both where a recipe has an approximate reciprocal or a choice.
Refuses: a K that blocks do not divide, and a global scale where the recipe has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.formats import E2M1, F32, UE4M3, Codes, decode
from lowbit.references.recipes import RECIPES, GlobalRule, Recipe, float_value
from lowbit.references.rounding import encode

from ..admissible import padded, quantiser_expectations
from ..case import Case, Operands, Problem, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec
from ..quantiser_draws import draw_x
from ..storage import arranged, codes_of

__all__ = ["OP", "recipe_of"]

_TWO_LEVEL = {
    "vllm": "vllm_nvfp4",
    "vllm_reference": "vllm_nvfp4_reference",
    "vllm_emulation": "vllm_nvfp4_emulation",
    "compressed_tensors": "compressed_tensors_nvfp4",
    "modelopt": "modelopt_nvfp4",
    "torchao": "torchao_nvfp4",
    "transformer_engine": "transformer_engine_nvfp4",
    "four_over_six": "four_over_six_nvfp4",
}
_ONE_LEVEL = {
    "svdquant": "svdquant_nvfp4",
    "svdquant_triton": "svdquant_nvfp4_triton",
    "nunchaku": "nunchaku_nvfp4",
    "deepgemm": "deepgemm_fp4",
}


def recipe_of(problem: Problem) -> Recipe:
    """The recipe that a problem names."""
    return RECIPES[(_TWO_LEVEL | _ONE_LEVEL)[problem.option("recipe")]]


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    recipe, variant = recipe_of(case.problem), case.problem.variant
    encoding = recipe.global_rule is GlobalRule.ENCODE
    ties = case.pattern == "ties"
    if tensor.name == "global_scale":  # near what the recipe would find for values around 1
        fraction = 0.0 if ties else float(stream.integers(0, (1 << 20) - 1, (1,))[0]) * 2.0**-20
        exponent = 5 if ties else int(stream.integers(6, 10, (1,))[0])
        return encode(np.array([np.ldexp(1.0 + fraction, exponent if encoding else -exponent)]), F32)
    shape, dynamic = (tensor.shape[0], tensor.shape[1]), variant == "dynamic"
    unit = {"static": 2.0**-5, "dynamic": 2.0**-5, "none": 1.0}[variant]
    codes = draw_x(case, shape, tensor.format, recipe, stream, unit, finite=dynamic and case.seed % 2 == 0)
    if ties and dynamic and codes is not None and codes.size:  # the tensor's amax makes the global scale a power of two
        codes[0, 0] = encode(np.array([float_value(recipe.global_range) * 2.0**-5]), tensor.format)[0]
    return codes


def _expect_given(
    case: Case, operands: Operands, declaration: Declaration, outputs: Mapping[str, Codes]
) -> Mapping[str, Expectation]:
    """Expectations beside the scales that a backend wrote: codes are judged with its own scale wherever that is admissible.

    `outputs`: codes of every output in the shape of its expectation; empty: no scales are known."""
    x, problem = operands["x"], case.problem
    given = float(decode(operands["global_scale"].codes, F32)[0]) if "global_scale" in operands else None
    beside = outputs.get("scales")
    if beside is not None and problem.option("layout") == "swizzled":
        beside = codes_of(beside, "scale_swizzle", (x.codes.shape[0], x.codes.shape[1] // 16))
    found = quantiser_expectations(
        decode(x.codes, x.format), x.format, recipe_of(problem), beside=beside, global_scale=given
    )
    if problem.option("layout") == "swizzled":
        rows, columns = found["scales"].lo.shape
        found["scales"] = arranged(padded(found["scales"], (rows + -rows % 128, columns + -columns % 4)), "scale_swizzle")
    return found if problem.variant == "dynamic" else {name: found[name] for name in ("q", "scales")}


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    return _expect_given(case, operands, declaration, {})


_BLOCK16 = ("recipe", (*_TWO_LEVEL, "svdquant", "svdquant_triton", "nunchaku"))
_PADDED = ("ceil(m,128)*128", "ceil(k//16,4)*4")

OP = Op(
    name="nvfp4_quantize",
    formula="scales = RNE_e4m3(g * amax / 6); q = RNE_e2m1(x / (scales / g)); value = q * scales / g",
    clauses=(
        "QNT-1", "QNT-2", "QNT-3", "QNT-4", "QNT-5", "QNT-6", "QNT-40", "QNT-41", "QNT-42", "QNT-43", "QNT-44", "QNT-45",
        "QNT-46", "QNT-47", "QNT-48", "QNT-49", "QNT-50", "QNT-51", "QNT-52", "QNT-53",
    ),
    judged={"static": "QNT-41", "dynamic": "QNT-41", "none": "QNT-41"},
    variants=("static", "dynamic", "none"),
    dims=("m", "k"),
    options=(
        Option("x", ("bf16", "f16", "f32")), Option("recipe", (*_TWO_LEVEL, *_ONE_LEVEL)),
        Option("layout", ("linear", "swizzled")),
    ),
    tensors=(
        TensorSpec("x", "x", ("m", "k"), Role.ACTIVATION, Family.REAL),
        TensorSpec("global_scale", F32, ("1",), Role.ACTIVATION, Family.GLOBAL_SCALE, (("variant", ("static",)),)),
        TensorSpec("q", E2M1, ("m", "k"), Role.OUTPUT),
        TensorSpec("scales", UE4M3, ("m", "k/16"), Role.OUTPUT, Family.BLOCK_SCALE, (_BLOCK16, ("layout", ("linear",)))),
        TensorSpec("scales", UE4M3, _PADDED, Role.OUTPUT, Family.BLOCK_SCALE, (_BLOCK16, ("layout", ("swizzled",))),
                   "scale_swizzle", ("m", "k/16")),
        TensorSpec("scales", F32, ("m", "k/128"), Role.OUTPUT, Family.BLOCK_SCALE, (("recipe", ("deepgemm",)),)),
        TensorSpec("global_scale", F32, ("1",), Role.OUTPUT, Family.GLOBAL_SCALE, (("variant", ("dynamic",)),)),
    ),
    constraints=(
        Constraint("k > 0 and k % 16 == 0", "QNT-40"),
        Constraint("variant == 'none' or recipe not in ('svdquant', 'svdquant_triton', 'nunchaku', 'deepgemm')", "QNT-41"),
        Constraint("variant != 'none' or recipe in ('svdquant', 'svdquant_triton', 'nunchaku', 'deepgemm')", "QNT-41"),
        Constraint("recipe != 'deepgemm' or (k % 128 == 0 and layout == 'linear')", "QNT-53"),
        Constraint("recipe not in ('vllm', 'nunchaku') or x != 'f32'", "QNT-42"),
    ),
    ranges={"m": (0, 256, 1), "k": (128, 1024, 128)},
    patterns=("normal", "positive", "shifted", "lognormal", "ties", "special", "zeros", "extremes", "maxima", "ramp", "tensors"),
    expect=_expect,
    expect_given=_expect_given,
    edges=(
        *(f"nvfp4_quantize/static/m16k128/bf16{'' if name == 'vllm' else '.' + name}/{pattern}/s0"
          for name in _TWO_LEVEL for pattern in ("ties", "special", "extremes")),
        *(f"nvfp4_quantize/none/m16k128/bf16.{name}/{pattern}/s0"
          for name in _ONE_LEVEL for pattern in ("ties", "special", "extremes")),
        *(f"nvfp4_quantize/dynamic/m16k{128 + 16 * seed}/bf16.{name}/{pattern}/s{seed}"
          for name in _TWO_LEVEL if name != "vllm"
          for pattern, seed in (("ties", 0), ("special", 0), ("special", 1), ("zeros", 0))),
        "nvfp4_quantize/static/m90k48/bf16.swizzled/normal/s0", "nvfp4_quantize/static/m150k80/f16.swizzled/normal/s0",
        "nvfp4_quantize/static/m130k1024/f16.vllm_reference.swizzled/lognormal/s0",
        "nvfp4_quantize/static/m32k128/f32.compressed_tensors/ties/s0", "nvfp4_quantize/static/m0k64/bf16/normal/s0",
        "nvfp4_quantize/static/m0k64/bf16.vllm_reference.swizzled/normal/s0",
        "nvfp4_quantize/none/m33k64/bf16.svdquant.swizzled/lognormal/s0",
    ),
    rejects=(
        ("nvfp4_quantize/static/m4k24/bf16", "QNT-40"), ("nvfp4_quantize/static/m4k32/bf16.svdquant", "QNT-41"),
        ("nvfp4_quantize/none/m4k32/bf16", "QNT-41"), ("nvfp4_quantize/static/m4k32/f32", "QNT-42"),
        ("nvfp4_quantize/none/m4k64/bf16.deepgemm", "QNT-53"),
    ),
    draw=_draw,
)
