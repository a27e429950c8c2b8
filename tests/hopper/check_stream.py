"""gemm_w4a8.cu with K dealt out, run on the emulated machine of tests/hopper/emulator: cuts inside tiles, more workers than
tiles, one multiprocessor, tails, scratch memory of any content, clusters; and what planted defects show.

Decides: that bits are those expected. Operands of small integers have sums that nothing rounds: what comes out is worked out in
integers. Of others every part of K is emulated by the judge's datapath; where K is cut is counted here unit by unit. Refuses: to
say anything about time, or about what the head of emulated.py lists as not modelled.
Named check_ so that `pytest` does not collect it by itself: it needs g++ and CUDA's headers:

    pytest tests/hopper/check_stream.py
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.kernels.hopper_room import gemm_w4a8 as room
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.dot import Operand
from lowbit.references.dot import emulate as emulate_dot
from lowbit.references.encodings import folded_weight
from lowbit.references.formats import E4M3FN, F32, decode

sys.path.append(str(Path(__file__).parent / "emulator"))
import emulated

PATH = DATAPATHS["hopper_wgmma_fp8"]
INTEGERS = np.array([0x00, 0x38, 0x40, 0x44, 0x48, 0x4A, 0x4C, 0x4E, 0xD0, 0xCE, 0xCC, 0xCA, 0xC8, 0xC4, 0xC0, 0xB8], np.uint8)
EARLY_LATE, LATE_EARLY, EITHER = ("early", "late"), ("late", "early"), ("either", "either")

Patches = Mapping[str, Sequence[tuple[str, str]]]


def operands(m: int, n: int, k: int, group: int, seed: int, small: bool) -> dict[str, np.ndarray]:
    """Codes. small: a and scales are -1, 0, 1 and 1/2 to 2, so that every sum of up to 4,096 products is a multiple of 1/2 below
    2^12 and fits 14 bits."""
    rng = np.random.default_rng(seed)
    if small:
        a = rng.choice(np.array([0, 0, 0, 0, 0x38, 0xB8], np.uint8), (m, k))
        scale = rng.choice(np.array([0x30, 0x38, 0xB8, 0x40], np.uint8), (n, k // group))
    else:
        a = rng.integers(0, 256, (m, k), dtype=np.uint8) & 0xDF  # exponents that leave sums apart
        scale = rng.integers(0x28, 0x40, (n, k // group), dtype=np.uint8)
    token, channel = (2.0 ** rng.integers(-2, 3, size) for size in (m, n))
    return {"a": a, "q": rng.integers(0, 16, (n, k), dtype=np.uint8), "scale": scale, "token": token, "channel": channel}


def run(
    name: str, variant: str, given: Mapping[str, np.ndarray], group: int, processors: int, mode: tuple[str, str], seed: int = 1,
    patches: Patches | None = None, ahead: bool = False,
) -> torch.Tensor:
    """What the kernel leaves in D, in binary16. Scratch memory holds 0xFF before, no byte beside it may change; `ahead`: work
    ahead on the stream fills it once more."""
    m, n, k = *(len(given[each]) for each in ("a", "q")), given["a"].shape[1]
    out = torch.full((m, n), float("nan"), dtype=torch.float16)
    size = room.workspace_bytes(name, m, n, k)
    memory = torch.full((size + 48,), 0xFF, dtype=torch.uint8)
    start = 16 + -memory.data_ptr() % 16
    scratch = memory[start : start + size]
    tensors = {
        each: torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.float32)) for each, array in given.items()
    }

    def fill() -> None:
        ctypes.memset(scratch.data_ptr(), 0xFF, size)

    emulated.settings(*mode, seed, processors)
    with emulated.installed(patches):
        weights = room.pack_weights(tensors["q"], tensors["scale"])
        with emulated.after(fill) if ahead else nullcontext():
            room.gemm_w4a8_fp8(
                tensors["a"], weights, tensors["token"], tensors["channel"], out, variant=variant, tactic=name, workspace=scratch,
            )
    assert bool((memory[:start] == 0xFF).all())
    assert bool((memory[start + size :] == 0xFF).all())
    return out


def exactly(given: Mapping[str, np.ndarray], group: int) -> torch.Tensor:
    """D of small operands: int4 by scale is exact in e4m3, and so is every sum."""
    q = (given["q"].astype(np.int64) ^ 8) - 8
    weights = q * np.repeat(2 * decode(given["scale"], E4M3FN), group, axis=1).astype(np.int64)
    sums = decode(given["a"], E4M3FN).astype(np.int64) @ weights.T
    assert np.abs(sums).max(initial=0) < 1 << 13
    return torch.from_numpy(sums / 2 * given["token"][:, None] * given["channel"]).to(torch.float16)


def ends_of(tiles: int, k: int, most: int, tile: int) -> list[int]:
    """Where the parts of K of a tile end: every worker takes as many units of 128 k as the next, or the first ones one more."""
    blocks = -(-k // 128)
    workers = min(most, tiles * max(1, blocks // 4))
    rest = tiles % workers
    cut = 0 if rest == 0 else min(tiles, rest + workers)
    owner = [worker for worker in range(workers) for _ in range(cut * blocks // workers + (worker < cut * blocks % workers))]
    own = owner[tile * blocks : (tile + 1) * blocks]
    return [128 * i for i in range(1, len(own)) if own[i] != own[i - 1]] + [k]


def emulated_bits(given: Mapping[str, np.ndarray], variant: str, group: int, ends: Sequence[int]) -> torch.Tensor:
    """D where K is summed in parts that end at `ends`: the datapath's chain over each (folded), or one per group, times its scale
    into a total by one rounding (exact); parts are added in binary32. Outer scales are powers of two."""
    a, q, scale = (given[name] for name in ("a", "q", "scale"))
    w = folded_weight(q, scale) if variant == "folded" else INTEGERS[q]
    values = decode(scale, E4M3FN)
    total: Any = None
    for start, stop in zip([0, *ends], ends, strict=False):
        step = group if variant == "exact" else stop - start
        part = np.zeros((len(a), len(q)), np.float32)
        for first in range(start, stop, step):
            here = slice(first, first + step)
            found = decode(emulate_dot(Operand(a[:, here], E4M3FN), Operand(w[:, here], E4M3FN), PATH), F32)
            exact = found * values[:, first // group] + part if variant == "exact" else found
            part = exact.astype(np.float32)  # at most 14 + 4 bits by 24: binary64 holds a sum of both where exponents are near
        total = part if total is None else total + part
    return torch.from_numpy(total.astype(np.float64) * given["token"][:, None] * given["channel"]).to(torch.float16)


CASES = [  # tactic, variant, M, N, K, group, multiprocessors
    ("256x8_s1", "folded", 5, 328, 1152, 64, 3), ("256x8_s1", "exact", 8, 256, 1024, 128, 3),
    ("256x64_s2", "folded", 70, 520, 1024, 128, 10), ("256x64_s2", "exact", 3, 8, 1088, 64, 4),
    ("128x128_s2", "exact", 130, 264, 1024, 128, 6), ("256x128_s1", "folded", 9, 760, 1088, 64, 5),
    ("256x128_s2", "folded", 131, 584, 640, 128, 4), ("128x256_s2", "folded", 7, 512, 1152, 128, 6),
    ("128x256_s1", "folded", 258, 136, 768, 64, 1),
]


@pytest.mark.parametrize(("name", "variant", "m", "n", "k", "group", "processors"), CASES, ids=lambda each: str(each))
def test_sums_that_nothing_rounds(name: str, variant: str, m: int, n: int, k: int, group: int, processors: int) -> None:
    given = operands(m, n, k, group, m + n, small=True)
    want = exactly(given, group)
    for mode, seed in ((EARLY_LATE, 1), (LATE_EARLY, 2), (EITHER, 3)):
        assert torch.equal(run(name, variant, given, group, processors, mode, seed), want), mode


@pytest.mark.parametrize(("name", "variant", "n", "k", "group", "processors"), [
    ("256x8_s1", "folded", 256, 1152, 128, 3), ("256x8_s1", "exact", 256, 1152, 64, 3), ("256x64_s2", "folded", 16, 2560, 64, 10),
])
def test_bits_are_those_of_the_parts(name: str, variant: str, n: int, k: int, group: int, processors: int) -> None:
    """One tile, K cut in two, and in five: the parts' chains, added in ascending order."""
    given = operands(4, n, k, group, k, small=False)
    tactic = room.TACTICS[name]
    ends = ends_of(1, k, processors // tactic.stream, 0)
    assert len(ends) > 1
    columns = slice(0, 24)
    some = {**given, "q": given["q"][columns], "scale": given["scale"][columns], "channel": given["channel"][columns]}
    want = emulated_bits(some, variant, group, ends)
    if variant == "folded":  # of `exact`, binary16 shows few of the differences
        assert not torch.equal(emulated_bits(some, variant, group, [k]), want)
    got = run(name, variant, given, group, processors, EITHER)[:, columns]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


def test_many_tiles_cut_where_the_units_are_counted() -> None:
    """Two tiles of 256 rows, 9 blocks each, three workers: cut after 6 blocks, and after 3."""
    given = operands(3, 512, 1152, 128, 4, small=False)
    assert [ends_of(2, 1152, 3, tile) for tile in (0, 1)] == [[768, 1152], [384, 1152]]
    got = run("256x8_s1", "folded", given, 128, 3, LATE_EARLY, 2)
    for first, ends in ((240, [768, 1152]), (256, [384, 1152])):
        columns = slice(first, first + 16)
        some = {**given, **{name: given[name][columns] for name in ("q", "scale", "channel")}}
        want = emulated_bits(some, "folded", 128, ends)
        assert torch.equal(torch.nan_to_num(got[:, columns]), torch.nan_to_num(want))


def test_scratch_memory_that_is_too_small_launches_nothing() -> None:
    given = {"a": torch.zeros((3, 1024), dtype=torch.uint8)}
    weights = torch.zeros((8, 1024), dtype=torch.uint8), torch.zeros((8, 8), dtype=torch.uint8)
    out = torch.zeros((3, 8), dtype=torch.float16)
    emulated.settings("early", "late", 1, 4)
    with emulated.installed():
        packed = room.pack_weights(*weights)
        with pytest.raises(emulated.MachineError, match="error 1 of the runtime"):
            room._launch(given["a"], packed, torch.ones(3), torch.ones(8), None, out, None, "folded", "256x8_s1", True,
                         torch.zeros(64, dtype=torch.uint8), None)


W4, TILES, SCHEDULE = "gemm_w4a8.cu", "gemm_w4a8_tiles.cuh", "gemm_w4a8_schedule.cuh"
DEFECTS: dict[str, tuple[Patches, str, tuple[str, str]]] = {
    "last_too_early": (
        {TILES: [("place) == (unsigned)(last - first);", "place) == (unsigned)(last - first - 1);")]}, "one", EARLY_LATE,
    ),
    "counters_not_zeroed": ({W4: [("  if (counters > 0) {", "  if (counters > 99) {")]}, "one", EARLY_LATE),
    "zeroed_before_the_work_ahead": ({W4: [("  sm90::launch_wait();\n  for (int i", "  for (int i")]}, "one", EARLY_LATE),
    "slot_of_another": ({TILES: [("from = of(next + i);", "from = of(next + i - 1);")]}, "one", EARLY_LATE),
    "descending": (
        {TILES: [("from = of(next + i);", "from = of(first + 1 + last - next - i);")]}, "parts", EARLY_LATE,
    ),
    "a_unit_twice": (
        {SCHEDULE: [("left -= done.end - done.begin, begin", "left -= done.end - done.begin - 1, begin")]}, "one", EARLY_LATE,
    ),
    "all_whole": ({W4: [("if (STREAM && !segment.whole(p.k_blocks))", "if (STREAM && p.k_blocks < 0)")]}, "one", EARLY_LATE),
    "stage_read_before_it_came": ({W4: [(
        "  if (AHEAD && blocks > 1) wait(full + 8 * ahead.stage, ahead.phase);\n  int held", "  int held",
    )]}, "one", LATE_EARLY),
    "one_block_too_late": ({W4: [(
        "      if (left > 2) wait(full + 8 * ahead.stage, ahead.phase);\n    } else",
        "      if (left > 3) wait(full + 8 * ahead.stage, ahead.phase);\n    } else",
    )]}, "one", LATE_EARLY),
    "released_early": ({W4: [(
        "    wgmma_wait<1>();  // the whole block before is done\n    if (left < blocks) release(empty, held, thread);\n",
        "    if (left < blocks) release(empty, held, thread);\n    wgmma_wait<1>();\n",
    )]}, "long", EARLY_LATE),
    "not_released_to_the_other": (
        {W4: [("sm90::arrive_remote(empty + 8 * stage, thread % 32);", "sm90::arrive(empty + 8 * stage);")]}, "pair", EARLY_LATE,
    ),
    "half_the_arrivals": ({W4: [("4 * WARPGROUPS * CLUSTER);", "4 * WARPGROUPS);")]}, "pair", EARLY_LATE),
    "half_of_the_rows": ({W4: [("+ here.rank * (TOKENS / CLUSTER);", ";")]}, "pair", EARLY_LATE),
    "sign_of_a_nibble": ({W4: [("0xd9c8", "0xd8c9")]}, "one", EARLY_LATE),
}


def cancelling() -> dict[str, np.ndarray]:
    """Five parts of 512 k: a large sum, the same with the other sign, a small one, nothing, nothing. In ascending order the small
    one comes out as it is; added to the large one, 512 x 16 x 448 > 2^21, it would lose all bits below 2^-2."""
    given = operands(4, 16, 2560, 64, 5, small=True)
    given["a"][:, :512], given["a"][:, 512:1024], given["a"][:, 1536:] = 0x58, 0xD8, 0
    given["q"][:, :1024], given["scale"][:, :16], given["scale"][:, 16:] = 7, 0x68, 0x08  # 64 and 2^-6
    given["token"], given["channel"] = np.ones(4), np.ones(16)
    return given


def test_parts_are_added_in_ascending_order() -> None:
    given = cancelling()
    q, a = (given["q"][:, 1024:1536].astype(np.int64) ^ 8) - 8, decode(given["a"][:, 1024:1536], E4M3FN).astype(np.int64)
    small = a @ q.T
    assert (small % 4 != 0).any()
    assert ends_of(1, 2560, 5, 0) == [512, 1024, 1536, 2048, 2560]
    for mode in (EARLY_LATE, EITHER):
        got = run("256x64_s2", "folded", given, 64, 10, mode)
        assert torch.equal(got, torch.from_numpy(small / 64).to(torch.float16))


@cache
def _defect_case(kind: str) -> tuple[str, dict[str, np.ndarray], int, int, torch.Tensor]:
    """(tactic, operands, group, multiprocessors, D) that a defect is shown by."""
    if kind == "parts":
        given = cancelling()
        return "256x64_s2", given, 64, 10, emulated_bits(given, "folded", 64, ends_of(1, 2560, 5, 0))
    name, m, n, k, processors = {
        "one": ("256x8_s1", 8, 512, 1152, 3), "long": ("256x8_s1", 8, 8, 6144, 1), "pair": ("256x64_s2", 64, 512, 2560, 2),
    }[kind]
    given = operands(m, n, k, 128, 11, small=True)
    return name, given, 128, processors, exactly(given, 128)


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_show(defect: str) -> None:
    """A defect changes bits or makes the machine complain on one of some machines; without it the case passes on all of them."""
    patches, kind, mode = DEFECTS[defect]
    name, given, group, processors, want = _defect_case(kind)

    def right(seed: int, how: tuple[str, str], planted: Patches | None) -> bool:
        try:
            found = run(name, "folded", given, group, processors, how, seed, planted, "ahead" in defect)
        except emulated.MachineError:
            return False
        return torch.equal(torch.nan_to_num(found), torch.nan_to_num(want))

    machines = [(seed, how) for seed in range(1, 5) for how in (mode, EITHER)]
    assert all(right(*each, None) for each in machines)
    assert not all(right(*each, patches) for each in machines)
