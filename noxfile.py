"""Every task of the project, each with its set-up: `nox -s NAME`, or `nox --no-venv -s NAME` to use what is installed.

Decides: which command certifies a target and which commands keep the suite itself honest.
Refuses: to judge the checkout. A session builds the wheel and judges what was installed from it.
"""

from __future__ import annotations

import ast
import filecmp
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "typecheck", "tests"]

ROOMS = ("references", "conformance", "kernels", "golden")
TARGETS = {  # target -> extras that its backends need in this release
    "cpu": "[fast]",
    "cuda": "[blackwell]",
    "ascend": "",
    "rocm": "",
    "xpu": "",
}
NVIDIA = Path("/proc/driver/nvidia/gpus")  # where the driver lists its devices; without one there is nothing to compile for
TORCH = "torch==2.13.0"  # twins are compared bit for bit with one version
TRITON = "triton==3.9.0"  # the interpreter and the compilers of one version
LOWERING = ("triton-ascend==3.2.0", "ascendnpu-ir==1.2.0", "pybind11")  # the first installs a package named triton
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # the checkout holds a folder `kernels`: it must not become importable
    "OMP_NUM_THREADS": "1",  # more threads than free cores make sub-millisecond operations ten times slower
}


def pip_settings() -> dict[str, str]:
    """What pip is configured to use (files and PIP_* variables), by option name; empty where pip is absent.

    uv reads none of it, and a machine that reaches its packages through a mirror says so to pip first.
    """
    answer = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    pairs = (line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in pairs}


def uv_environment() -> dict[str, str]:
    """The variables that make uv look where pip would look, and take the CPU build of torch."""
    settings = pip_settings()
    folders = settings.get("find-links", "").split()
    translated = {
        "UV_DEFAULT_INDEX": settings.get("index-url", ""),
        "UV_INDEX": " ".join(settings.get("extra-index-url", "").split()),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # pip's rule: the best version of all indexes
        "UV_FIND_LINKS": ",".join(folders),
        # A wheel of torch lying in a folder is the one meant; uv would not look at it beside a torch backend.
        "UV_TORCH_BACKEND": "" if any(any(Path(folder).glob("torch-*.whl")) for folder in folders) else "cpu",
    }
    return {name: value for name, value in translated.items() if value and name not in os.environ}


