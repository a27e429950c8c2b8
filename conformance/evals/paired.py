"""What two arms that answered the same questions say of each other, and what they could not have said.

Decides: p-values, intervals, the smallest difference that would have been seen, and the verdict on a table of paired outcomes.
Refuses: unpaired comparisons, and the word SERVES where the data could not have shown otherwise: that is INCONCLUSIVE.

A table counts questions by (reference right, backend right). Only the two discordant counts bear on a difference.
Differences are backend minus reference, as a share of all questions: negative means that the backend is worse.
Sources: exact McNemar test, a binomial test of the discordant pairs against 1/2; score interval for a difference of paired
proportions, T. Tango, Statistics in Medicine 17 (1998) 891; both need nothing but the four counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

__all__ = [
    "Comparison", "Interval", "Outcome", "Table", "bootstrap_ratio", "compare", "detectable", "difference_interval", "mcnemar",
    "power", "table_of",
]

_Floats = npt.NDArray[np.float64]


class Outcome(StrEnum):
    """What may be said of the backend's arm."""

    SERVES = "SERVES"  # the whole interval of the difference lies above minus the margin
    DRIFTS = "DRIFTS"  # not so, the whole interval lies below zero, and the exact test agrees
    INCONCLUSIVE = "INCONCLUSIVE"  # the questions asked can say neither


@dataclass(frozen=True, slots=True)
class Table:
    """Questions by outcome: both right, reference alone, backend alone, neither."""

    both: int
    reference_only: int
    backend_only: int
    neither: int

    def __post_init__(self) -> None:
        if min(self.both, self.reference_only, self.backend_only, self.neither) < 0 or not self.questions:
            raise ValueError(f"a paired table needs counts of at least 0 and one question, got {self}")

    @property
    def questions(self) -> int:
        """All questions."""
        return self.both + self.reference_only + self.backend_only + self.neither

    @property
    def discordant(self) -> int:
        """Questions that one arm answered right and the other did not."""
        return self.reference_only + self.backend_only

    @property
    def difference(self) -> Fraction:
        """Accuracy of the backend minus that of the reference."""
        return Fraction(self.backend_only - self.reference_only, self.questions)


@dataclass(frozen=True, slots=True)
class Interval:
    """Lower and upper limit of a confidence interval."""

    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that is said of one task. `margin`, `detectable`: shares of all questions, positive."""

    table: Table
    p_value: float
    interval: Interval
    confidence: float
    margin: float
    detectable: float
    outcome: Outcome


def table_of(pairs: Iterable[tuple[bool, bool]]) -> Table:
    """The table of (reference right, backend right) per question."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for reference, backend in pairs:
        counts[bool(reference), bool(backend)] += 1
    return Table(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def mcnemar(table: Table) -> Fraction:
    """Two-sided exact p-value: how likely so uneven a split of the discordant pairs is when both arms are equally good."""
    fewer, all_ = min(table.reference_only, table.backend_only), table.discordant
    tail = sum(math.comb(all_, count) for count in range(fewer + 1))
    return min(Fraction(1), Fraction(2 * tail, 2**all_))


def _score(table: Table, delta: float) -> float:
    """Tango's statistic for the hypothesis that the true difference is `delta`: standard normal where it is."""
    n, up, down = table.questions, table.backend_only, table.reference_only
    b = -up - down + (2 * n - up + down) * delta
    c = -down * delta * (1 - delta)
    root = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * root + delta * (1 - delta))
    distance = up - down - n * delta
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def difference_interval(table: Table, confidence: float = 0.95) -> Interval:
    """Score interval of the difference of the accuracies, two-sided."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = float(table.difference)

    def limit(outside: float, wanted: float) -> float:
        inside = middle  # the score falls as delta grows: at the estimate it is 0, at the outer end beyond `wanted`
        for _ in range(200):
            between = (inside + outside) / 2
            if between in (inside, outside):
                break
            if abs(_score(table, between)) < abs(wanted):
                inside = between
            else:
                outside = between
        return outside

    return Interval(limit(-1.0, z), limit(1.0, -z))


def power(questions: int, discordance: float, difference: float, level: float = 0.05) -> float:
    """Chance that McNemar's exact test at `level` rejects, where a share `discordance` of the questions comes out differently and
    the accuracies differ by `difference` (of either sign, at most `discordance` in size)."""
    if not 0 < abs(difference) <= discordance <= 1:
        raise ValueError(f"need 0 < |difference| <= discordance <= 1, got {difference} and {discordance}")
    share = (1 + abs(difference) / discordance) / 2
    pairs = np.arange(1, questions + 1)  # how many discordant questions there may be
    fewer = binom.ppf(level / 2, pairs, 0.5)
    fewer = np.where(binom.cdf(fewer, pairs, 0.5) > level / 2, fewer - 1, fewer)  # -1: no split of so few pairs rejects
    rejected = binom.cdf(fewer, pairs, share) + binom.sf(pairs - fewer - 1, pairs, share)
    return float((binom.pmf(pairs, questions, discordance) * rejected).sum())


def detectable(questions: int, discordance: float, *, wanted: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that the test would have found with probability `wanted`; where no difference within the
    observed discordance would have been, the share of questions that would all have to turn out worse."""
    low, high = 0.0, max(discordance, 1 / questions)
    while high < 1 and power(questions, high, high, level) < wanted:  # every discordant question on one side: the strongest case
        low, high = high, min(1.0, high * 1.25)
    for _ in range(20):
        middle = (low + high) / 2
        if power(questions, max(discordance, middle), middle, level) < wanted:
            low = middle
        else:
            high = middle
    return high


