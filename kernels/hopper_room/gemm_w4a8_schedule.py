"""Products whose tiles are dealt out among workers by the block of K: gemm_w4a8_schedule.cuh in Python.

Decides: how many bytes of scratch memory are enough on any device of compute capability 9.0, from sizes alone, so that it is
known where there is no device (`stream_bytes`); and where K is cut in each tile of D on a device of so many multiprocessors
(`stream_cuts`). Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.conformance.backend import Cut

__all__ = ["cut_tiles", "stream_bytes", "stream_cuts", "tile_ends", "workers_for"]

_MOST_BLOCKS = 144  # blocks of threads that work at once, as in gemm_w4a8_tiles.cuh
_LEAST_BLOCKS = 4  # blocks of 128 k per worker, as in gemm_w4a8_schedule.cuh
_MOST_UNITS = (1 << 31) - 1  # of dealt tiles, likewise
_RASTER = 4  # token tiles that are neighbours in time, as in gemm_w4a8_tiles.cuh
_BLOCK = 128  # k of a packed block, 64 rows high


def stream_bytes(tokens: int, bands: int, cluster: int, m: int, n: int, k: int) -> int:
    """Bytes of slots and counters for a product of M rows of A by N rows of W: blocks of 64 `bands` rows of W by `tokens` rows of
    A, `cluster` of them with neighbouring rows in a worker. A worker has two slots of a sum in f32 for each of its elements; with
    each slot goes a counter per 64 rows."""
    tiles = -(-n // (64 * bands * cluster)) * -(-m // tokens)
    workers = min(_MOST_BLOCKS // cluster, tiles * max(1, -(-k // _BLOCK) // _LEAST_BLOCKS))
    return 2 * workers * cluster * bands * (64 * tokens * 4 + 4)


def workers_for(tiles: int, k_blocks: int, most: int) -> int:
    """Workers for `tiles` tiles (at least one) of `k_blocks` blocks of 128 k where `most` run at once."""
    return min(most, tiles * max(1, k_blocks // _LEAST_BLOCKS))


def cut_tiles(tiles: int, k_blocks: int, workers: int) -> int:
    """How many tiles, the first ones, are dealt out block by block; the others stay whole."""
    rest = tiles % workers
    cut = 0 if rest == 0 else rest if tiles < workers else rest + workers
    return 0 if cut * k_blocks > _MOST_UNITS else cut


def tile_ends(tile: int, k_blocks: int, workers: int, cut: int) -> tuple[int, ...]:
    """Blocks of 128 k at which the parts of one of `cut` tiles end: a part is what one worker has of the tile. Of all units, the
    blocks of all tiles in turn, each worker in turn takes as many as the next, or the first ones one more."""
    each, more = divmod(cut * k_blocks, workers)
    longer = more * (each + 1)

    def start(worker: int) -> int:
        return worker * each + min(worker, more)

    def worker_of(unit: int) -> int:
        return unit // (each + 1) if unit < longer else more + (unit - longer) // each

    first, last = tile * k_blocks, (tile + 1) * k_blocks
    return (*(start(worker) - first for worker in range(worker_of(first) + 1, worker_of(last - 1) + 1)), k_blocks)


def stream_cuts(tokens: int, bands: int, cluster: int, m: int, n: int, k: int, processors: int) -> tuple[Cut, ...]:
    """Where K is cut in D [m, n] on a device of so many multiprocessors: tiles of `tokens` rows of D by 64 `bands` `cluster`
    columns, in the order in which they are dealt out, then what stays whole in as few rectangles as do. Empty where all does.
    A worker is a cluster of `cluster` blocks of threads, of which each takes a whole multiprocessor."""
    width, k_blocks = 64 * bands * cluster, -(-k // _BLOCK)
    across, down = -(-n // width), -(-m // tokens)
    if across * down == 0:
        return ()
    workers = workers_for(across * down, k_blocks, min(processors, _MOST_BLOCKS) // cluster)
    cut = cut_tiles(across * down, k_blocks, workers)

    def rectangle(rows: tuple[int, int], columns: tuple[int, int], ends: tuple[int, ...]) -> Cut:
        """Of tiles, clipped to D; ends in blocks of K, clipped to K."""
        (top, bottom), (left, right) = rows, columns
        kept = tuple(min(k, _BLOCK * end) for end in ends)
        return Cut((top * tokens, min(m, bottom * tokens)), (left * width, min(n, right * width)), kept)

    found = [
        rectangle((row, row + 1), (column, column + 1), tile_ends(tile, k_blocks, workers, cut))
        for tile, (row, column) in zip(range(cut), _tiles(down, across), strict=False)
    ]
    if all(len(each.ends) == 1 for each in found):
        return ()
    band, within = divmod(cut, across * _RASTER)  # of the first tile that stays whole
    first, last = min(down, band * _RASTER), min(down, (band + 1) * _RASTER)
    column, row = divmod(within, max(1, last - first))
    begun = column + (row > 0)
    whole = (((first + row, last), (column, begun)), ((first, last), (begun, across)), ((last, down), (0, across)))
    found += [rectangle(rows, columns, (k_blocks,)) for rows, columns in whole if rows[0] < rows[1] and columns[0] < columns[1]]
    return tuple(found)


def _tiles(down: int, across: int) -> Iterator[tuple[int, int]]:
    """(row, column) of each tile in the order of the kernel: four token tiles at a time, then along N, tokens fastest."""
    for first in range(0, down, _RASTER):
        for column in range(across):
            for row in range(first, min(first + _RASTER, down)):
                yield row, column
