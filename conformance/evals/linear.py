"""A Linear of a model whose product an arm computes.

Decides: shapes (leading axes are flattened to rows, no rows give no rows), how many rows an arm gets at a time, where the bias
goes (into the op, before its one cast), and what a recorder sees. Gradients end here.
Refuses: inputs of another dtype, width or device than the layer was prepared for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .activations import InputRule
from .arms import Arm, ArmError

__all__ = ["ContractLinear", "Recorder"]

_ROWS = 1 << 16
"""Rows of one call: long prompts of many questions are calls of so many, as an arm needs ten times their memory, and more."""

Recorder = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called after each forward with the layer's name, its inputs [M, K] and its outputs [M, N], before they are given on."""


class ContractLinear(torch.nn.Module):
    """`layer` is what `arm.prepare` returned. Holds no parameters: the weights are the arm's, on the device it was prepared for,
    and do not follow `.to()`."""

    def __init__(self, arm: Arm, layer: Any) -> None:
        super().__init__()
        self.arm, self.layer = arm, layer
        self.in_features, self.out_features = int(layer.k), int(layer.n)
        self.recorder: Recorder | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N] in the same dtype. Raises ArmError."""
        if x.shape[-1] != self.in_features or x.device.type != self.layer.device.type:
            raise ArmError(
                f"{self.layer.name}: inputs are {list(x.shape)} on {x.device}, expected [..., {self.in_features}] on "
                f"{self.layer.device}; swap with the device that the model runs on"
            )
        rows = x.detach().reshape(-1, self.in_features)
        found = self._computed(rows) if rows.shape[0] else rows.new_empty((0, self.out_features))
        if self.recorder is not None:
            self.recorder(self.layer.name, rows, found)
        result: torch.Tensor = found.reshape(*x.shape[:-1], self.out_features)
        return result

    def _computed(self, rows: torch.Tensor) -> torch.Tensor:
        rule = getattr(self.layer, "inputs", None)
        shared = isinstance(rule, InputRule) and rule.recipe == "vllm_fp8_tensor"  # one scale for all rows
        if shared or rows.shape[0] <= _ROWS:
            return self.arm.run(self.layer, rows)
        return torch.cat([self.arm.run(self.layer, rows[at : at + _ROWS]) for at in range(0, rows.shape[0], _ROWS)])

    def extra_repr(self) -> str:
        """Name, shape and arm."""
        return f"{self.layer.name}, in_features={self.in_features}, out_features={self.out_features}, arm={self.arm.name}"
