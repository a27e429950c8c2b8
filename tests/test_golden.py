"""Golden vectors against the judge: two derivations that share nothing, compared code by code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance.op import Expectation, Flag
from lowbit.conformance.ops import NAMES, ops
from lowbit.conformance.vectors import Vector, codes_of_text, document, load, vector_of, violation
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import EXACT_BITS, Claim, Contraction, Declaration, Join, Step, StepKind, cast, signature
from lowbit.references.dot import Operand, dot_fraction
from lowbit.references.formats import F16, F32, FORMATS, Format, Special, decode, decode_scalar, is_nan
from lowbit.references.interpret import emulate
from lowbit.references.rounding import Overflow, Rounding, encode, encode_scalar

GOLDEN = Path(__file__).parents[1] / "golden"
GENERATOR = GOLDEN / "generate.py"
TABLES = ("formats", "datapaths")
GEMMS = tuple(name for name in NAMES if name.startswith("gemm_"))
QUANTISERS = tuple(name for name in NAMES if name.endswith("_quantize"))


def every_vector(names: tuple[str, ...] = NAMES) -> Iterator[Vector]:
    for name in names:
        yield from load(name)


def normative(vector: Vector) -> Declaration:
    """The op's own program on IEEE binary32 in ascending k: any sum of at most 24 bits is exact there."""
    program = ops()[vector.case.problem.op].program
    return EXACT_BITS if program is None else Declaration(program(vector.case.problem, DATAPATHS["ieee_f32"]), Claim.BIT_EXACT)


def judged(vector: Vector, declaration: Declaration) -> Mapping[str, Expectation]:
    return ops()[vector.case.problem.op].expect(vector.case, vector.operands, declaration)


@cache
def judge_of(vector: Vector) -> Mapping[str, Expectation]:
    """What the judge admits under the normative program."""
    return judged(vector, normative(vector))


def difference(judge: Expectation, golden: Expectation) -> str:
    """Where two expectations of one output differ, as text; empty where they admit the same codes."""
    if (judge.format, judge.lo.shape) != (golden.format, golden.lo.shape):
        return f"{judge.format}{judge.lo.shape} and {golden.format}{golden.lo.shape}"

    def ends(e: Expectation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if not e.either_zero:
            return e.lo, e.hi
        return np.where(e.lo == 0, -1, e.lo), np.where(e.hi == -1, 0, e.hi)

    (lo, hi), (low, high) = ends(judge), ends(golden)
    theirs, ours = ({i: codes for i, codes in e.sparse.items() if len(codes) > 1} for e in (judge, golden))
    if any(ours.get(i) != codes for i, codes in theirs.items()):
        return f"judge admits {theirs}, golden {ours}"
    by_set = np.zeros(lo.size, dtype=np.bool_)
    by_set[list(theirs)] = True
    by_flag = (((judge.flags | golden.flags) & (Flag.FREE | Flag.NAN_REQUIRED)) != 0) | by_set.reshape(lo.shape)
    wrong = (judge.flags != golden.flags) | (((lo != low) | (hi != high)) & ~by_flag)
    if not wrong.any():
        return ""
    at = np.argwhere(wrong)[:4].tolist()
    return f"at {at}: judge {lo[wrong][:4]}..{hi[wrong][:4]}, golden {low[wrong][:4]}..{high[wrong][:4]}"


def differences(vector: Vector, declaration: Declaration | None = None) -> list[str]:
    """One text per output on which judge and golden differ; the declaration is the normative one if none is given."""
    judge = judge_of(vector) if declaration is None else judged(vector, declaration)
    assert set(judge) == set(vector.expectations), vector.case
    found = ((name, difference(judge[name], golden)) for name, golden in vector.expectations.items())
    return [f"{vector.case} {name}: {text}" for name, text in found if text]


# Files ---------------------------------------------------------------------------------------------------------------


def test_one_file_per_op_and_nothing_else() -> None:
    assert {path.name for path in GOLDEN.glob("*.json")} == {f"{name}.json" for name in (*NAMES, *TABLES, "schema")}
    assert sum(path.stat().st_size for path in GOLDEN.glob("*.json")) < 1_500_000


def test_generation_is_reproducible(tmp_path: Path) -> None:
    """Run by path, isolated from the package and from the environment, the generator writes what is stored, byte for byte."""
    subprocess.run([sys.executable, "-I", "-S", str(GENERATOR), "--out", str(tmp_path)], check=True, capture_output=True,
        cwd=tmp_path)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in GOLDEN.glob("*.json")}


