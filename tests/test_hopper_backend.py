"""The cuda_hopper door and the hosts of its encodings and quantisers: selection, refusals, tactics, arguments, torch's operators.

No device is asked for and nothing is compiled. A launch is replaced by one that notes what the C function would be given; what
the kernels compute is judged on a device (tests/device, `nox -s cuda`).
"""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from lowbit.conformance import cli
from lowbit.conformance.backend import EXACT_BITS, NOT_EXECUTED, Problem
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import Role, make_problem, outside_domain, parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.selection import case_list
from lowbit.kernels import cuda_hopper
from lowbit.kernels.blackwell_room.device import Sight
from lowbit.kernels.cuda_hopper import CudaHopper, modules
from lowbit.kernels.hopper_room import device, encodings, gemm_w4a8, launch, quantisers, torch_ops
from lowbit.kernels.hopper_room.device import Device, DeviceFault
from lowbit.references.formats import container

H200 = Device(0, "NVIDIA H200", (9, 0))
H100 = Device(1, "NVIDIA H100", (9, 0))
B200 = Device(0, "NVIDIA B200", (10, 0))
L4 = Device(0, "NVIDIA L4", (8, 9))
BITWISE = (*encodings.OPS, *quantisers.OPS)


def door(*devices: Device, fault: str = "") -> CudaHopper:
    sight = Sight(devices, "" if devices else "torch 2.13.0 sees no CUDA device", fault)
    return CudaHopper(query=lambda: sight)


def problem_of(text: str) -> Problem:
    return parse_problem(text, ops())


# Selection -----------------------------------------------------------------------------------------------------------


def test_multiprocessors_are_those_of_the_device_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """114 of an H100 PCIe behind a device of another kind; 132, those of an H200, where there is none."""
    counts = {0: 148, 1: 114}
    cuda = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(multi_processor_count=counts[index]))
    monkeypatch.setattr(device, "import_module", lambda name: SimpleNamespace(cuda=cuda))
    for devices, count in (((B200, H100), 114), ((B200,), 132), ((), 132)):
        monkeypatch.setattr(device, "look", lambda devices=devices: Sight(devices))
        assert device.processors.__wrapped__() == count
    monkeypatch.setattr(device, "look", lambda: Sight(fault="it does not start"))
    with pytest.raises(DeviceFault, match="it does not start"):
        device.processors.__wrapped__()


@pytest.mark.parametrize(("devices", "execution", "where"), [
    ((), "compiled", "host"), ((B200,), "compiled", "host"), ((L4,), "compiled", "host"), ((H200,), "executed", "cuda:0"),
    ((B200, H100), "executed", "cuda:1"), ((H200, H100), "executed", "cuda:0"),
], ids=str)
def test_the_capability_decides_what_is_said(devices: tuple[Device, ...], execution: str, where: str) -> None:
    found = door(*devices)
    assert (found.execution, found.device) == (execution, where)


@pytest.mark.parametrize(("devices", "sentence"), [
    ((), f"{NOT_EXECUTED}: torch 2.13.0 sees no CUDA device"),
    ((B200, L4), f"{NOT_EXECUTED}: needs compute capability 9.0, found NVIDIA B200 (10.0), NVIDIA L4 (8.9)"),
], ids=("none", "others"))
def test_without_a_device_every_problem_is_refused_with_the_same_sentence(devices: tuple[Device, ...], sentence: str) -> None:
    for text in ("fp8_quantize/token/m4k64p0/bf16", "gemm_nvfp4/plain/m33n64k96r0/bf16"):
        assert door(*devices).supports(problem_of(text)) == sentence


def test_a_device_that_does_not_start_is_an_error() -> None:
    broken = door(fault="1 CUDA device(s) are visible and do not initialise: RuntimeError: no")
    problem = problem_of("scale_pack_e4m3/table8/n7/plain")
    with pytest.raises(DeviceFault, match="do not initialise"):
        _ = broken.execution
    with pytest.raises(DeviceFault, match="do not initialise"):
        _ = broken.device
    with pytest.raises(DeviceFault, match="do not initialise"):
        broken.supports(problem)


def test_what_it_says_of_itself() -> None:
    assert door(H200).describe()["device"] == "NVIDIA H200 (9.0)"
    about = door().describe()
    assert about["device"] == "none"
    assert about["torch"] == torch.__version__
    assert about["nvcc"].endswith("nvcc") or about["nvcc"].startswith("got no nvcc on PATH")


def test_an_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend 'cuda_hopper' takes no argument, got 'x'; write --backend cuda_hopper"):
        cuda_hopper.backend("x")
    assert cuda_hopper.backend().name == "cuda_hopper"


