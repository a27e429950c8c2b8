"""The rocm door without Triton: which chip is taken and what that is called, the dispatch, and the page that maps its source.

What the kernels compute is judged by tests/rocm/check_kernels.py, what they compile to by check_compiled.py, in `nox -s rocm`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowbit.conformance import cli
from lowbit.conformance.backend import DATAPATHS, NOT_EXECUTED
from lowbit.conformance.op import outside_domain, parse_case, parse_problem
from lowbit.conformance.ops import ops
from lowbit.kernels import rocm
from lowbit.kernels.rocm import OPS, Rocm, backend
from lowbit.kernels.rocm_room import devices
from lowbit.kernels.rocm_room.devices import CHIPS, DeviceFault, Sight, emulated, look_through
from lowbit.kernels.rocm_room.dispatch import RULES, per_row_product
from lowbit.references.formats import E4M3FN, E4M3FNUZ

ROOM = Path(__file__).with_name("rocm")
GEMM = parse_problem("gemm_w8a8_fp8/scaled/m1n64k128/bf16.fnuz.atensor.wtensor.bias", ops())


def beside(name: str) -> ModuleType:
    """A module of tests/rocm, which pytest does not collect."""
    spec = importlib.util.spec_from_file_location(f"rocm_{name}", ROOM / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DISPATCH: dict[str, Any] = beside("dispatch_cases").CASES
DOCUMENTED: Any = beside("documented")


# Selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sight", "chip", "execution", "machine", "device"), [
    (Sight(chip="gfx942"), "", "executed", "gfx942", "hip:0"), (Sight(chip="gfx950"), "", "executed", "gfx950", "hip:0"),
    (Sight(chip="gfx950"), "gfx950", "executed", "gfx950", "hip:0"),
    (Sight(chip="gfx942"), "gfx950", "compiled", "gfx950", "host"),
    (Sight(interpreter=True), "", "emulated", "gfx942, interpreted", "host"),
    (Sight(interpreter=True), "gfx950", "emulated", "gfx950, interpreted", "host"),
    (Sight(absence="torch is not installed"), "", "compiled", "gfx942", "host"),
], ids=str)
def test_the_chip_decides_what_is_said(sight: Sight, chip: str, execution: str, machine: str, device: str) -> None:
    found = Rocm(chip, query=lambda: sight)
    assert (found.execution, found.device, found._machine().name) == (execution, device, machine)
    said = found.describe()
    assert said["chip"] == machine
    assert ("remains to be shown on silicon" in said) is (execution != "executed")


def test_a_chip_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Rocm(query=lambda: look_through(None, ("gfx942",)))
    for ask in (lambda: broken.execution, lambda: broken.device, broken.describe, lambda: broken.supports(GEMM)):
        with pytest.raises(DeviceFault, match="gfx942 is visible to the driver, but torch is not installed; install"):
            ask()
    monkeypatch.setattr(cli, "backend_names", lambda: ("rocm",))
    monkeypatch.setattr(cli, "find_backend", lambda name: broken)
    with pytest.raises(cli.Stop, match="cannot use its device"):
        cli._for_target("rocm")


def fake_torch(hip: str | None = "7.2", available: bool = True, arch: str = "gfx942:sramecc+:xnack-") -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: available, get_device_properties=lambda index: SimpleNamespace(gcnArchName=arch))
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(hip=hip), cuda=cuda)


@pytest.mark.parametrize(("torch_module", "listed", "sight"), [
    (None, (), Sight(absence="torch is not installed and the driver lists no gfx942 or gfx950")),
    (fake_torch(hip=None), (), Sight(absence="torch 2.13.0 is built without ROCm and the driver lists no gfx942 or gfx950")),
    (fake_torch(hip=None), ("gfx950",),
     Sight(fault="gfx950 is visible to the driver, but torch 2.13.0 is built without ROCm; install a ROCm build of torch")),
    (fake_torch(available=False), (), Sight(absence="torch 2.13.0 sees no device")),
    (fake_torch(available=False), ("gfx942",), Sight(fault="gfx942 is visible to the driver, but torch 2.13.0 sees no device")),
    (fake_torch(), ("gfx942",), Sight(chip="gfx942")), (fake_torch(arch="gfx950"), (), Sight(chip="gfx950")),
    (fake_torch(arch="gfx1100"), (), Sight(absence="needs gfx942 or gfx950, found gfx1100")),
], ids=("no_torch", "no_rocm", "no_rocm_but_a_chip", "no_device", "no_device_but_a_chip", "gfx942", "gfx950", "gfx1100"))
def test_what_torch_and_the_driver_show(torch_module: Any, listed: tuple[str, ...], sight: Sight) -> None:
    assert look_through(torch_module, listed) == sight


def test_the_drivers_list_is_read(tmp_path: Path) -> None:
    """Node 0 is a CPU, node 1 a chip of version 9.4.2, node 2 one that no kernel here is compiled for."""
    for node, version in enumerate((0, 90402, 110000)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"simd_count 16\ngfx_target_version {version}\n", encoding="ascii")
    assert devices._listed(tmp_path) == ("gfx942",)
    assert devices._listed(tmp_path / "none") == ()


def test_a_folder_called_triton_is_not_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("triton", "torch"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(devices, "_TOPOLOGY", tmp_path / "none")
    monkeypatch.setattr(devices, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    devices.look.cache_clear()
    assert devices.look() == Sight(absence="triton and torch cannot be imported here")
    devices.look.cache_clear()


def test_gfx950_refuses_the_tiles_that_do_not_fit_it() -> None:
    found = Rocm(query=lambda: Sight(chip="gfx950"))
    wide = parse_problem("gemm_w4a16/sym/m65n64k128g32/bf16", ops())
    assert "gfx950 takes at most 64 rows, got M = 65" in str(found.supports(wide))
    narrow = parse_problem("gemm_w4a16/sym/m64n64k128g32/bf16", ops())
    for chip, problem in (("gfx950", narrow), ("gfx942", wide)):
        assert devices.too_large(problem, CHIPS[chip].machine) is None
    assert devices.too_large(wide, emulated("gfx950")) is None


def test_without_a_chip_every_problem_is_refused_with_what_to_try() -> None:
    found = Rocm(query=lambda: Sight(absence="torch sees no device; TRITON_INTERPRET=1 runs the kernels on the CPU"))
    assert found.supports(GEMM) == f"{NOT_EXECUTED}: torch sees no device; TRITON_INTERPRET=1 runs the kernels on the CPU"
    other = Rocm("gfx950", query=lambda: Sight(chip="gfx942"))
    assert other.supports(GEMM) == f"{NOT_EXECUTED}: asked for gfx950, found gfx942"
    nvfp4 = parse_problem("gemm_nvfp4/plain/m4n16k64r0/bf16", ops())
    assert "has no kernel for 'gemm_nvfp4'" in str(found.supports(nvfp4))


@pytest.mark.parametrize(("argument", "fields"), [
    (None, ("", "")), ("gfx942", ("gfx942", "")), ("gfx950,mutant=tail_skipped", ("gfx950", "tail_skipped")),
    (",mutant=tail_skipped", ("", "tail_skipped")),
])
def test_the_argument_names_chip_and_fault(argument: str | None, fields: tuple[str, str]) -> None:
    found = backend(argument)
    assert (found.chip, found.mutant) == fields


@pytest.mark.parametrize("argument", ["gfx90a", "gfx942,fault=x", "gfx942,mutant=", "mutant=tail_skipped"])
def test_other_arguments_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="expected gfx942 or gfx950"):
        backend(argument)


def test_importing_the_door_loads_no_framework() -> None:
    program = "import sys, lowbit.kernels.rocm; print([name for name in ('triton', 'torch') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(("sight", "words"), [
    (Sight(interpreter=True), "fp8_quantize for gfx950: emulated by Triton's CPU interpreter"),
    (Sight(chip="gfx942"), "gemm_w8a8_fp8 for gfx942: executed on gfx942"),
    (Sight(chip="gfx942"), f"gemm_w8a8_fp8 for gfx950: {NOT_EXECUTED}: asked for gfx950, found gfx942"),
    (Sight(absence="nothing"), f"gemm_w4a16 for gfx942: {NOT_EXECUTED}: nothing"), (Sight(fault="broken"), "gfx942: broken"),
], ids=str)
def test_the_program_says_per_chip_and_op_where_it_is_computed(
    sight: Sight, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rocm, "Rocm", lambda chip: Rocm(chip, query=lambda: sight))
    rocm.main()
    assert words in capsys.readouterr().out


def test_the_records_name_datapaths_that_take_their_operands() -> None:
    for name, chip in CHIPS.items():
        machine, own = chip.machine, E4M3FNUZ if chip.machine.fnuz else E4M3FN
        assert own in DATAPATHS[machine.datapaths["fp8"]].operands, name
        assert (machine.native, emulated(name).native) == (True, False)
        assert emulated(name).fnuz is machine.fnuz
        assert set(machine.datapaths) == set(emulated(name).datapaths)
    assert [name for name, chip in CHIPS.items() if chip.machine.fnuz] == ["gfx942"]


# Dispatch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(DISPATCH))
def test_the_dispatch(case: str) -> None:
    DISPATCH[case]()


def test_the_dispatch_ends_in_a_rule_without_needs() -> None:
    assert RULES[-1][1] == {}


def test_a_version_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one that begins MAJOR"):
        per_row_product(rocm=True, torch_version="nightly", capability=94)


# The page ------------------------------------------------------------------------------------------------------------

BRANCHES: dict[str, tuple[str, ...]] = {  # public name of vLLM's module -> its branches, as the page calls them
    "CUTLASS_FP8_SUPPORTED": ("asked once, when imported",),
    "CUTLASS_BLOCK_FP8_SUPPORTED": ("asked once, when imported",),
    "TORCH_DEVICE_IDENTITY": ("scales of one for a product without scales",),
    "USE_ROWWISE_TORCH_SCALED_MM": ("ROCm, torch 2.7, capability 9.4; versions compared as text",),
    "Fp8LinearOp.__init__": ("`pad_output` given, or by the compilation level", "17 rows, but not on ROCm"),
    "Fp8LinearOp.apply": (
        "input of any rank becomes a matrix", "`out_dtype` absent: the format of the input",
        "`use_per_token_if_dynamic` absent: that of the layer", "CUTLASS: fp8 input is refused",
        "CUTLASS: quantise with `input_scale_ub`", "otherwise `input_scale_ub` is dropped", "otherwise quantise, static scale",
        "otherwise quantise, dynamic scale per tensor", "otherwise quantise, dynamic scale per token",
        "`num_token_padding`: rows beyond the input, there uninitialised", "`num_token_padding`, static scale",
        "`num_token_padding`, scale per token", "input already fp8: passes with its scale",
        "one weight scale or many, one activation scale or many",
    ),
    "all_close_1d": ("shards of one scale, there to a tolerance",),
    "convert_to_channelwise": ("the scale of each shard over its rows", "and a product with it"),
    "cutlass_block_fp8_supported": ("off CUDA; no capability; by capability and version",),
    "cutlass_fp8_supported": ("off CUDA; no capability; by capability and version",),
    "cutlass_group_gemm_supported": ("off CUDA; no capability; by capability and version",),
    "cutlass_w8a8_scaled_mm": ("one fused kernel, bias with one rounding",),
    "dispatch_w8a8_scaled_mm": (
        "CUTLASS", "two scalars on ROCm", "two scalars elsewhere", "two vectors, per token, where torch has it",
        "everything else",
    ),
    "maybe_create_device_identity": ("made at first use",),
    "normalize_e4m3fn_to_e4m3fnuz": (
        "byte 0x80 becomes 0, weight scale doubled", "a static input scale doubled, too", "no input scale",
        "weights of another format are refused; here: converted once, never twice",
    ),
    "per_tensor_dequantize": ("codes to binary16, times the scale in binary16",),
    "requantize_with_max_scale": (
        "shards apart: requantised under the largest scale", "last scale never filled: codes stay", "the sentinel itself",
        "from checkpoint to product", "from a fused checkpoint to product",
    ),
    "rocm_per_tensor_w8a8_scaled_mm": (
        "one row, K in sixteens, MI300: wvSplitKQ; here up to four rows", "wvSplitKQ, which there loses the bias",
        "wvSplitKQ over a long K", "wvSplitKQ without bias", "the switch is off",
        "more rows: a product with two scalars and the bias", "rows that padded are cut, the rank restored",
    ),
    "sparse_cutlass_supported": ("off CUDA; no capability; by capability and version",),
    "torch_channelwise_w8a8_scaled_mm": (
        "a product in binary32 without scales", "then both vectors, in binary32", "with bias, added in binary32",
        "one activation scale, a weight scale per row", "older torch returns a tuple",
        "rows and their scales that padded are cut",
    ),
    "torch_per_tensor_w8a8_scaled_mm": (
        "two scalars", "older torch returns a tuple", "rows that padded are cut, the rank restored",
    ),
    "torch_per_token_w8a8_scaled_mm": ("two vectors and the bias in one product", "rows that padded are cut, the rank restored"),
}


def linear_ids() -> set[str]:
    """Ids of tests/rocm/linear_cases.py, whose import needs Triton."""
    return set(re.findall(r'^@case\("([^"]+)"\)$', (ROOM / "linear_cases.py").read_text(encoding="utf-8"), re.MULTILINE))


def exists(case: str) -> bool:
    """Whether an id of the page is a case that is run: of the contract and in its domain, or of a table of tests/rocm."""
    family = case.partition("/")[0]
    if family in ("dispatch", "linear"):
        return case in DISPATCH or case in linear_ids()
    try:
        problem = parse_case(case, ops()).problem
    except ValueError:
        return False
    return family in OPS and outside_domain(ops()[family], problem) is None


def complaints(rows: list[Any]) -> list[str]:
    """What is wrong with the table, one sentence each."""
    found = [f"an empty cell beside {row.source!r}" for row in rows if not all((row.source, row.branch, row.here, row.case))]
    found += [f"{row.case} is no case" for row in rows if not exists(row.case)]
    wanted = Counter((name, branch) for name, branches in BRANCHES.items() for branch in branches)
    there = Counter((row.source, row.branch) for row in rows)
    found += [f"{name} has no row for: {branch}" for name, branch in (wanted - there)]
    return found + [f"a row too many, {name}: {branch}" for name, branch in (there - wanted)]


def test_every_branch_of_the_source_has_a_case() -> None:
    rows = DOCUMENTED.rows()
    assert complaints(rows) == []
    assert set(DISPATCH) | linear_ids() <= {row.case for row in rows}


def test_what_the_page_names_here_is_there() -> None:
    """Every `module.name` of the third column is defined in that module."""
    folders = [Path(str(devices.__file__)).parent, Path(str(devices.__file__)).parents[1] / "triton_room"]
    for row in DOCUMENTED.rows():
        for module, name in re.findall(r"`(\w+)\.(\w+)`", row.here):
            (file,) = (folder / f"{module}.py" for folder in folders if (folder / f"{module}.py").is_file())
            tree = ast.parse(file.read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert name in defined, f"{module}.{name}"


@pytest.mark.parametrize(("text", "other", "words"), [
    (" | dispatch/per_row |", " |  |", "an empty cell beside 'USE_ROWWISE_TORCH_SCALED_MM'"),
    ("linear/scale_ub", "linear/scale_lb", "linear/scale_lb is no case"),
    ("fp8_convert_fnuz/tensor/n16k64/fnuz/all/s0", "fp8_convert_fnuz/tensor/n0k64/fnuz/all/s0", "is no case"),
    ("gemm_w8a8_fp8/scaled/m5n72k128/bf16.fnuz.bias/normal/s8", "gemm_w8a8_fp9/scaled/m5n72k128/bf16/normal/s8", "is no case"),
    ("| `all_close_1d` |", "| `all_close_2d` |", "all_close_1d has no row for: shards of one scale"),
    ("| two scalars elsewhere |", "| two scalars on ROCm |", "a row too many, dispatch_w8a8_scaled_mm: two scalars on ROCm"),
])
def test_a_page_with_a_gap_is_refused(text: str, other: str, words: str) -> None:
    page = DOCUMENTED.PAGE.read_text(encoding="utf-8")
    assert text in page
    assert any(words in sentence for sentence in complaints(DOCUMENTED.rows(page.replace(text, other, 1))))


def test_no_row_of_the_page_can_go_unnoticed() -> None:
    rows = DOCUMENTED.rows()
    for i, row in enumerate(rows):
        assert complaints([*rows[:i], *rows[i + 1:]]) == [f"{row.source} has no row for: {row.branch}"]
