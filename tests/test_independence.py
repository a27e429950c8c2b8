"""The cpu backend and the judge share no arithmetic: neither by call, nor by consequence.

The calls of the backend are traced while it computes. And a defect planted in one side alone, in turn on either side, turns an op
from admitted to refused: what both sides took from one place would move together and stay admitted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from lowbit.conformance.backend import TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Case, Operands
from lowbit.conformance.op import Expectation, Op, ResolvedTensor, Role, parse_case, tensors_of
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels import cpu
from lowbit.kernels.cpu_room import codec, gemm
from lowbit.references import dot, dot_sums
from lowbit.references.formats import Codes, container

CPU = cpu.backend()
JUDGE = ("rounding", "recipes", "recipe_", "encodings", "layouts", "dot", "numba_", "interpret")


def view(spec: ResolvedTensor, codes: Codes) -> TensorView:
    memory = np.ascontiguousarray(codes).astype(container(spec.format))
    strides = tuple(step // memory.itemsize for step in memory.strides)
    return TensorView(spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, memory.ctypes.data, memory)


def compute(op: Op, case: Case, operands: Operands) -> dict[str, Codes]:
    specs = tensors_of(op, case.problem)
    given = {spec.name: view(spec, operands[spec.name].codes) for spec in specs if spec.role is not Role.OUTPUT}
    outputs = {spec.name: view(spec, np.zeros(spec.shape)) for spec in specs if spec.role is Role.OUTPUT}
    roles = {spec.name: spec.role for spec in specs}
    state = CPU.prepare(case.problem, "default", {n: v for n, v in given.items() if roles[n] is Role.CONSTANT})
    inputs = CPU.stage(case.problem, "default", {n: v for n, v in given.items() if roles[n] is not Role.CONSTANT})
    CPU.run(case.problem, "default", state, inputs, outputs, None, 0)
    written = {n: v for n, v in given.items() if roles[n] is Role.INOUT} | outputs
    return {name: tensor.memory for name, tensor in written.items()}


def expected(op: Op, case: Case, operands: Operands, outputs: dict[str, Codes]) -> dict[str, Expectation]:
    declaration = CPU.declare(case.problem, "default")
    assert check_declaration(op, case.problem, declaration)[0] == ""
    if op.expect_given is not None:
        return dict(op.expect_given(case, operands, declaration, outputs))
    return dict(op.expect(case, operands, declaration))


def admitted(op: Op, case: Case) -> bool:
    operands = draw_operands(op, case)
    outputs = compute(op, case, operands)
    return all(e.admits(outputs[name]).all() for name, e in expected(op, case, operands, outputs).items())


CASES = {
    "int4_pack": "int4_pack/gptq/n16k24/uint4/normal/s1", "int4_repack": "int4_repack/weight/n16k24/plain/normal/s1",
    "int4_encode": "int4_encode/dense/e1n32k128/plain/normal/s1", "scale_pack_e4m3": "scale_pack_e4m3/table8/n64/plain/normal/s1",
    "scale_fold": "scale_fold/row/n16k256/vllm/normal/s1", "scale_swizzle": "scale_swizzle/tile128x4/m40g5/plain/normal/s1",
    "fp8_convert_fnuz": "fp8_convert_fnuz/channel/n8k16/fnuz/normal/s1",
    "fp8_requantize": "fp8_requantize/max_scale/n24k16s3/fn/normal/s1",
    "fp8_quantize": "fp8_quantize/token/m9k64p0/bf16/normal/s1",
    "int8_quantize": "int8_quantize/token/m9k64/bf16/normal/s1", "int4_quantize": "int4_quantize/sym/n8k128g64/bf16/normal/s1",
    "nvfp4_quantize": "nvfp4_quantize/dynamic/m8k64/bf16.compressed_tensors/normal/s1",
    "svdquant_quantize": "svdquant_quantize/nvfp4/m8k64r16/bf16/normal/s1",
    "gemm_w4a16": "gemm_w4a16/zp/m5n16k128g32/bf16/normal/s1",
    "gemm_w8a8_fp8": "gemm_w8a8_fp8/scaled/m5n16k128/bf16.bias/normal/s1",
    "gemm_w4a8_fp8": "gemm_w4a8_fp8/folded/m5n16k256g128/bf16/normal/s1",
    "gemm_w4a8_fp8_grouped": "gemm_w4a8_fp8_grouped/exact/e3m9n16k128g64/bf16/normal/s1",
    "gemm_w4a8_int8": "gemm_w4a8_int8/direct/m5n16k128g32/f16/normal/s1",
    "gemm_nvfp4": "gemm_nvfp4/svdquant/m5n16k128r16/bf16.lora.bias/normal/s1",
    "gemm_int4": "gemm_int4/f32/m5n16k128r16/f16.lora.bias/normal/s1",
}


def case_of(name: str) -> tuple[Op, Case]:
    return ops()[name], parse_case(CASES[name], ops())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_judge_runs_while_the_backend_computes(name: str) -> None:
    op, case = case_of(name)
    operands = draw_operands(op, case)
    called: set[str] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called.add(f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}")

    sys.setprofile(trace)
    try:
        compute(op, case, operands)
    finally:
        sys.setprofile(None)
    assert any(place.startswith("lowbit.kernels.cpu_room.") for place in called), "the trace saw nothing"
    shared = sorted(place for place in called if place.startswith(tuple(f"lowbit.references.{room}" for room in JUDGE)))
    assert shared == []
    assert not [place for place in called if place.startswith(("lowbit.conformance.bounds.", "lowbit.conformance.ops."))]


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_agree_before_anything_is_planted(name: str) -> None:
    assert admitted(*case_of(name))


def _shifted(values: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder that reads every code one step too high where that is a code."""

    def wrong(codes: Any, fmt: Any, *rest: Any) -> Any:
        return values(np.where(codes & 1, codes, codes | 1).astype(np.asarray(codes).dtype), fmt, *rest)

    return wrong


