"""The table in docs/exit_codes.md and the enum say the same."""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.conformance.exit_codes import ExitCode

TABLE = Path(__file__).parents[1] / "docs" / "exit_codes.md"


def test_table_and_enum_agree() -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| *(\d+) *\| *([A-Z_]+) *\| *(\S.*?) *\| *(\S.*?) *\|$", text, re.MULTILINE)
    assert [(int(code), name) for code, name, _, _ in rows] == [(code.value, code.name) for code in ExitCode]


def test_numbers_are_those_a_shell_expects() -> None:
    assert int(ExitCode.REACHED) == 0, "a shell takes 0, and nothing else, for success"
    assert int(ExitCode.USAGE) == 2, "the option parser ends with 2 by itself"
    assert int(ExitCode.INTERRUPTED) == 128 + 2, "a shell reports SIGINT, signal 2, as 128 + 2"
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 4, 5, 6, 130]
