"""C++ twins of `dot_emulated` for whole matrix products: one fused kernel on a GPU (needs torch with CUDA), the same on the host.

Decides nothing: `dot.py` defines. cuda_dot.cuh is the arithmetic, in 32- and 64-bit integers; this module writes the constants of
a record and of the operand formats below it, has a compiler build the result once per combination and process (NVRTC through
torch for the GPU, g++ for the host), and runs it.
Refuses: families outside `FAMILIES`, segments that cut an instruction, and a host without g++.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .datapaths import CONSTANTS, Datapath, Family, constants
from .dot import Operand, check_pair, check_read, held_codes
from .formats import Codes, Format, Kind, Reals, container

__all__ = [
    "BODY", "FAMILIES", "check_segment", "dot_emulated_cuda", "dot_emulated_host", "emulate_tiles", "host_source", "source",
    "structure",
]

FAMILIES = frozenset({Family.FUSED, Family.BLOCK_SCALED_FUSED, Family.GROUPED, Family.EMULATED_PAIRS, Family.INTEGER})
BODY = Path(__file__).with_suffix(".cuh")
_TILE = 32  # ROWS and COLUMNS of cuda_dot.cuh
_THREADS = 256
_ENTRY = """
extern "C" __global__ void __launch_bounds__(THREADS, 2) lowbit_dot(
    const void* a, const void* w, const void* a_scales, const void* w_scales, const void* start, void* out,
    int M, int N, int K, int segment, int has_start) {
  run<Path>(Buffers{a, w, a_scales, w_scales, start, out}, Shape{M, N, K, segment, has_start});
}
"""
_HOST_ENTRY = """
extern "C" void NAME(const void* a, const void* w, const void* a_scales, const void* w_scales, const void* start, void* out,
                     int M, int N, int K, int segment, int has_start, int batches) {
  run<STRUCT>(Buffers{a, w, a_scales, w_scales, start, out}, Shape{M, N, K, segment, has_start}, batches);
}
"""
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _format(fmt: Format) -> str:
    """Constants of one encoding, as static members."""
    numbers = {
        "kind": int(fmt.kind), "bits": fmt.bits, "size": fmt.size, "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits, "bias": fmt.bias, "is_signed": int(fmt.signed), "nan": int(fmt.nan),
        "min_exponent": fmt.min_exponent if fmt.kind is Kind.FLOAT else 0,
    }
    return "static constexpr int " + ", ".join(f"{name} = {value}" for name, value in numbers.items()) + ";"


def _fraction_bits(fmt: Format, path: Datapath) -> int:
    """Fraction bits of an operand's integer significand, block scale included."""
    if path.family is Family.GROUPED and path.scale_format is not None:
        return path.scale_format.mantissa_bits + fmt.mantissa_bits - fmt.min_exponent
    return path.operand_bits - 1 if path.operand_bits else fmt.mantissa_bits


def structure(path: Datapath, a: Format, w: Format, name: str = "Path") -> str:
    """The C++ struct `name` that cuda_dot.cuh takes: `datapaths.constants(path)` and what the operand formats add.

    Raises ValueError for families outside `FAMILIES` and for formats that the unit does not take.
    """
    if path.family not in FAMILIES:
        names = sorted(family.name for family in FAMILIES)
        raise ValueError(f"{path.name}: got family {path.family.name}, expected one of {names}; use dot.py")
    for fmt in (a, w):
        if fmt not in path.operands:
            raise ValueError(f"{path.name}: got operand format {fmt.name}, expected one of {[f.name for f in path.operands]}")
    floats = path.family is not Family.INTEGER
    numbers = dict(zip(CONSTANTS, constants(path), strict=True)) | {
        "output_mantissa_bits": path.output.mantissa_bits if floats else 0,
        "fraction_bits_a": _fraction_bits(a, path) if floats else 0,
        "fraction_bits_w": _fraction_bits(w, path) if floats else 0,
    }
    members = "\n".join(f"  static constexpr int {key} = {value};" for key, value in numbers.items())
    scale = path.scale_format
    nested = "\n".join(
        f"  struct {side} {{ {_format(fmt)} }};" for side, fmt in (("A", a), ("W", w), ("AS", scale or a), ("WS", scale or w))
    )
    return f"struct {name} {{\n{members}\n{nested}\n}};\n"


