"""The fused CUDA emulator against the definition, bit for bit, with its own source compiled as host C++.

What runs here is every line of cuda_dot.cuh but the launch: taking codes apart, nodes, specials, promotion, putting together,
edges of blocks. The kernel itself runs on a device in tests/device/run_probes.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lowbit.references import cuda_dot
from lowbit.references.datapaths import DATAPATHS, Datapath, Family
from lowbit.references.dot import Operand, dot_emulated, emulate, held_codes
from lowbit.references.formats import E2M1, E4M3FN, E5M2, F16, F32, INT8, UE4M3, UINT8, Codes, Format, Reals, container, decode
from lowbit.references.rounding import Rounding, encode, round_to

ROOT = Path(__file__).parents[1]


def program() -> ModuleType:
    """tests/device/check_torch_twins.py, whose draws cover every kind of operand and start."""
    name = "draws_of_check_torch_twins"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "device" / "check_torch_twins.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


DRAWS = program()
PATHS: dict[str, Datapath] = DRAWS.PATHS
Pair = tuple[str, str, str]


def pairs() -> Iterator[Pair]:
    """Every record, shipped or altered, with every pair of its operand formats."""
    for name, path in PATHS.items():
        yield from ((name, a.name, w.name) for a in path.operands for w in path.operands)


CONFIGURATIONS = tuple(pairs())


class Host:
    """The emulator as a shared library: `run(a, w, path name, start codes, segment)` -> codes [B, M, N]."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def __call__(self, a: Operand, w: Operand, name: str, start: Codes | None = None, segment: int = 0, batch: int = 1) -> Codes:
        path = PATHS[name]
        (m, k), n = a.codes.shape, w.codes.shape[0]
        m, n = m // batch, n // batch
        out = np.full((batch, m, n), 0x5A, dtype=container(path.output))
        arrays = [np.ascontiguousarray(x) for x in (a.codes, w.codes, a.scales if a.scales is not None else a.codes,
                                                    w.scales if w.scales is not None else w.codes,
                                                    out if start is None else start)]
        entry = getattr(self.library, f"run_{CONFIGURATIONS.index((name, a.format.name, w.format.name))}")
        entry(*(x.ctypes.data_as(ctypes.c_void_p) for x in (*arrays, out)), m, n, k, segment, int(start is not None), batch)
        return out


def translation_unit() -> str:
    formats = {fmt.name: fmt for path in PATHS.values() for fmt in path.operands}
    return cuda_dot.host_source({
        f"run_{index}": (PATHS[name], formats[a], formats[w]) for index, (name, a, w) in enumerate(CONFIGURATIONS)
    })


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("cuda_dot")
    (folder / "host.cpp").write_text(translation_unit(), encoding="utf-8")
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", "host.so", "host.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return Host(folder / "host.so")


@pytest.mark.parametrize("name", PATHS)
def test_the_definition_is_met_on_every_kind_of_operand_and_start(name: str, host: Host) -> None:
    path, results = PATHS[name], {"zero": 0, "finite": 0, "infinite": 0, "nan": 0}
    size = replace(DRAWS.SMALL, rows=4)
    for task in (t for t in DRAWS.dot_tasks(size) if t.path == name):
        reference = DRAWS.dot_reference(task)
        a, w = DRAWS.rebuilt(reference.a, path), DRAWS.rebuilt(reference.w, path)
        start = None if reference.start is None else start_codes(reference.start, path)
        got = host(a, w, name, start)[0]
        assert np.array_equal(got, reference.want.astype(got.dtype)), (task, got, reference.want)
        results = {kind: results[kind] + count for kind, count in reference.results.items()}
    assert results["zero"]
    assert results["finite"] > 300
    if path.family is not Family.INTEGER:
        assert results["infinite"]
        assert results["nan"]


def test_operands_are_cut_before_specials_are_told(host: Host) -> None:
    """tf32 reads the upper ten of 23 fraction bits: 0x7F800001 times 1 is an infinity, 0x7F802000 a NaN (E9 on H200)."""
    words = Operand(np.array([[0x3F801FFF], [0x7F800001], [0xFF801FFF], [0x7F802000]], np.uint32), F32)
    got = host(words, Operand(np.array([[0x3F800000]], np.uint32), F32), "hopper_tf32")
    assert got[0, :, 0].tolist() == [0x3F800000, 0x7F800000, 0xFF800000, 0x7FFFFFFF]


def start_codes(start: Reals, path: Datapath) -> Codes:
    return start.astype(np.int32).view(np.uint32) if path.family is Family.INTEGER else held_codes(start, path)


def codes(seed: int, shape: tuple[int, ...], fmt: Format) -> Codes:
    return encode(np.random.default_rng(seed).standard_normal(shape) * 3, fmt)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (31, 33), (33, 31), (64, 32), (65, 1)])
def test_blocks_meet_at_their_edges(m: int, n: int, host: Host) -> None:
    a, w = Operand(codes(m, (m, 65), E4M3FN), E4M3FN), Operand(codes(100 + n, (n, 65), E4M3FN), E4M3FN)
    want = dot_emulated(a, w, DATAPATHS["hopper_wgmma_fp8"])
    assert np.array_equal(host(a, w, "hopper_wgmma_fp8")[0], want)


