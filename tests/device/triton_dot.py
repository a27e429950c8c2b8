"""One Triton kernel, tl.dot over K in blocks, and its launch: a product function to take the fingerprint of.

Decides nothing. Needs triton and a GPU, and is imported by run_probes.py there alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["triton_product"]


@triton.jit  # type: ignore[untyped-decorator]
def _dot(  # type: ignore[no-untyped-def]  # triton would look a type's name up in the kernel
    a, w, out, k, n, BLOCK: tl.constexpr, DEPTH: tl.constexpr, LIMIT: tl.constexpr, INTEGER: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.arange(0, DEPTH)
    c = tl.zeros((BLOCK, BLOCK), dtype=tl.int32 if INTEGER else tl.float32)
    for first in range(0, k, DEPTH):
        left = tl.load(a + row[:, None] * k + first + inside[None, :])
        right = tl.load(w + column[None, :] * k + first + inside[:, None])
        c = tl.dot(left, right, c, max_num_imprecise_acc=LIMIT, out_dtype=tl.int32 if INTEGER else tl.float32)
    tl.store(out + row[:, None] * n + column[None, :], c)


def triton_product(a: torch.Tensor, w: torch.Tensor, limit: int | None = None) -> torch.Tensor:
    """A [M, K], W [N, K] (M, N, K multiples of 128) -> float32, or int32 for int8, [M, N]. limit: max_num_imprecise_acc."""
    integer = a.dtype == torch.int8
    out = torch.empty((a.shape[0], w.shape[0]), dtype=torch.int32 if integer else torch.float32, device=a.device)
    grid = (a.shape[0] // 128, w.shape[0] // 128)
    _dot[grid](a, w, out, a.shape[1], w.shape[0], 128, 128 if a.element_size() == 1 else 64, limit, integer, num_warps=4)
    return out
