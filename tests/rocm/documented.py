"""The table of docs/w8a8_utils.md as rows, for the tests that hold it to account."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGE", "Row", "rows"]

PAGE = Path(__file__).parents[2] / "docs" / "w8a8_utils.md"


@dataclass(frozen=True)
class Row:
    """One branch of the source, its counterpart and the case that runs that."""

    source: str
    branch: str
    here: str
    case: str


def rows(text: str | None = None) -> list[Row]:
    """Rows of the table, cells stripped, code marks of the first cell taken away."""
    lines = (PAGE.read_text(encoding="utf-8") if text is None else text).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return [Row(first.strip("`"), *rest) for first, *rest in cells[2:]]
