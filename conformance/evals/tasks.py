"""Tasks of an evaluation: which questions, in which words, from which files.

Decides: that words, few-shot examples, filters and metrics are those of lm-eval's own task files; that `embedded_gsm8k` is its
gsm8k task over the shipped problems, and `embedded_choices` judges the shipped solutions by their log-likelihood; which
questions are asked (a permutation by Philox from the seed, of which the first N are taken: never the first N of the file, and a
larger N keeps the smaller one's questions).
Refuses: tasks that are neither here nor known to lm-eval, and data that is not there: one sentence that says what is missing.

With a data folder, datasets are read from files below it in the hub's layout, and nothing is fetched:
FOLDER/OWNER/NAME/CONFIG/SPLIT.jsonl, or SPLIT-*.parquet in its place. A dataset of one configuration has no CONFIG, and its files
may lie in a folder data. Without, lm-eval takes them from the hub or its cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.tasks
import numpy as np
import yaml
from lm_eval.api.task import ConfigurableTask, Task

from .answers import EvalError

__all__ = ["EMBEDDED", "Suite", "drawn", "is_right", "shorten", "suite"]

EMBEDDED = Path(__file__).parent / "embedded"
"""The shipped model, its tokenizer and its data."""

_PACKAGED = Path(lm_eval.tasks.__file__).parent
_METRICS = (("exact_match", "strict-match"), ("exact_match", ""), ("acc", ""))
"""Metric and filter by which an answer is right: the first that a sample has. An empty filter is any."""


_GROUPS = {"mmlu": "mmlu/default/mmlu_*.yaml", "mmlu_pro": "mmlu_pro/mmlu_pro_*.yaml"}
"""Tasks of many members, and lm-eval's files of these."""


@dataclass(frozen=True, slots=True)
class Suite:
    """One task as asked for: its members (one for gsm8k, one per subject for mmlu), and the questions of each, ascending."""

    name: str
    members: Mapping[str, Task]
    questions: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """Questions of all members."""
        return sum(map(len, self.questions.values()))

    @property
    def generates(self) -> bool:
        """Whether answers are written, not chosen."""
        return any(member.get_config("output_type") == "generate_until" for member in self.members.values())


def drawn(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, tuple[int, ...]]:
    """Ids of questions per member, ascending, members without any left out: `limit` of all questions, drawn at random."""
    owners = [(name, at) for name, size in sizes.items() for at in range(size)]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(owners))[:limit]
    found: dict[str, list[int]] = {}
    for index in order:
        name, at = owners[index]
        found.setdefault(name, []).append(at)
    return {name: tuple(sorted(found[name])) for name in sizes if name in found}


def _packaged(path: str) -> dict[str, Any]:
    """A task file of lm-eval with what it includes and the functions of lm-eval that it names."""
    file = _PACKAGED / path
    own: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), _Naming)
    own = _resolved(own, file.parent)
    included = own.pop("include", None)
    return own if included is None else _packaged(str((file.parent / included).relative_to(_PACKAGED))) | own


@dataclass(frozen=True, slots=True)
class _Function:
    """`!function MODULE.NAME` of a task file: MODULE.py lies beside it."""

    text: str


