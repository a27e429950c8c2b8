"""Compile the CuTe DSL kernel for chips that need not be present, keep what was generated, and write down what is in it.

    python compile_gemm.py --out DIR [--arch sm_100a,sm_103a] [--only NAME,...] [--variant VARIANT] [--nvdisasm PROGRAM]

Writes DIR/NAME.ARCH.{ptx,cubin,sass} and DIR/facts.json: a list of records, one for each instance and architecture, with the
fields of `Facts`. Judges nothing: the assertions on the facts are the session's. The variants `no_lora_mma` and
`no_block_scales` are kernels broken on purpose, which those assertions must reject.

sm_120a has no tcgen05 instructions, so this kernel does not exist there; CuTe DSL refuses it and the record says so.
Needs nvidia-cutlass-dsl; and nvdisasm, from PATH or from the wheel nvidia-cuda-nvdisasm or triton. Needs no GPU and no driver.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# CuTe DSL loads what it compiles for this architecture, which takes a driver; what --gpu-arch names besides is only compiled.
os.environ["CUTE_DSL_ARCH"] = "sm_100f"

import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as sm100

from lowbit.kernels.blackwell_room import cute_epilogue, cute_gemm, cute_load, cute_mma, cute_operands, schedule

VARIANTS = ("as_written", "no_lora_mma", "no_block_scales")
ARCHITECTURES = ("sm_100a", "sm_103a", "sm_120a")
TILE, BLOCK = 3, 2  # of which the coordinates are written down


@dataclass
class Facts:
    """What one compilation gave.

    `refused`: the sentence with which the compiler refused the architecture, else empty.
    `ptx_mma`: (kind, accumulator operand, number of loops around it) of each tcgen05.mma in order: a tile loop around a block
        loop is 2. `written`: how many instructions of PTX write each accumulator operand, so that 1 means one address.
    `descriptors`: the constant fields of the instruction descriptor of each tcgen05.mma (PTX ISA, tcgen05; `_fields`).
    `sass_mma`: (opcode, accumulator operand) of each matrix instruction in order. `sass_opcodes`: count of each opcode.
    `announced`: bytes of each expect_tx in PTX, in order. `tmem_columns`: columns that PTX allocates.
    `stage_bytes`: bytes of one stage of each operand in one CTA, by the layouts the kernel was traced with.
    `coordinates`: for each CTA of the cluster and each operand, where its tensor-map load for tile `TILE` and block `BLOCK`
        begins, as the kernel's own partition gives it when the rank is a Python integer: innermost coordinate first.
    `shared_bytes`: dynamic shared memory that the traced kernel took.
    `load_map`, `store_map`: (row, column) of the chunk that each register of some epilogue threads holds, by the copies the
        kernel was traced with. `scale_bytes`: (row, group, byte) of the traced layout of a 300 x 320 scale matrix.
    """

    name: str
    arch: str
    variant: str
    config: dict[str, Any]
    refused: str = ""
    registers: int = -1
    local_bytes: int = -1
    spills: int = -1
    shared_bytes: int = -1
    tmem_columns: int = -1
    ptx_mma: list[tuple[str, str, int]] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)
    descriptors: list[dict[str, int]] = field(default_factory=list)
    sass_mma: list[tuple[str, str]] = field(default_factory=list)
    sass_opcodes: dict[str, int] = field(default_factory=dict)
    announced: list[int] = field(default_factory=list)
    stage_bytes: list[int] = field(default_factory=list)
    coordinates: list[list[list[int]]] = field(default_factory=list)
    load_map: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    store_map: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    scale_bytes: list[tuple[int, int, int]] = field(default_factory=list)


SEEN: dict[str, Any] = {}


def watch() -> None:
    """Make the kernel's own functions write down, while they are traced, the layouts that they work with."""
    part, parts = cute_load._part, cute_load.parts
    allocate, chunk_copy = cute_gemm._allocate, cute_epilogue.chunk_copy
    layout, assume = cute_operands.scale_layout, cute.assume

    def part_seen(load: Any, buffer: Any, *rest: Any) -> Any:
        found = part(load, buffer, *rest)
        width = buffer.element_type.width
        SEEN.setdefault("stage_bytes", []).append(cute.size(found.target, mode=[0]) * width // 8)
        return found

    def parts_seen(loaded: Any, buffers: Any, mma: Any, rank: Any, config: Any) -> Any:
        SEEN["coordinates"] = [
            [[int(digit) for digit in each.source[(None, TILE, BLOCK)].iterator]
             for each in parts(loaded, buffers, mma, cta, config)]
            for cta in range(schedule.cluster_size(config))
        ]
        SEEN["stage_bytes"] = []
        return parts(loaded, buffers, mma, rank, config)

    def allocate_seen(memory: Any, *rest: Any) -> Any:
        found = allocate(memory, *rest)
        SEEN["shared_bytes"], SEEN["buffers"] = memory._allocated_bytes, found[0]
        return found

    def chunk_copy_seen(operation: Any, sums: Any) -> Any:
        found = chunk_copy(operation, sums)
        stores = operation is cute.nvgpu.tcgen05.St32x32bOp
        columns = cute.make_identity_tensor((schedule.CTA_ROWS, schedule.STORE_COLUMNS))
        for thread in (0, 1, 31, 32, 63, 64, 96, 127):
            piece = found.get_slice(thread)
            held = piece.partition_S(columns) if stores else piece.partition_D(columns)
            pairs = [tuple(held[i]) for i in range(schedule.STORE_COLUMNS)]
            SEEN.setdefault("store_map" if stores else "load_map", {})[thread] = pairs
        return found

    def layout_seen(rows: Any, k: Any) -> Any:
        cute.assume = lambda value, divby: value  # the sample below is made of Python integers
        sample = layout(300, 320)
        cute.assume = assume
        SEEN["scale_bytes"] = [
            (row, group, cute.crd2idx((((row % 32, row // 32 % 4), row // 128), ((0, group % 4), group // 4)), sample))
            for row in (0, 1, 31, 32, 96, 127, 128, 299) for group in (0, 1, 3, 4, 19)
        ]
        return layout(rows, k)

    for module, name, seen in (
        (cute_load, "_part", part_seen), (cute_gemm, "parts", parts_seen), (cute_gemm, "_allocate", allocate_seen),
        (cute_epilogue, "chunk_copy", chunk_copy_seen), (cute_operands, "scale_layout", layout_seen),
    ):
        setattr(module, name, seen)


def damage(variant: str) -> None:
    """Replace a function of the kernel by a faulty one."""
    if variant == "no_lora_mma":
        cute_mma.lora_block = lambda *operands: None
    if variant == "no_block_scales":
        cute_mma.main_block = _unscaled_block


def _unscaled_block(mma: Any, sums: Any, a: Any, w: Any, scales_a: Any, scales_w: Any, stage: Any, continues: Any) -> None:
    """The operand bytes of a K block multiplied as if they were 16-bit numbers: as many bytes, no scales."""
    config = SEEN["config"]
    product, number = cute_operands.products(config).lora, cute_operands.number_type(config)

    def seen(buffer: Any, make: Any) -> Any:
        layout = make(product, cute_operands.lora_tiler(config), number, config.main_stages)
        return cute.make_tensor(cute.recast_ptr(buffer.iterator, layout.inner, number), layout.outer)

    rows = product.make_fragment_A(seen(SEEN["buffers"][0], sm100.make_smem_layout_a))
    columns = product.make_fragment_B(seen(SEEN["buffers"][1], sm100.make_smem_layout_b))
    for step in range(schedule.LORA_BLOCK // schedule.LORA_STEP):
        product.set(cute.nvgpu.tcgen05.Field.ACCUMULATE, True if step else continues)
        cute.gemm(product, sums, rows[(None, None, step, stage)], columns[(None, None, step, stage)], sums)


def compile_one(config: schedule.Config, arch: str, variant: str, nvdisasm: str, out: Path) -> Facts:
    """Compile one instance, keep its files, and read them."""
    facts = Facts(config.name, arch, variant, asdict(config))
    SEEN.clear()
    SEEN["config"] = config
    with tempfile.TemporaryDirectory() as folder:
        try:
            cute_gemm.compile_gemm(config, f"--gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {folder}")
        except Exception as error:
            if "expects arch to be one of" not in str(error):
                raise
            facts.refused = str(error).splitlines()[0]
            return facts
        kept = {}
        for suffix in ("ptx", "cubin"):
            (found,) = Path(folder).glob(f"*.{suffix}")
            kept[suffix] = out / f"{config.name}.{arch}.{suffix}"
            shutil.copyfile(found, kept[suffix])
    sass = subprocess.run([nvdisasm, "-c", str(kept["cubin"])], capture_output=True, text=True, check=True).stdout
    (out / f"{config.name}.{arch}.sass").write_text(sass)
    for name in ("stage_bytes", "coordinates", "shared_bytes", "load_map", "store_map", "scale_bytes"):
        setattr(facts, name, SEEN[name])
    read_ptx(facts, kept["ptx"].read_text(errors="replace"))
    read_sass(facts, sass)
    read_cubin(facts, nvdisasm, kept["cubin"])
    return facts


def _fields(kind: str, word: int) -> dict[str, int]:
    """Formats (f16 kinds: f16 0, bf16 1, sum in f32 1; block-scaled kinds: e2m1 1, scales ue4m3 0), rows and columns."""
    if "block_scale" in kind:
        formats = {"a": word >> 7 & 7, "w": word >> 10 & 3, "scales": word >> 23 & 1}
        return {**formats, "n": (word >> 17 & 63) * 8, "m": (word >> 27 & 3) * 128}
    formats = {"a": word >> 7 & 7, "w": word >> 10 & 7, "sum": word >> 4 & 3}
    return {**formats, "n": (word >> 17 & 63) * 8, "m": (word >> 24 & 31) * 16}


def read_ptx(facts: Facts, text: str) -> None:
    """Matrix instructions with their accumulators and loops, announced bytes, allocated columns."""
    constants = {name: int(value) for name, value in re.findall(r"mov\.(?:b32|u32|s32)\s+(%r\d+), (\d+);", text)}
    # the descriptor of a block-scaled instruction also holds the place of its scales, which is merged in at run time
    words = constants | {name: int(value) for name, value in re.findall(r"or\.b32\s+(%r\d+), %r\d+, (\d+);", text)}
    lines = text.splitlines()
    labels = {found[1]: place for place, line in enumerate(lines) if (found := re.match(r"(\$L__BB\d+_\d+):", line))}
    branch = re.compile(r"\bbra\S*\s+(\$L__BB\d+_\d+);")
    branches = [(place, found[1]) for place, line in enumerate(lines) if (found := branch.search(line))]
    loops = {labels[target]: place for place, target in branches if labels[target] <= place}  # the last branch back ends a loop
    for place, line in enumerate(lines):
        if found := re.search(r"tcgen05\.mma\.cta_group::\d\.(\S+)\s+\[([^\]]+)\], \S+, \S+, (%r\d+)", line):
            facts.ptx_mma.append((found[1], found[2], sum(start <= place <= end for start, end in loops.items())))
            facts.descriptors.append(_fields(found[1], words[found[3]]))
    facts.written = {
        register: len(re.findall(rf"^\s*(?:@\S+\s+)?[a-z]\S*\s+{register},", text, re.MULTILINE))
        for _, register, _ in facts.ptx_mma
    }
    facts.announced = [constants[name] for name in re.findall(r"expect_tx\S*\s+_, \[[^\]]+\], (%r\d+);", text)]
    (columns,) = re.findall(r"tcgen05\.alloc\S*\s+\[[^\]]+\], (%r\d+);", text)
    facts.tmem_columns = constants[columns]


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")


def read_sass(facts: Facts, text: str) -> None:
    """Opcode counts, spills, and matrix instructions with their accumulator."""
    instructions = [(found[1], found[2]) for found in _INSTRUCTION.finditer(text)]
    facts.sass_opcodes = dict(sorted(Counter(opcode for opcode, _ in instructions).items()))
    facts.spills = sum(count for opcode, count in facts.sass_opcodes.items() if opcode.split(".")[0] in ("STL", "LDL"))
    facts.sass_mma = [
        (opcode, re.findall(r"tmem\[([^\]]+)\]", operands)[0])
        for opcode, operands in instructions if re.match(r"UTC\w*MMA", opcode)
    ]


def read_cubin(facts: Facts, nvdisasm: str, cubin: Path) -> None:
    """Registers and local memory of a thread, from the cubin's own resource record."""
    program = shutil.which("cuobjdump", path=f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise SystemExit("cuobjdump is not beside nvdisasm nor on PATH: install the wheel nvidia-cuda-cuobjdump")
    text = subprocess.run([program, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", text)
    facts.registers, facts.local_bytes = int(registers), int(stack) + int(local)


def find_nvdisasm() -> str:
    """nvdisasm from PATH, or from a wheel beside this interpreter."""
    places = []
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        places += [str(Path(root) / folder) for root in (spec.submodule_search_locations or ())] if spec else []
    found = shutil.which("nvdisasm", path=os.pathsep.join([os.environ["PATH"], *places]))
    if found is None:
        raise SystemExit("nvdisasm was not found: install the wheels nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump")
    return found


def main() -> None:
    """Compile what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default=",".join(ARCHITECTURES))
    parser.add_argument("--only", default="")
    parser.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0])
    parser.add_argument("--nvdisasm", default="")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only.split(",") if options.only else [config.name for config in schedule.CONFIGS]
    configs = {config.name: config for config in schedule.CONFIGS}
    if unknown := [name for name in names if name not in configs]:
        raise SystemExit(f"unknown instances {', '.join(unknown)}; there are: {', '.join(configs)}")
    watch()
    damage(options.variant)
    nvdisasm = options.nvdisasm or find_nvdisasm()
    facts = [
        compile_one(configs[name], arch, options.variant, nvdisasm, options.out)
        for arch in options.arch.split(",") for name in names
    ]
    (options.out / "facts.json").write_text(json.dumps([asdict(found) for found in facts], indent=1) + "\n")
    print(f"{len(facts)} compilations written to {options.out}", file=sys.stdout)


if __name__ == "__main__":
    main()
