"""What every adapter of this room needs: a library that may be absent, and torch tensors over the memory of the suite.

Decides: how a code becomes an element of a torch dtype (the same bits, never a conversion), and what is said where a library is
not installed. Refuses: formats that torch has no dtype for.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from lowbit.conformance.backend import TensorView

__all__ = ["as_torch", "library", "unpaired", "versions", "write"]

_DTYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "e4m3fn": "float8_e4m3fn", "e4m3fnuz": "float8_e4m3fnuz",
    "int8": "int8", "uint4": "uint8",
}
"""torch dtype that reads the codes of a format as they lie in memory; uint4 codes lie one per byte."""


def library(module: str, distribution: str) -> Any:
    """A third-party module. Raises ImportError with one sentence where its distribution, or one that it imports, is absent."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        own = (error.name or "").partition(".")[0] == module.partition(".")[0]
        missing = f"{distribution} is not installed" if own else f"{distribution} needs {error.name}, which is not installed"
        raise ImportError(f"{missing}, so there is nothing to certify; install the extra lowbit[subjects]") from error


def versions(*distributions: str) -> Mapping[str, str]:
    """Versions of the distributions and of Python, and the kind of machine."""
    found = {"python": platform.python_version(), "system": platform.system(), "processor": platform.machine()}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def as_torch(torch: Any, view: TensorView) -> Any:
    """The tensor over the suite's memory, strides kept, in the dtype of its format; nothing is copied."""
    signed = np.asarray(view.memory).view(f"i{view.memory.dtype.itemsize}")
    return torch.from_numpy(signed).view(getattr(torch, _DTYPES[view.format.name]))


def unpaired(torch: Any, packed: Any) -> Any:
    """Codes [rows, K] of two per byte [rows, K / 2], the even one in the low nibble."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def write(view: TensorView, result: Any) -> None:
    """Copy the bits of a torch result into an output of the suite."""
    words = {1: "int8", 2: "int16", 4: "int32"}[view.memory.dtype.itemsize]
    torch = import_module("torch")
    view.memory[...] = result.contiguous().view(getattr(torch, words)).numpy().view(view.memory.dtype)
