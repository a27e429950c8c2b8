"""The MMA warp: block-scaled products over K, then the low-rank product, into one accumulator in tensor memory.

Decides: the order of the sum. D starts from zero at the first instruction of a tile (accumulate off), K ascends in steps of
64, then the rank ascends in steps of 16 with accumulate on: the low-rank product continues the sum of the main product. With
`rescale` the epilogue warps multiply the main sum by alpha, in tensor memory, before the low-rank product continues it.
Only the leader of a pair issues; its instructions read the shared memory and write the tensor memory of both CTAs.
Runs only while CuTe DSL traces.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import tcgen05

from .cute_barriers import Barriers, await_empty, await_full, await_rescaled
from .cute_operands import Products, Rings, cta_group, main_tiler
from .schedule import (
    K_BLOCK,
    K_STEP,
    LORA_BLOCK,
    LORA_STEP,
    SCALE_GROUP,
    Config,
    accumulator_column,
    cluster_size,
    lora_ring_step,
    lora_steps,
    main_ring_step,
    pair_mask,
    release_mask,
    scale_a_column,
    scale_w_column,
)

__all__ = ["accumulator_at", "fence_after_wait", "lora_block", "main_block", "mma_warp"]


def fence_after_wait() -> None:
    """Order tensor-memory operations after the barrier that was waited for."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


def accumulator_at(address: Any, accumulator: Any, mma: Products, config: Config) -> Any:
    """One accumulator of the tensor memory at `address`: ((128, n), 1, 1), a row a lane, a column a column."""
    shape = mma.main.partition_shape_C((config.tile.m, config.tile.n))
    first = address + accumulator_column(accumulator, config)
    return cute.make_tensor(first, mma.main.make_fragment_C(shape).layout)


def _scale_copy(config: Config, buffer: Any, target: Any) -> Any:
    """(copy, source descriptors by stage, target) that moves one stage of scales to tensor memory, repeated for the four
    groups of 32 lanes."""
    source, target = cute.filter_zeros(buffer), cute.filter_zeros(target)
    atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(cta_group(config)), buffer.element_type)
    copy = tcgen05.make_s2t_copy(atom, target)
    thread = copy.get_slice(0)
    return copy, tcgen05.get_s2t_smem_desc_tensor(copy, thread.partition_S(source)), thread.partition_D(target)


def _scales(config: Config, address: Any, buffer: Any, column: int, layout: Any) -> Any:
    """(tensor-memory scales, their copy): `column` columns after the accumulators' base."""
    target = cute.make_tensor(cute.recast_ptr(address + column, dtype=buffer.element_type), layout)
    return target, _scale_copy(config, buffer, target)


@cute.jit
def main_block(mma: Any, sums: Any, a: Any, w: Any, scales_a: Any, scales_w: Any, stage: Any, continues: Any) -> None:
    """The four block-scaled instructions of one K block; `continues` is whether they add to what the accumulator holds."""
    for step in cutlass.range_constexpr(K_BLOCK // K_STEP):
        mma.set(tcgen05.Field.ACCUMULATE, continues if cutlass.const_expr(step == 0) else True)
        mma.set(tcgen05.Field.SFA, scales_a[(None, None, step)].iterator)
        mma.set(tcgen05.Field.SFB, scales_w[(None, None, step)].iterator)
        cute.gemm(mma, sums, a[(None, None, step, stage)], w[(None, None, step, stage)], sums)


@cute.jit
def lora_block(mma: Any, sums: Any, act: Any, up: Any, stage: Any, steps: Any) -> None:
    """The low-rank instructions of one block of the rank, `steps` of them, on top of what the accumulator holds."""
    mma.set(tcgen05.Field.ACCUMULATE, True)
    for step in cutlass.range_constexpr(LORA_BLOCK // LORA_STEP):
        if step < steps:
            cute.gemm(mma, sums, act[(None, None, step, stage)], up[(None, None, step, stage)], sums)


def _commit(barrier: Any, mask: Any, config: Config) -> None:
    """Arrive at a barrier of the CTAs of `mask` once the instructions issued so far are done."""
    with cute.arch.elect_one():
        if cluster_size(config) == 1:
            tcgen05.commit(barrier)
        else:
            tcgen05.commit(barrier, mask, cta_group(config))


@cute.jit
def mma_warp(
    config: cutlass.Constexpr, walk: Any, barriers: Barriers, mma: Products, ring: Rings, buffers: list[Any], address: Any,
    r: Any, rescale: Any,
) -> None:
    """All products of this CTA's pair; at the end a wait until the last accumulators have been read."""
    a, w = mma.main.make_fragment_A(buffers[0]), mma.main.make_fragment_B(buffers[1])
    layout_a = cute.slice_(ring.scale_a, (None, None, None, 0))
    layout_w = cute.slice_(ring.scale_w, (None, None, None, 0))
    scales_a, (copy_a, from_a, to_a) = _scales(
        config, address, buffers[2], scale_a_column(config),
        blockscaled.make_tmem_layout_sfa(mma.main, main_tiler(config), SCALE_GROUP, layout_a),
    )
    scales_w, (copy_w, from_w, to_w) = _scales(
        config, address, buffers[3], scale_w_column(config),
        blockscaled.make_tmem_layout_sfb(mma.main, main_tiler(config), SCALE_GROUP, layout_w),
    )
    if cutlass.const_expr(config.lora):
        act, up = mma.lora.make_fragment_A(buffers[4]), mma.lora.make_fragment_B(buffers[5])
    release, pair = release_mask(walk.rank, config), pair_mask(walk.rank, config)
    count = walk.ordinals()
    for ordinal in cutlass.range(count, unroll=1):
        accumulator = await_empty(barriers.accumulator, ordinal)
        fence_after_wait()
        into = accumulator_at(address, accumulator, mma, config)
        for block in cutlass.range(walk.blocks, unroll=1):
            stage = await_full(barriers.main, main_ring_step(ordinal, block, walk.blocks))
            fence_after_wait()
            cute.copy(copy_a, from_a[(None, None, None, None, stage)], to_a)
            cute.copy(copy_w, from_w[(None, None, None, None, stage)], to_w)
            main_block(mma.main, into, a, w, scales_a, scales_w, stage, block != 0)
            _commit(barriers.main.empty + stage, release, config)
        if cutlass.const_expr(config.lora):
            if rescale != 0:
                _commit(barriers.rescale.full + accumulator, pair, config)
                await_rescaled(barriers.rescale, ordinal)
                fence_after_wait()
            for block in cutlass.range(walk.lora_blocks, unroll=1):
                stage = await_full(barriers.lora, lora_ring_step(ordinal, block, walk.lora_blocks))
                fence_after_wait()
                lora_block(mma.lora, into, act, up, stage, lora_steps(r, block))
                _commit(barriers.lora.empty + stage, release, config)
        _commit(barriers.accumulator.full + accumulator, pair, config)
    for accumulator in cutlass.range_constexpr(config.accumulators):
        await_empty(barriers.accumulator, count + accumulator)
