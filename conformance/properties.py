"""Relations between several runs of one backend that hold whatever its arithmetic, given operands that leave no rounding.

GEMM relations run on operands of the narrowest exact lane: every accumulator of at least 8 bits is exact on them, so both
sides of a relation are the same real number and must be the same bits (either zero). Where a declaration says batch-invariant,
rows are compared on ordinary operands, too. Quantiser relations follow from the recipes. Decides: which relations an op has
and what must agree. Refuses: a relation that a legitimate kernel could break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from lowbit.references.declarations import Declaration
from lowbit.references.formats import Codes, Format, Kind, Nan, Reals, container, decode, is_nan, order_key
from lowbit.references.rounding import Overflow, Rounding, encode

from .bounds import restrict
from .case import Case, Operands, Problem, Stream, Tensor
from .op import DomainError, Family, Op, Role, make_problem, outside_domain, specs_of, tensors_of
from .patterns import draw_operands
from .selection import case_list
from .stability import Execute, Finding
from .worker import Ending, Outcome, Variation

__all__ = ["PROPERTIES", "judge_property", "property_cases", "relations_of"]

Pair = tuple[str, Codes, Codes, Format]
"""(name, one side, other side, format): codes that must agree."""


def _operands(op: Op, problem: Problem, seed: int, pattern: str = "") -> Operands:
    pattern = pattern or ("exactw8" if op.is_gemm and "exactw8" in op.patterns else "normal")
    return draw_operands(op, Case(problem, pattern, seed))


def _with(operands: Operands, **codes: Codes) -> Operands:
    tensors = dict(operands.tensors)
    for name, value in codes.items():
        tensors[name] = Tensor(np.ascontiguousarray(value), tensors[name].format)
    return Operands(tensors)


def _re(op: Op, problem: Problem, dims: Mapping[str, int] | None = None, **options: str) -> Problem:
    """The problem with other dims and options. Raises DomainError where the op has no such problem."""
    return make_problem(op, problem.variant, {**dict(problem.dims), **(dims or {})}, {**dict(problem.options), **options})


def _output(op: Op, problem: Problem) -> tuple[str, Format]:
    spec = next(spec for spec in tensors_of(op, problem) if spec.role in (Role.OUTPUT, Role.INOUT))
    return spec.name, spec.format


class _Ended(Exception):
    """A run that gave nothing to compare."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


Run = Callable[[Problem, Operands], Mapping[str, Codes]]


# GEMM relations ------------------------------------------------------------------------------------------------------


