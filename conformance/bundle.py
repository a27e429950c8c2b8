"""One-file bundles: what a backend was given and what it wrote, judged again anywhere.

A bundle is a safetensors file. Tensors: `in.NAME` and `out.NAME`, the raw codes (uint8; 16- and 32-bit codes as the little-endian
words their container has, shape kept). The header's metadata key `lowbit` holds JSON: schema, case id, batch, backend,
tactic, declaration, kernel, poison, what was found around the tensors, digests, contract and suite versions.
Decides: what is needed to re-judge a case without backend or device. Refuses: files that are not bundles, truncated files,
operands that are not those of the case id, and declarations it cannot rebuild from plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.declarations import Claim, Contraction, Cut, Declaration, Join, Order, Start, Step, StepKind
from lowbit.references.formats import FORMATS, Codes, Format, container
from lowbit.references.rounding import Rounding

from . import report
from .case import Case, Operands, Tensor
from .op import DomainError, Op, Role, tensors_of
from .ops import ops
from .report import ReportError
from .run import batches_of, listed_of, operands_of, products_of, rejudge
from .selection import CONTRACT
from .verdict import FAILING, Execution, Kernel, Verdict, digest_outputs
from .worker import Ending, Fault, Outcome, Worker, WorkerError

__all__ = [
    "ATTEMPTS", "SCHEMA", "Bundle", "bundled", "capture", "declaration_from_data", "declaration_to_data", "load", "record",
    "replay",
]

SCHEMA = "lowbit-bundle/2"
ATTEMPTS = 8
"""Runs in which `record` looks for a failure that was seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """What a bundle file holds. `batch`: which run of a case that takes several. `outcome`: its outputs, kernel, poison and
    findings. `execution`: whether a device or an emulation of it gave the outputs."""

    case: Case
    batch: int
    backend: str
    tactic: str
    declaration: Declaration
    operands: Operands
    outcome: Outcome
    execution: Execution

    @property
    def outputs(self) -> Mapping[str, Codes]:
        """Codes of every output, by name."""
        return self.outcome.outputs

    @property
    def output_sha256(self) -> str:
        """Digest of the outputs, as a verdict holds it."""
        return digest_outputs(self.outputs)

    @property
    def fails(self) -> bool:
        """Whether the outputs are judged to fail."""
        op = ops()[self.case.problem.op]
        return rejudge(op, self.case, self.operands, self.declaration, self.outcome).status in FAILING


# Declarations as plain data ------------------------------------------------------------------------------------------

_ENUMS: dict[str, type[IntEnum]] = {
    "kind": StepKind,
    "rounding": Rounding,
    "join": Join,
    "order": Order,
    "start": Start,
    "running_rounding": Rounding,
    "reduction_order": Order,
    "claim": Claim,
}


