"""The cpu backend against literals worked out by hand, its codec against Fractions, and its promises against the contracts.

Nothing here takes an expected value from the backend or from the references: literals are codes in hexadecimal beside the
arithmetic that gives them. Whether backend and judge agree on drawn operands is seen by the edges of every op, last.
"""

from __future__ import annotations

import ast
import itertools
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance.backend import BF16, E2M1, E4M3FN, E4M3FNUZ, F16, INT4, INT8, UE4M3, Format, Problem, TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import DomainError, Role, make_problem, outside_domain, parse_case, parse_problem, tensors_of
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels.cpu import Cpu, backend
from lowbit.kernels.cpu_room.codec import codes_of, fma_in, narrow_codes, rounded, values
from lowbit.references.formats import container

ROOT = Path(__file__).parents[1]
Array = npt.NDArray[Any]
CPU = backend()


def call(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    """Run the backend on read-only inputs and poisoned outputs whose rows do not touch; codes of OUTPUT and INOUT tensors."""
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[problem.op], problem):
        if spec.role is Role.OUTPUT:
            wide = (*spec.shape[:-1], spec.shape[-1] + 3)
            memory = np.full(wide, 0x5A, dtype=container(spec.format))[..., : spec.shape[-1]]
        else:
            memory = np.array(tensors[spec.name], dtype=container(spec.format)).reshape(spec.shape)
            memory.setflags(write=spec.role is Role.INOUT)
        strides = tuple(step // memory.itemsize for step in memory.strides)
        address = memory.__array_interface__["data"][0]
        views[spec.role][spec.name] = TensorView(
            spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, address, memory)
    state = CPU.prepare(problem, "default", views[Role.CONSTANT])
    inputs = CPU.stage(problem, "default", views[Role.ACTIVATION] | views[Role.INOUT])
    assert CPU.run(problem, "default", state, inputs, views[Role.OUTPUT], None, None).startswith("numpy_")
    return {name: np.array(view.memory) for name, view in (views[Role.OUTPUT] | views[Role.INOUT]).items()}


def run(text: str, **tensors: Any) -> dict[str, Array]:
    """`call` on the problem behind a text; scalars and short rows are laid into zero tensors from the front."""
    problem = parse_problem(text, ops())
    filled = {}
    for spec in tensors_of(ops()[problem.op], problem):
        if spec.role is not Role.OUTPUT:
            given = np.array(tensors[spec.name])
            filled[spec.name] = np.zeros(spec.shape, dtype=container(spec.format))
            if given.ndim == 0:
                filled[spec.name][...] = given
            else:
                filled[spec.name][tuple(slice(size) for size in given.shape)] = given
    return call(problem, filled)


def f32(*x: float) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in x]


# Structure -----------------------------------------------------------------------------------------------------------


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def foreign(source: str) -> list[str]:
    """Imports that are neither the standard library, numpy, the backend protocol nor a file of the cpu target."""
    own = (
        ".cpu_room.codec", ".domain", ".cpu_room.encodings", ".cpu_room.gemm", ".cpu_room.quantisers", ".codec",
        ".encodings",
    )
    return [
        name for name in imported(source)
        if name.split(".")[0] not in (*sys.stdlib_module_names, "numpy")
        and name not in ("lowbit.conformance.backend", *own)
    ]


def test_imports_nothing_of_the_judge() -> None:
    files = [ROOT / "kernels" / "cpu.py", ROOT / "kernels" / "domain.py", *sorted((ROOT / "kernels" / "cpu_room").glob("*.py"))]
    assert len(files) >= 7
    for path in files:
        assert foreign(path.read_text()) == []


def test_a_planted_import_is_seen() -> None:
    assert foreign("from lowbit.references.rounding import encode") == ["lowbit.references.rounding"]
    assert foreign("def f():\n    import torch") == ["torch"]


def test_takes_no_codec_from_the_protocol() -> None:
    """The protocol module re-exports records and declaration builders; nothing else may come through it."""
    for path in (ROOT / "kernels" / "cpu_room").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lowbit.conformance.backend":
                names = {alias.name for alias in node.names}
                assert names <= {
                    "BF16", "DATAPATHS", "E2M1", "E4M3FN", "E4M3FNUZ", "F16", "F32", "INT4", "INT8", "INT32", "UE4M3", "UINT4",
                    "Contraction", "Declaration", "Format", "Join", "Order", "Problem", "Start", "Step", "TensorView", "add",
                    "cast", "mul",
                }


# Codec ---------------------------------------------------------------------------------------------------------------

NARROW = {  # format -> (fraction bits, bias, largest code, NaN codes, signed)
    "e2m1": (E2M1, 1, 1, 0x7, (), True), "e4m3fn": (E4M3FN, 3, 7, 0x7E, (0x7F, 0xFF), True),
    "e4m3fnuz": (E4M3FNUZ, 3, 8, 0x7F, (0x80,), True), "ue4m3": (UE4M3, 3, 7, 0x7E, (0x7F,), False),
}


def magnitude(code: int, fraction: int, bias: int) -> Fraction:
    exponent, rest = code >> fraction, code & ((1 << fraction) - 1)
    significand = Fraction(rest, 1 << fraction) + (1 if exponent else 0)
    return significand * Fraction(2) ** (max(exponent, 1) - bias)


@pytest.mark.parametrize("name", NARROW)
def test_every_narrow_code_has_its_value(name: str) -> None:
    fmt, fraction, bias, _, nans, signed = NARROW[name]
    size = 1 << fmt.bits
    found = values(np.arange(size, dtype=np.uint8), fmt)
    for code in range(size):
        if code in nans:
            assert np.isnan(found[code])
            continue
        half = size // 2 if signed else size
        expected = magnitude(code % half, fraction, bias)
        assert Fraction(float(found[code])) == (-expected if code >= half else expected)
        assert bool(np.signbit(found[code])) == (code >= half)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_rounding_at_and_beside_every_tie(name: str) -> None:
    """Between neighbours: the middle goes to the even code, the binary32 value beside it to the nearer one."""
    _, fraction, bias, top, nans, signed = NARROW[name]
    sign = (8 if name == "e2m1" else 0x80) if signed else 0
    inputs: list[float] = []
    expected: list[int] = []
    for code in range(top):
        middle = np.float32(float((magnitude(code, fraction, bias) + magnitude(code + 1, fraction, bias)) / 2))
        inputs += [float(np.nextafter(middle, np.float32(0))), float(middle), float(np.nextafter(middle, np.float32(1e9)))]
        expected += [code, code + code % 2, code + 1]
    inputs += [float(magnitude(top, fraction, bias)), 1e9, float("inf"), 2.0**-149]
    expected += [top, top, top, 0]
    codes = narrow_codes(np.array(inputs, dtype=np.float32), name)
    assert codes.tolist() == expected
    if signed:
        negative = [code | sign if code or name != "e4m3fnuz" else 0 for code in expected]
        assert narrow_codes(-np.array(inputs, dtype=np.float32), name).tolist() == negative
    assert int(narrow_codes(np.array([np.nan], dtype=np.float32), name)[0]) == (nans[0] if nans else 0x7)


