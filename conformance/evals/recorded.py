"""One call of a Linear as a file: what an arm was given inside a model, what it wrote, and what it declares.

A safetensors file: `in.NAME` and `out.d`, raw codes (uint8; 16- and 32-bit codes as little-endian words). The header's metadata
key `lowbit` holds JSON: schema, layer, arm, problem, declaration.
Decides: what is needed to judge the call again with neither model nor backend. Refuses: files that are not such recordings, and
codes that do not fit the problem, in one sentence. It differs from a bundle in that no case id fixes the operands: they come from
a model's activations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lowbit.references.declarations import Declaration
from lowbit.references.formats import Codes, container

from ..bounds import gemm_expect
from ..bundle import declaration_from_data, declaration_to_data
from ..case import Case, Operands, Problem, Tensor
from ..op import Role, parse_problem, tensors_of
from ..ops import ops
from ..report import ReportError, write_bytes_atomically

__all__ = ["SCHEMA", "Recorded", "is_recorded", "outside", "read", "store"]

SCHEMA = "lowbit-recorded/1"


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One call. `found`: codes [M, N] that the arm wrote, in the output format."""

    layer: str
    arm: str
    problem: Problem
    operands: Operands
    declaration: Declaration
    found: Codes


def is_recorded(path: Path) -> bool:
    """Whether a file says that it is one of these."""
    try:
        with safe_open(str(path), framework="np") as file:
            return f'"{SCHEMA}"' in (file.metadata() or {}).get("lowbit", "")
    except (OSError, SafetensorError):
        return False


def outside(recorded: Recorded) -> int:
    """Outputs that the declaration does not admit."""
    case = Case(recorded.problem, "recorded", 0)
    expected = gemm_expect(ops()[recorded.problem.op], case, recorded.operands, recorded.declaration)["d"]
    return int((~expected.admits(recorded.found)).sum())


def store(path: Path, recorded: Recorded) -> None:
    """Write the file, whole or not at all. Raises OutputError, ReportError for a declaration that plain data cannot hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {f"in.{name}": np.ascontiguousarray(tensor.codes) for name, tensor in recorded.operands.items()}
    header = {
        "schema": SCHEMA, "layer": recorded.layer, "arm": recorded.arm, "problem": str(recorded.problem),
        "declaration": declaration_to_data(recorded.declaration),
    }
    text = json.dumps(header, sort_keys=True)
    write_bytes_atomically(path, save(tensors | {"out.d": np.ascontiguousarray(recorded.found)}, metadata={"lowbit": text}))


def read(path: Path) -> Recorded:
    """The call of a file. Raises ReportError."""
    try:
        with safe_open(str(path), framework="np") as file:
            header = json.loads((file.metadata() or {}).get("lowbit", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise ReportError(f"{path} is not a readable safetensors file ({error}); localise again") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise ReportError(f"{path} is no recorded call: its header names no schema {SCHEMA}; take a file that --localise wrote")
    try:
        problem = parse_problem(header["problem"], ops())
        given: dict[str, Tensor] = {}
        for tensor in tensors_of(ops()[problem.op], problem):
            key = f"{'out' if tensor.role is Role.OUTPUT else 'in'}.{tensor.name}"
            codes, wanted = tensors[key], container(tensor.format)
            if codes.shape != tensor.shape or codes.dtype != wanted:
                text = f"{codes.dtype}{list(codes.shape)}, expected {wanted}{list(tensor.shape)}"
                raise ReportError(f"{path}: {key} is {text}; localise again")
            if tensor.role is not Role.OUTPUT:
                given[tensor.name] = Tensor(codes, tensor.format)
        declaration = declaration_from_data(header["declaration"])
        return Recorded(header["layer"], header["arm"], problem, Operands(given), declaration, tensors["out.d"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path}: the header or the tensors make no sense ({error}); localise again") from error
