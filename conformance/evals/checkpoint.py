"""Reads the quantised Linears of a checkpoint as canonical codes, without ever making a full-precision weight.

Decides: which stored tensors a scheme needs, what they hold, and what the op of the contract gets. Shards stay on disk and are
mapped; one tensor at a time is read. Stored formats are those of compressed-tensors 0.20.
Refuses: a missing or truncated file, a tensor that is absent, of another dtype or shape, columns permuted by weight_g_idx, codes
outside their format, and scales that the op's format cannot hold: one sentence with layer, found, expected and what to do.

Bit order of stored words: element i of an int32 word lies in bits 4 i .. 4 i + 3 (LSB = bit 0), of a byte likewise; int4 is
stored with an offset of 8. Scales are in decode direction, but for weight_global_scale and input_global_scale, which divide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from lowbit.references.encodings import flip_int4_offset, fold_scales
from lowbit.references.formats import BF16, E2M1, E4M3FN, F16, F32, INT4, UE4M3, UINT4, Codes, Format, decode
from lowbit.references.rounding import Overflow, Rounding, encode

from ..case import Problem, Tensor
from ..op import DomainError, parse_problem
from ..ops import ops
from .schemes import Scheme, Schemes, read_schemes

__all__ = ["Checkpoint", "CheckpointError", "QuantisedLinear", "open_checkpoint"]

_NAMES = {BF16: "bf16", F16: "f16"}
_TORCH = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32, torch.float8_e4m3fn: E4M3FN}
_WORDS = {BF16: np.uint16, F16: np.uint16, F32: np.uint32, E4M3FN: np.uint8}
_SCALES = (torch.bfloat16, torch.float16, torch.float32)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as its configuration says."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedLinear:
    """One Linear as constants of an op. `constants`: canonical codes by tensor name of the op, without the bias, which stays in
    the model. `input_scale`: codes of a static activation scale (binary32, decode direction; for NVFP4 the divisor as stored)."""

    name: str
    scheme: Scheme
    n: int
    k: int
    constants: Mapping[str, Tensor]
    input_scale: Tensor | None = None

    @property
    def group(self) -> int:
        """K elements per weight scale."""
        return self.scheme.group or self.k

    def problem(self, m: int, out: Format, *, bias: bool = False) -> Problem:
        """The problem of `m` rows of activations. Raises CheckpointError where the op's domain does not hold it."""
        return _problem(self.name, self.scheme, m, self.n, self.k, out, bias)


def _problem(name: str, scheme: Scheme, m: int, n: int, k: int, out: Format, bias: bool) -> Problem:
    op = ops()[scheme.op]
    sizes = {"m": m, "n": n, "k": k, "g": scheme.group or k, "r": 0}
    dims = "".join(f"{letter}{sizes[letter]}" for letter in op.dims)
    said = [_NAMES[out]]
    if scheme.op == "gemm_w8a8_fp8" and scheme.variant == "scaled":
        said += (["atensor"] if scheme.input_per_tensor else []) + (["wtensor"] if scheme.per_tensor else [])
    if bias:
        said.append("bias")
    try:
        return parse_problem(f"{scheme.op}/{scheme.variant}/{dims}/{'.'.join(said)}", ops())
    except DomainError as error:
        raise CheckpointError(f"{name}: weights [{n}, {k}] do not fit {scheme.op}: {error}; add the layer to `ignore`") from error