def test_certify_without_a_device_grants_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "door.py"
    program.write_text(
        "from lowbit.kernels.blackwell_room.device import Sight\nfrom lowbit.kernels.cuda_hopper import CudaHopper\n"
        "backend = CudaHopper(query=lambda: Sight(absence='no driver'))\n", encoding="utf-8",
    )
    arguments = ["certify", f"python:{program}:backend", "--level", "L1", "--ops", "scale_pack_e4m3"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert NOT_EXECUTED in " ".join((said.out + said.err).split())
    assert "granted" not in said.out.split("no level granted")[-1]


def test_the_door_loads_without_torch_and_without_a_compiler() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; import lowbit.kernels.cuda_hopper as door; found = door.backend(); "
        "assert found.query().absence or found.query().fault; door.modules(); door.units(); "
        "print([name for name in ('torch', 'triton', 'cutlass') if sys.modules.get(name)])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert answer.stdout.strip() == "[]"


# Ops and tactics -----------------------------------------------------------------------------------------------------


def test_each_op_has_one_module() -> None:
    listed = [op for module in dict.fromkeys(modules().values()) for op in module.OPS]
    assert sorted(listed) == sorted(modules())
    assert set(listed) == {
        "int4_encode", "int4_pack", "scale_pack_e4m3", "scale_fold", "fp8_convert_fnuz", "fp8_requantize", "fp8_quantize",
        "gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped", "gemm_w8a8_fp8",
    }


def test_a_module_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_hopper, "MODULES", (*cuda_hopper.MODULES, "absent"))
    with pytest.raises(ModuleNotFoundError, match="absent"):
        modules.__wrapped__()


def test_an_op_without_a_kernel_is_refused() -> None:
    said = door(H200).supports(problem_of("gemm_nvfp4/plain/m33n64k96r0/bf16"))
    assert said == f"cuda_hopper has no kernel for 'gemm_nvfp4'; it computes {', '.join(modules())}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_problems_outside_the_domain_are_refused(name: str) -> None:
    for text, _ in ops()[name].rejects:
        problem = parse_problem(text, ops(), check=False)
        assert outside_domain(ops()[name], problem) is not None
        assert door(H200).supports(problem) is not None


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_tactic_of_a_supported_problem_is_declared(name: str) -> None:
    subject, seen = door(H200), 0
    for problem in dict.fromkeys(item.case.problem for item in case_list(ops()[name])):
        if subject.supports(problem) is not None:
            continue
        tactics = subject.tactics(problem)
        assert len(set(tactics)) == len(tactics) > 0
        for tactic in tactics:
            declaration = subject.declare(problem, tactic)
            assert check_declaration(ops()[name], problem, declaration)[0] == ""
            assert subject.workspace(problem, tactic) >= 0
            assert name not in BITWISE or declaration is EXACT_BITS
        seen += 1
    assert seen > 0


@pytest.mark.parametrize("name", BITWISE)
def test_encodings_and_quantisers_take_the_whole_domain(name: str) -> None:
    problems = {item.case.problem for item in case_list(ops()[name])}
    assert [str(problem) for problem in problems if door(H200).supports(problem)] == []


@pytest.mark.parametrize("x", ["bf16", "f16", "f32"])
def test_a_row_fits_the_registers_of_its_block(x: str) -> None:
    lanes = 4 if x == "f32" else 8
    for m, k in itertools.product((1, 131, 1024, 70_000), (1, 17, 128, 4096, 12288, 16384, 36864, 65536, 65537, 1 << 20)):
        threads = quantisers.threads_of(m, k, x)
        fits = k <= 1024 * 8 * lanes
        assert (threads > 0) == fits
        assert threads % 32 == 0
        assert not fits or (threads <= 1024 and threads * 8 * lanes >= k)
        problem = make_problem(ops()["fp8_quantize"], "token", {"m": m, "k": k, "p": 0}, {"x": x})
        assert quantisers.tactics(problem) == (("registers", "two_pass") if fits else ("two_pass",))


def test_the_threads_that_were_measured_best() -> None:
    assert [quantisers.threads_of(m, 12288, "bf16") for m in (1, 512, 1024, 4096)] == [512, 512, 256, 256]
    assert [quantisers.threads_of(m, 36864, "bf16") for m in (1, 4096)] == [768, 768]


# Arguments of the C functions ----------------------------------------------------------------------------------------


