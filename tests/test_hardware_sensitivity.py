"""Recorded outputs of matrix units refute every single altered feature of the records, and none of the records themselves.

Decides: which alteration each recorded array must refute; where an array cannot, the table says so and why. Replayed are the
published rows of golden/hardware/vectors.npz and the products that tests/device/run_probes.py recorded.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.kernels.hopper_probes import INSTRUCTIONS, TYPES, opcodes
from lowbit.references.datapaths import DATAPATHS, Datapath, Family
from lowbit.references.dot import Operand, emulate
from lowbit.references.formats import BF16, E4M3FN, E5M2, F16, F32, FORMATS, Codes, Format, decode, decode_scalar
from lowbit.references.rounding import Rounding

HARDWARE = Path(__file__).parents[1] / "golden" / "hardware"
VECTORS = np.load(HARDWARE / "vectors.npz")
FORMAT = {"fp16": F16, "bf16": BF16, "tf32": F32, "e4m3": E4M3FN, "e5m2": E5M2}
PUBLISHED = [tuple(name.split("/")[:2]) for name in VECTORS.files if name.endswith("/d")]
Rows = tuple[Codes, Codes, Codes, Codes]


def published(array: str, record: str) -> Rows:
    return VECTORS[f"{array}/a"], VECTORS[f"{array}/b"], VECTORS[f"{array}/{record}/c"], VECTORS[f"{array}/{record}/d"]


def row_mismatches(rows: Rows, fmt: Format, path: Datapath, order: npt.NDArray[np.int64] | None = None) -> int:
    """Rows i where sum_k a[i, k] b[i, k] + c[i] on `path` is not d[i]; `order` permutes k."""
    a, b, c, d = rows
    order = np.arange(a.shape[1]) if order is None else order
    wrong, block = 0, 16
    for top in range(0, len(d), block):
        at = slice(top, top + block)
        with np.errstate(invalid="ignore"):
            start = np.repeat(decode(c[at], path.output)[:, None], len(d[at]), axis=1)
        got = emulate(Operand(a[at][:, order], fmt), Operand(b[at][:, order], fmt), path, start)
        wrong += int((got.diagonal() != d[at]).sum())
    return wrong


def without_subnormals(codes: Codes, fmt: Format) -> Codes:
    """Codes with subnormals replaced by zeros of their sign: what a unit that flushes them would read."""
    magnitude = codes & codes.dtype.type((1 << (fmt.bits - 1)) - 1)
    small = magnitude < codes.dtype.type(1 << fmt.mantissa_bits)
    return np.where(small, codes & codes.dtype.type(fmt.sign_bit), codes).astype(codes.dtype)


def other_rounding(path: Datapath) -> Rounding:
    return Rounding.RZ if path.output_rounding is Rounding.RNE else Rounding.RNE


ALTERATIONS: dict[str, Callable[[Datapath], Datapath]] = {
    "one fraction bit less": lambda p: replace(p, fraction_bits=p.fraction_bits - 1),
    "one fraction bit more": lambda p: replace(p, fraction_bits=p.fraction_bits + 1),
    "one output bit less": lambda p: replace(p, output_bits=p.output_bits - 1),
    "output rounding": lambda p: replace(p, output_rounding=other_rounding(p)),
    "half the products per node": lambda p: replace(p, products=p.products // 2),
    "floor for truncation": lambda p: replace(p, alignment_rounding=Rounding.FLOOR),
    "nearest for truncation": lambda p: replace(p, alignment_rounding=Rounding.RNE),
    "normalised products": lambda p: replace(p, normalised=1),
}
HIDDEN = {
    "one fraction bit less", "one fraction bit more", "floor for truncation", "nearest for truncation", "normalised products",
}
"""What 11 bits of an f16 result hide behind more than 20 aligned bits. Those records share the unit of their f32 form."""


def can_be_seen(alteration: str, path: Datapath) -> bool:
    return not (path.output is F16 and path.fraction_bits > 20 and alteration in HIDDEN)


@pytest.mark.parametrize(("array", "record"), PUBLISHED)
def test_the_record_as_it_is_has_no_mismatch(array: str, record: str) -> None:
    assert row_mismatches(published(array, record), FORMAT[array.split("_")[1]], DATAPATHS[record]) == 0


CASES = [(alteration, *case) for case in PUBLISHED for alteration in ALTERATIONS]


@pytest.mark.parametrize(("alteration", "array", "record"), CASES)
def test_one_altered_feature_is_refuted(alteration: str, array: str, record: str) -> None:
    path = DATAPATHS[record]
    found = row_mismatches(published(array, record), FORMAT[array.split("_")[1]], ALTERATIONS[alteration](path))
    assert (found > 0) == can_be_seen(alteration, path), f"{found} of 400 rows differ"


@pytest.mark.parametrize(("array", "record"), [case for case in PUBLISHED if DATAPATHS[case[1]].output_bits == 14])
def test_one_output_bit_more_is_refuted(array: str, record: str) -> None:
    path = DATAPATHS[record]
    assert row_mismatches(published(array, record), FORMAT[array.split("_")[1]], replace(path, output_bits=15)) > 50


CHAINS = [case for case in PUBLISHED if VECTORS[f"{case[0]}/a"].shape[1] > DATAPATHS[case[1]].products]


@pytest.mark.parametrize(("array", "record"), CHAINS)
def test_the_order_of_nodes_is_refuted_where_a_row_has_more_than_one(array: str, record: str) -> None:
    path = DATAPATHS[record]
    k = VECTORS[f"{array}/a"].shape[1]
    backward = np.arange(k).reshape(-1, path.products)[::-1].ravel()
    if path.family is Family.EMULATED_PAIRS:  # its nodes are the runs of two, dealt in turn
        backward = np.arange(k).reshape(-1, 2, path.group)[:, ::-1].ravel()
    assert row_mismatches(published(array, record), FORMAT[array.split("_")[1]], path, backward) > 50


def test_only_these_arrays_have_more_than_one_node_to_a_row() -> None:
    assert {record for _, record in CHAINS} == {"ada_fp8", "ada_fp8_f16", "hopper_mma_fp8_f16"}


@pytest.mark.parametrize("array", ["ada_e4m3", "h100_e4m3"])
def test_flushed_subnormals_are_refuted_where_an_array_holds_some(array: str) -> None:
    """Published operands are drawn like normal values: some of e4m3 are subnormal (below 2^-6), none of the other formats."""
    record = {"ada_e4m3": "ada_fp8", "h100_e4m3": "hopper_wgmma_fp8"}[array]
    a, b, c, d = published(array, record)
    assert row_mismatches((without_subnormals(a, E4M3FN), without_subnormals(b, E4M3FN), c, d), E4M3FN, DATAPATHS[record]) > 0


def test_flushing_means_what_it_says() -> None:
    codes = np.array([0x01, 0x07, 0x08, 0x87, 0x88, 0x00], np.uint8)
    assert without_subnormals(codes, E4M3FN).tolist() == [0, 0, 8, 0x80, 0x88, 0]
    assert [decode_scalar(code, E4M3FN) for code in (0x07, 0x08)] == [Fraction(7, 512), Fraction(1, 64)]  # 2^-6 is normal


def test_a_single_wrong_bit_among_the_rows_is_counted() -> None:
    a, b, c, d = published("h100_e4m3", "hopper_wgmma_fp8")
    other = d.copy()
    other[17] ^= 0x400  # the last of the 14 bits
    assert row_mismatches((a, b, c, other), E4M3FN, DATAPATHS["hopper_wgmma_fp8"]) == 1


# Tiles of our own probes, by device ----------------------------------------------------------------------------------

RECORDED = {"h200"}
"""Folders of golden/hardware with products that run_probes.py recorded. A folder that is added here is replayed below."""


def recorded() -> list[tuple[str, str]]:
    """(file below golden/hardware, INSTRUCTION/OPERANDS, START) of every recorded array."""
    found = []
    for path in sorted(HARDWARE.glob("*/*.npz")):
        with np.load(path) as arrays:
            names = [name.rpartition("/")[0] for name in arrays.files if name.endswith("/d")]
        found += [(path.relative_to(HARDWARE).as_posix(), name) for name in names]
    return found


def tile_mismatches(
    file: str, key: str, alter: Callable[[Datapath], Datapath] = lambda path: path, root: Path = HARDWARE,
    backward: bool = False,
) -> int:
    """Elements of the recorded products of one array that the instruction's record, altered, does not reproduce. backward: the
    last instruction of a chain first."""
    instruction = INSTRUCTIONS[key.partition("/")[0]]
    path = alter(DATAPATHS[instruction.datapath])
    with np.load(root / file) as arrays:
        a, w, c, d = (arrays[f"{key}/{letter}"] for letter in "awcd")
    wrong = 0
    for tile in range(len(d)):
        with np.errstate(invalid="ignore"):
            start = decode(c[tile], path.output)
        k = np.arange(a.shape[2]).reshape(-1, instruction.k)[:: -1 if backward else 1].ravel()
        sides = [Operand(x[tile][:, k], FORMATS[TYPES[kind].format]) for x, kind in ((a, instruction.a), (w, instruction.b))]
        wrong += int((emulate(sides[0], sides[1], path, start) != d[tile]).sum())
    return wrong


def refuted_by_tiles(file: str, keys: list[str], root: Path = HARDWARE) -> set[str]:
    """Alterations that at least one of the arrays of one instruction refutes."""
    return {name for name, alter in ALTERATIONS.items() if any(tile_mismatches(file, key, alter, root) for key in keys)}


def test_every_recorded_folder_is_named() -> None:
    assert {file.partition("/")[0] for file, _ in recorded()} == RECORDED


@pytest.mark.parametrize("folder", sorted(RECORDED))
def test_a_recorded_run_names_its_chip_and_found_nothing(folder: str) -> None:
    record = json.loads(gzip.decompress((HARDWARE / folder / "probes.json.gz").read_bytes()))
    assert record["provenance"]["device"].startswith("NVIDIA ")
    assert all(record["provenance"][name] for name in ("driver", "cuda", "torch", "date", "sources_sha256"))
    assert sum(row["misplaced"] for row in record["placement"]) == 0
    assert {row["id"] for row in record["experiments"]} == {f"E{i}" for i in range(1, 15)} - {"E12"}
    assert sum(row["unlike_prediction"] for row in record["experiments"]) == 0
    assert all(row["alike"] == row["predicted"] for row in record["invariances"])
    assert min(row["outputs"] for row in record["validation"]) >= 10_000_000
    assert sum(row["mismatches"] + row["mismatches_by_definition"] for row in record["validation"]) == 0
    assert all(row["mismatches"] == 0 and row["judged_s"] < 2 for row in record["judgement"])
    assert all(row["consistent"] for row in record["fingerprints"])


@pytest.mark.parametrize("folder", sorted(RECORDED))
def test_the_disassembly_of_a_recorded_run_shows_the_instruction_that_was_asked(folder: str) -> None:
    record = json.loads(gzip.decompress((HARDWARE / folder / "probes.json.gz").read_bytes()))
    listing = gzip.decompress((HARDWARE / folder / "sass.txt.gz").read_bytes()).decode()
    sass = dict(part.split("\n", 1) for part in listing.split("==== ")[1:])
    assert set(INSTRUCTIONS) <= set(sass) == set(record["instructions"])
    for name, found in record["instructions"].items():
        assert hashlib.sha256(sass[name].removesuffix("\n").encode()).hexdigest() == found["sass_sha256"]
        assert opcodes(sass[name]) == found["opcodes"]
    for name, instruction in INSTRUCTIONS.items():
        assert {opcode.partition(".")[0] for opcode in record["instructions"][name]["opcodes"]} == {instruction.opcode}


@pytest.mark.parametrize("folder", sorted(RECORDED))
def test_every_instruction_has_5000_recorded_results_of_every_distribution(folder: str) -> None:
    counts: dict[str, list[int]] = {}
    for path in sorted((HARDWARE / folder).glob("*.npz")):
        with np.load(path) as arrays:
            for key in (name for name in arrays.files if name.endswith("/d")):
                counts.setdefault(key.partition("/")[0], []).append(arrays[key].size)
    assert {name: len(sizes) for name, sizes in counts.items()} == {
        name: 4 if instruction.d == "s32" else 7 for name, instruction in INSTRUCTIONS.items()
    }
    assert min(min(sizes) for sizes in counts.values()) >= 5_000


def test_recorded_chains_refute_the_order_of_their_nodes_reversed() -> None:
    """Four instructions to a result: the last first. Integer sums have no order."""
    chains = [(file, key) for file, key in recorded() if key.endswith("/normal, comparable")]
    assert len(chains) == sum(instruction.d != "s32" for instruction in INSTRUCTIONS.values())
    for file, key in chains:
        assert tile_mismatches(file, key, backward=True) > 50, key


def test_recorded_tiles_are_reproduced_bit_for_bit() -> None:
    assert {f"{file}: {key}": count for file, key in recorded() if (count := tile_mismatches(file, key))} == {}


def test_recorded_tiles_refute_every_altered_feature() -> None:
    by_instruction: dict[tuple[str, str], list[str]] = {}
    for file, key in recorded():
        if INSTRUCTIONS[key.partition("/")[0]].d != "s32":
            by_instruction.setdefault((file, key.partition("/")[0]), []).append(key)
    missed = {}
    for (file, name), keys in by_instruction.items():
        path = DATAPATHS[INSTRUCTIONS[name].datapath]
        wanted = {a for a in ALTERATIONS if can_be_seen(a, path)}
        if unseen := wanted - refuted_by_tiles(file, keys):
            missed[name] = unseen
    assert missed == {}


def test_the_replay_of_tiles_reads_what_the_device_program_writes(tmp_path: Path) -> None:
    """One array made of the record itself: reproduced as it is, refuted when a bit or a feature is altered."""
    rng = np.random.default_rng(5)
    key = "wgmma_n64k32_f32_e4m3_e5m2/normal, zero"
    a, w = (rng.integers(0x28, 0x48, (1, 64, 32)).astype(np.uint8) for _ in range(2))
    a[..., ::2] |= 0x80
    c = np.zeros((1, 64, 64), np.uint32)
    d = emulate(Operand(a[0], E4M3FN), Operand(w[0], E5M2), DATAPATHS["hopper_wgmma_fp8"])[None]
    (tmp_path / "chip").mkdir()
    arrays: dict[str, Any] = {f"{key}/{letter}": x for letter, x in zip("awcd", (a, w, c, d), strict=True)}
    np.savez_compressed(tmp_path / "chip" / "wgmma_fp8.npz", **arrays)
    assert tile_mismatches("chip/wgmma_fp8.npz", key, root=tmp_path) == 0
    refuted = refuted_by_tiles("chip/wgmma_fp8.npz", [key], tmp_path)
    assert refuted >= {"one fraction bit less", "one output bit less", "floor for truncation"}
