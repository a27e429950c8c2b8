"""What each op of the xpu backend starts, with which operands and sizes.

Decides: how tensors reach the kernels: where they lie, but for weights and their scales, which are brought into the GEMM's order
once. Refuses: nothing; problems are checked by declare.py. M = 0 starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import Problem, TensorView

from .opencl import Buffer, Place, over, room_for, start, synchronise

__all__ = ["ROWS", "run", "staged", "weights"]

Array = npt.NDArray[Any]
Tensors = Mapping[str, Any]

ROWS = {"rows1": 1, "rows8": 8}
"""Rows of D per work item of the GEMM, by tactic: one for decoding, eight that share the weights they read."""

_COLUMNS = 64  # work items per group, along N
_FORMATS = {"f16": 0, "bf16": 1, "f32": 2}


def _packed(place: Place, codes: Array, words: Buffer, offset: int) -> None:
    n, k = codes.shape
    start(place, "pack_int4", {"FORMAT": 2}, (-(-k // 8), n), None, source := over(place, codes), np.int64(source.stride), words,
          np.int64(words.stride), np.int32(k), np.int32(offset))


def weights(place: Place, constants: Mapping[str, TensorView]) -> dict[str, Any]:
    """The constants of a GEMM on the device: q as interleaved words [k / 8, n], group scales [k / g, n], the bias as it is."""
    codes, scales = constants["w"].memory, np.ascontiguousarray(constants["group_scale"].memory.T)
    n, k = codes.shape
    words, interleaved = Buffer(room_for(place, n * k // 2).memory, k // 8), room_for(place, n * k // 2)
    _packed(place, codes, words, 0)
    start(place, "interleave_int4", {"FORMAT": 2}, (n, k // 8), None, words, interleaved, np.int32(k // 8), np.int32(n))
    synchronise(place)
    found: dict[str, Any] = {"w": interleaved, "group_scale": over(place, scales)}
    if "bias" in constants:
        found["bias"] = over(place, constants["bias"].memory)
    return found


def staged(activations: Mapping[str, TensorView]) -> dict[str, Array]:
    """The activations where they lie; those of a GEMM copied if their rows do not start at multiples of 8 bytes."""
    found: dict[str, Array] = {name: view.memory for name, view in activations.items()}
    if "a" in found and (found["a"].strides[0] % 8 or found["a"].ctypes.data % 8):
        found["a"] = np.ascontiguousarray(found["a"])
    return found


def _gemm(place: Place, problem: Problem, tactic: str, tensors: Tensors, outputs: Mapping[str, Array]) -> str:
    m, n, k, g = (problem.dim(letter) for letter in "mnkg")
    rows, defines = ROWS[tactic], {"FORMAT": _FORMATS[problem.option("out")], "ROWS": ROWS[tactic]}
    a, d, token = over(place, tensors["a"]), over(place, outputs["d"], written=True), over(place, tensors["token_scale"])
    switches = (np.int32("bias" in tensors), np.int32(problem.variant == "viaf16"))
    start(
        place, "gemm_w4a8_int8", defines, (-(-n // _COLUMNS) * _COLUMNS, -(-m // rows)), (_COLUMNS, 1),
        a, np.int64(a.stride // 8), tensors["w"], tensors["group_scale"], token, tensors.get("bias"), d, np.int64(d.stride),
        np.int32(m), np.int32(n), np.int32(k // 8), np.int32(g // 8), *switches,
    )
    synchronise(place, d)
    return f"gemm_w4a8_int8_{tactic}"


def _int8_quantize(place: Place, problem: Problem, tactic: str, tensors: Tensors, outputs: Mapping[str, Array]) -> str:
    x, out = over(place, tensors["x"]), [over(place, outputs[name], written=True) for name in ("q", "scales", "zeros")]
    strided = [argument for buffer in (x, *out) for argument in (buffer, np.int64(buffer.stride))]
    sizes = (np.int32(problem.dim("k")), np.int32(problem.option("quotient") == "narrow"))
    start(place, "int8_quantize", {"FORMAT": _FORMATS[problem.option("x")]}, (problem.dim("m") * 64,), (64,), *strided, *sizes)
    synchronise(place, *out)
    return "int8_quantize"


def _int4_pack(place: Place, problem: Problem, tactic: str, tensors: Tensors, outputs: Mapping[str, Array]) -> str:
    if problem.variant == "b8":
        words = over(place, tensors["words"], written=True)
        n, eights = tensors["words"].shape
        start(place, "convert_b8", {"FORMAT": 2}, (eights, n), None, words, np.int64(words.stride))
        synchronise(place, words)
        return "convert_b8"
    (words,) = (over(place, array, written=True) for array in outputs.values())
    (codes,) = tensors.values()
    _packed(place, codes, words, 8 if problem.variant == "compressed_tensors" else 0)
    synchronise(place, words)
    return "pack_int4"


_KERNELS: dict[str, Callable[[Place, Problem, str, Tensors, Mapping[str, Array]], str]] = {
    "gemm_w4a8_int8": _gemm, "int8_quantize": _int8_quantize, "int4_pack": _int4_pack,
}


def run(place: Place, problem: Problem, tactic: str, tensors: Tensors, outputs: Mapping[str, Array]) -> str:
    """Compute the outputs where they lie, wait for it, and name the kernel."""
    if any(array.size == 0 for array in outputs.values()):
        return f"{problem.op} (nothing to start)"
    return _KERNELS[problem.op](place, problem, tactic, tensors, outputs)