@pytest.fixture(name="launched")
def _launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be launched: (C function, arguments)."""
    found: list[Any] = []

    def note(name: str, function: Any, like: Any, stream: Any, *arguments: Any) -> None:
        found.append((function, arguments))

    def named(source: str, name: str, signature: str, flags: Any = ()) -> str:
        assert (Path(encodings.__file__).parent / source).is_file()
        assert flags == ("-fmad=false",)
        found.append((name, signature))
        return name

    for module in (encodings, quantisers):
        monkeypatch.setattr(module, "check", lambda name, tensor: None)
        monkeypatch.setattr(module, "launch", note)
        monkeypatch.setattr(module, "entry", named)
    return found


def gapped(tensor: torch.Tensor, gap: int) -> torch.Tensor:
    """The same tensor with `gap` elements after each row."""
    wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + gap), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def c_functions() -> dict[str, list[str]]:
    """Exported functions of the .cu files -> kinds of their arguments: p, q or i."""
    found = {}
    kinds = {"int": "i", "long long": "q", "cudaStream_t": "p"}
    for source in ("encodings.cu", "quantisers.cu"):
        text = (Path(encodings.__file__).parent / source).read_text(encoding="utf-8")
        for part in text.split('extern "C" int ')[1:]:
            name, _, rest = part.partition("(")
            arguments = rest.partition(")")[0].split(",")
            found[name] = ["p" if "*" in one else kinds[" ".join(one.split()[:-1])] for one in arguments]
    return found


def test_signatures_are_those_of_the_sources() -> None:
    functions = c_functions()
    said = {
        value[0]: value[1] for module in (encodings, quantisers) for value in vars(module).values()
        if isinstance(value, tuple) and len(value) == 2 and str(value[0]).startswith("lowbit_")
    }
    assert {name: list(signature) for name, signature in said.items()} == functions
    assert len(functions) == 12


def test_an_error_of_an_earlier_launch_is_cleared_first() -> None:
    """Every function of the .cu files that asks for the last error has asked before its launch, too."""
    asked = 0
    for source in ("encodings.cu", "quantisers.cu", "gemm_w4a8_pack.cu"):
        text = (Path(encodings.__file__).parent / source).read_text(encoding="utf-8")
        for body in text.split("\n}\n"):
            before, last, _ = body.rpartition("cudaGetLastError()")
            if last:
                asked += 1
                assert "(void)cudaGetLastError();" in before.partition("<<<")[0], body[-300:]
    assert asked == 10


def test_rows_apart_are_given_with_their_distance(launched: list[Any]) -> None:
    q, encoded = gapped(torch.zeros(32, 48, dtype=torch.int32), 4), gapped(torch.zeros(48, 32, dtype=torch.int32), 8)
    assert encodings.int4_encode(q, encoded) == "int4_reorder"
    assert launched[-1] == ("lowbit_int4_reorder", (q.data_ptr(), 52, 0, encoded.data_ptr(), 40, 0, 1, 32, 384))
    q, encoded = torch.zeros(3, 16, 32, dtype=torch.int32), gapped(torch.zeros(3, 32, 16, dtype=torch.int32), 4)
    encodings.int4_encode(q, encoded)
    assert launched[-1] == ("lowbit_int4_reorder", (q.data_ptr(), 32, 512, encoded.data_ptr(), 20, 640, 3, 16, 256))
    words = gapped(torch.zeros(8, 4, dtype=torch.int32), 2)
    encodings.uint4b8_to_int4(words)
    assert launched[-1] == ("lowbit_map_codes", (words.data_ptr(), 24, words.data_ptr(), 24, 8, 16, 1))
    scales, group = gapped(torch.zeros(3, 4, dtype=torch.bfloat16), 1), gapped(torch.zeros(3, 4, dtype=torch.uint8), 2)
    channel = gapped(torch.zeros(3, 1), 3)
    encodings.scale_fold(scales, group, channel, recipe="vllm_native")
    addresses = (scales.data_ptr(), 5, group.data_ptr(), 6, channel.data_ptr(), 4)
    assert launched[-1] == ("lowbit_scale_fold", (*addresses, 3, 4, True))
    x, scales = gapped(torch.zeros(5, 256), 4), gapped(torch.zeros(5, 1), 3)
    codes = gapped(torch.zeros(7, 256, dtype=torch.uint8), 16)
    assert quantisers.fp8_quantize(x, codes, scales) == "fp8_quantize_token_registers"
    assert launched[-1] == (
        "lowbit_fp8_quantize_token",
        (x.data_ptr(), 260, 2, codes.data_ptr(), 272, scales.data_ptr(), 4, None, 5, 256, 7, 0, False, 32),
    )
    assert quantisers.fp8_quantize(x, codes, scales, tactic="two_pass") == "fp8_quantize_token_two_pass"
    assert launched[-1][1][-1] == 0


@pytest.mark.parametrize(("layout", "number", "offset", "shape"), [
    ("gptq", 1, 0, (5, 24)), ("k_major", 0, 0, (24, 5)), ("along_n", 2, 0, (40, 3)), ("awq", 3, 0, (40, 3)),
    ("nibble", 4, 0, (24, 20)), ("compressed_tensors", 0, 8, (24, 5)), ("zeros_v1", 2, 15, (40, 3)), ("zeros_v2", 2, 0, (40, 3)),
])
def test_layouts_of_int4_pack(
    launched: list[Any], layout: str, number: int, offset: int, shape: tuple[int, int]
) -> None:
    q = torch.zeros(24, 40, dtype=torch.uint8)
    packed = torch.zeros(shape, dtype=torch.uint8 if layout == "nibble" else torch.int32)
    encodings.int4_pack(q, packed, layout=layout)
    assert launched[-1] == ("lowbit_int4_pack", (q.data_ptr(), 40, packed.data_ptr(), shape[1], 24, 40, number, offset))


def test_one_scale_takes_its_scratch_from_the_caller(launched: list[Any]) -> None:
    x, q = torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 8, dtype=torch.uint8)
    scale, scratch = torch.ones(1), torch.zeros(16, dtype=torch.uint8)
    quantisers.fp8_quantize(x, q, scale, variant="tensor", recipe="vllm_native", fnuz=True, workspace=scratch)
    assert launched[-1][1][5:] == (scale.data_ptr(), None, scratch.data_ptr(), 4, 8, 4, 1, True)
    quantisers.fp8_quantize(x, q, None, variant="static", scale=scale)
    assert launched[-1][1][5:] == (None, scale.data_ptr(), None, 4, 8, 4, 0, False)
    problem = make_problem(ops()["fp8_quantize"], "tensor", {"m": 4, "k": 8, "p": 0})
    assert quantisers.workspace(problem, "default") == 16


@pytest.mark.parametrize("text", [
    "fp8_quantize/token/m4k64p9/f16.ub", "fp8_quantize/static/m4k64p0/bf16", "fp8_quantize/tensor/m4k64p0/f32",
    "fp8_quantize/block/m4k256p0/bf16.scaled_quantize", "fp8_quantize/tile/m128k128p0/bf16.deepgemm",
    "int4_encode/unified/e1n16k64/plain", "int4_encode/dense/e1n16k128/plain", "int4_encode/grouped/e2n16k256/plain",
    "int4_pack/awq/n8k16/uint4", "int4_pack/b8/n8k16/uint4", "scale_pack_e4m3/table8/n7/plain",
    "scale_fold/row/n3k256/vllm_native", "fp8_convert_fnuz/channel/n3k7/fnuz.static",
    "fp8_requantize/max_scale_f16/n9k5s3/fn", "fp8_requantize/channel/n9k5s3/fn",
])
def test_the_protocol_reaches_the_functions(launched: list[Any], text: str) -> None:
    """Every address that a C function is given is one of the problem's tensors, and every output is given."""
    problem, subject = problem_of(text), door(H200)
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    views = {
        tensor.name: SimpleNamespace(
            role=tensor.role, memory=torch.zeros(tensor.shape, dtype=signed[np.dtype(container(tensor.format)).itemsize])
        )
        for tensor in tensors_of(ops()[problem.op], problem)
    }
    room = SimpleNamespace(memory=torch.zeros(16, dtype=torch.uint8)) if subject.workspace(problem, "default") else None
    state = subject.prepare(problem, "default", {})
    given: Any = {name: view for name, view in views.items() if view.role is not Role.OUTPUT}
    outputs: Any = {name: view for name, view in views.items() if view.role is Role.OUTPUT}
    for tactic in subject.tactics(problem):
        assert subject.run(problem, tactic, state, subject.stage(problem, tactic, given), outputs, room, None)
    signature, addresses = "", set()
    for _, arguments in launched:
        if isinstance(arguments, str):
            signature = arguments
            continue
        assert len(arguments) == len(signature) - 1
        addresses |= {value for kind, value in zip(signature, arguments, strict=False) if kind == "p" and value is not None}
    written = {view.memory.data_ptr() for view in views.values() if view.role in (Role.OUTPUT, Role.INOUT)}
    known = {view.memory.data_ptr() for view in views.values()} | ({room.memory.data_ptr()} if room is not None else set())
    assert written <= addresses <= known