def test_generator_shares_nothing_with_the_judge() -> None:
    imported = set()
    for node in ast.walk(ast.parse(GENERATOR.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").partition(".")[0])
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [*NAMES, *TABLES])
def test_files_keep_their_schema(name: str) -> None:
    assert document(name)["source"].startswith("golden/generate.py")


@pytest.mark.parametrize("name", NAMES)
def test_families(name: str) -> None:
    """Every family says what it guards and which clause it belongs to, and holds vectors; there are enough of them."""
    found = load(name)
    assert len(found) >= (8 if name in GEMMS else 10 if name in QUANTISERS else 4)
    assert {v.family for v in found} == set(document(name)["families"])
    assert {v.clause for v in found} <= set(ops()[name].clauses)
    assert all(v.guards and v.comment for v in found)
    assert [v.case.seed for v in found] == list(range(1, len(found) + 1))
    assert all(v.case.pattern == "golden" and vector_of(v.case) is v for v in found)


# Vectors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_judge_and_golden_agree(name: str) -> None:
    """The judge admits exactly the golden codes: same ends, same NaN, same free elements, for every vector."""
    assert [text for v in load(name) for text in differences(v)] == []


def test_open_codes_are_those_of_the_judge() -> None:
    """Where several codes are right, each of them is admitted by the judge."""
    several = 0
    for vector in every_vector():
        judge = judge_of(vector)
        for name, golden in vector.expectations.items():
            options = {i: codes for i, codes in golden.sparse.items() if len(codes) > 1}
            several += len(options)
            for choose in (min, max):
                if options:
                    codes = golden.example().reshape(-1)
                    codes[list(options)] = [choose(c) for c in options.values()]
                    open_ = np.zeros(codes.size, dtype=np.bool_)
                    open_[list(options)] = True
                    assert judge[name].admits(codes.reshape(golden.lo.shape)).reshape(-1)[open_].all(), vector.case
    assert several > 50


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_code_is_refused(name: str) -> None:
    """Neither the judge nor the golden expectation admits a neighbour of a code that stands alone."""
    for vector in load(name):
        judge = judge_of(vector)
        for tensor, golden in vector.expectations.items():
            alone = (golden.lo == golden.hi) & (golden.flags == 0) & (golden.lo != 0) & (golden.lo != -1)
            codes = golden.example()
            bit = codes.dtype.type(1)
            for expectation in (judge[tensor], golden):
                assert not expectation.admits(codes ^ bit)[alone].any(), (vector.case, tensor)


NARROW = {
    "gemm_w4a16": ("hopper_f16", "hopper_bf16", "cdna1_f16"), "gemm_w8a8_fp8": ("hopper_wgmma_fp8", "ada_fp8", "cdna3_fp8"),
    "gemm_w4a8_fp8": ("hopper_wgmma_fp8", "ieee_f32_rz"), "gemm_w4a8_fp8_grouped": ("hopper_wgmma_fp8", "ieee_f32_rz"),
    "gemm_w4a8_int8": ("imma_s32", "ieee_f32_unfused"), "gemm_nvfp4": ("blackwell_nvfp4", "ieee_f32_rz"),
    "gemm_int4": ("imma_s32", "ieee_f32_rz"),
}
"""Datapaths other than the normative one, with accumulators of 14 bits and more; each is used where it takes the operands."""


@pytest.mark.parametrize("name", GEMMS)
def test_bits_need_14_bits_of_accumulator_and_no_order(name: str) -> None:
    """Vectors whose steps do not round have the same bits on narrow accumulators, and with the scales in another order."""
    op, tried = ops()[name], 0
    assert op.program is not None
    assert op.environment is not None
    for vector in load(name):
        assert 1 <= vector.min_bits <= 14
        if not vector.any_program:
            continue
        environment = op.environment(vector.case.problem, vector.operands)
        formats = {side.format for side in (environment["a"], environment["w"]) if isinstance(side, Operand)}
        for path in (DATAPATHS[key] for key in NARROW[name]):
            if not formats <= set(path.operands):
                continue
            declared = op.program(vector.case.problem, path)
            for items in (declared, reordered(declared)):
                assert signature(items) == signature(declared)
                for claim in Claim:
                    assert differences(vector, Declaration(items, claim)) == []
                tried += 1
    assert tried >= 20


def reordered(program: tuple[Contraction | Step, ...]) -> tuple[Contraction | Step, ...]:
    """The same program with the operands of each run of multiplications in reverse order."""
    found: list[Contraction | Step] = []
    for is_product, run in groupby(program, key=lambda item: isinstance(item, Step) and item.kind is StepKind.MUL):
        items = list(run)
        if is_product:
            names = [item.operands for item in items if isinstance(item, Step)][::-1]
            items = [replace(item, operands=own) for item, own in zip(items, names, strict=True) if isinstance(item, Step)]
        found += items
    return tuple(found)


def test_free_compilers_are_represented() -> None:
    """Some vectors show both results of an optional fusion, and only those whose program leaves it open."""
    for vector in every_vector(GEMMS):
        program = normative(vector).program
        open_ = any(step.join is Join.EITHER for item in program for step in (item.steps if isinstance(item, Contraction)
            else (item,)))
        assert open_ or not any(len(codes) > 1 for e in vector.expectations.values() for codes in e.sparse.values()), vector.case
    assert sum(any(len(c) > 1 for c in v.expectations["d"].sparse.values()) for v in every_vector(GEMMS)) >= 5


# Disagreements -------------------------------------------------------------------------------------------------------

DISAGREEMENTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("int4_quantize/sym/n3k64g64/f16/golden/s1", "int4_quantize/sym/n3k64g64/f16.compressed_tensors/golden/s11",
         "int4_quantize/sym/n3k64g64/f16.svdquant/golden/s21"),),
    2: (("nvfp4_quantize/none/m4k16/f16.svdquant/golden/s100", "nvfp4_quantize/none/m4k16/f16.nunchaku/golden/s117"),
        ("int4_quantize/sym/n1k64g64/bf16.svdquant/golden/s29", "int4_quantize/sym/n1k64g64/bf16.nunchaku/golden/s38")),
    3: (("fp8_quantize/token/m5k24p0/f16/golden/s7", "fp8_quantize/token/m5k24p0/f16.vllm_native/golden/s23"),
        ("fp8_quantize/block/m1k128p0/f16/golden/s40", "fp8_quantize/block/m1k128p0/f16.scaled_quantize/golden/s45"),
        ("nvfp4_quantize/none/m1k16/f32.svdquant/golden/s127", "nvfp4_quantize/none/m1k16/f32.svdquant_triton/golden/s128")),
    4: (("nvfp4_quantize/none/m1k128/bf16.svdquant/golden/s129", "nvfp4_quantize/none/m1k128/bf16.nunchaku/golden/s130",
         "nvfp4_quantize/none/m1k128/bf16.deepgemm/golden/s131"),),
    5: (("nvfp4_quantize/static/m1k16/bf16.compressed_tensors/golden/s132",
        "nvfp4_quantize/static/m1k16/bf16.modelopt/golden/s133"),
        ("nvfp4_quantize/dynamic/m2k16/bf16.compressed_tensors/golden/s43",
            "nvfp4_quantize/dynamic/m2k16/bf16.modelopt/golden/s79",
         "nvfp4_quantize/dynamic/m2k16/bf16.four_over_six/golden/s67")),
    6: (("nvfp4_quantize/static/m1k16/f16.vllm_reference/golden/s135",
        "nvfp4_quantize/static/m1k16/f16.compressed_tensors/golden/s136",
         "nvfp4_quantize/static/m1k16/f16.modelopt/golden/s137", "nvfp4_quantize/static/m1k16/f16.torchao/golden/s138"),
        ("fp8_quantize/token/m1k8p0/bf16/golden/s8", "fp8_quantize/tensor/m1k8p0/bf16/golden/s13"),
        ("int4_quantize/sym/n1k128g64/bf16/golden/s6", "int4_quantize/sym/n1k128g64/bf16.compressed_tensors/golden/s16")),
    7: (("gemm_nvfp4/svdquant/m3n8k32r16/f16.lora.bias/golden/s10", "gemm_nvfp4/nunchaku/m3n8k32r16/f16.lora.bias/golden/s11"),),
    8: (("gemm_nvfp4/svdquant/m3n16k32r16/bf16.lora/golden/s14", "gemm_nvfp4/svdquant/m3n16k32r16/bf16.lora/golden/s15"),
        ("gemm_int4/f32/m3n16k64r16/f16.lora/golden/s29", "gemm_int4/f32/m3n16k64r16/f16.lora/golden/s30")),
    9: (("int4_pack/k_major/n8k16/int8/golden/s8", "int4_pack/compressed_tensors/n8k16/int8/golden/s28"),
        ("int4_pack/zeros_v1/n8k3/uint4/golden/s29", "int4_pack/zeros_v2/n8k3/uint4/golden/s31")),
    10: (("int4_pack/gptq/n8k16/uint4/golden/s1", "int4_pack/k_major/n8k16/uint4/golden/s5",
        "int4_pack/along_n/n8k16/uint4/golden/s9",
          "int4_pack/awq/n8k16/uint4/golden/s13", "int4_pack/nibble/n8k16/uint4/golden/s17"),),
    11: (("fp8_quantize/token/m1k4p0/f16/golden/s161", "fp8_quantize/token/m1k4p0/f16.fnuz/golden/s162"),
         ("fp8_quantize/token/m1k8p0/bf16/golden/s8", "fp8_quantize/tensor/m1k8p0/bf16/golden/s13")),
    12: (("gemm_w4a16/sym/m2n8k32g32/bf16.bias/golden/s15", "gemm_w4a16/sym/m2n8k32g32/bf16.biasafter/golden/s16"),
         ("gemm_w8a8_fp8/scaled/m2n8k16/bf16.bias/golden/s23", "gemm_w8a8_fp8/scaled/m2n8k16/bf16.biasafter/golden/s24"),
         ("gemm_int4/f32/m3n8k192r0/f16.bias/golden/s32", "gemm_int4/half/m3n8k192r0/f16.bias/golden/s33")),
    13: (("fp8_quantize/static/m2k13p0/f32/golden/s2",),),
    14: (("gemm_int4/f32/m3n8k192r0/f16/golden/s23", "gemm_int4/half/m3n8k192r0/f16/golden/s24"),
         ("gemm_int4/f32/m3n8k192r0/bf16/golden/s25", "gemm_int4/half/m3n8k192r0/bf16/golden/s26"),
         ("gemm_int4/f32/m2n8k64r0/bf16/golden/s27", "gemm_int4/half/m2n8k64r0/bf16/golden/s28")),
    15: (("gemm_w4a8_int8/direct/m2n8k32g32/bf16/golden/s8", "gemm_w4a8_int8/viaf16/m2n8k32g32/bf16/golden/s9"),
         ("gemm_w4a8_int8/direct/m2n8k32g32/bf16/golden/s10", "gemm_w4a8_int8/viaf16/m2n8k32g32/bf16/golden/s11")),
}
"""Cases on which the alternatives of each disagreement between source systems differ; 16 is in datapaths.json."""

