"""Every number the Blackwell NVFP4 kernel indexes with: tiles, ring stages, transaction bytes, coordinates, budgets.

Decides: which CTA computes which tile in which order, which stage and parity a step of a ring has, how many bytes a barrier
awaits, which CTAs a load or a release reaches, where a scale byte lies, which output element a register holds, how many
stages fit. The kernel (cute_gemm) calls these functions on its traced integers; the tests call them on Python integers. Two
groups it does not call, because CuTe's partitions decide there: `*_coordinates` (where a load begins) and `row_index`; these say
what the partitions have to give, and tests/blackwell compares both when it compiles.
So the functions of a coordinate use nothing but + - * // % and <<, and never branch on an argument that the kernel traces.
Refuses: shapes that the tensor-map alignment forbids (`refusal`).

Units and words. A problem is D[m, n] = sum over k of A[m, k] W[n, k], operands e2m1 with one ue4m3 scale per 16 along k, plus
sum over r of lora_act[m, r] lora_up[n, r]. A *tile* is what one MMA instruction accumulates: 128 rows by one CTA, or 256 rows
by a pair of CTAs (`ctas` = 2) of which each holds 128 rows of the accumulator and half the rows of W. A *cluster* is
`cluster_m` x `cluster_n` CTAs; rank = v + ctas * pair_m + cluster_m * pair_n, with v the CTA of the pair. A *cluster tile* is
what a cluster computes at once: cluster_m / ctas by cluster_n tiles. The *ordinal* of a tile counts the tiles of one cluster
from 0. A *step* counts the uses of a ring from 0 and never wraps, so stage and parity follow from it without kept state.
Sizes: PTX ISA 8.7, tcgen05 (K of one instruction, scale tile 128 x 4, 512 columns x 128 lanes of tensor memory); CUDA C++
programming guide, compute capability 10.0 (227 KiB of shared memory a block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CONFIGS", "CTA_ROWS", "EPILOGUE_WARPS", "K_BLOCK", "K_STEP", "LORA_BLOCK", "LORA_STEP", "SCALE_GROUP",
    "SCALE_TILE_BYTES", "SMEM_CAPACITY", "STORE_COLUMNS", "TMEM_COLUMNS", "Config", "Tile", "a_bytes", "a_coordinates",
    "a_mask", "a_slice", "accumulator_arrivals", "accumulator_column", "ceil_div", "choose", "cluster_and_rank",
    "cluster_size", "cluster_tile", "clusters_launched", "column_index", "config_of", "empty_parity", "full_parity",
    "k_blocks", "leader_rank", "lora_act_bytes", "lora_blocks", "lora_ring_step", "lora_steps", "lora_transaction_bytes",
    "lora_up_bytes", "main_ring_step", "mma_tile", "ordinals", "pair_mask", "peer_rank", "rank_of", "rank_parts",
    "raster_width", "refusal", "release_arrivals", "release_mask", "row_index", "scale_a_bytes", "scale_a_column",
    "scale_a_coordinates", "scale_offset", "scale_w_bytes", "scale_w_column", "scale_w_coordinates", "scale_w_mask",
    "scale_w_slice", "smem_bytes", "stage_of", "store_block", "tile_counts", "tile_index", "tmem_columns_allocated",
    "tmem_columns_used", "transaction_bytes", "w_bytes", "w_coordinates", "w_mask", "w_slice",
]

K_BLOCK = 256
"""Elements of K in one stage of the main ring: 128 bytes of codes a row, one 128-byte swizzle atom."""
K_STEP = 64
"""Elements of K that one mxf4nvf4 instruction contracts."""
SCALE_GROUP = 16
"""Elements of K that share one scale (scale_vec::4X: four scales for each K_STEP)."""
LORA_BLOCK = 64
"""Elements of the rank in one stage of the low-rank ring: 128 bytes of 16-bit numbers a row."""
LORA_STEP = 16
"""Elements of the rank that one f16 instruction contracts."""
CTA_ROWS = 128
"""Rows of the accumulator in one CTA: one for each lane of tensor memory and each epilogue thread."""
EPILOGUE_WARPS = 4
"""Warps that empty the accumulator: tensor memory gives each warp of a group of four its own 32 lanes."""
STORE_COLUMNS = 32
"""Output columns that the epilogue converts and stores at a time: registers a thread holds of one row."""
SCALE_TILE_BYTES = 512
"""Bytes of one scale tile: 128 rows x 4 groups."""
SMEM_CAPACITY = 232_448
"""Bytes of shared memory that one block may use."""
TMEM_COLUMNS = 512
"""Columns of tensor memory of a multiprocessor, each of 128 lanes x 32 bits."""
_BARRIER_BYTES = 1024
_OUT_BYTES = 2
_MAIN_STAGES = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """One accumulator: `m` x `n` output elements, computed by `ctas` CTAs (m = 128 * ctas)."""

    m: int
    n: int
    ctas: int


@dataclass(frozen=True, slots=True)
class Config:
    """One instance of the kernel. `out` is the output format and that of the low-rank operands, channel scale and bias.

    `lora`: whether there is a low-rank term; without it there is no low-rank ring. Stages are per CTA; `accumulators` is the
    number of accumulators in tensor memory (2: the epilogue of one tile overlaps the main loop of the next).
    """

    tile: Tile
    cluster_m: int
    cluster_n: int
    out: Literal["f16", "bf16"]
    lora: bool
    main_stages: int
    lora_stages: int
    store_stages: int
    accumulators: int

    @property
    def name(self) -> str:
        """Name of the instance, for example m256n128c2x1_f16_lora."""
        size = f"m{self.tile.m}n{self.tile.n}c{self.cluster_m}x{self.cluster_n}"
        return f"{size}_{self.out}_{'lora' if self.lora else 'nolora'}"


def ceil_div(value: int, unit: int) -> int:
    """Smallest number of units that hold `value`."""
    return (value + unit - 1) // unit


# Tiles: which cluster computes which tile, in which order.


def tile_counts(m: int, n: int, config: Config) -> tuple[int, int]:
    """Cluster tiles along m and n. At a ragged edge a cluster tile may hold tiles that lie outside the output altogether:
    they are computed from zeros and store nothing, because all CTAs of a cluster share their loads."""
    pairs_m = config.cluster_m // config.tile.ctas
    return ceil_div(m, config.tile.m * pairs_m), ceil_div(n, config.tile.n * config.cluster_n)


def raster_width(tiles_n: int) -> int:
    """Columns of cluster tiles that are walked together, for reuse in L2: the largest divisor of `tiles_n` up to 8. A divisor,
    so that every group of columns is equally wide and the walk needs no minimum. Host only."""
    return max(width for width in range(1, 9) if tiles_n % width == 0)


def clusters_launched(tiles: int, multiprocessors: int, config: Config) -> int:
    """Clusters of the persistent grid: one for each place, never more than there are cluster tiles. Host only."""
    return max(1, min(tiles, multiprocessors // cluster_size(config)))


def ordinals(cluster: int, clusters: int, tiles: int) -> int:
    """How many of `tiles` cluster tiles the cluster with this index computes."""
    return (tiles - cluster + clusters - 1) // clusters


def tile_index(cluster: int, ordinal: int, clusters: int) -> int:
    """Linear index of the cluster tile that a cluster computes as its `ordinal`-th: the stride is the grid."""
    return cluster + ordinal * clusters


def cluster_tile(index: int, tiles_m: int, width: int) -> tuple[int, int]:
    """Cluster tile (along m, along n) of a linear index: groups of `width` columns, row by row within a group."""
    within = index % (tiles_m * width)
    return within // width, index // (tiles_m * width) * width + within % width


def rank_of(v: int, pair_m: int, pair_n: int, config: Config) -> int:
    """Rank in the cluster of CTA `v` of the pair at (pair_m, pair_n)."""
    return v + config.tile.ctas * pair_m + config.cluster_m * pair_n


def rank_parts(rank: int, config: Config) -> tuple[int, int, int]:
    """(v, pair_m, pair_n) of a rank: CTA of its pair, place of the pair along m and along n in the cluster."""
    return rank % config.tile.ctas, rank % config.cluster_m // config.tile.ctas, rank // config.cluster_m


def cluster_size(config: Config) -> int:
    """CTAs of a cluster."""
    return config.cluster_m * config.cluster_n


def cluster_and_rank(block: int, config: Config) -> tuple[int, int]:
    """Cluster and rank of a CTA of the grid, which is one-dimensional: clusters_launched * cluster_size CTAs."""
    return block // cluster_size(config), block % cluster_size(config)


def leader_rank(rank: int, config: Config) -> int:
    """Rank of the CTA of the pair that issues its MMAs and owns its full barriers (v = 0)."""
    return rank // config.tile.ctas * config.tile.ctas


def peer_rank(rank: int, config: Config) -> int:
    """Rank of the other CTA of a pair (of the CTA itself where there are no pairs)."""
    return 2 * leader_rank(rank, config) + config.tile.ctas - 1 - rank


def mma_tile(place: tuple[int, int], rank: int, config: Config) -> tuple[int, int]:
    """Tile (along m, along n), in units of tile.m and tile.n, of a CTA in the cluster tile at `place`."""
    _, pair_m, pair_n = rank_parts(rank, config)
    return place[0] * (config.cluster_m // config.tile.ctas) + pair_m, place[1] * config.cluster_n + pair_n


def k_blocks(k: int) -> int:
    """Stages of the main ring that one tile takes; the last may be partly outside K, where loads deliver zeros."""
    return ceil_div(k, K_BLOCK)


def lora_blocks(r: int) -> int:
    """Stages of the low-rank ring that one tile takes."""
    return ceil_div(r, LORA_BLOCK)


def lora_steps(r: int, block: int) -> int:
    """Low-rank instructions of one block: 4, or what the rank leaves for the last block."""
    rest = r // LORA_STEP - block * (LORA_BLOCK // LORA_STEP)
    whole = LORA_BLOCK // LORA_STEP
    # min(rest, whole) for 1 <= rest <= 256 / 16, without a comparison: the quotient is 0 where rest < whole.
    over = (rest + 256 - whole) // 256
    return over * whole + (1 - over) * rest


# Rings: stage and barrier parity of a step. The steps of a ring are numbered over all tiles of a cluster.


def main_ring_step(ordinal: int, block: int, blocks: int) -> int:
    """Step of the main ring at which K block `block` of the `ordinal`-th tile is loaded and consumed."""
    return ordinal * blocks + block


def lora_ring_step(ordinal: int, block: int, blocks: int) -> int:
    """Step of the low-rank ring at which rank block `block` of the `ordinal`-th tile is loaded and consumed."""
    return ordinal * blocks + block


def stage_of(step: int, stages: int) -> int:
    """Stage of a ring that a step uses. The accumulators are a ring whose step is the ordinal."""
    return step % stages


def full_parity(step: int, stages: int) -> int:
    """Parity that the consumer of a step awaits on the full barrier of its stage: 0 on the first round."""
    return step // stages % 2


def empty_parity(step: int, stages: int) -> int:
    """Parity that the producer of a step awaits on the empty barrier of its stage: 1 on the first round, which a fresh barrier
    grants at once."""
    return (step // stages + 1) % 2


# Bytes of one stage in one CTA, and what the full barrier of the leader awaits.


def a_bytes(config: Config) -> int:
    """Codes of A in one stage of one CTA: its 128 rows of K_BLOCK codes."""
    return CTA_ROWS * K_BLOCK // 2


def w_bytes(config: Config) -> int:
    """Codes of W in one stage of one CTA: a pair shares the rows of W half and half."""
    return config.tile.n // config.tile.ctas * K_BLOCK // 2


def scale_a_bytes(config: Config) -> int:
    """Scales of A in one stage of one CTA: those of its own rows."""
    return CTA_ROWS * K_BLOCK // SCALE_GROUP


def scale_w_bytes(config: Config) -> int:
    """Scales of W in one stage of one CTA: all tile.n rows, also in a pair, because each CTA's half of the instruction
    multiplies its own rows of A with all rows of W."""
    return config.tile.n * K_BLOCK // SCALE_GROUP


def lora_act_bytes(config: Config) -> int:
    """Low-rank activations in one low-rank stage of one CTA: its 128 rows."""
    return CTA_ROWS * LORA_BLOCK * _OUT_BYTES


def lora_up_bytes(config: Config) -> int:
    """Rows of lora_up in one low-rank stage of one CTA: shared half and half by a pair, like W."""
    return config.tile.n // config.tile.ctas * LORA_BLOCK * _OUT_BYTES


def _stage_bytes(config: Config) -> int:
    return a_bytes(config) + w_bytes(config) + scale_a_bytes(config) + scale_w_bytes(config)


def _lora_stage_bytes(config: Config) -> int:
    return lora_act_bytes(config) + lora_up_bytes(config)


def transaction_bytes(config: Config) -> int:
    """Bytes that the full barrier of a main stage awaits: the loads of both CTAs of a pair report to their leader, and a
    multicast load reports in each CTA that it reaches, so it is what arrives in the pair, whoever asked for it."""
    return _stage_bytes(config) * config.tile.ctas


def lora_transaction_bytes(config: Config) -> int:
    """Bytes that the full barrier of a low-rank stage awaits, in the same sense."""
    return _lora_stage_bytes(config) * config.tile.ctas


# Multicast: which part of a shared operand a CTA loads, and which CTAs receive it or are told that a stage is free. Parts are
# equal, consecutive pieces of the operand's bytes in the stage: rows for codes and low-rank operands, scale tiles for scales.
# Masks have bit `rank` set for each CTA meant.


def a_slice(rank: int, config: Config) -> int:
    """Part (of cluster_n) of its 128 rows of A, of their scales and of lora_act, that a CTA loads."""
    return rank_parts(rank, config)[2]


def w_slice(rank: int, config: Config) -> int:
    """Part (of cluster_m / ctas) of its rows of W and of lora_up that a CTA loads."""
    return rank_parts(rank, config)[1]


def scale_w_slice(rank: int, config: Config) -> int:
    """Part (of cluster_m) of the scales of W that a CTA loads: both CTAs of a pair hold all of them, so they share this too."""
    return rank % config.cluster_m


def a_mask(rank: int, config: Config) -> int:
    """CTAs that receive what this CTA loads of A: those with its rows, over all places along n."""
    row = sum(1 << rank_of(0, 0, pair_n, config) for pair_n in range(config.cluster_n))
    return row << rank % config.cluster_m


def w_mask(rank: int, config: Config) -> int:
    """CTAs that receive what this CTA loads of W: those with its half of its columns, over all places along m."""
    v, _, pair_n = rank_parts(rank, config)
    column = sum(1 << rank_of(0, pair_m, 0, config) for pair_m in range(config.cluster_m // config.tile.ctas))
    return column << v + config.cluster_m * pair_n


def scale_w_mask(rank: int, config: Config) -> int:
    """CTAs that receive what this CTA loads of the scales of W: all with its columns, both of each pair."""
    return (1 << config.cluster_m) - 1 << rank // config.cluster_m * config.cluster_m


def pair_mask(rank: int, config: Config) -> int:
    """CTAs of the pair: those that learn that an accumulator is complete."""
    return (1 << config.tile.ctas) - 1 << leader_rank(rank, config)


def release_mask(rank: int, config: Config) -> int:
    """CTAs that a leader tells that it has read a stage: every CTA that loads into its pair's shared memory."""
    leader = leader_rank(rank, config)
    rows = sum(1 << rank_of(v, 0, pair_n, config) for v in range(config.tile.ctas) for pair_n in range(config.cluster_n))
    return rows << leader % config.cluster_m | scale_w_mask(rank, config)


