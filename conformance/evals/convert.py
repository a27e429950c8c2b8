"""`lowbit convert SRC DST`: a W4A8-fp8 checkpoint from a W4A16 one, on identical codes.

Decides: what changes. Weights keep every code; group scales become bf16 where they are not; the configuration asks for e4m3
activations per token. Kernels fold the scales into e4m3 when they load (op scale_fold), so what folding costs is reported here.
Refuses: layers that are not symmetric int4 in groups of 64 or 128, scales that bf16 does not hold, and to write over anything.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lowbit.references.formats import BF16, E4M3FN, F32, decode

from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .schemes import Scheme, SchemeError, read_schemes

__all__ = ["CheckpointError", "Conversion", "SchemeError", "convert"]

_INPUTS: dict[str, Any] = {
    "actorder": None, "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8, "observer": None,
    "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "float",
}
_PACKED = ".weight_packed"


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done. `scales`: group scales of all layers; `zeroed`: those that folding into e4m3 makes 0 although they are not;
    `changed`: those whose folded value differs; `worst`: the largest relative change among those that stay above 0."""

    layers: int
    scales: int
    zeroed: int
    changed: int
    worst: float


def _w4a8_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with e4m3 activations per token in every group. Raises SchemeError for another source or no W4A8."""
    target = copy.deepcopy(config)
    given = target.get("quantization_config", {})
    for scheme, _ in read_schemes(config).groups:
        if scheme.op != "gemm_w4a16":
            raise SchemeError(
                f"config group {scheme.group_name!r} is {scheme.op}; convert takes gemm_w4a16: int4 weights, inputs not quantised"
            )
        given["config_groups"][scheme.group_name]["input_activations"] = dict(_INPUTS)
    read_schemes(target)
    return target


def _folding(checkpoint: Checkpoint, layer: str, scheme: Scheme) -> tuple[int, int, int, float]:
    """(scales, zeroed, changed, worst) of one layer."""
    stored = checkpoint.tensor(f"{layer}.weight_scale").to(torch.float64).numpy()
    found = checkpoint.linear(layer, scheme, BF16).constants
    channel = decode(found["channel_scale"].codes, F32)[:, None]
    folded = decode(found["group_scale"].codes, E4M3FN) * channel  # 4 by 24 bits: exact in binary64
    alive = (stored != 0) & (folded != 0)
    worst = float(np.max(np.abs(folded[alive] / stored[alive] - 1), initial=0.0))
    return stored.size, int(((stored != 0) & (folded == 0)).sum()), int((folded != stored).sum()), worst


def _shard(checkpoint: Checkpoint, file: str, folder: Path) -> None:
    """One file, its group scales in bf16. A file without scales of another dtype is copied as it is."""
    names = [name for name, where in checkpoint.files.items() if where == file]
    layers = {name.removesuffix(_PACKED) for name in checkpoint.files if name.endswith(_PACKED)}
    scales = [name for name in names if name.removesuffix(".weight_scale") in layers and name.endswith(".weight_scale")]
    if all(checkpoint.tensor(name).dtype is torch.bfloat16 for name in scales):
        shutil.copyfile(checkpoint.folder / file, folder / file)
        return
    tensors = {name: checkpoint.tensor(name) for name in names}
    for name in scales:
        narrow = tensors[name].to(torch.bfloat16)
        if not torch.equal(narrow.to(torch.float64), tensors[name].to(torch.float64)):
            raise CheckpointError(f"{name}: bf16 does not hold all of its scales, and scale_fold takes bf16; quantise in bf16")
        tensors[name] = narrow
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _umask() -> int:
    """Permissions that the user keeps from new files: a temporary folder is made for its owner alone."""
    found = os.umask(0)
    os.umask(found)
    return found


def convert(source: Path, target: Path, *, told: Callable[[str], None] = lambda line: None) -> Conversion:
    """Write the W4A8 checkpoint of a W4A16 one into the new folder `target`, whole or not at all. `told` gets one line per file
    and per hundred layers. Raises CheckpointError, SchemeError, FileExistsError."""
    if target.exists():
        raise FileExistsError(f"{target} exists; convert writes a new folder, so name another or move this one away")
    checkpoint = open_checkpoint(source)
    config = _w4a8_config(dict(checkpoint.config))
    schemes = read_schemes(config)
    layers = sorted(name.removesuffix(_PACKED) for name in checkpoint.files if name.endswith(_PACKED))
    if not layers:
        raise CheckpointError(f"{source}: no tensor is named *{_PACKED}; expected a pack-quantized W4A16 checkpoint")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for file in sorted(set(checkpoint.files.values())):
            told(f"write {file}")
            _shard(checkpoint, file, work)
        for path in source.iterdir():
            if path.is_file() and path.name not in checkpoint.files.values() and path.name != "config.json":
                shutil.copyfile(path, work / path.name)
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written, sums, worst = open_checkpoint(work), np.zeros(3, np.int64), 0.0
        for number, layer in enumerate(layers, 1):
            scheme = schemes.of(layer)
            if scheme is None:
                raise CheckpointError(f"{layer} is packed, but the configuration ignores it or names it in no target")
            *counts, share = _folding(written, layer, scheme)
            sums, worst = sums + counts, max(worst, share)
            if number % 100 == 0 or number == len(layers):
                told(f"checked {number} of {len(layers)} layers")
        work.chmod(0o777 & ~_umask())
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return Conversion(len(layers), int(sums[0]), int(sums[1]), int(sums[2]), worst)
