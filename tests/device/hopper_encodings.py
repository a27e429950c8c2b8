"""Are the encodings and quantisers of cuda_hopper the contract's, on ten million values each? A program that counts what differs.

Decides: nothing about arithmetic. Every variant, recipe and format is compared bit for bit with the NumPy references; outputs of
more than 2^31 elements with the same rows computed alone; functions of another library, where one is given, byte for byte.
Refuses: tolerances. Any NaN code equals any other, as the contract has it (QNT-3); all else is equal or counted.

    python tests/device/hopper_encodings.py --json hopper_encodings.json              # on Hopper
    python tests/device/hopper_encodings.py --backend cpu --values 20000 --no-large   # anywhere: the program itself
    ... --peers FILE.py        # a module with PEERS: name -> function, see `Peer`; compared and timed beside ours

Ends with 0, or with 1 where anything differed from the references.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowbit.conformance.backend import Role, TensorView
from lowbit.conformance.case import Problem
from lowbit.conformance.op import make_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.ops.fp8_quantize import recipe_of
from lowbit.conformance.storage import words_of
from lowbit.kernels import cpu, cuda_hopper
from lowbit.references.encodings import convert_fnuz, fold_scales, pack_scale_e4m3, requantize_max_scale
from lowbit.references.formats import BF16, E4M3FN, E4M3FNUZ, F16, F32, Codes, Format, container, decode, is_nan
from lowbit.references.layouts import UNIFIED_INT4
from lowbit.references.recipes import RECIPES, quantise
from lowbit.references.rounding import encode

__all__ = ["Peer", "Row", "main"]

CUDA: Any = torch.cuda  # parts of it have no types
FORMATS = {"bf16": BF16, "f16": F16, "f32": F32}
SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}
K = 1024

Given = dict[str, Codes]
Peer = Callable[..., Any]
"""token: (x, scale_ub) -> (q, scales). static: (x, scale) -> q. tensor: (x) -> (q, scales). block: (x) -> (q, scales).
int4_encode: (words [N, K/8]) -> bytes. scale_pack_e4m3: (scales) -> bytes [.., 8]. uint4b8: (words) -> words, in place.
All torch tensors on the device; codes may come in any one-byte dtype."""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: how many elements, how many of them differ, and the first that does."""

    section: str
    name: str
    elements: int
    differing: int
    first: str = ""


def compared(section: str, name: str, got: Codes, want: Codes, fmt: Format | None) -> Row:
    """`fmt`: the format whose NaN codes are all alike; None: bytes are bytes."""
    unequal = got != want
    if fmt is not None:
        unequal &= ~(is_nan(got, fmt) & is_nan(want, fmt))
    places = np.flatnonzero(unequal)
    first = ""
    if places.size:
        found, expected = (int(codes.reshape(-1)[places[0]]) for codes in (got, want))
        first = f"{int(places[0])}: {found:#x}, {expected:#x}"
    return Row(section, name, int(want.size), int(places.size), first)


# Operands ------------------------------------------------------------------------------------------------------------


