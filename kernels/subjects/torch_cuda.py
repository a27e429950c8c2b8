"""Matrix products of PyTorch and Triton on a Hopper GPU: `_scaled_mm`, `matmul`, `_int_mm` and `tl.dot`.

Decides: which call stands for which op, and what its sum over K is declared to be. Refuses, with a sentence: what the library has
no call for, chips of which no datapath here was measured, and machines without a device. Nothing repairs a result.

What is declared was read from the probes of tests/device on H200, not from documents: Triton's dot is one chain in ascending k,
promoted where `max_num_imprecise_acc` says, and claimed to the bit; cuBLASLt (`_scaled_mm`, `matmul`) takes the same chains, but
cuts a long K into parts by a heuristic that depends on the shape (three at K = 8192 and 256 rows and columns, added in binary32).
Its order is declared unknown: parts lie inside the interval of one chain in any order, because each part is a node or more
shorter than the chain, and what a node may lose is more than one binary32 rounding. Scales of `_scaled_mm` go to the library
where it takes them; where it does not, and behind Triton, they are eager operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    F16,
    F32,
    Claim,
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

from .tensors import library, versions

__all__ = ["FP8_LIMITS", "KERNELS", "Kernel", "TorchCuda", "backend"]

Tensors = Mapping[str, Any]
Program = tuple[Contraction | Step, ...]

_CAPABILITY = (9, 0)
_INT_MM_ROWS = 17  # the least that torch._int_mm takes on CUDA
_OUT = {"bf16": BF16, "f16": F16, "f32": F32}
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "e4m3fn": "float8_e4m3fn", "int8": "int8", "uint4": "uint8"}
_WORDS = {1: "uint8", 2: "int16", 4: "int32"}
FP8_LIMITS = {"triton": None, "triton_32": 32, "triton_64": 64, "triton_128": 128}
"""Tactics of Triton's fp8 dot -> max_num_imprecise_acc."""


class Kernel(NamedTuple):
    """One op: why a problem is outside the library (None: inside), its tactics, what each declares, untimed packing, the call."""

    refuses: Callable[[Problem], str | None]
    tactics: Callable[[Problem], Sequence[str]]
    program: Callable[[Problem, str], Program]
    prepare: Callable[[Any, Problem, Tensors], Tensors]
    run: Callable[[Any, Problem, str, Tensors], tuple[str, Any]]


def _dtype(torch: Any, problem: Problem) -> Any:
    return getattr(torch, _DTYPES[problem.option("out")])


def _triton(a: Any, w: Any, limit: int | None = None) -> Any:
    return import_module("lowbit.kernels.subjects.triton_dot").triton_product(a, w, limit)


def _with_triton(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names) if find_spec("triton") is not None else ()


# _scaled_mm: fp8 -----------------------------------------------------------------------------------------------------


def _fp8_refuses(problem: Problem) -> str | None:
    if problem.dim("k") % 16 or problem.dim("n") % 16 or not problem.dim("k"):
        return "torch._scaled_mm takes K and N in multiples of 16"
    if problem.variant != "scaled" or problem.option("format") != "fn":
        return "judged are products of e4m3fn with scales per tensor or per row, not scales of blocks along K"
    if problem.option("bias") != "nobias":
        return "judged are the sums of torch._scaled_mm, no bias is handed to it"
    return None


def _fp8_tactics(problem: Problem) -> tuple[str, ...]:
    """The row-wise kernels of the library write bf16 alone."""
    rows = ("rowwise_fast", "rowwise_slow") if problem.option("out") == "bf16" else ()
    return (*rows, "tensorwise_fast", "tensorwise_slow", *_with_triton(tuple(FP8_LIMITS)))


def _fp8_program(problem: Problem, tactic: str) -> Program:
    path = DATAPATHS["hopper_wgmma_fp8"]
    if tactic in FP8_LIMITS:
        main = Contraction(("a", "w"), path, segment=FP8_LIMITS[tactic] or 0)
    else:
        main = Contraction(("a", "w"), path, Order.UNKNOWN, segment=128 * tactic.endswith("slow"))
    return (main, mul("channel_scale"), mul("token_scale"), cast(_OUT[problem.option("out")]))


def _as_is(torch: Any, problem: Problem, tensors: Tensors) -> Tensors:
    return tensors


