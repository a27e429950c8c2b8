"""Arms: who computes the Linears of a model. One record of a layer goes in, rows of activations go in, rows of outputs come out.

Decides: what an arm is, and what the reference arithmetic of an evaluation is (`ReferenceArm`; `backend_arm` calls a backend,
`faults` spoils an arm). An arm has a `name`, `prepare` and `run`; what `prepare` returns is the arm's own.
Refuses: a problem that an arm does not compute, in one sentence that names the layer, the reason and what to change.

The reference arithmetic is the program of the contract: each sum over K, rounded to binary32, then the declared steps, each
rounded to its format. Sums of integers are exact in binary32 (a group of int8 x int4 stays below 2^24). Sums of fp8 products are
exact in binary64: every product is a multiple of 2^-18 of at most 2^17.7, so 53 bits hold K up to 2^17 of them, in any order.
NVFP4 products are multiples of 2^-20 of at most 2^22.8 and are exact up to K = 1,024; beyond that, and for W4A16, the binary64
sum is off by at most K 2^-53 of the sum of magnitudes, 2^-29 of what an accumulator of binary32 may lose. So the program that
`declare` gives is exactly what is computed, and its interval holds every result. Weights are kept as codes, one byte each, and
become numbers a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Declaration, Join, Order, Step, StepKind, cast
from lowbit.references.encodings import folded_weight
from lowbit.references.formats import BF16, E2M1, E4M3FN, F32, UE4M3, UINT4, Format, container, decode
from lowbit.references.recipes import RECIPES

from ..case import Operands, Problem, Tensor
from ..op import Role, make_problem, tensors_of
from ..ops import ops
from .activations import DTYPES, InputRule, input_rule, input_tensors, torch_codes, values_of
from .checkpoint import QuantisedLinear

__all__ = ["Arm", "ArmError", "ReferenceArm", "call_operands", "gemm_constants", "problem_of"]


class ArmError(ValueError):
    """A layer that an arm does not compute."""


class Arm(Protocol):
    """Who computes. `run` takes x [M, K] in the dtype of `out`, M at least 1, and gives [M, N] in that dtype."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def prepare(self, linear: QuantisedLinear, out: Format, device: torch.device, bias: Tensor | None = None) -> Any:
        """The layer, ready to run: an object of the arm's own, with `name`, `n`, `k`, `out`, `device` and `nbytes` (memory that
        the arm keeps for it). `bias`: codes [N] in `out`. Raises ArmError."""

    def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """Outputs of one call. Raises ArmError."""

    def declare(self, problem: Problem) -> Declaration:
        """The arithmetic of a problem: what its outputs are judged by."""


def problem_of(linear: QuantisedLinear, m: int, out: Format, *, bias: bool = False) -> Problem:
    """The problem of `m` rows, with the low-rank term where the layer has one. Raises CheckpointError, DomainError."""
    up = linear.constants.get("lora_up")
    if linear.scheme.op not in ("gemm_nvfp4", "gemm_int4"):
        return linear.problem(m, out, bias=bias)
    options = {"out": "bf16" if out is BF16 else "f16"} | ({"bias": "bias"} if bias else {}) | ({"lora": "lora"} if up else {})
    dims = {"m": m, "n": linear.n, "k": linear.k, "r": up.codes.shape[1] if up else 0}
    return make_problem(ops()[linear.scheme.op], linear.scheme.variant, dims, options)


def call_operands(
    linear: QuantisedLinear, out: Format, x: torch.Tensor, bias: Tensor | None = None
) -> tuple[Problem, Operands]:
    """One call of a layer as a problem of the suite with its operands: x [M, K] quantised as the arms quantise it. For judging an
    output by `Op.expect`, and for a case bundle."""
    problem = problem_of(linear, x.shape[0], out, bias=bias is not None)
    given = gemm_constants(linear, bias)
    codes = input_tensors(input_rule(linear, out), x.detach().cpu())
    tensors: dict[str, Tensor] = {}
    for tensor in tensors_of(ops()[problem.op], problem):
        if tensor.role is Role.ACTIVATION:
            held = codes[tensor.name].numpy().view(container(tensor.format)).reshape(tensor.shape)
            tensors[tensor.name] = Tensor(held, tensor.format)
        elif tensor.role is Role.CONSTANT:
            tensors[tensor.name] = given[tensor.name]
    return problem, Operands(tensors)