# Refusals of the functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"x": torch.zeros(4, 64, dtype=torch.float64)}, r"got x of torch\.float64, expected bfloat16, float16 or float32"),
    ({"variant": "row"}, r"got variant 'row', expected one of static, tensor, token, block, tile"),
    ({"recipe": "own"}, r"got recipe 'own', expected one of vllm, vllm_native, scaled_quantize, deepgemm"),
    ({"recipe": "deepgemm"}, r"the recipe does not have this variant"),
    ({"variant": "block"}, r"K must be a positive multiple of 128"),
    ({"scales": torch.zeros(4)}, r"got scales \(4,\), expected float32 \(4, 1\) for token, M = 4, K = 64"),
    ({"scales": torch.zeros(4, 1, dtype=torch.float64)}, r"got scales \(4, 1\), expected float32"),
    ({"q": torch.zeros(3, 64, dtype=torch.uint8)},
     r"got q torch\.uint8 \(3, 64\), expected one byte per code and at least \(4, 64\)"),
    ({"q": torch.zeros(4, 64)}, r"got q torch\.float32 \(4, 64\), expected one byte per code"),
    ({"variant": "static", "scales": None}, r"static got None, expected scale \[1\]"),
    ({"variant": "tensor", "scales": torch.zeros(1)}, r"tensor got None, expected 16 bytes of workspace"),
    ({"x": torch.zeros(64, 4).t()}, r"got x with 4 elements from column to column, expected 1"),
    ({"tactic": "two-pass"}, r"got tactic 'two-pass', expected one of registers, two_pass, or none"),
    ({"x": torch.zeros(4, 65537), "q": torch.zeros(4, 65537, dtype=torch.uint8), "tactic": "registers"},
     r"got tactic 'registers', expected one of two_pass, or none"),
    ({"variant": "tensor", "scales": torch.zeros(1), "workspace": torch.zeros(16, dtype=torch.uint8), "tactic": "two_pass"},
     r"got tactic 'two_pass', expected one of default, or none"),
    ({"variant": "static", "scales": None, "scale": torch.ones(1, dtype=torch.float64)}, r"got scale torch\.float64 \(1,\)"),
    ({"variant": "static", "scales": None, "scale": torch.ones(3)}, r"got scale torch\.float32 \(3,\), expected one float32"),
    ({"scale_ub": torch.ones(1, dtype=torch.float64)}, r"got scale_ub torch\.float64"),
    ({"scale_ub": torch.ones(3)}, r"got scale_ub torch\.float32 \(3,\)"),
    ({"variant": "tensor", "scales": torch.zeros(1), "workspace": torch.zeros(1, dtype=torch.uint8)},
     r"got a workspace of 1 bytes, expected 16 or more"),
    ({"variant": "tensor", "scales": torch.zeros(1), "workspace": torch.zeros(17, dtype=torch.uint8)[1:]},
     r"at a multiple of 16"),
    ({"variant": "tensor", "scales": torch.zeros(1), "workspace": torch.zeros(32, dtype=torch.uint8)[::2]}, r"contiguous"),
    ({"x": torch.zeros(4, 64, device="meta")}, r"got x on meta, expected cpu, where the output lies"),
    ({"scales": torch.zeros(4, 1, device="meta")}, r"got scales on meta, expected cpu"),
    ({"variant": "static", "scales": None, "scale": torch.ones(1, device="meta")}, r"got scale on meta, expected cpu"),
    ({"scale_ub": torch.ones(1, device="meta")}, r"got scale_ub on meta, expected cpu"),
    ({"variant": "tensor", "scales": torch.zeros(1), "workspace": torch.zeros(16, dtype=torch.uint8, device="meta")},
     r"got workspace on meta, expected cpu"),
    ({}, r"got a tensor on cpu, expected a CUDA device of capability 9\.0; move it there"),
], ids=lambda value: value if isinstance(value, str) else "-".join(value) or "cpu")
def test_fp8_quantize_refuses(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], sentence: str) -> None:
    monkeypatch.setattr(quantisers, "entry", lambda *_: pytest.fail("compiled before the device was looked at"))
    given: dict[str, Any] = {"x": torch.zeros(4, 64), "q": torch.zeros(4, 64, dtype=torch.uint8), "scales": torch.zeros(4, 1)}
    with pytest.raises(ValueError, match=f"fp8_quantize: .*{sentence}"):
        quantisers.fp8_quantize(**given | arguments)


