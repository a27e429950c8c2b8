"""The cuda_blackwell door: which device selects it, what it refuses, what it declares, and that it packs what it was given.

No device is asked for. The launch is replaced by one that reads the packed operands back, by references.layouts, and emulates the
declared program on them: bit for bit what the same program gives on the operands of the case.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.conformance import cli
from lowbit.conformance.backend import NOT_EXECUTED, Declaration, Problem, TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Operands, Tensor
from lowbit.conformance.op import Role, outside_domain, parse_case, parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels import cuda_blackwell
from lowbit.kernels.blackwell_room import launch as room
from lowbit.kernels.blackwell_room.declare import TRITON, declaration, in_one_cast
from lowbit.kernels.blackwell_room.device import Device, DeviceFault, Sight, look_through
from lowbit.kernels.blackwell_room.schedule import CONFIGS
from lowbit.kernels.cuda_blackwell import CudaBlackwell
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Join, Start, Step, StepKind
from lowbit.references.formats import BF16, F16, F32, Format, container, decode
from lowbit.references.interpret import emulate
from lowbit.references.layouts import LAYOUTS, unpack
from lowbit.references.rounding import Overflow, Rounding, encode

OP = ops()["gemm_nvfp4"]
B200 = Device(0, "NVIDIA B200", (10, 0))
B300 = Device(1, "NVIDIA B300", (10, 3))
H200 = Device(0, "NVIDIA H200", (9, 0))
RTX = Device(0, "NVIDIA RTX PRO 6000", (12, 0))
FORMATS: dict[str, Format] = {"f16": F16, "bf16": BF16}
Array = npt.NDArray[Any]


def door(*devices: Device, fault: str = "", launch: Any = None) -> CudaBlackwell:
    sight = Sight(devices, "" if devices else "torch 2.13.0 sees no CUDA device", fault)
    return CudaBlackwell(query=lambda: sight, **({} if launch is None else {"launch": launch}))


def problem_of(text: str) -> Problem:
    return parse_problem(text, ops())


PLAIN = problem_of("gemm_nvfp4/plain/m33n64k96r0/bf16")
SVDQUANT = problem_of("gemm_nvfp4/svdquant/m33n64k256r32/f16.lora.bias")


# Selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "execution", "device"), [
    ((), "compiled", "host"), ((H200,), "compiled", "host"), ((RTX,), "compiled", "host"), ((B200,), "executed", "cuda:0"),
    ((B300,), "executed", "cuda:1"), ((H200, B300), "executed", "cuda:1"), ((B200, B300), "executed", "cuda:0"),
], ids=str)
def test_the_capability_decides_what_is_said(devices: tuple[Device, ...], execution: str, device: str) -> None:
    found = door(*devices)
    assert (found.execution, found.device) == (execution, device)


@dataclass(frozen=True)
class Other:
    """A backend of the same target for another capability, as the Hopper kernels are."""

    query: Any
    name: str = "cuda_other"
    target: str = "cuda"

    @property
    def execution(self) -> str:
        return "executed" if any(device.capability[0] == 9 for device in self.query().devices) else "compiled"


@pytest.mark.parametrize(("devices", "selected"), [
    ((B200,), ("cuda_blackwell",)), ((B300,), ("cuda_blackwell",)), ((H200,), ("cuda_other",)),
    ((H200, B300), ("cuda_blackwell", "cuda_other")), ((), ("cuda_blackwell", "cuda_other")),
], ids=str)
def test_certify_selects_by_capability(
    devices: tuple[Device, ...], selected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `lowbit certify --target cuda` and `nox -s cuda` ask. Without a device both are compiled, and both are reported so."""
    sight = Sight(devices, "" if devices else "none")
    backends: dict[str, Any] = {"cuda_blackwell": CudaBlackwell(query=lambda: sight), "cuda_other": Other(lambda: sight)}
    monkeypatch.setattr(cli, "backend_names", lambda: tuple(backends))
    monkeypatch.setattr(cli, "find_backend", backends.__getitem__)
    assert cli._for_target("cuda") == selected


