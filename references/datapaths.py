"""Matrix-unit arithmetic as records: what one instruction family computes, as numbers.

Decides: products per node, alignment, kept bits, rounding, special values and the source of each, per instruction.
Refuses: keying on the chip. One GPU computes fp8 in different ways by different instructions (wgmma and mma.sync on
Hopper), and units without a published model (XMX, the Ascend cube, CDNA4) have no record here.
The meaning of every field is given by `dot.node_scalar`; kernels take `constants(path)` at compile time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from .formats import (
    BF16,
    E2M1,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    F16,
    F32,
    F64,
    INT4,
    INT8,
    INT32,
    UE4M3,
    UINT4,
    UINT8,
    Format,
)
from .rounding import Rounding

__all__ = ["CONSTANTS", "DATAPATHS", "Datapath", "Evidence", "Family", "constants"]


class Family(IntEnum):
    """Shape of one node: how the products of a node meet the accumulator c."""

    FUSED = 0  # products and c aligned to the largest exponent, cut, summed exactly, rounded once
    GROUPED = 1  # block-scaled fp4: runs of `group` products summed exactly, scaled, then FUSED over the group sums
    BLOCK_SCALED_FUSED = 2  # FUSED, the block scales (powers of two) added to the exponents of the products
    EMULATED_PAIRS = 3  # two chained FUSED nodes from zero (k in alternating runs of `group`), then one IEEE add of c
    INTEGER = 4  # exact int32, modulo 2^32, or clamped by each instruction
    IEEE = 5  # one product at a time in the output format: FMA, or product and sum each rounded
    EXACT_SUM = 6  # exact sum of the node's products and c, rounded once
    PAIR_TREE = 7  # rounded pairwise tree over the products, then a rounded addition of c; subnormals flushed
    TRUNCATED_SUM = 8  # truncated sum of the products, then an addition of c that floors
    TRUNCATED_PAIRS = 9  # TRUNCATED_SUM whose products form two sums, even k and odd k, each with its own alignment


class Evidence(IntEnum):
    """How far a record has been checked."""

    MEASURED = 0  # every number that shows in a result by our own probes; 10^7 outputs per instruction and distribution
    HARDWARE_CHECKED = 1  # reproduces published outputs of real devices bit for bit
    CROSS_CHECKED = 2  # agrees bit for bit with an independent published simulator, itself checked on devices
    LITERATURE = 3  # taken from published tables or vendor documents, or derived from a checked sibling


@dataclass(frozen=True, slots=True)
class Datapath:
    """Arithmetic of one instruction family. A sum over K is a chain of nodes in ascending k, c <- node(c, products).

    An operand x is written s * 2^e with |s| in [1, 2) for normal values; subnormals keep e = the format's minimum
    exponent. Products are exact and, unless `normalised`, keep the exponent e_a + e_b although |s_a s_b| may reach 4.
    """

    name: str
    family: Family
    operands: tuple[Format, ...]  # accepted operand formats; both sides may differ
    products: int  # products per node (L)
    instruction_k: int  # K of one instruction; a shorter K is padded with zero products
    output: Format  # format of c and of the result
    output_bits: int  # significand bits of the result, hidden bit counted (P); the rest of the container is zero
    output_rounding: Rounding
    nan_code: int  # the only NaN the unit produces
    evidence: Evidence
    source: str
    fraction_bits: int = 0  # bits kept below 2^E, E the largest exponent of a node (F)
    zero_exponent: int = 0  # exponent of a zero term in the search for E
    alignment_rounding: Rounding = Rounding.RZ  # what happens to the bits below 2^(E-F): RZ on the magnitude, or FLOOR
    normalised: int = 0  # 1: products are renormalised before alignment
    operand_bits: int = 0  # significand bits of an operand that are used, the lower ones cut before specials are told; 0: all
    operand_min_exponent: int = 0  # exponent kept by small operands, at most the format's own; 0: the format's own
    group: int = 0  # run length of consecutive k: summed before scaling (GROUPED), or dealt to the sub-nodes
    scale_format: Format | None = None  # block scales taken by the instruction
    scale_group: int = 0  # k per block scale
    carry_bits: int = 0  # fraction bits kept by the addition of c (TRUNCATED_*)
    flush: int = 0  # 1: subnormal operands, c, products and sums become zero
    fused: int = 1  # IEEE: 1 = FMA, 0 = the product is rounded to the output format first
    saturate: int = 0  # INTEGER: 1 = each instruction clamps its result, 0 = the result wraps modulo 2^32

    def __repr__(self) -> str:
        return self.name


CONSTANTS = (
    "family", "products", "instruction_k", "fraction_bits", "output_bits", "output_rounding", "zero_exponent",
    "output_min_exponent", "output_max_exponent", "output_size", "nan_code", "alignment_rounding", "normalised",
    "operand_bits", "operand_min_exponent", "group", "scale_group", "carry_bits", "flush", "fused", "saturate",
)
"""Names of what `constants` returns, in order."""


def constants(path: Datapath) -> tuple[int, ...]:
    """What a kernel takes at compile time: plain ints in the order of `CONSTANTS`. Exponents are unbiased, `output_size`
    is the bits of the output container, `output_max_exponent` that of the largest finite value (31 - 1 for int32)."""
    out = path.output
    derived = {
        "output_min_exponent": out.min_exponent if out.exponent_bits else 0,
        "output_max_exponent": out.bias if out.exponent_bits else out.bits - 2,
        "output_size": out.bits,
    }
    return tuple(int(derived[name] if name in derived else getattr(path, name)) for name in CONSTANTS)


_M, _HW, _X, _L = Evidence.MEASURED, Evidence.HARDWARE_CHECKED, Evidence.CROSS_CHECKED, Evidence.LITERATURE
_RZ, _RNE = Rounding.RZ, Rounding.RNE
_VECTORS = "MATLAB tensor-core models, vectors measured on "
_MODEL = "MMA-Sim tables, arXiv 2511.10909"
_PROBES = "tests/device/run_probes.py on H200 (golden/hardware/h200)"
_FP8 = (E4M3FN, E5M2)
_NVIDIA_NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF}


def _fused(name: str, operands: tuple[Format, ...], products: int, k: int, bits: int, zero: int, evidence: Evidence,
           source: str, output_bits: int = 24, operand_bits: int = 0) -> Datapath:
    """One FUSED record with an f32 result cut to `output_bits`."""
    return Datapath(
        name, Family.FUSED, operands, products, k, F32, output_bits, _RZ, _NVIDIA_NAN["f32"], evidence, source,
        fraction_bits=bits, zero_exponent=zero, operand_bits=operand_bits,
    )


def _with_half(path: Datapath, evidence: Evidence, zero: int) -> tuple[Datapath, Datapath]:
    """A record and its f16-accumulator form (suffix `_f16`): 11 bits, nearest even."""
    return path, replace(
        path, name=path.name + "_f16", output=F16, output_bits=11, output_rounding=_RNE, nan_code=_NVIDIA_NAN["f16"],
        evidence=evidence, zero_exponent=zero,
    )


def _nvidia() -> Iterable[Datapath]:
    """Tensor cores, Volta to Blackwell, with floating-point operands and no group of scaled sums."""
    yield from _with_half(_fused("volta_f16", (F16,), 4, 4, 23, -131, _HW, _VECTORS + "V100"), _HW, -19)
    yield from _with_half(_fused("turing_f16", (F16,), 8, 8, 24, -132, _X, _MODEL), _X, -20)
    yield from _with_half(_fused("ampere_f16", (F16,), 8, 16, 24, -132, _HW, _VECTORS + "A100"), _HW, -20)
    yield _fused("ampere_bf16", (BF16,), 8, 16, 24, -132, _HW, _VECTORS + "A100")
    yield _fused("ampere_tf32", (F32,), 4, 8, 24, -132, _HW, _VECTORS + "A100", operand_bits=11)
    yield from _with_half(_fused("ada_f16", (F16,), 8, 16, 24, -132, _HW, _VECTORS + "RTX 4000 Ada"), _HW, -20)
    yield _fused("ada_bf16", (BF16,), 8, 16, 24, -132, _HW, _VECTORS + "RTX 4000 Ada")
    yield _fused("ada_tf32", (F32,), 4, 8, 24, -132, _HW, _VECTORS + "RTX 4000 Ada", operand_bits=11)
    yield from _with_half(
        _fused("ada_fp8", _FP8, 16, 32, 13, -132, _HW, _VECTORS + "RTX 4000 Ada", output_bits=14), _HW, -20)
    yield from _with_half(_fused("hopper_f16", (F16,), 16, 16, 25, -133, _M, _PROBES), _M, -21)
    yield _fused("hopper_bf16", (BF16,), 16, 16, 25, -133, _M, _PROBES)
    yield _fused("hopper_tf32", (F32,), 8, 8, 25, -133, _M, _PROBES, operand_bits=11)
    yield _fused("hopper_tf32_k4", (F32,), 4, 4, 25, -133, _M, _PROBES, operand_bits=11)
    yield from _with_half(_fused("hopper_wgmma_fp8", _FP8, 32, 32, 13, -133, _M, _PROBES, output_bits=14), _M, -21)
    yield from _with_half(_fused("blackwell_f16", (F16,), 16, 16, 25, -133, _X, _MODEL), _X, -21)
    yield _fused("blackwell_bf16", (BF16,), 16, 16, 25, -133, _X, _MODEL)
    yield _fused("blackwell_tf32", (F32,), 8, 8, 25, -133, _X, _MODEL, operand_bits=11)
    yield from _with_half(_fused("blackwell_f8f6f4", (*_FP8, E2M1), 32, 32, 25, -133, _X, _MODEL), _X, -21)
    for chip, evidence, source in (("hopper", _M, _PROBES), ("blackwell", _L, "as hopper_mma_fp8: no output of it was seen")):
        yield from _with_half(Datapath(
            f"{chip}_mma_fp8", Family.EMULATED_PAIRS, _FP8, 16, 32, F32, 24, _RZ, _NVIDIA_NAN["f32"], evidence, source,
            fraction_bits=25, zero_exponent=-133, operand_min_exponent=-14, group=2,
        ), evidence, -21)


def _block_scaled() -> Iterable[Datapath]:
    """Tensor cores that take block scales, Blackwell (sm_100)."""
    yield Datapath(
        "blackwell_mxf8f6f4", Family.BLOCK_SCALED_FUSED, (*_FP8, E2M1), 32, 32, F32, 24, _RZ, _NVIDIA_NAN["f32"], _X,
        _MODEL, fraction_bits=25, zero_exponent=-133, scale_format=E8M0, scale_group=32,
    )
    for name, scale, per_scale in (("blackwell_mxfp4", E8M0, 32), ("blackwell_nvfp4", UE4M3, 16)):
        yield Datapath(
            name, Family.GROUPED, (E2M1,), 64, 64, F32, 24, _RZ, _NVIDIA_NAN["f32"], _X, _MODEL, fraction_bits=35,
            zero_exponent=-139, group=16, scale_format=scale, scale_group=per_scale,
        )


def _integer() -> Iterable[Datapath]:
    """Integer matrix units: products of 4- and 8-bit operands, int32 accumulator."""
    for name, saturate in (("imma_s32", 0), ("imma_s32_satfinite", 1)):
        yield Datapath(
            name, Family.INTEGER, (INT8, UINT8, INT4, UINT4), 32, 32, INT32, 32, _RNE, 0, _M,
            _PROBES + "; 4-bit operands: PTX ISA 9.2, mma with .s32", saturate=saturate,
        )


def _amd() -> Iterable[Datapath]:
    """MFMA units, CDNA1 to CDNA3."""
    nan = F32.nan_code
    for name, operand, products in (("cdna1_f16", F16, 4), ("cdna1_bf16", BF16, 2)):
        yield Datapath(name, Family.EXACT_SUM, (operand,), products, products, F32, 24, _RNE, nan, _X, _MODEL)
    for name, operand, products in (("cdna2_f16", F16, 4), ("cdna2_bf16_1k", BF16, 4), ("cdna2_bf16", BF16, 2)):
        yield Datapath(name, Family.PAIR_TREE, (operand,), products, products, F32, 24, _RNE, nan, _X, _MODEL, flush=1)
    for name, operand, products, bits in (("cdna3_f16", F16, 8, 0), ("cdna3_bf16", BF16, 8, 0), ("cdna3_xf32", F32, 4, 11)):
        yield Datapath(
            name, Family.TRUNCATED_SUM, (operand,), products, products, F32, 24, _RNE, nan, _X, _MODEL,
            fraction_bits=24, zero_exponent=-999, operand_bits=bits, carry_bits=31,
        )
    yield Datapath(
        "cdna3_fp8", Family.TRUNCATED_PAIRS, (E4M3FNUZ, E5M2FNUZ), 16, 32, F32, 24, _RNE, nan, _X, _MODEL,
        fraction_bits=24, zero_exponent=-999, group=1, carry_bits=31,
    )


def _ieee() -> Iterable[Datapath]:
    """One rounding per product (FMA), or two. CDNA's fp32 MFMA is `ieee_f32` in ascending k."""
    narrow = (F16, BF16, E4M3FN, E5M2, E4M3FNUZ, E5M2FNUZ, E2M1, INT8, UINT8, INT4, UINT4)
    for name, output, rounding, fused in (
        ("ieee_f64", F64, _RNE, 1), ("ieee_f32", F32, _RNE, 1), ("ieee_f32_unfused", F32, _RNE, 0), ("ieee_f32_rz", F32, _RZ, 1),
        ("ieee_f16", F16, _RNE, 1), ("ieee_bf16", BF16, _RNE, 1),
    ):
        yield Datapath(
            name, Family.IEEE, (F32, *narrow), 1, 1, output, output.precision, rounding, output.nan_code, _L,
            "IEEE 754-2019, fusedMultiplyAdd", fused=fused,
        )


DATAPATHS: dict[str, Datapath] = {
    path.name: path for group in (_nvidia(), _block_scaled(), _integer(), _amd(), _ieee()) for path in group
}
"""Every record by name. A suffix `_f16` is the form with an f16 accumulator."""
