"""The Triton GEMMs on a CUDA device: whether they compute integers exactly on many shapes, which tile is fastest, and how fast.

Decides: nothing that the suite decides; the admissible sets are `lowbit certify triton`. Operands of the check are small integers
and powers of two, few in a row where operands have 8 bits, so that no accumulator can round and D has one answer, which binary64
on the device gives. The check runs every tactic, in bf16 and binary16, of these variants, each with a bias before the cast:
gemm_w8a8_fp8 scaled by token and channel, fn and fnuz; gemm_nvfp4 svdquant of rank 48; gemm_int4 f32 of rank 32; gemm_w4a16 zp,
also with rows that are not aligned for the copy engine and with programs enough for a whole device; gemm_w4a8_int8 direct. The
others, block scales, tensor scales, plain and nunchaku, half, sym and zpafter, viaf16, binary32 out and a bias after the cast,
are for the suite. Refuses: a machine without a CUDA device.

    python tests/device/triton_gemms.py check                    # bits of the variants above, on every tactic: minutes
    python tests/device/triton_gemms.py tune OP[,OP...]          # tiles, printed by time; compiles on all cores first
    python tests/device/triton_gemms.py time --json F            # the dispatch's choice beside torch's own products, one run
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from lowbit.kernels.triton_room import gemm_16bit, gemm_int4, gemm_nvfp4, gemm_w4a8_int8, gemm_w4a16, gemm_w8a8_fp8
from lowbit.kernels.triton_room.machine import here

Tensors = dict[str, torch.Tensor]

SVDQUANT = ((4352, 3840, 3072, 128), (4352, 3840, 15360, 128), (4352, 15360, 3840, 128), (4352, 10240, 3072, 32))
"""M, K, N, R: the production shapes of svdquant-kernels."""
WIDE = ((12288, 14336), (12288, 12288), (12288, 73728), (36864, 12288))
"""K, N of the W4A8 benchmark of vLLM."""
W4A16_ROWS = (1, 16, 32, 64, 256, 512, 1024, 2048, 4096)
W4A16_PARTS = (2, 3, 4, 6, 8)
W4A16_ROWS_TOO = {7: (20,), 33: (100,)}
"""Rows of the check -> further rows for gemm_w4a16, whose tiles the others do not take."""
ROTATED = 400 << 20
"""Bytes of weights that a graph walks through at least, several times the L2 cache."""


# Operands ------------------------------------------------------------------------------------------------------------


def randint(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(low, high, shape, device="cuda").to(dtype)


def thinned(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Rows with about `kept` elements that are not zero."""
    return values * (torch.rand(values.shape, device="cuda") < kept / values.shape[1])


def powers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """2^-1, 1 or 2."""
    return torch.exp2(torch.randint(-1, 2, shape, device="cuda").float()).to(dtype)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Codes of 0, +-1 and +-2."""
    return torch.where(values == 0, 0, torch.where(values.abs() == 1, 2, 4) + torch.where(values < 0, 8, 0)).to(torch.uint8)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, 0::2] | codes[:, 1::2] << 4


# Exact checks --------------------------------------------------------------------------------------------------------


def w8a8(m: int, n: int, k: int, out: torch.dtype, fnuz: bool) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what ran, D, the answer)."""
    element = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    a, w = thinned(randint(-2, 3, (m, k), torch.float32), 16), randint(-2, 3, (n, k), torch.float32)
    token, channel, bias = powers((m,), torch.float32), powers((n,), torch.float32), randint(-4, 5, (n,), out)
    want = (a.double() @ w.double().T) * token.double()[:, None] * channel.double()[None, :] + bias.double()[None, :]
    for promoted in (False, True):
        got = gemm_w8a8_fp8.gemm_w8a8_fp8(a.to(element), w.to(element), token, channel, bias, out, promoted=promoted)
        yield f"w8a8 {'promoted' if promoted else 'fast'}", got, want.to(out)


