"""Memory of the suite as torch tensors, shared and never copied unless said.

Decides: how a kernel is handed what the suite allocated, on the host (the interpreter) and on a device. Refuses: nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lowbit.conformance.backend import TensorView

__all__ = ["rows_of", "scratch", "tensor"]


def tensor(view: TensorView) -> torch.Tensor:
    """The view's memory, shared: containers uint8, int16, int32 or int64 in the shape and strides of the view."""
    memory: Any = view.memory
    if isinstance(memory, np.ndarray):
        signed = memory if memory.dtype == np.uint8 else memory.view(f"i{memory.dtype.itemsize}")
        return torch.from_numpy(signed)
    found: torch.Tensor = memory
    return found


def rows_of(view: TensorView) -> tuple[torch.Tensor, int]:
    """A matrix whose last axis is contiguous, and the distance of its rows in containers. Another stride of the last axis: a
    copy, which only an input may be."""
    found = tensor(view)
    if found.dim() == 2 and found.shape[1] > 1 and found.stride(1) != 1:
        found = found.contiguous()
    return found, int(found.stride(0)) if found.dim() == 2 else found.numel()


def scratch(workspace: TensorView, dtype: torch.dtype, shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """`shape` of `dtype` from byte `start` of the workspace on. Raises ValueError where it is too small."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    flat = tensor(workspace).reshape(-1)
    if start + size > flat.numel():
        raise ValueError(f"triton: got a workspace of {flat.numel()} bytes, expected {start + size}; size it by `workspace`")
    return flat[start : start + size].view(dtype).view(shape)
