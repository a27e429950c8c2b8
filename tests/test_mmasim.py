"""A witness by other authors: the emulator agrees with PyPI mmasim 2.1.1 on random nodes, bit for bit, and is faster.

mmasim keeps its own tables of instructions and its own arithmetic (torch, float64). Compared are all instruction families that
both describe; the suite draws 10^4 nodes of each, and 10^6 of each are drawn and timed by

    export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
    python -c "import sys; sys.path.insert(0, 'tests'); import test_mmasim; test_mmasim.report(1000)"
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.references import cuda_dot
from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.dot import Operand, emulate
from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    F16,
    F32,
    UE4M3,
    Codes,
    Format,
    container,
    decode,
)


def simulators() -> tuple[Any, Any]:
    """mmasim's packages for NVIDIA and AMD. Its fused multiply-add (f32 and f64, not compared here) builds a C++ extension when
    it is imported; an empty module in its place saves the compiler."""
    name = "mmasim.arithmetic.fma"
    if name not in sys.modules:
        empty = ModuleType(name)
        empty.MMA_FMA = None  # type: ignore[attr-defined]
        sys.modules[name] = empty
    return importlib.import_module("mmasim.nv_ptx"), importlib.import_module("mmasim.amd")


TORCH = {
    E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, E4M3FNUZ: torch.float8_e4m3fnuz, E5M2FNUZ: torch.float8_e5m2fnuz,
    F16: torch.float16, BF16: torch.bfloat16, F32: torch.float32, UE4M3: torch.float8_e4m3fn, E8M0: torch.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One instruction of mmasim and the record that should equal it, with the operand formats of this comparison."""

    record: str
    unit: str  # class of mmasim
    architecture: str
    instruction: str
    a: Format
    w: Format


def _pairs() -> list[Pair]:
    fp8 = {"e4m3": E4M3FN, "e5m2": E5M2}
    found = []
    for half, d in (("", "f32"), ("_f16", "f16")):
        for left, a in fp8.items():
            for right, w in fp8.items():
                found.append(Pair(f"hopper_wgmma_fp8{half}", "WGMMA", "Hopper", f"m64n8k32.{d}.{left}.{right}", a, w))
                found.append(Pair(f"ada_fp8{half}", "MMA", "Ada Lovelace", f"m16n8k32.{d}.{left}.{right}.{d}", a, w))
        mixed = f"m64n8k32.kind::f8f6f4.{d}.e4m3.e5m2"
        found.append(Pair(f"blackwell_f8f6f4{half}", "TCGen05MMA", "Blackwell", mixed, E4M3FN, E5M2))
        found.append(Pair(f"hopper_f16{half}", "WGMMA", "Hopper", f"m64n8k16.{d}.f16.f16", F16, F16))
        found.append(Pair(f"blackwell_f16{half}", "TCGen05MMA", "Blackwell", f"m64n8k16.kind::f16.{d}.f16.f16", F16, F16))
        for name, architecture, k in (("volta", "Volta", "m8n8k4"), ("turing", "Turing", "m16n8k8"),
                                      ("ampere", "Ampere", "m16n8k16"), ("ada", "Ada Lovelace", "m16n8k16")):
            found.append(Pair(f"{name}_f16{half}", "MMA", architecture, f"{k}.{d}.f16.f16.{d}", F16, F16))
    for name, architecture in (("ampere", "Ampere"), ("ada", "Ada Lovelace")):
        found.append(Pair(f"{name}_bf16", "MMA", architecture, "m16n8k16.f32.bf16.bf16.f32", BF16, BF16))
        found.append(Pair(f"{name}_tf32", "MMA", architecture, "m16n8k8.f32.tf32.tf32.f32", F32, F32))
    found += [
        Pair("hopper_bf16", "WGMMA", "Hopper", "m64n8k16.f32.bf16.bf16", BF16, BF16),
        Pair("hopper_tf32", "WGMMA", "Hopper", "m64n8k8.f32.tf32.tf32", F32, F32),
        Pair("hopper_tf32_k4", "MMA", "Hopper", "m16n8k4.f32.tf32.tf32.f32", F32, F32),
        Pair("blackwell_bf16", "TCGen05MMA", "Blackwell", "m64n8k16.kind::f16.f32.bf16.bf16", BF16, BF16),
        Pair("blackwell_tf32", "TCGen05MMA", "Blackwell", "m64n8k8.kind::tf32.f32.tf32.tf32", F32, F32),
        Pair("blackwell_mxf8f6f4", "TCGen05MMABlockScale", "Blackwell", "m128n8k32.kind::mxf8f6f4.block32.f32.e4m3.e5m2.ue8m0",
             E4M3FN, E5M2),
        Pair("blackwell_mxfp4", "TCGen05MMABlockScale", "Blackwell", "m128n8k64.kind::mxf4.block32.f32.e2m1.e2m1.ue8m0",
             E2M1, E2M1),
        Pair("blackwell_nvfp4", "TCGen05MMABlockScale", "Blackwell", "m128n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.ue4m3",
             E2M1, E2M1),
        Pair("cdna1_f16", "MFMA", "CDNA1", "f32_4x4x4f16", F16, F16),
        Pair("cdna1_bf16", "MFMA", "CDNA1", "f32_4x4x2bf16", BF16, BF16),
        Pair("cdna2_f16", "MFMA", "CDNA2", "f32_4x4x4f16", F16, F16),
        Pair("cdna2_bf16_1k", "MFMA", "CDNA2", "f32_4x4x4bf16_1k", BF16, BF16),
        Pair("cdna2_bf16", "MFMA", "CDNA2", "f32_4x4x2bf16", BF16, BF16),
        Pair("cdna3_f16", "MFMA", "CDNA3", "f32_32x32x8_f16", F16, F16),
        Pair("cdna3_bf16", "MFMA", "CDNA3", "f32_32x32x8_bf16", BF16, BF16),
        Pair("cdna3_xf32", "MFMA", "CDNA3", "f32_32x32x4_xf32", F32, F32),
        Pair("cdna3_fp8", "MFMA", "CDNA3", "f32_32x32x16_fp8_bf8", E4M3FNUZ, E5M2FNUZ),
    ]
    return found


