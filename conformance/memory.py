"""Host memory of the suite: every tensor alone between guard pages, with checked poison wherever a page leaves room.

Decides: where a tensor lies, what its surroundings hold, and whether any byte around it was changed.
Refuses: memory that other allocations share. A write one byte past a tensor faults at once or is found after the run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "ALIGNMENT", "GUARD", "POISONS", "Bytes", "Damage", "GuardedBuffer", "Placement", "check_placement", "damage_of",
    "zone_pattern",
]

ALIGNMENT = 16
"""Bytes. Every tensor starts at a multiple of this address, wherever it is placed: the widest vector load a kernel may assume."""

GUARD = 1 << 20
"""Bytes of inaccessible memory on each side of a tensor. Address space only: it costs no memory."""

POISONS = (0xFF, 0x5A)
"""What outputs and workspace hold before a run. 0xFF.. is NaN in every float format that has one with all bits set;
0x5A.. is an ordinary finite value in all of them, so that a result which is NaN by rights cannot hide an unwritten element."""

Placement = Literal["end", "start"] | int
"""Where a tensor lies between its guard pages. "end": its end within 15 bytes of the upper guard; "start": its start at the
lower guard, 64-byte aligned (a page is); a number: that many bytes above the lower guard, a multiple of `ALIGNMENT`."""

Bytes = npt.NDArray[np.uint8]
"""A 1-D array of bytes."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that changed around a tensor. `nearest`: unchanged bytes between the tensor's edge and the nearest changed one."""

    side: Literal["before", "after"]
    nearest: int
    count: int

    def __str__(self) -> str:
        edge = f"before its start, the nearest at start-{self.nearest + 1}"
        if self.side == "after":
            edge = f"past its end, the nearest at end+{self.nearest}"
        return f"{self.count} byte(s) written {edge}"


def check_placement(placement: Placement) -> int:
    """Bytes that the placement leaves free at the lower guard, -1 for "end". Raises ValueError for any other placement."""
    if placement == "end":
        return -1
    shift: Any = 0 if placement == "start" else placement
    if type(shift) is not int or not 0 <= shift < mmap.PAGESIZE or shift % ALIGNMENT:
        raise ValueError(
            f"placement must be 'end', 'start' or a multiple of {ALIGNMENT} below {mmap.PAGESIZE}, got {placement!r}; "
            f"tensors keep {ALIGNMENT}-byte alignment"
        )
    return shift


def zone_pattern(address: int, count: int) -> Bytes:
    """What `count` red-zone bytes from `address` on hold: 37 * address + 11 mod 256, so that neither a constant fill nor a
    copy from a neighbour leaves it as it was."""
    first = (37 * address + 11) & 0xFF
    return (np.arange(count, dtype=np.uint32) * np.uint32(37) + np.uint32(first)).astype(np.uint8)


def damage_of(before: Bytes, after: Bytes, before_is: Bytes, after_is: Bytes) -> tuple[Damage, ...]:
    """The damage of a tensor whose red zones should be `before` and `after` (ascending addresses) and are the other two."""
    found = []
    low, high = np.flatnonzero(before != before_is), np.flatnonzero(after != after_is)
    if low.size:
        found.append(Damage("before", before.size - 1 - int(low[-1]), int(low.size)))
    if high.size:
        found.append(Damage("after", int(high[0]), int(high.size)))
    return tuple(found)


@cache
def _libc() -> ctypes.CDLL:
    if os.name != "posix":
        raise OSError(f"guarded memory needs mmap and mprotect of a POSIX system, got {os.name!r}; run on Linux or macOS")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Window:
    """An address range that NumPy can see; it owns nothing."""

    def __init__(self, pointer: int, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (pointer, False), "typestr": dtype.str, "shape": shape, "strides": strides,
        }


def _window(pointer: int, count: int) -> Bytes:
    return np.asarray(_Window(pointer, np.dtype(np.uint8), (count,), (1,)))


