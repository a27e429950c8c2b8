"""The ascend backend under emulation: literals worked out by hand, the contract's cases, and what builds and chooses.

Nothing here takes an expected value from the kernels or from the references but the last section, where drawn operands are judged
as `lowbit certify` judges them. The kernels are compiled once per machine and change: by g++, into the user's cache.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance.backend import Claim, Problem, TensorView
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.op import Role, outside_domain, parse_case, parse_problem, tensors_of
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.patterns import draw_operands
from lowbit.kernels import ascend
from lowbit.kernels.ascend import Ascend, backend
from lowbit.kernels.ascend_room import build, launch, pack
from lowbit.kernels.ascend_room.build import BuildError, emulated_library, mutants, source_digest
from lowbit.kernels.ascend_room.cann import CannError
from lowbit.kernels.ascend_room.entries import ENTRIES
from lowbit.kernels.ascend_room.launch import Choice, EmulationError
from lowbit.kernels.ascend_room.rules import ASSUMPTIONS, EMULATION_VERSION, RULES
from lowbit.references.formats import container

Array = npt.NDArray[Any]
EMULATED = backend("emulate")
OPS = ("gemm_int4", "int4_quantize", "svdquant_quantize", "int4_pack")


def call(problem: Problem, tensors: dict[str, Array], subject: Ascend = EMULATED) -> dict[str, Array]:
    """Run the backend on read-only inputs and poisoned outputs whose rows do not touch; codes of the outputs and of
    what is changed in place."""
    views: dict[Role, dict[str, TensorView]] = {role: {} for role in Role}
    for spec in tensors_of(ops()[problem.op], problem):
        if spec.role is Role.OUTPUT:
            wide = (*spec.shape[:-1], spec.shape[-1] + 3)
            memory = np.full(wide, 0x5A, dtype=container(spec.format))[..., : spec.shape[-1]]
        else:
            memory = np.array(tensors[spec.name], dtype=container(spec.format)).reshape(spec.shape)
            memory.setflags(write=spec.role is Role.INOUT)
        strides = tuple(step // memory.itemsize for step in memory.strides)
        views[spec.role][spec.name] = TensorView(spec.name, spec.format, spec.shape, strides, spec.role, spec.layout, 0, memory)
    assert subject.supports(problem) is None
    state = subject.prepare(problem, "default", views[Role.CONSTANT])
    inputs = subject.stage(problem, "default", views[Role.ACTIVATION] | views[Role.INOUT])
    assert subject.run(problem, "default", state, inputs, views[Role.OUTPUT], None, 0)
    return {name: np.array(view.memory) for name, view in (views[Role.OUTPUT] | views[Role.INOUT]).items()}


def run(text: str, **tensors: Any) -> dict[str, Array]:
    """`call` on the problem behind a text; scalars fill their tensor, rows are laid into zero tensors from the front."""
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


def f16(*x: float) -> Array:
    """Codes of values that binary16 has."""
    codes = np.array(x, np.float64).astype(np.float16)
    assert codes.astype(np.float64).tolist() == list(x)
    return codes.view(np.uint16)


def bf16(*rows: Sequence[float]) -> Array:
    """Codes of values that bfloat16 has; shorter rows end in zeros."""
    wide = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for row, values in zip(wide, rows, strict=True):
        row[: len(values)] = values
        assert row[: len(values)].astype(np.float64).tolist() == list(map(float, values))
    bits = wide.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def half_code(value: Fraction) -> int:
    """The binary16 code nearest to a value in the normal range, ties to even, from integers."""
    if value == 0:
        return 0
    size, exponent = abs(value), 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    fraction = round(size * 1024)  # round() of a Fraction takes ties to even
    return ((value < 0) << 15) + ((exponent + 15) << 10) + fraction - 1024


# Arrangement ---------------------------------------------------------------------------------------------------------


def test_even_codes_lie_in_the_low_half() -> None:
    assert pack.nibbles(np.array([[1, 2, 0xF, 8]], np.uint8)).tolist() == [[0x21, 0x8F]]
    assert pack.codes_of_nibbles(np.array([[0x21, 0x8F]], np.uint8)).tolist() == [[1, 2, 0xF, 8]]


def test_the_low_rank_activation_is_rounded_once_to_nearest_even() -> None:
    """1 + 2^-11 is half way between 1 and 1 + 2^-10; 65520 is half way to what would be 65536."""
    given = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, 65520.0, -np.inf], np.float32)
    assert pack.halves(given.view(np.uint32)).tolist() == [0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0xFC00]


# int4_pack -----------------------------------------------------------------------------------------------------------


def test_nibble_packing_keeps_four_bits_of_each_code() -> None:
    # -8..7 as int8: 0xF8 is -8, 0xFF is -1; no sign bit reaches the neighbour
    found = run("int4_pack/nibble/n2k6/int8", q=[[0xF8, 0xFF, 7, 0, 0xFE, 1], [1, 2, 3, 4, 5, 6]])
    assert found["packed"].tolist() == [[0xF8, 0x07, 0x1E], [0x21, 0x43, 0x65]]


def test_words_along_k_hold_the_first_code_lowest() -> None:
    found = run("int4_pack/k_major/n1k8/uint4", q=[[1, 2, 3, 4, 5, 6, 7, 8]])
    assert found["packed"].tolist() == [[0x87654321]]


def test_compressed_tensors_adds_eight_and_fills_words_with_zeros() -> None:
    # -8 -> 0, -1 -> 7, 0 -> 8, 7 -> 15; places 3 to 7 of the only word hold 0
    found = run("int4_pack/compressed_tensors/n2k3/int8", q=[[0xF8, 0xFF, 0], [7, 0, 0]])
    assert found["packed"].tolist() == [[0x00000870], [0x0000088F]]


def test_b8_inverts_bit_three_of_every_nibble_in_place() -> None:
    # 5 x 16,384 codes are 20,480 16-bit words: three work items, the last one short
    words = np.arange(5 * 2048, dtype=np.uint32).reshape(5, 2048) * 0x01234567 + 0x89ABCDEF
    found = run("int4_pack/b8/n5k16384/uint4", words=words)["words"]
    assert found.tolist() == [[int(word) ^ 0x88888888 for word in row] for row in words]


def test_packing_of_more_codes_than_one_work_item_holds() -> None:
    # 3 x 12,000 codes are three items of 16,384, the last one short; code (n, k) is (n + k) mod 16
    q = (np.arange(3)[:, None] + np.arange(12000)) % 16
    packed = run("int4_pack/nibble/n3k12000/uint4", q=q)["packed"]
    even, odd = packed & 15, packed >> 4
    for n in range(3):
        assert even[n].tolist() == [(n + k) % 16 for k in range(0, 12000, 2)]
        assert odd[n].tolist() == [(n + k) % 16 for k in range(1, 12000, 2)]


# int4_quantize -------------------------------------------------------------------------------------------------------


def quantised(*rows: Any) -> tuple[Array, Array]:
    x = np.stack([np.pad(row, (0, 64 - len(row))) for row in rows])
    found = run(f"int4_quantize/sym/n{len(rows)}k64g64/f16.svdquant", x=x)
    return found["q"], found["scales"]


def test_codes_are_rounded_to_even_by_a_scale_of_a_seventh() -> None:
    """amax 7 gives scale 1: halves are ties."""
    q, scales = quantised(f16(7, 3.5, -3.5, 2.5, 1.5, 0.5, -0.5, -7, 6.5))
    assert scales.tolist() == [[0x3C00]]
    assert q[0, :10].tolist() == [7, 4, 0xC, 2, 2, 0, 0, 9, 6, 0]


def test_codes_are_divided_by_the_scale_as_stored() -> None:
    """amax 1: fl(1 / 7) = 1.142857 2^-3, in binary16 1170 / 1024 2^-3 = 0x3092, less than a seventh. The largest code is still
    7: 1 / 0.142822 = 7.0017. 1755 / 8192 is 1.5 stored scales, a tie that goes to 2; of a seventh it is 1.49963. 1170 / 16384 is
    half a stored scale and goes to 0. 366 / 1024 and 512 / 1024 are 2.50256 and 3.50085."""
    q, scales = quantised(f16(1, 1755 / 8192, 1170 / 16384, 366 / 1024, 512 / 1024))
    assert scales.tolist() == [[0x3092]]
    assert q[0, :5].tolist() == [7, 2, 0, 3, 4]


def test_scales_are_rounded_to_nearest() -> None:
    """5 / 7 = 1.428571 2^-1 and 0.428571 x 1024 = 438.86; 3 / 7 = 1.714286 2^-2 and 0.714286 x 1024 = 731.43."""
    _, scales = quantised(f16(5), f16(0, -3))
    assert scales.tolist() == [[0x3800 + 439], [0x3400 + 731]]


def test_groups_of_zeros_and_of_almost_nothing_have_scale_zero() -> None:
    """A group of zeros: scale 0, and our codes are 0 (the contract leaves them open). 3 2^-24 / 7 is below half the least
    binary16 value: scale 0, and v / 0 saturates with its sign."""
    q, scales = quantised(np.zeros(64, np.uint16), np.array([3, 0x8003, 1], np.uint16))
    assert scales.tolist() == [[0], [0]]
    assert q[0].tolist() == [0] * 64
    assert q[1, :3].tolist() == [7, 8, 7]


def test_nan_reaches_the_scale_and_infinity_the_bound() -> None:
    """A NaN of either sign anywhere in the group. Infinity: scale 65504; 65504 / 65504 = 1, 32752 / 65504 is the tie 0.5."""
    for nan in (0x7E00, 0xFE01, 0x7C01):
        for place in (0, 17, 63):
            row = np.full(64, 0x4000, np.uint16)
            row[place] = nan
            q, scales = quantised(row, f16(7))
            assert scales[0, 0] & 0x7FFF > 0x7C00
            assert (q[1, 0], scales[1, 0]) == (7, 0x3C00)  # the other row is its own
    q, scales = quantised(np.array([0x7C00, 0xFC00, 0x7BFF, 0x77FF, 0xFBFF], np.uint16))
    assert scales.tolist() == [[0x7BFF]]
    assert q[0, :5].tolist() == [7, 8, 1, 0, 0xF]


def test_every_group_of_a_wide_row_has_its_own_scale() -> None:
    """K = 832 is 13 groups: one work item of 8 and one of 5. Group g holds 7 2^(g - 6) at place g and nothing else."""
    x = np.zeros((17, 832), np.float64)
    for row in range(17):
        for group in range(13):
            x[row, 64 * group + group] = 7 * 2.0 ** (group - 6) * (-1) ** row
    found = run("int4_quantize/sym/n17k832g64/f16.svdquant", x=f16(*x.ravel()).reshape(17, 832))
    assert found["scales"].tolist() == [[(group - 6 + 15) << 10 for group in range(13)]] * 17
    expected = np.zeros((17, 832), np.uint8)
    for row in range(17):
        expected[row, [64 * group + group for group in range(13)]] = 9 if row % 2 else 7
    assert found["q"].tolist() == expected.tolist()


def test_bfloat16_reaches_scales_that_binary16_does_not_have() -> None:
    """7 and 2.5 as in binary16. 2^-30 / 7 is zero in binary16: x / 0 saturates, also for the least bfloat16 value, 2^-133. 2^100
    is above 7 x 65504: the scale is bounded. -2^100 / 65504 saturates, 65536 / 65504 is 1."""
    x = bf16([7, 2.5, -0.5, 1.5], [2.0**-30, -(2.0**-30), 2.0**-133], [2.0**100, -(2.0**100), 65536, 0])
    found = run("int4_quantize/sym/n3k64g64/bf16.svdquant", x=x)
    assert found["scales"].tolist() == [[0x3C00], [0], [0x7BFF]]
    assert [found["q"][row, :3].tolist() for row in range(3)] == [[7, 2, 0], [7, 8, 7], [7, 8, 1]]
    assert found["q"][0, 3] == 2


def test_a_scale_is_a_quotient_and_not_a_product_with_a_seventh() -> None:
    """91, 175 and 203 2^-25 are 7 times 13, 25 and 29 2^-25, which lie half way between multiples of 2^-24, the steps of binary16
    there: 6.5, 12.5 and 14.5 go to 6, 12 and 14. In binary32 a seventh is rounded up: its products would go to the odd ones."""
    found = run("int4_quantize/sym/n3k64g64/bf16.svdquant", x=bf16(*[[n * 2.0**-25] for n in (91, -175, 203)]))
    assert found["scales"].tolist() == [[6], [12], [14]]


def test_projection_of_bfloat16() -> None:
    """3 x 129 - 1 x 129: each product has more bits than a factor."""
    found = run("svdquant_quantize/int4/m1k64r16/bf16", x=bf16([3, -1]), smooth=bf16([1.0] * 64)[0],
                lora_down=bf16([1.0078125 * 128] + [0] * 15, [129] + [0] * 15))
    assert found["lora_act"].view(np.float32)[0, :2].tolist() == [3 * 129 - 129, 0.0]
    assert found["scales"][0, 0] == half_code(Fraction(3, 7))


# svdquant_quantize ---------------------------------------------------------------------------------------------------


def test_what_is_quantised_is_smoothed_and_what_is_projected_is_not() -> None:
    """Row 0: x / smooth = 14 / 2, 5 / 2, 10 / 4, -3 / 1: scale 1, codes 7, 2, 2, -3. lora_act = sum of x[k] (k + 1) in column 0,
    twice that in column 1: 14 + 10 + 30 - 12 = 42. Rows 3 to 255 are padding."""
    down = np.zeros((64, 16), np.uint16)
    down[:4, 0], down[:4, 1] = f16(1, 2, 3, 4), f16(2, 4, 6, 8)
    found = run(
        "svdquant_quantize/int4/m3k64r16/f16", x=[f16(14, 5, 10, -3), f16(0, 0, 0, 0), f16(0, 0, 0, 1)],
        smooth=np.concatenate([f16(2, 2, 4), f16(*[1.0] * 61)]), lora_down=down,
    )
    assert found["q"].shape == (256, 64)
    assert found["q"][0, :5].tolist() == [7, 2, 2, 0xD, 0]
    assert found["q"][2, :5].tolist() == [0, 0, 0, 7, 0]
    assert not found["q"][3:].any()
    assert found["scales"][0, :3].tolist() == [0x3C00, 0, 0x3092]
    assert not found["scales"][0, 3:].any()
    lora = found["lora_act"].view(np.float32)
    assert lora[:3, :3].tolist() == [[42.0, 84.0, 0.0], [0.0, 0.0, 0.0], [4.0, 8.0, 0.0]]
    assert not lora[3:].any()


def test_projection_over_several_tiles_of_every_dimension() -> None:
    """Whole numbers whose sums binary32 holds, over 70 rows (two tiles, the second ragged), K = 320 (a chunk of 256 and one of
    64) and R = 272 (a tile of 256 columns and one of 16)."""
    rng = np.random.default_rng(3)
    x, down = rng.integers(-16, 17, (70, 320)), rng.integers(-16, 17, (320, 272))
    found = run(
        "svdquant_quantize/int4/m70k320r272/f16", x=f16(*x.ravel()).reshape(x.shape), smooth=f16(1.0)[0],
        lora_down=f16(*down.ravel()).reshape(down.shape),
    )
    lora = found["lora_act"].view(np.float32)
    assert lora[:70].astype(np.int64).tolist() == (x @ down).tolist()
    assert not lora[70:].any()


# gemm_int4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k", "r"), [(2, 8, 128, 16), (1, 24, 64, 0), (19, 136, 192, 48)])
def test_product_of_whole_numbers_is_exact(m: int, n: int, k: int, r: int) -> None:
    """Scales are powers of two, everything else whole numbers: no sum rounds, and the only rounding is the last cast."""
    rng = np.random.default_rng(m * n)
    a, w = rng.integers(-8, 8, (m, k)), rng.integers(-8, 8, (n, k))
    a_log, w_log = rng.integers(-3, 1, (m, k // 64)), rng.integers(-3, 1, (n, k // 64))
    act, up = rng.integers(-4, 5, (m, r)), rng.integers(-4, 5, (n, r))
    channel, bias = rng.choice((0.5, 1.0, -2.0, 3.0), n), rng.integers(-9, 10, n)
    tensors = {
        "a": (a & 15).astype(np.uint8), "w": (w & 15).astype(np.uint8), "channel_scale": f16(*channel), "bias": f16(*bias),
        "a_scale": f16(*(2.0**a_log).ravel()).reshape(a_log.shape), "w_scale": f16(*(2.0**w_log).ravel()).reshape(w_log.shape),
    }
    if r:
        tensors |= {"lora_act": act.astype(np.float32).view(np.uint32), "lora_up": f16(*up.ravel()).reshape(up.shape)}
    problem = parse_problem(f"gemm_int4/f32/m{m}n{n}k{k}r{r}/f16.{'lora.' if r else ''}bias", ops())
    d = call(problem, tensors)["d"]
    for i in range(m):
        for j in range(n):
            total = Fraction(int(act[i] @ up[j]))
            for g in range(k // 64):
                part = slice(64 * g, 64 * g + 64)
                total += Fraction(int(a[i, part] @ w[j, part])) * Fraction(2.0 ** int(a_log[i, g] + w_log[j, g]))
            value = total * Fraction(float(channel[j])) + int(bias[j])
            assert d[i, j] & (0x7FFF if value == 0 else 0xFFFF) == half_code(value), (i, j)


def test_no_rows_start_nothing_and_write_nothing() -> None:
    assert run("gemm_int4/f32/m0n64k64r0/f16", a=0, a_scale=0, w=0, w_scale=0, channel_scale=0)["d"].shape == (0, 64)
    assert run("int4_quantize/sym/n0k64g64/f16.svdquant", x=0)["scales"].shape == (0, 1)


# Declarations and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "gemm_int4/f32/m4n8k128r16/f16.lora.bias", "gemm_int4/f32/m4n8k128r0/f16", "svdquant_quantize/int4/m4k64r16/f16",
])
def test_declarations_are_admitted_by_the_contract(text: str) -> None:
    problem = parse_problem(text, ops())
    check_declaration(ops()[problem.op], problem, EMULATED.declare(problem, "default"))


def test_bits_are_claimed_exactly_where_no_sum_is_of_unknown_order() -> None:
    claims = {
        text: EMULATED.declare(parse_problem(text, ops()), "default").claim
        for text in ("gemm_int4/f32/m4n8k128r0/f16", "gemm_int4/f32/m4n8k128r16/f16.lora", "svdquant_quantize/int4/m4k64r16/f16",
                     "int4_quantize/sym/n4k64g64/f16.svdquant", "int4_pack/nibble/n4k64/uint4")
    }
    assert list(claims.values()) == [Claim.BIT_EXACT, Claim.BOUNDED, Claim.BOUNDED, Claim.BIT_EXACT, Claim.BIT_EXACT]


@pytest.mark.parametrize(("text", "sentence"), [
    ("gemm_nvfp4/plain/m4n8k32r0/f16", "the ascend backend has no kernel for 'gemm_nvfp4'; it computes gemm_int4, int4_quantize, "
     "svdquant_quantize, int4_pack"),
    ("gemm_int4/half/m4n8k64r0/f16", "ascend, gemm_int4: the variant must be f32"),
    ("gemm_int4/f32/m4n8k64r0/bf16", "ascend, gemm_int4: out must be f16"),
    ("int4_quantize/sym/n4k64g64/f16.nunchaku", "ascend, int4_quantize: recipe must be svdquant"),
    ("int4_quantize/sym/n4k64g64/f32.svdquant", "ascend, int4_quantize: x must be f16 or bf16"),
    ("svdquant_quantize/nvfp4/m4k64r16/f16", "ascend, svdquant_quantize: the variant must be int4"),
    ("int4_pack/awq/n8k8/uint4", "ascend, int4_pack: the variant must be nibble or k_major or compressed_tensors or b8"),
])
def test_a_refusal_is_one_sentence(text: str, sentence: str) -> None:
    assert EMULATED.supports(parse_problem(text, ops())) == sentence


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_contract_is_accepted(name: str) -> None:
    op = ops()[name]
    rng = np.random.default_rng(29)
    sizes = {"g": (0, 16, 32, 64, 128), "r": (0, 8, 16, 32), "e": (0, 1, 2), "s": (0, 1, 3), "p": (0, 4, 20)}
    for _ in range(200):
        dims = tuple((letter, int(rng.choice(sizes.get(letter, (0, 7, 8, 12, 64, 96, 128))))) for letter in op.dims)
        options = tuple((option.name, str(rng.choice(option.tokens))) for option in op.options)
        problem = Problem(op.name, str(rng.choice(op.variants)), dims, options)
        if EMULATED.supports(problem) is None:
            assert outside_domain(op, problem) is None, str(problem)


# What runs, and what it says of itself -------------------------------------------------------------------------------


def test_an_emulated_backend_says_so_and_what_it_leaves_open() -> None:
    assert (EMULATED.name, EMULATED.target, EMULATED.execution) == ("ascend", "ascend", "emulated")
    about = EMULATED.describe()
    assert about["vendor compiler"] == "never compiled by the vendor's compiler"
    assert about["datapath"].startswith("assumed: ")
    assert about["emulation"].startswith(f"version {EMULATION_VERSION}, 2 blocks, g++")
    assert all(rule.id in about["rules"] for rule in RULES)
    assert about["remains to be shown on silicon"].split("; ") == list(ascend.REMAINS)
    assert all(rule.sentence in about["taken for true"] for rule in ASSUMPTIONS)
    assert about["kernels"].endswith(source_digest(build.DEVICE))
    assert not {"device", "compiler"} & set(about)


def test_the_module_prints_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    ascend.main()
    printed = capsys.readouterr().out
    assert printed.startswith("ascend: emulated\n")
    assert "\nremains to be shown on silicon:\n  - that bisheng compiles" in printed
    assert all(f"\n  - {rule.id}: {rule.sentence}\n" in printed for rule in RULES)


def test_building_ahead_compiles_every_kernel_and_nothing_twice(slow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ascend.main(["--build"])
    assert (slow / "log").read_text().count("\n") == len(ENTRIES)
    ascend.main(["--build"])
    assert (slow / "log").read_text().count("\n") == len(ENTRIES)
    assert capsys.readouterr().out == ""


def test_a_toolkit_without_a_device_is_named_and_not_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    about = EMULATED.describe()
    assert about["CANN toolkit"] == f"{tmp_path}, not used: its CPU debug build was never tried with these kernels"
    assert about["vendor compiler"] == "never compiled by the vendor's compiler"


def test_a_device_that_does_not_start_is_an_error_when_asked_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise CannError("aclInit returned aclError 507899, expected 0; driver error")

    monkeypatch.setattr(launch, "devices", broken)
    launch.engine.cache_clear()
    with pytest.raises(CannError, match="507899"):
        _ = backend().execution
    assert backend("emulate").execution == "emulated"  # asked for by name, it does not look for a device
    launch.engine.cache_clear()


def test_without_a_device_and_without_gcc_the_sentence_names_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launch.engine.cache_clear()
    with pytest.raises(BuildError, match=r"no NPU here, and the emulation cannot be compiled: got no g\+\+ on PATH"):
        _ = EMULATED.execution
    launch.engine.cache_clear()


@pytest.mark.parametrize("argument", ["fast", "mutant", "mutant=no_such", "sanitize=memory", "emulate=1"])
def test_an_unknown_argument_names_the_known_ones(argument: str) -> None:
    with pytest.raises(ValueError, match=f"backend 'ascend' got argument '{argument}', expected emulate, .*stale_mask.*address"):
        backend(argument)


def test_arguments_choose_the_build() -> None:
    assert backend().choice == Choice()
    assert backend("mutant=stale_mask").choice == Choice(True, "stale_mask")
    assert backend("mutant=drain_count,sanitize=undefined").choice == Choice(True, "drain_count", "undefined")
    assert backend("mutant=drain_count").describe()["build"] == "mutant drain_count, sanitizer none"
    assert len(mutants()) >= 7


def test_a_kernel_that_breaks_a_rule_raises_the_rule() -> None:
    """The seed's own faults are gemm_int4's tests; here one shows that a rule reaches the caller as an exception."""
    with pytest.raises(EmulationError, match=r"^[A-Z0-9-]+: got "):
        call(parse_problem("gemm_int4/f32/m16n16k64r0/f16", ops()), {
            "a": np.zeros((16, 64)), "w": np.zeros((16, 64)), "a_scale": np.zeros((16, 1)), "w_scale": np.zeros((16, 1)),
            "channel_scale": np.zeros(16),
        }, backend("mutant=stale_mask"))


# Building ------------------------------------------------------------------------------------------------------------

SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo 'slow 1'; exit 0; }
echo "$*" >> "$(dirname "$0")/log"
while [ "$1" != -o ]; do shift; done
printf 'first half, ' > "$2"; sleep 0.3; printf 'second half' >> "$2"
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes its result in two pieces, on a PATH and with a cache of its own."""
    made = tmp_path / "bin" / "g++"
    made.parent.mkdir()
    made.write_text(SLOW_COMPILER, encoding="utf-8")
    made.chmod(0o755)
    monkeypatch.setenv("PATH", f"{made.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made.parent


def test_processes_that_build_at_once_never_see_half_a_library(slow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: emulated_library(ENTRIES["pack_int4"]).read_text(), range(4)))
    assert found == ["first half, second half"] * 4
    kept = emulated_library(ENTRIES["pack_int4"])
    assert [path.name for path in kept.parent.iterdir()] == ["pack_int4.so"]  # no folder of a build is left
    said = capsys.readouterr().err
    assert said.startswith(f"lowbit: compiling pack_int4 with g++, once; kept in {kept.parent}\n")
    before = (slow / "log").read_text().count("\n")
    emulated_library(ENTRIES["pack_int4"])
    assert (slow / "log").read_text().count("\n") == before  # found, not compiled


