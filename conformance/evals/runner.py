"""`lowbit eval`: one model, up to four arms, the same questions and the same tokens.

Decides: the arms (the full-precision model; the quantised one by the reference arithmetic; by the backend; by another honest
summation order and half the batch size, which is the noise floor), what is compared with what, and what is written:
answers/ARM-TASK.jsonl and tokens.jsonl as they are known, then eval.json, summary.txt and report.html.
Refuses: settings that cannot be run, before a model is loaded, and a folder that holds another run: one sentence each.

Recipe loss is reference against full precision, kernel error is backend against reference; both are paired by question. The
verdict on the kernel comes from tokens and operations, which see what accuracy does not. Operations are judged before the tokens'
floor is worked out: it has the deviations that were admitted there (`echo`). NumPy's BLAS gets one thread: a host backend and
torch would wait for each other's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from threadpoolctl import threadpool_limits

from .. import report
from .answers import Answered, Answers, EvalError, Told, check_pairs, claim_folder, to_stderr
from .arms import Arm, ArmError, ReferenceArm
from .asking import ask
from .backend_arm import BackendArm
from .checkpoint import CheckpointError, open_checkpoint
from .echo import Echo
from .identity import about, identity, same_backend
from .models import Feed, Loaded, Source, answer_logits, calibrated, config_of, load, load_full, source, tokenizer_of
from .operations import inputs_of, judge_operations
from .page import page
from .paired import Comparison, Outcome, compare, mcnemar, table_of
from .quantise import RecipeError
from .records import JUDGE, SCHEMA, Eval, Kernel, Operation, Ran, TaskResult, TextPair, serving, summary, write_eval
from .schemes import SchemeError
from .tasks import EMBEDDED, Suite, shorten, suite
from .tokens import TextDifference, compare_tokens, mean_divergence, ratio_of, text_difference

__all__ = ["REFUSALS", "CheckpointError", "evaluate"]

REFUSALS = (EvalError, SchemeError, RecipeError, ArmError)
"""What `evaluate` raises for what cannot be run as asked, but for CheckpointError: a model's files make no sense."""

_OFTEN = ("embedded_gsm8k", "embedded_choices")
_STEPWISE = 8  # every eighth text is fed token by token
_OTHER_FEED = {Feed.WHOLE: Feed.PARTS, Feed.STEPS: Feed.WHOLE}  # of the floor: as another batch would feed it
_JUDGED = 8  # texts whose inputs the operations are judged on
_CHOICES = 8  # questions at a time where each token of a prompt gets its logits: 2.4 GB for a prompt of 1,000 tokens, in 150,000
_KEPT = 1 << 28  # bytes of the reference's logits that are kept for the next arm
_STOP_ROOM = 8  # an answer that ends so close to its limit was cut


class _Shelf:
    """Models by arm, loaded when asked for: the reference and one other are kept."""

    def __init__(self, make: Mapping[str, Callable[[], Loaded]], tokenizer: Any, device: str) -> None:
        self._make, self._held = make, dict[str, Loaded]()
        self._tokenizer, self._device = tokenizer, device

    def __getitem__(self, arm: str) -> Loaded:
        if arm not in self._held:
            for other in [name for name in self._held if "reference" not in (name, arm)]:
                del self._held[other]
            self._held[arm] = self._make[arm]()
        return self._held[arm]

    def asked(self, arm: str, batch: int) -> HFLM:
        """The model as lm-eval's HFLM."""
        return HFLM(pretrained=self[arm].model, tokenizer=self._tokenizer, batch_size=batch, device=self._device)


