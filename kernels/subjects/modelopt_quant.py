"""TensorRT Model Optimizer: NVFP4 as `NVFP4QTensor.quantize` makes it on the host.

Decides: which calls stand for the recipe `modelopt` of nvfp4_quantize. Refuses, with a sentence: other ops, recipes and layouts.
The library's paths through CUDA extensions and TensorRT-LLM are not taken on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView

from .tensors import as_torch, library, unpaired, versions, write

__all__ = ["ModelOpt", "backend"]


@dataclass(frozen=True, slots=True)
class ModelOpt:
    """Backend protocol over `quantizer`, the class NVFP4QTensor."""

    torch: Any
    quantizer: Any
    name: str = "modelopt"
    target: str = "cpu"

    def describe(self) -> Mapping[str, str]:
        """Versions of the library and of the torch that computes for it."""
        return versions("nvidia-modelopt", "torch")

    def supports(self, problem: Problem) -> str | None:
        """None for the recipe `modelopt` in linear layout."""
        if problem.op != "nvfp4_quantize":
            return f"modelopt is judged as a quantiser of nvfp4_quantize, not of {problem.op!r}"
        if problem.option("recipe") != "modelopt":
            return f"modelopt quantises by its own recipe, not by {problem.option('recipe')!r}"
        if problem.option("layout") != "linear":
            return "modelopt stores NVFP4 scales row by row, not swizzled"
        if problem.dim("m") == 0:
            return "modelopt reduces over the whole tensor, which has no value without elements"
        return None

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The recipe's bits."""
        return EXACT_BITS

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Mapping[str, TensorView], outputs: Mapping[str, TensorView],
        workspace: Any, stream: Any,
    ) -> str:
        """Call the library and copy its bits; `dynamic` lets it find the global scale."""
        tensors = {name: as_torch(self.torch, view) for name, view in inputs.items()}
        given = tensors.get("global_scale")
        packed, scales, d = self.quantizer.quantize(tensors["x"], 16, weights_scaling_factor_2=given)
        found = {"q": unpaired(self.torch, packed._quantized_data), "scales": scales, "global_scale": d}
        for name, view in outputs.items():
            write(view, found[name].reshape(view.shape))
        return "modelopt NVFP4QTensor.quantize"


def backend(argument: str | None = None) -> ModelOpt:
    """The backend `modelopt`. Raises ImportError where the library is absent, ValueError for an argument."""
    if argument is not None:
        raise ValueError(f"backend 'modelopt' takes no argument, got {argument!r}; write --backend modelopt")
    quantizer = library("modelopt.torch.quantization.qtensor", "nvidia-modelopt").NVFP4QTensor
    return ModelOpt(library("torch", "torch"), quantizer)
