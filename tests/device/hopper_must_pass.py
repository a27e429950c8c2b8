"""A small list of problems over every op and several tactics of cuda_hopper, each judged once: what a sanitizer is run over.

Decides: the list; products whose tiles are cut along K are computed by every tactic that shares sums through scratch memory,
whether the backend lists it or not. A problem passes where every output lies in what the contract admits.
Refuses: machines without a device of compute capability 9.0.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 3 python tests/device/hopper_must_pass.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 3 python tests/device/hopper_must_pass.py

Without torch's cache of memory every tensor is an allocation of its own, so that an access past its end is seen. Ends with 0, 1
where an output is wrong, and with the sanitizer's own code where it finds something. `--json F` keeps what was judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hopper_encodings import execute

from lowbit.conformance.case import Case, Problem
from lowbit.conformance.op import parse_case
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels import cuda_hopper
from lowbit.kernels.hopper_room import gemm_w4a8, gemm_w4a8_f16
from lowbit.kernels.hopper_room.device import processors
from lowbit.kernels.hopper_room.gemm_w4a8_schedule import stream_cuts

__all__ = ["CASES", "SHARED", "WALKS", "main", "sharing"]

CASES = (
    "int4_encode/unified/e1n16k258/plain/all/s0", "int4_encode/dense/e1n48k384/plain/normal/s0",
    "int4_encode/grouped/e3n32k512/plain/normal/s0", "int4_pack/gptq/n24k40/int8/extremes/s0",
    "int4_pack/awq/n128k64/uint4/all/s0", "int4_pack/nibble/n64k66/int8/all/s0",
    "int4_pack/compressed_tensors/n3k13/int8/extremes/s0", "int4_pack/zeros_v1/n8k1/uint4/zeros/s0",
    "int4_pack/b8/n64k128/uint4/all/s0", "scale_pack_e4m3/table8/n257/plain/all/s0", "scale_fold/row/n26k16384/vllm/special/s0",
    "fp8_convert_fnuz/channel/n16k65/fnuz.static/all/s0", "fp8_requantize/max_scale_f16/n48k64s3/fn/all/s1",
    "fp8_requantize/max_scale/n7k5s1/fn/normal/s0", "fp8_requantize/channel/n48k16s3/fn/normal/s0",
    "fp8_quantize/static/m5k1025p17/f16/normal/s0", "fp8_quantize/tensor/m3k65p16/f32/lognormal/s0",
    "fp8_quantize/tensor/m0k64p0/bf16/normal/s0", "fp8_quantize/token/m26k64p0/bf16/special/s0",
    "fp8_quantize/token/m7k1026p0/bf16.ub/lognormal/s0", "fp8_quantize/token/m1k17p17/bf16/normal/s0",
    "fp8_quantize/block/m8k512p0/bf16/special/s0", "fp8_quantize/block/m8k512p0/f32.scaled_quantize/special/s0",
    "fp8_quantize/tile/m256k384p0/bf16.deepgemm/ties/s0",
    "gemm_w4a8_fp8/folded/m1n128k256g128/bf16/normal/s0", "gemm_w4a8_fp8/folded/m65n200k1024g64/f16.bias/normal/s0",
    "gemm_w4a8_fp8/exact/m17n136k640g128/bf16/normal/s0", "gemm_w4a8_fp8/exact/m130n256k1024g64/bf16.bias/normal/s0",
    "gemm_w4a8_fp8_grouped/folded/e3m37n136k512g128/bf16/normal/s0",
    "gemm_w8a8_fp8/scaled/m1n136k144/bf16/normal/s0", "gemm_w8a8_fp8/scaled/m70n264k528/f32.bias/normal/s0",
    "gemm_w8a8_fp8/block/m33n136k384/bf16/normal/s0",
)
"""Case ids: tails, alignments, empty problems and special values of every op."""

SHARED = (
    ("gemm_w4a8_fp8/folded/m8n264k1024g128/bf16/normal/s0", ()), ("gemm_w4a8_fp8/exact/m8n264k1024g64/f16.bias/normal/s0", ()),
    ("gemm_w4a8_fp8/exact/m64n136k1024g128/bf16/lognormal/s0", ()),
    ("gemm_w4a8_fp8/folded/m130n136k1024g64/f16.bias/normal/s0", ()),
    ("gemm_w4a8_fp8/folded/m1n34816k256g128/bf16/normal/s0", ("128x128_s1", "256x64_s2")),
)
"""Case ids of products whose tiles are cut along K, and tactics (none named: all that `sharing` finds). The tiles are fewer than
multiprocessors; in the last they are 272 and 136, so that whole rounds of workers leave some over."""

WALKS = (
    ("gemm_w4a8_fp8/folded/m1n17408k256g128/bf16/normal/s0", ("128x16_k1x1", "128x16_k1x2", "128x64_k1x1")),
    ("gemm_w4a8_fp8/exact/m1n17408k256g128/bf16/normal/s0", ("128x16_k1x1", "128x128_s1")),
    ("gemm_w4a8_fp8/exact/m1n34816k128g128/bf16/normal/s0", ("256x8_f16", "256x32_f16x2")),
    ("gemm_w4a8_fp8_grouped/folded/e3m3n17408k128g128/bf16/normal/s0", ("128x16_k1x1",)),
    ("gemm_w8a8_fp8/scaled/m1n34816k256/bf16/normal/s0", ()), ("gemm_w8a8_fp8/block/m1n17408k256/bf16/normal/s0", ()),
)
"""Case ids of products with more tiles than multiprocessors, so that workers go on from tile to tile through the same stages of
shared memory, and tactics (none named: the one that is dispatched)."""


def sharing(problem: Problem, multiprocessors: int | None = None) -> tuple[str, ...]:
    """Tactics that take the problem and cut some tile of it along K, so that several workers share its sums through scratch
    memory: on a device of so many `multiprocessors` (None: the one that is at hand)."""
    if problem.op != gemm_w4a8.OPS[0]:
        return ()
    m, n, k, group = (problem.dim(letter) for letter in "mnkg")
    tiles = {name: (each.tokens, each.bands, each.stream) for name, each in gemm_w4a8.TACTICS.items() if each.stream}
    tiles |= {name: (each.tokens, 4, each.cluster) for name, each in gemm_w4a8_f16.TACTICS.items()}
    count = processors() if multiprocessors is None else multiprocessors
    return tuple(
        name for name, tile in tiles.items()
        if gemm_w4a8.takes(name, problem.variant, m, k, group, False) and stream_cuts(*tile, m, n, k, count)
    )


def passes(case: Case, tactic: str) -> str:
    """An empty sentence, or what is wrong."""
    op, door = ops()[case.problem.op], cuda_hopper.backend()
    operands = draw_operands(op, case)
    given = {name: tensor.codes for name, tensor in operands.tensors.items()}
    try:
        found = execute(door, case.problem, tactic, given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    expected = op.expect(case, operands, door.declare(case.problem, tactic))
    wrong = {name: int((~expectation.admits(found[name][0])).sum()) for name, expectation in expected.items()}
    return ", ".join(f"{count} elements of {name}" for name, count in wrong.items() if count)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Judge a small list of problems once each.")
    parser.add_argument("--tactics", type=int, default=3, help="tactics of each problem")
    parser.add_argument("--ops", default="", help="ops, separated by commas (default: all)")
    parser.add_argument("--json", type=Path, help="write what was judged here")
    chosen = parser.parse_args(arguments)
    door = cuda_hopper.backend()
    if door.execution != "executed":
        print("hopper_must_pass: got no device of capability 9.0, expected one; run it on an H100 or H200", file=sys.stderr)
        return 2
    wanted = set(filter(None, chosen.ops.split(","))) or set(cuda_hopper.modules())
    rows: list[dict[str, str]] = []
    for text, named in (*((text, ()) for text in CASES), *SHARED, *WALKS):
        case = parse_case(text, ops())
        if case.problem.op not in wanted or case.problem.op not in cuda_hopper.modules():
            continue
        reason = door.supports(case.problem)
        if reason:
            print(f"{case}: not supported: {reason}", flush=True)
            continue
        listed = door.tactics(case.problem)[: chosen.tactics if text in CASES else 1]
        for tactic in named or (sharing(case.problem) if (text, named) in SHARED else listed):
            rows.append({"case": str(case), "tactic": tactic, "wrong": passes(case, tactic)})
            if rows[-1]["wrong"]:
                print(f"{case} {tactic}: {rows[-1]['wrong']}", flush=True)
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(rows)} problems and tactics, {wrong} wrong", flush=True)
    if chosen.json is not None:
        record = {"about": dict(door.describe()), "judged": rows}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
