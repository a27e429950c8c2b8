"""Verdicts and reports as a run would leave them, drawn from a fixed seed, for the tests of report, junit and html.

Nothing here computes a product: statuses, shares and histograms are drawn so that every branch of a view is met.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np

from lowbit.conformance.audit_readings import FIELDS
from lowbit.conformance.case import Case, Operands, Problem, Tensor
from lowbit.conformance.report import (
    CONSISTENT,
    FINER,
    REFUTED,
    Audited,
    Coverage,
    Declared,
    Host,
    Report,
    Run,
    Strength,
    Subject,
    build,
)
from lowbit.conformance.verdict import Execution, Kernel, Status, Verdict, Worst
from lowbit.conformance.waivers import Waiver, apply
from lowbit.references.formats import BF16, E2M1, E4M3FN, INT4, UE4M3

ENCODINGS = ("int4_pack", "int4_repack", "int4_encode", "scale_pack_e4m3", "scale_fold", "scale_swizzle", "fp8_convert_fnuz",
             "fp8_requantize")
QUANTISERS = ("fp8_quantize", "int8_quantize", "int4_quantize", "nvfp4_quantize", "svdquant_quantize")
GEMMS = ("gemm_w4a16", "gemm_w8a8_fp8", "gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped", "gemm_w4a8_int8", "gemm_nvfp4", "gemm_int4")
OPS = (*ENCODINGS, *QUANTISERS, *GEMMS)
FAULTS = ("zero output", "one K block dropped", "scale code +1", "weight code +1", "bias dropped", "rows swapped")
SHIFT = "the group scale is applied one group too late"
PROGRAM = """dot(a, w) on wgmma_fp8, 14 fraction bits, truncating, order unknown, promoted every 128
mul token_scale f32 RNE
add bias f32 RNE
cast bf16 RNE"""
NARROW = "14 fraction bits, contract 22"

# pattern -> (lane, level)
_LANES = {
    "codes": ("encoding", 1), "vector": ("golden", 1),
    "amax": ("quantiser", 1), "ties": ("quantiser", 1), "specials": ("quantiser", 1),
    "exactw14": ("exact", 1), "exactw24": ("exact", 1), "onehot": ("onehot", 1), "scaleprobe": ("scale", 1),
    "lognormal": ("bounded", 2), "outlier": ("bounded", 2), "cancel": ("bounded", 2), "uniform": ("bounded", 2),
    "audit_cut": ("audit", 2), "permute": ("property", 2), "repeat": ("stability", 3),
}
_PATTERNS = {
    **dict.fromkeys(ENCODINGS, ("codes", "vector", "repeat")),
    **dict.fromkeys(QUANTISERS, ("amax", "ties", "specials", "vector", "repeat")),
    **dict.fromkeys(GEMMS, ("exactw14", "exactw24", "onehot", "scaleprobe", "lognormal", "outlier", "cancel", "uniform",
                            "permute", "vector", "repeat")),
}


def verdict(case: str, **given: Any) -> Verdict:
    """A passing verdict of `case`, whose lane and level follow from its pattern; `given` replaces fields."""
    lane, level = _LANES[case.split("/")[4]]
    status = Status.WITHIN if lane == "bounded" else Status.EXACT
    digest = hashlib.sha256(case.encode()).hexdigest()
    return replace(Verdict(case, "acme", "default", lane, level, status, operands=digest, judged=64, total=64), **given)


def _share(rng: random.Random) -> float:
    return round(0.25 + 0.7 * rng.random() ** 2, 6)


def _heat(rng: random.Random, share: float, bad: bool) -> tuple[tuple[float, ...], ...]:
    """16 x 24 cells below `share`; a bad one has a stripe of tiles above the bound."""
    low, span = (0.0, 0.8) if bad else (0.3 * share, 0.6 * share)
    rows = [[round(low + span * rng.random(), 4) for _ in range(24)] for _ in range(16)]
    for row in rows[4:8] if bad else ():
        for j in range(9, 15):
            row[j] = round(share * (0.4 + 0.6 * rng.random()), 4)
    rows[5][10] = share
    return tuple(map(tuple, rows))


def _gemm(rng: random.Random, case: str, m: int, n: int, k: int) -> Verdict:
    share = _share(rng)
    elements = max(m * n, 1)
    near = int(elements * (0.02 + 0.1 * rng.random()))
    far = near // 7
    worst = Worst("d", (max(m - 1, 0), n // 2), "0x3f9a", "0x3f99", "0x3f9b", "1.203125", "1.2012939453125", 0, share)
    found = verdict(
        case, judged=m * n, total=m * n, products=m * n * k, worst=worst if m else None,
        seconds=round(0.002 + m * n * k / 4e9, 5), kernel=f"acme_mma_{'skinny' if m < 17 else 'tile128'}_sm90",
        kernel_source=rng.choice((Kernel.OBSERVED, Kernel.CLAIMED)), declared="as the contract",
    )
    if found.lane == "bounded":
        histogram = {"0": elements - near - far, "1": near, "2": far, **({"3": far // 5} if far > 5 else {})}
        heat = _heat(rng, share, False) if m > 64 else ()
        found = replace(found, ulp_histogram=histogram, power=dict.fromkeys(FAULTS, True), heat=heat)
    return found


def verdicts(per_pattern: int = 2, faulty: bool = True, seed: int = 7) -> list[Verdict]:
    """A few hundred verdicts over all ops (`per_pattern` seeds and sizes of each pattern); `faulty` plants failures of every
    status, refusals and blind spots."""
    rng = random.Random(seed)
    found = []
    for op in OPS:
        for pattern in _PATTERNS[op]:
            for s in range(per_pattern):
                if op in GEMMS:
                    m, n = rng.choice((1, 7, 16, 17, 64, 129, 333)), 8 * rng.choice((16, 17, 48, 263))
                    g = rng.choice((64, 128))
                    k = g * rng.choice((4, 8, 29, 65)) if g == 64 else g * rng.choice((3, 8, 32))
                    case = f"{op}/folded/m{m}n{n}k{k}g{g}/{rng.choice(('bf16', 'f16'))}/{pattern}/s{s}"
                    found.append(_gemm(rng, case, m, n, k))
                else:
                    m, k = rng.choice((1, 33, 128, 257)), 128 * rng.choice((1, 2, 8))
                    case = f"{op}/plain/m{m}k{k}/bf16/{pattern}/s{s}"
                    found.append(verdict(case, judged=m * k, total=m * k, seconds=0.003, kernel=f"acme_{op}"))
    found += [verdict(f"{op}/folded/m64n64k1024g128/bf16/audit_cut/s1", total=4096, judged=4096) for op in GEMMS]
    return list(map(_spoil, found)) if faulty else found


def _refused(good: Verdict, reason: str) -> Verdict:
    return replace(good, status=Status.UNSUPPORTED, reason=reason, worst=None, heat=(), power={}, ulp_histogram={}, judged=0,
                   kernel="")


def _spoil(good: Verdict) -> Verdict:
    """The failures of the sample: each rule names an op, a pattern and what goes wrong there."""
    op, _, dims, _, pattern, seed = good.case.split("/")
    if op == "gemm_int4" and pattern != "vector":
        return _refused(good, "needs a tensor core with int4 products")
    if op == "fp8_convert_fnuz":
        return replace(good, execution=Execution.EMULATED)
    if op == "gemm_w4a8_fp8_grouped" and "g64" in dims:
        return _refused(good, f"groups of 64 need K to be a multiple of 256, got {dims}")
    if good.lane == "bounded" and op == "gemm_nvfp4" and pattern in ("outlier", "cancel"):
        share = 3.4170000000000003 if pattern == "outlier" else 1.1875
        worst = Worst("d", (5, 130), "0x4210", "0x41f8", "0x41fb", "36.0", "31.40625", 21, share)
        return replace(good, status=Status.DRIFT, reason=SHIFT, clause="GEMM-7", wrong=min(37, good.judged), worst=worst,
                       ulp_histogram={**good.ulp_histogram, ">8": 30}, heat=_heat(random.Random(3), share, True))
    if op == "gemm_w4a16" and pattern == "uniform":
        power = {**good.power, "bias dropped": False}
        if seed == "s1":
            reason = "an all-zero output would have passed"
            return replace(good, status=Status.UNTRUSTED, reason=reason, clause="POWER-1", power=power)
        return replace(good, power=power, declared=NARROW)
    if good.lane == "bounded" and op == "gemm_w4a16":
        return replace(good, power={**good.power, "bias dropped": False}, declared=NARROW)
    if op == "int4_encode" and pattern == "codes" and seed == "s0":
        return replace(good, status=Status.MALFORMED, reason="64 bytes after the output were written", clause="MEM-2", wrong=0)
    if op == "svdquant_quantize" and pattern == "specials":
        status = Status.CRASHED if seed == "s0" else Status.TIMEOUT
        reason = "the worker ended with signal 11 (SIGSEGV)" if seed == "s0" else "no answer in 30 s; the worker was killed"
        return replace(good, status=status, reason=reason, clause="RUN-1", judged=0)
    if op == "fp8_quantize" and pattern == "specials":
        return replace(good, status=Status.RAISED, reason="ValueError: <NaN> & 'Inf' are not \x1bwanted", clause="F-4", judged=0)
    if op == "int8_quantize" and pattern == "ties":
        return replace(good, status=Status.DRIFT, reason="ties go away from zero", clause="X-1", wrong=3,
                       worst=Worst("q", (0, 3), "0x05", "0x04", "0x04", "5", "4.5", 1, None))
    return good


def codes(found: Sequence[Verdict]) -> Coverage:
    """Coverage of operands that leave out the NaN codes and a few others."""
    coverage = Coverage()
    rng = np.random.default_rng(5)
    for op in sorted({v.case.split("/")[0] for v in found}):
        case = Case(Problem(op, "plain", (("m", 1),), ()), "uniform", 0)
        coverage.add(case, Operands({
            "a": Tensor(rng.integers(0, 127, (33, 129)).astype(np.uint8), E4M3FN),
            "w": Tensor(rng.integers(0, 16, (5, 31)).astype(np.uint8), INT4 if "nvfp4" not in op else E2M1),
            "s": Tensor(rng.integers(1, 0x7F, 60).astype(np.uint8), UE4M3),
            "bias": Tensor(np.zeros(4, dtype=np.uint16), BF16),
        }))
    return coverage


def audits(found: Sequence[Verdict]) -> list[Audited]:
    """One finding per op, variant, options and tactic of the probes that gave an output, of all three kinds."""
    readings = {name: "not identifiable: no bit was lost" for name in FIELDS} | {"fraction_bits": "13", "chunk": "at most 32"}
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for item in found:
        if item.lane == "audit" and item.status is not Status.UNSUPPORTED:
            op, variant, _, options, *_ = item.case.split("/")
            groups.setdefault((op, variant, options, item.tactic), []).append(item)
    rows = []
    for number, group in enumerate(groups.values()):
        failed = next((item for item in group if item.status not in (Status.EXACT, Status.WITHIN)), None)
        standing = REFUTED if failed else FINER if number % 3 == 1 else CONSISTENT
        said = failed.reason if failed else "25 fraction bits, 13 declared" if standing == FINER else ""
        rows.append(Audited(
            group[0].case.rsplit("/", 2)[0], group[0].tactic, standing, said, failed.case if failed else "", PROGRAM, readings,
        ))
    return rows


WAIVERS = (
    Waiver("int8_quantize/plain/*/ties/*", "X-1", "https://example.org/acme/issues/41", date(2026, 12, 1)),
    Waiver("scale_swizzle/*", "N-2", "https://example.org/acme/issues/7", date(2026, 10, 1), "other"),
)


def waiver_of(case: str, clause: str) -> Waiver:
    """A waiver in force for one case."""
    return Waiver(case, clause, "https://example.org/acme/issues/9", date(2027, 6, 1))


def report(found: list[Verdict] | None = None, *, requested: int = 3, shard: tuple[int, int] = (1, 1), waived: bool = True,
           cases: list[str] | None = None, waivers: Sequence[Waiver] = WAIVERS, per_op: int = 170) -> Report:
    """A whole report over `found` (default: the faulty sample)."""
    found = verdicts() if found is None else found
    judged, waivers = apply(found, waivers if waived else (), date(2026, 11, 20))
    lanes = ("exact", "onehot", "scale", "bounded", "property")
    rng = random.Random(11)
    names = [f"mutant_{i:02}_{FAULTS[i % 6].replace(' ', '_')}" for i in range(24)]
    killed = {name: tuple(lane for lane in lanes if rng.random() < 0.5 and "08" not in name) for name in names}
    return build(
        suite="2026.11.0", contract="1",
        subject=Subject("acme", "acme", "cuda", {"device": "Example 9000", "driver": "570.1", "compiler": "xcc 4.2"}),
        run=Run("2026-11-20T01:02:03+00:00", "2026-11-20T01:44:05+00:00", 2522.0, "lowbit certify acme --level L3",
                2026, per_op, 100, shard, (Host("3.11.9", "2.3.1", "Linux-6.1-x86_64", 16),)),
        cases=cases if cases is not None else [v.case for v in judged], verdicts=judged, requested=requested,
        codes=codes(judged).codes(),
        declarations=[Declared(op, ("default",), PROGRAM) for op in GEMMS], audits=audits(judged), waivers=waivers,
        strength=Strength(killed, 9, 0),
        peak_bytes=3 << 29,
    )