def test_a_library_is_of_one_kind_of_machine(slow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that x86-64 and aarch64 hosts share, with compilers of one version."""
    first = emulated_library(ENTRIES["pack_int4"])
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert emulated_library(ENTRIES["pack_int4"]).parent != first.parent


def test_a_cache_that_cannot_be_written_to_is_named(slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"got .*file.* expected one to write to; set XDG_CACHE_HOME"):
        emulated_library(ENTRIES["pack_int4"])


def test_the_command_forbids_contraction_and_plants_what_is_asked_for(slow: Path) -> None:
    emulated_library(ENTRIES["gemm_int4"], "stale_mask", "undefined")
    emulated_library(ENTRIES["pack_int4"], "stale_mask")
    faulty, sound = (slow / "log").read_text().splitlines()
    assert "-ffp-contract=off" in faulty
    assert "-DLOWBIT_MUTANT_STALE_MASK -fsanitize=undefined" in faulty
    assert "LOWBIT_MUTANT" not in sound  # there is nothing to plant


def test_a_changed_source_is_another_library(slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = emulated_library(ENTRIES["pack_int4"])
    changed = tmp_path / "device"
    changed.mkdir()
    for path in build.DEVICE.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "DEVICE", changed)
    with (changed / "tiling.h").open("a") as file:
        file.write("// another line\n")
    assert emulated_library(ENTRIES["pack_int4"]).parent != first.parent
    assert emulated_library(replace(ENTRIES["pack_int4"], source="gemm_int4.cpp")).parent != first.parent


def test_importing_the_backend_loads_neither_cann_nor_torch() -> None:
    code = "import sys, lowbit.kernels.ascend as a; a.backend(); print([m for m in sys.modules if m.startswith('torch')])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# Drawn operands, judged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    *(text for name in OPS for text in ops()[name].edges if EMULATED.supports(parse_case(text, ops()).problem) is None),
    "gemm_int4/f32/m5n40k704r0/f16.bias/lognormal/s2", "gemm_int4/f32/m33n136k128r256/f16.lora.bias/extremes/s2",
    "gemm_int4/f32/m130n24k64r48/f16.lora/zeros/s2", "gemm_int4/f32/m7n16k15360r0/f16/normal/s2",
    "gemm_int4/f32/m2n8k15360r128/f16.lora.bias/exactw24/s2", "int4_quantize/sym/n40k576g64/f16.svdquant/extremes/s2",
    "svdquant_quantize/int4/m257k640r32/f16/lognormal/s2",
])
def test_drawn_operands_give_what_the_contract_admits(text: str) -> None:
    case = parse_case(text, ops())
    op = ops()[case.problem.op]
    operands = draw_operands(op, case)
    found = call(case.problem, {tensor: operands[tensor].codes for tensor, _ in operands.items()})
    expected = op.expect(case, operands, EMULATED.declare(case.problem, "default"))
    assert set(found) == set(expected)
    for output, expectation in expected.items():
        assert expectation.admits(found[output]).all(), output
