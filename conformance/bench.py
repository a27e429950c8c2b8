"""Speed of the suite itself: codecs, emulation, and the judgement of one large case per op. Figures, never tests.

    python -m lowbit.conformance.bench [--json FILE]

Every figure is the median of several runs in this process; ml_dtypes is timed beside our codecs and mmasim beside our emulation
where they are installed, and no number comes from either.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.references import cuda_dot, numba_dot, numba_twin
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Claim, Contraction, Declaration, Order
from lowbit.references.dot import Operand, running_bound
from lowbit.references.formats import E2M1, E4M3FN, E5M2, UE4M3
from lowbit.references.rounding import encode

from . import report
from .bounds import power
from .case import Case, Stream
from .op import Op, make_problem
from .ops import ops
from .patterns import draw_operands
from .simulator import simulated_program
from .verdict import judge_outputs

__all__ = ["main"]


def _median(function: Callable[[], Any], repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _codecs(count: int) -> list[dict[str, Any]]:
    x = Stream("bench codecs").normal((count,)).astype(np.float32) * np.float32(20)
    rows = []
    witness: dict[str, Any] = {}
    if importlib.util.find_spec("ml_dtypes"):
        module = importlib.import_module("ml_dtypes")
        witness = {"e4m3fn": module.float8_e4m3fn, "e5m2": module.float8_e5m2, "e2m1": module.float4_e2m1fn}
    for fmt in (E4M3FN, E5M2, E2M1):
        codes = encode(x, fmt)
        row: dict[str, Any] = {"codec": fmt.name, "elements": count}
        row["encode_numpy"] = count / _median(lambda: encode(x, fmt)) / 1e6  # noqa: B023 (called at once)
        row["encode_compiled"] = count / _median(lambda: numba_twin.encode_compiled(x, fmt)) / 1e6  # noqa: B023
        row["decode_compiled"] = count / _median(lambda: numba_twin.decode_compiled(codes, fmt)) / 1e6  # noqa: B023
        if fmt.name in witness:
            kind = witness[fmt.name]
            stored = x.astype(kind)
            row["encode_ml_dtypes"] = count / _median(lambda: x.astype(kind)) / 1e6  # noqa: B023
            row["decode_ml_dtypes"] = count / _median(lambda: stored.astype(np.float32)) / 1e6  # noqa: B023
        rows.append(row)
    return rows


def _emulation() -> list[dict[str, Any]]:
    rows = []
    for name, fmt, scale in (("hopper_wgmma_fp8", E4M3FN, False), ("blackwell_nvfp4", E2M1, True)):
        stream = Stream("bench emulation", name)
        m, n, k = 128, 128, 2048

        def side(rows_: int, stream: Stream = stream, fmt: Any = fmt, scale: bool = scale, k: int = k) -> Operand:
            codes = encode(stream.normal((rows_, k)) * (2.0 if scale else 50.0), fmt)
            if not scale:
                return Operand(codes, fmt)
            return Operand(codes, fmt, encode(np.abs(stream.normal((rows_, k // 16))) + 0.1, UE4M3), UE4M3, 16)

        a, w = side(m), side(n)
        path = DATAPATHS[name]
        seconds = _median(lambda: numba_dot.dot_emulated_compiled(a, w, path), 3)  # noqa: B023
        bound_seconds = _median(lambda: running_bound(a, w, path), 1)  # noqa: B023
        rows.append(
            {
                "datapath": name,
                "products": m * n * k,
                "emulate_ns_per_product": seconds / (m * n * k) * 1e9,
                "bound_ns_per_product": bound_seconds / (m * n * k) * 1e9,
            }
        )
    return rows


def _cpu_ns(function: Callable[[], Any], products: int) -> float:
    """CPU nanoseconds per product of the second call, all threads together: wall time depends on who else uses the machine."""
    function()
    begin = time.process_time()
    function()
    return (time.process_time() - begin) / products * 1e9


def _witness() -> list[dict[str, Any]]:
    """CPU time per product of Hopper's fp8 chain: our two compiled emulators, and mmasim where it is installed."""
    m, n, k, path = 128, 128, 512, DATAPATHS["hopper_wgmma_fp8"]
    a, w = (Operand(encode(Stream("bench mmasim", side).normal((m, k)), E4M3FN), E4M3FN) for side in ("a", "w"))
    row: dict[str, Any] = {"datapath": path.name, "products": m * n * k}
    row["numba"] = _cpu_ns(lambda: numba_dot.dot_emulated_compiled(a, w, path), m * n * k)
    if shutil.which("g++"):
        row["host_c++"] = _cpu_ns(lambda: cuda_dot.dot_emulated_host(a, w, path, threads=1), m * n * k)
    if importlib.util.find_spec("mmasim") and importlib.util.find_spec("torch"):
        torch, fdpa = importlib.import_module("torch"), importlib.import_module("mmasim.arithmetic.fdpa")
        unit = fdpa.MMA_T_FDPA(path.fraction_bits, "RZ-E8M13", path.products, path.zero_exponent, "e4m3", "e4m3")
        left, right = (torch.from_numpy(op.codes).view(torch.float8_e4m3fn) for op in (a, w))
        row["mmasim"] = _cpu_ns(lambda: unit(left, right.T, torch.zeros(m, n)), m * n * k)
    return [row]


