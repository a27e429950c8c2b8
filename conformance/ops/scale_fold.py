"""scale_fold: bf16 group scales split into e4m3 group scales, small enough for eight products, and binary32 channel scales.

Decides: both outputs, double rounding included. Refuses: nothing beyond the group of 128 that the shape implies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.encodings import fold_scales
from lowbit.references.formats import BF16, E4M3FN, F32, Codes, decode
from lowbit.references.recipes import RECIPES
from lowbit.references.rounding import encode

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import draw_x, ties_of

__all__ = ["OP"]

_RECIPES = {"vllm": RECIPES["vllm_fp8_token"], "vllm_native": RECIPES["vllm_native_fp8_token"]}


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    recipe, shape = _RECIPES[case.problem.option("recipe")], (tensor.shape[0], tensor.shape[1])
    if case.pattern == "all":  # row amax 448: each group is an e4m3 value, a tie or the bf16 value beside one
        middles = ties_of(E4M3FN)
        pool = np.concatenate((decode(np.arange(0x7F, dtype=np.uint8), E4M3FN), middles, -middles))
        values = pool[np.arange(shape[0] * shape[1]) % pool.size].reshape(shape)
        values[:, :1] = 448.0
        return encode(values, BF16)
    return draw_x(case, shape, BF16, recipe, stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    groups, channels = fold_scales(operands["scales"].codes, _RECIPES[case.problem.option("recipe")])
    return {"group_scale": exactly(groups, E4M3FN), "channel_scale": exactly(channels, F32)}


OP = Op(
    name="scale_fold",
    formula="c = max(amax_row / 448, 1 / (448 * 512)); group = RNE_e4m3(RNE_e4m3(s / c) / 8); channel = 8 c",
    clauses=("ENC-1", "ENC-19", "ENC-20", "ENC-21"),
    judged={"row": "ENC-19"},
    variants=("row",),
    dims=("n", "k"),
    options=(Option("recipe", ("vllm", "vllm_native")),),
    tensors=(
        TensorSpec("scales", BF16, ("n", "k/128"), Role.ACTIVATION, Family.REAL),
        TensorSpec("group_scale", E4M3FN, ("n", "k/128"), Role.OUTPUT, Family.BLOCK_SCALE),
        TensorSpec("channel_scale", F32, ("n", "1"), Role.OUTPUT, Family.OUTER_SCALE),
    ),
    constraints=(Constraint("n > 0 and k > 0", "ENC-1"), Constraint("k % 128 == 0", "ENC-19")),
    ranges={"n": (1, 512, 1), "k": (128, 16384, 128)},
    patterns=("normal", "positive", "lognormal", "ties", "special", "zeros", "extremes", "all"),
    expect=_expect,
    edges=(
        "scale_fold/row/n8k8192/vllm/all/s0", "scale_fold/row/n26k16384/vllm/special/s0", "scale_fold/row/n64k4096/vllm/ties/s0",
        "scale_fold/row/n16k128/vllm/positive/s0", "scale_fold/row/n26k16384/vllm_native/special/s0",
        "scale_fold/row/n64k4096/vllm_native/ties/s0",
    ),
    rejects=(("scale_fold/row/n16k64/vllm", "ENC-19"),),
    draw=_draw,
)
