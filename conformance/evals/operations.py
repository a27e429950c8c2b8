"""Each Linear of an arm on its own: on inputs that the reference gave it, are its outputs what its declaration admits?

Decides: which calls are judged (one row, as in generation, and blocks of 16 and 128 rows, as in a prompt), on which inputs (rows
that the reference arm met in the texts of the evaluation), and which operation is named: the first, in the order of the forward,
with an output outside its admissible interval. Its case is written as a file. Each arm is called with a copy of the rows: what a
kernel does to its inputs changes neither its judge nor the other arm.
Refuses: nothing; a layer that no text reaches is not judged and not counted.

No floor is needed here: the interval holds every result that the declared arithmetic can give, so one output outside is a fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowbit.references.declarations import Declaration
from lowbit.references.formats import Codes

from ..bounds import gemm_expect
from ..case import Case, Operands, Problem
from ..ops import ops
from .activations import codes_of
from .arms import Arm, call_operands
from .echo import deviations
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


@dataclass(frozen=True, slots=True, eq=False)
class _Called:
    """One call of a layer by an arm: what it was given, what it gave, what the reference arm gave, and by how much these differ
    as `deviations` has it."""

    problem: Problem
    operands: Operands
    declaration: Declaration
    found: Codes
    wanted: Codes
    moved: torch.Tensor

    def outside(self) -> int:
        """Outputs that the declaration does not admit."""
        case = Case(self.problem, "recorded", 0)
        return int((~gemm_expect(ops()[self.problem.op], case, self.operands, self.declaration)["d"].admits(self.found)).sum())


def judge_operations(
    given: Source, reference: Loaded, backend: Loaded, arm: Arm, inputs: Mapping[str, torch.Tensor], folder: Path,
    *, closely: bool = False, moved: dict[str, torch.Tensor] | None = None,
) -> list[Operation]:
    """Every layer of `inputs`, in its order. `folder`: where the first faulty call is written; what another run left there is
    removed. `closely`: also on 5 and on 67 rows. `moved`: gets the deviations [rows, N] of each layer without an output outside.
    Where `inputs` has fewer rows than a block, the block is of those. Intervals are worked out by as many threads as torch has;
    the arms are called one after the other."""
    for left in folder.glob("*.safetensors"):
        left.unlink()
    rows, threads = _MORE_ROWS if closely else _ROWS, torch.get_num_threads()
    judged, waiting = list[Operation](), deque[tuple[str, list[_Called], list[Future[int]]]]()

    def finish() -> None:
        name, calls, counts = waiting.popleft()
        judged.append(_judged(name, arm.name, calls, [count.result() for count in counts], folder))
        if moved is not None and not judged[-1].outside:
            moved[name] = torch.cat([call.moved for call in calls])

    with ThreadPoolExecutor(threads) as pool:
        for name, x in inputs.items():
            calls = _calls(given, reference, backend, arm, name, x, rows)
            waiting.append((name, calls, [pool.submit(call.outside) for call in calls]))
            if len(waiting) > threads:  # operands are kept until they are judged
                finish()
        while waiting:
            finish()
    return judged


def _calls(
    given: Source, reference: Loaded, backend: Loaded, arm: Arm, name: str, x: torch.Tensor, sizes: Sequence[int]
) -> list[_Called]:
    """A layer on blocks of rows, by both arms, ascending."""
    own, other = (loaded.model.get_submodule(name) for loaded in (backend, reference))
    assert reference.summary is not None
    linear, bias = reference.summary.linear(name), stored_bias(given.checkpoint, name, given.dtype)
    made = []
    for rows in sorted({min(size, len(x)) for size in sizes}):
        part = x[:rows].contiguous()
        problem, operands = call_operands(linear, other.layer.out, part, bias)
        outputs = [module(part.clone()) for module in (own, other)]
        found, wanted = (codes_of(output).cpu().numpy().view(np.uint16) for output in outputs)
        made.append(_Called(problem, operands, arm.declare(problem), found, wanted, deviations(part, *outputs).cpu()))
    return made


def _judged(name: str, arm: str, calls: Sequence[_Called], wrong: Sequence[int], folder: Path) -> Operation:
    """A layer by its calls and how many outputs of each are not admitted; the first that is wrong of all layers is written."""
    first = next((call for call, count in zip(calls, wrong, strict=True) if count), None)
    if first is not None and not any(folder.glob("*.safetensors")):
        recorded = Recorded(name, arm, first.problem, first.operands, first.declaration, first.found)
        store(folder / f"{name}.safetensors", recorded)
    worst = calls[max(range(len(calls)), key=lambda at: wrong[at])]
    outputs = sum(call.found.size for call in calls)
    differing = sum(int((call.found != call.wanted).sum()) for call in calls)
    return Operation(name, str(worst.problem), outputs, sum(wrong), differing / outputs)
