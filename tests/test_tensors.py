"""The lane of real weights: the file, the cases it gives, the weights made of it, and that the lane sees faults.

Files are written byte by byte as the format says, not by the library that reads them. Expected codes are worked out by hand; each
comment says how. A matrix named `hand` has values whose quotients are exact, so that a code follows from one rounding at most.
"""

from __future__ import annotations

import json
import shlex
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from lowbit.conformance.backend import TensorView
from lowbit.conformance.case import Case, Operands, Problem
from lowbit.conformance.cli import main
from lowbit.conformance.exit_codes import ExitCode
from lowbit.conformance.op import DomainError, Role, parse_case, tensors_of
from lowbit.conformance.ops import ops
from lowbit.conformance.patterns import draw_operands
from lowbit.conformance.report import ReportError
from lowbit.conformance.run import run_one
from lowbit.conformance.tensors import digest, load, tensor_cases, tensor_operands
from lowbit.conformance.verdict import Status
from lowbit.kernels.cpu import backend as cpu

Array = npt.NDArray[Any]
GEMMS = ("gemm_w4a16", "gemm_w8a8_fp8", "gemm_w4a8_fp8", "gemm_w4a8_int8", "gemm_nvfp4", "gemm_int4")
_BYTES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I8": "<i1", "F8_E4M3": "<u1"}
INFINITY = float("inf")


def written(path: Path, tensors: Mapping[str, tuple[str, Any]]) -> Path:
    """A safetensors file: a 64-bit length, that many bytes of JSON, the data. BF16 is given as its codes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        array = np.asarray(values, dtype=_BYTES[dtype])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def bf16(values: Any) -> Array:
    """Codes of values that bfloat16 holds: the upper half of their binary32 pattern."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def operands_of(text: str, source: object) -> Operands:
    case = parse_case(text, ops())
    return tensor_operands(ops()[case.problem.op], case, str(source))


def codes_of(text: str, source: object, *names: str) -> list[Any]:
    found = operands_of(text, source)
    return [found[name].codes.tolist() for name in names]


def ids(source: object, *names: str) -> list[str]:
    return [str(case) for case in tensor_cases(str(source), names)]


