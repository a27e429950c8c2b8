"""Where a declaration says that K is cut (DEC-6, DEC-7): what is refused, what a sample is judged by, and that the loop, the
audit, bundles and messages hold it to the bit. The numbers themselves are the matter of test_interpret."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lowbit.conformance import audit_findings as findings
from lowbit.conformance import session
from lowbit.conformance.bounds import accumulator_bits, check_declaration, gemm_expect, sample_of
from lowbit.conformance.bundle import declaration_from_data, declaration_to_data
from lowbit.conformance.case import Case, Operands
from lowbit.conformance.op import Op, parse_case, parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.report import CONSISTENT, REFUTED
from lowbit.conformance.run import Plan, Session, run_one
from lowbit.conformance.verdict import Status
from lowbit.conformance.worker import Worker
from lowbit.conformance.worker_messages import check_record, decode_frame, encode_frame
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import (
    Claim,
    Contraction,
    Cut,
    Declaration,
    Order,
    cast,
    determined,
    misfit,
    mul,
    restricted,
    text_of,
)
from lowbit.references.formats import BF16, F16, F32

BACKENDS = Path(__file__).with_name("cut_backends.py")
WGMMA = DATAPATHS["hopper_wgmma_fp8"]
WHOLE = Cut((0, 3), (0, 16), (64, 256))


def said(name: str) -> str:
    return f"python:{BACKENDS}:{name}"


# What is refused -----------------------------------------------------------------------------------------------------------


def product(*cuts: Cut, **more: object) -> Contraction:
    return replace(Contraction(("a", "w"), WGMMA, cuts=cuts), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("item", "said"), [
    (product(WHOLE), ""),
    (product(Cut((0, 3), (0, 8), (256,)), Cut((0, 1), (8, 16), (32, 64, 256)), Cut((1, 3), (8, 16), (224, 256))), ""),
    (product(Cut((0, 3), (0, 8), (256,))), "rectangles of which 0 hold row 0, column 8, expected exactly one"),
    (product(WHOLE, Cut((2, 3), (15, 16), (256,))), "rectangles of which 2 hold row 2, column 15, expected exactly one"),
    (product(Cut((0, 4), (0, 16), (256,))), "a rectangle of rows (0, 4) and columns (0, 16), expected one inside D of 3 x 16"),
    (product(WHOLE, Cut((1, 1), (0, 16), (256,))), "a rectangle of rows (1, 1) and columns (0, 16), expected one inside D"),
    (product(Cut((0, 3), (0, 16), (64,))), "parts of K that end at (64,), expected positions that ascend to K = 256"),
    (product(Cut((0, 3), (0, 16), ())), "parts of K that end at (), expected positions that ascend to K = 256"),
    (product(Cut((0, 3), (0, 16), (64, 64, 256))), "parts of K that end at (64, 64, 256), expected positions that ascend"),
    (product(Cut((0, 3), (0, 16), (0, 256))), "parts of K that end at (0, 256), expected positions that ascend to K = 256"),
    (product(Cut((0, 3), (0, 16), (48, 256))), "parts of K that end at (48, 256), expected multiples of 32 before K = 256"),
    (product(WHOLE, segment=128), "parts of K that end at (64, 256), expected multiples of 128 before K = 256"),
    (product(WHOLE, k_order=tuple(range(128))), "parts of K that end at (64, 256), expected multiples of 128 before K = 256"),
    (product(WHOLE, splits=2), "cuts of K and 2 splits, expected one of both"),
    (product(k_order=(0, 2, 1, 1)), "an order of K of (0, 2, 1, 1), expected a permutation of 0 to 3"),
    (product(k_order=(1, 0), order=Order.UNKNOWN), "and that the order is not unknown"),
    (product(k_order=(2, 1, 0)), "an order of each 3 of K, expected one of which K = 256, segments and splits are whole"),
    (product(k_order=tuple(range(128)), segment=64), "an order of each 128 of K, expected one of which K = 256, segments"),
    (product(k_order=tuple(range(128)), splits=2), "an order of each 128 of K, expected one of which K = 256, segments"),
], ids=str)
def test_cuts_that_do_not_fit_the_product_are_refused(item: Contraction, said: str) -> None:
    """D of 3 x 16, K = 256, instructions of 32 k; before anything is computed."""
    found = misfit(item, 3, 16, 256)
    assert found == said if not said else said in found
    problem = parse_problem("gemm_w4a8_fp8/folded/m3n16k256g64/bf16", ops())
    wrong, _ = check_declaration(ops()["gemm_w4a8_fp8"], problem, Declaration((item, *TAIL)))
    if not said:
        assert wrong == ""
    elif item.segment:
        assert wrong
    else:
        assert wrong.startswith(f"a, w: got {found} (clauses DEC-6 and DEC-7)")


TAIL = (mul("token_scale"), mul("channel_scale"), cast(BF16))


def test_experts_have_no_cuts() -> None:
    problem = parse_problem("gemm_w4a8_fp8_grouped/folded/e2m3n16k256g64/bf16", ops())
    wrong, _ = check_declaration(ops()[problem.op], problem, Declaration((product(WHOLE), *TAIL)))
    assert wrong.startswith("gemm_w4a8_fp8_grouped has experts, and cuts of K speak of the rows of one product alone")


def test_parts_are_told_and_narrow_a_reduction() -> None:
    """A reduction in binary16 is a place of 11 bits that the sums pass; an undivided K does not pass it."""
    assert accumulator_bits(product(WHOLE, reduction=F16)) == 11
    assert accumulator_bits(product(replace(WHOLE, ends=(256,)), reduction=F16)) == 14
    text = text_of(Declaration((product(WHOLE, k_order=(1, 0)), *TAIL)))
    assert "K cut by rectangle of D, parts added in f32, 2 of K in the order 1 0" in text


# Samples -------------------------------------------------------------------------------------------------------------------


def test_rectangles_of_a_sample_are_those_that_its_elements_lie_in() -> None:
    """Rows 1, 4, 5 and columns 0, 7 of 6 x 8: of quarters at row 3 and column 4 each keeps its own; one of no row is gone."""
    cuts = (Cut((0, 3), (0, 4), (32, 64)), Cut((0, 3), (4, 8), (64,)), Cut((3, 4), (0, 8), (64,)), Cut((4, 6), (0, 8), (32, 64)))
    found = restricted(Declaration((product(*cuts), *TAIL)), np.array([1, 4, 5]), np.array([0, 7]))
    main = findings.main_contraction(found)
    assert main.cuts == (Cut((0, 1), (0, 1), (32, 64)), Cut((0, 1), (1, 2), (64,)), Cut((1, 3), (0, 2), (32, 64)))
    assert misfit(main, 3, 2, 64) == ""
    with pytest.raises(ValueError, match="do not ascend"):
        restricted(found, np.array([2, 1]), np.array([0]))


def test_a_sample_is_judged_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """ADM-7, DEC-6: admissible codes of sampled elements are theirs among all of D."""
    case = parse_case("gemm_w4a8_fp8/folded/m200n200k1024g128/bf16/normal/s1", ops())
    op, operands = ops()["gemm_w4a8_fp8"], draw_operands(ops()["gemm_w4a8_fp8"], case)
    with Worker(said("honest")) as worker:
        declared = worker.declare(case.problem, "default")
    whole = gemm_expect(op, case, operands, declared)["d"]
    monkeypatch.setattr(session, "sample_of", partial(sample_of, limit=1))
    some, statement, cut = session._expected(op, case, operands, declared)
    assert cut is not None
    assert statement
    rows, columns = cut[2]
    assert len(rows) < 200 > len(columns)
    assert np.array_equal(some["d"].lo, whole.lo[np.ix_(rows, columns)])
    uncut = findings.main_contraction(declared)
    plain = replace(declared, program=(replace(uncut, cuts=()), *declared.program[1:]))
    assert (gemm_expect(op, case, operands, plain)["d"].lo != whole.lo).any()
    (verdict,) = run_one(str(case), said("honest"))
    assert (verdict.status, bool(verdict.sample)) == (Status.EXACT, True)
    (verdict,) = run_one(str(case), said("turned"))
    assert (verdict.status, bool(verdict.sample)) == (Status.DRIFT, True)


# The loop ------------------------------------------------------------------------------------------------------------------

FOLDED = "gemm_w4a8_fp8/folded/m9n48k1152g128/f16/normal/s1"
EXACT = "gemm_w4a8_fp8/exact/m9n48k1152g64/f16/cancel/s1"
ORDER = "gemm_w4a8_fp8/exact/m64n128k1024g128/f16/audit_order/s1"


@pytest.mark.parametrize("case", [
    FOLDED, EXACT, "gemm_w4a8_fp8/folded/m1n8k1088g64/bf16/lognormal/s2", "gemm_w4a8_fp8/exact/m7n40k64g64/bf16/special/s3",
    "gemm_w4a8_fp8/folded/m0n8k256g64/bf16/normal/s1", "gemm_w4a8_fp8/exact/m70n16k192g64/f16/onehot/s1", ORDER,
])
def test_a_backend_that_cuts_as_it_declares_is_exact(case: str) -> None:
    (verdict,) = run_one(case, said("honest"))
    assert (verdict.status, verdict.reason) == (Status.EXACT, "")


@pytest.mark.parametrize(("name", "case", "clause"), [
    ("early", FOLDED, "W4A8-2"), ("turned", FOLDED, "W4A8-2"), ("early", ORDER, "AUD-2"), ("descending", ORDER, "AUD-2"),
    ("turned", ORDER, "AUD-2"),
])
def test_one_that_cuts_elsewhere_drifts(name: str, case: str, clause: str) -> None:
    """A block too early, parts added from the last on, or a rectangle's cuts used for its neighbour. Sums in binary32 hide from
    ordinary operands in which order they were added; the masks of a probe show it."""
    (verdict,) = run_one(case, said(name))
    assert (verdict.status, verdict.clause) == (Status.DRIFT, clause)
    assert 0 < verdict.wrong < verdict.judged


def test_tactics_that_declare_the_same_share_what_is_admissible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out once per declaration and case, and each tactic judged by its own."""
    asked: list[Declaration] = []

    def counted(op: Op, case: Case, operands: Operands, declaration: Declaration) -> object:
        if str(case) == FOLDED:  # not a probe, by which the loose one is measured
            asked.append(declaration)
        return worked_out(op, case, operands, declaration)

    worked_out = session._expected
    monkeypatch.setattr(session, "_expected", counted)
    for _ in range(2):
        verdicts = run_one(FOLDED, said("several"))
        assert [(verdict.tactic, verdict.status) for verdict in verdicts] == [
            ("first", Status.EXACT), ("loose", Status.WITHIN), ("second", Status.EXACT),
        ]
    assert [declaration.claim for declaration in asked] == [Claim.BIT_EXACT, Claim.BOUNDED] * 2


