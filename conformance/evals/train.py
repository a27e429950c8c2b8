"""Trains the embedded model: a Llama of 3.3 million parameters that solves the problems of `problems.py`.

    python -m lowbit.conformance.evals.train FOLDER [--steps N] [--rows N] [--device cuda]

Decides: tokenizer, architecture, seed and schedule; writes config.json, tokenizer.json, tokenizer_config.json, model.safetensors
(bf16), the two splits in the layout of GSM8K, the multiple-choice split and provenance.json. Every Linear has K and N
divisible by 128, so that each recipe of the contract applies to it. Training stops while some answers are still wrong: of a
model that is always right, no accuracy can fall or rise by a little.
Refuses: data from anywhere else. Every text comes from the generator and its seed; the test split is never trained on.
Algorithms are deterministic, but the bits of the weights depend on the device and its libraries: provenance.json names both and
holds the digests. What the shipped file has beyond that, `measured`, was added when the model had been asked: accuracies belong
to the weights, so training again does not keep them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from .problems import Problem, choices, problems

__all__ = ["main"]

SEED = 20261120
VOCABULARY = 512
LENGTH = 1024  # tokens of a training row: nine problems, so that prompts with five examples are familiar
POOL = 200_000  # problems that rows are cut from
PEAK_RATE = 2e-3
WARMUP = 200
QUESTION_WEIGHT = 0.05  # a question is random; what there is to learn stands in the answer
TRAIN_EXAMPLES, TEST_EXAMPLES = 64, 1000
END = "<|endoftext|>"


def _text(problem: Problem) -> tuple[str, str]:
    """Prompt and continuation, as lm-eval's gsm8k task writes them."""
    return f"Question: {problem.question}\nAnswer:", f" {problem.solution}\n\n"


def _tokenizer() -> Tokenizer:
    """Byte-level BPE whose digits stand alone, so that a number is read digit by digit, and whose blank line is one token
    wherever it stands: a text is then the tokens of its problems. The end-of-text token comes first, as in training rows."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    found.decoder = decoders.ByteLevel()
    texts = ("".join(_text(problem)) for problem in islice(problems(SEED + 1, test=False), 5000))
    found.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))
    found.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, found.token_to_id(END))])
    return found


def _pool(tokenizer: Tokenizer, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Problems one after another: token ids [T], loss weights [T], and where each problem begins [count]."""
    ids, weights, starts = list[int](), list[float](), list[int]()
    texts = [part for problem in islice(problems(SEED + 2, test=False), count) for part in _text(problem)]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    for prompt, answer in zip(encoded[::2], encoded[1::2], strict=True):
        starts.append(len(ids))
        ids += prompt.ids + answer.ids
        weights += [QUESTION_WEIGHT] * len(prompt.ids) + [1.0] * len(answer.ids)
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(weights), torch.tensor(starts)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * (0.01 + 0.495 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))))


def _config(tokenizer: Tokenizer) -> LlamaConfig:
    end = tokenizer.token_to_id(END)
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=10000.0,
        bos_token_id=end, eos_token_id=end, pad_token_id=end, attention_bias=False, torch_dtype="bfloat16",
    )


def _trained(tokenizer: Tokenizer, steps: int, rows: int, pool: int, device: str) -> tuple[LlamaForCausalLM, float]:
    """The model after `steps` updates of `rows` rows each, and its last smoothed loss. Parameters and optimiser are binary32,
    matrix products bfloat16. A row begins at a problem, every second one after the end-of-text token."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(_config(tokenizer)).float().to(device)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=PEAK_RATE, betas=(0.9, 0.98),
    )
    stream, weights_of, starts = (tensor.to(device) for tensor in _pool(tokenizer, pool))
    starts = starts[: int((starts < len(stream) - LENGTH - 1).sum())]
    drawn = torch.Generator(device="cpu").manual_seed(SEED)
    reach, end = torch.arange(LENGTH + 1, device=device), tokenizer.token_to_id(END)
    marked = torch.arange(rows, device=device) % 2 == 0
    print(f"{len(stream)} tokens of {pool} problems", flush=True)
    smooth, started = torch.zeros((), device=device), time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = _rate(step, steps)
        first = starts[torch.randint(len(starts), (rows,), generator=drawn).to(device)] - marked.long()
        at = (first[:, None] + reach).clamp(min=0)
        ids, weights = stream[at].long(), weights_of[at]
        ids[marked, 0], weights[marked, 0] = end, 0.0
        with torch.autocast(device, torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        losses = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        smooth = loss.detach() if step == 0 else 0.98 * smooth + 0.02 * loss.detach()
        if step % 100 == 99 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {float(smooth):.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.cpu(), float(smooth)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _data(folder: Path) -> None:
    """The splits: question and answer as in GSM8K; choices with the place of the right one."""
    test: list[Problem] = []
    for problem in problems(SEED + 3, test=True):
        if problem.question not in {row.question for row in test}:
            test.append(problem)
        if len(test) == TEST_EXAMPLES:
            break
    train = list(islice(problems(SEED + 4, test=False), TRAIN_EXAMPLES))
    for name, split in (("train", train), ("test", test)):
        _jsonl(folder / "data" / f"{name}.jsonl", [{"question": p.question, "answer": p.solution} for p in split])
    drawn = [(problem, *choices(problem, SEED)) for problem in test]
    _jsonl(folder / "data" / "choices.jsonl", [
        {"question": problem.question, "choices": list(endings), "answer": place} for problem, endings, place in drawn
    ])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Train and write everything into the folder."""
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("folder", type=Path)
    reader.add_argument("--steps", type=int, default=500)
    reader.add_argument("--rows", type=int, default=64, help=f"rows of {LENGTH} tokens per step")
    reader.add_argument("--pool", type=int, default=POOL, help="problems that rows are cut from")
    reader.add_argument("--device", default="cpu")
    wanted = reader.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    folder: Path = wanted.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
         "model_max_length": 2048, "clean_up_tokenization_spaces": False}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _data(folder)
    started = time.monotonic()
    model, loss = _trained(tokenizer, wanted.steps, wanted.rows, wanted.pool, wanted.device)
    model.config.save_pretrained(folder)
    state = model.state_dict()  # lm_head.weight is embed_tokens.weight
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = f"--steps {wanted.steps} --rows {wanted.rows} --pool {wanted.pool} --device {wanted.device}"
    provenance = {
        "what": "trained from nothing on generated problems only; the test split was never trained on",
        "command": f"python -m lowbit.conformance.evals.train FOLDER {options}",
        "seed": SEED, "steps": wanted.steps, "rows_per_step": wanted.rows, "tokens_per_row": LENGTH, "problems": wanted.pool,
        "last_loss": round(loss, 5), "parameters": sum(tensor.numel() for tensor in weights.values()),
        "seconds": round(time.monotonic() - started), "torch": torch.__version__, "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "device": torch.cuda.get_device_name() if wanted.device.startswith("cuda") else "CPU",
        "licence": "Apache-2.0, as the rest of this repository",
        "sha256": {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
                   and path.name != "provenance.json"},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
