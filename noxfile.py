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
from collections.abc import Mapping, Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "typecheck", "tests"]

ROOMS = ("references", "conformance", "kernels", "golden")
TARGETS = {  # target -> extras that its backends need in this release
    "cpu": "[fast]",
    "cuda": "[fast,blackwell,hopper,triton]",
    "ascend": "",
    "rocm": "[rocm]",
    "xpu": "[xpu]",
}
NVIDIA = Path("/proc/driver/nvidia/gpus")  # where the driver lists its devices; without one there is nothing to compile for
TORCH = "torch==2.13.0"  # twins are compared bit for bit with one version
TRITON = "triton==3.9.0"  # the interpreter and the compilers of one version
INTERPRETED = {"TRITON_INTERPRET": "1"}  # Triton reads it when it is imported
RUNTIMES = ("pocl-opencl-icd", "ocl-icd-libopencl1")  # OpenCL for CPUs
NVCC = tuple(
    f"nvidia-{name}>=13"
    for name in ("cuda-cccl", "cuda-crt", "cuda-cuobjdump", "cuda-nvcc", "cuda-nvdisasm", "cuda-runtime", "nvvm")
)
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


def run(
    session: nox.Session, program: str, *arguments: str, codes: Sequence[int] = (0,), env: Mapping[str, str] = ENVIRONMENT
) -> None:
    """Run a program of the environment; `codes` are its good exit codes. Without an environment, the program beside the
    interpreter that runs nox."""
    beside = None if session.virtualenv.is_sandboxed else shutil.which(program, path=str(Path(sys.executable).parent))
    session.run(beside or program, *arguments, env=dict(env), success_codes=codes)


def certify(session: nox.Session, *options: str) -> None:
    """Certify every backend of the target that the session is named after; the report goes to reports/TARGET."""
    target = session.name
    device = target == "cuda" and NVIDIA.is_dir()
    install(session, f".{TARGETS[target]}" if device or target != "cuda" else ".", device=device)
    selection = [target] if target == "cpu" else ["--target", target]
    run(session, "lowbit", "certify", *selection, "--level", "L2", "--out", f"reports/{target}", *options, *session.posargs)


@nox.session
def cpu(session: nox.Session) -> None:
    """Certify the CPU backend at level L2 and write reports/cpu."""
    certify(session)


@nox.session
def cuda(session: nox.Session) -> None:
    """Certify the NVIDIA backends with as many processes as there are processors but two, or say in one sentence what is missing;
    `-- --jobs N` for another number."""
    if not NVIDIA.is_dir():
        certify(session)
        return
    install(session, f".{TARGETS['cuda']}", device=True)
    run(session, "python", "-m", "lowbit.kernels.cuda_hopper", "--build", codes=(0, 1))  # no case then waits for a compiler
    certify(session, "--jobs", str(max(1, len(os.sched_getaffinity(0)) - 2)))


@nox.session
def ascend(session: nox.Session) -> None:
    """Certify the AscendC kernels on an NPU; without one under emulation, and print what that leaves to be shown on silicon."""
    install(session, f".{TARGETS['ascend']}")
    run(session, "python", "-m", "lowbit.kernels.ascend", "--build")  # no case then waits for a compiler
    ops = "gemm_int4,int4_quantize,svdquant_quantize,int4_pack"
    options = ("--level", "L2", "--ops", ops, "--out", "reports/ascend")
    run(session, "lowbit", "certify", "--target", "ascend", *options, *session.posargs)
    run(session, "python", "-m", "lowbit.kernels.ascend")


@nox.session
def rocm(session: nox.Session) -> None:
    """Certify the Triton kernels for AMD chips; without one judge a shortened list, which grants no level, in Triton's CPU
    interpreter. Compile them for gfx942 and gfx950."""
    chip = Path("/dev/kfd").exists()
    install(session, ".[test,fast,rocm]", *(() if chip else (TORCH, TRITON)), device=chip)
    variables = ENVIRONMENT if chip else ENVIRONMENT | INTERPRETED
    run(session, "python", "-m", "lowbit.kernels.rocm", env=variables)
    ops = "fp8_quantize,fp8_convert_fnuz,fp8_requantize,gemm_w8a8_fp8"
    short = () if chip else ("--per-op", "10")
    options = ("--level", "L2", "--ops", ops, *short, "--timeout", "120", "--out", "reports/rocm")
    run(session, "lowbit", "certify", "--target", "rocm", *options, *session.posargs, env=variables)
    run(session, "pytest", "tests/rocm/check_kernels.py", "tests/rocm/check_compiled.py")
    for name in ("gfx942", "gfx950"):  # from Triton's cache: the lines for the log
        run(session, "python", "tests/rocm/compile_kernels.py", "--chip", name)


