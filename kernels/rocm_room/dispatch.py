"""Which product computes an fp8 linear layer, and what is done to its activations first: host logic, as tables.

Decides: for each combination of scales, platform and versions the product (`product_of`), the rows that a quantiser pads to, and
which checkpoints need their scales merged. Refuses: to compare versions as text, scales by a tolerance, and to guess a platform.
After vLLM's w8a8_utils; docs/w8a8_utils.md maps each of its branches to a case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "CUTLASS", "PADDED_ROWS", "RULES", "SKINNY_ROWS", "Call", "cutlass_supports", "fused_on_disk", "one_scale", "padding_of",
    "per_row_product", "product_of", "takes_skinny",
]

CUTLASS: dict[str, tuple[tuple[int, int], ...]] = {
    "fp8": ((90, 12000), (89, 12040)), "block_fp8": ((100, 12080), (90, 12000)), "group_gemm": ((100, 12080), (90, 12030)),
    "sparse": ((90, 12020),),
}
"""Feature -> (least compute capability, least CUDA version as 1000 major + 10 minor), highest capability first; vLLM
scaled_mm_entry.cu and sparse_scaled_mm_entry.cu."""


def cutlass_supports(feature: str, *, cuda: int | None, capability: int | None) -> bool:
    """Whether CUTLASS has a feature. `cuda`: version, None off CUDA (ROCm has none of them); `capability`: 10 major + minor."""
    if cuda is None or capability is None:
        return False
    return next((cuda >= version for least, version in CUTLASS[feature] if capability >= least), False)


def per_row_product(*, rocm: bool, torch_version: str, capability: int) -> bool:
    """Whether torch multiplies with a scale per row and per column: on ROCm from torch 2.7, on chips from 9.4 (gfx942). Versions
    are numbers: 2.10 is later than 2.7, whatever their text says."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found is None:
        raise ValueError(f"torch_version: got {torch_version!r}, expected one that begins MAJOR.MINOR, such as 2.13.0")
    return rocm and (int(found[1]), int(found[2])) >= (2, 7) and capability >= 94


PADDED_ROWS = 17
"""Rows that a quantiser pads to: torch's scaled product is faster beyond 16."""


def padding_of(*, rocm: bool, compiled: bool, asked: bool | None = None) -> int | None:
    """Rows that the quantised activations are padded to, or None. ROCm never pads; elsewhere padding is what was `asked`, by
    default all but graphs under a compiler, whose shapes padding would break."""
    pads = not compiled if asked is None else asked
    return PADDED_ROWS if pads and not rocm else None


@dataclass(frozen=True, slots=True)
class Call:
    """What the choice depends on: CUTLASS at hand, one weight scale, one activation scale, a scale per token when dynamic, ROCm,
    and a scaled product with vectors (`per_row_product`)."""

    cutlass: bool
    one_weight_scale: bool
    one_activation_scale: bool
    per_token: bool
    rocm: bool
    per_row: bool


RULES: tuple[tuple[str, dict[str, bool]], ...] = (
    ("cutlass", {"cutlass": True}),
    ("rocm_per_tensor", {"one_weight_scale": True, "one_activation_scale": True, "rocm": True}),
    ("torch_per_tensor", {"one_weight_scale": True, "one_activation_scale": True}),
    ("torch_per_token", {"per_token": True, "one_weight_scale": False, "one_activation_scale": False, "per_row": True}),
    ("torch_channelwise", {}),
)
"""(product, what it needs), the first that fits. `cutlass`: one fused kernel; `*_per_tensor`: a product with two scalars;
`torch_per_token`: with two vectors; `torch_channelwise`: a product without scales, then both vectors and the bias in binary32."""


def product_of(call: Call) -> str:
    """The product of a call: the first of `RULES` whose needs are met."""
    return next(name for name, needs in RULES if all(getattr(call, field) is wanted for field, wanted in needs.items()))


SKINNY_ROWS = 4
"""Most rows of activations that the skinny product takes (wvSplitKQ)."""


def takes_skinny(m: int, k: int, *, one_scale_each: bool, own_format: bool, enabled: bool = True) -> bool:
    """Whether the skinny product computes m rows over k: 1 to 4 rows, k in sixteens, one scale on either side, codes in the e4m3
    of the chip's own unit. `enabled`: the switch of the deployment (VLLM_ROCM_USE_SKINNY_GEMM)."""
    return enabled and own_format and one_scale_each and 1 <= m <= SKINNY_ROWS and k % 16 == 0


def one_scale(scales: Sequence[float]) -> bool:
    """Whether all shards have the same scale. Equal means equal: scales that differ in one bit are different scales."""
    return all(scale == scales[0] for scale in scales)


LEAST_BINARY32 = -3.4028234663852886e38
"""What the slots of a fused layer hold before a checkpoint fills them."""


def fused_on_disk(scales: Sequence[float]) -> bool:
    """Whether the checkpoint stored one scale for all shards: then the last slot was never filled, and codes stay as they are."""
    return scales[-1] <= LEAST_BINARY32
