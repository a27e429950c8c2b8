"""Two independent sides: the cpu backend runs no function of the references, and a defect of either side alone shows as drift.

Every op is computed while every call is traced. Then each function that took part, on one side at a time, is made to give a
wrong result, and the other side has to disagree.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit import conformance, kernels, references
from lowbit.conformance.backend import TensorView
from lowbit.conformance.case import Case, Operands
from lowbit.conformance.op import Role, parse_case, tensors_of
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.verdict import judge_outputs
from lowbit.kernels.cpu import backend as cpu_backend
from lowbit.references.declarations import Declaration
from lowbit.references.formats import Codes, container

CPU = cpu_backend()
ROOMS = {room.__name__: Path(room.__path__[0]).resolve() for room in (references, conformance, kernels)}
RECORDS = {"formats", "declarations", "datapaths"}  # numbers that both sides read; their functions are not among the shared ones

CASES = {name: parse_case(ops()[name].edges[0], ops()) for name in NAMES} | {
    "gemm_w4a16": parse_case("gemm_w4a16/zp/m3n8k64g32/f16.bias/normal/s1", ops()),
    "gemm_w8a8_fp8": parse_case("gemm_w8a8_fp8/scaled/m3n8k64/bf16.bias/normal/s1", ops()),
    "gemm_w4a8_fp8": parse_case("gemm_w4a8_fp8/folded/m3n8k128g64/bf16.bias/normal/s1", ops()),
    "gemm_w4a8_fp8_grouped": parse_case("gemm_w4a8_fp8_grouped/folded/e3m9n8k128g64/bf16/normal/s1", ops()),
    "gemm_w4a8_int8": parse_case("gemm_w4a8_int8/direct/m3n8k64g32/f16.bias/normal/s1", ops()),
    "gemm_nvfp4": parse_case("gemm_nvfp4/svdquant/m3n8k64r16/f16.lora.bias/normal/s1", ops()),
    "gemm_int4": parse_case("gemm_int4/f32/m3n8k128r16/f16.lora.bias/normal/s1", ops()),
}


@cache
def operands_of(case: Case) -> Operands:
    return draw_operands(ops()[case.problem.op], case)


def compute(case: Case) -> dict[str, Codes]:
    """What the cpu backend writes: prepare, stage and run, as the worker calls them."""
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[case.problem.op], case.problem):
        given = operands_of(case)
        memory: Codes = (
            np.full(spec.shape, 0x5A, container(spec.format)) if spec.role is Role.OUTPUT else given[spec.name].codes.copy()
        )
        strides = tuple(step // memory.itemsize for step in memory.strides)
        views[spec.role][spec.name] = TensorView(spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, 0, memory)
    state = CPU.prepare(case.problem, "default", views[Role.CONSTANT])
    inputs = CPU.stage(case.problem, "default", views[Role.ACTIVATION] | views[Role.INOUT])
    CPU.run(case.problem, "default", state, inputs, views[Role.OUTPUT], None, None)
    return {name: view.memory for name, view in (views[Role.OUTPUT] | views[Role.INOUT]).items()}


def wrong(case: Case, declaration: Declaration, outputs: dict[str, Codes]) -> int:
    """Elements that the judge refuses."""
    op = ops()[case.problem.op]
    expected = op.expect(case, operands_of(case), declaration)
    if op.expect_given is not None:
        expected = op.expect_given(case, operands_of(case), declaration, outputs)
    return judge_outputs(expected, outputs, {}).wrong


Place = tuple[str, str]
"""(module, name of a function)."""


@contextmanager
def traced() -> Iterator[set[Place]]:
    """Functions of this project that are called inside, by their files."""
    seen: set[Place] = set()

    def watch(frame: types.FrameType, event: str, argument: object) -> None:
        del argument
        if event != "call":
            return
        file = Path(frame.f_code.co_filename)
        for room, folder in ROOMS.items():
            if file.is_relative_to(folder):
                module = ".".join((room, *file.relative_to(folder).with_suffix("").parts))
                seen.add((module.removesuffix(".__init__"), frame.f_code.co_name))

    sys.setprofile(watch)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def of(room: str, seen: set[Place]) -> set[Place]:
    return {place for place in seen if place[0].startswith(f"lowbit.{room}")}


@pytest.mark.parametrize("name", NAMES)
def test_cpu_backend_computes_without_a_function_of_the_references(name: str) -> None:
    """No function of the references runs, those of the records (bits of a format) left aside, and none of the judge; something of
    the cpu room does. The trace sees what it should: the judge's own calls are all references."""
    case = CASES[name]
    declaration = CPU.declare(case.problem, "default")
    operands_of(case)
    with traced() as computing:
        outputs = compute(case)
    shared = {place for place in of("references", computing) if place[0].rpartition(".")[2] not in RECORDS}
    assert shared == set()
    assert {place[0] for place in of("conformance", computing)} <= {"lowbit.conformance.case", "lowbit.conformance.op"}
    assert not {function for _, function in of("references", computing)} & {
        "decode",
        "encode",
        "decode_scalar",
        "order_key",
        "code_of_key",
    }
    assert of("kernels", computing)
    with traced() as judging:
        assert wrong(case, declaration, outputs) == 0
    assert {place for place in of("references", judging) if place[0].rpartition(".")[2] not in RECORDS}
    assert of("kernels", judging) == set()


