"""Honest kernels and declarations in which some faults sit: a fault of a narrow unit does not show in binary64.

Decides: what a setting declares and computes; what it computes lies within what it declares. Refuses: faults.
"""

from __future__ import annotations

from .alteration import Edit

__all__ = ["DOT", "IN_14_BITS", "UNMEASURED", "declared"]

_GEMM = "cpu_room.gemm"
_MAIN = '_MAIN = Contraction(("a", "w"), _DOUBLE, order=Order.UNKNOWN)\n'

DOT = "    return np.asarray(a @ w.T)\n"
"""The sum over K of the cpu backend."""


def declared(datapath: str) -> Edit:
    """The main product declared on another datapath, order unknown; computed in binary64 as before, which no bound excludes."""
    return (_GEMM, _MAIN, _MAIN.replace("_DOUBLE", f'DATAPATHS["{datapath}"]'))


UNMEASURED: Edit = (
    "cpu",
    "            return refusal(problem)\n",
    '            sizes = [dict(problem.dims).get(letter) for letter in "mnk"]\n'
    '            return refusal(problem) or ("this shape is left to a library" if sizes == [64, 128, 2048] else None)\n',
)
"""One of the shapes that a fingerprint takes is refused: the declaration stands as it is, however loose."""

IN_14_BITS: tuple[Edit, ...] = (
    UNMEASURED,
    declared("hopper_wgmma_fp8"),
    (_GEMM, "def _dot(a: Array, w: Array) -> Array:\n",
     "def _cut(x: Array) -> Array:\n"
     "    part, exponent = np.frexp(x)\n"
     "    return np.ldexp(np.trunc(np.ldexp(part, 14)), exponent - 14)\n\n\n"
     "def _dot(a: Array, w: Array) -> Array:\n"),
    (_GEMM, DOT,
     "    step = max(1, a.shape[1] // 3)\n"
     "    total = np.zeros((a.shape[0], w.shape[0]))\n"
     "    starts = range(0, a.shape[1], step)\n"
     "    for start in starts:\n"
     "        total = _cut(total + _cut(a[:, start : start + step] @ w[:, start : start + step].T))\n"
     "    return total\n"),
)
"""Three parts of K cut to 14 bits and added, declared as the 13-bit unit in unknown order."""
