"""Kernels of PyTorch on the host: `_scaled_mm`, `_int_mm`, `_weight_int4pack_mm_for_cpu`, and casts to fp8.

Decides: which call of the library stands for which op, and what the library's own arithmetic is, where its sources or its
results say so. Refuses, with a sentence: what the library has no call for. Nothing here repairs a result: where a kernel leaves
the contract, the verdict says so (reports/subjects/torch_cpu.md).

What is declared: sums in binary32 by fused multiply-adds in an order that the library chooses (`_scaled_mm`, int4pack), exact
int32 sums (`_int_mm`); the epilogue of `_int_mm` is one eager operation per step. `_scaled_mm` multiplies the scales into the
operands before the sum on machines without AMX; a declaration has no words for that, so it declares the contract's program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    EXACT_BITS,
    F16,
    F32,
    Contraction,
    Declaration,
    Order,
    Problem,
    Step,
    TensorView,
    add,
    cast,
    mul,
)

from .tensors import as_torch, library, versions, write

__all__ = ["TorchCpu", "backend"]

Tensors = Mapping[str, Any]
Program = tuple[Contraction | Step, ...]

_OUT = {"bf16": BF16, "f16": F16, "f32": F32}
_FP8_MAX = {"fn": 448.0, "fnuz": 224.0}
"""Largest quotient of QuantFP8 in vLLM: 224 for fnuz, although the format reaches 240."""


class Kernel(NamedTuple):
    """One op: why a problem is outside the library (None: inside), what is declared, untimed packing, the call."""

    refuses: Callable[[Problem], str | None]
    program: Callable[[Problem], Program]
    prepare: Callable[[Any, Problem, Tensors], Tensors]
    run: Callable[[Any, Problem, str, Tensors], tuple[str, Tensors]]
    tactics: tuple[str, ...] = ("default",)


def _as_is(torch: Any, problem: Problem, tensors: Tensors) -> Tensors:
    return tensors


def _dtype(torch: Any, problem: Problem) -> Any:
    return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[problem.option("out")]


# _scaled_mm ----------------------------------------------------------------------------------------------------------


def _scaled_mm_refuses(problem: Problem) -> str | None:
    if problem.dim("k") % 16 or problem.dim("n") % 8:
        return "the contract asks for K in multiples of 16 and N in multiples of 8"
    if problem.variant == "block":
        return "torch._scaled_mm on the host takes one scale per tensor or per row, no scales of blocks along K"
    if problem.option("bias") == "biasafter":
        return "torch._scaled_mm adds the bias before the cast to the output format, never after it"
    return None


def _scaled_mm_program(problem: Problem) -> Program:
    bias = (add("bias"),) if problem.option("bias") == "bias" else ()
    main = Contraction(("a", "w"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN)
    return (main, mul("channel_scale"), mul("token_scale"), *bias, cast(_OUT[problem.option("out")]))


def _scaled_mm(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Tensors]:
    """`scaled_mm`: the scales go to the library, one per tensor where both are, else one per row of each side (a single one is
    repeated, which changes no value). `unit_scales`: the library gets scales of 1 and gives binary32; scales, bias and cast are
    eager operations after it, so that the verdict is about the sum alone."""
    a, w, out = tensors["a"], tensors["w"].t(), _dtype(torch, problem)
    left, right, bias = tensors["token_scale"], tensors["channel_scale"], tensors.get("bias")
    one = torch.ones(1)
    if tactic == "unit_scales":
        value = torch._scaled_mm(a, w, scale_a=one, scale_b=one, out_dtype=torch.float32)
        value = value * right * left[:, None]
        return "torch._scaled_mm(scales 1)", {"d": (value if bias is None else value + bias).to(out)}
    if (problem.option("act_scale"), problem.option("weight_scale")) != ("atensor", "wtensor"):
        left = left.expand(a.shape[0]).reshape(-1, 1).contiguous()
        right = right.expand(w.shape[1]).reshape(1, -1).contiguous()
    kind = "rowwise" if left.dim() == 2 else "tensorwise"
    found = torch._scaled_mm(a, w, scale_a=left, scale_b=right, bias=bias, out_dtype=out)
    return f"torch._scaled_mm({kind})", {"d": found}


# _int_mm -------------------------------------------------------------------------------------------------------------


def _int_mm_refuses(problem: Problem) -> str | None:
    k, g = problem.dim("k"), problem.dim("g")
    if k % g or (g % 32 and g != k) or problem.dim("n") % 8:
        return "the contract asks for groups of K or of a multiple of 32 that divides K, and for N in multiples of 8"
    return None


def _int_mm_program(problem: Problem) -> Program:
    bias = (add("bias"),) if problem.option("bias") == "bias" else ()
    via = (cast(F16),) if problem.variant == "viaf16" else ()
    main = Contraction(("a", "w"), DATAPATHS["imma_s32"], segment=problem.dim("g"), steps=(cast(F32), mul("group_scale")))
    return (main, mul("token_scale"), *bias, *via, cast(_OUT[problem.option("out")]))


def _int_mm_weights(torch: Any, problem: Problem, tensors: Tensors) -> Tensors:
    """q - 8 in int8, one matrix [g, N] per group; group scales in binary32."""
    w = (tensors["w"].to(torch.int8) - 8).split(problem.dim("g"), dim=1)
    return {**tensors, "w": [part.contiguous().t() for part in w], "group_scale": tensors["group_scale"].float()}


def _int_mm(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Tensors]:
    """One `_int_mm` per group, then eager binary32: times the group scale, added up in ascending k, times the token scale."""
    total = None
    for g, (a, w) in enumerate(zip(tensors["a"].split(problem.dim("g"), dim=1), tensors["w"], strict=True)):
        part = torch._int_mm(a, w).float() * tensors["group_scale"][:, g]
        total = part if total is None else total + part
    value = total * tensors["token_scale"].float()[:, None]
    if "bias" in tensors:
        value = value + tensors["bias"].float()
    if problem.variant == "viaf16":
        value = value.to(torch.float16)
    return "torch._int_mm", {"d": value.to(_dtype(torch, problem))}


# _weight_int4pack_mm_for_cpu -----------------------------------------------------------------------------------------


def _int4pack_refuses(problem: Problem) -> str | None:
    if problem.variant != "sym":
        return "torch int4pack takes real zero points rounded to the activation's format, the op has integer ones"
    if problem.dim("g") not in (32, 64, 128, 256) or problem.dim("k") % problem.dim("g"):
        return f"torch int4pack takes groups of 32, 64, 128 or 256 that divide K, not {problem.dim('g')}"
    if problem.dim("n") % 8:
        return f"the contract asks for N in multiples of 8, not {problem.dim('n')}"
    if problem.option("bias") == "bias":
        return "torch int4pack returns the output format: a bias can only be added after the cast"
    return None


def _int4pack_program(problem: Problem) -> Program:
    out = _OUT[problem.option("out")]
    after = (add("bias", format=out), cast(out)) if problem.option("bias") == "biasafter" else ()
    return (Contraction(("a", "w"), DATAPATHS["ieee_f32"], order=Order.UNKNOWN), cast(out), *after)


def _int4pack_weights(torch: Any, problem: Problem, tensors: Tensors) -> Tensors:
    """The library's packing of q (value (q - 8) * scale + zero), and scales beside zeros of 0: [K / g, N, 2]. It packs 16
    output columns together; where N is no multiple of 16, columns of zeros fill it up and `_int4pack` cuts them off."""
    missing = (0, 0, 0, -problem.dim("n") % 16)
    w, scale = (torch.nn.functional.pad(tensors[name], missing) for name in ("w", "scale"))
    packed = torch._convert_weight_to_int4pack_for_cpu(w.to(torch.int32), 1)
    pairs = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=2).contiguous()
    return {**tensors, "w": packed, "scale": pairs}


def _int4pack(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Tensors]:
    found = torch._weight_int4pack_mm_for_cpu(tensors["a"], tensors["w"], problem.dim("g"), tensors["scale"])
    found = found[:, : problem.dim("n")]
    if "bias" in tensors:
        found = found + tensors["bias"]
    return "torch._weight_int4pack_mm_for_cpu", {"d": found}


# Casts to fp8 --------------------------------------------------------------------------------------------------------


def _quant_refuses(problem: Problem) -> str | None:
    if problem.option("recipe") != "vllm_native" or problem.variant not in ("static", "tensor", "token"):
        return "eager torch computes the recipe vllm_native (QuantFP8.forward_native) with one scale per tensor or per token"
    if problem.variant == "tensor" and problem.dim("m") == 0:
        return "torch.max has no value for a tensor without elements"
    return None


def _no_program(problem: Problem) -> Program:
    return ()


def _quant(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Tensors]:
    """QuantFP8.forward_native of vLLM, operation for operation: x * (1 / scale) in binary32, clamp, cast."""
    x, name = tensors["x"], problem.option("format")
    top, fp8 = _FP8_MAX[name], {"fn": torch.float8_e4m3fn, "fnuz": torch.float8_e4m3fnuz}[name]
    found: dict[str, Any] = {}
    if problem.variant == "static":
        scale = tensors["scale"]
    else:
        amax = x.abs().max() if problem.variant == "tensor" else x.abs().max(dim=-1, keepdim=True).values
        amax = amax.float()
        if "scale_ub" in tensors:
            amax = amax.clamp(max=tensors["scale_ub"])
        scale = found["scales"] = (amax / top).clamp(min=1.0 / (top * 512.0))
    q = (x.float() * scale.reciprocal()).clamp(-top, top).to(fp8)
    missing = max(problem.dim("p") - q.shape[0], 0)
    found["q"] = torch.nn.functional.pad(q.view(torch.uint8), (0, 0, 0, missing)).view(fp8)
    return "torch.Tensor.to(float8)", found


KERNELS = {
    "gemm_w8a8_fp8": Kernel(_scaled_mm_refuses, _scaled_mm_program, _as_is, _scaled_mm, ("scaled_mm", "unit_scales")),
    "gemm_w4a8_int8": Kernel(_int_mm_refuses, _int_mm_program, _int_mm_weights, _int_mm),
    "gemm_w4a16": Kernel(_int4pack_refuses, _int4pack_program, _int4pack_weights, _int4pack),
    "fp8_quantize": Kernel(_quant_refuses, _no_program, _as_is, _quant),
}


@dataclass(frozen=True, slots=True)
class TorchCpu:
    """Backend protocol over `KERNELS`."""

    torch: Any
    name: str = "torch_cpu"
    target: str = "cpu"

    def describe(self) -> Mapping[str, str]:
        """Versions, and what decides which kernels the library picks."""
        torch = self.torch
        amx = "oneDNN, scales after the sum" if torch.cpu._is_amx_tile_supported() else "eager, scales into the operands"
        return {
            **versions("torch"), "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()), "scaled_mm": amx,
        }

    def supports(self, problem: Problem) -> str | None:
        """None, or why the library has no call for the problem."""
        if problem.op not in KERNELS:
            return f"torch has no kernel of its own for {problem.op!r} on the host; judged are {', '.join(KERNELS)}"
        return KERNELS[problem.op].refuses(problem)

    def tactics(self, problem: Problem) -> Sequence[str]:
        """`scaled_mm` and `unit_scales` for gemm_w8a8_fp8, else "default"."""
        return KERNELS[problem.op].tactics

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """See the module: binary32 sums in unknown order, exact integer sums, or the contract's bits. The library's blocking
        depends on M, so rows of a binary32 sum are not promised to be independent of it."""
        program = KERNELS[problem.op].program(problem)
        return Declaration(program, batch_invariant=problem.op == "gemm_w4a8_int8") if program else EXACT_BITS

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Tensors:
        """Weights as the library wants them."""
        tensors = {name: as_torch(self.torch, view) for name, view in constants.items()}
        return KERNELS[problem.op].prepare(self.torch, problem, tensors) if tensors else tensors

    def run(
        self, problem: Problem, tactic: str, state: Tensors, inputs: Mapping[str, TensorView],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Call the library and copy its bits."""
        tensors = {**state, **{name: as_torch(self.torch, view) for name, view in inputs.items()}}
        name, found = KERNELS[problem.op].run(self.torch, problem, tactic, tensors)
        for key, view in outputs.items():
            write(view, found[key].reshape(view.shape))
        return name


def backend(argument: str | None = None) -> TorchCpu:
    """The backend `torch_cpu`. Raises ImportError where torch is absent, ValueError for an argument."""
    if argument is not None:
        raise ValueError(f"backend 'torch_cpu' takes no argument, got {argument!r}; write --backend torch_cpu")
    return TorchCpu(library("torch", "torch"))
