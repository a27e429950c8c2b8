"""Answers of one arm, on disk as they are given: a run that was killed goes on where it stopped.

Decides: the file (one JSON object per line: kind, key, value), what counts as answered, and the batches, which do not depend on
what was answered before. A batch is asked as a whole, since its other rows bear on a row's last bits; one that a kill cut short
is asked again whole, every other batch never again.
Refuses: a folder whose answers belong to another run, in one sentence that names what differs; answers of which nothing says
whose they are; and arms that did not answer the same questions in the same order.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Answered", "Answers", "EvalError", "Told", "check_pairs", "claim_folder", "to_stderr"]

Told = Callable[[str], None]
"""Called with one line of progress."""


class EvalError(ValueError):
    """An evaluation that cannot be run or read as asked."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One question of one arm. `context`, `answer`: what the arm was told and what it wrote, for a choice the likeliest one."""

    key: str
    right: bool
    context: str
    answer: str
    generated: bool
    room: int  # tokens that a generated answer could have had; 0 for choices


def check_pairs(task: str, answered: Mapping[str, Sequence[Answered]]) -> None:
    """Raises EvalError unless all arms answered the same questions in the same order, generated ones after the same words."""
    first, *others = answered
    for arm in others:
        if len(answered[arm]) != len(answered[first]):
            counts = f"{len(answered[arm])} questions, {first} {len(answered[first])}"
            raise EvalError(f"{task}: {arm} answered {counts}; only pairs are compared, so name another folder by --out")
        for at, (one, other) in enumerate(zip(answered[first], answered[arm], strict=True)):
            if one.key != other.key or one.generated != other.generated or (one.generated and one.context != other.context):
                what = f"question {other.key}, {first} {one.key}" if one.key != other.key else f"{one.key} after other words"
                text = f"{task}: at place {at} {arm} answered {what}"
                raise EvalError(f"{text}; only pairs are compared, name another folder by --out")


def to_stderr(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


class Answers:
    """The answers of one file, `folder`/NAME.jsonl, by key; keys are unique texts."""

    def __init__(self, path: Path) -> None:
        self.path, self._known = path, dict[str, Any]()
        if not path.exists():
            return
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        if rest:  # a line that a kill cut short
            os.truncate(path, len(whole) + 1 if whole else 0)
        for line in whole.splitlines():
            record = json.loads(line)
            self._known[record["key"]] = record["value"]

    def __len__(self) -> int:
        return len(self._known)

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of these are answered."""
        return all(key in self._known for key in keys)

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def append(self, answers: Mapping[str, Any]) -> None:
        """Write answers at the end of the file, in one write that is on disk on return."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in answers.items())
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self._known.update(answers)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder that of a run with these settings. Raises EvalError where it is that of another, or may be: it holds
    answers and no settings."""
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(dict(settings)))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if differing:
            first = differing[0]
            raise EvalError(
                f"{folder} holds answers of another run: {first} was {found.get(first)!r} there and is {wanted.get(first)!r} here"
                f"{f', and {len(differing) - 1} more settings differ' if differing[1:] else ''}; name another folder"
            )
        return
    left = sorted(folder.glob("*.jsonl"))
    if left:
        text = f"{folder} holds {left[0].name} and no settings.json, so nothing says whose answers these are"
        raise EvalError(f"{text}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".tmp")
    work.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(work, path)