def _fp8(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Any]:
    a, w, out = tensors["a"], tensors["w"], _dtype(torch, problem)
    left, right = tensors["token_scale"], tensors["channel_scale"]
    if tactic in FP8_LIMITS:
        return "tl.dot", (_triton(a, w, FP8_LIMITS[tactic]) * right * left[:, None]).to(out)
    fast = tactic.endswith("fast")
    if tactic.startswith("rowwise"):
        rows, columns = left.expand(a.shape[0])[:, None].contiguous(), right.expand(w.shape[0])[None, :].contiguous()
        d = torch._scaled_mm(a, w.t(), scale_a=rows, scale_b=columns, out_dtype=out, use_fast_accum=fast)
        return f"torch._scaled_mm({tactic})", d
    if (problem.option("act_scale"), problem.option("weight_scale")) == ("atensor", "wtensor"):
        d = torch._scaled_mm(a, w.t(), scale_a=left[0], scale_b=right[0], out_dtype=out, use_fast_accum=fast)
        return f"torch._scaled_mm({tactic})", d
    one = torch.ones((), device=a.device)
    sums = torch._scaled_mm(a, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast)
    return f"torch._scaled_mm({tactic}, scales 1)", (sums * right * left[:, None]).to(out)


# matmul: bf16 and f16 ------------------------------------------------------------------------------------------------


def _wide_refuses(problem: Problem) -> str | None:
    k, g = problem.dim("k"), problem.dim("g")
    if not k or k % g or k % 8 or problem.dim("n") % 8 or (g not in (16, 32, 64, 128, 256) and g != k):
        return "the contract asks for groups of 16, 32, 64, 128, 256 or K that divide K, and K and N in multiples of 8"
    if problem.option("bias") == "bias":
        return "torch.matmul returns the output format: a bias can only be added after the cast"
    return None


def _wide_tactics(problem: Problem) -> tuple[str, ...]:
    return ("matmul", *_with_triton(("triton",)))


def _wide_program(problem: Problem, tactic: str) -> Program:
    out, path = _OUT[problem.option("out")], DATAPATHS[f"hopper_{problem.option('out')}"]
    main = Contraction(("a", "w"), path, Order.ASCENDING if tactic == "triton" else Order.UNKNOWN)
    after = (add("bias", format=out), cast(out)) if problem.option("bias") == "biasafter" else ()
    return (main, cast(out), *after)


def _wide_weights(torch: Any, problem: Problem, tensors: Tensors) -> Tensors:
    """W = RNE((q - z) s), zpafter RNE(RNE(q s) - RNE(z s)), in the output format: products of 4 by 11 bits are exact in the
    binary32 that torch computes in, and a sum of two is rounded as if once (24 >= 2 * 11 + 2 bits)."""
    out, g = _dtype(torch, problem), problem.dim("g")
    q, scale = tensors["w"].to(out), tensors["scale"].repeat_interleave(g, dim=1)
    zero = tensors["zero"].to(out).repeat_interleave(g, dim=1) if "zero" in tensors else 8
    weight = q * scale - zero * scale if problem.variant == "zpafter" else (q - zero) * scale
    return {**tensors, "w": weight.contiguous()}


def _wide(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Any]:
    a, w = tensors["a"], tensors["w"]
    if tactic == "triton":
        name, d = "tl.dot", _triton(a, w).to(a.dtype)
    else:
        name, d = "torch.matmul", torch.matmul(a, w.t())
    return name, d + tensors["bias"] if "bias" in tensors else d


# _int_mm: int8 -------------------------------------------------------------------------------------------------------


def _int8_refuses(problem: Problem) -> str | None:
    k, g = problem.dim("k"), problem.dim("g")
    if not k or k % g or (g % 32 and g != k) or g % 8 or problem.dim("n") % 8:
        return "the contract asks for groups of K or of a multiple of 32 that divides K, and for N in multiples of 8"
    return None


def _int8_tactics(problem: Problem) -> tuple[str, ...]:
    return ("int_mm", *_with_triton(("triton",)))


def _int8_program(problem: Problem, tactic: str) -> Program:
    bias = (add("bias"),) if problem.option("bias") == "bias" else ()
    via = (cast(F16),) if problem.variant == "viaf16" else ()
    main = Contraction(("a", "w"), DATAPATHS["imma_s32"], segment=problem.dim("g"), steps=(cast(F32), mul("group_scale")))
    return (main, mul("token_scale"), *bias, *via, cast(_OUT[problem.option("out")]))


def _int8_weights(torch: Any, problem: Problem, tensors: Tensors) -> Tensors:
    """q - 8 in int8, one contiguous matrix [N, g] per group; group scales in binary32."""
    parts = (tensors["w"].to(torch.int8) - 8).split(problem.dim("g"), dim=1)
    return {**tensors, "w": [part.contiguous() for part in parts], "group_scale": tensors["group_scale"].float()}


