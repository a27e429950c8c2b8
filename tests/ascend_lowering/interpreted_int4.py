"""Backends that run the Triton int4 kernels in Triton's CPU interpreter: the sources that compile for an NPU, one branch apart.

Decides: nothing about arithmetic; NATIVE is 0, because the interpreter multiplies bf16 wrongly. Refuses: what the kernels refuse.
`quantise` computes int4_quantize and svdquant_quantize, `gemm` computes gemm_int4.

    lowbit run CASE --backend python:tests/ascend_lowering/interpreted_int4.py:quantise
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from lowbit.conformance.backend import INT4, Declaration, Problem, TensorView
from lowbit.kernels.triton_room import ascend_gemm_int4, ascend_int4_quantize

__all__ = ["gemm", "quantise"]

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.float32}


def _tensor(view: TensorView) -> torch.Tensor:
    """The containers of an input as torch sees them: int4 codes as their values in int8, 16-bit codes, binary32."""
    codes = np.ascontiguousarray(view.memory)
    if view.format is INT4:
        return torch.from_numpy((codes ^ np.uint8(8)).astype(np.int8) - np.int8(8))
    return torch.from_numpy(codes).view(_SIGNED[codes.itemsize])


def _quantise(problem: Problem, tensors: dict[str, torch.Tensor], outputs: Mapping[str, TensorView]) -> str:
    q = outputs["q"]
    made = {
        "q": torch.full((q.shape[0], q.shape[1] // 2), 0xA5, dtype=torch.uint8),
        "scales": torch.full(outputs["scales"].shape, 0x5A5A, dtype=torch.int16),
    }
    if "lora_act" in outputs:
        made["lora_act"] = torch.full(outputs["lora_act"].shape, float("nan"))
    kernel = ascend_int4_quantize.launch(problem, tensors | made, native=False)
    packed = made.pop("q").numpy()
    q.memory[...] = np.stack((packed & 15, packed >> 4), axis=-1).reshape(q.shape)
    for name, tensor in made.items():
        outputs[name].memory[...] = tensor.numpy().view(outputs[name].memory.dtype)
    return kernel


def _gemm(problem: Problem, tensors: dict[str, torch.Tensor], outputs: Mapping[str, TensorView]) -> str:
    if "lora_act" in tensors:
        act = tensors["lora_act"].to(torch.bfloat16 if problem.option("out") == "bf16" else torch.float16)
        tensors["lora_act"] = act.view(torch.int16)
    for name in ("a_scale", "w_scale"):
        tensors[name] = tensors[name].T.contiguous()
    d = torch.full(outputs["d"].shape, 0x5A5A, dtype=torch.int16)
    kernel = ascend_gemm_int4.launch(problem, tensors | {"d": d}, native=False, tile=ascend_gemm_int4.Tile(32, 32, 16))
    outputs["d"].memory[...] = d.numpy().view(np.uint16)
    return kernel


@dataclass(frozen=True, slots=True)
class Interpreted:
    """Backend protocol over a `launch`."""

    name: str
    refuse: Callable[[Problem], str | None]
    declaration: Callable[[Problem], Declaration]
    compute: Callable[[Problem, dict[str, torch.Tensor], Mapping[str, TensorView]], str]
    target: str = "triton"
    execution: str = "emulated"

    def describe(self) -> Mapping[str, str]:
        """Versions, and that no device was there."""
        return {"triton": triton.__version__, "torch": torch.__version__, "device": "Triton's CPU interpreter"}

    def supports(self, problem: Problem) -> str | None:
        """What the kernels themselves refuse."""
        return self.refuse(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The kernels' program with binary32 products in unknown order where there are products of floats."""
        return self.declaration(problem)

    def run(
        self, problem: Problem, tactic: str, state: Mapping[str, TensorView], inputs: Mapping[str, TensorView],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Interpret the kernels; outputs start as neither zero nor a plausible value."""
        tensors = {name: _tensor(view) for name, view in {**state, **inputs}.items()}
        with np.errstate(all="ignore"):
            return self.compute(problem, tensors, outputs)


quantise = Interpreted("triton_int4_interpreted", ascend_int4_quantize.refusal, ascend_int4_quantize.declaration, _quantise)
gemm = Interpreted("triton_int8_interpreted", ascend_gemm_int4.refusal, ascend_gemm_int4.declaration, _gemm)


def main(source: str, target: str) -> None:
    """Quantise the binary32 rows of an .npy file as bf16 and keep q and scales in an .npz file."""
    rows = torch.from_numpy(np.load(source)).to(torch.bfloat16)
    n, k = rows.shape
    problem = Problem("int4_quantize", "sym", (("n", n), ("k", k), ("g", 64)), (("x", "bf16"), ("recipe", "svdquant")))
    made = {"q": torch.zeros(n, k // 2, dtype=torch.uint8), "scales": torch.zeros(n, k // 64, dtype=torch.int16)}
    with np.errstate(all="ignore"):
        ascend_int4_quantize.launch(problem, {"x": rows.view(torch.int16), **made}, native=False)
    np.savez(target, q=made["q"].numpy(), scales=made["scales"].numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
