"""A backend that runs the Triton gemm_nvfp4 in Triton's CPU interpreter: the source that compiles for a GPU, one branch apart.

Decides: nothing about arithmetic; the kernel is called with NATIVE = 0, because the interpreter's `dot_scaled` is wrong for
NVFP4 scales. Refuses: every other op. Attributes: `plain` and `swizzle` name the layout of the block scales; `nibbles` and
`group` plant a fault of the host side on one operand (nibbles exchanged on both would only reorder K) that a check must catch.

    lowbit run CASE --backend python:tests/blackwell/interpreted_triton.py:plain
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from lowbit.conformance.backend import F32, Declaration, Problem, TensorView
from lowbit.kernels.triton_room.blackwell_gemm_nvfp4 import (
    UNITS,
    Tile,
    launch,
    low_rank_codes,
    packed,
    program,
    refusal,
    swizzled,
)

__all__ = ["group", "nibbles", "plain", "swizzle"]

_CODES, _SCALES = ("a", "w"), ("a_scale", "w_scale")


@dataclass(frozen=True, slots=True)
class Interpreted:
    """Backend protocol over `launch` with torch tensors of the host."""

    name: str
    tile: Tile
    swizzle: bool = False
    fault: str = ""
    target: str = "triton"
    execution: str = "emulated"

    def describe(self) -> Mapping[str, str]:
        """Versions, and that no device was there."""
        return {"triton": triton.__version__, "torch": torch.__version__, "device": "Triton's CPU interpreter"}

    def supports(self, problem: Problem) -> str | None:
        """What the kernel itself refuses."""
        return refusal(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """binary32 products in unknown order, the low-rank product on top of the main one."""
        return Declaration(program(problem, UNITS["binary32"]), batch_invariant=False)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> dict[str, torch.Tensor]:
        """Packed codes, scales in the chosen layout, binary32 where the op has binary32."""
        return {name: self._laid_out(name, view) for name, view in constants.items()}

    stage = prepare

    def run(
        self, problem: Problem, tactic: str, state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Interpret the kernel and copy D."""
        view = outputs["d"]
        d = torch.zeros(view.shape, dtype=torch.int16)
        tensors = {**state, **inputs, "d": d}
        if "lora_act" in tensors:
            tensors["lora_act"] = low_rank_codes(tensors["lora_act"], problem)
        alpha = float(tensors.pop("alpha").item())
        with np.errstate(all="ignore"):
            kernel = launch(problem, tensors, alpha, unit=UNITS["binary32"], tile=self.tile, swizzled_scales=self.swizzle)
        view.memory[...] = d.numpy().view(np.uint16)
        return kernel

    def _laid_out(self, name: str, view: TensorView) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(view.memory))
        if name in _CODES:
            tensor = packed(tensor)
            return tensor >> 4 | tensor << 4 if self.fault == "nibbles" and name == "w" else tensor
        if name in _SCALES:
            tensor = tensor.roll(1, dims=1) if self.fault == "group" and name == "w_scale" else tensor
            return swizzled(tensor) if self.swizzle else tensor
        return tensor.view(torch.float32 if view.format is F32 else torch.int16)


_SMALL, _WHOLE = Tile(32, 32, 128), Tile(128, 128, 128)

plain = Interpreted("triton_interpreted", _SMALL)
swizzle = Interpreted("triton_interpreted_swizzled", _WHOLE, swizzle=True)
nibbles = Interpreted("triton_interpreted_nibbles", _SMALL, fault="nibbles")
group = Interpreted("triton_interpreted_group", _SMALL, fault="group")