def source(path: Datapath, a: Format, w: Format) -> str:
    """CUDA C++ of the kernel `lowbit_dot` for one record and one pair of operand formats. Raises ValueError as `structure`."""
    return BODY.read_text(encoding="utf-8") + structure(path, a, w) + _ENTRY


def host_source(kernels: dict[str, tuple[Datapath, Format, Format]]) -> str:
    """Host C++ of several emulators, by the names of their C functions: pointers a, w, a_scales, w_scales, start, out, then ints
    M, N, K, segment, has_start, batches. Raises ValueError as `structure`."""
    parts = [BODY.read_text(encoding="utf-8")]
    for name, (path, a, w) in kernels.items():
        parts += [structure(path, a, w, f"Path_{name}"), _HOST_ENTRY.replace("NAME", name).replace("STRUCT", f"Path_{name}")]
    return "".join(parts)


def check_segment(segment: int, path: Datapath) -> None:
    """Raises ValueError where a segment of k is no multiple of the instruction, or where sums are integers."""
    if segment < 0 or segment % path.instruction_k or (segment and path.family is Family.INTEGER):
        raise ValueError(
            f"{path.name}: got segments of {segment} k, expected 0 (one chain) or a multiple of the instruction's "
            f"{path.instruction_k}; integer sums have no segments"
        )


@lru_cache(maxsize=256)
def _kernel(path: Datapath, a: Format, w: Format, device: int) -> Any:
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(source(path, a, w), "lowbit_dot")


