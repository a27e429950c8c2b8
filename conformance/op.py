"""The contract of one op as a record, and what a judge needs to know of its outputs.

Decides: which problems an op has (domain, constraints), which tensors a problem has (names, formats, shapes, roles,
layouts), and what an `Expectation` is. Refuses: case ids that name an unknown op, variant, option or a size outside the
domain, with the clause that is broken.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.references.declarations import Contraction, Declaration, Step
from lowbit.references.formats import BF16, E4M3FN, E4M3FNUZ, F16, F32, FORMATS, Codes, Format, code_of_key, is_nan, order_key

from .case import Case, Operands, Problem, Stream

__all__ = [
    "GEMM_PATTERNS", "Constraint", "DomainError", "Expectation", "Family", "Flag", "Op", "Option", "ResolvedTensor", "Role",
    "TensorSpec", "evaluate", "exactly", "in_format", "make_problem", "outside_domain", "parse_case", "parse_problem",
    "possible_options", "specs_of", "tensors_of",
]


class DomainError(ValueError):
    """A case or problem that the contract does not admit. The message names what was got, what is legal and the clause."""


class Role(IntEnum):
    """Who writes a tensor and when."""

    CONSTANT = 0  # weights and their scales: given once, to `prepare`
    ACTIVATION = 1  # given with each run
    OUTPUT = 2  # written by the run, poisoned before it
    INOUT = 3  # given with each run and changed in place


class Family(IntEnum):
    """What the values of a tensor mean to a pattern that draws them."""

    ELEMENT = 0  # quantised codes of a matrix
    REAL = 1  # unquantised activations or weights
    BLOCK_SCALE = 2  # one per group along K
    OUTER_SCALE = 3  # one per token, channel or tensor, in f32 or the activation's format
    GLOBAL_SCALE = 4  # one per tensor on top of block scales; decode direction
    BIAS = 5
    LORA = 6  # low-rank operands
    ZERO_POINT = 7
    COUNTS = 8  # rows of each expert
    SMOOTH = 9  # divisor per k of the activations


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an op. `shape` holds expressions over the dims (`k/g`, `ceil(m/128)*128`); `format` is a format or the
    name of the option whose token names it; `when` lists the options it depends on, with the tokens that bring it in."""

    name: str
    format: Format | str
    shape: tuple[str, ...]
    role: Role
    family: Family = Family.ELEMENT
    when: tuple[tuple[str, tuple[str, ...]], ...] = ()
    layout: str = ""  # name of a public layout: the tensor is then its storage words; empty: one code per element, row-major
    logical: tuple[str, ...] = ()  # rows and columns of the code matrix behind a layout


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of an op. The first token is the default. Tokens are unique within an op, so that ids need no names."""

    name: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule on dims, options and variant that must be true; `clause` is the sentence of docs/contract.md that says it."""

    expression: str
    clause: str


