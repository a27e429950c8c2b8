"""gemm_w4a8_fp8 of the Hopper room on a chip: bit for bit against the emulated datapath, then times.

    python tests/device/hopper_gemm_w4a8.py --check --out FOLDER       # every tactic, both variants, groups, formats, tails
    python tests/device/hopper_gemm_w4a8.py --bench --out FOLDER       # every tactic on the shapes of the table

Decides: the expected bits of each tactic: the declared sums by references/cuda_dot on the GPU, scales and bias in binary32, one
cast. Where blocks of K are dealt out the declaration leaves open where K is cut; here it is worked out, tile by tile, from the
number of multiprocessors, so that bits are compared there, too; and so is which sixteen k an instruction of binary16 takes, for
the tactics of gemm_w4a8_f16.py. Refuses nothing: the exit code is 1 where a bit differed or a byte outside the output changed.
Needed are torch with CUDA, nvcc and a device of compute capability 9.0; `lowbit` may be a folder of links.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lowbit.kernels.hopper_room import gemm_w4a8 as room
from lowbit.kernels.hopper_room import gemm_w4a8_f16 as half_precision
from lowbit.kernels.hopper_room.build import Unit, build_all
from lowbit.references.cuda_dot import emulate_tiles
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.encodings import folded_weight
from lowbit.references.formats import E4M3FN, F16

PATH, HALF_PATH = DATAPATHS["hopper_wgmma_fp8"], DATAPATHS["hopper_f16"]
# of 32 k, in the order of two binary16 instructions: a thread's pairs are nibbles sixteen bits apart of a packed word
ORDER = [4 * c + j + 16 * upper for j in range(4) for c in range(4) for upper in range(2)]
INTEGER_CODES = (0x00, 0x38, 0x40, 0x44, 0x48, 0x4A, 0x4C, 0x4E, 0xD0, 0xCE, 0xCC, 0xCA, 0xC8, 0xC4, 0xC0, 0xB8)
SEED = (  # M, N, K of the seed's test
    (1, 128, 128), (1, 512, 1024), (1, 4096, 4096), (1, 8192, 28672), (13, 8192, 4096), (26, 4096, 8192), (64, 4096, 4096),
    (64, 8192, 28672), (257, 128, 4096), (257, 4096, 4096), (1024, 4096, 8192), (1024, 8192, 4096),
)
TAILS = (
    (1, 8, 128), (2, 200, 192), (7, 8, 64), (17, 384, 1024), (33, 72, 640), (64, 128, 1024), (65, 136, 2048), (130, 520, 2048),
    (257, 264, 1024), (300, 1032, 3072), (520, 392, 1536),
)
TABLE = (  # N, K of the seed's table
    (14336, 12288), (12288, 12288), (73728, 12288), (12288, 36864),
)


def table_of_products() -> torch.Tensor:
    """e4m3 code by scale code [256] and int4 code [16], by the reference."""
    q = np.tile(np.repeat(np.arange(16, dtype=np.uint8), 64), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16).reshape(256, 16)
    return torch.from_numpy(folded_weight(q, scales)[:, ::64].copy()).cuda()


def drawn(m: int, n: int, k: int, group: int, kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Operands of one case, codes on the device. plain: like a layer; wild: all codes of scales and activations but NaN; nan: one
    of each."""
    def bytes_of(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8, device="cuda")

    def signs(*shape: int) -> torch.Tensor:
        return bytes_of(*shape, high=2) * 128

    if kind == "plain":
        a = torch.randn(m, k, generator=generator, device="cuda").clamp(-4, 4).mul(60).to(torch.float8_e4m3fn).view(torch.uint8)
        scale = bytes_of(n, k // group, low=0x20, high=0x48) + signs(n, k // group)
    else:
        a, scale = bytes_of(m, k), bytes_of(n, k // group)
        a, scale = torch.where(a & 127 == 127, a - 1, a), torch.where(scale & 127 == 127, scale - 1, scale)
        if kind == "nan" and m:
            scale[n // 3, (k // group) // 2] = 0x7F
            a[m // 2, k // 3] = 0xFF
    return {
        "a": a, "q": bytes_of(n, k, high=16), "scale": scale,
        "token": torch.randn(m, generator=generator, device="cuda"),
        "channel": torch.randn(n, generator=generator, device="cuda"),
        "bias": torch.randn(n, generator=generator, device="cuda"),
    }


def ends_of(variant: str, k: int, group: int, splits: int) -> tuple[int, ...]:
    """Where parts of K end that are the same for every tile."""
    unit = group if variant == "exact" else 32
    part = -(-k // (unit * splits)) * unit
    return tuple(min(k, start + part) for start in range(0, k, part))


class Dealt(NamedTuple):
    """A tactic that deals out blocks of 128 k: tiles of `height` rows of W by `tokens` of A, `blocks` of threads in a worker."""

    tokens: int
    height: int
    blocks: int


def dealt_of(name: str) -> Dealt | None:
    """None where K is cut in the same way for every tile."""
    if name in half_precision.TACTICS:
        half = half_precision.TACTICS[name]
        return Dealt(half.tokens, 256 * half.cluster, half.cluster)
    tactic = room.TACTICS[name]
    return Dealt(tactic.tokens, 64 * tactic.bands * tactic.stream, tactic.stream) if tactic.stream else None


def cuts(dealt: Dealt, m: int, n: int, k: int, processors: int) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """(rows, columns, where parts of K end) of every tile, counted unit by unit."""
    height, tokens, blocks = dealt.height, dealt.tokens, -(-k // 128)
    across, down = -(-n // height), -(-m // tokens)
    tiles, most = across * down, processors // dealt.blocks
    workers = min(most, tiles * max(1, blocks // 4))
    rest = tiles % workers
    cut = 0 if rest == 0 else min(tiles, rest + workers)
    each, more = divmod(cut * blocks, workers)
    owner = [worker for worker in range(workers) for _ in range(each + (worker < more))]
    index = 0
    for first in range(0, down, 4):  # token tiles are neighbours four at a time
        for column in range(across):
            for row in range(first, min(first + 4, down)):
                own = owner[index * blocks : (index + 1) * blocks] if index < cut else [0] * blocks
                ends = [128 * i for i in range(1, blocks) if own[i] != own[i - 1]]
                index += 1
                yield (slice(row * tokens, min(m, (row + 1) * tokens)),
                       slice(column * height, min(n, (column + 1) * height)), (*ends, k))


def tile_by_tile(
    case: dict[str, torch.Tensor], unit: str, group: int, dealt: Dealt, n: int, few: torch.Tensor, products: torch.Tensor,
) -> torch.Tensor:
    """The sum over K in binary32 [M, columns of `few`]; `case` has the rows of W that `few` names."""
    m, k = case["a"].shape
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    found = torch.full((m, len(few)), float("nan"), device="cuda")
    for rows, columns, ends in cuts(dealt, m, n, k, processors):
        mine = ((few >= columns.start) & (few < columns.stop)).nonzero().flatten()
        if len(mine):
            part = {"a": case["a"][rows], "q": case["q"][mine], "scale": case["scale"][mine]}
            found[rows, mine] = sums(part, unit, group, ends, products)
    return found


def groups_of(a: torch.Tensor, q: torch.Tensor, group: int, half: bool) -> torch.Tensor:
    """Sums of groups in binary32 [K / group, M, N], codes of A [M, K] by codes of int4 [N, K], in e4m3 or in binary16."""
    if half:
        values = torch.tensor([(code ^ 8) - 8 for code in range(16)], dtype=torch.float16, device=a.device)
        place = torch.tensor(ORDER, device=a.device)
        place = (torch.arange(0, a.shape[1], 32, device=a.device)[:, None] + place).flatten()
        left, right = a.view(torch.float8_e4m3fn).half()[:, place].view(torch.int16), values[q.long()][:, place].view(torch.int16)
    else:
        left, right = a, torch.tensor(INTEGER_CODES, dtype=torch.uint8, device=a.device)[q.long()]
    count = a.shape[1] // group
    left, right = (x.reshape(x.shape[0], count, group).transpose(0, 1).contiguous() for x in (left, right))
    path, form = (HALF_PATH, F16) if half else (PATH, E4M3FN)
    return emulate_tiles(left, right, path, (form, form)).view(torch.float32)


def sums(
    case: dict[str, torch.Tensor], unit: str, group: int, ends: tuple[int, ...], products: torch.Tensor
) -> torch.Tensor:
    """The declared sum over K in binary32 [M, N], in parts of K that end at `ends`. unit: folded; exact: a sum per group in e4m3;
    half: a sum per group in binary16."""
    a, q, scale = case["a"], case["q"], case["scale"]
    total = None
    for start, stop in zip((0, *ends), ends, strict=False):
        here = slice(start, stop)
        if unit == "folded":
            w = products[scale.long().repeat_interleave(group, 1)[:, here], q[:, here].long()]
            codes = emulate_tiles(a[None, :, here].contiguous(), w[None].contiguous(), PATH, (E4M3FN, E4M3FN))
            value = codes[0].view(torch.float32)
        else:
            parts = groups_of(a[:, here].contiguous(), q[:, here], group, unit == "half")
            factors = scale[:, start // group : start // group + len(parts)].view(torch.float8_e4m3fn).double()
            value = torch.zeros(a.shape[0], q.shape[0], device=a.device)
            for g, part in enumerate(parts):  # exact in binary64; a sum of more than 53 bits, which is rare, is rounded twice
                value = (part.double() * factors[None, :, g] + value.double()).float()
        total = value if total is None else total + value
    assert total is not None
    return total


def expected(case: dict[str, torch.Tensor], total: torch.Tensor, dtype: torch.dtype, bias: bool) -> torch.Tensor:
    value = total * case["token"][:, None]
    if bias:  # as above: the product is exact in binary64, and the sum nearly always
        wide = value.double() * case["channel"][None].double() + case["bias"].to(dtype)[None].double()
        return wide.float().to(dtype)
    return (value * case["channel"][None]).to(dtype)


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """Elements whose bits differ, any NaN equal to any NaN and either zero to the other."""
    same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan()) | ((got == 0) & (want == 0))
    return int((~same).sum())


def problems() -> Iterator[tuple[int, int, int, int, str]]:
    for m, n, k in TAILS:
        for group in (128, 64):
            if k % group == 0:
                yield m, n, k, group, "plain"
                yield m, n, k, group, "wild"
    yield 70, 328, 2048, 128, "nan"
    for m, n, k in SEED:
        yield m, n, k, 128, "plain"


def check(report: dict[str, Any], wanted: tuple[str, ...]) -> int:
    generator = torch.Generator("cuda").manual_seed(5)
    products, wrong, rows = table_of_products(), 0, []
    for m, n, k, group, kind in problems():
        case = drawn(m, n, k, group, kind, generator)
        packed = room.pack_weights(case["q"], case["scale"])
        whole_n = m * n * k < 1 << 31
        few = torch.arange(n, device="cuda") if whole_n else torch.randperm(n, generator=generator, device="cuda")[:512]
        sample = {**case, "q": case["q"][few], "scale": case["scale"][few]}
        for variant in ("folded", "exact"):
            known: dict[Any, torch.Tensor] = {}
            for name in wanted or (*room.TACTICS, *half_precision.TACTICS):
                if not room.takes(name, variant, m, k, group, False):
                    continue
                dealt = dealt_of(name)
                ends = () if dealt else ends_of(variant, k, group, room.TACTICS[name].parts)
                key = ends or name
                if key not in known:
                    unit = "half" if name in half_precision.TACTICS else variant
                    known[key] = (tile_by_tile(sample, unit, group, dealt, n, few, products) if dealt else
                                  sums(sample, unit, group, ends, products))
                for dtype, bias in ((torch.bfloat16, False), (torch.float16, True)):
                    pad = 8 if bias else 3
                    whole = torch.full((m + 1, n + pad), float("nan"), dtype=dtype, device="cuda")
                    out = whole[:m, :n]
                    room.gemm_w4a8_fp8(
                        case["a"], packed, case["token"], case["channel"], out, bias=case["bias"].to(dtype) if bias else None,
                        variant=variant, tactic=name,
                    )
                    cut = {**sample, "channel": case["channel"][few], "bias": case["bias"][few]}
                    bad = differing(out[:, few], expected(cut, known[key], dtype, bias))
                    outside = int((~whole[m:].isnan()).sum() + (~whole[:, n:].isnan()).sum())
                    rows.append([m, n, k, group, kind, variant, name, str(dtype)[6:], bad, outside, m * len(few)])
                    if bad or outside:
                        wrong += 1
                        print("WRONG", rows[-1], flush=True)
    torch.cuda.synchronize()
    report["check"] = {"runs": len(rows), "wrong": wrong, "elements": sum(row[-1] for row in rows), "rows": rows}
    print("check:", len(rows), "runs,", report["check"]["elements"], "elements,", wrong, "runs wrong", flush=True)
    return wrong


def check_grouped(report: dict[str, Any]) -> int:
    generator = torch.Generator("cuda").manual_seed(6)
    products, wrong, runs = table_of_products(), 0, 0
    for counts, n, k, group in (
        ((3, 0, 17, 0, 1), 72, 1024, 128), ((0, 0, 130), 136, 2048, 64), ((300, 5, 0, 64, 64, 9), 264, 1024, 128),
        ((0, 0), 64, 128, 128), ((1,) * 40, 200, 1024, 128),
    ):
        m = sum(counts)
        cases = [drawn(count, n, k, group, "plain", generator) for count in counts]
        packed = room.pack_weights(torch.stack([c["q"] for c in cases]), torch.stack([c["scale"] for c in cases]))
        a, token = torch.cat([c["a"] for c in cases]), torch.cat([c["token"] for c in cases])
        channel, bias = torch.stack([c["channel"] for c in cases]), torch.stack([c["bias"] for c in cases])
        rows = torch.tensor(counts, dtype=torch.int32, device="cuda")
        for variant in ("folded", "exact"):
            for name, tactic in room.TACTICS.items():
                if not room.takes(name, variant, m, k, group, True):
                    continue
                ends = ends_of(variant, k, group, tactic.parts)
                for dtype, biased in ((torch.bfloat16, False), (torch.float16, True)):
                    out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
                    room.gemm_w4a8_fp8(
                        a, packed, token, channel, out, bias=bias.to(dtype) if biased else None, counts=rows, variant=variant,
                        tactic=name,
                    )
                    want = [
                        expected(c, sums(c, variant, group, ends, products), dtype, biased) for c in cases if len(c["a"])
                    ]
                    bad = differing(out, torch.cat(want)) if want else 0
                    runs += 1
                    if bad:
                        wrong += 1
                        print("WRONG grouped", counts, n, k, group, variant, name, dtype, bad, "of", m * n, flush=True)
    torch.cuda.synchronize()
    report["grouped"] = {"runs": runs, "wrong": wrong}
    print("grouped:", runs, "runs,", wrong, "wrong", flush=True)
    return wrong


def timed(calls: list[Any], rounds: int = 5) -> float:
    """Microseconds per call: the calls in a graph of at least 4 ms, median over replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    event: Any = torch.cuda.Event
    start, stop = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for call in calls:
        call()
    stop.record()
    torch.cuda.synchronize()
    repeat = max(1, int(4.0 / max(start.elapsed_time(stop), 0.01)) + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    graph.replay()
    found = []
    for _ in range(rounds):
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop) * 1000 / (repeat * len(calls)))
    return float(np.median(found))


def measured(
    n: int, k: int, ms: tuple[int, ...], wanted: tuple[str, ...], variants: tuple[str, ...], until: float
) -> Iterator[dict[str, Any]]:
    """Rows of times on one shape of weights, until the clock says `until`."""
    generator = torch.Generator("cuda").manual_seed(7)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (n, k // 8), generator=generator, dtype=torch.int32, device="cuda")
    scale = torch.randint(0x20, 0x40, (n, k // 128), generator=generator, dtype=torch.uint8, device="cuda")
    first = room.pack_weights(words, scale)
    others = range(-(-600_000_000 // first.memory.numel()) - 1)
    copies = [first, *(room.PackedWeights(first.memory.clone(), 1, n, k, 128) for _ in others)]
    took = timed([lambda: room.pack_weights(words, scale, out=first.memory)])
    print(f"pack {n}x{k}: {took:.1f} us, {(first.memory.numel() * 2) / took / 1e3:.0f} GB/s", flush=True)
    channel = torch.rand(n, generator=generator, device="cuda") + 0.5
    for m in ms:
        a = torch.randn(m, k, generator=generator, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
        token = torch.rand(m, generator=generator, device="cuda") + 0.5
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        size = n * k / 2 + n * k / 128 + m * k + 2 * m * n
        roof = max(size / 4.40e6, 2 * m * n * k / 1330e6)  # GB/s that a plain read reached, TFLOP/s of fp8 on random data
        for variant in variants:
            tokens = {name: tactic.tokens for name, tactic in room.TACTICS.items()}
            tokens |= {name: tactic.tokens for name, tactic in half_precision.TACTICS.items()}
            for name in wanted or tokens:
                if not room.takes(name, variant, m, k, 128, False) or not fits(tokens[name], m):
                    continue
                if time.time() > until:
                    return
                given: dict[str, Any] = {"variant": variant, "tactic": name}
                us = timed([partial(room.gemm_w4a8_fp8, a, w, token, channel, out, **given) for w in copies])
                tera = 2e-6 * m * n * k / us
                print(f"{variant:6} {m:5} {n:6} {k:6} {name:16} {us:9.1f} us  roof {roof:8.1f}  {100 * roof / us:4.0f} %  "
                      f"{tera:6.0f} TFLOP/s {size / us / 1e3:6.0f} GB/s", flush=True)
                yield {"variant": variant, "m": m, "n": n, "k": k, "tactic": name, "us": us, "roof_us": roof}


def fits(tokens: int, m: int) -> bool:
    """Tiles whose tokens are not far from M: the others are slower by construction."""
    near = 1 << (m - 1).bit_length() if m > 1 else 1
    return min(near, 64) <= tokens <= max(16, 2 * near)


def units_of(wanted: tuple[str, ...]) -> tuple[Unit, ...]:
    """Libraries of some tactics, and of packing; no name: all."""
    half = [half_precision.defines(half_precision.TACTICS[name], group) for name in wanted if name in half_precision.TACTICS
            for group in (64, 128)]
    other = [room.defines(room.TACTICS[name], variant, group) for name in wanted if name in room.TACTICS
             for variant in ("folded", "exact") for group in (64, 128)]
    return tuple(unit for unit in room.UNITS if not wanted or not unit[1] or unit[1] in half + other)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--shapes", default="0,1,2,3")
    parser.add_argument("--ms", default="1,16,32,64,128,256,512,1024,4096")
    parser.add_argument("--tactics", default="", help="names, with commas between; none: all, and products with experts")
    parser.add_argument("--variants", default="folded,exact")
    parser.add_argument("--seconds", type=float, default=120.0)
    chosen = parser.parse_args()
    begun = time.time()
    wanted = tuple(name for name in chosen.tactics.split(",") if name)
    units = units_of(wanted)
    build_all(units, workers=16)
    print(f"built {len(units)} libraries in {time.time() - begun:.1f} s", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    wrong = 0
    try:
        if chosen.check:
            wrong = check(report, wanted) + (0 if wanted else check_grouped(report))
            print(f"checked after {time.time() - begun:.1f} s", flush=True)
        if chosen.bench:
            shapes = tuple(TABLE[int(i)] for i in chosen.shapes.split(","))
            ms, variants = tuple(map(int, chosen.ms.split(","))), tuple(chosen.variants.split(","))
            until = time.time() + chosen.seconds
            report["bench"] = [row for n, k in shapes for row in measured(n, k, ms, wanted, variants, until)]
    finally:
        Path(chosen.out, "hopper_gemm_w4a8.json").write_text(json.dumps(report), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
