"""What a checkpoint's quantization_config asks of each Linear, as one op of the contract.

Decides: which op, variant, group and activation format a layer gets. Configurations are those of compressed-tensors
(`quant_method: compressed-tensors`): groups of targets, each with weights and input activations, and a storage format.
Refuses: whatever no op of the contract computes exactly as asked, in one sentence that names the layer or group, what was
found, what is supported and what to change. Nothing is rounded to the nearest supported thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Scheme", "SchemeError", "Schemes", "read_schemes", "supported"]


class SchemeError(ValueError):
    """A configuration that no op of the contract computes."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one Linear is stored and computed. `group`: K elements per weight scale, 0 where one scale serves a whole row (or, with
    `per_tensor`, the whole tensor). `static_input`: the activation scale is in the checkpoint."""

    group_name: str
    op: str
    variant: str
    storage: str  # format of compressed-tensors
    group: int
    symmetric: bool = True
    per_tensor: bool = False
    static_input: bool = False
    input_per_tensor: bool = False


@dataclass(frozen=True, slots=True)
class _Rule:
    """One supported combination. Each field lists what is accepted, in the words of the configuration."""

    op: str
    variant: str
    storage: tuple[str, ...]
    weights: str  # "int4", "float8", "float4"
    strategies: tuple[str, ...]
    groups: tuple[int, ...]  # 0: no groups
    inputs: tuple[str, ...]  # "none" or "TYPE strategy dynamic|static|local"
    asymmetric: str = ""  # variant where weights have zero points; empty: not supported


_RULES = (
    _Rule("gemm_w4a16", "sym", ("pack-quantized",), "int4", ("group", "channel"), (0, 16, 32, 64, 128, 256), ("none",), "zp"),
    _Rule("gemm_w4a8_fp8", "folded", ("pack-quantized",), "int4", ("group",), (64, 128), ("float8 token dynamic",)),
    _Rule("gemm_w4a8_int8", "direct", ("int-quantized", "pack-quantized"), "int4", ("group", "channel"), (0, 32, 64, 128, 256),
          ("int8 token dynamic",)),
    _Rule("gemm_w8a8_fp8", "scaled", ("float-quantized",), "float8", ("channel", "tensor"), (0,),
          ("float8 token dynamic", "float8 tensor dynamic", "float8 tensor static")),
    _Rule("gemm_w8a8_fp8", "block", ("float-quantized",), "float8", ("block",), (128,), ("float8 group dynamic",)),
    _Rule("gemm_nvfp4", "plain", ("nvfp4-pack-quantized",), "float4", ("tensor_group", "group"), (16,),
          ("float4 tensor_group local", "float4 group local")),
)
_ORDERS = (None, False, "null", "weight", "static")
"""Values of `actorder` that leave the columns in their order: only the choice of codes depended on it."""


def _kind(part: Mapping[str, Any]) -> str:
    return f"{part.get('type', 'int')}{part.get('num_bits')}"


def _input_text(part: Mapping[str, Any] | None) -> str:
    """The input side of a rule that this part is."""
    if part is None:
        return "none"
    dynamic = part.get("dynamic", False)
    when = "local" if dynamic == "local" else "dynamic" if dynamic else "static"
    return f"{_kind(part)} {part.get('strategy')} {when}"


def _weights_text(part: Mapping[str, Any]) -> str:
    group, symmetric = part.get("group_size"), part.get("symmetric", True)
    sized = f" of {group}" if group not in (None, 0, -1) else ""
    return f"{_kind(part)} {part.get('strategy')}{sized}{'' if symmetric else ' with zero points'}"


def _rule_text(rule: _Rule) -> str:
    groups = "/".join(str(group) for group in rule.groups if group)
    sized = f" (group {groups})" if groups else ""
    zero = ", zero points too" if rule.asymmetric else ""
    inputs = " or ".join(rule.inputs)
    return f"{rule.op}: {' or '.join(rule.storage)}, {rule.weights} {' or '.join(rule.strategies)}{sized}{zero}, inputs {inputs}"


def supported() -> str:
    """All supported combinations, one after another."""
    return "; ".join(map(_rule_text, _RULES))


def _group_of(weights: Mapping[str, Any], where: str) -> int:
    if weights.get("strategy") == "block":
        shape = weights.get("block_structure")
        if list(shape or ()) != [128, 128]:
            raise SchemeError(f"{where}: block_structure is {shape}, supported is [128, 128]; quantise again with that")
        return 128
    group = weights.get("group_size")
    return 0 if group in (None, -1, 0) else int(group)


def _scheme(name: str, storage: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    """The scheme of one config group. Raises SchemeError."""
    where = f"config group {name!r}"
    order = weights.get("actorder")
    if order not in _ORDERS:
        raise SchemeError(
            f"{where}: weights have actorder {order!r}, which permutes K by weight_g_idx; supported are null, 'weight' and "
            "'static', which keep it; quantise again with actorder='weight'"
        )
    if weights.get("dynamic", False):
        raise SchemeError(f"{where}: weights are dynamic; supported are weights stored quantised; set dynamic to false")
    group, strategy = _group_of(weights, where), str(weights.get("strategy"))
    symmetric, given = bool(weights.get("symmetric", True)), _input_text(inputs)
    close: list[_Rule] = []
    for rule in _RULES:
        if storage not in rule.storage or _kind(weights) != rule.weights or given not in rule.inputs:
            continue
        close.append(rule)
        if strategy in rule.strategies and group in rule.groups and (symmetric or rule.asymmetric):
            return Scheme(
                name, rule.op, rule.variant if symmetric else rule.asymmetric, storage, group, symmetric, strategy == "tensor",
                given.endswith("static"), " tensor " in f"{given} ",
            )
    found = f"{storage} weights {_weights_text(weights)} with inputs {given}"
    known = "; ".join(map(_rule_text, close)) if close else supported()
    raise SchemeError(f"{where}: found {found}; supported: {known}; change what differs and quantise again")


@dataclass(frozen=True, slots=True)
class Schemes:
    """Which scheme each Linear has: groups in the order of the configuration, the first whose targets match wins."""

    groups: tuple[tuple[Scheme, tuple[str, ...]], ...]
    ignored: tuple[str, ...]

    def of(self, layer: str, kind: str = "Linear") -> Scheme | None:
        """The scheme of a layer by its full name and class name; None where it is ignored or no target names it."""
        if any(_matches(layer, kind, pattern) for pattern in self.ignored):
            return None
        return next((scheme for scheme, targets in self.groups if any(_matches(layer, kind, t) for t in targets)), None)


def _matches(layer: str, kind: str, pattern: str) -> bool:
    """A target or an ignored entry: a class name, `re:EXPRESSION` over the full name, or a name (its last parts suffice)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return pattern in (layer, kind) or layer.endswith(f".{pattern}")