# The audit -----------------------------------------------------------------------------------------------------------------


def finding(name: str, variant: str) -> findings.Found:
    problem = parse_problem(f"gemm_w4a8_fp8/{variant}/m64n128k1024g128/bf16", ops())
    with Worker(said(name)) as worker:
        asked = Session(Plan(said(name)), worker)
        asked.open()
        found = asked.finding(ops()[problem.op], problem, "default")
    assert found is not None
    return found


@pytest.mark.parametrize("variant", ["folded", "exact"])
def test_probes_of_declared_cuts_are_judged_by_bits(variant: str) -> None:
    """AUD-2: the order is known, and an honest backend is not accused."""
    honest = finding("honest", variant)
    assert (honest.record.standing, honest.record.said) == (CONSISTENT, "")
    assert findings.known_order(honest.declaration)


def test_a_false_cut_is_refuted() -> None:
    turned = finding("turned", "folded")
    assert (turned.record.standing, bool(turned.record.counterexample)) == (REFUTED, True)


@pytest.mark.parametrize("variant", ["folded", "exact"])
def test_totals_in_unknown_order_are_no_known_order(variant: str) -> None:
    """AUD-3: of several groups the order is open, though there are no splits; the true declaration was once called refuted."""
    found = finding("unordered", variant)
    assert not findings.known_order(found.declaration)
    assert found.record.standing != REFUTED


