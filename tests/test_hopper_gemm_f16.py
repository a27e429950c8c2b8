"""The binary16 products of gemm_w4a8_fp8 on Hopper without a chip: conversions, the order of k, what is declared and taken.

Numbers of the source are read off its text and worked out in integers and Fractions; the order of k is derived from the PTX
ISA's picture of an A fragment (m64nNk16, 16-bit operands). tests/hopper/check_gemm_f16.py runs the kernel on an emulated machine.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Problem
from lowbit.conformance.op import parse_problem
from lowbit.conformance.ops import ops
from lowbit.kernels.hopper_room import gemm_w4a8_f16 as room
from lowbit.kernels.hopper_room.build import ROOM, sources
from lowbit.references import interpret
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Claim, Contraction, Cut, Declaration, Order
from lowbit.references.dot import Operand, emulate
from lowbit.references.formats import E4M3FN, F16, F32, INT4, decode
from lowbit.references.interpret import Factor
from lowbit.references.rounding import round_to

TEXT = (ROOM / "gemm_w4a8_f16.cu").read_text(encoding="utf-8")
E4M3 = decode(np.arange(256, dtype=np.uint8), E4M3FN)


def half(code: int) -> Fraction:
    """The value of a finite binary16."""
    exponent, fraction = code >> 10 & 31, code & 1023
    assert exponent != 31
    size = Fraction(fraction | 1024 * (exponent > 0), 1024) * Fraction(2) ** (max(exponent, 1) - 15)
    return -size if code >> 15 else size


def constant(name: str) -> Fraction:
    found = re.search(rf"\b{name} = __float2half2_rn\(([-\d.]+)f\)", TEXT)
    assert found
    return Fraction(found[1])


def fragments() -> list[tuple[int, int, Fraction, Fraction]]:
    """(shift of the word, mask, factor, addend) of the words 0, 2, 4 and 6 that `expand` writes."""
    lines = re.findall(r"a\[(\d)\] = bits\(__h(add2|fma2)\(join\((word|upper), (0x\w+)u\), (\w+)(?:, (\w+))?\)\);", TEXT)
    assert [int(line[0]) for line in lines] == [0, 2, 4, 6]
    assert "upper = word >> 8" in TEXT
    return [
        (8 * (word == "upper"), int(mask, 16), Fraction(1) if name == "add2" else constant(first),
         constant(first) if name == "add2" else constant(second))
        for _, name, word, mask, first, second in lines
    ]


def test_every_nibble_becomes_its_value() -> None:
    """Every content of a nibble, the other seven all zeros or all ones, in each of the eight places: what the one rounding meets
    is a small integer. 0x6400 is 1024; factors and addends are exact in binary16."""
    joined = re.search(r'"r"\(word\), "r"\(mask\), "r"\((0x\w+)u\)', TEXT)
    assert joined
    high = int(joined[1], 16)
    assert '"lop3.b32 %0, %1, %2, %3, 0xea;"' in TEXT  # (a & b) | c
    assert 0xEA == (0xF0 & 0xCC) | 0xAA
    for nibble in range(8):
        for plus in range(16):
            for others in (0, 0xFFFFFFFF):
                word = others & ~(15 << 4 * nibble) | plus << 4 * nibble
                shift, mask, factor, addend = fragments()[nibble % 4]
                pair = word >> shift & mask | high
                code = pair >> 16 if nibble > 3 else pair & 0xFFFF
                assert half(code) * factor + addend == plus - 8
    for number in {number for _, _, factor, addend in fragments() for number in (factor, addend)}:
        assert Fraction(float(np.float16(float(number)))) == number


def test_every_activation_and_scale_is_exact() -> None:
    """254 finite e4m3 codes in binary16, and in binary32."""
    finite = E4M3[np.isfinite(E4M3)]
    assert finite.size == 254
    assert np.array_equal(finite.astype(np.float16).astype(np.float64), finite)
    assert np.array_equal(finite.astype(np.float32).astype(np.float64), finite)


def test_the_fragment_and_the_image_have_one_order_of_k() -> None:
    """Register i, half h, lane l of an A fragment: row l / 4 + 8 (i % 2), k = 2 (l % 4) + h + 8 (i / 2). `convert` writes sixteen
    bytes j of 32 k from byte j of each word of 4 k, those of the second 16 k in the upper halves."""
    held = {}
    for fragment in range(2):
        for register in (0, 2):
            for lane in range(4):
                for upper in range(2):
                    nibble = fragment * 2 + register // 2 + 4 * upper  # `expand` makes word 2 j of nibbles j and 4 + j
                    k = 4 * lane + nibble if nibble < 4 else 16 + 4 * lane + nibble - 4
                    held[16 * fragment + 2 * lane + upper + 8 * (register // 2)] = k
    assert sorted(held) == sorted(held.values()) == list(range(32))
    assert held == {8 * j + 2 * c + upper: 16 * upper + 4 * c + j for j in range(4) for c in range(4) for upper in range(2)}


def test_the_signature_is_the_source_s() -> None:
    kinds = {"int": ctypes.c_int, "long long": ctypes.c_longlong}
    text = TEXT.partition("lowbit_gemm_w4a8_f16(")[2].partition(")")[0]
    found = [ctypes.c_void_p if "*" in one else kinds[" ".join(one.split()[:-1])] for one in text.split(",")]
    assert list(room._SIGNATURE) == found
    assert {path.name for path in sources("gemm_w4a8_f16.cu")} >= {"gemm_w4a8_tiles.cuh", "wgmma_half.cuh", "sm90.cuh"}


def test_names_say_what_an_instance_is() -> None:
    for name, tactic in room.TACTICS.items():
        made = room.defines(tactic, 128)
        found = re.fullmatch(r"(\d+)x(\d+)_f16(?:x(\d+))?", name)
        assert found
        assert [int(found[1]) // 64, int(found[2]), int(found[3] or 1)] == [made["BANDS"], made["TOKENS"], made["CLUSTER"]]
        assert f"struct WgmmaHalf<{tactic.tokens}>" in (ROOM / "wgmma_half.cuh").read_text(encoding="utf-8")
    assert len(room.UNITS) == len({str(unit) for unit in room.UNITS}) == 2 * len(room.TACTICS)


def test_registers_of_a_block_are_those_of_its_launch() -> None:
    """640 threads begin with 65536 / 640 registers, in eights: 96. Who gives some back must leave enough for who takes more."""
    up = int(re.search(r"REGISTERS = (\d+);", TEXT)[1])  # type: ignore[index]
    down = int(re.search(r"registers_down<(\d+)>", TEXT)[1])  # type: ignore[index]
    threads = 128 * (room._BANDS + 1)
    assert 128 * (room._BANDS * up + down) <= threads * (65536 // threads // 8 * 8)


def test_only_few_rows_of_the_exact_product_without_experts_are_taken() -> None:
    for name, tactic in room.TACTICS.items():
        assert room.takes(name, "gemm_w4a8_fp8", "exact", tactic.tokens)
        assert room.takes(name, "gemm_w4a8_fp8", "exact", 0)
        assert not room.takes(name, "gemm_w4a8_fp8", "exact", tactic.tokens + 1)
        assert not room.takes(name, "gemm_w4a8_fp8", "folded", 1)
        assert not room.takes(name, "gemm_w4a8_fp8_grouped", "exact", 1)


def problem(text: str) -> Problem:
    return parse_problem(text, ops())


@pytest.mark.parametrize("text", ["m8n256k12288g128/bf16", "m1n8k64g64/f16.bias", "m0n64k128g128/bf16.bias"])
def test_declarations_are_of_the_op_and_claim_bits(text: str) -> None:
    """A row does not depend on the others; every 32 k are taken in the order of the packed words, as `in_order` has them."""
    found = problem(f"gemm_w4a8_fp8/exact/{text}")
    for name in room.TACTICS:
        declared = room.declaration(found, name, 132)
        assert check_declaration(ops()[found.op], found, declared) == ("", "as the contract")
        assert declared.claim is Claim.BIT_EXACT
        assert declared.deterministic
        assert declared.batch_invariant
        main = declared.program[0]
        assert isinstance(main, Contraction)
        assert (main.segment, main.order, main.conversion) == (found.dim("g"), Order.ASCENDING, F16)
        assert main.k_order == tuple(in_order(32))


def test_cuts_depend_on_the_columns_the_k_and_the_device() -> None:
    """DEC-6 by hand: 48 tiles of 96 blocks on 132 multiprocessors are 4608 = 120 x 35 + 12 x 34 units. Tile 0 has 35 + 35 + 26 of
    them, tile 47 ends with 34 + 34 and what is left. Clusters of two have 24 tiles and 66 workers: 60 x 35 + 6 x 34."""
    for m in (1, 5, 8):
        text = f"gemm_w4a8_fp8/exact/m{m}n12288k12288g128/bf16"
        alone, pairs = (room.declaration(problem(text), name, 132).program[0] for name in ("256x8_f16", "256x32_f16x2"))
        assert isinstance(alone, Contraction)
        assert isinstance(pairs, Contraction)
        assert (len(alone.cuts), len(pairs.cuts)) == (48, 24)
        assert alone.cuts[0] == Cut((0, m), (0, 256), (35 * 128, 70 * 128, 96 * 128))
        assert alone.cuts[47] == Cut((0, m), (47 * 256, 12288), (28 * 128, 62 * 128, 96 * 128))
        assert pairs.cuts[0] == Cut((0, m), (0, 512), (35 * 128, 70 * 128, 96 * 128))
    whole = room.declaration(problem("gemm_w4a8_fp8/exact/m8n33792k512g128/bf16"), "256x8_f16", 132).program[0]
    assert isinstance(whole, Contraction)
    assert whole.cuts == ()  # 132 tiles for 132


def in_order(k: int) -> list[int]:
    """Which k the instructions take one after the other: in half h of register 2 r of lane l they have nibble 2 f + r + 4 h."""
    found = []
    for first in range(0, k, 32):
        for fragment in range(2):
            for register in range(2):
                for lane in range(4):
                    for half in range(2):
                        nibble = 2 * fragment + register + 4 * half
                        found.append(first + 4 * lane + nibble % 4 + 16 * (nibble // 4))
    return found


def part_of(a: np.ndarray, w: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """One worker's total [M, N]: instructions in the order of k that the packed words have, one FMA per group, to nearest in f32.
    a and w: codes of binary16."""
    total = np.zeros((a.shape[0], w.shape[0]))
    for first in range(0, a.shape[1], group):
        columns = [first + k for k in in_order(group)]
        codes = emulate(Operand(a[:, columns], F16), Operand(w[:, columns], F16), DATAPATHS["hopper_f16"])
        product = decode(codes, F32) * scales[:, first // group]  # 24 and 4 bits: exact
        total = round_to(total + product, F32)  # multiples of 2^-13 below 2^30: the sum is exact before it is rounded
    return total


@pytest.mark.parametrize("kind", ["mixed", "one sign", "no rounding"])
def test_the_declared_bits_are_those_of_the_parts(kind: str) -> None:
    """Sums as the kernel makes them, K in one to eight parts at any group, against the declaration with those cuts (DEC-6)."""
    rng = np.random.default_rng(len(kind))
    m, n, k, group = 3, 16, 2048, 128
    a = rng.integers(0, 0x7F, (m, k), dtype=np.uint8)
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = rng.integers(0x30, 0x48, (n, k // group), dtype=np.uint8)
    if kind == "mixed":
        a |= rng.integers(0, 2, (m, k), dtype=np.uint8) << 7
        scales |= rng.integers(0, 2, (n, k // group), dtype=np.uint8) << 7
    if kind == "one sign":
        codes = rng.integers(1, 8, (n, k), dtype=np.uint8)
    if kind == "no rounding":
        a = rng.integers(0x30, 0x50, (m, k), dtype=np.uint8)
    environment: dict[str, Any] = {
        "a": Operand(a, E4M3FN), "w": Operand(codes, INT4), "group_scale": Factor(E4M3[scales], "n", grouped=True),
        "token_scale": Factor(np.ones(m), "m"), "channel_scale": Factor(np.ones(n), "n"),
    }
    declared = room.declaration(problem(f"gemm_w4a8_fp8/exact/m{m}n{n}k{k}g{group}/bf16"), "256x8_f16", 1)
    main = declared.program[0]  # the sum, before the factors of rows and columns and the cast
    assert isinstance(main, Contraction)
    half_a = E4M3[a].astype(np.float16).view(np.uint16)
    half_w = decode(codes, INT4).astype(np.float16).view(np.uint16)
    results = []
    for parts in (1, 2, 3, 8):
        cuts = [0, *sorted(int(cut) * group for cut in rng.choice(np.arange(1, k // group), parts - 1, replace=False)), k]
        total: np.ndarray | None = None
        for first, last in pairwise(cuts):
            each = slice(first, last)
            part = part_of(half_a[:, each], half_w[:, each], E4M3[scales[:, first // group : last // group]], group)
            total = part if total is None else round_to(total + part, F32)
        assert total is not None
        cut = replace(main, cuts=(Cut((0, m), (0, n), tuple(cuts[1:])),))
        assert np.array_equal(interpret.emulate(Declaration((cut,)), environment).lo, total)
        within = interpret.bound(Declaration((cut,)), environment)
        assert ((within.lo <= total) & (total <= within.hi)).all()
        results.append(total)
    shows = any((results[0] != other).any() for other in results[1:])  # where K is cut shows in bits, if it does anywhere
    assert shows == (kind != "no rounding")


def small_between_large() -> tuple[np.ndarray, np.ndarray]:
    """Codes [1, 64]: 448 x 7 at k = 0 to 14, 2^-9 x 1 at 15, -448 x 7 at 16 to 30, nothing at 31 and from there on."""
    a, w = np.zeros((1, 64), dtype=np.uint8), np.full((1, 64), 7, dtype=np.uint8)
    a[0, :15], a[0, 15], a[0, 16:31], w[0, 15] = 0x7E, 0x01, 0xFE, 1
    return a, w


def test_the_order_of_k_is_seen_where_a_sum_has_no_bit_for_a_small_product() -> None:
    """DEC-7 by hand. In ascending order 15 x 3136 = 47040 > 2^15 and 2^-9 meet first: 24 bits end at 2^-8, and 0 is left. An
    instruction of the kernel has eight of k = 0 to 15 and eight of 16 to 31: large products cancel in each, and 2^-9 is left."""
    a, w = small_between_large()
    environment: dict[str, Any] = {
        "a": Operand(a, E4M3FN), "w": Operand(w, INT4), "group_scale": Factor(np.ones((1, 1)), "n", grouped=True),
    }
    main = room.declaration(problem("gemm_w4a8_fp8/exact/m1n8k64g64/bf16"), "256x8_f16", 132).program[0]
    assert isinstance(main, Contraction)
    assert interpret.emulate(Declaration((main,)), environment).lo.tolist() == [[2.0**-9]]
    ascending = replace(main, k_order=())
    assert interpret.emulate(Declaration((ascending,)), environment).lo.tolist() == [[0.0]]
    for item in (main, ascending):
        found = interpret.bound(Declaration((item,)), environment)
        assert found.lo[0, 0] <= interpret.emulate(Declaration((item,)), environment).lo[0, 0] <= found.hi[0, 0]


def test_the_workspace_holds_the_image_and_what_is_dealt_out() -> None:
    """K = 12288 at 8 rows: 192 KB of image. 48 tiles of 96 blocks, 24 workers each at most: 144 workers with two slots of 256 by
    8 sums in f32, and a counter per 64 rows and slot."""
    assert room.image_bytes("256x8_f16", 12288) == 12288 * 8 * 2
    assert room.image_bytes("256x64_f16x2", 64) == 128 * 64 * 2  # half a block is a block
    assert room.workspace("256x8_f16", 12288, 12288) == 12288 * 8 * 2 + 144 * 2 * (256 * 8 * 4 + 4 * 4)
    assert room.workspace("256x64_f16x2", 512, 64) == 128 * 64 * 2 + 2 * 2 * (256 * 64 * 4 + 4 * 4)  # a worker of two blocks


def test_the_launch_gets_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "launch", lambda name, function, like, stream, *rest: calls.append(rest))
    monkeypatch.setattr(room, "_kernel", lambda *_: None)

    class Weights:
        memory, n, k, group = torch.zeros(16, dtype=torch.uint8), 24, 128, 128

    a = torch.zeros((2, 144), dtype=torch.uint8)[:, :128]
    out, memory = torch.zeros((2, 32), dtype=torch.float16)[:, :24], torch.zeros(64, dtype=torch.uint8)
    token, channel = torch.zeros(2), torch.zeros(24)
    said = room.multiply(a, Weights, token, channel, None, out, memory, True, "256x8_f16", None)
    assert said == "gemm_w4a8_exact_256x8_f16"
    pointers = [tensor.data_ptr() for tensor in (a, Weights.memory, token, channel)]
    assert calls == [(
        pointers[0], 144, *pointers[1:], None, out.data_ptr(), 32, memory.data_ptr(), 64, 2, 24, 128, 1,
    )]
    said = room.multiply(a[:0], Weights, token[:0], channel, None, out[:0], memory, True, "256x8_f16", None)
    assert said == "gemm_w4a8_exact_256x8_f16 (nothing to launch)"
    assert len(calls) == 1
    assert len(calls[0]) + 1 == len(room._SIGNATURE)  # the stream is the last
