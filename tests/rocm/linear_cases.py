"""Cases of an fp8 linear layer as a whole, by id, on integers that every format holds: results are exact and worked out apart.

check_kernels.py runs them in Triton's CPU interpreter for gfx942 and gfx950; docs/w8a8_utils.md names them. Weights are -3 to 3;
rows of activations hold the largest code of the recipe (224 on gfx942, 448 on gfx950), so that a dynamic scale is the power of
two that the row was multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.kernels.rocm_room.linear import Layer, apply, load, quantise
from lowbit.kernels.triton_room.machine import Machine

__all__ = ["CASES"]

Array = npt.NDArray[Any]
Case = Callable[[Machine], None]
CASES: dict[str, Case] = {}
N, K = 16, 64


def case(name: str) -> Callable[[Case], Case]:
    """Enter a function under its id."""
    def enter(run: Case) -> Case:
        assert name not in CASES
        CASES[name] = run
        return run

    return enter


def code(value: int, *, fnuz: bool) -> int:
    """The e4m3 code of an integer of at most four significant bits: 8 to 15 times a power of two, or zero."""
    if value == 0:
        return 0
    size, exponent = abs(value) * 8, -3
    while size >= 16:
        assert size % 2 == 0
        size, exponent = size // 2, exponent + 1
    return ((value < 0) << 7) + ((exponent + 3 + (8 if fnuz else 7)) << 3) + size - 8


def codes(values: Array, *, fnuz: bool) -> torch.Tensor:
    flat = [code(int(value), fnuz=fnuz) for value in values.reshape(-1)]
    return torch.tensor(flat, dtype=torch.uint8).reshape(values.shape)


def weights(seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(-3, 4, (N, K))


def rows(m: int, top: int, seed: int = 2) -> Array:
    """Integers -7 to 7, and the largest code in every row."""
    x = np.random.default_rng(seed).integers(-7, 8, (m, K))
    x[:, 5] = top
    return x


def top_of(machine: Machine) -> int:
    return 224 if machine.fnuz else 448


def layer(machine: Machine, w: Array, scale: Any, input_scale: float | None = None) -> Layer:
    """A layer in the chip's own e4m3."""
    given = None if input_scale is None else torch.tensor([input_scale])
    return Layer(codes(w, fnuz=machine.fnuz), torch.tensor(scale, dtype=torch.float32), given, machine.fnuz)


def expect(found: tuple[torch.Tensor, str], wanted: Array, product: str) -> None:
    d, name = found
    assert name == product
    assert d.shape == wanted.shape
    assert d.to(torch.float64).tolist() == np.asarray(wanted, np.float64).tolist()


BIAS = np.arange(N) - 7.5


def bias() -> torch.Tensor:
    return torch.tensor(BIAS)


@case("linear/skinny_bias")
def skinny_bias(machine: Machine) -> None:
    for m in (1, 4):
        w, x = weights(), rows(m, top_of(machine))
        found = apply(layer(machine, w, [0.5]), torch.tensor(x * 2.0, dtype=torch.float32), machine, bias=bias())
        expect(found, x @ w.T + BIAS, "rocm_per_tensor.skinny")


@case("linear/skinny_off")
def skinny_off(machine: Machine) -> None:
    w, x = weights(), rows(1, top_of(machine))
    found = apply(layer(machine, w, [1.0]), torch.tensor(x, dtype=torch.float32), machine, bias=bias(), skinny=False)
    expect(found, x @ w.T + BIAS, "rocm_per_tensor")


@case("linear/rocm_per_tensor")
def rocm_per_tensor(machine: Machine) -> None:
    w, x = weights(), rows(6, top_of(machine)).reshape(2, 3, K)
    found = apply(layer(machine, w, [2.0]), torch.tensor(x, dtype=torch.float32), machine, bias=bias(), padding=17)
    expect(found, 2 * (x @ w.T) + BIAS, "rocm_per_tensor")


