"""The xpu door without OpenCL: which device is taken and what that is called, what is refused, and what is declared.

What the kernels compute is judged by tests/xpu/check_xpu_kernels.py, in the session that installs an OpenCL runtime.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from lowbit.conformance import cli
from lowbit.conformance.backend import NOT_EXECUTED, Claim
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import outside_domain, parse_case, parse_problem
from lowbit.conformance.ops import ops
from lowbit.kernels import xpu
from lowbit.kernels.xpu import Xpu, backend
from lowbit.kernels.xpu_room import opencl
from lowbit.kernels.xpu_room.declare import LARGEST_GROUP, OPS, declare, refusal
from lowbit.kernels.xpu_room.opencl import OPTIONS, DeviceFault, Sight, opened, program_text, sight_of

NODE = ("/dev/dri/renderD128",)
GEMM = parse_problem("gemm_w4a8_int8/direct/m4n16k64g32/bf16", ops())


@dataclass(frozen=True, eq=False)
class Fake:
    """A device as pyopencl shows it: bits of CL_DEVICE_TYPE (2 CPU, 4 GPU) and of CL_DEVICE_SINGLE_FP_CONFIG (191: all but soft
    float)."""

    name: str
    type: int
    vendor: str
    single_fp_config: int = 191
    version: str = "OpenCL 3.0"
    driver_version: str = "1"

    @property
    def platform(self) -> Any:
        return SimpleNamespace(version="OpenCL 3.0 somewhere")


ARC, GEFORCE = Fake("Arc", 4, "Intel(R) Corporation"), Fake("GeForce", 4, "NVIDIA Corporation")
POCL, XEON = Fake("pthread", 2, "AuthenticAMD"), Fake("Xeon", 2, "Intel(R) Corporation")
BROKEN = Fake("unknown", 2, "AuthenticAMD")  # a CPU that its runtime cannot compile for


@pytest.mark.parametrize(("devices", "nodes", "argument", "name", "execution"), [
    ((POCL, ARC), NODE, "", "Arc", "executed"), ((ARC,), (), "", "Arc", "executed"), ((POCL,), (), "", "pthread", "emulated"),
    ((GEFORCE, XEON), (), "", "Xeon", "emulated"), ((POCL, ARC), NODE, "cpu", "pthread", "emulated"),
    ((POCL,), NODE, "cpu", "pthread", "emulated"), ((GEFORCE,), (), "", None, "compiled"), ((), (), "", None, "compiled"),
    ((ARC,), NODE, "cpu", None, "compiled"), ((BROKEN, POCL), (), "", "pthread", "emulated"),
    ((BROKEN,), (), "", None, "compiled"),
], ids=str)
def test_the_device_decides_what_is_said(
    devices: tuple[Any, ...], nodes: tuple[str, ...], argument: str, name: str | None, execution: str,
) -> None:
    found = Xpu(argument, query=lambda: sight_of(devices, nodes, lambda device: device is not BROKEN))
    assert (found.execution, getattr(found._device(), "name", None)) == (execution, name)
    said = found.describe()
    assert said["device"].startswith(name or "none")
    assert ("remains to be shown on silicon" in said) is (execution != "executed")


@pytest.mark.parametrize("devices", [(), (POCL,), (GEFORCE, POCL)], ids=len)
def test_a_gpu_that_opencl_does_not_offer_is_an_error(devices: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Xpu(query=lambda: sight_of(devices, NODE, lambda device: True))
    for ask in (lambda: broken.execution, broken.describe, lambda: broken.supports(GEMM)):
        with pytest.raises(DeviceFault, match="renderD128 is an Intel GPU, but no OpenCL platform offers it"):
            ask()
    monkeypatch.setattr(cli, "backend_names", lambda: ("xpu",))
    monkeypatch.setattr(cli, "find_backend", lambda name: broken)
    with pytest.raises(cli.Stop, match="cannot use its device"):
        cli._for_target("xpu")


@pytest.mark.parametrize(("config", "words"), [
    (0b110, "subnormals"), (0b101, "infinities and NaN"), (0b011, "rounding to nearest even"), (0, "subnormals, infinities"),
])
def test_a_device_without_ieee_values_is_refused(config: int, words: str) -> None:
    with pytest.raises(DeviceFault, match=f"Arc has binary32 without {words}"):
        opened(Fake("Arc", 4, "Intel", config))


def test_without_opencl_every_problem_is_refused_with_what_to_install() -> None:
    found = Xpu(query=lambda: Sight(absence=f"pyopencl does not import; {opencl.INSTALL}"))
    reason = found.supports(GEMM)
    assert reason is not None
    assert reason.startswith(f"{NOT_EXECUTED}: pyopencl does not import; install the wheel pyopencl and an OpenCL runtime")


def test_the_argument_is_cpu_or_nothing() -> None:
    assert (backend().argument, backend("cpu").argument) == ("", "cpu")
    with pytest.raises(ValueError, match="expected none, or cpu: --backend xpu:cpu"):
        backend("gpu")


def test_importing_the_door_loads_neither_opencl_nor_torch() -> None:
    program = "import sys, lowbit.kernels.xpu; print([name for name in ('pyopencl', 'torch') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(("sight", "words"), [
    (Sight(cpu=POCL), "gemm_w4a8_int8: emulated on pthread"), (Sight(gpu=ARC), "int4_pack: executed on Arc"),
    (Sight(absence="there is no OpenCL platform"), f"int8_quantize: {NOT_EXECUTED}: there is no OpenCL platform"),
], ids=("cpu", "gpu", "none"))
def test_the_program_says_per_op_where_it_is_computed(
    sight: Sight, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(xpu, "look", lambda: sight)
    monkeypatch.setattr(xpu, "backend", lambda: Xpu(query=lambda: sight))
    xpu.main()
    assert words in capsys.readouterr().out


# Domain and declaration ----------------------------------------------------------------------------------------------

TAKEN = {"int4_pack": ("compressed_tensors", "k_major", "b8")}  # of the others every variant


@pytest.mark.parametrize("op", OPS)
def test_it_takes_the_contracts_domain_and_no_more(op: str) -> None:
    record = ops()[op]
    problems = [parse_case(text, ops()).problem for text in record.edges]
    problems += [parse_problem(text, ops(), check=False) for text, _ in record.rejects]
    variants = TAKEN.get(op, record.variants)
    inside = [outside_domain(record, problem) is None and problem.variant in variants for problem in problems]
    assert set(inside) == {True, False}
    assert [refusal(problem, divides=True) is None for problem in problems] == inside


def test_what_no_kernel_computes_is_refused() -> None:
    other = parse_problem("gemm_int4/f32/m4n16k64r0/f16", ops())
    assert refusal(other, divides=True) == (
        "the xpu backend has no kernel for 'gemm_int4'; it computes gemm_w4a8_int8, int8_quantize, int4_pack")
    quantiser = parse_problem("int8_quantize/token/m4k64/bf16", ops())
    assert refusal(quantiser, divides=True) is None
    assert "does not round binary32 quotients" in str(refusal(quantiser, divides=False))
    assert refusal(GEMM, divides=False) is None


def test_the_sum_of_the_largest_group_fits_int32() -> None:
    """2^21 products of -128 and -8 are 2^31; eight fewer leave room."""
    assert LARGEST_GROUP * 128 * 8 == 2**31 - 8192
    text = f"gemm_w4a8_int8/direct/m1n8k{1 << 21}g{1 << 21}/bf16"
    assert "the sum of a group is an int32" in str(refusal(parse_problem(text, ops()), divides=True))


@pytest.mark.parametrize("text", [
    "gemm_w4a8_int8/direct/m4n16k64g32/bf16", "gemm_w4a8_int8/direct/m4n16k64g64/f16.bias",
    "gemm_w4a8_int8/viaf16/m4n16k64g32/bf16.bias", "gemm_w4a8_int8/viaf16/m4n16k64g32/f16",
])
def test_the_declared_program_is_the_contracts(text: str) -> None:
    problem = parse_problem(text, ops())
    declared = declare(problem)
    assert declared.claim is Claim.BIT_EXACT
    assert check_declaration(ops()[problem.op], problem, declared) == ("", "as the contract")


@pytest.mark.parametrize("file", sorted(set(opencl.KERNELS.values())))
def test_the_sources_keep_every_rounding(file: str) -> None:
    """Contraction is off in every program, and no option lets the compiler be fast instead of right."""
    assert program_text(file).count("#pragma OPENCL FP_CONTRACT OFF") == 1
    assert OPTIONS.split() == ["-cl-std=CL1.2", "-cl-fp32-correctly-rounded-divide-sqrt"]
    kernels = [name for name, of in opencl.KERNELS.items() if of == file]
    assert [name for name in kernels if f"{name}(" not in program_text(file)] == []
