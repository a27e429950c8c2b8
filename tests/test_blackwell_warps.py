"""The warps of the CuTe kernel, run on Python integers: what they do to barriers, rings and stores is what `roles` says.

`test_blackwell_barriers` proves the programs of `roles`. Here the functions that CuTe DSL traces are called themselves, with a
stand-in for the compiler's package whose waits, arrivals, copies and instructions are written down, and must be those programs,
step by step. The stand-in shows the order of steps, stages, parities, masks, bytes, tiles and factors; what a copy or an
instruction does is for `tests/blackwell` (the coordinates of its tensor maps, its machine code) and for a device.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from lowbit.kernels.blackwell_room import roles, schedule
from lowbit.kernels.blackwell_room.barrier_model import Action, Kind, Touch, arrive, commit, copy, drain, expect, mma, wait
from lowbit.kernels.blackwell_room.schedule import CONFIGS, Config

ROOM = "lowbit.kernels.blackwell_room"
MODULES = ("cute_operands", "cute_barriers", "cute_load", "cute_mma", "cute_epilogue", "cute_gemm")
INSTANCES = tuple(config for config in CONFIGS if config.out == "f16")
TILES_M, TILES_N, K, R = 3, 4, 600, 80  # 12 cluster tiles of 3 K blocks and 2 rank blocks; the second of 16 ranks
ALPHA = 0.375


@dataclass(frozen=True)
class Barrier:
    """A barrier, or the first of an array of them."""

    name: str
    stage: int = 0

    def __add__(self, stage: int) -> Barrier:
        return Barrier(self.name, self.stage + stage)

    def at(self, rank: int) -> str:
        name = self.name if self.name == "free_tmem" else f"{self.name}[{self.stage}]"
        return f"{name}@{rank}"


class Indexed:
    """A tensor of which only the index is of interest."""

    def __init__(self, name: object) -> None:
        self.name = name

    def __getitem__(self, index: object) -> tuple[object, object]:
        return self.name, index


@pytest.fixture(scope="module")
def kernel() -> Iterator[SimpleNamespace]:
    """The modules of the kernel, loaded over stand-ins: decorators that decorate nothing, ranges of integers."""
    names = ("cutlass", "cutlass.cute", "cutlass.cute.nvgpu", "cutlass._mlir", "cutlass._mlir.dialects", "cutlass.utils",
             "cutlass.utils.blackwell_helpers", "cutlass.utils.blockscaled_layout", "cutlass.cute.runtime", "cuda",
             "cuda.bindings", "cuda.bindings.driver")
    fakes: dict[str, Any] = {name: MagicMock(name=name) for name in names}
    top, cute = fakes["cutlass"], fakes["cutlass.cute"]
    top.cute, top.utils, top.const_expr, top.Float32 = cute, fakes["cutlass.utils"], bool, float
    top.range, top.range_constexpr = (lambda count, unroll=1: range(count)), range
    cute.jit = cute.kernel = lambda function: function
    cute.nvgpu = fakes["cutlass.cute.nvgpu"]
    cute.filter_zeros = cute.make_layout = lambda value: value
    cute.arch.elect_one = nullcontext
    cute.arch.make_warp_uniform = lambda value: value
    before = {name: sys.modules.get(name) for name in (*names, *(f"{ROOM}.{module}" for module in MODULES))}
    sys.modules.update(fakes)
    try:
        loaded = {}
        for module in MODULES:
            sys.modules.pop(f"{ROOM}.{module}", None)
            loaded[module] = importlib.import_module(f"{ROOM}.{module}")
        yield SimpleNamespace(cute=cute, tcgen05=loaded["cute_mma"].tcgen05, **loaded)
    finally:
        package = importlib.import_module(ROOM)
        for name, found in before.items():
            if found is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = found
        for module in MODULES:
            if hasattr(package, module):
                delattr(package, module)


def members(mask: int) -> list[int]:
    return [rank for rank in range(16) if mask >> rank & 1]


def steps(program: Iterator[Action]) -> list[Action]:
    """A program without what the kernel has no instruction for: the marks of tiles and the meetings' waits."""
    return [step for step in program if step.kind is not Kind.MARK and not (
        step.kind is Kind.WAIT and step.barriers[0].startswith("meet"))]


