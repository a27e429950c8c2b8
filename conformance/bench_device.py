"""An accelerator as a stopwatch: operands in its memory, launches captured in graphs, and the rates that torch reaches on it.

Decides: how a launch is timed. Launches go to a stream of their own and are captured in one graph of at least `GRAPH_MS`; what
cannot be captured is launched one by one, and the recording says so. A device that is out of memory is an error and never a
reason to time from the host. Launches follow each other without a pause, and where kernels begin before the one before has ended
(programmatic dependent launch) they overlap: a figure is the throughput of a sequence, not the latency of one launch. Device
events stand between replays, never a clock of the host. Operands rotate through the launches of a graph.
Refuses: numbers. Operand codes come from the caller, results are only compared with each other.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from lowbit.references.formats import UINT8, Codes

from .backend import TensorView
from .device import TORCH_DEVICES, DeviceError, TorchDevice
from .op import Family, ResolvedTensor, Role

__all__ = ["GRAPH_MS", "DeviceMemoryError", "Recording", "Stopwatch", "difference_of", "memory_spent"]

GRAPH_MS = 4.0
"""Milliseconds that a graph takes at least: the gap between two replays is then no part of the figure."""

_GRAPH_LAUNCHES = 4096  # at most in one graph
_SIDE = 8192  # of the square matrix products by which the matrix rate is measured
_COMPARED = 1 << 22  # elements that are compared at a time
_STREAMED = 1 << 31  # bytes that the memory rates are measured over: many times any cache
_CONTAINERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


class DeviceMemoryError(DeviceError):
    """A device without the memory that operands, outputs or a graph take."""


def memory_spent(error: BaseException) -> bool:
    """Whether an error, or one that it hides, says that the device is out of memory. It hides one where a capture is ended after
    an allocation failed in it: the end raises, too."""
    cause: BaseException | None = error
    while cause is not None:
        if "out of memory" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def difference_of(torch: Any, ours: TensorView, theirs: TensorView) -> float:
    """Of float outputs ||theirs - ours|| / ||ours||, where values that are not finite count as 0: codes that nobody wrote are
    NaN, and an output without any result differs by 1. Of other formats, and where ours is 0 throughout, the share of codes that
    differ. Over all elements."""
    left, right = (view.memory.reshape(-1) for view in (ours, theirs))
    dtype = _FLOATS.get(ours.format.name)
    other = off = size = 0.0
    for start in range(0, left.numel(), _COMPARED):
        a, b = (part[start : start + _COMPARED] for part in (left, right))
        other += float((a != b).sum())
        if dtype is not None:
            a, b = (part.view(getattr(torch, dtype)).double().nan_to_num(0.0, 0.0, 0.0) for part in (a, b))
            off, size = off + float((b - a).square().sum()), size + float(a.square().sum())
    return math.sqrt(off / size) if size else other / max(left.numel(), 1)


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """`launches` launches that can be started again by `play`; `graph` says whether as one graph. `us`: a first figure."""

    play: Callable[[], None]
    launches: int
    graph: bool
    us: float


class Stopwatch:
    """Times launches on one device that torch addresses and that has events. Raises DeviceError where it is not there."""

    def __init__(self, name: str) -> None:
        kind, _, index = name.partition(":")
        if TORCH_DEVICES.get(kind, "cpu") == "cpu":
            raise DeviceError(f"device {name!r} has no events to time by: bench needs an accelerator (cuda, hip, xpu, npu)")
        self.device: Any = TorchDevice(kind, int(index or 0))
        self._torch: Any = importlib.import_module("torch")
        self._runtime: Any = getattr(self._torch, TORCH_DEVICES[kind])
        self._place = self._torch.device(TORCH_DEVICES[kind], int(index or 0))
        self.stream: Any = self._runtime.Stream(self._place)
        self._pool = self._runtime.graph_pool_handle() if hasattr(self._runtime, "graph_pool_handle") else None
        self._kept = self._hold_pool()

    def _hold_pool(self) -> Any:
        """A graph that lives as long as this: without one, the pool would end with the first graph that is dropped."""
        if self._pool is None:
            return None
        graph, held = self._runtime.CUDAGraph(), self._torch.zeros(8, device=self._place)
        self.synchronize()
        with self._on_stream():
            graph.capture_begin(pool=self._pool)
            kept = held + 1
            graph.capture_end()
        return graph, held, kept

    @contextmanager
    def _memory_for(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not memory_spent(error):
                raise
            said = f"{self.device.name}:{self.device.index} is out of memory for {what}"
            raise DeviceMemoryError(f"{said}: give smaller --shapes, or free the device of other work") from error

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with self._runtime.stream(self.stream):
            yield

    def synchronize(self) -> None:
        """Wait for all work."""
        self.device.synchronize()

    def environment(self) -> dict[str, str]:
        """Device, driver-facing versions and package versions that the figures belong to."""
        properties = self._runtime.get_device_properties(self._place)
        found = {"device": str(properties.name), "torch": str(self._torch.__version__)}
        for name in ("cuda", "hip", "xpu"):
            if getattr(self._torch.version, name, None):
                found[name] = str(getattr(self._torch.version, name))
        for name in ("multi_processor_count", "total_memory"):
            if hasattr(properties, name):
                found[name] = str(getattr(properties, name))
        return found

    # operands -----------------------------------------------------------------------------------------------------------

    def tensor(self, tensor: ResolvedTensor, block: Codes | None) -> TensorView:
        """A tensor of whole rows; it repeats `block` (codes in containers), or holds 0xFF where that is None."""
        torch, count = self._torch, math.prod(tensor.shape)
        itemsize = -(-tensor.format.bits // 8) if block is None else block.dtype.itemsize
        dtype = getattr(torch, _CONTAINERS[itemsize])
        with self._memory_for(f"tensor {tensor.name!r} of {count * itemsize:,} bytes"):
            if block is None:
                memory = torch.empty(count * itemsize, dtype=torch.uint8, device=self._place).fill_(0xFF).view(dtype)
            else:
                piece = torch.from_numpy(block.view(f"i{itemsize}" if itemsize > 1 else "u1").copy()).to(self._place)
                memory = piece.repeat(-(-count // piece.numel()) if count else 1)[:count].clone()
        memory = memory.view(tensor.shape)
        strides = tuple(memory.stride())
        return TensorView(
            tensor.name, tensor.format, tensor.shape, strides, tensor.role, tensor.layout, memory.data_ptr(), memory
        )

    def bytes(self, count: int) -> TensorView:
        """`count` bytes of workspace."""
        return self.tensor(ResolvedTensor("workspace", UINT8, (count,), Role.OUTPUT, Family.ELEMENT, "", (count,)), None)

    def copy(self, view: TensorView) -> TensorView:
        """The same codes elsewhere in memory."""
        with self._memory_for(f"a copy of {view.name!r}"):
            memory = view.memory.clone()
        return replace(view, memory=memory, pointer=memory.data_ptr())

    def poison(self, view: TensorView) -> None:
        """Set every byte to 0xFF."""
        view.memory.view(self._torch.uint8).fill_(0xFF)

    def restore(self, view: TensorView, kept: TensorView) -> None:
        """Set the codes of a tensor to those of a copy."""
        view.memory.copy_(kept.memory)

    def difference(self, ours: TensorView, theirs: TensorView) -> float:
        """As `difference_of`."""
        return difference_of(self._torch, ours, theirs)

    def release(self) -> None:
        """Give memory that nothing refers to back to the device."""
        self._runtime.empty_cache()

    # time ---------------------------------------------------------------------------------------------------------------

    def _events(self, count: int) -> list[Any]:
        return [self._runtime.Event(enable_timing=True) for _ in range(count)]

    def _between(self, play: Callable[[], None], times: int) -> list[float]:
        """Milliseconds of each of `times` plays, by events around each."""
        marks = self._events(times + 1)
        with self._on_stream():
            for mark in marks[:-1]:
                mark.record(self.stream)
                play()
            marks[-1].record(self.stream)
        self.stream.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]

    def record(self, launch: Callable[[int], object], copies: int) -> Recording:
        """A recording of launch(0), launch(1), ...: a multiple of `copies` launches that take `GRAPH_MS` or more. Raises
        DeviceMemoryError where the device is out of memory, and what a launch raises."""
        with self._memory_for("launches, or for the graph that holds them"):
            return self._recorded(launch, copies)

    def _recorded(self, launch: Callable[[int], object], copies: int) -> Recording:
        def each(count: int) -> None:
            for index in range(count):
                launch(index % copies)

        with self._on_stream():
            each(1)
        self.synchronize()
        guess = max(self._between(lambda: each(copies), 1)[0] / copies, 1e-3)
        launches = max(1, math.ceil(min(GRAPH_MS / guess, _GRAPH_LAUNCHES) / copies)) * copies
        try:
            return self._graphed(each, launches, copies)
        except RuntimeError as error:  # no graphs on this device, or a launch that waits for the host, which no graph can hold
            if memory_spent(error):
                raise
            self.synchronize()
            us = self._between(lambda: each(launches), 1)[0] / launches * 1e3
            return Recording(lambda: each(launches), launches, False, us)

    def _graphed(self, each: Callable[[int], None], launches: int, copies: int) -> Recording:
        """A recording as a graph; a second one of the length that the first one shows where the guess held much of the host."""
        if self._pool is None:
            raise RuntimeError("no graphs on this device")
        graph, us = self._captured(each, launches)
        longer = max(1, math.ceil(min(GRAPH_MS * 1.1 / max(us * 1e-3, 1e-4), _GRAPH_LAUNCHES) / copies)) * copies
        if us * launches < GRAPH_MS * 1e3 and longer > launches:
            launches = longer
            graph, us = self._captured(each, launches)
        return Recording(graph.replay, launches, True, us)

    def _captured(self, each: Callable[[int], None], launches: int) -> tuple[Any, float]:
        graph = self._runtime.CUDAGraph()
        with self._on_stream():
            graph.capture_begin(pool=self._pool)
            try:
                each(launches)
            finally:
                graph.capture_end()
        self._between(graph.replay, 1)
        return graph, self._between(graph.replay, 1)[0] / launches * 1e3

    def time(self, recording: Recording, milliseconds: float) -> float:
        """Microseconds per launch: the median over replays that take about `milliseconds`, after one that is not counted."""
        times = int(min(60, max(3, milliseconds * 1e3 / (recording.launches * max(recording.us, 1e-3)))))
        return statistics.median(self._between(recording.play, times + 1)[1:]) / recording.launches * 1e3

    # ceilings -----------------------------------------------------------------------------------------------------------

    def ceilings(self, kinds: Sequence[str]) -> dict[str, float]:
        """Bytes per second read and written alone, and operations per second of a matrix product of each kind (fp8, bf16, f16,
        int8) on random operands: what this device reached just now through torch. A kind that torch does not have is left out."""
        torch, found = self._torch, {}
        store = torch.empty(_STREAMED, dtype=torch.uint8, device=self._place).random_(0, 255)
        found["read"] = _STREAMED / self._seconds(lambda: torch.amax(store.view(torch.int32)))
        found["write"] = _STREAMED / self._seconds(store.zero_)
        for kind in kinds:
            product = self._product(kind)
            if product is not None:
                found[kind] = 2.0 * _SIDE**3 / self._seconds(product)
        self.release()
        return found

    def _seconds(self, launch: Callable[[], object]) -> float:
        return self.time(self.record(lambda _: launch(), 1), 60.0) * 1e-6

    def _product(self, kind: str) -> Callable[[], object] | None:
        """A square product of this kind; fp8 with a scale per row, as most kernels here have it."""
        torch = self._torch
        a, b = (torch.randn(_SIDE, _SIDE, device=self._place) for _ in range(2))
        product: Callable[[], object]
        if kind == "fp8":
            left, right = ((x * 100).clamp(-448, 448).to(torch.float8_e4m3fn) for x in (a, b))
            rows, columns = torch.rand(_SIDE, 1, device=self._place), torch.rand(1, _SIDE, device=self._place)
            product = lambda: torch._scaled_mm(  # noqa: E731 (a product that is called again and again)
                left, right.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True)
        elif kind == "int8":
            left, right = ((x * 40).round().clamp(-128, 127).to(torch.int8) for x in (a, b))
            product = lambda: torch._int_mm(left, right.t())  # noqa: E731
        else:
            left, right = (x.to(getattr(torch, _FLOATS[kind])) for x in (a, b))
            product = lambda: left @ right.t()  # noqa: E731
        try:
            product()
            self.synchronize()
        except (RuntimeError, AttributeError):
            return None
        return product
