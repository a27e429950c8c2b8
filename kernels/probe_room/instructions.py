"""The matrix instructions of Hopper that are probed, as records, and the PTX of each.

Decides: shape, operand and accumulator types of every probed instruction, its PTX spelling (PTX ISA 9.2, wgmma.mma_async and
mma), and which opcode its machine code must show.
Refuses: instructions of other architectures, sparse forms, and transposed or register operands of wgmma: A and B are K-major
in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INSTRUCTIONS", "TYPES", "Instruction", "Type", "wgmma_of"]


@dataclass(frozen=True, slots=True)
class Type:
    """An operand or accumulator type of PTX."""

    ptx: str
    format: str  # the encoding of one element, by the suite's name
    size: int  # bytes of one element


TYPES: dict[str, Type] = {
    kind.ptx: kind
    for kind in (
        Type("e4m3", "e4m3fn", 1), Type("e5m2", "e5m2", 1), Type("s8", "int8", 1), Type("u8", "uint8", 1), Type("f16", "f16", 2),
        Type("bf16", "bf16", 2), Type("tf32", "f32", 4), Type("f32", "f32", 4), Type("s32", "int32", 4),
    )
}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. Tiles are A [m, k], W [n, k] (both K-contiguous), C and D [m, n]: D = A W^T + C."""

    unit: str  # "wgmma": 128 threads, A and B in shared memory; "mma": 32 threads, everything in registers
    m: int
    n: int
    k: int
    a: str  # PTX types
    b: str
    d: str  # of C and D
    satfinite: bool = False

    @property
    def name(self) -> str:
        """Identifier of the instruction here: unit_nN_kK_d_a_b, the n of mma.sync left out."""
        shape = f"n{self.n}k{self.k}" if self.unit == "wgmma" else f"k{self.k}"
        return "_".join((self.unit, shape, self.d, self.a, self.b, *(["satfinite"] * self.satfinite)))

    @property
    def registers(self) -> int:
        """32-bit registers of the accumulator per thread."""
        return self.m * self.n * TYPES[self.d].size // (4 * self.threads)

    @property
    def threads(self) -> int:
        """Threads that execute one instruction together."""
        return 128 if self.unit == "wgmma" else 32

    @property
    def datapath(self) -> str:
        """Name of the suite's datapath record that predicts it."""
        half = "_f16" if self.d == "f16" else ""
        if self.d == "s32":
            return "imma_s32_satfinite" if self.satfinite else "imma_s32"
        if self.a in ("e4m3", "e5m2"):
            return ("hopper_wgmma_fp8" if self.unit == "wgmma" else "hopper_mma_fp8") + half
        if self.a == "tf32":
            return "hopper_tf32_k4" if self.k == 4 else "hopper_tf32"
        return f"hopper_{self.a}{half}"

    @property
    def opcode(self) -> str:
        """Opcode of Hopper's machine code. mma.sync on fp8 has none of its own there: operands become f16 for HMMA."""
        integer, narrow = self.d == "s32", self.a in ("e4m3", "e5m2")
        if self.unit == "wgmma":
            return "IGMMA" if integer else "QGMMA" if narrow else "HGMMA"
        return "IMMA" if integer else "HMMA"

    @property
    def ptx(self) -> str:
        """The instruction and its qualifiers, without operands."""
        shape = f"m{self.m}n{self.n}k{self.k}"
        clamp = ".satfinite" if self.satfinite else ""
        if self.unit == "wgmma":
            return f"wgmma.mma_async.sync.aligned.{shape}{clamp}.{self.d}.{self.a}.{self.b}"
        return f"mma.sync.aligned.{shape}.row.col{clamp}.{self.d}.{self.a}.{self.b}.{self.d}"


_FP8 = tuple((a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2"))
_INT8 = tuple((a, b) for a in ("s8", "u8") for b in ("s8", "u8"))


def wgmma_of(n: int) -> tuple[Instruction, ...]:
    """Every probed wgmma with n columns (a multiple of 8 up to 256; of 16 above 32 for the integer ones)."""
    return (
        *(Instruction("wgmma", 64, n, 32, a, b, d) for a, b in _FP8 for d in ("f32", "f16")),
        *(Instruction("wgmma", 64, n, 16, kind, kind, d) for kind, d in (("bf16", "f32"), ("f16", "f32"), ("f16", "f16"))),
        Instruction("wgmma", 64, n, 8, "tf32", "tf32", "f32"),
        *(Instruction("wgmma", 64, n, 32, a, b, "s32", clamp) for a, b in _INT8 for clamp in (False, True)),
    )


_MMA = (
    *(Instruction("mma", 16, 8, 32, a, b, d) for a, b in _FP8 for d in ("f32", "f16")),
    *(Instruction("mma", 16, 8, 16, kind, kind, d) for kind, d in (("bf16", "f32"), ("f16", "f32"), ("f16", "f16"))),
    *(Instruction("mma", 16, 8, k, "tf32", "tf32", "f32") for k in (8, 4)),
    *(Instruction("mma", 16, 8, 32, a, b, "s32", clamp) for a, b in _INT8 for clamp in (False, True)),
)

INSTRUCTIONS: dict[str, Instruction] = {i.name: i for i in (*wgmma_of(64), *_MMA)}
"""Every probed instruction by name; wgmma with 64 columns."""