def test_a_device_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = door(fault="1 CUDA device(s) are visible and do not initialise: RuntimeError: CUDA error 802")
    for ask in (lambda: broken.execution, lambda: broken.device, lambda: broken.supports(PLAIN), broken.describe):
        with pytest.raises(DeviceFault, match="do not initialise: RuntimeError: CUDA error 802"):
            ask()
    monkeypatch.setattr(cli, "backend_names", lambda: ("cuda_blackwell",))
    monkeypatch.setattr(cli, "find_backend", lambda name: broken)
    with pytest.raises(cli.Stop, match="cannot use its device"):
        cli._for_target("cuda")


def fake_torch(cuda: str | None = "13.0", count: int = 1, capability: tuple[int, int] = (10, 0), error: str = "") -> Any:
    def init() -> None:
        if error:
            raise RuntimeError(error)

    module = SimpleNamespace(
        device_count=lambda: count, init=init, get_device_name=lambda index: f"card {index}",
        get_device_capability=lambda index: capability)
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda=cuda), cuda=module)


@pytest.mark.parametrize(("torch_module", "listed", "sight"), [
    (None, 0, Sight(absence="torch is not installed and the driver lists no NVIDIA device")),
    (None, 2, Sight(fault="2 NVIDIA device(s) are visible to the driver, but torch is not installed; "
                          "install a CUDA build of torch")),
    (fake_torch(cuda=None), 0, Sight(absence="torch 2.13.0 is built without CUDA and the driver lists no NVIDIA device")),
    (fake_torch(cuda=None), 1, Sight(fault="1 NVIDIA device(s) are visible to the driver, but torch 2.13.0 is built without "
                                           "CUDA; install a CUDA build of torch")),
    (fake_torch(count=0), 0, Sight(absence="torch 2.13.0 sees no CUDA device")),
    (fake_torch(error="CUDA error 802"), 1,
     Sight(fault="1 CUDA device(s) are visible and do not initialise: RuntimeError: CUDA error 802")),
    (fake_torch(count=2), 2, Sight((Device(0, "card 0", (10, 0)), Device(1, "card 1", (10, 0))))),
], ids=lambda value: "" if not isinstance(value, Sight) else (value.fault or value.absence or "found"))
def test_what_is_seen(torch_module: Any, listed: int, sight: Sight) -> None:
    assert look_through(torch_module, listed) == sight


def test_without_a_device_nothing_is_claimed() -> None:
    for found, words in ((door(), "sees no CUDA device"), (door(H200), "needs compute capability 10.x, found NVIDIA H200 (9.0)")):
        for problem in (PLAIN, SVDQUANT, problem_of("gemm_w8a8_fp8/scaled/m9n64k512/f32")):
            said = found.supports(problem)
            assert said is not None
            assert said.startswith(NOT_EXECUTED)
            assert words in said


def test_what_is_open_is_said_where_there_is_no_device() -> None:
    assert "remains to be shown on silicon" in door().describe()
    about = door(B300).describe()
    assert "remains to be shown on silicon" not in about
    assert about["device"] == "NVIDIA B300 (10.3)"
    assert set(about) == {"device", "nvidia-cutlass-dsl", "triton", "torch"}


