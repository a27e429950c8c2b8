"""Assert on what `compile_gemm.py` generated: the instructions that the contract names, one accumulator, no spill, budgets kept.

    python check_disassembly.py FACTS.json... [--expect-fault WORDS]

Exit 0 where every record passes; 1 where one does not, with one sentence for each assertion that failed. With `--expect-fault`
(the kernels that were broken on purpose) exit 0 only where every record fails in a sentence that holds the words.
Everything asserted is derived here from the sizes of the problem, not taken from `schedule`, but for the index maps, which are
compared with the functions of `schedule` that the kernel traces, and the arrivals of the barriers, which are compared with the
programs that the barrier model runs. Needs no compiler and no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.kernels.blackwell_room import schedule
from lowbit.kernels.blackwell_room.roles import barrier_counts

__all__ = ["broken", "main"]

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory of one block, compute capability 10.0 and 10.3 (CUDA C++ Programming Guide)."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory of a multiprocessor (PTX ISA, tcgen05.alloc)."""
REGISTER_LIMIT = 255
"""Registers of one thread; 192 threads of as many stay below the 65,536 of a multiprocessor."""
SCALED = {"sm_100a": "4X", "sm_103a": "BLOCK16"}
"""How the disassembler writes scale_vec::4X, which is block16, in UTCOMMA."""

Record = dict[str, Any]


def _instructions(fact: Record) -> Iterator[tuple[bool, str]]:
    """Block-scaled MMA in the main loop, low-rank MMA after it, one accumulator."""
    config, tile = fact["config"], fact["config"]["tile"]
    kinds = [(kind, register, loops) for kind, register, loops in fact["ptx_mma"]]
    scaled = [mma for mma in kinds if mma[0].startswith("kind::mxf4nvf4.block_scale")]
    low_rank = [mma for mma in kinds if mma[0].startswith("kind::f16")]
    # 256 of K in instructions of 64; 64 ranks in instructions of 16
    yield len(scaled) == 4, f"block-scaled MMA: {len(scaled)} in PTX, expected 4, one for each 64 of a K block of 256"
    yield all(re.search(r"block16|scale_vec::4X", kind) for kind, _, _ in scaled), "block-scaled MMA without four scales per 64"
    yield all(loops == 2 for _, _, loops in scaled), "block-scaled MMA outside the loop over K blocks inside the loop over tiles"
    wanted = 4 if config["lora"] else 0
    yield len(low_rank) == wanted, f"low-rank MMA: {len(low_rank)} in PTX, expected {wanted}, one for each 16 of 64 ranks"
    yield all(loops == 2 for _, _, loops in low_rank), "low-rank MMA outside the loop over rank blocks inside the loop over tiles"
    yield len(kinds) == len(scaled) + len(low_rank), f"another MMA: {sorted({kind for kind, _, _ in kinds})}"
    order = [kind.startswith("kind::f16") for kind, _, _ in kinds]
    yield order == sorted(order), "a low-rank MMA stands before a block-scaled one"
    registers = {register for _, register, _ in kinds}
    yield len(registers) == 1, f"one accumulator: the MMAs write {sorted(registers)}"
    yield set(fact["written"].values()) == {1}, f"one accumulator: its address is written {fact['written']} times"
    machine = fact["sass_mma"]
    scale = SCALED[fact["arch"]]
    pair = ".2CTA" if tile["ctas"] == 2 else ""
    found = {opcode for opcode, _ in machine}
    yield f"UTCOMMA{pair}.{scale}" in found, f"block-scaled MMA in machine code: UTCOMMA{pair}.{scale}, found {sorted(found)}"
    yield (f"UTCHMMA{pair}" in found) == config["lora"], f"low-rank MMA in machine code: UTCHMMA{pair}, found {sorted(found)}"
    places = {operand for _, operand in machine}
    yield len(places) == 1, f"one accumulator: the machine code writes {sorted(places)}"


