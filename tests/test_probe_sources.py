"""The probes without a chip: where every element goes, what the sources say, and the whole device program on an emulator.

The maps are C++ (fragments.cuh, probe.cuh), compiled here for the host. They are compared with maps written the other way round,
from element to register, and then carry whole tiles through a stand-in for the unit that knows only those inverse maps.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.kernels import hopper_probes
from lowbit.kernels.hopper_probes import INSTRUCTIONS, TYPES, Instruction, wgmma_of
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.formats import FORMATS
from lowbit.references.rounding import Rounding

DEVICE = Path(__file__).parent / "device"
EVERY = {i.name: i for i in (*INSTRUCTIONS.values(), *(i for n in (8, 256) for i in wgmma_of(n)))}
Words = npt.NDArray[np.uint32]

# One instruction per combination of what the movement depends on: unit, shape, operand size, accumulator size.
MOVED = {
    name: EVERY[name]
    for name in (
        "wgmma_n64k32_f32_e4m3_e5m2", "wgmma_n64k32_f16_e4m3_e4m3", "wgmma_n8k32_s32_s8_u8", "wgmma_n256k16_f32_bf16_bf16",
        "wgmma_n256k32_f16_e5m2_e5m2", "wgmma_n64k8_f32_tf32_tf32", "wgmma_n8k16_f16_f16_f16", "mma_k32_f32_e4m3_e4m3",
        "mma_k32_f16_e4m3_e4m3", "mma_k16_f32_bf16_bf16", "mma_k16_f16_f16_f16", "mma_k8_f32_tf32_tf32", "mma_k4_f32_tf32_tf32",
        "mma_k32_s32_u8_s8_satfinite",
    )
}


def test_the_moved_instructions_stand_for_all() -> None:
    def shape(i: Instruction) -> tuple[Any, ...]:
        return i.unit, i.n, i.k, TYPES[i.a].size, TYPES[i.d].size

    unlike = {shape(i) for i in EVERY.values()} - {shape(i) for i in MOVED.values()}
    assert {(unit, n) for unit, n, *_ in unlike} <= {("wgmma", 8), ("wgmma", 64), ("wgmma", 256)}
    assert {(unit, k, a) for unit, _, k, a, _ in unlike} <= {(i.unit, i.k, TYPES[i.a].size) for i in MOVED.values()}


# Maps, from element to place --------------------------------------------------------------------------------------------


def accumulator_place(instruction: Instruction, row: int, column: int) -> tuple[int, int]:
    """(thread, element number) of D[row, column]: a warp per 16 rows; a group of four lanes per row of 8."""
    warp, row = divmod(row, 16)
    half, row = divmod(row, 8)
    block, column = divmod(column, 8)
    return warp * 32 + row * 4 + column // 2, block * 4 + half * 2 + column % 2


def a_place(size: int, row: int, k: int) -> tuple[int, int, int]:
    """(lane, register, element inside it) of A[row, k] for mma.sync."""
    per = 4 // size
    half_k, inside = divmod(k, 4 * per)
    return row % 8 * 4 + inside // per, row // 8 + 2 * half_k, inside % per


def b_place(size: int, n: int, k: int) -> tuple[int, int, int]:
    per = 4 // size
    register, inside = divmod(k, 4 * per)
    return n * 4 + inside // per, register, inside % per


class Host:
    """The C++ of all moved instructions, in one library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.descriptor_of.restype = ctypes.c_uint64

    def call(self, instruction: Instruction, name: str, *arguments: Any) -> int:
        index = list(MOVED).index(instruction.name)
        given = [x.ctypes.data_as(ctypes.c_void_p) if isinstance(x, np.ndarray) else ctypes.c_longlong(x) for x in arguments]
        return int(getattr(self.library, f"{name}_{index}")(*given))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    parts = []
    for index, instruction in enumerate(MOVED.values()):
        parts.append(f"""
namespace p{index} {{
{hopper_probes.movement(instruction)}
}}
extern "C" void take_c_{index}(void* d, long long thread, long long tile, const void* c) {{
  p{index}::take_accumulator((p{index}::Word*)d, (int)thread, tile, c);
}}
extern "C" void put_c_{index}(const void* d, long long thread, long long tile, void* out) {{
  p{index}::put_accumulator((const p{index}::Word*)d, (int)thread, tile, out);
}}
extern "C" void take_shared_{index}(void* s, long long thread, long long rows, const void* m, long long first, long long step,
                                    long long steps) {{
  p{index}::take_shared((unsigned char*)s, (int)thread, (int)rows, m, first, (int)step, (int)steps);
}}
extern "C" void take_registers_{index}(void* a, void* b, long long lane, long long tile, const void* l, const void* r,
                                       long long step, long long steps) {{
  p{index}::take_registers((p{index}::Word*)a, (p{index}::Word*)b, (int)lane, tile, l, r, (int)step, (int)steps);
}}
""")
    parts.append('extern "C" unsigned long long descriptor_of(unsigned address) { return p0::descriptor(address); }\n')
    folder = tmp_path_factory.mktemp("probes")
    (folder / "host.cpp").write_text("".join(parts), encoding="utf-8")
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", "host.so", "host.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return Host(folder / "host.so")