@dataclass(slots=True)
class Checkpoint:
    """A model folder: its configuration and where each tensor lies."""

    folder: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]  # tensor -> file
    _open: dict[str, Any] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """All tensors, sorted."""
        return tuple(sorted(self.files))

    def schemes(self) -> Schemes:
        """The schemes of the configuration. Raises SchemeError."""
        return read_schemes(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor. Raises CheckpointError where it is absent or its file is damaged."""
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is in none of its files")
        path = self.folder / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(path), framework="pt")
            found: torch.Tensor = self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); download the file again") from error
        return found

    def linear(self, name: str, scheme: Scheme, out: Format) -> QuantisedLinear:
        """The quantised Linear `name`, to compute with activations and outputs in `out` (BF16 or F16). Raises CheckpointError."""
        if f"{name}.weight_g_idx" in self.files:
            order = self.tensor(f"{name}.weight_g_idx").numpy()
            if (np.diff(order) < 0).any():
                raise CheckpointError(
                    f"{name}: weight_g_idx permutes the columns of K; no op of the contract does; supported are groups of "
                    "neighbours; quantise again with actorder='weight'"
                )
        return _READERS[scheme.storage](self, name, scheme, out)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A model folder with config.json and model.safetensors, whole or in shards. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: config.json cannot be read ({error}); expected the folder of a model") from error
    if (folder / INDEX).exists():
        try:
            files = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX}: no index of shards ({error}); download the file again") from error
        strange = [file for file in files.values() if type(file) is not str or file in ("", "..") or file != Path(file).name]
        if strange:  # a path would be read, and by convert written, outside the folder
            raise CheckpointError(f"{folder / INDEX}: names {strange[0]!r}, expected file names without a folder")
        missing = sorted({file for file in files.values() if not (folder / file).exists()})
        if missing:
            raise CheckpointError(f"{folder}: the index names {', '.join(missing)}, absent here; download what is missing")
        return Checkpoint(folder, config, files)
    try:
        with safe_open(str(folder / SINGLE), framework="pt") as file:
            files = {name: SINGLE for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / SINGLE} cannot be read ({error}); expected it, or {INDEX}") from error
    return Checkpoint(folder, config, files)


# What is stored, as codes ---------------------------------------------------------------------------------------------


def _take(checkpoint: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None) -> torch.Tensor:
    """A stored tensor of an expected dtype and shape; None for any shape of two dims."""
    found = checkpoint.tensor(name)
    if found.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"{name} is {str(found.dtype).removeprefix('torch.')}, expected {wanted}")
    if (found.ndim != 2) if shape is None else (tuple(found.shape) != shape):
        raise CheckpointError(f"{name} has shape {list(found.shape)}, expected {'two dims' if shape is None else list(shape)}")
    return found


def _codes(tensor: torch.Tensor) -> tuple[Codes, Format]:
    """The bits of a floating tensor and their format."""
    fmt = _TORCH[tensor.dtype]
    integer = {np.uint8: torch.uint8, np.uint16: torch.int16, np.uint32: torch.int32}[_WORDS[fmt]]
    return tensor.contiguous().view(integer).numpy().view(_WORDS[fmt]), fmt


def _scales(tensor: torch.Tensor, fmt: Format, name: str) -> Tensor:
    """Scales in another format, where it holds every one of them."""
    codes, own = _codes(tensor)
    if own is fmt:
        return Tensor(codes, fmt)
    values = decode(codes, own)
    there = encode(values, fmt, Rounding.RNE, Overflow.SPECIAL)
    changed = int((decode(there, fmt) != values).sum())
    if changed:
        raise CheckpointError(
            f"{name} is {own}, the op takes {fmt}, and {changed} of {values.size} scales would be rounded; expected scales in "
            "the dtype of the activations; load the model in that dtype"
        )
    return Tensor(there, fmt)


def _nibbles(words: npt.NDArray[Any], count: int) -> Codes:
    """[rows, words] to [rows, count]: element i of a word lies in bits 4 i .. 4 i + 3."""
    per_word = words.dtype.itemsize * 2
    shifts = np.arange(per_word, dtype=words.dtype) * words.dtype.type(4)
    parts = (words[:, :, None] >> shifts) & words.dtype.type(15)
    codes: Codes = parts.astype(np.uint8).reshape(words.shape[0], -1)[:, :count]
    return codes


def _packed_int4(checkpoint: Checkpoint, name: str) -> Codes:
    """weight_packed of pack-quantized: codes with offset 8, [N, K]."""
    logical = _take(checkpoint, f"{name}.weight_shape", (torch.int64, torch.int32), (2,))
    n, k = (int(size) for size in logical)
    words = _take(checkpoint, f"{name}.weight_packed", (torch.int32,), (n, -(-k // 8)))
    return _nibbles(words.numpy().view(np.uint32), k)


def _plain_int4(checkpoint: Checkpoint, name: str) -> Codes:
    """weight of int-quantized: one value per byte, -8..7; codes with offset 8, [N, K]."""
    values = _take(checkpoint, f"{name}.weight", (torch.int8,), None).numpy()
    outside = int(((values < -8) | (values > 7)).sum())
    if outside:
        raise CheckpointError(f"{name}.weight: {outside} of {values.size} values lie outside -8..7, which int4 holds")
    return (values + 8).astype(np.uint8)


def _int4(checkpoint: Checkpoint, name: str, scheme: Scheme, out: Format) -> QuantisedLinear:
    codes = (_packed_int4 if scheme.storage == "pack-quantized" else _plain_int4)(checkpoint, name)
    n, k = codes.shape
    _problem(name, scheme, 1, n, k, out, False)
    groups = (n, k // (scheme.group or k))
    scales = _take(checkpoint, f"{name}.weight_scale", _SCALES, groups)
    if scheme.op == "gemm_w4a8_fp8":
        folded, channels = fold_scales(_scales(scales, BF16, f"{name}.weight_scale").codes)
        constants = {
            "w": Tensor(flip_int4_offset(codes), INT4), "group_scale": Tensor(folded, E4M3FN),
            "channel_scale": Tensor(channels.reshape(n), F32),
        }
        return QuantisedLinear(name, scheme, n, k, constants)
    held = _scales(scales, out, f"{name}.weight_scale")
    constants = {"w": Tensor(codes, UINT4), "group_scale" if scheme.op == "gemm_w4a8_int8" else "scale": held}
    if not scheme.symmetric:
        words = _take(checkpoint, f"{name}.weight_zero_point", (torch.int32,), (-(-n // 8), groups[1]))
        constants["zero"] = Tensor(np.ascontiguousarray(_nibbles(words.numpy().view(np.uint32).T, n).T), UINT4)
    return QuantisedLinear(name, scheme, n, k, constants)


def _float8(checkpoint: Checkpoint, name: str, scheme: Scheme, out: Format) -> QuantisedLinear:
    stored = _take(checkpoint, f"{name}.weight", (torch.float8_e4m3fn,), None)
    n, k = stored.shape
    _problem(name, scheme, 1, n, k, out, False)
    where = f"{name}.weight_scale"
    if scheme.variant == "block":
        scale = _scales(_take(checkpoint, where, _SCALES, (-(-n // 128), k // 128)), F32, where)
        return QuantisedLinear(name, scheme, n, k, {"w": Tensor(_codes(stored)[0], E4M3FN), "w_scale": scale})
    given = checkpoint.tensor(where)
    rows = 1 if scheme.per_tensor else n
    if given.numel() != rows:
        raise CheckpointError(f"{where} has shape {list(given.shape)}, expected {rows} scale{'s' if rows > 1 else ''}")
    scale = _scales(_take(checkpoint, where, _SCALES, tuple(given.shape)).reshape(rows), F32, where)
    static = None
    if scheme.static_input:
        where = f"{name}.input_scale"
        static = _scales(_take(checkpoint, where, _SCALES, tuple(checkpoint.tensor(where).shape)).reshape(-1), F32, where)
        if static.codes.size != 1:
            raise CheckpointError(f"{where} holds {static.codes.size} scales, expected one")
    return QuantisedLinear(name, scheme, n, k, {"w": Tensor(_codes(stored)[0], E4M3FN), "channel_scale": scale}, static)


def _nvfp4(checkpoint: Checkpoint, name: str, scheme: Scheme, out: Format) -> QuantisedLinear:
    packed = _take(checkpoint, f"{name}.weight_packed", (torch.uint8,), None)
    n, k = packed.shape[0], packed.shape[1] * 2
    _problem(name, scheme, 1, n, k, out, False)
    blocks = _take(checkpoint, f"{name}.weight_scale", (torch.float8_e4m3fn,), (n, k // 16))
    divisors = [_take(checkpoint, f"{name}.{side}_global_scale", (torch.float32,), (1,)) for side in ("weight", "input")]
    weight, activation = (np.float32(divisor.item()) for divisor in divisors)
    if not (weight > 0 and activation > 0 and np.isfinite(weight) and np.isfinite(activation)):
        raise CheckpointError(f"{name}: global scales are {weight} and {activation}, expected finite divisors above 0")
    alpha = np.float32(1.0) / (activation * weight)  # binary32 product, then binary32 quotient
    constants = {
        "w": Tensor(_nibbles(packed.numpy(), k), E2M1), "w_scale": Tensor(_unsigned(blocks, name), UE4M3),
        "alpha": Tensor(np.array([alpha], np.float32).view(np.uint32), F32),
    }
    return QuantisedLinear(name, scheme, n, k, constants, Tensor(np.array([activation], np.float32).view(np.uint32), F32))


def _unsigned(scales: torch.Tensor, name: str) -> Codes:
    """Codes of block scales, which have no sign."""
    codes = _codes(scales)[0]
    negative = int((codes >= 0x80).sum())
    if negative:
        raise CheckpointError(f"{name}.weight_scale: {negative} of {codes.size} block scales have their sign bit set, not 0")
    return codes


_READERS = {"pack-quantized": _int4, "int-quantized": _int4, "float-quantized": _float8, "nvfp4-pack-quantized": _nvfp4}
