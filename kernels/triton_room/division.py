"""Quotients in Triton kernels: IEEE division, its fast form for short divisors, and the reciprocals, near or flushed.

Decides: which instruction stands for a division. Refuses: `/`, which is approximate on some targets.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["by_pair", "div", "flushed_reciprocal", "near_reciprocal", "reciprocal", "rest_of"]


@triton.jit
def div(a, b):  # type: ignore[no-untyped-def]
    """fl(a / b) of binary32 tensors, broadcast against each other."""
    a, b = tl.broadcast(a, b)
    return tl.div_rn(a, b)


@triton.jit
def reciprocal(b):  # type: ignore[no-untyped-def]
    """fl(1 / b)."""
    return tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)


@triton.jit
def flushed(x):  # type: ignore[no-untyped-def]
    """x, or a zero of its sign where it is subnormal."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0, bits & -0x80000000, bits).to(tl.float32, bitcast=True)


@triton.jit
def flushed_reciprocal(b):  # type: ignore[no-untyped-def]
    """fl(1 / b) with subnormal operands and results as zeros: one of the values that rcp.approx.ftz.f32 may give."""
    return flushed(reciprocal(flushed(b)))


@triton.jit
def near_reciprocal(b, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / b within 2^-21 of its size, for b of 2^-100 to 2^100: for what is decided alike by every such value, or corrected."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return reciprocal(b)


@triton.jit
def rest_of(b, near):  # type: ignore[no-untyped-def]
    """What `near`, within 2^-21 of 1 / b, leaves of it, where b has at most 11 significand bits: with it 1 / b is known within
    2^-41. The remainder 1 - near b fits 24 bits."""
    return near * tl.fma(near, -b, 1.0)


@triton.jit
def by_pair(a, inverse, rest):  # type: ignore[no-untyped-def]
    """fl(a / b) where inverse + rest is 1 / b within 2^-41, b has at most 11 significand bits, and a is 0 or a / b and a `rest`
    are far from subnormal numbers. A zero becomes +0.

    The sum before its one rounding is a / b (1 + d) with |d| below 2^-40. No quotient of a 24-bit by an 11-bit significand is
    halfway between two binary32 numbers or closer to such a point than 2^-37 of its size.
    """
    return tl.fma(a, inverse, tl.fma(a, rest, 0.0))