@case("linear/torch_per_tensor")
def torch_per_tensor(machine: Machine) -> None:
    w, x = weights(), rows(6, top_of(machine)).reshape(3, 2, K)
    found = apply(layer(machine, w, [2.0]), torch.tensor(x, dtype=torch.float32), machine, bias=bias(), padding=17, rocm=False)
    expect(found, 2 * (x @ w.T) + BIAS, "torch_per_tensor")


@case("linear/torch_per_token")
def torch_per_token(machine: Machine) -> None:
    w, x = weights(), rows(6, top_of(machine)).reshape(3, 2, K)
    of_w, of_x = 2.0 ** (np.arange(N) % 5 - 2)[:, None], 2.0 ** np.arange(6).reshape(3, 2, 1)
    found = apply(layer(machine, w, of_w), torch.tensor(x * of_x, dtype=torch.float32), machine, bias=bias(), per_token=True,
                  padding=17)
    expect(found, (x * of_x) @ (w * of_w).T + BIAS, "torch_per_token")


@case("linear/torch_channelwise")
def torch_channelwise(machine: Machine) -> None:
    w, x = weights(), rows(5, top_of(machine))
    of_w = 2.0 ** (np.arange(N) % 5 - 2)[:, None]
    found = apply(layer(machine, w, of_w), torch.tensor(x, dtype=torch.float32), machine, bias=bias())
    expect(found, x @ (w * of_w).T + BIAS, "torch_channelwise")


@case("linear/torch_channelwise_padded")
def torch_channelwise_padded(machine: Machine) -> None:
    w, x = weights(), rows(5, top_of(machine))
    of_w, of_x = 2.0 ** (np.arange(N) % 5 - 2)[:, None], 2.0 ** np.arange(5)[:, None]
    found = apply(layer(machine, w, of_w), torch.tensor(x * of_x, dtype=torch.float32), machine, per_token=True, per_row=False,
                  padding=17, bias=bias())
    expect(found, (x * of_x) @ (w * of_w).T + BIAS, "torch_channelwise")


@case("linear/torch_channelwise_unscaled")
def torch_channelwise_unscaled(machine: Machine) -> None:
    """The product in binary32 before any scale counts: a weight scale of one per row, a static activation scale of one."""
    w, x = weights(), rows(5, top_of(machine))
    found = apply(layer(machine, w, np.ones((N, 1)), 1.0), torch.tensor(x, dtype=torch.float32), machine)
    expect(found, x @ w.T, "torch_channelwise")


@case("linear/per_token_default")
def per_token_default(machine: Machine) -> None:
    """Whether tokens have scales of their own is asked of the layer's caller; who does not say has one scale for all."""
    w, x = weights(), rows(5, top_of(machine))
    given = torch.tensor(x, dtype=torch.float32)
    expect(apply(layer(machine, w, [1.0]), given, machine), x @ w.T, "rocm_per_tensor")
    expect(apply(layer(machine, w, [1.0]), given, machine, per_token=True), x @ w.T, "torch_channelwise")


@case("linear/identity")
def identity(machine: Machine) -> None:
    """Scales of one: the plain sum."""
    w, x = weights(), rows(5, top_of(machine))
    expect(apply(layer(machine, w, [1.0], 1.0), torch.tensor(x, dtype=torch.float32), machine), x @ w.T, "rocm_per_tensor")


@case("linear/flatten")
def flatten(machine: Machine) -> None:
    w, x = weights(), rows(12, top_of(machine))
    for shape in ((K,), (1, K), (2, 6, K), (2, 3, 2, K), (0, K)):
        part = x[: int(np.prod(shape[:-1]))].reshape(shape)
        d, _ = apply(layer(machine, w, [1.0]), torch.tensor(part, dtype=torch.float32), machine)
        assert tuple(d.shape) == (*shape[:-1], N)
        assert d.to(torch.float64).tolist() == (part @ w.T).astype(np.float64).tolist()
    strided = torch.tensor(x, dtype=torch.float32).t().contiguous().t()  # rows that do not lie one after the other
    expect(apply(layer(machine, w, [1.0]), strided, machine), x @ w.T, "rocm_per_tensor")


