"""The gallery as backends: `mutant:NAME` and `variant:NAME`, found and judged as any other. `mutant:NAME,healed` is the same
without its fault: the control of each kill.

Decides: which record a name means. Refuses: names that are in no list.
"""

from __future__ import annotations

from typing import Any

from lowbit.conformance.backend import BackendError

from .alteration import Altered, load
from .arithmetic import WRONG_ARITHMETIC
from .codings import WRONG_CODES
from .indices import WRONG_OPERANDS
from .stores import WRONG_STORES
from .variants import VARIANTS

__all__ = ["MUTANTS", "mutant", "variant"]

MUTANTS: tuple[Altered, ...] = (*WRONG_OPERANDS, *WRONG_ARITHMETIC, *WRONG_STORES, *WRONG_CODES)
"""Every faulty backend."""


def _named(kind: str, listed: tuple[Altered, ...], name: str) -> Altered:
    found = next((item for item in listed if item.name == name), None)
    if found is None:
        names = ", ".join(item.name for item in listed)
        raise BackendError(f"no {kind} is called {name!r}; use {kind}:NAME with one of {names}")
    return found


def mutant(name: str = "") -> Any:
    """The faulty backend of a name; `NAME,healed` is the one without the fault. Raises BackendError."""
    name, _, option = name.partition(",")
    if option not in ("", "healed"):
        raise BackendError(f"mutant:{name},{option}: the only option is healed")
    return load(_named("mutant", MUTANTS, name), healed=bool(option))


def variant(name: str = "") -> Any:
    """The legitimate backend of a name. Raises BackendError."""
    return load(_named("variant", VARIANTS, name))
