"""The Triton int4 kernels in Triton's CPU interpreter, judged by the suite, and compiled for GPUs that are not here.

Decides: that the sources compute what the contract says, tails and padding included; that planted defects are caught; and that on
other targets the division is the rounded one, nothing is fused and the product is the matrix unit's. Refuses: to stand in for a
device. Named check_ so that `pytest` does not collect it by itself: it needs triton, and runs in the session that installs it:

    pytest tests/ascend_lowering/check_interpreted.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lowbit.conformance.backend import DATAPATHS, Contraction, Order
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.verdict import Status
from lowbit.conformance.worker import Worker
from lowbit.kernels import triton_room
from lowbit.kernels.triton_room import ascend_gemm_int4, ascend_int4_quantize

BACKENDS = Path(__file__).with_name("interpreted_int4.py")
COMPILER = Path(__file__).with_name("compile_int4.py")
ROOM = Path(next(iter(triton_room.__path__)))

QUANTISE = (
    "int4_quantize/sym/n8k512g64/f16.svdquant/ties/s0", "int4_quantize/sym/n8k256g64/f16.svdquant/special/s0",
    "int4_quantize/sym/n40k320g64/bf16.svdquant/extremes/s0", "int4_quantize/sym/n33k64g64/bf16.svdquant/lognormal/s1",
    "int4_quantize/sym/n40k192g64/f16.svdquant/zeros/s0", "int4_quantize/sym/n70k576g64/bf16.svdquant/special/s2",
    "int4_quantize/sym/n0k64g64/f16.svdquant/normal/s0", "int4_quantize/sym/n4k128g128/bf16.svdquant/reject/s0",
    "svdquant_quantize/int4/m16k256r16/f16/ties/s0", "svdquant_quantize/int4/m26k64r16/f16/special/s0",
    "svdquant_quantize/int4/m1k64r16/bf16/normal/s0", "svdquant_quantize/int4/m17k128r48/bf16/special/s1",
    "svdquant_quantize/int4/m16k320r48/f16/extremes/s0", "svdquant_quantize/int4/m40k192r32/bf16/zeros/s0",
    "svdquant_quantize/int4/m257k64r16/bf16/lognormal/s3", "svdquant_quantize/int4/m4k32r16/f16/reject/s0",
)
GEMM = tuple(f"gemm_int4/f32/{case}" for case in (
    "m64n128k128r32/f16.lora/normal/s1", "m33n40k192r0/f16/normal/s1", "m17n72k4160r0/bf16.nolora.bias/lognormal/s2",
    "m5n8k64r0/bf16/extremes/s3", "m33n64k256r48/bf16.lora.bias/lognormal/s4", "m9n40k320r16/f16.lora.bias/special/s5",
    "m40n24k128r16/f16.lora/exactw24/s6", "m33n72k192r0/f16.nolora.bias/maxima/s7", "m64n64k512r0/bf16/onehot/s8",
    "m64n64k512r0/f16/scaleprobe/s9", "m0n64k64r0/f16/normal/s1", "m4n64k96r0/f16/reject/s0", "m4n64k64r8/f16.lora/reject/s0",
))


@contextmanager
def opened(attribute: str, folder: Path = BACKENDS.parent) -> Iterator[Session]:
    """A worker whose backend is an interpreted kernel."""
    backend = f"python:{folder / BACKENDS.name}:{attribute}"
    with Worker(backend, timeout=120.0, path=()) as worker:
        session = Session(Plan(backend, timeout=120.0), worker)
        session.open()
        yield session


@pytest.fixture(scope="module")
def quantise() -> Iterator[Session]:
    """The quantiser and its projection."""
    with opened("quantise") as session:
        yield session


@pytest.fixture(scope="module")
def gemm() -> Iterator[Session]:
    """The GEMM by int8 products."""
    with opened("gemm") as session:
        yield session


def judged(session: Session, case: str) -> Status:
    listed = listed_of(case)
    (verdict,) = session.judge(listed, session.worker.supports([listed.case.problem])[0])
    assert verdict.declared == ("" if listed.lane == "reject" else "as the contract"), verdict
    return verdict.status


@pytest.mark.parametrize("case", QUANTISE)
def test_the_interpreted_quantiser_has_the_contracts_bits(quantise: Session, case: str) -> None:
    # lora_act has an interval; codes and scales beside it have one answer
    within = (Status.WITHIN,) * case.startswith("svdquant")
    assert judged(quantise, case) in (Status.EXACT, *within)


@pytest.mark.parametrize("case", GEMM)
def test_the_interpreted_gemm_has_the_contracts_bits(gemm: Session, case: str) -> None:
    within = (Status.WITHIN,) * (".lora" in case)
    assert judged(gemm, case) in (Status.EXACT, *within)


QUANTISER, PRODUCT = "ascend_int4_quantize.py", "ascend_gemm_int4.py"
DEFECTS = {  # file, text, what replaces it, backend, case
    "unrounded scale": (QUANTISER, "1.0, scale.to(tl.float32))", "1.0, bounded)", "quantise", QUANTISE[3]),
    "nibbles exchanged": (QUANTISER, "(nibbles(even, divisor) | nibbles(odd, divisor) << 4)",
                          "(nibbles(odd, divisor) | nibbles(even, divisor) << 4)", "quantise", QUANTISE[3]),
    "constant of another binade": (QUANTISER, "12582912.0  #", "8388608.0  #", "quantise", QUANTISE[0]),
    "NaN lost": (QUANTISER, "tl.where(magnitude > 0x7F800000, seventh, bounded)", "bounded", "quantise", QUANTISE[5]),
    "padding not cleared": (QUANTISER, "inside = (row < rows)[:, None] & (rank", "inside = (row < m)[:, None] & (rank",
                            "quantise", QUANTISE[10]),
    "even k not smoothed": (QUANTISER, "tl.where(present, tl.div_rn(even, low[None, :].broadcast_to(even.shape)), 0.0)",
                            "even", "quantise", QUANTISE[8]),
    "last K block lost": (QUANTISER, "for first in range(0, k, BLOCK_K)", "for first in range(0, k - BLOCK_K, BLOCK_K)",
                          "quantise", QUANTISE[8]),
    "groups downwards": (PRODUCT, "for group in range(0, k64):",
                         "for back in range(0, k64):\n        group = k64 - 1 - back", "gemm",
                         "gemm_int4/f32/m33n40k512r0/f16/lognormal/s1"),
    "total in binary16": (PRODUCT, "total = total + part * left",
                          "total = total.to(tl.float16).to(tl.float32) + part * left", "gemm", GEMM[1]),
    "bias before the channel scale": (PRODUCT, "    if R != 0:\n", "    if BIAS:\n        total = total + value16(tl.load("
                                      "bias + columns, mask=columns < n, other=0), IS_BF16)[None, :]\n    if R != 0:\n",
                                      "gemm", GEMM[7]),
}


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_a_planted_defect_is_caught(defect: str, tmp_path: Path) -> None:
    file, text, other, attribute, case = DEFECTS[defect]
    for name in (QUANTISER, PRODUCT):
        shutil.copy(ROOM / name, tmp_path / name)
    source = (tmp_path / file).read_text(encoding="utf-8")
    assert source.count(text) == 1
    (tmp_path / file).write_text(source.replace(text, other), encoding="utf-8")
    line = "from lowbit.kernels.triton_room import ascend_gemm_int4, ascend_int4_quantize\n"
    backend = BACKENDS.read_text(encoding="utf-8")
    assert line in backend
    nearby = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport ascend_gemm_int4, ascend_int4_quantize\n"
    (tmp_path / BACKENDS.name).write_text(backend.replace(line, nearby), encoding="utf-8")
    with opened(attribute, tmp_path) as session:
        assert judged(session, case) is Status.DRIFT


# bf16 elements at the front of a row of 64, the others zero; the binary16 scale; codes of the elements. Undefined codes, those of
# zeros beside elements so small that the scale is 0, are left out.
UNIT = 2.0**-24
EDGES = (
    # amax / 7 at a tie of binary16's subnormals, in units of 2^-24: 2.5 -> 2, 3.5 -> 4, 0.5 -> 0
    ((17.5 * UNIT,), 0x0002, (7, *(0,) * 63)), ((24.5 * UNIT,), 0x0004, (6, *(0,) * 63)), ((3.5 * UNIT,), 0x0000, (7,)),
    # elements over a scale of 0: plus or minus infinity, bounded
    ((2.0**-40, -(2.0**-41)), 0x0000, (7, -8)),
    # scale 1: ties of whole numbers go to even
    ((7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -3.5, 6.5), 0x3C00, (7, 0, 2, 2, 0, -2, -2, -4, 6, *(0,) * 55)),
    # -7.5 is the largest magnitude: 7.5 / 7 = 1.0714 -> 1 + 73/1024, over which it is -7.0009; 3.75 is 3.5004
    ((-7.5, 3.75), 0x3C49, (-7, 4, *(0,) * 62)),
    # the cap, 65504: 2^20 / 65504 = 16.008, 2^17 / 65504 = 2.001
    ((2.0**20, -(2.0**20), 2.0**17), 0x7BFF, (7, -8, 2, *(0,) * 61)), ((float("inf"), 1.0), 0x7BFF, (7, *(0,) * 63)),
    ((0.0, -0.0), 0x0000, (0,) * 64),
)


def test_scales_and_codes_at_the_edges(tmp_path: Path) -> None:
    rows = np.zeros((len(EDGES), 64), dtype=np.float32)
    for row, (elements, _, _) in zip(rows, EDGES, strict=True):
        row[: len(elements)] = elements
    np.save(tmp_path / "x.npy", rows)
    subprocess.run([sys.executable, str(BACKENDS), str(tmp_path / "x.npy"), str(tmp_path / "made.npz")], check=True)
    with np.load(tmp_path / "made.npz") as made:
        packed, scales = made["q"], made["scales"]
    for number, (elements, scale, codes) in enumerate(EDGES):
        assert int(scales[number, 0]) & 0xFFFF == scale, elements
        nibbles = [int(packed[number, k // 2] >> 4 * (k % 2)) & 15 for k in range(len(codes))]
        assert nibbles == [code & 15 for code in codes], elements


@pytest.mark.parametrize(("text", "unit"), [
    ("gemm_int4/f32/m4n16k64r0/f16", ""), ("gemm_int4/f32/m4n16k64r0/bf16.nolora.bias", ""),
    ("gemm_int4/f32/m4n16k64r32/f16.lora.bias", ""), ("gemm_int4/f32/m4n16k64r32/f16.lora.bias", "hopper_f16"),
    ("svdquant_quantize/int4/m4k64r16/bf16", ""), ("svdquant_quantize/int4/m4k64r16/bf16", "hopper_bf16"),
])
def test_the_declared_program_is_the_contracts(text: str, unit: str) -> None:
    problem = parse_problem(text, ops())
    room = ascend_gemm_int4 if problem.op == "gemm_int4" else ascend_int4_quantize
    declared = room.declaration(problem, unit, Order.ASCENDING) if unit else room.declaration(problem)
    assert check_declaration(ops()[problem.op], problem, declared) == ("", "as the contract")
    last = [item.datapath for item in declared.program if isinstance(item, Contraction)][-1]
    integers = problem.op == "gemm_int4" and not problem.dim("r")
    assert last is DATAPATHS[unit or ("imma_s32" if integers else "ieee_f32")]


# Other targets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    """Assembly text by build, from a process that is not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, str(COMPILER)], capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    return {part.split("\n", 1)[0]: part for part in found.stdout.split("== ")[1:]}


def test_divisions_are_rounded_on_nvidia(compiled: dict[str, str]) -> None:
    text = compiled["sm_90.int4_quantize"]
    assert len(re.findall(r"\bdiv\.rn\.f32\b", text)) >= 5
    assert not re.search(r"\bdiv\.(?:full|approx)|\brcp\.|\bfma\.|\.ftz\b", text)


def test_the_product_is_the_matrix_units(compiled: dict[str, str]) -> None:
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8\s", compiled["sm_90.int8_gemm"])
    assert re.search(r"v_mfma_i32_\d+x\d+x\d+_i8", compiled["gfx942.int8_gemm"])


def test_nothing_is_fused(compiled: dict[str, str]) -> None:
    assert not re.search(r"\bfma\.rn(?:\.ftz)?\.f32\b", compiled["sm_90.int8_gemm"])
    assert not re.search(r"\bv_(?:pk_)?(?:fma|fmac|mad)_f32\b", compiled["gfx942.int8_gemm"])
