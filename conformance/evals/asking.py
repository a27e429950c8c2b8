"""One arm asked by lm-eval: answers go to disk as they come, and what is on disk is not asked again.

Decides: the order (questions as drawn, requests of a question together), the batches, and the model behind them, which is only
loaded when something is left to ask. Decoding is lm-eval's: greedy wherever the task does not say otherwise.
Refuses: rolling log-likelihoods, which no task here needs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from .answers import Answered, Answers, EvalError, Told
from .tasks import Suite, is_right

__all__ = ["ask"]

_GROUP = {"generate_until": 1, "loglikelihood": 4}
"""Batches are so many times the batch size: requests of one question share their context, which costs one row for letters."""


class _Recorded(LM):  # type: ignore[misc]
    """An LM that asks another only for what is not on disk."""

    def __init__(self, answers: Answers, model: Callable[[], HFLM], batch: int, arm: str, suite: Suite, told: Told) -> None:
        super().__init__()
        self._answers, self._model, self._batch = answers, model, batch
        self._arm, self._suite, self._told = arm, suite, told

    def _key(self, request: Instance) -> str:
        question = self._suite.questions[request.task_name][request.doc_id]
        digest = hashlib.sha256(json.dumps(request.args, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return f"{request.task_name}/{question}/{request.idx}/{digest}"

    def _asked(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        keys, size = [self._key(request) for request in requests], self._batch * _GROUP[kind]
        started, before = time.monotonic(), sum(self._answers.has([key]) for key in keys)
        for at in range(0, len(requests), size):
            batch, names = list(requests[at : at + size]), keys[at : at + size]
            if self._answers.has(names):
                continue
            found = getattr(self._model(), kind)(batch, disable_tqdm=True)
            self._answers.append(dict(zip(names, found, strict=True)))
            done = min(at + size, len(requests))
            pace = (time.monotonic() - started) / max(1, done - before)
            left = pace * (len(requests) - done)
            self._told(f"{self._arm}: {self._suite.name} {done} of {len(requests)} requests, about {left:.0f} s left")
        new = len(requests) - before
        if new:
            self._told(f"{self._arm}: {self._suite.name} asked, {new} requests in {time.monotonic() - started:.0f} s")
        return [self._answers[key] for key in keys]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Texts, greedy."""
        return self._asked("generate_until", requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether it is the greedy one."""
        return [(float(value), bool(greedy)) for value, greedy in self._asked("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Refused."""
        raise EvalError("the task asks for rolling log-likelihoods, which are paired per token only; name another task")


def ask(
    suite: Suite, arm: str, answers: Answers, model: Callable[[], HFLM], *, batch: int, seed: int, told: Told
) -> list[Answered]:
    """All questions of a task, in the order of members and ids. Raises EvalError and what `model` raises."""
    asked = _Recorded(answers, model, batch, arm, suite, told)
    for member in suite.members.values():
        member.set_fewshot_seed(seed)
    ids = {name: list(questions) for name, questions in suite.questions.items()}
    found = evaluate(
        asked, {"tasks": dict(suite.members), "groups": {}}, samples=ids, bootstrap_iters=0, log_samples=True,
    )
    assert found is not None
    return [answered for name in suite.members for answered in _answered(suite, name, found["samples"][name])]


def _answered(suite: Suite, member: str, samples: Sequence[Mapping[str, Any]]) -> list[Answered]:
    by_question: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_question.setdefault(int(sample["doc_id"]), []).append(sample)
    result = []
    for question in suite.questions[member]:
        logged = by_question[question]
        arguments, responses = _arguments(logged[0]), [given[0] for given in logged[0]["resps"]]
        generated = isinstance(responses[0], str)
        if generated:
            context, answer = arguments[0][0], responses[0]
        else:
            likeliest = max(range(len(responses)), key=lambda at: float(responses[at][0]))
            context, answer = arguments[likeliest]
        kwargs = suite.members[member].get_config("generation_kwargs") or {}
        room = int(kwargs.get("max_gen_toks", 256)) if generated else 0
        result.append(Answered(f"{member}/{question}", is_right(logged), context, answer, generated, room))
    return result


def _arguments(sample: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arguments of a question's requests, in order; lm-eval logs them as lists or as a dict by number."""
    given = sample["arguments"]
    rows = list(given.values()) if isinstance(given, Mapping) else list(given)
    return [tuple(row.values()) if isinstance(row, Mapping) else (row[0], row[1]) for row in rows]
