"""Kernels side by side on one device: times, shares of a measured roof, and ratios to peers with their spread.

Decides: which problems are timed (`problems_of`), with which operands, and in which order. A backend is called as the suite calls
it: `prepare` and `stage` untimed, `run` timed. Operands rotate through copies of `ROTATION` bytes in all, so that weights come
from memory; where an op has constants they rotate and activations and outputs stay, as in a model, elsewhere everything rotates.
Rounds alternate: every round times every competitor once, in the order of `order_of`. Outputs are poisoned and tensors that are
changed in place restored before each competitor, so that nobody inherits a result. bench_figures.py says what follows.
A peer is a backend, too. Of a registered one the tactic it would dispatch is timed, of one given as python:FILE.py:ATTRIBUTE
every tactic under its own name: that is how kernels of other libraries are brought along.
Refuses: a verdict on results. How far a peer's output lies from ours is written down and not judged; `lowbit certify` judges. A
backend that does not run on a device here is refused in one sentence.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lowbit.references.formats import INT4, INT8, INT32, UINT4, Codes, container
from lowbit.references.rounding import encode

from .backend import NEVER_EXECUTED, BackendError, TensorView, execution_of, tactics_of
from .bench_device import GRAPH_MS, Recording
from .bench_figures import Row
from .case import Problem, Stream, dims_text
from .op import DomainError, Family, Op, ResolvedTensor, Role, parse_problem, tensors_of
from .ops import ops

__all__ = [
    "COPIES", "DEFAULT_SHAPES", "ROTATION", "BenchError", "BenchPlan", "Subject", "Watch", "bench", "device_of", "method_of",
    "order_of", "problems_of", "roof_of", "subjects_of",
]

ROTATION = 600_000_000
"""Bytes through which operands rotate: ten times a cache of 60 MB, the largest L2 among devices of these kernels."""

COPIES = 512
"""Copies at most: operands below `ROTATION` / `COPIES` bytes stay in part of a cache, wherever they are used."""

DEFAULT_SHAPES = "1,32,64,128,256,512,1024,2048,4096@14336x12288,12288x12288,73728x12288,12288x36864"
"""Sizes that are timed unless others are given, as M,M,...@NxK,NxK,...: linear layers of two published models of 123 and 236
billion parameters whose N and K reach from 12288 to 73728, from one token to a full prefill."""

_DIMS = {"g": 128, "e": 8, "p": 1, "s": 1, "r": 32}  # of letters that no shape names
_BLOCK = (1 << 20) + 7  # codes drawn per tensor; a prime-like period, so that rows of a repeated block differ
_MATRIX = {"e4m3fn": "fp8", "e4m3fnuz": "fp8", "e5m2": "fp8", "bf16": "bf16", "f16": "f16", "int8": "int8", "int4": "int8"}


class BenchError(Exception):
    """A kernel of the backend itself that raised; the message says which, on what, and what it said."""


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What to time. `ops`: OP, OP/VARIANT or OP/VARIANT/OPTIONS, empty for all that the backend takes; `shapes` as
    `DEFAULT_SHAPES`; `rounds`: five or more; `milliseconds`: replays of one competitor in one round; `tune`: every tactic."""

    ops: tuple[str, ...] = ()
    shapes: str = ""
    rounds: int = 5
    milliseconds: float = 25.0
    tune: bool = False


class Watch(Protocol):
    """What `bench` needs of a device; `bench_device.Stopwatch` is the real one."""

    stream: Any

    def environment(self) -> dict[str, str]: ...
    def tensor(self, tensor: ResolvedTensor, block: Codes | None) -> TensorView: ...
    def bytes(self, count: int) -> TensorView: ...
    def copy(self, view: TensorView) -> TensorView: ...
    def poison(self, view: TensorView) -> None: ...
    def restore(self, view: TensorView, kept: TensorView) -> None: ...
    def difference(self, ours: TensorView, theirs: TensorView) -> float: ...
    def synchronize(self) -> None: ...
    def release(self) -> None: ...
    def record(self, launch: Callable[[int], object], copies: int) -> Recording: ...
    def time(self, recording: Recording, milliseconds: float) -> float: ...
    def ceilings(self, kinds: Sequence[str]) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """A competitor: a backend and, of a peer brought along, the tactic that it stands for ("" for the one dispatched)."""

    name: str
    backend: Any
    tactic: str = ""