def accumulator(host: Host, instruction: Instruction, tile: int, c: npt.NDArray[Any]) -> Words:
    """Registers [threads, registers] as the C++ loads them."""
    d = np.zeros((instruction.threads, instruction.registers), np.uint32)
    for thread in range(instruction.threads):
        host.call(instruction, "take_c", d[thread], thread, tile, c)
    return d


@pytest.mark.parametrize("name", MOVED)
def test_every_element_of_the_accumulator_has_one_place_and_comes_back_from_it(name: str, host: Host) -> None:
    instruction = MOVED[name]
    kind = np.uint16 if instruction.d == "f16" else np.uint32
    shape = (3, instruction.m, instruction.n)
    c = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape).astype(kind)
    elements = accumulator(host, instruction, 1, c).view(kind)  # little-endian: the lower half of a register is the first
    seen = set()
    for row in range(instruction.m):
        for column in range(instruction.n):
            thread, i = accumulator_place(instruction, row, column)
            assert elements[thread, i] == c[1, row, column], (row, column)
            seen.add((thread, i))
    assert len(seen) == instruction.m * instruction.n == elements.size
    out = np.full_like(c, 0xABCD)
    for thread in range(instruction.threads):
        host.call(instruction, "put_c", accumulator(host, instruction, 1, c)[thread], thread, 1, out)
    assert np.array_equal(out[1], c[1])
    assert (out[[0, 2]] == 0xABCD).all()


def shared(
    host: Host, instruction: Instruction, rows: int, matrix: npt.NDArray[Any], first: int, step: int, steps: int
) -> npt.NDArray[np.uint8]:
    memory = np.full(rows * 32, 0xEE, np.uint8)
    for thread in range(128):
        host.call(instruction, "take_shared", memory, thread, rows, matrix, first, step, steps)
    return memory


