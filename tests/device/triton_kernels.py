"""The Triton quantisers and encodings on a CUDA device: bits against the references, then times against a roof and eager torch.

Decides: whether every code, quotient and case of `tests/interpreter/bit_cases.py` is admissible on the device, that offsets
beyond 2^31 elements are right, and how long svdquant_quantize takes. Refuses: to run without a CUDA device.

    TRITON_INTERPRET=0 python tests/device/triton_kernels.py [--bits [--only TEXT]] [--large] [--times] --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "interpreter"))

import torch
import triton
from bit_cases import CASES, codec_faults, division_faults, tie_faults
from triton_gemms import ROTATED, graph_us

from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.worker import Worker
from lowbit.kernels.triton_room import svdquant_quantize as svdquant

BACKEND = f"python:{Path(__file__).parents[1] / 'interpreter' / 'interpreted.py'}:honest"

READ, WRITTEN = 4.40e12, 3.40e12  # bytes per second of the H200's memory, as the issue has them
SHAPES = tuple((4352, k, r) for k in (3840, 7680, 15360) for r in (32, 128))


# Bits ----------------------------------------------------------------------------------------------------------------


def judge(share: Sequence[str]) -> list[tuple[str, str, str]]:
    """(case, status, reason and worst element) of every case of a share, by one worker."""
    with Worker(BACKEND, timeout=300.0, path=()) as worker:
        session = Session(Plan(BACKEND, timeout=300.0), worker)
        session.open()
        found = []
        for case in share:
            listed = listed_of(case)
            for verdict in session.judge(listed, worker.supports([listed.case.problem])[0]):
                found.append((case, verdict.status.name, f"{verdict.reason} {verdict.worst}"))
        return found


def bits(only: str) -> list[str]:
    """What is wrong with the cases whose id holds `only`, and with codecs and divisions."""
    start = time.monotonic()
    cases = [case for case in CASES if only in case]
    workers = min(max(1, (os.cpu_count() or 2) - 3), len(cases))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        verdicts = [row for rows in pool.map(judge, [cases[i::workers] for i in range(workers)]) for row in rows]
    counts: dict[str, int] = {}
    for _, status, _ in verdicts:
        counts[status] = counts.get(status, 0) + 1
    print(f"cases: {counts}, {time.monotonic() - start:.0f} s", flush=True)
    faults = [f"{case}: {status} {reason}" for case, status, reason in verdicts if status not in ("EXACT", "WITHIN")]
    faults += codec_faults("cuda", 10_000_000) + division_faults("cuda", 10_000_000)
    faults += [fault for variant in ("nvfp4", "int4") for form in (1, 2) for fault in tie_faults("cuda", variant, form)]
    print(f"codecs, divisions and ties: {time.monotonic() - start:.0f} s", flush=True)
    return faults


# Sizes ---------------------------------------------------------------------------------------------------------------


def draw(m: int, k: int, r: int) -> dict[str, torch.Tensor]:
    """bf16 operands as int16 codes, and outputs full of a pattern."""
    torch.manual_seed(m + k + r)
    rows = -(-m // 256) * 256
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    smooth = (torch.rand(k, device="cuda") + 0.5).to(torch.bfloat16)
    down = torch.randn(k, r, device="cuda", dtype=torch.bfloat16) / math.sqrt(k)
    return {
        "x": x.view(torch.int16), "smooth": smooth.view(torch.int16), "down": down.view(torch.int16),
        "inverse": svdquant.inverses(smooth.view(torch.int16), form=2),
        "q": torch.full((rows, k // 2), 0xA5, device="cuda", dtype=torch.uint8),
        "nvfp4": torch.full((k // 16, rows), 0xA5, device="cuda", dtype=torch.uint8),
        "int4": torch.full((k // 64, rows), 0x5A5A, device="cuda", dtype=torch.int16),
        "act": torch.full((rows, r), float("nan"), device="cuda"),
        "parts": torch.full((max(svdquant.SPLITS.values()), rows, r), float("nan"), device="cuda"),
    }


def quantise(t: dict[str, torch.Tensor], variant: str, splits: int) -> None:
    """Launch svdquant_quantize."""
    svdquant.svdquant_quantize(
        t["x"], t["smooth"], t["inverse"], t["down"], t["q"], t[variant], t["act"], t["parts"][:splits], variant=variant,
        recipe="svdquant", form=2, native=True, splits=splits,
    )


def large() -> list[str]:
    """Rows beyond 2^31 elements of x have the results of the same rows alone."""
    m, k, r = 135_168, 16_384, 16
    faults = []
    whole = draw(m, k, r)
    tail = draw(256, k, r)
    tail["x"].copy_(whole["x"][-256:])
    tail |= {name: whole[name] for name in ("smooth", "down", "inverse")}
    for variant in ("nvfp4", "int4"):
        quantise(whole, variant, 1)
        quantise(tail, variant, 1)
        same = (torch.equal(whole["q"][-256:], tail["q"]), torch.equal(whole[variant][:, -256:], tail[variant]),
                torch.equal(whole["act"][-256:], tail["act"]))
        if not all(same):
            faults.append(f"{variant} {m} x {k}: q, scales, lora_act of the last 256 rows equal those rows alone: {same}")
    print(f"large: {m} x {k} = {m * k} elements, faults {len(faults)}", flush=True)
    return faults


# Times ---------------------------------------------------------------------------------------------------------------


def eager(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same steps in torch: smooth, block scale, quotient, codes with ties away, packing, projection."""
    x, smooth, down = (t[name].view(torch.bfloat16) for name in ("x", "smooth", "down"))
    smoothed = (x.float() / smooth.float()).view(x.shape[0], -1, 16)
    scale = (smoothed.abs().amax(-1) / 6).clamp(1e-12, 448).to(torch.float8_e4m3fn)
    quotient = smoothed / scale.float()[..., None]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    code = torch.bucketize(quotient.abs(), ties, right=True).to(torch.uint8) | ((smoothed < 0).to(torch.uint8) << 3)
    code = code.view(x.shape)
    return code[:, 0::2] | (code[:, 1::2] << 4), scale.view(torch.uint8).t().contiguous(), (x @ down).float()


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a call; the cache is overwritten before each."""
    return float(triton.testing.do_bench(call, warmup=20, rep=100, return_mode="median")) * 1000


def times() -> list[dict[str, object]]:
    """A row per shape and variant, as `lowbit bench` has them. Calls walk through copies of all operands and outputs, several
    times the L2 cache, so that x comes from memory and outputs go there; eager torch finds the cache overwritten."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / (graph_us(lambda i: a @ b, 1) * 1e-6)
    print(f"bf16 rate {rate / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[dict[str, object]] = []
    for m, k, r in SHAPES:
        copies = max(2, -(-ROTATED // (2 * m * k)))
        sets = [draw(m, k, r) for _ in range(copies)]
        padded = sets[0]["q"].shape[0]
        peer = microseconds(lambda t=sets[0]: eager(t))  # type: ignore[misc]
        for variant, size, width in (("nvfp4", 16, 1), ("int4", 64, 2)):
            read = 2 * (m * k + k + k * r)
            written = padded * (k // 2 + k // size * width + 4 * r)
            roof = max(1e6 * (read / READ + written / WRITTEN), 1e6 * 2 * m * k * r / rate)
            for tactic, splits in svdquant.SPLITS.items():
                us = graph_us(lambda i, sets=sets, v=variant, s=splits: quantise(sets[i], v, s), copies)  # type: ignore[misc]
                rows.append({"op": f"svdquant_quantize/{variant}", "m": m, "k": k, "r": r, "tactic": tactic, "us": us,
                             "roof_us": roof, "peers": {"torch eager (nvfp4)": peer}})
                print(f"{variant} k={k} r={r} {tactic}: {us:.1f} us, roof {roof:.1f} ({us / roof:.2f}x), eager {peer:.0f} "
                      f"({peer / us:.1f}x)", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("bits", "large", "times"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--only", default="", help="judge the cases whose id holds this text")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(torch.cuda.get_device_name(0), torch.__version__, triton.__version__, flush=True)
    faults = []
    if chosen.times:
        (chosen.out / "times.json").write_text(json.dumps(times(), indent=1))
    if chosen.large:
        faults += large()
    if chosen.bits:
        faults += bits(chosen.only)
    print("\n".join(faults[:12]), flush=True)
    (chosen.out / "faults.json").write_text(json.dumps(faults, indent=1))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
