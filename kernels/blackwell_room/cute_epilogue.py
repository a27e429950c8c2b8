"""The four epilogue warps: accumulator to registers, alpha, channel scale and bias in f32, one cast, store by tensor map.

Decides: D[m, n] = cast(fma(alpha * sum, channel[n], bias[n])): the product with alpha is rounded to f32, then one fused
multiply-add, then one rounding (RNE, overflow to infinity) to the output format. An absent channel scale is 1 and an absent
bias is -0, which leave every f32 unchanged, the sign of zero included. With `rescale` the product with alpha is taken in
tensor memory between the main and the low-rank product, and the factor of the last step is 1.
Runs only while CuTe DSL traces.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05

from .cute_barriers import Barriers, Ring, await_full
from .cute_mma import accumulator_at, fence_after_wait
from .cute_operands import Products, number_type
from .schedule import (
    CTA_ROWS,
    EPILOGUE_WARPS,
    STORE_COLUMNS,
    Config,
    ceil_div,
    column_index,
    leader_rank,
    rank_parts,
    stage_of,
    store_block,
)

__all__ = ["BARRIER", "THREADS", "chunk_copy", "chunks_of", "epilogue_warps"]

THREADS = 32 * EPILOGUE_WARPS
_NEAREST = {"rnd": nvvm.RoundingModeKind.RN, "ftz": False}  # the defaults of the packed operations are RZ and flush to zero
BARRIER = 1
"""Named barrier of the epilogue warps."""


def _meet() -> None:
    cute.arch.barrier(barrier_id=BARRIER, number_of_threads=THREADS)


def chunks_of(sums: Any) -> Any:
    """An accumulator cut into chunks: (128, STORE_COLUMNS, 1, chunk)."""
    return cute.flat_divide(sums[((None, None), 0, 0)], (CTA_ROWS, STORE_COLUMNS))


def chunk_copy(operation: Any, sums: Any) -> Any:
    """The copy of a chunk between tensor memory and registers. Thread t holds row t, register i column i of the chunk
    (schedule.row_index, column_index)."""
    atom = cute.make_copy_atom(operation(tcgen05.Repetition(STORE_COLUMNS)), cutlass.Float32)
    return tcgen05.make_tmem_copy(atom, chunks_of(sums)[(None, None, 0, 0)])


@cute.jit
def _stage_vector(target: Any, source: Any, count: Any, neutral: float, tile_n: Any, thread: Any, config: Config) -> None:
    """Put the f32 values of the columns of a tile into shared memory; `neutral` where there are none."""
    for part in cutlass.range_constexpr(ceil_div(config.tile.n, THREADS)):
        slot = part * THREADS + thread
        column = column_index(tile_n, 0, slot, config)
        value = cutlass.Float32(neutral)
        if column < count:
            value = source[column].to(cutlass.Float32)
        target[slot] = value


def _sources(copy: Any, thread: Any, chunks: Any) -> Any:
    """What this thread reads of each chunk. A function of its own, as all that calls a method of a copy inside a traced loop
    must be: there CuTe DSL would carry the copy through the loop as a value."""
    return copy.get_slice(thread).partition_S(chunks)


def _targets(copy: Any, thread: Any, chunks: Any) -> Any:
    """What this thread writes of each chunk."""
    return copy.get_slice(thread).partition_D(chunks)


def _cast(sums: Any, numbers: Any) -> None:
    """numbers = sums rounded to the output format (RNE, overflow to infinity)."""
    numbers.store(sums.load().to(numbers.element_type))


def _scale(sums: Any, alpha: Any) -> None:
    """sums = alpha * sums in f32."""
    for i in range(0, STORE_COLUMNS, 2):
        sums[i], sums[i + 1] = cute.arch.mul_packed_f32x2((sums[i], sums[i + 1]), (alpha, alpha), **_NEAREST)


def _affine(sums: Any, channel: Any, bias: Any) -> None:
    """sums = fma(sums, channel, bias) in f32."""
    for i in range(0, STORE_COLUMNS, 2):
        pairs = (sums[i], sums[i + 1]), (channel[i], channel[i + 1]), (bias[i], bias[i + 1])
        sums[i], sums[i + 1] = cute.arch.fma_packed_f32x2(*pairs, **_NEAREST)


def _signal(barrier: Any, walk: Any, config: Config) -> None:
    """Tell the leader of the pair that this warp is done with tensor memory."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(barrier, leader_rank(walk.rank, config))