BYTES, WORDS = torch.uint8, torch.int32


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: encodings.int4_encode(torch.zeros(1, 8, dtype=BYTES), torch.zeros(1, 8, dtype=BYTES)),
     r"int4_encode: got 1 x 16 codes, expected a multiple of 32"),
    (lambda: encodings.int4_encode(torch.zeros(8, 16, dtype=WORDS), torch.zeros(16, 8, dtype=WORDS)),
     r"int4_encode: got N = 8, K = 128, expected multiples of 16 and 128"),
    (lambda: encodings.int4_encode(torch.zeros(2, 16, 16, dtype=WORDS), torch.zeros(2, 16, 16, dtype=WORDS)),
     r"int4_encode: got N = 16, K = 128, expected multiples of 16 and 256"),
    (lambda: encodings.int4_encode(torch.zeros(16, 16, dtype=torch.int16), torch.zeros(16, 16, dtype=WORDS)),
     r"int4_encode: got q torch\.int16 \(16, 16\), expected uint8 \[N, K/2\], int32 \[N, K/8\] or int32 \[E, N, K/8\]"),
    (lambda: encodings.int4_encode(torch.zeros(32, 16, dtype=WORDS), torch.zeros(32, 16, dtype=WORDS)),
     r"int4_encode: got encoded torch\.int32 \(32, 16\) with 1 elements .* expected 4 byte\(s\) per element, \(16, 32\) and 1"),
    (lambda: encodings.int4_pack(torch.zeros(8, 12, dtype=BYTES), torch.zeros(8, 1, dtype=WORDS), layout="k_major"),
     r"int4_pack: got codes \(8, 12\) for k_major, expected a multiple of 8 along the packed axis"),
    (lambda: encodings.int4_pack(torch.zeros(8, 8, dtype=BYTES), torch.zeros(8, 1, dtype=WORDS), layout="own"),
     r"int4_pack: got layout 'own', expected one of gptq, k_major"),
    (lambda: encodings.uint4b8_to_int4(torch.zeros(8, 8, dtype=WORDS).t()[:, :4]),
     r"int4_pack: got words .* with 8 elements from column to column"),
    (lambda: encodings.scale_pack_e4m3(torch.zeros(0, dtype=BYTES), torch.zeros(0, 8, dtype=BYTES)),
     r"scale_pack_e4m3: got scales torch\.uint8 \(0,\), expected bytes \[N\], N > 0"),
    (lambda: encodings.scale_fold(torch.zeros(2, 3), torch.zeros(2, 3, dtype=BYTES), torch.zeros(2, 1)),
     r"scale_fold: got scales torch\.float32 \(2, 3\).* expected 2 byte\(s\) per element"),
    (lambda: encodings.scale_fold(torch.zeros(2, 3), torch.zeros(2, 3, dtype=BYTES), torch.zeros(2, 1), recipe="x"),
     r"scale_fold: got recipe 'x', expected vllm or vllm_native"),
    (lambda: encodings.fp8_requantize(
        torch.zeros(4, 4, dtype=BYTES), torch.zeros(2), torch.zeros(3, dtype=WORDS), torch.zeros(4, 4, dtype=BYTES),
        torch.zeros(1)),
     r"fp8_requantize: got widths torch\.int32 \(3,\).* expected 4 byte\(s\) per element, \(2,\) and 1"),
    (lambda: encodings.expand_scales(torch.zeros(2), torch.zeros(2, dtype=WORDS), torch.zeros(4)),
     r"fp8_requantize: got channel_scale torch\.float32 \(4,\).* expected 4 byte\(s\) per element, \(4, 1\) and 1"),
])
def test_encodings_refuse(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def _places() -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Functions of encodings, and arguments that only a missing device stops; the first is the output."""
    def of(*shape: int, dtype: torch.dtype = BYTES) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    f32 = torch.float32
    return {
        "unified": (encodings.int4_encode, {"encoded": of(2, 16), "q": of(2, 16)}),
        "dense": (encodings.int4_encode, {"encoded": of(16, 16, dtype=WORDS), "q": of(16, 16, dtype=WORDS)}),
        "pack": (partial(encodings.int4_pack, layout="nibble"), {"packed": of(2, 4), "q": of(2, 8)}),
        "scales": (encodings.scale_pack_e4m3, {"packed": of(2, 8), "scales": of(2)}),
        "fold": (encodings.scale_fold, {
            "channel_scale": of(2, 1, dtype=f32), "scales": of(2, 3, dtype=torch.bfloat16), "group_scale": of(2, 3)}),
        "convert": (encodings.fp8_convert_fnuz, {
            "w_out": of(2, 4), "w": of(2, 4), "weight_scale": of(1, dtype=f32), "weight_scale_out": of(1, dtype=f32),
            "input_scale": of(1, dtype=f32), "input_scale_out": of(1, dtype=f32)}),
        "requantize": (encodings.fp8_requantize, {
            "w_out": of(4, 4), "w": of(4, 4), "scales": of(2, dtype=f32), "widths": of(2, dtype=WORDS),
            "scale": of(1, dtype=f32)}),
        "expand": (encodings.expand_scales, {
            "channel_scale": of(4, 1, dtype=f32), "scales": of(2, dtype=f32), "widths": of(2, dtype=WORDS)}),
    }


@pytest.mark.parametrize(("case", "name"), [
    (case, name) for case, (_, given) in _places().items() for name in list(given)[1:]
])
def test_encodings_refuse_a_tensor_of_another_device(monkeypatch: pytest.MonkeyPatch, case: str, name: str) -> None:
    monkeypatch.setattr(encodings, "entry", lambda *_: pytest.fail("compiled before the device was looked at"))
    function, given = _places()[case]
    with pytest.raises(ValueError, match="got a tensor on cpu, expected a CUDA device"):
        function(**given)
    with pytest.raises(ValueError, match=f": got {name} on meta, expected cpu, where the output lies; move it there"):
        function(**given | {name: given[name].to("meta")})


def test_a_device_of_another_capability_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = SimpleNamespace(device=SimpleNamespace(type="cuda", index=3, __str__=lambda: "cuda:3"))
    monkeypatch.setattr(device, "_capability", lambda index: (8, 9) if index == 3 else (9, 0))
    with pytest.raises(ValueError, match=r"f: got .* of compute capability 8\.9, expected 9\.0 \(H100, H200\), for which alone"):
        device.check("f", tensor)
    monkeypatch.setattr(device, "_capability", lambda index: (9, 0))
    device.check("f", tensor)


class Runtime:
    """Enough of torch.cuda for a launch: which device is current, which stream, and words for errors."""

    def __init__(self) -> None:
        self.current = 0
        self.entered: list[int] = []
        self.cudaError = int

    def current_device(self) -> int:
        return self.current

    def current_stream(self, where: Any) -> Any:
        return SimpleNamespace(cuda_stream=100 + where.index)

    def device(self, where: Any) -> Any:
        self.entered.append(where.index)
        return nullcontext()

    def cudart(self) -> Runtime:
        return self

    def cudaGetErrorString(self, code: int) -> str:
        return f"word {code}"


def test_a_launch_goes_to_the_device_and_stream_of_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, given = Runtime(), []
    for module in (launch, device):
        monkeypatch.setattr(module, "import_module", lambda name: SimpleNamespace(cuda=runtime))
    monkeypatch.setattr(device, "_capability", lambda index: (9, 0))
    tensors = [SimpleNamespace(device=SimpleNamespace(type="cuda", index=index)) for index in (0, 1)]

    def function(*arguments: int) -> int:
        given.append(arguments)
        return arguments[0]

    launch.launch("f", function, tensors[0], None, 0, 7)
    launch.launch("f", function, tensors[1], None, 0, 8)
    launch.launch("f", function, tensors[0], SimpleNamespace(cuda_stream=55), 0, 9)
    assert given == [(0, 7, 100), (0, 8, 101), (0, 9, 55)]
    assert runtime.entered == [1]
    with pytest.raises(launch.LaunchError, match=r"f: the CUDA runtime reports error 9, word 9"):
        launch.launch("f", function, tensors[0], None, 9)


# Operators of torch --------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def shapes_of(text: str) -> dict[str, tuple[int, ...]]:
    tensors = tensors_of(ops()["fp8_quantize"], problem_of(text))
    return {tensor.name: tensor.shape for tensor in tensors if tensor.role is Role.OUTPUT}


@pytest.mark.parametrize("text", [
    "fp8_quantize/token/m5k256p0/bf16", "fp8_quantize/token/m5k256p9/f16", "fp8_quantize/tensor/m5k256p0/f32.fnuz",
    "fp8_quantize/block/m5k256p0/bf16", "fp8_quantize/tile/m128k256p0/bf16.deepgemm",
])
def test_traced_quantisers_have_the_contracts_shapes(text: str) -> None:
    problem, wanted = problem_of(text), shapes_of(text)
    with FakeTensorMode():
        x = torch.empty(problem.dim("m"), problem.dim("k"), dtype=DTYPES[problem.option("x")], device="cuda")
        fnuz = problem.option("format") == "fnuz"
        q, scales = torch.ops.lowbit.fp8_quantize(
            x, problem.variant, problem.option("recipe"), fnuz=fnuz, rows=problem.dim("p"))
    assert (tuple(q.shape), tuple(scales.shape)) == (wanted["q"], wanted["scales"])
    assert q.dtype == (torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)
    assert scales.dtype == torch.float32


@pytest.mark.parametrize("text", [
    "int4_encode/unified/e1n16k64/plain", "int4_encode/dense/e1n16k128/plain", "int4_encode/grouped/e2n16k256/plain",
    *(f"int4_pack/{layout}/n16k24/{'int8' if layout == 'compressed_tensors' else 'uint4'}" for layout in encodings.LAYOUTS),
    "int4_pack/compressed_tensors/n3k13/int8", "scale_pack_e4m3/table8/n7/plain", "scale_fold/row/n3k256/vllm",
    "fp8_requantize/max_scale/n9k5s3/fn", "fp8_requantize/channel/n9k5s3/fn",
])
def test_traced_encodings_have_the_contracts_shapes(text: str) -> None:
    problem = problem_of(text)
    tensors = {tensor.name: tensor for tensor in tensors_of(ops()[problem.op], problem)}
    dtypes = {1: torch.uint8, 2: torch.bfloat16, 4: torch.int32}
    with FakeTensorMode():
        given = {
            name: torch.empty(tensor.shape, device="cuda", dtype=torch.float32 if tensor.format.name == "f32"
                              else dtypes[np.dtype(container(tensor.format)).itemsize])
            for name, tensor in tensors.items() if tensor.role is not Role.OUTPUT
        }
        lowbit = torch.ops.lowbit
        found = {
            "int4_encode": lambda: lowbit.int4_encode(given["q"]),
            "int4_pack": lambda: lowbit.int4_pack(given["q"], problem.variant),
            "scale_pack_e4m3": lambda: lowbit.scale_pack_e4m3(given["scales"]),
            "scale_fold": lambda: lowbit.scale_fold(given["scales"]),
            "fp8_requantize": lambda: lowbit.expand_scales(given["scales"], given["widths"], 9) if problem.variant == "channel"
            else lowbit.fp8_requantize(given["w"], given["scales"], given["widths"]),
        }[problem.op]()
    wanted = [tensor.shape for tensor in tensors.values() if tensor.role is Role.OUTPUT]
    assert [tuple(one.shape) for one in (found if isinstance(found, tuple) else (found,))] == wanted


def test_traced_products_have_the_contracts_shapes() -> None:
    def of(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    lowbit, f32 = torch.ops.lowbit, torch.float32
    with FakeTensorMode():
        packed = lowbit.pack_w4a8(of(2, 192, 512), of(2, 192, 4))
        assert packed.dtype == torch.uint8
        grouped = lowbit.gemm_w4a8_fp8(
            of(5, 512), packed, of(5, dtype=f32), of(2, 192, dtype=f32), 128, counts=of(2, dtype=WORDS))
        assert (tuple(grouped.shape), grouped.dtype) == ((5, 192), torch.bfloat16)
        one = lowbit.gemm_w4a8_fp8(
            of(0, 512), packed, of(0, dtype=f32), of(192, dtype=f32), 64, variant="exact", out_dtype=torch.float16)
        assert (tuple(one.shape), one.dtype) == ((0, 192), torch.float16)
        plain = lowbit.gemm_w8a8_fp8(of(5, 64), of(24, 64), of(5, dtype=f32), of(24, dtype=f32), out_dtype=f32)
        assert (tuple(plain.shape), plain.dtype) == ((5, 24), f32)
        blocks = lowbit.gemm_w8a8_fp8_block(of(5, 256), of(24, 256), of(5, 2, dtype=f32), of(1, 2, dtype=f32))
        assert (tuple(blocks.shape), blocks.dtype) == ((5, 24), torch.bfloat16)


def test_operators_refuse_what_the_functions_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as torch calls them on a device; nothing is compiled or launched."""
    monkeypatch.setattr(gemm_w4a8, "_kernel", lambda *_: pytest.fail("compiled before the device was looked at"))
    x = torch.zeros(4, 128)
    with pytest.raises(ValueError, match=r"fp8_quantize: got variant 'row', expected one of token, block, tile, tensor; static"):
        torch_ops._quantise(x, "row")
    codes = torch.zeros(16, 128, dtype=BYTES)
    with pytest.raises(ValueError, match="pack_weights: got scales"):
        torch_ops._pack_weights(codes, codes[:, :0])
    token, channel = torch.ones(4), torch.ones(16)
    a, packed = torch.zeros(4, 128, dtype=BYTES), torch.zeros(4160, dtype=BYTES)  # 64 x 128 codes and 64 scales
    with pytest.raises(ValueError, match="got a tensor on cpu, expected a CUDA device"):
        torch_ops._multiply(a, packed, token, channel, 128)
    for given in ((a, packed[:-1], token, channel, 128), (a, packed, token, channel, 64),
                  (torch.zeros(4, 256, dtype=BYTES), packed, token, channel, 128), (a, packed, token, torch.ones(72), 128)):
        with pytest.raises(ValueError, match="gemm_w4a8_fp8: got packed weights of"):
            torch_ops._multiply(*given)
    with pytest.raises(ValueError, match=r"gemm_w4a8_fp8: got 1 expert.*N = 12,"):
        torch_ops._multiply(a, packed, token, torch.ones(12), 128)
    with pytest.raises(ValueError, match="gemm_w4a8_fp8: got variant 'exakt'"):
        torch_ops._multiply(a, packed, token, channel, 128, variant="exakt")


def test_operators_are_traced_whole() -> None:
    """torch.compile sees no break: every operator is one node of one graph."""
    def function(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scales = torch.ops.lowbit.fp8_quantize(x + 1)
        torch.ops.lowbit.uint4b8_to_int4_(words)
        return q, scales * 2, torch.ops.lowbit.int4_encode(words), torch.ops.lowbit.fp8_quantize_static(x, scale)

    with FakeTensorMode():
        x = torch.empty(16, 128, device="cuda", dtype=torch.bfloat16)
        words, scale = torch.empty(16, 16, dtype=torch.int32, device="cuda"), torch.empty(1, device="cuda")
        graph, _ = torch._dynamo.export(function)(x, words, scale)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if target.startswith("lowbit.")] == [
        "lowbit.fp8_quantize", "lowbit.uint4b8_to_int4_", "lowbit.int4_encode", "lowbit.fp8_quantize_static"]


def test_an_operator_stands_for_each_public_function() -> None:
    public = {"fp8_quantize", "int4_encode", "int4_pack", "scale_pack_e4m3", "scale_fold", "fp8_requantize", "expand_scales"}
    assert public | {"fp8_quantize_static", "uint4b8_to_int4_"} <= set(torch_ops.NAMES)
    assert len(torch_ops.NAMES) == len(set(torch_ops.NAMES))


def test_no_framework_is_imported_where_a_door_loads() -> None:
    """Only torch_ops imports torch at its top; the other modules of the room that this file tests ask for it inside functions."""
    for module in (encodings, quantisers, launch, device):
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert "torch" not in names
