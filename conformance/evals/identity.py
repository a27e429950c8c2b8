"""What fixes an arm's answers: its code, its options, and what it says of its device.

Decides: which files are the code of a backend (the FILE of `python:FILE.py:ATTRIBUTE`, and for modules of a package every file of
the package's folder, kernels in other languages among them), and when two references name one backend.
Refuses: nothing. Code that a backend reaches in other packages is not seen: their versions belong into its `describe`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backend import GROUP, describe, execution_of
from ..worker_messages import BY_FILE

__all__ = ["about", "code_digest", "identity", "same_backend"]


def _attributes(thing: Any) -> dict[str, Any]:
    """What an object holds by itself; nothing for a module, which holds all that it imports."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return {} if isinstance(thing, ModuleType) else dict(getattr(thing, "__dict__", {}))


def _modules(reference: str, thing: Any) -> set[str]:
    """Names of the modules that an object's code lies in, with those of the backends that it holds."""
    found = {thing.__name__ if isinstance(thing, ModuleType) else type(thing).__module__}
    found.add(getattr(getattr(thing, "run", None), "__module__", None) or "")
    if not reference.startswith(BY_FILE):
        found |= {point.module for point in entry_points(group=GROUP) if point.name == reference.partition(":")[0]}
    for held in _attributes(thing).values():
        if hasattr(held, "run") and hasattr(held, "supports") and held is not thing:
            found |= _modules("", held)
    return found


def _files(name: str) -> dict[str, Path]:
    """Files of a module's package by their names in it; of a module without package itself, by no name."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return {}
    package = module.__spec__.parent if module.__spec__ is not None else ""
    if not package:
        return {"": Path(file)}
    folder = Path(file).parent
    return {
        f"{package}/{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def code_digest(reference: str, thing: Any) -> str:
    """sha256 over the contents of all files of a backend or an arm. `reference`: by which a backend was found, or empty."""
    digests = set[str]()
    if reference.startswith(BY_FILE):
        own = Path(reference[len(BY_FILE):].rpartition(":")[0])
        digests.add(f" {hashlib.sha256(own.read_bytes()).hexdigest()}")
    for name in _modules(reference, thing):
        digests |= {f"{where} {hashlib.sha256(path.read_bytes()).hexdigest()}" for where, path in _files(name).items()}
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def about(arm: Any) -> tuple[dict[str, str], str]:
    """What the backend behind an arm says of itself, and where it executes; an arm without one says nothing and executes."""
    backend = getattr(arm, "backend", None)
    if backend is None:
        return {}, "executed"
    return {str(key): str(value) for key, value in describe(backend).items()}, execution_of(backend)


def identity(arm: Any) -> dict[str, Any]:
    """Plain data that differs where an arm's answers may: class, options (its plain attributes: name, tactic, ...), the digest of
    its code, what its backend says of itself, and the same of the arms that it holds."""
    backend, held = getattr(arm, "backend", None), _attributes(arm)
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