def _rows(op: Op, problem: Problem, seed: int, run: Run, pattern: str = "") -> list[Pair]:
    """A row of D depends neither on the other rows nor on M."""
    operands = _operands(op, problem, seed, pattern)
    m = problem.dim("m")
    rows = np.unique(Stream(problem, "rows", seed).integers(0, m - 1, (max(1, m // 2),)))
    part_problem, part = restrict(op, problem, operands, rows, slice(None))
    whole, some = run(problem, operands)["d"], run(part_problem, part)["d"]
    return [("d", whole[rows], some, _output(op, problem)[1])]


def _columns(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """Shards along N, one below the other, give the whole."""
    operands = _operands(op, problem, seed)
    step, n = op.ranges["n"][2], problem.dim("n")
    if any("ceil(n, 128)" in spec.shape for spec in specs_of(op, problem)):
        step = 128
    cut = max(step, n // step // 2 * step)
    if cut >= n:
        raise DomainError("N has one shard only")
    parts = []
    for columns in (slice(0, cut), slice(cut, n)):
        part_problem, part = restrict(op, problem, operands, slice(None), columns)
        parts.append(run(part_problem, part)["d"])
    return [("d", run(problem, operands)["d"], np.concatenate(parts, axis=1), _output(op, problem)[1])]


_DOUBLED = ("token_scale", "alpha", "a_scale", "a")


def _doubled(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """A scale of A times two doubles D exactly (bias and low-rank term left out)."""
    problem = _plain(op, problem)
    operands = _operands(op, problem, seed)
    name = next(name for name in _DOUBLED if name in operands and operands[name].format.bits > 8)
    fmt = operands[name].format
    twice = _once(2.0 * decode(operands[name].codes, fmt), fmt)
    single, double = run(problem, operands)["d"], run(problem, _with(operands, **{name: twice}))["d"]
    out = _output(op, problem)[1]
    return [("d", _once(2.0 * decode(single, out), out), double, out)]


def _plain(op: Op, problem: Problem) -> Problem:
    """Without bias and without low-rank term."""
    options = {option.name: option.tokens for option in op.options}
    changes = {name: token for name, token in (("bias", "nobias"), ("lora", "nolora")) if name in options}
    return _re(op, problem, {"r": 0} if "r" in op.dims else None, **changes)


def _k_shards(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """D over K = D over its first part + D over the rest, with outer scales 1: the lane's sums are values of the output."""
    problem = _plain(op, problem)
    dims = dict(problem.dims)
    step = dims.get("g") or (128 if problem.variant == "block" else 64)
    cut = dims["k"] // step // 2 * step
    if not cut:
        raise DomainError("K has one step only")
    operands = _operands(op, problem, seed)
    ones = {
        spec.name: encode(np.ones(spec.shape), spec.format) for spec in tensors_of(op, problem)
        if spec.family in (Family.OUTER_SCALE, Family.GLOBAL_SCALE) and spec.role is not Role.OUTPUT
    }
    operands = _with(operands, **ones)
    out = _output(op, problem)[1]
    total = decode(run(problem, operands)["d"], out)
    halves = []
    for start, stop in ((0, cut), (cut, dims["k"])):
        part = _re(op, problem, {"k": stop - start} | ({"g": stop - start} if dims.get("g") == dims["k"] else {}))
        cuts = {}
        for spec in tensors_of(op, part):
            if spec.role is Role.OUTPUT:
                continue
            codes = operands[spec.name].codes
            if codes.ndim and spec.shape[-1] != codes.shape[-1]:
                first = start * codes.shape[-1] // dims["k"]
                codes = codes[..., first : first + spec.shape[-1]]
            cuts[spec.name] = Tensor(np.ascontiguousarray(codes), spec.format)
        halves.append(decode(run(part, Operands(cuts))["d"], out))
    return [("d", _once(total, out), _once(halves[0] + halves[1], out), out)]


def _once(values: Reals, fmt: Format) -> Codes:
    return encode(values, fmt, Rounding.RNE, Overflow.SPECIAL)


def _zero_lora(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """A low-rank activation of zeros equals no low-rank term."""
    if "lora" not in {option.name for option in op.options}:
        raise DomainError("the op has no low-rank term")
    with_lora = _re(op, problem, {"r": 32}, lora="lora")
    without = _re(op, problem, {"r": 0}, lora="nolora")
    operands = _operands(op, with_lora, seed)
    operands = _with(operands, lora_act=np.zeros_like(operands["lora_act"].codes))
    rest = Operands({name: tensor for name, tensor in operands.items() if not name.startswith("lora_")})
    return [("d", run(with_lora, operands)["d"], run(without, rest)["d"], _output(op, problem)[1])]


def _bias(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """A zero bias equals no bias, and activations of zeros leave the bias alone."""
    tokens = next((option.tokens for option in op.options if option.name == "bias"), ())
    legal = [token for token in tokens if token != "nobias"]
    if not legal:
        raise DomainError("the op has no bias")
    without = _plain(op, problem)
    for token in legal:
        try:
            problem = _re(op, without, bias=token)
            break
        except DomainError:
            continue
    else:
        raise DomainError("no bias with this variant")
    operands = _operands(op, problem, seed)
    out = _output(op, problem)[1]
    zero = _with(operands, bias=np.zeros_like(operands["bias"].codes))
    rest = Operands({name: tensor for name, tensor in zero.items() if name != "bias"})
    dead = _with(operands, a=np.zeros_like(operands["a"].codes))
    alone = np.broadcast_to(operands["bias"].codes, (problem.dim("m"), problem.dim("n"))) if "e" not in op.dims else None
    pairs = [("zero bias", run(problem, zero)["d"], run(without, rest)["d"], out)]
    if alone is not None:
        pairs.append(("bias alone", alone, run(problem, dead)["d"], out))
    return pairs


def _empty(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """A call with M = 0 ends without an error, writes nothing (the suite looks), and the next call is as before it."""
    empty = _re(op, problem, {"m": 0})
    operands = _operands(op, problem, seed)
    before = run(problem, operands)["d"]
    run(empty, _operands(op, empty, seed))
    return [("d", before, run(problem, operands)["d"], _output(op, problem)[1])]


# Quantiser and encoding relations ------------------------------------------------------------------------------------


def _monotone(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """Within a row of sorted values, codes of one block never fall."""
    operands = _operands(op, problem, seed)
    x = operands["x"]
    values = decode(x.codes, x.format)
    ordered = np.take_along_axis(x.codes, np.argsort(values, axis=-1, kind="stable"), axis=-1)
    found = run(problem, _with(operands, x=ordered))
    name = "q" if "q" in found else next(iter(found))
    spec = next(spec for spec in tensors_of(op, problem) if spec.name == name)
    codes = found[name][: x.codes.shape[0]]
    scales = next((codes for key, codes in found.items() if key != name and "scale" in key), None)
    groups = codes.shape[-1]
    if scales is not None and scales.ndim == 2 and scales.shape[0] == codes.shape[0] and scales.shape[1] > 1:
        groups = codes.shape[-1] // scales.shape[1]
    keys = order_key(codes, spec.format)
    blocks = keys[:, : keys.shape[1] // groups * groups].reshape(keys.shape[0], -1, groups)
    climbing = np.maximum.accumulate(blocks, axis=-1)
    return [(name, _as_codes(climbing), _as_codes(blocks), _WIDE)]


def _token_rows(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """A row's codes and scales depend on that row alone (not for per-tensor scales)."""
    operands = _operands(op, problem, seed)
    m = problem.dim("m")
    rows = np.unique(Stream(problem, "rows", seed).integers(0, m - 1, (max(1, m // 2),)))
    part_problem, part = restrict(op, problem, operands, rows, slice(None))
    whole, some = run(problem, operands), run(part_problem, part)
    return [
        (spec.name, whole[spec.name][rows], some[spec.name], spec.format) for spec in tensors_of(op, problem)
        if spec.role is Role.OUTPUT and spec.shape and spec.shape[0] == m and some[spec.name].shape[0] == rows.size
    ]


def _involution(op: Op, problem: Problem, seed: int, run: Run) -> list[Pair]:
    """The conversion applied twice gives the operand back."""
    operands = _operands(op, problem, seed)
    name, fmt = _output(op, problem)
    source = next(spec.name for spec in tensors_of(op, problem) if spec.role is not Role.OUTPUT)
    once = run(problem, operands)[name]
    if once.size != operands[source].codes.size or fmt is not operands[source].format:
        raise DomainError("the conversion changes the shape")
    twice = run(problem, _with(operands, **{source: once.reshape(operands[source].codes.shape)}))[name]
    return [(name, operands[source].codes.reshape(twice.shape), twice, fmt)]


_WIDE = Format("place", 32, Kind.UINT, 0, 32, 0, False, Nan.NONE, -1, "place in the order of codes")


def _as_codes(keys: npt.NDArray[np.int64]) -> Codes:
    return (keys + (1 << 20)).astype(np.uint32)


# The table -----------------------------------------------------------------------------------------------------------

_GEMMS = {
    "prop_rows": (_rows, "PRP-1"), "prop_columns": (_columns, "PRP-2"), "prop_double": (_doubled, "PRP-3"),
    "prop_kshards": (_k_shards, "PRP-4"), "prop_zerolora": (_zero_lora, "PRP-5"), "prop_bias": (_bias, "PRP-6"),
    "prop_empty": (_empty, "PRP-7"),
}
_OTHERS = {"prop_monotone": (_monotone, "PRP-8"), "prop_tokenrows": (_token_rows, "PRP-9"), "prop_twice": (_involution, "PRP-10")}
PROPERTIES: dict[str, tuple[Callable[[Op, Problem, int, Run], list[Pair]], str]] = {**_GEMMS, **_OTHERS}
"""Pattern of the case id -> (relation, clause)."""

_PER_PROPERTY = 5


def _applies(op: Op, name: str, problem: Problem) -> bool:
    if op.is_gemm and op.name.startswith("gemm_"):
        return name in _GEMMS and not ("e" in op.dims and name in ("prop_rows",))
    options = dict(problem.options)
    if name == "prop_monotone":
        named = op.name in ("fp8_quantize", "int8_quantize", "int4_quantize", "nvfp4_quantize")
        return named and problem.variant not in ("tensor", "tile") and options.get("layout") != "swizzled"
    if name == "prop_tokenrows":
        named = op.name in ("fp8_quantize", "int8_quantize", "nvfp4_quantize")
        return named and problem.variant not in ("tensor", "tile", "dynamic")
    if name == "prop_twice":
        return (op.name, problem.variant) in (("int4_pack", "b8"), ("int4_encode", "unified"))
    return False


def relations_of(op: Op, problem: Problem) -> tuple[str, ...]:
    """Patterns of the relations that a problem has."""
    table = PROPERTIES.items()
    return tuple(name for name, (relation, _) in table if _applies(op, name, problem) and _possible(op, relation, problem, 1))


def property_cases(op: Op) -> list[Case]:
    """Up to five problems per relation, from the op's own list: M at least 2, sizes small enough to run several times."""
    problems = list(dict.fromkeys(item.case.problem for item in case_list(op)))
    usable = [p for p in problems if dict(p.dims).get("m", 2) >= 2 and np.prod([float(d or 1) for _, d in p.dims]) < 1 << 31]
    found: list[Case] = []
    for name, (relation, _) in PROPERTIES.items():
        stream = Stream("property", op.name, name)
        picked = 0
        for attempt in range(60):
            if picked == _PER_PROPERTY or not usable:
                break
            problem = usable[int(stream.integers(0, len(usable) - 1, (1,))[0])]
            if _applies(op, name, problem) and _possible(op, relation, problem, attempt + 1):
                found.append(Case(problem, name, attempt + 1))
                picked += 1
    return list({(case.problem, case.pattern): case for case in found}.values())


def _possible(op: Op, relation: Callable[[Op, Problem, int, Run], list[Pair]], problem: Problem, seed: int) -> bool:
    """Whether the relation exists for the problem: a dry run on outputs of zeros."""

    def zeros(local: Problem, operands: Operands) -> Mapping[str, Codes]:
        broken = outside_domain(op, local)
        if broken:
            raise DomainError(broken)
        return {spec.name: np.zeros(spec.shape, dtype=container(spec.format)) for spec in tensors_of(op, local)
                if spec.role in (Role.OUTPUT, Role.INOUT)}

    try:
        relation(op, problem, seed, zeros)
    except (DomainError, StopIteration):
        return False
    return True


def judge_property(op: Op, case: Case, tactic: str, declaration: Declaration, execute: Execute) -> Finding | Outcome:
    """Run the relation of a case. Returns the outcome itself where a run gives nothing to compare."""
    relation, clause = PROPERTIES[case.pattern]
    kernel = ""

    def run(problem: Problem, operands: Operands) -> Mapping[str, Codes]:
        nonlocal kernel
        outcome = execute(problem, operands, Variation())
        if outcome.status is not Ending.OK or outcome.findings:
            raise _Ended(outcome)
        kernel = outcome.kernel
        return outcome.outputs

    try:
        pairs = relation(op, case.problem, case.seed, run)
        if relation is _rows and declaration.batch_invariant:  # then it holds where sums are rounded, too
            pairs += _rows(op, case.problem, case.seed, run, "normal")
    except _Ended as ended:
        return ended.outcome
    wrong, judged, sentences = 0, 0, []
    for name, left, right, fmt in pairs:
        differ = _differ(left, right, fmt)
        judged += left.size
        if differ.any():
            wrong += int(differ.sum())
            place = tuple(int(i) for i in np.argwhere(differ)[0])
            sentences.append(f"{name}{list(place)}: {int(left[place]):#x} on one side, {int(right[place]):#x} on the other")
    text = (relation.__doc__ or "").strip()
    reason = f"{text} Broken for {wrong} of {judged} elements: {'; '.join(sentences)}" if wrong else ""
    return Finding(reason, clause, wrong, judged, _operands(op, case.problem, case.seed).sha256(), kernel)


def _differ(left: Codes, right: Codes, fmt: Format) -> npt.NDArray[np.bool_]:
    """Where codes differ; both zeros are one value, and so are all NaN codes."""
    if left.shape != right.shape:
        return np.ones(left.shape, dtype=np.bool_)
    differ = left != right
    if fmt is _WIDE:
        return np.asarray(differ)
    both_nan = is_nan(left, fmt) & is_nan(right, fmt)
    both_zero = (decode(left, fmt) == 0) & (decode(right, fmt) == 0) if fmt.has_neg_zero else np.zeros(left.shape, dtype=np.bool_)
    return np.asarray(differ & ~both_nan & ~both_zero)
