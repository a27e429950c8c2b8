"""gemm_w8a8_fp8 on Hopper: tiles, how they sum, which one a problem gets, and the same for torch tensors without a problem.

Decides: the instances of gemm_w8a8.cu (`TILES`) and the order in which they are offered (`tactics`). `fast` sums the whole of K
in the matrix unit, whose accumulator keeps 14 bits; `promoted` and `block` sum every 128 of K from zero and add to an f32 total.
A tactic is named by how it sums and by its tile: fast_m128n256w2 is 128 x 256, two blocks that share the rows of W.
Refuses: e4m3fnuz, which the unit does not read, sizes beyond 2^31 - 257, and what the contract does not have.

Every tactic is declared bit for bit: the order of K is that of the unit's instructions, 32 at a time, and the epilogue rounds
once per step. Rows do not depend on each other: sums over K do not know M.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    F16,
    F32,
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
from .build import Unit, library
from .device import check, same_device
from .launch import launch

__all__ = [
    "OPS", "TILES", "UNITS", "declaration", "defines_of", "gemm_w8a8_fp8", "prepare", "run", "stage", "tactics", "unsupported",
    "workspace",
]

OPS = ("gemm_w8a8_fp8",)
_SOURCE = "gemm_w8a8.cu"
_NAME = "lowbit_gemm_w8a8_fp8"

TILES: Mapping[str, tuple[str, ...]] = {
    "fast": (
        "m8n96", "m8n112", "m32n96", "m32n112", "m64n32", "m64n64", "m64n96", "m64n112", "m64n128", "m128n96", "m128n112",
        "m128n128", "m128n128w2", "m128n192w2", "m128n224w2", "m128n256w2",
    ),
    "promoted": ("m64n32", "m64n96", "m64n112", "m128n112", "m128n128", "m128n128w2"),
    "block": ("m64n32", "m64n96", "m64n112", "m128n112", "m128n128", "m128n128w2"),
}
"""How a tactic sums -> the tiles it is built for."""

_SUMS = {"fast": 0, "promoted": 1, "block": 2}
_OUT = {"bf16": (0, BF16, 2), "f16": (1, F16, 2), "f32": (2, F32, 4)}  # number in the source, format, bytes
_BIAS = {"nobias": 0, "bias": 1, "biasafter": 2}
_TACTIC = re.compile(r"(fast|promoted|block)_m(\d+)n(\d+)(w2)?")
_LARGEST = (1 << 31) - 257  # of a size: it and the end of a tile behind it are counted in 32 bits
_BETWEEN = 1000  # clocks of a tile that are no products
_PROCESSORS = 132  # multiprocessors of H100 SXM, H200 and GH200: what tiles are chosen for; the kernel asks the device itself


def _parts(tactic: str) -> tuple[str, int, int, int]:
    """(how it sums, rows, columns, blocks that share rows of W)."""
    found = _TACTIC.fullmatch(tactic)
    if found is None or tactic.partition("_")[2] not in TILES[found[1]]:
        named = ", ".join(f"{sums}_{tile}" for sums, tiles in TILES.items() for tile in tiles)
        raise ValueError(f"gemm_w8a8_fp8: got tactic {tactic!r}, expected one of {named}")
    return found[1], int(found[2]), int(found[3]), 2 if found[4] else 1


def defines_of(tactic: str) -> dict[str, str | int]:
    """The macros of a tactic's instance. Raises ValueError for a name that is none."""
    sums, rows, columns, cluster = _parts(tactic)
    return {"W8A8_TM": rows, "W8A8_TN": columns, "W8A8_SUMS": _SUMS[sums], "W8A8_CLUSTER": cluster,
            "KERNEL": f"gemm_w8a8_fp8_{tactic}"}


UNITS: tuple[Unit, ...] = tuple(
    (_SOURCE, defines_of(f"{sums}_{tile}"), ()) for sums, tiles in TILES.items() for tile in tiles
)


