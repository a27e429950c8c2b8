"""Paired statistics against other derivations: enumeration of every outcome, brute-force likelihood, scipy (EVA-3)."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binomtest

from lowbit.conformance.evals.paired import (
    Interval,
    Outcome,
    Table,
    bootstrap_ratio,
    compare,
    detectable,
    difference_interval,
    mcnemar,
    power,
    table_of,
)

Z = NormalDist().inv_cdf(0.975)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_a_table_counts_each_question_once() -> None:
    table = table_of([(True, True), (True, False), (True, False), (False, True), (False, False)])
    assert table == Table(1, 2, 1, 1)
    assert (table.questions, table.discordant, table.difference) == (5, 3, Fraction(-1, 5))


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, -1, 0, 0)])
def test_a_table_of_nothing_is_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="a paired table needs counts of at least 0 and one question"):
        Table(*counts)


# McNemar --------------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand() -> None:
    assert mcnemar(Table(0, 9, 2, 0)) == Fraction(2 * (1 + 11 + 55), 2**11)  # at most 2 of 11 heads, on both sides
    assert mcnemar(Table(5, 0, 0, 5)) == 1
    assert mcnemar(Table(5, 3, 3, 5)) == 1
    assert mcnemar(Table(5, 0, 6, 5)) == Fraction(2, 64)


@pytest.mark.parametrize("down", range(0, 30, 3))
@pytest.mark.parametrize("up", range(1, 30, 4))
def test_mcnemar_is_the_binomial_test_of_scipy(up: int, down: int) -> None:
    ours, theirs = mcnemar(Table(7, down, up, 9)), binomtest(up, up + down, 0.5).pvalue
    assert abs(float(ours) - theirs) <= 64 * math.ulp(1.0)  # scipy sums binary64 terms, each at most 1


# Interval -------------------------------------------------------------------------------------------------------------


def _likelihood(table: Table, share: float, delta: float) -> float:
    """Log likelihood where the reference alone is right in `share` of the questions and the backend alone in share + delta."""
    rest = 1 - 2 * share - delta
    cells = ((table.reference_only, share), (table.backend_only, share + delta), (table.both + table.neither, rest))
    return sum(count * math.log(chance) if chance > 0 else -math.inf for count, chance in cells if count)


def _score(table: Table, delta: float) -> float:
    """Distance of the estimate from delta in standard deviations, the nuisance share found by golden-section search."""
    low, high = max(0.0, -delta), (1 - delta) / 2
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(120):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if _likelihood(table, left, delta) >= _likelihood(table, right, delta) else (left, high)
    share = (low + high) / 2
    n = table.questions
    return (table.backend_only - table.reference_only - n * delta) / math.sqrt(n * (2 * share + delta - delta * delta))


@pytest.mark.parametrize("table", [
    Table(54, 12, 10, 3), Table(43, 1, 3, 5), Table(500, 30, 25, 764), Table(2, 5, 1, 2), Table(0, 9, 2, 0), Table(1200, 7, 9, 3),
])
def test_at_the_limits_the_score_is_the_quantile(table: Table) -> None:
    found, step = difference_interval(table), 1e-6
    assert _score(table, found.lower - step) > Z > _score(table, found.lower + step)
    assert _score(table, found.upper - step) > -Z > _score(table, found.upper + step)


def test_exchanging_the_arms_mirrors_the_interval() -> None:
    one, other = difference_interval(Table(54, 12, 10, 3)), difference_interval(Table(54, 10, 12, 3))
    assert abs(one.lower + other.upper) < 1e-12
    assert abs(one.upper + other.lower) < 1e-12


def test_arms_that_never_differ_leave_a_difference_open() -> None:
    found = difference_interval(Table(60, 0, 0, 40))
    assert -0.05 < found.lower < -0.03  # Z^2 / (n + Z^2) = 0.037: no observed difference is no proof of none
    assert 0.03 < found.upper < 0.05


@cache
def _intervals(questions: int) -> dict[tuple[int, int], Interval]:
    return {
        (down, up): difference_interval(Table(questions - down - up, down, up, 0))
        for down in range(questions + 1) for up in range(questions + 1 - down)
    }


@pytest.mark.parametrize(("down", "up"), [(0.1, 0.1), (0.15, 0.05), (0.3, 0.2), (0.05, 0.25), (0.02, 0.08)])
def test_the_interval_covers_what_it_says(down: float, up: float) -> None:
    """Exact coverage: every outcome of 40 questions, weighted by its probability."""
    n, covered = 40, 0.0
    for (x, y), found in _intervals(n).items():
        if found.lower <= up - down <= found.upper:
            ways = math.comb(n, x) * math.comb(n - x, y)
            covered += ways * down**x * up**y * (1 - down - up) ** (n - x - y)
    assert 0.93 <= covered <= 0.985  # a score interval holds its level on the average, not at every point


# Power ----------------------------------------------------------------------------------------------------------------


def _power(questions: int, discordance: Fraction, difference: Fraction, level: Fraction) -> Fraction:
    """By enumeration of every table, with integers."""
    up, down = (discordance + difference) / 2, (discordance - difference) / 2
    total = Fraction(0)
    for x in range(questions + 1):
        for y in range(questions + 1 - x):
            if x + y and mcnemar(Table(questions - x - y, x, y, 0)) <= level:
                ways = math.comb(questions, x) * math.comb(questions - x, y)
                total += ways * down**x * up**y * (1 - discordance) ** (questions - x - y)
    return total


@pytest.mark.parametrize(("questions", "discordance", "difference"), [
    (12, "1/2", "1/2"), (20, "2/5", "1/4"), (25, "1/5", "1/10"),
])
def test_power_is_the_sum_over_all_tables(questions: int, discordance: str, difference: str) -> None:
    exact = _power(questions, Fraction(discordance), Fraction(difference), Fraction(1, 20))
    assert abs(power(questions, float(Fraction(discordance)), float(Fraction(difference))) - float(exact)) < 1e-9


@pytest.mark.parametrize(("questions", "discordance"), [(100, 0.1), (570, 0.05), (1319, 0.06)])
def test_what_is_called_detectable_is_found_four_times_in_five(questions: int, discordance: float) -> None:
    found = detectable(questions, discordance)
    assert power(questions, max(discordance, found), found) >= 0.8
    assert power(questions, max(discordance, found - 2e-3), found - 2e-3) < 0.8


def test_too_few_questions_detect_nothing() -> None:
    assert detectable(5, 0.2) == 1.0  # five discordant pairs: the smallest p-value is 1/16


@pytest.mark.parametrize(("discordance", "difference"), [(0.1, 0.2), (0.1, 0.0), (1.5, 0.1)])
def test_an_impossible_difference_is_refused(discordance: float, difference: float) -> None:
    with pytest.raises(ValueError, match=r"need 0 < \|difference\| <= discordance <= 1"):
        power(10, discordance, difference)


# Verdicts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "outcome"), [
    (Table(600, 10, 12, 378), Outcome.SERVES),
    (Table(500, 80, 20, 400), Outcome.DRIFTS),
    (Table(10, 5, 0, 1), Outcome.INCONCLUSIVE),  # the score interval ends below zero; the exact p-value of 5 to 0 is 1/16
    (Table(10, 6, 0, 0), Outcome.DRIFTS),  # that of 6 to 0 is 1/32
    (Table(20, 3, 2, 5), Outcome.INCONCLUSIVE),  # 30 questions cannot exclude a loss of one point
    (Table(480, 20, 17, 483), Outcome.INCONCLUSIVE),  # the interval begins between one and two margins below zero
    (Table(5000, 60, 20, 4920), Outcome.SERVES),  # worse beyond doubt, and by less than the margin
])
def test_the_verdict(table: Table, outcome: Outcome) -> None:
    found = compare(table, margin=0.01)
    assert found.outcome is outcome
    assert found.p_value == float(mcnemar(table))


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.01])
def test_a_margin_is_a_share(margin: float) -> None:
    with pytest.raises(ValueError, match=r"one point is 0\.01"):
        compare(Table(1, 1, 1, 1), margin=margin)


# Ratio of means -------------------------------------------------------------------------------------------------------


def test_the_ratio_of_equal_arms_is_one() -> None:
    texts = [np.array([0.5, 1.5]), np.array([2.0]), np.array([0.25, 0.25, 0.5])]
    assert bootstrap_ratio(texts, texts) == Interval(1.0, 1.0)


def test_each_arm_is_averaged_over_its_own_tokens() -> None:
    longer, shorter = [np.ones(9), np.ones(4)], [np.ones(2), np.ones(5)]
    assert bootstrap_ratio(longer, shorter) == Interval(1.0, 1.0)


def test_a_floor_of_zero_gives_infinity_unless_both_are_zero() -> None:
    zeros = [np.zeros(3), np.zeros(2)]
    assert bootstrap_ratio([np.ones(3), np.ones(2)], zeros) == Interval(math.inf, math.inf)
    assert bootstrap_ratio(zeros, zeros) == Interval(1.0, 1.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_denominator_that_is_not_finite_bounds_nothing(value: float) -> None:
    ones = [np.ones(3), np.ones(2)]
    assert bootstrap_ratio(ones, [np.ones(3), np.array([1.0, value])]) == Interval(0.0, math.inf)


def test_the_ratio_covers_the_truth() -> None:
    """200 seeded experiments with a true ratio of 2; texts of unequal length with a common factor per text."""
    draw, covered = np.random.Generator(np.random.Philox(7)), 0
    for experiment in range(200):
        sizes = draw.integers(5, 30, 40)
        shared = draw.gamma(4.0, 0.25, 40)
        above = [2 * factor * draw.exponential(1.0, size) for factor, size in zip(shared, sizes, strict=True)]
        below = [factor * draw.exponential(1.0, size) for factor, size in zip(shared, sizes, strict=True)]
        found = bootstrap_ratio(above, below, draws=400, seed=experiment)
        covered += found.lower <= 2.0 <= found.upper
    assert 178 <= covered <= 199


@pytest.mark.parametrize("texts", [1, 0])
def test_one_text_has_no_spread(texts: int) -> None:
    with pytest.raises(ValueError, match="the same two or more texts in both arms"):
        bootstrap_ratio([np.ones(3)] * texts, [np.ones(3)] * texts)