def from_shared(memory: npt.NDArray[np.uint8], descriptor: int, rows: int) -> npt.NDArray[np.uint8]:
    """Rows of 32 bytes as wgmma reads a K-major matrix without swizzling: core matrices of 8 rows by 16 bytes, the next one along
    k at the leading offset, the next one along the rows at the stride offset (PTX ISA, shared-memory matrix layout)."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    assert descriptor >> 46 == 0  # no base offset, no swizzling
    out = np.zeros((rows, 32), np.uint8)
    for row in range(rows):
        for byte in range(32):
            out[row, byte] = memory[start + row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16]
    return out


@pytest.mark.parametrize("name", [name for name in MOVED if name.startswith("wgmma")])
def test_shared_memory_holds_every_byte_where_the_descriptor_says(name: str, host: Host) -> None:
    instruction = MOVED[name]
    rng = np.random.default_rng(0)
    steps = 3
    for rows in {instruction.m, instruction.n}:
        matrix = rng.integers(0, 256, (4 * rows, steps, 32)).astype(np.uint8)
        for step in range(steps):
            memory = shared(host, instruction, rows, matrix, 2 * rows, step, steps)
            descriptor = host.library.descriptor_of(0)
            assert np.array_equal(from_shared(memory, descriptor, rows), matrix[2 * rows : 3 * rows, step])


def test_a_descriptor_counts_in_16_bytes_and_keeps_18_bits_of_the_address(host: Host) -> None:
    # 0x12340 / 16 = 0x1234; 128 / 16 = 8 along k, 256 / 16 = 16 along the rows.
    assert host.library.descriptor_of(0x12340) == 0x0000_0010_0008_1234
    assert host.library.descriptor_of(0xFFF00000 + 0x80) == 0x0000_0010_0008_0008


@pytest.mark.parametrize("name", [name for name in MOVED if name.startswith("mma")])
def test_every_element_of_a_and_b_has_one_register(name: str, host: Host) -> None:
    instruction = MOVED[name]
    size = TYPES[instruction.a].size
    kind = np.dtype(f"u{size}")
    steps, tiles = 2, 3
    a = np.arange(tiles * 16 * steps * instruction.k, dtype=np.uint64).astype(kind).reshape(tiles, 16, -1)
    b = (np.arange(tiles * 8 * steps * instruction.k, dtype=np.uint64) * 7 + 3).astype(kind).reshape(tiles, 8, -1)
    count = instruction.k * size // 8, instruction.k * size // 16
    left, right = np.zeros((32, count[0]), np.uint32), np.zeros((32, count[1]), np.uint32)
    for lane in range(32):
        host.call(instruction, "take_registers", left[lane], right[lane], lane, 2, a, b, 1, steps)
    seen = set()
    for k in range(instruction.k):
        for row in range(16):
            lane, register, part = place = a_place(size, row, k)
            assert left[lane, register : register + 1].view(kind)[part] == a[2, row, instruction.k + k]
            seen.add((0, *place))
        for n in range(8):
            lane, register, part = place = b_place(size, n, k)
            assert right[lane, register : register + 1].view(kind)[part] == b[2, n, instruction.k + k]
            seen.add((1, *place))
    assert len(seen) == instruction.k * 24 == (left.size + right.size) * 4 // size


@pytest.mark.parametrize("name", [
    "wgmma_n64k32_f32_e4m3_e5m2", "wgmma_n64k8_f32_tf32_tf32", "mma_k32_f16_e4m3_e4m3", "mma_k4_f32_tf32_tf32",
])
def test_tiles_go_through_a_stand_in_for_the_unit(name: str, host: Host) -> None:
    """Codes taken as plain integers, summed modulo the accumulator: one wrong place anywhere changes a sum."""
    instruction = MOVED[name]
    rng = np.random.default_rng(1)
    kind, out_kind = np.dtype(f"u{TYPES[instruction.a].size}"), np.uint16 if instruction.d == "f16" else np.uint32
    tiles, steps, tile = 3, 2, 1
    a = rng.integers(0, 50, (tiles, instruction.m, steps * instruction.k)).astype(kind)
    w = rng.integers(0, 50, (tiles, instruction.n, steps * instruction.k)).astype(kind)
    c = rng.integers(0, 1 << 16, (tiles, instruction.m, instruction.n)).astype(out_kind)
    registers = accumulator(host, instruction, tile, c)
    for step in range(steps):
        left, right = unit_operands(host, instruction, a, w, tile, step, steps)
        d = registers.view(out_kind)
        for row in range(instruction.m):
            for column in range(instruction.n):
                at = accumulator_place(instruction, row, column)
                d[at] = (int(d[at]) + int(left[row] @ right[column])) % (1 << (8 * d.itemsize))
    out = np.zeros_like(c)
    for thread in range(instruction.threads):
        host.call(instruction, "put_c", registers[thread], thread, tile, out)
    want = np.einsum("mk,nk->mn", a[tile].astype(np.int64), w[tile].astype(np.int64)) + c[tile]
    assert np.array_equal(out[tile], (want % (1 << (8 * out.itemsize))).astype(out_kind))


def unit_operands(host: Host, instruction: Instruction, a: npt.NDArray[Any], w: npt.NDArray[Any], tile: int, step: int,
                  steps: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A [m, k] and W [n, k] as the unit sees them, by the inverse maps alone."""
    size = TYPES[instruction.a].size
    if instruction.unit == "wgmma":
        sides = []
        for rows, matrix in ((instruction.m, a), (instruction.n, w)):
            memory = shared(host, instruction, rows, matrix, tile * rows, step, steps)
            sides.append(from_shared(memory, host.library.descriptor_of(0), rows).view(a.dtype).astype(np.int64))
        return sides[0], sides[1]
    registers = np.zeros((2, 32, 4), np.uint32)
    for lane in range(32):
        host.call(instruction, "take_registers", registers[0, lane], registers[1, lane], lane, tile, a, w, step, steps)
    elements = registers.view(a.dtype).reshape(2, 32, 4, 4 // size)
    left = [[elements[0][a_place(size, row, k)] for k in range(instruction.k)] for row in range(16)]
    right = [[elements[1][b_place(size, n, k)] for k in range(instruction.k)] for n in range(8)]
    return np.array(left, np.int64), np.array(right, np.int64)


# Sources -----------------------------------------------------------------------------------------------------------------


def test_every_instruction_is_spelled_as_ptx_spells_it() -> None:
    ptx = {name: i.ptx for name, i in EVERY.items()}
    assert len(EVERY) == 81
    assert len(set(ptx.values())) == 81
    assert ptx["wgmma_n64k32_f32_e4m3_e5m2"] == "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e5m2"
    assert ptx["wgmma_n256k32_s32_u8_s8_satfinite"] == "wgmma.mma_async.sync.aligned.m64n256k32.satfinite.s32.u8.s8"
    assert ptx["mma_k32_f16_e5m2_e4m3"] == "mma.sync.aligned.m16n8k32.row.col.f16.e5m2.e4m3.f16"
    assert ptx["mma_k32_s32_s8_s8_satfinite"] == "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    assert ptx["mma_k4_f32_tf32_tf32"] == "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32"


@pytest.mark.parametrize("name", EVERY)
def test_a_source_binds_every_register_once(name: str) -> None:
    instruction = EVERY[name]
    text = hopper_probes.execute(instruction)
    size = TYPES[instruction.a].size
    given = 2 if instruction.unit == "wgmma" else 24 * instruction.k * size // 128
    assert text.count('"+r"(d[') == instruction.m * instruction.n * TYPES[instruction.d].size // (4 * instruction.threads)
    assert text.count('"l"(') + text.count('"r"(') == given
    bound = text.count('"+r"(') + given
    assert f"%{bound - 1}" in text
    assert f"%{bound}" not in text
    assert instruction.ptx in text
    assert 'extern "C" __global__' in hopper_probes.source(instruction)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_is_predicted_by_a_record_that_takes_its_operands(name: str) -> None:
    instruction = INSTRUCTIONS[name]
    path = DATAPATHS[instruction.datapath]
    for kind in (instruction.a, instruction.b):
        assert FORMATS[TYPES[kind].format] in path.operands
        assert FORMATS[TYPES[kind].format].size == TYPES[kind].size
    assert path.output is FORMATS[TYPES[instruction.d].format]
    assert path.instruction_k == instruction.k or path.name.startswith("hopper_f16") or path.name == "hopper_bf16"
    assert instruction.k % path.instruction_k == 0


def test_opcodes_are_counted_from_a_disassembly() -> None:
    sass = "HMMA.16816.F32 R4, R4, R6, RZ ;\nHMMA.16816.F32 R4 ;\nQGMMA.64x64x32.F32.E4M3.E4M3 R24 ;\nIMAD.MOV R1 ;\nFFMA R2 ;"
    assert hopper_probes.opcodes(sass) == {"HMMA.16816.F32": 2, "QGMMA.64x64x32.F32.E4M3.E4M3": 1}


def test_tiles_of_another_shape_are_refused() -> None:
    instruction = EVERY["wgmma_n64k32_f32_e4m3_e4m3"]
    a, w = (torch.zeros(2, 64, 64, dtype=torch.uint8) for _ in range(2))
    c = torch.zeros(2, 64, 64, dtype=torch.int32)
    assert hopper_probes.check_tiles(instruction, a, w, c) == (2, 2)
    for bad in ((a[:, :32], w, c), (a, w[:1], c), (a, w, c.float()), (a[..., :16], w[..., :16], c), (a.transpose(1, 2), w, c),
                (a[..., :48].contiguous(), w[..., :48].contiguous(), c)):
        with pytest.raises(ValueError, match="expected contiguous"):
            hopper_probes.check_tiles(instruction, *bad)
    with pytest.raises(ValueError, match="expected a CUDA device"):
        hopper_probes.Probe(instruction, "", {}, None)(a, w, c)


def test_a_missing_tool_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-tool: found neither on PATH"):
        hopper_probes.tool("no-such-tool")


# The device program, dry ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    sys.path.insert(0, str(DEVICE))
    spec = importlib.util.spec_from_file_location("run_probes", DEVICE / "run_probes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(DEVICE))
    for name in ("run_probes", "probe_experiments", "probe_fingerprints"):
        del sys.modules[name]


FEW = ("wgmma_n64k32_f32_e4m3_e4m3", "mma_k32_f16_e5m2_e4m3", "mma_k4_f32_tf32_tf32", "mma_k32_s32_s8_u8_satfinite")
SUBJECTS = ("scaled_mm, fast, tensor scales, f32", "scaled_mm, slow, tensor scales, bf16", "int_mm")


@pytest.fixture(scope="module")
def few(program: Any) -> Any:
    return replace(program.SMALL, instructions=FEW, fingerprints=SUBJECTS, experiment_rows=8, gemm=64,
                   shapes=(program.Shape(64, 512),))


def test_a_dry_run_finds_nothing_and_writes_what_a_run_writes(program: Any, few: Any, tmp_path: Path) -> None:
    told: list[str] = []
    assert program.run(program.dry_bench(), few, tmp_path, told.append) == 0
    record = json.loads((tmp_path / "probes.json").read_text(encoding="utf-8"))
    assert {e["id"] for e in record["experiments"]} | {"E12"} == {f"E{i}" for i in range(1, 15)}
    assert all(e["asked"] > 0 for e in record["experiments"])
    assert {row["instruction"] for row in record["validation"]} == set(FEW)
    assert all(row["outputs"] >= 100 <= row["outputs_by_definition"] for row in record["validation"])
    found = {row["name"]: {program.told(model) for model in row["consistent"]} for row in record["fingerprints"]}
    assert found == {
        SUBJECTS[0]: {"hopper_wgmma_fp8"},
        # at K = 512 four parts are the same function
        SUBJECTS[1]: {"hopper_wgmma_fp8, promoted every 128", "hopper_wgmma_fp8, 4 parts of 128"},
        SUBJECTS[2]: {"imma_s32"},
    }
    slow = next(row for row in record["fingerprints"] if row["name"] == SUBJECTS[1])
    for position, survivors in zip(slow["position"], slow["survivors"], strict=True):
        # Promoted every 128 of K = 512: in the first segment what follows the node of 32, later whole segments only.
        segment, node = position // 128, position // 32
        assert survivors == (512 - 32 * (node + 1) if segment == 0 else 128 * (3 - segment))
    assert sum("findings" in line for line in told) == 6
    arrays = dict(np.load(tmp_path / "mma_wide.npz"))
    assert arrays["mma_k4_f32_tf32_tf32/bits, bits/a"].shape == (1, 64, 4)
    assert arrays["mma_k4_f32_tf32_tf32/bits, bits/d"].dtype == np.uint32


def flipped(change: Callable[[Any], Any], only: str) -> Callable[[Any, Any], Any]:
    """An instrument that is wrong on one instruction."""
    return lambda instruction, d: change(d.clone()) if instruction.name.startswith(only) else d


def last_bit(d: Any) -> Any:
    d[0, 1, 1] ^= 1
    return d


@pytest.mark.parametrize(("only", "change"), [
    ("mma_k4", last_bit), ("wgmma_n8", last_bit), ("mma_k32_s32", last_bit), ("mma_k32_f16_e5m2_e4m3", lambda d: d.flip(1)),
], ids=["last bit", "another width", "integer", "rows"])
def test_a_wrong_instrument_is_caught_at_once_where_placement_shows_it(
    program: Any, few: Any, tmp_path: Path, only: str, change: Callable[[Any], Any]
) -> None:
    told: list[str] = []
    assert program.run(program.dry_bench(flipped(change, only)), few, tmp_path, told.append) > 0
    assert told[-1].startswith("Elements are not where")
    record = json.loads((tmp_path / "probes.json").read_text(encoding="utf-8"))
    assert all(row["instruction"].startswith(only) for row in record["placement"] if row["misplaced"])


def altered_unit(program: Any, **features: Any) -> Callable[[Any, Any, Any, Any], Any]:
    """What a wgmma with other features would answer: exact sums do not show it."""
    bench = program.dry_bench()
    other = replace(DATAPATHS["hopper_wgmma_fp8"], **features)

    def instrument(instruction: Any, a: Any, w: Any, c: Any) -> Any:
        if instruction.datapath != "hopper_wgmma_fp8":
            return bench.instrument(instruction, a, w, c)
        return program.by_tiles(lambda x, y, path, start: program.emulate(x, y, other, start), instruction, a, w, c)

    return instrument


@pytest.mark.parametrize(("features", "refuted"), [
    ({"fraction_bits": 25, "output_bits": 24}, {"E1", "E2", "E3", "E5", "E6", "E13"}),
    ({"normalised": 1}, {"E4", "E13"}),
    ({"alignment_rounding": Rounding.FLOOR}, {"E1", "E2", "E3", "E13"}),
    ({"products": 16}, {"E6", "E7"}),
    ({"output_rounding": Rounding.RNE}, {"E5"}),  # E1 is cut by the alignment before the result is
], ids=["25 fraction bits", "normalised products", "floor", "16 products", "result to nearest"])
def test_a_unit_with_another_feature_is_refuted_by_its_experiments(
    program: Any, few: Any, features: Any, refuted: set[str]
) -> None:
    bench = replace(program.dry_bench(), instrument=altered_unit(program, **features))
    size = replace(few, instructions=(FEW[0],))
    assert sum(row["misplaced"] for row in program.placement(bench, size)) == 0
    found: dict[str, int] = {}
    for experiment in program.experiments(bench, size):
        found[experiment["id"]] = found.get(experiment["id"], 0) + experiment["unlike_prediction"]
    assert {name for name, count in found.items() if count} == refuted


def test_a_unit_with_25_fraction_bits_is_refuted_by_random_tiles(program: Any, few: Any) -> None:
    bench = replace(program.dry_bench(), instrument=altered_unit(program, fraction_bits=25, output_bits=24))
    rows, _ = program.validate(bench, replace(few, instructions=(FEW[0],)))
    wrong = {(row["operands"], row["start"]): row["mismatches"] for row in rows}
    for key in (("normal", "comparable"), ("positive", "comparable"), ("lognormal", "large or small")):
        assert wrong[key] > 100
    assert all(row["first"] for row in rows if row["mismatches"])
    assert all((row["mismatches"] > 0) == (row["mismatches_by_definition"] > 0) for row in rows)


def test_a_wrong_product_has_no_consistent_model(program: Any, few: Any) -> None:
    bench = program.dry_bench()
    inner = bench.products[SUBJECTS[0]]

    def product(a: Any, w: Any) -> Any:
        d = inner(a, w)
        d[0, 0] ^= 1
        return d

    def refusing(a: Any, w: Any) -> Any:
        raise RuntimeError("this shape is not supported")

    other = replace(bench, products={**bench.products, SUBJECTS[0]: product, SUBJECTS[2]: refusing})
    rows = {row["name"]: row for row in program.fingerprints(other, few)}
    assert rows[SUBJECTS[0]]["consistent"] == []
    closest = rows[SUBJECTS[0]]["closest"][0]
    assert (closest["differing"], program.told(closest)) == (1, "hopper_wgmma_fp8")
    assert rows[SUBJECTS[1]]["consistent"]
    assert rows[SUBJECTS[2]]["refused"] == "RuntimeError: this shape is not supported"


@pytest.mark.parametrize(("output", "partial", "total"), [("f32", "", ""), ("bf16", "bf16", ""), ("bf16", "bf16", "bf16")])
def test_parts_of_k_are_found_with_the_formats_they_are_added_in(
    program: Any, few: Any, output: str, partial: str, total: str
) -> None:
    """Three parts of 768 bf16 are 256 each; of 640 they are 256, 256 and 128: whole blocks of 128 bytes."""
    fingerprints = sys.modules["probe_fingerprints"]
    subject = replace(program.FINGERPRINTS[f"matmul, bf16 to {output}"], paths=("hopper_bf16",))
    model = fingerprints.Candidate("hopper_bf16", 0, 256, partial, total)

    def product(a: Any, w: Any) -> Any:
        sides = [program.Operand(codes, fmt) for codes, fmt in zip((a, w), subject.formats, strict=True)]
        return fingerprints.modelled(sides[0], sides[1], model, subject.output, program.promoted)

    row = program.fingerprint(subject, product, program.Shape(32, 640), program.promoted)
    words = ["hopper_bf16, 3 parts of 256", *([f"parts in {partial}"] * bool(partial)), *([f"summed in {total}"] * bool(total))]
    assert ", ".join(words) in {program.told(model) for model in row["consistent"]}
    assert all((model["partial"], model["total"]) == (partial, total) for model in row["consistent"])


def test_every_excluded_alternative_would_give_another_answer(program: Any) -> None:
    named = set()
    for experiment in program.EXPERIMENTS:
        d = INSTRUCTIONS[experiment.instruction].d
        for row in experiment.rows:
            answers = {name: program.bits_of(answer, d) for name, answer in row.excluded.items()}
            assert program.bits_of(row.predicted, d) not in answers.values(), (experiment.id, row.note)
            named |= set(answers)
    assert {"floor", "to nearest", "F is 12", "F is 14", "renormalised", "the whole binary32", "nodes of 16", "wraps", "clamps",
            "flushed", "a zero with a sign", "F is 24", "F is 26", "fifteen bits"} <= named


def test_the_command_needs_a_folder(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--dry-run"])
    assert "--out FOLDER" in capsys.readouterr().err
