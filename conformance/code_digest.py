"""What code a backend, or an arm of an evaluation, consists of.

Decides: which files are its code, and their digest. Refuses: nothing. Code that is reached in other packages is not seen: their
versions belong into `describe`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from .backend import GROUP
from .worker_messages import BY_FILE

__all__ = ["attributes_of", "code_digest"]


def attributes_of(thing: Any) -> dict[str, Any]:
    """What an object holds by itself; nothing for a module, which holds all that it imports."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: getattr(thing, field.name) for field in fields(thing)}
    return {} if isinstance(thing, ModuleType) else dict(getattr(thing, "__dict__", {}))


def _modules_of(reference: str, thing: Any) -> set[str]:
    """Names of the modules that an object's code lies in, with those of the backends that it holds."""
    found = {thing.__name__ if isinstance(thing, ModuleType) else type(thing).__module__}
    found.add(getattr(getattr(thing, "run", None), "__module__", None) or "")
    if not reference.startswith(BY_FILE):
        found |= {point.module for point in entry_points(group=GROUP) if point.name == reference.partition(":")[0]}
    for held in attributes_of(thing).values():
        if hasattr(held, "run") and hasattr(held, "supports") and held is not thing:
            found |= _modules_of("", held)
    return found


def _files_of(name: str) -> dict[str, Path]:
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
    """sha256 over the contents of all files of a backend or an arm: the FILE of `python:FILE.py:ATTRIBUTE`, and for modules of a
    package every file of the package's folder, kernels in other languages among them. `reference`: by which a backend was found,
    or empty."""
    digests = set[str]()
    if reference.startswith(BY_FILE):
        own = Path(reference[len(BY_FILE):].rpartition(":")[0])
        digests.add(f" {hashlib.sha256(own.read_bytes()).hexdigest()}")
    for name in _modules_of(reference, thing):
        digests |= {f"{where} {hashlib.sha256(path.read_bytes()).hexdigest()}" for where, path in _files_of(name).items()}
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
