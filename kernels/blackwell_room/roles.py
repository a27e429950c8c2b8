"""What the load, MMA and epilogue warps of one cluster do to barriers and buffers, as programs for `barrier_model`.

Decides: the order of waits, copies, instructions and arrivals of every warp, as cute_gemm issues them, with every stage, parity,
count, byte and coordinate taken from `schedule`, the functions that the kernel itself calls. Refuses: nothing; what is wrong
with the programs is for the model to say.

A buffer holds a tag that says which part of which operand it is: ("a", first row, rows, first k) and alike, so that an
instruction that finds another part, or one twice, is a conflict. The lanes of an accumulator that an epilogue warp reads hold
(tile, blocks summed so far), and a product with alpha counts as a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from . import schedule
from .barrier_model import Action, Touch, arrive, commit, copy, drain, expect, mark, mma, store, use, wait
from .schedule import Config

__all__ = ["Place", "barrier_counts", "cluster_programs"]

Place = tuple[int, int]
"""A cluster tile: index along m, index along n."""
Tiles = tuple[tuple[int, int], ...]
"""Scale tiles of 128 rows x 4 groups: index along the rows, index along the groups."""


def _members(mask: int) -> list[int]:
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]


def _load(config: Config, rank: int, places: Sequence[Place], k: int, r: int) -> Iterator[Action]:
    """The load warp of a CTA."""
    leads = schedule.leader_rank(rank, config) == rank
    a_to, w_to = _members(schedule.a_mask(rank, config)), _members(schedule.w_mask(rank, config))
    scale_to = _members(schedule.scale_w_mask(rank, config))
    a_part, w_part, scale_part = (f(rank, config) for f in (schedule.a_slice, schedule.w_slice, schedule.scale_w_slice))
    blocks, lora_blocks = schedule.k_blocks(k), schedule.lora_blocks(r)

    def send(full: str, buffer: str, to: list[int], nbytes: int, tag: object) -> Iterator[Action]:
        for other in to:
            yield copy(f"{full}@{schedule.leader_rank(other, config)}", nbytes, f"{buffer}@{other}", tag)

    for ordinal, place in enumerate(places):
        yield mark(ordinal)
        tile_m, tile_n = schedule.mma_tile(place, rank, config)
        for block in range(blocks):
            step = schedule.main_ring_step(ordinal, block, blocks)
            stage = schedule.stage_of(step, config.main_stages)
            full = f"main_full[{stage}]"
            yield wait(f"main_empty[{stage}]@{rank}", schedule.empty_parity(step, config.main_stages))
            if leads:
                yield expect(f"{full}@{rank}", schedule.transaction_bytes(config))
            a, w = (f(t, rank, block, config) for f, t in
                    ((schedule.a_coordinates, tile_m), (schedule.w_coordinates, tile_n)))
            # A row of a block is 128 bytes of codes and 16 scales, or 64 numbers of 2 bytes.
            yield from send(full, f"a[{stage}].{a_part}", a_to, a[1] * 128, ("a", *a))
            yield from send(full, f"w[{stage}].{w_part}", w_to, w[1] * 128, ("w", *w))
            yield from send(full, f"sa[{stage}].{a_part}", a_to, a[1] * 16,
                            ("sa", schedule.scale_a_coordinates(tile_m, rank, block, config)))
            yield from send(full, f"sw[{stage}].{scale_part}", scale_to, config.tile.n // config.cluster_m * 16,
                            ("sw", schedule.scale_w_coordinates(tile_n, rank, block, config)))
        for block in range(lora_blocks):
            step = schedule.lora_ring_step(ordinal, block, lora_blocks)
            stage = schedule.stage_of(step, config.lora_stages)
            full = f"lora_full[{stage}]"
            yield wait(f"lora_empty[{stage}]@{rank}", schedule.empty_parity(step, config.lora_stages))
            if leads:
                yield expect(f"{full}@{rank}", schedule.lora_transaction_bytes(config))
            a, w = (f(t, rank, 0, config) for f, t in ((schedule.a_coordinates, tile_m), (schedule.w_coordinates, tile_n)))
            yield from send(full, f"act[{stage}].{a_part}", a_to, a[1] * 128, ("act", *a[:2], block))
            yield from send(full, f"up[{stage}].{w_part}", w_to, w[1] * 128, ("up", *w[:2], block))
    yield mark(len(places))
    # The CTA stays until the last arrivals at its barriers are in.
    for ring, stages, steps in (("main", config.main_stages, len(places) * blocks),
                                ("lora", config.lora_stages, len(places) * lora_blocks)):
        for step in range(steps, steps + stages):
            yield wait(f"{ring}_empty[{schedule.stage_of(step, stages)}]@{rank}", schedule.empty_parity(step, stages))


def _cut(tiles: Tiles, parts: int) -> list[Tiles]:
    """Equal parts in order."""
    size = len(tiles) // parts
    return [tiles[part * size : (part + 1) * size] for part in range(parts)]


def _operands(config: Config, leader: int, place: Place, stage: int, block: int) -> Iterator[Touch]:
    """What one K block of a tile has to find in the shared memory of its pair, derived from the tile alone."""
    tile = config.tile
    _, pair_m, pair_n = schedule.rank_parts(leader, config)
    tile_m, tile_n = place[0] * (config.cluster_m // tile.ctas) + pair_m, place[1] * config.cluster_n + pair_n
    a_parts, w_parts = config.cluster_n, config.cluster_m // tile.ctas
    for v in range(tile.ctas):
        for part in range(a_parts):
            rows = 128 // a_parts
            first = tile_m * tile.m + v * 128 + part * rows
            yield Touch(f"a[{stage}].{part}@{leader + v}", ("a", first, rows, block * 256), None)
            scales = tuple((tile_m * tile.ctas + v, block * 4 + i) for i in range(4))
            yield Touch(f"sa[{stage}].{part}@{leader + v}", ("sa", _cut(scales, a_parts)[part]), None)
        for part in range(w_parts):
            rows = tile.n // tile.ctas // w_parts
            first = tile_n * tile.n + (v * w_parts + part) * rows
            yield Touch(f"w[{stage}].{part}@{leader + v}", ("w", first, rows, block * 256), None)
        tall = tile.n // 128
        scales = tuple((tile_n * tall + row_tile, block * 4 + i) for row_tile in range(tall) for i in range(4))
        for part in range(config.cluster_m):
            yield Touch(f"sw[{stage}].{part}@{leader + v}", ("sw", _cut(scales, config.cluster_m)[part]), None)


def _low_rank(config: Config, leader: int, place: Place, stage: int, block: int) -> Iterator[Touch]:
    """What one rank block of a tile has to find."""
    for touch in _operands(config, leader, place, stage, 0):
        kind, *where = touch.before if isinstance(touch.before, tuple) else ("",)
        if kind in ("a", "w"):
            name = {"a": "act", "w": "up"}[str(kind)]
            yield Touch(name + touch.buffer[1:], (name, *where[:2], block), None)


def _matrix(config: Config, rank: int, places: Sequence[Place], k: int, r: int, rescale: bool) -> Iterator[Action]:
    """The MMA warp of a leader."""
    blocks, lora_blocks = schedule.k_blocks(k), schedule.lora_blocks(r)
    told = _members(schedule.release_mask(rank, config))
    pair = _members(schedule.pair_mask(rank, config))
    for ordinal, place in enumerate(places):
        yield mark(ordinal)
        acc = schedule.stage_of(ordinal, config.accumulators)
        done = 0

        def sums(count: int, acc: int = acc, ordinal: int = ordinal) -> tuple[Touch, ...]:
            """The accumulators of the pair from `count` blocks to one more; the first block overwrites."""
            before = (ordinal, count) if count else None
            return tuple(
                Touch(f"acc[{acc}].{warp}@{other}", before, (ordinal, count + 1))
                for other in pair for warp in range(schedule.EPILOGUE_WARPS)
            )

        yield wait(f"acc_empty[{acc}]@{rank}", schedule.empty_parity(ordinal, config.accumulators))
        for block in range(blocks):
            step = schedule.main_ring_step(ordinal, block, blocks)
            stage = schedule.stage_of(step, config.main_stages)
            yield wait(f"main_full[{stage}]@{rank}", schedule.full_parity(step, config.main_stages))
            yield mma(*_operands(config, rank, place, stage, block), *sums(done))
            yield commit(*(f"main_empty[{stage}]@{other}" for other in told))
            done += 1
        if rescale and lora_blocks:
            yield commit(*(f"main_done[{acc}]@{other}" for other in pair))
            yield wait(f"rescaled[{acc}]@{rank}", schedule.full_parity(ordinal, config.accumulators))
            done += 1
        for block in range(lora_blocks):
            step = schedule.lora_ring_step(ordinal, block, lora_blocks)
            stage = schedule.stage_of(step, config.lora_stages)
            yield wait(f"lora_full[{stage}]@{rank}", schedule.full_parity(step, config.lora_stages))
            yield mma(*_low_rank(config, rank, place, stage, block), *sums(done))
            yield commit(*(f"lora_empty[{stage}]@{other}" for other in told))
            done += 1
        yield commit(*(f"acc_full[{acc}]@{other}" for other in pair))
    yield mark(len(places))
    for ordinal in range(len(places), len(places) + config.accumulators):
        acc = schedule.stage_of(ordinal, config.accumulators)
        yield wait(f"acc_empty[{acc}]@{rank}", schedule.empty_parity(ordinal, config.accumulators))


def _epilogue(config: Config, rank: int, warp: int, places: Sequence[Place], k: int, r: int, rescale: bool) -> Iterator[Action]:
    """One epilogue warp of a CTA."""
    blocks, lora_blocks = schedule.k_blocks(k), schedule.lora_blocks(r)
    leader, chunks = schedule.leader_rank(rank, config), config.tile.n // schedule.STORE_COLUMNS
    meetings = itertools.count()

    def meet() -> Iterator[Action]:
        """The named barrier of the epilogue warps."""
        yield arrive(f"meet@{rank}")
        yield wait(f"meet@{rank}", next(meetings) % 2)

    for ordinal in range(len(places)):
        yield mark(ordinal)
        acc = schedule.stage_of(ordinal, config.accumulators)
        parity = schedule.full_parity(ordinal, config.accumulators)
        complete = (ordinal, blocks + lora_blocks + (rescale and lora_blocks > 0))
        yield use(Touch(f"vectors.{warp}@{rank}", None, ordinal))
        yield from meet()
        if rescale and lora_blocks:
            yield wait(f"main_done[{acc}]@{rank}", parity)
            yield use(Touch(f"acc[{acc}].{warp}@{rank}", (ordinal, blocks), (ordinal, blocks + 1)))
            yield arrive(f"rescaled[{acc}]@{leader}")
        yield wait(f"acc_full[{acc}]@{rank}", parity)
        for chunk in range(chunks):
            count = ordinal * chunks + chunk
            buffer = schedule.stage_of(count, config.store_stages)
            yield use(Touch(f"acc[{acc}].{warp}@{rank}", complete, None))
            if chunk == chunks - 1:
                yield arrive(f"acc_empty[{acc}]@{leader}")
            yield use(*(Touch(f"vectors.{other}@{rank}", ordinal, None) for other in range(schedule.EPILOGUE_WARPS)))
            if warp == 0:
                yield drain(config.store_stages - 1)
            yield from meet()
            yield use(Touch(f"out[{buffer}].{warp}@{rank}", None, count))
            yield from meet()
            if warp == 0:
                yield store(*(Touch(f"out[{buffer}].{other}@{rank}", count, None) for other in range(schedule.EPILOGUE_WARPS)))
    yield mark(len(places))
    if warp == 0:
        yield drain(0)
    yield from meet()
    if warp == 0 and config.tile.ctas == 2:
        yield arrive(f"free_tmem@{rank ^ 1}")
        yield wait(f"free_tmem@{rank}", 0)


def barrier_counts(config: Config, rescale: bool = False) -> Mapping[str, int]:
    """Arrivals that complete a phase, of every barrier of a cluster."""
    counts: dict[str, int] = {}
    release, epilogue = schedule.release_arrivals(config), schedule.accumulator_arrivals(config)
    for rank in range(config.cluster_m * config.cluster_n):
        for ring, stages in (("main", config.main_stages), ("lora", config.lora_stages)):
            for stage in range(stages):
                counts |= {f"{ring}_full[{stage}]@{rank}": 1, f"{ring}_empty[{stage}]@{rank}": release}
        counts |= {f"meet@{rank}": schedule.EPILOGUE_WARPS, f"free_tmem@{rank}": 1}
        for acc in range(config.accumulators):
            counts |= {f"acc_full[{acc}]@{rank}": 1, f"acc_empty[{acc}]@{rank}": epilogue}
            if rescale:
                counts |= {f"main_done[{acc}]@{rank}": 1, f"rescaled[{acc}]@{rank}": epilogue}
    return counts


def cluster_programs(
    config: Config, places: Sequence[Place], k: int, r: int, rescale: bool = False
) -> Mapping[str, Iterator[Action]]:
    """Programs by role, "load@RANK", "mma@RANK" (leaders only) and "epilogue.WARP@RANK", of a cluster that computes `places` in
    order. `rescale`: the epilogue warps multiply the accumulator by alpha between main and low-rank product."""
    programs: dict[str, Iterator[Action]] = {}
    for rank in range(config.cluster_m * config.cluster_n):
        programs[f"load@{rank}"] = _load(config, rank, places, k, r)
        if schedule.leader_rank(rank, config) == rank:
            programs[f"mma@{rank}"] = _matrix(config, rank, places, k, r, rescale)
        for warp in range(schedule.EPILOGUE_WARPS):
            programs[f"epilogue.{warp}@{rank}"] = _epilogue(config, rank, warp, places, k, r, rescale)
    return programs
