"""Reports and verdicts in files.

Decides: that a folder can be written before anything is computed, that a file is seen whole or not at all, and that a kill while
verdicts are appended costs one verdict at most.
Refuses: to leave a partial file behind, and to read what is not UTF-8 or breaks the schema.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .report_records import OutputError, ReportError
from .report_schema import Report, canonical, from_json, plain_data, schema_faults, verdict_json
from .verdict import Verdict

__all__ = [
    "append_verdict", "begin_partial", "check_partial", "load", "load_partial", "prepare_folder", "text_of", "write_atomically",
    "write_bytes_atomically",
]


def text_of(path: Path) -> str:
    """The text of a file. Raises ReportError where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"report {path} cannot be read: {error}") from error


def load(path: Path) -> Report:
    """The report in a file. Raises ReportError."""
    return from_json(text_of(path), str(path))


def prepare_folder(folder: Path) -> Path:
    """Make `folder` and prove that a file can be made in it. Raises OutputError; call it before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be written: {error.strerror or error}; try another --out") from error


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new, never a part. A link is written through. Raises
    OutputError."""
    temporary = ""
    try:
        target = path.resolve()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; give another folder by --out") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text as UTF-8, in one step, line feeds as they are. Raises OutputError."""
    write_bytes_atomically(path, text.encode("utf-8"))


_HEADER = '{"run":'
"""How the first line of a file of verdicts begins; a verdict has no field of that name."""


def begin_partial(path: Path, run: Mapping[str, Any]) -> None:
    """A new file of verdicts, whose first line says what run they are of. Raises OutputError."""
    write_atomically(path, canonical({"run": plain_data(run)}) + "\n")


def check_partial(path: Path, run: Mapping[str, Any]) -> None:
    """Raises ReportError where the first line of a file of verdicts does not say that they are of this run, or where the file
    cannot be read."""
    first = text_of(path).partition("\n")[0]
    try:
        held = json.loads(first)["run"] if first.startswith(_HEADER) else {}
    except ValueError as error:
        raise ReportError(f"{path} does not begin with what run its verdicts are of ({error}); leave out --resume") from error
    wanted = json.loads(canonical(plain_data(run)))
    differing = ", ".join(name for name in wanted if held.get(name) != wanted[name])
    if differing:
        raise ReportError(
            f"the verdicts to resume from, in {path}, are of another run: it differs in {differing}; repeat the command of the "
            "killed run with the same backend, or leave out --resume"
        )


def append_verdict(path: Path, verdict: Verdict) -> None:
    """Add one verdict as one line. What an earlier process left of a line it could not finish is cut off first, so that a
    kill at any moment costs one verdict at most. Raises OutputError."""
    try:
        with open(path, "ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(verdict_json(verdict).encode() + b"\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; give another folder by --out") from error


_VERDICTS: TypeAdapter[tuple[Verdict, ...]] = TypeAdapter(tuple[Verdict, ...], config=ConfigDict(extra="forbid", strict=True))


def load_partial(path: Path) -> tuple[Verdict, ...]:
    """The verdicts that `append_verdict` wrote, in order; a last line without its end is left out. Raises ReportError where
    the file cannot be read or a whole line is no verdict."""
    lines = [line for line in text_of(path).split("\n")[:-1] if not line.startswith(_HEADER)]
    try:
        return _VERDICTS.validate_json("[" + ",\n".join(lines) + "]")
    except ValidationError as error:
        raise ReportError(f"{path} does not hold one verdict per line: {'; '.join(schema_faults(error))}") from error
