"""gemm_w8a8_fp8 on the chip: every tactic against exact sums and against the emulated unit, bit for bit, then its speed.

Decides: nothing about arithmetic. Sums of small integers are exact in the unit's 14 bits, so D is known without a model; on
normal data D is what the measured record of the unit (hopper_wgmma_fp8) and one rounding per step give.
Refuses: tolerances.

    python tests/device/hopper_gemm_w8a8.py               # on Hopper: builds, checks; ends with 0 where nothing differed
    lowbit bench python:tests/device/hopper_gemm_w8a8.py:BACKEND --ops gemm_w8a8_fp8/scaled
    lowbit certify python:tests/device/hopper_gemm_w8a8.py:BACKEND --ops gemm_w8a8_fp8
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from lowbit.conformance.backend import NOT_EXECUTED, Problem
from lowbit.kernels.hopper_room import build, gemm_w8a8
from lowbit.references import cuda_dot
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.formats import E4M3FN

__all__ = ["BACKEND", "main"]

PATH = DATAPATHS["hopper_wgmma_fp8"]
SHAPES = (
    (1, 8, 16), (1, 256, 512), (3, 136, 272), (15, 392, 1024), (32, 224, 640), (7, 520, 1040), (64, 112, 128), (65, 96, 144),
    (130, 392, 384), (200, 1000, 2064), (333, 2056, 512), (512, 640, 4096), (640, 16384, 272),
)
"""(M, N, K): one of everything, tails of every tile, K of less than one stage up to more than all of them."""


class _Only:
    """The op alone as a backend, until and beside the door of the target."""

    name, target, device = "hopper_gemm_w8a8", "cuda", "cuda:0" if torch.cuda.is_available() else "host"
    execution = "executed" if torch.cuda.is_available() else "compiled"
    declare, tactics = staticmethod(gemm_w8a8.declaration), staticmethod(gemm_w8a8.tactics)
    prepare, stage, run = staticmethod(gemm_w8a8.prepare), staticmethod(gemm_w8a8.stage), staticmethod(gemm_w8a8.run)

    @staticmethod
    def supports(problem: Problem) -> str | None:
        if not torch.cuda.is_available():
            return f"{NOT_EXECUTED}: no CUDA device here"
        return gemm_w8a8.unsupported(problem) if problem.op in gemm_w8a8.OPS else "only gemm_w8a8_fp8"


BACKEND = _Only()


def _names(shape: tuple[int, int, int], block: bool) -> tuple[str, ...]:
    """Every tactic that takes the shape."""
    dims = tuple(zip("mnk", shape, strict=True))
    options = (("out", "f32"), ("format", "fn"), ("act_scale", "token"), ("weight_scale", "channel"), ("bias", "nobias"))
    found: tuple[str, ...] = gemm_w8a8.tactics(Problem("gemm_w8a8_fp8", "block" if block else "scaled", dims, options))
    return found


def _expect(sums: torch.Tensor, channel: torch.Tensor, token: torch.Tensor, bias: torch.Tensor | None, out: torch.dtype) -> Any:
    """The epilogue in the same steps: float32 products; the sum of token product and bias through binary64, which rounds it twice
    where it has more than 53 bits, and nearly never does."""
    scaled = sums * channel
    if bias is None:
        return (scaled * token[:, None]).to(out)
    wide = scaled.double() * token[:, None].double() + bias.double()  # the product of 48 bits is exact in binary64
    return wide.float().to(out)


def _differs(found: torch.Tensor, expected: torch.Tensor, what: str) -> int:
    kind = torch.int16 if found.element_size() == 2 else torch.int32
    count = int((found.view(kind) != expected.view(kind)).sum())
    if count:
        at = torch.nonzero(found.view(kind) != expected.view(kind))[0].tolist()
        got, want = found[tuple(at)].item(), expected[tuple(at)].item()
        print(f"DIFFERS {what}: {count} of {found.numel()}, first at {at}: {got} instead of {want}", flush=True)
    return count


def _integers(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes whose sums stay below 2^13: -1, 0, 1, sparser the longer K is."""
    keep = min(1.0, 4096.0 / k)
    return tuple(  # type: ignore[return-value]
        (torch.randint(-1, 2, (rows, k), device="cuda") * (torch.rand(rows, k, device="cuda") < keep)).float() for rows in (m, n))


