"""Compile the Triton gemm_nvfp4 for chips that are not here, and assert the instructions that came out.

Decides: which builds are made (`BUILDS`) and what each must and must not contain, in PTX and in the machine code: the
block-scaled MMA in the main loop, the low-rank MMA, one accumulator for both, no spilled register, and budgets of registers,
shared memory and tensor memory within the chip's. Refuses: to run anything; no device is asked for. Prints the facts of every
build and ends with 1 where an assertion failed, 0 otherwise.

    python tests/blackwell/compile_triton.py [--json F] [--only NAME,...] [--without scales|lora]

`--without` builds a variant that lacks its block scales or its low-rank product, under the same assertions: they must then fail.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.conformance.backend import Problem
from lowbit.kernels.triton_room.blackwell_gemm_nvfp4 import OPTIONS, TILES, UNITS, Tile, Unit, meta, nvfp4_gemm, signature

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SCALED_TCGEN05 = r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(?:block16|scale_vec::4X)\s"
SCALED_MMA = r"mma\.sync\.aligned\.m16n8k64\S*\.kind::mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\.f32\.ue4m3\s"
BF16_WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16\s"
HALF_TCGEN05 = r"tcgen05\.mma\.cta_group::1\.kind::f16\s"


@dataclass(frozen=True, slots=True)
class Chip:
    """Budgets of one block of threads (CUDA C++ Programming Guide, compute capabilities) and the instructions of the chip.
    `main`, `low_rank` and `scales` are expressions over PTX; `machine` over the disassembly: (main, low rank). `scales` is what
    multiplies by the block scales where the MMA does not."""

    capability: int
    shared_bytes: int
    main: str
    low_rank: str
    machine: tuple[str, str]
    tensor_columns: int = 0  # columns of tensor memory, of 128 lanes x 32 bits each; PTX ISA, tcgen05.alloc
    registers: int = 255  # per thread
    scales: str = ""


DATA_CENTRE = Chip(100, 227 << 10, SCALED_TCGEN05, HALF_TCGEN05, (r"UTCOMMA\.4X", r"UTCHMMA"), 512)
CHIPS = {
    "sm_100": DATA_CENTRE,
    "sm_103": replace(DATA_CENTRE, capability=103, machine=(r"UTCOMMA\.BLOCK16", r"UTCHMMA")),
    "sm_120": Chip(120, 99 << 10, SCALED_MMA, r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.(?:bf16\.bf16|f16\.f16)\.f32\s",
                   (r"OMMA\.SF\.16864\S*\.4X", r"HMMA\.16816")),
    # Hopper has no block scales: the operands become bf16 and both products are the same instruction
    "sm_90": Chip(90, 227 << 10, BF16_WGMMA, BF16_WGMMA, (r"HGMMA\.64x\d+x16\.F32\.BF16",) * 2, scales=r"mul\.rn\.bf16x2\s"),
}


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation. `nodes`: MMA instructions of the main product in the loop body, at least."""

    chip: str
    variant: str
    out: str
    rank: int
    bias: str
    swizzled: bool
    tile: Tile
    unit: Unit
    nodes: int

    @property
    def problem(self) -> Problem:
        """A problem of this build; its sizes are run-time arguments and decide nothing."""
        options = (("out", self.out), ("lora", "lora" if self.rank else "nolora"), ("bias", self.bias))
        return Problem("gemm_nvfp4", self.variant, (("m", 4352), ("n", 3072), ("k", 3840), ("r", self.rank)), options)