def install(session: nox.Session, *requirements: str, device: bool = False) -> None:
    """Install into the environment of the session; without one (`--no-venv`) what is installed is used. `device`: take the build
    of torch that fits the driver of this machine."""
    if not session.virtualenv.is_sandboxed:
        return
    if session.venv_backend != "uv":
        session.install("uv")
    shutil.rmtree("build", ignore_errors=True)  # setuptools copies what it finds there into the wheel, deleted modules too
    session.run_install(
        "uv", "pip", "install", "--python", session.virtualenv.location, "--reinstall-package=lowbit", *requirements,
        env=uv_environment() | ({"UV_TORCH_BACKEND": "auto"} if device else {}), silent=True, external=True,
    )
    shutil.rmtree("build", ignore_errors=True)


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Run a program of the environment; without one, the program beside the interpreter that runs nox."""
    beside = None if session.virtualenv.is_sandboxed else shutil.which(program, path=str(Path(sys.executable).parent))
    session.run(beside or program, *arguments, env=ENVIRONMENT)


def certify(session: nox.Session) -> None:
    """Certify every backend of the target that the session is named after; the report goes to reports/TARGET."""
    target = session.name
    device = target == "cuda" and NVIDIA.is_dir()
    install(session, f".{TARGETS[target]}" if device or target != "cuda" else ".", device=device)
    selection = [target] if target == "cpu" else ["--target", target]
    run(session, "lowbit", "certify", *selection, "--level", "L2", "--out", f"reports/{target}", *session.posargs)


@nox.session
def cpu(session: nox.Session) -> None:
    """Certify the CPU backend at level L2 and write reports/cpu."""
    certify(session)


@nox.session
def cuda(session: nox.Session) -> None:
    """Certify the NVIDIA backends, or say in one sentence what is missing."""
    certify(session)


@nox.session
def ascend(session: nox.Session) -> None:
    """Certify the AscendC kernels on an NPU; without one under emulation, and print what that leaves to be shown on silicon."""
    install(session, f".{TARGETS['ascend']}")
    run(session, "python", "-m", "lowbit.kernels.ascend", "--build")  # no case then waits for a compiler
    ops = "gemm_int4,int4_quantize,svdquant_quantize,int4_pack"
    options = ("--level", "L2", "--ops", ops, "--per-op", "400", "--out", "reports/ascend")
    run(session, "lowbit", "certify", "--target", "ascend", *options, *session.posargs)
    run(session, "python", "-m", "lowbit.kernels.ascend")


@nox.session
def rocm(session: nox.Session) -> None:
    """Certify the AMD backends, or say in one sentence what is missing."""
    certify(session)


@nox.session
def xpu(session: nox.Session) -> None:
    """Certify the Intel GPU backends, or say in one sentence what is missing."""
    certify(session)


@nox.session
def blackwell(session: nox.Session) -> None:
    """Compile the Blackwell kernels for chips that need not be present, and assert on the instructions that came out."""
    tools = ("nvidia-cuda-nvdisasm>=13", "nvidia-cuda-cuobjdump>=13", TRITON, "pytest>=8.2")
    install(session, ".[blackwell]", TORCH, *tools)
    run(session, "pytest", "tests/blackwell/check_cute.py", "tests/blackwell/check_triton.py", *session.posargs)


@nox.session
def probes(session: nox.Session) -> None:
    """Compile the Hopper probes and emulators with nvcc, and assert on the opcodes that came out."""
    install(session, ".[torch]", TORCH, TRITON)
    program = Path(session.bin) / "python" if session.virtualenv.is_sandboxed else Path(sys.executable)
    session.run(str(program), "tests/device/run_probes.py", "--compile", env=ENVIRONMENT | {"PYTHONPATH": "tests/device"})


@nox.session
def triton(session: nox.Session) -> None:
    """The Triton int4 kernels in the CPU interpreter, judged by the suite, and compiled for GPUs that need not be present."""
    install(session, ".[test]", TORCH, TRITON)
    run(session, "pytest", "tests/ascend_lowering/check_interpreted.py", *session.posargs)


@nox.session(python="3.11")  # the last for which triton-ascend 3.2.0 has a wheel
def ascend_lowering(session: nox.Session) -> None:
    """The Triton int4 kernels lowered to HIVM for Ascend 910B, the cube operation asserted; nothing is executed."""
    install(session, ".", "pytest>=8.2")
    try:
        install(session, *LOWERING)
    except CommandFailed:
        session.skip(f"{', '.join(LOWERING)} cannot be installed here, so nothing was lowered for Ascend.")
    run(session, "pytest", "tests/ascend_lowering/check_lowering.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of the suite itself; the last line is pytest's own summary."""
    install(session, ".[test,fast,torch]", TORCH)
    if not any(shutil.which(browser) for browser in BROWSERS):
        session.warn("No Chromium on PATH, so the test that opens report.html fails: install the package `chromium`.")
    # A log is read from its end: there belongs pytest's count, not nox's remark that a command ended.
    logging.getLogger("nox").addFilter(lambda record: not record.getMessage().startswith(("Session tests ", "Command ")))
    run(session, "pytest", "-n", "2", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff check. There is no formatter: tables and formulas are laid out by hand."""
    install(session, "ruff>=0.14")
    run(session, "ruff", "check", *session.posargs, ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """mypy --strict on the package as installed from the wheel, on the tests and on this file."""
    install(session, ".[test,fast,torch]", TORCH, "mypy>=1.18", "nox")
    run(session, "mypy", "--strict", *(part for room in ROOMS for part in ("-p", f"lowbit.{room}")))
    run(session, "mypy", "--strict", "tests", "noxfile.py")


@nox.session
def golden(session: nox.Session) -> None:
    """Generate the golden vectors again, in a temporary folder, and fail on any difference; `-- --write` replaces them."""
    install(session, ".")
    if session.posargs == ["--write"]:
        run(session, "python", "golden/generate.py", "--out", "golden")
        return
    fresh = Path(session.create_tmp()) / "golden"
    shutil.rmtree(fresh, ignore_errors=True)
    run(session, "python", "golden/generate.py", "--out", str(fresh))
    kept, made = ({path.relative_to(root).as_posix() for path in root.rglob("*.json")} for root in (Path("golden"), fresh))
    unequal = filecmp.cmpfiles("golden", fresh, kept & made, shallow=False)[1]
    if disagreements := sorted((kept ^ made).union(unequal)):
        session.error(f"golden/ and its generator disagree on {', '.join(disagreements)}: a vector is generated, never edited.")
    if not made:
        session.error("golden/generate.py wrote no vector.")
    session.log(f"{len(made)} vector files are what the generator writes, byte for byte.")


@nox.session
def mutants(session: nox.Session) -> None:
    """The gallery of faulty backends that the suite must catch, and of honest ones that it must not accuse."""
    install(session, ".[fast]")
    run(session, "lowbit", "mutants", "--json", "reports/mutants.json", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Time the references and the judge."""
    install(session, ".[fast]")
    run(session, "python", "-m", "lowbit.conformance.bench", *session.posargs)
