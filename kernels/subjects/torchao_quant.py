"""torchao: NVFP4 as its prototype of microscaling formats makes it on the host.

Decides: which calls stand for the recipe `torchao` of nvfp4_quantize. Refuses, with a sentence: other ops and recipes, and
binary16 inputs, which the library asserts away. Scales are rearranged, where the problem asks, by the library's `to_blocked`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView

from .tensors import as_torch, library, unpaired, versions, write

__all__ = ["TorchAo", "backend"]


class Calls(NamedTuple):
    """Functions of the library, and torch."""

    torch: Any
    quantize: Any
    global_scale: Any
    to_blocked: Any


@dataclass(frozen=True, slots=True)
class TorchAo:
    """Backend protocol over `nvfp4_quantize`."""

    calls: Calls
    name: str = "torchao"
    target: str = "cpu"

    def describe(self) -> Mapping[str, str]:
        """Versions of the library and of the torch that computes for it."""
        return versions("torchao", "torch")

    def supports(self, problem: Problem) -> str | None:
        """None for the recipe `torchao` on bf16 and binary32."""
        if problem.op != "nvfp4_quantize":
            return f"torchao is judged as a quantiser of nvfp4_quantize, not of {problem.op!r}"
        if problem.option("recipe") != "torchao":
            return f"torchao quantises by its own recipe, not by {problem.option('recipe')!r}"
        if problem.option("x") == "f16":
            return "torchao takes bfloat16 and float32 inputs for NVFP4, not float16"
        if problem.variant == "dynamic" and problem.dim("m") == 0:
            return "torch.max has no value for a tensor without elements"
        return None

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The recipe's bits."""
        return EXACT_BITS

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Mapping[str, TensorView], outputs: Mapping[str, TensorView],
        workspace: Any, stream: Any,
    ) -> str:
        """Call the library and copy its bits; `dynamic` finds the global scale with `per_tensor_amax_to_scale`."""
        calls = self.calls
        tensors = {name: as_torch(calls.torch, view) for name, view in inputs.items()}
        x = tensors["x"].contiguous()
        d = tensors["global_scale"] if "global_scale" in tensors else calls.global_scale(x.abs().max().reshape(1))
        scales, packed = calls.quantize(x, 16, d)
        if problem.option("layout") == "swizzled":
            scales = calls.to_blocked(scales.view(problem.dim("m"), -1))
        found = {"q": unpaired(calls.torch, packed), "scales": scales, "global_scale": d}
        for name, view in outputs.items():
            write(view, found[name].reshape(view.shape))
        return "torchao nvfp4_quantize"


def backend(argument: str | None = None) -> TorchAo:
    """The backend `torchao`. Raises ImportError where the library is absent, ValueError for an argument."""
    if argument is not None:
        raise ValueError(f"backend 'torchao' takes no argument, got {argument!r}; write --backend torchao")
    nvfp4 = library("torchao.prototype.mx_formats.nvfp4_tensor", "torchao")
    blocked = library("torchao.prototype.mx_formats.utils", "torchao").to_blocked
    return TorchAo(Calls(library("torch", "torch"), nvfp4.nvfp4_quantize, nvfp4.per_tensor_amax_to_scale, blocked))