class Flag(IntFlag):
    """What an output element may be besides a code of its interval."""

    NONE = 0
    NAN_REQUIRED = 1  # any NaN code, nothing else
    NAN_OK = 2  # any NaN code, or a code of the interval
    FREE = 4  # any code: the contract leaves it undefined
    UNTOUCHED = 8  # must still hold the poison it held before the run


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """The admissible codes of one output tensor, element by element.

    `lo`, `hi`: int64 keys of the format's total order (formats.order_key), both ends admissible, in the tensor's logical
    shape. `flags`: uint8 of `Flag`. `sparse`: flat index -> the admissible codes, where they are no interval; it overrides
    lo and hi. `exact`: the value before the output's rounding, float64, for reports (None for encodings). `either_zero`:
    both zeros are admissible where one of them is.
    """

    format: Format
    lo: npt.NDArray[np.int64]
    hi: npt.NDArray[np.int64]
    flags: npt.NDArray[np.uint8]
    sparse: Mapping[int, frozenset[int]] = field(default_factory=dict)
    exact: npt.NDArray[np.float64] | None = None
    either_zero: bool = False

    def admits(self, codes: Codes, untouched: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
        """Which elements of `codes` (same shape) are admissible; `untouched` says which still hold the poison. A container that
        holds more than a code of the format is admissible only where anything is."""
        whole, codes = codes, in_format(codes, self.format)
        keys = order_key(codes, self.format)
        nan = is_nan(codes, self.format)
        lo, hi = self.lo, self.hi
        if self.either_zero:
            hi, lo = np.where(hi == -1, 0, hi), np.where(lo == 0, -1, lo)
        ok = (lo <= keys) & (keys <= hi) & ~nan
        ok = np.where(self.flags & Flag.NAN_REQUIRED, nan, ok | (nan & ((self.flags & Flag.NAN_OK) != 0)))
        if self.sparse:
            flat_codes, flat_ok = codes.reshape(-1), ok.reshape(-1)
            for index, codes_ok in self.sparse.items():
                flat_ok[index] = int(flat_codes[index]) in codes_ok
            ok = flat_ok.reshape(codes.shape)
        ok &= whole == codes
        ok |= (self.flags & Flag.FREE) != 0
        must_stay = (self.flags & Flag.UNTOUCHED) != 0
        if must_stay.any():
            ok = np.where(must_stay, False if untouched is None else untouched, ok)
        return np.asarray(ok, dtype=np.bool_)

    def example(self) -> Codes:
        """One admissible code per element (the middle of the interval), for mutants and displays."""
        return code_of_key((self.lo + self.hi) // 2, self.format)


def in_format(codes: Codes, format: Format) -> Codes:
    """The low bits of each container that make a code of the format."""
    if format.bits == 8 * codes.dtype.itemsize:
        return codes
    return np.asarray(codes & codes.dtype.type((1 << format.bits) - 1))


def exactly(codes: Codes, format: Format, *, nan_any: bool = True, free: npt.NDArray[np.bool_] | None = None) -> Expectation:
    """The expectation of exactly these codes. NaN codes admit every NaN code of the format if `nan_any`."""
    keys = order_key(codes, format)
    flags = np.zeros(codes.shape, dtype=np.uint8)
    nan = is_nan(codes, format)
    sparse: dict[int, frozenset[int]] = {}
    if nan_any:
        flags[nan] |= np.uint8(Flag.NAN_REQUIRED)
    else:
        sparse = {int(i): frozenset((int(codes.reshape(-1)[i]),)) for i in np.flatnonzero(nan)}
    if free is not None:
        flags[free] |= np.uint8(Flag.FREE)
    return Expectation(format, keys, keys, flags, sparse)


@dataclass(frozen=True, slots=True)
class ResolvedTensor:
    """A tensor of one problem: format and shape worked out. `logical` is the shape of the code matrix behind a layout."""

    name: str
    format: Format
    shape: tuple[int, ...]
    role: Role
    family: Family
    layout: str
    logical: tuple[int, ...]


GEMM_PATTERNS = (
    "exactw8", "exactw11", "exactw14", "exactw24", "onehot", "scaleprobe", "normal", "positive", "shifted", "lognormal", "cancel",
    "special", "zeros", "extremes", "maxima", "ramp", "golden", "tensors",
)
"""Patterns of a matrix product, unless its file leaves one out (patterns.py says what each draws)."""


Expect = Callable[[Case, Operands, Declaration], Mapping[str, Expectation]]
"""(case, operands, declaration) -> expectation per output tensor. Operands of an INOUT tensor hold what it held before."""


@dataclass(frozen=True, slots=True)
class Op:
    """The contract of one op.

    `ranges`: per dim letter the sizes that cases may take (low, high, multiple). `program`: the normative program for a
    problem, given the datapath of its main contraction; a declaration must have its signature. `environment`: the operands
    and factors by the names the program uses. `minimum_bits`: fraction bits (of a fused datapath) or significand bits (of
    an IEEE one) below which a declared accumulator is of a lower class. `rejects`: (problem, clause) that a backend must
    refuse. `edges`: ids of cases with a name in the contract, always run. `draw`: the op's own way to draw a tensor for a
    pattern that needs to know the op (ties of a recipe, expert counts); None where the pattern's own way serves.
    `judged`: variant -> the clause that says what its outputs are; a DRIFT names it.
    `exact`: the output over the reals, where one environment does not give it (experts).
    `expect_given`: expectations that also look at the outputs, where codes are judged on the backend's own admissible scales.
    """

    name: str
    formula: str
    clauses: tuple[str, ...]
    variants: tuple[str, ...]
    dims: tuple[str, ...]
    options: tuple[Option, ...]
    tensors: tuple[TensorSpec, ...]
    constraints: tuple[Constraint, ...]
    ranges: Mapping[str, tuple[int, int, int]]
    patterns: tuple[str, ...]
    expect: Expect
    program: Callable[[Problem, Any], tuple[Contraction | Step, ...]] | None = None
    environment: Callable[[Problem, Operands], Mapping[str, Any]] | None = None
    minimum_bits: int = 0
    edges: tuple[str, ...] = ()
    rejects: tuple[tuple[str, str], ...] = ()
    draw: Callable[[Case, ResolvedTensor, Stream], Codes | None] | None = None
    judged: Mapping[str, str] = field(default_factory=dict)
    exact: Callable[[Problem, Operands, Declaration], npt.NDArray[np.float64]] | None = None
    expect_given: Callable[[Case, Operands, Declaration, Mapping[str, Codes]], Mapping[str, Expectation]] | None = None

    @property
    def is_gemm(self) -> bool:
        """Whether the op is a matrix product: D [M, N] on a declared datapath."""
        return self.program is not None and "n" in self.dims


_FUNCTIONS: dict[str, Callable[..., Any]] = {"ceil": lambda n, d: -(-n // d), "min": min, "max": max}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """Value of an expression over integers and tokens: + - * // % **, comparisons, in, and, or, not, ceil(n, d), min, max.

    `a/b` must divide exactly. Raises ValueError for any other construct."""

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return names[node.id]
            case ast.Tuple():
                return tuple(walk(item) for item in node.elts)
            case ast.BinOp(op=ast.Div()):
                top, bottom = walk(node.left), walk(node.right)
                if bottom == 0 or top % bottom:
                    raise DomainError(f"{expression}: {top} is not a multiple of {bottom}")
                return top // bottom
            case ast.BinOp():
                return _BINARY[type(node.op)](walk(node.left), walk(node.right))
            case ast.BoolOp():
                values = (walk(item) for item in node.values)
                return all(values) if isinstance(node.op, ast.And) else any(values)
            case ast.UnaryOp(op=ast.Not()):
                return not walk(node.operand)
            case ast.Compare():
                left, results = walk(node.left), []
                for op, right_node in zip(node.ops, node.comparators, strict=True):
                    right = walk(right_node)
                    results.append(_COMPARE[type(op)](left, right))
                    left = right
                return all(results)
            case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*(walk(arg) for arg in node.args))
            case _:
                raise ValueError(f"expression {expression!r} uses {type(node).__name__}, which is not part of the grammar")

    return walk(_parsed(expression))


def possible_options(op: Op, variant: str, options: Mapping[str, str]) -> bool:
    """Whether the constraints that speak of variant and options alone admit this choice, whatever the dims."""
    names = {**options, "variant": variant}
    return all(
        evaluate(constraint.expression, names) for constraint in op.constraints
        if _identifiers(constraint.expression) <= set(names)
    )


@cache
def _identifiers(expression: str) -> frozenset[str]:
    return frozenset(node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)) - set(_FUNCTIONS)


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _names(problem: Problem) -> dict[str, Any]:
    return {**dict(problem.dims), **dict(problem.options), "variant": problem.variant}


_TOKEN_FORMATS = {"bf16": BF16, "f16": F16, "f32": F32, "fn": E4M3FN, "fnuz": E4M3FNUZ} | dict(FORMATS)


def make_problem(op: Op, variant: str, dims: Mapping[str, int], options: Mapping[str, str] | None = None) -> Problem:
    """The problem of `op` with these sizes; options not given take their defaults. Raises DomainError where the contract
    does not admit it."""
    if variant not in op.variants:
        raise DomainError(f"{op.name} has no variant {variant!r}; it has {', '.join(op.variants)}")
    if set(dims) != set(op.dims):
        raise DomainError(f"{op.name} needs the dims {', '.join(op.dims)}; got {', '.join(dims) or 'none'}")
    chosen = dict(options or {})
    for option in op.options:
        token = chosen.setdefault(option.name, option.tokens[0])
        if token not in option.tokens:
            raise DomainError(f"{op.name}: option {option.name} is one of {', '.join(option.tokens)}; got {token!r}")
    unknown = set(chosen) - {option.name for option in op.options}
    if unknown:
        raise DomainError(f"{op.name} has no option {', '.join(sorted(unknown))}")
    problem = Problem(
        op.name, variant, tuple((letter, int(dims[letter])) for letter in op.dims),
        tuple((option.name, chosen[option.name]) for option in op.options), tuple(option.tokens[0] for option in op.options),
    )
    broken = outside_domain(op, problem)
    if broken:
        raise DomainError(broken)
    return problem


def outside_domain(op: Op, problem: Problem) -> str | None:
    """The first constraint that a problem breaks, as a sentence with its clause; None where the contract admits it."""
    for constraint in op.constraints:
        try:
            kept = evaluate(constraint.expression, _names(problem))
        except ZeroDivisionError:  # a multiple of a group of nothing
            kept = False
        if not kept:
            return f"{problem}: the contract requires {constraint.expression} (clause {constraint.clause})"
    return None


def parse_problem(text: str, ops: Mapping[str, Op], *, check: bool = True) -> Problem:
    """The problem behind the first four parts of a case id. `check=False` skips the constraints (for rejects)."""
    name, variant, dims, tokens = Case.split_problem(text)
    if name not in ops:
        raise DomainError(f"unknown op {name!r}; the ops are {', '.join(ops)}")
    op = ops[name]
    options: dict[str, str] = {}
    for token in tokens if tokens != ("plain",) else ():
        owner = next((option for option in op.options if token in option.tokens), None)
        if owner is None or owner.name in options:
            legal = "; ".join(f"{option.name}: {', '.join(option.tokens)}" for option in op.options)
            raise DomainError(f"{name}: option token {token!r} is unknown or given twice; the options are {legal}")
        options[owner.name] = token
    if check:
        return make_problem(op, variant, dims, options)
    full = tuple((option.name, options.get(option.name, option.tokens[0])) for option in op.options)
    return Problem(name, variant, tuple(dims.items()), full, tuple(option.tokens[0] for option in op.options))


def parse_case(text: str, ops: Mapping[str, Op]) -> Case:
    """The case behind an id. Raises ValueError (form) or DomainError (contract)."""
    *_, pattern, seed = Case.split(text)
    return Case(parse_problem(text.rsplit("/", 2)[0], ops), pattern, seed)


def specs_of(op: Op, problem: Problem) -> tuple[TensorSpec, ...]:
    """The specs that a problem's variant and options bring in; names are unique among them."""
    names = _names(problem)
    return tuple(spec for spec in op.tensors if all(names[option] in tokens for option, tokens in spec.when))


def tensors_of(op: Op, problem: Problem) -> tuple[ResolvedTensor, ...]:
    """The tensors of a problem, in the op's order."""
    names = _names(problem)
    resolved = []
    for spec in specs_of(op, problem):
        fmt = spec.format if isinstance(spec.format, Format) else _TOKEN_FORMATS[names[spec.format]]
        shape = tuple(int(evaluate(text, names)) for text in spec.shape)
        logical = tuple(int(evaluate(text, names)) for text in spec.logical) or shape
        resolved.append(ResolvedTensor(spec.name, fmt, shape, spec.role, spec.family, spec.layout, logical))
    return tuple(resolved)