def _descriptors(fact: Record) -> Iterator[tuple[bool, str]]:
    """Formats and sizes in the instruction descriptors (PTX ISA, tcgen05, instruction descriptor)."""
    config, tile = fact["config"], fact["config"]["tile"]
    for (kind, _, _), fields in zip(fact["ptx_mma"], fact["descriptors"], strict=True):
        sizes = {"m": tile["m"], "n": tile["n"]}
        if kind.startswith("kind::f16"):
            number = {"f16": 0, "bf16": 1}[config["out"]]
            wanted = {"a": number, "w": number, "sum": 1, **sizes}
        else:
            wanted = {"a": 1, "w": 1, "scales": 0, **sizes}  # e2m1 both, ue4m3
        seen = {name: fields.get(name) for name in wanted}
        yield seen == wanted, f"instruction descriptor of {kind}: {seen}, expected {wanted}"


def _budgets(fact: Record) -> Iterator[tuple[bool, str]]:
    """Nothing spilled; registers, shared memory and tensor memory within the chip's, and as the schedule says."""
    config, tile = fact["config"], fact["config"]["tile"]
    rows_w = tile["n"] // tile["ctas"]
    main = [128 * 128, rows_w * 128, 128 * 16, tile["n"] * 16]  # codes of A and W, scales of A and W: 256 of K
    low_rank = [128 * 128, rows_w * 128] if config["lora"] else []  # 64 ranks of 2 bytes
    announced = [sum(main) * tile["ctas"], *([sum(low_rank) * tile["ctas"]] if low_rank else [])]
    own = schedule.Config(**(config | {"tile": schedule.Tile(**tile)}))
    yield fact["spills"] == 0, f"spills: {fact['spills']} moves to or from local memory"
    yield fact["local_bytes"] == 0, f"local memory: {fact['local_bytes']} bytes a thread"
    yield 0 < fact["registers"] <= REGISTER_LIMIT, f"registers: {fact['registers']} of {REGISTER_LIMIT}"
    yield 0 < fact["shared_bytes"] <= SHARED_LIMIT, f"shared memory: {fact['shared_bytes']} of {SHARED_LIMIT} bytes"
    yield fact["shared_bytes"] == schedule.smem_bytes(own), (
        f"shared memory: {fact['shared_bytes']} bytes taken, {schedule.smem_bytes(own)} accounted for")
    yield 0 < fact["tmem_columns"] <= TENSOR_COLUMNS, f"tensor memory: {fact['tmem_columns']} of {TENSOR_COLUMNS} columns"
    used = config["accumulators"] * tile["n"] + 16 + tile["n"] // 32 * 4
    yield fact["tmem_columns"] >= used, f"tensor memory: {fact['tmem_columns']} columns allocated, {used} used"
    yield fact["announced"] == announced, f"bytes announced: {fact['announced']}, loaded by a pair: {announced}"
    yield fact["stage_bytes"] == main + low_rank, f"bytes of a stage: {fact['stage_bytes']}, expected {main + low_rank}"


def _maps(fact: Record) -> Iterator[tuple[bool, str]]:
    """The copies and layouts that were traced against the index functions that the tests prove."""
    own = schedule.Config(**(fact["config"] | {"tile": schedule.Tile(**fact["config"]["tile"])}))
    for name, needed in (("load_map", True), ("store_map", own.lora)):
        threads = fact[name]
        yield bool(threads) or not needed, f"{name} was not traced"
        for thread, held in threads.items():
            wanted = [[schedule.row_index(0, 0, int(thread), own), schedule.column_index(0, 0, i, own)] for i in range(32)]
            yield held == wanted, f"{name}: thread {thread} holds {held[:2]}, expected {wanted[:2]}"
    yield bool(fact["scale_bytes"]), "scale_bytes was not traced"
    for row, group, byte in fact["scale_bytes"]:
        wanted_byte = schedule.scale_offset(row, group, 20)
        yield byte == wanted_byte, f"scale of row {row}, group {group}: byte {byte}, expected {wanted_byte}"


