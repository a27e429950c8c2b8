"""Does the chip compute what the datapath records say? Probes of single instructions and of whole products, in one program.

Decides: nothing about arithmetic. Instructions are compared with the fused emulator on every output and with the NumPy definition
on whole tiles; experiments with answers worked out by hand; product functions with every candidate model.
Refuses: tolerances, and to go on where elements do not sit where the layouts say (that would accuse the arithmetic of a
misplacement).

    python tests/device/run_probes.py --out "$OUT"                 # on Hopper: minutes, ends with 0 where nothing differed
    python tests/device/run_probes.py --dry-run --out FOLDER       # anywhere: the emulator in the instrument's place
    python tests/device/run_probes.py --compile                    # needs nvcc and nvdisasm: every kernel, disassembled

README.md beside this file says what is asked and what is written.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from probe_experiments import EXPERIMENTS, Experiment, bits_of
from probe_fingerprints import FINGERPRINTS, Fingerprint, Product, Shape, fingerprint, told

from lowbit.kernels import hopper_probes
from lowbit.kernels.hopper_probes import INSTRUCTIONS, TYPES, Instruction, Probe, wgmma_of
from lowbit.references import cuda_dot
from lowbit.references.datapaths import DATAPATHS, Datapath, Family
from lowbit.references.dot import Operand, dot_emulated, emulate
from lowbit.references.formats import FORMATS, INT32, Codes, Format, Kind, container, decode
from lowbit.references.rounding import Overflow, Rounding, encode, round_to
from lowbit.references.torch_dot import dot_emulated_torch
from lowbit.references.torch_twin import decode_torch, encode_torch

__all__ = ["FULL", "SMALL", "Bench", "Size", "compile_all", "device_bench", "dry_bench", "main", "run"]

Instrument = Callable[[Instruction, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Tiles A [T, m, K], W [T, n, K], C [T, m, n] as codes on the bench's device -> D [T, m, n]."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked."""

    outputs: int  # per instruction and distribution
    kept: int  # outputs per instruction and distribution that are written to the fixtures
    experiment_rows: int  # of one experiment, evenly chosen
    permutations: int  # of k, for the invariances
    shapes: tuple[Shape, ...]  # of whole products
    gemm: int  # M = N = K of the timed judgement
    instructions: tuple[str, ...] = tuple(INSTRUCTIONS)
    fingerprints: tuple[str, ...] = tuple(FINGERPRINTS)


FULL = Size(10_000_000, 5_000, 1 << 20, 20, (Shape(1024, 1024), Shape(256, 8192)), 4096)
SMALL = Size(100, 100, 24, 2, (Shape(128, 256),), 128)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Everything that a run asks. On a device `instrument` is the chip; in a dry run it is an emulator."""

    device: torch.device
    instrument: Instrument
    emulator: Instrument
    products: dict[str, Product]
    gemm: Callable[[Operand, Operand, Datapath, int], torch.Tensor]  # (A, W, record, segment) -> codes, int64
    instructions: dict[str, dict[str, Any]]  # what was assembled, by instruction
    sass: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)


def format_of(kind: str) -> Format:
    return FORMATS[TYPES[kind].format]


def path_of(instruction: Instruction) -> Datapath:
    return DATAPATHS[instruction.datapath]


def host(codes: torch.Tensor, fmt: Format) -> Codes:
    """The same bits in the NumPy container of the format."""
    return np.asarray(codes.cpu().numpy()).view(container(fmt))


def tensor(codes: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    signed = np.dtype(np.uint8 if codes.itemsize == 1 else f"i{codes.itemsize}")
    return torch.from_numpy(np.ascontiguousarray(codes).view(signed)).to(device)


def by_tiles(compute: Callable[[Operand, Operand, Datapath, Any], Codes], instruction: Instruction, a: torch.Tensor,
             w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Tile after tile by a host emulator."""
    path = path_of(instruction)
    out = np.empty(tuple(c.shape), dtype=container(path.output))
    for t in range(a.shape[0]):
        sides = [Operand(host(x[t], format_of(kind)), format_of(kind)) for x, kind in ((a, instruction.a), (w, instruction.b))]
        with np.errstate(invalid="ignore"):
            start = decode(host(c[t], path.output), path.output)
        out[t] = compute(sides[0], sides[1], path, start)
    return tensor(out, c.device)


# Random tiles --------------------------------------------------------------------------------------------------------

FLOAT_DRAWS = (  # (operands, accumulator), instructions per chain
    ("bits", "bits", 1), ("normal", "comparable", 4), ("normal", "zero", 1), ("positive", "comparable", 1),
    ("lognormal", "large or small", 1), ("cancelling", "opposite", 1), ("subnormal", "small", 1),
)
INTEGER_DRAWS = (("bits", "bits", 1), ("bits", "edges", 1), ("ends", "edges", 2), ("ends", "zero", 1))