@cute.jit
def _rescale(
    wanted: Any, ring: Ring, ordinal: Any, walk: Any, config: cutlass.Constexpr, sums: Any, chunks: Any, thread: Any, load: Any,
    store: Any, alpha: Any,
) -> None:
    """Where wanted, multiply the main sum of a tile by alpha, in place, once it is complete."""
    source, target = _sources(load, thread, chunks), _targets(store, thread, chunks)
    if wanted != 0:
        accumulator = await_full(ring, ordinal)
        fence_after_wait()
        for chunk in cutlass.range(config.tile.n // STORE_COLUMNS, unroll=1):
            cute.copy(load, source[(None, None, None, 0, chunk)], sums)
            cute.arch.fence_view_async_tmem_load()
            _scale(sums, alpha)
            cute.copy(store, sums, target[(None, None, None, 0, chunk)])
        cute.arch.fence_view_async_tmem_store()
        _signal(ring.empty + accumulator, walk, config)


@cute.jit
def epilogue_warps(
    config: cutlass.Constexpr, walk: Any, barriers: Barriers, mma: Products, address: Any, thread: Any, store: Any, out: Any,
    vectors: Any, sources: Any, alpha: Any, rescale: Any,
) -> None:
    """All outputs of this CTA. `vectors` are channel scale and bias of a tile in shared memory, `sources` the same in global
    memory, each with its length (0: absent)."""
    number, v = number_type(config), rank_parts(walk.rank, config)[0]
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    first = accumulator_at(address, 0, mma, config)
    from_tmem, to_tmem = chunk_copy(tcgen05.Ld32x32bOp, first), chunk_copy(tcgen05.St32x32bOp, first)
    held = _targets(from_tmem, thread, cute.make_identity_tensor((CTA_ROWS, STORE_COLUMNS))).shape
    sums, numbers = cute.make_rmem_tensor(held, cutlass.Float32), cute.make_rmem_tensor(held, number)
    channel, bias = (cute.make_rmem_tensor(cute.make_layout(STORE_COLUMNS), cutlass.Float32) for _ in range(2))
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), number, num_bits_per_copy=128)
    to_out = cute.make_tiled_copy_D(atom, from_tmem)
    rows_out, numbers_out = _targets(to_out, thread, out), to_out.retile(numbers)
    blocks = cute.local_tile(store[1], (CTA_ROWS, STORE_COLUMNS), (None, None))
    from_out, to_d = cpasync.tma_partition(
        store[0], 0, cute.make_layout(1), cute.group_modes(out, 0, 2), cute.group_modes(blocks, 0, 2)
    )
    last_factor = alpha
    if cutlass.const_expr(config.lora):
        last_factor = alpha if rescale == 0 else cutlass.Float32(1.0)
    chunk_count = config.tile.n // STORE_COLUMNS
    for ordinal in cutlass.range(walk.ordinals(), unroll=1):
        tile_m, tile_n = walk.tile(ordinal, config)
        _stage_vector(vectors[0], *sources[0], 1.0, tile_n, thread, config)
        _stage_vector(vectors[1], *sources[1], -0.0, tile_n, thread, config)
        _meet()
        accumulator = stage_of(ordinal, config.accumulators)
        chunks = chunks_of(accumulator_at(address, accumulator, mma, config))
        if cutlass.const_expr(config.lora):
            _rescale(rescale, barriers.rescale, ordinal, walk, config, sums, chunks, thread, from_tmem, to_tmem, alpha)
        await_full(barriers.accumulator, ordinal)
        fence_after_wait()
        mine = _sources(from_tmem, thread, chunks)
        for chunk in cutlass.range(chunk_count, unroll=1):
            cute.copy(from_tmem, mine[(None, None, None, 0, chunk)], sums)
            cute.arch.fence_view_async_tmem_load()
            if chunk == chunk_count - 1:
                _signal(barriers.accumulator.empty + accumulator, walk, config)
            cute.autovec_copy(cute.local_tile(vectors[0], (STORE_COLUMNS,), (chunk,)), channel)
            cute.autovec_copy(cute.local_tile(vectors[1], (STORE_COLUMNS,), (chunk,)), bias)
            _scale(sums, last_factor)
            _affine(sums, channel, bias)
            _cast(sums, numbers)
            buffer = stage_of(ordinal * chunk_count + chunk, config.store_stages)
            if warp == 0:  # the store that last read this buffer is done
                cute.arch.cp_async_bulk_wait_group(config.store_stages - 1, read=True)
            _meet()
            cute.copy(to_out, numbers_out, rows_out[(None, None, None, buffer)])
            cute.arch.fence_view_async_shared()
            _meet()
            if warp == 0:
                row_block, column_block = store_block(tile_m, v, tile_n, chunk, config)
                cute.copy(store[0], from_out[(None, buffer)], to_d[(None, row_block, column_block)])
                cute.arch.cp_async_bulk_commit_group()
    if warp == 0:
        cute.arch.cp_async_bulk_wait_group(0, read=True)
