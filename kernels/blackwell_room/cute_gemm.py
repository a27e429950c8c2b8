"""D = cast(fma(alpha * (A W^T + lora_act lora_up^T), channel, bias)) on Blackwell: the kernel, its compilation, its launch.

Decides: a persistent, warp-specialised grid. Warps 0-3 of a CTA are the epilogue, warp 4 issues the products, warp 5 loads.
A and W are e2m1 with one ue4m3 scale per 16 along k; the low-rank operands have the output format (f16 or bf16). With a
low-rank term and alpha other than 1, alpha multiplies the main sum alone, before the low-rank product continues it.
Refuses: what schedule.refusal names. Shapes, pointers, alpha and the presence of channel scale and bias are launch arguments;
tile, cluster, output format and the presence of a low-rank term are compiled in (schedule.Config).
Annotations are evaluated here, because CuTe DSL reads them: no postponed evaluation.
"""

from collections.abc import Mapping
from typing import Any

import cuda.bindings.driver as driver
import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_ptr

from .cute_barriers import Barriers, allocate_barriers, initialise_barriers
from .cute_epilogue import BARRIER, THREADS, epilogue_warps
from .cute_load import Walk, load_warp, parts
from .cute_mma import mma_warp
from .cute_operands import CODES, SCALES, loads, number_type, out_store, products, rings
from .schedule import (
    CTA_ROWS,
    EPILOGUE_WARPS,
    K_BLOCK,
    LORA_STEP,
    Config,
    cluster_and_rank,
    cluster_size,
    clusters_launched,
    k_blocks,
    leader_rank,
    lora_blocks,
    peer_rank,
    raster_width,
    refusal,
    tile_counts,
    tmem_columns_allocated,
)

__all__ = ["arguments", "compile_gemm", "gemm", "run_gemm"]

_MMA_WARP = 4
_LOAD_WARP = 5
_CTA_THREADS = 192
_ADDRESS_BARRIER = 2  # named barrier of the epilogue and MMA warps: the address of tensor memory is known
_OPERANDS = ("a", "a_scale", "w", "w_scale", "lora_act", "lora_up", "channel_scale", "bias", "d")


def _allocate(memory: Any, config: Config, ring: Any) -> Any:
    """(operand buffers in the order of cute_operands.loads, output staging, (channel scale, bias) of a tile)."""

    def swizzled(number: Any, layout: Any) -> Any:
        return memory.allocate_tensor(number, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    def plain(number: Any, layout: Any, alignment: int) -> Any:
        return memory.allocate_tensor(number, layout, byte_alignment=alignment)

    number = number_type(config)
    scales = (plain(SCALES, layout, 1024) for layout in (ring.scale_a, ring.scale_w))
    buffers = [swizzled(CODES, ring.a), swizzled(CODES, ring.w), *scales]
    if config.lora:
        buffers += [swizzled(number, ring.lora_act), swizzled(number, ring.lora_up)]
    out = swizzled(number, ring.out)
    vector = cute.make_layout(config.tile.n)
    return buffers, out, (plain(cutlass.Float32, vector, 16), plain(cutlass.Float32, vector, 16))


def _tmem_address(barriers: Barriers) -> Any:
    """The address of tensor memory, once warp 0 has it."""
    cute.arch.barrier(barrier_id=_ADDRESS_BARRIER, number_of_threads=THREADS + 32)
    return cute.arch.retrieve_tmem_ptr(cutlass.Float32, 16, barriers.tmem_address)


@cute.jit
def _free_tmem(config: cutlass.Constexpr, warp: Any, barriers: Barriers, address: Any, rank: Any) -> None:
    """Free tensor memory; in a pair once both CTAs have read theirs."""
    pair = config.tile.ctas == 2
    cute.arch.barrier(barrier_id=BARRIER, number_of_threads=THREADS)
    if warp == 0:
        cute.arch.relinquish_tmem_alloc_permit(is_two_cta=pair)
        if cutlass.const_expr(pair):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barriers.free_tmem, peer_rank(rank, config))
            cute.arch.mbarrier_wait(barriers.free_tmem, 0)
        cute.arch.dealloc_tmem(address, tmem_columns_allocated(config), is_two_cta=pair)


@cute.kernel
def _kernel(
    config: cutlass.Constexpr, loaded: Any, store: Any, channel: Any, channel_count: cutlass.Int32, bias: Any,
    bias_count: cutlass.Int32, alpha: cutlass.Float32, rescale: cutlass.Int32, r: cutlass.Int32, blocks: cutlass.Int32,
    tiles_m: cutlass.Int32, tiles: cutlass.Int32, width: cutlass.Int32, clusters: cutlass.Int32,
) -> None:
    """One CTA: barriers and tensor memory, then its three roles."""
    thread = cute.arch.thread_idx()[0]
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    cluster, rank = cluster_and_rank(cute.arch.block_idx()[0], config)
    walk = Walk(rank, cluster, clusters, tiles_m, tiles, width, blocks, lora_blocks(r) if config.lora else 0)
    ring = rings(config, products(config))
    memory = cutlass.utils.SmemAllocator()
    barriers = allocate_barriers(memory, config)
    buffers, out, vectors = _allocate(memory, config, ring)
    if warp == _LOAD_WARP:
        for atom, _ in loaded:
            cpasync.prefetch_descriptor(atom)
        cpasync.prefetch_descriptor(store[0])
    if warp == 0:
        with cute.arch.elect_one():
            initialise_barriers(barriers, config)
        cute.arch.mbarrier_init_fence()
        cute.arch.alloc_tmem(tmem_columns_allocated(config), barriers.tmem_address, is_two_cta=config.tile.ctas == 2)
    if cutlass.const_expr(cluster_size(config) > 1):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()
    if warp == _LOAD_WARP:
        load_warp(config, walk, barriers, parts(loaded, buffers, products(config), rank, config))
    if warp == _MMA_WARP:
        address = _tmem_address(barriers)
        if rank == leader_rank(rank, config):
            mma_warp(config, walk, barriers, products(config), ring, buffers, address, r, rescale)
    if warp < EPILOGUE_WARPS:
        address = _tmem_address(barriers)
        sources = (channel, channel_count), (bias, bias_count)
        epilogue_warps(config, walk, barriers, products(config), address, thread, store, out, vectors, sources, alpha, rescale)
        _free_tmem(config, warp, barriers, address, rank)
    return


