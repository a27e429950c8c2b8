"""The numbers that the Blackwell kernel indexes with, exhaustively, against derivations that do not use them.

Every check is a function that raises AssertionError, so that the mutants at the end (the fix history of the seed's kernel) can
be shown to fail the check that is named for them. They are planted into functions that the kernel traces, but for
`w_coordinates`: where a load begins follows in the kernel from `rank_parts` and CuTe's partition of the tensor map, which
`tests/blackwell` compares with the functions of coordinates, for every CTA of every instance, when it compiles.
Sizes are written out again: 128 rows, K blocks of 256 = 4 instructions of 64, one scale per 16, rank blocks of 64.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import pytest

from lowbit.kernels.blackwell_room import schedule
from lowbit.kernels.blackwell_room.schedule import CONFIGS, Config, config_of

PLAIN = tuple(config for config in CONFIGS if config.out == "f16")
"""Formats have one width and share every number."""
NAMED = pytest.mark.parametrize("config", PLAIN, ids=lambda config: config.name)
SHAPES = ((1, 8), (128, 128), (129, 136), (640, 1032), (1000, 264), (4352, 3072))
TILE_256 = next(config for config in PLAIN if (config.tile.m, config.tile.n, config.lora) == (256, 256, True))


def clusters(m: int, n: int, multiprocessors: int, config: Config) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(cluster, cluster tiles in its order) of a launch."""
    along_m, along_n = schedule.tile_counts(m, n, config)
    total = along_m * along_n
    count = schedule.clusters_launched(total, multiprocessors, config)
    width = schedule.raster_width(along_n)
    for cluster in range(count):
        walk = range(schedule.ordinals(cluster, count, total))
        yield cluster, [schedule.cluster_tile(schedule.tile_index(cluster, o, count), along_m, width) for o in walk]


# Tiles ---------------------------------------------------------------------------------------------------------------


