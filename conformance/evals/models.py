"""Models whose Linears an arm computes, and one text through them.

Decides: how a folder becomes a model (no full-precision Linear is held where an arm computes it), and how a text is fed: in one
forward, or its answer token by token through a cache, as generation feeds it, so that both shapes of a kernel are seen.
Refuses: folders that transformers does not read, and quantised checkpoints as full-precision models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import transformers

from .answers import EvalError
from .arms import Arm
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .quantise import RECIPES, WeightRecipe, input_maxima
from .swap import Summary, empty_linears, load_rest, swap

__all__ = [
    "Feed", "Loaded", "Source", "answer_logits", "calibrated", "config_of", "load", "load_full", "source",
    "tokenizer_of",
]


class Feed(StrEnum):
    """How a text goes through a model."""

    WHOLE = "whole"  # in one forward
    PARTS = "parts"  # the context, then the answer
    STEPS = "steps"  # the context, then the answer token by token, as generation does


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model's folder. `recipe`: for plain weights; None where the checkpoint is quantised itself. `factors`: low-rank terms of
    its Linears as far as they were worked out: all arms have the same, and they take longer than all else of quantising."""

    folder: Path
    checkpoint: Checkpoint
    recipe: WeightRecipe | None
    dtype: torch.dtype
    device: str
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def quantised(self) -> bool:
        """Whether the stored weights are quantised."""
        return "quantization_config" in self.checkpoint.config


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model ready to run. `summary`: what was replaced; None for the full-precision arm."""

    model: Any
    summary: Summary | None


def source(folder: Path, recipe: str, dtype: str, device: str) -> Source:
    """What MODEL, --recipe and --dtype mean. Raises EvalError, CheckpointError."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise EvalError(f"dtype {dtype!r} is unknown; the activations of an arm are bfloat16 or float16")
    checkpoint = open_checkpoint(folder)
    quantised = "quantization_config" in checkpoint.config
    if quantised and recipe:
        raise EvalError(f"{folder} is quantised already and --recipe {recipe} was given; leave --recipe out")
    if not quantised and recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise EvalError(f"{folder} holds plain weights and --recipe is {recipe!r}; say how to quantise them by one of {known}")
    return Source(folder, checkpoint, RECIPES.get(recipe), dtypes[dtype], device)


def config_of(folder: Path) -> Any:
    """The configuration, as transformers reads it, without code of the folder's own. Raises EvalError."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what a broken file makes transformers raise is nowhere written
        text = f"{folder}: transformers cannot read its configuration ({_said(error)})"
        raise EvalError(f"{text}; name a folder whose config.json is that of a causal language model") from error


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer, without code of the folder's own. Raises EvalError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        text = f"{folder}: transformers cannot read its tokenizer ({_said(error)})"
        raise EvalError(f"{text}; put tokenizer.json and tokenizer_config.json beside the weights") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def load_full(folder: Path, dtype: torch.dtype, device: str, config: Any = None) -> Loaded:
    """The model as stored, in `dtype`. It decodes as its configuration says, or that of the arms, `config`: what else the folder
    says of decoding would be a difference that no quantisation made. Raises EvalError for a quantised checkpoint."""
    if "quantization_config" in open_checkpoint(folder).config:
        raise EvalError(f"{folder} is quantised; the full-precision arm needs the folder of plain weights")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        text = f"{folder}: transformers cannot load this model ({_said(error)})"
        raise EvalError(f"{text}; name a causal language model") from error
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config if config is None else config)
    return Loaded(model.to(device).eval(), None)


def load(given: Source, arm: Arm, maxima: dict[str, float] | None = None) -> Loaded:
    """The model with its Linears computed by an arm. Raises EvalError, CheckpointError, SchemeError, RecipeError, ArmError."""
    config = config_of(given.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would build its own Linears
    try:
        with empty_linears():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=given.dtype, trust_remote_code=False)
    except ValueError as error:
        text = f"{given.folder}: transformers cannot build this model ({error})"
        raise EvalError(f"{text}; name a causal language model") from error
    model.generation_config = transformers.GenerationConfig.from_model_config(config)
    model.tie_weights()
    summary = swap(
        model, arm, checkpoint=given.checkpoint, recipe=given.recipe, device=given.device, input_amax=maxima,
        factors=given.factors,
    )
    load_rest(model, given.checkpoint)
    if not summary.layers:
        raise CheckpointError(f"{given.folder}: no Linear was replaced; expected targets or a recipe that name one")
    return Loaded(model.to(given.device).eval(), summary)


def calibrated(given: Source, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Largest inputs of the plain model's Linears over texts of token ids."""
    full = load_full(given.folder, given.dtype, given.device).model
    return input_maxima(full, lambda: [full(torch.tensor([list(ids)], device=given.device)) for ids in texts])


@torch.no_grad()
def answer_logits(model: Any, context: Sequence[int], answer: Sequence[int], feed: Feed) -> torch.Tensor:
    """Logits [T, V] that predict each of the answer's T tokens, context and answer given; in the model's dtype, on its device."""
    ids = torch.tensor([[*context, *answer[:-1]]], device=model.device)
    first, length = len(context), ids.shape[1]
    starts = {Feed.WHOLE: [0], Feed.PARTS: [0, first], Feed.STEPS: [0, *range(first, length)]}[feed]
    state, rows = None, []
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        if start < end:
            state = model(ids[:, start:end], past_key_values=None if state is None else state.past_key_values, use_cache=True)
            rows.append(state.logits[0])
    return torch.cat(rows)[first - 1 :]