@pytest.mark.parametrize(("fmt", "fraction", "bias", "infinity"), [(BF16, 7, 127, 0x7F80), (F16, 10, 15, 0x7C00)], ids=str)
@pytest.mark.parametrize("width", [np.float32, np.float64])
def test_16_bit_rounding_at_and_beside_ties(fmt: Format, fraction: int, bias: int, infinity: int, width: type) -> None:
    """Every seventh pair of neighbours, subnormals included, and the last pair below infinity."""
    inputs: list[Any] = []
    expected: list[int] = []
    for code in (*range(0, infinity - 1, 7), infinity - 1):
        exact = (magnitude(code, fraction, bias) + magnitude(code + 1, fraction, bias)) / 2
        middle = width(float(exact))
        assert Fraction(float(middle)) == exact
        inputs += [np.nextafter(middle, width(0)), middle, np.nextafter(middle, width(np.inf))]
        expected += [code, code + code % 2, code + 1]
    x: Array = np.array(inputs, dtype=width)
    assert codes_of(x, fmt).tolist() == expected
    assert codes_of(-x, fmt).tolist() == [code | 0x8000 for code in expected]
    assert np.array_equal(values(codes_of(x, fmt), fmt), rounded(x, fmt))
    assert np.isnan(rounded(np.array([np.nan], dtype=width), fmt)).all()


def nearest(x: Fraction, fraction: int, bias: int) -> Fraction:
    """x to nearest even, no overflow."""
    if x == 0:
        return x
    exponent = 1 - bias
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - fraction)
    return round(x / step) * step  # Python rounds Fractions to nearest even


@pytest.mark.parametrize(("fmt", "fraction", "bias"), [(BF16, 7, 127), (F16, 10, 15)], ids=str)
def test_fma_rounds_once(fmt: Format, fraction: int, bias: int) -> None:
    """Random operands of one format, and products at a tie with an addend far below that alone decides."""
    words = np.random.Philox(key=5).random_raw(4000).astype(np.uint64)
    a, b, c = (values((words >> np.uint64(shift)).astype(np.uint16) & np.uint16(0xBFFF if fmt is BF16 else 0xDFFF), fmt)
               for shift in (0, 16, 32))
    usable = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (np.abs(a.astype(np.float64) * b) < 2.0**15)
    a, b, c = a[usable], b[usable], c[usable]
    assert a.size > 1500
    one = np.float32(1)
    tie = np.float32(1.0 + 2.0**-fraction)  # (1 + u)(1 + u / 2..): products that end half a step above a value
    half = np.float32(1.5)
    tiny = np.float32(2.0**-120 if fmt is BF16 else 2.0**-24)
    extra = [(tie, half, sign * tiny) for sign in (-one, one, np.float32(0))]
    a, b, c = (np.concatenate([old, np.array(new, dtype=np.float32)])
               for old, new in zip((a, b, c), zip(*extra, strict=True), strict=True))
    found = fma_in(a, b, c, fmt)
    for index in range(a.size):
        exact = Fraction(float(a[index])) * Fraction(float(b[index])) + Fraction(float(c[index]))
        assert Fraction(float(found[index])) == nearest(exact, fraction, bias)


def test_fma_keeps_infinities_and_nan() -> None:
    x = np.array([np.inf, np.inf, 1, np.nan, 0], dtype=np.float32)
    y = np.array([1, 1, 1, 1, np.inf], dtype=np.float32)
    z = np.array([-1, -np.inf, -np.inf, 1, 1], dtype=np.float32)
    for fmt in (BF16, F16):
        found = fma_in(x, y, z, fmt)
        assert found[0] == np.inf
        assert found[2] == -np.inf
        assert np.isnan(found[[1, 3, 4]]).all()


def test_integer_codes() -> None:
    assert values(np.arange(16, dtype=np.uint8), INT4).tolist() == [*range(8), *range(-8, 0)]
    assert values(np.array([0, 127, 128, 255], dtype=np.uint8), INT8).tolist() == [0, 127, -128, -1]


# GEMMs: codes of e4m3fn 0x30 = 0.5, 0x38 = 1, 0x39 = 1.125, 0x40 = 2; of bf16 0x3F80 = 1, step 2^-7 above it ---------


def test_w8a8_scales_and_rounds_ties_to_even() -> None:
    """acc = 1 * 1 + 2 * 0.5 = 2, token scale 0.5: D is the channel scale; 1 + 2^-8 and 1 + 3 * 2^-8 are ties. The channel scale
    comes first: 2 * 2^127 is infinite although its half is not."""
    found = run(
        "gemm_w8a8_fp8/scaled/m1n8k16/bf16", a=[[0x38, 0x40]], w=np.full((8, 2), [0x38, 0x30]), token_scale=f32(0.5),
        channel_scale=f32(1, 1 + 2**-8, 1 + 3 * 2**-8, -1, 1 + 3 * 2**-9, 2.0**126, 2.0**-133, 2.0**127))
    assert found["d"].tolist() == [[0x3F80, 0x3F80, 0x3F82, 0xBF80, 0x3F81, 0x7E80, 0x0001, 0x7F80]]


@pytest.mark.parametrize(("bias", "code"), [("bias", 0x3F81), ("biasafter", 0x3F80)])
def test_w8a8_bias_before_or_after_the_cast(bias: str, code: int) -> None:
    """1 + 2^-8 plus 2^-8: together 1 + 2^-7; cast to 1 first, the sum is a tie that goes back to 1."""
    found = run(
        f"gemm_w8a8_fp8/scaled/m2n8k16/bf16.atensor.wtensor.{bias}", a=[[0x38]], w=np.full((8, 1), 0x38), token_scale=f32(1),
        channel_scale=f32(1 + 2**-8), bias=0x3B80)
    assert found["d"].tolist() == [[code] * 8, [0x3B80] * 8]


def test_w8a8_blocks_of_128() -> None:
    """1 * 1 * (2 * 3) + 1 * 1 * (0.5 * 5) = 8.5; columns from 128 on have the second row of weight scales: 2 * 1 + 0.5 * 1."""
    a = np.zeros((1, 256), dtype=np.uint8)
    a[0, [0, 255]] = 0x38
    found = run("gemm_w8a8_fp8/block/m1n136k256/f32", a=a, w=0x38, a_scale=[f32(2, 0.5)], w_scale=[f32(3, 5), f32(1, 1)])
    assert found["d"].tolist() == [f32(8.5) * 128 + f32(2.5) * 8]


def test_w8a8_fnuz_reads_half_the_value() -> None:
    """0x38 is 0.5 in e4m3fnuz; 0x80 is NaN and stays in its row."""
    found = run("gemm_w8a8_fp8/scaled/m2n8k16/f16.fnuz", a=[[0x38], [0x80]], w=0x38, token_scale=f32(1, 1),
                channel_scale=f32(*[1] * 8))
    assert found["d"][0].tolist() == [0x3400] * 8  # 0.25
    assert np.isnan(found["d"][1].view(np.float16)).all()


