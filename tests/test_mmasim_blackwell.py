"""Blackwell datapaths against the witness mmasim (PyPI, another author's simulator): one node after another, bit for bit.

Decides: whether `dot_emulated` and mmasim's tcgen05.mma agree on random nodes: random operand codes (-0, all-zero and cancelling
groups among them), every block-scale code that the format has, NaN included, and starts c of every kind. Results are compared as
32 bits, so the sign of a zero and the payload of a NaN count. Refuses: to call two values equal that are not the same bits.
The tests draw 10^5 nodes of each instruction; as a program this file draws any number and writes the counts:

    python tests/test_mmasim_blackwell.py --nodes 1000000 --json mmasim.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowbit.references.datapaths import DATAPATHS, Datapath
from lowbit.references.dot import Operand, dot_emulated
from lowbit.references.formats import BF16, E2M1, E4M3FN, E5M2, E8M0, F16, F32, UE4M3, Codes, Format, container, decode

SIDE = 16  # a block is a grid of 16 x 16 nodes: 16 rows of A and of scales against 16 of W, each node with a start of its own
SPECIAL_STARTS = (0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
                  0x7FC00000, 0x7FFFFFFF)

Bits = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Count:
    """What one comparison saw. `differ`: nodes whose 32 bits differ; the next two are the parts of it that are a zero of the
    other sign and a NaN of another payload. The last four count mmasim's results by kind."""

    nodes: int = 0
    differ: int = 0
    zero_signs: int = 0
    nan_payloads: int = 0
    scale_codes: int = 0
    zero: int = 0
    finite: int = 0
    infinite: int = 0
    nan: int = 0


@dataclass(frozen=True, slots=True)
class Witness:
    """One instruction of mmasim beside one of our records. The qualifiers are PTX's; `scale` is None without block scales."""

    path: Datapath
    qualifiers: str
    a: Format
    w: Format
    scale: Format | None = None


WITNESSES = {
    "nvfp4": Witness(DATAPATHS["blackwell_nvfp4"], "m128n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.ue4m3", E2M1, E2M1, UE4M3),
    "mxfp4": Witness(DATAPATHS["blackwell_mxfp4"], "m128n8k64.kind::mxf4.block32.f32.e2m1.e2m1.ue8m0", E2M1, E2M1, E8M0),
    "mxfp8": Witness(DATAPATHS["blackwell_mxf8f6f4"], "m128n8k32.kind::mxf8f6f4.block32.f32.e4m3.e5m2.ue8m0", E4M3FN, E5M2, E8M0),
    "lora_f16": Witness(DATAPATHS["blackwell_f16"], "m128n8k16.kind::f16.f32.f16.f16", F16, F16),
    "lora_bf16": Witness(DATAPATHS["blackwell_bf16"], "m128n8k16.kind::f16.f32.bf16.bf16", BF16, BF16),
}
"""The main product of gemm_nvfp4, its relatives with power-of-two scales, and the low-rank product of both formats."""

_TORCH: dict[str, Any] = {
    "f16": torch.float16, "bf16": torch.bfloat16, "e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu, "ue4m3": torch.float8_e4m3fn, "f32": torch.float32,
}


def instructions() -> Any:
    """mmasim.nv_ptx. Its fused multiply-add of f32 and f64, not compared here, compiles a C++ extension when it is imported; an
    empty module in its place saves the compiler."""
    name = "mmasim.arithmetic.fma"
    if name not in sys.modules:
        empty = ModuleType(name)
        empty.__dict__["MMA_FMA"] = None
        sys.modules[name] = empty
    return importlib.import_module("mmasim.nv_ptx")


def as_tensor(codes: Codes, fmt: Format) -> torch.Tensor:
    """Codes as mmasim takes them. It packs two e2m1 codes per byte, the earlier k in the HIGH nibble (PTX has it in the low one);
    our order is turned into its own here."""
    if fmt is E2M1:
        return torch.from_numpy(codes[..., 0::2] << 4 | codes[..., 1::2])
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[codes.itemsize]
    return torch.from_numpy(np.ascontiguousarray(codes).view(signed)).view(_TORCH[fmt.name])


