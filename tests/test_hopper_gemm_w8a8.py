"""The host of gemm_w8a8_fp8 on Hopper, without a device: tactics, declarations, refusals, and the walk of the blocks over D.

What the kernels compute is asked of the chip by tests/device/hopper_gemm_w8a8.py.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Problem
from lowbit.conformance.op import outside_domain, parse_problem, possible_options
from lowbit.conformance.ops import ops
from lowbit.kernels.hopper_room import gemm_w8a8
from lowbit.kernels.hopper_room.build import sources
from lowbit.kernels.hopper_room.gemm_w8a8 import TILES, UNITS, declaration, defines_of, gemm_w8a8_fp8, tactics, unsupported
from lowbit.references.declarations import text_of

OP = ops()["gemm_w8a8_fp8"]
FP8 = torch.float8_e4m3fn


def problem(text: str) -> Problem:
    return parse_problem(f"gemm_w8a8_fp8/{text}", ops())


# tactics ----------------------------------------------------------------------------------------------------------------


def test_a_tactic_names_its_macros() -> None:
    assert defines_of("fast_m128n256w2") == {
        "W8A8_TM": 128, "W8A8_TN": 256, "W8A8_SUMS": 0, "W8A8_CLUSTER": 2, "KERNEL": "gemm_w8a8_fp8_fast_m128n256w2",
    }
    assert defines_of("promoted_m128n128") == {
        "W8A8_TM": 128, "W8A8_TN": 128, "W8A8_SUMS": 1, "W8A8_CLUSTER": 1, "KERNEL": "gemm_w8a8_fp8_promoted_m128n128",
    }
    assert defines_of("block_m64n32") == {
        "W8A8_TM": 64, "W8A8_TN": 32, "W8A8_SUMS": 2, "W8A8_CLUSTER": 1, "KERNEL": "gemm_w8a8_fp8_block_m64n32",
    }


@pytest.mark.parametrize("name", ["", "default", "fast", "fast_m64n40", "promoted_m128n256", "block_m128n256w2", "fast_m64n96w2"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected one of fast_m8n96"):
        defines_of(name)


def test_every_tile_is_one_library() -> None:
    assert len({tuple(defines.items()) for _, defines, _ in UNITS}) == len(UNITS) == sum(map(len, TILES.values()))
    assert {source for source, _, _ in UNITS} == {"gemm_w8a8.cu"}


def test_tiles_are_what_the_unit_multiplies_and_registers_hold() -> None:
    have = {int(n) for n in re.findall(r"struct Wgmma<(\d+)>", sources("gemm_w8a8.cu")[1].read_text(encoding="utf-8"))}
    for _, defines, _ in UNITS:
        rows, columns, sums = defines["W8A8_TM"], defines["W8A8_TN"], defines["W8A8_SUMS"]
        assert rows in (8, 32, 64, 128)
        assert columns in have
        assert columns * (1 if sums == 0 else 2) <= 256  # accumulators per thread, two sets where sums are promoted


def test_tactics_are_those_of_the_variant_and_each_once() -> None:
    found = tactics(problem("scaled/m300n4096k512/bf16"))
    every = {f"{sums}_{tile}" for sums in ("fast", "promoted") for tile in TILES[sums]}
    assert len(set(found)) == len(found)
    assert set(found) == {name for name in every if re.search("_m(64|128)n", name)}
    assert found[0].startswith("fast_")
    assert set(tactics(problem("block/m300n4096k512/bf16"))) == {f"block_{tile}" for tile in TILES["block"]}
    few = ((1, {8, 32, 64}), (8, {8, 32, 64}), (9, {32, 64}), (32, {32, 64}), (33, {64}), (64, {64}), (65, {64, 128}))
    for m, rows in few:
        assert {defines_of(name)["W8A8_TM"] for name in tactics(problem(f"scaled/m{m}n4096k512/bf16"))} == rows


@pytest.mark.parametrize(("shape", "waves"), [
    # blocks over 132 multiprocessors, by hand: 12288 / 96 = 128, 14336 / 112 = 128, 73728 / 112 = 658.3 -> 659 of 660
    ("m1n12288k12288", 1), ("m64n12288k36864", 1), ("m1n14336k12288", 1), ("m64n73728k12288", 5), ("m128n12288k12288", 1),
    ("m128n14336k12288", 1),
    # 2 x 64 tiles of 192, 2 x 64 of 224, 4 x 64 of 192, 2 x 330 of 224; 8 x 48 of 256 in 3 waves and not 8 x 64 of 192 in 4,
    # 16 x 56 of 256 in 7 and not 16 x 64 of 224 in 8, 32 x 288 of 256 in 70 and not 32 x 330 of 224 in 80: as many products, and
    # fewer tiles
    ("m256n12288k12288", 1), ("m256n14336k12288", 1), ("m512n12288k12288", 2), ("m256n73728k12288", 5),
    ("m1024n12288k12288", 3), ("m2048n14336k12288", 7), ("m4096n73728k12288", 70),
])
def test_the_dispatched_tile_leaves_few_multiprocessors_idle(shape: str, waves: int) -> None:
    found = problem(f"scaled/{shape}/bf16")
    defines = defines_of(tactics(found)[0])
    tiles = -(-found.dim("m") // int(defines["W8A8_TM"])) * -(-found.dim("n") // int(defines["W8A8_TN"]))
    assert -(-tiles // 132) == waves
    assert tiles > 0.95 * 132 * waves


# declarations and refusals ----------------------------------------------------------------------------------------------


def _problems() -> Iterator[Problem]:
    for variant, *tokens in product(OP.variants, *(option.tokens for option in OP.options)):
        options = dict(zip((option.name for option in OP.options), tokens, strict=True))
        if possible_options(OP, variant, options):
            yield problem(f"{variant}/m5n136k256/{'.'.join(tokens)}")


def test_every_declaration_is_the_contract_s() -> None:
    seen = 0
    for found in _problems():
        if unsupported(found) is None:
            assert outside_domain(OP, found) is None
            for tactic in tactics(found):
                assert check_declaration(OP, found, declaration(found, tactic)) == ("", "as the contract"), (found, tactic)
                seen += 1
    assert seen > 100


def test_declarations_by_hand() -> None:
    said = text_of(declaration(problem("scaled/m1n8k16/f16.bias"), "fast_m64n32"))
    assert said == (
        "dot(a, w) on hopper_wgmma_fp8, K ascending, from zero; mul(channel_scale) -> f32 RNE; "
        "mul(token_scale) -> f32 RNE, fused; add(bias) -> f32 RNE; cast(f16) -> f16 RNE; bit-exact deterministic batch-invariant")
    said = text_of(declaration(problem("block/m1n8k128/bf16.biasafter"), "block_m64n32"))
    assert "segments of 128: mul(a_scale,w_scale:f32:fused) into f32" in said
    assert "cast(bf16) -> bf16 RNE; add(bias) -> bf16 RNE; cast(bf16)" in said
    assert "segments of 128: into f32" in text_of(declaration(problem("scaled/m1n8k128/bf16"), "promoted_m64n32"))


def test_what_is_refused_is_said() -> None:
    assert "e4m3fnuz" in (unsupported(problem("scaled/m1n8k16/bf16.fnuz")) or "")
    for text, _ in OP.rejects:
        assert unsupported(parse_problem(text, ops(), check=False))
    assert unsupported(problem("scaled/m0n8k16/f32")) is None


def test_sizes_are_taken_up_to_the_bound() -> None:
    """Sizes are C ints, and a tile of at most 256 behind the largest is counted in them: 2^31 - 257 + 256 = 2^31 - 1."""
    assert max(max(defines["W8A8_TM"], defines["W8A8_TN"]) for _, defines, _ in UNITS) == 256
    assert unsupported(problem("scaled/m2147483391n8k16/f32")) is None
    for text, letters in (
        ("m2147483392n8k16", "M"), ("m4294967296n8k16", "M"), ("m1n2147483392k16", "N"), ("m1n2147483392k2147483392", "N, K"),
    ):
        assert (unsupported(problem(f"scaled/{text}/f32")) or "").endswith(f": {letters} must be at most 2^31 - 257")


def _tensors(m: int = 4, n: int = 16, k: int = 128) -> dict[str, Any]:
    return {
        "a": torch.zeros(m, k).to(FP8), "w": torch.zeros(n, k).to(FP8), "out": torch.zeros(m, n, dtype=torch.bfloat16),
        "token_scale": torch.ones(m), "channel_scale": torch.ones(n),
    }


_BLOCKS = {"token_scale": None, "channel_scale": None, "a_scale": torch.ones(4, 1), "w_scale": torch.ones(1, 1)}


@pytest.mark.parametrize(("change", "said"), [
    ({"out": torch.zeros(4, 16, dtype=torch.int8)}, "got out of torch.int8"),
    ({"a": torch.zeros(4, 128)}, "got a torch.float32"),
    ({"a": torch.zeros(4, 128).to(torch.float8_e4m3fnuz)}, "got a torch.float8_e4m3fnuz"),
    *(({name: torch.zeros(rows, 128, dtype=torch.uint8).view(dtype)}, f"got a .*{str(dtype)[6:]}.*, expected matrices of float8")
      for name, rows in (("a", 4), ("w", 16)) for dtype in (torch.float8_e5m2, torch.int8, torch.bool)),
    ({"w": torch.zeros(16, 64).to(FP8)}, r"got w \(16, 64\)"),
    ({"out": torch.zeros(1, 16, dtype=torch.bfloat16).expand(4, 16)}, "got out with 0 elements from row to row, expected"),
    ({"a": torch.zeros(1, 128).to(FP8).expand(4, 128)}, "got a with 0 elements from row to row, expected at least 128"),
    *(({name: given.to("meta")}, f"got {name} on meta, expected cpu, where the output lies") for name, given in (
        ("a", torch.zeros(4, 128).to(FP8)), ("w", torch.zeros(16, 128).to(FP8)), ("token_scale", torch.ones(4)),
        ("channel_scale", torch.ones(16)), ("bias", torch.zeros(16, dtype=torch.bfloat16)),
    )),
    ({**_BLOCKS, "a_scale": torch.ones(4, 1, device="meta")}, "got a_scale on meta, expected cpu"),
    ({**_BLOCKS, "w_scale": torch.ones(1, 1, device="meta")}, "got w_scale on meta, expected cpu"),
    ({"out": torch.zeros(4, 16, dtype=torch.bfloat16, device="meta")}, "got a on cpu, expected meta, where the output lies"),
    ({
        "a": torch.zeros(1 << 32, 128, dtype=torch.uint8, device="meta"), "token_scale": torch.ones(1),
        "out": torch.zeros(1 << 32, 16, dtype=torch.bfloat16, device="meta"),
    }, "M must be at most 2"),
    ({"out": torch.zeros(4, 8, dtype=torch.bfloat16)}, r"out \(4, 8\)"),
    ({"token_scale": torch.ones(3)}, r"got token_scale \(3,\), expected contiguous float32 \(4,\) or \(1,\)"),
    ({"token_scale": torch.ones(4).double()}, "got token_scale"),
    ({"channel_scale": None}, "got channel_scale None"),
    ({"a_scale": torch.ones(4, 1)}, "got token_scale"),
    ({**_BLOCKS, "w_scale": None}, "got w_scale None"),
    ({"bias": torch.zeros(16)}, "got bias torch.float32"),
    ({"out": torch.zeros(16, 4, dtype=torch.bfloat16).t()}, "4 elements from column to column"),
    ({"a": torch.zeros(4, 144).to(FP8)[:, 8:136]}, "got a with a base or rows off multiples of 16 bytes"),
    ({"w": torch.zeros(16, 136).to(FP8)[:, :128]}, "got w with a base or rows off multiples of 16 bytes"),
    ({"tactic": "fast_m1n1"}, "got tactic 'fast_m1n1'"),
    ({"tactic": "block_m64n32"}, "got tactic 'block_m64n32'"),
    ({**_BLOCKS, "tactic": "fast_m64n32"}, "expected one of block_"),
    ({}, "out: got a tensor on cpu, expected a CUDA device"),
    (_BLOCKS, "out: got a tensor on cpu, expected a CUDA device"),
])
def test_wrong_arguments_are_named_before_anything_runs(change: Mapping[str, Any], said: str) -> None:
    given = {**_tensors(), **change}
    with pytest.raises(ValueError, match=said):
        gemm_w8a8_fp8(given.pop("a"), given.pop("w"), given.pop("out"), **given)


def test_sizes_outside_the_contract_are_refused() -> None:
    given = _tensors(n=12)
    with pytest.raises(ValueError, match="multiple of 8"):
        gemm_w8a8_fp8(given.pop("a"), given.pop("w"), given.pop("out"), **given)


# launches ---------------------------------------------------------------------------------------------------------------


def test_the_signature_is_the_source_s() -> None:
    kinds = {"int": ctypes.c_int, "long long": ctypes.c_longlong}
    text = sources("gemm_w8a8.cu")[0].read_text(encoding="utf-8").partition("lowbit_gemm_w8a8_fp8(")[2].partition(")")[0]
    found = [ctypes.c_void_p if "*" in one else kinds[" ".join(one.split()[:-1])] for one in text.split(",")]
    assert list(gemm_w8a8._SIGNATURE) == found
    assert text.split()[-4:] == ["int", "overlap,", "void*", "stream"]


def test_only_a_launch_with_complete_weights_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's constants are complete before a run; a caller of the function has to say so."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gemm_w8a8, "launch", lambda name, function, like, stream, *rest: seen.append(rest))
    monkeypatch.setattr(gemm_w8a8, "_entry", lambda tactic: None)
    monkeypatch.setattr(gemm_w8a8, "check", lambda name, tensor: None)
    for extra in ({}, {"overlap": False}, {"overlap": True}):
        given: dict[str, Any] = {**_tensors(), **extra}
        gemm_w8a8_fp8(given.pop("a"), given.pop("w"), given.pop("out"), **given)
    given = _tensors()
    out: Any = {"d": SimpleNamespace(memory=given.pop("out"))}
    found = problem("scaled/m4n16k128/bf16")
    gemm_w8a8.run(found, tactics(found)[0], {}, given, out, None, None)
    assert [rest[-5:] for rest in seen] == [(4, 16, 128, 0, 0), (4, 16, 128, 0, 0), (4, 16, 128, 0, 1), (4, 16, 128, 0, 1)]


# the walk ---------------------------------------------------------------------------------------------------------------


_WALK = """
#include <algorithm>
using std::min;
#define __device__
#define __forceinline__ inline
constexpr int TM = {tm}, TN = {tn}, CLUSTER = {cluster};
{text}
extern "C" void walk(int units, int units_m, int units_n, int* out) {{
  for (int unit = 0; unit < units; ++unit)
    for (int rank = 0; rank < CLUSTER; ++rank) {{
      const Place at = place_of(unit, rank, units_m, units_n);
      *out++ = at.m;
      *out++ = at.n;
    }}
}}
"""


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_visit_every_tile_once(tmp_path: Path, cluster: int) -> None:
    source = sources("gemm_w8a8.cu")[0].read_text(encoding="utf-8")
    band = re.search(r"^constexpr int BAND = .*$", source, re.MULTILINE)
    place = re.search(r"^struct Place \{.*?^\}\n.*?^\}\n", source.replace("};", "}\n;"), re.MULTILINE | re.DOTALL)
    assert band is not None
    assert place is not None
    text = f"{band[0]}\n{place[0]}"
    made = tmp_path / "walk.cpp"
    made.write_text(_WALK.format(tm=128, tn=96, cluster=cluster, text=text), encoding="utf-8")
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", str(made), "-o", str(tmp_path / "walk.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "walk.so"))
    for tiles_m, tiles_n in ((1, 1), (1, 7), (5, 3), (16, 4), (17, 6), (40, 9)):
        units_m = -(-tiles_m // cluster)
        units = units_m * tiles_n
        places = (ctypes.c_int * (2 * units * cluster))()
        library.walk(units, units_m, tiles_n, places)
        found = [(places[i] // 128, places[i + 1] // 96) for i in range(0, len(places), 2)]
        inside = [pair for pair in found if pair[0] < tiles_m and pair[1] < tiles_n]
        assert len(set(found)) == len(found)
        assert set(inside) == set(product(range(tiles_m), range(tiles_n)))
        for first in range(0, len(found), cluster):  # blocks of a cluster differ in their rows alone
            group = found[first : first + cluster]
            assert len({column for _, column in group}) == 1
            assert [row for row, _ in group] == [group[0][0] + i for i in range(cluster)]


def test_the_module_offers_what_the_door_asks() -> None:
    for name in ("OPS", "UNITS", "unsupported", "tactics", "declaration", "workspace", "prepare", "stage", "run"):
        assert hasattr(gemm_w8a8, name)
    assert gemm_w8a8.workspace(problem("scaled/m1n8k16/f32"), "fast_m64n32") == 0
