"""What is built from the checkout: the wheel holds the suite and nothing else, and works where the checkout is not.

Builds run in a copy of the checkout with the installed setuptools, so no network is used and no build folder is left behind.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("references", "conformance", "kernels", "golden")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION: str = PROJECT["project"]["version"]
SHIPPED = {".cl", ".cpp", ".cu", ".cuh", ".h", ".j2", ".json", ".jsonl", ".npz", ".py", ".safetensors", ".typed"}


def build(tree: Path, kind: str, out: Path) -> Path:
    """Build a wheel, sdist or editable wheel of a tree in a process of its own; return the file."""
    program = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def environment(folder: Path, wheel: Path, *, dependencies: bool) -> Path:
    """Install a wheel into a new, empty environment; return its interpreter.

    `dependencies` adds the packages of the running environment at the end of the path: the `lowbit` under test comes first
    and hides the one that runs the tests. An editable wheel finds its modules after every path, so it must do without.
    """
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    if dependencies:
        borrowed = f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
        (site / "zz_dependencies.pth").write_text(borrowed, encoding="utf-8")
    return folder / "bin" / "python"


def ask(python: Path, program: str, cwd: Path) -> str:
    """What a one-line program prints, run away from the checkout and isolated from the variables of the caller."""
    done = subprocess.run([python, "-I", "-c", program], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    for room in (*ROOMS, "tests"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("installed") / "env", wheel, dependencies=True)


def test_wheel_holds_the_four_rooms_and_nothing_else(wheel: Path) -> None:
    """Every module and data file of a room, under the one namespace; nothing of the tests, no top-level name but `lowbit`."""
    expected = {f"lowbit/{path.relative_to(ROOT).as_posix()}" for room in ROOMS for path in (ROOT / room).rglob("*")
                if path.suffix in SHIPPED or (room == "golden" and path.name.startswith(("README", "LICENSE", "LICENCE")))}
    metadata = f"lowbit-{VERSION}.dist-info/"
    names = set(contents(wheel))
    assert {name for name in names if not name.startswith(metadata)} == expected
    assert {name.removeprefix(metadata) for name in names if name.startswith(metadata)} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }
    assert "lowbit/__init__.py" not in names, "the namespace has no file of its own"
    assert {f"lowbit/{room}/py.typed" for room in ROOMS} <= names


def test_every_package_is_listed() -> None:
    """A folder with an `__init__.py` that pyproject.toml does not list would be missing from the wheel, silently."""
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert {".".join(("lowbit", *folder.parts)) for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert {folder.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")
            for folder in [path.parent]} == folders, "every folder with modules is a package"


def test_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    again = build(tmp_path / "unpacked" / f"lowbit-{VERSION}", "wheel", tmp_path / "again")
    assert contents(again) == contents(wheel)


def test_editable_install_maps_the_rooms(tree: Path, tmp_path: Path) -> None:
    """Each room is imported from the checkout, and a module added after the installation is found."""
    python = environment(tmp_path / "env", build(tree, "editable", tmp_path / "editable"), dependencies=False)
    for room in ROOMS:
        program = f"import importlib.util as u; print(u.find_spec('lowbit.{room}').origin)"
        assert Path(ask(python, program, tmp_path)) == tree / room / "__init__.py"
    late = tree / "kernels" / "added_later.py"
    late.write_text("WORD = 'found'\n", encoding="utf-8")
    try:
        assert ask(python, "from lowbit.kernels.added_later import WORD; print(WORD)", tmp_path) == "found"
    finally:
        late.unlink()


def test_installed_wheel_has_its_entry_points(installed: Path, tmp_path: Path) -> None:
    """The command and each backend load from the installed wheel, by the names that pyproject.toml declares."""
    program = (
        "import importlib.metadata as m; d = m.distribution('lowbit'); "
        "print(sorted((e.group, e.name, e.value, e.load().__module__) for e in d.entry_points))"
    )
    project = PROJECT["project"]
    declared = [("console_scripts", name, value) for name, value in project["scripts"].items()]
    declared += [(group, name, value) for group, items in project["entry-points"].items() for name, value in items.items()]
    assert ast.literal_eval(ask(installed, program, tmp_path)) == sorted((*row, row[2].partition(":")[0]) for row in declared)


def test_installed_wheel_alone_certifies(installed: Path, tmp_path: Path) -> None:
    """No file of the checkout is needed: contracts, vectors and templates are all in the wheel."""
    program = "import lowbit.conformance.cli as cli; print(cli.__file__); cli.main()"
    done = subprocess.run(
        [installed, "-I", "-c", program, "certify", "cpu", "--level", "L0", "--out", str(tmp_path / "report")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(installed.parents[1])
    assert (tmp_path / "report" / "report.json").is_file()
    assert (tmp_path / "report" / "report.html").is_file()


def test_installed_wheel_holds_the_golden_vectors(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.resources as r; "
        "walk = lambda d: sum(walk(x) if x.is_dir() else x.name.endswith('.json') for x in d.iterdir()); "
        "print(walk(r.files('lowbit.golden')))"
    )
    count = int(ask(installed, program, tmp_path))
    assert count == len(list((ROOT / "golden").rglob("*.json")))
    assert count > 0


def test_the_top_level_name_kernels_is_left_to_others() -> None:
    """Another distribution owns `kernels`; neither a test run nor an installation may offer ours under that name."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not Path(str(spec.origin)).is_relative_to(ROOT)
    top = {path.parts[0] for file in importlib.metadata.files("lowbit") or () if (path := Path(str(file))).suffix == ".py"}
    assert top <= {"lowbit"} or all(name.startswith("__editable__") for name in top)


def test_extras_are_used() -> None:
    """An extra that nothing needs yet is a promise without content."""
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        "fast", "torch", "blackwell", "evals", "hopper", "property", "rocm", "subjects", "test", "triton", "xpu",
    }


def test_sessions_named_in_the_documentation_exist() -> None:
    """`nox -s NAME` in a page or in .ci/run names a function of noxfile.py that is a session."""
    body = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
    sessions = {node.name for node in body if isinstance(node, ast.FunctionDef)
                and any(ast.unparse(mark).startswith("nox.session") for mark in node.decorator_list)}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run", *sorted((ROOT / "docs").glob("*.md"))]
    command = re.compile(r"\bnox (?:--[\w-]+ )*-s ([a-z]+(?: [a-z]+)*)(?=[`\n]| -- |  |$)")
    named = {name for page in pages for found in command.findall(page.read_text(encoding="utf-8")) for name in found.split()}
    assert {"cpu", "tests"} <= named <= sessions
    assert sessions == {
        "cpu", "cuda", "ascend", "rocm", "xpu", "tests", "lint", "typecheck", "golden", "mutants", "bench", "blackwell", "triton",
        "probes", "ascend_lowering", "evals", "hopper", "interpreter",
    }
