"""Are the torch twins equal to the NumPy definitions bit for bit on one device? A program that counts what differs.

Decides: nothing about arithmetic. `encode_torch` and `decode_torch` are compared with `rounding.encode` and `formats.decode`,
`dot_emulated_torch` with `dot.dot_emulated` and with outputs of real matrix units (golden/hardware).
Refuses: to take a result that is not on the device, another shape, and tolerances: elements are equal or they are counted.
Compared are codes; decoded values by their float64 bits, where any NaN equals any NaN, because `decode` gives no payload.

    python tests/device/check_torch_twins.py --device cuda --workers 16 --json torch_twins.json

Ends with 0, or with 1 where anything differed. README.md beside this file says what it needs and what it draws.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowbit.references import datapaths, dot, formats, rounding, torch_dot, torch_twin
from lowbit.references.datapaths import DATAPATHS, Datapath, Family
from lowbit.references.dot import Operand, dot_emulated, values
from lowbit.references.formats import (
    BF16,
    E4M3FN,
    E5M2,
    E8M0,
    F16,
    F32,
    F64,
    FORMATS,
    INT32,
    Codes,
    Format,
    Kind,
    Reals,
    container,
    decode,
)
from lowbit.references.rounding import Overflow, Rounding, encode

__all__ = ["CODEC_SOURCES", "FULL", "PATHS", "SMALL", "Size", "Tally", "check", "main"]

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "golden" / "hardware" / "vectors.npz"
COMPARED = (formats, rounding, dot, datapaths, torch_twin, torch_dot)
SIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8), 2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64),
}
"""NumPy dtype that shares its bytes with the container of the torch twins, by its size."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is drawn."""

    patterns: int  # random float32 bit patterns per format and policy; as many codes of formats wider than 16 bits
    stride: int  # every so many-th 16-bit pattern and 16-bit code
    doubles: int  # random float64 bit patterns per format and policy
    block: int  # elements per comparison
    rows: int  # M = N of a product
    instructions: int  # instructions in a chain
    long: int  # instructions in the one long chain of a datapath
    hardware: int  # rows of real units per call: a call computes the square and uses its diagonal
    chunked: bool  # with one product per datapath that the twin has to cut into chunks of rows


FULL = Size(10_000_000, 1, 1_000_000, 1_000_000, 96, 3, 16, 100, True)
SMALL = Size(5_000, 61, 2_000, 5_000, 5, 2, 3, 20, False)


@dataclass(slots=True)
class Tally:
    """What was compared under one heading."""

    section: str
    subject: str  # format, datapath, or array/datapath of the hardware rows
    source: str  # what was drawn
    elements: int = 0
    mismatches: int = 0
    nodes: int = 0  # dot products only: nodes of the datapath, one instruction each for EMULATED_PAIRS
    seconds: float = 0.0  # in the twin, transfers included
    first: str = ""  # the first mismatch
    results: dict[str, int] = field(default_factory=dict)  # dot products only: classes of the expected results


