"""What multiplies and where: the one record from which every kernel of this room takes its compile-time branches.

Decides: which machine this process launches on (`here`), and for each the datapath behind every kind of operand. Refuses: to
guess. A device whose matrix unit stands in no row is an error that names its capability, never the nearest row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from lowbit.conformance.backend import Order

__all__ = ["INTERPRETER", "MACHINES", "Machine", "here", "interpreted"]


@dataclass(frozen=True, slots=True)
class Machine:
    """`native`: the matrix unit takes 16-bit, fp8 and int8 operands; otherwise products are of binary32 values (int8 products
    stay int8). `datapaths`: kind of operand ("f16", "bf16", "fp8", "int8") -> name of a datapath. `ascending`: a program that
    walks K upwards sums upwards. `fnuz`: the unit multiplies e4m3fnuz."""

    name: str
    native: bool
    datapaths: Mapping[str, str]
    ascending: bool
    fnuz: bool = False

    @property
    def order(self) -> Order:
        """Order of K in a sum of one program."""
        return Order.ASCENDING if self.ascending else Order.UNKNOWN


def _nvidia(name: str, fp8: str) -> Machine:
    datapaths = {"f16": f"{name}_f16", "bf16": f"{name}_bf16", "fp8": fp8, "int8": "imma_s32"}
    return Machine(name, native=True, datapaths=datapaths, ascending=True)


INTERPRETER = Machine(
    "interpreter", native=False, ascending=False,
    datapaths={"f16": "ieee_f32", "bf16": "ieee_f32", "fp8": "ieee_f32", "int8": "imma_s32"},
)
"""Triton's CPU interpreter: binary32 products by NumPy, in an order that nobody promises."""

MACHINES: Mapping[tuple[int, int], Machine] = {
    (8, 0): _nvidia("ampere", "ampere_f16"),  # no fp8 unit: Triton multiplies fp8 as binary16
    (8, 9): _nvidia("ada", "ada_fp8"),
    (9, 0): _nvidia("hopper", "hopper_wgmma_fp8"),
}
"""By CUDA compute capability."""


def interpreted() -> bool:
    """Whether kernels of this process run in Triton's CPU interpreter. Read as Triton reads it, when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@cache
def here() -> Machine:
    """The machine of this process: the interpreter where it was asked for, otherwise CUDA device 0. Raises RuntimeError for a
    device that stands in no row."""
    if interpreted():
        return INTERPRETER
    import torch  # here, because the record is wanted where there is no torch

    capability = torch.cuda.get_device_capability(0)
    found = MACHINES.get(capability)
    if found is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in MACHINES)
        raise RuntimeError(f"triton: got a device of capability {capability[0]}.{capability[1]}; known are {known}")
    return found
