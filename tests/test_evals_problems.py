"""The generated problems: their answers by another reader, what is held out, and the wrong choices (EVA-4)."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from lowbit.conformance.evals.problems import Problem, choices, held_out, problems

TRAIN, TEST = (list(islice(problems(11, test=test), 3000)) for test in (False, True))


def read(question: str) -> int:
    """The answer, from the words of the question alone."""
    first, *told, asked = re.findall(r"[^.?]+[.?]", question)
    start = re.fullmatch(r"\w+ has (\d+) \w+\.", first)
    assert start is not None
    number = int(start[1])
    for sentence in told:
        figures = [int(text) for text in re.findall(r"\d+", sentence)]
        if re.search(r"(buys|finds|gets) \d+ more", sentence):
            number += figures[0]
        elif re.search(r"(gives away|loses|sells) \d+", sentence):
            number -= figures[0]
        elif "shared equally among" in sentence:
            number, rest = divmod(number, figures[0])
            assert rest == 0
            assert "each one" in asked
        else:
            assert "A week later" in sentence
            number *= 2 if "doubles" in sentence else 3 if "triples" in sentence else figures[0]
    return number


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_every_answer_follows_from_its_question(split: list[Problem]) -> None:
    assert [problem for problem in split if read(problem.question) != problem.answer] == []


def test_every_line_of_a_solution_is_true_and_goes_on_from_the_last() -> None:
    signs = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for problem in TRAIN:
        *lines, last = problem.solution.split("\n")
        before = int(re.findall(r"\d+", problem.question)[0])
        for line in lines:
            found = re.fullmatch(r"(\d+)([-+*/])(\d+) = <<\1\2\3=(\d+)>>\4 \w+", line)
            assert found is not None, line
            left, sign, right, result = int(found[1]), found[2], int(found[3]), int(found[4])
            assert (left, result) == (before, signs[sign](left, right))
            assert 1 <= result <= 400
            before = result
        assert last == f"#### {problem.answer}"
        assert problem.answer == before


def test_nothing_held_out_is_in_the_training_split() -> None:
    assert not any(map(held_out, TRAIN))
    assert all(map(held_out, TEST))


def test_a_seed_is_a_sequence() -> None:
    assert list(islice(problems(11, test=False), 50)) == TRAIN[:50]
    assert list(islice(problems(12, test=False), 50)) != TRAIN[:50]


def test_every_kind_of_step_occurs() -> None:
    counts = {sign: sum(sign in re.sub(r"<<.*?>>", "", problem.solution) for problem in TRAIN) for sign in "+-*/"}
    assert min(counts.values()) > 100


def test_of_four_choices_one_is_right() -> None:
    places = []
    for problem in TEST[:500]:
        endings, place = choices(problem, 3)
        assert len(set(endings)) == 4
        assert endings[place] == problem.solution
        answers = [int(ending.rpartition("#### ")[2]) for ending in endings]
        assert [answer == problem.answer for answer in answers].count(True) == 1
        assert min(answers) > 0
        for ending, answer in zip(endings, answers, strict=True):  # a wrong choice is wrong in its last line only
            assert re.search(rf"= <<[^=]+={answer}>>{answer} \w+\n####", ending)
            assert ending.split("\n")[:-2] == problem.solution.split("\n")[:-2]
        places.append(place)
    assert {places.count(place) > 80 for place in range(4)} == {True}