VECTORS = {str(v.case): v for v in every_vector()}


def answer(vector: Vector) -> list[tuple[Any, ...]]:
    """All that a vector expects, comparable."""
    return [(name, e.format.name, e.lo.shape, e.lo.tolist(), e.hi.tolist(), e.flags.tolist()) for name,
        e in sorted(vector.expectations.items())]


@pytest.mark.parametrize(("number", "cases"), [(n, c) for n, rows in DISAGREEMENTS.items() for c in rows if n not in (8, 13)])
def test_alternatives_differ_on_equal_inputs(number: int, cases: tuple[str, ...]) -> None:
    found = [VECTORS[case] for case in cases]
    assert len({v.operands.sha256() for v in found}) == 1
    answers = [answer(v) for v in found]
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i])


@pytest.mark.parametrize("cases", DISAGREEMENTS[8])
def test_a_transposed_low_rank_operand_shows(cases: tuple[str, ...]) -> None:
    """lora_up is [N, R] with N = R here: a reader of [R, N] computes the second vector's output from the first one's operands."""
    first, second = (VECTORS[case] for case in cases)
    assert np.array_equal(first.operands["lora_up"].codes.T, second.operands["lora_up"].codes)
    assert all(np.array_equal(t.codes, second.operands[name].codes) for name, t in first.operands.items() if name != "lora_up")
    assert answer(first) != answer(second)