def _int8(torch: Any, problem: Problem, tactic: str, tensors: Tensors) -> tuple[str, Any]:
    """One product per group, then eager binary32: times the group scale, added up in ascending k, times the token scale.
    _int_mm takes more than 16 rows: fewer are followed by rows of zeros, whose results are dropped."""
    total, rows = None, tensors["a"].shape[0]
    whole = torch.nn.functional.pad(tensors["a"], (0, 0, 0, max(0, _INT_MM_ROWS - rows)))
    for g, w in enumerate(tensors["w"]):
        a = whole[:, g * w.shape[1] : (g + 1) * w.shape[1]]
        sums = _triton(a[:rows], w) if tactic == "triton" else torch._int_mm(a.contiguous(), w.t())[:rows]
        part = sums.float() * tensors["group_scale"][:, g]
        total = part if total is None else total + part
    value = total * tensors["token_scale"].float()[:, None]
    value = value + tensors["bias"].float() if "bias" in tensors else value
    value = value.to(torch.float16) if problem.variant == "viaf16" else value
    return "tl.dot" if tactic == "triton" else "torch._int_mm", value.to(_dtype(torch, problem))


KERNELS = {
    "gemm_w8a8_fp8": Kernel(_fp8_refuses, _fp8_tactics, _fp8_program, _as_is, _fp8),
    "gemm_w4a16": Kernel(_wide_refuses, _wide_tactics, _wide_program, _wide_weights, _wide),
    "gemm_w4a8_int8": Kernel(_int8_refuses, _int8_tactics, _int8_program, _int8_weights, _int8),
}


def _as_torch(torch: Any, view: TensorView) -> Any:
    """The suite's tensor in the dtype of its format; nothing is copied."""
    return view.memory.view(getattr(torch, _DTYPES[view.format.name]))


@dataclass(frozen=True, slots=True)
class TorchCuda:
    """Backend protocol over `KERNELS`. target: of its own, so that `--target cuda` asks the kernels of this project alone.
    device: where the tensors live; "cpu" runs the library's calls on the host, which tests of this adapter do."""

    torch: Any
    device: str = "cuda"
    name: str = "torch_cuda"
    target: str = "cuda_libraries"

    def describe(self) -> Mapping[str, str]:
        """Versions and the device."""
        chip = self.torch.cuda.get_device_name() if self.device == "cuda" else self.device
        return {**versions("torch", "triton"), "device": chip, "cuda": str(self.torch.version.cuda)}

    def supports(self, problem: Problem) -> str | None:
        """None, or why the library has no call for the problem."""
        if problem.op not in KERNELS:
            return f"no product of torch or Triton stands for {problem.op!r}; judged are {', '.join(KERNELS)}"
        return KERNELS[problem.op].refuses(problem)

    def tactics(self, problem: Problem) -> Sequence[str]:
        """The calls that take the problem, by name."""
        return KERNELS[problem.op].tactics(problem)

    def declare(self, problem: Problem, tactic: str) -> Declaration:
        """See the module: Triton's chains and exact integers to the bit, cuBLASLt in unknown order. The library's choice of parts
        depends on M."""
        program = KERNELS[problem.op].program(problem, tactic)
        fixed = tactic in FP8_LIMITS or problem.op == "gemm_w4a8_int8"
        return Declaration(program, Claim.BIT_EXACT if fixed else Claim.BOUNDED, batch_invariant=fixed)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Tensors:
        """Weights as the library wants them."""
        tensors = {name: _as_torch(self.torch, view) for name, view in constants.items()}
        return KERNELS[problem.op].prepare(self.torch, problem, tensors) if tensors else tensors

    def run(
        self, problem: Problem, tactic: str, state: Tensors, inputs: Mapping[str, TensorView],
        outputs: Mapping[str, TensorView], workspace: Any, stream: Any,
    ) -> str:
        """Call the library on the stream and copy its bits."""
        if problem.dim("m") == 0:
            return f"{tactic} (nothing to launch)"
        with nullcontext() if stream is None else self.torch.cuda.stream(stream):
            tensors = {**state, **{name: _as_torch(self.torch, view) for name, view in inputs.items()}}
            name, d = KERNELS[problem.op].run(self.torch, problem, tactic, tensors)
            memory = outputs["d"].memory
            memory.copy_(d.contiguous().view(getattr(self.torch, _WORDS[d.element_size()])))
        return name


def backend(argument: str | None = None) -> TorchCuda:
    """The backend `torch_cuda`. Raises ImportError where torch is absent, RuntimeError where there is no chip of Hopper's,
    ValueError for an argument."""
    if argument is not None:
        raise ValueError(f"backend 'torch_cuda' takes no argument, got {argument!r}; write --backend torch_cuda")
    torch = library("torch", "torch")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA device to certify anything on; run it on an H100 or H200")
    found = torch.cuda.get_device_capability()
    if found != _CAPABILITY:
        raise RuntimeError(f"got a device of capability {found}, expected {_CAPABILITY}: no datapath of another was measured")
    return TorchCuda(torch)
