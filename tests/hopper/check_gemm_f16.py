"""gemm_w4a8_f16.cu run on the emulated machine (tests/hopper/emulator): bits, whatever the order of threads, copies and products.

Decides: that every int4 code under every scale at every place of a block, and every e4m3 code, comes out exactly; that sums which
round nowhere are those of integers for every instance, shape, cut of K and order of events; that the others have the declared
bits; that bits depend on nothing but operands and the number of multiprocessors; and that planted defects are found.
Packed weights and the order of k in the activations' image are written here from the PTX ISA's picture of fragments, with no line
of the room. Refuses: to stand in for a device.
Named check_ so that `pytest` does not collect it by itself: it needs CUDA's headers and g++:

    pytest tests/hopper/check_gemm_f16.py
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lowbit.conformance.op import parse_problem
from lowbit.conformance.ops import ops
from lowbit.kernels.hopper_room import gemm_w4a8_f16 as room
from lowbit.references.dot import Operand
from lowbit.references.formats import E4M3FN, INT4, decode
from lowbit.references.interpret import Environment, Factor, emulate

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import emulated

SOURCE = "gemm_w4a8_f16.cu"
INSTANCES = [(tactic, group) for tactic in room.TACTICS for group in (64, 128)]
EARLY, LATE, EITHER = 0, 1, 2  # when a copy or a product happens: at once, when nothing else can, by the seed
E4M3 = decode(np.arange(256, dtype=np.uint8), E4M3FN)
ONE = 0x38  # 1.0 in e4m3


def value(codes: np.ndarray) -> np.ndarray:
    """Of two's complement codes in the low four bits."""
    return np.where(codes > 7, codes.astype(np.int64) - 16, codes.astype(np.int64))


