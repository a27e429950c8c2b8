"""Compile the Triton GEMMs for sm_80, sm_89 and sm_90, which need not be here, with the tiles of the dispatch, and assert the
instructions that came out.

Decides: which builds are made (`BUILDS`) and what each must contain in PTX: the matrix instruction of its operands, on sm_90 on
the warp-group path and none of the narrower one, the rounding that its declaration names, and no more shared memory or registers
than a multiprocessor has; where weights are to be decoded behind matrix instructions, that ptxas lets them overlap; on sm_90, for
which the tiles were tuned, no register is spilled either (on the others spills are printed: nothing says that these tiles are
fast there). Refuses: to run anything. Prints the facts of every build and ends with 1 where an assertion failed, 0 otherwise.

    python tests/interpreter/compile_gemms.py [--json F]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from machine_code import disturbed
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lowbit.kernels.triton_room import gemm_16bit, gemm_int4, gemm_nvfp4, gemm_w4a8_int8, gemm_w4a16, gemm_w8a8_fp8
from lowbit.kernels.triton_room.gemm_tiles import OPTIONS
from lowbit.kernels.triton_room.machine import MACHINES, Machine

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
AMPERE, ADA, HOPPER = MACHINES[8, 0], MACHINES[8, 9], MACHINES[9, 0]
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Capability -> bytes of one block (CUDA C++ Programming Guide, technical specifications per compute capability)."""


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation. `wants` and `lacks`: expressions over PTX. `capability`: 10 major + minor. `overlaps`: ptxas is to leave
    matrix instructions in flight where the PTX does. Pointers, sizes and strides are multiples of 16, as the run-time finds them
    on ordinary shapes."""

    kernel: Any
    signature: Mapping[str, str]
    meta: Mapping[str, Any]
    warps: int
    stages: int
    wants: tuple[str, ...]
    lacks: tuple[str, ...]
    capability: int
    overlaps: bool


def capability_of(machine: Machine) -> int:
    return next(10 * major + minor for (major, minor), known in MACHINES.items() if known is machine)


def unit(total: str, operand: str, depth: int, machine: Machine) -> str:
    """The matrix instruction for operands of one type and sums of another."""
    if machine is HOPPER:
        return rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k{depth}\.{total}\.{operand}\.{operand}"
    return rf"mma\.sync\.aligned\.m16n8k{depth}\.row\.col(?:\.satfinite)?\.{total}\.{operand}\.{operand}\.{total}"


def build(
    kernel: Any, signature: Mapping[str, str], meta: Mapping[str, Any], shape: Any, machine: Machine, wants: tuple[str, ...],
    *, copied: bool = False, overlaps: bool = False,
) -> Build:
    """`copied`: on sm_90 tiles come by the copy engine. `overlaps`: as in Build, on sm_90."""
    if machine is HOPPER:
        lacks, wants = (r"mma\.sync",), (*wants, r"cp\.async\.bulk\.tensor") if copied else wants
    else:
        lacks = (r"wgmma",)
    overlaps = overlaps and machine is HOPPER
    return Build(kernel, signature, meta, shape.warps, shape.stages, wants, lacks, capability_of(machine), overlaps)


def w8a8(
    kind: str, tile: str, machine: Machine = HOPPER, *, promoted: bool = False, fnuz: bool = False, blocked: bool = False,
) -> Build:
    shape = gemm_w8a8_fp8.TILES[tile]
    meta = gemm_w8a8_fp8.meta(
        out="bf16", unit=kind, fnuz=fnuz, blocked=blocked, per_token=True, per_channel=True, promoted=promoted, bias="bias",
        described=True, fault="", tile=shape)
    signature = gemm_w8a8_fp8.signature(kind, "bf16", fnuz=fnuz, described=True, tile=shape)
    wants = unit("f32", "e4m3", 32, machine) if kind == "fp8" else unit("f32", "f16", 16, machine)
    return build(gemm_w8a8_fp8.w8a8_gemm, signature, meta, shape, machine, (wants,), copied=True)


def dense(rank: int, shape: gemm_16bit.Tile, epilogue: str, machine: Machine = HOPPER) -> Build:
    meta = gemm_16bit.meta(rank=rank, epilogue=epilogue, alpha=rank > 0, bias="bias", operands_bf16=True, bf16=True, native=True,
                           described=True, fault="", tile=shape)
    signature = gemm_16bit.signature(operands_bf16=True, described=True, tile=shape)
    wants = (unit("f32", "bf16", 16, machine),)
    return build(gemm_16bit.gemm_16bit, signature, meta, shape, machine, wants, copied=True, overlaps=True)


def nvfp4_fused(machine: Machine = HOPPER) -> Build:
    shape = gemm_nvfp4.FUSED
    meta = gemm_nvfp4.meta(rank=32, epilogue="svdquant", bias="bias", bf16=False, native=True, fault="", tile=shape)
    wants = tuple(unit("f32", operand, 16, machine) for operand in ("bf16", "f16"))
    return build(gemm_nvfp4.fused_gemm, gemm_nvfp4.signature(), meta, shape, machine, wants)


def int4(kind: str, machine: Machine = HOPPER) -> Build:
    shape = gemm_int4.TILE
    meta = gemm_int4.meta(
        rank=128, half=False, bias=True, bf16=False, native=True, unit=kind, described=True, fault="", tile=shape)
    main = unit("f32", "e4m3", 32, machine) if kind == "fp8" else unit("s32", "s8", 32, machine)
    wants = (main, unit("f32", "f16", 16, machine), r"fma\.rn\.f32")
    return build(gemm_int4.int4_gemm, gemm_int4.signature(kind, described=True, tile=shape), meta, shape, machine, wants)


def w4a16(m: int, machine: Machine = HOPPER, *, bf16: bool, g: int = 128, described: bool = True) -> Build:
    shape = replace(gemm_w4a16.tile_of(m, machine), described=described)
    splits = gemm_w4a16.splits_of(m, 14336, 12288, machine)
    meta = gemm_w4a16.meta(splits=splits, variant="zp", k=12288, g=g, bias="nobias", bf16=bf16, native=True,
                           ptx=gemm_w4a16.dialect(machine), described=shape.described, fault="", tile=shape)
    kind = "bf16" if bf16 else "f16"
    # the weight is rounded once, by the multiplication of its format, and on sm_90 comes from registers
    wants: tuple[str, ...] = (unit("f32", kind, 16, machine), rf"mul\.(?:rn\.)?{kind}(?:x2)?\s", r"lop3\.b32")
    if machine is HOPPER:
        wants = (*wants, r"cp\.async\.ca\.shared\.global")
    signature = gemm_w4a16.signature(bf16=bf16, described=shape.described, splits=splits, tile=shape)
    return build(gemm_w4a16.w4a16_gemm, signature, meta, shape, machine, wants, overlaps=True)


def w4a8(machine: Machine = HOPPER) -> Build:
    shape = gemm_w4a8_int8.tile_of(1024, machine)
    meta = gemm_w4a8_int8.meta(whole=True, via_f16=False, bias=True, bf16=True, native=True, fault="", tile=shape)
    wants = (unit("s32", "s8", 32, machine), r"fma\.rn\.f32")
    return build(gemm_w4a8_int8.w4a8_gemm, gemm_w4a8_int8.signature(), meta, shape, machine, wants)


BUILDS = {
    "w8a8 fast, low": w8a8("fp8", "low"), "w8a8 fast, wide": w8a8("fp8", "wide"), "w8a8 fast, narrow": w8a8("fp8", "narrow"),
    "w8a8 promoted": w8a8("fp8", "promoted", promoted=True), "w8a8 block": w8a8("fp8", "blocked", blocked=True),
    "w8a8 fnuz as f16": w8a8("f16", "decoded", fnuz=True),
    "nvfp4 decoded": dense(128, gemm_16bit.tile_of(4352, HOPPER), "svdquant"), "nvfp4 fused": nvfp4_fused(),
    "int4 as int8": int4("int8"), "int4 as e4m3": int4("fp8"), "int4 fused": int4("packed"),
    "w4a16 one row": w4a16(1, bf16=True), "w4a16 32 rows": w4a16(32, bf16=True), "w4a16 64 rows": w4a16(64, bf16=False),
    "w4a16 128 rows": w4a16(128, bf16=False), "w4a16 512 rows": w4a16(512, bf16=True),
    "w4a16 by pointers": w4a16(64, bf16=True, described=False),
    "w4a16 by pointers, one group": w4a16(64, bf16=True, g=12288, described=False),
    "w4a16 groups of 32": w4a16(512, bf16=False, g=32), "w4a16 decoded": dense(0, gemm_w4a16.DECODED, "plain"), "w4a8": w4a8(),
    # sm_80 has no e4m3 unit; tiles are those of sm_90
    "w8a8 as f16, sm_80": w8a8("f16", "decoded", AMPERE),
    "nvfp4 decoded, sm_80": dense(32, gemm_16bit.tile_of(4352, AMPERE), "svdquant", AMPERE),
    "nvfp4 fused, sm_80": nvfp4_fused(AMPERE), "int4 as int8, sm_80": int4("int8", AMPERE),
    "int4 fused, sm_80": int4("packed", AMPERE), "w4a16 64 rows, sm_80": w4a16(64, AMPERE, bf16=False),
    "w4a8, sm_80": w4a8(AMPERE),
    "w8a8 fast, low, sm_89": w8a8("fp8", "low", ADA), "w8a8 fast, narrow, sm_89": w8a8("fp8", "narrow", ADA),
    "w8a8 fast, wide, sm_89": w8a8("fp8", "wide", ADA), "w8a8 block, sm_89": w8a8("fp8", "blocked", ADA, blocked=True),
    "nvfp4 decoded, sm_89": dense(32, gemm_16bit.tile_of(4352, ADA), "svdquant", ADA), "nvfp4 fused, sm_89": nvfp4_fused(ADA),
    "int4 as e4m3, sm_89": int4("fp8", ADA), "w4a16 512 rows, sm_89": w4a16(512, ADA, bf16=False), "w4a8, sm_89": w4a8(ADA),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What came out of one compilation. `missing`: what an assertion found wrong."""

    name: str
    capability: int
    registers: int
    spills: int
    shared_bytes: int
    missing: tuple[str, ...]


