"""Honest sums in unusual orders: nothing that an audit reads of them may be held against them, nor credited to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from lowbit.conformance import audit_findings as findings
from lowbit.conformance import audit_probes as probes
from lowbit.conformance.audit_readings import Fingerprint, fingerprint
from lowbit.conformance.op import parse_problem, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.simulator import simulated_program
from lowbit.references.datapaths import DATAPATHS
from lowbit.references.declarations import Contraction, Declaration, Order
from lowbit.references.rounding import Rounding, encode

Reals = npt.NDArray[np.float64]
Sum = Callable[[Reals, Reals], Reals]

PROBLEM = parse_problem("gemm_w8a8_fp8/scaled/m64n64k1024/f32", ops())
OP = ops()["gemm_w8a8_fp8"]


def single(x: Reals) -> Reals:
    """To binary32."""
    return x.astype(np.float32).astype(np.float64)


def cut14(x: Reals) -> Reals:
    """To 14 significant bits, toward zero."""
    significand, exponent = np.frexp(x)
    cut: Reals = np.ldexp(np.trunc(np.ldexp(significand, 14)), exponent - 14)
    return cut


def chain(places: Sequence[int], narrow: Callable[[Reals], Reals]) -> Sum:
    """One accumulator over some k, in their order."""

    def total(a: Reals, w: Reals) -> Reals:
        found = np.zeros((a.shape[0], w.shape[0]))
        for k in places:
            found = narrow(found + a[:, k, None] * w[None, :, k])
        return found

    return total


def wide(places: Sequence[int]) -> Sum:
    """A binary64 sum of some k, handed on in binary32."""
    return lambda a, w: single(a[:, list(places)] @ w[:, list(places)].T)


def joined(parts: Sequence[Sum]) -> Sum:
    """Neighbouring sums added in binary32 until one is left."""

    def total(a: Reals, w: Reals) -> Reals:
        sums = [part(a, w) for part in parts]
        while len(sums) > 1:
            sums = [single(np.sum(sums[i : i + 2], axis=0)) for i in range(0, len(sums), 2)]
        return sums[0]

    return total


ORDERS: dict[str, tuple[Callable[[int], Sum], str]] = {
    "eight interleaved": (lambda k: joined([chain(range(lane, k, 8), single) for lane in range(8)]), "ieee_f32"),
    "thirty-two interleaved": (lambda k: joined([chain(range(lane, k, 32), single) for lane in range(32)]), "ieee_f32"),
    "two interleaved of 14 bits": (lambda k: joined([chain(range(lane, k, 2), cut14) for lane in (0, 1)]), "hopper_wgmma_fp8"),
    "descending": (lambda k: chain(range(k - 1, -1, -1), single), "ieee_f32"),
    "descending of 14 bits": (lambda k: chain(range(k - 1, -1, -1), cut14), "hopper_wgmma_fp8"),
    "unequal splits": (
        lambda k: joined([chain(range(*ends), single) for ends in ((0, k // 4), (k // 4, k - 64), (k - 64, k))]), "ieee_f32"
    ),
    "tree of runs of 64": (lambda k: joined([chain(range(i, i + 64), single) for i in range(0, k, 64)]), "ieee_f32"),
    "runs of 128 in binary64": (lambda k: joined([wide(range(i, i + 128)) for i in range(0, k, 128)]), "ieee_f32"),
    "halves in binary64": (lambda k: joined([wide(range(k // 2)), wide(range(k // 2, k))]), "ieee_f32"),
}
"""Name -> the sum over k of them, and the datapath under which it is declared in unknown order."""


def _declared(datapath: str) -> Declaration:
    program = simulated_program(OP, PROBLEM, DATAPATHS[datapath])
    return Declaration(tuple(replace(i, order=Order.UNKNOWN) if isinstance(i, Contraction) else i for i in program))


def _audited(order: str) -> tuple[Fingerprint, list[str], Declaration]:
    """(fingerprint, what a probe has against the declaration, declaration)."""
    made, datapath = ORDERS[order]
    declaration = _declared(datapath)
    found, wrong = [], []
    for case in probes.battery(OP, PROBLEM):
        operands = probes.probe_operands(OP, case)
        output = next(spec for spec in tensors_of(OP, case.problem) if spec.name == "d")
        real = probes.probed(OP, case, operands, np.zeros(output.shape, dtype=np.uint32))
        codes = encode(made(case.problem.dim("k"))(real.a, real.w), output.format, Rounding.RNE)
        if not OP.expect(case, operands, findings.must_equal(declaration))["d"].admits(codes).all():
            wrong.append(f"{case}: outside")
        wrong += [said for said in [findings.contradiction(OP, case, operands, declaration, codes)] if said]
        found.append(probes.probed(OP, case, operands, codes))
    return fingerprint(OP, found), wrong, declaration


@pytest.mark.parametrize("order", ORDERS)
def test_an_honest_sum_in_an_unusual_order_is_neither_refuted_nor_finer(order: str) -> None:
    """AUD-4, AUD-5. Products that never meet lose nothing, and no accumulator is the wider for it: judged by bits that no sum of
    theirs has, these would fail in `bounded`."""
    readings, wrong, declaration = _audited(order)
    assert wrong == []
    assert findings.finer(declaration, readings) is None


def test_an_order_that_does_not_ascend_is_no_promotion_and_bounds_bits_from_above() -> None:
    """By hand: going down, the sum before the masks has the other sign, so that one bit more survives than the 24 there are."""
    readings, _, _ = _audited("descending")
    assert (str(readings.order), str(readings.output_bits)) == ("descending", "at most 25")
    assert (readings.segment.value, readings.chunk.value) == (None, None)
    mixed, _, _ = _audited("eight interleaved")
    assert (str(mixed.order), mixed.output_bits.value) == ("mixed", None)
