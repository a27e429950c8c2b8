"""Imports point down the layer table, frameworks stay in their rooms, and module names say what a module is about.

Every rule is a row of a table in this file and a function over the syntax tree; each is also shown to catch a planted breach.
Imports inside functions and under TYPE_CHECKING count: a dependency is one wherever it is written.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("references", "conformance", "kernels", "golden")

# Lowest first. A module imports from its own layer and from those below it. A new module is added to exactly one row.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("lowbit.references", "lowbit.references.*"),
    ("lowbit.conformance.exit_codes", "lowbit.conformance.case", "lowbit.conformance.memory",
     "lowbit.conformance.quantiser_draws"),
    ("lowbit.conformance.op", "lowbit.conformance.admissible", "lowbit.conformance.bounds", "lowbit.conformance.storage",
     "lowbit.conformance.backend", "lowbit.conformance.device"),
    ("lowbit.conformance.audit_probes",),  # operands that measure, drawn as a pattern's are
    # operand values are drawn for the tensors that an op specifies
    ("lowbit.conformance.patterns", "lowbit.conformance.audit_readings"),
    ("lowbit.conformance.ops", "lowbit.conformance.ops.*"),
    ("lowbit.conformance.selection", "lowbit.conformance.vectors"),  # the cases that are asked, drawn or stored
    ("lowbit.conformance.simulator",),  # a backend of the suite itself: it computes what the references say
    ("lowbit.conformance.gallery", "lowbit.conformance.gallery.*"),  # the simulator with faults, and without guilt
    ("lowbit.conformance.verdict",),
    ("lowbit.conformance.report_records", "lowbit.conformance.waivers", "lowbit.conformance.power"),
    ("lowbit.conformance.report_levels", "lowbit.conformance.report_coverage", "lowbit.conformance.audit_findings",
     "lowbit.conformance.audit_table"),
    ("lowbit.conformance.report_schema",),
    ("lowbit.conformance.report_files", "lowbit.conformance.report_comparison"),
    ("lowbit.conformance.report",),
    ("lowbit.conformance.worker_messages",),
    ("lowbit.conformance.code_digest",),
    ("lowbit.conformance.worker_process",),
    ("lowbit.conformance.worker",),
    # lanes whose problems or operands do not come from the selection alone
    ("lowbit.conformance.stability", "lowbit.conformance.properties", "lowbit.conformance.tensors"),
    ("lowbit.conformance.session",),
    ("lowbit.conformance.run",),
    (
        "lowbit.conformance.audit", "lowbit.conformance.bench", "lowbit.conformance.bench_device",
        "lowbit.conformance.bench_figures", "lowbit.conformance.bench_kernels", "lowbit.conformance.bundle",
        "lowbit.conformance.evals", "lowbit.conformance.evals.*", "lowbit.conformance.explain",
        "lowbit.conformance.html", "lowbit.conformance.junit", "lowbit.conformance.mutants", "lowbit.conformance.plugin",
        "lowbit.conformance.reduce", "lowbit.conformance.shards", "lowbit.conformance.strategies", "lowbit.conformance.survey",
        "lowbit.golden", "lowbit.golden.*",
    ),
    ("lowbit.conformance", "lowbit.conformance.cli", "lowbit.conformance.suite", "lowbit.conformance.suite.*"),
)

# kernels stand beside the stack: a kernel that shares the judge's codec or rounding shares its bugs.
KERNELS = ("lowbit.kernels", "lowbit.kernels.*")
KERNELS_MAY_IMPORT = ("lowbit.conformance.backend", *KERNELS)

# Who may import which distribution; the standard library is free. What is not listed is not a dependency of the product.
# ml_dtypes, gfloat and scipy are witnesses of the tests and therefore absent; see TIMED for the one exception.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "numpy": ("lowbit.*",),
    "torch": (  # device, bench_device: memory, events and graphs of accelerators, no numbers
        "lowbit.references.torch_*", "lowbit.references.cuda_*", "lowbit.conformance.bench_device", "lowbit.conformance.device",
        "lowbit.conformance.evals.*", *KERNELS,
    ),
    "numba": ("lowbit.references.numba_*", *KERNELS),
    "jinja2": ("lowbit.conformance.*",),
    "pydantic": ("lowbit.conformance.*",),
    "rich": ("lowbit.conformance.*",),
    "safetensors": ("lowbit.conformance.*",),
    "typer": ("lowbit.conformance.*",),
    "hypothesis": ("lowbit.conformance.plugin", "lowbit.conformance.strategies", "lowbit.conformance.suite.*"),
    "pytest": ("lowbit.conformance.plugin", "lowbit.conformance.suite.*"),
    "datasets": ("lowbit.conformance.evals.*",),
    "lm_eval": ("lowbit.conformance.evals.*",),
    "scipy": ("lowbit.conformance.evals.*",),
    "threadpoolctl": ("lowbit.conformance.evals.*",),
    "tokenizers": ("lowbit.conformance.evals.*",),
    "transformers": ("lowbit.conformance.evals.*",),
    "yaml": ("lowbit.conformance.evals.*",),
    "cutlass": ("lowbit.kernels.blackwell_room.*",),
    "cuda": ("lowbit.kernels.blackwell_room.*",),
    "triton": KERNELS,
    "compressed_tensors": KERNELS,
    "modelopt": KERNELS,
    "onnx": KERNELS,
    "onnxruntime": KERNELS,
    "pyopencl": KERNELS,
    "torchao": KERNELS,
}

# What is timed beside our own code where it happens to be installed: no number comes from it, and nothing depends on it.
TIMED: dict[str, tuple[str, ...]] = {name: ("lowbit.conformance.bench",) for name in ("ml_dtypes", "mmasim", "torch")}

SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "managers", "manager", "misc", "core", "base"}
TOLERANCES = {"rtol", "atol", "rel_tol", "abs_tol", "allclose", "isclose", "approx", "assert_allclose", "assert_close",
              "assert_almost_equal", "assert_array_almost_equal", "assertAlmostEqual"}


def sources() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found: dict[str, Path] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(("lowbit", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = sources()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def layer(module: str) -> int | None:
    """Row of LAYERS, or None for a module that stands in no row."""
    return next((row for row, patterns in enumerate(LAYERS) if matches(module, patterns)), None)


def imports(module: str, tree: ast.AST, *, package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports; `from x import y` is x.y where that is a module, else x.

    `import_module("x")` counts. A computed name cannot be seen here.
    """
    def absolute(name: str, level: int) -> str:
        parents = module.split(".") if package else module.split(".")[:-1]
        return ".".join((*parents[: len(parents) - level + 1], *filter(None, [name]))) if level else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node.module or "", node.level)
            for alias in node.names:
                child = f"{origin}.{alias.name}"
                yield node.lineno, child if child in MODULES else origin
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}:
            for name in (str(first.value) for first in node.args[:1] if isinstance(first, ast.Constant)):
                yield node.lineno, absolute(name.lstrip("."), len(name) - len(name.lstrip(".")))


