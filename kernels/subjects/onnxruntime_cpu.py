"""onnxruntime on the host: the contrib operator MatMulNBits with 4 bits, at accuracy levels 0 and 4.

Decides: how a gemm_w4a16 becomes a model of one node, and what each level is declared to compute. Refuses, with a sentence:
what the operator's schema or its host kernel does not take.

Both levels are declared as the contract's program with sums in binary32 in an order that the library chooses. What they do
beside it is in reports/subjects/onnxruntime.md: level 0 keeps weights in binary32, level 4 quantises activations to int8 on
its own. A declaration has no words for either, and none is bent to make them pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.conformance.backend import DATAPATHS, EXACT_BITS, F16, Contraction, Declaration, Order, Problem, TensorView, add, cast

from .tensors import library, versions

__all__ = ["OnnxRuntime", "backend"]

_LEVELS = {"accuracy_level_0": 0, "accuracy_level_4": 4}
_BLOCKS = (16, 32, 64, 128, 256)


def _pairs(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two codes per byte along the last axis, the even one in the low nibble; an odd tail gets 0."""
    even = np.pad(codes, (*((0, 0),) * (codes.ndim - 1), (0, codes.shape[-1] % 2)))
    return np.asarray(even[..., 0::2] | even[..., 1::2] << 4, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """Backend protocol over one node. `onnx` builds the model, `runtime` runs it on one thread."""

    onnx: Any
    runtime: Any
    name: str = "onnxruntime"
    target: str = "cpu"

    def describe(self) -> Mapping[str, str]:
        """Versions and providers."""
        return {**versions("onnxruntime", "onnx"), "providers": "CPUExecutionProvider", "threads": "1"}

    def supports(self, problem: Problem) -> str | None:
        """None, or why MatMulNBits does not compute the problem."""
        if problem.op != "gemm_w4a16":
            return f"MatMulNBits multiplies 16- or 32-bit activations by 4-bit weights; it has no form of {problem.op!r}"
        if problem.option("out") == "bf16":
            return "the host kernel of MatMulNBits takes float16 and float32 activations, not bfloat16"
        if problem.variant == "zpafter":
            return "MatMulNBits subtracts the zero point from the code, never a scaled zero point from a scaled code"
        if problem.option("bias") == "biasafter":
            return "MatMulNBits adds the bias before the cast to the output format, never after it"
        if problem.dim("g") not in _BLOCKS or problem.dim("k") % problem.dim("g"):
            return f"MatMulNBits takes blocks of {', '.join(map(str, _BLOCKS))} that divide K, not {problem.dim('g')}"
        if problem.dim("n") % 8:
            return f"the contract asks for N in multiples of 8, not {problem.dim('n')}"
        return None

    def tactics(self, problem: Problem) -> Sequence[str]:
        """One per accuracy level."""
        return tuple(_LEVELS)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """Rounded weights, binary32 sums in unknown order, bias, one cast. M = 1 has a kernel of its own."""
        if problem.op != "gemm_w4a16":
            return EXACT_BITS
        bias = (add("bias"),) if problem.option("bias") == "bias" else ()
        main = Contraction(("a", "w"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN)
        return Declaration((main, *bias, cast(F16)), batch_invariant=False)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        """A session over a model whose weights are constants, so that the library packs them now."""
        kind, helper = self.onnx.TensorProto, self.onnx.helper
        n, k, g = (problem.dim(letter) for letter in "nkg")
        blocks = k // g
        parts = {
            "B": (kind.UINT8, (n, blocks, g // 2), _pairs(np.asarray(constants["w"].memory)).reshape(n, blocks, g // 2)),
            "scales": (kind.FLOAT16, (n * blocks,), np.ascontiguousarray(constants["scale"].memory)),
        }
        if "zero" in constants:
            zero = _pairs(np.asarray(constants["zero"].memory))
            parts["zero_points"] = (kind.UINT8, (zero.size,), zero)
        if "bias" in constants:
            parts["bias"] = (kind.FLOAT16, (n,), np.ascontiguousarray(constants["bias"].memory))
        names = ["A", *(name if name in parts else "" for name in ("B", "scales", "zero_points", "g_idx", "bias"))]
        while not names[-1]:
            names.pop()
        node = helper.make_node(
            "MatMulNBits", names, ["Y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=g, accuracy_level=_LEVELS[tactic])
        stored = [helper.make_tensor(name, *form, array.tobytes(), raw=True) for name, (*form, array) in parts.items()]
        graph = helper.make_graph(
            [node], "matmul_nbits", [helper.make_tensor_value_info("A", kind.FLOAT16, ["M", k])],
            [helper.make_tensor_value_info("Y", kind.FLOAT16, ["M", n])], stored)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return self.runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Mapping[str, TensorView], outputs: Mapping[str, TensorView],
        workspace: Any, stream: Any,
    ) -> str:
        """Run the node and copy its bits."""
        (found,) = state.run(None, {"A": np.ascontiguousarray(inputs["a"].memory).view(np.float16)})
        outputs["d"].memory[...] = found.view(np.uint16)
        return f"MatMulNBits({tactic})"


def backend(argument: str | None = None) -> OnnxRuntime:
    """The backend `onnxruntime`. Raises ImportError where onnx or onnxruntime is absent, ValueError for an argument."""
    if argument is not None:
        raise ValueError(f"backend 'onnxruntime' takes no argument, got {argument!r}; write --backend onnxruntime")
    return OnnxRuntime(library("onnx", "onnx"), library("onnxruntime", "onnxruntime"))