def spread(shape: tuple[int, int]) -> Array:
    """Values in -1/8..1/8 that follow no pattern a kernel could share: a multiplicative sequence of integers times 2^-18."""
    index = np.arange(shape[0] * shape[1], dtype=np.uint64)
    words = (index * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(1 << 16)
    return (words.astype(np.int64) - (1 << 15)).reshape(shape) * 2.0**-18


def command(*arguments: object) -> int:
    """Exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


# The file ------------------------------------------------------------------------------------------------------------


def test_values_of_each_format_are_the_numbers_stored(tmp_path: Path) -> None:
    codes = [[0x8000, 0x0001, 0x3F80, 0x7F7F], [0xBF81, 0x0000, 0x7F80, 0xC2C8]]
    halves = [[-0.0, 2.0**-24, 1.0, 65504.0], [-1.0009765625, 0.0, INFINITY, -100.0]]
    singles = [[-0.0, 2.0**-149, 1.0, 3.4028234663852886e38], [-1.00000011920928955078125, 0.0, INFINITY, -100.0]]
    path = written(tmp_path / "a.safetensors", {"c": ("F32", singles), "a": ("BF16", codes), "b": ("F16", halves)})
    weights = load(str(path))
    assert [matrix.name for matrix in weights.matrices] == ["a", "b", "c"]
    # bf16: 0x0001 is 2^-133, 0x7F7F is (2 - 2^-7) 2^127, 0xBF81 is -(1 + 2^-7), 0xC2C8 is -(1 + 72/128) 64
    expected = [[-0.0, 2.0**-133, 1.0, (2 - 2.0**-7) * 2.0**127], [-1.0078125, 0.0, INFINITY, -100.0]]
    for number, values in ((1, expected), (2, halves), (3, singles)):
        assert weights.values(number, 2, 4).tolist() == values
        assert np.signbit(weights.values(number, 2, 4)).tolist() == np.signbit(values).tolist()
        assert weights.values(number, 1, 3).tolist() == [values[0][:3]]


def test_files_of_the_library_read_as_the_library_reads_them(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "x.y": spread((24, 40)).astype(np.float16), "b": spread((8, 16)).astype(np.float32), "c": np.ones(3, np.float32),
    }
    save_file(arrays, tmp_path / "lib.safetensors")
    weights = load(str(tmp_path / "lib.safetensors"))
    assert [(matrix.name, matrix.shape) for matrix in weights.matrices] == [("b", (8, 16)), ("x.y", (24, 40))]
    for number, matrix in enumerate(weights.matrices, 1):
        assert (weights.values(number, *matrix.shape) == arrays[matrix.name]).all()


def test_only_matrices_of_floating_point_are_matched(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {
        "vector": ("F32", [1.0]), "integers": ("I32", [[1]]), "bytes": ("F8_E4M3", [[1]]), "double": ("F64", [[1.0]]),
        "cube": ("F16", [[[1.0]]]), "empty": ("F32", np.zeros((0, 4))), "z": ("F32", [[1.0]]), "m": ("BF16", [[1]]),
    })
    assert [matrix.name for matrix in load(str(path)).matrices] == ["m", "z"]


def test_a_glob_numbers_the_matrices_it_matches(tmp_path: Path) -> None:
    names = ["layers.10.q", "layers.2.q", "layers.2.k", "Layers.2.q", "head"]
    path = written(tmp_path / "a.safetensors", {name: ("F32", [[float(number)]]) for number, name in enumerate(names)})

    def matched(glob: str) -> list[float]:
        weights = load(f"{path}{glob}")
        return [float(weights.values(number, 1, 1)[0, 0]) for number in range(1, len(weights.matrices) + 1)]

    assert matched("") == matched(":") == matched(":*") == [3, 4, 0, 2, 1]  # in order of code points
    assert matched(":layers.*.q") == [0, 1]
    assert matched(":*.q") == [3, 0, 1]
    assert matched(":layers.[0-9].?") == [2, 1]
    assert matched(":head") == [4]


def test_the_longest_prefix_that_is_a_file_is_the_file(tmp_path: Path) -> None:
    plain = written(tmp_path / "a", {"b:c": ("F32", [[1.0]]), "d": ("F32", [[2.0]])})
    assert [matrix.name for matrix in load(f"{plain}:b:c").matrices] == ["b:c"]
    colon = written(tmp_path / "a:d", {"e": ("F32", [[3.0]])})
    assert load(f"{colon}").path == colon
    assert [matrix.name for matrix in load(f"{colon}:e").matrices] == ["e"]


def test_digest_is_that_of_the_file_whatever_the_glob(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert digest(f"{path}:*q*") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _large(path: Path, rows: int, columns: int) -> Path:
    """A file of one F32 matrix whose data is a hole of the file system, but for one in the second row."""
    size = 4 * rows * columns
    text = json.dumps({"w": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(4 * columns, 1)
        file.write(np.ones(1, "<f4").tobytes())
        file.truncate(8 + len(text) + size)
    return path


def test_memory_holds_the_rows_asked_for_and_not_the_file(tmp_path: Path) -> None:
    rows, columns = 1 << 22, 256  # 4 GiB
    path = _large(tmp_path / "large.safetensors", rows, columns)
    tracemalloc.start()
    try:
        weights = load(str(path))
        assert weights.values(1, 256, columns).sum() == 1.0
        assert ids(path, "gemm_nvfp4") == ["gemm_nvfp4/plain/m17n1024k256r0/bf16/tensors/s1"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def _defective(folder: Path) -> dict[str, tuple[str, str]]:
    """Kind of input -> (text of --tensors, words of its sentence)."""
    good = written(folder / "good.safetensors", {"w": ("F32", np.ones((8, 64)))})
    whole = good.read_bytes()
    text = b"[model]\nname = 'x'\n"
    damaged = {"truncated": whole[:-4], "longer": whole + b"1234", "empty": b"", "short": whole[:4], "text": text}
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    written(folder / "other", {"norm": ("F32", [1.0]), "ids": ("I32", [[1]]), "codes": ("F8_E4M3", [[1]])})
    written(folder / "none", {})
    written(folder / "odd", {"w": ("F32", [[1.0, 2.0, 3.0]])})
    broken = "is not a whole safetensors file"
    return {
        "missing": (f"{folder}/nowhere.safetensors:*", "there is no such file; give FILE.safetensors or FILE.safetensors:GLOB"),
        "folder": (f"{folder}", "there is no such file"),
        "truncated": (f"{folder}/truncated", broken), "longer": (f"{folder}/longer", broken),
        "empty": (f"{folder}/empty", broken), "short": (f"{folder}/short:*", broken), "text": (f"{folder}/text", broken),
        "no match": (f"{good}:*.q_proj", "'*.q_proj' matches no BF16, F16 or F32 matrix; the file holds w F32 [8, 64]"),
        "vector": (f"{folder}/other:norm", "'norm' matches no BF16, F16 or F32 matrix; it matches norm F32 [1]"),
        "integers": (f"{folder}/other:ids", "it matches ids I32 [1, 1]"),
        "none of many": (f"{folder}/other", "it matches codes F8_E4M3 [1, 1], ids I32 [1, 1], norm F32 [1]"),
        "no tensors": (f"{folder}/none", "the file holds no tensor"),
        "shape": (f"{folder}/odd", "gemm_nvfp4 admits none of these shapes: w [1, 3]"),
    }


@pytest.mark.parametrize("kind", [
    "missing", "folder", "truncated", "longer", "empty", "short", "text", "no match", "vector", "integers", "none of many",
    "no tensors", "shape",
])
def test_a_bad_file_is_one_sentence_and_code_3(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, words = _defective(tmp_path)[kind]
    out = tmp_path / "out"
    code = command("certify", "cpu", "--ops", "gemm_nvfp4", "--per-op", 1, "--tensors", source, "--out", out)
    assert code == ExitCode.BAD_INPUT
    said = capsys.readouterr()
    assert said.err.startswith(f"lowbit: --tensors {source}: ")
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (out / "report.json").exists()


def test_ops_without_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a", {"w": ("F32", np.ones((8, 64)))})
    words = r"int4_pack, scale_fold takes no real weights; those that do are gemm_w4a16, .*svdquant_quantize"
    with pytest.raises(ReportError, match=words):
        tensor_cases(str(path), ("int4_pack", "scale_fold"))
    assert ids(path, "int4_pack", "gemm_int4")[0] == "gemm_int4/f32/m17n8k64r0/f16/tensors/s1"


# The cases -----------------------------------------------------------------------------------------------------------


def test_gemm_cases_are_the_largest_problems_that_a_matrix_fills(tmp_path: Path) -> None:
    shapes = {"a": (20, 160), "b": (2000, 256), "c": (8, 40), "d": (7, 256)}
    path = written(tmp_path / "a", {name: ("F32", np.zeros(shape)) for name, shape in shapes.items()})
    # a: N to a multiple of 8; 32 is the largest group in 160. c: only its own K is a group; 40 is no multiple of 16. d: N < 8
    assert ids(path, *GEMMS) == [
        "gemm_w4a16/sym/m17n16k160g32/bf16/tensors/s1", "gemm_w4a16/sym/m17n1024k256g128/bf16/tensors/s2",
        "gemm_w4a16/sym/m17n8k40g40/bf16/tensors/s3",
        "gemm_w4a16/sym/m17n16k160g32/f16/tensors/s1", "gemm_w4a16/sym/m17n1024k256g128/f16/tensors/s2",
        "gemm_w4a16/sym/m17n8k40g40/f16/tensors/s3",
        "gemm_w4a16/zp/m17n16k160g32/f16/tensors/s1", "gemm_w4a16/zp/m17n1024k256g128/f16/tensors/s2",
        "gemm_w4a16/zp/m17n8k40g40/f16/tensors/s3",
        "gemm_w8a8_fp8/scaled/m17n16k160/bf16/tensors/s1", "gemm_w8a8_fp8/scaled/m17n1024k256/bf16/tensors/s2",
        "gemm_w8a8_fp8/block/m17n1024k256/bf16/tensors/s2",
        "gemm_w4a8_fp8/folded/m17n1024k256g128/bf16/tensors/s2", "gemm_w4a8_fp8/exact/m17n1024k256g128/bf16/tensors/s2",
        "gemm_w4a8_int8/direct/m17n16k160g32/f16/tensors/s1", "gemm_w4a8_int8/direct/m17n1024k256g128/f16/tensors/s2",
        "gemm_w4a8_int8/direct/m17n8k40g40/f16/tensors/s3",
        "gemm_nvfp4/plain/m17n16k160r0/bf16/tensors/s1", "gemm_nvfp4/plain/m17n1024k256r0/bf16/tensors/s2",
        "gemm_int4/f32/m17n1024k256r0/f16/tensors/s2", "gemm_int4/half/m17n1024k256r0/bf16/tensors/s2",
    ]


def test_quantisers_see_every_recipe_on_a_few_hundred_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a", {"a": ("F32", np.zeros((300, 256))), "b": ("F32", np.zeros((200, 256)))})
    # clauses QNT-31, QNT-21, QNT-10, QNT-41 and QNT-61: recipes by variant
    counts = {
        "int4_quantize": 4 + 1 + 2, "int8_quantize": 2, "fp8_quantize": 2 + 2 + 2 + 3 + 1, "nvfp4_quantize": 8 + 8 + 4,
        "svdquant_quantize": 3 + 2,
    }
    for name, count in counts.items():
        found = ids(path, name)
        assert len(found) == len(set(found)) == 2 * count
        rows = [dict(parse_case(text, ops()).problem.dims) for text in found]
        assert {dims.get("n", dims.get("m")) for dims in rows} == ({256, 200, 128} if name == "fp8_quantize" else {256, 200})
    assert "fp8_quantize/tile/m128k256p0/bf16.deepgemm/tensors/s2" in ids(path, "fp8_quantize")  # whole tiles
    assert "int4_quantize/sym/n256k256g64/bf16.svdquant/tensors/s1" in ids(path, "int4_quantize")  # its only group
    assert "nvfp4_quantize/static/m256k256/bf16/tensors/s1" in ids(path, "nvfp4_quantize")


def test_every_case_has_operands_of_the_problem_and_each_matrix_its_own(tmp_path: Path) -> None:
    edges = spread((136, 256))
    edges[3], edges[4, :], edges[5, ::2], edges[6, 7], edges[7] = 0.0, -0.0, -0.0, 3e38, 2.0**-149
    half = bf16(np.full((136, 256), 0.5))
    path = written(tmp_path / "a", {"a": ("F32", edges), "b": ("BF16", half), "c": ("F16", spread((16, 32)))})
    cases = tensor_cases(str(path))
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.seed for case in cases} == {1, 2, 3}
    digests: dict[Problem, list[str]] = {}
    for case in cases:
        assert parse_case(str(case), ops()) == case
        found = tensor_operands(ops()[case.problem.op], case, str(path))
        specs = {spec.name: spec for spec in tensors_of(ops()[case.problem.op], case.problem) if spec.role is not Role.OUTPUT}
        assert {name: (tensor.codes.shape, tensor.format) for name, tensor in found.items()} == {
            name: (spec.shape, spec.format) for name, spec in specs.items()}
        digests.setdefault(case.problem, []).append(found.sha256())
    assert max(map(len, digests.values())) == 2  # a and b have one shape
    assert all(len(set(found)) == len(found) for found in digests.values())


def test_a_case_takes_the_first_rows_and_columns_and_no_more(tmp_path: Path) -> None:
    path = written(tmp_path / "a", {"w": ("F32", np.arange(64.0).reshape(4, 16))})
    for dims, values in (("m2k3", [[0, 1, 2], [16, 17, 18]]), ("m4k1", [[0], [16], [32], [48]])):
        assert operands_of(f"int8_quantize/token/{dims}/f32/tensors/s1", path)["x"].codes.view(np.float32).tolist() == values
    for text, words in (
        ("int8_quantize/token/m5k16/f32/tensors/s1", r"seed s1 is w \[4, 16\], smaller than \[5, 16\]"),
        ("int8_quantize/token/m4k17/f32/tensors/s1", r"smaller than \[4, 17\]"),
        ("int8_quantize/token/m4k16/f32/tensors/s2", "seed s2: .* matches 1 matrices, numbered from s1"),
        ("int8_quantize/token/m4k16/f32/tensors/s0", "seed s0: "),
    ):
        with pytest.raises(DomainError, match=words):
            operands_of(text, path)
    with pytest.raises(DomainError, match=r"its weights are in a file; give it by --tensors FILE.safetensors\[:GLOB\]"):
        operands_of("int8_quantize/token/m4k16/f32/tensors/s1", "")


# The weights ---------------------------------------------------------------------------------------------------------

EIGHTHS = [7 / 8, -1.0, 1 / 16, 3 / 16, -1 / 16, 0.0, 5 / 16, -5 / 16, 1 / 8, -0.0, 0, 0, 0, 0, 0, 0]
"""Over 1/8: 7 -8 .5 1.5 -.5 0 2.5 -2.5 1 0 ...; ties to even give 7 -8 0 2 0 0 2 -2 1 0 ..."""
ROUNDED = [7, -8, 0, 2, 0, 0, 2, -2, 1, 0, 0, 0, 0, 0, 0, 0]


def test_w4a16_by_hand(tmp_path: Path) -> None:
    hand = np.zeros((8, 16))
    hand[0], hand[1], hand[2], hand[3] = EIGHTHS, -0.25, 1.0, 0.0
    hand[1, 5], hand[2, 0] = -2.0, 448.0
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    w, scale = codes_of("gemm_w4a16/sym/m17n8k16g16/bf16/tensors/s1", path, "w", "scale")
    # scale = max(|max| / 7, |min| / 8): 1/8, 2/8, 64 and 0 in bf16; codes are the quotient + 8; 1/64 rounds to 0
    assert [row[0] for row in scale[:4]] == [0x3E00, 0x3E80, 0x4280, 0x0000]
    assert w[:3] == [[q + 8 for q in ROUNDED], [7, 7, 7, 7, 7, 0, *[7] * 10], [15, *[8] * 15]]
    w, scale, zero = codes_of("gemm_w4a16/zp/m17n8k16g16/f16/tensors/s1", path, "w", "scale", "zero")
    # (7/8 + 1) / 15 = 1/8, zero 8. (448 - 1) / 15 = 29.8, in f16 a multiple of 1/64: 1907/64 = 16 (1 + 883/1024), zero 0
    assert [scale[row][0] for row in (0, 2)] == [0x3000, 0x4C00 | 883]
    assert [zero[row][0] for row in (0, 2)] == [8, 0]
    assert [w[0], w[2]] == [[q + 8 for q in ROUNDED], [15, *[0] * 15]]


def test_w8a8_fp8_by_hand(tmp_path: Path) -> None:
    hand = np.zeros((8, 128))
    # over 2^-9: 448, 1, -17 (tie of 16 and 18), -0, 19 (tie of 18 and 20), 2^-9 (least code), 2^-10 (tie of 0 and it)
    hand[0, :7] = [0.875, 2.0**-9, -17 * 2.0**-9, -0.0, 19 * 2.0**-9, 2.0**-18, 2.0**-19]
    hand[1, :2] = [-448 * 2.0**-6, 2.0**-6]
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    w, scale = codes_of("gemm_w8a8_fp8/scaled/m17n8k128/bf16/tensors/s1", path, "w", "channel_scale")
    assert w[0] == [0x7E, 0x38, 0xD8, 0x80, 0x5A, 0x01, 0x00, *[0] * 121]
    assert w[1][:2] == [0xFE, 0x38]
    floor = int((np.float32(1) / np.float32(448 * 512)).view(np.uint32))  # of a row of zeros
    assert scale == [118 << 23, 121 << 23, *[floor] * 6]  # 2^-9, 2^-6
    # One scale for all: amax 7 / 448 = 2^-6, so row 0 is 2^3 times smaller: 56, 1/8, -17/8 (tie of 2 and 2.25), -0, 19/8
    w, scale = codes_of("gemm_w8a8_fp8/scaled/m17n8k128/bf16.wtensor/tensors/s1", path, "w", "channel_scale")
    assert scale == [121 << 23]
    assert w[0][:5] == [0x66, 0x20, 0xC0, 0x80, 0x42]
    assert w[1][:2] == [0xFE, 0x38]
    block, scale = codes_of("gemm_w8a8_fp8/block/m17n8k128/bf16/tensors/s1", path, "w", "w_scale")
    assert scale == [[121 << 23]]
    assert block == w
    # fnuz: the same row amax over 224 is 2^-8 for row 0, codes of value 224 and 1/2 in a format of bias 8; no -0
    w, scale = codes_of("gemm_w8a8_fp8/scaled/m17n8k128/bf16.fnuz/tensors/s1", path, "w", "channel_scale")
    assert scale[0] == 119 << 23
    assert [w[0][i] for i in (0, 1, 3)] == [0x7E, 0x38, 0x00]


def test_block_scales_cover_a_partial_tile_of_rows(tmp_path: Path) -> None:
    hand = np.zeros((136, 256))
    hand[0, 0], hand[135, 255], hand[130, 0] = 7.0, -3.5, 1.75
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    w, scale = codes_of("gemm_w8a8_fp8/block/m17n136k256/bf16/tensors/s1", path, "w", "w_scale")
    least = int((np.float32(1e-4) / np.float32(448)).view(np.uint32))  # of zeros: the floor 1e-4 over 448
    assert scale == [[121 << 23, least], [119 << 23, 120 << 23]]  # 7, 0 / 1.75, 3.5 over 448
    assert [w[0][0], w[130][0], w[135][255], sum(map(sum, w))] == [0x7E, 0x7E, 0xFE, 0x7E + 0x7E + 0xFE]


def test_w4a8_fp8_by_hand(tmp_path: Path) -> None:
    hand = np.zeros((8, 256))
    hand[0, :16], hand[0, 128:144] = EIGHTHS, [value / 4 for value in EIGHTHS]
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    for variant in ("folded", "exact"):
        text = f"gemm_w4a8_fp8/{variant}/m17n8k256g128/bf16/tensors/s1"
        w, groups, channels = codes_of(text, path, "w", "group_scale", "channel_scale")
        assert w[0][:16] == w[0][128:144] == [q % 16 for q in ROUNDED]
        # Group scales 1/8 and 1/32 over c = fl(1/8 / 448) are 448 and 112; over 8, 56 = 1.75 2^5 and 14 = 1.75 2^3; channel 8 c
        assert groups[0] == [0x66, 0x56]
        assert channels[0] == int((np.float32(0.125) / np.float32(448) * np.float32(8)).view(np.uint32))


def test_w4a8_int8_by_hand(tmp_path: Path) -> None:
    hand = np.zeros((8, 64))
    hand[0, :16], hand[0, 32:48] = EIGHTHS, [value * 2 for value in EIGHTHS]
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    w, scale = codes_of("gemm_w4a8_int8/direct/m17n8k64g32/f16/tensors/s1", path, "w", "group_scale")
    assert scale[0] == [0x3000, 0x3400]
    assert w[0][:16] == w[0][32:48] == [q + 8 for q in ROUNDED]


def test_nvfp4_by_hand(tmp_path: Path) -> None:
    hand = np.zeros((8, 32))
    # g = 2688 / 6 = 448. Block 0: scale 448 (6 / 6), codes of x itself; .25, .75, 1.25, 2.5 and 5 are ties. Block 1: 224, x / .5.
    hand[0, :16] = [6.0, 0.25, 0.75, 1.25, 2.5, 5.0, -0.0, -6.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -0.25, 0.0]
    hand[0, 16:19] = [3.0, 0.125, -0.75]
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    w, scale, alpha = codes_of("gemm_nvfp4/plain/m17n8k32r0/bf16/tensors/s1", path, "w", "w_scale", "alpha")
    assert w[0] == [7, 0, 2, 2, 4, 6, 8, 15, 1, 2, 3, 4, 5, 6, 8, 0, 7, 0, 11, *[0] * 13]
    assert scale[0] == [0x7E, 0x76]
    assert scale[1] == [0x20, 0x20]
    assert alpha == [int((np.float32(1) / np.float32(448)).view(np.uint32))]


def test_int4_by_hand(tmp_path: Path) -> None:
    hand = np.zeros((8, 64))
    hand[0, :6] = [7 / 8, -7 / 8, 1 / 16, 3 / 16, -5 / 16, 1 / 8]  # over 1/8: 7 -7 .5 1.5 -2.5 1
    path = written(tmp_path / "a", {"hand": ("F32", hand)})
    for text, eighth in (("f32/m17n8k64r0/f16", 0x3000), ("half/m17n8k64r0/bf16", 0x3E00)):
        w, scale = codes_of(f"gemm_int4/{text}/tensors/s1", path, "w", "w_scale")
        assert w[0][:6] == [7, 9, 0, 2, 14, 1]
        assert [row[0] for row in scale] == [eighth, *[0] * 7]


def test_quantisers_get_the_matrix_itself_and_the_scales_it_would_have(tmp_path: Path) -> None:
    hand = np.zeros((4, 128))
    # bf16 has 8 significand bits: 1 + 2^-8 is a tie that goes down, 1 + 3 2^-8 one that goes up, 65520 is 16 below a value
    hand[0, :6] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 2.0**-149, 65520.0, -1e30]
    path = written(tmp_path / "a", {"hand": ("F32", hand), "zeros": ("F32", np.zeros((4, 128)))})

    def x(text: str) -> Any:
        return codes_of(f"{text}/tensors/s1", path, "x")[0][0][:6]

    assert x("int4_quantize/sym/n4k128g128/bf16") == [0x3F80, 0x3F82, 0x8000, 0, 0x4780, 0xF14A]
    assert x("svdquant_quantize/int4/m4k128r16/bf16") == [0x3F80, 0x3F82, 0x8000, 0, 0x4780, 0xF14A]
    assert x("int8_quantize/token/m4k128/f16") == [0x3C04, 0x3C0C, 0x8000, 0, 0x7C00, 0xFC00]
    sixes = written(tmp_path / "b", {"hand": ("F32", np.full((4, 128), 6.0)), "small": ("F32", np.full((4, 128), 2.0**-126))})

    def given(text: str, name: str, seed: int, source: Path) -> int:
        code: int = operands_of(f"{text}/tensors/s{seed}", source)[name].codes[0]
        return int(code)

    def single(top: float, bottom: float) -> int:
        return int((np.float32(top) / np.float32(bottom)).view(np.uint32))

    assert given("fp8_quantize/static/m4k128p0/bf16", "scale", 1, sixes) == single(6, 448)
    assert given("fp8_quantize/static/m4k128p0/bf16.fnuz.vllm_native", "scale", 1, sixes) == single(6, 224)
    assert given("nvfp4_quantize/static/m4k128/bf16", "global_scale", 1, sixes) == single(2688, 6)
    assert given("nvfp4_quantize/static/m4k128/bf16.modelopt", "global_scale", 1, sixes) == single(6, 2688)
    assert given("nvfp4_quantize/static/m4k128/bf16.four_over_six", "global_scale", 1, sixes) == single(1536, 6)
    one = 0x3F800000  # 2688 / 0 and 2688 / 2^-126 are infinite, 2^-126 / 2688 is subnormal: no global scale of the contract
    assert given("nvfp4_quantize/static/m4k128/bf16", "global_scale", 2, path) == one
    assert given("nvfp4_quantize/static/m4k128/bf16", "global_scale", 2, sixes) == one
    assert given("nvfp4_quantize/static/m4k128/bf16.modelopt", "global_scale", 2, sixes) == one


def _e4m3(codes: Array) -> Array:
    """Values of finite e4m3fn codes, from sign, exponent (bias 7) and three bits."""
    exponent, fraction = (codes >> 3 & 15).astype(np.int64), (codes & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    return np.asarray(np.where(codes & 0x80, -magnitude, magnitude))


def _e2m1(codes: Array) -> Array:
    return np.asarray(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1))


def _int4(codes: Array) -> Array:
    return np.asarray((codes.astype(np.int64) ^ 8) - 8)


def _wide(scales: Array, k: int) -> Array:
    return np.repeat(scales, k // scales.shape[1], axis=1)


def _restored(text: str, found: Operands, k: int) -> tuple[Array, Array]:
    """The matrix that the operands stand for, and the largest distance of each element from what was quantised.

    Half a step of the code, and what the rounding of scales may add: one part in 2^7 for bf16, in 2^3 for folded e4m3 scales."""
    def half(name: str) -> Array:
        return found[name].codes.view(np.float16).astype(np.float64)

    def brain(name: str) -> Array:
        return (found[name].codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def single(name: str) -> Array:
        return found[name].codes.view(np.float32).astype(np.float64)

    w = found["w"].codes
    match text.split("/")[0:2]:
        case ["gemm_w4a16", "sym"]:
            scale = _wide(half("scale") if "/f16/" in text else brain("scale"), k)
            return (w.astype(np.int64) - 8) * scale, 0.5 * scale + abs(_int4(w ^ 8)) * scale / 128
        case ["gemm_w4a16", _]:
            scale, zero = _wide(half("scale"), k), _wide(found["zero"].codes.astype(np.int64), k)
            return (w.astype(np.int64) - zero) * scale, 1.01 * scale  # zero point and code are rounded apart
        case ["gemm_w4a8_int8", _]:
            scale = _wide(half("group_scale"), k)
            return (w.astype(np.int64) - 8) * scale, 0.51 * scale
        case ["gemm_int4", variant]:
            scale = _wide(half("w_scale") if variant == "f32" else brain("w_scale"), k)
            return _int4(w) * scale, 0.5 * scale + abs(_int4(w)) * scale / 128
        case ["gemm_w4a8_fp8", _]:
            scale = _wide(_e4m3(found["group_scale"].codes) * single("channel_scale")[:, None], k)
            return _int4(w) * scale, 0.5 * scale * 1.125 + abs(_int4(w)) * scale / 8
        case ["gemm_w8a8_fp8", "block"]:
            scale = np.repeat(_wide(single("w_scale"), k), 128, axis=0)[: len(w)]
            return _e4m3(w) * scale, abs(_e4m3(w)) * scale / 15 + scale * 2.0**-9
        case ["gemm_w8a8_fp8", _]:
            scale = np.repeat(single("channel_scale")[:, None], k, axis=1)
            return _e4m3(w) * scale, abs(_e4m3(w)) * scale / 15 + scale * 2.0**-9
        case ["gemm_nvfp4", _]:
            scale = _wide(_e4m3(found["w_scale"].codes) * single("alpha")[0], k)
            return _e2m1(w) * scale, np.maximum(0.25, abs(_e2m1(w)) / 4) * scale * 1.0625 + 2.0**-9 * scale
        case other:
            raise AssertionError(other)


def test_quantised_weights_stand_for_the_matrix(tmp_path: Path) -> None:
    """A tensor under the wrong name, a scale in the wrong direction or group, a turned matrix: each is far outside."""
    values = spread((144, 256)) * np.exp2(np.arange(144) % 7)[:, None] * np.exp2(np.arange(256) // 64)
    path = written(tmp_path / "a", {"w": ("F32", values)})
    found = ids(path, *GEMMS)
    assert len(found) == 11
    for text in found:
        operands = operands_of(text, path)
        got, room = _restored(text, operands, 256)
        out = np.float16 if "/f16/" in text else np.float32
        x = values.astype(out).astype(np.float64)
        away = np.abs(got - x) - np.abs(x) / 256  # rounding to bf16 first
        assert (away <= room).all(), text
        assert (np.abs(got - x).max(axis=1) > 0).all(), text
        assert (np.abs(got - x[::-1]) > room).any(), text


# The loop ------------------------------------------------------------------------------------------------------------


class _Wrapped:
    """The cpu backend under another name."""

    name, target = "wrapped", "cpu"

    def __init__(self) -> None:
        self._cpu = cpu()

    def supports(self, problem: Problem) -> str | None:
        return self._cpu.supports(problem)

    def declare(self, problem: Problem, tactic: str) -> Any:
        return self._cpu.declare(problem, tactic)

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        return self._cpu.prepare(problem, tactic, constants)

    def stage(self, problem: Problem, tactic: str, activations: Mapping[str, TensorView]) -> Any:
        return self._cpu.stage(problem, tactic, activations)

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        return self._cpu.run(problem, tactic, state, inputs, outputs, workspace, stream)


class NextGroup(_Wrapped):
    """Takes each group's scale from the group beside it."""

    def prepare(self, problem: Problem, tactic: str, constants: Mapping[str, TensorView]) -> Any:
        name = next(name for name in ("scale", "group_scale", "w_scale") if name in constants)
        moved = replace(constants[name], memory=np.roll(constants[name].memory, 1, axis=-1))
        return self._cpu.prepare(problem, tactic, {**constants, name: moved})


class LastCode(_Wrapped):
    """Writes one code of a quantiser one off."""

    def run(
        self, problem: Problem, tactic: str, state: Any, inputs: Any, outputs: Mapping[str, TensorView], workspace: Any,
        stream: Any,
    ) -> str:
        named = super().run(problem, tactic, state, inputs, outputs, workspace, stream)
        outputs["q"].memory[-1, -1] ^= 1
        return named


def _backend(kind: type) -> str:
    return f"python:{Path(__file__).resolve()}:{kind.__name__}"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two layers whose groups along K differ in size, as those of a trained model do."""
    values = spread((32, 256)) * np.exp2(np.arange(256) // 64)
    return written(tmp_path / "two layers.safetensors", {"layer.1.w": ("F32", values), "layer.0.w": ("F32", values[::-1])})


FAULTS: Sequence[tuple[type, str]] = (
    (NextGroup, "gemm_w4a16/sym/m17n32k256g128/bf16/tensors/s1"),
    (NextGroup, "gemm_w4a8_fp8/folded/m17n32k256g128/bf16/tensors/s1"),
    (NextGroup, "gemm_nvfp4/plain/m17n32k256r0/bf16/tensors/s2"),
    (LastCode, "fp8_quantize/token/m32k256p0/bf16/tensors/s1"),
    (LastCode, "nvfp4_quantize/static/m32k256/bf16/tensors/s2"),
)


@pytest.mark.parametrize(("kind", "text"), FAULTS)
def test_a_faulty_backend_is_caught_and_its_line_repeats_it(
    kind: type, text: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{weights}:layer.*"
    right, wrong = (run_one(text, _backend(each), source=source)[0] for each in (_Wrapped, kind))
    assert right.status in (Status.EXACT, Status.WITHIN)
    assert wrong.status is Status.DRIFT
    assert wrong.wrong > 0
    assert right.lane == wrong.lane == "tensors"
    assert right.operands == wrong.operands
    assert set(right.power.values()) <= {True}
    line = shlex.split(wrong.repro)
    assert line[0] == "lowbit"
    assert line[-2:] == ["--tensors", source]
    assert command(*line[1:]) == ExitCode.FAILED
    assert "DRIFT" in capsys.readouterr().out


def test_the_case_id_and_the_file_fix_the_operands(weights: Path, tmp_path: Path) -> None:
    text = "int8_quantize/token/m32k256/bf16/tensors/s1"
    source = f"{weights}:layer.0.*"
    first = operands_of(text, source).sha256()
    load.cache_clear()
    out = tmp_path / "one.json"
    assert command("run", text, "--tensors", source, "--json", out) == ExitCode.REACHED
    assert json.loads(out.read_text())[0]["operands"] == first == operands_of(text, str(weights)).sha256()
    assert operands_of(text, f"{weights}:layer.1.*").sha256() != first
    case = parse_case(text, ops())
    assert Case(case.problem, "tensors", 2) != case
    assert operands_of(f"{text[:-1]}2", weights).sha256() != first


def test_activations_are_those_of_the_pattern_normal(weights: Path) -> None:
    text = "gemm_w4a16/sym/m17n32k256g128/bf16/tensors/s"
    found = [operands_of(f"{text}{seed}", weights)["a"].codes for seed in (1, 2)]
    case = parse_case(f"{text}1", ops())
    for seed, codes in enumerate(found, 1):
        assert (codes == draw_operands(ops()["gemm_w4a16"], Case(case.problem, "normal", seed))["a"].codes).all()
    assert (found[0] != found[1]).any()


def test_the_command_says_when_a_case_lacks_its_file(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "int8_quantize/token/m32k256/bf16/tensors/s1"
    ends: Mapping[str, Callable[[], int]] = {
        "give it by --tensors FILE": lambda: command("run", text),
        "seed s1 is layer.0.w [32, 256], smaller than": lambda: command("run", text.replace("m32", "m33"), "--tensors", weights),
    }
    for words, end in ends.items():
        assert end() == ExitCode.USAGE
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_certify_judges_the_lane_and_names_its_source(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("certify", "cpu", "--ops", "int8_quantize", "--per-op", 1, "--tensors", weights, "--out", out)
    assert command(*arguments) == ExitCode.REACHED
    report = json.loads((out / "report.json").read_text())
    lane = [verdict for verdict in report["verdicts"] if verdict["lane"] == "tensors"]
    assert sorted(verdict["case"] for verdict in lane) == sorted(ids(weights, "int8_quantize"))
    assert {verdict["source"] for verdict in lane} == {str(weights)}
    assert {verdict["status"] for verdict in lane} == {"EXACT"}
    assert {verdict["source"] for verdict in report["verdicts"] if verdict["lane"] != "tensors"} == {""}
    assert all(verdict["judged"] == verdict["total"] > 32 * 256 for verdict in lane)