def walk_of(kernel: SimpleNamespace, config: Config, rank: int) -> tuple[Any, list[tuple[int, int]]]:
    """Cluster 1 of 2, and the places of its tiles by a loop over all of them, groups of two columns, row by row."""
    order = [(i, 2 * group + j) for group in range(TILES_N // 2) for i in range(TILES_M) for j in range(2)]
    lora_blocks = schedule.lora_blocks(R) if config.lora else 0
    walk = kernel.cute_load.Walk(rank, 1, 2, TILES_M, TILES_M * TILES_N, 2, schedule.k_blocks(K), lora_blocks)
    return walk, order[1::2]


def barriers_of(kernel: SimpleNamespace, config: Config) -> Any:
    ring = kernel.cute_barriers.Ring
    return kernel.cute_barriers.Barriers(
        ring(Barrier("main_full"), Barrier("main_empty"), config.main_stages),
        ring(Barrier("lora_full"), Barrier("lora_empty"), config.lora_stages),
        ring(Barrier("acc_full"), Barrier("acc_empty"), config.accumulators),
        ring(Barrier("main_done"), Barrier("rescaled"), config.accumulators), Barrier("free_tmem"), None,
    )


def cases() -> list[tuple[Config, int, bool]]:
    """Every CTA of every instance, without and with the product with alpha in tensor memory."""
    return [(config, rank, rescale) for config in INSTANCES for rank in range(schedule.cluster_size(config))
            for rescale in (False, True)[: 1 + config.lora]]


def named(value: Config | int) -> str:
    """How a parameter reads in the name of a test."""
    return value.name if isinstance(value, Config) else str(value)


LEADERS = [case for case in cases() if schedule.leader_rank(case[1], case[0]) == case[1]]


def check_load(kernel: SimpleNamespace, config: Config, rank: int) -> None:
    """Waits, announced bytes, and every copy: operand, part, stage, tile, block, the CTAs that it reaches."""
    done: list[Action] = []
    names = ("a", "w", "sa", "sw", "act", "up")[: 6 if config.lora else 4]
    rows_w = config.tile.n // config.tile.ctas
    whole = dict(zip(("a", "w", "sa", "sw", "act", "up"),
                     (128 * 128, rows_w * 128, 128 * 16, config.tile.n * 16, 128 * 128, rows_w * 128), strict=True))

    def partition(atom: str, part: int, parts: int, target: object, source: object) -> tuple[Indexed, Indexed]:
        return Indexed((atom, part, parts)), Indexed((atom, part, parts))

    def copied(name: str, source: Any, target: Any, tma_bar_ptr: Barrier, mcast_mask: int | None) -> None:
        (found, part, parts), (_, tile, block) = source
        assert (found, target[0]) == (name, source[0])
        stage = target[1][1]
        assert tma_bar_ptr.stage == stage
        a_side = name in ("a", "sa", "act")
        rank_block = name in ("act", "up")
        if name in ("sa", "sw"):
            where = schedule.scale_a_coordinates if a_side else schedule.scale_w_coordinates
            tag: tuple[object, ...] = (name, where(tile, rank, block, config))
        else:
            coordinates = schedule.a_coordinates if a_side else schedule.w_coordinates
            first, rows, k = coordinates(tile, rank, block, config)
            tag = (name, first, rows, block if rank_block else k)
        for other in members(1 << rank if mcast_mask is None else mcast_mask):
            full = tma_bar_ptr.at(schedule.leader_rank(other, config))
            done.append(copy(full, whole[name] // parts, f"{name}[{stage}].{part}@{other}", tag))

    kernel.cute.arch.mbarrier_wait = lambda barrier, parity: done.append(wait(barrier.at(rank), parity))
    kernel.cute.arch.mbarrier_arrive_and_expect_tx = lambda barrier, size: done.append(expect(barrier.at(rank), size))
    kernel.cute_load.cpasync.tma_partition = partition
    kernel.cute.copy = copied
    walk, places = walk_of(kernel, config, rank)
    loads = [(name, Indexed(name)) for name in names]
    mine = kernel.cute_load.parts(loads, list(names), MagicMock(), rank, config)
    kernel.cute_load.load_warp(config, walk, barriers_of(kernel, config), mine)
    assert done == steps(roles._load(config, rank, places, K, R if config.lora else 0))


def check_products(kernel: SimpleNamespace, config: Config, rank: int, rescale: bool) -> None:
    """Waits, which stage is multiplied into which accumulator, whether it continues a sum, and who is told."""
    done: list[Action] = []

    def multiplied(names: str, acc: int, stage: int, continues: bool) -> None:
        done.append(mma(Touch(f"{names}[{stage}]", bool(continues), acc)))

    def told(barrier: Barrier, mask: int | None = None, group: object = None) -> None:
        assert (mask is None) == (schedule.cluster_size(config) == 1)
        done.append(commit(*(barrier.at(other) for other in members(1 << rank if mask is None else mask))))

    def block(_: Any, into: int, a: Any, w: Any, scales_a: Any, scales_w: Any, stage: int, continues: bool) -> None:
        multiplied("main", into, stage, continues)

    def low_rank(_: Any, into: int, act: Any, up: Any, stage: int, count: int) -> None:
        assert count == (4, 1)[len([step for step in done if step.kind is Kind.MMA]) % 5 - 3]
        multiplied("lora", into, stage, True)

    kernel.cute.arch.mbarrier_wait = lambda barrier, parity: done.append(wait(barrier.at(rank), parity))
    kernel.tcgen05.commit = told
    module = kernel.cute_mma
    kept = module.main_block, module.lora_block, module._scales, module.accumulator_at
    module.main_block, module.lora_block = block, low_rank
    module._scales = lambda *given: (MagicMock(), (MagicMock(), MagicMock(), MagicMock()))
    module.accumulator_at = lambda address, accumulator, *given: accumulator
    kernel.cute.copy = MagicMock()
    walk, places = walk_of(kernel, config, rank)
    module.mma_warp(config, walk, barriers_of(kernel, config), MagicMock(), MagicMock(), MagicMock(), 0, R, int(rescale))
    module.main_block, module.lora_block, module._scales, module.accumulator_at = kept
    wanted = []
    for step in steps(roles._matrix(config, rank, places, K, R if config.lora else 0, rescale)):
        if step.kind is Kind.MMA:
            acc = next(touch for touch in step.touches if touch.buffer.startswith("acc"))
            operand = step.touches[0].buffer
            name, stage = ("main" if operand.startswith("a[") else "lora"), operand[operand.index("["): operand.index("]") + 1]
            number = int(acc.buffer[4 : acc.buffer.index("]")])
            step = mma(Touch(f"{name}{stage}", acc.before is not None, number))
        wanted.append(step)
    assert done == wanted
    # scales of A and of W go to tensor memory once for each K block
    assert kernel.cute.copy.call_count == 2 * schedule.k_blocks(K) * len(places)


def check_epilogue(kernel: SimpleNamespace, config: Config, rank: int, rescale: bool) -> None:
    """Waits, signals, meetings, drains and stores of each warp; the factors and the columns that it computes with."""
    module, arch = kernel.cute_epilogue, kernel.cute.arch
    walk, places = walk_of(kernel, config, rank)
    chunks = config.tile.n // 32
    for warp in range(4):
        done: list[Action] = []
        factors: list[float] = []
        stored: list[tuple[int, tuple[int, int]]] = []
        arch.warp_idx = lambda warp=warp: warp
        arch.barrier = lambda done=done, **given: done.append(arrive(f"meet@{rank}"))
        arch.mbarrier_wait = lambda barrier, parity, done=done: done.append(wait(barrier.at(rank), parity))
        arch.mbarrier_arrive = lambda barrier, other, done=done: done.append(arrive(barrier.at(other)))
        arch.cp_async_bulk_wait_group = lambda left, read, done=done: done.append(drain(left))

        def copied(atom: object, source: Any, target: Any, stored: list[Any] = stored, done: list[Action] = done) -> None:
            if atom == "store":
                (_, (_, buffer)), (_, (_, *block)) = source, target
                stored.append((buffer, tuple(block)))
                done.append(Action(Kind.STORE, (), 0, ()))

        kernel.cute.copy = copied
        module.cpasync.tma_partition = lambda *given: (Indexed("from"), Indexed("to"))
        module.cpasync.make_tiled_tma_atom = MagicMock()
        replaced = {
            "_scale": lambda sums, factor, factors=factors: factors.append(factor), "_affine": lambda *given: None,
            "_cast": lambda *given: None, "accumulator_at": MagicMock(), "chunk_copy": MagicMock(), "chunks_of": MagicMock(),
        }
        kept = {name: getattr(module, name) for name in replaced}
        for name, function in replaced.items():
            setattr(module, name, function)
        columns = 10 * config.tile.n  # more than the walk reaches
        source = [SimpleNamespace(to=lambda kind, column=column: column) for column in range(columns)]
        vectors: tuple[dict[int, float], dict[int, float]] = ({}, {})
        module.epilogue_warps(
            config, walk, barriers_of(kernel, config), MagicMock(), 0, 32 * warp + 5, ("store", MagicMock()), MagicMock(),
            vectors, ((source, columns), (source, 0)), ALPHA, int(rescale),
        )
        kernel.cute_gemm._free_tmem(config, warp, barriers_of(kernel, config), 0, rank)
        for name, function in kept.items():
            setattr(module, name, function)
        wanted = [Action(Kind.STORE, (), 0, ()) if step.kind is Kind.STORE else step
                  for step in steps(roles._epilogue(config, rank, warp, places, K, R if config.lora else 0, rescale))
                  if step.kind is not Kind.USE]
        assert done == wanted
        each = [ALPHA] * chunks + [1.0] * chunks if rescale else [ALPHA] * chunks
        assert factors == each * len(places)
        v, pair_m, pair_n = rank % config.tile.ctas, rank % config.cluster_m // config.tile.ctas, rank // config.cluster_m
        blocks = []
        for tile, place in enumerate(places):
            row = (place[0] * config.cluster_m // config.tile.ctas + pair_m) * config.tile.ctas + v
            column = (place[1] * config.cluster_n + pair_n) * chunks
            blocks += [((tile * chunks + i) % config.store_stages, (row, column + i)) for i in range(chunks)]
        assert stored == (blocks if warp == 0 else [])
        first = (places[-1][1] * config.cluster_n + pair_n) * config.tile.n
        slots = range(32 * warp + 5, config.tile.n, 128)
        assert vectors[0] == {slot: first + slot for slot in slots}
        assert vectors[1] == dict.fromkeys(slots, -0.0)
        assert all(str(value) == "-0.0" for value in vectors[1].values())


@pytest.mark.parametrize(("config", "rank"), [case[:2] for case in cases() if not case[2]], ids=named)
def test_the_load_warp_is_its_program(kernel: SimpleNamespace, config: Config, rank: int) -> None:
    check_load(kernel, config, rank)


@pytest.mark.parametrize(("config", "rank", "rescale"), LEADERS, ids=named)
def test_the_mma_warp_is_its_program(kernel: SimpleNamespace, config: Config, rank: int, rescale: bool) -> None:
    check_products(kernel, config, rank, rescale)


@pytest.mark.parametrize(("config", "rank", "rescale"), cases(), ids=named)
def test_the_epilogue_warps_are_their_programs(kernel: SimpleNamespace, config: Config, rank: int, rescale: bool) -> None:
    check_epilogue(kernel, config, rank, rescale)