class _Naming(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Reads `!function` as a name."""


_Naming.add_constructor("!function", lambda loader, node: _Function(str(node.value)))


def _resolved(value: Any, folder: Path) -> Any:
    """A configuration with its functions in place of their names."""
    if isinstance(value, dict):
        return {key: _resolved(held, folder) for key, held in value.items()}
    if isinstance(value, _Function):
        module, _, name = value.text.rpartition(".")
        return getattr(_module(folder / f"{module}.py"), name)
    return value


@cache
def _module(file: Path) -> ModuleType:
    spec = spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


_KINDS = {"json": "{}.jsonl", "parquet": "{}-*.parquet"}
"""Readers of datasets and the names of their files."""


def _local(config: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """The same task over files of the data folder, where there is one."""
    if data is None:
        return config
    folder = data / config["dataset_path"] / str(config.get("dataset_name") or "")
    named = {config[key] for key in ("training_split", "fewshot_split", "validation_split", "test_split") if config.get(key)}
    kinds = {kind: {split: _found(folder, name.format(split)) for split in sorted(named)} for kind, name in _KINDS.items()}
    for kind, files in kinds.items():
        if all(files.values()):
            return _over(config, files, kind)
    best = max(kinds, key=lambda kind: sum(map(bool, kinds[kind].values())))
    missing = folder / _KINDS[best].format(next(split for split, files in kinds[best].items() if not files))
    raise EvalError(f"{config['task']}: {missing} is missing; --data takes a folder in the hub's layout that holds it")


def _found(folder: Path, name: str) -> list[str]:
    """Files of a split; of a dataset without configurations they may lie in a folder data."""
    return [str(path) for path in sorted(folder.glob(name)) or sorted((folder / "data").glob(name))]


def _over(config: dict[str, Any], files: Mapping[str, Sequence[str]], kind: str = "json") -> dict[str, Any]:
    return config | {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": dict(files)}}


def _embedded(name: str) -> dict[str, Any]:
    folder = EMBEDDED / "data"
    files = {"train": folder / "train.jsonl", "test": folder / ("test.jsonl" if name == "embedded_gsm8k" else "choices.jsonl")}
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        raise EvalError(f"{name}: {missing[0]} is missing; install lowbit from its wheel or whole checkout")
    config = _packaged("gsm8k/gsm8k.yaml") | {"task": name, "num_fewshot": 1}  # one shows the form; five cost four times as much
    if name == "embedded_choices":
        config = {key: value for key, value in config.items() if key not in ("generation_kwargs", "filter_list", "tag")} | {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "num_fewshot": 0,
            "training_split": None, "fewshot_split": None,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        files.pop("train")
    return _over(config, {split: [str(file)] for split, file in files.items()})


def _configs(name: str, data: Path | None, fewshot: int | None) -> list[dict[str, Any]] | None:
    """Configurations of a task's members; None for a task that is only known to lm-eval."""
    examples = {} if fewshot is None else {"num_fewshot": fewshot}
    if name == "embedded_gsm8k":
        return [_embedded(name) | examples]
    if name == "embedded_choices":
        return [_embedded(name)]
    if name == "gsm8k":
        configs = [_packaged("gsm8k/gsm8k.yaml")]
    elif name in _GROUPS:
        configs = [_packaged(str(file.relative_to(_PACKAGED))) for file in sorted(_PACKAGED.glob(_GROUPS[name]))]
    else:
        return None
    return [_local(config, data) | examples for config in configs]


def _member(config: dict[str, Any]) -> Task | None:
    """A member of a task; None for one without a question, whose files hold those of other subjects."""
    try:
        return ConfigurableTask(config=config)
    except IndexError:  # lm-eval looks at the first question
        return None


def suite(
    name: str, *, data: Path | None = None, limit: int | None = None, seed: int = 1, fewshot: int | None = None
) -> Suite:
    """A task with the questions that will be asked. `fewshot`: examples before each question, where not the task's own number.
    Raises EvalError."""
    configs = _configs(name, data, fewshot)
    if configs is None and data is not None:
        known = ", ".join(sorted(("embedded_choices", "embedded_gsm8k", "gsm8k", *_GROUPS)))
        raise EvalError(f"task {name!r} is not read from local files; these are: {known}")
    members: dict[str, Task]
    try:
        if configs is not None:
            members = {str(config["task"]): member for config in configs if (member := _member(config)) is not None}
            if not members:
                raise EvalError(f"{name}: its files hold no question; --data takes a folder in the hub's layout that does")
        else:
            members = lm_eval.tasks.TaskManager().load([name])["tasks"]
            for member in members.values():
                if fewshot is not None:
                    member.set_config(key="num_fewshot", value=fewshot)
        for member in members.values():
            member.set_config(key="num_fewshot", value=member.get_config("num_fewshot") or 0)
        sizes = {key: len(member.eval_docs) for key, member in members.items()}
    except EvalError:
        raise
    except (OSError, KeyError, ValueError) as error:  # the hub cannot be reached, or does not know it
        text = " ".join(str(error).split())
        raise EvalError(f"task {name!r} could not be loaded ({text[:200]}); give its files by --data, or name another") from error
    questions = drawn(sizes, limit, seed)
    return Suite(name, {key: members[key] for key in questions}, questions)


def shorten(asked: Suite, room: int) -> str | None:
    """Give answers half of the tokens that the model has room for, where the task's own number leaves none for the question. A
    sentence that says so; None where nothing is changed."""
    wanted = 0
    for member in asked.members.values():
        given = dict(member.get_config("generation_kwargs") or {})
        if int(given.get("max_gen_toks", 0)) >= room:
            wanted = int(given["max_gen_toks"])
            member.set_config(key="generation_kwargs", value=given | {"max_gen_toks": room // 2})
    if not wanted:
        return None
    return f"{asked.name}: answers have at most {room // 2} tokens instead of {wanted}, as the model has room for {room} in all"


def is_right(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a question was answered right, by its logged samples of lm-eval, one per filter. Raises EvalError."""
    for metric, wanted in _METRICS:
        for sample in samples:
            if metric in sample and wanted in ("", sample["filter"]):
                return bool(sample[metric] == 1)
    names = ", ".join(sorted({name for sample in samples for name in sample["metrics"]}))
    raise EvalError(f"no metric of the task says right or wrong (it has {names}); name a task with exact_match or acc")