@dataclass(frozen=True, slots=True)
class _Text:
    """One text of the per-token test, in token ids."""

    key: str
    context: tuple[int, ...]
    answer: tuple[int, ...]
    feed: Feed

    @property
    def digest(self) -> str:
        """Of what is fed: another tokenizer or another answer of the reference is another text under the same key."""
        return hashlib.sha256(repr((self.context, self.answer, self.feed)).encode()).hexdigest()[:16]


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """cuDNN's attention plans anew for each length of a text: 40 ms for a token on an H200, 4 without it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def evaluate(
    model: str, backend: str | Arm, *, out: Path, reference: str = JUDGE, tasks: Sequence[str] = (), recipe: str = "",
    base: Path | None = None, data: Path | None = None, limit: int | None = None, texts: int = 64, batch: int = 16,
    fewshot: int | None = None, margin: float = 0.02, confidence: float = 0.95, seed: int = 1, dtype: str = "bfloat16",
    device: str = "cpu", samples: Path | None = None, localise: bool = False, certificate: report.Report | None = None,
    told: Told = to_stderr,
) -> Eval:
    """Evaluate a backend's kernels inside a model, and write everything below `out`.

    `model`: a folder with config.json, tokenizer and safetensors, or `embedded`. `backend`: as `lowbit certify` takes it, an arm,
    or `torch_f32`: the reference with sums in binary32. `reference`: `torch_twin`, or another backend. `tasks`: names; by default
    the embedded ones, and gsm8k and mmlu where `data` is given. `recipe`: how plain weights are quantised; `base`: the
    full-precision model of a quantised checkpoint.
    `limit`: questions per task, `texts`: texts per task in the per-token test. `margin`: acceptable loss of accuracy, a share.
    `samples`: folder of the answers, by default OUT/answers. `localise`: judge each Linear on the texts that the backend changed
    most, and on more rows. `certificate`: the backend's report, for level L4.
    Raises EvalError, CheckpointError, SchemeError, RecipeError, ArmError, BackendError: one sentence each.
    """
    started = time.monotonic()
    if texts < 2 or batch < 1 or (limit is not None and limit < 2):
        raise EvalError(f"got texts={texts}, batch={batch}, limit={limit}; need at least 2 texts, batches of 1 and 2 questions")
    if not (0 < margin < 1 and 0.5 <= confidence < 1):
        text = f"got margin={margin}, confidence={confidence}; the margin is a share of the questions between 0 and 1"
        raise EvalError(f"{text} (0.02 is two points), the confidence at least 0.5 and below 1")
    folder = EMBEDDED if model == "embedded" else Path(model)
    recipe = recipe or ("w4a16" if model == "embedded" else "")
    given = source(folder, recipe, dtype, device)
    own: Arm
    if backend == "torch_f32":
        own = ReferenceArm("torch_f32", 1, True)
    else:
        own = BackendArm(backend) if isinstance(backend, str) else backend
    judge: Arm = ReferenceArm() if reference == JUDGE else BackendArm(reference)
    if isinstance(judge, BackendArm) and isinstance(own, BackendArm) and same_backend(own, judge):
        raise EvalError(f"backend {own.name} would be judged by itself ({judge.name}); leave --reference out, or name another")
    missing = []
    if not tasks:
        tasks = (*_OFTEN, *(() if data is None else ("gsm8k", "mmlu")))
        if data is None:
            missing.append(
                "gsm8k and mmlu were not asked: no local files were named; give a folder in the hub's layout by --data, or name "
                "the tasks, which fetches them"
            )
    if folder == EMBEDDED and set(tasks) - set(_OFTEN):
        missing.append("the embedded model knows its own problems only: on other tasks it stays near zero, or at chance")
    plain = base if given.quantised else folder
    if plain is None:
        missing.append("recipe loss was not measured: the checkpoint is quantised; give its full-precision folder by --base")
    settings = {
        "model": _digest(given.folder), "base": None if base is None else str(base), "recipe": recipe, "backend": own.name,
        "reference": judge.name, "tasks": list(tasks), "limit": limit, "texts": texts, "batch": batch, "fewshot": fewshot,
        "seed": seed, "dtype": dtype, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__, "lm_eval": version("lm_eval"), "suite": report.suite_version(),
        "data": None if data is None else str(data), "base_files": None if base is None else _digest(base),
        **{f"backend_{key}": value for key, value in identity(own).items()},
        **{f"reference_{key}": value for key, value in identity(judge).items()},
    }
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    suites = [suite(name, data=data, limit=limit, seed=seed, fewshot=fewshot) for name in tasks]
    tokenizer, config = tokenizer_of(folder), config_of(folder)
    limits = int(getattr(config, "max_position_embeddings", 2048))
    missing += [said for one in suites if (said := shorten(one, limits)) is not None]
    kept_in = samples or out / "answers"
    for place in (out, kept_in):
        claim_folder(place, settings)
    maxima: dict[str, float] = {}
    if given.recipe is not None and (given.recipe.op, given.recipe.variant) == ("gemm_nvfp4", "plain"):
        maxima = calibrated(given, _calibration(tokenizer))
    floor, moved = ReferenceArm("floor", 2, True), dict[str, torch.Tensor]()
    arms: dict[str, Arm] = {"reference": judge, "backend": own, "floor": floor}
    make: dict[str, Callable[[], Loaded]] = {name: _loader(given, arm, maxima) for name, arm in arms.items()}
    if plain is not None:
        make = {"full": _full_loader(plain, given, config)} | make
    shelf = _Shelf(make | {"echo": _loader(given, Echo(floor, moved), maxima)}, tokenizer, device)

    with threadpool_limits(limits=1, user_api="blas"), _without_cudnn_attention():
        answered: dict[str, dict[str, list[Answered]]] = {one.name: {} for one in suites}
        for arm in make:
            for one in suites:
                rows = batch if one.generates else min(batch, _CHOICES)
                rows = max(1, rows // 2) if arm == "floor" else rows
                kept = Answers(kept_in / f"{arm}-{one.name}.jsonl")
                answered[one.name][arm] = ask(one, arm, kept, _asker(shelf, arm, rows), batch=rows, seed=seed, told=told)
        for one in suites:
            check_pairs(one.name, answered[one.name])
        chosen = [text for one in suites for text in _texts(one, answered[one.name]["reference"], tokenizer, texts, seed, limits)]
        if len(chosen) < 2:
            raise EvalError(f"only {len(chosen)} texts can be compared token by token; ask more questions")
        others = [arm for arm in make if arm not in ("reference", "floor")]
        known, kept = dict[str, torch.Tensor](), Answers(out / "tokens.jsonl")
        differences = {arm: _differences(shelf, arm, chosen, known, kept, told) for arm in others}
        told("operations: each Linear on its own")
        judged = _changed(chosen, differences["backend"]) if localise else _spread(chosen, _JUDGED)
        inputs = inputs_of(shelf["reference"], [(text.context, text.answer) for text in judged])
        operations = judge_operations(
            given, shelf["reference"], shelf["backend"], own, inputs, out / "first", closely=localise, moved=moved
        )
        differences["floor"] = _differences(shelf, "echo", chosen, known, kept, told)
        replaced = shelf["reference"].summary
        assert replaced is not None
    missing += _unjudged([layer.name for layer in replaced.layers], replaced.kept, inputs)
    kernel = _kernel(differences, operations, chosen, judged, out / "first")
    results = tuple(_task(one, answered[one.name], tokenizer, margin, confidence) for one in suites)
    ran = Ran(own.name, reference, *about(own), len(replaced.layers), len(inputs))
    found = Eval(
        SCHEMA, report.suite_version(), settings, "embedded model" if folder == EMBEDDED else folder.name, results, kernel,
        serving(results, kernel, ran, certificate), dict(getattr(own, "kernels", {})), tuple(missing),
        round(time.monotonic() - started, 1),
    )
    write_eval(out / "eval.json", found)
    report.write_atomically(out / "summary.txt", summary(found) + "\n")
    report.write_atomically(out / "report.html", page(found, certificate))
    return found


# Before asking --------------------------------------------------------------------------------------------------------


def _digest(folder: Path) -> str:
    """Name and a digest of a model's configuration and the sizes and times of its files: enough to tell two models apart."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    for file in sorted(set(open_checkpoint(folder).files.values())):
        state = os.stat(folder / file)
        text += f"{file} {state.st_size} {state.st_mtime_ns}"
    return f"{folder.name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _loader(given: Source, arm: Arm, maxima: dict[str, float]) -> Callable[[], Loaded]:
    return lambda: load(given, arm, maxima)


