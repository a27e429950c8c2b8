"""The W4A8 kernels of the Hopper room without a chip: the packing kernel run by the processor, tactics, declarations, refusals.

The packing source is compiled as C++ with threads in place of a block; where every code must lie is worked out here from the PTX
ISA's picture of an A fragment (m64nNk32, 8-bit operands: row lane / 4, four k from 4 (lane % 4), registers 8 rows and 16 k
apart).
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.backend import Cut, TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Problem
from lowbit.conformance.op import Role, parse_case, parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels.hopper_room import gemm_w4a8 as room
from lowbit.kernels.hopper_room import gemm_w4a8_f16 as half_precision
from lowbit.kernels.hopper_room.build import ROOM
from lowbit.references.declarations import Claim, Contraction, Declaration
from lowbit.references.dot import Operand
from lowbit.references.formats import E4M3FN, INT4, decode
from lowbit.references.interpret import Environment, Factor, emulate, segments

SHIM = r"""
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
struct Index { unsigned x; };
struct uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return uint4{x, y, z, w}; }
inline uint4 __ldcs(const uint4* from) { return *from; }
typedef void* cudaStream_t;
extern "C" { int pending = 0; }
inline int cudaGetLastError() { const int found = pending; pending = 0; return found; }
static thread_local Index threadIdx;
static Index blockIdx, gridDim;
static std::mutex gate;
static std::condition_variable open_gate;
static unsigned waiting = 0, turn = 0, size = 0;
inline void __syncthreads() {
  std::unique_lock<std::mutex> lock(gate);
  const unsigned mine = turn;
  if (++waiting == size) { waiting = 0; ++turn; open_gate.notify_all(); }
  else open_gate.wait(lock, [mine] { return turn != mine; });
}
template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned threads, Arguments... arguments) {
  gridDim.x = grid; size = threads;
  for (unsigned block = 0; block < grid; ++block) {
    blockIdx.x = block;
    std::vector<std::thread> crew;
    for (unsigned t = 0; t < threads; ++t)
      crew.emplace_back([=] { threadIdx.x = t; kernel(arguments...); });
    for (auto& each : crew) each.join();
  }
}
"""


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """gemm_w4a8_pack.cu as a library of this machine."""
    assert shutil.which("g++"), "g++ is needed to compile the packing kernel"
    folder = tmp_path_factory.mktemp("pack")
    text = (ROOM / "gemm_w4a8_pack.cu").read_text(encoding="utf-8")
    call = "kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>("
    assert text.count(call) == 1
    (folder / "cuda_runtime.h").write_text(SHIM, encoding="utf-8")
    (folder / "pack.cpp").write_text(text.replace(call, "launch(kernel, grid, THREADS, "), encoding="utf-8")
    made = folder / "pack.so"
    words = ["g++", "-std=c++17", "-O1", "-pthread", "-shared", "-fPIC", f"-I{folder}", str(folder / "pack.cpp"), "-o", str(made)]
    subprocess.run(words, check=True, capture_output=True)
    return ctypes.CDLL(str(made))


def packed(library: ctypes.CDLL, weights: np.ndarray, scales: np.ndarray, k: int, group: int, flip: int = 0) -> np.ndarray:
    """What the kernel writes: [E, N / 64, K / 128, bytes of a block]."""
    experts, n = scales.shape[:2]
    out = np.full(room.packed_bytes(experts, n, k, group), 0xEE, dtype=np.uint8)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (weights, scales, out)]
    sizes = [ctypes.c_longlong(size) for size in (n, k, experts)]
    assert library.lowbit_pack_w4a8(*pointers, *sizes, group, int(weights.dtype == np.int32), ctypes.c_uint(flip), None) == 0
    return out.reshape(experts, -(-n // 64), -(-k // 128), -1)


def code_at(block: np.ndarray, row: int, k: int) -> int:
    """The int4 code of one place of a block of 64 x 128, by where the fragment of an instruction has it."""
    warp, within = divmod(row, 16)
    lower, pair = divmod(within, 8)
    step, rest = divmod(k, 32)
    far, rest = divmod(rest, 16)
    lane, byte = 4 * pair + rest // 4, rest % 4
    thread, run, word = 32 * warp + lane, step // 2, 2 * (step % 2) + lower
    bits = int.from_bytes(block[2048 * run + 16 * thread + 4 * word :][:4].tobytes(), "little")
    return (bits >> (4 * (4 * far + byte)) & 15) ^ 8  # value + 8 to two's complement


@pytest.mark.parametrize(("experts", "n", "k", "group"), [
    (1, 64, 128, 128), (2, 72, 192, 64), (1, 8, 64, 64), (1, 136, 256, 128),
])
def test_every_code_lies_where_the_fragment_has_it(pack: ctypes.CDLL, experts: int, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(n + k)
    codes = rng.integers(0, 16, (experts, n, k), dtype=np.uint8)
    scales = rng.integers(1, 256, (experts, n, k // group), dtype=np.uint8)
    got = packed(pack, codes, scales, k, group)
    rows, columns = got.shape[1] * 64, got.shape[2] * 128
    per_block = 128 // group
    for expert in range(experts):
        for row in range(rows):
            for column in range(0, columns, 1 if row in (0, 15, 63, n - 1) else 37):
                block = got[expert, row // 64, column // 128]
                want = codes[expert, row, column] if row < n and column < k else 0
                assert code_at(block, row % 64, column % 128) == want, (expert, row, column)
            for part in range(columns // group):
                block, inner = got[expert, row // 64, part // per_block], row % 64
                pair = inner // 16 * 8 + inner % 8  # of rows that a thread has
                place = 4096 + (pair * per_block + part % per_block) * 2 + inner // 8 % 2
                want = scales[expert, row, part] if row < n and part < k // group else 0
                assert block[place] == want, (expert, row, part)


@pytest.mark.parametrize(("n", "k", "group"), [(72, 192, 64), (64, 256, 128)])
def test_words_and_bytes_of_the_same_codes_pack_alike(pack: ctypes.CDLL, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(k)
    codes = rng.integers(0, 16, (1, n, k), dtype=np.uint8)
    scales = rng.integers(0, 256, (1, n, k // group), dtype=np.uint8)
    words = np.zeros((1, n, k // 8), dtype=np.uint32)
    for i in range(8):
        words |= codes[:, :, i::8].astype(np.uint32) << np.uint32(4 * i)
    want = packed(pack, codes, scales, k, group)
    assert np.array_equal(packed(pack, words.view(np.int32), scales, k, group), want)
    offset = words ^ np.uint32(0x88888888)  # value + 8
    assert np.array_equal(packed(pack, offset.view(np.int32), scales, k, group, 0x88888888), want)


def test_an_error_of_an_earlier_launch_is_not_blamed_on_this_one(pack: ctypes.CDLL) -> None:
    ctypes.c_int.in_dll(pack, "pending").value = 9
    packed(pack, np.zeros((1, 8, 64), dtype=np.uint8), np.zeros((1, 8, 1), dtype=np.uint8), 64, 64)  # holds the code to be 0


def test_table_of_integers_is_e4m3() -> None:
    """The constant of `exact` in the source: bytes of 0 to 7, then of -8 to -1."""
    found = re.search(r"INTEGERS = \{([^}]*)\}", (ROOM / "gemm_w4a8.cu").read_text(encoding="utf-8"))
    assert found
    words = np.array([int(word.strip().rstrip("u"), 16) for word in found[1].split(",")], dtype=np.uint32)
    want = decode(np.arange(16, dtype=np.uint8), INT4)
    assert np.array_equal(decode(words.view(np.uint8), E4M3FN), want)


def problem(text: str, check: bool = True) -> Problem:
    return parse_problem(text, ops(), check=check)


def taking(found: Problem) -> list[str]:
    """All that take a problem, candidates among them."""
    sizes = (found.dim("m"), found.dim("k"), found.dim("g"))
    names = (*room.TACTICS, *half_precision.TACTICS)
    return [name for name in names if room.takes(name, found.variant, *sizes, found.op == room.OPS[1])]


def test_every_tactic_that_takes_a_problem_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """BCK-4: the dispatched one first, the others after it; so each is certified."""
    found = problem("gemm_w4a8_fp8/exact/m7n384k1024g64/bf16")
    names = taking(found)
    assert len(names) == 8 + 11 + 5
    for name in ("256x8_f16", "256x8_s1", "128x16_k1x1"):
        row = {"variant": "exact", "m": 8, "n": 1 << 31, "k": 1 << 31, "tactic": name}
        monkeypatch.setattr(room, "_table", lambda row=row: (row,))
        assert room.tactics(found) == (name, *(each for each in names if each != name))


@pytest.mark.parametrize("text", [
    "gemm_w4a8_fp8/folded/m1n128k128g128/bf16", "gemm_w4a8_fp8/exact/m17n384k1024g64/f16.bias",
    "gemm_w4a8_fp8/folded/m4096n73728k12288g128/bf16", "gemm_w4a8_fp8/exact/m0n64k128g128/bf16",
    "gemm_w4a8_fp8_grouped/folded/e5m33n64k256g128/bf16", "gemm_w4a8_fp8_grouped/exact/e128m512n8192k4096g128/f16.bias",
])
def test_declarations_are_of_the_op_and_exact(text: str) -> None:
    found = problem(text)
    assert room.unsupported(found) is None
    for name in taking(found):
        declared = room.declaration(found, name)
        assert check_declaration(ops()[found.op], found, declared) == ("", "as the contract")
        assert declared.deterministic
        assert declared.claim is Claim.BIT_EXACT
        if name in half_precision.TACTICS:
            continue
        whole = not room.TACTICS[name].stream
        assert declared.batch_invariant is whole
        assert (room.workspace(found, name) == 0) is (whole or found.dim("m") == 0)


def main_of(text: str, tactic: str, multiprocessors: int | None = None) -> Contraction:
    main = room.declaration(problem(text), tactic, multiprocessors).program[0]
    assert isinstance(main, Contraction)
    return main


def test_where_k_is_cut_is_declared_tile_by_tile() -> None:
    """DEC-6, by hand. N = 512, K = 1152 are two tiles of 9 blocks. Three workers take 6 of 18 each: six of the first tile, three
    and three, six of the second. Workers of two blocks of threads have one tile of 512 columns, and two of them take 5 and 4."""
    for variant in ("folded", "exact"):
        text = f"gemm_w4a8_fp8/{variant}/m3n512k1152g64/bf16"
        assert main_of(text, "256x8_s1", 3).cuts == (Cut((0, 3), (0, 256), (768, 1152)), Cut((0, 3), (256, 512), (384, 1152)))
        for multiprocessors in (4, 5, 132):  # two workers at most have a tile of 9 blocks
            assert main_of(text, "256x64_s2", multiprocessors).cuts == (Cut((0, 3), (0, 512), (640, 1152)),)
        assert main_of(text, "256x8_s1", 2).cuts == ()  # a tile for each
        assert all(main_of(text, name).cuts == () for name, tactic in room.TACTICS.items() if not tactic.stream)
    assert main_of("gemm_w4a8_fp8/folded/m9n64k1024g64/bf16", "256x8_s1").cuts == (
        Cut((0, 8), (0, 64), (512, 1024)), Cut((8, 9), (0, 64), (512, 1024)),
    )


def test_cuts_are_declared_for_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "gemm_w4a8_fp8/exact/m3n12288k12288g128/bf16"
    for name in ("256x8_s1", "256x8_f16"):
        for count in (114, 132):
            monkeypatch.setattr(room, "processors", lambda count=count: count)
            assert main_of(text, name) == main_of(text, name, count)
        assert main_of(text, name, 114) != main_of(text, name, 132)


def part_of(given: Environment, span: slice) -> dict[str, Operand | Factor]:
    """The environment of some k, groups of 128."""
    groups = slice(span.start // 128, -(-span.stop // 128))
    return {
        name: Operand(item.codes[:, span], item.format) if isinstance(item, Operand)
        else Factor(item.values[..., groups], item.axis, True) if item.grouped else item
        for name, item in given.items()
    }


@pytest.mark.parametrize(("variant", "pattern"), [("folded", "normal"), ("exact", "lognormal")])
def test_the_bits_of_dealt_out_tiles_are_those_of_their_parts(variant: str, pattern: str) -> None:
    """DEC-6: two tiles of two parts each, every part a product of its own, then one addition in binary32."""
    case = parse_case(f"gemm_w4a8_fp8/{variant}/m3n512k1152g128/f16/{pattern}/s1", ops())
    operands = draw_operands(ops()[case.problem.op], case)
    uncut = Declaration(room.declaration(case.problem, "128x16_k1x1").program[:1])
    environment = ops()[case.problem.op].environment
    assert environment is not None
    given = environment(case.problem, operands)
    got = emulate(Declaration(room.declaration(case.problem, "256x8_s1", 3).program[:1]), given).lo
    halves = []
    for columns, end in ((slice(0, 256), 768), (slice(256, 512), 384)):
        first, second = (emulate(uncut, part_of(given, span)).lo[:, columns] for span in (slice(0, end), slice(end, 1152)))
        halves.append((first.astype(np.float32) + second.astype(np.float32)).astype(np.float64))
    assert np.array_equal(got, np.concatenate(halves, axis=1))
    assert (got != emulate(uncut, given).lo).any()
    assert (got != emulate(Declaration(room.declaration(case.problem, "256x8_s1", 4).program[:1]), given).lo).any()


@pytest.mark.parametrize("variant", ["folded", "exact"])
@pytest.mark.parametrize("group", [64, 128])
def test_parts_of_k_are_the_declared_ones(variant: str, group: int) -> None:
    """What a split of the kernel sums, ceil(blocks / splits) blocks of 128, against the judge's reading of the declaration."""
    seen, code = set(), int(variant == "exact")
    for k in range(group, 128 * 40, group):
        for name, tactic in room.TACTICS.items():
            if tactic.stream or not room.takes(name, variant, 1, k, group, False):
                continue
            found = problem(f"gemm_w4a8_fp8/{variant}/m1n64k{k}g{group}/bf16")
            contraction = room.declaration(found, name).program[0]
            assert isinstance(contraction, Contraction)
            blocks = -(-k // 128)
            each = -(-blocks // tactic.parts)
            kernel = [(128 * each * s, min(k, 128 * each * (s + 1))) for s in range(tactic.parts)]
            judge = [(split[0].start, split[-1].stop) for split in segments(contraction, k)]
            assert judge == kernel
            assert all(stop > start for start, stop in kernel)
            seen.add(tactic.parts)
    mine = (macros for _, macros, _ in room.UNITS if macros.get("EXACT") == code and not macros["STREAM"])
    assert seen == {int(macros["SPLITS"]) * int(macros["HALVES"]) for macros in mine}


@pytest.mark.parametrize(("text", "said"), [
    ("gemm_w4a8_fp8/folded/m4n64k192g128/bf16", "K must be a multiple of G"),
    ("gemm_w4a8_fp8/folded/m4n64k128g32/bf16", "K must be a multiple of G"),
    ("gemm_w4a8_fp8/exact/m4n60k128g128/bf16", "N must be a positive multiple of 8"),
    ("gemm_w4a8_fp8_grouped/folded/e2m4n60k128g128/bf16", "N must be a positive multiple of 8"),
    ("gemm_w4a8_fp8/folded/m2147483392n64k128g128/bf16", "M must be at most 2^31 - 257"),
    ("gemm_w4a8_fp8/folded/m4n2147483392k128g128/bf16", "N must be at most 2^31 - 257"),
    ("gemm_w4a8_fp8_grouped/exact/e2m4294967296n64k4294967296g128/bf16", "M, K must be at most 2^31 - 257"),
])
def test_refusals_are_one_sentence(text: str, said: str) -> None:
    reason = room.unsupported(problem(text, check=False))
    assert reason is not None
    assert said in reason
    assert "\n" not in reason


def test_sizes_are_taken_up_to_the_bound() -> None:
    """The largest size and a tile of at most 256 behind it fit 32 bits: 2^31 - 257 + 256 = 2^31 - 1."""
    assert max(max(tactic.tokens, 64 * tactic.bands) for tactic in room.TACTICS.values()) == 256
    assert room.unsupported(problem("gemm_w4a8_fp8/folded/m2147483391n64k128g128/bf16")) is None


def test_the_docstring_says_whose_bits_follow_m() -> None:
    """What is dispatched cuts K by M; `_k1x1` takes every M, and its declaration knows no M."""
    assert "As dispatched the bits of a row depend on M" in " ".join((room.gemm_w4a8_fp8.__doc__ or "").split())
    for variant in ("folded", "exact"):
        cut = {
            room.declaration(problem(f"gemm_w4a8_fp8/{variant}/m{m}n12288k12288g128/bf16"), name)
            for m in (8, 256, 1024, 4096) for name in (room.dispatch(variant, m, 12288, 12288, 128),)
        }
        assert len(cut) > 1
        whole = {
            room.declaration(problem(f"gemm_w4a8_fp8/{variant}/m{m}n12288k12288g128/bf16"), "128x128_k1x1")
            for m in (1, 8, 256, 1024, 4096)
        }
        assert len(whole) == 1
        assert all(declaration.batch_invariant for declaration in whole)


def test_the_signature_is_the_source_s() -> None:
    kinds = {"int": ctypes.c_int, "long long": ctypes.c_longlong}
    text = (ROOM / "gemm_w4a8.cu").read_text(encoding="utf-8").partition("lowbit_gemm_w4a8(")[2].partition(")")[0]
    found = [ctypes.c_void_p if "*" in one else kinds[" ".join(one.split()[:-1])] for one in text.split(",")]
    assert list(room._GEMM_SIGNATURE) == found


def test_table_covers_every_shape_and_follows_its_sweep() -> None:
    """Every shape has a tactic that takes it; on the shapes of the sweep none was more than 3 % faster."""
    kept = json.loads((ROOM / "gemm_w4a8_tactics.json").read_text(encoding="utf-8"))
    assert {row["tactic"] for row in (*kept["rows"], *kept["sweep"])} <= {*room.TACTICS, *half_precision.TACTICS}
    times: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in kept["sweep"]:
        times.setdefault((row["variant"], row["m"], row["n"], row["k"]), {})[row["tactic"]] = row["us"]
    for (variant, m, n, k), by_tactic in times.items():
        chosen = room.dispatch(variant, m, n, k, 128)
        assert by_tactic[chosen] <= 1.03 * min(by_tactic.values()), (variant, m, n, k)
    for variant in ("folded", "exact"):
        for m in (1, 2, 8, 9, 16, 17, 33, 64, 65, 128, 129, 256, 1024, 4096, 1 << 20):
            for n in (8, 64, 4096, 12288, 1 << 20):
                for k in (64, 128, 192, 1024, 12288, 36864):
                    group = 128 if k % 128 == 0 else 64
                    assert room.takes(room.dispatch(variant, m, n, k, group, True), variant, m, k, group, True)


@pytest.mark.parametrize("variant", ["folded", "exact"])
@pytest.mark.parametrize("group", [64, 128])
def test_stages_fill_but_fit_shared_memory(variant: str, group: int) -> None:
    """The bytes of the source's layout, counted here from its parts: one stage more would not fit (or sixteen are enough)."""
    for name, tactic in room.TACTICS.items():
        count = room.stages(tactic, variant, group)

        def taken(number: int, tactic: room.Tactic = tactic) -> int:
            rows = 64 * tactic.bands
            places = number * tactic.halves * (128 * tactic.tokens + rows * 64 + rows * (128 // group))
            places += 4096 if variant == "folded" else 32 * 16
            outputs = tactic.bands * 128 * max(16, min(32, tactic.tokens))
            places = -(-places // 128) * 128 + -(-(outputs + tactic.bands * (4 * tactic.tokens + 4)) // 128) * 128
            owned = -(-tactic.tokens // (8 * tactic.splits)) * 8  # tokens that a block adds up
            places += (tactic.splits * tactic.halves - 1) * rows * owned * 4
            return places + 8 * (2 * number + 2 * tactic.bands)

        assert count >= 3, name
        assert taken(count) <= 232448, name
        assert count == 16 or taken(count + 1) > 232448 - 128, name


def test_names_say_what_an_instance_is() -> None:
    for name, tactic in room.TACTICS.items():
        found = re.fullmatch(r"(\d+)x(\d+)_(?:k(\d+)x(\d+)|s(\d+))", name)
        assert found
        numbers = tuple(int(text or 1) for text in found.groups())
        assert numbers == (64 * tactic.bands, tactic.tokens, tactic.splits, tactic.halves, max(1, tactic.stream))
        assert ("_s" in name) == (tactic.stream > 0)
        assert tactic.splits <= 8  # the portable size of a cluster
        assert tactic.stream == 0 or tactic.parts == 1  # K is cut in one way
        assert tactic.stream < 2 or tactic.tokens % (8 * tactic.stream) == 0  # a block copies whole groups of eight rows of A
        assert tactic.bands * tactic.halves <= 4  # warpgroups that registers are shared out to in the source
    assert len(room.UNITS) == len({json.dumps([source, dict(macros)]) for source, macros, _ in room.UNITS})
    assert all((Path(ROOM) / source).is_file() for source, _, _ in room.UNITS)


def test_experts_keep_whole_tiles() -> None:
    """How many tiles there are is on the device: nothing that deals them out takes a grouped product, whatever the table says."""
    for variant in ("folded", "exact"):
        found = problem(f"gemm_w4a8_fp8_grouped/{variant}/e4m64n256k1024g128/bf16")
        grouped = room.tactics(found)
        assert grouped
        assert all(name in room.TACTICS and room.TACTICS[name].stream == 0 for name in grouped)
        assert all(name in room.TACTICS and room.TACTICS[name].stream == 0 for name in taking(found))
        dense = taking(problem(f"gemm_w4a8_fp8/{variant}/m64n256k1024g128/bf16"))
        assert any(room.TACTICS[name].stream for name in dense if name in room.TACTICS)


def test_a_row_of_the_table_that_does_not_take_experts_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"variant": "folded", "m": 1 << 31, "n": 1 << 31, "k": 1 << 31}
    rows = tuple({**bounds, "tactic": name} for name in ("256x16_s1", "128x16_k1x1"))
    monkeypatch.setattr(room, "_table", lambda: rows)
    assert room.dispatch("folded", 5, 64, 1024, 128) == "256x16_s1"
    assert room.dispatch("folded", 5, 64, 1024, 128, grouped=True) == "128x16_k1x1"


def case_of(m: int = 5, n: int = 16, k: int = 256, experts: int = 1, group: int = 128) -> dict[str, torch.Tensor]:
    """Arguments of both functions on the processor; a launch of them is refused."""
    head = (experts,) if experts > 1 else ()
    return {
        "weights": torch.zeros((*head, n, k), dtype=torch.uint8),
        "scales": torch.zeros((*head, n, k // group), dtype=torch.uint8),
        "a": torch.zeros((m, k), dtype=torch.uint8), "token": torch.ones(m), "channel": torch.ones((*head, n)),
        "out": torch.zeros((m, n), dtype=torch.bfloat16),
    }


def packed_of(case: dict[str, torch.Tensor]) -> room.PackedWeights:
    n, k = case["weights"].shape[-2:]
    experts = case["weights"].shape[0] if case["weights"].dim() == 3 else 1
    group = k // case["scales"].shape[-1]
    memory = torch.zeros(room.packed_bytes(experts, n, k, group), dtype=torch.uint8)
    return room.PackedWeights(memory, experts, n, k, group)


@pytest.mark.parametrize(("change", "said"), [
    ({}, "expected a CUDA device"),
    ({"weights": torch.zeros((16, 256), dtype=torch.int16)}, "expected uint8 codes"),
    ({"weights": torch.zeros((256, 16), dtype=torch.uint8).T}, "expected contiguous"),
    ({"scales": torch.zeros((16, 8), dtype=torch.uint8)}, "expected one per 64 or 128"),
    ({"scales": torch.zeros((8, 2), dtype=torch.uint8)}, "expected one per 64 or 128"),
    ({"scales": torch.zeros((16, 2))}, "scales of uint8 or float8_e4m3fn"),
    ({"scales": torch.zeros((16, 2), dtype=torch.float8_e5m2)}, "scales of uint8 or float8_e4m3fn"),
    (case_of(n=60), "N = 60, .* N a multiple of 8"),
    (case_of(n=0), "N = 0"),
    ({"weights": torch.zeros((0, 16, 256), dtype=torch.uint8), "scales": torch.zeros((0, 16, 2), dtype=torch.uint8)},
     r"0 expert\(s\)"),
    ({"out": torch.zeros(16 * 256, dtype=torch.uint8)}, "packed weights of 4096 elements .*expected 8320 contiguous of uint8"),
    ({"out": torch.zeros(2 * 8320, dtype=torch.uint8)[::2]}, "expected 8320 contiguous of uint8"),
    ({"out": torch.zeros(8321, dtype=torch.uint8)[1:]}, "a multiple of 16 bytes"),
    ({"scales": torch.zeros((16, 2), dtype=torch.uint8, device="meta")}, "scales on meta, expected cpu, where the output lies"),
    ({"out": torch.zeros(8320, dtype=torch.uint8, device="meta")}, "weights on cpu, expected meta, where the output lies"),
])
def test_packing_refuses_other_arguments(change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "entry", lambda *_: pytest.fail("compiled before the device was looked at"))
    given = case_of() | {"out": None} | change
    with pytest.raises(ValueError, match="pack_weights: got .*" + said):
        room.pack_weights(given["weights"], given["scales"], out=given["out"])


@pytest.mark.parametrize(("change", "options", "said"), [
    ({}, {}, "a tensor on cpu, expected a CUDA device"),
    ({"a": torch.zeros((5, 128), dtype=torch.uint8)}, {}, "K = 256"),
    ({"out": torch.zeros((5, 8), dtype=torch.bfloat16)}, {}, r"and out \[M, 16\]"),
    ({"out": torch.zeros((5, 16))}, {}, "expected bfloat16 or float16"),
    ({"token": torch.ones(4)}, {}, "token_scale .*expected 5 contiguous"),
    ({"channel": torch.ones(16, dtype=torch.float64)}, {}, "channel_scale .*scales in float32"),
    ({}, {"bias": torch.zeros(16)}, "both the same"),
    ({}, {"counts": torch.zeros(1)}, "expected contiguous int32"),
    ({"a": torch.zeros((5, 264), dtype=torch.uint8)[:, :256]}, {}, "multiples of 16 bytes"),
    ({"out": torch.zeros((16, 5), dtype=torch.bfloat16).T}, {}, "neighbouring elements"),
    ({}, {"tactic": "64x1"}, "tactic '64x1', expected one that takes folded"),
    ({}, {"variant": "exact", "tactic": "128x256_k1x1"}, "expected one that takes exact"),
    ({}, {"variant": "exakt"}, "variant 'exakt', expected folded or exact"),
    ({}, {"variant": "exakt", "tactic": "128x16_k1x1"}, "variant 'exakt', expected folded or exact"),
    ({"a": torch.zeros((5, 256), dtype=torch.uint8).view(torch.float8_e5m2)}, {}, "a torch.float8_e5m2 .*expected uint8 or"),
    ({"a": torch.zeros((5, 256), dtype=torch.uint8).view(torch.float8_e4m3fnuz)}, {}, "a torch.float8_e4m3fnuz"),
    ({"a": torch.zeros((5, 256), dtype=torch.int8)}, {}, "a torch.int8"),
    ({"a": torch.zeros((5, 256), dtype=torch.bool)}, {}, "a torch.bool"),
    ({"a": torch.zeros((5, 256, 1), dtype=torch.uint8)}, {}, r"a torch.uint8 \(5, 256, 1\)"),
    ({"a": torch.zeros((1, 256), dtype=torch.uint8).expand(5, 256)}, {}, "rows that share none"),
    ({"out": torch.zeros((1, 16), dtype=torch.bfloat16).expand(5, 16)}, {}, "rows that share none"),
    *(
        ({name: case_of()[name].to("meta")}, {}, f"{what} on meta, expected cpu, where the output lies")
        for name, what in (("a", "a"), ("token", "token_scale"), ("channel", "channel_scale"))
    ),
    ({"out": case_of()["out"].to("meta")}, {}, "a on cpu, expected meta, where the output lies"),
    ({}, {"bias": torch.zeros(16, dtype=torch.bfloat16, device="meta")}, "bias on meta, expected cpu"),
    ({}, {"counts": torch.zeros(1, dtype=torch.int32, device="meta")}, "counts on meta, expected cpu"),
    ({
        "a": torch.zeros((1 << 31, 256), dtype=torch.uint8, device="meta"),
        "out": torch.zeros((1 << 31, 16), dtype=torch.bfloat16, device="meta"),
    }, {}, "M = 2147483648, expected at most"),
])
def test_the_product_refuses_other_arguments(
    change: dict[str, torch.Tensor], options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_kernel", lambda *_: pytest.fail("compiled before the device was looked at"))
    given = case_of() | change
    with pytest.raises(ValueError, match="gemm_w4a8_fp8: got .*" + said):
        room.gemm_w4a8_fp8(given["a"], packed_of(case_of()), given["token"], given["channel"], given["out"], **options)


@pytest.mark.parametrize(("change", "said"), [
    ({"n": 60}, "N = 60, .* N a multiple of 8"),
    ({"k": 192}, "K = 192 and groups of 128"),
    ({"group": 32}, "groups of 32"),
    ({"experts": 0}, r"0 expert\(s\)"),
    ({"n": 2147483392}, "N = 2147483392, .* at most 2"),
    ({"k": 4294967296}, "K = 4294967296 .* at most 2"),
    ({"n": 72}, "packed weights of 8320 elements of torch.uint8, expected 16640 contiguous of uint8"),
    ({"k": 512}, "packed weights of 8320 elements"),
    ({"group": 64}, "packed weights of 8320 elements"),
    ({"experts": 2}, "packed weights of 8320 elements"),
    ({"memory": torch.zeros(8320, dtype=torch.int8)}, "of torch.int8, expected 8320"),
    ({"memory": torch.zeros(8321, dtype=torch.uint8)[1:]}, "a multiple of 16 bytes"),
    ({"memory": torch.zeros(2 * 8320, dtype=torch.uint8)[::2]}, "expected 8320 contiguous"),
    ({"memory": torch.zeros(8320, dtype=torch.uint8, device="meta")}, "weights on meta, expected cpu"),
])
def test_weights_that_are_no_packed_ones_are_refused(change: dict[str, Any], said: str) -> None:
    """64 x 128 codes in 4,096 bytes and 64 scales of a byte: two such blocks for N = 16, K = 256."""
    given = case_of()
    weights = dataclasses.replace(packed_of(given), **change)
    out = torch.zeros((5, weights.n if weights.n < 100 else 16), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gemm_w4a8_fp8: got .*" + said):
        room.gemm_w4a8_fp8(given["a"], weights, given["token"], given["channel"], out)


def test_experts_need_counts() -> None:
    given = case_of(experts=3)
    with pytest.raises(ValueError, match=r"got 3 experts and no counts, expected int32 \[3\]"):
        room.gemm_w4a8_fp8(given["a"], packed_of(given), given["token"], given["channel"], given["out"])


@pytest.mark.parametrize("text", [
    "gemm_w4a8_fp8/exact/m5n16k256g64/f16.bias", "gemm_w4a8_fp8_grouped/folded/e3m5n16k256g128/bf16",
])
def test_what_a_launch_is_given(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare, stage and run hand the kernels addresses, strides and sizes of the suite's memory; a shifted A is copied."""
    found, calls = problem(text), []
    monkeypatch.setattr(room, "launch", lambda name, function, like, stream, *rest: calls.append((name, rest)))
    monkeypatch.setattr(room, "check", lambda *_: None)
    monkeypatch.setattr(room, "entry", lambda *_: None)
    monkeypatch.setattr(room, "_kernel", lambda *_: None)
    containers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    views = {}
    for spec in tensors_of(ops()[found.op], found):
        memory = torch.zeros(spec.shape, dtype=containers[spec.format.size])
        if spec.name == "a":
            memory = torch.zeros(spec.shape[0] * 272 + 1, dtype=torch.uint8)[1:].view(spec.shape[0], 272)[:, : spec.shape[1]]
        if spec.name == "d":
            memory = torch.zeros((spec.shape[0], spec.shape[1] + 3), dtype=torch.int16)[:, : spec.shape[1]]
        views[spec.name] = TensorView(
            spec.name, spec.format, spec.shape, tuple(memory.stride()), spec.role, "", memory.data_ptr(), memory)
    tactic = next(name for name in room.tactics(found) if name.endswith("_k1x1"))
    by_role = {role: {k: v for k, v in views.items() if v.role is role} for role in (Role.CONSTANT, Role.ACTIVATION, Role.OUTPUT)}
    state = room.prepare(found, tactic, by_role[Role.CONSTANT])
    inputs = room.stage(found, tactic, by_role[Role.ACTIVATION])
    assert room.run(found, tactic, state, inputs, by_role[Role.OUTPUT], None, None) == f"gemm_w4a8_{found.variant}_{tactic}"
    experts, group = (3 if "grouped" in found.op else 1), found.dim("g")
    (packing, packed_with), (product, given) = calls
    assert (packing, product) == ("pack_weights", "gemm_w4a8_fp8")
    assert packed_with[3:] == (16, 256, experts, group, 0, 0)
    a, stride, weights, token, channel, bias, d, d_stride, counts, *sizes, half, scratch, scratch_bytes = given
    assert (scratch, scratch_bytes) == (None, 0)
    assert a % 16 == 0
    assert a != views["a"].pointer
    assert (stride, d, d_stride) == (256, views["d"].pointer, 19)
    assert weights == state.weights.memory.data_ptr()
    assert (token, channel) == (views["token_scale"].pointer, views["channel_scale"].pointer)
    assert bias == (views["bias"].pointer if "bias" in views else None)
    assert counts == (views["counts"].pointer if "counts" in views else None)
    assert (sizes, half) == ([5, 16, 256, experts], int("f16" in text and "bf16" not in text))


@pytest.mark.parametrize("given_memory", [True, False])
def test_tiles_that_are_dealt_out_get_scratch_memory(given_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """N = 16, K = 1,024: one tile of 8 blocks, at most two workers with two slots each of 256 rows by 16 tokens in f32, and with
    each slot a counter per 64 rows: 4 (16,384 + 16) bytes. What is not given is allocated."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "launch", lambda name, function, like, stream, *rest: calls.append(rest))
    monkeypatch.setattr(room, "check", lambda *_: None)
    monkeypatch.setattr(room, "_kernel", lambda *_: None)
    given, size = case_of(k=1024), 4 * (256 * 16 * 4 + 4 * 4)
    assert room.workspace_bytes("256x16_s1", 5, 16, 1024) == size
    memory = torch.zeros(size + 32, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :][: size + 16]
    said = room.gemm_w4a8_fp8(
        given["a"], packed_of(given), given["token"], given["channel"], given["out"], tactic="256x16_s1",
        workspace=memory if given_memory else None,
    )
    assert said == "gemm_w4a8_folded_256x16_s1"
    (*_, scratch, scratch_bytes), = calls
    assert scratch % 16 == 0
    assert (scratch == memory.data_ptr()) is given_memory
    assert scratch_bytes == (size + 16 if given_memory else size)


@pytest.mark.parametrize(("memory", "said"), [
    (torch.zeros(65599, dtype=torch.uint8), "a workspace of 65599 elements of torch.uint8, expected 65600 or more"),
    (torch.zeros(65600, dtype=torch.int8), "of torch.int8, expected"),
    (torch.zeros(2 * 65600, dtype=torch.uint8)[::2], "contiguous"),
    (torch.zeros(65601, dtype=torch.uint8)[1:], "at a multiple of 16 bytes"),
    (torch.zeros(65600, dtype=torch.uint8, device="meta"), "workspace on meta, expected cpu"),
])
def test_other_scratch_memory_is_refused(memory: torch.Tensor, said: str) -> None:
    given = case_of(k=1024)
    with pytest.raises(ValueError, match="gemm_w4a8_fp8: got .*" + said):
        room.gemm_w4a8_fp8(
            given["a"], packed_of(given), given["token"], given["channel"], given["out"], tactic="256x16_s1", workspace=memory,
        )


def test_no_rows_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "launch", lambda *_: pytest.fail("a launch of no rows"))
    given = case_of(m=0)
    said = room.gemm_w4a8_fp8(given["a"], packed_of(given), given["token"], given["channel"], given["out"])
    assert said == "gemm_w4a8_folded_128x8_s1 (nothing to launch)"
