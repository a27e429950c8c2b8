"""The Triton GEMMs in Triton's CPU interpreter against integers and fractions: codecs on every code, packings by hand, whole
products.

Decides: that what the kernels decode is what the codes stand for, that rows far apart are found (offsets of 64 bits), that all
machines share one kernel but for what multiplies, and that every declared program is the contract's. Refuses: to judge sums of
floats; the suite does (check_gemm_cases.py).
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import ast
import inspect
import itertools
import mmap
from fractions import Fraction

import numpy as np
import pytest
import torch

from lowbit.conformance.backend import Problem
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import outside_domain
from lowbit.conformance.ops import ops
from lowbit.kernels.triton_room import gemm_16bit, gemm_int4, gemm_nvfp4, gemm_w4a8_int8, gemm_w4a16, gemm_w8a8_fp8
from lowbit.kernels.triton_room.machine import INTERPRETER, MACHINES, Machine

E2M1 = [Fraction(x, 2) for x in (0, 1, 2, 3, 4, 6, 8, 12)]
E2M1 += [-x for x in E2M1]
INT4 = [x - 16 if x > 7 else x for x in range(16)]


def ue4m3(code: int) -> Fraction | None:
    """Value of a scale code, None for NaN: exponent bias 7, three fraction bits."""
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return None
    return Fraction(fraction, 8) / 64 if exponent == 0 else Fraction(8 + fraction, 8) * Fraction(2) ** (exponent - 7)


def rounded(x: Fraction, bits: int, lowest: int, largest: Fraction) -> float:
    """x to `bits` significant bits, its unit no less than 2^lowest, nearest even; beyond `largest` infinity."""
    if x == 0:
        return 0.0
    size, exponent = abs(x), lowest
    while size >= Fraction(2) ** (exponent + bits):
        exponent += 1
    whole, rest = divmod(size / Fraction(2) ** exponent, 1)
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    found = whole * Fraction(2) ** exponent
    return float("inf") * (1 if x > 0 else -1) if found > largest else float(found if x > 0 else -found)


def narrow(x: Fraction, dtype: torch.dtype) -> float:
    """x in bf16 (8 significant bits, unit from 2^-133 on) or binary16 (11, 2^-24)."""
    if dtype is torch.bfloat16:
        return rounded(x, 8, -133, Fraction(255) * Fraction(2) ** 120)
    return rounded(x, 11, -24, Fraction(65504))


# Decoding ------------------------------------------------------------------------------------------------------------


def test_every_nvfp4_code_under_every_scale_becomes_the_bf16_of_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[:, :].contiguous()  # every pair of codes; 32 blocks of 16 k
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32).contiguous()
    words = torch.zeros((256, 512), dtype=torch.int16)
    gemm_nvfp4.decode(codes, scales, words)
    found = words.view(torch.bfloat16).float()
    for row in range(256):
        scale = ue4m3(row & 127)
        if scale is None:
            assert bool(found[row].isnan().all())
            continue
        want = [float(E2M1[code] * scale) for pair in range(256) for code in (pair & 15, pair >> 4)]
        assert found[row].tolist() == want, row


@pytest.mark.parametrize("e4m3", [False, True])
def test_every_int4_code_is_unpacked(e4m3: bool) -> None:
    codes, values = torch.arange(256, dtype=torch.uint8)[None, :].contiguous(), torch.zeros((1, 512), dtype=torch.int8)
    gemm_int4.unpack(codes, values, e4m3=e4m3)
    want = [INT4[code] for pair in range(256) for code in (pair & 15, pair >> 4)]
    assert (values.view(torch.float8_e4m3fn).float() if e4m3 else values)[0].tolist() == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["sym", "zp", "zpafter"])
def test_every_w4a16_weight_is_rounded_as_its_clause_says(variant: str, dtype: torch.dtype) -> None:
    scale_values = [Fraction(s) for s in (1, -3, Fraction(255, 256), Fraction(131, 128), Fraction(1, 1 << 14), 57344)]
    scale_values.append(Fraction(1, 1 << 24) if dtype is torch.float16 else Fraction(1, 1 << 133))  # the least subnormal number
    rows = list(itertools.product(range(16) if variant != "sym" else [8], scale_values))
    q = torch.arange(16, dtype=torch.uint8).repeat(len(rows), 1)
    q = torch.nn.functional.pad(q, (0, 0, 0, -len(rows) % 8), value=1)
    scale = torch.tensor([[float(s)] for _, s in rows] + [[1.0]] * (-len(rows) % 8), dtype=torch.float64).to(dtype)
    zero = torch.tensor([[z] for z, _ in rows] + [[0]] * (-len(rows) % 8), dtype=torch.uint8)
    words = gemm_w4a16.pack_scales(scale.view(torch.int16), None if variant == "sym" else zero)
    found = torch.zeros(q.shape, dtype=torch.int16)
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter computes with NumPy
        gemm_w4a16.decode(gemm_w4a16.pack(q), words, found, variant=variant, bf16=dtype is torch.bfloat16, machine=INTERPRETER)
    for row, (z, s) in enumerate(rows):
        value = Fraction(float(scale[row, 0]))
        if variant == "zpafter":
            parts = [[narrow(x * value, dtype) for x in (code, z)] for code in range(16)]
            want = [float("nan") if abs(a) == abs(b) == float("inf") else a - b if float("inf") in (abs(a), abs(b))
                    else narrow(Fraction(a) - Fraction(b), dtype) for a, b in parts]
        else:
            want = [narrow((code - z) * value, dtype) for code in range(16)]
        got = found[row].view(dtype).double()
        assert np.array_equal(got.numpy(), np.array(want), equal_nan=True), (variant, z, s)


# Packing -------------------------------------------------------------------------------------------------------------


def test_w4a16_words_hold_four_quarters_of_a_block() -> None:
    row = torch.arange(256, dtype=torch.int64).mul(7).remainder(16).to(torch.uint8)[:200]
    q = torch.stack([row, 15 - row, row // 2])
    words = gemm_w4a16.pack(q).to(torch.int32) & 0xFFFF
    assert words.shape == (2, 3, 32)
    assert words.is_contiguous()
    for n, k in itertools.product(range(3), range(256)):
        nibble = int(words[k // 128, n, k % 32]) >> 4 * (k % 128 // 32) & 15
        assert nibble == (int(q[n, k]) if k < 200 else 0), (n, k)


def test_scale_words_hold_the_zero_point_above_the_code() -> None:
    scale = torch.tensor([[1.0, -2.0]], dtype=torch.float16).view(torch.int16)  # codes 0x3C00 and 0xC000
    assert gemm_w4a16.pack_scales(scale).tolist() == [[0x83C00], [0x8C000]]
    assert gemm_w4a16.pack_scales(scale, torch.tensor([[15, 0]], dtype=torch.uint8)).tolist() == [[0xF3C00], [0xC000]]


def test_w4a8_bytes_hold_two_halves_of_a_block() -> None:
    q = torch.arange(96, dtype=torch.int64).mul(5).remainder(16).to(torch.uint8)[None, :]
    codes = gemm_w4a8_int8.pack(q)[0]
    assert codes.shape == (64,)
    for k in range(128):
        nibble = int(codes[k // 64 * 32 + k % 32]) >> 4 * (k % 64 // 32) & 15
        assert nibble == (int(q[0, k]) if k < 96 else 8), k


# Whole products ------------------------------------------------------------------------------------------------------


def test_a_w4a8_product_of_the_largest_operands_is_exact() -> None:
    k = 4096
    a, q = torch.full((2, k), -128, dtype=torch.int8), torch.zeros((8, k), dtype=torch.uint8)
    scale = torch.full((1, 8), 2.0**-12, dtype=torch.float16)
    d = gemm_w4a8_int8.gemm_w4a8_int8(a, gemm_w4a8_int8.pack(q), scale, torch.ones(2, dtype=torch.float16))
    assert d.tolist() == [[float(-128 * -8 * k // 4096)] * 8] * 2


def test_int4_sums_of_the_largest_operands_are_exact_on_every_tactic() -> None:
    k = 192
    a, w = torch.full((3, k // 2), 0x88, dtype=torch.uint8), torch.full((8, k // 2), 0x88, dtype=torch.uint8)
    ones = {"a_scale": (3, 3), "w_scale": (3, 8), "channel_scale": (8,)}
    tensors = {"a": a, "w": w} | {name: torch.ones(s, dtype=torch.float16).view(torch.int16) for name, s in ones.items()}
    memory = torch.zeros((11, k), dtype=torch.int8)
    for values, e4m3 in ((None, False), (memory, False), (memory, True)):
        d = torch.zeros((3, 8), dtype=torch.int16)
        gemm_int4.launch(tensors, d, values, half=False, bf16=False, e4m3=e4m3, machine=INTERPRETER)
        assert d.view(torch.float16).tolist() == [[64.0 * k] * 8] * 3


def test_operands_of_two_formats_are_refused() -> None:
    a, w, one = torch.zeros((2, 16)), torch.zeros((8, 16)), torch.ones(1)
    fn, fnuz = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    for left, right in ((fnuz, fn), (fn, fnuz), (torch.float8_e5m2, torch.float8_e5m2)):
        with pytest.raises(ValueError, match=f"got a of {left} and w of {right}"):
            gemm_w8a8_fp8.gemm_w8a8_fp8(a.to(left), w.to(right), one, one)
    for element in (fn, fnuz):
        assert gemm_w8a8_fp8.gemm_w8a8_fp8(a.to(element), w.to(element), one, one).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_of_another_format_or_length_is_refused(out: torch.dtype) -> None:
    a, w, one = torch.zeros((2, 16)).to(torch.float8_e4m3fn), torch.zeros((8, 16)).to(torch.float8_e4m3fn), torch.ones(1)
    for dtype, length in ((torch.float32, 8), (torch.float16, 8), (torch.bfloat16, 8), (out, 1), (out, 16)):
        bias = torch.ones(length, dtype=dtype)
        if (dtype, length) == (out, 8):
            assert gemm_w8a8_fp8.gemm_w8a8_fp8(a, w, one, one, bias, out).tolist() == [[1.0] * 8] * 2
        else:
            with pytest.raises(ValueError, match=rf"got a bias \({length},\) of {dtype}; expected \(8,\) of out, {out}"):
                gemm_w8a8_fp8.gemm_w8a8_fp8(a, w, one, one, bias, out)


def test_a_split_into_parts_that_are_not_whole_blocks_is_refused() -> None:
    problem = Problem("gemm_w4a16", "sym", (("m", 1), ("n", 64), ("k", 640), ("g", 128)), (("out", "bf16"), ("bias", "nobias")))
    for use in (gemm_w4a16.declaration, gemm_w4a16.workspace):
        with pytest.raises(ValueError, match="tactic split4 takes K a multiple of 512, got K = 640"):
            use(problem, "split4", INTERPRETER)
    assert gemm_w4a16.workspace(problem, "whole", INTERPRETER) == 0


@pytest.mark.parametrize(("m", "n", "k", "want"), [
    (0, 12288, 12288, ("whole", "decoded")),
    (1, 73728, 12288, ("split4", "whole", "decoded")), (32, 12288, 36864, ("split8", "whole", "decoded")),  # 3072 and 4608 of K
    (33, 12288, 12288, ("split2", "whole", "decoded")), (64, 12288, 36864, ("split8", "whole", "decoded")),  # 6144 and 4608
    (64, 16896, 6144, ("whole", "decoded")), (64, 16768, 6144, ("split2", "whole", "decoded")),  # 132 and 131 tiles
    (64, 12288, 640, ("whole", "decoded")), (1, 128, 768, ("split2", "whole", "decoded")),  # 5 and 6 blocks
    (65, 12288, 12288, ("split4", "whole", "decoded")),  # 96 tiles: 96, 192 and 384 programs fill 73, 73 and 97 % of 132s
    (256, 14336, 12288, ("whole", "decoded")), (512, 12288, 12288, ("split2", "whole", "decoded")),  # 112 fill 85 %; 384 of 396
    (513, 12288, 12288, ("whole", "decoded")), (4096, 12288, 12288, ("whole", "decoded")),
])
def test_w4a16_splits_k_up_to_512_rows(m: int, n: int, k: int, want: tuple[str, ...]) -> None:
    assert gemm_w4a16.tactics_of(m, n, k, MACHINES[9, 0]) == want


def far_apart(stride: int, rows: int, width: int) -> torch.Tensor:
    """uint8 [rows, width] whose rows lie `stride` bytes apart, as much memory before it as behind; pages that nobody touches cost
    nothing. A wrapped offset lands inside, on zeros."""
    size = stride * rows
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat[size:].as_strided((rows, width), (stride, 1))


@pytest.mark.parametrize(("fault", "wrong"), [("", False), ("int32_offsets", True)])
def test_offsets_beyond_2_to_the_31_are_found(fault: str, wrong: bool) -> None:
    a = far_apart((1 << 30) + 128, 3, 64)  # row 2 begins beyond 2^31 bytes
    a[:] = 0x38  # e4m3fn 1
    w, one = torch.full((8, 64), 0x38, dtype=torch.uint8), torch.ones(1)
    d = torch.zeros((3, 8), dtype=torch.int32)
    gemm_w8a8_fp8.launch(a, w, one, one, None, d, out="f32", fnuz=False, blocked=False, promoted=False, bias_after=False,
                         machine=INTERPRETER, fault=fault)
    assert (d.view(torch.float32).tolist() != [[64.0] * 8] * 3) is wrong


@pytest.mark.parametrize(("fault", "wrong"), [("", False), ("int32_offsets", True)])
def test_w4a16_offsets_beyond_2_to_the_31_are_found(fault: str, wrong: bool) -> None:
    a = far_apart((1 << 31) + 256, 3, 256).view(torch.int16)  # row 2 begins beyond 2^31 elements
    a[:] = 0x3C00  # binary16 1
    q = torch.full((8, 128), 9, dtype=torch.uint8)
    tensors = {"a": a, "w": gemm_w4a16.pack(q), "scales": gemm_w4a16.pack_scales(torch.full((8, 1), 0x3C00, dtype=torch.int16))}
    d = torch.zeros((3, 8), dtype=torch.int16)
    gemm_w4a16.launch(tensors, d, None, variant="sym", bias="nobias", bf16=False, machine=INTERPRETER, fault=fault)
    assert (d.view(torch.float16).tolist() != [[128.0] * 8] * 3) is wrong


# Machines ------------------------------------------------------------------------------------------------------------

MODULES = {"gemm_nvfp4": gemm_nvfp4, "gemm_int4": gemm_int4, "gemm_w4a16": gemm_w4a16, "gemm_w8a8_fp8": gemm_w8a8_fp8,
           "gemm_w4a8_int8": gemm_w4a8_int8}
SIZES = {"m": 5, "n": 264, "k": 1024, "g": 64, "r": 16}


def problems(name: str) -> list[Problem]:
    """Every variant and choice of options of an op, at one size."""
    op, found = ops()[name], []
    for variant in op.variants:
        for values in itertools.product(*(option.tokens for option in op.options)):
            options = tuple((option.name, value) for option, value in zip(op.options, values, strict=True))
            dims = tuple((letter, 0 if letter == "r" and ("lora", "nolora") in options else SIZES[letter]) for letter in op.dims)
            problem = Problem(name, variant, dims, options)
            if outside_domain(op, problem) is None:
                found.append(problem)
    return found


@pytest.mark.parametrize("machine", [INTERPRETER, *MACHINES.values()], ids=lambda machine: machine.name)
@pytest.mark.parametrize("name", list(MODULES))
def test_every_declared_program_is_the_contracts(name: str, machine: Machine) -> None:
    module, count = MODULES[name], 0
    for problem in problems(name):
        assert module.unsupported(problem, machine) is None, problem
        for tactic in module.tactics(problem, machine):
            wrong, kind = check_declaration(ops()[name], problem, module.declaration(problem, tactic, machine))
            assert not wrong, (problem, tactic, wrong)
            assert kind == "as the contract" or name == "gemm_w8a8_fp8", (problem, tactic, kind)
            count += 1
    assert count


def test_fnuz_and_fn_share_every_line_but_the_product() -> None:
    """The kernel body never asks which e4m3 it has; it hands the question to `product`, which alone branches on it."""
    tree = ast.parse(inspect.getsource(gemm_w8a8_fp8))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    body = functions["w8a8_gemm"]
    asked = [node for node in ast.walk(body) if isinstance(node, (ast.If, ast.IfExp)) and "FNUZ" in ast.unparse(node.test)]
    calls = [node for node in ast.walk(body) if isinstance(node, ast.Call) and ast.unparse(node.func) == "product"]
    uses = [node for node in ast.walk(body) if isinstance(node, ast.Name) and node.id == "FNUZ"]
    assert not asked
    assert len(uses) == len(calls) == 2, "FNUZ goes to `product` and nowhere else"


@pytest.mark.parametrize(("fnuz", "unit"), [(False, "fp8"), (True, "f16")])
def test_hopper_multiplies_e4m3fn_as_it_is_and_e4m3fnuz_as_binary16(fnuz: bool, unit: str) -> None:
    assert gemm_w8a8_fp8.unit_of(fnuz, MACHINES[9, 0]) == unit
    assert gemm_w8a8_fp8.unit_of(fnuz, MACHINES[8, 0]) == "f16"
    assert gemm_w8a8_fp8.unit_of(fnuz, INTERPRETER) == "binary32"


def test_no_kernel_of_these_asks_for_a_block_scaled_product() -> None:
    for module in (*MODULES.values(), gemm_16bit):
        assert "dot_scaled" not in inspect.getsource(module)
