"""A lane of real weights: matrices of a safetensors file, quantised by the contract's recipe for each op.

`FILE.safetensors[:GLOB]` names the file and which of its tensors. A matrix gives one case per op, variant and recipe that admits
its shape; the seed of a case is the number of its matrix among those matched, in order of name. Weights of GEMMs are its first
rows, quantised; quantisers take its first rows as they are. All other operands are drawn as in the pattern `normal`, so the case
id and the file fix every operand.
Decides: which recipe prepares the weights of which op. Refuses: files that are not safetensors, globs without a floating-point
matrix, matrices that no chosen op admits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lowbit.references.encodings import fold_scales
from lowbit.references.formats import BF16, F16, F32, UE4M3, Codes, Format, Reals, container, decode
from lowbit.references.recipes import RECIPES, Quantised, global_scale_of, quantise
from lowbit.references.rounding import Overflow, Rounding, encode, round_to

from .case import Case, Operands, Problem, Tensor
from .op import DomainError, Op, make_problem, possible_options
from .ops import ops
from .ops.nvfp4_quantize import recipe_of as nvfp4_recipe_of
from .patterns import draw_operands
from .report import ReportError

__all__ = ["PATTERN", "Matrix", "Weights", "digest", "load", "tensor_cases", "tensor_operands"]

PATTERN = "tensors"
_ROWS = 17  # M of a GEMM: one row more than a tile
_COLUMNS = 1024  # rows of a matrix that a GEMM takes at most: its N
_QUANTISED = 256  # rows of a matrix that a quantiser takes at most
_RANK = 16  # of the low-rank operand that svdquant_quantize needs
_FORMATS = {"BF16": BF16, "F16": F16, "F32": F32}


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where a matrix lies: values of `format`, row-major [N, K], little-endian, from byte `offset` of the file on."""

    name: str
    format: Format
    shape: tuple[int, int]
    offset: int


@dataclass(frozen=True, slots=True)
class Weights:
    """The matched matrices of a file, in order of name. Their values stay in the file until a case asks for them."""

    source: str
    path: Path
    matrices: tuple[Matrix, ...]

    def values(self, number: int, rows: int, columns: int) -> Reals:
        """The first `rows` rows and `columns` columns of matrix `number` (from 1), float64. No other row is read.

        Raises DomainError where there is no such matrix or it is smaller."""
        if not 1 <= number <= len(self.matrices):
            raise DomainError(f"seed s{number}: --tensors {self.source} matches {len(self.matrices)} matrices, numbered from s1")
        matrix = self.matrices[number - 1]
        if rows > matrix.shape[0] or columns > matrix.shape[1]:
            raise DomainError(f"seed s{number} is {matrix.name} {list(matrix.shape)}, smaller than [{rows}, {columns}]")
        stored = container(matrix.format)
        codes = np.fromfile(self.path, stored.newbyteorder("<"), rows * matrix.shape[1], offset=matrix.offset)
        return decode(codes.astype(stored).reshape(rows, -1)[:, :columns], matrix.format)


# The file ------------------------------------------------------------------------------------------------------------


def _split(source: str) -> tuple[Path, str]:
    """(file, glob): the longest prefix that ends at a colon, or the whole text, and is a file. Raises ReportError."""
    ends = [len(source), *(place for place in range(len(source) - 1, -1, -1) if source[place] == ":")]
    for end in ends:
        if Path(source[:end]).is_file():
            return Path(source[:end]), source[end + 1 :] or "*"
    raise ReportError(f"--tensors {source}: there is no such file; give FILE.safetensors or FILE.safetensors:GLOB")


@cache
def load(source: str) -> Weights:
    """What `FILE[:GLOB]` holds; reads the header of the file only. Raises ReportError for a file that is missing, unreadable,
    not safetensors, truncated, or without a floating-point matrix (BF16, F16, F32) whose name matches."""
    path, glob = _split(source)
    try:
        # The library checks the file: header, offsets, length. Its NumPy side reads no bfloat16 and tells no offsets, so the
        # places of the data come from the header it has checked: a 64-bit length, then JSON, then the data.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise ReportError(f"--tensors {source}: {path} is not a whole safetensors file ({error})") from error
    except OSError as error:
        raise ReportError(f"--tensors {source}: {path} cannot be read ({error.strerror or error})") from error
    header.pop("__metadata__", None)
    named = {name: header[name] for name in sorted(header) if fnmatchcase(name, glob)}
    found = tuple(
        Matrix(name, _FORMATS[entry["dtype"]], (entry["shape"][0], entry["shape"][1]), 8 + length + entry["data_offsets"][0])
        for name, entry in named.items() if entry["dtype"] in _FORMATS and len(entry["shape"]) == 2 and 0 not in entry["shape"]
    )
    if not found:
        held = [f"{name} {entry['dtype']} {entry['shape']}" for name, entry in (named or header).items()]
        shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
        said = f"it matches {shown}" if named else f"the file holds {shown or 'no tensor'}"
        raise ReportError(f"--tensors {source}: {glob!r} matches no BF16, F16 or F32 matrix; {said}")
    return Weights(source, path, found)


