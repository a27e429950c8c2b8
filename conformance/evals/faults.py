"""An arm with one fault in one layer, to see that an evaluation finds it.

Decides: which faults there are. A fault is what a faulty kernel would have read: constants of the op that differ from those it
was given. Refuses: a fault that a layer cannot have, in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lowbit.references.declarations import Declaration
from lowbit.references.formats import F32, UINT4, Codes, Format

from ..case import Problem, Tensor
from .arms import Arm, ArmError
from .checkpoint import QuantisedLinear

__all__ = ["FAULTS", "FaultyArm"]


def _with(linear: QuantisedLinear, name: str, codes: Codes) -> QuantisedLinear:
    return replace(linear, constants={**linear.constants, name: Tensor(codes, linear.constants[name].format)})


def _wrong_group(linear: QuantisedLinear) -> QuantisedLinear:
    """Every row takes, for the last group of K, the scale of the group before it."""
    name = next((n for n in ("scale", "group_scale", "w_scale") if n in linear.constants), "")
    if not name or linear.constants[name].codes.shape[-1] < 2:
        raise ArmError(f"{linear.name}: {linear.scheme.op} has no two scale groups along K; name a layer of a grouped scheme")
    codes = linear.constants[name].codes.copy()
    codes[:, -1] = codes[:, -2]
    return _with(linear, name, codes)


def _alpha_off(linear: QuantisedLinear) -> QuantisedLinear:
    """The binary32 factor of the sum is 1.001 times itself."""
    name = next((n for n in ("alpha", "channel_scale") if n in linear.constants and linear.constants[n].format is F32), "")
    if not name:
        raise ArmError(f"{linear.name}: {linear.scheme.op} has no binary32 factor on its sums; name a layer of fp8 or NVFP4")
    wrong = (linear.constants[name].codes.view(np.float32) * np.float32(1.001)).view(np.uint32)
    return _with(linear, name, wrong)


def _tail_dropped(linear: QuantisedLinear) -> QuantisedLinear:
    """The last 16 of K count as zeros."""
    w = linear.constants["w"]
    codes = w.codes.copy()
    codes[:, -16:] = linear.constants["zero"].codes[:, -1:] if "zero" in linear.constants else 8 if w.format is UINT4 else 0
    return _with(linear, "w", codes)


FAULTS: Mapping[str, Callable[[QuantisedLinear], QuantisedLinear]] = {
    "scale_group": _wrong_group, "alpha": _alpha_off, "k_tail": _tail_dropped,
}
"""Faults that a kernel may have, as what it would have read."""


@dataclass(frozen=True, slots=True)
class FaultyArm:
    """Another arm with one fault of `FAULTS` in the layer called `layer`; all other layers are as they were."""

    inner: Arm
    fault: str
    layer: str

    @property
    def name(self) -> str:
        """Says that it is faulty, and where."""
        return f"{self.inner.name} with {self.fault} in {self.layer}"

    def prepare(self, linear: QuantisedLinear, out: Format, device: torch.device, bias: Tensor | None = None) -> Any:
        """The layer, faulty where it is the one. Raises ArmError for an unknown fault or one that the layer cannot have."""
        if self.fault not in FAULTS:
            raise ArmError(f"unknown fault {self.fault!r}; the faults are {', '.join(FAULTS)}")
        return self.inner.prepare(FAULTS[self.fault](linear) if linear.name == self.layer else linear, out, device, bias)

    def declare(self, problem: Problem) -> Declaration:
        """What the inner arm declares: a fault is not declared."""
        return self.inner.declare(problem)

    def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """As the inner arm."""
        found: torch.Tensor = self.inner.run(layer, x)
        return found