# problems ---------------------------------------------------------------------------------------------------------------


def _sizes(text: str, what: str) -> tuple[int, ...]:
    if not text or not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise DomainError(f"--shapes: {what} {text!r} is malformed; expected M,M,...@NxK,NxK,... as 1,64@14336x12288,12288x12288")
    return tuple(int(part) for part in text.split(","))


def _shapes(text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    rows, at, pairs = text.partition("@")
    split = [pair.split("x") for pair in pairs.split(",")]
    if not at or any(len(pair) != 2 for pair in split):
        raise DomainError(f"--shapes {text!r} is malformed; expected M,M,...@NxK,NxK,... as 1,64@14336x12288,12288x12288")
    return _sizes(rows, "M"), tuple((_sizes(n, "N")[0], _sizes(k, "K")[0]) for n, k in split)


def _asked(names: Sequence[str]) -> Iterator[tuple[Op, str, str]]:
    """(op, variant, option tokens) of each name; all variants where none is named."""
    for name in names or tuple(ops()):
        op_name, _, rest = name.partition("/")
        if op_name not in ops():
            raise DomainError(f"unknown op {op_name!r}; the ops are {', '.join(ops())}")
        op = ops()[op_name]
        variant, _, tokens = rest.partition("/")
        for found in (variant,) if variant else op.variants:
            yield op, found, tokens or "plain"


def problems_of(plan: BenchPlan) -> tuple[Problem, ...]:
    """The problems of a plan, those that share their constants together. Sizes outside the contract are left out where nobody
    asked for them. Raises DomainError for names that do not exist, and for ops and sizes that were given and do not fit."""
    rows, pairs = _shapes(plan.shapes or DEFAULT_SHAPES)
    found: dict[Problem, None] = {}
    reasons: list[str] = []
    for op, variant, tokens in _asked(plan.ops):
        for n, k in pairs:
            for m in rows:
                given = {"m": m, "n": n, "k": k} | ({"r": 0} if op.is_gemm else {})
                dims = {letter: given.get(letter, _DIMS.get(letter, 1)) for letter in op.dims}
                try:
                    found[parse_problem(f"{op.name}/{variant}/{dims_text(dims)}/{tokens}", ops())] = None
                except DomainError as error:
                    reasons.append(str(error))
    if not found or (plan.ops and plan.shapes and reasons):
        raise DomainError(reasons[0])
    return tuple(found)


def roof_of(op: Op, problem: Problem) -> tuple[float, float, float, str]:
    """(bytes read, bytes written, operations, kind of matrix rate) that a problem takes at least: every input read once and every
    output written once at its format's width. Ops that are no matrix product take no operations, and formats that no rate is
    measured for have the kind ""."""
    read = write = 0.0
    kind = ""
    for tensor in tensors_of(op, problem):
        size = math.prod(tensor.shape) * math.ceil(tensor.format.bits / 4) / 2  # a code of seven bits takes a byte
        if tensor.role in (Role.OUTPUT, Role.INOUT):
            write += size
        if tensor.role is not Role.OUTPUT:
            read += size
        if tensor.name == "a":
            kind = _MATRIX.get(tensor.format.name, "")
    operations = 2.0 * problem.dim("m") * problem.dim("n") * problem.dim("k") if op.is_gemm else 0.0
    return read, write, operations, kind if operations else ""


def _roof_us(demand: tuple[float, float, float, str], rates: Mapping[str, float]) -> tuple[float, str]:
    read, write, operations, kind = demand
    memory = read / rates["read"] + write / rates["write"]
    matrix = operations / rates[kind] if kind in rates else 0.0
    return max(memory, matrix) * 1e6, "matrix" if matrix > memory else "memory"


# operands ---------------------------------------------------------------------------------------------------------------


def _block(tensor: ResolvedTensor, stream: Stream) -> Codes:
    """Codes that fill a tensor when repeated: normal values at the size that quantised data have, scales near one value. Exact
    where a count is meant."""
    total = math.prod(tensor.shape)
    if tensor.family is Family.COUNTS:
        return np.zeros(total, dtype=container(tensor.format))  # filled by `_operands`, which knows what is counted
    count = min(total, _BLOCK)
    dtype = container(tensor.format)
    if tensor.layout:
        return (stream.normal((count,)) * 2.0**30).astype(np.int64).astype(dtype)
    if tensor.family in (Family.BLOCK_SCALE, Family.OUTER_SCALE, Family.GLOBAL_SCALE, Family.SMOOTH):
        size = 32.0 if tensor.format.bits <= 8 else 1.0 if tensor.family is Family.SMOOTH else 0.01
        values = size * (1.0 + 0.1 * np.clip(stream.normal((count,)), -4.0, 4.0))
    elif tensor.format is UINT4:
        values = np.rint(8.0 + 2.6 * stream.normal((count,)))
    else:
        # group-wise 4 bits reach 7 to 8 at 2.7 sigma, token-wise fp8 reaches 448 at 4.5 sigma
        spread = {INT4.name: 2.6, INT8.name: 30.0, "e2m1": 2.0}.get(tensor.format.name, 100.0)
        real = tensor.family in (Family.REAL, Family.BIAS, Family.LORA)
        values = (1.0 if real else spread) * stream.normal((count,))
    return encode(np.asarray(values, dtype=np.float32), tensor.format).astype(dtype)


def _operands(watch: Watch, tensors: Iterable[ResolvedTensor], problem: Problem, seed: int) -> dict[str, TensorView]:
    """Input tensors on the device, by name."""
    found = {}
    for tensor in tensors:
        block = _block(tensor, Stream("bench", tensor.name, str(seed)))
        if tensor.family is Family.COUNTS:  # as even as it goes: rows of experts, rows of shards
            whole, parts = dict(problem.dims).get("m", dict(problem.dims)["n"]), block.size
            block[:] = [whole * (i + 1) // parts - whole * i // parts for i in range(parts)]
        if tensor.format is INT32 or tensor.layout:
            block = block.view(container(tensor.format))
        found[tensor.name] = watch.tensor(tensor, block)
    return found


# competitors ------------------------------------------------------------------------------------------------------------


def device_of(backend: Any) -> str:
    """Name of the device that a backend is timed on. Raises BackendError where it does not run on an accelerator here."""
    if execution_of(backend) == "compiled":
        raise BackendError(f"bench {backend.name}: {NEVER_EXECUTED}; kernels are timed on the device that they are built for")
    place = str(getattr(backend, "device", "host"))
    if place in ("host", "cpu"):
        raise BackendError(f"bench {backend.name}: it computes on the host here; kernels are timed on an accelerator")
    return place


def subjects_of(backend: Any, problem: Problem, by_file: bool) -> tuple[Subject, ...]:
    """The competitors that a peer contributes to a problem: the tactic it dispatches, or, of one brought along by file, all of
    them under their own names. None where it does not take the problem."""
    if execution_of(backend) == "compiled" or backend.supports(problem) is not None:
        return ()
    names = tactics_of(backend, problem)
    if not by_file or tuple(names) == ("default",):
        return (Subject(str(backend.name), backend, names[0]),)
    return tuple(Subject(tactic, backend, tactic) for tactic in names)


@dataclass(slots=True)
class _Run:
    """One competitor, recorded. `outputs`: copies of what its first launch left in the tensors that it writes, by name."""

    name: str
    kernel: str
    recording: Recording
    outputs: dict[str, TensorView]
    rounds: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Operands:
    """What launches rotate through. `kept`: of each set, what its INOUT tensors held at first."""

    sets: list[dict[Role, dict[str, TensorView]]]
    kept: list[dict[str, TensorView]]


def _afresh(watch: Watch, operands: _Operands) -> None:
    """Outputs of 0xFF and INOUT tensors as they were: nothing that the competitor before has written is left."""
    for each, kept in zip(operands.sets, operands.kept, strict=True):
        for view in each[Role.OUTPUT].values():
            watch.poison(view)
        for name, view in each[Role.INOUT].items():
            watch.restore(view, kept[name])


def _recorded(watch: Watch, subject: Subject, problem: Problem, operands: _Operands) -> _Run:
    """Prepare and stage every set, run the first one, and record launches that rotate through all."""
    backend, tactic, sets = subject.backend, subject.tactic, operands.sets
    _afresh(watch, operands)
    size = backend.workspace(problem, tactic) if hasattr(backend, "workspace") else 0
    scratch = watch.bytes(size)
    calls = []
    staged: dict[int, Any] = {}
    for each in sets:
        constants, activations = each[Role.CONSTANT], each[Role.ACTIVATION] | each[Role.INOUT]
        state = backend.prepare(problem, tactic, constants) if hasattr(backend, "prepare") else constants
        key = id(each[Role.ACTIVATION])
        if key not in staged:
            staged[key] = backend.stage(problem, tactic, activations) if hasattr(backend, "stage") else activations
        calls.append((state, staged[key], each[Role.OUTPUT]))
    watch.synchronize()

    def launch(index: int) -> object:
        state, inputs, outputs = calls[index]
        return backend.run(problem, tactic, state, inputs, outputs, scratch, watch.stream)

    kernel = str(launch(0))
    watch.synchronize()
    written = {name: watch.copy(view) for name, view in (sets[0][Role.OUTPUT] | sets[0][Role.INOUT]).items()}
    return _Run(subject.name, kernel, watch.record(launch, len(calls)), written)


def _sets(
    watch: Watch, op: Op, problem: Problem, constants: Sequence[dict[str, TensorView]], copies: int
) -> _Operands:
    """With constants: their copies, and one set of the rest. Without: copies of everything."""
    tensors = tensors_of(op, problem)
    by_role = {role: [tensor for tensor in tensors if tensor.role is role] for role in Role}
    sets: list[dict[Role, dict[str, TensorView]]] = []
    for index in range(copies):
        if sets and by_role[Role.CONSTANT]:
            sets.append({**sets[0], Role.CONSTANT: constants[index]})
            continue
        sets.append({
            Role.CONSTANT: constants[index] if constants else {},
            Role.ACTIVATION: _operands(watch, by_role[Role.ACTIVATION], problem, index),
            Role.INOUT: _operands(watch, by_role[Role.INOUT], problem, index),
            Role.OUTPUT: {tensor.name: watch.tensor(tensor, None) for tensor in by_role[Role.OUTPUT]},
        })
    return _Operands(sets, [{name: watch.copy(view) for name, view in each[Role.INOUT].items()} for each in sets])


def _copies(size: float) -> int:
    return min(COPIES, max(2, math.ceil(ROTATION / max(size, 1.0))))


def _bytes_of(tensors: Iterable[ResolvedTensor]) -> float:
    return math.fsum(math.prod(tensor.shape) * math.ceil(tensor.format.bits / 4) / 2 for tensor in tensors)


# the run ----------------------------------------------------------------------------------------------------------------


def _group(problem: Problem) -> tuple[Any, ...]:
    """What fixes the constants of a problem: everything but M."""
    return problem.op, problem.variant, problem.options, tuple(pair for pair in problem.dims if pair[0] != "m")


def _check_names(problems: Sequence[Problem], peers: Sequence[tuple[Any, bool]]) -> None:
    """Figures are kept by name: raises DomainError where two peers of one problem have the same."""
    for problem in problems:
        found: dict[str, Any] = {}
        for peer, by_file in peers:
            for name in (subject.name for subject in subjects_of(peer, problem, by_file)):
                if name in found:
                    raise DomainError(
                        f"bench {problem}: two peers are called {name!r}, a tactic or name of {found[name].name} and one of "
                        f"{peer.name}; expected a name for each: name a peer once, and rename the tactic of one"
                    )
                found[name] = peer


def bench(
    plan: BenchPlan, backend: Any, peers: Sequence[tuple[Any, bool]], watch: Watch,
    on_row: Callable[[Mapping[str, float], Sequence[Row]], None] = lambda rates, rows: None,
) -> tuple[dict[str, float], tuple[Row, ...]]:
    """(measured rates, rows) of a plan. `peers`: (backend, whether it was brought along by file). `on_row` is told the rates and
    the rows so far after each. A problem that the backend does not take has no row. A peer that raises is left out of the row,
    with what it said in `peer_errors`.
    Raises DomainError where the backend takes none of the problems or two peers of one problem have one name, BenchError where
    one of its own kernels raises."""
    wanted = [problem for problem in problems_of(plan) if backend.supports(problem) is None]
    if not wanted:
        first = problems_of(plan)[0]
        raise DomainError(f"bench: {backend.name} takes none of the problems; of {first} it says: {backend.supports(first)}")
    _check_names(wanted, peers)
    demands = {problem: roof_of(ops()[problem.op], problem) for problem in wanted}
    rates = watch.ceilings(sorted({kind for *_, kind in demands.values() if kind}))
    rows: list[Row] = []
    group: tuple[Any, ...] = ()
    constants: list[dict[str, TensorView]] = []
    for problem in wanted:
        op = ops()[problem.op]
        fixed = [tensor for tensor in tensors_of(op, problem) if tensor.role is Role.CONSTANT]
        copies = _copies(_bytes_of(fixed or tensors_of(op, problem)))
        if _group(problem) != group:
            group = _group(problem)
            constants.clear()
            watch.release()
            constants = [_operands(watch, fixed, problem, index) for index in range(copies)] if fixed else []
        for row in _rows(plan, backend, peers, watch, problem, demands[problem], rates, constants, copies):
            rows.append(row)
            on_row(rates, rows)
    return rates, tuple(rows)


def order_of(number: int, count: int) -> tuple[int, ...]:
    """The order in which round `number` (from 0) times `count` competitors: each is the first one in turn, and every
    other turn the orders come backwards. Over two turns each stands at each place twice and before each other one in half of the
    rounds."""
    start = number % count
    order = (*range(start, count), *range(start))
    return order if number // count % 2 == 0 else order[::-1]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _ours(watch: Watch, backend: Any, tactic: str, problem: Problem, operands: _Operands) -> _Run:
    try:
        return _recorded(watch, Subject(tactic, backend, tactic), problem, operands)
    except Exception as error:
        said = f"bench {backend.name}: tactic {tactic!r} on {problem} raised {_said(error)}"
        raise BenchError(f"{said}; leave it out by --ops or --shapes") from error


def _rows(
    plan: BenchPlan, backend: Any, peers: Sequence[tuple[Any, bool]], watch: Watch, problem: Problem,
    demand: tuple[float, float, float, str], rates: Mapping[str, float], constants: Sequence[dict[str, TensorView]], copies: int,
) -> Iterator[Row]:
    """All tactics of one problem beside the same peers, in the same rounds."""
    op = ops()[problem.op]
    operands = _sets(watch, op, problem, constants, copies)
    names = tactics_of(backend, problem)
    own = [_ours(watch, backend, tactic, problem, operands) for tactic in (names if plan.tune else names[:1])]
    others, errors = [], {}
    for peer, by_file in peers:
        for subject in subjects_of(peer, problem, by_file):
            try:
                others.append(_recorded(watch, subject, problem, operands))
            except Exception as error:
                errors[subject.name] = _said(error)
    field_ = [*own, *others]
    for number in range(max(plan.rounds, 5)):
        for place in order_of(number, len(field_)):
            field_[place].rounds.append(watch.time(field_[place].recording, plan.milliseconds))
    roof_us, roof = _roof_us(demand, rates)
    read, write, operations, _ = demand
    dims = dict(problem.dims)
    for run in own:
        us = statistics.median(run.rounds)
        yield Row(
            problem.op, problem.variant, str(problem).rsplit("/", 1)[1], dims.get("m", 0), dims.get("n", 0), dims.get("k", 0),
            dims_text(dims), run.name, run.name == names[0], run.kernel, us, roof_us, roof, operations / us / 1e6,
            (read + write) / us / 1e3, tuple(run.rounds), run.recording.graph,
            {other.name: statistics.median(other.rounds) for other in others},
            {other.name: tuple(other.rounds) for other in others}, {other.name: other.recording.graph for other in others},
            {
                other.name: max(watch.difference(view, other.outputs[name]) for name, view in run.outputs.items())
                for other in others
            }, errors,
        )


def method_of(plan: BenchPlan) -> dict[str, Any]:
    """How a plan is measured, for the header of its figures."""
    return {
        "rounds": max(plan.rounds, 5), "milliseconds": plan.milliseconds, "rotation_bytes": ROTATION,
        "graph_milliseconds": GRAPH_MS,
        "us": "median over rounds; a round is the median over replays", "interval": "lowest and highest round",
        "launches": (
            "back to back; kernels that begin before the one before has ended (programmatic dependent launch) overlap: us is the "
            "throughput of a sequence, not the latency of a single launch"
        ),
        "peers": (
            "compared where both were launched from a graph or both from the host; differences: the largest over the tensors "
            "written, each poisoned before the competitor ran"
        ),
        "tactics": "all" if plan.tune else "dispatched",
    }
