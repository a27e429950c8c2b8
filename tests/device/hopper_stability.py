"""Does cuda_hopper give the same bits whatever surrounds a launch? Graphs, streams, places, sequences, devices, torch.compile.

Decides: nothing about arithmetic. Each form is compared bit for bit with the plain call on the same operands, which `lowbit
certify` judges. Asked are, per problem and tactic: 100 replays of a captured graph with operands that change from replay to
replay; a side stream on which the operands arrive late; operands and outputs 16 bytes further on; other problems in a seeded
order in between; a second device, where there is one. Asked of the operators of torch: torch.library.opcheck,
torch.compile(fullgraph=True), inference mode.
Refuses: tolerances, and machines without a device of compute capability 9.0.

    python tests/device/hopper_stability.py --json hopper_stability.json [--ops OP,OP] [--per-op 4]

Ends with 0, or with 1 where any bit differed or a form failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.conformance.backend import Problem, Role, TensorView
from lowbit.conformance.case import Case
from lowbit.conformance.op import Op, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.stability import stability_cases
from lowbit.kernels import cuda_hopper

__all__ = ["Form", "main"]

CUDA: Any = torch.cuda  # parts of it have no types
REPLAYS, SEEDS, SEQUENCE = 100, 5, 300
SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SLEEP = 20_000_000  # cycles before late operands arrive: about 10 ms


@dataclass(frozen=True, slots=True)
class Form:
    """One form of one problem: how many results were compared, how many differed, and what was raised."""

    form: str
    name: str
    compared: int
    differing: int
    raised: str = ""


@dataclass(slots=True, eq=False)
class Run:
    """A problem and tactic with its tensors on a device, and the operands of several seeds to bring into them."""

    backend: Any
    problem: Problem
    tactic: str
    device: str
    shift: int = 0
    views: dict[str, TensorView] = field(default_factory=dict)
    drawn: list[dict[str, torch.Tensor]] = field(default_factory=list)
    state: Any = None
    room: TensorView | None = None

    def prepare(self) -> None:
        """Draw the operands, allocate, and hand the constants over (those of the first seed stay)."""
        op = ops()[self.problem.op]
        pattern = "normal" if "normal" in op.patterns else op.patterns[0]
        for seed in range(SEEDS):
            operands = draw_operands(op, Case(self.problem, pattern, seed))
            self.drawn.append({name: self.put(operands[name].codes) for name in _given(op, self.problem)})
        for tensor in tensors_of(op, self.problem):
            if tensor.role is Role.OUTPUT:
                dtype = SIGNED[np.dtype(f"u{max(1, -(-tensor.format.bits // 8))}").itemsize]
                memory = self.shifted(torch.zeros(tensor.shape, dtype=dtype, device=self.device))
            else:
                memory = self.shifted(self.drawn[0][tensor.name])
            self.views[tensor.name] = TensorView(
                tensor.name, tensor.format, tuple(tensor.shape), tuple(memory.stride()), tensor.role, tensor.layout,
                memory.data_ptr(), memory,
            )
        self.state = self.backend.prepare(self.problem, self.tactic, self.among(Role.CONSTANT))
        size = self.backend.workspace(self.problem, self.tactic)
        if size:
            memory = self.shifted(torch.full((size,), 0xFF, dtype=torch.uint8, device=self.device))
            like = next(iter(self.views.values()))
            self.room = TensorView("workspace", like.format, (size,), (1,), Role.OUTPUT, "", memory.data_ptr(), memory)

    def put(self, codes: Any) -> torch.Tensor:
        array = np.ascontiguousarray(codes)
        return torch.from_numpy(array.view({1: np.uint8, 2: np.int16, 4: np.int32}[array.itemsize])).to(self.device)

    def shifted(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy whose first element lies `shift` bytes into its memory."""
        skipped = self.shift // tensor.element_size()
        memory = torch.zeros(tensor.numel() + skipped, dtype=tensor.dtype, device=self.device)
        found = memory[skipped:].view(tensor.shape)
        found.copy_(tensor)
        return found

    def among(self, *roles: Role) -> dict[str, TensorView]:
        return {name: view for name, view in self.views.items() if view.role in roles}

    def bring(self, seed: int) -> None:
        """Copy the operands of a seed into place, on the current stream."""
        for name, view in self.among(Role.ACTIVATION, Role.INOUT).items():
            view.memory.copy_(self.drawn[seed % SEEDS][name])

    def launch(self, stream: Any = None) -> None:
        with nullcontext() if stream is None else CUDA.stream(stream):
            inputs = self.backend.stage(self.problem, self.tactic, self.among(Role.ACTIVATION, Role.INOUT))
        self.backend.run(self.problem, self.tactic, self.state, inputs, self.among(Role.OUTPUT), self.room, stream)

    def poison(self) -> None:
        for view in self.among(Role.OUTPUT).values():
            view.memory.fill_(0x5A)

    def results(self) -> list[torch.Tensor]:
        return [view.memory.clone() for view in self.among(Role.OUTPUT, Role.INOUT).values()]

    def plain(self, seed: int) -> list[torch.Tensor]:
        """The results of the plain call."""
        self.poison()
        self.bring(seed)
        self.launch()
        torch.cuda.synchronize(self.device)
        return self.results()


