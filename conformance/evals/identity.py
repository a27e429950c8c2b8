"""What fixes an arm's answers: its code, its options, and what it says of its device.

Decides: what of an arm can change its answers, and when two references name one backend. Refuses: nothing.
"""

from __future__ import annotations

from typing import Any

from ..backend import describe, execution_of
from ..worker_messages import BY_FILE
from ..worker_process import attributes_of, code_digest

__all__ = ["about", "code_digest", "identity", "same_backend"]


def about(arm: Any) -> tuple[dict[str, str], str]:
    """What the backend behind an arm says of itself, and where it executes; an arm without one says nothing and executes."""
    backend = getattr(arm, "backend", None)
    if backend is None:
        return {}, "executed"
    return {str(key): str(value) for key, value in describe(backend).items()}, execution_of(backend)


def identity(arm: Any) -> dict[str, Any]:
    """Plain data that differs where an arm's answers may: class, options (its plain attributes: name, tactic, ...), the digest of
    its code, what its backend says of itself, and the same of the arms that it holds."""
    backend, held = getattr(arm, "backend", None), attributes_of(arm)
    said, execution = about(arm)
    return {
        "class": f"{type(arm).__module__}.{type(arm).__qualname__}",
        "options": {name.strip("_"): value for name, value in held.items() if isinstance(value, str | int | float | None)},
        "code": code_digest("", arm) if backend is None else code_digest(str(arm.name), backend),
        "describe": said, "execution": execution,
        "arms": {
            name: identity(value) for name, value in held.items()
            if hasattr(value, "prepare") and hasattr(value, "declare") and not hasattr(value, "supports")
        },
    }


def same_backend(one: Any, other: Any) -> bool:
    """Whether two arms of backends compute by one backend: the same reference, class or function, or files of one content."""
    if one.name == other.name or one.backend is other.backend:
        return True
    run, other_run = (getattr(arm.backend.run, "__func__", arm.backend.run) for arm in (one, other))
    if run is other_run and type(one.backend) is type(other.backend):
        return True
    by_file = one.name.startswith(BY_FILE) and other.name.startswith(BY_FILE)
    return by_file and code_digest(one.name, one.backend) == code_digest(other.name, other.backend)
