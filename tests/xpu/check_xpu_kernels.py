"""The xpu kernels on what OpenCL offers: conversions, the source system's shapes, values worked out by hand, planted faults.

Decides: that the sources compute the contract, to the bit; that a read or write beyond a tensor is seen; and that each planted
defect is caught. On a CPU this is the emulation that every report calls so. Refuses: to stand in for a GPU.
Named check_ so that `pytest` does not collect it by itself: it needs pyopencl and a runtime, and runs in `nox -s xpu`:

    pytest tests/xpu/check_xpu_kernels.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit import kernels
from lowbit.conformance.op import parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.session import Plan, Session, listed_of
from lowbit.conformance.verdict import Execution, Status
from lowbit.conformance.worker import Worker
from lowbit.kernels.xpu import backend
from lowbit.kernels.xpu_room import launch, opencl

ROOM = Path(next(iter(kernels.__path__)))
DOOR = "from lowbit.kernels.xpu import backend\n"
Array = npt.NDArray[Any]

pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")  # some runtimes talk while they build


@contextmanager
def opened(file: Path, source: str = DOOR) -> Iterator[Session]:
    """A worker whose backend is the attribute `backend` of a file with that source."""
    file.write_text(source, encoding="utf-8")
    name = f"python:{file}:backend"
    with Worker(name, timeout=120.0, path=()) as worker:
        session = Session(Plan(name, timeout=120.0), worker)
        session.open()
        yield session


def judged(session: Session, case: str) -> list[Status]:
    """One status per tactic."""
    listed = listed_of(case)
    verdicts = list(session.judge(listed, session.worker.supports([listed.case.problem])[0]))
    assert {verdict.execution for verdict in verdicts} <= {Execution.EXECUTED, Execution.EMULATED}
    return [verdict.status for verdict in verdicts]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with opened(tmp_path_factory.mktemp("xpu") / "door.py") as found:
        yield found


# Seed 003: vLLM's XPUW4A8IntLinearKernel quantises per token, packs values + 8 along K, multiplies and casts; its kernel test has
# (M, N, K) = (8, 4096, 4096), (1, 4096, 11008), (32, 4096, 4096) and groups of min(128, K). The output was binary16 whatever the
# model's format: `viaf16`; `direct` is the same without that detour.
SEED = (
    "gemm_w4a8_int8/viaf16/m8n4096k4096g128/bf16.bias/lognormal/s1", "gemm_w4a8_int8/direct/m1n4096k11008g128/bf16/lognormal/s1",
    "gemm_w4a8_int8/direct/m32n4096k4096g128/f16.bias/lognormal/s1", "gemm_w4a8_int8/viaf16/m32n4096k4096g128/bf16/normal/s1",
)
CASES = (
    *SEED, "gemm_w4a8_int8/direct/m33n40k2080g2080/bf16.bias/special/s2", "gemm_w4a8_int8/viaf16/m9n24k96g32/bf16/extremes/s3",
    "gemm_w4a8_int8/direct/m3n8k40g40/f16/maxima/s4", "gemm_w4a8_int8/direct/m17n72k17408g17408/bf16/maxima/s5",
    "gemm_w4a8_int8/direct/m0n8k32g32/f16/normal/s1", "gemm_w4a8_int8/direct/m64n64k512g32/bf16/onehot/s8",
    "gemm_w4a8_int8/direct/m64n64k512g64/f16/scaleprobe/s9",
    *(f"int8_quantize/token/m40k{k}/{x}/{pattern}/s{k}" for k, pattern in ((4096, "normal"), (129, "special"), (1, "extremes"),
                                                                         (64, "ties"), (65, "zeros"))
      for x in ("bf16", "f16", "f32", "bf16.narrow", "f16.narrow")),
    "int4_pack/compressed_tensors/n4096k11008/int8/all/s0", "int4_pack/compressed_tensors/n3k13/int8/extremes/s0",
    "int4_pack/k_major/n24k40/int8/extremes/s0", "int4_pack/b8/n64k128/uint4/all/s0",
)


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_have_the_contracts_bits(session: Session, case: str) -> None:
    assert set(judged(session, case)) == {Status.EXACT}


# Conversions, against NumPy's and against integers ---------------------------------------------------------------------

PROBE = """
__kernel void probe(__global const uint *bits, __global const code *codes, __global code *coded, __global uint *valued)
{
    const size_t i = get_global_id(0);
    coded[i] = code_of(as_float(bits[i]));
    valued[i] = as_uint(value(codes[i]));
}
"""


def converted(form: int, bits: Array, codes: Array) -> tuple[Array, Array]:
    """(codes of binary32 bits, binary32 bits of codes) by codes.cl on the device."""
    cl = import_module("pyopencl")
    place = opencl.opened(backend()._device())
    program = cl.Program(place.context, (Path(opencl.__file__).parent / "codes.cl").read_text() + PROBE)
    kernel = program.build(options=[*opencl.OPTIONS.split(), f"-DFORMAT={form}"]).probe
    coded, valued = np.zeros(len(bits), codes.dtype), np.zeros(len(bits), np.uint32)
    buffers = [opencl.over(place, array, written=True) for array in (bits, codes, coded, valued)]
    kernel(place.queue, bits.shape, None, *(buffer.memory for buffer in buffers))
    opencl.synchronise(place, *buffers[2:])
    return coded, valued


def around(codes: Array, width: int) -> Array:
    """binary32 bits at, halfway between, and beside halfway between neighbouring codes whose values are `codes << width`."""
    low = codes.astype(np.uint32) << np.uint32(width)
    half = low + np.uint32(1 << (width - 1))
    return np.concatenate([low, half, half - 1, half + 1])


def test_bf16_codes_are_rounded_to_nearest_even() -> None:
    """Every bf16 code, every tie between two, and both neighbours of each tie: 262,144 values; by integers alone."""
    every = np.arange(1 << 16, dtype=np.uint16)
    bits = around(every, 16)
    coded, valued = converted(1, bits, np.tile(every, 4))
    whole, rest = bits >> 16, bits & 0xFFFF
    nearest = whole + ((rest > 0x8000) | ((rest == 0x8000) & (whole % 2 == 1)))
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    assert np.array_equal(coded[~nan], nearest[~nan])
    assert ((coded[nan] & 0x7FFF) > 0x7F80).all()
    assert np.array_equal(valued, np.tile(every, 4).astype(np.uint32) << 16)


def test_binary16_codes_are_rounded_to_nearest_even() -> None:
    """Every value and tie of binary16 and both neighbours of each tie, subnormals and overflow included; against NumPy."""
    every = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        exact = every.view(np.float16).astype(np.float32)
        above = np.append(exact[1:], exact[-1])
        ties = ((exact.astype(np.float64) + above) / 2).astype(np.float32)  # of two 11-bit values: exact in binary32
        ties[0x7BFF], ties[0xFBFF] = 65520.0, -65520.0  # half way to what would be 65536
        values = np.concatenate([exact, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    bits = values.view(np.uint32)
    coded, valued = converted(0, bits, np.tile(every, 4))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal(coded[~nan], expected[~nan])
    assert ((coded[nan] & 0x7FFF) > 0x7C00).all()
    number = ~np.isnan(exact)
    assert np.array_equal(valued[: 1 << 16][number], exact.view(np.uint32)[number])


# Worked out by hand ----------------------------------------------------------------------------------------------------


def view(memory: Array) -> Any:
    """What `weights` reads of a tensor."""
    return SimpleNamespace(memory=memory)


def gemm(a: Array, q: Array, scales: Array, tactic: str) -> Array:
    """binary16 values of D by the kernel; a int8 [M, K], q codes 0..15 [N, K], scales values [N, groups]; token scale 1."""
    place, (m, k), (n, groups) = opencl.opened(backend()._device()), a.shape, scales.shape
    problem = parse_problem(f"gemm_w4a8_int8/direct/m{m}n{n}k{k}g{k // groups}/f16", ops())
    kept: dict[str, Array] = {"w": q.astype(np.uint8), "group_scale": scales.astype(np.float16).view(np.uint16)}
    state = launch.weights(place, {name: view(memory) for name, memory in kept.items()})
    d = np.full((m, n), 0x5A5A, np.uint16)
    token = np.full(m, 0x3C00, np.uint16)
    launch.run(place, problem, tactic, {**state, "a": a.astype(np.int8).view(np.uint8), "token_scale": token}, {"d": d})
    return d.view(np.float16)


@pytest.mark.parametrize("tactic", list(launch.ROWS))
def test_every_pair_of_codes_gives_its_product(tactic: str) -> None:
    """Row m of A holds the int8 m - 128 at k = m mod 8, column n of W the nibble n everywhere: D = a (q - 8), exact in binary16
    up to 2048; 256 x 16 products, at all eight places of a word."""
    a = np.zeros((256, 32), np.int64)
    a[np.arange(256), np.arange(256) % 8] = np.arange(-128, 128)
    d = gemm(a, np.repeat(np.arange(16)[:, None], 32, axis=1), np.ones((16, 1)), tactic)
    assert np.array_equal(d.astype(np.int64), np.outer(np.arange(-128, 128), np.arange(16) - 8))


def residue(tactic: str) -> float:
    """Two groups of 544. The first sums to -65601, its scale is 1. The second sums to 2^16 + 1, its scale is 1 + 2^-10: the
    product is 2^16 + 2^6 + 1 + 2^-10, which binary32 (24 bits) rounds to 65601. Rounded on its own, the total is 0; fused, it
    is 2^-10."""
    a = np.zeros((1, 1088), np.int64)
    a[0, :516], a[0, 516], a[0, 544:1060], a[0, 1060] = 127, 69, 127, 5
    q = np.concatenate([np.full((8, 544), 7), np.full((8, 544), 9)], axis=1)
    return float(gemm(a, q, np.repeat([[1.0, 1.0 + 2.0**-10]], 8, axis=0), tactic)[0, 0])


@pytest.mark.parametrize("tactic", list(launch.ROWS))
def test_products_are_rounded_before_they_are_added(tactic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert residue(tactic) == 0.0
    text = opencl.program_text("gemm_w4a8_int8.cl")
    fused = text.replace("total[r] + convert_float_rte(sum[r]) * scale", "fma(convert_float_rte(sum[r]), scale, total[r])")
    assert fused != text
    monkeypatch.setattr(opencl, "program_text", lambda file: fused if file == "gemm_w4a8_int8.cl" else text)
    monkeypatch.setitem(launch.ROWS, tactic, 3)  # sizes that no other test has built
    assert residue(tactic) == 2.0**-10


# Planted faults --------------------------------------------------------------------------------------------------------

BIASED, WIDE = CASES[len(SEED)], CASES[len(SEED) + 1]
LONG = "gemm_w4a8_int8/direct/m128n256k2048g32/f16/normal/s2"
PLAIN = "gemm_w4a8_int8/direct/m8n64k64g32/bf16/lognormal/s1"
ROW = "int8_quantize/token/m40k64/bf16"
PACK = "int4_pack/compressed_tensors/n3k13/int8"
DOWNWARDS = ("for (int start = eights - eights_per_group, group = eights / eights_per_group - 1; start >= 0; "
             "start -= eights_per_group, --group)")
GEMM_DEFECTS = {  # text, what replaces it, case, what the suite says
    "nibble minus seven": ("- 0x08080808u", "- 0x07070707u", WIDE, Status.DRIFT),
    "borrow across bytes": ("((q | 0x80808080u) - 0x08080808u) ^ 0x80808080u", "q - 0x08080808u", WIDE, Status.DRIFT),
    "scale of the first group": ("(long)group * n + column", "(long)0 * n + column", WIDE, Status.DRIFT),
    "half of a group": ("i < start + eights_per_group", "i < start + eights_per_group / 2", WIDE, Status.DRIFT),
    "bias dropped": ("result = result + value(bias[column]);", ";", BIASED, Status.DRIFT),
    "always through binary16": ("if (via_f16)", "if (1)", PLAIN, Status.DRIFT),
    "groups downwards": ("for (int start = 0, group = 0; start < eights; start += eights_per_group, ++group)", DOWNWARDS, LONG,
                         Status.DRIFT),
    "written past the columns": ("if (column >= n)", "if (column >= n + 64)", WIDE, Status.CRASHED),
    "read past the rows": ("min(first + r, m - 1)", "(first + r)", WIDE, Status.CRASHED),
}
OTHER_DEFECTS = {  # file as well
    "scale not rounded": ("value(scale);", "part;", "int8_quantize.cl", f"{ROW}/normal/s0"),
    "ties away": ("convert_char_sat_rte(narrow ? value(code_of(quotient)) : quotient)",
                  "convert_char_sat(round(narrow ? value(code_of(quotient)) : quotient))", "int8_quantize.cl", f"{ROW}/ties/s0"),
    "NaN lost": ("part < 1e-5f ? 1e-5f : part", "fmax(part, 1e-5f)", "int8_quantize.cl",
                 "int8_quantize/token/m40k129/f16/special/s129"),
    "quotient always wide": ("narrow ? value(code_of(quotient)) : quotient", "quotient", "int8_quantize.cl",
                             f"{ROW}.narrow/normal/s0"),
    "tail not packed": ("8 * j + i < k", "8 * j + i < k / 8 * 8", "int4_words.cl", f"{PACK}/all/s0"),
    "padding with the offset": ("uint word = 0;\n    for (int i = 0; i < 8 &&",
                                "uint word = offset ? 0x88888888u : 0;\n    for (int i = 0; i < 8 &&", "int4_words.cl",
                                f"{PACK}/zeros/s0"),
}
DEFECTS = {
    **{name: (text, other, "gemm_w4a8_int8.cl", case, said) for name, (text, other, case, said) in GEMM_DEFECTS.items()},
    **{name: (*row, Status.DRIFT) for name, row in OTHER_DEFECTS.items()},
}


def planted(folder: Path, file: str, text: str, other: str) -> str:
    """A copy of the door and its room with a text replaced; the source of a file that offers its backend."""
    shutil.copytree(ROOM / "xpu_room", folder / "planted" / "xpu_room")
    shutil.copy(ROOM / "xpu.py", folder / "planted" / "xpu.py")
    path = folder / "planted" / "xpu_room" / file
    source = path.read_text(encoding="utf-8")
    assert source.count(text) == 1
    path.write_text(source.replace(text, other), encoding="utf-8")
    return f"import sys\nsys.path.insert(0, {str(folder)!r})\nfrom planted.xpu import backend\n"


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_a_planted_defect_is_caught(defect: str, tmp_path: Path) -> None:
    text, other, file, case, said = DEFECTS[defect]
    with opened(tmp_path / "door.py", planted(tmp_path, file, text, other)) as session:
        assert said in judged(session, case)