def declaration_to_data(declaration: Declaration) -> dict[str, Any]:
    """Plain data of a declaration: enums by name, formats and datapaths of the tables by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, Format):
            return value.name
        if isinstance(value, Datapath):
            return value.name
        if isinstance(value, IntEnum):
            return value.name
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, (Step, Contraction, Cut, Declaration)):
            return {"record": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
        return value

    for item in declaration.program:
        if isinstance(item, Contraction) and DATAPATHS.get(item.datapath.name) != item.datapath:
            raise ReportError(f"datapath {item.datapath.name!r} is not one of lowbit's records; a bundle can only name those")
    data = plain(declaration)
    assert isinstance(data, dict)
    return data


_RECORDS: dict[str, type] = {"Step": Step, "Contraction": Contraction, "Cut": Cut, "Declaration": Declaration}
_FORMAT_FIELDS = frozenset({"format", "operand_format", "running", "reduction", "conversion"})


def declaration_from_data(data: Any) -> Declaration:
    """Inverse of `declaration_to_data`. Raises ReportError for anything else."""

    def build(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            kind = _RECORDS[value["record"]]
            return kind(**{key: build(item, key) for key, item in value.items() if key != "record"})
        if isinstance(value, list):
            return tuple(build(item) for item in value)
        if isinstance(value, str):
            if name == "datapath":
                return DATAPATHS[value]
            if name in _FORMAT_FIELDS:
                return FORMATS[value]
            if name in _ENUMS:
                return _ENUMS[name][value]
        return value

    try:
        found = build(data)
    except (KeyError, TypeError) as error:
        raise ReportError(f"the declaration cannot be rebuilt: {type(error).__name__}: {error}") from error
    if not isinstance(found, Declaration):
        raise ReportError("there is no declaration in it")
    return found


# Files ---------------------------------------------------------------------------------------------------------------


def _store(path: Path, bundle: Bundle) -> None:
    tensors = {f"in.{name}": np.ascontiguousarray(tensor.codes) for name, tensor in bundle.operands.items()}
    tensors |= {f"out.{name}": np.ascontiguousarray(codes) for name, codes in bundle.outputs.items()}
    outcome = bundle.outcome
    header = {
        "schema": SCHEMA,
        "case": str(bundle.case),
        "batch": bundle.batch,
        "backend": bundle.backend,
        "execution": bundle.execution.value,
        "tactic": bundle.tactic,
        "contract": CONTRACT,
        "suite": report.suite_version(),
        "declaration": declaration_to_data(bundle.declaration),
        "kernel": outcome.kernel,
        "kernel_source": outcome.kernel_source.value,
        "poison": outcome.poison,
        "findings": list(outcome.findings),
        "operands_sha256": bundle.operands.sha256(),
        "outputs_sha256": bundle.output_sha256,
    }
    report.write_bytes_atomically(path, save(tensors, metadata={"lowbit": json.dumps(header, sort_keys=True)}))


def bundled(text: str) -> Case:
    """The case of an id that one bundle can hold. Raises DomainError for cases that are a relation between several runs, that
    are refused, or whose operands come from a file of the user."""
    item = listed_of(text)
    if item.lane in ("property", "stability", "reject", "tensors"):
        raise DomainError(
            f"{text} is of the lane {item.lane}, which a bundle cannot hold: a bundle is one run on operands that the "
            "case id fixes; run the case without --bundle"
        )
    return item.case


def capture(text: str, backend: str, tactic: str, *, timeout: float = 60.0, extra: tuple[str, ...] = ()) -> Bundle:
    """Run one case: its first batch that fails, or its first batch where none does. Raises DomainError for a case that no
    bundle holds, WorkerError where the backend gives no output."""
    case = bundled(text)
    op = ops()[case.problem.op]
    first: Bundle | None = None
    with Worker(backend, timeout=timeout, path=extra) as worker:
        support = worker.supports([case.problem])[0]
        if support is not None:
            raise WorkerError(
                support if isinstance(support, Fault) else Fault(Ending.RAISED, f"{backend} does not compute {text}: {support}")
            )
        declaration = worker.declare(case.problem, tactic)
        execution = Execution(worker.hello()["execution"])
        for batch in range(batches_of(op, case)):
            operands = operands_of(op, case, batch)
            outcome = worker.execute(case.problem, tactic, operands, tensors_of(op, case.problem), label=text)
            if not outcome.outputs:
                reason = outcome.reason or "it gave no output"
                raise WorkerError(Fault(outcome.status, f"{backend} gives nothing to look at for {text}: {reason}", outcome.log))
            found = Bundle(case, batch, backend, tactic, declaration, operands, outcome, execution)
            if found.fails:
                return found
            first = first or found
    assert first is not None
    return first


def record(
    text: str, backend: str, tactic: str, path: Path, *, timeout: float = 60.0, extra: tuple[str, ...] = (), failing: bool = False
) -> Bundle | None:
    """`capture` into a file. `failing`: the case was seen to fail; it is captured again, `ATTEMPTS` times at most, until it does,
    and None says that it never did. Raises also ReportError for a declaration that plain data cannot hold, OutputError."""
    for _ in range(ATTEMPTS):
        bundle = capture(text, backend, tactic, timeout=timeout, extra=extra)
        if not failing or bundle.fails:
            _store(path, bundle)
            return bundle
    return None


def load(path: Path) -> Bundle:
    """Read a bundle and check it: schema, shapes, digests, and that the operands are those of the case. Raises ReportError."""
    try:
        with safe_open(str(path), framework="np") as file:
            header = json.loads((file.metadata() or {}).get("lowbit", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise ReportError(
            f"{path} is not a readable safetensors file ({error}); record it again with `lowbit run --bundle`"
        ) from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise ReportError(f"{path} is not a lowbit bundle: its header names no schema {SCHEMA}")
    try:
        case = bundled(header["case"])
        op = ops()[case.problem.op]
        operands = _operands(op, case, tensors, path)
        outputs = {
            spec.name: _codes(tensors, f"out.{spec.name}", spec.format, spec.shape, path)
            for spec in tensors_of(op, case.problem)
            if spec.role in (Role.OUTPUT, Role.INOUT)
        }
        outcome = Outcome(
            Ending.OK,
            outputs=outputs,
            kernel=str(header["kernel"]),
            kernel_source=Kernel(header["kernel_source"]),
            findings=tuple(map(str, header["findings"])),
            poison=int(header["poison"]),
        )
        bundle = Bundle(
            case,
            int(header["batch"]),
            str(header["backend"]),
            str(header["tactic"]),
            _declaration(header["declaration"], path),
            operands,
            outcome,
            Execution(header["execution"]),
        )
        digests = header["operands_sha256"], header["outputs_sha256"]
    except KeyError as error:
        raise ReportError(f"{path}: the bundle's header lacks {error}; record it again with `lowbit run --bundle`") from error
    except ReportError:
        raise
    except (ValueError, TypeError) as error:
        raise ReportError(
            f"{path}: the bundle's header makes no sense: {error}; record it again with `lowbit run --bundle`"
        ) from error
    if (operands.sha256(), digest_outputs(outputs)) != digests:
        raise ReportError(f"{path}: the stored codes do not have the digests of the header; the file was changed")
    if not 0 <= bundle.batch < batches_of(op, case) or operands_of(op, case, bundle.batch).sha256() != digests[0]:
        raise ReportError(
            f"{path}: the operands are not those of {case}, batch {bundle.batch}; it was recorded by another version of "
            f"the suite ({header.get('suite')}) or changed"
        )
    return bundle


def _declaration(data: Any, path: Path) -> Declaration:
    try:
        return declaration_from_data(data)
    except ReportError as error:
        raise ReportError(f"{path}: {error}; record the bundle again with `lowbit run --bundle`") from error


def _codes(tensors: Mapping[str, Codes], key: str, fmt: Format, shape: tuple[int, ...], path: Path) -> Codes:
    if key not in tensors or tensors[key].shape != shape or tensors[key].dtype != container(fmt):
        got = f"{tensors[key].dtype} {tensors[key].shape}" if key in tensors else "nothing"
        raise ReportError(f"{path}: tensor {key} should be {container(fmt)} {shape}, the bundle holds {got}")
    return tensors[key]


def _operands(op: Op, case: Case, tensors: Mapping[str, Codes], path: Path) -> Operands:
    return Operands(
        {
            spec.name: Tensor(_codes(tensors, f"in.{spec.name}", spec.format, spec.shape, path), spec.format)
            for spec in tensors_of(op, case.problem)
            if spec.role is not Role.OUTPUT
        }
    )


def replay(path: Path) -> Verdict:
    """Judge the stored outputs again: expectation from the stored operands and declaration, no backend, no device. Raises
    ReportError."""
    bundle = load(path)
    case, outcome = bundle.case, bundle.outcome
    op, item = ops()[case.problem.op], listed_of(str(case))
    found = rejudge(op, case, bundle.operands, bundle.declaration, outcome)
    judged = found.judgement
    return Verdict(
        str(case),
        bundle.backend,
        bundle.tactic,
        item.lane,
        item.level,
        found.status,
        found.reason,
        op.judged[case.problem.variant],
        bundle.execution,
        kernel=outcome.kernel,
        kernel_source=outcome.kernel_source,
        operands=bundle.operands.sha256(),
        wrong=judged.wrong,
        judged=judged.judged,
        total=sum(codes.size for codes in bundle.outputs.values()),
        sample=found.sample,
        products=products_of(op, case.problem),
        worst=judged.worst,
        ulp_histogram=judged.ulp_histogram,
        power=found.power,
        heat=judged.heat,
        output_sha256=bundle.output_sha256,
    )
