"""The contracts of the encoding and quantiser ops.

Every expected value here is a literal worked out by hand from the clause that the test names, or an explicit loop over the
clause's formula. Each test plants the defects that its op is known for and sees them refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance.admissible import transposed
from lowbit.conformance.case import Case, Operands, Stream, Tensor
from lowbit.conformance.op import DomainError, Expectation, Flag, Op, Role, parse_case, parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.quantiser_draws import SPECIAL_BLOCKS, every_code, special_blocks, ties_of
from lowbit.conformance.storage import codes_of, words_of
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import EXACT_BITS, Declaration
from lowbit.references.formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    F16,
    INT4,
    INT8,
    UE4M3,
    Codes,
    Format,
    container,
    decode,
)
from lowbit.references.recipes import RECIPES

NAMES = (
    "int4_pack", "int4_repack", "int4_encode", "scale_pack_e4m3", "scale_fold", "scale_swizzle", "fp8_convert_fnuz",
    "fp8_requantize", "fp8_quantize", "int8_quantize", "int4_quantize", "nvfp4_quantize", "svdquant_quantize",
)
OPS: dict[str, Op] = {name: ops()[name] for name in NAMES}
EDGES = [text for op in OPS.values() for text in op.edges]
REJECTS = [(text, clause) for op in OPS.values() for text, clause in op.rejects]


def declaration_of(case: Case) -> Declaration:
    op = OPS[case.problem.op]
    return Declaration(op.program(case.problem, DATAPATHS["ieee_f32"])) if op.program else EXACT_BITS


def operands_from(case: Case, arrays: Mapping[str, Any]) -> Operands:
    """Operands with these codes, in the shapes and formats that the op gives its tensors."""
    specs = {t.name: t for t in tensors_of(OPS[case.problem.op], case.problem) if t.role is not Role.OUTPUT}
    assert set(arrays) == set(specs)
    return Operands({
        name: Tensor(np.array(arrays[name]).astype(container(spec.format)).reshape(spec.shape), spec.format)
        for name, spec in specs.items()
    })


def expected(problem: str, **arrays: Any) -> Mapping[str, Expectation]:
    case = parse_case(f"{problem}/normal/s0", OPS)
    return OPS[case.problem.op].expect(case, operands_from(case, arrays), declaration_of(case))


def judged_beside(problem: str, outputs: Mapping[str, Codes], **arrays: Any) -> Mapping[str, Expectation]:
    case = parse_case(f"{problem}/normal/s0", OPS)
    expect_given = OPS[case.problem.op].expect_given
    assert expect_given is not None
    return expect_given(case, operands_from(case, arrays), declaration_of(case), outputs)


def admits(expectation: Expectation, codes: Any) -> bool:
    array = np.array(codes).astype(container(expectation.format)).reshape(expectation.lo.shape)
    return bool(expectation.admits(array).all())


def bf16(values: Any) -> npt.NDArray[np.uint16]:
    """Codes of values that bf16 holds exactly."""
    bits = np.array(values, dtype=np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def f32(values: Any) -> npt.NDArray[np.uint32]:
    return np.array(values, dtype=np.float32).view(np.uint32)


def f16(values: Any) -> npt.NDArray[np.uint16]:
    codes = np.array(values, dtype=np.float16)
    assert np.array_equal(codes.astype(np.float64), np.array(values, dtype=np.float64), equal_nan=True)
    return codes.view(np.uint16)


def row(values: Sequence[float], size: int) -> list[float]:
    """The values, then zeros."""
    return [*values, *[0.0] * (size - len(values))]


# The records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS.values(), ids=NAMES)
def test_the_record_is_well_formed(op: Op) -> None:
    tokens = [token for option in op.options for token in option.tokens]
    assert len(tokens) == len(set(tokens))
    assert all(re.fullmatch(r"[a-z0-9_]+", word) for word in (*tokens, *op.variants, op.name))
    named = {*op.clauses, *(c.clause for c in op.constraints), *(clause for _, clause in op.rejects)}
    assert all(re.fullmatch(r"(ENC|QNT)-\d+", clause) for clause in named)
    assert {c.clause for c in op.constraints} | {clause for _, clause in op.rejects} <= set(op.clauses)
    assert set(op.ranges) == set(op.dims)
    assert len(set(op.edges)) == len(op.edges)


@pytest.mark.parametrize("text", EDGES)
def test_an_edge_draws_what_its_op_declares(text: str) -> None:
    case = parse_case(text, OPS)
    assert str(case) == text
    op, tensors = OPS[case.problem.op], tensors_of(OPS[case.problem.op], case.problem)
    operands = draw_operands(op, case)
    for tensor in tensors:
        if tensor.role is not Role.OUTPUT:
            assert operands[tensor.name].codes.shape == tensor.shape
            assert operands[tensor.name].format is tensor.format
    assert draw_operands(op, case).sha256() == operands.sha256()
    found = op.expect(case, operands, declaration_of(case))
    written = {t.name: t for t in tensors if t.role in (Role.OUTPUT, Role.INOUT)}
    assert set(found) == set(written)
    for name, expectation in found.items():
        assert expectation.format is written[name].format
        assert expectation.lo.shape == expectation.hi.shape == expectation.flags.shape == written[name].shape
        # Where nothing was written one of the two poisons shows, except in what may be anything.
        judged = (expectation.flags & Flag.FREE) == 0
        accepted = []
        for poison in (0xFFFFFFFFFFFFFFFF, 0x5A5A5A5A5A5A5A5A):
            codes = np.full(written[name].shape, poison & ((1 << expectation.format.bits) - 1), dtype=np.uint64)
            accepted.append(bool(expectation.admits(codes.astype(container(expectation.format)))[judged].all()))
        assert not all(accepted) or not judged.any()


@pytest.mark.parametrize(("text", "clause"), REJECTS)
def test_a_reject_is_outside_the_domain(text: str, clause: str) -> None:
    with pytest.raises(DomainError, match=rf"clause {clause}\)"):
        parse_problem(text, OPS)
    parse_problem(text, OPS, check=False)


# int4_pack ------------------------------------------------------------------------------------------------------------

SIGNED = [-8, 7, -1, 0, 1, -2, 3, -4]  # nibbles 8 7 F 0 1 E 3 C


@pytest.mark.parametrize(("problem", "codes", "words"), [
    ("int4_pack/gptq/n1k8/uint4", [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
    ("int4_pack/k_major/n1k8/int8", SIGNED, [0xC3E10F78]),
    ("int4_pack/along_n/n8k1/uint4", [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321]),
    ("int4_pack/awq/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], [0x75316420]),
    ("int4_pack/nibble/n1k4/uint4", [0x3, 0xA, 0x5, 0xC], [0xA3, 0xC5]),
    ("int4_pack/compressed_tensors/n1k3/int8", [-8, 7, -1], [0x000007F0]),
    ("int4_pack/zeros_v1/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], [0x6543210F]),
    ("int4_pack/zeros_v2/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], [0x76543210]),
])
def test_packed_words(problem: str, codes: list[int], words: list[int]) -> None:
    found = expected(problem, q=codes)["packed"]
    assert admits(found, words)
    assert not admits(found, [word ^ 0x10 for word in words])


@pytest.mark.parametrize(("problem", "codes", "defect"), [
    ("int4_pack/k_major/n1k8/int8", SIGNED, 0xFFFFFFF8),  # sign bits of -8 or -1 OR-ed into the nibbles above
    ("int4_pack/k_major/n1k8/int8", SIGNED, 0x873C0FE1),  # first element in the highest nibble
    ("int4_pack/gptq/n1k8/uint4", [1, 2, 3, 4, 5, 6, 7, 8], 0x78563412),  # nibbles of each byte swapped
    ("int4_pack/awq/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], 0x76543210),  # no interleave
    ("int4_pack/awq/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], 0x73625140),  # the inverse interleave
    ("int4_pack/compressed_tensors/n1k3/int8", [-8, 7, -1], 0x888887F0),  # padding that decodes to 0
    ("int4_pack/compressed_tensors/n1k3/int8", [-8, 7, -1], 0x00000F78),  # no offset
    ("int4_pack/zeros_v1/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], 0x76543210),  # zero points of format 2
    ("int4_pack/zeros_v2/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], 0x6543210F),  # zero points of format 1
    ("int4_pack/zeros_v1/n8k1/uint4", [0, 1, 2, 3, 4, 5, 6, 7], 0x65432100),  # 0 - 1 bounded instead of wrapped
])
def test_packing_defects_are_refused(problem: str, codes: list[int], defect: int) -> None:
    assert not admits(expected(problem, q=codes)["packed"], [defect])


def test_int4_pack_rows_and_columns() -> None:
    """ENC-2, ENC-3: which word an element goes to, not only which nibble."""
    codes = np.arange(8)[:, None] + 8 * (np.arange(16)[None, :] % 2)  # [n, k]
    along_k = [[sum(int(codes[n, 8 * j + i]) << 4 * i for i in range(8)) for n in range(8)] for j in range(2)]
    along_n = [[sum(int(codes[i, k]) << 4 * i for i in range(8))] for k in range(16)]
    assert admits(expected("int4_pack/gptq/n8k16/uint4", q=codes)["packed"], along_k)
    assert not admits(expected("int4_pack/gptq/n8k16/uint4", q=codes)["packed"], np.array(along_k).T)
    assert admits(expected("int4_pack/k_major/n8k16/uint4", q=codes)["packed"], np.array(along_k).T)
    assert admits(expected("int4_pack/along_n/n8k16/uint4", q=codes)["packed"], along_n)


def test_b8_in_place() -> None:
    """ENC-9: 0x87654321 with bit 3 of each nibble inverted is 0x0FEDCBA9."""
    found = expected("int4_pack/b8/n1k8/uint4", words=[0x87654321])["words"]
    assert admits(found, [0x0FEDCBA9])
    assert not admits(found, [0x87654321])  # not done, or done twice
    borrow = expected("int4_pack/b8/n1k8/uint4", words=[0x00000008])["words"]
    assert admits(borrow, [0x88888880])
    assert not admits(borrow, [(0x00000008 - 0x88888888) & 0xFFFFFFFF])  # subtraction whose borrow crosses nibbles


def test_every_byte_in_every_place() -> None:
    """The exhaustive pattern of int4_pack/gptq holds each of the 256 bytes in each of the four places of a word, and each
    nibble in each of the eight places of an AWQ word."""
    for text, places, values in (("int4_pack/gptq/n64k128/uint4/all/s0", 4, 256), ("int4_pack/awq/n128k64/uint4/all/s0", 8, 16)):
        case = parse_case(text, OPS)
        found = OPS["int4_pack"].expect(case, draw_operands(OPS["int4_pack"], case), EXACT_BITS)["packed"]
        words = found.lo & 0xFFFFFFFF
        for place in range(places):
            assert len(np.unique(words >> (32 // places * place) & (values - 1))) == values


def test_every_code_of_a_byte() -> None:
    codes = every_code((257 * 4,), 8)
    for place in range(4):
        assert len(np.unique(codes[place::4])) == 256


# int4_repack ----------------------------------------------------------------------------------------------------------


def test_repacked_weights() -> None:
    """ENC-10 by loops: k = 8j + i in bits 4i before, n = 8j + i in bits 4i after."""
    n, k = 16, 24
    code = [[(3 * a + 5 * b + a * b) % 16 for b in range(k)] for a in range(n)]
    before = [[sum(code[a][8 * j + i] << 4 * i for i in range(8)) for j in range(k // 8)] for a in range(n)]
    after = [[sum(code[8 * j + i][b] << 4 * i for i in range(8)) for j in range(n // 8)] for b in range(k)]
    found = expected(f"int4_repack/weight/n{n}k{k}/plain", packed=before)["repacked"]
    assert admits(found, after)
    interleaved = [[sum(code[8 * j + (0, 2, 4, 6, 1, 3, 5, 7)[i]][b] << 4 * i for i in range(8)) for j in range(n // 8)]
                   for b in range(k)]
    for defect in (interleaved, np.array(before).T.repeat(8, axis=0)[:, : n // 8], np.array(after)[::-1]):
        assert not admits(found, defect)


def test_repacked_zero_points() -> None:
    """ENC-11: words keep their nibbles, the matrix of words is transposed."""
    words = np.array([[0x76543210, 0xFEDCBA98, 0x11111111], [0x01234567, 0x89ABCDEF, 0x22222222]])  # [N/8, G]
    found = expected("int4_repack/zeros/n16k3/plain", packed=words)["repacked"]
    assert admits(found, words.T)
    assert not admits(found, words.reshape(3, 2))


# int4_encode ----------------------------------------------------------------------------------------------------------


def unified(v: int) -> int:
    return 8 - v if 1 <= v <= 7 else v


def test_unified_bytes() -> None:
    """ENC-12: 1 <-> 7, 2 <-> 6, 3 <-> 5; 0, 4 and 8..F stay."""
    before, after = [0x71, 0x80, 0x26, 0x35, 0x49, 0xFE, 0x00, 0x17] * 2, [0x17, 0x80, 0x62, 0x53, 0x49, 0xFE, 0x00, 0x71] * 2
    found = expected("int4_encode/unified/e1n1k32/plain", q=before)["encoded"]
    assert admits(found, after)
    assert not admits(found, before)  # not encoded, or encoded twice
    assert not admits(found, [*after[:15], before[15]])  # a tail that no vector covers


def reordered(code: npt.NDArray[np.int64]) -> list[int]:
    """Bytes of ENC-13, by the formula."""
    n_size, k_size = code.shape
    slots = [0] * (n_size * k_size)
    for n in range(n_size):
        for k in range(k_size):
            slot = 32 * n_size * (k // 32) + 512 * (n // 16) + 64 * (n % 8) + 16 * (k // 4 % 4) + 8 * (k // 16 % 2)
            slots[slot + 4 * (n // 8 % 2) + k % 4] = int(code[n, k])
    return [slots[2 * i] | slots[2 * i + 1] << 4 for i in range(len(slots) // 2)]


def test_reordered_weights() -> None:
    code = np.random.Generator(np.random.PCG64(1)).integers(0, 16, (32, 128))
    mapped = np.vectorize(unified)(code)
    words = [[sum(int(code[n, 8 * j + i]) << 4 * i for i in range(8)) for j in range(16)] for n in range(32)]
    found = expected("int4_encode/dense/e1n32k128/plain", q=words)["encoded"]

    def accepts(data: list[int]) -> bool:
        return admits(found, np.array(data, dtype=np.uint8).view(np.uint32))

    assert accepts(reordered(mapped))
    assert not accepts(reordered(code))  # not encoded, or encoded twice
    assert not accepts([b >> 4 | (b & 15) << 4 for b in reordered(mapped)])  # the other nibble order
    assert not accepts(list(np.array(words, dtype=np.uint32).view(np.uint8).reshape(-1)))  # not reordered
    assert not accepts(reordered(mapped.reshape(16, 2, 128).transpose(1, 0, 2).reshape(32, 128)))  # rows in another order


def test_grouped_weights_are_reordered_one_by_one() -> None:
    """ENC-14."""
    code = np.random.Generator(np.random.PCG64(2)).integers(0, 16, (2, 16, 256))
    mapped = np.vectorize(unified)(code)
    words = [[[sum(int(w[n, 8 * j + i]) << 4 * i for i in range(8)) for j in range(32)] for n in range(16)] for w in code]
    found = expected("int4_encode/grouped/e2n16k256/plain", q=words)["encoded"]
    assert admits(found, np.array(reordered(mapped[0]) + reordered(mapped[1]), dtype=np.uint8).view(np.uint32))
    assert not admits(found, np.array(reordered(mapped.reshape(32, 256)), dtype=np.uint8).view(np.uint32))


# scale_pack_e4m3, scale_swizzle, scale_fold ---------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "products"), [
    (0x38, "D0 CE CC CA C8 C4 C0 B8"),  # 1: -8, -7, ..., -1
    (0xB8, "50 4E 4C 4A 48 44 40 38"),  # -1
    (0x00, "80 80 80 80 80 80 80 80"),  # +0
    (0x80, "00 00 00 00 00 00 00 00"),  # -0
    (0x7F, "7F 7F 7F 7F 7F 7F 7F 7F"),  # NaN
    (0xFF, "7F 7F 7F 7F 7F 7F 7F 7F"),
    (0x68, "FE FE FC FA F8 F4 F0 E8"),  # 64: -512 is bounded to -448
    (0x3E, "D6 D4 D2 D1 CE CA C6 BE"),  # 1.75: -12.25 -> -12, -10.5 -> -10 (tie), -8.75 -> -9, -5.25 -> -5 (tie)
    (0x01, "88 87 86 85 84 83 82 81"),  # 2^-9
])
def test_products_of_a_scale(scale: int, products: str) -> None:
    row_of = [int(text, 16) for text in products.split()]
    found = expected("scale_pack_e4m3/table8/n1/plain", scales=[scale])["packed"]
    assert admits(found, row_of)
    assert not admits(found, row_of[::-1]) or len(set(row_of)) == 1


def test_scale_product_defects() -> None:
    found = expected("scale_pack_e4m3/table8/n1/plain", scales=[0x3E])["packed"]
    for defect in ("D6 D4 D3 D1 CE CA C6 BE", "D6 D4 D2 D1 CE CB C6 BE"):  # ties away at -10.5 and -5.25
        assert not admits(found, [int(text, 16) for text in defect.split()])
    overflow = expected("scale_pack_e4m3/table8/n1/plain", scales=[0x68])["packed"]
    assert not admits(overflow, [0xFF, 0xFE, 0xFC, 0xFA, 0xF8, 0xF4, 0xF0, 0xE8])  # NaN where it must be bounded


def test_swizzled_scales() -> None:
    """ENC-17, ENC-18 by the formula, for a shape that needs both paddings."""
    m, g = 130, 5
    scales = np.random.Generator(np.random.PCG64(3)).integers(1, 256, (m, g))
    right, mixed = [0] * (256 * 8), [0] * (256 * 8)
    for a in range(m):
        for b in range(g):
            tile = (a // 128 * 2 + b // 4) * 512
            right[tile + a % 32 * 16 + a // 32 % 4 * 4 + b % 4] = int(scales[a, b])
            mixed[tile + a // 4 % 32 * 16 + a % 4 * 4 + b % 4] = int(scales[a, b])  # reshape (32, 4) for (4, 32)
    found = expected(f"scale_swizzle/tile128x4/m{m}g{g}/plain", scales=scales)["swizzled"]
    assert admits(found, right)
    assert not admits(found, mixed)
    stale = np.array(right)
    stale[np.flatnonzero(stale == 0)[-1]] = 0x5A
    assert not admits(found, stale)
    linear = np.zeros((256, 8), dtype=np.int64)
    linear[:m, :g] = scales
    assert not admits(found, linear)


def test_folded_scales() -> None:
    """ENC-20. Row maximum 0.875 = 448 * 2^-9: c = 2^-9, channel scale 2^-6.
    0.875 -> 448 -> 56 (0x66); -0.5 -> -256 -> -32 (0xE0); 2^-16 -> 2^-7 -> 0; 1.5 * 2^-15 -> 1.5 * 2^-6 -> tie of 1 and 2
    units -> 2; 1.4921875 * 2^-15 -> 1.4921875 * 2^-6 -> 1.5 * 2^-6 (first rounding) -> 2 units (one rounding would give 1)."""
    scales = bf16([0.875, -0.5, 2.0**-16, 1.5 * 2.0**-15, 1.4921875 * 2.0**-15])
    found = expected("scale_fold/row/n1k640/vllm", scales=scales)
    assert admits(found["group_scale"], [0x66, 0xE0, 0x00, 0x02, 0x02])
    assert admits(found["channel_scale"], f32([2.0**-6]))
    for defect in ([0x66, 0xE0, 0x00, 0x02, 0x01], [0x66, 0xE0, 0x01, 0x02, 0x02], [0x7E, 0xF8, 0x04, 0x0C, 0x0C]):
        assert not admits(found["group_scale"], defect)  # one rounding; tie at half a unit away; not divided by 8
    assert not admits(found["channel_scale"], f32([2.0**-9]))


def test_folded_special_rows() -> None:
    """ENC-21."""
    found = expected("scale_fold/row/n2k256/vllm", scales=[0, 0, 0x7FC0, bf16(0.875)])
    assert admits(found["group_scale"], [0x00, 0x00, 0x66, 0x66])
    floor = np.float32(1) / np.float32(448 * 512)
    assert admits(found["channel_scale"], f32([floor * np.float32(8), 2.0**-6]))
    native = expected("scale_fold/row/n1k256/vllm_native", scales=[0x7FC0, bf16(0.875)])
    assert admits(native["group_scale"], [0x7F, 0xFF])
    assert not admits(native["group_scale"], [0x7F, 0x66])


# fp8_convert_fnuz, fp8_requantize -------------------------------------------------------------------------------------


def test_fnuz_bytes_and_scales() -> None:
    """ENC-22 to ENC-24."""
    w = [0x80, 0x00, 0x7F, 0xFF, 0x38, 0x01]
    found = expected("fp8_convert_fnuz/tensor/n1k6/fnuz.static", w=w, weight_scale=f32([0.75]), input_scale=f32([3.0]))
    assert admits(found["w_out"], [0x00, 0x00, 0x7F, 0xFF, 0x38, 0x01])
    assert admits(found["weight_scale_out"], f32([1.5]))
    assert admits(found["input_scale_out"], f32([6.0]))
    assert not admits(found["w_out"], w)  # 0x80 kept: NaN
    assert not admits(found["w_out"], [0x00, 0x00, 0x80, 0x80, 0x38, 0x01])
    assert not admits(found["weight_scale_out"], f32([0.75]))  # not doubled
    assert not admits(found["weight_scale_out"], f32([3.0]))  # doubled twice
    kept = expected("fp8_convert_fnuz/tensor/n1k6/fn.static", w=w, weight_scale=f32([0.75]), input_scale=f32([3.0]))
    assert admits(kept["w_out"], w)
    assert admits(kept["weight_scale_out"], f32([0.75]))
    assert not admits(kept["weight_scale_out"], f32([1.5]))  # doubled on hardware that keeps e4m3fn


def test_requantised_shards() -> None:
    """ENC-25, ENC-26. Shards of 1 and 3 rows, scales 2 and 1: the second is halved. 0x09 is 4.5 units after that: tie to 4."""
    w = [[0x38], [0x38], [0x09], [0x7F]]
    found = expected("fp8_requantize/max_scale/n4k1s2/fn", w=w, scales=f32([2.0, 1.0]), widths=[1, 3])
    assert admits(found["scale"], f32([2.0]))
    assert admits(found["w_out"], [0x38, 0x30, 0x04, 0x7E])
    assert not admits(found["w_out"], [0x38, 0x38, 0x04, 0x7E])  # equal shards for unequal widths
    assert not admits(found["w_out"], [0x38, 0x30, 0x05, 0x7E])  # ties away
    assert not admits(found["w_out"], [0x38, 0x30, 0x04, 0x7F])  # NaN kept
    assert not admits(found["scale"], f32([1.0]))
    fnuz = expected("fp8_requantize/max_scale/n4k1s2/fnuz", w=[0x38, 0x38, 0x7F, 0x7F], scales=f32([1.0, 2.0]), widths=[2, 2])
    assert admits(fnuz["w_out"], [0x30, 0x30, 0x7E, 0x7E])  # 240 is bounded to 224
    assert not admits(fnuz["w_out"], [0x30, 0x30, 0x7F, 0x7F])


def test_requantisation_intermediate() -> None:
    """ENC-26. 1 * 1.0625 (1 + 2^-20) / 2 lies above the tie of 0.5 and 0.5625; binary16 puts it on the tie."""
    scales = f32([2.0, 1.0625 * (1 + 2.0**-20)])
    arrays: dict[str, Any] = {"w": [[0x38], [0x38]], "scales": scales, "widths": [1, 1]}
    wide, narrow = (expected(f"fp8_requantize/{v}/n2k1s2/fn", **arrays)["w_out"] for v in ("max_scale", "max_scale_f16"))
    assert admits(wide, [0x38, 0x31])
    assert not admits(wide, [0x38, 0x30])
    assert admits(narrow, [0x38, 0x30])
    assert not admits(narrow, [0x38, 0x31])


def test_fused_checkpoint_keeps_its_bytes() -> None:
    """ENC-27."""
    arrays: dict[str, Any] = {"w": [[0x38], [0xFF]], "scales": [f32(0.5), 0xFF7FFFFF], "widths": [1, 1]}
    found = expected("fp8_requantize/max_scale/n2k1s2/fn.fused", **arrays)
    assert admits(found["w_out"], [0x38, 0xFF])
    assert not admits(found["w_out"], [0x38, 0x7F])
    assert admits(found["scale"], f32([0.5]))


def test_channel_scales() -> None:
    """ENC-28."""
    found = expected("fp8_requantize/channel/n3k1s2/fn", w=[0, 0, 0], scales=f32([0.5, 3.0]), widths=[1, 2])["channel_scale"]
    assert admits(found, f32([0.5, 3.0, 3.0]))
    assert not admits(found, f32([0.5, 0.5, 3.0]))


# fp8_quantize ---------------------------------------------------------------------------------------------------------


def test_fp8_token_ties() -> None:
    """QNT-4, QNT-13. Row maximum 448: scale 1. 17 -> 16, 19 -> 20, -0 -> -0, 2^-10 -> 0, -2^-10 -> -0, 3 * 2^-10 -> 2 units."""
    x = bf16([448, 17, 19, -0.0, 2.0**-10, -(2.0**-10), 3 * 2.0**-10, -448])
    found = expected("fp8_quantize/token/m1k8p0/bf16", x=x)
    right = [0x7E, 0x58, 0x5A, 0x80, 0x00, 0x80, 0x02, 0xFE]
    assert admits(found["q"], right)
    assert admits(found["scales"], f32([1.0]))
    for place, defect in ((1, 0x59), (2, 0x59), (3, 0x00), (4, 0x01), (5, 0x00), (6, 0x01)):
        assert not admits(found["q"], [*right[:place], defect, *right[place + 1:]])


def test_fp8_maximum_of_each_format() -> None:
    """QNT-10: 448 and 224, never 240."""
    fnuz = expected("fp8_quantize/token/m1k2p0/bf16.fnuz", x=bf16([224, -0.0]))
    assert admits(fnuz["scales"], f32([1.0]))
    assert admits(fnuz["q"], [0x7E, 0x00])
    assert not admits(fnuz["scales"], f32(np.float32(224) / np.float32(240)))
    assert not admits(fnuz["scales"], f32([0.5]))
    assert not admits(fnuz["q"], [0x7E, 0x80])


def test_fp8_static_multiplies_by_a_reciprocal() -> None:
    """QNT-11. x = 0.00439453125, scale fl(0.3): fl(x * fl(1 / s)) is exactly 7.5 units, tie to 8; fl(x / s) lies below it."""
    x, s = np.float32(0.00439453125), np.float32(0.3)
    assert float(x * (np.float32(1) / s)) == 7.5 * 2.0**-9 > float(x / s)
    found = expected("fp8_quantize/static/m1k1p0/bf16", x=bf16([x]), scale=f32([s]))["q"]
    assert admits(found, [0x08])
    assert not admits(found, [0x07])


def test_fp8_static_nan() -> None:
    """QNT-11: NaN, and 0 under a scale of 0."""
    for x, s in (([0x7FC0, 0x3F80], 1.0), ([0x0000, 0x3F80], 0.0)):
        kernel = expected("fp8_quantize/static/m1k2p0/bf16", x=x, scale=f32([s]))["q"]
        native = expected("fp8_quantize/static/m1k2p0/bf16.vllm_native", x=x, scale=f32([s]))["q"]
        rest = 0x38 if s else 0x7E
        assert (admits(kernel, [0x7E, rest]), admits(kernel, [0x7F, rest])) == (True, False)
        assert (admits(native, [0x7E, rest]), admits(native, [0xFF, rest])) == (False, True)


def test_fp8_zero_tensors_and_rows() -> None:
    """QNT-12, QNT-13."""
    tensor = expected("fp8_quantize/tensor/m1k2p0/bf16", x=bf16([0.0, -0.0]))
    assert admits(tensor["scales"], [0])
    assert admits(tensor["q"], [0x7E, 0x7E])
    assert not admits(tensor["q"], [0, 0])
    floor = np.float32(1) / np.float32(448 * 512)
    for problem in ("fp8_quantize/token/m1k2p0/bf16", "fp8_quantize/tensor/m1k2p0/bf16.vllm_native"):
        found = expected(problem, x=bf16([0.0, -0.0]))
        assert admits(found["scales"], f32([floor]))
        assert admits(found["q"], [0x00, 0x80])
        assert not admits(found["scales"], [0])


def test_fp8_nan_and_infinity() -> None:
    """QNT-11 to QNT-13, QNT-15, QNT-17."""
    x = np.zeros((3, 128), dtype=np.uint16)
    x[0, :3] = [0x7FC0, 0x43E0, 0xBF80]  # NaN, 448, -1
    x[1, :3] = [0x7F80, 0xFF80, 0x43E0]  # both infinities, 448
    x[2, :] = bf16(448.0)
    token = expected("fp8_quantize/token/m3k128p0/bf16", x=x)
    assert admits(token["scales"], f32([1.0, np.inf, 1.0]))
    codes = np.zeros((3, 128), dtype=np.uint8)
    codes[0, :3], codes[1, :2], codes[2, :] = [0x7E, 0x7E, 0xB8], [0x7E, 0x7E], 0x7E
    assert admits(token["q"], codes)
    kept = codes.copy()
    kept[0, 0] = 0x7F
    assert not admits(token["q"], kept)
    native = expected("fp8_quantize/token/m3k128p0/bf16.vllm_native", x=x)
    assert list(native["scales"].flags.reshape(-1) == Flag.NAN_REQUIRED) == [True, False, False]
    assert (native["q"].flags[0] == Flag.NAN_REQUIRED).all()
    assert not admits(native["q"], codes)
    group = expected("fp8_quantize/block/m3k128p0/bf16", x=x)["q"]
    low = codes.copy()
    low[0, 0], low[1, :2] = 0xFE, 0xFE
    assert admits(group, low)
    assert not admits(group, codes)


def test_fp8_upper_bound_is_of_amax() -> None:
    """QNT-13."""
    found = expected("fp8_quantize/token/m1k2p0/bf16.ub", x=bf16([1024, 1]), scale_ub=f32([448]))
    assert admits(found["scales"], f32([1.0]))
    assert admits(found["q"], [0x7E, 0x38])
    assert not admits(found["scales"], f32(np.float32(1024) / np.float32(448)))


def test_fp8_blocks() -> None:
    """QNT-14, QNT-16: 448 in one block of 128, 1 in the next; scaled_quantize stores fl(1 / fl(448 / amax))."""
    x = bf16([*row([448.0], 128), *row([1.0, 0.5], 128)])
    found = expected("fp8_quantize/block/m1k256p0/bf16", x=x)
    one = np.float32(1) / np.float32(448)
    assert admits(found["scales"], f32([1.0, one]))
    assert not admits(found["scales"], f32([1.0, 1.0]))
    inverse = expected("fp8_quantize/block/m1k256p0/bf16.scaled_quantize", x=x)
    assert admits(inverse["scales"], f32([1.0, np.float32(1) / np.float32(448)]))
    assert admits(inverse["q"], [*([0x7E] + [0] * 127), *([0x7E, 0x76] + [0] * 126)])
    amax = np.float32(1.0234375)
    twice, once = np.float32(1) / (np.float32(448) / amax), amax / np.float32(448)
    assert twice != once
    rounded = expected("fp8_quantize/block/m1k128p0/bf16.scaled_quantize", x=bf16(row([1.0234375], 128)))["scales"]
    assert (admits(rounded, f32([twice])), admits(rounded, f32([once]))) == (True, False)
    assert not admits(rounded, f32([np.float32(448) / amax]))  # encode direction
    small = expected("fp8_quantize/block/m1k128p0/bf16.deepgemm", x=bf16(row([2.0**-20], 128)))["scales"]
    assert admits(small, f32([np.float32(1e-4) / np.float32(448)]))


def test_fp8_tiles_share_rows() -> None:
    """QNT-17: the largest element of 128 x 128 gives the scale."""
    x = np.zeros((128, 128), dtype=np.uint16)
    x[100, 7], x[3, 3] = bf16(448.0), bf16(1.0)
    found = expected("fp8_quantize/tile/m128k128p0/bf16.deepgemm", x=x)
    assert admits(found["scales"], f32([1.0]))
    codes = np.zeros((128, 128), dtype=np.uint8)
    codes[100, 7], codes[3, 3] = 0x7E, 0x38
    assert admits(found["q"], codes)


def test_fp8_padding_rows() -> None:
    """QNT-18."""
    x = bf16([448.0, 1.0])
    stale = [[0x7E, 0x38], [0x5A, 0xFF], [0xFF, 0xFF]]
    free = expected("fp8_quantize/token/m1k2p3/bf16", x=x)
    assert admits(free["q"], stale)
    assert free["scales"].lo.shape == (1, 1)
    native = expected("fp8_quantize/token/m1k2p3/bf16.vllm_native", x=x)["q"]
    assert admits(native, [[0x7E, 0x38], [0, 0], [0, 0]])
    assert not admits(native, stale)


# int8_quantize --------------------------------------------------------------------------------------------------------


def test_int8_tokens() -> None:
    """QNT-21. Row maximum 127: scale 1; 0.5 -> 0, 1.5 -> 2, -2.5 -> -2, 126.5 -> 126."""
    found = expected("int8_quantize/token/m1k5/bf16", x=bf16([127, 0.5, 1.5, -2.5, 126.5]))
    assert admits(found["q"], [127, 0, 2, 0xFE, 126])
    assert admits(found["scales"], bf16([1.0]))
    assert admits(found["zeros"], [0])
    assert not admits(found["q"], [127, 1, 2, 0xFD, 127])  # ties away
    assert not admits(found["zeros"], [128])


def test_int8_scale_is_rounded_first() -> None:
    """QNT-20, QNT-21. 170 / 127 = 1.3386 is 1.3359375 in bf16 (171/128). Then -170 / 1.3359375 = -127.2515: -127 by the wide
    quotient; rounded to bf16 (steps of 1/2) it is -127.5, which goes to -128. 43.5 / 1.3359375 = 32.56 -> 33, while
    43.5 / (170 / 127) = 32.497 -> 32."""
    found = expected("int8_quantize/token/m1k3/bf16", x=bf16([-170, 170, 43.5]))
    assert admits(found["scales"], bf16([1.3359375]))
    assert admits(found["q"], [0x81, 127, 33])
    assert not admits(found["q"], [0x81, 127, 32])  # divided by the unrounded scale
    assert not admits(found["q"], [0x80, 127, 33])
    narrow = expected("int8_quantize/token/m1k3/bf16.narrow", x=bf16([-170, 170, 43.5]))
    assert admits(narrow["q"], [0x80, 127, 32])  # 32.56 is 32.5 in bf16, a tie
    assert not admits(narrow["q"], [0x81, 127, 32])


@pytest.mark.parametrize(("token", "code"), [("bf16", 0x3728), ("f16", 0x00A8), ("f32", 0x3727C5AC)])
def test_int8_floor(token: str, code: int) -> None:
    """QNT-20: 1e-5 in each format."""
    found = expected(f"int8_quantize/token/m1k2/{token}", x=[0, 0])
    assert admits(found["scales"], [code])
    assert admits(found["q"], [0, 0])


def test_int8_nan_rows() -> None:
    """QNT-22."""
    found = expected("int8_quantize/token/m2k2/bf16", x=[[0x7FC0, 0x3F80], [0x7F80, 0x3F80]])
    assert found["q"].flags.tolist() == [[Flag.FREE, Flag.FREE], [Flag.FREE, 0]]
    assert not admits(found["q"], [[5, 5], [5, 5]])
    assert admits(found["q"], [[5, 5], [5, 0]])
    assert admits(found["scales"], [0x7FC1, 0x7F80])
    assert not admits(found["scales"], [0x3F80, 0x7F80])


# int4_quantize --------------------------------------------------------------------------------------------------------


def test_int4_scales_of_the_sources() -> None:
    """Disagreement of /7, /7.5 and max(max / 7, |min| / 8): largest 7, smallest -7.5 (f16, so that 7.5 is exact)."""
    x = f16(row([7.0, -7.5, 0.5, 1.5], 64))
    scale_of = {"quantize_weights": 1.0, "compressed_tensors": 1.0, "svdquant": 1.0712890625}  # 7.5 / 7 in binary16
    for recipe, scale in scale_of.items():
        found = expected(f"int4_quantize/sym/n1k64g64/f16{'' if recipe == 'quantize_weights' else '.' + recipe}", x=x)
        assert admits(found["scales"], f16([scale]))
    same = expected("int4_quantize/sym/n1k64g64/f16", x=x)["q"]
    assert admits(same, [7, 0x8, 0, 2, *[0] * 60])  # -7.5 -> -8, 0.5 -> 0, 1.5 -> 2
    assert not admits(same, [7, 0x8, 1, 2, *[0] * 60])
    assert not admits(same, [7, 0x9, 0, 2, *[0] * 60])
    assert admits(expected("int4_quantize/uint4b8/n1k64g64/f16", x=x)["q"], [15, 0, 8, 10, *[8] * 60])


def test_int4_signed_extremes() -> None:
    """QNT-32: with the largest 3.5 and the smallest -4, |min| / 8 and max / 7 are both 0.5; with 7 alone, min = 0."""
    found = expected("int4_quantize/sym/n1k32g32/bf16", x=bf16(row([3.5, -4.0], 32)))
    assert admits(found["scales"], bf16([0.5]))
    assert admits(found["q"], [7, 0x8, *[0] * 30])
    assert not admits(found["scales"], bf16([0.5703125]))  # 4 / 7


def test_int4_compressed_tensors_clamps_first() -> None:
    """QNT-34: amax 7.5 has scale 1; 7.5 is bounded to 7, -7.5 is rounded to -8."""
    found = expected("int4_quantize/sym/n1k32g32/bf16.compressed_tensors", x=bf16(row([7.5, -7.5, 2.5], 32)))
    assert admits(found["scales"], bf16([1.0]))
    assert admits(found["q"], [7, 0x8, 2, *[0] * 29])


def test_int4_zero_points() -> None:
    """QNT-33, QNT-34: from -4 to 11 the scale is 1; quantize_weights has zero 4, compressed_tensors -8 + 4 = -4."""
    x = bf16([-4.0, 11.0, 0.5, *[0.0] * 29])
    unsigned = expected("int4_quantize/asym/n1k32g32/bf16", x=x)
    assert admits(unsigned["zeros"], [4])
    assert admits(unsigned["scales"], bf16([1.0]))
    assert admits(unsigned["q"], [0, 15, 4, *[4] * 29])  # RNE(0.5) + 4
    assert not admits(unsigned["zeros"], [3])
    assert not admits(unsigned["q"], [0, 15, 5, *[4] * 29])
    signed = expected("int4_quantize/asym/n1k32g32/bf16.compressed_tensors", x=x)
    assert admits(signed["zeros"], [0xC])
    assert admits(signed["q"], [0x8, 7, 0xC, *[0xC] * 29])  # RNE(0.5 - 4 = -3.5) = -4
    above = expected("int4_quantize/asym/n1k32g32/bf16", x=bf16([3.0, 18.0, *[3.0] * 30]))
    assert admits(above["zeros"], [3])  # |3 / 1|, although the smallest is positive
    assert admits(above["q"], [6, 15, *[6] * 30])


def test_int4_zero_groups() -> None:
    """QNT-37."""
    zeros = np.zeros(64, dtype=np.uint16)
    for recipe in ("", ".svdquant"):
        found = expected(f"int4_quantize/sym/n1k64g64/f16{recipe}", x=zeros)
        assert admits(found["scales"], [0])
        assert (found["q"].flags == Flag.FREE).all()
    fixed = expected("int4_quantize/sym/n1k64g64/bf16.compressed_tensors", x=zeros)
    assert admits(fixed["scales"], bf16([2.0**-7]))
    assert admits(fixed["q"], [0] * 64)
    assert not admits(fixed["q"], [1] * 64)
    open_ = expected("int4_quantize/asym/n1k64g64/bf16.compressed_tensors", x=zeros)
    assert (open_["zeros"].flags == Flag.FREE).all()
    assert (expected("int4_quantize/sym/n1k64g64/f16.nunchaku", x=zeros)["q"].flags == 0).all()


def test_int4_unrounded_scale_in_use() -> None:
    """QNT-36 against QNT-35: 7.00390625 / 7 = 1.000558 is stored as 1.0009765625. 5.50390625 is 5.4985 of the stored scale and
    5.5008 of the unrounded one."""
    x = f16(row([7.00390625, 5.50390625], 64))
    five, six = [7, 5, *[0] * 62], [7, 6, *[0] * 62]
    for recipe, right, wrong in (("svdquant", five, six), ("nunchaku", six, five)):
        found = expected(f"int4_quantize/sym/n1k64g64/f16.{recipe}", x=x)
        assert admits(found["scales"], f16([1.0009765625]))
        assert admits(found["q"], right)
        assert not admits(found["q"], wrong)


def test_int4_tie_of_an_approximate_reciprocal() -> None:
    """QNT-36: 3.5 of a scale of 1 is a tie; one unit of the reciprocal lets it go either way, and no further."""
    found = expected("int4_quantize/sym/n1k64g64/f16.nunchaku", x=f16(row([7.0, 3.5], 64)))["q"]
    assert [admits(found, [7, code, *[0] * 62]) for code in (2, 3, 4, 5)] == [False, True, True, False]


# nvfp4_quantize -------------------------------------------------------------------------------------------------------

TIES = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -1.25, -0.0, 0.0, 1.0, -6.0, 0.3125, 0.1875]
EVEN = [7, 0, 2, 2, 4, 4, 6, 6, 0x8, 0xA, 0x8, 0, 2, 0xF, 1, 0]
AWAY = [7, 1, 2, 3, 4, 5, 6, 7, 0x9, 0xB, 0x0, 0, 2, 0xF, 1, 0]
TOWARD = [7, 0, 1, 2, 3, 4, 5, 6, 0, 0xA, 0, 0, 2, 0xF, 1, 0]


def test_nvfp4_ties() -> None:
    """QNT-4, QNT-50, QNT-53: block maximum 6 has scale 1 (0x38)."""
    x = bf16(TIES)
    even = expected("nvfp4_quantize/static/m1k16/bf16.vllm_reference", x=x, global_scale=f32([1.0]))
    assert admits(even["scales"], [0x38])
    assert admits(even["q"], EVEN)
    assert not admits(even["q"], AWAY)
    assert not admits(even["scales"], [0xB8])  # the sign bit of an unsigned scale
    away = expected("nvfp4_quantize/none/m1k16/bf16.svdquant", x=x)
    assert admits(away["q"], AWAY)
    assert not admits(away["q"], EVEN)
    toward = expected("nvfp4_quantize/none/m1k128/bf16.deepgemm", x=np.tile(x, 8))
    assert admits(toward["q"], TOWARD * 8)
    assert not admits(toward["q"], EVEN * 8)
    for place in range(16):  # every tie matters by itself
        if EVEN[place] != AWAY[place]:
            assert not admits(even["q"], [*EVEN[:place], AWAY[place], *EVEN[place + 1:]])


def test_nvfp4_direction_of_the_global_scale() -> None:
    """QNT-41: the same block, global scale 16: scale 16 * 6 / 6 for a divisor, 6 / (6 * 16) for a multiplier."""
    x = bf16(TIES)
    divisor = expected("nvfp4_quantize/static/m1k16/bf16.compressed_tensors", x=x, global_scale=f32([16.0]))
    assert admits(divisor["scales"], [0x58])
    assert admits(divisor["q"], EVEN)
    multiplier = expected("nvfp4_quantize/static/m1k16/bf16.modelopt", x=x, global_scale=f32([16.0]))
    assert admits(multiplier["scales"], [0x18])
    assert not admits(multiplier["scales"], [0x58])
    found = expected("nvfp4_quantize/dynamic/m1k16/bf16.compressed_tensors", x=x)
    assert admits(found["global_scale"], f32([448.0]))  # 2688 / 6
    assert admits(found["scales"], [0x7E])
    decode_direction = expected("nvfp4_quantize/dynamic/m1k16/bf16.modelopt", x=x)["global_scale"]
    assert admits(decode_direction, f32([np.float32(6) / np.float32(2688)]))
    assert admits(expected("nvfp4_quantize/dynamic/m1k16/bf16.four_over_six", x=x)["global_scale"], f32([256.0]))


def test_nvfp4_zero_and_underflowing_blocks() -> None:
    """QNT-42 to QNT-50: a block of zeros, and one of 2^-12 whose scale 2^-12 / 6 rounds to 0 (half a unit is 2^-10)."""
    x = bf16([*[0.0, -0.0] * 8, *[2.0**-12, -(2.0**-12)] * 8])
    one = f32([1.0])
    table = {  # scale bytes, codes of the four kinds of element
        "vllm_reference": ([0, 0], [0, 8, 0, 8]), "vllm": ([0, 0], [0, 8, 0, 8]),
        "compressed_tensors": ([0x20, 0x20], [0, 8, 0, 8]), "modelopt": ([0x38, 0x01], [0, 0, 0, 8]),
        "torchao": ([0x08, 0x08], [0, 8, 0, 8]),
        "transformer_engine": ([0, 0], [0, 8, 7, 0xF]), "four_over_six": ([0, 0], [0, 0, 0, 8]),
    }
    for recipe, (scales, kinds) in table.items():
        found = expected(f"nvfp4_quantize/static/m1k32/bf16{'' if recipe == 'vllm' else '.' + recipe}", x=x, global_scale=one)
        codes = [*kinds[:2] * 8, *kinds[2:] * 8]
        assert admits(found["scales"], scales), recipe
        assert admits(found["q"], codes), recipe
        assert not admits(found["q"], [code ^ 1 for code in codes]), recipe
    away = expected("nvfp4_quantize/none/m1k32/bf16.svdquant", x=x)
    assert admits(away["scales"], [0, 0])
    assert admits(away["q"], [*[0] * 16, *[7, 0xF] * 8])
    nunchaku = expected("nvfp4_quantize/none/m1k32/bf16.nunchaku", x=x)
    assert admits(nunchaku["scales"], [0, 0])
    assert admits(nunchaku["q"], [*[7] * 16, *[7, 0xF] * 8])  # 0 * infinity, then the block's own maximum


def test_nvfp4_overflowing_scale_is_bounded() -> None:
    """QNT-40: amax 6 * 512 under global scale 1."""
    for recipe in ("vllm_reference", "compressed_tensors"):
        found = expected(f"nvfp4_quantize/static/m1k16/bf16.{recipe}", x=bf16([3072.0] * 16), global_scale=f32([1.0]))
        assert admits(found["scales"], [0x7E])
        assert not admits(found["scales"], [0x7F])
        assert admits(found["q"], [7] * 16)


def test_nvfp4_nan_and_infinity() -> None:
    """QNT-42, QNT-43."""
    x = bf16([6.0] * 32)
    x[1], x[17] = 0x7FC0, 0x7F80
    kernel = expected("nvfp4_quantize/static/m1k32/bf16", x=x, global_scale=f32([1.0]))
    assert admits(kernel["scales"], [0x38, 0x7E])
    assert admits(kernel["q"], [7] * 16 + [0, 7] + [0] * 14)
    assert not admits(kernel["q"], [7, 0] + [7] * 14 + [0, 7] + [0] * 14)
    reference = expected("nvfp4_quantize/static/m1k32/bf16.vllm_reference", x=x, global_scale=f32([1.0]))
    assert reference["scales"].flags.tolist() == [[Flag.NAN_REQUIRED, 0]]


def test_nvfp4_codes_are_judged_beside_the_scale_that_was_written() -> None:
    """QNT-6. amax 7.125 = 6 * 1.1875 is the midpoint of 0x39 (1.125) and 0x3A (1.25): one ulp of rcp(6) decides. 3 is 2.67 and so
    3 (code 5) over 1.125, and 2.4 and so 2 (code 4) over 1.25."""
    arrays: dict[str, Any] = {"x": bf16([7.125, 3.0, *[0.0] * 14]), "global_scale": f32([1.0])}
    problem = "nvfp4_quantize/static/m1k16/bf16"
    alone = expected(problem, **arrays)
    five, four = [7, 5, *[0] * 14], [7, 4, *[0] * 14]
    assert [admits(alone["scales"], [code]) for code in (0x38, 0x39, 0x3A, 0x3B)] == [False, True, True, False]
    assert admits(alone["q"], five)
    assert admits(alone["q"], four)
    for scale, right, wrong in ((0x39, five, four), (0x3A, four, five)):
        beside = judged_beside(problem, {"scales": np.array([[scale]], dtype=np.uint8)}, **arrays)["q"]
        assert admits(beside, right)
        assert not admits(beside, wrong)
    exact = expected("nvfp4_quantize/static/m1k16/bf16.vllm_reference", **arrays)
    assert [admits(exact["scales"], [code]) for code in (0x39, 0x3A)] == [False, True]  # to even


def test_nvfp4_four_over_six() -> None:
    """QNT-49: of 4 and 3 with global scale 1, s = 0.6875 (0x33) leaves errors, 1.5 s = fl(1.5 * 4 / 6) = 1 (0x38) leaves none."""
    arrays: dict[str, Any] = {"x": bf16([4.0, 3.0] * 8), "global_scale": f32([1.0])}
    found = expected("nvfp4_quantize/static/m1k16/bf16.four_over_six", **arrays)
    assert admits(found["scales"], [0x38])
    assert admits(found["q"], [6, 5] * 8)
    assert not admits(found["scales"], [0x33])
    six = expected("nvfp4_quantize/static/m1k16/bf16.four_over_six", x=bf16([6.0, 2.0] * 8), global_scale=f32([1.0]))
    assert admits(six["scales"], [0x38])
    assert not admits(six["scales"], [0x3C])


def test_nvfp4_four_over_six_with_equal_errors() -> None:
    """QNT-49: 6, 3 and 1.5 are exact over 1 and over 1.5; scale and codes go together. Row 1 of two, so that the place counts."""
    rows = [[4.0, 3.0] * 8, [6.0, 3.0, 1.5, *[0.0] * 13]]
    arrays: dict[str, Any] = {"x": bf16(rows), "global_scale": f32([1.0])}
    problem = "nvfp4_quantize/static/m2k16/bf16.four_over_six"
    alone = expected(problem, **arrays)
    head = [6, 5] * 8
    six, four = [head, [7, 5, 3, *[0] * 13]], [head, [6, 4, 2, *[0] * 13]]
    assert [admits(alone["scales"], [0x38, code]) for code in (0x38, 0x39, 0x3B, 0x3C)] == [True, False, False, True]
    assert (admits(alone["q"], six), admits(alone["q"], four)) == (True, True)
    for scale, right, wrong in ((0x38, six, four), (0x3C, four, six), (0x30, six, four)):
        beside = judged_beside(problem, {"scales": np.array([[0x38], [scale]], dtype=np.uint8)}, **arrays)["q"]
        assert (admits(beside, right), admits(beside, wrong)) == (True, False)
    swizzled = expected(problem + ".swizzled", **arrays)["scales"]
    for scale in (0x38, 0x3C):
        storage = np.zeros(512, dtype=np.uint8)
        storage[0], storage[16] = 0x38, scale
        assert admits(swizzled, storage)
        moved = storage.copy()
        moved[0], moved[16] = 0x3C, 0x38
        assert not admits(swizzled, moved)


def test_nvfp4_reciprocal_of_six() -> None:
    """QNT-50: x = 6 * (2^-6 + 1.5 * 2^-9) less one unit in the last place. Over 6 it lies below that midpoint of e4m3, times
    fl(1/6) on it."""
    x = np.array([[0x3DE3FFFF, *[0] * 15]])
    for recipe, right, wrong in (("svdquant", 0x09, 0x0A), ("svdquant_triton", 0x0A, 0x09)):
        found = expected(f"nvfp4_quantize/none/m1k16/f32.{recipe}", x=x)["scales"]
        assert (admits(found, [right]), admits(found, [wrong])) == (True, False)


def test_nvfp4_swizzled_scales_have_zero_padding() -> None:
    """QNT-52."""
    x = bf16([6.0] * 33 * 16).reshape(33, 16)
    x[32] = bf16([12.0] * 16)
    found = expected("nvfp4_quantize/static/m33k16/bf16.vllm_reference.swizzled", x=x, global_scale=f32([1.0]))["scales"]
    right = np.zeros(512, dtype=np.uint8)
    right[np.arange(32) * 16] = 0x38
    right[4] = 0x40  # row 32
    assert admits(found, right)
    for place in (1, 8, 511):
        stale = right.copy()
        stale[place] = 0x5A
        assert not admits(found, stale)
    swapped = np.zeros(512, dtype=np.uint8)
    for m in range(33):  # rows in reshape (32, 4)
        swapped[m // 4 * 16 + m % 4 * 4] = 0x40 if m == 32 else 0x38
    assert not admits(found, swapped)


# svdquant_quantize ----------------------------------------------------------------------------------------------------


def svdquant(recipe: str = "") -> tuple[str, dict[str, Any]]:
    x = np.array([[12.0, 3.0, -1.0, *[0.0] * 13], [2.0, 2.0, 2.0, *[0.0] * 13]])
    down = np.zeros((16, 16))
    down[0, 0], down[1, 0], down[2, 1] = 1.0, 2.0, 0.5
    return f"svdquant_quantize/nvfp4/m2k16r16/bf16{recipe}", {"x": bf16(x), "smooth": bf16([2.0] * 16), "lora_down": bf16(down)}


def test_svdquant_outputs_and_padding() -> None:
    """QNT-62 to QNT-65: 12 / 2 = 6 has scale 1; 3 / 2 = 1.5, -1 / 2; the second row is 1 with scale 1/6 = 0.171875 (0x23)."""
    problem, arrays = svdquant()
    found = expected(problem, **arrays)
    q, scales, lora = np.zeros((256, 16), np.uint8), np.zeros((1, 256), np.uint8), np.zeros((256, 16), np.float32)
    q[0, :3], q[1, :3], scales[0, :2] = [7, 3, 9], 7, [0x38, 0x23]
    lora[0, :2], lora[1, :2] = [18.0, -0.5], [6.0, 1.0]
    assert admits(found["q"], q)
    assert admits(found["scales"], scales)
    assert admits(found["lora_act"], lora.view(np.uint32))
    for name, right in (("q", q), ("scales", scales), ("lora_act", lora.view(np.uint32))):
        stale = right.copy()
        stale[..., -1] = 0x5A  # padding rows of scales, the last column of the others
        assert not admits(found[name], stale)
        if name != "scales":
            stale = right.copy()
            stale[2, 0] = 0x5A if name == "q" else 0x5A5A5A5A
            assert not admits(found[name], stale)
    smoothed = lora.copy()
    smoothed[:2] /= 2
    assert not admits(found["lora_act"], smoothed.view(np.uint32))  # projected after smoothing
    assert not admits(found["scales"], np.roll(scales, 1))
    unsmoothed = scales.copy()
    unsmoothed[0, :2] = [0x40, 0x2B]
    assert not admits(found["scales"], unsmoothed)


def test_svdquant_unrounded_scale() -> None:
    """QNT-51 against QNT-50: the block's maximum is 2 / 2 = 1, fl(1/6) is stored as 0.171875. 0.25 / 2 = 0.125 is 0.727 of the
    stored scale, hence 0.5 (code 1), and 0.75 of the unrounded one, a tie that goes to 1 (code 2)."""
    x = np.array([[2.0, 0.25, *[0.0] * 14]])
    arrays: dict[str, Any] = {"x": bf16(x), "smooth": bf16([2.0] * 16), "lora_down": bf16(np.zeros((16, 16)))}
    q = np.zeros((256, 16), dtype=np.uint8)
    q[0, :2] = [7, 1]
    up = q.copy()
    up[0, 1] = 2
    stored = expected("svdquant_quantize/nvfp4/m1k16r16/bf16", **arrays)["q"]
    assert (admits(stored, q), admits(stored, up)) == (True, False)
    unrounded = expected("svdquant_quantize/nvfp4/m1k16r16/bf16.nunchaku", **arrays)["q"]
    assert admits(unrounded, up)


def test_svdquant_int4_pads_every_row() -> None:
    """QNT-64, QNT-65: [K/64, rows] binary16 scales; row 0 has amax 7."""
    arrays: dict[str, Any] = {
        "x": f16([row([7.0, 0.5, 1.5, -7.0], 64)]), "smooth": f16([1.0] * 64), "lora_down": f16(np.zeros((64, 16))),
    }
    found = expected("svdquant_quantize/int4/m1k64r16/f16", **arrays)
    assert found["scales"].lo.shape == (1, 256)
    q, scales = np.zeros((256, 64), dtype=np.uint8), np.zeros((1, 256), dtype=np.uint16)
    q[0, :4], scales[0, 0] = [7, 0, 2, 9], f16(1.0)
    assert admits(found["q"], q)
    assert admits(found["scales"], scales)
    scales[0, 1:] = f16(1.0)
    assert not admits(found["scales"], scales)


def test_svdquant_projection_stays_in_the_declared_interval() -> None:
    """QNT-63: products of powers of two that binary32 sums exactly leave a point; a unit in the last place is refused."""
    problem, arrays = svdquant()
    found = expected(problem, **arrays)["lora_act"]
    codes = np.zeros((256, 16), dtype=np.uint32)
    codes[0, :2], codes[1, :2] = f32([18.0, -0.5]), f32([6.0, 1.0])
    assert admits(found, codes)
    codes[0, 0] += 1
    assert not admits(found, codes)


# Draws and storage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "element", "divisor", "fmt"), [
    ("fp8_quantize/token/m16k256p0/bf16/ties/s0", E4M3FN, 448, BF16),
    ("fp8_quantize/token/m16k256p0/f16.fnuz/ties/s0", E4M3FNUZ, 224, F16),
    ("int8_quantize/token/m16k512/bf16/ties/s0", INT8, 127, BF16),
    ("int4_quantize/sym/n8k512g64/f16.svdquant/ties/s0", INT4, 7, F16),
    ("nvfp4_quantize/none/m16k128/bf16.svdquant/ties/s0", E2M1, 6, BF16),
])
def test_ties_are_all_hit_from_three_sides(text: str, element: Format, divisor: int, fmt: Format) -> None:
    """With x / (first / divisor) in Fractions: each tie of the element format, and a quotient just below and just above."""
    case = parse_case(text, OPS)
    x = decode(draw_operands(OPS[case.problem.op], case)["x"].codes, fmt)
    blocks = x.reshape(-1, {"int4_quantize": 64, "nvfp4_quantize": 16}.get(case.problem.op, int(x.shape[1])))
    steps = [Fraction(float(b[0])) / divisor for b in blocks]
    plain = [i for i, step in enumerate(steps) if step.numerator == 1 or step.denominator == 1]
    plain = [i for i in plain if (steps[i].numerator * steps[i].denominator).bit_count() == 1]
    assert len(plain) >= len(blocks) // 2
    quotients = sorted({abs(Fraction(float(v)) / steps[i]) for i in plain for v in blocks[i][1:]})
    ties = [Fraction(float(t)) for t in ties_of(element) if t < divisor]
    present = set(quotients)
    assert set(ties) <= present
    gap = Fraction(1, 128)  # neighbours in x's format lie within 2^-7 of the tie, relatively
    for tie in ties:
        assert any(tie * (1 - gap) <= q < tie for q in present)
        assert any(tie < q <= tie * (1 + gap) for q in present)


def test_scale_ties_are_hit() -> None:
    """Every fourth block of nvfp4 ties has its maximum at six times a midpoint of e4m3, or beside one."""
    case = parse_case("nvfp4_quantize/none/m16k128/bf16.svdquant/ties/s0", OPS)
    codes = draw_operands(OPS["nvfp4_quantize"], case)["x"].codes.reshape(-1, 16)[3::4]
    largest = [int(c) for c in (codes & 0x7FFF).max(axis=1)]
    ties = {int(bf16(6 * t)) for t in ties_of(UE4M3) if 1 / 8 <= t <= 8}
    assert {min(code - tie for tie in ties if abs(code - tie) <= 1) for code in largest} == {-1, 0, 1}


def test_special_blocks_cover_every_kind() -> None:
    recipe = RECIPES["svdquant_nvfp4"]
    codes = special_blocks((26, 16), BF16, recipe, Stream("special"))
    blocks = decode(codes, BF16)[::2]
    assert len(blocks) == len(SPECIAL_BLOCKS) == 13
    assert (codes[0] == 0).all()
    assert (codes[2] == 0x8000).all()
    assert [bool(np.isfinite(b).all()) for b in blocks] == [True] * 8 + [False] * 5
    assert np.abs(blocks[3]).max() < 2.0**-20
    finite = special_blocks((26, 16), BF16, recipe, Stream("special"), finite=True)
    assert np.isfinite(decode(finite, BF16)).all()
    turned = special_blocks((1, 16), BF16, recipe, Stream("special"), first=1)
    assert (turned == 0x8000).all()


@pytest.mark.parametrize("layout", ["gptq", "int32_k", "reorder_e4m3", "scale_swizzle", "nibble_low_first"])
def test_storage_round_trip(layout: str) -> None:
    codes = np.random.Generator(np.random.PCG64(5)).integers(0, 16, (2, 32, 256)).astype(np.uint8)
    assert np.array_equal(codes_of(words_of(codes, layout), layout, codes.shape), codes)


def test_transposed_expectation_moves_its_table() -> None:
    found = Expectation(
        E2M1, np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3), np.zeros((2, 3), dtype=np.uint8), {4: frozenset({1})},
    )
    turned = transposed(found)
    assert turned.lo.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert turned.sparse == {3: frozenset({1})}  # (1, 1) of [2, 3] is (1, 1) of [3, 2]
