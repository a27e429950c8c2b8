"""The Triton gemm_nvfp4 without a device: compiled with its instructions asserted, interpreted and judged by the suite.

Decides: that the builds of `compile_triton.py` pass, that they fail without block scales and without the low-rank product, that
the interpreted kernel stays in the suite's intervals, and that host faults do not. Refuses: to stand in for a device.
Named check_ so that `pytest` does not collect it by itself: it needs triton, and runs in the session that installs it:

    pytest tests/blackwell/check_triton.py
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.backend import DATAPATHS, Problem
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import outside_domain, parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.verdict import Status
from lowbit.conformance.worker import Worker
from lowbit.kernels.blackwell_room.declare import declaration, unsupported
from lowbit.kernels.triton_room.blackwell_gemm_nvfp4 import UNITS, packed, program, refusal, swizzled
from lowbit.references.declarations import Contraction, Declaration, Start

HERE = Path(__file__).parent
ONE_EACH = "sm_100.svdquant.bf16.swizzled,sm_103.svdquant.bf16.swizzled,sm_120.svdquant.bf16.swizzled,sm_90.svdquant.bf16.plain"


def compile_builds(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_triton.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_build_has_its_instructions(tmp_path: Path) -> None:
    found = compile_builds("--json", str(tmp_path / "facts.json"))
    assert found.returncode == 0, found.stdout + found.stderr
    builds: list[dict[str, Any]] = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))["builds"]
    chips = {build["name"].split(".")[0] for build in builds}
    assert chips == {"sm_100", "sm_103", "sm_120", "sm_90"}
    assert "compiled, never executed on a device" in found.stdout
    assert all(len(build["accumulators"]) == 1 for build in builds if build["name"].startswith("sm_10"))


@pytest.mark.parametrize(("without", "words"), [
    ("scales", ("MMA of the main product in a loop: 0", "block scales in PTX")),
    ("lora", ("MMA of the low-rank product in PTX: 0", "MMA of the low-rank product in PTX: 8, at least 16")),
])
def test_a_build_that_lacks_a_part_is_refused(without: str, words: tuple[str, str]) -> None:
    found = compile_builds("--only", ONE_EACH, "--without", without)
    assert found.returncode == 1, found.stdout + found.stderr
    builds = found.stdout.split("sm_")[1:]
    assert len(builds) == 4
    assert all(any(word in build for word in words) for build in builds), found.stdout


def test_a_build_that_does_not_exist_is_named() -> None:
    found = compile_builds("--only", "sm_80")
    assert found.returncode == 2
    assert "sm_80" in found.stderr


# The interpreted kernel ----------------------------------------------------------------------------------------------

CASES = tuple(f"gemm_nvfp4/{case}" for case in (
    "plain/m1n8k32r0/bf16/normal/s1", "plain/m33n40k160r0/f16.nolora.bias/lognormal/s2",
    "plain/m17n72k288r0/bf16.nolora.biasafter/normal/s3", "plain/m5n40k96r0/f16.nolora.biasafter/extremes/s4",
    "svdquant/m33n64k256r32/f16.lora.bias/normal/s5", "svdquant/m40n72k416r48/bf16.lora.bias/lognormal/s6",
    "svdquant/m9n40k160r0/bf16.nolora.nobias/special/s7", "svdquant/m64n40k192r16/f16.lora.nobias/exactw24/s8",
    "nunchaku/m17n64k256r16/bf16.lora.bias/normal/s9", "nunchaku/m34n40k96r48/f16.lora.bias/lognormal/s10",
    "nunchaku/m8n40k128r32/f16.lora.nobias/special/s11", "nunchaku/m33n72k96r0/bf16.nolora.bias/maxima/s12",
    "svdquant/m64n64k512r0/bf16.nolora.nobias/onehot/s13", "plain/m64n64k512r0/f16/scaleprobe/s14",
    "plain/m300n72k64r0/bf16/normal/s15", "plain/m0n32k64r0/bf16/normal/s1",
    "plain/m4n64k48r0/bf16/reject/s0", "svdquant/m4n64k64r24/bf16.lora/reject/s1",
))
"""Every epilogue, bias and format, tails in M, N, K and the rank, and the kinds of operands that single out one element."""


@pytest.fixture(scope="module", params=["plain", "swizzle"])
def interpreted(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A worker whose backend is the interpreted kernel, with one layout of the block scales."""
    yield from opened(request.param)


