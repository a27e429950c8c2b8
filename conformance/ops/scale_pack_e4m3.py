"""scale_pack_e4m3: the eight products of a group scale that a W4A8 kernel looks weights up in.

Decides: all eight bytes for each of the 256 scale codes. Refuses: nothing; NaN and negative scales are defined.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.encodings import pack_scale_e4m3
from lowbit.references.formats import E4M3FN, UINT8, Codes

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Family, Op, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import bytes_of

__all__ = ["OP"]


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    return bytes_of(case.pattern, tensor.shape, stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    return {"packed": exactly(np.asarray(pack_scale_e4m3(operands["scales"].codes)), UINT8)}


OP = Op(
    name="scale_pack_e4m3",
    formula="packed[n, j] = RNE_e4m3_sat(scales[n] * (j - 8)), j = 0..7",
    clauses=("ENC-1", "ENC-15", "ENC-16"),
    judged={"table8": "ENC-15"},
    variants=("table8",),
    dims=("n",),
    options=(),
    tensors=(
        TensorSpec("scales", E4M3FN, ("n",), Role.ACTIVATION, Family.BLOCK_SCALE),
        TensorSpec("packed", UINT8, ("n", "8"), Role.OUTPUT),
    ),
    constraints=(Constraint("n > 0", "ENC-15"),),
    ranges={"n": (1, 4096, 1)},
    patterns=("all", "normal", "ramp", "special"),
    expect=_expect,
    edges=("scale_pack_e4m3/table8/n257/plain/all/s0", "scale_pack_e4m3/table8/n7/plain/special/s0",
           "scale_pack_e4m3/table8/n1/plain/normal/s0"),
    rejects=(("scale_pack_e4m3/table8/n0/plain", "ENC-15"),),
    draw=_draw,
)
