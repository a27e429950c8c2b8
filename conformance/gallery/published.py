"""Acceptance rules that projects publish for low-bit products, as numbers: what they would have said of each mutant.

Decides: how a rule reads, one record each. Refuses: to judge. No verdict of the suite looks at these; they are measured on one
case per mutant against the result over the reals, which is kinder to a rule than a reference with errors of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from lowbit.references.formats import Reals

__all__ = ["RULES", "Measure", "Rule", "accepts"]


class Measure(IntEnum):
    """What a rule limits."""

    ELEMENT = 0  # |got - want| <= absolute + relative |want|, for all elements but a share
    SQNR = 1  # 10 log10( sum want^2 / sum (got - want)^2 ), decibel, at least
    COSINE = 2  # angle of the two outputs as vectors, at least
    SIMILARITY = 3  # 1 - 2 <got, want> / (<got, got> + <want, want>), below


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `limit`: decibel, cosine or difference; `share`: elements that may fail; `nan_to_zero`: NaN counts as 0 on both
    sides."""

    name: str
    source: str
    measure: Measure
    relative: float = 0.0
    absolute: float = 0.0
    limit: float = 0.0
    share: float = 0.0
    nan_to_zero: bool = False


def _element(name: str, source: str, relative: float, absolute: float, share: float = 0.0, nan_to_zero: bool = False) -> Rule:
    return Rule(name, source, Measure.ELEMENT, relative, absolute, share=share, nan_to_zero=nan_to_zero)


RULES: tuple[Rule, ...] = (
    _element("vllm-fp8", "vLLM, scaled product of fp8: 0.5 relative, 0.15 absolute", 0.5, 0.15),
    _element("vllm-w4", "vLLM, W4A8 and Triton W4A16: 1e-2 and 1e-2", 1e-2, 1e-2),
    _element("vllm-nvfp4", "vLLM, product of NVFP4: 0.1 and 0.1", 0.1, 0.1),
    _element("te-nvfp4", "TransformerEngine, product of NVFP4: 8e-3 and 8e-3, NaN taken as 0", 8e-3, 8e-3, nan_to_zero=True),
    _element("aiter", "aiter, fp8 and fp4: 1e-2 and 1e-2, one element in twenty may fail", 1e-2, 1e-2, share=0.05),
    Rule("sqnr-16", "torchao, product of NVFP4: 16 dB", Measure.SQNR, limit=16.0),
    Rule("sqnr-40", "FlashInfer, SVDQuant: 40 dB", Measure.SQNR, limit=40.0),
    Rule("cosine-.97", "FlashInfer, mm_fp4: 0.97", Measure.COSINE, limit=0.97),
    Rule("cosine-.99", "FlashInfer, bmm of fp8: 0.99", Measure.COSINE, limit=0.99),
    Rule("deepgemm-fp8", "DeepGEMM, fp8: 1e-3", Measure.SIMILARITY, limit=1e-3),
    Rule("deepgemm-fp4", "DeepGEMM, fp4: 2e-2", Measure.SIMILARITY, limit=2e-2),
)
"""Rules in use, with the projects whose tests hold them."""


def accepts(rule: Rule, got: Reals, want: Reals) -> bool:
    """Whether a rule accepts an output. NaN on either side is a difference, unless the rule says otherwise."""
    if rule.nan_to_zero:
        got, want = np.nan_to_num(got, nan=0.0), np.nan_to_num(want, nan=0.0)
    with np.errstate(all="ignore"):
        error = np.where(got == want, 0.0, got - want)
        if rule.measure is Measure.ELEMENT:
            within = np.abs(error) <= rule.absolute + rule.relative * np.abs(want)
            return bool((~within).mean() <= rule.share)
        if rule.measure is Measure.SQNR:
            noise = np.square(error).sum()
            return bool(noise == 0 or 10.0 * np.log10(np.square(want).sum() / noise) >= rule.limit)
        inner, own, other = (got * want).sum(), np.square(got).sum(), np.square(want).sum()
        if rule.measure is Measure.COSINE:
            return bool(inner / np.sqrt(own * other) > rule.limit)
        return bool(1.0 - 2.0 * inner / (own + other) < rule.limit)
