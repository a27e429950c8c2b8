"""Cases of the dispatch, by id; pure Python. tests/test_rocm_backend.py runs them all, docs/w8a8_utils.md names them.

Expected values are read off the source system's conditions and written down here, never computed by the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from lowbit.kernels.rocm_room.dispatch import (
    LEAST_BINARY32,
    Call,
    cutlass_supports,
    fused_on_disk,
    one_scale,
    padding_of,
    per_row_product,
    product_of,
    takes_skinny,
)

__all__ = ["CASES"]

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enter a function under its id."""
    def enter(run: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES
        CASES[name] = run
        return run

    return enter


PRODUCTS = {"X": "cutlass", "R": "rocm_per_tensor", "P": "torch_per_tensor", "T": "torch_per_token", "C": "torch_channelwise"}
TABLE = (  # cutlass, one weight scale, one activation scale, per token, rocm, per row: counted up in binary, the last bit fastest
    "CCCC" "CTCT"  # two vectors: a product with vectors needs a scale per token and the platform's word
    "CCCC" "CCCC" "CCCC" "CCCC"  # one vector
    "PPRR" "PPRR"  # two scalars
    + "X" * 32
)


@case("dispatch/products")
def products() -> None:
    rows = product((False, True), repeat=6)
    assert [product_of(Call(*row)) for row in rows] == [PRODUCTS[letter] for letter in TABLE]


@case("dispatch/cutlass_fp8")
def cutlass_fp8() -> None:
    asked = {(90, 12000): True, (90, 11080): False, (89, 12040): True, (89, 12030): False, (100, 12080): True, (80, 13000): False}
    assert {row: cutlass_supports("fp8", capability=row[0], cuda=row[1]) for row in asked} == asked
    assert not cutlass_supports("fp8", capability=None, cuda=12080)  # no device: the source asks with -1
    assert not cutlass_supports("fp8", capability=94, cuda=None)  # ROCm


@case("dispatch/cutlass_block_fp8")
def cutlass_block_fp8() -> None:
    asked = {(90, 12000): True, (90, 11080): False, (89, 13000): False, (100, 12080): True, (100, 12060): False}
    assert {row: cutlass_supports("block_fp8", capability=row[0], cuda=row[1]) for row in asked} == asked
    assert not cutlass_supports("block_fp8", capability=95, cuda=None)


@case("dispatch/cutlass_group_gemm")
def cutlass_group_gemm() -> None:
    asked = {(90, 12030): True, (90, 12020): False, (89, 13000): False, (100, 12080): True, (100, 12030): False}
    assert {row: cutlass_supports("group_gemm", capability=row[0], cuda=row[1]) for row in asked} == asked
    assert not cutlass_supports("group_gemm", capability=None, cuda=None)


@case("dispatch/cutlass_sparse")
def cutlass_sparse() -> None:
    asked = {(90, 12020): True, (90, 12010): False, (89, 12020): False, (100, 12020): True}
    assert {row: cutlass_supports("sparse", capability=row[0], cuda=row[1]) for row in asked} == asked
    assert not cutlass_supports("sparse", capability=94, cuda=None)


@case("dispatch/per_row")
def per_row() -> None:
    """2.10 is later than 2.7: as text its first three characters, 2.1, are less."""
    later = {"1.13.1": False, "2.6.1": False, "2.7.0a0+git": True, "2.10.0": True, "2.13.0+rocm7.2": True, "3.0.0": True}
    assert {text: per_row_product(rocm=True, torch_version=text, capability=94) for text in later} == later
    assert per_row_product(rocm=True, torch_version="2.10.0", capability=95)  # gfx950
    assert not per_row_product(rocm=True, torch_version="2.10.0", capability=90)  # gfx90a has no fp8
    assert not per_row_product(rocm=False, torch_version="2.10.0", capability=100)


@case("dispatch/padding")
def padding() -> None:
    """Asked or by default, compiled or not, and never on ROCm."""
    rows = {(False, False, None): 17, (False, True, None): None, (False, True, True): 17, (False, False, False): None,
            (True, False, None): None, (True, False, True): None, (True, True, None): None}
    assert {row: padding_of(rocm=row[0], compiled=row[1], asked=row[2]) for row in rows} == rows


@case("dispatch/skinny")
def skinny() -> None:
    rows = {(1, 16): True, (1, 4096): True, (4, 512): True, (5, 512): False, (0, 512): False, (1, 24): False, (17, 4096): False}
    assert {row: takes_skinny(*row, one_scale_each=True, own_format=True) for row in rows} == rows
    assert not takes_skinny(1, 512, one_scale_each=False, own_format=True)
    assert not takes_skinny(1, 512, one_scale_each=True, own_format=False)
    assert not takes_skinny(1, 512, one_scale_each=True, own_format=True, enabled=False)


@case("dispatch/one_scale")
def equal_scales() -> None:
    """The source compares to a relative 1e-5 and an absolute 1e-8: it takes 1e-9 and 2e-9 for one scale, a factor of two."""
    assert one_scale([0.125, 0.125, 0.125])
    assert one_scale([0.125])
    assert not one_scale([0.125, 0.125, 0.125000002])
    assert not one_scale([1e-9, 2e-9])


@case("dispatch/fused_on_disk")
def fused() -> None:
    """Slots hold the least finite value until they are filled; doubled for e4m3fnuz they are minus infinity."""
    assert fused_on_disk([0.5, LEAST_BINARY32, LEAST_BINARY32])
    assert fused_on_disk([0.5, float("-inf")])
    assert not fused_on_disk([0.5, 0.25])
    assert not fused_on_disk([0.5, -449.0])  # the source asks for more than -448, the least e4m3fn
