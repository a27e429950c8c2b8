"""A few instructions of PTX on NumPy words: the text of an inline assembly as it stands in a kernel, executed without a device.

Decides: what each instruction computes (PTX ISA, by its name), for registers of 32 bits, unsigned. Refuses: an instruction that
is not in the table, with a KeyError, and NaN operands of a minimum or maximum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["executed"]

Words = npt.NDArray[Any]
"""uint32."""


def toward_zero(x: Words) -> Words:
    """Code, 16 bits, of binary32 x in binary16, rounded toward zero."""
    value = x.view(np.float32)
    with np.errstate(over="ignore"):
        near = value.astype(np.float16)
    beyond = np.abs(near.astype(np.float64)) > np.abs(value.astype(np.float64))
    return near.view(np.uint16).astype(np.uint32) - beyond


def halves(word: Words) -> npt.NDArray[np.float16]:
    """binary16 numbers [.., 2] of a word, the lower first."""
    found = np.stack([word & 0xFFFF, word >> 16], axis=-1).astype(np.uint16).view(np.float16)
    assert not np.isnan(found).any()
    return found


def pair(numbers: npt.NDArray[np.float16]) -> Words:
    """The word of two binary16 numbers."""
    codes = numbers.view(np.uint16).astype(np.uint32)
    word: Words = codes[..., 0] | (codes[..., 1] << 16)
    return word


def least_magnitude(a: Words, b: Words) -> Words:
    """min.xorsign.abs: the lesser magnitude under the product of the signs."""
    word: Words = pair(np.minimum(np.abs(halves(a)), np.abs(halves(b)))) | ((a ^ b) & 0x80008000)
    return word


def chosen(numbers: Callable[..., npt.NDArray[np.bool_]]) -> Callable[[Words, Words], Words]:
    """A minimum or maximum by the comparison under which the first operand stays."""
    def answer(a: Words, b: Words) -> Words:
        x, y = halves(a), halves(b)
        return pair(np.where(numbers(x, y), x, y))

    return answer


def permuted(a: Words, b: Words, selector: Words) -> Words:
    """prmt without the sign mode: byte i of the result is the byte of (b, a) that nibble i of the selector names."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        place = (selector >> (4 * i)) & 15
        assert (place < 8).all()
        result |= ((both >> (8 * place).astype(np.uint64)) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
    return result


def looked_up(a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3: bit 4 i + 2 j + k of the table for bits i, j, k of a, b, c."""
    result = np.zeros_like(a)
    for row in range(8):
        terms = [word if row >> shift & 1 else ~word for word, shift in ((a, 2), (b, 1), (c, 0))]
        result |= np.where((table >> row) & 1, terms[0] & terms[1] & terms[2], np.uint32(0))
    return result


_INSTRUCTIONS: Mapping[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a, "cvt.rz.f16x2.f32": lambda a, b: (toward_zero(a) << 16) | toward_zero(b),
    "min.xorsign.abs.f16x2": least_magnitude, "min.f16x2": chosen(np.less_equal), "max.f16x2": chosen(np.greater_equal),
    "prmt.b32": permuted, "mad.lo.u32": lambda a, b, c: a * b + c, "lop3.b32": looked_up, "shr.u32": lambda a, b: a >> b,
    "xor.b32": lambda a, b: a ^ b,
}


def executed(text: str, inputs: list[Words]) -> Words:
    """Register $0 after `text`, of which $1, $2, .. are `inputs`."""
    registers = {f"${i}": words for i, words in enumerate(inputs, 1)}
    for line in re.split(r"[;\n]", text.strip().strip("{}")):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        operands = [registers[s] if s in registers else np.full_like(inputs[0], int(s, 0)) for s in sources]
        registers[target] = _INSTRUCTIONS[name](*operands)
    return registers["$0"]
