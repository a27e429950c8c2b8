"""fp8_requantize: fused fp8 weights, one scale per shard, brought to one scale or to one scale per output channel.

Decides: codes and scales, for shards still apart and for weights fused on disk. Refuses: shards of other widths than the tensor
`widths` says; the sizes never depend on the platform.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.references.declarations import Declaration
from lowbit.references.encodings import FUSED_SENTINEL, channelwise_scales, requantize_max_scale
from lowbit.references.formats import F16, F32, INT32, Codes, container, order_key
from lowbit.references.rounding import encode

from ..case import Case, Operands, Stream
from ..op import Constraint, Expectation, Family, Op, Option, ResolvedTensor, Role, TensorSpec, exactly
from ..quantiser_draws import bytes_of

__all__ = ["OP"]

_MAX, _CHANNEL = (("variant", ("max_scale", "max_scale_f16")),), (("variant", ("channel",)),)


def _widths(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes:
    """Rows of each shard: seeded cuts that leave every shard at least one row, unequal wherever two cuts differ."""
    n, s = case.problem.dim("n"), case.problem.dim("s")
    words = stream.words(n - 1)
    cuts = np.sort(np.argsort(words, kind="stable")[: s - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [n]))).astype(container(tensor.format))


def _scales(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes:
    """Positive scales 2^-8..2^3 with full significands. In `ties` the largest is 1.875, whose reciprocal rounds, and the others
    are odd multiples of 1.875 / 32: powers of two in the weights then land on ties of the division. In `extremes` half of them
    times 2^12, beyond what binary16 products hold. Fused on disk: one scale, then the sentinel."""
    shape = tensor.shape
    fraction = stream.integers(0, (1 << 20) - 1, shape) * 2.0**-20
    values = np.ldexp(1.0 + fraction, stream.integers(-8, 2, shape))
    if case.pattern == "ties":
        values = 1.875 * (2 * stream.integers(8, 15, shape) + 1) / 32
        values[0] = 1.875
    if case.pattern == "extremes":
        values = np.ldexp(values, stream.integers(0, 1, shape) * 12)
    if case.problem.option("checkpoint") == "fused":
        values[1:] = FUSED_SENTINEL
    return encode(values, F32)


def _draw(case: Case, tensor: ResolvedTensor, stream: Stream) -> Codes | None:
    if tensor.name == "widths":
        return _widths(case, tensor, stream)
    return _scales(case, tensor, stream) if tensor.name == "scales" else bytes_of(case.pattern, tensor.shape, stream)


def _expect(case: Case, operands: Operands, declaration: Declaration) -> Mapping[str, Expectation]:
    w, scales = operands["w"], operands["scales"].codes
    widths = tuple(int(v) for v in order_key(operands["widths"].codes, INT32))
    if case.problem.variant == "channel":
        return {"channel_scale": exactly(channelwise_scales(scales, widths), F32)}
    intermediate = F16 if case.problem.variant == "max_scale_f16" else F32
    codes, scale = requantize_max_scale(w.codes, scales, widths, fmt=w.format, intermediate=intermediate)
    nan_bytes = case.problem.option("checkpoint") == "fused"  # bytes that are not computed are compared as bytes
    return {"w_out": exactly(codes, w.format, nan_any=not nan_bytes), "scale": exactly(scale.reshape(1), F32)}


OP = Op(
    name="fp8_requantize",
    formula="scale = max scales; w_out = RNE_sat(fl(w * scales[shard]) * fl(1 / scale)); channel_scale[n] = scales[shard]",
    clauses=("ENC-1", "ENC-25", "ENC-26", "ENC-27", "ENC-28"),
    judged={"max_scale": "ENC-26", "max_scale_f16": "ENC-26", "channel": "ENC-28"},
    variants=("max_scale", "max_scale_f16", "channel"),
    dims=("n", "k", "s"),
    options=(Option("format", ("fn", "fnuz")), Option("checkpoint", ("unfused", "fused"))),
    tensors=(
        TensorSpec("w", "format", ("n", "k"), Role.ACTIVATION),
        TensorSpec("scales", F32, ("s",), Role.ACTIVATION, Family.OUTER_SCALE),
        TensorSpec("widths", INT32, ("s",), Role.ACTIVATION, Family.COUNTS),
        TensorSpec("w_out", "format", ("n", "k"), Role.OUTPUT, when=_MAX),
        TensorSpec("scale", F32, ("1",), Role.OUTPUT, Family.OUTER_SCALE, when=_MAX),
        TensorSpec("channel_scale", F32, ("n", "1"), Role.OUTPUT, Family.OUTER_SCALE, when=_CHANNEL),
    ),
    constraints=(
        Constraint("s > 0 and n >= s and k > 0", "ENC-25"),
        Constraint("checkpoint == 'unfused' or (s > 1 and variant != 'channel')", "ENC-27"),
    ),
    ranges={"n": (4, 256, 1), "k": (1, 512, 1), "s": (1, 4, 1)},
    patterns=("all", "normal", "ties", "special", "extremes"),
    expect=_expect,
    edges=(
        "fp8_requantize/max_scale/n48k64s3/fn/all/s0", "fp8_requantize/max_scale/n48k64s3/fnuz/all/s0",
        "fp8_requantize/max_scale/n48k64s3/fn/ties/s0", "fp8_requantize/max_scale_f16/n48k64s2/fn/extremes/s0",
        "fp8_requantize/max_scale_f16/n48k64s3/fn/all/s1", "fp8_requantize/max_scale/n48k16s3/fn.fused/all/s0",
        "fp8_requantize/max_scale/n7k5s1/fn/normal/s0", "fp8_requantize/channel/n48k16s3/fn/normal/s0",
    ),
    rejects=(("fp8_requantize/max_scale/n2k16s3/fn", "ENC-25"), ("fp8_requantize/max_scale/n8k16s1/fn.fused", "ENC-27")),
    draw=_draw,
)
