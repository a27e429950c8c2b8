"""Arms against sums of Fractions and single binary32 steps, and the admissible intervals of the suite; faults seen (EVA-5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.backend import TensorView
from lowbit.conformance.bounds import check_declaration, gemm_expect
from lowbit.conformance.case import Case, Operands, Problem, Tensor
from lowbit.conformance.evals.activations import DTYPES, input_rule
from lowbit.conformance.evals.arms import ArmError, ReferenceArm, call_operands, problem_of
from lowbit.conformance.evals.backend_arm import BackendArm
from lowbit.conformance.evals.checkpoint import QuantisedLinear
from lowbit.conformance.evals.faults import FAULTS, FaultyArm
from lowbit.conformance.evals.schemes import Scheme
from lowbit.conformance.op import Op, Role, parse_case, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Declaration, Order, add, cast, mul
from lowbit.references.formats import BF16, E2M1, F16, F32, UE4M3, UINT4, Format, decode

CPU = torch.device("cpu")
PROBLEMS = (
    "gemm_w4a16/sym/m5n16k256g128/bf16", "gemm_w4a16/zp/m5n16k256g32/f16.bias", "gemm_w4a8_fp8/folded/m5n16k256g128/bf16.bias",
    "gemm_w4a8_int8/direct/m5n16k256g64/f16.bias", "gemm_w4a8_int8/direct/m5n16k256g256/bf16",
    "gemm_w8a8_fp8/scaled/m5n16k256/bf16.bias", "gemm_w8a8_fp8/scaled/m5n16k256/f16.atensor.wtensor",
    "gemm_w8a8_fp8/block/m5n136k256/bf16.bias",
    "gemm_nvfp4/plain/m5n16k256r0/bf16.bias", "gemm_nvfp4/svdquant/m5n16k256r32/bf16.lora.bias",
    "gemm_int4/f32/m5n16k256r32/f16.lora.bias", "gemm_int4/f32/m5n16k256r16/bf16.lora",
)
EACH = pytest.mark.parametrize("problem", PROBLEMS)
SCALES = {"gemm_nvfp4": 64.0, "gemm_w8a8_fp8": 0.5}  # NVFP4: a divisor; fp8: a static scale


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A layer with drawn constants, its bias, and activations x [M, K] with outliers and tiny values."""

    op: Op
    case: Case
    out: Format
    linear: QuantisedLinear
    bias: Tensor | None
    x: torch.Tensor


def drawn(text: str, pattern: str = "normal") -> Drawn:
    case = parse_case(f"{text}/{pattern}/s3", ops())
    problem, op = case.problem, ops()[case.problem.op]
    out = BF16 if problem.option("out") == "bf16" else F16
    dims = dict(problem.dims)
    options = dict(problem.options)
    scheme = Scheme(
        "g", op.name, problem.variant, "drawn", dims.get("g", 128 if problem.variant == "block" else 0),
        per_tensor=options.get("weight_scale") == "wtensor", input_per_tensor=options.get("act_scale") == "atensor",
    )
    tensors = dict(draw_operands(op, case).tensors)
    roles = {tensor.name: tensor.role for tensor in tensors_of(op, problem)}
    constants = {name: tensor for name, tensor in tensors.items() if roles[name] is Role.CONSTANT and name != "bias"}
    draw = np.random.Generator(np.random.PCG64(11))
    if dims.get("r"):
        constants["lora_down"] = half(draw.normal(0, 0.05, (dims["k"], dims["r"])), out)
    single = np.array([SCALES.get(op.name, 1.0)], np.float32).view(np.uint32)
    linear = QuantisedLinear("model.layers.3.up", scheme, dims["n"], dims["k"], constants, Tensor(single, F32))
    x = draw.normal(0, 1.0, (dims["m"], dims["k"]))
    x[:, ::37] *= 30.0
    x[1] *= 1e-3
    return Drawn(op, case, out, linear, tensors.get("bias"), torch.from_numpy(x).to(DTYPES[out]))


