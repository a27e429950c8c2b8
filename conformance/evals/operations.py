"""Each Linear of an arm on its own: on inputs that the reference gave it, are its outputs what its declaration admits?

Decides: which calls are judged (one row, as in generation, and blocks of 16 and 128 rows, as in a prompt), on which inputs (rows
that the reference arm met in the texts of the evaluation), and which operation is named: the first, in the order of the forward,
with an output outside its admissible interval. Its case is written as a file. Each arm is called with a copy of the rows: what a
kernel does to its inputs changes neither its judge nor the other arm.
Refuses: nothing; a layer that no text reaches is not judged and not counted.

No floor is needed here: the interval holds every result that the declared arithmetic can give, so one output outside is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..bounds import gemm_expect
from ..case import Case
from ..ops import ops
from .activations import codes_of
from .arms import Arm, call_operands
from .linear import ContractLinear
from .models import Feed, Loaded, Source, answer_logits
from .recorded import Recorded, store
from .records import Operation
from .swap import stored_bias

__all__ = ["inputs_of", "judge_operations"]

_ROWS = (1, 16, 128)
_MORE_ROWS = (1, 5, 16, 67, 128)  # with blocks that fill no tile: where a fault is to be found, not only to be noticed


def inputs_of(reference: Loaded, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Inputs [M, K] of each layer, M at most 128, in the order of the forward: rows from all over the texts (context, answer), as
    the reference arm met them."""
    found: dict[str, list[torch.Tensor]] = {}

    def see(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        found.setdefault(name, []).append(x.clone())

    layers = [module for module in reference.model.modules() if isinstance(module, ContractLinear)]
    for layer in layers:
        layer.recorder = see
    try:
        for context, answer in texts:
            answer_logits(reference.model, context, answer, Feed.WHOLE)
    finally:
        for layer in layers:
            layer.recorder = None
    chosen = {}
    for name, parts in found.items():
        rows = torch.cat(parts)
        at = np.random.Generator(np.random.Philox(1)).permutation(len(rows))[: max(_MORE_ROWS)]
        chosen[name] = rows[torch.from_numpy(at).to(rows.device)]
    return chosen


def judge_operations(
    given: Source, reference: Loaded, backend: Loaded, arm: Arm, inputs: Mapping[str, torch.Tensor], folder: Path,
    *, closely: bool = False,
) -> list[Operation]:
    """Every layer of `inputs`, in its order. `folder`: where the first faulty call is written; what another run left there is
    removed. `closely`: also on 5 and on 67 rows. Where `inputs` has fewer rows than a block, the block is of those."""
    for left in folder.glob("*.safetensors"):
        left.unlink()
    rows = _MORE_ROWS if closely else _ROWS
    return [_judged(given, reference, backend, arm, name, x, folder, rows) for name, x in inputs.items()]


def _judged(
    given: Source, reference: Loaded, backend: Loaded, arm: Arm, name: str, x: torch.Tensor, folder: Path,
    sizes: Sequence[int],
) -> Operation:
    own, other = (loaded.model.get_submodule(name) for loaded in (backend, reference))
    assert reference.summary is not None
    linear, bias = reference.summary.linear(name), stored_bias(given.checkpoint, name, given.dtype)
    outputs = outside = differing = 0
    worst, text = 0, ""
    for rows in sorted({min(size, len(x)) for size in sizes}):
        part = x[:rows].contiguous()
        problem, operands = call_operands(linear, other.layer.out, part, bias)
        found, wanted = (codes_of(module(part.clone())).cpu().numpy().view(np.uint16) for module in (own, other))
        case = Case(problem, "recorded", 0)
        declaration = arm.declare(problem)
        admitted = gemm_expect(ops()[problem.op], case, operands, declaration)["d"].admits(found)
        wrong = int((~admitted).sum())
        outputs, outside, differing = outputs + found.size, outside + wrong, differing + int((found != wanted).sum())
        if wrong > worst or not text:
            worst, text = wrong, str(problem)
        if wrong and not any(folder.glob("*.safetensors")):
            store(folder / f"{name}.safetensors", Recorded(name, arm.name, problem, operands, declaration, found))
    return Operation(name, text, outputs, outside, differing / outputs)