class GuardedBuffer:
    """`nbytes` of memory between two inaccessible ranges of `GUARD` bytes.

    `pointer` is its address. The bytes that page granularity leaves between the tensor and its guards are red zones: they
    hold `zone_pattern` and `damage` checks them. `guarded=False` leaves the guards accessible and makes them red zones too:
    an access outside no longer faults, and `damage` tells where a write went. The payload starts as zeros.
    Raises ValueError for a negative size or a bad placement, OSError where the system refuses the memory.
    """

    __slots__ = ("_base", "_high", "_low", "_total", "nbytes", "pointer")

    def __init__(self, nbytes: int, placement: Placement = "end", *, guarded: bool = True) -> None:
        shift = check_placement(placement)
        if nbytes < 0:
            raise ValueError(f"a buffer needs 0 bytes or more, got {nbytes}")
        libc, page = _libc(), mmap.PAGESIZE
        room = max(-(-(nbytes + max(shift, 0) + (ALIGNMENT if shift < 0 else 0)) // page), 1) * page
        self._total = room + 2 * GUARD
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        base = libc.mmap(None, self._total, 0 if guarded else writable, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"no memory for a guarded buffer of {nbytes} bytes")
        self._base: int = base
        self.nbytes = nbytes
        self._low, self._high = (base + GUARD, base + GUARD + room) if guarded else (base, base + self._total)
        if guarded and libc.mprotect(self._low, room, writable):
            error = ctypes.get_errno()
            self.close()
            raise OSError(error, f"mprotect refuses a guarded buffer of {nbytes} bytes")
        bottom, top = base + GUARD, base + GUARD + room
        self.pointer: int = top - nbytes - (-nbytes) % ALIGNMENT if shift < 0 else bottom + shift
        for low, high in self._zones():
            _window(low, high - low)[:] = zone_pattern(low, high - low)

    def _zones(self) -> Iterator[tuple[int, int]]:
        yield self._low, self.pointer
        yield self.pointer + self.nbytes, self._high

    @property
    def payload(self) -> Bytes:
        """The bytes of the tensor, writable in place. Not to be touched after `close`."""
        return _window(self.pointer, self.nbytes)

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> npt.NDArray[Any]:
        """The payload as an array of `dtype` with `strides` in elements. Raises ValueError where that leaves the payload."""
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else -1
        if (last + 1) * dtype.itemsize > self.nbytes or min(strides, default=0) < 0:
            raise ValueError(f"shape {shape} with strides {strides} of {dtype} does not fit in {self.nbytes} bytes")
        steps = tuple(stride * dtype.itemsize for stride in strides)
        return np.asarray(_Window(self.pointer, dtype, shape, steps))

    def fill(self, byte: int) -> None:
        """Set every byte of the payload."""
        ctypes.memset(self.pointer, byte, self.nbytes)

    def first_difference(self, data: Bytes) -> int | None:
        """Offset of the first byte of the payload that is not as in `data` (same size, contiguous); None if all are."""
        if data.nbytes != self.nbytes:
            raise ValueError(f"got {data.nbytes} bytes to compare with {self.nbytes}")
        if not self.nbytes or _libc().memcmp(self.pointer, data.ctypes.data, self.nbytes) == 0:
            return None
        return int(np.flatnonzero(self.payload != data)[0])

    def damage(self) -> tuple[Damage, ...]:
        """What changed around the payload since the buffer was made."""
        (low, start), (end, high) = self._zones()
        return damage_of(
            zone_pattern(low, start - low), zone_pattern(end, high - end), _window(low, start - low), _window(end, high - end)
        )

    def close(self) -> None:
        """Give the memory back. A later access through a view faults."""
        if self._base:
            _libc().munmap(self._base, self._total)
            self._base = self.pointer = self._low = self._high = self.nbytes = 0

    def __enter__(self) -> GuardedBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
