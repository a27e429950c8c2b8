"""Devices as flat bytes: where tensors live and how bytes get there and back.

Decides: allocation with red zones, transfer, poison, synchronisation, streams, and which kernels were seen to be launched,
for host memory and for every accelerator that torch addresses (CUDA, ROCm, XPU, NPU).
Refuses: formats, shapes and packing. Those travel in the tensor record; a device moves bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .memory import ALIGNMENT, Bytes, Damage, GuardedBuffer, Placement, check_placement, damage_of, zone_pattern

__all__ = ["ARENA", "TORCH_DEVICES", "Allocation", "Device", "DeviceError", "HostDevice", "TorchDevice", "open_device"]

ARENA = 1 << 16
"""Bytes of checked poison on each side of a tensor on a device that has no guard pages."""

_BASE_ALIGNMENT = 256  # bytes; what device allocators give at least, so that a placement means the same on every run

TORCH_DEVICES = {"cpu": "cpu", "cuda": "cuda", "hip": "cuda", "xpu": "xpu", "npu": "npu"}
"""Device name -> torch device type. torch addresses ROCm devices as "cuda"; the name says which is meant."""


class DeviceError(Exception):
    """A device that cannot be opened; the message says which and what to try."""


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """Memory of one tensor on a device. `handle` belongs to the device that made it."""

    pointer: int
    nbytes: int
    handle: Any


class Device(Protocol):
    """Memory that the suite owns. Uploads and fills are complete for the device's default stream; `synchronize` waits for all
    work on the device, whatever the stream, and raises what the device reports."""

    @property
    def name(self) -> str:
        """Kind of device: "host" or a key of `TORCH_DEVICES`."""

    @property
    def index(self) -> int:
        """Which of several."""

    def alloc(self, nbytes: int, placement: Placement = "end", *, guarded: bool = True) -> Allocation:
        """`nbytes` between red zones. `guarded=False` replaces faulting guards by checked ones, where the device has any."""

    def free(self, allocation: Allocation) -> None:
        """Give the memory back."""

    def upload(self, allocation: Allocation, data: Bytes) -> None:
        """Copy `data` (1-D uint8 of the allocation's size) to the device."""

    def download(self, allocation: Allocation) -> Bytes:
        """A copy of the bytes."""

    def fill(self, allocation: Allocation, byte: int) -> None:
        """Set every byte."""

    def first_difference(self, allocation: Allocation, data: Bytes) -> int | None:
        """Offset of the first byte that differs from `data`, None if none does."""

    def damage(self, allocation: Allocation) -> tuple[Damage, ...]:
        """What changed in the red zones since the allocation."""

    def view(self, allocation: Allocation, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """The array or tensor a backend is handed: containers of `itemsize` bytes, strides in containers."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def new_stream(self) -> Any:
        """A stream beside the default one; None where the device has none."""

    def observe(self) -> AbstractContextManager[list[str]]:
        """Collects the names of the kernels launched inside the block; the list is filled when the block ends."""


@dataclass(frozen=True, slots=True)
class HostDevice:
    """Host memory in guarded buffers."""

    name: str = "host"
    index: int = 0

    def alloc(self, nbytes: int, placement: Placement = "end", *, guarded: bool = True) -> Allocation:
        buffer = GuardedBuffer(nbytes, placement, guarded=guarded)
        return Allocation(buffer.pointer, nbytes, buffer)

    def free(self, allocation: Allocation) -> None:
        allocation.handle.close()

    def upload(self, allocation: Allocation, data: Bytes) -> None:
        allocation.handle.payload[:] = data

    def download(self, allocation: Allocation) -> Bytes:
        copy: Bytes = allocation.handle.payload.copy()
        return copy

    def fill(self, allocation: Allocation, byte: int) -> None:
        allocation.handle.fill(byte)

    def first_difference(self, allocation: Allocation, data: Bytes) -> int | None:
        offset: int | None = allocation.handle.first_difference(data)
        return offset

    def damage(self, allocation: Allocation) -> tuple[Damage, ...]:
        found: tuple[Damage, ...] = allocation.handle.damage()
        return found

    def view(self, allocation: Allocation, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return allocation.handle.view(np.dtype(f"u{itemsize}"), shape, strides)

    def synchronize(self) -> None:
        """Host work is complete when a call returns."""

    def new_stream(self) -> None:
        """The host has no streams."""

    @contextmanager
    def observe(self) -> Iterator[list[str]]:
        yield []


@dataclass(frozen=True, slots=True, eq=False)
class _Arena:
    """One torch allocation: lower red zone, payload, upper red zone."""

    base: Any
    payload: Any
    before: Any
    after: Any


class TorchDevice:
    """An accelerator that torch addresses, or its "cpu", with a poisoned arena around each tensor.

    Memory handed to backends is a torch tensor of uint8, int16, int32 or int64. Raises DeviceError where torch (for npu:
    torch_npu) is missing or has no such device.
    """

    def __init__(self, name: str, index: int = 0) -> None:
        if name not in TORCH_DEVICES:
            raise DeviceError(f"unknown device {name!r}; known are host, {', '.join(TORCH_DEVICES)}")
        self.name, self.index = name, index
        kind = TORCH_DEVICES[name]
        module = "torch_npu" if name == "npu" else "torch"
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DeviceError(f"device {name!r} needs the package {module}; install it ({error})") from error
        self._torch: Any = importlib.import_module("torch")
        self._runtime: Any = None if kind == "cpu" else getattr(self._torch, kind, None)
        if kind == "cpu":
            count = 1
        else:
            count = self._runtime.device_count() if self._runtime is not None and self._runtime.is_available() else 0
        hip = getattr(self._torch.version, "hip", None) is not None
        if not 0 <= index < count or (name == "hip" and not hip) or (name == "cuda" and hip):
            found = f"{count} {'hip' if hip and kind == 'cuda' else kind} device(s)"
            raise DeviceError(f"device {name}:{index} is not there: this torch ({self._torch.__version__}) sees {found}")
        self._device = self._torch.device(kind, index)
        if self._runtime is not None:
            self._runtime.set_device(index)

    def _pattern(self, address: int, count: int) -> Any:
        return self._torch.from_numpy(zone_pattern(address, count)).to(self._device)

    def alloc(self, nbytes: int, placement: Placement = "end", *, guarded: bool = True) -> Allocation:
        shift = check_placement(placement)
        room = nbytes + (-nbytes) % _BASE_ALIGNMENT
        base = self._torch.empty(room + max(shift, 0) + 2 * ARENA + _BASE_ALIGNMENT, dtype=self._torch.uint8, device=self._device)
        address = base.data_ptr()
        low = ARENA + (-(address + ARENA)) % _BASE_ALIGNMENT
        low += room - nbytes - (-nbytes) % ALIGNMENT if shift < 0 else shift
        arena = _Arena(base, base[low : low + nbytes], base[:low], base[low + nbytes :])
        arena.before.copy_(self._pattern(address, low))
        arena.after.copy_(self._pattern(address + low + nbytes, base.numel() - low - nbytes))
        return Allocation(address + low, nbytes, arena)

    def free(self, allocation: Allocation) -> None:
        """torch frees the arena with its last reference."""

    def upload(self, allocation: Allocation, data: Bytes) -> None:
        allocation.handle.payload.copy_(self._torch.from_numpy(np.array(data, dtype=np.uint8)))

    def download(self, allocation: Allocation) -> Bytes:
        return np.array(allocation.handle.payload.cpu().numpy())

    def fill(self, allocation: Allocation, byte: int) -> None:
        allocation.handle.payload.fill_(byte)

    def first_difference(self, allocation: Allocation, data: Bytes) -> int | None:
        differing = np.flatnonzero(self.download(allocation) != data)
        return int(differing[0]) if differing.size else None

    def damage(self, allocation: Allocation) -> tuple[Damage, ...]:
        arena: _Arena = allocation.handle
        start, end = allocation.pointer, allocation.pointer + allocation.nbytes
        before, after = arena.before.cpu().numpy(), arena.after.cpu().numpy()
        return damage_of(zone_pattern(start - before.size, before.size), zone_pattern(end, after.size), before, after)

    def view(self, allocation: Allocation, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        dtype = getattr(self._torch, {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[itemsize])
        flat = allocation.handle.payload.view(dtype)
        return flat.as_strided(shape, strides, flat.storage_offset())

    def synchronize(self) -> None:
        if self._runtime is not None:
            self._runtime.synchronize(self.index)

    def new_stream(self) -> Any:
        return None if self._runtime is None else self._runtime.Stream(self._device)

    @contextmanager
    def observe(self) -> Iterator[list[str]]:
        names: list[str] = []
        kind = self._device.type.upper()
        activity = None if self._runtime is None else getattr(self._torch.profiler.ProfilerActivity, kind, None)
        if activity is None:
            yield names
            return
        with self._torch.profiler.profile(activities=[activity]) as profile:
            yield names
            self.synchronize()
        host = self._torch.autograd.DeviceType.CPU
        names.extend(dict.fromkeys(_kernels(event.name for event in profile.events() if event.device_type != host)))


def _kernels(names: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """Names of kernels among the device events of a profile: copies and fills are no kernels of a backend."""
    return (name for name in names if not name.lower().startswith(("memcpy", "memset")))


def open_device(name: str) -> Device:
    """The device called "host", or "cuda", "cuda:1", "hip", "xpu:0", "npu", "cpu" for torch's. Raises DeviceError."""
    kind, _, index = name.partition(":")
    if kind == "host" and not index:
        return HostDevice()
    if index and not index.isdecimal():
        raise DeviceError(f"device {name!r} is malformed; expected a name and an index, as cuda:1")
    return TorchDevice(kind, int(index or 0))
