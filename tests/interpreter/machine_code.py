"""What the machine code of sm_90 does to registers of matrix instructions that are in flight.

Decides: which instructions come before the wait that the PTX ISA asks for (`disturbed`). Refuses: nothing; it follows one path:
what it finds is wrong, and what it does not look at, branches that are taken, is not thereby right.
"""

from __future__ import annotations

import re

__all__ = ["disturbed"]

WIDTHS = {".64": 2, ".WIDE": 2, ".M88.2": 2, ".128": 4, ".M88.4": 4}
"""Part of an opcode -> registers that it writes, where they are not one."""
STORES = ("ST", "RED", "LDGSTS", "BAR", "BRA", "DEPBAR", "WARPGROUP", "SYNCS", "UTMA")
"""Beginnings of opcodes whose first operand is not written."""


def registers(text: str) -> set[int]:
    """Numbers of the registers that an operand names, as one each."""
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def disturbed(listing: str) -> list[str]:
    """Instructions of machine code of sm_90, as cuobjdump -sass lists it, that write a register of which a matrix instruction in
    flight has yet to take its left operand, or touch one into which it sums. PTX ISA, wgmma.wait_group: what they lead to is
    undefined. The first loop with matrix instructions counts as passed through twice; other branches count as not taken.
    """
    lines = [(int(at, 16), opcode, rest.split(", ") if rest else []) for at, opcode, rest in re.findall(
        r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", listing)]
    matrix = re.compile(r"[HQI]GMMA\.64x(\d+)x")
    path = list(lines)
    for last, (at, opcode, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands[-1]) if opcode == "BRA" and operands else None
        if target and int(target[1], 16) < at:
            loop = [line for line in lines[: last + 1] if line[0] >= int(target[1], 16)]
            if any(matrix.match(line[1]) for line in loop):
                path = lines[: last + 1] + loop + lines[last + 1 :]
                break
    groups: list[tuple[set[int], set[int]]] = []  # registers that are read, and summed into, oldest first
    reads, sums, found = set[int](), set[int](), list[str]()
    for at, opcode, operands in path:
        if product := matrix.match(opcode):
            first = int(operands[0][1:])
            sums |= set(range(first, first + int(product[1]) // 2))
            reads |= {place + i for place in registers(operands[1]) if operands[1].startswith("R") for i in range(4)}
            if operands[-1].startswith("gsb"):
                groups, reads, sums = [*groups, (reads, sums)], set(), set()
            continue
        if opcode == "WARPGROUP.DEPBAR.LE":
            left = int(operands[-1], 16)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
            continue
        touched = set[int]().union(*(registers(operand) for operand in operands))
        written = set[int]()
        if operands and operands[0].startswith("R") and not opcode.startswith(STORES):
            width = max((width for part, width in WIDTHS.items() if part in opcode), default=1)
            written = {place + i for place in registers(operands[0]) for i in range(width)}
        waiting, summed = reads.union(*(group[0] for group in groups)), sums.union(*(group[1] for group in groups))
        if written & waiting or (written | touched) & summed:
            found.append(f"{at:x} {opcode} {', '.join(operands)}")
    return found
