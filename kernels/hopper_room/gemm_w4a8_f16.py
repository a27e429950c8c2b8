"""gemm_w4a8_fp8, `exact`, of few tokens on Hopper: instances of gemm_w4a8_f16.cu, what is declared, the workspace, the launch.

Decides: the tactics (`TACTICS`: tiles of 256 rows of W by 8, 16, 32 or 64 rows of A, products in binary16), and which problems
they take: `exact`, without experts, M of at most the tile's rows, so that where K is cut depends on N, K and the device alone.
Refuses: everything else, through `takes`. Operands are checked by gemm_w4a8.py, which packs the weights that both sources read.
Kernels compile at the first launch; loading this module needs neither a compiler nor torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    F16,
    Claim,
    Contraction,
    Declaration,
    Join,
    Problem,
    add,
    cast,
    mul,
)

from .build import Unit, library
from .gemm_w4a8_schedule import stream_bytes, stream_cuts
from .launch import launch

__all__ = ["TACTICS", "UNITS", "Tactic", "declaration", "defines", "image_bytes", "multiply", "takes", "workspace"]

_SOURCE = "gemm_w4a8_f16.cu"
_SIGNATURE = (
    *(ctypes.c_void_p, ctypes.c_longlong), *(ctypes.c_void_p,) * 5, *(ctypes.c_longlong, ctypes.c_void_p),
    *(ctypes.c_longlong,) * 4, *(ctypes.c_int, ctypes.c_void_p),
)
_OP, _VARIANT = "gemm_w4a8_fp8", "exact"
_GROUPS = (64, 128)
_BANDS = 4  # of 64 rows of W in a block of threads
_BLOCK = 128  # k of a packed block
_ORDER = tuple(16 * (place % 2) + 4 * (place % 8 // 2) + place // 8 for place in range(32))
"""Which k of 32 two instructions of 16 take at which place. In A's fragment (PTX ISA, m64nNk16, 16-bit operands) half h of
register 2 r of lane l is k = 2 l + h + 8 r; instruction f has there nibble j = 2 f + r + 4 h of the packed word, which is
k = 4 l + j below j = 4 and k = 16 + 4 l + j - 4 from there on."""
_OUT = {"bf16": BF16, "f16": F16}


class Tactic(NamedTuple):
    """A tile of `tokens` rows of A; `cluster` blocks with neighbouring rows of W share their copies of A."""

    tokens: int
    cluster: int

    @property
    def name(self) -> str:
        """Rows of W x tokens, then how many blocks share A, if it is more than one."""
        return f"{64 * _BANDS}x{self.tokens}_f16" + (f"x{self.cluster}" if self.cluster > 1 else "")


TACTICS: dict[str, Tactic] = {
    tactic.name: tactic
    for tactic in (Tactic(8, 1), Tactic(16, 1), Tactic(32, 1), Tactic(32, 2), Tactic(64, 2))
}
"""Every instance by name."""


def defines(tactic: Tactic, group: int) -> dict[str, str | int]:
    """Macros of one instance."""
    return {"GROUP": group, "TOKENS": tactic.tokens, "BANDS": _BANDS, "SPLITS": 1, "CLUSTER": tactic.cluster, "STREAM": 1,
            "KERNEL": f"gemm_w4a8_{_VARIANT}_{tactic.name}_g{group}"}


UNITS: tuple[Unit, ...] = tuple((_SOURCE, defines(tactic, group), ()) for group in _GROUPS for tactic in TACTICS.values())
"""All that this module can ask the compiler for."""


def takes(tactic: str, op: str, variant: str, m: int) -> bool:
    """Whether a tactic of `TACTICS` takes a problem of M rows; N, K and G are any that the op has."""
    return op == _OP and variant == _VARIANT and m <= TACTICS[tactic].tokens


def declaration(problem: Problem, tactic: str, multiprocessors: int) -> Declaration:
    """Codes become binary16, exactly. The sum of a group is one accumulator of K = 16 instructions, which take each 32 k in an
    order of their own (`k_order`), multiplied by its scale and added to an f32 total by one FMA. Totals over parts of K are added
    in ascending order in f32; where K is cut depends on N, K and the number of multiprocessors. Then token scale, channel scale
    (one FMA with the bias), one cast. A row's bits depend neither on M nor on other rows."""
    bias, each = problem.option("bias") == "bias", TACTICS[tactic]
    m, n, k = (problem.dim(letter) for letter in "mnk")
    main = Contraction(
        ("a", "w"), DATAPATHS["hopper_f16"], segment=problem.dim("g"), steps=(mul("group_scale", join=Join.FUSED),),
        conversion=F16, cuts=stream_cuts(each.tokens, _BANDS, each.cluster, m, n, k, multiprocessors), k_order=_ORDER,
    )
    tail = (add("bias"),) if bias else ()
    channel = mul("channel_scale", join=Join.FUSED if bias else Join.SEPARATE)
    return Declaration((main, mul("token_scale"), channel, *tail, cast(_OUT[problem.option("out")])), Claim.BIT_EXACT)


def image_bytes(tactic: str, k: int) -> int:
    """Bytes of A in binary16 as the products read it: all rows of the tile, K to a whole number of blocks of 128."""
    return -(-k // _BLOCK) * _BLOCK * 2 * TACTICS[tactic].tokens


def workspace(tactic: str, n: int, k: int) -> int:
    """Bytes: the image of A, then slots for sums over parts of K and their counters. The kernel writes all that it reads."""
    return image_bytes(tactic, k) + stream_bytes(TACTICS[tactic].tokens, _BANDS, TACTICS[tactic].cluster, 1, n, k)


@cache
def _kernel(tactic: str, group: int) -> Callable[..., int]:
    """The compiled instance. Raises BuildError."""
    function: Any = library(_SOURCE, defines=defines(TACTICS[tactic], group)).lowbit_gemm_w4a8_f16
    function.argtypes, function.restype = _SIGNATURE, ctypes.c_int
    return function  # type: ignore[no-any-return]


def multiply(
    a: Any, weights: Any, token_scale: Any, channel_scale: Any, bias: Any, out: Any, memory: Any, half: bool, tactic: str,
    stream: Any,
) -> str:
    """Launch on the stream and return the kernel's name; nothing for no rows. Does not wait and does not allocate.

    Operands as `gemm_w4a8.gemm_w4a8_fp8` takes them, already checked; weights: its `PackedWeights`; memory: torch uint8 of at
    least `workspace` bytes at a multiple of 16, any content, not used by another stream meanwhile; half: out is float16."""
    name = f"gemm_w4a8_{_VARIANT}_{tactic}"
    m = int(a.shape[0])
    if m == 0:
        return f"{name} (nothing to launch)"
    stride = max(int(a.stride(0)), weights.k) if m == 1 else int(a.stride(0))
    launch(
        "gemm_w4a8_fp8", _kernel(tactic, weights.group), out, stream, a.data_ptr(), stride, weights.memory.data_ptr(),
        token_scale.data_ptr(), channel_scale.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        int(out.stride(0)), memory.data_ptr(), int(memory.numel()), m, weights.n, weights.k, int(half),
    )
    return name
