"""docs/backends.md does what it says: its own code, installed and run by its own commands, ends in the line it prints."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lowbit.conformance.backend import Backend

Command = Callable[..., subprocess.CompletedProcess[str]]
Documented = Mapping[str, tuple[str, ...]]
LIMIT = 60  # lines of their own that a newcomer writes


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, documented: Documented, install: Callable[[Path, Mapping[str, str]], Path]
) -> Path:
    """Where the documented package is installed."""
    files = {
        "pyproject.toml": documented["toml"][0],
        "acme_lowbit/__init__.py": "",
        "acme_lowbit/backend.py": documented["python"][0],
    }
    return install(tmp_path_factory.mktemp("toy"), files)


def test_newcomer_writes_under_sixty_lines(documented: Documented) -> None:
    """All code that is not the suite's: the backend and the project file, blank lines left out."""
    own = "".join(documented["python"] + documented["toml"])
    lines = [line for line in own.splitlines() if line.strip()]
    assert 30 < len(lines) < LIMIT


def test_documented_commands_certify_the_toy_to_level_two(
    lowbit: Command, documented: Documented, site: Path, tmp_path: Path
) -> None:
    """The second command of the section `Run it`, word for word, prints the line that follows it and reaches L2."""
    first, second, expected = documented["console"][0].strip().splitlines()
    assert first == "$ pip install -e ."
    program, *arguments = shlex.split(second.removeprefix("$ "))
    assert program == "lowbit"
    assert (arguments[arguments.index("--level") + 1], arguments[arguments.index("--out") + 1]) == ("L2", "report")
    done = lowbit(*arguments, site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == expected
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json", "junit.xml"}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["level_granted"] == 2
    judged = [verdict for verdict in report["verdicts"] if verdict["status"] in ("EXACT", "WITHIN")]
    assert {"exact", "onehot", "scale", "bounded", "golden", "property", "reject"} <= {verdict["lane"] for verdict in judged}
    assert {verdict["status"] for verdict in report["verdicts"]} <= {"EXACT", "WITHIN", "UNSUPPORTED"}


def test_file_without_entry_point_is_judged_too(lowbit: Command, documented: Documented, tmp_path: Path) -> None:
    """The reference python:FILE:CLASS of the document, from the folder that holds the package's source."""
    (tmp_path / "acme_lowbit").mkdir()
    (tmp_path / "acme_lowbit" / "backend.py").write_text(documented["python"][0])
    text = (Path(__file__).parents[1] / "docs" / "backends.md").read_text()
    reference = re.search(r"python:\S+:\w+", text)
    assert reference is not None
    done = lowbit("run", "gemm_w4a8_int8/direct/m4n8k64g32/f16/normal/s1", "--backend", reference[0])
    assert (done.returncode, done.stdout.split()[0]) == (0, "EXACT")


def test_every_command_of_the_document_exists(lowbit: Command, documented: Documented) -> None:
    """Each verb and option of the shell lines is one that the command knows."""
    lines = [line.removeprefix("$ ").split("#")[0] for block in documented["console"] for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line)
        if not words or words[0] != "lowbit":
            continue
        told = lowbit(words[1], "--help")
        assert told.returncode == 0, line
        for word in words[2:]:
            assert not word.startswith("--") or word in told.stdout, line


def test_protocol_table_names_the_methods_of_the_protocol(documented: Documented) -> None:
    """The table of optional methods and the class in the document together are the protocol, no name more or less."""
    page = (Path(__file__).parents[1] / "docs" / "backends.md").read_text()
    text = page.partition("## The rest of the protocol")[2].partition("\n## ")[0]
    optional = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))
    tree = ast.parse(documented["python"][0])
    written = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    methods = {node.name for node in written.body if isinstance(node, ast.FunctionDef)}
    required = {name for name in vars(Backend) if not name.startswith("_")} - {"name", "target"}
    assert methods == required
    assert optional == {"describe", "tactics", "prepare", "stage", "workspace", "device", "execution"}
