"""One scale for a whole tensor in Triton: amax by parts, then the scale, in two launches and without atomics.

Decides: how amax of a matrix is found and what scale a rule makes of it. Refuses: rows outside the matrix; padding never counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.kernels.triton_room.blocks import largest, offset
from lowbit.kernels.triton_room.codes16 import value
from lowbit.kernels.triton_room.division import div

__all__ = ["find_scale", "parts"]

_ROWS, _COLUMNS = 16, 1024


@triton.jit
def amax_of_tiles(  # type: ignore[no-untyped-def]
    x, found, m, k, x_stride, FORMAT: tl.constexpr, NAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """found[i * tiles along K + j]: int32 code of amax of tile (i, j) of x [m, k]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < m)[:, None] & (column < k)[None, :]
    tile = value(tl.load(x + offset(row, x_stride, 0)[:, None] + column[None, :], mask=inside, other=0), FORMAT)
    amax = tl.max(largest(tile, NAN).to(tl.int32, bitcast=True), axis=0)
    tl.store(found + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), amax)


@triton.jit
def scale_of_amax(  # type: ignore[no-untyped-def]
    found, count, scale, RANGE: tl.constexpr, ENCODE: tl.constexpr, GUARD: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):
    """scale[0]: int32 binary32 code of RANGE / amax (ENCODE) or of amax / RANGE, at least FLOOR; GUARD as in `Nvfp4Recipe`."""
    best = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(found + place, mask=place < count, other=0))
    amax = tl.full((1,), 0, tl.int32) + tl.max(best, axis=0)
    amax = amax.to(tl.float32, bitcast=True)
    limit = tl.full((1,), RANGE, tl.float32)
    result = div(limit, amax) if ENCODE else div(amax, limit)
    if GUARD == 1:
        finite = (result.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        result = tl.where(finite, result, 1.0)
    elif GUARD == 2:
        result = tl.where(amax == 0, 1.0, tl.where(result > 3.4028234663852886e38, 3.4028234663852886e38, result))
    result = tl.where(result < FLOOR, FLOOR, result)
    tl.store(scale + tl.arange(0, 1), result.to(tl.int32, bitcast=True))


def parts(m: int, k: int, *, wide: bool = False) -> int:
    """Number of int32 that `find_scale` keeps between its launches. `wide`: tiles for the interpreter."""
    rows, columns = _tile(wide)
    return int(triton.cdiv(m, rows) * triton.cdiv(k, columns))


def _tile(wide: bool) -> tuple[int, int]:
    return (256, 4096) if wide else (_ROWS, _COLUMNS)


def find_scale(
    x: torch.Tensor, x_stride: int, shape: tuple[int, int], scale: torch.Tensor, found: torch.Tensor, *, form: int, nan: int,
    limit: float, encode: int, guard: int = 0, floor: float = 0.0, wide: bool = False,
) -> None:
    """Write the int32 code of the scale of x [m, k] (codes of `form`, rows `x_stride` apart) to `scale`. `found`: int32, `parts`
    of them. `nan`: 1, a NaN reaches the scale. `limit`, `encode`, `guard`, `floor`: RANGE, ENCODE, GUARD, FLOOR of
    `scale_of_amax`."""
    m, k = shape
    rows, columns = _tile(wide)
    count = parts(m, k, wide=wide)
    if count:
        amax_of_tiles[(triton.cdiv(m, rows), triton.cdiv(k, columns))](
            x, found, m, k, x_stride, FORMAT=form, NAN=nan, ROWS=rows, COLUMNS=columns, num_warps=8, enable_fp_fusion=False,
        )
    scale_of_amax[(1,)](
        found, count, scale, RANGE=limit, ENCODE=encode, GUARD=guard, FLOOR=floor, BLOCK=1024, enable_fp_fusion=False,
    )
