"""The encodings on Hopper: which kernel of encodings.cu takes a problem, and the same for torch tensors without a problem.

Decides: the call of each op and variant; rows may lie any distance apart, and are read by 16 bytes where they are aligned to
that. Nothing waits, nothing runs on the host but the call, and places are counted in 64 bits.
Refuses: what the contract does not have, shapes that do not fit each other, and rows whose elements are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowbit.conformance.backend import EXACT_BITS, Declaration, Problem, TensorView

from ..domain import refusal
from .build import Unit
from .device import check, same_device
from .launch import entry, launch

__all__ = [
    "FLAGS", "LAYOUTS", "OPS", "UNITS", "declaration", "expand_scales", "fp8_convert_fnuz", "fp8_requantize", "int4_encode",
    "int4_pack", "prepare", "run", "scale_fold", "scale_pack_e4m3", "stage", "tactics", "uint4b8_to_int4", "unsupported",
    "workspace",
]

OPS = ("int4_encode", "int4_pack", "scale_pack_e4m3", "scale_fold", "fp8_convert_fnuz", "fp8_requantize")
FLAGS = ("-fmad=false",)
_SOURCE = "encodings.cu"
UNITS: tuple[Unit, ...] = ((_SOURCE, {}, FLAGS),)

LAYOUTS = {
    "gptq": (1, 0), "k_major": (0, 0), "along_n": (2, 0), "awq": (3, 0), "nibble": (4, 0), "compressed_tensors": (0, 8),
    "zeros_v1": (2, 15), "zeros_v2": (2, 0),
}
"""Variant of int4_pack -> (layout of encodings.cu, what is added to each code modulo 16)."""

_UNIFIED, _OFFSET, _FNUZ, _COPY = range(4)  # the byte maps of encodings.cu

_MAP = ("lowbit_map_codes", "pqpqqqip")
_REORDER = ("lowbit_int4_reorder", "pqqpqqqqqp")
_PACK = ("lowbit_int4_pack", "pqpqqqiip")
_PACK_SCALES = ("lowbit_scale_pack_e4m3", "pqpqqp")
_FOLD = ("lowbit_scale_fold", "pqpqpqqqip")
_REQUANTIZE = ("lowbit_fp8_requantize", "pqpqpppqqiiip")
_EXPAND = ("lowbit_expand_scales", "pppqqip")
_CONVERT = ("lowbit_convert_scales", "pqpqqip")


def unsupported(problem: Problem) -> str | None:
    """None for every problem of the contract's domain; otherwise the rule that it breaks."""
    return refusal(problem)


def tactics(problem: Problem) -> tuple[str, ...]:
    """One for every problem."""
    return ("default",)


def declaration(problem: Problem, tactic: str) -> Declaration:
    """Every bit is fixed by the contract."""
    return EXACT_BITS


def workspace(problem: Problem, tactic: str) -> int:
    """No scratch memory."""
    return 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> None:
    """There are no constants."""


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> dict[str, Any]:
    """The tensors as they are; `words` of int4_pack are changed in place."""
    return {name: view.memory for name, view in activations.items()}


def run(
    problem: Problem, tactic: str, state: None, inputs: Mapping[str, Any], outputs: Mapping[str, TensorView],
    workspace: TensorView | None, stream: Any,
) -> str:
    """Launch on the stream and return the name of the kernel."""
    return _RUNS[problem.op](problem, dict(inputs), {name: view.memory for name, view in outputs.items()}, stream)


def _shaped(op: str, what: str, tensor: Any, shape: tuple[int, ...], size: int) -> None:
    """Raises ValueError where a tensor has another shape or element size, or elements of a row lie apart."""
    apart = tensor.stride(-1) if tensor.shape[-1] > 1 and tensor.numel() else 1
    if tuple(tensor.shape) != shape or tensor.element_size() != size or apart != 1:
        raise ValueError(
            f"{op}: got {what} {tensor.dtype} {tuple(tensor.shape)} with {apart} elements from column to column, expected {size} "
            f"byte(s) per element, {shape} and 1"
        )