def test_tiles_of_one_launch_do_not_mix(host: Host) -> None:
    path = DATAPATHS["hopper_mma_fp8"]
    a, w = codes(1, (5, 16, 32), E5M2), codes(2, (5, 8, 32), E5M2)
    start = encode(np.random.default_rng(3).standard_normal((5, 16, 8)), F32)
    got = host(Operand(a.reshape(80, 32), E5M2), Operand(w.reshape(40, 32), E5M2), path.name, start, batch=5)
    for i in range(5):
        assert np.array_equal(got[i], dot_emulated(Operand(a[i], E5M2), Operand(w[i], E5M2), path, decode(start[i], F32)))


@pytest.mark.parametrize(("name", "fmt", "k", "segment"), [
    ("hopper_wgmma_fp8", E4M3FN, 416, 128), ("hopper_wgmma_fp8", E4M3FN, 128, 32), ("hopper_tf32", F32, 72, 24),
    ("hopper_f16_f16", F16, 100, 48), ("blackwell_nvfp4", E2M1, 320, 128),
])
def test_segments_are_summed_from_zero_and_added_to_nearest_even(
    name: str, fmt: Format, k: int, segment: int, host: Host
) -> None:
    path = DATAPATHS[name]
    a, w = operand(4, 9, k, fmt, path), operand(5, 7, k, fmt, path)
    start = round_to(np.random.default_rng(6).standard_normal((9, 7)), path.output)
    total: Reals = start
    for first in range(0, k, segment):
        parts = [part(op, first, segment) for op in (a, w)]
        total = round_to(total + decode(emulate(parts[0], parts[1], path), path.output), path.output)
    got = host(a, w, name, held_codes(start, path), segment)[0]
    assert np.array_equal(got, held_codes(total, path))
    assert not np.array_equal(got, host(a, w, name, held_codes(start, path))[0])  # one chain gives other bits here