def digest(source: str) -> str:
    """sha256 of the whole file behind `FILE[:GLOB]`. Raises ReportError where there is none."""
    with _split(source)[0].open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Weights of GEMMs ----------------------------------------------------------------------------------------------------

Prepared = Mapping[str, Codes]


def _quantised(values: Reals, recipe: str, fmt: Format, group: int = 0) -> Quantised:
    """The matrix rounded to `fmt`, then quantised by a recipe, with groups of `group` where it is not 0."""
    found = RECIPES[recipe]
    return quantise(round_to(values, fmt), fmt, replace(found, block_k=group) if group else found)


def _out(problem: Problem) -> Format:
    return {"bf16": BF16, "f16": F16, "f32": F32}[problem.option("out")]


def _w4a16(problem: Problem, values: Reals) -> Prepared:
    """uint4 codes and one scale per group; zero points too, unless the variant is `sym`."""
    recipe = "vllm_uint4b8" if problem.variant == "sym" else "vllm_uint4_zero"
    found = _quantised(values, recipe, _out(problem), problem.dim("g"))
    zeros = {} if found.zero_points is None else {"zero": found.zero_points}
    return {"w": found.codes, "scale": found.scales} | zeros


def _w8a8_fp8(problem: Problem, values: Reals) -> Prepared:
    """fp8 codes with a scale per row, per tensor, or per 128 x 128 (rows beyond N count as zeros)."""
    suffix = "_fnuz" if problem.option("format") == "fnuz" else ""
    if problem.variant == "block":
        whole = np.pad(values, ((0, -len(values) % 128), (0, 0)))
        found = _quantised(whole, f"deepgemm_fp8_128x128{suffix}", _out(problem))
        return {"w": found.codes[: len(values)], "w_scale": found.scales}
    recipe = {"channel": "vllm_fp8_token", "wtensor": "vllm_fp8_tensor"}[problem.option("weight_scale")]
    found = _quantised(values, recipe + suffix, _out(problem))
    return {"w": found.codes, "channel_scale": found.scales.reshape(-1)}


def _w4a8_fp8(problem: Problem, values: Reals) -> Prepared:
    """int4 codes; bf16 group scales folded into e4m3 group scales and f32 channel scales."""
    found = _quantised(values, "vllm_int4", BF16, problem.dim("g"))
    groups, channels = fold_scales(found.scales)
    return {"w": found.codes, "group_scale": groups, "channel_scale": channels.reshape(-1)}


def _w4a8_int8(problem: Problem, values: Reals) -> Prepared:
    """uint4 codes (value + 8) and one scale per group."""
    found = _quantised(values, "vllm_uint4b8", _out(problem), problem.dim("g"))
    return {"w": found.codes, "group_scale": found.scales}


def _gemm_nvfp4(problem: Problem, values: Reals) -> Prepared:
    """e2m1 codes, ue4m3 scales per 16, alpha = fl(1 / g): the recipe's global scale is a divisor."""
    found = _quantised(values, "compressed_tensors_nvfp4", _out(problem))
    assert found.global_scale is not None
    alpha = encode(1.0 / decode(found.global_scale.reshape(1), F32), F32, Rounding.RNE, Overflow.SPECIAL)
    return {"w": found.codes, "w_scale": found.scales.astype(container(UE4M3)), "alpha": alpha}


def _gemm_int4(problem: Problem, values: Reals) -> Prepared:
    """int4 codes with one scale per 64: svdquant stores binary16 scales, nunchaku those of its input."""
    recipe = "svdquant_int4" if _out(problem) is F16 else "nunchaku_int4"
    found = _quantised(values, recipe, _out(problem))
    return {"w": found.codes, "w_scale": found.scales}


# Quantisers ----------------------------------------------------------------------------------------------------------


def _x(problem: Problem, values: Reals) -> Prepared:
    """The matrix in the format of x; given scales are those that the matrix would get: dynamic for fp8, the recipe's own global
    scale for nvfp4 (1 where that is no positive normal number, which the contract asks for)."""
    fmt = {"bf16": BF16, "f16": F16, "f32": F32}[problem.option("x")]
    x = round_to(values, fmt)
    given: dict[str, Codes] = {}
    if (problem.op, problem.variant) == ("fp8_quantize", "static"):
        suffix = "_fnuz" if problem.option("format") == "fnuz" else ""
        given["scale"] = quantise(x, fmt, RECIPES[f"vllm_fp8_tensor{suffix}"]).scales.reshape(1)
    if (problem.op, problem.variant) == ("nvfp4_quantize", "static"):
        scale = global_scale_of(x, nvfp4_recipe_of(problem)).reshape(1)
        normal = np.isfinite(decode(scale, F32)) & (decode(scale, F32) >= 2.0**-126)
        given["global_scale"] = np.where(normal, scale, encode(np.ones(1), F32)).astype(scale.dtype)
    return {"x": encode(x, fmt, Rounding.RNE, Overflow.SPECIAL)} | given


