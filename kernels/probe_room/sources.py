"""CUDA C++ of one probe: the constants of an instruction, its inline PTX, and the code that moves its tiles.

Decides: operand lists of the inline PTX. Refuses nothing: every `Instruction` has a source; what the assembler refuses it says.
"""

from __future__ import annotations

from pathlib import Path

from .instructions import TYPES, Instruction

__all__ = ["ENTRY", "execute", "movement", "source"]

ENTRY = "probe"
_HERE = Path(__file__).parent
_FENCE, _COMMIT, _WAIT = (f"wgmma.{word};" for word in (
    "fence.sync.aligned", "commit_group.sync.aligned", "wait_group.sync.aligned 0"))


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _operands(first: int, count: int) -> str:
    return "{" + ", ".join(f"%{i}" for i in range(first, first + count)) + "}"


def _inout(count: int) -> str:
    return ", ".join(f'"+r"(d[{i}])' for i in range(count))


def _registers(instruction: Instruction) -> tuple[int, int]:
    """32-bit registers of A and of B per lane of mma.sync."""
    size = TYPES[instruction.a].size
    return instruction.m * instruction.k * size // 128, instruction.n * instruction.k * size // 128


def execute(instruction: Instruction) -> str:
    """The device function `execute`: the instruction once, accumulating into the registers `d`."""
    count = instruction.registers
    if instruction.unit == "mma":
        a, b = _registers(instruction)
        d, left, right = _operands(0, count), _operands(count, a), _operands(count + a, b)
        text = f"{instruction.ptx} {d}, {left}, {right}, {d};"
        given = ", ".join([*(f'"r"(a[{i}])' for i in range(a)), *(f'"r"(b[{i}])' for i in range(b))])
        body = f'  asm volatile("{text}" : {_inout(count)} : {given});\n'
        return f"__device__ __forceinline__ void execute(Word* d, const Word* a, const Word* b) {{\n{body}}}\n"
    # After the descriptors: accumulate (a predicate), signs of A and B, and K-major for the types that could be transposed.
    flags = {1: ", 1, 1", 2: ", 1, 1, 0, 0", 4: ", 1, 1"}[TYPES[instruction.a].size] if instruction.d != "s32" else ""
    text = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
        f"{instruction.ptx} {_operands(0, count)}, %{count}, %{count + 1}, p{flags}; }}"
    )
    # One statement from fence to wait: the registers belong to the unit until it is done, and no copy of them may come between.
    text = f"{_FENCE} {text} {_COMMIT} {_WAIT}"
    body = f'  asm volatile("{text}" : {_inout(count)} : "l"(a), "l"(b) : "memory");\n'
    return f"__device__ __forceinline__ void execute(Word* d, Descriptor a, Descriptor b) {{\n{body}}}\n"


def movement(instruction: Instruction) -> str:
    """Everything but the instruction itself and the entry: also host C++."""
    a, b = _registers(instruction)
    numbers = {
        "M": instruction.m, "N": instruction.n, "K": instruction.k, "SIZE": TYPES[instruction.a].size,
        "OUT_SIZE": TYPES[instruction.d].size, "REGISTERS": instruction.registers, "A_REGISTERS": a, "B_REGISTERS": b,
    }
    constants = ", ".join(f"{name} = {value}" for name, value in numbers.items())
    return _text("fragments.cuh") + f"\nstruct Probe {{\n  static constexpr int {constants};\n}};\n\n" + _text("probe.cuh")


def source(instruction: Instruction) -> str:
    """The whole kernel, entry `probe`: arguments a, w, c, out (pointers), tiles, steps (int)."""
    return movement(instruction) + "\n" + execute(instruction) + _text(f"{instruction.unit}_entry.cuh")
