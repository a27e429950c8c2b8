"""The triton backend in the CPU interpreter, as it is and with each known fault of its GEMMs, for workers that have no entry
point.

Decides nothing. `plain`, and the names of the faults as attributes:

    lowbit run CASE --backend python:tests/interpreter/gemm_backends.py:tail_skipped
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from lowbit.kernels.triton import Triton, backend

FAULTS = ("bias_dropped_at_m1", "int32_offsets", "one_scale_per_tile", "tail_skipped", "zero_offset")

plain = backend()


def __getattr__(name: str) -> Triton:
    if name not in FAULTS:
        raise AttributeError(name)
    return backend(f"mutant={name}")
