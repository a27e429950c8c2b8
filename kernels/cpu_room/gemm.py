"""The GEMMs: sums over K in binary64 by BLAS, epilogues one binary32 operation at a time.

Decides: how each GEMM is computed and what is declared of it. Refuses: to hide an order. BLAS adds in an order of its own, so
whole sums are declared as ieee_f64 in unknown order; sums per group are added group by group in ascending k as declared. The
order within a group is not declared separately: sums of integer products are exact, and the judge bounds an ieee_f64 segment
for every order.

Shapes: A [M, K], W [N, K], D [M, N]; scales multiply (decode direction). Every binary32 or 16-bit step is rounded on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lowbit.conformance.backend import (
    BF16,
    DATAPATHS,
    E4M3FN,
    F16,
    F32,
    Contraction,
    Declaration,
    Format,
    Join,
    Order,
    Problem,
    Start,
    Step,
    TensorView,
    add,
    cast,
    mul,
)

from .codec import Array, add_in, codes_of, fma_in, narrow_codes, rounded, values

__all__ = ["GEMMS", "Gemm"]

Arrays = Mapping[str, Array]
Program = tuple[Contraction | Step, ...]

_DOUBLE, _INTEGER = DATAPATHS["ieee_f64"], DATAPATHS["imma_s32"]
_OUT = {"bf16": BF16, "f16": F16, "f32": F32}
_CHUNK = 1 << 21
"""Elements of D times groups that are summed in one BLAS call: 16 MiB of binary64."""


class Gemm(NamedTuple):
    """One op. `operands` turns decoded constants or activations into what `compute` takes; both get float arrays by name."""

    program: Callable[[Problem], Program]
    invariant: Callable[[Problem], bool]
    operands: Callable[[Problem, dict[str, Array]], dict[str, Array]]
    compute: Callable[[Problem, Arrays], Array]

    def declare(self, problem: Problem) -> Declaration:
        """Bounded by the program; rows do not depend on each other where every sum over K is exact in binary64."""
        return Declaration(self.program(problem), batch_invariant=self.invariant(problem))

    def load(self, problem: Problem, tensors: Mapping[str, TensorView]) -> dict[str, Array]:
        """Constants or activations as the kernel keeps them: scales in binary32, matrices in binary64."""
        decoded = {name: values(view.memory, view.format) for name, view in tensors.items()}
        kept = self.operands(problem, decoded)
        return {name: array.astype(np.float64) if name in _MATRICES else array for name, array in kept.items()}

    def run(self, problem: Problem, tensors: Arrays) -> dict[str, Array]:
        """Codes of D."""
        with np.errstate(all="ignore"):
            result = self.compute(problem, tensors)
        return {"d": codes_of(result, _OUT[problem.option("out")])}


_MATRICES = ("a", "w", "lora_act", "lora_up")


def _as_is(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    return tensors


def _always(problem: Problem) -> bool:
    return True


def _never(problem: Problem) -> bool:
    return False


def _dot(a: Array, w: Array) -> Array:
    """sum_k a[m, k] w[n, k] in binary64."""
    return np.asarray(a @ w.T)


def _group_dots(a: Array, w: Array, size: int) -> Iterator[Array]:
    """The same over each group of `size` neighbouring k, in ascending k."""
    rows, columns, groups = a.shape[0], w.shape[0], a.shape[1] // size
    left = a.reshape(rows, groups, size).transpose(1, 0, 2)
    right = w.reshape(columns, groups, size).transpose(1, 2, 0)
    step = max(1, _CHUNK // max(1, rows * columns))
    for start in range(0, groups, step):
        yield from np.matmul(left[start : start + step], right[start : start + step])


def _single(x: Array) -> Array:
    return x.astype(np.float32)


_MAIN = Contraction(("a", "w"), _DOUBLE, order=Order.UNKNOWN)


def _lora(problem: Problem) -> Program:
    """The low-rank product on top of the value reached, in one binary64 accumulator, then binary32."""
    if problem.option("lora") != "lora":
        return ()
    return Contraction(("lora_act", "lora_up"), _DOUBLE, order=Order.UNKNOWN, start=Start.PREVIOUS), cast(F32)


def _with_lora(value: Array, tensors: Arrays) -> Array:
    if "lora_act" not in tensors:
        return value
    return _single(value.astype(np.float64) + _dot(tensors["lora_act"], tensors["lora_up"]))


def _tail(problem: Problem, middle: tuple[Step, ...] = ()) -> Program:
    """The bias before the casts in binary32, or after them in the output format."""
    out, bias = _OUT[problem.option("out")], problem.option("bias")
    before = (add("bias"),) if bias == "bias" else ()
    after = (add("bias", format=out), cast(out)) if bias == "biasafter" else ()
    return (*before, *middle, cast(out), *after)


def _finish(problem: Problem, value: Array, tensors: Arrays) -> Array:
    out, bias = _OUT[problem.option("out")], problem.option("bias")
    if bias == "bias":
        return rounded(value + tensors["bias"], out)
    return add_in(rounded(value, out), tensors["bias"], out) if bias == "biasafter" else rounded(value, out)


# gemm_w4a16: f16 or bf16 activations, weights rounded to their format ------------------------------------------------


def _w4a16_program(problem: Problem) -> Program:
    return (_MAIN, cast(F32), *_tail(problem))


def _w4a16_operands(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    """W = RNE((q - z) s); zpafter: RNE(RNE(q s) - RNE(z s)). Without zero points z = 8. Products are exact in binary32."""
    if "w" not in tensors:
        return tensors
    out, group = _OUT[problem.option("out")], problem.dim("g")
    scale = np.repeat(tensors["scale"], group, axis=1)
    zero = np.repeat(tensors["zero"], group, axis=1) if "zero" in tensors else np.float32(8)
    with np.errstate(all="ignore"):
        if problem.variant == "zpafter":
            weight = add_in(rounded(tensors["w"] * scale, out), -rounded(zero * scale, out), out)
        else:
            weight = rounded((tensors["w"] - zero) * scale, out)
    return tensors | {"w": weight}


def _w4a16(problem: Problem, tensors: Arrays) -> Array:
    return _finish(problem, _single(_dot(tensors["a"], tensors["w"])), tensors)


# gemm_w8a8_fp8 -------------------------------------------------------------------------------------------------------


def _w8a8_program(problem: Problem) -> Program:
    if problem.variant == "block":
        steps = (cast(F32), mul("a_scale", "w_scale"))
        return (Contraction(("a", "w"), _DOUBLE, segment=128, steps=steps), *_tail(problem))
    return (_MAIN, cast(F32), mul("channel_scale"), mul("token_scale"), *_tail(problem))


def _w8a8(problem: Problem, tensors: Arrays) -> Array:
    a, w = tensors["a"], tensors["w"]
    if problem.variant == "scaled":
        value = _single(_dot(a, w)) * tensors["channel_scale"]  # one scale in all, or one per column
        return _finish(problem, value * tensors["token_scale"][:, None], tensors)
    a_scale = tensors["a_scale"]
    w_scale = np.repeat(tensors["w_scale"], 128, axis=0)[: w.shape[0]]
    total: Array | None = None
    for g, sums in enumerate(_group_dots(a, w, 128)):
        part = _single(sums) * (a_scale[:, g, None] * w_scale[None, :, g])
        total = part if total is None else total + part
    assert total is not None
    return _finish(problem, total, tensors)


# gemm_w4a8_fp8 and gemm_w4a8_fp8_grouped -----------------------------------------------------------------------------


def _w4a8_program(problem: Problem) -> Program:
    tail = (mul("token_scale"), mul("channel_scale"), *_tail(problem))
    if problem.variant == "folded":
        return (_MAIN, cast(F32), *tail)
    steps = (cast(F32), mul("group_scale"))
    return (Contraction(("a", "w"), _DOUBLE, segment=problem.dim("g"), steps=steps), *tail)


def _w4a8_operands(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    """folded: W = RNE_e4m3(q s), saturating; -0 for q = 0 whatever the scale, as the table of eight products gives it. W may
    have an axis of experts in front."""
    if "w" not in tensors or problem.variant == "exact":
        return tensors
    q = tensors["w"]
    codes = narrow_codes(q * np.repeat(tensors["group_scale"], problem.dim("g"), axis=-1), "e4m3fn")
    return tensors | {"w": np.where(q == 0, np.float32(-0.0), values(codes, E4M3FN))}


def _w4a8_rows(problem: Problem, tensors: Arrays) -> Array:
    folded = problem.variant == "folded"
    total = _single(_dot(tensors["a"], tensors["w"])) if folded else _scaled_groups(problem, tensors)
    return _finish(problem, total * tensors["token_scale"][:, None] * tensors["channel_scale"], tensors)


def _scaled_groups(problem: Problem, tensors: Arrays) -> Array:
    """Group sums to binary32, times the group scale of the column, added up in binary32."""
    total: Array | None = None
    for g, sums in enumerate(_group_dots(tensors["a"], tensors["w"], problem.dim("g"))):
        part = _single(sums) * tensors["group_scale"][:, g]
        total = part if total is None else total + part
    assert total is not None
    return total


def _w4a8_grouped(problem: Problem, tensors: Arrays) -> Array:
    """The dense op per expert, on the rows that belong to it."""
    result = np.zeros((problem.dim("m"), problem.dim("n")), dtype=np.float32)
    stop = 0
    for expert, count in enumerate(tensors["counts"].astype(np.int64)):
        start, stop = stop, stop + int(count)
        if start < stop:
            own = {name: array[start:stop] for name, array in tensors.items() if name in ("a", "token_scale")}
            own |= {name: array[expert] for name, array in tensors.items() if name not in (*own, "counts")}
            result[start:stop] = _w4a8_rows(problem, own)
    return result


# gemm_w4a8_int8 ------------------------------------------------------------------------------------------------------


def _w4i8_program(problem: Problem) -> Program:
    """The integer sums are exact in binary64, so they are those of an int32 accumulator, which they never fill."""
    group = Contraction(("a", "w"), _INTEGER, segment=problem.dim("g"), steps=(cast(F32), mul("group_scale")))
    via = (cast(F16),) if problem.variant == "viaf16" else ()
    return (group, mul("token_scale"), *_tail(problem, via))


def _w4i8_operands(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    return tensors | {"w": tensors["w"] - np.float32(8)} if "w" in tensors else tensors


def _w4i8(problem: Problem, tensors: Arrays) -> Array:
    value = _scaled_groups(problem, tensors) * tensors["token_scale"][:, None]
    if problem.option("bias") == "bias":
        value = value + tensors["bias"]
    if problem.variant == "viaf16":
        value = rounded(value, F16)
    return rounded(value, _OUT[problem.option("out")])


# gemm_nvfp4 ----------------------------------------------------------------------------------------------------------


def _affine_in(problem: Problem, out: Format) -> tuple[Step, ...]:
    """Channel scale and bias in the output format: one FMA, or one product."""
    bias = problem.option("bias") == "bias"
    scale = mul("channel_scale", format=out, join=Join.FUSED if bias else Join.SEPARATE)
    return (scale, add("bias", format=out)) if bias else (scale,)


def _affine(problem: Problem, value: Array, tensors: Arrays) -> Array:
    out, scale = _OUT[problem.option("out")], tensors["channel_scale"]
    if problem.option("bias") == "bias":
        return fma_in(value, scale, tensors["bias"], out)
    return rounded(value * scale, out)


def _nvfp4_program(problem: Problem) -> Program:
    head = (_MAIN, cast(F32), mul("alpha"))
    if problem.variant == "plain":
        return (*head, *_tail(problem))
    out = _OUT[problem.option("out")]
    if problem.variant == "svdquant":
        return (*head, *_lora(problem), mul("channel_scale"), *_tail(problem))
    return (*head, cast(out), *_affine_in(problem, out), *_lora(problem), cast(out))


def _nvfp4_invariant(problem: Problem) -> bool:
    """Products are multiples of 2^-20 of at most 2688^2 < 2^23: 2^10 of them sum exactly in binary64."""
    return problem.dim("k") <= 1024 and problem.option("lora") == "nolora"


def _nvfp4_operands(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    """Codes times the scale of their 16 (exact); the low-rank activation rounded to the output format."""
    found = dict(tensors)
    for side in ("a", "w"):
        if side in found:
            found[side] = found[side] * np.repeat(found.pop(f"{side}_scale"), 16, axis=1)
    return _rounded_lora(problem, found)


def _rounded_lora(problem: Problem, tensors: dict[str, Array]) -> dict[str, Array]:
    if "lora_act" not in tensors:
        return tensors
    return tensors | {"lora_act": rounded(tensors["lora_act"], _OUT[problem.option("out")])}


def _nvfp4(problem: Problem, tensors: Arrays) -> Array:
    value = _single(_dot(tensors["a"], tensors["w"])) * tensors["alpha"]
    if problem.variant == "plain":
        return _finish(problem, value, tensors)
    if problem.variant == "svdquant":
        return _finish(problem, _with_lora(value, tensors) * tensors["channel_scale"], tensors)
    return _with_lora(_affine(problem, rounded(value, _OUT[problem.option("out")]), tensors), tensors)


# gemm_int4 -----------------------------------------------------------------------------------------------------------


def _int4_program(problem: Problem) -> Program:
    out = _OUT[problem.option("out")]
    if problem.variant == "f32":
        steps: tuple[Step, ...] = (cast(F32), mul("a_scale"), mul("w_scale"))
        main = Contraction(("a", "w"), _INTEGER, segment=64, steps=steps)
        return (main, *_lora(problem), mul("channel_scale"), *_tail(problem))
    steps = (cast(F32), cast(out), mul("a_scale", "w_scale", format=out, operand_format=out, join=Join.FUSED))
    main = Contraction(("a", "w"), _INTEGER, segment=64, steps=steps, running=out)
    return (main, *_affine_in(problem, out), *_lora(problem), cast(out))


def _int4_invariant(problem: Problem) -> bool:
    return problem.option("lora") == "nolora"


def _int4(problem: Problem, tensors: Arrays) -> Array:
    out, half = _OUT[problem.option("out")], problem.variant == "half"
    total: Array | None = None
    for g, sums in enumerate(_group_dots(tensors["a"], tensors["w"], 64)):
        left, right = tensors["a_scale"][:, g, None], tensors["w_scale"][None, :, g]
        if half:
            sums, scale = rounded(sums, out), rounded(left * right, out)
            total = rounded(sums * scale, out) if total is None else fma_in(sums, scale, total, out)
        else:
            part = _single(sums) * left * right
            total = part if total is None else total + part
    assert total is not None
    if half:
        return _with_lora(_affine(problem, total, tensors), tensors)
    return _finish(problem, _with_lora(total, tensors) * tensors["channel_scale"], tensors)


GEMMS = {
    "gemm_w4a16": Gemm(_w4a16_program, _never, _w4a16_operands, _w4a16),
    # a product of fp8 or int4 values is less than 2^36 units of the least one: 2^17 of them sum exactly in binary64
    "gemm_w8a8_fp8": Gemm(_w8a8_program, _always, _as_is, _w8a8),
    "gemm_w4a8_fp8": Gemm(_w4a8_program, _always, _w4a8_operands, _w4a8_rows),
    "gemm_w4a8_fp8_grouped": Gemm(_w4a8_program, _always, _w4a8_operands, _w4a8_grouped),
    "gemm_w4a8_int8": Gemm(_w4i8_program, _always, _w4i8_operands, _w4i8),
    "gemm_nvfp4": Gemm(_nvfp4_program, _nvfp4_invariant, _nvfp4_operands, _nvfp4),
    "gemm_int4": Gemm(_int4_program, _int4_invariant, _rounded_lora, _int4),
}
"""Kernels by op."""
