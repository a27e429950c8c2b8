"""The triton backend as the interpreter sees it, by file: for checks that run before its entry point is installed, and for
mutants.

    lowbit run CASE --backend python:tests/interpreter/interpreted.py:honest
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from lowbit.kernels.triton import Triton, backend

__all__ = ["honest", "lora_of_smoothed", "offsets_wrap", "padding_not_written"]


def honest() -> Triton:
    """The backend without a fault."""
    return backend()


def lora_of_smoothed() -> Triton:
    """svdquant_quantize projects x / smooth."""
    return backend("mutant=lora_of_smoothed")


def offsets_wrap() -> Triton:
    """Offsets of rows of an input wrap: those of 32 bits, scaled down to 14."""
    return backend("mutant=offsets_wrap")


def padding_not_written() -> Triton:
    """Padding keeps what was there."""
    return backend("mutant=padding_not_written")
