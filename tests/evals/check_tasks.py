"""Which questions are asked, from which files, and how a text goes through a model."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from lowbit.conformance.evals.answers import EvalError
from lowbit.conformance.evals.models import Feed, answer_logits, load_full, source
from lowbit.conformance.evals.tasks import EMBEDDED, drawn, is_right, shorten, suite

SIZES = {"a": 50, "b": 3, "c": 200}


def test_questions_are_drawn_from_everywhere_and_stay() -> None:
    small, large = drawn(SIZES, 20, 7), drawn(SIZES, 120, 7)
    assert sum(map(len, small.values())) == 20
    assert all(set(small[name]) <= set(large[name]) for name in small)
    assert all(list(ids) == sorted(set(ids)) for ids in large.values())
    assert set(large["c"]) - set(range(100))  # not the first ones
    assert drawn(SIZES, 20, 7) == small
    assert drawn(SIZES, 20, 8) != small
    assert drawn(SIZES, None, 7) == {name: tuple(range(size)) for name, size in SIZES.items()}


def test_members_without_a_question_are_left_out() -> None:
    assert len(drawn(SIZES, 1, 7)) == 1


def test_local_files_are_read_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [json.dumps({"question": f"{number} and 1?", "answer": f"#### {number + 1}"}) + "\n" for number in range(9)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    found = suite("gsm8k", data=tmp_path, limit=4, seed=3, fewshot=2)
    assert found.count == 4
    member = found.members["gsm8k"]
    assert member.get_config("num_fewshot") == 2
    assert member.doc_to_text(member.eval_docs[found.questions["gsm8k"][0]]).startswith("Question: ")
    (folder / "train.jsonl").unlink()
    with pytest.raises(EvalError, match=r"^gsm8k: .*train\.jsonl is missing; --data takes a folder in the hub's layout"):
        suite("gsm8k", data=tmp_path)


def mmlu_pro(folder: Path, *, category: str = "math") -> Path:
    """Six questions and five examples in one category, as the hub lays a dataset of one configuration out."""
    place = folder / "TIGER-Lab" / "MMLU-Pro"
    place.mkdir(parents=True)
    for split, count in (("test", 6), ("validation", 5)):
        rows = [
            {
                "question_id": at, "question": f"What is {at} plus 0?", "options": [str(number) for number in range(10)],
                "answer": "ABCDEFGHIJ"[at], "answer_index": at, "category": category, "src": "made",
                "cot_content": f"A: Let's think step by step. It is {at}. The answer is ({'ABCDEFGHIJ'[at]}).",
            }
            for at in range(count)
        ]
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def test_mmlu_pro_is_read_with_its_functions(tmp_path: Path) -> None:
    """lm-eval's own task files: prompts of their functions, members by category, those without a question left out."""
    place = mmlu_pro(tmp_path)
    found = suite("mmlu_pro", data=tmp_path, limit=4, fewshot=1)
    assert (found.count, list(found.members), found.generates) == (4, ["mmlu_pro_math"], True)
    member = found.members["mmlu_pro_math"]
    options = "\n".join(f"{letter}. {number}" for number, letter in enumerate("ABCDEFGHIJ"))
    asked = "Question:\nWhat is {} plus 0?\nOptions:\n" + options + "\nAnswer: Let's think step by step."
    context = member.fewshot_context(member.eval_docs[2], num_fewshot=1)
    assert context.startswith("The following are multiple choice questions (with answers) about math. Think step by step")
    assert context.endswith(f"{asked.format(0)} It is 0. The answer is (A).\n\n{asked.format(2)}")
    (place / "validation.jsonl").unlink()
    sentence = r"^mmlu_pro_biology: .*MMLU-Pro/validation\.jsonl is missing; --data takes a folder in the hub's layout that holds"
    with pytest.raises(EvalError, match=sentence):
        suite("mmlu_pro", data=tmp_path)
    with pytest.raises(EvalError, match=r"MMLU-Pro/test\.jsonl is missing"):
        suite("mmlu_pro", data=tmp_path / "none")


def test_files_of_the_hub_are_read_as_they_are(tmp_path: Path) -> None:
    """Parquet files in a folder data, as the hub stores a dataset of one configuration."""
    place = mmlu_pro(tmp_path)
    (place / "data").mkdir()
    for split in ("test", "validation"):
        made = datasets.Dataset.from_json(str(place / f"{split}.jsonl"), cache_dir=str(tmp_path / "cache"))
        made.to_parquet(place / "data" / f"{split}-00000-of-00001.parquet")
        (place / f"{split}.jsonl").unlink()
    assert suite("mmlu_pro", data=tmp_path).questions == {"mmlu_pro_math": (0, 1, 2, 3, 4, 5)}


def test_files_without_a_question_are_refused(tmp_path: Path) -> None:
    mmlu_pro(tmp_path, category="cooking")
    with pytest.raises(EvalError, match=r"^mmlu_pro: its files hold no question; --data takes a folder"):
        suite("mmlu_pro", data=tmp_path)


def test_answers_leave_room_for_the_question(tmp_path: Path) -> None:
    mmlu_pro(tmp_path)
    found = suite("mmlu_pro", data=tmp_path)
    assert shorten(found, 4096) is None
    assert found.members["mmlu_pro_math"].get_config("generation_kwargs")["max_gen_toks"] == 2048
    said = "mmlu_pro: answers have at most 1024 tokens instead of 2048, as the model has room for 2048 in all"
    assert shorten(found, 2048) == said
    given = found.members["mmlu_pro_math"].get_config("generation_kwargs")
    assert (given["max_gen_toks"], given["until"]) == (1024, ["Question:"])


def test_a_task_without_local_files_is_refused() -> None:
    with pytest.raises(EvalError, match=r"'hellaswag' is not read from local files; these are: embedded_choices, .*, mmlu_pro$"):
        suite("hellaswag", data=Path())


def test_right_is_the_strict_match() -> None:
    samples = [
        {"filter": "flexible-extract", "exact_match": 1.0, "metrics": ["exact_match"]},
        {"filter": "strict-match", "exact_match": 0.0, "metrics": ["exact_match"]},
    ]
    assert not is_right(samples)
    assert is_right(samples[:1])
    assert is_right([{"filter": "none", "acc": 1.0, "metrics": ["acc"]}])
    with pytest.raises(EvalError, match=r"it has f1"):
        is_right([{"filter": "none", "f1": 1.0, "metrics": ["f1"]}])


def test_every_feed_predicts_the_same_tokens() -> None:
    """The same text whole, in parts and token by token: logits that differ by rounding at most, at the same places."""
    model = load_full(EMBEDDED, torch.float32, "cpu").model
    context, answer = [0, *range(20, 60)], list(range(100, 112))
    whole, parts, steps = (answer_logits(model, context, answer, feed) for feed in Feed)
    wanted = model(torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1].detach()
    assert whole.shape == wanted.shape == (12, 512)
    for found in (whole, parts, steps):
        assert float((found - wanted).abs().max()) < 1e-3  # binary32, logits of up to 30
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert answer_logits(model, context, answer[:1], Feed.STEPS).shape == (1, 512)


@pytest.mark.parametrize(("recipe", "dtype", "said"), [
    ("", "bfloat16", "holds plain weights and --recipe is ''; say how to quantise them by one of w4a16"),
    ("w4a16", "float32", "the activations of an arm are bfloat16 or float16"),
])
def test_what_cannot_be_run_is_refused_first(recipe: str, dtype: str, said: str) -> None:
    with pytest.raises(EvalError, match=said):
        source(EMBEDDED, recipe, dtype, "cpu")