def emulate_tiles(
    a: torch.Tensor, w: torch.Tensor, path: Datapath, formats: tuple[Format, Format], start: torch.Tensor | None = None,
    segment: int = 0, scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Many products in one launch: codes [B, M, K] and [B, N, K] on one CUDA device -> codes [B, M, N] of the output format.

    Codes are uint8, int16 or int32 by the size of their format, `start` codes [B, M, N] of the output format, `scales` codes
    [B, rows, K / scale_group] of both sides. segment = S > 0: every S consecutive k are summed from zero, and the sums are
    added in ascending k to `start` (or zero) in the output format, to nearest even: what a kernel that promotes every S does.
    Raises ValueError for other shapes, dtypes, devices, formats and segments.
    """
    check_segment(segment, path)
    batch, m, k = a.shape
    n = w.shape[1]
    given = [(a, (batch, m, k), formats[0].size), (w, (batch, n, k), formats[1].size)]
    given += [] if start is None else [(start, (batch, m, n), path.output.size)]
    if (scales is None) != (path.scale_format is None):
        raise ValueError(f"{path.name}: got block scales {scales is not None}, expected {path.scale_format is not None}")
    for rows, side in zip((m, n), scales or (), strict=False):
        given.append((side, (batch, rows, k // path.scale_group), 1))
    for tensor, shape, size in given:
        if tensor.device != a.device or tuple(tensor.shape) != shape or tensor.dtype != _SIGNED[size]:
            raise ValueError(
                f"{path.name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {_SIGNED[size]} {shape} "
                f"on {a.device}"
            )
    if a.device.type != "cuda":
        raise ValueError(f"{path.name}: got codes on {a.device}, expected a CUDA device; use torch_dot or dot there")
    out = torch.empty((batch, m, n), dtype=_SIGNED[path.output.size], device=a.device)
    kernel = _kernel(path, *formats, a.device.index or 0)
    tensors = [t.contiguous() for t in (a, w, *(scales or (a, w)), out if start is None else start)]
    grid = (batch, -(-m // _TILE), -(-n // _TILE))
    with torch.cuda.device(a.device):
        kernel(grid=grid, block=(_THREADS, 1, 1), args=[*tensors, out, m, n, k, segment, int(start is not None)])
    return out


def _to_device(codes: Codes, device: torch.device) -> torch.Tensor:
    """[rows, K] -> [1, rows, K], reinterpreted in torch's container of that size."""
    signed = np.dtype(np.uint8 if codes.itemsize == 1 else f"i{codes.itemsize}")
    return torch.from_numpy(np.ascontiguousarray(codes).view(signed)).to(device)[None]


def dot_emulated_cuda(
    a: Operand, w: Operand, path: Datapath, start: Reals | None = None, device: str | torch.device = "cuda", segment: int = 0
) -> torch.Tensor:
    """As `dot.dot_emulated`: the same bits as nonnegative int64 [M, N] on `device`; `segment` as in `emulate_tiles`.

    Raises ValueError as `dot_emulated`, and for families outside `FAMILIES`, devices that are not CUDA, and segments that cut
    an instruction.
    """
    structure(path, a.format, w.format)
    check_pair(a, w, start, path)
    for op in (a, w):
        check_read(op, path)
    where = torch.device(device)
    scales = None
    if a.scales is not None and w.scales is not None:
        scales = (_to_device(a.scales, where), _to_device(w.scales, where))
    begin = None if start is None else _to_device(_start_codes(start, path), where)
    sides = _to_device(a.codes, where), _to_device(w.codes, where)
    codes = emulate_tiles(*sides, path, (a.format, w.format), begin, segment, scales)[0]
    return codes.long() & ((1 << path.output.bits) - 1)


@lru_cache(maxsize=256)
def _library(path: Datapath, a: Format, w: Format) -> ctypes.CDLL:
    """The emulator of one combination, compiled for this processor."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(f"{path.name}: got no g++ on PATH, expected one to build the emulator; use dot.emulate instead")
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder) / "emulator.cpp", Path(folder) / "emulator.so"
        text.write_text(host_source({"emulate": (path, a, w)}), encoding="utf-8")
        command = [compiler, "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", "-o", str(library), str(text)]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))


def dot_emulated_host(
    a: Operand, w: Operand, path: Datapath, start: Reals | None = None, segment: int = 0, threads: int = 0
) -> Codes:
    """As `dot.dot_emulated`, the same bits, by the C++ of the GPU compiled for this processor; `segment` as in `emulate_tiles`.

    threads: 0 takes one per processor that this process may use. The first call of a combination of record and formats compiles
    for a second or two. Raises ValueError as `dot_emulated_cuda`, and RuntimeError where g++ is missing.
    """
    structure(path, a.format, w.format)
    m, n, k = check_pair(a, w, start, path)
    for op in (a, w):
        check_read(op, path)
    check_segment(segment, path)
    library = _library(path, a.format, w.format)
    begin = None if start is None else np.ascontiguousarray(_start_codes(start, path))
    left, right = np.ascontiguousarray(a.codes), np.ascontiguousarray(w.codes)
    scales = [left if op.scales is None else np.ascontiguousarray(op.scales) for op in (a, w)]
    out = np.empty((m, n), dtype=container(path.output))

    def part(first: int, rows: int) -> None:
        arrays = (left[first:], right, scales[0][first:], scales[1], out[first:] if begin is None else begin[first:], out[first:])
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in arrays]
        library.emulate(*pointers, rows, n, k, segment, int(begin is not None), 1)

    count = threads or len(os.sched_getaffinity(0))
    rows = -(-m // (count * _TILE)) * _TILE
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda first: part(first, min(rows, m - first)), range(0, m, max(rows, 1))))
    return out


def _start_codes(start: Reals, path: Datapath) -> Codes:
    """Codes of start values, which are values of the output format."""
    return start.astype(np.int32).view(np.uint32) if path.family is Family.INTEGER else held_codes(start, path)