def test_overflow_saturates() -> None:
    """Disagreement 13: 464 is the tie above 448. A cast that does not saturate makes NaN of what lies beyond."""
    (case,) = DISAGREEMENTS[13][0]
    vector = VECTORS[case]
    assert decode(vector.operands["scale"].codes, F32).tolist() == [1.0]
    beyond = np.abs(decode(vector.operands["x"].codes, F32)) > 464
    assert beyond.sum() >= 6
    codes = vector.expectations["q"].example()
    assert set((codes[beyond] & 0x7F).tolist()) == {0x7E}


def test_every_disagreement_has_vectors() -> None:
    assert set(DISAGREEMENTS) | {16} == set(range(1, 17))


# Tables --------------------------------------------------------------------------------------------------------------

_SPECIAL = {Special.NAN: "nan", Special.POS_INF: "inf", Special.NEG_INF: "-inf", Special.NEG_ZERO: "-0"}


def value_text(value: Fraction | Special) -> str:
    return _SPECIAL[value] if isinstance(value, Special) else f"{value.numerator}/{value.denominator}"


SMALL = [f for f in FORMATS.values() if f.bits <= 8]


def test_every_small_format_is_listed() -> None:
    assert set(document("formats")["formats"]) == {f.name for f in SMALL}


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_values_of_all_codes(fmt: Format) -> None:
    stored = document("formats")["formats"][fmt.name]["values"]
    assert [value_text(decode_scalar(code, fmt)) for code in range(1 << fmt.bits)] == stored
    table = decode(np.arange(1 << fmt.bits, dtype=np.uint8), fmt)
    exact = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "-0": -0.0}
    expected = np.array([exact[text] if text in exact else float(Fraction(text)) for text in stored])
    assert np.array_equal(table, expected, equal_nan=True)
    assert np.array_equal(np.signbit(table), np.signbit(expected))


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_rounding_of_ties_and_edges(fmt: Format) -> None:
    record = document("formats")["formats"][fmt.name]
    count = len(record["inputs"]) // 8
    inputs = decode(codes_of_text(record["inputs"], (count,), F32), F32)
    assert count >= 15
    assert len(record["rounded"]) == (12 if fmt.exponent_bits else 6)
    scalars = [decode_scalar(int(record["inputs"][8 * i : 8 * i + 8], 16), F32) for i in range(count)]
    for key, text in record["rounded"].items():
        mode, policy = key.split("/")
        expected = codes_of_text(text, (count,), fmt)
        got = encode(inputs, fmt, Rounding[mode.upper()], Overflow[policy.upper()])
        assert got.tolist() == expected.tolist(), key
        some = range(0, count, 7)
        assert [encode_scalar(scalars[i], fmt, Rounding[mode.upper()], Overflow[policy.upper()])
            for i in some] == expected[::7].tolist(), key


