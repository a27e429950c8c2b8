"""Operands in the arrangement that the kernels read, and their results in the one the suite asks for.

Decides: two codes per byte along K, even k in the low half; scales transposed to [K/64, rows]; matrices contiguous along K.
Refuses: nothing; problems are checked by declare.py. Values are only moved, but for the low-rank activation, which is rounded
from binary32 to binary16 as the contract says (NVF-3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import Role, TensorView

__all__ = ["codes_of_nibbles", "halves", "nibbles", "rows_of", "transposed"]

Array = npt.NDArray[Any]


def nibbles(codes: Array) -> Array:
    """uint8 [rows, k] with one 4-bit code each to uint8 [rows, k / 2], even k in bits 0 to 3."""
    return np.ascontiguousarray((codes[:, 0::2] & 15) | (codes[:, 1::2] << 4))


def codes_of_nibbles(packed: Array) -> Array:
    """uint8 [rows, k / 2], even k in bits 0 to 3, to uint8 [rows, k] with one 4-bit code each."""
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(packed.shape[0], 2 * packed.shape[1])


def transposed(codes: Array) -> Array:
    """[rows, columns] to [columns, rows], contiguous."""
    return np.ascontiguousarray(codes.T)


def halves(codes: Array) -> Array:
    """binary32 codes to binary16 codes, nearest even; overflow gives infinity, NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(codes).view(np.float32).astype(np.float16).view(np.uint16)


def rows_of(tensors: Mapping[str, TensorView]) -> dict[str, Array]:
    """The arrays of tensor views, contiguous: rows that the suite padded lose their padding. Of those that are changed in place,
    the memory itself."""
    return {
        name: view.memory if view.role is Role.INOUT else np.ascontiguousarray(view.memory) for name, view in tensors.items()
    }
