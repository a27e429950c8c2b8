"""What the probes of an accumulator are, and that their readings are the numbers of the datapath that computed them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from lowbit.conformance import audit_probes as probes
from lowbit.conformance import simulator
from lowbit.conformance.audit_readings import Fingerprint, Reading, fingerprint
from lowbit.conformance.case import Case, Problem
from lowbit.conformance.op import DomainError, Op, make_problem, parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import lane_of, level_of
from lowbit.conformance.run import listed_of
from lowbit.conformance.selection import audit_list, shard
from lowbit.references.datapaths import DATAPATHS, Family
from lowbit.references.declarations import Claim
from lowbit.references.formats import Codes, code_of_key
from lowbit.references.rounding import Rounding

GEMMS = [name for name, op in ops().items() if op.is_gemm]
PROBED = [problem for name in GEMMS for problem in probes.problems(ops()[name])]


def emulated(op: Op, case: Case, backend: simulator.Simulator) -> Codes:
    """D as a simulator gives it."""
    declaration = replace(backend.declare(case.problem, "default"), claim=Claim.BIT_EXACT)
    expected = op.expect(case, probes.probe_operands(op, case), declaration)["d"]
    codes: Codes = np.where(expected.flags & 1, expected.format.nan_code, code_of_key(expected.lo, expected.format))
    return codes.astype(code_of_key(expected.lo, expected.format).dtype)


def read(text: str, argument: str) -> Fingerprint:
    """The fingerprint of a simulator on a probed problem."""
    problem = parse_problem(text, ops())
    op, backend = ops()[problem.op], simulator.backend(argument)
    assert backend.supports(problem) is None
    cases = [case for case in probes.battery(op, problem) if case.pattern != probes.STAGNATION]
    return fingerprint(op, [
        probes.probed(op, case, probes.probe_operands(op, case), emulated(op, case, backend)) for case in cases
    ])


# The probes ----------------------------------------------------------------------------------------------------------


def test_every_variant_and_choice_of_formats_has_one_battery() -> None:
    """By hand: out, and what else names a format. w8a8: 2 variants x 3 outputs x 2 formats; the others: variants x 2 outputs."""
    counts = {name: len(probes.problems(ops()[name])) for name in ops()}
    assert counts == {name: 0 for name in ops() if name not in GEMMS} | {
        "gemm_w4a16": 6, "gemm_w8a8_fp8": 12, "gemm_w4a8_fp8": 4, "gemm_w4a8_fp8_grouped": 4, "gemm_w4a8_int8": 4,
        "gemm_nvfp4": 6, "gemm_int4": 4,
    }
    listed = [item for op in ops().values() for item in audit_list(op)]
    assert len({str(item.case) for item in listed}) == len(listed) == 4 * sum(counts.values())
    assert {(item.lane, item.level) for item in listed} == {("audit", 2)}
    assert all(lane_of(ops()["gemm_int4"], pattern) == "audit" for pattern in probes.PATTERNS)
    assert level_of("audit") == 2


def test_a_probe_is_found_again_by_its_id() -> None:
    """AUD-1: the id fixes the operands."""
    for item in audit_list(ops()["gemm_nvfp4"]):
        assert listed_of(str(item.case)) == item
    case = probes.battery(ops()["gemm_w8a8_fp8"], probes.problems(ops()["gemm_w8a8_fp8"])[0])[2]
    assert str(case) == "gemm_w8a8_fp8/scaled/m64n64k1024/bf16/audit_cut/s1"
    assert probes.probe_operands(ops()["gemm_w8a8_fp8"], case).sha256() == (
        "dc04f9a474ed0052521903d0745af8f047ce0fa615d0af5f6ed4988faff9cc99"
    )


def test_probes_of_one_audit_stay_in_one_shard() -> None:
    listed = [item for name in GEMMS for item in audit_list(ops()[name])]
    for count in (2, 3, 7):
        parts = [shard(listed, index, count) for index in range(1, count + 1)]
        assert sum(map(len, parts)) == len(listed)
        for part in parts:
            held = [(item.case.problem.op, item.case.problem.variant, item.case.problem.options) for item in part]
            assert all(held.count(key) == 4 for key in held)


@pytest.mark.parametrize("problem", PROBED, ids=str)
def test_masks_cancel_and_only_the_small_product_is_left(problem: Problem) -> None:
    """AUD-1, in Fractions from the operands as the op reads them: a triple is what it says, and its output would be `small`."""
    op = ops()[problem.op]
    case = probes.battery(op, problem)[0]
    operands = probes.probe_operands(op, case)
    columns = problem.dim("n")
    probe = probes.probed(op, case, operands, np.zeros((64, columns), dtype=np.uint32 if "f32" in str(problem) else np.uint16))
    found = list(probes.triples(op, probe))
    assert len(found) >= 300
    rows, places = {}, {}
    for row in range(64):
        live = np.flatnonzero(np.abs(probe.a[row]) == np.abs(probe.a[row]).max())
        rows[tuple(live.tolist())] = row
    for item in found[:: len(found) // 40]:
        row = rows[item.first, item.second]
        sums = {
            column: sum((Fraction(float(x)) * Fraction(float(y)) for x, y in zip(probe.a[row], probe.w[column], strict=True)
                         if x and y), Fraction(0))
            for column in range(columns) if probe.w[column, item.place]
        }
        places[item.place] = sums
        assert Fraction(item.small) in sums.values()
        assert item.gap >= 2


def test_a_probe_needs_room_and_a_matrix_product() -> None:
    with pytest.raises(DomainError, match="only matrix products"):
        probes.probe_operands(ops()["int4_pack"], Case(Problem("int4_pack", "gptq", (), ()), probes.CUT, 1))
    small = make_problem(ops()["gemm_w8a8_fp8"], "scaled", {"m": 8, "n": 64, "k": 1024})
    with pytest.raises(DomainError, match="needs m of at least 64, n of at least 64"):
        listed_of(str(Case(small, probes.ORDER, 1)))
    with pytest.raises(DomainError, match="n of at least 128"):  # columns with and without block scales
        listed_of("gemm_w4a8_fp8/exact/m64n64k1024g128/bf16/audit_order/s1")
    with pytest.raises(DomainError):
        listed_of("gemm_w8a8_fp8/scaled/m64n64k1024/bf16/audit_nothing/s1")


def test_a_problem_is_measured_by_the_battery_of_its_formats() -> None:
    op = ops()["gemm_w8a8_fp8"]
    other = make_problem(op, "scaled", {"m": 3, "n": 8, "k": 32}, {"out": "f16", "format": "fnuz", "bias": "bias"})
    assert str(probes.subject_of(op, other)) == "gemm_w8a8_fp8/scaled/m64n64k1024/f16.fnuz"


# The readings: the audit's own proof ---------------------------------------------------------------------------------

W8, W8Z = "gemm_w8a8_fp8/scaled/m64n64k1024/bf16", "gemm_w8a8_fp8/scaled/m64n64k1024/bf16.fnuz"
BF, HALF = "gemm_w4a16/sym/m64n128k1024g128/bf16", "gemm_w4a16/sym/m64n128k1024g128/f16"
FP4 = "gemm_nvfp4/plain/m64n128k1024r0/bf16"

TABLE = [
    (W8, "hopper_wgmma_fp8", 0, 1), (W8, "hopper_wgmma_fp8,segment=128", 128, 1), (W8, "hopper_wgmma_fp8,splits=2", 0, 2),
    (W8, "hopper_wgmma_fp8,splits=7", 0, 7), (W8, "hopper_wgmma_fp8,segment=128,splits=2", 128, 2),
    (W8, "blackwell_f8f6f4,segment=64,splits=4", 64, 4), (W8, "blackwell_f8f6f4,segment=256", 256, 1),
    (W8, "hopper_wgmma_fp8_f16", 0, 1), (W8, "hopper_mma_fp8", 32, 1), (W8, "hopper_mma_fp8_f16", 32, 1),
    (W8, "hopper_mma_fp8,splits=2", 32, 2), (W8, "blackwell_mma_fp8", 32, 1), (W8, "ada_fp8", 0, 1), (W8, "ada_fp8_f16", 0, 1),
    (W8, "blackwell_f8f6f4", 0, 1), (W8, "blackwell_f8f6f4_f16", 0, 1), (W8, "blackwell_f8f6f4,splits=3", 0, 3),
    (W8Z, "cdna3_fp8", 0, 1), (W8, "ieee_f32", 0, 1), (W8, "ieee_f32_rz", 0, 1), (W8, "ieee_f32_unfused", 0, 1),
    (W8, "ieee_f16", 0, 1), (W8, "ieee_bf16", 0, 1), (W8, "ieee_f32,splits=16", 0, 16),
    (HALF, "volta_f16", 0, 1), (HALF, "turing_f16", 0, 1), (HALF, "ampere_f16", 0, 1), (HALF, "ampere_f16_f16", 0, 1),
    (HALF, "ada_f16", 0, 1), (HALF, "hopper_f16", 0, 1), (HALF, "hopper_f16_f16", 0, 1), (HALF, "blackwell_f16", 0, 1),
    (HALF, "cdna1_f16", 0, 1), (HALF, "cdna2_f16", 0, 1), (HALF, "cdna3_f16", 0, 1),
    (BF, "ampere_bf16", 0, 1), (BF, "ada_bf16", 0, 1), (BF, "hopper_bf16", 0, 1), (BF, "blackwell_bf16", 0, 1),
    (BF, "hopper_bf16,splits=8", 0, 8), (BF, "cdna1_bf16", 0, 1), (BF, "cdna2_bf16", 0, 1), (BF, "cdna2_bf16_1k", 0, 1),
    (BF, "cdna3_bf16", 0, 1), (FP4, "blackwell_nvfp4", 0, 1), (FP4, "blackwell_nvfp4,splits=2", 0, 2),
]
"""Problem, simulator, and by hand: k between promotions (the emulated fp8 instruction starts every 32 from zero) and splits."""

_WORD = {Rounding.RNE: "nearest", Rounding.RZ: "truncated"}


@pytest.mark.parametrize(("text", "argument", "segment", "splits"), TABLE, ids=[row[1] for row in TABLE])
def test_readings_are_the_numbers_of_the_record(text: str, argument: str, segment: int, splits: int) -> None:
    """AUD-6. A datapath without an alignment (IEEE, exact sums, trees) keeps as many bits below a large summand as its result has
    below its first."""
    path = DATAPATHS[argument.partition(",")[0]]
    found = read(text, argument)
    assert found.fraction_bits == Reading(path.fraction_bits or path.output_bits - 1)
    assert found.output_bits == Reading(path.output_bits)
    assert found.output_rounding == Reading(_WORD[path.output_rounding])
    assert found.chunk == Reading(path.products)
    assert found.segment == Reading(segment)
    assert found.splits == Reading(splits)
    interleaved = path.family is Family.EMULATED_PAIRS
    assert found.order == Reading("ascending, nodes interleaved" if interleaved else "ascending")
    if path.fraction_bits:
        floors = path.family is Family.TRUNCATED_PAIRS  # what joins its two sums is a floor
        assert found.alignment_rounding == Reading("floored" if floors else _WORD[path.alignment_rounding])
        assert found.normalised == Reading("no")


def test_a_few_fingerprints_by_hand() -> None:
    """The published figures of three units, written out."""
    wgmma = read(W8, "hopper_wgmma_fp8,segment=128")
    assert [str(getattr(wgmma, name)) for name in ("fraction_bits", "output_bits", "chunk", "segment", "running_bits")] == [
        "13", "14", "32", "128", "24",
    ]
    mma = read(W8, "hopper_mma_fp8")
    assert [str(getattr(mma, name)) for name in ("fraction_bits", "output_bits", "chunk", "order")] == [
        "25", "24", "16", "ascending, nodes interleaved",
    ]
    fp4 = read(FP4, "blackwell_nvfp4")
    assert [str(getattr(fp4, name)) for name in ("fraction_bits", "output_bits", "chunk")] == ["35", "24", "64"]


@pytest.mark.parametrize("change", [
    {"fraction_bits": 12}, {"fraction_bits": 14}, {"output_bits": 13}, {"output_rounding": Rounding.RNE}, {"products": 16},
    {"alignment_rounding": Rounding.FLOOR}, {"normalised": 1},
], ids=str)
def test_one_altered_feature_alters_the_fingerprint(change: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each feature of a record shows in exactly the readings that name it."""
    honest = read(W8, "hopper_wgmma_fp8")
    monkeypatch.setitem(DATAPATHS, "altered", replace(DATAPATHS["hopper_wgmma_fp8"], name="altered", **change))  # type: ignore[arg-type]
    found = read(W8, "altered")
    names = {"products": "chunk"} | {name: name for name in ("fraction_bits", "output_bits", "output_rounding", "normalised")}
    names["alignment_rounding"] = "alignment_rounding"
    (feature,) = change
    assert getattr(found, names[feature]) != getattr(honest, names[feature])