def listed(tool: str, cubin: bytes, *options: str) -> str:
    """What a tool of the Triton wheel prints of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def serialised(ptx: str, capability: int) -> bool:
    """Whether ptxas says (C7510 and its kin) that it makes the matrix instructions of a kernel wait for one another."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        said = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}a", source, "-o", Path(folder, "kernel.cubin")],
            check=True, capture_output=True, text=True)
    return "instructions are serialized" in said.stdout + said.stderr


def compiled(name: str, build: Build) -> Facts:
    names = build.kernel.arg_names
    source = ASTSource(
        fn=build.kernel, signature={n: build.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in build.meta.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, kind in build.signature.items() if "desc" not in kind},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, **OPTIONS}
    found = triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)
    ptx, cubin = found.asm["ptx"], found.asm["cubin"]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", listed("nvdisasm", cubin)))
    used = re.search(r"REG:(\d+)", listed("cuobjdump", cubin, "-res-usage"))
    missing = [f"{want} in PTX" for want in build.wants if not re.search(want, ptx)]
    missing += [f"{lack} is in PTX" for lack in build.lacks if re.search(lack, ptx)]
    missing += [f"{found.metadata.shared} bytes of shared memory"] if found.metadata.shared > SHARED[build.capability] else []
    missing += [f"{spills} loads and stores of spilled registers"] if spills and build.capability == 90 else []
    missing += ["matrix instructions in flight"] if build.overlaps and serialised(ptx, build.capability) else []
    early = disturbed(listed("cuobjdump", cubin, "-sass")) if build.capability == 90 else []
    missing += [f"a wait before {early[0]} and {len(early) - 1} more"] if early else []
    return Facts(name, build.capability, int(used[1]) if used else 0, spills, found.metadata.shared, tuple(missing))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    facts = [compiled(name, build) for name, build in BUILDS.items()]
    for found in facts:
        print(f"{found.name:<24} {found.registers:>3} registers, {found.spills:>2} spills, {found.shared_bytes:>6} bytes shared"
              + "".join(f"; MISSING {what}" for what in found.missing))
    chips = ", ".join(f"sm_{capability}" for capability in SHARED)
    print(f"{len(facts)} builds for {chips}: compiled, not executed here")
    if given.json:
        given.json.write_text(json.dumps([asdict(found) for found in facts]), encoding="utf-8")
    return int(any(found.missing for found in facts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