def draws_of(instruction: Instruction) -> tuple[tuple[str, str, int], ...]:
    return INTEGER_DRAWS if instruction.d == "s32" else FLOAT_DRAWS


def random_codes(generator: torch.Generator, shape: tuple[int, ...], fmt: Format) -> torch.Tensor:
    """Every bit pattern alike."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[fmt.size]
    low, high = (0, 256) if fmt.size == 1 else (-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1))
    return torch.randint(low, high, shape, generator=generator, device=generator.device, dtype=kind)


def normal(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


def powers(generator: torch.Generator, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
    """2^e, e drawn from low..high - 1."""
    exponent = torch.randint(low, high, shape, generator=generator, device=generator.device)
    return ((exponent + 1023) << 52).view(torch.float64)


def draw_operand(generator: torch.Generator, shape: tuple[int, ...], fmt: Format, kind: str, side: int) -> torch.Tensor:
    """Codes of one side; `side` is 1 for A and -1 for W, so that products of "cancelling" operands cancel in pairs."""
    if kind == "bits":
        return random_codes(generator, shape, fmt)
    if kind == "ends":  # of an integer format
        signed = fmt.kind is Kind.INT
        ends = torch.tensor([-128, -127, 127, 126, 0] if signed else [255, 254, 128, 1, 0], device=generator.device)
        chosen = torch.randint(0, 5, shape, generator=generator, device=generator.device)
        return (ends[chosen] & 0xFF).to(torch.uint8)
    if kind == "subnormal":  # the lowest three exponents
        low = torch.randint(0, 3 << fmt.mantissa_bits, shape, generator=generator, device=generator.device)
        sign = torch.randint(0, 2, shape, generator=generator, device=generator.device) * fmt.sign_bit
        code = low | sign
        wrapped = torch.where(code >= 1 << (fmt.bits - 1), code - (1 << fmt.bits), code) if fmt.size > 1 else code
        return wrapped.to({1: torch.uint8, 2: torch.int16, 4: torch.int32}[fmt.size])
    x = normal(generator, shape)
    if kind == "positive":
        x = x.abs()
    if kind in ("lognormal", "cancelling"):
        x = x * powers(generator, shape, -6, 7)
    if kind == "cancelling":
        x[..., 1::2] = side * x[..., ::2]
        nudged = torch.rand(shape, generator=generator, device=generator.device) < 0.05
        x = torch.where(nudged, x * (1.0 + 2.0**-fmt.mantissa_bits), x)
    return encode_torch(x, fmt)


def draw_start(generator: torch.Generator, a: torch.Tensor, w: torch.Tensor, instruction: Instruction, kind: str) -> torch.Tensor:
    """Codes of the accumulator before the instruction, [T, m, n]."""
    out = path_of(instruction).output
    shape = (a.shape[0], a.shape[1], w.shape[1])
    if kind == "bits":
        return random_codes(generator, shape, out)
    if kind == "edges":  # within reach of the ends of int32
        reach = torch.randint(0, 1 << 21, shape, generator=generator, device=generator.device)
        upper = torch.randint(0, 2, shape, generator=generator, device=generator.device) == 1
        return torch.where(upper, INT32.max_code - reach, -(1 << 31) + reach).to(torch.int32)
    if kind == "zero":
        return torch.zeros(shape, dtype={2: torch.int16, 4: torch.int32}[out.size], device=a.device)
    left = decode_torch(a, format_of(instruction.a), torch.float64)
    right = decode_torch(w, format_of(instruction.b), torch.float64)
    if kind == "opposite":
        return encode_torch(-(left @ right.transpose(1, 2)), out)
    size = left.abs() @ right.abs().transpose(1, 2)
    if kind == "large or small":
        upper = torch.rand(shape, generator=generator, device=generator.device) < 0.5
        scale = torch.where(upper, powers(generator, shape, 8, 31), powers(generator, shape, -30, -7))
    else:
        low, high = {"comparable": (-2, 3), "small": (-30, -7)}[kind]
        scale = powers(generator, shape, low, high)
    return encode_torch(normal(generator, shape) * size * scale, out)


Tiles = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw_tiles(
    instruction: Instruction, draw: tuple[str, str, int], tiles: int, device: torch.device, m: int = 0, n: int = 0
) -> Tiles:
    """Random A [tiles, m, K], W [tiles, n, K] and C, seeded by instruction, distribution and shape. m, n: the instruction's."""
    operands, start, steps = draw
    m, n, k = m or instruction.m, n or instruction.n, steps * instruction.k
    digest = hashlib.sha256(f"{instruction.name} {draw} {m} {n}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:6], "little"))
    a = draw_operand(generator, (tiles, m, k), format_of(instruction.a), operands, 1)
    w = draw_operand(generator, (tiles, n, k), format_of(instruction.b), operands, -1)
    return a, w, draw_start(generator, a, w, instruction, start)


def draw_product(bench: Bench, instruction: Instruction, draw: tuple[str, str, int], outputs: int) -> tuple[torch.Tensor, ...]:
    """A [1, m, K], W [1, n, K], C and what the instrument makes of them, D [1, m, n]: at least `outputs` results whose tiles
    share operands, so that little has to be stored."""
    m = instruction.m * max(1, 64 // instruction.m)
    n = -(-outputs // (8 * m)) * 8
    down, across = m // instruction.m, -(-n // instruction.n)
    a, w, c = draw_tiles(instruction, draw, 1, bench.device, m, across * instruction.n)
    k = a.shape[2]
    rows = a.reshape(down, 1, instruction.m, k).expand(-1, across, -1, -1).reshape(-1, instruction.m, k)
    columns = w.reshape(1, across, instruction.n, k).expand(down, -1, -1, -1).reshape(-1, instruction.n, k)
    start = c.reshape(down, instruction.m, across, instruction.n).transpose(1, 2).reshape(-1, instruction.m, instruction.n)
    found = bench.instrument(instruction, *(x.contiguous() for x in (rows, columns, start)))
    d = found.reshape(down, across, instruction.m, instruction.n).transpose(1, 2).reshape(c.shape)
    return a, w[:, :n].contiguous(), c[..., :n].contiguous(), d[..., :n].contiguous()


def first_difference(got: torch.Tensor, want: torch.Tensor) -> str:
    """Where two results differ first, in words; empty where they do not."""
    at = (got != want).nonzero()
    if len(at) == 0:
        return ""
    place = tuple(int(i) for i in at[0])
    bits = 8 * got.element_size()
    shown = [f"{int(x[place]) & ((1 << bits) - 1):#x}" for x in (got, want)]
    return f"tile {place[0]}, row {place[1]}, column {place[2]}: got {shown[0]}, expected {shown[1]}"


def validate(bench: Bench, size: Size) -> tuple[list[dict[str, Any]], dict[str, npt.NDArray[Any]]]:
    """Random tiles of every instruction against the emulator, all outputs; then the products that are kept against the emulator
    and, the first rows, against the definition."""
    rows, fixtures = [], {}
    for name in size.instructions:
        instruction = INSTRUCTIONS[name]
        for draw in draws_of(instruction):
            tiles = draw_tiles(instruction, draw, -(-size.outputs // (instruction.m * instruction.n)), bench.device)
            begin = time.perf_counter()
            got = bench.instrument(instruction, *tiles)
            want = bench.emulator(instruction, *tiles)
            wrong, first = int((got != want).sum()), first_difference(got, want)
            seconds = time.perf_counter() - begin
            a, w, c, d = draw_product(bench, instruction, draw, size.kept)
            again = bench.emulator(instruction, a, w, c)
            few = min(d.shape[1], -(-1024 // d.shape[2]))
            head = [x.cpu() for x in (a[:, :few], w, c[:, :few], d[:, :few])]
            defined = by_tiles(dot_emulated, instruction, head[0], head[1], head[2])
            rows.append({
                "instruction": name, "datapath": instruction.datapath, "operands": draw[0], "start": draw[1], "steps": draw[2],
                "outputs": got.numel() + d.numel(), "mismatches": wrong + int((again != d).sum()),
                "first": first or first_difference(d, again),
                "outputs_by_definition": defined.numel(), "mismatches_by_definition": int((defined != head[3]).sum()),
                "seconds": round(seconds, 4),
            })
            kinds = instruction.a, instruction.b, instruction.d, instruction.d
            for letter, codes, kind in zip("awcd", (a, w, c, d), kinds, strict=True):
                fixtures[f"{name}/{draw[0]}, {draw[1]}/{letter}"] = host(codes, format_of(kind))
    return rows, fixtures


# Placement, experiments, invariances ---------------------------------------------------------------------------------


def placement(bench: Bench, size: Size) -> list[dict[str, Any]]:
    """Small integers, exact in every accumulator and order: only a misplaced element can change a result."""
    rows = []
    named = [INSTRUCTIONS[name] for name in size.instructions]
    others = [replace(i, n=n) for i in named if i.unit == "wgmma" for n in (8, 256)]
    for instruction in [*named, *others]:
        rng = np.random.default_rng([31, *instruction.name.encode()])
        steps, tiles = 3, 5
        signed = instruction.a != "u8", instruction.b != "u8"
        a = rng.integers(-2 if signed[0] else 0, 3, (tiles, instruction.m, steps * instruction.k))
        w = rng.integers(-2 if signed[1] else 0, 3, (tiles, instruction.n, steps * instruction.k))
        c = rng.integers(-8, 9, (tiles, instruction.m, instruction.n))
        want = np.einsum("tmk,tnk->tmn", a, w) + c
        given = [tensor(encode(x.astype(np.float64), format_of(kind)), bench.device)
                 for x, kind in ((a, instruction.a), (w, instruction.b), (c, instruction.d))]
        got = bench.instrument(instruction, given[0], given[1], given[2])
        out = path_of(instruction).output
        wrong = int((host(got, out) != encode(want.astype(np.float64), out)).sum())
        rows.append({"instruction": instruction.name, "outputs": want.size, "misplaced": wrong})
    return rows


def experiment_operands(experiment: Experiment, chosen: npt.NDArray[np.int64]) -> tuple[Tiles, int]:
    """Row r of the experiment as row r of A and of W; its result stands on the diagonal. Returns the rows per tile, too."""
    instruction = INSTRUCTIONS[experiment.instruction]
    per_tile = min(instruction.m, instruction.n)
    tiles, k = -(-len(chosen) // per_tile), experiment.steps * instruction.k
    values = np.zeros((2, tiles * per_tile, k))
    start = np.zeros((tiles, instruction.m, instruction.n), dtype=container(path_of(instruction).output))
    for place, index in enumerate(chosen):
        row = experiment.rows[index]
        for side, (named, rest) in enumerate(zip((row.a, row.w), row.rest, strict=True)):
            values[side, place] = rest
            for at, value in named.items():
                values[side, place, at] = 0.0 if isinstance(value, int) else value
        start[place // per_tile, place % per_tile, place % per_tile] = bits_of(row.c, instruction.d)
    sides = []
    for side, (rows, kind) in enumerate(((instruction.m, instruction.a), (instruction.n, instruction.b))):
        fmt = format_of(kind)
        overflow = Overflow.SATFINITE if fmt.kind in (Kind.INT, Kind.UINT) else Overflow.SPECIAL
        codes = encode(values[side], fmt, Rounding.RNE, overflow)
        if not np.array_equal(decode(codes, fmt), values[side], equal_nan=True):
            raise ValueError(f"{experiment.id}, {experiment.instruction}: got a value that {fmt.name} does not hold")
        for place, index in enumerate(chosen):
            given = (experiment.rows[index].a, experiment.rows[index].w)[side]
            for at, value in given.items():
                if isinstance(value, int):
                    codes[place, at] = value
        full = np.zeros((tiles, rows, k), dtype=codes.dtype)
        full[:, :per_tile] = codes.reshape(tiles, per_tile, k)
        sides.append(tensor(full, torch.device("cpu")))
    return (sides[0], sides[1], tensor(start, torch.device("cpu"))), per_tile


def experiments(bench: Bench, size: Size) -> list[dict[str, Any]]:
    """Every experiment: what was predicted, what came. All rows are listed where there are at most 24, else those that differ."""
    found = []
    for experiment in EXPERIMENTS:
        instruction = INSTRUCTIONS[experiment.instruction]
        count = len(experiment.rows)
        chosen = np.unique(np.linspace(0, count - 1, min(count, size.experiment_rows)).astype(np.int64))
        tiles, per_tile = experiment_operands(experiment, chosen)
        got = host(bench.instrument(instruction, *(x.to(bench.device) for x in tiles)), path_of(instruction).output)
        rows = []
        for place, index in enumerate(chosen):
            row = experiment.rows[index]
            seen = int(got[place // per_tile, place % per_tile, place % per_tile])
            predicted = bits_of(row.predicted, instruction.d)
            alternatives = {name: bits_of(answer, instruction.d) for name, answer in row.excluded.items()}
            if seen != predicted or count <= 24:
                rows.append({
                    "note": row.note, "predicted": f"{predicted:#x}", "observed": f"{seen:#x}", "as_predicted": seen == predicted,
                    "excluded": sorted(name for name, answer in alternatives.items() if answer != seen),
                    "matched": sorted(name for name, answer in alternatives.items() if answer == seen),
                })
        wrong = sum(not row["as_predicted"] for row in rows)
        found.append({
            "id": experiment.id, "question": experiment.question, "instruction": experiment.instruction,
            "steps": experiment.steps, "asked": len(chosen), "unlike_prediction": wrong, "rows": rows[:64],
        })
    return found


def invariances(bench: Bench, size: Size) -> list[dict[str, Any]]:
    """E12: what may be changed without changing a bit. `alike` is what was seen, `predicted` what the records say."""
    found = []
    for name in size.instructions:
        instruction = INSTRUCTIONS[name]
        draw = draws_of(instruction)[1]
        a, w, c = draw_tiles(instruction, (draw[0], draw[1], 2), 4, bench.device)
        d = bench.instrument(instruction, a, w, c)
        rng = np.random.default_rng([32, *name.encode()])

        def note(question: str, alike: bool, predicted: bool, name: str = name) -> None:
            found.append({"id": "E12", "instruction": name, "question": question, "alike": alike, "predicted": predicted})

        note("the same tiles again", torch.equal(d, bench.instrument(instruction, a, w, c)), True)
        path, alike = path_of(instruction), True
        node = path.instruction_k if path.family is Family.INTEGER else path.products
        if path.family is not Family.EMULATED_PAIRS:
            for _ in range(size.permutations):
                order = np.concatenate([k + rng.permutation(node) for k in range(0, a.shape[2], node)])
                permuted = [x[..., torch.from_numpy(order).to(x.device)].contiguous() for x in (a, w)]
                alike &= torch.equal(d, bench.instrument(instruction, permuted[0], permuted[1], c))
            note("k permuted within every node", alike, True)
        if path.family is not Family.INTEGER:
            turned = [torch.roll(x, instruction.k, 2).contiguous() for x in (a, w)]
            exchanged = torch.equal(d, bench.instrument(instruction, turned[0], turned[1], c))
            note("the two instructions of the chain exchanged", exchanged, False)
        rows = torch.from_numpy(rng.permutation(instruction.m)).to(a.device)
        moved = bench.instrument(instruction, a[:, rows].contiguous(), w, c[:, rows].contiguous())
        note("rows permuted", torch.equal(d[:, rows], moved), True)
        columns = torch.from_numpy(rng.permutation(instruction.n)).to(a.device)
        moved = bench.instrument(instruction, a, w[:, columns].contiguous(), c[:, :, columns].contiguous())
        note("columns permuted", torch.equal(d[:, :, columns], moved), True)
        if instruction.unit == "wgmma":
            narrow = bench.instrument(replace(instruction, n=8), a, w[:, :8].contiguous(), c[..., :8].contiguous())
            note("8 columns", torch.equal(d[..., :8], narrow), True)
            wide = bench.instrument(replace(instruction, n=256), a, w.repeat(1, 4, 1), c.repeat(1, 1, 4))
            note("256 columns", torch.equal(d.repeat(1, 1, 4), wide), True)
        if instruction.a == instruction.b and path.family is not Family.INTEGER:
            square = min(instruction.m, instruction.n)
            swapped_a = torch.zeros_like(a)
            swapped_a[:, :square] = w[:, :square]
            swapped_w = torch.zeros_like(w)
            swapped_w[:, :square] = a[:, :square]
            swapped_c = torch.zeros_like(c)
            swapped_c[:, :square, :square] = c[:, :square, :square].transpose(1, 2)
            turned_d = bench.instrument(instruction, swapped_a, swapped_w, swapped_c)
            note("A and W exchanged", torch.equal(d[:, :square, :square], turned_d[:, :square, :square].transpose(1, 2)), True)
    return found


# Whole products ------------------------------------------------------------------------------------------------------


def fingerprints(bench: Bench, size: Size) -> list[dict[str, Any]]:
    """Every product function at every shape; one that refuses says so."""
    def emulator(a: Operand, w: Operand, path: Datapath, segment: int) -> Codes:
        if path.family is Family.IEEE:
            return emulate(a, w, path)
        return np.asarray(bench.gemm(a, w, path, segment).cpu().numpy()).astype(container(path.output))

    found = []
    for name in size.fingerprints:
        subject = FINGERPRINTS[name]
        for shape in size.shapes:
            short = shape.rows * shape.rows * shape.k <= 1 << 24  # IEEE chains run on the CPU
            try:
                found.append(fingerprint(subject if short else reduced(subject), bench.products[name], shape, emulator))
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as refusal:
                sentence = (str(refusal).splitlines() or [""])[0]
                found.append({"name": name, "k": shape.k, "consistent": [], "refused": f"{type(refusal).__name__}: {sentence}"})
    return found


def reduced(subject: Fingerprint) -> Fingerprint:
    """Without the candidates that the GPU does not emulate."""
    kept = tuple(name for name in subject.paths if DATAPATHS[name].family is not Family.IEEE)
    return Fingerprint(subject.name, subject.formats, subject.output, kept, subject.big, subject.one)


def judgement(bench: Bench, size: Size) -> list[dict[str, Any]]:
    """A whole fp8 product against the emulator, element by element, timed after one warm-up."""
    found: list[dict[str, Any]] = []
    fmt = FORMATS["e4m3fn"]
    rng = np.random.default_rng(33)
    sides = [Operand(encode(rng.standard_normal((size.gemm, size.gemm)).astype(np.float32), fmt), fmt) for _ in range(2)]
    for name, segment in (("scaled_mm, fast, tensor scales, f32", 0), ("scaled_mm, slow, tensor scales, f32", 128)):
        try:
            got = torch.from_numpy(bench.products[name](sides[0].codes, sides[1].codes).astype(np.int64)).to(bench.device)
        except RuntimeError as refusal:
            found.append({"name": name, "refused": str(refusal).splitlines()[0]})
            continue
        path, emulated, seconds, wrong = DATAPATHS["hopper_wgmma_fp8"], 0.0, 0.0, 0
        for _ in range(2):
            begin = time.perf_counter()
            want = bench.gemm(sides[0], sides[1], path, segment)
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            emulated = time.perf_counter() - begin
            wrong = int((want != got).sum())
            seconds = time.perf_counter() - begin
        found.append({
            "name": name, "m": size.gemm, "n": size.gemm, "k": size.gemm, "segment": segment, "datapath": path.name,
            "mismatches": wrong, "emulated_with_upload_s": round(emulated, 4), "judged_s": round(seconds, 4),
            "products_per_second": size.gemm**3 / emulated,
        })
    return found


# Benches -------------------------------------------------------------------------------------------------------------


def torch_products(device: torch.device) -> dict[str, Product]:
    """What people call, by the names of FINGERPRINTS. All scales are one."""
    views = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "f16": torch.float16,
             "int8": torch.int8}
    outputs = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "int32": torch.int32}

    def scaled(a: torch.Tensor, w: torch.Tensor, name: str, out: torch.dtype) -> torch.Tensor:
        by_row = "row scales" in name
        shapes = ((a.shape[0], 1), (1, w.shape[0])) if by_row else ((), ())
        scales = [torch.ones(shape, dtype=torch.float32, device=device) for shape in shapes]
        return torch._scaled_mm(
            a, w.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=out, use_fast_accum="fast" in name)

    def plain(a: torch.Tensor, w: torch.Tensor, name: str, out: torch.dtype) -> torch.Tensor:
        return torch.matmul(a, w.t()) if out == a.dtype else torch.mm(a, w.t(), out_dtype=out)

    def integer(a: torch.Tensor, w: torch.Tensor, name: str, out: torch.dtype) -> torch.Tensor:
        return torch._int_mm(a, w.t())

    def block(a: torch.Tensor, w: torch.Tensor, name: str, out: torch.dtype) -> torch.Tensor:
        limit = name.rpartition(" ")[2]
        module = importlib.import_module("lowbit.kernels.subjects.triton_dot")
        result: torch.Tensor = module.triton_product(a, w, int(limit) if limit.isdigit() else None)
        return result

    def product(subject: Fingerprint, compute: Callable[..., torch.Tensor], a: Codes, w: Codes) -> Codes:
        sides = [tensor(codes, device).view(views[fmt.name]) for codes, fmt in zip((a, w), subject.formats, strict=True)]
        result = compute(sides[0], sides[1], subject.name, outputs[subject.output.name])
        bits = {2: torch.int16, 4: torch.int32}[subject.output.size]
        return host(result.contiguous().view(bits), subject.output)

    calls = {"scaled_mm": scaled, "matmul": plain, "int_mm": integer, "triton dot": block}
    return {name: partial(product, subject, calls[name.partition(",")[0]]) for name, subject in FINGERPRINTS.items()}


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and by what the run was made."""
    cuda = device.type == "cuda"
    driver = ""
    if cuda:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    sources = sorted({Path(str(sys.modules[name].__file__)) for name in list(sys.modules)
                      if name.startswith(("lowbit.references.", "lowbit.kernels.", "probe_")) and sys.modules[name].__file__})
    sources += [cuda_dot.BODY, *sorted(Path(str(hopper_probes.__file__)).parent.glob("probe_room/*.cuh")), Path(__file__)]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, dry run",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__, "numpy": np.__version__,
        "python": platform.python_version(), "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "sources_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }


def device_bench() -> Bench:
    """The chip. Every probe is compiled, disassembled and loaded first; the emulator's kernels are compiled as they are met."""
    device = torch.device("cuda", torch.cuda.current_device())
    everything = [*INSTRUCTIONS.values(), *(i for n in (8, 256) for i in wgmma_of(n))]
    torch.cuda.synchronize()
    probes = hopper_probes.build(everything)

    def instrument(instruction: Instruction, a: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return probes[instruction.name](a, w, c)

    def emulator(instruction: Instruction, a: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return cuda_dot.emulate_tiles(a, w, path_of(instruction), (format_of(instruction.a), format_of(instruction.b)), c)

    def gemm(a: Operand, w: Operand, path: Datapath, segment: int) -> torch.Tensor:
        return cuda_dot.dot_emulated_cuda(a, w, path, device=device, segment=segment)

    return Bench(device, instrument, emulator, torch_products(device), gemm, {name: assembled(p) for name, p in probes.items()},
                 {name: p.sass for name, p in probes.items()}, provenance(device))


def assembled(probe: Probe) -> dict[str, Any]:
    return {"ptx": probe.instruction.ptx, "opcodes": probe.opcodes,
            "sass_sha256": hashlib.sha256(probe.sass.encode()).hexdigest()}


def promoted(a: Operand, w: Operand, path: Datapath, segment: int) -> Codes:
    """`dot.emulate`, or sums of segments added in the output format."""
    k = a.codes.shape[1]
    if segment == 0 or path.family is Family.INTEGER:
        return emulate(a, w, path)
    total: Any = 0.0
    for first in range(0, k, segment):
        sides = [Operand(np.ascontiguousarray(op.codes[:, first : first + segment]), op.format) for op in (a, w)]
        total = round_to(total + decode(emulate(sides[0], sides[1], path), path.output), path.output)
    return encode(total, path.output, Rounding.RNE, Overflow.SPECIAL)


def dry_bench(wrong: Callable[[Instruction, torch.Tensor], torch.Tensor] | None = None) -> Bench:
    """The same run without a chip: the compiled emulator in the instrument's place, the torch twin as the emulator, and product
    functions made of records. `wrong` changes what the instrument returns, to see that it is noticed."""
    device = torch.device("cpu")

    def instrument(instruction: Instruction, a: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        hopper_probes.check_tiles(instruction, a, w, c)
        d = by_tiles(emulate, instruction, a, w, c)
        return d if wrong is None else wrong(instruction, d)

    def twin(a: Operand, w: Operand, path: Datapath, start: Any) -> Codes:
        return np.asarray(dot_emulated_torch(a, w, path, start).numpy()).astype(container(path.output))

    def gemm(a: Operand, w: Operand, path: Datapath, segment: int) -> torch.Tensor:
        return torch.from_numpy(promoted(a, w, path, segment).astype(np.int64))

    def product(subject: Fingerprint, segment: int, a: Codes, w: Codes) -> Codes:
        path = DATAPATHS[subject.paths[0]]
        sides = [Operand(codes, fmt) for codes, fmt in zip((a, w), subject.formats, strict=True)]
        codes = promoted(sides[0], sides[1], path, segment)
        if subject.output is path.output:
            return codes
        return encode(decode(codes, path.output), subject.output, Rounding.RNE, Overflow.SPECIAL)

    products: dict[str, Product] = {
        name: partial(product, subject, 128 if "slow" in name else 0) for name, subject in FINGERPRINTS.items()
    }
    return Bench(device, instrument, partial(by_tiles, twin), products, gemm, {}, {}, provenance(device))


# The program ---------------------------------------------------------------------------------------------------------


def run(bench: Bench, size: Size, out: Path, tell: Callable[[str], None] = print) -> int:
    """Ask everything, write the record and the fixtures under `out`. Returns the number of findings: misplaced elements,
    mismatches, and answers unlike the prediction (an open point answered the other way is one, too)."""
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(f"==== {name}\n{sass}\n" for name, sass in bench.sass.items())
    (out / "sass.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    record: dict[str, Any] = {"provenance": bench.provenance, "instructions": bench.instructions}
    begin = time.perf_counter()

    def stage(name: str, findings: int, asked: int) -> int:
        (out / "probes.json").write_text(layered(record), encoding="utf-8")
        tell(f"{time.perf_counter() - begin:7.1f} s  {name}: {findings:,} findings of {asked:,}")
        return findings

    record["placement"] = placement(bench, size)
    asked = sum(row["outputs"] for row in record["placement"])
    total = stage("placement", sum(row["misplaced"] for row in record["placement"]), asked)
    if total:
        tell("Elements are not where the layouts say: nothing else was asked. See `placement` in probes.json.")
        return total
    record["experiments"] = experiments(bench, size)
    asked = sum(row["asked"] for row in record["experiments"])
    total += stage("experiments", sum(row["unlike_prediction"] for row in record["experiments"]), asked)
    record["invariances"] = invariances(bench, size)
    unlike = sum(row["alike"] != row["predicted"] for row in record["invariances"])
    total += stage("invariances", unlike, len(record["invariances"]))
    record["validation"], fixtures = validate(bench, size)
    wrong = sum(row["mismatches"] + row["mismatches_by_definition"] for row in record["validation"])
    total += stage("random validation", wrong, sum(row["outputs"] for row in record["validation"]))
    write_fixtures(fixtures, out)
    record["judgement"] = judgement(bench, size)
    total += stage("whole products", sum(row.get("mismatches", 0) for row in record["judgement"]), len(record["judgement"]))
    record["fingerprints"] = fingerprints(bench, size)
    unexplained = sum("refused" not in row and not row["consistent"] for row in record["fingerprints"])
    stage("fingerprints without a model", unexplained, len(record["fingerprints"]))
    for line in summary(record):
        tell(line)
    return total


def layered(record: dict[str, Any]) -> str:
    """JSON with a line per row or field of every stage."""
    def inside(part: Any) -> str:
        if isinstance(part, dict):
            return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in part.items()) + "\n }"
        return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in part) + "\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {inside(part)}" for name, part in record.items()) + "\n}\n"


def write_fixtures(fixtures: dict[str, npt.NDArray[Any]], out: Path) -> None:
    """One file per unit and kind of operand: arrays INSTRUCTION/OPERANDS, START/{a,w,c,d}, codes of the instruction's formats."""
    families: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for key, codes in fixtures.items():
        instruction = INSTRUCTIONS[key.partition("/")[0]]
        kind = "int8" if instruction.d == "s32" else "fp8" if instruction.a in ("e4m3", "e5m2") else "wide"
        families.setdefault(f"{instruction.unit}_{kind}", {})[key] = codes
    for family, arrays in families.items():
        np.savez_compressed(out / f"{family}.npz", **arrays)  # type: ignore[arg-type]  # its stub names one keyword


def summary(record: dict[str, Any]) -> Iterator[str]:
    """What needs reading: everything that was not as predicted, and the models of the products."""
    for experiment in record["experiments"]:
        for row in experiment["rows"]:
            if not row["as_predicted"]:
                matched = f" ({', '.join(row['matched'])})" if row["matched"] else ""
                yield (f"{experiment['id']} {experiment['instruction']}, {row['note']}: predicted {row['predicted']}, "
                       f"observed {row['observed']}{matched}")
    for row in record["invariances"]:
        if row["alike"] != row["predicted"]:
            yield f"E12 {row['instruction']}, {row['question']}: alike {row['alike']}, predicted {row['predicted']}"
    for row in record["validation"]:
        if row["mismatches"] or row["mismatches_by_definition"]:
            counted = f"{row['mismatches']:,} of {row['outputs']:,}, {row['mismatches_by_definition']:,} by the definition"
            yield f"{row['instruction']}, {row['operands']}, {row['start']}: {counted}; {row['first']}"
    for row in record["judgement"]:
        yield (f"{row['name']}: {row['refused']}" if "refused" in row else
               f"{row['name']}, {row['m']}^3: {row['mismatches']:,} mismatches, judged in {row['judged_s']} s, "
               f"{row['products_per_second']:.3g} products/s")
    for row in record["fingerprints"]:
        yield (f"{row['name']}, K = {row['k']}: {row['refused']}" if "refused" in row else
               f"{row['name']}, K = {row['k']}: {'; or '.join(map(told, row['consistent'])) or 'no model'}"
               + ("" if row["consistent"] else f", closest {told(row['closest'][0])}: {row['closest'][0]['differing']} differ"))


def compile_all(tell: Callable[[str], None] = print) -> int:
    """Every probe and every emulator kernel by nvcc: what assembles to other opcodes than its instruction's is counted."""
    wrong = 0
    everything: Iterable[Instruction] = [*INSTRUCTIONS.values(), *(i for n in (8, 256) for i in wgmma_of(n))]
    for instruction in everything:
        found = hopper_probes.opcodes(machine_code(hopper_probes.source(instruction), "90a"))
        right = {name.partition(".")[0] for name in found} == {instruction.opcode}
        wrong += not right
        tell(f"{instruction.name:36} {'' if right else f'expected {instruction.opcode}, '}{found}")
    for name, fmt in (("hopper_wgmma_fp8", "e4m3fn"), ("hopper_mma_fp8", "e5m2"), ("hopper_bf16", "bf16"), ("hopper_tf32", "f32"),
                      ("hopper_f16_f16", "f16"), ("imma_s32_satfinite", "int8"), ("blackwell_nvfp4", "e2m1")):
        lines = machine_code(cuda_dot.source(DATAPATHS[name], FORMATS[fmt], FORMATS[fmt]), "90").count("\n")
        products = 4 * max(32, DATAPATHS[name].instruction_k)  # that one pass over a stretch of k computes per thread
        per_product = lines / products
        slow = per_product > 100
        wrong += slow
        tell(f"emulator of {name:24} {lines} machine instructions, at most {per_product:.0f} per product{', too many' * slow}")
    return wrong


def machine_code(source: str, architecture: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        text.write_text(source, encoding="utf-8")
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        subprocess.run([hopper_probes.tool("nvcc"), "-cubin", "-std=c++17", "-gencode", target, text, "-o", cubin], check=True)
        return hopper_probes.disassemble(cubin.read_bytes())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask Hopper's matrix units, or their emulator, what they compute.")
    parser.add_argument("--out", type=Path, help="folder of the record and the fixtures")
    parser.add_argument("--dry-run", action="store_true", help="the emulator in the instrument's place, small sizes")
    parser.add_argument("--compile", action="store_true", help="compile and disassemble every kernel, run nothing")
    chosen = parser.parse_args(arguments)
    if chosen.compile:
        return int(compile_all() > 0)
    if chosen.out is None:
        parser.error("--out FOLDER is needed for a run")
    bench, size = (dry_bench(), SMALL) if chosen.dry_run else (device_bench(), FULL)
    return int(run(bench, size, chosen.out) > 0)


if __name__ == "__main__":
    sys.exit(main())