def check_each_tile_once(config: Config) -> None:
    """Every output element of every shape is stored by exactly one (CTA, thread, chunk, register) of one tile, on any grid."""
    size = config.cluster_m * config.cluster_n
    for (m, n), multiprocessors in itertools.product(SHAPES, (size, 7 * size + 1, 148)):
        stored: Counter[tuple[int, int]] = Counter()
        for _, places in clusters(m, n, multiprocessors, config):
            for place, rank in itertools.product(places, range(size)):
                tile_m, tile_n = schedule.mma_tile(place, rank, config)
                v = schedule.rank_parts(rank, config)[0]
                for chunk in range(config.tile.n // 32):
                    stored[schedule.store_block(tile_m, v, tile_n, chunk, config)] += 1
        wanted = {(i, j) for i in range(ceil(m / 128)) for j in range(ceil(n / 32))}
        inside = {block for block in stored if block[0] * 128 < m and block[1] * 32 < n}
        assert inside == wanted, f"{config.name} m{m}n{n}: blocks without a tile {sorted(wanted - inside)[:3]}"
        assert set(stored.values()) == {1}, f"{config.name} m{m}n{n}: blocks stored twice"


def check_ordinals_share_the_work(config: Config) -> None:
    """No cluster has more than one tile more than another, and none has none: the static schedule is balanced."""
    for total, count in itertools.product(range(1, 220), (1, 2, 3, 37, 74, 148)):
        launched = schedule.clusters_launched(total, count * config.cluster_m * config.cluster_n, config)
        each = [schedule.ordinals(cluster, launched, total) for cluster in range(launched)]
        assert (sum(each), max(each) - min(each) <= 1, min(each) >= 1) == (total, True, True), (total, count)
        seen = {schedule.tile_index(c, o, launched) for c, owned in enumerate(each) for o in range(owned)}
        assert seen == set(range(total))


def check_raster_is_a_bijection(config: Config) -> None:
    """Every linear index is one place, for every width that the host can choose."""
    for along_m, along_n in itertools.product((1, 2, 5, 34), range(1, 41)):
        width = schedule.raster_width(along_n)
        assert along_n % width == 0
        assert 1 <= width <= 8
        found = {schedule.cluster_tile(index, along_m, width) for index in range(along_m * along_n)}
        assert found == set(itertools.product(range(along_m), range(along_n))), (along_m, along_n)


# Operands ------------------------------------------------------------------------------------------------------------


def check_each_k_block_of_each_operand_once(config: Config) -> None:
    """The rows of A and W, and the scale tiles, that the multicast parts bring into the CTAs of a pair, block by block, are those
    of its tile and nothing else, each once, and K is covered once."""
    size, tile = config.cluster_m * config.cluster_n, config.tile
    for k in (32, 64, 256, 288, 3840):
        assert schedule.k_blocks(k) == ceil(k / 256)
    for place, block in itertools.product(((0, 0), (3, 2)), (0, 5)):
        held: dict[tuple[str, int], Counter[tuple[int, int]]] = {}
        scales: dict[tuple[str, int], Counter[tuple[int, int]]] = {}
        for rank in range(size):
            tile_m, tile_n = schedule.mma_tile(place, rank, config)
            for name, mask, (first, rows, k) in (
                ("a", schedule.a_mask(rank, config), schedule.a_coordinates(tile_m, rank, block, config)),
                ("w", schedule.w_mask(rank, config), schedule.w_coordinates(tile_n, rank, block, config)),
            ):
                for other in (other for other in range(size) if mask >> other & 1):
                    held.setdefault((name, other), Counter()).update((row, k) for row in range(first, first + rows))
            for name, mask, tiles in (
                ("a", schedule.a_mask(rank, config), schedule.scale_a_coordinates(tile_m, rank, block, config)),
                ("w", schedule.scale_w_mask(rank, config), schedule.scale_w_coordinates(tile_n, rank, block, config)),
            ):
                for other in (other for other in range(size) if mask >> other & 1):
                    scales.setdefault((name, other), Counter()).update(tiles)
        for rank in range(size):
            v, pair_m, pair_n = rank % tile.ctas, rank % config.cluster_m // tile.ctas, rank // config.cluster_m
            row = (place[0] * config.cluster_m // tile.ctas + pair_m) * tile.m + v * 128
            column = (place[1] * config.cluster_n + pair_n) * tile.n + v * (tile.n // tile.ctas)
            wanted_a = Counter((i, block * 256) for i in range(row, row + 128))
            wanted_w = Counter((i, block * 256) for i in range(column, column + tile.n // tile.ctas))
            assert held["a", rank] == wanted_a, f"{config.name}: rows of A in CTA {rank}"
            assert held["w", rank] == wanted_w, f"{config.name}: rows of W in CTA {rank}"
            groups = range(block * 4, block * 4 + 4)  # 256 of K are 16 scales, 4 scale tiles
            whole = column - v * (tile.n // tile.ctas)  # each CTA of a pair multiplies by the scales of all columns
            assert scales["a", rank] == Counter(itertools.product([row // 128], groups)), f"{config.name}: scales of A"
            assert scales["w", rank] == Counter(itertools.product(range(whole // 128, (whole + tile.n) // 128), groups))


def check_bytes_expected_are_bytes_loaded(config: Config) -> None:
    """What every copy of a stage completes on the full barrier of a pair adds up to what the leader announced."""
    size, tile = config.cluster_m * config.cluster_n, config.tile
    arriving: Counter[tuple[str, int]] = Counter()
    for rank in range(size):
        a_rows = schedule.a_coordinates(0, rank, 0, config)[1]
        w_rows = schedule.w_coordinates(0, rank, 0, config)[1]
        for mask, main, low_rank in (
            (schedule.a_mask(rank, config), a_rows * 128 + a_rows * 16, a_rows * 64 * 2),  # codes, scales; 16-bit numbers
            (schedule.w_mask(rank, config), w_rows * 128, w_rows * 64 * 2),
            (schedule.scale_w_mask(rank, config), tile.n * 16 // config.cluster_m, 0),
        ):
            for other in (other for other in range(size) if mask >> other & 1):
                arriving["main", schedule.leader_rank(other, config)] += main
                arriving["lora", schedule.leader_rank(other, config)] += low_rank
    leaders = {rank for rank in range(size) if rank % tile.ctas == 0}
    assert {leader for _, leader in arriving} == leaders
    for leader in leaders:
        assert arriving["main", leader] == schedule.transaction_bytes(config), config.name
        assert arriving["lora", leader] == schedule.lora_transaction_bytes(config), config.name


def check_masks(config: Config) -> None:
    """Who receives what, and who waits for whom, from the grid of the cluster alone."""
    size, ctas = config.cluster_m * config.cluster_n, config.tile.ctas
    at = {rank: (rank % config.cluster_m, rank // config.cluster_m) for rank in range(size)}
    for rank, (i, j) in at.items():
        rows = sum(1 << o for o in at if at[o][0] == i)
        halves = sum(1 << o for o in at if at[o][1] == j and at[o][0] % ctas == i % ctas)
        columns = sum(1 << o for o in at if at[o][1] == j)
        assert schedule.rank_of(*schedule.rank_parts(rank, config), config) == rank
        assert schedule.a_mask(rank, config) == rows
        assert schedule.w_mask(rank, config) == halves
        assert schedule.scale_w_mask(rank, config) == columns
        assert schedule.pair_mask(rank, config) == sum(1 << o for o in at if o // ctas == rank // ctas)
    sends = {rank: schedule.a_mask(rank, config) | schedule.w_mask(rank, config) | schedule.scale_w_mask(rank, config)
             for rank in range(size)}
    leaders = [rank for rank in range(size) if schedule.leader_rank(rank, config) == rank]
    for rank in range(size):  # a leader tells those who load into its pair, and each of them awaits exactly these leaders
        into = {other // ctas * ctas for other in range(size) if sends[rank] >> other & 1}
        told = {leader for leader in leaders if schedule.release_mask(leader, config) >> rank & 1}
        assert told == into, config.name
        assert len(told) == schedule.release_arrivals(config), config.name


def check_low_rank_steps(config: Config) -> None:
    """Every 16 ranks of every legal R are contracted once."""
    for r in range(16, 257, 16):
        steps = [schedule.lora_steps(r, block) for block in range(schedule.lora_blocks(r))]
        assert sum(steps) * 16 == r
        assert all(1 <= count <= 4 for count in steps), r
        assert all(count == 4 for count in steps[:-1])
    assert schedule.lora_blocks(0) == 0


# Index maps ----------------------------------------------------------------------------------------------------------


def check_scale_tiles(_: Config) -> None:
    """The 128x4 tile, built by moving axes of an array: [tile rows, 4, 32, tile columns, 4] stored as rows, columns, 32, 4, 4."""
    for rows, groups in ((128, 4), (1, 2), (129, 8), (256, 5), (300, 17)):
        padded = (-(-rows // 128) * 128, -(-groups // 4) * 4)
        names = np.arange(padded[0] * padded[1]).reshape(padded)
        order = names.reshape(padded[0] // 128, 4, 32, padded[1] // 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1)
        place = np.argsort(order).reshape(padded)
        row, group = np.arange(padded[0])[:, None], np.arange(padded[1])[None, :]
        assert np.array_equal(np.asarray(schedule.scale_offset(row, group, groups)), place), (rows, groups)  # type: ignore[arg-type]
    # By hand, of 8 groups: rows 0, 32, 64, 96 of groups 0 to 3 come first, then row 1; groups 4 to 7 follow at 512.
    places = {(0, 0): 0, (0, 3): 3, (32, 0): 4, (96, 3): 15, (1, 0): 16, (0, 4): 512, (128, 0): 1024}
    assert {(row, group): schedule.scale_offset(row, group, 8) for row, group in places} == places


def check_epilogue_map(config: Config) -> None:
    """(thread, register) of every tile to (row, column) of the output: a bijection onto the block that the store writes, and the
    column does not depend on the CTA of the pair nor on the size of the cluster."""
    tile = config.tile
    for tile_m, tile_n in ((0, 0), (2, 3)):
        seen = set()
        for v, chunk in itertools.product(range(tile.ctas), range(tile.n // 32)):
            rows = [schedule.row_index(tile_m, v, thread, config) for thread in range(128)]
            columns = [schedule.column_index(tile_n, chunk, register, config) for register in range(32)]
            block = schedule.store_block(tile_m, v, tile_n, chunk, config)
            assert rows == list(range(block[0] * 128, block[0] * 128 + 128))
            assert columns == list(range(block[1] * 32, block[1] * 32 + 32))
            seen |= set(itertools.product(rows, columns))
        wanted_rows = range(tile_m * 128 * tile.ctas, (tile_m + 1) * 128 * tile.ctas)
        assert seen == set(itertools.product(wanted_rows, range(tile_n * tile.n, (tile_n + 1) * tile.n)))


# Rings and budgets ---------------------------------------------------------------------------------------------------


def check_ring(_: Config) -> None:
    """Stage and parities of the first 2,000 steps of rings of 1 to 8 stages, against a state carried from step to step."""
    for stages in range(1, 9):
        stage, phase = 0, 0
        for step in range(2000):
            assert schedule.stage_of(step, stages) == stage
            assert schedule.full_parity(step, stages) == phase, (stages, step)
            assert schedule.empty_parity(step, stages) == 1 - phase, (stages, step)
            stage += 1
            if stage == stages:
                stage, phase = 0, 1 - phase


def check_ring_steps(_: Config) -> None:
    """Steps number the blocks of all tiles of a cluster from 0 without a gap, 1 to 200 tiles."""
    for blocks in (1, 2, 15, 60):
        for function in (schedule.main_ring_step, schedule.lora_ring_step):
            walked = [function(ordinal, block, blocks) for ordinal in range(200) for block in range(blocks)]
            assert walked == list(range(200 * blocks))


def check_budgets(config: Config) -> None:
    """Shared and tensor memory, from the sizes of the chip and of one stage written out."""
    rows_w = config.tile.n // config.tile.ctas
    stage = 128 * 128 + rows_w * 128 + 128 * 16 + config.tile.n * 16
    low_rank = (128 + rows_w) * 64 * 2
    staging = config.store_stages * 128 * 32 * 2
    rest = schedule.smem_bytes(config) - config.main_stages * stage - config.lora_stages * low_rank - staging
    assert rest == 1024 + 8 * config.tile.n, f"{config.name}: {rest} bytes for barriers, channel scale and bias"
    assert schedule.smem_bytes(config) <= 227 * 1024
    assert 2 <= config.main_stages <= 8
    assert config.main_stages == 8 or schedule.smem_bytes(config) + stage > 227 * 1024, f"{config.name}: another stage fits"
    assert config.lora_stages == (2 if config.lora else 0)
    columns = config.accumulators * config.tile.n + 16 + config.tile.n // 32 * 4
    assert schedule.tmem_columns_used(config) == columns <= schedule.tmem_columns_allocated(config) <= 512
    assert schedule.tmem_columns_allocated(config) in (32, 64, 128, 256, 512)
    regions = [(schedule.accumulator_column(i, config), config.tile.n) for i in range(config.accumulators)]
    regions += [(schedule.scale_a_column(config), 16), (schedule.scale_w_column(config), config.tile.n // 32 * 4)]
    for (first, width), (following, _) in itertools.pairwise(regions):
        assert first + width == following
    threads = 32 * (4 + 2)  # four epilogue warps, load, MMA
    assert threads * 255 <= 65536  # no register limit can exceed the file, whatever the compiler takes


CHECKS: tuple[Callable[[Config], None], ...] = (
    check_each_tile_once, check_ordinals_share_the_work, check_raster_is_a_bijection, check_each_k_block_of_each_operand_once,
    check_bytes_expected_are_bytes_loaded, check_masks, check_low_rank_steps, check_scale_tiles, check_epilogue_map, check_ring,
    check_ring_steps, check_budgets,
)
ONCE = (check_raster_is_a_bijection, check_low_rank_steps, check_scale_tiles, check_ring, check_ring_steps)
"""Checks that do not look at the instance."""


@pytest.mark.parametrize("check", [check for check in CHECKS if check not in ONCE], ids=lambda check: check.__name__)
@NAMED
def test_every_instance(config: Config, check: Callable[[Config], None]) -> None:
    check(config)


@pytest.mark.parametrize("check", ONCE, ids=lambda check: check.__name__)
def test_every_size(check: Callable[[Config], None]) -> None:
    check(TILE_256)


def test_instances_have_names_of_their_own() -> None:
    assert len({config.name for config in CONFIGS}) == len(CONFIGS)
    assert {config.tile.ctas for config in CONFIGS} == {1, 2}


def test_formats_share_every_number() -> None:
    """The premise of `PLAIN`."""
    assert [replace(config, out="f16") for config in CONFIGS if config.out == "bf16"] == list(PLAIN)


@pytest.mark.parametrize("out", ["f16", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_choice_is_an_instance(out: Any, lora: bool) -> None:
    """Whatever the shape, the host picks one of the instances that are built, of the problem's format and kind."""
    for m, n in itertools.product((1, 127, 128, 129, 256, 4352, 65536), (8, 3072, 15360)):
        config = schedule.choose(m, n, out, lora)
        assert config in CONFIGS
        assert (config.out, config.lora) == (out, lora)


# The fix history of the seed's kernel --------------------------------------------------------------------------------


def k_major_scales(row: int, group: int, groups: int) -> int:
    """aedba4d: scales of one group of all rows next to each other, instead of the tile that the instruction reads."""
    return group * 128 + row % 128 + row // 128 * 128 * (-(-groups // 4) * 4)


def misread_tile(index: int, tiles_m: int, width: int) -> tuple[int, int]:
    """c3de867: the index of the tile read as (n, m)."""
    within = index % (tiles_m * width)
    return index // (tiles_m * width) * width + within % width, within // width


def v_for_n(tile_n: int, rank: int, block: int, config: Config) -> tuple[int, int, int]:
    """b1ca60a: the half of W by the place along n of the pair, where the CTA of the pair is meant."""
    _, pair_m, pair_n = rank % config.tile.ctas, rank % config.cluster_m // config.tile.ctas, rank // config.cluster_m
    half = config.tile.n // config.tile.ctas
    rows = half // (config.cluster_m // config.tile.ctas)
    return tile_n * config.tile.n + pair_n * half + pair_m * rows, rows, block * 256


def v_from_n(rank: int, config: Config) -> tuple[int, int, int]:
    """b1ca60a in the function that the kernel traces: the CTA of the pair taken from the place along n."""
    pair_n = rank // config.cluster_m
    return pair_n % config.tile.ctas, rank % config.cluster_m // config.tile.ctas, pair_n


def identity_over_the_cluster(tile_n: int, chunk: int, register: int, config: Config) -> int:
    """b251149: columns counted on an identity tensor of the cluster's size: channel scale and bias of another N."""
    return tile_n * config.tile.n * config.tile.ctas + chunk * 32 + register


def implicit_state(step: int, stages: int) -> int:
    """61905df: a parity kept in a state of its own, here of six bits: right for the first 64 steps, 21 tiles of 3 blocks. What it
    does to the warps (20 tiles end, 30 hang) is in test_blackwell_barriers."""
    return step % 64 // stages % 2


def whole_lora_up(config: Config) -> int:
    """Feature 9 of the seed: lora_up counted whole in each CTA of a pair, which costs main stages and announces bytes that nobody
    loads."""
    return config.tile.n * 64 * 2


MUTANTS: tuple[tuple[str, Callable[..., Any], Callable[[Config], None]], ...] = (
    ("scale_offset", k_major_scales, check_scale_tiles),
    ("cluster_tile", misread_tile, check_each_tile_once),
    ("w_coordinates", v_for_n, check_each_k_block_of_each_operand_once),
    ("rank_parts", v_from_n, check_each_k_block_of_each_operand_once),
    ("column_index", identity_over_the_cluster, check_epilogue_map),
    ("full_parity", implicit_state, check_ring),
    ("lora_up_bytes", whole_lora_up, check_bytes_expected_are_bytes_loaded),
)


@pytest.mark.parametrize(("name", "mutant", "check"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS])
def test_a_fault_of_the_seeds_history_is_caught(
    name: str, mutant: Callable[..., Any], check: Callable[[Config], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(TILE_256)
    monkeypatch.setattr(schedule, name, mutant)
    with pytest.raises(AssertionError):
        check(TILE_256)


def test_an_overcount_of_lora_up_costs_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the seed's fix unlocked: counted whole, lora_up leaves room for fewer main stages."""
    right = config_of(TILE_256.tile, (2, 1), "f16", True)
    assert right == TILE_256
    monkeypatch.setattr(schedule, "lora_up_bytes", whole_lora_up)
    assert config_of(TILE_256.tile, (2, 1), "f16", True).main_stages < right.main_stages


@pytest.mark.parametrize(("sizes", "says"), [
    ((0, 8, 32, 0), "m is 0"), ((1, 12, 32, 0), "n is 12"), ((1, 0, 32, 0), "n is 0"), ((1, 8, 48, 0), "k is 48"),
    ((1, 8, 0, 0), "k is 0"), ((1, 8, 32, 8), "r is 8"), ((1, 8, 32, 272), "r is 272"), ((1 << 24, 8, 32, 0), "below 2\\*\\*24"),
])
def test_refusals_name_what_is_wrong(sizes: tuple[int, int, int, int], says: str) -> None:
    sentence = schedule.refusal(*sizes)
    assert sentence is not None
    assert says.replace("\\", "") in sentence


def test_what_is_not_refused() -> None:
    for sizes in ((1, 8, 32, 0), (4352, 3072, 3840, 128), (4352, 15360, 3840, 256), (7, 8, 96, 16)):
        assert schedule.refusal(*sizes) is None


