"""Calls of the C functions that the .cu files of this folder export: types, device, stream, errors.

Decides: how a signature is written (`entry`), and on which device and stream a launch happens (`launch`).
Refuses: a device that is not of compute capability 9.0, and to go on after an error that the CUDA runtime reports.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from .build import library
from .device import check, stream_handle

__all__ = ["LaunchError", "entry", "launch"]

_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_longlong, "i": ctypes.c_int}


class LaunchError(RuntimeError):
    """A launch that the CUDA runtime refused; the message holds its words."""


@cache
def entry(source: str, name: str, signature: str, flags: Sequence[str] = ()) -> Callable[..., int]:
    """The exported function `name` of a source. `signature`: p for a pointer, q for 64 bits, i for int. Raises BuildError."""
    function: Any = getattr(library(source, flags=flags), name)
    function.argtypes = [_TYPES[letter] for letter in signature]
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def launch(name: str, function: Callable[..., int], like: Any, stream: Any, *arguments: Any) -> None:
    """Call `function` with the arguments and, last, the stream (None: the current one of the device of the tensor `like`).

    Does not wait. Raises ValueError where `like` lies on another kind of device, LaunchError where the launch fails."""
    torch = import_module("torch")
    check(name, like)
    handle = stream_handle(stream, like.device)
    if torch.cuda.current_device() == like.device.index:
        code = function(*arguments, handle)
    else:
        with torch.cuda.device(like.device):
            code = function(*arguments, handle)
    if code:
        runtime = torch.cuda.cudart()
        raise LaunchError(f"{name}: the CUDA runtime reports error {code}, {runtime.cudaGetErrorString(runtime.cudaError(code))}")