DOTS = document("datapaths")["vectors"]


def operand(record: Mapping[str, Any]) -> Operand:
    fmt = FORMATS[record["format"]]
    return Operand(codes_of_text(record["codes"], tuple(record["shape"]), fmt), fmt)


@pytest.mark.parametrize("record", DOTS, ids=lambda r: r["comment"])
def test_sums_on_datapaths(record: Mapping[str, Any]) -> None:
    a, w = operand(record["a"]), operand(record["w"])
    assert value_text(dot_fraction(decode(a.codes[0], a.format), decode(w.codes[0], w.format))) == record["exact"]
    for result in record["results"]:
        contraction = Contraction(("a", "w"), DATAPATHS[result["datapath"]], segment=result["segment"])
        found = emulate(Declaration((contraction, cast(F32)), Claim.BIT_EXACT), {"a": a, "w": w})
        assert encode(found.lo, F32).tolist() == [[int(result["f32"], 16)]], result


def test_fast_promoted_and_exact_accumulation_differ() -> None:
    """Disagreement 16: three results from the same operands, in at least three of the vectors."""
    def bits(record: Mapping[str, Any], name: str, segment: int) -> str:
        return str(next(r["f32"] for r in record["results"] if (r["datapath"], r["segment"]) == (name, segment)))

    apart = [len({bits(r, "hopper_wgmma_fp8", 0), bits(r, "hopper_wgmma_fp8", 128), bits(r, "ieee_f32", 0)}) for r in DOTS]
    assert apart.count(3) >= 3


# Loader --------------------------------------------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = json.loads((GOLDEN / "int4_repack.json").read_text(encoding="utf-8"))
    change(content)
    assert isinstance(content, dict)
    return content