def gemm_constants(linear: QuantisedLinear, bias: Tensor | None) -> dict[str, Tensor]:
    """The constants of the GEMM by tensor name; what only the activations need is left out."""
    found = {name: tensor for name, tensor in linear.constants.items() if name != "lora_down"}
    return found | ({} if bias is None else {"bias": bias})


# The reference ------------------------------------------------------------------------------------------------------------

_ELEMENTS = 1 << 18
"""Weights that are numbers at one time on a CPU: 2 MiB of binary64, which stays in a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """Weights [N, K] of one byte: integers (int8), or codes of `format`. `scales` [N, K / group] of 16 bits multiply them; the
    product is exact in binary32 and is rounded to `rounded` where that is given."""

    codes: torch.Tensor
    format: Format | None = None
    scales: torch.Tensor | None = None
    rounded: torch.dtype | None = None

    def rows(self, piece: slice, dtype: torch.dtype) -> torch.Tensor:
        """Values of some rows, exact in `dtype` (float32 or float64)."""
        if self.format is not None:
            return values_of(self.codes[piece], self.format, dtype)
        found = self.codes[piece].to(torch.float32 if self.scales is not None else dtype)
        if self.scales is not None:
            scales = self.scales[piece].to(torch.float32)
            found = (found.reshape(*scales.shape, -1) * scales.unsqueeze(-1)).flatten(1)
        return (found if self.rounded is None else found.to(self.rounded).to(torch.float32)).to(dtype)

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is kept."""
        yield from (self.codes, *(() if self.scales is None else (self.scales,)))


@dataclass(frozen=True, slots=True, eq=False)
class _Reference:
    """A layer of the reference. `factors` [1, N], [N, groups] or [1]: constants of the program in binary32."""

    name: str
    n: int
    k: int
    out: Format
    device: torch.device
    nbytes: int
    program: tuple[Contraction | Step, ...]
    inputs: InputRule
    weights: _Weights
    factors: Mapping[str, torch.Tensor]
    lora_up: torch.Tensor | None