@case("linear/out_default")
def out_default(machine: Machine) -> None:
    w, x = weights() % 2, np.zeros((5, K), int)
    x[:, 3] = top_of(machine)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        d, _ = apply(layer(machine, w, [1.0]), torch.tensor(x).to(dtype), machine)
        assert d.dtype is dtype
        assert d.to(torch.float64).tolist() == (x @ w.T).astype(np.float64).tolist()
    d, _ = apply(layer(machine, w, [1.0]), torch.tensor(x).to(torch.bfloat16), machine, out=torch.float32)
    assert d.dtype is torch.float32


@case("linear/scale_ub")
def scale_ub(machine: Machine) -> None:
    """The largest magnitude is bounded: the scale is 1, and what lies beyond the recipe's range takes its end. Where tokens
    have no scales of their own a bound would be lost: it is refused."""
    top, w = top_of(machine), weights()
    x = rows(5, top * 4)
    bounded = np.minimum(x, top)
    of_w = np.ones((N, 1))
    bound = torch.tensor([float(top)])
    found = apply(layer(machine, w, of_w), torch.tensor(x, dtype=torch.float32), machine, per_token=True, scale_ub=bound)
    expect(found, bounded @ w.T, "torch_per_token")
    for input_scale, per_token, words in ((None, False, "one dynamic scale"), (1.0, True, "a static scale")):
        with pytest.raises(ValueError, match=f"got a bound beside {words}"):
            apply(layer(machine, w, of_w, input_scale), torch.tensor(x, dtype=torch.float32), machine, per_token=per_token,
                  scale_ub=bound)


@case("linear/passthrough")
def passthrough(machine: Machine) -> None:
    w, x = weights(), rows(5, 7)
    own = torch.float8_e4m3fnuz if machine.fnuz else torch.float8_e4m3fn
    given = codes(x, fnuz=machine.fnuz).view(own)
    found = apply(layer(machine, w, [1.0], 0.25), given, machine, out=torch.float32, bias=bias())
    expect(found, 0.25 * (x @ w.T) + BIAS, "rocm_per_tensor")


@case("linear/passthrough_refused")
def passthrough_refused(machine: Machine) -> None:
    own, other = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    if machine.fnuz:
        own, other = other, own
    given = torch.zeros((2, K), dtype=torch.uint8)
    with pytest.raises(ValueError, match="fp8 activations: got"):
        apply(layer(machine, weights(), [1.0], 0.25), given.view(other), machine, out=torch.float32)
    with pytest.raises(ValueError, match="and its scale"):
        apply(layer(machine, weights(), [1.0]), given.view(own), machine, out=torch.float32)
    with pytest.raises(ValueError, match="name one by out="):
        apply(layer(machine, weights(), [1.0], 0.25), given.view(own), machine)


@case("linear/padding_rows")
def padding_rows(machine: Machine) -> None:
    """Memory is not zero when it comes."""
    x = torch.tensor(rows(3, top_of(machine)), dtype=torch.float32)
    real = torch.empty

    def dirty(*size: Any, **given: Any) -> torch.Tensor:
        made = real(*size, **given)
        made.view(torch.uint8).fill_(0xA5)
        return made

    ways: tuple[dict[str, Any], ...] = ({"per_token": True}, {}, {"input_scale": torch.tensor([1.0])})
    for arguments in ways:
        with mock.patch.object(torch, "empty", dirty):
            found = quantise(x, machine, padding=17, **arguments)
        assert tuple(found.codes.shape) == (17, K)
        assert found.codes[:3].tolist() == codes(rows(3, top_of(machine)), fnuz=machine.fnuz).tolist()
        assert int(found.codes[3:].count_nonzero()) == 0
        assert found.scale.reshape(-1).tolist()[:3] in ([1.0], [1.0, 1.0, 1.0])