def opened(attribute: str) -> Iterator[Session]:
    backend = f"python:{HERE / 'interpreted_triton.py'}:{attribute}"
    with Worker(backend, timeout=120.0, path=()) as worker:
        session = Session(Plan(backend, timeout=120.0), worker)
        session.open()
        yield session


@pytest.mark.parametrize("case", CASES)
def test_the_interpreted_kernel_is_admissible(interpreted: Session, case: str) -> None:
    listed = listed_of(case)
    (verdict,) = interpreted.judge(listed, interpreted.worker.supports([listed.case.problem])[0])
    assert verdict.status in (Status.EXACT, Status.WITHIN), (verdict.reason, verdict.worst)
    assert verdict.declared == ("" if listed.lane == "reject" else "as the contract")


@pytest.mark.parametrize("fault", ["nibbles", "group"])
def test_a_fault_of_the_host_side_is_caught(fault: str) -> None:
    for session in opened(fault):
        (verdict,) = session.judge(listed_of(CASES[4]), None)
        assert verdict.status is Status.DRIFT, verdict


# Host side -----------------------------------------------------------------------------------------------------------


def test_two_codes_share_a_byte_the_even_k_low() -> None:
    codes = torch.tensor([[0x1, 0xF, 0x7, 0x8]], dtype=torch.uint8)
    assert packed(codes).tolist() == [[0xF1, 0x87]]


@pytest.mark.parametrize(("rows", "blocks"), [(1, 2), (128, 4), (130, 10), (257, 6)])
def test_swizzled_scales_lie_in_tiles_of_128_by_4(rows: int, blocks: int) -> None:
    rng = np.random.default_rng(rows)
    scales = rng.integers(1, 128, (rows, blocks)).astype(np.uint8)
    found = swizzled(torch.from_numpy(scales)).numpy()
    wide = -(-blocks // 4)
    assert found.size == -(-rows // 128) * wide * 512
    expected = np.zeros(found.size, dtype=np.uint8)
    for row in range(rows):
        for block in range(blocks):  # PTX ISA, tcgen05 scale factor layout: 32 lanes x 4 groups of 32 rows x 4 scales
            tile = row // 128 * wide + block // 4
            expected[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4] = scales[row, block]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("unit", list(UNITS))
@pytest.mark.parametrize("text", [
    "plain/m4n16k64r0/f16", "plain/m4n16k64r0/bf16.nolora.bias", "plain/m4n16k64r0/bf16.nolora.biasafter",
    "svdquant/m4n16k64r0/f16", "svdquant/m4n16k64r32/f16.lora.bias", "nunchaku/m4n16k64r16/bf16.lora",
    "nunchaku/m4n16k64r16/bf16.lora.bias", "nunchaku/m4n16k64r0/f16.nolora.bias",
])
def test_the_declared_program_is_the_contracts(unit: str, text: str) -> None:
    problem = parse_problem(f"gemm_nvfp4/{text}", ops())
    declared = Declaration(program(problem, UNITS[unit]))
    assert check_declaration(ops()["gemm_nvfp4"], problem, declared) == ("", "as the contract")
    contractions = [item for item in declared.program if isinstance(item, Contraction)]
    assert [item.start for item in contractions] == [Start.ZERO, Start.PREVIOUS][: len(contractions)]
    assert len(contractions) == 1 + (problem.dim("r") > 0)
    if unit == "blackwell":
        assert contractions[0].datapath is DATAPATHS["blackwell_nvfp4"]
        assert all(item.datapath is DATAPATHS[f"blackwell_{problem.option('out')}"] for item in contractions[1:])


def test_the_door_declares_what_the_twin_computes() -> None:
    """`cuda_blackwell` judges the twin by a program that it writes down without Triton; it is the kernel's own."""
    op, count = ops()["gemm_nvfp4"], 0
    for variant, out, bias, r in itertools.product(op.variants, ("f16", "bf16"), ("nobias", "bias", "biasafter"), (0, 16)):
        options = (("out", out), ("lora", "lora" if r else "nolora"), ("bias", bias))
        problem = Problem("gemm_nvfp4", variant, (("m", 5), ("n", 24), ("k", 96), ("r", r)), options)
        if outside_domain(op, problem) is not None:
            continue
        assert (unsupported(problem), refusal(problem)) == (None, None), problem
        assert declaration(problem).program == program(problem, UNITS["blackwell"]), problem
        count += 1
    assert count == 22
