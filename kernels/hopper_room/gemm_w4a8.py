"""gemm_w4a8_fp8 and gemm_w4a8_fp8_grouped on Hopper: instances of gemm_w4a8.cu, packed weights, what is declared, which one runs.

Decides: the tactics (`TACTICS`: tiles and parts of K; those of gemm_w4a8_f16.py beside them), which of them take a problem, which
one a shape gets (the rows of gemm_w4a8_tactics.json, read off the sweep that the file keeps), scratch memory, and the launch.
Refuses: what the contract does not have, one sentence each, tactics whose parts of K are not whole blocks of 128, and to deal out
tiles whose number only the device knows.
Kernels compile at the first launch; loading this module needs neither a compiler nor torch.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    E4M3FN,
    F16,
    Claim,
    Contraction,
    Declaration,
    Join,
    Problem,
    Step,
    TensorView,
    add,
    cast,
    mul,
)

from ..domain import refusal
from . import gemm_w4a8_f16 as half_precision
from .build import Unit, library
from .device import check, processors, same_device
from .gemm_w4a8_schedule import stream_bytes, stream_cuts
from .launch import entry, launch

__all__ = [
    "OPS", "TACTICS", "UNITS", "PackedWeights", "Tactic", "declaration", "defines", "dispatch", "gemm_w4a8_fp8", "pack_weights",
    "packed_bytes", "prepare", "run", "stage", "stages", "tactics", "takes", "unsupported", "workspace", "workspace_bytes",
]

OPS = ("gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped")
_SOURCE, _PACK_SOURCE = "gemm_w4a8.cu", "gemm_w4a8_pack.cu"
_PACK = ("lowbit_pack_w4a8", "pppqqqiiip")
_GEMM_SIGNATURE = (
    *(ctypes.c_void_p, ctypes.c_longlong), *(ctypes.c_void_p,) * 5, *(ctypes.c_longlong, ctypes.c_void_p),
    *(ctypes.c_longlong,) * 4, *(ctypes.c_int, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_void_p),
)
_BLOCK = 128  # k of a packed block, 64 rows high
_SHARED = 232448  # bytes of shared memory of a block
_LARGEST = (1 << 31) - 257  # of a size: it and the end of a tile behind it are counted in 32 bits
_GROUPS = (64, 128)
_CODES = ("torch.uint8", "torch.float8_e4m3fn")
_OUT = {"bf16": BF16, "f16": F16}


class Tactic(NamedTuple):
    """One tile: 64 `bands` rows of W by `tokens` rows of A. K is cut between `splits` blocks of a cluster, and once more between
    `halves` warpgroups per band. `stream`: not 0 where blocks of 128 k of the tiles that do not come out even are dealt out among
    all workers; a worker is a cluster of so many blocks of threads with neighbouring rows of W, which load A once for all."""

    tokens: int
    bands: int
    halves: int = 1
    splits: int = 1
    stream: int = 0

    @property
    def name(self) -> str:
        """Rows x tokens of a block, then parts of K, between blocks x within a block, or s and the blocks of a worker."""
        return f"{64 * self.bands}x{self.tokens}_" + (f"s{self.stream}" if self.stream else f"k{self.splits}x{self.halves}")

    @property
    def parts(self) -> int:
        """Parts of K that are summed on their own, where they are the same for every tile."""
        return self.splits * self.halves


TACTICS: dict[str, Tactic] = {
    tactic.name: tactic
    for tactic in (
        Tactic(16, 2), Tactic(16, 2, halves=2), Tactic(16, 2, splits=2), Tactic(32, 2), Tactic(32, 2, halves=2),
        Tactic(32, 2, splits=2), Tactic(64, 2), Tactic(64, 2, halves=2), Tactic(128, 2), Tactic(128, 3), Tactic(256, 2),
        Tactic(256, 2, splits=2), Tactic(8, 2, stream=1), Tactic(8, 4, stream=1), Tactic(16, 2, stream=1),
        Tactic(16, 4, stream=1), Tactic(32, 2, stream=1), Tactic(32, 4, stream=1), Tactic(64, 2, stream=1),
        Tactic(64, 4, stream=1), Tactic(64, 4, stream=2), Tactic(128, 2, stream=1), Tactic(128, 2, stream=2),
        Tactic(128, 4, stream=1), Tactic(128, 4, stream=2), Tactic(256, 2, stream=1), Tactic(256, 2, stream=2),
    )
}
"""Every instance of gemm_w4a8.cu by name."""


def _exact(variant: str) -> bool:
    if variant not in ("folded", "exact"):
        raise ValueError(f"gemm_w4a8_fp8: got variant {variant!r}, expected folded or exact")
    return variant == "exact"


def stages(tactic: Tactic, variant: str, group: int) -> int:
    """Stages that fit the shared memory of a block beside tables, outputs, sums of other parts and barriers, as the source lays
    them out."""
    tokens, bands, halves = tactic.tokens, tactic.bands, tactic.halves
    stage = halves * (128 * tokens + bands * (4096 + 64 * (128 // group))) + 16
    epilogue = bands * (128 * max(16, min(32, tokens)) + 4 * tokens + 4)
    fixed = (512 if _exact(variant) else 4096) + 127 + -(-epilogue // 128) * 128 + 16 * bands
    fixed += bands * (tactic.parts - 1) * 2048 * -(-(tokens // 8) // tactic.splits)
    return min(16, (_SHARED - fixed) // stage)


def defines(tactic: Tactic, variant: str, group: int) -> dict[str, str | int]:
    """Macros of one instance."""
    return {
        "EXACT": int(_exact(variant)), "GROUP": group, "TOKENS": tactic.tokens, "BANDS": tactic.bands, "HALVES": tactic.halves,
        "SPLITS": tactic.splits, "CLUSTER": max(1, tactic.stream), "STREAM": int(tactic.stream > 0),
        "STAGES": stages(tactic, variant, group),
        "KERNEL": f"gemm_w4a8_{variant}_{tactic.name}_g{group}",
    }


def _has(tactic: Tactic, variant: str) -> bool:
    """`exact` keeps two sets of sums: tiles for which they would not fit the registers are `folded` alone."""
    small = tactic.tokens <= (128 if tactic.halves == 1 else 32)
    return not _exact(variant) or (small and tactic.bands * tactic.tokens <= 256)


UNITS: tuple[Unit, ...] = (
    (_PACK_SOURCE, {}, ()),
    *(
        (_SOURCE, defines(tactic, variant, group), ())
        for variant in ("folded", "exact") for group in _GROUPS for tactic in TACTICS.values() if _has(tactic, variant)
    ),
    *half_precision.UNITS,
)
"""All that this module can ask the compiler for."""


def takes(name: str, variant: str, m: int, k: int, group: int, grouped: bool) -> bool:
    """Whether the instance exists for M rows of A, the parts of K that it sums (whole blocks of 128) are those that a declaration
    of so many splits means (whole groups for `exact`, whole instructions of 32 for `folded`), none of them empty, and tiles are
    dealt out only where their number is known: not `grouped`."""
    exact = _exact(variant)
    if name in half_precision.TACTICS:
        return half_precision.takes(name, OPS[grouped], variant, m)
    tactic, unit = TACTICS[name], group if exact else 32
    part = -(-k // (_BLOCK * tactic.parts)) * _BLOCK
    said = -(-k // (unit * tactic.parts)) * unit
    whole = tactic.parts == 1 or (part == said and (tactic.parts - 1) * part < k)
    return _has(tactic, variant) and whole and not (grouped and tactic.stream)


def _takers(variant: str, m: int, k: int, group: int, grouped: bool) -> tuple[str, ...]:
    return tuple(name for name in (*TACTICS, *half_precision.TACTICS) if takes(name, variant, m, k, group, grouped))


@cache
def _table() -> tuple[Mapping[str, Any], ...]:
    text = (Path(__file__).parent / "gemm_w4a8_tactics.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["rows"])


def dispatch(variant: str, m: int, n: int, k: int, group: int, grouped: bool = False) -> str:
    """The tactic of a shape: the first row of the table whose variant is this one, whose bounds hold m, n and k, and whose tactic
    takes the problem. m: rows that a tile meets, M or with experts their mean."""
    for row in _table():
        bounded = m <= row["m"] and n <= row["n"] and k <= row["k"]
        if row["variant"] == variant and bounded and takes(row["tactic"], variant, m, k, group, grouped):
            return str(row["tactic"])
    raise ValueError(
        f"gemm_w4a8_fp8: got {variant} with M = {m}, N = {n}, K = {k}, expected a row of gemm_w4a8_tactics.json that "
        "bounds it; add a last row without bounds"
    )


def _tokens(problem: Problem) -> int:
    """Rows that a tile meets: M, or the mean of the experts that may have rows."""
    m = problem.dim("m")
    return int(m if problem.op == OPS[0] else -(-m // problem.dim("e")))


def unsupported(problem: Problem) -> str | None:
    """None for every problem of the contract's domain with sizes of at most 2^31 - 257; otherwise one sentence."""
    if broken := refusal(problem):
        return broken
    large = [letter.upper() for letter, size in problem.dims if size > _LARGEST]
    return f"{problem}: {', '.join(large)} must be at most 2^31 - 257" if large else None


