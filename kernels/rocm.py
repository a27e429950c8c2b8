"""The rocm target: W4A16, W8A8 in fp8 and W4A8-int8, their quantisers and encodings, in Triton for gfx942 and gfx950.

Decides: for which chip the kernels are told to compute, and where they do: "executed" on that chip, "emulated" where the
environment asks for Triton's CPU interpreter (TRITON_INTERPRET=1), "compiled" elsewhere. The kernels are those of the backend
`triton`, and one more: the skinny product (rocm_room.skinny_fp8), a tactic of gemm_w8a8_fp8. gfx942 multiplies e4m3fnuz, gfx950
e4m3fn; codes of the other are decoded first.
Refuses: ops without a kernel, another chip than the one that is there, and to fall back from one that does not start.

    backend argument      meaning
    (none)                the chip that is there; gfx942 where there is none
    gfx942, gfx950        that chip
    gfx942,mutant=NAME    the same, with a known fault compiled in
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lowbit.conformance.backend import EXECUTIONS, NOT_EXECUTED, Declaration, Problem, TensorView

from .rocm_room.devices import ASSUMED, CHIPS, DeviceFault, Query, Sight, emulated, look, too_large, why_compiled
from .triton import MODULES
from .triton_room.machine import Machine

__all__ = ["OPS", "REMAINS", "Rocm", "backend", "main"]

OPS = (
    "fp8_quantize", "fp8_convert_fnuz", "fp8_requantize", "gemm_w8a8_fp8", "gemm_w4a16", "int4_repack", "int8_quantize",
    "gemm_w4a8_int8",
)
"""What the source systems of this target compute. The other ops of the backend `triton` compile for it, too (tests/rocm)."""

REMAINS = (
    "every branch with UNIT=fp8 or NATIVE=1, that is the products of the matrix unit: they are compiled and their instructions "
    "asserted, and the interpreter takes the branch beside them",
    "order and width of the sums of MFMA as Triton issues them",
    "every time and throughput",
)
"""What an emulated certificate leaves open, in plain words."""

_SKINNY = "skinny"


@cache
def _module(op: str) -> Any:
    return import_module(f"lowbit.kernels.triton_room.{MODULES[op]}")


@cache
def _skinny() -> Any:
    return import_module("lowbit.kernels.rocm_room.skinny_fp8")


@dataclass(frozen=True, slots=True)
class Rocm:
    """Backend protocol for one chip. `mutant`: a fault to compile in. `query` says what there is; tests put another in its
    place."""

    chip: str = ""
    mutant: str = ""
    query: Query = look
    name: str = "rocm"
    target: str = "rocm"

    def _sight(self) -> Sight:
        sight = self.query()
        if sight.fault:
            raise DeviceFault(f"{sight.fault}; TRITON_INTERPRET=1 runs the kernels on the CPU")
        if self.chip and sight.chip and sight.chip != self.chip:
            return Sight(absence=f"asked for {self.chip}, found {sight.chip}")
        return sight

    def _machine(self) -> Machine:
        sight = self._sight()
        chip = self.chip or sight.chip or next(iter(CHIPS))
        return emulated(chip) if sight.interpreter else CHIPS[chip].machine

    @property
    def execution(self) -> str:
        """"executed", "emulated" or "compiled". Raises DeviceFault where a supported chip is visible and torch cannot use it."""
        executed, interpreted, compiled = EXECUTIONS
        sight = self._sight()
        return interpreted if sight.interpreter else executed if sight.chip else compiled

    @property
    def device(self) -> str:
        """Where the tensors live: torch addresses ROCm devices as "hip"."""
        return "hip:0" if self._sight().chip else "host"

    def describe(self) -> Mapping[str, str]:
        """The chip and the versions, what is assumed, and what is not shown where the chip is not there."""
        about = {"chip": self._machine().name, "datapath": ASSUMED}
        for name in ("triton", "torch", "numpy"):
            try:
                about[name] = version(name)
            except PackageNotFoundError:
                about[name] = "not installed"
        if self.mutant:
            about["mutant"] = self.mutant
        if self.execution != EXECUTIONS[0]:
            about["remains to be shown on silicon"] = "; ".join(REMAINS)
        return about

    def supports(self, problem: Problem) -> str | None:
        """None where a kernel takes the problem, otherwise why not."""
        if problem.op not in OPS:
            return f"the rocm backend has no kernel for {problem.op!r}; it computes {', '.join(OPS)}"
        sight = self._sight()
        if not (sight.chip or sight.interpreter):
            return why_compiled(sight)
        large = too_large(problem, self._machine())
        if large:
            return large
        known = (*_module(problem.op).MUTANTS, *(_skinny().MUTANTS if problem.op == "gemm_w8a8_fp8" else ()))
        if self.mutant and self.mutant not in known:
            return f"{problem.op} has no mutant {self.mutant!r}; it has {', '.join(known) or 'none'}"
        refused: str | None = _module(problem.op).unsupported(problem, self._machine())
        return refused

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        """What the module offers; before that the skinny product, where it takes the problem."""
        machine = self._machine()
        offered = tuple(_module(problem.op).tactics(problem, machine))
        skinny = problem.op == "gemm_w8a8_fp8" and _skinny().takes(problem, machine)
        return (_SKINNY, *offered) if skinny else offered

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The program of the kernel on this chip, or in the interpreter."""
        machine = self._machine()
        found: Declaration
        if tactic == _SKINNY:
            found = _skinny().declaration(problem, machine)
        else:
            found = _module(problem.op).declaration(problem, tactic, machine)
        return found

    def workspace(self, problem: Problem, tactic: str) -> int:
        """Bytes of scratch memory."""
        if tactic == _SKINNY:
            return int(_skinny().workspace(problem, self._machine()))
        return int(_module(problem.op).workspace(problem, tactic, self._machine()))

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        """Weights as the kernels read them."""
        return _module(problem.op).prepare(problem, tactic, constants, self._machine())

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Any:
        """Activations as the kernels read them."""
        return _module(problem.op).stage(problem, tactic, activations, self._machine())

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        """Launch on the stream and name the kernel."""
        machine = self._machine()
        with nullcontext() if stream is None or machine.native is False else import_module("torch").cuda.stream(stream):
            if tactic == _SKINNY:
                return str(_skinny().run(problem, state, inputs, outputs, workspace, machine, self.mutant))
            return str(_module(problem.op).run(
                problem, tactic, state, inputs, outputs, workspace, stream, machine, self.mutant))


def backend(argument: str | None = None) -> Rocm:
    """The backend `rocm`. `argument`: see the module. Raises ValueError for one it does not know."""
    chip, _, rest = (argument or "").partition(",")
    key, _, mutant = rest.partition("=")
    if (chip and chip not in CHIPS) or (rest and (key != "mutant" or not mutant)):
        raise ValueError(f"backend 'rocm' got argument {argument!r}; expected {' or '.join(CHIPS)}, then maybe ,mutant=NAME")
    return Rocm(chip, mutant)


def main() -> None:
    """`python -m lowbit.kernels.rocm`: per chip and op where it is computed here, then what the backend says of itself."""
    for chip in CHIPS:
        found = Rocm(chip)
        try:
            execution, sight = found.execution, found._sight()
        except DeviceFault as fault:
            print(f"{chip}: {fault}")
            continue
        where = {"executed": f"executed on {chip}", "emulated": "emulated by Triton's CPU interpreter"}.get(
            execution, f"{NOT_EXECUTED}: {sight.absence}")
        for op in OPS:
            print(f"{op} for {chip}: {where}")
        for name, text in found.describe().items():
            print(f"  {name}: {text}")


if __name__ == "__main__":
    main()
