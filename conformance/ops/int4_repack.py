"""int4_repack: checkpoint weights and zero points, packed along K or N, into what a W4A16 kernel reads.

Decides: a permutation of nibbles. Refuses: sizes that do not fill whole words on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.references.declarations import Declaration
from lowbit.references.formats import INT32, Codes

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Family, Op, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import nibbles
from ..storage import codes_of, words_of

__all__ = ["OP"]

_MOVES = {"weight": ("int32_k", "int32_n"), "zeros": ("compressed_tensors_zeros", "zeros_n")}
_WEIGHT, _ZEROS = (("variant", ("weight",)),), (("variant", ("zeros",)),)


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    axis = 1 if case.problem.variant == "weight" else 0
    return words_of(nibbles(case.pattern, tensor.logical, stream, axis), tensor.layout)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    before, after = _MOVES[case.problem.variant]
    codes = codes_of(operands["packed"].codes, before, (case.problem.dim("n"), case.problem.dim("k")))
    return {"repacked": exactly(words_of(codes, after), INT32)}


OP = Op(
    name="int4_repack",
    formula="weight: [N, K/8] along k -> [K, N/8] along n; zeros: [N/8, G] along n -> [G, N/8] along n; nibbles unchanged",
    clauses=("ENC-1", "ENC-10", "ENC-11"),
    judged={"weight": "ENC-10", "zeros": "ENC-11"},
    variants=("weight", "zeros"),
    dims=("n", "k"),
    options=(),
    tensors=(
        TensorSpec("packed", INT32, ("n", "k/8"), Role.ACTIVATION, when=_WEIGHT, layout="int32_k", logical=("n", "k")),
        TensorSpec("repacked", INT32, ("k", "n/8"), Role.OUTPUT, when=_WEIGHT, layout="int32_n", logical=("n", "k")),
        TensorSpec("packed", INT32, ("n/8", "k"), Role.ACTIVATION, Family.ZERO_POINT, _ZEROS, "compressed_tensors_zeros",
                   ("n", "k")),
        TensorSpec("repacked", INT32, ("k", "n/8"), Role.OUTPUT, Family.ZERO_POINT, _ZEROS, "zeros_n", ("n", "k")),
    ),
    constraints=(
        Constraint("n > 0 and k > 0", "ENC-1"),
        Constraint("variant != 'weight' or (n % 8 == 0 and k % 8 == 0)", "ENC-10"),
        Constraint("variant != 'zeros' or n % 8 == 0", "ENC-11"),
    ),
    ranges={"n": (8, 512, 8), "k": (8, 1024, 8)},
    patterns=("all", "normal", "ramp", "extremes"),
    expect=_expect,
    edges=(
        "int4_repack/weight/n64k128/plain/all/s0",
        "int4_repack/weight/n8k64/plain/ramp/s0",
        "int4_repack/weight/n64k8/plain/ramp/s0",
        "int4_repack/zeros/n128k24/plain/all/s0",
        "int4_repack/zeros/n8k1/plain/ramp/s0",
    ),
    rejects=(
        ("int4_repack/weight/n12k64/plain", "ENC-10"),
        ("int4_repack/weight/n64k12/plain", "ENC-10"),
        ("int4_repack/zeros/n12k4/plain", "ENC-11"),
    ),
    draw=_draw,
)