Key = tuple[str, str, str]
Tallies = dict[Key, Tally]
Mapper = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a twin returned, or the sentence with which it refused."""

    result: npt.NDArray[Any] | str
    seconds: float


def answer(call: Callable[[], torch.Tensor], device: torch.device) -> Answer:
    """Call a twin and bring its result to the host. Raises ValueError where the result was not on the device."""
    begin = time.perf_counter()
    try:
        tensor = call()
    except ValueError as refusal:
        return Answer(f"refused: {refusal}", time.perf_counter() - begin)
    if tensor.device.type != device.type:
        raise ValueError(f"twin: got a result on {tensor.device}, expected it on {device}; a twin must stay where its input is")
    return Answer(tensor.cpu().numpy(), time.perf_counter() - begin)


def note(tallies: Tallies, key: Key, given: Answer, want: npt.NDArray[Any], where: str) -> Tally:
    """Compare what a twin returned with what it should have, and count; a refusal or another shape is a mismatch everywhere."""
    tally = tallies.setdefault(key, Tally(*key))
    got = given.result
    if isinstance(got, str):
        wrong, shown = want.size, got
    elif got.shape != want.shape:
        wrong, shown = want.size, f"got shape {got.shape}, expected {want.shape}"
    else:
        at = np.flatnonzero(got != want)
        wrong = at.size
        shown = f"flat index {at[0]}: got {int(got.flat[at[0]]):#x}, expected {int(want.flat[at[0]]):#x}" if wrong else ""
    tally.elements += want.size
    tally.mismatches += wrong
    tally.seconds += given.seconds
    tally.first = tally.first or (f"{where}, {shown}" if wrong else "")
    return tally


# Codecs ------------------------------------------------------------------------------------------------------------------

CODEC_SOURCES = (
    "values and ties", "values and ties, float32", "bfloat16 patterns", "float16 patterns", "float32 bits", "float64 bits",
)
POLICIES = [(mode, overflow) for mode in Rounding for overflow in Overflow]


@dataclass(frozen=True, slots=True)
class CodecTask:
    """One call of `encode`. Formats go by name: references compare them by identity, which a worker process does not keep."""

    source: str
    block: int
    fmt: str
    mode: Rounding
    overflow: Overflow
    size: Size


def some_codes(fmt: Format, rng: np.random.Generator, count: int, stride: int) -> Codes:
    """All codes up to 8 bits, every `stride`-th of 16 bits, else `count` random ones and the ends."""
    if fmt.bits <= 16:
        return np.arange(0, 1 << fmt.bits, stride if fmt.bits == 16 else 1).astype(container(fmt))
    ends = [0, 1, fmt.max_code, (fmt.max_code + 1) % (1 << fmt.bits), fmt.min_code, fmt.sign_bit, (1 << fmt.bits) - 1]
    drawn = rng.integers(0, 1 << fmt.bits, count - len(ends), dtype=np.uint64)
    return np.concatenate([drawn, np.array(ends, dtype=np.uint64)]).astype(container(fmt))


@lru_cache(maxsize=2)
def drawn(source: str, block: int, name: str, size: Size) -> npt.NDArray[Any]:
    """Inputs of `encode`, [count]; bfloat16 patterns as the float32 values that they are the upper halves of."""
    rng = np.random.default_rng([20, block, len(source)])
    fmt = FORMATS[name]
    patterns = np.arange(0, 1 << 16, size.stride).astype(np.uint16)
    if source == "bfloat16 patterns":
        return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if source == "float16 patterns":
        return patterns.view(np.float16)
    if source == "float32 bits":
        return rng.integers(0, 1 << 32, min(size.block, size.patterns), dtype=np.uint32).view(np.float32)
    if source == "float64 bits":  # half of them anywhere, half around the range of the format
        count = min(size.block, size.doubles)
        bits = rng.integers(0, 1 << 64, count, dtype=np.uint64)
        low = -3 if fmt.kind in (Kind.INT, Kind.UINT) else fmt.min_exponent - fmt.mantissa_bits - 3
        high = int(fmt.max_finite).bit_length() + 1
        near = rng.integers(max(low + 1023, 0), min(high + 1023, 2047) + 1, count // 2).astype(np.uint64)
        bits[: count // 2] = (bits[: count // 2] & np.uint64(0x800FFFFFFFFFFFFF)) | (near << np.uint64(52))
        return bits.view(np.float64)
    with np.errstate(all="ignore"):
        codes = some_codes(fmt, rng, (1 << 16) // size.stride, size.stride)
        here = decode(codes, fmt)
        there = decode((codes + 1) & codes.dtype.type((1 << fmt.bits) - 1), fmt)
        middle = (here + there) / 2
        x = np.concatenate([here, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
        if source.endswith("float32"):
            single = middle.astype(np.float32)
            x = np.concatenate([here.astype(np.float32), single, np.nextafter(single, np.float32("inf")),
                                np.nextafter(single, -np.float32("inf"))])
    return x


def codec_input(task: CodecTask) -> npt.NDArray[Any]:
    """What is encoded: for integers under Overflow.SPECIAL only what lies within the range, the rest is refused."""
    depends = task.source.startswith("values") or task.source == "float64 bits"
    x = drawn(task.source, task.block, task.fmt if depends else "f32", task.size)
    fmt = FORMATS[task.fmt]
    if task.overflow is Overflow.SPECIAL and fmt.kind in (Kind.INT, Kind.UINT):
        with np.errstate(invalid="ignore"):
            wide = x.astype(np.float64)
        inside = (wide >= (-fmt.sign_bit if fmt.kind is Kind.INT else 0)) & (wide <= fmt.max_code)
        return np.asarray(x[inside])
    return x


def codec_reference(task: CodecTask) -> Codes:
    return encode(codec_input(task), FORMATS[task.fmt], task.mode, task.overflow)


def codec_tasks(size: Size) -> list[CodecTask]:
    blocks = {"float32 bits": -(-size.patterns // size.block), "float64 bits": -(-size.doubles // size.block)}
    return [
        CodecTask(source, block, fmt, mode, overflow, size)
        for source in CODEC_SOURCES
        for block in range(blocks.get(source, 1))
        for fmt in FORMATS
        for mode, overflow in POLICIES
    ]


def on_device(x: npt.NDArray[Any], source: str, device: torch.device) -> torch.Tensor:
    """The same values on the device; 16-bit patterns in their own dtype and not contiguous."""
    if source == "bfloat16 patterns":
        upper = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.int16)
        return torch.from_numpy(upper).view(torch.bfloat16).to(device).repeat_interleave(2)[::2]
    tensor = torch.from_numpy(x.copy()).to(device)
    return tensor.repeat_interleave(2)[::2] if source == "float16 patterns" else tensor


def check_encode(tallies: Tallies, size: Size, device: torch.device, mapper: Mapper) -> None:
    tasks = codec_tasks(size)
    for task, want in zip(tasks, mapper(codec_reference, tasks), strict=True):
        fmt = FORMATS[task.fmt]
        x = on_device(codec_input(task), task.source, device)
        given = answer(partial(torch_twin.encode_torch, x, fmt, task.mode, task.overflow), device)
        if not isinstance(given.result, str) and given.result.dtype == SIGNED[fmt.size]:
            given = replace(given, result=given.result.view(container(fmt)))
        note(tallies, ("encode", fmt.name, task.source), given, want, f"{task.mode.name} {task.overflow.name} block {task.block}")


def value_bits(x: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Bits of the values in float64, every NaN the same."""
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    bits: npt.NDArray[np.uint64] = np.where(np.isnan(wide), np.float64("nan"), wide).view(np.uint64)
    return bits


