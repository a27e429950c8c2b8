"""From the source of a probe to a kernel that can be launched, by torch alone: run-time compiler, driver, disassembler.

Decides: that what is disassembled is the binary that is launched, and which tensors a probe takes.
Refuses: devices other than compute capability 9.0 and binaries that do not show the instruction under test.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .instructions import TYPES, Instruction
from .sources import ENTRY, source

__all__ = ["Probe", "assemble", "build", "check_tiles", "compiled", "disassemble", "opcodes", "tool"]

_ARCHITECTURE = "90a"  # wgmma belongs to the architecture-specific feature set
_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_MATRIX = re.compile(r"\b([QHI]G?MMA(?:\.\w+)*)")


@dataclass(frozen=True, slots=True)
class Probe:
    """A loaded kernel. `sass`: its disassembly; `opcodes`: how often each matrix opcode stands there."""

    instruction: Instruction
    sass: str
    opcodes: dict[str, int]
    kernel: Any

    def __call__(self, a: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """A [tiles, m, steps k], W [tiles, n, steps k], C [tiles, m, n] as codes on one device -> D [tiles, m, n].

        Step s takes k elements from s k on; the first accumulates into C, each further one into the result before it.
        Raises ValueError for other shapes and dtypes, and for tensors that are not on a CUDA device.
        """
        tiles, steps = check_tiles(self.instruction, a, w, c)
        if a.device.type != "cuda":
            raise ValueError(f"{self.instruction.name}: got tiles on {a.device}, expected a CUDA device")
        out = torch.empty_like(c)
        blocks = tiles if self.instruction.unit == "wgmma" else -(-tiles // 4)
        self.kernel(grid=(blocks, 1, 1), block=(128, 1, 1), args=[a, w, c, out, tiles, steps])
        return out


def check_tiles(instruction: Instruction, a: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> tuple[int, int]:
    """(tiles, steps). Raises ValueError where a tensor is not contiguous codes of the instruction's shape and size."""
    tiles, steps = a.shape[0], a.shape[-1] // instruction.k
    k = steps * instruction.k
    wanted = (
        ("A", a, (tiles, instruction.m, k), TYPES[instruction.a].size),
        ("W", w, (tiles, instruction.n, k), TYPES[instruction.b].size),
        ("C", c, (tiles, instruction.m, instruction.n), TYPES[instruction.d].size),
    )
    for letter, tensor, shape, size in wanted:
        right = tuple(tensor.shape) == shape and tensor.dtype == _DTYPES[size] and tensor.is_contiguous()
        if not right or tensor.device != a.device or steps == 0:
            raise ValueError(
                f"{instruction.name}: got {letter} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected contiguous "
                f"{_DTYPES[size]} {shape} on {a.device} with K a positive multiple of {instruction.k}"
            )
    return tiles, steps


def tool(name: str) -> Path:
    """A program of the CUDA toolkit: on PATH, in its usual folder, or inside the installed triton.

    Raises FileNotFoundError where it is in none of them.
    """
    folders = [Path("/usr/local/cuda/bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name)
    candidates = ([Path(found)] if found else []) + [folder / name for folder in folders]
    for path in candidates:
        if path.is_file():
            return path
    places = [str(folder) for folder in folders]
    raise FileNotFoundError(f"{name}: found neither on PATH nor in {places}; install the CUDA toolkit or triton")


def assemble(text: str) -> bytes:
    """The cubin of a kernel source, compiled by NVRTC as torch ships it (by ptxas where that NVRTC call stops at PTX)."""
    from torch.cuda._utils import _nvrtc_compile

    binary, _ = _nvrtc_compile(text, ENTRY, _ARCHITECTURE)
    if binary[:4] == b"\x7fELF":
        return binary
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "probe.ptx", Path(folder) / "probe.cubin"
        ptx.write_bytes(binary.rstrip(b"\0"))
        subprocess.run([tool("ptxas"), f"-arch=sm_{_ARCHITECTURE}", ptx, "-o", cubin], check=True, capture_output=True)
        return cubin.read_bytes()


def disassemble(cubin: bytes) -> str:
    """Machine code as text, without addresses and encodings, so that equal code gives equal text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool("nvdisasm"), "-c", path], check=True, capture_output=True, text=True).stdout
    return "\n".join(re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines() if ";" in line)


def opcodes(sass: str) -> dict[str, int]:
    """Matrix opcodes of a disassembly with their qualifiers, counted."""
    return dict(Counter(_MATRIX.findall(sass)))


def compiled(instruction: Instruction) -> tuple[bytes, str]:
    """Cubin and disassembly of one probe. Raises RuntimeError where the machine code shows other matrix opcodes than its own."""
    cubin = assemble(source(instruction))
    sass = disassemble(cubin)
    found = opcodes(sass)
    if {name.partition(".")[0] for name in found} != {instruction.opcode}:
        raise RuntimeError(f"{instruction.name}: got matrix opcodes {found}, expected {instruction.opcode} alone")
    return cubin, sass


def build(instructions: Iterable[Instruction], workers: int = 8) -> dict[str, Probe]:
    """Compile side by side, check by disassembly, load on the current device; by name.

    Raises RuntimeError as `compiled`, and where the device is not of compute capability 9.0.
    """
    from torch.cuda._utils import _cuda_load_module

    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError(f"probes: got compute capability {torch.cuda.get_device_capability()}, expected (9, 0)")
    wanted = list(instructions)
    with ThreadPoolExecutor(workers) as pool:
        binaries = list(pool.map(compiled, wanted))
    probes = {}
    for instruction, (cubin, sass) in zip(wanted, binaries, strict=True):
        loaded = _cuda_load_module(cubin, [ENTRY])  # here: the context belongs to this thread
        assert isinstance(loaded, dict)
        probes[instruction.name] = Probe(instruction, sass, opcodes(sass), loaded[ENTRY])
    return probes
