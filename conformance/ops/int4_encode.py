"""int4_encode: the unified int4 code of the Hopper W4A8 kernel, alone or with the register reorder of its MMA.

Decides: the nibble map and the place of every nibble. Refuses: shapes for which a source kernel would drop or overrun bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.formats import INT32, UINT8, Codes
from lowbit.references.layouts import UNIFIED_INT4

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Op, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import nibbles
from ..storage import codes_of, words_of

__all__ = ["OP"]

_UNIFIED, _DENSE, _GROUPED = ((("variant", (name,)),) for name in ("unified", "dense", "grouped"))
_MAP = np.array(UNIFIED_INT4, dtype=np.uint8)


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    return words_of(nibbles(case.pattern, tensor.logical, stream), tensor.layout)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    problem = case.problem
    n, k = problem.dim("n"), problem.dim("k")
    before, after, word = ("nibble_low_first", "nibble_low_first", UINT8)
    if problem.variant != "unified":
        before, after, word = ("int32_k", "reorder_e4m3", INT32)
    logical = (problem.dim("e"), n, k) if problem.variant == "grouped" else (n, k)
    codes = codes_of(operands["q"].codes, before, logical)
    return {"encoded": exactly(words_of(_MAP[codes], after), word)}


OP = Op(
    name="int4_encode",
    formula="encoded = reorder(U(q)), U(v) = 8 - v for v in 1..7, else v; unified: no reorder",
    clauses=("ENC-1", "ENC-12", "ENC-13", "ENC-14"),
    judged={"unified": "ENC-12", "dense": "ENC-13", "grouped": "ENC-14"},
    variants=("unified", "dense", "grouped"),
    dims=("e", "n", "k"),
    options=(),
    tensors=(
        TensorSpec("q", UINT8, ("n", "k/2"), Role.ACTIVATION, when=_UNIFIED, layout="nibble_low_first", logical=("n", "k")),
        TensorSpec("encoded", UINT8, ("n", "k/2"), Role.OUTPUT, when=_UNIFIED, layout="nibble_low_first", logical=("n", "k")),
        TensorSpec("q", INT32, ("n", "k/8"), Role.ACTIVATION, when=_DENSE, layout="int32_k", logical=("n", "k")),
        TensorSpec("encoded", INT32, ("k/8", "n"), Role.OUTPUT, when=_DENSE, layout="reorder_e4m3", logical=("n", "k")),
        TensorSpec("q", INT32, ("e", "n", "k/8"), Role.ACTIVATION, when=_GROUPED, layout="int32_k", logical=("e", "n", "k")),
        TensorSpec("encoded", INT32, ("e", "k/8", "n"), Role.OUTPUT, when=_GROUPED, layout="reorder_e4m3",
                   logical=("e", "n", "k")),
    ),
    constraints=(
        Constraint("e > 0 and n > 0 and k > 0", "ENC-1"),
        Constraint("variant == 'grouped' or e == 1", "ENC-14"),
        Constraint("variant != 'unified' or (k % 2 == 0 and n * k % 32 == 0)", "ENC-12"),
        Constraint("variant != 'dense' or (k % 128 == 0 and n % 16 == 0)", "ENC-13"),
        Constraint("variant != 'grouped' or (k % 256 == 0 and n % 16 == 0)", "ENC-14"),
    ),
    ranges={"e": (1, 8, 1), "n": (16, 256, 16), "k": (256, 1024, 256)},
    patterns=("all", "normal", "ramp", "extremes"),
    expect=_expect,
    edges=(
        "int4_encode/unified/e1n16k258/plain/all/s0",
        "int4_encode/unified/e1n1k32/plain/ramp/s0",
        "int4_encode/dense/e1n16k128/plain/all/s0",
        "int4_encode/dense/e1n48k384/plain/normal/s0",
        "int4_encode/grouped/e1n16k256/plain/all/s0",
        "int4_encode/grouped/e3n32k512/plain/normal/s0",
    ),
    rejects=(
        ("int4_encode/unified/e1n1k16/plain", "ENC-12"),
        ("int4_encode/dense/e1n16k64/plain", "ENC-13"),
        ("int4_encode/dense/e1n8k128/plain", "ENC-13"),
        ("int4_encode/dense/e2n16k128/plain", "ENC-14"),
        ("int4_encode/grouped/e2n16k128/plain", "ENC-14"),
        ("int4_encode/grouped/e2n24k256/plain", "ENC-14"),
    ),
    draw=_draw,
)