def _listed(value: Any, where: str) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SchemeError(f"{where} is {value!r}; expected a list of names")
    return value


def read_schemes(config: Mapping[str, Any]) -> Schemes:
    """The schemes of a model's config.json, or of its quantization_config alone. Raises SchemeError: one sentence."""
    given = config.get("quantization_config", config)
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method != "compressed-tensors":
        raise SchemeError(
            f"quantization_config: quant_method is {method!r}; supported is 'compressed-tensors'; a checkpoint without "
            "quantisation is quantised on the fly by --recipe"
        )
    if given.get("quantization_status", "compressed") != "compressed":
        raise SchemeError(
            f"quantization_config: quantization_status is {given['quantization_status']!r}; supported is 'compressed'; save the "
            "model with save_compressed=True"
        )
    if given.get("kv_cache_scheme") is not None:
        raise SchemeError("quantization_config: kv_cache_scheme is set; no op of the contract quantises a cache; set it to null")
    found = given.get("config_groups")
    if not isinstance(found, Mapping) or not found:
        raise SchemeError("quantization_config: config_groups is empty; expected at least one group with weights and targets")
    groups = []
    for name, group in found.items():
        where = f"config group {name!r}"
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise SchemeError(f"{where} has no weights; supported are groups that quantise weights")
        if group.get("output_activations") is not None:
            raise SchemeError(f"{where} quantises output_activations; no op of the contract does; set it to null")
        storage = str(group.get("format") or given.get("format"))
        scheme = _scheme(str(name), storage, weights, group.get("input_activations"))
        groups.append((scheme, tuple(_listed(group.get("targets", ["Linear"]), f"{where}: targets"))))
    return Schemes(tuple(groups), tuple(_listed(given.get("ignore") or [], "quantization_config: ignore")))