def checkpoint(machine: Machine, w: Array, scale: Any, input_scale: float | None = None) -> Layer:
    """A layer as checkpoints have it: e4m3fn."""
    given = None if input_scale is None else torch.tensor([input_scale])
    return Layer(codes(w, fnuz=False), torch.tensor(scale, dtype=torch.float32), given, fnuz=False)


@case("linear/load_fnuz")
def load_fnuz(machine: Machine) -> None:
    """The layer stands for the same numbers, whatever the chip; a byte 0x80 is minus zero; a second call changes nothing."""
    w, x = weights(), rows(5, 7)
    given = checkpoint(machine, w, [0.5], 0.25)
    given.codes[0, w[0] == 0] = 0x80
    loaded = load(given, [N], machine)
    factor = 2.0 if machine.fnuz else 1.0
    assert loaded.input_scale is not None
    assert (loaded.scale.tolist(), loaded.input_scale.tolist(), loaded.fnuz) == ([0.5 * factor], [0.25 * factor], machine.fnuz)
    assert bool((loaded.codes == 0x80).any()) is not machine.fnuz
    again = load(loaded, [N], machine)
    assert again.codes.tolist() == loaded.codes.tolist()
    assert again.scale.tolist() == loaded.scale.tolist()
    # activations are integers times the static scale that the chip uses: their codes are the integers
    static = float(loaded.input_scale)
    found = apply(loaded, torch.tensor(x * static, dtype=torch.float32), machine, bias=bias())
    expect(found, 0.5 * static * (x @ w.T) + BIAS, "rocm_per_tensor")


WIDTHS = (4, 5, 7)


@case("linear/load_merged")
def load_merged(machine: Machine) -> None:
    """Scales 2, 1 and 1/2 become 2: the codes of the others shrink by the ratio, and 1 to 3 stay numbers of e4m3."""
    w, x = weights(), rows(5, top_of(machine))
    of_w = np.repeat([2.0, 1.0, 0.5], WIDTHS)[:, None]
    loaded = load(checkpoint(machine, w, [2.0, 1.0, 0.5]), WIDTHS, machine)
    assert loaded.scale.tolist() == [4.0 if machine.fnuz else 2.0]
    expect(apply(loaded, torch.tensor(x, dtype=torch.float32), machine), x @ (w * of_w).T, "rocm_per_tensor")
    same = load(checkpoint(machine, w, [2.0, 2.0, 2.0]), WIDTHS, machine)
    assert same.codes.tolist() == codes(w, fnuz=False).tolist()  # bytes of these integers are no -0


@case("linear/load_fused")
def load_fused(machine: Machine) -> None:
    """One scale was stored, for all rows."""
    w, x = weights(), rows(5, top_of(machine))
    least = -3.4028234663852886e38
    loaded = load(checkpoint(machine, w, [0.5, least, least]), WIDTHS, machine)
    assert loaded.scale.tolist() == [1.0 if machine.fnuz else 0.5]
    expect(apply(loaded, torch.tensor(x, dtype=torch.float32), machine), 0.5 * (x @ w.T), "rocm_per_tensor")


@case("linear/load_by_channel")
def load_by_channel(machine: Machine) -> None:
    w, x = weights(), rows(5, top_of(machine))
    of_w = np.repeat([2.0, 0.25, 8.0], WIDTHS)[:, None]
    loaded = load(checkpoint(machine, w, [2.0, 0.25, 8.0]), WIDTHS, machine, by_channel=True)
    assert loaded.scale.tolist() == (of_w * (2.0 if machine.fnuz else 1.0)).tolist()
    expect(apply(loaded, torch.tensor(x, dtype=torch.float32), machine), x @ (w * of_w).T, "torch_channelwise")
