"""Scaling records."""

from __future__ import annotations

import pytest

from lowbit.references.formats import F32, UE4M3, UINT4
from lowbit.references.scaling import (
    FP8_BLOCK_1X128,
    FP8_BLOCK_128X128,
    INT4_GROUP128_ZERO_F16,
    MX32,
    NVFP4_BLOCK16,
    NVFP4_BLOCK16_GLOBAL,
    PER_TENSOR_F32,
    PER_TOKEN_F32,
    SCALINGS,
)


def test_shapes_of_scale_matrices() -> None:
    assert PER_TENSOR_F32.shape(17, 300) == (1, 1)
    assert PER_TOKEN_F32.shape(17, 300) == (17, 1)
    assert FP8_BLOCK_1X128.shape(17, 384) == (17, 3)
    assert FP8_BLOCK_128X128.shape(256, 384) == (2, 3)
    assert NVFP4_BLOCK16.shape(5, 64) == (5, 4)
    assert MX32.shape(0, 64) == (0, 2)


def test_blocks_must_divide() -> None:
    with pytest.raises(ValueError, match="got k = 100, expected a multiple of 128"):
        FP8_BLOCK_1X128.shape(1, 100)
    with pytest.raises(ValueError, match="got rows = 100"):
        FP8_BLOCK_128X128.shape(100, 128)


def test_records() -> None:
    assert all(name == s.name and s.source for name, s in SCALINGS.items())
    assert (NVFP4_BLOCK16_GLOBAL.scale, NVFP4_BLOCK16_GLOBAL.has_global, NVFP4_BLOCK16.has_global) == (UE4M3, True, False)
    assert INT4_GROUP128_ZERO_F16.zero_point is UINT4
    assert PER_TENSOR_F32.scale is F32
    assert repr(MX32) == "mx32"
