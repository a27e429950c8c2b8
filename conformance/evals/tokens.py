"""What two arms say token by token of the same texts, and the verdict on a kernel.

Decides: per-token divergence of next-token distributions, where the likeliest token differs, and the verdict: the divergence of
the backend from the reference against that of another honest summation order (the floor), as a ratio of means over tokens with
a bootstrap over texts.
Refuses: to call anything but a ratio: divergence without a floor says nothing, since the last bit of one sum moves every later
token of a bf16 model.

KL(reference || arm) per position is the sum over the vocabulary of p (log p - log q), natural logarithm, in binary64.
The floor is the reference again with sums in another order, fed as another batch would be (context and answer apart), which
moves the attention's last bits, too: exact integer sums have no noise of their own, and a ratio to nothing accuses everybody. A
unit of fewer bits than binary32 is honest if it says so: its admitted deviations belong to the floor (`echo`).
The factor is 4: the divergence of small perturbations goes with their square, so a ratio of 4 is twice the perturbation that
batching makes. What lies below, as a factor of 1.001 in one layer may, is found where nothing adds to it: see `operations`. A
floor that is not finite measures nothing, and the verdict is INCONCLUSIVE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .paired import Outcome, bootstrap_ratio

__all__ = [
    "FACTOR", "Ratio", "TextDifference", "TokenComparison", "compare_tokens", "mean_divergence", "ratio_of", "text_difference",
]

FACTOR = 4.0
"""A kernel drifts when the whole interval of its divergence over the floor's lies above this."""


@dataclass(frozen=True, slots=True)
class TextDifference:
    """One text under two arms. `kl`: per predicted token. `flips`: tokens whose likeliest successor differs. `first`: the first
    of them, -1 where there is none."""

    kl: tuple[float, ...]
    flips: int
    first: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """Limits of a ratio; None: beyond every number."""

    lower: float | None
    upper: float | None


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """Two arms over all texts. `kl`, `floor_kl`: means over tokens, None: infinite. `flips`, `floor_flips`: shares of tokens.
    `texts_flipped`: texts with a flip. `first`: median place of their first one, None where there is none."""

    texts: int
    tokens: int
    kl: float | None
    floor_kl: float | None
    flips: float
    floor_flips: float
    texts_flipped: int
    first: float | None
    ratio: Ratio
    factor: float
    outcome: Outcome


def text_difference(reference: torch.Tensor, other: torch.Tensor) -> TextDifference:
    """Logits [T, V] of both arms, in any floating dtype, at the positions that predict the answer's T tokens."""
    if reference.shape != other.shape or reference.ndim != 2 or not len(reference):
        shapes = f"{list(reference.shape)} and {list(other.shape)}"
        raise ValueError(f"need logits [T, V] of one shape and T of at least 1, got {shapes}")
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (reference, other))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)  # rounding can leave a zero slightly below
    kl = torch.where(kl.isnan(), torch.inf, kl)  # an arm whose logits are not numbers is infinitely far
    flipped = (reference.float().argmax(-1) != other.float().argmax(-1)).nonzero().flatten().tolist()
    return TextDifference(tuple(kl.tolist()), len(flipped), flipped[0] if flipped else -1)


def ratio_of(numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]], confidence: float = 0.95) -> Ratio:
    """Interval of the ratio of means over tokens; entry i of both belongs to text i."""
    sides = [[np.asarray(values, np.float64) for values in side] for side in (numerator, denominator)]
    found = bootstrap_ratio(sides[0], sides[1], confidence=confidence)
    lower, upper = (value if np.isfinite(value) else None for value in (found.lower, found.upper))
    return Ratio(lower, upper)


def mean_divergence(texts: Sequence[TextDifference]) -> float | None:
    """Mean over the tokens of all texts; None where it is infinite."""
    mean = sum(sum(text.kl) for text in texts) / sum(len(text.kl) for text in texts)
    return mean if np.isfinite(mean) else None


def compare_tokens(
    backend: Sequence[TextDifference], floor: Sequence[TextDifference], *, factor: float = FACTOR, confidence: float = 0.95
) -> TokenComparison:
    """Backend against reference and floor against reference, over the same texts, at least two. INCONCLUSIVE where the floor has
    a divergence that is not finite: then nothing is known of honest noise."""
    ratio = ratio_of([text.kl for text in backend], [text.kl for text in floor], confidence)
    if ratio.lower is None or ratio.lower > factor:
        outcome = Outcome.DRIFTS
    elif ratio.upper is not None and ratio.upper <= factor:
        outcome = Outcome.SERVES
    else:
        outcome = Outcome.INCONCLUSIVE
    tokens = sum(len(text.kl) for text in backend)
    places = [text.first for text in backend if text.first >= 0]
    return TokenComparison(
        len(backend), tokens, mean_divergence(backend), mean_divergence(floor),
        sum(text.flips for text in backend) / tokens, sum(text.flips for text in floor) / tokens, len(places),
        float(np.median(places)) if places else None, ratio, factor, outcome,
    )
