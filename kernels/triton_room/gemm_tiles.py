"""What the GEMMs of this room have in common: tiles in and out of memory, the order of tiles, and the end of a GEMM.

Decides: how a tile is addressed (pointers with masks, or a descriptor that the copy engine of the chip reads), how D is walked,
and bias and cast. Refuses: nothing; each GEMM refuses what it does not compute. Offsets are 64 bits wide.

Every kernel has a compile-time argument FAULT, "" in a product: the name of a defect that the tests plant and must catch.
"tail_skipped" leaves out the K tile that is not whole, "int32_offsets" computes offsets in 32 bits, "bias_dropped_at_m1" is what
it says; the others belong to one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit.kernels.triton_room.codes16 import code, value
from lowbit.kernels.triton_room.machine import MACHINES, Machine

__all__ = [
    "ALIGNMENT", "BIASES", "FORMATS", "OPTIONS", "SHARED_FAULTS", "described", "end", "multiply_add", "offsets", "place_of",
    "read_tile", "speaks_ptx", "store_tile", "tiles_of_k",
]

OPTIONS = {"enable_fp_fusion": False}
"""Compiler options that decide bits: every product is rounded on its own, unless the kernel writes tl.fma."""

FORMATS = {"f32": 0, "f16": 1, "bf16": 2}
"""Output format -> FORMAT of codes16."""

BIASES = {"nobias": 0, "bias": 1, "biasafter": 2}
"""Option -> compile-time argument BIAS: none, in binary32 before the cast, in the output format after it."""

SHARED_FAULTS = ("tail_skipped", "int32_offsets", "bias_dropped_at_m1")
"""Defects of every GEMM of this room."""

ALIGNMENT = 16
"""Bytes by which the base and the rows of a described matrix are aligned (CUDA driver API, cuTensorMapEncodeTiled)."""


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def offsets(indices, stride, FAULT: tl.constexpr):  # type: ignore[no-untyped-def]
    """indices * stride, int64."""
    if FAULT == "int32_offsets":
        return tl.cast(indices, tl.int32) * tl.cast(stride, tl.int32)
    else:
        return tl.cast(indices, tl.int64) * stride


@triton.jit
def place_of(index, tiles_m, tiles_n, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, column) of a tile of D: BAND rows of tiles are walked column by column, so that neighbours share operands in L2."""
    band = index // (BAND * tiles_n)
    first = band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    inside = index % (BAND * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def tiles_of_k(k, BLOCK_K: tl.constexpr, FAULT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of K tiles; the last may reach beyond K."""
    if FAULT == "tail_skipped":
        return k // BLOCK_K
    else:
        return tl.cdiv(k, BLOCK_K)


@triton.jit
def read_tile(  # type: ignore[no-untyped-def]
    matrix, first_row, count, first, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr,
    FAULT: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix [count, width] from (first_row, first) on, 0 outside. DESCRIBED: `matrix` is a descriptor of
    blocks of that shape, otherwise a pointer to rows that lie `stride` elements apart."""
    if DESCRIBED:
        return matrix.load([first_row, first])
    else:
        rows, columns = first_row + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
        inside = (rows < count)[:, None] & (columns < width)[None, :]
        return tl.load(matrix + offsets(rows, stride, FAULT)[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def multiply_add(x, factor, total, FUSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """x * factor + total in binary32, all broadcast to the shape of total: rounded once, or the product on its own."""
    if FUSED:
        return tl.fma(x, factor.broadcast_to(total.shape), total)
    else:
        return total + x * factor


@triton.jit
def end(  # type: ignore[no-untyped-def]
    total, bias, columns, m, n, BIAS: tl.constexpr, FORMAT: tl.constexpr, FAULT: tl.constexpr
):
    """Codes of binary32 `total` [BLOCK_M, BLOCK_N] in the output format, the bias added before the cast or after it."""
    if BIAS == 0:
        return code(total, FORMAT)
    else:
        addend = value(tl.load(bias + columns, mask=columns < n, other=0), FORMAT)[None, :]
        if FAULT == "bias_dropped_at_m1":
            addend = tl.where(m == 1, 0.0, addend)
        if BIAS == 1:
            return code(total + addend, FORMAT)
        else:  # the sum of two 16-bit values keeps its rounding through binary32: 24 >= 2 * 11 + 2 bits
            return code(value(code(total, FORMAT), FORMAT) + addend, FORMAT)


@triton.jit
def store_tile(d, codes, rows, m, columns, n, stride, FAULT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of one tile to D, whose rows lie `stride` elements apart."""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(d + offsets(rows, stride, FAULT)[:, None] + columns[None, :], codes, mask=inside)


# Host ----------------------------------------------------------------------------------------------------------------


def described(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    """A descriptor of [rows, columns] blocks of a matrix with contiguous rows; None where its memory is not aligned for one."""
    size = matrix.element_size()
    fits = matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(0) * size % ALIGNMENT == 0 and matrix.numel() > 0
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns]) if fits else None


def speaks_ptx(machine: Machine) -> bool:
    """Whether kernels for this machine may hold a line of PTX: it is one of NVIDIA's."""
    return any(machine.name == known.name for known in MACHINES.values())