def unsupported(problem: Problem) -> str | None:
    """None where a kernel takes the problem; otherwise the rule of the contract that it breaks, the format that is missing, or
    the sizes beyond 2^31 - 257."""
    if problem.option("format") != "fn":
        return "the matrix unit of compute capability 9.0 reads e4m3fn, not e4m3fnuz"
    if broken := refusal(problem):
        return broken
    large = [letter.upper() for letter, size in problem.dims if size > _LARGEST]
    return f"{problem}: {', '.join(large)} must be at most 2^31 - 257" if large else None


def _cost(tactic: str, m: int, n: int, k: int) -> tuple[float, int, int]:
    """What to compare tiles of one way of summing by: waves of tiles over the device, times the clocks of a tile: for each 128 of
    k 4096 products a clock, or 128 bytes per row of A and W at 40 bytes a clock, and `_BETWEEN` for a tile of any size; then the
    smaller tile. The rates are those of an H200: its unit's, and what its second cache gave a multiprocessor when all of them
    asked. `_BETWEEN` decides between equal waves, for fewer and wider tiles: they were up to 5 % faster there."""
    _, rows, columns, cluster = _parts(tactic)
    tiles = -(-m // (rows * cluster)) * cluster * -(-n // columns)
    waves = -(-tiles // _PROCESSORS)
    clocks = max(rows * columns / 32, 3.2 * (min(m, rows) + columns / cluster))
    return waves * (-(-k // 128) * clocks + _BETWEEN), rows, columns


def _holds(rows: int, m: int) -> bool:
    return m <= rows if rows < 64 else rows == 64 or m > 64


def tactics(problem: Problem) -> tuple[str, ...]:
    """Every tactic that takes the problem, the one dispatched first. Tiles of fewer than 64 rows are for an M that they hold,
    those of 128 rows for an M that 64 do not hold."""
    kinds = ("block",) if problem.variant == "block" else ("fast", "promoted")
    m, n, k = (problem.dim(letter) for letter in "mnk")
    found: list[str] = []
    for kind in kinds:
        names = [name for name in (f"{kind}_{tile}" for tile in TILES[kind]) if _holds(_parts(name)[1], m)]
        found += sorted(names, key=lambda name: _cost(name, m, n, k))
    return tuple(found)


def declaration(problem: Problem, tactic: str) -> Declaration:
    """The sums of the unit in order, then channel, token and bias, the last two joined, and the cast."""
    sums = _parts(tactic)[0]
    out, bias, path = _OUT[problem.option("out")][1], problem.option("bias"), DATAPATHS["hopper_wgmma_fp8"]
    fused = bias == "bias"
    if sums == "block":
        main = Contraction(("a", "w"), path, segment=128, steps=(mul("a_scale", "w_scale", join=Join.FUSED),))
        scales: tuple[Step, ...] = ()
    else:
        main = Contraction(("a", "w"), path, segment=128 if sums == "promoted" else 0)
        scales = (mul("channel_scale"), mul("token_scale", join=Join.FUSED if fused else Join.SEPARATE))
    before = (add("bias"),) if fused else ()
    after = (add("bias", format=out), cast(out)) if bias == "biasafter" else ()
    return Declaration((main, *scales, *before, cast(out), *after), Claim.BIT_EXACT)


def workspace(problem: Problem, tactic: str) -> int:
    """None is needed."""
    return 0


def prepare(problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> dict[str, Any]:
    """The tensors as they are: the kernel reads the contract's own layout."""
    return {name: view.memory for name, view in constants.items()}


def stage(problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> dict[str, Any]:
    """The tensors as they are."""
    return {name: view.memory for name, view in activations.items()}


def run(
    problem: Problem, tactic: str, state: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Mapping[str, TensorView],
    workspace: Any, stream: Any,
) -> str:
    """Launch the tactic on the stream and return the name of its kernel. The launch overlaps the kernel ahead: constants are
    complete before the first run."""
    out, _, _ = _OUT[problem.option("out")]
    return _multiply({**state, **inputs}, outputs["d"].memory, out, _BIAS[problem.option("bias")], tactic, True, stream)


_SIGNATURE = (
    *(ctypes.c_void_p, ctypes.c_longlong) * 2, *(ctypes.c_void_p, ctypes.c_int) * 2, *(ctypes.c_void_p,) * 3, ctypes.c_int,
    ctypes.c_void_p, ctypes.c_longlong, *(ctypes.c_int,) * 6, ctypes.c_void_p,
)


@cache
def _entry(tactic: str) -> Callable[..., int]:
    function: Any = getattr(library(_SOURCE, defines=defines_of(tactic)), _NAME)
    function.argtypes, function.restype = list(_SIGNATURE), ctypes.c_int
    return function  # type: ignore[no-any-return]


def _scale(tensors: Mapping[str, Any], name: str) -> tuple[int | None, int]:
    """Address of a scale and the elements from one to the next: 0 for one scale in all."""
    tensor = tensors.get(name)
    return (None, 0) if tensor is None else (tensor.data_ptr(), int(tensor.numel() != 1))


def _multiply(
    tensors: Mapping[str, Any], d: Any, out: int, bias_form: int, tactic: str, overlap: bool, stream: Any
) -> str:
    a, w = tensors["a"], tensors["w"]
    (m, k), n = a.shape, w.shape[0]
    token, token_step = _scale(tensors, "token_scale")
    channel, channel_step = _scale(tensors, "channel_scale")
    a_scale, w_scale, bias = (
        tensors[name].data_ptr() if name in tensors else None for name in ("a_scale", "w_scale", "bias")
    )
    launch(
        "gemm_w8a8_fp8", _entry(tactic), d, stream, a.data_ptr(), a.stride(0) if m > 1 else k, w.data_ptr(), w.stride(0), token,
        token_step, channel, channel_step, a_scale, w_scale, bias, bias_form, d.data_ptr(), d.stride(0) if m > 1 else n, out,
        m, n, k, 0, int(overlap),
    )
    return f"gemm_w8a8_fp8_{tactic}"


_CODES = ("torch.float8_e4m3fn", "torch.uint8")
_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float32": "f32"}


def gemm_w8a8_fp8(
    a: Any, w: Any, out: Any, *, token_scale: Any = None, channel_scale: Any = None, a_scale: Any = None, w_scale: Any = None,
    bias: Any = None, bias_after: bool = False, tactic: str = "", overlap: bool = False, stream: Any = None,
) -> str:
    """out[M, N] = cast(scales * sum_k a[m, k] w[n, k] + bias[n]) on the tensors' device. Returns the kernel's name.

    a [M, K], w [N, K]: torch float8_e4m3fn (or their bytes), rows of neighbouring elements, K a multiple of 16, N of 8, rows and
    bases at multiples of 16 bytes. out [M, N]: bfloat16, float16 or float32, any stride between rows. Scales are float32 in
    decode direction: either token_scale [M] or [1] and channel_scale [N] or [1], or a_scale [M, K / 128] and w_scale [N / 128
    rounded up, K / 128] with K a multiple of 128. `bias` [N] in out's dtype is added in float32 before the only cast, or with
    `bias_after` in out's dtype behind it. All lie on one device. `tactic`: a name of `tactics`, empty: as dispatched. `overlap`:
    the launch may begin, and read w, while the kernel ahead on the stream still runs: w must be complete before that kernel
    starts, neither it nor one that it overlaps may write w. `stream`: a torch stream, None: the current one. Does not wait and
    does not allocate. Raises ValueError for other arguments before anything runs.
    """
    name = _DTYPES.get(str(out.dtype))
    if name is None:
        raise ValueError(f"gemm_w8a8_fp8: got out of {out.dtype}, expected bfloat16, float16 or float32")
    if str(a.dtype) not in _CODES or str(w.dtype) not in _CODES or a.ndim != 2 or w.ndim != 2:
        raise ValueError(f"gemm_w8a8_fp8: got a {a.dtype} and w {w.dtype}, expected matrices of float8_e4m3fn or uint8")
    (m, k), n = (int(size) for size in a.shape), int(w.shape[0])
    blocks = a_scale is not None or w_scale is not None
    given = {"token_scale": token_scale, "channel_scale": channel_scale, "a_scale": a_scale, "w_scale": w_scale}
    wanted: dict[str, tuple[tuple[int, ...], ...]] = (
        {"a_scale": ((m, k // 128),), "w_scale": ((-(-n // 128), k // 128),)} if blocks
        else {"token_scale": ((m,), (1,)), "channel_scale": ((n,), (1,))}
    )
    for scale, tensor in given.items():
        shape = None if tensor is None else tuple(tensor.shape)
        legal = wanted.get(scale, (None,))
        if shape not in legal or (tensor is not None and (str(tensor.dtype) != "torch.float32" or not tensor.is_contiguous())):
            raise ValueError(f"gemm_w8a8_fp8: got {scale} {shape}, expected contiguous float32 {' or '.join(map(str, legal))}")
    if tuple(w.shape) != (n, k) or tuple(out.shape) != (m, n):
        raise ValueError(f"gemm_w8a8_fp8: got w {tuple(w.shape)} and out {tuple(out.shape)}, expected ({n}, {k}) and ({m}, {n})")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != out.dtype or not bias.is_contiguous()):
        raise ValueError(f"gemm_w8a8_fp8: got bias {bias.dtype} {tuple(bias.shape)}, expected contiguous {out.dtype} ({n},)")
    for what, matrix in (("a", a), ("w", w), ("out", out)):
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            raise ValueError(f"gemm_w8a8_fp8: got {what} with {matrix.stride(1)} elements from column to column, expected 1")
        if matrix.shape[0] > 1 and matrix.stride(0) < matrix.shape[1]:
            raise ValueError(
                f"gemm_w8a8_fp8: got {what} with {matrix.stride(0)} elements from row to row, expected at least {matrix.shape[1]}"
            )
        if matrix.data_ptr() % 16 or (what != "out" and matrix.stride(0) % 16):
            raise ValueError(f"gemm_w8a8_fp8: got {what} with a base or rows off multiples of 16 bytes, expected them there")
    chosen = {
        "out": name, "format": "fn", "act_scale": "atensor" if token_scale is not None and token_scale.numel() == 1 and m != 1
        else "token", "weight_scale": "wtensor" if channel_scale is not None and channel_scale.numel() == 1 else "channel",
        "bias": "nobias" if bias is None else "biasafter" if bias_after else "bias",
    }
    dims = (("m", m), ("n", n), ("k", k))
    problem = Problem("gemm_w8a8_fp8", "block" if blocks else "scaled", dims, tuple(chosen.items()))
    if broken := unsupported(problem):
        raise ValueError(f"gemm_w8a8_fp8: {broken}")
    tactic = tactic or tactics(problem)[0]
    if (_parts(tactic)[0] == "block") != blocks:
        raise ValueError(f"gemm_w8a8_fp8: got tactic {tactic!r}, expected one of {', '.join(tactics(problem))}")
    same_device("gemm_w8a8_fp8", out, a=a, w=w, bias=bias, **given)
    check("gemm_w8a8_fp8: out", out)
    if m == 0:
        return f"gemm_w8a8_fp8_{tactic} (nothing to launch)"
    tensors = {key: tensor for key, tensor in {**given, "bias": bias, "a": a, "w": w}.items() if tensor is not None}
    return _multiply(tensors, out, _OUT[name][0], _BIAS[chosen["bias"]], tactic, overlap, stream)
