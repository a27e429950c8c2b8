"""Scalings as records: which elements share a scale, in which format it is stored, and what multiplies what.

Decides: the block of one scale, its format, whether a global scale and zero points stand beside it.
Refuses: how a scale is found from data (see recipes) and where its bytes lie (see layouts).
The value of an element is always (code - zero point) * block scale * global scale: every scale here is in decode direction.
Checkpoints that store the inverse of the global scale say so in their recipe, not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.references.formats import BF16, E8M0, F16, F32, INT4, UE4M3, UINT4, Format

__all__ = [
    "FP8_BLOCK_1X128", "FP8_BLOCK_128X128", "INT4_GROUP64_F16", "INT4_GROUP128_BF16", "INT4_GROUP128_F16",
    "INT4_GROUP128_ZERO_BF16", "INT4_GROUP128_ZERO_F16", "MX32", "NVFP4_BLOCK16", "NVFP4_BLOCK16_GLOBAL", "PER_CHANNEL_F32",
    "PER_TENSOR_F32", "PER_TOKEN_F32", "SCALINGS", "Scaling",
]


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scales of one matrix of `rows` x `k` elements (rows: tokens of an activation, output channels of a weight).

    `block_rows` and `block_k` give the elements that share a scale; 0 means the whole axis. The scale matrix has shape
    [rows / block_rows, k / block_k]. `zero_point` is None where codes are used as they are.
    """

    name: str
    scale: Format
    block_rows: int
    block_k: int
    has_global: bool  # one fp32 factor for the whole matrix, decode direction
    zero_point: Format | None
    source: str

    def shape(self, rows: int, k: int) -> tuple[int, int]:
        """Shape of the scale matrix. Raises ValueError where a block does not divide its axis."""
        extents = []
        for axis, size, block in (("rows", rows, self.block_rows), ("k", k, self.block_k)):
            if block and size % block:
                raise ValueError(f"{self.name}: got {axis} = {size}, expected a multiple of {block}; pad the matrix first")
            extents.append(size // block if block else 1)
        return extents[0], extents[1]

    def __repr__(self) -> str:
        return self.name


_SCALED_MM = "torch _scaled_mm and vLLM cutlass_scaled_mm: fp32 scales"

PER_TENSOR_F32 = Scaling("per_tensor_f32", F32, 0, 0, False, None, _SCALED_MM)
PER_TOKEN_F32 = Scaling("per_token_f32", F32, 1, 0, False, None, _SCALED_MM + ", one per row of the activation")
PER_CHANNEL_F32 = Scaling("per_channel_f32", F32, 1, 0, False, None, _SCALED_MM + ", one per row of the weight")
FP8_BLOCK_1X128 = Scaling("fp8_block_1x128", F32, 1, 128, False, None, "DeepGEMM activations")
FP8_BLOCK_128X128 = Scaling("fp8_block_128x128", F32, 128, 128, False, None, "DeepGEMM weights")
NVFP4_BLOCK16 = Scaling("nvfp4_block16", UE4M3, 1, 16, False, None, "svdquant-kernels, nunchaku: one level")
NVFP4_BLOCK16_GLOBAL = Scaling("nvfp4_block16_global", UE4M3, 1, 16, True, None, "NVFP4: vLLM, compressed-tensors, ModelOpt")
INT4_GROUP128_F16 = Scaling("int4_group128_f16", F16, 1, 128, False, None, "GPTQ, compressed-tensors pack-quantized")
INT4_GROUP128_BF16 = Scaling("int4_group128_bf16", BF16, 1, 128, False, None, "GPTQ, compressed-tensors pack-quantized")
INT4_GROUP64_F16 = Scaling("int4_group64_f16", F16, 1, 64, False, None, "svdquant-kernels Ascend")
INT4_GROUP128_ZERO_F16 = Scaling("int4_group128_zero_f16", F16, 1, 128, False, UINT4, "AWQ, vLLM quantize_weights")
INT4_GROUP128_ZERO_BF16 = Scaling("int4_group128_zero_bf16", BF16, 1, 128, False, INT4, "compressed-tensors asymmetric")
MX32 = Scaling("mx32", E8M0, 1, 32, False, None, "OCP microscaling formats (MX) 1.0")

SCALINGS = {
    s.name: s
    for s in (
        PER_TENSOR_F32, PER_TOKEN_F32, PER_CHANNEL_F32, FP8_BLOCK_1X128, FP8_BLOCK_128X128, NVFP4_BLOCK16, NVFP4_BLOCK16_GLOBAL,
        INT4_GROUP128_F16, INT4_GROUP128_BF16, INT4_GROUP64_F16, INT4_GROUP128_ZERO_F16, INT4_GROUP128_ZERO_BF16, MX32,
    )
}
