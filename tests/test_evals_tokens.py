"""The per-token test: divergences by hand, verdicts at their borders, and answers that survive a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lowbit.conformance.evals.answers import Answers, EvalError, claim_folder
from lowbit.conformance.evals.paired import Outcome
from lowbit.conformance.evals.tokens import TextDifference, compare_tokens, ratio_of, text_difference


def test_divergence_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2 = ln 2 / 4; the likeliest token changes.
    p, q = (torch.tensor([[math.log(share) for share in row]]) for row in ((0.5, 0.25, 0.25), (0.25, 0.5, 0.25)))
    found = text_difference(torch.cat([p, p, q]), torch.cat([p, q + 3.0, q]))  # a constant on all logits changes nothing
    assert found.kl[0] == 0.0
    assert abs(found.kl[1] - math.log(2) / 4) < 1e-7
    assert (found.flips, found.first) == (1, 1)


def test_direction_is_from_the_reference() -> None:
    # KL(p || q) with p = (1/2, 1/2), q = (1/4, 3/4) is ln 2 - ln 3 / 2; the other way round it is 3/4 ln 3 - ln 2.
    p, q = (torch.tensor([[math.log(share) for share in row]], dtype=torch.float64) for row in ((0.5, 0.5), (0.25, 0.75)))
    assert abs(text_difference(p, q).kl[0] - (math.log(2) - math.log(3) / 2)) < 1e-12
    assert abs(text_difference(q, p).kl[0] - (0.75 * math.log(3) - math.log(2))) < 1e-12


def test_logits_that_are_no_numbers_are_infinitely_far() -> None:
    found = text_difference(torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [math.nan, 0.0, 0.0]]))
    assert found.kl == (0.0, math.inf)


def test_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^need logits \[T, V\] of one shape and T of at least 1, got \[2, 3\] and \[2, 4\]$"):
        text_difference(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="T of at least 1"):
        text_difference(torch.zeros(0, 3), torch.zeros(0, 3))


def texts(*values: float) -> list[TextDifference]:
    return [TextDifference((value, value), 0, -1) for value in values]


@pytest.mark.parametrize(
    ("backend", "outcome"),
    [
        ((1.0, 1.0, 1.0), Outcome.SERVES), ((4.0, 4.0, 4.0), Outcome.SERVES), ((4.5, 4.5, 4.5), Outcome.DRIFTS),
        ((1.0, 9.0, 1.0), Outcome.INCONCLUSIVE), ((0.0, 0.0, 0.0), Outcome.SERVES), ((math.inf, 1.0, 1.0), Outcome.INCONCLUSIVE),
        ((math.inf, math.inf, math.inf), Outcome.DRIFTS),
    ],
)
def test_verdicts(backend: tuple[float, ...], outcome: Outcome) -> None:
    assert compare_tokens(texts(*backend), texts(1.0, 1.0, 1.0)).outcome is outcome


def test_without_any_noise() -> None:
    assert compare_tokens(texts(0.0, 0.0), texts(0.0, 0.0)).outcome is Outcome.SERVES
    found = compare_tokens(texts(1e-9, 1e-9), texts(0.0, 0.0))
    assert found.outcome is Outcome.DRIFTS
    assert (found.ratio.lower, found.ratio.upper) == (None, None)


@pytest.mark.parametrize("backend", [(0.0, 0.0, 0.0), (9.0, 9.0, 9.0), (math.inf, math.inf, math.inf)])
@pytest.mark.parametrize("floor", [(math.inf, 1.0, 1.0), (math.nan, 1.0, 1.0), (math.inf, math.inf, math.inf)])
def test_a_floor_that_is_not_finite_says_nothing(backend: tuple[float, ...], floor: tuple[float, ...]) -> None:
    found = compare_tokens(texts(*backend), texts(*floor))
    assert found.outcome is Outcome.INCONCLUSIVE
    assert (found.ratio.lower, found.ratio.upper, found.floor_kl) == (0.0, None, None)


def test_means_and_flips_are_over_tokens() -> None:
    backend = [TextDifference((1.0, 2.0, 3.0), 2, 1), TextDifference((6.0,), 0, -1), TextDifference((0.0, 0.0), 1, 0)]
    found = compare_tokens(backend, [TextDifference((1.0,) * len(text.kl), 0, -1) for text in backend])
    assert (found.texts, found.tokens, found.kl, found.flips) == (3, 6, 2.0, 0.5)
    assert (found.texts_flipped, found.first) == (2, 0.5)


def test_ratio_is_of_means() -> None:
    found = ratio_of([[1.0, 3.0], [2.0]], [[4.0, 4.0], [4.0]])
    assert (found.lower, found.upper) == (0.5, 0.5)


def test_answers_survive(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.jsonl"
    first = Answers(path)
    first.append({"one": "text\nwith lines", "two": [1.5, True]})
    with path.open("a") as file:
        file.write('{"key": "three", "va')  # killed while writing
    again = Answers(path)
    assert (len(again), again["one"], again["two"]) == (2, "text\nwith lines", [1.5, True])
    assert again.has(["one", "two"])
    assert not again.has(["one", "three"])
    again.append({"three": "3"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["one", "two", "three"]


def test_a_first_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"key": "o')
    assert len(Answers(path)) == 0
    assert path.read_text() == ""


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", {"seed": 1, "tasks": ["a"], "limit": None})
    claim_folder(tmp_path / "run", {"seed": 1, "tasks": ["a"], "limit": None})
    with pytest.raises(EvalError, match=r"holds answers of another run: limit was None there and is 5 here, and 1 more settings"):
        claim_folder(tmp_path / "run", {"seed": 2, "tasks": ["a"], "limit": 5})