def test_what_operands_cannot_show_is_said() -> None:
    """int8 x int4 sums exactly within a group: only the running total shows. int4 weights under one scale span 20 bits: 25 cannot
    be told from 23, 13 can."""
    exact = read("gemm_w4a8_int8/direct/m64n128k1024g128/bf16", "imma_s32")
    assert str(exact.chunk).startswith("not identifiable")
    assert str(exact.segment) == "not identifiable: sums of neighbouring k lost nothing"
    assert (exact.running_bits, exact.splits, exact.order) == (Reading(24), Reading(1), Reading("ascending"))
    split = read("gemm_int4/half/m64n128k1024r0/f16", "imma_s32,splits=2")
    assert (split.running_bits, split.splits) == (Reading(11), Reading(2))
    folded = "gemm_w4a8_fp8/folded/m64n128k1024g128/bf16"
    wide, narrow = read(folded, "blackwell_f8f6f4"), read(folded, "hopper_wgmma_fp8")
    assert (str(wide.fraction_bits), str(wide.output_bits), str(narrow.fraction_bits)) == ("at least 23", "at least 24", "13")
    assert (wide.segment, wide.splits, narrow.chunk) == (Reading(0), Reading(1), Reading(32))
    halves = read(W8, "hopper_wgmma_fp8,splits=2")  # 640, 770 and 900 of 1,024 lie in one half
    assert str(halves.running_bits).startswith("not identifiable: the probes do not lie in three parts of K")
    double = read(W8, "ieee_f64")
    assert (double.fraction_bits.bound, double.fraction_bits.number, double.order.bound) == ("at least", 33, "none")