@pytest.mark.parametrize(("variant", "code"), [("sym", 0x4042), ("zp", 0x4042), ("zpafter", 0x4040)])
def test_w4a16_rounds_the_weight(variant: str, code: int) -> None:
    """s = 1 + 2^-7, q = 11, z = 8. (q - z) s = 3.0234375, a tie, is 3.03125; q s = 11.0859375 is 11.0625, less 8.0625 is 3."""
    found = run(f"gemm_w4a16/{variant}/m1n8k32g32/bf16", a=[[0x3F80]], w=np.full((8, 1), 11), scale=0x3F81, zero=8)
    assert found["d"].tolist() == [[code] * 8]


def test_w4a16_overflowing_weight_is_infinite() -> None:
    """15 - 8 = 7 times 60000 passes 65504: W = inf, and inf * 0 is NaN wherever the other factor is zero."""
    a = np.zeros((2, 32), dtype=np.uint16)
    a[0, :] = 0x3C00
    found = run("gemm_w4a16/sym/m2n8k32g32/f16", a=a, w=15, scale=0x7B53)
    assert found["d"][0].tolist() == [0x7C00] * 8
    assert np.isnan(found["d"][1].view(np.float16)).all()


@pytest.mark.parametrize(("variant", "codes"), [("folded", [0x4100, 0xC3E0, 0]), ("exact", [0x40FC, 0xC560, 0x7FC0])])
def test_w4a8_fp8_folded_and_exact(variant: str, codes: list[int]) -> None:
    """7 * 1.125 = 7.875 is 8 in e4m3; -8 * 448 saturates at -448; q = 0 under a NaN scale is 0 when folded, NaN when exact."""
    scale = [[0x39], [0x7E], [0x7F]]
    found = run(f"gemm_w4a8_fp8/{variant}/m1n8k64g64/bf16", a=[[0x38]], w=[[7], [8], [0]], group_scale=scale,
                token_scale=f32(1), channel_scale=f32(*[1] * 8))
    assert found["d"][0, :3].tolist() == codes


def test_w4a8_fp8_grouped_gives_rows_to_experts() -> None:
    """Rows 0 and 2.. with counts (1, 0, 2): weights 1, 2, 3 times the channel scales 1, 1, 0.5, plus the expert's bias."""
    w = np.zeros((3, 8, 64), dtype=np.uint8)
    w[:, :, 0] = [[1], [2], [3]]
    found = run("gemm_w4a8_fp8_grouped/folded/e3m3n8k64g64/f16.bias", a=[[0x38], [0x38], [0x40]], counts=[1, 0, 2], w=w,
                group_scale=0x38, token_scale=f32(1, 1, 1), channel_scale=[f32(*[1] * 8), f32(*[1] * 8), f32(*[0.5] * 8)],
                bias=[[0x3C00] * 8, [0x7BFF] * 8, [0] * 8])
    assert found["d"].tolist() == [[0x4000] * 8, [0x3E00] * 8, [0x4200] * 8]  # 1 + 1, 3 / 2, 6 / 2


@pytest.mark.parametrize(("variant", "code"), [("direct", 0x4789), ("viaf16", 0x7F80)])
def test_w4a8_int8_through_f16(variant: str, code: int) -> None:
    """125 * (15 - 8) * 80 = 70000: 70144 in bf16 (step 512), infinite in f16."""
    found = run(f"gemm_w4a8_int8/{variant}/m1n8k32g32/bf16", a=[[125]], w=15, group_scale=0x42A0, token_scale=0x3F80)
    assert found["d"].tolist() == [[code] * 8]


def test_w4a8_int8_group_scales_and_bias() -> None:
    """k 0: -128 * -8 * 0.5; k 32: 3 * 2 * 0.25; then * 2 + 1 = 1028."""
    a = np.zeros((1, 64), dtype=np.uint8)
    a[0, [0, 32]] = 128, 3
    w = np.full((8, 64), 8, dtype=np.uint8)
    w[:, 0], w[:, 32] = 0, 10
    found = run("gemm_w4a8_int8/direct/m1n8k64g32/f16.bias", a=a, w=w, group_scale=np.full((8, 2), [0x3800, 0x3400]),
                token_scale=0x4000, bias=0x3C00)
    assert found["d"].tolist() == [[0x6404] * 8]  # 1028 = 1024 + 4 steps of 1


def test_nvfp4_block_scales_and_alpha() -> None:
    """k 0: 1 * 1 * 6 * 1.125; k 16: -0.5 * 2 * 4 * 1; alpha 0.5: (6.75 - 4) / 2 = 1.375."""
    a = np.zeros((1, 32), dtype=np.uint8)
    a[0, [0, 16]] = 2, 9
    w = np.zeros((8, 32), dtype=np.uint8)
    w[:, [0, 16]] = 7, 6
    found = run("gemm_nvfp4/plain/m1n8k32r0/bf16", a=a, a_scale=[[0x38, 0x40]], w=w, w_scale=np.full((8, 2), [0x39, 0x38]),
                alpha=f32(0.5))
    assert found["d"].tolist() == [[0x3FB0] * 8]


@pytest.mark.parametrize(("variant", "code"), [("svdquant", 0x4118), ("nunchaku", 0x40F0)])
def test_nvfp4_low_rank_before_or_after_the_channel_scale(variant: str, code: int) -> None:
    """main 2, low rank 1, channel 3, bias 0.5: (2 + 1) * 3 + 0.5 = 9.5, or 2 * 3 + 0.5 + 1 = 7.5."""
    found = run(f"gemm_nvfp4/{variant}/m1n8k32r16/bf16.lora.bias", a=[[2]], a_scale=0x38, w=4, w_scale=0x38, alpha=f32(1),
                lora_act=[f32(1)], lora_up=0x3F80, channel_scale=0x4040, bias=0x3F00)
    assert found["d"].tolist() == [[code] * 8]


def test_nvfp4_affine_step_rounds_once() -> None:
    """(1 + 2^-10)^2 - (1 + 2^-9) = 2^-20, which is 0x0010 in f16; a product rounded on its own would leave 0."""
    found = run("gemm_nvfp4/nunchaku/m1n8k32r0/f16.bias", a=[[2]], a_scale=0x38, w=2, w_scale=0x38, alpha=f32(1 + 2**-10),
                channel_scale=0x3C01, bias=0xBC02)
    assert found["d"].tolist() == [[0x0010] * 8]


def test_nvfp4_low_rank_activation_is_rounded_to_the_output_format() -> None:
    """70000 is infinite in f16 before its product."""
    found = run("gemm_nvfp4/svdquant/m1n8k32r16/f16.lora", a=0, a_scale=0x38, w=0, w_scale=0x38, alpha=f32(1),
                lora_act=[f32(70000)], lora_up=np.full((8, 1), 0x0001), channel_scale=0x3C00)
    assert found["d"].tolist() == [[0x7C00] * 8]


@pytest.mark.parametrize(("variant", "code"), [("f32", 0x3F80), ("half", 0x0000)])
def test_int4_accumulates_groups_in_f32_or_in_the_output_format(variant: str, code: int) -> None:
    """Group sums 257 and -256: 257 is a tie in bf16 and goes to 256."""
    a = np.zeros((1, 128), dtype=np.uint8)
    w = np.zeros((8, 128), dtype=np.uint8)
    a[0, :5], w[:, :5] = [8, 8, 8, 8, 1], [8, 8, 8, 8, 1]  # 4 * 64 + 1
    a[0, 64:69], w[:, 64:69] = [8, 8, 8, 8, 8], [7, 7, 7, 7, 4]  # -8 * 32
    found = run(f"gemm_int4/{variant}/m1n8k128r0/bf16", a=a, a_scale=0x3F80, w=w, w_scale=0x3F80, channel_scale=0x3F80)
    assert found["d"].tolist() == [[code] * 8]


