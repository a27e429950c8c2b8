"""The load warp: it fills the rings from global memory by tensor map, tile by tile, in the order the MMA warp consumes.

Decides: which part of a shared operand this CTA asks for and which CTAs receive it (schedule: slices and masks).
Runs only while CuTe DSL traces.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

from .cute_barriers import Ring, await_empty
from .cute_operands import Products, lora_tiler, main_tiler
from .schedule import (
    Config,
    a_mask,
    a_slice,
    cluster_tile,
    lora_ring_step,
    lora_transaction_bytes,
    main_ring_step,
    mma_tile,
    ordinals,
    rank_parts,
    scale_w_mask,
    scale_w_slice,
    tile_index,
    transaction_bytes,
    w_mask,
    w_slice,
)

__all__ = ["Part", "Walk", "load_warp", "parts"]


@dataclass(frozen=True)
class Walk:
    """Where a CTA stands and which tiles its cluster computes; `blocks` and `lora_blocks` are the ring steps of a tile."""

    rank: Any
    cluster: Any
    clusters: Any
    tiles_m: Any
    tiles: Any
    width: Any
    blocks: Any
    lora_blocks: Any

    def ordinals(self) -> Any:
        """Number of tiles of this cluster."""
        return ordinals(self.cluster, self.clusters, self.tiles)

    def tile(self, ordinal: Any, config: Config) -> Any:
        """Tile (along m, along n) of this CTA."""
        index = tile_index(self.cluster, ordinal, self.clusters)
        return mma_tile(cluster_tile(index, self.tiles_m, self.width), self.rank, config)


@dataclass(frozen=True)
class Part:
    """What this CTA loads of one operand: `source` is indexed (all, tile, block), `target` (all, stage)."""

    atom: Any
    source: Any
    target: Any
    mask: Any


def _part(load: Any, buffer: Any, grouped: Any, slice_: Any, slices: int, mask: Any) -> Part:
    """One operand cut into `slices` equal parts, of which this CTA loads part `slice_` for the CTAs of `mask`."""
    atom, _ = load
    target, source = cpasync.tma_partition(
        atom, slice_, cute.make_layout(slices), cute.group_modes(buffer, 0, 3), cute.group_modes(grouped, 0, 3)
    )
    return Part(atom, cute.filter_zeros(source), cute.filter_zeros(target), mask if slices > 1 else None)


def _tiled(tensor: Any, tiler: tuple[int, int]) -> Any:
    """(tile, block, tiles, blocks) view of an operand."""
    return cute.local_tile(tensor, tiler, (None, None))


def parts(loads: list[Any], buffers: list[Any], mma: Products, rank: Any, config: Config) -> list[Part]:
    """The parts of all operands, in the order of cute_operands.loads."""
    v = rank_parts(rank, config)[0]
    pairs_m, pairs_n = config.cluster_m // config.tile.ctas, config.cluster_n
    by_row = a_slice(rank, config), pairs_n, a_mask(rank, config)
    by_column = w_slice(rank, config), pairs_m, w_mask(rank, config)
    scales_by_column = scale_w_slice(rank, config), config.cluster_m, scale_w_mask(rank, config)
    main, lora = mma.main.get_slice(v), mma.lora.get_slice(v)
    m, n, k = main_tiler(config)
    views = [
        (main.partition_A(_tiled(loads[0][1], (m, k))), by_row),
        (main.partition_B(_tiled(loads[1][1], (n, k))), by_column),
        (main.partition_A(_tiled(loads[2][1], (m, k))), by_row),
        (mma.scales_w.get_slice(0).partition_B(_tiled(loads[3][1], (n, k))), scales_by_column),
    ]
    if config.lora:
        m, n, r = lora_tiler(config)
        views += [
            (lora.partition_A(_tiled(loads[4][1], (m, r))), by_row),
            (lora.partition_B(_tiled(loads[5][1], (n, r))), by_column),
        ]
    return [_part(load, buffer, view, *share) for load, buffer, (view, share) in zip(loads, buffers, views, strict=True)]


@cute.jit
def _fill(ring: Ring, step: Any, transaction: int, wanted: list[Any], block: Any, leader: Any) -> None:
    """Fill one stage: wait until it is free, announce its bytes at the leader, start the loads that report to it."""
    stage = await_empty(ring, step)
    if leader:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, transaction)
    for part, tile in wanted:
        cute.copy(
            part.atom, part.source[(None, tile, block)], part.target[(None, stage)],
            tma_bar_ptr=ring.full + stage, mcast_mask=part.mask,
        )


@cute.jit
def load_warp(config: cutlass.Constexpr, walk: Walk, barriers: Any, mine: list[Part]) -> None:
    """All loads of this CTA, then a wait until every stage has been released: until then other CTAs may signal this one."""
    leader = rank_parts(walk.rank, config)[0] == 0
    count = walk.ordinals()
    for ordinal in cutlass.range(count, unroll=1):
        tile = walk.tile(ordinal, config)
        wanted = [(part, tile[place % 2]) for place, part in enumerate(mine)]  # operands of A's and of W's side alternate
        for block in cutlass.range(walk.blocks, unroll=1):
            step = main_ring_step(ordinal, block, walk.blocks)
            _fill(barriers.main, step, transaction_bytes(config), wanted[:4], block, leader)
        if cutlass.const_expr(config.lora):
            for block in cutlass.range(walk.lora_blocks, unroll=1):
                step = lora_ring_step(ordinal, block, walk.lora_blocks)
                _fill(barriers.lora, step, lora_transaction_bytes(config), wanted[4:], block, leader)
    for stage in cutlass.range_constexpr(config.main_stages):
        await_empty(barriers.main, count * walk.blocks + stage)
    for stage in cutlass.range_constexpr(config.lora_stages):
        await_empty(barriers.lora, count * walk.lora_blocks + stage)