# Planted defects -----------------------------------------------------------------------------------------------------


def spoiled(value: Any) -> Any:
    """A result with all of its numbers a little wrong: lowest bit of codes, half as much again of reals."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            return value * value.dtype.type(1.5) + value.dtype.type(1)
        return value ^ value.dtype.type(1) if value.dtype.kind in "ui" else value
    if isinstance(value, dict):
        return {key: spoiled(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(spoiled(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        arrays = {f.name: getattr(value, f.name) for f in fields(value) if isinstance(getattr(value, f.name), np.ndarray)}
        return (
            replace(value, **{key: spoiled(item) for key, item in arrays.items() if item.dtype.kind != "b"}) if arrays else value
        )
    return value


def function_at(place: Place) -> types.FunctionType | None:
    """The module-level function behind a traced call, None for methods, lambdas and inner functions."""
    found: Any = getattr(sys.modules[place[0]], place[1], None)
    found = getattr(found, "__wrapped__", found)
    return found if isinstance(found, types.FunctionType) and found.__module__ == place[0] else None


@contextmanager
def planted(function: types.FunctionType, spoil: Callable[[Any], Any]) -> Iterator[None]:
    """The function with a spoiled result, wherever it was imported to: its code is exchanged, not its name."""
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    namespace: dict[str, Any] = {}
    exec("def spoiling(*arguments, **named): return __planted__(*arguments, **named)", namespace)
    kept = function.__code__, function.__defaults__, function.__kwdefaults__
    function.__globals__["__planted__"] = lambda *arguments, **named: spoil(original(*arguments, **named))
    function.__code__, function.__defaults__, function.__kwdefaults__ = namespace["spoiling"].__code__, None, None
    try:
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = kept
        del function.__globals__["__planted__"]


def outcomes(places: set[Place], judge: Callable[[], int]) -> dict[Place, str]:
    """What becomes of the op when each function is spoiled in turn: drift, nothing, or an exception."""
    found = {}
    for place in sorted(places):
        function = function_at(place)
        if function is None or function.__code__.co_freevars:
            continue
        with planted(function, spoiled):
            try:
                found[place] = "drift" if judge() else "nothing"
            except Exception as error:  # a wrong intermediate may break what takes it
                found[place] = type(error).__name__
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_defect_of_either_side_alone_is_drift(name: str) -> None:
    """On each side inner functions, spoiled one at a time, give drift. Put back, the op passes."""
    case = CASES[name]
    declaration = CPU.declare(case.problem, "default")
    with traced() as computing:
        outputs = compute(case)
    with traced() as judging:
        assert wrong(case, declaration, outputs) == 0
    inner = {place for place in of("kernels", computing) if "cpu_room" in place[0] and place[1] != name}
    of_backend = outcomes(inner, lambda: wrong(case, declaration, compute(case)))
    of_judge = outcomes(of("references", judging), lambda: wrong(case, declaration, outputs))
    for side in (of_backend, of_judge):
        assert "drift" in side.values(), side
    assert wrong(case, declaration, compute(case)) == 0
