"""A Linear of a model through an arm: shapes, no rows, bias, recorder, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit.conformance.case import Tensor
from lowbit.conformance.evals import linear
from lowbit.conformance.evals.activations import InputRule, codes_of
from lowbit.conformance.evals.arms import ArmError, ReferenceArm
from lowbit.conformance.evals.backend_arm import BackendArm
from lowbit.conformance.evals.linear import ContractLinear
from lowbit.conformance.evals.quantise import RECIPES, quantise_linear
from lowbit.references.formats import BF16

K, N = 128, 8
CPU = torch.device("cpu")


def layer(bias: bool = False, backend: bool = False) -> ContractLinear:
    """Row n has a 7 at k = n and nothing else: codes and scales are exact, D[m, n] = 7 x[m, n] + n."""
    weight = torch.zeros(N, K, dtype=torch.bfloat16)
    weight[range(N), range(N)] = 7.0
    given = Tensor(codes_of(torch.arange(N, dtype=torch.bfloat16)).numpy().view("uint16"), BF16) if bias else None
    arm = BackendArm("cpu") if backend else ReferenceArm()
    return ContractLinear(arm, arm.prepare(quantise_linear(RECIPES["w4a16"], "a.b", weight, BF16), BF16, CPU, given))


@pytest.mark.parametrize("backend", [False, True], ids=["reference", "cpu"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (2, 0, K), (0, K)], ids=str)
def test_shapes_and_bias(shape: tuple[int, ...], bias: bool, backend: bool) -> None:
    x = (torch.arange(torch.Size(shape).numel()) % 13).to(torch.bfloat16).reshape(shape)
    found = layer(bias, backend)(x)
    assert found.dtype is torch.bfloat16
    assert found.shape == (*shape[:-1], N)
    assert torch.equal(found.float(), 7 * x[..., :N].float() + (torch.arange(N) if bias else 0))


def test_inputs_that_are_not_contiguous() -> None:
    x = (torch.arange(4 * K) % 11).to(torch.bfloat16).reshape(K, 4).T
    assert torch.equal(layer()(x).float(), 7 * x[:, :N].float())


def test_the_recorder_sees_rows() -> None:
    module, seen = layer(), []
    module.recorder = lambda name, x, y: seen.append((name, tuple(x.shape), tuple(y.shape), y.clone()))
    found = module(torch.ones(2, 3, K, dtype=torch.bfloat16))
    assert [entry[:3] for entry in seen] == [("a.b", (6, K), (6, N))]
    assert torch.equal(seen[0][3], found.reshape(6, N))


def test_a_module_without_parameters() -> None:
    module = layer()
    assert list(module.state_dict()) == []
    assert (module.in_features, module.out_features) == (K, N)
    assert str(module) == "ContractLinear(a.b, in_features=128, out_features=8, arm=reference)"


def test_other_inputs_are_refused() -> None:
    with pytest.raises(ArmError, match=r"^a.b: inputs are \[2, 64\] on cpu, expected \[..., 128\] on cpu; swap with the device"):
        layer()(torch.zeros(2, 64, dtype=torch.bfloat16))
    with pytest.raises(ArmError, match=r"^a.b: inputs are \[2, 128\] on meta, expected"):
        layer()(torch.zeros(2, K, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(ValueError, match=r"^inputs are torch.float32, the layer was prepared for torch.bfloat16"):
        layer()(torch.zeros(2, K))


@pytest.mark.parametrize(("recipe", "sizes"), [("vllm_fp8_token", [3, 3, 1]), ("vllm_fp8_tensor", [7])])
def test_many_rows_are_several_calls(recipe: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows, three at a time; with one scale for all rows they stay together."""
    seen = list[int]()

    class Twice:
        def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape[0])
            return 2 * x

    monkeypatch.setattr(linear, "_ROWS", 3)
    layer = SimpleNamespace(name="up", n=4, k=4, device=torch.device("cpu"), inputs=InputRule(recipe, BF16))
    x = torch.arange(28.0).reshape(7, 4)
    arm: Any = Twice()
    assert torch.equal(linear.ContractLinear(arm, layer)(x), 2 * x)
    assert seen == sizes