def breaches(module: str, source: str, *, package: bool = False) -> list[str]:
    """The import rules that a module breaks, one sentence each."""
    if layer(module) is None and not matches(module, KERNELS):
        return [f"{module} stands in no row of LAYERS: add it to one."]
    found: list[str] = []
    for line, target in imports(module, ast.parse(source), package=package):
        root = target.partition(".")[0]
        if root == "lowbit":
            if matches(module, KERNELS):
                allowed = matches(target, KERNELS_MAY_IMPORT)
            else:
                own, other = layer(module), layer(target)
                allowed = own is not None and other is not None and other <= own
        else:
            allowed = root in sys.stdlib_module_names or matches(module, THIRD_PARTY.get(root, ()) + TIMED.get(root, ()))
        if not allowed:
            found.append(f"{module}, line {line}: may not import {target}.")
    return found


def tolerances(source: str) -> list[str]:
    """Names of tolerance-based comparisons that a module mentions as code; strings and comments are free."""
    named: list[tuple[int, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            named.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute):
            named.append((node.lineno, node.attr))
        elif isinstance(node, ast.keyword | ast.arg):
            named.append((node.lineno, node.arg))
        elif isinstance(node, ast.alias):
            named.append((node.lineno, node.name.rpartition(".")[2]))
    return [f"line {line}: {name}" for line, name in sorted(named, key=str) if name in TOLERANCES]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert breaches(module, MODULES[module].read_text(encoding="utf-8"), package=module in PACKAGES) == []


@pytest.mark.parametrize(("module", "package", "source"), [
    ("lowbit.references.formats", False, "import lowbit.conformance.case"),
    ("lowbit.references.formats", False, "from lowbit.conformance import case"),
    ("lowbit.references.formats", False, "from ..conformance.case import Case"),
    ("lowbit.references.formats", False, "from .. import conformance"),
    ("lowbit.references", True, "from ..conformance.case import Case"),
    ("lowbit.references.formats", False, "def f():\n    from lowbit.conformance.case import Case"),
    ("lowbit.conformance.op", False, "from .ops.gemm_int4 import GEMM_INT4"),
    ("lowbit.conformance.op", False, "from . import verdict"),
    ("lowbit.conformance.ops", True, "from ..verdict import Verdict"),
    ("lowbit.conformance.ops.gemm_int4", False, "from ..verdict import Verdict"),
    ("lowbit.conformance.run", False, "if TYPE_CHECKING:\n    from lowbit.conformance.cli import main"),
    ("lowbit.conformance.run", False, "import lowbit.kernels.cpu"),
    ("lowbit.conformance.run", False, "from lowbit.conformance import ExitCode"),
    ("lowbit.kernels.cpu", False, "from lowbit.references.rounding import Rounding"),
    ("lowbit.kernels.cpu", False, "from lowbit.conformance.case import Case"),
    ("lowbit.kernels.cpu", False, "import lowbit.conformance"),
    ("lowbit.references.rounding", False, "import torch"),
    ("lowbit.references.rounding", False, "from numba import njit"),
    ("lowbit.references.torch_twin", False, "import numba"),
    ("lowbit.references.rounding", False, "import pydantic"),
    ("lowbit.conformance.run", False, "import torch.cuda"),
    ("lowbit.conformance.run", False, "torch = importlib.import_module('torch')"),
    ("lowbit.conformance.run", False, "cli = import_module('.cli', __package__)"),
    ("lowbit.conformance.op", False, "from . import patterns"),
    ("lowbit.conformance.run", False, "import pytest"),
    ("lowbit.references.rounding", False, "import ml_dtypes"),
    ("lowbit.conformance.run", False, "import ml_dtypes"),
    ("lowbit.conformance.report_records", False, "from .report import Report"),
    ("lowbit.conformance.report_levels", False, "if TYPE_CHECKING:\n    from .report_schema import Report"),
    ("lowbit.conformance.worker_process", False, "from .worker import Worker"),
    ("lowbit.conformance.simulator", False, "from .gallery.alteration import Altered"),
    ("lowbit.conformance.selection", False, "from .run import Plan"),
    ("lowbit.conformance.surprise", False, ""),
])
def test_a_planted_import_is_caught(module: str, package: bool, source: str) -> None:
    assert len(breaches(module, source, package=package)) == 1


@pytest.mark.parametrize(("module", "package", "source"), [
    ("lowbit.references.rounding", False, "import math\nimport numpy as np\nfrom .formats import Format"),
    ("lowbit.references", True, "from .formats import Format\nfrom . import formats"),
    ("lowbit.references.torch_twin", False, "import torch"),
    ("lowbit.references.numba_twin", False, "import numba"),
    ("lowbit.conformance.ops", True, "from .gemm_int4 import OP\nfrom ..op import Op"),
    ("lowbit.conformance.ops.gemm_int4", False, "from ..op import Op\nfrom ...references.formats import INT4"),
    ("lowbit.conformance.run", False, "from . import verdict\nfrom lowbit.conformance import case"),
    ("lowbit.conformance.patterns", False, "from .op import Op"),
    ("lowbit.conformance.ops", True, "draws = import_module('.gemm_int4', __package__)"),
    ("lowbit.conformance.ops.gemm_int4", False, "case = import_module('..case', __package__)"),
    ("lowbit.conformance.device", False, "torch = importlib.import_module('torch')"),
    ("lowbit.kernels.cpu", False, "import torch\nfrom lowbit.conformance.backend import Backend\nfrom . import cpu_tables"),
])
def test_an_import_that_points_down_is_accepted(module: str, package: bool, source: str) -> None:
    assert breaches(module, source, package=package) == []


def test_rows_do_not_overlap() -> None:
    rows = {module: [row for row, patterns in enumerate(LAYERS) if matches(module, patterns)] for module in MODULES}
    assert {module: found for module, found in rows.items() if len(found) > 1} == {}


def test_third_party_packages_are_declared() -> None:
    """A package that the product may import is a dependency or belongs to an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (text for name, texts in project["optional-dependencies"].items() if name != "test" for text in texts)
    declared = {text.replace("nvidia-", "").replace("-", "_") for text in (*project["dependencies"], *extras)}
    # import name -> distribution, where they differ
    imported = {"cutlass": "cutlass_dsl", "cuda": "cuda_bindings", "yaml": "pyyaml", "lm_eval": "lm_eval[hf]"}
    names = {imported.get(name, name) for name in THIRD_PARTY}
    assert {name for name in names if not any(text.startswith((f"{name}>", f"{name}=")) for text in declared)} == set()


@pytest.mark.parametrize("path", [*MODULES.values(), *sorted(Path(__file__).parent.rglob("*.py")), ROOT / "noxfile.py"],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_and_comparisons(path: Path) -> None:
    assert SAYS_NOTHING.intersection(path.relative_to(ROOT).with_suffix("").parts) == set()
    assert tolerances(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "np.allclose(a, b)", "from math import isclose", "assert a == pytest.approx(b)", "f(a, rtol=1)", "def f(atol): ...",
    "import x.approx",
])
def test_a_planted_tolerance_is_caught(source: str) -> None:
    assert len(tolerances(source)) == 1


def test_kernels_package_is_a_docstring() -> None:
    """A `__version__` here, or any import, could make other libraries take this package for another of the same name."""
    body = ast.parse(MODULES["lowbit.kernels"].read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]


@pytest.mark.parametrize(("imported", "absent"), [
    ("lowbit.kernels", ("torch", "numba", "triton", "numpy", "lowbit.conformance", "lowbit.references")),
    ("lowbit.references", ("torch", "numba", "lowbit.conformance")),
    ("lowbit.conformance", ("torch", "numba", "typer", "pydantic", "jinja2", "lowbit.kernels", "lowbit.conformance.cli")),
    ("lowbit.conformance.backend", ("torch", "numba", "typer", "pydantic", "jinja2", "lowbit.kernels", "lowbit.conformance.cli")),
])
def test_importing_a_room_loads_no_framework(imported: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {imported}; print([name for name in {absent!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