def test_loading_the_door_loads_no_framework() -> None:
    program = (
        "import sys, lowbit.kernels.cuda_blackwell as door; door.backend();"
        "print([name for name in ('torch', 'triton', 'cutlass') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_backend_takes_no_argument() -> None:
    assert cuda_blackwell.backend().target == "cuda"
    with pytest.raises(ValueError, match="takes no argument, got 'm128'"):
        cuda_blackwell.backend("m128")


# What it takes and declares ------------------------------------------------------------------------------------------


def legal_problems() -> list[Problem]:
    found = []
    for variant in OP.variants:
        for out in ("bf16", "f16"):
            for lora, r in (("nolora", 0), ("lora", 16), ("lora", 256)):
                for bias in ("nobias", "bias", "biasafter"):
                    dims = (("m", 5), ("n", 24), ("k", 96), ("r", r))
                    problem = Problem("gemm_nvfp4", variant, dims, (("out", out), ("lora", lora), ("bias", bias)))
                    found += [problem] if outside_domain(OP, problem) is None else []
    return found


def test_refuses_exactly_what_lies_outside_the_contract() -> None:
    rng = np.random.default_rng(4)
    found, counts = door(B200), [0, 0]
    for _ in range(2000):
        dims = tuple((letter, int(rng.choice(sizes))) for letter, sizes in (
            ("m", (0, 1, 33)), ("n", (0, 4, 8, 64, 68)), ("k", (0, 16, 32, 48, 64)), ("r", (0, 8, 16, 24, 256))))
        options = tuple((option.name, str(rng.choice(option.tokens))) for option in OP.options)
        problem = Problem("gemm_nvfp4", str(rng.choice(OP.variants)), dims, options)
        outside = outside_domain(OP, problem) is not None
        assert (found.supports(problem) is not None) == outside, f"{problem}: {found.supports(problem)}"
        counts[outside] += 1
    assert min(counts) > 50
    for text, _ in OP.rejects:
        assert found.supports(parse_problem(text, ops(), check=False)) is not None


def test_refuses_what_the_kernel_cannot_do() -> None:
    found = door(B200)
    high = Problem("gemm_nvfp4", "svdquant", (("m", 1), ("n", 8), ("k", 32), ("r", 272)), SVDQUANT.options)
    for problem, words in ((problem_of("gemm_w8a8_fp8/scaled/m9n64k512/f32"), "computes gemm_nvfp4"), (high, "r is 272")):
        said = found.supports(problem)
        assert said is not None
        assert words in said
        assert not said.startswith(NOT_EXECUTED)


def test_tactics_are_the_instances_and_the_twin() -> None:
    found = door(B200)
    for problem in legal_problems():
        named = found.tactics(problem)
        kind = f"_{problem.option('out')}_{problem.option('lora')}"
        wanted = {config.name for config in CONFIGS if config.name.endswith(kind)} if in_one_cast(problem) else set()
        assert set(named) == wanted | {TRITON}
        assert len(named) == len(set(named))
    assert len(found.tactics(SVDQUANT)) == 9
    for text, preferred in (("m33n64k256r32", "m128n128c1x1"), ("m512n256k256r32", "m256n128c2x1"),
                            ("m4352n3072k3840r128", "m256n256c2x1")):
        problem = problem_of(f"gemm_nvfp4/svdquant/{text}/f16.lora.bias")
        assert found.tactics(problem)[0] == f"{preferred}_f16_lora"
    assert found.tactics(problem_of("gemm_nvfp4/nunchaku/m17n64k256r16/bf16.lora.bias")) == (TRITON,)


@pytest.mark.parametrize("problem", legal_problems(), ids=str)
def test_the_declaration_is_one_of_the_contract(problem: Problem) -> None:
    found = door(B200)
    for tactic in found.tactics(problem):
        declared = found.declare(problem, tactic)
        assert check_declaration(OP, problem, declared) == ("", "as the contract")
        main, *rest = (item for item in declared.program if isinstance(item, Contraction))
        assert (main.datapath, main.start) == (DATAPATHS["blackwell_nvfp4"], Start.ZERO)
        for item in rest:  # one accumulator
            assert (item.datapath.name, item.start) == (f"blackwell_{problem.option('out')}", Start.PREVIOUS)
        assert len(rest) == (problem.option("lora") == "lora")


@pytest.mark.parametrize(("text", "wanted"), [
    ("svdquant/m33n64k256r32/f16.lora.bias", [Join.SEPARATE, Join.FUSED]),
    ("svdquant/m33n64k256r32/f16.lora", [Join.SEPARATE, Join.SEPARATE]),
    ("nunchaku/m33n64k256r32/f16.lora.bias", [Join.SEPARATE, Join.FUSED]),
    ("nunchaku/m33n64k256r32/f16.lora", [Join.SEPARATE, Join.SEPARATE]),
])
def test_channel_scale_and_bias_are_fused_where_both_are_there(text: str, wanted: list[Join]) -> None:
    """alpha, then the channel scale; both kernels write the fused multiply-add out."""
    found = declaration(problem_of(f"gemm_nvfp4/{text}"))
    assert [item.join for item in found.program if isinstance(item, Step) and item.kind is StepKind.MUL] == wanted


# What it hands to the kernel -----------------------------------------------------------------------------------------


def torch_view(name: str, fmt: Format, role: Role, codes: Array, pad: int = 0) -> TensorView:
    """A tensor as TorchDevice hands it out: containers of int16 and int32 are signed, rows of outputs may be apart."""
    dtype = {1: np.uint8, 2: np.int16, 4: np.int32}[codes.dtype.itemsize]
    shape = codes.shape
    wide = np.full((*shape[:-1], shape[-1] + pad), 0x5A, dtype=dtype)
    wide[..., : shape[-1]] = codes.view(dtype)
    memory = torch.from_numpy(wide)[..., : shape[-1]]
    return TensorView(name, fmt, shape, tuple(memory.stride()), role, "", memory.data_ptr(), memory)


def emulated(problem: Problem, declared: Declaration, operands: Operands) -> Array:
    assert OP.environment is not None
    values = emulate(declared, OP.environment(problem, operands))
    fmt = FORMATS[problem.option("out")]
    codes = encode(values.lo, fmt, Rounding.RNE, Overflow.SPECIAL)
    codes[values.nan] = fmt.nan_code
    return codes


def reading_back(
    given: Operands, problem: Problem, tactic: str, tensors: Mapping[str, Any], d: Any, alpha: float, stream: Any
) -> None:
    """A launch that unpacks what it is given, compares codes and scales with those of the case, and emulates the program."""
    specs = {spec.name: spec for spec in tensors_of(OP, problem)}
    m, n, k = (problem.dim(letter) for letter in "mnk")
    assert d.is_contiguous()
    assert d.data_ptr() % 16 == 0
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found = {"alpha": np.array([alpha], np.float32).view(np.uint32)}
    assert tensors["alpha"].numpy().view(np.uint32)[0] == found["alpha"][0]
    for side, rows in (("a", m), ("w", n)):
        found[side] = unpack(tensors[side].numpy().reshape(-1), LAYOUTS["nibble_low_first"], rows, k)
        found[f"{side}_scale"] = unpack(tensors[f"{side}_scale"].numpy(), LAYOUTS["scale_swizzle"], rows, k // 16)
    for name in ("lora_up", "channel_scale", "bias"):
        if name in tensors:
            found[name] = tensors[name].numpy().view(np.uint16)
    if "lora_act" in tensors:
        act = tensors["lora_act"].numpy()
        narrow = FORMATS[problem.option("out")]
        found["lora_act"] = encode(decode(act.view(np.uint16), narrow), F32)
    assert set(found) == set(specs) - {"d"}
    for name in set(found) - {"lora_act"}:
        assert np.array_equal(found[name], given[name].codes), name
    operands = Operands({name: Tensor(codes.astype(container(specs[name].format)), specs[name].format)
                         for name, codes in found.items()})
    d.copy_(torch.from_numpy(emulated(problem, declaration(problem), operands).view(np.int16)))


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("text", [
    "gemm_nvfp4/plain/m33n64k96r0/bf16/normal/s1", "gemm_nvfp4/plain/m1n8k32r0/f16.bias/lognormal/s2",
    "gemm_nvfp4/plain/m130n24k160r0/bf16.biasafter/normal/s5", "gemm_nvfp4/svdquant/m33n136k256r32/f16.lora.bias/normal/s3",
    "gemm_nvfp4/svdquant/m5n16k64r16/bf16.lora/special/s4", "gemm_nvfp4/svdquant/m9n16k96r0/bf16.bias/normal/s4",
    "gemm_nvfp4/nunchaku/m17n64k256r16/bf16.lora.bias/normal/s1",
])
def test_the_kernel_is_given_the_operands_of_the_case(text: str, pad: int) -> None:
    """Codes, scales in tiles, the rounded low-rank activation, alpha, and D with whole and with padded rows."""
    case = parse_case(text, ops())
    problem, operands = case.problem, draw_operands(OP, case)
    found = door(B200, launch=partial(reading_back, operands))
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    m, n = problem.dim("m"), problem.dim("n")
    for spec in tensors_of(OP, problem):
        if spec.role is not Role.OUTPUT:
            views[spec.role][spec.name] = torch_view(spec.name, spec.format, spec.role, operands[spec.name].codes)
    for tactic in (found.tactics(problem)[0], TRITON):
        d = torch_view("d", FORMATS[problem.option("out")], Role.OUTPUT, np.full((m, n), 0x5A5A, np.uint16), pad)
        scratch = torch_view("workspace", F32, Role.OUTPUT, np.zeros(found.workspace(problem, tactic) + 16, np.uint8))
        scratch = aligned(scratch, found.workspace(problem, tactic))
        state = found.prepare(problem, tactic, views[Role.CONSTANT])
        inputs = found.stage(problem, tactic, views[Role.ACTIVATION])
        assert found.run(problem, tactic, state, inputs, {"d": d}, scratch, None) == tactic
        expected = emulated(problem, declaration(problem), operands)
        codes = d.memory.numpy().view(np.uint16)
        assert np.array_equal(codes, expected), tactic
        assert OP.expect(case, operands, declaration(problem))["d"].admits(codes).all()
        if pad:
            whole = d.memory._base
            assert (whole[:, n:] == 0x5A).all()
    for group in views.values():  # nothing given was changed
        for name, view in group.items():
            assert np.array_equal(view.memory.numpy().view(operands[name].codes.dtype), operands[name].codes), name


def parameters(path: str, function: str) -> list[str]:
    """Positional parameters of a function in a file that cannot be imported without its compiler."""
    tree = ast.parse((Path(room.__file__).parents[1] / path).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return [argument.arg for argument in found.args.args]


@pytest.mark.parametrize("tactic", ["cute", "triton"])
def test_a_launch_hands_each_kernel_what_its_signature_names(monkeypatch: pytest.MonkeyPatch, tactic: str) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def kernel(name: str) -> Any:
        def called(*given: Any) -> str:
            calls.append((name, given))
            return f"{name} result"

        return called

    chip = SimpleNamespace(multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(room, "_triton", lambda: SimpleNamespace(launch=kernel("launch")))
    monkeypatch.setattr(room, "_cute", lambda: SimpleNamespace(compile_gemm=kernel("compile_gemm"), run_gemm=kernel("run_gemm")))
    room._compiled.cache_clear()
    problem = problem_of("gemm_nvfp4/plain/m33n64k96r0/bf16")
    name = TRITON if tactic == "triton" else room.tactics(problem)[0]
    a, d = torch.zeros(4, dtype=torch.uint8), torch.zeros(33, 64, dtype=torch.int16)
    room.launch(problem, name, {"a": a}, d, 0.5, SimpleNamespace(cuda_stream=7))
    room._compiled.cache_clear()
    called, given = calls[-1]
    if tactic == "triton":
        assert parameters("triton_room/blackwell_gemm_nvfp4.py", "launch") == ["problem", "tensors", "alpha"]
        assert (called, given[0], given[2], len(given)) == ("launch", problem, 0.5, 3)
        assert given[1]["a"] is a
        assert given[1]["d"] is d
        return
    assert calls[0][0] == "compile_gemm"
    named = dict(zip(parameters("blackwell_room/cute_gemm.py", "run_gemm"), given, strict=True))
    assert called == "run_gemm"
    assert named == {
        "compiled": "compile_gemm result", "config": room._BY_NAME[name], "addresses": {"a": a.data_ptr(), "d": d.data_ptr()},
        "shape": (33, 64, 96, 0), "alpha": 0.5, "multiprocessors": 148, "stream": 7,
    }


@pytest.mark.parametrize("name", ["a", "w_scale", "lora_up", "d"])
def test_a_tensor_map_at_an_odd_address_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled or launched."""
    monkeypatch.setattr(room, "_cute", lambda: pytest.fail("launched"))
    base = torch.zeros(64 * 64, dtype=torch.uint8)
    given = dict.fromkeys(("a", "a_scale", "w", "w_scale", "lora_act", "lora_up", "d"), base[-base.data_ptr() % 16 :])
    given[name] = given[name][2:]
    d = given.pop("d")
    with pytest.raises(ValueError, match=f"got {name} 2 bytes past a multiple of 16 bytes"):
        room.launch(SVDQUANT, room.tactics(SVDQUANT)[0], given, d, 0.5, SimpleNamespace(cuda_stream=7))


def aligned(view: TensorView, nbytes: int) -> TensorView:
    """The part of a buffer that starts at a multiple of 16."""
    shift = -view.pointer % 16
    memory = view.memory[shift : shift + nbytes]
    return TensorView(view.name, view.format, (nbytes,), (1,), view.role, view.layout, memory.data_ptr(), memory)


def test_no_rows_need_no_launch() -> None:
    problem = problem_of("gemm_nvfp4/plain/m0n32k64r0/bf16")
    found = door(B200, launch=None)
    assert found.supports(problem) is None
    d = torch_view("d", BF16, Role.OUTPUT, np.zeros((0, 32), np.uint16))
    tactic = found.tactics(problem)[0]
    assert found.run(problem, tactic, None, {}, {"d": d}, None, None) == f"{tactic} (nothing to launch)"  # type: ignore[arg-type]