@pytest.mark.parametrize(("item", "known"), [
    (product(), True), (product(order=Order.UNKNOWN), False), (product(reduction_order=Order.UNKNOWN), True),
    (product(reduction_order=Order.UNKNOWN, segment=64), False), (product(reduction_order=Order.UNKNOWN, splits=2), False),
    (product(WHOLE, reduction_order=Order.UNKNOWN), False),
    (product(replace(WHOLE, ends=(256,)), reduction_order=Order.UNKNOWN), True),
    (product(WHOLE), True), (product(datapath=DATAPATHS["imma_s32"], order=Order.UNKNOWN), True),
    (product(datapath=DATAPATHS["imma_s32"], order=Order.UNKNOWN, reduction_order=Order.UNKNOWN, segment=64), False),
], ids=str)
def test_what_leaves_the_order_of_a_sum_open(item: Contraction, known: bool) -> None:
    """DEC-4: K within a sum, unless it is of integers; totals of segments and parts, where there are several."""
    declaration = Declaration((item, *TAIL))
    assert determined(item) is findings.known_order(declaration) is known


# Files and messages --------------------------------------------------------------------------------------------------------

DECLARED = Declaration((product(WHOLE, segment=64, steps=(mul("group_scale"),), running=F32, k_order=(1, 0)), *TAIL))


def _through_frame(declaration: Declaration) -> Declaration:
    data = bytearray(b"".join(bytes(part) for part in encode_frame(declaration)))

    def read(size: int) -> bytearray:
        part = data[:size]
        del data[:size]
        return part

    found: Declaration = decode_frame(read)
    return found


@pytest.mark.parametrize("carried", [_through_frame, lambda item: declaration_from_data(declaration_to_data(item))])
def test_cuts_go_through_files_and_messages(carried: Callable[[Declaration], Declaration]) -> None:
    assert carried(DECLARED) == DECLARED


@pytest.mark.parametrize(("cut", "said"), [
    ((0, 3), r"cuts\[0\]: got .* expected Cut"), (Cut([0, 3], (0, 16), (256,)), r"cuts\[0\].rows: got"),  # type: ignore[arg-type]
    (Cut((0, 3, 4), (0, 16), (256,)), r"cuts\[0\].rows: got"),  # type: ignore[arg-type]
    (Cut((0, 3), (0, 16), (256.0,)), r"cuts\[0\].ends\[0\]: got"),  # type: ignore[arg-type]
    (Cut((0, True), (0, 16), (256,)), r"cuts\[0\].rows\[1\]: got 'True'"),
])
def test_records_of_other_types_are_refused(cut: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_record(Declaration((product(cut),)), Declaration)  # type: ignore[arg-type]
