"""`lowbit bench` without a device: the arithmetic of its figures, what rotates, the order of rounds, the files, the refusals.

Times come from a clock of the tests, so that every figure is known beforehand.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance import bench_device, bench_kernels, cli
from lowbit.conformance.backend import BackendError, TensorView
from lowbit.conformance.bench_device import DeviceMemoryError, Recording, Stopwatch, difference_of
from lowbit.conformance.bench_figures import (
    SCHEMA,
    Class,
    Row,
    best_of,
    classes_of,
    dispatch_of,
    interval,
    left_out_text,
    roof_text,
    table_text,
    to_data,
    to_plot,
    to_table,
)
from lowbit.conformance.bench_kernels import (
    BenchError,
    BenchPlan,
    bench,
    device_of,
    method_of,
    problems_of,
    roof_of,
    subjects_of,
)
from lowbit.conformance.case import Problem
from lowbit.conformance.op import DomainError, ResolvedTensor, Role
from lowbit.conformance.ops import ops
from lowbit.conformance.worker_process import resolve
from lowbit.references.formats import BF16, E4M3FN, Codes, Format, container

IDENTITY = {"op", "variant", "options", "m", "n", "k", "dims", "tactic", "peer"}
"""Fields of rows and classes that say what is timed."""

RATES = {"read": 4e12, "write": 2e12, "fp8": 1e15}


class Clock:
    """A device of the tests: NumPy memory; launches of a kernel take what `speeds` says of it, in microseconds, each round
    `drift` times as long as the one before. Kernels of `hosted` cannot be captured."""

    stream = "the stream"

    def __init__(self, speeds: Mapping[str, float], drift: float = 1.0, hosted: Sequence[str] = ()) -> None:
        self.speeds, self.drift, self.hosted = speeds, drift, hosted
        self.made: list[TensorView] = []
        self.log: list[str] = []
        self.timed: dict[str, int] = {}
        self.now = ""

    def environment(self) -> dict[str, str]:
        return {"device": "a clock"}

    def tensor(self, tensor: ResolvedTensor, block: Codes | None) -> TensorView:
        size = math.prod(tensor.shape)
        memory = np.full(size, 0xFF, np.uint8) if block is None else np.resize(block, size)
        memory = memory.astype(container(tensor.format)).reshape(tensor.shape)
        strides = tuple(step // memory.itemsize for step in memory.strides)
        view = TensorView(tensor.name, tensor.format, tensor.shape, strides, tensor.role, tensor.layout, 0, memory)
        self.made.append(view)
        return view

    def bytes(self, count: int) -> TensorView:
        tensor = next(iter(problem_tensors("fp8_quantize/token/m1k64p1/bf16")))
        return replace(self.tensor(tensor, None), name="workspace", memory=np.zeros(count, np.uint8))

    def copy(self, view: TensorView) -> TensorView:
        return replace(view, memory=view.memory.copy())

    def poison(self, view: TensorView) -> None:
        view.memory.view(np.uint8)[...] = 0xFF

    def restore(self, view: TensorView, kept: TensorView) -> None:
        view.memory[...] = kept.memory

    def difference(self, ours: TensorView, theirs: TensorView) -> float:
        return float(np.mean(ours.memory != theirs.memory))

    def synchronize(self) -> None:
        self.log.append("wait")

    def release(self) -> None:
        self.log.append("release")

    def record(self, launch: Callable[[int], object], copies: int) -> Recording:
        names = [str(launch(index)) for index in range(copies)]
        assert len(set(names)) == 1
        self.timed[names[0]] = 0
        return Recording(lambda: self.log.append(names[0]), copies, names[0] not in self.hosted, 1.0)

    def time(self, recording: Recording, milliseconds: float) -> float:
        recording.play()
        name = self.log[-1]
        self.timed[name] += 1
        return self.speeds[name] * self.drift ** (self.timed[name] - 1)

    def ceilings(self, kinds: Sequence[str]) -> dict[str, float]:
        return {name: rate for name, rate in RATES.items() if name in ("read", "write", *kinds)}


class Vendor:
    """A backend whose kernels write their number and add one to what they change in place, in tensors of `writes` (None: all);
    `calls` are the tensors that each launch was given."""

    target = "cuda"
    device = "cuda:0"

    def __init__(
        self, name: str, tactics: tuple[str, ...] = ("default",), fault: str = "", writes: Sequence[str] | None = None
    ) -> None:
        self.name, self._tactics, self.fault, self.writes = name, tactics, fault, writes
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.prepared = 0

    def supports(self, problem: Problem) -> str | None:
        return "only even M" if dict(problem.dims).get("m") == 3 else None

    def declare(self, problem: Problem, tactic: str) -> Any:
        raise AssertionError("bench judges nothing")

    def tactics(self, problem: Problem) -> tuple[str, ...]:
        return self._tactics

    def workspace(self, problem: Problem, tactic: str) -> int:
        return 5

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        self.prepared += 1
        return dict(constants)

    def run(self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Any, workspace: Any, stream: Any) -> str:
        if tactic == self.fault:
            raise RuntimeError("no kernel image")
        assert stream == "the stream"
        assert workspace.memory.size == 5
        self.calls.append((tactic, state, inputs, outputs))
        for name, view in outputs.items():
            if self.writes is None or name in self.writes:
                view.memory[...] = len(tactic)
        for view in inputs.values():
            if view.role is Role.INOUT and self.writes is None:
                view.memory[...] += 1
        return f"{self.name}.{tactic}"


def problem_tensors(text: str) -> tuple[ResolvedTensor, ...]:
    from lowbit.conformance.op import parse_problem, tensors_of

    problem = parse_problem(text, ops())
    found: tuple[ResolvedTensor, ...] = tensors_of(ops()[problem.op], problem)
    return found


def row(
    m: int = 1, n: int = 8, rounds: tuple[float, ...] = (2.0, 2.0), tactic: str = "t", chosen: bool = True, **more: Any
) -> Row:
    """A row whose median is the middle of `rounds`; its peers were launched from graphs unless `more` says otherwise."""
    us = sorted(rounds)[len(rounds) // 2]
    more = {"peer_graphs": dict.fromkeys(more.get("peers", ()), True)} | more
    figures = (us, 1.0, "memory", 10.0, 20.0, rounds, True)
    return Row("gemm", "plain", "bf16", m, n, 16, f"m{m}n{n}k16", tactic, chosen, "k", *figures, **more)


# figures ----------------------------------------------------------------------------------------------------------------


def test_an_interval_is_the_range_of_the_paired_geometric_means() -> None:
    # round 1: 2/1 and 8/1 -> 4; round 2: 2/2 and 4/4 -> 1; round 3: 16/8 and 2/1 -> 2
    pairs = [((1.0, 2.0, 8.0), (2.0, 2.0, 16.0)), ((1.0, 4.0, 1.0), (8.0, 4.0, 2.0))]
    assert tuple(round(value, 12) for value in interval(pairs)) == (2.0, 1.0, 4.0)


def test_pairing_removes_what_both_share() -> None:
    ours, theirs = (1.0, 2.0, 4.0, 8.0, 16.0), (2.0, 4.0, 8.0, 16.0, 32.0)
    assert interval([(ours, theirs)]) == (2.0, 2.0, 2.0)


def test_a_class_has_the_roof_the_best_peer_of_each_shape_and_the_peers_of_all_shapes() -> None:
    rows = [
        row(n=8, rounds=(2.0, 2.0), peers={"x": 4.0, "y": 8.0}, peer_rounds={"x": (4.0, 4.0), "y": (8.0, 8.0)}),
        row(n=16, rounds=(4.0, 4.0), peers={"x": 32.0, "z": 4.0}, peer_rounds={"x": (32.0, 32.0), "z": (4.0, 4.0)}),
        row(n=16, rounds=(1.0, 1.0), tactic="other", chosen=False),
    ]
    found = {item.peer: item for item in classes_of(rows)}
    assert set(found) == {"roof", "best", "x"}  # y and z are not there for every shape
    assert [round(found[name].ratio, 12) for name in ("best", "x")] == [round(math.sqrt(2.0 * 1.0), 12), 4.0]
    assert round(found["roof"].ratio, 12) == round(math.sqrt(1 / 8), 12)
    assert found["x"] == Class("gemm", "plain", "bf16", 1, "x", 2, found["x"].ratio, found["x"].low, found["x"].high)


def test_peers_launched_by_another_method_are_marked_named_and_not_compared() -> None:
    # x is the fastest of the first shape, from the host; y, from a graph as ours, is the fastest that may be compared
    rows = [
        row(n=8, rounds=(2.0,), peers={"x": 1.0, "y": 6.0, "z": 8.0}, peer_rounds={"x": (1.0,), "y": (6.0,), "z": (8.0,)},
            peer_graphs={"x": False, "y": True, "z": True}),
        row(n=16, rounds=(2.0,), peers={"x": 4.0, "y": 6.0}, peer_rounds={"x": (4.0,), "y": (6.0,)}),
    ]
    assert best_of(rows[0]) == "y"
    assert best_of(row(peers={"x": 1.0}, peer_graphs={"x": False})) is None
    found = {item.peer: item for item in classes_of(rows)}
    assert set(found) == {"roof", "best", "y"}
    assert round(found["best"].ratio, 12) == round(math.sqrt(3.0 * 2.0), 12)  # y, then x: 6 / 2 and 4 / 2
    assert found["best"].unlike == ("x",)
    assert left_out_text(found["best"]) == "launched by another method than ours: x"
    heads, cells = to_table(rows)
    assert cells[0][heads.index("x")] == "0.50 h"
    assert cells[0][heads.index("best")] == "3.00"
    assert cells[1][heads.index("x")] == "2.00"
    assert to_plot(rows[:1]).split("\n")[1][49 + 8] == "|"  # 1 / 6 of 50 characters, not the whole of them for x
    host = replace(rows[0], graph=False)
    assert best_of(host) == "x"  # both from the host
    assert {item.peer for item in classes_of([host])} == {"roof", "best", "x"}
    assert classes_of([host])[0].unlike == ("y", "z")


def test_a_class_names_the_peers_that_raised() -> None:
    rows = [
        row(n=8, peers={"x": 4.0}, peer_rounds={"x": (4.0, 4.0)}, peer_errors={"fast": "RuntimeError: no image"}),
        row(n=16, peers={"x": 4.0, "fast": 2.0}, peer_rounds={"x": (4.0, 4.0), "fast": (2.0, 2.0)}),
    ]
    found = {item.peer: item for item in classes_of(rows)}
    assert set(found) == {"roof", "best", "x"}
    assert all(item.failed == ("fast",) for item in found.values())
    assert left_out_text(found["best"]) == "raised: fast"
    alone = classes_of([row(peer_errors={"b": "", "a": ""})])
    assert [(item.peer, item.failed) for item in alone] == [("roof", ("a", "b"))]  # also where no peer is left
    assert left_out_text(classes_of([row()])[0]) == ""
    both = Class("gemm", "plain", "bf16", 1, "best", 1, 1.0, 1.0, 1.0, ("a", "b"), ("c",))
    assert left_out_text(both) == "raised: a, b; launched by another method than ours: c"


def test_the_roof_and_the_method_say_what_they_are_not() -> None:
    said = roof_text(RATES)
    for text in ("reached by torch in this run", "not the most that the device can reach", "leaves out the spread of the rates"):
        assert text in said
    method = method_of(BenchPlan())
    assert "overlap" in method["launches"]
    assert "not the latency of a single launch" in method["launches"]


def test_the_dispatch_table_names_the_fastest_tactic_of_each_problem() -> None:
    rows = [row(rounds=(2.0,), tactic="slow"), row(rounds=(1.5,), tactic="fast"), row(m=2, rounds=(3.0,), tactic="slow")]
    assert dispatch_of(rows) == {"gemm/plain/bf16": [["m1n8k16", "fast", 1.5], ["m2n8k16", "slow", 3.0]]}


def test_table_and_plot_show_ratios_and_shares() -> None:
    rows = [row(rounds=(2.0,), peers={"x": 3.0, "y": 1.0}), replace(row(m=2, rounds=(4.0,)), graph=False)]
    heads, cells = to_table(rows)
    assert heads == ("problem", "us", "TFLOP/s", "GB/s", "roof", "best", "x", "y")
    assert cells[0] == ("gemm/plain/m1n8k16/bf16", "2.00", "10", "20", "50%", "0.50", "1.50", "0.50")
    assert cells[1] == ("gemm/plain/m2n8k16/bf16", "4.00 h", "10", "20", "25%", "", "", "")
    lines = table_text(rows).split("\n")
    assert lines == [
        "problem                      us  TFLOP/s  GB/s  roof  best     x     y",
        "gemm/plain/m1n8k16/bf16    2.00       10    20   50%  0.50  1.50  0.50",
        "gemm/plain/m2n8k16/bf16  4.00 h       10    20   25%",
    ]
    tuned, _ = to_table([*rows, row(tactic="u", chosen=False)])
    assert tuned[1] == "tactic"
    head, first, second = to_plot(rows).split("\n")
    assert head.endswith("100%")
    assert first.count("█") == 25
    assert first.endswith("50%")
    assert first[49 + 49] == "|"
    assert second.count("█") == 12
    assert second.count("·") == 38


def test_json_has_the_promised_fields() -> None:
    data = json.loads(json.dumps(to_data({"backend": "b"}, RATES, [row(peers={"x": 3.0}, peer_rounds={"x": (3.0, 3.0)})])))
    assert data["schema"] == SCHEMA == "lowbit.bench/2"
    assert data["backend"] == "b"
    assert "dispatch" not in data
    assert {"op", "variant", "m", "n", "k", "tactic", "us", "roof_us", "peers"} <= set(data["rows"][0])
    assert data["rows"][0]["peers"] == {"x": 3.0}
    assert data["rows"][0]["peer_graphs"] == {"x": True}
    assert all(item["failed"] == item["unlike"] == [] for item in data["classes"])
    assert data["roof"]["per_second"] == RATES
    assert "4.00 TB/s" in data["roof"]["how"]
    assert "fp8 1000 TFLOP/s" in data["roof"]["how"]
    assert {item["peer"] for item in data["classes"]} == {"roof", "best", "x"}
    assert "dispatch" in to_data({}, RATES, [row(), row(tactic="u", chosen=False)])
    assert "none needed" in roof_text({"read": 1e12, "write": 1e12})


# problems ---------------------------------------------------------------------------------------------------------------


def test_the_default_is_36_shapes_of_a_gemm() -> None:
    found = problems_of(BenchPlan(("gemm_w4a8_fp8/exact",)))
    assert len(found) == 36
    assert {problem.variant for problem in found} == {"exact"}
    assert {problem.dim("m") for problem in found} == {1, 32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert {(problem.dim("k"), problem.dim("n")) for problem in found} == {
        (12288, 14336), (12288, 12288), (12288, 73728), (36864, 12288)}
    weights = [tuple(pair for pair in problem.dims if pair[0] != "m") for problem in found]
    assert sum(a != b for a, b in itertools.pairwise(weights)) == 3  # those of one weight matrix follow each other


def test_every_op_has_problems_by_default() -> None:
    assert {problem.op for problem in problems_of(BenchPlan())} == set(ops())


def test_shapes_and_options_are_read() -> None:
    found = problems_of(BenchPlan(("gemm_w8a8_fp8/scaled/f16.bias",), "1,7@64x32,8x16"))
    assert [str(problem) for problem in found] == [
        "gemm_w8a8_fp8/scaled/m1n64k32/f16.bias", "gemm_w8a8_fp8/scaled/m7n64k32/f16.bias",
        "gemm_w8a8_fp8/scaled/m1n8k16/f16.bias", "gemm_w8a8_fp8/scaled/m7n8k16/f16.bias"]


@pytest.mark.parametrize(("names", "shapes", "said"), [
    (("gemm",), "", "unknown op 'gemm'"), ((), "1", "malformed"), ((), "1@64", "malformed"), ((), "a@64x64", "M 'a' is"),
    ((), "1@64x0", "K '0' is malformed"), (("gemm_w8a8_fp8/other",), "", "no variant 'other'"),
    (("gemm_w8a8_fp8/scaled/fp7",), "", "option token 'fp7'"), (("gemm_w8a8_fp8/scaled",), "1@64x40", "W8A8-1"),
])
def test_malformed_plans_are_refused(names: tuple[str, ...], shapes: str, said: str) -> None:
    with pytest.raises(DomainError, match=said):
        problems_of(BenchPlan(names, shapes))


def test_demand_counts_every_operand_once_at_its_width() -> None:
    op = ops()["gemm_w4a8_fp8"]
    problem = problems_of(BenchPlan(("gemm_w4a8_fp8/folded",), "32@14336x12288"))[0]
    m, n, k = 32, 14336, 12288
    assert roof_of(op, problem) == (m * k + k * n // 2 + k * n // 128 + 4 * m + 4 * n, 2 * m * n, 2 * m * n * k, "fp8")
    quantiser = problems_of(BenchPlan(("fp8_quantize/token",), "32@64x128"))[0]
    assert roof_of(ops()["fp8_quantize"], quantiser) == (2 * 32 * 128, 32 * 128 + 4 * 32, 0.0, "")
    nvfp4 = problems_of(BenchPlan(("gemm_nvfp4/plain",), "32@64x128"))[0]
    assert roof_of(ops()["gemm_nvfp4"], nvfp4)[0] == (32 + 64) * 128 // 2 + (32 + 64) * 128 // 16 + 4


# the run ----------------------------------------------------------------------------------------------------------------


GEMM = BenchPlan(("gemm_w8a8_fp8/scaled",), "1,2@64x32")


def test_weights_rotate_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "ROTATION", 3 * (64 * 32 + 4 * 64))
    vendor = Vendor("v")
    bench(GEMM, vendor, (), Clock({"v.default": 1.0}))
    assert vendor.prepared == 2 * 3
    calls = vendor.calls[:4]  # the first launch, then one of each copy
    weights = [id(state["w"].memory) for _, state, _, _ in calls]
    assert weights[0] == weights[1]
    assert len(set(weights)) == 3
    assert len({id(inputs["a"].memory) for *_, inputs, _ in calls}) == 1
    assert len({id(outputs["d"].memory) for *_, outputs in calls}) == 1
    first, second = calls[1][1], calls[2][1]
    assert (first["w"].memory != second["w"].memory).mean() > 0.5  # other weights, not the same ones elsewhere
    assert not np.isin(first["w"].memory, (0x7F, 0xFF)).any()  # no NaN
    assert {id(state["w"].memory) for _, state, _, _ in vendor.calls} == set(weights)  # M = 2 runs on the same weights


def test_without_constants_everything_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "ROTATION", 4 * (3 * 2 * 64 + 4 * 2))
    vendor = Vendor("v")
    bench(BenchPlan(("fp8_quantize/token",), "2@64x64"), vendor, (), Clock({"v.default": 1.0}))
    calls = vendor.calls[1:5]
    assert len({id(inputs["x"].memory) for *_, inputs, _ in calls}) == 4
    assert len({id(outputs["q"].memory) for *_, outputs in calls}) == 4


def test_small_operands_rotate_through_a_bounded_number_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 5)
    vendor = Vendor("v")
    bench(replace(GEMM, shapes="1@64x32"), vendor, (), Clock({"v.default": 1.0}))
    assert vendor.prepared == 5


def test_counts_add_up_to_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    clock = Clock({"v.default": 1.0})
    bench(BenchPlan(("gemm_w4a8_fp8_grouped/folded",), "33@64x128"), Vendor("v"), (), clock)
    counts = next(view.memory for view in clock.made if view.name == "counts")
    assert counts.sum() == 33
    assert counts.size == 8
    assert counts.max() - counts.min() == 1


def test_rounds_alternate_and_every_round_times_everybody_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    vendor, peer = Vendor("v"), Vendor("p", ("one", "two", "bad"), fault="bad")
    clock = Clock({"v.default": 8.0, "p.one": 16.0, "p.two": 4.0}, drift=2.0)
    rates, rows = bench(replace(GEMM, shapes="1@64x32", rounds=6), vendor, [(peer, True)], clock)
    played = [name for name in clock.log if "." in name]
    rounds = [played[i : i + 3] for i in range(0, 18, 3)]
    assert len(played) == 18
    assert all(set(order) == {"v.default", "p.one", "p.two"} for order in rounds)
    assert {order[0] for order in rounds} == {"v.default", "p.one", "p.two"}  # nobody is always first
    (only,) = rows
    assert only.rounds == (8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
    assert only.us == 48.0
    assert only.peers == {"one": 96.0, "two": 24.0}
    assert only.peer_errors == {"bad": "RuntimeError: no kernel image"}
    assert only.differences == {"one": 1.0, "two": 1.0}  # 7 was written by ours, 3 by theirs
    read, write = 32 + 64 * 32 + 4 + 4 * 64, 2 * 64
    assert only.roof == "memory"
    assert only.roof_us == (read / 4e12 + write / 2e12) * 1e6
    assert only.tflops == 2 * 64 * 32 / 48.0 / 1e6
    assert only.gbs == (read + write) / 48.0 / 1e3
    assert [item.ratio for item in classes_of(rows) if item.peer in ("best", "one")] == [0.5, 2.0]
    assert rates == RATES


@pytest.mark.parametrize("count", range(2, 16))
def test_each_competitor_is_first_and_last_before_and_after_each_other_equally_often(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    names = tuple(f"t{i:02}" for i in range(count - 1))
    clock = Clock({"v.default": 1.0} | {f"p.{name}": 1.0 for name in names})
    bench(replace(GEMM, shapes="1@64x32", rounds=max(2 * count, 5)), Vendor("v"), [(Vendor("p", names), True)], clock)
    played = [name for name in clock.log if "." in name]
    everybody = {"v.default", *(f"p.{name}" for name in names)}
    orders = [tuple(played[i * count : (i + 1) * count]) for i in range(2 * count)]
    assert len(everybody) == count
    assert all(set(order) == everybody for order in orders)
    assert len(set(orders)) == min(2 * count, math.factorial(count))
    for place in range(count):
        assert [sum(order[place] == name for order in orders) for name in everybody] == [2] * count
    for one, other in itertools.combinations(everybody, 2):
        assert sum(order.index(one) < order.index(other) for order in orders) == count
    assert orders[0] != orders[1]


def test_a_peer_that_writes_nothing_shows_as_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    clock = Clock({name: 1.0 for name in ("v.default", "same.default", "idle.default", "half.default")})
    peers = [Vendor("same"), Vendor("idle", writes=()), Vendor("half", writes=("q",))]
    _, rows = bench(BenchPlan(("fp8_quantize/token",), "2@64x64"), Vendor("v"), [(peer, False) for peer in peers], clock)
    assert rows[0].differences == {"same": 0.0, "idle": 1.0, "half": 1.0}  # half left the scales alone


def test_a_tensor_changed_in_place_is_restored_for_each_competitor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    clock = Clock({name: 1.0 for name in ("v.default", "same.default", "idle.default")})
    peers = [Vendor("same"), Vendor("idle", writes=())]
    _, rows = bench(BenchPlan(("int4_pack/b8",), "1@64x64"), Vendor("v"), [(peer, False) for peer in peers], clock)
    assert rows[0].differences == {"same": 0.0, "idle": 1.0}


def test_a_peer_that_cannot_be_captured_is_known_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    clock = Clock({"v.default": 2.0, "p.a": 1.0, "p.b": 3.0}, hosted=("p.a",))
    _, rows = bench(replace(GEMM, shapes="1@64x32"), Vendor("v"), [(Vendor("p", ("a", "b")), True)], clock)
    assert rows[0].graph
    assert rows[0].peer_graphs == {"a": False, "b": True}
    assert best_of(rows[0]) == "b"


def test_a_kernel_of_ours_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    with pytest.raises(BenchError, match=r"bench v: tactic 'bad' on gemm_w8a8_fp8/scaled/m1n64k32/bf16 raised RuntimeError"):
        bench(replace(GEMM, shapes="1@64x32"), Vendor("v", ("bad",), fault="bad"), (), Clock({}))


# the stopwatch, on the host ---------------------------------------------------------------------------------------------


class Event:
    """An event of a device that does nothing."""

    def __init__(self, enable_timing: bool) -> None:
        self.marked = 0

    def record(self, stream: Any) -> None:
        self.marked += 1

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Graph:
    """A graph whose capture ends as `ends` says."""

    ends: Exception | None = None

    def capture_begin(self, pool: Any) -> None:
        pass

    def capture_end(self) -> None:
        if self.ends is not None:
            raise self.ends

    def replay(self) -> None:
        pass


def stopwatch(graph: type[Graph]) -> Stopwatch:
    """A stopwatch over a runtime of the tests."""
    watch = object.__new__(Stopwatch)
    watch.device = SimpleNamespace(name="cuda", index=0, synchronize=lambda: None)
    watch.stream = SimpleNamespace(synchronize=lambda: None)
    watch._torch = torch
    watch._pool = "pool"
    watch._runtime = SimpleNamespace(
        Event=Event, CUDAGraph=graph, stream=lambda stream: nullcontext(), empty_cache=lambda: None)
    return watch


def test_what_cannot_be_captured_is_timed_from_the_host_and_says_so() -> None:
    class Refuses(Graph):
        ends = RuntimeError("operation not permitted when stream is capturing")

    assert stopwatch(Graph).record(lambda index: None, 2).graph
    assert not stopwatch(Refuses).record(lambda index: None, 2).graph


def test_memory_that_runs_out_is_an_error_and_no_reason_to_time_from_the_host() -> None:
    class Invalid(Graph):
        ends = RuntimeError("capture was invalidated")

    def launch(index: int) -> None:
        launches.append(index)
        if len(launches) == 6:  # the first in the capture: one alone and two to guess by come before, and two are a launch each
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for graph in (Graph, Invalid):  # the end of the capture hides the error, or does not
        launches: list[int] = []
        with pytest.raises(DeviceMemoryError, match="cuda:0 is out of memory for launches"):
            stopwatch(graph).record(launch, 2)
        assert len(launches) == 6


def test_operands_without_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*sizes: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    watch = stopwatch(Graph)
    watch._place = "cpu"
    watch._torch = SimpleNamespace(int16=torch.int16, uint8=torch.uint8, empty=empty)
    tensor = next(each for each in problem_tensors("gemm_w8a8_fp8/scaled/m1n64k32/bf16") if each.name == "d")
    with pytest.raises(DeviceMemoryError, match="out of memory for tensor 'd' of 128 bytes"):
        watch.tensor(tensor, None)


def view_of(codes: Sequence[int], format: Format) -> TensorView:
    memory = torch.tensor(codes, dtype=torch.int32).to(torch.uint8 if format.bits == 8 else torch.int16)
    return TensorView("d", format, (len(codes),), (1,), Role.OUTPUT, "", 0, memory)


@pytest.mark.parametrize(("ours", "theirs", "format", "expected"), [
    ((0x4040, 0x4080), (0x4040, 0x4080), BF16, 0.0),  # 3 and 4
    ((0x4040, 0x4080), (0xFFFF, 0xFFFF), BF16, 1.0),  # nothing was written
    ((0x4040, 0x4080), (0x4040, 0xFFFF), BF16, 0.8),  # 4 of 5 are missing: sqrt(9 + 16) = 5
    ((0x4040, 0x4080), (0x4080, 0x4040), BF16, 0.282842712475),  # sqrt(1 + 1) / 5
    ((0, 0), (0xFFFF, 0xFFFF), BF16, 1.0),
    ((0, 0), (0, 0), BF16, 0.0),
    ((1, 2, 3, 4), (1, 2, 3, 0xFF), E4M3FN, 0.25),
])
def test_a_difference_is_finite_and_sees_what_was_not_written(
    ours: Sequence[int], theirs: Sequence[int], format: Format, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for piece in (1, 3, 1 << 22):
        monkeypatch.setattr(bench_device, "_COMPARED", piece)
        assert round(difference_of(torch, view_of(ours, format), view_of(theirs, format)), 12) == expected


def test_the_stopwatch_poisons_and_restores() -> None:
    watch, view = stopwatch(Graph), view_of((0x4040, 0x4080), BF16)
    kept = watch.copy(view)
    watch.poison(view)
    assert view.memory.tolist() == [-1, -1]
    watch.restore(view, kept)
    assert view.memory.tolist() == [0x4040, 0x4080]


def test_the_roof_of_a_large_product_is_the_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    monkeypatch.setitem(RATES, "fp8", 1e9)
    _, rows = bench(replace(GEMM, shapes="2@64x32"), Vendor("v"), (), Clock({"v.default": 1.0}))
    assert rows[0].roof == "matrix"
    assert rows[0].roof_us == 2 * 2 * 64 * 32 / 1e9 * 1e6


def test_tuning_times_every_tactic_and_says_which_is_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    vendor = Vendor("v", ("one", "three"))
    told: list[int] = []
    clock = Clock({"v.one": 3.0, "v.three": 2.0})
    _, rows = bench(replace(GEMM, shapes="1@64x32", tune=True), vendor, (), clock, lambda rates, rows: told.append(len(rows)))
    assert [(item.tactic, item.us, item.chosen) for item in rows] == [("one", 3.0, True), ("three", 2.0, False)]
    assert told == [1, 2]
    assert dispatch_of(rows)["gemm_w8a8_fp8/scaled/bf16"] == [["m1n64k32", "three", 2.0]]
    _, rows = bench(replace(GEMM, shapes="1@64x32"), vendor, (), clock)
    assert [item.tactic for item in rows] == ["one"]


def test_what_a_backend_does_not_take_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    clock = Clock({"v.default": 1.0})
    _, rows = bench(replace(GEMM, shapes="1,3@64x32"), Vendor("v"), (), clock)
    assert [item.m for item in rows] == [1]
    with pytest.raises(DomainError, match="only even M"):
        bench(replace(GEMM, shapes="3@64x32"), Vendor("v"), (), clock)


def test_a_registered_peer_stands_for_what_it_dispatches() -> None:
    problem = problems_of(GEMM)[0]
    peer = Vendor("p", ("one", "two"))
    assert [(item.name, item.tactic) for item in subjects_of(peer, problem, False)] == [("p", "one")]
    assert [(item.name, item.tactic) for item in subjects_of(peer, problem, True)] == [("one", "one"), ("two", "two")]
    assert [item.name for item in subjects_of(Vendor("p"), problem, True)] == ["p"]
    assert subjects_of(peer, problems_of(replace(GEMM, shapes="3@64x32"))[0], True) == ()


@pytest.mark.parametrize(
    ("peers", "name"),
    [
        (((Vendor("p"), False), (Vendor("p"), False)), "p"),
        (((Vendor("p", ("one", "two")), True), (Vendor("q", ("three", "two")), True)), "two"),
        (((Vendor("p", ("two", "one")), True), (Vendor("two"), False)), "two"),
    ],
)
def test_two_peers_of_one_name_are_refused_before_anything_is_timed(peers: Sequence[tuple[Vendor, bool]], name: str) -> None:
    ours = Vendor("v")
    with pytest.raises(DomainError, match=f"m1n.*two peers are called '{name}'.*rename the tactic of one"):
        bench(replace(GEMM, shapes="3,1@64x32"), ours, peers, Clock({}))
    assert not ours.calls
    assert not ours.prepared


# refusals and the command -----------------------------------------------------------------------------------------------


def test_a_backend_that_does_not_run_on_a_device_is_refused() -> None:
    with pytest.raises(BackendError, match="computes on the host here"):
        device_of(SimpleNamespace(name="x", device="host"))
    with pytest.raises(BackendError, match="compiled, not executed on this machine"):
        device_of(SimpleNamespace(name="x", device="host", execution="compiled"))
    assert device_of(Vendor("v")) == "cuda:0"


def test_the_command_refuses_the_host_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "cpu"])
    said = capsys.readouterr().err
    assert ended.value.code == 4
    assert said.count("\n") == 1
    assert "computes on the host" in said


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "bench.md").read_text(encoding="utf-8")


class Exact(Vendor):
    """gemm_w8a8_fp8/scaled in binary64, rounded once to bf16."""

    def run(self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Any, workspace: Any, stream: Any) -> str:
        a, w = (codes.memory.view(torch.float8_e4m3fn).double() for codes in (inputs["a"], state["w"]))
        token, channel = (codes.memory.view(torch.float32).double() for codes in (inputs["token_scale"], state["channel_scale"]))
        outputs["d"].memory.view(torch.bfloat16)[...] = (a @ w.t()) * token[:, None] * channel
        return "exact"


def test_the_peer_of_the_page_runs_and_computes_what_ours_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    file = tmp_path / "peers.py"
    file.write_text(PAGE.split("```python\n")[1].split("```")[0], encoding="utf-8")
    watch = stopwatch(Graph)
    watch._place = "cpu"
    monkeypatch.setattr(watch, "ceilings", lambda kinds: RATES)
    plan = replace(GEMM, shapes="2@64x32")
    _, rows = bench(plan, Exact("exact"), [(resolve(f"python:{file}:Peers"), True)], watch)
    assert rows[0].peer_errors == {}
    assert rows[0].peer_graphs == {"torch_bf16": True}
    assert 0.0 < rows[0].differences["torch_bf16"] < 2.0**-7  # a, w and both D are rounded to 8 bits: 2^-9 of their value each


def test_the_page_names_the_schema_and_every_field() -> None:
    data = to_data({}, RATES, [row(peers={"x": 1.0}, peer_rounds={"x": (1.0, 1.0)}), row(tactic="u", chosen=False)])
    assert f"`{SCHEMA}`" in PAGE
    for name in (*data, *data["roof"], *(set(data["classes"][0]) - IDENTITY), *(set(data["rows"][0]) - IDENTITY)):
        assert f"`{name}`" in PAGE


def test_the_command_names_a_kernel_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    monkeypatch.setattr(bench_device, "Stopwatch", lambda name: Clock({}))
    monkeypatch.setitem(sys.modules, "tests_of_bench", SimpleNamespace(Vendor=Vendor))
    door = tmp_path / "door.py"
    door.write_text("from tests_of_bench import Vendor\nOURS = Vendor('ours', fault='default')\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", f"python:{door}:OURS", "--ops", "gemm_w8a8_fp8/scaled", "--shapes", "1@64x32"])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("lowbit: bench ours: tactic 'default' on gemm_w8a8_fp8/scaled/m1n64k32/bf16 raised RuntimeError")
    assert said.count("\n") == 1


_DOOR = '''
from tests_of_bench import Vendor
OURS = Vendor("ours")
THEIRS = Vendor("theirs", ("alpha", "beta", "gamma", "delta"), fault="gamma")
'''


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "COPIES", 2)
    speeds = {"ours.default": 2.0, "theirs.alpha": 3.0, "theirs.beta": 4.0, "theirs.delta": 1.0}
    monkeypatch.setattr(bench_device, "Stopwatch", lambda name: Clock(speeds, hosted=("theirs.delta",)))
    monkeypatch.setitem(sys.modules, "tests_of_bench", SimpleNamespace(Vendor=Vendor))
    door, out = tmp_path / "door.py", tmp_path / "figures.json"
    door.write_text(_DOOR, encoding="utf-8")
    arguments = ["--ops", "gemm_w8a8_fp8/scaled", "--shapes", "1@64x32", "--against", f"python:{door}:THEIRS", "--json", str(out)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", f"python:{door}:OURS", *arguments])
    caught = capsys.readouterr()
    shown = caught.out
    assert ended.value.code == 0
    assert "fastest peer 3.00" in caught.err  # delta took 1.00, from the host
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["backend"] == "ours"
    assert data["environment"] == {"device": "a clock"}
    assert data["method"]["rounds"] == 5
    assert data["rows"][0]["us"] == 2.0
    assert data["rows"][0]["peers"] == {"alpha": 3.0, "beta": 4.0, "delta": 1.0}
    assert "latency" in data["method"]["launches"]
    assert {item["peer"]: item["failed"] for item in data["classes"]}["best"] == ["gamma"]
    line = "gemm_w8a8_fp8/scaled/bf16 m1: not in best: raised: gamma; launched by another method than ours: delta"
    assert shown.split("\n").count(line) == 1
    for text in (
        "1.50", "2.00", "0.50 h", "best / ours 1.500 (1.500 to 1.500), 1 shape(s)", "share of the roof", "roof_us is the",
        "reached by torch in this run",
    ):
        assert text in shown


def test_the_real_stopwatch_refuses_a_machine_without_an_accelerator() -> None:
    from lowbit.conformance.device import DeviceError

    with pytest.raises(DeviceError, match="no events to time by"):
        bench_device.Stopwatch("host")