def release_arrivals(config: Config) -> int:
    """Arrivals that the empty barrier of a stage awaits: one from each leader into whose pair this CTA loads."""
    return config.cluster_m // config.tile.ctas + config.cluster_n - 1


def accumulator_arrivals(config: Config) -> int:
    """Arrivals that the empty barrier of an accumulator awaits in the leader: one from each epilogue warp of the pair."""
    return EPILOGUE_WARPS * config.tile.ctas


# Coordinates in global memory.


def a_coordinates(tile_m: int, rank: int, block: int, config: Config) -> tuple[int, int, int]:
    """(first row, rows, first k) of A that a CTA loads for K block `block` of tile `tile_m`, its multicast part only."""
    v, _, pair_n = rank_parts(rank, config)
    rows = CTA_ROWS // config.cluster_n
    return tile_m * config.tile.m + v * CTA_ROWS + pair_n * rows, rows, block * K_BLOCK


def w_coordinates(tile_n: int, rank: int, block: int, config: Config) -> tuple[int, int, int]:
    """(first row, rows, first k) of W that a CTA loads for K block `block` of tile `tile_n`, its multicast part only."""
    v, pair_m, _ = rank_parts(rank, config)
    half = config.tile.n // config.tile.ctas
    rows = half // (config.cluster_m // config.tile.ctas)
    return tile_n * config.tile.n + v * half + pair_m * rows, rows, block * K_BLOCK