def packed(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes of codes [N, K] and scales [N, K / G]: per block of 64 rows by 128 k two runs of 16 bytes per thread, a word for each
    32 k and row of the thread; nibble j holds k = 4 c + j, nibble 4 + j k = 16 + 4 c + j, as value + 8. Then the scales, row and
    row eight down together, group by group."""
    (n, k), per = codes.shape, 128 * scales.shape[1] // codes.shape[1]
    down, along = -(-n // 64), -(-k // 128)
    plus = np.full((64 * down, 128 * along), 8, dtype=np.uint32)
    plus[:n, :k] = value(codes) + 8
    factors = np.zeros((64 * down, per * along), dtype=np.uint8)
    factors[:n, : scales.shape[1]] = scales
    plus, factors = plus.reshape(down, 64, along, 128), factors.reshape(down, 64, along, per)
    words = np.zeros((down, along, 2, 128, 4), dtype="<u4")
    thread = np.arange(128)
    for run in range(2):
        for word in range(4):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (word % 2)
            first = 64 * run + 32 * (word // 2) + 4 * (thread % 4)
            for nibble in range(8):
                at = first + 16 * (nibble // 4) + nibble % 4
                words[:, :, run, :, word] |= np.moveaxis(plus[:, row, :, at], 0, 2) << np.uint32(4 * nibble)
    pairs = np.empty((down, along, 32, per, 2), dtype=np.uint8)
    for pair in range(32):
        for lower in range(2):
            pairs[:, :, pair, :, lower] = factors[:, 16 * (pair // 8) + pair % 8 + 8 * lower]
    blocks = (words.view(np.uint8).reshape(down, along, -1), pairs.reshape(down, along, -1))
    return np.concatenate(blocks, axis=2).reshape(-1)


def aligned(array: np.ndarray) -> np.ndarray:
    """The same elements at a multiple of 16 bytes."""
    memory = np.zeros(array.nbytes + 16, dtype=np.uint8)
    start = -memory.ctypes.data % 16
    placed = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


@dataclass(frozen=True)
class Operands:
    """a: codes [M, K]; codes, scales: of the weights; token, channel, bias: factors, None for ones and nothing."""

    a: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    token: np.ndarray | None = None
    channel: np.ndarray | None = None
    bias: np.ndarray | None = None
    half: bool = False
    alignment: int = 0  # elements by which D starts beyond a multiple of 16 bytes


@dataclass(frozen=True)
class Machine:
    copies: int = EARLY
    products: int = LATE
    seed: int = 1
    processors: int = 4
    patches: tuple[tuple[str, str], ...] = field(default=())
    ahead: bool = False  # work ahead on the stream writes A and the weights, and uses the workspace


@cache
def kernel(tactic: str, group: int, processors: int, patches: tuple[tuple[str, str], ...]) -> Any:
    """The compiled source. A library remembers how many multiprocessors there were, so that each number gets a copy."""
    path = emulated.emulated_library(SOURCE, room.defines(room.TACTICS[tactic], group), patches={SOURCE: patches})
    copy = path.with_name(f"{path.stem}-{processors}.so")
    if not copy.exists():
        shutil.copy(path, copy)
    function = emulated._loaded(copy).lowbit_gemm_w4a8_f16
    function.argtypes, function.restype = room._SIGNATURE, ctypes.c_int
    return function


def run(tactic: str, group: int, given: Operands, machine: Machine, missing: int = 0) -> tuple[int, np.ndarray, np.ndarray]:
    """The function's answer, D [M, N] as the product left it, and the workspace, which is `missing` bytes too short."""
    (m, k), n = given.a.shape, given.codes.shape[0]
    a = aligned(np.full((m, -(-k // 16) * 16 + 16), 0x7F, dtype=np.uint8))
    a[:, :k] = given.a
    weights = aligned(packed(given.codes, given.scales))
    token = aligned(np.ones(m, np.float32) if given.token is None else given.token.astype(np.float32))
    channel = aligned(np.ones(n, np.float32) if given.channel is None else given.channel.astype(np.float32))
    form = np.float16 if given.half else ml_dtypes.bfloat16
    bias = None if given.bias is None else aligned(given.bias.astype(form).view(np.uint16))
    around = aligned(np.full((m, n + 16), 0xABCD, dtype=np.uint16))
    memory = aligned(np.full(room.workspace(tactic, n, k) - missing, 0xFF, dtype=np.uint8))
    emulated.settings(machine.copies, machine.products, machine.seed, machine.processors)
    final = [(array, array.copy()) for array in (a, weights)]

    def work() -> None:
        memory[...] = 0x55
        for array, content in final:
            array[...] = content

    if machine.ahead:
        a[...], weights[...] = 0x7F, 0xEE
    with emulated.after(work) if machine.ahead else nullcontext():
        answer = kernel(tactic, group, machine.processors, machine.patches)(
            a.ctypes.data, a.shape[1], weights.ctypes.data, token.ctypes.data, channel.ctypes.data,
            None if bias is None else bias.ctypes.data, around.ctypes.data + 2 * given.alignment, n + 16, memory.ctypes.data,
            memory.nbytes, m, n, k, int(given.half), None,
        )
        emulated.finish()
    inside = slice(given.alignment, given.alignment + n)
    assert (np.delete(around, np.r_[inside], axis=1) == 0xABCD).all()
    return answer, around[:, inside].copy().view(form), memory


def product(tactic: str, group: int, given: Operands, machine: Machine) -> np.ndarray:
    answer, d, _ = run(tactic, group, given, machine)
    assert answer == 0
    return d


def exact(rng: np.random.Generator, m: int, n: int, k: int, group: int) -> tuple[Operands, np.ndarray]:
    """Operands with which nothing rounds before the cast, and D over the integers (times powers of two), before the cast."""
    a = rng.integers(-4, 5, (m, k))
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scale = 2.0 ** rng.integers(-2, 3, (n, k // group)) * rng.choice([-1, 1], (n, k // group))
    token, channel, bias = 2.0 ** rng.integers(-3, 1, m), 2.0 ** rng.integers(-3, 1, n), rng.integers(-8, 9, n).astype(float)
    groups = (a[:, None, :] * value(codes)[None]).reshape(m, n, -1, group).sum(axis=3)
    total = (groups * scale).sum(axis=2) * token[:, None] * channel + bias
    form = ml_dtypes.float8_e4m3fn
    given = Operands(
        a.astype(form).view(np.uint8), codes, scale.astype(form).view(np.uint8), token, channel, bias, bool(rng.integers(2)),
        int(rng.integers(2)) * 3,
    )
    return given, total


def rounded(total: np.ndarray, form: Any) -> np.ndarray:
    return total.astype(np.float32).astype(form).astype(np.float64)


@pytest.mark.parametrize("group", [64, 128])
def test_every_weight_under_every_scale_is_exact_at_every_place(group: int) -> None:
    """Rows of A are unit vectors; N = 4096 rows of W hold 16 codes under 256 scales at each of 128 k. A product of 3 by 4 bits
    fits bf16."""
    n, k, tokens = 4096, 128, 64
    row = np.arange(n)[:, None]
    codes = ((row // 256 + np.arange(k)) % 16).astype(np.uint8)
    scales = np.repeat((row % 256).astype(np.uint8), k // group, axis=1)
    for start in range(0, k, tokens):
        a = np.zeros((tokens, k), dtype=np.uint8)
        a[np.arange(tokens), start + np.arange(tokens)] = ONE
        got = product("256x64_f16x2", group, Operands(a, codes, scales), Machine(seed=start)).astype(np.float64)
        want = (value(codes[:, start : start + tokens]) * E4M3[scales[:, :1]]).T
        assert np.array_equal(got, want, equal_nan=True)
    for at in range(k):
        assert len(set(zip(codes[:, at].tolist(), scales[:, 0].tolist(), strict=True))) == 16 * 256


@pytest.mark.parametrize("tactic", room.TACTICS)
def test_every_activation_is_exact_at_every_place(tactic: str) -> None:
    """Row n of W is the unit vector of k = n; the 254 finite codes come at each k."""
    k, tokens = 128, room.TACTICS[tactic].tokens
    codes, scales = np.eye(k, dtype=np.uint8), np.full((k, 1), ONE, dtype=np.uint8)
    seen: set[tuple[int, int]] = set()
    for first in range(0, 256, tokens):
        a = ((np.arange(first, first + tokens)[:, None] + np.arange(k)) % 256).astype(np.uint8)
        a[(a & 0x7F) == 0x7F] = 0
        got = product(tactic, 128, Operands(a, codes, scales), Machine(LATE, EARLY, first))
        assert np.array_equal(got.astype(np.float64), E4M3[a])
        seen |= {(int(code), place) for line in a for place, code in enumerate(line)}
    assert seen == {(code, place) for code in range(256) if code & 0x7F != 0x7F for place in range(k)}


@pytest.mark.parametrize(("tactic", "group"), INSTANCES)
def test_nan_stays_in_its_row_and_column(tactic: str, group: int) -> None:
    """One in A makes its row of D NaN, whatever the weights; one among the scales its column, even where all products are 0."""
    m, n, k = room.TACTICS[tactic].tokens, 136, 256
    given, _ = exact(np.random.default_rng(m + group), m, n, k, group)
    given.a[m - 3, 77], given.a[m - 1, k - 1] = 0x7F, 0xFF
    given.scales[5, k // group - 1], given.scales[n - 1, 0] = 0x7F, 0xFF
    given.codes[:, 77], given.codes[n - 1] = 0, 0
    groups = (np.nan_to_num(E4M3[given.a])[:, None, :] * value(given.codes)[None]).reshape(m, n, -1, group).sum(axis=3)
    assert given.token is not None
    total = (groups * E4M3[given.scales]).sum(axis=2) * given.token[:, None] * given.channel + given.bias
    total[[m - 3, m - 1]], total[:, [5, n - 1]] = np.nan, np.nan
    got = product(tactic, group, given, Machine(EITHER, EITHER, m, 3))
    assert np.array_equal(got.astype(np.float64), rounded(total, got.dtype), equal_nan=True)


@pytest.mark.parametrize("tactic", room.TACTICS)
def test_the_image_holds_each_k_where_the_fragment_meets_it(tactic: str) -> None:
    """The PTX ISA has in register i of an A fragment (m64nNk16, 16-bit operands), half h, lane l: row l / 4 + 8 (i % 2), and
    k = 2 (l % 4) + h + 8 (i / 2); of fragment f it is made of nibbles 2 f + i / 2 and four on. B is swizzled: sixteen bytes p of
    a row r of 128 lie at p xor r % 8."""
    tokens, k = room.TACTICS[tactic].tokens, 192
    rng = np.random.default_rng(tokens)
    a = rng.integers(0, 0x7F, (tokens - 1, k), dtype=np.uint8)
    given = Operands(a, np.zeros((8, k), np.uint8), np.zeros((8, k // 64), np.uint8))
    _, _, memory = run(tactic, 64, given, Machine())
    image = memory[: room.image_bytes(tactic, k)].view(np.float16).reshape(2, 2, tokens, 8, 8)  # block, half, row, 16 bytes
    place = {}
    for fragment in range(2):
        for register in range(0, 4, 2):
            for lane in range(4):
                for half in range(2):
                    nibble = 2 * fragment + register // 2 + 4 * half
                    at = 4 * lane + nibble if nibble < 4 else 16 + 4 * lane + nibble - 4
                    place[16 * fragment + 2 * lane + half + 8 * (register // 2)] = at
    assert sorted(place) == sorted(place.values()) == list(range(32))
    for row in range(tokens):
        for position in range(256):
            block, inner = divmod(position, 128)
            piece = inner % 64 // 8
            got = image[block, inner // 64, row, piece ^ row % 8, inner % 8]
            at = position // 32 * 32 + place[position % 32]
            assert got == (E4M3[a[row, at]] if row < tokens - 1 and at < k else 0.0), (row, position)


@pytest.mark.parametrize(("tactic", "group"), INSTANCES)
def test_sums_that_round_nowhere_are_those_of_integers(tactic: str, group: int) -> None:
    rng = np.random.default_rng(room.TACTICS[tactic].tokens + group)
    shapes = [(264, 640, 1), (8, group, 2), (520, 192, 3), (72, 1024, 7), (1032, 1536, 132), (512, 2048, 4), (1288, 448, 5)]
    events = [(EARLY, LATE), (LATE, EARLY), (EITHER, EITHER), (LATE, LATE), (EARLY, EARLY)]
    for number, (n, k, processors) in enumerate(shapes):
        m = int(rng.integers(1, room.TACTICS[tactic].tokens + 1))
        given, total = exact(rng, m, n, -(-k // group) * group, group)
        copies, products = events[number % len(events)]
        processors = max(processors, room.TACTICS[tactic].cluster)
        machine = Machine(copies, products, int(rng.integers(1000)), processors, ahead=number % 2 == 1)
        got = product(tactic, group, given, machine)
        assert np.array_equal(got.astype(np.float64), rounded(total, got.dtype)), (m, n, k, processors)


@pytest.mark.parametrize(("tactic", "group"), INSTANCES)
def test_other_sums_have_the_declared_bits(tactic: str, group: int) -> None:
    """Activations of either sign, of one sign (every cut goes one way), and over all exponents; where K is cut and in which order
    each 32 of it are taken is declared (DEC-6, DEC-7)."""
    tokens = room.TACTICS[tactic].tokens
    rng = np.random.default_rng(tokens * group)
    for kind, (n, k, processors) in enumerate(((72, 1024, 5), (264, 2048, 7), (64, 640, 3))):
        m = min(tokens, 8)
        a = rng.integers(0, 0x7F, (m, k), dtype=np.uint8)
        a |= rng.integers(0, 2, (m, k), dtype=np.uint8) << 7 if kind == 0 else 0
        if kind == 1:
            a = a & np.uint8(0xF) | np.uint8(0x50)
        codes = rng.integers(1 if kind == 1 else 0, 8 if kind == 1 else 16, (n, k), dtype=np.uint8)
        scales = rng.integers(1, 0x7F, (n, k // group), dtype=np.uint8)
        found = parse_problem(f"gemm_w4a8_fp8/exact/m{m}n{n}k{k}g{group}/bf16", ops())
        environment: Environment = {
            "a": Operand(a, E4M3FN), "w": Operand(codes, INT4), "group_scale": Factor(E4M3[scales], "n", grouped=True),
            "token_scale": Factor(np.ones(m), "m"), "channel_scale": Factor(np.ones(n), "n"),
        }
        want = emulate(room.declaration(found, tactic, processors), environment)
        got = product(tactic, group, Operands(a, codes, scales), Machine(EITHER, EITHER, kind, processors)).astype(np.float64)
        assert not want.nan.any()
        assert np.array_equal(got, want.lo)


@pytest.mark.parametrize("tactic", room.TACTICS)
def test_the_order_of_k_is_that_of_the_instructions(tactic: str) -> None:
    """DEC-7 by hand: 448 x 7 at k = 0 to 14, 2^-9 at 15, -448 x 7 at 16 to 30. An instruction has eight of k = 0 to 15 and eight
    of 16 to 31, so that large products cancel in each; in ascending order 15 x 3136 > 2^15 would leave no bit for 2^-9."""
    a, codes = np.zeros((1, 64), np.uint8), np.full((8, 64), 7, np.uint8)
    a[0, :15], a[0, 15], a[0, 16:31], codes[:, 15] = 0x7E, 0x01, 0xFE, 1
    got = product(tactic, 64, Operands(a, codes, np.full((8, 1), ONE, np.uint8)), Machine())
    assert (got.astype(np.float64) == 2.0**-9).all()


def test_bits_follow_from_operands_and_multiprocessors_alone() -> None:
    """Not from the order of events, the content of the workspace, nor from other rows or their number."""
    rng = np.random.default_rng(9)
    n, k, tactic = 520, 1536, "256x16_f16"
    a = rng.integers(0, 0x7F, (16, k), dtype=np.uint8) | rng.integers(0, 2, (16, k), dtype=np.uint8) << 7
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = rng.integers(1, 0x7F, (n, k // 128), dtype=np.uint8)
    want = product(tactic, 128, Operands(a, codes, scales), Machine(processors=7)).view(np.uint16)
    for seed in range(2, 8):
        machine = Machine(seed % 3, (seed + 1) % 3, seed, 7)
        assert np.array_equal(product(tactic, 128, Operands(a, codes, scales), machine).view(np.uint16), want)
        alone = product(tactic, 128, Operands(a[seed : seed + 1], codes, scales), machine).view(np.uint16)
        assert np.array_equal(alone[0], want[seed])


@pytest.mark.parametrize("tactic", room.TACTICS)
def test_a_workspace_of_the_stated_size_is_enough_and_needed(tactic: str) -> None:
    """On a device with as many multiprocessors as any; a byte less is refused before anything is launched."""
    given, total = exact(np.random.default_rng(4), 1, 1032, 640, 128)
    machine = Machine(processors=144)
    got = product(tactic, 128, given, machine)
    assert np.array_equal(got.astype(np.float64), rounded(total, got.dtype))
    missing = room.workspace(tactic, 1032, 640) - room.image_bytes(tactic, 640) + 1
    for short in (missing, room.workspace(tactic, 1032, 640) - 16):
        answer, d, _ = run(tactic, 128, given, machine, short)
        assert answer == 1  # cudaErrorInvalidValue
        assert (d.view(np.uint16) == 0xABCD).all()


DEFECTS = {
    "a nibble decoded one off": ("__float2half2_rn(-1032.0f)", "__float2half2_rn(-1031.0f)"),
    "the other nibble decoded one off": ("__float2half2_rn(-72.0f)", "__float2half2_rn(-71.0f)"),
    "fragments exchanged": ("a[2] = bits(__hfma2(join(word,", "a[2] = bits(__hfma2(join(upper,"),
    "k of the image exchanged": ("chunk = (int)(index % 8) ^ token % 8, j = chunk % 4;",
                                 "chunk = (int)(index % 8) ^ token % 8, j = chunk % 4 ^ 1;"),
    "no swizzle": ("chunk = (int)(index % 8) ^ token % 8,", "chunk = (int)(index % 8),"),
    "the scales of two rows exchanged": ("j / 2 % 2 ? factor.y : factor.x", "j / 2 % 2 ? factor.x : factor.y"),
    "activations before their kernel ends": ("  Ring ring;\n  launch_wait();\n", "  Ring ring;\n"),
    "a stage given up while products read it": ("    wgmma_wait<0>();\n    release(reader, stage);\n",
                                                "    release(reader, stage);\n    wgmma_wait<0>();\n"),
    "a fragment overwritten while products read it": ("      wgmma_wait<1>();\n      expand(words, first);",
                                                      "      expand(words, first);"),
    "a stage read before it came": ("    if (--blocks > 0) {\n      wait(reader.barriers + 8 * ring.stage, ring.phase);\n",
                                    "    if (--blocks > 0) {\n"),
    "a stage never given up": ("if (reader.lane == 0) sm90::arrive(", "if (false) sm90::arrive("),
    "a stage filled again at once": ("    wait(shared + AT_BARRIERS + 8 * (STAGES + ring.stage), ring.phase ^ 1);\n", ""),
    "counters left as they are": ("p.counters[i] = 0;", ";"),
    "sums of parts stored as they are": ("segment.whole(p.k_blocks) || settle(", "true || settle("),
    "the image before the work ahead": ("  sm90::launch_wait();  // what the kernel before wrote or still reads\n", ""),
    "sums handed in to another's slot": ("thread).store(worker, sums);\n        arrive(",
                                         "thread).store(worker + 1, sums);\n        arrive("),
    "half the tile's k": ("b + TILE_BYTES / 32, GROUP == 128", "b, GROUP == 128"),
}


CLUSTERED = {
    "a stage given up to one block alone": ("} else if (reader.lane < CLUSTER) {", "} else if (reader.lane < 1) {"),
    "a stage waited for half": ("4 * BANDS * CLUSTER);", "4 * BANDS);"),
    "the other half of the activations": ("image + (long long)blocks.k * TILE_BYTES + blocks.rank * SHARE;",
                                          "image + (long long)blocks.k * TILE_BYTES + (1 - blocks.rank) * SHARE;"),
    "one block's rows twice": ("(index * CLUSTER + rank) * BANDS", "(index * CLUSTER) * BANDS"),
    "a block gone before its copies": ("    __syncwarp();\n    cluster_arrive();\n    cluster_wait();\n", "    __syncwarp();\n"),
}


IN_TURN = ("plan(p, workers, image", "plan(p, 3, image")  # work for three on a machine that holds one at a time
LEFT = {
    "a tile left to nobody": ("if (*later.last != 0)", "if (*later.last == 2)"),
    "parts of a tile that are not added": ("Slots(p, taken, rank, band, thread).add(sums);", ";"),
}


@pytest.mark.parametrize("tactic", [name for name, tactic in room.TACTICS.items() if tactic.tokens <= 16])
def test_who_takes_a_tile_over_may_come_last(tactic: str) -> None:
    """Two tiles cut in three: the second worker's first part is the last of its tile where workers run one after the other."""
    given, total = exact(np.random.default_rng(2), 7, 512, 4096, 128)
    right = []
    for patches in ((IN_TURN,), *((IN_TURN, each) for each in LEFT.values())):
        got = product(tactic, 128, given, Machine(EITHER, EITHER, 3, 1, patches))
        right.append(np.array_equal(got.astype(np.float64), rounded(total, got.dtype)))
    assert right == [True, *(False for _ in LEFT)]


@pytest.mark.parametrize("defect", [*DEFECTS, *CLUSTERED])
def test_a_planted_defect_is_found(defect: str) -> None:
    """By wrong sums, or by the machine, in one of the orders of events."""
    tactic = "256x32_f16x2" if defect in CLUSTERED else "256x8_f16"
    given, total = exact(np.random.default_rng(1), 7, 520, 4096, 128)
    found = False
    for copies, products, seed in ((EARLY, LATE, 1), (LATE, EARLY, 2), (EITHER, EITHER, 3), (EARLY, LATE, 4), (LATE, LATE, 9)):
        try:
            machine = Machine(copies, products, seed, 2, ({**DEFECTS, **CLUSTERED}[defect],), "ahead" in defect)
            got = product(tactic, 128, given, machine)
        except emulated.MachineError:
            found = True
        else:
            found |= not np.array_equal(got.astype(np.float64), rounded(total, got.dtype))
    assert found