_BLACKWELL, _TILE, _SMALL = UNITS["blackwell"], TILES["default"], TILES["small"]
BUILDS = {
    "sm_100.svdquant.bf16.swizzled": Build("sm_100", "svdquant", "bf16", 128, "bias", True, _TILE, _BLACKWELL, 4),
    "sm_100.svdquant.f16.plain": Build("sm_100", "svdquant", "f16", 256, "bias", False, _TILE, _BLACKWELL, 4),
    "sm_100.nunchaku.bf16.swizzled": Build("sm_100", "nunchaku", "bf16", 128, "bias", True, _TILE, _BLACKWELL, 4),
    "sm_100.plain.f16.swizzled": Build("sm_100", "plain", "f16", 0, "bias", True, _TILE, _BLACKWELL, 4),
    "sm_103.svdquant.bf16.swizzled": Build("sm_103", "svdquant", "bf16", 128, "bias", True, _TILE, _BLACKWELL, 4),
    "sm_120.svdquant.bf16.swizzled": Build("sm_120", "svdquant", "bf16", 128, "bias", True, _SMALL, _BLACKWELL, 16),
    "sm_90.svdquant.bf16.plain": Build("sm_90", "svdquant", "bf16", 128, "bias", False, _SMALL, UNITS["hopper"], 8),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What came out of one compilation. `spills`: instructions that move a register to or from local memory."""

    name: str
    instructions: Mapping[str, int]
    registers: int
    spills: int
    shared_bytes: int
    tensor_columns: int
    accumulators: tuple[str, ...]
    missing: tuple[str, ...]


def disassembly(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that the Triton wheel carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "nvdisasm", file.name], check=True, capture_output=True, text=True).stdout


def in_loops(ptx: str, expression: str) -> int:
    """Instructions that lie between a label and a later branch back to it."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.MULTILINE)}
    branches = [(labels[match[1]], match.start()) for match in re.finditer(r"\bbra(?:\.uni)?\s+(\$L__BB\d+_\d+)", ptx)]
    loops = [(first, last) for first, last in branches if first < last]
    return sum(any(first < match.start() < last for first, last in loops) for match in re.finditer(expression, ptx))


def registers(cubin: bytes) -> int:
    """Registers per thread, as the assembler recorded them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+)", text)
    assert found, text
    return int(found[1])


def compiled(build: Build, *, scaled: bool) -> Any:
    """The compiled kernel of Triton, from the source alone. Pointers are promised to be multiples of 16 bytes."""
    fixed = meta(build.problem, build.unit, build.tile, swizzled_scales=build.swizzled, scaled=scaled)
    pointers = [number for number, kind in enumerate(signature().values()) if kind.startswith("*")]
    source = ASTSource(
        nvfp4_gemm, signature={**signature(), **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed,
        attrs={(number,): [["tt.divisibility", 16]] for number in pointers},
    )
    options = {"num_warps": build.tile.warps, "num_stages": build.tile.stages, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", CHIPS[build.chip].capability, 32), options=options)


def facts(name: str, build: Build, *, without: str = "") -> Facts:
    """Compile and look. `missing` lists every assertion that failed, in words."""
    chip = CHIPS[build.chip]
    made = replace(build, variant="plain", rank=0) if without == "lora" else build
    kernel = compiled(made, scaled=without != "scales")
    ptx, code = kernel.asm["ptx"], disassembly(kernel.asm["cubin"])
    looped, low_rank = in_loops(ptx, chip.main), len(re.findall(chip.low_rank, ptx))
    accumulators = {kind: re.findall(expression + r"\[\s*(%r\d+ \+ \d+)\s*\]", ptx)
                    for kind, expression in (("main", chip.main), ("low_rank", chip.low_rank))}
    written = tuple(sorted({place for places in accumulators.values() for place in places}))
    used, spills = registers(kernel.asm["cubin"]), len(re.findall(r"\b(?:LDL|STL)\b", code))
    columns = int(getattr(kernel.metadata, "tmem_size", 0) or 0)
    needed = -(-build.rank // 16) + (build.nodes if chip.main == chip.low_rank else 0)  # an MMA of 16-bit operands takes 16 of R
    fused = fma_fault(ptx, made)
    checks = {
        f"MMA of the main product in a loop: {looped}, at least {build.nodes}": looped >= build.nodes,
        f"block scales in PTX: {chip.scales or 'by the MMA'}": bool(re.search(chip.scales, ptx)),
        f"{chip.machine[0]} in the machine code": bool(re.search(chip.machine[0], code)),
        f"MMA of the low-rank product in PTX: {low_rank}, at least {needed}": not build.rank or low_rank >= needed,
        f"{chip.machine[1]} in the machine code": not build.rank or bool(re.search(chip.machine[1], code)),
        f"one accumulator for both products, got {written}":
            not chip.tensor_columns or (len(written) == 1 and (not build.rank or all(accumulators.values()))),
        f"declared FMA: {fused}": not fused,
        f"no spilled register: {spills} moves to or from local memory": not spills,
        f"registers: {used} of {chip.registers}": used <= chip.registers,
        f"shared memory: {kernel.metadata.shared} of {chip.shared_bytes} bytes": kernel.metadata.shared <= chip.shared_bytes,
        f"tensor memory: {columns} of {chip.tensor_columns} columns": columns <= chip.tensor_columns,
    }
    pattern = r"\b(?:UTC[A-Z]*MMA(?:\.4X|\.BLOCK16)?|OMMA\.SF\S*|HMMA\.\d+\S*|HGMMA\.\S+|STL|LDL)"
    return Facts(name, dict(sorted(Counter(re.findall(pattern, code)).items())), used, spills, kernel.metadata.shared, columns,
                 written, tuple(text for text, good in checks.items() if not good))


def fma_fault(ptx: str, build: Build) -> str:
    """What is wrong with the fused multiplications of the epilogue; empty where they are those that the kernel declares."""
    wanted = {"svdquant": {"f32"}, "nunchaku": {build.out}}.get(build.variant, set()) if build.bias == "bias" else set()
    found = {match[1] for match in re.finditer(r"\bfma\.rn\.(?:ftz\.)?(f32|f16|bf16)(?:x2)?\s", ptx)}
    return "" if found == wanted else f"FMA in {sorted(wanted) or 'no format'}, got {sorted(found) or 'none'}"


def main(arguments: list[str]) -> int:
    """Compile the builds, print their facts, end with 1 where an assertion failed."""
    parser = argparse.ArgumentParser(description="Compile the Triton gemm_nvfp4 without a device and assert its instructions.")
    parser.add_argument("--only", default="", help="names of builds, comma separated; default: all")
    parser.add_argument("--without", choices=("scales", "lora"), default="", help="a variant that the assertions must refuse")
    parser.add_argument("--json", type=Path, help="file for the facts")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",") if chosen.only else list(BUILDS)
    if unknown := [name for name in names if name not in BUILDS]:
        parser.error(f"got the builds {', '.join(unknown)}, expected some of {', '.join(BUILDS)}")
    found = []
    for name in names:
        row = facts(name, BUILDS[name], without=chosen.without)
        found.append(row)
        print(f"{name}: {', '.join(f'{count} {text}' for text, count in row.instructions.items())}; {row.registers} registers, "
              f"{row.spills} spills, {row.shared_bytes} B shared, {row.tensor_columns} tensor memory columns")
        for text in row.missing:
            print(f"  FAILED {text}")
    print(f"compiled, never executed on a device: {len(found)} builds by triton {triton.__version__}, "
          f"{sum(bool(row.missing) for row in found)} of them fail an assertion")
    if chosen.json:
        record = {"triton": triton.__version__, "builds": [asdict(row) for row in found]}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(row.missing for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
