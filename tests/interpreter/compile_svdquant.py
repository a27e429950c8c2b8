"""The kernel of svdquant_quantize compiled for a device that need not be there, and what its PTX and its machine code
show, as one line of JSON.

Decides: nothing; `check_interpreter.py` says what has to be in it. Run without TRITON_INTERPRET, in a process of its own.

    python tests/interpreter/compile_svdquant.py CAPABILITY VARIANT FAST
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.kernels.triton_room.blocks import NVFP4_RECIPES, flags
from lowbit.kernels.triton_room.svdquant_quantize import svdquant_kernel

__all__ = ["facts", "loops"]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_POINTERS = {"x": "*bf16", "smooth": "*i16", "inverse": "*fp32", "down": "*bf16", "q": "*u8", "act": "*fp32"}
_UNALIGNED = ("m", "rows", "splits", "q_stride")


def loops(cubin: bytes) -> list[list[str]]:
    """Opcodes, with their suffixes, of each innermost loop of a kernel in machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    for line in listed.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            opcodes.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and labels.get(back[1], len(opcodes)) < len(opcodes) - 1:
                found.append((labels[back[1]], len(opcodes)))
    return [opcodes[first:end] for first, end in found
            if not any(first <= a and b <= end and (a, b) != (first, end) for a, b in found)]


def facts(capability: int, variant: str, fast: int) -> dict[str, int]:
    """Counts of instructions in the PTX, bytes of shared memory, and of the loop that quantises by near quotients, 0 without one:
    instructions for 64 elements, four rows of 16, and those of them that pass shared or local memory, or wait."""
    names = svdquant_kernel.arg_names
    constants = {
        "VARIANT": int(variant == "int4"), "FORMAT": 2, "NUNCHAKU": 0, "RULE": 4, **flags(NVFP4_RECIPES["svdquant"]),
        "SIZE": 64 if variant == "int4" else 16, "FAST": fast, "NATIVE": 1, "LORA_SMOOTHED": 0, "WRAP": 0,
        "PTX": 1 if capability < 86 else 2, "EVEN": 1, "GROUP": 256,
        "ROWS": 64, "RANKS": 32, "DEPTH": 64, "HEIGHT": 32, "WIDTH": 64,
    }
    pointers = {**_POINTERS, "scales": "*i16" if variant == "int4" else "*u8"}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names)
               if name not in constants and name not in _UNALIGNED}
    source = ASTSource(
        fn=svdquant_kernel, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                            options={"enable_fp_fusion": False, "maxnreg": 96})
    ptx = kernel.asm["ptx"]
    counted = {
        "ftz": r"\.ftz", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync",
        "approximate": r"(div\.(full|approx)|rcp\.approx(\.ftz)?)\.f32",
        "ieee": r"div\.rn\.f32", "fma": r"fma\.rn\.f32", "wide_offsets": r"(mul\.wide|mul\.lo\.s64|mad\.lo\.s64)",
    }
    quantising = [loop for loop in loops(kernel.asm["cubin"]) if "MUFU.RCP" in loop and not any("CALL" in op for op in loop)]
    loop = max(quantising, key=len, default=[])
    detours = [op for op in loop if op.startswith(("LDS", "STS", "LDL", "STL", "BAR"))]
    return {name: len(re.findall(pattern, ptx)) for name, pattern in counted.items()} | {
        "shared": kernel.metadata.shared, "loop": len(loop), "detours": len(detours)}


if __name__ == "__main__":
    print(json.dumps(facts(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
