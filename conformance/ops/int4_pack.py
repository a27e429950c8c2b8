"""int4_pack: 4-bit codes into the storage of each source system, and the change of code of uint4b8.

Decides: which storage holds a code matrix [N, K]. Refuses: sizes that do not fill whole words, save where the layout itself pads.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.formats import INT8, INT32, UINT8, Codes, Format
from lowbit.references.layouts import LAYOUTS, Axis

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Op, Option, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import nibbles
from ..storage import words_of

__all__ = ["OP"]

# variant -> (layout, storage shape, logical shape)
_LAYOUTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "gptq": ("gptq", ("k/8", "n"), ("n", "k")),
    "k_major": ("int32_k", ("n", "k/8"), ("n", "k")),
    "along_n": ("int32_n", ("k", "n/8"), ("n", "k")),
    "awq": ("awq", ("k", "n/8"), ("n", "k")),
    "nibble": ("nibble_low_first", ("n", "k/2"), ("n", "k")),
    "compressed_tensors": ("compressed_tensors", ("n", "ceil(k,8)"), ("n", "k")),
    "zeros_v1": ("zeros_n", ("k", "n/8"), ("n", "k")),
    "zeros_v2": ("zeros_n", ("k", "n/8"), ("n", "k")),
}


def _word(layout: str) -> Format:
    return UINT8 if LAYOUTS[layout].word_bytes == 1 else INT32


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    if tensor.name == "words":
        return words_of(nibbles(case.pattern, tensor.logical, stream), tensor.layout)
    layout = LAYOUTS[_LAYOUTS[case.problem.variant][0]]
    codes = nibbles(case.pattern, tensor.shape, stream, 0 if layout.packed_axis is Axis.ROW else 1)
    if tensor.format is INT8:
        return np.where(codes & 8, codes | np.uint8(0xF0), codes).astype(np.uint8)
    return codes


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    variant = case.problem.variant
    if variant == "b8":
        return {"words": exactly(operands["words"].codes ^ np.uint32(0x88888888), INT32)}
    codes = operands["q"].codes & np.uint8(15)
    if variant == "compressed_tensors":
        codes = codes ^ np.uint8(8)
    if variant == "zeros_v1":
        codes = (codes - np.uint8(1)) & np.uint8(15)
    layout = _LAYOUTS[variant][0]
    return {"packed": exactly(words_of(codes, layout), _word(layout))}


OP = Op(
    name="int4_pack",
    formula="packed[word, 4i : 4i + 4] = code(n, k) & 15; b8: word ^= 0x88888888",
    clauses=("ENC-1", "ENC-2", "ENC-3", "ENC-4", "ENC-5", "ENC-6", "ENC-7", "ENC-8", "ENC-9"),
    judged={
        "gptq": "ENC-2", "k_major": "ENC-2", "along_n": "ENC-3", "awq": "ENC-4", "nibble": "ENC-5",
        "compressed_tensors": "ENC-6", "zeros_v1": "ENC-8", "zeros_v2": "ENC-8", "b8": "ENC-9",
    },
    variants=(*_LAYOUTS, "b8"),
    dims=("n", "k"),
    options=(Option("codes", ("uint4", "int8")),),
    tensors=(
        TensorSpec("q", "codes", ("n", "k"), Role.ACTIVATION, when=(("variant", tuple(_LAYOUTS)),)),
        *(
            TensorSpec("packed", _word(name), shape, Role.OUTPUT, when=(("variant", (variant,)),), layout=name, logical=logical)
            for variant, (name, shape, logical) in _LAYOUTS.items()
        ),
        TensorSpec("words", INT32, ("n", "k/8"), Role.INOUT, when=(("variant", ("b8",)),), layout="int32_k", logical=("n", "k")),
    ),
    constraints=(
        Constraint("n > 0 and k > 0", "ENC-1"),
        Constraint("variant not in ('gptq', 'k_major', 'b8') or k % 8 == 0", "ENC-2"),
        Constraint("variant != 'along_n' or n % 8 == 0", "ENC-3"),
        Constraint("variant != 'awq' or n % 8 == 0", "ENC-4"),
        Constraint("variant != 'nibble' or k % 2 == 0", "ENC-5"),
        Constraint("variant != 'compressed_tensors' or codes == 'int8'", "ENC-6"),
        Constraint("variant not in ('zeros_v1', 'zeros_v2', 'b8') or codes == 'uint4'", "ENC-7"),
        Constraint("variant not in ('zeros_v1', 'zeros_v2') or n % 8 == 0", "ENC-8"),
    ),
    ranges={"n": (8, 512, 8), "k": (8, 1024, 8)},
    patterns=("all", "normal", "ramp", "extremes", "zeros"),
    expect=_expect,
    edges=(
        "int4_pack/gptq/n64k128/uint4/all/s0",
        "int4_pack/gptq/n24k40/int8/extremes/s0",
        "int4_pack/k_major/n64k128/int8/all/s0",
        "int4_pack/along_n/n128k64/uint4/all/s0",
        "int4_pack/along_n/n40k24/int8/extremes/s0",
        "int4_pack/awq/n128k64/uint4/all/s0",
        "int4_pack/nibble/n64k66/int8/all/s0",
        "int4_pack/compressed_tensors/n64k128/int8/all/s0",
        "int4_pack/compressed_tensors/n3k13/int8/extremes/s0",
        "int4_pack/zeros_v1/n128k24/uint4/all/s0",
        "int4_pack/zeros_v1/n8k1/uint4/zeros/s0",
        "int4_pack/zeros_v2/n128k24/uint4/all/s0",
        "int4_pack/b8/n64k128/uint4/all/s0",
    ),
    rejects=(
        ("int4_pack/gptq/n8k12/uint4", "ENC-2"),
        ("int4_pack/k_major/n8k4/uint4", "ENC-2"),
        ("int4_pack/b8/n8k9/uint4", "ENC-2"),
        ("int4_pack/along_n/n12k8/uint4", "ENC-3"),
        ("int4_pack/awq/n4k8/uint4", "ENC-4"),
        ("int4_pack/nibble/n8k7/uint4", "ENC-5"),
        ("int4_pack/compressed_tensors/n8k8/uint4", "ENC-6"),
        ("int4_pack/zeros_v1/n12k2/uint4", "ENC-8"),
    ),
    draw=_draw,
)