def test_int4_half_joins_product_and_sum() -> None:
    """-(1 + 2^-9), then 1025 * 2^-10 (1 + 2^-10) = (1 + 2^-10)^2 added in one rounding: 2^-20, 0x0010 in f16."""
    a = np.zeros((1, 128), dtype=np.uint8)
    a[0, 0], a[0, 64:80], a[0, 80] = 1, 8, 1
    found = run("gemm_int4/half/m1n8k128r0/f16", a=a, a_scale=[[0x3C00, 0x1401]], w=np.repeat(a, 8, axis=0),
                w_scale=np.full((8, 2), [0xBC02, 0x3C00]), channel_scale=0x3C00)
    assert found["d"].tolist() == [[0x0010] * 8]


def test_int4_scales_low_rank_and_bias() -> None:
    """49 * 0.5 * 4 = 98, low rank 2 * 1, channel 2, bias -1: (98 + 2) * 2 - 1 = 199."""
    found = run("gemm_int4/f32/m1n8k64r16/f16.lora.bias", a=[[7]], a_scale=0x3800, w=7, w_scale=0x4400, lora_act=[f32(2)],
                lora_up=0x3C00, channel_scale=0x4000, bias=0xBC00)
    assert found["d"].tolist() == [[0x5A38] * 8]  # 199 = 128 * (1 + 568 / 1024)


# Encodings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("problem", "q", "words"), [
    ("gptq/n1k8/uint4", [[1, 2, 3, 4, 5, 6, 7, 8]], [[0x87654321]]),
    ("k_major/n1k8/int8", [[1, 2, 3, 4, 5, 6, 7, 0xF8]], [[0x87654321]]),
    ("along_n/n8k1/uint4", [[0], [1], [2], [3], [4], [5], [6], [7]], [[0x76543210]]),
    ("awq/n8k1/uint4", [[0], [1], [2], [3], [4], [5], [6], [7]], [[0x75316420]]),
    ("nibble/n1k4/uint4", [[1, 2, 3, 4]], [[0x21, 0x43]]),
    ("compressed_tensors/n1k3/int8", [[0xF8, 0, 7]], [[0xF80]]),
    ("zeros_v1/n8k1/uint4", [[0], [1], [2], [3], [4], [5], [6], [7]], [[0x6543210F]]),
    ("zeros_v2/n8k1/uint4", [[0], [1], [2], [3], [4], [5], [6], [7]], [[0x76543210]]),
])
def test_int4_pack(problem: str, q: list[list[int]], words: list[list[int]]) -> None:
    assert run(f"int4_pack/{problem}", q=q)["packed"].tolist() == words


def test_int4_pack_gptq_turns_the_matrix() -> None:
    """[N, K] = [2, 16] lies in [K/8, N] = [2, 2]."""
    q = np.arange(32).reshape(2, 16) % 16
    assert run("int4_pack/gptq/n2k16/uint4", q=q)["packed"].tolist() == [[0x76543210] * 2, [0xFEDCBA98] * 2]


def test_int4_pack_b8_in_place() -> None:
    assert run("int4_pack/b8/n1k8/uint4", words=[[0x87654321]])["words"].tolist() == [[0x0FEDCBA9]]


def test_int4_repack() -> None:
    """Where q[n, k] is n, every word along N counts 0..7; where it is k, word k repeats it. Zero points only change places."""
    words = [[0x11111111 * n] for n in range(8)]
    assert run("int4_repack/weight/n8k8/plain", packed=words)["repacked"].tolist() == [[0x76543210]] * 8
    assert run("int4_repack/weight/n8k8/plain", packed=[[0x76543210]] * 8)["repacked"].tolist() == words
    assert run("int4_repack/zeros/n16k1/plain", packed=[[1], [2]])["repacked"].tolist() == [[1, 2]]