def _coordinates(fact: Record) -> Iterator[tuple[bool, str]]:
    """Where each CTA's loads for tile 3 and block 2 begin, as traced, against the functions that the tests prove."""
    own = schedule.Config(**(fact["config"] | {"tile": schedule.Tile(**fact["config"]["tile"])}))
    wanted = []
    for rank in range(own.cluster_m * own.cluster_n):
        a, w = (coordinates(3, rank, 2, own) for coordinates in (schedule.a_coordinates, schedule.w_coordinates))
        scales = (coordinates(3, rank, 2, own)[0] for coordinates in (schedule.scale_a_coordinates, schedule.scale_w_coordinates))
        main = [[a[2], a[0]], [w[2], w[0]], *([0, group, row] for row, group in scales)]  # innermost first: k, row
        wanted.append(main + ([[2 * 64, a[0]], [2 * 64, w[0]]] if own.lora else []))  # rank blocks of 64
    yield fact["coordinates"] == wanted, f"coordinates of the loads: {fact['coordinates']}, expected {wanted}"


def _barriers(fact: Record, ptx: str) -> Iterator[tuple[bool, str]]:
    """The arrivals with which the code sets up its barriers are those of the programs that the barrier model runs."""
    own = schedule.Config(**(fact["config"] | {"tile": schedule.Tile(**fact["config"]["tile"])}))
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx))
    found = Counter(int(constants[name]) for name in re.findall(r"mbarrier\.init\S*\s+\[[^\]]+\], (%r\d+);", ptx))
    wanted = Counter(count for name, count in barrier_counts(own, rescale=own.lora).items()
                     if name.endswith("@0") and not name.startswith("meet"))  # that one is a named barrier
    yield found == wanted, f"arrivals of the barriers: {dict(found)}, in the model {dict(wanted)}"


def broken(fact: Record, ptx: str) -> list[str]:
    """The assertions that a record, with its PTX, fails: one sentence each."""
    if fact["arch"] == "sm_120a":
        return [] if fact["refused"] else ["sm_120a was compiled, which has no tcgen05: what was generated is another kernel"]
    if fact["refused"]:
        return [f"the compiler refused it: {fact['refused']}"]
    checks = (
        *_instructions(fact), *_descriptors(fact), *_budgets(fact), *_maps(fact), *_coordinates(fact), *_barriers(fact, ptx),
    )
    return [sentence for kept, sentence in checks if not kept]


def main(arguments: list[str]) -> int:
    """Judge the records of the files and say what was found."""
    parser = argparse.ArgumentParser(description="Assert on what compile_gemm.py generated.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--expect-fault", default="", help="every record must fail, in a sentence that holds these words")
    chosen = parser.parse_args(arguments)
    facts: list[tuple[Record, str]] = [
        (fact, "" if fact["refused"] else (path.parent / f"{fact['name']}.{fact['arch']}.ptx").read_text(errors="replace"))
        for path in chosen.files for fact in json.loads(path.read_text(encoding="utf-8"))
    ]
    if not facts:
        print("nothing was compiled: there is no record to judge", file=sys.stderr)
        return 1
    wrong = 0
    for fact, ptx in facts:
        sentences, label = broken(fact, ptx), f"{fact['name']} {fact['arch']} {fact['variant']}"
        if chosen.expect_fault:
            caught = any(chosen.expect_fault in sentence for sentence in sentences)
            wrong += not caught
            print(f"{label}: {'rejected, as it must be: ' + sentences[0] if caught else 'NOT REJECTED'}")
            continue
        wrong += bool(sentences)
        for sentence in sentences:
            print(f"{label}: {sentence}", file=sys.stderr)
    compiled = [fact for fact, _ in facts if not fact["refused"]]
    if not chosen.expect_fault and compiled:
        most = {name: max(fact[name] for fact in compiled) for name in ("registers", "shared_bytes", "tmem_columns")}
        print(f"{len(compiled)} compilations, {len(facts) - len(compiled)} refused by the compiler; up to {most['registers']} "
              f"registers, {most['shared_bytes']} bytes of shared memory, {most['tmem_columns']} columns of tensor memory; "
              "compiled, never executed on a device")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
