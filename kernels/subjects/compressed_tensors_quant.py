"""compressed-tensors: int4 weights with one scale per group, and NVFP4, as its compressors make them on the host.

Decides: which calls stand for the recipe `compressed_tensors` of int4_quantize and nvfp4_quantize. Refuses, with a sentence:
other ops, other recipes, and what the library's compressors do not write.

Scales come from `compute_dynamic_scales_and_zp`, which is `calculate_qparams` on the least and greatest value of each group,
codes from `quantize` or from the packing of the format. All calls are the library's eager torch code, not its Triton kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView

from .tensors import as_torch, library, unpaired, versions, write

__all__ = ["CompressedTensors", "backend"]


class Calls(NamedTuple):
    """Functions of the library, and torch."""

    torch: Any
    Args: Any
    scales: Any
    quantize: Any
    pack_fp4: Any
    global_scale: Any


def _int4(calls: Calls, problem: Problem, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Codes, scales and zero points of one scale per group; int4 codes are the low nibble of the library's int8."""
    symmetric = problem.variant == "sym"
    args = calls.Args(num_bits=4, type="int", strategy="group", group_size=problem.dim("g"), symmetric=symmetric)
    scale, zero = calls.scales(tensors["x"], args, None)
    q = calls.quantize(tensors["x"], scale, zero, args, dtype=calls.torch.int8)
    found = {"q": q & 15, "scales": scale}
    return found if symmetric else found | {"zeros": zero.to(calls.torch.int8) & 15}


def _nvfp4(calls: Calls, problem: Problem, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Codes and e4m3 scales; `dynamic` finds the global scale with `generate_gparam`."""
    x, fp8 = tensors["x"], calls.torch.float8_e4m3fn
    given = tensors.get("global_scale")
    g = calls.global_scale(*calls.torch.aminmax(x)) if given is None else given
    args = calls.Args(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, scale_dtype=fp8)
    scale, _ = calls.scales(x, args, None, g)
    q = unpaired(calls.torch, calls.pack_fp4(x, scale, global_scale=g, zero_point=None, group_size=16))
    return {"q": q, "scales": scale.to(fp8), "global_scale": g}


_KERNELS = {"int4_quantize": _int4, "nvfp4_quantize": _nvfp4}


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Backend protocol over the two formats."""

    calls: Calls
    name: str = "compressed_tensors"
    target: str = "cpu"

    def describe(self) -> Mapping[str, str]:
        """Versions of the library and of the torch that computes for it."""
        return versions("compressed-tensors", "torch")

    def supports(self, problem: Problem) -> str | None:
        """None for the recipe `compressed_tensors` in linear layout."""
        if problem.op not in _KERNELS:
            return f"compressed-tensors is judged as a quantiser of {' and '.join(_KERNELS)}, not of {problem.op!r}"
        if problem.option("recipe") != "compressed_tensors":
            return f"compressed-tensors quantises by its own recipe, not by {problem.option('recipe')!r}"
        if problem.op == "nvfp4_quantize" and problem.option("layout") != "linear":
            return "compressed-tensors stores NVFP4 scales row by row, not swizzled"
        if problem.op == "nvfp4_quantize" and problem.variant == "dynamic" and problem.dim("m") == 0:
            return "torch.aminmax has no value for a tensor without elements"
        return None

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """The recipe's bits."""
        return EXACT_BITS

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Mapping[str, TensorView], outputs: Mapping[str, TensorView],
        workspace: Any, stream: Any,
    ) -> str:
        """Call the library and copy its bits."""
        tensors = {name: as_torch(self.calls.torch, view) for name, view in inputs.items()}
        found = _KERNELS[problem.op](self.calls, problem, tensors)
        for name, view in outputs.items():
            write(view, found[name].reshape(view.shape))
        return f"compressed_tensors {problem.op}"


def backend(argument: str | None = None) -> CompressedTensors:
    """The backend `compressed_tensors`. Raises ImportError where the library is absent, ValueError for an argument."""
    if argument is not None:
        raise ValueError(f"backend 'compressed_tensors' takes no argument, got {argument!r}; write --backend compressed_tensors")
    name = "compressed-tensors"
    qparams = library("compressed_tensors.quantization.utils.helpers", name)
    return CompressedTensors(Calls(
        library("torch", "torch"), library("compressed_tensors.quantization", name).QuantizationArgs,
        qparams.compute_dynamic_scales_and_zp, library("compressed_tensors.quantization.lifecycle.forward", name).quantize,
        library("compressed_tensors.compressors.nvfp4.helpers", name).quantize_and_pack_fp4, qparams.generate_gparam,
    ))
