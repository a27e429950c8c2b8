"""Backends that run the calls of `torch_cuda` and declare another matrix unit than the chip's: audits must notice each.

Decides: which falsehood stands for which kind. Refuses nothing. On Hopper
`lowbit audit python:tests/device/false_declarations.py:NAME` ends with 1 for `f32_of_13`, `bits25_of_13` and `bits13_of_25`, and
says "finer than declared" of `bits13_of_25_in_unknown_order`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from lowbit.conformance.backend import DATAPATHS, Contraction, Datapath, Declaration, Order, Problem
from lowbit.kernels.subjects.torch_cuda import TorchCuda

__all__ = ["Claimed", "bits13_of_25", "bits13_of_25_in_unknown_order", "bits25_of_13", "f32_of_13"]

NARROW = replace(DATAPATHS["hopper_bf16"], name="bf16_of_13_bits", fraction_bits=13, output_bits=14)


@dataclass(frozen=True, slots=True)
class Claimed(TorchCuda):
    """One tactic of one op, with bf16 outputs, and the datapath and order that are declared of its sum."""

    op: str = ""
    tactic: str = ""
    path: Datapath = NARROW
    order: Order = Order.ASCENDING

    def supports(self, problem: Problem) -> str | None:
        """One op and one output format."""
        if problem.op != self.op or problem.option("out") != "bf16":
            return f"{self.name} is about {self.op} in bf16"
        return TorchCuda.supports(self, problem)

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """The one."""
        return (self.tactic,)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The declaration of torch_cuda with another matrix unit in it."""
        right = TorchCuda.declare(self, problem, tactic)
        main, *steps = right.program
        assert isinstance(main, Contraction)
        return replace(right, program=(replace(main, datapath=self.path, order=self.order), *steps))


_OF = partial(Claimed, torch, "cuda")
f32_of_13 = partial(_OF, "f32_of_13", op="gemm_w8a8_fp8", tactic="rowwise_fast", path=DATAPATHS["ieee_f32"], order=Order.UNKNOWN)
bits25_of_13 = partial(_OF, "bits25_of_13", op="gemm_w8a8_fp8", tactic="triton", path=DATAPATHS["blackwell_f8f6f4"])
bits13_of_25 = partial(_OF, "bits13_of_25", op="gemm_w4a16", tactic="triton")
bits13_of_25_in_unknown_order = partial(
    _OF, "bits13_of_25_in_unknown_order", op="gemm_w4a16", tactic="matmul", order=Order.UNKNOWN)