def exact_sums(shape: tuple[int, int, int]) -> int:
    """Every tactic on small integers: rows of D further apart than N, and the gaps keep what they held."""
    m, n, k = shape
    a, w = _integers(m, n, k)
    wrong, fp8 = 0, torch.float8_e4m3fn
    sums = (a.double() @ w.double().t()).float()
    token, channel = torch.rand(m, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5
    for out, pad in ((torch.bfloat16, 0), (torch.float16, 3), (torch.float32, 8)):
        bias = torch.randn(n, device="cuda").to(out)
        for name in _names(shape, False):
            whole = torch.full((m, n + pad), 7.0, dtype=out, device="cuda")
            d, added = whole[:, :n], bias if pad else None
            gemm_w8a8.gemm_w8a8_fp8(
                a.to(fp8), w.to(fp8), d, token_scale=token, channel_scale=channel, bias=added, tactic=name)
            expected = _expect(sums, channel, token, added, out)
            wrong += _differs(whole[:, :n].contiguous(), expected, f"integers {name} {shape} {out}")
            wrong += int((whole[:, n:] != 7.0).sum())
    if k % 128 == 0:
        a_scale = 2.0 ** torch.randint(-3, 4, (m, k // 128), device="cuda")
        w_scale = 2.0 ** torch.randint(-3, 4, (-(-n // 128), k // 128), device="cuda")
        rows = a.double() * a_scale.double().repeat_interleave(128, 1)
        columns = w.double() * w_scale.double().repeat_interleave(128, 1).repeat_interleave(128, 0)[:n]
        for name in _names(shape, True):
            d = torch.empty(m, n, device="cuda")
            gemm_w8a8.gemm_w8a8_fp8(a.to(fp8), w.to(fp8), d, a_scale=a_scale, w_scale=w_scale, tactic=name)
            wrong += _differs(d, (rows @ columns.t()).float() + 0.0, f"integers {name} {shape}")
    return wrong


def emulated(shape: tuple[int, int, int]) -> tuple[int, int]:
    """(elements compared, elements that differ) of every tactic on normal data, sums in float32 bits."""
    m, n, k = shape
    a, w = (torch.randn(rows, k, device="cuda").mul_(60).clamp_(-448, 448).to(torch.float8_e4m3fn) for rows in (m, n))
    token, channel = torch.rand(m, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5
    count = wrong = 0
    for sums, segment in (("fast", 0), ("promoted", 128)):
        bits = cuda_dot.emulate_tiles(
            a.view(torch.uint8)[None], w.view(torch.uint8)[None], PATH, (E4M3FN, E4M3FN), segment=segment)
        expected = _expect(bits[0].view(torch.float32), channel, token, None, torch.float32)
        for name in (name for name in _names(shape, False) if name.startswith(sums)):
            d = torch.empty(m, n, device="cuda")
            gemm_w8a8.gemm_w8a8_fp8(a, w, d, token_scale=token, channel_scale=channel, tactic=name)
            count, wrong = count + d.numel(), wrong + _differs(d, expected, f"emulated {name} {shape}")
    if k % 128 == 0:
        a_scale, w_scale = torch.rand(m, k // 128, device="cuda"), torch.rand(-(-n // 128), k // 128, device="cuda")
        columns = w_scale.repeat_interleave(128, 0)[:n]
        total = torch.zeros(m, n, dtype=torch.float64, device="cuda")
        for block in range(k // 128):
            part = slice(128 * block, 128 * block + 128)
            bits = cuda_dot.emulate_tiles(
                a.view(torch.uint8)[None, :, part].contiguous(), w.view(torch.uint8)[None, :, part].contiguous(), PATH,
                (E4M3FN, E4M3FN))
            scale = a_scale[:, block, None] * columns[None, :, block]
            total = (bits[0].view(torch.float32).double() * scale.double() + total).float().double()
        for name in _names(shape, True):
            d = torch.empty(m, n, device="cuda")
            gemm_w8a8.gemm_w8a8_fp8(a, w, d, a_scale=a_scale, w_scale=w_scale, tactic=name)
            count, wrong = count + d.numel(), wrong + _differs(d, total.float(), f"emulated {name} {shape}")
    return count, wrong


def main() -> int:
    """Build, check and say what differed."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    start = time.monotonic()
    build.build_all(gemm_w8a8.UNITS)
    print(f"{time.monotonic() - start:.0f} s: {len(gemm_w8a8.UNITS)} instances", flush=True)
    wrong = sum(exact_sums(shape) for shape in SHAPES)
    torch.cuda.synchronize()
    print(f"{time.monotonic() - start:.0f} s: exact sums on {len(SHAPES)} shapes, {wrong} elements differ", flush=True)
    for shape in ((130, 392, 2048), (512, 1032, 4096), (64, 12288, 12288)):
        count, differ = emulated(shape)
        wrong += differ
        print(f"{time.monotonic() - start:.0f} s: emulated {shape}: {differ} of {count:,} elements differ", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