def tactics(problem: Problem) -> tuple[str, ...]:
    """The dispatch's choice, then every other tactic that takes the problem."""
    variant, k, group, grouped = problem.variant, problem.dim("k"), problem.dim("g"), problem.op == OPS[1]
    first = dispatch(variant, _tokens(problem), problem.dim("n"), k, group, grouped)
    takers = _takers(variant, problem.dim("m"), k, group, grouped)
    return (first, *(name for name in takers if name != first))


def declaration(problem: Problem, tactic: str, multiprocessors: int | None = None) -> Declaration:
    """folded: instructions of 32 k in ascending order, one accumulator per part of K. exact: one per group, multiplied by its
    scale and added to an f32 total by one FMA; codes of int4 are e4m3 exactly. Parts are added in ascending order in f32; then
    token scale, channel scale (one FMA with the bias), one cast. The bits depend on the parts of K alone, not on tiles, M or
    other rows.

    Where blocks of K are dealt out, the parts of a tile are those that the numbers of tiles and of multiprocessors make, some
    whole blocks of 128 each: cuts are declared tile by tile, for a device of so many `multiprocessors` (None: the one that is at
    hand). Then a row's bits depend on M."""
    each = TACTICS.get(tactic)
    count = processors() if multiprocessors is None else multiprocessors
    if each is None:
        return half_precision.declaration(problem, tactic, count)
    bias, parts, path = problem.option("bias") == "bias", each.parts, DATAPATHS["hopper_wgmma_fp8"]
    m, n, k = (problem.dim(letter) for letter in "mnk")
    cuts = stream_cuts(each.tokens, each.bands, each.stream, m, n, k, count) if each.stream else ()
    if _exact(problem.variant):
        steps: tuple[Step, ...] = (mul("group_scale", join=Join.FUSED),)
        main = Contraction(
            ("a", "w"), path, segment=problem.dim("g"), steps=steps, splits=parts, conversion=E4M3FN, cuts=cuts
        )
    else:
        main = Contraction(("a", "w"), path, splits=parts, cuts=cuts)
    tail = (add("bias"),) if bias else ()
    channel = mul("channel_scale", join=Join.FUSED if bias else Join.SEPARATE)
    out = cast(_OUT[problem.option("out")])
    return Declaration((main, mul("token_scale"), channel, *tail, out), Claim.BIT_EXACT, batch_invariant=not each.stream)