def opencl(session: nox.Session) -> bool:
    """Whether OpenCL offers a device to the environment of the session. Where none does, a runtime for CPUs is installed: as root
    from the system's packages, then as a wheel."""
    python = session.virtualenv.location + "/bin/python" if session.virtualenv.is_sandboxed else sys.executable
    program = "import sys, lowbit.kernels.xpu as x; sys.exit(x.backend().execution == 'compiled')"

    def there() -> bool:
        command = [python, "-c", program]
        return subprocess.run(command, capture_output=True, env=os.environ | ENVIRONMENT, check=False).returncode == 0

    if there():
        return True
    if os.geteuid() == 0 and shutil.which("apt-get"):
        command = ["apt-get", "install", "-y", "--no-install-recommends", *RUNTIMES]
        try:
            subprocess.run(command, capture_output=True, timeout=240, check=False)
        except subprocess.TimeoutExpired:
            session.log(f"{' '.join(command)} took more than 240 s and was left")
        if there():
            return True
    try:
        install(session, "pocl-binary-distribution")
    except CommandFailed:
        return False
    return there()


@nox.session
def xpu(session: nox.Session) -> None:
    """Certify the OpenCL kernels on an Intel GPU, without one on a CPU (emulated); compile them for Intel GPUs."""
    try:
        install(session, ".[test,fast,xpu]")
    except CommandFailed:
        session.skip("pyopencl cannot be installed here: it and an OpenCL runtime (pocl-opencl-icd) run the xpu kernels.")
    found = opencl(session)
    run(session, "python", "-m", "lowbit.kernels.xpu")
    if not found:
        session.skip("There is no OpenCL runtime: install the package pocl-opencl-icd, or intel-opencl-icd for a GPU.")
    options = ("--level", "L2", "--ops", "gemm_w4a8_int8,int8_quantize,int4_pack", "--out", "reports/xpu")
    run(session, "lowbit", "certify", "--target", "xpu", *options, *session.posargs)
    run(session, "pytest", "tests/xpu/check_xpu_kernels.py")
    folder = Path(session.create_tmp()) / "ocloc"  # Intel's offline compiler, unpacked and not installed
    fetch = ("tests/xpu/compile_xpu_kernels.py", "--fetch", str(folder))
    run(session, "python", *fetch, codes=(0, 2))  # 2: it is not to be had, and says so
    if shutil.which("ocloc") or (folder / "tree").is_dir():
        run(session, "pytest", "tests/xpu/check_xpu_compiled.py", env=ENVIRONMENT | {"OCLOC_FOLDER": str(folder)})


@nox.session
def blackwell(session: nox.Session) -> None:
    """Compile the Blackwell kernels for chips that need not be present, and assert on the instructions that came out."""
    tools = ("nvidia-cuda-nvdisasm>=13", "nvidia-cuda-cuobjdump>=13", TRITON, "pytest>=8.2")
    install(session, ".[blackwell]", TORCH, *tools)
    run(session, "pytest", "tests/blackwell/check_cute.py", "tests/blackwell/check_triton.py", *session.posargs)


@nox.session
def hopper(session: nox.Session) -> None:
    """Compile the Hopper kernels with nvcc, ahead of time and without a device, and assert on the instructions that came out.
    Run them on an emulated machine."""
    install(session, ".[fast,torch]", TORCH, "ml_dtypes>=0.5", "pytest>=8.2", "pytest-xdist>=3.6", *NVCC)
    checks = (f"tests/hopper/check_{name}.py" for name in ("emulated", "compile", "gemm_f16", "stream"))
    run(session, "pytest", "-n", "2", "--dist", "loadfile", *checks, *session.posargs)


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


@nox.session
def interpreter(session: nox.Session) -> None:
    """The triton backend in Triton's CPU interpreter: codecs, a million values per recipe, the ordinary cases, planted faults."""
    install(session, ".[test,fast]", TORCH, TRITON)
    checks = (f"tests/interpreter/check_{name}.py" for name in ("interpreter", "gemm_values", "gemm_cases", "gemm_compile"))
    run(session, "pytest", *checks, *session.posargs)


@nox.session
def evals(session: nox.Session) -> None:
    """The embedded model from end to end: quantised, swapped, asked, paired, judged; `-- --data FOLDER` adds gsm8k and mmlu."""
    install(session, ".[evals,fast]", TORCH, "pytest>=8.2", "pytest-xdist>=3.6")
    run(session, "pytest", "-n", "2", *(f"tests/evals/check_{name}.py" for name in ("tasks", "checkpoint", "embedded")))
    local = "--data" in session.posargs  # the prompts of gsm8k and mmlu are long
    sizes = ("--limit", "12", "--texts", "8", "--fewshot", "0") if local else ("--limit", "200", "--texts", "16")
    run(session, "lowbit", "eval", "embedded", "--backend", "cpu", "--out", "reports/evals", *sizes, *session.posargs)


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
    """Time the references and the judge; `-- BACKEND [--against ...] [--tune]` times the kernels of a backend on its device."""
    install(session, ".[fast]")
    if session.posargs:
        run(session, "lowbit", "bench", *session.posargs)
    else:
        run(session, "python", "-m", "lowbit.conformance.bench")
