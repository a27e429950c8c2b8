"""Quotients in Triton kernels: IEEE division, its fast form for short divisors, and the reciprocal that flushes subnormals.

Decides: which instruction stands for a division. Refuses: `/` as a result, which is approximate on some targets.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["by_short", "div", "flushed_reciprocal", "reciprocal", "short_reciprocal"]


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
def by_short(a, b, inverse):  # type: ignore[no-untyped-def]
    """fl(a / b) of finite a, given inverse = fl(1 / b), where b has at most 11 significand bits and the magnitudes of a (or a =
    0), b and a / b lie in 2^-80 to 2^80.

    q = fl(a inverse) is within 2^-22 of the quotient, its remainder a - q b fits 24 bits, so that the last step rounds a / b (1
    + d) with |d| below 2^-45. No quotient of a 24-bit by an 11-bit significand is halfway between two binary32 numbers or closer
    to such a point than 2^-37 of its size. A zero may lose its sign.
    """
    quotient = a * inverse
    return tl.fma(tl.fma(quotient, -b, a), inverse, quotient)


@triton.jit
def short_reciprocal(b):  # type: ignore[no-untyped-def]
    """fl(1 / b) where b has at most 11 significand bits and lies in 2^-80 to 2^80: one step from an approximate reciprocal within
    2^-21 leaves an error below 2^-42, and 1 / b is not closer to a point between two binary32 numbers than 2^-37."""
    near = 1.0 / b
    return tl.fma(tl.fma(near, -b, 1.0), near, near)
