"""16- and 32-bit float codes in Triton kernels: bf16 by integers, binary16 by the conversion that every target has.

Decides: how a kernel reads and writes bf16, binary16 and binary32, and rounds a binary32 value to one of them. Refuses: casts to
bf16 by the language, which the CPU interpreter truncates. What is multiplied by a matrix unit has its float type; everything else
is int16 or int32 codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BF16", "F16", "F32", "code", "code16", "rounded", "value", "value16"]

F32, F16, BF16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Values of the compile-time argument FORMAT."""


@triton.jit
def value16(code, IS_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 value of a 16-bit code, or of an element, of bf16 (IS_BF16) or binary16; exact."""
    if IS_BF16:
        return (code.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return code.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def code16(x, IS_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 code of binary32 x in bf16 (IS_BF16) or binary16, nearest even, overflow to infinity; NaN stays NaN."""
    if IS_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def value(code, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 value of an int32 code of binary32 or an int16 code of binary16 or bf16; exact."""
    if FORMAT == 0:
        return code.to(tl.float32, bitcast=True)
    else:
        return value16(code, FORMAT == 2)


@triton.jit
def code(x, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code of binary32 x, int32 for binary32 and int16 otherwise, as `code16`."""
    if FORMAT == 0:
        return x.to(tl.int32, bitcast=True)
    else:
        return code16(x, FORMAT == 2)


@triton.jit
def rounded(x, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """binary32 x rounded once more, to the format; its value in binary32."""
    if FORMAT == 0:
        return x
    else:
        return value16(code16(x, FORMAT == 2), FORMAT == 2)
