"""The shipped model: files as its provenance says, sizes that every recipe takes, and data that the generator gives again."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

from safetensors import safe_open

import lowbit.conformance.evals
from lowbit.conformance.evals.problems import Problem, choices, held_out, problems

FOLDER = Path(lowbit.conformance.evals.__file__).parent / "embedded"
PROVENANCE = json.loads((FOLDER / "provenance.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def distinct(count: int) -> list[Problem]:
    """The first different problems of the test split."""
    found: dict[str, Problem] = {}
    for problem in problems(PROVENANCE["seed"] + 3, test=True):
        found.setdefault(problem.question, problem)
        if len(found) == count:
            break
    return list(found.values())


def test_every_file_is_the_one_that_was_measured() -> None:
    found = {
        path.relative_to(FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FOLDER.rglob("*") if path.is_file() and path.name != "provenance.json"
    }
    assert found == PROVENANCE["sha256"]
    assert (FOLDER / "model.safetensors").stat().st_size <= 8 << 20


def test_every_linear_fits_every_recipe() -> None:
    elements = 0
    with safe_open(str(FOLDER / "model.safetensors"), framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            shape = file.get_slice(name).get_shape()
            assert file.get_slice(name).get_dtype() == "BF16"
            elements += shape[0] * (shape[1] if len(shape) == 2 else 1)
            if name.endswith("proj.weight"):
                assert shape[0] % 128 == 0
                assert shape[1] % 128 == 0
    assert elements == PROVENANCE["parameters"]


def test_the_questions_are_those_of_the_generator() -> None:
    wanted = distinct(1000)
    assert rows("test") == [{"question": problem.question, "answer": problem.solution} for problem in wanted]
    drawn = [(problem, choices(problem, PROVENANCE["seed"])) for problem in wanted]
    assert rows("choices") == [
        {"question": problem.question, "choices": list(endings), "answer": place} for problem, (endings, place) in drawn
    ]
    examples = list(islice(problems(PROVENANCE["seed"] + 4, test=False), 64))
    assert rows("train") == [{"question": problem.question, "answer": problem.solution} for problem in examples]


def test_no_example_is_a_question() -> None:
    assert all(held_out(Problem(str(row["question"]), "", 0)) for row in rows("test"))
    assert not any(held_out(Problem(str(row["question"]), "", 0)) for row in rows("train"))
