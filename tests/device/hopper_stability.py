"""Does cuda_hopper give the same bits whatever surrounds a launch? Graphs, streams, places, sequences, devices, torch.compile.

Decides: nothing about arithmetic. Each form is compared bit for bit with the plain call on the same operands, which `lowbit
certify` judges. Asked are, per problem and tactic: 100 replays of a captured graph with operands that change from replay to
replay; a side stream on which the operands arrive late; operands and outputs 16 bytes further on; other problems in a seeded
order in between; a second device, where there is one. Products that share sums through scratch memory are asked the same with
memory that torch allocates for the call, and on two streams at once. Asked of the operators of torch: 100 replays of a graph,
torch.library.opcheck, torch.compile(fullgraph=True), inference mode, a second device.
Refuses: tolerances, and machines without a device of compute capability 9.0.

    python tests/device/hopper_stability.py --json hopper_stability.json [--ops OP,OP] [--per-op 4] [--forms "second device"]

Ends with 0, or with 1 where any bit differed or a form failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hopper_must_pass import SHARED, sharing

from lowbit.conformance.backend import Problem, Role, TensorView
from lowbit.conformance.case import Case
from lowbit.conformance.op import parse_case, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.stability import stability_cases
from lowbit.kernels import cuda_hopper
from lowbit.kernels.hopper_room import gemm_w4a8

__all__ = ["FORMS", "Form", "main"]

CUDA: Any = torch.cuda  # parts of it have no types
REPLAYS, SEEDS, SEQUENCE = 100, 5, 300
SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SLEEP = 20_000_000  # cycles before late operands arrive: about 10 ms
FORMS = (
    "100 graph replays, operands changed", "late operands on a side stream", "16 bytes further on", "second device",
    "random sequence", "torch's memory: 100 graph replays", "torch's memory: late operands", "torch's memory: two streams",
    "torch's memory: second device", "operators: 100 graph replays", "operators: opcheck", "operators: fullgraph",
    "operators: inference mode", "operators: second device",
)
"""What is asked; `--forms` takes those that hold one of its words."""


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
        for codes in drawn_codes(self.problem):
            self.drawn.append({name: self.put(each) for name, each in codes.items()})
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


@lru_cache(maxsize=1)
def drawn_codes(problem: Problem) -> list[dict[str, Any]]:
    """Operands of every seed, by name: the same for all tactics and places of a problem."""
    op = ops()[problem.op]
    pattern = "normal" if "normal" in op.patterns else op.patterns[0]
    names = [tensor.name for tensor in tensors_of(op, problem) if tensor.role is not Role.OUTPUT]
    found = [draw_operands(op, Case(problem, pattern, seed)) for seed in range(SEEDS)]
    return [{name: operands[name].codes for name in names} for operands in found]


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


def problems_of(backend: Any, name: str, per_op: int) -> list[Problem]:
    """Problems of an op: every variant before any comes again, then those whose tiles are cut."""
    cases = [case.problem for case in stability_cases(ops()[name], 64) if backend.supports(case.problem) is None]
    first = {problem.variant: problem for problem in reversed(cases)}
    chosen = [*first.values(), *(problem for problem in cases if problem not in first.values())][: max(per_op, len(first))]
    return [*chosen, *(problem for problem in cut_problems() if problem.op == name)]


def cut_problems() -> list[Problem]:
    return [parse_case(text, ops()).problem for text, _ in SHARED]


def problem_forms(
    backend: Any, names: Sequence[str], per_op: int, per_problem: int, forms: Sequence[str]
) -> Iterator[Form]:
    runs: list[tuple[Run, list[list[torch.Tensor]]]] = []
    here = backend.device
    asks: dict[str, Callable[[Run, list[list[torch.Tensor]]], Iterator[int]]] = {
        FORMS[0]: graph_replays, FORMS[1]: late_operands, FORMS[2]: lambda run, wanted: elsewhere(run, wanted, here, 16),
        FORMS[3]: lambda run, wanted: elsewhere(run, wanted, "cuda:1", 0),
    }
    for problem in (problem for name in names for problem in problems_of(backend, name, per_op)):
        for tactic in dict.fromkeys((*backend.tactics(problem)[:per_problem], *sharing(problem))):
            run, title = Run(backend, problem, tactic, here), f"{problem} {tactic}"
            try:
                run.prepare()
                wanted = [run.plain(seed) for seed in range(SEEDS)]
            except Exception as error:
                yield Form("plain", title, 0, 0, f"{type(error).__name__}: {str(error)[:300]}")
                continue
            runs.append((run, wanted))
            for form, ask in asks.items():
                if form in forms:
                    yield asked(form, title, ask(run, wanted))
    draw = np.random.default_rng(7)

    def sequence() -> Iterator[int]:
        for _ in range(SEQUENCE if runs else 0):
            run, wanted = runs[int(draw.integers(len(runs)))]
            seed = int(draw.integers(SEEDS))
            yield unequal(run.plain(seed), wanted[seed])

    if FORMS[4] in forms:
        yield asked(FORMS[4], f"{len(runs)} problems and tactics", sequence())


# Scratch memory that torch allocates for the call ---------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Product:
    """gemm_w4a8_fp8 by one tactic, called as a library calls it: outputs in place, scratch memory from torch."""

    variant: str
    tactic: str
    packed: Any
    columns: torch.Tensor
    a: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor

    def __call__(self) -> None:
        gemm_w4a8.gemm_w4a8_fp8(
            self.a, self.packed, self.rows, self.columns, self.out, variant=self.variant, tactic=self.tactic
        )

    def bring(self, given: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.a.copy_(given[0])
        self.rows.copy_(given[1])

    def plain(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.out.fill_(float("nan"))
        self.bring(given)
        self()
        torch.cuda.synchronize(self.out.device)
        return self.out.clone()


def bits(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.view(torch.int16)]


def product_of(problem: Problem, tactic: str, device: str) -> tuple[Product, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A product of a problem on a device, and the activations of several seeds: the same on every device."""
    m, n, k, group = (problem.dim(letter) for letter in "mnkg")
    draw = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=draw).to(device)
    scales = torch.randint(0x28, 0x40, (n, k // group), dtype=torch.uint8, generator=draw).to(device)
    columns = (torch.rand(n, generator=draw) + 0.5).to(device)
    given = [
        ((torch.randn(m, k, generator=draw) * 30).to(torch.float8_e4m3fn).view(torch.uint8).to(device),
         (torch.rand(m, generator=draw) + 0.5).to(device))
        for _ in range(SEEDS)
    ]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    packed = gemm_w4a8.pack_weights(codes, scales)
    return Product(problem.variant, tactic, packed, columns, given[0][0].clone(), given[0][1].clone(), out), given


def scratch_forms(forms: Sequence[str], device: str) -> Iterator[Form]:
    for problem in cut_problems():
        for tactic in sharing(problem):
            title = f"{problem} {tactic}"
            product, given = product_of(problem, tactic, device)
            wanted = [product.plain(each) for each in given]

            def replays(product: Product = product, given: Any = given, wanted: Any = wanted) -> Iterator[int]:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    product()
                for replay in range(REPLAYS):
                    product.out.fill_(float("nan"))
                    product.bring(given[replay % SEEDS])
                    graph.replay()
                    yield unequal(bits(product.out), bits(wanted[replay % SEEDS]))

            def late(product: Product = product, given: Any = given, wanted: Any = wanted) -> Iterator[int]:
                side = CUDA.Stream(device)
                for seed in range(3):
                    product.bring(given[seed + 1])
                    product.out.fill_(float("nan"))
                    torch.cuda.synchronize(device)
                    with torch.cuda.stream(side):
                        CUDA._sleep(SLEEP)
                        product.bring(given[seed])
                        product()
                    side.synchronize()
                    yield unequal(bits(product.out), bits(wanted[seed]))

            def together(problem: Problem = problem, tactic: str = tactic, wanted: Any = wanted) -> Iterator[int]:
                """Both sums are being shared while the other's are."""
                pairs = [(product_of(problem, tactic, device), CUDA.Stream(device), seed) for seed in range(2)]
                torch.cuda.synchronize(device)
                for _ in range(20):
                    for (other, given), side, seed in pairs:
                        with torch.cuda.stream(side):
                            other.bring(given[seed])
                            other()
                torch.cuda.synchronize(device)
                for (other, _), _, seed in pairs:
                    yield unequal(bits(other.out), bits(wanted[seed]))

            def second(problem: Problem = problem, tactic: str = tactic, wanted: Any = wanted) -> Iterator[int]:
                other, given = product_of(problem, tactic, "cuda:1")
                for seed in range(2):
                    yield unequal(bits(other.plain(given[seed])), bits(wanted[seed]))

            asks: tuple[Callable[[], Iterator[int]], ...] = (replays, late, together, second)
            for form, ask in zip(FORMS[5:9], asks, strict=True):
                if form in forms:
                    yield asked(form, title, ask())


# Operators of torch --------------------------------------------------------------------------------------------------


def samples() -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(operator, arguments, named arguments): each operator once, the product of packed weights in its forms."""
    draw = torch.Generator(device="cuda").manual_seed(3)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, generator=draw)
    words = torch.randint(-(1 << 31), 1 << 31, (64, 32), device="cuda", dtype=torch.int32, generator=draw)
    codes = torch.randint(0, 16, (64, 256), device="cuda", dtype=torch.uint8, generator=draw)
    weights = torch.randn(64, 512, device="cuda", generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(3, device="cuda", generator=draw)
    widths = torch.tensor([10, 20, 34], device="cuda", dtype=torch.int32)
    one = torch.full((1,), 0.02, device="cuda")
    eight, n = weights.view(torch.uint8), 64
    rows, columns = (torch.rand(n, device="cuda", generator=draw) for _ in range(2))
    group_scales = torch.rand(n, 4, device="cuda", generator=draw).to(torch.float8_e4m3fn).view(torch.uint8)
    wide = torch.randint(0, 16, (n, 512), device="cuda", dtype=torch.uint8, generator=draw)
    packed = torch.ops.lowbit.pack_w4a8(wide, group_scales)
    experts = torch.ops.lowbit.pack_w4a8(wide.expand(3, -1, -1).contiguous(), group_scales.expand(3, -1, -1).contiguous())
    blocks = torch.rand(n, 4, device="cuda", generator=draw)
    half = {"bias": columns.half(), "out_dtype": torch.float16}
    return [
        ("fp8_quantize", (x,), {}), ("fp8_quantize", (x, "tensor"), {}), ("fp8_quantize_static", (x, one), {}),
        ("int4_encode", (words,), {}), ("int4_pack", (codes, "gptq"), {}), ("uint4b8_to_int4_", (words.clone(),), {}),
        ("scale_pack_e4m3", (codes.view(-1),), {}), ("scale_fold", (x,), {}),
        ("fp8_requantize", (eight, scales, widths), {}), ("expand_scales", (scales, widths, 64), {}),
        ("pack_w4a8", (wide, group_scales), {}), ("gemm_w4a8_fp8", (eight, packed, rows, columns, 128), {}),
        ("gemm_w4a8_fp8", (eight[:1], packed, rows[:1], columns, 128), {"variant": "exact"}),
        ("gemm_w4a8_fp8", (eight, packed, rows, columns, 128), half),
        ("gemm_w4a8_fp8", (eight, experts, rows, columns.expand(3, -1).contiguous(), 128), {"counts": widths}),
        ("gemm_w8a8_fp8", (eight, eight.clone(), rows, columns), {}),
        ("gemm_w8a8_fp8_block", (eight, eight.clone(), blocks, blocks[:1]), {}),
    ]


def chain(x: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Several operators among ordinary ones. x: bfloat16 [M, 512]; words: int32 [64, 32], the weights of K = 256."""
    lowbit = torch.ops.lowbit
    q, scales = lowbit.fp8_quantize(x * 2)
    blocks, block_scales = lowbit.fp8_quantize(x + 1, "block", "deepgemm")
    whole, whole_scale = lowbit.fp8_quantize(x, "tensor")
    fixed = lowbit.fp8_quantize_static(x, scales[:1, 0].contiguous())
    group, channel = lowbit.scale_fold(x)
    columns = torch.ones(64, device=x.device)
    packed = lowbit.pack_w4a8(words, torch.full((64, 2), 0x38, dtype=torch.uint8, device=x.device))
    eight = lowbit.gemm_w8a8_fp8(q, q[:32], scales.view(-1), columns[:32]) * 2
    folded = lowbit.gemm_w4a8_fp8(q[:, :256], packed, scales.view(-1), columns, 128) * 2
    exact = lowbit.gemm_w4a8_fp8(q[:1, :256], packed, scales[:1].view(-1), columns, 128, variant="exact") + 1
    return (
        eight, folded, exact, q.view(torch.uint8) ^ 1, scales * 3, blocks.view(torch.uint8) ^ 1, block_scales * 3,
        whole.view(torch.uint8) ^ 1, whole_scale * 3, fixed.view(torch.uint8) ^ 1, lowbit.int4_encode(words) ^ 5,
        lowbit.scale_pack_e4m3(group.view(torch.uint8).reshape(-1)) ^ 1, channel + 1,
    )


def operator_forms(forms: Sequence[str]) -> Iterator[Form]:
    from lowbit.kernels.hopper_room import torch_ops

    given = samples()
    for name in torch_ops.NAMES if FORMS[10] in forms else ():
        chosen = [(arguments, named) for operator, arguments, named in given if operator == name]

        def checked(name: str = name, chosen: Any = chosen) -> Iterator[int]:
            for arguments, named in chosen:
                found: Mapping[str, str] = torch.library.opcheck(getattr(torch.ops.lowbit, name), arguments, named)
                yield sum(result != "SUCCESS" for result in found.values())

        yield asked(FORMS[10], name, checked()) if chosen else Form(FORMS[10], name, 0, 0, "no sample arguments")
    arguments = {operator: values for operator, values, _ in reversed(given)}
    x, words = arguments["fp8_quantize"][0], arguments["int4_encode"][0]
    others = [x * (seed + 1) for seed in range(SEEDS)]
    wanted = [[t.clone() for t in chain(each, words)] for each in others]

    def replays() -> Iterator[int]:
        place, graph = x.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = chain(place, words)
        for replay in range(REPLAYS):
            place.copy_(others[replay % SEEDS])
            graph.replay()
            yield unequal(list(results), wanted[replay % SEEDS])

    def compiled(backend: str) -> Iterator[int]:
        function = torch.compile(chain, fullgraph=True, backend=backend)
        yield unequal(list(function(x, words)), wanted[0])
        yield unequal(list(function(x[:33].clone(), words)), [t.clone() for t in chain(x[:33].clone(), words)])

    def inference() -> Iterator[int]:
        with torch.inference_mode():
            yield unequal(list(chain(x, words)), wanted[0])

    def second() -> Iterator[int]:
        for each, want in zip(others, wanted, strict=True):
            yield unequal(list(chain(each.to("cuda:1"), words.to("cuda:1"))), want)

    for form, name, ask in (
        (FORMS[9], "chain", replays), (FORMS[11], "aot_eager", lambda: compiled("aot_eager")),
        (FORMS[11], "inductor", lambda: compiled("inductor")), (FORMS[12], "chain", inference), (FORMS[13], "chain", second),
    ):
        if form in forms:
            yield asked(form, name, ask())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare cuda_hopper in graphs, on streams and in other places with itself.")
    parser.add_argument("--ops", default="", help="ops, separated by commas (default: all)")
    parser.add_argument("--per-op", type=int, default=4, help="problems of each op")
    parser.add_argument("--per-problem", type=int, default=4, help="tactics of each problem, beside those with scratch memory")
    parser.add_argument("--forms", default="", help=f"words, separated by commas, of: {'; '.join(FORMS)} (default: all)")
    parser.add_argument("--json", type=Path, help="write the record of the run here")
    chosen = parser.parse_args(arguments)
    words = tuple(filter(None, chosen.forms.split(","))) or ("",)
    forms = tuple(form for form in FORMS if any(word in form for word in words))
    if not forms:
        parser.error(f"--forms: got {chosen.forms}, expected words of: {'; '.join(FORMS)}")
    backend = cuda_hopper.backend()
    if backend.execution != "executed":
        print("hopper_stability: got no device of capability 9.0, expected one; run it on an H100 or H200", file=sys.stderr)
        return 2
    devices = torch.cuda.device_count()
    if devices < 2:
        forms = tuple(form for form in forms if "second device" not in form)
    names = tuple(filter(None, chosen.ops.split(","))) or tuple(cuda_hopper.modules())
    start, found = time.perf_counter(), []
    parts = (
        problem_forms(backend, names, chosen.per_op, chosen.per_problem, forms),
        scratch_forms(forms if gemm_w4a8.OPS[0] in names else (), backend.device), operator_forms(forms),
    )
    for part in parts:
        for form in part:
            found.append(form)
            if form.differing or form.raised:
                print(f"{form.form}, {form.name}: {form.differing} of {form.compared} differ {form.raised}", flush=True)
        print(f"{len(found)} forms after {time.perf_counter() - start:.0f} s", flush=True)
    wrong = sum(bool(form.differing or form.raised) for form in found)
    for asked_for in forms:
        some = [each for each in found if each.form == asked_for]
        print(f"{asked_for}: {len(some)} asked, {sum(each.compared for each in some):,} results, "
              f"{sum(each.differing for each in some)} differ, {sum(bool(each.raised) for each in some)} raised", flush=True)
    print(f"{len(found)} forms, {sum(form.compared for form in found):,} results, {wrong} forms with a difference or an error, "
          f"{devices} device(s), {time.perf_counter() - start:.0f} s", flush=True)
    if chosen.json is not None:
        about = dict(backend.describe())
        record = {"about": about, "devices": devices, "forms": [asdict(form) for form in found]}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0 or not any(form.compared for form in found))


if __name__ == "__main__":
    sys.exit(main())
