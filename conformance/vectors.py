"""Golden vectors: stored operands and the codes they must give, from files that no reference had a part in.

Decides: what a vector file says, as operands and expectations. Refuses: files that break their own schema, codes that do not
fill their shape, and cases that the contract does not admit. A vector's case has the pattern `golden` and its index as seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from lowbit.references.formats import FORMATS, Codes, Format, container, order_key

from .case import Case, Operands, Tensor
from .op import Expectation, Flag, Role, exactly, parse_case, tensors_of
from .ops import ops

__all__ = ["Vector", "codes_of_text", "document", "load", "vector_of", "violation"]

_PACKAGE = "lowbit.golden"


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """One golden vector.

    `operands`: the inputs, packed where the op's tensors are. `expectations`: admissible codes per output. `min_bits`: bits of
    accumulator from which every sum of the vector is exact in any order; 0 where nothing is summed. `any_program`: no step
    before the last one rounds, so the bits hold for every declaration of the op; otherwise for its normative program alone.
    `guards`: the defects the family would show, `clause` of the contract it belongs to.
    """

    case: Case
    family: str
    guards: str
    clause: str
    comment: str
    operands: Operands
    expectations: Mapping[str, Expectation]
    min_bits: int
    any_program: bool


_TYPES: Mapping[str, tuple[type, ...]] = {"object": (dict,), "array": (list,), "string": (str,), "integer": (int,)}


def violation(value: Any, rule: Mapping[str, Any], root: Mapping[str, Any], where: str = "file") -> str:
    """What in `value` breaks a JSON Schema, as one sentence; empty where nothing does.

    Of JSON Schema it knows $ref, oneOf, const, enum, type, pattern, minimum, minLength, minItems, items, required, properties
    and additionalProperties; ValueError for a schema with another keyword.
    """
    unknown = set(rule) - {
        "$ref", "oneOf", "const", "enum", "type", "pattern", "minimum", "minLength", "minItems", "items", "required",
        "properties",
        "additionalProperties", "$schema", "$defs", "title",
    }
    if unknown:
        raise ValueError(f"schema keyword {sorted(unknown)[0]!r} is not one that golden vectors use")
    if "$ref" in rule:
        return violation(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root, where)
    if "oneOf" in rule:
        kinds = {option["properties"]["schema"]["const"]: option for option in rule["oneOf"]}
        kind = value.get("schema") if isinstance(value, dict) else None
        if kind not in kinds:
            return f"{where}: schema is {kind!r}, expected one of {', '.join(kinds)}"
        return violation(value, kinds[kind], root, where)
    if "const" in rule and value != rule["const"]:
        return f"{where} is {value!r}, expected {rule['const']!r}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{where} is {value!r}, expected one of {', '.join(rule['enum'])}"
    kind = rule.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool)):
        return f"{where} is {str(value)[:40]!r}, expected a JSON {kind}"
    if kind == "string" and len(value) < rule.get("minLength", 0):
        return f"{where} is empty"
    if "pattern" in rule and not re.fullmatch(rule["pattern"].removeprefix("^").removesuffix("$"), value):
        return f"{where} is {value[:40]!r}, expected text that matches {rule['pattern']}"
    if kind == "integer" and value < rule.get("minimum", value):
        return f"{where} is {value}, expected at least {rule['minimum']}"
    if kind == "array":
        if len(value) < rule.get("minItems", 0):
            return f"{where} has {len(value)} items, expected at least {rule['minItems']}"
        found = (violation(item, rule.get("items", {}), root, f"{where}[{i}]") for i, item in enumerate(value))
        return next((text for text in found if text), "")
    if kind == "object":
        return _object_violation(value, rule, root, where)
    return ""


def _object_violation(value: Mapping[str, Any], rule: Mapping[str, Any], root: Mapping[str, Any], where: str) -> str:
    missing = [name for name in rule.get("required", ()) if name not in value]
    if missing:
        return f"{where} has no {missing[0]!r}"
    properties, others = rule.get("properties", {}), rule.get("additionalProperties", True)
    for name, item in value.items():
        if name not in properties and others is False:
            return f"{where} has {name!r}, which the schema does not know"
        found = violation(item, properties.get(name, others if isinstance(others, dict) else {}), root, f"{where}.{name}")
        if found:
            return found
    return ""


@cache
def document(name: str) -> Mapping[str, Any]:
    """The checked contents of golden/`name`.json. Raises ValueError with one sentence where the file is missing, is no JSON or
    breaks golden/schema.json."""
    folder = resources.files(_PACKAGE)
    try:
        found = json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))
        schema = json.loads(folder.joinpath("schema.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"golden/{name}.json or its schema is missing; run python golden/generate.py --out golden") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"golden/{name}.json is no JSON ({error}); run python golden/generate.py --out golden") from error
    broken = violation(found, schema, schema)
    if broken:
        raise ValueError(f"golden/{name}.json: {broken}; vectors are generated, never edited")
    assert isinstance(found, dict)
    return found


def codes_of_text(text: str, shape: tuple[int, ...], fmt: Format) -> Codes:
    """Codes of the shape from hexadecimal text: a fixed number of digits per code, code*N for N equal codes, parts set off by
    spaces. Raises ValueError where they do not fill the shape or do not fit the format."""
    digits = -(-fmt.bits // 4)
    values: list[int] = []
    for part in text.split(" ") if text else ():
        numbers, _, count = part.partition("*")
        if len(numbers) % digits or (count and len(numbers) != digits):
            raise ValueError(f"{part[:40]!r} is no whole number of {fmt} codes, which have {digits} digits each")
        values += [int(numbers[i : i + digits], 16) for i in range(0, len(numbers), digits)] * int(count or 1)
    if len(values) != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{len(values)} codes, expected those of shape {shape}")
    if max(values, default=0) >> fmt.bits:
        raise ValueError(f"code {max(values):#x} is none of {fmt}, which has {fmt.bits} bits")
    return np.array(values, dtype=container(fmt)).reshape(shape)


def _tensor(record: Mapping[str, Any]) -> Tensor:
    fmt = FORMATS[record["format"]]
    return Tensor(codes_of_text(record["codes"], tuple(record["shape"]), fmt), fmt)


def _expectation(record: Mapping[str, Any]) -> Expectation:
    tensor = _tensor(record)
    found = exactly(tensor.codes, tensor.format, nan_any="nan_bytes" not in record)
    lo, hi, flags, sparse = (found.lo.reshape(-1).copy(), found.hi.reshape(-1).copy(), found.flags.reshape(-1).copy(),
        dict(found.sparse))
    for place, texts in record.get("any_of", ()):
        codes = np.array([int(text, 16) for text in texts], dtype=container(tensor.format))
        keys = order_key(codes, tensor.format)
        lo[place], hi[place], sparse[place] = keys.min(), keys.max(), frozenset(codes.tolist())
        flags[place] = 0
    for name, flag in (("free", Flag.FREE), ("untouched", Flag.UNTOUCHED)):
        flags[record.get(name, [])] |= np.uint8(flag)
    shape = found.lo.shape
    return replace(found, lo=lo.reshape(shape), hi=hi.reshape(shape), flags=flags.reshape(shape), sparse=sparse,
                   either_zero="either_zero" in record)


def _vector(record: Mapping[str, Any], families: Mapping[str, Any], op_name: str) -> Vector:
    case = parse_case(record["case"], ops())
    if (case.problem.op, case.seed, str(case)) != (op_name, record["index"], record["case"]):
        raise ValueError(f"case {record['case']} is not that of vector {record['index']} of {op_name}, in its short form {case}")
    operands = Operands({name: _tensor(item) for name, item in record["inputs"].items()})
    expectations = {name: _expectation(item) for name, item in record["expected"].items()}
    specs = tensors_of(ops()[op_name], case.problem)
    for given, roles in ((operands.tensors, {Role.CONSTANT, Role.ACTIVATION, Role.INOUT}),
            (expectations, {Role.OUTPUT, Role.INOUT})):
        wanted = {spec.name: (spec.format, spec.shape) for spec in specs if spec.role in roles}
        got = {name: (item.format, item.codes.shape if isinstance(item, Tensor) else item.lo.shape) for name,
            item in given.items()}
        for name in sorted(set(wanted) | set(got)):
            if wanted.get(name) != got.get(name):
                raise ValueError(f"tensor {name} is {got.get(name)}, the contract has {wanted.get(name)}")
    family = families[record["family"]]
    return Vector(case, record["family"], family["guards"], family["clause"], record["comment"], operands, expectations,
                  record.get("min_bits", 0), record.get("declaration", "any") == "any")


@cache
def load(op_name: str) -> tuple[Vector, ...]:
    """The vectors of an op, by index. Raises ValueError with one sentence where its file is broken, and for an unknown op."""
    if op_name not in ops():
        raise ValueError(f"there are no golden vectors of {op_name!r}; the ops are {', '.join(ops())}")
    file = document(op_name)
    vectors = []
    for place, record in enumerate(file["vectors"], 1):
        try:
            if record["index"] != place:
                raise ValueError(f"its index is {record['index']}")
            vectors.append(_vector(record, file["families"], op_name))
        except (ValueError, KeyError) as error:
            raise ValueError(f"golden/{op_name}.json, vector {place}: {error}; vectors are generated, never edited") from error
    return tuple(vectors)


def vector_of(case: Case) -> Vector:
    """The vector that a case with the pattern `golden` names. Raises ValueError where there is none of that seed and problem."""
    vectors = load(case.problem.op)
    if case.pattern != "golden" or not 1 <= case.seed <= len(vectors):
        raise ValueError(f"{case}: golden vectors of {case.problem.op} have the pattern golden and the seeds 1 to {len(vectors)}")
    found = vectors[case.seed - 1]
    if found.case != case:
        raise ValueError(f"{case}: vector {case.seed} of {case.problem.op} is {found.case}")
    return found