# The lane ------------------------------------------------------------------------------------------------------------

_GEMMS: Mapping[str, tuple[Callable[[Problem, Reals], Prepared], tuple[tuple[str, str], ...]]] = {
    "gemm_w4a16": (_w4a16, (("sym", "bf16"), ("sym", "f16"), ("zp", "f16"))),
    "gemm_w8a8_fp8": (_w8a8_fp8, (("scaled", "bf16"), ("block", "bf16"))),
    "gemm_w4a8_fp8": (_w4a8_fp8, (("folded", "bf16"), ("exact", "bf16"))),
    "gemm_w4a8_int8": (_w4a8_int8, (("direct", "f16"),)),
    "gemm_nvfp4": (_gemm_nvfp4, (("plain", "bf16"),)),
    "gemm_int4": (_gemm_int4, (("f32", "f16"), ("half", "bf16"))),
}
"""GEMM -> what prepares its weights, and (variant, output format) of its cases; other options are at their defaults."""

_QUANTISERS = ("int4_quantize", "int8_quantize", "fp8_quantize", "nvfp4_quantize", "svdquant_quantize")
"""Ops that take a matrix as x: one case per variant and recipe, other options at their defaults."""


def _choices(op: Op) -> Iterator[tuple[str, Mapping[str, str]]]:
    """(variant, options) of the cases that one matrix gives."""
    if op.name in _GEMMS:
        for variant, out in _GEMMS[op.name][1]:
            yield variant, {"out": out}
        return
    rule = next(option for option in op.options if option.name in ("recipe", "quotient"))
    defaults = {option.name: option.tokens[0] for option in op.options}
    for variant, token in itertools.product(op.variants, rule.tokens):
        if possible_options(op, variant, {**defaults, rule.name: token}):
            yield variant, {rule.name: token}


def _problem(op: Op, variant: str, options: Mapping[str, str], shape: tuple[int, int]) -> Problem | None:
    """The largest problem of this choice that a matrix [N, K] fills: rows to a multiple of 128, of 8, or all; the first group of
    128, 64, 32, 16 or K that the op admits. None where the op admits none."""
    limit, k = min(shape[0], _COLUMNS if op.is_gemm else _QUANTISED), shape[1]
    for multiple, group in itertools.product((1, 8, 128), (128, 64, 32, 16, k)):
        rows = limit // multiple * multiple
        dims = {"m": _ROWS if op.is_gemm else rows, "n": rows, "k": k, "g": group, "r": 0 if op.is_gemm else _RANK, "p": 0}
        try:
            return make_problem(op, variant, {letter: dims[letter] for letter in op.dims}, options) if rows else None
        except DomainError:
            continue
    return None


def tensor_cases(source: str, names: tuple[str, ...] = ()) -> list[Case]:
    """The cases of `FILE[:GLOB]` for the ops `names` (empty: all that take real weights), op by op. Raises ReportError where
    there are none."""
    weights = load(source)
    lane = (*_GEMMS, *_QUANTISERS)
    chosen = [name for name in lane if not names or name in names]
    if not chosen:
        raise ReportError(f"--tensors {source}: {', '.join(names)} takes no real weights; those that do are {', '.join(lane)}")
    found = []
    for op in (ops()[name] for name in chosen):
        for variant, options in _choices(op):
            for number, matrix in enumerate(weights.matrices, 1):
                problem = _problem(op, variant, options, matrix.shape)
                if problem is not None:
                    found.append(Case(problem, PATTERN, number))
    if not found:
        shapes = ", ".join(f"{matrix.name} {list(matrix.shape)}" for matrix in weights.matrices[:4])
        raise ReportError(f"--tensors {source}: {', '.join(chosen)} admits none of these shapes: {shapes}")
    return found


def tensor_operands(op: Op, case: Case, source: str) -> Operands:
    """Operands of a case of the lane: those made of matrix `seed` of `FILE[:GLOB]`, the others drawn as in the pattern `normal`.

    Raises ReportError for the file, DomainError where the file has no such matrix or none was given."""
    if not source:
        raise DomainError(f"{case}: its weights are in a file; give it by --tensors FILE.safetensors[:GLOB]")
    dims = dict(case.problem.dims)
    values = load(source).values(case.seed, dims["n"] if "n" in dims else dims["m"], dims["k"])
    prepare = _GEMMS[op.name][0] if op.name in _GEMMS else _x
    tensors = dict(draw_operands(op, Case(case.problem, "normal", case.seed)).tensors)
    for name, codes in prepare(case.problem, values).items():
        tensors[name] = Tensor(np.ascontiguousarray(codes), tensors[name].format)
    return Operands(tensors)
