"""Copies of the cpu backend whose source differs in a few lines: how mutants and variants are made.

Decides: what an alteration is (text of a module of the backend, and the text in its place) and how a process loads a backend
with it. Refuses: an alteration whose text does not stand in its module exactly once, and one that comes after the backend was
imported. The change is in how a result comes about: the altered backend is loaded, called and judged as any other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from lowbit.conformance.backend import BackendError, Problem, TensorView, find_backend
from lowbit.conformance.simulator import backend as simulator
from lowbit.references.declarations import Declaration

__all__ = ["Altered", "Edit", "Misdeclared", "load"]

_ROOM = "lowbit.kernels"

Edit = tuple[str, str, str]
"""(module below lowbit.kernels, text that stands in it once, text in its place)."""


@dataclass(frozen=True, slots=True)
class Altered:
    """One backend of the gallery.

    `ops`: what the alteration touches, judged on their ordinary case lists. `guards`: the reports that show the class of defect
    in the field, or the trait of a legitimate kernel. `what`: one line. `edits`: the alteration of the cpu backend. `setting`:
    edits that come before and are no fault: the honest kernel and declaration in which the fault sits. Where there are no edits,
    the simulator `runs` under the declaration of the simulator `says` (the same one, for a variant). `reached_by`: a case in
    which the fault shows, for the comparison with rules of others; empty: the usual one of the op.
    """

    name: str
    ops: tuple[str, ...]
    guards: str
    what: str
    edits: tuple[Edit, ...] = ()
    setting: tuple[Edit, ...] = ()
    runs: str = ""
    says: str = ""
    reached_by: str = ""


class _Source(SourceFileLoader):
    """Compiles a module from its altered text; no byte code is read or written."""

    def __init__(self, fullname: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(fullname, path)
        self._edits = edits

    def get_code(self, fullname: str) -> CodeType:
        """The altered module. Raises BackendError where the text of an edit is not there once."""
        text = self.get_data(self.path).decode("utf-8")
        for module, old, new in self._edits:
            if text.count(old) != 1:
                raise BackendError(f"{module}: the text {old!r} stands {text.count(old)} times in {self.path}, expected once")
            text = text.replace(old, new)
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Serves the altered modules."""

    def __init__(self, edits: Mapping[str, Sequence[Edit]]) -> None:
        self._edits = edits

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for the modules that have edits, None for others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self._edits else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Source(fullname, spec.origin, self._edits[fullname])
        return spec


class Misdeclared:
    """A simulator under the declaration of another one."""

    target = "sim"
    execution = "emulated"

    def __init__(self, name: str, runs: str, says: str) -> None:
        self.name, self._runs, self._says = name, simulator(runs), simulator(says)

    def supports(self, problem: Problem) -> str | None:
        """None where both simulators take the problem."""
        return self._runs.supports(problem) or self._says.supports(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """What the other one computes."""
        return self._says.declare(problem, tactic)

    def run(
        self, problem: Problem, tactic: str, state: Mapping[str, TensorView], inputs: Mapping[str, TensorView],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Emulate."""
        return self._runs.run(problem, tactic, state, inputs, outputs, workspace, stream)


def load(altered: Altered, *, healed: bool = False) -> Any:
    """The backend, in a process that has not imported the cpu backend yet; `healed`: without the fault. Raises BackendError."""
    if altered.runs:
        honest = altered.says or altered.runs
        return Misdeclared(altered.name, honest if healed else altered.runs, honest)
    edits: dict[str, list[Edit]] = {}
    for edit in (*altered.setting, *(() if healed else altered.edits)):
        edits.setdefault(f"{_ROOM}.{edit[0]}", []).append(edit)
    late = sorted(set(edits) & set(sys.modules))
    if late:
        raise BackendError(f"{altered.name}: {late[0]} is imported already; an altered backend needs a process of its own")
    sys.meta_path.insert(0, _Finder(edits))
    found = find_backend("cpu")
    missing = sorted(set(edits) - set(sys.modules))
    if missing:
        raise BackendError(f"{altered.name}: the cpu backend no longer imports {', '.join(missing)}")
    return found