def _full_loader(folder: Path, given: Source, config: Any) -> Callable[[], Loaded]:
    return lambda: load_full(folder, given.dtype, given.device, config)


def _asker(shelf: _Shelf, arm: str, batch: int) -> Callable[[], HFLM]:
    return lambda: shelf.asked(arm, batch)


def _unjudged(replaced: Sequence[str], kept: Sequence[str], reached: Collection[str]) -> list[str]:
    """Sentences on the Linears that nothing was found out about."""
    found, unreached = [], [name for name in replaced if name not in reached]
    if unreached:
        counts = f"{len(unreached)} of {len(replaced)} replaced Linears"
        found.append(f"{counts} were not judged on their own, as no judged text came to them: {_few(unreached)}")
    if kept:
        found.append(f"no kernel was seen in the Linears that were kept in full precision, {len(kept)}: {_few(kept)}")
    return found


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"


def _calibration(tokenizer: Any) -> list[list[int]]:
    """Sixteen solved problems of the shipped training split: texts that no task asks."""
    lines = (EMBEDDED / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    return [list(tokenizer(line).input_ids) for line in lines]


# Token by token -------------------------------------------------------------------------------------------------------


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Some of the items, evenly."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)


def _texts(one: Suite, answered: Sequence[Answered], tokenizer: Any, count: int, seed: int, limit: int) -> list[_Text]:
    """Texts of the reference's answers, drawn at random; contexts are cut on the left where the model has no room."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(answered))[:count]
    found = list[_Text]()
    for index in order:
        item = answered[index]
        context = item.context.rstrip(" ")
        start, whole = (tuple(tokenizer(text).input_ids) for text in (context, item.context + item.answer))
        shared = next((at for at, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), min(len(start), len(whole)))
        answer = whole[shared:]
        if answer and shared:
            kept = whole[:shared][-max(1, limit - len(answer)) :]
            feed = Feed.STEPS if len(found) % _STEPWISE == _STEPWISE - 1 else Feed.WHOLE
            found.append(_Text(f"{one.name}/{item.key}", kept, answer, feed))
    return found


def _differences(
    shelf: _Shelf, arm: str, texts: Sequence[_Text], known: dict[str, torch.Tensor], kept: Answers, told: Told
) -> list[TextDifference]:
    """Each text under the reference and another arm. `known`: logits of the reference by text, filled as far as there is room."""
    found, started, new = [], time.monotonic(), 0
    for number, text in enumerate(texts, 1):
        key = f"{arm}/{text.key}/{text.digest}"
        if not kept.has([key]):
            reference = known.get(text.key)
            if reference is None:
                reference = answer_logits(shelf["reference"].model, text.context, text.answer, text.feed)
                if reference.nbytes + sum(logits.nbytes for logits in known.values()) <= _KEPT:
                    known[text.key] = reference
            feed = _OTHER_FEED[text.feed] if arm == "echo" else text.feed
            one = text_difference(reference, answer_logits(shelf[arm].model, text.context, text.answer, feed))
            kept.append({key: [list(one.kl), one.flips, one.first]})
            new += 1
            if new % 16 == 0 or number == len(texts):
                left = (time.monotonic() - started) / new * (len(texts) - number)
                told(f"{arm}: tokens of {number} of {len(texts)} texts, about {left:.0f} s left")
        kl, flips, first = kept[key]
        found.append(TextDifference(tuple(kl), flips, first))
    return found


def _changed(texts: Sequence[_Text], differences: Sequence[TextDifference]) -> list[_Text]:
    """The texts that the backend changed most: those with flipped tokens first, then by divergence."""
    order = sorted(range(len(texts)), key=lambda at: (-differences[at].flips, -sum(differences[at].kl)))
    return [texts[at] for at in order[:_JUDGED]]


def _kernel(
    differences: Mapping[str, Sequence[TextDifference]], operations: Sequence[Operation], texts: Sequence[_Text],
    judged: Sequence[_Text], folder: Path,
) -> Kernel:
    tokens = compare_tokens(differences["backend"], differences["floor"])
    full = differences.get("full")
    first = next((operation.layer for operation in operations if operation.outside), None)
    pairs = tuple(
        TextPair(text.key, len(text.answer), mean_divergence([backend]), mean_divergence([floor]), backend.flips)
        for text, backend, floor in zip(texts, differences["backend"], differences["floor"], strict=True)
    )
    return Kernel(
        tokens, None if full is None else mean_divergence(full), pairs, tuple(operations), tuple(text.key for text in judged),
        first, None if first is None else str(folder / f"{first}.safetensors"),
        tokens.outcome if first is None else Outcome.DRIFTS,
    )


# Question by question -------------------------------------------------------------------------------------------------


def _task(
    one: Suite, answered: Mapping[str, Sequence[Answered]], tokenizer: Any, margin: float, confidence: float
) -> TaskResult:
    """The comparisons of one task."""

    def paired(first: str, second: str) -> Comparison:
        pairs = zip(answered[first], answered[second], strict=True)
        return compare(table_of((a.right, b.right) for a, b in pairs), margin=margin, confidence=confidence)

    right = {arm: sum(item.right for item in items) for arm, items in answered.items()}
    recipe = paired("full", "reference") if "full" in answered else None
    texts = lengths = stopped = None
    if answered["reference"][0].generated:
        ours = answered["reference"]
        texts = {
            arm: sum(a.answer != b.answer for a, b in zip(items, ours, strict=True)) / len(ours)
            for arm, items in answered.items() if arm != "reference"
        }
        sizes = {arm: [len(tokenizer(item.answer).input_ids) for item in answered[arm]] for arm in ("backend", "reference")}
        lengths = ratio_of([[size] for size in sizes["backend"]], [[size] for size in sizes["reference"]], confidence)
        room = ours[0].room - _STOP_ROOM
        stopped = table_of((a < room, b < room) for a, b in zip(sizes["reference"], sizes["backend"], strict=True))
    return TaskResult(
        one.name, one.count, right, paired("reference", "backend"), paired("reference", "floor"), recipe, texts, lengths, stopped,
        None if stopped is None else float(mcnemar(stopped)),
    )