def _given(op: Op, problem: Problem) -> set[str]:
    return {tensor.name for tensor in tensors_of(op, problem) if tensor.role is not Role.OUTPUT}


def unequal(left: list[torch.Tensor], right: list[torch.Tensor]) -> int:
    return sum(int((a.to(b.device) != b).sum()) for a, b in zip(left, right, strict=True))


def graph_replays(run: Run, wanted: list[list[torch.Tensor]]) -> Iterator[int]:
    side = CUDA.Stream(run.device)
    with torch.cuda.stream(side):
        run.launch()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            run.launch()
    for replay in range(REPLAYS):
        run.poison()
        run.bring(replay)
        graph.replay()
        yield unequal(run.results(), wanted[replay % SEEDS])


def late_operands(run: Run, wanted: list[list[torch.Tensor]]) -> Iterator[int]:
    """Nothing but the order of the side stream says that the operands come first."""
    side = CUDA.Stream(run.device)
    for seed in range(3):
        run.poison()
        run.bring(seed + 1)
        torch.cuda.synchronize(run.device)
        with torch.cuda.stream(side):
            CUDA._sleep(SLEEP)
            run.bring(seed)
        run.launch(side) if seed % 2 else _on(side, run.launch)
        side.synchronize()
        yield unequal(run.results(), wanted[seed])


def _on(stream: Any, call: Callable[[], Any]) -> None:
    with torch.cuda.stream(stream):
        call()


def elsewhere(run: Run, wanted: list[list[torch.Tensor]], device: str, shift: int) -> Iterator[int]:
    """The same problem 16 bytes further on, or on another device while the current one stays."""
    other = Run(run.backend, run.problem, run.tactic, device, shift)
    other.prepare()
    for seed in range(2):
        yield unequal(other.plain(seed), wanted[seed])


def asked(form: str, name: str, results: Iterator[int]) -> Form:
    count = differing = 0
    try:
        for found in results:
            count, differing = count + 1, differing + int(found > 0)
    except Exception as error:
        torch.cuda.synchronize()
        return Form(form, name, count, differing, f"{type(error).__name__}: {str(error)[:300]}")
    return Form(form, name, count, differing)


def problem_forms(backend: Any, names: tuple[str, ...], per_op: int, per_problem: int) -> Iterator[Form]:
    runs: list[tuple[Run, list[list[torch.Tensor]]]] = []
    for name in names:
        cases = [case for case in stability_cases(ops()[name], 64) if backend.supports(case.problem) is None]
        first = {case.problem.variant: case for case in reversed(cases)}  # every variant before any comes again
        chosen = [*first.values(), *(case for case in cases if case not in first.values())]
        for case in chosen[: max(per_op, len(first))]:
            for tactic in backend.tactics(case.problem)[:per_problem]:
                run, title = Run(backend, case.problem, tactic, backend.device), f"{case.problem} {tactic}"
                try:
                    run.prepare()
                    wanted = [run.plain(seed) for seed in range(SEEDS)]
                except Exception as error:
                    yield Form("plain", title, 0, 0, f"{type(error).__name__}: {str(error)[:300]}")
                    continue
                runs.append((run, wanted))
                yield asked("100 graph replays, operands changed", title, graph_replays(run, wanted))
                yield asked("late operands on a side stream", title, late_operands(run, wanted))
                yield asked("16 bytes further on", title, elsewhere(run, wanted, backend.device, 16))
                if torch.cuda.device_count() > 1:
                    yield asked("second device", title, elsewhere(run, wanted, "cuda:1", 0))
    draw = np.random.default_rng(7)

    def sequence() -> Iterator[int]:
        for _ in range(SEQUENCE if runs else 0):
            run, wanted = runs[int(draw.integers(len(runs)))]
            seed = int(draw.integers(SEEDS))
            yield unequal(run.plain(seed), wanted[seed])

    yield asked("random sequence", f"{len(runs)} problems and tactics", sequence())


