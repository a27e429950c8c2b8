"""fp8_quantize on Hopper: which kernel of quantisers.cu takes a problem, and the same for torch tensors without a problem.

Decides: the tactic and the threads of a block. `registers` keeps a row of a per-token problem in registers and reads it once;
`two_pass` reads it twice and takes any row. The other variants have one kernel each. Every kernel reads by 16 bytes where rows
are aligned to that, and by single values where they are not.
Refuses: what the contract does not have, and rows whose elements are apart. Compiled without contraction: the clauses fix every
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView

from ..domain import refusal
from .build import Unit
from .device import check, same_device
from .launch import entry, launch

__all__ = [
    "FLAGS", "OPS", "RECIPES", "UNITS", "declaration", "fp8_quantize", "prepare", "run", "stage", "tactics", "threads_of",
    "unsupported", "workspace",
]

OPS = ("fp8_quantize",)
FLAGS = ("-fmad=false",)
_SOURCE = "quantisers.cu"
UNITS: tuple[Unit, ...] = ((_SOURCE, {}, FLAGS),)

RECIPES = {"vllm": 0, "vllm_native": 1, "scaled_quantize": 2, "deepgemm": 3}
"""Numbers of the recipes in quantisers.cu."""

_FORMATS = {"bf16": 0, "f16": 1, "f32": 2}
_LANES = {"bf16": 8, "f16": 8, "f32": 4}  # values in 16 bytes
_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float32": "f32"}
_MOST, _EACH, _EACH_FEW = 8, 6, 3  # vectors of 16 bytes that a thread keeps: at most, and where rows are many or few
_MANY = 1024  # rows
_SCRATCH = 16  # bytes; the largest magnitude of a whole tensor takes 4

_TOKEN = ("lowbit_fp8_quantize_token", "pqipqpqpqqqiiip")
_ONE_SCALE = ("lowbit_fp8_quantize_one_scale", "pqipqpppqqqiip")
_BLOCK = ("lowbit_fp8_quantize_block", "pqipqpqqqiip")
_TILE = ("lowbit_fp8_quantize_tile", "pqipqpqqqip")


def unsupported(problem: Problem) -> str | None:
    """None for every problem of the contract's domain; otherwise the rule that it breaks."""
    return refusal(problem)