def check_decode(tallies: Tallies, size: Size, device: torch.device) -> None:
    for fmt in FORMATS.values():
        for index in range(1 if fmt.bits <= 16 else -(-size.patterns // size.block)):
            codes = some_codes(fmt, np.random.default_rng([21, index]), min(size.block, size.patterns), size.stride)
            want = value_bits(decode(codes, fmt))
            for dtype in (torch.float32, torch.float64):
                if dtype == torch.float32 and fmt in (INT32, F64):
                    continue
                tensor = torch.from_numpy(codes.view(SIGNED[fmt.size]).copy()).to(device)
                given = answer(partial(torch_twin.decode_torch, tensor, fmt, dtype), device)
                if not isinstance(given.result, str):
                    given = replace(given, result=value_bits(given.result))
                note(tallies, ("decode", fmt.name, str(dtype)), given, want, f"block {index}")


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


def check_refusals(tallies: Tallies, device: torch.device) -> None:
    """ValueError where the definitions raise it: each integer format on NaN, infinities, the first integers outside and half-way
    to them; each format narrower than its container on the first code outside."""
    for fmt in FORMATS.values():
        if fmt.kind in (Kind.INT, Kind.UINT):
            low, high = (-fmt.sign_bit if fmt.kind is Kind.INT else 0), fmt.max_code
            points = np.array([np.nan, np.inf, -np.inf, low - 1.0, high + 1.0, low - 0.5, high + 0.5, low, high])
            for mode in Rounding:
                policy = (fmt, mode, Overflow.SPECIAL)
                want = np.array([refused(partial(encode, x, *policy)) for x in points[:, None]])
                sent = [torch.from_numpy(x).to(device) for x in points[:, None]]
                got = np.array([refused(partial(torch_twin.encode_torch, x, *policy)) for x in sent])
                note(tallies, ("refusals", fmt.name, "out of range"), Answer(got, 0.0), want, mode.name)
        if fmt.bits < 8:
            outside = np.array([0, 1 << fmt.bits], dtype=np.uint8)
            want = np.array([refused(partial(decode, outside, fmt))])
            got = np.array([refused(partial(torch_twin.decode_torch, torch.from_numpy(outside).to(device), fmt))])
            note(tallies, ("refusals", fmt.name, "no such code"), Answer(got, 0.0), want, "decode")


# Dot products ------------------------------------------------------------------------------------------------------------

ALTERED = {  # branches of the twin that no shipped record of its families takes
    "hopper_wgmma_fp8, alignment FLOOR": replace(DATAPATHS["hopper_wgmma_fp8"], alignment_rounding=Rounding.FLOOR),
    "blackwell_nvfp4, alignment FLOOR": replace(DATAPATHS["blackwell_nvfp4"], alignment_rounding=Rounding.FLOOR),
    "hopper_f16, alignment RNE": replace(DATAPATHS["hopper_f16"], alignment_rounding=Rounding.RNE),
    "hopper_f16, output RNE": replace(DATAPATHS["hopper_f16"], output_rounding=Rounding.RNE),
    "ada_fp8, output FLOOR": replace(DATAPATHS["ada_fp8"], output_rounding=Rounding.FLOOR),
    "hopper_bf16, normalised": replace(DATAPATHS["hopper_bf16"], normalised=1),
    "blackwell_mxf8f6f4, normalised": replace(DATAPATHS["blackwell_mxf8f6f4"], normalised=1),
}
PATHS: dict[str, Datapath] = ALTERED | {name: path for name, path in DATAPATHS.items() if path.family in torch_dot.FAMILIES}
OPERANDS = ("normal", "lognormal", "grid", "cancelling", "subnormal", "largest", "bits", "specials")
STARTS = ("zero", "comparable", "large", "small", "opposite", "bits")


@dataclass(frozen=True, slots=True)
class DotTask:
    """One product; the datapath goes by name, as formats do."""

    path: str
    kind: str  # of OPERANDS
    begin: str  # of STARTS
    m: int
    n: int
    k: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """An operand without its records."""

    codes: Codes
    fmt: str
    scales: Codes | None


@dataclass(frozen=True, slots=True, eq=False)
class DotReference:
    a: Plain
    w: Plain
    start: Reals | None
    want: npt.NDArray[np.int64]
    results: dict[str, int]


def elements(rng: np.random.Generator, shape: tuple[int, int], fmt: Format, kind: str, side: int) -> Codes:
    """Codes of one operand; `side` is 1 for A and -1 for W, so that products of "cancelling" operands cancel."""
    mask = (1 << fmt.bits) - 1
    sign = rng.integers(0, 2, shape) * fmt.sign_bit
    if kind == "bits":
        return (rng.integers(0, 1 << fmt.bits, shape)).astype(container(fmt))
    if kind in ("subnormal", "largest"):  # the lowest or highest three exponents
        near = rng.integers(0, 3 << fmt.mantissa_bits, shape)
        magnitude = np.minimum(near, fmt.max_code) if kind == "subnormal" else np.maximum(fmt.max_code - near, 0)
        return (magnitude | sign).astype(container(fmt))
    x: Reals = rng.standard_normal(shape)
    if kind == "grid":  # small integers: ties
        x = np.rint(2 * x) * np.exp2(rng.integers(0, 5, shape))
    elif kind != "normal":
        x = x * np.exp2(np.rint(3 * rng.standard_normal(shape)))
    if kind == "cancelling":
        apart = int(rng.choice([1, max(shape[1] // 2, 1)]))
        for k in range(0, shape[1] - apart, 2 * apart):
            x[:, k + apart : k + 2 * apart] = side * x[:, k : k + apart][:, : shape[1] - k - apart]
        x = x * np.where(rng.random(shape) < 0.05, 1.0 + 2.0**-fmt.mantissa_bits, 1.0)
    codes = encode(x * 20 if fmt.kind in (Kind.INT, Kind.UINT) else x, fmt)
    if kind == "specials":  # about one in three rows has one; for formats without specials the ends take their place
        beyond = fmt.max_code + 1
        named = [max(fmt.nan_code, 0), beyond, beyond + fmt.sign_bit, 0, fmt.sign_bit, fmt.max_code, fmt.min_code]
        chosen = np.array([code & mask for code in named])[rng.integers(0, len(named), shape)]
        codes = np.where(rng.random(shape) < 0.33 / shape[1], chosen, codes).astype(container(fmt))
    return np.asarray(codes)


def block_scales(rng: np.random.Generator, shape: tuple[int, int], fmt: Format, kind: str) -> Codes:
    top = fmt.nan_code
    low, high = {
        "bits": (0, top + 1), "subnormal": (0, 10), "largest": (top - 10, top),
    }.get(kind, (0x20, 0x50) if fmt is not E8M0 else (120, 135))
    drawn_scales = rng.integers(low, high, shape)
    if kind == "specials":
        drawn_scales = np.where(rng.random(shape) < 0.02, top, drawn_scales)
    return drawn_scales.astype(container(fmt))


def operand(rng: np.random.Generator, rows: int, k: int, path: Datapath, kind: str, side: int) -> Operand:
    fmt = path.operands[int(rng.integers(len(path.operands)))]
    codes = elements(rng, (rows, k), fmt, kind, side)
    if path.scale_format is None:
        return Operand(codes, fmt)
    scales = block_scales(rng, (rows, k // path.scale_group), path.scale_format, kind)
    return Operand(codes, fmt, scales, path.scale_format, path.scale_group)


def starting(rng: np.random.Generator, a: Operand, w: Operand, path: Datapath, begin: str) -> Reals | None:
    """The accumulator before the chain: values of the output format of the stated size beside the sum of products."""
    if begin == "zero":
        return None
    out, shape = path.output, (a.codes.shape[0], w.codes.shape[0])
    with np.errstate(all="ignore"):
        if begin == "bits":
            codes = rng.integers(0, 1 << out.bits, shape, dtype=np.uint64)
            edges = [0, out.sign_bit, 1, out.sign_bit + 1, out.max_code, out.max_code + 1, out.min_code, max(out.nan_code, 0)]
            chosen = np.array(edges, dtype=np.uint64)[rng.integers(0, len(edges), shape)]
            return decode(np.where(rng.random(shape) < 0.1, chosen, codes).astype(container(out)), out)
        left, right = (np.nan_to_num(values(op), nan=0.0, posinf=0.0, neginf=0.0) for op in (a, w))
        if begin == "opposite":
            x = -(left @ right.T)
        else:
            low, high = {"comparable": (-2, 3), "large": (8, 31), "small": (-30, -7)}[begin]
            x = rng.standard_normal(shape) * (np.abs(left) @ np.abs(right).T) * np.exp2(rng.integers(low, high, shape))
        return decode(encode(x, out), out)


def dot_reference(task: DotTask) -> DotReference:
    path = PATHS[task.path]
    rng = np.random.default_rng([22, task.seed, *task.path.encode()])
    a, w = operand(rng, task.m, task.k, path, task.kind, 1), operand(rng, task.n, task.k, path, task.kind, -1)
    start = starting(rng, a, w, path, task.begin)
    codes = dot_emulated(a, w, path, start)
    with np.errstate(invalid="ignore"):
        result = decode(codes, path.output)
    results = {
        "zero": int((result == 0).sum()), "finite": int((np.isfinite(result) & (result != 0)).sum()),
        "infinite": int(np.isinf(result).sum()), "nan": int(np.isnan(result).sum()),
    }
    plain = [Plain(op.codes, op.format.name, op.scales) for op in (a, w)]
    return DotReference(plain[0], plain[1], start, codes.astype(np.int64), results)


def rebuilt(plain: Plain, path: Datapath) -> Operand:
    """The operand with the records of this process."""
    return Operand(plain.codes, FORMATS[plain.fmt], plain.scales, path.scale_format, path.scale_group)


def nodes_of(path: Datapath, m: int, n: int, k: int) -> int:
    per_instruction = 1 if path.family is Family.EMULATED_PAIRS else path.instruction_k // path.products
    return m * n * -(-k // path.instruction_k) * per_instruction


def dot_tasks(size: Size) -> Iterator[DotTask]:
    """Per datapath every kind of operand with every kind of start, odd ones with a K that needs padding; one long chain; one
    product larger than the twin computes at once."""
    for name, path in PATHS.items():
        step = path.instruction_k
        shorter = path.scale_group or (3 if step > 4 else 1)
        for seed, (kind, begin) in enumerate((kind, begin) for kind in OPERANDS for begin in STARTS):
            k = size.instructions * step - (shorter if seed % 2 else 0)
            yield DotTask(name, kind, begin, size.rows, size.rows, k, seed)
        yield DotTask(name, "lognormal", "comparable", size.rows // 2, size.rows, size.long * step, 100)
        if size.chunked:
            n = 2048
            yield DotTask(name, "normal", "comparable", (1 << 22) // (n * path.products) + 3, n, step, 101)


def check_dot(tallies: Tallies, size: Size, device: torch.device, mapper: Mapper) -> None:
    tasks = list(dot_tasks(size))
    for task, reference in zip(tasks, mapper(dot_reference, tasks), strict=True):
        path = PATHS[task.path]
        sides = [rebuilt(plain, path) for plain in (reference.a, reference.w)]
        given = answer(partial(torch_dot.dot_emulated_torch, sides[0], sides[1], path, reference.start, device), device)
        where = f"{task.kind} operands {reference.a.fmt} x {reference.w.fmt}, start {task.begin}, K = {task.k}, seed {task.seed}"
        key = ("dot, altered record" if task.path in ALTERED else "dot", task.path, f"{task.kind} operands")
        tally = note(tallies, key, given, reference.want, where)
        tally.nodes += nodes_of(path, task.m, task.n, task.k)
        tally.results = {name: tally.results.get(name, 0) + count for name, count in reference.results.items()}


def diagonal(a: Operand, w: Operand, path: Datapath, start: Reals, device: torch.device) -> torch.Tensor:
    """Row i of A with row i of W, [rows]."""
    return torch_dot.dot_emulated_torch(a, w, path, start, device).diagonal()


def check_hardware(tallies: Tallies, size: Size, device: torch.device) -> None:
    """The published outputs of real units, row by row."""
    vectors = np.load(VECTORS)
    by_name = {"fp16": F16, "bf16": BF16, "tf32": F32, "e4m3": E4M3FN, "e5m2": E5M2}
    for array, record in (name.split("/")[:2] for name in vectors.files if name.endswith("/d")):
        fmt, path = by_name[array.split("_")[1]], DATAPATHS[record]
        a, b, c, d = (vectors[f"{array}/{name}"] for name in ("a", "b", f"{record}/c", f"{record}/d"))
        for top in range(0, len(d), size.hardware):
            part = slice(top, top + size.hardware)
            start = np.repeat(decode(c[part], path.output)[:, None], len(d[part]), axis=1)
            given = answer(partial(diagonal, Operand(a[part], fmt), Operand(b[part], fmt), path, start, device), device)
            key = ("hardware", f"{array}/{record}", "published rows")
            tally = note(tallies, key, given, d[part].astype(np.int64), f"rows from {top}")
            tally.nodes += nodes_of(path, len(d[part]), 1, a.shape[1])


# The program -------------------------------------------------------------------------------------------------------------


def check(device: torch.device, size: Size, mapper: Mapper = map) -> list[Tally]:
    """Everything, on one device. `mapper` computes the NumPy side: `map`, or the lazy map of a pool of processes."""
    tallies: Tallies = {}
    check_encode(tallies, size, device, mapper)
    check_decode(tallies, size, device)
    check_refusals(tallies, device)
    check_dot(tallies, size, device, mapper)
    check_hardware(tallies, size, device)
    return list(tallies.values())


def table(tallies: list[Tally]) -> str:
    """One line per section and subject."""
    lines = [f"{'section':20} {'subject':52} {'elements':>13} {'nodes':>11} {'mismatches':>10} {'seconds':>8}"]
    groups: dict[tuple[str, str], list[Tally]] = {}
    for tally in tallies:
        groups.setdefault((tally.section, tally.subject), []).append(tally)
    for (section, subject), group in groups.items():
        counts = [sum(getattr(tally, name) for tally in group) for name in ("elements", "nodes", "mismatches", "seconds")]
        lines.append(f"{section:20} {subject:52} {counts[0]:13,} {counts[1]:11,} {counts[2]:10,} {counts[3]:8.2f}")
    lines.extend(f"{tally.section}, {tally.subject}, {tally.source}: {tally.first}" for tally in tallies if tally.mismatches)
    return "\n".join(lines)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(tallies: list[Tally], device: torch.device, seconds: float) -> dict[str, Any]:
    """The JSON record of a run: what was compared, where, and digests of the sources and vectors that it is about."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "device_type": device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "numpy": np.__version__, "python": platform.python_version(),
        "seconds": round(seconds, 1),
        "mismatches": sum(tally.mismatches for tally in tallies),
        "elements": sum(tally.elements for tally in tallies),
        "sources_sha256": {
            **{module.__name__: digest(Path(str(module.__file__))) for module in COMPARED},
            "golden/hardware/vectors.npz": digest(VECTORS),
            "tests/device/check_torch_twins.py": digest(Path(__file__)),
        },
        "rows": [asdict(tally) | {"seconds": round(tally.seconds, 3)} for tally in tallies],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the torch twins with the NumPy definitions on one device.")
    parser.add_argument("--device", default="cuda", help="a torch device (default: cuda)")
    parser.add_argument("--workers", type=int, default=0, help="processes that compute the NumPy side (default: none)")
    parser.add_argument("--small", action="store_true", help="the sizes that the suite's own tests use")
    parser.add_argument("--json", type=Path, help="write the record of the run here")
    chosen = parser.parse_args(arguments)
    device, size = torch.device(chosen.device), SMALL if chosen.small else FULL
    begin = time.perf_counter()
    if chosen.workers:  # they begin before the device is touched: its context does not survive a fork
        with multiprocessing.get_context("fork").Pool(chosen.workers) as pool:
            tallies = check(device, size, partial(pool.imap, chunksize=4))
    else:
        tallies = check(device, size)
    found = record(tallies, device, time.perf_counter() - begin)
    print(table(tallies))
    print(f"{found['device']}, torch {found['torch']}: {found['elements']:,} elements, {found['mismatches']:,} mismatches, "
          f"{found['seconds']} s")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(found["mismatches"] > 0)


if __name__ == "__main__":
    sys.exit(main())
