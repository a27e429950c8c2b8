"""How the Hopper room deals out tiles by the block of K: gemm_w4a8_schedule.cuh compiled as C++, asked for all that it decides.

What must come out is counted here unit by unit: nothing of the header's arithmetic is used.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lowbit.kernels.hopper_room import gemm_w4a8_schedule
from lowbit.kernels.hopper_room.build import ROOM
from lowbit.kernels.hopper_room.gemm_w4a8_schedule import cut_tiles, stream_bytes, stream_cuts, tile_ends, workers_for
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Cut, misfit

PROGRAM = r"""
#include "gemm_w4a8_schedule.cuh"
extern "C" int segments(int tiles, int k_blocks, int most, int* workers, int* cut, int* rows, int room) {
  *workers = schedule::workers_for(tiles, k_blocks, most), *cut = schedule::cut_tiles(tiles, k_blocks, *workers);
  const schedule::Deal deal = schedule::deal(k_blocks, *workers, *cut);
  int count = 0;
  for (int worker = 0; worker < *workers; ++worker) {
    for (schedule::Walk walk(deal, worker); walk.tile < tiles; walk.next()) {
      const schedule::Segment found = walk.segment();
      const bool whole = found.whole(k_blocks);
      const int first = whole ? worker : deal.first(found.tile), last = whole ? worker : deal.last(found.tile);
      const int slot = whole ? -1 : deal.slot(worker, worker == first);
      const int row[] = {worker, found.tile, found.begin, found.end, first, last, slot};
      for (int i = 0; i < 7 && count < room; ++i) rows[7 * count + i] = row[i];
      ++count;
    }
  }
  return count;
}
extern "C" int cut_of(long long tiles, int k_blocks, int workers) { return schedule::cut_tiles(tiles, k_blocks, workers); }
"""

SIZES = [
    (tiles, k_blocks, most)
    for tiles in (1, 2, 3, 7, 48, 66, 131, 132, 133, 264, 265, 400)
    for k_blocks in (1, 3, 4, 8, 9, 31, 96)
    for most in (1, 2, 5, 66, 132, 144)
]


@dataclass(frozen=True, slots=True)
class Segment:
    """A worker's part of a tile, the workers that it believes to have the tile, its slot (-1: the tile is its own)."""

    worker: int
    tile: int
    begin: int
    end: int
    first: int
    last: int
    slot: int


