"""The Linears of a model, replaced one after the other by those that an arm computes.

Decides: which Linears are replaced (those that the checkpoint's schemes name; by a recipe all but the ignored), in what order,
and what memory is needed meanwhile: the original is let go before the next layer is read, and a model built under `empty_linears`
never holds one. Weights that are tied to an embedding stay.
Refuses: a layer that the checkpoint lacks, models in other dtypes than bfloat16 and float16, and shards of a fused module that
share what no op can hold apart: one sentence that names the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lowbit.references.formats import BF16, F16, Format

from ..case import Tensor
from .activations import codes_of
from .arms import Arm
from .checkpoint import Checkpoint, CheckpointError, QuantisedLinear
from .linear import ContractLinear
from .quantise import RecipeError, WeightRecipe, quantise_linear
from .schemes import Schemes

__all__ = ["SHARDS", "Summary", "Swapped", "empty_linears", "fuse", "load_rest", "stored_bias", "swap"]

SHARDS: Mapping[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused module -> the modules whose weights it stacks along N."""

_FORMATS = {torch.bfloat16: BF16, torch.float16: F16}
_STORED = ("weight_packed", "weight_scale", "weight")


@dataclass(frozen=True, slots=True)
class Swapped:
    """One replaced Linear. Bytes: of the original weight and bias, and of what the arm keeps."""

    name: str
    op: str
    variant: str
    n: int
    k: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What was replaced. `kept`: Linears that stayed. `linear(name)`: the constants of a layer again, read or quantised anew, for
    localisation; raises RecipeError where the plain weights were only in the model."""

    arm: str
    layers: tuple[Swapped, ...]
    kept: tuple[str, ...]
    linear: Callable[[str], QuantisedLinear]

    @property
    def ops(self) -> dict[str, int]:
        """Layers per `op/variant`."""
        return dict(Counter(f"{layer.op}/{layer.variant}" for layer in self.layers))

    def __str__(self) -> str:
        before, after = (sum(getattr(layer, side) for layer in self.layers) for side in ("bytes_before", "bytes_after"))
        kinds = ", ".join(f"{count} as {name}" for name, count in sorted(self.ops.items())) or "none"
        return f"{self.arm}: {kinds}; {before / 2**20:.1f} MiB of weights became {after / 2**20:.1f} MiB; {len(self.kept)} kept"


@contextmanager
def empty_linears() -> Iterator[None]:
    """Inside, new torch Linears have no memory (device meta): build the model under it, then `swap` and `load_rest`."""
    original = torch.nn.Linear.__init__

    def empty(self: torch.nn.Linear, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **(named | {"device": "meta"}))

    torch.nn.Linear.__init__ = empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Linear.__init__ = original  # type: ignore[method-assign]


def swap(
    model: torch.nn.Module,
    arm: Arm,
    *,
    checkpoint: Checkpoint | None = None,
    recipe: WeightRecipe | None = None,
    device: torch.device | str = "cpu",
    ignore: Collection[str] = ("lm_head",),
    input_amax: Mapping[str, float] | None = None,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Summary:
    """Replace the Linears of `model`, in place. `checkpoint` alone: those that its configuration names, by the codes it stores.
    `recipe`: all but those whose full or last name is in `ignore`, from the weights in the model, or from a plain `checkpoint`
    where the model has none. `device`: where the model runs. `input_amax`: of `input_maxima`. `factors`: as
    `quantise_linear` takes them. Raises RecipeError, CheckpointError, SchemeError, ArmError; the model is then half replaced."""
    if checkpoint is None and recipe is None:
        raise RecipeError("neither checkpoint nor recipe was given; name a quantised checkpoint, or a recipe for plain weights")
    schemes = None if recipe is not None or checkpoint is None else checkpoint.schemes()
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    maxima, done, kept, dtypes = input_amax or {}, list[Swapped](), list[str](), dict[str, Format]()

    def constants(name: str, weight: torch.Tensor | None = None) -> QuantisedLinear:
        if recipe is None:
            assert checkpoint is not None
            assert schemes is not None
            return _stored(checkpoint, schemes, name, dtypes[name])
        if weight is None or weight.is_meta:
            weight = _plain(checkpoint, name)
        return quantise_linear(recipe, name, weight.to(device), dtypes[name], input_amax=maxima.get(name), factors=factors)

    for name in [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]:
        module = model.get_submodule(name)
        assert isinstance(module, torch.nn.Linear)
        if id(module.weight) in embedded or (
            schemes.of(name) is None if schemes is not None else name in ignore or name.rpartition(".")[2] in ignore
        ):
            kept.append(name)
            continue
        if module.weight.dtype not in _FORMATS:
            found = str(module.weight.dtype).removeprefix("torch.")
            raise RecipeError(f"{name}: the model is {found}, expected bfloat16 or float16; load it with that dtype")
        dtypes[name] = _FORMATS[module.weight.dtype]
        before = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        linear = constants(name, module.weight.detach())
        if (linear.n, linear.k) != (module.out_features, module.in_features):
            raise CheckpointError(
                f"{name}: the checkpoint has weights [{linear.n}, {linear.k}], the model [{module.out_features}, "
                f"{module.in_features}]; take the configuration that belongs to the weights"
            )
        layer = arm.prepare(linear, dtypes[name], torch.device(device), _bias(checkpoint, name, module))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, ContractLinear(arm, layer))
        done.append(Swapped(name, linear.scheme.op, linear.scheme.variant, linear.n, linear.k, before, layer.nbytes))
    return Summary(arm.name, tuple(done), tuple(kept), constants)


def load_rest(model: torch.nn.Module, checkpoint: Checkpoint) -> int:
    """Parameters and persistent buffers that are still the model's own, from the checkpoint, in the model's dtypes, tied ones
    once. Returns how many. Raises CheckpointError for one that the checkpoint lacks or holds in another shape."""
    persistent = set(model.state_dict())
    named = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in persistent)]
    for name, held in named:
        if name not in checkpoint.files:
            raise CheckpointError(f"{checkpoint.folder}: {name} is in none of its files; take the configuration of this model")
        stored = checkpoint.tensor(name)
        if stored.shape != held.shape:
            raise CheckpointError(f"{name} has shape {list(stored.shape)} in the checkpoint, {list(held.shape)} in the model")
        value = stored.to(held.dtype)
        if not held.is_meta:
            held.data.copy_(value)
            continue
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, torch.nn.Parameter(value, requires_grad=False) if isinstance(held, torch.nn.Parameter) else value)
    return len(named)


def _plain(checkpoint: Checkpoint | None, name: str) -> torch.Tensor:
    """Plain weights from a file. Raises RecipeError, CheckpointError."""
    if checkpoint is None:
        raise RecipeError(f"{name}: its plain weights are gone from the model; give the checkpoint that they came from, too")
    if f"{name}.weight" not in checkpoint.files:
        raise CheckpointError(f"{checkpoint.folder}: {name}.weight is in none of its files; a recipe takes plain weights")
    return checkpoint.tensor(f"{name}.weight")


def _bias(checkpoint: Checkpoint | None, name: str, module: torch.nn.Linear) -> Tensor | None:
    """The bias as codes in the dtype of the model, from the file where the model has no memory for it."""
    if module.bias is None:
        return None
    dtype = module.weight.dtype
    if not module.bias.is_meta:
        return _bias_codes(module.bias.detach(), dtype)
    if checkpoint is None:
        raise RecipeError(f"{name}: its bias has no memory in the model; give the checkpoint that holds it")
    found = stored_bias(checkpoint, name, dtype)
    if found is None:
        raise CheckpointError(f"{checkpoint.folder}: {name}.bias is in none of its files; take the configuration of this model")
    return found


def _bias_codes(value: torch.Tensor, dtype: torch.dtype) -> Tensor:
    codes: Any = codes_of(value.to(dtype)).cpu().numpy().view(np.uint16)
    return Tensor(codes, _FORMATS[dtype])


def stored_bias(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor | None:
    """The bias of a layer as codes [N] in `dtype` (bfloat16 or float16): its own, or those of the shards of a fused module, one
    after the other. None where the checkpoint holds none. Raises CheckpointError where it holds those of some shards only."""
    if f"{name}.bias" in checkpoint.files:
        return _bias_codes(checkpoint.tensor(f"{name}.bias"), dtype)
    shards = [f"{part}.bias" for part in _parts(name)]
    if not any(shard in checkpoint.files for shard in shards):
        return None
    return _bias_codes(torch.cat([checkpoint.tensor(shard) for shard in shards]), dtype)


# Layers of a quantised checkpoint -----------------------------------------------------------------------------------------


def _parts(name: str) -> tuple[str, ...]:
    """Names of the modules that a fused module stacks; none where it is not fused."""
    parent, dot, leaf = name.rpartition(".")
    return tuple(f"{parent}{dot}{part}" for part in SHARDS.get(leaf, ()))


def _is_stored(checkpoint: Checkpoint, name: str) -> bool:
    return any(f"{name}.{tensor}" in checkpoint.files for tensor in _STORED)


def _stored(checkpoint: Checkpoint, schemes: Schemes, name: str, out: Format) -> QuantisedLinear:
    """A layer of the checkpoint, or its shards fused. Raises CheckpointError."""
    parts = _parts(name)
    if not _is_stored(checkpoint, name) and parts and all(_is_stored(checkpoint, part) for part in parts):
        return fuse(name, [_stored(checkpoint, schemes, part, out) for part in parts])
    if not _is_stored(checkpoint, name):
        raise CheckpointError(f"{checkpoint.folder}: {name} is in none of its files; take the configuration of this model")
    if f"{name}.weight_scale" not in checkpoint.files:
        raise CheckpointError(f"{name} is stored without weight_scale, though the configuration names it; add it to `ignore`")
    scheme = schemes.of(name)
    if scheme is None:
        raise CheckpointError(f"{name} is ignored, but the module it is fused into is not; ignore all its shards or none")
    return checkpoint.linear(name, scheme, out)


def fuse(name: str, shards: list[QuantisedLinear]) -> QuantisedLinear:
    """Shards stacked along N as one Linear. A scale per tensor that differs between shards becomes one per channel. Raises
    CheckpointError where shards differ in what the op holds once: scheme, K, a static input scale, the global scale of NVFP4."""
    first = shards[0]
    if len({(replace(shard.scheme, group_name=""), shard.k) for shard in shards}) > 1:
        raise CheckpointError(f"{name}: its shards have different schemes; quantise them alike, or keep them apart")
    if len({None if shard.input_scale is None else int(shard.input_scale.codes[0]) for shard in shards}) > 1:
        raise CheckpointError(f"{name}: its shards have different input scales; quantise them with one, or keep them apart")
    if first.scheme.variant == "block" and any(shard.n % 128 for shard in shards[:-1]):
        raise CheckpointError(f"{name}: rows {[shard.n for shard in shards]} of its shards cut blocks of 128; keep them apart")
    constants, scheme = {}, first.scheme
    for tensor, held in first.constants.items():
        codes = [shard.constants[tensor].codes for shard in shards]
        if tensor == "alpha" or (tensor == "channel_scale" and scheme.per_tensor):
            if all(np.array_equal(codes[0], other) for other in codes[1:]):
                constants[tensor] = held
                continue
            if tensor == "alpha":
                text = "its shards have different global scales"
                raise CheckpointError(f"{name}: {text}; quantise them with one, or keep them apart")
            codes = [np.repeat(code, shard.n) for code, shard in zip(codes, shards, strict=True)]
            scheme = replace(scheme, per_tensor=False)
        constants[tensor] = Tensor(np.concatenate(codes), held.format)
    return QuantisedLinear(name, scheme, sum(shard.n for shard in shards), first.k, constants, first.input_scale)