def nvfp4(m: int, n: int, k: int, out: torch.dtype, rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    a, w = thinned(randint(-2, 3, (m, k), torch.float32), 16), randint(-2, 3, (n, k), torch.float32)
    scales = [randint(0, 2, (rows, k // 16)) * 8 + 48 for rows in (m, n)]  # ue4m3 1/2 and 1
    act, up = thinned(randint(-2, 3, (m, rank), out), 8), randint(-2, 3, (n, rank), out)
    channel, bias, alpha = powers((n,), out), randint(-4, 5, (n,), out), torch.full((1,), 0.5, device="cuda")
    left, right = (
        x.double() * torch.where(s == 48, 0.5, 1.0).double().repeat_interleave(16, 1) for x, s in zip((a, w), scales, strict=True)
    )
    want = ((left @ right.T) * 0.5 + act.double() @ up.double().T) * channel.double()[None, :] + bias.double()[None, :]
    tensors = {"a": nibbles(e2m1_codes(a)), "a_scale": scales[0], "w": nibbles(e2m1_codes(w)), "w_scale": scales[1]}
    tensors |= {"alpha": alpha}
    tensors |= {name: x.view(torch.int16) for name, x in (("lora_act", act), ("lora_up", up), ("channel_scale", channel),
                                                          ("bias", bias))}
    for words in (None, torch.empty((m + n, k), dtype=torch.int16, device="cuda")):
        d = torch.empty((m, n), dtype=out, device="cuda").fill_(float("nan"))
        gemm_nvfp4.launch(tensors, d.view(torch.int16), words, epilogue="svdquant", bias="bias", bf16=out is torch.bfloat16,
                          machine=here())
        yield f"nvfp4 {'fused' if words is None else 'decoded'}", d, want.to(out)


def int4(m: int, n: int, k: int, out: torch.dtype, rank: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    a, w = randint(-8, 8, (m, k), torch.int8), randint(-8, 8, (n, k), torch.int8)
    a = a * (torch.arange(k, device="cuda") // 64 % 4 == 0).to(torch.int8)  # few groups: sums of groups are then short
    sa, sw = powers((k // 64, m), out), powers((k // 64, n), out)
    act, up = thinned(randint(-2, 3, (m, rank), out), 8), randint(-2, 3, (n, rank), out)
    channel, bias = powers((n,), out), randint(-4, 5, (n,), out)
    left = a.double() * sa.double().T.repeat_interleave(64, 1)
    right = w.double() * sw.double().T.repeat_interleave(64, 1)
    want = (left @ right.T + act.double() @ up.double().T) * channel.double()[None, :] + bias.double()[None, :]
    tensors = {"a": nibbles(a.view(torch.uint8) & 15), "w": nibbles(w.view(torch.uint8) & 15)}
    tensors |= {name: x.view(torch.int16) for name, x in (("a_scale", sa), ("w_scale", sw), ("lora_act", act), ("lora_up", up),
                                                          ("channel_scale", channel), ("bias", bias))}
    memory = torch.empty((m + n, k), dtype=torch.int8, device="cuda")
    for name, values in (("fused", None), ("unpacked", memory), ("e4m3", memory)):
        d = torch.empty((m, n), dtype=out, device="cuda").fill_(float("nan"))
        gemm_int4.launch(tensors, d.view(torch.int16), values, half=False, bf16=out is torch.bfloat16, e4m3=name == "e4m3",
                         machine=here())
        yield f"int4 {name}", d, want.to(out)


def w4a16(m: int, n: int, k: int, out: torch.dtype, g: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """A has few zeros, so that one wrong weight is seen in most rows. Its second form is not aligned for the copy engine."""
    a, q = randint(-2, 3, (m, k), out), randint(0, 16, (n, k))
    apart = torch.zeros((m, k + 8), dtype=out, device="cuda")[:, 4 : k + 4].copy_(a)
    scale, zero, bias = powers((k // g, n), out), randint(0, 16, (k // g, n)), randint(-4, 5, (n,), out)
    weight = (q.double() - zero.double().T.repeat_interleave(g, 1)) * scale.double().T.repeat_interleave(g, 1)
    want = (a.double() @ weight.T + bias.double()[None, :]).to(out)
    tensors = {"w": gemm_w4a16.pack(q), "bias": bias.view(torch.int16)}
    tensors["scales"] = gemm_w4a16.pack_scales(scale.T.contiguous().view(torch.int16), zero.T)
    memories = {"whole": None, "decoded": torch.empty((n, k), dtype=torch.int16, device="cuda")}
    memories |= {f"split{s}": torch.empty((s, m, n), device="cuda") for s in (2, 4, 8) if k % (128 * s) == 0}
    forms = [(name, a, memory) for name, memory in memories.items()] + [("whole, A not aligned", apart, None)]
    for name, rows, memory in forms:
        d = torch.empty((m, n), dtype=out, device="cuda").fill_(float("nan"))
        gemm_w4a16.launch({**tensors, "a": rows.view(torch.int16)}, d.view(torch.int16), memory, variant="zp", bias="bias",
                          bf16=out is torch.bfloat16, machine=here())
        yield f"w4a16 {name}", d, want


def w4a8(m: int, n: int, k: int, out: torch.dtype, g: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    a, q = thinned(randint(-8, 9, (m, k), torch.int8), 32), randint(0, 16, (n, k))
    group, token, bias = powers((k // g, n), out), powers((m,), out), randint(-4, 5, (n,), out)
    weight = (q.double() - 8) * group.double().T.repeat_interleave(g, 1)
    want = (a.double() @ weight.T) * token.double()[:, None] + bias.double()[None, :]
    yield "w4a8", gemm_w4a8_int8.gemm_w4a8_int8(a, gemm_w4a8_int8.pack(q), group, token, bias), want.to(out)


def check_share(m: int, out: torch.dtype, seed: int) -> tuple[int, int]:
    """(outputs, of which differ) at one M and output format; what differs is printed."""
    torch.manual_seed(seed)
    wrong, count = 0, 0
    for n, k in ((8, 64), (72, 320), (264, 1024), (136, 2048)):
        jobs = [w8a8(m, n, k + 16, out, False), w8a8(m, n, k, out, True), nvfp4(m, n, k, out, 48), int4(m, n, k, out, 32)]
        for rows in (m, *W4A16_ROWS_TOO.get(m, ())):
            jobs += [w4a16(rows, n, k, out, g) for g in (16, 32, 64, 128, 256, k) if k % g == 0]
            jobs += [w4a16(rows, 8448, 4096, out, g) for g in (32, 128, 4096) if n == 8]  # programs to fill a device
        jobs += [w4a8(m, n, k, out, g) for g in (32, 64, 128, k) if k % g == 0]
        jobs += [w4a8(m, n, 96, out, 96), w4a16(m, n, 200, out, 200), w4a16(m, n, 80, out, 16)]
        for name, got, want in itertools.chain.from_iterable(jobs):
            differing = int((got != want).sum())
            wrong, count = wrong + differing, count + got.numel()
            if differing:
                print(f"{name} M={got.shape[0]} N={n} K={k} {out}: {differing} of {got.numel()} differ", flush=True)
    return count, wrong


def check() -> int:
    """Number of outputs that differ, each M and format in a process of its own: most of the time goes into compiling."""
    shares = list(itertools.product((1, 7, 33, 130, 300, 1000), (torch.bfloat16, torch.float16)))
    with multiprocessing.get_context("spawn").Pool(len(shares)) as pool:
        found = pool.starmap(check_share, [(*share, seed) for seed, share in enumerate(shares)])
    print(f"check: {sum(count for count, _ in found)} outputs, {sum(wrong for _, wrong in found)} differ", flush=True)
    return sum(wrong for _, wrong in found)


# Time ----------------------------------------------------------------------------------------------------------------


def graph_us(call: Callable[[int], object], copies: int, milliseconds: float = 4.0, replays: int = 5) -> float:
    """Median microseconds of a call, of replays of one graph that holds at least `milliseconds` of calls."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        call(0)
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 2)]  # type: ignore[no-untyped-call]
        marks[0].record(stream)
        for i in range(copies):
            call(i)
        marks[1].record(stream)
        stream.synchronize()
        once: float = max(marks[0].elapsed_time(marks[1]) / copies, 1e-3)
        calls: int = max(1, math.ceil(min(milliseconds / once, 200) / copies)) * copies
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i % copies)
        graph.replay()
        for mark in marks[:-1]:
            mark.record(stream)
            graph.replay()
        marks[-1].record(stream)
        stream.synchronize()
    times: list[float] = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return statistics.median(times) / calls * 1e3


@dataclass(frozen=True, slots=True)
class Subject:
    """One op at one shape. `call(i, tile, way)` computes with the i-th copy of the weights."""

    op: str
    m: int
    k: int
    n: int
    copies: int
    call: Callable[[int, Any, Any], object]
    tiles: tuple[tuple[Any, Any], ...]  # (tile, way)
    peers: Mapping[str, Callable[[int], object]]


def copies_for(nbytes: int) -> int:
    return max(1, min(64, -(-ROTATED // nbytes)))


def dense16(a: torch.Tensor, w: torch.Tensor) -> Callable[[int], object]:
    return lambda i: torch.matmul(a, w.T)


def subject_nvfp4(m: int, k: int, n: int, rank: int) -> Subject:
    out = torch.bfloat16
    tensors = {"a": randint(0, 256, (m, k // 2)), "a_scale": randint(40, 64, (m, k // 16)), "w": randint(0, 256, (n, k // 2))}
    tensors |= {"w_scale": randint(40, 64, (n, k // 16)), "alpha": torch.full((1,), 0.5, device="cuda")}
    shapes = {"lora_act": (m, rank), "lora_up": (n, rank), "channel_scale": (n,), "bias": (n,)}
    tensors |= {name: torch.randn(shape, device="cuda").to(out).view(torch.int16) for name, shape in shapes.items()}
    words = torch.empty((m + n, k), dtype=torch.int16, device="cuda")
    d = torch.empty((m, n), dtype=torch.int16, device="cuda")
    left, right = torch.randn((m, k), device="cuda").to(out), torch.randn((n, k), device="cuda").to(out)

    def call(i: int, tile: Any, way: Any) -> object:
        return gemm_nvfp4.launch(tensors, d, None if way == "fused" else words, epilogue="svdquant", bias="bias", bf16=True,
                                 machine=here(), tile=tile)

    t = gemm_16bit.Tile
    tiles = [(t(*shape), "decoded") for shape in (
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3),
        (128, 128, 128, 8, 3))]
    tiles += [(t(*shape), "fused") for shape in ((128, 128, 64, 8, 3), (128, 128, 128, 8, 3))]
    return Subject("gemm_nvfp4", m, k, n, 1, call, tuple(tiles), {"torch bf16": dense16(left, right)})


def subject_int4(m: int, k: int, n: int, rank: int) -> Subject:
    out = torch.float16
    tensors: Tensors = {"a": randint(0, 256, (m, k // 2)), "w": randint(0, 256, (n, k // 2))}
    shapes: dict[str, tuple[int, ...]] = {"a_scale": (k // 64, m), "w_scale": (k // 64, n), "lora_act": (m, rank)}
    shapes |= {"lora_up": (n, rank)}
    shapes |= dict.fromkeys(("channel_scale", "bias"), (n,))
    tensors |= {name: torch.rand(shape, device="cuda").to(out).view(torch.int16) for name, shape in shapes.items()}
    values = torch.empty((m + n, k), dtype=torch.int8, device="cuda")
    d = torch.empty((m, n), dtype=torch.int16, device="cuda")
    left, right = randint(-128, 128, (m, k), torch.int8), randint(-128, 128, (n, k), torch.int8)

    def call(i: int, tile: Any, way: Any) -> object:
        return gemm_int4.launch(tensors, d, None if way == "fused" else values, half=False, bf16=False,
                                e4m3=way == "e4m3", machine=here(), tile=tile)

    t = gemm_int4.Tile
    tiles = [(t(*shape), way) for way in ("e4m3", "unpacked") for shape in (
        (128, 128, 8, 3), (128, 128, 8, 5), (128, 128, 4, 4), (128, 64, 4, 4), (64, 128, 4, 4), (128, 256, 8, 4), (64, 256, 4, 4),
        (256, 64, 8, 4), (64, 64, 4, 5), (128, 64, 4, 6), (128, 64, 8, 4))]
    return Subject("gemm_int4", m, k, n, 1, call, tuple(tiles), {"torch int8": lambda i: torch._int_mm(left, right.T)})


def subject_w8a8(m: int, k: int, n: int) -> Subject:
    e4m3, copies = torch.float8_e4m3fn, copies_for(k * n)
    a, weights = torch.randn((m, k), device="cuda").to(e4m3), [torch.randn((n, k), device="cuda").to(e4m3) for _ in range(copies)]
    token, channel = torch.rand((m, 1), device="cuda"), torch.rand((1, n), device="cuda")
    d = torch.empty((m, n), dtype=torch.int16, device="cuda")

    def call(i: int, tile: Any, way: Any) -> object:
        return gemm_w8a8_fp8.launch(
            a.view(torch.uint8), weights[i].view(torch.uint8), token, channel, None, d, out="bf16", fnuz=False, blocked=False,
            promoted=way == "promoted", bias_after=False, machine=here(), tile=tile)

    t = gemm_w8a8_fp8.Tile
    small = ((64, 64, 128, 4, 6), (64, 128, 128, 4, 5), (64, 64, 256, 4, 3), (128, 64, 128, 4, 5), (64, 256, 128, 4, 4))
    large = ((128, 128, 128, 4, 4), (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3),
             (256, 128, 128, 8, 4), (128, 64, 128, 4, 5))
    shapes = small if m < 128 else (*small, *large) if m <= 256 else large
    tiles = [(t(*shape), "fast") for shape in shapes] + [(t(128, 128, 128, 8, 4), "promoted")] * (m >= 128)
    peers = {"torch fp8 rowwise": lambda i: torch._scaled_mm(
        a, weights[i].T, scale_a=token, scale_b=channel, out_dtype=torch.bfloat16, use_fast_accum=True)}
    return Subject("gemm_w8a8_fp8", m, k, n, copies, call, tuple(tiles), peers)


def subject_w4a16(m: int, k: int, n: int) -> Subject:
    out, copies, g = torch.bfloat16, copies_for(k * n // 2), 128
    a = torch.randn((m, k), device="cuda").to(out)
    weights = [(randint(-32768, 32768, (k // 128, n, 32), torch.int16), gemm_w4a16.pack_scales(
        torch.rand((n, k // g), device="cuda").to(out).view(torch.int16))) for _ in range(copies)]
    d = torch.empty((m, n), dtype=torch.int16, device="cuda")
    parts = {s: torch.empty((s, m, n), device="cuda") for s in W4A16_PARTS if m <= 1024 and k % (128 * s) == 0}
    decoded = torch.empty((n, k), dtype=torch.int16, device="cuda")
    dense = [torch.randn((n, k), device="cuda").to(out) for _ in range(copies_for(2 * k * n))]

    def call(i: int, tile: Any, way: Any) -> object:
        w, scale = weights[i]
        if way == "decode alone":
            gemm_w4a16.decode(w, scale, decoded, variant="sym", bf16=True, machine=here())
            return None
        return gemm_w4a16.launch(
            {"a": a.view(torch.int16), "w": w, "scales": scale}, d, decoded if way == "decoded" else parts.get(way),
            variant="sym", bias="nobias", bf16=True, machine=here(), tile=tile)

    t, dense_tile, few = gemm_w4a16.Tile, gemm_16bit.Tile, 16 if m <= 16 else 32 if m <= 32 else 64
    tiles: list[tuple[Any, Any]] = []  # the likeliest first
    if m <= 64:
        shapes = [(128, 4, 4), (128, 8, 4), (256, 8, 3), (64, 4, 6), (128, 4, 6)]
        tiles += [(t(few, *shape, described), way) for shape in shapes for described in (True, False) for way in (1, *parts)]
    else:
        tiles += [(t(256, 128, 8, 3), way) for way in (1, *(s for s in parts if s <= 4))]
        tiles += [(t(128, 128, 8, stages), way) for stages in (4, 3) for way in ((1, *parts) if m <= 256 else (1,))]
        tiles += [(t(256, 128, 8, 3, band=band), 1) for band in (2, 32)] + [(t(256, 128, 8, 2), 1), (t(256, 64, 4, 2), 1)]
        tiles += [(t(128, 64, 4, 3), 1), (t(128, 64, 4, 2), 1), (t(256, 128, 8, 3, False), 1)]
    if m >= 1024:
        tiles += [(dense_tile(*shape), "decoded") for shape in ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 4))]
    peers = {"torch bf16": lambda i: torch.matmul(a, dense[i % len(dense)].T)}
    return Subject("gemm_w4a16", m, k, n, copies, call, tuple(tiles), peers)


def subjects(ops: list[str], small: bool = False) -> Iterator[Callable[[], Subject]]:
    """Makers of subjects; `small`: few numbers of the same divisibility, to compile by."""
    shapes = ((4352, 3840, 3072, 128), (4352, 10240, 3072, 32)) if small else SVDQUANT
    wide = ((3072, 256),) if small else WIDE  # 3072: whole blocks in each of 2, 3, 4, 6 and 8 parts
    if "gemm_nvfp4" in ops:
        yield from (lambda s=s: subject_nvfp4(*s) for s in shapes)
    if "gemm_int4" in ops:
        yield from (lambda s=s: subject_int4(*s) for s in shapes)
    if "gemm_w8a8_fp8" in ops:
        yield from (lambda m=m, s=s: subject_w8a8(m, *s) for s in wide for m in (64, 128, 256, 512, 1024, 4096))
    if "gemm_w4a16" in ops:
        yield from (lambda m=m, s=s: subject_w4a16(m, *s) for s in wide for m in W4A16_ROWS)


def text_of(tile: Any, way: Any) -> str:
    """A tile and a way in one word."""
    names = ("m", "n", "k", "warps", "stages", "described", "band")
    sizes = (str(int(getattr(tile, name))) for name in names if hasattr(tile, name))
    return f"{way}:{'x'.join(sizes)}"


def compile_share(ops: list[str], index: int, of: int) -> None:
    """Launch every `of`-th build once at small sizes: Triton keeps what it compiled. Rows make no other build, except one row."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    builds: set[tuple[object, ...]] = set()
    for make in subjects(ops, small=True):
        subject = make()
        for tile, way in subject.tiles:
            build = (subject.op, subject.m == 1, subject.k, subject.n, text_of(tile, way))
            if build in builds:
                continue
            builds.add(build)
            if len(builds) % of == index:
                try:
                    subject.call(0, tile, way)
                except OutOfResources:
                    continue  # `tried` says so
    torch.cuda.synchronize()


def compile_all(ops: list[str]) -> None:
    processes = min(14, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    shares = [context.Process(target=compile_share, args=(ops, i, processes)) for i in range(processes)]
    for share in shares:
        share.start()
    for share in shares:
        share.join()


def tried(subject: Subject, tile: Any, way: Any) -> list[float]:
    """Microseconds of one choice; none where it asks for more than the device has."""
    try:
        return [graph_us(lambda i: subject.call(i, tile, way), subject.copies, 2.0, 3)]
    except OutOfResources as error:
        print(f"  {text_of(tile, way)}: {error}", flush=True)
        torch.cuda.synchronize()
        return []


def tune(ops: list[str], budget: float) -> list[dict[str, Any]]:
    started, rows = time.monotonic(), []
    compile_all(ops)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    for make in subjects(ops):
        if time.monotonic() - started > budget:
            print("budget spent", flush=True)
            break
        subject = make()
        found = [(us, text_of(*choice)) for choice in subject.tiles for us in tried(subject, *choice)]
        peers = {name: graph_us(call, subject.copies, 2.0, 3) for name, call in subject.peers.items()}
        found.sort()
        row = {"op": subject.op, "m": subject.m, "k": subject.k, "n": subject.n, "peers": peers, "tiles": found}
        rows.append(row)
        rate = 2e-6 * subject.m * subject.k * subject.n
        rates = " ".join(f"{name} {us:.1f}us {rate / us:.0f}T" for name, us in peers.items())
        peer = next(iter(peers.values()))
        best = "; ".join(f"{us:.1f} ({peer / us:.2f}) {name}" for us, name in found[:6])
        print(f"{subject.op} M={subject.m} K={subject.k} N={subject.n} {rates} | {best}", flush=True)
        del subject
        torch.cuda.empty_cache()
    return rows


def dispatched(subject: Subject, way: Any, i: int) -> object:
    """One call by the dispatch's own tile."""
    return subject.call(i, None, way)


def timed(ops: list[str]) -> list[dict[str, Any]]:
    """The dispatch's own choice, three rounds beside the peers in alternating order, medians."""
    rows: list[dict[str, Any]] = []
    for make in subjects(ops):
        subject = make()
        way: Any = {"gemm_nvfp4": "decoded", "gemm_int4": "e4m3", "gemm_w8a8_fp8": "fast"}.get(subject.op)
        if subject.op == "gemm_w4a16":
            way = gemm_w4a16.tactics_of(subject.m, subject.n, subject.k, here())[0]
            way = int(way.removeprefix("split")) if way.startswith("split") else way
        calls: dict[str, Callable[[int], object]] = {"ours": partial(dispatched, subject, way), **subject.peers}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(3):
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(graph_us(calls[name], subject.copies))
        medians = {name: statistics.median(found) for name, found in times.items()}
        row = {"op": subject.op, "m": subject.m, "n": subject.n, "k": subject.k, "tactic": str(way), "us": medians.pop("ours"),
               "peers": medians}
        rows.append(row)
        print(json.dumps(row), flush=True)
        del subject
        torch.cuda.empty_cache()
    for op in ops:
        own = [row for row in rows if row["op"] == op]
        for peer in {name for row in own for name in row["peers"]}:
            for m in (0, *sorted({row["m"] for row in own})):
                ratios = [row["peers"][peer] / row["us"] for row in own if m in (0, row["m"])]
                mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
                what = f"{op} M={m}" if m else op
                print(f"{what}: {mean:.3f} of {peer}, geometric mean over {len(ratios)}, least {min(ratios):.3f}")
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "tune", "time"))
    parser.add_argument("ops", nargs="?", default="gemm_nvfp4,gemm_int4,gemm_w4a16,gemm_w8a8_fp8")
    parser.add_argument("--json")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which tuning stops")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    torch.manual_seed(5)
    if given.what == "check":
        return int(check() > 0)
    rows = tune(given.ops.split(","), given.budget) if given.what == "tune" else timed(given.ops.split(","))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
