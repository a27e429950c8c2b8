"""Stored tensors to codes, against words packed element by element here; and one sentence for every damage (EVA-1)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowbit.conformance.evals.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError, QuantisedLinear, open_checkpoint
from lowbit.conformance.evals.schemes import Scheme
from lowbit.references.formats import BF16, E2M1, E4M3FN, F16, F32, INT4, UE4M3, UINT4

N, K = 24, 256
LAYER = "model.layers.0.mlp.up_proj"
W4A16 = Scheme("g", "gemm_w4a16", "sym", "pack-quantized", 32)
ZERO = Scheme("g", "gemm_w4a16", "zp", "pack-quantized", 32, symmetric=False)
W4A8 = Scheme("g", "gemm_w4a8_fp8", "folded", "pack-quantized", 128)
W4I8 = Scheme("g", "gemm_w4a8_int8", "direct", "int-quantized", 128)
W8A8 = Scheme("g", "gemm_w8a8_fp8", "scaled", "float-quantized", 0)
TENSOR = Scheme("g", "gemm_w8a8_fp8", "scaled", "float-quantized", 0, True, True, True)
BLOCK = Scheme("g", "gemm_w8a8_fp8", "block", "float-quantized", 128)
NVFP4 = Scheme("g", "gemm_nvfp4", "plain", "nvfp4-pack-quantized", 16)

DRAW = random.Random(5)
VALUES = [[DRAW.randint(-8, 7) for _ in range(K)] for _ in range(N)]


def words(rows: list[list[int]]) -> torch.Tensor:
    """Rows of codes 0..15 as int32 words: element i in bits 4 i .. 4 i + 3; missing elements are code 0."""
    packed = []
    for row in rows:
        line = [sum((row[at + i] if at + i < len(row) else 0) << (4 * i) for i in range(8)) for at in range(0, len(row), 8)]
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in line])
    return torch.tensor(packed, dtype=torch.int32)


def powers(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Scales that every format here holds: 2^-6 .. 2^1, by place."""
    return torch.tensor([[2.0 ** ((3 * i + j) % 8 - 6) for j in range(columns)] for i in range(rows)]).to(dtype)