@pytest.fixture(scope="session")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The header as a library of this machine."""
    assert shutil.which("g++"), "g++ is needed to compile the schedule"
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "schedule.cpp").write_text(PROGRAM, encoding="utf-8")
    made = folder / "schedule.so"
    words = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*words, "-shared", "-fPIC", f"-I{ROOM}", str(folder / "schedule.cpp"), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def dealt(schedule: ctypes.CDLL, tiles: int, k_blocks: int, most: int) -> tuple[int, int, list[Segment]]:
    """(workers, tiles that are cut, every segment, worker by worker)."""
    rows = np.zeros((tiles + 2 * most, 7), dtype=np.int32)
    workers, cut = ctypes.c_int(), ctypes.c_int()
    count = schedule.segments(
        tiles, k_blocks, most, ctypes.byref(workers), ctypes.byref(cut), ctypes.c_void_p(rows.ctypes.data), len(rows)
    )
    assert count <= len(rows)
    return workers.value, cut.value, [Segment(*map(int, row)) for row in rows[:count]]


def complaints(tiles: int, k_blocks: int, most: int, workers: int, cut: int, segments: list[Segment]) -> Iterator[str]:
    """What is wrong with a deal."""
    if not 1 <= workers <= most:
        yield f"{workers} workers"
    owners: dict[int, list[Segment]] = defaultdict(list)
    load: dict[int, int] = defaultdict(int)
    for segment in segments:
        owners[segment.tile].append(segment)
        load[segment.worker] += segment.end - segment.begin
        if not 0 <= segment.begin < segment.end <= k_blocks:
            yield f"{segment}: no blocks of k"
        if segment.tile >= cut and (segment.begin, segment.end) != (0, k_blocks):
            yield f"{segment}: a tile beyond {cut} is cut"
    for tile in range(tiles):
        parts = sorted(owners[tile], key=lambda part: part.begin)
        units = [unit for part in parts for unit in range(part.begin, part.end)]
        if units != list(range(k_blocks)):
            yield f"tile {tile}: units {units[:5]}... of {k_blocks}"
        names = [part.worker for part in parts]
        if names != list(range(names[0], names[0] + len(names))):
            yield f"tile {tile}: workers {names}"
        if any((part.first, part.last) != (names[0], names[-1]) for part in parts if part.slot >= 0):
            yield f"tile {tile}: who has it is not known to all"
        if (len(parts) > 1) != any(part.slot >= 0 for part in parts):
            yield f"tile {tile}: {len(parts)} parts and slots {[part.slot for part in parts]}"
    slots = [segment.slot for segment in segments if segment.slot >= 0]
    if len(slots) != len(set(slots)) or any(not 0 <= slot < 2 * workers for slot in slots):
        yield f"slots {sorted(slots)}"
    if any(segment.slot >= 0 and segment.slot // 2 != segment.worker for segment in segments):
        yield "a slot of another worker"
    for worker in range(workers):
        order = [segment.tile for segment in segments if segment.worker == worker]
        if order != sorted(set(order)):
            yield f"worker {worker}: tiles {order}"
    if cut and max(load.values()) - min(load[worker] for worker in range(workers)) > 1:
        yield f"loads from {min(load.values())} to {max(load.values())}"


def test_every_unit_is_multiplied_once_and_every_sum_has_its_place(schedule: ctypes.CDLL) -> None:
    found = {size: list(complaints(*size, *dealt(schedule, *size))) for size in SIZES}
    assert {size: said for size, said in found.items() if said} == {}


def test_every_rule_refuses_what_it_is_for(schedule: ctypes.CDLL) -> None:
    """7 tiles of 9 blocks for 5 workers: 63 units, 12 or 13 each."""
    size = (7, 9, 5)
    workers, cut, segments = dealt(schedule, *size)
    assert (workers, cut) == (5, 7)
    changed = {
        "units": [*segments[:1], *segments[2:]], "no blocks of k": [Segment(0, 0, 0, 10, 0, 0, -1), *segments[1:]],
        "not known to all": [Segment(*(*_values(s)[:4], 0, 4, s.slot)) for s in segments],
        "slots [": [Segment(*(*_values(s)[:6], min(s.slot, 1))) for s in segments],
        "another worker": [Segment(*(*_values(s)[:6], s.slot and 9 - s.slot)) for s in segments],
        "parts and slots": [Segment(*(*_values(s)[:6], -1)) for s in segments],
        "loads from": [Segment(0, *_values(s)[1:]) for s in segments],
    }
    for said, wrong in changed.items():
        assert any(said in text for text in complaints(*size, workers, cut, wrong)), said
    assert any("is cut" in text for text in complaints(*size, workers, 3, segments))
    assert any("workers" in text for text in complaints(7, 9, 4, workers, cut, segments))


def _values(segment: Segment) -> tuple[int, ...]:
    return (segment.worker, segment.tile, segment.begin, segment.end, segment.first, segment.last, segment.slot)


def test_what_is_cut_by_hand(schedule: ctypes.CDLL) -> None:
    """48 tiles of 96 blocks on 132 multiprocessors: 4,608 = 120 x 35 + 12 x 34 units; the first tile goes to 35 + 35 + 26 of
    them. A segment begins where a worker or a tile does; both do at 0 and at 35 x 96."""
    workers, cut, segments = dealt(schedule, 48, 96, 132)
    assert (workers, cut, len(segments)) == (132, 48, 132 + 48 - 2)
    assert [(s.worker, s.begin, s.end) for s in segments if s.tile == 0] == [(0, 0, 35), (1, 35, 70), (2, 70, 96)]
    assert dealt(schedule, 132, 96, 132)[:2] == (132, 0)  # every worker has a tile
    assert dealt(schedule, 140, 96, 132)[:2] == (132, 140)  # 8 tiles are left over: they and 132 more are dealt out
    assert dealt(schedule, 1000, 96, 132)[:2] == (132, 76 + 132)  # 7 rounds and 76 tiles
    assert dealt(schedule, 48, 7, 132)[:2] == (48, 0)  # too few blocks for more than one worker each
    assert dealt(schedule, 1, 8, 132)[:2] == (2, 1)


def test_what_is_declared_is_what_is_dealt(schedule: ctypes.CDLL) -> None:
    """DEC-6: the Python twin has the header's workers and cut tiles, and ends parts where the header's segments end."""
    for tiles, k_blocks, most in SIZES:
        workers, cut, segments = dealt(schedule, tiles, k_blocks, most)
        assert workers_for(tiles, k_blocks, most) == workers
        assert cut_tiles(tiles, k_blocks, workers) == cut
        ends: dict[int, list[int]] = defaultdict(list)
        for segment in segments:
            ends[segment.tile].append(segment.end)
        for tile in range(cut):
            assert tile_ends(tile, k_blocks, workers, cut) == tuple(sorted(ends[tile])), (tiles, k_blocks, most, tile)


SHAPES = [  # tokens, bands, cluster, M, N, K, multiprocessors
    (8, 4, 1, 1, 12288, 12288, 132), (64, 4, 2, 200, 3000, 2048, 132), (16, 4, 1, 70, 1040, 1088, 7),
    (128, 2, 2, 1030, 648, 704, 10), (64, 4, 1, 640, 2056, 1024, 16), (128, 2, 1, 1000, 1288, 1472, 9),
    (256, 2, 1, 4096, 12288, 1536, 132), (8, 4, 2, 9, 8, 64, 3), (8, 2, 1, 62, 432, 1024, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_lies_in_a_rectangle_with_its_cuts(schedule: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    """DEC-6: rectangles hold each element once, and a tile lies in one that is cut where the header's workers change. Tiles come
    four down, then along N, then the next four down."""
    tokens, bands, cluster, m, n, k, multiprocessors = shape
    width, k_blocks = 64 * bands * cluster, -(-k // 128)
    across, down = -(-n // width), -(-m // tokens)
    _, _, segments = dealt(schedule, across * down, k_blocks, multiprocessors // cluster)
    ends: dict[int, set[int]] = defaultdict(set)
    for segment in segments:
        ends[segment.tile].add(min(k, 128 * segment.end))
    cuts = stream_cuts(tokens, bands, cluster, m, n, k, multiprocessors)
    assert bool(cuts) == any(len(each) > 1 for each in ends.values())
    assert misfit(Contraction(("a", "w"), DATAPATHS["hopper_wgmma_fp8"], cuts=cuts), m, n, k) == ""
    order = sorted(((row, column) for row in range(down) for column in range(across)), key=lambda at: (at[0] // 4, at[1], at[0]))
    for tile, (row, column) in enumerate(order):
        rows, columns = (row * tokens, min(m, (row + 1) * tokens)), (column * width, min(n, (column + 1) * width))
        over = [cut for cut in cuts if cut.rows[0] < rows[1] and rows[0] < cut.rows[1]
                and cut.columns[0] < columns[1] and columns[0] < cut.columns[1]]
        assert [cut.ends for cut in over] == ([tuple(sorted(ends[tile]))] if cuts else []), (tile, row, column)


def test_rectangles_by_hand() -> None:
    """Tiles of 8 rows by 64 x 4 columns, K of 8 blocks, 5 multiprocessors: 6 x 2 tiles are two rounds of five and 2, so that 7
    are dealt out: 56 units, 12 for the first worker and 11 for the others, which begin at 12, 23, 34 and 45. The first eight
    tiles are rows 0 to 3 of both columns: 7 ends after row 2 of the second column."""
    ends = ((8,), (4, 8), (7, 8), (8,), (2, 8), (5, 8), (8,))
    parts = [tuple(128 * end for end in each) for each in ends]
    want = [Cut((8 * row, 8 * row + 8), (0, 256), parts[row]) for row in range(4)]
    want += [Cut((8 * row, 8 * row + 8), (256, 400), parts[4 + row]) for row in range(3)]
    want += [Cut((24, 32), (256, 400), (1024,)), Cut((32, 45), (0, 400), (1024,))]
    assert stream_cuts(8, 4, 1, 45, 400, 1024, 5) == tuple(want)
    assert stream_cuts(8, 4, 1, 0, 400, 1024, 5) == ()
    assert stream_cuts(8, 4, 1, 40, 400, 1024, 5) == ()  # two tiles each


def test_units_are_counted_in_32_bits(schedule: ctypes.CDLL) -> None:
    """2^31 - 1 = 7 x 306,783,378 + 1 units: one tile more would be counted beyond."""
    cut = schedule.cut_of
    assert cut(ctypes.c_longlong(7), 306783378, 8) == 7
    assert cut(ctypes.c_longlong(7), 306783379, 8) == 0
    assert [cut_tiles(7, blocks, 8) for blocks in (306783378, 306783379)] == [7, 0]


def test_scratch_memory_is_enough_on_every_device(schedule: ctypes.CDLL) -> None:
    """Slots and counters of any number of workers up to 144 blocks of threads lie within what the host asks for."""
    for tokens, bands, cluster in ((8, 4, 1), (128, 4, 2), (256, 2, 2)):
        for m, n, k in ((1, 8, 64), (1, 12288, 12288), (300, 1000, 1024), (2048, 4096, 4096), (256, 12288, 36864)):
            tiles, k_blocks = -(-n // (64 * bands * cluster)) * -(-m // tokens), -(-k // 128)
            given = stream_bytes(tokens, bands, cluster, m, n, k)
            needed = []
            for blocks in (cluster, 60, 114, 132, 144):
                workers, cut, segments = dealt(schedule, tiles, k_blocks, blocks // cluster)
                slots = 2 * workers * cluster * bands * 64 * tokens * 4
                needed.append(slots + cut * cluster * bands * 4)
                assert all(segment.slot < 2 * workers for segment in segments)
            assert given >= max(needed), (tokens, m, n, k)
            assert given < 1.1 * max(needed) + 4096 or max(needed) == 0, (tokens, m, n, k)


def test_constants_are_those_of_the_sources() -> None:
    for name, source in (
        ("MOST_BLOCKS", "gemm_w4a8_tiles.cuh"), ("RASTER", "gemm_w4a8_tiles.cuh"), ("LEAST_BLOCKS", "gemm_w4a8_schedule.cuh"),
        ("MOST_UNITS", "gemm_w4a8_schedule.cuh"),
    ):
        found = re.search(rf"constexpr int {name} = (\w+);", Path(ROOM / source).read_text(encoding="utf-8"))
        assert found
        assert getattr(gemm_w4a8_schedule, f"_{name}") == int(found[1], 0)
