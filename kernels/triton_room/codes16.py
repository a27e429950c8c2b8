"""16-bit float codes in Triton kernels: bf16 by integers, binary16 by the conversion that every target has.

Decides: how a kernel reads and writes bf16 and binary16. Refuses: casts to bf16 by the language, which the
CPU interpreter truncates. What is multiplied by a matrix unit has its float type; everything else is int16 codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["code16", "value16"]


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