def half(values: np.ndarray[Any, Any], out: Format) -> Tensor:
    return Tensor(torch.from_numpy(values).to(DTYPES[out]).view(torch.int16).numpy().view(np.uint16), out)


def operands_of(found: Drawn) -> Operands:
    """The operands that the arm has to compute with."""
    problem, operands = call_operands(found.linear, found.out, found.x, found.bias)
    assert problem == found.case.problem
    return operands


def result(arm: Any, found: Drawn) -> np.ndarray[Any, Any]:
    """Codes of D."""
    value = arm.run(arm.prepare(found.linear, found.out, CPU, found.bias), found.x)
    assert value.dtype is DTYPES[found.out]
    assert value.shape == (found.x.shape[0], found.linear.n)
    codes: np.ndarray[Any, Any] = value.contiguous().view(torch.int16).numpy().view(np.uint16)
    return codes


# By Fractions ---------------------------------------------------------------------------------------------------------


def single(value: Fraction) -> np.float32:
    """The nearest binary32 value, ties to even, of a number in its normal range."""
    if value == 0:
        return np.float32(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    steps = size / Fraction(2) ** (exponent - 23)
    whole, rest = divmod(steps.numerator, steps.denominator)
    twice = 2 * rest
    whole += twice > steps.denominator or (twice == steps.denominator and whole % 2 == 1)
    return np.float32(float(whole) * 2.0 ** (exponent - 23) * (1 if value > 0 else -1))


def exactly(a: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> Fraction:
    return sum((Fraction(float(p)) * Fraction(float(q)) for p, q in zip(a, w, strict=True)), Fraction(0))


def narrowed(value: np.float32, out: Format) -> int:
    """The code of a binary32 value in f16 (NumPy's own conversion) or bf16 (the upper half of its bits, nearest even)."""
    if out is F16:
        return int(np.float16(value).view(np.uint16))
    bits = int(value.view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def by_hand(found: Drawn) -> list[list[int]]:
    """Codes of D, element by element: every step of the contract's formulas as one binary32 operation."""
    tensors = operands_of(found)
    name, variant, out = found.op.name, found.case.problem.variant, found.out
    of = {key: decode(tensor.codes, tensor.format) for key, tensor in tensors.items()}
    f = {key: value.astype(np.float32) for key, value in of.items()}
    a, w = of["a"], of["w"]
    m, n, k = a.shape[0], w.shape[0], a.shape[1]
    g = dict(found.case.problem.dims).get("g", 0)
    if name == "gemm_w4a16":
        zero = of["zero"] if "zero" in of else np.full((n, k // g), 8.0)
        products = ((w - np.repeat(zero, g, 1)) * np.repeat(of["scale"], g, 1)).astype(np.float32)
        codes = np.array([[narrowed(p, out) for p in row] for row in products], np.uint16)
        w = decode(codes, out)
    elif name == "gemm_w4a8_fp8":
        # e4m3 by torch's own cast
        bounded = torch.from_numpy(w * np.repeat(of["group_scale"], g, 1)).float().clamp(-448, 448)
        w = bounded.to(torch.float8_e4m3fn).double().numpy()
    elif name == "gemm_nvfp4":
        a, w = a * np.repeat(of["a_scale"], 16, 1), w * np.repeat(of["w_scale"], 16, 1)
    elif name == "gemm_w4a8_int8":
        w = w - 8
    rows = []
    for i in range(m):
        line = []
        for j in range(n):
            line.append(narrowed(finished(f, i, j, name, variant, grouped(f, a[i], w[j], i, j, name, variant, g), out), out))
        rows.append(line)
    return rows


def grouped(
    f: Mapping[str, Any], a: np.ndarray[Any, Any], w: np.ndarray[Any, Any], i: int, j: int, name: str, variant: str, g: int
) -> np.float32:
    """The sum over K, group by group where the op scales groups."""
    size = {"gemm_w4a8_int8": g, "gemm_int4": 64}.get(name, 128 if variant == "block" else 0)
    if not size:
        return single(exactly(a, w))
    total = np.float32(0)
    for number, at in enumerate(range(0, len(a), size)):
        value = single(exactly(a[at : at + size], w[at : at + size]))
        if name == "gemm_w4a8_int8":
            value = value * f["group_scale"][j, number]
        elif name == "gemm_int4":
            value = value * f["a_scale"][i, number] * f["w_scale"][j, number]
        else:
            value = value * (f["a_scale"][i, number] * f["w_scale"][j // 128, number])
        total = value if number == 0 else total + value
    return np.float32(total)


def finished(f: Mapping[str, Any], i: int, j: int, name: str, variant: str, value: np.float32, out: Format) -> np.float32:
    """What follows the sum, up to the cast."""
    if name == "gemm_w8a8_fp8" and variant == "scaled":
        value = value * f["channel_scale"][j % len(f["channel_scale"])] * f["token_scale"][i % len(f["token_scale"])]
    elif name == "gemm_w4a8_fp8":
        value = value * f["token_scale"][i] * f["channel_scale"][j]
    elif name == "gemm_w4a8_int8":
        value = value * f["token_scale"][i]
    elif name == "gemm_nvfp4":
        value = value * f["alpha"][0]
    if "lora_up" in f:
        low = decode(np.array([narrowed(v, out) for v in f["lora_act"][i]], np.uint16), out)
        value = value + single(exactly(low, f["lora_up"][j]))
    if name == "gemm_int4" or variant == "svdquant":
        value = value * f["channel_scale"][j]
    return np.float32(value + f["bias"][j]) if "bias" in f else np.float32(value)


@EACH
def test_the_reference_is_the_contract_step_by_step(problem: str) -> None:
    found = drawn(problem)
    assert (result(ReferenceArm(), found) & 0x7FFF).any()
    assert result(ReferenceArm(), found).tolist() == by_hand(found)


def test_rounding_of_fractions() -> None:
    assert single(Fraction(2**24 + 1)) == 2**24  # a tie, to even
    assert single(Fraction(2**24 + 3)) == 2**24 + 4
    assert single(Fraction(-1, 3)) == np.float32(-1 / 3)
    assert narrowed(np.float32(1.00390625), BF16) == 0x3F80  # 1 + 2^-8, a tie
    assert narrowed(np.float32(1.01171875), BF16) == 0x3F82


def test_sums_are_exact_where_binary32_would_lose() -> None:
    """1 times 2^26, 126 times 1, and -2^26: 126, whatever a lane of binary32 would have dropped."""
    scheme = Scheme("g", "gemm_w4a16", "sym", "s", 128)
    constants = {"w": Tensor(np.full((8, 128), 9, np.uint8), UINT4), "scale": Tensor(np.full((8, 1), 0x3F80, np.uint16), BF16)}
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    x[0, 0], x[0, 127] = 2.0**26, -(2.0**26)
    layer = ReferenceArm().prepare(QuantisedLinear("l", scheme, 8, 128, constants), BF16, CPU)
    assert ReferenceArm().run(layer, x).tolist() == [[126.0] * 8]
    loose = ReferenceArm("f32", 1, True)
    assert loose.run(loose.prepare(QuantisedLinear("l", scheme, 8, 128, constants), BF16, CPU), x)[0, 0] < 126


def test_the_low_rank_term_is_added_in_binary32() -> None:
    """x = 1 is coded as 6 * 11/64 = 33/32. 33/32 + 1.5 * 2^-24 is 3/4 of a binary32 step up: the bias leaves the whole step."""
    scheme = Scheme("g", "gemm_nvfp4", "svdquant", "s", 16)
    first = np.zeros((8, 32), np.uint8)
    first[:, 0] = 2  # 1.0
    down, up = np.zeros((32, 16)), np.zeros((8, 16))
    down[0, 0], up[:, 0] = 1.5 * 2.0**-12, 2.0**-12
    constants = {
        "w": Tensor(first, E2M1), "w_scale": Tensor(np.full((8, 2), 0x38, np.uint8), UE4M3),
        "alpha": Tensor(np.array([0x3F800000], np.uint32), F32), "lora_up": half(up, BF16), "lora_down": half(down, BF16),
        "channel_scale": half(np.ones(8), BF16),
    }
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    layer = ReferenceArm().prepare(QuantisedLinear("l", scheme, 8, 32, constants), BF16, CPU, half(np.full(8, -33 / 32), BF16))
    assert ReferenceArm().run(layer, x).tolist() == [[2.0**-23] * 8]


DOUBLE, SINGLE, INTEGER = DATAPATHS["ieee_f64"], DATAPATHS["ieee_f32"], DATAPATHS["imma_s32"]
MAIN = ("a", "w")
DECLARED = (
    ("gemm_w4a16/sym/m5n16k256g128/bf16", (Contraction(MAIN, DOUBLE, Order.UNKNOWN), cast(F32), cast(BF16)),
     (Contraction(MAIN, SINGLE, Order.UNKNOWN, splits=2), cast(F32), cast(BF16))),
    ("gemm_w8a8_fp8/scaled/m5n16k256/f16.bias",
     (Contraction(MAIN, DOUBLE, Order.UNKNOWN), cast(F32), mul("channel_scale"), mul("token_scale"), add("bias"), cast(F16)),
     (Contraction(MAIN, SINGLE, Order.UNKNOWN, splits=2), cast(F32), mul("channel_scale"), mul("token_scale"), add("bias"),
      cast(F16))),
    ("gemm_w8a8_fp8/block/m5n16k256/bf16",
     (Contraction(MAIN, DOUBLE, segment=128, steps=(cast(F32), mul("a_scale", "w_scale"))), cast(BF16)),
     (Contraction(MAIN, SINGLE, Order.UNKNOWN, segment=128, steps=(cast(F32), mul("a_scale", "w_scale")), splits=2), cast(BF16))),
    ("gemm_w4a8_int8/direct/m5n16k256g64/f16",
     (Contraction(MAIN, INTEGER, segment=64, steps=(cast(F32), mul("group_scale"))), mul("token_scale"), cast(F16)),
     (Contraction(MAIN, INTEGER, segment=64, steps=(cast(F32), mul("group_scale")), splits=2), mul("token_scale"), cast(F16))),
    ("gemm_nvfp4/svdquant/m5n16k256r32/bf16.lora",
     (Contraction(MAIN, DOUBLE, Order.UNKNOWN), cast(F32), mul("alpha"),
      Contraction(("lora_act", "lora_up"), SINGLE, Order.UNKNOWN), mul("channel_scale"), cast(BF16)),
     (Contraction(MAIN, SINGLE, Order.UNKNOWN, splits=2), cast(F32), mul("alpha"),
      Contraction(("lora_act", "lora_up"), SINGLE, Order.UNKNOWN), mul("channel_scale"), cast(BF16))),
)


@pytest.mark.parametrize(("text", "program", "other"), DECLARED, ids=[row[0] for row in DECLARED])
def test_what_is_declared(text: str, program: Any, other: Any) -> None:
    problem = parse_case(f"{text}/normal/s1", ops()).problem
    assert ReferenceArm().declare(problem) == Declaration(program, batch_invariant=False)
    assert ReferenceArm("f32", 2, True).declare(problem) == Declaration(other, batch_invariant=False)


# By the suite -----------------------------------------------------------------------------------------------------------


def outside(arm: Any, judge: Any, found: Drawn) -> int:
    """Elements of an arm's D outside the interval of `judge`'s declaration."""
    declaration = judge.declare(found.case.problem)
    wrong, of_class = check_declaration(found.op, found.case.problem, declaration)
    assert (wrong, of_class) == ("", "as the contract")
    expectation = gemm_expect(found.op, found.case, operands_of(found), declaration)["d"]
    return int((~expectation.admits(result(arm, found))).sum())


ARMS: tuple[Callable[[], Any], ...] = (
    ReferenceArm, lambda: ReferenceArm("f32", 1, True), lambda: ReferenceArm("three parts", 3, True), lambda: BackendArm("cpu"),
)


@EACH
@pytest.mark.parametrize("make", ARMS, ids=["reference", "f32", "splits", "cpu"])
def test_every_arm_stays_in_its_interval(problem: str, make: Callable[[], Any]) -> None:
    found = drawn(problem, "lognormal")
    assert outside(make(), make(), found) == 0


@EACH
def test_the_reference_is_inside_what_the_backend_declares(problem: str) -> None:
    found = drawn(problem)
    assert outside(ReferenceArm(), BackendArm("cpu"), found) == 0
    assert outside(BackendArm("cpu"), ReferenceArm(), found) == 0


def test_another_order_gives_other_bits() -> None:
    found = drawn("gemm_w4a16/sym/m64n128k4096g128/f16")
    first, other = result(ReferenceArm(), found), result(ReferenceArm("floor", 7, True), found)
    assert 0 < (first != other).sum() < first.size // 20
    assert np.array_equal(first, result(ReferenceArm(), found))


@EACH
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_leaves_the_interval(problem: str, fault: str) -> None:
    found = drawn(problem)
    factors = {"channel_scale", "alpha"} & {name for name, t in found.linear.constants.items() if t.format is F32}
    groups = [found.linear.constants[n].codes.shape for n in ("scale", "group_scale", "w_scale") if n in found.linear.constants]
    possible = {"alpha": bool(factors), "scale_group": any(shape[-1] > 1 for shape in groups), "k_tail": True}[fault]
    arm = FaultyArm(ReferenceArm(), fault, found.linear.name)
    if not possible:
        with pytest.raises(ArmError, match=r"^model.layers.3.up: gemm_.* has no "):
            arm.prepare(found.linear, found.out, CPU, found.bias)
        return
    assert (result(arm, found) != result(ReferenceArm(), found)).any()
    if fault != "alpha":  # 1e-3 hides in a bf16 ulp; where it shows is up to the token test
        assert outside(arm, ReferenceArm(), found) > 0
    elsewhere = FaultyArm(ReferenceArm(), fault, "model.layers.4.up")
    assert np.array_equal(result(elsewhere, found), result(ReferenceArm(), found))


def test_an_alpha_that_is_off_leaves_the_interval() -> None:
    found = drawn("gemm_nvfp4/plain/m32n64k512r0/f16")
    assert outside(FaultyArm(ReferenceArm(), "alpha", found.linear.name), ReferenceArm(), found) > found.x.shape[0]
    assert FaultyArm(ReferenceArm(), "alpha", "a.b").name == "reference with alpha in a.b"


def test_an_unknown_fault_is_refused() -> None:
    found = drawn(PROBLEMS[0])
    with pytest.raises(ArmError, match=r"^unknown fault 'x'; the faults are scale_group, alpha, k_tail$"):
        FaultyArm(ReferenceArm(), "x", "y").prepare(found.linear, BF16, CPU)


# What is kept, and what is refused ----------------------------------------------------------------------------------------


@EACH
def test_weights_take_one_byte(problem: str) -> None:
    found = drawn(problem)
    layer = ReferenceArm().prepare(found.linear, found.out, CPU, found.bias)
    n, k = found.linear.n, found.linear.k
    sizes = {tensor.shape: tensor.element_size() for tensor in layer.weights.tensors()}
    assert sizes[torch.Size((n, k))] == 1
    assert all(tensor.element_size() <= 2 for tensor in layer.weights.tensors())
    small = [t for t in (layer.weights.scales, layer.lora_up, layer.inputs.lora_down, layer.inputs.given) if t is not None]
    assert layer.nbytes == n * k + sum(t.nbytes for t in (*small, *layer.factors.values()))


def test_columns_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    for problem in PROBLEMS:
        found = drawn(problem)
        whole = result(ReferenceArm(), found)
        monkeypatch.setattr("lowbit.conformance.evals.arms._ELEMENTS", 1 << 11)
        assert np.array_equal(result(ReferenceArm(), found), whole)
        monkeypatch.undo()


def test_arms_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got splits=2; parts are added in binary32, so that needs f32_sums=True"):
        ReferenceArm("x", 2)
    with pytest.raises(ArmError, match=r"^reference does not compute gemm_int4/half; it computes gemm_w4a16: sym, zp;"):
        ReferenceArm().declare(parse_case("gemm_int4/half/m4n8k64r0/f16/normal/s1", ops()).problem)


def test_groups_beyond_binary32_are_refused() -> None:
    scheme = Scheme("g", "gemm_w4a8_int8", "direct", "s", 0)
    constants = {"w": Tensor(np.zeros((8, 16416), np.uint8), UINT4), "group_scale": Tensor(np.zeros((8, 1), np.uint16), BF16)}
    with pytest.raises(ArmError, match=r"^l: groups of 16416 are not exact in binary32; quantise in groups of 128$"):
        ReferenceArm().prepare(QuantisedLinear("l", scheme, 8, 16416, constants), BF16, CPU)


def test_reduced_precision_is_refused() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match=r"torch may round operands; call torch.set_float32_matmul_precision\('highest'\)"):
            ReferenceArm("x", 1, True)
    finally:
        torch.set_float32_matmul_precision("highest")


class Counted:
    """A backend that computes nothing: it sees views and counts calls. `limit`: rows it supports at most."""

    name, target, device = "counted", "none", "cpu"

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.prepared: list[int] = []
        self.seen: list[dict[str, TensorView]] = []

    def supports(self, problem: Problem) -> str | None:
        return None if problem.dim("m") <= self.limit and problem.op.startswith("gemm") else f"at most {self.limit} rows"

    def declare(self, problem: Problem, tactic: str) -> Any:
        raise AssertionError("no declaration is needed to run")

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        return ("slow", "fast") if problem.dim("m") < 5 else ("fast", "wide")

    def workspace(self, problem: Problem, tactic: str) -> int:
        return 64

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        self.prepared.append(problem.dim("m"))
        self.seen.append(dict(constants))
        return tactic

    def run(self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Any, workspace: Any, stream: Any) -> str:
        if problem.dim("m") == 13:
            raise RuntimeError("thirteen\nrows")
        self.seen.append(dict(inputs) | dict(outputs) | {"workspace": workspace})
        if problem.dim("m") != 2:
            outputs["d"].memory.fill_(0x3F80)
        return f"kernel_{state}"


def test_a_backend_on_a_torch_device_sees_its_tensors() -> None:
    found, backend = drawn("gemm_w4a16/sym/m5n16k256g128/bf16.bias"), Counted()
    arm = BackendArm(backend, tactic="fast")
    layer = arm.prepare(found.linear, BF16, CPU, found.bias)
    assert arm.run(layer, found.x).tolist() == [[1.0] * 16] * 5
    assert arm.run(layer, found.x[:2]).isnan().all()  # what a kernel does not write is NaN
    assert arm.run(layer, found.x[:1]).tolist() == [[1.0] * 16]
    assert (backend.prepared, arm.kernels, layer.codes) == ([1], {"kernel_fast": 3}, None)
    constants, call = backend.seen[0], backend.seen[1]
    assert sorted(constants) == ["bias", "scale", "w"]
    assert sorted(call) == ["a", "d", "workspace"]
    assert np.array_equal(constants["w"].memory.numpy(), found.linear.constants["w"].codes)
    assert np.array_equal(constants["scale"].memory.numpy().view(np.uint16), found.linear.constants["scale"].codes)
    assert (call["a"].shape, call["a"].strides, call["a"].memory.dtype) == ((5, 256), (256, 1), torch.int16)
    assert call["a"].pointer == call["a"].memory.data_ptr()
    assert (call["workspace"].shape, call["d"].role, call["a"].role) == ((64,), Role.OUTPUT, Role.ACTIVATION)
    assert torch.equal(call["a"].memory.view(torch.bfloat16), found.x)


class Asked(Counted):
    """Remembers what it was asked, and for how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[tuple[str, int]] = []

    def supports(self, problem: Problem) -> str | None:
        self.questions.append(("supports", problem.dim("m")))
        return super().supports(problem)

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        self.questions.append(("tactics", problem.dim("m")))
        return ("slow", "fast")

    def workspace(self, problem: Problem, tactic: str) -> int:
        self.questions.append((f"workspace of {tactic}", problem.dim("m")))
        return 8 * problem.dim("m")


def test_a_backend_is_asked_once_what_it_says_of_a_problem() -> None:
    """A model that generates calls the same problems again and again: only run() is repeated, with the problem's workspace."""
    found, backend = drawn(PROBLEMS[0]), Asked()
    arm = BackendArm(backend)
    layers = [arm.prepare(found.linear, BF16, CPU) for _ in range(2)]  # of one shape
    for rows in (1, 5, 5, 3, 5, 1):
        for layer in layers:
            arm.run(layer, found.x[:rows])
    assert sorted(backend.questions) == sorted(
        (said, rows) for rows in (1, 3, 5) for said in ("supports", "tactics", "workspace of slow")
    )
    assert arm.kernels == {"kernel_slow": 12}
    assert [call["workspace"].shape[0] for call in backend.seen[2:]] == [8 * rows for rows in (1, 5, 5, 3, 5, 1) for _ in layers]


def test_a_state_per_number_of_rows() -> None:
    found, backend = drawn(PROBLEMS[0]), Counted()
    arm = BackendArm(backend, per_rows=True)
    layer = arm.prepare(found.linear, BF16, CPU)
    for rows in (1, 5, 5, 3):
        arm.run(layer, found.x[:rows])
    assert backend.prepared == [1, 5, 3]
    assert arm.kernels == {"kernel_slow": 2, "kernel_fast": 2}


class Turning(Counted):
    """Offers one tactic for few rows and two for more, none of them the same."""

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        return ("row",) if problem.dim("m") < 5 else ("tile", "wide")


def test_a_call_is_computed_by_the_tactic_that_is_offered_first_for_its_rows() -> None:
    """One state per tactic, made for one row where that has the tactic; without another tactic for one row none is made later."""
    found, backend = drawn(PROBLEMS[0]), Counted()
    arm = BackendArm(backend)
    layer = arm.prepare(found.linear, BF16, CPU)
    for rows in (1, 5, 5, 3, 1):
        arm.run(layer, found.x[:rows])
    assert backend.prepared == [1, 1]
    assert arm.kernels == {"kernel_slow": 3, "kernel_fast": 2}
    assert sorted(layer.states) == ["fast", "slow"]
    backend = Counted()
    backend.tactics = lambda problem: ("slow", "fast") if problem.dim("m") < 5 else ("wide",)  # type: ignore[method-assign]
    arm = BackendArm(backend)
    layer = arm.prepare(found.linear, BF16, CPU)
    arm.run(layer, found.x)
    assert (backend.prepared, arm.kernels) == ([1, 5], {"kernel_wide": 1})
    once = BackendArm(Turning())
    layer = once.prepare(found.linear, BF16, CPU)
    assert layer.codes is None
    with pytest.raises(ArmError, match=r"^model.layers.3.up: backend counted has no tactic 'row' for .*; it has tile, wide;"):
        once.run(layer, found.x)


def test_a_backend_that_refuses_is_named_with_the_layer() -> None:
    found = drawn(PROBLEMS[0])
    text = r"^model.layers.3.up: backend counted does not compute gemm_w4a16/sym/m{}n16k256g128/bf16: at most {} rows; choose"
    with pytest.raises(ArmError, match=text.format(1, 0)):
        BackendArm(Counted(0)).prepare(found.linear, BF16, CPU)
    arm = BackendArm(Counted(4), tactic="fast")
    layer = arm.prepare(found.linear, BF16, CPU)
    with pytest.raises(ArmError, match=text.format(5, 4)):
        arm.run(layer, found.x)
    with pytest.raises(ArmError, match=r"^model.layers.3.up: backend counted has no tactic 'odd' for .*; it has slow, fast;"):
        BackendArm(Counted(), tactic="odd").prepare(found.linear, BF16, CPU)
    arm = BackendArm(Counted(), tactic="fast")
    layer = arm.prepare(found.linear, BF16, CPU)
    with pytest.raises(ArmError, match=r"run\(\) of backend counted failed on .*m13.*: RuntimeError: thirteen rows; replay"):
        arm.run(layer, found.x[:1].expand(13, -1).contiguous())


@EACH
def test_the_backends_own_quantiser_gives_the_same(problem: str) -> None:
    """The cpu backend has quantisers by other techniques; codes are those of the recipe, the projection in its interval."""
    found = drawn(problem)
    arm = BackendArm("cpu", quantises=True)
    got = result(arm, found)
    rule = input_rule(found.linear, found.out)
    called = [name for name in arm.kernels if "quantize" in name]
    assert len(called) == (1 if rule.recipe else 0)
    if rule.recipe == "nunchaku_int4":  # an approximate reciprocal: other codes are as good
        return
    if rule.lora_down is not None:  # codes and scales are exact, the projection may be another sum: it counts for nothing here
        none = {**found.linear.constants, "lora_up": half(np.zeros((found.linear.n, rule.lora_down.shape[1])), found.out)}
        found = dataclasses.replace(found, linear=dataclasses.replace(found.linear, constants=none))
        got = result(arm, found)
    assert np.array_equal(got, result(BackendArm("cpu"), found))


def test_layers_of_a_static_scale_reach_the_quantiser() -> None:
    found = drawn("gemm_w8a8_fp8/scaled/m5n16k256/f16.atensor.wtensor")
    scheme = dataclasses.replace(found.linear.scheme, static_input=True)
    found = dataclasses.replace(found, linear=dataclasses.replace(found.linear, scheme=scheme))
    arm = BackendArm("cpu", quantises=True)
    assert result(arm, found).tolist() == by_hand(found)
    assert "numpy_fp8_quantize_static" in arm.kernels


def test_the_problem_of_a_low_rank_layer() -> None:
    found = drawn("gemm_int4/f32/m5n16k256r32/f16.lora.bias")
    assert str(problem_of(found.linear, 9, F16, bias=True)) == "gemm_int4/f32/m9n16k256r32/f16.lora.bias"
    assert str(problem_of(drawn(PROBLEMS[0]).linear, 2, BF16)) == "gemm_w4a16/sym/m2n16k256g128/bf16"


@EACH
def test_operands_of_a_call(problem: str) -> None:
    """Names, formats and shapes of the op; constants as they were given."""
    found = drawn(problem)
    operands = operands_of(found)
    wanted = {t.name: (t.format, t.shape) for t in tensors_of(found.op, found.case.problem) if t.role is not Role.OUTPUT}
    assert {name: (tensor.format, tensor.codes.shape) for name, tensor in operands.items()} == wanted
    assert operands["w"] is found.linear.constants["w"]
    assert operands["a"].codes.any()
