"""fp8_convert_fnuz: e4m3fn weights and their scales as the hardware's fp8 format has them.

Decides: every byte and both scales, for hardware that computes in e4m3fnuz and for hardware that keeps e4m3fn.
Refuses: nothing; the NaN bytes of e4m3fn, which e4m3fnuz reads as +-240, are defined too.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.references.declarations import Declaration
from lowbit.references.encodings import convert_fnuz
from lowbit.references.formats import F32, UINT8, Codes

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import bytes_of

__all__ = ["OP"]

_INPUT = (("input_scale", ("static",)),)


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    return bytes_of(case.pattern, tensor.shape, stream) if tensor.name == "w" else None


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    input_scale = operands["input_scale"].codes if "input_scale" in operands else None
    w, weight_scale = operands["w"].codes, operands["weight_scale"].codes
    if case.problem.option("hardware") == "fnuz":
        w, weight_scale, input_scale = convert_fnuz(w, weight_scale, input_scale)
    found = {"w_out": exactly(w, UINT8), "weight_scale_out": exactly(weight_scale, F32)}
    return found if input_scale is None else found | {"input_scale_out": exactly(input_scale, F32)}


OP = Op(
    name="fp8_convert_fnuz",
    formula="w_out = w except 0x80 -> 0x00; weight_scale_out = 2 weight_scale; input_scale_out = 2 input_scale",
    clauses=("ENC-1", "ENC-22", "ENC-23", "ENC-24"),
    judged={"tensor": "ENC-22", "channel": "ENC-22"},
    variants=("tensor", "channel"),
    dims=("n", "k"),
    options=(Option("hardware", ("fnuz", "fn")), Option("input_scale", ("dynamic", "static"))),
    tensors=(
        TensorSpec("w", UINT8, ("n", "k"), Role.ACTIVATION),
        TensorSpec("weight_scale", F32, ("1",), Role.ACTIVATION, Family.OUTER_SCALE, (("variant", ("tensor",)),)),
        TensorSpec("weight_scale", F32, ("n", "1"), Role.ACTIVATION, Family.OUTER_SCALE, (("variant", ("channel",)),)),
        TensorSpec("input_scale", F32, ("1",), Role.ACTIVATION, Family.OUTER_SCALE, _INPUT),
        TensorSpec("w_out", UINT8, ("n", "k"), Role.OUTPUT),
        TensorSpec("weight_scale_out", F32, ("1",), Role.OUTPUT, Family.OUTER_SCALE, (("variant", ("tensor",)),)),
        TensorSpec("weight_scale_out", F32, ("n", "1"), Role.OUTPUT, Family.OUTER_SCALE, (("variant", ("channel",)),)),
        TensorSpec("input_scale_out", F32, ("1",), Role.OUTPUT, Family.OUTER_SCALE, _INPUT),
    ),
    constraints=(Constraint("n > 0 and k > 0", "ENC-1"),),
    ranges={"n": (1, 512, 1), "k": (1, 1024, 1)},
    patterns=("all", "normal", "special", "extremes"),
    expect=_expect,
    edges=(
        "fp8_convert_fnuz/tensor/n16k64/fnuz/all/s0", "fp8_convert_fnuz/channel/n16k65/fnuz.static/all/s0",
        "fp8_convert_fnuz/tensor/n16k64/fn.static/all/s0", "fp8_convert_fnuz/channel/n3k7/fn/special/s0",
        "fp8_convert_fnuz/channel/n64k16/fnuz.static/extremes/s0",
    ),
    rejects=(("fp8_convert_fnuz/tensor/n0k16/fnuz", "ENC-1"),),
    draw=_draw,
)