PAIRS = {f"{pair.record}, {pair.a.name} by {pair.w.name}": pair for pair in _pairs()}


def simulator(pair: Pair) -> Any:
    nvidia, amd = simulators()
    return getattr(amd if pair.unit == "MFMA" else nvidia, pair.unit)(pair.architecture, pair.instruction)


def drawn(rng: np.random.Generator, shape: tuple[int, int], fmt: Format, rare: int = 2) -> Codes:
    """Every rare-th row random bit patterns, the others of exponents near each other, where alignment and rounding decide."""
    codes = rng.integers(0, 1 << fmt.bits, shape, dtype=np.uint64)
    if fmt.exponent_bits > 2:
        near = rng.integers(fmt.bias - 3, fmt.bias + 4, shape).astype(np.uint64) << np.uint64(fmt.mantissa_bits)
        kept = np.uint64(((1 << fmt.bits) - 1) ^ (((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits))
        ordinary = np.arange(shape[0]) % rare != rare - 1
        codes[ordinary] = ((codes & kept) | near)[ordinary]
    return codes.astype(container(fmt))


def as_torch(codes: Codes, fmt: Format) -> torch.Tensor:
    return torch.from_numpy(codes.view(f"i{codes.itemsize}")).view(TORCH[fmt])


def elements(codes: Codes, fmt: Format, pair: Pair) -> torch.Tensor:
    """As mmasim takes them: e2m1 two to a byte, the first in the upper half."""
    if fmt is E2M1:
        return torch.from_numpy(codes[:, ::2] << 4 | codes[:, 1::2])
    return as_torch(codes, fmt)


Problem = tuple[Operand, Operand, Codes]


def problem(pair: Pair, rows: int, columns: int, seed: int = 0, steps: int = 1, rare: int = 2) -> Problem:
    path = DATAPATHS[pair.record]
    rng = np.random.default_rng([40, seed, *pair.instruction.encode()])
    sides = []
    for count, fmt in ((rows, pair.a), (columns, pair.w)):
        codes = drawn(rng, (count, path.instruction_k * steps), fmt, rare)
        if path.scale_format is None:
            sides.append(Operand(codes, fmt))
            continue
        scales = drawn(rng, (count, codes.shape[1] // path.scale_group), path.scale_format, rare)
        if path.scale_format is UE4M3:
            scales &= np.uint8(0x7F)
        sides.append(Operand(codes, fmt, scales, path.scale_format, path.scale_group))
    return sides[0], sides[1], drawn(rng, (rows, columns), path.output, rare)


def theirs(pair: Pair, given: Problem) -> Codes:
    """mmasim's bits [M, N], blocks of rows at a time to bound its memory."""
    a, w, c = given
    unit, path = simulator(pair), DATAPATHS[pair.record]
    out, block = np.empty_like(c), max(1, (1 << 22) // (c.shape[1] * a.codes.shape[1]))
    right = elements(w.codes, w.format, pair).T
    for top in range(0, len(c), block):
        part = slice(top, top + block)
        sides = [elements(a.codes[part], a.format, pair), right, as_torch(c[part], path.output)]
        if a.scales is not None and w.scales is not None and path.scale_format is not None:
            sides += [as_torch(a.scales[part], path.scale_format), as_torch(w.scales, path.scale_format).T]
        result = unit(*sides).contiguous()
        out[part] = result.view(torch.int16 if path.output is F16 else torch.int32).numpy().view(c.dtype)
    return out


def ours(pair: Pair, given: Problem) -> Codes:
    a, w, c = given
    with np.errstate(invalid="ignore"):
        return emulate(a, w, DATAPATHS[pair.record], decode(c, DATAPATHS[pair.record].output))


def comparable(codes: Codes, path: Datapath, pair: Pair) -> npt.NDArray[np.int64]:
    """Bits; for AMD, of whose units neither knows the NaN nor the sign of a zero, every NaN alike and every zero alike."""
    wide = codes.astype(np.int64)
    if pair.unit != "MFMA":
        return wide
    with np.errstate(invalid="ignore"):
        value = decode(codes, path.output)
    return np.where(np.isnan(value), -1, np.where(value == 0, 0, wide))


def differing(pair: Pair, given: Problem) -> int:
    path = DATAPATHS[pair.record]
    return int((comparable(ours(pair, given), path, pair) != comparable(theirs(pair, given), path, pair)).sum())


@pytest.mark.parametrize("name", PAIRS)
def test_both_compute_the_same_bits(name: str) -> None:
    given = problem(PAIRS[name], 100, 100)
    with np.errstate(invalid="ignore"):
        values = decode(theirs(PAIRS[name], given), DATAPATHS[PAIRS[name].record].output)
    assert np.isfinite(values).sum() > 1000  # not all of them are NaN
    assert differing(PAIRS[name], given) == 0


def test_a_difference_would_be_seen() -> None:
    pair = PAIRS["hopper_wgmma_fp8, e4m3fn by e4m3fn"]
    other = Pair("ada_fp8", *(getattr(pair, part) for part in ("unit", "architecture", "instruction", "a", "w")))
    assert differing(other, problem(pair, 100, 100)) > 100


def timed(compute: Callable[[], Any]) -> float:
    """CPU seconds of the second call, all threads together: what other programs do meanwhile does not count."""
    compute()
    begin = time.process_time()
    compute()
    return time.process_time() - begin


def report(rows: int, names: Iterable[str] = PAIRS) -> None:
    """Nodes compared (rows x rows), differences, and CPU time per product on 128 x 128 x 512 without special values: `emulate`
    (numba), the C++ of cuda_dot on the host (which has no AMD family), mmasim, and how many times longer mmasim takes."""
    print(f"{'pair':46} {'results':>10} {'differ':>6} {'numba ns':>9} {'C++ ns':>7} {'mmasim ns':>9} {'ratio':>6} {'ratio':>6}")
    for name in names:
        pair = PAIRS[name]
        given = problem(pair, rows, rows)
        count, path = differing(pair, given), DATAPATHS[pair.record]
        steps = 1 if path.scale_group == path.instruction_k else max(1, 512 // path.instruction_k)  # mmasim's own limit
        small = problem(pair, 128, 128, 1, steps, rare=1 << 20)
        start = decode(small[2], path.output)
        calls: list[Callable[[], Any]] = [lambda: ours(pair, small), lambda: theirs(pair, small)]  # noqa: B023 (called at once)
        if path.family in cuda_dot.FAMILIES:
            calls.append(lambda: cuda_dot.dot_emulated_host(small[0], small[1], path, start, threads=1))  # noqa: B023
        products = 128 * 128 * small[0].codes.shape[1]
        numba, other, *host = (timed(call) / products * 1e9 for call in calls)
        cpp, faster = (f"{host[0]:7.2f}", f"{other / host[0]:6.0f}") if host else ("", "")
        figures = f"{numba:9.2f} {cpp:7} {other:9.0f} {other / numba:6.0f} {faster}"
        print(f"{name:46} {rows * rows:10,} {count:6,} {figures}", flush=True)