def rows_of(rows: int, k: int, fmt: Format, top: float, seed: int, *, finite: bool = False, unit: float | None = None) -> Codes:
    """x [rows, k] in eight kinds of rows, in turn: bell-shaped; the same at scales 2^-30..2^30; magnitudes over 60 binades; any
    bits; a few specials among bell-shaped ones; zeros of both signs; values beside the ties of the row's scale; tiny ones.
    `finite` leaves NaN and infinity out; `unit` is the scale of all such rows, where it is an ordinary number."""
    draw = np.random.default_rng(seed)
    bell = draw.standard_normal((rows, k))
    kind = np.arange(rows) % 8
    x = np.where(kind[:, None] == 1, bell * np.ldexp(1.0, draw.integers(-30, 31, (rows, 1))), bell)
    x = np.where(kind[:, None] == 2, np.ldexp(bell, -draw.integers(0, 60, (rows, k))), x)
    x = np.where(kind[:, None] == 5, np.copysign(0.0, bell), x)
    x = np.where(kind[:, None] == 7, bell * (2.0**-130 if fmt.name != "f16" else 2.0**-20), x)
    # ties: the row's amax is top * s; an element is s times the middle of two neighbouring codes, and the values beside that
    magnitudes = decode(np.arange(0x7F, dtype=np.uint8), E4M3FN)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    s = draw.uniform(0.5, 2.0, (rows, 1))
    if unit is not None and 1e-6 < unit < 1e6:
        s[:] = unit
    tie = np.minimum(draw.choice(middles, (rows, k)), top) * s * np.where(bell < 0, -1.0, 1.0)
    tie[:, :1] = top * s
    x = np.where(kind[:, None] == 6, tie, x)
    width = container(fmt).itemsize
    codes = encode(x, fmt)
    near = draw.integers(-1, 2, (rows, k)).astype(codes.dtype)  # a neighbour of the nearest value
    near[:, :1] = 0
    codes = np.where((kind == 6)[:, None], codes + near, codes)
    if not finite:
        bits = draw.integers(0, 1 << (8 * width), (rows, k), dtype=np.uint64).astype(codes.dtype)
        codes = np.where((kind == 3)[:, None], bits, codes)
        special = encode(np.array([np.nan, np.inf, -np.inf, -0.0, 0.0]), fmt)
        few = draw.choice(special, (rows, k))
        codes = np.where((kind == 4)[:, None] & (draw.random((rows, k)) < 0.003), few, codes)
    return np.asarray(codes, dtype=container(fmt))


def hard_quotients() -> Codes:
    """x [rows, 128] in binary32: quotients x / scale closer to where their rounding turns than 2^-40, beside ties of e4m3fn.

    A tie is T * 2^19 in units of the last place, T odd; fl(x / s) leaves it half a unit on. The significand S of s is chosen so
    that (2^20 T +- 1) S is r away from a multiple of 2^25 (or of 2^24), r small; the quotient by 2^25 is that of x. The first
    element of a row is such that the recipe finds s."""
    found: list[tuple[float, float]] = []
    for tie in range(17, 32, 2):
        for side in (-1, 1):
            middle = (tie << 20) + side
            for bits in (24, 25):
                inverse = pow(middle, -1, 1 << bits)
                for r in (*range(-151, 0, 2), *range(1, 152, 2)):
                    s = r * inverse % (1 << bits)
                    x = (middle * s - r) >> bits
                    if 1 << 23 <= s < 1 << 24 and 1 << 23 <= x < 1 << 24:
                        found.append((float(s), float(x)))
    top, rows = np.float32(448), []
    for s, x in found:
        scale = np.float32(s) * np.float32(2.0**-20)
        amax = scale * top
        if amax / top == scale:
            row = np.zeros(128, dtype=np.float32)
            row[0] = amax
            for i in range(16):  # the tie in each binade of the format, both signs
                value = np.ldexp(np.float32(x), i - 40)
                row[1 + 2 * i : 3 + 2 * i] = np.where(value <= amax, value, 0), np.where(value <= amax, -value, 0)
            rows.append(row)
    return np.stack(rows).view(np.uint32)


