"""The kernel of svdquant_quantize compiled for a device that need not be there, and what its PTX shows, as one line of JSON.

Decides: nothing; `check_interpreter.py` says what has to be in it. Run without TRITON_INTERPRET, in a process of its own.

    python tests/interpreter/compile_svdquant.py CAPABILITY VARIANT FAST
"""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.kernels.triton_room.blocks import NVFP4_RECIPES, flags
from lowbit.kernels.triton_room.svdquant_quantize import svdquant_kernel

__all__ = ["facts"]

_POINTERS = {"x": "*bf16", "smooth": "*i16", "inverse": "*fp32", "down": "*bf16", "q": "*u8", "act": "*fp32"}
_UNALIGNED = ("m", "rows", "splits", "q_words")


def facts(capability: int, variant: str, fast: int) -> dict[str, int]:
    """Counts of instructions in the PTX, and bytes of shared memory."""
    names = svdquant_kernel.arg_names
    constants = {
        "VARIANT": int(variant == "int4"), "FORMAT": 2, "NUNCHAKU": 0, "RULE": 4, **flags(NVFP4_RECIPES["svdquant"]),
        "SIZE": 64 if variant == "int4" else 16, "FAST": fast, "NATIVE": 1, "LORA_SMOOTHED": 0, "WRAP": 0, "GROUP": 256,
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
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    ptx = kernel.asm["ptx"]
    counted = {
        "ftz": r"\.ftz", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync",
        "approximate": r"(div\.(full|approx)|rcp\.approx)\.f32",
        "ieee": r"div\.rn\.f32", "fma": r"fma\.rn\.f32", "wide_offsets": r"(mul\.wide|mul\.lo\.s64|mad\.lo\.s64)",
    }
    return {name: len(re.findall(pattern, ptx)) for name, pattern in counted.items()} | {"shared": kernel.metadata.shared}


if __name__ == "__main__":
    print(json.dumps(facts(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
