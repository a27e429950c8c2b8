"""Which cases show a fault class, per op and variant, and what level 2 says where the bounded cases of a variant do not."""

from __future__ import annotations

import pytest

from lowbit.conformance.power import blind, power_of, supplied, too_wide
from lowbit.conformance.verdict import Status, Verdict

OP = "gemm_w8a8_fp8"
SCALED, BLOCK = f"{OP}/scaled", f"{OP}/block"
_LANES = {
    "normal": ("bounded", 2), "exactw14": ("exact", 1), "onehot": ("onehot", 1), "tensors": ("tensors", 2),
    "reject": ("reject", 2),
}


def verdict(product: str, pattern: str, status: Status, number: int = 0, **power: bool) -> Verdict:
    """A verdict of one case, its power given by fault class."""
    lane, level = _LANES[pattern]
    return Verdict(f"{product}/m4n8k128/bf16/{pattern}/s{number}", "acme", "default", lane, level, status, "why", power=power)


SEEN = verdict(SCALED, "normal", Status.WITHIN, weight_step=True, zero_output=True)
UNSEEN = verdict(SCALED, "normal", Status.WITHIN, 1, weight_step=False, zero_output=True)


def judged(*verdicts: Verdict) -> tuple[list[str], list[str]]:
    """(why level 2 is refused, what it says if it is granted)."""
    return blind(verdicts, {OP}, power_of(verdicts)), supplied(verdicts, {OP})


def test_power_is_counted_per_variant_over_passing_verdicts() -> None:
    verdicts = [
        SEEN, UNSEEN, verdict(SCALED, "normal", Status.DRIFT, 2, weight_step=True, bias_dropped=True),
        verdict(BLOCK, "exactw14", Status.EXACT, scale_step=True), verdict(BLOCK, "normal", Status.UNSUPPORTED),
    ]
    assert power_of(verdicts) == {
        BLOCK: {"scale_step": 1}, SCALED: {"bias_dropped": 0, "weight_step": 1, "zero_output": 2},
    }


def test_one_bounded_case_that_shows_is_enough() -> None:
    assert judged(SEEN, UNSEEN) == ([], [])
    assert judged(UNSEEN, verdict(SCALED, "tensors", Status.WITHIN, weight_step=True)) == ([], [])


def test_another_variant_shows_nothing() -> None:
    """`scaled` shows its weights; that says nothing of `block`."""
    reasons, _ = judged(SEEN, verdict(BLOCK, "normal", Status.WITHIN, weight_step=False))
    assert reasons == [f"{BLOCK}: no passing case would have shown weight_step"]


def test_a_point_stands_in_where_intervals_are_too_wide_and_is_named() -> None:
    point = verdict(SCALED, "exactw14", Status.EXACT, weight_step=True)
    probe = verdict(SCALED, "onehot", Status.EXACT, weight_step=True)
    assert too_wide([UNSEEN, point, probe]) == {SCALED: {"weight_step": ("exact", "onehot")}}
    assert judged(UNSEEN, point, probe) == ([], [
        f"{SCALED}: declared arithmetic too wide: no bounded case would have shown weight_step (shown by exact, onehot)"
    ])


@pytest.mark.parametrize("witness", [
    verdict(SCALED, "exactw14", Status.WITHIN, weight_step=True), verdict(BLOCK, "exactw14", Status.EXACT, weight_step=True),
], ids=["an interval", "another variant"])
def test_what_does_not_stand_in(witness: Verdict) -> None:
    reasons, _ = judged(UNSEEN, witness)
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{SCALED}: ")
    assert "weight_step" in reasons[0]


def test_an_interval_of_an_exact_lane_is_named_as_too_wide() -> None:
    (reason,), _ = judged(UNSEEN, verdict(SCALED, "exactw14", Status.WITHIN, weight_step=True))
    assert reason == (f"{SCALED}: declared arithmetic too wide: neither a bounded case nor one that is judged to a point would "
                      "have shown weight_step")


def test_a_class_that_bounded_cases_were_not_searched_for_needs_any_passing_case() -> None:
    assert judged(SEEN, verdict(SCALED, "exactw14", Status.EXACT, bias_dropped=True)) == ([], [])
    reasons, _ = judged(SEEN, verdict(SCALED, "exactw14", Status.EXACT, bias_dropped=False))
    assert reasons == [f"{SCALED}: no passing case would have shown bias_dropped"]


def test_a_product_without_power_is_refused_and_what_is_not_claimed_is_not_asked() -> None:
    bare = verdict(BLOCK, "normal", Status.WITHIN)
    assert judged(SEEN, bare)[0] == [f"{BLOCK}: the power of its cases was not measured"]
    assert judged(SEEN, verdict(BLOCK, "normal", Status.UNSUPPORTED), verdict(BLOCK, "reject", Status.EXACT)) == ([], [])
    assert blind([bare], set(), {}) == []