def compare(table: Table, *, margin: float, confidence: float = 0.95) -> Comparison:
    """Test, interval, power and verdict of one task. `margin`: the loss of accuracy that would be acceptable, as a share."""
    if not 0 < margin < 1:
        raise ValueError(f"the margin is a share of the questions between 0 and 1, got {margin}; one point is 0.01")
    found, p_value = difference_interval(table, confidence), float(mcnemar(table))
    worse = Outcome.DRIFTS if found.upper < 0 and p_value < 1 - confidence else Outcome.INCONCLUSIVE  # few pairs: exact test
    outcome = Outcome.SERVES if found.lower > -margin else worse
    seen = detectable(table.questions, table.discordant / table.questions, level=1 - confidence)
    return Comparison(table, p_value, found, confidence, margin, seen, outcome)


def bootstrap_ratio(
    numerator: Sequence[_Floats], denominator: Sequence[_Floats], *, confidence: float = 0.95, draws: int = 2000, seed: int = 1,
) -> Interval:
    """Interval of mean(numerator) / mean(denominator) over tokens, where entry i of both holds the values of text i: whole texts
    are drawn with replacement, because the tokens of a text are not independent. Percentile bootstrap by Philox. A denominator
    with a value that is not finite bounds nothing: the interval is 0 to infinity."""
    if len(numerator) != len(denominator) or len(numerator) < 2:
        raise ValueError(f"need the same two or more texts in both arms, got {len(numerator)} and {len(denominator)}")
    above = np.array([values.sum() for values in numerator])
    below = np.array([values.sum() for values in denominator])
    if not np.isfinite(below).all():  # a finite mean over an infinite one is 0, the best ratio there is
        return Interval(0.0, math.inf)
    sizes = np.array([[len(values) for values in side] for side in (numerator, denominator)])
    picked = np.random.Generator(np.random.Philox(seed)).integers(0, len(above), (draws, len(above)))
    means = above[picked].sum(1) / sizes[0][picked].sum(1), below[picked].sum(1) / sizes[1][picked].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(means[1] > 0, means[0] / means[1], np.where(means[0] > 0, np.inf, 1.0))
    lower, upper = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2], method="nearest")
    return Interval(float(lower), float(upper))
