"""All ops, by name, in the order of the contract. An explicit tuple: adding an op is adding one file and one name here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lowbit.conformance.op import Op

__all__ = ["NAMES", "ops"]

NAMES = (
    "int4_pack", "int4_repack", "int4_encode", "scale_pack_e4m3", "scale_fold", "scale_swizzle", "fp8_convert_fnuz",
    "fp8_requantize", "fp8_quantize", "int8_quantize", "int4_quantize", "nvfp4_quantize", "svdquant_quantize", "gemm_w4a16",
    "gemm_w8a8_fp8", "gemm_w4a8_fp8", "gemm_w4a8_fp8_grouped", "gemm_w4a8_int8", "gemm_nvfp4", "gemm_int4",
)


@cache
def ops() -> dict[str, Op]:
    """Name -> contract."""
    return {name: import_module(f"{__name__}.{name}").OP for name in NAMES}