def scale_a_coordinates(tile_m: int, rank: int, block: int, config: Config) -> tuple[tuple[int, int], ...]:
    """(row tile of 128, group tile of 4) of the scales of A that a CTA loads for K block `block`: its multicast part only."""
    v = rank_parts(rank, config)[0]
    steps = K_BLOCK // K_STEP
    count = steps // config.cluster_n
    return tuple((tile_m * config.tile.ctas + v, block * steps + a_slice(rank, config) * count + i) for i in range(count))


def scale_w_coordinates(tile_n: int, rank: int, block: int, config: Config) -> tuple[tuple[int, int], ...]:
    """(row tile of 128, group tile of 4) of the scales of W that a CTA loads for K block `block`: its multicast part of the
    scale tiles of the stage, which lie row tile by row tile."""
    steps, row_tiles = K_BLOCK // K_STEP, config.tile.n // 128
    count = steps * row_tiles // config.cluster_m
    mine = range(scale_w_slice(rank, config) * count, scale_w_slice(rank, config) * count + count)
    return tuple((tile_n * row_tiles + i // steps, block * steps + i % steps) for i in mine)


def scale_offset(row: int, group: int, groups: int) -> int:
    """Byte of the scale of (row, group along k) in tiles of 128 rows x 4 groups; `groups` is the number of groups of a row.

    Linear in the digits row % 32, row // 32 % 4, row // 128, group % 4 and group // 4: the kernel builds its tensor map from
    the value at one unit of each digit.
    """
    tile = row // 128 * ceil_div(groups, 4) + group // 4
    return tile * SCALE_TILE_BYTES + row % 32 * 16 + row // 32 % 4 * 4 + group % 4


def row_index(tile_m: int, v: int, thread: int, config: Config) -> int:
    """Output row that epilogue thread 0..127 of CTA `v` holds: a pair splits the rows of its tile, never its columns."""
    return tile_m * config.tile.m + v * CTA_ROWS + thread


def column_index(tile_n: int, chunk: int, register: int, config: Config) -> int:
    """Output column that register 0..31 holds while chunk `chunk` of STORE_COLUMNS columns is converted; the index into
    channel scale and bias. It is the same in both CTAs of a pair and in all threads."""
    return tile_n * config.tile.n + chunk * STORE_COLUMNS + register


def store_block(tile_m: int, v: int, tile_n: int, chunk: int, config: Config) -> tuple[int, int]:
    """Block of 128 rows x STORE_COLUMNS columns of the output, counted in blocks, that one store writes."""
    return tile_m * config.tile.ctas + v, tile_n * (config.tile.n // STORE_COLUMNS) + chunk


# Budgets.


def accumulator_column(accumulator: int, config: Config) -> int:
    """First column of tensor memory of an accumulator: one column of 32-bit sums for each output column."""
    return accumulator * config.tile.n


def scale_a_column(config: Config) -> int:
    """First column of the scales of A: 128 rows x 16 scales of one stage, four scales of a row to a 32-bit cell."""
    return accumulator_column(config.accumulators, config)


def scale_w_column(config: Config) -> int:
    """First column of the scales of W, after those of A: a scale tile of 128 rows x 4 groups is 4 columns."""
    return scale_a_column(config) + CTA_ROWS // 32 * (K_BLOCK // K_STEP)


def tmem_columns_used(config: Config) -> int:
    """Columns of tensor memory in use: accumulators, scales of A, scales of W."""
    return scale_w_column(config) + config.tile.n // 32 * (K_BLOCK // K_STEP)


def tmem_columns_allocated(config: Config) -> int:
    """Columns that are allocated: the power of two, at least 32, that holds those in use. Host only."""
    return max(32, 1 << (tmem_columns_used(config) - 1).bit_length())


def _fixed_bytes(config: Config) -> int:
    """Barriers, channel scale and bias of a tile in f32, output staging."""
    return _BARRIER_BYTES + 2 * config.tile.n * 4 + config.store_stages * CTA_ROWS * STORE_COLUMNS * _OUT_BYTES


def smem_bytes(config: Config) -> int:
    """Bytes of shared memory that one CTA uses."""
    low_rank = config.lora_stages * _lora_stage_bytes(config)
    return _fixed_bytes(config) + low_rank + config.main_stages * _stage_bytes(config)


def config_of(tile: Tile, cluster: tuple[int, int], out: Literal["f16", "bf16"], lora: bool) -> Config:
    """The instance with two low-rank stages, two store stages, as many main stages as then fit (at most 8), and two
    accumulators where tensor memory holds them beside the scales. Host only."""
    bare = Config(tile, *cluster, out, lora, 0, 2 if lora else 0, 2, 2)
    double = tmem_columns_used(bare) <= TMEM_COLUMNS
    stages = min(_MAIN_STAGES, (SMEM_CAPACITY - smem_bytes(bare)) // _stage_bytes(bare))
    return Config(tile, *cluster, out, lora, stages, bare.lora_stages, bare.store_stages, 2 if double else 1)


_SHAPES = (
    (Tile(128, 128, 1), (1, 1)), (Tile(128, 256, 1), (1, 1)), (Tile(128, 128, 1), (2, 1)), (Tile(128, 128, 1), (1, 2)),
    (Tile(256, 128, 2), (2, 1)), (Tile(256, 256, 2), (2, 1)), (Tile(256, 128, 2), (2, 2)), (Tile(256, 128, 2), (4, 1)),
)
_OUTS: tuple[Literal["f16", "bf16"], ...] = ("f16", "bf16")
CONFIGS = tuple(config_of(tile, cluster, out, lora) for tile, cluster in _SHAPES for out in _OUTS for lora in (False, True))
"""The instances that are built: one-CTA and two-CTA tiles, alone and with multicast, both formats, with and without low rank."""


def choose(m: int, n: int, out: Literal["f16", "bf16"], lora: bool, multiprocessors: int = 148) -> Config:
    """The instance to prefer for a problem: one CTA of 128 x 128 while a single row of tiles covers m, else a pair of 256 x 256
    if its tiles occupy every multiprocessor (148 in a B200), else a pair of 256 x 128. A guess of ours, not a measurement.
    Host only."""
    pairs = ceil_div(m, 256) * ceil_div(n, 256)
    tile, cluster = _SHAPES[0] if m <= CTA_ROWS else _SHAPES[5] if 2 * pairs >= multiprocessors else _SHAPES[4]
    return config_of(tile, cluster, out, lora)


def refusal(m: int, n: int, k: int, r: int) -> str | None:
    """Why this kernel cannot compute D[m, n] from A[m, k], W[n, k] and rank r, in one sentence; None if it can."""
    rules = (
        (m < 1, f"m is {m}, but the grid needs at least one row: an empty output needs no launch"),
        (n < 1 or n % 8, f"n is {n}, but rows of the output are stored by tensor map: n has to be a positive multiple of 8"),
        (k < 1 or k % 32, f"k is {k}, but rows of codes are loaded by tensor map: k has to be a positive multiple of 32"),
        (r < 0 or r % LORA_STEP or r > 256, f"r is {r}, but the low-rank term takes ranks 0, 16, 32, ... 256"),
        (max(m, n, k) >= 2**24, f"m, n, k are {m}, {n}, {k}, but indices are 32-bit integers: each has to be below 2**24"),
    )
    return next((sentence for broken, sentence in rules if broken), None)