# Operators of torch --------------------------------------------------------------------------------------------------


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments for each operator."""
    draw = torch.Generator(device="cuda").manual_seed(3)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, generator=draw)
    words = torch.randint(-(1 << 31), 1 << 31, (64, 32), device="cuda", dtype=torch.int32, generator=draw)
    codes = torch.randint(0, 16, (64, 256), device="cuda", dtype=torch.uint8, generator=draw)
    weights = torch.randn(64, 512, device="cuda", generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(3, device="cuda", generator=draw)
    widths = torch.tensor([10, 20, 34], device="cuda", dtype=torch.int32)
    one = torch.full((1,), 0.02, device="cuda")
    found: dict[str, tuple[Any, ...]] = {
        "fp8_quantize": (x,), "fp8_quantize_static": (x, one), "int4_encode": (words,), "int4_pack": (codes, "gptq"),
        "uint4b8_to_int4_": (words.clone(),), "scale_pack_e4m3": (codes.view(-1),), "scale_fold": (x,),
        "fp8_requantize": (weights.view(torch.uint8), scales, widths), "expand_scales": (scales, widths, 64),
    }
    eight, n = weights.view(torch.uint8), 64
    rows, columns = (torch.rand(n, device="cuda", generator=draw) for _ in range(2))
    group_scales = torch.rand(n, 4, device="cuda", generator=draw).to(torch.float8_e4m3fn).view(torch.uint8)
    wide = torch.randint(0, 16, (n, 512), device="cuda", dtype=torch.uint8, generator=draw)
    packed = torch.ops.lowbit.pack_w4a8(wide, group_scales)
    blocks = torch.rand(n, 4, device="cuda", generator=draw)
    return found | {
        "pack_w4a8": (wide, group_scales), "gemm_w4a8_fp8": (eight, packed, rows, columns, 128),
        "gemm_w8a8_fp8": (eight, eight.clone(), rows, columns), "gemm_w8a8_fp8_block": (eight, eight.clone(), blocks, blocks[:1]),
    }


def chain(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Several operators among ordinary ones."""
    lowbit = torch.ops.lowbit
    q, scales = lowbit.fp8_quantize(x * 2)
    blocks, block_scales = lowbit.fp8_quantize(x + 1, "block", "deepgemm")
    fixed = lowbit.fp8_quantize_static(x, scales[:1, 0].contiguous())
    group, channel = lowbit.scale_fold(x)
    columns = torch.ones(32, device=x.device)
    product = lowbit.gemm_w8a8_fp8(q, q[:32], scales.view(-1), columns) * 2
    return (
        product, q.view(torch.uint8) ^ 1, scales * 3, blocks.view(torch.uint8) ^ 1, block_scales * 3, fixed.view(torch.uint8) ^ 1,
        lowbit.int4_encode(words) ^ 5, lowbit.scale_pack_e4m3(group.view(torch.uint8).reshape(-1)) ^ 1, channel + 1,
    )


def operator_forms() -> Iterator[Form]:
    from lowbit.kernels.hopper_room import torch_ops

    arguments = samples()
    for name in torch_ops.NAMES:
        if name not in arguments:
            yield Form("opcheck", name, 0, 0, "no sample arguments")
            continue
        operator = getattr(torch.ops.lowbit, name)

        def checked(operator: Any = operator, name: str = name) -> Iterator[int]:
            found: Mapping[str, str] = torch.library.opcheck(operator, arguments[name])
            yield sum(result != "SUCCESS" for result in found.values())

        yield asked("opcheck", name, checked())
    x, words = arguments["fp8_quantize"][0], arguments["int4_encode"][0]
    wanted = [t.clone() for t in chain(x, words)]

    def compiled(backend: str) -> Iterator[int]:
        function = torch.compile(chain, fullgraph=True, backend=backend)
        yield unequal(list(function(x, words)), wanted)
        yield unequal(list(function(x[:33].clone(), words)), [t.clone() for t in chain(x[:33].clone(), words)])

    yield asked("fullgraph", "inductor", compiled("inductor"))
    yield asked("fullgraph", "aot_eager", compiled("aot_eager"))

    def inference() -> Iterator[int]:
        with torch.inference_mode():
            yield unequal(list(chain(x, words)), wanted)

    yield asked("inference mode", "chain", inference())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare cuda_hopper in graphs, on streams and in other places with itself.")
    parser.add_argument("--ops", default="", help="ops, separated by commas (default: all)")
    parser.add_argument("--per-op", type=int, default=4, help="problems of each op")
    parser.add_argument("--per-problem", type=int, default=4, help="tactics of each problem")
    parser.add_argument("--json", type=Path, help="write the record of the run here")
    chosen = parser.parse_args(arguments)
    backend = cuda_hopper.backend()
    if backend.execution != "executed":
        print("hopper_stability: got no device of capability 9.0, expected one; run it on an H100 or H200", file=sys.stderr)
        return 2
    names = tuple(filter(None, chosen.ops.split(","))) or tuple(cuda_hopper.modules())
    start, found = time.perf_counter(), []
    for form in (*problem_forms(backend, names, chosen.per_op, chosen.per_problem), *operator_forms()):
        found.append(form)
        if form.differing or form.raised:
            print(f"{form.form}, {form.name}: {form.differing} of {form.compared} differ {form.raised}", flush=True)
    wrong = sum(bool(form.differing or form.raised) for form in found)
    print(f"{len(found)} forms, {sum(form.compared for form in found):,} results, {wrong} forms with a difference or an error, "
          f"{time.perf_counter() - start:.0f} s", flush=True)
    if chosen.json is not None:
        about = dict(backend.describe())
        record = {"about": about, "devices": torch.cuda.device_count(), "forms": [asdict(form) for form in found]}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
