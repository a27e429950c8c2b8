"""The adapter `torch_cuda` without its chip: what it declares and refuses, and its calls on torch's own host tensors.

What the kernels compute on a device is in reports/; here the same calls of the library run on the host, where exact integer
products and rounded weights must give the contract's bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.conformance.audit_findings import known_order
from lowbit.conformance.backend import Claim
from lowbit.conformance.bounds import check_declaration
from lowbit.conformance.case import Problem
from lowbit.conformance.op import parse_problem
from lowbit.conformance.ops import ops
from lowbit.conformance.selection import audit_list, case_list
from lowbit.conformance.session import Plan, Session
from lowbit.conformance.verdict import Status
from lowbit.conformance.worker import Worker
from lowbit.kernels.subjects import torch_cuda
from lowbit.references.encodings import Subtract, dequant_w4a16
from lowbit.references.formats import BF16, F16

HOST = torch_cuda.TorchCuda(torch, "cpu")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton counts as installed: nothing here launches it."""
    monkeypatch.setattr(torch_cuda, "find_spec", lambda name: name)


def problems() -> set[Problem]:
    """What `lowbit certify` and `lowbit audit` ask of the ops that the adapter has a call for."""
    return {item.case.problem for name in torch_cuda.KERNELS for item in (*case_list(ops()[name]), *audit_list(ops()[name]))}


@pytest.mark.usefixtures("triton")
def test_every_declaration_is_of_its_op_and_meets_its_minimum() -> None:
    seen: dict[str, set[str]] = {}
    for problem in problems():
        for tactic in HOST.tactics(problem) if HOST.supports(problem) is None else ():
            declared = HOST.declare(problem, tactic)
            assert check_declaration(ops()[problem.op], problem, declared) == ("", "as the contract")
            assert (declared.claim is Claim.BIT_EXACT) == known_order(declared)
            seen.setdefault(problem.op, set()).add(tactic)
    assert seen == {
        "gemm_w8a8_fp8": {"rowwise_fast", "rowwise_slow", "tensorwise_fast", "tensorwise_slow", *torch_cuda.FP8_LIMITS},
        "gemm_w4a16": {"matmul", "triton"},
        "gemm_w4a8_int8": {"int_mm", "triton"},
    }


@pytest.mark.usefixtures("triton")
def test_promotion_is_declared_where_a_tactic_promotes() -> None:
    problem = parse_problem("gemm_w8a8_fp8/scaled/m64n64k1024/bf16", ops())
    found = {name: HOST.declare(problem, name).program[0] for name in HOST.tactics(problem)}
    assert {name: getattr(main, "segment", None) for name, main in found.items()} == {
        "rowwise_fast": 0, "rowwise_slow": 128, "tensorwise_fast": 0, "tensorwise_slow": 128, "triton": 0, "triton_32": 32,
        "triton_64": 64, "triton_128": 128,
    }


@pytest.mark.parametrize(("text", "reason"), [
    ("gemm_int4/f32/m64n64k128r0/f16", "stands for 'gemm_int4'"),
    ("gemm_w8a8_fp8/scaled/m64n72k64/bf16", "multiples of 16"),
    ("gemm_w8a8_fp8/block/m64n64k128/bf16", "not scales of blocks"),
    ("gemm_w8a8_fp8/scaled/m64n64k64/bf16.fnuz", "e4m3fn"),
    ("gemm_w8a8_fp8/scaled/m64n64k64/bf16.bias", "no bias"),
    ("gemm_w4a16/sym/m64n64k64g32/bf16.bias", "after the cast"),
])
def test_what_has_no_call_is_refused_in_a_sentence(text: str, reason: str) -> None:
    assert reason in (HOST.supports(parse_problem(text, ops())) or "")


def test_the_integer_products_keep_the_contract_on_the_host(tmp_path: Path) -> None:
    """`_int_mm` of every group and the eager steps behind it, of few rows and of many, through the worker and torch's memory."""
    shim = tmp_path / "shim.py"
    shim.write_text(
        "import torch\nfrom lowbit.kernels.subjects import torch_cuda\ntorch_cuda.find_spec = lambda name: None\n"
        "backend = torch_cuda.TorchCuda(torch, 'cpu')\n"
    )
    reference = f"python:{shim}:backend"
    bounded = [item for item in case_list(ops()["gemm_w4a8_int8"]) if item.lane == "bounded"]
    listed = [item for many in (False, True) for item in [x for x in bounded if (x.case.problem.dim("m") > 16) == many][:4]]
    with Worker(reference) as worker:
        session = Session(Plan(reference), worker)
        session.open()
        supports = worker.supports([item.case.problem for item in listed])
        found = [verdict for item, support in zip(listed, supports, strict=True) for verdict in session.judge(item, support)]
    assert {(verdict.status, verdict.tactic) for verdict in found} == {(Status.EXACT, "int_mm")}
    assert len(found) == 8


@pytest.mark.parametrize("variant", ["sym", "zp", "zpafter"])
@pytest.mark.parametrize("out", [BF16, F16])
def test_weights_are_rounded_as_the_contract_says(variant: str, out: Any) -> None:
    """Every pair of code and zero point under scales of every significand and of the least exponents."""
    problem = parse_problem(f"gemm_w4a16/{variant}/m8n1024k256g256/{out.name}", ops())
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 16, (1024, 256)).astype(np.uint8)
    scale = rng.integers(0, out.max_code // 2, (1024, 1)).astype(np.uint16)
    zero = rng.integers(0, 16, (1024, 1)).astype(np.uint8)
    tensors = {"w": torch.from_numpy(codes), "scale": torch.from_numpy(scale.view(np.int16)).view(getattr(torch, {
        "bf16": "bfloat16", "f16": "float16"}[out.name]))}
    if variant != "sym":
        tensors["zero"] = torch.from_numpy(zero)
    found = torch_cuda.KERNELS["gemm_w4a16"].prepare(torch, problem, tensors)["w"].view(torch.int16).numpy().view(np.uint16)
    order = Subtract.PRODUCTS if variant == "zpafter" else Subtract.CODES
    wanted = dequant_w4a16(codes, scale, out, zero_points=None if variant == "sym" else zero, order=order)
    nonzero = (wanted & 0x7FFF) != 0
    assert nonzero.mean() > 0.8
    assert np.array_equal(found[nonzero], wanted[nonzero])
    assert not (found[~nonzero] & 0x7FFF).any()


def test_without_its_chip_the_backend_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        torch_cuda.backend()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(RuntimeError, match=r"capability \(10, 0\), expected \(9, 0\)"):
        torch_cuda.backend()
    with pytest.raises(ValueError, match="takes no argument, got 'fast'"):
        torch_cuda.backend("fast")