def drawn_codes(rng: np.random.Generator, fmt: Format, k: int) -> Codes:
    """[SIDE, k] codes of one of four kinds: any bits; sparse; runs of 16 that are zero or not; pairs that may cancel."""
    codes = rng.integers(0, 1 << fmt.bits, (SIDE, k), dtype=np.uint64).astype(container(fmt))
    if fmt is not E2M1 and rng.integers(4):  # three blocks of four hold no infinity and no NaN
        codes[~np.isfinite(decode(codes, fmt))] = 0
    kind = rng.integers(4)
    if kind == 1:
        codes[rng.random(codes.shape) < 0.9] = 0
    elif kind == 2:
        codes[np.repeat(rng.random((SIDE, k // 16)) < 0.5, 16, axis=1)] = 0
    elif kind == 3:
        codes[:, 1::2] = codes[:, 0::2]
        codes[:, 1::2] ^= np.asarray(rng.integers(0, 2, (SIDE, k // 2)) << (fmt.bits - 1), dtype=codes.dtype)
    return codes


def drawn_scales(rng: np.random.Generator, fmt: Format, groups: int) -> Codes:
    """[SIDE, groups] codes: any, or the ends of the format, or neighbours of 1. NaN is among the first two kinds."""
    top = (1 << fmt.bits) - 1
    kind = rng.integers(3)
    if kind == 1:
        return rng.choice([0, 1, 2, top - 2, top - 1, top], (SIDE, groups), p=[0.2, 0.2, 0.2, 0.2, 0.19, 0.01]).astype(np.uint8)
    middle = fmt.bias << fmt.mantissa_bits
    low, high = (0, top + 1) if kind == 0 else (middle - 12, middle + 13)
    return rng.integers(low, high, (SIDE, groups)).astype(np.uint8)


def drawn_starts(rng: np.random.Generator) -> Bits:
    """[SIDE, SIDE] float32 bits, each of one of four kinds: +0; a special value; any bits; an exponent near those of products."""
    shape = (SIDE, SIDE)
    bits = rng.integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32)
    near = bits & 0x807FFFFF | rng.integers(87, 168, shape, dtype=np.uint32) << 23
    kinds = [np.zeros(shape, np.uint32), rng.choice(np.array(SPECIAL_STARTS, np.uint32), shape), bits, near]
    return np.choose(rng.integers(0, 4, shape), kinds)


def stepped(codes: Codes, fmt: Format, path: Datapath, scales: Codes | None) -> Operand:
    """The operand of the references."""
    return Operand(codes, fmt) if scales is None else Operand(codes, fmt, scales, path.scale_format, path.scale_group)


def by_mmasim(witness: Witness) -> Callable[..., Bits]:
    """(a, w, c, a_scale, w_scale) codes of a block -> the 32 bits of every node."""
    ptx = instructions()
    kind = ptx.TCGen05MMABlockScale if witness.scale is not None else ptx.TCGen05MMA
    unit = kind("Blackwell", witness.qualifiers)

    def grid(codes: Codes, fmt: Format, axis: int) -> torch.Tensor:
        vectors = as_tensor(codes, fmt)
        wide = vectors[:, None] if axis == 0 else vectors[None]
        return wide.expand(SIDE, SIDE, -1).clone()

    def node(a: Codes, w: Codes, c: Bits, a_scale: Codes | None, w_scale: Codes | None) -> Bits:
        scales = []
        if witness.scale is not None and a_scale is not None and w_scale is not None:
            scales = [grid(a_scale, witness.scale, 0), grid(w_scale, witness.scale, 1)]
        found = unit.dpa(grid(a, witness.a, 0), grid(w, witness.w, 1), as_tensor(c, F32), *scales)
        bits: Bits = found.contiguous().view(torch.int32).numpy().view(np.uint32)
        return bits

    return node


def compare(name: str, nodes: int, seed: int, alter: Callable[[Bits], Bits] = lambda bits: bits) -> Count:
    """At least `nodes` nodes in blocks of SIDE x SIDE. `alter` is applied to our results before the comparison."""
    witness = WITNESSES[name]
    path, theirs = witness.path, by_mmasim(witness)
    rng = np.random.default_rng(seed)
    total = Count()
    seen: set[int] = set()
    with np.errstate(all="ignore"):
        for _ in range(-(-nodes // SIDE**2)):
            a, w = (drawn_codes(rng, fmt, path.instruction_k) for fmt in (witness.a, witness.w))
            scales: list[Codes | None] = [None, None]
            if witness.scale is not None:
                scales = [drawn_scales(rng, witness.scale, path.instruction_k // path.scale_group) for _ in range(2)]
            seen.update(int(code) for side in scales if side is not None for code in np.unique(side))
            c = drawn_starts(rng)
            want = theirs(a, w, c, *scales)
            left, right = stepped(a, witness.a, path, scales[0]), stepped(w, witness.w, path, scales[1])
            got = alter(dot_emulated(left, right, path, decode(c, F32)).astype(np.uint32))
            total = _added(total, got, want, len(seen))
    return total


def _added(total: Count, got: Bits, want: Bits, codes: int) -> Count:
    unequal, mine, theirs = got != want, got & 0x7FFFFFFF, want & 0x7FFFFFFF
    infinity = 0x7F800000
    found = Count(
        nodes=want.size, differ=int(unequal.sum()), zero_signs=int((unequal & (mine == 0) & (theirs == 0)).sum()),
        nan_payloads=int((unequal & (mine > infinity) & (theirs > infinity)).sum()), zero=int((theirs == 0).sum()),
        finite=int(((theirs > 0) & (theirs < infinity)).sum()), infinite=int((theirs == infinity).sum()),
        nan=int((theirs > infinity).sum()),
    )
    sums = {name: value + getattr(total, name) for name, value in asdict(found).items()}
    return Count(**{**sums, "scale_codes": codes})


@pytest.mark.parametrize("name", list(WITNESSES))
def test_every_node_has_mmasims_bits(name: str) -> None:
    found = compare(name, 100_000, seed=20261120)
    assert found.nodes >= 100_000
    assert found.differ == 0, found
    # the draw is not vacuous: every kind of result, and every code of the block scales
    assert min(found.zero, found.finite, found.infinite, found.nan) > 0, found
    scale = WITNESSES[name].scale
    assert found.scale_codes == (0 if scale is None else 1 << scale.bits)


@pytest.mark.parametrize(("fault", "alter"), [
    ("last bit", lambda bits: bits ^ np.uint32(1)),
    ("sign of zero", lambda bits: np.where(bits == 0, np.uint32(0x80000000), bits)),
    ("payload of NaN", lambda bits: np.where(bits == 0x7FFFFFFF, np.uint32(0x7FC00000), bits)),
])
def test_a_difference_of_any_kind_is_counted(fault: str, alter: Callable[[Bits], Bits]) -> None:
    found = compare("nvfp4", 2_000, 1, alter)
    expected = {"last bit": found.nodes, "sign of zero": found.zero, "payload of NaN": found.nan}[fault]
    assert found.differ == expected
    assert expected > 0


@pytest.mark.parametrize(("field", "value"), [("fraction_bits", 20), ("zero_exponent", 20), ("group", 32), ("output_bits", 14)])
def test_a_record_with_one_number_altered_differs(monkeypatch: pytest.MonkeyPatch, field: str, value: int) -> None:
    witness = WITNESSES["nvfp4"]
    altered = replace(witness, path=replace(witness.path, **{field: value}))  # type: ignore[arg-type]
    monkeypatch.setitem(WITNESSES, "nvfp4", altered)
    assert compare("nvfp4", 2_000, 2).differ > 0


def main(arguments: list[str]) -> int:
    """Compare every pair, print the counts, write them, and end with 1 where anything differed."""
    parser = argparse.ArgumentParser(description="Count the nodes on which the Blackwell datapaths and mmasim differ.")
    parser.add_argument("--nodes", type=int, default=1_000_000, help="nodes per pair, at least")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--json", type=Path, help="file for the counts")
    chosen = parser.parse_args(arguments)
    found = {name: {"datapath": witness.path.name, "instruction": witness.qualifiers,
                    **asdict(compare(name, chosen.nodes, chosen.seed))} for name, witness in WITNESSES.items()}
    for name, row in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    if chosen.json:
        record = {"seed": chosen.seed, "numpy": np.__version__, "torch": torch.__version__, "pairs": found}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(row["differ"] for row in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