def operand(seed: int, rows: int, k: int, fmt: Format, path: Datapath) -> Operand:
    if path.scale_format is None:
        return Operand(codes(seed, (rows, k), fmt), fmt)
    scales = encode(np.random.default_rng(seed + 50).uniform(0.01, 2, (rows, k // path.scale_group)), path.scale_format)
    return Operand(codes(seed, (rows, k), fmt), fmt, scales, path.scale_format, path.scale_group)


def part(op: Operand, first: int, length: int) -> Operand:
    at = slice(first, first + length)
    if op.scales is None:
        return replace(op, codes=op.codes[:, at])
    scales = op.scales[:, first // op.group : -(-(first + length) // op.group)]
    return replace(op, codes=op.codes[:, at], scales=scales)


def test_random_bit_patterns_of_a_hopper_node_by_the_hundred_thousand(host: Host) -> None:
    rng = np.random.default_rng(7)
    for name, left, right in (("hopper_wgmma_fp8", E4M3FN, E5M2), ("hopper_mma_fp8_f16", E5M2, E4M3FN)):
        path = DATAPATHS[name]
        a, w = (Operand(rng.integers(0, 256, (300, 32)).astype(np.uint8), fmt) for fmt in (left, right))
        start = rng.integers(0, 1 << path.output.bits, (300, 300), dtype=np.uint64).astype(container(path.output))
        with np.errstate(invalid="ignore"):
            want = emulate(a, w, path, decode(start, path.output))
        assert np.array_equal(host(a, w, name, start)[0], want)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_host_form_gives_the_same_bits_whatever_its_threads(threads: int) -> None:
    rng = np.random.default_rng(8)
    path = DATAPATHS["hopper_wgmma_fp8"]
    a, w = (Operand(rng.integers(0, 256, (rows, 70)).astype(np.uint8), E4M3FN) for rows in (71, 40))
    plain = Operand(a.codes & 0x7E, E4M3FN), Operand(w.codes & 0xFE, E4M3FN)  # no NaN
    start = round_to(rng.standard_normal((71, 40)), path.output)
    for left, right in ((a, w), plain):
        assert np.array_equal(cuda_dot.dot_emulated_host(left, right, path, start, threads=threads),
                              dot_emulated(left, right, path, start))
        assert np.array_equal(cuda_dot.dot_emulated_host(left, right, path, threads=threads), dot_emulated(left, right, path))


def test_the_host_form_takes_scales_segments_and_integers() -> None:
    path = DATAPATHS["blackwell_nvfp4"]
    a, w = operand(9, 33, 256, E2M1, path), operand(10, 5, 256, E2M1, path)
    first, second = (decode(emulate(part(a, k, 128), part(w, k, 128), path), F32) for k in (0, 128))
    assert np.array_equal(cuda_dot.dot_emulated_host(a, w, path, segment=128), held_codes(round_to(first + second, F32), path))
    rng = np.random.default_rng(11)
    left, right = (Operand(rng.integers(0, 256, (40, 50)).astype(np.uint8), fmt) for fmt in (INT8, UINT8))
    start = rng.integers(-(1 << 31), 1 << 31, (40, 40)).astype(np.float64)
    for name in ("imma_s32", "imma_s32_satfinite"):
        want = dot_emulated(left, right, DATAPATHS[name], start)
        assert np.array_equal(cuda_dot.dot_emulated_host(left, right, DATAPATHS[name], start), want)


def test_a_host_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    ones = Operand(np.ones((2, 32), np.uint8), E5M2)
    with pytest.raises(RuntimeError, match="got no g\\+\\+ on PATH"):
        cuda_dot.dot_emulated_host(ones, ones, DATAPATHS["ada_fp8"])


# What it must notice, and what it refuses -----------------------------------------------------------------------------


ALTERATIONS: dict[str, Callable[[Datapath], Datapath]] = {
    "one fraction bit less": lambda p: replace(p, fraction_bits=p.fraction_bits - 1),
    "floor": lambda p: replace(p, alignment_rounding=Rounding.FLOOR),
    "one output bit more": lambda p: replace(p, output_bits=p.output_bits + 1),
    "half the products": lambda p: replace(p, products=p.products // 2),
    "no zero exponent": lambda p: replace(p, zero_exponent=-300),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_every_constant_of_the_record_reaches_the_source(alteration: str) -> None:
    path = DATAPATHS["hopper_wgmma_fp8"]
    other = cuda_dot.structure(ALTERATIONS[alteration](path), E4M3FN, E4M3FN)
    changed = set(other.splitlines()) ^ set(cuda_dot.structure(path, E4M3FN, E4M3FN).splitlines())
    assert len(changed) == 2  # one line before, one after


def test_the_source_of_a_kernel_names_its_entry_and_holds_its_record() -> None:
    text = cuda_dot.source(DATAPATHS["blackwell_nvfp4"], E2M1, E2M1)
    assert 'extern "C" __global__' in text
    assert "static constexpr int fraction_bits = 35;" in text
    assert "static constexpr int fraction_bits_a = 4;" in text  # 3 of the ue4m3 scale and 1 of e2m1


def refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    path, ones = DATAPATHS["hopper_wgmma_fp8"], Operand(np.ones((2, 32), np.uint8), E4M3FN)
    integers = Operand(np.ones((2, 32), np.uint8), INT8)
    scaled = Operand(np.ones((2, 64), np.uint8), E2M1, np.ones((2, 4), np.uint8), UE4M3, 16)
    return {
        "family": (lambda: cuda_dot.structure(DATAPATHS["ieee_f32"], F16, F16), "family IEEE"),
        "format": (lambda: cuda_dot.structure(path, E4M3FN, UINT8), "operand format uint8"),
        "segment": (lambda: cuda_dot.check_segment(48, path), "segments of 48"),
        "negative segment": (lambda: cuda_dot.check_segment(-32, path), "segments of -32"),
        "integer segment": (lambda: cuda_dot.check_segment(32, DATAPATHS["imma_s32"]), "integer sums"),
        "K": (lambda: cuda_dot.dot_emulated_cuda(ones, replace(ones, codes=ones.codes[:, :16]), path), "one K"),
        "scales": (lambda: cuda_dot.dot_emulated_cuda(
            replace(ones, scales=np.ones((2, 2), np.uint8), scale_format=UE4M3, group=16), ones, path), "block scales"),
        "start": (lambda: cuda_dot.dot_emulated_cuda(ones, ones, path, np.full((2, 2), 0.1)), "start value outside"),
        "cpu": (lambda: cuda_dot.dot_emulated_cuda(ones, ones, path, device="cpu"), "expected a CUDA device"),
        "cpu, integers": (lambda: cuda_dot.dot_emulated_cuda(
            integers, integers, DATAPATHS["imma_s32"], np.ones((2, 2)), "cpu"), "expected a CUDA device"),
        "cpu, scaled": (lambda: cuda_dot.dot_emulated_cuda(
            scaled, scaled, DATAPATHS["blackwell_nvfp4"], None, "cpu"), "expected a CUDA device"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_it_cannot_compute_is_refused_before_anything_is_launched(case: str) -> None:
    call, sentence = refusals()[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_tiles_of_another_shape_or_dtype_are_refused() -> None:
    import torch

    path = DATAPATHS["hopper_wgmma_fp8"]
    a, w = torch.zeros(3, 16, 32, dtype=torch.uint8), torch.zeros(3, 8, 32, dtype=torch.uint8)
    for wrong in (w[:2], w[:, :, :16], w.to(torch.int32)):
        with pytest.raises(ValueError, match=r"expected torch\.uint8"):
            cuda_dot.emulate_tiles(a, wrong, path, (E4M3FN, E4M3FN))
    with pytest.raises(ValueError, match=r"expected torch.int32 \(3, 16, 8\)"):
        cuda_dot.emulate_tiles(a, w, path, (E4M3FN, E4M3FN), torch.zeros(3, 16, 8))
    with pytest.raises(ValueError, match="block scales True"):
        cuda_dot.emulate_tiles(a, w, path, (E4M3FN, E4M3FN), scales=(a, w))


