"""Which problems a backend that computes whole ops refuses: its reading of the contract's domains, one sentence per rule.

Decides: what is refused and why. Refuses: to compute a problem whose shape or choice of options has no meaning in the contract,
even where a kernel would return something.
"""

from __future__ import annotations

from collections.abc import Callable

from lowbit.conformance.backend import Problem

__all__ = ["RULES", "refusal"]

Rule = tuple[Callable[[Problem], bool], str]


def _multiple(letter: str, step: int, *variants: str) -> Rule:
    """The size named by `letter` is a positive multiple of `step`, for these variants (none: for all)."""

    def kept(problem: Problem) -> bool:
        size = problem.dim(letter)
        return (bool(variants) and problem.variant not in variants) or (size > 0 and size % step == 0)

    return kept, f"{letter.upper()} must be a positive multiple of {step}"


def _positive(*letters: str) -> Rule:
    return (lambda problem: all(problem.dim(letter) > 0 for letter in letters)), f"{', '.join(letters).upper()} must be positive"


def _groups(legal: tuple[int, ...], whole: bool, step: int = 0) -> Rule:
    """K is a multiple of G, and G one of `legal`, a multiple of `step`, or (where `whole`) all of K."""

    def kept(problem: Problem) -> bool:
        g, k = problem.dim("g"), problem.dim("k")
        known = g in legal or (whole and g == k) or (step > 0 and g % step == 0)
        return g > 0 and k > 0 and known and k % g == 0

    return kept, "K must be a multiple of G, and G one of the contract's group sizes"


def _low_rank(problem: Problem) -> bool:
    r = problem.dim("r")
    return r % 16 == 0 and (r > 0) == (problem.option("lora") == "lora")


def _recipes(*pairs: tuple[tuple[str, ...], tuple[str, ...]]) -> Rule:
    """(variants, recipes that they know)."""

    def kept(problem: Problem) -> bool:
        return any(problem.variant in variants and problem.option("recipe") in recipes for variants, recipes in pairs)

    return kept, "the recipe does not have this variant"


_LORA: Rule = (_low_rank, "R must be a positive multiple of 16 with a low-rank term, and 0 without")
_N8, _K8 = _multiple("n", 8), _multiple("k", 8)
_ONE_LEVEL = ("svdquant", "svdquant_triton", "nunchaku", "deepgemm")
_TWO_LEVEL = (
    "vllm",
    "vllm_reference",
    "vllm_emulation",
    "compressed_tensors",
    "modelopt",
    "torchao",
    "transformer_engine",
    "four_over_six",
)

