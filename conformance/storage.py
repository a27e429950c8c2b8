"""Code matrices as the storage tensors of a public layout, and expectations in storage order.

Decides: the words that hold a matrix of codes, for ops whose tensors name a layout. Refuses: arithmetic; codes only move.
The format of such a tensor is that of its word (UINT8, or INT32 for four bytes), its shape that of the storage; `logical` is the
shape of the codes. Leading axes of `logical` are matrices one after the other, each stored by itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lowbit.references.formats import Codes
from lowbit.references.layouts import LAYOUTS, pack, storage_shape, unpack

from .op import Expectation

__all__ = ["arranged", "codes_of", "words_of"]


def words_of(codes: Codes, layout: str) -> Codes:
    """Codes [..., rows, cols] to storage words [..., *storage shape], native unsigned integers of the layout's word."""
    found = LAYOUTS[layout]
    rows, columns = codes.shape[-2:]
    shape, word = storage_shape(found, rows, columns)
    count = int(np.prod(codes.shape[:-2], dtype=np.int64))
    stack = [pack(matrix, found).view(word).reshape(shape) for matrix in codes.reshape(count, rows, columns)]
    return np.stack(stack).reshape(*codes.shape[:-2], *shape).astype(word.newbyteorder("="))


def codes_of(words: Codes, layout: str, logical: tuple[int, ...]) -> Codes:
    """Inverse of `words_of`: storage words to codes of shape `logical`."""
    found = LAYOUTS[layout]
    rows, columns = logical[-2:]
    count = int(np.prod(logical[:-2], dtype=np.int64))
    little = np.ascontiguousarray(words).astype(words.dtype.newbyteorder("<")).view(np.uint8)
    flat = little.reshape(count, little.size // count)
    return np.stack([unpack(np.ascontiguousarray(part), found, rows, columns) for part in flat]).reshape(logical)


def arranged(expectation: Expectation, layout: str) -> Expectation:
    """An expectation of an 8-bit matrix [rows, cols], padding included already, in the storage order of a layout."""
    found = LAYOUTS[layout]
    rows, columns = expectation.lo.shape
    index = np.arange(rows * columns).reshape(rows, columns)
    planes = [pack((index >> shift & 0xFF).astype(np.uint8), found).astype(np.int64) << shift for shift in (0, 8, 16, 24)]
    source: npt.NDArray[np.int64] = np.bitwise_or.reduce(planes)
    place = np.empty_like(source)
    place[source] = np.arange(source.size)
    shape, _ = storage_shape(found, rows, columns)
    sparse = {int(place[i]): codes for i, codes in expectation.sparse.items()}
    lo, hi = (keys.reshape(-1)[source].reshape(shape) for keys in (expectation.lo, expectation.hi))
    flags = expectation.flags.reshape(-1)[source].reshape(shape)
    return replace(expectation, lo=lo, hi=hi, flags=flags, sparse=sparse)