def _call(op: str, function: tuple[str, str], like: Any, stream: Any, *arguments: Any) -> None:
    check(op, like)
    launch(op, entry(_SOURCE, *function, FLAGS), like, stream, *arguments)


def _rows(tensor: Any) -> tuple[int, int]:
    """Address, and elements from row to row."""
    return int(tensor.data_ptr()), int(tensor.stride(0))


def int4_encode(q: Any, encoded: Any, *, stream: Any = None) -> str:
    """The unified code of each two's complement nibble (v in 1..7 becomes 8 - v), in the register order of the e4m3 MMA where
    the codes come in words. Returns the kernel's name; does not wait.

    q uint8 [N, K/2], even k low: mapped where they stand, encoded has the same shape (ENC-12; N K a multiple of 32).
    q int32 [N, K/8] or [E, N, K/8], k = 8j + i in bits 4i to 4i + 3: encoded [K/8, N] or [E, K/8, N] (ENC-13, ENC-14; N a
    multiple of 16, K of 128, of 256 for several matrices). Raises ValueError for other shapes.
    """
    op, shape = "int4_encode", tuple(int(size) for size in q.shape)
    if q.element_size() == 1 and len(shape) == 2:
        _shaped(op, "q", q, shape, 1)
        _shaped(op, "encoded", encoded, shape, 1)
        if shape[0] * shape[1] % 16:
            raise ValueError(f"int4_encode: got {shape[0]} x {2 * shape[1]} codes, expected a multiple of 32")
        same_device(op, encoded, q=q)
        _call(op, _MAP, encoded, stream, *_rows(q), *_rows(encoded), *shape, _UNIFIED)
        return "map_codes"
    if len(shape) not in (2, 3) or q.element_size() != 4:
        raise ValueError(f"int4_encode: got q {q.dtype} {shape}, expected uint8 [N, K/2], int32 [N, K/8] or int32 [E, N, K/8]")
    *stack, n, words = shape
    step = 256 if stack else 128
    if n % 16 or words * 8 % step:
        raise ValueError(f"int4_encode: got N = {n}, K = {8 * words}, expected multiples of 16 and {step}")
    _shaped(op, "q", q, shape, 4)
    _shaped(op, "encoded", encoded, (*stack, words, n), 4)
    same_device(op, encoded, q=q)
    places = [place for t in (q, encoded) for place in (t.data_ptr(), t.stride(-2), t.stride(0) if stack else 0)]
    _call(op, _REORDER, encoded, stream, *places, stack[0] if stack else 1, n, 8 * words)
    return "int4_reorder"


