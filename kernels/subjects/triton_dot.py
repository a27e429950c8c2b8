"""One Triton kernel, `tl.dot` over K in blocks, and its launch: the plainest matrix product that Triton users write.

Decides: block sizes, and that k beyond K are zeros. Refuses nothing: operands that Triton has no matrix instruction for fail in
its compiler. What the matrix unit then computes is Triton's and the chip's; `torch_cuda` says what was found.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["BLOCK", "triton_product"]

BLOCK = 128
"""Rows and columns of D per program, and bytes of K per step: the smallest that fills a wgmma of 64 rows per warp group."""


@triton.jit  # type: ignore[untyped-decorator]
def _dot(  # type: ignore[no-untyped-def]  # triton would look a type's name up in the kernel
    a, w, out, m, n, k, a_stride, w_stride, SIDE: tl.constexpr, DEPTH: tl.constexpr, LIMIT: tl.constexpr, INTEGER: tl.constexpr
):
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    c = tl.zeros((SIDE, SIDE), dtype=tl.int32 if INTEGER else tl.float32)
    for first in range(0, k, DEPTH):
        inside = first + tl.arange(0, DEPTH)
        left = tl.load(a + row[:, None] * a_stride + inside[None, :], mask=(row[:, None] < m) & (inside[None, :] < k), other=0.0)
        right = tl.load(
            w + column[None, :] * w_stride + inside[:, None], mask=(column[None, :] < n) & (inside[:, None] < k), other=0.0
        )
        c = tl.dot(left, right, c, max_num_imprecise_acc=LIMIT, out_dtype=tl.int32 if INTEGER else tl.float32)
    tl.store(out + row[:, None] * n + column[None, :], c, mask=(row[:, None] < m) & (column[None, :] < n))


def triton_product(a: Any, w: Any, limit: int | None = None) -> Any:
    """A [M, K], W [N, K], rows of neighbouring k -> D [M, N] in float32, or int32 for int8: one chain over K in ascending order.
    limit: max_num_imprecise_acc of tl.dot, the k after which an fp8 accumulator is added to a running binary32 sum."""
    integer = a.dtype == torch.int8
    (m, k), n = a.shape, w.shape[0]
    out = torch.empty((m, n), dtype=torch.int32 if integer else torch.float32, device=a.device)
    grid = (triton.cdiv(m, BLOCK), triton.cdiv(n, BLOCK))
    _dot[grid](a, w, out, m, n, k, a.stride(0), w.stride(0), BLOCK, BLOCK // a.element_size(), limit, integer, num_warps=4)
    return out
