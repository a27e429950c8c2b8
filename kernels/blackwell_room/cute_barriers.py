"""Barriers of the kernel: where they lie in shared memory, how many arrivals they await, and one wait for each side.

Decides: stage and parity of every wait, through schedule. Every full barrier is awaited by its consumer and every empty
barrier by its producer at the step that both compute from (ordinal of the tile, block): no state is kept between steps.
Runs only while CuTe DSL traces.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute

from .schedule import Config, accumulator_arrivals, empty_parity, full_parity, release_arrivals, stage_of

__all__ = ["Barriers", "Ring", "allocate_barriers", "await_empty", "await_full", "await_rescaled", "initialise_barriers"]


@dataclass(frozen=True)
class Ring:
    """Full and empty barriers of a ring of `stages` stages; a ring of no stages has no barriers."""

    full: Any
    empty: Any
    stages: int


@dataclass(frozen=True)
class Barriers:
    """Rings of the main operands, of the low-rank operands (no stages without a low-rank term) and of the accumulators; the
    barrier by which a pair agrees to free tensor memory, and the word that receives the address of tensor memory.

    `rescale` is not a ring but a hand-over within a tile with a low-rank term, one pair of barriers for each accumulator: full
    when the main sum is complete, empty when the epilogue warps have multiplied it by alpha."""

    main: Ring
    lora: Ring
    accumulator: Ring
    rescale: Ring
    free_tmem: Any
    tmem_address: Any


def allocate_barriers(memory: Any, config: Config) -> Barriers:
    """Take the barriers from shared memory: at most 8 + 2 + 2 + 2 stages of two barriers of 8 bytes, and 16 bytes."""

    def ring(stages: int) -> Ring:
        full, empty = (memory.allocate_array(cutlass.Int64, stages) if stages else None for _ in range(2))
        return Ring(full, empty, stages)

    return Barriers(
        ring(config.main_stages), ring(config.lora_stages), ring(config.accumulators), ring(config.accumulators * config.lora),
        memory.allocate_array(cutlass.Int64), memory.allocate_array(cutlass.Int32),
    )


def initialise_barriers(barriers: Barriers, config: Config) -> None:
    """Set the arrival counts; by one thread, before the cluster synchronises."""
    loaded, summed = release_arrivals(config), accumulator_arrivals(config)
    counted = ((barriers.main, loaded), (barriers.lora, loaded), (barriers.accumulator, summed), (barriers.rescale, summed))
    for ring, emptied in counted:
        for stage in range(ring.stages):
            cute.arch.mbarrier_init(ring.full + stage, 1)
            cute.arch.mbarrier_init(ring.empty + stage, emptied)
    cute.arch.mbarrier_init(barriers.free_tmem, 1)


def await_full(ring: Ring, step: Any) -> Any:
    """Wait until the stage of a step is filled; returns the stage."""
    stage = stage_of(step, ring.stages)
    cute.arch.mbarrier_wait(ring.full + stage, full_parity(step, ring.stages))
    return stage


def await_empty(ring: Ring, step: Any) -> Any:
    """Wait until the stage of a step may be overwritten; returns the stage."""
    stage = stage_of(step, ring.stages)
    cute.arch.mbarrier_wait(ring.empty + stage, empty_parity(step, ring.stages))
    return stage


def await_rescaled(ring: Ring, ordinal: Any) -> None:
    """Wait until the sum of a tile has been multiplied by alpha: the answer to this tile's own signal, hence its parity."""
    cute.arch.mbarrier_wait(ring.empty + stage_of(ordinal, ring.stages), full_parity(ordinal, ring.stages))