def _drop(path: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *keys, last = path.split(".")
        place: Any = content
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        del place[last]
    return change


def _put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *keys, last = path.split(".")
        place: Any = content
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return change


@pytest.mark.parametrize(("change", "message"), [
    (_drop("families"), r"file has no 'families'"),
    (_drop("vectors.0.comment"), r"file.vectors\[0\] has no 'comment'"),
    (_put("schema", "lowbit-golden/9"), r"schema is 'lowbit-golden/9', expected one of"),
    (_put("extra", 1), r"has 'extra', which the schema does not know"),
    (_put("vectors", []), r"file.vectors has 0 items, expected at least 1"),
    (_put("vectors.0.index", 0), r"index is 0, expected at least 1"),
    (_put("vectors.0.index", True), r"expected a JSON integer"),
    (_put("vectors.0.index", 3), r"vector 1: its index is 3"),
    (_put("vectors.0.case", "int4_repack/weight/n8k8/plain/normal/s1"), r"case is .* expected text that matches"),
    (_put("vectors.0.case", "int4_repack/weight/n8k8/plain/golden/s2"), r"is not that of vector 1"),
    (_put("vectors.0.case", "int4_repack/weight/n12k8/plain/golden/s1"), r"the contract requires"),
    (_put("vectors.0.family", "unheard"), r"vector 1: 'unheard'"),
    (_put("vectors.0.inputs.packed.format", "int5"), r"format is 'int5', expected one of"),
    (_put("vectors.0.inputs.packed.codes", "0123456Z"), r"codes is '0123456Z', expected text that matches"),
    (_put("vectors.0.inputs.packed.codes", "0123456"), r"'0123456' is no whole number of int32 codes"),
    (_put("vectors.0.inputs.packed.codes", "01234567 00000000*8"), r"9 codes, expected those of shape \(8, 1\)"),
    (_put("vectors.0.inputs.packed.shape", [4, 2]), r"tensor packed is .*\(4, 2\).* the contract has .*\(8, 1\)"),
    (_drop("vectors.0.expected.repacked"), r"tensor repacked is None"),
])
def test_broken_files_are_refused(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schema.json").write_text((GOLDEN / "schema.json").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "int4_repack.json").write_text(json.dumps(broken(change)), encoding="utf-8")
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        unloaded("int4_repack")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("golden/int4_repack.json")


def unloaded(name: str) -> tuple[Vector, ...]:
    """`load` without what was loaded before, and without leaving anything for what is loaded after."""
    load.cache_clear()
    document.cache_clear()
    try:
        return load(name)
    finally:
        load.cache_clear()
        document.cache_clear()


def test_missing_and_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"golden/int4_pack\.json or its schema is missing; run python"):
        unloaded("int4_pack")
    (tmp_path / "int4_pack.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"golden/int4_pack\.json is no JSON"):
        unloaded("int4_pack")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no golden vectors of 'gemm'"):
        load("gemm")
    first = load("int4_repack")[0].case
    for case in (replace(first, seed=0), replace(first, seed=99), replace(first, pattern="normal")):
        with pytest.raises(ValueError, match="have the pattern golden and the seeds 1 to"):
            vector_of(case)
    with pytest.raises(ValueError, match="vector 2 of int4_repack is"):
        vector_of(replace(first, seed=2))


def test_the_schema_is_enforced_word_by_word() -> None:
    """A keyword that the checker does not know is an error of the schema, never a rule that nobody applies."""
    with pytest.raises(ValueError, match="schema keyword 'maximum'"):
        violation(3, {"type": "integer", "maximum": 2}, {})


def test_codes_of_text() -> None:
    assert codes_of_text("0a00 7f*3 ff", (6,), FORMATS["uint8"]).tolist() == [10, 0, 127, 127, 127, 255]
    assert codes_of_text("", (0, 4), F16).shape == (0, 4)
    with pytest.raises(ValueError, match="code 0x80 is none of ue4m3"):
        codes_of_text("80", (1,), FORMATS["ue4m3"])


def test_expectations_say_what_the_file_says() -> None:
    """Open, free and NaN elements of the files reach the judge's record."""
    bias = VECTORS["gemm_w8a8_fp8/scaled/m4n8k16/f32.bias/golden/s22"]
    assert bias.expectations["d"].either_zero
    assert any(len(codes) == 2 for codes in bias.expectations["d"].sparse.values())
    free = VECTORS["int4_quantize/sym/n1k128g64/bf16/golden/s6"].expectations["q"]
    assert free.flags[0].tolist() == [Flag.FREE] * 64 + [0] * 64
    nan = VECTORS["fp8_quantize/token/m4k4p0/bf16.vllm_native/golden/s25"].expectations["scales"]
    assert nan.flags[0, 0] == Flag.NAN_REQUIRED
    assert is_nan(nan.example()[:1], F32).all()
    fused = VECTORS["fp8_requantize/max_scale/n8k32s3/fn.fused/golden/s7"].expectations["w_out"]
    assert fused.sparse[0x7F] == {0x7F}
    assert not fused.flags.any()