BACKEND_ROOMS = (codec, gemm)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gemm_")])
def test_a_defect_in_the_backend_alone_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = _shifted(codec.values)
    for module in BACKEND_ROOMS:
        if hasattr(module, "values"):
            monkeypatch.setattr(module, "values", wrong)
    assert not admitted(*case_of(name))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("gemm_")])
def test_a_wrong_code_of_the_backend_alone_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = cpu._BITWISE
    honest = table[name]

    def wrong(problem: Any, tensors: Any) -> Any:
        turned = {key: np.roll(value, 1, axis=0) if value.ndim and key != "widths" else value for key, value in tensors.items()}
        return honest(problem, turned)

    monkeypatch.setitem(table, name, wrong)
    assert not admitted(*case_of(name))


def _everywhere(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], wrong: Callable[..., Any]) -> None:
    """Replace a function of the references wherever a module holds it by name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("lowbit.references", "lowbit.conformance")):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, attribute, wrong)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gemm_")])
def test_a_defect_in_the_judge_alone_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's sums lose the last element of K; operands are drawn before the defect is planted."""
    op, case = case_of(name)
    operands = draw_operands(op, case)
    outputs = compute(op, case, operands)
    exact, agnostic = dot_sums.dot_exact, dot.agnostic_bound
    _everywhere(monkeypatch, exact, lambda a, w: exact(a[:, :-1], w[:, :-1]))
    _everywhere(monkeypatch, agnostic, lambda a, w, path: agnostic(_shorter(a), _shorter(w), path))
    assert not all(e.admits(outputs[key]).all() for key, e in expected(op, case, operands, outputs).items())


def _shorter(operand: dot.Operand) -> dot.Operand:
    """The operand with the last code of K zero."""
    codes = operand.codes.copy()
    codes[:, -1] = 0
    return dot.Operand(codes, operand.format, operand.scales, operand.scale_format, operand.group)


JUDGES_OWN = {
    "int4_pack": ("layouts", "pack"), "int4_repack": ("layouts", "pack"), "int4_encode": ("layouts", "pack"),
    "scale_swizzle": ("layouts", "pack"), "scale_pack_e4m3": ("encodings", "pack_scale_e4m3"),
    "scale_fold": ("encodings", "fold_scales"), "fp8_convert_fnuz": ("encodings", "convert_fnuz"),
    "fp8_requantize": ("encodings", "requantize_max_scale"), "fp8_quantize": ("recipes", "quantise"),
    "int8_quantize": ("recipes", "quantise"), "int4_quantize": ("recipes", "quantise"), "nvfp4_quantize": ("recipes", "quantise"),
    "svdquant_quantize": ("recipes", "quantise"),
}


@pytest.mark.parametrize("name", list(JUDGES_OWN))
def test_a_wrong_reference_alone_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's own encoder reads its first matrix with two rows (or elements) exchanged."""
    room, attribute = JUDGES_OWN[name]
    honest = getattr(importlib.import_module(f"lowbit.references.{room}"), attribute)
    op, case = case_of(name)
    operands = draw_operands(op, case)
    outputs = compute(op, case, operands)
    _everywhere(monkeypatch, honest, lambda first, *rest, **more: honest(np.roll(first, 1, axis=0), *rest, **more))
    assert not all(e.admits(outputs[key]).all() for key, e in expected(op, case, operands, outputs).items())
