"""Single matrix instructions of Hopper as functions of bits: the door of the probes.

    probes = build(INSTRUCTIONS.values())                   # on a machine with compute capability 9.0
    d = probes["wgmma_n64k32_f32_e4m3_e4m3"](a, w, c)       # tiles of codes; see Probe

Decides nothing about arithmetic, and is no backend: tests/device/run_probes.py compares what comes back with the datapath
records.
Refuses: other architectures. The sources can be generated, compiled and disassembled anywhere.
"""

from __future__ import annotations

from .probe_room.build import Probe, assemble, build, check_tiles, compiled, disassemble, opcodes, tool
from .probe_room.instructions import INSTRUCTIONS, TYPES, Instruction, Type, wgmma_of
from .probe_room.sources import execute, movement, source

__all__ = [
    "INSTRUCTIONS", "TYPES", "Instruction", "Probe", "Type", "assemble", "build", "check_tiles", "compiled", "disassemble",
    "execute", "movement", "opcodes", "source", "tool", "wgmma_of",
]
