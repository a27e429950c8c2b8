"""Dot products: the exact sum, the sum as a matrix unit computes it, and a bound on the difference.

Decides: `emulate` and `bound`, which take the compiled twin where it can be had: the same bits. The sums are those of dot_sums
(`dot_exact`: certified float64 or an enclosure), dot_definition (`node_scalar`: every datapath, in Fractions), dot_emulation
(`dot_emulated`: its array form, bit for bit) and dot_bounds (order known, order unknown); all of it is imported from here.
Refuses: tolerances, and any order other than ascending k: permute or cut the operands, then call per part.
All operands are [rows, K] with K contiguous; A is [M, K], W is [N, K], results are [M, N]: out[m, n] = sum_k a[m, k] w[n, k].
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .datapaths import Datapath
from .dot_bounds import agnostic_bound, enclose, half_steps, prepare, running_bound
from .dot_definition import Term, node_scalar, scalar_terms
from .dot_emulation import Lanes, check_pair, check_read, dot_emulated, held_codes, read
from .dot_sums import Enclosure, Operand, dot_exact, dot_fraction, low_bit, outward, values
from .formats import Codes, Reals

__all__ = [
    "Enclosure", "Lanes", "Operand", "Term", "agnostic_bound", "bound", "check_pair", "check_read", "dot_emulated", "dot_exact",
    "dot_fraction", "emulate", "enclose", "half_steps", "held_codes", "low_bit", "node_scalar", "outward", "prepare", "read",
    "running_bound", "scalar_terms", "values",
]


def emulate(a: Operand, w: Operand, path: Datapath, start: Reals | None = None) -> Codes:
    """`dot_emulated` by the compiled twin where numba is installed and compiles the family, else by NumPy: the same bits."""
    twin = _compiled()
    if twin is None or path.family not in twin.EMULATED:
        return dot_emulated(a, w, path, start)
    codes: Codes = twin.dot_emulated_compiled(a, w, path, start)
    return codes


def bound(a: Operand, w: Operand, path: Datapath, prefix: Enclosure | None = None) -> Enclosure:
    """`running_bound` by the compiled twin where it can be had, else by NumPy: the same float64 values."""
    twin = _compiled()
    if twin is None or path.family not in twin.BOUNDED:
        return running_bound(a, w, path, prefix)
    found: Enclosure = twin.running_bound_compiled(a, w, path, prefix)
    return found


def _compiled() -> Any:
    """The module of compiled twins, or None without numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(".numba_dot", __package__)