def packed(group: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A pack-quantized Linear."""
    return {
        "weight_packed": words([[value + 8 for value in row] for row in VALUES]),
        "weight_scale": powers(N, K // group, dtype), "weight_shape": torch.tensor([N, K]),
    }


def saved(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of one Linear."""
    save_file({f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    return open_checkpoint(folder)


def read(folder: Path, tensors: Mapping[str, torch.Tensor], scheme: Scheme, out: Any = BF16) -> QuantisedLinear:
    return saved(folder, tensors).linear(LAYER, scheme, out)


def bits(tensor: torch.Tensor) -> list[int]:
    """The patterns of positive 16-bit floats."""
    patterns: list[int] = tensor.contiguous().view(torch.int16).flatten().tolist()
    return patterns


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "dtype"), [(BF16, torch.bfloat16), (F16, torch.float16)])
def test_packed_int4_keeps_its_offset(tmp_path: Path, out: Any, dtype: torch.dtype) -> None:
    found = read(tmp_path, packed(32, dtype), W4A16, out)
    assert (found.n, found.k, found.group, sorted(found.constants)) == (N, K, 32, ["scale", "w"])
    assert found.constants["w"].format is UINT4
    assert found.constants["w"].codes.tolist() == [[value + 8 for value in row] for row in VALUES]
    assert found.constants["scale"].format is out
    assert found.constants["scale"].codes.flatten().tolist() == bits(powers(N, K // 32, dtype))
    assert str(found.problem(3, out)) == f"gemm_w4a16/sym/m3n{N}k{K}g32/{'bf16' if out is BF16 else 'f16'}"


def test_zero_points_are_packed_along_n(tmp_path: Path) -> None:
    zeros = [[DRAW.randint(0, 15) for _ in range(K // 32)] for _ in range(N)]
    columns = words([[zeros[n][g] for n in range(N)] for g in range(K // 32)])  # a word holds eight n of one group
    found = read(tmp_path, packed(32) | {"weight_zero_point": columns.T.contiguous()}, ZERO)
    assert found.constants["zero"].codes.tolist() == zeros
    assert str(found.problem(1, BF16, bias=True)) == f"gemm_w4a16/zp/m1n{N}k{K}g32/bf16.bias"


def test_w4a8_has_signed_codes_and_folded_scales(tmp_path: Path) -> None:
    """Row amax 2^t: c = 2^t / 448 in binary32; a scale 2^(t-d) becomes 448 / 2^d, an eighth of it, and the channel 8 c."""
    exponents = [(n % 5 - 3, n % 3) for n in range(N)]
    scales = torch.tensor([[2.0**t, 2.0 ** (t - d)] for t, d in exponents], dtype=torch.bfloat16)
    found = read(tmp_path, packed(128) | {"weight_scale": scales}, W4A8)
    assert found.constants["w"].format is INT4
    assert found.constants["w"].codes.tolist() == [[value % 16 for value in row] for row in VALUES]
    assert found.constants["group_scale"].format is E4M3FN
    top = 0x66  # 56 = 1.75 * 2^5: exponent field 12, mantissa 6; a halving takes 8 off
    assert found.constants["group_scale"].codes.tolist() == [[top, top - 8 * d] for _, d in exponents]
    channels = [8 * float(np.float32(2.0**t) / np.float32(448)) for t, _ in exponents]
    assert found.constants["channel_scale"].codes.view(np.float32).tolist() == channels
    assert str(found.problem(7, BF16)) == f"gemm_w4a8_fp8/folded/m7n{N}k{K}g128/bf16"


def test_int4_stored_one_per_byte(tmp_path: Path) -> None:
    found = read(tmp_path, {"weight": torch.tensor(VALUES, dtype=torch.int8), "weight_scale": powers(N, 2)}, W4I8)
    assert found.constants["w"].codes.tolist() == [[value + 8 for value in row] for row in VALUES]
    assert sorted(found.constants) == ["group_scale", "w"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_weights_are_their_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.tensor([[(7 * n + k) % 127 for k in range(K)] for n in range(N)], dtype=torch.uint8)
    scales = powers(N, 1, dtype)
    found = read(tmp_path, {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales}, W8A8)
    assert found.constants["w"].codes.tolist() == codes.tolist()
    assert found.constants["channel_scale"].format is F32
    assert found.constants["channel_scale"].codes.view(np.float32).tolist() == scales.flatten().tolist()
    assert found.input_scale is None
    assert str(found.problem(2, F16)) == f"gemm_w8a8_fp8/scaled/m2n{N}k{K}/f16"


def test_one_scale_for_the_tensor_and_one_for_the_input(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.zeros(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn), "weight_scale": torch.tensor([0.25]),
        "input_scale": torch.tensor([0.5]),
    }
    found = read(tmp_path, tensors, TENSOR)
    assert found.constants["channel_scale"].codes.view(np.float32).tolist() == [0.25]
    assert found.input_scale is not None
    assert found.input_scale.codes.view(np.float32).tolist() == [0.5]
    assert str(found.problem(2, BF16)) == f"gemm_w8a8_fp8/scaled/m2n{N}k{K}/bf16.wtensor"


def test_a_static_input_scale_is_per_tensor(tmp_path: Path) -> None:
    scheme = Scheme("g", "gemm_w8a8_fp8", "scaled", "float-quantized", 0, True, True, True, True)
    tensors = {
        "weight": torch.zeros(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.25),
        "input_scale": torch.tensor(0.5),
    }
    assert str(read(tmp_path, tensors, scheme).problem(2, BF16)) == f"gemm_w8a8_fp8/scaled/m2n{N}k{K}/bf16.atensor.wtensor"


def test_block_scales(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(136, K, dtype=torch.uint8).view(torch.float8_e4m3fn), "weight_scale": powers(2, 2)}
    found = read(tmp_path, tensors, BLOCK)
    assert found.constants["w_scale"].codes.view(np.float32).tolist() == powers(2, 2).tolist()
    assert str(found.problem(1, BF16)) == f"gemm_w8a8_fp8/block/m1n136k{K}/bf16"


def nvfp4() -> dict[str, torch.Tensor]:
    """An nvfp4-pack-quantized Linear whose element (n, k) has code (n + k) % 16."""
    rows = [[((n + 2 * i) % 16) | ((n + 2 * i + 1) % 16) << 4 for i in range(K // 2)] for n in range(N)]
    scales = torch.tensor([[(n + g) % 0x7F for g in range(K // 16)] for n in range(N)], dtype=torch.uint8)
    return {
        "weight_packed": torch.tensor(rows, dtype=torch.uint8), "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([12.0]), "input_global_scale": torch.tensor([16.0]),
    }


def test_nvfp4_has_its_even_element_low_and_its_globals_divide(tmp_path: Path) -> None:
    found = read(tmp_path, nvfp4(), NVFP4)
    assert (found.constants["w"].format, found.constants["w_scale"].format) == (E2M1, UE4M3)
    assert found.constants["w"].codes.tolist() == [[(n + k) % 16 for k in range(K)] for n in range(N)]
    assert found.constants["w_scale"].codes.tolist() == [[(n + g) % 0x7F for g in range(K // 16)] for n in range(N)]
    assert found.constants["alpha"].codes.view(np.float32).tolist() == [float(np.float32(1 / 192))]
    assert found.input_scale is not None
    assert found.input_scale.codes.view(np.float32).tolist() == [16.0]


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    tensors = packed(32)
    parts = {"a.safetensors": ["weight_packed"], "b.safetensors": ["weight_scale", "weight_shape"]}
    for file, names in parts.items():
        save_file({f"{LAYER}.{name}": tensors[name] for name in names}, tmp_path / file)
    index = {f"{LAYER}.{name}": file for file, names in parts.items() for name in names}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert open_checkpoint(tmp_path).linear(LAYER, W4A16, BF16).constants["w"].codes[3, 5] == VALUES[3][5] + 8
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the index names b\.safetensors, absent here; download what is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../.bashrc", "/etc/passwd", "sub/a.safetensors", "..", "", 3])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / ".bashrc").write_text("mine", encoding="utf-8")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"evil": name}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="expected file names without a folder"):
        open_checkpoint(folder)


def test_an_order_that_changes_nothing_is_accepted(tmp_path: Path) -> None:
    order = torch.arange(K, dtype=torch.int32) // 32
    assert read(tmp_path, packed(32) | {"weight_g_idx": order}, W4A16).k == K


# What is refused ------------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def instead(**changed: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | changed


@pytest.mark.parametrize(("tensors", "change", "scheme", "said"), [
    (packed(32), without("weight_scale"), W4A16, f"tensor {LAYER}.weight_scale is in none of its files"),
    (packed(32), instead(weight_g_idx=torch.arange(K, dtype=torch.int32) % 8), W4A16,
     f"{LAYER}: weight_g_idx permutes the columns of K; no op of the contract does; supported are groups of neighbours; "
     "quantise again with actorder='weight'"),
    (packed(32), instead(weight_scale=powers(N, 4)), W4A16, f"{LAYER}.weight_scale has shape [24, 4], expected [24, 8]"),
    (packed(32), instead(weight_packed=torch.zeros(N, K // 8, dtype=torch.int64)), W4A16, "packed is int64, expected int32"),
    (packed(32), instead(weight_scale=torch.full((N, 8), 1 + 2.0**-20)), W4A16,
     f"{LAYER}.weight_scale is f32, the op takes bf16, and 192 of 192 scales would be rounded"),
    (packed(32), instead(weight_shape=torch.tensor([N, K - 4])), W4A16, f"{LAYER}: weights [24, 252] do not fit gemm_w4a16"),
    (packed(32), without(""), ZERO, "weight_zero_point is in none"),
    ({"weight": torch.full((N, K), 9, dtype=torch.int8), "weight_scale": powers(N, 2)}, without(""), W4I8,
     f"{LAYER}.weight: 6144 of 6144 values lie outside -8..7, which int4 holds"),
    (nvfp4(), instead(weight_global_scale=torch.tensor([0.0])), NVFP4,
     f"{LAYER}: global scales are 0.0 and 16.0, expected finite divisors above 0"),
    (nvfp4(), instead(input_global_scale=torch.tensor([float("inf")])), NVFP4, "expected finite divisors above 0"),
    (nvfp4(), instead(weight_scale=torch.full((N, K // 16), 0x80, dtype=torch.uint8).view(torch.float8_e4m3fn)), NVFP4,
     "384 of 384 block scales have their sign bit set"),
    ({"weight": torch.zeros(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn), "weight_scale": powers(3, 1)}, without(""), W8A8,
     f"{LAYER}.weight_scale has shape [3, 1], expected 24 scales"),
    ({"weight": torch.zeros(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn), "weight_scale": torch.ones(1),
      "input_scale": torch.ones(2)}, without(""), TENSOR, f"{LAYER}.input_scale holds 2 scales, expected one"),
])
def test_damage_is_one_sentence(
    tmp_path: Path, tensors: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    scheme: Scheme, said: str,
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, change(tensors), scheme)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    saved(tmp_path, packed(32))
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("file", "text", "said"), [
    ("config.json", "{", r"config\.json cannot be read"), (INDEX, "{}", "no index of shards"), (SINGLE, "x", "cannot be read"),
])
def test_a_broken_folder_is_refused(tmp_path: Path, file: str, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)