@cute.jit
def gemm(
    config: cutlass.Constexpr, a: cute.Pointer, a_scale: cute.Pointer, w: cute.Pointer, w_scale: cute.Pointer,
    lora_act: cute.Pointer, lora_up: cute.Pointer, channel: cute.Pointer, bias: cute.Pointer, d: cute.Pointer,
    m: cutlass.Int32, n: cutlass.Int32, k: cutlass.Int32, r: cutlass.Int32, channel_count: cutlass.Int32,
    bias_count: cutlass.Int32, alpha: cutlass.Float32, rescale: cutlass.Int32, width: cutlass.Int32, clusters: cutlass.Int32,
    stream: Any,
) -> None:
    """Launch. `channel_count` and `bias_count` are n, or 0 where the vector is absent; `rescale` is 1 where alpha multiplies the
    main sum alone; `width` is schedule.raster_width and `clusters` schedule.clusters_launched."""
    mma = products(config)
    ring = rings(config, mma)
    pointers = {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale, "lora_act": lora_act, "lora_up": lora_up}
    loaded = loads(config, mma, ring, pointers, m, n, k, r)
    tiles_m, tiles_n = tile_counts(m, n, config)
    vector = cute.make_layout(n)
    _kernel(
        config, loaded, out_store(ring, d, m, n), cute.make_tensor(channel, vector), channel_count,
        cute.make_tensor(bias, vector), bias_count, alpha, rescale, r, k_blocks(k), tiles_m, tiles_m * tiles_n, width, clusters,
    ).launch(
        grid=(clusters * cluster_size(config), 1, 1), block=(_CTA_THREADS, 1, 1), cluster=(cluster_size(config), 1, 1),
        stream=stream, min_blocks_per_mp=1,
    )


def arguments(
    config: Config, addresses: Mapping[str, int], shape: tuple[int, int, int, int], alpha: float, multiprocessors: int,
    stream: int,
) -> tuple[Any, ...]:
    """The launch arguments of an instance (see run_gemm)."""
    m, n, k, r = shape
    if (reason := refusal(m, n, k, r)) is not None:
        raise ValueError(reason)
    if config.lora != (r > 0):
        raise ValueError(f"{config.name} got rank {r}: an instance with a low-rank term takes r > 0, one without takes r = 0")
    kinds = {"a": CODES, "w": CODES, "a_scale": SCALES, "w_scale": SCALES}
    pointers = (
        make_ptr(kinds.get(name, number_type(config)), addresses.get(name, 0), cute.AddressSpace.gmem, assumed_align=16)
        for name in _OPERANDS
    )
    tiles_m, tiles_n = tile_counts(m, n, config)
    clusters = clusters_launched(tiles_m * tiles_n, multiprocessors, config)
    lengths = (n if addresses.get(name) else 0 for name in ("channel_scale", "bias"))
    rescale = int(config.lora and alpha != 1.0)
    return (
        *pointers, *map(cutlass.Int32, (m, n, k, r, *lengths)), cutlass.Float32(alpha),
        *map(cutlass.Int32, (rescale, raster_width(tiles_n), clusters)), driver.CUstream(stream),
    )


def compile_gemm(config: Config, options: str = "") -> Any:
    """Compile an instance, for the chip that is present or, with the option `--gpu-arch`, for another: such a result cannot be
    launched, and the environment variable CUTE_DSL_ARCH then has to name a different one, for CuTe DSL loads what it
    compiles for that. The other options of CuTe DSL keep what it generates (`--keep-ptx --keep-cubin --dump-dir`)."""
    sample = arguments(config, {}, (CTA_ROWS, 128, K_BLOCK, LORA_STEP if config.lora else 0), 1.0, 1, 0)
    return cute.compile(gemm, config, *sample, options=options)


def run_gemm(
    compiled: Any, config: Config, addresses: Mapping[str, int], shape: tuple[int, int, int, int], alpha: float,
    multiprocessors: int, stream: int,
) -> None:
    """Launch a compiled instance on a stream (its handle; 0 is the default stream). Does not wait.

    `addresses`: device addresses, aligned to 16 bytes, of a [m, k] and w [n, k] (e2m1, two codes a byte, even k in the low
    nibble), a_scale and w_scale (ue4m3 bytes in 128 x 4 tiles, rows padded to 128 and groups to 4 with zeros), lora_act [m, r],
    lora_up [n, r], channel_scale [n], bias [n] and d [m, n] (all in the output format); absent operands are left out.
    `shape` is (m, n, k, r), `alpha` an f32, `multiprocessors` the number of the chip. Raises ValueError for what
    schedule.refusal names and for a rank that does not fit the instance."""
    compiled(*arguments(config, addresses, shape, alpha, multiprocessors, stream))