def threads_of(m: int, k: int, x: str) -> int:
    """Threads of a block that keeps a row of k values of format `x` in registers; 0 where a row does not fit 1,024 threads.

    Many rows overlap each other, few do not: then more threads share one. Best of 192 to 1,024 threads on an H200, bf16, K =
    12288 and 36864, M = 1 to 4,096."""
    vectors = -(-k // _LANES[x])
    for each in (_EACH if m >= _MANY else _EACH_FEW, _EACH, _MOST):
        threads = max(32, -(-vectors // (32 * each)) * 32)
        if threads <= 1024:
            return threads
    return 0


def tactics(problem: Problem) -> tuple[str, ...]:
    """`token`: registers where a row fits, and two_pass. Otherwise the one kernel of the variant."""
    if problem.variant != "token":
        return ("default",)
    fits = threads_of(problem.dim("m"), problem.dim("k"), problem.option("x")) > 0
    return ("registers", "two_pass") if fits else ("two_pass",)


def declaration(problem: Problem, tactic: str) -> Declaration:
    """Codes and scales are fixed by the contract."""
    return EXACT_BITS


def workspace(problem: Problem, tactic: str) -> int:
    """Bytes of scratch memory: the largest magnitude, for one scale per tensor."""
    return _SCRATCH if problem.variant == "tensor" else 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> None:
    """There are no constants."""


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> dict[str, Any]:
    """The tensors as they are."""
    return {name: view.memory for name, view in activations.items()}


def run(
    problem: Problem, tactic: str, state: None, inputs: Mapping[str, Any], outputs: Mapping[str, TensorView],
    workspace: TensorView | None, stream: Any,
) -> str:
    """Launch the tactic on the stream and return the name of its kernel."""
    scales = outputs["scales"].memory if "scales" in outputs else None
    return _quantize(
        inputs["x"], outputs["q"].memory, scales, problem.option("x"), variant=problem.variant, recipe=problem.option("recipe"),
        fnuz=problem.option("format") == "fnuz", scale=inputs.get("scale"), scale_ub=inputs.get("scale_ub"), tactic=tactic,
        workspace=None if workspace is None else workspace.memory, stream=stream,
    )


def fp8_quantize(
    x: Any, q: Any, scales: Any, *, variant: str = "token", recipe: str = "vllm", fnuz: bool = False, scale: Any = None,
    scale_ub: Any = None, tactic: str = "", workspace: Any = None, stream: Any = None,
) -> str:
    """Quantise x to fp8 on its device and return the kernel's name. Does not wait and does not allocate.

    x: torch tensor [M, K], bfloat16, float16 or float32, rows of neighbouring elements, any stride between rows. q: [P, K] of a
    one-byte dtype, P >= M; rows from M on become 0 (variants static, tensor and token). scales float32, decode direction: token
    [M, 1], block [M, K / 128], tile [M / 128, K / 128], tensor [1], None for static. `scale` [1]: the scale of `static`.
    `scale_ub` [1]: bound of the largest magnitude, per token. `fnuz`: codes of e4m3fnuz. `workspace`: 16 bytes of scratch on
    the device, for `tensor`. `tactic`: a name of `tactics`, empty: as dispatched. `stream`: a torch stream, None:
    the current one. Recipes by variant: docs/contract.md, QNT-10. Raises ValueError for other arguments, before anything runs.
    """
    name = _DTYPES.get(str(x.dtype))
    if name is None:
        raise ValueError(f"fp8_quantize: got x of {x.dtype}, expected bfloat16, float16 or float32")
    if recipe not in RECIPES:
        raise ValueError(f"fp8_quantize: got recipe {recipe!r}, expected one of {', '.join(RECIPES)}")
    m, k = (int(size) for size in x.shape)
    tokens = {"x": name, "format": "fnuz" if fnuz else "fn", "recipe": recipe, "ub": "no_ub" if scale_ub is None else "ub"}
    problem = Problem("fp8_quantize", variant, (("m", m), ("k", k), ("p", int(q.shape[0]))), tuple(tokens.items()))
    shapes = {"static": None, "tensor": (1,), "token": (m, 1), "block": (m, k // 128), "tile": (m // 128, k // 128)}
    if variant not in shapes:
        raise ValueError(f"fp8_quantize: got variant {variant!r}, expected one of {', '.join(shapes)}")
    if broken := refusal(problem):
        raise ValueError(f"fp8_quantize: {broken}")
    found = None if scales is None else tuple(scales.shape)
    if found != shapes[variant] or (scales is not None and str(scales.dtype) != "torch.float32"):
        raise ValueError(f"fp8_quantize: got scales {found}, expected float32 {shapes[variant]} for {variant}, M = {m}, K = {k}")
    if q.shape[0] < m or q.shape[1] != k or q.element_size() != 1:
        raise ValueError(f"fp8_quantize: got q {q.dtype} {tuple(q.shape)}, expected one byte per code and at least ({m}, {k})")
    for what, given, needs in (("scale [1]", scale, "static"), ("16 bytes of workspace", workspace, "tensor")):
        if variant == needs and given is None:
            raise ValueError(f"fp8_quantize: {variant} got None, expected {what}")
    for what, given in (("scale", scale), ("scale_ub", scale_ub)):
        if given is not None and (given.numel() != 1 or str(given.dtype) != "torch.float32"):
            raise ValueError(f"fp8_quantize: got {what} {given.dtype} {tuple(given.shape)}, expected one float32")
    if workspace is not None:
        size = workspace.numel() * workspace.element_size()
        if size < _SCRATCH or not workspace.is_contiguous() or workspace.data_ptr() % _SCRATCH:
            raise ValueError(
                f"fp8_quantize: got a workspace of {size} bytes, expected {_SCRATCH} or more, contiguous, at a multiple of 16"
            )
    if tactic and tactic not in tactics(problem):
        raise ValueError(f"fp8_quantize: got tactic {tactic!r}, expected one of {', '.join(tactics(problem))}, or none")
    same_device("fp8_quantize", q, x=x, scales=scales, scale=scale, scale_ub=scale_ub, workspace=workspace)
    return _quantize(
        x, q, scales, name, variant=variant, recipe=recipe, fnuz=fnuz, scale=scale, scale_ub=scale_ub, tactic=tactic,
        workspace=workspace, stream=stream,
    )


def _address(tensor: Any) -> int | None:
    return None if tensor is None else int(tensor.data_ptr())


def _quantize(
    x: Any, q: Any, scales: Any, name: str, *, variant: str, recipe: str, fnuz: bool, scale: Any, scale_ub: Any, tactic: str,
    workspace: Any, stream: Any,
) -> str:
    m, k = (int(size) for size in x.shape)
    for what, tensor in (("x", x), ("q", q), *((("scales", scales),) if variant in ("block", "tile") else ())):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1 and tensor.numel():
            raise ValueError(f"fp8_quantize: got {what} with {tensor.stride(1)} elements from column to column, expected 1")
    head = (x.data_ptr(), x.stride(0), _FORMATS[name], q.data_ptr(), q.stride(0))
    number, p = RECIPES[recipe], int(q.shape[0])
    arguments: tuple[Any, ...]
    if variant == "token":
        threads = 0 if tactic == "two_pass" else threads_of(m, k, name)
        arguments = (*head, scales.data_ptr(), scales.stride(0), _address(scale_ub), m, k, p, number, fnuz, threads)
        call = _TOKEN
    elif variant in ("static", "tensor"):
        found = (_address(scales), None, _address(workspace)) if variant == "tensor" else (None, _address(scale), None)
        arguments, call = (*head, *found, m, k, p, number, fnuz), _ONE_SCALE
    elif variant == "block":
        arguments, call = (*head, scales.data_ptr(), scales.stride(0), m, k, number, fnuz), _BLOCK
    else:
        arguments, call = (*head, scales.data_ptr(), scales.stride(0), m, k, fnuz), _TILE
    check("fp8_quantize", q)
    launch("fp8_quantize", entry(_SOURCE, *call, FLAGS), q, stream, *arguments)
    kernel = {"token": f"token_{'registers' if variant == 'token' and threads else 'two_pass'}", "static": "one_scale",
              "tensor": "one_scale"}.get(variant, variant)
    return f"fp8_quantize_{kernel}"