def quantiser_problems(values: int) -> Iterator[tuple[Problem, int]]:
    """Every variant, recipe and format, `values` values each in bf16, f16 and f32; and a seed."""
    op, seed = ops()["fp8_quantize"], 0
    pairs = [(variant, recipe) for variant in ("static", "tensor", "token") for recipe in ("vllm", "vllm_native")]
    pairs += [("block", recipe) for recipe in ("vllm", "scaled_quantize", "deepgemm")] + [("tile", "deepgemm")]
    for variant, recipe in pairs:
        for x in FORMATS:
            for fmt in ("fn", "fnuz"):
                for ub in ("no_ub", "ub") if variant == "token" else ("no_ub",):
                    m = -(-values // K // 128) * 128
                    tokens = {"x": x, "format": fmt, "recipe": recipe, "ub": ub}
                    yield make_problem(op, variant, {"m": m, "k": K, "p": 0}, tokens), (seed := seed + 1)


def quantiser_case(work: tuple[Problem, int]) -> list[tuple[str, Given, dict[str, Codes]]]:
    """[(name, operands, expected outputs)] of one problem: one scale per call is drawn several times."""
    problem, seed = work
    fmt, recipe = FORMATS[problem.option("x")], recipe_of(problem)
    m, found = problem.dim("m"), []
    one = problem.variant in ("static", "tensor")
    scales: tuple[float | None, ...] = (None,)
    if problem.variant == "static":
        scales = (1.0, 0.037109375, 3.7e-5, 0.0, float("inf"), float("nan"), 1e-40, 3e38)
    parts = len(scales) if problem.variant == "static" else 4 if one else 1
    for part in range(parts):
        top = 224.0 if problem.option("format") == "fnuz" else 448.0
        scale, ub = scales[part % len(scales)], None
        codes = rows_of(m // parts, K, fmt, top, 100 * seed + part, finite=problem.variant == "tensor", unit=scale)
        if problem.variant == "tensor" and part:  # a NaN; an infinity; zeros only
            codes[-1, -1] = encode(np.array([(np.nan, -np.inf, 0.0)[part - 1]]), fmt)[0]
            if part == 3:
                codes[:] = encode(np.array([-0.0]), fmt)[0]
        given: Given = {"x": codes}
        if scale is not None:
            given["scale"] = encode(np.array([scale]), F32)
        if problem.option("ub") == "ub":
            ub = 1.25
            given["scale_ub"] = encode(np.array([ub]), F32)
        fixed = None if scale is None else decode(given["scale"], F32).reshape(1, 1)
        answer = quantise(decode(codes, fmt), fmt, recipe, static_scale=fixed, scale_ub=ub)
        expected = {"q": answer.codes}
        if problem.variant != "static":
            expected["scales"] = answer.scales.reshape(1) if problem.variant == "tensor" else answer.scales
        kind = ("finite", "NaN", "infinity", "zeros")[part % 4]
        named = "" if parts == 1 else f" scale {scale}" if scale is not None else f" {kind}"
        sized = make_problem(ops()["fp8_quantize"], problem.variant, {"m": m // parts, "k": K, "p": 0}, dict(problem.options))
        found.append((f"{sized}{named}", given, expected))
    if fmt is F32 and recipe in (RECIPES["vllm_fp8_token"], RECIPES["vllm_fp8_group128"]):
        codes = hard_quotients()
        answer = quantise(decode(codes, F32), F32, recipe)
        found.append((f"{problem} hard quotients", {"x": codes}, {"q": answer.codes, "scales": answer.scales}))
    return found


def encoding_cases(values: int) -> Iterator[tuple[Problem, Given, dict[str, Codes]]]:
    """Every variant of every encoding with its expected outputs."""
    draw = np.random.default_rng(11)
    table = np.array(UNIFIED_INT4, dtype=np.uint8)
    n = max(-(-values // 4096 // 16) * 16, 16)
    codes = draw.integers(0, 16, (n, 4096)).astype(np.uint8)
    encode_op, pack_op = ops()["int4_encode"], ops()["int4_pack"]
    for variant, before, after, shape in (
        ("unified", "nibble_low_first", "nibble_low_first", (n, 4096)), ("dense", "int32_k", "reorder_e4m3", (n, 4096)),
        ("grouped", "int32_k", "reorder_e4m3", (n // 16, 16, 4096)),
    ):
        given = codes.reshape(shape)
        dims = dict(zip("enk", (1, *shape) if len(shape) == 2 else shape, strict=True))
        yield make_problem(encode_op, variant, dims), {"q": words_of(given, before)}, {"encoded": words_of(table[given], after)}
    for variant in pack_op.variants:
        token = "int8" if variant == "compressed_tensors" else "uint4"
        problem = make_problem(pack_op, variant, {"n": n, "k": 4096}, {"codes": token})
        if variant == "b8":
            words = words_of(codes, "int32_k")
            yield problem, {"words": words}, {"words": words_of(codes ^ np.uint8(8), "int32_k")}
            continue
        layout = next(t.layout for t in tensors_of(pack_op, problem) if t.name == "packed")
        below = (codes + np.uint8(15)) & np.uint8(15)
        stored = {"compressed_tensors": codes ^ np.uint8(8), "zeros_v1": below}.get(variant, codes)
        signed = np.where(codes & 8, codes | np.uint8(0xF0), codes).astype(np.uint8) if token == "int8" else codes
        yield problem, {"q": signed}, {"packed": words_of(stored, layout)}
    scales = draw.integers(0, 256, values // 8).astype(np.uint8)
    products = make_problem(ops()["scale_pack_e4m3"], "table8", {"n": scales.size})
    yield products, {"scales": scales}, {"packed": pack_scale_e4m3(scales)}
    groups = rows_of(-(-values // K), K, BF16, 448.0, 77)
    for recipe, name in (("vllm", "vllm_fp8_token"), ("vllm_native", "vllm_native_fp8_token")):
        group, channel = fold_scales(groups, RECIPES[name])
        problem = make_problem(ops()["scale_fold"], "row", {"n": groups.shape[0], "k": 128 * K}, {"recipe": recipe})
        yield problem, {"scales": groups}, {"group_scale": group, "channel_scale": channel}
    yield from weight_cases(draw, values)


def weight_cases(draw: np.random.Generator, values: int) -> Iterator[tuple[Problem, Given, dict[str, Codes]]]:
    """fp8 weights: converted, brought to one scale, and their scales repeated."""
    n = -(-values // K)
    w = draw.integers(0, 256, (n, K)).astype(np.uint8)
    channel = encode(np.ldexp(draw.standard_normal((n, 1)), draw.integers(-120, 128, (n, 1))), F32)
    fixed = encode(np.array([0.3]), F32)
    for hardware in ("fnuz", "fn"):
        tokens = {"hardware": hardware, "input_scale": "static"}
        problem = make_problem(ops()["fp8_convert_fnuz"], "channel", {"n": n, "k": K}, tokens)
        out = convert_fnuz(w, channel, fixed) if hardware == "fnuz" else (w, channel, fixed)
        names = ("w_out", "weight_scale_out", "input_scale_out")
        given = {"w": w, "weight_scale": channel, "input_scale": fixed}
        yield problem, given, {name: np.asarray(codes) for name, codes in zip(names, out, strict=True)}
    s = min(64, n)
    shards = encode(np.exp2(draw.uniform(-12.0, 11.0, s)), F32)  # the largest products are beyond binary16
    cuts = np.sort(draw.choice(np.arange(1, n), s - 1, replace=False))
    widths = tuple(int(v) for v in np.diff(np.concatenate(([0], cuts, [n]))))
    counts = np.array(widths, dtype=np.uint32)
    for variant in ("max_scale", "max_scale_f16"):
        for fmt, record in (("fn", E4M3FN), ("fnuz", E4M3FNUZ)):
            problem = make_problem(ops()["fp8_requantize"], variant, {"n": n, "k": K, "s": s}, {"format": fmt})
            half = F16 if variant == "max_scale_f16" else F32
            codes, scale = requantize_max_scale(w, shards, widths, fmt=record, intermediate=half)
            yield problem, {"w": w, "scales": shards, "widths": counts}, {"w_out": codes, "scale": scale.reshape(1)}
    problem = make_problem(ops()["fp8_requantize"], "channel", {"n": n, "k": K, "s": s})
    yield problem, {"w": w, "scales": shards, "widths": counts}, {"channel_scale": np.repeat(shards, widths).reshape(n, 1)}


# Running -------------------------------------------------------------------------------------------------------------


def view_of(name: str, fmt: Format, role: Role, memory: Any) -> TensorView:
    strides = tuple(memory.stride()) if isinstance(memory, torch.Tensor) else tuple(s // memory.itemsize for s in memory.strides)
    return TensorView(name, fmt, tuple(memory.shape), strides, role, "", 0, memory)


def put(codes: Codes, device: str) -> Any:
    if device == "host":
        return np.array(codes)
    return torch.from_numpy(np.ascontiguousarray(codes).view(SIGNED[codes.itemsize])).to(device)


def taken(memory: Any, fmt: Format) -> Codes:
    return np.asarray(memory if isinstance(memory, np.ndarray) else memory.cpu().numpy()).view(container(fmt))


def execute(backend: Any, problem: Problem, tactic: str, given: Given) -> dict[str, tuple[Codes, Format]]:
    """Outputs of one tactic, each with its format. Outputs start as 0xA5."""
    device = backend.device if hasattr(backend, "device") else "host"
    inputs, outputs = {}, {}
    for tensor in tensors_of(ops()[problem.op], problem):
        if tensor.role is Role.OUTPUT:
            memory = put(np.full(tensor.shape, 0xA5, dtype=container(tensor.format)), device)
            outputs[tensor.name] = view_of(tensor.name, tensor.format, tensor.role, memory)
        else:
            inputs[tensor.name] = view_of(tensor.name, tensor.format, tensor.role, put(given[tensor.name], device))
    size = backend.workspace(problem, tactic) if hasattr(backend, "workspace") else 0
    room = view_of("workspace", E4M3FN, Role.OUTPUT, put(np.full(size, 0xFF, dtype=np.uint8), device)) if size else None
    constants = {name: view for name, view in inputs.items() if view.role is Role.CONSTANT}
    state = backend.prepare(problem, tactic, constants)
    others = {name: view for name, view in inputs.items() if view.role is not Role.CONSTANT}
    backend.run(problem, tactic, state, backend.stage(problem, tactic, others), outputs, room, None)
    outputs.update({name: view for name, view in inputs.items() if view.role is Role.INOUT})
    return {name: (taken(view.memory, view.format), view.format) for name, view in outputs.items()}


def judged(backend: Any, section: str, name: str, problem: Problem, given: Given, want: Mapping[str, Codes]) -> Iterator[Row]:
    tactics = backend.tactics(problem) if hasattr(backend, "tactics") else ("default",)
    for tactic in tactics:
        found = execute(backend, problem, tactic, given)
        for output, codes in want.items():
            got, fmt = found[output]
            floats = fmt if section == "quantisers" or fmt is F32 else None
            yield compared(section, f"{name} {tactic} {output}", got, codes, floats)


# More than 2^31 elements ---------------------------------------------------------------------------------------------


def large_rows() -> Iterator[Row]:
    """Outputs of more than 2^31 elements: the last rows against the same rows alone, which the other sections judge."""
    from lowbit.kernels.hopper_room import encodings, quantisers

    m, k, last = (1 << 18) + 128, 8192, 128
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    q = torch.empty(m, k, device="cuda", dtype=torch.uint8)
    scratch = torch.empty(16, device="cuda", dtype=torch.uint8)
    x[-1, -1] = 300.0  # the largest of all, for one scale per tensor
    for variant in ("token", "block", "tile", "static", "tensor"):
        shape = {"token": (m, 1), "block": (m, k // 128), "tile": (m // 128, k // 128), "tensor": (1,)}.get(variant)
        scales = None if shape is None else torch.empty(shape, device="cuda")
        part = None if scales is None else torch.empty((last, 1) if variant == "token" else (last, k // 128) if variant == "block"
                                                       else (1, k // 128) if variant == "tile" else (1,), device="cuda")
        fixed = torch.full((1,), 0.01, device="cuda") if variant == "static" else None
        recipe = "deepgemm" if variant == "tile" else "vllm"
        q.fill_(0xA5)
        quantisers.fp8_quantize(x, q, scales, variant=variant, recipe=recipe, scale=fixed, workspace=scratch)
        alone = torch.empty(last, k, device="cuda", dtype=torch.uint8)
        quantisers.fp8_quantize(x[-last:], alone, part, variant=variant, recipe=recipe, scale=fixed, workspace=scratch)
        unequal = int((alone != q[-last:]).sum())
        if scales is not None and part is not None:
            unequal += int((scales.view(torch.int32)[-part.shape[0]:] != part.view(torch.int32)).sum())
        yield Row("large", f"fp8_quantize {variant} {m} x {k}", m * k, unequal)
    del x, q
    words = torch.randint(-(1 << 31), 1 << 31, (m, k // 8), device="cuda", dtype=torch.int32)
    out = torch.empty(k // 8, m, device="cuda", dtype=torch.int32)
    encodings.int4_encode(words, out)
    tail = torch.empty(k // 8, last, device="cuda", dtype=torch.int32)
    encodings.int4_encode(words[-last:], tail)
    tiles = out.view(k // 32, m // 16, 64)[:, -(last // 16):]
    yield Row("large", f"int4_encode dense {m} x {k}", m * k, int((tiles != tail.view(k // 32, last // 16, 64)).sum()))
    before = words.clone()
    encodings.uint4b8_to_int4(words)
    yield Row("large", f"int4_pack b8 {m} x {k}", m * k, int((words != (before ^ -2004318072)).sum()))
    mapped = torch.empty(m, k // 2, device="cuda", dtype=torch.uint8)
    encodings.int4_encode(before.view(torch.uint8).view(m, k // 2), mapped)
    again = torch.empty_like(mapped)
    encodings.int4_encode(mapped, again)
    unequal = int((again.view(torch.int32) != before.view(m, k // 8)).sum())
    yield Row("large", f"int4_encode unified twice {m} x {k}", m * k, unequal)
    del words, out, before, mapped, again
    scales8 = torch.randint(0, 256, ((1 << 28) + 999,), device="cuda", dtype=torch.uint8)
    packed = torch.empty(scales8.numel(), 8, device="cuda", dtype=torch.uint8)
    encodings.scale_pack_e4m3(scales8, packed)
    alone = torch.empty(999, 8, device="cuda", dtype=torch.uint8)
    encodings.scale_pack_e4m3(scales8[-999:].clone(), alone)
    yield Row("large", f"scale_pack_e4m3 {scales8.numel()}", packed.numel(), int((packed[-999:] != alone).sum()))


# Another library -----------------------------------------------------------------------------------------------------


def peer_rows(peers: Mapping[str, Peer], values: int) -> Iterator[Row]:
    """Our outputs and theirs for the same operands, special values in all of them."""
    from lowbit.kernels.hopper_room import encodings, quantisers

    dtypes = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    m = -(-values // K // 128) * 128
    for name, fmt in FORMATS.items():
        x = put(rows_of(m, K, fmt, 448.0, 5), "cuda").view(dtypes[name])
        q, kinds = torch.empty(m, K, device="cuda", dtype=torch.uint8), np.arange(m) % 8
        for ub in (None, torch.full((1,), 1.25, device="cuda")):
            if "token" in peers:
                scales = torch.empty(m, 1, device="cuda")
                quantisers.fp8_quantize(x, q, scales, scale_ub=ub)
                yield from beside(f"token {name}{'' if ub is None else ' ub'}", (q, scales), peers["token"](x, ub), kinds)
        if "block" in peers:
            scales = torch.empty(m, K // 128, device="cuda")
            quantisers.fp8_quantize(x, q, scales, variant="block")
            yield from beside(f"block {name}", (q, scales), peers["block"](x), kinds)
        if "static" in peers:
            for value in (1.0, 0.037109375, 0.0, float("nan")):
                fixed = torch.full((1,), value, device="cuda")
                quantisers.fp8_quantize(x, q, None, variant="static", scale=fixed)
                yield from beside(f"static {name} {value}", (q,), (peers["static"](x, fixed),), kinds)
        if "tensor" in peers:
            for part, special in enumerate((None, float("nan"), float("inf"))):
                some = put(rows_of(m, K, fmt, 448.0, 6 + part, finite=True), "cuda").view(dtypes[name])
                if special is not None:
                    some[-1, -1] = special
                scales, scratch = torch.empty(1, device="cuda"), torch.empty(16, device="cuda", dtype=torch.uint8)
                quantisers.fp8_quantize(some, q, scales, variant="tensor", workspace=scratch)
                yield from beside(f"tensor {name} {special}", (q, scales), peers["tensor"](some), kinds)
    n = max(values // 4096 // 128 * 128, 128)
    words = torch.randint(-(1 << 31), 1 << 31, (n, 512), device="cuda", dtype=torch.int32)
    if "int4_encode" in peers:
        encoded = torch.empty(512, n, device="cuda", dtype=torch.int32)
        encodings.int4_encode(words, encoded)
        yield from beside("int4_encode dense", (encoded.view(torch.uint8),), (peers["int4_encode"](words),), None)
    if "uint4b8" in peers:
        theirs = peers["uint4b8"](words.clone())
        encodings.uint4b8_to_int4(words)
        yield from beside("int4_pack b8", (words.view(torch.uint8),), (theirs.view(torch.uint8),), None)
    if "scale_pack_e4m3" in peers:
        scales8 = torch.arange(256, device="cuda").to(torch.uint8).repeat(-(-values // 8 // 256))
        packed = torch.empty(scales8.numel(), 8, device="cuda", dtype=torch.uint8)
        encodings.scale_pack_e4m3(scales8, packed)
        yield from beside("scale_pack_e4m3", (packed,), (peers["scale_pack_e4m3"](scales8),), None)


def beside(name: str, ours: tuple[Any, ...], theirs: tuple[Any, ...], kinds: npt.NDArray[np.int_] | None) -> Iterator[Row]:
    """Codes and scales of both; where codes differ, how many in each kind of row (`rows_of`)."""
    for what, mine, other in zip(("codes", "scales"), ours, theirs, strict=False):
        size = 4 if mine.dtype == torch.float32 else 1
        word, unsigned = (torch.int32, np.uint32) if size == 4 else (torch.uint8, np.uint8)
        a, b = (t.contiguous().view(word).reshape(-1).cpu().numpy().view(unsigned) for t in (mine, other))
        row = compared("peers", f"{name} {what}", a, b, F32 if size == 4 else E4M3FN if kinds is not None else None)
        if row.differing and kinds is not None and size == 1:
            by_row = (a != b).reshape(kinds.size, -1).sum(axis=1)
            counts = {int(kind): int(by_row[kinds == kind].sum()) for kind in range(8)}
            row = Row(row.section, row.name, row.elements, row.differing, f"{row.first}; by kind of row {counts}")
        yield row


# Times ---------------------------------------------------------------------------------------------------------------


def captured(call: Callable[[int], Any], turns: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of at least 2 ms of calls 0, 1, .. over `turns` operands, and how many."""
    stream = CUDA.Stream()
    with CUDA.stream(stream):
        for turn in range(turns):
            call(turn)
        begin, end = (CUDA.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        for turn in range(turns):
            call(turn)
        end.record(stream)
        stream.synchronize()
        count = max(1, min(60, round(2.0 / max(begin.elapsed_time(end), 1e-3)))) * turns
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for turn in range(count):
                call(turn % turns)
    return graph, count


def timed(calls: Mapping[str, Callable[[int], Any]], turns: int, rounds: int = 7) -> dict[str, float]:
    """Microseconds per call: medians over rounds, in alternating order."""
    graphs = {name: captured(call, turns) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin, end = (CUDA.Event(enable_timing=True) for _ in range(2))
    for turn in range(rounds):
        for name in list(graphs)[:: 1 if turn % 2 else -1]:
            graph, count = graphs[name]
            graph.replay()
            begin.record()
            graph.replay()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e3 / (2 * count))
    return {name: statistics.median(values) for name, values in found.items()}


def quantiser_times(peers: Mapping[str, Peer]) -> Iterator[dict[str, Any]]:
    """Per token: ours, and theirs into the same output, over operands of 400 MB or more in turn."""
    from lowbit.kernels.hopper_room import quantisers

    for k in (12288, 36864):
        for m in (1, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            turns = max(2, min(16, -(-400_000_000 // (2 * m * k))))
            xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(turns)]
            q = torch.empty(m, k, device="cuda", dtype=torch.float8_e4m3fn)
            scales = torch.empty(m, 1, device="cuda")

            def ours(turn: int, xs: Any = xs, q: Any = q, scales: Any = scales) -> None:
                quantisers.fp8_quantize(xs[turn], q, scales)

            calls: dict[str, Callable[[int], Any]] = {"ours": ours}
            if "token_into" in peers:

                def theirs(turn: int, xs: Any = xs, q: Any = q, scales: Any = scales) -> None:
                    peers["token_into"](xs[turn], q, scales)

                calls["theirs"] = theirs
            yield {"op": "fp8_quantize token bf16", "m": m, "k": k, "us": timed(calls, turns), "bytes": 3 * m * k + 4 * m}


def prepack_times(n: int = 73728, k: int = 12288) -> Iterator[dict[str, Any]]:
    """Weights [n, k] encoded and reordered, and their group scales multiplied out: each, and one after the other."""
    from lowbit.kernels.hopper_room import encodings

    words = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), device="cuda", dtype=torch.int32)
    encoded = torch.empty(k // 8, n, device="cuda", dtype=torch.int32)
    scales = torch.randint(0, 255, (n * k // 128,), device="cuda", dtype=torch.uint8)
    packed = torch.empty(scales.numel(), 8, device="cuda", dtype=torch.uint8)

    def both(turn: int) -> None:
        encodings.int4_encode(words, encoded)
        encodings.scale_pack_e4m3(scales, packed)

    found = timed({
        "int4_encode": lambda turn: encodings.int4_encode(words, encoded),
        "scale_pack_e4m3": lambda turn: encodings.scale_pack_e4m3(scales, packed), "both": both,
    }, 1, 5)
    yield {"op": "prepack", "n": n, "k": k, "us": found, "bytes": n * k + 9 * scales.numel()}


# Program -------------------------------------------------------------------------------------------------------------


def peers_of(path: Path | None) -> dict[str, Peer]:
    if path is None:
        return {}
    spec = importlib.util.spec_from_file_location("peers", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--peers: got {path}, expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.PEERS)


def rows(backend: Any, values: int, large: bool, workers: int) -> Iterator[Row]:
    """All comparisons with the references."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        pending = pool.imap(quantiser_case, quantiser_problems(values))
        for problem, given, want in encoding_cases(values):
            yield from judged(backend, "encodings", str(problem), problem, given, want)
        for cases, (problem, _) in zip(pending, quantiser_problems(values), strict=True):
            for name, given, want in cases:
                dims = {"m": given["x"].shape[0], "k": given["x"].shape[1], "p": 0}
                options = dict(problem.options) | {"ub": "ub" if "scale_ub" in given else "no_ub"}
                sized = make_problem(ops()["fp8_quantize"], problem.variant, dims, options)
                yield from judged(backend, "quantisers", name, sized, given, want)
    if large:
        yield from large_rows()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the encodings and quantisers of cuda_hopper with the references.")
    parser.add_argument("--backend", choices=("cuda_hopper", "cpu"), default="cuda_hopper")
    parser.add_argument("--values", type=int, default=10_000_000, help="values per comparison")
    parser.add_argument("--workers", type=int, default=8, help="processes that compute the references")
    parser.add_argument("--no-large", action="store_true", help="leave out what needs 2^31 elements")
    parser.add_argument("--no-times", action="store_true", help="leave out the times")
    parser.add_argument("--peers", type=Path, help="a Python file with PEERS: name -> function")
    parser.add_argument("--json", type=Path, help="write the record of the run here")
    chosen = parser.parse_args(arguments)
    backend: Any = cpu.backend() if chosen.backend == "cpu" else cuda_hopper.backend()
    if chosen.backend == "cuda_hopper" and backend.execution != "executed":
        print(f"hopper_encodings: {backend.supports(next(quantiser_problems(1024))[0])}", file=sys.stderr)
        return 2
    on_device, start, found = chosen.backend == "cuda_hopper", time.perf_counter(), []
    for row in rows(backend, chosen.values, on_device and not chosen.no_large, chosen.workers):
        found.append(row)
        if row.differing or row.section == "large":
            print(f"{row.differing:>10,} of {row.elements:>13,} differ: {row.section} {row.name} {row.first}", flush=True)
    wrong = sum(row.differing for row in found)
    print(f"{len(found)} comparisons, {sum(row.elements for row in found):,} elements, {wrong:,} differ, "
          f"{time.perf_counter() - start:.0f} s", flush=True)
    times: list[dict[str, Any]] = []
    if on_device:
        peers = peers_of(chosen.peers)
        for row in peer_rows(peers, chosen.values):
            found.append(row)
            print(f"{row.differing:>10,} of {row.elements:>13,} differ: {row.name} {row.first}", flush=True)
        for entry in () if chosen.no_times else (*prepack_times(), *quantiser_times(peers)):
            times.append(entry)
            print({**entry, "us": {name: round(us, 2) for name, us in entry["us"].items()}}, flush=True)
    if chosen.json is not None:
        about = {"backend": dict(backend.describe()), "values": chosen.values, "torch": str(torch.__version__)}
        record = {"about": about, "rows": [asdict(row) for row in found], "times": times}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
