"""All that a vendor has to read: the backend protocol, the tensors a backend is handed, and how backends are found.

A backend is any object with the attributes and methods of `Backend`. It is registered by entry point (group
`lowbit.backends`); ours register the same way and have no privilege. The suite owns every buffer: inputs, outputs and
workspace are allocated, poisoned and guarded by it, and the backend writes results into outputs it is given.
Refuses: a backend that lacks a method or whose entry point does not load, with one sentence that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.declarations import (
    EXACT_BITS,
    Claim,
    Contraction,
    Cut,
    Declaration,
    Join,
    Order,
    Start,
    Step,
    StepKind,
    add,
    cast,
    mul,
)
from lowbit.references.formats import BF16, E2M1, E4M3FN, E4M3FNUZ, E5M2, F16, F32, F64, INT4, INT8, INT32, UE4M3, UINT4, Format
from lowbit.references.rounding import Rounding

from .case import Problem
from .op import Role

__all__ = [
    "BF16", "DATAPATHS", "E2M1", "E4M3FN", "E4M3FNUZ", "E5M2", "EXACT_BITS", "EXECUTIONS", "F16", "F32", "F64", "GROUP", "INT32",
    "INT4", "INT8", "UE4M3", "UINT4", "Backend", "BackendError", "Claim", "Contraction", "Cut", "Datapath", "Declaration",
    "Format", "Join",
    "NOT_EXECUTED", "Order", "Problem", "Role", "Rounding", "Start", "Step", "StepKind", "TensorView", "add",
    "backend_names", "cast", "execution_of", "find_backend", "mul",
]

GROUP = "lowbit.backends"
"""Entry-point group under which backends register."""


class BackendError(Exception):
    """A backend that cannot be found, loaded or used; the message says which and what to try."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """One tensor as a backend sees it: flat memory of the suite plus how to read it.

    `memory` is a NumPy array (host devices) or a torch tensor (torch devices) of dtype uint8/16/32/64 containers (torch:
    uint8, int16, int32, int64), already in `shape`, possibly strided; outputs are written through it in place. Each
    container holds one code of `format`, unless `layout` names a public layout (lowbit.references.layouts), in which case
    the elements are storage words of that layout. `pointer` is the address of element 0 on the device, for native kernels.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in containers
    role: Role
    layout: str
    pointer: int
    memory: Any


@runtime_checkable
class Backend(Protocol):
    """What is under test. Only `name`, `target`, `supports`, `declare` and `run` are required; the others have defaults
    (`defaults_of`): one tactic called "default", no description, no workspace, tensors handed through unchanged."""

    name: str
    target: str

    def supports(self, problem: Problem) -> str | None:
        """None if this problem can be computed; otherwise one sentence that says why not. Removes it for every pattern."""

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The arithmetic of this tactic on this problem. Encodings and quantisers: EXACT_BITS."""

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView],
        workspace: Any, stream: Any,
    ) -> str:
        """Compute into `outputs` and return the name of the kernel that ran. `state` is what `prepare` returned for the
        constants, `inputs` what `stage` returned for the activations; INOUT tensors are among them and are changed in place."""


# Optional methods, with the behaviour a backend gets when it leaves them out:
#   describe() -> Mapping[str, str]                      {}          device, driver, compiler, versions
#   tactics(problem) -> Sequence[str]                    ("default",)
#   prepare(problem, tactic, constants) -> state         constants   untimed, may pack
#   stage(problem, tactic, activations) -> inputs        activations untimed, may pack
#   workspace(problem, tactic) -> int                    0           bytes of scratch memory, poisoned by the suite
#   device -> str                                        "host"      name of the device its tensors live on
#   execution -> str                                     "executed"  or "emulated" (by a model or an emulation of the device), or
#                                                                    "compiled" (nothing runs here: supports() refuses it all)
#   unpack(problem, tactic, state) -> Mapping            absent      diagnostic only, never evidence
#   probe(problem, tactic, state, inputs, stage) -> Any  absent      diagnostic only, never evidence


def tactics_of(backend: Any, problem: Problem) -> Sequence[str]:
    """The tactics of a backend for a problem."""
    return tuple(backend.tactics(problem)) if hasattr(backend, "tactics") else ("default",)


def describe(backend: Any) -> Mapping[str, str]:
    """What a backend says of itself."""
    return dict(backend.describe()) if hasattr(backend, "describe") else {}


EXECUTIONS = ("executed", "emulated", "compiled")
"""Where the arithmetic of a backend happens, the most that can be said first."""


NOT_EXECUTED = "compiled, not executed on this machine"
"""What is said of every problem of a backend that cannot run where it is judged; its reasons begin with these words."""


def execution_of(backend: Any) -> str:
    """Where the arithmetic of a backend happens on this machine: one of `EXECUTIONS`. Raises BackendError for another word."""
    said = str(getattr(backend, "execution", EXECUTIONS[0]))
    if said not in EXECUTIONS:
        raise BackendError(f"backend {backend.name!r} says execution {said!r}; expected one of {', '.join(EXECUTIONS)}")
    return said


def backend_names() -> tuple[str, ...]:
    """Names of all registered backends, sorted."""
    return tuple(sorted(point.name for point in entry_points(group=GROUP)))


def _entry(name: str) -> EntryPoint:
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise BackendError(f"unknown backend {name!r}; registered under {GROUP!r} are: {', '.join(backend_names()) or 'none'}")
    return points[0]


def find_backend(reference: str) -> Any:
    """The backend behind `name` or `name:argument`. The entry point is an object with the methods of `Backend`, or a
    callable that returns one (called with the argument, if one is given). Raises BackendError."""
    name, _, argument = reference.partition(":")
    point = _entry(name)
    try:
        found = point.load()
        if not hasattr(found, "run") or isinstance(found, type):
            found = found(argument) if argument else found()
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"backend {reference!r} ({point.value}) does not load: {type(error).__name__}: {error}") from error
    missing = [attribute for attribute in ("name", "target", "supports", "declare", "run") if not hasattr(found, attribute)]
    if missing:
        raise BackendError(f"backend {reference!r} ({point.value}) lacks {', '.join(missing)}; see docs/backends.md")
    return found