def _integer_weights(constants: Mapping[str, Tensor]) -> torch.Tensor:
    """Differences of codes and zero points as int8 [N, K]: uint4 less 8 or less the zero point of its group, int4 as they are."""
    w = constants["w"]
    values = _of_code(w.format)[w.codes]
    if w.format is UINT4 and "zero" in constants:
        zeros = _of_code(UINT4)[constants["zero"].codes]
        values -= np.repeat(zeros, values.shape[1] // zeros.shape[1], axis=1)
    elif w.format is UINT4:
        values -= np.int8(8)
    return torch.from_numpy(values)


def _of_code(fmt: Format, times: int = 1) -> npt.NDArray[np.int8]:
    """Code of 4 bits -> its value times a number that makes it an integer."""
    return (decode(np.arange(16, dtype=np.uint8), fmt) * times).astype(np.int8)


def _weights(linear: QuantisedLinear, out: Format, device: torch.device) -> _Weights:
    """The weights of a layer, on the device."""
    constants = linear.constants
    w = constants["w"]
    match linear.scheme.op:
        case "gemm_w4a16":
            scales = torch_codes(constants["scale"].codes, device).view(DTYPES[out])
            return _Weights(_integer_weights(constants).to(device), None, scales, DTYPES[out])
        case "gemm_w4a8_fp8":
            return _Weights(torch_codes(folded_weight(w.codes, constants["group_scale"].codes), device), E4M3FN)
        case "gemm_w8a8_fp8":
            return _Weights(torch_codes(w.codes, device), E4M3FN)
        case "gemm_nvfp4":  # a code is a multiple of 1/2
            twice = torch.from_numpy(_of_code(E2M1, 2)[w.codes])
            halved = _single(decode(constants["w_scale"].codes, UE4M3) / 2, device).to(torch.bfloat16)  # 4 bits each
            return _Weights(twice.to(device), None, halved)
    return _Weights(_integer_weights(constants).to(device))


def _single(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Values that binary32 holds."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)


_IN_WEIGHTS = {"gemm_w4a16": ("w", "scale", "zero"), "gemm_w4a8_fp8": ("w", "group_scale"), "gemm_nvfp4": ("w", "w_scale")}
_REFERENCE = {
    "gemm_w4a16": ("sym", "zp"), "gemm_w4a8_fp8": ("folded",), "gemm_w4a8_int8": ("direct",),
    "gemm_w8a8_fp8": ("scaled", "block"), "gemm_nvfp4": ("plain", "svdquant"), "gemm_int4": ("f32",),
}
_INTEGER_OPS = ("gemm_w4a8_int8", "gemm_int4")
_EXACT_GROUP = 1 << 14  # products of int8 and int4 whose sum stays within 2^24


@dataclass(frozen=True, slots=True)
class ReferenceArm:
    """The contract's arithmetic in torch. `f32_sums`: sums in binary32, in whatever order the matrix library takes. `splits`:
    parts of K, whole blocks of 16 and at most so many, that are summed on their own and added in ascending order. An arm with
    both is another honest kernel: what it differs by is the noise floor of an evaluation."""

    name: str = "reference"
    splits: int = 1
    f32_sums: bool = False

    def __post_init__(self) -> None:
        if self.splits < 1 or (self.splits > 1 and not self.f32_sums):
            raise ValueError(f"{self.name}: got splits={self.splits}; parts are added in binary32, so that needs f32_sums=True")
        if self.f32_sums and (torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32):
            raise ValueError(f"{self.name}: torch may round operands; call torch.set_float32_matmul_precision('highest')")

    def declare(self, problem: Problem) -> Declaration:
        """What `run` computes, as a declaration of the op. Raises ArmError for a variant it does not compute."""
        if problem.variant not in _REFERENCE.get(problem.op, ()):
            known = "; ".join(f"{op}: {', '.join(variants)}" for op, variants in _REFERENCE.items())
            raise ArmError(f"{self.name} does not compute {problem.op}/{problem.variant}; it computes {known}")
        path = DATAPATHS["imma_s32" if problem.op in _INTEGER_OPS else "ieee_f32" if self.f32_sums else "ieee_f64"]
        program = ops()[problem.op].program
        assert program is not None
        found: list[Contraction | Step] = []
        for item in program(problem, path):
            found += self._declared(item, problem)
        return Declaration(tuple(found), batch_invariant=False)

    def _declared(self, item: Contraction | Step, problem: Problem) -> tuple[Contraction | Step, ...]:
        """What becomes of one item of the contract's program: products rounded on their own, sums to binary32."""
        if isinstance(item, Step):
            return (replace(item, join=Join.SEPARATE),)
        if item.operands == ("lora_act", "lora_up"):
            return (replace(item, datapath=DATAPATHS["ieee_f32"], order=Order.UNKNOWN),)
        steps = tuple(replace(step, join=Join.SEPARATE) for step in item.steps if step.kind is not StepKind.CAST)
        exact = problem.op in _INTEGER_OPS or (item.segment and not self.f32_sums)
        splits, k = self.splits, problem.dim("k")
        while not item.segment and -(-k // splits) % 16:  # parts do not cut blocks that share a scale
            splits -= 1
        order = Order.ASCENDING if exact else Order.UNKNOWN
        main = replace(item, order=order, splits=splits, steps=(cast(F32), *steps) if item.segment else ())
        return (main,) if item.segment else (main, cast(F32))

    def prepare(self, linear: QuantisedLinear, out: Format, device: torch.device, bias: Tensor | None = None) -> _Reference:
        """The layer as codes and binary32 factors."""
        problem = problem_of(linear, 1, out, bias=bias is not None)
        program = self.declare(problem).program
        if problem.op == "gemm_w4a8_int8" and problem.dim("g") > _EXACT_GROUP:
            raise ArmError(f"{linear.name}: groups of {problem.dim('g')} are not exact in binary32; quantise in groups of 128")
        weights = _weights(linear, out, device)
        kept = _IN_WEIGHTS.get(problem.op, ("w",))
        factors, up = {}, None
        for name, tensor in gemm_constants(linear, bias).items():
            if name == "lora_up":
                up = torch_codes(tensor.codes, device).view(DTYPES[out])
            elif name not in kept:
                values = _single(decode(tensor.codes, tensor.format), device)
                factors[name] = values.reshape(1, -1) if values.ndim == 1 else values
        if problem.op == "gemm_w8a8_fp8" and problem.variant == "block":
            factors["w_scale"] = factors["w_scale"].repeat_interleave(128, 0)[: linear.n]
        inputs = input_rule(linear, out, device)
        everything = [*weights.tensors(), *factors.values(), *(t for t in (up, inputs.lora_down, inputs.given) if t is not None)]
        nbytes = sum(tensor.nbytes for tensor in everything)
        return _Reference(linear.name, linear.n, linear.k, out, device, nbytes, program, inputs, weights, factors, up)

    def run(self, layer: _Reference, x: torch.Tensor) -> torch.Tensor:
        """D of one call, a few columns at a time."""
        codes = input_tensors(layer.inputs, x)
        op_format = _input_format(layer.inputs)
        main = layer.program[0]
        assert isinstance(main, Contraction)
        integer = main.datapath is DATAPATHS["imma_s32"]
        dtype = torch.float32 if self.f32_sums or integer else torch.float64
        a = values_of(codes["a"], op_format, dtype)
        rows = {
            name: values_of(code, _scale_format(layer, name)) for name, code in codes.items() if name not in ("a", "lora_act")
        }
        if op_format is E2M1:  # block scales belong to the codes
            a = (a.reshape(a.shape[0], -1, 16) * rows.pop("a_scale").to(dtype).unsqueeze(-1)).flatten(1)
        if "token_scale" in rows:
            rows["token_scale"] = rows["token_scale"].reshape(-1, 1)
        low = None
        if layer.lora_up is not None:
            low = codes["lora_act"].view(torch.float32).to(DTYPES[layer.out]).double()
        result = torch.empty((x.shape[0], layer.n), dtype=DTYPES[layer.out], device=x.device)
        room = _ELEMENTS if x.device.type == "cpu" else _ELEMENTS << 8
        width = max(layer.k, x.shape[0] * (layer.k // main.segment if main.segment else 1))
        step = max(8, room // width)
        for at in range(0, layer.n, step):
            piece = slice(at, min(layer.n, at + step))
            result[:, piece] = self._columns(layer, a, low, rows, piece)
        return result

    def _columns(
        self, layer: _Reference, a: torch.Tensor, low: torch.Tensor | None, rows: Mapping[str, torch.Tensor], piece: slice
    ) -> torch.Tensor:
        """The program for some columns of D."""
        factors = dict(rows)
        for name, values in layer.factors.items():
            factors[name] = values[:, piece] if values.shape == (1, layer.n) else values[piece] if values.shape[0] > 1 else values
        weights = layer.weights.rows(piece, a.dtype)
        value = torch.empty(0)
        for item in layer.program:
            if isinstance(item, Contraction):
                if item.operands == ("lora_act", "lora_up"):
                    assert low is not None
                    assert layer.lora_up is not None
                    value = value + (low @ layer.lora_up[piece].double().T).float()
                else:
                    value = _summed(item, a, weights, factors)
            elif item.kind is StepKind.CAST:
                value = value.to(torch.float32 if item.format is F32 else DTYPES[item.format])
            else:
                other = factors[item.operands[0]]
                value = value * other if item.kind is StepKind.MUL else value + other
        return value


def _input_format(rule: InputRule) -> Format:
    """Format of the activations' codes."""
    return RECIPES[rule.recipe].element if rule.recipe else rule.out


def _scale_format(layer: _Reference, name: str) -> Format:
    return RECIPES[layer.inputs.recipe].scale_format(layer.out)


def _summed(item: Contraction, a: torch.Tensor, w: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The main contraction [M, n]: unsegmented in the dtype of a; segment by segment through its steps into a binary32 total."""
    k, unit = a.shape[1], item.segment or 1
    part = -(-k // (unit * item.splits)) * unit
    totals = []
    for start in range(0, k, part):
        piece = slice(start, min(k, start + part))
        if not item.segment:
            totals.append(a[:, piece] @ w[:, piece].T)
            continue
        left = a[:, piece].reshape(a.shape[0], -1, unit).transpose(0, 1)
        sums = torch.bmm(left, w[:, piece].reshape(w.shape[0], -1, unit).permute(1, 2, 0)).float()
        totals.append(_running(item, sums, start // unit, factors))
    total = totals[0]
    for other in totals[1:]:
        total = total + other
    return total


def _running(item: Contraction, sums: torch.Tensor, first: int, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sums of segments [G, M, n] in binary32, scaled all at once and added up one after the other."""
    for step in item.steps:
        if step.kind is StepKind.MUL:
            sums = sums * _product([_of_segments(factors[name], name, first, len(sums)) for name in step.operands])
    total = sums[0]
    for value in sums[1:]:
        total = total + value
    return total


def _of_segments(values: torch.Tensor, name: str, first: int, count: int) -> torch.Tensor:
    """Scales [rows, groups] of some groups: [groups, M, 1] for activations, [groups, 1, n] for weights."""
    found = values[:, first : first + count].T
    return found.unsqueeze(2) if name == "a_scale" else found.unsqueeze(1)


def _product(factors: list[torch.Tensor]) -> torch.Tensor:
    found = factors[0]
    for other in factors[1:]:
        found = found * other
    return found
