"""The noise that a backend's admitted deviations make inside a model.

Decides: what an honest kernel of the backend's own precision would do. A matrix unit that declares fewer bits than binary32 is
honest and moves every logit further than any order of binary32 sums does. What it does to one output was seen: on the rows that
the operations were judged on, each output of the backend less that of the reference. Here these deviations, of Linears without
an output outside its interval, are dealt out anew over the rows of all texts: to other rows, in the same column, as large in
proportion to the input as they were. A Linear with an output outside gets none. So the divergence of this arm is what the judged
calls explain, and a backend that diverges further did something else to calls that were not judged.
Refuses: nothing; an arm of this kind judges nobody, it is a floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowbit.references.declarations import Declaration
from lowbit.references.formats import Format

from ..case import Problem, Tensor
from .arms import Arm
from .checkpoint import QuantisedLinear

__all__ = ["Echo", "deviations"]


def deviations(x: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Outputs [M, N] of a backend less those of the reference, each row over the Euclidean length of its inputs x [M, K], in
    binary32. Rows of zeros, and differences that are not finite, give zeros."""
    moved = (own.float() - other.float()) / _lengths(x)
    return moved.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """Euclidean lengths [M, 1] of the rows, in binary32."""
    found: torch.Tensor = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
    return found


class Echo:
    """The arm `inner` with deviations [R, N] by layer added to its outputs. Which of the R rows an output takes follows from the
    bits of its inputs and its column: the same inputs give the same outputs."""

    name = "echo"

    def __init__(self, inner: Arm, found: Mapping[str, torch.Tensor]) -> None:
        self._inner, self._found = inner, found

    def declare(self, problem: Problem) -> Declaration:
        """What the inner arm declares: it judges nobody."""
        return self._inner.declare(problem)

    def prepare(self, linear: QuantisedLinear, out: Format, device: torch.device, bias: Tensor | None = None) -> Any:
        """The layer of the inner arm."""
        return self._inner.prepare(linear, out, device, bias)

    def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """D of one call, deviations added in binary32 and rounded once."""
        found: torch.Tensor = self._inner.run(layer, x)
        table = self._found.get(layer.name)
        if table is None:
            return found
        table = table.to(x.device)
        seed = x.contiguous().view(torch.int16).long().sum(1, keepdim=True)
        column = torch.arange(layer.n, device=x.device)
        taken = _mixed(seed * _ROW + column * _COLUMN) % len(table)
        return (found.float() + _lengths(x) * table[taken, column]).to(found.dtype)


_ROW, _COLUMN, _MIX = 48_271, 16_807, 0x45D9F3B
"""Odd multipliers, below 2^31."""


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """int64 to 0 .. 2^31 - 1, neighbours far apart: twice multiplied, with the upper bits folded into the lower."""
    for _ in range(2):
        values = values & 0x7FFFFFFF
        values = ((values >> 15) ^ values) * _MIX
    values = values & 0x7FFFFFFF
    return (values >> 15) ^ values