RULES: dict[str, tuple[Rule, ...]] = {
    "int4_pack": (
        _positive("n", "k"),
        _multiple("k", 8, "gptq", "k_major", "b8"),
        _multiple("n", 8, "along_n", "awq", "zeros_v1", "zeros_v2"),
        _multiple("k", 2, "nibble"),
        (lambda p: p.variant != "compressed_tensors" or p.option("codes") == "int8", "compressed_tensors packs int8 values"),
        (
            lambda p: p.variant not in ("zeros_v1", "zeros_v2", "b8") or p.option("codes") == "uint4",
            "this variant packs uint4 codes",
        ),
    ),
    "int4_repack": (_positive("n", "k"), _multiple("n", 8), _multiple("k", 8, "weight")),
    "int4_encode": (
        _positive("e", "n", "k"),
        (lambda p: p.variant == "grouped" or p.dim("e") == 1, "only `grouped` takes several experts"),
        (
            lambda p: p.variant != "unified" or (p.dim("k") % 2 == 0 and p.dim("n") * p.dim("k") % 32 == 0),
            "N * K must be a multiple of 32",
        ),
        _multiple("n", 16, "dense", "grouped"),
        _multiple("k", 128, "dense"),
        _multiple("k", 256, "grouped"),
    ),
    "scale_pack_e4m3": (_positive("n"),),
    "scale_fold": (_positive("n"), _multiple("k", 128)),
    "scale_swizzle": (_positive("m", "g"),),
    "fp8_convert_fnuz": (_positive("n", "k"),),
    "fp8_requantize": (
        (lambda p: p.dim("s") > 0 and p.dim("n") >= p.dim("s") and p.dim("k") > 0, "N rows cannot be cut into S shards"),
        (
            lambda p: p.option("checkpoint") == "unfused" or (p.dim("s") > 1 and p.variant != "channel"),
            "a fused checkpoint has several shards",
        ),
    ),
    "fp8_quantize": (
        _positive("k"),
        _recipes(
            (("static", "tensor", "token"), ("vllm", "vllm_native")),
            (("block",), ("vllm", "scaled_quantize", "deepgemm")),
            (("tile",), ("deepgemm",)),
        ),
        _multiple("k", 128, "block", "tile"),
        (lambda p: p.variant != "tile" or p.dim("m") % 128 == 0, "M must be a multiple of 128"),
        (lambda p: p.option("ub") == "no_ub" or p.variant == "token", "only per-token scales take an upper bound"),
        (lambda p: p.dim("p") <= p.dim("m") or p.variant in ("static", "tensor", "token"), "block scales have no row padding"),
    ),
    "int8_quantize": (_positive("k"),),
    "int4_quantize": (
        _groups((32, 64, 128), whole=True),
        _recipes(
            (("sym",), ("quantize_weights", "compressed_tensors", "svdquant", "nunchaku")),
            (("uint4b8",), ("quantize_weights",)),
            (("asym",), ("quantize_weights", "compressed_tensors")),
        ),
        (
            lambda p: p.option("recipe") not in ("svdquant", "nunchaku") or p.dim("g") == 64,
            "svdquant and nunchaku have groups of 64",
        ),
        (lambda p: p.option("recipe") != "nunchaku" or p.option("x") != "f32", "nunchaku reads f16 and bf16"),
    ),
    "nvfp4_quantize": (
        _multiple("k", 16),
        _recipes((("static", "dynamic"), _TWO_LEVEL), (("none",), _ONE_LEVEL)),
        (
            lambda p: p.option("recipe") != "deepgemm" or (p.dim("k") % 128 == 0 and p.option("layout") == "linear"),
            "deepgemm needs K a multiple of 128 and linear scales",
        ),
        (
            lambda p: p.option("recipe") not in ("vllm", "nunchaku") or p.option("x") != "f32",
            "vllm and nunchaku read f16 and bf16",
        ),
    ),
    "svdquant_quantize": (
        _multiple("k", 16),
        _multiple("k", 64, "int4"),
        _multiple("r", 16),
        (lambda p: p.variant != "int4" or p.option("recipe") != "svdquant_triton", "the Triton form has no int4"),
    ),
    "gemm_w4a16": (_groups((16, 32, 64, 128, 256), whole=True), _K8, _N8),
    "gemm_w8a8_fp8": (
        _multiple("k", 16),
        _N8,
        _multiple("k", 128, "block"),
        (
            lambda p: p.variant == "scaled" or (p.option("act_scale"), p.option("weight_scale")) == ("token", "channel"),
            "block scales leave no choice of token and channel scales",
        ),
        (lambda p: p.option("bias") != "biasafter" or p.option("out") != "f32", "a bias after the cast needs a narrow output"),
    ),
    "gemm_w4a8_fp8": (_groups((64, 128), whole=False), _N8),
    "gemm_w4a8_fp8_grouped": (_positive("e"), _groups((64, 128), whole=False), _N8),
    "gemm_w4a8_int8": (_groups((), whole=True, step=32), _K8, _N8),
    "gemm_nvfp4": (
        _multiple("k", 32),
        _N8,
        _LORA,
        (lambda p: p.variant != "plain" or p.option("lora") == "nolora", "plain has no low-rank term"),
        (lambda p: p.variant == "plain" or p.option("bias") != "biasafter", "only plain adds a bias after the cast"),
    ),
    "gemm_int4": (_multiple("k", 64), _N8, _LORA),
}


def refusal(problem: Problem) -> str | None:
    """The first rule that a problem breaks, as a sentence; None where it is in the domain."""
    for kept, sentence in RULES[problem.op]:
        if not kept(problem):
            return f"{problem}: {sentence}"
    return None
