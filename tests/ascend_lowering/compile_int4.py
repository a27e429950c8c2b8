"""Compile the Triton int4 kernels for chips that are not here and print their assembly, each text after a line `== CHIP.KERNEL`.

Decides: which kernels and chips. Refuses: to judge and to run; check_interpreted.py reads what this prints.

    python tests/ascend_lowering/compile_int4.py
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.kernels.triton_room import ascend_gemm_int4, ascend_int4_quantize

CHIPS = {"sm_90": (GPUTarget("cuda", 90, 32), "ptx"), "gfx942": (GPUTarget("hip", "gfx942", 64), "amdgcn")}
KERNELS = {
    "int4_quantize": (ascend_int4_quantize.int4_quantize, ascend_int4_quantize.signature("int4_quantize", bf16=True),
                      {"SMOOTH": 1, "IS_BF16": 1, "BLOCK_M": 32, "GROUPS": 4}),
    "int8_gemm": (ascend_gemm_int4.int8_gemm, ascend_gemm_int4.signature(bf16=True),
                  {"R": 0, "BIAS": 1, "IS_BF16": 1, "NATIVE": 1, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": 16}),
}


def main() -> int:
    """Print the assembly of every kernel for every chip."""
    for chip, (target, kind) in CHIPS.items():
        for name, (kernel, signature, fixed) in KERNELS.items():
            whole = {**signature, **dict.fromkeys(fixed, "constexpr")}
            pointers = [number for number, text in enumerate(signature.values()) if text.startswith("*")]
            source = ASTSource(kernel, signature=whole, constexprs=fixed,
                               attrs={(number,): [["tt.divisibility", 16]] for number in pointers})
            made = triton.compile(source, target=target, options=ascend_gemm_int4.OPTIONS)
            print(f"== {chip}.{name}\n{made.asm[kind]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
