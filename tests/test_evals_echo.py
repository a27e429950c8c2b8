"""The floor of a backend's own precision: deviations of judged calls, dealt out over other rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lowbit.conformance.evals.echo import Echo, deviations


class Constant:
    """An arm whose outputs are 256 in every place."""

    name = "constant"

    def declare(self, problem: Any) -> Any:
        return ("declared", problem)

    def prepare(self, linear: Any, out: Any, device: Any, bias: Any = None) -> Any:
        return ("prepared", linear)

    def run(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.full((x.shape[0], layer.n), 256.0, dtype=x.dtype)


def layer(name: str, n: int) -> Any:
    return SimpleNamespace(name=name, n=n)


def test_deviations_are_per_length_of_the_input() -> None:
    """Inputs of length 5 and 10, of zeros, and one with an output that is no number."""
    x = torch.tensor([[3.0, 4.0], [6.0, -8.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.bfloat16)
    own = torch.tensor([[10.0, 1.0], [-20.0, 2.0], [1.0, 0.0], [torch.nan, 1.0]], dtype=torch.bfloat16)
    other = torch.tensor([[5.0, 1.0], [20.0, 2.0], [0.0, 0.0], [1.0, torch.inf]], dtype=torch.bfloat16)
    assert deviations(x, own, other).tolist() == [[1.0, 0.0], [-4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_deviation_goes_to_its_column_as_large_as_the_input_is() -> None:
    """Inputs of length 5 and 10: 256 + 5 * 4 and 256 + 10 * 4 in the first column, and the second is left alone."""
    arm: Any = Echo(Constant(), {"up": torch.tensor([[4.0, 0.0]] * 3)})
    x = torch.tensor([[3.0, 4.0], [6.0, -8.0]], dtype=torch.bfloat16)
    assert arm.run(layer("up", 2), x).tolist() == [[276.0, 256.0], [296.0, 256.0]]
    assert arm.run(layer("down", 2), x).tolist() == [[256.0, 256.0]] * 2  # nothing is known of this layer
    assert arm.declare("p") == ("declared", "p")
    assert arm.prepare("l", None, None) == ("prepared", "l")


def test_every_deviation_of_a_column_is_dealt_as_often_as_it_was_seen() -> None:
    """Three of four are 0, one is 64: over many rows a quarter of the outputs moves; neighbours do not move together."""
    columns = 16
    arm = Echo(Constant(), {"up": torch.tensor([[0.0], [0.0], [64.0], [0.0]]).expand(4, columns)})
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    moved = (arm.run(layer("up", columns), x) != 256).double()
    assert 0.23 < float(moved.mean()) < 0.27
    assert float(moved.mean(0).min()) > 0.2
    assert float(moved.mean(0).max()) < 0.3
    assert 0.05 < float((moved[:, 1:] * moved[:, :-1]).mean()) < 0.075
    assert torch.equal(arm.run(layer("up", columns), x[7:9]), arm.run(layer("up", columns), x)[7:9])