def workspace_bytes(tactic: str, m: int, n: int, k: int) -> int:
    """Bytes of scratch memory that a tactic of either module may need for a product of these sizes, on any device of compute
    capability 9.0; at a multiple of 16, of any content, not in use by another stream meanwhile."""
    if tactic in half_precision.TACTICS:
        return half_precision.workspace(tactic, n, k)
    each = TACTICS[tactic]
    return stream_bytes(each.tokens, each.bands, each.stream, m, n, k) if each.stream and m else 0


def workspace(problem: Problem, tactic: str) -> int:
    """Bytes: sums and counters of tiles that several workers share. None where parts of K are added through shared memory, of a
    cluster where they lie in several blocks."""
    return workspace_bytes(tactic, problem.dim("m"), problem.dim("n"), problem.dim("k"))


def packed_bytes(experts: int, n: int, k: int, group: int) -> int:
    """Bytes of packed weights and scales: blocks of 64 rows by 128 k, 4,096 bytes of codes and 64 or 128 of scales."""
    return experts * -(-n // 64) * -(-k // _BLOCK) * (4096 + 64 * (_BLOCK // group))


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeights:
    """What `pack_weights` makes: bytes in the kernel's order, and the shape that they stand for. Every tactic of both variants
    reads them."""

    memory: Any  # torch uint8
    experts: int
    n: int
    k: int
    group: int


def _torch() -> Any:
    return import_module("torch")


def _check_sizes(name: str, experts: int, n: int, k: int, group: int) -> None:
    """Raises ValueError for weights that no kernel multiplies: a store writes eight columns of D."""
    if min(experts, n, k) < 1 or n % 8 or group not in _GROUPS or k % group or max(experts, n, k) > _LARGEST:
        raise ValueError(
            f"{name}: got {experts} expert(s), N = {n}, K = {k} and groups of {group}, expected positive sizes of at most "
            "2^31 - 257, N a multiple of 8, groups of 64 or 128, and K a multiple of them"
        )


def _check_memory(name: str, memory: Any, size: int) -> None:
    """Raises ValueError for memory that cannot be packed weights of `size` bytes."""
    plain = memory.is_contiguous() and str(memory.dtype) == "torch.uint8"
    if memory.numel() != size or not plain or memory.data_ptr() % 16:
        raise ValueError(
            f"{name}: got packed weights of {memory.numel()} elements of {memory.dtype}, expected {size} contiguous of uint8 "
            "that start at a multiple of 16 bytes"
        )


def pack_weights(weights: Any, scales: Any, *, flip: bool = False, out: Any = None, stream: Any = None) -> PackedWeights:
    """Pack weights and group scales on their device. Does not wait; without `out` the result is allocated.

    weights: torch uint8 [N, K] or [E, N, K], a two's complement code in the low four bits of each byte; or int32 [N, K / 8] or
    [E, N, K / 8], bits 4 i to 4 i + 3 of word j holding k = 8 j + i; N a multiple of 8. `flip`: codes are value + 8 (uint4b8).
    scales: e4m3fn codes (uint8 or float8_e4m3fn) [N, K / G] or [E, N, K / G], G 64 or 128. Both contiguous. out: uint8 of
    `packed_bytes` elements, all on one device. Raises ValueError for anything else."""
    torch = _torch()
    if weights.dtype not in (torch.uint8, torch.int32) or weights.dim() not in (2, 3) or weights.dim() != scales.dim():
        raise ValueError(
            f"pack_weights: got weights {weights.dtype} {tuple(weights.shape)} and scales {tuple(scales.shape)}, expected uint8 "
            "codes or int32 words, and scales, of two axes or three (experts first)"
        )
    if not (weights.is_contiguous() and scales.is_contiguous()) or str(scales.dtype) not in _CODES:
        raise ValueError(
            f"pack_weights: got strides {weights.stride()} and {scales.stride()} and {scales.dtype} scales, expected contiguous "
            "tensors and scales of uint8 or float8_e4m3fn; call .contiguous()"
        )
    words = weights.dtype == torch.int32
    experts = int(weights.shape[0]) if weights.dim() == 3 else 1
    n, k = int(weights.shape[-2]), int(weights.shape[-1]) * (8 if words else 1)
    group = k // max(1, int(scales.shape[-1]))
    if tuple(scales.shape[:-1]) != tuple(weights.shape[:-1]) or group not in _GROUPS or group * int(scales.shape[-1]) != k:
        raise ValueError(
            f"pack_weights: got scales {tuple(scales.shape)} for N = {n}, K = {k}, expected one per 64 or 128 of K in each row"
        )
    _check_sizes("pack_weights", experts, n, k, group)
    size = packed_bytes(experts, n, k, group)
    memory = torch.empty(size, dtype=torch.uint8, device=weights.device) if out is None else out
    _check_memory("pack_weights", memory, size)
    same_device("pack_weights", memory, weights=weights, scales=scales)
    check("pack_weights", memory)
    flipped = -0x77777778 if flip else 0  # 0x88888888 as a signed int
    pointers = (weights.data_ptr(), scales.data_ptr(), memory.data_ptr())
    launch("pack_weights", entry(_PACK_SOURCE, *_PACK), memory, stream, *pointers, n, k, experts, group, int(words), flipped)
    return PackedWeights(memory, experts, n, k, group)


@cache
def _kernel(name: str, variant: str, group: int) -> Callable[..., int]:
    """The compiled instance. Raises BuildError."""
    function: Any = library(_SOURCE, defines=defines(TACTICS[name], variant, group)).lowbit_gemm_w4a8
    function.argtypes, function.restype = _GEMM_SIGNATURE, ctypes.c_int
    return function  # type: ignore[no-any-return]


def _aligned(a: Any) -> Any:
    """A [M, K] as tensor maps take it: neighbouring elements, rows and start at multiples of 16 bytes; copied where it is not."""
    plain = a.contiguous() if a.stride(1) != 1 or a.stride(0) % 16 or (a.shape[0] > 1 and a.stride(0) < a.shape[1]) else a
    return plain.clone() if plain.data_ptr() % 16 else plain


def gemm_w4a8_fp8(
    a: Any, weights: PackedWeights, token_scale: Any, channel_scale: Any, out: Any, *, bias: Any = None, counts: Any = None,
    variant: str = "folded", tactic: str = "", workspace: Any = None, stream: Any = None,
) -> str:
    """D = cast(channel (token A W^T) + bias) on the device; returns the kernel's name. Does not wait.

    a: e4m3fn codes [M, K] (uint8 or float8_e4m3fn), neighbouring elements, rows that start at multiples of 16 bytes. token_scale
    float32 [M], channel_scale float32 [N] or [E, N], bias as `out`, [N] or [E, N]. out: bfloat16 or float16 [M, N], rows of
    neighbouring elements, any stride between rows. counts: int32 [E] on the device, rows of A per expert in order, M together;
    it is never read on the host. All lie on one device. `variant`: folded (RNE_e4m3(q s) is multiplied) or exact (the scale
    multiplies the sum of its group). `tactic`: a name of `TACTICS` or of gemm_w4a8_f16.py, empty: as dispatched. `workspace`:
    uint8 of `workspace_bytes` or more, None: allocated where the tactic needs any, by torch, for the stream. `stream`: a torch
    stream, None: the current one. Raises ValueError before anything runs.

    A tactic by name gives a row the same bits whatever M is, unless it deals out blocks of K by M (`_s1`, `_s2`). As dispatched
    the bits of a row depend on M, in both variants: the table chooses by M (M / E with experts), and tactics cut K in different
    places. Where bits must not depend on the batch, name a tactic that never cuts K, `_k1x1`.
    """
    torch = _torch()
    n, experts = weights.n, weights.experts
    _check_sizes("gemm_w4a8_fp8", experts, n, weights.k, weights.group)
    _check_memory("gemm_w4a8_fp8", weights.memory, packed_bytes(experts, n, weights.k, weights.group))
    if a.dim() != 2 or a.shape[1] != weights.k or str(a.dtype) not in _CODES or tuple(out.shape) != (a.shape[0], n):
        raise ValueError(
            f"gemm_w4a8_fp8: got a {a.dtype} {tuple(a.shape)} and out {tuple(out.shape)}, expected uint8 or float8_e4m3fn "
            f"[M, K], K = {weights.k}, and out [M, {n}]"
        )
    m, k = (int(size) for size in a.shape)
    if m > _LARGEST:
        raise ValueError(f"gemm_w4a8_fp8: got M = {m}, expected at most 2^31 - 257; cut the rows of a")
    same_device(
        "gemm_w4a8_fp8", out, a=a, weights=weights.memory, token_scale=token_scale, channel_scale=channel_scale, bias=bias,
        counts=counts,
    )
    _exact(variant)
    if out.dtype not in (torch.bfloat16, torch.float16) or (bias is not None and bias.dtype != out.dtype):
        given = "none" if bias is None else str(bias.dtype)
        raise ValueError(f"gemm_w4a8_fp8: got out {out.dtype} and bias {given}, expected bfloat16 or float16, both the same")
    named = ((token_scale, m, "token_scale"), (channel_scale, experts * n, "channel_scale"), (bias, experts * n, "bias"))
    for tensor, size, name in named if bias is not None else named[:2]:
        if tensor.numel() != size or not tensor.is_contiguous() or (name != "bias" and tensor.dtype != torch.float32):
            raise ValueError(
                f"gemm_w4a8_fp8: got {name} {tensor.dtype} {tuple(tensor.shape)}, expected {size} contiguous elements, scales in "
                "float32"
            )
    if counts is None and experts != 1:
        raise ValueError(f"gemm_w4a8_fp8: got {experts} experts and no counts, expected int32 [{experts}] on the device")
    if counts is not None and (counts.dtype != torch.int32 or counts.numel() != experts or not counts.is_contiguous()):
        raise ValueError(f"gemm_w4a8_fp8: got counts {counts.dtype} {tuple(counts.shape)}, expected contiguous int32 [{experts}]")
    close = m > 1 and (a.stride(0) < k or out.stride(0) < n)  # rows that share elements
    if m and (a.stride(1) != 1 or (m > 1 and a.stride(0) % 16) or a.data_ptr() % 16 or out.stride(1) != 1 or close):
        raise ValueError(
            f"gemm_w4a8_fp8: got strides {a.stride()} of a and {out.stride()} of out, expected neighbouring elements in each "
            "row, rows that share none, and rows of a that start at multiples of 16 bytes; copy it"
        )
    grouped = counts is not None
    name = tactic or dispatch(variant, m if experts == 1 else -(-m // experts), n, k, weights.group, grouped)
    takers = _takers(variant, m, k, weights.group, grouped)
    if name not in takers:
        raise ValueError(
            f"gemm_w4a8_fp8: got tactic {name!r}, expected one that takes {variant} with M = {m}, K = {k}: {', '.join(takers)}"
        )
    size = workspace_bytes(name, m, n, k)
    if workspace is not None:
        same_device("gemm_w4a8_fp8", out, workspace=workspace)
        plain = workspace.is_contiguous() and workspace.dtype == torch.uint8
        if workspace.numel() < size or not plain or workspace.data_ptr() % 16:
            raise ValueError(
                f"gemm_w4a8_fp8: got a workspace of {workspace.numel()} elements of {workspace.dtype}, expected {size} or more, "
                "contiguous, of uint8, that start at a multiple of 16 bytes"
            )
    if m:
        check("gemm_w4a8_fp8", out)
    if workspace is None and size and m:
        with torch.cuda.stream(stream):  # whose memory it is; None: the current one
            workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
    half = out.dtype == torch.float16
    return _launch(a, weights, token_scale, channel_scale, bias, out, counts, variant, name, half, workspace, stream)


def _launch(
    a: Any, weights: PackedWeights, token_scale: Any, channel_scale: Any, bias: Any, out: Any, counts: Any, variant: str,
    name: str, half: bool, memory: Any, stream: Any,
) -> str:
    if a.shape[0] == 0:
        return f"gemm_w4a8_{variant}_{name} (nothing to launch)"
    if name in half_precision.TACTICS:
        return half_precision.multiply(a, weights, token_scale, channel_scale, bias, out, memory, half, name, stream)
    stride = max(int(a.stride(0)), weights.k) if a.shape[0] == 1 else int(a.stride(0))
    scratch = (None, 0) if memory is None else (memory.data_ptr(), int(memory.numel()))
    launch(
        "gemm_w4a8_fp8", _kernel(name, variant, weights.group), out, stream, a.data_ptr(), stride, weights.memory.data_ptr(),
        token_scale.data_ptr(), channel_scale.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        int(out.stride(0)), None if counts is None else counts.data_ptr(), int(a.shape[0]), weights.n, weights.k, weights.experts,
        int(half), *scratch,
    )
    return f"gemm_w4a8_{variant}_{name}"


@dataclass(frozen=True, slots=True, eq=False)
class Constants:
    """What `prepare` keeps: packed weights, channel scale float32 [E, N], bias or None."""

    weights: PackedWeights
    channel_scale: Any
    bias: Any


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Constants:
    """Pack on the device, on the current stream."""
    kept = {name: view.memory.contiguous() for name, view in constants.items()}
    return Constants(pack_weights(kept["w"], kept["group_scale"]), kept["channel_scale"], kept.get("bias"))


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> dict[str, Any]:
    """Activations where tensor maps can read them, scales and counts without gaps."""
    return {name: _aligned(view.memory) if name == "a" else view.memory.contiguous() for name, view in activations.items()}


def run(
    problem: Problem, tactic: str, state: Constants, inputs: Mapping[str, Any], outputs: Mapping[str, TensorView],
    workspace: TensorView | None, stream: Any,
) -> str:
    """Launch the tactic on the stream and return the kernel's name. Raises ValueError for a tactic that `tactics` does not name:
    a part of K that is empty would be waited for without end."""
    m, k, group, known = problem.dim("m"), problem.dim("k"), problem.dim("g"), tactic in {*TACTICS, *half_precision.TACTICS}
    if not known or not takes(tactic, problem.variant, m, k, group, problem.op == OPS[1]):
        raise ValueError(f"got tactic {tactic} for {problem}, expected one of tactics(problem): {', '.join(tactics(problem))}")
    return _launch(
        inputs["a"], state.weights, inputs["token_scale"], state.channel_scale, state.bias, outputs["d"].memory,
        inputs.get("counts"), problem.variant, tactic, problem.option("out") == "f16",
        None if workspace is None else workspace.memory, stream,
    )
