"""The program that brings a model to a device in parts: a stream cut and joined, damage named, weights packed."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lowbit.conformance.evals.checkpoint import open_checkpoint
from lowbit.references.formats import BF16


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    path = Path(__file__).parent / "device" / "evals_qwen.py"
    spec = importlib.util.spec_from_file_location("evals_qwen", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two MiB and a half that do not compress, and a small file below."""
    made = tmp_path / "folder"
    (made / "data").mkdir(parents=True)
    (made / "blocks").write_bytes(np.random.Generator(np.random.Philox(5)).bytes(5 << 19))
    (made / "data" / "test.jsonl").write_text('{"question": "?"}\n', encoding="utf-8")
    return made


def test_a_folder_travels_in_parts(program: Any, folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    assert program.split(folder, parts, 1) == 3
    sizes = [(parts / f"{at:02}" / "part").stat().st_size for at in range(3)]
    assert sizes[:2] == [1 << 20, 1 << 20]
    assert 1 << 19 < sizes[2] < 1 << 20
    program.join(parts, tmp_path / "there")
    for name in ("blocks", "data/test.jsonl"):
        assert (tmp_path / "there" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "there" / name).stat().st_mtime_ns == program.EPOCH * 10**9


def test_what_is_missing_or_damaged_is_named(program: Any, folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    program.split(folder, parts, 1)
    piece = bytearray((parts / "02" / "part").read_bytes())
    piece[7] ^= 1
    (parts / "02" / "part").write_bytes(piece)
    (parts / "00" / "part").unlink()
    told = io.StringIO()
    assert program.main(["join", str(parts), str(tmp_path / "there")], told) == 1
    assert told.getvalue() == f"join: {parts}: 2 of 3 parts are missing or damaged (00, 02); carry them\n"
    assert not (tmp_path / "there").exists()
    assert program.main(["join", str(tmp_path / "none"), str(tmp_path / "there")], told) == 1
    assert "no part has arrived" in told.getvalue()


def test_parts_are_not_written_over_others(program: Any, folder: Path, tmp_path: Path) -> None:
    assert program.main(["split", str(folder), str(tmp_path / "parts")], io.StringIO()) == 0
    assert program.main(["split", str(folder), str(tmp_path / "parts")], io.StringIO()) == 1


def test_the_stored_checkpoint_holds_the_codes(program: Any, tmp_path: Path) -> None:
    """Weights that are a scale times -8..7, a power of two per group: codes are the integers plus 8, scales those powers."""
    plain = tmp_path / "plain"
    plain.mkdir()
    integers = np.random.Generator(np.random.Philox(2)).integers(-7, 8, (16, 256))
    integers[:, ::128] = -8  # the scale is max(max / 7, |min| / 8)
    powers = 2.0 ** -np.arange(4, 6)
    weight = torch.from_numpy(integers * np.repeat(powers, 128)).to(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    bias = torch.arange(16).to(torch.bfloat16)
    save_file({f"{name}.weight": weight, f"{name}.bias": bias, "model.norm.weight": bias + 1}, plain / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (plain / file).write_text("{}", encoding="utf-8")
    program.store(plain, tmp_path / "stored")
    found = open_checkpoint(tmp_path / "stored")
    words = found.tensor(f"{name}.weight_packed").numpy().view(np.uint32)
    assert words.shape == (16, 32)
    assert [int(words[3, 17]) >> (4 * at) & 15 for at in range(8)] == [int(code) + 8 for code in integers[3, 136:144]]
    scheme = found.schemes().of(name)
    assert scheme is not None
    linear = found.linear(name, scheme, BF16)
    assert np.array_equal(linear.constants["w"].codes, integers + 8)
    assert torch.equal(found.tensor(f"{name}.weight_scale").double(), torch.from_numpy(np.tile(powers, (16, 1))))
    assert torch.equal(found.tensor(f"{name}.bias"), bias)
    assert torch.equal(found.tensor("model.norm.weight"), bias + 1)
    assert json.loads((tmp_path / "stored" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


def test_names_of_tensors(program: Any) -> None:
    assert program._name("blk.11.attn_k.bias") == "model.layers.11.self_attn.k_proj.bias"
    assert program._name("output.weight") == "model.embed_tokens.weight"
    assert program._name("output_norm.weight") == "model.norm.weight"
