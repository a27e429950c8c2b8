"""What tests of the command share: the command itself, the package of docs/backends.md, and its installation into a folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lowbit.conformance.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lowbit(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command in the test's folder: `lowbit("certify", "cpu", site=FOLDER)`, FOLDER holding installed packages.

    The width keeps rich from folding a sentence; the environment holds no PYTHONPATH but `site`.
    """

    def run(*arguments: object, site: Path | None = None, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "400"} | ({} if site is None else {"PYTHONPATH": str(site)})
        return subprocess.run(
            [Path(sysconfig.get_path("scripts")) / "lowbit", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    return run


@pytest.fixture
def inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same command in this process: the door that the console script opens, without a second of imports. For mistakes that
    end before a backend runs, and wherever how the process ends is not the point."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        told = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(["lowbit", *map(str, arguments)], ended.value.code, told.out, told.err)

    return run


@pytest.fixture(scope="session")
def documented() -> Mapping[str, tuple[str, ...]]:
    """The code blocks of docs/backends.md, by language, in order."""
    blocks: dict[str, tuple[str, ...]] = {}
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        blocks[language] = (*blocks.get(language, ()), text)
    return blocks


@pytest.fixture(scope="session")
def install() -> Callable[[Path, Mapping[str, str]], Path]:
    """Write the files of a package under a folder and install it beside them, without an index; returns where it is."""

    def build(folder: Path, files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = folder / "package" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--disable-pip-version-check",
            "--target",
            str(folder / "site"),
            str(folder / "package"),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return folder / "site"

    return build
