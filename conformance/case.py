"""Cases and problems as plain data with a text form, and the operands they fix.

The text of a case is its id and its reproducer:
    gemm_w4a8_fp8/folded/m17n384k1024g128/bf16/lognormal/s7
    op            variant dims            options pattern  seed
Options follow the op's order, joined by dots; an option at its default is left out, except the first.
Decides: what a case id means on any machine. Refuses: everything that could make two machines draw different operands
(library distributions, libm, global seeds): the stream is Philox words and all arithmetic on them is exact.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.references.formats import Codes, Format, container

__all__ = ["Case", "Operands", "Problem", "Stream", "Tensor", "dims_text", "parse_dims"]

_DIMS = re.compile(r"([a-z])(\d+)")
_CASE = re.compile(r"[a-z0-9_]+/[a-z0-9_]+/(?:[a-z]\d+)*/[a-z0-9_.]+/[a-z0-9_]+/s\d+")
_PROBLEM = re.compile(r"[a-z0-9_]+/[a-z0-9_]+/(?:[a-z]\d+)*/[a-z0-9_.]+")
_FORM = "op/variant/dims/options/pattern/sSEED, for example gemm_w4a8_fp8/folded/m17n384k1024g128/bf16/lognormal/s7"


def parse_dims(text: str) -> dict[str, int]:
    """'m17k64' -> {'m': 17, 'k': 64}, in the order written. Raises ValueError where a letter comes twice."""
    pairs = _DIMS.findall(text)
    dims = {letter: int(number) for letter, number in pairs}
    if len(dims) != len(pairs) or "".join(a + b for a, b in pairs) != text:
        raise ValueError(f"dims {text!r} are malformed: expected letters each followed by a number, as m17n384k1024")
    return dims


def dims_text(dims: Mapping[str, int]) -> str:
    """Inverse of `parse_dims`."""
    return "".join(f"{letter}{number}" for letter, number in dims.items())


@dataclass(frozen=True, slots=True)
class Problem:
    """All that a backend ever sees of a case: op, variant, dims and options; no pattern, no seed.

    `dims` and `options` are tuples of pairs so that a problem can be a key; `dim(letter)` and `option(name)` look up.
    """

    op: str
    variant: str
    dims: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, str], ...]
    defaults: tuple[str, ...] = ()  # default token of each option, for the text form

    def dim(self, letter: str) -> int:
        """The size named by `letter`; KeyError where the op has none."""
        return dict(self.dims)[letter]

    def option(self, name: str) -> str:
        """The token chosen for option `name`; KeyError where the op has none."""
        return dict(self.options)[name]

    def __str__(self) -> str:
        defaults = self.defaults or ("",) * len(self.options)
        shown = [token for i, ((_, token), default) in enumerate(zip(self.options, defaults, strict=True))
                 if i == 0 or token != default]
        return f"{self.op}/{self.variant}/{dims_text(dict(self.dims))}/{'.'.join(shown) or 'plain'}"


@dataclass(frozen=True, slots=True)
class Case:
    """One problem with the pattern and the seed that fix its operands."""

    problem: Problem
    pattern: str
    seed: int

    def __str__(self) -> str:
        return f"{self.problem}/{self.pattern}/s{self.seed}"

    @staticmethod
    def split(text: str) -> tuple[str, str, dict[str, int], tuple[str, ...], str, int]:
        """(op, variant, dims, option tokens, pattern, seed) of an id; `op.parse_case` knows which tokens are legal."""
        if not _CASE.fullmatch(text):
            raise ValueError(f"case id {text!r} is malformed: expected {_FORM}")
        op, variant, dims, options, pattern, seed = text.split("/")
        return op, variant, parse_dims(dims), tuple(options.split(".")), pattern, int(seed[1:])

    @staticmethod
    def split_problem(text: str) -> tuple[str, str, dict[str, int], tuple[str, ...]]:
        """(op, variant, dims, option tokens) of the text of a problem."""
        if not _PROBLEM.fullmatch(text):
            raise ValueError(f"problem {text!r} is malformed: expected the first four parts of {_FORM}")
        op, variant, dims, options = text.split("/")
        return op, variant, parse_dims(dims), tuple(options.split("."))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """Canonical codes of one tensor: an array of `container(format)` in the logical shape, one element per container."""

    codes: Codes
    format: Format

    def __post_init__(self) -> None:
        if self.codes.dtype != container(self.format):
            raise ValueError(f"{self.format}: codes need dtype {container(self.format)}, got {self.codes.dtype}")


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The inputs of a case by tensor name. Never made by the backend under test."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of name and tensor, in the op's order."""
        return iter(self.tensors.items())

    def sha256(self) -> str:
        """Digest over names, formats, shapes and bytes: the same case has the same digest on any machine."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name}:{tensor.format.name}:{tensor.codes.shape};".encode())
            digest.update(np.ascontiguousarray(tensor.codes).astype(tensor.codes.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()


class Stream:
    """Words of Philox-4x64 keyed by a text. Every draw is exact arithmetic on the words: no libm, no library distribution.

    NumPy promises the raw words of a bit generator to stay as they are, and promises nothing of its distributions.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        words = np.frombuffer(digest, dtype="<u8")[:2].astype(np.uint64)
        self._philox = np.random.Philox(key=words)

    def words(self, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """`count` uniform 64-bit words."""
        return np.asarray(self._philox.random_raw(count), dtype=np.uint64).reshape(-1)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Integers in low..high (both ends included) by multiply-shift on 32 bits; the bias is below 2^-20 for spans to 4,096."""
        span = high - low + 1
        if not 1 <= span <= 1 << 32:
            raise ValueError(f"integer span must be 1..2^32, got {low}..{high}")
        count = int(np.prod(shape, dtype=np.int64))
        halves = self.words((count + 1) // 2).astype("<u8").view("<u4")[:count].astype(np.uint64)
        return ((halves * np.uint64(span)) >> np.uint64(32)).astype(np.int64).reshape(shape) + low

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Multiples of 2^-32 in [0, 1)."""
        count = int(np.prod(shape, dtype=np.int64))
        halves = self.words((count + 1) // 2).astype("<u8").view("<u4")[:count]
        return np.asarray(halves.astype(np.float64) * 2.0**-32).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Bell-shaped, mean 0, variance 1: the sum of eight 16-bit uniforms, scaled by a literal. |x| < 4.9."""
        count = int(np.prod(shape, dtype=np.int64))
        parts = self.words(2 * count).astype("<u8").view("<u2").reshape(count, 8)
        total = parts.sum(axis=1, dtype=np.int64).astype(np.float64) - 8 * 32767.5
        return np.asarray(total * 1.8688123650118534e-05).reshape(shape)
