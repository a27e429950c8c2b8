"""Which questions are asked, from which files, and how a text goes through a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowbit.conformance.evals.answers import EvalError
from lowbit.conformance.evals.models import Feed, answer_logits, load_full, source
from lowbit.conformance.evals.tasks import EMBEDDED, drawn, is_right, suite

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


def test_a_task_without_local_files_is_refused() -> None:
    with pytest.raises(EvalError, match="'hellaswag' is not read from local files; these are: embedded_choices"):
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
