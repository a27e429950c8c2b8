"""Kernel entries: the functions of device/*.cpp that a host may start, on which cores, with which arguments.

Decides: the order of arguments, which of them are read or written, and the sizes handed over in `tiling`.
Refuses: nothing; sizes are checked where a problem is accepted (declare.py). Every argument is an address in global memory. The
last is a struct of 32-bit words (device/tiling.h, device/quantize_tiling.h), the last but one scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["ENTRIES", "Access", "Cores", "Entry"]


class Cores(Enum):
    """Which cores of a block run the entry, in the words of the launcher of the emulation."""

    VECTOR = "AIV"
    CUBE = "AIC"
    BOTH = "MIX_AIC_1_2"  # one cube core and two vector cores


class Access(Enum):
    """What a kernel does with an argument."""

    READ = "read"
    WRITE = "write"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Entry:
    """One kernel. `source`: file under device/, `arguments`: (name, access) before workspace and tiling, in order;
    `words`: names of the 32-bit words of its tiling, in order; `scratch`: bytes of workspace per block; `faults`: whether the
    source can be built with a known fault."""

    name: str
    source: str
    cores: Cores
    arguments: tuple[tuple[str, Access], ...]
    words: tuple[str, ...]
    scratch: int = 0
    faults: bool = False


def _read(*names: str) -> tuple[tuple[str, Access], ...]:
    return tuple((name, Access.READ) for name in names)


def _write(*names: str) -> tuple[tuple[str, Access], ...]:
    return tuple((name, Access.WRITE) for name in names)


_ALL = (
    Entry(
        "gemm_int4", "gemm_int4.cpp", Cores.BOTH,
        _read("a", "w", "a_scale", "w_scale", "lora_act", "lora_up", "channel_scale", "bias") + _write("d"),
        ("m", "n", "k", "r", "has_channel_scale", "has_bias"), scratch=4 * 65536,  # a ring of four 64 KiB tiles
        faults=True,
    ),
    Entry(
        "quantize_int4", "quantize_int4.cpp", Cores.VECTOR, _read("x", "smooth") + _write("q", "scales", "lora_act"),
        ("m", "k", "rows", "r", "smooth", "bf16"),
    ),
    Entry(
        "project_lora", "project_lora.cpp", Cores.CUBE, _read("x", "lora_down") + _write("lora_act"), ("m", "k", "r", "bf16"),
    ),
    Entry("pack_int4", "pack_int4.cpp", Cores.VECTOR, _read("codes") + _write("packed"), ("count", "offset")),
    Entry("convert_b8", "pack_int4.cpp", Cores.VECTOR, (("words", Access.CHANGE),), ("count", "offset")),
)

ENTRIES = {entry.name: entry for entry in _ALL}
"""Entries by name."""