def int4_pack(q: Any, packed: Any, *, layout: str, stream: Any = None) -> str:
    """Codes [N, K], one per byte (int8 values or uint4), to the storage `layout`, a variant of the op int4_pack; the low four
    bits count. Returns the kernel's name; does not wait. `packed`: int32 or uint8 of the layout's shape (ENC-2 to ENC-8).
    Raises ValueError for other shapes."""
    if layout not in LAYOUTS:
        raise ValueError(f"int4_pack: got layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    n, k = (int(size) for size in q.shape)
    shapes = {
        "gptq": (k // 8, n), "k_major": (n, k // 8), "along_n": (k, n // 8), "awq": (k, n // 8), "nibble": (n, k // 2),
        "compressed_tensors": (n, -(-k // 8)), "zeros_v1": (k, n // 8), "zeros_v2": (k, n // 8),
    }
    size, step = {"nibble": (k, 2), "gptq": (k, 8), "k_major": (k, 8), "compressed_tensors": (k, 1)}.get(layout, (n, 8))
    if size % step:
        raise ValueError(f"int4_pack: got codes {(n, k)} for {layout}, expected a multiple of {step} along the packed axis")
    _shaped("int4_pack", "q", q, (n, k), 1)
    _shaped("int4_pack", "packed", packed, shapes[layout], 1 if layout == "nibble" else 4)
    same_device("int4_pack", packed, q=q)
    _call("int4_pack", _PACK, packed, stream, *_rows(q), *_rows(packed), n, k, *LAYOUTS[layout])
    return "int4_pack"


def uint4b8_to_int4(words: Any, *, stream: Any = None) -> str:
    """int32 words [N, K/8] of value + 8 to two's complement, or back, in place (ENC-9). Returns the kernel's name."""
    n, k = (int(size) for size in words.shape)
    _shaped("int4_pack", "words", words, (n, k), 4)
    place = (int(words.data_ptr()), 4 * int(words.stride(0)))
    _call("int4_pack", _MAP, words, stream, *place, *place, n, 4 * k, _OFFSET)
    return "map_codes"


def scale_pack_e4m3(scales: Any, packed: Any, *, stream: Any = None) -> str:
    """e4m3fn scales [N] to their products with -8, -7, .., -1 [N, 8], each rounded once (ENC-15, ENC-16). Returns the kernel's
    name. Raises ValueError for other shapes."""
    n = int(scales.shape[0])
    if tuple(scales.shape) != (n,) or scales.element_size() != 1 or n == 0:
        raise ValueError(f"scale_pack_e4m3: got scales {scales.dtype} {tuple(scales.shape)}, expected bytes [N], N > 0")
    _shaped("scale_pack_e4m3", "packed", packed, (n, 8), 1)
    same_device("scale_pack_e4m3", packed, scales=scales)
    _call("scale_pack_e4m3", _PACK_SCALES, packed, stream, *_rows(scales), *_rows(packed), n)
    return "scale_pack_e4m3"


def scale_fold(scales: Any, group_scale: Any, channel_scale: Any, *, recipe: str = "vllm", stream: Any = None) -> str:
    """bf16 group scales [N, G] to e4m3fn group scales [N, G] of at most 56 and binary32 channel scales [N, 1], all in decode
    direction (ENC-19 to ENC-21). `recipe`: vllm or vllm_native. Returns the kernel's name. Raises ValueError for other shapes."""
    if recipe not in ("vllm", "vllm_native"):
        raise ValueError(f"scale_fold: got recipe {recipe!r}, expected vllm or vllm_native")
    n, groups = (int(size) for size in scales.shape)
    for what, tensor, shape, size in (
        ("scales", scales, (n, groups), 2), ("group_scale", group_scale, (n, groups), 1),
        ("channel_scale", channel_scale, (n, 1), 4),
    ):
        _shaped("scale_fold", what, tensor, shape, size)
    same_device("scale_fold", channel_scale, scales=scales, group_scale=group_scale)
    places = (*_rows(scales), *_rows(group_scale), *_rows(channel_scale))
    _call("scale_fold", _FOLD, channel_scale, stream, *places, n, groups, recipe == "vllm_native")
    return "scale_fold"


def fp8_convert_fnuz(
    w: Any, w_out: Any, weight_scale: Any, weight_scale_out: Any, input_scale: Any = None, input_scale_out: Any = None, *,
    fnuz: bool = True, stream: Any = None,
) -> str:
    """Bytes [N, K] of e4m3fn and their binary32 scales ([1] or [N, 1], and [1] for static inputs) as hardware with e4m3fnuz needs
    them: 0x80 becomes 0, scales are doubled (ENC-22 to ENC-24); unchanged without `fnuz`. Returns the kernel's name."""
    shape = tuple(int(size) for size in w.shape)
    _shaped("fp8_convert_fnuz", "w_out", w_out, shape, 1)
    _shaped("fp8_convert_fnuz", "w", w, shape, 1)
    same_device(
        "fp8_convert_fnuz", w_out, w=w, weight_scale=weight_scale, weight_scale_out=weight_scale_out, input_scale=input_scale,
        input_scale_out=input_scale_out,
    )
    _call("fp8_convert_fnuz", _MAP, w_out, stream, *_rows(w), *_rows(w_out), *shape, _FNUZ if fnuz else _COPY)
    for before, after in ((weight_scale, weight_scale_out), (input_scale, input_scale_out)):
        if before is not None:
            _call("fp8_convert_fnuz", _CONVERT, after, stream, *_rows(before), *_rows(after), int(before.shape[0]), fnuz)
    return "map_codes"


def fp8_requantize(
    w: Any, scales: Any, widths: Any, w_out: Any, scale: Any, *, through_half: bool = False, fnuz: bool = False,
    stream: Any = None,
) -> str:
    """fp8 weights [N, K] of S shards, one below the other, brought to the largest of their scales (ENC-25 to ENC-27).

    scales binary32 [S], decode direction; widths int32 [S], rows of each shard; w_out [N, K]; scale [1]. `through_half`: the
    decoded weights pass through binary16. Returns the kernel's name. Raises ValueError for other shapes.
    """
    shape, shards = tuple(int(size) for size in w.shape), int(scales.shape[0])
    for what, tensor, wanted, size in (
        ("w", w, shape, 1), ("w_out", w_out, shape, 1), ("scales", scales, (shards,), 4), ("widths", widths, (shards,), 4),
        ("scale", scale, (1,), 4),
    ):
        _shaped("fp8_requantize", what, tensor, wanted, size)
    same_device("fp8_requantize", w_out, w=w, scales=scales, widths=widths, scale=scale)
    addresses = (int(tensor.data_ptr()) for tensor in (scales, widths, scale))
    _call("fp8_requantize", _REQUANTIZE, w_out, stream, *_rows(w), *_rows(w_out), *addresses, *shape, shards, through_half, fnuz)
    return "fp8_requantize"


def expand_scales(scales: Any, widths: Any, channel_scale: Any, *, stream: Any = None) -> str:
    """Scales of shards [S] repeated over the rows of each, widths int32 [S], to binary32 [N, 1] (ENC-28)."""
    n, shards = int(channel_scale.shape[0]), int(scales.shape[0])
    for what, tensor, wanted in (
        ("scales", scales, (shards,)), ("widths", widths, (shards,)), ("channel_scale", channel_scale, (n, 1)),
    ):
        _shaped("fp8_requantize", what, tensor, wanted, 4)
    same_device("fp8_requantize", channel_scale, scales=scales, widths=widths)
    places = (int(scales.data_ptr()), int(widths.data_ptr()), *_rows(channel_scale))
    _call("fp8_requantize", _EXPAND, channel_scale, stream, *places, n, shards)
    return "expand_scales"


Tensors = dict[str, Any]


def _run_encode(problem: Problem, given: Tensors, out: Tensors, stream: Any) -> str:
    return int4_encode(given["q"], out["encoded"], stream=stream)


def _run_pack(problem: Problem, given: Tensors, out: Tensors, stream: Any) -> str:
    if problem.variant == "b8":
        return uint4b8_to_int4(given["words"], stream=stream)
    return int4_pack(given["q"], out["packed"], layout=problem.variant, stream=stream)


def _run_pack_scales(problem: Problem, given: Tensors, out: Tensors, stream: Any) -> str:
    return scale_pack_e4m3(given["scales"], out["packed"], stream=stream)


def _run_fold(problem: Problem, given: Tensors, out: Tensors, stream: Any) -> str:
    return scale_fold(given["scales"], out["group_scale"], out["channel_scale"], recipe=problem.option("recipe"), stream=stream)


def _run_convert(problem: Problem, given: Tensors, out: Tensors, stream: Any) -> str:
    return fp8_convert_fnuz(
        given["w"], out["w_out"], given["weight_scale"], out["weight_scale_out"], given.get("input_scale"),
        out.get("input_scale_out"), fnuz=problem.option("hardware") == "fnuz", stream=stream,
    )


def _run_requantize(problem: Problem, given: Tensors, out: Tensors, stream: Any) -> str:
    if problem.variant == "channel":
        return expand_scales(given["scales"], given["widths"], out["channel_scale"], stream=stream)
    return fp8_requantize(
        given["w"], given["scales"], given["widths"], out["w_out"], out["scale"], through_half=problem.variant == "max_scale_f16",
        fnuz=problem.option("format") == "fnuz", stream=stream,
    )


_RUNS: dict[str, Callable[[Problem, Tensors, Tensors, Any], str]] = {
    "int4_encode": _run_encode, "int4_pack": _run_pack, "scale_pack_e4m3": _run_pack_scales, "scale_fold": _run_fold,
    "fp8_convert_fnuz": _run_convert, "fp8_requantize": _run_requantize,
}
