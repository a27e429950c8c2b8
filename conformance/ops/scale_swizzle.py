"""scale_swizzle: block scales into the 128x4 tiles that block-scaled matrix instructions read.

Decides: the place of every scale byte and of the padding, which is zero. Refuses: empty matrices.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.references.declarations import Declaration
from lowbit.references.formats import UINT8, Codes

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Op, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import bytes_of
from ..storage import words_of

__all__ = ["OP"]

_PADDED = ("ceil(m,128)*128", "ceil(g,4)*4")


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    return bytes_of(case.pattern, tensor.shape, stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    scales = operands["scales"].codes
    return {"swizzled": exactly(words_of(scales, "scale_swizzle"), UINT8)}


OP = Op(
    name="scale_swizzle",
    formula="swizzled[(m // 128 * T + g // 4) * 512 + m % 32 * 16 + m // 32 % 4 * 4 + g % 4] = scales[m, g], T = ceil(G / 4)",
    clauses=("ENC-1", "ENC-17", "ENC-18"),
    judged={"tile128x4": "ENC-17"},
    variants=("tile128x4",),
    dims=("m", "g"),
    options=(),
    tensors=(
        TensorSpec("scales", UINT8, ("m", "g"), Role.ACTIVATION),
        TensorSpec("swizzled", UINT8, _PADDED, Role.OUTPUT, layout="scale_swizzle", logical=("m", "g")),
    ),
    constraints=(Constraint("m > 0 and g > 0", "ENC-1"),),
    ranges={"m": (1, 513, 1), "g": (1, 65, 1)},
    patterns=("all", "normal", "ramp", "special"),
    expect=_expect,
    edges=(
        "scale_swizzle/tile128x4/m128g4/plain/all/s0",
        "scale_swizzle/tile128x4/m128g8/plain/all/s0",
        "scale_swizzle/tile128x4/m256g4/plain/ramp/s0",
        "scale_swizzle/tile128x4/m1g1/plain/special/s0",
        "scale_swizzle/tile128x4/m90g3/plain/normal/s0",
        "scale_swizzle/tile128x4/m150g5/plain/normal/s0",
        "scale_swizzle/tile128x4/m129g64/plain/all/s0",
    ),
    rejects=(("scale_swizzle/tile128x4/m0g4/plain", "ENC-1"),),
    draw=_draw,
)