_PATHS = {
    "gemm_w4a16": "hopper_bf16",
    "gemm_w8a8_fp8": "hopper_wgmma_fp8",
    "gemm_w4a8_fp8": "hopper_wgmma_fp8",
    "gemm_w4a8_fp8_grouped": "hopper_wgmma_fp8",
    "gemm_w4a8_int8": "imma_s32",
    "gemm_nvfp4": "blackwell_nvfp4",
    "gemm_int4": "imma_s32",
}


def _judge(op: Op) -> dict[str, Any]:
    """Time from operands to verdict of a 128 x 128 x 4096 case under the op's narrow datapath, outputs taken from the middle."""
    dims = {"m": 128, "n": 128, "k": 4096, "g": 128, "r": 0, "e": 4}
    variant = op.variants[0]
    options = {option.name: "nolora" for option in op.options if option.name == "lora"}
    problem = make_problem(op, variant, {letter: dims[letter] for letter in op.dims}, options)
    case = Case(problem, "normal", 1)
    operands = draw_operands(op, case)
    program = simulated_program(op, problem, DATAPATHS[_PATHS[op.name]])
    declaration = Declaration(program, Claim.BOUNDED)

    def run() -> None:
        expected = op.expect(case, operands, declaration)["d"]
        power(op, case, operands, declaration, expected)
        judge_outputs({"d": expected}, {"d": expected.example()}, {})

    contraction = program[0]
    assert isinstance(contraction, Contraction)
    assert contraction.order is Order.ASCENDING
    return {"op": op.name, "case": str(case), "datapath": _PATHS[op.name], "seconds": _median(run, 1)}


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.conformance.bench", description="Speed of the suite itself.")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--elements", type=int, default=1 << 23, help="elements per codec run")
    arguments = parser.parse_args()
    data = {
        "codecs": _codecs(arguments.elements),
        "emulation": _emulation(),
        "cpu_ns_per_product": _witness(),
        "judge": [_judge(op) for op in ops().values() if op.is_gemm],
    }
    for row in data["codecs"]:
        print(
            "  ".join(f"{key} {value:.0f}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
            "(M elements/s)",
        )
    for row in data["emulation"]:
        print(
            f"{row['datapath']}: emulated {row['emulate_ns_per_product']:.1f}, bound {row['bound_ns_per_product']:.1f} ns/product"
        )
    for row in data["cpu_ns_per_product"]:
        figures = ", ".join(f"{name} {row[name]:.1f}" for name in ("numba", "host_c++", "mmasim") if name in row)
        print(f"{row['datapath']}: {figures} ns of CPU time per product")
    for row in data["judge"]:
        print(f"{row['case']} under {row['datapath']}: judged in {row['seconds']:.2f} s")
    if arguments.json:
        report.prepare_folder(arguments.json.resolve().parent)
        report.write_atomically(arguments.json, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
