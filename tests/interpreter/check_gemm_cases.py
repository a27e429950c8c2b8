"""The Triton GEMMs in Triton's CPU interpreter, judged by the suite on every tactic; known faults must be caught on every tactic,
each by a named case per op.

Decides: that the kernels compute what the contract says for every variant, option and tail, on the shapes of the systems they
stand for. Refuses: to stand in for a device; the interpreter multiplies in binary32. Named check_ so that `pytest` does not
collect it by itself: it needs triton.

    pytest tests/interpreter/check_gemm_cases.py tests/interpreter/check_gemm_values.py tests/interpreter/check_gemm_compile.py
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.verdict import Status, Verdict
from lowbit.conformance.worker import Worker
from lowbit.kernels.triton import MODULES
from lowbit.kernels.triton_room import gemm_int4, gemm_nvfp4, gemm_w4a8_int8, gemm_w4a16, gemm_w8a8_fp8
from lowbit.kernels.triton_room.machine import INTERPRETER

BACKENDS = Path(__file__).with_name("gemm_backends.py")
OPS: dict[str, Any] = {"gemm_nvfp4": gemm_nvfp4, "gemm_int4": gemm_int4, "gemm_w4a16": gemm_w4a16, "gemm_w8a8_fp8": gemm_w8a8_fp8,
                       "gemm_w4a8_int8": gemm_w4a8_int8}

W4A16 = tuple(f"gemm_w4a16/{case}" for case in (
    # M, N, K, G of vLLM's tests of triton_w4a16: sym, then with zero points
    "sym/m1n256k256g32/f16/normal/s1", "sym/m17n512k256g32/bf16/normal/s1", "sym/m32n256k512g64/f16/normal/s1",
    "sym/m33n512k512g128/bf16/normal/s1", "sym/m64n256k1024g256/f16/normal/s1", "zp/m128n1024k256g32/bf16/normal/s1",
    "zp/m64n512k512g64/f16/normal/s1",
    # groups from 16 to K, K tiles that no group fills, tails of M, N and K
    "sym/m5n40k48g16/bf16.bias/normal/s2", "zp/m17n72k160g32/f16.biasafter/lognormal/s3",
    "zpafter/m33n24k320g64/bf16.bias/normal/s4",
    "zp/m3n8k384g128/bf16/extremes/s5", "zpafter/m7n72k200g200/f16/normal/s6", "sym/m1n8k2048g2048/bf16.biasafter/normal/s7",
    "sym/m9n136k768g256/f16.bias/special/s8", "zp/m64n64k256g16/bf16/onehot/s9", "zp/m64n64k512g32/f16/scaleprobe/s10",
    "sym/m0n64k64g16/f16/normal/s1", "sym/m4n64k96g64/bf16/reject/s0", "zp/m4n64k144g48/bf16/reject/s0",
))
W8A8 = tuple(f"gemm_w8a8_fp8/{case}" for case in (
    # the branches of apply_fp8_linear: tensor scales, rows and columns, either of them, one row with a bias, and fnuz
    "scaled/m33n72k272/bf16.atensor.wtensor.bias/normal/s1", "scaled/m17n72k272/bf16.token.channel/normal/s2",
    "scaled/m17n40k144/f32.token.wtensor.bias/normal/s3", "scaled/m5n72k272/f16.atensor.channel.biasafter/lognormal/s4",
    "scaled/m1n256k512/bf16.atensor.wtensor.bias/normal/s5", "scaled/m4n64k16/f16.bias/normal/s6",
    "scaled/m33n72k272/bf16.fnuz.atensor.wtensor.bias/normal/s7", "scaled/m9n40k144/f16.fnuz.biasafter/special/s8",
    "scaled/m1n64k128/f32.fnuz.bias/normal/s9", "block/m3n136k256/bf16.bias/normal/s10",
    "block/m35n392k384/f16.fnuz/lognormal/s11",
    "block/m5n264k128/bf16.biasafter/extremes/s12", "scaled/m40n40k144/bf16/special/s13", "scaled/m64n64k256/bf16/onehot/s14",
    "scaled/m64n72k192/f16/exactw24/s15", "scaled/m0n64k128/bf16/normal/s1", "scaled/m4n64k40/bf16/reject/s0",
))
NVFP4 = tuple(f"gemm_nvfp4/{case}" for case in (
    # K, N and ranks of svdquant-kernels' production shapes, few rows and columns of them
    "svdquant/m5n16k3840r128/bf16.lora.bias/normal/s1", "svdquant/m3n8k15360r128/f16.lora/normal/s2",
    "svdquant/m17n24k10240r32/f16.lora.bias/normal/s3", "nunchaku/m33n64k256r16/bf16.lora.bias/normal/s4",
    "nunchaku/m5n40k96r48/f16.lora.bias/lognormal/s5", "nunchaku/m33n72k96r0/bf16.nolora.bias/maxima/s6",
    "svdquant/m40n72k416r256/bf16.lora/lognormal/s7", "plain/m1n8k32r0/bf16/normal/s8",
    "plain/m33n40k160r0/f16.nolora.bias/normal/s9",
    "plain/m17n72k288r0/bf16.nolora.biasafter/extremes/s10", "plain/m9n40k160r0/bf16/special/s11",
    "svdquant/m64n64k512r0/bf16/onehot/s12", "plain/m64n64k512r0/f16/scaleprobe/s13",
    "svdquant/m64n40k192r16/f16.lora/exactw24/s14",
    "plain/m0n32k64r0/bf16/normal/s1", "plain/m4n64k48r0/bf16/reject/s0", "svdquant/m4n64k64r24/bf16.lora/reject/s1",
))
INT4 = tuple(f"gemm_int4/{case}" for case in (
    "f32/m5n16k3840r128/f16.lora.bias/normal/s1", "f32/m3n8k15360r128/bf16.lora/normal/s2",
    "f32/m17n24k10240r32/f16.lora.bias/normal/s3", "f32/m33n40k192r0/f16/normal/s4",
    "f32/m17n72k4160r0/bf16.nolora.bias/lognormal/s5",
    "f32/m5n8k64r0/bf16/extremes/s6", "f32/m9n40k320r16/f16.lora.bias/special/s7", "f32/m33n72k192r0/f16.nolora.bias/maxima/s8",
    "half/m17n64k320r16/bf16.lora.bias/normal/s9", "half/m33n40k192r0/f16/lognormal/s10",
    "half/m5n24k128r48/f16.lora.bias/special/s11",
    "f32/m64n64k512r0/bf16/onehot/s12", "f32/m64n64k512r0/f16/scaleprobe/s13", "f32/m0n64k64r0/f16/normal/s1",
    "f32/m4n64k96r0/f16/reject/s0",
))
W4A8 = tuple(f"gemm_w4a8_int8/{case}" for case in (
    "direct/m8n40k512g128/f16/normal/s1", "viaf16/m8n64k256g128/bf16.bias/maxima/s2", "direct/m7n16k40g40/bf16/normal/s3",
    "direct/m33n72k192g96/bf16.bias/normal/s4", "direct/m1n24k160g32/f16.bias/lognormal/s5",
    "viaf16/m17n8k1024g1024/bf16/extremes/s6",
    "direct/m64n64k256g64/f16/onehot/s7", "direct/m64n64k512g32/bf16/scaleprobe/s8", "direct/m5n40k72g72/f16.bias/special/s9",
    "direct/m0n64k128g64/f16/normal/s1", "direct/m4n64k96g48/bf16/reject/s0",
))

CAUGHT = {
    "one_scale_per_tile": (
        "gemm_w4a16/sym/m5n32k256g32/bf16/normal/s1", "gemm_nvfp4/plain/m5n16k128r0/bf16/normal/s1",
        "gemm_int4/f32/m5n16k128r0/f16/normal/s1",
    ),
    "bias_dropped_at_m1": (
        "gemm_w8a8_fp8/scaled/m1n64k64/bf16.atensor.wtensor.bias/normal/s1",
        "gemm_w4a16/sym/m1n32k128g64/f16.biasafter/normal/s1", "gemm_w4a8_int8/direct/m1n16k64g64/f16.bias/normal/s1",
        "gemm_nvfp4/plain/m1n16k128r0/bf16.nolora.bias/normal/s1", "gemm_nvfp4/svdquant/m1n16k128r16/f16.lora.bias/normal/s1",
        "gemm_nvfp4/nunchaku/m1n16k128r0/bf16.nolora.bias/normal/s1", "gemm_int4/f32/m1n16k128r0/f16.nolora.bias/normal/s1",
        "gemm_int4/half/m1n16k128r0/bf16.nolora.bias/normal/s1",
    ),
    "zero_offset": ("gemm_w4a16/sym/m5n32k128g64/bf16/normal/s1", "gemm_w4a16/zp/m5n32k128g64/f16/normal/s1",
                    "gemm_w4a8_int8/direct/m5n16k64g64/bf16/normal/s1"),
    "tail_skipped": (
        "gemm_w4a16/zp/m5n32k160g32/bf16/normal/s1", "gemm_w8a8_fp8/scaled/m5n16k144/bf16/normal/s1",
        "gemm_nvfp4/plain/m5n16k160r0/f16/normal/s1", "gemm_int4/f32/m5n16k192r0/bf16/normal/s1",
        "gemm_w4a8_int8/direct/m5n16k96g96/f16/normal/s1",
    ),
}
"""Fault -> cases that must catch it on every tactic; "int32_offsets" needs more memory than a case has:
check_gemm_values.py plants it where gemm_w8a8_fp8 and gemm_w4a16 read their rows, by the function that all of them have."""


@contextmanager
def opened(attribute: str) -> Iterator[Session]:
    """A worker whose backend is the interpreted kernels."""
    backend = f"python:{BACKENDS}:{attribute}"
    with Worker(backend, timeout=120.0, path=()) as worker:
        session = Session(Plan(backend, timeout=120.0), worker)
        session.open()
        yield session


@pytest.fixture(scope="module")
def plain() -> Iterator[Session]:
    """The kernels as they are."""
    with opened("plain") as session:
        yield session


def judged(session: Session, case: str) -> list[Verdict]:
    """Verdicts of a case on every tactic, by what is declared alone: the audits of the lane `bounded` would take minutes here."""
    listed = listed_of(case)
    if listed.lane != "reject":
        listed = replace(listed, lane="exact")
    return list(session.judge(listed, session.worker.supports([listed.case.problem])[0]))


@pytest.mark.parametrize("case", [*W4A16, *W8A8, *NVFP4, *INT4, *W4A8])
def test_every_tactic_is_admissible(plain: Session, case: str) -> None:
    verdicts = judged(plain, case)
    assert verdicts
    for verdict in verdicts:
        assert verdict.status in (Status.EXACT, Status.WITHIN), verdict
        assert verdict.declared == ("" if "/reject/" in case else "as the contract"), verdict


@pytest.mark.parametrize("fault", list(CAUGHT))
def test_a_fault_is_caught_on_every_tactic(plain: Session, fault: str) -> None:
    with opened(fault) as session:
        for case in CAUGHT[fault]:
            assert all(verdict.status in (Status.EXACT, Status.WITHIN) for verdict in judged(plain, case)), case
            verdicts = judged(session, case)
            assert [verdict.tactic for verdict in verdicts if verdict.status is not Status.DRIFT] == [], case
            problem = listed_of(case).case.problem
            assert {verdict.tactic for verdict in verdicts} == set(OPS[problem.op].tactics(problem, INTERPRETER))


def test_every_fault_of_every_op_has_a_case() -> None:
    named = {(listed_of(case).case.problem.op, fault) for fault, cases in CAUGHT.items() for case in cases}
    assert named == {(op, fault) for op, module in OPS.items() for fault in module.MUTANTS if fault != "int32_offsets"}
    assert set(OPS) == {op for op in MODULES if op.startswith("gemm_")}