def test_int4_encode_unified() -> None:
    """0 stays, 1..7 become 8 - v, negative codes stay."""
    packed = [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    want = [[0x70, 0x56, 0x34, 0x12, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert run("int4_encode/unified/e1n1k32/plain", q=packed)["encoded"].tolist() == want


def test_int4_encode_reorders() -> None:
    """(9, 21): slot 64 * 1 + 16 * 1 + 8 * 1 + 4 * 1 + 1 = 93, word 11, nibble 5. (2, 40): 512 + 64 * 2 + 16 * 2, word 84."""
    q = np.zeros((16, 16), dtype=np.uint32)
    q[9, 2], q[2, 5], q[0, 2] = 3 << 20, 0xE, 0xD  # (0, 16): slot 8, word 1
    want = np.zeros((16, 16), dtype=np.uint32)
    want[0, 11], want[5, 4], want[0, 1] = 5 << 20, 0xE, 0xD
    assert run("int4_encode/dense/e1n16k128/plain", q=q)["encoded"].tolist() == want.tolist()
    grouped = np.zeros((2, 16, 32), dtype=np.uint32)
    grouped[1, 9, 2] = 3 << 20
    found = run("int4_encode/grouped/e2n16k256/plain", q=grouped)["encoded"]
    assert found.shape == (2, 32, 16)
    assert [tuple(place) for place in np.argwhere(found).tolist()] == [(1, 0, 11)]


def test_scale_pack_e4m3() -> None:
    """1; +0 (eight -0); 2^-9 (subnormal multiples); 448 (saturates from -1 on); NaN; -1; 0x3B = 1.375, at ties for 6 and 7."""
    found = run("scale_pack_e4m3/table8/n7/plain", scales=[0x38, 0x00, 0x01, 0x7E, 0x7F, 0xB8, 0x3B])["packed"].tolist()
    assert found[0] == [0xD0, 0xCE, 0xCC, 0xCA, 0xC8, 0xC4, 0xC0, 0xB8]
    assert found[1] == [0x80] * 8
    assert found[2] == [0x88, 0x87, 0x86, 0x85, 0x84, 0x83, 0x82, 0x81]
    assert found[3] == [0xFE] * 8
    assert found[4] == [0x7F] * 8
    assert found[5] == [0x50, 0x4E, 0x4C, 0x4A, 0x48, 0x44, 0x40, 0x38]
    assert found[6] == [0xD3, 0xD2, 0xD0, 0xCE, 0xCB, 0xC8, 0xC3, 0xBB]  # 11, 9.625 -> 10, 8.25 -> 8, 6.875 -> 7, 5.5, 4.125, ..


@pytest.mark.parametrize(("recipe", "groups", "channel"), [
    ("vllm", [[0x66, 0x20], [0x00, 0x00], [0x66, 0x66]], [8, 8 / 229376, 8]),
    ("vllm_native", [[0x66, 0x20], [0x00, 0x00], [0x7F, 0x7F]], [8, 8 / 229376, None]),
])
def test_scale_fold(recipe: str, groups: list[list[int]], channel: list[float | None]) -> None:
    """Rows (448, 1), (0, 0), (448, NaN): c = 1; c = 1 / (448 * 512); NaN is left out and becomes 448 / 8, or takes the row."""
    found = run(f"scale_fold/row/n3k256/{recipe}", scales=[[0x43E0, 0x3F80], [0, 0], [0x43E0, 0x7FC0]])
    assert found["group_scale"].tolist() == groups
    for code, value in zip(found["channel_scale"][:, 0], channel, strict=True):
        assert np.isnan(code.view(np.float32)) if value is None else int(code) == f32(value)[0]


def test_scale_fold_loses_low_bits_of_small_scales() -> None:
    """448 beside 9 * 2^-9: an eighth of it is 1.125 * 2^-9, which is 2^-9. Beside 1.1328125 / 16: first 1.125 / 16, an eighth of
    which is 4.5 * 2^-9 and goes to 4; an eighth taken before any rounding would go to 5."""
    found = run("scale_fold/row/n1k384/vllm", scales=[[0x43E0, 0x3C90, 0x3D91]])
    assert found["group_scale"].tolist() == [[0x66, 0x01, 0x04]]


def test_scale_swizzle() -> None:
    """[129, 5] in [256, 8]: (0, 0) at 0, (31, 3) at 499, (32, 0) at 4, (64, 4) at 512 + 8, (128, 0) at 1024; the rest is zero."""
    scales = np.zeros((129, 5), dtype=np.uint8)
    places = {(0, 0): 0, (31, 3): 31 * 16 + 3, (32, 0): 4, (64, 4): 520, (128, 0): 1024}
    for value, place in enumerate(places, start=1):
        scales[place] = value
    found = run("scale_swizzle/tile128x4/m129g5/plain", scales=scales)["swizzled"].reshape(-1)
    assert found.size == 2048
    assert {int(i): int(found[i]) for i in np.flatnonzero(found)} == dict(zip(places.values(), range(1, 6), strict=True))


def test_fp8_convert_fnuz() -> None:
    w, scale = [[0x80, 0x7F, 0x01, 0xFF]], f32(1.5)
    found = run("fp8_convert_fnuz/tensor/n1k4/fnuz.static", w=w, weight_scale=scale, input_scale=f32(3e38))
    assert found["w_out"].tolist() == [[0x00, 0x7F, 0x01, 0xFF]]
    assert found["weight_scale_out"].tolist() == f32(3)
    assert found["input_scale_out"].tolist() == [0x7F800000]  # 6e38 is infinite
    kept = run("fp8_convert_fnuz/tensor/n1k4/fn", w=w, weight_scale=scale)
    assert kept["w_out"].tolist() == w
    assert kept["weight_scale_out"].tolist() == scale


@pytest.mark.parametrize(("variant", "code"), [("max_scale", 0x76), ("max_scale_f16", 0x7E)])
def test_fp8_requantize_to_the_largest_scale(variant: str, code: int) -> None:
    """448 * 256 / 512 = 224; in binary16 448 * 256 is infinite and ends at 448. NaN ends there too."""
    found = run(f"fp8_requantize/{variant}/n3k1s2/fn", w=[[0x38], [0x7E], [0x7F]], scales=f32(512, 256), widths=[1, 2])
    assert found["w_out"].tolist() == [[0x38], [code], [0x7E]]
    assert found["scale"].tolist() == f32(512)


def test_fp8_requantize_multiplies_by_the_reciprocal() -> None:
    """2 * 1.23046875 = 2.4609375 over 1.875 is 1.3125, a tie that division takes to 1.25; see the static quantiser below."""
    found = run("fp8_requantize/max_scale/n2k1s2/fn", w=0x40, scales=f32(1.875, 1.23046875), widths=[1, 1])
    assert found["w_out"].tolist() == [[0x40], [0x3B]]


def test_fp8_requantize_fused_and_channel() -> None:
    sentinel = 0xFF7FFFFF
    fused = run("fp8_requantize/max_scale/n2k1s2/fn.fused", w=[[0x7F], [0x12]], scales=[*f32(0.5), sentinel], widths=[1, 1])
    assert fused["w_out"].tolist() == [[0x7F], [0x12]]
    assert fused["scale"].tolist() == f32(0.5)
    channel = run("fp8_requantize/channel/n3k1s2/fn", w=0, scales=f32(2, 3), widths=[2, 1])
    assert channel["channel_scale"].tolist() == [f32(2), f32(2), f32(3)]


# Quantisers: x in bf16, 0x3F80 = 1, 0x40C0 = 6, 0x43E0 = 448 ---------------------------------------------------------


def test_fp8_quantize_static_bounds() -> None:
    found = run("fp8_quantize/static/m1k4p0/bf16", x=[[0x3F80, 0x43E0, 0x7FC0, 0xFF80]], scale=f32(0.5))
    assert found["q"].tolist() == [[0x40, 0x7E, 0x7E, 0xFE]]  # 2; 896 and NaN are bounded above, -inf below
    native = run("fp8_quantize/static/m1k4p2/bf16.fnuz.vllm_native", x=[[0x3F80, 0x43E0, 0x7FC0, 0x8000]], scale=f32(1))
    assert native["q"].tolist() == [[0x40, 0x7E, 0x80, 0x00], [0, 0, 0, 0]]  # fnuz: 1 is 0x40, bound 224, NaN stays, no -0


@pytest.mark.parametrize(("problem", "given", "code"), [
    ("static/m1k2p0/f32", {"scale": f32(1.875)}, 0x3B), ("tensor/m1k2p0/f32", {}, 0x3B), ("token/m1k2p0/f32", {}, 0x3A),
    ("token/m1k2p0/f32.vllm_native", {}, 0x3B),
])
def test_fp8_quantize_by_reciprocal_or_division(problem: str, given: dict[str, list[int]], code: int) -> None:
    """amax 840: scale 1.875. 2.4609375 / 1.875 = 1.3125 is a tie between 1.25 (even) and 1.375. fl(1 / 1.875) is too large by
    7 parts in 2^27; times 2.4609375 that is 1.15 half steps of binary32 above 1.3125, and the code is 1.375."""
    found = run(f"fp8_quantize/{problem}", x=[f32(840, 2.4609375)], **given)
    assert found["q"].tolist() == [[0x7E, code]]


def test_fp8_quantize_zero_tensor() -> None:
    """vllm: scale 0, and 0 * inf = NaN becomes 448. vllm_native: scale 1 / (448 * 512), codes 0."""
    bare = run("fp8_quantize/tensor/m1k2p0/bf16", x=0)
    assert (bare["q"].tolist(), bare["scales"].tolist()) == ([[0x7E, 0x7E]], [0])
    native = run("fp8_quantize/tensor/m1k2p0/bf16.vllm_native", x=0)
    assert (native["q"].tolist(), native["scales"].tolist()) == ([[0, 0]], f32(1 / 229376))


def test_fp8_quantize_token_bound_and_infinity() -> None:
    """Bound 224 on amax 448: scale 0.5, 448 saturates. Row with inf: scale inf, finite 0, inf / inf = NaN becomes 448."""
    found = run("fp8_quantize/token/m2k2p0/bf16.ub", x=[[0x43E0, 0x3F80], [0x3F80, 0xBF80]], scale_ub=f32(224))
    assert found["q"].tolist() == [[0x7E, 0x40], [0x7E, 0xFE]]
    assert found["scales"].tolist() == [f32(0.5), f32(1 / 448)]
    infinite = run("fp8_quantize/token/m1k2p0/bf16", x=[[0x7F80, 0xBF80]])
    assert (infinite["q"].tolist(), infinite["scales"].tolist()) == ([[0x7E, 0x80]], [[0x7F800000]])


@pytest.mark.parametrize(("recipe", "zero_scale", "nan_code"), [
    ("vllm", 1e-10, 0xFE), ("deepgemm", 1e-4, 0x7F), ("scaled_quantize", None, 0x7F),
])
def test_fp8_quantize_block(recipe: str, zero_scale: float | None, nan_code: int) -> None:
    """Blocks: 448 and 1 (scale 1); zeros (the floor of amax over 448); NaN and 1, where vllm leaves NaN out of the scale."""
    x = np.zeros((1, 384), dtype=np.uint16)
    x[0, :2], x[0, 256:258] = [0x43E0, 0xBF80], [0x7FC0, 0x3F80]
    found = run(f"fp8_quantize/block/m1k384p0/bf16.{recipe}", x=x)
    assert found["q"][0, :2].tolist() == [0x7E, 0xB8]
    assert found["q"][0, 2:256].tolist() == [0] * 254
    assert found["q"][0, 256] == nan_code
    scales = found["scales"].view(np.float32)[0]
    assert scales[0] == 1
    floor = np.float32(zero_scale) / np.float32(448) if zero_scale else np.float32(1) / (np.float32(448) / np.float32(1e-12))
    assert scales[1] == floor
    assert scales[2] == np.float32(1) / np.float32(448) if recipe == "vllm" else np.isnan(scales[2])


def test_fp8_quantize_tile() -> None:
    """Two tiles of 128 rows: amax 448 at the last element of the first, 896 at the first of the second."""
    x = np.full((256, 128), 0x3F80, dtype=np.uint16)
    x[127, 127], x[128, 0] = 0x43E0, 0x4460
    found = run("fp8_quantize/tile/m256k128p0/bf16.deepgemm", x=x)
    assert found["scales"].tolist() == [f32(1), f32(2)]
    assert found["q"][[0, 127, 128, 255], [0, 127, 0, 0]].tolist() == [0x38, 0x7E, 0x7E, 0x30]


def test_int8_quantize() -> None:
    """amax 127: scale 1, ties to even. Zeros: the floor 1e-5, 0x3728 in bf16."""
    x = [[0x42FE, 0x3FC0, 0xBF00, 0xC2FE], [0, 0x8000, 0, 0]]
    found = run("int8_quantize/token/m2k4/bf16", x=x)
    assert found["q"].tolist() == [[127, 2, 0, 0x81], [0, 0, 0, 0]]
    assert found["scales"].tolist() == [[0x3F80], [0x3728]]
    assert found["zeros"].tolist() == [[0], [0]]


@pytest.mark.parametrize(("quotient", "code"), [("wide", 31), ("narrow", 30)])
def test_int8_quantize_quotient_format(quotient: str, code: int) -> None:
    """amax 128: 128 / 127 is 129 / 128 in bf16. 30.75 over that is 30.5116, which goes to 31; in bf16 it is 30.5, a tie, 30."""
    found = run(f"int8_quantize/token/m1k2/bf16.{quotient}", x=[[0x4300, 0x41F6]])
    assert found["scales"].tolist() == [[0x3F81]]
    assert found["q"].tolist() == [[127, code]]


def test_int4_quantize_weights_takes_the_larger_of_two_quotients() -> None:
    """Groups (7, -8): 1 and 1. (3.5, -8): max(0.5, 1). (7, -4): max(1, 0.5). Ties 0.5, 1.5, 2.5 to even; uint4b8 adds 8."""
    x = np.zeros((3, 32), dtype=np.uint16)
    x[:, :2] = [[0x40E0, 0xC100], [0x4060, 0xC100], [0x40E0, 0xC080]]
    x[:, 2:5] = [0x3F00, 0x3FC0, 0x4020]
    want = [[7, 8, 0, 2, 2], [4, 8, 0, 2, 2], [7, 12, 0, 2, 2]]
    found = run("int4_quantize/sym/n3k32g32/bf16", x=x)
    assert found["q"][:, :5].tolist() == want
    assert found["scales"].tolist() == [[0x3F80]] * 3
    shifted = run("int4_quantize/uint4b8/n3k32g32/bf16", x=x)
    assert shifted["q"][:, :5].tolist() == [[(code + 8) % 16 for code in row] for row in want]


@pytest.mark.parametrize(("recipe", "ends", "scale", "zero_scale"), [
    ("compressed_tensors", [7, 8], 0x3C00, 0x1400),  # amax / 7.5: 7.5 is bounded to 7, -7.5 a tie that goes to -8; 2^-10
    ("svdquant", [7, 9], 0x3C49, 0x0000),  # amax / 7 = 1.0714 (1 + 73 / 1024): both ends at +-6.99
    ("nunchaku", [7, 9], 0x3C49, 0x0000),
])
def test_int4_quantize_symmetric_recipes(recipe: str, ends: list[int], scale: int, zero_scale: int) -> None:
    x = np.zeros((2, 64), dtype=np.uint16)
    x[0, :2] = 0x4780, 0xC780  # +-7.5
    found = run(f"int4_quantize/sym/n2k64g64/f16.{recipe}", x=x)
    assert found["q"][0, :3].tolist() == [*ends, 0]
    assert found["scales"].tolist() == [[scale], [zero_scale]]


@pytest.mark.parametrize(("recipe", "code"), [("svdquant", 2), ("nunchaku", 3)])
def test_int4_quantize_with_the_stored_or_the_unrounded_scale(recipe: str, code: int) -> None:
    """amax 7.00390625: a seventh is 1.00056, stored as 1 + 2^-10. 2.501953125 is 2.49951 times that, 2.50056 times the other."""
    x = np.zeros((1, 64), dtype=np.uint16)
    x[0, :2] = 0x4701, 0x4101
    found = run(f"int4_quantize/sym/n1k64g64/f16.{recipe}", x=x)
    assert (found["q"][0, :2].tolist(), found["scales"].tolist()) == ([7, code], [[0x3C01]])


def test_int4_quantize_zero_points() -> None:
    """Group from -2 to 5.5: scale 0.5. quantize_weights: zero point |-2 / 0.5| = 4, codes x / 0.5 + 4. compressed_tensors:
    -8 + 4 = -4. Group from 1 to 8.5: |1 / 0.5| = 2, which shifts codes past 15; compressed_tensors puts 0 into the range:
    scale 8.5 / 15 = 0.567 (0x3F11), zero point -8, 1 / 0.567 = 1.77 - 8 -> -6."""
    x = np.zeros((2, 32), dtype=np.uint16)
    x[0, :3] = 0xC000, 0x40B0, 0x3F80
    x[1, :] = 0x3F80
    x[1, 1] = 0x4108
    weights = run("int4_quantize/asym/n2k32g32/bf16", x=x)
    assert weights["q"][:, :3].tolist() == [[0, 15, 6], [4, 15, 4]]
    assert (weights["scales"].tolist(), weights["zeros"].tolist()) == ([[0x3F00], [0x3F00]], [[4], [2]])
    other = run("int4_quantize/asym/n2k32g32/bf16.compressed_tensors", x=x)
    assert other["q"][:, :3].tolist() == [[0x8, 0x7, 0xE], [0xA, 0x7, 0xA]]
    assert (other["scales"].tolist(), other["zeros"].tolist()) == ([[0x3F00], [0x3F11]], [[0xC], [0x8]])


def test_int4_quantize_weights_rounds_before_the_zero_point() -> None:
    """From -1.5 to 6: scale 0.5, zero point 3. 0.25 is half a step: 0 + 3, not the tie 3.5 that goes to 4."""
    found = run("int4_quantize/asym/n1k32g32/bf16", x=[[0xBFC0, 0x40C0, 0x3E80]])
    assert (found["q"][0, :3].tolist(), found["zeros"].tolist()) == ([0, 15, 3], [[3]])


# Blocks of 16: E2M1 ties under amax 6, with -0 and -1/8; zeros; one element of 2^-12, whose scale 2^-12 / 6 is below e4m3.
TIES = [0x40C0, 0x3E80, 0x3F40, 0x3FA0, 0x3FE0, 0x4020, 0x4060, 0x40A0, 0x8000, 0xBE00]
EVEN, AWAY, TOWARD = [7, 0, 2, 2, 4, 4, 6, 6], [7, 1, 2, 3, 4, 5, 6, 7], [7, 0, 1, 2, 3, 4, 5, 6]
FOUR = [6, 0, 1, 2, 2, 3, 4, 5]  # over 1.5: 4, 1/6, 0.5, 5/6, 7/6, 5/3, 7/3, 10/3; squared error 0.77 against 1.77 over 1


@pytest.mark.parametrize(("recipe", "codes", "scales", "zero", "tiny"), [
    ("static/vllm", [*EVEN, 8, 8], [0x38, 0x00, 0x00], 0, 0),
    ("static/vllm_reference", [*EVEN, 8, 8], [0x38, 0x00, 0x00], 0, 0),
    ("static/vllm_emulation", [*EVEN, 8, 8], [0x38, 0x00, 0x00], 0, 0),
    ("static/compressed_tensors", [*EVEN, 8, 8], [0x38, 0x20, 0x20], 0, 0),  # 0.125 for a scale of zero
    ("static/modelopt", [*EVEN, 0, 8], [0x38, 0x38, 0x01], 0, 0),  # 1 for an amax of zero, 2^-9 at least
    ("static/torchao", [*EVEN, 8, 8], [0x38, 0x08, 0x08], 0, 0),  # 2^-6 at least
    ("static/transformer_engine", [*EVEN, 8, 8], [0x38, 0x00, 0x00], 0, 7),  # 2^-12 times the largest binary32 value
    ("static/four_over_six", [*FOUR, 0, 8], [0x3C, 0x00, 0x00], 0, 0),
    ("none/svdquant", [*AWAY, 0, 8], [0x38, 0x00, 0x00], 0, 7),  # 0 / 0 gives 0, 2^-12 / 0 gives 6
    ("none/svdquant_triton", [*AWAY, 0, 8], [0x38, 0x00, 0x00], 0, 7),
    ("none/nunchaku", [*EVEN, 8, 8], [0x38, 0x00, 0x00], 7, 7),  # 0 * inf gives +6; 2^-12 over its own unrounded scale is 6
])
def test_nvfp4_recipes(recipe: str, codes: list[int], scales: list[int], zero: int, tiny: int) -> None:
    variant, _, name = recipe.partition("/")
    x = np.zeros((1, 48), dtype=np.uint16)
    x[0, :10], x[0, 32] = TIES, 0x3980
    option = "" if name == "vllm" else f".{name}"
    found = run(f"nvfp4_quantize/{variant}/m1k48/bf16{option}", x=x, global_scale=f32(1))
    assert found["q"][0, :10].tolist() == codes
    assert found["scales"].tolist() == [scales]
    assert (found["q"][0, 16:32].tolist(), int(found["q"][0, 32])) == ([zero] * 16, tiny)


@pytest.mark.parametrize(("recipe", "code"), [("svdquant", 3), ("nunchaku", 2)])
def test_nvfp4_with_the_stored_or_the_unrounded_scale(recipe: str, code: int) -> None:
    """amax 6.25: scale 1.0417, stored as 1. 1.28125 is above the tie 1.25 of the one and below that of the other."""
    found = run(f"nvfp4_quantize/none/m1k16/bf16.{recipe}", x=[[0x40C8, 0x3FA4]])
    assert (found["q"][0, :2].tolist(), found["scales"].tolist()) == ([7, code], [[0x38]])


def test_four_over_six_takes_six_where_both_are_exact() -> None:
    """One 6 among zeros: 6 times 1 or 4 times 1.5, no error either way."""
    found = run("nvfp4_quantize/static/m1k16/bf16.four_over_six", x=[[0x40C0]], global_scale=f32(1))
    assert (int(found["q"][0, 0]), found["scales"].tolist()) == (7, [[0x38]])


def test_deepgemm_fp4() -> None:
    """Blocks of 128 with binary32 scales: ties toward zero, no -0; an amax of at least 1e-4."""
    x = np.zeros((1, 256), dtype=np.uint16)
    x[0, :10] = TIES
    found = run("nvfp4_quantize/none/m1k256/bf16.deepgemm", x=x)
    assert found["q"][0, :10].tolist() == [*TOWARD, 0, 0]
    assert found["scales"].tolist() == [[*f32(1), int((np.float32(1e-4) / np.float32(6)).view(np.uint32))]]


@pytest.mark.parametrize(("recipe", "found", "of_zeros"), [
    ("vllm_reference", 448.0, float("inf")), ("compressed_tensors", 448.0, 1.0), ("transformer_engine", 448.0, 1.0),
    ("four_over_six", 256.0, 1.0), ("modelopt", 1 / 448, 0.0), ("torchao", 1 / 448, 0.0),
])
def test_nvfp4_global_scale(recipe: str, found: float, of_zeros: float) -> None:
    """amax 6: 448 * 6 / 6, 256 * 6 / 6, or 6 / (448 * 6)."""
    for x, value in ((0x40C0, found), (0, of_zeros)):
        result = run(f"nvfp4_quantize/dynamic/m2k16/bf16.{recipe}", x=[[x]])
        assert result["global_scale"].tolist() == f32(value)


def test_nvfp4_swizzled_scales() -> None:
    """Scale (32, 4) of [33, 5] in [128, 8]: byte 512 + 4; padding is zero."""
    x = np.zeros((33, 80), dtype=np.uint16)
    x[32, 64] = 0x40C0
    scales = run("nvfp4_quantize/none/m33k80/bf16.svdquant.swizzled", x=x)["scales"].reshape(-1)
    assert {int(i): int(scales[i]) for i in np.flatnonzero(scales)} == {516: 0x38}


@pytest.mark.parametrize(("recipe", "codes"), [("svdquant", [*AWAY, 0, 8]), ("nunchaku", [*EVEN, 8, 8])])
def test_svdquant_quantize_nvfp4(recipe: str, codes: list[int]) -> None:
    """x / 2 is the block of ties; the projection sees x itself: 12 * 1. Rows 1..255 are zero."""
    doubled = [code + 0x80 if code & 0x7FFF else code for code in TIES]
    found = run(f"svdquant_quantize/nvfp4/m1k16r16/bf16.{recipe}", x=[doubled], smooth=0x4000,
                lora_down=[[0x3F80, 0x4000]])
    assert found["q"].shape == (256, 16)
    assert found["q"][0, :10].tolist() == codes
    assert not found["q"][1:].any()
    assert found["scales"].tolist() == [[0x38] + [0] * 255]
    assert found["lora_act"][0, :3].tolist() == f32(12, 24, 0)
    assert not found["lora_act"][1:].any()


def test_svdquant_quantize_int4() -> None:
    """x / 2 has amax 7: scale 1, ties to even; k 64 and on are a second group, of amax 3.5."""
    x = np.zeros((1, 128), dtype=np.uint16)
    x[0, :3], x[0, 64] = [0x4B00, 0xC200, 0x4500], 0xC700  # 14, -3, 5; -7
    found = run("svdquant_quantize/int4/m1k128r16/f16", x=x, smooth=0x4000, lora_down=0x3C00)
    assert found["q"][0, [0, 1, 2, 64]].tolist() == [7, 0xE, 2, 0x9]
    assert found["scales"][:, :2].tolist() == [[0x3C00, 0], [0x3800, 0]]
    assert found["lora_act"][0].tolist() == f32(9) * 16


# Promises ------------------------------------------------------------------------------------------------------------


def problems(name: str) -> Iterator[Problem]:
    """One problem for every variant and choice of options that the contract admits."""
    op = ops()[name]
    sizes = {"m": 128, "n": 16, "k": 256, "g": 64, "e": 1, "r": 16, "p": 0, "s": 2}
    for variant, *tokens in itertools.product(op.variants, *(option.tokens for option in op.options)):
        chosen = dict(zip((option.name for option in op.options), tokens, strict=True))
        dims = {letter: sizes[letter] for letter in op.dims}
        if chosen.get("lora") == "nolora":
            dims["r"] = 0
        try:
            yield make_problem(op, variant, dims, chosen)
        except DomainError:
            continue


@pytest.mark.parametrize("name", list(ops()))
def test_supports_and_declares_every_problem(name: str) -> None:
    found = list(problems(name))
    assert {problem.variant for problem in found} == set(ops()[name].variants)
    for problem in found:
        assert CPU.supports(problem) is None
        assert check_declaration(ops()[name], problem, CPU.declare(problem, "default")) == ("", "as the contract")


def test_unknown_op_gets_a_sentence() -> None:
    reason = CPU.supports(Problem("gemm_fp6", "plain", (("m", 1),), ()))
    assert reason is not None
    assert reason.startswith("the cpu backend has no kernel for 'gemm_fp6'; it computes int4_pack, ")


def test_takes_no_argument() -> None:
    assert backend() == Cpu("cpu", "cpu")
    with pytest.raises(ValueError, match="takes no argument, got 'fast'"):
        backend("fast")


def test_describes_itself() -> None:
    described = CPU.describe()
    assert described["numpy"] == np.__version__
    assert all(described.values())
    assert set(described) == {"numpy", "blas", "python", "platform", "processor"}


@pytest.mark.parametrize("text", [
    "gemm_w8a8_fp8/scaled/m9n64k512/f32/lognormal/s1", "gemm_w8a8_fp8/block/m9n64k512/f32/lognormal/s1",
    "gemm_w4a8_fp8/folded/m9n64k512g128/bf16/lognormal/s1", "gemm_w4a8_fp8/exact/m9n64k512g64/f16/lognormal/s1",
    "gemm_w4a8_int8/direct/m9n64k512g64/f16/lognormal/s1", "gemm_nvfp4/plain/m9n64k1024r0/f16/lognormal/s1",
    "gemm_int4/half/m9n64k512r0/bf16/lognormal/s1", "gemm_int4/f32/m9n64k512r0/f16/lognormal/s1",
])
def test_rows_do_not_depend_on_each_other_where_promised(text: str) -> None:
    case = parse_case(text, ops())
    op = ops()[case.problem.op]
    assert CPU.declare(case.problem, "default").batch_invariant
    tensors = {name: tensor.codes for name, tensor in draw_operands(op, case).items()}
    whole = call(case.problem, tensors)["d"]
    alone = make_problem(op, case.problem.variant, dict(case.problem.dims) | {"m": 1}, dict(case.problem.options))
    for row in range(9):
        own = {spec.name for spec in op.tensors if spec.shape[0] == "m"}
        cut = {name: codes[row : row + 1] if name in own else codes for name, codes in tensors.items()}
        assert call(alone, cut)["d"].tolist() == whole[row : row + 1].tolist()


@pytest.mark.parametrize("text", ["gemm_nvfp4/plain/m1n8k2048r0/bf16", "gemm_w4a16/sym/m1n8k32g32/bf16",
                                  "gemm_int4/f32/m1n8k64r16/f16.lora"])
def test_does_not_promise_rows_where_sums_may_round(text: str) -> None:
    assert not CPU.declare(parse_problem(text, ops()), "default").batch_invariant


@pytest.mark.parametrize("name", list(ops()))
def test_edges_of_the_contract_are_admitted(name: str) -> None:
    op = ops()[name]
    for text in op.edges:
        case = parse_case(text, ops())
        operands = draw_operands(op, case)
        found = call(case.problem, {tensor: operands[tensor].codes for tensor, _ in operands.items()})
        expected = op.expect(case, operands, CPU.declare(case.problem, "default"))
        assert set(found) == set(expected)
        for output, expectation in expected.items():
            assert expectation.admits(found[output]).all(), f"{text}: {output}"


@pytest.mark.parametrize("name", NAMES)
def test_refuses_exactly_what_lies_outside_the_contract(name: str) -> None:
    """The backend's own reading of the domains against the contract's constraints, on sizes at and beside every multiple."""
    op = ops()[name]
    rng = np.random.default_rng(17)
    sizes = {"g": (0, 16, 32, 48, 64, 100, 128), "r": (0, 8, 16, 32), "e": (0, 1, 2), "s": (0, 1, 3), "p": (0, 4, 20)}
    usual = (0, 7, 8, 12, 16, 32, 64, 96, 128, 192, 256)
    refused = admitted = 0
    for _ in range(400):
        dims = tuple((letter, int(rng.choice(sizes.get(letter, usual)))) for letter in op.dims)
        options = tuple((option.name, str(rng.choice(option.tokens))) for option in op.options)
        problem = Problem(op.name, str(rng.choice(op.variants)), dims, options)
        if dict(dims).get("k") == 0 and "g" in op.dims:
            continue  # K % G has no meaning for the contract's expressions where G is 0 too
        try:
            outside = outside_domain(op, problem) is not None
        except ZeroDivisionError:
            outside = True
        assert (CPU.supports(problem) is not None) == outside, str(problem)
        refused, admitted = refused + outside, admitted + (not outside)
    assert refused > 10
    assert admitted > 10
